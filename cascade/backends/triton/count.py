"""What one launch of a kernel does, counted from its plan: operations, bytes, trips, registers, shared memory.

    work(kernel, {"M": 4096, "N": 4096, "B": 4, "H": 32})   -->   a `Work` for the machine model

Every op of the plan is gone through once and counts as often as it runs, over the tile as it lies: what a tile has
beyond an extent is computed as well, but neither read nor written. How often a loop goes round is the sum over the
programs of what its bounds come to there, so half of a triangle is half the work. A bound that only data tells counts
as the end of its axis.

Registers and shared memory are guesses, within a few percent where they decide how many programs an SM holds: the
tiles that are live at the same time, and the operands of products that a loop fetches ahead.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, assert_never

from cascade.backends.triton.lower import uses
from cascade.backends.triton.machine import MAX_REGISTERS, WARP, Work
from cascade.backends.triton.plan import (
    BYTES,
    EIGHT,
    Axis,
    Carry,
    Dot,
    Fold,
    Keep,
    Kernel,
    Let,
    Load,
    Loop,
    Mask,
    Op,
    Redo,
    Role,
    Scan,
    Seen,
    Start,
    Store,
    Tensor,
    TopKept,
    every_op,
    in_eights,
)  # fmt: skip
from cascade.inference import FLOATS
from cascade.ir import Apply, Cast, Const, DType, Expr, Extent, Local, Rank, Size
from cascade.walk import walk

MOST_PLACES = 1024  # of a grid at which bounds are evaluated; of a larger one that many, evenly spread
PLAIN_REGISTERS = 28  # of a thread for addresses, counters and states of one dimension
SECTOR = 32  # bytes; less than that is never read
LINE = 128  # bytes that L2 moves at once: of a shorter run of neighbours the rest is moved in vain
MMA_ROWS, MMA_COLUMNS = 16, 8  # that a warp multiplies at a time
GROUP_SIDE = 64  # rows of a product whose left operand may stay in registers
FRAGMENTS = 64  # registers for operands of a product in f64, at most: those of a longer one come in turns
TO_F64 = 8.0  # lanes that a conversion to f64 takes: 16 of them a clock
QUAD = 4  # threads that hold the same row of a product: what is computed per row is computed by each of them
SHUFFLE = 4.0  # lanes that an exchange between the threads of a warp takes
NETWORK = 19  # comparisons that sort eight
EXTREME = 2.0  # lanes that a minimum, a maximum or a comparison takes: they run at half rate

LANES = {
    "min": EXTREME, "max": EXTREME, "eq": EXTREME, "ne": EXTREME, "lt": EXTREME, "le": EXTREME, "gt": EXTREME,
    "ge": EXTREME, "relu": EXTREME, "clamp": 2 * EXTREME, "select": 1.0, "floordiv": 8.0, "mod": 8.0, "div": 8.0,
    "sqrt": 6.0, "sin": 12.0, "cos": 12.0, "erf": 20.0, "gelu": 11.0, "silu": 4.0, "sigmoid": 3.0, "tanh": 4.0,
    "exp": 11.0, "pow": 8.0, "round": 2.0, "sign": 4.0,
}  # fmt: skip
"""Lanes that an operation takes per element, where it is not one."""

SPECIAL = {
    "exp": 1.0, "exp2": 1.0, "log": 1.0, "log2": 1.0, "rsqrt": 1.0, "sqrt": 1.0, "div": 1.0, "sin": 1.0, "cos": 1.0,
    "tanh": 1.0, "sigmoid": 2.0, "silu": 2.0, "pow": 2.0, "erf": 1.0, "gelu": 1.0,
}  # fmt: skip
"""Special functions that an operation takes per element, where there are any."""


def work(
    kernel: Kernel, sizes: Mapping[str, int], registers: int | None = None, shared_bytes: int | None = None
) -> Work:
    """What a launch does for these sizes of shape symbols; registers a thread and bytes a program are guessed if None.

    Where more registers are wanted than a thread can have, the rest is written to memory and read again in every
    round of a loop.
    """
    count = _Count(kernel, sizes)
    loops = [place for place, op in enumerate(kernel.ops) if isinstance(op, Loop)] if _ahead(kernel) else []
    behind = loops[-1] + 1 if loops else len(kernel.ops)
    count.ops(kernel.ops[:behind], _Run(float(count.programs)))
    before = count.vector, count.exps
    count.ops(kernel.ops[behind:], _Run(float(count.programs)))
    wanted = registers if registers is not None else live_registers(kernel)
    spilled = max(0, wanted - MAX_REGISTERS) * 4 * WARP * kernel.options.num_warps * 2.0
    read = sum(min(total, _held(tensor, sizes)) for tensor, total in count.loaded.items())
    main = count.main
    product = count.products[main] if main is not None else None
    return Work(
        programs=count.programs,
        warps=kernel.options.num_warps,
        matrix_flops=count.matrix,
        matrix_dtype=_matrix_type(kernel, main) if main is not None else "bf16",
        vector_flops=count.vector,
        exps=count.exps,
        read_bytes=read,
        write_bytes=count.written,
        l2_bytes=sum(count.loaded.values()) - read + count.vain + spilled * max(count.rounds, float(count.programs)),
        tile_m=product[0] if product else 0,
        tile_n=product[1] if product else 0,
        tile_k=product[2] if product else 0,
        registers=min(wanted, MAX_REGISTERS),
        shared_bytes=shared_bytes if shared_bytes is not None else shared_memory(kernel),
        stages=kernel.options.num_stages if _ahead(kernel) else 1,
        dependent=dependent(kernel.ops),
        flight_bytes=_flight(kernel),
        tail_vector=count.vector - before[0] + count.waiting[0],
        tail_exps=count.exps - before[1] + count.waiting[1],
        goes_on=kernel.options.resident > 0,
    )


# --- how often a loop goes round -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trips:
    """How often a loop goes round, all programs together: with whole tiles, and with tests for each coordinate."""

    whole: float
    edge: float

    @property
    def total(self) -> float:
        """All rounds."""
        return self.whole + self.edge


def trips(kernel: Kernel, loop: Loop, sizes: Mapping[str, int]) -> Trips:
    """How often a loop of a kernel goes round in all programs of a launch."""
    scalars = {op.name: op.expr for op in every_op(kernel.ops) if isinstance(op, Let) and not op.axes}
    bounds = tuple(
        None if bound is None else _inlined(bound, scalars) for bound in (loop.first, loop.stop, *(loop.inner or ()))
    )
    named = {word for bound in bounds if bound is not None for word in _words(bound)}
    concerned = tuple(
        (axis, _number(axis.extent, sizes))
        for axis in kernel.grid
        if axis.role is not Role.STREAM and named & {axis.rank, f"{axis.rank}_first", f"{axis.rank}_last"}
    )
    known = tuple((word, sizes[word]) for word in sorted(named & set(sizes)))
    axis = kernel.axis(loop.rank)
    others = programs(kernel, sizes) / math.prod(_steps(axis, extent) for axis, extent in concerned)
    extent = _number(axis.extent, sizes)
    found = _trips(bounds, loop.edges, loop.edge_tile, axis.tile, extent, concerned, known)
    shared = others / axis.parts
    return Trips(found.whole * shared, found.edge * shared)


def rounds(kernel: Kernel, sizes: Mapping[str, int]) -> float:
    """How often all loops of a kernel go round in all programs of a launch; of nested ones, those inside."""
    found = 0.0
    for op in kernel.ops:
        if isinstance(op, Loop) and op.unless is None:
            nested = [_steps(axis, _number(axis.extent, sizes)) for axis in _nested(kernel, op)]
            found += trips(kernel, op, sizes).total * (sum(nested) if nested else 1)
    return found


def _nested(kernel: Kernel, loop: Loop) -> list[Axis]:
    """The axes of the loops in each round of a loop."""
    return [kernel.axis(op.rank) for op in loop.body if isinstance(op, Loop)]


@functools.lru_cache(1024)
def _trips(
    bounds: tuple[Expr | None, ...],
    edges: bool,
    edge_tile: int,
    tile: int,
    extent: int,
    concerned: tuple[tuple[Axis, int], ...],
    known: tuple[tuple[str, int], ...],
) -> Trips:
    """The rounds over all places of a grid: the loops that the text of a kernel has, counted."""
    functions = [None if bound is None else _function(bound) for bound in bounds]
    counts = [_steps(axis, extent_) for axis, extent_ in concerned]
    places = math.prod(counts)
    stride = max(1, -(-places // MOST_PLACES))
    whole = edge = visited = 0
    for place in range(0, places, stride):
        values = dict(known)
        rest = place
        for (axis, end), steps in zip(concerned, counts, strict=True):
            rest, at = divmod(rest, steps)
            first = at * axis.advance
            values |= {axis.rank: at, f"{axis.rank}_first": first, f"{axis.rank}_last": min(first + axis.tile, end) - 1}
        at_place = [None if function is None else function(values) for function in functions]
        inside, tested = _rounds(at_place, edges, edge_tile or tile, tile, extent)
        whole, edge, visited = whole + inside, edge + tested, visited + 1
    return Trips(whole * places / visited, edge * places / visited)


def _rounds(bounds: Sequence[int | None], edges: bool, edge_tile: int, tile: int, extent: int) -> tuple[int, int]:
    """The rounds of one program: with whole tiles, and with tests."""
    first, stop, *inner = bounds
    start = max(first or 0, 0) // tile * tile
    end = extent if stop is None else min(stop, extent)
    if not edges or not inner:
        rounds = max(0, -(-(end - start) // tile))
        return (0, rounds) if edges else (rounds, 0)
    begin = start if inner[0] is None else min(max(-(-inner[0] // tile) * tile, start), -(-end // tile) * tile)
    last = end if inner[1] is None else min(inner[1], end)
    until = max(last // tile * tile, begin)
    tested = max(0, -(-(begin - start) // edge_tile)) + max(0, -(-(end - until) // edge_tile))
    return (until - begin) // tile, tested


def _inlined(expr: Expr, scalars: Mapping[str, Expr]) -> Expr:
    """An expression with the scalars of the kernel in their own words."""
    if isinstance(expr, Local) and expr.name in scalars:
        return _inlined(scalars[expr.name], scalars)
    if isinstance(expr, Apply):
        return Apply(expr.op, tuple(_inlined(arg, scalars) for arg in expr.args))
    return expr


def _words(expr: Expr) -> Iterator[str]:
    return (node.name for node in walk(expr) if isinstance(node, (Rank, Local, Extent)))


def _function(expr: Expr) -> Callable[[Mapping[str, int]], int | None]:
    """An integer expression as a function of the values of its names; None where one is not known.

    The lesser of a number and something unknown is the number: bounds err on the side of more work.
    """
    match expr:
        case Const():
            value = int(expr.value) if math.isfinite(expr.value) else None
            return lambda values: value
        case Rank() | Local() | Extent():
            name = expr.name
            return lambda values: values.get(name)
        case Apply(op="min" | "max"):
            parts, choose = tuple(map(_function, expr.args)), min if expr.op == "min" else max

            def extreme(values: Mapping[str, int]) -> int | None:
                found = [value for part in parts if (value := part(values)) is not None]
                return choose(found, default=None)

            return extreme
        case Apply() if expr.op in INTEGERS:
            operation, arguments = INTEGERS[expr.op], tuple(map(_function, expr.args))

            def applied(values: Mapping[str, int]) -> int | None:
                found = [argument(values) for argument in arguments]
                known = [value for value in found if value is not None]
                return operation(*known) if len(known) == len(found) else None

            return applied
        case _:
            return lambda values: None


INTEGERS: dict[str, Callable[..., int]] = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "floordiv": lambda a, b: a // b if b else 0, "mod": lambda a, b: a % b if b else 0,
    "select": lambda test, a, b: a if test else b,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
}  # fmt: skip


def programs(kernel: Kernel, sizes: Mapping[str, int]) -> int:
    """The programs of a launch."""
    return math.prod(
        axis.parts if axis.role is Role.STREAM else _steps(axis, _number(axis.extent, sizes)) for axis in kernel.grid
    )


def _steps(axis: Axis, extent: int) -> int:
    """The programs along an axis of the grid."""
    return -(-extent // axis.advance)


def _number(size: Size, sizes: Mapping[str, int]) -> int:
    return size if isinstance(size, int) else sizes[size]


def read_in_waves(kernel: Kernel, sizes: Mapping[str, int], at_once: int) -> float:
    """Bytes that loads bring from DRAM where `at_once` programs run at a time and L2 keeps only what those share."""
    distinct = _distinct(kernel, sizes, at_once)
    shares: dict[str, float] = {}
    for op in every_op(kernel.ops):
        if isinstance(op, Load):
            known = {node.name.removesuffix("_first").removesuffix("_last") for part in op.index for node in walk(part)
                     if isinstance(node, (Rank, Local))}  # fmt: skip
            share = math.prod(count for rank, count in distinct.items() if rank in known) / at_once
            shares[op.tensor] = max(share, shares.get(op.tensor, 0.0))
    count = _Count(kernel, sizes)
    count.ops(kernel.ops, _Run(float(count.programs)))
    return sum(
        min(total, max(_held(tensor, sizes), total * shares[tensor.name])) for tensor, total in count.loaded.items()
    )


def _distinct(kernel: Kernel, sizes: Mapping[str, int], at_once: int) -> dict[str, float]:
    """How many tiles of each axis of the grid `at_once` neighbouring programs have together."""
    nested = any(axis.role is Role.INNER for axis in kernel.axes)  # then parts of the stream are like tiles of it
    steps = {
        axis.rank: float(axis.parts if axis.parts > 1 else _steps(axis, _number(axis.extent, sizes)))
        for axis in kernel.grid
        if axis.parts == 1 or nested
    }
    found: dict[str, float] = {}
    rest, ranks = float(at_once), list(steps)
    if kernel.options.grouped:
        first, second = ranks[:2]
        beside = min(float(kernel.options.grouped), steps[first])
        columns = min(steps[second], max(1.0, rest / beside))
        found = {first: min(steps[first], max(beside, rest / columns)), second: columns}
        rest, ranks = rest / (steps[first] * steps[second]), ranks[2:]
    for rank in ranks:
        found[rank] = min(steps[rank], max(1.0, rest))
        rest /= steps[rank]
    return found


# --- operations and bytes --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Run:
    """How often ops run in all programs together, and those that stand only at edges; the tile of the stream there."""

    times: float
    edge: float = 0.0  # of them with tests
    stream: str = ""
    edge_tile: int = 0


@dataclass(slots=True, eq=False)
class _Count:
    """The sums over all ops of a kernel."""

    kernel: Kernel
    sizes: Mapping[str, int]
    programs: int = field(init=False)
    variables: dict[str, tuple[tuple[str, ...], DType]] = field(init=False)
    quads: bool = field(init=False)  # whether tiles lie as products leave them
    matrix: float = 0.0
    vector: float = 0.0
    exps: float = 0.0
    written: float = 0.0
    rounds: float = 0.0  # of all loops
    waiting: tuple[float, float] = (0.0, 0.0)  # vector operations and exponentials behind loops within a loop
    vain: float = 0.0  # bytes through L2 beyond those that were asked for
    loaded: dict[Tensor, float] = field(default_factory=dict)  # bytes, each as often as it is loaded
    products: dict[Dot, tuple[int, int, int]] = field(default_factory=dict)
    weights: dict[Dot, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.programs = programs(self.kernel, self.sizes)
        self.variables = {name: (axes, dtype) for name, axes, dtype in self.kernel.variables}
        self.quads = any(isinstance(op, Dot) for op in every_op(self.kernel.ops))

    @property
    def main(self) -> Dot | None:
        """The first of the largest products."""
        return max(self.weights, key=lambda dot: self.weights[dot], default=None)

    def ops(self, ops: Sequence[Op], run: _Run) -> None:
        """Counts ops that run as often as that."""
        for op in ops:
            self.op(op, run)

    def op(self, op: Op, run: _Run) -> None:
        """Counts one op."""
        match op:
            case Loop(unless=str()):  # of rows that have nothing, and with no product
                pass
            case Loop():
                self.loop(op, run)
            case Load():
                self.load(op, run)
            case Store():
                self.spend(op.expr, run)
                tensor = self.tensor(op.tensor)
                self.lanes(op.axes, 1.0, run)
                size = self.moved(op.axes, run) * BYTES[tensor.dtype]
                self.written += size
                self.vain += size * self.waste(op, tensor)
            case Dot():
                self.dot(op, run)
            case Let():
                copies = self.copies(op.name)
                copied = replace(run, times=run.times * copies, edge=run.edge * copies)
                self.spend(op.expr, copied)
                self.lanes(op.axes, 1.0 if op.dtype is not None else 0.0, copied)
            case Mask():
                for test in (*op.live, *op.edge):
                    self.spend(test, self.only(run, test in op.edge))
            case Keep():
                self.lanes(op.axes, 1.0, self.only(run, op.edge))
            case Seen():
                self.lanes(self.variables[op.mask][0], EXTREME, self.only(run, op.edge))
            case Fold():
                each = EXTREME if op.reducer not in ("sum", "prod", "count") else 1.0
                self.fold(op, 2 * each if op.nan else each, run)
            case Scan():
                self.scan(op, run)
            case Redo():
                self.lanes(op.axes, EXTREME, run)  # whether all is finite: the steps themselves are not foreseen
            case TopKept():
                self.lanes(self.variables[op.source][0], self.top_kept(op), run)
            case Start() | Carry():
                pass
            case _:
                assert_never(op)

    def top_kept(self, op: TopKept) -> float:
        """Lanes an element: a maximum, a comparison and a choice for each of the largest; or a network, and moves."""
        if not in_eights(self.kernel, op):
            return 3 * EXTREME * op.count
        moves = sum(max(1, EIGHT - position) for position in range(op.count))
        return (2 * EXTREME * NETWORK + 3 * EXTREME * op.count + moves) / EIGHT

    def loop(self, op: Loop, run: _Run) -> None:
        """Counts a loop; what stands in its rounds behind a loop of their own, the products of that wait for."""
        axis = self.kernel.axis(op.rank)
        if axis.role is Role.INNER:
            steps = _steps(axis, _number(axis.extent, self.sizes))
            self.rounds += run.times * steps
            self.ops(op.body, _Run(run.times * steps, run.edge * steps, run.stream, run.edge_tile))
            return
        found = trips(self.kernel, op, self.sizes)
        inside = _Run(found.total, found.edge, op.rank, op.edge_tile if op.inner is not None else 0)
        if not _nested(self.kernel, op):
            self.rounds += found.total
            self.ops(op.body, inside)
            return
        self.ops([inner for inner in op.body if isinstance(inner, Loop)], inside)
        before = self.vector, self.exps
        self.ops([inner for inner in op.body if not isinstance(inner, Loop)], inside)
        self.waiting = self.waiting[0] + self.vector - before[0], self.waiting[1] + self.exps - before[1]

    def only(self, run: _Run, edge: bool) -> _Run:
        """The runs of an op that may stand only at edges."""
        return _Run(run.edge, run.edge, run.stream, run.edge_tile) if edge else run

    def tensor(self, name: str) -> Tensor:
        return next(tensor for tensor in self.kernel.tensors if tensor.name == name)

    def elements(self, axes: Sequence[str] | set[str], run: _Run) -> float:
        """The elements of a tile over these axes, in all runs together; the tile of the stream is smaller at edges."""
        size = math.prod(self.kernel.axis(rank).tile for rank in axes)
        if not (run.stream in axes and run.edge_tile):
            return size * run.times
        small = size / self.kernel.axis(run.stream).tile * run.edge_tile
        return size * (run.times - run.edge) + small * run.edge

    def moved(self, axes: Sequence[str], run: _Run) -> float:
        """The elements of a tile that exist, in all runs together."""
        found = self.elements(axes, run)
        for rank in axes:
            axis = self.kernel.axis(rank)
            extent = _number(axis.extent, self.sizes)
            tiles = 1 if axis.role is Role.WHOLE else _steps(axis, extent)
            found *= min(1.0, extent / (tiles * axis.tile))
        return found

    def lanes(self, axes: Sequence[str] | set[str], each: float, run: _Run) -> None:
        self.vector += each * self.computed(axes, run)

    def computed(self, axes: Sequence[str] | set[str], run: _Run) -> float:
        """The elements that threads compute, in all runs together: the rows of a product in several threads each."""
        return self.elements(axes, run) * (QUAD if self.quads and len(axes) == 1 else 1)

    def load(self, op: Load, run: _Run) -> None:
        tensor = self.tensor(op.tensor)
        size = self.moved(op.axes, run) * BYTES[tensor.dtype] / _stands_for(op)
        size = max(size, 0.0 if op.axes else run.times * SECTOR)
        self.loaded[tensor] = self.loaded.get(tensor, 0.0) + size
        self.vain += size * self.waste(op, tensor)
        for test in (*op.live, *(op.edge if op.box is None else ())):
            self.spend(test, self.only(run, test in op.edge))

    def waste(self, op: Load | Store, tensor: Tensor) -> float:
        """Bytes that are moved in vain for each that is asked for: neighbours in memory of which a tile has few."""
        if not op.axes or tensor.strides[-1] != 1:
            return 0.0
        last = op.index[-1]
        if isinstance(op, Load) and op.grouped is not None and isinstance(last, Apply):
            last = last.args[0]
        axis = self.kernel.axis(last.name) if isinstance(last, Rank) else None
        run = axis.tile // _stands_for(op) if axis is not None else 1
        if run >= _number(tensor.shape[-1], self.sizes) or (axis is None and len(op.axes) > 1):
            return 0.0  # whole rows, or who knows
        return max(0.0, LINE / (run * BYTES[tensor.dtype]) - 1.0)

    def fold(self, op: Fold, each: float, run: _Run) -> None:
        """A reduction: within each thread, then by exchanges between the threads that share a row."""
        axes = self.spend(op.expr, run) | set(op.over) | set(op.axes)
        self.lanes(axes, each, run)
        sharing = QUAD if self.quads else WARP
        rows = self.elements(op.axes, run) * QUAD if self.quads else WARP * self.kernel.options.num_warps * run.times
        self.vector += rows * math.log2(sharing) * (SHUFFLE + each)

    def scan(self, op: Scan, run: _Run) -> None:
        """A scan: within each thread and once more with what stands before it, by exchanges between threads."""
        each = {"sum": 1.0, "affine": 2.0, "drift": 12.0}.get(op.kind, EXTREME)
        self.lanes(op.axes, 2 * each, run)
        rows = WARP * self.kernel.options.num_warps * run.times
        self.vector += rows * math.log2(WARP) * (SHUFFLE * len(op.names) + each)

    def dot(self, op: Dot, run: _Run) -> None:
        rows, columns, over = (self.kernel.axis(rank).tile for rank in (*op.axes, op.over))
        flops = 2.0 * self.elements({*op.axes, op.over}, run)
        self.matrix += flops
        self.products[op] = (rows, columns, over)
        self.weights[op] = flops
        if op.exact:
            down, across = _warps(self.kernel, op)
            self.lanes({op.axes[0], op.over}, across * TO_F64, run)
            self.lanes({op.axes[1], op.over}, down * TO_F64, run)

    def copies(self, name: str) -> int:
        """How many warps compute the same element: of a small product's operand each one all that it multiplies."""
        warps = self.kernel.options.num_warps
        for op in every_op(self.kernel.ops):
            if isinstance(op, Dot) and name in (op.left, op.right):
                rows, columns = (self.kernel.axis(rank).tile for rank in op.axes)
                if rows >= GROUP_SIDE and warps % 4 == 0:
                    return 1
                down = min(warps, max(1, rows // MMA_ROWS))
                return warps // down if name == op.left else max(down, warps * MMA_COLUMNS // columns)
        return 1

    def spend(self, expr: Expr, run: _Run) -> set[str]:
        """Counts an expression; its axes. Each operation counts over its own axes, as it is computed there."""
        match expr:
            case Const() | Extent():
                return set()
            case Rank():
                return set() if self.kernel.axis(expr.name).role is Role.POINT else {expr.name}
            case Local():
                axes, dtype = self.variables.get(expr.name, ((), DType.I32))
                if dtype in FLOATS and dtype is not DType.F32:
                    self.lanes(axes, 1.0, run)  # widened
                return set(axes)
            case Cast():
                axes_ = self.spend(expr.arg, run)
                self.lanes(axes_, 1.0, run)
                return axes_
            case Apply():
                parts = [self.spend(arg, run) for arg in expr.args]
                together = set().union(*parts)
                fused = expr.op in ("add", "sub") and any(
                    isinstance(arg, Apply) and arg.op == "mul" and part == together
                    for arg, part in zip(expr.args, parts, strict=True)
                )
                self.lanes(together, 0.0 if fused else _lanes(expr), run)
                if expr.op in SPECIAL:
                    self.exps += SPECIAL[expr.op] * self.computed(together, run)
                return together
            case _:
                raise AssertionError(f"{type(expr).__name__} is lowered before it is counted")


def _lanes(expr: Apply) -> float:
    """Lanes that an operation takes per element: a quotient by a power of two is a shift, its remainder the bits."""
    by = expr.args[-1].value if expr.op in ("floordiv", "mod") and isinstance(expr.args[-1], Const) else 0
    return 1.0 if by > 0 and int(by).bit_count() == 1 else LANES.get(expr.op, 1.0)


def _held(tensor: Tensor, sizes: Mapping[str, int]) -> float:
    """The bytes of a tensor in memory: dimensions that are only repeated have one coordinate."""
    extents = [
        1 if stride == 0 else _number(size, sizes) for size, stride in zip(tensor.shape, tensor.strides, strict=True)
    ]
    return float(max(SECTOR, math.prod(extents) * BYTES[tensor.dtype]))


def _matrix_type(kernel: Kernel, dot: Dot) -> str:
    """The type in which a product multiplies: of float32 in full precision, float64."""
    dtype: DType = next(dtype for name, _, dtype in kernel.variables if name == dot.left)
    if dtype is DType.F32:
        return "f64" if dot.exact else "tf32"
    return str(dtype.value)


def _warps(kernel: Kernel, dot: Dot) -> tuple[int, int]:
    """How the warps of a program share a product: how many down its rows, and across its columns.

    Evenly; those of products in a row lie all down the rows, as far as there are any.
    """
    warps, (rows, columns) = kernel.options.num_warps, (kernel.axis(rank).tile for rank in dot.axes)
    down, across, chained = 1, 1, _chained(kernel.ops)
    while down * across < warps:
        more = rows >= 2 * MMA_ROWS * down and (chained or rows * across >= columns * down)
        down, across = (2 * down, across) if more else (down, 2 * across)
    return down, across


# --- how a program lies on an SM -------------------------------------------------------------------------------------


def dependent(ops: Sequence[Op]) -> bool:
    """Whether products of a loop wait for what threads compute in the same round.

    That is made of another product; or operands are converted to f64 on their way.
    """
    exact = any(isinstance(op, Dot) and op.exact for op in every_op(tuple(ops)))
    return exact or _chained(ops)


def _chained(ops: Sequence[Op]) -> bool:
    """Whether what one product of a loop gives is computed with and goes into another product of the same round."""
    blocks = [tuple(ops), *(op.body for op in every_op(tuple(ops)) if isinstance(op, Loop))]
    return any(_feeds(block) for block in blocks)


def _feeds(block: Sequence[Op]) -> bool:
    made: set[str] = set()  # by a product, or of what one made
    for op in block:
        if isinstance(op, Dot):
            if {op.left, op.right} & made:
                return True
            made.add(op.name)
        elif isinstance(op, (Let, Fold)) and made & set(uses(op)):
            made.add(op.name)
    return False


def _ahead(kernel: Kernel) -> bool:
    """Whether loads of a loop are fetched ahead: those of loops with products are."""
    return any(isinstance(op, Loop) and any(isinstance(o, Dot) for o in op.body) for op in every_op(kernel.ops))


def _flight(kernel: Kernel) -> float:
    """The bytes of loads that one program keeps outstanding: of the rounds that are fetched ahead."""
    sizes = {tensor.name: BYTES[tensor.dtype] for tensor in kernel.tensors}

    def loads(ops: Sequence[Op]) -> float:
        every = (op for op in ops if isinstance(op, Load))
        return float(sum(_elements(kernel, op.axes) * sizes[op.tensor] / _stands_for(op) for op in every))

    bodies = [loads(op.body) * _rounds_ahead(kernel, op) for op in every_op(kernel.ops) if isinstance(op, Loop)]
    return max(bodies) if bodies else loads(kernel.ops)


def _rounds_ahead(kernel: Kernel, loop: Loop) -> int:
    """How many rounds of a loop are fetched while one is computed with."""
    if not _ahead(kernel):
        return 1
    looked_up = any(_looked_up(loop.body, op) == "tile" for op in loop.body)
    return max(1, (kernel.options.num_stages - 1) // (2 if looked_up else 1))


def _looked_up(body: Sequence[Op], op: Op) -> Literal["", "tile", "one"]:
    """Whether the same round loads where an operand lies: as a tile, which is fetched ahead too, or as one number."""
    if not isinstance(op, Load) or op.box is not None:
        return ""
    words = {word for part in op.index for word in _words(part)}
    places = [each for each in body if isinstance(each, Load) and each.name in words]
    return "" if not places else "tile" if any(each.axes for each in places) else "one"


def _stands_for(op: Load | Store) -> int:
    """For how many elements of a tile one moves."""
    return op.grouped[1] if isinstance(op, Load) and op.grouped is not None else 1


def _elements(kernel: Kernel, axes: Sequence[str]) -> int:
    return math.prod(kernel.axis(rank).tile for rank in axes)


def shared_memory(kernel: Kernel) -> int:
    """The bytes of shared memory of a program, guessed: operands that a loop fetches ahead, those that it or
    what follows still needs, a result on its way out, and what warps tell each other in reductions."""
    sizes = {tensor.name: BYTES[tensor.dtype] for tensor in kernel.tensors}
    operands = {side for op in every_op(kernel.ops) if isinstance(op, Dot) for side in (op.left, op.right)}

    def tile(op: Load | Store) -> int:
        return _elements(kernel, op.axes) * sizes[op.tensor]

    def fetched(loop: Loop) -> int:
        dots = [op for op in loop.body if isinstance(op, Dot)]
        small = all(kernel.axis(op.axes[0]).tile < GROUP_SIDE for op in dots)
        exact = any(op.exact for op in dots)  # read into registers before the next comes

        def buffers(op: Load) -> int:
            found = _looked_up(loop.body, op)
            if found == "tile":
                return _rounds_ahead(kernel, loop) + (not small)
            return max(1, kernel.options.num_stages - (exact or (small and found == "one")))

        loads = [op for op in loop.body if isinstance(op, Load) and op.name in operands]
        return sum(tile(op) * buffers(op) for op in loads) + _computed(kernel, loop.body, operands)

    staying = {op.name: tile(op) for op in kernel.ops if isinstance(op, Load) and op.name in operands}
    staying |= {op.name: _elements(kernel, op.axes) * BYTES[kind] for op, kind in _rounded(kernel)}
    held = 0 if any(isinstance(op, Loop) for op in kernel.ops) else sum(staying.values())
    for place, op in enumerate(kernel.ops):
        if isinstance(op, Loop):
            before = {each.name for each in kernel.ops[:place] if isinstance(each, Load | Let)}
            needed = {name for each in every_op(kernel.ops[place:]) for name in uses(each)} & before
            kept = sum(size for name, size in staying.items() if name in needed)
            held = max(held, kept + max(fetched(loop) for loop in every_op((op,)) if isinstance(loop, Loop)))
    leaving = max((tile(op) for op in every_op(kernel.ops) if isinstance(op, Store) and op.box is not None), default=0)
    leaving //= kernel.options.pieces
    talking = 4 * kernel.options.num_warps * (16 if operands else 1)
    together = held + leaving if kernel.options.resident else max(held, leaving)
    return together + talking + (0 if operands else _exchanged(kernel))


def _rounded(kernel: Kernel) -> Iterator[tuple[Let, DType]]:
    """Operands of loops that are computed before them, with their types: they go to shared memory once."""
    inside = [op for loop in kernel.ops if isinstance(loop, Loop) for op in every_op(loop.body)]
    operands = {side for op in inside if isinstance(op, Dot) and not op.exact for side in (op.left, op.right)}
    made = (op for op in kernel.ops if isinstance(op, Let) and op.name in operands)
    return ((op, op.dtype) for op in made if op.dtype is not None)


def _computed(kernel: Kernel, body: Sequence[Op], operands: set[str]) -> int:
    """Operands that are computed: right ones go through shared memory, left ones of small products too."""
    dots = [op for op in body if isinstance(op, Dot)]
    through = {op.right for op in dots}
    through |= {op.left for op in dots if kernel.axis(op.axes[0]).tile < GROUP_SIDE or kernel.options.num_warps % 4}
    made = [op for op in body if isinstance(op, Let) and op.name in operands & through and op.dtype is not None]
    loaded = {op.name for op in body if isinstance(op, Load)}
    wide = {op.left: (op.axes[0], op.over) for op in dots if op.exact and op.left not in loaded
            and _warps(kernel, op)[1] > 1}  # fmt: skip
    wide |= {op.right: (op.over, op.axes[1]) for op in dots if op.exact and op.right not in loaded}
    rounded = sum(_elements(kernel, op.axes) * BYTES[op.dtype] for op in made if op.dtype is not None)
    return rounded + sum(_elements(kernel, axes) * BYTES[DType.F64] for axes in wide.values())


def _exchanged(kernel: Kernel) -> int:
    """What goes through shared memory where loads and stores of one tile lie in different orders."""
    sizes = {tensor.name: BYTES[tensor.dtype] for tensor in kernel.tensors}
    moves = [op for op in every_op(kernel.ops) if isinstance(op, (Load, Store)) and len(op.axes) > 1]
    orders = {tuple(rank for rank in op.axes if rank in common) for op, common in _with_common(moves)}
    if len(orders) < 2:
        return 0
    return max(_elements(kernel, op.axes) * sizes[op.tensor] for op in moves)


def _with_common(moves: Sequence[Load | Store]) -> Iterator[tuple[Load | Store, set[str]]]:
    common = set.intersection(*(set(op.axes) for op in moves)) if moves else set()
    return ((op, common) for op in moves)


def live_registers(kernel: Kernel) -> int:
    """The registers of a thread, guessed: the most that the tiles take that are live at one time.

    With products: operands that are loaded, or ready before a loop, lie in shared memory; what a loop uses of what was
    before is live all through it; an elementwise operation takes the registers of an operand that nobody needs
    afterwards, unless its type changes; what is only stored is computed as it is narrowed.
    Without: values are widened as they are loaded, and elementwise operations between two reductions run element by
    element, so that only what crosses a reduction, and what is loaded, is there as a whole.
    """
    operands = {side for op in every_op(kernel.ops) if isinstance(op, Dot) for side in (op.left, op.right)}
    skipped = {op.name for op in every_op(kernel.ops) if isinstance(op, Load) and op.name in operands}
    skipped |= {op.name for op, _ in _rounded(kernel)}
    spans, folds = _lifetimes(kernel.ops)
    if not operands:
        loads = {op.name for op in every_op(kernel.ops) if isinstance(op, (Load, Start))}
        crossing = {name for name, (begin, end) in spans.items() if any(begin < at < end - 1 for at in folds)}
        skipped = set(spans) - loads - crossing
    threads, stored = WARP * kernel.options.num_warps, _only_stored(kernel)
    taken = {
        name: -(
            -_elements(kernel, axes) * (min(stored.get(name, 8), _width(dtype)) if operands else 4) // (4 * threads)
        )
        for name, axes, dtype in kernel.variables
        if axes and name not in skipped and dtype is not DType.BOOL and (len(axes) > 1 or not operands)
    }
    positions = {begin for begin, _ in spans.values()} | {end for _, end in spans.values()}
    live = (sum(taken.get(name, 0) for name, (begin, end) in spans.items() if begin <= at < end) for at in positions)
    exact = [op for op in every_op(kernel.ops) if isinstance(op, Dot) and op.exact]
    return PLAIN_REGISTERS + max(live, default=0) + max((_fragments(kernel, op) for op in exact), default=0)


def _width(dtype: DType) -> int:
    """The bytes of an element in registers; integers of 64 bits are coordinates, of which few are kept."""
    return BYTES[dtype] if dtype is DType.F64 else min(4, BYTES[dtype])


def _fragments(kernel: Kernel, dot: Dot) -> int:
    """The registers of a thread for operands of a product in f64: they are converted as they come."""
    down, across = _warps(kernel, dot)
    rows, columns, over = (kernel.axis(rank).tile for rank in (*dot.axes, dot.over))
    return min(FRAGMENTS, (rows // down + columns // across) * over // WARP)


def _only_stored(kernel: Kernel) -> dict[str, int]:
    """The bytes of an element, in memory, of the variables that are written there and not used otherwise."""
    sizes = {tensor.name: BYTES[tensor.dtype] for tensor in kernel.tensors}
    every = list(every_op(kernel.ops))
    used = Counter(name for op in every for name in uses(op))
    stores = [op for op in every if isinstance(op, Store) and isinstance(op.expr, Local)]
    return {op.expr.name: sizes[op.tensor] for op in stores if isinstance(op.expr, Local) and used[op.expr.name] == 1}


def _lifetimes(ops: Sequence[Op]) -> tuple[dict[str, tuple[int, int]], list[int]]:
    """From where until before where each variable is live, and where reductions stand; bodies of loops are included.

    Ops have even places in the order they stand in.
    """
    folds: list[int] = []
    spans: dict[str, tuple[int, int]] = {}
    counter = itertools.count(0, 2)

    def touch(name: str, position: int) -> None:
        begin, end = spans.get(name, (position, position))
        spans[name] = (begin, max(end, position))

    def visit(block: Sequence[Op]) -> None:
        for op in block:
            position = next(counter)
            if isinstance(op, Loop):
                before = set(spans)
                visit(op.body)
                after = next(counter)
                inside = {name for inner in every_op(op.body) for name in (*uses(inner), *_made(inner))}
                for name in (before & inside) | set(op.carried):
                    touch(name, after + 1)
                continue
            if isinstance(op, (Fold, Scan, TopKept)):
                folds.append(position)
            keeps = isinstance(op, Let) and op.dtype is not None
            for name in uses(op):
                touch(name, position + (1 if keeps else 0))
            for name in _made(op):
                touch(name, position)
                touch(name, position + 1)

    visit(ops)
    return spans, folds


def _made(op: Op) -> tuple[str, ...]:
    """The variables that an op gives a value."""
    match op:
        case Load() | Let() | Mask() | Keep() | Dot() | Fold() | Seen() | Start():
            return (op.name,)
        case Scan():
            return op.names
        case Redo():
            return (op.name, op.after)
        case TopKept():
            return (op.values, op.coords, *((op.there,) if op.there else ()))
        case Carry():
            return tuple(name for name, _ in op.pairs)
        case Loop() | Store():
            return ()
        case _:
            assert_never(op)
