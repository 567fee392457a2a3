"""MOHAWK: teach a state-space model to act like a Transformer, from the inside out [1].

Run:  python distill.py --preset tiny                  # all of it, small: minutes on a laptop
      python distill.py --stage 3 --tokens 3e9         # one stage, with its budget
      python distill.py --preset smollm2 --data ~/texts            # a real teacher, your own text
      torchrun --nproc_per_node=8 distill.py           # on eight GPUs; --fsdp shards both models

Three stages, one idea. Feed both models the same, put the same question to both, shrink the
distance between the answers:

    stage  both are fed    the question          an answer is   distance         trained
      1    u, for every i  model.matrix(i, u)    (B, H, L, L)   Frobenius        mixers: q, k, a, D
      2    u, for every i  model.block(i, u)     (B, L, D)      L2 per position  mixers
      3    the tokens      model.logits(tokens)  (B, L, V)      KL               everything

A mixer is what stands where a layer's attention was; a, the log of its decay, is a number per token
and head, D, its skip, a number per head (in shapes, D is the model's width). u is the teacher's own
input to layer i. (Stages 1 and 3 never make their matrices and logits in full. Their losses are
orientation_loss and distillation_loss of ssd_kernel.py.) Each stage starts from the one before and
leaves a model folder, out/<run>/stage<N>. What is not a mixer is copied from the teacher at the
start. --init says how the mixers start: as in the paper, with a random in_proj (preset phi), or
with the teacher's q, k and v, near its attention (the other presets).

    out/<run>/run.json      the command, the teacher, the data, versions
              log.jsonl     one object per step
              report.md     the table at the end
              last/         what a killed run needs to go on: the same command ends with the same
                            weights, bit for bit

The method comes first, then the run folder, many GPUs, and the command line. This file leaves out
what is beside the method: python -m extras.cost says what a run would take; extras.mixers and
extras.objectives hold other students and losses; extras.export, extras.benchmarks and
extras.pictures read what a run leaves. Each has a -h of its own.

[1] MOHAWK, arXiv 2408.10189    [2] AdamW, arXiv 1711.05101
"""
import argparse
import atexit
import contextlib
import ctypes
import datetime
import functools
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from eval import choose_attention, choose_device, compare, show_choice, texts_to_choose_by
from model_ssm import (INITS, SSM, WRITTEN_AGAIN, Config, UsageError, about_of, check_folder,
                       damage_in_one_line, delete, file_checksum, first_line, flush, read_config,
                       read_json, write_json, write_file)
from model_teacher import TINY, TINY_BATCH, TINY_CONTEXT, Teacher, hf_config, train_tiny
from prepare import (Parser, Tokenizer, at_least_one, count, fraction, locked, nonempty,
                     not_negative, open_data, positive, run_program, source_of_text, temperature)
from ssd_kernel import chunk_length, distillation_loss, ssd_path

# -----------------------------------------------------------------------------
# The three losses. Each is a generator, so that one layer's graph is freed before the next layer's
# is built. Each backward adds to the gradients, so they are those of the sum over layers; the log
# has the mean of the losses. Each yields (loss, relative): relative is the distance as a share of
# the teacher's own answer. 0 is the teacher itself; 1 is a mixing matrix of zeros in stage 1, a
# block that returns its input in stage 2, the uniform distribution in stage 3 (relative is the KL
# from the teacher to the student, over that from the teacher to the uniform one).

def matrix_orientation(student, teacher, tokens):
    """matrix orientation: given the teacher's input, each mixer's matrix is its attention matrix

    || softmax(q_t k_t^T scale) - (M + D I) ||_F, the mean over batch and heads, where the student's
    M[i,j] = (q_i . k_j) e^(a_(j+1) + ... + a_i) for j <= i. Both say who looks at whom; v is in
    neither. D is the mixer's skip, one number per head; a <= 0 is the log of its decay.
    """
    for i, u in teacher.inputs(tokens, only=student.ssm_layers):        # u (B, L, D)
        # factors: q_t, k_t and scale. distance and size: the mean norms of the difference and of
        # the teacher's matrix, made in tiles.
        distance, size = student.orientation(i, u, *teacher.factors(i, u))      # scalars
        yield distance, distance.detach() / size


def hidden_state_alignment(student, teacher, tokens):
    """hidden-state alignment: given the teacher's input, each layer gives what its layer gives

    || student.block(i, u) - teacher.block(i, u) ||_2, the mean over positions. Every layer gets the
    teacher's u, so no layer has to make up for the errors of those before it.
    """
    for i, u in teacher.inputs(tokens, only=student.ssm_layers):        # u (B, L, D)
        target = teacher.block(i, u)                                    # (B, L, D)
        distance = (student.block(i, u) - target).float().norm(dim=-1)  # (B, L)
        size = (target - u).float().norm(dim=-1)                        # (B, L)
        # The residual stream is in both blocks. Against what the layer adds to it, a student
        # whose layer does nothing is at 1; against the output it would look nearly right.
        yield distance.mean(), distance.detach().mean() / size.mean()


def knowledge_distillation(student, teacher, tokens, loss="kl", temperature=1.0, hard_weight=0.0):
    """knowledge distillation: given the tokens, the student predicts what the teacher predicts

    T^2 KL(p || q), the mean over tokens; p is the teacher's softmax(logits / T), q the student's.
    T^2, because the gradients shrink as 1 / T^2. loss="ce": q's cross-entropy to p, which is the KL
    and p's entropy. hard_weight adds the language-model loss at T = 1.
    """
    h, h_t = (model.hidden(tokens).flatten(0, 1) for model in (student, teacher))   # (B L, D)
    next_token = F.pad(tokens[:, 1:], (0, 1), value=-100).flatten()     # (B L), -100: unknown
    yield student.call(distance_of_predictions, teacher, h, h_t, next_token, loss, temperature,
                       hard_weight)


def distance_of_predictions(student, teacher, h, h_t, *options):
    """h, h_t (B L, D), the final hidden states of both -> (loss, relative)

    A function of its own for student.call: in sharded training the head is whole only within it.
    """
    head = student.lm_head
    head_t = teacher.model.lm_head
    return distillation_loss(h, head.weight, h_t, head_t.weight, head.bias, head_t.bias, *options)


class Stage(NamedTuple):
    """A row of STAGES: what a stage minimises, and what it trains"""
    loss_fn: Callable           # (student, teacher, tokens) -> yields (loss, relative)
    trainable: tuple            # a parameter is trained if one of these is part of its name
    frozen: tuple = ()          # and none of these
    unreached: tuple = ()       # parts of in_proj with no gradient, spared from weight decay
    unreached_in: str = "all"   # in all SSM layers, or in the model's "last" layer
    autocast: bool = True       # to bf16, where the device is faster in it
    check: Callable = None      # (student's config, teacher's): UsageError if they do not suit it


STAGES = {
    # A mixing matrix is made of q, k, the decay a, and D on its diagonal. The distance is of small
    # differences, so it is not autocast. in_proj makes q, k and a, but also v and the gate z; v, q
    # and k then pass the convolution, conv1d.
    1: Stage(matrix_orientation, ("mixer.in_proj", "mixer.conv1d", "mixer.D"),
             unreached=("v", "z"), autocast=False),
    # A layer that keeps attention is the teacher's own: it has nothing to align.
    2: Stage(hidden_state_alignment, ("mixer.",), frozen=("mixer.self_attn",)),
    3: Stage(knowledge_distillation, ("",)),            # "" is part of every name
}

# Tokens are split over the stages by `shares`. A window is `context` tokens. batch counts tokens,
# too; micro_batch is the most windows at once. One value for each stage, or one for all. warmup and
# decay are shares of a stage's steps.
PRESETS = {
    # the paper's own recipe
    "phi": dict(
        teacher="microsoft/phi-1_5", data="allenai/c4", config="en", context=2048, micro_batch=8,
        tokens=3e9, shares=(80, 160, 2760), batch=(2**15, 2**15, 2**19), eval_tokens=2**19,
        init="mohawk", lr=(5e-4, 2e-3, 5e-4), warmup=0.1, decay=0.1, weight_decay=0.1),
    # a real teacher on two CPU cores, in hours
    "smollm2": dict(
        teacher="smollm2", data=None, config=None, context=512, micro_batch=2,
        tokens=2e6, shares=(1, 24, 25), batch=(512, 512, 1024), eval_tokens=2**14,
        init="fit", lr=(5e-4, 1e-3, 3e-4), warmup=0.1, decay=0.7, weight_decay=0.0),
    # everything in minutes, with no download
    "tiny": dict(
        teacher="tiny", data="stdlib", config=None, context=256, micro_batch=8,
        tokens=0.96e6, shares=(1, 6, 17), batch=(256,), eval_tokens=2**16,
        init="fit", lr=(2e-3, 4e-3, 1e-3), warmup=0.1, decay=0.7, weight_decay=0.1),
}
# What --recipe takes from another preset. (A run's recipe, see recipe_of, is more: all arguments
# and checksums that decide its weights and report.)
RECIPE = ("init", "shares", "lr", "warmup", "decay", "weight_decay")


# -----------------------------------------------------------------------------
# A run, from its command to its report.

def main(arguments=None):
    """Data, teacher, student, then stage after stage. What was stopped goes on where it was."""
    args = parse(arguments)
    with lock(run_folder(args)):            # from here on no other process writes to it
        finished = find_finished(args)
        if finished == args.stage:
            return show_finished(args)
        distill(Run(args), finished)


def distill(run, finished):
    """The run of `main`, in a folder in which the stages in `finished` are done already."""
    args, checkpoints = run.args, run.checkpoints
    config = student_config(args)           # a teacher no student can copy is refused at once
    check_start(args, config)
    tokenizer = Tokenizer(args.teacher)
    check_kd_teacher(args, config, tokenizer)
    with rank_0_first(run):             # data to train on; windows (n, L + 1) to report on
        data, windows, data_name = open_data(args, tokenizer, run.budget)
        if args.teacher == "tiny":
            make_tiny_teacher(run, tokenizer)
    teacher = load_teacher(run, tokenizer, data, data_name)
    kd_teacher = load_kd_teacher(run, teacher)
    # Sets checkpoints.finished and, if a run was stopped here, checkpoints.rows.
    checkpoints.find_unfinished(recipe_of(args, teacher, kd_teacher, data), finished, args.fresh,
                                teacher)
    run.description = describe(args, teacher, data_name, run.world)
    barrier()                               # all have looked before rank 0 changes a stage
    # Training data on which --init fit makes the mixers' matrices as near to attention as they get,
    # and --attn_layers auto chooses layers
    calibration_tokens = data.batch(0, 8, args.context)[:, :-1].to(run.device)      # (8, L)

    todo = [stage for stage in args.stage if stage not in checkpoints.finished]
    for stage in checkpoints.finished:
        checkpoints.check_finished(run.folder / f"stage{stage}", stage)
        print(f"stage {stage} | was finished before: {run.folder}/stage{stage}")
    for stage in todo:
        student, about = load_or_init_student(run, stage, teacher, tokenizer, calibration_tokens)
        if stage == todo[0]:                # every refusal is behind us: older stages may go now
            run.remove_leftovers()
            if not checkpoints.rows:        # not even the teacher's: a new run
                run.reset()
                checkpoints.record(teacher=compare(teacher, teacher, windows))
                if kd_teacher is not teacher:
                    checkpoints.record(kd_teacher=compare(kd_teacher, teacher, windows))
            compile_and_shard(teacher, shard_teacher, args)
            if kd_teacher is not teacher:
                compile_and_shard(kd_teacher, shard_teacher, args)
        student.to(run.device)
        student.recompute = args.recompute
        compile_and_shard(student, shard_student, args)
        # A fresh student is the report's row "copied": what the copy alone is worth, untrained
        if about["tokens"] == 0 and "copied" not in checkpoints.rows:
            checkpoints.record(copied=compare(student, teacher, windows) | about)
        # That of another run is the row "start"
        if args.from_folder and stage == args.stage[0] and "start" not in checkpoints.rows:
            spent = {name: about[name] for name in ("tokens", "seconds")}
            checkpoints.record(start=compare(student, teacher, windows) | spent)
        run_stage(run, stage, student, about, teacher, kd_teacher, data, windows)
    finish(run)


def run_stage(run, number, student, about, teacher, kd_teacher, data, windows):
    """One stage, from the student at its start to its model folder.

    number: of the stage   about: tokens and seconds spent before
    kd_teacher: whose predictions stage 3 learns; the report compares with `teacher`
    windows (n, L + 1): validation tokens to report on
    """
    name, stage = f"stage {number}", stage_table(run.args)[number]
    budget = run.args.budgets[number]
    print(f"\n{name} of 3 | {first_line_of_doc(stage.loss_fn)}")
    with stop_on_signals(run):              # train saves before it stops
        # Each stage reads on in the data where the one before stopped.
        seconds = train(run, name, stage, student, kd_teacher if number == 3 else teacher, data,
                        about["tokens"] // run.args.context, budget)
        steps = budget.tokens // budget.batch
        if run.mean([bool(run.stop)])[0]:   # a signal came while the last state was saved
            stop_now(name, steps, steps, run.stop or signal.SIGTERM)
    row = compare(student, teacher, windows) | {
        "tokens": about["tokens"] + budget.tokens // budget.batch * budget.batch,   # full batches
        "seconds": about["seconds"] + seconds}
    folder = run.folder / f"stage{number}"
    student = gather_student(student)
    if run.rank == 0:
        student.save_pretrained(folder, stage=number, teacher=teacher.name,
                                teacher_fingerprint=teacher.fingerprint, **row,
                                recipe=recipe_of_stage(run.checkpoints.recipe, number))
    run.checkpoints.record(number)          # last: a kill before it only repeats the save
    barrier()                               # no process reads the folder before it is complete
    print(f"{name} | saved {folder} | val loss {row['loss']:.4f} | KL {row['kl']:.4f} | top-1 "
          f"{row['top1']:.1%}")


def train(run, name, stage, student, teacher, data, offset, budget):
    """Train `student` on budget.tokens tokens of `data`, from window `offset` on.

    name: what the log calls it   stage: a row of STAGES   budget: tokens, batch, lr, micro_batch
    -> the seconds it took. Of several processes each reads its own windows of the same batches.

    The learning rate is a function of the step and the windows one of `offset`, so a run that goes
    on from step n computes what it would have computed without the stop.
    """
    args = run.args
    B, L, world = budget.micro_batch, args.context, run.world
    params = choose_trainable(student, stage)                           # {name: parameter}
    frozen_rows = find_frozen_rows(student, stage)      # what is restored below has the same values
    optimizer = make_optimizer(params, args)
    steps = budget.tokens // budget.batch
    accumulate = budget.batch // (B * L * world)                        # micro-batches in a step
    done, seconds = run.checkpoints.restore(name, student, params, optimizer)
    compute_losses, no_sync = wrap_ddp(stage.loss_fn, student, teacher, run)
    flops = flops_per_token(student.config, teacher.config, stage, L)
    offset += done * budget.batch // L                                  # in windows
    run.open_log({name: done})          # a step that is logged but not in the state comes again
    print(f"{name} | {describe_trainable(params, student)}")
    print(f"{name} | {steps * budget.batch:,} tokens = {steps:,} steps x {budget.batch:,} (batch "
          f"{B} x length {L} x accumulate {accumulate}{f' x {world} GPUs' * (world > 1)})")
    progress = Progress(run, name, steps, budget.batch, flops, done, seconds)

    for step in range(done, steps):
        # update ----------------------------------------------------------
        lr = budget.lr * wsd(step, steps, args.warmup, args.decay)
        set_lr(optimizer, lr)
        losses = []
        for micro in range(accumulate):
            if run.stop and world == 1:     # what is unfinished of this step is lost
                run.checkpoints.save_and_stop(name, step, steps, progress.seconds, student, params,
                                              optimizer, run.stop)
            first = offset + (micro * world + run.rank) * B
            # data.batch adds the token after each window: it is for evaluations.
            tokens = data.batch(first, B, L)[:, :-1].to(run.device)     # (B, L)
            last = micro + 1 == accumulate
            with run.autocast(stage), contextlib.nullcontext() if last else no_sync():
                for loss, relative in compute_losses(tokens):           # of a layer, or of all
                    (loss / accumulate).backward()
                    losses.append(torch.stack([loss.detach(), relative]))
        gnorm = clip_gradients(params, args.clip)                       # the norm before
        # A process that has to save or to stop makes all of them do so: any mean above 0 is true.
        save = step + 1 == steps or time.perf_counter() - progress.saved > 60 * args.save_minutes
        loss, relative, save, stop = run.mean([*torch.stack(losses).mean(0), save, bool(run.stop)])
        if not math.isfinite(loss + relative + gnorm):
            raise not_finite(name, step, offset, budget.batch // L, loss, relative, gnorm)
        optimizer.step()
        optimizer.zero_grad()
        for weight, rows, values in frozen_rows:        # undo weight decay where no gradient is
            weight[rows] = values
        offset += budget.batch // L

        # log -------------------------------------------------------------
        progress.update(step, loss, relative, lr, gnorm)

        # checkpoint ------------------------------------------------------
        if stop:
            run.checkpoints.save_and_stop(name, step + 1, steps, progress.seconds, student, params,
                                          optimizer, run.stop or signal.SIGTERM)
        if save:
            run.checkpoints.save(name, step + 1, progress.seconds, student, params, optimizer)
            progress.saved = time.perf_counter()
    progress.bar.close()
    student.requires_grad_(True)            # the next stage's row freezes again
    return progress.seconds


def load_teacher(run, tokenizer, data, data_name):
    """The teacher, frozen, on its device

    With --n_layer the teacher still runs whole. Its .layers are an even choice of its layers, one
    for each of the student's to copy and to align with; u is the input of the chosen layer.
    UsageError if the data has ids that it has no embedding for: on a GPU such an id would end the
    run in the middle, with an assertion in some kernel.
    """
    args = run.args
    teacher = Teacher.load(args.teacher, run.device, run.dtype).at(args.n_layer)
    rows = teacher.config.vocab_size        # of its embedding: often more than its tokenizer has
    tokenizer.check_rows(rows)
    largest = 0 if args.stream else data.largest_id(rows)       # a stream has no end to look for
    if largest >= rows:
        raise UsageError(f"{data_name} has ids up to {largest:,}, the teacher has embeddings for "
                         f"{rows:,} tokens: prepare it with --teacher")
    parameters = sum(p.numel() for p in teacher.model.parameters())
    share = "" if args.stream else (f": {len(data):,} tokens, this run reads "
                                    f"{run.budget / len(data):.2f} of it")
    print(f"teacher {teacher.name}: {parameters:,} parameters, {len(teacher.decoder.layers)} "
          f"layers | data {data_name}{share}")
    return teacher


def load_kd_teacher(run, teacher):
    """--kd_teacher, whose predictions stage 3 learns, on its device; without it the teacher itself

    Its width and depth are its own: stages 1 and 2 do not see it.
    """
    name = run.args.kd_teacher
    if name is None:
        return teacher
    kd_teacher = Teacher.load(name, run.device, run.dtype)
    parameters = sum(p.numel() for p in kd_teacher.model.parameters())
    print(f"kd_teacher {name}: {parameters:,} parameters, {len(kd_teacher.layers)} layers: stage 3 "
          f"learns its predictions | KL in the report is to {teacher.name}")
    return kd_teacher


def check_kd_teacher(args, config, tokenizer):
    """UsageError if --kd_teacher predicts other tokens than the teacher: before its weights load"""
    if args.kd_teacher is None:
        return
    words = hf_config(args.kd_teacher).vocab_size
    if words != config.vocab_size:
        raise UsageError(f"--kd_teacher {args.kd_teacher} scores {words:,} tokens, {args.teacher} "
                         f"{config.vocab_size:,}: stage 3 compares them one by one")
    if Tokenizer(args.kd_teacher).fingerprint != tokenizer.fingerprint:
        raise UsageError(f"--kd_teacher {args.kd_teacher} has another tokenizer than "
                         f"{args.teacher}: their tokens are not the same words")


def make_tiny_teacher(run, tokenizer):
    """Train out/tiny-teacher if it is not there. All runs share it, whatever their seed.

    A run that comes while another one trains it waits, and takes what that one has made.
    """
    args = argparse.Namespace(**vars(run.args) | {"seed": 0})
    with locked(TINY, wait=True):
        if TINY.exists():
            return
        run.open_log({"teacher": 0})
        train_tiny(open_data(args, tokenizer)[0], tokenizer, run.log, args.teacher_tokens,
                   run.device, run.autocast)


def load_or_init_student(run, stage, teacher, tokenizer, calibration_tokens):
    """What `stage` starts from: the previous stage's folder, loaded strictly, or a fresh student.

    For this command's first stage, --from takes the place of that folder.
    calibration_tokens (B, L)   -> the student, {"tokens", "seconds"} spent on it so far
    UsageError if that folder's student is not one of this teacher and of these flags.
    """
    args = run.args
    # With --stage 1 3, stage 3 goes on from stage 1; with --stage 3 alone, from stage 2's folder.
    previous = max((s for s in run.checkpoints.finished if s < stage), default=stage - 1)
    folder = run.folder / f"stage{previous}"
    of_another_run = args.from_folder and not run.checkpoints.finished
    if of_another_run:
        folder = Path(args.from_folder)
    if folder.exists() or previous in run.checkpoints.finished:
        student = SSM.from_pretrained(folder)                   # every tensor, and no other
        about = student.about
        if why := mismatch(student.config, about, teacher, args, of_another_run):
            raise UsageError(f"{folder} {why}")
        print(f"stage {stage} | from {folder} ({about['tokens']:,} tokens) | {student.loaded}")
        if of_another_run:
            restore_attention(run, student, teacher, tokenizer, calibration_tokens)
        return student, about
    if stage > 1:                           # allowed, as in the paper's ablations, but not silent
        print(f"stage {stage} | there is no {folder}: starts from a copy of the teacher instead")
    student = init_student(args, teacher, calibration_tokens)
    states = student.layers[student.ssm_layers[0]].mixer.initial_state(1)
    print(f"stage {stage} | from {teacher.name}, mixer {args.mixer}, init {args.init} | "
          f"{student.loaded} | a state of {sum(x.nbytes for x in states):,} bytes a layer")
    return student, {"tokens": 0, "seconds": 0}


def init_student(args, teacher, calibration_tokens):
    """A copy of the teacher. The mixers start by --init, on calibration_tokens (B, L)."""
    torch.manual_seed(args.seed)
    layers = kept_attention(args, len(teacher.layers))
    return SSM.from_teacher(teacher, layers, args.init, calibration_tokens, mixer=args.mixer)


def restore_attention(run, student, teacher, tokenizer, calibration_tokens):
    """Give the student from --from the teacher's attention in the layers of --attn_layers"""
    args = run.args
    before = student.config.attn_layers
    wanted = how_many(args.attn_layers)
    if wanted is None:
        named = layer_numbers(args.attn_layers)
        layers = [i for i in named if i not in before]
    elif wanted == len(before):
        layers = []
    else:
        layers = choose_layers(run, student, teacher, tokenizer, calibration_tokens)
    student.restore_attention(teacher, layers)
    if layers:
        tensors = sum(len(student.layers[i].mixer.state_dict()) for i in layers)
        print(f"attention | layers {', '.join(map(str, layers))}: {tensors} tensors from "
              f"{teacher.name} in place of the mixers'")
    check_stages(args, student.config, teacher.config)


def choose_layers(run, student, teacher, tokenizer, calibration_tokens):
    """--attn_layers auto:K -> the layers chosen, best first; attention.json says what each is worth

    A run that goes on takes them from that file, as the processes do that are not rank 0.
    """
    args = run.args
    path = run.folder / "attention.json"
    K = how_many(args.attn_layers) - len(student.config.attn_layers)
    with rank_0_first(run):
        if run.rank == 0 and not run.checkpoints.rows:
            student.to(run.device)
            texts = texts_to_choose_by(args.attn_score, calibration_tokens, tokenizer, args.context)
            with run.autocast():
                choice = choose_attention(student, teacher, K, *texts)
            write_json(path, {"score": args.attn_score} | choice)
            show_choice(choice)
        cure = "--fresh chooses again"
        choice = read_json(path, cure)
        with damage_in_one_line(path, cure):
            layers = [int(x["layer"]) for x in choice["rounds"]]
            if len({*layers} & {*range(student.config.n_layer)}) != K:
                raise ValueError(f"it has layers {layers}")
    return layers


def mismatch(config, about, teacher, args, of_another_run=False):
    """Why a stage's folder is not what this command goes on from, or None

    config, about: of the student in the folder. Without these checks a student would go on with
    another teacher's targets, and its loss would not show it. of_another_run: it is in --from
    """
    if not teacher.has_fingerprint(about.get("teacher_fingerprint")):
        cure = ("give --teacher its own" if of_another_run else
                "choose another --out, or run the stages before it again")
        return (f"was distilled from {about.get('teacher')}, whose weights are not those of "
                f"{teacher.name}: {cure}")
    return misshapen(config, len(teacher.layers), args, of_another_run)


def misshapen(config, n_layer, args, of_another_run):
    """What `mismatch` can say before a teacher, of n_layer layers, is loaded"""
    cure = "choose another --from" if of_another_run else "choose another --out"
    if config.n_layer != n_layer:
        return f"has {config.n_layer} layers, this run has {n_layer}: {cure}, or --n_layer"
    before = config.attn_layers
    n = how_many(args.attn_layers)
    if n is not None:
        if len(before) > n or len(before) < n and not of_another_run:
            return (f"has attention in {len(before)} layers, --attn_layers is auto:{n}: {cure}")
    elif args.attn_layers is not None:
        wanted = layer_numbers(args.attn_layers)
        if not of_another_run and wanted != before:
            return f"keeps attention in layers {before}, --attn_layers is {wanted}: {cure}"
        if lost := sorted(set(before) - set(wanted)):
            return (f"has attention in layer {lost[0]}, which has no mixer any more: add it to "
                    "--attn_layers")
    if args.mixer != config.mixer:
        return (f"has {config.mixer} mixers, --mixer is {args.mixer}: {cure}, or --mixer "
                f"{config.mixer}")


def check_start(args, config):
    """UsageError if --from has no student for this command, by its config.json: no weights are read

    config: of this command's student
    """
    if args.from_folder is None:
        return
    folder = Path(args.from_folder)
    if not (folder / "config.json").is_file():
        raise UsageError(f"--from {folder}: there is no config.json. Give a stage folder of a run, "
                         "such as out/smollm2/stage2")
    before = read_config(read_json(folder / "config.json", WRITTEN_AGAIN))
    if why := misshapen(before, config.n_layer, args, of_another_run=True):
        raise UsageError(f"--from {folder} {why}")


def student_config(args):
    """The student's shapes, from the teacher's configuration alone: no weights are read.

    UsageError where the teacher has what a student cannot have. So a mistake shows within seconds,
    before gigabytes of weights and text are downloaded.
    """
    hf = hf_config(args.teacher)
    n_layer = hf.num_hidden_layers if args.n_layer is None else args.n_layer
    if hf.vocab_size < 2:       # stage 3's relative distance would be 0 / 0
        raise UsageError(f"{args.teacher} has a vocabulary of {hf.vocab_size}: it predicts nothing "
                         "that a student could learn")
    shapes = Teacher.random(hf, "meta").at(n_layer).shapes      # meta: tensors with no contents
    config = Config(**shapes | {"attn_layers": kept_attention(args, n_layer),
                                "mixer": args.mixer})
    check_stages(args, config, hf)
    return config


def check_stages(args, config, hf):
    """UsageError if a student of these shapes lacks what an objective compares"""
    for number, stage in stage_table(args).items():
        if stage.check and number in args.stage:
            stage.check(config, hf)


def kept_attention(args, n_layer):
    """--attn_layers as a tuple of numbers; not all layers may keep attention

    auto:K gives the first K layers: as many as it will be, before the student says which.
    """
    n = how_many(args.attn_layers)
    if n is not None and n >= n_layer:
        raise UsageError(f"--attn_layers auto:{n}: of {n_layer} layers at most {n_layer - 1} may "
                         "have attention, or there is no mixer to teach")
    layers = layer_numbers(args.attn_layers) if n is None else tuple(range(n))
    if set(range(n_layer)) <= set(layers):
        raise UsageError("every layer keeps its attention: there is no mixer to teach")
    return layers


def how_many(names):
    """["auto:4"] -> 4; None if --attn_layers names layers"""
    if not names or not names[0].startswith("auto"):
        return None
    if len(names) > 1 or not re.fullmatch("auto:[1-9][0-9]{0,5}", names[0]):
        raise UsageError(f"--attn_layers {' '.join(names)}: give auto:K, such as auto:4, for K "
                         "layers, at least 1")
    return int(names[0].removeprefix("auto:"))


def layer_numbers(names):
    """["4", "10"] -> (4, 10); None -> ()"""
    try:
        return tuple(sorted({int(i) for i in names or ()}))
    except ValueError as error:
        raise UsageError(f"--attn_layers {' '.join(names)}: give layer numbers, or "
                         "auto:K") from error


def finish(run):
    """The report, and nothing left of what only an unfinished run needs

    last/ goes after report.md is written: the same command, after a kill in between, reports again.
    """
    args, checkpoints = run.args, run.checkpoints
    barrier()
    if run.rank:
        return
    rows = dict(checkpoints.rows)           # teacher, copied or start, kd_teacher
    last = max(checkpoints.finished)
    for stage in range(1, last + 1):        # earlier stages of this student are read from disk
        # A folder of a stage that was left out (--stage 1 3, or --from) is of an older run.
        first = args.stage[0]
        goes_on = not args.from_folder and (run.folder / f"stage{first - 1}").exists()
        folder = run.folder / f"stage{stage}"
        if (stage in args.stage or stage < first and goes_on) and folder.exists():
            rows[f"stage {stage}"] = read_about(folder)
    table = report(rows)
    run.write_description(rows=rows)
    write_file(run.folder / "report.md", table)
    shutil.rmtree(checkpoints.folder)
    print(f"\n{table}\nval loss and KL to the teacher in nats per validation token; tokens and "
          f"seconds count from the copy on; peak memory {run.memory() / 1e9:.1f} GB\n"
          f"saved {run.folder}/report.md | next: python eval.py {run.folder}")


def report(rows):
    """-> the table that ends a run

    rows: {name: what compare says of a model (top1: how often its likeliest token is the
    teacher's), and tokens and seconds spent on it if it has any}
    """
    table = [f"| {'model':<12} | val loss |    ppl |     KL |  top-1 |        tokens | seconds |",
             f"|{'-' * 14}|{'-' * 10}|{'-' * 8}|{'-' * 8}|{'-' * 8}|{'-' * 15}|{'-' * 9}|"]
    for name, row in rows.items():
        spent = f"{row['tokens']:13,} | {row['seconds']:7.0f}" if "tokens" in row else f"{'':13} | "
        table.append(f"| {name:<12} | {row['loss']:8.4f} | {math.exp(min(row['loss'], 20)):6.2f} | "
                     f"{row['kl']:6.4f} | {row['top1']:6.1%} | {spent:<23} |")
    return "\n".join(table) + "\n"


def read_about(folder):
    """What run_stage wrote about a stage's student: its tokens, seconds, scores, teacher"""
    return about_of(read_json(folder / "config.json", WRITTEN_AGAIN), folder)


def first_line_of_doc(loss_fn):
    """What a stage does, in words: of a partial, its function's"""
    return getattr(loss_fn, "func", loss_fn).__doc__.splitlines()[0]


# -----------------------------------------------------------------------------
# What is trained, how fast, and how well the machine is used.

def stage_table(args):
    """STAGES with the options of the command line -> {number: Stage}

    UsageError for an objective that is not there, or with options it does not have.
    """
    stages = STAGES | {3: STAGES[3]._replace(loss_fn=functools.partial(
        knowledge_distillation, loss=args.loss, temperature=args.temperature,
        hard_weight=args.hard_weight))}
    if args.objective:                      # one of extras/objectives.py takes stage 2's place
        try:
            from extras.objectives import objective_stage
        except ImportError as error:
            raise UsageError("--objective needs extras/objectives.py, which is missing") from error
        stages[2] = objective_stage(args.objective, stages)
    if args.train == "mixer":               # the copied weights stay the teacher's, in stage 3 too
        for number, stage in stages.items():
            names = [name for name in stage.trainable if name.startswith("mixer.")]
            stages[number] = stage._replace(trainable=tuple(names) or ("mixer.",),
                                            frozen=(*stage.frozen, "mixer.self_attn"))
    return stages


def is_trainable(name, stage, n_layer):
    """Does this stage train the parameter of this name?

    In rows of extras/objectives.py LAST stands for the last layer's number.
    """
    def contains(parts):
        return any(part.replace("LAST", str(n_layer - 1)) in name for part in parts)
    return contains(stage.trainable) and not contains(stage.frozen)


def choose_trainable(student, stage):
    """Freeze all but what the stage trains. -> {name: parameter}

    The others are frozen, not just left out of the optimizer: backward makes no gradient for them,
    which saves time and memory, and DDP does not wait for one.
    """
    if isinstance(student, FSDPModule):     # an evaluation may have left some parameters gathered:
        student.reshard()                   # other objects than the shards that are trained
    params = {}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(is_trainable(name, stage, student.config.n_layer))
        if parameter.requires_grad:
            params[name] = parameter
    return params


def find_frozen_rows(student, stage):
    """-> [(weight, which of its rows, their values)]: rows of in_proj the loss does not depend on

    Their gradient is 0, but AdamW's weight decay would shrink them all the same: stage 1 would wear
    down the v that --init may have taken from the teacher. So they are put back after each step.
    """
    frozen_rows = []
    layers = student.ssm_layers if stage.unreached_in == "all" else [student.config.n_layer - 1]
    for i in layers if stage.unreached else ():
        mixer = student.layers[i].mixer
        weight = mixer.in_proj.weight.detach()                  # shares the parameter's memory
        rows = torch.zeros(len(weight), dtype=torch.bool)
        for part in stage.unreached:
            mixer.split_in_proj(rows)[part][:] = True               # views of `rows`
        rows = distribute_like(weight, rows)
        if isinstance(weight, DTensor):     # the rows that this process has
            weight, rows = weight.to_local(), rows.to_local()
        frozen_rows.append((weight, rows, weight[rows].clone()))
    return frozen_rows


def describe_trainable(params, student):
    """"605,976 of 2,038,553 parameters are trained: mixer.D 24, ..." """
    kinds = {}
    for name, p in params.items():
        parts = [part for part in name.split(".") if not part.isdigit()]
        kind = ".".join(x for x in parts if x not in ("backbone", "layers", "weight", "bias"))
        kinds[kind] = kinds.get(kind, 0) + p.numel()
    total = sum(p.numel() for p in student.parameters())
    return (f"{sum(kinds.values()):,} of {total:,} parameters are trained: "
            + ", ".join(f"{kind} {n:,}" for kind, n in kinds.items()))


def wsd(step, steps, warmup=0.1, decay=0.1):
    """Warm up, stay, decay: the share of the peak learning rate at `step` of `steps`, as in [1]

    warmup, decay: shares of the steps. The first step is not at 0: it would be wasted.

    >>> [wsd(step, 10, 0.2, 0.4) for step in (0, 1, 5, 6, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]
    """
    return min(1.0, (step + 1) / (warmup * steps or 1), (steps - step) / (decay * steps or 1))


def make_optimizer(params, args):
    """AdamW [2]. Weight decay is for matrices only: norms and D should not go to 0, nor should the
    convolution, whose start is the identity."""
    matrices = [p for p in params.values() if p.dim() == 2]
    others = [p for p in params.values() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": args.weight_decay},
              {"params": others, "weight_decay": 0.0}]
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=tuple(args.betas), fused=True)
    from torchao.optim import AdamW8bit
    return AdamW8bit(groups, betas=tuple(args.betas))


def set_lr(optimizer, lr):
    """One learning rate for all parameters"""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):       # torchao's: a float would be compiled in
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def clip_gradients(params, limit):
    """Scale the gradients down to a norm of `limit` (0: no limit). -> the norm before, of all"""
    norm = torch.nn.utils.clip_grad_norm_(params.values(), limit or math.inf)
    return full_tensor(norm).item()


def not_finite(name, step, offset, windows, loss, relative, gnorm):
    """-> UsageError for a loss or gradient that is NaN or infinite: where it was, what to do

    The run stops before the step, since AdamW would write a NaN into every weight and its moments.
    """
    cure = "try a lower --lr" if step else "no weight has changed in this stage yet: look at them"
    return UsageError(f"{name} step {step + 1}, windows {offset} to {offset + windows - 1}: loss "
                      f"{loss} (relative {relative}), gradient norm {gnorm}; the step was not "
                      f"made, {cure}")


def flops_per_token(config, hf, stage, L):
    """Matrix-product FLOPs of teacher, student and backward for one token, at a length of L.

    A weight costs 2 FLOPs forward (one product, one sum); 2 more where its own gradient is needed,
    2 more where its input's is. Causal attention looks at L / 2 keys on average, at 2 P FLOPs for
    scores and 2 P for values each; SSD in chunks of Q costs each head 2 Q (N + P) inside and 4 N P
    through the state. mfu is this, times tokens/s, over the machine's peak. With --train mixer the
    backward counts as if all were trained. None for other losses and mixers, for a --kd_teacher of
    other widths than the student's and, before stage 3, for a student of fewer layers.
    """
    kinds = {matrix_orientation: 1, hidden_state_alignment: 2, knowledge_distillation: 3}
    kind = kinds.get(getattr(stage.loss_fn, "func", stage.loss_fn))     # stage 3's is a partial
    alike = (hf.hidden_size, hf.intermediate_size) == (config.d_model, config.d_mlp)
    shallower = config.n_layer != hf.num_hidden_layers and kind != 3
    if kind is None or config.mixer != "mamba2" or shallower or not alike:
        return None
    D, H, P, N = config.d_model, config.n_head, config.head_dim, config.d_state
    ssm_layers = [i for i in range(config.n_layer) if i not in config.attn_layers]
    n_ssm = len(ssm_layers)
    n_attn = config.n_layer - n_ssm
    # weights of a layer's parts
    mlp = (2 if config.block == "phi" else 3) * D * config.d_mlp        # 3: Llama's has a gate
    qkvo = 2 * D * config.d_inner + 2 * D * config.n_kv_head * P        # q, o; k, v
    scores = 2 * L * config.d_inner                         # causal: half of 4 L H P
    head = config.vocab_size * D
    in_proj = D * (2 * config.d_inner + 2 * config.n_qk_head * N + H)   # v, z; q, k; a
    out_proj = D * config.d_inner
    conv = 2 * config.d_conv * (config.d_inner + 2 * config.n_qk_head * N)      # FLOPs already
    Q = chunk_length(P)
    ssd = H * (2 * Q * (N + P) + 4 * N * P)             # q k^T and M v; k v^T and q S
    ssd_backward = H * (2 * Q * (3 * N + 2 * P) + 8 * N * P)    # q k^T, dq, dk; dM, dv

    # Stages 1 and 2 need no layer of the teacher after the student's last SSM layer.
    runs = hf.num_hidden_layers if kind == 3 else max(ssm_layers, default=-1) + 1
    teacher = runs * (2 * (qkvo + mlp) + scores)
    if kind == 1:       # of half a matrix each: the teacher's q k^T, the student's, dq, dk
        student = n_ssm * (2 * in_proj + conv + H * L * (P + 3 * N))
        return teacher + student + n_ssm * (2 * in_proj + 2 * conv)
    block = 2 * (in_proj + out_proj + mlp) + conv + ssd
    if kind == 2:       # the MLP is frozen; Phi's stands beside the mixer, so nothing passes it
        through_mlp = 0 if config.block == "phi" else 2 * mlp
        backward = 2 * in_proj + 2 * conv + 4 * out_proj + ssd_backward + through_mlp
        return teacher + n_ssm * (block + backward)
    attention = 2 * (qkvo + mlp) + scores               # of a layer that keeps it
    # everything is trained: 4 a weight. FlashAttention's backward is 2.5 times its forward.
    backward = (n_ssm * (4 * (in_proj + out_proj + mlp) + 2 * conv + ssd_backward)
                + n_attn * (4 * (qkvo + mlp) + 2.5 * scores) + 4 * head)
    return (teacher + 2 * head) + (n_ssm * block + n_attn * attention + 2 * head) + backward


class Progress:
    """What one waits by: a bar, a line now and then, and an object per step in log.jsonl."""

    def __init__(self, run, name, steps, batch, flops, done, seconds):
        self.run, self.name, self.steps, self.batch, self.flops = run, name, steps, batch, flops
        self.seconds = seconds                          # of training, before this process began
        self.start = time.perf_counter() - seconds      # as if it had all been one process
        self.saved = time.perf_counter()                # when train last saved a state
        self.bar = tqdm(total=steps * batch, desc=name, unit=" tokens", unit_scale=True,
                        mininterval=0.5, initial=done * batch, disable=run.rank > 0)

    def update(self, step, loss, relative, lr, gnorm):
        """One step is done. Every step is in the log, eight lines or some more on the screen."""
        tokens = (step + 1) * self.batch
        self.seconds = time.perf_counter() - self.start
        speed = tokens / self.seconds
        # model FLOPs utilisation: the share of the peak that goes into matrix products we need
        mfu = self.flops and speed * self.flops / (self.run.peak * self.run.world)
        self.run.log({"stage": self.name, "step": step + 1, "loss": loss, "relative": relative,
                      "lr": lr, "gnorm": gnorm, "tokens": tokens, "tok_s": speed, "mfu": mfu})
        self.bar.update(self.batch)
        self.bar.set_postfix_str(f"loss {loss:.4f}", refresh=False)
        if (step + 1) % max(1, self.steps // 8) == 0 or step + 1 == self.steps:
            share = "" if mfu is None else f"mfu {mfu:.0%} | "
            self.bar.write(
                f"{self.name} step {step + 1:5}/{self.steps} | loss {loss:9.4f} | relative "
                f"{relative:7.1%} | lr {lr:.1e} | gnorm {gnorm:8.3f} | {tokens / 1e6:.2f}M "
                f"tokens | {speed:,.0f} tok/s | {share}"
                f"{tqdm.format_interval((self.bar.total - tokens) / speed)} to go",
                file=sys.stdout)


# -----------------------------------------------------------------------------
# The run folder.

class Run:
    """What all stages of a run share: arguments, folder, log, device, precision, other processes.

    budget: tokens of all stages   peak: FLOP/s this device is good for
    stop: the number of the signal that ended the run, if there was one
    """

    def __init__(self, args):
        if args.optimizer == "adamw8bit" and not importlib.util.find_spec("torchao"):
            raise UsageError("--optimizer adamw8bit needs torchao: pip install torchao")
        self.args, self.folder = args, run_folder(args)
        self.device, self.bf16, why = choose_device(args.device, args.fp32)
        self.rank, self.world = init_processes(self.device)
        # dtype of the teacher's weights, in stage 1 too. The student's are always fp32: bf16 would
        # round its small updates to nothing. A frozen teacher has no updates.
        self.dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.stop = None
        self.budget = sum(budget.tokens for budget in args.budgets.values())
        self.checkpoints = Checkpoints(self.folder / "last", self.rank)
        self.peak, source = peak_of(self.device, self.bf16)
        print(f"device {self.device} ({why}) | student and stage 1 in fp32, stages 2 and 3 "
              f"{'autocast to bf16' if self.bf16 else 'in fp32'} | SSD in {ssd_path(self.device)}")
        if self.device == "cpu":
            keep_freed_memory()
        if self.device == "cuda" and self.bf16:
            # What stays in fp32 (stage 1, the head) is multiplied in TF32: ten times as fast, and
            # its 10 bits are more than the 7 that all else has.
            torch.set_float32_matmul_precision("high")
        if self.world > 1:
            print(f"{self.world} processes, {'FSDP2' if args.fsdp else 'DDP'}")
        print(f"mfu counts from {self.peak / 1e12:.2f} TFLOP/s, {source}")

    def autocast(self, stage=None):
        """The context a stage computes in: bf16 where the device is faster in it, else as it is"""
        enabled = self.bf16 and (stage is None or stage.autocast)
        return torch.autocast(self.device, torch.bfloat16, enabled=enabled)

    def reset(self):
        """A new run: nothing of an old one may be taken for it.

        So its stages go, but for those that are finished, and those before this run's first:
        --stage 3 starts from stage 2's. Stage 3 goes before 2, and 2 before 1: if this is killed,
        no stage is left without the one that it was made from.
        """
        if self.rank == 0:
            delete(self.folder / "report.md")
            if how_many(self.args.attn_layers) is None:
                delete(self.folder / "attention.json")
            for stage in (3, 2, 1):
                if stage >= self.args.stage[0] and stage not in self.checkpoints.finished:
                    delete(self.folder / f"stage{stage}")
            delete(self.checkpoints.folder)
            self.checkpoints.folder.mkdir(parents=True)
            self.open_log({f"stage {stage}": 0 for stage in self.args.stage
                           if stage not in self.checkpoints.finished})
            self.write_description()
        barrier()

    def remove_leftovers(self):
        """Stage folders that a killed process has half written, each as large as a model"""
        if self.rank == 0:
            for path in self.folder.glob(".stage[123].*partial"):
                delete(path)

    def memory(self):
        """The peak of memory in bytes: on a GPU of all tensors, else of this process"""
        if self.device == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 2**10         # bytes on macOS, else KiB
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def mean(self, numbers):
        """The mean of each number over all processes, as floats: the GPU is waited for once."""
        values = torch.stack([torch.as_tensor(x, dtype=torch.float32, device=self.device)
                              for x in numbers])
        if self.world > 1:
            dist.all_reduce(values)
            values /= self.world
        return values.tolist()

    def open_log(self, steps):
        """Reopen log.jsonl. Keep the first n steps of each stage in {stage: n}, and all of others.

        So stages that are run one by one share a log, and a step that is computed again after a
        kill is not in it twice. Lines that cannot be read are left out, and counted.
        """
        if self.rank:
            return
        path = self.folder / "log.jsonl"
        lines = [json.dumps(event) + "\n" for event in read_log(path)
                 if event["step"] <= steps.get(event["stage"], math.inf)]
        write_file(path, "".join(lines))
        self.file = open(path, "ab", buffering=0)

    def log(self, event):
        """One more line of log.jsonl, written at once. UsageError if the disk is full."""
        if self.rank == 0:
            line = json.dumps(event).encode() + b"\n"
            try:
                if self.file.write(line) < len(line):
                    raise OSError("no space for a whole line")
            except OSError as error:
                raise UsageError(f"cannot write {self.folder}/log.jsonl: {first_line(error)}; make "
                                 "room, and the same command goes on") from error

    def write_description(self, **more):
        """run.json: enough to repeat the run, and for eval.py to find its teacher and data"""
        self.description |= more
        write_json(self.folder / "run.json", self.description)


def keep_freed_memory():
    """Let malloc keep what is freed. Else each large tensor is made of new pages, and to get them
    from the system takes several times as long as to compute what goes in. For glibc's malloc."""
    if platform.libc_ver()[0] == "glibc":
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3         # of malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def read_log(path):
    """-> the events of a log.jsonl, [] if it is not there; how many lines it lost is printed"""
    events, unreadable = [], 0
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            event = json.loads(line)
            events.append(event | {"stage": str(event["stage"]), "step": int(event["step"])})
        except (ValueError, TypeError, KeyError):           # a kill may have cut the last one
            unreadable += 1
    if unreadable:
        print(f"{path}: {unreadable:,} lines cannot be read, and are left out")
    return events


def describe(args, teacher, data_name, world):
    """-> what run.json says of a run: its command, teacher and data, versions, machine"""
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True,
                                cwd=Path(__file__).parent).stdout.decode("ascii").strip()
    except OSError:                                     # no git on this machine
        commit = ""
    return {"arguments": json.loads(json.dumps(vars(args), default=vars)),  # vars: of the budgets
            "teacher": teacher.name, "teacher_fingerprint": teacher.fingerprint,
            "data": data_name, "processes": world, "commit": commit,
            "machine": platform.processor() or platform.machine(),
            "versions": {"python": platform.python_version(), "torch": torch.__version__,
                         "transformers": transformers.__version__}}


def lock(folder):
    """The context in which no other process writes to a run's folder; rank 0 holds it for all.

    UsageError if another process does. A killed process holds no lock.
    """
    if os.environ.get("RANK", "0") != "0":
        return contextlib.nullcontext()
    return locked(folder)


def run_folder(args):
    """Where the run is written: a preset's runs share a folder, so stages may be run one by one."""
    return Path(args.out or f"out/{args.preset}")


def find_finished(args):
    """-> those of args.stage that a command with these arguments has finished

    Looked up before anything is loaded: check_finished compares checksums later, if stages are
    left. While last/ is there, the run is unfinished: [], and Checkpoints.find_unfinished reads
    there what is done. UsageError if a stage of args.stage is there of another recipe; or if a
    stage has still to be trained but another is there, which was made without it.
    """
    folder = run_folder(args)
    if args.fresh or (folder / "last" / "run.json").exists():
        return []
    now = recipe_of_arguments(vars(args))
    start_over = "choose another --out, or --fresh to start over"
    there = [stage for stage in (1, 2, 3)
             if stage >= args.stage[0] and (folder / f"stage{stage}").exists()]
    for stage in there:
        before = check_folder(folder / f"stage{stage}").get("recipe", {})
        changed = differences(recipe_of_stage(before, stage), recipe_of_stage(now, stage))
        if stage in args.stage and changed:
            raise UsageError(f"{folder}/stage{stage} is of another recipe "
                             f"({'; '.join(changed)}): {start_over}")
    finished = list(itertools.takewhile(there.__contains__, args.stage))
    if finished != args.stage and there != finished:
        missing = next(stage for stage in args.stage if stage not in finished)
        raise UsageError(f"{folder} has stage {max(there)}, which was made before the stage "
                         f"{missing} of this command would be: {start_over}")
    return finished


def show_finished(args):
    """Nothing is left to do: the report once more"""
    folder = run_folder(args)
    rows = read_json(folder / "run.json", "--fresh starts over").get("rows")
    table = report(rows) if rows else (folder / "report.md").read_text(encoding="utf-8")
    print_once(f"{folder} is finished: this command has run to its end, and nothing was changed. "
               f"--fresh starts over\n\n{table}\nnext: python eval.py {folder}")


# Flags that are not compared as they are: those that say where and how fast it runs, which may
# differ when a run goes on; --stage, --tokens, --batch and --lr, of which the budgets are compared
# that they come to; --preset and --recipe, of which the flags are that they fill in.
NOT_RECIPE = {
    "out", "device", "fresh", "recompute", "save_minutes", "preset", "recipe", "tokens", "batch",
    "lr", "budgets", "micro_batch", "stage", "fsdp", "compile", "world"}


def recipe_of_arguments(arguments):
    """The arguments that decide a run's weights and report -> {name: value}, as JSON returns them

    arguments: vars(args), or what a run.json has. A tuple would differ from the list it becomes.
    """
    arguments = json.loads(json.dumps(arguments, default=vars))         # budgets are Namespaces
    recipe = {key: value for key, value in arguments.items() if key not in NOT_RECIPE}
    for stage, budget in arguments["budgets"].items():
        recipe |= {f"stage {stage} {key}": value for key, value in budget.items()
                   if key != "micro_batch"}
    return recipe


def recipe_of(args, teacher, kd_teacher, data):
    """What must be the same for an unfinished run to go on: a folder of text may have changed"""
    recipe = recipe_of_arguments(vars(args)) | {
        "teacher's weights": teacher.fingerprint, "data's checksums": data.fingerprint}
    if kd_teacher is not teacher:
        # the part of it that is the same in fp32 and in bf16
        recipe["kd_teacher's weights"] = kd_teacher.fingerprint.partition("-")[0]
    if args.from_folder:
        folder = Path(args.from_folder)
        recipe["start's weights"] = read_json(folder / "config.json", WRITTEN_AGAIN)["weights"]
    return recipe


def recipe_of_stage(recipe, stage):
    """A recipe without the budgets of the other stages"""
    others = tuple(f"stage {other} " for other in (1, 2, 3) if other != stage)
    return {key: value for key, value in recipe.items() if not key.startswith(others)}


# What recipe_of adds: not known before teacher and data are loaded
LOADED = {"teacher's weights", "kd_teacher's weights", "start's weights", "data's checksums"}


def differences(before, now):
    """Two recipes -> what differs, in words: [] if they are the same. `now` may lack LOADED."""
    return [f"{key} was {before.get(key)}, is {now.get(key)}"
            for key in before | now if before.get(key) != now.get(key)
            and key not in NOT_RECIPE and (key in now or key not in LOADED)]


@contextlib.contextmanager
def stop_on_signals(run):
    """Within, SIGTERM and Ctrl-C only set run.stop: train saves, then stops.

    Clusters send SIGTERM some seconds before they kill. Outside, both end the process at once: what
    was saved is complete at any time.
    """
    def note(number, frame):
        run.stop = number
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Checkpoints:
    """What an unfinished run needs to go on, in out/<run>/last; gone when the run ends.

    run.json                            the recipe, the stages that are finished, the report so far
    <stage>-<step>-<hash>.safetensors   weights, and AdamW's moments of what is trained, whatever
                                        number of processes had them. The newest two stay.
    The learning rate and the data are functions of the step, and nothing else is random: weights,
    moments and the step are all there is to save. Two states are there because the newest may be
    damaged when a machine goes down.
    """

    def __init__(self, folder, rank=0):
        self.folder, self.rank = folder, rank
        self.finished, self.rows = [], {}               # stages; {name: row of the report}

    def find_unfinished(self, recipe, finished, fresh, teacher):
        """Read what is here of an unfinished run, which must have this recipe. Changes no file.

        finished: the stages of this recipe that are there, if no run is unfinished
        """
        self.recipe, self.finished = json.loads(json.dumps(recipe)), finished
        path = self.folder / "run.json"
        if fresh or not path.exists():
            return
        about = read_json(path, "--fresh starts over")
        with damage_in_one_line(path, "--fresh starts over"):
            before = about["recipe"]
            self.finished, self.rows = list(about["finished"]), dict(about["rows"])
            if teacher.has_fingerprint(before["teacher's weights"]):    # in any dtype
                before["teacher's weights"] = self.recipe["teacher's weights"]
        if changed := differences(before, self.recipe):
            raise UsageError(f"{self.folder} holds an unfinished run of another recipe "
                             f"({'; '.join(changed)}): give its command to go on with it, "
                             "or --fresh to start over")

    def check_finished(self, folder, stage):
        """UsageError if a finished stage's folder is gone, damaged, or of another run"""
        before = check_folder(folder).get("recipe", {})
        # Which teacher it was is compared if the stage is loaded.
        before = before | {"teacher's weights": self.recipe["teacher's weights"]}
        changed = differences(recipe_of_stage(before, stage), recipe_of_stage(self.recipe, stage))
        if changed:
            raise UsageError(f"{folder} is of another recipe than this run ({'; '.join(changed)}): "
                             f"{WRITTEN_AGAIN}")

    def record(self, stage=None, **rows):
        """A stage is finished, or a row of the report is known."""
        if stage:
            self.finished.append(stage)
        self.rows |= rows
        if self.rank == 0:
            write_json(self.folder / "run.json", {
                "recipe": self.recipe, "finished": self.finished, "rows": self.rows})
            if stage:                               # its model folder is what counts now
                for state in self.states(f"stage {stage}"):
                    state.unlink()

    def states(self, name):
        """This stage's states, newest first"""
        return sorted(self.folder.glob(f"{name}-*.safetensors"),
                      key=lambda path: -int(path.stem.split("-")[1]))

    def save(self, name, step, seconds, student, params, optimizer):
        """Write the state after `step` steps. All processes call it, rank 0 writes.

        params: {name: p} of those that are trained. The others have no moments.
        """
        tensors = {f"weights.{key}": p.detach() for key, p in student.named_parameters()}
        for key, p in params.items():
            for moment in ("exp_avg", "exp_avg_sq"):                    # AdamW's m and v [2]
                if p in optimizer.state:
                    tensors[f"{moment}.{key}"] = optimizer.state[p][moment]
        # Every process takes part in gathering. Rank 0 moves each tensor to the CPU before the
        # next: a GPU that has a shard of the model need not have room for all of it.
        for key, x in tensors.items():
            gathered = full_tensor(x)
            if self.rank == 0:
                tensors[key] = gathered if gathered is x else gathered.cpu()
        if self.rank == 0:
            self.write(name, step, seconds, tensors)
        barrier()

    def save_and_stop(self, name, step, steps, seconds, student, params, optimizer, number):
        """Save the state after `step` steps, and exit as the signal of this number would have"""
        if step:
            self.save(name, step, seconds, student, params, optimizer)
        stop_now(name, step, steps, number)

    def write(self, name, step, seconds, tensors):
        """A file that is named after its checksum, in one step: no reader meets half of it

        UsageError if it cannot be written. The states before it go only after that.
        """
        partial = self.folder / ".partial"
        try:
            save_file(tensors, partial, metadata={"seconds": str(seconds)})
            flush(partial)
            partial.rename(self.folder / f"{name}-{step}-{file_checksum(partial)}.safetensors")
            flush(self.folder)
        except Exception as error:          # a full disk is an error of half a dozen types
            partial.unlink(missing_ok=True)
            raise UsageError(f"{self.folder}/{name}-{step} could not be saved ({error}); the state "
                             "before it is still there: make room, and the same command goes "
                             "on from it") from error
        for old in self.states(name)[2:]:
            old.unlink()

    def restore(self, name, student, params, optimizer):
        """Load the newest undamaged state of this stage. -> steps done, seconds taken

        A file has every tensor in full, so any number of processes may go on from it. All of them
        read it, one tensor at a time. (set_state_dict of torch.distributed.checkpoint would replace
        moments of 8 bits by fp32 ones, and have old and new moments in memory at once.)
        """
        for path in self.states(name):
            _, step, digest = path.stem.split("-")
            if file_checksum(path) != digest:
                print(f"{name} | {path} is damaged (its checksum differs): it is left out")
                continue
            allocate_moments(params, optimizer)
            with safe_open(path, "pt") as file, torch.no_grad():
                saved = set(file.keys())
                for key, p in student.named_parameters():
                    p.copy_(distribute_like(p, file.get_tensor(f"weights.{key}")))
                for key, p in params.items():
                    state = optimizer.state[p]
                    state["step"].fill_(int(step))      # for Adam's bias correction
                    for moment in ("exp_avg", "exp_avg_sq"):
                        if f"{moment}.{key}" not in saved:      # it never had a gradient
                            continue
                        value = file.get_tensor(f"{moment}.{key}")
                        # copy_ keeps the kind: 8 bits stay 8 bits, shards stay shards
                        state[moment].copy_(distribute_like(p, value))
                seconds = float(file.metadata()["seconds"])
            print(f"{name} | goes on from {path}")
            return int(step), seconds
        return 0, 0.0


def stop_now(name, step, steps, number):
    """End as the signal of this number does, after what was done is saved"""
    print(f"\nstopped by {signal.Signals(number).name} in {name}, after {step} of {steps} steps: "
          "the same command, without --fresh, goes on from here", file=sys.stderr)
    raise SystemExit(128 + number)


def allocate_moments(params, optimizer):
    """A step with zero gradients makes the optimizer allocate its state

    Be it fp32, of 8 bits or in shards: only the optimizer knows which. Its values, and the weights
    that weight decay has shrunk, are overwritten with what was saved.
    """
    for p in params.values():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()


GPUS = {  # FLOP/s in bf16, dense, as the makers say; memory that a process finds, in bytes
    "B200": (2250e12, 178 * 2**30), "H200": (989e12, 139 * 2**30), "H100": (989e12, 78 * 2**30),
    "A100": (312e12, 79 * 2**30), "L40S": (362e12, 44 * 2**30), "4090": (165e12, 23.5 * 2**30),
    "3090": (71e12, 23.5 * 2**30),
}


def peak_of(device, bf16):
    """-> FLOP/s of dense matrix products, by the maker's table or as measured, and which it is"""
    for name, (peak, _) in GPUS.items():
        if device == "cuda" and name in torch.cuda.get_device_name():
            return peak, f"what {name} promises in bf16"
    n = 1024 if device == "cpu" else 8192       # large enough to be bound by the arithmetic
    times = []
    x = torch.ones(n, n, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
    for _ in range(10):
        start = time.perf_counter()
        (x @ x)[0, 0].item()                    # .item() waits for the GPU
        times.append(time.perf_counter() - start)
    # the fastest of ten: the others shared the machine with something
    return 2 * n**3 / min(times), f"measured, {x.dtype} products".replace("torch.", "")


# -----------------------------------------------------------------------------
# many GPUs: torchrun starts one process for each, all with the same command

def init_processes(device):
    """Of the processes that torchrun started, this is one. -> its number, how many there are"""
    if "RANK" not in os.environ:            # torchrun sets it
        return 0, 1
    local = None
    if device == "cuda":
        local = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(local)
    if not dist.is_initialized():
        # The others wait while rank 0 prepares data and trains the tiny teacher.
        dist.init_process_group("nccl" if local else "gloo", device_id=local,
                                timeout=datetime.timedelta(hours=2))
        atexit.register(dist.destroy_process_group)
    if dist.get_rank():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")            # only rank 0 prints
    return dist.get_rank(), dist.get_world_size()


def print_once(text):
    """For what is printed before init_processes silences all ranks but 0"""
    if os.environ.get("RANK", "0") == "0":
        print(text)


def barrier():
    """Wait until all processes are here: none reads a file that rank 0 has not written yet."""
    if dist.is_initialized():
        dist.barrier()


@contextlib.contextmanager
def rank_0_first(run):
    """Rank 0 runs the block first; the others run it after, and find its files."""
    if run.rank:
        barrier()
    try:
        yield
    finally:                                # after an error, too: the others would wait forever
        if run.rank == 0:
            barrier()


def wrap_ddp(loss_fn, student, teacher, run):
    """-> a function of tokens that gives this process's losses, and a context without averaging

    DDP averages the gradient of a parameter once backward has passed it, whichever call to backward
    that is. Its forward only makes the generator, so stages 1 and 2 may go layer by layer: each
    layer's own backward passes its parameters once. What is not trained must be frozen before.
    FSDP2 averages at every backward: gradients in full until the last would cost the memory that
    sharding saves.
    """
    compute_losses = functools.partial(loss_fn, student, teacher)
    if run.world == 1 or run.args.fsdp:
        return compute_losses, contextlib.nullcontext
    module = nn.Module()                    # a student whose forward gives its losses
    module.student = student
    module.forward = compute_losses
    ddp = DistributedDataParallel(module, gradient_as_bucket_view=True)
    return ddp, ddp.no_sync


def compile_and_shard(model, shard, args):
    """--compile compiles each layer, --fsdp shards the model by shard(model)."""
    if args.compile:
        for layer in model.layers:
            layer.compile()
    if args.fsdp and dist.is_initialized():
        shard(model)


def shard_student(student):
    """FSDP2, one shard group for each layer and one for embedding, last norm and head

    A layer's weights are gathered when it is called and freed after. FSDP2 only sees forward(), so
    the other methods that compute with the weights are registered.
    """
    # FSDP2 warns of in-place changes to views among a layer's outputs. There are none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    for layer in student.layers:
        fully_shard(layer)
        for method in ("orientation", "call"):
            register_fsdp_forward_method(layer, method)
    fully_shard(student)
    for method in ("orientation", "block", "hidden", "head", "outputs", "call"):
        register_fsdp_forward_method(student, method)


def shard_teacher(teacher):
    """FSDP2, one shard group for each part of the frozen teacher but its head

    The stages call its parts, not the model, so each part has to be a group of its own. Stage 3
    does not call the head but reads its weights, so each process keeps them whole.
    """
    # The head may share its weight with the embedding, of which only a shard will be left.
    head = teacher.model.lm_head
    head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
    for part in (teacher.decoder.embed_tokens, *teacher.decoder.layers, teacher.final_norm):
        fully_shard(part)


def gather_student(student):
    """The student itself, or a copy on the CPU of one in shards"""
    if not any(isinstance(p, DTensor) for p in student.parameters()):
        return student
    copied = SSM(student.config)
    copied.load_state_dict({name: full_tensor(x).cpu()
                            for name, x in student.state_dict().items()})
    return copied


def full_tensor(x):
    """x in full: gathered from its shards if it has some, and dequantised if it has 8 bits

    All processes have to call it, or those that do wait forever.
    """
    x = x.full_tensor() if isinstance(x, DTensor) else x
    return x.dequantize() if hasattr(x, "codes") else x


def distribute_like(p, x):
    """x, which every process has in full, on p's device and in shards as p is"""
    if isinstance(p, DTensor):
        # None: each process cuts its shard out of its own x, with nothing sent
        return distribute_tensor(x.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
    return x.to(p.device)


# -----------------------------------------------------------------------------
# The command line.

def parse(arguments=None):
    """-> the arguments, with budgets = {stage: tokens, batch, lr, micro_batch}, or UsageError"""
    parser = Parser(__doc__)
    add_method_flags(parser.add_argument)
    add_run_flags(parser.add_argument)
    return resolve(parser.parse_args(arguments))


def add_method_flags(add):
    """What is distilled, from what, and by which recipe"""
    add("--preset", choices=PRESETS, help="a recipe [phi where CUDA is, else tiny]")
    add("--stage", type=int, nargs="+", help="stages to run [1 2 3; with --objective 2 3; with "
        "--from what its student has not had, else 3]")
    add("--teacher", type=nonempty, help="a Hugging Face id or folder, a .gguf file, smollm2, or "
        "tiny")
    add("--data", type=source_of_text, help="stdlib, a file or folder of text, JSONL or Parquet, "
        "or a Hugging Face id")
    add("--stream", action="store_true", help="read the data as it comes, with nothing on disk")
    add("--config", help="which part of a Hugging Face data set")
    add("--recipe", choices=("paper", *PRESETS), help="start, learning rates and schedule, and how "
        "the tokens are split, from this preset; paper is phi's [the preset's own]")
    add("--mixer", default="mamba2", help="what stands where attention was: mamba2, or one of "
        "extras/mixers.py [%(default)s]")
    add("--init", choices=(*INITS, "scratch"), help="how mixers start. mohawk: the paper's way, "
        "convolution and gate the identity, D 1; qkv: that, with the teacher's q, k, v; fit: qkv "
        "with slow decays, fitted to its attention; conv: mohawk, PyTorch's convolution; random: "
        "all as PyTorch's modules; scratch: nothing at all is the teacher's [the recipe's]")
    add("--from", dest="from_folder", type=nonempty, metavar="FOLDER", help="start from the "
        "student in a stage folder of another run [a copy of the teacher]")
    add("--attn_layers", nargs="+", help="numbers of the layers with attention, 4 10 16 22 in the "
        "paper's hybrid [none]. Where the student of --from has a mixer there, it gets the "
        "teacher's attention back. auto:K: K layers in all, those where it misses it most")
    add("--attn_score", choices=("kl", "recall"), help="by which auto chooses: the KL on text, or "
        "on keys to be found again [kl]")
    add("--kd_teacher", type=nonempty, help="whose predictions stage 3 learns: a larger model of "
        "the same vocabulary [the teacher]")
    add("--n_layer", type=count, help="a student of fewer layers [the teacher's]")
    add("--objective", nargs="+", metavar=("NAME", "KEY=VALUE"), help="another loss in stage 2's "
        "place: od, hs, mha, matrix or next, see extras/objectives.py")
    # how much: one value for each stage, or one for all
    add("--tokens", type=count, nargs="+", help="budget; one is split by the recipe [the preset's]")
    add("--batch", type=count, nargs="+", help="tokens per update [the preset's]")
    add("--lr", type=positive, nargs="+", help="peak learning rate [the preset's]")
    # how
    add("--loss", choices=("kl", "ce"), default="kl", help="of stage 3; same gradient [kl]")
    add("--temperature", type=temperature, default=1.0, help="of both predictions in stage 3 [1]")
    add("--hard_weight", type=not_negative, default=0.0, help="of stage 3's next-token loss [0]")
    add("--train", choices=("paper", "mixer"), default="paper",
        help="what is trained: as in the paper, or the mixers only, in stage 3 too [paper]")
    add("--context", type=at_least_one, help="tokens per window [the preset's]")
    add("--warmup", type=fraction, help="share of the steps in which the rate rises [0.1]")
    add("--decay", type=fraction, help="share of the steps in which it falls [the recipe's]")
    add("--betas", type=fraction, nargs=2, default=(0.9, 0.95), help="AdamW's [0.9 0.95]")
    add("--weight_decay", type=not_negative, help="of matrices [the recipe's]")
    add("--clip", type=not_negative, default=1.0, help="largest gradient norm, 0: none [1.0]")
    add("--optimizer", choices=("adamw", "adamw8bit"), default="adamw",
        help="of 8 bits: 2 bytes a parameter instead of 8, needs torchao [%(default)s]")
    add("--teacher_tokens", type=count, default=2_500_000, help="for the tiny one [%(default)s]")


def add_run_flags(add):
    """Where and how it runs"""
    add("--out", type=nonempty, help="folder of the run [out/<preset>]")
    add("--fresh", action="store_true", help="start over, where a run lies")
    add("--seed", type=count, default=0, help="of new weights and of data order [%(default)s]")
    add("--eval_tokens", type=at_least_one, help="validation tokens to read [the preset's]")
    add("--save_minutes", type=not_negative, default=10, help="between two saved states [10]")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"), help="to compute on [auto]")
    add("--micro_batch", type=at_least_one, help="windows at once, at most [the preset's]")
    add("--recompute", action="store_true",
        help="keep one activation a layer for the backward and compute the others again")
    add("--fp32", action="store_true", help="never compute in bf16")
    add("--compile", action="store_true", help="torch.compile each layer of both models")
    add("--fsdp", action="store_true", help="under torchrun, shard both models (else DDP)")


def resolve(args, world=None):
    """Fill in what the preset and the recipe say, check, and work out each stage's budget.

    What a flag gives comes first, then --recipe, then --preset. world: processes [as torchrun says]
    """
    if args.preset is None:
        args.preset, some = ("phi", "a") if torch.cuda.is_available() else ("tiny", "no")
        print_once(f"preset {args.preset}, since there is {some} CUDA device (or choose by "
                   "--preset)")
    preset = dict(PRESETS[args.preset])
    source = "phi" if args.recipe == "paper" else args.recipe or args.preset
    preset |= {name: PRESETS[source][name] for name in RECIPE}
    if args.mixer != "mamba2" and preset["init"] == "fit":
        preset["init"] = "qkv"              # what is fitted is Mamba-2's matrix
    if args.data not in (None, preset["data"]):
        preset["config"] = None             # the preset's is a part of the preset's own data set
    args.stage = args.stage or stages_to_run(args)
    own = {name: getattr(args, name) for name in ("tokens", "batch", "lr")}     # None: not given
    if args.from_folder and args.init:
        raise UsageError(f"--init {args.init} is for a new student, --from has one: leave one out")
    if how_many(args.attn_layers) is not None:
        args.attn_score = args.attn_score or "kl"
    for name, value in preset.items():
        if getattr(args, name, 0) is None:
            setattr(args, name, value)
    refuse(args)
    args.budgets = budgets(args, preset, own, world or int(os.environ.get("WORLD_SIZE", 1)))
    return args


def stages_to_run(args):
    """Without --stage: all three, or with --from those its student has not had, else the third"""
    stages = [2, 3] if args.objective else [1, 2, 3]
    if args.from_folder is None:
        return stages
    folder = Path(args.from_folder)
    known = (folder / "config.json").is_file()          # check_start refuses what is not there
    done = read_about(folder).get("stage") if known else 2
    return [stage for stage in stages if stage > (done or 0)] or [3]


def refuse(args):
    """UsageError for flags that contradict each other"""
    if args.from_folder and Path(args.from_folder).resolve().parent == run_folder(args).resolve():
        raise UsageError(f"--from {args.from_folder} is in the folder of this run: choose another "
                         "--out")
    if how_many(args.attn_layers) is not None and not args.from_folder:
        raise UsageError(f"--attn_layers {args.attn_layers[0]} looks for layers in an aligned "
                         "student: give --from, a stage folder of a run, such as "
                         "out/smollm2/stage2")
    if args.attn_score and how_many(args.attn_layers) is None:
        raise UsageError("--attn_score is for --attn_layers auto:K, which chooses layers")
    if args.kd_teacher and 3 not in args.stage:
        raise UsageError("--kd_teacher is for stage 3: leave it out, or add 3 to --stage")
    if args.data is None:
        raise UsageError(f"--preset {args.preset} brings no text: give --data, a file or folder")
    if set(args.stage) - set(STAGES) or sorted(set(args.stage)) != args.stage:
        raise UsageError(f"--stage {' '.join(map(str, args.stage))}: choose among 1, 2 and 3, "
                         "in this order")
    if args.objective and 2 not in args.stage:
        raise UsageError("--objective takes stage 2's place: leave it out, or add 2 to --stage")
    if args.init == "fit" and args.mixer != "mamba2":
        raise UsageError("--init fit is for --mixer mamba2: choose mohawk, qkv, conv or random")
    if args.warmup + args.decay > 1 + 1e-9:             # 0.7 + 0.3 may be a little more
        raise UsageError(f"--warmup {args.warmup} and --decay {args.decay} are above 1 together: "
                         "the learning rate would never be --lr")
    if max(args.betas) == 1:
        raise UsageError("--betas of 1 never forget: give less")
    if args.context == 1:
        raise UsageError("--context 1: in windows of one token no token follows another")
    if args.teacher_tokens < TINY_BATCH * TINY_CONTEXT:
        raise UsageError(f"--teacher_tokens {args.teacher_tokens:,}: one update takes "
                         f"{TINY_BATCH * TINY_CONTEXT:,}")
    stage_table(args)                       # an objective that is not there, or other keys


def budgets(args, preset, own, world):
    """own: --tokens, --batch and --lr as given -> {stage: tokens, batch, lr, micro_batch}

    UsageError for a batch that cannot be made of windows, or shared among the processes. All
    micro-batches have one size, else the mean of their gradients would not be the batch's.
    """
    shares = [preset["shares"][stage - 1] for stage in args.stage]
    if not own["tokens"] or len(own["tokens"]) == 1:
        all_stages = preset["tokens"] * sum(shares) / sum(preset["shares"])
        total = own["tokens"][0] if own["tokens"] else all_stages
        own["tokens"] = [round(total * share / sum(shares)) for share in shares]
    budgets = {}
    for n, stage in enumerate(args.stage):
        budget = argparse.Namespace()
        for name, values in own.items():    # a flag has a value for each stage of this command,
            at, of = n, len(args.stage)
            if values is None:              # a preset one for each of the three
                values, at, of = preset[name], stage - 1, len(STAGES)
            setattr(budget, name, per_stage(name, values, at, of))
        if budget.batch % args.context or budget.batch == 0:
            raise UsageError(f"--batch {budget.batch} does not divide into windows of --context "
                             f"{args.context}")
        windows = budget.batch // args.context
        if windows % world:
            raise UsageError(f"--batch {budget.batch} is {windows} windows of --context "
                             f"{args.context}, which {world} processes cannot share evenly: "
                             "choose another --batch")
        if budget.tokens < budget.batch:
            raise UsageError(f"stage {stage} has {budget.tokens:,} tokens, less than one batch of "
                             f"{budget.batch:,}: give more --tokens or a smaller --batch")
        budget.micro_batch = math.gcd(args.micro_batch, windows // world)
        budgets[stage] = budget
    return budgets


def per_stage(name, values, n, of):
    """values: one for each of `of` stages, or one for all -> the n-th stage's"""
    if len(values) not in (1, of):
        raise UsageError(f"--{name} has {len(values)} values for {of} stages: give 1, or one each")
    return values[n if len(values) > 1 else 0]


if __name__ == "__main__":
    run_program(main)
