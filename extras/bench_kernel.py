"""SSD, the losses of stages 1 and 3, the convolution, and peers of them, timed on this machine.

Run:  python -m extras.bench_kernel                 # anywhere; the figures that matter need a GPU
      python -m extras.bench_kernel --lengths 512 2048 --forms chunked attention --json kernels.json

    forward, backward          ms, each by itself
    both                       ms, one after the other as in training: the forward also keeps what
                               the backward needs, and the backward frees it
    least GB                   the bytes that forward and backward must at least read and write
    of copying                 the time of copying as many bytes, as a share of `both`: 100% is the
                               best that a kernel bound by memory can reach
    peak MB                    memory beyond the inputs, on a GPU
    error, grad error          of y, and the worst of dq, dk, dv, da: against fp64, RMS, as a share
                               of the signal. WRONG: by more than the dtype allows

Peers that are not installed, or do not run here, are named at the end.
"""
import functools
import importlib.util
import json
import math
import statistics
import time

import torch

from distill import keep_freed_memory
from model_ssm import causal_conv
from prepare import Parser, run_program
from ssd_kernel import (
    distillation_loss,
    orientation_loss,
    orientation_loss_naive,
    pieces_of,
    ssd_chunked,
    ssd_naive,
    ssd_triton,
    triton,
)


# -----------------------------------------------------------------------------
# The peers

def flash_attention(q, k, v, a):
    """Not the same function, but the one that SSD replaces: no error is measured."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def mamba_ssm(q, k, v, a):
    """The authors' kernels, as Phi-Mamba calls them: v is divided by the step dt = -a, by which the
    kernels multiply it again. From the hub, built, where the package `kernels` is installed."""
    if importlib.util.find_spec("kernels"):
        from kernels import get_kernel
        kernels = get_kernel("kernels-community/mamba-ssm", version=1).mamba_chunk_scan_combined
    else:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as kernels
    return kernels(v / -a[..., None].to(v.dtype), -a, a.new_full(a.shape[2:], -1.0), k, q, 128)


def minimal(q, k, v, a):
    """The authors' chunked form in PyTorch."""
    from mamba_ssm.modules.ssd_minimal import ssd_minimal_discrete
    return ssd_minimal_discrete(v, a, k, q, 64)[0]


def fla(q, k, v, a):
    """flash-linear-attention: its Simple GLA is SSD."""
    from fla.ops.simple_gla import chunk_simple_gla
    return chunk_simple_gla(q, k, v, g=a, scale=1.0)[0]


def fla_naive(q, k, v, a):
    """The same in plain PyTorch, chunk by chunk."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla
    return naive_chunk_simple_gla(q, k, v, a, scale=1.0)[0].to(v.dtype)


def helion(q, k, v, a):
    """helion's Simple GLA. The package lacks it: clone pytorch/helion and set PYTHONPATH to that.
    It looks for a configuration first, minutes for each shape."""
    from examples.fla.simple_gla.chunk import chunk_simple_gla
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))                   # (B, H, L, .)
    return chunk_simple_gla(q, k, v, a, scale=1.0).transpose(1, 2)


def mlstm(q, k, v, a):
    """xLSTM's kernels with a sigmoid input gate, here open. They scale q by 1 / sqrt(N), and their
    forget gate's logit f has log sigmoid(f) = a."""
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging import (
        mlstm_siging_chunkwise__xl_chunk as kernel,
    )
    q, k, v = (x.transpose(1, 2) for x in (q * q.shape[-1] ** 0.5, k, v))           # (B, H, L, .)
    a = a.transpose(1, 2)                                                           # (B, H, L)
    f = a - torch.log(-torch.expm1(a))
    y = kernel(q, k, v, torch.full_like(a, 30.0), f, normalize=False, autocast_kernel_dtype=q.dtype)
    return y.transpose(1, 2)


FORMS = {"naive": ssd_naive, "chunked": ssd_chunked, "triton": ssd_triton,
         "attention": flash_attention, "mamba_ssm": mamba_ssm, "its minimal": minimal,
         "fla": fla, "fla, naive": fla_naive, "helion": helion, "mlstm, siging": mlstm}


# -----------------------------------------------------------------------------
# The cases: form, function, its arguments, the gradient of its output, least bytes, the expected y

def example(L, B, H, P, dtype, device):
    """-> [q, k, v (B, L, H, P), a (B, L, H)], which require gradients, and dy (B, L, H, P)"""
    draw = torch.Generator(device).manual_seed(0)
    q, k, v, dy = (torch.randn(B, L, H, P, generator=draw, device=device) for _ in range(4))
    a = -torch.rand(B, L, H, generator=draw, device=device)
    leaves = q.to(dtype), (k / P**0.5).to(dtype), v.to(dtype), a
    return [x.requires_grad_() for x in leaves], dy.to(dtype)


def ssd_cases(lengths, tokens, H, dtype, device, forms):
    for L in lengths:
        leaves, dy = example(L, max(1, tokens // L), H, 64, dtype, device)
        # Two heads of one row, since fp64 is slow on a GPU.
        few = [x[:1, :, :2].detach().double().requires_grad_() for x in leaves]
        y = ssd_chunked(*few)
        want = y.detach(), *torch.autograd.grad(y, few, dy[:1, :, :2].double())
        # forward: q k v a -> y    backward: q k v a dy -> dq dk dv da    (a and da are smaller)
        least = 11 * dy.nbytes + 3 * leaves[3].nbytes
        for form in forms:
            function = FORMS[form]
            if form == "naive" and L > 4096:        # (L, L) matrices: too large
                continue
            expected = None if function is flash_attention else want
            yield form, function, leaves, dy, least, expected


def piece_cases(lengths, H, dtype, device):
    """One row: one program for each head, and enough programs to fill the GPU"""
    for L in lengths:
        leaves, dy = example(L, 1, H, 64, dtype, device)
        for pieces in (1, pieces_of(leaves[2], 1)):
            function = functools.partial(ssd_triton, pieces=pieces)
            yield f"in {pieces} pieces", function, leaves, dy, 0, None


def orientation_cases(lengths, tokens, H, dtype, device):
    for L in lengths:
        (q, k, v, a), _ = example(L, max(1, tokens // L), H, 64, dtype, device)
        D = torch.ones(H, device=device, requires_grad=True)
        teacher = v.detach(), v.detach(), 0.125
        for form, function in (("naive", orientation_loss_naive), ("tiles", orientation_loss)):
            yield form, functools.partial(function, *teacher), (q, k, a, D), a.new_ones(()), 0, None


def distillation_cases(tokens, V, D, dtype, device):
    """Stage 3's loss: heads (V, D) of both models, hidden states of so many tokens"""
    draw = torch.Generator(device).manual_seed(0)
    h, W, h_t, W_t = (torch.randn(*shape, D, generator=draw, device=device) / D**0.25
                      for shape in 2 * [(1, tokens), (V,)])
    leaves = [h.requires_grad_(), W.requires_grad_()]
    h_t = h_t[0].to(dtype)
    W_t = W_t.to(dtype)

    def plain(h, W):
        log_p = (h_t @ W_t.mT).float().log_softmax(-1)                  # (tokens, V)
        log_q = (h[0] @ W.mT).log_softmax(-1)                           # (tokens, V)
        return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="batchmean")

    def blocks(h, W, backend):
        with torch.autocast(device, dtype, enabled=dtype != torch.float32):
            return distillation_loss(h[0], W, h_t, W_t, backend=backend)[0]

    forms = {"naive": plain, "blocks, torch": functools.partial(blocks, backend="torch"),
             "blocks, triton": functools.partial(blocks, backend="triton")}
    for form, function in forms.items():
        if form == "blocks, triton" and device == "cpu":
            continue                        # its interpreter takes minutes
        yield form, function, leaves, h.new_ones(()), 0, None


def convolution_cases(tokens, L, C, dtype, device):
    """The short causal convolution, 4 wide, over C channels"""
    x, dy = (torch.randn(max(1, tokens // L), L, C, device=device, dtype=dtype) for _ in range(2))
    leaves = [x.requires_grad_(), torch.randn(C, 1, 4, device=device).requires_grad_(),
              torch.randn(C, device=device).requires_grad_()]
    yield "causal_conv", causal_conv, leaves, dy, 5 * x.nbytes, None


# -----------------------------------------------------------------------------
# The clock and the table

def milliseconds(run, device):
    """The median of many runs: on a CPU of up to 20 in about 3 s; on a GPU as Triton measures,
    which clears the cache before each run"""
    if device == "cuda":
        return triton.testing.do_bench(run, return_mode="median")
    run()                                                   # the first call may compile, allocate
    times = []                                              # ms
    while not times or sum(times) < 3000 and len(times) < 20:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median_low(times)                     # of two runs not the slower one


def measure(form, function, leaves, dy, least, want, device, copy_speed):
    """-> one row of the table, and the reason why figures are missing, or None"""
    def backward(y):
        return torch.autograd.grad(y, leaves, dy, retain_graph=True, allow_unused=True)

    forward_ms = backward_ms = both_ms = peak = error = grad_error = math.nan
    why = None
    try:
        with torch.no_grad():
            y = function(*leaves)
            if want is not None:
                error = rel(y[:1, :, :2], want[0])
            forward_ms = milliseconds(lambda: function(*leaves), device)
        y = function(*leaves)
        if want is not None:
            grad_error = max(rel(got[:1, :, :2], g)
                             for got, g in zip(backward(y), want[1:], strict=True))
        most = 1e-3 if y.dtype == torch.float32 else 0.03
        if max(error, grad_error) > most:
            form = f"{form} WRONG"
            why = f"error {error:.1e}, of its gradients {grad_error:.1e}"
        backward_ms = milliseconds(lambda: backward(y), device)
        both_ms = milliseconds(lambda: backward(function(*leaves)), device)
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            backward(function(*leaves))
            peak = (torch.cuda.max_memory_allocated() - before) / 1e6
    except Exception as caught:             # not installed, not for this device, out of memory
        why = f"{type(caught).__name__}: {caught}".split("\n")[0]
    return {"L": leaves[0].shape[1], "B": len(leaves[0]), "form": form, "forward ms": forward_ms,
            "backward ms": backward_ms, "both ms": both_ms, "least GB": least / 1e9,
            "of copying": least / 1e6 / copy_speed / both_ms, "peak MB": peak, "error": error,
            "grad error": grad_error}, why


def rel(got, want):
    """RMS error as a share of the signal"""
    return ((got - want).square().mean() / want.square().mean()).sqrt().item()


WIDTHS = {"L": 6, "B": 4, "form": 24}
FORMATS = {"forward ms": ".3f", "backward ms": ".3f", "both ms": ".3f", "least GB": ".3f",
           "of copying": ".1%", "peak MB": ",.0f", "error": ".1e", "grad error": ".1e"}


def print_table(cases, device, copy_speed, left_out):
    """Measure the cases one by one and print each as it comes -> the rows

    left_out: {case: why}, to which this adds
    """
    rows = []
    for case in cases:
        row, why = measure(*case, device, copy_speed)
        if why:
            left_out.setdefault(f"{row['form']}, L {row['L']}", why)
        if math.isnan(row["forward ms"]):
            continue
        if not rows:
            print("".join(f"{key:>{WIDTHS.get(key, 13)}}" for key in row))
        rows.append(row)
        cells = [f"{value:>{WIDTHS.get(key, 13)}{FORMATS.get(key, '')}}"
                 for key, value in row.items()]
        print("".join(cells), flush=True)
    return rows


def main(arguments=None):
    parser = Parser(__doc__)
    parser.add_argument("--json", help="also write what was measured to this file")
    parser.add_argument("--lengths", type=int, nargs="+", help="tokens in a row [512 ... 65536]")
    parser.add_argument("--tokens", type=int, help="tokens in all [16,384 on a GPU, else 4,096]")
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="FORM",
                        help=f"of SSD: {', '.join(FORMS)} [all]")
    parser.add_argument("--vocabulary", type=int, help="of the distillation loss [51,200; 4,096]")
    parser.add_argument("--orientation_lengths", type=int, nargs="+", default=[512, 1024, 2048])
    args = parser.parse_args(arguments)
    if torch.cuda.is_available():
        device, H, tokens, dtype = "cuda", 32, 2**14, torch.bfloat16
        name = torch.cuda.get_device_name()
    else:
        device, H, tokens, dtype = "cpu", 8, 2**12, torch.float32
        name = f"{torch.get_num_threads()} CPU threads"
        keep_freed_memory()             # as in training
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    copy_speed = 2 * block.numel() / milliseconds(block.clone, device) / 1e6         # GB/s
    about = {"device": name, "copying, GB/s": round(copy_speed, 1), "dtype": str(dtype),
             "H": H, "G": H, "P": 64, "N": 64,
             "torch": torch.__version__, "triton": triton and triton.__version__}
    print(" | ".join(f"{key} {value}" for key, value in about.items()))
    tokens = args.tokens or tokens
    lengths = args.lengths or [2**n for n in range(9, 17)]
    V, D = (args.vocabulary or 51200, 2048) if device == "cuda" else (args.vocabulary or 4096, 256)
    tables = {"SSD": ssd_cases(lengths, tokens, H, dtype, device, args.forms),
              "SSD, one row in pieces": piece_cases(lengths, H, dtype, device),
              "orientation loss": orientation_cases(args.orientation_lengths, tokens, H, dtype,
                                                    device),
              f"distillation loss, V {V}, D {D}": distillation_cases(tokens, V, D, dtype, device),
              "convolution": convolution_cases(tokens, min(tokens, 2048), 192 * H, dtype, device)}
    left_out = about["left out"] = {}
    for title, cases in tables.items():
        if "pieces" in title and device == "cpu":
            print(f"\n{title}: on a GPU only")
            continue
        print(f"\n{title}")
        about[title] = print_table(cases, device, copy_speed, left_out)
    print()
    for form, why in left_out.items():
        print(f"left out: {form}: {why}")
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(about, file, indent=1)


if __name__ == "__main__":
    run_program(main)
