"""How close is the student to its teacher, and how fast? Tables, samples, pictures.

Run:  python eval.py out/tiny                          # the last stage of a run, in tables
      python eval.py out/tiny --stage 1                # an earlier one
      python eval.py out/tiny --prompt "class "        # both go on from here, side by side
      python eval.py out/tiny --speed                  # tokens/s and memory as the context grows
      python eval.py --speed --random microsoft/phi-1_5 --contexts 512     # no weights needed
      python eval.py out/tiny --pictures               # PNG files in out/tiny (needs matplotlib)

Three distances for each layer, as shares of the teacher's own answer (silence would score 100%):

    matrix    given the teacher's input, || attention - M ||                what stage 1 makes small
    block     given the teacher's input, || its output - the student's ||   what stage 2 makes small
    drift     each model by itself from the tokens on, || teacher's u - student's u ||,
              errors of all layers before added up

A state of constant size must forget: what is lost shows as the context grows, so there are tables
by position, by the distance of a key told once, and by how long both write the same text.

It leaves out: downstream tasks.
"""
import argparse
import contextlib
import ctypes
import gc
import importlib.util
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

from distill import blocks, choose_device, copy_of_teacher, matrices, open_data
from model_ssm import SSM, UsageError, captured
from model_teacher import Teacher, architecture, compare
from prepare import Parser, Tokenizer, count, run_program

FILLER = "The grass is green. The sky is blue. The sun is yellow. There and back again. "


def open_run(path, stage=None):
    """A run folder or one of its stage folders -> (run.json as a dict, run folder, stage folder)"""
    path = Path(path)
    run = path if (path / "run.json").is_file() else path.parent
    if not (run / "run.json").is_file():
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
    return json.loads((run / "run.json").read_text()), run, chosen


@torch.no_grad()
def layer_distances(student, teacher, tokens):
    """tokens (B, L) -> one dict per layer: matrix, block and drift, as shares.

    matrix and block are None where the layer keeps attention.
    """
    rows = [{"matrix": None, "block": None} for _ in teacher.layers]
    for name, losses in (("matrix", matrices), ("block", blocks)):
        for i, (_, left) in zip(student.ssm_layers, losses(student, teacher, tokens), strict=True):
            rows[i][name] = left.item()
    for (i, ours), (_, theirs) in zip(student.inputs(tokens), teacher.inputs(tokens), strict=True):
        rows[i]["drift"] = ((student.block(i, ours) - teacher.block(i, theirs)).norm(dim=-1).mean()
                            / teacher.block(i, theirs).norm(dim=-1).mean()).item()
    return rows


# -----------------------------------------------------------------------------
# the predictions: where in the context are they lost?

@torch.no_grad()
def by_position(student, teacher, windows):
    """windows (n, L + 1) of tokens -> (4, n, L), for each prediction:

    the teacher's loss, the student's, KL(teacher || student), in nats; whether both would choose
    the same token, 0 or 1
    """
    rows, device = [], next(teacher.model.parameters()).device
    L, at_once = windows.shape[1] - 1, max(1, 2**23 // teacher.config.vocab_size)
    for tokens in windows.to(device).split(max(1, 2**13 // L)):
        follow = tokens[:, 1:].flatten()
        theirs, ours = (m.hidden(tokens[:, :-1]).flatten(0, 1) for m in (teacher, student))
        parts = []
        for h, g, y in zip(*(x.split(at_once) for x in (theirs, ours, follow)), strict=True):
            p, q = (m.head(x).float().log_softmax(-1) for m, x in ((teacher, h), (student, g)))
            losses = (-x.gather(-1, y[:, None])[:, 0] for x in (p, q))
            parts.append(torch.stack([*losses, (p.exp() * (p - q)).sum(-1),
                                      (p.argmax(-1) == q.argmax(-1)).float()]))
        rows.append(torch.cat(parts, 1).view(4, -1, L).cpu())
    return torch.cat(rows, 1)


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
    counted[:, 0], counted[..., -stride:] = True, True
    return pieces.flatten(0, 1), counted.flatten(0, 1)


def pass_keys(tokenizer, distance, n, seed=0):
    """n texts that tell a key of five digits and ask for it `distance` tokens later

    -> [(1-D tensor that ends with the key, how many tokens the digits are), ...]
    """
    draw, texts = random.Random(seed), []
    ask, stop, space, filler = map(tokenizer.encode, ("The pass key is", ". ", " ", FILLER))
    for _ in range(n):
        key = tokenizer.encode(f" {draw.randrange(10**4, 10**5)}")
        between = max(0, distance - len(stop) - len(ask))
        between = (filler * (between // len(filler) + 1))[-between:] if between else []
        digits = len(key) - (key[:1] == space)          # a space by itself is no news
        texts.append((torch.tensor(ask + key + stop + between + ask + key), digits))
    return texts


@torch.no_grad()
def retrieval(model, texts, device):
    """texts as pass_keys gives them -> how many of the keys' tokens are the model's first choice,
    and the (geometric) mean probability it gives them: shares"""
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
    ours, theirs = (m.generate(prompts, n)[:, -n:] for m in (student, teacher))
    equal = (ours == theirs).double().cpu()
    return equal.cumprod(1).sum(1), equal.mean(1)


def show(names, rows):
    """A table in Markdown, each column as wide as its widest cell. rows: lists of strings"""
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    for row in (names, ["-" * n for n in widths], *rows):
        print("| " + " | ".join(f"{x:>{n}}" for x, n in zip(row, widths, strict=True)) + " |")


def tables(student, teacher, tokenizer, windows, text, context):
    """windows (n, context + 1)   text (m, several contexts + 1), both held-out tokens"""
    both, device = (teacher, student), next(teacher.model.parameters()).device
    print(f"\non {windows[:, 1:].numel():,} held-out tokens in windows of {context}, in fp32:\n")
    rows = [compare(model, teacher, windows) for model in both]
    show(["model", "val loss", "ppl", "KL", "top-1"],
         [[name, f"{x['loss']:.4f}", f"{math.exp(x['loss']):.2f}", f"{x['kl']:.4f}",
           f"{x['top1']:.1%}"] for name, x in zip(("teacher", "student"), rows, strict=True)])

    print()
    rows = layer_distances(student, teacher, windows[:16, :-1].to(device))
    show(["layer", "matrix", "block", "drift"],
         [[str(i), *("kept" if x is None else f"{x:.1%}" for x in row.values())]
          for i, row in enumerate(rows)])

    stride = max(1, context // 2)
    pieces, counted = sliding(text, context, stride)
    losses = by_position(student, teacher, pieces)[:2, counted].double().sum(1).tolist()
    n, n_bytes = int(counted.sum()), tokenizer.bytes_in(pieces[:, 1:][counted].tolist())
    print(f"\nperplexity, a window of {context} sliding by {stride}: {n:,} tokens, "
          f"{n_bytes:,} bytes of text:\n")
    show(["model", "of a token", "of a byte", "bits/byte"],
         [[name, *(f"{x:.3f}" for x in (math.exp(nats / n), math.exp(nats / n_bytes),
                                        nats / n_bytes / math.log(2)))]
          for name, nats in zip(("teacher", "student"), losses, strict=True)])

    print(f"\nby the tokens of context there are, in nats (training had up to {context}):\n")
    scores, longest = by_position(student, teacher, text).double(), text.shape[1] - 1
    edges = sorted({0, *(max(1, context // n) for n in (8, 4, 2, 1)),
                    *range(2 * context, longest + 1, 2 * context)})
    show(["context", "teacher loss", "student loss", "KL", "top-1"],
         [[f"{i + 1:,}-{j:,}", *(f"{x:.4f}" for x in scores[:3, :, i:j].mean((1, 2))),
           f"{scores[3, :, i:j].mean():.1%}"] for i, j in itertools.pairwise(edges)])

    print("\na key of five digits, told once and asked for after filler; of its tokens, the share "
          "that is\nthe first choice, and their mean probability (16 keys):\n")
    near = {max(1, context // n) for n in (8, 4, 2, 1)}
    show(["tokens ago", "teacher", "probability", "student", "probability"],
         [[f"{distance:,}", *(f"{x:.1%}" for model in both for x in retrieval(
             model, pass_keys(tokenizer, distance, 16), device))]
          for distance in sorted(near | {2 * context, 4 * context})])

    n, prompts = 64, text[:16].to(device)
    print(f"\nafter each of {len(prompts)} prompts {n} tokens by each model alone, always the "
          "likeliest; how many\nuntil they differ, and the share of places where they are equal:\n")
    rows = {length: agreement(student, teacher, prompts[:, :length], n)
            for length in sorted({max(1, context // n) for n in (8, 2, 1)})}
    show(["prompt", "mean", "median", "equal"],
         [[f"{length:,}", f"{until.mean():.1f}", f"{until.median():.0f}", f"{equal.mean():.1%}"]
          for length, (until, equal) in rows.items()])


# -----------------------------------------------------------------------------
# speed

def memory(device, fresh=False):
    """The most bytes held since the last fresh=True, which gives what is held now.

    Of the GPU's allocator; else of this process, where Linux tells; else not a number.
    """
    if device == "cuda":
        fresh and torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if fresh:
            gc.collect(), ctypes.CDLL(None).malloc_trim(0)      # what was freed does not count
            Path("/proc/self/clear_refs").write_text("5")
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])
    except (OSError, AttributeError, TypeError):
        return math.nan


@torch.no_grad()
def pace(model, context, batch, device, steps=64):
    """Read `batch` prompts of `context` random tokens, then write. -> a dict, medians:

    prefill, decode: tokens/s, of all prompts   ms: of one step   state: bytes, of all prompts
    peak: bytes, weights included
    """
    tokens, token = torch.randint(model.config.vocab_size, (2, batch, context), device=device)
    times, state, before = [], None, memory(device, fresh=True)

    def timed(work, *inputs):
        start = time.perf_counter()
        out = work(*inputs)
        device == "cuda" and torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        return out

    while len(times) < 5 and sum(times) < 2:
        state = None                                            # the last one makes room
        state = timed(model.read, tokens, steps + 8)[1]         # 8: a capture tries a few
    prefill, times = statistics.median(times), []
    layers = [(x.keys, x.values) for x in state.layers] if isinstance(model, Teacher) else state
    held, token = sum(x.nbytes for layer in layers for x in layer), token[:, 0]
    step = model.stepper(state)
    if isinstance(model, Teacher) and device == "cuda":
        # Replayed, a step with a cache writes one place over and over: no text, but the same work.
        replay, _ = captured(lambda write=step: write(token))
        step = lambda _: replay()                                                   # noqa: E731
    for _ in range(steps):
        timed(step, token)
    decode = statistics.median(times)
    module = model if isinstance(model, SSM) else model.model
    peak = memory(device) - before + sum(x.nbytes for x in module.parameters())
    return {"context": context, "batch": batch, "prefill": batch * context / prefill,
            "decode": batch / decode, "ms": 1e3 * decode, "state": held, "peak": peak}


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


def speed(args):
    """The table, and in the run's folder speed.json and, where matplotlib is, speed.png"""
    device = choose_device(args.device)[0]
    dtype, folder = torch.bfloat16 if device == "cuda" else torch.float32, None
    if args.random:
        hf, name = architecture(args.random), f"{args.random}, random weights"
        teacher = Teacher.random(hf, device, dtype)
    else:
        about, folder, stage = open_run(args.run, args.stage)
        teacher, name = Teacher.load(args.teacher or about["teacher"], device, dtype), str(stage)
    threads = torch.get_num_threads()
    where = torch.cuda.get_device_name() if device == "cuda" else f"{device}, threads: {threads}"
    title = f"{name} | {where}, {str(dtype).removeprefix('torch.')} | medians; peak with weights"
    found = {"teacher": fastest(teacher, args.contexts, args.batch_sizes, device)}
    student = SSM.from_teacher(teacher) if args.random else SSM.from_pretrained(stage)
    del teacher                                                 # one at a time: large ones fit
    found["student"] = fastest(student.to(device, dtype), args.contexts, args.batch_sizes, device)
    print(f"\n{title}:\n")
    show(["context", "model", "batch", "prefill tok/s", "decode tok/s", "ms/step", "state MB",
          "peak MB"],
         [[f"{context:,}", name, str(x["batch"]), f"{x['prefill']:,.0f}", f"{x['decode']:,.0f}",
           f"{x['ms']:.2f}", f"{x['state'] / 1e6:,.2f}", f"{x['peak'] / 1e6:,.0f}"]
          for context in sorted(args.contexts) for name, rows in found.items()
          for x in rows if x["context"] == context])
    if folder:
        (folder / "speed.json").write_text(json.dumps({"title": title} | found) + "\n")
    if args.picture or folder and importlib.util.find_spec("matplotlib"):
        draw_speed(args.picture or folder / "speed.png", title, found)


# -----------------------------------------------------------------------------
# pictures

@contextlib.contextmanager
def figure(path, title, rows, columns, width, height):
    """Gives matplotlib's pyplot, a figure and its axes (rows, columns), and saves it at the end."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    sheet, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False,
                               layout="constrained")
    yield plt, sheet, axes
    sheet.suptitle(title, fontsize=10)
    sheet.savefig(path, dpi=110)
    plt.close(sheet)
    print(f"saved {path}")


def draw_matrices(path, title, rows, heads, signed=False):
    """rows: {model: [a matrix (L, L) for each (layer, head) of heads]}; magnitudes on a log scale,
    or signed differences"""
    size = 2.1 * len(heads) + 0.9, 2.1 * len(rows) + 0.5
    with figure(path, title, len(rows), len(heads), *size) as (plt, sheet, axes):
        colours = plt.matplotlib.colors
        scale = (dict(cmap="RdBu_r", norm=colours.SymLogNorm(0.01, vmin=-1, vmax=1)) if signed else
                 dict(cmap="magma", norm=colours.LogNorm(1e-3, 1)))
        for row, (name, found) in zip(axes, rows.items(), strict=True):
            for axis, matrix in zip(row, found, strict=True):
                shown = matrix if signed else matrix.abs().clamp_min(1e-3)
                image = axis.imshow(shown.numpy(), **scale)
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(name, fontsize=9)
        for axis, (layer, head) in zip(axes[0], heads, strict=True):
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
        label = ("student's weight - teacher's, linear within 0.01, log beyond" if signed else
                 "|weight of token j for token i|, log scale")
        sheet.colorbar(image, ax=axes, shrink=0.6, extend="both", label=label)


def draw_lines(path, title, panels, marker="o", contexts=False):
    """panels: {title: (x label, y label, {name: (x, y)})}; y on a log scale, contexts too"""
    with figure(path, title, 1, len(panels), 9, 3.2) as (plt, sheet, axes):
        ticker = plt.matplotlib.ticker
        for axis, (name, (x_label, y_label, lines)) in zip(axes[0], panels.items(), strict=True):
            for label, (x, y) in lines.items():
                axis.plot(x, y, marker=marker, markersize=3, linewidth=1.2, label=label)
            axis.set(title=name, xlabel=x_label, ylabel=y_label, yscale="log")
            axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
            if contexts:
                axis.set_xscale("log", base=4)
            elif marker:
                axis.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))      # layers
            for numbers in (axis.yaxis, axis.xaxis)[:1 + contexts]:
                numbers.set_major_formatter(lambda x, _: f"{x:,.10g}")
                numbers.set_minor_locator(ticker.NullLocator())
            axis.grid(alpha=0.3)
        if len(lines) > 1:
            sheet.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=5)


def draw_losses(path, title, log):
    """log: the events of log.jsonl. A point is the mean of 1% of a stage's steps."""
    panels = {}
    for stage, unit in ((1, "Frobenius distance"), (2, "L2 distance"), (3, "KL, nats a token")):
        events = [event for event in log if event["stage"] == f"stage {stage}"]
        parts = list(zip(*[iter(events)] * max(1, len(events) // 100), strict=False))
        x, y = ([statistics.mean(e[key] for e in part) * by for part in parts]
                for key, by in (("tokens", 1e-6), ("loss", 1)))
        panels[f"stage {stage}"] = "tokens, millions", unit, {"": (x, y)}
    draw_lines(path, title, panels, marker="")


def draw_layers(path, title, found):
    """found: {model: rows of layer_distances}"""
    draw_lines(path, title, {name: (
        "layer", "% of the teacher's answer",
        {model: (range(len(rows)), [math.nan if row[name] is None else 100 * row[name]
                                    for row in rows]) for model, rows in found.items()})
        for name in ("matrix", "block", "drift")})


def draw_speed(path, title, found):
    """found: {model: rows of pace}"""
    draw_lines(path, title, {name: (
        "tokens of context", unit,
        {model: ([row["context"] for row in rows], [row[key] / by for row in rows])
         for model, rows in found.items()})
        for name, key, unit, by in (("reading", "prefill", "tokens/s", 1),
                                    ("writing", "decode", "tokens/s", 1),
                                    ("memory", "peak", "peak MB, weights included", 1e6))},
        contexts=True)


def pictures(args, run, was, teacher, data, windows):
    """--picture PATH: the matrices. --pictures: all there is to draw, in the run's folder."""
    device = next(teacher.model.parameters()).device
    few = data.batch(0, 8, was.context)[:, :-1].to(device)
    students = {"as copied": copy_of_teacher(was, teacher, few).to(device)}
    for n in (1, 2, 3):
        if (stage := run / f"stage{n}").is_dir():
            students[f"after stage {n}"] = SSM.from_pretrained(stage).to(device)
    own, H = students["as copied"].ssm_layers, students["as copied"].config.n_head
    some = own[:: max(1, len(own) // 4)][:4]
    heads = args.heads or [(layer, n % H) for n, layer in enumerate(some)]
    for layer, head in heads:
        if layer not in own or head >= H:
            raise UsageError(f"--heads {layer}:{head}: there are layers {', '.join(map(str, own))} "
                             f"to draw, and heads 0 to {H - 1}")
    tokens = windows[:1, :args.picture_tokens].to(device)
    inputs = dict(teacher.inputs(tokens, only={layer for layer, _ in heads}))
    matrices_of = {name: [model.matrix(i, inputs[i])[0, h].detach().cpu() for i, h in heads]
                   for name, model in ({"teacher": teacher} | students).items()}
    text = f"{run}, {tokens.shape[1]} tokens of held-out text (row i asks, column j is asked)"
    draw_matrices(args.picture or run / "matrices.png", f"Who looks at whom: {text}",
                  matrices_of, heads)
    if args.pictures:
        theirs = matrices_of.pop("teacher")
        draw_matrices(run / "differences.png", f"Student - teacher: {text}",
                      {name: [x - y for x, y in zip(ours, theirs, strict=True)]
                       for name, ours in matrices_of.items()}, heads, signed=True)
        log = (run / "log.jsonl").read_text().splitlines()
        draw_losses(run / "loss.png", f"{run}: what each stage makes small",
                    [json.loads(line) for line in log])
        draw_layers(run / "layers.png", f"{run}: distance to the teacher (silence: 100%)",
                    {name: layer_distances(student, teacher, windows[:16, :-1].to(device))
                     for name, student in students.items()})
        if (run / "speed.json").is_file():
            found = json.loads((run / "speed.json").read_text())
            draw_speed(run / "speed.png", found.pop("title"), found)


# -----------------------------------------------------------------------------
# samples

def speak(teacher, student, tokenizer, prompt, args):
    """Both go on from `prompt`, side by side: in a terminal as it is written, else at the end"""
    ids = tokenizer.encode(prompt)
    tokens = torch.tensor([ids], device=next(teacher.model.parameters()).device, dtype=torch.long)
    print(f"\n{args.length} tokens from {prompt!r}, temperature {args.temperature}, "
          "the same seed:\n")
    live, (across, high) = sys.stdout.isatty(), shutil.get_terminal_size()
    written, width, erase = (ids[:], ids[:]), max(20, across // 2 - 2) if live else 52, ""

    def both():
        left, right = (tokenizer.decode(x) for x in written)
        return side_by_side(("teacher", left), ("student", right), width)

    streams = (m.stream(tokens, args.length, args.temperature, args.top_k, args.seed)
               for m in (teacher, student))
    for pair in zip(*streams, strict=True):
        for row, token in zip(written, pair, strict=True):
            row.append(token.item())
        if live:                            # the last lines, as many as the cursor can go back over
            lines = both().split("\n")[2 - high:]
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
    def lines(text):
        # what a terminal would obey, such as a carriage return, is shown as a dot
        plain = ("".join(c if c.isprintable() else "\u00b7" for c in line)
                 for line in text.expandtabs(4).split("\n"))
        return [line[i:i + width] for line in plain for i in range(0, max(1, len(line)), width)]

    columns = [[title, *lines(text)] for title, text in (left, right)]
    n = max(map(len, columns))
    rows = zip(*(column + [""] * (n - len(column)) for column in columns), strict=True)
    return "\n".join(f"{a:<{width}} | {b}".rstrip() for a, b in rows)


# -----------------------------------------------------------------------------

def main(arguments=None):
    args = parse(arguments)
    if args.speed:
        return speed(args)
    about, run, folder = open_run(args.run, args.stage)
    device = choose_device(args.device)[0]
    teacher = Teacher.load(args.teacher or about["teacher"], device)
    student = SSM.from_pretrained(folder).to(device).eval()
    print(f"student {folder} | {student.loaded}")
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UsageError(f"the student has {student.config.vocab_size:,} tokens, its teacher "
                         f"{teacher.name} {teacher.config.vocab_size:,}: they cannot be compared")
    was = argparse.Namespace(**{"stream": None} | about["arguments"])
    was.data = was.data if was.stream else about["data"]
    was.eval_tokens = args.eval_tokens or was.eval_tokens
    tokenizer, context = Tokenizer(was.teacher), args.context or was.context
    if args.prompt is not None:
        return speak(teacher, student, tokenizer, args.prompt, args)

    def held_out(length):
        return open_data(argparse.Namespace(**vars(was) | {"context": length}), tokenizer)

    data, windows, _ = held_out(context)
    if not args.pictures:
        for times in (4, 2, 1):             # as far beyond the training length as the text allows
            try:
                text = held_out(times * context)[1]
                break
            except UsageError:
                if times == 1:
                    raise
        tables(student, teacher, tokenizer, windows, text, context)
        speak(teacher, student, tokenizer, "def ", args)
    if args.picture or args.pictures:
        pictures(args, run, was, teacher, data, windows)


def layer_and_head(text):
    """
    >>> layer_and_head("3:0")
    (3, 0)
    """
    if not re.fullmatch(r"\d+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER:HEAD, such as 2:0")
    layer, head = text.split(":")
    return int(layer), int(head)


def at_least_one(text):
    if not (n := count(text)):
        raise argparse.ArgumentTypeError("give a whole number from 1 on")
    return n


def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="a run folder such as out/tiny, or one of its stage folders")
    add("--stage", type=int, choices=(1, 2, 3), help="which student of the run [the last]")
    add("--teacher", help="another name for the run's teacher, if it has moved")
    add("--context", type=at_least_one, help="tokens per window [as in training]")
    add("--eval_tokens", type=at_least_one, help="held-out tokens to read [as in training]")
    add("--prompt", help="no tables: both models go on from this [after the tables: 'def ']")
    add("--length", type=at_least_one, default=300, help="tokens to generate [%(default)s]")
    add("--temperature", type=float, default=0.7, help="0 is greedy [%(default)s]")
    add("--top_k", type=int, help="sample from so many likeliest tokens [all]")
    add("--seed", type=int, default=0, help="of the sampling [%(default)s]")
    add("--speed", action="store_true", help="no tables but this: tokens/s and memory by context")
    add("--random", metavar="NAME", help="with --speed: this architecture, random weights, no run")
    add("--contexts", type=at_least_one, nargs="+", default=[2**n for n in range(9, 17)],
        help="with --speed: tokens of context [512 ... 65,536]")
    add("--batch_sizes", type=at_least_one, nargs="+", default=[1],
        help="with --speed: each is tried, the best is shown [1]")
    add("--pictures", action="store_true", help="no tables: PNG files in the run's folder")
    add("--picture", help="write a PNG of mixing matrices there; with --speed, of its plot")
    add("--picture_tokens", type=at_least_one, default=64, help="their side [%(default)s]")
    add("--heads", type=layer_and_head, nargs="+", help="to draw: LAYER:HEAD [of four layers]")
    add("--device", default="auto", help="cuda, cpu or mps [auto]")
    args = parser.parse_args(arguments)
    if args.random and not args.speed:
        raise UsageError("--random measures --speed: nothing else can be asked of random weights")
    if bool(args.run) == bool(args.random):
        raise UsageError("give a run folder such as out/tiny, or --speed --random NAME, not both")
    if args.temperature < 0:
        raise UsageError(f"--temperature {args.temperature}: give 0, for greedy, or more")
    return args


if __name__ == "__main__":
    run_program(main)
