"""Which coordinates of which tensors a statement touches, over given windows of its ranks: boxes, never too small.

    S[m,n] = Q[m,e] * K[n//4,e]  where n <= m,  m in [0, 64), n in [0, 256)      Q 0:64, 0:E;  K 0:16, 0:E

A coordinate is taken apart by arithmetic on intervals, so linear forms, floors and remainders give the stretch they
reach; one that comes from data reaches everything. Ranks without a window are first narrowed to what the filters that
hold at live points leave of them, those of what is read included (`points.py`): behind a triangle, a slice of rows
reaches the keys up to its last row only. Sharding asks it which shards are enough, splitting which slices meet.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from cascade.bounds import Bounds, loop_bounds
from cascade.inference import Shapes, infer_shapes
from cascade.intervals import ANY, Interval, interval
from cascade.ir import Cascade, Expr, Extent, Fold, Local, Rank, Read, Size, Stmt
from cascade.order import Unit, units
from cascade.passes.points import LivePoints, iterated
from cascade.placed import Window
from cascade.recent import recently
from cascade.walk import defines, expressions, fold_expressions, free_ranks, targets, tensors_read, walk

Box: TypeAlias = tuple[Window, ...]
"""A window for each dimension of a tensor."""


@recently
def units_by_name(cascade: Cascade) -> Mapping[str, Unit]:
    """The statements, recurrences and folds of a cascade, by the first name that each defines, in a valid order."""
    folds = tuple(item for item in cascade.schedule if isinstance(item, Fold))
    return {defines(unit.statements[0])[0]: unit for unit in units(cascade.body, folds)}


@dataclass(eq=False)
class Reach:
    """The boxes that statements of a canonical cascade touch, for known sizes; answers are kept."""

    cascade: Cascade
    sizes: Mapping[str, int]
    bounds: dict[str, dict[str, Bounds]] = field(default_factory=dict)
    known: dict[tuple[str, tuple[tuple[str, Window], ...]], tuple[tuple[str, Box], ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, cascade: Cascade, sizes: Mapping[str, int]) -> Reach:
        """The same one for the very same cascade at the same sizes, with the answers that it has given already."""
        key = tuple(sorted(sizes.items()))
        known = _by_sizes(cascade)
        if key not in known:
            known[key] = cls(cascade, dict(sizes))
        return known[key]

    @cached_property
    def shapes(self) -> Shapes:
        """Extents of ranks, shapes of tensors."""
        return infer_shapes(self.cascade)

    @cached_property
    def units(self) -> Mapping[str, Unit]:
        """What runs as one, by the first name that it defines, in an order in which each finds what it reads."""
        return units_by_name(self.cascade)

    @cached_property
    def filters(self) -> dict[str, tuple[Expr, ...]]:
        """What holds at every live point of a statement, by the first name that it defines."""
        live = LivePoints(self.shapes, self.sizes)
        return {defines(stmt)[0]: live.filters(stmt, iterated(stmt)) for stmt in self.cascade.body}

    @cached_property
    def nodes(self) -> dict[str, tuple[Read, ...]]:
        """The reads of every statement, by the first name that it defines."""
        return {
            defines(stmt)[0]: tuple(
                dict.fromkeys(node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read))
            )
            for stmt in self.cascade.body
        }

    @cached_property
    def full(self) -> dict[str, Window]:
        """All coordinates of every rank variable."""
        return {rank: (0, self.extent(size)) for rank, size in self.shapes.ranks.items()}

    @cached_property
    def iterated(self) -> dict[str, tuple[str, ...]]:
        """The ranks of the iteration space of every statement, by the first name that it defines."""
        return {defines(stmt)[0]: iterated(stmt) for stmt in self.cascade.body}

    @cached_property
    def extents(self) -> dict[str, tuple[int, ...]]:
        """The extents of every tensor."""
        return {name: tuple(map(self.extent, shape)) for name, shape in self.shapes.tensors.items()}

    def extent(self, size: Size) -> int:
        """A size as a number."""
        return size if isinstance(size, int) else self.sizes[size]

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The extents of a tensor."""
        return self.extents[tensor]

    def reads(self, name: str, windows: Mapping[str, Window]) -> tuple[tuple[str, Box], ...]:
        """The boxes that the unit of that name reads of other tensors, where its ranks run over these windows."""
        key = name, tuple(sorted(windows.items()))
        if key not in self.known:
            own = {made for stmt in self.units[name].statements for made in defines(stmt)}
            found = [pair for stmt in self.units[name].statements for pair in self._statement(stmt, windows)]
            if isinstance(fold := self.units[name].group, Fold):
                first = (tensor for tensor in tensors_read(fold_expressions(fold)) if not tensor.endswith("'"))
                found += [(tensor, tuple((0, extent) for extent in self.shape(tensor))) for tensor in first]
            self.known[key] = tuple(dict.fromkeys(pair for pair in found if pair[0] not in own))
        return self.known[key]

    def writes(self, name: str, windows: Mapping[str, Window]) -> tuple[tuple[str, Box], ...]:
        """The boxes that the unit of that name defines."""
        return tuple(
            (target.name, tuple(windows.get(rank, self.full[rank]) for rank in target.ranks))
            for stmt in self.units[name].statements
            for target in targets(stmt)
        )

    def _statement(self, stmt: Stmt, windows: Mapping[str, Window]) -> list[tuple[str, Box]]:
        narrowed = self.narrowed(stmt, windows)
        if any(low >= high for low, high in narrowed.values()):
            return []
        known = _Known(self.sizes, {**self.full, **narrowed})
        return [(node.tensor, self._box(node, known)) for node in self.nodes[defines(stmt)[0]]]

    def narrowed(self, stmt: Stmt, windows: Mapping[str, Window]) -> dict[str, Window]:
        """The windows of a statement's ranks, with what its filters leave of those that had none."""
        name = defines(stmt)[0]
        if name not in self.bounds:
            self.bounds[name] = self._bounds(stmt)
        found = {rank: windows.get(rank, self.full[rank]) for rank in self.iterated[name]}
        for rank, bounds in self.bounds[name].items():
            if rank in windows:
                continue
            low, high = found[rank]
            if bounds.first is not None:
                low = max(low, interval(bounds.first, _Known(self.sizes, found))[0])
            if bounds.stop is not None:
                high = min(high, interval(bounds.stop, _Known(self.sizes, found))[1])
            found[rank] = low, max(low, high)
        return found

    def _bounds(self, stmt: Stmt) -> dict[str, Bounds]:
        """What filters leave of each rank of a statement, whatever the windows of the others are."""
        ranks = self.iterated[defines(stmt)[0]]
        tests = self.filters[defines(stmt)[0]]
        about = {rank: [test for test in tests if rank in free_ranks(test)] for rank in ranks}
        return {
            rank: loop_bounds(own, rank, [other for other in ranks if other != rank])
            for rank, own in about.items()
            if own
        }

    def _box(self, node: Read, known: _Known) -> Box:
        box = []
        for index, extent in zip(node.index, self.shape(node.tensor), strict=True):
            low, last = interval(index, known)
            box.append((max(0, low), max(0, min(extent, last + 1))))
        return tuple(box)


@recently
def _by_sizes(cascade: Cascade) -> dict[tuple[tuple[str, int], ...], Reach]:
    """Where answers about a cascade are kept, by sizes."""
    return {}


@dataclass(frozen=True, slots=True)
class _Known:
    """The values of coordinates within windows, of sizes, and of the ends of tiles; data may be anything."""

    sizes: Mapping[str, int]
    windows: Mapping[str, Window]

    def __call__(self, expr: Expr) -> Interval:
        match expr:
            case Extent():
                return self.sizes[expr.name], self.sizes[expr.name]
            case Rank() if expr.name in self.windows:
                low, high = self.windows[expr.name]
                return low, max(low, high - 1)
            case Local():
                rank, _, end = expr.name.rpartition("_")
                low, high = self.windows[rank]
                value = low if end == "first" else max(low, high - 1)
                return value, value
            case _:
                return ANY


def inside(box: Box, other: Box) -> bool:
    """Whether a box lies in another; one without points does."""
    if any(low >= high for low, high in box):
        return True
    return all(o_low <= low and high <= o_high for (low, high), (o_low, o_high) in zip(box, other, strict=True))


def meet(box: Box, other: Box) -> bool:
    """Whether two boxes have a point in common."""
    return all(max(low, o_low) < min(high, o_high) for (low, high), (o_low, o_high) in zip(box, other, strict=True))


def left_over(box: Box, others: Iterable[Box]) -> list[Box]:
    """What of a box lies in none of the others, as boxes that do not meet."""
    rest = [box] if all(low < high for low, high in box) else []
    for other in others:
        rest = [piece for one in rest for piece in _without(one, other)]
    return rest


def _without(box: Box, other: Box) -> Iterator[Box]:
    """The pieces of a box outside of another: before and behind it along each dimension in turn."""
    if not meet(box, other):
        yield box
        return
    inner = list(box)
    for dim, (low, high) in enumerate(other):
        start, stop = inner[dim]
        if start < low:
            yield (*inner[:dim], (start, low), *inner[dim + 1 :])
        if high < stop:
            yield (*inner[:dim], (high, stop), *inner[dim + 1 :])
        inner[dim] = max(start, low), min(stop, high)
