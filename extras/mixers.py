"""Seven other mixers in Mamba-2's place, and the study of them and their initialisations [3].

Run:  python distill.py --mixer gla --init qkv          # any stage, any teacher
      python -m extras.mixers                           # the study: 8 mixers x 5 starts x 3 seeds
      python -m extras.mixers --preset smollm2 --data texts --tokens 20e6 --context 1024 --lr 1e-3

Each is Mamba-2 but for what stands between q, k, v, the gates and y: the same heads, state,
convolution, skip, gate and output projection. What their papers add around that (rotary embeddings,
a norm of y, SiLU on q and k, MetaLA's self-augmentation) is left out: the study compares operators,
and all can start from a copy of the teacher's q, k and v.

    mixer            the state                                          computed by
    linear           forgets nothing; phi = elu + 1, y is normalised    ssd, v with a column of ones
    retnet           forgets at a fixed rate per head                   ssd
    mlstm            forget gate, exponential input gate, normalised    ssd, v with a column of ones
    gla              forgets at a rate per channel, set by the input    channel_chunked
    metala           as gla, and writes what it forgets: no key         channel_chunked
    deltanet         replaces what k finds by v                         a triangular solve, then ssd
    gated_deltanet   as deltanet, and forgets as Mamba-2 does           a triangular solve, then ssd

This file is also an example of how to add a mixer: subclass Mixer, say how many rows of in_proj its
gates need and what its operator takes, and name it in MIXERS.

[3] 2504.14366    [4] RetNet, arXiv 2307.08621    [5] linear attention, 2006.16236
[6] xLSTM, 2405.04517    [7] MetaLA, 2411.10741    [8] GLA, 2312.06635    [9] DeltaNet, 2406.06484
[10] Gated DeltaNet, 2412.06464
"""
import torch
import torch.nn.functional as F
from torch import nn

from model_ssm import Mamba2, causal_conv, last_inputs
from ssd_kernel import (
    at_least_fp32,
    chunk_decays,
    decay_matrix,
    distance_in_full,
    floored,
    in_chunks,
    outside_autocast,
    per_head,
    product,
    running_sums,
    ssd,
    ssd_step,
    until_end,
)

# -----------------------------------------------------------------------------
# the operators: a decay for each channel of k, and the delta rule. Each *_step is the definition.
# The chunked forms are plain PyTorch with its autograd, in fp32 or wider, one document per row.

def channel_step(q, k, v, a, S):
    """S_t = diag(e^(a_t)) S_(t-1) + k_t v_t^T      y_t = q_t S_t

    q, k, a (B, H, N)   v (B, H, P)   S (B, H, N, P)   -> y (B, H, P), the next S
    """
    q, k, a = (x.to(S.dtype) for x in (q, k, a))
    S = a.exp()[..., None] * S + k[..., None] * v.to(S.dtype)[..., None, :]
    return product(q[..., None, :], S)[..., 0, :].to(v.dtype), S


def channel_chunked(q, k, v, a, initial_state=None, return_final_state=False, chunk=64):
    """channel_step for q, k, a (B, L, H, N), v (B, L, H, P): O(L), in matrix products.

    M[i,j] = sum_n q_in k_jn e^(A_in - A_jn), A the running sum of a. As (q_i e^(A_i)) . (k_j
    e^(-A_j)) it is a product of matrices, but e^(-A_j) overflows. With any t between j and i it is
    (q_i e^(A_i - A_t)) . (k_j e^(A_t - A_j)), and both exponents are <= 0. So a chunk is halved,
    and so are its halves; t is where the left half ends:

        j ->  1 2 3 4 5 6 7 8
      i   1   =
      |   2   1 =                     =  i is j: nothing fades
      v   3   2 2 =                   1, 2, 4  the width of the halves: one product for each block
          4   2 2 1 =
          5   4 4 4 4 =               what is before the chunk comes through a state, by steps 2-4
          6   4 4 4 4 1 =             of ssd_chunked
          7   4 4 4 4 2 2 =
          8   4 4 4 4 2 2 1 =
    """
    B, L, H, P = v.shape
    dtype = v.dtype
    S = initial_state
    if S is None:
        S = v.new_zeros(B, H, q.shape[-1], P, dtype=at_least_fp32(dtype))
    a = floored(a, at_least_fp32(a.dtype))
    q, k, v, a = (wide_chunks(x, chunk) for x in (q, k, v, a))          # (B, C, H, Q, .)
    # Inside chunks: the diagonal, then blocks of width 1, 2, 4, ...
    y = (q * k).sum(-1, keepdim=True) * v                               # (B, C, H, Q, P)
    half = 1
    while half < chunk:
        (_, q_r), (k_l, _), (v_l, _), (a_l, a_r) = (                    # (B, C, H, ., half, N or P)
            x.unflatten(-2, (-1, 2, half)).unbind(-3) for x in (q, k, v, a))
        decay_out = until_end(*running_sums(a_l, -2), -2).exp()         # from j to the end of left
        decay_in = a_r.cumsum(-2).exp()                                 # from there to i
        M = product(q_r * decay_in, (k_l * decay_out).mT)               # (B, C, H, ., half, half)
        right_half = y.unflatten(-2, (-1, 2, half)).select(-3, 1)       # a view of y
        right_half.add_(product(M, v_l))
        half *= 2
    # Between chunks: the recurrence, over what each chunk writes.
    decay_out = until_end(*running_sums(a, -2), -2).exp()
    writes = product((k * decay_out).mT, v)                             # (B, C, H, N, P)
    fade = a.sum(-2).exp()[..., None]                                   # (B, C, H, N, 1)
    S_in = []                                                           # at each chunk's start
    for c in range(fade.shape[1]):
        S_in.append(S)
        S = fade[:, c] * S + writes[:, c]
    y = y + product(q * a.cumsum(-2).exp(), torch.stack(S_in, 1))       # (B, C, H, Q, P)
    y = y.transpose(2, 3).flatten(1, 2)[:, :L].to(dtype)                # (B, L, H, P)
    return (y, S) if return_final_state else y


def wide_chunks(x, Q):
    """(B, L, H, ...) -> (B, C, H, Q, ...) in fp32 or wider, with zeros after the end"""
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, -x.shape[1] % Q))
    return in_chunks(x.to(at_least_fp32(x.dtype)), Q).contiguous()


def delta_step(q, k, v, a, b, S):
    """S_t = e^(a_t) (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T      y_t = q_t S_t

    A share b of what k_t finds in S is replaced with v_t. It is ssd's recurrence with u in v's
    place: S_t = e^(a_t) S_(t-1) + k_t u_t^T, u_t = b_t (v_t - e^(a_t) k_t S_(t-1)).
    q, k (B, H, N)   v (B, H, P)   a, b (B, H)   S (B, H, N, P)   -> y (B, H, P), the next S
    """
    found = product(k.to(S.dtype)[..., None, :], S)[..., 0, :]          # (B, H, P)
    u = b[..., None] * (v - a.exp()[..., None] * found)
    return ssd_step(q, k, u.to(v.dtype), a, S)


def delta_rule(q, k, v, a, b, initial_state=None, return_final_state=False, chunk=32):
    """delta_step for q, k (B, L, H, N), v (B, L, H, P), a, b (B, L, H): u by chunks, then ssd.

    In a chunk that starts with state S, u_i = b_i (v_i - e^(A_i) k_i S) - sum_(j<i) M[i,j] u_j with
    M[i,j] = b_i (k_i . k_j) e^(A_i - A_j): a triangular system. Its solution is u = U - K S.
    """
    B, L, H, P = v.shape
    N = q.shape[-1]
    S = initial_state
    if S is None:
        S = v.new_zeros(B, H, N, P, dtype=at_least_fp32(v.dtype))
    a = floored(a, at_least_fp32(a.dtype))
    k_c, v_c, a_c, b_c = (wide_chunks(x, chunk) for x in (k, v, a, b))  # (B, C, H, Q, .)
    b_c = b_c[..., None]                                                # (B, C, H, Q, 1)
    decay_in, decay_out, fade = chunk_decays(a_c, a_c.dtype)
    M = (b_c * product(k_c, k_c.mT) * decay_matrix(a_c)).tril(-1)       # (B, C, H, Q, Q)
    U, K = Solution.apply(M, b_c * torch.cat([v_c, decay_in * k_c], -1)).split([P, N], dim=-1)
    keys = (k_c * decay_out).mT                                         # (B, C, H, N, Q)
    S_in = S                                                            # at the chunk's start
    u = []
    for c in range(fade.shape[1]):
        u.append(U[:, c] - product(K[:, c], S_in))                      # (B, H, Q, P)
        S_in = fade[:, c, :, None, None] * S_in + product(keys[:, c], u[-1])
    u = torch.stack(u, 1).transpose(2, 3).flatten(1, 2)[:, :L]          # (B, L, H, P)
    return ssd(q, k, u.to(v.dtype), a, S, None, return_final_state)


class Solution(torch.autograd.Function):
    """The x of (1 + M) x = y, M strictly lower triangular. Autocast does not round it."""

    @staticmethod
    @outside_autocast
    def forward(ctx, M, y):
        x = torch.linalg.solve_triangular(M, y, upper=False, unitriangular=True)
        ctx.save_for_backward(M, x)
        return x

    @staticmethod
    @outside_autocast
    def backward(ctx, dx):
        M, x = ctx.saved_tensors
        dy = torch.linalg.solve_triangular(M.mT, dx, upper=True, unitriangular=True)
        return -(dy @ x.mT).tril(-1), dy


# -----------------------------------------------------------------------------
# the mixers

class Mixer(Mamba2):
    """Mamba-2's projections, convolution, skip and gate around another operator.

    A mixer sets key (the name of the second part of in_proj) and gate_rows (how many rows its
    gates have), and turns q, k, v and the gates' rows into what its operator takes: operands().
    """
    key = "k"
    operator = staticmethod(ssd)
    operator_step = staticmethod(ssd_step)

    def __init__(self, config):
        nn.Module.__init__(self)        # not Mamba2's: these are its lines, with other gates
        self.config = config
        qk = config.n_qk_head * config.d_state
        self.parts = {"v": config.d_inner, self.key: qk, "q": qk, "z": config.d_inner,
                      "a": self.gate_rows(config)}
        channels = config.d_inner + 2 * qk
        self.in_proj = nn.Linear(config.d_model, sum(self.parts.values()), bias=False)
        self.z_bias = nn.Parameter(torch.zeros(config.d_inner))
        self.conv1d = nn.Conv1d(channels, channels, config.d_conv, groups=channels)
        self.D = nn.Parameter(torch.ones(config.n_head))
        self.out_proj = nn.Linear(config.d_inner, config.d_model, bias=False)

    @staticmethod
    def gate_rows(config):
        return config.n_head                        # one gate per head

    def project(self, h, conv_state=None):
        """h (B, L, D) -> the operands, the gate z and the convolution's input, as Mamba2.project"""
        c = self.config
        vkq, z, gates = self.in_proj(h).split(                                  # (B, L, C), ...
            [self.conv1d.in_channels, self.parts["z"], self.parts["a"]], -1)
        mixed = causal_conv(vkq, self.conv1d.weight, self.conv1d.bias, conv_state)
        v, k, q = mixed.split([self.parts["v"], self.parts[self.key], self.parts["q"]], -1)
        q = q.unflatten(-1, (c.n_qk_head, c.d_state))                           # (B, L, G, N)
        k = k.unflatten(-1, (c.n_qk_head, c.d_state))                           # (B, L, G, N)
        v = v.unflatten(-1, (c.n_head, c.head_dim))                             # (B, L, H, P)
        return *self.operands(q, k, v, gates), z, vkq

    def operands(self, q, k, v, gates):
        """-> q, k, v and any number of gates (B, L, H, ...), in the order the operator takes them

        gates (B, L, gate_rows): linear in h, with no activation yet
        """
        raise NotImplementedError

    def forward(self, h, state=None, mask=None):
        """h (B, L, D) -> (B, L, D), next state: as Mamba2.forward, with any number of gates"""
        conv_state, *S = state if state is not None else (None,)
        q, k, v, *gates, z, vkq = self.project(h, conv_state)
        if mask is not None:                        # padding writes nothing and forgets nothing
            k, *gates = (x * mask.view(*mask.shape, *[1] * (x.dim() - 2)) for x in (k, *gates))
        y, *S = self.mix((q, k, v, *gates), *S)
        y = y + self.D.to(v.dtype)[:, None] * v                                 # (B, L, H, P)
        y = y.flatten(-2) * F.silu(z + self.z_bias.to(z.dtype))                 # (B, L, H P)
        next_state = None if state is None else (last_inputs(conv_state, vkq, mask), *S)
        return self.out_proj(y), next_state

    def mix(self, operands, S=None):
        """The operator on its operands, from the state S -> y (B, L, H, P), next state or None"""
        if S is None:
            return self.operator(*operands), None
        if operands[0].shape[1] == 1:
            y, S = self.operator_step(*(x[:, 0] for x in operands), S)
            return y[:, None], S
        return self.operator(*operands, initial_state=S, return_final_state=True)

    def matrix(self, h):
        """h (B, L, D) -> (B, H, L, L), column by column: y for v = the identity is M

        For operators whose M has no closed form. Stage 1 then keeps several (L, L) maps per head.
        """
        q, k, v, *gates, _, _ = self.project(h)
        L, H = v.shape[1:3]
        identity = torch.eye(L, dtype=v.dtype, device=v.device)[:, None].expand(len(v), L, H, L)
        M = self.mix((q, k, identity, *gates))[0].transpose(1, 2)               # (B, H, L, L)
        return M + torch.diag_embed(self.D[:, None].expand(H, L))

    def orientation(self, h, q_t, k_t, scale, window=None):
        """Stage 1's loss, as Mamba2.orientation, but with the matrices in memory"""
        return distance_in_full(q_t, k_t, scale, self.matrix(h), window)


class RetNet(Mixer):
    """Retention [4]: each head forgets at a rate of its own, fixed: e^a = 1 - 2^(-5 - h)."""

    @staticmethod
    def gate_rows(config):
        return 0

    def operands(self, q, k, v, _):
        h = torch.arange(v.shape[2], device=v.device, dtype=at_least_fp32(v.dtype))
        return q, k, v, torch.log1p(-(2 ** (-5 - h))).expand(v.shape[:3])       # (B, L, H)

    # M is q k^T with a decay, as Mamba-2's, so stage 1 needs no (L, L) map.
    matrix = Mamba2.matrix
    orientation = Mamba2.orientation


class Linear(Mixer):
    """Normalised linear attention [5], phi = elu + 1:  y_t = phi(q_t) S_t / (phi(q_t) n_t)

    n, the sum of phi(k), is the last column of S, because v gets a column of ones. With it, v has
    a width the Triton kernel lacks, so that a GPU runs the chunked form.
    """

    @staticmethod
    def gate_rows(config):
        return 0

    def operands(self, q, k, v, _):
        return F.elu(q) + 1, F.elu(k) + 1, v, v.new_zeros(v.shape[:3], dtype=at_least_fp32(v.dtype))

    def mix(self, operands, S=None):
        q, k, v, a = operands
        y, S = super().mix((q, k, F.pad(v, (0, 1), value=1.0), a), S)
        return y[..., :-1] / (y[..., -1:] + 1e-10), S

    def initial_state(self, B):
        before, S = super().initial_state(B)
        return before, F.pad(S, (0, 1))


class MLSTM(Linear):
    """xLSTM's matrix memory [6]: a sigmoid forget gate f, an exponential input gate i.

    S_t = sigmoid(f_t) S_(t-1) + e^(i_t) k_t v_t^T     y_t = q_t S_t / max(|q_t n_t|, 1)

    The state is stored as e^(-m_t) S_t, where m_t = max(log sigmoid(f_t) + m_(t-1), i_t, 0): no
    exponent is above 0, so nothing overflows. y is the same for any m, so m needs no gradient.
    Everything is in fp32, because q n is a sum with both signs: in bf16 its rounding errors would
    be as large as the sum.
    """

    @staticmethod
    def gate_rows(config):
        return 2 * config.n_head

    def operands(self, q, k, v, gates):
        i, f = gates.to(at_least_fp32(gates.dtype)).chunk(2, dim=-1)            # (B, L, H) each
        return per_head(q, v.shape[2]), per_head(k, v.shape[2]), v, F.logsigmoid(f), i

    def mix(self, operands, S=None, m=None):
        q, k, v, f, i = operands
        f = f.clamp_min(-1e6)           # forgets everything, and its running sum is still finite
        with torch.no_grad():           # F_t = f_1 + ... + f_t, and m_t - F_t is a running maximum
            sums = F.pad(f.double().cumsum(1), (0, 0, 1, 0))                    # (B, 1 + L, H)
            before = torch.zeros_like(sums[:, :1]) if m is None else m[:, None]
            m = sums + torch.cat([before, i.clamp_min(0) - sums[:, 1:]], 1).cummax(1).values
            fall = torch.minimum(m[:, :-1] - m[:, 1:], -f)      # rounding must not bring a above 0
            m = m[:, 1:].to(f.dtype)
        values = F.pad(v, (0, 1), value=1.0).to(f.dtype)                        # (B, L, H, P + 1)
        q = q.to(f.dtype)
        k = k.to(f.dtype) * (i - m).exp()[..., None]
        y, S = Mixer.mix(self, (q, k, values, f + fall.to(f.dtype)), S)
        y = y[..., :-1] / torch.maximum(y[..., -1:].abs(), (-m).exp()[..., None])
        return y.to(v.dtype), S, m[:, -1]

    def initial_state(self, B):
        before, S = super().initial_state(B)
        return before, S, S.new_zeros(S.shape[:2])


class MetaLA(Mixer):
    """MetaLA [7]: each channel forgets at a rate of its own, and writes as much as it forgets.

    S_t = diag(e^(a_t)) S_(t-1) + (1 - e^(a_t)) v_t^T, where a = logsigmoid(gate) / 16. It has no
    key: the gate is in k's place in in_proj, and --init qkv finds no part "k" to copy into.
    """
    key = "gate"
    operator = staticmethod(channel_chunked)
    operator_step = staticmethod(channel_step)

    @staticmethod
    def gate_rows(config):
        return 0

    def operands(self, q, gate, v, _):
        a = F.logsigmoid(gate.to(at_least_fp32(gate.dtype))) / 16
        q = per_head(q, v.shape[2])                                             # (B, L, H, N)
        a = per_head(a, v.shape[2])                                             # (B, L, H, N)
        return q, -torch.expm1(a), v, a


class GLA(MetaLA):
    """Gated linear attention [8]: MetaLA's decay with a key beside it, and a gate of rank 16."""
    key = "k"

    @staticmethod
    def gate_rows(config):
        return 16

    def __init__(self, config):
        super().__init__(config)
        self.in_proj_gate = nn.Linear(16, config.n_qk_head * config.d_state)

    def reset_parameters(self):
        super().reset_parameters()
        self.in_proj_gate.reset_parameters()

    def operands(self, q, k, v, gates):
        gate = self.in_proj_gate(gates).unflatten(-1, k.shape[2:])              # (B, L, G, N)
        q, _, v, a = super().operands(q, gate, v, None)
        return q, per_head(k, v.shape[2]), v, a


class DeltaNet(Mixer):
    """The delta rule [9]: a share b = sigmoid(gate) of what k finds in S is replaced with v.

    q and k have length 1. S_t = (I - b_t k_t k_t^T) S_(t-1) + b_t k_t v_t^T
    """
    operator = staticmethod(delta_rule)
    operator_step = staticmethod(delta_step)

    def operands(self, q, k, v, gate):
        q = F.normalize(per_head(q, v.shape[2]), dim=-1)                        # (B, L, H, N)
        k = F.normalize(per_head(k, v.shape[2]), dim=-1)                        # (B, L, H, N)
        b = gate.to(at_least_fp32(gate.dtype)).sigmoid()
        return q, k, v, torch.zeros_like(b), b


class GatedDeltaNet(DeltaNet):
    """Gated DeltaNet [10]: the delta rule, and S fades as Mamba-2's does."""

    @staticmethod
    def gate_rows(config):
        return 2 * config.n_head

    def operands(self, q, k, v, gates):
        gate, A_log = gates.chunk(2, dim=-1)
        q, k, v, _, b = super().operands(q, k, v, gate)
        return q, k, v, -F.softplus(A_log.to(b.dtype)), b


MIXERS = {"linear": Linear, "retnet": RetNet, "mlstm": MLSTM, "gla": GLA, "metala": MetaLA,
          "deltanet": DeltaNet, "gated_deltanet": GatedDeltaNet}


# -----------------------------------------------------------------------------
# the study: every mixer from every start, at equal tokens

STARTS = {  # [3]'s initialisations, and the best two at once
    "nothing": "--init random --stage 3 --tokens 0.2e6 --lr 2.8e-3",
    "q, k, v": "--init qkv --stage 3 --tokens 0.2e6 --lr 2.8e-3",
    "matrices": "--init mohawk --stage 1 3 --tokens 0.04e6 0.16e6 --lr 2e-3 2.8e-3",
    "hidden states": "--init mohawk --stage 2 3 --tokens 0.08e6 0.12e6 --lr 4e-3 1e-3",
    "q, k, v, hidden states": "--init qkv --stage 2 3 --tokens 0.08e6 0.12e6 --lr 4e-3 1e-3",
}
STUDY = {}
for start, flags in STARTS.items():
    for name in ("mamba2", *MIXERS):
        STUDY[f"{name}, from {start}"] = f"--mixer {name} {flags}"
COMMON = "--preset tiny --eval_tokens 32768"

if __name__ == "__main__":
    import importlib                        # by its name: an exported copy of this file has no grid
    importlib.import_module("extras.grid").main("mixers", STUDY, COMMON, __doc__)
