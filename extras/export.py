"""A folder that transformers loads: weights, code, tokenizer, generation settings, a model card.

Run:  python -m extras.export out/tiny tiny-mamba          # the last stage of a run
      python -m extras.export out/phi phi-mamba --stage 2

      model = AutoModelForCausalLM.from_pretrained("tiny-mamba", trust_remote_code=True)

To load it one needs transformers and torch, and nothing of this project: model_ssm.py and
ssd_kernel.py are copied into the folder (imports between them get a dot, since transformers makes a
package of it), and the three classes below become modeling_mohawk.py.

generate() runs on the recurrent state. Padding may stand on either side, a conversation continues
from a state, and Trainer trains it. What it cannot do it refuses by name: see CARD.
"""
import inspect
import json

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from eval import add_run_flags, open_run
from model_ssm import SSM, UsageError, read_config, read_json, replacing, WRITTEN_AGAIN
from prepare import Parser, Tokenizer, byte_tokenizer, locked, nonempty, run_program


# -----------------------------------------------------------------------------
# What becomes modeling_mohawk.py: these classes are copied as text, so they may use only what
# MODELING imports.

class MohawkConfig(PretrainedConfig):
    """config.json as SSM.from_pretrained reads it, and the fields that transformers adds"""
    model_type = "mohawk"
    use_cache: bool = True


class MohawkState:
    """The recurrent state of a batch, where transformers expects its Cache.

    layers: the state as SSM has it, None: no state is returned
    length: how many tokens were read, padding included
    last (B, 1, D): the final hidden state of each row's last token
    """
    is_compileable = is_croppable = False               # generate looks these up
    is_linear = (False,)                # generate uses get_seq_length() where one is False

    def __init__(self, layers, length=0, last=0.0):
        self.layers = layers
        self.length = length
        self.last = last

    def get_seq_length(self, layer_idx=0):
        return self.length

    def reorder_cache(self, rows):
        """Row i continues from row rows[i]: beam search needs that."""
        def select(x):
            shared = len(x) != len(self.last)           # positions may be one row for all
            return x if shared else x[rows.to(x.device)]

        self.layers = [tuple(map(select, layer)) for layer in self.layers]
        self.last = select(self.last)

    def batch_repeat_interleave(self, n):
        """Each row n times, so that several texts continue from one"""
        self.reorder_cache(torch.arange(len(self.last)).repeat_interleave(n))


class MohawkForCausalLM(PreTrainedModel, GenerationMixin):
    """The student with the interface of transformers' language models, parameter names unchanged"""
    config_class = MohawkConfig
    supports_gradient_checkpointing = True
    _is_stateful = True                 # a state cannot be rolled back: no assisted generation
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"lm_head.weight": "backbone.embedding.weight"}    # if config.json says so
    _loss_options = ("num_items_in_batch", "shift_labels", "ignore_index")

    def __init__(self, config):
        super().__init__(config)
        ssm = SSM(read_config(config.to_dict()))
        self.backbone = ssm.backbone
        self.lm_head = ssm.lm_head
        # Not a submodule, or each parameter would have two names.
        self.__dict__["ssm"] = ssm
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, past_key_values=None, labels=None,
                use_cache=None, logits_to_keep=0, cache=None, **others):
        """input_ids (B, L) -> the loss, if there are labels (B, L); logits (B, L, V), or the last
        logits_to_keep of them; the next state

        attention_mask (B, tokens read before + L): 0 where a row is padding, on any side. Each row
            has the logits that it has without padding; padding has those of the token before it.
        past_key_values, which newer versions call cache: the state that an earlier call returned.
            It is not changed.
        """
        self.refuse(input_ids, others)
        state = self.state_before(input_ids, past_key_values, cache, use_cache)
        mask = self.text_mask(input_ids, attention_mask, others.get("position_ids"), state.length)
        self.ssm.recompute = self.gradient_checkpointing and self.training
        h, layers = self.ssm.prefill(input_ids, state.layers, mask)                 # (B, L, D)
        if mask is not None:
            # Padding before a row's first token continues from what this row read last.
            started = mask.cumsum(1)[..., None].to(h.device) > 0                    # (B, L, 1)
            h = h.where(started, state.last)
        if state.layers is not None:
            state = MohawkState(layers, state.length + h.shape[1], h[:, -1:].clone())
        if isinstance(logits_to_keep, int):     # else a tensor of positions
            logits_to_keep = slice(-logits_to_keep, None)       # 0: all of them
        logits = self.lm_head(h[:, logits_to_keep])                                 # (B, ., V)
        loss = None
        if labels is not None:
            if mask is not None:                # a row's first token is predicted from nothing
                labels = labels.masked_fill(mask.cumsum(1) < 2, -100)
            options = {name: others[name] for name in self._loss_options if name in others}
            loss = self.loss_function(logits, labels, logits.shape[-1], **options)
        # By position, since the third is called past_key_values in one version, cache in another.
        return CausalLMOutputWithPast(loss, logits, None if state.layers is None else state)

    def refuse(self, input_ids, others):
        """TypeError for arguments that would change the logits and that this model cannot take"""
        refused = [name for name, value in others.items() if value is not None
                   and value is not False and name not in ("position_ids", *self._loss_options)]
        if refused or input_ids is None:
            raise TypeError(f"this model takes input_ids, and not {', '.join(refused) or 'None'}")
        places = set(map(str, getattr(self, "hf_device_map", {}).values()))
        if len(places) > 1 and places & {"cpu", "disk"}:
            raise ValueError("device_map left layers on the CPU or on disk: this model computes "
                             "where its weights are, on one device or on several GPUs")

    def state_before(self, input_ids, past_key_values, cache, use_cache):
        """The state to continue from, whichever name it came by"""
        if past_key_values is not None and cache is not None:
            raise TypeError("past_key_values and cache are two names of one thing: give one")
        state = past_key_values if cache is None else cache
        B = len(input_ids)
        if state is None:
            if use_cache is None:               # training needs no state
                use_cache = self.config.use_cache and not self.training
            return MohawkState(self.ssm.initial_state(B) if use_cache else None)
        if not isinstance(state, MohawkState):
            raise TypeError(f"a {type(state).__name__} is no state of this model: give none at "
                            "first, then the one that forward or generate returned")
        if len(state.last) != B:
            raise ValueError(f"the state is of {len(state.last)} texts and input_ids of {B}: "
                             "its batch_repeat_interleave(n) makes n of each")
        return state

    def text_mask(self, input_ids, attention_mask, position_ids, length):
        """-> (B, L), False where a row is padding; None if there is no padding

        length: tokens read before
        position_ids: a recurrence has no use for them, so they must count up by one
        """
        B, L = input_ids.shape
        mask = torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is not None:
            if attention_mask.shape != (B, length + L):
                raise ValueError(f"attention_mask {tuple(attention_mask.shape)} should be ({B}, "
                                 f"{length + L}): {length} tokens read before and {L} new ones")
            mask = attention_mask[:, length:].bool()
        if position_ids is not None:
            offset = position_ids - mask.cumsum(1)                                  # (B, L)
            first = offset.gather(1, mask.int().argmax(1, keepdim=True))
            if ((offset != first) & mask).any():
                raise ValueError("position_ids do not count up by one: texts packed into one row "
                                 "would be read as one text")
        return None if mask.all() else mask

    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, **kwargs):
        """next_sequence_length: how many tokens at the end of input_ids are new; None: all"""
        if next_sequence_length is not None and next_sequence_length < 1:
            raise ValueError("the state has read all of input_ids: give the whole text, with the "
                             "new tokens at its end")
        return super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, **kwargs)

    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False                    # forward makes its own state

    # what resize_token_embeddings and others call -------------------------------

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
        """SSM initialises itself; this is for the rows that resize_token_embeddings adds."""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)


# -----------------------------------------------------------------------------
# The folder

MODELING = '''"""An exported student, for transformers: AutoModelForCausalLM.from_pretrained(
FOLDER, trust_remote_code=True). The model itself is in model_ssm.py and ssd_kernel.py."""
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

Layers without attention have a state of constant size instead of a KV cache. Prompts of one batch
may have any lengths, padded on either side: with its attention_mask each row continues as it would
by itself. A conversation continues from the state that `forward` or `generate(...,
return_dict_in_generate=True)` returned; a later call does not change it. Trainer trains it.
Refused: inputs_embeds, position_ids of packed texts, output_hidden_states, output_attentions,
caches of transformers' own, assisted generation, and layers that device_map leaves on the CPU or on
disk.

{table}
Data: {data}. Commit of the code: {commit}.
'''


def export(student, folder, teacher, about, run):
    """Write student, code, the teacher's tokenizer and a model card; all of it or nothing.

    about: run.json of the student's run    run: the run's folder, which may have a report.md
    """
    folder = Path(folder).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already, and not empty")
    tokenizer = Tokenizer(teacher)
    tokenizer.check_rows(student.config.vocab_size)
    made = {"teacher": teacher, "data": about["data"], "commit": about.get("commit") or "unknown"}
    with locked(folder), replacing(folder) as partial:
        student.save_pretrained(partial, **made)
        add_to_config(partial / "config.json", student.config)
        write_tokenizer(tokenizer, student.config.vocab_size, partial)
        write_code(partial, student.config.mixer)
        write_card(partial / "README.md", folder.name, student.config, made, run / "report.md")
    print(f"saved {folder} | {', '.join(sorted(p.name for p in folder.iterdir()))}")


def add_to_config(path, config):
    """Add the fields that transformers looks for to those of the published layout

    Without checksums: transformers would keep them when the model was trained on and saved.
    """
    values = read_json(path, WRITTEN_AGAIN) | {
        "model_type": MohawkConfig.model_type, "architectures": [MohawkForCausalLM.__name__],
        "auto_map": {"AutoConfig": "modeling_mohawk.MohawkConfig",
                     "AutoModelForCausalLM": "modeling_mohawk.MohawkForCausalLM"},
        "vocab_size": config.vocab_size, "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "tie_word_embeddings": config.tie_embeddings, "dtype": "float32"}
    del values["weights"]
    path.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


def write_tokenizer(tokenizer, rows, folder):
    """rows: the model's vocabulary. An end of text that it cannot write stops nothing."""
    hf = tokenizer.hf or byte_tokenizer(tokenizer.eot)
    hf.save_pretrained(folder)
    stop_ids = [i for i in tokenizer.stop_ids if i < rows]
    GenerationConfig(bos_token_id=hf.bos_token_id, eos_token_id=stop_ids,
                     pad_token_id=tokenizer.eot).save_pretrained(folder)


def write_code(folder, mixer):
    """Copy the files that compute, as a package: imports between them are relative"""
    here = Path(__file__).parent.parent
    files = ["ssd_kernel.py", "model_ssm.py"]
    if mixer != "mamba2":
        files.append("extras/mixers.py")
    for file in files:
        code = (here / file).read_text("utf-8")
        for name in ("ssd_kernel", "model_ssm"):
            code = code.replace(f"\nfrom {name} import", f"\nfrom .{name} import")
        if mixer != "mamba2":
            code = code.replace("from extras.mixers import", "from .mixers import")
        (folder / Path(file).name).write_text(code, "utf-8")
    classes = map(inspect.getsource, (MohawkConfig, MohawkState, MohawkForCausalLM))
    (folder / "modeling_mohawk.py").write_text("\n\n".join([MODELING, *classes]), "utf-8")
    shutil.copy(here / "LICENSE", folder)


def write_card(path, name, config, made, report):
    table = "No table: its run is not at hand.\n"
    if report.exists():
        table = report.read_text("utf-8")
    attention = ", ".join(map(str, config.attn_layers)) or "none"
    path.write_text(CARD.format(folder=name, mixer=config.mixer, layers=config.n_layer,
                                attention=attention, table=table, **made), "utf-8")


def main(arguments=None):
    parser = Parser(__doc__)
    add_run_flags(parser.add_argument)
    parser.add_argument("folder", type=nonempty, help="where to write it: not there yet, or empty")
    args = parser.parse_args(arguments)
    about, run, stage = open_run(args.run, args.stage)
    student = SSM.from_pretrained(stage).eval()
    print(f"student {stage} | {student.loaded}")
    export(student, args.folder, args.teacher or about["teacher"], about, run)


if __name__ == "__main__":
    run_program(main)
