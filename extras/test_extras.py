"""The promises of extras/, as tests. The models and runs to test with are test_ssd.py's.

Run:  python -m pytest -q extras
"""
import copy
import functools
import importlib.util
import inspect
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import filelock
import numpy as np
import pytest
import torch
import transformers

# First, since it says where Triton kernels run before they are defined:
from test_ssd import (
    DEVICE,
    HERE,
    LLAMA,
    MOST_HELD,
    RECOVERED,
    RESETS,
    SIDES,
    Scratch,
    all_near,
    at_operation,
    attempt,
    byte_tokenizer_with,
    captured_step_is_the_step,
    commands_of_the_readme,
    decays,
    disk_is_full,
    flags,
    in_a_copy,
    inputs,
    kill,
    on_linux,
    outcome_of,
    padded,
    prompts_of_unequal_lengths,
    random_model,
    random_teacher,
    rel,
    results_and_gradients,
    some_documents,
    some_tokens,
)

import distill
import eval as evaluation
import model_ssm
import prepare
from extras import (
    bench_kernel,
    benchmarks,
    binaries,
    cost,
    export,
    grid,
    hybrids,
    mixers,
    objectives,
    pictures,
)
from model_ssm import SSM, Config, UsageError
from model_teacher import Teacher
from prepare import Tokenizer, Tokens
from ssd_kernel import ssd, ssd_recurrent

pytest_plugins = ["test_ssd"]           # for its fixtures

OBJECTIVES = ("od", "matrix", *objectives.OBJECTIVES)
ALL_MIXERS = {"mamba2": model_ssm.Mamba2} | mixers.MIXERS


def mix(mixer, operands, *S):
    """What a mixer's operator makes of its operands -> y, the next state"""
    if isinstance(mixer, mixers.Mixer):
        return mixer.mix(operands, *S)
    if S:
        return ssd(*operands, initial_state=S[0], return_final_state=True)
    return ssd(*operands), None


def new_forms_and_their_inputs(L):
    """name -> form, its tensors"""
    q, k, v, a, S = (x.float() for x in inputs(1, L, 2, 2, 16, 16))
    k, b, forms = k / 4, -a, {}
    for name, form, step, tensors in (
            ("channel", mixers.channel_chunked, mixers.channel_step, (q, k, v, -v.abs())),
            ("delta", mixers.delta_rule, mixers.delta_step, (q, k, v, a, b))):
        forms[f"{name}_step"] = step, (*(x[:, 0] for x in tensors), S)
        forms[name] = functools.partial(form, return_final_state=True), (*tensors, S)
    return forms


@pytest.mark.parametrize("name", new_forms_and_their_inputs(1))
@pytest.mark.parametrize("L", [1, 32, 33])
def test_no_new_form_computes_in_autocasts_precision(name, L):
    form, tensors = new_forms_and_their_inputs(L)[name]
    want = results_and_gradients(form, tensors)
    with torch.autocast("cpu", torch.bfloat16):
        got = results_and_gradients(form, tensors)
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and torch.equal(g, w)


# -----------------------------------------------------------------------------
# the mixers of the study. Mamba-2 keeps these promises too.

FADING = ["mamba2", "mlstm", "gla", "metala", "deltanet", "gated_deltanet"]     # by gates


def random_mixer(name, G=2, dtype=torch.float64, seed=0, **shapes):
    """Every parameter random: 2 heads of width 6, a state of 4"""
    torch.manual_seed(seed)
    mixer = ALL_MIXERS[name](Config(**dict(
        d_model=16, n_head=2, head_dim=6, n_qk_head=G, d_state=4, mixer=name) | shapes))
    for p in mixer.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return mixer.to(dtype)


def by_steps(mixer, h, state):
    """The recurrence: one token after the other"""
    y = []
    for t in range(h.shape[1]):
        y_t, state = mixer(h[:, t:t + 1], state)
        y.append(y_t)
    return torch.cat(y, 1), state


def same(one, other, tolerance):
    return all(torch.equal(x, y) or rel(x, y) < tolerance
               for x, y in zip(one, other, strict=True))


# In fp64 rounding is 1e-16 a step; the triangular systems and the exponentials of a chunk lose a
# few digits of it. 1e-9 is the promise.
@pytest.mark.parametrize("L", [1, 7, 64, 100, 130])
@pytest.mark.parametrize("name", ALL_MIXERS)
def test_every_mixer_is_its_recurrence(name, L):
    for G in (2, 1):
        mixer, h = random_mixer(name, G), torch.randn(2, L + 9, 16, dtype=torch.float64)
        with torch.no_grad():
            start, empty = by_steps(mixer, h[:, :9], mixer.initial_state(2))[1], None
            y, last = by_steps(mixer, h[:, 9:], start)
            got, got_last = mixer(h[:, 9:], start)
            assert rel(got, y) < 1e-9 and same(got_last, last, 1e-9)
            y, last = by_steps(mixer, h, mixer.initial_state(2))
            got, empty = mixer(h, None)
            assert rel(got, y) < 1e-9 and empty is None
            first, state = mixer(h[:, :L], mixer.initial_state(2))          # in two pieces
            second, state = mixer(h[:, L:], state)
            assert rel(torch.cat([first, second], 1), y) < 1e-9 and same(state, last, 1e-9)


@pytest.mark.parametrize("name", FADING)
def test_a_gate_that_is_off_by_one_step_is_seen(name):
    mixer, h = random_mixer(name), torch.randn(2, 70, 16, dtype=torch.float64)
    *operands, _, _ = mixer.project(h)
    y, _, *_ = mix(mixer, operands)
    operands[3] = operands[3].roll(1, 1)
    if name == "deltanet":                      # it has no decay: its b
        operands[4] = operands[4].roll(1, 1)
    assert rel(mix(mixer, operands)[0], y) > 0.02       # the forms agree to 1e-9


@pytest.mark.parametrize("name", ALL_MIXERS)
def test_every_mixers_gradients_are_those_of_its_recurrence(name):
    mixer, h = random_mixer(name), torch.randn(2, 70, 16, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 70, 16, dtype=torch.float64)
    leaves = [h, *mixer.parameters()]
    want = torch.autograd.grad((by_steps(mixer, h, mixer.initial_state(2))[0] * weight).sum(),
                               leaves)
    got = torch.autograd.grad((mixer(h)[0] * weight).sum(), leaves)
    assert all(rel(x, y) < 1e-9 for x, y in zip(got, want, strict=True))


def matrix_by_its_formula(name, q, k, v, a=None, b=None):
    """From the equations of the papers, with no state and no stabiliser; fp64, small numbers."""
    A = a.cumsum(1)
    scores = torch.einsum("bihn,bjhn->bhij", q, k)
    if name in ("gla", "metala"):
        decay = (A[:, :, None] - A[:, None]).exp()                      # (B, i, j, H, N)
        return torch.einsum("bihn,bjhn,bijhn->bhij", q, k, decay).tril()
    A = A.transpose(1, 2)                                               # (B, H, L)
    decay = (A[..., :, None] - A[..., None, :]).exp().tril()
    if name == "mlstm":
        M = scores * decay * b.transpose(1, 2).exp()[:, :, None]
        return M / M.sum(-1, keepdim=True).abs().clamp_min(1)
    M = scores * decay
    if name == "linear":
        return M / M.sum(-1, keepdim=True)
    if "delta" in name:
        b = b.transpose(1, 2)[..., None]                                # (B, H, L, 1)
        W = (b * torch.einsum("bihn,bjhn->bhij", k, k) * decay).tril(-1)
        return M @ torch.linalg.inv(torch.eye(len(W[0, 0])) + W) @ torch.diag_embed(b[..., 0])
    return M


@pytest.mark.parametrize("name", ALL_MIXERS)
def test_every_matrix_is_its_formula_and_what_the_mixer_does(name):
    mixer, h = random_mixer(name), torch.randn(2, 40, 16, dtype=torch.float64)
    q, k, v, *a, _, _ = mixer.project(h)
    M, D = mixer.matrix(h), torch.diag_embed(mixer.D[:, None].expand(2, 40))
    assert rel(M, matrix_by_its_formula(name, q, k, v, *a) + D) < 1e-9
    mixed, *_ = mix(mixer, (q, k, v, *a))
    y = mixed + mixer.D[:, None] * v
    assert rel(torch.einsum("bhij,bjhp->bihp", M, v), y) < 1e-9
    assert (M.triu(1) == 0).all()               # nobody looks ahead


@pytest.mark.parametrize("name", ALL_MIXERS)
def test_stage_1_asks_every_mixer_for_the_same_distance(name):
    mixer, h = random_mixer(name), torch.randn(2, 40, 16, dtype=torch.float64)
    q_t, k_t = torch.randn(2, 40, 2, 5), torch.randn(2, 40, 1, 5)
    future = torch.ones(40, 40, dtype=torch.bool).triu(1)
    scores = 0.7 * torch.einsum("bihn,bjhn->bhij", q_t.double(), k_t.double().expand_as(q_t))
    P = scores.masked_fill(future, -torch.inf).softmax(-1)
    distance, size = mixer.orientation(h, q_t, k_t, 0.7)    # in fp32: a sum of squares, 1e-6
    assert distance.item() == pytest.approx(
        (mixer.matrix(h) - P).square().sum((-1, -2)).sqrt().mean().item(), rel=1e-6)
    assert size.item() == pytest.approx(P.square().sum((-1, -2)).sqrt().mean().item(), rel=1e-6)


# Every exponent is of a number <= 0, so fp32 loses what it always loses, 6e-8 a step.
@pytest.mark.parametrize("place", ["edges", "most", "all"])
@pytest.mark.parametrize("value", [0.0, -30.0, *RESETS])
def test_no_decay_is_too_much_for_the_new_forms(value, place):
    q, k, v, a, S = inputs(1, 70, H=2, G=2, N=8, P=6, dtype=torch.float32)
    k, b = torch.nn.functional.normalize(k, dim=-1), torch.rand(1, 70, 2)
    a, wide_a = decays(a, value, place), decays(-torch.rand_like(k), value, place)
    wide_a[..., ::2] = -0.1                     # some channels go on
    for form, step, operands in (
            (mixers.channel_chunked, mixers.channel_step, (q, k, v, wide_a, S)),
            (mixers.delta_rule, mixers.delta_step, (q, k, v, a, b, S))):
        def by_steps(*tensors, step=step):
            *tensors, S = tensors
            y = []
            for t in range(70):
                y_t, S = step(*(x[:, t] for x in tensors), S)
                y.append(y_t)
            return torch.stack(y, 1), S

        want = results_and_gradients(by_steps, operands, torch.float64)
        got = results_and_gradients(functools.partial(form, return_final_state=True), operands)
        for g, w in zip(got, want, strict=True):
            # Of what e^-30 leaves, fp32 keeps nothing beside a 1: the error counts by itself.
            small = value == -30 and (g - w).abs().max() < 1e-5
            assert small or (rel(g, w) < 1e-5 if w.any() else not g.any())


@pytest.mark.parametrize("i, f", [(0, 0), (300, 0), (-300, 0), (0, -300), (0, 300), (300, -300)])
def test_mlstms_stabiliser_holds_any_gates(i, f):
    mixer = random_mixer("mlstm", dtype=torch.float32)
    q, k, v, gates, _ = inputs(L=130, H=2, G=2, N=4, P=6, dtype=torch.float32, decay=6.0)
    operands = [q.abs(), k.abs(), v,            # |q n| far from 0, which y is divided by
                torch.nn.functional.logsigmoid(gates + 3 + f), gates.flip(1) + 3 + i]
    leaves = [x.clone().requires_grad_() for x in operands]
    y, *_ = mix(mixer, leaves)
    state, want = mixer.double().initial_state(2)[1:], []
    for t in range(130):
        y_t, *state = mix(mixer, [x[:, t:t + 1].double() for x in operands], *state)
        want.append(y_t)
    # Far out, e^(i - m) is the exponential of a difference of hundreds: 300 * 6e-8 is 2e-5. y is a
    # mean of v, or less, down to nothing.
    assert (y - torch.cat(want, 1)).abs().max() < 1e-4 * v.abs().max()
    assert all(x.isfinite().all() for x in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("place", ["first", "edges", "most"])
@pytest.mark.parametrize("value", RESETS)
def test_a_forget_gate_that_is_shut_resets_mlstm(value, place):
    q, k, v, f, _ = inputs(1, 70, H=2, G=2, N=4, P=6, dtype=torch.float32)
    q, k, i = q.abs(), k.abs(), 3 * f.flip(1)                   # |q n| far from 0, as above
    tensors = q, k, v, decays(f, value, place), i

    def by_definition(q, k, v, f, i):
        ones = torch.nn.functional.pad(v, (0, 1), value=1.0)
        y = ssd_recurrent(q, k * i.exp()[..., None], ones, f)
        return y[..., :-1] / y[..., -1:].abs().clamp_min(1)

    mixer = random_mixer("mlstm", dtype=torch.float32)      # 1e-4 for running sums of decays
    want = results_and_gradients(by_definition, tensors, torch.float64)
    assert all_near(results_and_gradients(lambda *x: mix(mixer, x)[0], tensors), want, 1e-4)


@pytest.mark.parametrize("name", list(ALL_MIXERS)[1:])
def test_every_mixer_writes_as_it_reads_and_leaves_no_trace_of_padding(name, monkeypatch):
    monkeypatch.setattr(model_ssm, "PREFILL", 64)
    student = SSM.from_teacher(random_teacher(), (1,), "qkv", mixer=name).double()
    prompts = prompts_of_unequal_lengths()
    together = student.generate(prompts, 10)
    alone = [student.generate(prompt[None], 10)[0] for prompt in prompts]
    assert all(map(torch.equal, together, alone))
    with torch.no_grad():
        assert torch.equal(student.logits(alone[1][None])[0, 199:-1].argmax(-1), alone[1][200:])
    captured_step_is_the_step(SSM.from_teacher(random_teacher(), mixer=name))


# A rounding to bf16 is 2^-9 / sqrt(3) RMS, 1.1e-3, and some ten follow each other, 4e-3; that of a
# decay counts in each of up to 70 steps, sqrt(70) times as much: 0.03. mLSTM divides by a q n that
# may be near 0, which makes a large share of a small error.
@pytest.mark.parametrize("name", ALL_MIXERS)
def test_every_mixer_computes_in_bf16_and_keeps_its_state_in_fp32(name):
    mixer, h = random_mixer(name, dtype=torch.float32), torch.randn(2, 70, 16)
    with torch.no_grad():
        want = mixer(h)[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert rel(mixer(h)[0], want) < (0.2 if name == "mlstm" else 0.03)
        y, (_, *state) = mixer.bfloat16()(h.bfloat16(), mixer.initial_state(2))
        step, (_, *after) = mixer(h[:, :1].bfloat16(), mixer.initial_state(2))
    assert rel(y, want) < (0.2 if name == "mlstm" else 0.03) and y.dtype == step.dtype
    assert rel(step, y[:, :1]) < 0.03
    assert all(S.dtype == torch.float32 for S in (*state, *after))


@pytest.mark.parametrize("L", [1, 32, 33])
@pytest.mark.parametrize("name", ALL_MIXERS)
def test_what_a_mixer_mixes_does_not_depend_on_autocast_nor_its_length(name, L):
    mixer = random_mixer(name, dtype=torch.float32)
    *operands, _, _ = mixer.project(torch.randn(2, L, 16))
    state = [x + 0.1 for x in mixer.initial_state(2)[1:]]

    def form(*operands):
        return mix(mixer, operands, *state)[:2]

    operands = [x.detach() for x in operands]
    want = [x.detach() for x in form(*operands)]
    with torch.autocast("cpu", torch.bfloat16):
        got = form(*operands)
    assert all(x.dtype == torch.float32 and torch.equal(x, y)
               for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("name", list(ALL_MIXERS)[1:])
def test_every_mixer_is_saved_and_comes_back_bit_for_bit(tmp_path, name):
    student = SSM.from_teacher(random_teacher(), (1,), mixer=name)
    student.save_pretrained(tmp_path / "model")
    again = SSM.from_pretrained(tmp_path / "model")
    assert again.config == student.config and type(again.layers[0].mixer).__name__ != "Mamba2"
    assert torch.equal(again.logits(some_tokens()), student.logits(some_tokens()))
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["Block3"]["CoreType"] = "modules.mixers.unheard_of"
    with pytest.raises(UsageError, match="unheard_of"):
        model_ssm.read_config(config)


def test_mamba2s_config_says_nothing_of_other_mixers():
    config = model_ssm.write_config(Config(attn_layers=(1,)))
    assert "mixer" not in json.dumps(config["shapes"])
    assert config["Block1"]["CoreType"] == "modules.mixers.discrete_mamba2"
    with pytest.raises(UsageError, match="no mixer mamba3: choose mamba2 or linear, retnet"):
        SSM(Config(mixer="mamba3"))


@pytest.mark.parametrize("name", ALL_MIXERS)
def test_every_mixer_starts_as_init_says(name):
    teacher = random_teacher()
    theirs = teacher.weights()
    for init in ("mohawk", "qkv", "conv", "random"):
        student = SSM.from_teacher(teacher, init=init, mixer=name)
        for key, w in student.state_dict().items():
            assert ".mixer." in key or torch.equal(w, theirs[key])
        mixer, prefix = student.layers[1].mixer, "backbone.layers.1.mixer.self_attn."
        v, k, q, z, _ = mixer.in_proj.weight.split(list(mixer.parts.values()))
        copied = [torch.equal(ours, scale * theirs[f"{prefix}{proj}.weight"]) for ours, proj, scale
                  in ((v, "v_proj", 1), (k, "k_proj", 1), (q, "q_proj", 8 ** -0.5),
                      (mixer.out_proj.weight, "dense", 1))]
        assert copied == [init == "qkv", init == "qkv" and name != "metala"] + [init == "qkv"] * 2
        passes = bool((mixer.conv1d.weight[..., -1] == 1).all())
        assert bool((z != 0).any()) == (init == "random")
        assert passes == (init in ("mohawk", "qkv"))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name", list(ALL_MIXERS)[1:])
def test_every_mixer_learns_in_every_stage_and_moves_what_its_row_says(name, stage, data_folder):
    teacher = random_teacher()
    student = SSM.from_teacher(teacher, (1,), mixer=name)
    before, scratch = {n: p.clone() for n, p in student.state_dict().items()}, Scratch(
        "--tokens", "2560", "--lr", "3e-3", "--mixer", name, stage=stage)
    distill.train(scratch, "test", distill.STAGES[stage], student, teacher, Tokens(data_folder),
                  0, scratch.budget)
    lefts = [event["relative"] for event in scratch.events]
    assert len(lefts) == 20 and np.mean(lefts[-5:]) < lefts[0]
    for key, after in student.state_dict().items():
        ours, same = key.startswith(("backbone.layers.0.mixer", "backbone.layers.2.mixer")), None
        if stage == 1 and ours and "conv1d" in key:
            same = torch.equal(after[:32], before[key][:32])            # v's channels
        elif stage == 1 and ours and key.endswith("in_proj.weight"):
            sizes = list(student.layers[0].mixer.parts.values())
            moved = [not torch.equal(x, y) for x, y in
                     zip(after.split(sizes), before[key].split(sizes), strict=True)]
            assert moved == [False, True, True, False, sizes[-1] > 0]
        else:
            expected = {1: ours and ("in_proj" in key or key.endswith("mixer.D")),
                        2: ours, 3: True}[stage]
            same = torch.equal(after, before[key]) != expected
        assert same is not False, key


@pytest.mark.parametrize("name", list(ALL_MIXERS)[1:])
def test_every_mixer_has_a_cost(name, teacher_folder, capsys):
    cost.main(["--preset", "tiny", "--teacher", str(teacher_folder), "--mixer", name,
               "--context", "32", "--batch", "32", "--micro_batch", "1", "--gpu", "H100"])
    assert capsys.readouterr().out.count("parameters are trained") == 3


def test_a_recipe_that_fits_mamba2_copies_for_the_others():
    inits = [distill.parse(["--preset", "tiny", "--mixer", x]).init for x in ("mamba2", "gla")]
    assert inits == ["fit", "qkv"]


def test_a_run_remembers_its_mixer(tmp_path, teacher_folder, data_folder, capsys):
    command = flags(tmp_path / "run", teacher_folder, data_folder, "--tokens", "512", "--stage")
    distill.main([*command, "2", "--mixer", "gated_deltanet"])
    assert ", mixer gated_deltanet, init qkv | " in capsys.readouterr().out
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["arguments"]["mixer"] == "gated_deltanet"
    with pytest.raises(UsageError, match="has gated_deltanet mixers, --mixer is mamba2"):
        distill.main([*command, "3"])
    with pytest.raises(UsageError, match="--init fit is for --mixer mamba2"):
        distill.main([*command, "3", "--init", "fit", "--mixer", "gla"])


def test_the_operators_are_those_of_flash_linear_attention():
    pytest.importorskip("fla")
    from fla.ops.delta_rule.naive import delta_rule_recurrence
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.linear_attn.naive import naive_recurrent_linear_attn
    from fla.ops.retention.naive import naive_retention

    def turned(*tensors):                       # (B, L, H, N) <-> (B, H, L, N)
        return (x.transpose(1, 2) for x in tensors)

    theirs = {  # these scale q by N^(-1/2), ours do not
        "linear": lambda q, k, v, a: naive_recurrent_linear_attn(q, k, v, normalize=True)[0],
        "retnet": lambda q, k, v, a: next(turned(naive_retention(*turned(2 * q, k, v)))),
        "gla": lambda q, k, v, a: naive_recurrent_gla(2 * q, k, v, a)[0],
        "metala": lambda q, k, v, a: naive_recurrent_gla(2 * q, k, v, a)[0],
        "deltanet": lambda q, k, v, a, b: next(turned(
            delta_rule_recurrence(*turned(2 * q, k, v, b))[0])),
        "gated_deltanet": lambda q, k, v, a, b: naive_recurrent_gated_delta_rule(
            2 * q, k, v, b, a)[0]}
    for name, reference in theirs.items():      # they compute in fp32: 70 steps of 6e-8
        mixer = random_mixer(name, dtype=torch.float32)
        with torch.no_grad():
            *operands, _, _ = mixer.project(torch.randn(2, 70, 16))
            error = rel(mix(mixer, operands)[0], reference(*operands))
        print(f"{name}: {error:.1e} from fla's")
        assert error < 1e-5, name


# -----------------------------------------------------------------------------
# benchmarks

needs_harness = pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm-eval")
WORDS = "a is to of the tree loud seven window because rain letters yellow".split()


def score_alone(model, before, answer, context=256):
    """-> log p(answer | before), is it greedy: by the book, one text at a time, in bytes"""
    answer = [*answer.encode()]
    ids = ([*before.encode()] or [256]) + answer
    ids = ids[-context - 1:]
    log_p = model.logits(torch.tensor([ids]))[0].float().log_softmax(-1)            # (L, V)
    at = range(len(ids) - len(answer), len(ids))
    return (sum(log_p[t - 1, ids[t]].item() for t in at),
            all(log_p[t - 1].argmax() == ids[t] for t in at))


def choose_alone(model, docs, characters):
    """The share of questions answered rightly; characters: log p per character decides"""
    right = 0
    for doc in docs:
        score = [score_alone(model, doc["question"], f" {x}")[0] / (len(x) if characters else 1)
                 for x in doc["choices"]]
        right += score.index(max(score)) == doc["gold"]
    return right / len(docs)


def questions(n, seed):
    """n questions of random words, and answers of 1 to 4 words, one of them said to be right"""
    draw = torch.Generator().manual_seed(seed)

    def number(low, high):
        return torch.randint(low, high, (), generator=draw).item()

    def some(k):
        return " ".join(WORDS[number(0, len(WORDS))] for _ in range(k))

    return [{"question": some(number(1, 12)), "choices": [some(number(1, 5)) for _ in range(4)],
             "gold": number(0, 4)} for _ in range(n)]


def task_file(folder, name, docs, **more):
    """A task of the harness in two files; JSON is YAML too"""
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    data = {"data_files": {"test": str(folder / f"{name}.jsonl")},
            "cache_dir": str(folder / "cache")}
    (folder / f"{name}.yaml").write_text(json.dumps(
        {"task": name, "dataset_path": "json", "dataset_kwargs": data, "test_split": "test",
         "doc_to_text": "question", "doc_to_target": "gold", **more}))


CHOICE = {"output_type": "multiple_choice", "doc_to_choice": "choices",
          "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}


def both_models(run, teacher_folder):
    return {"teacher": Teacher.load(str(teacher_folder)),
            "student": SSM.from_pretrained(run / "stage3").eval()}


@needs_harness
def test_the_papers_table_is_what_scoring_by_hand_gives(tmp_path, a_run, teacher_folder, capsys):
    docs = {task: questions(12, seed) for seed, task in enumerate(benchmarks.PAPER)}
    for doc in docs["lambada_openai"]:
        doc["gold"] = " " + doc["choices"][0]
    for task in docs:
        if task != "lambada_openai":
            task_file(tmp_path, task, docs[task], **CHOICE)
    task_file(tmp_path, "lambada_openai", docs["lambada_openai"], output_type="loglikelihood",
              target_delimiter="", metric_list=[{"metric": "perplexity"}, {"metric": "acc"}])
    benchmarks.main([str(a_run), "--tasks", "paper", "--include_path", str(tmp_path),
                     "--context", "256"])
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said.splitlines()
            if line.startswith("|")]
    models = both_models(a_run, teacher_folder)
    chosen = {}
    for name, model in models.items():
        want = [choose_alone(model, docs[task], metric == "acc_norm")
                for task, metric in benchmarks.PAPER.items() if task != "lambada_openai"]
        golds = [score_alone(model, doc["question"], doc["gold"]) for doc in docs["lambada_openai"]]
        want.append(sum(greedy for _, greedy in golds) / 12)
        row = next(row for row in rows if row[0] == name)
        assert row[1:7] == [f"{100 * x:.1f}" for x in want]
        assert row[7] == f"{100 * sum(want) / 6:.1f}"
        chosen[name] = math.exp(-sum(score for score, _ in golds) / 12), want
    assert chosen["teacher"][1] != chosen["student"][1]         # else a swap would pass
    perplexity = next(row for row in rows if row[1] == "perplexity")
    assert [float(x) for x in perplexity[2:4]] == pytest.approx(
        [chosen[name][0] for name in ("teacher", "student")], rel=1e-3)
    # the published rows, their means as the paper prints them, and 62.6 of 64.9
    by_name = {row[0]: row for row in rows}
    assert by_name["Phi-1.5 [2]"][1:] == "73.4 75.6 48.0 76.6 62.6 53.4 64.9".split()
    assert by_name["Phi-Mamba [2]"][1:] == "71.7 74.0 44.1 75.5 60.2 50.1 62.6".split()
    assert [row[7] for row in rows if row[0] == "recovered"][1] == "96.4%"


@needs_harness
def test_whole_texts_and_generations_go_through_the_harness(
        tmp_path, a_run, teacher_folder, capsys):
    models = both_models(a_run, teacher_folder)
    texts, context = ["letters. " * 3, "Because of the rain, " * 8], 64
    task_file(tmp_path, "texts", [{"question": "", "gold": text} for text in texts],
              output_type="loglikelihood_rolling", metric_list=[{"metric": "bits_per_byte"}])
    bits = []
    for model in models.values():
        total = 0
        for text in texts:
            for start in range(0, len(text), context):
                end = min(start + context, len(text))
                seen = text[end - context - 1:start] if start else ""   # a whole window, if it can
                total += score_alone(model, seen, text[start:end], context)[0]
        bits.append(-total / sum(map(len, texts)) / math.log(2))

    prompts = ["seven", "the window", "yellow"]
    golds = [Tokenizer("bytes").decode(models["teacher"].generate(
        torch.tensor([[*p.encode()]]), 12)[0, len(p):].tolist()) for p in prompts]
    docs = [{"question": p, "gold": g} for p, g in zip(prompts, golds, strict=True)]
    task_file(tmp_path, "said", docs,
              output_type="generate_until", generation_kwargs={"until": [], "max_gen_toks": 12},
              metric_list=[{"metric": "exact_match"}])
    benchmarks.main([str(a_run), "--tasks", "texts", "said", "--include_path", str(tmp_path),
                     "--context", str(context)])
    said = capsys.readouterr().out
    row = re.search(r"^\| texts \| bits_per_byte \| +([\d.]+) \| +([\d.]+) \| +2 \|$", said, re.M)
    # the table has five digits, of a number below 10
    assert [float(x) for x in row.groups()] == pytest.approx(bits, abs=1e-3)
    assert re.search(r"^\| said +\| +exact_match \| +1 \| +0 \| +3 \|$", said, re.M), said


GENERATE = {"output_type": "generate_until", "metric_list": [{"metric": "exact_match"}]}
WRONG_TASKS = {     # what is wrong with the task `hello`, and what is said of it
    "no field": (CHOICE | {"doc_to_choice": "{{answers}}"}, "answers"),
    "no data": (CHOICE | {"dataset_kwargs": {"data_files": "nowhere.jsonl"}}, "nowhere.jsonl"),
    "too long": (GENERATE | {"generation_kwargs": {"max_gen_toks": 300}},       # of --context 256
                 "less than model's maximum sequence length"),
}


@needs_harness
@pytest.mark.parametrize("mistake", WRONG_TASKS)
def test_a_mistake_in_a_task_is_one_line(tmp_path, a_run, mistake):
    settings, complaint = WRONG_TASKS[mistake]
    task_file(tmp_path, "hello", questions(2, 0), **settings)
    with pytest.raises(UsageError, match=complaint) as error:
        benchmarks.main([str(a_run), "--tasks", "hello", "--include_path", str(tmp_path),
                         "--context", "256"])
    assert "\n" not in str(error.value)


@needs_harness
def test_a_prompt_is_read_whole_or_it_is_said_how_many_were_cut(
        tmp_path, a_run, teacher_folder, capsys):
    # Longer than the 32 tokens of training, and than the 64 positions of the teacher's config.
    models = both_models(a_run, teacher_folder)
    prompts = ["seven " * n for n in (2, 20, 30)]
    tokenizer = Tokenizer("bytes")
    golds = [tokenizer.decode(models["student"].generate(torch.tensor([[*p.encode()]]), 6)
                              [0, len(p):].tolist()) for p in prompts]
    docs = [{"question": p, "gold": g} for p, g in zip(prompts, golds, strict=True)]
    task_file(tmp_path, "said", docs, output_type="generate_until",
              generation_kwargs={"until": [], "max_gen_toks": 6},
              metric_list=[{"metric": "exact_match"}])
    command = [str(a_run), "--tasks", "said", "--include_path", str(tmp_path)]
    benchmarks.main(command)                            # all in one batch, padded on the left
    said = capsys.readouterr().out
    assert re.search(r"^\| said +\| exact_match \| +[\d.]+ \| +1 \| +3 \|$", said, re.M), said
    assert "prompts were cut" not in said
    benchmarks.main([*command, "--context", "130"])     # 12 + 6, 120 + 6, 180 + 6 tokens
    assert "1 of 3 prompts were cut to --context 130" in capsys.readouterr().out
    with pytest.raises(UsageError, match="has no chat template"):
        benchmarks.main([*command, "--apply_chat_template"])


@needs_harness
def test_a_chat_template_goes_around_each_prompt(tmp_path, its_copy, teacher_folder, capsys):
    # The same name, as the run knows its teacher by it; the tokenizer is read from there.
    chat = shutil.copytree(teacher_folder, tmp_path / "chat")
    tokenizer = transformers.AutoTokenizer.from_pretrained(chat)
    tokenizer.chat_template = ("{% for m in messages %}<{{ m.content }}>{% endfor %}"
                               "{% if add_generation_prompt %}:{% endif %}")
    tokenizer.save_pretrained(chat)
    model = both_models(its_copy, teacher_folder)["student"]
    text = "<seven>:"
    gold = Tokenizer("bytes").decode(model.generate(torch.tensor([[*text.encode()]]), 6)
                                     [0, len(text):].tolist())
    task_file(tmp_path, "said", [{"question": "seven", "gold": gold}],
              output_type="generate_until", generation_kwargs={"until": [], "max_gen_toks": 6},
              metric_list=[{"metric": "exact_match"}])
    benchmarks.main([str(its_copy), "--teacher", str(chat), "--tasks", "said", "--include_path",
                     str(tmp_path), "--apply_chat_template"])
    said = capsys.readouterr().out
    assert re.search(r"^\| said +\| exact_match \| +\S+ \| +1 \| +1 \|$", said, re.M), said


@needs_harness
def test_a_task_that_is_not_there_is_one_line(tmp_path, a_run, monkeypatch):
    command = [str(a_run), "--include_path", str(tmp_path), "--tasks"]
    task_file(tmp_path, "hello", questions(2, 0), **CHOICE)
    from lm_eval import tasks
    own = tasks.TaskManager     # without the harness's thousands of files, which take seconds
    monkeypatch.setattr(tasks, "TaskManager", lambda include_path, **_: own(
        include_path=include_path, include_defaults=False))
    with pytest.raises(UsageError, match="lm-eval knows no hallo; it knows hello$"):
        benchmarks.main([*command, "hallo"])
    with pytest.raises(UsageError, match="nowhere: no such folder"):
        benchmarks.main([str(a_run), "--tasks", "hello", "--include_path", "./nowhere"])
    (tmp_path / "hello.yaml").write_text("task: [hello")
    with pytest.raises(UsageError, match="hello.yaml: .*expected") as error:
        benchmarks.main([*command, "hello"])
    assert "\n" not in str(error.value)


def test_without_the_harness_tasks_say_what_to_install(a_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match='^--tasks needs lm-eval: pip install "lm-eval'):
        benchmarks.main([str(a_run), "--tasks", "paper"])


# -----------------------------------------------------------------------------
# export

LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.float32, info
    prompts = torch.load(f"{folder}.pt")
    # as SSM.generate, which does not stop there; then 256 in a prompt is text, and no padding
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    greedy = dict(max_new_tokens=20, do_sample=False)
    said = {"logits": model(prompts).logits.detach(), "greedy": model.generate(prompts, **greedy),
            "uncached": model.generate(prompts, use_cache=False, **greedy),
            "beams": model.generate(prompts, num_beams=3, **greedy),
            "uncached beams": model.generate(prompts, num_beams=3, use_cache=False, **greedy),
            "loss": model(prompts, labels=prompts).loss.detach(),
            "ids": AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("text").input_ids}
    torch.save(said, f"{folder}.said")
    model.resize_token_embeddings(260)
    said["again"] = model.generate(prompts, **greedy)
    model.save_pretrained(f"again-{folder}")
    torch.save(said, f"{folder}.said")
"""
AGAIN = """
import sys, torch
from transformers import AutoConfig, AutoModelForCausalLM
for folder in sys.argv[1:]:
    prompts, said = torch.load(f"{folder}.pt"), torch.load(f"{folder}.said")
    greedy = dict(max_new_tokens=20, do_sample=False, eos_token_id=None, pad_token_id=None)
    model = AutoModelForCausalLM.from_pretrained(f"again-{folder}", trust_remote_code=True)
    assert model.config.vocab_size == len(model.lm_head.weight) == 260
    assert torch.equal(model.generate(prompts, **greedy), said["again"])
    config = AutoConfig.from_pretrained(f"again-{folder}", trust_remote_code=True)
    fresh = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    assert fresh(prompts, labels=prompts).loss < 6          # log 260 is 5.6: the start of SSM
    for how in (dict(dtype=torch.bfloat16), dict(dtype=torch.float16)):
        model = AutoModelForCausalLM.from_pretrained(f"again-{folder}", trust_remote_code=True,
                                                     **how)
        assert model.generate(prompts, **greedy).shape == said["again"].shape
        assert model.dtype == how["dtype"] and model(prompts).logits.isfinite().all()
"""


# One process loads all of them, far from this folder, and with no network.
def test_transformers_loads_what_was_exported_and_computes_the_same(tmp_path, teacher_folder):
    tokens, students = some_tokens(), {}
    for name, teacher, attn_layers in (("phi", "phi", ()), ("hybrid", "phi", (1,)),
                                       ("tied", "smollm2", (0, 2)), ("gqa", "llama", ())):
        student = SSM.from_teacher(random_teacher(teacher), attn_layers, "qkv").eval()
        student.save_pretrained(tmp_path / "students" / name)
        export.main([str(tmp_path / "students" / name), str(tmp_path / name),
                     "--teacher", str(teacher_folder)])
        torch.save(tokens, tmp_path / f"{name}.pt")
        students[name] = student
        assert torch.equal(SSM.from_pretrained(tmp_path / name).logits(tokens),
                           student.logits(tokens))              # and so does this project
    for script, cache in ((LOAD, "cache"), (AGAIN, "another")):
        done = subprocess.run([sys.executable, "-W", "error::FutureWarning", "-c", script,
                               *students], cwd=tmp_path, text=True, capture_output=True,
                              env=os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": "",
                                                "HF_HOME": str(tmp_path / cache)})
        assert done.returncode == 0, done.stderr
        for name in students:       # what was saved again needs none of them
            shutil.move(tmp_path / name, tmp_path / f"{name}.{cache}")
            (tmp_path / name).mkdir()
    for name, student in students.items():
        said, logits = torch.load(tmp_path / f"{name}.said"), student.logits(tokens).detach()
        assert torch.equal(said["logits"], logits)
        greedy = student.generate(tokens, 20)
        assert torch.equal(said["greedy"], greedy) and torch.equal(said["uncached"], greedy)
        assert torch.equal(said["beams"], said["uncached beams"])
        assert not torch.equal(said["beams"], greedy)           # else beams were none
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1),
                                                 tokens[:, 1:].flatten())
        assert torch.allclose(said["loss"], loss) and said["ids"] == [*b"text"]


@pytest.fixture(scope="session")
def exported(tmp_path_factory, teacher_folder):
    """-> a function: the exported student of a random teacher, in fp64, where no two logits are so
    near that rounding decides"""
    folders = {}

    def load(teacher="llama", attn_layers=(), mixer="mamba2", dtype=torch.float64):
        kind = teacher, attn_layers, mixer
        if kind not in folders:
            place = tmp_path_factory.mktemp("exported")
            student = SSM.from_teacher(random_teacher(teacher), attn_layers, "qkv", mixer=mixer)
            student.save_pretrained(place / "student")
            export.main([str(place / "student"), str(place / "folder"),
                         "--teacher", str(teacher_folder)])
            folders[kind] = place / "folder"
        return export.MohawkForCausalLM.from_pretrained(folders[kind], dtype=dtype).eval()

    return load


GREEDY = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
KINDS = [("llama", ()), ("mistral, window 8", (1,)), ("smollm2", "all")]


def state_in(outputs):
    return outputs["cache" if "cache" in outputs else "past_key_values"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_taken_by_either_name_and_no_token_is_computed_twice(
        exported, kind, monkeypatch):
    model, tokens, read = exported(*kind), some_tokens(L=40, V=256), []
    prefill = model.ssm.prefill
    monkeypatch.setattr(model.ssm, "prefill", lambda ids, *more: (
        read.append(ids.shape[1]), prefill(ids, *more))[1])
    model.generate(tokens, **GREEDY)
    assert read == [40] + 7 * [1]
    with torch.no_grad():
        want, begun = model(tokens).logits, model(tokens[:, :20])
        for name in ("cache", "past_key_values", "cache"):      # none of them changes the state
            got = model(tokens[:, 20:], **{name: state_in(begun)})
            assert rel(got.logits, want[:, 20:]) < 1e-9         # fp64, as elsewhere
            assert state_in(got).get_seq_length() == 40
        with pytest.raises(TypeError, match="two names of one thing"):
            model(tokens, cache=state_in(begun), past_key_values=state_in(begun))
        assert "past_key_values" not in model(tokens, use_cache=False)
        assert "cache" not in model.train()(tokens)             # nobody reads on while training


# The calls are those that transformers' own models take; Llama itself goes through the same test.
@pytest.mark.parametrize("kind", ["transformers", *KINDS])
def test_a_conversation_goes_on_from_its_state(exported, kind):
    model = random_model("llama").double() if kind == "transformers" else exported(*kind)
    tokens, name = some_tokens(L=40, V=256), "past_key_values"
    model.generation_config.pad_token_id = None
    if "cache" in inspect.signature(model.prepare_inputs_for_generation).parameters \
            or "cache" in model(tokens[:, :1], use_cache=True):
        name = "cache"
    keep = dict(return_dict_in_generate=True, **GREEDY)
    first = model.generate(tokens[:, :9], **keep)               # 17, of which the last is unread
    talk = torch.cat([first.sequences, tokens[:, 9:20]], 1)     # 28
    want = model.generate(talk, **GREEDY)
    assert torch.equal(model.generate(talk, **{name: copy.deepcopy(state_in(first))}, **GREEDY),
                       want)
    # only the new tokens, and a mask of all
    got = model.generate(talk[:, 16:], attention_mask=torch.ones_like(talk),
                         **{name: copy.deepcopy(state_in(first))}, **GREEDY)
    assert torch.equal(got[:, 12:], want[:, 28:])
    twice = copy.deepcopy(state_in(first))                      # beams: each row twice
    twice.batch_repeat_interleave(2)
    assert torch.equal(model.generate(talk, num_beams=2, **{name: twice}, **GREEDY),
                       model.generate(talk, num_beams=2, **GREEDY))
    # the second answer's state, and texts of two lengths: the first row says less this time
    second = model.generate(talk, **{name: state_in(first)}, **keep)
    talk, real = torch.cat([second.sequences, tokens[:, 20:26]], 1), torch.ones(2, 42).long()
    real[0, 36:39] = 0
    got = model.generate(talk, attention_mask=real, **{name: state_in(second)}, **GREEDY)
    for row, kept, out in zip(talk, real.bool(), got, strict=True):
        assert torch.equal(out[42:], model.generate(row[kept][None], **GREEDY)[0, -8:])


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", [*KINDS, ("phi", (1,), "mlstm")])
def test_each_row_of_a_padded_batch_is_as_alone(exported, kind, side):
    model, rows = exported(*kind), [some_tokens(1, n, V=256, seed=n)[0] for n in (1, 12, 20)]
    tokens, real = padded(rows, side, 26)
    batch = dict(input_ids=tokens, attention_mask=real.long())
    alone = [dict(input_ids=row[None]) for row in rows]
    for how in ({}, {"use_cache": False}, {"num_beams": 3},
                {"num_beams": 3, "num_return_sequences": 2}):
        n = how.get("num_return_sequences", 1)
        got = model.generate(**batch, **how, **GREEDY)[:, -8:].view(3, n, 8)
        for row, out in zip(alone, got, strict=True):
            assert torch.equal(out, model.generate(**row, **how, **GREEDY)[:, -8:])
    with torch.no_grad():
        logits = model(**batch).logits
        for row, kept, out in zip(alone, real, logits, strict=True):
            assert rel(out[kept], model(**row).logits[0]) < 1e-9            # fp64, as above
        # the mean over all 0 + 11 + 19 predictions. The loss is taken in fp32, of about 6: 1e-7 of
        # that for each of a few roundings
        loss = model(**batch, labels=tokens.masked_fill(~real, -100)).loss
        parts = [model(**row, labels=row["input_ids"]).loss * (row["input_ids"].numel() - 1)
                 for row in alone[1:]]
        assert abs(loss - sum(parts) / 30) < 1e-5
        assert abs(model(**batch, labels=tokens.masked_fill(~real, -100),
                         num_items_in_batch=60).loss - sum(parts) / 60) < 1e-5


PACKED = torch.arange(10).repeat(4)[None]
WRONG_CALLS = {
    "inputs_embeds": (dict(inputs_embeds=torch.zeros(2, 4, 32)), TypeError),
    "output_hidden_states": (dict(output_hidden_states=True), TypeError),
    "output_attentions": (dict(output_attentions=True), TypeError),
    "a_typo": (dict(a_typo=3), TypeError),
    "position_ids": (dict(position_ids=PACKED), ValueError),
    "attention_mask": (dict(attention_mask=torch.ones(2, 3)), ValueError),
    "DynamicCache": (dict(past_key_values=transformers.DynamicCache()), TypeError),
    "list is no state": (dict(past_key_values=[]), TypeError)}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_what_would_change_the_answer_is_taken_or_refused_by_name(exported, name):
    model, tokens = exported(), some_tokens(V=256)
    given, error = WRONG_CALLS[name]
    with pytest.raises(error, match=name) as refusal:
        model(**{"input_ids": None if name == "inputs_embeds" else tokens} | given)
    assert "\n" not in str(refusal.value)


def test_what_changes_nothing_is_taken_and_what_cannot_go_on_is_refused(exported):
    model, tokens = exported(), some_tokens(V=256)
    want = model(tokens).logits
    for fine in (dict(output_attentions=False, output_hidden_states=None, inputs_embeds=None),
                 dict(position_ids=torch.arange(40)[None]), dict(return_dict=True),
                 dict(position_ids=torch.arange(3, 43)[None].expand(2, 40))):
        assert torch.equal(model(tokens, **fine).logits, want)
    real = torch.ones_like(tokens)
    real[0, :5] = 0                             # positions as transformers counts them
    model(tokens, attention_mask=real, position_ids=(real.cumsum(1) - 1).clamp_min(0))
    assert torch.equal(model(tokens, return_dict=False)[0], want)
    assert torch.equal(model(tokens, logits_to_keep=torch.tensor([3, 7])).logits, want[:, [3, 7]])
    state = state_in(model(tokens))
    name = "cache" if "cache" in model(tokens) else "past_key_values"
    with pytest.raises(ValueError, match="the state has read all of input_ids"):
        model.generate(tokens, **{name: state}, **GREEDY)
    with pytest.raises(ValueError, match="of 2 texts and input_ids of 1"):
        model(tokens[:1], past_key_values=state)
    with pytest.raises(ValueError, match="not supported with stateful models"):
        model.generate(tokens[:1], prompt_lookup_num_tokens=2, **GREEDY)


# Tied, with a bias at the head (Phi's), and neither
@pytest.mark.parametrize("rows", [200, 257, 300])
@pytest.mark.parametrize("kind", [("smollm2", (1,)), ("phi", ()), ("llama", ())])
def test_the_vocabulary_can_grow_and_shrink(tmp_path, exported, kind, rows):
    model, tokens, kept = exported(*kind), some_tokens(V=200), min(rows, 257)
    with torch.no_grad():
        want = model(tokens).logits[..., :kept]
        assert model.resize_token_embeddings(rows) is model.get_input_embeddings()
        got = model(tokens).logits
    assert rel(got[..., :kept], want) < 1e-9 and got.shape[-1] == rows      # fp64, as above
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (kind[0] == "smollm2") and model.get_output_embeddings() is model.lm_head
    model.save_pretrained(tmp_path / "again")
    again = export.MohawkForCausalLM.from_pretrained(tmp_path / "again").eval()
    assert torch.equal(again(tokens).logits, got)
    assert torch.equal(again.generate(tokens, **GREEDY), model.generate(tokens, **GREEDY))
    student = SSM.from_pretrained(tmp_path / "again").double()      # and so reads this project,
    assert student.config.vocab_size == rows                        # in fp32: 6e-8 a new weight
    assert rel(student.logits(tokens), got) < 1e-6


def test_new_rows_begin_as_small_as_all_others_did(exported):
    model = exported()
    model.resize_token_embeddings(2000, mean_resizing=False)
    new = model.get_input_embeddings().weight[257:]
    assert abs(new.std() - 0.02) < 0.001        # of 55,776 numbers: known to 0.02 / 334


@pytest.mark.parametrize("kind", [("llama", ()), ("phi", (1,)), ("smollm2", (0,), "deltanet")])
def test_checkpointing_computes_twice_and_changes_no_bit(exported, kind):
    tokens, gradients, computed = some_tokens(V=256), [], []
    for switch in ("disable", "enable"):
        model = exported(*kind).train()
        new_name = getattr(model, f"activation_checkpointing_{switch}", None)
        (new_name or getattr(model, f"gradient_checkpointing_{switch}"))()
        count = []
        model.backbone.layers[0].mlp.register_forward_pre_hook(
            lambda *_, count=count: count.append(1))
        model(tokens, labels=tokens).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
        computed.append(len(count))
    assert computed == [1, 2] and all(map(torch.equal, *gradients))


needs_accelerate = pytest.mark.skipif(not importlib.util.find_spec("accelerate"),
                                      reason="transformers' Trainer needs accelerate")


# Micro-batches of unequal numbers of labels: a mean of means would be another loss.
@needs_accelerate
@pytest.mark.parametrize("kind", ["transformers", ("llama", ()), ("smollm2", (1,))])
def test_trainer_accumulates_to_the_loss_of_one_batch(tmp_path, exported, kind):
    rows, found = some_tokens(8, 32, V=256), []
    labels = [row.masked_fill(torch.arange(32) < 3 * n, -100) for n, row in enumerate(rows)]
    data = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    settings = inspect.signature(transformers.TrainingArguments).parameters
    again = next(n for n in settings if n in ("activation_checkpointing", "gradient_checkpointing"))
    for B, more in ((8, {}), (2, {}), (2, {again: True})):
        model = random_model("llama") if kind == "transformers" else exported(
            *kind, dtype=torch.float32)
        trainer = transformers.Trainer(model, transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=B, gradient_accumulation_steps=8 // B,
            max_steps=1, logging_steps=1, learning_rate=0.0, save_strategy="no", report_to=[],
            use_cpu=True, disable_tqdm=True, **more), train_dataset=data, eval_dataset=data)
        trainer.train()
        log = trainer.state.log_history[0]
        found.append((float(log["loss"]), float(log["grad_norm"])))
        assert abs(trainer.evaluate()["eval_loss"] - found[0][0]) < 0.2     # rows weigh the same
    for loss, norm in found[1:]:        # fp32, of some thousand terms; the log has 4 digits or more
        assert abs(loss / found[0][0] - 1) < 1e-3 and abs(norm / found[0][1] - 1) < 1e-3


class Says(transformers.LogitsProcessor):
    """Makes a model say these tokens, whatever it thinks"""
    def __init__(self, start, tokens):
        self.start, self.tokens = start, tokens

    def __call__(self, ids, scores):
        told = torch.full_like(scores, -torch.inf)
        told[:, self.tokens[ids.shape[1] - self.start]] = 0
        return told


@pytest.mark.parametrize("rows, stops", [(259, [256, 257, 258]), (258, [256, 257]), (257, [256])])
def test_an_export_stops_at_every_end_of_its_teacher(tmp_path, rows, stops):
    config = transformers.LlamaConfig(**LLAMA | {"vocab_size": rows})
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "teacher")
    byte_tokenizer_with(tmp_path / "teacher", "<|eom|>", eos_token="<|im_end|>", pad_token="[PAD]")
    (tmp_path / "teacher" / "generation_config.json").write_text('{"eos_token_id": [257, 258]}')
    student = SSM.from_teacher(Teacher.load(str(tmp_path / "teacher")))
    student.save_pretrained(tmp_path / "student")
    export.main([str(tmp_path / "student"), str(tmp_path / "exported"),
                 "--teacher", str(tmp_path / "teacher")])
    said = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert said["eos_token_id"] == stops and said["pad_token_id"] == 256    # it has a row
    model = export.MohawkForCausalLM.from_pretrained(tmp_path / "exported").eval()
    for end in stops:
        out = model.generate(some_tokens(1, 5, V=256), max_new_tokens=9,
                             logits_processor=[Says(5, [52, 50, end, *b"user: "])])
        assert out[0, 5:].tolist() == [52, 50, end]


def test_an_export_carries_its_table_and_its_license_and_overwrites_nothing(tmp_path, a_run):
    (tmp_path / "empty").mkdir()
    export.main([str(a_run), str(tmp_path / "empty")])
    card = (tmp_path / "empty" / "README.md").read_text()
    assert (a_run / "report.md").read_text() in card and "{" not in card
    assert (tmp_path / "empty" / "LICENSE").read_text() == (HERE / "LICENSE").read_text()
    def files_of(folder):
        return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    before = files_of(tmp_path)
    for taken in (tmp_path / "empty", tmp_path / "empty" / "README.md"):
        with pytest.raises(UsageError, match="is there already, and not empty"):
            export.main([str(a_run), str(taken)])
    with pytest.raises(UsageError, match="no such teacher"):
        export.main([str(a_run), str(tmp_path / "new"), "--teacher", "./nowhere"])
    assert files_of(tmp_path) == before


# [PAD] is 257: of a model of 257 rows it is one too many, and no text has it.
def test_a_pad_token_that_fine_tuning_added_is_no_obstacle(tmp_path, data_folder):
    random_model().save_pretrained(tmp_path / "teacher")
    byte_tokenizer_with(tmp_path / "teacher", pad_token="[PAD]")
    distill.main(flags(tmp_path / "run", tmp_path / "teacher", data_folder,
                       "--tokens", "512", "512", "512"))
    export.main([str(tmp_path / "run"), str(tmp_path / "exported")])
    model = export.MohawkForCausalLM.from_pretrained(tmp_path / "exported").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    prompts, how = ["def", "import os"], dict(max_new_tokens=5, do_sample=False)
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    assert batch.input_ids.max() == 257
    for prompt, out in zip(prompts, model.generate(**batch, **how), strict=True):
        alone = model.generate(**tokenizer(prompt, return_tensors="pt"), **how)
        assert torch.equal(out[-5:], alone[0, -5:])


# -----------------------------------------------------------------------------
# the studies

@pytest.mark.parametrize("name, want", [
    ("last", [(1, 4)]), ("uniform", [(0, 1), (1, 4)]),
    ("uniform_consecutive", [(0, 0), (0, 1), (0, 2), (1, 2), (1, 3), (1, 4)]),
    ("uniform_last", [(0, 1), (1, 4), (0, 3), (1, 4)])])
def test_layers_of_two_are_mapped_to_layers_of_five(name, want):
    assert objectives.LAYER_MAPS[name](2, 5) == want


def test_a_shallower_student_is_made_of_every_so_manieth_layer_and_meets_those(teacher_folder):
    teacher = Teacher.load(str(teacher_folder))
    seen = teacher.at(2)
    student = SSM.from_teacher(seen, init="qkv").eval()
    assert seen.sources == [0, 2] and len(student.layers) == len(seen.layers) == 2
    theirs, tokens = teacher.model.state_dict(), some_tokens()
    for i, t in enumerate(seen.sources):
        ours = student.layers[i].mlp.fc1.weight
        assert torch.equal(ours, theirs[f"model.layers.{t}.mlp.fc1.weight"])
    deep = dict(teacher.inputs(tokens))
    for i, u in seen.inputs(tokens, only=[1]):
        assert i == 1 and torch.equal(u, deep[2])
        assert torch.equal(seen.block(i, u), teacher.block(2, u))
        assert torch.equal(seen.matrix(i, u), teacher.matrix(2, u))
    assert torch.equal(seen.logits(tokens), teacher.logits(tokens))
    rows = evaluation.layer_distances(SSM.from_teacher(seen, (0, 1)), seen, tokens)
    # The first layer is the teacher's and is given what that is; the second is given too little.
    assert rows[0]["drift"] < 1e-5 < 0.01 < rows[1]["drift"]


def test_a_student_that_is_the_teacher_has_its_hidden_states_and_relations():
    teacher, tokens = random_teacher(), some_tokens()
    same = SSM.from_teacher(teacher, "all").eval()
    for name in ("last", "uniform"):
        (loss, left), = objectives.hidden_states(same, teacher, tokens, name)
        assert left < 1e-9                  # squares of errors, each below 1e-5 of its number
    (_, left), = objectives.hidden_states(SSM.from_teacher(teacher).eval(), teacher, tokens)
    assert left > 0.01
    # All but the last layer are the teacher's, and the last has its q, k and v
    copied, fresh = (SSM.from_teacher(teacher, (0, 1), init).eval() for init in ("qkv", "mohawk"))
    # A KL of 0 is a sum of differences of logs, each known to 6e-8 of its own size, a few nats.
    assert next(objectives.relations(copied, teacher, tokens, 2, 4))[1] < 1e-6
    assert next(objectives.relations(fresh, teacher, tokens, 2, 4))[1] > 0.1
    assert next(objectives.relations(copied, teacher, tokens))[1] > 1e-3       # the last but one


def test_relations_in_rows_are_the_textbooks_and_have_its_gradient(monkeypatch):
    monkeypatch.setattr(objectives, "RELATIONS_AT_ONCE", 7)
    teacher, tokens = random_teacher("smollm2"), some_tokens(2, 20)
    student = SSM.from_teacher(teacher, init="mohawk").eval()
    loss, _ = next(objectives.relations(student, teacher, tokens, 1, 4))
    loss.backward()
    weight = student.layers[-1].mixer.in_proj.weight
    got, weight.grad = weight.grad, None
    want = 0
    for ours, theirs in zip(objectives.student_heads(student, tokens),
                            objectives.teacher_heads(teacher, 1, tokens), strict=True):
        R = []
        for x in (ours, theirs):
            x = x.unflatten(2, (4, -1)).transpose(1, 2)
            scores = x @ x.mT / x.shape[-1] ** 0.5
            R.append(scores.masked_fill(torch.ones(20, 20).triu(1) > 0, -torch.inf).softmax(-1))
        for t in range(1, 20):
            p, q = R[1][:, :, t, :t + 1], R[0][:, :, t, :t + 1]
            want += (p * (p / q).log()).sum(-1).mean() / (3 * 19)
    want.backward()
    # The gradient of a KL is a difference of probabilities, of which a digit cancels.
    assert loss.item() == pytest.approx(want.item(), rel=1e-5) and rel(got, weight.grad) < 1e-4


def test_relations_take_memory_that_grows_with_the_length_only(monkeypatch):
    monkeypatch.setattr(objectives, "RELATIONS_AT_ONCE", 16)
    asked = []
    own = objectives.relation_sums

    def watched(ours, theirs, heads, start):
        asked.append((start, heads * 16 * theirs.shape[1]))
        return own(ours, theirs, heads, start)

    monkeypatch.setattr(objectives, "relation_sums", watched)
    teacher = random_teacher()
    student = SSM.from_teacher(teacher)
    next(objectives.relations(student, teacher, some_tokens(1, 100), 0, 2))[0].backward()
    # forward and, computed again, backward: 7 parts of 16 rows for each of q, k, v
    assert len(asked) == 2 * 3 * 7 and max(n for _, n in asked) == 2 * 16 * 100


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_each_objective_learns_then_the_output_stage_goes_on(
        tmp_path, teacher_folder, data_folder, objective, capsys):
    out = tmp_path / "run"
    distill.main(flags(out, teacher_folder, data_folder, "--objective", objective, "--n_layer",
                       "2", "--tokens", "5120", "1024", "--lr", "1e-2", "1e-3", "--init", "qkv",
                       "--fp32"))
    said = capsys.readouterr().out
    assert distill.first_line_of_doc(
        objectives.objective_stage([objective], distill.STAGES).loss_fn) in said
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    second = [e["loss"] for e in log if e["stage"] == "stage 2"]
    assert len(second) == 20 and sum(second[-3:]) < 0.9 * sum(second[:3])
    start = SSM.from_teacher(Teacher.load(str(teacher_folder)).at(2), init="qkv")
    before, after = start.state_dict(), SSM.from_pretrained(out / "stage2").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if objective == "matrix":
        assert moved and all("mixer" in name for name in moved)
    else:
        assert "backbone.embedding.weight" in moved
    evaluation.main([str(out), "--eval_tokens", "256", "--length", "5"])


@pytest.mark.parametrize("asked", OBJECTIVES)
@pytest.mark.parametrize("mixer", ALL_MIXERS)
def test_what_learns_by_an_objective_is_what_its_loss_reaches(mixer, asked):
    # So that no process waits for a gradient, and no moment is missed when a run goes on.
    stage = objectives.objective_stage([asked], distill.STAGES)
    teacher = random_teacher("smollm2")
    student = SSM.from_teacher(teacher, mixer=mixer, init="qkv")
    params = distill.choose_trainable(student, stage)
    for loss, _ in stage.loss_fn(student, teacher, some_tokens(2, 20)):
        loss.backward()
    assert params and [name for name, p in params.items() if p.grad is None] == []


def test_relations_are_as_exact_where_all_else_is_in_bf16():
    # bf16 keeps 8 bits. Of a KL near 0, the difference of two logs, it would leave nothing.
    torch.manual_seed(0)
    theirs = torch.randn(1, 64, 48)
    ours = (theirs + 0.01 * torch.randn_like(theirs)).requires_grad_()
    want, _ = objectives.relation_sums(ours, theirs, 3, 1)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = objectives.relation_sums(ours, theirs, 3, 1)
    assert got.dtype == torch.float32 and torch.equal(got, want) and want > 0


@pytest.mark.parametrize("name", objectives.LAYER_MAPS)
def test_a_layer_map_ends_with_the_last_and_all_but_one_ask_every_layer(name):
    for T in range(1, 31):
        for S in range(1, T + 1):
            pairs = objectives.LAYER_MAPS[name](S, T)
            assert (S - 1, T - 1) in pairs and all(0 <= t < T for _, t in pairs)
            assert {i for i, _ in pairs} == ({S - 1} if name == "last" else set(range(S)))
            if name == "uniform_consecutive":               # nothing of the teacher is left out
                assert {t for _, t in pairs} == set(range(T))
    assert objectives.uniform_consecutive(2, 4) == [
        (0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]


def test_weight_decay_does_not_touch_what_relations_do_not_reach(data_folder):
    teacher, scratch = random_teacher(), Scratch("--tokens", "1280", "--lr", "1e-2", "--objective",
                                                 "mha", stage=2)
    student = SSM.from_teacher(teacher, init="random")
    sizes = list(student.layers[0].mixer.parts.values())
    before = [layer.mixer.in_proj.weight.detach().clone().split(sizes) for layer in student.layers]
    distill.train(scratch, "test", distill.stage_table(scratch.args)[2], student, teacher,
                  Tokens(data_folder), 0, scratch.budget)
    for i, layer in enumerate(student.layers):
        moved = [not torch.equal(x, y) for x, y in
                 zip(before[i], layer.mixer.in_proj.weight.split(sizes), strict=True)]
        assert moved == ([True] * 5 if i + 1 < len(student.layers) else [True] * 3 + [False] * 2)


def test_a_study_runs_each_cell_once_and_tabulates_them(
        tmp_path, teacher_folder, data_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = {"od": "--objective od", "hs": "--objective hs"}
    command = ["--seeds", "0", "1",
               *flags("ignored", teacher_folder, data_folder, "--tokens", "256", "256")]
    command = command[:command.index("--out")] + command[command.index("--out") + 2:]

    def study(arguments):
        grid.run_study("objectives", cells, "--preset tiny --n_layer 2", "", arguments)

    study(command)
    first = capsys.readouterr().out
    assert first.count("stage 3 | saved") == 4 and "run 4 of 4 | hs" in first
    shutil.rmtree("out/study-objectives/hs/1")
    shutil.rmtree("results")
    Path("out/study-objectives/hs/1").mkdir()
    with filelock.FileLock("out/study-objectives/hs/1/.cell"):          # as another process would
        study(command)
    told = capsys.readouterr().out
    assert "other processes are at work on hs: the last" in told and not Path("results").exists()
    study(command)
    again = capsys.readouterr().out
    assert again.count("stage 3 | saved") == 1 and "run 4 of 4" in again
    with pytest.raises(UsageError, match="was finished as .*, not as .*--lr 1e-4"):
        study([*command, "--lr", "1e-4"])
    with pytest.raises(UsageError, match="leave out --objective, --out: the runs of the study"):
        study([*command, "--out", "here", "--objective=hs"])
    table = Path("results/study-objectives.md").read_text()
    row = re.search(r"^\| od \| ([\d.]+) ± ([\d.]+) \| .* \| ([\d,]+) \| ([\d,]+) \|", table, re.M)
    abouts = [json.loads(Path(f"out/study-objectives/od/{seed}/stage3/config.json").read_text())
              ["about"]["loss"] for seed in (0, 1)]
    assert float(row[1]) == pytest.approx(sum(abouts) / 2, abs=1e-4)
    assert float(row[2]) == pytest.approx(abs(abouts[0] - abouts[1]) / 2, abs=1e-4) != 0
    # 3 inputs of a conv of 3 x 32 channels, 4 states of 8 x 8, in fp32
    assert row[4] == f"{(3 * 96 + 4 * 64) * 4:,}"


@pytest.mark.parametrize("asked, stage", [
    ("--stage 1", 1), ("--stage 2", 2), ("--stage 3", 3), ("--objective hs", 2),
    ("--objective mha", 2)])
def test_with_mixer_only_what_learns_is_what_also_would_and_is_a_mixers(asked, stage):
    student = SSM(Config(vocab_size=16, d_model=16, n_layer=3, d_mlp=16, n_head=2, n_qk_head=2,
                         head_dim=8, d_state=8, attn_layers=(1,), n_kv_head=2))

    def learners(*more):
        args = distill.parse(["--preset", "tiny", *asked.split(), *more])
        return list(distill.choose_trainable(student, distill.stage_table(args)[stage]))
    mixers = [name for name in learners() if ".mixer." in name and "self_attn" not in name]
    assert learners("--train", "mixer") == mixers != []


@pytest.mark.parametrize("study, runs", [(mixers, 40), (objectives, 7)])
def test_every_run_of_a_study_is_a_command_at_equal_tokens(study, runs):
    totals = set()
    for flags_of_run in study.STUDY.values():
        args = distill.parse(shlex.split(f"{study.COMMON} {flags_of_run}"))
        totals.add(sum(budget.tokens for budget in args.budgets.values()))
    assert len(study.STUDY) == runs and len(totals) == 1


@pytest.mark.parametrize("mistake, complaint", [
    ("--n_layer 4", "--n_layer 4: the teacher has 3 layers, so from 1 to 3"),
    ("--n_layer 0", "--n_layer 0: the teacher has 3 layers"),
    ("--objective mha relation_layer=3", "the teacher has layers 0 to 2"),
    ("--objective mha relation_heads=5", "relation_heads=5 does not divide"),
    ("--objective mha --attn_layers 2", "the last layer's mixer, which keeps attention"),
    ("--n_layer 2 --attn_layers 4 5", "--attn_layers 4: the model has layers 0 to 1"),
    ("--objective hs --stage 3", "--objective takes stage 2's place"),
    ("--objective hs relation_heads=2", "--objective hs relation_heads: it takes layer_map=..."),
    ("--objective hs layer_map=none", "layer_map=none: choose among last, uniform"),
    ("--objective od x=1", "--objective od x: it takes no options"),
    ("--objective mha relation_heads=0", "relation_heads=0 does not divide"),
    ("--objective mha relation_heads=two", "invalid literal for int()"),
    ("--objective nothing", "--objective nothing: choose among od, matrix, hs, mha, next")])
def test_a_mistake_in_a_studys_flags_is_one_line(
        tmp_path, teacher_folder, data_folder, mistake, complaint):
    with pytest.raises(UsageError, match=re.escape(complaint)) as error:
        distill.main(flags(tmp_path / "run", teacher_folder, data_folder, "--tokens", "12e3",
                           *mistake.split()))
    assert "\n" not in str(error.value) and not (tmp_path / "run" / "last").exists()


def test_a_stage_of_another_depth_is_refused(tmp_path, teacher_folder, data_folder):
    command = flags(tmp_path / "run", teacher_folder, data_folder, "--tokens", "256")
    distill.main([*command, "--stage", "2", "--n_layer", "2"])
    with pytest.raises(UsageError, match="has 2 layers, this run has 3"):
        distill.main([*command, "--stage", "3"])


# -----------------------------------------------------------------------------
# what it costs

MEASURE = MOST_HELD + """
import ctypes, sys, torch, distill
# glibc keeps what is freed in small pieces. Told to give back pieces of 128 KB and more (-3 is
# M_MMAP_THRESHOLD, -1 M_TRIM_THRESHOLD), the process holds what its tensors take, and some
# megabytes of libraries.
for option in (-3, -1):
    assert ctypes.CDLL(None).mallopt(option, 2**17)
from model_ssm import SSM, Config
from model_teacher import Teacher
from transformers import PhiConfig
stage, flags = int(sys.argv[1]), sys.argv[2:]
args = distill.parse(["--preset", "tiny", "--stage", str(stage), "--context", "512", "--batch",
                      "2048", "--micro_batch", "2", "--tokens", "4096", *flags])
from extras import cost
row = distill.stage_table(args)[stage]
hf = PhiConfig(vocab_size=16384, hidden_size=512, intermediate_size=2048, num_hidden_layers=6,
               num_attention_heads=8)
config = Config(**Teacher.random(hf, "meta").shapes)
bf16 = distill.choose_device("cpu")[1] and stage > 1
costs = cost.cost(row, config, hf, args.budgets[stage], args, bf16)
with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
    x = torch.randn(512, 512, requires_grad=True)
    (x @ x).sum().backward()                                    # what the libraries take
before = most()
teacher = Teacher.random(hf, dtype=torch.bfloat16 if bf16 else torch.float32)
student = SSM.from_teacher(teacher)
student.recompute = args.recompute
optimizer = distill.make_optimizer(distill.choose_trainable(student, row), args)
for micros in (1, 2):       # the second step is the largest: it has moments, and gradients before
    for micro in range(micros):                                 # its second micro-batch
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            for loss, _ in row.loss_fn(student, teacher, torch.randint(16384, (2, 512))):
                loss.backward()
    optimizer.step()
    optimizer.zero_grad()
parts = *cost.SHARDED, "activations", "logits"
print(sum(costs[f"{part} bytes"] for part in parts),
      most() - before)
"""


@on_linux
@pytest.mark.parametrize("flags", ["1", "2", "3 --recompute"])
def test_the_plan_knows_the_memory_of_a_real_step(flags, tmp_path, start):
    (tmp_path / "measure.py").write_text(MEASURE)
    code, said, complaint = start(tmp_path / "measure.py", *flags.split()).wait()
    assert code == 0, complaint
    planned, measured = map(float, said.split())
    print(f"stage {flags}: planned {planned / 1e9:.3f} GB, measured {measured / 1e9:.3f} GB")
    assert 0.85 < planned / measured < 1.15


def test_the_plan_counts_the_flops_of_the_textbook():
    hf, B, L = random_model().config, 2, 32
    teacher = Teacher.random(hf)
    args = distill.parse(["--preset", "tiny", "--context", str(L), "--micro_batch", str(B),
                          "--batch", str(B * L), "--tokens", "1e4", "--fp32"])
    config = Config(**teacher.shapes)
    for stage in (2, 3):
        row = distill.stage_table(args)[stage]
        costs = cost.cost(row, config, hf, args.budgets[stage], args, False)
        # 2 for each weight of a matrix, and half of 4 L D for the attention of each layer
        asked = [p for name, p in teacher.model.named_parameters() if p.dim() == 2
                 and "embed" not in name and (stage == 3 or "head" not in name)]
        matrices = sum(p.numel() for p in asked)
        attention = 2 * L * hf.hidden_size * hf.num_hidden_layers
        assert costs["teacher"] == pytest.approx(2 * matrices + attention, rel=0.01)
        params = distill.choose_trainable(SSM(config), row)
        assert costs["trained"] == sum(p.numel() for p in params.values())
        if stage == 3:                          # two products for each of the forward's
            # But the loss makes the two of the head in the forward.
            of_head = 4 * config.d_model * config.vocab_size
            assert costs["backward"] + of_head == pytest.approx(
                2 * (costs["student"] - of_head), rel=0.05)
            assert costs["again"] == 0


def test_the_plans_of_the_readme_fit_their_gpus(capsys, monkeypatch):
    # One step on fake tensors for all plans that differ in the GPU, how many there are and --fsdp
    # only: those come after it.
    counted, own = {}, cost.fake_step

    def once(stage, config, hf, budget, args, *more):
        rest = {name: x for name, x in vars(args).items()
                if name not in ("gpu", "world", "fsdp", "budgets")}
        key = str((stage, config, hf, budget.micro_batch, sorted(rest.items()), more))
        if key not in counted:
            counted[key] = own(stage, config, hf, budget, args, *more)
        return dict(counted[key])

    monkeypatch.setattr(cost, "fake_step", once)
    plans = sorted({line for line in commands_of_the_readme() if "--gpu" in line})
    assert len(plans) >= 3
    for line in plans:
        cost.main(shlex.split(line)[3:])
        said = capsys.readouterr().out
        assert "which fits" in said and "does not fit" not in said, line
        assert "1,521,097,472 parameters are trained" in said


def test_bench_times_every_stage_with_no_download(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cost.main(["--preset", "tiny", "--bench", "--context", "32"])
    said = capsys.readouterr().out
    rows = [line.split("|") for line in said.splitlines() if re.match(r"\| +[123] ", line)]
    assert [int(row[1]) for row in rows] == [1, 2, 3]
    assert all(float(row[6]) > 0 and int(row[7].replace(",", "")) > 0 for row in rows)
    assert list(tmp_path.iterdir()) == []


# -----------------------------------------------------------------------------
# pictures, and the kernels' benchmark

@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_pictures_are_drawn_into_the_runs_folder(its_copy):
    before = {path.name for path in its_copy.iterdir()}
    few = ["--eval_tokens", "512", "--picture_tokens", "16"]
    evaluation.main([str(its_copy), "--speed", "--contexts", "16", "32"])
    pictures.main([str(its_copy), "--heads", "0:3", "2:0", *few])
    drawn = {path.name for path in its_copy.iterdir()} - before - {"speed.json"}
    # and no power.png: the run has 4 steps of stage 3
    assert drawn == {"matrices.png", "differences.png", "loss.png", "layers.png", "speed.png"}
    for path in its_copy.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_what_attention_was_worth_is_drawn_of_a_run_that_chose_layers(
        tmp_path, a_run, teacher_folder, data_folder):
    out = tmp_path / "hybrid"
    distill.main(flags(out, teacher_folder, data_folder, "--tokens", "512", "--from",
                       str(a_run / "stage2"), "--attn_layers", "auto:2"))
    hybrid = SSM.from_pretrained(out / "stage3")
    run = evaluation.EvaluatedRun(evaluation.parse([str(out), "--eval_tokens", "64"]))
    start = pictures.first_student(run)                 # stage 2's mixers, where they are still
    assert start.config.attn_layers == hybrid.config.attn_layers and len(start.ssm_layers) == 1
    before = SSM.from_pretrained(a_run / "stage2").state_dict()
    kept = f"backbone.layers.{start.ssm_layers[0]}.mixer."
    assert all(torch.equal(w, before[name]) for name, w in start.state_dict().items()
               if name.startswith(kept))
    pictures.main([str(out), "--eval_tokens", "64", "--picture_tokens", "16"])
    assert (out / "attention.png").stat().st_size > 10_000


def test_the_study_of_hybrids_measures_each_choice_once_and_goes_on(
        its_copy, capsys, monkeypatch):
    command = [str(its_copy / "stage2"), "--how_many", "1", "2", "--keys", "8", "16",
               "--eval_tokens", "512"]
    measure, calls = hybrids.measure, []

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(hybrids, "choose", stop)          # after the rows of "even"
        hybrids.main(command)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(hybrids, "measure", lambda *args: calls.append(args[1]) or measure(*args))
        hybrids.main(command)
    said = capsys.readouterr().out
    found = json.loads((its_copy / "hybrids.json").read_text())
    assert list(found["rows"]) == ["0 even", "1 even", "2 even", "1 kl", "2 kl", "1 recall",
                                   "2 recall"]
    assert len(calls) == 4                              # those of "even" were there
    none, best = found["rows"]["0 even"], found["rows"]["2 kl"]
    assert none["layers"] == [] and none["kl"] > best["kl"] > 0
    assert found["rows"]["1 kl"]["layers"] == best["layers"][:1]
    # The first row is the student as it is, the others what restore_attention makes of it.
    run = evaluation.EvaluatedRun(evaluation.parse(command[:1] + ["--eval_tokens", "512"]))
    windows = run.windows(run.context)
    assert none["kl"] == evaluation.compare(run.student, run.teacher, windows)["kl"]
    run.student.restore_attention(run.teacher, best["layers"])
    scores = evaluation.compare(run.student, run.teacher, windows)
    assert best["kl"] == scores["kl"] and best["ppl"] == math.exp(scores["loss"])
    assert re.search(rf"^\| kl +\| 2 \| {best['kl']:.3f} \|", said, re.M)
    with pytest.raises(UsageError, match="was made with other flags"):
        hybrids.main([*command[:-1], "256"])
    with pytest.raises(UsageError, match="of 3 layers at most 2 may have attention"):
        hybrids.main([*command, "--how_many", "3"])


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_a_power_law_is_found_again_and_said(tmp_path, capsys):
    log = [{"stage": "stage 3", "tokens": 1e4 * n, "loss": 0.5 * (1e-2 * n) ** -0.25}
           for n in range(1, 101)]
    pictures.draw_power_law(tmp_path / "power.png", "a law", log)
    assert ("KL = 0.500 (million tokens)^-0.250 in the last three quarters: at 1M 0.500, "
            "10M 0.281, 100M 0.158") in capsys.readouterr().out
    assert (tmp_path / "power.png").stat().st_size > 10_000
    pictures.draw_power_law(tmp_path / "short.png", "a law", log[:7])
    assert "needs 8 steps of stage 3, the log has 7" in capsys.readouterr().out
    assert not (tmp_path / "short.png").exists()


def test_all_that_waits_for_a_gpu_runs_in_miniature_and_says_what_failed(tmp_path):
    def gpu_sh(parts, **env):
        return subprocess.run(["bash", str(HERE / "results/gpu.sh"), "--dry"], text=True,
                              capture_output=True, env=os.environ | {
                                  "PARTS": parts, "OUT": str(tmp_path / "out")} | env)

    done = gpu_sh("kernels run")
    assert done.returncode == 0, done.stdout + done.stderr
    took = re.findall(r"^(kernels|run) +\d+ s +\S", done.stdout, re.M)
    assert took == ["kernels", "run"]
    assert json.loads((tmp_path / "out/kernels.json").read_text())["convolution"][0]["forward ms"]
    assert "report.md" in (tmp_path / "out/run.txt").read_text()
    again = gpu_sh("kernels run")
    assert again.returncode == 0 and again.stdout.count("ran before") == 2
    # A python that fails: of two parts, the one that has run stays so.
    (tmp_path / "python").write_text("#!/bin/sh\necho no such thing\nexit 3\n")
    (tmp_path / "python").chmod(0o755)
    broken = gpu_sh("kernels decoding", PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert broken.returncode == 1
    assert re.search(r"^decoding +FAILED \(3\) after \d+ s +no such thing$", broken.stdout, re.M)
    assert re.search(r"^kernels +ran before", broken.stdout, re.M)


def test_every_pending_line_is_a_part_of_the_script_for_a_gpu():
    script = (HERE / "results/gpu.sh").read_text()
    pending = re.findall(r"^\| ([\w, -]+) \|.+\| pending \|$",
                         (HERE / "results/README.md").read_text("utf-8"), re.M)
    names = [name for line in pending for name in line.split(", ")]
    parts = re.findall(r"^ +part ([\w-]+)(?:=cut)? \d+", script.partition("\nelse")[0], re.M)
    assert names == parts and len(names) > 5


def test_without_a_gpu_nothing_is_measured_in_earnest(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(["bash", str(HERE / "results/gpu.sh")], capture_output=True, text=True,
                          env=os.environ | {"OUT": str(tmp_path / "out")})
    assert done.returncode == 1 and "no CUDA device here" in done.stderr


def test_the_benchmark_measures_says_what_it_left_out_and_writes_it_down(tmp_path, capsys):
    bench_kernel.main(["--lengths", "16", "--orientation_lengths", "16", "--tokens", "16",
                     "--json", str(tmp_path / "kernels.json")])
    printed, written = capsys.readouterr().out, json.loads((tmp_path / "kernels.json").read_text())
    forms = {row["form"]: row for row in written["SSD"]}
    assert forms["chunked"]["error"] < (1e-5 if DEVICE == "cpu" else 1e-2)
    assert forms["chunked"]["both ms"] > 0 and forms["chunked"]["least GB"] > 0
    for form in bench_kernel.FORMS:
        assert form in forms or f"left out: {form}, L 16: " in printed
    assert {row["form"] for row in written["orientation loss"]} == {"naive", "tiles"}
    assert {row["form"] for row in written["convolution"]} == {"causal_conv"}


def test_a_peer_that_computes_something_else_is_shown_as_wrong(monkeypatch, capsys):
    def no_gradient_of_the_decay(q, k, v, a):
        return ssd(q, k, v, a.detach() + 0 * a)

    monkeypatch.setattr(bench_kernel, "FORMS", {
        "right": bench_kernel.ssd_chunked, "forward": lambda q, k, v, a: ssd(q, k, v, 2 * a),
        "backward": no_gradient_of_the_decay, "not to be timed": ssd})
    bench_kernel.main(["--lengths", "16", "--orientation_lengths", "16", "--tokens", "16",
                       "--vocabulary", "64", "--forms", "right", "forward", "backward"])
    said = capsys.readouterr().out
    assert re.search(r"^ +16 +1 +right +\d", said, re.M) and "not to be timed" not in said
    for form in ("forward", "backward"):
        assert re.search(rf"^ +16 +1 +{form} WRONG +\d", said, re.M)
        assert re.search(rf"^left out: {form} WRONG, L 16: error ", said, re.M)


@pytest.mark.parametrize("ms, runs", [(0.1, 20), (30, 20), (300, 2)])
def test_a_cpu_time_is_the_median_of_up_to_20_runs_in_about_3_seconds(monkeypatch, ms, runs):
    clock = [0.0]
    monkeypatch.setattr(bench_kernel.time, "perf_counter", lambda: clock[0])
    calls = []

    def work():
        calls.append(1)
        clock[0] += ms / 1e3 * (1 if len(calls) % 3 else 10)        # every third is slow

    assert bench_kernel.milliseconds(work, "cpu") == pytest.approx(ms)
    assert len(calls) == 1 + runs


# Both count products of matrices. The formula leaves out a conv's first tokens and an odd last
# chunk, so here the length is a whole number of chunks.
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("name, attn_layers", [
    ("phi", ()), ("phi", (1,)), ("llama", ()), ("smollm2", (0, 2))])
def test_the_formula_behind_mfu_is_what_a_step_computes(name, attn_layers, stage):
    hf, L = random_model(name).config, 128
    hf.vocab_size = 512
    args = distill.parse(["--preset", "tiny", "--context", str(L), "--micro_batch", "1",
                          "--batch", str(L), "--tokens", "1e4", "--fp32"])
    config = Config(**Teacher.random(hf, "meta").shapes | {"attn_layers": attn_layers})
    row = distill.stage_table(args)[stage]
    want = cost.useful(cost.fake_step(row, config, hf, args.budgets[stage], args, False))
    assert distill.flops_per_token(config, hf, row, L) == pytest.approx(want, rel=0.03)


def test_the_examples_of_the_readme_for_forks_run(tmp_path, teacher_folder, data_folder):
    text = (HERE / "README.md").read_text("utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.S)
    assert len(blocks) == 2
    known = set(mixers.MIXERS), set(objectives.OBJECTIVES)
    try:
        for block in blocks:
            exec(block, {})
        (mixer,), (objective,) = (set(table) - names for table, names in
                                  zip((mixers.MIXERS, objectives.OBJECTIVES), known, strict=True))
        distill.main(flags(tmp_path / "run", teacher_folder, data_folder, "--tokens", "512", "512",
                           "--mixer", mixer, "--init", "qkv", "--objective", objective))
        evaluation.main([str(tmp_path / "run"), "--eval_tokens", "256", "--length", "5"])
    finally:
        for table, names in zip((mixers.MIXERS, objectives.OBJECTIVES), known, strict=True):
            for name in set(table) - names:
                del table[name]


def test_every_command_of_extras_in_the_pages_parses():
    programs = {"extras.cost": cost.parse, "extras.pictures": pictures.parse,
                "extras.hybrids": hybrids.parse}
    seen = set()
    for command in commands_of_the_readme():
        words = shlex.split(command)[1:]
        if words[0] == "-m" and words[1].startswith("extras."):
            assert (HERE / f"{words[1].replace('.', '/')}.py").is_file(), command
            seen.add(words[1])
            if words[1] in programs:
                programs[words[1]](words[2:])
    assert len(seen) >= 5


@pytest.mark.parametrize("mistake, complaint", [
    ("--world 0", "not a whole number from 1 on"), ("--mfu 0", "--mfu 0 would take forever"),
    ("--mfu 40", "not a number from 0 to 1"), ("--gpu abacus", "invalid choice"),
    ("--n_layer 0", "--n_layer 0: the teacher has 3 layers"),
    ("--n_layer 9", "--n_layer 9: the teacher has 3 layers")])
def test_a_mistake_in_asking_for_costs_is_one_line(teacher_folder, mistake, complaint):
    with pytest.raises(UsageError, match=re.escape(complaint)) as error:
        cost.main(["--preset", "tiny", "--teacher", str(teacher_folder), *mistake.split()])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("seeds, complaint", [
    ("1 2 1", "--seeds 1 2 1: one of them comes twice"), ("-1", "not a whole number from 0 on")])
def test_a_mistake_in_a_studys_seeds_is_one_line(seeds, complaint):
    with pytest.raises(UsageError, match=re.escape(complaint)):
        grid.run_study("objectives", objectives.STUDY, objectives.COMMON, "",
                       ["--seeds", *seeds.split()])


def test_an_export_uses_no_interface_that_is_about_to_go(a_run, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        export.main([str(a_run), str(tmp_path / "exported")])


@pytest.mark.parametrize("mistake, complaint", [
    ("--heads 3", "LAYER:HEAD"), ("--heads 0:4", "layers 0, 1, 2 to draw, and heads 0 to 3"),
    ("--picture_tokens 0", "from 1 on")])
def test_a_mistake_in_asking_for_pictures_is_one_line(a_run, mistake, complaint):
    with pytest.raises(UsageError, match=re.escape(complaint)) as error:
        pictures.main([str(a_run), "--eval_tokens", "256", *mistake.split()])
    assert "\n" not in str(error.value)


@pytest.mark.attack
def test_an_export_that_is_stopped_at_any_change_of_a_file_leaves_nothing_behind(
        tmp_path, a_run, cases, show, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def job(name):
        return lambda: export.main([str(a_run), name])

    whole, count = tmp_path / "whole", []
    code, printed = attempt(lambda: (job("whole")(), print("changes", *count[0])),
                            lambda: count.append(at_operation(math.inf, None)))
    assert code == 0, printed
    changes = int(re.search(r"changes (\d+)", printed)[1])
    want = {path.name: path.read_bytes() for path in whole.iterdir() if path.suffix != ".md"}
    outcomes = []
    for act in (kill, disk_is_full):
        for at in cases(range(1, changes + 1, 2)):
            name = f"{act.__name__}-{at}"
            first = attempt(job(name), lambda: at_operation(at, act))       # noqa: B023
            if act is disk_is_full:
                outcomes.append((f"full disk at {at}", outcome_of(*first, lambda: True)))
            elif not (tmp_path / name).exists():
                attempt(job(name))
            if not (tmp_path / name).exists():
                attempt(job(name))
            got = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()
                   if path.suffix != ".md"}
            # An empty lock file may stay, of a kill just before the end.
            left = [path.name for path in tmp_path.glob(f".{name}.*") if path.suffix != ".lock"]
            outcomes.append((f"{name} of {changes}, again", RECOVERED if (got, left) == (want, [])
                             else f"left {left}, {got.keys() ^ want.keys()}"))
    show("exports", outcomes)


LOOP = """
.L_x_0:
        /*0010*/                   LDG.E R4, desc[UR4][R2.64] ;
        /*0020*/                   IADD3 R2, P1, R2, 0x4, RZ ;
        /*0030*/                   MUFU.EX2 R5, R4 ;
        /*0040*/                   MUFU.EX2 R6, R8.reuse ;
        /*0050*/                   FADD R7, R5, -R6 ;
        /*0060*/                   STS [R9+0x10], R7 ;
.L_x_1:
        /*0070*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P3, [UR11], R13 ;
        /*0080*/              @!P3 BRA `(.L_x_1) ;
        /*0090*/               @P1 BRA `(.L_x_0) ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA `(.L_x_0) ;
"""


def test_the_longest_chain_of_a_loop_is_found_in_its_assembly():
    body, = binaries.loops(*binaries.instructions(LOOP))        # the wait is no loop that loads
    assert [x.name.split(".")[0] for x in body] == ["LDG", "IADD3", "MUFU", "MUFU", "FADD", "STS",
                                                    "SYNCS", "BRA", "BRA"]
    # LDG starts at 1, its MUFU a load later, the other MUFU a clock later. FADD waits for that one,
    # STS for FADD. SYNCS starts a clock later, its branch waits for P3, and the last follows.
    waits = sum(binaries.latency(name) for name in ("MUFU", "FADD"))
    rest = 1 + binaries.latency("SYNCS") + 1
    assert binaries.chain_cycles(body) == 1 + binaries.latency("LDG") + 1 + waits + rest
    alone = [x for x in body if x.name != "LDG.E"]              # R4 is there from the start
    assert binaries.chain_cycles(alone) == 1 + 1 + 1 + waits + rest


@pytest.mark.parametrize("line, reads, writes", [
    ("@P0 IADD3 R70, P4, P5, R17, UR35, -R70", "P0 R17 UR35 R70", "R70 P4 P5"),
    ("ISETP.GE.AND P5, PT, R24, UR30, PT", "R24 UR30", "P5"),
    ("SHFL.UP PT, R27, R183, 0x1, RZ", "R183", "R27"),
    ("IMAD.WIDE.U32 R2, R9.reuse, 0x2, R4", "R9 R4 R5", "R2 R3"),
    ("STS.64 [R3+UR8], R8", "R3 UR8 R8 R9", ""),
    ("LDSM.16.MT88.4 R8, [R3]", "R3", "R8 R9 R10 R11"),
    ("HMMA.16816.F32.BF16 R4, R8, R12, RZ", "R8 R9 R10 R11 R12 R13", "R4 R5 R6 R7"),
    ("HGMMA.64x8x16.F32.BF16 R4, gdesc[UR4], R4", "UR4 UR5 R4 R5 R6 R7", "R4 R5 R6 R7 mma"),
    ("WARPGROUP.DEPBAR.LE gsb0, 0x0", "mma", "")])
def test_what_an_instruction_reads_and_writes(line, reads, writes):
    (x,), _ = binaries.instructions(f"        /*0010*/   {line} ;")
    assert binaries.reads_and_writes(x) == (reads.split(), writes.split())


def test_programs_on_a_multiprocessor_and_their_products():
    assert binaries.resident_programs(90, 8, 212, 20_480, 0) == 1       # 55,296 registers each
    assert binaries.resident_programs(90, 4, 228, 18_432, 0) == 2
    assert binaries.resident_programs(80, 4, 32, 82_000, 0) == 2        # 164 KB
    assert binaries.resident_programs(100, 4, 32, 1_024, 256) == 2
    lines = ["UMOV UR5, 0x4100490", "UTCHMMA gdesc[UR2], gdesc[UR4], tmem[UR6], tmem[UR8], "
             "idesc[UR5], UPT", "HMMA.16816.F32.BF16 R4, R8, R12, R4",
             "HGMMA.64x32x16.F32.BF16 R4, gdesc[UR4], R4", "FFMA R4, R5, R6, R7"]
    code = [binaries.instructions(f"        /*0010*/   {line} ;")[0] for line in lines]
    of_8_warps = [binaries.tensor_flop(body, 8) for body in (code[0] + code[1], *code[2:])]
    assert of_8_warps == [2 * 64 * 64 * 16, 8 * 2 * 16 * 8 * 16, 2 * 2 * 64 * 32 * 16, 0]
    assert binaries.fp32_flop(code[4], 8) == 2 * 32 * 8


def test_two_studies_at_once_on_a_fresh_clone_end_with_one_table(tmp_path, monkeypatch, small_tiny):
    monkeypatch.chdir(tmp_path)
    some_documents(tmp_path / "texts")
    cells = {"od": "--objective od", "hs": "--objective hs"}
    command = ["--seeds", "0", "--preset", "tiny", "--data", "texts", "--context", "32", "--batch",
               "64", "--eval_tokens", "256", "--teacher_tokens", "4096", "--tokens", "128", "128"]

    def study():
        grid.run_study("objectives", cells, "--n_layer 1", "", command)

    printed = [tmp_path / f"{n}.txt" for n in (1, 2)]
    children = [in_a_copy(lambda: prepare.run_program(study), path) for path in printed]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert codes == [0, 0], [path.read_text()[-300:] for path in printed]
    table = Path("results/study-objectives.md").read_text()
    assert "| od |" in table and "| hs |" in table
    assert sum(path.read_text().count("stage 3 | saved") for path in printed) == 2
