"""At how many points a statement is live: filters over ranks counted exactly, alone and through what is read.

A point is live where the filter of the statement holds, and those of what it reads: an operand that is absent makes the
result absent. Linear filters are counted in closed form (`lattice.py`), others by enumerating the ranks they mention,
where those have at most `MAX_POINTS` points. The rest, and filters over data, are taken to hold everywhere; `assumed`
names the statements where that was done.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cascade.inference import Shapes
from cascade.ir import Apply, Const, Einsum, Expr, Extent, Init, Rank, Read, Reduce, Stmt, TopK
from cascade.passes import lattice
from cascade.passes.amounts import Amount, product
from cascade.walk import children, defines, free_ranks, substitute, targets, walk

MAX_POINTS = 1_000_000
"""Points of the ranks of a filter up to which they are enumerated."""

Point: TypeAlias = Sequence[int]


def body_of(stmt: Stmt) -> Expr:
    """What a statement of a canonical cascade computes at one point."""
    body = stmt.body if isinstance(stmt, TopK) else stmt.expr if isinstance(stmt, Einsum) else None
    assert body is not None, "a canonical cascade has no calls"
    return body


def iterated(stmt: Stmt) -> tuple[str, ...]:
    """The ranks of the iteration space of a statement, those of its left side first."""
    body = body_of(stmt)
    if isinstance(stmt, TopK):
        return tuple(dict.fromkeys((*targets(stmt)[0].ranks, *free_ranks(body), stmt.rank)))
    inner = body.ranks if isinstance(body, Reduce) else ()
    return tuple(dict.fromkeys((*targets(stmt)[0].ranks, *inner)))


@dataclass(slots=True, eq=False)
class LivePoints:
    """The live points of statements, asked in dependency order: where each tensor is present follows from its reads."""

    shapes: Shapes
    sizes: Mapping[str, int]
    left: dict[str, tuple[str, ...]] = field(default_factory=dict)
    live: dict[str, tuple[Expr, ...]] = field(default_factory=dict)  # what holds where the tensor is present
    counted: dict[tuple[Expr, ...], int | None] = field(default_factory=dict)
    assumed: dict[str, None] = field(default_factory=dict)

    def of(self, stmt: Stmt) -> Amount:
        """The live points of one statement."""
        ranks = iterated(stmt)
        return self.points(ranks, self.filters(stmt, ranks), defines(stmt)[0])

    def of_init(self, stmt: Einsum, init: Init) -> Amount:
        """The points of a first value: the other ranks of the recurrence."""
        others = [self.shapes.ranks[rank] for rank in stmt.target.ranks if rank != init.rank]
        return product(others, self.sizes)

    def filters(self, stmt: Stmt, ranks: tuple[str, ...]) -> tuple[Expr, ...]:
        """What holds at every live point of a statement; what its output keeps of that is known from here on."""
        where = stmt.where if isinstance(stmt, (Einsum, TopK)) else None
        found = dict.fromkeys((*(() if where is None else (where,)), *self._present(body_of(stmt))))
        filters = tuple(test for test in found if set(free_ranks(test)) <= set(ranks))
        for target in targets(stmt):
            self.left[target.name] = target.ranks
            recurs = isinstance(stmt, Einsum) and stmt.inits
            kept = () if recurs else (test for test in filters if set(free_ranks(test)) <= set(target.ranks))
            self.live[target.name] = tuple(kept)
        return filters

    def _present(self, body: Expr) -> Iterator[Expr]:
        """What holds where every operand is present, as far as their filters are known."""
        stack = [body]
        while stack:
            node = stack.pop()
            if isinstance(node, Read) and all(isinstance(index, Rank) for index in node.index):
                places = dict(zip(self.left.get(node.tensor, ()), node.index, strict=False))
                yield from (substitute(test, places) for test in self.live.get(node.tensor, ()))
            elif not isinstance(node, Read) and not (isinstance(node, Apply) and node.op == "default"):
                stack.extend(reversed(children(node)))

    def points(self, ranks: tuple[str, ...], filters: tuple[Expr, ...], name: str) -> Amount:
        """The live points of an iteration space: filters over common ranks together, the rest a product."""
        tests = tuple(test for test in filters if is_countable(test))
        if len(tests) < len(filters):
            self.assumed[name] = None
        concerned = tuple(rank for rank in ranks if any(rank in free_ranks(test) for test in tests))
        factor = self._count(concerned, tests) if concerned else 1
        if factor is None:
            self.assumed[name] = None
            concerned, factor = (), 1
        return product((self.shapes.ranks[rank] for rank in ranks if rank not in concerned), self.sizes).times(factor)

    def _count(self, ranks: tuple[str, ...], tests: tuple[Expr, ...]) -> int | None:
        """At how many coordinates of the ranks all tests hold; None where sizes are unknown or too large."""
        needed = {node.name for test in tests for node in walk(test) if isinstance(node, Extent)}
        space = product((self.shapes.ranks[rank] for rank in ranks), self.sizes).value
        if space is None or not needed <= self.sizes.keys():
            return None
        if tests not in self.counted:
            self.counted[tests] = self._counted(ranks, tests)
        return self.counted[tests]

    def _counted(self, ranks: tuple[str, ...], tests: tuple[Expr, ...]) -> int | None:
        extents = {rank: self._extent(rank) for rank in ranks}
        found = lattice.points(tests, extents, self.sizes)
        if found is not None or math.prod(extents.values()) > MAX_POINTS:
            return found
        compiled = [closure(test, ranks, self.sizes) for test in tests]
        points = itertools.product(*map(range, extents.values()))
        try:
            return sum(all(test(point) for test in compiled) for point in points)
        except ZeroDivisionError:  # such a cascade has no meaning
            return None

    def _extent(self, rank: str) -> int:
        size = self.shapes.ranks[rank]
        return size if isinstance(size, int) else self.sizes[size]


# --- filters at given coordinates ------------------------------------------------------------------------------------

_FUNCTIONS: dict[str, Callable[..., float]] = {
    "or": lambda a, b: bool(a or b), "and": lambda a, b: bool(a and b), "not": operator.not_,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "floordiv": operator.floordiv, "mod": operator.mod, "abs": abs, "min": min, "max": max, "floor": math.floor,
    "select": lambda test, yes, no: yes if test else no,
}  # fmt: skip
"""Operations of filters that are counted."""


def is_countable(test: Expr) -> bool:
    """Whether a filter depends on coordinates and extents alone, by operations that are known here."""
    return all(
        isinstance(node, (Const, Extent, Rank)) or (isinstance(node, Apply) and node.op in _FUNCTIONS)
        for node in walk(test)
    )


def closure(test: Expr, ranks: Sequence[str], sizes: Mapping[str, int]) -> Callable[[Point], float]:
    """A filter over ranks as a function of their coordinates."""
    match test:
        case Const():
            value = test.value
            return lambda point: value
        case Extent():
            extent = sizes[test.name]
            return lambda point: extent
        case Rank():
            return operator.itemgetter(ranks.index(test.name))
        case Apply() if test.op in _FUNCTIONS:
            function, args = _FUNCTIONS[test.op], [closure(arg, ranks, sizes) for arg in test.args]
            if len(args) == 2:
                one, other = args
                return lambda point: function(one(point), other(point))
            return lambda point: function(*[arg(point) for arg in args])
        case _:
            raise AssertionError("a filter that cannot be counted")
