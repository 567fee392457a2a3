"""How close is the student to its teacher? Numbers, samples, and a picture of both mixing matrices.

Run:  python eval.py out/tiny                          # the last stage of a run
      python eval.py out/tiny --stage 1                # an earlier one
      python eval.py out/tiny --prompt "class "        # both go on from here, side by side
      python eval.py out/tiny --picture matrices.png   # before and after stage 1 (needs matplotlib)

Three distances for each layer, as shares of the teacher's own answer (silence would score 100%):

    matrix    given the teacher's input, || attention - M ||                what stage 1 makes small
    block     given the teacher's input, || its output - the student's ||   what stage 2 makes small
    drift     each model by itself from the tokens on, || teacher's u - student's u ||,
              errors of all layers before added up

It leaves out: benchmarks and speed.
"""
import argparse
import json
import math
from pathlib import Path

import torch

from distill import blocks, choose_device, copy_of_teacher, matrices, open_data
from model_ssm import SSM, UsageError
from model_teacher import Teacher, compare
from prepare import Parser, Tokenizer, count, run_program


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


def side_by_side(left, right, width=52):
    """Two texts as columns of one, under their titles.

    >>> print(side_by_side(("a", "one two"), ("b", "uno"), width=4))
    a    | b
    one  | uno
    two  |
    """
    def lines(text):
        return [line[i:i + width] for line in text.expandtabs(4).split("\n")
                for i in range(0, max(1, len(line)), width)]

    columns = [[title, *lines(text)] for title, text in (left, right)]
    n = max(map(len, columns))
    rows = zip(*(column + [""] * (n - len(column)) for column in columns), strict=True)
    return "\n".join(f"{a:<{width}} | {b}".rstrip() for a, b in rows)


def picture(path, teacher, students, tokens, heads, title):
    """One row per model, one column per (layer, head): |attention| and |M + diag D|.

    students: {name: SSM}   tokens (1, L)   path: a PNG file
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("--picture needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    def matrices_of(model):
        inputs = teacher.inputs(tokens, only={layer for layer, _ in heads})
        found = {i: model.matrix(i, u)[0].detach().abs() for i, u in inputs}        # (H, L, L)
        return [found[layer][head] for layer, head in heads]

    models = {"teacher\nattention": teacher, **students}
    size = (2.1 * len(heads) + 0.9, 2.1 * len(models) + 0.5)
    figure, axes = plt.subplots(len(models), len(heads), figsize=size, squeeze=False,
                                layout="constrained")
    for n, (row, (name, model)) in enumerate(zip(axes, models.items(), strict=True)):
        for axis, matrix, (layer, head) in zip(row, matrices_of(model), heads, strict=True):
            image = axis.imshow(matrix.clamp_min(1e-3), cmap="magma",
                                norm=matplotlib.colors.LogNorm(1e-3, 1))
            axis.set(xticks=[], yticks=[])
            if n == 0:
                axis.set_title(f"layer {layer}, head {head}", fontsize=9)
        row[0].set_ylabel(name, fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.colorbar(image, ax=axes, shrink=0.6,
                    label="|weight of token j for token i|, log scale", extend="both")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(arguments=None):
    args = parse(arguments)
    about, run, folder = open_run(args.run, args.stage)
    device = choose_device(args.device)[0]
    teacher = Teacher.load(args.teacher or about["teacher"], device)
    student = SSM.from_pretrained(folder).to(device).eval()
    print(f"student {folder} | {student.loaded}")
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UsageError(f"the student has {student.config.vocab_size:,} tokens, its teacher "
                         f"{teacher.name} {teacher.config.vocab_size:,}: they cannot be compared")
    was = argparse.Namespace(**about["arguments"])
    tokenizer, context = Tokenizer(was.teacher), args.context or was.context
    was.data = was.data if was.stream else about["data"]
    was.context, was.eval_tokens = context, args.eval_tokens or was.eval_tokens
    data, windows, _ = open_data(was, tokenizer)

    print(f"\non {windows[:, 1:].numel():,} held-out tokens in windows of {context}, in fp32:\n")
    print("| model   | val loss |    ppl |     KL |  top-1 |\n"
          "|---------|----------|--------|--------|--------|")
    for name, model in (("teacher", teacher), ("student", student)):
        row = compare(model, teacher, windows)
        print(f"| {name} | {row['loss']:8.4f} | {math.exp(row['loss']):6.2f} | "
              f"{row['kl']:6.4f} | {row['top1']:6.1%} |")

    print("\n| layer | matrix |  block |  drift |\n|-------|--------|--------|--------|")
    for i, row in enumerate(layer_distances(student, teacher, windows[:16, :-1].to(device))):
        matrix, block = ("  kept" if row[x] is None else f"{row[x]:6.1%}"
                         for x in ("matrix", "block"))
        print(f"| {i:5} | {matrix} | {block} | {row['drift']:6.1%} |")

    prompt = torch.tensor([tokenizer.encode(args.prompt)], device=device, dtype=torch.long)
    sampling = args.length, args.temperature, args.top_k, args.seed
    texts = [tokenizer.decode(model.generate(prompt, *sampling)[0].tolist())
             for model in (teacher, student)]
    print(f"\n{args.length} tokens from {args.prompt!r}, temperature {args.temperature}, "
          "the same seed:\n")
    print(side_by_side(("teacher", texts[0]), ("student", texts[1])))

    if args.picture:
        few = data.batch(0, 8, about["arguments"]["context"])[:, :-1].to(device)
        students = {"student\nas copied": copy_of_teacher(was, teacher, few).to(device)}
        for n in (1, 2, 3):
            if (stage := run / f"stage{n}").is_dir():
                students[f"student\nafter stage {n}"] = SSM.from_pretrained(stage).to(device)
        layers = student.ssm_layers[:: max(1, len(student.ssm_layers) // 4)][:4]
        heads = [(layer, n % student.config.n_head) for n, layer in enumerate(layers)]
        picture(args.picture, teacher, students,
                windows[:1, :args.picture_tokens].to(device), heads,
                f"Who looks at whom: {run}, {args.picture_tokens} tokens of held-out text "
                "(row i asks, column j is asked)")
        print(f"\nsaved {args.picture}")


def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", help="a run folder such as out/tiny, or one of its stage folders")
    add("--stage", type=int, choices=(1, 2, 3), help="which student of the run [the last]")
    add("--teacher", help="another name for the run's teacher, if it has moved")
    add("--context", type=int, help="tokens per window [as in training]")
    add("--eval_tokens", type=count, help="held-out tokens to read [as in training]")
    add("--prompt", default="def ", help="where both models go on from [%(default)r]")
    add("--length", type=int, default=300, help="tokens to generate [%(default)s]")
    add("--temperature", type=float, default=0.7, help="0 is greedy [%(default)s]")
    add("--top_k", type=int, help="sample from so many likeliest tokens [all]")
    add("--seed", type=int, default=0, help="of the sampling [%(default)s]")
    add("--picture", help="write a PNG of mixing matrices there")
    add("--picture_tokens", type=int, default=64, help="side of the matrices [%(default)s]")
    add("--device", default="auto", help="cuda, cpu or mps [auto]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_program(main)
