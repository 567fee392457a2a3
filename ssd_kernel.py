"""The SSD operator: what attention becomes when its memory must fit in one matrix.

Run:  python ssd_kernel.py          # times the forms below, here, on whatever this machine has

ssd(q, k, v, a) stands beside scaled_dot_product_attention(q, k, v). Both compute y = M v, M lower
triangular:

    attention    M = softmax(q k^T / sqrt(N))
                 every row sums to one; to make row L, all of k and v are kept
    SSD          M[i,j] = (q_i . k_j) e^(a_(j+1) + ... + a_i)
                 a fading mask instead of softmax; one S is kept

because SSD is also a recurrence:  S_t = e^(a_t) S_(t-1) + k_t v_t^T,  y_t = q_t S_t.  That the same
y can be had both ways is the duality of [1]. Each form here is tested against the one above it:

    ssd_recurrent   the definition, token by token                         O(L) steps
    ssd_naive       M in full: masked attention with a decay               O(L^2) memory
    ssd_chunked     M in full inside chunks, the recurrence between them   O(L), all matrix products
    ssd_step        one token of the recurrence, for generation

Names, here and in the whole project. Capitals are sizes, small letters tensors; i asks, j is asked:

    here  shape          Mamba-2   attention   in plain words
    q     (B, L, G, N)   C         query       what a position asks the state
    k     (B, L, G, N)   B         key         where a position writes
    v     (B, L, H, P)   X         value       what it writes
    a     (B, L, H)      log A-bar             log of how much is kept, <= 0
    S     (B, H, N, P)   h         (KV cache)  what is remembered
    M     (B, H, L, L)   L o C B^T attention   who looks at whom
    u     (B, L, D)      u         hidden      what a layer is given, before its norm

B batch, L length, D model width, H heads, G groups of heads that share q and k (G divides H),
N state (key) width, P head (value) width, Q chunk length, V vocabulary.

It leaves out: GPU kernels of its own. On a GPU the chunked form runs, through torch's matrix
products.

[1] Mamba-2, arXiv 2405.21060    [2] MOHAWK, arXiv 2408.10189
"""
import math
import time

import torch
from torch.autograd.function import once_differentiable

# orientation_loss looks at so many entries of M at once: 4 MB in fp32, which a cache holds.
TILE = 2**20


def ssd(q, k, v, a, initial_state=None, return_final_state=False, backend="auto"):
    """y = M v, with M[i,j] = (q_i . k_j) e^(a_(j+1) + ... + a_i) for j <= i, else 0 ([1] eq. 6).

    q, k (B, L, G, N)   v (B, L, H, P)   a (B, L, H), log decay, <= 0
    initial_state (B, H, N, P), zeros if None
    -> y (B, L, H, P) in v's dtype, or (y, final state), the state in fp32 (fp64 for fp64 inputs).
    Differentiable in every tensor. Any L >= 1. Raises ValueError for shapes that do not fit.
    """
    check(q, k, v, a, initial_state)
    if backend == "auto":
        one_chunk = v.shape[1] <= chunk_length(v.shape[-1])             # plain masked attention
        backend = "naive" if one_chunk else "chunked"
    if backend not in BACKENDS:
        raise ValueError(f"no SSD backend {backend!r}: choose auto or one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, a, initial_state, return_final_state)


def chunk_length(P):
    """Q by head width: with Q near P, N the four steps of ssd_chunked cost about the same."""
    return 32 if P <= 32 else 64


def check(q, k, v, a, S):
    (B, L, H, P), (G, N) = v.shape, q.shape[2:]
    if q.shape != (B, L, G, N) or k.shape != q.shape or a.shape != (B, L, H) or H % G or L < 1:
        raise ValueError("ssd needs q, k (B, L, G, N), v (B, L, H, P), a (B, L, H) and G "
                         f"dividing H; got q {tuple(q.shape)}, k {tuple(k.shape)}, "
                         f"v {tuple(v.shape)}, a {tuple(a.shape)}")
    if S is not None and S.shape != (B, H, N, P):
        raise ValueError(f"ssd needs a state of shape {(B, H, N, P)}, got {tuple(S.shape)}")


def per_head(x, H):
    """(B, L, G, N) -> (B, L, H, N): each group's q or k, once for each of its heads."""
    return x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], dim=2)


def wide(dtype):
    """The dtype of decays and states: never less than fp32, since errors there add up over L."""
    return torch.promote_types(dtype, torch.float32)


# -----------------------------------------------------------------------------
# the definition, and the matrix

def ssd_recurrent(q, k, v, a, initial_state=None, return_final_state=False):
    """S_t = e^(a_t) S_(t-1) + k_t v_t^T      y_t = q_t S_t

    Slow, obvious, and the oracle: every other form in this file is tested against it.
    """
    assert (a <= 0).all(), "a is the log of a decay: it must be <= 0"
    (B, L, H, P), N = v.shape, q.shape[-1]
    S = v.new_zeros(B, H, N, P, dtype=wide(v.dtype)) if initial_state is None else initial_state
    y = []
    for t in range(L):
        y_t, S = ssd_step(q[:, t], k[:, t], v[:, t], a[:, t], S)
        y.append(y_t)
    y = torch.stack(y, dim=1)                                           # (B, L, H, P)
    return (y, S) if return_final_state else y


def ssd_step(q, k, v, a, S):
    """One token: q, k (B, G, N), v (B, H, P), a (B, H), S (B, H, N, P)

    -> y (B, H, P), the next S (B, H, N, P)
    """
    H = v.shape[1]
    q, k = (per_head(x[:, None], H)[:, 0].to(S.dtype) for x in (q, k))  # (B, H, N)
    S = a.to(S.dtype).exp()[..., None, None] * S + k[..., :, None] * v.to(S.dtype)[..., None, :]
    return (q[..., None, :] @ S)[..., 0, :].to(v.dtype), S


def decay_matrix(a):
    """a (..., L) -> (..., L, L) with e^(a_(j+1) + ... + a_i) at [i, j] for j <= i, else 0.

    >>> decay_matrix(torch.tensor([.5, .5, .25]).log())
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 1.0000, 0.0000],
            [0.1250, 0.2500, 1.0000]])
    """
    total = a.cumsum(-1)
    gap = total[..., :, None] - total[..., None, :]     # <= 0 wherever j <= i
    future = torch.ones(gap.shape[-2:], dtype=torch.bool, device=a.device).triu(1)
    return gap.masked_fill(future, -torch.inf).exp()    # masked before exp: no inf * 0 in backward


def mixing_matrix(q, k, a):
    """M (B, H, L, L) from q, k (B, L, G, N) and a (B, L, H), in a's precision or wider.

    For pictures and checks.
    """
    H = a.shape[-1]
    # Over thousands of tokens the running sum of a is large and its differences small: fp64 keeps
    # their digits.
    decay = decay_matrix(a.double().transpose(1, 2)).to(wide(q.dtype))  # (B, H, L, L)
    return torch.einsum("bihn,bjhn->bhij", per_head(q, H), per_head(k, H)) * decay


def ssd_naive(q, k, v, a, initial_state=None, return_final_state=False):
    """y = M v with M in full: masked attention with a decay instead of softmax ([1] eq. 16)."""
    H, A = v.shape[2], a.double().cumsum(1)                             # (B, L, H), a_1 + ... + a_t
    y = torch.einsum("bhij,bjhp->bihp", mixing_matrix(q, k, a).to(v.dtype), v)
    if initial_state is not None:
        faded = per_head(q, H) * A.exp().to(q.dtype)[..., None]
        y = y + torch.einsum("bihn,bhnp->bihp", faded, initial_state.to(q.dtype)).to(v.dtype)
    if not return_final_state:
        return y
    dtype = wide(v.dtype)
    left = (A[:, -1:] - A).exp().to(dtype)                              # left of token j at the end
    S = torch.einsum("bjhn,bjhp->bhnp", per_head(k, H).to(dtype) * left[..., None], v.to(dtype))
    if initial_state is not None:
        S = S + A[:, -1].exp().to(dtype)[..., None, None] * initial_state
    return y, S


# -----------------------------------------------------------------------------
# the chunked form

def ssd_chunked(q, k, v, a, initial_state=None, return_final_state=False, chunk=None):
    """The same y in O(L) time and memory, nearly all of it matrix products ([1] section 6).

        j ->   1 2 3 | 4 5 6 | 7 8 9
      i    1   #     |       |          1 inside: a chunk looks at itself, plain masked attention
      |    2   # #   |       |          2 write:  k, v of a chunk -> what it adds to the state
      v    3   # # # |       |          3 carry:  the state goes from chunk to chunk and fades
           ----------+-------+------    4 read:   q of a chunk asks the state at its door
           4   . . . | #     |
           5   . . . | # #   |          '#' is step 1; every '.' block has rank N, so steps 2-4 need
           6   . . . | # # # |          only an N x P state per head to get through it
           ----------+-------+------
           7   . . . | . . . | #
    """
    (B, L, H, P), N, dtype = v.shape, q.shape[-1], wide(v.dtype)
    chunk = chunk or chunk_length(P)
    C = -(-L // chunk)
    if pad := C * chunk - L:        # zeros at the end: k = 0 writes nothing, a = 0 forgets nothing
        q, k, v, a = (torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
                      for x in (q, k, v, a))
    q, k, v = (per_head(x, H).reshape(B, C, chunk, H, -1).transpose(2, 3)
               for x in (q, k, v))                                      # (B, C, H, Q, N or P)
    a = a.reshape(B, C, chunk, H).transpose(2, 3).to(dtype)             # (B, C, H, Q)
    A = a.cumsum(-1)                                                    # decay since the door, <= 0

    M = (q @ k.transpose(-1, -2)) * decay_matrix(a)                     # 1 inside  (B, C, H, Q, Q)
    y = M.to(v.dtype) @ v                                               #           (B, C, H, Q, P)
    left = (A[..., -1:] - A).exp().to(k.dtype)                          # left of each at chunk end
    writes = (k * left[..., None]).transpose(-1, -2) @ v                # 2 write   (B, C, H, N, P)
    S = v.new_zeros(B, H, N, P, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    doors, S = Carry.apply(A[..., -1].exp(), writes.to(dtype), S)       # 3 carry   (B, C, H, N, P)
    y = y + (q * A.exp().to(q.dtype)[..., None]) @ doors.to(q.dtype)    # 4 read    (B, C, H, Q, P)

    y = y.transpose(2, 3).reshape(B, C * chunk, H, P)[:, :L].to(v.dtype)  # (B, L, H, P)
    return (y, S) if return_final_state else y


class Carry(torch.autograd.Function):
    """doors_c = S, then S <- decay_c S + writes_c, for all chunks c, in one autograd node.

    decay (B, C, H), writes (B, C, H, N, P), S (B, H, N, P)  ->  doors (B, C, H, N, P), the last S
    """
    @staticmethod
    def forward(ctx, decay, writes, S):
        doors = torch.empty_like(writes)
        for c in range(writes.shape[1]):
            doors[:, c] = S
            S = torch.addcmul(writes[:, c], S, decay[:, c, :, None, None])
        ctx.save_for_backward(decay, doors)
        return doors, S

    @staticmethod
    @once_differentiable
    def backward(ctx, d_doors, d_S):
        decay, doors = ctx.saved_tensors
        d_writes = torch.empty_like(doors)
        for c in reversed(range(doors.shape[1])):           # the same recurrence, backward in time
            d_writes[:, c] = d_S
            d_S = torch.addcmul(d_doors[:, c], d_S, decay[:, c, :, None, None])
        return (d_writes * doors).sum((-1, -2)), d_writes, d_S


BACKENDS = {"recurrent": ssd_recurrent, "naive": ssd_naive, "chunked": ssd_chunked}


# -----------------------------------------------------------------------------
# stage 1's distance

def orientation_loss(q_t, k_t, scale, q, k, a, D, return_size=False):
    """Mean over batch and heads of || softmax(q_t k_t^T scale) - (M + diag D) ||_F, causal
    ([2] section 4.1).

    teacher: q_t (B, L, H, N_t), k_t (B, L, G_t, N_t), scale: a number
             fewer k heads, as in grouped-query attention
    student: q, k (B, L, G, N)   a (B, L, H) <= 0   D (H)
             gradients for these four
    -> a scalar; with return_size also the mean norm of the teacher's matrix, which is what a silent
    student would score.

    No L x L matrix exists: rows of E = M + diag D - softmax are made and used up in blocks. All
    gradients are linear in one over the norm, which is known only at the end, so the one pass
    leaves them behind unscaled:
        dq = (E o decay) k    dk = (E o decay)^T q    dD = trace E
        dA_i = sum_j (E o M)[i, j] - sum_j (E o M)[j, i]
    with A the running sum of a, hence da = reverse cumulative sum of dA.
    """
    distance, size = OrientationLoss.apply(q_t, k_t, scale, q, k, a, D)
    return (distance, size) if return_size else distance


class OrientationLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_t, k_t, scale, q, k, a, D):
        (B, L, H), G, dtype = a.shape, q.shape[2], wide(a.dtype)
        q_t, k_t, q, k = (per_head(x, H).transpose(1, 2).to(dtype)
                          for x in (q_t, k_t, q, k))                    # (B, H, L, N)
        A = a.double().cumsum(1).transpose(1, 2)                        # (B, H, L)
        dq, dk, dA = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(A)
        dD = D.new_zeros(B, H, dtype=dtype)
        squares, squares_t = dD.clone(), dD.clone()                     # (B, H)
        rows = max(1, min(L, TILE // (B * H * L)))
        for i in range(0, L, rows):
            j = min(i + rows, L)                                        # rows i..j-1, cols 0..j-1
            future = torch.ones(j - i, j, dtype=torch.bool, device=q.device).triu(i + 1)
            target = q_t[:, :, i:j] @ k_t[:, :, :j].mT * scale
            target = target.masked_fill_(future, -torch.inf).softmax(-1)
            # Counted from row i, in fp64, the running sums may go to fp32: far from i they are
            # large, but fade to 0.
            near = (A[:, :, :j] - A[:, :, i, None]).to(dtype)           # (B, H, j)
            gap = near[..., i:, None] - near[..., None, :]
            decay = gap.masked_fill_(future, -torch.inf).exp_()
            M = (q[:, :, i:j] @ k[:, :, :j].mT).mul_(decay)             # (B, H, rows, j)
            E = M - target
            E.diagonal(i, -2, -1).add_(D.to(dtype)[:, None])
            squares += E.square().sum((-1, -2))
            squares_t += target.square_().sum((-1, -2))
            dD += E.diagonal(i, -2, -1).sum(-1)
            M.mul_(E)
            dA[:, :, i:j] += M.sum(-1)
            dA[:, :, :j] -= M.sum(-2)
            E.mul_(decay)
            dq[:, :, i:j] = E @ k[:, :, :j]
            dk[:, :, :j] += E.mT @ q[:, :, i:j]
        norm = squares.sqrt()                                           # (B, H)
        weight = 1 / (norm.clamp_min(torch.finfo(dtype).tiny) * B * H)  # a perfect student: no push
        da = dA.flip(-1).cumsum(-1).flip(-1)
        dq, dk = ((weight[..., None, None] * x).transpose(1, 2).unflatten(2, (G, H // G)).sum(3)
                  for x in (dq, dk))
        ctx.save_for_backward(dq, dk, (weight[..., None] * da).transpose(1, 2).to(a.dtype),
                              (weight * dD).sum(0))
        size = squares_t.sqrt().mean()
        ctx.mark_non_differentiable(size)
        return norm.mean(), size

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        return None, None, None, *(g * gradient for gradient in ctx.saved_tensors)


def orientation_loss_naive(q_t, k_t, scale, q, k, a, D):
    """The same with both matrices in full, as the formula reads: referee of orientation_loss."""
    L, H = a.shape[1:]
    scores = torch.einsum("bihn,bjhn->bhij", per_head(q_t, H), per_head(k_t, H)) * scale
    future = torch.ones(L, L, dtype=torch.bool, device=a.device).triu(1)
    target = scores.masked_fill(future, -torch.inf).softmax(-1)         # (B, H, L, L)
    E = mixing_matrix(q, k, a) + torch.diag_embed(D[:, None].expand(H, L)) - target
    return E.norm(dim=(-1, -2)).mean()


# -----------------------------------------------------------------------------

def main():
    """Time per token of both forms: flat in L for the chunked one, growing for the one with M."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    B, H, P = 1, 8, 64
    print(f"forward + backward, B {B}, H = G = {H}, P = N = {P}, fp32, {device}: "
          "microseconds per token")
    print(f"{'L':>8}{'naive':>12}{'chunked':>12}")
    for L in (512, 1024, 2048, 4096, 16384):
        times = {name: seconds(name, (B, L, H, P), device) / L * 1e6
                 for name in ("naive", "chunked") if name == "chunked" or L <= 4096}
        print(f"{L:8}{times.get('naive', math.nan):12.1f}{times['chunked']:12.1f}")


def seconds(backend, shape, device):
    """The fastest of three runs of ssd and its gradients."""
    q, k, v = (torch.randn(shape, device=device, requires_grad=True) for _ in range(3))
    a, times = (-torch.rand(shape[:3], device=device)).requires_grad_(), []
    for _ in range(3):
        start = time.perf_counter()
        ssd(q, k, v, a, backend=backend).sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


if __name__ == "__main__":
    main()
