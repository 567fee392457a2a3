"""Other losses for stage 2, and students of fewer layers than their teacher: the study of [1].

Run:  python distill.py --n_layer 2 --objective hs layer_map=uniform_last
      python distill.py --n_layer 2 --objective mha relation_heads=12 relation_layer=2
      python -m extras.objectives                     # the study, three seeds
      python -m extras.objectives --seeds 0 --tokens 0.05e6 0.1e6

A student of n layers starts as a copy of evenly spaced layers of its teacher. One of these losses
takes stage 2's place:

    od       output distribution: stage 3's loss, from the start
    hs       hidden states: run on the tokens, each layer outputs what its teacher layers output
    mha      self-attention relations: in the last layer, q q^T, k k^T, v v^T are the teacher's
    matrix   stage 1's mixing matrices
    next     the next token, with no teacher: the control (with --init scratch, nothing is copied)

Two controls are commands of their own, with the tokens of all three stages:

    python distill.py --preset tiny --stage 3 --tokens 1.2e6 --lr 2.8e-3 --out out/alone
    python distill.py --preset tiny --stage 2 --objective next --init scratch --tokens 1.2e6 ...

This file is also an example of how to add a loss: write a generator of (loss, relative) and give it
a row in OBJECTIVES. Freeze what the loss does not reach, or DDP waits for its gradient.

[1] How to distill your Transformer, arXiv 2310.08797    [2] MiniLMv2, arXiv 2012.15828
"""
import functools
import inspect
import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from model_ssm import UsageError
from ssd_kernel import per_head

RELATIONS_AT_ONCE = 256     # rows of an (L, L) map in memory at once, in `relations`


# -----------------------------------------------------------------------------
# fewer layers

def teacher_layers(n, depth):
    """The layers of a `depth`-layer teacher that a student of n layers learns from, evenly spaced.

    >>> teacher_layers(2, 4), teacher_layers(3, 3)
    ([1, 3], [0, 1, 2])
    """
    if not 0 < n <= depth:
        raise UsageError(f"--n_layer {n}: the teacher has {depth} layers, so from 1 to {depth}")
    return [(i + 1) * depth // n - 1 for i in range(n)]


class Shallow:
    """A teacher restricted to the layers that a shallower student learns from.

    Layer i here is layer self.sources[i] of `deep`. Everything else is forwarded to it.
    """

    def __init__(self, deep, n_layer):
        self.deep = deep
        self.sources = teacher_layers(n_layer, len(deep.layers))
        self.layers = [deep.layers[i] for i in self.sources]
        window_layers = tuple(i for i, source in enumerate(self.sources)
                              if source in deep.shapes["window_layers"])
        self.shapes = deep.shapes | {"n_layer": n_layer, "window_layers": window_layers}

    def __getattr__(self, name):
        return getattr(self.deep, name)

    def weights(self):
        """The weights of the chosen layers, under their numbers here, and those outside layers"""
        chosen = {}
        for name, w in self.deep.weights().items():
            parts = name.split(".")                     # backbone.layers.3.mixer...
            if parts[1] == "layers":
                if int(parts[2]) not in self.sources:
                    continue
                parts[2] = str(self.sources.index(int(parts[2])))
            chosen[".".join(parts)] = w
        return chosen

    def inputs(self, tokens, only=None):
        only = range(len(self.layers)) if only is None else only
        for i, u in self.deep.inputs(tokens, [self.sources[n] for n in only]):
            yield self.sources.index(i), u

    def outputs(self, tokens):
        outputs = self.deep.outputs(tokens)
        return [outputs[i] for i in self.sources]

    def block(self, i, u):
        return self.deep.block(self.sources[i], u)

    def factors(self, i, u):
        return self.deep.factors(self.sources[i], u)

    def matrix(self, i, u):
        return self.deep.matrix(self.sources[i], u)


# -----------------------------------------------------------------------------
# hs: hidden states

def last(S, T):
    """The last layer learns from the last. A map pairs S student layers with T teacher layers."""
    return [(S - 1, T - 1)]


def uniform(S, T):
    """Each layer learns from one, evenly spaced."""
    return list(enumerate(teacher_layers(S, T)))


def uniform_consecutive(S, T):
    """Layer i learns from k = ceil(T / S) consecutive layers; neighbours share one.

    Where they reach the teacher's end early, the remaining layers learn from its last.

    >>> uniform_consecutive(2, 4)
    [(0, 0), (0, 1), (1, 1), (1, 2), (1, 3)]
    """
    k = math.ceil(T / S)
    pairs = []
    for i in range(S):
        first = max(0, min(k * i, T) - 1)
        end = min(k * (i + 1), T)
        pairs += [(i, t) for t in range(first, end)]
    return pairs


def uniform_last(S, T):
    """As uniform, and layer i also learns from layer i of the teacher's last S."""
    return uniform(S, T) + [(i, T - S + i) for i in range(S)]


LAYER_MAPS = {f.__name__: f for f in (last, uniform, uniform_consecutive, uniform_last)}


def hidden_states(student, teacher, tokens, layer_map="uniform"):
    """hidden states: from the tokens on, each layer gives what its layers of the teacher give"""
    outputs = student.outputs(tokens)                                   # S times (B, L, D)
    outputs_t = all_outputs(teacher, tokens)                            # T times (B, L, D)
    pairs = LAYER_MAPS[layer_map](len(outputs), len(outputs_t))
    distance = sum((outputs[i] - outputs_t[t]).float().square().mean() for i, t in pairs)
    size = sum(outputs_t[t].float().square().mean() for _, t in pairs)
    distance = distance / len(pairs)
    yield distance, distance.detach() / (size / len(pairs))


def check_layer_map(config, hf, layer_map="uniform"):
    """UsageError for an unknown layer_map"""
    if layer_map not in LAYER_MAPS:
        raise UsageError(f"layer_map={layer_map}: choose among {', '.join(LAYER_MAPS)}")


def all_outputs(teacher, tokens):
    """The outputs of all of the teacher's layers, also of those that a shallower student skips"""
    return getattr(teacher, "deep", teacher).outputs(tokens)


# -----------------------------------------------------------------------------
# mha: self-attention relations

def relations(student, teacher, tokens, relation_layer=None, relation_heads=None):
    """self-attention relations: in the last layer q, and k, and v, relate as the teacher's do"""
    layer = relation_layer_of(len(teacher.decoder.layers), relation_layer)
    qkv = student.call(student_heads, tokens)
    qkv_t = teacher_heads(teacher, layer, tokens)
    total = 0
    uniform_total = 0
    for x, x_t in zip(qkv, qkv_t, strict=True):
        A = int(relation_heads or x_t.shape[-1] // 16)
        for start in range(1, tokens.shape[1], RELATIONS_AT_ONCE):      # row 0 sees only itself
            kl, kl_uniform = checkpoint(relation_sums, x, x_t, A, start, use_reentrant=False)
            total = total + kl / A
            uniform_total = uniform_total + kl_uniform / A
    rows = 3 * len(tokens) * (tokens.shape[1] - 1)
    yield total / rows, total.detach() / uniform_total


def relation_layer_of(n_layer, relation_layer):
    """The layer of an n_layer-layer teacher to learn from: the last but one, if none is given"""
    return max(0, n_layer - 2) if relation_layer is None else int(relation_layer)


def check_relations(config, hf, relation_layer=None, relation_heads=None):
    """UsageError for a student or options that `relations` cannot take"""
    if config.n_layer - 1 in config.attn_layers:
        raise UsageError("--objective mha needs the last layer's mixer, which keeps attention here")
    try:
        layer = relation_layer_of(hf.num_hidden_layers, relation_layer)
        heads = int(relation_heads or config.d_inner // 16)
    except ValueError as error:
        raise UsageError(f"--objective mha: {error}") from error
    if not 0 <= layer < hf.num_hidden_layers:
        raise UsageError(f"relation_layer={layer}: the teacher has layers 0 to "
                         f"{hf.num_hidden_layers - 1}")
    if heads < 1 or config.d_inner % heads or config.n_qk_head * config.d_state % heads:
        raise UsageError(f"relation_heads={heads} does not divide the {config.d_inner} channels "
                         "of teacher and student")


def relation_sums(x, x_t, heads, start):
    """x, x_t (B, L, C) -> KL(R_t || R) and KL(R_t || uniform), summed over rows from `start` on

    C is split into A = `heads` parts. In each, R = softmax(x x^T / sqrt(C / A)), causal, is the
    relation of every position with those before it, and R_t the same of x_t [2].
    """
    rows = slice(start, start + RELATIONS_AT_ONCE)
    position = torch.arange(x_t.shape[1], device=x.device)
    future = position > position[rows, None]                                # (rows, L)
    log_R = []
    with torch.autocast(x.device.type, enabled=False):      # logs in bf16 are off by percents
        for y in (x, x_t):
            y = y.float().unflatten(-1, (heads, -1)).transpose(1, 2)        # (B, A, L, C / A)
            scores = y[:, :, rows] @ y.mT / y.shape[-1] ** 0.5              # (B, A, rows, L)
            log_R.append(scores.masked_fill(future, -torch.inf).log_softmax(-1))
    p = log_R[1].exp()
    # In the future p is 0 and its log is not finite: 0 log 0 = 0.
    log_q, log_p = (log.masked_fill(future, 0) for log in log_R)
    log_uniform = -(~future).sum(-1, keepdim=True).log()                    # (rows, 1)
    return (p * (log_p - log_q)).sum(), (p * (log_p - log_uniform)).sum()


def student_heads(student, tokens):
    """tokens (B, L) -> q, k, v in the last layer's mixer: 3 times (B, L, .)"""
    u = student.backbone["embedding"](tokens)                               # (B, L, D)
    for layer in student.layers[:-1]:
        u = student.run_layer(layer, u)[0]
    return student.layers[-1].call(layer_heads, u)


def layer_heads(layer, u):
    """u (B, L, D) -> q, k, v of the layer's mixer, with all heads side by side"""
    q, k, v = layer.mixer.project(layer.input_layernorm(u))[:3]
    # The student's q includes attention's factor 1 / sqrt(N); the teacher's does not.
    return [x.flatten(2) for x in (q * q.shape[-1] ** 0.5, k, v)]


@torch.no_grad()
def teacher_heads(teacher, i, tokens):
    """tokens (B, L) -> q, k, v of layer i before the rotary embedding: 3 times (B, L, H P)

    A k/v head that serves several query heads is repeated for each.
    """
    deep = getattr(teacher, "deep", teacher)
    (_, u), = deep.inputs(tokens, only=[i])
    attention = deep.layers[i].self_attn
    h = deep.layers[i].input_layernorm(u.to(deep.dtype))                    # (B, L, D)
    q, k, v = (projection(h).unflatten(-1, (-1, attention.head_dim))        # (B, L, H or G, P)
               for projection in (attention.q_proj, attention.k_proj, attention.v_proj))
    return [per_head(x, q.shape[2]).flatten(2) for x in (q, k, v)]


# -----------------------------------------------------------------------------
# next: no teacher

def next_token(student, teacher, tokens):
    """no distillation: given the tokens, the student predicts the next; the teacher is unused"""
    logits = student.logits(tokens[:, :-1]).float().flatten(0, 1)           # (B (L - 1), V)
    loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
    yield loss, loss.detach() / math.log(logits.shape[-1])


# -----------------------------------------------------------------------------
# the table, and the study

OBJECTIVES = {  # rows as in distill.STAGES: loss, trained, frozen, in_proj's unreached parts
    "hs": (hidden_states, ("embedding", "layers")),
    "mha": (relations, ("embedding", "layers"),
            ("layers.LAST.mlp", "layers.LAST.post", "layers.LAST.mixer.out_proj",
             "layers.LAST.mixer.D", "layers.LAST.mixer.z_bias", "layers.LAST.mixer.in_proj_gate"),
            ("z", "a"), "last"),
    "next": (next_token, ("",)),
}
CHECKS = {"hs": check_layer_map, "mha": check_relations}    # before anything is computed


def objective_stage(words, stages):
    """["hs", "layer_map=uniform", ...], distill.STAGES -> the Stage that takes stage 2's place"""
    name, *options = words
    known = ("od", "matrix", *OBJECTIVES)
    if name not in known:
        raise UsageError(f"--objective {name}: choose among {', '.join(known)}")
    stage = {"od": stages[3], "matrix": stages[1]}.get(name)
    if stage is None:
        stage = type(stages[1])(*OBJECTIVES[name])._replace(check=CHECKS.get(name))
    if not options:
        return stage
    keys = list(inspect.signature(stage.loss_fn).parameters)[3:] if name in OBJECTIVES else []
    values = dict(option.partition("=")[::2] for option in options)
    if wrong := sorted(set(values) - set(keys)):
        raise UsageError(f"--objective {name} {wrong[0]}: it takes "
                         + (", ".join(f"{key}=..." for key in keys) or "no options"))
    return stage._replace(loss_fn=functools.partial(stage.loss_fn, **values),
                          check=functools.partial(stage.check, **values))


STUDY = {   # each cell at the best of the learning rates tried for it: results/study-rates.md
    "od": "--stage 3 --tokens 0.5e6 --lr 2.8e-3",
    "hs last": "--objective hs layer_map=last --lr 4e-3 2.8e-3",
    "hs uniform": "--objective hs layer_map=uniform --lr 4e-3 2.8e-3",
    "hs uniform_consecutive": "--objective hs layer_map=uniform_consecutive --lr 4e-3 2.8e-3",
    "hs uniform_last": "--objective hs layer_map=uniform_last --lr 4e-3 2.8e-3",
    "mha": "--objective mha --lr 2e-3 2.8e-3",
    "matrix": "--objective matrix --lr 8e-3 2.8e-3",
}
COMMON = "--preset tiny --eval_tokens 32768 --n_layer 2 --init qkv --tokens 0.15e6 0.35e6"

if __name__ == "__main__":
    from extras.grid import main
    main("objectives", STUDY, COMMON, __doc__)
