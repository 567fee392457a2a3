"""What a run would cost: FLOPs, hours and memory of each stage, with no GPU, weights or data.

Run:  python -m extras.cost --preset tiny                    # on this machine
      python -m extras.cost --preset phi --gpu H100          # the paper's run
      python -m extras.cost --preset phi --gpu H100 --world 8 --fsdp
      python -m extras.cost --preset tiny --bench            # time each stage, here and now

All flags of distill.py are taken. A step is run on torch's fake tensors, which have shapes and no
contents, so what is counted is what distill.py does, at any size. All layers of a kind cost the
same, so models of two and of three layers say what a deep one takes.

--bench times the parts of a micro-batch with a random teacher of the same architecture:

    teacher      its forward alone
    student      what the student's forward adds
    backward     what the backward adds
    optimizer    one update; `step` is a whole batch

It leaves out: what other processes hold, and communication between GPUs.
"""
import collections
import contextlib
import copy
import dataclasses
import math
import os
import time
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import distill
from distill import GPUS, peak_of
from eval import choose_device
from model_ssm import SSM, UsageError
from model_teacher import Teacher, hf_config
from prepare import Parser, at_least_one, fraction, run_program

SHARDED = ("weights", "gradients", "optimizer", "teacher")      # by FSDP2
CUDA_ITSELF = 1e9           # its context, libraries' workspaces, and what the allocator loses


# -----------------------------------------------------------------------------
# counting

class Meter(TorchDispatchMode):
    """Counts what happens within: FLOPs by when they are spent, bytes held now and at most.

    flops: "forward", "backward", and "again": what checkpoints compute a second time
    A causal attention counts half of its matrix.
    """

    def __init__(self, vocab_size, frozen):
        super().__init__()
        self.flops, self.in_backward = collections.Counter(), False
        self.vocab_size = vocab_size
        self.sizes = {}                                 # of the storages that are alive
        self.now, self.peak = [0, 0], [0, 0]            # bytes: all, and maps of logits
        self.frozen = {p.untyped_storage()._cdata for p in frozen}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        if flops := flops_of(function, args, kwargs or {}, tensors, output):
            self.flops[self.when(tensors)] += flops
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor):
                self.hold(x)
        return output

    def when(self, tensors):
        """Within a backward, the teacher's weights among the inputs, or gradients being recorded,
        mean that a checkpoint computes its forward again."""
        if not self.in_backward:
            return "forward"
        teacher = any(x.untyped_storage()._cdata in self.frozen for x in tensors)
        return "again" if teacher or torch.is_grad_enabled() else "backward"

    def hold(self, x):
        storage = x.untyped_storage()
        if storage._cdata in self.sizes:
            return
        n = storage.nbytes()
        logits = n if x.dim() == 2 and x.shape[-1] == self.vocab_size else 0
        self.sizes[storage._cdata] = n, logits
        weakref.finalize(storage, self.drop, storage._cdata)
        self.now = [self.now[0] + n, self.now[1] + logits]
        self.peak = max(self.peak, self.now)

    def drop(self, key):
        n, logits = self.sizes.pop(key)
        self.now = [self.now[0] - n, self.now[1] - logits]


def flops_of(function, args, kwargs, tensors, output):
    """Of one operator, torch's own count but for three: 0 for what is no matrix product"""
    operator = function._overloadpacket
    if operator == torch.ops.aten.convolution_backward:     # torch's formula ignores groups
        return 4 * tensors[0].numel() * tensors[2][0].numel()
    if "scaled_dot_product" in str(operator):               # torch's formula ignores causality
        backward = "backward" in str(operator)              # there dy comes before q and k
        B, H, L, N = tensors[backward].shape
        T = tensors[1 + backward].shape[2]
        return 2 * B * H * L * T * N * (2.5 if backward else 1)
    if operator == torch.ops.mohawk.orientation:            # 4 products of half a matrix
        B, L, H, N = tensors[2].shape
        return B * H * L * L * (tensors[0].shape[-1] + 3 * N)
    if operator in flop_registry:
        return flop_registry[operator](*args, **kwargs, out_val=output)
    return 0


def fake_step(stage, config, hf, budget, args, gpu, bf16):
    """One micro-batch of a student `config` and a teacher `hf` -> FLOPs a token, bytes by part"""
    with FakeTensorMode():
        teacher = Teacher.random(hf, dtype=torch.bfloat16 if gpu else torch.float32)
        teacher = teacher.at(config.n_layer)
        student = SSM(config)
        student.recompute = args.recompute
        params = distill.choose_trainable(student, stage)
        for p in params.values():
            p.grad = torch.zeros_like(p)            # as it is after the first micro-batch
        tokens = torch.zeros(budget.micro_batch, args.context, dtype=torch.long)
        frozen, weights = list(teacher.model.parameters()), list(student.parameters())
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and stage.autocast)
        with Meter(config.vocab_size, frozen) as teacher_meter, autocast:
            teacher_forward(stage, student, teacher, tokens)
        teacher.last_run = None
        with Meter(config.vocab_size, frozen) as meter, autocast:
            for p in (*frozen, *weights, *(p.grad for p in params.values())):
                meter.hold(p)
            for loss, _ in stage.loss_fn(student, teacher, tokens):
                meter.in_backward = True
                loss.backward()
                meter.in_backward = False
        costs = bytes_by_part(meter, params.values(), weights, frozen, args.optimizer)
    n, alone = tokens.numel(), teacher_meter.flops["forward"]
    return costs | {"teacher": alone / n, "student": (meter.flops["forward"] - alone) / n,
                    "backward": meter.flops["backward"] / n, "again": meter.flops["again"] / n}


def bytes_by_part(meter, params, weights, frozen, optimizer):
    sizes = {}
    for part, tensors in {"weights": weights, "gradients": params, "teacher": frozen}.items():
        sizes[part] = sum(p.numel() * p.element_size() for p in tensors)
    peak, logits = meter.peak
    sizes |= {"activations": peak - sum(sizes.values()) - logits, "logits": logits,
              "optimizer": sum(bytes_of_moments(p, optimizer) for p in params)}
    return {f"{part} bytes": n for part, n in sizes.items()} | {
        "trained": sum(p.numel() for p in params), "all": sum(p.numel() for p in weights)}


def bytes_of_moments(p, optimizer):
    """Bytes of AdamW's two moments. Large ones may have 8 bits, and a scale for every 256."""
    eight = optimizer == "adamw8bit" and p.numel() >= 4096 and p.numel() % 256 == 0
    return p.numel() * 2 * (1 + 4 / 256) if eight else p.numel() * 8


def cost(stage, config, hf, budget, args, gpu, bf16):
    """fake_step's answer for the whole model, from models of two and of three layers.

    "gathered bytes": what FSDP2 holds beside its shards
    """
    if args.objective or config.n_layer < hf.num_hidden_layers:     # small ones, as they are
        return fake_step(stage, config, hf, budget, args, gpu, bf16) | {"gathered bytes": 0}

    def measured(n, *attn_layers):
        small = copy.deepcopy(hf)
        small.num_hidden_layers = n
        if getattr(hf, "layer_types", None):
            small.layer_types = hf.layer_types[:1] * n
        shapes = dataclasses.replace(config, n_layer=n, attn_layers=attn_layers)
        return fake_step(stage, shapes, small, budget, args, gpu, bf16)

    attention, ssms = len(config.attn_layers), config.n_layer - len(config.attn_layers)
    two, three = measured(2), measured(3)
    mixed = measured(3, 1) if attention else two
    costs = {}
    for key, base in two.items():
        costs[key] = base + (ssms - 2) * (three[key] - base) + attention * (mixed[key] - base)
    gathered = sum(two[f"{part} bytes"] for part in ("weights", "gradients", "teacher"))
    return costs | {"gathered bytes": gathered}


def useful(costs):
    """FLOPs for one token that mfu counts: all but what is computed a second time"""
    return costs["teacher"] + costs["student"] + costs["backward"]


# -----------------------------------------------------------------------------
# the estimate

def estimate(args):
    """A paragraph for each stage: steps, parameters, FLOPs, hours, memory"""
    hf, config = hf_config(args.teacher), distill.student_config(args)
    device, bf16, _ = choose_device(args.device, args.fp32)
    if args.gpu:
        device, bf16 = "cuda", True
    room = torch.cuda.mem_get_info()[1] if device == "cuda" and not args.gpu else math.inf
    peak, room = GPUS.get(args.gpu) or (peak_of(device, bf16)[0], room)
    print(f"{args.teacher} on {args.world} x {args.gpu or device}, {peak / 1e12:.4g} TFLOP/s "
          f"each, of which {args.mfu:.0%} (--mfu; --bench measures it)")
    hours = 0
    for number, budget in args.budgets.items():
        stage = distill.stage_table(args)[number]
        costs = cost(stage, config, hf, budget, args, device == "cuda", bf16)
        tokens = budget.tokens // budget.batch * budget.batch
        spent = useful(costs) * tokens / (peak * args.mfu * args.world) / 3600
        hours += spent
        accumulate = budget.batch // args.context // (budget.micro_batch * args.world)
        print(f"\nstage {number} | {tokens:,} tokens = {tokens // budget.batch:,} steps x "
              f"{budget.batch:,} (batch {budget.micro_batch} x length {args.context} x accumulate "
              f"{accumulate} x {args.world} GPUs)\n"
              f"stage {number} | {costs['trained']:,} parameters are trained, "
              f"{costs['all'] - costs['trained']:,} are frozen\n"
              f"stage {number} | GFLOP a token: teacher {costs['teacher'] / 1e9:.3g}, student "
              f"{costs['student'] / 1e9:.3g}, backward {costs['backward'] / 1e9:.3g}, computed "
              f"again {costs['again'] / 1e9:.3g} | {spent:.3g} hours\n"
              f"stage {number} | {memory_line(costs, args, device, room)}")
    print(f"\n{hours:.3g} hours in all. To take less memory: --micro_batch, --recompute, "
          "--optimizer adamw8bit, --fsdp")


def memory_line(costs, args, device, room):
    shards, memory = args.world if args.fsdp else 1, {}
    for part in (*SHARDED, "activations", "logits"):
        memory[part] = costs[f"{part} bytes"] / (shards if part in SHARDED else 1) / 1e9
    if args.fsdp:
        memory["gathered"] = costs["gathered bytes"] / 1e9
    if device == "cuda":
        memory["CUDA"] = CUDA_ITSELF / 1e9
    total, verdict = sum(memory.values()), ""
    if room < math.inf:
        fits = "fits" if total < room / 1e9 else "does not fit"
        verdict = f" of {room / 1e9:.1f}, which {fits}"
    parts = ", ".join(f"{part} {n:.2f}" for part, n in memory.items())
    return f"GB: {parts} = {total:.2f}{verdict}"


# -----------------------------------------------------------------------------
# the measurement

def bench(args):
    """Each stage timed on random tokens, with a random teacher of this architecture"""
    run, hf = distill.Run(args), hf_config(args.teacher)
    teacher = Teacher.random(hf, run.device, run.dtype).at(args.n_layer)
    distill.compile_and_shard(teacher, distill.shard_teacher, args)
    names = ("teacher", "student", "backward", "optimizer", "step", "tok/s", "mfu", "GB", "planned")
    print("\n| stage " + "".join(f"| {name:>9} " for name in names) + "|\n|-------"
          + "|-----------" * len(names) + "|")
    for number, budget in args.budgets.items():
        stage = distill.stage_table(args)[number]
        cells = bench_stage(run, teacher, hf, stage, budget)
        print(f"| {number:5} | " + " | ".join(cells) + " |")
    print("\nms for a micro-batch, mean of 20; in `step` for a whole batch")


def bench_stage(run, teacher, hf, stage, budget):
    """-> the cells of its row"""
    args = run.args
    tokens = torch.randint(hf.vocab_size, (budget.micro_batch, args.context), device=run.device)
    student = distill.init_student(args, teacher, tokens).to(run.device)
    student.recompute = args.recompute
    distill.compile_and_shard(student, distill.shard_student, args)
    params = distill.choose_trainable(student, stage)
    optimizer = distill.make_optimizer(params, args)
    compute_losses, _ = distill.wrap_ddp(stage.loss_fn, student, teacher, run)
    if run.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    def teacher_alone():
        with run.autocast(stage):
            teacher_forward(stage, student, teacher, tokens)

    def losses(backward=False):
        with run.autocast(stage):
            for loss, _ in compute_losses(tokens):
                if backward:
                    loss.backward()

    forward = milliseconds(teacher_alone, run.device)
    student_too = milliseconds(losses, run.device)
    all_of_it = milliseconds(lambda: losses(backward=True), run.device)
    update = milliseconds(optimizer.step, run.device)
    step = budget.batch // (tokens.numel() * run.world) * all_of_it + update
    costs = cost(stage, student.config, hf, budget, args, run.device == "cuda", run.bf16)
    mfu = useful(costs) * budget.batch / (step / 1e3 * run.peak * run.world)
    planned = sum(costs[f"{part} bytes"] for part in (*SHARDED, "activations", "logits"))
    ms = (forward, student_too - forward, all_of_it - student_too, update, step)
    return [*(f"{x:9.1f}" for x in ms), f"{1e3 * budget.batch / step:9,.0f}", f"{mfu:9.1%}",
            f"{run.memory() / 1e9:9.2f}", f"{planned / 1e9:9.2f}"]


@torch.no_grad()
def teacher_forward(stage, student, teacher, tokens):
    """What a stage needs of the teacher, by itself"""
    loss_fn = getattr(stage.loss_fn, "func", stage.loss_fn)
    if loss_fn is distill.knowledge_distillation:
        h = teacher.hidden(tokens).flatten(0, 1)
        for part in h.split(max(1, distill.LOGITS_AT_ONCE // student.config.vocab_size)):
            teacher.head(part)
    else:
        for i, u in teacher.inputs(tokens, only=student.ssm_layers):
            teacher.block(i, u)


def milliseconds(work, device, n=20):
    """The mean of n calls, after one that warms up"""
    wait = torch.cuda.synchronize if device == "cuda" else contextlib.nullcontext
    work()
    wait()
    start = time.perf_counter()
    for _ in range(n):
        work()
    wait()
    return 1e3 * (time.perf_counter() - start) / n


def parse(arguments=None):
    parser = Parser(__doc__)
    distill.add_method_flags(parser.add_argument)
    distill.add_run_flags(parser.add_argument)
    add = parser.add_argument
    add("--gpu", choices=GPUS, help="the GPU to count for [this machine]")
    add("--world", type=at_least_one, default=int(os.environ.get("WORLD_SIZE", 1)),
        help="how many of them [1]")
    add("--mfu", type=fraction, default=0.4, help="share of their peak to count with [%(default)s]")
    add("--bench", action="store_true", help="time the stages on random tokens instead")
    args = parser.parse_args(arguments)
    if args.mfu == 0:
        raise UsageError("--mfu 0 would take forever: give more")
    args.data = args.data or "stdlib"                   # none is read
    world = int(os.environ.get("WORLD_SIZE", 1)) if args.bench else args.world
    return distill.resolve(args, world)


def main(arguments=None):
    args = parse(arguments)
    if args.bench:
        bench(args)
    else:
        estimate(args)


if __name__ == "__main__":
    run_program(main)
