"""What a cascade moves and computes: bytes with and without fusion, operations per point of each iteration space.

    S[m,n] = sum[e] Q[m,e] * K[n,e]      2*E*M*N operations, reads Q and K, writes S
    P[m,n] = exp(S[m,n])                 M*N transcendental ones, reads S, writes P

Unfused, every statement reads each tensor that it mentions once and writes what it defines. Fused, the statements of a
group run as one: a tensor that only the group needs is not moved at all, one that it needs from outside is read once,
one that it makes for others is written once. A recurrence has its own earlier coordinates at hand. Tensors count whole,
also where they are read at a few coordinates.

Operations are those of the expression, for every live point: arithmetic, and one for each point that is folded;
comparisons, choices, casts, filters, constants and the arithmetic of indices are free. Transcendental operations are
counted apart.

Filters count. A point is live where the filter of the statement holds, and those of what it reads: an operand that is
absent makes the result absent. Filters over ranks alone are counted exactly, by enumerating the ranks they mention,
where those have at most `MAX_POINTS` points; others, and those over data, are taken to hold everywhere, and `assumed`
names the statements where that was done. Without all sizes the amounts are polynomials in the symbols, as text.

Requires: canonical. It counts tensors that are moved once; what a footprint larger than the memory at hand spills is a
question of the mapping.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cascade.inference import Shapes, fold, infer_dtypes, infer_shapes
from cascade.ir import (
    Apply, Cascade, Const, DType, Einsum, Expr, Extent, Fold, Fuse, Init, Rank, Read, Reduce, Size, Stmt, TopK,
)  # fmt: skip
from cascade.walk import children, defines, free_ranks, reads, substitute, targets, walk

MAX_POINTS = 1_000_000
"""Points of the ranks of a filter up to which it is counted exactly."""

TRANSCENDENTAL = frozenset(
    ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "erf", "pow")
)
FREE = frozenset(("default", "or", "and", "not", "eq", "ne", "lt", "le", "gt", "ge", "select"))
"""Comparisons and choices: no arithmetic."""

BYTES = {
    DType.BF16: 2, DType.F16: 2, DType.F32: 4, DType.F64: 8, DType.F8E4M3: 1, DType.F8E5M2: 1, DType.I8: 1,
    DType.I32: 4, DType.I64: 8, DType.BOOL: 1,
}  # fmt: skip


# --- amounts ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Amount:
    """A polynomial in shape symbols: for each product of symbols, in order, its factor."""

    terms: tuple[tuple[tuple[str, ...], int], ...] = ()

    @property
    def value(self) -> int | None:
        """The number; None while a symbol is unknown."""
        return sum(factor for _, factor in self.terms) if all(not symbols for symbols, _ in self.terms) else None

    def __add__(self, other: Amount) -> Amount:
        total: dict[tuple[str, ...], int] = {}
        for symbols, factor in (*self.terms, *other.terms):
            total[symbols] = total.get(symbols, 0) + factor
        return Amount(tuple(sorted((symbols, factor) for symbols, factor in total.items() if factor)))

    def times(self, factor: int) -> Amount:
        """The amount, so many times."""
        return Amount(tuple((symbols, old * factor) for symbols, old in self.terms if factor))

    def __str__(self) -> str:
        """`2*E*M*N + M*N`, `0` for nothing."""
        words = [
            "*".join((*((str(factor),) if factor != 1 or not symbols else ()), *symbols))
            for symbols, factor in self.terms
        ]
        return " + ".join(words) or "0"


NOTHING = Amount()


def product(extents: Iterable[Size], sizes: Mapping[str, int]) -> Amount:
    """The product of extents, as a number as far as the sizes tell."""
    known, symbols = 1, []
    for extent in extents:
        size = extent if isinstance(extent, int) else sizes.get(extent)
        if size is None:
            symbols.append(str(extent))
        else:
            known *= size
    return Amount(((tuple(sorted(symbols)), known),) if known else ())


def total(amounts: Iterable[Amount]) -> Amount:
    """The sum of amounts."""
    return sum(amounts, NOTHING)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes moved by every statement on its own and by the groups, operations, and where filters were assumed to hold.

    `statements` has the arithmetic and the transcendental operations of each statement, by its first name.
    """

    unfused: Amount
    fused: Amount
    flops: Amount
    transcendental: Amount
    statements: Mapping[str, tuple[Amount, Amount]]
    assumed: tuple[str, ...]


def traffic(
    cascade: Cascade,
    sizes: Mapping[str, int] | None = None,
    groups: Sequence[Collection[str]] | None = None,
    dtype: DType = DType.F32,
) -> Traffic:
    """What the cascade moves and computes; parameters without a type have `dtype`, the groups are the schedule's."""
    given = sizes or {}
    shapes = infer_shapes(cascade)
    types = infer_dtypes(cascade, {param.name: dtype for param in cascade.params})
    moved = {name: product(shape, given).times(BYTES[types[name]]) for name, shape in shapes.tensors.items()}
    work = _Work(shapes, given)
    statements = {defines(stmt)[0]: work.statement(stmt) for stmt in cascade.body}
    return Traffic(
        _moved(cascade, (), moved),
        _moved(cascade, scheduled_groups(cascade) if groups is None else groups, moved),
        total(flops for flops, _ in statements.values()),
        total(slow for _, slow in statements.values()),
        statements,
        tuple(work.assumed),
    )


# --- bytes -----------------------------------------------------------------------------------------------------------


def scheduled_groups(cascade: Cascade) -> tuple[frozenset[str], ...]:
    """The outermost groups of the schedule: statements that one `fuse` or one `fold` names together."""
    found: list[frozenset[str]] = []
    for directive in cascade.schedule:
        if isinstance(directive, Fuse):
            found.append(frozenset(directive.statements))
        elif isinstance(directive, Fold):
            found.append(frozenset((*directive.update, *directive.finalize)))
    return tuple(group for group in dict.fromkeys(found) if not any(group < other for other in found))


def _moved(cascade: Cascade, groups: Sequence[Collection[str]], moved: Mapping[str, Amount]) -> Amount:
    """The bytes that cross between memory and the groups, a statement outside of all being a group of its own."""
    home: dict[str, int] = {}
    members: list[list[Stmt]] = [[] for _ in groups]
    for stmt in cascade.body:
        at = next((i for i, group in enumerate(groups) if not set(group).isdisjoint(defines(stmt))), len(members))
        if at == len(members):
            members.append([])
        members[at].append(stmt)
        home.update(dict.fromkeys(defines(stmt), at))
    kept = {result.name for result in cascade.results}
    crossing: list[str] = []
    for at, inside in enumerate(members):
        read = dict.fromkeys(name for stmt in inside for name in reads(stmt) if home.get(name) != at)
        crossing += read
        kept.update(name for name in read if name in home)
    crossing += [name for name in home if name in kept]
    return total(moved[name] for name in crossing)


# --- operations ------------------------------------------------------------------------------------------------------


Point: TypeAlias = Sequence[int]


@dataclass(slots=True, eq=False)
class _Work:
    """The operations of statements, in dependency order: where each tensor is present follows from what it reads."""

    shapes: Shapes
    sizes: Mapping[str, int]
    left: dict[str, tuple[str, ...]] = field(default_factory=dict)
    live: dict[str, tuple[Expr, ...]] = field(default_factory=dict)  # what holds where the tensor is present
    counted: dict[tuple[Expr, ...], int | None] = field(default_factory=dict)
    assumed: dict[str, None] = field(default_factory=dict)

    def statement(self, stmt: Stmt) -> tuple[Amount, Amount]:
        """The arithmetic and the transcendental operations of one statement."""
        body = stmt.body if isinstance(stmt, TopK) else stmt.expr if isinstance(stmt, Einsum) else None
        assert body is not None, "a canonical cascade has no calls"
        ranks = dict.fromkeys(targets(stmt)[0].ranks)
        if isinstance(stmt, TopK):
            ranks = dict.fromkeys((*free_ranks(body), stmt.rank))
        elif isinstance(body, Reduce):
            ranks.update(dict.fromkeys(body.ranks))
        filters = self._filters(stmt, body, tuple(ranks))
        points = self._points(tuple(ranks), filters, defines(stmt)[0])
        flops, slow = operations(body)
        flops += isinstance(stmt, TopK)
        found = [(points.times(flops), points.times(slow))]
        if isinstance(stmt, Einsum):
            found += [self._init(stmt, init) for init in stmt.inits]
        return total(flops for flops, _ in found), total(slow for _, slow in found)

    def _init(self, stmt: Einsum, init: Init) -> tuple[Amount, Amount]:
        """The operations of a first value, over the other ranks of the recurrence."""
        others = [self.shapes.ranks[rank] for rank in stmt.target.ranks if rank != init.rank]
        flops, slow = operations(init.expr)
        return product(others, self.sizes).times(flops), product(others, self.sizes).times(slow)

    def _filters(self, stmt: Stmt, body: Expr, ranks: tuple[str, ...]) -> tuple[Expr, ...]:
        """What holds at every live point of a statement; what its output keeps of that is known from here on."""
        where = stmt.where if isinstance(stmt, (Einsum, TopK)) else None
        found = dict.fromkeys((*(() if where is None else (where,)), *self._present(body)))
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

    def _points(self, ranks: tuple[str, ...], filters: tuple[Expr, ...], name: str) -> Amount:
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
        if space is None or space > MAX_POINTS or not needed <= self.sizes.keys():
            return None
        if tests not in self.counted:
            extents = [self._extent(rank) for rank in ranks]
            compiled = [closure(test, ranks, self.sizes) for test in tests]
            points = itertools.product(*map(range, extents))
            try:
                self.counted[tests] = sum(all(test(point) for test in compiled) for point in points)
            except ZeroDivisionError:  # such a cascade has no meaning
                self.counted[tests] = None
        return self.counted[tests]

    def _extent(self, rank: str) -> int:
        size = self.shapes.ranks[rank]
        return size if isinstance(size, int) else self.sizes[size]


def operations(body: Expr) -> tuple[int, int]:
    """The arithmetic and the transcendental operations of an expression at one point; constants are computed before."""

    def combine(node: Expr, args: list[tuple[bool, int, int]]) -> tuple[bool, int, int]:
        if isinstance(node, (Read, Rank)):
            return True, 0, 0  # what stands in an index is an address
        varies = any(arg[0] for arg in args)
        flops, slow = sum(arg[1] for arg in args), sum(arg[2] for arg in args)
        if isinstance(node, Reduce):
            return True, flops + 1, slow
        if not varies or not isinstance(node, Apply) or node.op in FREE:
            return varies, flops, slow
        return (True, flops, slow + 1) if node.op in TRANSCENDENTAL else (True, flops + 1, slow)

    _, flops, slow = fold(body, combine)
    return flops, slow


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
