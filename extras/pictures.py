"""PNG files of a run: matrices, losses, distances by layer, speed. Needs matplotlib.

Run:  python -m extras.pictures out/tiny
      python -m extras.pictures out/tiny --heads 2:0 2:5 --picture_tokens 128

    matrices.png      who attends to whom: the teacher, and the student after each stage
    differences.png   student - teacher
    loss.png          what each stage minimises, against tokens
    power.png         stage 3's KL on log axes, a power law through its last three quarters, and
                      what it promises for more tokens, which is printed too
    layers.png        the distances of `python eval.py out/tiny`, layer by layer, after each stage
    attention.png     if there is an attention.json: what each layer's attention was worth
    speed.png         if there is a speed.json: `python eval.py out/tiny --speed` writes it
"""
import argparse
import contextlib
import math
import re
import statistics

from distill import init_student, read_log
from eval import EvaluatedRun, add_run_flags, layer_distances
from model_ssm import SSM, UsageError, read_json
from prepare import Parser, at_least_one, run_program


@contextlib.contextmanager
def figure(path, title, rows, columns, width, height):
    """Yields matplotlib's pyplot, a figure and its axes (rows, columns); then saves the figure."""
    try:
        import matplotlib
    except ImportError as error:
        raise UsageError("pictures need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")                   # draws into files: no screen is needed
    import matplotlib.pyplot as plt
    sheet, axes = plt.subplots(rows, columns, figsize=(width, height), squeeze=False,
                               layout="constrained")
    yield plt, sheet, axes
    sheet.suptitle(title, fontsize=10)
    sheet.savefig(path, dpi=110)
    plt.close(sheet)
    print(f"saved {path}")


def draw_matrices(path, title, rows, heads, signed=False):
    """A grid of matrices. rows: {model: [a matrix (L, L) for each (layer, head) of heads]}

    signed: differences, from blue to red; else magnitudes on a log scale, since a matrix has few
    large weights and many small ones
    """
    width = 2.1 * len(heads) + 0.9          # inches
    height = 2.1 * len(rows) + 0.5
    with figure(path, title, len(rows), len(heads), width, height) as (plt, sheet, axes):
        colours = plt.matplotlib.colors
        if signed:
            scale = dict(cmap="RdBu_r", norm=colours.SymLogNorm(0.01, vmin=-1, vmax=1))
            label = "student's weight - teacher's, linear within 0.01, log beyond"
        else:
            scale = dict(cmap="magma", norm=colours.LogNorm(1e-3, 1))
            label = "|weight of token j for token i|, log scale"
        for row, (name, matrices) in zip(axes, rows.items(), strict=True):
            for axis, matrix in zip(row, matrices, strict=True):
                shown = matrix if signed else matrix.abs().clamp_min(1e-3)
                image = axis.imshow(shown.numpy(), **scale)
                axis.set(xticks=[], yticks=[])
            row[0].set_ylabel(name, fontsize=9)
        for axis, (layer, head) in zip(axes[0], heads, strict=True):
            axis.set_title(f"layer {layer}, head {head}", fontsize=9)
        sheet.colorbar(image, ax=axes, shrink=0.6, extend="both", label=label)


def draw_lines(path, title, panels, marker="o", contexts=False, factor=10):
    """A row of panels. panels: {title: (x label, y label, {name: (x, y)})}

    contexts: x is a number of tokens, on a log scale. y is on one if it spans more than `factor`.
    """
    with figure(path, title, 1, len(panels), 9, 3.2) as (plt, sheet, axes):
        ticker = plt.matplotlib.ticker
        for axis, (name, (x_label, y_label, lines)) in zip(axes[0], panels.items(), strict=True):
            positive = []
            for label, (x, y) in lines.items():
                axis.plot(x, y, marker=marker, markersize=3, linewidth=1.2, label=label)
                positive += [value for value in y if value > 0]
            axis.set(title=name, xlabel=x_label, ylabel=y_label)
            if positive and max(positive) > factor * min(positive):
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
    panels = {}
    for stage, unit in ((1, "Frobenius distance"), (2, "distance"), (3, "KL, nats a token")):
        panels[f"stage {stage}"] = "tokens, millions", unit, {"": loss_curve(log, stage)}
    draw_lines(path, title, panels, marker="")


def loss_curve(log, stage, points=100):
    """-> millions of tokens, losses: lists of means of this stage's steps, about `points` long"""
    events = [event for event in log if event["stage"] == f"stage {stage}"]
    n = max(1, len(events) // points)       # events of a point
    x, y = [], []
    for i in range(0, len(events) - n + 1, n):
        x.append(statistics.mean(e["tokens"] for e in events[i:i + n]) * 1e-6)
        y.append(statistics.mean(e["loss"] for e in events[i:i + n]))
    return x, y


def fit_power_law(x, y):
    """Numbers above 0 -> a, b with y = a x^b, by least squares between logarithms

    >>> a, b = fit_power_law([1, 10, 100], [2, 0.2, 0.02])
    >>> round(a, 6), round(b, 6)
    (2.0, -1.0)
    """
    b, log_a = statistics.linear_regression([math.log(t) for t in x], [math.log(t) for t in y])
    return math.exp(log_a), b


def draw_power_law(path, title, log):
    """Stage 3's loss against its tokens, and the law. Nothing is drawn of fewer than 8 steps."""
    x, y = loss_curve(log, 3)
    if len(x) < 8:
        print(f"no {path}: a power law needs 8 steps of stage 3, the log has {len(x)}")
        return
    first = len(x) // 4
    a, b = fit_power_law(x[first:], y[first:])
    tokens = [x[first], x[-1], 10 * x[-1], 100 * x[-1]]
    law = [a * t ** b for t in tokens]
    promised = ", ".join(f"{t:,.3g}M {kl:.3f}" for t, kl in zip(tokens[1:], law[1:], strict=True))
    print(f"stage 3 | KL = {a:.3f} (million tokens)^{b:.3f} in the last three quarters: at "
          f"{promised}")
    lines = {"stage 3": (x, y), "power law": (tokens, law)}
    draw_lines(path, title, {"KL to the teacher, in training": (
        "tokens of stage 3, millions", "nats a token", lines)}, marker="", contexts=True, factor=1)


def draw_layers(path, title, distances):
    """distances: {model: rows of layer_distances}. A layer that keeps attention is a gap."""
    panels = {}
    for name in ("matrix", "block", "drift"):
        lines = {}
        for model, rows in distances.items():
            percent = [math.nan if row[name] is None else 100 * row[name] for row in rows]
            lines[model] = range(len(rows)), percent
        panels[name] = "layer", "% of the teacher's answer", lines
    draw_lines(path, title, panels)


def draw_speed(folder):
    """speed.json, of {model: rows of pace} and a title -> speed.png"""
    models = read_json(folder / "speed.json", "python eval.py --speed makes it again")
    title = models.pop("title")
    panels = {}
    for name, key, unit, scale in (("reading", "prefill", "tokens/s", 1),
                                   ("writing", "decode", "tokens/s", 1),
                                   ("memory", "peak", "peak MB, weights included", 1e6)):
        lines = {}
        for model, rows in models.items():
            contexts = [row["context"] for row in rows]
            lines[model] = contexts, [row[key] / scale for row in rows]
        panels[name] = "tokens of context", unit, lines
    draw_lines(folder / "speed.png", title, panels, contexts=True)


def main(arguments=None):
    args = parse(arguments)
    run = EvaluatedRun(args)
    if not (run.folder / "log.jsonl").is_file():
        raise UsageError(f"pictures are of a run of distill.py, and {run.folder} is only a model")
    students = all_students(run)
    heads = choose_heads(args, students["as copied"])
    windows = run.windows(run.context)                                  # (n, L + 1)
    log = read_log(run.folder / "log.jsonl")
    draw_all_matrices(run, students, heads, windows[:1, :args.picture_tokens].to(run.device))
    draw_losses(run.folder / "loss.png", f"{run.folder}: what each stage minimises", log)
    draw_power_law(run.folder / "power.png", f"{run.folder}: what more tokens would bring", log)
    tokens = windows[:16, :-1].to(run.device)                           # (16, L)
    distances = {}
    for name, student in students.items():
        distances[name] = layer_distances(student, run.teacher, tokens)
    draw_layers(run.folder / "layers.png", f"{run.folder}: distance to the teacher (zeros: 100%)",
                distances)
    if (run.folder / "attention.json").is_file():
        draw_attention(run.folder)
    if (run.folder / "speed.json").is_file():
        draw_speed(run.folder)


def all_students(run):
    """-> {name: student}: as the run started, and after each stage that it has finished"""
    students = {"as copied": first_student(run)}
    for n in (1, 2, 3):
        stage = run.folder / f"stage{n}"
        if stage.is_dir():
            students[f"after stage {n}"] = SSM.from_pretrained(stage)
    for student in students.values():
        student.to(run.device)
    return students


def first_student(run):
    """A copy of the teacher; with --from that folder's student, with attention as in this run"""
    if run.args.from_folder is None:
        return init_student(run.args, run.teacher, run.calibration_tokens())
    student = SSM.from_pretrained(run.args.from_folder)
    restored = set(run.student.config.attn_layers) - set(student.config.attn_layers)
    student.restore_attention(run.teacher, sorted(restored))
    return student


def draw_attention(folder):
    """attention.json, what --attn_layers auto has found -> attention.png: layers, round by round"""
    choice = read_json(folder / "attention.json", "distill.py writes it with --attn_layers auto")
    rounds = choice["rounds"]
    layers = sorted(map(int, rounds[0]["scores"]))
    with figure(folder / "attention.png",
                f"{folder}: KL with a layer's attention back, by {choice['score']}; without any "
                f"{choice['before']:.3f}", 1, 1, 9, 1 + 0.35 * len(rounds)) as (plt, sheet, axes):
        axis = axes[0][0]
        scores = [[x["scores"].get(str(i), math.nan) for i in layers] for x in rounds]
        image = axis.imshow(scores, cmap="viridis", aspect="auto")
        for n, x in enumerate(rounds):
            axis.text(layers.index(x["layer"]), n, f"{x['kl']:.2f}", ha="center", va="center",
                      fontsize=6, color="white")
        axis.set(xlabel="layer", xticks=range(len(layers)), yticks=range(len(rounds)))
        axis.set_xticklabels(layers, fontsize=6)
        axis.set_yticklabels([f"round {n}" for n in range(1, len(rounds) + 1)], fontsize=6)
        sheet.colorbar(image, ax=axes, label="KL, nats")


def choose_heads(args, student):
    """-> [(layer, head), ...]: those of --heads, or one head of each of four layers"""
    layers = student.ssm_layers
    H = student.config.n_head
    some = layers[::max(1, len(layers) // 4)][:4]
    heads = args.heads or [(layer, n % H) for n, layer in enumerate(some)]
    for layer, head in heads:
        if layer not in layers or head >= H:
            names = ", ".join(map(str, layers))
            raise UsageError(f"--heads {layer}:{head}: there are layers {names} to draw, "
                             f"and heads 0 to {H - 1}")
    return heads


def draw_all_matrices(run, students, heads, tokens):
    """matrices.png and differences.png. tokens (1, L); every model reads the teacher's inputs."""
    inputs = dict(run.teacher.inputs(tokens, only={layer for layer, _ in heads}))
    matrices = {}
    for name, model in ({"teacher": run.teacher} | students).items():
        matrices[name] = [model.matrix(i, inputs[i])[0, h].detach().cpu() for i, h in heads]
    text = f"{run.folder}, {tokens.shape[1]} tokens of held-out text (row i attends to column j)"
    draw_matrices(run.folder / "matrices.png", f"Who attends to whom: {text}", matrices, heads)
    target = matrices.pop("teacher")
    for name, drawn in matrices.items():
        matrices[name] = [x - y for x, y in zip(drawn, target, strict=True)]
    draw_matrices(run.folder / "differences.png", f"Student - teacher: {text}", matrices, heads,
                  signed=True)


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
    add_run_flags(parser.add_argument)
    parser.add_argument("--picture_tokens", type=at_least_one, default=64,
                        help="side of a matrix [%(default)s]")
    parser.add_argument("--heads", type=layer_and_head, nargs="+",
                        help="to draw: LAYER:HEAD [of four layers]")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_program(main)
