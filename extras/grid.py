"""Run a grid of distillations with several seeds, and tabulate their results.

Run:  python -m extras.objectives          # a study is a dict of flags; these two files have one
      python -m extras.mixers

A finished run is not run again. The same command in a second process takes other runs, and the last
process to finish writes results/study-<name>.md. Flags on the command line are added to every run;
those that the study sets itself are refused.
"""
import argparse
import contextlib
import itertools
import platform
import re
import shlex
import sys
from pathlib import Path

import filelock
import torch

import distill
from eval import choose_device, pass_keys, retrieval
from model_ssm import SSM, UsageError, read_json, write_json, write_file
from prepare import Parser, Tokenizer, count, locked, run_program

MAY_DIFFER = {"--tokens", "--lr"}       # single runs set these; the command line may replace them


def run_study(name, cells, common, header, arguments=None):
    """Run every cell with every seed, then write the table if all of them are finished.

    cells: {name: its flags}    common: flags of all cells    header: the docstring that -h shows
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(header)
    parser.add_argument("--seeds", type=count, nargs="+", default=[0, 1, 2], help="[0 1 2]")
    args, rest = parser.parse_known_args(arguments)
    if len(set(args.seeds)) < len(args.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, args.seeds))}: one of them comes twice")
    check_flags(name, cells, rest)
    runs = []
    for seed, cell in itertools.product(args.seeds, cells):
        folder = run_folder(name, cell, seed, rest)
        flags = [*shlex.split(common), *shlex.split(cells[cell]), *rest,
                 "--seed", str(seed), "--out", str(folder)]
        distill.parse(flags)                # a mistake shows before the first hour is spent
        runs.append((cell, folder, flags))
    for number, (cell, folder, flags) in enumerate(runs, 1):
        run_cell(f"run {number} of {len(runs)} | {cell}", folder, flags)
    missing = [cell for cell, folder, _ in runs if not (folder / "row.json").exists()]
    if missing:
        print(f"\nother processes are at work on {', '.join(missing)}: the last one tabulates")
    else:
        tabulate(name, runs, args.seeds, rest, arguments)


def check_flags(name, cells, rest):
    """UsageError for a flag that the study sets itself"""
    own = {"--out", "--seed"}
    for flags in cells.values():
        own |= {word for word in flags.split() if word.startswith("--")}
    given = {word.split("=")[0] for word in rest}
    if wrong := sorted((own - MAY_DIFFER) & given):
        raise UsageError(f"leave out {', '.join(wrong)}: the runs of the study {name} say that "
                         "themselves")


def study_name(name, rest):
    """The name of its folder and of its table: one for each preset"""
    preset = argparse.ArgumentParser(add_help=False)
    preset.add_argument("--preset", default="tiny")
    preset = preset.parse_known_args(rest)[0].preset
    return f"study-{name}" + (f"-{preset}" if preset != "tiny" else "")


def run_folder(name, cell, seed, rest):
    return Path("out") / study_name(name, rest) / re.sub(r"\W+", "-", cell) / str(seed)


def run_cell(title, folder, flags):
    """One run, unless it is finished or another process works on it"""
    row = folder / "row.json"
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(folder / ".cell", timeout=0))
        except filelock.Timeout:            # another process has this run
            return
        if row.exists():                    # only under the lock: it may have just been written
            before = read_json(row, f"remove {folder} to run it again")["flags"]
            if before != flags:
                raise UsageError(f"{folder} was finished as {shlex.join(before)}, not as "
                                 f"{shlex.join(flags)}: give that command, or remove the folder")
            return
        print(f"\n{title}")
        distill.main(flags)
        write_json(row, {"flags": flags} | row_of(folder, distill.parse(flags)))


def row_of(folder, args):
    """A finished run -> the numbers of its row, as a dict"""
    stage = folder / f"stage{args.stage[-1]}"
    student = SSM.from_pretrained(stage).eval()
    about = distill.read_about(stage)
    device = choose_device(args.device)[0]
    states = [student.layers[i].mixer.initial_state(1) for i in student.ssm_layers]
    state_bytes = sum(x.nbytes for x in itertools.chain(*states)) // len(states)
    keys = pass_keys(Tokenizer(args.teacher), args.context // 4, 64)
    return {name: about[name] for name in ("loss", "kl", "top1", "seconds")} | {
        "key": retrieval(student.to(device), keys, device)[1],
        "parameters": sum(p.numel() for p in student.parameters()), "state": state_bytes}


def tabulate(name, runs, seeds, rest, arguments):
    """Mean over the seeds, +- half the range"""
    lines = [f"| {name} | val loss | KL | top-1 | key | parameters | state, bytes per layer "
             "| seconds |", "|---" * 8 + "|"]
    for cell in dict.fromkeys(cell for cell, _, _ in runs):
        rows = [read_json(run_folder(name, cell, seed, rest) / "row.json", "remove its folder")
                for seed in seeds]
        lines.append(f"| {cell} | {summary(rows, 'loss', '.4f')} | {summary(rows, 'kl', '.4f')} | "
                     f"{summary(rows, 'top1', '.1%')} | {summary(rows, 'key', '.2%')} | "
                     f"{rows[0]['parameters']:,} | {rows[0]['state']:,} | "
                     f"{summary(rows, 'seconds', '.0f')} |")
    path = Path("results") / f"{study_name(name, rest)}.md"
    command = f"python -m extras.{name} {shlex.join(arguments)}".strip()
    head = (f"`{command}`, seeds {', '.join(map(str, seeds))}; torch {torch.__version__}, "
            f"{platform.processor() or platform.machine()}")
    with locked(path, wait=True):           # two processes may end at once
        write_file(path, "\n".join([head, "", *lines]) + "\n")
    print("\n" + path.read_text("utf-8") + f"\nsaved {path}")


def summary(rows, key, form):
    """
    >>> summary([{"kl": 0.1}, {"kl": 0.3}], "kl", ".2f")
    '0.20 ± 0.10'
    """
    values = [row[key] for row in rows]
    mean = sum(values) / len(values)
    half_range = (max(values) - min(values)) / 2
    return f"{mean:{form}}" + (f" ± {half_range:{form}}" if len(rows) > 1 else "")


def main(name, cells, common, header):
    run_program(lambda: run_study(name, cells, common, header))
