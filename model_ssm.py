"""The student: a language model whose layers are the teacher's, with Mamba-2 where attention was.

Run:  python eval.py out/tiny --prompt "def "      # after `python distill.py`: the student speaks

Two shapes of block cover the teachers; a mixer moves information along the sequence, an MLP works
on each position:

    Phi                                 Llama, Mistral, Qwen, SmolLM
    u --+-- LayerNorm --+-- mixer --+   u -- RMSNorm -- mixer --(+u)-- RMSNorm -- gated MLP --(+)-->
        |               +-- MLP ----+
        +---------------------------+-->

The mixer is MOHAWK's discrete Mamba-2 ([2] section 3): no time step, no learned A; each head's
decay is read off the input h (B, L, D).

    h -- in_proj --+-- v k q -- causal conv, 4 wide -- ssd(q, k, v, a) + D v --(x)-- out_proj -->
                   +-- a = -softplus(A_log) ------------^                       |
                   +-- z -------------------------- silu(z + z_bias) -----------+

Seven other mixers stand below a ruler of their own; the same wrapper, another operator (--mixer).
Parameter names and config.json are those of the published goombalab/Phi-Mamba, so its weights load
as they are.
It leaves out: dropout, and any initialisation for training at scale from nothing.

[1] Mamba-2, arXiv 2405.21060    [2] MOHAWK, arXiv 2408.10189
"""
import json
import math
import os
import shutil
import socket
import urllib.parse
import warnings
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint

from ssd_kernel import (
    channel_chunked, channel_step, delta_rule, delta_step, distance_in_full, mixing_matrix,
    orientation_loss, per_head, ssd, ssd_step, wide)

SILU_IS_ONE = 1.278464542761    # silu of this is 1: with this bias alone a gate is exactly open
PREFILL = 2048                  # tokens of a prompt read at once, so memory is flat in its length
NEVER = 2**30                   # the position of padding: later than any token, so none looks at it


class UsageError(Exception):
    """Something the user can mend. The programs print it as one line and leave with exit code 2."""


def first_line(error):
    """What another library's error says, short enough for a line of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def phi_frequencies(head_dim):
    """Phi's rotary embedding: base 10,000 over the first half of a head's channels.

    One frequency per pair of them.
    """
    pairs = head_dim // 4
    return tuple(1e4 ** (-i / pairs) for i in range(pairs))


@dataclass
class Config:
    """Shapes; defaults are Phi-Mamba's. What the teacher has too comes from it, see shapes_of."""
    vocab_size: int = 51200
    d_model: int = 2048             # D
    n_layer: int = 24
    block: str = "phi"              # "phi": one norm, mixer and MLP side by side
                                    # "llama": two norms, one after the other
    d_mlp: int = 8192
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    n_head: int = 32                # H
    head_dim: int = 64              # P
    # the SSM's own
    mixer: str = "mamba2"           # or another of MIXERS
    n_qk_head: int = 32             # G; MOHAWK: q and k per head; plain Mamba-2: one shared pair
    d_state: int = 64               # N
    d_conv: int = 4
    # attention, in the layers that keep it
    attn_layers: tuple = ()
    n_kv_head: int = 32
    inv_freq: tuple = phi_frequencies(64)           # rotary embedding
    rope_scale: float = 1.0         # its cos and sin times this: YaRN's attention factor
    qkv_bias: bool = True
    out_bias: bool = True
    qk_norm: bool = False
    window: int | None = None       # how many keys attention sees, where that is limited
    window_layers: tuple | None = None      # the layers where it is; None: in all

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
    """Llama's: down(silu(gate h) * up h), without."""

    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.up_proj = nn.Linear(config.d_model, config.d_mlp, bias=False)
        self.down_proj = nn.Linear(config.d_mlp, config.d_model, bias=False)

    def forward(self, h):
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


# -----------------------------------------------------------------------------
# the mixers: forward(h, state, real) -> (output, next state)
# state None: the text begins here, and nothing is kept
# real (B, L): False where a row is padding, which is to the right of its text here, and leaves no
# trace in the state; None: all is text

def causal_conv(x, weight, bias, before=None):
    """y_t = bias + sum_i weight[:, 0, i] x_(t - K + 1 + i), each channel by itself.

    x (B, L, C)   weight (C, 1, K)   bias (C)   -> (B, L, C)
    before (B, K - 1, C): what came before x, zeros if None
    """
    K = weight.shape[-1]
    x = F.pad(x, (0, 0, K - 1, 0)) if before is None else torch.cat([before, x], dim=1)
    if x.shape[1] == K:             # one output: conv1d would prepare for longer than it computes
        return (x * weight[:, 0].mT.to(x.dtype)).sum(1, keepdim=True) + bias.to(x.dtype)
    y = F.conv1d(x.transpose(1, 2), weight.to(x.dtype), bias.to(x.dtype), groups=x.shape[-1])
    return y.transpose(1, 2)


class Mamba2(nn.Module):
    """Discrete Mamba-2: all that attention does here, with a state of N x P numbers per head."""
    operator, operator_step = staticmethod(ssd), staticmethod(ssd_step)
    gates = staticmethod(lambda config: config.n_head)      # how many rows: an A_log for each head
    has_keys = True                                         # a projection, as the teacher's are

    def __init__(self, config):
        super().__init__()
        self.config, qk = config, config.n_qk_head * config.d_state
        # rows of in_proj: v, k, q, z, gates
        self.sizes = [config.d_inner, qk, qk, config.d_inner, self.gates(config)]
        channels = sum(self.sizes[:3])
        self.in_proj = nn.Linear(config.d_model, sum(self.sizes), bias=False)
        self.z_bias = nn.Parameter(torch.zeros(config.d_inner))
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels)
        self.D = nn.Parameter(torch.ones(config.n_head))
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    @torch.no_grad()
    def reset_parameters(self):
        """MOHAWK's start: the conv passes input through, the gate is exactly 1 (z = 0), D = 1."""
        self.in_proj.reset_parameters()
        self.in_proj.weight.split(self.sizes)[3].zero_()
        self.z_bias.fill_(SILU_IS_ONE)
        self.conv1d.weight.zero_()[..., -1] = 1
        self.conv1d.bias.zero_()
        self.D.fill_(1)
        self.out_proj.reset_parameters()
        self.out_proj.weight /= math.sqrt(self.config.n_layer)

    def project(self, h, before=None):
        """h (B, L, D) -> q, k, v, a, z and the conv's input

        q, k (B, L, G, N)   v (B, L, H, P)   a (B, L, H) <= 0   z (B, L, H P)
        of another mixer: what its operator takes, z, and the conv's input
        """
        c = self.config
        vkq, z, gates = self.in_proj(h).split([sum(self.sizes[:3]), *self.sizes[3:]], dim=-1)
        mixed = causal_conv(vkq, self.conv1d.weight, self.conv1d.bias, before)
        v, k, q = mixed.split(self.sizes[:3], dim=-1)           # Mamba-2 calls them x, B, C
        q, k = (x.unflatten(-1, (c.n_qk_head, c.d_state)) for x in (q, k))
        return *self.operands(q, k, v.unflatten(-1, (c.n_head, c.head_dim)), gates), z, vkq

    def operands(self, q, k, v, A_log):
        """-> what the operator takes: here q, k, v, a"""
        return q, k, v, -F.softplus(A_log.to(wide(A_log.dtype)))

    def forward(self, h, state=None, real=None):
        """h (B, L, D) -> (B, L, D)

        state: (last K - 1 inputs of the conv, S (B, H, N, P)), of constant size
        """
        before, *S = state or (None, None)
        q, k, v, *a, z, vkq = self.project(h, before)
        if real is not None:                        # padding writes nothing and forgets nothing
            k, *a = (x * real.view(*real.shape, *[1] * (x.dim() - 2)) for x in (k, *a))
        y, *S = self.mix((q, k, v, *a), *S)
        y = y + self.D.to(v.dtype)[:, None] * v                                     # (B, L, H, P)
        y = self.out_proj(y.flatten(-2) * F.silu(z + self.z_bias.to(z.dtype)))      # (B, L, D)
        return y, state and (last_inputs(before, vkq, real), *S)

    def mix(self, operands, S=None):
        """What the operator takes, after the state S -> y (B, L, H, P), the next state, if any"""
        if S is None:
            return self.operator(*operands), None
        if operands[0].shape[1] == 1:
            y, S = self.operator_step(*(x[:, 0] for x in operands), S)
            return y[:, None], S
        return self.operator(*operands, initial_state=S, return_final_state=True)

    def matrix(self, h):
        """h (B, L, D) -> M + diag D (B, H, L, L): all that happens to v before the gate"""
        q, k, _, a, _, _ = self.project(h)
        return mixing_matrix(q, k, a) + torch.diag_embed(self.D[:, None].expand(-1, h.shape[1]))

    def orientation(self, h, q_t, k_t, scale, window=None):
        """-> the distance of this matrix from the teacher's, and the size of that one"""
        q, k, _, a, _, _ = self.project(h)
        return orientation_loss(q_t, k_t, scale, q, k, a, self.D, window, return_size=True)

    def initial_state(self, B):
        c, like = self.config, self.in_proj.weight
        before = like.new_zeros(B, c.d_conv - 1, sum(self.sizes[:3]))
        S = like.new_zeros(B, c.n_head, c.d_state, c.head_dim, dtype=wide(like.dtype))
        return before, S


def last_inputs(before, vkq, real):
    """What the conv needs of each row from here on: before (B, K - 1, C), vkq (B, L, C)

    -> (B, K - 1, C), the last ones that are no padding
    """
    seen, K_1 = torch.cat([before, vkq], dim=1), before.shape[1]
    if real is None:
        return seen[:, -K_1:]
    at = real.sum(1, keepdim=True) + torch.arange(K_1, device=real.device)          # (B, K - 1)
    return seen.gather(1, at[..., None].expand(-1, -1, seen.shape[-1]))


class Attention(nn.Module):
    """The teacher's own attention, for the layers of a hybrid that keep it.

    Rotary, grouped-query, with a KV cache.
    """

    def __init__(self, config, i):
        super().__init__()
        self.config, kv = config, config.n_kv_head * config.head_dim
        limited = config.window_layers is None or i in config.window_layers
        self.window = config.window if limited else None
        self.q_proj = nn.Linear(config.d_model, config.d_inner, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.d_model, kv, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.d_model, kv, bias=config.qkv_bias)
        self.dense = nn.Linear(config.d_inner, config.d_model, bias=config.out_bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)
            self.k_norm = nn.RMSNorm(config.head_dim, eps=config.norm_eps)

    def forward(self, h, state=None, real=None):
        """h (B, L, D) -> (B, L, D)

        state: all keys and values so far, and their positions; it grows with the text
        """
        (B, L, _), c = h.shape, self.config
        q, k, v = (proj(h).view(B, L, -1, c.head_dim).transpose(1, 2)       # (B, H or G, L, P)
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        if c.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        here = positions = torch.arange(L, device=h.device)[None]           # (1 or B, L)
        if state is not None:
            *kept, before = state
            here = here + (before < NEVER).sum(1, keepdim=True)
            if real is not None:
                here = here.where(real, NEVER)
            positions = torch.cat([before.expand(len(here), -1), here], dim=1)  # (1 or B, T)
        q, k = (rotate(x, here, c.inv_freq, c.rope_scale) for x in (q, k))
        if state is not None:
            k, v = (torch.cat(pair, dim=2) for pair in zip(kept, (k, v), strict=True))
            state = k, v, positions
        plain = k.shape[2] == L and (self.window or L) >= L and real is None    # torch is faster
        if not plain:
            distance = here[:, :, None] - positions[:, None, :]
            seen = (distance >= 0) & (distance < (self.window or NEVER))    # (1 or B, L, T)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if plain else seen[:, None],
                                           is_causal=plain, enable_gqa=True)
        return self.dense(y.transpose(1, 2).flatten(-2)), state

    def initial_state(self, B):
        empty = self.q_proj.weight.new_zeros(B, self.config.n_kv_head, 0, self.config.head_dim)
        return empty, empty, torch.empty(1, 0, dtype=torch.long, device=empty.device)


def rotate(x, position, inv_freq, scale=1.0):
    """Rotary embedding of x (B, H, L, P) at position (1 or B, L).

    Channels i and i + R/2 of the first R turn by position * inv_freq[i] and grow by `scale`.
    """
    # fp32 frequencies and products, like the teacher's, else positions drift apart from its own
    frequency = torch.tensor(inv_freq, device=x.device, dtype=torch.float32)
    angle = (position.float()[..., None] * frequency)[:, None]                      # (., 1, L, R/2)
    cos, sin = (angle.cos() * scale).to(x.dtype), (angle.sin() * scale).to(x.dtype)
    first, second, rest = x.split([len(inv_freq)] * 2 + [x.shape[-1] - 2 * len(inv_freq)], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


class AttentionMixer(nn.Module):
    """Attention under the name the published hybrid checkpoint has it: mixer.self_attn."""

    def __init__(self, config, i):
        super().__init__()
        self.self_attn = Attention(config, i)

    def forward(self, h, state=None, real=None):
        return self.self_attn(h, state, real)

    def initial_state(self, B):
        return self.self_attn.initial_state(B)


# -----------------------------------------------------------------------------
# the mixers of the study. Each is Mamba-2 but for what stands between q, k, v, the gates and y: the
# same heads, state, convolution, skip, z and output projection. What their papers put around that
# (rotary embeddings, a norm of y, SiLU on q and k, MetaLA's self-augmentation) none has here: what
# is compared is the operators, and all can start from a copy of the teacher's q, k and v.
#
# [3] RetNet, arXiv 2307.08621    [4] linear attention, 2006.16236    [5] xLSTM, 2405.04517
# [6] MetaLA, 2411.10741    [7] GLA, 2312.06635    [8] DeltaNet, 2406.06484
# [9] Gated DeltaNet, 2412.06464

class RetNet(Mamba2):
    """Retention [3]: each head forgets at a rate of its own, fixed: e^a = 1 - 2^(-5 - h)."""
    gates = staticmethod(lambda config: 0)

    def operands(self, q, k, v, _):
        h = torch.arange(v.shape[2], device=v.device, dtype=wide(v.dtype))
        return q, k, v, torch.log1p(-(2 ** (-5 - h))).expand(v.shape[:3])           # (B, L, H)


class InFull(Mamba2):
    """One whose matrix is more than q k^T and a decay: it is what the operator makes of the
    identity. In stage 1 some maps (B, H, L, L) of a layer exist at once."""

    def matrix(self, h):
        q, k, v, *a, _, _ = self.project(h)
        L, H = v.shape[1:3]
        each = torch.eye(L, dtype=v.dtype, device=v.device)[:, None].expand(len(v), L, H, L)
        M = self.mix((q, k, each, *a))[0].transpose(1, 2)                           # (B, H, L, L)
        return M + torch.diag_embed(self.D[:, None].expand(H, L))

    def orientation(self, h, q_t, k_t, scale, window=None):
        return distance_in_full(q_t, k_t, scale, self.matrix(h), window)


class Linear(InFull):
    """Normalised linear attention [4], phi = elu + 1:  y_t = phi(q_t) S_t / (phi(q_t) n_t)

    n, the sum of phi(k), is the last column of S, for v has a column of ones. On a GPU this one
    column more than the Triton kernel takes means the chunked form.
    """
    gates = staticmethod(lambda config: 0)

    def operands(self, q, k, v, _):
        return F.elu(q) + 1, F.elu(k) + 1, v, v.new_zeros(v.shape[:3], dtype=wide(v.dtype))

    def mix(self, operands, S=None):
        q, k, v, a = operands
        y, S = super().mix((q, k, F.pad(v, (0, 1), value=1.0), a), S)
        return y[..., :-1] / (y[..., -1:] + 1e-10), S

    def initial_state(self, B):
        before, S = super().initial_state(B)
        return before, F.pad(S, (0, 1))


class MLSTM(Linear):
    """xLSTM's matrix memory [5]: a sigmoid forget gate f, an exponential input gate i.

    S_t = sigmoid(f_t) S_(t-1) + e^(i_t) k_t v_t^T     y_t = q_t S_t / max(|q_t n_t|, 1)

    What is kept is e^(-m_t) S_t, where m_t = max(log sigmoid(f_t) + m_(t-1), i_t, 0): no exponent
    is above 0, and nothing overflows. y is the same for any m, so m needs no gradient. q n is a sum
    of both signs: its rounding errors in bf16 would be as large as itself, so this is all in fp32.
    """
    gates = staticmethod(lambda config: 2 * config.n_head)

    def operands(self, q, k, v, gates):
        i, f = gates.to(wide(gates.dtype)).chunk(2, dim=-1)
        q, k = (per_head(x, v.shape[2]) for x in (q, k))
        return q, k, v, F.logsigmoid(f), i

    def mix(self, operands, S=None, m=None):
        q, k, v, f, i = operands
        f = f.clamp_min(-1e6)           # forgets all beside any i, and its running sum is finite
        with torch.no_grad():                       # m_t - f_1 .. - f_t is a running maximum
            kept = F.pad(f.double().cumsum(1), (0, 0, 1, 0))                    # (B, 1 + L, H)
            before = torch.zeros_like(kept[:, :1]) if m is None else m[:, None]
            m = kept + torch.cat([before, i.clamp_min(0) - kept[:, 1:]], 1).cummax(1).values
            fall = torch.minimum(m[:, :-1] - m[:, 1:], -f)      # no rounding brings a above 0
            m = m[:, 1:].to(f.dtype)
        q, k, values = (x.to(f.dtype) for x in (q, k, F.pad(v, (0, 1), value=1.0)))
        k = k * (i - m).exp()[..., None]
        y, S = Mamba2.mix(self, (q, k, values, f + fall.to(f.dtype)), S)
        y = y[..., :-1] / torch.maximum(y[..., -1:].abs(), (-m).exp()[..., None])
        return y.to(v.dtype), S, m[:, -1]

    def initial_state(self, B):
        before, S = super().initial_state(B)
        return before, S, S.new_zeros(S.shape[:2])


class MetaLA(InFull):
    """MetaLA [6]: each channel of k forgets at a rate of its own, and writes what it forgets.

    S_t = diag(e^(a_t)) S_(t-1) + (1 - e^(a_t)) v_t^T, where a, the log of a sigmoid over 16, has
    k's place in in_proj.
    """
    gates, has_keys = staticmethod(lambda config: 0), False
    operator, operator_step = staticmethod(channel_chunked), staticmethod(channel_step)

    def operands(self, q, gate, v, _):
        a = F.logsigmoid(gate.to(wide(gate.dtype))) / 16
        q, a = (per_head(x, v.shape[2]) for x in (q, a))                            # (B, L, H, N)
        return q, -torch.expm1(a), v, a


class GLA(MetaLA):
    """Gated linear attention [7]: the same with a k of its own, and the gate of low rank."""
    gates, has_keys = staticmethod(lambda config: 16), True

    def __init__(self, config):
        super().__init__(config)
        self.in_proj_gate = nn.Linear(16, config.n_qk_head * config.d_state)

    def reset_parameters(self):
        super().reset_parameters()
        self.in_proj_gate.reset_parameters()

    def operands(self, q, k, v, gates):
        gate = self.in_proj_gate(gates).unflatten(-1, k.shape[2:])                  # (B, L, G, N)
        q, _, v, a = super().operands(q, gate, v, None)
        return q, per_head(k, v.shape[2]), v, a


class DeltaNet(InFull):
    """The delta rule [8]: what k finds in S is replaced with v, by the share b = sigmoid(gate).

    q and k have length 1. S_t = (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T
    """
    operator, operator_step = staticmethod(delta_rule), staticmethod(delta_step)

    def operands(self, q, k, v, gate):
        q, k = (F.normalize(per_head(x, v.shape[2]), dim=-1) for x in (q, k))
        b = gate.to(wide(gate.dtype)).sigmoid()
        return q, k, v, torch.zeros_like(b), b


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet [9]: the delta rule, and S fades as Mamba-2's does."""
    gates = staticmethod(lambda config: 2 * config.n_head)

    def operands(self, q, k, v, gates):
        gate, A_log = gates.chunk(2, dim=-1)
        q, k, v, _, b = super().operands(q, k, v, gate)
        return q, k, v, -F.softplus(A_log.to(b.dtype)), b


MIXERS = {"mamba2": Mamba2, "linear": Linear, "retnet": RetNet, "mlstm": MLSTM, "gla": GLA,
          "metala": MetaLA, "deltanet": DeltaNet, "gated_deltanet": GatedDeltaNet}


# -----------------------------------------------------------------------------
# the model

class Block(nn.Module):
    def __init__(self, config, i):
        super().__init__()
        self.parallel = config.block == "phi"
        self.input_layernorm = norm(config)
        attends = i in config.attn_layers
        self.mixer = AttentionMixer(config, i) if attends else MIXERS[config.mixer](config)
        if not self.parallel:
            self.post_attention_layernorm = norm(config)
        self.mlp = MLP(config) if self.parallel else GatedMLP(config)

    def forward(self, u, state=None, real=None):
        """u (B, L, D) -> the next layer's u (B, L, D), and the mixer's next state"""
        h = self.input_layernorm(u)
        mixed, state = self.mixer(h, state, real)
        if self.parallel:
            return u + mixed + self.mlp(h), state
        u = u + mixed
        return u + self.mlp(self.post_attention_layernorm(u)), state

    def orientation(self, u, *teachers):
        return self.mixer.orientation(self.input_layernorm(u), *teachers)

    def heads(self, u):
        q, k, v = self.mixer.project(self.input_layernorm(u))[:3]
        # attention scales scores by 1 / sqrt(N), this mixer has that in its q: there, q is larger
        return [x.flatten(2) for x in (q * q.shape[-1] ** 0.5, k, v)]


def norm(config):
    kind = nn.LayerNorm if config.block == "phi" else nn.RMSNorm
    return kind(config.d_model, eps=config.norm_eps)


class Writer:
    """What student and teacher share: who can read a prompt and make a step can write a text."""

    @torch.no_grad()
    def stream(self, prompts, n, temperature=0.0, top_k=None, seed=0):
        """Yields n times the next token of each prompt (B). Arguments as in generate."""
        logits, state = self.read(prompts, n)
        generator = torch.Generator(logits.device).manual_seed(seed)
        token, step = None, self.stepper(state) if n > 1 else None
        for i in range(n):
            token = sample(step(token) if i else logits, temperature, top_k, generator)
            yield token

    def generate(self, prompts, n, temperature=0.0, top_k=None, seed=0):
        """tokens (B, L) -> (B, L + n); or a list of B 1-D tensors -> each n longer

        Each goes on as it would alone, whatever the others are. Greedy at temperature 0; else
        sampled, from the top_k likeliest if given: equal prompts get equal text, another seed
        another. The student's memory does not grow with n, but for a hybrid's attention layers.
        """
        drawn = list(self.stream(prompts, n, temperature, top_k, seed))             # n times (B)
        if isinstance(prompts, torch.Tensor):
            return torch.cat([prompts, *(token[:, None] for token in drawn)], dim=1)
        return [torch.cat([prompt, *(token[i:i + 1] for token in drawn)])
                for i, prompt in enumerate(prompts)]


def lengths_of(prompts):
    """The number of tokens of each, or UsageError: with no token nothing can go on"""
    lengths = [len(prompt) for prompt in prompts]
    if not lengths or min(lengths) == 0:
        raise UsageError("an empty prompt: give at least one token")
    return lengths


class SSM(nn.Module, Writer):
    """The language model.

    It answers the stages' three questions: matrix(i, u), block(i, u), logits(tokens).
    """

    def __init__(self, config):
        """Random weights as for training from nothing.

        The usual ways in are from_teacher and from_pretrained.
        """
        super().__init__()
        unknown = [i for i in config.attn_layers if not 0 <= i < config.n_layer]
        if unknown:
            raise UsageError(f"--attn_layers {unknown[0]}: "
                             f"the model has layers 0 to {config.n_layer - 1}")
        if config.mixer not in MIXERS:
            raise UsageError(f"there is no mixer {config.mixer}: choose among {', '.join(MIXERS)}")
        self.config, self.recompute = config, False     # recompute: activations, in the backward
        self.backbone = nn.ModuleDict({
            "embedding": nn.Embedding(config.vocab_size, config.d_model),
            "layers": nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            "final_layernorm": norm(config)})
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=config.block == "phi")
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight
        for module in self.modules():
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

    def hidden(self, tokens):
        """tokens (B, L) -> (B, L, D), after the final norm: what the head reads"""
        return self.prefill(tokens, None)[0]

    def head(self, h):
        return self.lm_head(h)                                                      # (..., V)

    def logits(self, tokens):
        """tokens (B, L) -> (B, L, V): stage 3's question"""
        return self.head(self.hidden(tokens))

    def outputs(self, tokens):
        """tokens (B, L) -> what each layer says, before the final norm: n_layer times (B, L, D)"""
        u, said = self.backbone["embedding"](tokens), []
        for layer in self.layers:
            u = self.pass_through(layer, u)[0]
            said.append(u)
        return said

    def heads(self, tokens):
        """tokens (B, L) -> q, k, v that the last layer's mixer mixes: 3 times (B, L, .)"""
        u = self.backbone["embedding"](tokens)
        for layer in self.layers[:-1]:
            u = self.pass_through(layer, u)[0]
        return self.layers[-1].heads(u)

    def block(self, i, u):
        """u (B, L, D) -> (B, L, D), the output of layer i: stage 2's question"""
        return self.layers[i](u)[0]

    def matrix(self, i, u):
        """u (B, L, D) -> M + diag D (B, H, L, L) of SSM layer i: stage 1's question, in full"""
        layer = self.layers[i]
        return layer.mixer.matrix(layer.input_layernorm(u))

    def orientation(self, i, u, *teachers):
        """teachers: q_t, k_t, scale, window -> the distance of matrix(i, u) from the teacher's
        softmax(q_t k_t^T scale), and the size of the latter, both as orientation_loss has them"""
        return self.layers[i].orientation(u, *teachers)

    # generation ----------------------------------------------------------------

    def initial_state(self, B):
        return [layer.mixer.initial_state(B) for layer in self.layers]

    def prefill(self, tokens, state, real=None):
        """tokens (B, L) after `state` -> final hidden (B, L, D), next state. In parallel over L.

        real (B, L): False where a row is padding, wherever that is. Each row comes out as it would
        without it, and in its place stands the hidden of the token before it, if there is one.
        """
        if real is not None:
            # The text of each row moves to the left, in its order: no token looks ahead at padding.
            order = real.logical_not().byte().argsort(dim=1, stable=True)           # (B, L)
            tokens = tokens.masked_fill(~real, 0).gather(1, order)
            moved_to = (real.cumsum(1) - 1).clamp_min(0)
            real = real.gather(1, order)
        u, after = self.backbone["embedding"](tokens), []
        for layer, before in zip(self.layers, state or [None] * len(self.layers), strict=True):
            u, kept = self.pass_through(layer, u, before, real if state else None)
            after.append(kept)
        h = self.backbone["final_layernorm"](u)
        if real is not None:
            h = h.gather(1, moved_to[..., None].to(h.device).expand_as(h))
        return h, after

    def pass_through(self, layer, u, *more):
        """layer(u, ...), whose activations are computed again in the backward if `recompute`"""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(layer, u, *more, use_reentrant=False)
        return layer(u, *more)

    def step(self, token, state):
        """One token by the recurrence: token (B), state -> logits (B, V), next state"""
        h, state = self.prefill(token[:, None], state)
        return self.head(h[:, -1]), state

    @torch.no_grad()
    def read(self, prompts, n=None):
        """prompts: tokens (B, L), or a list of B 1-D tensors of any lengths

        -> logits (B, V) after the last token of each, state. In pieces: memory is flat in L, but
        for a hybrid's attention layers. n, how many tokens will be written, is the teacher's.
        """
        lengths = torch.tensor(lengths_of(prompts), device=prompts[0].device)       # (B)
        even = bool((lengths == lengths[0]).all())
        tokens = nn.utils.rnn.pad_sequence(list(prompts), batch_first=True)         # (B, L)
        state, last = self.initial_state(len(tokens)), None
        for start in range(0, tokens.shape[1], PREFILL):
            piece = tokens[:, start:start + PREFILL]
            n, left = piece.shape[1], lengths - start       # left: of each prompt, <= 0 at its end
            real = None if even else torch.arange(n, device=left.device) < left[:, None]
            h, state = self.prefill(piece, state, real)
            end = h[:, -1]                              # (B, D), of each row's last token in here
            last = end if last is None else end.where((left > 0)[:, None], last)
        return self.head(last), state

    def stepper(self, state, capture=None):
        """-> a function: token (B) -> logits (B, V), good until the next call. It keeps the state.

        capture: how to make one launch of a step, on a GPU `captured`. A state that grows, as a
        hybrid's does, is another step each time, and is not captured.
        """
        if capture is None and state[0][0].is_cuda and not self.config.attn_layers:
            capture = captured
        if capture is None:
            def step(token):
                nonlocal state
                logits, state = self.step(token, state)
                return logits
            return step
        held = [[x.clone() for x in layer] for layer in state]          # the graph's own state
        token_in = torch.zeros(len(held[0][0]), dtype=torch.long, device=held[0][0].device)

        def put(new):
            for ours, theirs in zip(held, new, strict=True):
                for x, y in zip(ours, theirs, strict=True):
                    x.copy_(y)

        def work():
            logits, after = self.step(token_in, held)
            put(after)
            return logits

        replay, logits = capture(work)
        put(state)                                                      # capturing moved it on

        def step(token):
            token_in.copy_(token)
            replay()
            return logits
        return step

    # in and out ------------------------------------------------------------------

    @classmethod
    def from_teacher(cls, teacher, attn_layers=(), init="mohawk", **overrides):
        """A student of `teacher`'s shape with all its weights but the mixers outside attn_layers.

        attn_layers: numbers of the layers that keep attention, or "all"
        init: "mohawk", see Mamba2.reset_parameters; "qkv", that and the teacher's q, k, v and
              output projection; "random", torch's own; or "conv", MOHAWK's with torch's conv1d
        overrides: fields of Config, such as d_state or mixer; of fewer layers, each is a copy of
              one of the teacher's
        """
        config = Config(**teacher.shapes | overrides)
        from_layers = sources(config.n_layer, teacher.shapes["n_layer"])
        config.window_layers = tuple(i for i, layer in enumerate(from_layers)
                                     if layer in teacher.shapes["window_layers"])
        attn_layers = range(config.n_layer) if attn_layers == "all" else attn_layers
        config.attn_layers = tuple(attn_layers)
        student = cls(config)
        ours = student.state_dict()
        theirs = {rename(name): w for name, w in teacher.model.state_dict().items()}
        theirs = of_layers(theirs, from_layers)
        copied = {name: w.to(ours[name].dtype) for name, w in theirs.items() if name in ours}
        left_out = tuple(f"backbone.layers.{i}.mixer." for i in student.ssm_layers)
        wrong = [name for name in ours.keys() ^ theirs.keys() if not name.startswith(left_out)]
        if wrong:
            raise UsageError(f"{teacher.name} and the student do not fit: "
                             f"{sorted(wrong)[0]} is only in one of them")
        student.load_state_dict(ours | copied, strict=True)
        if init == "qkv":
            for i in student.ssm_layers:
                prefix = f"backbone.layers.{i}.mixer.self_attn."
                copy_qkv(student.layers[i].mixer, theirs, prefix, config.n_kv_head)
        elif init == "conv":
            for i in student.ssm_layers:
                student.layers[i].mixer.conv1d.reset_parameters()
        elif init == "random":
            for i in student.ssm_layers:
                student.layers[i].mixer = MIXERS[student.config.mixer](student.config)
        elif init != "mohawk":
            raise UsageError(f"--init {init}: choose mohawk, qkv, conv or random")
        student.loaded = (f"{len(copied)} tensors copied from the teacher, "
                          f"{len(ours) - len(copied)} of the mixers fresh")
        return student

    @classmethod
    def from_pretrained(cls, name):
        """name: a model folder of this project or of goombalab/Phi-Mamba's layout, or a hub id.

        Strict: all or nothing.
        """
        folder = Path(name)
        if not folder.exists() and str(name).count("/") == 1:
            folder = from_hub(str(name))
        if not (folder / "config.json").is_file():
            raise UsageError(f"no model in {name}: there is no config.json")
        student = cls(read_config(json.loads((folder / "config.json").read_text("utf-8"))))
        file, bin = folder / "model.safetensors", folder / "pytorch_model.bin"
        try:
            weights = load_file(file) if file.exists() else torch.load(bin, weights_only=True)
        except Exception as error:                  # a cut or damaged file fails in many ways
            raise UsageError(f"{file} is missing, damaged or cut short: "
                             f"{first_line(error)}") from error
        if student.config.tie_embeddings:
            weights["lm_head.weight"] = weights["backbone.embedding.weight"]
        ours = {name: w.shape for name, w in student.state_dict().items()}
        theirs = {name: w.shape for name, w in weights.items()}
        if wrong := sorted({name for name, shape in ours.items() ^ theirs.items()}):
            raise UsageError(f"the weights in {folder} do not fit its config.json: "
                             f"{len(wrong)} tensors differ, first {wrong[0]}")
        student.load_state_dict(weights, strict=True)
        student.loaded = f"{len(weights)} tensors loaded, none missing, none left over"
        return student

    def save_pretrained(self, folder, **about):
        """config.json and model.safetensors in the published layout; whole or not at all.

        about: how it was made
        """
        folder = Path(folder)
        partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        weights = {name: w.detach().contiguous() for name, w in self.state_dict().items()}
        if self.config.tie_embeddings:
            del weights["lm_head.weight"]
        save_file(weights, partial / "model.safetensors")
        config = write_config(self.config) | {"about": about}
        (partial / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
        replaced = folder.with_name(f".{folder.name}.{os.getpid()}.replaced")
        if folder.exists():                         # at no moment is there half a folder
            folder.rename(replaced)
        partial.rename(folder)
        shutil.rmtree(replaced, ignore_errors=True)


def sample(logits, temperature, top_k, generator):
    """logits (B, V) -> tokens (B)"""
    if temperature == 0:
        return logits.argmax(-1)
    if top_k:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    p = (logits.float() / temperature).softmax(-1)
    # p over exponential noise is largest at a draw from p. The rows share the noise, so what one
    # draws does not depend on how many others there are.
    noise = torch.empty_like(p[0]).exponential_(generator=generator)                # (V)
    return (p / noise).argmax(-1)


def captured(work):
    """work(), all of it on the GPU, as a CUDA graph -> replay, what work returned

    A step of a small batch is hundreds of kernels that take less time than their launches.
    replay() is one launch; it reads and writes the tensors that work did.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):              # Triton compiles and cuBLAS chooses, which no graph may do
            work()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            out = work()
    except RuntimeError as error:       # slower, and as right
        warnings.warn(f"steps without a CUDA graph: {first_line(error)}", stacklevel=2)
        out = work()
        return lambda: out.copy_(work()), out
    return graph.replay, out


def ask_hub():
    """Before the hub is asked: if its name does not resolve, ask this machine's cache only.

    huggingface_hub would find out too, after half a minute of retries and a page of warnings.
    """
    import huggingface_hub
    from huggingface_hub import constants
    huggingface_hub.utils.logging.set_verbosity_error()
    proxied = any(os.environ.get(name)
                  for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    try:
        proxied or socket.getaddrinfo(urllib.parse.urlparse(constants.ENDPOINT).hostname, 443)
    except OSError:
        constants.HF_HUB_OFFLINE = True


def from_hub(name):
    from huggingface_hub import snapshot_download
    ask_hub()
    files = ["config.json", "model.safetensors", "pytorch_model.bin"]
    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except Exception as error:                      # the hub client raises a dozen unrelated types
        raise UsageError(f"no folder {name} here, and the hub does not give it: "
                         f"{first_line(error)}") from error


# -----------------------------------------------------------------------------
# teacher -> student

# Rotary embeddings that a list of frequencies and one factor describe. Others ("dynamic",
# "longrope") change with the length of the text.
ROPES = ("default", "linear", "llama3", "yarn", "proportional")
ATTENTIONS = {"full_attention", "sliding_attention"}


def windows_of(hf):
    """How many keys each layer of a decoder sees, the query's own among them; None: all"""
    window = getattr(hf, "sliding_window", None)
    if hf.model_type == "mistral":
        return [window] * hf.num_hidden_layers
    if hf.model_type in ("qwen2", "qwen3"):
        return [window if kind == "sliding_attention" else None for kind in hf.layer_types]
    return [None] * hf.num_hidden_layers                # Phi and Llama have no windows


def shapes_of(hf, inv_freq, rope_scale=1.0):
    """The fields of Config that a Hugging Face decoder's configuration decides.

    UsageError, by name, for what the student's blocks cannot do.
    """
    phi, rope = hf.model_type == "phi", hf.rope_parameters["rope_type"]
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
            "window": max((w for w in windows_of(hf) if w), default=None),
            "window_layers": tuple(i for i, w in enumerate(windows_of(hf)) if w)}


def sources(n, of):
    """Which of a teacher's layers a student of n layers learns from, the last among them.

    >>> sources(2, 4), sources(3, 3)
    ([1, 3], [0, 1, 2])
    """
    if not 0 < n <= of:
        raise UsageError(f"--n_layer {n}: the teacher has {of} layers, so from 1 to {of}")
    return [(i + 1) * of // n - 1 for i in range(n)]


def of_layers(weights, sources):
    """Of {name: weight} what is in no layer, and layer sources[i] as layer i"""
    kept = {}
    for name, w in weights.items():
        parts = name.split(".")                     # backbone.layers.3.mixer...
        if parts[1] == "layers":
            if int(parts[2]) not in sources:
                continue
            parts[2] = str(sources.index(int(parts[2])))
        kept[".".join(parts)] = w
    return kept


def rename(name):
    """A Hugging Face parameter name -> ours.

    >>> rename("model.layers.3.self_attn.o_proj.weight")
    'backbone.layers.3.mixer.self_attn.dense.weight'
    >>> rename("model.norm.weight"), rename("lm_head.weight")
    ('backbone.final_layernorm.weight', 'lm_head.weight')
    """
    for theirs, ours in (("model.embed_tokens.", "backbone.embedding."),
                         ("model.norm.", "backbone.final_layernorm."), ("model.", "backbone."),
                         (".o_proj.", ".dense."), (".self_attn.", ".mixer.self_attn.")):
        name = name.replace(theirs, ours)
    return name


@torch.no_grad()
def copy_qkv(mixer, theirs, prefix, n_kv_head):
    """q <- q, k <- k (if the mixer has one), v <- v, out_proj <- dense.

    Keys and values of grouped-query teachers once for each query head.
    """
    c = mixer.config
    if (c.n_qk_head, c.d_state) != (c.n_head, c.head_dim):
        raise UsageError("init qkv needs d_state = head_dim and q, k for every head, "
                         "as the teacher has them")

    def heads(name, n):
        # (n P, ...) -> (H P, ...), whole heads repeated: rows of one head stay together
        w = theirs[prefix + name]
        return w.unflatten(0, (n, c.head_dim)).repeat_interleave(c.n_head // n, dim=0).flatten(0, 1)

    # The scale of softmax(q k / sqrt(N)) goes into q: scores start at the size attention gives.
    scale = c.head_dim ** -0.5
    rows, biases = mixer.in_proj.weight.split(mixer.sizes), mixer.conv1d.bias.split(mixer.sizes[:3])
    sources = (("v_proj", n_kv_head, 1), ("k_proj", n_kv_head, 1), ("q_proj", c.n_head, scale))
    for at, (name, n, factor) in enumerate(sources):
        if name == "k_proj" and not mixer.has_keys:
            continue
        rows[at].copy_(factor * heads(f"{name}.weight", n))
        if f"{prefix}{name}.bias" in theirs:    # in_proj has no bias, but the conv behind it has
            biases[at].copy_(factor * heads(f"{name}.bias", n))
    mixer.out_proj.weight.copy_(theirs[prefix + "dense.weight"])


# -----------------------------------------------------------------------------
# config.json, in the published layout

ATTENTION = "modules.mixers.phi_attention"
CORES = {name: f"modules.mixers.{name}" for name in MIXERS}
CORES["mamba2"] = "modules.mixers.discrete_mamba2"
IN_MODEL = ("vocab_size", "d_model", "n_layer", "attn_layers", "mixer")
IN_CORE = ("d_state", "n_head", "n_qk_head", "d_conv", "head_dim")


def write_config(config):
    """The published layout: runs of equal layers as Block1, Block2, ...

    What it has no place for goes under "shapes".
    """
    core = {"d_state": config.d_state, "n_v_heads": config.n_head, "n_qk_heads": config.n_qk_head,
            "d_conv": config.d_conv, "conv_bias": True, "expand": config.d_inner / config.d_model,
            "chunk_size": 128, "activation": "identity", "bias": False}
    runs = []
    for i in range(config.n_layer):
        kind = ATTENTION if i in config.attn_layers else CORES[config.mixer]
        if runs and runs[-1]["CoreType"] == kind:
            runs[-1]["n_layers"] += 1
        else:
            runs.append({"n_layers": 1,
                         "BlockType": "modules.phi_block", "block_input": {"resid_dropout": 0.0},
                         "CoreType": kind, "core_input": {} if kind == ATTENTION else core})
    said = IN_MODEL + (IN_CORE if len(config.attn_layers) < config.n_layer else ())
    language = {"vocab_size": config.vocab_size, "pad_vocab_size_multiple": 1}
    mixer = {"d_model": config.d_model, "n_layer": config.n_layer, "lm_head_prenorm": "layer"}
    return {"LanguageModel": {"input": language},
            "MixerModel": {"input": mixer},
            **{f"Block{i}": run for i, run in enumerate(runs, 1)},
            "shapes": {name: value for name, value in asdict(config).items() if name not in said}}


def read_config(file):
    """config.json as a dict -> Config; what is not said is Phi-1.5's, as in the published code."""
    try:
        language, model = file["LanguageModel"]["input"], file["MixerModel"]["input"]
        blocks = [block for name, block in file.items() if name.startswith("Block")]
        kinds = [block["CoreType"] for block in blocks for _ in range(block["n_layers"])]
        multiple = language.get("pad_vocab_size_multiple", 8)
        shapes = {"vocab_size": -(-language["vocab_size"] // multiple) * multiple,
                  "d_model": model["d_model"], "n_layer": len(kinds), "d_mlp": 4 * model["d_model"],
                  "attn_layers": tuple(i for i, kind in enumerate(kinds) if kind == ATTENTION),
                  "mixer": next((name for name in MIXERS if CORES[name] in kinds), "mamba2")}
        kind = CORES[shapes["mixer"]]
        for core in [block["core_input"] for block in blocks if block["CoreType"] == kind][:1]:
            H = core["n_v_heads"]
            P = round(model["d_model"] * core["expand"]) // H
            shapes |= {"d_state": core["d_state"], "n_head": H, "n_qk_head": core["n_qk_heads"],
                       "d_conv": core["d_conv"], "head_dim": P, "n_kv_head": H,
                       "inv_freq": phi_frequencies(P)}
            if (core["activation"], core["bias"], core["conv_bias"]) != ("identity", False, True):
                raise UsageError("config.json asks for a mixer with an activation or with other "
                                 "biases than this one has")
    except (KeyError, TypeError) as error:
        raise UsageError("config.json is not one of this project's or of Phi-Mamba's: "
                         f"{error} is missing") from error
    shapes |= file.get("shapes", {})
    unknown = sorted(set(shapes) - {field.name for field in fields(Config)})
    if unknown or set(kinds) - {kind, ATTENTION} or len(kinds) != model["n_layer"]:
        raise UsageError("config.json is not one of this project's or of Phi-Mamba's: it has "
                         f"{len(kinds)} of {model['n_layer']} layers, {set(kinds)}, {unknown}")
    return Config(**{name: tuple(value) if isinstance(value, list) else value
                     for name, value in shapes.items()})
