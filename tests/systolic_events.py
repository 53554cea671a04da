"""The second witness of the systolic model: it walks every loop, point by point and tile by tile, and counts events.

It shares with the model the cascade, the machine and the mapping, and nothing that counts: points are enumerated, tiles
are ranges of coordinates, what a tile touches is found by evaluating its indices. It is for small sizes.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from cascade.backends.systolic.machine import Machine
from cascade.backends.systolic.mapping import Mapping, Placement
from cascade.inference import infer_dtypes, infer_shapes
from cascade.ir import Apply, Cascade, Const, DType, Einsum, Expr, Extent, Rank, Read, Reduce, Region, Stmt, TopK
from cascade.passes.traffic import BYTES
from cascade.walk import children, defines, expressions, free_ranks, targets, walk

Tile = dict[str, range]
WORDS = {1: DType.BF16, 2: DType.BF16, 4: DType.F32, 8: DType.F64}


def value(expr: Expr, at: dict[str, int], sizes: dict[str, int]) -> float | None:
    """An expression of coordinates; None where it needs data."""
    match expr:
        case Const():
            return expr.value
        case Extent():
            return sizes[expr.name]
        case Rank():
            return at[expr.name]
        case Apply():
            args = [value(arg, at, sizes) for arg in expr.args]
            if any(arg is None for arg in args):
                return None
            return SIMPLE[expr.op](*args)
        case _:
            return None


SIMPLE = {
    "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "neg": lambda a: -a,
    "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "eq": lambda a, b: a == b, "ne": lambda a, b: a != b,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": lambda a: not a,
}  # fmt: skip


@dataclass
class Events:
    """Everything that was counted, with the names of the model."""

    points: Counter[str] = field(default_factory=Counter)
    cycles: Counter[str] = field(default_factory=Counter)
    moved: Counter[tuple[str, str]] = field(default_factory=Counter)
    buffer_reads: int = 0
    buffer_writes: int = 0
    held: list[int] = field(default_factory=list)
    region_cycles: list[int] = field(default_factory=list)
    idle: Counter[str] = field(default_factory=Counter)  # cycles that arrays save by leaving out what has no live point


class Counting:
    """One cascade on one machine under one mapping, for given sizes."""

    def __init__(self, cascade: Cascade, machine: Machine, mapping: Mapping, sizes: dict[str, int]) -> None:
        self.cascade, self.machine, self.mapping, self.sizes = cascade, machine, mapping, sizes
        shapes = infer_shapes(cascade)
        self.extent = {rank: self.number(size) for rank, size in shapes.ranks.items()}
        self.shape = {name: tuple(map(self.number, shape)) for name, shape in shapes.tensors.items()}
        word = WORDS[machine.word_bytes]
        types = infer_dtypes(cascade, {param.name: param.dtype or word for param in cascade.params})
        self.width = {n: machine.word_bytes if dtype is word else BYTES[dtype] for n, dtype in types.items()}
        self.stmts = {defines(stmt)[0]: stmt for stmt in cascade.body}
        self.maker = {name: defines(stmt)[0] for stmt in cascade.body for name in defines(stmt)}
        self.units = dict(mapping.units)
        self.tests: dict[str, tuple[tuple[str, ...], list[Expr]]] = {}
        self.events = Events()

    def number(self, size: int | str) -> int:
        return size if isinstance(size, int) else self.sizes[size]

    def count(self) -> Events:
        for name, stmt in self.stmts.items():
            self.count_work(name, stmt)
        for at, region in enumerate(self.mapping.regions):
            self.count_region(at, region)
        return self.events

    # --- work ---------------------------------------------------------------------------------------------------------

    def ranks(self, name: str) -> tuple[str, ...]:
        stmt = self.stmts[name]
        if isinstance(stmt, TopK):
            return tuple(dict.fromkeys((*stmt.values.ranks, *free_ranks(stmt.body), stmt.rank)))
        assert isinstance(stmt, Einsum)
        inner = stmt.expr.ranks if isinstance(stmt.expr, Reduce) else ()
        return tuple(dict.fromkeys((*stmt.target.ranks, *inner)))

    def folded(self, name: str) -> set[str]:
        return set(self.ranks(name)) - set(targets(self.stmts[name])[0].ranks)

    def filters(self, name: str, stmt: Stmt) -> list[Expr]:
        """The filters of a statement and those of what it reads at plain coordinates, as far as they carry over."""
        found = [stmt.where] if isinstance(stmt, (Einsum, TopK)) and stmt.where is not None else []
        found += self.inherited(stmt.body if isinstance(stmt, TopK) else stmt.expr)
        kept = [test for test in found if set(free_ranks(test)) <= set(self.ranks(name))]
        for target in targets(stmt):
            recurs = isinstance(stmt, Einsum) and stmt.inits
            whole = [] if recurs else [test for test in kept if set(free_ranks(test)) <= set(target.ranks)]
            self.tests[target.name] = (target.ranks, whole)
        return kept

    def inherited(self, expr: Expr) -> list[Expr]:
        if isinstance(expr, Read):
            left, tests = self.tests.get(expr.tensor, ((), []))
            if not all(isinstance(index, Rank) for index in expr.index):
                return []
            places = dict(zip(left, expr.index, strict=False))
            return [renamed(test, places) for test in tests]
        if isinstance(expr, Apply) and expr.op == "default":
            return []
        return [test for child in children(expr) for test in self.inherited(child)]

    def count_work(self, name: str, stmt: Stmt) -> None:
        ranks = self.ranks(name)
        tests = self.filters(name, stmt)
        live = 0
        for point in itertools.product(*(range(self.extent[rank]) for rank in ranks)):
            at = dict(zip(ranks, point, strict=True))
            live += all(value(test, at, self.sizes) in (None, True) for test in tests)
        self.events.points[name] = live
        unit = self.machine.units[self.units[name]]
        body = stmt.body if isinstance(stmt, TopK) else stmt.expr
        each = self.latency(body, unit) + (unit.operation("max").cycles if isinstance(stmt, TopK) else 0)
        cycles = len(list(batches(live, unit.lanes))) * each
        for init in stmt.inits if isinstance(stmt, Einsum) else ():
            others = [range(self.extent[rank]) for rank in stmt.target.ranks if rank != init.rank]
            first = len(list(itertools.product(*others)))
            cycles += len(list(batches(first, unit.lanes))) * self.latency(init.expr, unit)
        self.events.cycles[name] = cycles

    def latency(self, expr: Expr, unit) -> int:
        """Cycles of one point: operation by operation, where no two of them are one on the unit."""
        free = ("default", "or", "and", "not", "eq", "ne", "lt", "le", "gt", "ge", "select")
        if isinstance(expr, (Read, Rank)):
            return 0
        if isinstance(expr, Reduce) and expr.reducer == "sum":
            total = self.latency(outside_constants(expr.body), unit)
        else:
            total = sum(self.latency(child, unit) for child in children(expr))
        if isinstance(expr, Reduce):
            op = {"sum": "add", "count": "add", "prod": "mul", "min": "min", "any": "or", "all": "and"}
            return total + unit.operation(op.get(expr.reducer, "max")).cycles
        data = any(isinstance(node, (Read, Rank)) for node in walk(expr))
        if data and isinstance(expr, Apply) and expr.op not in free:
            total += unit.operation(expr.op).cycles
        return total

    # --- movement -----------------------------------------------------------------------------------------------------

    def count_region(self, number: int, region: Region) -> None:
        stage_of = {name: at for at, stage in enumerate(region.stages) for name in stage.statements}
        keep = dict(region.keep)
        reads: dict[str, list[tuple[int, str, tuple[Expr, ...]]]] = {}
        for name, stage in stage_of.items():
            for index in self.reads_of(name):
                reads.setdefault(index[0], []).append((stage, name, index[1]))
        later = {
            t for other in self.mapping.regions[number + 1 :] for n in other.statements for t, _ in self.reads_of(n)
        }
        later |= {result.name for result in self.cascade.results}
        here = [name for name in self.maker if self.maker[name] in stage_of]
        outside = [name for name in reads if name not in here or keep.get(name) == "dram"]
        made = [name for name in here if name in reads and name not in outside]
        leaves = [name for name in here if name in later or name in outside]
        walker = Walker(self, region)
        before = Counter(self.events.moved)
        room = sum(walker.load(tensor, reads[tensor], keep.get(tensor)) for tensor in outside)
        room += sum(walker.store(t, stage_of, keep.get(t), t in made) for t in leaves)
        room *= 2 if region.double else 1
        live = [walker.hold(tensor, stage_of, reads[tensor], keep.get(tensor)) for tensor in made]
        for tensor in (*outside, *made):
            walker.feed(tensor, stage_of, reads[tensor], tensor in made)
        for name in region.statements:
            walker.accumulate(name, stage_of[name])
        peak = max(self.at_once(stage, live) for stage in range(len(region.stages)))
        self.events.held.append(room + peak)
        assert all(self.events.moved[key] >= before[key] for key in before)
        for name, place in self.mapping.place:
            if name in stage_of:
                self.events.cycles[name] = self.laid(name, place, walker, stage_of[name])
        busy: Counter[str] = Counter()
        for name in region.statements:
            busy[self.units[name]] += self.events.cycles[name]
        self.events.region_cycles.append(max(busy.values()))

    def laid(self, name: str, place: Placement, walker: Walker, stage: int) -> int:
        """Cycles of an Einsum that is laid on an array: every tile, every other coordinate, every part of the array.

        A part without a live point is left out, and what would go through it; what it would take is kept in `idle`.
        """
        unit, ranks = self.machine.units[self.units[name]], self.ranks(name)
        stmt = self.stmts[name]
        assert isinstance(stmt, Einsum)
        each = self.latency(stmt.expr, unit)
        rows, columns, stream = (
            [rank for rank in text.split("*") if rank] for text in (place.rows, place.columns, place.stream)
        )
        others = [rank for rank in ranks if rank not in (*rows, *columns, *stream)]
        tests = self.filters(name, stmt)
        cycles = 0
        for tile in walker.tiles(stage, walker.within(stage, set(ranks))):
            for other in itertools.product(*(tile[rank] for rank in others)):
                for down in self.parts(tile, rows, unit.rows):
                    for across in self.parts(tile, columns, unit.columns):
                        edges = 0
                        if unit.fill and place.stream not in self.folded(name):
                            edges += unit.rows  # what stays is loaded row by row
                        if unit.fill:
                            edges += unit.rows - 1 + unit.columns - 1  # the last data enter late, and cross it
                        passing = list(itertools.product(*(tile[rank] for rank in stream)))
                        fixed = dict(zip(others, other, strict=True))
                        live = 0
                        for element in passing:
                            at = fixed | dict(zip(stream, element, strict=True))
                            places = (
                                at | dict(zip(rows, one, strict=True)) | dict(zip(columns, two, strict=True))
                                for one in down for two in across
                            )  # fmt: skip
                            live += any(
                                all(value(test, point, self.sizes) in (None, True) for test in tests)
                                for point in places
                            )
                        cycles += live * each + edges * (live > 0)
                        self.events.idle[name] += (len(passing) - live) * each + edges * (live == 0)
        return cycles

    @staticmethod
    def parts(tile: Tile, ranks: list[str], lanes: int) -> list[list[tuple[int, ...]]]:
        """The coordinates along one side of an array, as many at a time as it has elements."""
        spots = list(itertools.product(*(tile[rank] for rank in ranks)))
        return [spots[part.start : part.stop] for part in batches(len(spots), lanes)]

    @staticmethod
    def at_once(stage: int, live: list[tuple[int, int, int]]) -> int:
        """The bytes of made tensors in a stage; who dies leaves its room to one of the same size who is born."""
        there = [entry for entry in live if entry[0] <= stage <= entry[1] and entry[2]]
        ending = Counter(size for first, last, size in there if first < stage == last)
        starting = Counter(size for first, last, size in there if first == stage < last)
        return sum(size for _, _, size in there) - sum((ending & starting).elements())

    def reads_of(self, name: str) -> list[tuple[str, tuple[Expr, ...]]]:
        stmt = self.stmts[name]
        nodes = [node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)]
        return list(dict.fromkeys((node.tensor, node.index) for node in nodes))


class Walker:
    """The loops of the stages of one region, walked."""

    def __init__(self, counting: Counting, region: Region) -> None:
        self.c, self.region = counting, region
        self.events = counting.events
        self.loops = [self.real(stage) for stage in range(len(region.stages))]

    def real(self, stage: int) -> list[tuple[str, str, int]]:
        """The loops of a stage that have more than one iteration: label, rank, size."""
        found, least = [], dict(self.c.extent)
        for loop in (*self.region.loops, *self.region.stages[stage].loops):
            assert loop.size is not None
            if loop.size < least[loop.rank]:
                least[loop.rank] = loop.size
                found.append((loop.label, loop.rank, loop.size))
        return found

    def tiles(self, stage: int, depth: int) -> Iterator[Tile]:
        """The coordinates of all ranks in every iteration of the first loops, in the order in which they run."""

        def visit(at: int, tile: Tile) -> Iterator[Tile]:
            if at == depth:
                yield tile
                return
            _, rank, size = self.loops[stage][at]
            whole = tile[rank]
            for start in range(whole.start, whole.stop, size):
                yield from visit(at + 1, {**tile, rank: range(start, min(start + size, whole.stop))})

        yield from visit(0, {rank: range(extent) for rank, extent in self.c.extent.items()})

    def touched(self, tensor: str, index: tuple[Expr, ...], tile: Tile) -> int:
        """The elements between the least and the greatest coordinate that a tile reaches along every dimension."""
        total = 1
        for at, expr in enumerate(index):
            ranks = free_ranks(expr)
            points = [dict(zip(ranks, p, strict=True)) for p in itertools.product(*(tile[rank] for rank in ranks))]
            found = [value(expr, point, self.c.sizes) for point in points]
            if not ranks:
                continue
            if not points:
                return 0
            if not affine(expr) or None in found:
                total *= min(len(points), self.c.shape[tensor][at])
            else:
                total *= min(int(max(found) - min(found)) + 1, self.c.shape[tensor][at])
        return total

    def within(self, stage: int, ranks: set[str], loops: int | None = None) -> int:
        """Inside of how many loops, of the first `loops`, the innermost one over one of the ranks stands."""
        depth = 0
        for at, (_, rank, _) in enumerate(self.loops[stage][:loops]):
            if rank in ranks:
                depth = at + 1
        return depth

    def all_moving(self, stage: int, ranks: set[str], most: int | None = None) -> int:
        """How many loops from the outermost on are over these ranks."""
        depth = 0
        for _, rank, _ in self.loops[stage][:most]:
            if rank not in ranks:
                break
            depth += 1
        return depth

    def level(self, stage: int, label: str) -> int | None:
        """How many real loops there are up to the one of that label."""
        named = [loop.label for loop in (*self.region.loops, *self.region.stages[stage].loops)]
        if label not in named:
            return None
        upto = named[: named.index(label) + 1]
        return sum(1 for name, _, _ in self.loops[stage] if name in upto)

    def shared(self, stage: int) -> int:
        labels = {loop.label for loop in self.region.loops}
        return sum(1 for name, _, _ in self.loops[stage] if name in labels)

    def fetched(self, stage: int, tensor: str, index: tuple[Expr, ...], depth: int) -> int:
        return sum(self.touched(tensor, index, tile) for tile in self.tiles(stage, depth)) * self.c.width[tensor]

    def largest(self, stage: int, tensor: str, index: tuple[Expr, ...], depth: int, one: str | None = None) -> int:
        sizes = [
            self.touched(tensor, index, {**tile, **({one: tile[one][:1]} if one else {})})
            for tile in self.tiles(stage, depth)
        ]
        return max(sizes, default=0) * self.c.width[tensor]

    def load(self, tensor: str, readers: list[tuple[int, str, tuple[Expr, ...]]], level: str | None) -> int:
        """Loads a tensor from outside; the room that its tile takes."""
        stages: Counter[int] = Counter()
        room = 0
        for stage, name, index in readers:
            ranks = {rank for expr in index for rank in free_ranks(expr)}
            loops = self.level(stage, level) if level not in (None, "tile", "all", "registers", "dram") else None
            depth = 0 if level == "all" else self.within(stage, ranks, loops)
            if level == "tile":
                depth = self.within(stage, set(self.c.ranks(name)))
            stages[stage] = max(stages[stage], self.fetched(stage, tensor, index, depth))
            room = max(room, self.largest(stage, tensor, index, depth))
        shared = level == "all" or level in {loop.label for loop in self.region.loops}
        loaded = max(stages.values()) if shared else sum(stages.values())
        self.events.moved[tensor, "read"] += loaded
        self.events.buffer_writes += loaded
        return room

    def target(self, tensor: str) -> tuple[str, tuple[Expr, ...], set[str]]:
        name = self.c.maker[tensor]
        target = next(t for t in targets(self.c.stmts[name]) if t.name == tensor)
        return name, tuple(map(Rank, target.ranks)), set(target.ranks)

    def adds(self, name: str, stage: int) -> bool:
        return any(rank in self.c.folded(name) for _, rank, _ in self.loops[stage])

    def store(self, tensor: str, stage_of: dict[str, int], level: str | None, made: bool) -> int:
        """Stores a tensor that leaves; the room that its partial sums take, unless it is held anyway."""
        name, index, ranks = self.target(tensor)
        stage = stage_of[name]
        depth = self.all_moving(stage, ranks)
        if level == "all":
            depth = 0
        elif level in ("tile", "registers"):
            depth = len(self.loops[stage])
        elif level not in (None, "dram") and self.level(stage, level) is not None:
            depth = self.level(stage, level)
        whole = self.fetched(stage, tensor, index, 0)
        stored = self.fetched(stage, tensor, index, self.within(stage, ranks, depth))
        self.events.moved[tensor, "written"] += stored
        if stored > whole:
            self.events.moved[tensor, "read"] += stored - whole
            self.events.buffer_writes += stored - whole
        stepped = self.stepped(name)
        return self.largest(stage, tensor, index, depth, stepped) if self.adds(name, stage) and not made else 0

    def stepped(self, name: str) -> str | None:
        stmt = self.c.stmts[name]
        return stmt.inits[0].rank if isinstance(stmt, Einsum) and stmt.inits else None

    def held(
        self, tensor: str, stage_of: dict[str, int], readers: list, level: str | None
    ) -> tuple[int, int, int | None]:
        """The first and last stage of a made tensor, and inside of how many loops it is held; None: in registers."""
        name, index, ranks = self.target(tensor)
        first = stage_of[name]
        last = max([first, *(stage for stage, _, _ in readers)])
        if level in ("registers", "tile"):
            return first, last, None
        still = set(ranks)
        for stage, _, other in readers:
            if stage == first:
                for own, expr in zip(index, other, strict=True):
                    if expr != own:
                        still.discard(own.name)
        if level == "all":
            return first, last, 0
        if level is not None and self.level(first, level) is not None:
            return first, last, self.level(first, level)
        if last > first:
            return first, last, self.all_moving(first, still, self.shared(first))
        depth = self.all_moving(first, still)
        return first, last, None if depth >= self.within(first, set(self.c.ranks(name))) else depth

    def hold(self, tensor: str, stage_of: dict[str, int], readers: list, level: str | None) -> tuple[int, int, int]:
        """Writes a made tensor into the buffer; its stages and the bytes that it takes there."""
        name, index, _ = self.target(tensor)
        first, last, depth = self.held(tensor, stage_of, readers, level)
        if depth is None:
            return first, last, 0
        if not self.adds(name, first):
            inner = self.within(first, set(self.c.ranks(name)))
            self.events.buffer_writes += self.fetched(first, tensor, index, inner)
        return first, last, self.largest(first, tensor, index, depth, self.stepped(name))

    def feed(self, tensor: str, stage_of: dict[str, int], readers: list, made: bool) -> None:
        """Reads a tile for every execution of every reader, but what its own unit has just made."""
        level = dict(self.region.keep).get(tensor)
        if made and self.held(tensor, stage_of, readers, level)[2] is None:
            return
        for stage, name, index in readers:
            maker = self.c.maker.get(tensor)
            here = maker is not None and stage_of.get(maker) == stage and self.c.units[maker] == self.c.units[name]
            if here and not any(shifted(expr) for expr in index):
                continue
            depth = self.within(stage, set(self.c.ranks(name)))
            self.events.buffer_reads += self.fetched(stage, tensor, index, depth)

    def accumulate(self, name: str, stage: int) -> None:
        """Adds to partial results in the buffer, every time but the first."""
        if not self.adds(name, stage):
            return
        for target in targets(self.c.stmts[name]):
            index = tuple(map(Rank, target.ranks))
            times = self.fetched(stage, target.name, index, self.within(stage, set(self.c.ranks(name))))
            self.events.buffer_writes += times
            self.events.buffer_reads += times - self.fetched(stage, target.name, index, 0)


def batches(count: int, lanes: int) -> Iterator[range]:
    """The rounds in which so many lanes do so many points."""
    return (range(start, min(start + lanes, count)) for start in range(0, count, lanes))


def outside_constants(expr: Expr) -> Expr:
    """A product without its constants, which stand outside of the sum."""
    if isinstance(expr, Apply) and expr.op in ("mul", "div"):
        parts = [outside_constants(expr.args[0]), expr.args[1]]
        if expr.op == "mul":
            parts[1] = outside_constants(parts[1])
        data = [any(isinstance(node, (Read, Rank)) for node in walk(part)) for part in parts]
        if not data[1]:
            return parts[0]
        return parts[1] if not data[0] and expr.op == "mul" else Apply(expr.op, tuple(parts))
    return expr


def affine(expr: Expr) -> bool:
    """Whether a coordinate is a sum of ranks times numbers."""
    return all(
        not isinstance(n, (Read, Reduce)) and not (isinstance(n, Apply) and n.op in ("floordiv", "mod"))
        for n in walk(expr)
    )


def shifted(expr: Expr) -> bool:
    """Whether a coordinate is anything else than a sum of ranks."""
    return affine(expr) and any(isinstance(node, (Const, Extent)) for node in walk(expr))


def renamed(expr: Expr, places: dict[str, Expr]) -> Expr:
    """A filter at the coordinates of a read."""
    if isinstance(expr, Rank):
        return places[expr.name]
    if isinstance(expr, Apply):
        return Apply(expr.op, tuple(renamed(arg, places) for arg in expr.args))
    return expr
