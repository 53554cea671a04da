"""The kernels of a group for a file of their own: which, in which order, and what of the sizes is compiled in.

    O[b,h,f] = sum[n] P[b,h,n] * V[b,h,n,f]   where doc[b] == doc_of[n], few b and h
    -->  a kernel that finds the bounds of the loop, one by parts of n, one that merges the parts

Kernels are planned for some sizes, as those that hold for all: no tile counts on an extent. Then they are planned for
others, with the same tiles; a size is compiled in where a kernel would have to be another one.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cascade.backends.triton.emit import Source, emit
from cascade.backends.triton.index import Index
from cascade.backends.triton.lower import unsupported
from cascade.backends.triton.machine import Machine
from cascade.backends.triton.partition import ROW_LIMIT, Group, Rest, power_of_two
from cascade.backends.triton.plan import (
    Axis, Dot, Keep, Kernel, Load, Loop, Mask, Role, Seen, Store, Tensor, every_op,
)  # fmt: skip
from cascade.backends.triton.planner import Planner, Tiling
from cascade.backends.triton.tune import candidates, ranked
from cascade.errors import UnsupportedError
from cascade.ir import Apply, Const, Expr, Rank, Read, Size
from cascade.text import render
from cascade.walk import expressions, walk

ALIGNED = 16  # elements: another size by as much leaves strides multiples of 16 bytes where they were
LARGER = 2048  # coordinates more than planned, another size


@dataclass(slots=True, eq=False)
class Alone(Planner):
    """A planner in which no tile counts on an extent; `lies` fixes how the ranks of a group lie, whatever the sizes."""

    lies: dict[tuple[str, ...], dict[str, Role]] = field(default_factory=dict)
    indexed: bool = True  # whether bounds that depend on data get kernels of their own

    def stays(self, symbol: str) -> bool:
        return True  # files are for what coordinates are divided by, as for what tiles have whole

    def roles(self, group: Group) -> dict[str, Role]:
        known = self.lies.get(group.names)
        return Planner.roles(self, group) if known is None else dict(known)

    def index(self, group: Group, axes: Sequence[Axis], groups: Sequence[Group | Rest]) -> Index | None:
        return Planner.index(self, group, axes, groups) if self.indexed else None


Lives: TypeAlias = Mapping[str, tuple[tuple[str, ...], tuple[Expr, ...]]]
At: TypeAlias = Callable[[Mapping[str, int]], Alone]
"""The planner of the same cascade where some shape symbols have other values."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel: its plan, its text, what it writes, and the values of its shape symbols at the planned sizes."""

    kernel: Kernel
    source: Source
    made: tuple[Tensor, ...]
    extents: Mapping[str, int]

    @property
    def wholes(self) -> dict[str, Axis]:
        """The constants that are tiles with all coordinates of a rank, as many as a call has; no box has that side."""
        ops = (op for op in every_op(self.kernel.ops) if isinstance(op, Load | Store) and op.box is not None)
        boxed = {part.name for op in ops for part in op.index if isinstance(part, Rank)}
        return {f"BLOCK_{axis.rank.upper()}": axis for axis in held(self.kernel) if axis.rank not in boxed}

    def at(self, planned: Launch) -> Launch:
        """This kernel at the sizes of another plan of it."""
        tiles = {axis.rank: axis.tile for axis in planned.kernel.axes if axis.role is Role.WHOLE}
        axes = tuple(dataclasses.replace(a, tile=tiles.get(a.rank, a.tile)) for a in self.kernel.axes)
        kernel = dataclasses.replace(self.kernel, axes=axes)
        return Launch(kernel, emit(kernel), self.made, planned.extents)


def held(kernel: Kernel) -> list[Axis]:
    """The axes of which a tile has all coordinates, their extent being an argument."""
    return [axis for axis in kernel.axes if axis.role is Role.WHOLE and isinstance(axis.extent, str)]


@dataclass(frozen=True, slots=True)
class Tie:
    """An index `rank // by` that stays inside a dimension: the extent of the rank is at most `by` times that."""

    extent: str
    by: int
    dimension: str


@dataclass(frozen=True, slots=True)
class Unit:
    """A group as kernels that run in order, for sizes of which the `ties` hold.

    `counted` has sizes that only the kernels know: of how many coordinates of which extent they count the tiles, or,
    with a tile of 0, a number. `static` are the symbols that are numbers in the kernels; `longest` says, per symbol, up
    to which extent a program can hold all coordinates at once where it does so.
    """

    name: str
    group: Group
    launches: tuple[Launch, ...]
    ties: tuple[Tie, ...]
    counted: Mapping[str, tuple[Size, int]]
    static: Mapping[str, int]
    longest: Mapping[str, int]


@dataclass(slots=True, eq=False)
class Maker:
    """Plans the kernels of a group: at first freely, later for other sizes with the arrangement that was found."""

    machine: Machine
    past: Mapping[str, int] = field(default_factory=dict)  # how many of the model's tiles are passed over, by label
    lies: dict[str, dict[tuple[str, ...], dict[str, Role]]] = field(default_factory=dict)  # by cascade, "" the group's
    beside: dict[str, tuple[str, tuple[Group | Rest, ...]]] = field(default_factory=dict)  # by label: text, groups
    tilings: dict[str, Tiling] = field(default_factory=dict)
    counted: dict[str, tuple[Size, int]] = field(default_factory=dict)
    numbers: dict[str, int] = field(default_factory=dict)
    longest: dict[str, int] = field(default_factory=dict)

    def launches(
        self, planner: Alone, label: str, group: Group, groups: Sequence[Group | Rest], shared: bool
    ) -> Iterator[Launch]:
        """The kernels of a group: what finds the bounds of its loops, the kernel itself, what merges its parts.

        Raises `UnsupportedError` where there is no kernel for one of them.
        """
        tiling = self.tiling(planner, label, group, groups, shared)
        merger, extents = None, planner.extents
        if tiling.parts > 1:
            kernel, merger, _ = planner.split(label, group, groups, tiling)
            made, extents = tuple(item.tensor for item in kernel.partial), merger.extents
            self.counted |= {symbol: (tiling.parts, 0) for symbol in extents if symbol not in planner.extents}
        else:
            kernel = planner.kernel(label, group, groups, tiling)
            made = tuple(planner.written(name, groups) for name in planner.stored(group, groups))
            extents = {**extents, **planner.padded(kernel.rows)}
        if kernel.index is not None:
            extents = {**extents, **kernel.index.sizes}
            self.counted |= kernel.index.counts
            moving = planner.moving | set(kernel.index.sizes)
            yield from self.others(planner.indexer(kernel.index, groups), f"{label}_bounds", moving)
        yield Launch(kernel, emit(kernel), made, extents)
        if merger is not None:
            yield from self.others(merger, f"{label}_merge", planner.moving)

    def others(self, planner: Planner, label: str, moving: frozenset[str]) -> Iterator[Launch]:
        """The kernels of a cascade that belongs to another kernel."""
        cascade, text = planner.cascade, render(planner.cascade)
        lies = self.lies.setdefault(label, {})
        # without descriptors: strides change with the sizes
        inner = Alone(cascade, planner.extents, planner.layouts, False, moving, joined=planner.joined, lies=lies)
        known, groups = self.beside.setdefault(label, (text, inner.groups()))
        for number, group in enumerate(groups):
            if isinstance(group, Rest) or text != known:
                raise unsupported(group.reason if isinstance(group, Rest) else "another cascade at these sizes")
            name = label if len(groups) == 1 else f"{label}_{number}"
            yield from self.launches(inner, name, group, groups, shared=False)

    def tiling(self, planner: Alone, label: str, group: Group, groups: Sequence[Group | Rest], shared: bool) -> Tiling:
        """The tiles that the model prefers; at other sizes the same, but of ranks that a tile has whole."""
        if label not in self.tilings:
            lives, hidden = dict(planner.lives), set(planner.hidden)  # that the candidates tell
            considered = candidates(planner, group)
            if not shared:
                considered = tuple(dict.fromkeys(dataclasses.replace(tiling, parts=1) for tiling in considered))
            considered = tuple(tiling for tiling in considered if not tiling.even)  # as many parts as a batch has rows
            found = ranked(planner, label, group, groups, self.machine, considered)
            own = dataclasses.replace(planner.default_tiling(group), parts=1)
            planner.lives, planner.hidden = lives, hidden
            place = min(self.past.get(label, 0), len(found) - 1)
            self.tilings[label] = found[place][0] if found else own
            planner.lies[group.names] = planner.roles(group)
        tiling = self.tilings[label]
        self.numbers |= planner.static(group).numbers
        if planner.products(group):
            return tiling
        whole = [rank for rank, role in planner.roles(group).items() if role is Role.WHOLE]
        tiles = dict(tiling.tiles) | {rank: power_of_two(planner.ranks[rank]) for rank in whole}
        room = max(1, ROW_LIMIT // planner.held(group, tiles))
        self.longest |= {size: tiles[rank] * room for rank in whole if isinstance(size := planner.sizes[rank], str)}
        return dataclasses.replace(tiling, tiles=tuple(tiles.items()))


def unit(
    name: str,
    planner: Alone,
    group: Group,
    groups: Sequence[Group | Rest],
    machine: Machine,
    at: At,
    past: Mapping[str, int],
) -> Unit:
    """The kernels of a group; `at` gives the planner for other sizes. `UnsupportedError` where there are none.

    Where what finds bounds or what merges is no kernel, every tile is tested, or the stream not shared. `past` says, by
    the name of a kernel, how many of the tiles that the model prefers are passed over.
    """
    before = dict(planner.lives), set(planner.hidden)
    for indexed, shared in ((True, True), (False, True), (False, False)):
        maker = Maker(machine, past)
        adopt(planner, maker, indexed, before)
        try:
            launches = tuple(maker.launches(planner, name, group, groups, shared))
        except UnsupportedError as error:
            failure = error
            continue

        def other(
            sizes: Mapping[str, int], maker: Maker = maker, indexed: bool = indexed, shared: bool = shared
        ) -> tuple[Launch, ...] | None:
            changed = at(sizes)
            adopt(changed, maker, indexed, before)
            try:
                return tuple(maker.launches(changed, name, group, groups, shared))
            except UnsupportedError:
                return None

        ties = tied(planner, group)
        counted, longest = dict(maker.counted), dict(maker.longest)
        launches, static = general(planner.extents, maker.numbers, launches, ties, other)
        for one in launches:
            fixed = [axis for axis in held(one.kernel) if axis not in one.wholes.values()]
            longest |= {str(axis.extent): axis.tile for axis in fixed}
        kept = tuple(tie for tie in ties if not {tie.extent, tie.dimension} <= set(static))
        return Unit(name, group, launches, kept, counted, static, longest)
    raise failure


def adopt(planner: Alone, maker: Maker, indexed: bool, before: tuple[Lives, set[str]]) -> None:
    """Has a planner plan for a maker, knowing of absent coordinates what was known before the group."""
    planner.lies, planner.indexed = maker.lies.setdefault("", {}), indexed
    planner.lives, planner.hidden = dict(before[0]), set(before[1])


# --- what of the sizes is compiled in --------------------------------------------------------------------------------


def general(
    extents: Mapping[str, int],
    numbers: Mapping[str, int],
    planned: tuple[Launch, ...],
    ties: Sequence[Tie],
    other: Callable[[Mapping[str, int]], tuple[Launch, ...] | None],
) -> tuple[tuple[Launch, ...], dict[str, int]]:
    """Kernels that hold for as many sizes as one plan can, and the sizes for which alone they do.

    What a plan proves of its sizes it leaves out of the kernel: a test that always holds is none. Where a plan for
    other sizes has more tests, and all of ours, and moves the same tiles by descriptor, it takes the place of ours;
    where it has others, the size is part of the kernel.
    """
    static = {symbol: size for symbol, size in numbers.items() if symbol in extents}
    for tensor in (tensor for one in planned for tensor in one.kernel.tensors):
        for size, stride in zip(tensor.shape, tensor.strides, strict=True):
            if isinstance(size, str) and size in extents and (stride == 0 or extents[size] == 1):
                static[size] = 1  # a stride that no address has: the dimension has one coordinate
    kept, tried = planned, set[str]()
    while fresh := [symbol for symbol in extents if symbol not in static and symbol not in tried]:
        symbol = fresh[0]
        tried.add(symbol)
        for size in others(extents[symbol]):
            found = other(together({symbol: size}, extents, ties))
            if found is not None and covers(kept, found):
                continue
            if found is None or not covers(found, kept) or boxes(found) != boxes(kept):
                static[symbol] = extents[symbol]
                break
            kept, tried = found, {symbol}  # more general: what was tried is tried again
    free = {symbol: extents[symbol] + LARGER for symbol in extents if symbol not in static}
    free = together(free, extents, ties)
    if free and ((found := other(free)) is None or not covers(kept, found)):
        kept, static = planned, static | {symbol: extents[symbol] for symbol in free}
    return tuple(one.at(ours) for one, ours in zip(kept, planned, strict=True)), static


def tied(planner: Planner, group: Group) -> tuple[Tie, ...]:
    """The quotients of ranks that index a dimension and lie inside it at the planned sizes."""
    found: dict[Tie, None] = {}
    reads = (n for s in group.plain for e in expressions(s) for n in walk(e) if isinstance(n, Read))
    for read in reads:
        for part, dimension in zip(read.index, planner.shapes[read.tensor], strict=True):
            match part:
                case Apply(op="floordiv", args=(Rank(name=rank), Const(value=int(by)))) if by > 0:
                    extent = planner.sizes[rank]
                    inside = planner.ranks[rank] <= by * planner.number(dimension)
                    if inside and isinstance(extent, str) and isinstance(dimension, str):
                        found.setdefault(Tie(extent, by, dimension))
                case _:
                    pass
    return tuple(found)


def together(changed: Mapping[str, int], extents: Mapping[str, int], ties: Sequence[Tie]) -> dict[str, int]:
    """Changed sizes with others changed along, so that the ties hold."""
    found = dict(changed)
    for tie in ties:
        extent, most = (found.get(symbol, extents[symbol]) for symbol in (tie.extent, tie.dimension))
        if extent > tie.by * most and tie.dimension not in changed:
            found[tie.dimension] = -(-extent // tie.by)
        elif extent > tie.by * most:
            found[tie.extent] = tie.by * most
    return found


def others(size: int) -> tuple[int, ...]:
    """Sizes beside a planned one that show what was proved of it; strides keep the multiples that they have."""
    if size <= 2 * ALIGNED:
        return (size + ALIGNED, size + LARGER, max(size // 2, 1))
    return (size + ALIGNED, size + LARGER, size % ALIGNED + ALIGNED)


def covers(ours: Sequence[Launch], theirs: Sequence[Launch]) -> bool:
    """Whether our kernels hold for the sizes of theirs: they assume no more, and have every test that is needed there.

    Bounds of loops are never too narrow for the tests that they are made of, so tests are what counts.
    """
    if len(ours) != len(theirs):
        return False
    for one, other in zip(ours, theirs, strict=True):
        if one.source.text == other.source.text and places(one) == places(other):
            continue
        a, b = one.kernel, other.kernel
        same = a.statements == b.statements and places(one) == places(other) and one.source.grid == other.source.grid
        if not same or not assumes_no_more(a, b) or needs(b) - needs(a):
            return False
    return True


def places(launch: Launch) -> list[object]:
    """The tensors that a kernel writes, without what is known of their strides."""
    return [(tensor.name, tensor.shape, tensor.dtype) for tensor in launch.made]


def assumes_no_more(ours: Kernel, theirs: Kernel) -> bool:
    """Whether what our kernel counts on of extents and strides holds where theirs was planned."""
    for a, b in zip(ours.axes, theirs.axes, strict=True):
        tiles = a.role is Role.WHOLE or a.tile == b.tile
        if (a.rank, a.role, a.extent) != (b.rank, b.role, b.extent) or not tiles or a.exact > b.exact:
            return False
    known = {tensor.name: tensor for tensor in theirs.tensors}
    for tensor in ours.tensors:
        for mine, other in zip(tensor.strides, known[tensor.name].strides, strict=True):
            if mine is not None and other not in (mine, 0):
                return False
    return True


def needs(kernel: Kernel) -> Counter[tuple[object, ...]]:
    """What a kernel does because something may be absent: its tests, and what stands for what they leave out."""
    found: Counter[tuple[object, ...]] = Counter()
    for op in every_op(kernel.ops):
        match op:
            case Load(live=live, edge=edge):
                found.update(("load", op.tensor, test) for test in (*live, *edge))
            case Store(live=live):
                found.update(("store", op.tensor, test) for test in live)
            case Mask(live=live, edge=edge):
                found.update(("mask", op.axes, test) for test in (*live, *edge))
            case Keep():
                found["keep", op.axes, op.fill] += 1
            case Seen():
                found["seen", op.axes, op.over] += 1
            case Dot() if op.live is not None:
                found["dot", op.axes] += 1
            case Loop(edges=True):
                found["edges", op.rank] += 1
            case _:
                pass
    return found + (Counter() if kernel.careful is None else needs(kernel.careful))


def boxes(launches: Sequence[Launch]) -> list[tuple[str, tuple[int, ...]]]:
    """Which tiles are moved by descriptor; what is tested always is loaded by pointers."""
    ops = (op for one in launches for op in every_op(one.kernel.ops))
    moves = (op for op in ops if isinstance(op, Store) or (isinstance(op, Load) and not op.live))
    return sorted((op.tensor, op.box) for op in moves if op.box is not None)
