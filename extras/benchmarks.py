"""Benchmarks of lm-evaluation-harness [1], for teacher and student side by side.

Run:  pip install "lm-eval[hf]"
      python -m extras.benchmarks out/phi --tasks paper              # the paper's six, zero-shot
      python -m extras.benchmarks out/tiny --tasks mine --include_path ~/tasks       # your own

HFLM, the harness's own class for models of transformers, runs both: the teacher is such a model,
and so is the class that extras/export.py writes. No beginning-of-text token is added, since the
student was distilled without one. A text with nothing before it begins with an end of text, as in
the shards.

A student has no window, so no prompt is cut, unless --context gives a limit: then the number of
prompts that were cut is printed. Whole texts (tasks of perplexity) are scored in windows as long as
in training, or of --context.

`paper` prints the paper's table beside these scores, and for each student the share of its
teacher's score that it recovers.

[1] https://github.com/EleutherAI/lm-evaluation-harness    [2] MOHAWK, arXiv 2408.10189
"""
import difflib
import importlib.util
import logging
import math
from pathlib import Path

import torch

from eval import EvaluatedRun, add_run_flags, show
from extras.export import MohawkConfig, MohawkForCausalLM
from model_ssm import UsageError, first_line, go_offline_if_unreachable, write_config
from prepare import Parser, at_least_one, byte_tokenizer, run_program

PAPER = {"winogrande": "acc", "arc_easy": "acc", "arc_challenge": "acc_norm", "piqa": "acc",
         "hellaswag": "acc_norm", "lambada_openai": "acc"}
PUBLISHED = {"Phi-1.5 [2]": (73.4, 75.6, 48.0, 76.6, 62.6, 53.4),           # in %, zero-shot
             "Phi-Mamba [2]": (71.7, 74.0, 44.1, 75.5, 60.2, 50.1)}
TOKENS_AT_ONCE = 2**14      # in a batch, padding included
NO_LIMIT = 2**20            # tokens


def harness_model(model, tokenizer, window, limit=None):
    """A model of transformers -> the harness's HFLM

    window: tokens at once of a text that is scored whole   limit: of a prompt and its answer
    """
    from lm_eval.models.huggingface import HFLM

    class Uncut(HFLM):
        """HFLM would cut from the left, without a word, what is longer than the model's window."""
        prompts = 0
        cut = 0

        def count(self, lengths, most):
            """Prompts of these lengths come. As many at once as fit."""
            self.prompts += len(lengths)
            self.cut += sum(length > most for length in lengths)
            self.batch_size_per_gpu = max(1, TOKENS_AT_ONCE // max(lengths, default=1))

        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            lengths = [len(before) + len(ending) for _, before, ending in requests]
            self.count(lengths, self.max_length + 1)    # the last token is not read
            return super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            prompts = self.prompts
            self._max_length = limit or window
            self.count([self._max_length], math.inf)    # for the size of its batches
            scores = super().loglikelihood_rolling(requests, disable_tqdm)
            self._max_length = limit or NO_LIMIT
            self.prompts = prompts                      # its windows are no prompts
            return scores

        def generate_until(self, requests, disable_tqdm=False):
            lengths = []
            for request in requests:
                text, settings = request.args
                lengths.append(len(self.tok_encode(text))
                               + settings.get("max_gen_toks", self.max_gen_toks))
            self.count(lengths, self.max_length)
            return super().generate_until(requests, disable_tqdm)

    hf = tokenizer.hf or byte_tokenizer(tokenizer.eot)
    hf.pad_token = hf.pad_token or hf.eos_token
    # Both models stop at every end of text that their tokenizer has, whatever their configs say.
    model.generation_config.eos_token_id = list(tokenizer.stop_ids)
    model.generation_config.pad_token_id = tokenizer.eot
    return Uncut(pretrained=model, tokenizer=hf, max_length=limit or NO_LIMIT, batch_size=1,
                 add_bos_token=False, prefix_token_id=tokenizer.eot)


def as_transformers(student):
    """The student as the class of an export; they share their weights"""
    config = MohawkConfig(**write_config(student.config), vocab_size=student.config.vocab_size)
    with torch.device("meta"):              # no memory for weights that are replaced below
        model = MohawkForCausalLM(config)
    model.backbone, model.lm_head = student.backbone, student.lm_head
    model.__dict__["ssm"] = student
    return model.eval()


def scores(run, args):
    """-> {"teacher" | "student": {(task, metric): score}}, {task: number of its examples}

    args: as main declares them
    """
    missing = [p for p in ("lm_eval", "accelerate") if not importlib.util.find_spec(p)]
    if missing:
        raise UsageError('--tasks needs lm-eval: pip install "lm-eval[hf]"')
    from lm_eval import simple_evaluate
    logging.getLogger("lm_eval").setLevel(logging.ERROR)        # it warns about every default
    go_offline_if_unreachable()
    names = expand(args.tasks)
    manager = task_files(names, args.include_path)
    if args.apply_chat_template and not getattr(run.tokenizer.hf, "chat_template", None):
        raise UsageError(f"--apply_chat_template: the tokenizer of {run.args.teacher} has no chat "
                         "template")

    def evaluate(model, **more):
        return simple_evaluate(model, tasks=names, task_manager=manager, limit=args.limit,
                               bootstrap_iters=0, log_samples=False, **more)

    run.teacher.model.set_attn_implementation("sdpa")           # the captured one ignores padding
    models = {"teacher": run.teacher.model, "student": as_transformers(run.student)}
    found = {}
    try:
        # The harness's random model first: mistakes in a task show before hours are spent.
        evaluate("dummy")
        for name, model in models.items():
            harness = harness_model(model, run.tokenizer, run.args.context, args.context)
            results = evaluate(harness, apply_chat_template=args.apply_chat_template)
            found[name] = numbers_of(results["results"])
        if args.context:
            print(f"{harness.cut:,} of {harness.prompts:,} prompts were cut to --context "
                  f"{args.context:,}, their beginning is lost")
    except Exception as error:              # a task's template or metric may raise anything
        raise UsageError(f"--tasks {' '.join(names)}: {type(error).__name__}: "
                         f"{first_line(error)}") from error
    return found, {task: row["effective"] for task, row in results["n-samples"].items()}


def expand(names):
    """
    >>> expand(["mine", "paper"])[:2]
    ['mine', 'winogrande']
    """
    tasks = []
    for name in names:
        tasks += PAPER if name == "paper" else [name]
    return tasks


def numbers_of(results):
    """{task: {"acc,none": number, ...}} -> {(task, "acc"): number}. none: no filter was used"""
    numbers = {}
    for task, row in results.items():
        for key, value in row.items():
            if "," in key and "_stderr" not in key and isinstance(value, float | int):
                numbers[task, key.removesuffix(",none")] = value
    return numbers


def task_files(names, include_path):
    """-> the harness's TaskManager that has all tasks in `names`; UsageError if one is unknown"""
    import yaml
    from lm_eval.tasks import TaskManager
    manager = None
    if include_path:
        if not Path(include_path).is_dir():
            raise UsageError(f"--include_path {include_path}: no such folder")
        for file in sorted(Path(include_path).rglob("*.yaml")):
            try:                            # the harness skips a file that it cannot parse
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
    """Print the scores of both models; those of `paper` beside the published ones"""
    others = list(found["student"])
    if "paper" in names:
        others = [key for key in others if key not in PAPER.items()]
        measured = {}
        for name, numbers in found.items():
            measured[name] = [100 * numbers[key] for key in PAPER.items()]
        show(["zero-shot, %", *PAPER, "mean"], ["", *PAPER.values(), ""],
             ["examples", *(f"{examples[task]:,}" for task in PAPER), ""],
             *paper_rows(measured), *paper_rows(PUBLISHED))
    if others:
        rows = []
        for key in others:
            number = f"{examples[key[0]]:,}" if key[0] in examples else ""
            rows.append([*key, *(f"{found[name][key]:.5g}" for name in found), number])
        show(["task", "metric", "teacher", "student", "examples"], *rows)


def paper_rows(pair):
    """{teacher: six scores, student: six scores} -> a row for each, and one for their ratio"""
    rows = []
    columns = []                    # of each model: its scores, then their mean
    for name, numbers in pair.items():
        with_mean = [*numbers, sum(numbers) / len(numbers)]
        columns.append(with_mean)
        rows.append([name, *(f"{x:.1f}" for x in with_mean)])
    recovered = [y / x if x else math.nan for x, y in zip(*columns, strict=True)]
    return [*rows, ["recovered", *(f"{x:.1%}" for x in recovered)]]


def main(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add_run_flags(add)
    add("--tasks", nargs="+", metavar="TASK", required=True,
        help="names that lm-eval knows, or paper for the paper's six")
    add("--include_path", help="a folder with task files of your own")
    add("--limit", type=at_least_one, help="only so many examples of each task [all]")
    add("--apply_chat_template", action="store_true", help="for a teacher that was made to chat")
    args = parser.parse_args(arguments)
    run = EvaluatedRun(args)
    show_scores(args.tasks, *scores(run, args))


if __name__ == "__main__":
    run_program(main)
