"""How close is the student to its teacher, how good is it, and how fast? Tables and samples.

Run:  python eval.py out/tiny                          # tables for the last stage of a run
      python eval.py out/tiny --stage 1                # for an earlier stage
      python eval.py out/tiny --prompt "class "        # both models continue this, side by side
      python eval.py out/tiny --tasks local            # what the student can do, beside its teacher
      python eval.py out/tiny --speed                  # tokens/s and memory as the context grows
      python eval.py --speed --random microsoft/phi-1_5 --contexts 512     # no weights needed
      python eval.py goombalab/Phi-Mamba               # the published weights, or any model folder

Three distances for each layer, as mean || error || / mean || reference ||: Frobenius norms of each
head's matrix, L2 norms at each position. 0% is the teacher itself:

    matrix    || attention matrix - the student's mixing matrix || / || attention matrix ||, given
              the teacher's input u: what stage 1 minimises
    block     || teacher's block(u) - student's block(u) || / || teacher's block(u) - u ||: what
              stage 2 minimises. A block that returns its input is at 100%
    drift     || teacher's output - student's output || / || teacher's output ||, after each model
              has read the tokens by itself: the errors of this layer and of all before it add up

A state of constant size must forget. What is lost shows as the context grows, so there are tables
by position, by the distance from which a pass key (a number in the text) must be found again, and
by how long both models write the same text.

Benchmarks of lm-evaluation-harness are in extras/benchmarks.py, pictures in extras/pictures.py, and
extras/export.py writes a folder that transformers loads.
"""
import argparse
import contextlib
import ctypes
import gc
import itertools
import math
import random
import re
import shutil
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from model_ssm import (SSM, UsageError, capture_graph, damage_in_one_line, progress_bar, read_json,
                       write_json)
from model_teacher import Teacher, hf_config
from prepare import (Parser, Tokenizer, at_least_one, count, nonempty, not_negative, open_data,
                     run_program, source_of_text, temperature)
from ssd_kernel import distillation_loss

FILLER = "The grass is green. The sky is blue. The sun is yellow. There and back again. "
LOGITS_AT_ONCE = 2**23      # elements of a (tokens, V) tensor: 32 MB in fp32, or one window's
CONTEXTS = [2**n for n in range(9, 17)]     # 512 ... 65,536 tokens


# -----------------------------------------------------------------------------
# How close: predictions, and layer by layer. Windows (n, L + 1) are validation text: the first L go
# in, the last L are the tokens to predict.

@torch.no_grad()
def compare(model, teacher, windows):
    """How close `model` is to `teacher`, as means over the tokens of windows (n, L + 1)

    -> {"loss": -log p(next token), in nats
        "kl":   KL(teacher || model), in nats
        "top1": the share of positions where both find the same token likeliest}
    """
    device = next(teacher.model.parameters()).device
    L = windows.shape[1] - 1
    B = max(1, LOGITS_AT_ONCE // (L * teacher.config.vocab_size))
    total = torch.zeros(3, dtype=torch.float64)                         # loss, KL, top-1
    for tokens in progress_bar(windows.split(B), "evaluate"):
        tokens = tokens.to(device)                                      # (B, L + 1)
        target = tokens[:, 1:].flatten()                                # (B L)
        logp = log_probabilities(model, tokens[:, :-1])                 # (B L, V)
        teacher_logp = logp
        if model is not teacher:
            teacher_logp = log_probabilities(teacher, tokens[:, :-1])   # (B L, V)
        total += torch.stack([F.nll_loss(logp, target, reduction="sum"),
                              F.kl_div(logp, teacher_logp, reduction="sum", log_target=True),
                              (logp.argmax(-1) == teacher_logp.argmax(-1)).sum()]).double().cpu()
    loss, kl, top1 = (total / windows[:, 1:].numel()).tolist()
    if not math.isfinite(loss + kl):
        raise UsageError(f"validation loss {loss}, KL to the teacher {kl}: the weights of one of "
                         "the two models are damaged, or its numbers overflow")
    return {"loss": loss, "kl": kl, "top1": top1}


def log_probabilities(model, tokens):
    """tokens (B, L) -> (B L, V), in fp32: bf16 has too few bits for a small KL"""
    return model.logits(tokens).float().log_softmax(-1).flatten(0, 1)


@torch.no_grad()
def layer_distances(student, teacher, tokens):
    """tokens (B, L) -> one dict per layer: matrix, block and drift, as the header defines them

    matrix and block are None where a hybrid has attention: stages 1 and 2 have no loss there.
    """
    rows = []
    outputs = student.outputs(tokens)                                   # (B, L, D) of each layer
    teacher_outputs = teacher.outputs(tokens)
    layers = progress_bar(teacher.inputs(tokens), "compare layers", len(teacher.layers))
    for i, u in layers:                                                 # u (B, L, D)
        row = {"matrix": None, "block": None}
        if i in student.ssm_layers:
            # the means of || attention - M || and of || attention ||, M = student.matrix(i, u)
            distance, size = student.orientation(i, u, *teacher.factors(i, u))
            row["matrix"] = (distance / size).item()
            y = teacher.block(i, u)                                     # (B, L, D)
            # A block adds y - u to its input. A student that adds nothing is that far from y.
            row["block"] = relative(student.block(i, u) - y, y - u)
        row["drift"] = relative(outputs[i] - teacher_outputs[i], teacher_outputs[i])
        rows.append(row)
    return rows


def relative(error, signal):
    """error, signal (B, L, D) -> the mean L2 norm of error over that of signal"""
    return (error.float().norm(dim=-1).mean() / signal.float().norm(dim=-1).mean()).item()


@torch.no_grad()
def by_position(student, teacher, windows):
    """Four numbers for each prediction: windows (n, L + 1) of tokens -> (4, n, L)

    the teacher's loss, the student's loss, KL(teacher || student), all three in nats; then 1 where
    both models find the same token likeliest, else 0
    """
    device = next(teacher.model.parameters()).device
    L = windows.shape[1] - 1
    # Memory limits both: windows that the layers read, and tokens that the head scores, at once.
    B = max(1, 2**13 // L)
    T = max(1, LOGITS_AT_ONCE // teacher.config.vocab_size)
    scores = []
    batches = windows.to(device).split(B)
    for tokens in progress_bar(batches, "evaluate by position"):        # (B, L + 1)
        teacher_h = teacher.hidden(tokens[:, :-1]).flatten(0, 1)        # (B L, D)
        h = student.hidden(tokens[:, :-1]).flatten(0, 1)                # (B L, D)
        target = tokens[:, 1:].flatten()                                # (B L)
        parts = zip(teacher_h.split(T), h.split(T), target.split(T), strict=True)
        columns = [score_predictions(teacher, student, *part) for part in parts]    # (4, T) each
        scores.append(torch.cat(columns, 1).view(4, -1, L).cpu())       # (4, B, L)
    return torch.cat(scores, 1)                                         # (4, n, L)


def score_predictions(teacher, student, teacher_h, h, target):
    """Final hidden states (T, D) of both models, next tokens (T) -> (4, T), as by_position says"""
    teacher_logp = teacher.head(teacher_h).float().log_softmax(-1)      # (T, V)
    logp = student.head(h).float().log_softmax(-1)                      # (T, V)
    teacher_loss = F.nll_loss(teacher_logp, target, reduction="none")   # (T)
    loss = F.nll_loss(logp, target, reduction="none")                   # (T)
    kl = (teacher_logp.exp() * (teacher_logp - logp)).sum(-1)           # (T)
    same = (teacher_logp.argmax(-1) == logp.argmax(-1)).float()         # (T)
    return torch.stack([teacher_loss, loss, kl, same])


def sliding(text, context, stride):
    """Overlapping windows, so that each token counts once, with a long context. text (n, T)

    -> m windows of each row: (n m, context + 1), and counted (n m, context): True where no earlier
    window has predicted this token

        text a b c d e f g h i, context 4, stride 2. Each window predicts four tokens:

               b c d e              All of the first window counts, and the last `stride` of the
                   . . f g          others (not the dots): f is predicted from c d e. After the
                       . . h i      first window each has more than context - stride before it.
    """
    windows = text.unfold(1, context + 1, stride)                       # (n, m, context + 1)
    counted = torch.zeros(windows[..., 1:].shape, dtype=torch.bool)     # (n, m, context)
    counted[:, 0] = True
    counted[..., -stride:] = True
    return windows.flatten(0, 1), counted.flatten(0, 1)


# -----------------------------------------------------------------------------
# How good: a pass key to be found again, and texts that each model writes by itself

def pass_keys(tokenizer, distance, n, seed=0):
    """n texts, "The pass key is 12345. <filler>The pass key is 12345"

    Between the keys are `distance` tokens, at least those of ". The pass key is".
    -> [(tensor of tokens (L), which ends with the key; how many tokens the digits are), ...]
    """
    phrase = tokenizer.encode("The pass key is")
    stop = tokenizer.encode(". ")
    space = tokenizer.encode(" ")
    filler = tokenizer.encode(FILLER)
    # `stop` and `phrase` are between the two keys, too: filler is what remains of the distance.
    length = max(0, distance - len(stop) - len(phrase))
    filler = filler * (length // len(filler) + 1)
    filler = filler[len(filler) - length:]
    draw = random.Random(seed)
    texts = []
    for _ in range(n):
        key = tokenizer.encode(f" {draw.randrange(10**4, 10**5)}")
        # The space before the digits, where it is a token, does not count: every model predicts it.
        digits = len(key) - (key[:1] == space)
        text = phrase + key + stop + filler + phrase + key
        texts.append((torch.tensor(text), digits))
    return texts


@torch.no_grad()
def retrieval(model, texts, device):
    """How well a model predicts the keys at the end of pass_keys' texts -> (right, probability)

    right: the share of the digits' tokens that are the model's first choice
    probability: the geometric mean of what the model gives these tokens
    """
    bar = progress_bar(None, "look for keys", sum(len(text) for text, _ in texts))
    logp, right = zip(*score_endings(model, texts, device, bar=bar), strict=True)   # (n) each
    bar.close()
    return torch.cat(right).float().mean().item(), torch.cat(logp).mean().exp().item()


def agreement(student, teacher, prompts, n):
    """Each model continues prompts (B, L) by n tokens, always the likeliest

    -> (B) how many tokens until they differ, (B) share of the n positions where they are equal
    """
    written = student.generate(prompts, n)[:, -n:]                      # (B, n)
    teacher_written = teacher.generate(prompts, n)[:, -n:]              # (B, n)
    equal = (written == teacher_written).double().cpu()                 # (B, n)
    return equal.cumprod(1).sum(1), equal.mean(1)       # cumprod: 1 up to the first difference


# -----------------------------------------------------------------------------
# Tasks made of the run's own validation text, with no download. An item is one text or several,
# each with a number n: its last n tokens, the ending, are to be found. Of one text, all of them
# (in `copy` each counts) must be the model's first choice, as if it wrote them; of several the true
# ending, which stands first, must be the likeliest per byte. Each task draws from a generator of
# its own.

class Task(NamedTuple):
    chance: float               # the score of who picks one of the endings, or of a text's m keys
    items: list                 # of [(tokens (L), n), ...]
    partly: bool = False        # the score is the share of an ending's tokens, not all or nothing


def local_tasks(run, n):
    """-> {name: Task}: n items or fewer; n / 10 of each needle, n / 4 of several keys"""
    words = last_words(run, n)
    tasks = {"last word": Task(0.0, words), "continuation": Task(0.25, continuations(run, n))}
    for part in (8, 4, 2, 1, 0.25):
        distance = max(1, int(run.context / part))
        keys = pass_keys(run.tokenizer, distance, max(1, n // 10), seed=2)
        tasks[f"needle, {distance:,} tokens back"] = Task(0.0, [[key] for key in keys])
    for m in (4, 8):
        keys = several_keys(run.tokenizer, m, max(1, n // 4), run.context // 2)
        tasks[f"{m} keys"] = Task(1 / m, keys)
    tasks["copy"] = Task(0.0, copies(run, n), partly=True)
    return tasks


def passages(run, n, length):
    """n validation texts of `length` tokens, (n, length) or fewer, with no end of text in them"""
    windows = run.held_out(4 * n, length - 1)                           # (m, length)
    return windows[(windows != run.tokenizer.eot).all(1)][:n]


def last_words(run, n):
    """As LAMBADA: text up to a word of five letters or more that occurs in it before"""
    items = []
    for row in passages(run, 2 * n, passage_length(run)):
        text = run.tokenizer.decode(row.tolist())
        found = [m for m in re.finditer(r"(?<=\s)[^\W\d_]{5,}\b", text)
                 if re.search(rf"\b{m[0]}\b", text[:m.start()])]
        if not found:
            continue
        before = run.tokenizer.encode(text[:found[-1].start()].rstrip(" "))
        ids = run.tokenizer.encode(text[:found[-1].end()])
        if before and ids[:len(before)] == before:      # else the word's tokens begin before it
            items.append([(torch.tensor(ids), len(ids) - len(before))])
    return items[:n]


def continuations(run, n):
    """As HellaSwag: a passage, how it goes on, and how three others do, all of one length"""
    length = passage_length(run)
    rows = passages(run, n, length)                                     # (n, length)
    size = length // 4                                                  # of an ending
    draw = random.Random(0)
    items = []
    for i in range(len(rows) if len(rows) > 3 else 0):
        others = draw.sample([j for j in range(len(rows)) if j != i], 3)
        items.append([(torch.cat([rows[i, :-size], rows[j, -size:]]), size) for j in (i, *others)])
    return items


def passage_length(run):
    return max(8, min(128, run.context // 2))


NAMES = ("river", "stone", "garden", "window", "morning", "paper", "silver", "forest")


def several_keys(tokenizer, m, n, length):
    """As RULER: m names with a code of five digits each, among `length` tokens, and which is it?"""
    draw = random.Random(m)
    filler = tokenizer.encode(FILLER)
    items = []
    for _ in range(n):
        codes = {name: draw.randrange(10**4, 10**5) for name in draw.sample(NAMES, m)}
        facts = [tokenizer.encode(f"The code of the {name} is {code}. ")
                 for name, code in codes.items()]
        gap = max(0, length - sum(map(len, facts))) // m
        text = []
        for fact in facts:
            text += fact + (filler * (gap // len(filler) + 1))[:gap]
        name = draw.choice(list(codes))
        question = tokenizer.encode(f"The code of the {name} is")
        answer = tokenizer.encode(f" {codes[name]}")
        items.append([(torch.tensor(text + question + answer), len(answer))])
    return items


def copies(run, n):
    """Random tokens of the validation text, twice: 8, 16, 32 or 64. The first of the second time
    cannot be known."""
    known = torch.unique(run.held_out(64, passage_length(run)))
    known = known[known != run.tokenizer.eot]
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(n):
        length = (8, 16, 32, 64)[i % 4]
        ids = known[torch.randint(len(known), (length,), generator=generator)]      # (length)
        items.append([(torch.cat([ids, ids]), length - 1)])
    return items


@torch.no_grad()
def score_endings(model, texts, device, tokens_at_once=2**12, bar=None):
    """texts [(tokens (L), n)] -> for each, of its last n tokens: log p (n), in nats, and whether
    each is the first choice (n)

    Texts of alike lengths are read together, the longest first, padded on the right: causal models
    do not see what is there.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i][0]))
    scores = [None] * len(texts)
    while order:
        longest = len(texts[order[0]][0])
        B = max(1, tokens_at_once // longest)
        batch = order[:B]
        order = order[B:]
        rows = [texts[i][0][:-1] for i in batch]
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)     # (B, L)
        hidden = model.hidden(tokens)                                   # (B, L, D)
        for row, h, i in zip(rows, hidden, batch, strict=True):
            text, n = texts[i]
            logp = model.head(h[len(row) - n:len(row)]).float().log_softmax(-1).cpu()   # (n, V)
            target = text[-n:]                                          # (n)
            scores[i] = (logp.gather(-1, target[:, None])[:, 0], logp.argmax(-1) == target)
        if bar is not None:
            bar.update(tokens.numel())
    return scores


def task_scores(model, task, tokenizer, device, bar=None):
    """-> (items), the score of each, from 0 to 1"""
    texts = list(itertools.chain(*task.items))
    scores = iter(score_endings(model, texts, device, bar=bar))
    found = []
    for item in task.items:
        endings = [next(scores) for _ in item]
        if len(item) > 1:
            per_byte = [logp.double().sum().item() / max(1, tokenizer.bytes_in(text[-n:].tolist()))
                        for (logp, _), (text, n) in zip(endings, item, strict=True)]
            found.append(float(per_byte.index(max(per_byte)) == 0))
        else:
            right = endings[0][1].double()                              # (n)
            found.append((right.mean() if task.partly else right.prod()).item())
    return torch.tensor(found, dtype=torch.float64)


def show_tasks(run, n):
    """A row for each task: both models' scores, their standard errors, and their ratio"""
    tasks = local_tasks(run, n)
    items = list(itertools.chain(*(task.items for task in tasks.values())))
    total = sum(len(tokens) for tokens, _ in itertools.chain(*items))
    print(f"\ntasks of validation text: {len(items):,} items, {total:,} tokens for each model to "
          "read, in fp32")
    bar = progress_bar(None, "tasks", total * len(run.models()))
    rows = []
    for name, task in tasks.items():
        if not task.items:
            rows.append([name, "0", f"{task.chance:.0%}", *["too little text"] * 2, ""])
            continue
        means = []
        cells = []
        for model in run.models().values():
            x = task_scores(model, task, run.tokenizer, run.device, bar)            # (items)
            means.append(x.mean().item())
            error = (x.std(correction=0) / math.sqrt(len(x))).item()
            cells.append(f"{means[-1]:.1%} ± {error:.1%}")
        recovered = f"{means[1] / means[0]:.0%}" if means[0] else "-"
        rows.append([name, f"{len(task.items):,}", f"{task.chance:.0%}", *cells, recovered])
    bar.close()
    show(["task", "items", "chance", *run.models(), "recovered"], *rows)


# -----------------------------------------------------------------------------
# Which layers should keep attention: for distill.py --attn_layers auto:K. Stages 1 and 2 teach each
# layer by itself. So in a student that they have aligned, any layers may get the teacher's
# attention back, with no more training.

@torch.no_grad()
def choose_attention(student, teacher, K, tokens, counted):
    """Give an aligned student attention back in the K layers where it helps most, one by one

    tokens (B, L): what both models read   counted (B, L): the positions whose predictions count
    Helps most: brings KL(teacher || student) lowest, the mean over these positions. Greedy: each
    round tries all layers that are left anew, since what one is worth depends on the others.
    Changes the student. -> {"before": KL, "rounds": [{"layer", "kl", "scores": {layer: KL}}]}
    """
    teacher_h = teacher.hidden(tokens)[counted]                         # (T, D)
    start = time.perf_counter()
    u = student.backbone["embedding"](tokens)                           # (B, L, D)
    before = kl_from(student, 0, u, counted, teacher, teacher_h)
    if not math.isfinite(before):
        raise UsageError(f"KL to the teacher {before}: the student's weights are damaged, or its "
                         "numbers overflow")
    n = len(student.ssm_layers)
    trials = sum(range(n - K + 1, n + 1))               # n in the first round, then one fewer
    # A trial runs the layers from its own on, half of them on average. (And the head: a bit more.)
    seconds = trials * (time.perf_counter() - start) / 2
    print(f"attention | {K} of {n} SSM layers get it back: {trials:,} trials of "
          f"{tokens.numel():,} tokens, about {seconds:,.0f} s | KL without {before:.4f}")
    bar = progress_bar(None, "choose layers", trials)
    rounds = []
    for _ in range(K):
        scores = {}
        for i, kl in try_attention(student, teacher, tokens, counted, teacher_h):
            scores[i] = kl
            bar.update()
        best = min(scores, key=scores.get)
        student.restore_attention(teacher, [best])
        rounds.append({"layer": best, "kl": scores[best], "scores": scores})
    bar.close()
    return {"before": before, "rounds": rounds}


def try_attention(student, teacher, tokens, counted, teacher_h):
    """Yields (i, KL) for each SSM layer: the KL if that layer had the teacher's attention, too"""
    u = student.backbone["embedding"](tokens)                           # (B, L, D)
    for i, layer in enumerate(student.layers):
        if i in student.ssm_layers:
            mixer = layer.mixer
            layer.mixer = student.attention_mixer(teacher, i)
            kl = kl_from(student, i, u, counted, teacher, teacher_h)
            layer.mixer = mixer
            yield i, kl
        u = student.block(i, u)                                         # (B, L, D)


def kl_from(student, i, u, counted, teacher, teacher_h):
    """u (B, L, D), the input of layer i -> KL(teacher || student), the mean where counted (B, L)

    teacher_h (T, D): the teacher's final hidden states at these T positions
    """
    for layer in student.layers[i:]:
        u = layer(u)[0]                                                 # (B, L, D)
    h = student.backbone["final_layernorm"](u)[counted]                 # (T, D)
    head = student.lm_head
    head_t = teacher.model.lm_head
    kl, _ = distillation_loss(h, head.weight, teacher_h, head_t.weight, head.bias, head_t.bias)
    return kl.item()


def texts_to_choose_by(score, tokens, tokenizer, context):
    """tokens (B, L) of training text -> tokens, counted, as choose_attention takes them

    kl: this text. To save time only every fourth position counts: at all of them the head would
    take as long as the layers. recall: pass keys, half a context apart, and what counts is the
    digits. (Seed 1: show_retrieval measures on the keys of seed 0.)
    """
    if score == "kl":
        counted = torch.zeros_like(tokens, dtype=torch.bool)
        counted[:, 3::4] = True
        return tokens, counted
    keys = pass_keys(tokenizer, context // 2, n=16, seed=1)
    key_tokens, counted = key_positions(keys)
    return key_tokens.to(tokens.device), counted.to(tokens.device)


def key_positions(texts):
    """pass_keys' texts -> tokens (n, L), padded on the right; (n, L): True where a digit of the
    second key is next"""
    tokens = torch.nn.utils.rnn.pad_sequence([text[:-1] for text, _ in texts], batch_first=True)
    counted = torch.zeros(tokens.shape, dtype=torch.bool)
    for row, (text, digits) in zip(counted, texts, strict=True):
        row[len(text) - 1 - digits:len(text) - 1] = True
    return tokens, counted


def show_choice(choice):
    """What choose_attention has found: a row for each layer, a column for each round"""
    rounds = choice["rounds"]
    print("\nKL if this layer gets its attention back, too, as those chosen (*) in earlier rounds "
          f"have\n(none has: {choice['before']:.4f}):")
    rows = []
    for i in sorted(rounds[0]["scores"]):
        cells = [str(i)]
        for x in rounds:
            chosen = "*" if x["layer"] == i else ""
            cells.append(f"{x['scores'][i]:.3f}{chosen}" if i in x["scores"] else "")
        rows.append(cells)
    show(["layer", *(f"round {n}" for n in range(1, len(rounds) + 1))], *rows)
    print()


# -----------------------------------------------------------------------------
# The tables

def show(names, *rows):
    """Print a table in Markdown: cells of text, each column as wide as its widest cell.

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


def show_tables(run):
    """run: an EvaluatedRun, below: a student, its teacher, and text to measure them on"""
    windows = run.windows(run.context)                                  # (n, context + 1)
    text = longest_windows(run)                                         # (n, up to 4 context + 1)
    show_predictions(run, windows)
    show_layers(run, windows[:16, :-1].to(run.device))
    show_perplexity(run, text)
    show_by_position(run, text)
    show_retrieval(run)
    show_memory(run)
    show_agreement(run, text[:16].to(run.device))


def longest_windows(run):
    """Windows of 4 times run.context, or of 2 or 1 where the validation text is too short"""
    for times in (4, 2):
        with contextlib.suppress(UsageError):
            return run.windows(times * run.context)
    return run.windows(run.context)


def show_predictions(run, windows):
    n = windows[:, 1:].numel()
    print(f"\non {n:,} validation tokens in windows of {run.context}, in fp32:")
    rows = []
    for name, model in run.models().items():
        x = compare(model, run.teacher, windows)
        rows.append([name, f"{x['loss']:.4f}", f"{math.exp(x['loss']):.2f}", f"{x['kl']:.4f}",
                     f"{x['top1']:.1%}"])
    show(["model", "val loss", "ppl", "KL", "top-1"], *rows)


def show_layers(run, tokens):
    rows = []
    for i, row in enumerate(layer_distances(run.student, run.teacher, tokens)):
        # None: this layer of a hybrid has attention, as the teacher's has
        rows.append([str(i), *("kept" if x is None else f"{x:.1%}" for x in row.values())])
    show(["layer", "matrix", "block", "drift"], *rows)


def show_perplexity(run, text):
    """Per token, as papers report it, and per byte, to compare models of different vocabularies"""
    stride = max(1, run.context // 2)
    windows, counted = sliding(text, run.context, stride)
    scores = by_position(run.student, run.teacher, windows)             # (4, n, L)
    losses = scores[:2, counted].double().sum(1).tolist()               # nats: teacher, student
    n = int(counted.sum())
    n_bytes = run.tokenizer.bytes_in(windows[:, 1:][counted].tolist())
    print(f"\nperplexity, a window of {run.context} sliding by {stride}: {n:,} tokens, "
          f"{n_bytes:,} bytes of text:")
    rows = []
    for name, nats in zip(run.models(), losses, strict=True):
        rows.append([name, f"{math.exp(nats / n):.3f}", f"{math.exp(nats / n_bytes):.3f}",
                     f"{nats / n_bytes / math.log(2):.3f}"])
    show(["model", "of a token", "of a byte", "bits/byte"], *rows)


def show_by_position(run, text):
    """Attention gains from each further token of context; a state that forgets stops gaining."""
    print("\nby the number of tokens before a prediction, in nats "
          f"(training had up to {run.args.context}):")
    scores = by_position(run.student, run.teacher, text).double()       # (4, n, L)
    beyond = range(2 * run.context, text.shape[1], 2 * run.context)     # 2 and 4 times the context
    edges = sorted({0, *run.lengths(), *beyond})        # 0, context / 8, / 4, / 2, context, ...
    rows = []
    for i, j in itertools.pairwise(edges):
        *losses, same = scores[:, :, i:j].mean((1, 2)).tolist()
        rows.append([f"{i + 1:,}-{j:,}", *(f"{x:.4f}" for x in losses), f"{same:.1%}"])
    show(["context", "teacher loss", "student loss", "KL", "top-1"], *rows)


def show_retrieval(run):
    """For each distance and model: what retrieval() finds of 16 pass keys, see pass_keys"""
    print("\npass key: the text names a number of five digits, goes on, and asks for it. The share "
          "of its tokens\nthat are the first choice, and their mean probability (16 keys):")
    rows = []
    for distance in (*run.lengths(), 2 * run.context, 4 * run.context):
        keys = pass_keys(run.tokenizer, distance, 16)
        cells = [f"{distance:,}"]
        for model in run.models().values():
            cells += [f"{x:.1%}" for x in retrieval(model, keys, run.device)]
        rows.append(cells)
    show(["tokens between", "teacher", "probability", "student", "probability"], *rows)


def show_memory(run):
    """A KV cache grows with the text, a state does not; a hybrid has both."""
    print("\nwhat a model keeps of one text, in MB (fp32):")
    rows = []
    for context in CONTEXTS:
        # A student's config has the sizes of the teacher's k and v, too; decoder.layers are all of
        # the teacher's, not just those that a shallower student learned from.
        cache_t = cache_bytes(run.student.config, len(run.teacher.decoder.layers), context)
        cache, state = memory_of_text(run.student, context)
        rows.append([f"{context:,}", *(f"{x / 1e6:,.2f}" for x in (cache_t, cache, state))])
    show(["tokens", "teacher's KV cache", "student's KV cache", "student's state"], *rows)


def memory_of_text(student, context):
    """-> bytes of a student's KV cache after `context` tokens, and of its state: for one text"""
    c = student.config
    positions = 8 * context * len(c.attn_layers)        # int64; model_ssm.Attention stores them
    states = [student.layers[i].mixer.initial_state(1) for i in student.ssm_layers]
    return (cache_bytes(c, len(c.attn_layers), context) + positions,
            sum(x.nbytes for state in states for x in state))


def cache_bytes(config, n_layer, context):
    """-> bytes of k and v, in fp32, of so many attention layers for one text"""
    return n_layer * context * 2 * config.n_kv_head * config.head_dim * 4


def show_agreement(run, prompts):
    """How long both models write the same text, after prompts of three lengths: see agreement"""
    n = 64
    print(f"\nboth models continue {len(prompts)} prompts by {n} tokens, always the likeliest: how "
          "many tokens until\nthey differ, and the share of positions where they are equal:")
    rows = []
    for length in sorted({max(1, run.context // part) for part in (8, 2, 1)}):
        until, equal = agreement(run.student, run.teacher, prompts[:, :length], n)      # (B) each
        rows.append([f"{length:,}", f"{until.mean():.1f}", f"{until.median():.0f}",
                     f"{equal.mean():.1%}"])
    show(["prompt", "mean", "median", "equal"], *rows)


# -----------------------------------------------------------------------------
# How fast

def peak_memory(device, reset=False):
    """-> the most bytes in use since the last call with reset=True, which returns those in use now.

    They are counted by a GPU's allocator, else for this process; nan where the system does not say.
    """
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    try:
        if reset:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)                    # glibc gives freed pages back
            Path("/proc/self/clear_refs").write_bytes(b"5")     # Linux: VmHWM begins anew
        status = Path("/proc/self/status").read_bytes()
        return 1024 * int(re.search(rb"VmHWM:\s+(\d+)", status)[1])
    except (OSError, AttributeError, TypeError):
        return math.nan


def timed(work, inputs, device, seconds):
    """-> work(*inputs), whose time is appended to the list `seconds`"""
    start = time.perf_counter()
    output = work(*inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
    return output


@torch.no_grad()
def pace(model, context, batch, device, steps=64):
    """Read `batch` prompts of `context` random tokens, then write `steps` tokens each -> a dict

    prefill, decode: tokens/s over all prompts    ms: of one step    (medians)
    state: bytes, over all prompts    peak: bytes, weights included
    """
    tokens = torch.randint(model.config.vocab_size, (2, batch, context), device=device)
    prompts, token = tokens[0], tokens[1, :, 0]                 # (batch, context), (batch)
    prefill, decode = [], []                                    # seconds
    before = peak_memory(device, reset=True)
    while len(prefill) < 5 and sum(prefill) < 2:
        state = None        # the last one is freed before the next is made
        # A KV cache needs room for these steps, and for the few that capture_graph makes.
        _, state = timed(model.read, (prompts, steps + 8), device, prefill)
    state_bytes = sum(x.nbytes for layer in tensors_of(state) for x in layer)
    step = single_step(model, state, token, device)
    for _ in range(steps):
        timed(step, (token,), device, decode)
    module = model if isinstance(model, SSM) else model.model
    # `before` is what was in use at the reset: the weights, and on a CPU all of Python. Take it
    # off, and add the weights alone.
    weights = sum(x.nbytes for x in module.parameters())
    peak = peak_memory(device) - before + weights
    prefill = statistics.median(prefill)
    decode = statistics.median(decode)
    return {"context": context, "batch": batch, "prefill": batch * context / prefill,
            "decode": batch / decode, "ms": 1e3 * decode, "state": state_bytes, "peak": peak}


def tensors_of(state):
    """A student's state, or a teacher's KV cache -> a tuple of tensors for each layer"""
    if isinstance(state, list):
        return state
    return [(layer.keys, layer.values) for layer in state.layers]


def single_step(model, state, token, device):
    """-> a function of tokens (B) that makes one step, on a GPU as one CUDA graph"""
    step = model.stepper(state)
    if isinstance(model, SSM) or device != "cuda":      # a student's stepper makes its own graph
        return step
    # Each replay reads the same token and writes its k and v to the same place in the cache. The
    # text makes no sense, but the work is that of a real step.
    replay, _ = capture_graph(lambda: step(token))
    return lambda _: replay()


def fastest(model, contexts, batches, device):
    """-> {context: pace's row for the batch size that decodes fastest}, for contexts that fit"""
    pace(model, min(contexts), 1, device, steps=3)              # warm-up: compiles, chooses kernels
    best = {}
    cells = list(itertools.product(sorted(batches), sorted(contexts)))
    for batch, context in progress_bar(cells, "measure"):
        try:
            row = pace(model, context, batch, device)
        except torch.OutOfMemoryError:
            print(f"batch {batch} x context {context:,} does not fit")
            continue
        if context not in best or row["decode"] > best[context]["decode"]:
            best[context] = row
    return best


def show_speed(args):
    """The table; with a run, also its speed.json, from which extras/pictures.py draws"""
    device, _, _ = choose_device(args.device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if args.random:
        name = f"{args.random}, random weights"
        teacher = Teacher.random(hf_config(args.random), device, dtype)
    else:
        about, folder, stage = open_run(args.run, args.stage)
        name = str(stage)
        teacher = Teacher.load(args.teacher or about["teacher"], device, dtype)
    speeds = {"teacher": fastest(teacher, args.contexts, args.batch_sizes, device)}
    student = SSM.from_teacher(teacher) if args.random else SSM.from_pretrained(stage)
    del teacher                                     # so that what is measured has more room
    speeds["student"] = fastest(student.to(device, dtype), args.contexts, args.batch_sizes, device)
    machine = (torch.cuda.get_device_name() if device == "cuda"
               else f"{device}, threads: {torch.get_num_threads()}")
    title = f"{name} | {machine}, {str(dtype).removeprefix('torch.')} | medians; peak with weights"
    print(f"\n{title}:")
    rows = []
    for context, model in itertools.product(sorted(args.contexts), speeds):
        if x := speeds[model].get(context):
            rows.append([f"{context:,}", model, str(x["batch"]), f"{x['prefill']:,.0f}",
                         f"{x['decode']:,.0f}", f"{x['ms']:.2f}", f"{x['state'] / 1e6:,.2f}",
                         f"{x['peak'] / 1e6:,.0f}"])
    show(["context", "model", "batch", "prefill tok/s", "decode tok/s", "ms/step", "state MB",
          "peak MB"], *rows)
    if not args.random and (folder / "run.json").is_file():
        found = {"title": title} | {model: list(best.values()) for model, best in speeds.items()}
        write_json(folder / "speed.json", found)


# -----------------------------------------------------------------------------
# Samples

def print_samples(run, prompt, args):
    """Both models continue `prompt`, side by side: in a terminal as they write, else at the end"""
    ids = run.tokenizer.encode_chat(prompt) if args.chat else run.tokenizer.encode(prompt)
    tokens = torch.tensor([ids], device=run.device, dtype=torch.long)           # (1, L)
    print(f"\n{args.length} tokens from {prompt!r}, temperature {args.temperature}, "
          "the same seed:\n")
    live = sys.stdout.isatty()
    columns, lines_on_screen = shutil.get_terminal_size()
    width = max(20, columns // 2 - 2) if live else 52
    written = {name: ids[:] for name in run.models()}
    streams = [model.stream(tokens, args.length, args.temperature, args.top_k, args.seed)
               for model in run.models().values()]

    def both():
        return side_by_side(*((name, run.tokenizer.decode(x)) for name, x in written.items()),
                            width)

    erase = ""
    for pair in zip(*streams, strict=True):
        for row, token in zip(written.values(), pair, strict=True):
            ended = args.chat and len(row) > len(ids) and row[-1] in run.tokenizer.stop_ids
            if not ended:
                row.append(token.item())
        if live:
            # The cursor cannot go back to lines that have scrolled away: show the last that fit.
            lines = both().split("\n")[2 - lines_on_screen:]
            print(erase + "\n".join(lines), flush=True)
            erase = f"\x1b[{len(lines)}F\x1b[J"         # up by these lines, and clear below
    print(erase + both())


def side_by_side(left, right, width=52):
    """Two (title, text) as two columns.

    >>> print(side_by_side(("a", "one two"), ("b", "uno"), width=4))
    a    | b
    one  | uno
    two  |
    """
    columns = [[title, *wrapped(text, width)] for title, text in (left, right)]
    rows = itertools.zip_longest(*columns, fillvalue="")
    return "\n".join(f"{a:<{width}} | {b}".rstrip() for a, b in rows)


def wrapped(text, width):
    """Lines of at most `width`. Control characters, which a terminal would obey, become dots."""
    lines = []
    for line in text.expandtabs(4).split("\n"):
        plain = "".join(c if c.isprintable() else "\u00b7" for c in line)
        lines += [plain[i:i + width] for i in range(0, max(1, len(plain)), width)]
    return lines


# -----------------------------------------------------------------------------
# The run to evaluate

# For a model folder or hub id without run.json: the paper's teacher and context, on text that needs
# no download (stdlib: the source code of Python's standard library)
PUBLISHED = {"teacher": "microsoft/phi-1_5", "data": "stdlib", "config": None, "context": 2048,
             "eval_tokens": 2**19, "seed": 0}
RUN_AGAIN = ("run distill.py with --fresh to make it again, or delete it and give a stage's folder "
             "and --teacher")


def open_run(path, stage=None):
    """A run folder or one of its stage folders -> (run.json as a dict, run folder, stage folder)

    run.json: "arguments" as distill.py was called; "teacher" and "data" as it found them, that is
    where the weights come from, and the folder of tokens.
    A model folder outside a run, or a hub id, is described as a run of the paper's recipe.
    """
    path = Path(path)
    # Here `run` is the run's folder; path may be that, or a stage's folder in it.
    run = path if (path / "run.json").is_file() else path.parent
    if not (run / "run.json").is_file():
        is_hub_id = len(path.parts) == 2 and not path.parent.exists()
        if not is_hub_id and not (path / "config.json").is_file():
            raise UsageError(f"{path} is not a run of distill.py: there is no run.json")
        about = {"arguments": PUBLISHED, "teacher": PUBLISHED["teacher"], "data": PUBLISHED["data"]}
        return about, path, path
    stages = sorted(run.glob("stage[123]"))
    if path != run:
        chosen = path
    elif stage:
        chosen = run / f"stage{stage}"
    elif stages:
        chosen = stages[-1]
    else:
        raise UsageError(f"{run} has no finished stage yet")
    if not chosen.is_dir():
        finished = ", ".join(s.name for s in stages) or "no finished stage"
        raise UsageError(f"there is no {chosen}: {run} has {finished}")
    about = read_json(run / "run.json", RUN_AGAIN)
    with damage_in_one_line(run / "run.json", RUN_AGAIN):
        # What PUBLISHED has is needed here: a run must have it too, with the same types.
        for name, value in PUBLISHED.items():
            found = about["arguments"][name]
            if not isinstance(found, str | None if value is None else type(value)):
                raise ValueError(f"its argument {name} is {str(found)[:40]}")
        if not isinstance(about["teacher"], str) or not isinstance(about["data"], str):
            raise ValueError("its teacher or its data has no name")
    return about, run, chosen


class EvaluatedRun:
    """The student and the teacher of a run, and the text to measure them on.

    flags: as add_run_flags declares them
    args: the run's own arguments, with --teacher, --eval_tokens, and --data with --config applied
    context: --context, or that of training, which stays in args.context
    """

    def __init__(self, flags):
        about, self.folder, self.stage = open_run(flags.run, flags.stage)
        self.device, _, _ = choose_device(flags.device)
        self.student = SSM.from_pretrained(self.stage).to(self.device).eval()
        print(f"student {self.stage} | {self.student.loaded}")
        name = flags.teacher or about["teacher"]
        # Layer i of a shallower student is compared with the teacher's layer that it learned from,
        # its predictions with those of all the teacher's layers.
        self.teacher = Teacher.load(name, self.device).at(self.student.config.n_layer)
        if self.student.config.vocab_size != self.teacher.config.vocab_size:
            raise UsageError(
                f"the student has {self.student.config.vocab_size:,} tokens, its teacher {name} "
                f"{self.teacher.config.vocab_size:,}: they cannot be compared")
        before = self.student.about.get("teacher_fingerprint")
        if before and not self.teacher.has_fingerprint(before):
            if not flags.teacher:
                raise UsageError(f"{self.stage} was distilled from other weights than {name} has "
                                 "now: give --teacher where its teacher lies")
            print(f"{name} is not the teacher that {self.stage} was distilled from")
        self.args = self._arguments(flags, about)
        self.context = flags.context or self.args.context
        # By the name that distill.py was given (about["teacher"] is where the weights were), or by
        # --teacher.
        self.tokenizer = Tokenizer(self.args.teacher)
        self.tokenizer.check_rows(self.teacher.config.vocab_size)   # an embedding for each id?

    @staticmethod
    def _arguments(flags, about):
        # A model outside a run has none of these. The last three are for extras/pictures.py.
        defaults = {"stream": None, "mixer": "mamba2", "n_layer": None, "from_folder": None}
        args = argparse.Namespace(**defaults | about["arguments"])
        args.teacher = flags.teacher or args.teacher
        args.eval_tokens = flags.eval_tokens or args.eval_tokens
        if not args.stream:
            args.data = about["data"]           # the folder of tokens made from args.data
        if flags.data:
            args.data = flags.data
            args.config = flags.config
            # Preparing a hub data set would download all of it; a stream reads its first windows.
            args.stream = flags.data != "stdlib" and not Path(flags.data).expanduser().exists()
        return args

    def models(self):
        return {"teacher": self.teacher, "student": self.student}

    def lengths(self):
        """An eighth of the context, a quarter, a half, and all of it"""
        return sorted({max(1, self.context // n) for n in (8, 4, 2, 1)})

    def windows(self, length):
        """Held-out windows (n, length + 1)"""
        args = argparse.Namespace(**vars(self.args) | {"context": length})
        return open_data(args, self.tokenizer)[1]

    def held_out(self, n, length):
        """n validation windows (n, length + 1), or all; of a stream at most --eval_tokens"""
        args = argparse.Namespace(**vars(self.args) | {"context": length})
        if not args.stream:                 # a stream has no others that are not for training
            args.eval_tokens = n * length
        return open_data(args, self.tokenizer)[1][:n]

    def calibration_tokens(self):
        """The tokens (8, L) on which distill.py --init fit has fitted the mixers"""
        data = open_data(self.args, self.tokenizer)[0]
        return data.batch(0, 8, self.args.context)[:, :-1].to(self.device)


def choose_device(name, fp32=False):
    """-> the device, whether stages 2 and 3 compute in bf16 on it (never with fp32=True), and a
    text for the log: why"""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no CUDA device here")
    device = name
    if name == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        bf16 = torch.cuda.is_bf16_supported()
        why = torch.cuda.get_device_name()
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
        show_speed(args)
        return
    run = EvaluatedRun(args)
    if args.tasks:
        show_tasks(run, args.items)
        return
    if args.prompt is None:
        show_tables(run)
    print_samples(run, "def " if args.prompt is None else args.prompt, args)


def add_run_flags(add, **optional):
    """The flags that say which run and which text, for the programs in extras/ as well

    add: a parser's add_argument   optional: its options for `run`, such as nargs="?"
    """
    add("run", **optional, help="a run or stage folder, another model folder, or a hub id")
    add("--stage", type=int, choices=(1, 2, 3), help="which student of a run folder [the last]")
    add("--teacher", type=nonempty, help="another name for the run's teacher, if it has moved")
    add("--context", type=at_least_one, help="tokens per window [as in training]")
    add("--eval_tokens", type=at_least_one, help="validation tokens to read [as in training]")
    add("--data", type=source_of_text, help="another text; a hub data set is read as a stream "
        "[the run's; without a run stdlib]")
    add("--config", help="which part of a Hugging Face data set")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="[auto]")


def zero_or_temperature(text):
    """0 is greedy; what is nearer to 0 than 0.01 would overflow"""
    return 0.0 if not_negative(text) == 0 else temperature(text)


def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add_run_flags(add, nargs="?")
    add("--prompt", help="no tables: both models continue this [the tables, then 'def ']")
    add("--chat", action="store_true", help="the prompt is what a user says to a chat model")
    add("--length", type=at_least_one, default=300, help="tokens to generate [%(default)s]")
    add("--temperature", type=zero_or_temperature, default=0.7, help="0 is greedy [%(default)s]")
    add("--top_k", type=at_least_one, help="sample from so many likeliest tokens [all]")
    add("--seed", type=count, default=0, help="of the sampling [%(default)s]")
    add("--tasks", choices=("local",), help="tasks made of validation text, instead of the tables")
    add("--items", type=at_least_one, default=200, help="of a task; of each needle a "
        "tenth, of several keys a quarter [%(default)s]")
    add("--speed", action="store_true", help="tokens/s and memory by context, instead")
    add("--random", metavar="NAME", help="with --speed: this architecture, random weights, no run")
    add("--contexts", type=at_least_one, nargs="+", default=CONTEXTS,
        help="with --speed: tokens of context [512 ... 65,536]")
    add("--batch_sizes", type=at_least_one, nargs="+", default=[1],
        help="with --speed: each is tried, the best is shown [1]")
    args = parser.parse_args(arguments)
    if args.random and not args.speed:
        raise UsageError("--random measures --speed: random weights have no other results")
    if args.chat and args.prompt is None:
        raise UsageError("--chat is for --prompt, what the user says")
    if args.tasks and (args.speed or args.prompt is not None):
        raise UsageError("--tasks, --speed and --prompt print different things: give one of them")
    if bool(args.run) == bool(args.random):
        raise UsageError("give a run folder such as out/tiny, or --speed --random NAME, not both")
    return args


if __name__ == "__main__":
    run_program(main)
