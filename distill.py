"""MOHAWK: teach a state-space model to be a Transformer, from the inside out [1].

Run:  python distill.py                                # all of it, small: minutes on a laptop
      python distill.py --stage 3 --tokens 3e9         # one stage, with its budget
      python distill.py --preset smollm2 --data ~/texts            # a real teacher, your own text
      torchrun --nproc_per_node=8 distill.py           # on eight GPUs; --fsdp shards both models
      python distill.py --preset phi --plan H100       # what it would cost; nothing is loaded

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

[1] MOHAWK, arXiv 2408.10189    [2] objectives for shallower students, arXiv 2310.08797
[3] mixers and their initialisations, arXiv 2504.14366
"""
import argparse
import atexit
import collections
import contextlib
import copy
import dataclasses
import datetime
import functools
import hashlib
import itertools
import json
import math
import os
import platform
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import filelock
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from model_ssm import MIXERS, SSM, Config, UsageError, sources
from model_teacher import (
    TINY,
    TINY_BATCH,
    TINY_CONTEXT,
    Teacher,
    Tokenizer,
    architecture,
    compare,
    pass_keys,
    retrieval,
    train_tiny,
)
from prepare import (
    Parser,
    Stream,
    Tokens,
    at_least_one,
    count,
    fraction,
    load_or_prepare,
    not_negative,
    positive,
    run_program,
    source_of_text,
)
from ssd_kernel import ssd_path

LOGITS_AT_ONCE = 2**26      # entries of a (tokens, V) map that stage 3 makes at once, in fp32
RELATIONS_AT_ONCE = 256     # rows of a (L, L) map that `relations` makes at once


# -----------------------------------------------------------------------------
# the three stages. Each is a generator, so that one layer's graph is freed before the next is
# built. It yields (loss, left): left is the distance as a share of the teacher's own answer, where
# 1 is what silence would score.

def matrices(student, teacher, tokens):
    """matrix orientation: each mixer, given the teacher's input, mixes as its attention does"""
    for i, u in teacher.inputs(tokens, only=student.ssm_layers):        # u (B, L, D)
        distance, size = student.orientation(i, u, *teacher.factors(i, u))
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


EVERYTHING, MIXERS_ONLY = "", r"mixer\.(?!self_attn)"
STAGES = {  # number: (loss, the parameters that learn: what is found in their names)
    1: (matrices, r"mixer\.(in_proj|conv1d|D)"),
    2: (blocks, MIXERS_ONLY),
    3: (predictions, EVERYTHING),
}
PRESETS = {  # what, and how much; one value for each stage, or one for all
    "phi": dict(
        teacher="microsoft/phi-1_5", data="allenai/c4", config="en", recipe="paper",
        tokens=3e9, shares=(80, 160, 2760), batch=(2**15, 2**15, 2**19), lr=(5e-4, 1e-3, 2e-4),
        context=2048, micro_batch=8, eval_tokens=2**19),
    "smollm2": dict(
        teacher="smollm2", data=None, config=None, recipe="modern",
        tokens=110e3, shares=(1, 6, 4), batch=(256,), lr=(1e-3, 1e-3, 5e-4),
        context=256, micro_batch=4, eval_tokens=2**13),
    "tiny": dict(
        teacher="tiny", data="stdlib", config=None, recipe="modern",
        tokens=1.2e6, shares=(1, 6, 17), batch=(256,), lr=(2e-3, 4e-3, 1e-3),
        context=256, micro_batch=8, eval_tokens=2**17),
}
RECIPES = {  # how; what the modern one does not say is the preset's, chosen for it
    "paper": dict(init="mohawk", shares=(80, 160, 2760), lr=(5e-4, 2e-3, 5e-4), decay=0.1),
    "modern": dict(init="fit", decay=0.7),
}


# -----------------------------------------------------------------------------
# one loop for all of them

def train(name, losses, moves, student, teacher, data, at, run, plan):
    """Train `student` on plan.tokens tokens from window `at` of `data` on. -> seconds it took

    name: what the log calls it   losses, moves: a row of STAGES   plan: tokens, batch, lr
    Of several processes each reads its own windows of the same batches.
    """
    args, B, L, world = run.args, plan.micro_batch, run.args.context, run.world
    learn = choose_learners(student, moves)
    held = rows_without_gradient(student, losses)
    optimizer = make_optimizer(learn, args)
    autocast = contextlib.nullcontext if losses is matrices else run.autocast
    steps, accumulate = plan.tokens // plan.batch, plan.batch // (B * L * world)
    first, before = run.saved.restore(name, student, learn, optimizer)  # done before a kill
    ask, quiet = spread(losses, student, teacher, run)
    at += first * plan.batch // L
    run.open_log({name: first})
    print(f"{name} | {describe_learners(learn, student)}")
    print(f"{name} | {steps * plan.batch:,} tokens = {steps:,} steps x {plan.batch:,} "
          f"(batch {B} x length {L} x accumulate {accumulate}{f' x {world} GPUs' * (world > 1)})")
    start, saved, seconds = time.perf_counter() - before, time.perf_counter(), before
    bar = tqdm(total=steps * plan.batch, desc=name, unit=" tokens", unit_scale=True,
               mininterval=0.5, initial=first * plan.batch, disable=run.rank > 0)

    for step in range(first, steps):
        # learn -----------------------------------------------------------
        lr = plan.lr * wsd(step, steps, args.warmup, args.decay)
        set_lr(optimizer, lr)
        answers = []
        for micro in range(accumulate):
            if run.stop and world == 1:     # what is unfinished of this step is lost
                if step:
                    run.saved.save(name, step, seconds, student, learn, optimizer)
                raise Stopped(run.stop, f"{name}, after {step} of {steps} steps")
            mine = at + (micro * world + run.rank) * B
            tokens = data.batch(mine, B, L)[:, :-1].to(run.device)      # (B, L)
            with autocast(), quiet() if micro + 1 < accumulate else contextlib.nullcontext():
                for loss, left in ask(tokens):
                    (loss / accumulate).backward()
                    answers.append(torch.stack([loss.detach(), left]))
        most = args.clip or math.inf                    # 0 is no clipping, as elsewhere
        gnorm = whole(torch.nn.utils.clip_grad_norm_(learn.values(), most)).item()
        due = step + 1 == steps or time.perf_counter() - saved > 60 * args.save_minutes
        loss, left, due, stop = run.mean([*torch.stack(answers).mean(0), due, bool(run.stop)])
        if not math.isfinite(loss + gnorm):
            raise UsageError(f"{name} step {step + 1}, windows {at} to {at + plan.batch // L - 1}: "
                             f"loss {loss}, gradient norm {gnorm}; these weights were not saved, "
                             "try a lower --lr")
        optimizer.step()
        optimizer.zero_grad()
        for rows, which, kept in held:
            rows[which] = kept
        at += plan.batch // L

        # tell ------------------------------------------------------------
        seen, seconds = (step + 1) * plan.batch, time.perf_counter() - start
        speed = seen / seconds
        mfu = speed * run.flops / (run.peak * world)
        bar.update(plan.batch)
        bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        run.log({"stage": name, "step": step + 1, "loss": loss, "left": left, "lr": lr,
                 "gnorm": gnorm, "tokens": seen, "tok_s": speed, "mfu": mfu})
        if (step + 1) % max(1, steps // 8) == 0 or step + 1 == steps:
            bar.write(f"{name} step {step + 1:5}/{steps} | loss {loss:9.4f} | left {left:7.1%} | "
                      f"lr {lr:.1e} | gnorm {gnorm:8.3f} | {seen / 1e6:.2f}M tokens | "
                      f"{speed:,.0f} tok/s | mfu {mfu:.0%} | "
                      f"{clock((bar.total - seen) / speed)} to go", file=sys.stdout)

        # keep ------------------------------------------------------------
        if due or stop:
            run.saved.save(name, step + 1, seconds, student, learn, optimizer)
            saved = time.perf_counter()
        if stop:
            raise Stopped(run.stop or signal.SIGTERM, f"{name}, after {step + 1} of {steps} steps")
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


def choose_learners(student, moves):
    """Freeze all but what a row of STAGES names. -> {name: parameter}"""
    if isinstance(student, FSDPModule):         # since it was last asked, some of its parameters
        student.reshard()                       # have been whole: other objects than its shards
    moves = re.compile(moves.replace("LAST", str(student.config.n_layer - 1)))
    learn = {name: p for name, p in student.named_parameters() if moves.search(name)}
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


def make_optimizer(learn, args):
    groups = decay_groups(learn, args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=tuple(args.betas), fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UsageError("--optimizer adamw8bit needs torchao: pip install torchao") from error
    return AdamW8bit(groups, betas=tuple(args.betas))


def set_lr(optimizer, lr):
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):       # torchao's: a float would be compiled in
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def rows_without_gradient(student, losses):
    """-> [(weight, which of its rows, their values)]: v and z are rows of in_proj that no mixing
    matrix contains, and the last layer's relations have no z and no gates. Weight decay would
    shrink them, so they are put back after each step."""
    held, layers, parts = [], [], ()
    if losses is matrices:
        layers, parts = student.ssm_layers, (0, 3)
    elif getattr(losses, "func", None) is relations:
        layers, parts = [student.config.n_layer - 1], (3, 4)
    for i in layers:
        mixer = student.layers[i].mixer
        weight, which = mixer.in_proj.weight.detach(), torch.zeros(sum(mixer.sizes), dtype=bool)
        for part in parts:
            which.split(mixer.sizes)[part][:] = True
        which = like(weight, which)
        if isinstance(weight, DTensor):             # the rows that this process has
            weight, which = weight.to_local(), which.to_local()
        held.append((weight, which, weight[which].clone()))
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
    """What all stages of a run share: arguments, folder, log, device, precision, other processes.

    flops: of one token in the stage that runs   peak: FLOP/s this device is good for
    """

    def __init__(self, args):
        self.args, self.folder = args, Path(args.out or f"out/{args.preset}")
        self.device, self.bf16, why = choose_device(args.device, args.fp32)
        self.rank, self.world = join(self.device)
        in_bf16 = self.device == "cuda" and self.bf16
        self.dtype = torch.bfloat16 if in_bf16 else torch.float32       # the teacher's
        self.stop, self.flops = None, 0
        self.saved = Saved(self.folder / "last", self.rank)
        self.autocast = lambda: torch.autocast(self.device, torch.bfloat16, enabled=self.bf16)
        self.peak, known = peak_of(self.device, self.bf16)
        print(f"device {self.device} ({why}) | weights and stage 1 in fp32, stages 2 and 3 "
              f"{'autocast to bf16' if self.bf16 else 'in fp32'} | SSD in {ssd_path(self.device)}")
        if self.dtype == torch.bfloat16:
            # Where a product is in fp32, the head's and stage 1's, ten bits of the inputs will do,
            # and are ten times as fast: bf16, which all else is in, has seven.
            torch.set_float32_matmul_precision("high")
        if self.world > 1:
            print(f"{self.world} processes, {'FSDP2' if args.fsdp else 'DDP'}")
        print(f"mfu counts from {self.peak / 1e12:.2f} TFLOP/s, {known}")

    def alone(self):
        """From here on nobody else writes to this folder, until this process ends."""
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = filelock.FileLock(self.folder / ".lock", timeout=0, is_singleton=True)
            try:
                self.lock.acquire()
            except filelock.Timeout as error:
                raise UsageError(f"another process is at work in {self.folder}: wait for it, "
                                 "or choose another --out") from error

    def begin(self, teacher, data):
        """A new run: nothing of an old one may be taken for it."""
        if self.rank == 0:
            shutil.rmtree(self.saved.folder, ignore_errors=True)
            self.saved.folder.mkdir(parents=True)
            names = [f"stage {stage}" for stage in self.args.stage] + ["stage 3 only",
                                                                      "from scratch"]
            self.open_log(dict.fromkeys(names, 0))
            self.describe(teacher, data)

    def cost(self, *step):
        return cost(*step, self.args, self.device == "cuda", self.bf16)

    def memory(self):
        """Largest number of bytes held so far: on a GPU by tensors, else by this process"""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 2**10
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def mean(self, numbers):
        """Of each number its mean over all processes, as floats"""
        told = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=self.device)
                            for x in numbers])
        if self.world > 1:
            dist.all_reduce(told)
            told /= self.world
        return told.tolist()

    def open_log(self, steps):
        """Of the lines of a stage in {stage: steps} so many stay, of other stages all: a student
        distilled stage by stage has one log."""
        if self.rank:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "log.jsonl"
        old = path.read_text("utf-8").splitlines(keepends=True) if path.exists() else []
        self.file = open(path, "w", encoding="utf-8")
        for line in old:
            if line.endswith("\n"):                 # a kill may have cut the last one
                event = json.loads(line)
                if event["step"] <= steps.get(event["stage"], math.inf):
                    self.file.write(line)
        self.file.flush()

    def log(self, event):
        if self.rank == 0:
            self.file.write(json.dumps(event) + "\n")
            self.file.flush()

    def describe(self, teacher, data):
        try:
            commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True,
                                    cwd=Path(__file__).parent).stdout.decode("ascii").strip()
        except OSError:                                 # no git on this machine
            commit = ""
        plans = {stage: vars(plan) for stage, plan in self.args.plans.items()}
        about = {"arguments": vars(self.args) | {"plans": plans}, "teacher": teacher.name,
                 "teacher_fingerprint": teacher.fingerprint, "data": data,
                 "processes": self.world, "commit": commit,
                 "machine": platform.processor() or platform.machine(),
                 "versions": {"python": platform.python_version(), "torch": torch.__version__,
                              "transformers": transformers.__version__}}
        (self.folder / "run.json").write_text(json.dumps(about, indent=1) + "\n", "utf-8")


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

    run.json                            the recipe, the stages that are finished, the report so far
    <stage>-<step>-<hash>.safetensors   weights, and AdamW's moments of what learns, whatever number
                                        of processes had them. The newest two are kept.
    The learning rate and the data are functions of the step, and nothing else is random.
    """

    def __init__(self, folder, rank=0):
        self.folder, self.rank, self.finished, self.rows = folder, rank, [], {}

    def look(self, recipe, fresh):
        """What is here of an unfinished run, which must be of this recipe. Changes no file."""
        self.recipe, path = json.loads(json.dumps(recipe)), self.folder / "run.json"
        if fresh or not path.exists():
            return
        about = json.loads(path.read_text("utf-8"))
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
        if self.rank == 0:
            about = {"recipe": self.recipe, "finished": self.finished, "rows": self.rows}
            partial = self.folder / ".run.json"
            partial.write_text(json.dumps(about, indent=1) + "\n", "utf-8")
            partial.replace(self.folder / "run.json")
            for state in self.states(f"stage {stage}"):     # its model folder is what counts now
                state.unlink()

    def states(self, name):
        """This stage's states, newest first"""
        return sorted(self.folder.glob(f"{name}-*.safetensors"),
                      key=lambda path: -int(path.stem.split("-")[1]))

    def save(self, name, step, seconds, student, learn, optimizer):
        tensors = {f"weights.{key}": p.detach() for key, p in student.named_parameters()}
        for key, p in learn.items():
            tensors |= {f"{moment}.{key}": optimizer.state[p][moment]
                        for moment in ("exp_avg", "exp_avg_sq") if p in optimizer.state}
        for key, x in tensors.items():      # all processes ask for all of it, the first keeps it
            gathered = whole(x)
            tensors[key] = (gathered if gathered is x else gathered.cpu()) if not self.rank else x
        if self.rank == 0:
            self.write(name, step, seconds, tensors)
        barrier()

    def write(self, name, step, seconds, tensors):
        partial = self.folder / ".partial"
        try:
            save_file(tensors, partial, metadata={"seconds": str(seconds)})
            with safe_open(partial, "pt") as file:
                if not all(torch.equal(file.get_tensor(key), x.cpu())
                           for key, x in tensors.items()):
                    raise OSError("what was read back is not what was written")
            partial.rename(self.folder / f"{name}-{step}-{checksum(partial)}.safetensors")
        except Exception as error:          # a full disk is an error of half a dozen types
            partial.unlink(missing_ok=True)
            raise UsageError(f"{self.folder}/{name}-{step} could not be saved ({error}); the state "
                             "before it is kept: make room, and the same command goes on from "
                             "there") from error
        for old in self.states(name)[2:]:
            old.unlink()

    def restore(self, name, student, learn, optimizer):
        """Load the newest state of this stage that is whole. -> steps done, seconds taken"""
        for path in self.states(name):
            _, step, digest = path.stem.split("-")
            if checksum(path) != digest:
                print(f"{name} | {path} is damaged (its checksum differs): it is left out")
                continue
            for p in learn.values():        # a step to nowhere makes the optimizer's own kind of
                p.grad = torch.zeros_like(p)                # moments, 8 bits wide or in shards
            optimizer.step()
            optimizer.zero_grad()
            with safe_open(path, "pt") as file, torch.no_grad():
                for key, p in student.named_parameters():
                    p.copy_(like(p, file.get_tensor(f"weights.{key}")))
                for key, p in learn.items():
                    state = optimizer.state[p]
                    state["step"].fill_(int(step))
                    for moment in ("exp_avg", "exp_avg_sq"):
                        state[moment].copy_(like(p, file.get_tensor(f"{moment}.{key}")))
                seconds = float(file.metadata()["seconds"])
            print(f"{name} | goes on from {path}")
            return int(step), seconds
        return 0, 0.0


def checksum(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def recipe_of(args, teacher, data):
    """What must be the same for a run to go on; where it is written, how fast, and on how many
    devices is not part of it."""
    apart = ("out", "device", "fresh", "recompute", "save_minutes", "preset", "recipe", "tokens",
             "batch", "lr", "plans", "micro_batch", "stage", "fsdp", "compile", "plan", "bench",
             "world", "study", "seeds")
    plans = {f"stage {stage} {key}": value for stage, plan in args.plans.items()
             for key, value in vars(plan).items() if key != "micro_batch"}
    return {key: value for key, value in vars(args).items() if key not in apart} | plans | {
        "teacher's weights": teacher.fingerprint, "data's checksums": data.fingerprint}


# -----------------------------------------------------------------------------
# many GPUs: torchrun starts one process for each, all with the same command

def join(device):
    """Of the processes that torchrun started, this is one. -> its number, how many there are"""
    if "RANK" not in os.environ:
        return 0, 1
    local = None
    if device == "cuda":
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        # The others wait while the first prepares data and trains the tiny teacher.
        dist.init_process_group("nccl" if local else "gloo", device_id=local,
                                timeout=datetime.timedelta(hours=2))
        atexit.register(dist.destroy_process_group)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")    # the first speaks for all
    return dist.get_rank(), dist.get_world_size()


def barrier():
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def first_alone(run):
    """Within, process 0 goes before the others, who find done what it did."""
    if run.rank:
        barrier()
    try:
        yield
    finally:
        if run.rank == 0:
            barrier()


def spread(losses, student, teacher, run):
    """-> tokens -> the losses of this process's tokens, and the context in which gradients wait

    DDP sums the gradient of a parameter once backward has passed it, whichever call to backward
    that is. Its forward only makes the generator, so stages 1 and 2 may go layer by layer. What
    does not learn must be frozen before. FSDP2's shards are summed at once: to hold whole gradients
    back would cost what sharding saves.
    """
    ask = functools.partial(losses, student, teacher)
    if run.world == 1 or run.args.fsdp:
        return ask, contextlib.nullcontext
    ddp = DistributedDataParallel(Asked(student, ask), gradient_as_bucket_view=True)
    return ddp, ddp.no_sync


class Asked(nn.Module):
    """What DDP wraps: a student that answers with its losses."""

    def __init__(self, student, ask):
        super().__init__()
        self.student, self.forward = student, ask


def shard_student(student):
    """FSDP2, one shard group for each layer and one for embedding, last norm and head."""
    # It fears that a view among a layer's answers is changed in place. None is.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for layer in student.layers:
        fully_shard(layer)
        for question in ("orientation", "heads"):
            register_fsdp_forward_method(layer, question)
    fully_shard(student)
    for question in ("orientation", "block", "hidden", "head", "outputs", "heads"):
        register_fsdp_forward_method(student, question)


def shard_teacher(teacher):
    head = teacher.model.lm_head                    # frozen, so it may be untied
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    for part in (teacher.decoder.embed_tokens, *teacher.decoder.layers, teacher.final_norm, head):
        fully_shard(part)


def put_together(student):
    """The student itself, or a copy on the CPU of one in shards"""
    if not any(isinstance(p, DTensor) for p in student.parameters()):
        return student
    copied = SSM(student.config)
    copied.load_state_dict({name: whole(x).cpu() for name, x in student.state_dict().items()})
    return copied


def whole(x):
    """x, put together from its shards if it has some, which all processes must ask for at once;
    in full width if it has 8 bits"""
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x.dequantize() if hasattr(x, "codes") else x


def like(p, x):
    """x as p is: on its device, or as shards"""
    if isinstance(p, DTensor):
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return x.to(p.device)


# -----------------------------------------------------------------------------
# a run, from its start to its report

def choose_device(asked, fp32=False):
    """-> the device, whether stages 2 and 3 compute in bf16 there, and why we think so"""
    device = asked if asked != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    if device == "cuda":
        bf16, why = torch.cuda.is_bf16_supported(), torch.cuda.get_device_name()
    else:
        # Without AMX or AVX512-BF16 a CPU converts back and forth: bf16 is slower than fp32.
        bf16 = device == "cpu" and (torch.cpu._is_amx_tile_supported()
                                    or torch.cpu._is_avx512_bf16_supported())
        why = (f"{torch.get_num_threads()} threads, "
               f"{'with' if bf16 else 'without'} bf16 matrix instructions")
    return device, bf16 and not fp32, why


def peak_of(device, bf16):
    """-> FLOP/s of dense matrix products, by the maker's table or as measured, and which it is"""
    for name, (peak, _) in GPUS.items():
        if device == "cuda" and name in torch.cuda.get_device_name():
            return peak, f"what {name} promises in bf16"
    n, times = 1024 if device == "cpu" else 8192, []
    x = torch.ones(n, n, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
    for _ in range(10):
        start = time.perf_counter()
        (x @ x)[0, 0].item()
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times), f"measured, {x.dtype} products".replace("torch.", "")


def starting_student(stage, run, teacher, previous, tokens):
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
        if student.config.n_layer != len(teacher.layers):
            raise UsageError(f"{folder} has {student.config.n_layer} layers, this run asks for "
                             f"{len(teacher.layers)}: choose another --out, or --n_layer")
        asked = layer_numbers(args.attn_layers, len(teacher.layers))
        if args.attn_layers is not None and asked != student.config.attn_layers:
            raise UsageError(f"{folder} keeps attention in layers {student.config.attn_layers}, "
                             f"--attn_layers asks for {asked}: choose another --out")
        if args.mixer != student.config.mixer:
            raise UsageError(f"{folder} has {student.config.mixer} mixers, --mixer asks for "
                             f"{args.mixer}: choose another --out, or --mixer "
                             f"{student.config.mixer}")
        print(f"stage {stage} | from {folder} ({about['tokens']:,} tokens) | {student.loaded}")
        return student, about
    if stage > 1:
        print(f"stage {stage} | there is no {folder}: starts from a copy of the teacher instead")
    student = copy_of_teacher(args, teacher, tokens)
    states = student.layers[student.ssm_layers[0]].mixer.initial_state(1)
    print(f"stage {stage} | from {teacher.name}, mixer {args.mixer}, init {args.init} | "
          f"{student.loaded} | a state of {sum(x.nbytes for x in states):,} bytes a layer")
    return student, {"tokens": 0, "seconds": 0}


def copy_of_teacher(args, teacher, tokens):
    """The student at its start; tokens (B, L) on the teacher's device, for --init distance"""
    torch.manual_seed(args.seed)
    layers = kept_attention(args, len(teacher.layers))
    fitted = args.init in ("fit", "distance")
    student = SSM.from_teacher(teacher, layers, "qkv" if fitted else args.init,
                               mixer=args.mixer, n_layer=len(teacher.layers))
    if fitted:
        fit_matrices(student.to(tokens.device), teacher, tokens, args.init == "distance")
    return student


@torch.no_grad()
def fit_matrices(student, teacher, tokens, decays):
    """Bring each head's matrix M, made of the teacher's q and k, as near to its attention P as two
    numbers can on these tokens (B, L): c and D of least || P - c M - D I ||_F.

    c goes into q. Scores without a softmax are too loud: c is a few percent. It is 0 where M is 0,
    as in a head that was pruned, or only a diagonal, which D gives alone.
    """
    if decays:
        set_decays(student, teacher, tokens)
    for i, u in teacher.inputs(tokens, only=student.ssm_layers):
        mixer, products = student.layers[i].mixer, 0
        mixer.D.zero_()
        for window in u.float()[:, None]:
            M, P = (model.matrix(i, window)[0].double() for model in (student, teacher))
            of_M, of_P = (x.diagonal(dim1=-2, dim2=-1).sum(-1) for x in (M, P))     # with I: (H)
            products = products + torch.stack([(M * M).sum((-1, -2)), of_M, (P * M).sum((-1, -2)),
                                               of_P, torch.full_like(of_M, tokens.shape[1])])
        MM, MI, PM, PI, II = products                                               # (H) each
        spread = MM * II - MI * MI              # >= 0, by Cauchy and Schwarz
        c = ((PM * II - PI * MI) / spread).clamp_min(0)
        c = c.where(spread > 1e-12 * MM * II, 0)
        mixer.D.copy_((PI - c * MI) / II)
        c = c.to(mixer.D.dtype)[:, None]
        mixer.in_proj.weight.split(mixer.sizes)[2].unflatten(0, (len(c), -1)).mul_(c[..., None])
        mixer.conv1d.bias.split(mixer.sizes[:3])[2].unflatten(0, (len(c), -1)).mul_(c)


@torch.no_grad()
def set_decays(student, teacher, tokens):
    """Each head forgets as its teacher's looks back: a = -1 / the mean distance of its attention.

    a = -softplus(A_log), and A_log is a product of in_proj with no bias. So its rows are those that
    come nearest to a constant on these tokens (B, L), by least squares with a ridge.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    back = (position[:, None] - position).clamp_min(0)                          # (L, L)
    for i, u in teacher.inputs(tokens, only=student.ssm_layers):
        layer = student.layers[i]
        looks = [(teacher.matrix(i, window[None]) * back).sum(-1).mean(-1) for window in u]
        distance = torch.cat(looks).mean(0).clamp_min(0.25).double()            # (H)
        h = layer.input_layernorm(u.float()).flatten(0, 1).double()             # (B L, D)
        gram = h.T @ h / len(h)
        gram.diagonal().add_(1e-2 * gram.diagonal().mean())
        constant = torch.linalg.solve(gram, h.mean(0))                          # (D), h . it ~ 1
        rows = layer.mixer.in_proj.weight.split(layer.mixer.sizes)[-1]          # (H, D)
        rows.copy_(torch.outer((1 / distance).expm1().log(), constant))


def shapes_from(args):
    """-> the teacher's configuration and the student's, of which no weights are read

    UsageError where the teacher has what a student cannot have.
    """
    hf = architecture(args.teacher)
    n_layer = hf.num_hidden_layers if args.n_layer is None else args.n_layer
    sources(n_layer, hf.num_hidden_layers)              # has it so many?
    return hf, Config(**Teacher.random(hf, "meta").shapes | {
        "n_layer": n_layer, "attn_layers": kept_attention(args, n_layer), "mixer": args.mixer})


def kept_attention(args, n_layer):
    layers = layer_numbers(args.attn_layers, n_layer)
    if set(range(n_layer)) <= set(layers):
        raise UsageError("every layer keeps its attention: there is no mixer to teach")
    return layers


def layer_numbers(asked, n_layer):
    if asked == ["all"]:
        return tuple(range(n_layer))
    try:
        return tuple(sorted({int(i) for i in asked or ()}))
    except ValueError as error:
        raise UsageError(f"--attn_layers {' '.join(asked)}: give layer numbers, or all") from error


def read_about(folder):
    return json.loads((folder / "config.json").read_text("utf-8")).get("about", {})


def main(arguments=None):
    args = parse(arguments)
    if args.study:
        return study(args, sys.argv[1:] if arguments is None else arguments)
    if args.plan is not None:
        return show_plan(args)
    run, total = Run(args), sum(plan.tokens for plan in args.plans.values())
    if args.bench:
        return bench(run)
    shapes_from(args)                       # a teacher that cannot be had is refused at once
    tokenizer = Tokenizer(args.teacher)
    with first_alone(run):
        data, windows, where = open_data(args, tokenizer, total)
        if args.teacher == "tiny" and not TINY.exists():
            run.open_log({"teacher": 0})
            same_for_all = argparse.Namespace(**vars(args) | {"seed": 0})
            train_tiny(open_data(same_for_all, tokenizer)[0], tokenizer, run.log,
                       args.teacher_tokens, run.device, run.autocast)
    teacher = Teacher.load(args.teacher, run.device, run.dtype).at(args.n_layer)
    tokenizer.check_rows(teacher.config.vocab_size)
    largest = int(windows.max())
    if not args.stream and data.meta["vocab_size"] > teacher.config.vocab_size:
        largest = max(largest, *(int(shard.max()) for shard in data.shards))
    if largest >= teacher.config.vocab_size:
        raise UsageError(f"{where} has ids up to {largest:,}, the teacher has embeddings for "
                         f"{teacher.config.vocab_size:,} tokens: prepare it with --teacher")
    parameters = sum(p.numel() for p in teacher.model.parameters())
    print(f"teacher {teacher.name}: {parameters:,} parameters, {len(teacher.decoder.layers)} "
          f"layers | data {where}" + ("" if args.stream else f": {len(data):,} tokens, this run "
                                      f"reads {total / len(data):.2f} of it"))
    few = data.batch(0, 8, args.context)[:, :-1].to(run.device)     # (8, L)
    saved = run.saved
    saved.look(recipe_of(args, teacher, data), args.fresh)
    barrier()                               # all have looked before the first changes anything
    todo, previous = [stage for stage in args.stage if stage not in saved.finished], None
    for stage in saved.finished:
        print(f"stage {stage} | was finished before: {run.folder}/stage{stage}")
        previous = stage
    if not todo:
        run.alone()
    for stage in todo:
        student, about = starting_student(stage, run, teacher, previous, few)
        if stage == todo[0]:                # from here on files change: refusals are behind us
            costs = {n: run.cost(*stage_of(n, args), student.config, teacher.config, args.plans[n])
                     for n in todo}         # each loss was asked for once, on empty tensors
            run.alone()
            if not saved.rows:
                run.begin(teacher, where)
                barrier()
                saved.note(teacher=compare(teacher, teacher, windows))
            make_ready(teacher, shard_teacher, args)
        student.to(run.device).recompute = args.recompute
        make_ready(student, shard_student, args)
        if about["tokens"] == 0 and "copied" not in saved.rows:
            saved.note(copied=compare(student, teacher, windows) | about)
        run.flops = useful(costs[stage])
        distil(stage, student, about, teacher, data, windows, run)
        previous = stage
    rows = {name: row for name, row in saved.rows.items() if name in ("teacher", "copied")}
    for stage in range(1, previous + 1):    # earlier stages of this student are read from disk
        ours = stage in args.stage or stage < args.stage[0]
        if ours and (run.folder / f"stage{stage}").exists():
            rows[f"stage {stage}"] = read_about(run.folder / f"stage{stage}")
    if args.controls:
        rows |= controls(run, teacher, data, windows, few, rows[f"stage {previous}"]["tokens"])
    barrier()
    if run.rank == 0:
        report(run, rows)
        shutil.rmtree(saved.folder)
        (run.folder / ".lock").unlink()
        run.lock.release(force=True)


def distil(stage, student, about, teacher, data, windows, run):
    """One stage, from the student at its start to its folder. about: what came before"""
    (losses, moves), plan = stage_of(stage, run.args), run.args.plans[stage]
    print(f"\nstage {stage} of 3 | {doc_of(losses)}")
    with stopping(run):
        seconds = train(f"stage {stage}", losses, moves, student, teacher, data,
                        about["tokens"] // run.args.context, run, plan)
    row = compare(student, teacher, windows) | {
        "tokens": about["tokens"] + plan.tokens // plan.batch * plan.batch,
        "seconds": about["seconds"] + seconds}
    folder, student = run.folder / f"stage{stage}", put_together(student)
    if run.rank == 0:
        student.save_pretrained(folder, stage=stage, teacher=teacher.name,
                                teacher_fingerprint=teacher.fingerprint, **row)
    run.saved.note(stage)
    barrier()
    print(f"stage {stage} | saved {folder} | {describe(row)}")


def open_data(args, tokenizer, total=None):
    """-> what to train on, held-out windows (n, L + 1), and where that is"""
    n, L = max(1, args.eval_tokens // args.context), args.context
    if args.stream:
        stream = Stream(args.data, tokenizer, args.config, held_out=n * L)
        return stream, stream.windows(n, L), f"{args.data}, streamed"
    folder = load_or_prepare(args.data, tokenizer, args.config, total)
    return Tokens(folder, "train", args.seed), Tokens(folder, "val").windows(n, L), str(folder)


def make_ready(model, shard, args):
    """Each layer compiled, the whole in shards, where asked for"""
    if args.compile:
        for layer in model.layers:
            layer.compile()
    if args.fsdp and dist.is_initialized():
        shard(model)


def stage_of(stage, args):
    """A row of STAGES as the command line asks for it: stage 3's loss has options"""
    losses, moves = OBJECTIVES[args.objective] if stage == 2 and args.objective else STAGES[stage]
    options = {predictions: ("loss", "temperature", "hard_weight"), hidden_states: ("layer_map",),
               relations: ("relation_layer", "relation_heads")}.get(losses, ())
    if options:
        losses = functools.partial(losses, **{name: getattr(args, name) for name in options})
    return losses, rf"(?=.*{MIXERS_ONLY}).*({moves})" if args.train == "mixer" else moves


def doc_of(losses):
    return getattr(losses, "func", losses).__doc__


def controls(run, teacher, data, windows, few, tokens):
    """The same tokens spent on stage 3 alone, and on the text with no teacher. -> two rows"""
    last = run.args.plans[run.args.stage[-1]]
    plan = argparse.Namespace(**vars(last) | {"tokens": tokens,
                                              "lr": run.args.control_lr or last.lr})
    names = {"stage 3 only": stage_of(3, run.args)[0], "from scratch": next_tokens}
    for name, losses in names.items():
        if name in run.saved.rows:
            continue
        print(f"\n{name} | {doc_of(losses)}")
        student = copy_of_teacher(run.args, teacher, few)
        if losses is next_tokens:
            student = SSM(student.config)
        make_ready(student.to(run.device), shard_student, run.args)
        run.flops = useful(run.cost(losses, EVERYTHING, student.config, teacher.config, plan))
        with stopping(run):
            seconds = train(name, losses, EVERYTHING, student, teacher, data, 0, run, plan)
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
    (run.folder / "report.md").write_text("\n".join(table) + "\n", "utf-8")
    print("\n" + "\n".join(table))
    print("\nval loss and KL to the teacher in nats per held-out token; tokens and seconds count "
          f"from the copy on; peak memory {run.memory() / 1e9:.1f} GB\n"
          f"saved {run.folder}/report.md | next: python eval.py {run.folder}")


# -----------------------------------------------------------------------------
# what it costs. A step is run on tensors without contents (torch's fake tensors), so that what is
# counted is what the code above does, at any size, and nothing is computed or held.

SHARDED = ("weights", "gradients", "optimizer", "teacher")      # by FSDP2
CUDA_ITSELF = 1e9           # its context, libraries' workspaces, and what the allocator loses
GPUS = {  # FLOP/s in bf16, dense, as the makers say; memory that a process finds, in bytes
    "B200": (2250e12, 178 * 2**30), "H200": (989e12, 139 * 2**30), "H100": (989e12, 78 * 2**30),
    "A100": (312e12, 79 * 2**30), "L40S": (362e12, 44 * 2**30), "4090": (165e12, 23.5 * 2**30),
    "3090": (71e12, 23.5 * 2**30),
}


class Meter(TorchDispatchMode):
    """Counts what happens within: FLOPs by who computes, bytes held now and at most.

    flops: "teacher", "student", "backward", and "again": what checkpoints compute a second time
    A causal attention counts half of its matrix.
    """

    def __init__(self, vocab_size, frozen):
        super().__init__()
        self.flops, self.backward, self.vocab_size = collections.Counter(), False, vocab_size
        self.held, self.now, self.at_peak = {}, [0, 0], [0, 0]      # bytes: all, maps of logits
        self.frozen = {p.untyped_storage()._cdata for p in frozen}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        inputs = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        flops, packet = 0, function._overloadpacket
        if packet == torch.ops.aten.convolution_backward:   # torch's formula ignores groups
            flops = 4 * inputs[0].numel() * inputs[2][0].numel()
        elif "scaled_dot_product" in str(packet):
            backward = "backward" in str(packet)            # there dy comes before q and k
            (B, H, L, N), T = inputs[backward].shape, inputs[1 + backward].shape[2]
            flops = 2 * B * H * L * T * N * (2.5 if backward else 1)
        elif packet == torch.ops.mohawk.orientation:
            (B, L, H, N), N_T = inputs[2].shape, inputs[0].shape[-1]
            flops = B * H * L * L * (N_T + 3 * N)           # 4 products of half a matrix
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=answer)
        if flops:
            teachers = any(x.untyped_storage()._cdata in self.frozen for x in inputs)
            again = self.backward and (teachers or torch.is_grad_enabled())
            ours = torch.is_grad_enabled() or packet == torch.ops.mohawk.orientation
            who = "student" if ours else "teacher"
            self.flops["again" if again else "backward" if self.backward else who] += flops
        for x in tree_leaves(answer):
            if isinstance(x, torch.Tensor):
                self.hold(x)
        return answer

    def hold(self, x):
        storage = x.untyped_storage()
        if storage._cdata in self.held:
            return
        n = storage.nbytes()
        logits = n if x.dim() == 2 and x.shape[-1] == self.vocab_size else 0
        self.held[storage._cdata] = n, logits
        weakref.finalize(storage, self.drop, storage._cdata)
        self.now = [self.now[0] + n, self.now[1] + logits]
        self.at_peak = max(self.at_peak, self.now)

    def drop(self, key):
        n, logits = self.held.pop(key)
        self.now = [self.now[0] - n, self.now[1] - logits]


def fake_step(losses, moves, config, hf, plan, args, gpu, bf16):
    """One micro-batch of a student `config` and a teacher `hf` -> FLOPs and bytes, by part"""
    with FakeTensorMode():
        teacher = Teacher.random(hf, dtype=torch.bfloat16 if gpu else torch.float32)
        teacher = teacher.at(config.n_layer)
        student = SSM(config)
        student.recompute = args.recompute
        learn = choose_learners(student, moves)
        for p in learn.values():
            p.grad = torch.zeros_like(p)            # as it is after the first micro-batch
        tokens = torch.zeros(plan.micro_batch, args.context, dtype=torch.long)
        frozen, weights = list(teacher.model.parameters()), list(student.parameters())
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and losses is not matrices)
        with Meter(config.vocab_size, frozen) as meter, autocast:
            for p in (*frozen, *weights, *(p.grad for p in learn.values())):
                meter.hold(p)
            for loss, _ in losses(student, teacher, tokens):
                meter.backward = True
                loss.backward()
                meter.backward = False
        sizes = {"weights": weights, "gradients": learn.values(), "teacher": frozen}
        sizes = {part: sum(p.numel() * p.element_size() for p in tensors)
                 for part, tensors in sizes.items()}
        peak, logits = meter.at_peak
        sizes |= {"activations": peak - sum(sizes.values()) - logits, "logits": logits,
                  "optimizer": sum(bytes_of_moments(p, args.optimizer) for p in learn.values())}
        counts = {"learn": sum(p.numel() for p in learn.values()),
                  "all": sum(p.numel() for p in weights)}
    flops = {who: meter.flops[who] / tokens.numel()
             for who in ("teacher", "student", "backward", "again")}
    return flops | {f"{part} bytes": n for part, n in sizes.items()} | counts


def bytes_of_moments(p, optimizer):
    """Bytes of AdamW's two moments. Of 8 bits each, with a scale for 256, if that is a whole number
    of them and not few."""
    eight = optimizer == "adamw8bit" and p.numel() >= 4096 and p.numel() % 256 == 0
    return p.numel() * 2 * (1 + 4 / 256) if eight else p.numel() * 8


def cost(losses, moves, config, hf, plan, args, gpu, bf16):
    """What fake_step says of the whole model, from models of two and of three layers: all layers of
    a kind cost the same. "gathered bytes": what FSDP2 holds beside its shards."""
    if args.objective or config.n_layer < hf.num_hidden_layers:     # small ones, as they are
        costs = fake_step(losses, moves, config, hf, plan, args, gpu, bf16)
        return costs | {"gathered bytes": 0}

    def measured(n, *attn_layers):
        small = copy.deepcopy(hf)
        small.num_hidden_layers = n
        if getattr(hf, "layer_types", None):
            small.layer_types = hf.layer_types[:1] * n
        shapes = dataclasses.replace(config, n_layer=n, attn_layers=attn_layers)
        return fake_step(losses, moves, shapes, small, plan, args, gpu, bf16)

    attention, ssms = len(config.attn_layers), config.n_layer - len(config.attn_layers)
    two, three = measured(2), measured(3)
    mixed = measured(3, 1) if attention else two
    costs = {key: two[key] + (ssms - 2) * (three[key] - two[key])
             + attention * (mixed[key] - two[key]) for key in two}
    return costs | {"gathered bytes": sum(two[f"{part} bytes"] for part in
                                          ("weights", "gradients", "teacher"))}


def useful(costs):
    """FLOPs for one token that mfu counts: all but what is computed a second time"""
    return costs["teacher"] + costs["student"] + costs["backward"]


def show_plan(args):
    """--plan: what each stage would take. No weights are read, no data, and no GPU is needed."""
    hf, config = shapes_from(args)
    device, bf16, _ = choose_device(args.device, args.fp32)
    if args.plan in GPUS:
        device, bf16 = "cuda", True
    here = torch.cuda.mem_get_info()[1] if device == "cuda" and not args.plan else math.inf
    peak, room = GPUS.get(args.plan) or (peak_of(device, bf16)[0], here)
    hours, shards = 0, args.world if args.fsdp else 1
    print(f"{args.teacher} on {args.world} x {args.plan or device}, {peak / 1e12:.4g} TFLOP/s "
          f"each, of which {args.mfu:.0%} (--mfu; --bench measures it)")
    for stage, plan in args.plans.items():
        losses, moves = stage_of(stage, args)
        costs = cost(losses, moves, config, hf, plan, args, device == "cuda", bf16)
        steps, windows = plan.tokens // plan.batch, plan.micro_batch * args.world
        spent = useful(costs) * steps * plan.batch / (peak * args.mfu * args.world) / 3600
        hours += spent
        print(f"\nstage {stage} | {steps * plan.batch:,} tokens = {steps:,} steps x {plan.batch:,} "
              f"(batch {plan.micro_batch} x length {args.context} x accumulate "
              f"{plan.batch // args.context // windows} x {args.world} GPUs)\n"
              f"stage {stage} | {costs['learn']:,} parameters learn, "
              f"{costs['all'] - costs['learn']:,} are frozen\n"
              f"stage {stage} | GFLOP a token: teacher {costs['teacher'] / 1e9:.3g}, student "
              f"{costs['student'] / 1e9:.3g}, backward {costs['backward'] / 1e9:.3g}, computed "
              f"again {costs['again'] / 1e9:.3g} | {spent:.3g} hours")
        memory = {part: costs[f"{part} bytes"] / (shards if part in SHARDED else 1) / 1e9
                  for part in (*SHARDED, "activations", "logits")}
        memory |= {"gathered": costs["gathered bytes"] / 1e9} if args.fsdp else {}
        memory |= {"CUDA": CUDA_ITSELF / 1e9} if device == "cuda" else {}
        total = sum(memory.values())
        verdict = "" if room == math.inf else (
            f" of {room / 1e9:.1f}, which {'fits' if total < room / 1e9 else 'does not fit'}")
        print(f"stage {stage} | GB: " + ", ".join(f"{part} {n:.2f}" for part, n in memory.items())
              + f" = {total:.2f}{verdict}")
    print(f"\n{hours:.3g} hours in all. To take less memory: --micro_batch, --recompute, "
          "--optimizer adamw8bit, --fsdp")


def bench(run):
    """--bench: each stage timed on random tokens, with a random teacher of this architecture"""
    hf = architecture(run.args.teacher)
    teacher = Teacher.random(hf, run.device, run.dtype).at(run.args.n_layer)
    make_ready(teacher, shard_teacher, run.args)
    names = ("teacher", "student", "backward", "optimizer", "step", "tok/s", "mfu", "GB", "planned")
    print("\n| stage " + "".join(f"| {name:>9} " for name in names) + "|\n|-------"
          + "|-----------" * len(names) + "|")
    for stage, plan in run.args.plans.items():
        print(f"| {stage:5} | " + " | ".join(bench_stage(run, teacher, hf, stage, plan)) + " |")
    print("\nms for a micro-batch, mean of 20; in `step` for a whole batch")


def bench_stage(run, teacher, hf, stage, plan):
    """-> the cells of its row"""
    args, (losses, moves) = run.args, stage_of(stage, run.args)
    tokens = torch.randint(hf.vocab_size, (plan.micro_batch, args.context), device=run.device)
    student = copy_of_teacher(args, teacher, tokens).to(run.device)
    student.recompute = args.recompute
    make_ready(student, shard_student, args)
    optimizer = make_optimizer(choose_learners(student, moves), args)
    ask, _ = spread(losses, student, teacher, run)
    autocast = contextlib.nullcontext if losses is matrices else run.autocast
    wait = torch.cuda.synchronize if run.device == "cuda" else contextlib.nullcontext
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def timed(work, n=20):
        work(), wait()
        start = time.perf_counter()
        for _ in range(n):
            work()
        wait()
        return 1e3 * (time.perf_counter() - start) / n

    works = works_of(stage, student, teacher, ask, tokens, autocast)
    ms = {name: timed(work) for name, work in (works | {"optimizer": optimizer.step}).items()}
    step = plan.batch // (tokens.numel() * run.world) * ms["backward"] + ms["optimizer"]
    costs = run.cost(losses, moves, student.config, hf, plan)
    mfu = useful(costs) * plan.batch / (step / 1e3 * run.peak * run.world)
    planned = sum(costs[f"{part} bytes"] for part in (*SHARDED, "activations", "logits"))
    return [f"{x:9.1f}" for x in (ms["teacher"], ms["student"] - ms["teacher"],
                                  ms["backward"] - ms["student"], ms["optimizer"], step)] + [
        f"{1e3 * plan.batch / step:9,.0f}", f"{mfu:9.1%}", f"{run.memory() / 1e9:9.2f}",
        f"{planned / 1e9:9.2f}"]


def works_of(stage, student, teacher, ask, tokens, autocast):
    """What a micro-batch takes, each with what comes before it -> {name: function}"""
    def teacher_alone():
        with autocast():
            if stage == 3:
                theirs = teacher.hidden(tokens).flatten(0, 1)
                for part in theirs.split(max(1, LOGITS_AT_ONCE // student.config.vocab_size)):
                    teacher.head(part)
            else:
                for i, u in teacher.inputs(tokens, only=student.ssm_layers):
                    teacher.block(i, u)

    def answers(backward):
        with autocast():
            for loss, _ in ask(tokens):
                if backward:
                    loss.backward()
    return {"teacher": teacher_alone, "student": functools.partial(answers, False),
            "backward": functools.partial(answers, True)}


# -----------------------------------------------------------------------------
# the studies. --objective: what stage 2 may ask instead ([2], for students of fewer layers)

def hidden_states(student, teacher, tokens, layer_map=None):
    """hidden states: each layer, from the tokens on, says what its layers of the teacher say"""
    ours, theirs = student.outputs(tokens), teacher.outputs(tokens)         # (B, L, D) each
    pairs = LAYER_MAPS[layer_map or "uniform"](len(ours), len(theirs))
    gap = sum((ours[i] - theirs[t]).float().square().mean() for i, t in pairs) / len(pairs)
    own = sum(theirs[t].float().square().mean() for _, t in pairs) / len(pairs)
    yield gap, gap.detach() / own


LAYER_MAPS = {  # of a student of S layers and a teacher of T: which is to say what which one says
    "last": lambda S, T: [(S - 1, T - 1)],
    "uniform": lambda S, T: list(enumerate(sources(S, T))),
    # k = T / S rounded up for each, from the one that the layer before ends with on; where that
    # uses them up early, the layers that remain ask the last
    "uniform_consecutive": lambda S, T: [
        (i, t) for i in range(S) for k in [-(-T // S)]
        for t in range(max(0, min(k * i, T) - 1), min(k * (i + 1), T))],
    "uniform_last": lambda S, T: list(enumerate(sources(S, T))) + [
        (i, T - S + i) for i in range(S)],
}


def relations(student, teacher, tokens, relation_layer=None, relation_heads=None):
    """self-attention relations: the last layer's q, and k, and v, are alike as the teacher's are"""
    if student.config.n_layer - 1 in student.config.attn_layers:
        raise UsageError("--objective mha asks the last layer's mixer, and that keeps attention")
    n_layer = len(teacher.decoder.layers)
    layer = max(0, n_layer - 2) if relation_layer is None else relation_layer
    if not 0 <= layer < n_layer:
        raise UsageError(f"--relation_layer {layer}: the teacher has layers 0 to {n_layer - 1}")
    total = silence = 0
    for ours, theirs in zip(student.heads(tokens), teacher.heads(layer, tokens), strict=True):
        A = relation_heads or theirs.shape[-1] // 16
        if theirs.shape[-1] % A or ours.shape[-1] % A:
            raise UsageError(f"--relation_heads {A} does not divide the teacher's "
                             f"{theirs.shape[-1]} channels, or the student's {ours.shape[-1]}")
        for start in range(1, tokens.shape[1], RELATIONS_AT_ONCE):      # row 0 sees only itself
            part = checkpoint(relation_gap, ours, theirs, A, start, use_reentrant=False)
            total, silence = total + part[0] / A, silence + part[1] / A
    rows = 3 * len(tokens) * (tokens.shape[1] - 1)
    yield total / rows, total.detach() / silence


def relation_gap(ours, theirs, heads, start):
    """x (B, L, C) -> sums over the rows from `start` on of R = softmax(x x^T / sqrt(C / heads)),
    causal, in `heads` parts of C: KL(R of theirs || R of ours), KL(R of theirs || uniform)"""
    rows, log_R = slice(start, start + RELATIONS_AT_ONCE), []
    position = torch.arange(theirs.shape[1], device=ours.device)
    future = position > position[rows, None]                                # (rows, L)
    with torch.autocast(ours.device.type, enabled=False):   # bf16 logs are off by percents
        for x in (ours, theirs):
            x = x.float().unflatten(-1, (heads, -1)).transpose(1, 2)        # (B, A, L, C / A)
            scores = x[:, :, rows] @ x.mT / x.shape[-1] ** 0.5              # (B, A, rows, L)
            log_R.append(scores.masked_fill(future, -torch.inf).log_softmax(-1))
    # Where the future is, both are 0 and their logs are not: 0 log 0 = 0.
    (log_ours, log_theirs), p = (x.masked_fill(future, 0) for x in log_R), log_R[1].exp()
    uniform = -(~future).sum(-1, keepdim=True).log()
    return (p * (log_theirs - log_ours)).sum(), (p * (log_theirs - uniform)).sum()


OBJECTIVES = {  # as STAGES. What a loss does not reach must not wait for its gradient
    "od": STAGES[3],
    "hs": (hidden_states, "embedding|layers"),
    "mha": (relations, r"embedding|layers\.(?!LAST\.(mlp|post|"
                       r"mixer\.(out_proj|D|z_bias|in_proj_gate)))"),
    "matrix": STAGES[1],
}


# -----------------------------------------------------------------------------
# --study runs a grid of runs like any other, each with several seeds, and tabulates what came of
# them. A finished cell is not run again. The same command in a second process takes other cells.

STARTS = {  # [3]'s initialisations, and the best two at once
    "nothing": "--init random --stage 3 --tokens 0.2e6 --lr 2.8e-3",
    "q, k, v": "--init qkv --stage 3 --tokens 0.2e6 --lr 2.8e-3",
    "matrices": "--init mohawk --stage 1 3 --tokens 0.04e6 0.16e6 --lr 2e-3 2.8e-3",
    "hidden states": "--init mohawk --stage 2 3 --tokens 0.08e6 0.12e6 --lr 4e-3 1e-3",
    "q, k, v, hidden states": "--init qkv --stage 2 3 --tokens 0.08e6 0.12e6 --lr 4e-3 1e-3",
}
STUDIES = {  # name: {cell: its flags}
    "mixers": {f"{mixer}, from {start}": f"--mixer {mixer} {flags}"
               for start, flags in STARTS.items() for mixer in MIXERS},
    "objectives": {     # each at the best of the learning rates tried for it, see results/
        "od": "--stage 3 --tokens 0.5e6 --lr 2.8e-3",
        **{f"hs {name}": f"--objective hs --layer_map {name} --lr 4e-3 2.8e-3"
           for name in LAYER_MAPS},
        "mha": "--objective mha --lr 2e-3 2.8e-3",
        "matrix": "--objective matrix --lr 8e-3 2.8e-3",
    },
}
STUDIED = {  # what all cells of a study share; the command line may say otherwise
    "mixers": "--preset tiny --eval_tokens 32768",
    "objectives": "--preset tiny --eval_tokens 32768 --n_layer 2 --init qkv "
                  "--tokens 0.15e6 0.35e6",
}


def study(args, arguments):
    """All cells of args.study, and results/study-<name>.md at the end"""
    if "RANK" in os.environ:
        raise UsageError("--study runs its small cells in one process: leave torchrun out")
    ours = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    ours.add_argument("--study"), ours.add_argument("--seeds", nargs="+")
    rest, common = ours.parse_known_args(arguments)[1], shlex.split(STUDIED[args.study])
    cells = STUDIES[args.study]
    theirs = {x for flags in cells.values() for x in flags.split() if x.startswith("--")}
    theirs = (theirs | {"--out", "--seed", "--plan", "--bench"}) - {"--tokens", "--lr"}
    if said := theirs & {x.split("=")[0] for x in rest}:
        raise UsageError(f"--study {args.study}: leave out {', '.join(sorted(said))}: its cells "
                         "are runs that say that themselves")
    runs = []
    for seed, name in itertools.product(args.seeds, cells):
        folder = cell_folder(args, name, seed)
        runs.append((seed, name, folder, [*common, *shlex.split(cells[name]), *rest,
                                          "--seed", str(seed), "--out", str(folder)]))
        parse(runs[-1][-1])                             # mistakes, before the first hour is spent
    for number, (seed, name, folder, flags) in enumerate(runs, 1):
        row = folder / "row.json"
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(filelock.FileLock(folder / ".cell", timeout=0))
            except filelock.Timeout:
                continue                                # another process is at it
            if not row.exists():
                print(f"\ncell {number} of {len(runs)} | {name} | seed {seed}")
                main(flags)
                about = {"flags": flags} | row_of(folder, parse(flags))
                row.write_text(json.dumps(about) + "\n", "utf-8")
            elif (was := json.loads(row.read_text("utf-8"))["flags"]) != flags:
                raise UsageError(f"{folder} was finished as {shlex.join(was)}, not as "
                                 f"{shlex.join(flags)}: give that command, or remove the folder")
    elsewhere = [name for _, name, folder, _ in runs if not (folder / "row.json").exists()]
    if elsewhere:
        print(f"\nother processes are at work on {', '.join(elsewhere)}: the last one tabulates")
    else:
        tabulate(args, cells, arguments)


def name_of(args):
    """What its folder and its table are called. Of another teacher's it is another study."""
    return f"study-{args.study}" + (f"-{args.preset}" if args.preset not in (None, "tiny") else "")


def cell_folder(args, name, seed):
    return Path("out") / name_of(args) / re.sub(r"\W+", "-", name) / str(seed)


def row_of(folder, args):
    """What the table says of a finished run"""
    student = SSM.from_pretrained(folder / f"stage{args.stage[-1]}").eval()
    about, device = read_about(folder / f"stage{args.stage[-1]}"), choose_device(args.device)[0]
    state = [x for i in student.ssm_layers for x in student.layers[i].mixer.initial_state(1)]
    keys = pass_keys(Tokenizer(args.teacher), args.context // 4, 64)
    return {name: about[name] for name in ("loss", "kl", "top1", "seconds")} | {
        "key": retrieval(student.to(device), keys, device)[1],
        "parameters": sum(p.numel() for p in student.parameters()),
        "state": sum(x.nbytes for x in state) // len(student.ssm_layers)}


def tabulate(args, cells, arguments):
    """Mean over the seeds +- half of what lies between the least and the most"""
    lines = [f"| {args.study} | val loss | KL | top-1 | key | parameters | state, bytes per layer "
             "| seconds |", "|---" * 8 + "|"]
    for name in cells:
        rows = [json.loads((cell_folder(args, name, seed) / "row.json").read_text("utf-8"))
                for seed in args.seeds]

        def cell(key, form, rows=rows):
            values = [row[key] for row in rows]
            spread = f" ± {(max(values) - min(values)) / 2:{form}}" if len(rows) > 1 else ""
            return f"{sum(values) / len(values):{form}}{spread}"

        lines.append(f"| {name} | {cell('loss', '.4f')} | {cell('kl', '.4f')} | "
                     f"{cell('top1', '.1%')} | {cell('key', '.2%')} | {rows[0]['parameters']:,} | "
                     f"{rows[0]['state']:,} | {cell('seconds', '.0f')} |")
    path = Path("results") / f"{name_of(args)}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join([f"`python distill.py {shlex.join(arguments)}`, seeds "
                               f"{', '.join(map(str, args.seeds))}; torch {torch.__version__}, "
                               f"{platform.processor() or platform.machine()}", "", *lines]) + "\n",
                    "utf-8")
    print("\n" + path.read_text("utf-8") + f"\nsaved {path}")


# -----------------------------------------------------------------------------
# the command line

def parse(arguments=None):
    """-> the arguments, with plans = {stage: tokens, batch, lr}; UsageError if they do not fit."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="a whole recipe [phi where CUDA is, else tiny]")
    add("--stage", type=int, nargs="+", help="stages to run [1 2 3; with --objective 2 3]")
    # what
    add("--teacher", help="a Hugging Face id or folder, a .gguf file, smollm2, or tiny")
    add("--data", type=source_of_text, help="stdlib, a file or folder of text, JSONL or Parquet, "
        "or a Hugging Face id")
    add("--stream", action="store_true", help="read the data as it comes, with nothing on disk")
    add("--config", help="which part of a Hugging Face data set")
    add("--recipe", choices=RECIPES, help="the paper's, or what the field learned since "
        "[phi: paper; else modern]")
    add("--mixer", choices=MIXERS, default="mamba2",
        help="what stands where attention was [%(default)s]")
    add("--init", choices=("mohawk", "qkv", "fit", "distance", "conv", "random"), help="mixers "
        "start MOHAWK's way; from the teacher's q, k, v; so, and fitted to its attention; so, and "
        "with decays by how far it looks; MOHAWK's way, but for the convolution, which is "
        "PyTorch's; or all as PyTorch's modules do [the recipe's]")
    add("--attn_layers", nargs="+", help="layers that keep attention; paper: 4 10 16 22 [none]")
    add("--out", help="folder of the run [out/<preset>]")
    # how much: one value for each stage, or one for all
    add("--tokens", type=count, nargs="+", help="budget; one for all is split as the "
        "recipe's [the preset's]")
    add("--batch", type=count, nargs="+", help="tokens per update [the preset's]")
    add("--lr", type=positive, nargs="+", help="peak learning rate [the preset's]")
    # how
    add("--loss", choices=("kl", "ce"), default="kl", help="of stage 3; same gradient [kl]")
    add("--temperature", type=positive, default=1.0, help="of both models' predictions in "
        "stage 3 [1]")
    add("--hard_weight", type=not_negative, default=0.0, help="of the next-token loss beside "
        "stage 3's [0]")
    add("--train", choices=("paper", "mixer"), default="paper",
        help="what learns: as the paper's stages, or the mixers only, in stage 3 too [paper]")
    add("--context", type=at_least_one, help="tokens per window [the preset's]")
    add("--micro_batch", type=at_least_one, help="windows at once; the rest of a batch is "
        "accumulated [the preset's]")
    add("--warmup", type=fraction, help="share of the steps in which the learning "
        "rate rises [0.1]")
    add("--decay", type=fraction, help="share of the steps in which it falls [the "
        "recipe's]")
    add("--betas", type=fraction, nargs=2, default=(0.9, 0.95), help="AdamW's [0.9 0.95]")
    add("--weight_decay", type=not_negative, default=0.1, help="of matrices [%(default)s]")
    add("--clip", type=not_negative, default=1.0, help="largest gradient norm, 0: of any size "
        "[%(default)s]")
    add("--recompute", action="store_true",
        help="keep one activation a layer for the backward and compute the others again")
    add("--fp32", action="store_true", help="also where bf16 would be as good and faster")
    add("--compile", action="store_true", help="torch.compile each layer of both models")
    add("--fsdp", action="store_true", help="under torchrun, shard both models (else DDP)")
    add("--optimizer", choices=("adamw", "adamw8bit"), default="adamw",
        help="of 8 bits: 2 bytes a parameter instead of 8, needs torchao [%(default)s]")
    add("--save_minutes", type=not_negative, default=10, help="between two states to go on from "
        "[10]")
    add("--fresh", action="store_true", help="start over, where an unfinished run lies")
    add("--seed", type=count, default=0, help="of new weights and of data order [%(default)s]")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"),
        help="to compute on [%(default)s]")
    # the studies
    add("--n_layer", type=count, help="a student of fewer layers [the teacher's]")
    add("--objective", choices=OBJECTIVES, help="what stage 2 asks instead: the output "
        "distribution, hidden states, relations in q, k and v, or stage 1's matrices")
    add("--layer_map", choices=LAYER_MAPS, help="of hs [uniform]")
    add("--relation_layer", type=count, help="of mha: the teacher's [the last but one]")
    add("--relation_heads", type=at_least_one, help="of mha [one for 16 channels]")
    add("--study", choices=STUDIES, help="run a grid of all this, and tabulate it in results/")
    add("--seeds", type=count, nargs="+", default=[0, 1, 2], help="of a study [0 1 2]")
    # to compare with
    add("--eval_tokens", type=at_least_one, help="held-out tokens to read [the preset's]")
    add("--plan", nargs="?", const="", metavar="GPU",
        help=f"print what it would cost on {', '.join(GPUS)} [this machine], and stop")
    add("--world", type=at_least_one, default=int(os.environ.get("WORLD_SIZE", 1)),
        help="how many GPUs to plan for [1]")
    add("--mfu", type=fraction, default=0.4, help="share of their peak to plan with [%(default)s]")
    add("--bench", action="store_true", help="time the stages on random tokens, and stop")
    add("--controls", action="store_true", help="also stage 3 alone, and no teacher at all")
    add("--control_lr", type=positive, help="their learning rate [the last stage's]")
    add("--teacher_tokens", type=count, default=4 * 10**6, help="for the tiny one [%(default)s]")
    args = parser.parse_args(arguments)
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, args.seeds))}: one of them comes twice")
    if args.study:                          # each of its cells is a command of its own
        return args

    if args.preset is None:
        args.preset, some = ("phi", "a") if torch.cuda.is_available() else ("tiny", "no")
        print(f"preset {args.preset}, since there is {some} CUDA device (or choose by --preset)")
    args.stage = args.stage or ([2, 3] if args.objective else [1, 2, 3])
    preset, own = PRESETS[args.preset], {x: getattr(args, x) for x in ("tokens", "batch", "lr")}
    preset = {"warmup": 0.1} | preset | RECIPES[args.recipe or preset["recipe"]]
    if args.data not in (None, preset["data"]):
        preset["config"] = None             # a part of the preset's own data set
    if args.mixer != "mamba2" and preset["init"] == "fit":
        preset["init"] = "qkv"              # what is fitted is that one's matrix
    for name, value in preset.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    shares = [preset["shares"][stage - 1] for stage in args.stage if stage in STAGES]
    whole_run = preset["tokens"] * sum(shares) / sum(preset["shares"])
    if args.data is None and not args.bench and args.plan is None:
        raise UsageError(f"--preset {args.preset} brings no text: give --data, a file or folder")
    if set(args.stage) - set(STAGES) or sorted(set(args.stage)) != args.stage:
        raise UsageError(f"--stage {' '.join(map(str, args.stage))}: choose among 1, 2 and 3, "
                         "in this order")
    if args.objective and 2 not in args.stage:
        raise UsageError("--objective takes stage 2's place: leave it out, or add 2 to --stage")
    for name, objective in (("layer_map", "hs"), ("relation_layer", "mha"),
                            ("relation_heads", "mha")):
        if getattr(args, name) is not None and args.objective != objective:
            raise UsageError(f"--{name} is for --objective {objective}")
    if args.fsdp and args.controls:
        raise UsageError("--controls start from the whole teacher, which --fsdp has in shards: "
                         "leave one of them out")
    if args.init in ("fit", "distance") and args.mixer != "mamba2":
        raise UsageError(f"--init {args.init} is for --mixer mamba2: choose mohawk, qkv, "
                         "conv or random")
    if args.warmup + args.decay > 1 + 1e-9:             # 0.7 + 0.3 may be a little more
        raise UsageError(f"--warmup {args.warmup} and --decay {args.decay} are more than the whole "
                         "run together: the learning rate would never be --lr")
    if max(args.betas) == 1:
        raise UsageError("--betas of 1 never forget: give less")
    if args.mfu == 0:
        raise UsageError("--mfu 0 would take forever: give more")
    if args.context == 1:
        raise UsageError("--context 1: in windows of one token no token follows another")
    if args.teacher_tokens < TINY_BATCH * TINY_CONTEXT:
        raise UsageError(f"--teacher_tokens {args.teacher_tokens:,}: one update takes "
                         f"{TINY_BATCH * TINY_CONTEXT:,}")
    if not own["tokens"] or len(own["tokens"]) == 1:
        total = own["tokens"][0] if own["tokens"] else whole_run
        own["tokens"] = [round(total * share / sum(shares)) for share in shares]
    if args.plan and args.plan not in GPUS:
        raise UsageError(f"--plan {args.plan}: choose among {', '.join(GPUS)}, or none")
    world = args.world if args.plan is not None else int(os.environ.get("WORLD_SIZE", 1))

    args.plans = {}
    for n, stage in enumerate(args.stage):
        values = {name: pick(name, mine, n, len(args.stage)) if mine
                  else pick(name, preset[name], stage - 1, 3) for name, mine in own.items()}
        plan = args.plans[stage] = argparse.Namespace(**values | {"tokens": int(values["tokens"])})
        if plan.batch % args.context or plan.batch == 0:
            raise UsageError(f"--batch {plan.batch} is not a whole number of windows of --context "
                             f"{args.context}")
        if plan.batch // args.context % world:
            raise UsageError(f"--batch {plan.batch} is {plan.batch // args.context} windows of "
                             f"--context {args.context}, which {world} processes cannot share "
                             "evenly: choose another --batch")
        if plan.tokens < plan.batch:
            raise UsageError(f"stage {stage} has {plan.tokens:,} tokens, less than one batch of "
                             f"{plan.batch:,}: give more --tokens or a smaller --batch")
        plan.micro_batch = math.gcd(args.micro_batch, plan.batch // args.context // world)
    return args


def pick(name, values, n, of):
    if len(values) not in (1, of):
        raise UsageError(f"--{name} has {len(values)} values for {of} stages: give 1, or one each")
    return values[n if len(values) > 1 else 0]


if __name__ == "__main__":
    run_program(main)
