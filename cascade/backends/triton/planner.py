"""From a cascade and the tensors of a call to kernels: groups, how each rank lies, tile sizes.

What depends on the call is the extents, where a tensor lies in memory, and the types. Extents of ranks that a tile
holds whole become numbers of the kernel; all others stay arguments.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import operator
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from cascade.bounds import absent_tensors, conjuncts, loop_bounds
from cascade.backends.triton.grid import suited
from cascade.backends.triton.index import INTEGERS, Index, index_of
from cascade.backends.triton.lower import SMALLEST_SIDE, InPieces, Setting, lower, unsupported
from cascade.backends.triton.partition import (
    LAUNCH,
    Group, Rest, Trips, all_ranks, fold_along, held, partition, power_of_two, reduced_ranks, steps_singly,
)  # fmt: skip
from cascade.backends.triton.plan import BYTES, Axis, Blocks, Kernel, Options, Role, Tensor, extent_expr
from cascade.backends.triton.products import is_plain, matrix_product, multiplied_in, ranks_of
from cascade.backends.triton.recurrence import in_pairs, stepped
from cascade.backends.triton.rows import MOST_VALUES, Rows, expected_tiles, members, most_tiles, rows_a_tile, rows_of
from cascade.backends.triton.shares import Shares, Uneven, shares_of, tables_of
from cascade.backends.triton.split import divisible, merging
from cascade.backends.triton.units import in_base_two
from cascade.backends.triton.updates import Update
from cascade.errors import UnsupportedError
from cascade.inference import FLOATS, infer_dtypes, infer_shapes
from cascade.ir import (
    Apply, Cascade, Const, DType, Einsum, Expr, Extent, Given, GroupBy, Local, Param, Rank, Read, Reduce, Result, Size,
    Stmt, TopK,
)  # fmt: skip
from cascade.recent import recently
from cascade.text import render_stmt
from cascade.walk import defines, expressions, fresh, map_expressions, map_fold, names, reads, rewrite, targets, walk


FEW_PROGRAMS = 128  # fewer leave multiprocessors without work: a stream is shared
SPARSE = 16  # times fewer programs than a choice was made for, from which on a stream is shared by so many times more
LONG_SUM = 1 << 16  # terms that few programs add up one after the other at most: tensor cores cut off what they add
LONG_ROW = 8192  # elements; longer rows that are gone through once are streamed: several programs then hide latency
TRUTHS = 1 << 23  # elements of products over a stream, from which on it is found out first where truths hold along it
SIDE = 64  # rows that a product takes at least as long for
ACCUMULATED = 65536  # numbers in 32 bits that a program can hold in registers at most
EXACT_ACCUMULATED = 4096  # in full precision, of 64 bits: with 4 warps a quarter of the registers
MOST_PIECES = 3  # in which tensor cores sum over a rank that is no power of two
EXACT_PIECE = 64  # the longest in full precision: of a longer one a thread has no registers for its operands in f64
CAREFUL_TILE = 16  # of the stream where rows are gone through one by one: few registers, speed does not matter


@dataclass(frozen=True, slots=True)
class Layout:
    """Where a tensor of a call lies: extents and strides in elements, and whether its base is 16-byte aligned."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: DType
    aligned: bool


@dataclass(frozen=True, slots=True)
class Tiling:
    """Coordinates per tile of the ranks that are no points, and how a kernel is launched."""

    tiles: tuple[tuple[str, int], ...]
    options: Options = field(default=Options())
    parts: int = 1  # programs that share a streamed rank; their states are merged by a second kernel
    even: bool = False  # where data says how much a coordinate has: so many on average, each with as many tiles
    library: bool = False  # no kernel: a library multiplies (`library.py`)
    apart: tuple[str, ...] = ()  # no one kernel: a library makes these, others the rest (`apart.py`)
    in_trips: bool = False  # a rank that a program could hold whole is gone through in trips

    @property
    def shared(self) -> bool:
        """Whether programs share a stream: also where one has all of a row of average length."""
        return self.parts > 1 or self.even

    @property
    def elsewhere(self) -> bool:
        """Whether a group has no kernel with these tiles."""
        return self.library or bool(self.apart)

    def of(self, rank: str) -> int:
        """The tile of a rank."""
        return dict(self.tiles)[rank]


@dataclass(frozen=True, slots=True)
class Program:
    """Everything that a call runs, in order, and the tensors that are made between kernels."""

    steps: tuple[Step, ...]
    made: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """A kernel, or statements that run outside one."""

    group: Group | Rest
    kernel: Kernel | None


@dataclass(slots=True, eq=False)
class Planner:
    """Plans for one cascade and one kind of call."""

    cascade: Cascade
    extents: Mapping[str, int]  # of shape symbols
    layouts: Mapping[str, Layout]  # of the parameters
    descriptors: bool = True  # whether the device has TMA
    moving: frozenset[str] = frozenset()  # shape symbols that change from call to call: no tile counts on them
    supposed: Mapping[str, int] = field(default_factory=dict)  # of those, extents that are no less: choices suit these
    why: Mapping[str, str] = field(default_factory=dict)  # of tensors that the author's cascade has not
    views: Mapping[str, str] = field(default_factory=dict)  # tensors that are the memory of another one
    updates: Mapping[str, Update] = field(default_factory=dict)  # results that are written into a parameter
    joined: Mapping[str, tuple[Size, Size]] = field(default_factory=dict)  # by the extent of a rank that is two: theirs
    in_order: frozenset[str] = frozenset()  # tensors that lie in the order of an index, if its rows can be sorted
    merges: Mapping[str, int] = field(
        default_factory=dict
    )  # by a rank of parts: how many are merged, about; not shared
    apart: frozenset[str] = frozenset()  # what has a kernel of its own, whatever reads it
    narrow: bool | None = None  # whether no float that comes of it has 32 bits; None: what this cascade returns says
    ranks: dict[str, int] = field(init=False)  # the extents that choices are made for
    actual: dict[str, int] = field(init=False)  # those of this call
    sizes: dict[str, Size] = field(init=False)
    dtypes: dict[str, DType] = field(init=False)
    shapes: dict[str, tuple[Size, ...]] = field(init=False)
    lives: dict[str, tuple[tuple[str, ...], tuple[Expr, ...]]] = field(init=False, default_factory=dict)
    hidden: set[str] = field(init=False, default_factory=set)  # tensors whose presence only their kernel knows
    absent: frozenset[str] = field(init=False)  # tensors that may have coordinates that are absent
    rows: tuple[Rows, ...] = field(init=False)  # of the groups of the schedule whose rows run in the order of an index
    _groups: tuple[Group | Rest, ...] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        shapes = infer_shapes(self.cascade)
        self.sizes, self.shapes = dict(shapes.ranks), dict(shapes.tensors)
        self.actual = {rank: self.number(size) for rank, size in shapes.ranks.items()}
        self.ranks = {rank: size if isinstance(size, int) else self.typical[size] for rank, size in self.sizes.items()}
        self.absent = absent_tensors(self.cascade, {**self.extents, **self.actual})
        self.dtypes = infer_dtypes(self.cascade, {name: layout.dtype for name, layout in self.layouts.items()})
        self.rows = self.named_rows()
        self.in_order = frozenset(name for rows in self.rows if self.sortable(rows) for name in self.ordered(rows))
        if self.narrow is None:
            floats = {self.dtypes[result.name] for result in self.cascade.results} & FLOATS
            self.narrow = bool(floats) and floats.isdisjoint({DType.F32, DType.F64})

    def number(self, size: Size) -> int:
        return size if isinstance(size, int) else self.extents[size]

    @property
    def typical(self) -> dict[str, int]:
        """The extents of shape symbols that choices are made for."""
        return {**self.extents, **self.supposed}

    def groups(self) -> tuple[Group | Rest, ...]:
        """The statements by kernel."""
        if self._groups is None:
            rows = members([one for one in self.rows if self.sortable(one)])
            alone = {name: stmt for stmt in self.cascade.body for name in defines(stmt) if name in self.apart}
            alone |= {name: update.stmt for name, update in self.updates.items()}
            found = partition(self.in_rows(rows), self.ranks, self.views, alone)
            groups = (self.by_rows(item, rows) if isinstance(item, Group) else item for item in found)
            self._groups = tuple(self.streamed(item) if isinstance(item, Group) else item for item in groups)
        return self._groups

    # --- rows in the order of an index -------------------------------------------------------------------------------

    def named_rows(self) -> tuple[Rows, ...]:
        """The groups of the schedule whose rows can be sorted, with their names registered."""
        found: list[Rows] = []
        taken = {self.cascade.name, *self.shapes, *self.sizes, *self.extents, *names(self.cascade)}
        for item in self.cascade.schedule:
            if not isinstance(item, GroupBy) or self.dtypes[item.key.tensor] not in INTEGERS:
                continue
            same = next((one for one in found if (one.item.key, one.item.size) == (item.key, item.size)), None)
            if same is not None:
                found.append(dataclasses.replace(same, item=item))
                continue
            rows = rows_of(item, taken)
            self.sizes[rows.rank] = rows.symbol
            for extents in (self.ranks, self.actual):
                extents[rows.rank] = math.prod(extents[rank] for rank in rows.ranks)
            self.shapes |= {rows.order: (self.actual[rows.rank],), rows.value: ()}
            self.dtypes |= dict.fromkeys(rows.names, DType.I32)
            found.append(rows)
        return tuple(found)

    def ordered(self, rows: Rows) -> frozenset[str]:
        """What a group makes in the order of its index, whose shapes then have the places of all tiles in front."""
        found = self.in_order & set(rows.item.statements)
        for stmt in self.cascade.body if found else ():
            for target in targets(stmt):
                if target.name in found:
                    ranks = rows.target(target).ranks
                    self.shapes[target.name] = tuple(self.sizes[rank] for rank in ranks)
        if found:
            self.extents = {**self.extents, **self.padded(self.blocks(rows, self.row_tile(rows)))}
        return found

    def row_tile(self, rows: Rows) -> int:
        """How many rows a tile has where nothing but their number decides."""
        return rows_a_tile(self.ranks[rows.rank], self.values(rows))

    def lies_in_order(self, group: Group) -> bool:
        """Whether a group reads or makes what lies in the order of its rows: then its tiles are those of all others."""
        names = {*group.names, *(name for stmt in group.statements for name in self.outside_reads(stmt, group))}
        return group.rows is not None and not self.in_order.isdisjoint(names)

    def in_rows(self, rows: Mapping[str, Rows]) -> Cascade:
        """The cascade with the statements of each group over the rank that counts its rows, its index still read."""
        own = {target.name: target for stmt in self.cascade.body for target in targets(stmt)}
        body = []
        for stmt in self.cascade.body:
            mine = rows.get(defines(stmt)[0])
            if mine is not None and isinstance(stmt, Einsum):
                beside = {name: own[name] for name in (*mine.item.statements, *self.in_order) if name in own}
                stmt = mine.rewritten(stmt, beside, mine.index)
            body.append(stmt)
        kept = {id(one.item) for one in rows.values()}
        schedule = (d for d in self.cascade.schedule if not isinstance(d, GroupBy) or id(d) in kept)
        return dataclasses.replace(self.cascade, body=tuple(body), schedule=tuple(schedule))

    def by_rows(self, group: Group, rows: Mapping[str, Rows]) -> Group:
        """A group with what it reads of others at the coordinates of its rows, those being its first statements."""
        mine = rows.get(group.names[0])
        if mine is None:
            return group
        written = tuple(stmt for stmt in self.cascade.body if defines(stmt)[0] in group.names)
        beside = (stmt for stmt in self.cascade.body if stmt in written or not self.in_order.isdisjoint(defines(stmt)))
        own = {target.name: target for stmt in beside for target in targets(stmt)}
        statements = [mine.rewritten(stmt, own, mine.here) for stmt in written if isinstance(stmt, Einsum)]
        return dataclasses.replace(
            group, statements=(*mine.leading(self.sizes), *statements), rows=mine, written=written
        )

    def sortable(self, rows: Rows) -> bool:
        """Whether every row of a group has a value, and the values are few enough for tables."""
        return rows.index not in self.absent and self.values(rows) <= MOST_VALUES

    def values(self, rows: Rows) -> int:
        """Below which number the index of a group lies."""
        return self.number(rows.item.size)

    def blocks(self, rows: Rows, tile: int) -> Blocks:
        """The tiles of a group's rows."""
        index = self.tensor(rows.index)
        return Blocks(rows.rank, rows.symbol, index, rows.item.size, tile, rows.tables(tile))

    def padded(self, blocks: Blocks | None, expected: bool = False) -> dict[str, int]:
        """The extent of the rank of sorted rows: its bound, or about what it comes to."""
        if blocks is None:
            return {}
        count, extents = (expected_tiles, self.ranks) if expected else (most_tiles, self.actual)
        return {blocks.symbol: count(extents[blocks.rank], self.number(blocks.values), blocks.tile) * blocks.tile}

    def streamed(self, group: Group) -> Group:
        """A group whose only long rank is held whole, with that rank streamed where one trip over it is enough."""
        whole = group.arrangement.whole
        rank = max(whole, key=lambda rank: self.ranks[rank], default=None)
        if group.arrangement.stream is not None or rank is None or self.products(group):
            return group
        rank = next((stmt.inits[0].rank for stmt in stepped(group.statements)), rank)
        long = LONG_ROW // 2 if in_pairs(group.statements) else LONG_ROW
        short = self.held(group, {rank: power_of_two(self.ranks[rank]) for rank in whole}) <= long
        if short and not self.beside(group, rank):
            return group
        if any(isinstance(stmt, TopK) for stmt in group.statements):
            return group
        found = self.along(group, rank)
        return found if Trips.of(found).count == 1 else group

    def along(self, group: Group, rank: str) -> Group:
        """A group with a rank streamed that it holds whole."""
        rest = tuple(other for other in group.arrangement.whole if other != rank)
        arrangement = dataclasses.replace(group.arrangement, stream=rank, whole=rest)
        return dataclasses.replace(
            group, arrangement=arrangement, fold=fold_along(group.statements, rank, self.cascade)
        )

    def in_trips(self, group: Group) -> Group | None:
        """A group that holds rows whole, which it reads once, as one that reads them in trips; None of any other one.

        Of a short tile more programs are resident, and what is read again is still in the cache.
        """
        whole = group.arrangement.whole
        if group.arrangement.stream is not None or len(whole) != 1 or group.rows is not None or self.products(group):
            return None
        if stepped(group.statements) or any(isinstance(stmt, TopK) for stmt in group.statements):
            return None
        found = self.along(group, whole[0])
        return found if Trips.of(found).count > 1 else None

    def arranged(self, group: Group, tiling: Tiling) -> Group:
        """A group as its ranks lie with these tiles."""
        found = self.in_trips(group) if tiling.in_trips else group
        assert found is not None, "tiles for trips are candidates of groups that can be gone through in trips"
        return found

    def beside(self, group: Group, rank: str) -> bool:
        """Whether recurrences step along a rank with others side by side in memory: those make a tile together."""
        return bool(stepped(group.statements)) and self.memory_order(group)[-1:] != [rank]

    def held(self, group: Group, tiles: Mapping[str, int]) -> int:
        """The elements of the largest tile of a group, `tiles` having the coordinates of each rank at a time."""
        return max(held(stmt, set(tiles), tiles) for stmt in group.statements)

    def stored(self, group: Group | Rest, groups: Sequence[Group | Rest]) -> tuple[str, ...]:
        """What a group writes to memory: results, and what other groups read."""
        results = {result.name for result in self.cascade.results}
        readers = _readers(groups)
        outside = {name for name in group.names if any(other is not group for other in readers.get(name, ()))}
        if isinstance(group, Group) and group.rows is not None:
            outside -= set(group.rows.names)  # every kernel in this order has its own
        outside |= {other.rows.index for other in groups if isinstance(other, Group) and other.rows is not None}
        return tuple(name for name in group.names if name in results or name in outside)

    def tensor(self, name: str, operand: bool = False) -> Tensor:
        """How a tensor lies in memory: parameters as they are given, in any shape, everything else contiguous."""
        update = self.updates.get(name)
        layout = self.layouts.get(name if update is None else update.of)
        shape = self.shapes[name]
        if layout is None:
            numbers = [self.number(size) for size in shape]
            given = self.layouts.get(self.same_memory(name)[0])
            if given is not None:
                layout = Layout(tuple(numbers), viewed(given, numbers), given.dtype, given.aligned)
            else:
                layout = Layout(tuple(numbers), contiguous(numbers), self.storage(name, operand), True)
        known = tuple(
            0 if extent == 1 else stride if stride in (0, 1) else None
            for extent, stride in zip(layout.shape, layout.strides, strict=True)
        )
        if known and layout.shape[-1] == 1:
            known = (*known[:-1], 1)
        result = name in {result.name for result in self.cascade.results}
        return Tensor(name, layout.dtype, shape, known, result, self.describable(layout))

    def same_memory(self, name: str) -> tuple[str, ...]:
        """The tensors that are one in memory, in different shapes; first the one that is written, or given."""

        def written(tensor: str) -> str:
            return written(self.views[tensor]) if tensor in self.views else tensor

        first = written(name)
        return (first, *(view for view in self.views if written(view) == first))

    def describable(self, layout: Layout) -> bool:
        """Whether a descriptor can be made: aligned base and strides, a contiguous last dimension, no expansion."""
        size = BYTES[layout.dtype]
        if not self.descriptors or not layout.aligned or not layout.shape or layout.strides[-1] != 1:
            return False
        outer = list(zip(layout.shape, layout.strides, strict=True))[:-1]
        whole = all(extent == 1 or (stride > 0 and stride * size % 16 == 0) for extent, stride in outer)
        return whole and len(layout.shape) <= 5 and layout.dtype not in (DType.BOOL, DType.I64, DType.F64)

    def storage(self, name: str, operand: bool) -> DType:
        """The type of a stored tensor: what was declared or inferred; between kernels statistics stay in 32 bits.

        What has so many elements that their other 16 bits take longer than a launch, or as many as operands since it is
        stored row by row, has 16, if they have the range of 32.
        """
        names = self.same_memory(name)
        result = next((result for result in self.cascade.results if result.name in names), None)
        dtype = self.dtypes[name if result is None else result.name]
        in_rows = dtype is DType.BF16 and any(
            isinstance(d, GroupBy) and name in d.statements for d in self.cascade.schedule
        )
        elements = math.prod(size if isinstance(size, int) else self.typical[size] for size in self.shapes[name])
        large = dtype is DType.BF16 and elements * BYTES[DType.BF16] > LAUNCH and not self.is_parted(name)
        if result is None and dtype in FLOATS and not operand and not in_rows and not large:
            return DType.F32
        return dtype

    def is_parted(self, name: str) -> bool:
        """Whether an exponential is taken of a tensor, and its kernel computes more from digits that others would lack.

        exp(S - R) is far from 1 where R is the largest of other values than these.
        """
        if name not in _under_exponents(self.cascade):
            return False
        own = next((g for g in self.groups() if isinstance(g, Group) and name in g.names), None)
        return own is not None and any(name in reads(stmt) for stmt in own.statements)

    def outside(self, rest: Rest) -> Cascade:
        """Statements that run outside kernels as a cascade of their own; extents are numbers in it.

        What a tensor in memory lacks is not seen there. So statements before them are run again where a tensor that
        they make has coordinates that are absent, or is kept by nobody.
        """
        self.hidden |= self.absent & set(rest.names)
        groups = self.groups()
        kept = {name for group in groups for name in self.stored(group, groups)} - self.hidden - set(self.lives)
        needed = {name for stmt in rest.statements for name in reads(stmt)}
        body = list(rest.statements)
        every = [s for group in groups for s in (group.plain if isinstance(group, Group) else group.statements)]
        for stmt in reversed(every):
            if stmt not in rest.statements and set(defines(stmt)) & (needed - kept):
                body.insert(0, stmt)
                needed |= set(reads(stmt))
        made = {name for stmt in body for name in defines(stmt)}
        read = dict.fromkeys(name for stmt in body for name in reads(stmt) if name not in made)
        written = {name: self.written(name, groups) for name in self.stored(rest, groups)}
        return Cascade(
            self.cascade.name,
            tuple(Param(name, None, self.numbers(name)) for name in read),
            tuple(Result(n, t.dtype, self.numbers(n), self.result(n).fill) for n, t in written.items()),
            tuple(map(self.sized, body)),
            uses=self.cascade.uses,
            given=tuple(Given(r, self.actual[r]) for r in dict.fromkeys(r for s in body for r in all_ranks(s))),
        )

    def sized(self, stmt: Stmt) -> Stmt:
        """A statement with the extents of this kind of call as numbers."""
        changed = map_expressions(stmt, lambda expr: rewrite(expr, _Static(self.extents).constant))
        return dataclasses.replace(changed, k=self.number(changed.k)) if isinstance(changed, TopK) else changed

    def proving(self) -> dict[str, Size]:
        """What proofs may use of extents, by rank and by shape symbol: of what is supposed, that it is one number."""
        known: dict[str, Size] = {s: s if s in self.supposed else extent for s, extent in self.extents.items()}
        ranks = {rank: known.get(size, size) if isinstance(size, str) else size for rank, size in self.sizes.items()}
        return ranks | known

    def numbers(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in this kind of call."""
        return tuple(map(self.number, self.shapes[name]))

    # --- one group ---------------------------------------------------------------------------------------------------

    def kernel(self, name: str, group: Group, groups: Sequence[Group | Rest], tiling: Tiling) -> Kernel:
        """The kernel of a group with these tiles, the stream not shared."""
        found = self.arranged(group, tiling)
        return self.lowered(name, found, [found if one is group else one for one in groups], tiling)[0]

    def lowered(
        self,
        name: str,
        group: Group,
        groups: Sequence[Group | Rest],
        tiling: Tiling,
        part: str | None = None,
        shares: Shares | None = None,
    ) -> tuple[Kernel, Group]:
        """The kernel of a group, `part` counting the programs that share its stream; the group as it was lowered."""
        static = self.static(group)
        blocks = None if group.rows is None else self.blocks(group.rows, tiling.of(group.rows.rank))
        tiled = self.tiled_rows(group, blocks)
        statements = tuple(self.logical(map_expressions(stmt, lambda e: rewrite(e, static.constant))) for stmt in tiled)
        fold = None if group.fold is None else map_fold(group.fold, lambda e: rewrite(e, static.constant))
        plain = tuple(map(self.shown, statements))
        stored = self.stored(group, groups)
        fixed, changed = self.in_units(group, dataclasses.replace(group, statements=statements, fold=fold), stored)
        axes = tuple(self.axis(group, rank, role, tiling, static) for rank, role in self.roles(group).items())
        if part is not None:  # in front; behind the tiles of a side where others read the same of the stream
            place = sum(axis.role is Role.TILE for axis in axes) if group.arrangement.inner else 0
            axes = (*axes[:place], Axis(part, Role.POINT, self.sizes[part], 1, True), *axes[place:])
        names = dict.fromkeys([*(r for stmt in tiled for r in self.outside_reads(stmt, group)), *stored])
        for tested in [n for n in names if n in self.lives]:
            names |= dict.fromkeys(r.tensor for t in self.lives[tested][1] for r in walk(t) if isinstance(r, Read))
        tables = self.row_tables(blocks)
        names = {n: None for n in names if n not in tables}
        tensors = {n: self.fixed(self.tensor(n, self.feeds_product(n, groups)), static) for n in names} | tables
        results = {n: self.result(n) for n in stored}
        extents = {rank: static.size(self.sizes[rank]) for rank in self.sizes}
        numbers = self.proving() | self.padded(blocks)
        numbers |= {} if blocks is None else {blocks.rank: numbers[blocks.symbol]}
        axes = axes if shares is None else _told(axes, shares)
        index = self.index(fixed, axes, groups) if shares is None else self.share_tables(fixed, shares, tiling)
        entries = {} if index is None else index.entries
        for table, shape in ({} if index is None else index.shapes).items():
            tensors[table] = Tensor(table, DType.I32, shape, (*(None for _ in shape[1:]), 1))
        dtypes = {**self.dtypes, **dict.fromkeys([*tables, *(() if index is None else index.shapes)], DType.I32)}
        numbers |= {} if index is None else index.sizes
        self.possible(tensors, [n for n in names if n not in stored], blocks)
        lives = {n: self.lives[n] for n in names if n in self.lives}
        setting = Setting(
            axes, tensors, dtypes, results, extents, numbers, tiling.options, entries, lives, split=part,
            shares=shares, most=self.typical, actual=self.actual, narrow=bool(self.narrow), joined=self.joined,
        )  # fmt: skip
        setting = self.scattered(setting, group)
        try:
            kernel = lower(name, fixed, self.in_pieces(setting, group))
        except InPieces:
            kernel = lower(name, fixed, setting)
        self.remember(kernel, fixed, stored)
        if kernel.watched and blocks is not None:
            raise unsupported("sorted rows of a product that leaves out what is absent")
        careful = self.careful(name, fixed, setting) if kernel.watched else None
        if blocks is not None:
            kernel = dataclasses.replace(kernel, tensors=(*kernel.tensors, blocks.index, tables[blocks.tables[2]]))
        reverse = self.reversed_axis(kernel)
        base_two = tuple(name for name in group.names if name in changed)
        kernel = dataclasses.replace(kernel, statements=plain, base_two=base_two, reverse=reverse, index=index)
        return suited(dataclasses.replace(kernel, careful=careful, rows=blocks, why=self.reasons(group))), fixed

    def shown(self, stmt: Stmt) -> str:
        """A statement as text; of a parameter's update, what it writes."""
        update = self.updates.get(defines(stmt)[0])
        return render_stmt(stmt) if update is None else update.text

    def reasons(self, group: Group) -> tuple[str, ...]:
        """Why a group makes tensors that the author's cascade has not."""
        return tuple(f"{name} is {self.why[name]}" for name in group.names if name in self.why)

    def in_units(self, group: Group, fixed: Group, stored: Sequence[str]) -> tuple[Group, frozenset[str]]:
        """A group with its statements for tiles, exponents in base two where floats are short; what that changes."""
        if not self.short(group):
            return fixed, frozenset()
        kept = (*stored, *(stmt.target.name for stmt in stepped(fixed.statements)))
        kept += tuple(name for name in group.names if self.dtypes[name] not in FLOATS)
        statements, fold, changed = in_base_two(fixed.statements, fixed.fold, kept, group.arrangement.stream)
        return dataclasses.replace(fixed, statements=statements, fold=fold), changed

    def tiled_rows(self, group: Group, blocks: Blocks | None) -> tuple[Stmt, ...]:
        """The statements of a group, with the tables of its rows for the tile at hand."""
        if group.rows is None or blocks is None:
            return group.statements
        rows, tile = group.rows, blocks.tile
        return tuple(rows.tiled(stmt, tile) if isinstance(stmt, Einsum) else stmt for stmt in group.statements)

    def row_tables(self, blocks: Blocks | None) -> dict[str, Tensor]:
        """The tables of sorted rows as tensors: the row at each place, the value of each tile, how many tiles."""
        if blocks is None:
            return {}
        tiles = self.padded(blocks)[blocks.symbol] // blocks.tile
        shapes: tuple[tuple[Size, ...], ...] = ((blocks.symbol,), (tiles,), (2,))
        return {name: Tensor(name, DType.I32, s, (1,)) for name, s in zip(blocks.tables, shapes, strict=True)}

    def scattered(self, setting: Setting, group: Group) -> Setting:
        """The setting in which results go to the coordinates of their rows, or to those of a parameter."""
        rows = group.rows
        if rows is None:
            places = {name: self.updates[name].place for name in setting.results if name in self.updates}
            return dataclasses.replace(setting, scattered=places)
        own = {target.name: target for stmt in group.written for target in targets(stmt)}
        scattered = {name: rows.scattered(own[name]) for name in setting.results if name not in self.in_order}
        inside = frozenset((rows.here, *(name for _, name in rows.places)))
        return dataclasses.replace(setting, scattered=scattered, row=rows.row, inside=inside)

    def possible(self, tensors: Mapping[str, Tensor], read: Sequence[str], blocks: Blocks | None) -> None:
        """Raises where a kernel cannot have what it reads."""
        if blocks is not None and blocks.index.name in self.absent:
            raise unsupported(f"rows in the order of {blocks.index.name}, of which some coordinates are absent")
        if any(tensor.dtype is DType.F64 for tensor in tensors.values()):
            raise unsupported("a tensor of f64, which kernels would compute in f32")
        needed = [*read, *(() if blocks is None else (blocks.index.name,))]
        if unseen := [name for name in needed if name in self.hidden]:
            raise unsupported(f"{unseen[0]}, of which some coordinates are absent, between two kernels")

    def logical(self, stmt: Stmt) -> Stmt:
        """A statement in which the extreme of truth values is whether any or all of them hold."""
        if not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce):
            return stmt
        reducer = {"max": "any", "min": "all"}.get(stmt.expr.reducer)
        if reducer is None or self.dtypes[stmt.target.name] is not DType.BOOL:
            return stmt
        return dataclasses.replace(stmt, expr=dataclasses.replace(stmt.expr, reducer=reducer))

    def in_pieces(self, setting: Setting, group: Group) -> Setting:
        """The setting with reduced ranks of products in pieces, where the next power of two would waste too much.

        576  -->  512 and 64, instead of 1024

        What another product has whole, and what the kernel itself makes along a rank, lies in one piece.
        """
        exact = self.exact(group)
        kept = {rank for stmt in group.statements for target in targets(stmt) for rank in target.ranks}
        found = [matrix_product(stmt) for stmt in group.statements]
        products = {product.over for product in found if product is not None}
        summed = {rank for stmt in group.statements for rank in reduced_ranks(stmt) if matrix_product(stmt) is None}
        axes: list[Axis] = []
        pieces: dict[str, tuple[tuple[str, int], ...]] = {}
        taken = set(self.sizes)
        for axis in setting.axes:
            sizes = pieces_of(axis.extent, exact) if isinstance(axis.extent, int) else ()
            whole = axis.role is Role.WHOLE and axis.rank in products - kept - summed
            if not whole or len(sizes) < 2 or sizes[-1] < 16:
                axes.append(axis)
                continue
            names = [axis.rank, *(fresh(axis.rank, taken) for _ in sizes[1:])]
            pieces[axis.rank] = tuple(zip(names, (sum(sizes[:n]) for n in range(len(sizes))), strict=True))
            axes.extend(Axis(name, Role.WHOLE, size, size, True) for name, size in zip(names, sizes, strict=True))
        if not pieces:
            return setting
        numbers = {**setting.numbers, **{axis.rank: axis.tile for axis in axes if axis.rank not in self.sizes}}
        numbers |= {axis.rank: axis.tile for axis in axes if axis.rank in pieces}
        extents = {**setting.extents, **{axis.rank: axis.extent for axis in axes}}
        return dataclasses.replace(setting, axes=tuple(axes), pieces=pieces, numbers=numbers, extents=extents)

    def remember(self, kernel: Kernel, group: Group, stored: Sequence[str]) -> None:
        """Notes under which tests a stored tensor is present, for the kernels that read it.

        That a coordinate lies inside the tensor is none of them, though a tile that reaches beyond tests it.
        """
        ranks = {target.name: target.ranks for stmt in group.statements for target in targets(stmt)}
        known = {name for name, _ in kernel.live}
        self.hidden |= {name for name in stored if name not in known and name in self.absent}
        inside = {axis.rank: Apply("lt", (Rank(axis.rank), extent_expr(axis.extent))) for axis in kernel.axes}
        for name, live in kernel.live:
            if name in self.updates:  # elsewhere it is what it was
                continue
            tests = tuple(test for test in live if test not in {inside.get(rank) for rank in ranks[name]})
            read = {node.tensor for test in tests for node in walk(test) if isinstance(node, Read)}
            inner = read & set(group.names) - set(stored)
            sorted_ = group.rows is not None and bool(tests)
            if inner or sorted_ or any(isinstance(node, Local) for test in tests for node in walk(test)):
                self.hidden.add(name)
            elif tests:
                self.lives[name] = (ranks[name], tests)

    def view(self, rest: Rest) -> tuple[str, str]:
        """A tensor in another shape, and which: it is present where that is."""
        (stmt,) = rest.statements
        assert isinstance(stmt, Einsum) and isinstance(stmt.expr, Read)
        name, of = stmt.target.name, stmt.expr.tensor
        if of in self.hidden:
            self.hidden.add(name)
        if of in self.lives:
            ranks, tests = self.lives[of]
            places: dict[Expr, Expr] = dict(zip(map(Rank, ranks), stmt.expr.index, strict=True))
            moved = tuple(rewrite(test, lambda node: places.get(node, node)) for test in tests)
            self.lives[name] = (stmt.target.ranks, moved)
        return name, of

    def index(self, group: Group, axes: Sequence[Axis], groups: Sequence[Group | Rest]) -> Index | None:
        """The index for filters of a group that compare data along its stream; None where there are none.

        The data is given, or made whole by kernels before. Truths only where products of a long stream wait for them:
        elsewhere what is not visited takes less time than another launch.
        """
        stream = group.arrangement.stream
        if stream is None:
            return None
        rows = [axis.rank for axis in axes if axis.role is Role.TILE]
        tests = dict.fromkeys(
            test
            for stmt in group.statements
            if isinstance(stmt, Einsum)
            for test in conjuncts(stmt.where)
            if loop_bounds([test], stream, rows).rest
        )
        tiles = {axis.rank: axis.advance for axis in axes if axis.role in (Role.TILE, Role.STREAM)}
        own = {*group.names, *self.absent}
        known = [t for t in tests if own.isdisjoint(node.tensor for node in walk(t) if isinstance(node, Read))]
        truths = bool(self.products(group)) and self.multiplied(group, stream) >= TRUTHS
        return index_of(known, stream, rows, tiles, self.sizes, self.actual, self.shapes, self.dtypes, truths)

    def multiplied(self, group: Group, stream: str) -> int:
        """About how many elements the tiles of a product over a stream have, all programs together."""
        tiled, packed = self.tiled(group), self.packed(group)
        places = 1
        for rank in group.arrangement.shared:
            extent = self.ranks[rank]
            places *= -(-extent // packed[rank]) * SIDE if rank in packed else max(extent, SIDE * (rank in tiled))
        return places * self.ranks[stream]

    def indexer(self, index: Index, groups: Sequence[Group | Rest]) -> Planner:
        """The planner of an index."""
        read = [param.name for param in index.cascade.params]
        layouts = {name: self.layouts.get(name) or self.made(name, groups) for name in read}
        extents = {**self.extents, **index.sizes}
        return Planner(
            index.cascade, extents, layouts, self.descriptors, self.moving, self.supposed, joined=self.joined
        )

    def uneven(self, group: Group) -> Uneven | None:
        """What data says of how much of the stream is visited at the coordinates of one rank; None where it does not.

        It is what is given that says so, and each program has one coordinate of the rank.
        """
        stream = group.arrangement.stream
        if stream is None:
            return None
        roles = self.roles(group)
        tests = [t for stmt in group.statements if isinstance(stmt, Einsum) for t in conjuncts(stmt.where)]
        tests = [test for test in dict.fromkeys(tests) if stream in ranks_of(test)]
        whole = [rank for rank, role in roles.items() if role in (Role.TILE, Role.WHOLE)]
        found = loop_bounds(tests, stream, whole)
        if found.stop is None:
            return None
        nodes = [n for end in (found.first, found.stop) if end is not None for n in walk(end)]
        read = {node.tensor for node in nodes if isinstance(node, Read)}
        ranks = {node.name for node in nodes if isinstance(node, Rank)}
        known = {size for name in read for size in self.shapes[name]}
        bound = all(node.name in known for node in nodes if isinstance(node, Extent | Local))
        if not read or not read <= set(self.layouts) or len(ranks) != 1 or not bound:
            return None
        (rank,) = ranks
        several = roles.get(rank) is Role.POINT and self.ranks[rank] > 1
        return Uneven(rank, found.first, found.stop) if several and self.divisible(group) else None

    def share_tables(self, group: Group, shares: Shares, tiling: Tiling) -> Index:
        """What computes the tables of parts."""
        stream = group.arrangement.stream
        assert stream is not None
        count, tile = self.actual[shares.part], tiling.of(stream)
        return tables_of(shares, tiling.parts, tile, self.sizes, count, self.shapes, self.dtypes)

    def split(
        self, name: str, group: Group, groups: Sequence[Group | Rest], tiling: Tiling
    ) -> tuple[Kernel, Planner, tuple[Group | Rest, ...]]:
        """The kernel of a group whose stream is shared by `tiling.parts` programs, and the planner of what merges.

        Where parts are to be even, by so many for each coordinate on average; a row that ends has one that is shorter.
        """
        stream = group.arrangement.stream
        assert stream is not None
        uneven = self.uneven(group) if tiling.even else None
        rows = 0 if uneven is None else self.actual[uneven.rank]
        count = tiling.parts if uneven is None else max((tiling.parts + 1) * rows, rows + 2)
        part, parts = fresh(f"{stream}_part", set(self.sizes)), fresh(f"{stream.upper()}_PARTS", set(self.extents))
        inner = copy.copy(self)
        inner.sizes, inner.ranks = {**self.sizes, part: parts}, {**self.ranks, part: count}
        inner.actual = {**self.actual, part: count}
        inner.extents = {**self.extents, parts: count}
        shares = None if uneven is None else shares_of(uneven, part, {*self.sizes, *self.shapes})
        try:
            kernel, fixed = inner.lowered(name, group, groups, tiling, part, shares)
        except UnsupportedError:
            if shares is None or tiling.parts == 1:
                raise
            return self.split(name, group, groups, dataclasses.replace(tiling, even=False))
        stored = [
            dataclasses.replace(self.result(result), dtype=self.written(result, groups).dtype)
            for result in self.stored(group, groups)
        ]
        unkept = set(group.names) - {result.name for result in stored} - {item.state for item in kernel.partial}
        if any(isinstance(n, Read) and n.tensor in unkept for i in kernel.partial for t in i.live for n in walk(t)):
            raise unsupported("states in parts under a test on what their kernel makes")
        cascade = merging(
            f"{name}_merge", fixed, kernel.partial, part, stored, self.shapes, inner.sizes, inner.extents,
            self.dtypes, shares,
        )  # fmt: skip
        known = {param.name: self.lives[param.name] for param in cascade.params if param.name in self.lives}
        asked = {n.tensor for _, tests in known.values() for t in tests for n in walk(t) if isinstance(n, Read)}
        if unseen := [
            p.name for p in cascade.params if p.name in self.hidden or (known and not asked <= {*self.layouts})
        ]:
            raise unsupported(f"{unseen[0]}, of which some coordinates are absent, where parts are merged")
        layouts = dict(self.layouts)
        for item in kernel.partial:
            shape = tuple(inner.number(size) for size in item.tensor.shape)
            layouts[item.tensor.name] = Layout(shape, contiguous(shape), item.tensor.dtype, True)
        layouts |= dict.fromkeys(() if shares is None else shares.tables, Layout((count,), (1,), DType.I32, True))
        own = {param.name: layouts.get(param.name) or self.made(param.name, groups) for param in cascade.params}
        own |= {name: self.layouts[name] for name in asked}
        merger = Planner(
            cascade, inner.extents, own, self.descriptors, self.moving, self.supposed, joined=self.joined,
            narrow=self.narrow, merges={part: count if shares is None else min(count, tiling.parts + 1)},
        )  # fmt: skip
        merger.lives |= known
        merger.shapes |= {name: self.shapes[name] for name in asked}
        merger.dtypes |= {name: self.dtypes[name] for name in asked}
        return kernel, merger, merger.groups()

    def written(self, name: str, groups: Sequence[Group | Rest]) -> Tensor:
        """How a tensor lies that a kernel writes."""
        return self.tensor(name, self.feeds_product(name, groups))

    def made(self, name: str, groups: Sequence[Group | Rest]) -> Layout:
        """Where a tensor lies that an earlier group has written."""
        tensor = self.written(name, groups)
        shape = tuple(self.number(size) for size in tensor.shape)
        return Layout(shape, contiguous(shape), tensor.dtype, True)

    def careful(self, name: str, group: Group, setting: Setting) -> Kernel:
        """The kernel for one coordinate of each tiled axis: sums of products that leave out what is absent."""
        axes = []
        within: dict[str, int] = {}
        for axis in setting.axes:
            if axis.role in (Role.TILE, Role.STREAM):
                within[axis.rank] = axis.advance
            if axis.role is Role.TILE:
                axis = dataclasses.replace(axis, role=Role.POINT, tile=1, exact=True, step=0)
            elif axis.role in (Role.STREAM, Role.INNER):
                tile = min(axis.tile, CAREFUL_TILE)
                exact = self.ranks[axis.rank] % tile == 0 and axis.extent not in self.moving
                axis = dataclasses.replace(axis, tile=tile, exact=exact)
            axes.append(axis)
        tensors = {key: dataclasses.replace(tensor, described=False) for key, tensor in setting.tensors.items()}
        options = dataclasses.replace(setting.options, edge_tile=0)
        return lower(
            f"{name}_one",
            group,
            dataclasses.replace(setting, axes=tuple(axes), tensors=tensors, options=options, within=within),
        )

    def short(self, group: Group) -> bool:
        """Whether all floats that a group reads, or all that it writes, have 16 bits or fewer.

        Only then exponents change their base: in 32 bits the rounding of x * log2(e) would be seen.
        """
        read = {name for stmt in group.statements for name in self.outside_reads(stmt, group)}
        floats = [dtype for name in read if (dtype := self.tensor(name).dtype) in FLOATS]
        written = {self.tensor(name).dtype for name in self.stored(group, self.groups())}
        fine = {DType.F32, DType.F64}
        return (bool(floats) and fine.isdisjoint(floats)) or fine.isdisjoint(written)

    def outside_reads(self, stmt: Stmt, group: Group) -> list[str]:
        return [name for name in reads(stmt) if name not in group.names]

    def fixed(self, tensor: Tensor, static: _Static) -> Tensor:
        return dataclasses.replace(tensor, shape=tuple(static.size(size) for size in tensor.shape))

    def feeds_product(self, name: str, groups: Sequence[Group | Rest]) -> bool:
        """Whether a tensor is an operand of a matrix product of a later group that is not one in full precision."""
        names, multiplying = self.same_memory(name), _multiplying(groups)
        found = (group for one in names for group in multiplying.get(one, ()))
        return any(set(names).isdisjoint(group.names) and not self.exact(group) for group in found)

    def result(self, name: str) -> Result:
        """How a stored tensor is declared; what goes from kernel to kernel is filled with NaN where absent."""
        for result in self.cascade.results:
            if result.name == name:
                return result
        return Result(name, None, self.shapes[name], Const(0))

    def static(self, group: Group) -> _Static:
        """The shape symbols that are numbers in a kernel: those of ranks that a tile of a matrix product has whole.

        So is what coordinates are divided by, as far as that stays from call to call: the quotient then takes a shift,
        and it is known which neighbours share it.
        """
        found = {size: self.extents[size] for _, size in quotients(group) if isinstance(size, str) and self.stays(size)}
        for rank, role in self.roles(group).items() if self.products(group) else ():
            size = self.sizes[rank]
            if role is Role.WHOLE and isinstance(size, str):
                found[size] = self.extents[size]
        return _Static(found)

    def stays(self, symbol: str) -> bool:
        """Whether a shape symbol has had one value in all calls."""
        return symbol not in self.moving

    def numbers_of_kernels(self) -> frozenset[str]:
        """The shape symbols that are numbers in some kernel."""
        groups = (group for group in self.groups() if isinstance(group, Group))
        return frozenset(symbol for group in groups for symbol in self.static(group).numbers)

    def roles(self, group: Group) -> dict[str, Role]:
        """How each rank lies, in the order of dimensions and of the grid."""
        arrangement = group.arrangement
        tiled = self.tiled(group)
        order = [rank for rank in arrangement.shared if rank in tiled]
        points = [rank for rank in reversed(arrangement.shared) if rank not in tiled]
        inner = [rank for rank in (arrangement.stream,) if rank is not None]
        inner += [*arrangement.whole, *arrangement.inner]
        if not self.products(group):
            memory = self.memory_order(group)
            rest = sorted([*order, *inner], key=lambda rank: memory.index(rank) if rank in memory else -1)
            named = [*points, *rest]
        else:
            named = [*order, *points, *inner]
        roles = dict.fromkeys(order, Role.TILE) | dict.fromkeys(points, Role.POINT)
        roles |= dict.fromkeys(arrangement.whole, Role.WHOLE) | dict.fromkeys(arrangement.inner, Role.INNER)
        if arrangement.stream is not None:
            roles[arrangement.stream] = Role.STREAM
        return {rank: roles[rank] for rank in named}

    def products(self, group: Group) -> list[Stmt]:
        """The statements that multiply matrices; one with a vector of few coordinates adds rows, but in a merge.

        So does one with a vector where its side has several ranks: tiles of it would have three.
        """
        stream, inner = group.arrangement.stream, group.arrangement.inner
        if stream is not None and not inner and all(is_plain(stmt, self.dtypes) for stmt in group.statements):
            return []
        found = {stmt: product for stmt in group.statements if (product := matrix_product(stmt)) is not None}
        few = stream is None or (
            not inner and self.sizes[stream] not in self.moving and self.ranks[stream] < SMALLEST_SIDE
        )
        if self.merges:
            return list(found)
        one = {stmt for stmt, product in found.items() if not few and len(product.rows | product.columns) < 2}
        return [stmt for stmt, product in found.items() if product.two_sided or stmt in one]

    def across(self, group: Group, whole: Mapping[str, int]) -> int:
        """The columns of all products of a group together, of which a row of a tile has all."""
        found = 0
        for stmt in self.products(group):
            sides = [whole[rank] for target in targets(stmt) for rank in target.ranks if rank in whole]
            found += math.prod(sides) if sides else 0
        return max(found, 1)

    def exact(self, group: Group) -> bool:
        """Whether a product multiplies in full precision: in f64, so that tiles are small."""
        stored = self.stored(group, self.groups())
        results = {self.storage(name, False) for name in stored}
        for product in filter(None, map(matrix_product, group.statements)):
            nodes = (node for term in (*product.left, *product.right) for node in walk(term))
            names = {node.tensor for node in nodes if isinstance(node, Read) and self.dtypes[node.tensor] in FLOATS}
            data = {self.dtypes[name] for name in names if name not in group.names}
            computed = not all(isinstance(term, Read) for term in (*product.left, *product.right))
            if computed and any(self.dtypes[name] in (DType.F32, DType.F64) for name in stored):
                return True
            kinds = data if data and not results & {DType.F32, DType.F64} else {self.dtypes[name] for name in names}
            if kinds and multiplied_in(kinds) is DType.F32:
                return True
        return False

    def memory_order(self, group: Group) -> list[str]:
        """The ranks in the order of the dimensions of what is read and written, the longest access first."""
        found: list[tuple[str, ...]] = [target.ranks for stmt in group.statements for target in targets(stmt)]
        for stmt in group.statements:
            for expr in expressions(stmt):
                for node in walk(expr):
                    if isinstance(node, Read) and node.tensor not in group.names:
                        ranks = tuple(part.name for part in node.index if isinstance(part, Rank))
                        if node.tensor in self.layouts:
                            strides = self.layouts[node.tensor].strides
                            pairs = [(strides[i], p.name) for i, p in enumerate(node.index) if isinstance(p, Rank)]
                            ranks = tuple(name for _, name in sorted(pairs, key=lambda pair: -pair[0]))
                        found.insert(0, ranks)
        found.sort(key=len, reverse=True)
        return list(dict.fromkeys(rank for ranks in found for rank in ranks))

    def tiled(self, group: Group) -> set[str]:
        """The shared ranks that a program has a tile of: rows that are sorted, and what lies contiguously in memory."""
        rows = set() if group.rows is None or self.products(group) else {group.rows.rank}
        return self.tiled_sides(group) | rows

    def tiled_sides(self, group: Group) -> set[str]:
        """The shared ranks that a program has a tile of: the sides of matrix products, else what lies contiguously."""
        shared = set(group.arrangement.shared)
        products = [found for stmt in self.products(group) if (found := matrix_product(stmt)) is not None]
        if products:
            sides = [side & shared for found in products for side in (found.rows, found.columns)]
            chosen: set[str] = set()
            for side in sides:  # a side has one dimension: the rank with most coordinates, up to a tile of them
                if side and not chosen & side:
                    order = list(group.arrangement.shared)
                    chosen.add(max(side, key=lambda rank: (min(self.ranks[rank], 128), order.index(rank))))
            if not chosen or (len(chosen) == 1 and all(self.ranks[rank] < 16 for rank in chosen)):
                packed = {rank for product in products for rank, _ in product.grouped}
                if packed & shared:
                    return packed & shared
            return chosen
        inner = [r for r in (group.arrangement.stream, *group.arrangement.whole) if r is not None]
        memory = [rank for rank in self.memory_order(group) if rank in shared or rank in inner]
        if not memory:
            return set()
        singly = self.steps_singly(group)
        inner = [rank for rank in inner if not singly or rank != group.arrangement.stream]
        size = max(held(stmt, set(inner), self.ranks) for stmt in group.statements)
        if memory[-1] in shared or (group.arrangement.stream is not None and not singly):
            chosen = {memory[-1]} & shared
            if not inner and len(memory) > 1 and self.ranks[memory[-1]] < 512:
                chosen.add(memory[-2])
            return chosen
        last = [rank for rank in memory if rank in shared][-1:]
        return set(last) if size <= 1024 else set()

    def axis(self, group: Group, rank: str, role: Role, tiling: Tiling, static: _Static) -> Axis:
        tile = 1 if role is Role.POINT else tiling.of(rank)
        extent = static.size(self.sizes[rank])
        step = self.packed(group).get(rank, 0) if role is Role.TILE else 0
        step = math.gcd(step, tile) if step > tile else step  # a smaller tile does not reach beyond its neighbours
        step = 0 if step == tile else step
        exact = not step and self.ranks[rank] % tile == 0 and (tile == 1 or extent not in self.moving)
        exact = exact or (group.rows is not None and group.rows.rank == rank)  # what is in vain is marked by its row
        return Axis(rank, role, extent, tile, exact, step=step)

    def packed(self, group: Group) -> dict[str, int]:
        """The tiled ranks of which only so many neighbours share what a product is with."""
        sides = self.product_ranks(group)
        return {rank: by for rank, by in self.grouped(group).items() if rank not in sides}

    def reversed_axis(self, kernel: Kernel) -> str | None:
        """The tiled axis along which loops get longer: its last tile starts first."""
        from_bounds = [op for op in kernel.ops if hasattr(op, "stop") and getattr(op, "stop", None) is not None]
        for op in from_bounds:
            for axis in kernel.grid:
                stop = getattr(op, "stop", None)
                names = {getattr(node, "name", "") for node in walk(stop)} if stop is not None else set()
                if axis.role is Role.TILE and f"{axis.rank}_last" in names:
                    return axis.rank
        return None

    def bucket(self, group: Group) -> tuple[object, ...]:
        """What a choice of tiles depends on: extents that are whole in a tile, the size of others, types, layout."""
        roles = self.roles(group)
        sizes = [(rank, self.about(rank, role, bool(self.products(group)))) for rank, role in roles.items()]
        read = dict.fromkeys(name for stmt in group.statements for name in self.outside_reads(stmt, group))
        numbers = self.static(group).numbers.items()
        return (*sizes, *numbers, *((name, self.tensor(name).dtype, self.tensor(name).described) for name in read))

    def about(self, rank: str, role: Role, fixed: bool) -> tuple[str, int]:
        """The size of a rank, roughly: to a factor of 2, or what is supposed where it changes from call to call.

        A tile that has a rank whole must be no shorter, and where it is `fixed` the extent is a number of the kernel.
        """
        extent = self.ranks[rank]
        if role is Role.WHOLE:
            return ("is", extent) if fixed else ("up to", power_of_two(extent))
        bits = (extent - 1).bit_length()
        return ("up to", bits)

    # --- tiles -------------------------------------------------------------------------------------------------------

    def default_tiling(self, group: Group) -> Tiling:
        """The first choice of tiles."""
        roles = self.roles(group)
        products = self.products(group)
        whole = {rank: power_of_two(self.ranks[rank]) for rank, role in roles.items() if role is Role.WHOLE}
        tiled = [rank for rank, role in roles.items() if role is Role.TILE]
        stream = group.arrangement.stream
        tiles = dict(whole)
        if products:
            sides = self.product_ranks(group)
            tiles |= {rank: max(size, 16) for rank, size in whole.items() if rank in sides}
            exact, two = self.exact(group), len(tiled) == 2
            rows, room = (64, 2 * EXACT_ACCUMULATED) if exact else (128, ACCUMULATED)
            across = 1 if two else self.across(group, whole)
            while rows > 16 and rows * across > room // 2:
                rows //= 2
            trip = (16 if two else max(rows, 32)) if exact else 64
            if group.arrangement.inner:
                return self.nested_tiling(group, tiles, tiled)
            for rank in tiled:
                if group.rows is not None and rank == group.rows.rank:
                    fixed = self.row_tile(group.rows)
                    tiles[rank] = fixed if self.lies_in_order(group) else min(rows, fixed)
                    continue
                together = self.packed(group).get(rank)
                tiles[rank] = min(rows, max(16, power_of_two(together or self.ranks[rank])))
            if stream is not None:
                tiles[stream] = min(trip, max(16, power_of_two(self.ranks[stream])))
                tiles[stream] = 1 if self.steps_singly(group) else tiles[stream]
            warps = 8 if (two and not exact) or rows * across > room // (2 if exact else 4) else 4
            edge = 32 if stream is not None and tiles[stream] > 32 else 0
            options = Options(warps, 3 if two else 2, edge)
            return Tiling(tuple(tiles.items()), options, self.default_parts(group, tiles))
        size = max(held(stmt, set(whole), self.ranks) for stmt in group.statements)
        if stream is not None:
            again = self.goes_again(group)  # then few rows at a time, so that they are still in the cache
            tiles[stream] = min(power_of_two(self.length(stream)), max(16, (32768 if again else 4096) // size))
            if tiled:
                tiles[stream] = min(tiles[stream], 64)
            tiles[stream] = 1 if self.steps_singly(group) else tiles[stream]
            size *= tiles[stream]
        for rank in tiled:
            room = max(1, (64 if self.steps_singly(group) else 2048) // size)
            tiles[rank] = min(power_of_two(self.ranks[rank]), room)
            if group.rows is not None and rank == group.rows.rank:
                tiles[rank] = self.row_tile(group.rows)
            size *= tiles[rank]
        warps = max(1, min(32, size // (512 if in_pairs(group.statements) else 1024)))
        return Tiling(tuple(tiles.items()), Options(warps, 2), self.default_parts(group, tiles))

    def nested_tiling(self, group: Group, tiles: dict[str, int], tiled: Sequence[str]) -> Tiling:
        """The first choice where products are summed for each tile of the stream: as large as their sums allow."""
        stream, exact = group.arrangement.stream, self.exact(group)
        assert stream is not None
        rows, trip, step = (64, 64, 16) if exact else (128, 256, 64)
        while rows * trip * self.summed(group) > (EXACT_ACCUMULATED if exact else ACCUMULATED // 2):
            trip //= 2
        wanted = dict.fromkeys(tiled, rows) | {stream: trip} | dict.fromkeys(group.arrangement.inner, step)
        for rank, tile in wanted.items():
            tiles[rank] = min(tile, max(16, power_of_two(self.packed(group).get(rank) or self.ranks[rank])))
        options = Options(4 if exact else 8, 3, 32 if tiles[stream] > 32 else 0)
        return Tiling(tuple(tiles.items()), options, self.default_parts(group, tiles))

    def length(self, stream: str) -> int:
        """How many coordinates of a stream a trip has, about: where parts are merged, those of one row."""
        return self.merges.get(stream, self.ranks[stream])

    def goes_again(self, group: Group) -> bool:
        """Whether rows are gone through more than once in tiles that may be as long as a program can hold."""
        return Trips.of(group).count > 1 and not stepped(group.statements)

    def summed(self, group: Group) -> int:
        """How many products are summed for each tile of the stream: each has an accumulator."""
        return sum(not set(group.arrangement.inner).isdisjoint(reduced_ranks(stmt)) for stmt in group.statements)

    def divisible(self, group: Group) -> bool:
        """Whether programs can share the stream of a group."""
        return not self.merges and divisible(group, self.stored(group, self.groups()))

    def default_parts(self, group: Group, tiles: Mapping[str, int]) -> int:
        """How many programs share the stream of a group: more than one where there are too few to fill a GPU."""
        stream = group.arrangement.stream
        if stream is None or group.rows is not None or not self.divisible(group):
            return 1
        programs = math.prod(self.programs(group, tiles, self.ranks))
        return max(1, min(FEW_PROGRAMS // programs, self.most_parts(stream, tiles))) if programs < FEW_PROGRAMS else 1

    def programs(self, group: Group, tiles: Mapping[str, int], ranks: Mapping[str, int]) -> list[int]:
        """How many programs lie along each shared rank, of these extents."""
        packed = self.packed(group)
        return [-(-ranks[rank] // (packed.get(rank) or tiles.get(rank, 1))) for rank in group.arrangement.shared]

    def most_parts(self, stream: str, tiles: Mapping[str, int]) -> int:
        """By how many programs a stream may be shared, each with some tiles of it."""
        return -(-self.ranks[stream] // tiles[stream]) // 4

    def in_more_parts(self, group: Group, tiling: Tiling) -> Tiling:
        """The tiling with its stream in more parts, where a call has far fewer programs than it was chosen for.

        Tiles serve for calls of many extents, and where several ranks are shorter at once, what is left may be a tile.
        A rank that changes alone keeps its parts: what merges them is another kernel where there are more. But a sum of
        products is in so many that none is too long for its accumulator.
        """
        stream, tiles = group.arrangement.stream, dict(tiling.tiles)
        other = tiling.even or tiling.elsewhere or tiling.in_trips or tiling.options.resident
        if stream is None or group.rows is not None or other:
            return tiling
        chosen, here = (self.programs(group, tiles, ranks) for ranks in (self.ranks, self.actual))
        more = 1
        if self.products(group) and math.prod(here) < FEW_PROGRAMS and self.divisible(group):
            more = -(-self.actual[stream] // LONG_SUM)
        together = sum(map(operator.gt, chosen, here)) > 1
        if tiling.parts > 1 and together and math.prod(chosen) >= SPARSE * math.prod(here):
            more = max(more, SPARSE * tiling.parts)
        return dataclasses.replace(tiling, parts=max(tiling.parts, min(more, self.most_parts(stream, tiles))))

    def steps_singly(self, group: Group) -> bool:
        """Whether the stream goes one coordinate at a time.

        Where products sum over another rank beside it, a page of it; where nothing composes the steps of a recurrence.
        """
        stream = group.arrangement.stream
        return steps_singly(group.statements) or any(
            stream in reduced_ranks(stmt) and product.over != stream and self.ranks[product.over] >= 16
            for stmt in group.statements
            if (product := matrix_product(stmt)) is not None
        )

    def product_ranks(self, group: Group) -> set[str]:
        """The ranks that are a side or the reduced rank of a matrix product."""
        found: set[str] = set()
        for stmt in group.statements:
            product = matrix_product(stmt)
            if product is not None:
                found |= product.rows | product.columns | {product.over}
        return found

    def grouped(self, group: Group) -> dict[str, int]:
        """The ranks that one side of a product knows only divided by a number, and that number."""
        found: dict[str, int] = {}
        for stmt in group.statements:
            product = matrix_product(stmt)
            if product is not None:
                found |= dict(product.grouped)
        return found


def _told(axes: Sequence[Axis], shares: Shares) -> tuple[Axis, ...]:
    """The axes, with the one of which a table has the coordinate."""
    rank = shares.uneven.rank
    return tuple(dataclasses.replace(axis, told=shares.part) if axis.rank == rank else axis for axis in axes)


def pieces_of(extent: int, exact: bool) -> tuple[int, ...]:
    """The tiles in which a product sums over an extent that no tile would hold well; none where one tile does."""
    if exact:
        return (*[EXACT_PIECE] * (extent // EXACT_PIECE), *powers(extent % EXACT_PIECE))
    found = powers(extent)
    return found if len(found) <= MOST_PIECES else ()


def powers(extent: int) -> tuple[int, ...]:
    """The powers of two that a number is the sum of, the largest first."""
    return tuple(1 << bit for bit in reversed(range(extent.bit_length())) if extent >> bit & 1)


def gaps(layout: Layout) -> frozenset[int]:
    """The dimensions of a tensor that do not lie together with the next one, so that both can be seen as one."""
    pairs = enumerate(zip(itertools.pairwise(layout.shape), itertools.pairwise(layout.strides), strict=True))
    return frozenset(dim for dim, (extents, steps) in pairs if 1 not in extents and steps[0] != extents[1] * steps[1])


def viewed(layout: Layout, shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor in a shape of which each dimension is some of its own that lie together."""
    found: list[int] = []
    dims = iter(zip(layout.shape, layout.strides, strict=True))
    for extent in shape:
        own, step = next(dims)
        while own < extent:
            further, last = next(dims)
            own, step = own * further, last if further > 1 or own == 1 else step
        found.append(step)
    return tuple(found)


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a tensor that lies contiguously."""
    strides = [1] * len(shape)
    for position in range(len(shape) - 2, -1, -1):
        strides[position] = strides[position + 1] * max(shape[position + 1], 1)
    return tuple(strides)


@dataclass(frozen=True, slots=True)
class _Static:
    """Shape symbols that are numbers."""

    numbers: Mapping[str, int]

    def constant(self, expr: Expr) -> Expr:
        return Const(self.numbers[expr.name]) if isinstance(expr, Extent) and expr.name in self.numbers else expr

    def size(self, size: Size) -> Size:
        return self.numbers.get(size, size) if isinstance(size, str) else size


@recently
def quotients(group: Group) -> frozenset[tuple[str, Size]]:
    """The ranks of a group that are divided, and by what."""
    found = set[tuple[str, Size]]()
    for node in (node for stmt in group.statements for expr in expressions(stmt) for node in walk(expr)):
        match node:
            case Apply(op="floordiv" | "mod", args=(Rank(name=rank), Extent(name=by))):
                found.add((rank, by))
            case Apply(op="floordiv" | "mod", args=(Rank(name=rank), Const(value=int(by)))):
                found.add((rank, by))
            case _:
                pass
    return frozenset(found)


@recently
def _readers(groups: Sequence[Group | Rest]) -> Mapping[str, list[Group | Rest]]:
    """The groups that read each tensor."""
    found: dict[str, list[Group | Rest]] = {}
    for group in groups:
        for name in {name for stmt in group.statements for name in reads(stmt)}:
            found.setdefault(name, []).append(group)
    return found


@recently
def _multiplying(groups: Sequence[Group | Rest]) -> Mapping[str, list[Group]]:
    """The groups that have each tensor as an operand of a matrix product."""
    found: dict[str, list[Group]] = {}
    for group in (group for group in groups if isinstance(group, Group)):
        products = filter(None, map(matrix_product, group.statements))
        terms = (term for product in products for term in (*product.left, *product.right))
        for name in {term.tensor for term in terms if isinstance(term, Read)}:
            found.setdefault(name, []).append(group)
    return found


@recently
def _under_exponents(cascade: Cascade) -> Set[str]:
    """The tensors that an exponential is taken of, with what else stands under it."""
    nodes = (node for stmt in cascade.body for expr in expressions(stmt) for node in walk(expr))
    expanded = (node for node in nodes if isinstance(node, Apply) and node.op in ("exp", "exp2"))
    return {node.tensor for expr in expanded for node in walk(expr) if isinstance(node, Read)}
