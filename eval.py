"""How close is the student to its teacher? Numbers, samples, and a picture of both mixing matrices.

Run:  python eval.py out/tiny                          # the last stage of a run
      python eval.py out/tiny --stage 1                # an earlier one
      python eval.py out/tiny --prompt "class "        # both go on from here, side by side
      python eval.py out/tiny --picture matrices.png   # before and after stage 1 (needs matplotlib)
      python eval.py out/phi --tasks paper             # its six benchmarks (needs lm-eval)
      python eval.py out/phi --export phi-mamba        # a folder that transformers loads
      python eval.py goombalab/Phi-Mamba               # the published weights, or any model folder

Three distances for each layer, as shares of the teacher's own answer (silence would score 100%):

    matrix    given the teacher's input, || attention - M ||                what stage 1 makes small
    block     given the teacher's input, || its output - the student's ||   what stage 2 makes small
    drift     each model by itself from the tokens on, || teacher's u - student's u ||,
              errors of all layers before added up

It leaves out: speed.

[1] Mamba-2, arXiv 2405.21060    [2] MOHAWK, arXiv 2408.10189
"""
import argparse
import difflib
import importlib.util
import inspect
import json
import logging
import math
import os
import shutil
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import distill
from distill import blocks, choose_device, copy_of_teacher, matrices, open_data
from model_ssm import SSM, UsageError, ask_hub, first_line, read_config
from model_teacher import Teacher, compare, find
from prepare import Parser, Tokenizer, count, run_program


def open_run(path, stage=None):
    """A run folder or one of its stage folders -> (run.json as a dict, run folder, stage folder)

    A model folder of no run, or a hub id, is taken for what the paper's recipe gives.
    """
    path = Path(path)
    run = path if (path / "run.json").is_file() else path.parent
    if not (run / "run.json").is_file():
        hub_id = len(path.parts) == 2 and not path.parent.exists()
        if hub_id or (path / "config.json").is_file():
            as_if = vars(distill.parse(["--preset", "phi", "--data", "stdlib"])) | {"config": None}
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
    student = SSM.from_pretrained(folder).to(device).eval()
    print(f"student {folder} | {student.loaded}")
    if args.export:
        return export(student, args.export, args.teacher or about["teacher"], about, run)
    teacher = Teacher.load(args.teacher or about["teacher"], device)
    if student.config.vocab_size != teacher.config.vocab_size:
        raise UsageError(f"the student has {student.config.vocab_size:,} tokens, its teacher "
                         f"{teacher.name} {teacher.config.vocab_size:,}: they cannot be compared")
    was = argparse.Namespace(**about["arguments"])
    was.teacher = args.teacher or was.teacher
    tokenizer, context = Tokenizer(was.teacher), args.context or was.context
    if args.tasks:
        found = scores({"teacher": teacher, "student": student}, tokenizer, context, device,
                       args.tasks, args.include_path, args.limit)
        return print_scores(args.tasks, *found)
    was.data = was.data if was.stream else about["data"]
    if args.data:
        was.data, was.config = args.data, args.config
        was.stream = args.data != "stdlib" and not Path(args.data).expanduser().exists()
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
        """What follows greedily, up to a stop string, the end of the text, or max_gen_toks"""
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
        said, ended = [], False
        while len(said) < n and not ended:
            # 16 tokens, then twice as many each time: what goes past a stop string is thrown away
            more = min(max(16, len(said)), n - len(said))
            tokens = torch.tensor([prompt + said], device=self.to)
            said = self.model.generate(tokens, more)[0, len(prompt):].tolist()
            if ended := self.eot_token_id in said:
                said = said[:said.index(self.eot_token_id)]
            text = self.encoding.decode(said)
            ended = ended or any(stop in text for stop in stops)
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
                yaml.compose(file.read_text())
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


def print_scores(names, found, examples):
    """What both models scored; for paper beside what the paper's scored"""
    left = list(found["student"])
    if "paper" in names:
        left = [key for key in left if key not in PAPER.items()]
        ours = {name: [100 * found[name][key] for key in PAPER.items()] for name in found}
        rows = [["zero-shot, %", *PAPER, "mean"], ["", *PAPER.values(), ""],
                ["examples", *(f"{examples[task]:,}" for task in PAPER), ""]]
        for pair in (ours, PUBLISHED):
            values = [[*row, sum(row) / len(row)] for row in pair.values()]
            rows += [[name, *(f"{x:.1f}" for x in row)]
                     for name, row in zip(pair, values, strict=True)]
            shares = [y / x if x else math.nan for x, y in zip(*values, strict=True)]
            rows.append(["recovered", *(f"{share:.1%}" for share in shares)])
        print_table(rows)
    if left:
        print_table([["task", "metric", "teacher", "student", "examples"]] + [
            [*key, *(f"{found[name][key]:.5g}" for name in ("teacher", "student")),
             f"{examples[key[0]]:,}" if key[0] in examples else ""] for key in left])


def print_table(rows):
    """Rows of text as a Markdown table, the first one its header.

    >>> print_table([["task", "acc"], ["piqa", "76.6"]])
    <BLANKLINE>
    | task |  acc |
    |------|------|
    | piqa | 76.6 |
    """
    first, *widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"| {' | '.join([f'{name:<{first}}', *map(str.rjust, row, widths)])} |"
             for name, *row in rows]
    rule = "-|-".join("-" * n for n in (first, *widths))
    print("\n".join(["", lines[0], f"|-{rule}-|", *lines[1:]]))


# -----------------------------------------------------------------------------
# --export: a folder for transformers. The two classes are all there is to say, and inspect copies
# them into it from here.

class MohawkConfig(PretrainedConfig):
    """config.json as SSM.from_pretrained reads it, and what transformers asks for besides"""
    model_type = "mohawk"


class MohawkForCausalLM(PreTrainedModel, GenerationMixin):
    """The student as transformers wants a language model. Its parameters keep their names."""
    config_class = MohawkConfig
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}    # where config.json says

    def __init__(self, config):
        super().__init__(config)
        ssm = SSM(read_config(config.to_dict()))
        self.backbone, self.lm_head = ssm.backbone, ssm.lm_head
        self.__dict__["ssm"] = ssm      # not a submodule: its parameters are the two above
        self.post_init()

    def _init_weights(self, module):
        """SSM has its own start; transformers' would overwrite gates and decays."""

    def get_input_embeddings(self):
        return self.backbone["embedding"]

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False                    # past_key_values is SSM's state: a pair for each layer

    def _reorder_cache(self, state, rows):
        return [tuple(x[rows] for x in pair) for pair in state]

    def prepare_inputs_for_generation(self, input_ids, past_key_values=None, attention_mask=None,
                                      use_cache=None, logits_to_keep=1, **_):
        return {"input_ids": input_ids if past_key_values is None else input_ids[:, -1:],
                "past_key_values": past_key_values, "use_cache": use_cache,
                "attention_mask": attention_mask, "logits_to_keep": logits_to_keep}

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False,
                labels=None, logits_to_keep=0, **_):
        state = past_key_values
        if state is None and attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("padding on the left would be read as text: pad on the right, or give "
                             "prompts of one length")
        if state is None and use_cache:
            state = self.ssm.initial_state(len(input_ids))
        h, after = self.ssm.prefill(input_ids, state)
        logits = self.lm_head(h[:, -logits_to_keep:])                               # 0: all of them
        loss = None if labels is None else self.loss_function(logits, labels, logits.shape[-1])
        return CausalLMOutputWithPast(loss, logits, after if state else None)


MODELING = '''"""An exported student, for transformers: AutoModelForCausalLM.from_pretrained(
FOLDER, trust_remote_code=True). model_ssm.py and ssd_kernel.py beside it compute."""
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model_ssm import SSM, read_config
'''
CARD = '''---
library_name: transformers
pipeline_tag: text-generation
base_model: {teacher}
tags: [mohawk, mamba2]
---
A Mamba-2 language model of {layers} layers, distilled from {teacher} with MOHAWK
(https://arxiv.org/abs/2408.10189). Layers that keep attention: {attention}.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{folder}", trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained("{folder}", trust_remote_code=True)
prompt = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))
```

Where there is no attention the state that takes the place of the KV cache does not grow. Prompts of
one batch must have one length: padding would be read as text.

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
    path, options = find(teacher)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **options)
    except Exception as error:                      # the hub client raises a dozen unrelated types
        raise UsageError(f"no tokenizer for {teacher}: {first_line(error)}") from error
    config, partial = student.config, folder.with_name(f".{folder.name}.{os.getpid()}.exported")
    made = {"teacher": teacher, "data": about["data"], "commit": about.get("commit") or "unknown"}
    student.save_pretrained(partial, **made)
    tokenizer.save_pretrained(partial)
    eos = tokenizer.eos_token_id
    GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=eos,
                     pad_token_id=eos).save_pretrained(partial)

    said = json.loads((partial / "config.json").read_text())
    said |= {"model_type": MohawkConfig.model_type, "architectures": [MohawkForCausalLM.__name__],
             "auto_map": {"AutoConfig": "modeling_mohawk.MohawkConfig",
                          "AutoModelForCausalLM": "modeling_mohawk.MohawkForCausalLM"},
             "vocab_size": config.vocab_size, "hidden_size": config.d_model,
             "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
             "tie_word_embeddings": config.tie_embeddings, "dtype": "float32"}
    (partial / "config.json").write_text(json.dumps(said, indent=1) + "\n")

    # In transformers' cache the files are a package, so that one finds the other by a dot. It wants
    # every import to be installed: ssd_kernel's benchmark, which has others, stays here.
    kernel = (here / "ssd_kernel.py").read_text().split(f"\n# {'-' * 77}\n# the benchmark")[0]
    model = (here / "model_ssm.py").read_text().replace("\nfrom ssd_kernel ", "\nfrom .ssd_kernel ")
    classes = "\n\n".join(map(inspect.getsource, (MohawkConfig, MohawkForCausalLM)))
    (partial / "ssd_kernel.py").write_text(kernel)
    (partial / "model_ssm.py").write_text(model)
    (partial / "modeling_mohawk.py").write_text(f"{MODELING}\n\n{classes}")
    shutil.copy(here / "LICENSE", partial)

    kept, report = ", ".join(map(str, config.attn_layers)), run / "report.md"
    (partial / "README.md").write_text(CARD.format(
        folder=folder.name, layers=config.n_layer, attention=kept or "none", **made,
        table=report.read_text() if report.exists() else "No table: its run is not at hand.\n"))
    if folder.exists():
        folder.rmdir()
    partial.rename(folder)
    print(f"saved {folder} | {', '.join(sorted(p.name for p in folder.iterdir()))}")


# -----------------------------------------------------------------------------
# the command line

def parse(arguments=None):
    parser = Parser(__doc__)
    add = parser.add_argument
    add("run", help="a run folder such as out/tiny, one of its stage folders, another model folder "
        "or a hub id")
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
    add("--data", help="another text to read: as for distill.py, a hub data set as a stream "
        "[the run's; without a run stdlib]")
    add("--config", help="which part of a Hugging Face data set")
    add("--tasks", nargs="+", metavar="TASK", help="ask both these questions, and nothing else: "
        "names that lm-eval knows, or paper for the paper's six")
    add("--include_path", help="a folder with task files of your own")
    add("--limit", type=int, help="only so many examples of each task [all]")
    add("--export", metavar="FOLDER", help="write a folder that transformers loads, and stop")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    run_program(main)
