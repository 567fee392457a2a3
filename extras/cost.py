"""What a run would cost: FLOPs, hours and memory of each stage, with no GPU, weights or data.

Run:  python -m extras.cost --preset tiny                    # on this machine
      python -m extras.cost --preset phi --gpu H100          # the paper's run
      python -m extras.cost --preset phi --gpu H100 --world 8 --fsdp
      python -m extras.cost --preset tiny --bench            # time each stage, here and now

It takes all flags of distill.py. A step runs on torch's fake tensors, which have shapes and no
contents, so this counts what distill.py really does, at any size. All layers of a kind cost the
same, so the difference between a model of two layers and one of three is the cost of a layer.

--bench times the parts of a micro-batch with a random teacher of the same architecture:

    teacher      the teacher's forward by itself
    student      what the student's forward adds
    backward     what the backward adds
    optimizer    one update
    step         a batch of all its micro-batches, and the update

It leaves out: memory of other processes, and communication between GPUs.
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
from ssd_kernel import LOGITS_AT_ONCE, blocks

SHARDED = ("weights", "gradients", "optimizer", "teacher")      # FSDP2 splits these over the GPUs
NOT_SHARDED = ("activations", "logits")
CUDA_OVERHEAD = 1e9         # bytes: context, workspaces of libraries, fragments of the allocator


# -----------------------------------------------------------------------------
# counting

class Meter(TorchDispatchMode):
    """Counts FLOPs and live bytes of every operator that runs inside this context.

    flops: by phase: "forward", "backward", "again" (what checkpoints compute a second time)
    bytes, peak: (all, logits): bytes alive now, and at the moment when most were alive
    """

    def __init__(self, vocab_size, frozen):
        super().__init__()
        self.vocab_size = vocab_size
        self.frozen = {p.untyped_storage()._cdata for p in frozen}
        self.in_backward = False                    # set by the caller, around loss.backward()
        self.flops = collections.Counter()
        self.alive = {}                             # storage -> its bytes: all, logits
        self.bytes = (0, 0)
        self.peak = (0, 0)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor)]
        flops = flops_of(function, args, kwargs or {}, tensors, output)
        if flops:
            self.flops[self.phase(tensors)] += flops
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor):
                self.add(x)
        return output

    def phase(self, tensors):
        """A forward that runs within a backward is a checkpoint's. There are two signs of it: the
        teacher's weights among the inputs (they have no backward), or gradients being recorded."""
        if not self.in_backward:
            return "forward"
        teacher = any(x.untyped_storage()._cdata in self.frozen for x in tensors)
        return "again" if teacher or torch.is_grad_enabled() else "backward"

    def add(self, x):
        """Count the storage of x, once for all its views, until it is freed"""
        storage = x.untyped_storage()
        if storage._cdata in self.alive:
            return
        n = storage.nbytes()
        logits = n if x.dim() == 2 and x.shape[-1] == self.vocab_size else 0
        self.alive[storage._cdata] = n, logits
        weakref.finalize(storage, self.remove, storage._cdata)
        self.bytes = self.bytes[0] + n, self.bytes[1] + logits
        self.peak = max(self.peak, self.bytes)

    def remove(self, key):
        n, logits = self.alive.pop(key)
        self.bytes = self.bytes[0] - n, self.bytes[1] - logits


def flops_of(function, args, kwargs, tensors, output):
    """FLOPs of one operator: torch's own count, but for three cases; 0 where none are counted"""
    operator = function._overloadpacket
    if operator == torch.ops.aten.convolution_backward:     # torch's formula ignores groups
        return 4 * tensors[0].numel() * tensors[2][0].numel()
    if "scaled_dot_product" in str(operator):               # torch's formula ignores causality
        backward = "backward" in str(operator)              # its first argument is dy, then q, k
        B, H, L, N = tensors[backward].shape
        T = tensors[1 + backward].shape[2]
        # 2 products of (L, T, N), in the backward 5: half of each lies above the diagonal.
        return 2 * B * H * L * T * N * (2.5 if backward else 1)
    if operator == torch.ops.mohawk.orientation:            # 4 products, each of half a matrix
        B, L, H, N = tensors[2].shape
        return B * H * L * L * (tensors[0].shape[-1] + 3 * N)
    if operator == torch.ops.aten.baddbmm_:                 # torch has no formula for it in place
        operator = torch.ops.aten.baddbmm
    if operator in flop_registry:
        return flop_registry[operator](*args, **kwargs, out_val=output)
    return 0


def fake_step(stage, config, hf, budget, args, bf16):
    """One micro-batch of a student `config` and a teacher `hf` on fake tensors

    -> {"teacher", "student", "backward", "again": FLOPs for one token,
        "<part> bytes": memory of each part, "trained", "all": numbers of parameters}

    The losses of stages 1 and 3 make their gradients in the forward: they count as the student's.
    """
    with FakeTensorMode():
        teacher = Teacher.random(hf, dtype=torch.bfloat16 if bf16 else torch.float32)
        teacher = teacher.at(config.n_layer)
        student = SSM(config)
        student.recompute = args.recompute
        params = distill.choose_trainable(student, stage)
        for p in params.values():
            p.grad = torch.zeros_like(p)            # as it is after the first micro-batch
        tokens = torch.zeros(budget.micro_batch, args.context, dtype=torch.long)        # (B, L)
        frozen = list(teacher.model.parameters())
        weights = list(student.parameters())
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16 and stage.autocast)
        with Meter(config.vocab_size, frozen) as teacher_meter, autocast:
            teacher_forward(stage, student, teacher, tokens)
        teacher.last_run = None                     # or the next run would reuse its results
        with Meter(config.vocab_size, frozen) as meter, autocast:
            for p in (*frozen, *weights, *(p.grad for p in params.values())):
                meter.add(p)
            for loss, _ in stage.loss_fn(student, teacher, tokens):
                meter.in_backward = True
                loss.backward()
                meter.in_backward = False
        costs = bytes_by_part(meter, params.values(), weights, frozen, args.optimizer)
    n = tokens.numel()
    teacher_flops = teacher_meter.flops["forward"]
    return costs | {"teacher": teacher_flops / n,
                    "student": (meter.flops["forward"] - teacher_flops) / n,
                    "backward": meter.flops["backward"] / n, "again": meter.flops["again"] / n}


def bytes_by_part(meter, params, weights, frozen, optimizer):
    """Split the peak: what is no weight, gradient or logits is an activation. The optimizer's
    moments are not part of the peak, since fake_step makes none."""
    peak, logits = meter.peak
    sizes = {}
    for part, tensors in {"weights": weights, "gradients": params, "teacher": frozen}.items():
        sizes[f"{part} bytes"] = sum(p.numel() * p.element_size() for p in tensors)
    activations = peak - sum(sizes.values()) - logits
    return sizes | {"activations bytes": activations, "logits bytes": logits,
                    "optimizer bytes": sum(bytes_of_moments(p, optimizer) for p in params),
                    "trained": sum(p.numel() for p in params),
                    "all": sum(p.numel() for p in weights)}


def bytes_of_moments(p, optimizer):
    """Bytes of AdamW's two moments for a parameter p"""
    # torchao quantises only large ones to 8 bits, with a scale in fp32 for every 256 numbers.
    if optimizer == "adamw8bit" and p.numel() >= 4096 and p.numel() % 256 == 0:
        return p.numel() * 2 * (1 + 4 / 256)
    return p.numel() * 2 * 4


def cost(stage, config, hf, budget, args, bf16):
    """What fake_step would return for all layers, from models of two and of three layers

    "gathered bytes": what FSDP2 holds beside its shards, while it computes with a layer
    """
    if args.objective or config.n_layer < hf.num_hidden_layers:
        # Layers of student and teacher are paired: fewer layers would be other pairs.
        return fake_step(stage, config, hf, budget, args, bf16) | {"gathered bytes": 0}

    def cost_of(n, *attn_layers):
        small = copy.deepcopy(hf)
        small.num_hidden_layers = n
        if getattr(hf, "layer_types", None):
            small.layer_types = hf.layer_types[:1] * n
        shapes = dataclasses.replace(config, n_layer=n, attn_layers=attn_layers)
        return fake_step(stage, shapes, small, budget, args, bf16)

    attention = len(config.attn_layers)
    ssms = config.n_layer - attention
    two = cost_of(2)
    three = cost_of(3)
    mixed = cost_of(3, 1) if attention else two     # two SSM layers, and one of attention
    costs = {}
    for key, base in two.items():
        per_ssm = three[key] - base
        per_attention = mixed[key] - base
        costs[key] = base + (ssms - 2) * per_ssm + attention * per_attention
    # FSDP2 gathers the layer that computes and the next one: about a model of two layers.
    gathered = sum(two[f"{part} bytes"] for part in ("weights", "gradients", "teacher"))
    return costs | {"gathered bytes": gathered}


def useful(costs):
    """FLOPs for one token that mfu counts: all but what is computed a second time"""
    return costs["teacher"] + costs["student"] + costs["backward"]


# -----------------------------------------------------------------------------
# the estimate

def estimate(args):
    """A paragraph for each stage: steps, parameters, FLOPs, hours, memory"""
    hf = hf_config(args.teacher)
    config = distill.student_config(args)
    device, bf16, peak, room = hardware(args)
    print(f"{args.teacher} on {args.world} x {args.gpu or device}, {peak / 1e12:.4g} TFLOP/s "
          f"each, of which {args.mfu:.0%} (--mfu; --bench measures it)")
    total = 0
    for number, budget in args.budgets.items():
        stage = distill.stage_table(args)[number]
        costs = cost(stage, config, hf, budget, args, bf16)
        steps = budget.tokens // budget.batch
        tokens = steps * budget.batch
        hours = useful(costs) * tokens / (peak * args.mfu * args.world) / 3600
        total += hours
        accumulate = budget.batch // args.context // (budget.micro_batch * args.world)
        print(f"\nstage {number} | {tokens:,} tokens = {steps:,} steps x "
              f"{budget.batch:,} (batch {budget.micro_batch} x length {args.context} x accumulate "
              f"{accumulate} x {args.world} GPUs)\n"
              f"stage {number} | {costs['trained']:,} parameters are trained, "
              f"{costs['all'] - costs['trained']:,} are frozen\n"
              f"stage {number} | GFLOP a token: teacher {costs['teacher'] / 1e9:.3g}, student "
              f"{costs['student'] / 1e9:.3g}, backward {costs['backward'] / 1e9:.3g}, computed "
              f"again {costs['again'] / 1e9:.3g} | {hours:.3g} hours\n"
              f"stage {number} | {memory_line(costs, args, device, room)}")
    print(f"\n{total:.3g} hours in all. To take less memory: --micro_batch, --recompute, "
          "--optimizer adamw8bit, --fsdp")


def hardware(args):
    """-> device, whether it computes in bf16, its FLOP/s, and its bytes of memory (inf: unknown)"""
    if args.gpu:
        peak, room = GPUS[args.gpu]
        return "cuda", True, peak, room
    device, bf16, _ = choose_device(args.device, args.fp32)
    room = torch.cuda.mem_get_info()[1] if device == "cuda" else math.inf
    return device, bf16, peak_of(device, bf16)[0], room


def memory_line(costs, args, device, room):
    memory = {}                                     # GB
    for part in SHARDED:
        memory[part] = costs[f"{part} bytes"] / (args.world if args.fsdp else 1) / 1e9
    for part in NOT_SHARDED:
        memory[part] = costs[f"{part} bytes"] / 1e9
    if args.fsdp:
        memory["gathered"] = costs["gathered bytes"] / 1e9
    if device == "cuda":
        memory["CUDA"] = CUDA_OVERHEAD / 1e9
    total = sum(memory.values())
    verdict = ""
    if room < math.inf:
        fits = "fits" if total < room / 1e9 else "does not fit"
        verdict = f" of {room / 1e9:.1f}, which {fits}"
    parts = ", ".join(f"{part} {n:.2f}" for part, n in memory.items())
    return f"GB: {parts} = {total:.2f}{verdict}"


# -----------------------------------------------------------------------------
# the measurement

def bench(args):
    """Each stage timed on random tokens, with a random teacher of this architecture"""
    run = distill.Run(args)
    hf = hf_config(args.teacher)
    teacher = Teacher.random(hf, run.device, run.dtype).at(args.n_layer)
    distill.compile_and_shard(teacher, distill.shard_teacher, args)
    names = ("teacher", "student", "backward", "optimizer", "step", "tok/s", "mfu", "GB", "planned")
    print("\n| stage " + "".join(f"| {name:>9} " for name in names) + "|")
    print("|-------" + "|-----------" * len(names) + "|")
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

    def teacher_only():
        with run.autocast(stage):
            teacher_forward(stage, student, teacher, tokens)

    def both_forward():
        with run.autocast(stage):
            for _ in compute_losses(tokens):
                pass

    def forward_and_backward():
        with run.autocast(stage):
            for loss, _ in compute_losses(tokens):
                loss.backward()

    teacher_ms = milliseconds(teacher_only, run.device)
    forward_ms = milliseconds(both_forward, run.device)
    micro_batch_ms = milliseconds(forward_and_backward, run.device)
    update_ms = milliseconds(optimizer.step, run.device)
    step_ms = budget.batch // (tokens.numel() * run.world) * micro_batch_ms + update_ms
    costs = cost(stage, student.config, hf, budget, args, run.bf16)
    mfu = useful(costs) * budget.batch / (step_ms / 1e3 * run.peak * run.world)
    planned = sum(costs[f"{part} bytes"] for part in (*SHARDED, *NOT_SHARDED))
    times = (teacher_ms, forward_ms - teacher_ms, micro_batch_ms - forward_ms, update_ms, step_ms)
    return [*(f"{ms:9.1f}" for ms in times), f"{1e3 * budget.batch / step_ms:9,.0f}",
            f"{mfu:9.1%}", f"{run.memory() / 1e9:9.2f}", f"{planned / 1e9:9.2f}"]


@torch.no_grad()
def teacher_forward(stage, student, teacher, tokens):
    """What a stage needs of the teacher, without a student"""
    loss_fn = getattr(stage.loss_fn, "func", stage.loss_fn)         # of a functools.partial
    if loss_fn is distill.knowledge_distillation:
        h = teacher.hidden(tokens).flatten(0, 1)                    # (B L, D)
        for rows in blocks(len(h), LOGITS_AT_ONCE // student.config.vocab_size):
            teacher.head(h[rows])
    else:
        for i, u in teacher.inputs(tokens, only=student.ssm_layers):
            teacher.block(i, u)


def milliseconds(work, device, n=20):
    """The mean of n calls, after one that compiles and allocates"""
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
    if args.kd_teacher:
        raise UsageError("--kd_teacher is not counted here: leave it out, and add its weights and "
                         "its forward yourself")
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
