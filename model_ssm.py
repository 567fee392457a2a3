"""The student: a language model with its teacher's layers, and Mamba-2 where attention was.

Run:  python eval.py out/tiny --prompt "def "      # after `python distill.py`: continues the prompt

Two shapes of block cover the teachers. A mixer moves information along the sequence, an MLP works
on each position:

    Phi                             h = LayerNorm(u)        u = u + mixer(h) + MLP(h)
    Llama, Mistral, Qwen, SmolLM    u = u + mixer(RMSNorm(u))
                                    u = u + gated MLP(RMSNorm(u))

u (B, L, D) is the hidden state that passes from layer to layer, h a mixer's input. A student that
keeps the teacher's attention in some layers is a hybrid. distill.py trains the student to match its
teacher in MOHAWK's three stages [2]: stage 1 matches the mixing matrix of each mixer (see Mamba2),
stage 2 the output of each layer, stage 3 the predictions.

The mixer is MOHAWK's discrete Mamba-2 ([2] section 3). e^a, with a <= 0, is the share of a head's
memory that survives a token. Mamba-2 [1] makes a from a time step and a learned rate; here in_proj
computes it from h, through A_log, as it computes q, k and v:

    h -- in_proj --+-- v k q -- causal conv, 4 wide -- ssd(q, k, v, a) + D v --(x)-- out_proj -->
                   +-- A_log -- a = -softplus(A_log) ---^                       |
                   +-- z -------------------------- silu(z + z_bias) -----------+

ssd (state-space duality [1], ssd_kernel.py) moves information along the sequence; Mamba2's
docstring says how. (x) multiplies elementwise: z is a gate. D v skips ssd; this D is a parameter,
one number per head. Sizes: B rows, L tokens, D d_model, H heads, P head_dim, G heads of q and k,
N d_state, K the width of the convolution, C its channels. Parameters and config.json have the names
of the published goombalab/Phi-Mamba: its weights load unchanged.

It leaves out dropout, and any initialisation for training from scratch at scale. Other mixers
subclass Mamba2 in extras/mixers.py.

[1] Mamba-2, arXiv 2405.21060    [2] MOHAWK, arXiv 2408.10189
"""
import contextlib
import hashlib
import json
import math
import os
import pickle
import shutil
import socket
import urllib.parse
import warnings
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from ssd_kernel import at_least_fp32, mixing_matrix, orientation_loss, ssd, ssd_step

SILU_IS_ONE = 1.278464542761    # silu of this is 1: the gate silu(z + z_bias) is open at z = 0
PREFILL = 2048                  # tokens of a prompt read at once: memory is flat in its length
NEVER = 2**30                   # padding's position: after all others, so no text sees it


def phi_frequencies(head_dim):
    """Phi's rotary embedding: base 10,000, over the first half of a head's channels, in pairs."""
    pairs = head_dim // 4
    return tuple(1e4 ** (-i / pairs) for i in range(pairs))


@dataclass
class Config:
    """Shapes. The defaults are Phi-Mamba's; from_teacher takes the teacher's, see shapes_of."""
    vocab_size: int = 51200
    d_model: int = 2048             # D
    n_layer: int = 24
    block: str = "phi"              # "phi": one norm, mixer and MLP in parallel
                                    # "llama": a norm before each, one after the other
    d_mlp: int = 8192
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    n_head: int = 32                # H
    head_dim: int = 64              # P
    # the state-space mixer
    mixer: str = "mamba2"           # or one of extras/mixers.py
    n_qk_head: int = 32             # G. MOHAWK: q and k per head. Plain Mamba-2: one shared pair
    d_state: int = 64               # N
    d_conv: int = 4                 # K
    # attention, in the layers of a hybrid that keep it
    attn_layers: tuple = ()
    n_kv_head: int = 32
    inv_freq: tuple = phi_frequencies(64)           # rotary embedding
    rope_scale: float = 1.0         # a factor on its cos and sin: YaRN's attention factor
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: bool = False           # Qwen3: an RMSNorm on each head's q and k
    window: int | None = None       # a sliding window: a query sees this many keys
    window_layers: tuple | None = None      # the layers that have it; None: all

    @property
    def d_inner(self):
        return self.n_head * self.head_dim


# -----------------------------------------------------------------------------
# MLPs

class MLP(nn.Module):
    """Phi's: fc2(gelu(fc1 h)), with biases."""

    def __init__(self, config):
        super().__init__()
        self.fc1 = nn.Linear(config.d_model, config.d_mlp)
        self.fc2 = nn.Linear(config.d_mlp, config.d_model)

    def forward(self, h):
        return self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class GatedMLP(nn.Module):
    """Llama's: down(silu(gate h) * up h), without biases."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, h):
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


# -----------------------------------------------------------------------------
# The mixers. Each has forward(h, state, mask) -> (output, next state), h and output (B, L, D), and
# initial_state(B). A mixer in Mamba2's place also needs Mamba2's other methods and its attributes,
# which the initialisations at init_mohawk write to: to add one, subclass Mamba2 as extras/mixers.py
# does.
#
# state: what the mixer remembers of the text before h. None, as in training, says that h is the
# start of the text and that no next state is wanted: None is returned in its place.
# mask (B, L): False at padding, which is to the right of each row's text and must leave no trace in
# the state. None: no row has padding. Without a state it may be ignored: no mixer looks ahead.

class Mamba2(nn.Module):
    """Discrete Mamba-2: it moves information along the sequence, in attention's place.

    Causal attention computes y = M v with the mixing matrix M = softmax(q k^T / sqrt(N)), N the
    width of q and k. For the next token it needs all earlier k and v. Mamba-2 computes y = M v with

        M[i,j] = (q_i . k_j) e^(a_(j+1) + ... + a_i)    for j <= i, else 0          [1] eq. 6

    Decays e^(a_t) replace the softmax. The same y comes out of a recurrence, in which N x P numbers
    per head, the state S, hold all of the past:

        S_t = e^(a_t) S_(t-1) + k_t v_t^T       y_t = q_t S_t
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        qk = config.n_qk_head * config.d_state                          # G N
        # How many rows of in_proj make each part. Mamba-2 calls them x, B, C, z, dt, in order.
        self.parts = {"v": config.d_inner, "k": qk, "q": qk, "z": config.d_inner,
                      "a": config.n_head}                               # A_log: one per head
        channels = config.d_inner + 2 * qk                              # C: v, k and q
        self.in_proj = nn.Linear(config.d_model, sum(self.parts.values()), bias=False)
        self.z_bias = nn.Parameter(torch.zeros(config.d_inner))
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels)
        self.D = nn.Parameter(torch.ones(config.n_head))    # the skip's weight: y = M v + D v
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self):
        """MOHAWK's start: convolution and gate are the identity, and D = 1.

        Stage 1 trains M + diag D, the matrix that acts on v (see matrix): q, k, a and D. v, the
        gate and out_proj learn from stage 2 on. At a gate of 1 the output is out_proj of that
        matrix times v, so stage 2 goes on from what stage 1 has learned.
        """
        self.in_proj.reset_parameters()
        self.split_in_proj(self.in_proj.weight)["z"].zero_()
        self.z_bias.fill_(SILU_IS_ONE)                                  # gate: silu(0 + z_bias) = 1
        self.conv1d.weight.zero_()[..., -1] = 1                         # output t = input t
        self.conv1d.bias.zero_()
        self.D.fill_(1)
        self.out_proj.reset_parameters()
        # n_layer mixers add to the hidden state, whose size must not grow with them. GPT-2 divides
        # by sqrt(2 n_layer), for its mixers and MLPs; here the MLPs are the teacher's.
        self.out_proj.weight /= math.sqrt(self.config.n_layer)

    def split_in_proj(self, rows):
        """in_proj's weight, or any tensor with as many rows -> {part: its rows}, as views"""
        return dict(zip(self.parts, rows.split(list(self.parts.values())), strict=True))

    def project(self, h, conv_state=None):
        """h (B, L, D) -> q, k, v, a for ssd, the gate's z, and vkq, the input of the convolution

        conv_state (B, K - 1, C): the convolution's last inputs before h, zeros if None
        """
        c = self.config
        vkq, z, A_log = self.in_proj(h).split(                          # (B, L, C or H P or H)
            [self.conv1d.in_channels, self.parts["z"], self.parts["a"]], -1)
        # self.conv1d only stores the weights: its forward could not go on from conv_state.
        mixed = causal_conv(vkq, self.conv1d.weight, self.conv1d.bias, conv_state)
        v, k, q = mixed.split([self.parts["v"], self.parts["k"], self.parts["q"]], -1)
        v = v.unflatten(-1, (c.n_head, c.head_dim))                     # (B, L, H, P)
        k = k.unflatten(-1, (c.n_qk_head, c.d_state))                   # (B, L, G, N)
        q = q.unflatten(-1, (c.n_qk_head, c.d_state))                   # (B, L, G, N)
        # softplus > 0, so a < 0 for any A_log (in Mamba-2 a parameter has this name). In fp32,
        # because errors of a add up over the sequence.
        a = -F.softplus(A_log.to(at_least_fp32(A_log.dtype)))           # (B, L, H)
        return q, k, v, a, z, vkq

    def forward(self, h, state=None, mask=None):
        """h (B, L, D) -> (B, L, D), next state

        state: the last K - 1 inputs of the convolution (B, K - 1, C), and S (B, H, N, P)
        """
        conv_state, S = state or (None, None)
        q, k, v, a, z, vkq = self.project(h, conv_state)
        if mask is not None:
            k = k * mask[..., None, None]               # padding writes nothing: k v^T = 0
            a = a * mask[..., None]                     # and forgets nothing: e^0 = 1
        # y = M v. M is never made in full: ssd takes O(L) time and memory.
        if state is None:                               # training
            y = ssd(q, k, v, a)                                         # (B, L, H, P)
        elif h.shape[1] == 1:                           # a new token: one step of the recurrence
            y, S = ssd_step(q[:, 0], k[:, 0], v[:, 0], a[:, 0], S)      # (B, H, P)
            y = y[:, None]                                              # (B, 1, H, P)
        else:                                           # a prompt, or the next part of one
            y, S = ssd(q, k, v, a, initial_state=S, return_final_state=True)
        y = y + self.D.to(v.dtype)[:, None] * v                         # skip   (B, L, H, P)
        y = y.flatten(-2) * F.silu(z + self.z_bias.to(z.dtype))         # gate   (B, L, H P)
        next_state = None if state is None else (last_inputs(conv_state, vkq, mask), S)
        return self.out_proj(y), next_state                             # (B, L, D)

    def matrix(self, h):
        """h (B, L, D) -> M + diag D (B, H, L, L), the mixing matrix with its skip

        Stage 1 brings it near the teacher's attention matrix, head by head, through orientation(),
        which never makes it: this is for the initialisations, and for looking. The skip is included
        because attention has none: M and D together must match the diagonal of attention's matrix.
        """
        q, k, _, a, _, _ = self.project(h)
        return mixing_matrix(q, k, a) + torch.diag_embed(self.D[:, None].expand(-1, h.shape[1]))

    def orientation(self, h, q_t, k_t, scale, window=None):
        """Stage 1's loss, which [2] calls matrix orientation: h (B, L, D) -> distance, size

        q_t, k_t, scale, window: of the teacher (_t), as Teacher.factors in model_teacher.py gives
        them. Its attention matrix is A = softmax(q_t k_t^T scale), causal, over the last `window`
        keys if that is given. distance and size are the means over batch and heads of
        || A - matrix(h) ||_F, which is the loss, and of || A ||_F, its scale. Computed in tiles: no
        (L, L) matrix is in memory.
        """
        q, k, _, a, _, _ = self.project(h)
        return orientation_loss(q_t, k_t, scale, q, k, a, self.D, window, return_size=True)

    def initial_state(self, B):
        """The state before any text, for B rows. Its size is the same after any length of text."""
        c = self.config
        weight = self.in_proj.weight                                    # gives device and dtype
        conv_state = weight.new_zeros(B, c.d_conv - 1, self.conv1d.in_channels)
        S = weight.new_zeros(B, c.n_head, c.d_state, c.head_dim, dtype=at_least_fp32(weight.dtype))
        return conv_state, S


def causal_conv(x, weight, bias, before=None):
    """y_t = bias + sum_(i<K) weight[:, 0, i] x_(t - K + 1 + i), each channel by itself.

    x (B, L, C)   weight (C, 1, K)   bias (C)   -> (B, L, C)
    before (B, K - 1, C): the inputs before x, zeros if None
    """
    K = weight.shape[-1]
    x = F.pad(x, (0, 0, K - 1, 0)) if before is None else torch.cat([before, x], dim=1)
    if x.shape[1] == K:             # one output: a sum is faster than the set-up of F.conv1d
        return (x * weight[:, 0].mT.to(x.dtype)).sum(1, keepdim=True) + bias.to(x.dtype)
    y = F.conv1d(x.transpose(1, 2), weight.to(x.dtype), bias.to(x.dtype), groups=x.shape[-1])
    return y.transpose(1, 2)


def last_inputs(conv_state, vkq, mask):
    """conv_state (B, K - 1, C), vkq (B, L, C) -> the last K - 1 of each row before its padding"""
    n = conv_state.shape[1]                                             # K - 1
    inputs = torch.cat([conv_state, vkq], dim=1)                        # (B, K - 1 + L, C)
    if mask is None:
        return inputs[:, inputs.shape[1] - n:]          # not -n, which is all of them where n = 0
    # A row with m tokens of text has its last K - 1 inputs at m, ..., m + K - 2 of `inputs`.
    index = mask.sum(1, keepdim=True) + torch.arange(n, device=mask.device)         # (B, K - 1)
    return inputs.gather(1, index[..., None].expand(-1, -1, inputs.shape[-1]))


class Attention(nn.Module):
    """The teacher's attention, for the layers of a hybrid that keep it.

    Causal, with rotary embedding, grouped queries, a sliding window if the teacher has one, and a
    KV cache. Here G is the number of k/v heads, and T that of the tokens so far, cached and new.
    """

    def __init__(self, config, i):
        super().__init__()
        self.config = config
        limited = config.window_layers is None or i in config.window_layers
        self.window = config.window if limited else None
        kv = config.n_kv_head * config.head_dim
        self.q_proj = nn.Linear(config.d_model, config.d_inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv, bias=config.qkv_bias)
        self.dense = nn.Linear(config.d_inner, config.d_model, bias=config.out_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, h, state=None, mask=None):
        """h (B, L, D) -> (B, L, D), next state

        state: the KV cache, keys and values (B, G, T, P) and their positions (1 or B, T). It grows
        with the text. The first dimension of positions is B only where padding made rows differ.
        """
        B, L, _ = h.shape
        c = self.config
        q = self.q_proj(h).view(B, L, -1, c.head_dim).transpose(1, 2)       # (B, H, L, P)
        k = self.k_proj(h).view(B, L, -1, c.head_dim).transpose(1, 2)       # (B, G, L, P)
        v = self.v_proj(h).view(B, L, -1, c.head_dim).transpose(1, 2)       # (B, G, L, P)
        if c.qk_norm:
            q = self.q_norm(q)
            k = self.k_norm(k)
        q_pos = k_pos = torch.arange(L, device=h.device)[None]              # (1, L)
        if state is not None:
            k_cache, v_cache, cache_pos = state
            # New tokens are numbered from the length of the text so far, without its padding.
            q_pos = q_pos + (cache_pos < NEVER).sum(1, keepdim=True)        # (1 or B, L)
            if mask is not None:
                q_pos = q_pos.where(mask, NEVER)
            k_pos = torch.cat([cache_pos.expand(len(q_pos), -1), q_pos], dim=1)     # (1 or B, T)
        q = rotate(q, q_pos, c.inv_freq, c.rope_scale)
        k = rotate(k, q_pos, c.inv_freq, c.rope_scale)
        if state is not None:
            k = torch.cat([k_cache, k], dim=2)                              # (B, G, T, P)
            v = torch.cat([v_cache, v], dim=2)                              # (B, G, T, P)
            state = k, v, k_pos
        T = k.shape[2]
        seen = None                     # plain causal attention: torch is faster without a mask
        if T > L or mask is not None or (self.window or L) < L:
            distance = q_pos[:, :, None] - k_pos[:, None, :]                # (1 or B, L, T)
            seen = (distance >= 0) & (distance < (self.window or NEVER))
            seen = seen[:, None]                                            # (1 or B, 1, L, T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None,
                                           enable_gqa=True)
        return self.dense(y.transpose(1, 2).flatten(-2)), state

    def initial_state(self, B):
        empty = self.q_proj.weight.new_zeros(B, self.config.n_kv_head, 0, self.config.head_dim)
        return empty, empty, torch.empty(1, 0, dtype=torch.long, device=empty.device)


def rotate(x, position, inv_freq, scale=1.0):
    """Rotary embedding of x (B, H, L, P) at position (1 or B, L).

    Of the first R = 2 len(inv_freq) channels, each pair i and i + R/2 is turned by the angle
    position * inv_freq[i] and multiplied by `scale`.
    """
    # Angles in fp32, as the teacher computes them: in bf16, late positions would get wrong angles.
    frequency = torch.tensor(inv_freq, device=x.device, dtype=torch.float32)
    angle = (position.float()[..., None] * frequency)[:, None]              # (1 or B, 1, L, R/2)
    cos = (angle.cos() * scale).to(x.dtype)
    sin = (angle.sin() * scale).to(x.dtype)
    pairs = len(inv_freq)                                                   # R / 2
    first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class AttentionMixer(nn.Module):
    """Attention under the name that the published hybrid checkpoint gives it: mixer.self_attn."""

    def __init__(self, config, i):
        super().__init__()
        self.self_attn = Attention(config, i)

    def forward(self, h, state=None, mask=None):
        return self.self_attn(h, state, mask)

    def initial_state(self, B):
        return self.self_attn.initial_state(B)


def mixer_class(name):
    """Mamba2 is above. Other mixers are in extras/mixers.py, imported when a config names one."""
    if name == "mamba2":
        return Mamba2
    try:
        from extras.mixers import MIXERS
    except ImportError as error:
        raise UsageError(f"a {name} mixer is in extras/mixers.py, which is missing") from error
    if name not in MIXERS:
        raise UsageError(f"there is no mixer {name}: choose mamba2 or {', '.join(MIXERS)}")
    return MIXERS[name]


# -----------------------------------------------------------------------------
# The model

class Block(nn.Module):
    """One layer: norms, mixer, MLP, in one of the header's two shapes of block

    from_teacher starts all but the mixer from the teacher's weights; distill.py says what each
    stage trains. In a hybrid some mixers are attention, and start from them too.
    """

    def __init__(self, config, i):
        super().__init__()
        self.parallel = config.block == "phi"
        self.input_layernorm = norm(config)
        if i in config.attn_layers:
            self.mixer = AttentionMixer(config, i)
        else:
            self.mixer = mixer_class(config.mixer)(config)
        if not self.parallel:
            self.post_attention_layernorm = norm(config)
        self.mlp = MLP(config) if self.parallel else GatedMLP(config)

    def forward(self, u, state=None, mask=None):
        """u (B, L, D), the hidden state -> the next layer's u (B, L, D), the mixer's next state"""
        h = self.input_layernorm(u)                                     # (B, L, D)
        mixed, state = self.mixer(h, state, mask)                       # (B, L, D)
        if self.parallel:
            return u + mixed + self.mlp(h), state
        u = u + mixed
        return u + self.mlp(self.post_attention_layernorm(u)), state

    # In sharded training (FSDP2) a layer's weights are complete only within forward, orientation
    # and call: distill.shard_student registers the last two. (SSM.matrix and the initialisations
    # are for models that are not sharded.)

    def orientation(self, u, *factors):
        """Stage 1's loss of this layer, given its input u: see Mamba2.orientation"""
        return self.mixer.orientation(self.input_layernorm(u), *factors)

    def call(self, f, *args):
        """f(self, *args): any other function of this layer's weights"""
        return f(self, *args)


def norm(config):
    kind = nn.LayerNorm if config.block == "phi" else nn.RMSNorm
    return kind(config.d_model, eps=config.norm_eps)


class Generation:
    """Writes text, for student and teacher alike: it needs their read() and stepper()."""

    @torch.no_grad()
    def stream(self, prompts, n, temperature=0.0, top_k=None, seed=0):
        """Yields the next token of each prompt (B), n times. Arguments as in generate."""
        if n < 1:
            return
        logits, state = self.read(prompts, n)
        generator = torch.Generator(logits.device).manual_seed(seed)
        token = sample(logits, temperature, top_k, generator)
        yield token
        step = self.stepper(state) if n > 1 else None
        for _ in range(n - 1):
            token = sample(step(token), temperature, top_k, generator)
            yield token

    def generate(self, prompts, n, temperature=0.0, top_k=None, seed=0):
        """prompts: tokens (B, L) -> (B, L + n). A list of B 1-D tensors -> the same, each n longer

        Greedy at temperature 0, otherwise sampled, among the top_k likeliest tokens if given. All
        prompts share the random numbers: what follows one does not depend on the others, and equal
        prompts get equal text. The student's memory grows with n in attention layers only.
        """
        stream = self.stream(prompts, n, temperature, top_k, seed)
        drawn = torch.stack(list(progress_bar(stream, "write", n)), 1)                      # (B, n)
        if isinstance(prompts, torch.Tensor):
            return torch.cat([prompts, drawn], dim=1)
        return [torch.cat(pair) for pair in zip(prompts, drawn, strict=True)]


def prompt_lengths(prompts):
    """The number of tokens of each prompt. UsageError for an empty one: it predicts no token."""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise UsageError("an empty prompt: give at least one token")
    return lengths


class SSM(nn.Module, Generation):
    """The student. A method for each stage: orientation(i, u, ...), block(i, u), logits(tokens)

    In stages 1 and 2 u is the input of the teacher's layer i, so each layer learns by itself. Made
    by from_teacher or from_pretrained; SSM(config) has random weights. SSM layers are those whose
    mixer is not attention: in a hybrid some, otherwise all.
    """

    def __init__(self, config):
        super().__init__()
        unknown = [i for i in config.attn_layers if not 0 <= i < config.n_layer]
        if unknown:
            raise UsageError(f"--attn_layers {unknown[0]}: "
                             f"the model has layers 0 to {config.n_layer - 1}")
        self.config = config
        self.recompute = False          # see run_layer
        self.backbone = nn.ModuleDict({
            "embedding": nn.Embedding(config.vocab_size, config.d_model),
            "layers": nn.ModuleList(Block(config, i) for i in
                                    progress_bar(range(config.n_layer), "allocate layers")),
            "final_layernorm": norm(config)})
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.block == "phi")
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        # As in GPT-2. from_teacher overwrites all but SSM mixers, if its init is not scratch.
        for module in progress_bar(list(self.modules()), "draw random weights"):
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for i in self.ssm_layers:
            self.layers[i].mixer.reset_parameters()

    @property
    def layers(self):
        return self.backbone["layers"]

    @property
    def ssm_layers(self):
        return [i for i in range(self.config.n_layer) if i not in self.config.attn_layers]

    # the three stages ------------------------------------------------------------

    def matrix(self, i, u):
        """What stage 1 trains, in full, for looking: u (B, L, D), the input of SSM layer i -> its
        matrix M + diag D (B, H, L, L)"""
        layer = self.layers[i]
        return layer.mixer.matrix(layer.input_layernorm(u))

    def orientation(self, i, u, *factors):
        """Stage 1's loss, which never has matrix(i, u) in memory: see Mamba2.orientation

        factors: q_t, k_t, scale, window from Teacher.factors(i, u)
        """
        return self.layers[i].orientation(u, *factors)

    def block(self, i, u):
        """Stage 2: u (B, L, D), the input of layer i -> its output (B, L, D)"""
        return self.layers[i](u)[0]

    def logits(self, tokens):
        """Stage 3: tokens (B, L) -> (B, L, V), scores of the next token at each position"""
        return self.head(self.hidden(tokens))

    def hidden(self, tokens):
        """tokens (B, L) -> (B, L, D), after the final norm: the head's input"""
        return self.prefill(tokens, None)[0]

    def head(self, h):
        return self.lm_head(h)                                                      # (..., V)

    def call(self, f, *args):
        """f(self, *args): any other function of the embedding, the final norm and the head, which
        in sharded training are complete only within registered methods, as in Block.call"""
        return f(self, *args)

    def outputs(self, tokens):
        """tokens (B, L) -> the output of each layer, before the final norm: n_layer x (B, L, D)"""
        u = self.backbone["embedding"](tokens)                                      # (B, L, D)
        outputs = []
        for layer in self.layers:
            u = self.run_layer(layer, u)[0]
            outputs.append(u)
        return outputs

    def run_layer(self, layer, u, *more):
        """layer(u, ...). With `recompute`, the backward runs the layer again: less memory."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, u, *more, use_reentrant=False)
        return layer(u, *more)

    # generation ------------------------------------------------------------------

    def initial_state(self, B):
        return [layer.mixer.initial_state(B) for layer in self.layers]

    def prefill(self, tokens, state, mask=None):
        """tokens (B, L) after `state` -> h (B, L, D) for the head, next state. In parallel over L.

        mask (B, L): False where a row is padding, on either side or inside. Tokens are computed as
        if padding were not there. The hidden state at padding is that of the token before it, or
        of the row's first token; in a row of padding alone it means nothing.
        """
        if mask is not None:
            # The mixers want padding on the right, so the text of each row moves to the left.
            order = mask.logical_not().byte().argsort(dim=1, stable=True)           # (B, L)
            moved_to = (mask.cumsum(1) - 1).clamp_min(0)                            # (B, L)
            tokens = tokens.masked_fill(~mask, 0).gather(1, order)      # padding may hold any id
            mask = mask.gather(1, order)
        u = self.backbone["embedding"](tokens)                                      # (B, L, D)
        next_state = []
        # The mask keeps padding out of the state. Without a state it is not needed: padding is now
        # on the right, and a causal mixer passes nothing from there to the text.
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            u, after = self.run_layer(layer, u, before, mask if state else None)
            next_state.append(after)
        h = self.backbone["final_layernorm"](u)
        if mask is not None:            # back to where each token was
            h = h.gather(1, moved_to[..., None].to(h.device).expand_as(h))
        return h, next_state

    def step(self, token, state):
        """One token by the recurrence: token (B), state -> logits (B, V), next state"""
        h, state = self.prefill(token[:, None], state)
        return self.head(h[:, -1]), state

    @torch.no_grad()
    def read(self, prompts, n=0):
        """prompts: tokens (B, L), or a list of B 1-D tensors of any lengths

        -> logits (B, V) after the last token of each, state. Long prompts are read in pieces, so
        that only in attention layers does memory grow with L. n, the number of tokens to come, is
        for the teacher's read(), whose KV cache has a fixed size.
        """
        lengths = torch.tensor(prompt_lengths(prompts), device=prompts[0].device)   # (B)
        even = bool((lengths == lengths[0]).all())
        tokens = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)         # (B, L)
        state = self.initial_state(len(tokens))
        last = None                                     # (B, D), h of each row's last token so far
        for start in range(0, tokens.shape[1], PREFILL):
            piece = tokens[:, start:start + PREFILL]
            unread = lengths - start                    # (B), tokens; <= 0 past a prompt's end
            mask = None
            if not even:
                mask = torch.arange(piece.shape[1], device=unread.device) < unread[:, None]
            h, state = self.prefill(piece, state, mask)
            end = h[:, -1]                              # at padding, that of the token before it
            last = end if last is None else end.where((unread > 0)[:, None], last)
        return self.head(last), state

    def stepper(self, state, capture=None):
        """-> a function: token (B) -> logits (B, V). It updates the state between calls.

        The returned logits are overwritten by the next call.
        capture: turns a function into (replay, its output). On a GPU it is capture_graph unless
        given (a test gives one that needs no GPU), but a hybrid's step is not captured: its state
        grows, and a graph needs the same shapes.
        """
        if capture is None and state[0][0].is_cuda and not self.config.attn_layers:
            capture = capture_graph
        if capture is None:
            def step(token):
                nonlocal state
                logits, state = self.step(token, state)
                return logits
            return step
        # A graph reads and writes the same tensors at each launch: a fixed token and a fixed state.
        static_state = [[x.clone() for x in layer] for layer in state]
        token_in = torch.zeros(len(state[0][0]), dtype=torch.long, device=state[0][0].device)

        def work():
            logits, after = self.step(token_in, static_state)
            copy_state(static_state, after)
            return logits

        replay, logits = capture(work)
        copy_state(static_state, state)                 # capture ran some steps: undo them

        def replayed_step(token):
            token_in.copy_(token)
            replay()
            return logits
        return replayed_step

    # in and out ------------------------------------------------------------------

    @classmethod
    def from_teacher(cls, teacher, attn_layers=(), init="mohawk", tokens=None, **overrides):
        """A student of the teacher's shape, with its weights except in the mixers of SSM layers.

        teacher: model_teacher.Teacher; shapes are its {field of Config: value}, weights() its
            {the student's name of a parameter: tensor}
        attn_layers: numbers of the layers that keep attention, or "all"
        init: how the mixers start, see INITS; or "scratch", which copies nothing from the teacher
        tokens (B, L): for the starts that look at the teacher's attention
        overrides: fields of Config, such as d_state or mixer
        """
        config = Config(**teacher.shapes | overrides)
        config.attn_layers = tuple(range(config.n_layer) if attn_layers == "all" else attn_layers)
        student = cls(config)
        if init == "scratch":
            student.loaded = "no tensor copied from the teacher"        # for the log
            return student
        if init not in INITS:
            raise UsageError(f"--init {init}: choose {', '.join(INITS)} or scratch")
        fresh = student.state_dict()
        weights_t = teacher.weights()
        copied = {name: w.to(fresh[name].dtype) for name, w in weights_t.items() if name in fresh}
        # Only in an SSM layer's mixer may the parameters differ from the teacher's.
        mixers = tuple(f"backbone.layers.{i}.mixer." for i in student.ssm_layers)
        wrong = [name for name in fresh.keys() ^ weights_t.keys() if not name.startswith(mixers)]
        if wrong:
            raise UsageError(f"{teacher.name} and the student do not fit: "
                             f"{sorted(wrong)[0]} is only in one of them")
        student.load_state_dict(fresh | copied, strict=True)
        INITS[init](student, teacher, tokens)
        student.loaded = (f"{len(copied)} tensors copied from the teacher, "
                          f"{len(fresh) - len(copied)} of the mixers fresh")
        return student

    @classmethod
    def from_pretrained(cls, name):
        """name: a model folder in this project's or goombalab/Phi-Mamba's layout, or a hub id

        UsageError unless every tensor that config.json implies is in the file, and no other, and
        both files are as save_pretrained wrote them. (The published ones have no checksums.)
        """
        folder = Path(name)
        if not folder.exists() and str(name).count("/") == 1:
            folder = from_hub(str(name))
        if not (folder / "config.json").is_file():
            raise UsageError(f"no model in {name}: there is no config.json")
        file = read_json(folder / "config.json", WRITTEN_AGAIN)
        shapes, load = open_weights(folder, file.get("weights"))
        config = read_config(file, most_layers=len(shapes))     # a layer has a tensor at least
        how_made = about_of(file, folder)
        with torch.device("meta"):                  # no memory yet, whatever config.json asks for
            expected = {name: w.shape for name, w in cls(config).state_dict().items()}
        if config.tie_embeddings:
            shapes["lm_head.weight"] = shapes.get("backbone.embedding.weight")
        if wrong := sorted({name for name, shape in expected.items() ^ shapes.items()}):
            raise UsageError(f"the weights in {folder} do not fit its config.json: "
                             f"{len(wrong)} tensors differ, first {wrong[0]}")
        weights = load()
        if config.tie_embeddings:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        student = cls(config)
        student.load_state_dict(weights, strict=True)
        student.loaded = f"{len(weights)} tensors loaded, none missing, none left over"
        student.about = how_made
        return student

    def restore_attention(self, teacher, layers):
        """In place: the mixers of these SSM layers become the teacher's attention.

        Stages 1 and 2 teach each layer by itself, given the teacher's input. So a student aligned
        once gives every hybrid, with no more training.
        """
        mixers = {i: self.attention_mixer(teacher, i) for i in layers}
        self.config.attn_layers = tuple(sorted({*self.config.attn_layers, *layers}))
        for i, mixer in mixers.items():
            self.layers[i].mixer = mixer

    def attention_mixer(self, teacher, i):
        """-> a mixer with the attention of the teacher's layer i, on this layer's device"""
        mixer = AttentionMixer(self.config, i)
        mixer.self_attn.load_state_dict(attention_weights(teacher.weights(), i), strict=True)
        weight = self.layers[i].input_layernorm.weight
        return mixer.to(weight.device, weight.dtype)

    def save_pretrained(self, folder, **about):
        """Writes config.json and model.safetensors, in the published layout.

        about: how the model was made, for config.json, which also has both files' checksums
        """
        weights = {name: w.detach().contiguous() for name, w in self.state_dict().items()}
        if self.config.tie_embeddings:
            del weights["lm_head.weight"]
        with replacing(folder) as partial:
            partial.mkdir()
            save_file(weights, partial / "model.safetensors")
            write_json(partial / "config.json", write_config(self.config) | {
                "about": about, "weights": file_checksum(partial / "model.safetensors")})


def check_folder(folder):
    """UsageError if a model folder is not as save_pretrained wrote it. -> how the model was made"""
    file = read_json(folder / "config.json", WRITTEN_AGAIN)
    open_weights(folder, file.get("weights"))
    return about_of(file, folder)


def about_of(file, folder):
    """file: config.json of a model folder, as a dict -> what it says of how the model was made"""
    about = file.get("about", {})
    if not isinstance(about, dict):
        raise UsageError(f"{folder}/config.json is damaged (about is {str(about)[:40]}): "
                         f"{WRITTEN_AGAIN}")
    return about


def open_weights(folder, checksum):
    """-> {name: shape} of the weights in a model folder, and a function that loads them

    checksum: what config.json says of model.safetensors, None in the published layout
    """
    file = folder / "model.safetensors"
    if not file.exists():                           # the published checkpoints
        file = folder / "pytorch_model.bin"
    with damage_in_one_line(file, WRITTEN_AGAIN):
        if file.suffix == ".bin":
            weights = torch.load(file, map_location="cpu", weights_only=True)
            return {name: w.shape for name, w in weights.items()}, lambda: weights
        if checksum is not None and checksum != file_checksum(file):
            raise ValueError("its checksum is not the one in config.json")
        with safe_open(file, "pt") as header:
            shapes = {name: torch.Size(header.get_slice(name).get_shape())
                      for name in header.keys()}
        return shapes, lambda: load_file(file)


def sample(logits, temperature, top_k, generator):
    """logits (B, V) -> tokens (B)"""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = (logits.float() / temperature).softmax(-1)
    # argmax of p / exponential noise is a draw from p. All rows share the noise, so the draw of a
    # row does not depend on the number of rows.
    noise = torch.empty_like(p[0]).exponential_(generator=generator)                # (V)
    return (p / noise).argmax(-1)


def copy_state(target, source):
    """Copies each tensor of each layer's state, in place"""
    for layer, new in zip(target, source, strict=True):
        for x, y in zip(layer, new, strict=True):
            x.copy_(y)


def capture_graph(work):
    """Records work(), which runs on the GPU, as a CUDA graph -> replay, the tensor work returned

    A step of a small batch is hundreds of kernels, each shorter than its launch. replay() is one
    launch, which reads and writes the same tensors as work().
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):              # Triton compiles and cuBLAS tunes: not allowed in a graph
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = work()
    except RuntimeError as error:       # slower, with the same results
        warnings.warn(f"steps without a CUDA graph: {first_line(error)}", stacklevel=2)
        out = work()
        return lambda: out.copy_(work()), out
    return graph.replay, out


# -----------------------------------------------------------------------------
# Teacher -> student: shapes, names, and how the mixers start

# Hugging Face's names of the rotary embeddings that a list of frequencies and one factor describe.
# Other kinds ("dynamic", "longrope") change with the length of the text.
ROPES = ("default", "linear", "llama3", "yarn", "proportional")
ATTENTIONS = {"full_attention", "sliding_attention"}


def windows_of(hf):
    """A Hugging Face configuration -> the sliding window of each layer; None: there is none

    A window is how many keys a query sees: that at its own position and those just before it.
    """
    window = getattr(hf, "sliding_window", None)
    if hf.model_type == "mistral":
        return [window] * hf.num_hidden_layers
    if hf.model_type in ("qwen2", "qwen3"):
        return [window if kind == "sliding_attention" else None for kind in hf.layer_types]
    return [None] * hf.num_hidden_layers                # Phi and Llama


def shapes_of(hf, inv_freq, rope_scale=1.0):
    """A Hugging Face decoder's configuration -> the fields of Config that it decides.

    UsageError for a property of the teacher that the student's blocks lack: an exact copy of its
    layers would be impossible.
    """
    phi = hf.model_type == "phi"
    rope = hf.rope_parameters["rope_type"]
    if rope not in ROPES:
        raise UsageError(f"the teacher's rotary embedding is of the kind {rope!r}, which changes "
                         f"with the length of the text: a student has {', '.join(ROPES)}")
    if other := sorted(set(getattr(hf, "layer_types", None) or ()) - ATTENTIONS):
        raise UsageError(f"the teacher has layers of the kind {other[0]!r}: a student has "
                         f"{', '.join(sorted(ATTENTIONS))}")
    if hf.hidden_act not in (("gelu_new", "gelu_pytorch_tanh") if phi else ("silu",)):
        raise UsageError(f"the teacher's activation {hf.hidden_act} is not one the student has")
    if getattr(hf, "mlp_bias", False) or getattr(hf, "qk_layernorm", False):
        raise UsageError("the teacher has biases in a gated MLP, or norms on Phi's q and k: "
                         "the student has neither")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    attention_bias = getattr(hf, "attention_bias", False)
    windows = windows_of(hf)
    return {"vocab_size": hf.vocab_size, "d_model": hf.hidden_size, "n_layer": hf.num_hidden_layers,
            "block": "phi" if phi else "llama", "d_mlp": hf.intermediate_size,
            "norm_eps": hf.layer_norm_eps if phi else hf.rms_norm_eps,
            "tie_embeddings": hf.tie_word_embeddings,
            "n_head": hf.num_attention_heads, "n_qk_head": hf.num_attention_heads,
            "head_dim": head_dim, "d_state": head_dim,
            "n_kv_head": hf.num_key_value_heads or hf.num_attention_heads,
            "inv_freq": tuple(inv_freq), "rope_scale": rope_scale,
            "qkv_bias": phi or attention_bias or hf.model_type == "qwen2",
            "out_bias": phi or attention_bias, "qk_norm": hf.model_type == "qwen3",
            "window": max((w for w in windows if w), default=None),
            "window_layers": tuple(i for i, w in enumerate(windows) if w)}


def rename(name):
    """A Hugging Face parameter name -> the student's.

    >>> rename("model.layers.3.self_attn.o_proj.weight")
    'backbone.layers.3.mixer.self_attn.dense.weight'
    >>> rename("model.norm.weight"), rename("lm_head.weight")
    ('backbone.final_layernorm.weight', 'lm_head.weight')
    """
    for part_t, part in (("model.embed_tokens.", "backbone.embedding."),
                         ("model.norm.", "backbone.final_layernorm."), ("model.", "backbone."),
                         (".o_proj.", ".dense."), (".self_attn.", ".mixer.self_attn.")):
        name = name.replace(part_t, part)
    return name


# How the mixers start. Each init_* changes the student's mixers in place. Of the teacher
# (model_teacher.py) they use
#   weights()               {the student's name of a parameter: tensor}
#   inputs(tokens, only)    yields (i, u) for each layer i of `only`, u (B, L, D) being its input
#   matrix(i, u)            layer i's attention matrix of each head (B, H, L, L)

def init_mohawk(student, teacher, tokens):
    """The paper's start, which SSM() has made already: see Mamba2.reset_parameters"""


def init_conv(student, teacher, tokens):
    """The paper's start, but with PyTorch's random convolution"""
    for i in student.ssm_layers:
        student.layers[i].mixer.conv1d.reset_parameters()


def init_random(student, teacher, tokens):
    """PyTorch's defaults for all of a mixer's modules"""
    for i in student.ssm_layers:
        student.layers[i].mixer = mixer_class(student.config.mixer)(student.config)


@torch.no_grad()
def init_qkv(student, teacher, tokens):
    """q, k, v and out_proj of each layer from the teacher's attention in that layer

    They have the same roles in both. The convolution starts as the identity, so q k^T starts as
    the teacher's scores, without its rotary embedding, softmax and norms of q and k. Their biases
    go into the convolution's. The bias of the output projection, dense, has no place here.
    """
    weights = teacher.weights()
    for i in student.ssm_layers:
        copy_qkv(student.layers[i].mixer, attention_weights(weights, i))


def attention_weights(weights, i):
    """Teacher.weights() -> layer i's attention: {"q_proj.weight": tensor, ...}"""
    prefix = f"backbone.layers.{i}.mixer.self_attn."
    return {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}


def copy_qkv(mixer, attention):
    """attention: {"q_proj.weight": tensor, ...} of one layer of the teacher, copied into mixer"""
    c = mixer.config
    if (c.n_qk_head, c.d_state) != (c.n_head, c.head_dim):
        raise UsageError("init qkv needs d_state = head_dim and q, k for every head")
    rows = mixer.split_in_proj(mixer.in_proj.weight)
    biases = split_conv_bias(mixer)
    for part in ("v", "k", "q"):
        if part not in rows:        # MetaLA (extras/mixers.py) has a gate in the place of k
            continue
        # q takes the 1 / sqrt(N) of attention's softmax, so that scores start at attention's size.
        scale = c.head_dim ** -0.5 if part == "q" else 1
        rows[part].copy_(scale * per_query_head(attention[f"{part}_proj.weight"], c))
        bias = attention.get(f"{part}_proj.bias")
        if bias is not None:                            # in_proj has no bias; the convolution has
            biases[part].copy_(scale * per_query_head(bias, c))
    mixer.out_proj.weight.copy_(attention["dense.weight"])


def split_conv_bias(mixer):
    """The convolution's bias -> {part: its numbers}, as views: the parts v, k, q in Mamba2"""
    channels = dict(list(mixer.parts.items())[:3])      # the first three go through it
    return dict(zip(channels, mixer.conv1d.bias.split(list(channels.values())), strict=True))


def per_query_head(w, config):
    """(G P, ...) -> (H P, ...): repeats each k or v head for all the query heads that share it"""
    heads = w.unflatten(0, (-1, config.head_dim))                       # (G, P, ...)
    return heads.repeat_interleave(config.n_head // len(heads), dim=0).flatten(0, 1)


START_DECAY = 0.1               # -a of init_fit: a token counts e^-1 ten tokens later


@torch.no_grad()
def init_fit(student, teacher, tokens):
    """init_qkv with slow decays, then two numbers per head that minimise || A - scale M - D I ||_F

    A is the head's attention matrix in the teacher, M the student's mixing matrix without its skip,
    both on what that layer of the teacher reads when it is given these tokens (B, L). q . k is
    multiplied by the scale, some hundredths, because scores are too large without a softmax. It is
    0 where least squares would make it negative, where M is 0, and where M is a multiple of I,
    which D can replace.

    q and k are multiplied by the scale's square root each. With all of it in q, q's weights would
    be some hundred times smaller than k's, and AdamW, which moves all weights by about the same
    step, would change them that much faster. PyTorch's start of a, about -0.7, forgets all but two
    tokens, and training makes that worse: what it does not see it cannot learn to look at.
    """
    init_qkv(student, teacher, tokens)
    student.to(tokens.device)
    layers = teacher.inputs(tokens, only=student.ssm_layers)
    for i, u in progress_bar(layers, "fit the start", len(student.ssm_layers)):
        mixer = student.layers[i].mixer
        rows = mixer.split_in_proj(mixer.in_proj.weight)
        rows["a"].copy_(row_of_decay(student.layers[i].input_layernorm(u.float())))
        mixer.D.zero_()                                 # so that matrix(), M + diag D, gives M
        scale, D = least_squares(student, teacher, i, u)                # (H) each
        mixer.D.copy_(D)
        root = scale.where(scale > 0, 1).sqrt()         # k stays: q = 0 is enough for M = 0
        biases = split_conv_bias(mixer)
        for part, factor in ("q", scale / root), ("k", root):
            factor = factor.to(mixer.D.dtype)[:, None]                  # (H, 1)
            rows[part].unflatten(0, (len(factor), -1)).mul_(factor[..., None])  # (H, N, D), a view
            biases[part].unflatten(0, (len(factor), -1)).mul_(factor)           # (H, N), a view


def row_of_decay(h):
    """h (B, L, D) -> (D), the row of in_proj for which a is about -START_DECAY on all of h

    a = -softplus(A_log), A_log = row . h, without a bias. So the row is the A_log that is wanted,
    -2.25, times `one`, the vector that brings one . h nearest to 1: least squares, with a ridge.
    """
    h = h.flatten(0, 1).double()                                        # (B L, D)
    gram = h.T @ h / len(h)                                             # (D, D)
    gram.diagonal().add_(1e-2 * gram.diagonal().mean())                 # the ridge
    one = torch.linalg.solve(gram, h.mean(0))                           # (D)
    return math.log(math.expm1(START_DECAY)) * one      # softplus(log(e^x - 1)) = x


def least_squares(student, teacher, i, u):
    """-> scale, D (H) of init_fit for layer i, on its inputs u (B, L, D)"""
    sums = 0
    for row in u.float()[:, None]:                                      # (1, L, D), of the batch
        M = student.matrix(i, row)[0].double()                          # (H, L, L)
        A = teacher.matrix(i, row)[0].double()                          # (H, L, L)
        trace_M = M.diagonal(dim1=-2, dim2=-1).sum(-1)                  # (H)
        trace_A = A.diagonal(dim1=-2, dim2=-1).sum(-1)                  # (H)
        sums = sums + torch.stack([
            (M * M).sum((-1, -2)), trace_M, (A * M).sum((-1, -2)), trace_A,
            torch.full_like(trace_M, u.shape[1])])
    # MI is the sum of all entries of M * I, the trace; the others alike. Least squares gives two
    # equations for scale and D: scale MM + D MI = AM and scale MI + D II = AI.
    MM, MI, AM, AI, II = sums                                           # (H) each
    determinant = MM * II - MI * MI                                     # >= 0
    scale = ((AM * II - AI * MI) / determinant).clamp_min(0)
    scale = scale.where(determinant > 1e-12 * MM * II, 0)
    return scale, (AI - scale * MI) / II


INITS = {"mohawk": init_mohawk, "qkv": init_qkv, "fit": init_fit, "conv": init_conv,
         "random": init_random}


# -----------------------------------------------------------------------------
# config.json, in the published layout: Block1, Block2, ... are runs of equal layers, and "core" is
# the layout's word for a mixer.

ATTENTION = "modules.mixers.phi_attention"
MAMBA2 = "modules.mixers.discrete_mamba2"
# The published layout has its own fields for these. The other fields of Config go under "shapes".
IN_MODEL = ("vocab_size", "d_model", "n_layer", "attn_layers", "mixer")
IN_CORE = ("d_state", "n_head", "n_qk_head", "d_conv", "head_dim")


def write_config(config):
    """Config -> config.json as a dict"""
    mixer_kind = MAMBA2 if config.mixer == "mamba2" else f"modules.mixers.{config.mixer}"
    core = {"d_state": config.d_state, "n_v_heads": config.n_head, "n_qk_heads": config.n_qk_head,
            "d_conv": config.d_conv, "conv_bias": True, "expand": config.d_inner / config.d_model,
            "chunk_size": 128, "activation": "identity", "bias": False}
    runs = []
    for i in range(config.n_layer):
        kind = ATTENTION if i in config.attn_layers else mixer_kind
        if runs and runs[-1]["CoreType"] == kind:
            runs[-1]["n_layers"] += 1
        else:
            # The layout has only Phi's BlockType; Config.block, under "shapes", says which it is.
            runs.append({"n_layers": 1,
                         "BlockType": "modules.phi_block", "block_input": {"resid_dropout": 0.0},
                         "CoreType": kind, "core_input": {} if kind == ATTENTION else core})
    # In a model of attention alone every core is empty, so IN_CORE goes under "shapes" too.
    published = IN_MODEL + (IN_CORE if len(config.attn_layers) < config.n_layer else ())
    shapes = {name: value for name, value in asdict(config).items() if name not in published}
    language = {"vocab_size": config.vocab_size, "pad_vocab_size_multiple": 1}
    mixer = {"d_model": config.d_model, "n_layer": config.n_layer, "lm_head_prenorm": "layer"}
    return {"LanguageModel": {"input": language}, "MixerModel": {"input": mixer},
            **{f"Block{i}": run for i, run in enumerate(runs, 1)}, "shapes": shapes}


def read_config(file, most_layers=10**4):
    """config.json as a dict -> Config. Shapes that it does not name are Phi-1.5's, as published.

    UsageError for what is no model's: values of other types, of no possible size, or more than
    `most_layers` layers.
    """
    try:
        language = file["LanguageModel"]["input"]
        model = file["MixerModel"]["input"]
        blocks = [block for name, block in file.items() if name.startswith("Block")]
        kinds = []                                      # of each layer
        cores = {}                                      # kind -> the mixer's own fields
        if not all(0 < block["n_layers"] <= most_layers for block in blocks):
            raise ValueError(f"a block of {[block['n_layers'] for block in blocks]} layers")
        for block in blocks:
            kinds += [block["CoreType"]] * block["n_layers"]
            cores[block["CoreType"]] = block["core_input"]
        multiple = language.get("pad_vocab_size_multiple", 8)
        others = [kind for kind in cores if kind != ATTENTION]
        shapes = {"vocab_size": -(-language["vocab_size"] // multiple) * multiple,
                  "d_model": model["d_model"], "n_layer": len(kinds), "d_mlp": 4 * model["d_model"],
                  "attn_layers": tuple(i for i, kind in enumerate(kinds) if kind == ATTENTION)}
        if others:
            shapes |= core_shapes(others[0], cores[others[0]], model["d_model"])
        shapes |= file.get("shapes", {})
        unknown = sorted(set(shapes) - {field.name for field in fields(Config)})
        if unknown or len(others) > 1 or len(kinds) != model["n_layer"]:
            raise ValueError(f"it has {len(kinds)} of {model['n_layer']} layers, {set(kinds)}, "
                             f"{unknown}")
        config = Config(**{name: tuple(value) if isinstance(value, list) else value
                           for name, value in shapes.items()})
        check_sizes(config)
    except DAMAGE as error:
        missing = f"{error} is missing" if isinstance(error, KeyError) else first_line(error)
        raise UsageError("config.json is not one of this project's or of Phi-Mamba's: "
                         f"{missing}") from error
    return config


def check_sizes(config):
    """ValueError for a field of another type than Config declares, or of no possible size"""
    for field in fields(config):
        value = getattr(config, field.name)
        declared = int | float if field.type is float else field.type
        number = isinstance(value, int | float) and field.type is not bool
        if (not isinstance(value, declared) or isinstance(value, bool) != (field.type is bool)
                or number and not 0 < value < (100 if field.type is float else 2**31)):
            raise ValueError(f"{field.name} is {str(value)[:40]}")
    numbered = (*config.attn_layers, *(config.window_layers or ()))
    if not all(i in range(config.n_layer) for i in numbered):
        raise ValueError(f"it names layers {numbered} of {config.n_layer}")
    if not all(isinstance(x, int | float) and 0 <= x <= 1 for x in config.inv_freq):
        raise ValueError(f"inv_freq is {str(config.inv_freq)[:40]}")
    if (2 * len(config.inv_freq) > config.head_dim or config.block not in ("phi", "llama")
            or config.n_head % config.n_qk_head or config.n_head % config.n_kv_head):
        raise ValueError(f"its heads or blocks do not fit: {str(config)[:200]}")


def core_shapes(kind, core, d_model):
    """A mixer's core_input -> the fields of Config that it decides"""
    if (core["activation"], core["bias"], core["conv_bias"]) != ("identity", False, True):
        raise UsageError("config.json asks for a mixer with an activation or with other "
                         "biases than this one has")
    H = core["n_v_heads"]
    P = round(d_model * core["expand"]) // H
    if P > 2**16:                                   # before a list of that length is made of it
        raise ValueError(f"heads of {P} channels")
    return {"mixer": "mamba2" if kind == MAMBA2 else kind.removeprefix("modules.mixers."),
            "d_state": core["d_state"], "n_head": H, "n_qk_head": core["n_qk_heads"],
            "d_conv": core["d_conv"], "head_dim": P, "n_kv_head": H,
            "inv_freq": phi_frequencies(P)}


# -----------------------------------------------------------------------------
# What every file of the project needs: errors as one line, progress bars, files, and the Hugging
# Face hub

class UsageError(Exception):
    """An error that the user can fix. The programs print it as one line, with exit code 2."""


def first_line(error):
    """The message of another library's error, cut to one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def progress_bar(items, doing, total=None):
    """The items of an iterable, with a bar if they take more than two seconds; it does not stay."""
    return tqdm(items, desc=doing, total=total, delay=2, mininterval=0.5, leave=False,
                disable=os.environ.get("RANK", "0") != "0")


# What reading a damaged file raises: json and safetensors, and what is built of what they read
DAMAGE = (OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
          RuntimeError, MemoryError, SafetensorError, pickle.UnpicklingError)
WRITTEN_AGAIN = "copy it again from where it came, or run what wrote it again with --fresh"


@contextlib.contextmanager
def damage_in_one_line(path, cure):
    """Within, what a damaged or missing file raises becomes a UsageError with the file's name."""
    try:
        yield
    except DAMAGE as error:
        raise UsageError(f"{path} is missing or damaged ({first_line(error)}): {cure}") from error


@contextlib.contextmanager
def replacing(path):
    """Yields a path beside `path`: the file or folder that is written there takes `path`'s place.

    It is on the disk before it gets its name. So a kill, a full disk or a power cut leaves the old
    one or the new one, never half of one. (A folder is replaced in two steps. A kill between them
    leaves the old one as .NAME.old, which the next call puts back.) What is left beside it the next
    call removes: only one process at a time may write `path`. UsageError if it cannot.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    old = path.with_name(f".{path.name}.old")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        delete(partial)
        if old.exists() and not path.exists():
            old.rename(path)
        delete(old)
        yield partial
        for written in (*partial.rglob("*"), partial):
            flush(written)
        if path.is_dir():                           # nothing can be renamed to its name
            path.rename(old)
        partial.replace(path)
        flush(path.parent)
        delete(old)
    except (OSError, RuntimeError, SafetensorError) as error:   # a full disk is one of these
        delete(partial)
        raise UsageError(f"cannot write {path}: {first_line(error)}") from error


def flush(path):
    """Wait until a file's bytes, or a folder's names, are on the disk and not only in its cache."""
    if os.name == "posix":                          # elsewhere a folder cannot be opened
        number = os.open(path, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


def delete(path):
    """A file, or a folder with all in it, if it is there"""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_file(path, text):
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path, values):
    """values: a dict. Its checksum is added, by which read_json notices any change."""
    values = json.loads(json.dumps(values))         # as read_json will see them: no tuples
    values["checksum"] = json_checksum(values)
    write_file(path, json.dumps(values, indent=1) + "\n")


def read_json(path, cure):
    """A file with a JSON object -> dict, without its checksum. (Files of others have none.)

    UsageError, which names the file and the cure, if it is missing, damaged or was changed.
    """
    with damage_in_one_line(path, cure):
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        checksum = values.pop("checksum", None)
        if checksum not in (None, json_checksum(values)):
            raise ValueError("it was changed after it was written: its checksum differs")
        return values


def json_checksum(values):
    return f"crc32 {zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def file_checksum(path):
    """xxh3 of the bytes: gigabytes a second"""
    import xxhash           # here, since extras/export.py's models load this file without it
    with open(path, "rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def go_offline_if_unreachable():
    """If the hub's name does not resolve, use only the files cached on this machine.

    huggingface_hub alone does that after half a minute of retries and a page of warnings.
    """
    import huggingface_hub
    from huggingface_hub import constants
    huggingface_hub.utils.logging.set_verbosity_error()
    proxies = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
    if any(os.environ.get(name) for name in proxies):       # the proxy resolves names
        return
    try:
        socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def from_hub(name):
    """A hub id -> the folder in the local cache with its config and weights"""
    from huggingface_hub import snapshot_download
    go_offline_if_unreachable()
    files = ["config.json", "model.safetensors", "pytorch_model.bin"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:                      # the hub client raises a dozen unrelated types
        raise UsageError(f"no folder {name} here, and the hub does not give it: "
                         f"{first_line(error)}") from error
