"""How long a kernel takes on a GPU, predicted from what it counts: a queue of thread blocks at the units of a
multiprocessor (SM).

A `Machine` holds what one GPU can do, a `Work` what one launch asks for, and `estimate` sets them against each other:

    estimate(machine("h200"), work).text()
    "395.1 us: matrix bound (matrix 361.5, memory 39.0, l2 328.8, latency 6.4, launch 2.5), 1 block per SM, 7.8 waves"

The model. An SM has units: matrix (tensor cores), exp (special functions), vector (float32 lanes) and its share of the
memory. A thread block visits them one after the other and waits for latencies in between; `b` resident blocks do so
independently. How far they hide each other is the throughput of a closed queueing network with `b` customers, which
mean value analysis gives exactly: one block takes the sum of its parts, many take the largest part, two land between.

* `dependent` work (every matrix product waits for vector work and the reverse) visits matrix, exp and vector in turn.
  Otherwise the three overlap within the block, as software pipelining makes them, and the slowest is one unit.
* What stands behind a loop of products is visited after it: the tensor cores of that block wait. A block that goes on
  with the next tile waits for no latency but its first.
* A loop with `stages` of two or more fetches ahead: memory then overlaps with everything, limited by the bytes in
  flight. With one stage memory is one more unit that a block visits.
* The SM with most programs decides: programs come in rounds, and the last one may be small.

What it does not know: bank conflicts, load imbalance between programs of different length, clocks that drift by up to
15 % as the chip warms, inputs that are still in L2. It is for choosing between plans and for telling what bounds one.

Units: microseconds, bytes, operations of a whole launch; GHz, TFLOP/s and TB/s of a whole GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from cascade.errors import CommandError, Diagnostic
from cascade.wording import suggest

WARP = 32  # threads of a warp
SUB_CORES = 4  # of an SM; each has a quarter of the registers, and a warp stays in one
REGISTER_UNIT = 256  # registers are given to a warp in multiples of this
SHARED_UNIT = 128  # bytes; shared memory is given to a block in multiples of this
SHARED_RESERVED = 1024  # bytes of shared memory that the system takes per resident block, from sm_80 on
MAX_REGISTERS = 255  # per thread
MAX_BLOCK_WARPS = 32

EDGE_COLUMNS = 10  # a product of n columns takes the time of n + 10: its left operand is read again for every n
SYNC_EDGE = 16  # the same for products of single warps, in rows and in columns
GROUP_WARPS = 4  # warps of a warpgroup: those of one block drift apart, but not as far as those of two blocks
GROUP_OVERLAP = 0.5  # so a further warpgroup hides half as much as a further block
SHARPNESS = 8.0  # of the soft maximum by which asynchronous memory and the SM overlap; near the crossing both cost
EMPTY_SHARE = 0.1  # of the time lost in the last round: from here on it is worth telling


@dataclass(frozen=True, slots=True)
class Machine:
    """One GPU: what its SMs hold and what it reaches, sustained, not what is printed on the box.

    `matrix_tflops` gives dense TFLOP/s of large products by element type; a type that is not in it is multiplied by
    the float32 lanes. `group_rows` is the number of rows that a warpgroup's asynchronous product needs (0: there are
    none), `sync_share` how much of the rate the products of single warps reach.
    """

    name: str
    arch: str
    sms: int
    clock_ghz: float
    matrix_tflops: Mapping[str, float]
    bandwidth_tbs: float
    l2_mb: float
    l2_bandwidth_tbs: float
    shared_per_sm: int
    shared_per_block: int
    registers_per_sm: int = 65536
    max_warps_per_sm: int = 64
    max_blocks_per_sm: int = 32
    lanes: int = 128  # float32 operations per clock and SM
    exp_per_clock: int = 16  # special functions per clock and SM
    group_rows: int = 64
    sync_share: float = 0.6
    launch_us: float = 2.5  # from one kernel to the next, in a stream or a graph
    latency_us: float = 0.8  # from a load to its data, and the start of a block
    product_latency_clocks: float = 80.0  # from the last operand of a matrix product to its use


def _rates(half: float, eight: float | None, tf32: float, double: float) -> Mapping[str, float]:
    """TFLOP/s by element type from those of 16-bit floats, of 8-bit types (None: no 8-bit floats), of tf32 and f64."""
    rates = {"bf16": half, "f16": half, "tf32": tf32, "i8": 2 * half if eight is None else eight, "f64": double}
    if eight is not None:
        rates |= {"f8e4m3": eight, "f8e5m2": eight}
    return MappingProxyType(rates)


# Measured on an H200: its bf16 rate (large products 769 to 798 TFLOP/s) and its bandwidth (a copy 4.3 TB/s). Fitted to
# kernels timed on it, within 15 % (see the tests): its clock under sustained matrix load, its L2 bandwidth, the
# latencies. In f64 66.9 is nominal: a product of 4096^3 in tiles of 64 runs at 59.2. The other rates, the H100's and
# the A100's figures are nominal ones scaled alike; none was measured.
_H200 = Machine(
    name="h200", arch="sm_90", sms=132, clock_ghz=1.6, matrix_tflops=_rates(790.0, 1500.0, 395.0, 66.9),
    bandwidth_tbs=4.3, l2_mb=60.0, l2_bandwidth_tbs=10.0, shared_per_sm=233472, shared_per_block=232448,
)  # fmt: skip
_H100 = replace(_H200, name="h100", bandwidth_tbs=3.0, l2_mb=50.0)
_A100 = Machine(
    name="a100", arch="sm_80", sms=108, clock_ghz=1.3, matrix_tflops=_rates(265.0, None, 132.0, 19.5),
    bandwidth_tbs=1.8, l2_mb=40.0, l2_bandwidth_tbs=5.0, shared_per_sm=167936, shared_per_block=166912, lanes=64,
    group_rows=0, sync_share=1.0, launch_us=3.0,
)  # fmt: skip

MACHINES: Mapping[str, Machine] = MappingProxyType({m.name: m for m in (_H200, _H100, _A100)})
"""The machines that can be named, by name. The A100 is the one with 80 GB."""

# Shared memory of an SM and warps of an SM, by capability, where they differ from the machine a guess starts from; and
# the speed against that machine.
_SMALLER = {(8, 6): (102400, 48, 0.5), (8, 7): (167936, 48, 0.1), (8, 9): (102400, 48, 0.6), (12, 0): (102400, 48, 0.6)}


def machine(name: str) -> Machine:
    """The machine of that name, in either case; CommandError (C605) with the closest name where there is none."""
    found = MACHINES.get(name.lower())
    if found is None:
        help_line = suggest(name, MACHINES, "the machines are")
        raise CommandError(Diagnostic("C605", f"there is no machine {name!r}", help=help_line))
    return found


def machine_of_arch(arch: str) -> Machine:
    """The machine that files for an architecture are planned for: `sm_90` is an H100, `sm_80` an A100."""
    return _H100 if arch >= "sm_90" else _A100


def machine_for(device_name: str, capability: tuple[int, int]) -> Machine:
    """The machine that a device is, by the name its driver gives ("NVIDIA H200") and its compute capability.

    A device of capability 9.0 that is no H200 counts as an H100, one of 8.0 as an A100. Any other device is a guess
    under its own name: of capability 10.x an H100 twice as fast, else an A100 with the number of warps and the shared
    memory of its capability, scaled. The number of SMs stays that of the machine it starts from. Its occupancy can be
    relied on from capability 8 on; its times rank plans, no more.
    """
    if capability == (9, 0):
        return _H200 if "H200" in device_name.upper().split() else _H100  # a GH200 has the slower memory
    if capability == (8, 0):
        return _A100
    origin = _H100 if capability[0] in (9, 10) else _A100
    shared, warps, speed = _SMALLER.get(capability, (origin.shared_per_sm, origin.max_warps_per_sm, 1.0))
    speed *= 2.0 if capability[0] == 10 else 1.0
    return replace(
        origin,
        name=device_name,
        arch=f"sm_{capability[0]}{capability[1]}",
        matrix_tflops=MappingProxyType({dtype: speed * rate for dtype, rate in origin.matrix_tflops.items()}),
        bandwidth_tbs=speed * origin.bandwidth_tbs,
        l2_bandwidth_tbs=speed * origin.l2_bandwidth_tbs,
        lanes=64 if capability < (8, 6) else 128,
        shared_per_sm=shared,
        shared_per_block=shared - SHARED_RESERVED,
        max_warps_per_sm=warps,
        max_blocks_per_sm=16 if capability in ((8, 6), (8, 7)) else 24 if warps == 48 else 32,
    )


def occupancy_limits(machine: Machine, registers: int, shared_bytes: int, warps: int) -> dict[str, int]:
    """How many blocks of `warps` warps an SM holds, by what limits them: registers, shared memory, warps, block slots.

    `registers` are those of a thread and `shared_bytes` those of a block, static and dynamic. The rules are those of
    CUDA: registers in units of 256 a warp from the quarter of a sub-core, shared memory in units of 128 bytes and 1 KB
    more a block. 0 stands where a block cannot run at all.
    """
    per_warp = max(1, -(-max(1, registers) * WARP // REGISTER_UNIT)) * REGISTER_UNIT
    resident_warps = machine.registers_per_sm // SUB_CORES // per_warp * SUB_CORES
    taken = -(-shared_bytes // SHARED_UNIT) * SHARED_UNIT + SHARED_RESERVED
    return {
        "registers": resident_warps // warps if registers <= MAX_REGISTERS else 0,
        "shared memory": machine.shared_per_sm // taken if shared_bytes <= machine.shared_per_block else 0,
        "warps": machine.max_warps_per_sm // warps if warps <= MAX_BLOCK_WARPS else 0,
        "block slots": machine.max_blocks_per_sm,
    }


def occupancy(machine: Machine, registers: int, shared_bytes: int, warps: int) -> int:
    """How many blocks of `warps` warps are resident on an SM at a time; 0 where a block cannot run at all."""
    return min(occupancy_limits(machine, registers, shared_bytes, warps).values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What one launch does, all its programs together; operations and bytes as numbers of any kind, 0 where none.

    A `vector_flops` is one float32 lane for one clock: an addition, a product, a fused product count 1, a comparison, a
    minimum or maximum and a conversion 2 (they run at half rate). `read_bytes` and `write_bytes` pass
    through DRAM, each byte at least once; `l2_bytes` are read again through L2. The tile is that of the main matrix
    product, m x k by k x n, 0 where there is none. `flight_bytes` are the bytes of loads that one program keeps
    outstanding; 0 lets the tile and the stages tell. `tail_vector` and `tail_exps` of the vector operations and special
    functions stand behind the loop of products, where the tensor cores wait. A program `goes_on` if it loads what the
    next one would while it ends.
    """

    programs: int
    warps: int = 4
    matrix_flops: float = 0.0
    matrix_dtype: str = "bf16"
    vector_flops: float = 0.0
    exps: float = 0.0
    read_bytes: float = 0.0
    write_bytes: float = 0.0
    l2_bytes: float = 0.0
    tile_m: int = 0
    tile_n: int = 0
    tile_k: int = 0
    registers: int = 64
    shared_bytes: int = 0
    stages: int = 1
    dependent: bool = False
    flight_bytes: float = 0.0
    tail_vector: float = 0.0
    tail_exps: float = 0.0
    goes_on: bool = False

    @property
    def in_flight(self) -> float:
        """Bytes of loads that one program keeps outstanding."""
        if self.flight_bytes:
            return self.flight_bytes
        whole = self.read_bytes / max(1, self.programs)
        if not self.tile_k:
            return whole
        size = {"tf32": 4, "f32": 4, "f64": 8, "f8e4m3": 1, "f8e5m2": 1, "i8": 1}.get(self.matrix_dtype, 2)
        columns = self.tile_n if self.dependent else self.tile_m + self.tile_n
        return max(1, self.stages) * columns * self.tile_k * size


@dataclass(frozen=True, slots=True)
class Estimate:
    """The predicted time of a launch, what bounds it, and the time that each unit is busy.

    `parts` are times in us that overlap in part: matrix, exp, vector, memory, l2, latency, launch. `waves` is how
    often the resident blocks are replaced. A kernel that does not fit the SM has no blocks and an infinite time.
    """

    time_us: float
    bound: str
    parts: tuple[tuple[str, float], ...]
    blocks_per_sm: int
    waves: float
    why: str = field(compare=False)

    def text(self) -> str:
        """One line: `52.3 us: matrix bound (matrix 48.1, exp 22.0, launch 2.5), 2 blocks per SM, 3.9 waves`."""
        if not self.blocks_per_sm:
            return f"does not fit: {self.why}"
        shown = ", ".join(f"{name} {us:.1f}" for name, us in self.parts if us >= 0.05)
        blocks = f"{self.blocks_per_sm} block{'s' if self.blocks_per_sm > 1 else ''} per SM"
        return f"{self.time_us:.1f} us: {self.bound} bound ({shown}), {blocks}, {self.waves:.1f} waves"


def estimate(machine: Machine, work: Work) -> Estimate:
    """The time of one launch on the machine, and why; see the module for the model."""
    limits = occupancy_limits(machine, work.registers, work.shared_bytes, work.warps)
    resident = min(limits.values())
    if not resident:
        lacking = min(limits, key=lambda name: limits[name])
        return Estimate(math.inf, lacking, (), 0, math.inf, f"{lacking} of an SM cannot hold one block")
    if work.programs < 1:
        launch = (("launch", machine.launch_us),)
        return Estimate(machine.launch_us, "launch", launch, resident, 0.0, "there are no programs to run")
    units = _unit_times(machine, work)
    latency = 0.0 if work.goes_on else _latency(machine, work)
    memory, l2 = _memory_times(machine, work, resident)
    visited = _visited(machine, work, units, memory * min(machine.sms, work.programs) / work.programs)
    rounds = -(-work.programs // machine.sms)  # programs of the SM that has most
    busy = _rounds_time(visited, latency, rounds, resident, _spread(work))
    fetched = {"l2": l2} if work.stages < 2 else {"memory": memory, "l2": l2}
    body = _soft_maximum((busy, *fetched.values()))
    together = min(float(resident), float(rounds)) * _spread(work)
    parts = {name: us * work.programs / machine.sms for name, us in units.items()}
    waiting = machine.latency_us if work.goes_on else latency * rounds / together
    parts |= {"memory": memory, "l2": l2, "latency": waiting, "launch": machine.launch_us}
    # What is fetched ahead bounds a kernel only where it takes longer than the SM does, its waits included.
    bounding = [name for name in parts if name not in fetched or fetched[name] >= busy]
    bound = max(bounding, key=lambda name: parts[name])
    total = body + machine.launch_us + (machine.latency_us if work.goes_on else 0.0)
    waves = work.programs / (machine.sms * resident)
    why = _why(machine, work, limits, bound, parts[bound] / total)
    return Estimate(total, bound, tuple(parts.items()), resident, waves, why)


def _efficiency(machine: Machine, work: Work) -> float:
    """How much of the rate of large products the tile reaches, from 0 to 1; unknown sides count as 128."""
    m, n = work.tile_m or 128, work.tile_n or 128
    if work.matrix_dtype == "f64":
        return 1.0  # it takes so long that operands are read beside it
    grouped = machine.group_rows and m >= machine.group_rows and n >= 16 and work.warps % GROUP_WARPS == 0
    if grouped:
        return n / (n + EDGE_COLUMNS)
    return machine.sync_share * m / (m + SYNC_EDGE) * n / (n + SYNC_EDGE)


def _unit_times(machine: Machine, work: Work) -> dict[str, float]:
    """Microseconds for which one program keeps each unit of its SM busy."""
    clocks = machine.clock_ghz * 1e3  # in a microsecond
    vector, matrix = work.vector_flops, 0.0
    rate = machine.matrix_tflops.get(work.matrix_dtype)
    if rate is None:
        vector += work.matrix_flops / 2  # one fused product and addition on a lane
    elif work.matrix_flops:
        matrix = work.matrix_flops / (rate * 1e6 / machine.sms * _efficiency(machine, work))
    times = {
        "matrix": matrix,
        "exp": work.exps / (machine.exp_per_clock * clocks),
        "vector": vector / (machine.lanes * clocks),
    }
    return {name: us / work.programs for name, us in times.items()}


def _latency(machine: Machine, work: Work) -> float:
    """Microseconds in which one program waits for nothing but latency: its first data, without fetching ahead each
    further load too, and each product that other work depends on."""
    loads = 1.0
    if work.stages < 2 and work.in_flight:
        loads = max(1.0, work.read_bytes / work.programs / work.in_flight)
    if not (work.dependent and work.matrix_flops):
        return machine.latency_us * loads
    tile = 2.0 * (work.tile_m or 128) * (work.tile_n or 128) * (work.tile_k or 64)
    products = work.matrix_flops / work.programs / tile
    return machine.latency_us * loads + products * machine.product_latency_clocks / (machine.clock_ghz * 1e3)


def _memory_times(machine: Machine, work: Work, resident: int) -> tuple[float, float]:
    """Microseconds of DRAM, for fetching ahead limited by the bytes in flight, and of L2, limited by the busy SMs."""
    bandwidth = machine.bandwidth_tbs * 1e6  # bytes in a microsecond
    memory = (work.read_bytes + work.write_bytes) / bandwidth
    if work.stages >= 2 and work.in_flight:  # else the latency of each load counts where programs wait for it
        flight = min(work.programs, machine.sms * resident) * work.in_flight
        waited = work.read_bytes * machine.latency_us / flight
        memory = math.hypot(work.read_bytes / bandwidth, waited) + work.write_bytes / bandwidth
    ports = machine.l2_bandwidth_tbs * 1e6 * min(1.0, work.programs / machine.sms)
    return memory, (work.read_bytes + work.write_bytes + work.l2_bytes) / ports


def _visited(machine: Machine, work: Work, units: Mapping[str, float], memory: float) -> tuple[float, ...]:
    """Microseconds at each unit that one program visits in turn; what stands behind a loop is one more."""
    if work.dependent:
        computing = tuple(units.values())
    else:
        clocks = machine.clock_ghz * 1e3 * work.programs
        vector, exps = work.tail_vector / machine.lanes / clocks, work.tail_exps / machine.exp_per_clock / clocks
        computing = (max(units["matrix"], units["exp"] - exps, units["vector"] - vector), max(vector, exps))
    return (*computing, memory) if work.stages < 2 else computing


def _spread(work: Work) -> float:
    """For how many independent programs one resident block counts: warpgroups of dependent products drift apart.

    Products in f64 are those of single warps, which wait for nobody.
    """
    further = max(0, work.warps // GROUP_WARPS - 1) if work.dependent else 0
    return 1.0 + (1.0 if work.matrix_dtype == "f64" else GROUP_OVERLAP) * further


def _rounds_time(visited: tuple[float, ...], latency: float, programs: int, resident: int, spread: float) -> float:
    """Microseconds for one SM to run `programs` programs, `resident` at a time; the last round may hold fewer."""
    full, rest = divmod(programs, resident)
    time = full * resident / _throughput(visited, latency, resident * spread) if full else 0.0
    return time + (rest / _throughput(visited, latency, rest * spread) if rest else 0.0)


def _throughput(visited: tuple[float, ...], latency: float, population: float) -> float:
    """Programs per microsecond when `population` of them share the units: exact mean value analysis.

    A program that arrives at a unit finds there what one program fewer would leave on average. Between two whole
    numbers the throughput is interpolated.
    """
    queues = [0.0] * len(visited)
    before = after = 0.0
    for count in range(1, math.ceil(population) + 1):
        times = [time * (1.0 + queue) for time, queue in zip(visited, queues, strict=True)]
        before, after = after, count / (latency + sum(times))
        queues = [after * time for time in times]
    share = population - math.floor(population)
    return before + (after - before) * share if share else after


def _soft_maximum(times: tuple[float, ...]) -> float:
    """A little more than the largest time where others come close, as what overlaps in theory also collides."""
    largest = max(times)
    crowd = math.fsum((time / largest) ** SHARPNESS for time in times)
    return float(largest * crowd ** (1.0 / SHARPNESS))


def _why(machine: Machine, work: Work, limits: Mapping[str, int], bound: str, share: float) -> str:
    """One line for a reader: how busy the busiest unit is, what limits the resident blocks, what the tail loses."""
    blocks = min(limits.values())
    limit = next(name for name, count in limits.items() if count == blocks)
    if bound == "launch":
        said = f"launching takes {share:.0%} of the time"
    elif bound == "latency":
        said = f"waiting for latency takes {share:.0%} of the time"
    else:
        said = f"{bound} is busy for {share:.0%} of the time"
    said += f"; {limit} allow{'s' if limit == 'shared memory' else ''} {blocks} block{'s' if blocks > 1 else ''} per SM"
    rounds = -(-work.programs // machine.sms)
    empty = 1.0 - work.programs / (rounds * machine.sms)
    return said + (f"; {empty:.0%} of the SMs' time is lost to uneven rounds" if empty >= EMPTY_SHARE else "")
