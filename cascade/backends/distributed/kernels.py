"""Steps of a distributed program as tasks: which statements are taken for one kernel, and how long each runs.

    compute Q, K, V along heads       one task, products of one operand
    compute S, P_max, ..., U          one task, what is between them is larger than all that goes in and comes out
    compute Z, M_x, M_sum, M          one task, maps and reductions of the same rows
    all-reduce Z                      one task, on the links

This is a model of kernels for planning, not the planner of kernels: statements join if one reads the other, they run
along the same axes, and what passes between them can stay on chip. A map joins what it reads; a reduction joins
maps; products join where they share an operand, and through a tensor that is larger than what the two read and leave
behind. A group that another task would have to wait inside of is not made.

A task takes a floor, and then the longest of: its products, by waves of tiles; its other operations on the vector
lanes; the bytes that it moves, each tensor once. Tiles are the best of a few shapes; smaller ones reach less.

The floor of a task stands for its launch and for filling and draining its pipeline; it is what makes splitting cost
something beyond whole waves. Products of one kernel are one grid. Where data chooses an operand, the rows of one value
are a product, as many as there are values; what brings rows in order in front of it, and what adds them up behind it,
is part of the task.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from cascade.backends.distributed.machine import Node
from cascade.ir import Apply, Einsum, Expr, Read, Reduce, Stmt
from cascade.passes.reach import Box, Reach
from cascade.passes.shard import Sharding
from cascade.placed import Collective, Compute, Kind, Program, Window, stretch, windows_of
from cascade.recent import recently
from cascade.timetable import Mode, Problem, Task
from cascade.walk import defines, free_ranks, reads, targets, walk

SMS = "sms"
OUT = "links out"
IN = "links in"

TILES = ((128, 256, 0.91), (128, 128, 0.82), (64, 256, 0.73))
"""Rows and columns of a tile, and which share of the matrix rate it reaches."""

LAST_WAVE = 0.3
"""Which share of the empty places of the last wave is lost: persistent kernels fill some of them."""

SORT_LAUNCHES = 3
TABLE_LAUNCHES = 2
GATHER_LAUNCHES = 1
MERGE_LAUNCHES = 1
"""Of a product whose operand data chooses, as `rows.py` of the Triton backend makes them.

Rows are brought in order, once an index, and get tables of tiles, once a kernel. A pass gathers the rows of an operand
that does not lie in that order, where products bound the kernel: gathered on the way they would keep those waiting.
Where rows are summed, those of one sum lie in tiles of several values: what each gives is stored and added up behind.
"""

IN_VAIN = 0.5
"""Of a tile of rows, for every value: how many rows a value has is data, so its last tile is half empty on average."""

NARROW = 16
"""Where a product has fewer columns than a tile, its tiles are as wide as it is, in multiples of this."""

# Tiles and the last wave are fitted to a tensor-parallel MLP on an H100 (figure 9 of TokenWeave, arXiv 2505.11329),
# whole and in halves, with the floors of `machines/h100x8.toml`: within 4 % in the mean square and 8 % at most.


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product on one device: how many of them, rows, columns, and the operations of all.

    Where data chooses an operand, rows are `gathered`: those of one value, so many on average.
    """

    batch: int
    rows: int
    columns: int
    flops: float
    gathered: bool = False

    def tiles(self, rows: int, columns: int) -> tuple[float, float]:
        """How many tiles of so many rows and columns there are, and the operations in them, those in vain included."""
        columns = min(columns, NARROW * -(-self.columns // NARROW))
        high = max(1.0, self.rows / rows + IN_VAIN) if self.gathered else -(-self.rows // rows)
        count = self.batch * high * -(-self.columns // columns)
        return count, self.flops * count * rows * columns / (self.batch * self.rows * self.columns)


@dataclass(frozen=True, slots=True)
class Work:
    """What one kernel does on one device: its products, its other operations, the bytes that it moves.

    Where data chooses operands, the bytes that passes in front of it and behind it move, one a number: `gathered` and
    `merged`; `sorts`, how many indices bring rows in order for it and the kernels behind it.
    """

    products: tuple[Product, ...]
    vector: float
    moved: float
    sorts: int = 0
    gathered: tuple[float, ...] = ()
    merged: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Statements that are one task: their steps by position in the program that is not split."""

    steps: tuple[int, ...]


def groups(program: Program, needs: Sequence[Sequence[int]]) -> tuple[Group, ...]:
    """The tasks of a program without slices, in an order in which each stands behind what it needs (`dependencies`)."""
    return _Grouping(program, needs).run()


class _Grouping:
    """Groups in the making: steps and who needs whom, joined two by two."""

    def __init__(self, program: Program, needs: Sequence[Sequence[int]]) -> None:
        self.program = program
        self.sharding = Sharding(program.cascade, dict(program.sizes))
        self.reach = self.sharding.reach
        self.needs = needs
        self.home = list(range(len(program.steps)))

    def run(self) -> tuple[Group, ...]:
        """Every step joined to what it reads, as far as it may be."""
        siblings: dict[tuple[str, object], int] = {}
        for number, step in enumerate(self.program.steps):
            if isinstance(step, Collective):
                continue
            for other in sorted(self.needs[number], reverse=True):
                self._join(other, number, self._streams(other, number))
            if self._is_product(number):
                for tensor in self._factors(number):
                    first = siblings.setdefault((tensor, self._axes(step)), number)
                    self._join(first, number, self._is_product(first) and tensor not in self._params())
        found: dict[int, list[int]] = {}
        for number, home in enumerate(self.home):
            found.setdefault(home, []).append(number)
        return tuple(Group(tuple(steps)) for steps in self._ordered(list(found.values())))

    def _join(self, one: int, other: int, may: bool) -> None:
        """One group of two, if they may be, run along the same axes and nothing must come between."""
        first, second = self.program.steps[one], self.program.steps[other]
        if not may or not isinstance(first, Compute) or not isinstance(second, Compute):
            return
        if self._axes(first) != self._axes(second) or self.home[one] == self.home[other] or self._between(one, other):
            return
        old, new = self.home[other], self.home[one]
        self.home = [new if home == old else home for home in self.home]

    def _streams(self, one: int, other: int) -> bool:
        """Whether what one gives can go to the other without being stored."""
        if isinstance(self.program.steps[one], Collective):
            return False
        members = [n for n, home in enumerate(self.home) if home == self.home[one]]
        products = any(self._is_product(n) for n in members)
        if not self._is_product(other) and not (products and self._reduces(other)):
            return True
        between = sum(self.sharding.bytes[name] for name in self._defined(one) if name in self._read(other))
        around = {name for n in (*members, other) for name in (*self._read(n), *self._defined(other))}
        inner = {name for n in members for name in self._defined(n)}
        return between > 2 * sum(self.sharding.bytes[name] for name in around - inner)

    def _between(self, one: int, other: int) -> bool:
        """Whether a way from one group to the other goes through a third."""
        ends = {self.home[one], self.home[other]}
        edges: dict[int, set[int]] = {}
        for number, needed in enumerate(self.needs):
            for early in needed:
                if self.home[early] != self.home[number]:
                    edges.setdefault(self.home[number], set()).add(self.home[early])
        for start in ends:
            todo = [home for home in edges.get(start, ()) if home not in ends]
            seen: set[int] = set()
            while todo:
                home = todo.pop()
                if home in seen:
                    continue
                seen.add(home)
                if ends & edges.get(home, set()):
                    return True
                todo += edges.get(home, ())
        return False

    def _ordered(self, found: list[list[int]]) -> list[list[int]]:
        """The groups so that each stands behind what it needs."""
        home = {number: at for at, group in enumerate(found) for number in group}
        done: list[int] = []
        left = list(range(len(found)))
        while left:
            at = next(
                at for at in left
                if all(home[o] in done or home[o] == at for number in found[at] for o in self.needs[number])
            )  # fmt: skip
            done.append(at)
            left.remove(at)
        return [found[at] for at in done]

    def _axes(self, step: Compute) -> object:
        hops = tuple(along.hop for along in step.along)  # what works on a shard does not wait for the next one
        return frozenset(axis for along in step.along for axis in along.axes), hops, step.at

    def _statements(self, number: int) -> tuple[Stmt, ...]:
        step = self.program.steps[number]
        return self.reach.units[step.name].statements if isinstance(step, Compute) else ()

    def _read(self, number: int) -> set[str]:
        return {name for stmt in self._statements(number) for name in reads(stmt)}

    def _factors(self, number: int) -> set[str]:
        """The tensors that the products of a step multiply."""
        sums = (stmt.expr for stmt in self._statements(number) if isinstance(stmt, Einsum) and is_product(stmt))
        return {read.tensor for expr in sums if isinstance(expr, Reduce) for read in factors(expr.body)}

    def _defined(self, number: int) -> set[str]:
        return {name for stmt in self._statements(number) for name in defines(stmt)}

    def _is_product(self, number: int) -> bool:
        sides = sides_of(self.reach)
        return any(sides[defines(stmt)[0]] is not None for stmt in self._statements(number))

    def _reduces(self, number: int) -> bool:
        return any(isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) for stmt in self._statements(number))

    def _params(self) -> set[str]:
        return {param.name for param in self.program.cascade.params}


# --- how long ---------------------------------------------------------------------------------------------------------


def factors(expr: Expr) -> Iterator[Read]:
    """The reads that a product is made of, those in its divisor and under a map left out."""
    if isinstance(expr, Apply) and expr.op == "mul":
        for arg in expr.args:
            yield from factors(arg)
    elif isinstance(expr, Apply) and expr.op == "div":
        yield from factors(expr.args[0])
    elif isinstance(expr, Read):
        yield expr


@dataclass(frozen=True, slots=True)
class Sides:
    """The two sides of a matrix product by their kept ranks; where data chooses an operand, which dimension it picks.

    The ranks of the index are then rows, summed ones too: those of one value make a product of their own. `merged`:
    some are summed, so what rows give is added up behind it. `beside` is what the chosen operand is multiplied by.
    """

    rows: frozenset[str]
    columns: frozenset[str]
    beside: Read
    chosen: tuple[Read, int] | None
    merged: bool = False

    @property
    def order(self) -> Expr | None:
        """The index by which rows are brought in order, where there is one."""
        return None if self.chosen is None else self.chosen[0].index[self.chosen[1]]


def is_product(stmt: Stmt) -> bool:
    """Whether a statement sums products of two tensors of which each has a rank of its own that is kept."""
    return operands(stmt) is not None


@recently
def sides_of(reach: Reach) -> Mapping[str, Sides | None]:
    """The sides of every statement that is a matrix product, by the first name that it defines."""
    return {defines(stmt)[0]: operands(stmt) for stmt in reach.cascade.body}


@dataclass(frozen=True, slots=True)
class Ordered:
    """What brings rows in order for a kernel: the indices; products of operands that lie in another order, one for each
    such operand; and products behind which rows are added up."""

    orders: frozenset[Expr]
    gathers: tuple[Stmt, ...]
    merges: tuple[Stmt, ...]

    @classmethod
    def of(cls, reach: Reach, steps: Sequence[Compute]) -> Ordered:
        """Of the kernel of some statements."""
        sides, known = sides_of(reach), orders_of(reach)
        found = [
            (stmt, side, side.order)
            for step in steps for stmt in reach.units[step.name].statements
            if (side := sides[defines(stmt)[0]]) is not None
        ]  # fmt: skip
        gathers = {
            side.beside: stmt for stmt, side, order in found
            if order is not None and known.get(side.beside.tensor) != order
        }  # fmt: skip
        merges = tuple(stmt for stmt, side, _ in found if side.merged)
        return cls(frozenset(order for *_, order in found if order is not None), tuple(gathers.values()), merges)

    @property
    def launches(self) -> int:
        """How often the host launches something for it, beside the kernel and the sort of an index."""
        passes = GATHER_LAUNCHES * len(self.gathers) + MERGE_LAUNCHES * len(self.merges)
        return passes + TABLE_LAUNCHES * len(self.orders)


@recently
def orders_of(reach: Reach) -> Mapping[str, Expr]:
    """By which index the rows of a tensor lie in order: of products by it, and of maps of what lies so."""
    found: dict[str, Expr] = {}
    for unit in reach.units.values():
        for stmt in unit.statements:
            side = sides_of(reach)[defines(stmt)[0]]
            order = None if side is None else side.order
            if order is None and isinstance(stmt, Einsum) and not isinstance(stmt.expr, Reduce):
                order = next((found[name] for name in reads(stmt) if name in found), None)
            for target in targets(stmt):
                if order is not None and set(free_ranks(order)) <= set(target.ranks):
                    found[target.name] = order
    return found


@recently
def sorters_of(reach: Reach) -> Mapping[Expr, str]:
    """The unit that is the first to have rows in the order of an index, for every index."""
    found: dict[Expr, str] = {}
    for name, unit in reach.units.items():
        for stmt in unit.statements:
            side = sides_of(reach)[defines(stmt)[0]]
            if side is not None and side.order is not None:
                found.setdefault(side.order, name)
    return found


def has_product(reach: Reach, step: Compute) -> bool:
    """Whether a step computes a matrix product."""
    return any(sides_of(reach)[defines(stmt)[0]] is not None for stmt in reach.units[step.name].statements)


def operands(stmt: Stmt) -> Sides | None:
    """The sides of a matrix product; None where a statement is none."""
    if not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce) or stmt.expr.reducer != "sum":
        return None
    summed, kept = set(stmt.expr.ranks), set(stmt.target.ranks)
    found = [(_plain(read), read) for read in factors(stmt.expr.body)]
    for one, beside in found:
        for other, read in found:
            rows, columns = one & kept, other & kept
            if one & other & summed and rows - columns and columns - rows:
                picks = [dim for dim, index in enumerate(read.index) if is_data(index)]
                more = {rank for dim in picks for rank in free_ranks(read.index[dim])}
                chosen = (read, picks[0]) if picks else None
                return Sides(frozenset(rows | more), frozenset(columns), beside, chosen, bool(more & summed))
    return None


def _plain(read: Read) -> set[str]:
    """The ranks of the coordinates of a read that do not come from data."""
    return {rank for index in read.index if not is_data(index) for rank in free_ranks(index)}


def is_data(index: Expr) -> bool:
    """Whether a coordinate comes from data."""
    return any(isinstance(node, Read) for node in walk(index))


@dataclass(frozen=True, eq=False)
class Clock:
    """How long tasks take on a machine, from what one device does in them."""

    program: Program
    node: Node
    sharding: Sharding
    flops: Mapping[str, float]
    full: Mapping[str, Window]
    known: dict[tuple[Compute, ...], Work] = field(default_factory=dict)
    elsewhere: dict[frozenset[str], frozenset[str]] = field(default_factory=dict)

    @classmethod
    def of(cls, program: Program, node: Node) -> Clock:
        """The clock for a program, or for the same program in slices."""
        sharding = Sharding(program.cascade, dict(program.sizes), node)
        return cls(program, node, sharding, sharding.operations, sharding.reach.full)

    @property
    def reach(self) -> Reach:
        """What statements touch."""
        return self.sharding.reach

    def collective_us(self, step: Collective) -> float:
        """How long a collective takes on what it is a slice of; where partial results go round, with their merge."""
        devices = self.program.devices(step.axes)
        size = self._size(step)
        moved = 0.0 if step.arrived else self.node.collective_us(step.kind, size, devices)
        merges = dataclasses.replace(step, at=()) in self.merging
        return moved + (self._merge_us(size / devices) if merges else 0.0)

    @cached_property
    def merging(self) -> frozenset[Collective]:
        """The shifts of partial results before which others have come: all but the first of a ring, on either side."""
        shifts = (step for step in self.program.steps if isinstance(step, Collective) and step.passes)
        passes = {dataclasses.replace(step, at=()) for step in shifts}
        return frozenset(
            step for step in passes for side in (1, -1)
            if step.hop * side >= 0 and dataclasses.replace(step, hop=step.hop + side) in passes
        )  # fmt: skip

    def _merge_us(self, size: float) -> float:
        """How long it takes to merge two partial results of so many bytes: both are read, and one is written."""
        return self.node.floor_us + 3 * size / (self.node.gpu.bandwidth_tbs * 1e6)

    def fused_us(self, steps: Sequence[Collective], blocks: int) -> float:
        """How long a kernel of so many thread blocks takes for a scatter, and the gathers of what is made of it."""
        gathers = sum(self._size(step) for step in steps if step.kind is Kind.ALL_GATHER)
        size = max(gathers, *(self._size(step) for step in steps))
        return self.node.fused_us(blocks, size, self.program.devices(steps[0].axes))

    def stored_us(self, step: Collective) -> float:
        """How long tiles are under way that a product stores to the devices that add them up."""
        return self.node.stored_us(self._size(step), self.program.devices(step.axes))

    def _size(self, step: Collective) -> float:
        """The bytes of what a collective is a slice of."""
        extents = list(self.reach.shape(step.tensor))
        whole = math.prod(extents)
        for dim, low, high in step.at:
            extents[dim] = high - low
        return self.sharding.bytes[step.tensor] * math.prod(extents) / max(1, whole)

    def compute_us(self, steps: Sequence[Compute], slots: int) -> float:
        """How long a kernel of these statements takes with so many SMs."""
        work = self.work(tuple(steps))
        return self._kernel_us(work, self._matrix_us(work.products, slots), slots)

    def _kernel_us(self, work: Work, matrix_us: float, slots: int) -> float:
        """The floor, and the longest of products, other operations and bytes; with the passes in front and behind.

        A sort takes a floor, with the tables that come of it: launches of next to no work.
        """
        gpu = self.node.gpu
        lanes = 2 * gpu.lanes * slots * gpu.clock_ghz * 1e3  # operations a microsecond
        drawn = self.node.bandwidth_tbs(slots) * 1e6  # bytes a microsecond
        floor = self.node.floor_us + (self.node.product_us if work.products else 0.0)
        passes = (*work.merged, *(work.gathered if matrix_us > work.moved / drawn else ()))
        around = self.node.floor_us * (work.sorts + len(passes)) + sum(passes) / drawn
        return around + floor + max(matrix_us, work.vector / lanes, work.moved / drawn)

    def work(self, steps: tuple[Compute, ...]) -> Work:
        """What a kernel of these statements does on one device."""
        if steps not in self.known:
            products: list[Product] = []
            vector = 0.0
            for step in steps:
                windows = self._windows(step)
                for stmt in self.reach.units[step.name].statements:
                    flops = self.flops[defines(stmt)[0]] * self._part(step, stmt, windows)
                    product = self._product(stmt, windows, flops)
                    products += [] if product is None else [product]
                    vector += flops if product is None else 0.0
            self.known[steps] = self._ordered(steps, Work(tuple(products), vector, self._moved(steps)))
        return self.known[steps]

    def _ordered(self, steps: Sequence[Compute], work: Work) -> Work:
        """The work of a kernel with what brings its rows in order and adds them up."""
        if not sorters_of(self.reach) or not (ordered := Ordered.of(self.reach, steps)).orders:
            return work
        windows = {defines(s)[0]: self._windows(step) for step in steps for s in self.reach.units[step.name].statements}
        gathered = tuple(sum(self._passed(stmt, windows[defines(stmt)[0]], True)) for stmt in ordered.gathers)
        merged = [self._passed(stmt, windows[defines(stmt)[0]], False) for stmt in ordered.merges]
        moved = work.moved + sum(rows - left for rows, left in merged)
        sorts = sum(sorters_of(self.reach)[order] in {step.name for step in steps} for order in ordered.orders)
        return dataclasses.replace(work, moved=moved, sorts=sorts, gathered=gathered, merged=tuple(map(sum, merged)))

    def _passed(self, stmt: Stmt, windows: Mapping[str, Window], front: bool) -> tuple[float, float]:
        """The bytes in the order of an index and in another one, of the pass in front of a product or behind it."""
        sides = sides_of(self.reach)[defines(stmt)[0]]
        assert sides is not None
        (target,) = targets(stmt)
        name, others = (sides.beside.tensor, _plain(sides.beside)) if front else (target.name, set(target.ranks))
        ranks = others | sides.rows if front else sides.rows | sides.columns
        element = self.sharding.bytes[name] / max(1, math.prod(self.reach.shape(name)))
        return element * self._extent(ranks, windows), element * self._extent(others, windows)

    def _extent(self, ranks: Collection[str], windows: Mapping[str, Window]) -> int:
        """How many coordinates there are along some ranks together."""
        spans = (windows.get(rank, self.full[rank]) for rank in ranks)
        return max(1, math.prod(high - low for low, high in spans))

    def _windows(self, step: Compute) -> dict[str, Window]:
        """The windows of the device that has most: stretches are rounded down, the last one is never shorter."""
        last = {axis.name: axis.size - 1 for axis in self.program.axes}
        return windows_of(step, last, self.program.axes, self.full)

    def _part(self, step: Compute, stmt: Stmt, windows: Mapping[str, Window]) -> float:
        """Which share of the points of a statement a device has: filters thin out windows as what is read tells."""
        part = 1.0
        for rank, (low, high) in windows.items():
            part *= (high - low) / max(1, self.full[rank][1])
        rows = [rank for rank, low, high in step.at]
        return part * self._density(stmt, rows, windows)

    def _density(self, stmt: Stmt, rows: Sequence[str], windows: Mapping[str, Window]) -> float:
        """How much denser a slice is than the whole: later rows behind a triangle have more to do than earlier ones."""
        tests = self.reach.filters[defines(stmt)[0]]
        if not rows or not any(rank in free_ranks(test) for test in tests for rank in rows):
            return 1.0
        size, whole = (self._reached(stmt, own) for own in (windows, {**windows, **{r: self.full[r] for r in rows}}))
        return size / whole if whole else 1.0

    def _reached(self, stmt: Stmt, windows: Mapping[str, Window]) -> float:
        """The mean length that filters leave of ranks without a window, over a few stretches of those with one."""
        pieces = 8
        total = 0.0
        for piece in range(pieces):
            cut = {rank: stretch(window, piece, pieces) for rank, window in windows.items()}
            narrowed = self.reach.narrowed(stmt, cut)
            total += math.prod(high - low for rank, (low, high) in narrowed.items() if rank not in windows)
        return total / pieces

    def _product(self, stmt: Stmt, windows: Mapping[str, Window], flops: float) -> Product | None:
        sides = sides_of(self.reach)[defines(stmt)[0]]
        if sides is None:
            return None
        one, other = sides.rows, sides.columns
        batch, rows, columns = (self._extent(ranks, windows) for ranks in (one & other, one - other, other - one))
        if sides.chosen is None:
            return Product(batch, rows, columns, flops)
        read, dim = sides.chosen
        values = min(rows, self.reach.shape(read.tensor)[dim])
        return Product(values * batch, -(-rows // values), columns, flops, True)

    def _tilings(self, products: Sequence[Product], slots: int) -> Iterator[tuple[float, float, float]]:
        """For every tile: how many there are, in how many waves, and how long one takes.

        Products of one kernel share its waves, as one grid.
        """
        sustained = self.node.gpu.matrix_tflops["bf16"] * self.node.sustained
        rate = sustained * 1e6 / self.node.gpu.sms  # operations a microsecond and SM
        for rows, columns, share in TILES:
            tiles = done = 0.0
            for one in products:
                own, flops = one.tiles(rows, columns)
                tiles, done = tiles + own, done + flops
            waves = tiles / slots
            yield tiles, waves + LAST_WAVE * (math.ceil(waves) - waves), done / tiles / rate / share

    def _matrix_us(self, products: Sequence[Product], slots: int) -> float:
        """The waves of the tiles that are done soonest."""
        return min(waves * us for _, waves, us in self._tilings(products, slots)) if products else 0.0

    def awaited_us(self, steps: Sequence[Compute], gathers: Sequence[Collective]) -> float:
        """How long a kernel takes whose tiles wait for the shards of their rows, which copies bring one by one.

        A wave begins when the one before it has ended and the last of its shards has come. Tiles are gone through in
        the order in which shards come, so nothing else fills the last wave: all of it counts.
        """
        devices = self.program.devices(gathers[0].axes)
        hop = self.node.collective_us(Kind.SHIFT, sum(map(self._size, gathers)), devices)
        work, slots = self.work(tuple(steps)), self.node.gpu.sms
        best = math.inf
        for tiles, _, us in self._tilings(work.products, slots):
            waves = math.ceil(tiles / slots)
            shards = (math.ceil(min(1.0, (wave + 1) * slots / tiles) * devices) - 1 for wave in range(waves))
            best = min(best, max(hop * shard + (waves - wave) * us for wave, shard in enumerate(shards)))
        return self._kernel_us(work, best, slots)

    def _moved(self, steps: Sequence[Compute]) -> float:
        """The bytes that a kernel reads and writes, each tensor once, without those that stay inside."""
        inside = frozenset(step.name for step in steps)
        made = {name for one in inside for stmt in self.reach.units[one].statements for name in defines(stmt)}
        if inside not in self.elsewhere:
            others = (unit for name, unit in self.reach.units.items() if name not in inside)
            read = {name for unit in others for stmt in unit.statements for name in reads(stmt)}
            self.elsewhere[inside] = frozenset(read | {result.name for result in self.program.cascade.results})
        outside = self.elsewhere[inside]
        boxes: dict[str, list[Box]] = {}
        for step in steps:
            windows = self._windows(step)
            for tensor, box in self.reach.reads(step.name, windows):
                if tensor not in made:
                    boxes.setdefault(tensor, []).append(box)
            for tensor, box in self.reach.writes(step.name, windows):
                if tensor in outside:
                    boxes.setdefault(tensor, []).append(box)
        return sum(self._bytes(tensor, found) for tensor, found in boxes.items())

    def _bytes(self, tensor: str, boxes: Sequence[Box]) -> float:
        """The bytes of the hull of some boxes of a tensor."""
        shape = self.reach.shape(tensor)
        hull = [max(box[dim][1] for box in boxes) - min(box[dim][0] for box in boxes) for dim in range(len(shape))]
        return self.sharding.bytes[tensor] * math.prod(hull) / max(1, math.prod(shape))


@dataclass(frozen=True, slots=True)
class Layer:
    """The tasks of a program, or of one layer of many: the steps of each, in an order that keeps what each needs.

    `needs` are tasks of the same copy, `carried` pairs of a task and one that it needs of the copy before.
    """

    steps: tuple[tuple[int, ...], ...]
    needs: tuple[tuple[int, ...], ...]
    carried: tuple[tuple[int, int], ...] = ()


def layer_of(found: Sequence[Group], per_step: Sequence[Sequence[int]], needs: Sequence[Sequence[int]]) -> Layer:
    """The tasks of a program in slices, a copy of it alone.

    `found` are the groups of the program before it was split, `per_step` the steps that each of its steps became, and
    `needs` what each of those needs.
    """
    steps: list[tuple[int, ...]] = []
    for group in found:
        pieces = [per_step[number] for number in group.steps]
        if len({len(piece) for piece in pieces}) == 1:
            steps += zip(*pieces, strict=True)
        else:
            steps.append(tuple(step for piece in pieces for step in piece))
    home = {step: task for task, own in enumerate(steps) for step in own}
    wanted = (sorted({home[other] for step in own for other in needs[step]} - {n}) for n, own in enumerate(steps))
    return Layer(tuple(steps), tuple(map(tuple, wanted)))


def problem_of(program: Program, layer: Layer, clock: Clock, blocks: int | None = None) -> Problem:
    """The tasks of a layer with their modes; `blocks` are the thread blocks of its fused exchanges."""
    tasks = tasks_of(program, layer, clock.reach, lambda own: _modes(program, own, clock, blocks))
    return Problem(tasks, ((SMS, float(clock.node.gpu.sms)), (OUT, 1.0), (IN, 1.0)))


def tasks_of(
    program: Program, layer: Layer, reach: Reach, modes: Callable[[Sequence[int]], tuple[Mode, ...]]
) -> tuple[Task, ...]:
    """The tasks of a layer, with the modes of the steps of each."""
    names: Counter[str] = Counter()
    tasks = []
    for own, needed in zip(layer.steps, layer.needs, strict=True):
        name = _named(program, own, reach)
        tasks.append(Task(f"{name}.{names[name]}", modes(own), needed))
        names[name] += 1
    return tuple(tasks)


def launches(program: Program, layer: Layer, reach: Reach) -> int:
    """How many launches the host makes for a copy of a layer: one a task, and for rows in the order of an index."""
    count = len(layer.steps)
    if not sorters_of(reach):
        return count
    sorts = set()
    for own in layer.steps:
        steps = [step for number in own if isinstance(step := program.steps[number], Compute)]
        ordered = Ordered.of(reach, steps)
        count += ordered.launches
        sorts |= {(order, step.at) for order in ordered.orders for step in steps}
    return count + SORT_LAUNCHES * len(sorts)


def directions(kind: Kind, node: Node) -> tuple[str, ...]:
    """Which directions of the links a collective fills: where the switch works, a scatter sends and a gather receives.

    The other direction then has a P-th of it, which is left out.
    """
    if node.multicast and kind is Kind.REDUCE_SCATTER:
        return (OUT,)
    return (IN,) if node.multicast and kind is Kind.ALL_GATHER else (OUT, IN)


def _modes(program: Program, steps: Sequence[int], clock: Clock, blocks: int | None) -> tuple[Mode, ...]:
    """A collective takes directions of the links and a few SMs; what computes takes all SMs, or leaves those few.

    What exchanges and computes in one kernel takes the longer of both times; of a product all SMs, and else both
    directions and its thread blocks. Partial results that are where they stay are merged by a kernel on all SMs.
    """
    sms, few = clock.node.gpu.sms, clock.node.slots
    computed = [step for number in steps if isinstance(step := program.steps[number], Compute)]
    exchanged = [step for number in steps if isinstance(step := program.steps[number], Collective)]
    product = any(has_product(clock.reach, step) for step in computed)
    if exchanged and product and exchanged[0].kind is Kind.ALL_GATHER:
        return (Mode("awaited", clock.awaited_us(computed, exchanged), ((IN, 1.0), (SMS, float(sms)))),)
    if exchanged and product:
        longest = max(clock.compute_us(computed, sms), clock.stored_us(exchanged[0]))
        return (Mode("stored", longest, ((OUT, 1.0), (SMS, float(sms)))),)
    if exchanged and len(steps) > 1:
        assert blocks is not None
        longest = max(clock.compute_us(computed, blocks) if computed else 0.0, clock.fused_us(exchanged, blocks))
        return (Mode("fused", longest, ((OUT, 1.0), (IN, 1.0), (SMS, float(blocks)))),)
    if exchanged and exchanged[0].arrived:
        return (Mode("merge", clock.collective_us(exchanged[0]), ((SMS, float(sms)),)),)
    if exchanged:
        links = ((way, 1.0) for way in directions(exchanged[0].kind, clock.node))
        return (Mode("links", clock.collective_us(exchanged[0]), (*links, (SMS, float(few)))),)
    left = {"whole": sms, "shared": sms - few}
    if blocks not in (None, few):
        left[f"shared with {blocks}"] = sms - (blocks or 0)
    found: list[Mode] = []
    for name, slots in sorted(left.items(), key=lambda pair: pair[1]):  # more SMs that save nothing are no mode
        mode = Mode(name, clock.compute_us(computed, slots), ((SMS, float(slots)),))
        if not found or mode.us < found[-1].us:
            found.append(mode)
    return tuple(reversed(found))


def _named(program: Program, steps: Sequence[int], reach: Reach) -> str:
    """What a task is called: the collective and its tensor, or the last name that its statements define."""
    last = program.steps[steps[-1]]
    if isinstance(last, Collective) and len(steps) > 1:
        return f"exchange {last.tensor}"
    if isinstance(last, Collective):
        return f"{last.kind.value} {last.tensor}" + (f" hop {last.hop}" if last.hop else "")
    name = targets(reach.units[last.name].statements[0])[-1].name
    hops = [along.hop for along in last.along if along.hop]
    return name + (f" hop {hops[0]}" if hops else "")
