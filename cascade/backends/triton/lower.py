"""From the statements of one group to the tile program of a kernel.

Statements run in trips over the streamed rank: a reduction over it is a state that a loop carries, what reads a
finished state runs behind the loop or in the next one. Within a trip the merges of the fold move the old state into
the new one before the tile is folded in; a plain sum is carried by coordinate of the tile instead, where there is room,
and added up behind the loop. A coordinate that is absent takes no part in any reduction: every value knows
the tests under which it is present and, where it can be told, the number that it is otherwise, so that most
reductions need no test of their own. The steps of a recurrence are composed within a tile; what it carries is a state.
"""

from __future__ import annotations

import dataclasses
import functools
import keyword
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import assert_never

from cascade.bounds import Bounds, always, conjuncts, loop_bounds, never_empty
from cascade.backends.triton.index import Entry, widest
from cascade.backends.triton.machine import WARP
from cascade.backends.triton.partition import Group, Trips, reduced_ranks
from cascade.backends.triton.plan import (
    BYTES, Axis, Carry, Dot, Fold, Keep, Kernel, Let, Load, Loop, Mask, Op, Options, Partial, Redo, Role, Scan, Seen,
    Start, Store, Strip, Tensor, TopKept, every_op, extent_expr, few_quotients,
)  # fmt: skip
from cascade.backends.triton.products import (
    factors, folded, is_plain, matrix_product, multiplied_in, product, ranks_of,
)  # fmt: skip
from cascade.backends.triton.recurrence import carried, composition, drift, ends, is_last, stepped
from cascade.backends.triton.shares import Shares
from cascade.backends.triton.widths import fits, values_of
from cascade.errors import Diagnostic, UnsupportedError
from cascade.inference import FLOATS
from cascade.intervals import Interval, interval
from cascade.ir import (
    Apply, Cast, Const, DType, Einsum, Expr, Extent, FoldMerge, Local, Rank, Read, Reduce, Result, Size, Stmt, TopK,
)  # fmt: skip
from cascade.ops import OPS, REDUCERS, Kind
from cascade.passes.scalars import evaluate
from cascade.text import render_stmt
from cascade.walk import (
    children, defines, expressions, fresh, reads, rewrite, substitute, targets, walk, with_children,
)  # fmt: skip

SAMPLES = (0.75, -1.25, 3.5)  # stand for any finite number where it is asked what an expression comes to
LARGEST_TILE = 1 << 20  # elements
SMALLEST_SIDE = 16  # of a matrix product
EXACT = 1 << 53  # no integer beyond it is one float alone
PASSING = 64 << 20  # bytes of a result from which on no cache holds it until it is read
MOST_FACTORS = 4  # of a power that is written as a product
LIGHT = 16  # elements of a tile that a thread has, up to which there is room for as many sums
SHORT_CHAIN = 32  # additions one after the other whose roundings are not worth to be kept


@dataclass(frozen=True, slots=True)
class Setting:
    """What a group is lowered for: the arguments, how the axes lie, in which types."""

    axes: tuple[Axis, ...]  # in the order of the dimensions of a tile
    tensors: Mapping[str, Tensor]
    dtypes: Mapping[str, DType]  # nominal types of everything
    results: Mapping[str, Result]  # what is stored, with its fill; other groups' inputs have none
    extents: Mapping[str, Size]  # of every rank
    numbers: Mapping[str, Size]  # of every rank and shape symbol, in this kind of call: proofs use them
    options: Options = field(default=Options())
    index: Mapping[Expr, Entry] = field(default_factory=dict)  # where the bounds of tests on data are found
    lives: Mapping[str, tuple[tuple[str, ...], tuple[Expr, ...]]] = field(default_factory=dict)
    """Tensors of earlier kernels that may be absent: their ranks, and the tests over those under which they are not."""
    pieces: Mapping[str, tuple[tuple[str, int], ...]] = field(default_factory=dict)
    """Reduced ranks of products that lie in pieces, each a power of two: the axes, and where each begins."""
    within: Mapping[str, int] = field(default_factory=dict)
    """Where coordinates of tiles are gone through one by one: how many make a tile, also of the stream."""
    scattered: Mapping[str, tuple[Expr, ...]] = field(default_factory=dict)  # where results go, if not to their ranks
    row: str | None = (
        None  # the row at hand of such results: negative where nothing is stored; none: a part of a tensor
    )
    inside: frozenset[str] = frozenset()  # coordinates that lie in range
    split: str | None = None  # the rank that counts the parts of the stream, where each program has one of them
    shares: Shares | None = None  # where parts are of equal length for all coordinates of a rank together
    most: Mapping[str, int] = field(default_factory=dict)  # what shape symbols do not exceed that are no numbers above
    actual: Mapping[str, int] = field(default_factory=dict)  # the extents of ranks in this call
    narrow: bool = False  # whether no float that comes of the program has 32 bits
    joined: Mapping[str, tuple[Size, Size]] = field(default_factory=dict)  # by the extent of a rank that is two: theirs


@dataclass(frozen=True, slots=True)
class Value:
    """What a tensor of the cascade is inside the kernel.

    `live` are the tests under which a coordinate is present; `absent` is what the expression comes to elsewhere.
    """

    expr: Expr
    live: tuple[Expr, ...] = ()
    absent: float | None = None
    data: frozenset[tuple[tuple[str, ...], tuple[Expr, ...]]] = frozenset()  # loaded tiles in it, and where they are 0


def unsupported(what: str, stmt: Stmt | None = None) -> UnsupportedError:
    """The error for what this backend cannot put into a kernel."""
    span = None if stmt is None else stmt.span
    return UnsupportedError(Diagnostic("C530", what, span, help="it runs outside a kernel, statement by statement"))


class InPieces(Exception):
    """A sum over a rank in pieces that no matrix product computes after all."""


def lower(name: str, group: Group, setting: Setting) -> Kernel:
    """The tile program of a group; raises UnsupportedError where there is none, InPieces where no rank may be cut."""
    return _Lowering(name, group, setting).kernel()


@dataclass(slots=True, eq=False)
class _Lowering:
    name: str
    group: Group
    setting: Setting
    values: dict[str, Value] = field(default_factory=dict)  # by tensor; `R'` is a state before this tile
    loaded: dict[tuple[object, ...], Local] = field(default_factory=dict)
    variables: dict[str, tuple[tuple[str, ...], DType]] = field(default_factory=dict)
    ranges: dict[str, Interval] = field(default_factory=dict)  # of integer variables of which more is known than a type
    names: set[str] = field(default_factory=set)
    ops: list[Op] = field(default_factory=list)  # where ops go at the moment
    outer: list[list[Op]] = field(default_factory=list)  # of the enclosing blocks, outermost first
    masks: dict[tuple[frozenset[Expr], frozenset[Expr]], Local] = field(default_factory=dict)
    """By tests, and those of them that are asked only at edges."""
    whole: dict[Expr, bool] = field(default_factory=dict)  # whether a test says which tiles of the stream are whole
    shifts: dict[Expr, Local] = field(default_factory=dict)
    streaming: bool = False  # inside a loop
    within: str | None = None  # the rank of the loop within the stream's, inside of it
    edges: list[tuple[Expr, ...]] = field(default_factory=list)  # the tests of each reduction and store of the loop
    extremes: dict[str, tuple[str, float]] = field(default_factory=dict)
    """By flags of what was seen: the extreme of the same elements, and what it begins as."""
    presence: dict[tuple[Expr, ...], str] = field(default_factory=dict)  # a state that counts who was there
    by_lane: set[str] = field(default_factory=set)  # sums that every coordinate of the tile carries on its own
    rests: dict[str, Local] = field(default_factory=dict)  # of sums over many tiles: what their roundings left over
    bests: dict[str, Local] = field(default_factory=dict)  # of coordinates of an extreme: that extreme

    # --- the whole ---------------------------------------------------------------------------------------------------

    def kernel(self) -> Kernel:
        """Everything in order: what precedes the stream, each trip with what follows it."""
        self.names |= RESERVED | {axis.rank for axis in self.setting.axes} | set(self.setting.tensors)
        self.names |= {size for size in self.setting.extents.values() if isinstance(size, str)}
        self.names -= {name for name in self.group.names if name in self.setting.results}
        self.names |= self.words_of_the_text()
        trips = self.trips = Trips.of(self.group)
        for stmt in trips.before:
            self.statement(stmt)
        for number in range(trips.count):
            self.at = number
            for statements in self.separate(trips.statements(number)):
                self.trip(trips, number, statements)
            for stmt in trips.after(number) if self.setting.split is None else ():
                self.statement(stmt)
        if self.setting.split is None:
            self.storeevery_op(trips)
        else:
            self.store_partial(trips, self.setting.split)
        self.ops = [*self.whose_part(), *(whole_groups(without_edges(op)) for op in live_ops(self.ops))]
        used = {op.tensor for op in every_op(self.ops) if isinstance(op, (Load, Store))}
        return Kernel(
            self.name,
            tuple(render_stmt(stmt) for stmt in self.group.statements),
            self.setting.axes,
            (*(t for t in self.setting.tensors.values() if t.name in used), *(p.tensor for p in self.partial)),
            tuple(self.ops),
            tuple((name, axes, dtype) for name, (axes, dtype) in self.variables.items()),
            self.setting.options,
            watched=tuple(self.watched),
            singly=tuple(stmt.target.name for stmt in stepped(self.group.statements) if composition(stmt) is None),
            partial=tuple(self.partial),
            exact=self.full_precision(),
            live=tuple((name, self.values[name].live) for name in self.setting.results if name in self.values),
        )

    def whose_part(self) -> list[Op]:
        """Which coordinate the part at hand belongs to, where a table says so."""
        shares = self.setting.shares
        if shares is None or self.setting.within:
            return []
        rank = shares.uneven.rank
        self.variables[rank] = ((), DType.I32)
        return [Load(rank, shares.whose, (Rank(shares.part),), (), (), (), None)]

    def words_of_the_text(self) -> set[str]:
        """The names that the text of the kernel makes of tensors and ranks: arguments, places, ends of tiles."""
        found = {self.name, f"{self.name}_end", "whole_from", "whole_to"}
        for name, tensor in self.setting.tensors.items():
            found |= {f"{name}_{position}" for position in range(len(tensor.shape))}
            found |= {f"{name}_{what}" for what in ("ptr", "desc", "desc_2", "desc_3", "desc_4", "place")}
        for axis in self.setting.axes:
            places = ("first", "last", "tile", "tiles", "part", "from", "to", "next", "back", "beside", "here")
            found |= {f"{axis.rank}_{what}" for what in places}
            found |= {f"{axis.rank}_{other.rank}" for other in self.setting.axes}
        for stmt in self.group.statements if self.setting.split is not None else ():
            for target in targets(stmt):
                found |= {f"{target.name}_part_{position}" for position in range(len(target.ranks) + 1)}
        return found

    def storeevery_op(self, trips: Trips) -> None:
        """Writes everything that leaves the kernel and was not written tile by tile."""
        for stmt in self.group.statements:
            for target in targets(stmt):
                if target.name in self.setting.results and trips.kind[target.name] != "block":
                    self.store(target.name, target.ranks)

    def store_partial(self, trips: Trips, part: str) -> None:
        """Writes the states of this part of the stream as they are, for a kernel that merges them."""
        flags: dict[Local, list[tuple[str, ...]]] = {Local(state): [] for state in self.presence.values()}
        for stmt in self.group.statements:
            for target in targets(stmt):
                if trips.kind[target.name] == "state":
                    value = self.values[target.name]
                    self.store_part(target.name, value.expr, part, target.ranks, value.live)
                    for flag in flags.keys() & set(value.live):
                        flags[flag].append(target.ranks)
        if any(isinstance(n, Local) and n not in flags for p in self.partial for t in p.live for n in walk(t)):
            raise unsupported("states in parts under a test on what their kernel makes")
        for flag, kept in flags.items():
            if kept:
                common = tuple(rank for rank in kept[0] if all(rank in ranks for ranks in kept))
                self.store_part(flag.name, flag, part, common)

    def store_part(self, name: str, expr: Expr, part: str, ranks: tuple[str, ...], live: tuple[Expr, ...] = ()) -> None:
        """Writes one state to a tensor of its own, in the type it is carried in."""
        dtype = DType.I8 if self.type_of(expr) is DType.BOOL else self.type_of(expr)
        if self.setting.shares is not None:  # the part tells
            ranks = tuple(rank for rank in ranks if rank != self.setting.shares.uneven.rank)
        shape = tuple(self.setting.extents[rank] for rank in (part, *ranks))
        taken = {*self.setting.dtypes, *(item.tensor.name for item in self.partial)}
        tensor = Tensor(fresh(f"{name}_part", taken), dtype, shape, (*(None for _ in ranks), 1) if ranks else (1,))
        self.partial.append(Partial(name, tensor, ranks, live))
        index = tuple(map(Rank, (part, *ranks)))
        self.ops.append(Store(tensor.name, index, self.spread(ranks), expr, (), 0, None))

    def axis(self, rank: str) -> Axis:
        return next(axis for axis in self.setting.axes if axis.rank == rank)

    def spread(self, ranks: Collection[str]) -> tuple[str, ...]:
        """The dimensions of a tile over these ranks: points have none."""
        return tuple(a.rank for a in self.setting.axes if a.rank in ranks and not a.single)

    def fresh(self, wanted: str) -> str:
        """A name that nothing has yet, like the wanted one."""
        found, number = wanted, 1
        while found in self.names:
            found, number = f"{wanted}_{number}", number + 1
        self.names.add(found)
        return found

    def variable(self, wanted: str, axes: tuple[str, ...], dtype: DType) -> str:
        """A new variable."""
        name = self.fresh(wanted)
        self.variables[name] = (axes, dtype)
        return name

    # --- trips -------------------------------------------------------------------------------------------------------

    def separate(self, statements: tuple[Stmt, ...]) -> list[tuple[Stmt, ...]]:
        """The statements of a trip in loops of their own, where those have nothing to do with each other.

        Only where each has a product of two matrices: two small loops overlap better than a large one that needs all
        registers. Whatever is bound by memory reads what it shares only once in one loop; so do rows that are gathered.
        """
        owner_of = {name: place for place, stmt in enumerate(statements) for name in defines(stmt)}
        root = list(range(len(statements)))

        def find(place: int) -> int:
            while root[place] != place:
                place = root[place]
            return place

        for place, stmt in enumerate(statements):
            merges = {node.tensor.rstrip("'") for node in self.merge_reads(stmt)}
            for name in (*reads(stmt), *merges):
                if name in owner_of:
                    root[find(place)] = find(owner_of[name])
        parts: dict[int, list[Stmt]] = {}
        for place, stmt in enumerate(statements):
            parts.setdefault(find(place), []).append(stmt)
        if (
            self.setting.row is None
            and len(parts) > 1
            and all(any((p := matrix_product(s)) and p.two_sided for s in part) for part in parts.values())
        ):
            return [tuple(part) for part in parts.values()]
        return [statements]

    def trip(self, trips: Trips, number: int, statements: tuple[Stmt, ...]) -> None:
        """One loop over the streamed rank: states begin, tiles are folded in, states come out."""
        stream = self.group.arrangement.stream
        assert stream is not None
        states = [stmt for stmt in statements if trips.kind[defines(stmt)[0]] == "state"]
        self.by_lane, self.rests, self.bests = self.lanes(trips, statements, states), {}, {}
        recurrences = stepped(statements)
        for stmt in states:
            self.begin(stmt)
        for recurrence in recurrences:
            self.begin_steps(recurrence)
        self.outer.append(self.ops)
        self.ops, self.streaming, self.edges = [], True, []
        kept_masks, kept_loads = dict(self.masks), dict(self.loaded)
        pairs: list[tuple[str, str]] = []
        for index, stmt in enumerate(statements):
            name = defines(stmt)[0]
            if trips.kind[name] == "state":
                pairs.extend(self.advance(stmt, statements[index + 1 :]))
            elif stmt in recurrences:
                pairs.append(self.steps(stmt))
            else:
                self.statement(stmt)
            if trips.kind[name] == "block" and trips.number[name] == number:
                for target in targets(stmt):
                    if target.name in self.setting.results:
                        self.store(target.name, target.ranks)
        body = self.ops
        if pairs:
            body.append(Carry(tuple(pairs)))
        self.ops, self.streaming = self.outer.pop(), False
        self.masks, self.loaded, self.shifts = kept_masks, self.outside(kept_loads), {}
        self.found_behind(self.loop(stream, body, [*states, *recurrences]))
        self.leave(trips, statements, states)

    def found_behind(self, loop: Loop) -> None:
        """The loop; which rows it saw anything of is found out behind it, where an extreme tells that of most.

        One that is still what it began as has seen nothing, or nothing else: only then are the tests asked again. In
        the loop they would be asked of each element once more, in registers of another layout.
        """
        later: list[Op] = []
        for seen in [op for op in loop.body if isinstance(op, Seen) and op.name in self.extremes]:
            rest = tuple(op for op in loop.body if op is not seen)
            extreme, begun = self.extremes[seen.name]
            state = self.values[f"{extreme}'"].expr
            asked = self.asked(seen, rest, loop.carried) if self.shape(state) == seen.axes else None
            if asked is None or any(seen.name in uses(op) for op in every_op(rest)):
                continue
            carried = tuple(name for name in loop.carried if name != seen.name)
            loop = dataclasses.replace(loop, body=rest, carried=carried)
            self.ops.remove(Start(seen.name, seen.axes, Const(False)))
            later.append(Let(seen.name, seen.axes, Apply("ne", (state, Const(begun)))))
            body = (*asked, dataclasses.replace(seen, edge=False))
            again = dataclasses.replace(loop, inner=None, edges=True, carried=(seen.name,), body=body, edge_tile=0)
            later.append(dataclasses.replace(again, backwards=False, unless=seen.name))
        self.ops.extend((loop, *later))

    def asked(self, seen: Seen, ops: Sequence[Op], carried: Collection[str]) -> tuple[Op, ...] | None:
        """What a mask of several dimensions is made of, if that is cheap: what is loaded, and no product.

        Nothing that the loop carries, which behind it is what it was in the end.
        """
        if set(self.variables[seen.mask][0]) == set(seen.over):
            return None
        wanted, found = {seen.mask}, []
        for op in reversed(ops):
            made = {getattr(op, "name", "")} & wanted
            if made and not isinstance(op, (Load, Let, Mask)):
                return None
            if made:
                wanted.update(uses(op))
                found.append(op)
        return None if wanted & set(carried) else tuple(reversed(found))

    def lanes(self, trips: Trips, statements: Sequence[Stmt], states: Sequence[Stmt]) -> set[str]:
        """The sums that are carried coordinate by coordinate of the tile, and added up once, behind the loop.

        Nothing may need them before. Fewer roundings are as large as the whole sum, and no trip waits for a tree of
        additions. A third would take the registers that loads in flight need, and so would one where a stream is gone
        through again in tiles as large as a program can hold; products are accumulated as they are.
        """
        stream = self.group.arrangement.stream
        assert stream is not None
        full = self.axis(stream).tile > LIGHT * WARP * self.setting.options.num_warps
        if (trips.count > 1 and full) or not all(is_plain(stmt, self.setting.dtypes) for stmt in self.group.statements):
            return set()
        needed = {name for stmt in statements for name in reads(stmt)}
        needed |= {node.tensor.rstrip("'") for stmt in statements for node in self.merge_reads(stmt)
                   if node.tensor.rstrip("'") not in defines(stmt)}  # fmt: skip
        found = [name for stmt in states for name in defines(stmt) if self.is_plain_sum(stmt) and name not in needed]
        return set(found) if len(found) < 3 else set()

    def is_plain_sum(self, stmt: Stmt) -> bool:
        """Whether a state is a floating-point sum of tiles of the stream, none of which is moved or begins it."""
        if not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce) or stmt.expr.reducer != "sum":
            return False
        name = stmt.target.name
        merge = self.merge(name)
        moved = merge is not None and merge.expr != Read(f"{name}'", tuple(map(Rank, stmt.target.ranks)))
        begun = any(
            i.target.name == name and i.expr is not None for i in (self.group.fold.init if self.group.fold else ())
        )
        tiled = self.group.arrangement.stream in self.spread(stmt.expr.ranks)
        return tiled and not moved and not begun and self.accumulator(name, "sum") is DType.F32

    def keeps_rests(self, stmt: Stmt) -> bool:
        """Whether the roundings of a state are carried beside it: a sum in full precision, over many tiles.

        One chain of additions has an error that grows with its length; libraries have several, which they add up.
        Its merge may only multiply what was summed: then what was left over is multiplied as well.
        """
        stream, name = self.group.arrangement.stream, defines(stmt)[0]
        if not self.full_precision() or self.setting.within or name in self.by_lane:
            return False
        if not isinstance(stmt, Einsum) or reducer_of(stmt) != "sum" or not isinstance(stmt.expr, Reduce):
            return False
        if self.accumulator(name, "sum") is not DType.F32:
            return False
        own = Read(f"{name}'", tuple(map(Rank, stmt.target.ranks)))
        merge = self.merge(name)
        terms = [own] if merge is None else factors(guarded_merge(merge, self.group))
        olds = [node for term in terms for node in walk(term) if isinstance(node, Read) and node.tensor == own.tensor]
        if olds != [own] or own not in terms or stream not in stmt.expr.ranks:
            return False
        extent, parts = self.setting.numbers[stream], self.setting.numbers.get(self.setting.split or "", 1)
        if not isinstance(extent, int) or not isinstance(parts, int):
            return True
        return extent > SHORT_CHAIN * self.axis(stream).tile * parts

    def outside(self, kept: dict[tuple[object, ...], Local]) -> dict[tuple[object, ...], Local]:
        """The loads that are still known behind a loop: those before it and those it made to be done before it."""
        stream = self.group.arrangement.stream
        return {key: local for key, local in self.loaded.items() if key in kept or key[-1] != stream}

    def loop(self, stream: str, body: list[Op], states: Sequence[Stmt]) -> Loop:
        """The loop over the tiles of the stream, its bounds from the filters of what it computes."""
        axis = self.axis(stream)
        every = [set(tests) for tests in self.edges]
        common = set.intersection(*every) if every else set()
        tests = tuple(dict.fromkeys(test for group in self.edges for test in group))
        edges = [test for test in tests if self.tells_whole(test)]
        tail = None if axis.exact else self.tail(stream)
        indexed = {test: entry for test, entry in self.setting.index.items() if test in tests}
        known = [test for test in tests if test != tail and not self.is_made(test)]
        visited = self.bounds([test for test in known if test in common])
        inside = self.bounds([test for test in known if test in edges and test not in indexed])
        firsts, stops = [visited.first], [visited.stop]
        whole_firsts, whole_stops = [inside.full_first], [inside.full_stop]
        for test, entry in indexed.items():
            if test in common:
                firsts.append(self.entry(entry, entry.first, "min"))
                stops.append(self.entry(entry, entry.stop, "max"))
            whole_firsts.append(self.entry(entry, entry.whole_first, "max"))
            whole_stops.append(self.entry(entry, entry.whole_stop, "min"))
        if tail in tests:
            whole_stops.append(extent_expr(axis.extent))
        inner = (self.bound(widest("max", whole_firsts)), self.bound(widest("min", whole_stops)))
        # A test that stands in all tiles costs as much as those that differ along the stream alone, which join it.
        saved = len(edges) == len(tests) or any(len(self.test_ranks(test)) > 1 for test in edges)
        carried = tuple(name for stmt in states for name in self.carried(stmt))
        carried += tuple(name for name in self.presence.values())
        if self.setting.split is not None and self.setting.within:  # the part of the whole tile, not of one coordinate
            visited = self.bounds([test for test in known if test in common], self.setting.within)
            firsts[0], stops[0] = (self.of_tile(bound) for bound in (visited.first, visited.stop))
        first, stop = widest("max", firsts), widest("min", stops)
        strip = self.strip(stream, [test for test in known if test in common], first)
        if strip is not None:
            first, stop = None, self.in_strip(stream, strip, stop)
        first, stop = self.share(stream, first, stop)
        return Loop(
            stream,
            first,
            stop,
            None if inside.never_full or not saved or strip is not None else inner,
            bool(edges),
            carried,
            tuple(body),
            self.setting.options.edge_tile,
            backwards=self.at % 2 == 1 and not any(isinstance(stmt, Einsum) and stmt.inits for stmt in states),
            strip=strip,
        )

    def strip(self, stream: str, tests: Sequence[Expr], start: Expr | None) -> Strip | None:
        """What tests leave of the second of two ranks that are one, for a tile of the others, if they say so.

        Each tile lies in one row then. `start` is where the stream begins.
        """
        axis, tile = self.axis(stream), self.setting.within.get(stream, self.axis(stream).tile)
        two = self.setting.joined.get(str(axis.extent))
        width = self.setting.numbers.get(str(two[1]), two[1]) if two is not None else 0
        if not isinstance(width, int) or width < 2 * tile or width % tile or self.setting.shares is not None:
            return None
        second = f"{stream} in its row"
        inner = Apply("mod", (Rank(stream), Const(width)))
        own = [rewrite(self.numbered(t), lambda node: Rank(second) if node == inner else node) for t in tests]
        tiled = [axis.rank for axis in self.setting.axes if axis.role in (Role.TILE, Role.WHOLE)]
        found = loop_bounds(
            [t for t in own if second in ranks_of(t) and stream not in ranks_of(t)],
            second, [*tiled, *self.setting.within],
        )  # fmt: skip
        if found.first is None and found.stop is None:
            return None
        low, high = (self.bound(self.of_tile(bound)) for bound in (found.first, found.stop))
        begin = whole(Const(0) if low is None else Apply("max", (low, Const(0))), tile)
        end = whole(plus(Const(width) if high is None else Apply("min", (high, Const(width))), tile - 1), tile)
        length = Apply("max", (Apply("sub", (end, begin)), Const(0)))
        row = Apply("floordiv", (Apply("max", (self.bound(start) or Const(0), Const(0))), Const(width)))
        names = (f"{stream}_row", f"{stream}_inner", f"{stream}_length")
        named = zip(names, map(folded, (row, begin, length)), strict=True)
        return Strip(width, *(part if isinstance(part, Const) else self.let(name, part) for name, part in named))

    def in_strip(self, stream: str, strip: Strip, stop: Expr | None) -> Expr:
        """How many coordinates a strip has up to where the stream ends."""
        size, end = extent_expr(self.axis(stream).extent), self.bound(stop)
        rows = plus(size if end is None else Apply("min", (end, size)), strip.width - 1)
        rows = Apply("sub", (Apply("floordiv", (rows, Const(strip.width))), strip.row))
        return Apply("mul", (Apply("max", (rows, Const(0))), strip.length))

    def entry(self, entry: Entry, name: str, reducer: str) -> Expr:
        """A bound that an index has, in coordinates; one number for all coordinates of ranks that a tile has whole."""
        read = entry.read(name)
        ranks = self.index_axes(read)
        return Apply("mul", (Reduce(reducer, ranks, read) if ranks else read, Const(entry.tile)))

    def of_tile(self, bound: Expr | None) -> Expr | None:
        """A bound for a tile, from one of its coordinates."""

        def end(node: Expr) -> Expr:
            rank, _, which = node.name.rpartition("_") if isinstance(node, Local) else ("", "", "")
            if rank not in self.setting.within:
                return node
            step = Const(self.setting.within[rank])
            first = Apply("mul", (Apply("floordiv", (Rank(rank), step)), step))
            if which == "first":
                return first
            beyond = Apply("min", (Apply("add", (first, step)), extent_expr(self.axis(rank).extent)))
            return Apply("sub", (beyond, Const(1)))

        return None if bound is None else rewrite(bound, end)

    def share(self, stream: str, first: Expr | None, stop: Expr | None) -> tuple[Expr | None, Expr | None]:
        """The program's part of what is visited: equal numbers of tiles, the last part may have fewer."""
        part, axis, shares = self.setting.split, self.axis(stream), self.setting.shares
        if shares is not None:
            if (first, stop) != (shares.uneven.first, shares.uneven.stop):
                raise unsupported("parts of equal length where loops differ in what they visit")
            return self.bound(shares.read(shares.begins)), self.bound(shares.read(shares.ends))
        first, stop = self.bound(first), self.bound(stop)
        if part is None:
            return first, stop
        tile, size = Const(self.setting.within.get(stream, axis.tile)), extent_expr(axis.extent)
        low: Expr = Const(0) if first is None else Apply("max", (first, Const(0)))
        low = folded(Apply("mul", (Apply("floordiv", (low, tile)), tile)))
        high = size if stop is None else Apply("min", (stop, size))
        begin = self.let(f"{stream}_begin", low)
        length = Apply("max", (Apply("sub", (high, begin)), Const(0)))
        tiles = Apply("floordiv", (Apply("add", (length, Const(tile.value - 1))), tile))
        parts = extent_expr(self.setting.extents[part])
        every = Apply("floordiv", (Apply("add", (tiles, Apply("sub", (parts, Const(1))))), parts))
        share = self.let(f"{stream}_share", Apply("mul", (every, tile)))
        mine = Apply("add", (begin, Apply("mul", (Rank(part), share))))
        end = Apply("min", (Apply("add", (mine, share)), high))
        return self.let(f"{stream}_mine", mine), self.let(f"{stream}_end", end)

    def bound(self, expr: Expr | None) -> Expr | None:
        """A bound with what it reads loaded before the loop."""
        return None if expr is None else folded(self.expression(expr).expr)

    def carried(self, stmt: Stmt) -> Iterator[str]:
        for name in defines(stmt):
            expr = self.values[f"{name}'"].expr
            assert isinstance(expr, Local)
            yield expr.name
            yield from (found[name].name for found in (self.rests, self.bests) if name in found)

    def begin(self, stmt: Stmt) -> None:
        """A state before the first element: the identity of its reducer, or what the fold says."""
        if isinstance(stmt, TopK):
            raise unsupported("a topk over a rank that is streamed", stmt)
        assert isinstance(stmt, Einsum)
        name, axes = stmt.target.name, self.state_axes(stmt)
        reducer = reducer_of(stmt)
        dtype = self.accumulator(name, reducer)
        value: Expr = Const(0 if reducer in COORDINATES else identity(reducer, dtype))
        if (begun := self.begun(name)) is not None:
            value = self.expression(begun).expr
        variable = self.variable(f"{name}_lanes" if name in self.by_lane else name, axes, dtype)
        self.ops.append(Start(variable, axes, value))
        self.values[f"{name}'"] = Value(Local(variable))

    def begun(self, name: str) -> Expr | None:
        """What the fold says that a state begins as; None for the identity of its reducer."""
        inits = self.group.fold.init if self.group.fold else ()
        return next((init.expr for init in inits if init.target.name == name), None)

    def state_axes(self, stmt: Einsum) -> tuple[str, ...]:
        """The dimensions of a state: those of its tensor, and of the tile where it is carried by coordinate."""
        summed = stmt.expr.ranks if stmt.target.name in self.by_lane and isinstance(stmt.expr, Reduce) else ()
        return self.spread({*stmt.target.ranks, *summed})

    def accumulator(self, name: str, reducer: str) -> DType:
        """The type in which a reduction accumulates."""
        if reducer in ("any", "all"):
            return DType.BOOL
        return DType.I32 if reducer in COORDINATES else computed(self.setting.dtypes[name])

    def advance(self, stmt: Stmt, later: Sequence[Stmt]) -> list[tuple[str, str]]:
        """A state after this tile: the old one moved by its merge, joined with what the tile gives.

        Where a later merge still needs the old state the new one has a name of its own until the iteration ends.
        """
        assert isinstance(stmt, Einsum)
        name, axes = stmt.target.name, self.spread(stmt.target.ranks)
        old = self.values[f"{name}'"].expr
        assert isinstance(old, Local)
        if name in self.by_lane:
            expr, _, live = self.elements(stmt)
            self.ops.append(Let(old.name, self.state_axes(stmt), join("sum", old, expr)))
            self.values[name] = Value(old, live)
            return []
        reducer = reducer_of(stmt)
        if reducer in COORDINATES:
            self.values[name] = self.advance_coordinate(stmt, old)
            return []
        needed = {node.tensor for s in later for node in self.merge_reads(s)}
        moved = self.moved(name)
        into = f"{name}'" not in needed
        if into and self.accumulate(stmt, old, moved):
            self.values[name] = Value(self.rounded(name, old), *self.joined(stmt))
            return []
        tile = self.reduction(stmt) if isinstance(stmt.expr, Reduce) else self.inner(stmt)
        if into and self.keeps_rests(stmt):
            rest = self.rests[name] = Local(self.variable(f"{name}_rest", axes, DType.F32))
            self.outer[-1].append(Start(rest.name, axes, Const(0.0)))
            self.move(old, moved, axes, rest)
            self.add(old, self.let(f"{name}_tile", tile.expr, axes), axes, rest)
            self.values[name] = Value(old, tile.live, None)
            return []
        dtype = self.variables[old.name][1]
        joined = self.as_integer(dtype, join(reducer, moved, tile.expr))
        target = old.name if into else self.variable(f"{name}_next", axes, dtype)
        self.ops.append(Let(target, axes, joined))
        self.values[name] = Value(Local(target), tile.live, self.unmoved(name, tile.live, dtype))
        return [] if into else [(old.name, target)]

    def advance_coordinate(self, stmt: Einsum, old: Local) -> Value:
        """The coordinate of an extreme after this tile: that of the tile where it has a larger one, or the first NaN.

        It begins as 0, which is right of a stream that has its first element.
        """
        assert isinstance(stmt.expr, Reduce)
        name, axes, ranks = stmt.target.name, self.spread(stmt.target.ranks), stmt.expr.ranks
        tests = merged(self.peek(stmt.expr.body), self.tests(conjuncts(stmt.where)))
        if set(tests) - set(self.tails(ranks)):
            raise unsupported(f"{stmt.expr.reducer} over a rank that is streamed, of what a filter leaves", stmt)
        value, extreme = self.coordinate(stmt)
        extreme = extreme if isinstance(extreme, Local) else self.let(f"{name}_here", extreme, axes)
        dtype = self.type_of(extreme)
        best = self.bests[name] = Local(self.variable(f"{name}_extreme", axes, dtype))
        self.outer[-1].append(Start(best.name, axes, Const(identity(COORDINATES[stmt.expr.reducer], dtype))))
        better = Apply({"argmax": "gt", "argmin": "lt"}[stmt.expr.reducer], (extreme, best))
        if dtype in FLOATS:
            found, known = Apply("ne", (extreme, extreme)), Apply("eq", (best, best))
            better = Apply("and", (known, Apply("or", (better, found))))
        chosen = self.let(f"{name}_better", better, axes)
        self.ops.append(Let(old.name, axes, Apply("select", (chosen, value.expr, old))))
        self.ops.append(Let(best.name, axes, Apply("select", (chosen, extreme, best))))
        return Value(old, value.live)

    def unmoved(self, name: str, live: tuple[Expr, ...], dtype: DType) -> float | None:
        """What a state still is where nothing was seen: what it began as, where no other test makes it absent."""
        seen = {Local(flag) for flag in self.presence.values()}
        if self.begun(name) is not None or not live or set(live) - seen:
            return None
        value = float(identity(reducer_of(self.owner(name)), dtype))
        return value if is_told(value) else None

    def as_integer(self, dtype: DType, expr: Expr) -> Expr:
        """An expression in an integer type that holds less: a variable of a loop keeps its type."""
        kept = self.type_of(expr)
        return expr if dtype in FLOATS or kept in (dtype, DType.BOOL) or kept in FLOATS else Cast(dtype, expr)

    def move(self, old: Local, moved: Expr, axes: tuple[str, ...], rest: Local | None = None) -> None:
        """A state, and what its roundings left over, in the frame of the tile at hand."""
        if moved == old:
            return
        self.ops.append(Let(old.name, axes, moved))
        if rest is not None:
            self.ops.append(Let(rest.name, axes, rewrite(moved, lambda node: rest if node == old else node)))

    def add(self, old: Local, tile: Local, axes: tuple[str, ...], rest: Local) -> None:
        """A state and what a tile gives, exactly: what the rounding of the sum leaves over goes to the rest of it.

        (Dekker 1971, "A floating-point technique for extending the available precision".)
        """
        added = Local(self.variable(f"{old.name}_next", axes, DType.F32))
        self.ops.append(Let(added.name, axes, join("sum", old, tile)))
        seen = Apply("sub", (added, old))
        self.ops.append(Let(rest.name, axes, join("sum", rest, Apply("sub", (tile, seen)))))
        self.ops.append(Let(old.name, axes, added))

    def merge_reads(self, stmt: Stmt) -> Iterator[Read]:
        merge = self.merge(defines(stmt)[0])
        if merge is not None:
            yield from (node for node in walk(merge.expr) if isinstance(node, Read))

    def merge(self, name: str) -> FoldMerge | None:
        """The merge of a state; None outside folds, where parts are joined as they are."""
        fold = self.group.fold
        return None if fold is None else next((m for m in fold.merge if m.target.name == name), None)

    def moved(self, name: str) -> Expr:
        """What the state before this tile counts for in the new one."""
        merge = self.merge(name)
        old = self.values[f"{name}'"].expr
        if merge is None or merge.expr == Read(f"{name}'", tuple(map(Rank, merge.target.ranks))):
            return old
        return self.expression(self.shared_shifts(guarded_merge(merge, self.group))).expr

    def owner(self, name: str) -> Stmt:
        return owner(self.group, name)

    def shared_shifts(self, expr: Expr) -> Expr:
        """A merge whose exponentials, which others have as well, are variables."""
        if isinstance(expr, Apply) and expr.op in ("exp", "exp2"):
            if expr not in self.shifts:
                found = self.expression(expr).expr
                first = next(node.tensor[:-1] for node in walk(expr) if isinstance(node, Read) and "'" in node.tensor)
                self.shifts[expr] = self.let(f"{first}_shift", found)
            return self.shifts[expr]
        return with_children(expr, tuple(map(self.shared_shifts, children(expr))))

    def accumulate(self, stmt: Einsum, old: Local, moved: Expr) -> bool:
        """Adds a matrix product straight to the state, where the tile's part is one without further factors."""
        if not isinstance(stmt.expr, Reduce) or stmt.expr.reducer != "sum":
            return False
        axes = self.spread(stmt.target.ranks)
        return self.dot(stmt, axes, into=(old, moved)) is not None

    def inner(self, stmt: Einsum) -> Value:
        """What a tile gives to a state that joins a reduction with virtual elements: the reduction of the tile."""
        found = next(node for node in walk(stmt.expr) if isinstance(node, Read) and node.tensor in self.values
                     and self.group.arrangement.stream in reduced_ranks(self.owner(node.tensor)))  # fmt: skip
        return self.values[found.tensor]

    def joined(self, stmt: Einsum) -> tuple[tuple[Expr, ...], None]:
        """The presence of a state whose tiles were accumulated in place."""
        assert isinstance(stmt.expr, Reduce)
        body = self.peek(stmt.expr.body)
        return self.present_after(merged(body, self.tests(conjuncts(stmt.where))), stmt.expr.ranks, stmt), None

    def leave(self, trips: Trips, statements: Sequence[Stmt], states: Sequence[Stmt]) -> None:
        """Behind a loop: states have their last value, what depends on the tile alone is gone."""
        for stmt in states:
            name = defines(stmt)[0]
            last = self.values[f"{name}'"].expr
            if isinstance(stmt, Einsum) and name in self.by_lane:
                axes = self.spread(stmt.target.ranks)
                over = tuple(rank for rank in self.state_axes(stmt) if rank not in axes)
                variable = self.variable(name, axes, DType.F32)
                self.ops.append(Fold(variable, axes, "sum", over, last))
                last = Local(variable)
            elif name in self.rests:  # of what is not finite the rest is not a number
                rest, axes = self.rests[name], self.spread(targets(stmt)[0].ranks)
                whole = Apply("select", (Apply("eq", (rest, rest)), join("sum", last, rest), last))
                last = self.let(f"{name}_whole", whole, axes)
            else:
                last = self.rounded(f"{name}_whole", last)
            self.values[name] = dataclasses.replace(self.values[name], expr=last)
        for stmt in statements:
            name = defines(stmt)[0]
            if trips.kind[name] in ("block", "inner"):
                self.values.pop(name, None)
        for stmt in statements:
            if trips.kind[defines(stmt)[0]] == "of state":
                self.statement(stmt)

    # --- statements --------------------------------------------------------------------------------------------------

    def statement(self, stmt: Stmt) -> None:
        """A statement that is complete where it stands: a map, or a reduction of what the tile holds."""
        if isinstance(stmt, TopK):
            self.top_k(stmt)
            return
        assert isinstance(stmt, Einsum)
        name = stmt.target.name
        if stmt.inits:
            self.begin_steps(stmt)
            _, after = self.steps(stmt)
            self.values[f"{name}'"] = dataclasses.replace(self.values[f"{name}'"], expr=Local(after))
            return
        if isinstance(stmt.expr, Reduce):
            self.values[name] = self.reduction(stmt)
            return
        found = self.expression(stmt.expr)
        live = merged(found.live, self.tests(conjuncts(stmt.where)))
        if isinstance(found.expr, Const) or is_scaled(found.expr):
            self.values[name] = Value(found.expr, live, found.absent, found.data)
            return
        self.values[name] = Value(self.let(name, found.expr), live, found.absent, found.data)

    def let(self, name: str, expr: Expr, axes: tuple[str, ...] | None = None) -> Local:
        """A variable for an expression, over its own dimensions or more."""
        axes, dtype = self.shape(expr) if axes is None else axes, self.type_of(expr)
        variable = self.variable(name, axes, dtype)
        self.ops.append(Let(variable, axes, expr))
        if dtype not in FLOATS:
            self.ranges[variable] = interval(expr, self.values_of)
        return Local(variable)

    def tests(self, conditions: Sequence[Expr]) -> tuple[Expr, ...]:
        """Filters that are not always true, what they read left as it is: a mask or a bound loads it.

        Where what a filter reads is absent, so is what it filters.
        """
        tails = {self.tail(axis.rank) for axis in self.setting.axes}
        found = tuple(test for test in conditions if not self.proved(test))
        return merged(tuple(test for test in merged(*map(self.peek, found)) if test not in tails), found)

    def proved(self, test: Expr) -> bool:
        """Whether a test holds at all coordinates, for extents as they are in this kind of call."""
        return self.of_joined(test) or always([self.numbered(test)], self.setting.numbers)

    def of_joined(self, test: Expr) -> bool:
        """Whether a test says of a rank that is two, `c[a,b]`, that its quotient by the extent of b lies inside a."""
        match test:
            case Apply(op="lt", args=(Apply(op="floordiv", args=(Rank(name=rank), by)), high)):
                two = self.setting.joined.get(str(self.setting.extents[rank]))
                return two is not None and all(map(self.is_size, (high, by), two))
            case _:
                return False

    def is_size(self, expr: Expr, size: Size) -> bool:
        """Whether an expression is an extent, by its name or as the number that it is in this kernel."""
        return expr == extent_expr(size) or (
            isinstance(expr, Const) and expr.value == self.setting.numbers.get(str(size))
        )

    def numbered(self, expr: Expr) -> Expr:
        """An expression with the extents of this kind of call as numbers."""
        numbers = self.setting.numbers
        known = {name: size for name, size in numbers.items() if isinstance(size, int)}
        return rewrite(expr, lambda e: Const(known[e.name]) if isinstance(e, Extent) and e.name in known else e)

    def reduction(self, stmt: Einsum) -> Value:
        """A reduction of the tile at hand, over those of its ranks that are dimensions of it."""
        assert isinstance(stmt.expr, Reduce)
        reducer = stmt.expr.reducer
        axes = self.spread(stmt.target.ranks)
        inside, outside = self.filters(stmt)
        if reducer == "count":
            return self.count(stmt, inside, outside)
        if set(self.group.arrangement.inner) & set(stmt.expr.ranks):
            value = self.gone_through(stmt)
            return dataclasses.replace(value, live=merged(value.live, outside))
        if reducer == "sum":
            found = self.dot(stmt, axes)
            if found is not None:
                return dataclasses.replace(found, live=merged(found.live, outside))
        if reducer in COORDINATES:
            return self.coordinate(stmt)[0]
        expr, over, live_after = self.elements(stmt)
        if not over:
            return Value(expr, live_after)
        axes = self.spread(set(axes) & {*self.shape(expr), *over})  # what is the same along others is folded once
        if is_scaled(expr) and reducer in ("max", "min", "sum"):
            raw, factor = split_scale(expr)
            variable = self.variable(stmt.target.name, axes, self.type_of(raw))
            self.ops.append(Fold(variable, axes, reducer, over, raw, self.nan_matters(stmt)))
            return Value(product([Local(variable), factor]), live_after)
        variable = self.variable(stmt.target.name, axes, self.type_of(expr))
        self.ops.append(Fold(variable, axes, reducer, over, expr, self.nan_matters(stmt)))
        return Value(Local(variable), live_after)

    def coordinate(self, stmt: Einsum) -> tuple[Value, Expr]:
        """The first coordinate of a present extreme, or of a NaN: the least of those whose element is the extreme; and
        this.

        What stands for an absent element does not tell it from a present one, which may be -inf as well.
        """
        assert isinstance(stmt.expr, Reduce)
        name, (rank,), axes = stmt.target.name, stmt.expr.ranks, self.spread(stmt.target.ranks)
        expr, over, live_after = self.elements(stmt)
        if not over:
            return Value(Rank(rank), live_after), expr
        best = Local(self.variable(f"{name}_best", axes, self.type_of(expr)))
        real = self.type_of(expr) in FLOATS
        self.ops.append(Fold(best.name, axes, COORDINATES[stmt.expr.reducer], over, expr, nan=real))
        chosen = Apply("eq", (expr, best))
        if real:
            chosen = Apply("or", (chosen, Apply("ne", (expr, expr))))
        last = self.axis(rank).tile - 1 if not self.streaming else 2**31 - 1
        found: Expr = Apply("select", (chosen, Rank(rank), Const(last)))
        live = merged(self.expression(stmt.expr.body).live, self.filters(stmt)[0], self.tails(stmt.expr.ranks))
        tests = tuple(test for test in live if self.reaches(test, over))
        if tests:
            found = self.kept(stmt, found, tests, last)
        variable = self.variable(name, axes, DType.I32)
        self.ranges[variable] = 0, last
        self.ops.append(Fold(variable, axes, "min", over, found))
        return Value(Local(variable), live_after), best

    def filters(self, stmt: Einsum) -> tuple[tuple[Expr, ...], tuple[Expr, ...]]:
        """The filters of a reduction that tell its elements apart, and the others."""
        own = self.tests(conjuncts(stmt.where))
        inside = tuple(test for test in own if ranks_of(test) & set(reduced_ranks(stmt)))
        return inside, tuple(test for test in own if test not in inside)

    def elements(self, stmt: Einsum) -> tuple[Expr, tuple[str, ...], tuple[Expr, ...]]:
        """What a reduction folds of a tile, along which dimensions, and the tests under which it is present then."""
        assert isinstance(stmt.expr, Reduce)
        reducer, ranks = stmt.expr.reducer, stmt.expr.ranks
        inside, outside = self.filters(stmt)
        if not self.setting.pieces.keys().isdisjoint(ranks):
            raise InPieces(stmt.target.name)
        body = self.expression(stmt.expr.body)
        if reducer in ("any", "all") and self.type_of(body.expr) is not DType.BOOL:  # a number is true unless it is 0
            body = Value(Apply("ne", (body.expr, Const(0))), body.live)
        live = merged(body.live, inside, self.tails(ranks))
        over = self.spread(ranks)
        self.small_enough(stmt, {*self.shape(body.expr), *over})
        expr = self.tested(stmt, body, live, over, identity(reducer, self.type_of(body.expr)))
        if self.type_of(expr) in GROWING.get(reducer, ()):
            truths = reducer == "sum" and self.type_of(expr) is DType.BOOL
            expr = Cast(DType.I32 if truths else self.type_of_tensor(stmt.target.name), expr)
        return expr, over, merged(self.present_after(live, ranks, stmt), outside)

    def nan_matters(self, stmt: Einsum) -> bool:
        """Whether a NaN must come through an extreme: unless sums of the same elements bring it to every result."""
        assert isinstance(stmt.expr, Reduce)
        if stmt.expr.reducer not in ("max", "min") or self.type_of_tensor(stmt.target.name) not in FLOATS:
            return False
        elements = {node.tensor for node in walk(stmt.expr.body) if isinstance(node, Read)}
        summed: set[str] = set()
        for other in self.group.statements:
            sums = isinstance(other, Einsum) and isinstance(other.expr, Reduce) and other.expr.reducer == "sum"
            above = self.ancestors(other) if sums else set()
            if elements & above and stmt.target.name in above:
                summed.update(defines(other))
        ends = [s for s in self.group.statements if any(name in self.setting.results for name in defines(s))]
        return not all(
            summed & self.ancestors(end) or stmt.target.name not in self.ancestors(end) | set(defines(end))
            for end in ends
        )

    def ancestors(self, stmt: Stmt) -> set[str]:
        """Everything that a statement depends on, and what it defines."""
        found, todo = set(defines(stmt)), list(reads(stmt))
        while todo:
            name = todo.pop()
            if name not in found:
                found.add(name)
                todo.extend(r for s in self.group.statements if name in defines(s) for r in reads(s))
        return found

    def type_of_tensor(self, name: str) -> DType:
        return computed(self.setting.dtypes[name])

    def small_enough(self, stmt: Stmt, axes: Collection[str]) -> None:
        """Refuses a tile that Triton does not have: more elements than a million."""
        size = 1
        for rank in axes:
            size *= self.axis(rank).tile
        if size > LARGEST_TILE:
            raise unsupported(f"a sum over tiles of {size} elements", stmt)

    def tested(
        self, stmt: Einsum, body: Value, live: tuple[Expr, ...], over: tuple[str, ...], wanted: float | int | bool
    ) -> Expr:
        """The elements with those that are absent put to what the reduction does not see."""
        tests = tuple(test for test in live if self.reaches(test, over))
        self.note_edges(stmt, live)
        if not tests:
            return body.expr
        wild = any(set(axes) & set(over) and not set(tests) <= set(zero) for axes, zero in body.data)
        if body.absent is not None and _same(body.absent, float(wanted)) and set(tests) <= set(body.live) and not wild:
            return body.expr
        return self.kept(stmt, body.expr, tests, wanted)

    def kept(self, stmt: Stmt, expr: Expr, tests: tuple[Expr, ...], wanted: float | int | bool) -> Expr:
        """An expression as a variable that is `wanted` where a test fails; later readers see it so as well.

        A value that is present beyond the tests stays as it is for its other readers: the variable is another one.
        """
        raw, factor = split_scale(expr) if is_scaled(expr) else (expr, Const(1.0))
        fill = wanted
        if factor != Const(1.0) and isinstance(wanted, float) and math.isinf(wanted) and float(factor.value) < 0:
            fill = -wanted
        local = raw if isinstance(raw, Local) and raw.name in self.variables else None
        shared = [name for name, value in self.values.items() if value.expr == expr and local is not None]
        own = all(set(tests) <= set(self.values[name].live) for name in shared)  # and no filter of this statement's
        spread = self.spread({rank for part in (raw, *tests) for rank in self.shape(part)} | self.read_axes(tests))
        if local is None or not shared or not own or set(spread) != set(self.variables[local.name][0]):
            local, shared = self.let(f"{defines(stmt)[0]}_kept", raw, spread), []
        axes = self.variables[local.name][0]
        self.ranges.pop(local.name, None)
        self.keep(local.name, axes, tests, fill)
        for name in shared:
            value = self.values[name]
            self.values[name] = Value(value.expr, value.live, float(wanted) if is_told(wanted) else None)
        return product([local, factor]) if factor != Const(1.0) else local

    def keep(self, name: str, axes: tuple[str, ...], tests: tuple[Expr, ...], fill: float | int | bool) -> None:
        """A variable is a constant where a test fails."""
        mask, edge = self.masked(tests)
        self.ops.append(Keep(name, axes, mask.name, fill, edge))

    def note_edges(self, stmt: Einsum, live: Sequence[Expr]) -> None:
        """Remembers under which tests a tile of the stream gives anything to a state."""
        if self.streaming and self.group.arrangement.stream in reduced_ranks(stmt):
            self.edges.append(tuple(test for test in live if self.streams(test)))

    def read_axes(self, tests: Sequence[Expr]) -> set[str]:
        """The dimensions of what tests read."""
        return {rank for test in tests for rank in self.index_axes(test)}

    def concerns(self, test: Expr, ranks: Collection[str]) -> bool:
        """Whether a test differs along any of some ranks, within a tile or from one tile to the next."""
        return bool((ranks_of(test) | self.test_ranks(test)) & set(ranks))

    def reaches(self, test: Expr, over: Collection[str]) -> bool:
        """Whether a test tells apart the elements that are reduced."""
        ranks, loops = self.test_ranks(test), {self.within, self.group.arrangement.stream if self.streaming else None}
        return bool(ranks & set(over)) or bool(loops & (ranks | ranks_of(test)))

    def is_edge(self, test: Expr) -> bool:
        """Whether a test is not needed in whole tiles: of the streamed rank, and it says which tiles are whole.

        What reads data along the rank says so of none, and stands in all tiles.
        """
        return self.streams(test) and self.tells_whole(test)

    def tells_whole(self, test: Expr) -> bool:
        """Whether a test of the streamed rank says which tiles are whole."""
        if test not in self.whole:
            told = test in self.setting.index or test == self.tail(self.group.arrangement.stream or "")
            self.whole[test] = told or not (self.is_made(test) or self.bounds([test]).never_full)
        return self.whole[test]

    def streams(self, test: Expr) -> bool:
        """Whether a test depends on the streamed rank, also where a whole tile passes or does not."""
        stream = self.group.arrangement.stream
        return self.streaming and stream is not None and stream in ranks_of(test) | self.test_ranks(test)

    def is_made(self, test: Expr) -> bool:
        """Whether a test reads what is made in the kernel."""
        return any(isinstance(node, Local) for node in walk(test))

    def bounds(self, tests: Sequence[Expr], within: Collection[str] = ()) -> Bounds:
        """Where tests leave coordinates of the stream, for a tile of the other ranks."""
        tiled = [axis.rank for axis in self.setting.axes if axis.role in (Role.TILE, Role.WHOLE)]
        return loop_bounds(tests, self.group.arrangement.stream or "", [*tiled, *within])

    def test_ranks(self, test: Expr) -> set[str]:
        """The dimensions along which a test differs."""
        return set(self.index_axes(test))

    def mask(self, tests: tuple[Expr, ...], edges: Collection[Expr] = ()) -> Local:
        """A variable that says where all of the tests hold; those of edges are asked there alone."""
        key = frozenset(tests), frozenset(edges)
        if key not in self.masks:
            lowered = {test: self.expression(test).expr for test in tests}
            axes = self.spread({rank for test in lowered.values() for rank in self.shape(test)})
            variable = self.variable("live", axes, DType.BOOL)
            live = tuple(expr for test, expr in lowered.items() if test not in edges)
            self.ops.append(Mask(variable, axes, live, tuple(lowered[test] for test in lowered if test in edges)))
            self.masks[key] = Local(variable)
        return self.masks[key]

    def masked(self, tests: tuple[Expr, ...]) -> tuple[Local, bool]:
        """A variable that says where all of the tests hold, and whether they do in whole tiles."""
        edges = tuple(test for test in tests if self.is_edge(test))
        return self.mask(tests, edges), len(edges) == len(tests)

    def present_after(self, live: tuple[Expr, ...], ranks: tuple[str, ...], stmt: Stmt) -> tuple[Expr, ...]:
        """The tests under which a reduction over some ranks is present: any of its elements is."""
        inside = tuple(test for test in live if self.concerns(test, ranks))
        outside = tuple(test for test in live if test not in inside)
        if not inside:
            return outside
        told = {rank: [test for test in inside if self.concerns(test, (rank,))] for rank in ranks}
        each = sum(map(len, told.values())) == len(inside)  # no test tells of two of them
        if each and all(
            never_empty(list(map(self.numbered, tests)), rank, self.setting.numbers)
            for rank, tests in told.items()
            if tests
        ):
            return outside
        return merged(outside, (self.somebody(inside, ranks, stmt),))

    def somebody(self, tests: tuple[Expr, ...], ranks: tuple[str, ...], stmt: Stmt) -> Expr:
        """A flag per row: whether any coordinate of these ranks passes the tests."""
        axes = self.spread({rank for test in tests for rank in self.test_ranks(test)} - set(ranks))
        over = self.spread(ranks)
        stream = self.group.arrangement.stream
        if self.streaming and stream is not None and not any(self.concerns(test, (stream,)) for test in tests):
            # known before the loop
            here, masks = self.ops, self.masks
            self.ops, self.masks, self.streaming = self.outer[0], {}, False
            found = self.somebody(tests, ranks, stmt)
            self.ops, self.masks, self.streaming = here, masks, True
            return found
        if not self.streaming or stream not in ranks:
            mask = self.mask(tests)
            inner = tuple(rank for rank in over if rank in self.variables[mask.name][0])
            return self.any_of(mask, axes, inner)
        if tests in self.presence:
            return Local(self.presence[tests])
        state = self.variable("seen", axes, DType.BOOL)
        self.outer[0].append(Start(state, axes, Const(False)))
        self.presence[tests] = state
        mask, edge = self.masked(tests)
        self.ops.append(Seen(state, axes, mask.name, tuple(r for r in over if r in self.variables[mask.name][0]), edge))
        if (begun := self.begins(stmt)) is not None:
            self.extremes[state] = defines(stmt)[0], begun
        return Local(state)

    def begins(self, stmt: Stmt) -> float | None:
        """What a floating extreme that is folded along the stream begins as, which is less or more than all it sees."""
        name = defines(stmt)[0]
        state = isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) and f"{name}'" in self.values
        if not state or reducer_of(stmt) not in ("max", "min") or self.type_of_tensor(name) not in FLOATS:
            return None
        return None if self.begun(name) is not None else float(identity(reducer_of(stmt), DType.F32))

    def any_of(self, mask: Local, axes: tuple[str, ...], over: tuple[str, ...]) -> Expr:
        if not over:
            return mask
        found = self.variable("some", axes, DType.BOOL)
        self.ops.append(Fold(found, axes, "any", over, mask))
        return Local(found)

    def count(self, stmt: Einsum, inside: tuple[Expr, ...], outside: tuple[Expr, ...]) -> Value:
        """How many elements are present: a product of extents where all are, else the tests that hold."""
        assert isinstance(stmt.expr, Reduce)
        ranks = stmt.expr.ranks
        live = merged(self.peek(stmt.expr.body), inside)
        tests = tuple(test for test in live if self.concerns(test, ranks))
        outside = merged(tuple(test for test in live if test not in tests), outside)
        stream = self.group.arrangement.stream
        if not tests and not (self.streaming and stream in ranks):
            sizes = [extent_expr(self.setting.extents[rank]) for rank in ranks]
            return Value(self.expression(product(sizes)).expr, outside)
        axes, over = self.spread(stmt.target.ranks), self.spread(ranks)
        every = merged(tests, self.tails(ranks))
        self.note_edges(stmt, every)
        ones = self.let(f"{stmt.target.name}_ones", Const(1), over)
        expr = self.kept(stmt, ones, every, 0) if every else ones
        variable = self.variable(stmt.target.name, axes, DType.I32)
        self.ops.append(Fold(variable, axes, "sum", over, expr))
        return Value(Local(variable), merged(self.present_after(tests, ranks, stmt) if tests else (), outside))

    def top_k(self, stmt: TopK) -> None:
        """The kept values and coordinates of a row that is whole in the tile."""
        axes = self.spread(stmt.values.ranks)
        body = self.expression(stmt.body)
        if self.type_of(body.expr) in (DType.I8, DType.I32, DType.I64):
            raise unsupported("a topk of integers, which kernels would order as floats of 32 bits", stmt)
        live = merged(body.live, self.tests(conjuncts(stmt.where)), self.tails((stmt.rank,)))
        source = body.expr if isinstance(body.expr, Local) else self.let(f"{stmt.values.name}_body", body.expr)
        tests = tuple(test for test in live if self.reaches(test, (stmt.rank,)))
        if not isinstance(stmt.k, int):
            raise unsupported("a topk whose count is not a number", stmt)
        kept = next(rank for rank in stmt.values.ranks if rank not in ranks_of(stmt.body))
        values = self.variable(stmt.values.name, axes, DType.F32)
        coords = self.variable(stmt.coords.name, axes, DType.I32)
        bits = 16 if isinstance(stmt.body, Read) and self.setting.dtypes[stmt.body.tensor] in SHORT_FLOATS else 32
        assert isinstance(source, Local)
        short = bool({*tests} - {self.tail(stmt.rank)}) or not self.enough(stmt.rank, stmt.k)
        there = self.variable(f"{stmt.values.name}_there", axes, DType.BOOL) if short else None
        mask = self.mask(tests).name if tests else None
        self.ops.append(TopKept(values, coords, axes, stmt.rank, kept, stmt.k, source.name, bits, mask, there))
        outside = tuple(test for test in live if test not in tests)
        if not self.axis(kept).exact and not self.axis(kept).single:
            outside = merged(outside, (self.tail(kept),))
        present = outside if there is None else merged(outside, (Local(there),))
        for target, variable in ((stmt.values, values), (stmt.coords, coords)):
            self.values[target.name] = Value(Local(variable), present)

    # --- recurrences -------------------------------------------------------------------------------------------------

    def begin_steps(self, stmt: Einsum) -> None:
        """What a recurrence carries before its first coordinate."""
        init, name = stmt.inits[0], stmt.target.name
        axes = self.spread([rank for rank in stmt.target.ranks if rank != init.rank])
        dtype = computed(self.setting.dtypes[name])
        found = self.expression(init.expr)
        variable = self.variable(f"{name}_before", axes, dtype)
        self.ops.append(Start(variable, axes, self.typed(found.expr, dtype)))
        self.values[f"{name}'"] = Value(Local(variable), found.live)

    def typed(self, expr: Expr, dtype: DType) -> Expr:
        """An expression in a type."""
        if isinstance(expr, Const):
            return Const(float(expr.value)) if dtype in FLOATS else expr
        return expr if self.type_of(expr) is dtype else Cast(dtype, expr)

    def steps(self, stmt: Einsum) -> tuple[str, str]:
        """The steps of a recurrence at the tile at hand; what it carries, and what that is after the tile."""
        name, rank = stmt.target.name, stmt.inits[0].rank
        before = self.values[f"{name}'"]
        assert isinstance(before.expr, Local)
        free = rewrite(stmt.expr, lambda node: Const(0) if node == carried(stmt) else node)
        live = merged(self.peek(free), self.tests(conjuncts(stmt.where)), before.live)
        if not self.axis(rank).exact:
            live = merged(live, (self.tail(rank),))
        along = tuple(test for test in live if rank in ranks_of(test) | self.test_ranks(test))
        if any(not ends(test, rank) for test in along):
            raise unsupported(f"a recurrence along {rank} that reads what may be absent where it does not end", stmt)
        if self.axis(rank).single:
            after = self.one_step(stmt)
            here = after
        else:
            here, after = self.composed(stmt, before.expr, along)
        self.values[name] = Value(Local(here), live)
        if self.streaming:
            self.edges.append(tuple(test for test in live if self.streams(test)))
        size = self.setting.extents[rank]
        end = Const(size - 1) if isinstance(size, int) else Apply("sub", (Extent(size), Const(1)))
        at_end = tuple(substitute(test, {rank: end}) for test in live)
        self.values[f"{name}'"] = Value(before.expr, tuple(test for test in at_end if not self.proved(test)))
        return before.expr.name, after

    def one_step(self, stmt: Einsum) -> str:
        """One coordinate after what is carried."""
        name, axes = stmt.target.name, self.spread(stmt.target.ranks)
        old = Read(f"{name}'", ())
        found = self.expression(rewrite(stmt.expr, lambda node: old if node == carried(stmt) else node))
        return self.let(name, self.typed(found.expr, computed(self.setting.dtypes[name])), axes).name

    def composed(self, stmt: Einsum, before: Local, along: tuple[Expr, ...]) -> tuple[str, str]:
        """A tile of steps as one: composed from its beginning on, then applied to what is carried."""
        found, name, rank = composition(stmt), stmt.target.name, stmt.inits[0].rank
        axes = self.spread(stmt.target.ranks)
        rows = tuple(axis for axis in axes if axis != rank)
        dtype = computed(self.setting.dtypes[name])
        if found is None or dtype is DType.BOOL:
            raise unsupported(f"a recurrence along {rank} whose steps nothing composes, many at a time", stmt)
        if dtype is DType.F32 and self.full_precision():
            found = drift(found) or found
        fills = {"affine": (1, 0), "drift": (0, 0, 0)}.get(found.kind) or (identity(found.kind, dtype),)
        elements = []
        for element, fill in zip(found.elements, fills, strict=True):
            local = self.let(f"{name}_step", self.typed(self.expression(element).expr, dtype), axes)
            filled = float(fill) if dtype in FLOATS else fill
            if along and element != Const(filled):
                self.keep(local.name, axes, along, filled)
            elements.append(local.name)
        names = tuple(self.variable(f"{name}_scan", axes, dtype) for _ in elements)
        self.ops.append(Scan(names, axes, found.kind, rank, tuple(elements)))
        totals = tuple(self.variable(f"{name}_tile", rows, dtype) for _ in names)
        for total, scanned in zip(totals, names, strict=True):
            self.ops.append(Fold(total, rows, "last", (rank,), Local(scanned)))

        def onto(parts: Sequence[str]) -> Expr:
            first, *rest = map(Local, parts)
            if not rest:
                return join(found.kind, before, first)
            moved: Expr = Apply("mul", (first, before))
            for part in reversed(rest):
                moved = Apply("add", (moved, part))
            return moved if found.kind == "affine" else Apply("add", (before, moved))

        here = self.let(name, onto(names), axes).name
        after = self.let(f"{name}_after", onto(totals), rows).name
        if len(names) > 1 and dtype in FLOATS:
            self.ops.append(self.redo(stmt, here, before.name, after))
        return here, after

    def full_precision(self) -> bool:
        """Whether all floats that are read and written have 32 bits, and the program returns such."""
        kinds = {tensor.dtype for tensor in self.setting.tensors.values() if tensor.dtype in FLOATS}
        return not self.setting.narrow and kinds == {DType.F32}

    def redo(self, stmt: Einsum, here: str, before: str, after: str) -> Redo:
        """The steps as they are written, one by one."""
        name, rank, own = stmt.target.name, stmt.inits[0].rank, carried(stmt)
        picks: dict[str, str] = {}

        def picked(expr: Expr) -> Expr:
            if expr == own:
                return Local(after)
            if own in walk(expr):
                return with_children(expr, tuple(map(picked, children(expr))))
            value = self.expression(expr).expr
            if rank not in self.shape(value):
                return value
            tile = value if isinstance(value, Local) else self.let(f"{name}_of", value)
            axes, dtype = self.variables[tile.name]
            one = self.variable(f"{name}_one", tuple(axis for axis in axes if axis != rank), dtype)
            picks[one] = tile.name
            return Local(one)

        expr = self.typed(self.expression(picked(stmt.expr)).expr, self.variables[here][1])
        return Redo(here, self.variables[here][0], rank, before, after, tuple(picks.items()), expr)

    # --- matrix products ---------------------------------------------------------------------------------------------

    def gone_through(self, stmt: Einsum) -> Value:
        """A product for the tile of the stream at hand, summed in a loop over its reduced rank.

        Factors without that rank come behind the loop.
        """
        assert isinstance(stmt.expr, Reduce)
        (rank,) = stmt.expr.ranks
        axes = self.spread(stmt.target.ranks)
        terms = factors(stmt.expr.body)
        within = [term for term in terms if self.concerns(term, (rank,))]
        rest = [self.expression(term) for term in terms if term not in within]
        summed = dataclasses.replace(stmt, expr=dataclasses.replace(stmt.expr, body=product(within)), where=None)
        dtype = self.accumulator(stmt.target.name, "sum")
        total = Local(self.variable(stmt.target.name, axes, dtype))
        self.ops.append(Start(total.name, axes, Const(identity("sum", dtype))))
        kept_masks = dict(self.masks)
        self.outer.append(self.ops)
        self.ops, self.within = [], rank
        added = self.dot(summed, axes, into=(total, total))
        if added is None:
            expr, over, live = self.elements(summed)
            tile = self.variable(f"{stmt.target.name}_tile", axes, dtype)
            self.ops.append(Fold(tile, axes, "sum", over, expr))
            self.ops.append(Let(total.name, axes, self.as_integer(dtype, join("sum", total, Local(tile)))))
            added = Value(total, live)
        body, self.ops = self.ops, self.outer.pop()
        self.within, self.masks = None, kept_masks
        self.loaded = {key: local for key, local in self.loaded.items() if key[-1] != rank}
        self.ops.append(Loop(rank, None, None, None, False, (total.name,), tuple(body)))
        found = self.rounded(f"{stmt.target.name}_whole", total, [value.expr for value in rest])
        live = merged(added.live, *(value.live for value in rest))
        if isinstance(found, Local) or is_scaled(found):
            return Value(found, live)
        return Value(self.let(f"{stmt.target.name}_scaled", found), live)

    def rounded(self, name: str, found: Expr, factors: Sequence[Expr] = ()) -> Expr:
        """A sum of products, by its factors, as what is computed with: one in f64 is rounded once."""
        whole = folded(product([found, *factors]))
        if isinstance(found, Local) and self.variables.get(found.name, ((), DType.F32))[1] is DType.F64:
            return self.let(name, Cast(DType.F32, whole))
        return whole

    def dot(self, stmt: Einsum, axes: tuple[str, ...], into: tuple[Local, Expr] | None = None) -> Value | None:
        """A sum as a matrix product of two tiles; None where it is not one of a size that the hardware has.

        With `into` it is added to a state that was moved, and only where nothing but the product is to be added. In
        full precision the sum is one in f64, and so is the state.
        """
        assert isinstance(stmt.expr, Reduce)
        over = self.spread(stmt.expr.ranks)
        if len(over) != 1 or len(axes) != 2 or set(over) & set(axes):
            return None
        sides = self.sides(factors(stmt.expr.body), axes, over[0], stmt)
        if sides is None or (into is not None and sides[2]):
            return None
        filters = self.tests(conjuncts(stmt.where))
        tests = merged(filters, *(self.peek(term) for side in sides for term in side))
        if any({*axes} <= self.test_ranks(test) and self.concerns(test, over) for test in tests):
            return None  # no side alone can be 0 where it fails
        live: tuple[Expr, ...] | None = None
        variable = into[0].name if into is not None else ""
        for number, (rank, start) in enumerate(self.setting.pieces.get(over[0], ((over[0], 0),))):
            place = Rank(rank) if start == 0 else Apply("add", (Rank(rank), Const(start)))
            mine = [[substitute(term, {over[0]: place}) for term in terms] for terms in (*sides, filters)]
            tests = merged(tuple(mine.pop()), *(self.peek(term) for side in mine for term in side))
            inside = tuple(test for test in tests if self.concerns(test, (rank,)))
            left, right, after, wide = self.operands(stmt, mine[0], mine[1], inside, axes, rank)
            live = after if live is None else either(live, after)
            wide = tuple(test for test in wide if axes[1] not in self.test_ranks(test))
            present, edge = self.present(right, wide) if into is None else (None, False)
            exact = DType.F32 in (self.variables[left.name][1], self.variables[right.name][1])
            if into is not None and number == 0:
                if wide and right.name in self.raw:
                    self.watched.append(variable)
                self.move(*into, axes)
            onto = into is not None or number > 0
            name = f"{stmt.target.name}_sum" if exact else stmt.target.name
            variable = variable or self.variable(name, axes, DType.F32)
            self.variables[variable] = axes, DType.F64 if exact else DType.F32
            self.ops.append(Dot(variable, axes, left.name, right.name, rank, onto, exact, present, edge))
        assert live is not None
        if into is not None:
            return Value(into[0], live)
        scale = [self.expression(term) for term in sides[2]]
        live = merged(live, *(tuple(t for t in value.live if not self.concerns(t, over)) for value in scale))
        found = self.rounded(stmt.target.name, Local(variable), [value.expr for value in scale])
        if isinstance(found, Local) or is_scaled(found):
            return Value(found, live)
        return Value(self.let(f"{stmt.target.name}_scaled", found), live)

    def sides(
        self, terms: Sequence[Expr], axes: tuple[str, ...], over: str, stmt: Einsum
    ) -> tuple[list[Expr], list[Expr], list[Expr]] | None:
        """The factors by the dimensions of the tile that they have: rows, columns, or neither and no reduced one."""
        rows, columns = axes
        left: list[Expr] = []
        right: list[Expr] = []
        rest: list[Expr] = []
        for term in terms:
            shape = set(self.index_axes(term))
            if over not in shape:
                rest.append(term)
            elif shape <= {rows, over} and not (shape == {over} and left and not right):
                left.append(term)
            elif shape <= {columns, over}:
                right.append(term)
            else:
                return None
        if not left or not right:
            return None
        if {rows} - set().union(*map(self.index_axes, left)) or {columns} - set().union(*map(self.index_axes, right)):
            return None
        if not self.multiplied(left) or not self.multiplied(right):
            return None
        if self.type_of(product([*left, *right])) not in FLOATS:  # a sum of integers is exact
            return None
        pieces = [rank for rank, _ in self.setting.pieces.get(over, ((over, 0),))]
        if min(self.axis(rank).tile for rank in (rows, columns, *pieces)) < SMALLEST_SIDE:
            return None
        return left, right, rest

    def multiplied(self, terms: Sequence[Expr]) -> bool:
        """Whether a side can be in a short float type: floats, and bytes as they are stored, which lose nothing."""
        if len(terms) == 1 and isinstance(terms[0], Read):
            return self.type_of(terms[0]) in FLOATS or self.type_of(terms[0]) is DType.I8
        return self.type_of(product(terms)) in FLOATS

    def operands(
        self, stmt: Einsum, left_terms: list[Expr], right_terms: list[Expr], inside: tuple[Expr, ...],
        axes: tuple[str, ...], over: str,
    ) -> tuple[Local, Local, tuple[Expr, ...], tuple[Expr, ...]]:  # fmt: skip
        """Both sides as variables of one type, zero where an element is absent; the tests of both.

        `inside` are the tests of all factors along the reduced rank: those of a factor that is one number for a tile
        are tests of a side. The last are the tests along it that the right side alone does not decide.
        """
        left_terms, right_terms = ([self.unwidened(term) for term in terms] for terms in (left_terms, right_terms))
        narrow = self.narrow(left_terms, right_terms)
        left, left_live = self.side(stmt, "left", left_terms, inside, (axes[0], over), narrow, over)
        right, right_live = self.side(stmt, "right", right_terms, inside, (over, axes[1]), narrow, over)
        live = merged(left_live, right_live, inside)
        covered = {test for test in live if self.test_ranks(test) <= {axes[1], over}}
        wide = tuple(test for test in live if self.reaches(test, (over,)))
        self.note_edges(stmt, live)
        unmet = tuple(test for test in wide if test not in self.zeroed.get(left.name, ()) and test not in covered)
        unmet = tuple(test for test in unmet if test not in self.zeroed.get(right.name, ()))
        if unmet:
            left = self.zero(stmt, left, unmet)
        inner = tuple(test for test in live if not self.reaches(test, (over,)))
        after = merged(inner, self.present_after(wide, (over,), stmt) if wide else ())
        return left, right, after, wide if set(wide) - covered else ()

    def present(self, right: Local, tests: tuple[Expr, ...]) -> tuple[str | None, bool]:
        """The mask of a matrix product whose right side may hold what is not finite where an element is absent."""
        if not tests or right.name not in self.raw:
            return None, False
        mask, edge = self.masked(tests)
        return mask.name, edge

    partial: list[Partial] = field(default_factory=list)
    watched: list[str] = field(default_factory=list)
    trips: Trips | None = None
    at: int = 0  # the trip at hand
    raw: set[str] = field(default_factory=set)  # variables that hold data as it was loaded
    zeroed: dict[str, tuple[Expr, ...]] = field(default_factory=dict)  # tests where a variable is 0 if they fail

    def side(
        self, stmt: Einsum, which: str, terms: list[Expr], inside: tuple[Expr, ...], dims: tuple[str, str],
        narrow: DType, over: str,
    ) -> tuple[Local, tuple[Expr, ...]]:  # fmt: skip
        """One operand: a tile as it was loaded, or a computed one rounded to the type of the product."""
        own = tuple(test for test in inside if self.test_ranks(test) <= set(dims) and self.reaches(test, (over,)))
        if len(terms) == 1 and isinstance(terms[0], Read) and terms[0].tensor not in self.values:
            # Outside the loop it would be converted to f64 there, and lie in registers all the time.
            value = self.load(terms[0], raw=True, tests=own, every_round=narrow is DType.F32)
            assert isinstance(value.expr, Local)
            self.raw.add(value.expr.name)
            if self.variables[value.expr.name][1] is narrow:
                self.zeroed[value.expr.name] = merged(own, value.live)
                return value.expr, merged(value.live, own)
        value = self.expression(product(terms))
        expr = value.expr.arg if isinstance(value.expr, Cast) and value.expr.dtype is narrow else value.expr
        wide = tuple(test for test in merged(value.live, own) if self.reaches(test, (over,)))
        if wide and not (value.absent == 0.0 and set(wide) <= set(value.live)):
            expr = self.kept(stmt, expr, wide, 0.0)
        if isinstance(expr, Local) and self.variables[expr.name][1] is narrow:
            found = expr
        else:
            found = self.narrowed(expr, f"{stmt.target.name}_{which}", narrow)
        self.zeroed[found.name] = wide
        return found, merged(value.live, own)

    def narrowed(self, expr: Expr, name: str, narrow: DType) -> Local:
        """A computed operand in the type of its product: before the loops, where none of them changes it."""
        blocks = [*self.outer, self.ops]
        at = self.ops
        if isinstance(expr, Local):
            name = expr.name
            at = next((ops for ops in blocks if any(isinstance(o, Let | Load) and o.name == name for o in ops)), at)
            done = (op for op in at if isinstance(op, Let) and op.expr == expr and op.dtype is narrow)
            if (there := next(done, None)) is not None:
                return Local(there.name)
        variable = self.variable(f"{name}_{narrow.value}", self.shape(expr), narrow)
        at.append(Let(variable, self.shape(expr), expr, narrow))
        return Local(variable)

    def zero(self, stmt: Stmt, operand: Local, tests: tuple[Expr, ...]) -> Local:
        """An operand that is 0 where a test fails."""
        axes, dtype = self.variables[operand.name]
        variable = self.variable(f"{operand.name}_kept", axes, dtype)
        self.ops.append(Let(variable, axes, operand))
        self.keep(variable, axes, tests, 0.0)
        return Local(variable)

    def unwidened(self, term: Expr) -> Expr:
        """A factor of a product as it lies in memory: what it is widened to has no more of it, nor have products."""
        match term:
            case Cast(dtype=DType.F32, arg=Read(tensor=name)) if name not in self.values:
                return term.arg if self.setting.dtypes[name] in SHORT_FLOATS else term
            case _:
                return term

    def narrow(self, left: Sequence[Expr], right: Sequence[Expr]) -> DType:
        """The type in which a matrix product multiplies: that of its data, or of what was computed for it.

        Computed operands are rounded to the type of the data they meet where nothing that is stored is any finer. Not
        sums in f32 to f16, which may have no number as large.
        """
        terms = [*left, *right]
        if self.fine_results() and not all(isinstance(term, Read) for term in terms):
            return DType.F32
        if any(map(self.is_wide_sum, terms)):
            return DType.F32
        met = [side for side, other in ((left, right), (right, left)) if self.is_data(side) and not self.is_data(other)]
        terms = [*met[0]] if met and self.short_results() else terms
        names = [name for term in terms for name in _tensors(term) if self.setting.dtypes[name] in FLOATS]
        data = {self.setting.dtypes[name] for name in names if name not in self.values}
        kinds = data if data and self.short_results() else {self.setting.dtypes[name] for name in names}
        return multiplied_in(kinds) if kinds else DType.F32

    def is_wide_sum(self, term: Expr) -> bool:
        """Whether a factor is a sum of this kernel that is f32 in the cascade, where data is f16."""
        dtypes = self.setting.dtypes
        if not isinstance(term, Read) or dtypes[term.tensor] is not DType.F32 or DType.F16 not in dtypes.values():
            return False
        own = (stmt for stmt in self.group.statements if term.tensor in defines(stmt))
        return any(isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) for stmt in own)

    def is_data(self, terms: Sequence[Expr]) -> bool:
        """Whether a side is floats as they lie in memory."""
        found = terms[0] if len(terms) == 1 else None
        return isinstance(found, Read) and found.tensor not in self.values and self.type_of(found) in FLOATS

    def fine_results(self) -> bool:
        """Whether some float that is stored is one of 32 bits in the cascade: no operand is rounded for it."""
        return any(self.setting.dtypes[name] in (DType.F32, DType.F64) for name in self.setting.results)

    def short_results(self) -> bool:
        """Whether all floats that the kernel stores have 16 bits or fewer."""
        stored = [self.setting.tensors[name].dtype for name in self.setting.results]
        return not any(dtype in (DType.F32, DType.F64) for dtype in stored)

    # --- expressions -------------------------------------------------------------------------------------------------

    def expression(self, expr: Expr) -> Value:
        """An expression over variables of the kernel, with the tests of everything it reads."""
        match expr:
            case Const() | Rank() | Local():
                return Value(expr)
            case Extent():
                return Value(extent_expr(expr.name))
            case Read() if expr.tensor in self.values:
                return self.values[self.place_of(expr)]
            case Read() if expr.tensor in self.group.names:  # where a recurrence ends, behind its loop
                return self.values[f"{expr.tensor}'"]
            case Read():
                return self.load(expr)
            case Cast():
                found = self.expression(expr.arg)
                return Value(Cast(expr.dtype, found.expr), found.live, found.absent, found.data)
            case Apply(op="default"):
                return self.default(expr)
            case Apply(op="pow") if (power := self.power(expr)) is not None:
                return self.expression(power)
            case Apply():
                parts = [self.expression(arg) for arg in expr.args]
                applied = self.counted(Apply(expr.op, tuple(part.expr for part in parts)))
                joined = self.widened(folded(self.cheaper(applied)))
                data = frozenset(tile for part in parts for tile in part.data)
                absent = absent_value(expr.op, parts, self.presence)
                return Value(joined, merged(*(part.live for part in parts)), absent, data)
            case Reduce():
                return self.extreme(expr)
            case _:
                raise unsupported(f"{type(expr).__name__} inside an expression")

    def place_of(self, read: Read) -> str:
        """The value that a read of the kernel's own means: the tensor at hand, or what a recurrence has in the end."""
        stmt = next((s for s in stepped(self.group.statements) if s.target.name == read.tensor), None)
        last = stmt is not None and is_last(read, stmt, self.setting.extents[stmt.inits[0].rank])
        return f"{read.tensor}'" if last else read.tensor

    def counted(self, expr: Apply) -> Apply:
        """An operation on truth values alone, on integers or as a logical one: Triton has one bit for it.

        A division beside one is on integers as well: Triton divides no unsigned by a signed number.
        """
        truths = [self.type_of(arg) is DType.BOOL for arg in expr.args]
        divided = expr.op in ("div", "floordiv", "mod") and any(truths)
        if expr.op in LOGICAL or not (all(truths) or divided):
            return expr
        if expr.op in ("min", "max"):
            return Apply({"min": "and", "max": "or"}[expr.op], expr.args)
        return Apply(expr.op, tuple(Cast(DType.I32, a) if t else a for a, t in zip(expr.args, truths, strict=True)))

    def widened(self, expr: Expr) -> Expr:
        """An operation on integers with operands of a type that holds its result: that of its data where it does."""
        if not isinstance(expr, Apply) or expr.op in ("and", "or", "not") or OPS[expr.op].kind is Kind.FLOAT:
            return expr
        chosen = expr.args[1:] if expr.op == "select" else expr.args
        types = [self.type_of(arg) for arg in chosen]
        now = wider(*types)
        if now is DType.BOOL or now in FLOATS:
            return expr
        found = interval(expr, self.values_of)
        dtype = next((t for t in (now, wider(now, DType.I32)) if fits(found, t)), DType.I64)
        short = DType.I8 in types and any(isinstance(arg, Const) for arg in chosen)  # Triton gives a number that type

        def typed(arg: Expr) -> Expr:
            if isinstance(arg, Const):
                return Cast(DType.I64, arg) if self.type_of(arg) is DType.I64 else arg
            return Cast(dtype, arg) if (dtype is not now or short) and self.type_of(arg) is not dtype else arg

        return Apply(expr.op, (*expr.args[: len(expr.args) - len(chosen)], *map(typed, chosen)))

    def values_of(self, expr: Expr) -> Interval:
        """The integers that a coordinate, a size or a variable can be."""
        match expr:
            case Rank():
                return 0, max(self.most(expr.name) - 1, 0)
            case Extent():
                return 0, self.most(expr.name)
            case Local() if expr.name in self.ranges:
                return self.ranges[expr.name]
            case Local() if expr.name not in self.variables:  # an end of a tile: m_first
                rank, _, _ = expr.name.rpartition("_")
                return 0, self.most(rank) + self.axis(rank).tile
            case _:
                return values_of(self.type_of(expr))

    def power(self, expr: Apply) -> Expr | None:
        """A small power as a product; None where floats are raised to any other one."""
        base, exponent = expr.args
        if isinstance(exponent, Const) and isinstance(exponent.value, int) and 0 < exponent.value <= MOST_FACTORS:
            return functools.reduce(lambda a, b: Apply("mul", (a, b)), [base] * exponent.value)
        if all(self.type_of(self.expression(arg).expr) not in FLOATS for arg in expr.args):
            raise unsupported("a power of integers whose exponent is no small number")
        return None

    def cheaper(self, expr: Apply) -> Expr:
        """A division of a tile by what is the same for many of its elements, as a product with one over it.

        A few numbers, such as a mean for each row, are divided: what is subtracted from others must be rounded once. In
        full precision all are: the rounding of one over a divisor is the same for many, and does not average out.
        Factors are multiplied together first that have few dimensions, numbers among them; coordinates become floats
        before they meet.
        """
        if expr.op == "mul" and self.type_of(expr) is DType.F32:
            terms = sorted(map(self.floated, factors(expr)), key=lambda term: len(self.shape(term)))
            if len(terms) <= 2:
                return Apply("mul", tuple(terms) if len(terms) == 2 else expr.args)
            numbers: list[Expr] = [term for term in terms if isinstance(term, Const)]
            others = [term for term in terms if not isinstance(term, Const)]
            return product([product([*others[:1], *numbers]), *others[1:]])
        if expr.op in ("add", "sub") and self.type_of(expr) is DType.F32:
            return Apply(expr.op, tuple(map(self.floated, expr.args)))
        if expr.op != "div":
            return expr
        tile, by = map(self.shape, expr.args)
        shared = bool(by) and len(by) < len(tile) and not self.full_precision()
        if not shared and few_quotients(self.shape(expr), {axis.rank: axis.tile for axis in self.setting.axes}):
            return expr
        if isinstance(expr.args[1], Const) and self.type_of(expr.args[0]) is DType.F32:
            return product([expr.args[0], Const(1.0 / float(expr.args[1].value))]) if expr.args[1].value else expr
        if len(by) < len(tile) and not self.full_precision() and self.type_of(expr.args[0]) in FLOATS:
            return Apply("mul", (expr.args[0], Apply("div", (Const(1.0), expr.args[1]))))
        return expr

    def floated(self, expr: Expr) -> Expr:
        """A sum of coordinates in float32, coordinate by coordinate: converting a tile of integers is slow.

        Only where every intermediate number is exact, below 2^24.
        """
        leaves = list(walk(expr))
        plain = all(
            isinstance(n, Rank | Const) or (isinstance(n, Apply) and n.op in ("add", "sub", "neg")) for n in leaves
        )
        ranks = [node.name for node in leaves if isinstance(node, Rank)]
        if not plain or len(ranks) < 2 or self.type_of(expr) is not DType.I32:
            return expr
        sizes = [abs(int(n.value)) for n in leaves if isinstance(n, Const)] + list(map(self.most, ranks))
        if sum(sizes) >= 1 << 24:
            return expr
        return rewrite(expr, lambda node: Cast(DType.F32, node) if isinstance(node, Rank) else node)

    def enough(self, rank: str, count: Size) -> bool:
        """Whether a rank has so many coordinates in this call."""
        return isinstance(count, int) and self.setting.actual[rank] >= count

    def most(self, rank: str) -> int:
        """The extent of a rank or shape symbol, or what it does not exceed where it changes from call to call."""
        size = self.setting.numbers[rank]
        return size if isinstance(size, int) else self.setting.most[size]

    def extreme(self, expr: Reduce) -> Value:
        """The extreme of a loaded tile that a loop bound asks for."""
        found = self.expression(expr.body)
        over = self.spread(expr.ranks)
        variable = self.variable("bound", (), self.type_of(found.expr))
        if self.type_of(found.expr) not in FLOATS:
            self.ranges[variable] = interval(found.expr, self.values_of)
        self.ops.append(Fold(variable, (), expr.reducer, over, found.expr))
        return Value(Local(variable))

    def default(self, expr: Apply) -> Value:
        """The first operand where it is present, else the second: present where either is."""
        first, second = map(self.expression, expr.args)
        if not first.live:
            return first
        mask = self.mask(first.live)
        return Value(Apply("select", (mask, first.expr, second.expr)), either(first.live, second.live))

    def peek(self, expr: Expr) -> tuple[Expr, ...]:
        """The tests of an expression, without making anything for it."""
        parts = tuple(map(self.peek, children(expr)))
        if isinstance(expr, Apply) and expr.op == "default":
            return either(*parts)
        if not isinstance(expr, Read):
            return merged(*parts)
        known = self.values.get(expr.tensor)
        return merged(known.live if known else self.load_tests(expr), *parts)

    def index_axes(self, index: Expr) -> tuple[str, ...]:
        """The dimensions of an expression: a quotient by a multiple of the tile is one number for the whole tile."""
        if isinstance(index, Apply) and index.op == "floordiv" and isinstance(index.args[0], Rank):
            axis, by = self.axis(index.args[0].name), index.args[1]
            if axis.role in (Role.TILE, Role.STREAM) and isinstance(by, Const) and int(by.value) % axis.advance == 0:
                return ()
        found: set[str] = set()
        match index:
            case Rank():
                return self.spread({index.name})
            case Local():
                return self.variables[index.name][0] if index.name in self.variables else ()
            case Read() if index.tensor in self.values:
                return self.index_axes(self.values[index.tensor].expr)
            case _:
                for child in children(index):
                    found |= set(self.index_axes(child))
        return self.spread(found)

    def shape(self, expr: Expr) -> tuple[str, ...]:
        """The dimensions of a lowered expression."""
        return self.index_axes(expr)

    def type_of(self, expr: Expr) -> DType:
        """The type in which a lowered expression is computed."""
        match expr:
            case Const():
                if type(expr.value) is int:
                    return DType.I32 if fits((expr.value, expr.value), DType.I32) else DType.I64
                return DType.BOOL if isinstance(expr.value, bool) else DType.F32
            case Local():
                return computed(self.variables[expr.name][1]) if expr.name in self.variables else DType.I32
            case Apply(op="select"):
                return wider(*map(self.type_of, expr.args[1:]))
            case Apply() if OPS[expr.op].kind is Kind.BOOL:
                return DType.BOOL
            case Apply() if OPS[expr.op].kind is Kind.FLOAT:
                return DType.F32
            case Apply():
                return wider(*map(self.type_of, expr.args))
            case Cast():
                return computed(expr.dtype)
            case Read():
                return self.type_of_tensor(expr.tensor)
            case _:
                return DType.I32

    # --- memory ------------------------------------------------------------------------------------------------------

    def load(self, read: Read, raw: bool = False, tests: tuple[Expr, ...] = (), every_round: bool = False) -> Value:
        """A tile of an argument, once for each use: as it is, for a matrix product, or to compute with.

        A tile that feeds both would be overwritten while it is read (Triton 3.6): it is loaded twice. One that is the
        same in every round of the stream is loaded before it, or in every round.
        """
        tensor = self.setting.tensors[read.tensor]
        own = self.load_tests(read)
        stream = self.group.arrangement.stream
        axes = self.load_axes(read, tensor)
        ranks = {*axes, *(rank for part in read.index for rank in ranks_of(part))}
        streamed = self.streaming and (every_round or stream in ranks)
        loop = self.within if self.within in ranks else stream if streamed else None
        live = merged(own, tests)
        key = (read, raw, tests, loop)
        if key not in self.loaded:
            here, inner, streaming = self.ops, self.within, self.streaming
            if loop is None or loop != inner:  # the innermost loop that makes a difference
                blocks = [*self.outer, self.ops]
                self.ops, self.within = blocks[0] if loop is None else blocks[1], None
            self.streaming = loop is not None
            self.loaded[key] = self.make_load(read, tensor, axes, live, raw)
            self.ops, self.within, self.streaming = here, inner, streaming
        return Value(self.loaded[key], live, 0.0 if live else None, frozenset({(axes, live)}))

    def make_load(self, read: Read, tensor: Tensor, axes: tuple[str, ...], live: tuple[Expr, ...], raw: bool) -> Local:
        index = tuple(self.expression(part).expr for part in read.index)
        box = self.box(tensor, read.index, axes) if raw else None
        beyond = [self.tail(rank) for rank in axes if not self.axis(rank).exact]
        tests = merged(live, tuple(beyond))
        if box is not None and set(tests) <= set(beyond):
            tests = ()  # a descriptor gives 0 beyond the extent
        name = (
            read.tensor.lower()
            if raw
            else f"{read.tensor.lower()}_tile"
            if read.tensor.lower() in self.names
            else read.tensor.lower()
        )
        variable = self.variable(name, axes, tensor.dtype)
        for entry in self.setting.index.values():
            if entry.has(read.tensor):
                stream = self.group.arrangement.stream
                assert stream is not None
                self.ranges[variable] = 0, -(-self.most(stream) // entry.tile)  # they count tiles of the stream
        grouped = self.groups_of(index, axes, tests)
        lowered = [(test, self.expression(self.of_groups(test, grouped)).expr) for test in tests]
        always_ = tuple(low for test, low in lowered if not self.is_edge(test))
        edge = tuple(low for test, low in lowered if self.is_edge(test))
        self.ops.append(Load(variable, tensor.name, index, axes, always_, edge, box, self.eviction(read), grouped))
        return Local(variable)

    def groups_of(self, index: Sequence[Expr], axes: tuple[str, ...], tests: Sequence[Expr]) -> tuple[str, int] | None:
        """The rank of a tile that an index has only divided by a number, and how many neighbours then share an element.

        They are a power of two, which divides the number and the tile, so that tiles begin with a group and end with
        one; in a tile of several dimensions they are the number itself. None where a test tells the coordinates of a
        group apart.
        """
        for part in index:
            match part:
                case Apply(op="floordiv", args=(Rank(name=rank), Const(value=int(size)))) if rank in axes:
                    pass
                case _:
                    continue
            axis, options = self.axis(rank), self.setting.options
            common = math.gcd(size, axis.tile, axis.advance, axis.tile // options.pieces)
            count = common & -common
            others = [other for other in index if other is not part]
            alone = not any(rank in ranks_of(other) or rank in self.index_axes(other) for other in others)
            alone = alone and (count == size or len(axes) == 1)
            if count > 1 and alone and not any(self.tells_apart(test, rank, size, count) for test in tests):
                return rank, count
        return None

    def tells_apart(self, test: Expr, rank: str, size: int, count: int) -> bool:
        """Whether a test may differ between neighbours of which `count`, in one of `size`, share an element."""

        def same(node: Expr) -> Expr:
            match node:
                case Apply(op="floordiv", args=(Rank(name=name), Const(value=int(by)))):
                    return Const(0) if name == rank and by % count == 0 else node
                case _:
                    return node

        if test != self.tail(rank):
            return self.concerns(rewrite(test, same), (rank,))
        extent = self.axis(rank).extent
        two = self.setting.joined.get(str(extent))
        whole = two is not None and self.is_size(Const(size), two[1])  # the rank ends where one of `size` does
        return not whole and (isinstance(extent, str) or extent % count != 0)

    def of_groups(self, test: Expr, grouped: tuple[str, int] | None) -> Expr:
        """A test of a load as one of the groups whose coordinates share an element: whether these lie inside."""
        if grouped is None or test != self.tail(grouped[0]):
            return test
        rank, count = grouped
        high = extent_expr(self.axis(rank).extent)
        return Apply("lt", (Apply("floordiv", (Rank(rank), Const(count))), Apply("floordiv", (high, Const(count)))))

    def eviction(self, read: Read) -> str:
        """Whether a tile is read again: by a later trip, by other programs, or by nobody."""
        there = {rank for index in read.index for rank in ranks_of(index)}
        if not set(self.group.arrangement.shared) <= there or not self.spread(there) or self.elsewhere(read):
            return ""
        again = self.trips is not None and self.streaming and self.trips.read_after(read.tensor, self.at)
        return "evict_last" if again else "evict_first"

    def elsewhere(self, read: Read) -> bool:
        """Whether the group has a tensor at other coordinates as well: what one takes, another finds in the cache."""
        nodes = (node for stmt in self.group.statements for expr in expressions(stmt) for node in walk(expr))
        return len({node for node in nodes if isinstance(node, Read) and node.tensor == read.tensor}) > 1

    def load_axes(self, read: Read, tensor: Tensor) -> tuple[str, ...]:
        """The dimensions of a loaded tile in the order of memory."""
        found: list[str] = []
        order = sorted(range(len(read.index)), key=lambda d: (tensor.strides[d] == 1, d))
        for position in order:
            for rank in self.index_axes(read.index[position]):
                if rank not in found:
                    found.append(rank)
        return tuple(found)

    def load_tests(self, read: Read) -> tuple[Expr, ...]:
        """The tests under which a coordinate of a read exists: tiles that reach beyond, and computed indices."""
        tensor = self.setting.tensors[read.tensor]
        found: list[Expr] = []
        if read.tensor in self.setting.lives:
            ranks, tests = self.setting.lives[read.tensor]
            at = dict(zip(ranks, read.index, strict=True))
            found.extend(test for test in (substitute(test, at) for test in tests) if not self.proved(test))
        for position, index in enumerate(read.index):
            extent = extent_expr(tensor.shape[position])
            if isinstance(index, Read) and index.tensor in self.setting.inside:
                continue
            if isinstance(index, Apply) and any(entry.has(read.tensor) for entry in self.setting.index.values()):
                continue  # a program's own tile: there is one, however many there are
            if isinstance(index, Rank):
                axis = self.axis(index.name)
                if axis.role in (Role.STREAM, Role.WHOLE, Role.INNER) and not axis.exact:
                    found.append(self.tail(index.name))
                continue
            for rank in self.index_axes(index):
                axis = self.axis(rank)
                if axis.role in (Role.STREAM, Role.WHOLE, Role.INNER) and not axis.exact:
                    found.append(self.tail(rank))
            low, high = Apply("ge", (index, Const(0))), Apply("lt", (index, extent))
            found.extend(test for test in (low, high) if not self.proved(test))
        return merged(tuple(found))

    def tails(self, ranks: Collection[str]) -> tuple[Expr, ...]:
        """The tests that coordinates lie inside the extents of ranks, where tiles reach beyond."""
        return tuple(self.tail(rank) for rank in ranks if not self.axis(rank).exact)

    def tail(self, rank: str) -> Expr:
        """The test that a coordinate lies inside the extent of its rank."""
        return Apply("lt", (Rank(rank), extent_expr(self.axis(rank).extent)))

    def box(self, tensor: Tensor, index: tuple[Expr, ...], axes: tuple[str, ...]) -> tuple[int, ...] | None:
        """The box of a descriptor for a tile; None where its place in memory is no box."""
        if not tensor.described or not axes:
            return None
        found = []
        for _position, part in enumerate(index):
            ranks = self.index_axes(part)
            shifted = isinstance(part, Apply) and part.op == "add" and isinstance(part.args[1], Const)
            if ranks and not isinstance(part.args[0] if isinstance(part, Apply) and shifted else part, Rank):
                return None
            found.append(self.axis(ranks[0]).tile if ranks else 1)
        last = index[-1]
        if tensor.strides[-1] != 1 or not self.index_axes(last):
            return None
        if found[-1] * BYTES[tensor.dtype] < 16 or any(size > 256 for size in found) or len(found) > 5:
            return None
        return tuple(found)

    def store(self, name: str, ranks: tuple[str, ...]) -> None:
        """Writes a value of the cascade to memory: by boxes where it comes of products, whose elements lie scattered.

        What is only mapped or reduced lies in registers as it was loaded; a program would wait for its boxes to be
        taken. A large result does not push out of the cache what is still to be read.
        """
        value, result = self.values[name], self.setting.results[name]
        tensor = self.setting.tensors[name]
        axes = self.spread(ranks)
        there = self.setting.scattered.get(name)
        index = tuple(map(Rank, ranks)) if there is None else tuple(self.expression(part).expr for part in there)
        whole = there is None and not any(self.axis(rank).step for rank in axes)
        multiplies = any(isinstance(op, Dot) for block in (*self.outer, self.ops) for op in every_op(block))
        box = self.box(tensor, index, axes) if whole and multiplies else None
        if box is not None:  # a box has its dimensions in the order of memory
            axes = tuple(rank for rank in ranks if rank in axes)
        beyond = tuple(self.tail(rank) for rank in axes if not self.axis(rank).exact)
        live = tuple(test for test in value.live if test not in beyond)
        if self.streaming:
            self.edges.append(())
            if beyond:
                self.edges.append(tuple(test for test in beyond if self.streams(test)))
        lowered = tuple(self.expression(test).expr for test in live)
        only: tuple[Expr, ...] = ()
        if there is not None and self.setting.row is not None:
            only = (Apply("ge", (self.values[self.setting.row].expr, Const(0))),)
        elif there is not None:  # a part of a tensor: elsewhere it stays as it is
            only, lowered = lowered, ()
        size = BYTES[tensor.dtype] * math.prod(self.setting.actual.get(rank, 1) for rank in ranks)
        passing = not multiplies and not self.setting.within and size >= PASSING
        self.ops.append(Store(name, index, axes, value.expr, lowered, result.fill.value, box, only, passing))


# --- small things ----------------------------------------------------------------------------------------------------

RESERVED = frozenset(keyword.kwlist) | {
    "tl", "triton", "pid", "turn", "tiles", "min", "max", "range", "print", "EDGE", "int", "float",
}  # fmt: skip
"""Names that mean something in the text of a kernel."""
SHORT_FLOATS = (DType.BF16, DType.F16)
COORDINATES = {"argmax": "max", "argmin": "min"}  # and the extreme that stands there
LOGICAL = ("and", "or", "not", "eq", "ne", "select")
GROWING = dict.fromkeys(("sum", "prod"), (DType.BOOL, DType.I8, DType.I32))
"""Types of elements that a reduction of a tile would overflow."""


def live_ops(ops: Sequence[Op]) -> list[Op]:
    """The ops without those whose values nobody uses."""
    found = list(ops)
    while True:
        used = {name for op in every_op(found) for name in uses(op)}
        kept = [_pruned(op, used) for op in found if not _is_dead(op, used)]
        if len(list(every_op(kept))) == len(list(every_op(found))):
            return kept
        found = kept


def _is_dead(op: Op, used: set[str]) -> bool:
    if isinstance(op, Scan):
        return used.isdisjoint(op.names)
    return isinstance(op, (Load, Let, Mask, Fold, Keep, Start)) and op.name not in used


def _pruned(op: Op, used: set[str]) -> Op:
    if not isinstance(op, Loop):
        return op
    return dataclasses.replace(op, body=tuple(_pruned(inner, used) for inner in op.body if not _is_dead(inner, used)))


def without_edges(op: Op) -> Op:
    """A loop as one loop, where nothing in it is tested: descriptors read 0 beyond the end of a tensor."""

    def tested(inner: Op) -> bool:
        match inner:
            case Load():
                return bool(inner.edge)
            case Mask():
                return bool(inner.edge)
            case Keep():
                return inner.edge
            case Dot():
                return inner.live is not None and inner.edge
            case _:
                return isinstance(inner, Seen)

    if not isinstance(op, Loop) or any(map(tested, every_op(op.body))):
        return op
    return dataclasses.replace(op, edges=False, inner=None)


def whole_groups(op: Op) -> Op:
    """A loop whose tiles at the edges are so small that they would cut groups, with what has groups read one by one."""

    def read(inner: Op) -> Op:
        if isinstance(inner, Loop):
            return dataclasses.replace(inner, body=tuple(map(read, inner.body)))
        cut = isinstance(inner, Load) and inner.grouped and inner.grouped[0] == rank and edge_tile % inner.grouped[1]
        return dataclasses.replace(inner, grouped=None) if cut and isinstance(inner, Load) else inner

    if not isinstance(op, Loop) or not op.edges or not op.edge_tile:
        return op
    rank, edge_tile = op.rank, op.edge_tile
    return read(op)


def uses(op: Op) -> Iterator[str]:
    """The variables that an op reads, those that it changes aside."""
    exprs: list[Expr] = []
    match op:
        case Load():
            exprs = [*op.index, *op.live, *op.edge]
        case Let():
            exprs = [op.expr]
        case Mask():
            exprs = [*op.live, *op.edge]
        case Keep():
            yield op.mask
        case Dot():
            yield from (op.left, op.right, *((op.live,) if op.live else ()))
        case Fold():
            exprs = [op.expr]
        case Scan():
            yield from op.elements
        case Redo():
            yield from (op.before, op.after, *(tile for _, tile in op.picks))
            exprs = [op.expr]
        case Seen():
            yield op.mask
        case TopKept():
            yield from (op.source, *((op.live,) if op.live else ()))
        case Carry():
            yield from (new for _, new in op.pairs)
        case Start():
            exprs = [op.value]
        case Loop():
            strip = (op.strip.row, op.strip.first, op.strip.length) if op.strip is not None else ()
            exprs = [bound for bound in (op.first, op.stop, *(op.inner or ()), *strip) if bound is not None]
            yield from op.carried
        case Store():
            exprs = [op.expr, *op.index, *op.live, *op.only]
        case _:
            assert_never(op)
    own = op.name if isinstance(op, Let) else ""
    yield from (node.name for expr in exprs for node in walk(expr) if isinstance(node, Local) and node.name != own)


def plus(expr: Expr, number: int) -> Expr:
    """An integer and a number."""
    return Apply("add", (expr, Const(number))) if number else expr


def whole(expr: Expr, tile: int) -> Expr:
    """Where the tile of a coordinate begins."""
    return Apply("mul", (Apply("floordiv", (expr, Const(tile))), Const(tile)))


def _same(a: float | None, b: float) -> bool:
    return a is not None and (a == b or (a != a and b != b))


def _tensors(expr: Expr) -> Iterator[str]:
    return (node.tensor for node in walk(expr) if isinstance(node, Read))


def computed(dtype: DType) -> DType:
    """The type in which values of a type are computed with: short floats in 32 bits."""
    return DType.F32 if dtype in FLOATS else dtype


def wider(*dtypes: DType) -> DType:
    """The common type of operands."""
    for dtype in (DType.F32, DType.I64, DType.I32, DType.I8):
        if dtype in dtypes:
            return dtype
    return DType.BOOL


def reducer_of(stmt: Stmt) -> str:
    """The reducer of a state; of a map that joins a reduction with another value, the one whose operation it is."""
    if isinstance(stmt, TopK):
        return "topk"
    assert isinstance(stmt, Einsum)
    if isinstance(stmt.expr, Reduce):
        return stmt.expr.reducer
    assert isinstance(stmt.expr, Apply)
    op = stmt.expr.op
    return next(row.name for row in REDUCERS.values() if row.op == op)


def identity(reducer: str, dtype: DType) -> float | int | bool:
    """What a reduction does not see."""
    value = REDUCERS[COORDINATES.get(reducer, reducer)].identity
    assert value is not None
    if dtype in FLOATS:
        return float(value)
    if isinstance(value, float) and math.isinf(value):
        return values_of(dtype)[value > 0]
    return value


def is_told(value: float | int | bool) -> bool:
    """Whether a number is told from its neighbours as a float."""
    return math.isinf(value) or abs(value) <= EXACT


def owner(group: Group, name: str) -> Stmt:
    """The statement of a group that defines a tensor."""
    return next(stmt for stmt in group.statements if name in defines(stmt))


def guarded_merge(merge: FoldMerge, group: Group) -> Expr:
    """What an older state counts for; nothing where it has seen nothing, also if its merge would not say so.

    exp(R' - R) is 0 where R' is -inf; (R' - R) * D' is not a number, so R' is asked first. Of several maxima all are
    asked: elements may have been seen of which one of them is -inf. Where all of them are, what was seen may have made
    the state NaN or infinite, which is kept: one that has seen nothing is what it began as.
    """

    def empty(sample: float) -> Callable[[Expr], float]:
        def value(node: Expr) -> float:
            if isinstance(node, Read) and node.tensor.endswith("'"):
                return float(identity(reducer_of(owner(group, node.tensor[:-1])), DType.F32))
            return sample

        return value

    wanted = float(identity(reducer_of(owner(group, merge.target.name)), DType.F32))
    if all(_same(evaluate(merge.expr, empty(sample)), wanted) for sample in SAMPLES):
        return merge.expr
    old = [node for node in walk(merge.expr) if isinstance(node, Read) and node.tensor.endswith("'")]
    maxima = dict.fromkeys(node for node in old if reducer_of(owner(group, node.tensor[:-1])) == "max")
    if not maxima:
        raise unsupported(f"the merge of {merge.target.name} with a state that has seen nothing")
    own = Read(f"{merge.target.name}'", tuple(map(Rank, merge.target.ranks)))
    tests: list[Expr] = [*(Apply("eq", (node, Const(-math.inf))) for node in maxima), Apply("eq", (own, Const(wanted)))]
    return Apply("select", (functools.reduce(lambda a, b: Apply("and", (a, b)), tests), Const(wanted), merge.expr))


def join(reducer: str, old: Expr, new: Expr) -> Expr:
    """Two partial reductions as one."""
    op = REDUCERS[reducer].op
    assert op is not None
    return Apply(op, (old, new))


def merged(*groups: Sequence[Expr]) -> tuple[Expr, ...]:
    """Tests of several sources, each once."""
    return tuple(dict.fromkeys(test for group in groups for test in group))


def either(first: tuple[Expr, ...], second: tuple[Expr, ...]) -> tuple[Expr, ...]:
    """The tests that hold where all of the first or all of the second do."""
    common = tuple(test for test in first if test in second)
    sides = [tuple(test for test in tests if test not in common) for tests in (first, second)]
    if not all(sides):
        return common
    whole = [functools.reduce(lambda a, b: Apply("and", (a, b)), side) for side in sides]
    return (*common, Apply("or", tuple(whole)))


def is_scaled(expr: Expr) -> bool:
    """Whether an expression is a variable times a number: it needs no variable of its own."""
    return (
        isinstance(expr, Apply) and expr.op == "mul"
        and isinstance(expr.args[0], Local) and isinstance(expr.args[1], Const) and float(expr.args[1].value) > 0
    )  # fmt: skip


def split_scale(expr: Expr) -> tuple[Expr, Const]:
    """The variable and the number."""
    assert isinstance(expr, Apply)
    number = expr.args[1]
    assert isinstance(number, Const)
    return expr.args[0], number


def absent_value(op: str, parts: Sequence[Value], presence: Mapping[tuple[Expr, ...], str]) -> float | None:
    """What an operation comes to where any operand is absent; None where that cannot be told.

    Operands that are always present stand for any finite number; of those that can be absent any may be the one. A
    row of which something is present has been seen: `presence` are the flags that say so, by their tests.
    """
    optional = [index for index, part in enumerate(parts) if part.live]
    if not optional:
        return None
    if any(parts[index].absent is None for index in optional):
        return None
    if op in ("eq", "ne") and sum(not isinstance(part.expr, Const) for part in parts) > 1:
        return None  # a number that is present may be the very one
    if op == "select" and not parts[0].live:
        same = parts[1].live == parts[2].live and parts[1].absent == parts[2].absent
        return parts[1].absent if same else None
    found: set[float] = set()
    groups = {parts[index].live for index in optional}
    for gone in _subsets(tuple(groups)):
        here = [live for live in groups if live not in gone]
        if any(live == (Local(flag),) and any(set(tests) <= set(one) for one in here)
               for tests, flag in presence.items() for live in gone):  # fmt: skip
            continue
        for sample in SAMPLES:
            args = [
                part.absent if part.live in gone else _present(part, sample + index) for index, part in enumerate(parts)
            ]
            result = evaluate(
                Apply(op, tuple(Const(float(arg)) for arg in args if arg is not None)), lambda e: math.nan
            )
            found.add(float(result) if result is not None else math.nan)
    only = found.pop() if len(found) == 1 else math.nan
    return None if math.isnan(only) else only


def _present(part: Value, sample: float) -> float:
    return float(part.expr.value) if isinstance(part.expr, Const) else sample


def _subsets(groups: tuple[tuple[Expr, ...], ...]) -> Iterator[tuple[tuple[Expr, ...], ...]]:
    for bits in range(1, 1 << len(groups)):
        yield tuple(group for index, group in enumerate(groups) if bits >> index & 1)
