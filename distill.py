"""MOHAWK: teach a state-space model to be a Transformer, from the inside out [1].

Run:  python distill.py                                # all of it, small: minutes on a laptop
      python distill.py --stage 3 --tokens 3e9         # one stage, with its budget
      python distill.py --preset smollm2 --data ~/texts            # a real teacher, your own text

Feed the student X, ask both models the same question, shrink the distance between the answers:

    stage  both are fed             the question          an answer is   distance         who moves
      1    the teacher's input u    model.matrix(i, u)    (B, H, L, L)   Frobenius        mixers
      2    to layer i, for every i  model.block(i, u)     (B, L, D)      L2 per position  mixers
      3    the tokens               model.logits(tokens)  (B, L, V)      KL               everything

Each stage starts from the one before and leaves a model folder, out/<run>/stage<N>. What is not a
mixer is copied from the teacher at the start. A budget is a number of tokens. Progress goes to
out/<run>/log.jsonl, one object per line; the table at the end also to out/<run>/report.md. A run
that was stopped or killed goes on when the same command is given again, and ends with the same
weights.

It leaves out: several GPUs.

[1] MOHAWK, arXiv 2408.10189
"""
import argparse
import contextlib
import functools
import hashlib
import json
import math
import platform
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from model_ssm import SSM, UsageError
from model_teacher import TINY, Teacher, compare, train_tiny
from prepare import Parser, Tokenizer, Tokens, count, load_or_prepare, run_program
from ssd_kernel import orientation_loss, ssd_path

LOGITS_AT_ONCE = 2**26      # entries of a (tokens, V) map that stage 3 makes at once, in fp32


# -----------------------------------------------------------------------------
# the three stages. Each is a generator, so that one layer's graph is freed before the next is
# built. It yields (loss, left): left is the distance as a share of the teacher's own answer, where
# 1 is what silence would score.

def matrices(student, teacher, tokens):
    """matrix orientation: each mixer, given the teacher's input, mixes as its attention does"""
    for i, u in teacher.inputs(tokens, only=student.ssm_layers):        # u (B, L, D)
        distance, size = orientation_loss(*teacher.factors(i, u), *student.factors(i, u),
                                          return_size=True)
        yield distance, distance.detach() / size


def blocks(student, teacher, tokens):
    """hidden-state alignment: each layer, given the teacher's input, says what its layer says"""
    for i, u in teacher.inputs(tokens, only=student.ssm_layers):        # u (B, L, D)
        want = teacher.block(i, u)                                      # (B, L, D)
        gap = (student.block(i, u) - want).float().norm(dim=-1)         # (B, L)
        yield gap.mean(), gap.detach().mean() / (want - u).float().norm(dim=-1).mean()


def predictions(student, teacher, tokens, loss="kl", temperature=1.0, hard_weight=0.0):
    """knowledge distillation: the student, given the tokens, predicts what the teacher predicts"""
    ours, theirs = (model.hidden(tokens).flatten(0, 1) for model in (student, teacher))  # (B L, D)
    follow = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()             # (B L), -100: unknown
    rows, parts = max(1, LOGITS_AT_ONCE // student.config.vocab_size), []
    for part in zip(*(x.split(rows) for x in (ours, theirs, follow)), strict=True):
        parts.append(checkpoint(sums_of_rows, student, teacher, *part, temperature, hard_weight > 0,
                                use_reentrant=False))           # no (B L, V) map is kept
    kl, entropy, silence, hard = (sum(part) for part in zip(*parts, strict=True))
    # Of -sum p log q = KL + entropy, the second is the teacher's own: the gradient is the same.
    soft = kl + entropy if loss == "ce" else kl
    hard = hard_weight * hard / (follow >= 0).sum()
    yield temperature**2 * soft / len(ours) + hard.to(soft), kl.detach() / silence


def sums_of_rows(student, teacher, ours, theirs, follow, temperature, hard):
    """Final hidden states (n, D), next tokens (n) -> sums over n, at this temperature:
    KL(teacher || student), the teacher's entropy, KL(teacher || uniform); and, at 1, of the next
    token's -log probability, if `hard`"""
    with torch.autocast(ours.device.type, enabled=False):       # bf16 logits are off by percents
        logits = student.head(ours.float())                             # (n, V)
        hard = F.cross_entropy(logits, follow, reduction="sum") if hard else torch.zeros(())
        ours = (logits / temperature).log_softmax(-1)
        theirs = theirs.to(teacher.model.lm_head.weight.dtype)
        theirs = (teacher.head(theirs).float() / temperature).log_softmax(-1)
    p = theirs.exp()
    entropy = -(p * theirs).sum()
    return (p * (theirs - ours)).sum(), entropy, len(p) * math.log(p.shape[-1]) - entropy, hard


def next_tokens(student, teacher, tokens):
    """no distillation: the student, given the tokens, predicts the next; no teacher is asked"""
    logits = student.logits(tokens[:, :-1]).float().flatten(0, 1)       # (B (L - 1), V)
    loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
    yield loss, loss.detach() / math.log(logits.shape[-1])


STAGES = {  # number: (loss, the parameters that learn, by a part of their name)
    1: (matrices, ("mixer.in_proj", "mixer.conv1d", "mixer.D")),
    2: (blocks, ("mixer.",)),
    3: (predictions, ("everything",)),
}
PAPER_TOKENS = (80e6, 160e6, 2.76e9)
PRESETS = {  # one value for each stage, or one for all
    "phi": dict(
        teacher="microsoft/phi-1_5", data="allenai/c4", config="en", init="mohawk",
        tokens=PAPER_TOKENS, batch=(2**15, 2**15, 2**19), lr=(5e-4, 2e-3, 5e-4),
        warmup=0.1, decay=0.1, context=2048, micro_batch=8, eval_tokens=2**19),
    "smollm2": dict(
        teacher="smollm2", data=None, config=None, init="qkv",
        tokens=(10e3, 60e3, 40e3), batch=(256,), lr=(1e-3, 1e-3, 5e-4),
        warmup=0.1, decay=0.7, context=256, micro_batch=4, eval_tokens=2**13),
    "tiny": dict(
        teacher="tiny", data="stdlib", config=None, init="qkv",
        tokens=(0.05e6, 0.3e6, 0.85e6), batch=(256,), lr=(2e-3, 4e-3, 1e-3),
        warmup=0.1, decay=0.7, context=256, micro_batch=8, eval_tokens=2**17),
}


# -----------------------------------------------------------------------------
# one loop for all of them

def train(name, losses, parts, student, teacher, data, at, run, plan):
    """Train `student` on plan.tokens tokens from window `at` of `data` on. -> seconds it took

    name: what the log calls it   losses, parts: a row of STAGES   plan: tokens, batch, lr
    """
    args, B, L = run.args, plan.micro_batch, run.args.context
    learn = choose_learners(student, parts)
    held = rows_without_gradient(student) if losses is matrices else []
    optimizer = torch.optim.AdamW(decay_groups(learn, args.weight_decay),
                                  betas=tuple(args.betas), fused=True)
    autocast = contextlib.nullcontext if losses is matrices else run.autocast
    steps, accumulate = plan.tokens // plan.batch, plan.batch // (B * L)
    first, before = run.saved.restore(name, student, learn, optimizer)  # done before a kill
    at += first * accumulate * B
    run.open_log({name: first})
    print(f"{name} | {describe_learners(learn, student)}")
    print(f"{name} | {steps * plan.batch:,} tokens = {steps:,} steps x {plan.batch:,} "
          f"(batch {B} x length {L} x accumulate {accumulate})")
    start, saved, seconds = time.perf_counter() - before, time.perf_counter(), before
    bar = tqdm(total=steps * plan.batch, desc=name, unit=" tokens", unit_scale=True,
               mininterval=0.5, initial=first * plan.batch)

    for step in range(first, steps):
        # learn -----------------------------------------------------------
        lr = plan.lr * wsd(step, steps, args.warmup, args.decay)
        for group in optimizer.param_groups:
            group["lr"] = lr
        answers = []
        for _ in range(accumulate):
            if run.stop:                    # between steps: what is unfinished of this one is lost
                if step:
                    run.saved.save(name, step, seconds, student, learn, optimizer)
                raise Stopped(run.stop, f"{name}, after {step} of {steps} steps")
            tokens = data.batch(at, B, L)[:, :-1].to(run.device)        # (B, L)
            at += B
            with autocast():
                for loss, left in losses(student, teacher, tokens):
                    (loss / accumulate).backward()
                    answers.append(torch.stack([loss.detach(), left]))
        gnorm = torch.nn.utils.clip_grad_norm_(learn.values(), args.clip).item()
        loss, left = torch.stack(answers).mean(0).tolist()
        if not math.isfinite(loss + gnorm):
            raise UsageError(f"{name} step {step + 1}, windows {at - accumulate * B} to {at - 1}: "
                             f"loss {loss}, gradient norm {gnorm}; these weights were not saved, "
                             "try a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        for rows, kept in held:
            rows.copy_(kept)

        # tell ------------------------------------------------------------
        seen, seconds = (step + 1) * plan.batch, time.perf_counter() - start
        speed = seen / seconds
        bar.update(plan.batch)
        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        run.log({"stage": name, "step": step + 1, "loss": loss, "left": left, "lr": lr,
                 "gnorm": gnorm, "tokens": seen, "tok_s": speed})
        if (step + 1) % max(1, steps // 8) == 0 or step + 1 == steps:
            bar.write(f"{name} step {step + 1:5}/{steps} | loss {loss:9.4f} | left {left:7.1%} | "
                      f"lr {lr:.1e} | gnorm {gnorm:8.3f} | {seen / 1e6:.2f}M tokens | "
                      f"{speed:,.0f} tok/s | {clock((bar.total - seen) / speed)} "
                      "to go", file=sys.stdout)

        # keep ------------------------------------------------------------
        if time.perf_counter() - saved > 60 * args.save_minutes or step + 1 == steps:
            run.saved.save(name, step + 1, seconds, student, learn, optimizer)
            saved = time.perf_counter()
    bar.close()
    student.requires_grad_(True)
    return time.perf_counter() - start


def wsd(step, steps, warmup=0.1, decay=0.1):
    """Warm up, stay, decay: the share of the peak learning rate at `step` of `steps`.

    >>> [wsd(step, 10, 0.2, 0.4) for step in (0, 1, 5, 6, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]
    """
    return min(1.0, (step + 1) / (warmup * steps or 1), (steps - step) / (decay * steps or 1))


def clock(seconds):
    """
    >>> clock(75), clock(3840)
    ('1m15s', '1h04m')
    """
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes}m{seconds:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def choose_learners(student, parts):
    """Freeze all but what a row of STAGES names, in mixers of SSM layers. -> {name: parameter}"""
    mixers = tuple(f"backbone.layers.{i}.mixer." for i in student.ssm_layers)
    learn = {name: p for name, p in student.named_parameters() if parts == ("everything",)
             or name.startswith(mixers) and any(part in name for part in parts)}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(name in learn)
    return learn


def decay_groups(learn, weight_decay):
    """Weight decay for matrices only. It would pull norms and D to 0, and the convolution with
    them, whose start is the identity."""
    matrices = {name: p for name, p in learn.items() if p.dim() == 2}
    others = [p for name, p in learn.items() if name not in matrices]
    return [{"params": list(matrices.values()), "weight_decay": weight_decay},
            {"params": others, "weight_decay": 0.0}]


def rows_without_gradient(student):
    """-> [(rows, their values)]: v and z are rows of in_proj that no mixing matrix contains. Weight
    decay would shrink them in stage 1, so they are put back after each step."""
    held = []
    for i in student.ssm_layers:
        mixer = student.layers[i].mixer
        v, _, _, z, _ = mixer.in_proj.weight.detach().split(mixer.sizes)
        held += [(v, v.clone()), (z, z.clone())]
    return held


def describe_learners(learn, student):
    kinds = {}
    for name, p in learn.items():
        kind = ".".join(x for x in name.split(".") if not x.isdigit() and x not in
                        ("backbone", "layers", "weight", "bias"))
        kinds[kind] = kinds.get(kind, 0) + p.numel()
    total = sum(p.numel() for p in student.parameters())
    return (f"{sum(kinds.values()):,} of {total:,} parameters learn: "
            + ", ".join(f"{kind} {n:,}" for kind, n in kinds.items()))


# -----------------------------------------------------------------------------
# a run

class Run:
    """What all stages of a run share: arguments, folder, log, device, precision."""

    def __init__(self, args):
        self.args, self.folder = args, Path(args.out or f"out/{args.preset}")
        self.stop, self.saved = None, Saved(self.folder / "last")
        self.device, bf16, why = choose_device(args.device)
        self.autocast = lambda: torch.autocast(self.device, torch.bfloat16, enabled=bf16)
        print(f"device {self.device} ({why}) | weights and stage 1 in fp32, stages 2 and 3 "
              f"{'autocast to bf16' if bf16 else 'in fp32'} | SSD in {ssd_path(self.device)}")

    def begin(self, teacher, data_folder):
        """A new run: nothing of an old one may be taken for it."""
        shutil.rmtree(self.saved.folder, ignore_errors=True)
        self.saved.folder.mkdir(parents=True)
        names = [f"stage {stage}" for stage in self.args.stage] + ["stage 3 only", "from scratch"]
        self.open_log(dict.fromkeys(names, 0))
        self.describe(teacher, data_folder)

    def open_log(self, steps):
        """Of the lines of a stage in {stage: steps} so many stay, of other stages all: a student
        distilled stage by stage has one log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        old = path.read_text().splitlines(keepends=True) if path.exists() else []
        self.file = open(path, "w")
        for line in old:
            if line.endswith("\n"):                 # a kill may have cut the last one
                event = json.loads(line)
                if event["step"] <= steps.get(event["stage"], math.inf):
                    self.file.write(line)
        self.file.flush()

    def log(self, event):
        self.file.write(json.dumps(event) + "\n")
        self.file.flush()

    def describe(self, teacher, data_folder):
        try:
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                                    cwd=Path(__file__).parent).stdout.strip()
        except OSError:                                 # no git on this machine
            commit = ""
        plans = {stage: vars(plan) for stage, plan in self.args.plans.items()}
        about = {"arguments": vars(self.args) | {"plans": plans}, "teacher": teacher.name,
                 "teacher_fingerprint": teacher.fingerprint, "data": str(data_folder),
                 "commit": commit, "machine": platform.processor() or platform.machine(),
                 "versions": {"python": platform.python_version(), "torch": torch.__version__,
                              "transformers": transformers.__version__}}
        (self.folder / "run.json").write_text(json.dumps(about, indent=1) + "\n")


@contextlib.contextmanager
def stopping(run):
    """Within, SIGTERM and Ctrl-C only set run.stop."""
    def note(number, frame):
        run.stop = number
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Stopped(SystemExit):
    """SIGTERM or Ctrl-C, after what was done is saved"""

    def __init__(self, number, where):
        print(f"\nstopped by {signal.Signals(number).name} in {where}: "
              "the same command goes on from here", file=sys.stderr)
        super().__init__(128 + number)


class Saved:
    """What a stopped run needs to go on, in out/<run>/last; gone when the run ends.

    run.json            the recipe, the stages that are finished, the report so far
    <stage>-<step>/     state.safetensors: weights, and AdamW's moments of what learns
                        state.json: its SHA-256. The newest two are kept.
    The learning rate and the data are functions of the step, and nothing else is random.
    """

    def __init__(self, folder):
        self.folder, self.finished, self.rows = folder, [], {}

    def look(self, recipe, fresh):
        """What is here of an unfinished run, which must be of this recipe. Changes no file."""
        self.recipe, path = json.loads(json.dumps(recipe)), self.folder / "run.json"
        if fresh or not path.exists():
            return
        about = json.loads(path.read_text())
        was, now = about["recipe"], self.recipe
        changed = [f"{key} was {was.get(key)}, is {now.get(key)}"
                   for key in was | now if was.get(key) != now.get(key)]
        if changed:
            raise UsageError(f"{self.folder} holds an unfinished run of another recipe "
                             f"({'; '.join(changed)}): give its command to go on with it, "
                             "or --fresh to start over")
        self.finished, self.rows = about["finished"], about["rows"]

    def note(self, stage=None, **rows):
        """A stage is finished, or a row of the report is known."""
        self.finished += [stage] if stage else []
        self.rows |= rows
        about = {"recipe": self.recipe, "finished": self.finished, "rows": self.rows}
        partial = self.folder / ".run.json"
        partial.write_text(json.dumps(about, indent=1) + "\n")
        partial.replace(self.folder / "run.json")
        for state in self.states(f"stage {stage}"):     # its model folder is what counts now
            shutil.rmtree(state)

    def states(self, name):
        """Folders of this stage's states, newest first"""
        found = self.folder.glob(f"{name}-*")
        return sorted(found, key=lambda path: -int(path.name.rpartition("-")[2]))

    def save(self, name, step, seconds, student, learn, optimizer):
        tensors = {f"weights.{key}": p.detach() for key, p in student.named_parameters()}
        for key, p in learn.items():
            tensors |= {f"{moment}.{key}": optimizer.state[p][moment]
                        for moment in ("exp_avg", "exp_avg_sq") if p in optimizer.state}
        partial, folder = self.folder / ".partial", self.folder / f"{name}-{step}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            save_file(tensors, partial / "state.safetensors")
            with safe_open(partial / "state.safetensors", "pt") as file:
                if not all(torch.equal(file.get_tensor(key), x.cpu())
                           for key, x in tensors.items()):
                    raise OSError("what was read back is not what was written")
            about = {"step": step, "seconds": seconds,
                     "sha256": sha256(partial / "state.safetensors")}
            (partial / "state.json").write_text(json.dumps(about))
            shutil.rmtree(folder, ignore_errors=True)
            partial.rename(folder)
        except Exception as error:          # a full disk is an error of half a dozen types
            shutil.rmtree(partial, ignore_errors=True)
            raise UsageError(f"{folder} could not be saved ({error}); the state before it is kept: "
                             "make room, and the same command goes on from there") from error
        for old in self.states(name)[2:]:
            shutil.rmtree(old)

    def restore(self, name, student, learn, optimizer):
        """Load the newest state of this stage that is whole. -> steps done, seconds taken"""
        for folder in self.states(name):
            try:
                about = json.loads((folder / "state.json").read_text())
                if sha256(folder / "state.safetensors") != about["sha256"]:
                    raise ValueError("its checksum differs")
            except (OSError, ValueError, KeyError) as error:
                print(f"{name} | {folder} is damaged ({error}): it is left out")
                continue
            with safe_open(folder / "state.safetensors", "pt") as file, torch.no_grad():
                for key, p in student.named_parameters():
                    p.copy_(file.get_tensor(f"weights.{key}"))
                for key, p in learn.items():
                    optimizer.state[p] = {"step": torch.tensor(float(about["step"]))} | {
                        moment: file.get_tensor(f"{moment}.{key}").to(p.device)
                        for moment in ("exp_avg", "exp_avg_sq")}
            print(f"{name} | goes on from {folder}")
            return about["step"], about["seconds"]
        return 0, 0.0


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recipe_of(args, teacher, data):
    """What must be the same for a run to go on; where it is written and when is not part of it."""
    apart = ("out", "device", "fresh", "recompute", "save_minutes", "preset", "tokens", "batch",
             "lr", "plans", "micro_batch", "stage")
    plans = {f"stage {stage} {key}": value for stage, plan in args.plans.items()
             for key, value in vars(plan).items()}
    return {key: value for key, value in vars(args).items() if key not in apart} | plans | {
        "teacher's weights": teacher.fingerprint, "data's checksums": data.fingerprint}


def choose_device(asked):
    """-> the device, whether it is good at bf16, and why we think so"""
    device = asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        bf16, why = torch.cuda.is_bf16_supported(), torch.cuda.get_device_name()
    else:
        # Without AMX or AVX512-BF16 a CPU converts back and forth: bf16 is slower than fp32.
        bf16 = device == "cpu" and (torch.cpu._is_amx_tile_supported()
                                    or torch.cpu._is_avx512_bf16_supported())
        why = (f"{torch.get_num_threads()} threads, "
               f"{'with' if bf16 else 'without'} bf16 matrix instructions")
    return device, bf16, why


def starting_student(stage, run, teacher, previous):
    """What `stage` starts from: the stage before, loaded strictly, or a copy of the teacher.

    -> the student, and what its folder says about it
    """
    args, folder = run.args, run.folder / f"stage{previous or stage - 1}"
    if folder.exists():
        student, about = SSM.from_pretrained(folder), read_about(folder)
        if about.get("teacher_fingerprint") != teacher.fingerprint:
            raise UsageError(f"{folder} was distilled from {about.get('teacher')}, whose weights "
                             f"are not those of {teacher.name}: choose another --out, or run the "
                             "stages before it again")
        asked = layer_numbers(args.attn_layers, teacher)
        if args.attn_layers is not None and asked != student.config.attn_layers:
            raise UsageError(f"{folder} keeps attention in layers {student.config.attn_layers}, "
                             f"--attn_layers asks for {asked}: choose another --out")
        print(f"stage {stage} | from {folder} ({about['tokens']:,} tokens) | {student.loaded}")
        return student, about
    if stage > 1:
        print(f"stage {stage} | there is no {folder}: starts from a copy of the teacher instead")
    student = copy_of_teacher(run, teacher)
    print(f"stage {stage} | from {teacher.name}, init {args.init} | {student.loaded}")
    return student, {"tokens": 0, "seconds": 0}


def copy_of_teacher(run, teacher):
    torch.manual_seed(run.args.seed)
    layers = layer_numbers(run.args.attn_layers, teacher)
    if len(layers) == len(teacher.layers):
        raise UsageError("every layer keeps its attention: there is no mixer to teach")
    return SSM.from_teacher(teacher, layers, run.args.init)


def layer_numbers(asked, teacher):
    if asked == ["all"]:
        return tuple(range(len(teacher.layers)))
    try:
        return tuple(sorted({int(i) for i in asked or ()}))
    except ValueError as error:
        raise UsageError(f"--attn_layers {' '.join(asked)}: give layer numbers, or all") from error


def read_about(folder):
    return json.loads((folder / "config.json").read_text()).get("about", {})


def main(arguments=None):
    args = parse(arguments)
    run, total = Run(args), sum(plan.tokens for plan in args.plans.values())
    tokenizer = Tokenizer(args.teacher)
    data_folder = load_or_prepare(args.data, tokenizer, args.config, total)
    data, held_out = Tokens(data_folder, "train", args.seed), Tokens(data_folder, "val")
    if args.teacher == "tiny" and not TINY.exists():
        run.open_log({"teacher": 0})
        train_tiny(Tokens(data_folder, "train", seed=0), tokenizer, run.log, args.teacher_tokens,
                   run.device, run.autocast)
    teacher = Teacher.load(args.teacher, run.device,
                           torch.bfloat16 if run.device == "cuda" else torch.float32)
    if teacher.config.vocab_size < tokenizer.vocab_size:
        raise UsageError(f"the data has a {tokenizer.vocab_size:,}-word vocabulary, the teacher "
                         f"only {teacher.config.vocab_size:,}: prepare it with its own tokenizer")
    parameters = sum(p.numel() for p in teacher.model.parameters())
    print(f"teacher {teacher.name}: {parameters:,} parameters, {len(teacher.layers)} layers | "
          f"data {data_folder}: {len(data):,} tokens, this run reads {total / len(data):.2f} of it")
    windows = held_out.windows(max(1, args.eval_tokens // args.context), args.context)

    saved = run.saved
    saved.look(recipe_of(args, teacher, data), args.fresh)
    todo, previous = [stage for stage in args.stage if stage not in saved.finished], None
    for stage in saved.finished:
        print(f"stage {stage} | was finished before: {run.folder}/stage{stage}")
        previous = stage
    for stage in todo:
        student, about = starting_student(stage, run, teacher, previous)
        student.to(run.device).recompute = args.recompute
        if not saved.rows:                  # from here on files change: all refusals are behind us
            run.begin(teacher, data_folder)
            saved.note(teacher=compare(teacher, teacher, windows))
        if about["tokens"] == 0 and "copied" not in saved.rows:
            saved.note(copied=compare(student, teacher, windows) | about)
        (losses, parts), plan = STAGES[stage], args.plans[stage]
        print(f"\nstage {stage} of 3 | {losses.__doc__}")
        losses, parts = with_options(losses, args), ("mixer.",) if args.train == "mixer" else parts
        with stopping(run):
            seconds = train(f"stage {stage}", losses, parts, student, teacher, data,
                            about["tokens"] // args.context, run, plan)
        row = compare(student, teacher, windows) | {
            "tokens": about["tokens"] + plan.tokens // plan.batch * plan.batch,
            "seconds": about["seconds"] + seconds}
        folder = run.folder / f"stage{stage}"
        student.save_pretrained(folder, stage=stage, teacher=teacher.name,
                                teacher_fingerprint=teacher.fingerprint, **row)
        saved.note(stage)
        print(f"stage {stage} | saved {folder} | {describe(row)}")
        previous = stage
    rows = {name: row for name, row in saved.rows.items() if name in ("teacher", "copied")}
    for stage in range(1, previous + 1):    # earlier stages of this student are read from disk
        if (run.folder / f"stage{stage}").exists():
            rows[f"stage {stage}"] = read_about(run.folder / f"stage{stage}")
    if args.controls:
        rows |= controls(run, teacher, data, windows, rows[f"stage {previous}"]["tokens"])
    report(run, rows)
    shutil.rmtree(saved.folder)


def with_options(losses, args):
    """Stage 3's loss as the command line asks for it; the others have no options."""
    if losses is not predictions:
        return losses
    return functools.partial(predictions, loss=args.loss, temperature=args.temperature,
                             hard_weight=args.hard_weight)


def controls(run, teacher, data, windows, tokens):
    """The same tokens spent on stage 3 alone, and on the text with no teacher. -> two rows"""
    last = run.args.plans[run.args.stage[-1]]
    plan = argparse.Namespace(**vars(last) | {"tokens": tokens,
                                              "lr": run.args.control_lr or last.lr})
    names = {"stage 3 only": predictions, "from scratch": next_tokens}
    for name, losses in names.items():
        if name in run.saved.rows:
            continue
        print(f"\n{name} | {losses.__doc__}")
        student = copy_of_teacher(run, teacher)
        if losses is next_tokens:
            student = SSM(student.config)
        with stopping(run):
            seconds = train(name, with_options(losses, run.args), ("everything",),
                            student.to(run.device), teacher, data, 0, run, plan)
        row = compare(student, teacher, windows) | {"tokens": tokens, "seconds": seconds}
        run.saved.note(**{name: row})
        print(f"{name} | {describe(row)}")
    return {name: run.saved.rows[name] for name in names}


def describe(row):
    return f"val loss {row['loss']:.4f} | KL {row['kl']:.4f} | top-1 {row['top1']:.1%}"


def report(run, rows):
    """The table that ends a run, on the screen and in report.md."""
    table = [f"| {'model':<12} | val loss |    ppl |     KL |  top-1 |        tokens | seconds |",
             f"|{'-' * 14}|{'-' * 10}|{'-' * 8}|{'-' * 8}|{'-' * 8}|{'-' * 15}|{'-' * 9}|"]
    for name, row in rows.items():
        spent = f"{row['tokens']:13,} | {row['seconds']:7.0f}" if "tokens" in row else f"{'':13} | "
        table.append(f"| {name:<12} | {row['loss']:8.4f} | {math.exp(min(row['loss'], 20)):6.2f} | "
                     f"{row['kl']:6.4f} | {row['top1']:6.1%} | {spent:<23} |")
    (run.folder / "report.md").write_text("\n".join(table) + "\n")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**(30 if sys.platform == "darwin"
                                                                   else 20)
    print("\n" + "\n".join(table))
    print("\nval loss and KL to the teacher in nats per held-out token; tokens and seconds count "
          f"from the copy on; peak memory {peak:.1f} GB\nsaved {run.folder}/report.md | "
          f"next: python eval.py {run.folder}")


# -----------------------------------------------------------------------------
# the command line

def parse(arguments=None):
    """-> the arguments, with plans = {stage: tokens, batch, lr}; UsageError if they do not fit."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="a whole recipe [phi where CUDA is, else tiny]")
    add("--stage", type=int, nargs="+", default=[1, 2, 3], help="stages to run [1 2 3]")
    # what
    add("--teacher", help="a Hugging Face id or folder, a .gguf file, smollm2, or tiny")
    add("--data", help="stdlib, a file or folder of text, JSONL or Parquet, or a Hugging Face id")
    add("--config", help="which part of a Hugging Face data set")
    add("--init", choices=("mohawk", "qkv"), help="mixers start MOHAWK's way, or from q, k, v")
    add("--attn_layers", nargs="+", help="layers that keep attention; paper: 4 10 16 22 [none]")
    add("--out", help="folder of the run [out/<preset>]")
    # how much: one value for each stage, or one for all
    add("--tokens", type=count, nargs="+", help="budget; one for all is split as the paper's")
    add("--batch", type=count, nargs="+", help="tokens per update")
    add("--lr", type=float, nargs="+", help="peak learning rate")
    # how
    add("--loss", choices=("kl", "ce"), default="kl", help="of stage 3; same gradient [kl]")
    add("--temperature", type=float, default=1.0, help="of both models' predictions in it [1]")
    add("--hard_weight", type=float, default=0.0, help="of the next-token loss beside it [0]")
    add("--train", choices=("paper", "mixer"), default="paper",
        help="what learns: as the paper's stages, or the mixers only, in stage 3 too [paper]")
    add("--recompute", action="store_true",
        help="keep one activation a layer for the backward and compute the others again")
    add("--context", type=int, help="tokens per window")
    add("--micro_batch", type=int, help="windows at once; the rest of a batch is accumulated")
    add("--warmup", type=float, help="share of the steps in which the learning rate rises")
    add("--decay", type=float, help="share of the steps in which it falls")
    add("--betas", type=float, nargs=2, default=(0.9, 0.95), help="AdamW's [0.9 0.95]")
    add("--weight_decay", type=float, default=0.1, help="of matrices [%(default)s]")
    add("--clip", type=float, default=1.0, help="largest gradient norm [%(default)s]")
    add("--save_minutes", type=float, default=10, help="between two states to go on from [10]")
    add("--fresh", action="store_true", help="start over, where an unfinished run lies")
    add("--seed", type=int, default=0, help="of new weights and of data order [%(default)s]")
    add("--device", default="auto", help="cuda, cpu or mps [%(default)s]")
    # to compare with
    add("--eval_tokens", type=count, help="held-out tokens to read")
    add("--controls", action="store_true", help="also stage 3 alone, and no teacher at all")
    add("--control_lr", type=float, help="their learning rate [the last stage's]")
    add("--teacher_tokens", type=count, default=4 * 10**6, help="for the tiny one [%(default)s]")
    args = parser.parse_args(arguments)

    if args.preset is None:
        args.preset, some = ("phi", "a") if torch.cuda.is_available() else ("tiny", "no")
        print(f"preset {args.preset}, since there is {some} CUDA device (or choose by --preset)")
    preset, own = PRESETS[args.preset], {x: getattr(args, x) for x in ("tokens", "batch", "lr")}
    for name, value in preset.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data is None:
        raise UsageError(f"--preset {args.preset} brings no text: give --data, a file or folder")
    if set(args.stage) - set(STAGES) or sorted(set(args.stage)) != args.stage:
        raise UsageError(f"--stage {' '.join(map(str, args.stage))}: choose among 1, 2 and 3, "
                         "in this order")
    if args.temperature <= 0 or args.hard_weight < 0:
        raise UsageError("--temperature must be above 0, and --hard_weight not below it")
    if own["tokens"] and len(own["tokens"]) == 1:
        shares = [PAPER_TOKENS[stage - 1] for stage in args.stage]
        own["tokens"] = [round(own["tokens"][0] * share / sum(shares)) for share in shares]

    args.plans = {}
    for n, stage in enumerate(args.stage):
        values = {name: pick(name, mine, n, len(args.stage)) if mine
                  else pick(name, preset[name], stage - 1, 3) for name, mine in own.items()}
        plan = args.plans[stage] = argparse.Namespace(**values | {"tokens": int(values["tokens"])})
        if plan.batch % args.context or plan.batch == 0:
            raise UsageError(f"--batch {plan.batch} is not a whole number of windows of --context "
                             f"{args.context}")
        if plan.tokens < plan.batch:
            raise UsageError(f"stage {stage} has {plan.tokens:,} tokens, less than one batch of "
                             f"{plan.batch:,}: give more --tokens or a smaller --batch")
        plan.micro_batch = math.gcd(args.micro_batch, plan.batch // args.context)
    return args


def pick(name, values, n, of):
    if len(values) not in (1, of):
        raise UsageError(f"--{name} has {len(values)} values for {of} stages: give 1, or one each")
    return values[n if len(values) > 1 else 0]


if __name__ == "__main__":
    run_program(main)
