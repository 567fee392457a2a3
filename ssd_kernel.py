"""SSD (state space duality): what attention becomes when its memory must fit in one matrix.

Run:  python test_ssd.py 90             # no GPU: compile the kernels for sm_90, print registers
      python -m extras.bench_kernel     # time the forms below and their peers on this machine

ssd(q, k, v, a) stands beside scaled_dot_product_attention(q, k, v). Both compute y = M v, M lower
triangular:

    attention    M = softmax(q k^T / sqrt(N))
                 every row sums to one; row L needs all of k and v
    SSD          M[i,j] = (q_i . k_j) e^(a_(j+1) + ... + a_i)
                 a decay mask instead of softmax; one state S stands for all of k and v

because SSD is also a recurrence:  S_t = e^(a_t) S_(t-1) + k_t v_t^T,  y_t = q_t S_t.  That the same
y can be had both ways is the duality of [1]. Every other form is tested against the first:

    ssd_recurrent   the definition, token by token                         O(L) steps
    ssd_naive       M in full: masked attention with a decay               O(L^2) memory
    ssd_chunked     M in full inside chunks, the recurrence between them   O(L), all matrix products
    ssd_triton      the same in one kernel, for GPUs: no (chunk, chunk) tile touches memory
    ssd_step        one token of the recurrence, for generation

Two losses of MOHAWK [2] follow. Both compute in blocks and make their gradients with the loss, so
that no matrix (L, L) and no map (tokens, V) is ever in memory:

    orientation_loss    stage 1, matrix orientation: M and a teacher's softmax matrix
    distillation_loss   stage 3, knowledge distillation: two models' predictions of the next token

Names, here and in the project. Position i reads what position j wrote:

    here  shape          Mamba-2   attention   in plain words
    q     (B, L, G, N)   C         query       what a position reads with
    k     (B, L, G, N)   B         key         where a position writes
    v     (B, L, H, P)   X         value       what it writes
    a     (B, L, H)      log A-bar             log decay, <= 0
    S     (B, H, N, P)   h         (KV cache)  the state
    M     (B, H, L, L)   its mask  attention   who attends to whom
                         times C B^T
    u     (B, L, D)      u         hidden      a layer's input, before its norm (model_ssm.py)

B batch, L length, D model width, H heads, G groups of heads that share q and k (G divides H),
N state (key) width, P head (value) width, Q chunk length, C number of chunks, V vocabulary.
In orientation_loss D (H) is Mamba-2's skip instead: a layer's output is y + D v. In
distillation_loss p and q are the two predictions.

It leaves out: second derivatives; in the Triton form fp64, and N or P other than 16, 32, 64, 128:
for those ssd() runs the PyTorch forms on a GPU, too.

[1] Mamba-2, arXiv 2405.21060    [2] MOHAWK, arXiv 2408.10189
"""
from __future__ import annotations

import functools
import itertools
import math
import os

import torch
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

try:
    import triton
    import triton.language as tl
except ImportError:                     # not on this platform: the forms in PyTorch need none of it
    triton = None


def ssd(q, k, v, a, initial_state=None, cu_seqlens=None, return_final_state=False,
        backend="auto"):
    """y = M v, with M[i,j] = (q_i . k_j) e^(a_(j+1) + ... + a_i) for j <= i, else 0 ([1] eq. 6).

    q, k (B, L, G, N)   v (B, L, H, P)   a (B, L, H), log decay, <= 0; -inf resets the state
    initial_state (B, H, N, P), zeros if None
    cu_seqlens (n + 1) integers from 0 to L, the same for all rows: n documents are packed in each
    row, and the state restarts at each boundary; states are then (B, n, H, N, P)
    -> y (B, L, H, P) in v's dtype, or (y, final state), the state in fp32 (fp64 for fp64 inputs).
    Differentiable in every tensor. Any L >= 1. Raises ValueError for shapes that do not fit.
    Computed in v's dtype, decays and states in at least fp32, under torch.autocast too.
    """
    check(q, k, v, a, initial_state, cu_seqlens)
    if backend == "auto":
        backend = fastest_backend(v, q.shape[-1])
    if backend not in BACKENDS:
        raise ValueError(f"no SSD backend {backend!r}: choose auto or one of {', '.join(BACKENDS)}")
    return BACKENDS[backend](q, k, v, a, initial_state, cu_seqlens, return_final_state)


# Two decorators stand before the forms, because Python needs them there. The other helpers
# (running_sums, per_head, ...) are the last section of this file; product is x @ y that autocast
# does not round.

def packed(form):
    """A form of ssd that takes one document a row -> one that takes cu_seqlens too."""
    @functools.wraps(form)
    def by_document(q, k, v, a, initial_state=None, cu_seqlens=None, return_final_state=False,
                    **more):
        if cu_seqlens is None:
            return form(q, k, v, a, initial_state, return_final_state, **more)
        cu = boundaries(cu_seqlens, v.shape[1])
        states = [None] * (len(cu) - 1) if initial_state is None else initial_state.unbind(1)
        outputs = [form(*(x[:, i:j] for x in (q, k, v, a)), S, True, **more)
                   for S, (i, j) in zip(states, itertools.pairwise(cu), strict=True)]
        ys, states = zip(*outputs, strict=True)
        y = torch.cat(ys, 1)                                            # (B, L, H, P)
        S = torch.stack(states, 1)                                      # (B, n, H, N, P)
        return (y, S) if return_final_state else y
    return by_document


def outside_autocast(function):
    """A function of tensors -> the same, computed in their dtype whatever autocast surrounds it."""
    @functools.wraps(function)
    def outside(*args):
        device = next(x.device for x in args if isinstance(x, torch.Tensor))
        with torch.autocast(device.type, enabled=False):
            return function(*args)
    return outside


# -----------------------------------------------------------------------------
# The definition, and the matrix

@packed
def ssd_recurrent(q, k, v, a, initial_state=None, return_final_state=False):
    """S_t = e^(a_t) S_(t-1) + k_t v_t^T      y_t = q_t S_t

    Slow and obvious: plain PyTorch on every device, the oracle that every other form in this file
    is tested against.
    """
    assert (a <= 0).all(), "a is the log of a decay: it must be <= 0"
    (B, L, H, P), N = v.shape, q.shape[-1]
    S = v.new_zeros(B, H, N, P) if initial_state is None else initial_state
    S = S.to(at_least_fp32(v.dtype))
    y = []
    for t in range(L):
        y_t, S = step_recurrent(q[:, t], k[:, t], v[:, t], a[:, t], S)
        y.append(y_t)
    y = torch.stack(y, dim=1)                                           # (B, L, H, P)
    return (y, S) if return_final_state else y


def step_recurrent(q, k, v, a, S):
    """One token: q, k (B, G, N), v (B, H, P), a (B, H), S (B, H, N, P) -> y (B, H, P), next S"""
    H = v.shape[1]
    q, k = (per_head(x[:, None], H)[:, 0].to(S.dtype) for x in (q, k))  # (B, H, N)
    decay = a.to(S.dtype).exp()[..., None, None]                        # (B, H, 1, 1)
    S = decay * S + k[..., :, None] * v.to(S.dtype)[..., None, :]       # (B, H, N, P)
    y = product(q[..., None, :], S)[..., 0, :]                          # (B, H, P)
    return y.to(v.dtype), S


def decay_matrix(a):
    """a (..., L) -> (..., L, L) with e^(a_(j+1) + ... + a_i) at [i, j] for j <= i, else 0.

    >>> decay_matrix(torch.tensor([.5, .5, .25]).log())
    tensor([[1.0000, 0.0000, 0.0000],
            [0.5000, 1.0000, 0.0000],
            [0.1250, 0.2500, 1.0000]])
    """
    # floored replaces -inf by a finite number whose e^a is 0 too. In one running sum a reset, say
    # a = -100, would round every later small a_t. So the sum is kept as W + A (see running_sums): W
    # sums each a_t's multiple of 16 (-96), exactly, and A the rests (-4). W's differences come
    # first.
    W, A = running_sums(floored(a, at_least_fp32(a.dtype)))
    gap = W[..., :, None] - W[..., None, :]
    gap.add_(A[..., :, None]).sub_(A[..., None, :])     # <= 0 wherever j <= i
    # The future, j > i, is 0 before exp, too: e^gap could be inf there, and inf * 0 in backward.
    return gap.tril_().exp_().tril()


def mixing_matrix(q, k, a):
    """M (B, H, L, L) from q, k (B, L, G, N) and a (B, L, H), in fp32, or fp64 as q is."""
    q, k = (per_head(x, a.shape[-1]).transpose(1, 2).contiguous() for x in (q, k))  # (B, H, L, N)
    # fp64, since over thousands of tokens A, too, is large beside the differences that count
    decay = decay_matrix(a.double().transpose(1, 2)).to(at_least_fp32(q.dtype))  # (B, H, L, L)
    return product(q, k.mT) * decay


@packed
def ssd_naive(q, k, v, a, initial_state=None, return_final_state=False):
    """y = M v with M in full: masked attention with a decay instead of softmax ([1] eq. 16)."""
    dtype = at_least_fp32(v.dtype)
    H = v.shape[2]
    q, k = (x.to(v.dtype) for x in (q, k))
    M = mixing_matrix(q, k, a).to(v.dtype)                              # (B, H, L, L)
    q, k, v = (x.transpose(1, 2) for x in (per_head(q, H), per_head(k, H), v))  # (B, H, L, .)
    # In fp64 one running sum will do: resets cost an fp32 result no digit (an fp64 one, some).
    sums = floored(a, dtype).double().cumsum(1).transpose(1, 2)[..., None]  # a_1 + ... + a_t
    y = product(M, v.contiguous())                                      # (B, H, L, P)
    if initial_state is not None:
        y = y + product(q * sums.exp().to(q.dtype), initial_state.to(q.dtype)).to(v.dtype)
    y = y.transpose(1, 2)                                               # (B, L, H, P)
    if not return_final_state:
        return y
    decay_out = (sums[:, :, -1:] - sums).exp().to(dtype)                # from token j to the end
    S = product((k.to(dtype) * decay_out).mT, v.to(dtype))              # (B, H, N, P)
    if initial_state is not None:
        S = S + sums[:, :, -1:].exp().to(dtype) * initial_state
    return y, S


# -----------------------------------------------------------------------------
# The chunked form

def chunk_length(P):
    """Q by head width: with Q near P and N the four steps drawn below cost about the same."""
    return 32 if P <= 32 else 64


@packed
def ssd_chunked(q, k, v, a, initial_state=None, return_final_state=False, chunk=None):
    """The same y in O(L) time and memory, nearly all of it matrix products ([1] section 6).

        j ->   1 2 3 | 4 5 6 | 7 8 9
      i    1   #     |       |          step 1, inside: a chunk reads itself, masked attention
      |    2   # #   |       |          step 2, write:  k, v of a chunk -> what it adds to the state
      v    3   # # # |       |          step 3, scan:   S_in, the state at each chunk's start
           ----------+-------+------    step 4, read:   q of a chunk reads S_in
           4   . . . | #     |
           5   . . . | # #   |          '#' is step 1. A square of '.' has rank N: steps 2 to 4
           6   . . . | # # # |          need only the state, N x P per head, in its place
           ----------+-------+------
           7   . . . | . . . | #
    """
    (B, L, H, P), N = v.shape, q.shape[-1]
    q, k = (per_head(x, H).to(v.dtype) for x in (q, k))                 # (B, L, H, N)
    a = floored(a, at_least_fp32(v.dtype))
    S = v.new_zeros(B, H, N, P) if initial_state is None else initial_state
    Q = chunk or chunk_length(P)
    if pad := -L % Q:               # zeros at the end: k = 0 writes nothing, a = 0 forgets nothing
        q, k, v, a = (torch.nn.functional.pad(x, (0, 0) * (x.dim() - 2) + (0, pad))
                      for x in (q, k, v, a))
    y, S = Chunked.apply(q, k, v, a, S.to(a.dtype), Q)
    return (y[:, :L], S) if return_final_state else y[:, :L]


class Chunked(torch.autograd.Function):
    """One node of autograd's graph, however many chunks there are, with the gradient written out.

    In a chunk decay_in_i is the decay from its start to i, decay_out_j from j to its end, w_ij from
    j to i, fade from its start to its end; S_in is the state at its start, S_out at its end:
        y_i   = decay_in_i q_i S_in + sum_j w_ij (q_i . k_j) v_j
        S_out = fade S_in + sum_j decay_out_j k_j v_j^T
    """

    @staticmethod
    @outside_autocast
    def forward(ctx, q, k, v, a, S, Q):
        y = torch.empty_like(v)
        # A slice is a run of whole chunks: all of L on a GPU, on a CPU what its cache holds.
        states = []                                 # S_in of the chunks, one tensor for each slice
        ctx.Q = Q
        ctx.slices = cache_slices(v, q.shape[-1], Q)
        for part in ctx.slices:                                         # C: chunks of this slice
            q_c, k_c, v_c, a_c = (in_chunks(x[:, part], Q).contiguous() for x in (q, k, v, a))
            decay_in, decay_out, fade = chunk_decays(a_c, v.dtype)
            M = decay_matrix(a_c).mul_(q_c @ k_c.mT)                    # 1 inside (B, C, H, Q, Q)
            writes = (k_c * decay_out).mT @ v_c                         # 2 write  (B, C, H, N, P)
            S_in, S = scan_states(fade, writes, S)                      # 3 scan   (B, C, H, N, P)
            y_c = (q_c @ S_in.to(v.dtype)).mul_(decay_in)               # 4 read   (B, C, H, Q, P)
            in_chunks(y[:, part], Q).copy_(add_product(y_c, M.to(v.dtype), v_c))
            states.append(S_in)
        ctx.save_for_backward(q, k, v, a, *states)
        return y, S

    @staticmethod
    @once_differentiable
    @outside_autocast
    def backward(ctx, dy, dS):
        """The same four steps transposed, and the scan from the end: dS is S_out's gradient.

            dv_j  = decay_out_j k_j dS + sum_i w_ij (q_i . k_j) dy_i
            dk_j  = decay_out_j dS v_j + sum_i w_ij (v_j . dy_i) q_i
            dq_i  = decay_in_i S_in dy_i + sum_j w_ij (dy_i . v_j) k_j
            dS_in = fade dS + sum_i decay_in_i q_i dy_i^T

        j writes and i reads: a_t is in the decay of every pair with j < t <= i. As e^x is its own
        derivative, da_t is the sum over these pairs of the pair's share in <y, dy>, the sum of
        y times dy. The initial state counts as written before the first token; the last state, with
        its own gradient, as read after the last. There are four kinds of pairs:
            j before the chunk, i after it    da_through, the same for all t of the chunk
            j before, i in the chunk          da_in_i = q_i . (S_in's part of dq_i), for i >= t
            j in the chunk, i after           da_out_j = v_j . (dS's part of dv_j), for j < t
            both in the chunk                 R_ij = w_ij (q_i . k_j) (dy_i . v_j). Sum the rows
                                              i >= t of R, which is 0 for j > i, and subtract
                                              its columns j >= t: what is left has j < t
        A shorter formula, where the last state has no gradient: da_t is the sum of q_s . dq_s -
        k_s . dk_s over all s >= t. There pairs with j >= t are added and subtracted over all of L,
        and rounding errors grow with it. Here every sum stays in its chunk.
        """
        q, k, v, a, *states = ctx.saved_tensors
        Q = ctx.Q
        dtype = v.dtype
        grads = [torch.empty_like(x) for x in (q, k, v, a)]
        for part, S_in in zip(reversed(ctx.slices), reversed(states), strict=True):
            q_c, k_c, v_c, a_c, dy_c = (in_chunks(x[:, part], Q).contiguous()
                                        for x in (q, k, v, a, dy))
            decay_in, decay_out, fade = chunk_decays(a_c, dtype)
            w = decay_matrix(a_c)                                       # (B, C, H, Q, Q)
            dS_reads = (q_c * decay_in).mT @ dy_c                       # 4 (B, C, H, N, P)
            dS_c, dS = scan_states(fade, dS_reads, dS, reverse=True)     # 3 (B, C, H, N, P)
            da_through = fade * (S_in * dS_c).sum((-1, -2))             # (B, C, H)
            S_in, dS_c = (x.to(dtype) for x in (S_in, dS_c))            # (B, C, H, N, P)

            M = (q_c @ k_c.mT) * w                                      # 1 (B, C, H, Q, Q)
            dM = dy_c @ v_c.mT                                          # (B, C, H, Q, Q)
            dv = (k_c @ dS_c).mul_(decay_out)                           # 2 (B, C, H, Q, P)
            da_out = (v_c * dv).sum(-1, dtype=a.dtype)                  # (B, C, H, Q)
            add_product(dv, M.to(dtype).mT, dy_c)
            R = M.mul_(dM)                                              # overwrites M
            dqk = w.mul_(dM).to(dtype)                                  # gradient of q k^T
            del dM                                                      # frees its memory early
            dk = (v_c @ dS_c.mT).mul_(decay_out)                        # (B, C, H, Q, N)
            add_product(dk, dqk.mT, q_c)
            dq = (dy_c @ S_in.mT).mul_(decay_in)                        # (B, C, H, Q, N)
            da_in = (q_c * dq).sum(-1, dtype=a.dtype)                   # (B, C, H, Q)
            add_product(dq, dqk, k_c)
            from_t_on = da_in + R.sum(-1) - R.sum(-2)                   # rows less columns of R
            da = (from_t_on.flip(-1).cumsum(-1).flip(-1) + da_out.cumsum(-1) - da_out
                  + da_through[..., None])
            for grad, grad_c in zip(grads, (dq, dk, dv, da), strict=True):
                in_chunks(grad[:, part], Q).copy_(grad_c)
        return *grads, dS, None


def in_chunks(x, Q):
    """(B, L, H, ...) -> a view (B, C, H, Q, ...)"""
    return x.unflatten(1, (-1, Q)).transpose(2, 3)


def add_product(z, x, y):
    """z (B, C, H, ., .) += x @ y, in one pass over z -> z"""
    return z.flatten(0, 2).baddbmm_(x.flatten(0, 2), y.flatten(0, 2)).view_as(z)


def chunk_decays(a, dtype):
    """a (B, C, H, Q) -> the decay from its chunk's start to each token, and from the token to the
    end (B, C, H, Q, 1), in `dtype`; and of each chunk (B, C, H)"""
    W, A = running_sums(a)
    decay_in = (W + A).exp()
    decay_out = until_end(W, A).exp()
    return decay_in.to(dtype)[..., None], decay_out.to(dtype)[..., None], decay_in[..., -1]


def scan_states(fade, writes, S, reverse=False):
    """S <- fade[c] S + writes[c] for chunk after chunk c -> S before each of them, the last S

    reverse: from the last chunk to the first, for dS; `before` is then the gradient of S_out
    """
    before = torch.empty_like(writes, dtype=S.dtype)                    # (B, C, H, N, P)
    chunks = range(writes.shape[1])
    for c in reversed(chunks) if reverse else chunks:
        before[:, c] = S
        S = torch.addcmul(writes[:, c].to(S.dtype), S, fade[:, c, :, None, None])
    return before, S


# -----------------------------------------------------------------------------
# The Triton form: the state stays in registers
#
#   forward   scans S from the start, steps 1-4 in one go. It reads q k v and writes y.
#   backward  scans dS, the gradient of S, from the end: dq dk dv da in one go. It needs S too,
#             which the forward stores every STATE_EVERY tokens, and scans it up from there.
#
# A program, one of the instances of a kernel that run in parallel, takes one head of one document
# and walks from chunk to chunk. A head whose state is too large for the registers becomes several
# narrower ones with the same q, k and a, see configuration: P in the kernels is their width. If
# programs are too few to fill the GPU, documents are cut in pieces, with a program each; what a
# piece adds to the state is computed first, by another kernel.
# No (Q, Q) tile reaches memory. Programs share no output: two runs give the same bits. Exponents
# are <= 0, and to base 2, for which GPUs have an instruction (but for step_kernel's, to base e).

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
STATE_EVERY = 64                        # a multiple of every chunk length used below


def jit(function):
    """triton.jit, where Triton is installed"""
    return function if triton is None else triton.jit(function)


@jit
def program_range(cu, L, n_docs, H, PIECES: tl.constexpr, STATE_EVERY: tl.constexpr):
    """What this program works on; cu is cu_seqlens

    -> the head h, the piece, the offset of its batch row's first token, the document's start, the
    piece's first position and last + 1, the index of its initial and final state, the index of its
    document's first stored state. Offsets have 64 bits, since B L H P may pass 2^31.
    """
    doc = tl.program_id(0) // PIECES
    piece = tl.program_id(0) % PIECES
    h = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)
    start = tl.load(cu + doc)
    end = tl.load(cu + doc + 1)
    # Pieces start at multiples of STATE_EVERY, so that states are stored where a chunk starts.
    tokens = tl.cdiv(tl.cdiv(end - start, PIECES), STATE_EVERY) * STATE_EVERY
    lo = tl.minimum(start + piece * tokens, end)
    hi = tl.minimum(lo + tokens, end)
    state = (b * n_docs + doc) * H + h
    # A document of n tokens stores at most n // STATE_EVERY + 1 states, so that the `doc` documents
    # before this one, of `start` tokens together, store at most start // STATE_EVERY + doc.
    stored = b * (L // STATE_EVERY + n_docs) + start // STATE_EVERY + doc
    return h, piece, b * L, start, lo, hi, state, stored


@jit
def tile(x, t, heads: tl.constexpr, h, Q: tl.constexpr, WIDTH: tl.constexpr):
    """x (.., heads, WIDTH) -> pointers (Q, WIDTH) to rows t .. t + Q - 1 of head h"""
    return (x + (t * heads + h) * WIDTH
            + tl.arange(0, Q)[:, None] * (heads * WIDTH) + tl.arange(0, WIDTH)[None, :])


@jit
def state_at(x, n, N: tl.constexpr, P: tl.constexpr):
    """-> pointers (N, P) to the n-th state in x: a state is N rows of one head"""
    return tile(x, n * N, 1, 0, N, P)


@jit
def read(x, t, inside, heads: tl.constexpr, h, Q: tl.constexpr, WIDTH: tl.constexpr):
    """-> rows (Q, WIDTH) of x, zeros where not inside, which add nothing to a product"""
    return tl.load(tile(x, t, heads, h, Q, WIDTH), mask=inside[:, None], other=0.0)


@jit
def write(x, t, inside, heads: tl.constexpr, h, rows, Q: tl.constexpr, WIDTH: tl.constexpr):
    tl.store(tile(x, t, heads, h, Q, WIDTH), rows.to(x.dtype.element_ty), mask=inside[:, None])


@jit
def decays(a, t, inside, H: tl.constexpr, h, Q: tl.constexpr):
    """-> A (Q): log2 of decay_in, from the chunk's start to each token; its last, log2 of fade

    A is the whole running sum, not split in W and A: chunks are short instead, see configuration.
    """
    i = tl.arange(0, Q)                                                 # 1.44... is log2 e
    A = tl.cumsum(tl.load(a + t * H + h + i * H, mask=inside, other=0.0) * 1.4426950408889634, 0)
    return A, tl.sum(tl.where(i == Q - 1, A, 0.0), 0)


@jit
def dot(x, y, plus, FP32: tl.constexpr):
    """x @ y + plus, accumulated in fp32. "ieee": tf32 would round fp32 operands, and only those."""
    return tl.dot(x, y, plus, input_precision="ieee" if FP32 else "tf32")


@jit
def advance(S, x, z, log_decay, total, FP32: tl.constexpr):
    """Steps 2 and 3: S, faded by a chunk, plus what the chunk writes

    For S, x (Q, N) is k, z (Q, P) is v, log_decay (Q) is log2 of decay_out. For its gradient dS
    they are q, dy and log2 of decay_in. total: log2 of fade
    """
    x = (x * tl.exp2(log_decay)[:, None]).to(x.dtype)
    return dot(tl.trans(x), z, S * tl.exp2(total), FP32)


@jit
def piece_kernel(x, z, a, cu, writes, fades, L, n_docs, H: tl.constexpr, G: tl.constexpr,
                 N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, FP32: tl.constexpr,
                 PIECES: tl.constexpr, STATE_EVERY: tl.constexpr, BACKWARD: tl.constexpr):
    """What a piece adds to S at its end (x, z = k, v), or to dS at its start (x, z = q, dy);
    and log2 of the piece's fade."""
    h, piece, row, _, lo, hi, state, _ = program_range(cu, L, n_docs, H, PIECES, STATE_EVERY)
    g = h // (H // G)
    i = tl.arange(0, Q)
    S = tl.zeros((N, P), tl.float32)
    log_fade = 0.0
    chunks = tl.cdiv(hi - lo, Q)
    for c in range(chunks):
        t = lo + (chunks - 1 - c if BACKWARD else c) * Q
        inside = t + i < hi
        A, total = decays(a, row + t, inside, H, h, Q)
        x_c = read(x, row + t, inside, G, g, Q, N)
        z_c = read(z, row + t, inside, H, h, Q, P)
        S = advance(S, x_c, z_c, A if BACKWARD else total - A, total, FP32)
        log_fade += total
    at = state * PIECES + piece
    tl.store(state_at(writes, at, N, P), S)
    tl.store(fades + at, log_fade)


@jit
def forward_kernel(q, k, v, a, cu, S0, writes, fades, y, S1, states, L, n_docs, H: tl.constexpr,
                   G: tl.constexpr, N: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
                   FP32: tl.constexpr, PIECES: tl.constexpr, STATE_EVERY: tl.constexpr,
                   STORE: tl.constexpr):
    """y and the last state S1 of each document; if STORE, S every STATE_EVERY tokens in states."""
    h, piece, row, start, lo, hi, state, stored = program_range(cu, L, n_docs, H, PIECES,
                                                                STATE_EVERY)
    g = h // (H // G)
    i = tl.arange(0, Q)
    S = tl.load(state_at(S0, state, N, P))                              # (N, P)
    for before in range(piece):
        at = state * PIECES + before
        S = S * tl.exp2(tl.load(fades + at)) + tl.load(state_at(writes, at, N, P))
    for t in range(lo, hi, Q):                                          # S is S_in here
        inside = t + i < hi
        q_c = read(q, row + t, inside, G, g, Q, N)
        k_c = read(k, row + t, inside, G, g, Q, N)
        v_c = read(v, row + t, inside, H, h, Q, P)
        A, total = decays(a, row + t, inside, H, h, Q)
        if STORE:
            if (t - start) % STATE_EVERY == 0:
                at = (stored + (t - start) // STATE_EVERY) * H + h
                tl.store(state_at(states, at, N, P), S.to(states.dtype.element_ty))
        past = i[:, None] >= i[None, :]
        M = dot(q_c, tl.trans(k_c), None, FP32)                         # 1 inside  (Q, Q)
        M = M * tl.exp2(tl.where(past, A[:, None] - A[None, :], float("-inf")))
        y_c = dot(q_c, S.to(q_c.dtype), None, FP32) * tl.exp2(A)[:, None]   # 4 read  (Q, P)
        y_c = dot(M.to(v_c.dtype), v_c, y_c, FP32)
        write(y, row + t, inside, H, h, y_c, Q, P)
        S = advance(S, k_c, v_c, total - A, total, FP32)                # 2 write, 3 scan
    if piece == PIECES - 1:
        tl.store(state_at(S1, state, N, P), S)


@jit
def backward_kernel(q, k, v, a, cu, states, dy, dS1, writes, fades, dq, dk, dv, da, dS0, L, n_docs,
                    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr, P: tl.constexpr,
                    Q: tl.constexpr, FP32: tl.constexpr, PIECES: tl.constexpr,
                    STATE_EVERY: tl.constexpr):
    """The gradients, from the last chunk to the first: derived in Chunked.backward, with its names.

    Each head writes a dq and dk of its own, so that programs share no output."""
    h, piece, row, start, lo, hi, state, stored = program_range(cu, L, n_docs, H, PIECES,
                                                                STATE_EVERY)
    g = h // (H // G)
    i = tl.arange(0, Q)
    dS = tl.load(state_at(dS1, state, N, P))                            # (N, P)
    for after in range(PIECES - 1 - piece):
        at = state * PIECES + PIECES - 1 - after
        dS = dS * tl.exp2(tl.load(fades + at)) + tl.load(state_at(writes, at, N, P))
    chunks = tl.cdiv(hi - lo, Q)
    for c in range(chunks):
        t = lo + (chunks - 1 - c) * Q
        inside = t + i < hi
        last = (t - start) // STATE_EVERY
        stored_S = tl.load(state_at(states, (stored + last) * H + h, N, P))
        A, total = decays(a, row + t, inside, H, h, Q)      # loads of a and S: one wait for both
        decay_in = tl.exp2(A)[:, None]
        decay_out = tl.exp2(total - A)[:, None]

        # S_in: from the last stored state up
        S = stored_S.to(tl.float32)
        for s in range(start + last * STATE_EVERY, t, Q):       # whole chunks: s + i < t holds
            A_s, total_s = decays(a, row + s, s + i < t, H, h, Q)
            k_s = read(k, row + s, s + i < t, G, g, Q, N)
            v_s = read(v, row + s, s + i < t, H, h, Q, P)
            S = advance(S, k_s, v_s, total_s - A_s, total_s, FP32)

        # dq, from what q read: S_in and the past of the chunk
        dy_c = read(dy, row + t, inside, H, h, Q, P)
        da_through = tl.sum(tl.sum(S * dS, 1), 0) * tl.exp2(total)
        dq_c = dot(dy_c, tl.trans(S.to(dy_c.dtype)), None, FP32) * decay_in
        q_c = read(q, row + t, inside, G, g, Q, N)
        da_in = tl.sum(q_c * dq_c, 1)
        k_c = read(k, row + t, inside, G, g, Q, N)
        v_c = read(v, row + t, inside, H, h, Q, P)
        log_w = tl.where(i[:, None] >= i[None, :], A[:, None] - A[None, :], float("-inf"))
        dqk = dot(dy_c, tl.trans(v_c), None, FP32) * tl.exp2(log_w)     # (Q i, Q j)
        dq_c = dot(dqk.to(k_c.dtype), k_c, dq_c, FP32)
        write(dq, row + t, inside, H, h, dq_c, Q, N)

        # dv and dk, from what read them: later tokens of the chunk, and the state after it. Here
        # log_w and M have rows and columns exchanged, and so has v dy^T, which is computed again:
        # that costs less than to transpose dy v^T.
        log_w = tl.where(i[:, None] <= i[None, :], A[None, :] - A[:, None], float("-inf"))
        M = dot(k_c, tl.trans(q_c), None, FP32) * tl.exp2(log_w)        # (Q j, Q i)
        dv_c = dot(k_c, dS.to(k_c.dtype), None, FP32) * decay_out
        da_out = tl.sum(v_c * dv_c, 1)
        dv_c = dot(M.to(dy_c.dtype), dy_c, dv_c, FP32)
        write(dv, row + t, inside, H, h, dv_c, Q, P)
        dM = dot(v_c, tl.trans(dy_c), None, FP32)                       # (Q j, Q i)
        from_t_on = da_in + (tl.sum(M * dM, 0) - tl.sum(M * dM, 1))     # rows less columns of R
        dk_c = dot(v_c, tl.trans(dS.to(v_c.dtype)), None, FP32) * decay_out
        dk_c = dot((dM * tl.exp2(log_w)).to(q_c.dtype), q_c, dk_c, FP32)
        write(dk, row + t, inside, H, h, dk_c, Q, N)
        da_c = tl.cumsum(from_t_on, 0, reverse=True) + tl.cumsum(da_out, 0) - da_out + da_through
        tl.store(da + (row + t) * H + h + i * H, da_c, mask=inside)

        dS = advance(dS, q_c, dy_c, A, total, FP32)
    if piece == 0:
        tl.store(state_at(dS0, state, N, P), dS)


@jit
def step_kernel(q, k, v, a, S, y, S1, H: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
                P: tl.constexpr, COLUMNS: tl.constexpr):
    """One token, COLUMNS columns of one head's S."""
    bh = tl.program_id(1).to(tl.int64)
    bg = bh // H * G + bh % H // (H // G)
    n = tl.arange(0, N)
    p = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    at = bh * N * P + n[:, None] * P + p[None, :]
    S_p = tl.load(S + at) * tl.exp(tl.load(a + bh))                     # (N, COLUMNS)
    S_p += tl.load(k + bg * N + n).to(tl.float32)[:, None] * tl.load(v + bh * P + p)[None, :]
    y_p = tl.sum(tl.load(q + bg * N + n).to(tl.float32)[:, None] * S_p, 0)  # (COLUMNS)
    tl.store(S1 + at, S_p)
    tl.store(y + bh * P + p, y_p.to(y.dtype.element_ty))


def configuration(N, P, dtype, arch):
    """-> columns of v per program; (chunk, warps, pipeline stages) of forward and of backward

    Chosen so that with Triton 3.7 or newer no kernel spills, that is runs out of registers and uses
    memory instead: `python test_ssd.py 90` prints what each takes on sm_90. S (N, columns) stays in
    registers: it has at most 4,096 numbers, 32 for each thread of 4 warps, and a thread has room
    for 255 in all. Of 4 warps two programs fit on a multiprocessor, of 8 only one. And the small
    products of a chunk of 32 do not divide among eight warps: some would be computed twice.

    fp32 needs short chunks besides, because `decays` does not split its running sum into W and A:
    16 resets, which floored makes -112 each, add up to 16 * 112 / ln 2 = 2,600, where fp32 has four
    decimals left. bf16 and fp16 take chunks of up to 64: three decimals are left, and the inputs
    have no more.
    """
    if dtype == torch.float32:
        warps = 8 if N > 64 else 4
        tiles = 16, warps, 1
        return min(P, 2048 // N, 32), tiles, tiles
    if arch < 90:
        columns = min(P, 2048 // N, 64)
        if N > 64:
            return columns, (64, 8, 1), (16, 4, 1)
        return columns, (64, 4, 1), (32, 4, 1)
    if N > 64:
        return min(P, 32), (64, 4, 1), (32, 4, 1)
    return min(P, 64), (64, 4, 2), (32, 4, 1)


SIZES = (16, 32, 64, 128)               # of N and P, that the kernels take


def ssd_triton(q, k, v, a, initial_state=None, cu_seqlens=None, return_final_state=False,
               pieces=0):
    """The same y by the kernels above. N, P among SIZES; bf16, fp16 or fp32; states in fp32.

    pieces: programs that share a document; 0 takes what fills the GPU
    """
    (B, L, H, P), N = v.shape, q.shape[-1]
    if why := why_not_triton(v, N):
        raise ValueError(f"{why}: backend 'chunked' takes it")
    if cu_seqlens is None:
        cu = torch.arange(0, L + 1, L, dtype=torch.int32, device=v.device)
    else:
        if not torch.compiler.is_compiling():   # reading the values synchronises with the GPU
            boundaries(cu_seqlens, L)
        cu = cu_seqlens.to(v.device, torch.int32)
    n_docs = len(cu) - 1
    if initial_state is None:
        S = v.new_zeros(B, n_docs, H, N, P, dtype=torch.float32)
    else:
        S = initial_state.float().reshape(B, n_docs, H, N, P)
    # A head of more value columns than a program takes runs as several heads that share q, k and a.
    columns = configuration(N, P, v.dtype, architecture(v))[0]
    split = P // columns
    S = S.unflatten(-1, (split, columns)).transpose(-3, -2).flatten(2, 3)   # (B, n, H split, N, .)
    q, k = (x.to(v.dtype) for x in (q, k))
    a = floored(a, torch.float32).repeat_interleave(split, dim=2)       # (B, L, H split)
    inputs = [x.contiguous() for x in (q, k, v.reshape(B, L, H * split, columns), a, S)]
    store = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    y, S, _ = ssd_op(*inputs, cu, store, pieces or pieces_of(v, split * n_docs))
    y = y.reshape(B, L, H, P)
    S = S.unflatten(2, (H, split)).transpose(-3, -2).flatten(-2)        # (B, n, H, N, P)
    if cu_seqlens is None:
        S = S[:, 0]                                                     # (B, H, N, P)
    return (y, S) if return_final_state else y


BACKENDS = {"recurrent": ssd_recurrent, "naive": ssd_naive, "chunked": ssd_chunked,
            "triton": ssd_triton}


def fastest_backend(v, N):
    """What backend="auto" stands for. One chunk is plain masked attention."""
    if v.is_cuda and why_not_triton(v, N) is None:
        return "triton"
    return "naive" if v.shape[1] <= chunk_length(v.shape[-1]) else "chunked"


def why_not_triton(v, N):
    """-> why the kernels cannot run on these tensors, or None"""
    if triton is None:
        return "Triton is not installed"
    if not v.is_cuda and not INTERPRETED:
        return f"Triton needs a CUDA device, the tensors are on {v.device}"
    if N not in SIZES or v.shape[-1] not in SIZES:
        return f"there is no Triton kernel for N {N}, P {v.shape[-1]}, only for {SIZES}"
    if v.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"there is no Triton kernel for {v.dtype}"


def ssd_path(device):
    """What ssd() runs on this device, in words, for head widths among SIZES"""
    return "Triton" if torch.device(device).type == "cuda" and triton else "PyTorch, chunked"


def architecture(v):
    """Compute capability times 10: 90 for Hopper, which the interpreter pretends to be"""
    major, minor = torch.cuda.get_device_capability(v.device) if v.is_cuda else (9, 0)
    return 10 * major + minor


def pieces_of(v, programs):
    """-> how many pieces to cut each document into: at most two programs on each multiprocessor,
    and at most L / 256. programs: how many a head of one row has if no document is cut"""
    B, L, H = v.shape[:3]
    processors = 1
    if v.is_cuda:
        processors = torch.cuda.get_device_properties(v.device).multi_processor_count
    return max(1, min(2 * processors // (B * H * programs), L // 256))


def launch(kernel, tiles, pieces, q, v, cu, tensors, **flags):
    """Start a kernel on its grid: one program for each piece of a document, head and batch row."""
    (B, L, H, P), (G, N), (Q, warps, stages) = v.shape, q.shape[2:], tiles
    n_docs = len(cu) - 1
    with torch.cuda.device_of(v):
        kernel[(pieces * n_docs, H, B)](
            *tensors, L, n_docs, H, G, N, P, Q, v.dtype == torch.float32, pieces, STATE_EVERY,
            **flags, num_warps=warps, num_stages=stages)


def sums_of_pieces(x, z, a, cu, S, tiles, pieces, backward):
    """-> writes (B, n, H, pieces, N, P), log2 of the fades (B, n, H, pieces)"""
    summed = pieces if pieces > 1 else 0        # with one piece there is nothing to sum
    writes = S.new_empty(*S.shape[:3], summed, *S.shape[3:])
    fades = S.new_empty(writes.shape[:4])
    if summed:
        launch(piece_kernel, tiles, pieces, x, z, cu, (x, z, a, cu, writes, fades),
               BACKWARD=backward)
    return writes, fades


def ssd_step(q, k, v, a, S):
    """One token: q, k (B, G, N), v (B, H, P), a (B, H), S (B, H, N, P)

    -> y (B, H, P), the next S (B, H, N, P). On a GPU and without gradients one Triton kernel.
    """
    if (v.is_cuda and S.dtype == torch.float32 and not torch.is_grad_enabled()
            and why_not_triton(v, q.shape[-1]) is None):
        return step_triton(q, k, v, a, S)
    return step_recurrent(q, k, v, a, S)


def step_triton(q, k, v, a, S):
    """ssd_step in one kernel"""
    return step_op(*(x.contiguous() for x in (q, k, v, a.float(), S)))


# What autograd and torch.compile see: three operators, the shapes of their outputs, and that the
# second of the first two is the first one's derivative. Their inputs are contiguous.

@torch.library.custom_op("mohawk::ssd", mutates_args=(), schema="(Tensor q, Tensor k, Tensor v, "
                         "Tensor a, Tensor S, Tensor cu, bool store, int pieces) -> "
                         "(Tensor, Tensor, Tensor)")
def ssd_op(q, k, v, a, S, cu, store, pieces):
    """-> y, the last S, and if `store` the S of every STATE_EVERY tokens, for the backward"""
    tiles = configuration(q.shape[-1], v.shape[-1], v.dtype, architecture(v))[1]
    y, S1, states = ssd_outputs(q, k, v, a, S, cu, store, pieces)
    writes, fades = sums_of_pieces(k, v, a, cu, S, tiles, pieces, False)
    launch(forward_kernel, tiles, pieces, q, v, cu,
           (q, k, v, a, cu, S, writes, fades, y, S1, states), STORE=store)
    return y, S1, states


@ssd_op.register_fake
def ssd_outputs(q, k, v, a, S, cu, store, pieces):
    """Empty outputs: ssd_op fills them; torch.compile, which traces shapes only, runs just this.
    Stored states, which program_range counts, are in v's dtype: dq's product rounds them to it
    anyway, and in da_through the roundings of N P terms average out."""
    B, L, H, P = v.shape
    n_docs, N = S.shape[1], q.shape[-1]
    shape = (B, L // STATE_EVERY + n_docs, H, N, P) if store else (0,)
    return v.new_empty(v.shape), S.new_empty(S.shape), v.new_empty(shape)


@torch.library.custom_op("mohawk::ssd_backward", mutates_args=(), schema="(Tensor q, Tensor k, "
                         "Tensor v, Tensor a, Tensor cu, Tensor states, Tensor dy, Tensor dS, "
                         "int pieces) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
def ssd_backward_op(q, k, v, a, cu, states, dy, dS, pieces):
    """-> dq, dk, dv, da, the gradient of the initial state"""
    (B, L, H, P), (G, N) = v.shape, q.shape[2:]
    dy, dS = (x.contiguous() for x in (dy, dS))
    tiles = configuration(N, P, v.dtype, architecture(v))[2]
    dv, da, dS0 = (x.new_empty(x.shape) for x in (v, a, dS))
    dq, dk = (q.new_empty(B, L, H, N) for _ in range(2))
    writes, fades = sums_of_pieces(q, dy, a, cu, dS, tiles, pieces, True)
    launch(backward_kernel, tiles, pieces, q, v, cu,
           (q, k, v, a, cu, states, dy, dS, writes, fades, dq, dk, dv, da, dS0))
    if G < H:                           # a group's q and k served several heads
        dq, dk = (x.unflatten(2, (G, H // G)).sum(3) for x in (dq, dk))
    return dq, dk, dv, da, dS0


@ssd_backward_op.register_fake
def _(q, k, v, a, cu, states, dy, dS, pieces):
    return tuple(x.new_empty(x.shape) for x in (q, k, v, a, dS))


@torch.library.custom_op("mohawk::ssd_step", mutates_args=(), schema="(Tensor q, Tensor k, "
                         "Tensor v, Tensor a, Tensor S) -> (Tensor, Tensor)")
def step_op(q, k, v, a, S):
    """-> y (B, H, P), the next S (B, H, N, P)"""
    (B, H, P), (G, N) = v.shape, q.shape[1:]
    columns = min(P, 16)                    # of S, for each program
    y, S1 = step_outputs(q, k, v, a, S)
    with torch.cuda.device_of(v):
        step_kernel[(P // columns, B * H)](q, k, v, a, S, y, S1, H, G, N, P, columns, num_warps=4)
    return y, S1


@step_op.register_fake
def step_outputs(q, k, v, a, S):
    return torch.empty_like(v), torch.empty_like(S)


@outside_autocast
def ssd_derivative(ctx, dy, dS, _):
    """For q, k, v, a, S; the operator's other three inputs have no gradient"""
    return *ssd_backward_op(*ctx.saved_tensors, dy, dS, ctx.pieces), None, None, None


def save_for_backward(ctx, inputs, output):
    q, k, v, a, _, cu, _, ctx.pieces = inputs
    ctx.save_for_backward(q, k, v, a, cu, output[2])


ssd_op.register_autograd(ssd_derivative, setup_context=save_for_backward)


# -----------------------------------------------------------------------------
# The loss of MOHAWK's first stage, matrix orientation: the distance of M from the teacher's matrix

def orientation_loss(q_t, k_t, scale, q, k, a, D, window=None, return_size=False,
                     backend="auto"):
    """Mean over batch and heads of || softmax(q_t k_t^T scale) - (M + diag D) ||_F, causal
    ([2] section 4.1).

    teacher: q_t (B, L, H, N_t), k_t (B, L, G_t, N_t), scale: a number
             fewer k heads, as in grouped-query attention
             window: how many keys the softmax is over, its own among them; None: all so far
    student: q, k (B, L, G, N)   a (B, L, H) <= 0   D (H)
             gradients for these four
    -> a scalar; with return_size also the mean norm of the teacher's matrix, which is the distance
    of a student that outputs zeros.

    No L x L matrix exists: rows of E = M + diag D - softmax are made and used up in blocks. Each
    gradient is the one below divided by || E ||, which is known only at the end, so they are scaled
    then (* is elementwise):
        dq = (E * decay) k    dk = (E * decay)^T q    dD = trace E
        dA_i = sum_j (E * M)[i, j] - sum_j (E * M)[j, i]
    with A the running sum of a, hence da = reverse cumulative sum of dA. (The blocked form has A as
    W + A; the kernel has it from the tile's start and to base 2, but dA is of this A.) Its
    rounding errors grow with L. Chunked.backward sums inside chunks only, as states stand for the
    rest, but the softmax in E has no states. At the lengths of training the errors are small.
    """
    if backend not in ("auto", "triton", "blocked"):
        raise ValueError(f"backend {backend!r}: choose auto, triton or blocked")
    if backend == "auto":
        # It checks two widths: the last of its first argument, N here, and its second, the
        # teacher's N. Both must be among SIZES.
        fits = q.is_cuda and why_not_triton(q, k_t.shape[-1]) is None
        backend = "triton" if fits else "blocked"
    window = min(window or a.shape[1], a.shape[1])
    a = floored(a, at_least_fp32(a.dtype))
    distance, size = OrientationLoss.apply(q_t, k_t, scale, window, q, k, a, D,
                                           backend == "triton")
    return (distance, size) if return_size else distance


class OrientationLoss(torch.autograd.Function):
    """The forward makes the gradients too; the backward multiplies them by the loss's gradient."""

    @staticmethod
    def forward(ctx, q_t, k_t, scale, window, q, k, a, D, use_triton):
        B, _, H = a.shape
        G = q.shape[2]
        dq, dk, dA, dD, squares, squares_t = orientation_op(q_t, k_t, scale, window, q, k, a, D,
                                                            use_triton)
        norm = squares.sqrt()                                           # (B, H)
        tiny = torch.finfo(at_least_fp32(a.dtype)).tiny                 # zero norm: zero gradient
        weight = 1 / (norm.clamp_min(tiny) * B * H)                     # (B, H)
        dq, dk = ((weight[:, None, :, None] * x).unflatten(2, (G, H // G)).sum(3).to(q.dtype)
                  for x in (dq, dk))                                    # (B, L, G, N)
        da = weight[:, None] * dA.flip(1).cumsum(1).flip(1)             # (B, L, H)
        ctx.save_for_backward(dq, dk, da.to(a.dtype), (weight * dD).sum(0).to(D.dtype))
        size = squares_t.sqrt().mean()
        ctx.mark_non_differentiable(size)
        return norm.mean(), size

    @staticmethod
    @once_differentiable
    def backward(ctx, g, _):
        dq, dk, da, dD = (g * gradient for gradient in ctx.saved_tensors)
        return None, None, None, None, dq, dk, da, dD, None


@torch.library.custom_op("mohawk::orientation", mutates_args=(), schema="(Tensor q_t, Tensor k_t, "
                         "float scale, int window, Tensor q, Tensor k, Tensor a, Tensor D, "
                         "bool use_triton) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)")
@outside_autocast
def orientation_op(q_t, k_t, scale, window, q, k, a, D, use_triton):
    """-> dq, dk (B, L, H, N), dA (B, L, H), dD, ||E||^2, ||target||^2 (B, H)"""
    form = orientation_triton if use_triton else orientation_blocked
    terms = form(q_t, k_t, scale, window, q, k, a, D)
    return tuple(x.contiguous() for x in terms)


@orientation_op.register_fake
def _(q_t, k_t, scale, window, q, k, a, D, use_triton):
    (B, L, H), N = a.shape, q.shape[-1]
    dtype = torch.float32 if use_triton else at_least_fp32(a.dtype)
    dq, dk = (a.new_empty(B, L, H, N, dtype=dtype) for _ in range(2))
    dA = a.new_empty(B, L, H, dtype=dtype if use_triton else torch.float64)
    dD, squares, squares_t = (a.new_empty(B, H, dtype=dtype) for _ in range(3))
    return dq, dk, dA, dD, squares, squares_t


TILE = 2**20                    # elements of M in a block of rows: what the cache of a CPU holds


def orientation_blocked(q_t, k_t, scale, window, q, k, a, D):
    """Rows of E in blocks of TILE elements"""
    B, L, H = a.shape
    dtype = at_least_fp32(a.dtype)
    q_t, k_t, q, k = (per_head(x, H).transpose(1, 2).to(dtype)
                      for x in (q_t, k_t, q, k))                        # (B, H, L, N)
    W, A = (x.transpose(1, 2) for x in running_sums(a.double(), 1))     # (B, H, L)
    dq, dk, dA = (torch.zeros_like(x) for x in (q, k, A))
    dD, squares, squares_t = (D.new_zeros(B, H, dtype=dtype) for _ in range(3))
    rows = max(1, min(L, TILE // (B * H * L)))
    for lo in range(0, L, rows):
        hi = min(lo + rows, L)                          # rows lo .. hi - 1, columns 0 .. hi - 1
        future = torch.ones(hi - lo, hi, dtype=torch.bool, device=q.device).triu(lo + 1)
        target = q_t[:, :, lo:hi] @ k_t[:, :, :hi].mT * scale           # (B, H, rows, hi)
        unseen = future | torch.ones_like(future).tril(lo - window)     # and beyond the window
        target = target.masked_fill_(unseen, -torch.inf).softmax(-1)
        # W and A are measured from row lo in fp64, then rounded. For columns j < lo a large
        # value has a large rounding error, but its decay is about 0, so the error does not matter.
        # For j >= lo the sums are over fewer than `rows` tokens, as in decay_matrix for one chunk.
        W_lo, A_lo = ((x[:, :, :hi] - x[:, :, lo, None]).to(dtype) for x in (W, A))     # (B, H, hi)
        gap = W_lo[..., lo:, None] - W_lo[..., None, :]
        gap.add_(A_lo[..., lo:, None]).sub_(A_lo[..., None, :])
        decay = gap.masked_fill_(future, -torch.inf).exp_()
        M = (q[:, :, lo:hi] @ k[:, :, :hi].mT).mul_(decay)              # (B, H, rows, hi)
        E = M - target
        E.diagonal(lo, -2, -1).add_(D.to(dtype)[:, None])
        squares += E.square().sum((-1, -2))
        squares_t += target.square_().sum((-1, -2))
        dD += E.diagonal(lo, -2, -1).sum(-1)
        M.mul_(E)
        dA[:, :, lo:hi] += M.sum(-1)
        dA[:, :, :hi] -= M.sum(-2)
        E.mul_(decay)
        dq[:, :, lo:hi] = E @ k[:, :, :hi]
        dk[:, :, :hi] += E.mT @ q[:, :, lo:hi]
    dq, dk, dA = (x.transpose(1, 2) for x in (dq, dk, dA))              # (B, L, H, .)
    return dq, dk, dA, dD, squares, squares_t


@jit
def orientation_kernel(x_t, z_t, scale, window, x, z, a, D, lse, dx, dA, sums, L,
                       H: tl.constexpr, GX: tl.constexpr, GZ: tl.constexpr, G: tl.constexpr,
                       N_T: tl.constexpr, N: tl.constexpr, Q: tl.constexpr, FP32_T: tl.constexpr,
                       FP32: tl.constexpr, ROWS: tl.constexpr):
    """Q rows of E, which give dq (x is q, z is k), or Q columns, which give dk (x is k, z is q).

    teacher: x_t (B, L, GX, N_T), z_t (B, L, GZ, N_T)   student: x, z (B, L, G, N)
    The names are FlashAttention's: m is this program's tile of x, n runs over the tiles of z; m_i
    and l_i are the maximum and the sum of each row's softmax so far, lse is m_i + log l_i (base 2).
    Rows go first and store lse, which columns need.
    """
    i = tl.arange(0, Q)
    start_m = tl.program_id(0)
    h = tl.program_id(1)
    b = tl.program_id(2)
    row = b.to(tl.int64) * L + start_m * Q
    lse += (b.to(tl.int64) * H + h) * L
    offs_m = start_m * Q + i
    x_t_c = read(x_t, row, offs_m < L, GX, h // (H // GX), Q, N_T)
    x_c = read(x, row, offs_m < L, G, h // (H // G), Q, N)
    A, total = decays(a, row, offs_m < L, H, h, Q)
    n_tiles = start_m + 1 if ROWS else tl.cdiv(L, Q) - start_m          # from the diagonal outward

    zero = tl.zeros((Q,), tl.float32)
    if ROWS:
        # The teacher's softmax. In the first tile, the diagonal, each row sees its own key: m_i is
        # finite from then on, so -inf - -inf, a NaN, does not occur.
        m_i = zero - float("inf")
        l_i = zero
        for d in range(n_tiles):
            z_t_c = read(z_t, row - d * Q, offs_m - d * Q < L, GZ, h // (H // GZ), Q, N_T)
            qk = dot(x_t_c, tl.trans(z_t_c), None, FP32_T) * scale      # (Q, Q)
            offs_n = offs_m - d * Q
            visible = ((offs_m[:, None] >= offs_n[None, :])
                       & (offs_m[:, None] < (offs_n + window)[None, :]))
            qk = tl.where(visible, qk, float("-inf"))
            m_new = tl.maximum(m_i, tl.max(qk, 1))
            l_i = l_i * tl.exp2(m_i - m_new) + tl.sum(tl.exp2(qk - m_new[:, None]), 1)
            m_i = m_new
        lse_m = m_i + tl.log2(l_i)
        tl.store(lse + offs_m, lse_m, mask=offs_m < L)

    D_h = tl.load(D + h)
    acc = tl.zeros((Q, N), tl.float32)                                  # dx
    dA_c = zero
    squares = zero                                                      # of E
    squares_t = zero                                                    # of the teacher's matrix
    trace = zero                                                        # of E
    # log2 of the decay from token j to i is A_i - A_j + starts, where A counts from a tile's start
    # and `starts` from the start of the earlier tile to that of the later one: the earlier tile's
    # total, and `between`, the totals of the tiles that lie between. On the diagonal it is 0.
    between = 0.0
    for d in range(n_tiles):
        shift = -d * Q if ROWS else d * Q
        offs_n = offs_m + shift
        z_t_c = read(z_t, row + shift, offs_n < L, GZ, h // (H // GZ), Q, N_T)
        z_c = read(z, row + shift, offs_n < L, G, h // (H // G), Q, N)
        A_z, total_z = decays(a, row + shift, offs_n < L, H, h, Q)
        if ROWS:
            causal = (offs_m[:, None] >= offs_n[None, :]) & (offs_m < L)[:, None]
            starts = tl.where(d > 0, between + total_z, 0.0)            # n is the earlier tile
            gap = A[:, None] + (starts - A_z)[None, :]
            lse_c = lse_m[:, None]
        else:
            causal = (offs_m[:, None] <= offs_n[None, :]) & (offs_n < L)[None, :]
            starts = tl.where(d > 0, between + total, 0.0)              # m is the earlier tile
            gap = A_z[None, :] + (starts - A)[:, None]
            lse_c = tl.load(lse + offs_n, mask=offs_n < L, other=0.0)[None, :]
        between += tl.where(d > 0, total_z, 0.0)
        target = tl.where(causal, dot(x_t_c, tl.trans(z_t_c), None, FP32_T) * scale - lse_c,
                          float("-inf"))
        if d * Q > window - Q:                          # a tile partly or fully beyond the window
            distance = d * Q + (i[:, None] - i[None, :] if ROWS else i[None, :] - i[:, None])
            target = tl.where(distance < window, target, float("-inf"))
        target = tl.exp2(target)                                        # (Q, Q)
        decay = tl.exp2(tl.where(causal, gap, float("-inf")))
        M = dot(x_c, tl.trans(z_c), None, FP32) * decay                 # (Q, Q)
        diagonal = causal & (offs_m[:, None] == offs_n[None, :])
        E = M - target + tl.where(diagonal, D_h, 0.0)
        dA_c += tl.sum(E * M, 1)
        acc = dot((E * decay).to(z_c.dtype), z_c, acc, FP32)
        if ROWS:
            squares += tl.sum(E * E, 1)
            squares_t += tl.sum(target * target, 1)
            trace += tl.sum(tl.where(diagonal, E, 0.0), 1)
    write(dx, row, offs_m < L, H, h, acc, Q, N)
    tl.store(dA + row * H + h + i * H, dA_c, mask=offs_m < L)
    if ROWS:
        out = sums + ((b.to(tl.int64) * H + h) * tl.num_programs(0) + start_m) * 3
        tl.store(out, tl.sum(squares, 0))
        tl.store(out + 1, tl.sum(squares_t, 0))
        tl.store(out + 2, tl.sum(trace, 0))


def orientation_triton(q_t, k_t, scale, window, q, k, a, D):
    """The same by tiles: rows of E for dq, then columns for dk, so that programs share no output"""
    (B, L, H), (G, N), N_t = a.shape, q.shape[2:], k_t.shape[-1]
    q_t, k_t, q, k, a, D = (x.contiguous() for x in (q_t, k_t, q, k, a.float(), D.float()))
    fp32_t, fp32 = (x.dtype == torch.float32 for x in (q_t, q))
    Q, warps, stages = orientation_tiles(N, N_t, fp32 or fp32_t, architecture(q))
    n_tiles = -(-L // Q)
    dq, dk = (x.new_empty(B, L, H, N, dtype=torch.float32) for x in (q, k))
    dA_rows, dA_columns = (torch.empty_like(a) for _ in range(2))       # (B, L, H)
    lse = a.new_empty(B, H, L)
    sums = a.new_empty(B, H, n_tiles, 3)
    scale = scale / math.log(2)                                         # exponents are to base 2
    passes = ((q_t, k_t, q, k, dq, dA_rows, True), (k_t, q_t, k, q, dk, dA_columns, False))
    with torch.cuda.device_of(q):
        for x_t, z_t, x, z, dx, dA, rows in passes:
            orientation_kernel[(n_tiles, H, B)](
                x_t, z_t, scale, window, x, z, a, D, lse, dx, dA, sums, L, H, x_t.shape[2],
                z_t.shape[2], G, N_t, N, Q, fp32_t, fp32, rows, num_warps=warps, num_stages=stages)
    squares, squares_t, dD = sums.sum(2).unbind(-1)                     # (B, H) each
    return dq, dk, dA_rows - dA_columns, dD, squares, squares_t


def orientation_tiles(N, N_t, fp32, arch):
    """-> tile, warps, pipeline stages: chosen like `configuration`, so that nothing spills"""
    widest = max(N, N_t)
    if arch <= 90 and widest <= 64 and not fp32:
        return (64, 4, 1) if arch == 90 else (32, 4, 2)
    return 16 if fp32 else 32, 8 if widest > 64 or fp32 and widest == 16 else 4, 1


def orientation_loss_naive(q_t, k_t, scale, q, k, a, D, window=None):
    """The same with both matrices in full, as the formula reads: the oracle of orientation_loss"""
    L, H = a.shape[1:]
    M = mixing_matrix(q, k, a) + torch.diag_embed(D[:, None].expand(H, L))
    return distance_in_full(q_t, k_t, scale, M, window)[0]


def attention_matrix(q, k, scale, window=None):
    """q (B, L, H, N), k (B, L, G, N) -> softmax(q k^T scale) (B, H, L, L), causal, over the last
    `window` keys, its own among them, or all"""
    L, H = q.shape[1:3]
    scores = product(q.transpose(1, 2), per_head(k, H).transpose(1, 2).mT) * scale
    seen = torch.ones(L, L, dtype=torch.bool, device=q.device).tril()
    if window:
        seen = seen.triu(1 - window)
    return scores.masked_fill(~seen, -torch.inf).softmax(-1)


def distance_in_full(q_t, k_t, scale, M, window=None):
    """orientation_loss for any matrices M (B, H, L, L) in full, and the teacher's mean norm"""
    target = attention_matrix(q_t.to(M.dtype), k_t.to(M.dtype), scale, window)  # (B, H, L, L)
    return tuple(x.norm(dim=(-1, -2)).mean() for x in (M - target, target))


# -----------------------------------------------------------------------------
# The loss of MOHAWK's third stage, knowledge distillation: how far two predictions are apart

LOGITS_AT_ONCE = 2**26          # entries of a (tokens, V) map in memory at once: 256 MB in fp32
ROW_TILE = 2**16                # entries of it that fit in the cache of a CPU core, with all that
                                # is made of them


def distillation_loss(h, W, h_t, W_t, b=None, b_t=None, next_token=None, loss="kl",
                      temperature=1.0, hard_weight=0.0, backend="auto"):
    """T^2 KL(p || q), the mean over n tokens, from the final hidden states and heads of two models

    p = softmax((W_t h_t + b_t) / T) is the teacher's prediction over V words, q the student's. T^2,
    because the gradients shrink as 1 / T^2.

    student: h (n, D)   W (V, D)   b (V) or None        gradients for these three
    teacher: h_t (n, D_t)   W_t (V, D_t)   b_t (V) or None
    loss: "ce" adds the teacher's entropy, T^2 H(p), so it is -T^2 sum p log q: the same gradient
    hard_weight: adds hard_weight times the student's -log q(next token) at T = 1, the mean over
        tokens that have one; next_token (n), int64, is -100 where it is unknown
    backend: "torch", "triton", or "auto", which is triton on a GPU, but not in fp64
    -> two scalars in fp32 (fp64 if W is): the loss; and KL(p || q) / KL(p || 1/V), as a share of
    the uniform distribution's, with no gradient. ValueError for shapes that do not fit.

    At n = 2^14, V = 51,200 one (n, V) map in fp32 would take 3.4 GB. So tokens go in blocks, and
    the forward makes the gradients, too, while a block's logits are there. Only dh, dW and db are
    kept. For one token, and without the hard loss:
        z = W h + b      dz = T (q - p) / n      dh = W^T dz      dW = dz h^T      db = dz
    z is in fp32: bf16 rounds a logit of 10 by up to 0.03, and so its probability by 3%. A teacher
    in bf16 has that error in p, as wherever it is used in bf16. Under torch.autocast dz and its two
    products are in autocast's dtype, bf16, as the rest of the backward: they are linear, so
    rounding changes them by a share of 2^-8 at most.
    """
    check_heads(h, W, h_t, W_t)
    if loss not in ("kl", "ce"):
        raise ValueError(f"loss {loss!r}: choose kl or ce")
    full = at_least_fp32(W.dtype)
    if backend == "auto":
        backend = "triton" if h.is_cuda and triton and full == torch.float32 else "torch"
    if backend not in SOFTMAX_GAPS:
        raise ValueError(f"backend {backend!r}: choose auto or one of {', '.join(SOFTMAX_GAPS)}")
    if hard_weight and next_token is None:
        raise ValueError(f"hard_weight {hard_weight} needs next_token")
    weights = None                                          # of the tokens' hard losses (n)
    if hard_weight:
        known = next_token >= 0
        weights = known.to(full) * hard_weight / known.sum().clamp_min(1)
    dtype = full                                            # of dz and its products
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
    if not torch.is_grad_enabled():     # then none is made in the forward
        h, W, b = (x if x is None else x.detach() for x in (h, W, b))
    kl, entropy, total = DistillationLoss.apply(h, W, b, h_t, W_t, b_t, next_token, weights,
                                                temperature, dtype, SOFTMAX_GAPS[backend])
    if loss == "ce":
        total = total + temperature**2 * entropy
    return total, kl / (math.log(len(W)) - entropy)         # KL(p || 1/V) = log V - H(p)


class DistillationLoss(torch.autograd.Function):
    """The forward makes the gradients too; the backward multiplies them by the loss's gradient."""

    @staticmethod
    @outside_autocast
    def forward(ctx, h, W, b, h_t, W_t, b_t, next_token, weights, T, dtype, softmax_gap):
        """-> KL(p || q) and H(p), means over tokens; T^2 KL(p || q) + the hard loss

        weights (n): of the hard losses, or None   dtype: of dz and its two products
        """
        n, V = len(h), len(W)
        full = at_least_fp32(W.dtype)                       # the dtype of all else
        W_z = W.to(full)
        b_z = b if b is None else b.to(full)
        W_dz = W.to(dtype)
        # None for what is frozen
        dh, dW, db = (torch.zeros_like(x, dtype=full) if needed else None
                      for x, needed in zip((h, W, b), ctx.needs_input_grad[:3], strict=True))
        sums = h.new_zeros(3, dtype=full)                   # of KL, entropy, weighted hard loss
        for rows in blocks(n, LOGITS_AT_ONCE // V):
            z = linear(h[rows].to(full), W_z, b_z)                          # (rows, V)
            z_t = linear(h_t[rows].to(W_t.dtype), W_t, b_t)                 # (rows, V)
            dz = None
            if any(ctx.needs_input_grad):                   # where z was, if it is of z's dtype
                dz = z if dtype == full else torch.empty_like(z, dtype=dtype)
            hard = (None, None) if weights is None else (next_token[rows], weights[rows])
            sums += softmax_gap(z, z_t, T, T / n, *hard, dz).sum(1)
            if dh is not None:
                dh[rows] = dz @ W_dz                                        # (rows, D)
            if dW is not None:
                dW += dz.mT @ h[rows].to(dtype)                             # (V, D)
            if db is not None:
                db += dz.sum(0, dtype=full)                                 # (V)
            del z, z_t, dz                                  # frees their memory for the next block
        ctx.save_for_backward(dh, dW, db)
        kl, entropy = sums[0] / n, sums[1] / n
        ctx.mark_non_differentiable(kl, entropy)
        return kl, entropy, T**2 * kl + sums[2]

    @staticmethod
    @once_differentiable
    def backward(ctx, _, __, g):
        gradients = [None if x is None else g * x for x in ctx.saved_tensors]
        return *gradients, *[None] * 8


def softmax_gap_torch(z, z_t, T, scale, next_token, weights, dz):
    """All that distillation_loss does with logits, z (n, V) of the student and z_t (n, V)

    -> (3, n): for each token KL(p || q), H(p), and its weight times the next token's -log
    probability; p = softmax(z_t / T), q = softmax(z / T)
    next_token, weights (n), or None for both: then there is no hard loss
    dz (n, V), or None: it is set to scale (q - p) + weights (softmax(z) - e), where e is 1 at
        next_token and 0 elsewhere. It may be z itself.
    """
    sums = z.new_zeros(3, len(z))
    # Few rows, so that all of this stays in the cache of a CPU, but one for each of its threads.
    for rows in blocks(len(z), max(torch.get_num_threads(), ROW_TILE // z.shape[1])):
        z_c = z[rows]                                                       # (rows, V)
        z_t_c = z_t[rows].to(z.dtype)                                       # (rows, V)
        if T != 1:
            z_c = z_c / T
            z_t_c = z_t_c / T
        q = z_c.softmax(-1)
        p = z_t_c.softmax(-1)
        # log p = z_t - lse_t, and lse_t is the largest z_t less the largest log p: two exponentials
        # a word are all. Where z is near z_t the KL's first term is small and nearly exact, and its
        # error no more than the rounding of lse and lse_t.
        lse = z_c.amax(-1) - q.amax(-1).log()                               # (rows)
        lse_t = z_t_c.amax(-1) - p.amax(-1).log()                           # (rows)
        sums[1, rows] = lse_t - torch.linalg.vecdot(p, z_t_c)
        sums[0, rows] = torch.linalg.vecdot(p, z_t_c - z_c) + lse - lse_t
        dz_c = q.sub_(p).mul_(scale)                                        # scale (q - p)
        if weights is not None:
            log_q = z[rows].log_softmax(-1)                                 # at T = 1
            at = next_token[rows, None].clamp_min(0)        # the weight of -100 is 0
            weight = weights[rows, None]                                    # (rows, 1)
            sums[2, rows] = (-weight * log_q.gather(1, at))[:, 0]
            dz_c.addcmul_(log_q.exp_(), weight).scatter_add_(1, at, -weight)
        if dz is not None:
            dz[rows] = dz_c
    return sums


SOFTMAX_TILE = 2048, 8          # words in a block, warps: 8 words for each thread, so that several
                                # programs, with all their loads, are on a multiprocessor at once


@jit
def add_words(l_i, m_i, z_c, inv_T):
    """l_i, a lane's sum of e^((z - m_i) / T), and m_i, its largest z -> the sum with z_c added, of
    e^((z - m) / T) with m the larger of m_i and z_c. One of the two has e^0: one exponential is
    enough. (softmax_gap_kernel says what a lane is.)
    """
    e = tl.exp(-tl.abs(z_c - m_i) * inv_T)
    return tl.where(z_c > m_i, l_i * e + 1, l_i + e)


@jit
def log_sum(l_i, m_i, m, inv_T):
    """The sums of all lanes -> log of the row's sum of e^((z - m) / T), m the row's largest z"""
    return tl.log(tl.sum(l_i * tl.exp((m_i - m) * inv_T), 0))


@jit
def softmax_gap_kernel(z, z_t, next_token, weights, dz, sums, n, V, T, scale,
                       BLOCK: tl.constexpr, HARD: tl.constexpr, GRADIENT: tl.constexpr):
    """softmax_gap_torch for one token, in two passes over its V words, BLOCK at a time

    m_i and l_i are FlashAttention's running maximum and sum. There is a pair for each of BLOCK
    lanes: lane i takes the words i, i + BLOCK, ..., so no block waits for a reduction. The
    right-hand column says what a line reads and writes.
    """
    row = tl.program_id(0).to(tl.int64)         # offsets have 64 bits: n V may pass 2^31
    z += row * V
    z_t += row * V
    dz += row * V
    i = tl.arange(0, BLOCK)
    zero = tl.zeros((BLOCK,), tl.float32)
    inv_T = 1 / T

    # pass 1: both log-sum-exps. Not -inf but a finite start, since -inf - -inf would be NaN.
    m_i = zero - 1e30
    m_t_i = m_i
    l_i = zero                                                          # of z / T
    l_t_i = zero                                                        # of z_t / T
    l_1_i = zero                                                        # of z, for the hard loss
    for start in range(0, V, BLOCK):
        inside = start + i < V
        z_c = tl.load(z + start + i, mask=inside, other=float("-inf"))                  # z
        z_t_c = tl.load(z_t + start + i, mask=inside, other=float("-inf")).to(tl.float32)   # z_t
        l_i = add_words(l_i, m_i, z_c, inv_T)
        l_t_i = add_words(l_t_i, m_t_i, z_t_c, inv_T)
        if HARD:
            l_1_i = add_words(l_1_i, m_i, z_c, 1.0)
        m_i = tl.maximum(m_i, z_c)
        m_t_i = tl.maximum(m_t_i, z_t_c)
    m = tl.max(m_i, 0)
    m_t = tl.max(m_t_i, 0)
    log_l = log_sum(l_i, m_i, m, inv_T)
    log_l_t = log_sum(l_t_i, m_t_i, m_t, inv_T)
    if HARD:
        log_l_1 = log_sum(l_1_i, m_i, m, 1.0)
        at = tl.load(next_token + row)
        weight = tl.load(weights + row)

    # pass 2: the sums, and dz, which may be z. An entry is stored by the program that has read it.
    kl = zero
    entropy = zero
    hard = zero
    for start in range(0, V, BLOCK):
        inside = start + i < V
        z_c = tl.load(z + start + i, mask=inside, other=0.0)                            # z
        z_t_c = tl.load(z_t + start + i, mask=inside, other=0.0).to(tl.float32)         # z_t
        log_q = (z_c - m) * inv_T - log_l
        log_p = (z_t_c - m_t) * inv_T - log_l_t
        p = tl.where(inside, tl.exp(log_p), 0.0)
        kl += p * (log_p - log_q)
        entropy -= p * log_p
        dz_c = scale * (tl.exp(log_q) - p)
        if HARD:
            log_q = z_c - m - log_l_1                                   # at T = 1
            e = tl.where(start + i == at, 1.0, 0.0)
            hard -= e * log_q
            dz_c += weight * (tl.exp(log_q) - e)
        if GRADIENT:
            tl.store(dz + start + i, dz_c.to(dz.dtype.element_ty), mask=inside)         # dz
    tl.store(sums + row, tl.sum(kl, 0))
    tl.store(sums + n + row, tl.sum(entropy, 0))
    if HARD:
        tl.store(sums + 2 * n + row, weight * tl.sum(hard, 0))


def softmax_gap_triton(z, z_t, T, scale, next_token, weights, dz):
    """The same in one kernel: it reads z and z_t twice, and of the maps writes only dz"""
    if z.dtype != torch.float32:
        raise ValueError(f"there is no Triton kernel for {z.dtype}: backend 'torch' takes it")
    elsewhere = None if dz is z else dz         # an operator's tensors may not share memory
    return softmax_gap_op(z, z_t, T, scale, next_token, weights, elsewhere, dz is not None)


@torch.library.custom_op("mohawk::softmax_gap", mutates_args=("z", "dz"), schema="(Tensor(a!) z, "
                         "Tensor z_t, float T, float scale, Tensor? next_token, Tensor? weights, "
                         "Tensor(b!)? dz, bool gradient) -> Tensor")
def softmax_gap_op(z, z_t, T, scale, next_token, weights, dz, gradient):
    """With `gradient`, where dz is None, z is overwritten with it."""
    n, V = z.shape
    block, warps = SOFTMAX_TILE
    sums = softmax_gap_sums(z)
    with torch.cuda.device_of(z):
        softmax_gap_kernel[(n,)](
            z, z_t, next_token, weights, z if dz is None else dz, sums, n, V, T, scale, block,
            weights is not None, gradient, num_warps=warps)
    return sums


@softmax_gap_op.register_fake
def softmax_gap_sums(z, *_):
    return z.new_zeros(3, len(z))


SOFTMAX_GAPS = {"torch": softmax_gap_torch, "triton": softmax_gap_triton}


# -----------------------------------------------------------------------------
# What all forms share: checks, shapes, products that autocast does not round, sums of decays

def check(q, k, v, a, S, cu):
    """ValueError, with the shapes, unless they are what ssd says"""
    (B, L, H, P), (G, N) = v.shape, q.shape[2:]
    if q.shape != (B, L, G, N) or k.shape != q.shape or a.shape != (B, L, H) or H % G or L < 1:
        raise ValueError("ssd needs q, k (B, L, G, N), v (B, L, H, P), a (B, L, H) and G "
                         f"dividing H; got q {tuple(q.shape)}, k {tuple(k.shape)}, "
                         f"v {tuple(v.shape)}, a {tuple(a.shape)}")
    shape = (B, H, N, P) if cu is None else (B, len(cu) - 1, H, N, P)
    if S is not None and S.shape != shape:
        raise ValueError(f"ssd needs a state of shape {shape}, got {tuple(S.shape)}")


def check_heads(h, W, h_t, W_t):
    """ValueError, with the shapes, unless both heads score the same words for the same tokens"""
    if (len(h) != len(h_t) or len(W) != len(W_t) or h.shape[1:] != W.shape[1:]
            or h_t.shape[1:] != W_t.shape[1:]):
        raise ValueError("distillation_loss needs h (n, D), W (V, D), h_t (n, D_t), W_t (V, D_t); "
                         f"got h {tuple(h.shape)}, W {tuple(W.shape)}, h_t {tuple(h_t.shape)}, "
                         f"W_t {tuple(W_t.shape)}")


def blocks(n, size):
    """0 .. n - 1 in slices of `size`, at least 1, the last one shorter"""
    size = max(1, size)
    return [slice(lo, min(lo + size, n)) for lo in range(0, n, size)]


def boundaries(cu_seqlens, L):
    """-> the boundaries of the documents as a list, checked"""
    cu = cu_seqlens.tolist()
    if cu[:1] != [0] or cu[-1] != L or any(i >= j for i, j in itertools.pairwise(cu)):
        raise ValueError(f"cu_seqlens must rise from 0 to L = {L}, got {cu}")
    return cu


def per_head(x, H):
    """(B, L, G, N) -> (B, L, H, N): each group's q or k, once for each of its heads."""
    return x if x.shape[2] == H else x.repeat_interleave(H // x.shape[2], dim=2)


def at_least_fp32(dtype):
    """The dtype of decays and states: never less than fp32, since errors there add up over L."""
    return torch.promote_types(dtype, torch.float32)


CACHE_SLICE = 2**18             # elements of q, k or v in a slice: what the cache of a CPU holds


def cache_slices(v, N, Q):
    """Slices of the sequence, each of some chunks: on a CPU as long as fits its cache, else all."""
    B, L, H, P = v.shape
    step = L
    if v.device.type == "cpu":
        step = max(Q, CACHE_SLICE // (B * H * max(N, P)) // Q * Q)
    return [slice(i, i + step) for i in range(0, L, step)]


class Product(torch.autograd.Function):
    """x @ y, in their dtype, under torch.autocast too: it would round matrix products to bf16, in
    the forward and, where it surrounds the backward, in the gradient."""

    @staticmethod
    @outside_autocast
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x @ y

    @staticmethod
    @outside_autocast
    def backward(ctx, dz):
        x, y = ctx.saved_tensors
        dz = dz.contiguous()
        dx = dz @ y.mT if ctx.needs_input_grad[0] else None
        dy = x.mT @ dz if ctx.needs_input_grad[1] else None
        return dx, dy


product = Product.apply

FLOOR = {torch.float32: -112.0, torch.float64: -752.0}      # multiples of 16 where e^a is 0


def floored(a, dtype):
    """a in this dtype and finite. Below the floor e^a is 0 whatever a, and so is a's gradient."""
    return a.to(dtype).clamp_min(FLOOR[dtype])


def running_sums(a, dim=-1):
    """a, floored -> W and A, whose sum is the running sum of a along dim.

    The decay between two tokens is a difference of running sums. In one sum a reset, say a = -100,
    would cost every later token digits of its own small decay. So -96, its multiple of 16, goes to
    W, which has no rounding error, and -4 to A, which is about as small as without resets. 16,
    because e^-16 is about 2^-23, the last digit of an fp32 number: what is below -16 forgets all
    before it to within rounding. Without such tokens W is 0.
    """
    multiples = (a.detach() / 16).trunc_().mul_(16)
    return multiples.cumsum(dim), (a - multiples).cumsum(dim)


def until_end(W, A, dim=-1):
    """The running sums of a -> a_(j+1) + ... + a_Q along dim"""
    last = A.shape[dim] - 1
    return (W.narrow(dim, last, 1) - W).add_(A.narrow(dim, last, 1)).sub_(A)
