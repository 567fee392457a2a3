"""How close is the student to its teacher, how good, and how fast? Tables and samples.

Run:  python eval.py out/tiny                          # the last stage of a run, in tables
      python eval.py out/tiny --stage 1                # an earlier one
      python eval.py out/tiny --prompt "class "        # both continue this, side by side
      python eval.py out/tiny --speed                  # tokens/s and memory as the context grows
      python eval.py --speed --random microsoft/phi-1_5 --contexts 512     # no weights needed
      python eval.py goombalab/Phi-Mamba               # the published weights, or any model folder

Three distances for each layer, as shares of the teacher's own answer (zeros would score 100%):

    matrix    given the teacher's input, || attention - M ||                what stage 1 minimises
    block     given the teacher's input, || its output - the student's ||   what stage 2 minimises
    drift     each model by itself from the tokens on, || teacher's u - student's u ||,
              errors of all layers before added up

A state of constant size must forget. What is lost shows as the context grows, so there are tables
by position, by the distance of a key to be found again, and by how long both write the same text.

Benchmarks of lm-evaluation-harness are in extras/benchmarks.py, pictures in extras/pictures.py, a
folder that transformers loads comes from extras/export.py.
"""
import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import math
import random
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from model_ssm import SSM, UsageError, capture_graph
from model_teacher import Teacher, hf_config
from prepare import (
    Parser,
    Tokenizer,
    at_least_one,
    count,
    open_data,
    run_program,
    source_of_text,
)

FILLER = "The grass is green. The sky is blue. The sun is yellow. There and back again. "


# -----------------------------------------------------------------------------
# How close: predictions, and layer by layer. Windows are (n, L + 1) held-out tokens: the first L go
# in, the last L are what comes next.

@torch.no_grad()
def compare(model, teacher, windows):
    """How close `model` is to `teacher` on windows (n, L + 1), in nats a token and shares.

    -> {"loss": -log p(next token), "kl": KL(teacher || model),
        "top1": how often both would choose the same token}
    """
    total = torch.zeros(3, dtype=torch.float64)
    device, L = next(teacher.model.parameters()).device, windows.shape[1] - 1
    at_once = max(1, 2**23 // (L * teacher.config.vocab_size))          # (B, L, V) maps of 32 MB
    for tokens in windows.split(at_once):
        tokens = tokens.to(device)
        log_p = log_q = log_probabilities(model, tokens[:, :-1])        # (B L, V)
        if model is not teacher:
            log_p = log_probabilities(teacher, tokens[:, :-1])
        total += torch.stack([F.nll_loss(log_q, tokens[:, 1:].flatten(), reduction="sum"),
                              F.kl_div(log_q, log_p, reduction="sum", log_target=True),
                              (log_q.argmax(-1) == log_p.argmax(-1)).sum()]).double().cpu()
    loss, kl, top1 = (total / windows[:, 1:].numel()).tolist()
    return {"loss": loss, "kl": kl, "top1": top1}


def log_probabilities(model, tokens):
    """tokens (B, L) -> (B L, V)"""
    return model.logits(tokens).float().log_softmax(-1).flatten(0, 1)


@torch.no_grad()
def layer_distances(student, teacher, tokens):
    """tokens (B, L) -> one dict per layer: matrix, block and drift, as shares.

    matrix and block are None where the layer keeps attention.
    """
    rows = []
    outputs, outputs_t = student.outputs(tokens), teacher.outputs(tokens)       # (B, L, D) each
    for i, u in teacher.inputs(tokens):
        row = {"matrix": None, "block": None}
        if i in student.ssm_layers:
            distance, size = student.orientation(i, u, *teacher.factors(i, u))
            row["matrix"] = (distance / size).item()
            target = teacher.block(i, u)
            row["block"] = share(student.block(i, u) - target, target - u)
        row["drift"] = share(outputs[i] - outputs_t[i], outputs_t[i])
        rows.append(row)
    return rows


def share(distance, size):
    """x, y (B, L, D) -> the mean length of x as a share of that of y"""
    return (distance.float().norm(dim=-1).mean() / size.float().norm(dim=-1).mean()).item()


@torch.no_grad()
def by_position(student, teacher, windows):
    """windows (n, L + 1) of tokens -> (4, n, L), for each prediction:

    the teacher's loss, the student's, KL(teacher || student), in nats; whether both would choose
    the same token, 0 or 1
    """
    rows, device = [], next(teacher.model.parameters()).device
    L, at_once = windows.shape[1] - 1, max(1, 2**23 // teacher.config.vocab_size)
    for tokens in windows.to(device).split(max(1, 2**13 // L)):
        h_t, h = (model.hidden(tokens[:, :-1]).flatten(0, 1) for model in (teacher, student))
        parts = []
        for part in zip(h_t.split(at_once), h.split(at_once),
                        tokens[:, 1:].flatten().split(at_once), strict=True):
            parts.append(scores_of(teacher, student, *part))            # (4, at_once)
        rows.append(torch.cat(parts, 1).view(4, -1, L).cpu())
    return torch.cat(rows, 1)


def scores_of(teacher, student, h_t, h, next_token):
    """Final hidden states (n, D) of both, next tokens (n) -> (4, n), as by_position has them"""
    log_p = teacher.head(h_t).float().log_softmax(-1)                   # (n, V)
    log_q = student.head(h).float().log_softmax(-1)
    loss_t, loss = (-x.gather(-1, next_token[:, None])[:, 0] for x in (log_p, log_q))
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).float()
    return torch.stack([loss_t, loss, kl, same])


def sliding(text, context, stride):
    """Pieces in which every token is predicted from all the text that fits. text (n, M + 1)

    -> pieces (n m, context + 1), counted (n m, context): which predictions are new

        text   a b c d e f g h
               # # # #              '#' is counted: all of the first piece, of others the last
                   . . # #          `stride`, so that each token counts once and, '.', has at
                       . . # #      least context - stride before it
    """
    pieces = text.unfold(1, context + 1, stride)                        # (n, m, context + 1)
    counted = torch.zeros(pieces[..., 1:].shape, dtype=torch.bool)
    counted[:, 0] = True
    counted[..., -stride:] = True
    return pieces.flatten(0, 1), counted.flatten(0, 1)


# -----------------------------------------------------------------------------
# How good: a key to be found again, and texts written by each model alone

def pass_keys(tokenizer, distance, n, seed=0):
    """n texts that name a key of five digits and ask for it `distance` tokens later

    -> [(1-D tensor that ends with the key, how many tokens the digits are), ...]
    """
    draw, texts = random.Random(seed), []
    question, stop, space, filler = (tokenizer.encode(text) for text in
                                     ("The pass key is", ". ", " ", FILLER))
    for _ in range(n):
        key = tokenizer.encode(f" {draw.randrange(10**4, 10**5)}")
        room = max(0, distance - len(stop) - len(question))
        between = (filler * (room // len(filler) + 1))[-room:] if room else []
        digits = len(key) - (key[:1] == space)          # a space that is a token of its own
        text = question + key + stop + between + question + key
        texts.append((torch.tensor(text), digits))
    return texts


@torch.no_grad()
def retrieval(model, texts, device):
    """texts as pass_keys gives them -> of the keys' tokens, the share that is the model's first
    choice, and the (geometric) mean probability it gives them"""
    right, log_p = [], []
    for text, n in texts:
        text = text.to(device)
        log_q = model.head(model.hidden(text[None, :-1])[0, -n:]).float().log_softmax(-1)
        right.append(log_q.argmax(-1) == text[-n:])
        log_p.append(log_q.gather(-1, text[-n:, None]))
    return torch.cat(right).float().mean().item(), torch.cat(log_p).mean().exp().item()


def agreement(student, teacher, prompts, n):
    """Both write n tokens by themselves, always the likeliest. prompts (B, L)

    -> (B) how many tokens until they differ, (B) share of all places where they are equal
    """
    written, written_t = (model.generate(prompts, n)[:, -n:] for model in (student, teacher))
    equal = (written == written_t).double().cpu()
    return equal.cumprod(1).sum(1), equal.mean(1)


# -----------------------------------------------------------------------------
# The tables

def show(names, *rows):
    """A table in Markdown: cells of text, each column as wide as its widest.

    >>> show(["task", "acc"], ["piqa", "76.6"])
    <BLANKLINE>
    | task |  acc |
    |------|------|
    | piqa | 76.6 |
    """
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = []
    for row in (names, *rows):
        cells = [f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|".join("-" * (n + 2) for n in widths)
    print("\n".join(["", lines[0], f"|{rule}|", *lines[1:]]))


def show_tables(run, student):
    """All of them, for a run and its student"""
    windows = run.windows(run.context)
    text = longest_windows(run)
    show_predictions(run, student, windows)
    show_layers(run, student, windows)
    show_perplexity(run, student, text)
    show_by_position(run, student, text)
    show_retrieval(run, student)
    show_agreement(run, student, text)


def longest_windows(run):
    """As far beyond the training length as the held-out text allows: 4, 2 or 1 times"""
    for times in (4, 2):
        with contextlib.suppress(UsageError):
            return run.windows(times * run.context)
    return run.windows(run.context)


def show_predictions(run, student, windows):
    print(f"\non {windows[:, 1:].numel():,} held-out tokens in windows of {run.context}, in fp32:")
    rows = []
    for name, model in (("teacher", run.teacher), ("student", student)):
        x = compare(model, run.teacher, windows)
        rows.append([name, f"{x['loss']:.4f}", f"{math.exp(x['loss']):.2f}", f"{x['kl']:.4f}",
                     f"{x['top1']:.1%}"])
    show(["model", "val loss", "ppl", "KL", "top-1"], *rows)


def show_layers(run, student, windows):
    rows = []
    for i, row in enumerate(layer_distances(student, run.teacher,
                                            windows[:16, :-1].to(run.device))):
        rows.append([str(i), *("kept" if x is None else f"{x:.1%}" for x in row.values())])
    show(["layer", "matrix", "block", "drift"], *rows)


def show_perplexity(run, student, text):
    stride = max(1, run.context // 2)
    pieces, counted = sliding(text, run.context, stride)
    losses = by_position(student, run.teacher, pieces)[:2, counted].double().sum(1).tolist()
    n, n_bytes = int(counted.sum()), run.tokenizer.bytes_in(pieces[:, 1:][counted].tolist())
    print(f"\nperplexity, a window of {run.context} sliding by {stride}: {n:,} tokens, "
          f"{n_bytes:,} bytes of text:")
    rows = []
    for name, nats in zip(("teacher", "student"), losses, strict=True):
        rows.append([name, f"{math.exp(nats / n):.3f}", f"{math.exp(nats / n_bytes):.3f}",
                     f"{nats / n_bytes / math.log(2):.3f}"])
    show(["model", "of a token", "of a byte", "bits/byte"], *rows)


def show_by_position(run, student, text):
    print(f"\nby the tokens of context there are, in nats (training had up to {run.context}):")
    scores, longest = by_position(student, run.teacher, text).double(), text.shape[1] - 1
    edges = sorted({0, *fractions(run.context, 8, 4, 2, 1),
                    *range(2 * run.context, longest + 1, 2 * run.context)})
    rows = []
    for i, j in itertools.pairwise(edges):
        *losses, same = scores[:, :, i:j].mean((1, 2)).tolist()
        rows.append([f"{i + 1:,}-{j:,}", *(f"{x:.4f}" for x in losses), f"{same:.1%}"])
    show(["context", "teacher loss", "student loss", "KL", "top-1"], *rows)


def show_retrieval(run, student):
    print("\npass key: a number of five digits, filler, then the question; of its tokens, the "
          "share that\nis the first choice, and their mean probability (16 keys):")
    rows = []
    for distance in sorted({*fractions(run.context, 8, 4, 2, 1), 2 * run.context, 4 * run.context}):
        keys, cells = pass_keys(run.tokenizer, distance, 16), []
        for model in (run.teacher, student):
            cells += [f"{x:.1%}" for x in retrieval(model, keys, run.device)]
        rows.append([f"{distance:,}", *cells])
    show(["tokens ago", "teacher", "probability", "student", "probability"], *rows)


def show_agreement(run, student, text):
    n, prompts, rows = 64, text[:16].to(run.device), []
    print(f"\nafter each of {len(prompts)} prompts {n} tokens by each model alone, always the "
          "likeliest; how many\nuntil they differ, and the share of places where they are equal:")
    for length in sorted(fractions(run.context, 8, 2, 1)):
        until, equal = agreement(student, run.teacher, prompts[:, :length], n)
        rows.append([f"{length:,}", f"{until.mean():.1f}", f"{until.median():.0f}",
                     f"{equal.mean():.1%}"])
    show(["prompt", "mean", "median", "equal"], *rows)


def fractions(context, *parts):
    """
    >>> sorted(fractions(256, 8, 2, 1))
    [32, 128, 256]
    """
    return {max(1, context // n) for n in parts}


# -----------------------------------------------------------------------------
# How fast

def memory(device, reset=False):
    """The most bytes held since the last reset=True, which gives what is held now.

    Of the GPU's allocator; else of this process, where Linux tells; else not a number.
    """
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:                                       # what was freed does not count
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_bytes(b"5")
        status = Path("/proc/self/status").read_bytes()
        return 1024 * int(re.search(rb"VmHWM:\s+(\d+)", status)[1])
    except (OSError, AttributeError, TypeError):
        return math.nan


def timed(work, inputs, device, times):
    """work(*inputs), whose seconds are added to the list `times`"""
    start = time.perf_counter()
    output = work(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    times.append(time.perf_counter() - start)
    return output


@torch.no_grad()
def pace(model, context, batch, device, steps=64):
    """Read `batch` prompts of `context` random tokens, then write. -> a dict, medians:

    prefill, decode: tokens/s, of all prompts   ms: of one step   state: bytes, of all prompts
    peak: bytes, weights included
    """
    tokens, token = torch.randint(model.config.vocab_size, (2, batch, context), device=device)
    prefill, decode, state = [], [], None
    before = memory(device, reset=True)
    while len(prefill) < 5 and sum(prefill) < 2:
        state = None                                            # the last one makes room
        state = timed(model.read, (tokens, steps + 8), device, prefill)[1]  # 8: for a capture
    state_bytes = sum(x.nbytes for layer in tensors_of(state) for x in layer)
    step, token = single_step(model, state, token[:, 0], device), token[:, 0]
    for _ in range(steps):
        timed(step, (token,), device, decode)
    module = model if isinstance(model, SSM) else model.model
    peak = memory(device) - before + sum(x.nbytes for x in module.parameters())
    prefill, decode = statistics.median(prefill), statistics.median(decode)
    return {"context": context, "batch": batch, "prefill": batch * context / prefill,
            "decode": batch / decode, "ms": 1e3 * decode, "state": state_bytes, "peak": peak}


def tensors_of(state):
    """A student's state, or a teacher's KV cache -> for each layer its tensors"""
    if isinstance(state, list):
        return state
    return [(layer.keys, layer.values) for layer in state.layers]


def single_step(model, state, token, device):
    """-> a function of tokens (B) that makes one step, on a GPU as one CUDA graph"""
    step = model.stepper(state)
    if isinstance(model, SSM) or device != "cuda":
        return step
    # A replayed step writes one place of the cache over and over: no text, but the same work.
    replay, _ = capture_graph(lambda: step(token))
    return lambda _: replay()


def fastest(model, contexts, batches, device):
    """-> rows of pace, for each context that of the batch that writes most; what does not fit is
    left out"""
    best = {}
    pace(model, min(contexts), 1, device, steps=3)              # warm: kernels compiled and chosen
    for batch, context in itertools.product(sorted(batches), sorted(contexts)):
        try:
            row = pace(model, context, batch, device)
        except torch.OutOfMemoryError:
            print(f"batch {batch} x context {context:,} does not fit")
            continue
        best[context] = max(row, best.get(context, row), key=lambda x: x["decode"])
    return list(best.values())


def show_speed(args):
    """The table; with a run, also its speed.json, from which extras/pictures.py draws"""
    device = choose_device(args.device)[0]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if args.random:
        folder, name = None, f"{args.random}, random weights"
        teacher = Teacher.random(hf_config(args.random), device, dtype)
    else:
        about, folder, stage = open_run(args.run, args.stage)
        teacher, name = Teacher.load(args.teacher or about["teacher"], device, dtype), str(stage)
    where = (torch.cuda.get_device_name() if device == "cuda"
             else f"{device}, threads: {torch.get_num_threads()}")
    title = f"{name} | {where}, {str(dtype).removeprefix('torch.')} | medians; peak with weights"
    speeds = {"teacher": fastest(teacher, args.contexts, args.batch_sizes, device)}
    student = SSM.from_teacher(teacher) if args.random else SSM.from_pretrained(stage)
    del teacher                                                 # one at a time: large ones fit
    speeds["student"] = fastest(student.to(device, dtype), args.contexts, args.batch_sizes, device)
    print(f"\n{title}:")
    rows = []
    for context, name in itertools.product(sorted(args.contexts), speeds):
        for x in speeds[name]:
            if x["context"] == context:
                rows.append([f"{context:,}", name, str(x["batch"]), f"{x['prefill']:,.0f}",
                             f"{x['decode']:,.0f}", f"{x['ms']:.2f}", f"{x['state'] / 1e6:,.2f}",
                             f"{x['peak'] / 1e6:,.0f}"])
    show(["context", "model", "batch", "prefill tok/s", "decode tok/s", "ms/step", "state MB",
          "peak MB"], *rows)
    if folder:
        text = json.dumps({"title": title} | speeds) + "\n"
        (folder / "speed.json").write_text(text, encoding="utf-8")


# -----------------------------------------------------------------------------
# Samples

def print_samples(run, student, prompt, args):
    """Both continue `prompt`, side by side: in a terminal as it is written, else at the end"""
    ids = run.tokenizer.encode(prompt)
    tokens = torch.tensor([ids], device=run.device, dtype=torch.long)           # (1, L)
    print(f"\n{args.length} tokens from {prompt!r}, temperature {args.temperature}, "
          "the same seed:\n")
    live = sys.stdout.isatty()
    columns, lines_on_screen = shutil.get_terminal_size()
    width = max(20, columns // 2 - 2) if live else 52
    written, erase = (ids[:], ids[:]), ""

    def both():
        left, right = (run.tokenizer.decode(x) for x in written)
        return side_by_side(("teacher", left), ("student", right), width)

    streams = (model.stream(tokens, args.length, args.temperature, args.top_k, args.seed)
               for model in (run.teacher, student))
    for pair in zip(*streams, strict=True):
        for row, token in zip(written, pair, strict=True):
            row.append(token.item())
        if live:                            # the last lines, as many as the cursor can go back over
            lines = both().split("\n")[2 - lines_on_screen:]
            print(erase + "\n".join(lines), flush=True)
            erase = f"\x1b[{len(lines)}F\x1b[J"
    print(erase + both())


def side_by_side(left, right, width=52):
    """Two texts as columns of one, under their titles.

    >>> print(side_by_side(("a", "one two"), ("b", "uno"), width=4))
    a    | b
    one  | uno
    two  |
    """
    columns = [[title, *wrapped(text, width)] for title, text in (left, right)]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(f"{a:<{width}} | {b}".rstrip() for a, b in rows)


def wrapped(text, width):
    """Lines of at most `width`. What a terminal would obey, as a carriage return, is a dot."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        plain = "".join(c if c.isprintable() else "\u00b7" for c in line)
        lines += [plain[i:i + width] for i in range(0, max(1, len(plain)), width)]
    return lines


# -----------------------------------------------------------------------------
# A run to evaluate

# What a run of the paper's recipe says of itself: for model folders and hub ids of no run
PUBLISHED = {"teacher": "microsoft/phi-1_5", "data": "stdlib", "config": None, "context": 2048,
             "eval_tokens": 2**19, "seed": 0}


def open_run(path, stage=None):
    """A run folder or one of its stage folders -> (run.json as a dict, run folder, stage folder)

    A model folder of no run, or a hub id, is taken for what the paper's recipe gives.
    """
    path = Path(path)
    run = path if (path / "run.json").is_file() else path.parent
    if not (run / "run.json").is_file():
        hub_id = len(path.parts) == 2 and not path.parent.exists()
        if hub_id or (path / "config.json").is_file():
            return {"arguments": PUBLISHED, "teacher": PUBLISHED["teacher"],
                    "data": PUBLISHED["data"]}, path, path
        raise UsageError(f"{path} is not a run of distill.py: there is no run.json")
    stages = sorted(run.glob("stage[123]"))
    if path != run:
        chosen = path
    elif stage:
        chosen = run / f"stage{stage}"
    elif not stages:
        raise UsageError(f"{run} has no finished stage yet")
    else:
        chosen = stages[-1]
    if not chosen.is_dir():
        finished = ", ".join(s.name for s in stages) or "no finished stage"
        raise UsageError(f"there is no {chosen}: {run} has {finished}")
    about = json.loads((run / "run.json").read_text(encoding="utf-8"))
    return about, run, chosen


class EvaluatedRun:
    """A run's student and teacher, and the text it is judged by. args: as add_run_flags has them"""

    def __init__(self, args):
        about, self.folder, self.stage = open_run(args.run, args.stage)
        self.about, self.device = about, choose_device(args.device)[0]
        self.student = SSM.from_pretrained(self.stage).to(self.device).eval()
        print(f"student {self.stage} | {self.student.loaded}")
        name = args.teacher or about["teacher"]
        self.teacher = Teacher.load(name, self.device).at(self.student.config.n_layer)
        if self.student.config.vocab_size != self.teacher.config.vocab_size:
            raise UsageError(
                f"the student has {self.student.config.vocab_size:,} tokens, its teacher {name} "
                f"{self.teacher.config.vocab_size:,}: they cannot be compared")
        defaults = {"stream": None, "mixer": "mamba2", "n_layer": None}     # of older runs
        self.args = argparse.Namespace(**defaults | about["arguments"])
        self.args.teacher = args.teacher or self.args.teacher
        self.tokenizer = Tokenizer(self.args.teacher)
        self.tokenizer.check_rows(self.teacher.config.vocab_size)
        self.context = args.context or self.args.context
        if not self.args.stream:
            self.args.data = about["data"]
        if args.data:
            self.args.data, self.args.config = args.data, args.config
            self.args.stream = args.data != "stdlib" and not Path(args.data).expanduser().exists()
        self.args.eval_tokens = args.eval_tokens or self.args.eval_tokens

    def windows(self, length):
        """Held-out windows (n, length + 1)"""
        args = argparse.Namespace(**vars(self.args) | {"context": length})
        return open_data(args, self.tokenizer)[1]

    def calibration_tokens(self):
        """The tokens (8, L) that the student's start was fitted on"""
        data = open_data(self.args, self.tokenizer)[0]
        return data.batch(0, 8, self.args.context)[:, :-1].to(self.device)


def choose_device(name, fp32=False):
    """-> the device, whether stages 2 and 3 compute in bf16 there, and why we think so"""
    device = name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
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


# -----------------------------------------------------------------------------
# The command line

def main(arguments=None):
    args = parse(arguments)
    if args.speed:
        return show_speed(args)
    run = EvaluatedRun(args)
    if args.prompt is None:
        show_tables(run, run.student)
    print_samples(run, run.student, "def " if args.prompt is None else args.prompt, args)


def add_run_flags(add, **optional):
    """Which run, and what to read: also for the programs in extras/ that need one"""
    add("run", **optional, help="a run folder such as out/tiny, one of its stage folders, another "
        "model folder, or a hub id")
    add("--stage", type=int, choices=(1, 2, 3), help="which student of the run [the last]")
    add("--teacher", help="another name for the run's teacher, if it has moved")
    add("--context", type=at_least_one, help="tokens per window [as in training]")
    add("--eval_tokens", type=at_least_one, help="held-out tokens to read [as in training]")
    add("--data", type=source_of_text, help="another text to read: as for distill.py, a hub data "
        "set as a stream [the run's; without a run stdlib]")
    add("--config", help="which part of a Hugging Face data set")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"),
        help="to compute on [auto]")


def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add_run_flags(add, nargs="?")
    add("--prompt", help="both models continue this, instead of the tables [after them: 'def ']")
    add("--length", type=at_least_one, default=300, help="tokens to generate [%(default)s]")
    add("--temperature", type=float, default=0.7, help="0 is greedy [%(default)s]")
    add("--top_k", type=at_least_one, help="sample from so many likeliest tokens [all]")
    add("--seed", type=count, default=0, help="of the sampling [%(default)s]")
    add("--speed", action="store_true", help="tokens/s and memory by context, instead")
    add("--random", metavar="NAME", help="with --speed: this architecture, random weights, no run")
    add("--contexts", type=at_least_one, nargs="+", default=[2**n for n in range(9, 17)],
        help="with --speed: tokens of context [512 ... 65,536]")
    add("--batch_sizes", type=at_least_one, nargs="+", default=[1],
        help="with --speed: each is tried, the best is shown [1]")
    args = parser.parse_args(arguments)
    if args.random and not args.speed:
        raise UsageError("--random measures --speed: nothing else can be asked of random weights")
    if bool(args.run) == bool(args.random):
        raise UsageError("give a run folder such as out/tiny, or --speed --random NAME, not both")
    if not 0 <= args.temperature < math.inf:
        raise UsageError(f"--temperature {args.temperature}: give 0, for greedy, or more")
    return args


if __name__ == "__main__":
    run_program(main)
