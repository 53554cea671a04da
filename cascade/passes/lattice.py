"""How many points of a box satisfy linear inequalities: exactly, in time that does not grow with the box.

A test is a tree of `and`, `or`, `not` over comparisons of linear forms. It becomes a union of conjunctions, which is a
sum by inclusion and exclusion, and a conjunction a product over the ranks that are tied together. Where these are two
at most, one with coefficients of one, the points are the sum over the other of `min(upper) - max(lower) + 1`, which is
linear between the places where two bounds cross. Anything else is None: the caller counts in another way or says so.

    n <= m and m - n < 128, 0 <= m, n < 4096        516160, from five stretches of m
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import reduce
from typing import TypeAlias

from cascade.ir import Apply, Const, Expr, Extent, Rank

MAX_UNION = 6
"""Conjunctions of a union: inclusion and exclusion looks at all sets of them."""

OPPOSITE = {"lt": "ge", "ge": "lt", "gt": "le", "le": "gt", "eq": "ne", "ne": "eq"}


@dataclass(frozen=True, slots=True)
class Linear:
    """`sum of factor * rank, plus constant`; as an atom of a test: that this is at least 0."""

    factors: tuple[tuple[str, int], ...]
    constant: int

    def factor(self, rank: str) -> int:
        """What the rank is multiplied by."""
        return dict(self.factors).get(rank, 0)

    def plus(self, other: Linear, times: int = 1) -> Linear:
        """The sum with a multiple of another."""
        found = dict(self.factors)
        for rank, factor in other.factors:
            found[rank] = found.get(rank, 0) + times * factor
        kept = tuple(sorted((rank, factor) for rank, factor in found.items() if factor))
        return Linear(kept, self.constant + times * other.constant)


Conjunction: TypeAlias = frozenset[Linear]
Line: TypeAlias = tuple[int, int]  # slope and height


def linear(expr: Expr, sizes: Mapping[str, int]) -> Linear | None:
    """An integer expression over ranks as a linear form; None where it is none."""
    match expr:
        case Const(value=int(value)) if not isinstance(value, bool):
            return Linear((), value)
        case Extent() if expr.name in sizes:
            return Linear((), sizes[expr.name])
        case Rank():
            return Linear(((expr.name, 1),), 0)
        case Apply(op="neg", args=(arg,)):
            inner = linear(arg, sizes)
            return None if inner is None else Linear((), 0).plus(inner, -1)
        case Apply(op="add" | "sub", args=(one, other)):
            left, right = linear(one, sizes), linear(other, sizes)
            return None if left is None or right is None else left.plus(right, 1 if expr.op == "add" else -1)
        case Apply(op="mul", args=(one, other)):
            left, right = linear(one, sizes), linear(other, sizes)
            if left is None or right is None or (left.factors and right.factors):
                return None
            form, times = (left, right.constant) if left.factors else (right, left.constant)
            return Linear((), 0).plus(form, times)
    return None


def union(test: Expr, sizes: Mapping[str, int], holds: bool = True) -> list[Conjunction] | None:
    """The test, or that it does not hold, as a union of conjunctions; None where it is no test of linear forms."""
    match test:
        case Const(value=bool(value)):
            return [frozenset()] if value == holds else []
        case Apply(op="not", args=(arg,)):
            return union(arg, sizes, not holds)
        case Apply(op="and" | "or", args=(one, other)):
            left, right = union(one, sizes, holds), union(other, sizes, holds)
            if left is None or right is None:
                return None
            if (test.op == "and") != holds:
                return list(dict.fromkeys((*left, *right)))
            return list(dict.fromkeys(a | b for a, b in itertools.product(left, right)))
        case Apply(op=op, args=(one, other)) if op in OPPOSITE:
            return _comparison(op if holds else OPPOSITE[op], linear(one, sizes), linear(other, sizes))
    return None


def _comparison(op: str, left: Linear | None, right: Linear | None) -> list[Conjunction] | None:
    if left is None or right is None:
        return None
    above, below = left.plus(right, -1), right.plus(left, -1)  # left - right >= 0, right - left >= 0
    one = Linear((), -1)
    match op:
        case "ge":
            return [frozenset({above})]
        case "le":
            return [frozenset({below})]
        case "gt":
            return [frozenset({above.plus(one)})]
        case "lt":
            return [frozenset({below.plus(one)})]
        case "eq":
            return [frozenset({above, below})]
        case _:
            return [frozenset({above.plus(one)}), frozenset({below.plus(one)})]


def points(tests: Iterable[Expr], extents: Mapping[str, int], sizes: Mapping[str, int]) -> int | None:
    """At how many coordinates of the ranks of `extents` all tests hold; None where this way of counting does not do."""
    found = _united(tests, sizes)
    return None if found is None else _total(found, extents)


def tiles(
    tests: Iterable[Expr], extents: Mapping[str, int], sizes: Mapping[str, int], tile: Mapping[str, int]
) -> int | None:
    """How many tiles, of so many coordinates of each rank, have points at which tests hold; None as for `points`.

    A tile counts where each linear form is 0 or more somewhere in it, the same point or not: that is exact for one
    form, and for several that bound the same difference of two ranks, as a window does.
    """
    found = _united(tests, sizes)
    if found is None:
        return None
    coarse = [frozenset(form for atom in atoms for form in _coarse(atom, extents, tile)) for atoms in found]
    return _total(coarse, {rank: -(-extent // tile[rank]) for rank, extent in extents.items()})


def _coarse(atom: Linear, extents: Mapping[str, int], tile: Mapping[str, int]) -> Iterator[Linear]:
    """Forms over numbers of tiles that are all 0 or more where a form is so somewhere in the tile.

    Its largest value is at the ends of the tile; the last tile of a rank may end with the rank.
    """
    ends: list[list[Linear]] = []
    for rank, factor in atom.factors:
        size = tile[rank]
        inside = factor * (size - 1) if factor > 0 else 0
        ends.append([Linear(((rank, factor * size),), inside)])
        if factor > 0 and extents[rank] % size:
            ends[-1].append(Linear((), factor * (extents[rank] - 1)))
    for chosen in itertools.product(*ends):
        form = reduce(Linear.plus, chosen, Linear((), atom.constant))
        scale = math.gcd(*(factor for _, factor in form.factors)) or 1
        yield Linear(tuple((rank, factor // scale) for rank, factor in form.factors), form.constant // scale)


def _united(tests: Iterable[Expr], sizes: Mapping[str, int]) -> list[Conjunction] | None:
    """Tests as one union of few conjunctions; None where they are none."""
    found: list[Conjunction] = [frozenset()]
    for test in tests:
        part = union(test, sizes)
        if part is None:
            return None
        found = list(dict.fromkeys(a | b for a, b in itertools.product(found, part)))
        if len(found) > MAX_UNION:
            return None
    return found


def _total(found: Sequence[Conjunction], extents: Mapping[str, int]) -> int | None:
    """The points of a box that are in one of some conjunctions."""
    total = 0
    for count in range(1, len(found) + 1):
        for chosen in itertools.combinations(found, count):
            part_points = _conjunction(reduce(frozenset.union, chosen), extents)
            if part_points is None:
                return None
            total += part_points if count % 2 else -part_points
    return total


def _conjunction(atoms: Conjunction, extents: Mapping[str, int]) -> int | None:
    """The points of a box at which all forms are at least 0: a product over sets of ranks that are tied together."""
    if any(not atom.factors and atom.constant < 0 for atom in atoms):
        return 0
    tied = [atom for atom in atoms if atom.factors]
    result, left = 1, list(extents)
    while left:
        group = {left[0]}
        while True:
            more = {rank for atom in tied for rank, _ in atom.factors if group & {name for name, _ in atom.factors}}
            if more <= group:
                break
            group |= more
        left = [rank for rank in left if rank not in group]
        inside = [atom for atom in tied if group & {name for name, _ in atom.factors}]
        found = _tied(sorted(group), inside, extents)
        if found is None:
            return None
        result *= found
    return result


def _tied(ranks: Sequence[str], atoms: Sequence[Linear], extents: Mapping[str, int]) -> int | None:
    """The points of one set of ranks that are tied together."""
    if len(ranks) == 1:
        low, high = _interval(atoms, ranks[0], 0, extents[ranks[0]] - 1)
        return max(0, high - low + 1)
    if len(ranks) > 2:
        return None
    for inner, outer in (ranks, reversed(ranks)):
        if all(abs(atom.factor(inner)) <= 1 for atom in atoms):
            return _swept(inner, outer, atoms, extents)
    return None


def _interval(atoms: Iterable[Linear], rank: str, low: int, high: int) -> tuple[int, int]:
    """Where forms over one rank alone are at least 0."""
    for atom in atoms:
        factor = atom.factor(rank)
        if factor > 0:
            low = max(low, -(atom.constant // factor))
        else:
            high = min(high, atom.constant // -factor)
    return low, high


def _swept(inner: str, outer: str, atoms: Sequence[Linear], extents: Mapping[str, int]) -> int:
    """The points of two ranks: for each coordinate of the outer one, those between the bounds of the inner one."""
    alone = [atom for atom in atoms if not atom.factor(inner)]
    low, high = _interval(alone, outer, 0, extents[outer] - 1)
    lower: list[Line] = [(0, 0)]
    upper: list[Line] = [(0, extents[inner] - 1)]
    for atom in atoms:
        if atom.factor(inner) > 0:  # inner + a * outer + c >= 0
            lower.append((-atom.factor(outer), -atom.constant))
        elif atom.factor(inner) < 0:
            upper.append((atom.factor(outer), atom.constant))
    if low > high:
        return 0

    def inside(at: int) -> int:
        return min(a * at + b for a, b in upper) - max(a * at + b for a, b in lower) + 1

    total = 0
    cuts = sorted({low, high + 1, *(cut for cut in _crossings(lower, upper) if low < cut <= high)})
    for start, end in itertools.pairwise(cuts):
        first, last = inside(start), inside(end - 1)
        if first > 0 or last > 0:  # linear between cuts, and of one sign
            total += (first + last) * (end - start) // 2
    return total


def _crossings(lower: Sequence[Line], upper: Sequence[Line]) -> set[int]:
    """The first whole coordinates behind which another bound is the tightest, or bounds begin or cease to meet."""
    lines = [*lower, *upper, *((a, b + 1) for a, b in upper)]  # a count is 0 where upper + 1 = lower
    found: set[int] = set()
    for (a, b), (c, d) in itertools.combinations(lines, 2):
        if a != c:
            cross = Fraction(d - b, a - c)
            found.update((math.floor(cross), math.floor(cross) + 1, math.ceil(cross)))
    return found
