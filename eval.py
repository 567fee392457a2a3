"""How close is the student to its teacher, how good, and how fast? Tables, samples, pictures.

Run:  python eval.py out/tiny                          # the last stage of a run, in tables
      python eval.py out/tiny --stage 1                # an earlier one
      python eval.py out/tiny --prompt "class "        # both go on from here, side by side
      python eval.py out/phi --tasks paper             # its six benchmarks (needs lm-eval)
      python eval.py out/tiny --speed                  # tokens/s and memory as the context grows
      python eval.py --speed --random microsoft/phi-1_5 --contexts 512     # no weights needed
      python eval.py out/tiny --pictures               # PNG files in out/tiny (needs matplotlib)
      python eval.py out/phi --export phi-mamba        # a folder that transformers loads
      python eval.py goombalab/Phi-Mamba               # the published weights, or any model folder

Three distances for each layer, as shares of the teacher's own answer (silence would score 100%):

    matrix    given the teacher's input, || attention - M ||                what stage 1 makes small
    block     given the teacher's input, || its output - the student's ||   what stage 2 makes small
    drift     each model by itself from the tokens on, || teacher's u - student's u ||,
              errors of all layers before added up

A state of constant size must forget: what is lost shows as the context grows, so there are tables
by position, by the distance of a key told once, and by how long both write the same text.

[1] Mamba-2, arXiv 2405.21060    [2] MOHAWK, arXiv 2408.10189
"""
import argparse
import contextlib
import ctypes
import difflib
import gc
import importlib.util
import inspect
import itertools
import json
import logging
import math
import os
import re
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

import distill
from distill import blocks, choose_device, copy_of_teacher, matrices, open_data
from model_ssm import SSM, UsageError, ask_hub, captured, first_line, read_config, sources
from model_teacher import (
    Teacher,
    Tokenizer,
    architecture,
    byte_tokenizer,
    compare,
    pass_keys,
    retrieval,
)
from prepare import Parser, at_least_one, count, run_program, source_of_text


def open_run(path, stage=None):
    """A run folder or one of its stage folders -> (run.json as a dict, run folder, stage folder)

    A model folder of no run, or a hub id, is taken for what the paper's recipe gives.
    """
    path = Path(path)
    run = path if (path / "run.json").is_file() else path.parent
    if not (run / "run.json").is_file():
        hub_id = len(path.parts) == 2 and not path.parent.exists()
        if hub_id or (path / "config.json").is_file():
            as_if = vars(distill.parse(["--preset", "phi", "--data", "stdlib"]))
            return {"arguments": as_if, "teacher": as_if["teacher"], "data": "stdlib"}, path, path
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
    return json.loads((run / "run.json").read_text("utf-8")), run, chosen


@torch.no_grad()
def layer_distances(student, teacher, tokens):
    """tokens (B, L) -> one dict per layer: matrix, block and drift, as shares.

    matrix and block are None where the layer keeps attention.
    """
    rows = [{"matrix": None, "block": None} for _ in student.layers]
    for name, losses in (("matrix", matrices), ("block", blocks)):
        for i, (_, left) in zip(student.ssm_layers, losses(student, teacher, tokens), strict=True):
            rows[i][name] = left.item()
    theirs = teacher.outputs(tokens)
    for row, ours, t in zip(rows, student.outputs(tokens), sources(len(rows), len(theirs)),
                            strict=True):
        gap = (ours - theirs[t]).norm(dim=-1).mean()
        row["drift"] = (gap / theirs[t].norm(dim=-1).mean()).item()
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


def agreement(student, teacher, prompts, n):
    """Both write n tokens by themselves, always the likeliest. prompts (B, L)

    -> (B) how many tokens until they differ, (B) share of all places where they are equal
    """
    ours, theirs = (m.generate(prompts, n)[:, -n:] for m in (student, teacher))
    equal = (ours == theirs).double().cpu()
    return equal.cumprod(1).sum(1), equal.mean(1)


def show(names, *rows):
    """A table in Markdown: cells of text, each column as wide as its widest.

    >>> show(["task", "acc"], ["piqa", "76.6"])
    <BLANKLINE>
    | task |  acc |
    |------|------|
    | piqa | 76.6 |
    """
    widths = [max(map(len, column)) for column in zip(names, *rows, strict=True)]
    lines = ["| " + " | ".join([f"{row[0]:<{widths[0]}}", *map(str.rjust, row[1:], widths[1:])])
             + " |" for row in (names, *rows)]
    rule = "|".join("-" * (n + 2) for n in widths)
    print("\n".join(["", lines[0], f"|{rule}|", *lines[1:]]))


def tables(student, teacher, tokenizer, windows, text, context):
    """windows (n, context + 1)   text (m, several contexts + 1), both held-out tokens"""
    both, device = {"teacher": teacher, "student": student}, next(student.parameters()).device
    print(f"\non {windows[:, 1:].numel():,} held-out tokens in windows of {context}, in fp32:")
    rows = {name: compare(model, teacher, windows) for name, model in both.items()}
    show(["model", "val loss", "ppl", "KL", "top-1"], *(
        [name, f"{x['loss']:.4f}", f"{math.exp(x['loss']):.2f}", f"{x['kl']:.4f}",
         f"{x['top1']:.1%}"] for name, x in rows.items()))

    rows = layer_distances(student, teacher, windows[:16, :-1].to(device))
    show(["layer", "matrix", "block", "drift"], *(
        [str(i), *("kept" if x is None else f"{x:.1%}" for x in row.values())]
        for i, row in enumerate(rows)))

    stride = max(1, context // 2)
    pieces, counted = sliding(text, context, stride)
    losses = by_position(student, teacher, pieces)[:2, counted].double().sum(1).tolist()
    n, n_bytes = int(counted.sum()), tokenizer.bytes_in(pieces[:, 1:][counted].tolist())
    print(f"\nperplexity, a window of {context} sliding by {stride}: {n:,} tokens, "
          f"{n_bytes:,} bytes of text:")
    show(["model", "of a token", "of a byte", "bits/byte"], *(
        [name, *(f"{x:.3f}" for x in (math.exp(nats / n), math.exp(nats / n_bytes),
                                      nats / n_bytes / math.log(2)))]
        for name, nats in zip(both, losses, strict=True)))

    print(f"\nby the tokens of context there are, in nats (training had up to {context}):")
    scores, longest = by_position(student, teacher, text).double(), text.shape[1] - 1
    parts = {max(1, context // n) for n in (8, 4, 2, 1)}
    edges = sorted({0, *parts, *range(2 * context, longest + 1, 2 * context)})
    show(["context", "teacher loss", "student loss", "KL", "top-1"], *(
        [f"{i + 1:,}-{j:,}", *(f"{x:.4f}" for x in scores[:3, :, i:j].mean((1, 2))),
         f"{scores[3, :, i:j].mean():.1%}"] for i, j in itertools.pairwise(edges)))

    print("\na key of five digits, told once and asked for after filler; of its tokens, the share "
          "that is\nthe first choice, and their mean probability (16 keys):")
    show(["tokens ago", "teacher", "probability", "student", "probability"], *(
        [f"{distance:,}", *(f"{x:.1%}" for model in both.values() for x in retrieval(
            model, pass_keys(tokenizer, distance, 16), device))]
        for distance in sorted(parts | {2 * context, 4 * context})))

    n, prompts = 64, text[:16].to(device)
    print(f"\nafter each of {len(prompts)} prompts {n} tokens by each model alone, always the "
          "likeliest; how many\nuntil they differ, and the share of places where they are equal:")
    rows = {length: agreement(student, teacher, prompts[:, :length], n)
            for length in sorted({max(1, context // n) for n in (8, 2, 1)})}
    show(["prompt", "mean", "median", "equal"], *(
        [f"{length:,}", f"{until.mean():.1f}", f"{until.median():.0f}", f"{equal.mean():.1%}"]
        for length, (until, equal) in rows.items()))


# -----------------------------------------------------------------------------
# --tasks: benchmarks, by lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness)

PAPER = {"winogrande": "acc", "arc_easy": "acc", "arc_challenge": "acc_norm", "piqa": "acc",
         "hellaswag": "acc_norm", "lambada_openai": "acc"}
PUBLISHED = {"Phi-1.5 [2]": (73.4, 75.6, 48.0, 76.6, 62.6, 53.4),           # in %, zero-shot
             "Phi-Mamba [2]": (71.7, 74.0, 44.1, 75.5, 60.2, 50.1)}
TOKENS_AT_ONCE = 2**14      # in a batch, padding included


class Asked:
    """Teacher, student or hybrid, as the harness asks them. Mixed with its TemplateLM in scores().

    No beginning-of-text token: the distillation had none. A text with nothing before it follows an
    end of text, as documents in the shards do.
    """

    def __init__(self, model, tokenizer, context, device):
        super().__init__()
        self.model, self.encoding, self.context, self.to = model, tokenizer, context, device

    @property
    def eot_token_id(self):
        return self.encoding.eot

    def tok_encode(self, string, add_special_tokens=None, **_):
        return self.encoding.encode(string)

    @torch.no_grad()
    def _loglikelihood_tokens(self, requests, **_):
        """[(its text, context ids, answer ids), ...] -> [(log p(answer), is it greedy), ...]"""
        texts, scored = [], [None] * len(requests)
        for _, before, answer in requests:
            if len(answer) > self.context:
                raise UsageError(f"an answer of {len(answer)} tokens does not fit into windows of "
                                 f"{self.context}: give a longer --context")
            texts.append((before + answer)[-self.context - 1:])
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))     # alike ones together
        with tqdm(total=len(order), desc="answers", mininterval=0.5) as bar:
            while order:
                B = max(1, TOKENS_AT_ONCE // len(texts[order[0]]))
                batch, order = order[:B], order[B:]
                # On the right: there padding changes nothing, neither model looks ahead.
                tokens = pad_sequence([torch.tensor(texts[n][:-1], dtype=torch.long)
                                       for n in batch], batch_first=True).to(self.to)   # (B, L)
                for n, h in zip(batch, self.model.hidden(tokens), strict=True):         # (L, D)
                    answer = torch.tensor(requests[n][2], dtype=torch.long, device=self.to)
                    end = len(texts[n]) - 1
                    logits = self.model.head(h[end - len(answer):end])                  # (n, V)
                    log_p = logits.float().log_softmax(-1)
                    scored[n] = (log_p.gather(-1, answer[:, None]).sum().item(),
                                 (log_p.argmax(-1) == answer).all().item())
                bar.update(len(batch))
        return scored

    def loglikelihood_rolling(self, requests, **_):
        """log p of whole texts, in windows: each token is predicted once"""
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
        windows = [[(None, *make_disjoint_window(pair)) for pair in get_rolling_token_windows(
            self.tok_encode(request.args[0]), self.eot_token_id, self.context, 1)]
            for request in requests]
        scored = iter(self._loglikelihood_tokens([pair for text in windows for pair in text]))
        return [sum(next(scored)[0] for _ in text) for text in windows]

    def generate_until(self, requests, **_):
        """What follows greedily, up to a stop string, an end token, or max_gen_toks"""
        from lm_eval.models.utils import normalize_gen_kwargs
        told = []
        for request in tqdm(requests, desc="texts", mininterval=0.5):
            how = normalize_gen_kwargs(request.args[1])
            n, until = how["max_gen_toks"], how.get("until") or []
            stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
            if how["do_sample"]:
                raise UsageError(f"{request.task_name} samples its texts, and here all is greedy")
            if n >= self.context:
                raise UsageError(f"{request.task_name} asks for {n} tokens: "
                                 f"give a --context longer than {n}")
            prompt = self.tok_encode(request.args[0])[n - self.context:] or [self.eot_token_id]
            told.append(self.continued(prompt, n, stops))
        return told

    def continued(self, prompt, n, stops):
        said = []
        for token in self.model.stream(torch.tensor([prompt], device=self.to), n):
            if token.item() in self.encoding.stop_ids:
                break
            said.append(token.item())
            if any(stop in self.encoding.decode(said) for stop in stops):
                break
        text = self.encoding.decode(said)
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)


def scores(models, tokenizer, context, device, names, include_path=None, limit=None):
    """models: {name: Teacher or SSM} -> {name: {(task, metric): score}}, {task: its examples}"""
    if not importlib.util.find_spec("lm_eval"):
        raise UsageError("--tasks needs lm-eval: pip install lm-eval")
    from lm_eval import simple_evaluate
    from lm_eval.api.model import TemplateLM
    names = [task for name in names for task in (PAPER if name == "paper" else [name])]
    manager = task_files(names, include_path)

    def ask(model):
        return simple_evaluate(model, tasks=names, task_manager=manager, limit=limit,
                               bootstrap_iters=0, log_samples=False)

    ask_hub()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)        # a line for every default it takes
    try:
        ask("dummy")        # the harness's own, it says anything: so that a mistake in a task file
                            # shows before hours are spent
    except Exception as error:                      # whatever a template or a metric may raise
        raise UsageError(f"--tasks {' '.join(names)}: {type(error).__name__}: "
                         f"{first_line(error)}") from error
    harness_model, found = type("HarnessModel", (Asked, TemplateLM), {}), {}
    for name, model in models.items():
        results = ask(harness_model(model, tokenizer, context, device))
        # keys are "acc,none", where none is the filter that answers went through
        found[name] = {(task, key.removesuffix(",none")): value
                       for task, row in results["results"].items() for key, value in row.items()
                       if "," in key and "_stderr" not in key and isinstance(value, float | int)}
    return found, {task: row["effective"] for task, row in results["n-samples"].items()}


def task_files(names, include_path):
    """-> the harness's TaskManager, which knows all these names"""
    import yaml
    from lm_eval.tasks import TaskManager
    manager = None
    if include_path:
        if not Path(include_path).is_dir():
            raise UsageError(f"--include_path {include_path}: no such folder")
        for file in sorted(Path(include_path).rglob("*.yaml")):
            try:                    # the harness passes over what it cannot read, without a word
                yaml.compose(file.read_text("utf-8"))
            except yaml.YAMLError as error:
                raise UsageError(f"{file}: {' '.join(str(error).split())[:200]}") from error
        manager = TaskManager(include_path=include_path, include_defaults=False)
    if not manager or set(names) - set(manager.all_tasks):
        manager = TaskManager(include_path=include_path)        # thousands of files: seconds
    for name in set(names) - set(manager.all_tasks):
        near = difflib.get_close_matches(name, manager.all_tasks, 3)
        raise UsageError(f"--tasks: lm-eval knows no {name}"
                         + (f"; it knows {', '.join(near)}" if near else ""))
    return manager


def show_scores(names, found, examples):
    """What both models scored; for paper beside what the paper's scored"""
    left = list(found["student"])
    if "paper" in names:
        left = [key for key in left if key not in PAPER.items()]
        ours, rows = {name: [100 * found[name][key] for key in PAPER.items()] for name in found}, []
        for pair in (ours, PUBLISHED):
            values = [[*row, sum(row) / len(row)] for row in pair.values()]
            rows += [[name, *(f"{x:.1f}" for x in row)]
                     for name, row in zip(pair, values, strict=True)]
            shares = [y / x if x else math.nan for x, y in zip(*values, strict=True)]
            rows.append(["recovered", *(f"{share:.1%}" for share in shares)])
        show(["zero-shot, %", *PAPER, "mean"], ["", *PAPER.values(), ""],
             ["examples", *(f"{examples[task]:,}" for task in PAPER), ""], *rows)
    if left:
        show(["task", "metric", "teacher", "student", "examples"], *(
            [*key, *(f"{found[name][key]:.5g}" for name in ("teacher", "student")),
             f"{examples[key[0]]:,}" if key[0] in examples else ""] for key in left))


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
            Path("/proc/self/clear_refs").write_bytes(b"5")
        status = Path("/proc/self/status").read_bytes()
        return 1024 * int(re.search(rb"VmHWM:\s+(\d+)", status)[1])
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
    """The table; with a run, also its speed.json, and speed.png where matplotlib is."""
    device = choose_device(args.device)[0]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if args.random:
        folder, name = None, f"{args.random}, random weights"
        teacher = Teacher.random(architecture(args.random), device, dtype)
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
    print(f"\n{title}:")
    show(["context", "model", "batch", "prefill tok/s", "decode tok/s", "ms/step", "state MB",
          "peak MB"], *(
        [f"{context:,}", name, str(x["batch"]), f"{x['prefill']:,.0f}", f"{x['decode']:,.0f}",
         f"{x['ms']:.2f}", f"{x['state'] / 1e6:,.2f}", f"{x['peak'] / 1e6:,.0f}"]
        for context in sorted(args.contexts) for name, rows in found.items()
        for x in rows if x["context"] == context))
    if folder:
        (folder / "speed.json").write_text(json.dumps({"title": title} | found) + "\n", "utf-8")
        if importlib.util.find_spec("matplotlib"):
            draw_speed(folder)


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
    """panels: {title: (x label, y label, {name: (x, y)})}; contexts, and what spans more than a
    factor of 10, on a log scale"""
    with figure(path, title, 1, len(panels), 9, 3.2) as (plt, sheet, axes):
        ticker = plt.matplotlib.ticker
        for axis, (name, (x_label, y_label, lines)) in zip(axes[0], panels.items(), strict=True):
            for label, (x, y) in lines.items():
                axis.plot(x, y, marker=marker, markersize=3, linewidth=1.2, label=label)
            axis.set(title=name, xlabel=x_label, ylabel=y_label)
            values = [value for _, y in lines.values() for value in y if value > 0]
            if values and max(values) > 10 * min(values):
                axis.set_yscale("log")
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
    log, panels = list(log), {}
    for stage, unit in ((1, "Frobenius distance"), (2, "distance"), (3, "KL, nats a token")):
        events = [event for event in log if event["stage"] == f"stage {stage}"]
        n = max(1, len(events) // 100)
        parts = [events[i:i + n] for i in range(0, len(events) - n + 1, n)]
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


def draw_speed(folder):
    """speed.json, of {model: rows of pace} and a title -> speed.png"""
    found = json.loads((folder / "speed.json").read_text("utf-8"))
    title = found.pop("title")
    draw_lines(folder / "speed.png", title, {name: (
        "tokens of context", unit,
        {model: ([row["context"] for row in rows], [row[key] / by for row in rows])
         for model, rows in found.items()})
        for name, key, unit, by in (("reading", "prefill", "tokens/s", 1),
                                    ("writing", "decode", "tokens/s", 1),
                                    ("memory", "peak", "peak MB, weights included", 1e6))},
        contexts=True)


def pictures(args, run, was, teacher, data, windows):
    """All there is to draw, as PNG files in the run's folder"""
    if not (run / "log.jsonl").is_file():
        raise UsageError(f"--pictures are of a run of distill.py, and {run} is only a model")
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
    found = {name: [model.matrix(i, inputs[i])[0, h].detach().cpu() for i, h in heads]
             for name, model in ({"teacher": teacher} | students).items()}
    text = f"{run}, {tokens.shape[1]} tokens of held-out text (row i asks, column j is asked)"
    draw_matrices(run / "matrices.png", f"Who looks at whom: {text}", found, heads)
    theirs = found.pop("teacher")
    draw_matrices(run / "differences.png", f"Student - teacher: {text}",
                  {name: [x - y for x, y in zip(ours, theirs, strict=True)]
                   for name, ours in found.items()}, heads, signed=True)
    log = (run / "log.jsonl").read_text("utf-8").splitlines()
    draw_losses(run / "loss.png", f"{run}: what each stage makes small", map(json.loads, log))
    draw_layers(run / "layers.png", f"{run}: distance to the teacher (silence: 100%)",
                {name: layer_distances(student, teacher, windows[:16, :-1].to(device))
                 for name, student in students.items()})
    if (run / "speed.json").is_file():
        draw_speed(run)


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
# --export: a folder for transformers. The three classes are all there is to say, and inspect copies
# them into it from here.

class MohawkConfig(PretrainedConfig):
    """config.json as SSM.from_pretrained reads it, and what transformers asks for besides"""
    model_type = "mohawk"
    use_cache: bool = True


class MohawkState:
    """What was read so far, in the place of transformers' Cache.

    layers: the state as SSM has it   length: how many tokens were read, padding included
    last (B, 1, D): the final hidden of each row's last token
    """
    is_compileable = is_croppable = False               # generate asks these questions of a cache
    is_linear = (False,)                                # which here means: it knows its length

    def __init__(self, layers, length=0, last=0.0):
        self.layers, self.length, self.last = layers, length, last

    def get_seq_length(self, layer_idx=0):
        return self.length

    def reorder_cache(self, rows):
        """Row i goes on from row rows[i]: beam search asks for that."""
        def chosen(x):
            shared = len(x) != len(self.last)           # positions may be one row for all
            return x if shared else x[rows.to(x.device)]

        self.layers = [tuple(map(chosen, layer)) for layer in self.layers]
        self.last = chosen(self.last)

    def batch_repeat_interleave(self, n):
        """Each row n times: several texts go on from one."""
        self.reorder_cache(torch.arange(len(self.last)).repeat_interleave(n))


class MohawkForCausalLM(PreTrainedModel, GenerationMixin):
    """The student as transformers wants a language model. Its parameters keep their names."""
    config_class = MohawkConfig
    supports_gradient_checkpointing = True
    _is_stateful = True                 # nothing read can be taken back: no assisted generation
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}    # where config.json says
    _loss_options = ("num_items_in_batch", "shift_labels", "ignore_index")

    def __init__(self, config):
        super().__init__(config)
        ssm = SSM(read_config(config.to_dict()))
        self.backbone, self.lm_head = ssm.backbone, ssm.lm_head
        self.__dict__["ssm"] = ssm      # not a submodule: its parameters are the two above
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, labels=None,
                use_cache=None, logits_to_keep=0, cache=None, **others):
        """input_ids (B, L) -> the loss, if there are labels (B, L); logits (B, L, V), or the last
        logits_to_keep of them; the next state

        attention_mask (B, tokens read before + L): 0 where a row is padding, wherever that is. Each
            row comes out as it would alone; at padding stand the logits of the token before it.
        past_key_values, which newer versions call cache: the state an earlier call returned. It
            stays as it is.
        """
        self.refuse(input_ids, others)
        state = self.state_before(input_ids, past_key_values, cache, use_cache)
        real = self.real_tokens(input_ids, attention_mask, others.get("position_ids"), state.length)
        self.ssm.recompute = self.gradient_checkpointing and self.training
        h, layers = self.ssm.prefill(input_ids, state.layers, real)                 # (B, L, D)
        if real is not None:                    # before a row's first token: what was read last
            h = h.where(real.cumsum(1)[..., None].to(h.device) > 0, state.last)
        if state.layers is not None:
            state = MohawkState(layers, state.length + h.shape[1], h[:, -1:].clone())
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(h[:, kept])                                           # (B, ., V)
        loss = None
        if labels is not None:
            if real is not None:                # nothing stands before a row's first token
                labels = labels.masked_fill(real.cumsum(1) < 2, -100)
            options = {name: others[name] for name in self._loss_options if name in others}
            loss = self.loss_function(logits, labels, logits.shape[-1], **options)
        # the third is past_key_values in one version and cache in another
        return CausalLMOutputWithPast(loss, logits, None if state.layers is None else state)

    def refuse(self, input_ids, others):
        """What would change the answer, and cannot be done here, is no silent None."""
        refused = [name for name, value in others.items() if value is not None
                   and value is not False and name not in ("position_ids", *self._loss_options)]
        if refused or input_ids is None:
            raise TypeError(f"this model takes input_ids, and not {', '.join(refused) or 'None'}")
        places = set(map(str, getattr(self, "hf_device_map", {}).values()))
        if len(places) > 1 and places & {"cpu", "disk"}:
            raise ValueError("device_map left layers on the CPU or on disk: this model computes "
                             "where its weights are, on one device or on several GPUs")

    def state_before(self, input_ids, past_key_values, cache, use_cache):
        """The state to go on from, by whichever name it came. layers is None where none is kept."""
        if past_key_values is not None and cache is not None:
            raise TypeError("past_key_values and cache are two names of one thing: give one")
        state = past_key_values if cache is None else cache
        B = len(input_ids)
        if state is None:
            if use_cache is None:
                use_cache = self.config.use_cache and not self.training
            return MohawkState(self.ssm.initial_state(B) if use_cache else None)
        if not isinstance(state, MohawkState):
            raise TypeError(f"a {type(state).__name__} is no state of this model: give none at "
                            "first, then the one that forward or generate returned")
        if len(state.last) != B:
            raise ValueError(f"the state is of {len(state.last)} texts and input_ids of {B}: "
                             "its batch_repeat_interleave(n) makes n of each")
        return state

    def real_tokens(self, input_ids, attention_mask, position_ids, length):
        """-> (B, L), False where a row is padding; None if nothing is

        length: tokens read before   position_ids: must be what they are by themselves, one after
        the other
        """
        B, L = input_ids.shape
        real = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != (B, length + L):
                raise ValueError(f"attention_mask {tuple(attention_mask.shape)} should be ({B}, "
                                 f"{length + L}): {length} tokens read before and {L} new ones")
            real = attention_mask[:, length:].bool()
        if position_ids is not None:
            offset = position_ids - real.cumsum(1)                                  # (B, L)
            first = offset.gather(1, real.int().argmax(1, keepdim=True))
            if ((offset != first) & real).any():
                raise ValueError("position_ids do not count up by one: texts packed into one row "
                                 "would be read as one text")
        return None if real.all() else real

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        """next_sequence_length: how many tokens of input_ids are new to the state; None: all"""
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError("the state has read all of input_ids: give the whole text, with the "
                             "new tokens at its end")
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False                    # forward begins with a state of its own

    # what resize_token_embeddings and others reach for -------------------------

    def get_input_embeddings(self):
        return self.backbone["embedding"]

    def set_input_embeddings(self, embedding):
        self.backbone["embedding"] = embedding

    def set_output_embeddings(self, head):
        self.lm_head = self.ssm.lm_head = head

    def resize_token_embeddings(self, *args, **kwargs):
        embedding = super().resize_token_embeddings(*args, **kwargs)
        n = len(embedding.weight)
        self.ssm.config.vocab_size = n
        self.config.LanguageModel["input"]["vocab_size"] = n
        return embedding

    def _init_weights(self, module):
        """SSM has a start of its own, for all but the rows that resize_token_embeddings adds."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


MODELING = '''"""An exported student, for transformers: AutoModelForCausalLM.from_pretrained(
FOLDER, trust_remote_code=True). model_ssm.py and ssd_kernel.py beside it compute."""
import torch
from torch import nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from .model_ssm import SSM, read_config
'''
CARD = '''---
library_name: transformers
pipeline_tag: text-generation
base_model: {teacher}
tags: [mohawk, {mixer}]
---
A language model of {layers} layers, {mixer} where attention was, distilled from {teacher} with
MOHAWK (https://arxiv.org/abs/2408.10189). Layers that keep attention: {attention}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

Where there is no attention the state that takes the place of the KV cache does not grow. Prompts of
one batch may have any lengths: with its attention_mask each row goes on as it would alone, padded
on either side. A conversation goes on from the state that `generate(...,
return_dict_in_generate=True)` or `forward` returned, which a later call leaves as it is.
It trains with Trainer. Refused: inputs_embeds, position_ids of packed texts, output_hidden_states,
output_attentions, caches of transformers' own, assisted generation, and layers that device_map
leaves on the CPU or on disk.

{table}
Data: {data}. Commit of the code: {commit}.
'''


def export(student, folder, teacher, about, run):
    """Write student, code, the teacher's tokenizer and a model card; whole or not at all.

    about: its run.json   run: where report.md is, if it has one
    """
    folder, here = Path(folder).expanduser().resolve(), Path(__file__).parent
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"--export {folder}: it is there already, and not empty")
    tokenizer = Tokenizer(teacher)
    tokenizer.check_rows(student.config.vocab_size)
    config, partial = student.config, folder.with_name(f".{folder.name}.{os.getpid()}.exported")
    made = {"teacher": teacher, "data": about["data"], "commit": about.get("commit") or "unknown"}
    student.save_pretrained(partial, **made)
    for_transformers = tokenizer.hf or byte_tokenizer(tokenizer.eot)
    for_transformers.save_pretrained(partial)
    stops = [i for i in tokenizer.stop_ids if i < config.vocab_size]
    GenerationConfig(bos_token_id=for_transformers.bos_token_id, eos_token_id=stops,
                     pad_token_id=tokenizer.eot).save_pretrained(partial)

    said = json.loads((partial / "config.json").read_text("utf-8"))
    said |= {"model_type": MohawkConfig.model_type, "architectures": [MohawkForCausalLM.__name__],
             "auto_map": {"AutoConfig": "modeling_mohawk.MohawkConfig",
                          "AutoModelForCausalLM": "modeling_mohawk.MohawkForCausalLM"},
             "vocab_size": config.vocab_size, "hidden_size": config.d_model,
             "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
             "tie_word_embeddings": config.tie_embeddings, "dtype": "float32"}
    (partial / "config.json").write_text(json.dumps(said, indent=1) + "\n", "utf-8")

    # In transformers' cache the files are a package, so that one finds the other by a dot. It wants
    # every import to be installed: ssd_kernel's benchmark, which has others, stays here.
    kernel, model = ((here / name).read_text("utf-8") for name in ("ssd_kernel.py", "model_ssm.py"))
    kernel = kernel.split(f"\n# {'-' * 77}\n# the benchmark")[0]
    model = model.replace("\nfrom ssd_kernel ", "\nfrom .ssd_kernel ")
    classes = map(inspect.getsource, (MohawkConfig, MohawkState, MohawkForCausalLM))
    (partial / "ssd_kernel.py").write_text(kernel, "utf-8")
    (partial / "model_ssm.py").write_text(model, "utf-8")
    (partial / "modeling_mohawk.py").write_text("\n\n".join([MODELING, *classes]), "utf-8")
    shutil.copy(here / "LICENSE", partial)

    kept, report = ", ".join(map(str, config.attn_layers)), run / "report.md"
    (partial / "README.md").write_text(CARD.format(
        folder=folder.name, mixer=config.mixer, layers=config.n_layer, attention=kept or "none",
        **made,
        table=report.read_text("utf-8") if report.exists() else
        "No table: its run is not at hand.\n"), "utf-8")
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    print(f"saved {folder} | {', '.join(sorted(p.name for p in folder.iterdir()))}")


# -----------------------------------------------------------------------------
# the command line

def main(arguments=None):
    args = parse(arguments)
    if args.speed:
        return speed(args)
    about, run, folder = open_run(args.run, args.stage)
    device = choose_device(args.device)[0]
    student = SSM.from_pretrained(folder).to(device).eval()
    print(f"student {folder} | {student.loaded}")
    if args.export:
        return export(student, args.export, args.teacher or about["teacher"], about, run)
    teacher = Teacher.load(args.teacher or about["teacher"], device).at(student.config.n_layer)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UsageError(f"the student has {student.config.vocab_size:,} tokens, its teacher "
                         f"{teacher.name} {teacher.config.vocab_size:,}: they cannot be compared")
    was = argparse.Namespace(**{"stream": None, "mixer": "mamba2"} | about["arguments"])
    was.teacher = args.teacher or was.teacher
    tokenizer, context = Tokenizer(was.teacher), args.context or was.context
    tokenizer.check_rows(teacher.config.vocab_size)
    if args.tasks:
        found = scores({"teacher": teacher, "student": student}, tokenizer, context, device,
                       args.tasks, args.include_path, args.limit)
        return show_scores(args.tasks, *found)
    if args.prompt is not None:
        return speak(teacher, student, tokenizer, args.prompt, args)

    was.data = was.data if was.stream else about["data"]
    if args.data:
        was.data, was.config = args.data, args.config
        was.stream = args.data != "stdlib" and not Path(args.data).expanduser().exists()
    was.eval_tokens = args.eval_tokens or was.eval_tokens

    def held_out(length):
        return open_data(argparse.Namespace(**vars(was) | {"context": length}), tokenizer)

    data, windows, _ = held_out(context)
    if args.pictures:
        return pictures(args, run, was, teacher, data, windows)
    for times in (4, 2, 1):                 # as far beyond the training length as the text allows
        try:
            text = held_out(times * context)[1]
            break
        except UsageError:
            if times == 1:
                raise
    tables(student, teacher, tokenizer, windows, text, context)
    speak(teacher, student, tokenizer, "def ", args)


def layer_and_head(text):
    """
    >>> layer_and_head("3:0")
    (3, 0)
    """
    if not re.fullmatch(r"\d+:\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER:HEAD, such as 2:0")
    layer, head = text.split(":")
    return int(layer), int(head)


def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", nargs="?", help="a run folder such as out/tiny, one of its stage folders, another "
        "model folder, or a hub id")
    add("--stage", type=int, choices=(1, 2, 3), help="which student of the run [the last]")
    add("--teacher", help="another name for the run's teacher, if it has moved")
    add("--context", type=at_least_one, help="tokens per window [as in training]")
    add("--eval_tokens", type=at_least_one, help="held-out tokens to read [as in training]")
    add("--data", type=source_of_text, help="another text to read: as for distill.py, a hub data "
        "set as a stream [the run's; without a run stdlib]")
    add("--config", help="which part of a Hugging Face data set")
    # instead of the tables
    add("--prompt", help="both models go on from this [after the tables: 'def ']")
    add("--length", type=at_least_one, default=300,
        help="tokens to generate, beyond an end of text too [%(default)s]")
    add("--temperature", type=float, default=0.7, help="0 is greedy [%(default)s]")
    add("--top_k", type=at_least_one, help="sample from so many likeliest tokens [all]")
    add("--seed", type=count, default=0, help="of the sampling [%(default)s]")
    add("--tasks", nargs="+", metavar="TASK", help="ask both these questions: names that lm-eval "
        "knows, or paper for the paper's six")
    add("--include_path", help="a folder with task files of your own")
    add("--limit", type=at_least_one, help="only so many examples of each task [all]")
    add("--speed", action="store_true", help="tokens/s and memory by context")
    add("--random", metavar="NAME", help="with --speed: this architecture, random weights, no run")
    add("--contexts", type=at_least_one, nargs="+", default=[2**n for n in range(9, 17)],
        help="with --speed: tokens of context [512 ... 65,536]")
    add("--batch_sizes", type=at_least_one, nargs="+", default=[1],
        help="with --speed: each is tried, the best is shown [1]")
    add("--pictures", action="store_true", help="PNG files in the run's folder")
    add("--picture_tokens", type=at_least_one, default=64, help="side of a matrix [%(default)s]")
    add("--heads", type=layer_and_head, nargs="+", help="to draw: LAYER:HEAD [of four layers]")
    add("--export", metavar="FOLDER", help="write a folder that transformers loads")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"),
        help="to compute on [auto]")
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
