"""The time of a kernel, as its binary lets one expect it: a model, not a measurement.

Run:  python test_ssd.py 90     # registers, spill and shared bytes of each kernel, and this:

    resident   programs that a multiprocessor holds at once
    work       FLOP of the tensor cores (in fp32: of FFMA), counted in the binary, as a multiple of
               what the formulas need. Above 1, warps repeat each other's products, because a
               tile has fewer rows than they take, 16 for each warp. softmax_gap has no product: 0
    bytes      us to move what is read and written, at the bandwidth of the datasheet
    math       us for that FLOP, at the peak of the datasheet; without products, for FFMA's
    issue      us to start the instructions of the loops: a multiprocessor starts four a clock
    chain      us that one warp needs for them if it waits for nothing but its own results, times
               the rounds in which the programs have their turn
    model      us, the largest of the four

bytes and math are bounds from below; issue and chain are estimates of such. A kernel takes longer
where they do not overlap, or where it waits for what the model leaves out: warps that wait for each
other, bank conflicts, what is outside the loops, and caches. It is there so that a first measured
time can be held against it, and so that two configurations can be compared without a GPU.

The names are those of ssd_kernel.py. A head has a state of N rows and P columns; a program takes
`columns` of them, for one head of one document, and Q tokens in each trip of its loop. All at B 8
documents of L 2048 tokens, H 32 heads, each with its own q and k. The kernels:

    forward, backward    y, and the gradients of q, k, v and a
    piece-*              if documents are cut in pieces: what a piece adds to the state, or to the
                         state's gradient
    orientation-*        stage 1's loss, the student's matrix against the teacher's, whose heads are
                         P wide: -rows makes dq, -columns dk. A program for each tile of Q tokens
    softmax_gap          stage 3's loss: 16,384 tokens, V 51,200 words, Q words in a trip

[1] Benchmarking and Dissecting the Nvidia Hopper GPU Architecture, arXiv 2402.13499
"""
import collections
import math
import re
import subprocess

from ssd_kernel import STATE_EVERY

B, L, H, V = 8, 2048, 32, 51_200

# sm_80 is A100 80GB, sm_90 H100 SXM, sm_100 B200. From their datasheets, dense: multiprocessors,
# bytes/s, bf16 FLOP/s, fp32 FLOP/s, the clock in Hz at which the tensor cores reach their peak, and
# the bytes of shared memory in a multiprocessor.
GPU = collections.namedtuple("GPU", "processors bandwidth tensor fp32 clock shared")
GPUS = {80: GPU(108, 2.039e12, 312e12, 19.5e12, 1.41e9, 164 * 1024),
        90: GPU(132, 3.35e12, 989e12, 67e12, 1.83e9, 228 * 1024),
        100: GPU(148, 8e12, 2250e12, 75e12, 1.85e9, 228 * 1024)}

# Clocks from an instruction's start until its result can be read, by how its name begins. They are
# estimates in round numbers, of the size that microbenchmarks such as [1] find. A load of global
# memory (LDG) is one that misses the L2 cache. What is not listed takes FIXED.
LATENCY = {"LDGSTS": 500, "LDG": 500, "LDSM": 33, "LDS": 30, "LDL": 33, "LDTM": 30, "LDC": 30,
           "ULDC": 30, "HMMA": 33, "MOVM": 30, "SHFL": 24, "MUFU": 20, "BAR": 20, "S2R": 20,
           "REDUX": 20, "R2UR": 12, "U": 8}
FIXED = 4

Instruction = collections.namedtuple("Instruction", "name operands guard")


# -----------------------------------------------------------------------------
# Reading SASS, the GPU's assembly

def disassemble(cubin, tools):
    """The name of a binary's file and the folder of nvdisasm -> SASS, as text"""
    return subprocess.run([tools / "nvdisasm", "-c", cubin], capture_output=True, text=True,
                          check=True).stdout


def instructions(sass):
    """-> the instructions up to the first EXIT that all reach, {label: index of what follows}"""
    code = []
    labels = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        found = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?(\w+) )?\s*([\w.]+) *(.*?) *;?$", line)
        if not found:
            continue
        guard, name, operands = found.groups()
        code.append(Instruction(name, operands.split(", "), guard))
        if name == "EXIT" and guard is None:        # behind it stand waits, and padding
            break
    return code, labels


def loops(code, labels):
    """-> the loops that load from memory, as lists of instructions: each outer one, without what
    is in inner ones, and then these. A loop ends in a branch backwards."""
    ends = {}                                       # by start
    for i, x in enumerate(code):
        label = re.search(r"\.L_x_\d+", x.operands[-1])
        if x.name.startswith("BRA") and label and labels.get(label[0], i + 1) <= i:
            ends[labels[label[0]]] = i + 1
    spans = [range(*span) for span in sorted(ends.items())]
    loads = {i for i, x in enumerate(code) if x.name.startswith("LDG")}
    spans = [span for span in spans if loads.intersection(span)]
    bodies = []
    for span in spans:
        inner = set()
        for other in spans:
            if other != span and other.start in span:
                inner.update(other)
        bodies.append([code[i] for i in span if i not in inner])
    return bodies


def width(name, operand=0):
    """Registers of 32 bits that an instruction's result takes (operand 0), or its n-th source"""
    if tile := re.match(r"HGMMA\.(\d+)x(\d+)x16", name):    # of 128 threads
        return 4 if operand == 1 else int(tile[1]) * int(tile[2]) // 128
    if name.startswith("HMMA.16816"):
        return (4, 4, 2, 4)[operand]
    if name.startswith("HMMA"):
        return (4, 2, 1, 4)[operand]
    if vector := re.search(r"\.x(\d+)$", name):             # LDTM and STTM, of tensor memory
        return int(vector[1])
    if matrices := re.search(r"\.M?T?88\.(\d)", name):      # LDSM and STSM
        return int(matrices[1])
    if name.startswith(("LD", "ST")):
        return 4 if ".128" in name else 2 if ".64" in name else 1
    if name.startswith(("FFMA2", "FADD2", "FMUL2", "CS2R")):
        return 2
    return 2 if ".WIDE" in name and operand in (0, 3) else 1


def registers_in(operand, n):
    """-> names of the n registers from the one in an operand on, or of those in an address"""
    names = re.findall(r"\bU?[RP]\d+", operand)
    if "[" in operand:                              # [R2.64+0x10], desc[UR4][R2.64], tmem[UR8]
        n = 2 if ".64" in operand or "gdesc" in operand else 1
    if not names or "P" in names[0]:
        return names
    found = []
    for name in names:
        kind, first = re.fullmatch(r"(\D+)(\d+)", name).groups()
        found += [f"{kind}{int(first) + i}" for i in range(n)]
    return found


def reads_and_writes(x):
    """-> names of the registers that an instruction reads, and of those that it writes

    "mma" and "copy" stand for matrix products and copies that run beside the instructions, until
    one of these waits for them. A wait for products is taken as one for all of them; a wait for
    copies counts if it is for all (0x0), and one that lets the newest go on costs nothing.
    """
    operands = list(x.operands)
    writes = []

    def take_predicates():                          # two of them stand for results, at most
        for _ in range(2):
            if operands and re.fullmatch(r"U?P(\d|T)", operands[0]):
                writes.extend(registers_in(operands.pop(0), 1))

    take_predicates()
    if not re.search("SETP|PLOP", x.name) and operands and re.fullmatch(r"U?R(\d+|Z)", operands[0]):
        writes += registers_in(operands.pop(0), width(x.name))
        take_predicates()
    reads = [x.guard] if x.guard else []
    for n, operand in enumerate(operands, 1):
        n = 0 if x.name.startswith("ST") else n     # what a store reads is as wide as its name
        reads += registers_in(operand, width(x.name, n))
    if "GMMA" in x.name or x.name.startswith("UTCHMMA"):
        writes.append("mma")
    if x.name.startswith("LDGSTS"):
        writes.append("copy")
    if x.name.startswith(("WARPGROUP.DEPBAR", "SYNCS.PHASECHK")):
        reads.append("mma")
    if x.name.startswith("DEPBAR") and x.operands[-1] == "0x0":
        reads.append("copy")
    return reads, writes


# -----------------------------------------------------------------------------
# Counting

def latency(name):
    """Clocks until an instruction's result can be read"""
    if tile := re.match(r"HGMMA\.\d+x(\d+)x16", name):
        # The N / 2 clocks in which all tensor cores of a multiprocessor make 64 x N x 16, at least
        # 24. An estimate, as is the 32 of UTCHMMA.
        return max(24, int(tile[1]) // 2)
    if name.startswith("UTCHMMA"):
        return 32
    return next((cycles for start, cycles in LATENCY.items() if name.startswith(start)), FIXED)


def chain_cycles(body, trips=3):
    """Clocks of a trip: the longest chain of instructions of which each waits for one before it

    A warp starts its instructions in order, at most one a clock, each when its operands are there.
    The last of several trips counts: it waits for results of the one before, too, such as loads
    made a trip ahead.
    """
    ready = collections.Counter()                   # the clock at which a register can be read
    clock = 0
    for _ in range(trips):
        start = clock
        for x in body:
            reads, writes = reads_and_writes(x)
            clock = max([clock + 1] + [ready[r] for r in reads])
            for r in writes:
                done = clock + latency(x.name)
                ready[r] = max(ready[r], done) if r in ("mma", "copy") else done
    return clock - start


def tensor_flop(body, warps):
    """FLOP of the tensor cores in a program's trip"""
    total = 0
    shapes = {}                                     # of products on sm_100, by uniform register
    for x in body:
        if x.name == "UMOV" and x.operands[1].startswith("0x"):
            shapes[x.operands[0]] = int(x.operands[1], 16)
        if tile := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", x.name):       # by four warps
            total += 2 * math.prod(map(int, tile.groups())) * warps // 4
        if tile := re.match(r"HMMA\.168(\d+)", x.name):               # 16 x 8 x .. by one warp
            total += 2 * 16 * 8 * int(tile[1]) * warps
        if x.name == "UTCHMMA":                                         # by one thread for all
            shape = shapes[re.search(r"idesc\[(\w+)\]", ", ".join(x.operands))[1]]
            M = (shape >> 24 & 31) * 16             # fields of PTX's instruction descriptor
            N = (shape >> 17 & 63) * 8
            total += 2 * M * N * 16
    return total


def fp32_flop(body, warps):
    """FLOP of the fused multiply-adds in a program's trip; FFMA2 makes two"""
    counts = collections.Counter(x.name.split(".")[0] for x in body)
    return 2 * 32 * warps * (counts["FFMA"] + 2 * counts["FFMA2"])


def resident_programs(arch, warps, registers, shared, tensor_memory):
    """Programs that a multiprocessor of 65,536 registers and 64 warps holds

    registers: of a thread   shared: bytes   tensor_memory: columns, of 512; only sm_100 has it
    """
    registers = -(-registers // 8) * 8 * 32 * warps             # they come in eights
    most = [65536 // registers, 64 // warps, 32, GPUS[arch].shared // (shared + 1024)]
    if tensor_memory:
        most.append(512 // tensor_memory)
    return min(most)


def trips_of(kernel, Q):
    """Trips of a program, on average, for each loop; a loop within another after that"""
    tiles = L // Q
    return {"forward": [tiles],
            "backward": [tiles, tiles * (STATE_EVERY / Q - 1) / 2],     # from the stored state up
            "piece-forward": [tiles],
            "piece-backward": [tiles],
            "orientation-rows": [(tiles + 1) / 2] * 2,                  # causal: the others are 0
            "orientation-columns": [(tiles + 1) / 2],
            "softmax_gap": [V / Q] * 2}[kernel]


def flop_needed(kernel, Q, N, P, columns):
    """FLOP of a program's trip of each loop, by the formulas, on full tiles"""
    state = 2 * Q * N * columns                     # a product with the state, or into it
    # The backward makes q k^T, dq and dk; dy v^T, twice, and dv. Its second loop goes on from the
    # last stored state.
    return {"forward": [2 * Q * Q * (N + columns) + 2 * state],
            "backward": [6 * Q * Q * (N + columns) + 4 * state, state],
            "piece-forward": [state],
            "piece-backward": [state],
            "orientation-rows": [2 * Q * Q * P, 2 * Q * Q * (P + 2 * N)],
            "orientation-columns": [2 * Q * Q * (P + 2 * N)],
            "softmax_gap": [0, 0]}[kernel]


def bytes_moved(kernel, size, N, P, columns):
    """Bytes that all programs together move, of numbers of `size` bytes

    What several programs read, such as the q and k of a head that is split, counts once.
    """
    split = P // columns    # programs a head: each has a copy of a, in fp32, and its own dq, dk, da
    states = size * N * P / STATE_EVERY
    # q and k of both; dq or dk, in fp32; and three numbers in fp32, a, da and the softmax's lse
    orientation = size * 2 * (N + P) + 4 * N + 12
    if kernel == "softmax_gap":                     # z, in fp32, and z_t twice; dz
        return B * L * V * (2 * (4 + size) + size)
    return B * L * H * {
        "forward": size * 2 * (N + P) + states + 4 * split,
        "backward": size * (2 * N + 3 * P + 2 * N * split) + states + 8 * split,
        "piece-forward": size * (N + P) + 4 * split,
        "piece-backward": size * (N + P) + 4 * split,
        "orientation-rows": orientation,
        "orientation-columns": orientation}[kernel]


def programs_of(kernel, Q, split):
    """How many programs the launch has"""
    if kernel == "softmax_gap":
        return B * L
    return B * H * (L // Q if kernel.startswith("orientation") else split)


def model(sass, arch, kernel, size, N, P, columns, Q, warps, registers, shared, tensor_memory):
    """-> resident programs, work, and in us: bytes, math, issue, chain, model. The header says what
    they are; size is that of a number in bytes, 2 or 4."""
    gpu = GPUS[arch]
    bodies = loops(*instructions(sass))
    trips = trips_of(kernel, Q)
    assert len(bodies) == len(trips), f"{kernel} has {len(bodies)} loops, not {len(trips)}"
    programs = programs_of(kernel, Q, P // columns)
    resident = resident_programs(arch, warps, registers, shared, tensor_memory)
    rounds = -(-programs // (resident * gpu.processors))

    def per_program(count):
        return sum(n * count(body) for n, body in zip(trips, bodies, strict=True))

    tensor = per_program(lambda body: tensor_flop(body, warps))
    work = tensor or per_program(lambda body: fp32_flop(body, warps))
    needed = sum(n * x for n, x in zip(trips, flop_needed(kernel, Q, N, P, columns), strict=True))
    issues = 4 * gpu.processors * gpu.clock         # warps' instructions that a GPU starts a second
    seconds = [bytes_moved(kernel, size, N, P, columns) / gpu.bandwidth,
               programs * work / (gpu.tensor if tensor else gpu.fp32),
               programs * warps * per_program(len) / issues,
               rounds * per_program(chain_cycles) / gpu.clock]
    return [resident, work / needed if needed else 0.0, *(1e6 * s for s in seconds),
            1e6 * max(seconds)]
