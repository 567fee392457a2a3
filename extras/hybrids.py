"""Hybrids of one aligned student: how many layers need attention, and which?

Run:  python -m extras.hybrids out/tiny/stage2 --how_many 1 2
      python -m extras.hybrids out/smollm2/stage2 --keys 64 128 256 512 1024

Stages 1 and 2 teach each layer by itself, so a student aligned once gives every hybrid with no more
training: the layers named get the teacher's attention back. Layers are chosen in three ways:

    even      evenly spread, as in the paper's hybrid
    kl        those that bring KL(teacher || student) lowest on training text, one after the other
    recall    the same on texts with a pass key, where only the key's digits count: a number that
              the text names, and asks for again later

distill.py chooses so, too: --attn_layers auto:K with --attn_score kl or recall. It goes on to train
the hybrid; here nothing is trained. A row has KL and perplexity on held-out text, and the share of
the pass keys' tokens found, by the number of tokens between a key and the question for it. Choices
and rows are stored in hybrids.json, beside the stage folder: the same command, after a stop, goes
on with the next one.
"""
import math

import torch

from eval import (EvaluatedRun, add_run_flags, choose_attention, choose_device, compare, pass_keys,
                  retrieval, show, show_choice, texts_to_choose_by)
from model_ssm import SSM, UsageError, read_json, write_json
from prepare import Parser, at_least_one, run_program

N_KEYS = 16


def main(arguments=None):
    args = parse(arguments)
    run = EvaluatedRun(args)
    if run.student.config.attn_layers:
        raise UsageError(f"{run.stage} has attention in layers {run.student.config.attn_layers}: "
                         "give a student without")
    n_layer = run.student.config.n_layer
    if max(args.how_many) >= n_layer:
        raise UsageError(f"--how_many {max(args.how_many)}: of {n_layer} layers at most "
                         f"{n_layer - 1} may have attention, or none is an SSM")
    path = run.folder / "hybrids.json"
    made_with = {"stage": run.stage.name, "student": read_weights(run.stage),
                 "eval_tokens": run.args.eval_tokens, "context": run.context, "keys": args.keys,
                 "data": run.args.data, "most": max(args.how_many)}
    found = {"made with": made_with, "choices": {}, "rows": {}}
    if path.exists():
        before = read_json(path, "delete it, and it is made again")
        if before["made with"] != made_with:
            raise UsageError(f"{path} was made with other flags or of another student: move it "
                             "away")
        found = before
    windows = run.windows(run.context)                                  # (n, L + 1)
    for way in ("even", "kl", "recall"):
        if way != "even" and way not in found["choices"]:
            found["choices"][way] = choose(run, way, max(args.how_many))
            write_json(path, found)
            show_choice(found["choices"][way])
        # K = 0, the student as it is, is the same in each way: one row, "0 even"
        for K in (0, *sorted(set(args.how_many))):
            key = f"{K} {way}"
            if key not in found["rows"] and (K > 0 or way == "even"):
                found["rows"][key] = measure(run, layers_of(found, way, K, n_layer), windows,
                                             args.keys)
                write_json(path, found)
    show_rows(run, found, windows, args)


def read_weights(stage):
    """The checksum of a student's weights"""
    return read_json(stage / "config.json", "give a stage folder of a run")["weights"]


def evenly(K, n_layer):
    """K of n_layer layers, n_layer / K apart, the first half of that from the start, rounded

    1e-9 rounds a half down: Python's round would take the even number.

    >>> evenly(4, 30), evenly(1, 4), evenly(3, 4)
    ([4, 11, 19, 26], [2], [1, 2, 3])
    """
    return [round((n + 0.5) * n_layer / K - 1e-9) for n in range(K)]


def layers_of(found, way, K, n_layer):
    """The K layers that get attention. Greedy, so the first K rounds are the choice of K."""
    if way == "even":
        return evenly(K, n_layer)
    return [x["layer"] for x in found["choices"][way]["rounds"][:K]]


def choose(run, way, K):
    """-> what choose_attention finds, on the texts and in the precision of distill.py's auto:K"""
    student = SSM.from_pretrained(run.stage).to(run.device).eval()
    # counted: where the KL is taken. run.args.context is that of training.
    tokens, counted = texts_to_choose_by(way, run.calibration_tokens(), run.tokenizer,
                                         run.args.context)
    with autocast(run.device):
        return choose_attention(student, run.teacher, K, tokens, counted)


def autocast(device):
    """The context of bf16 where the device multiplies it faster: enough to compare and to choose"""
    _, bf16, _ = choose_device(device)
    return torch.autocast(device, torch.bfloat16, enabled=bf16)


def measure(run, layers, windows, distances):
    """-> {"layers", "kl", "ppl", "keys": {distance: share found}} of this hybrid"""
    student = SSM.from_pretrained(run.stage).to(run.device).eval()
    student.restore_attention(run.teacher, layers)
    scores = compare(student, run.teacher, windows)     # the KL to report: in fp32
    keys = {}
    with autocast(run.device):
        for distance in distances:
            texts = pass_keys(run.tokenizer, distance, N_KEYS)
            keys[distance], _ = retrieval(student, texts, run.device)
    return {"layers": layers, "kl": scores["kl"], "ppl": math.exp(scores["loss"]), "keys": keys}


def show_rows(run, found, windows, args):
    print(f"\n{run.stage}, attention of {run.teacher.name} back in some layers, no training since; "
          f"KL and ppl on {windows[:, 1:].numel():,} validation tokens,\nkeys: the share of their "
          f"tokens found, {N_KEYS} keys, by distance:")
    rows = []
    for key, row in found["rows"].items():
        K, way = key.split()
        rows.append([way if int(K) else "none", K, f"{row['kl']:.3f}", f"{row['ppl']:.1f}",
                     *(f"{x:.0%}" for x in row["keys"].values()),
                     " ".join(map(str, sorted(row["layers"])))])
    show(["chosen", "K", "KL", "ppl", *(f"{n:,}" for n in args.keys), "layers"], *rows)


def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add_run_flags(add)
    add("--how_many", type=at_least_one, nargs="+", default=[1, 2, 4, 8, 15],
        help="layers with attention [1 2 4 8 15]")
    add("--keys", type=at_least_one, nargs="+", default=[64, 128, 256, 512, 1024],
        help="distances of keys, in tokens [64 ... 1,024]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_program(main)
