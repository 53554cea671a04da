"""Which tensors of a cascade may have absent coordinates: a conservative answer that needs no data."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypeAlias, assert_never

from cascade.errors import VerifyError
from cascade.inference import infer_shapes
from cascade.intervals import ANY, Interval, interval
from cascade.ir import (
    Apply, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Local, Rank, Read, Reduce, Size, Stmt, TopK, Use,
)  # fmt: skip
from cascade.order import units
from cascade.walk import definition, defines, free_ranks, substitute

Prover: TypeAlias = Callable[[Sequence[Expr], str, Collection[str]], bool]
"""Whether some coordinate of a rank surely passes tests, whatever the others are; the last are absent tensors."""

Region: TypeAlias = frozenset[Expr] | None
"""Where a value is present: wherever all of these tests pass; None where nothing is known."""

Regions: TypeAlias = Mapping[str, tuple[tuple[str, ...], Region]]
"""Of each tensor that may be absent: the ranks that its tests speak of, and these."""

EVERYWHERE: Region = frozenset()


def may_be_absent(
    cascade: Cascade, extents: Mapping[str, int] | None = None, proved: Prover | None = None
) -> frozenset[str]:
    """The tensors with a coordinate that is absent for some data.

    `extents` are those of ranks and of shape symbols, where known. With `proved` a reduction is present where some
    element surely is; every rank has a coordinate then.
    """
    found: dict[str, tuple[tuple[str, ...], Region]] = {}
    for unit in units(cascade.body, ()):
        before = -1
        begun = _begun(unit.statements) if unit.cyclic else {}
        while before != len(found):  # a cycle feeds itself: go on until nothing is added
            before = len(found)
            for stmt in unit.statements:
                region = _statement(stmt, _Known(found, cascade, extents or {}, proved, begun))
                if region != EVERYWHERE:
                    ranks = stmt.target.ranks if isinstance(stmt, Einsum) else ()
                    known = region if isinstance(stmt, Einsum) and not unit.cyclic else None
                    found.update(dict.fromkeys(defines(stmt), (ranks, known)))
            if not unit.cyclic:
                break
    return frozenset(found)


def _begun(statements: Sequence[Stmt]) -> dict[str, dict[int, int]]:
    """Of each tensor of a cycle that begins with values: how many, without a gap before 0, by dimension."""
    found: dict[str, dict[int, int]] = {}
    for stmt in statements:
        if isinstance(stmt, Einsum) and stmt.inits:
            own = {init.at for init in stmt.inits}
            many = next(number for number in range(len(own) + 1) if -1 - number not in own)
            found[stmt.target.name] = {stmt.target.ranks.index(stmt.inits[0].rank): many}
    return found


def lacks(
    expr: Expr,
    absent: Collection[str],
    where: Expr | None,
    cascade: Cascade,
    extents: Mapping[str, int] | None = None,
) -> bool:
    """Whether an expression of a statement with the filter `where` may be absent, the tensors `absent` being so.

    `extents` are those of ranks and of shape symbols, where known.
    """
    known = _Known(dict.fromkeys(absent, ((), None)), cascade, extents or {}, None)
    return known.region(expr, where) != EVERYWHERE


def _statement(stmt: Stmt, known: _Known) -> Region:
    match stmt:
        case Einsum():
            if any(known.region(init.expr, None) != EVERYWHERE for init in stmt.inits):
                return None
            outside = (test for test in _conjuncts(stmt.where) if set(free_ranks(test)) <= set(stmt.target.ranks))
            return _both(known.region(stmt.expr, stmt.where), frozenset(outside))
        case TopK():
            enough = (
                isinstance(stmt.k, int) and known.extents.get(stmt.rank, 0) >= stmt.k
            )  # fewer leave the rest absent
            inside = enough and stmt.where is None and known.region(stmt.body, None) == EVERYWHERE
            return EVERYWHERE if inside else None
        case Call():
            return EVERYWHERE  # what a cascade gives is filled
        case _:
            assert_never(stmt)


class _Known:
    """What is known of the tensors of a cascade."""

    def __init__(
        self,
        absent: Regions,
        cascade: Cascade,
        extents: Mapping[str, int],
        proved: Prover | None,
        begun: Mapping[str, Mapping[int, int]] | None = None,
    ) -> None:
        self.absent, self.cascade, self.extents, self.proved = absent, cascade, extents, proved
        self.begun = begun or {}  # of tensors of the statement's own cycle; elsewhere the values before 0 are not known

    def region(self, expr: Expr, where: Expr | None) -> Region:
        """Where an expression of a statement with this filter is present, as far as tests of the filter go inside."""
        match expr:
            case Const() | Rank() | Extent() | Local():
                return EVERYWHERE
            case Read():
                return self.read(expr, where)
            case Apply(op="default"):
                return EVERYWHERE if any(self.region(arg, where) == EVERYWHERE for arg in expr.args) else None
            case Apply():
                return _both(*(self.region(arg, where) for arg in expr.args))
            case Cast():
                return self.region(expr.arg, where)
            case Reduce():
                return self.reduced(expr, where)
            case Use():
                found = definition(self.cascade, expr.function)
                parts = [self.region(arg, where) for arg in expr.args]
                if found is not None and not isinstance(found, Cascade):
                    parts.append(self.region(found.body, where))
                return EVERYWHERE if all(part == EVERYWHERE for part in parts) else None
            case _:
                assert_never(expr)

    def read(self, expr: Read, where: Expr | None) -> Region:
        inside = _both(*(self.region(part, where) for part in expr.index))
        if any(not isinstance(part, Rank | Const) for part in expr.index) and not self.within(expr):
            return None
        if expr.tensor not in self.absent:
            return inside
        ranks, tests = self.absent[expr.tensor]
        if tests is None:
            return None
        at = dict(zip(ranks, expr.index, strict=True))
        return _both(inside, frozenset(substitute(test, at) for test in tests))

    def reduced(self, expr: Reduce, where: Expr | None) -> Region:
        """A reduction is present where some element is."""
        mine = (test for test in _conjuncts(where) if not set(expr.ranks).isdisjoint(free_ranks(test)))
        tests = _both(self.region(expr.body, where), frozenset(mine))
        if tests is None:
            return None
        inner = [test for test in tests if not set(expr.ranks).isdisjoint(free_ranks(test))]
        if inner and not (
            self.proved and len(expr.ranks) == 1 and self.proved(inner, expr.ranks[0], self.absent.keys())
        ):
            return None
        return tests - set(inner)

    def within(self, read: Read) -> bool:
        """Whether all coordinates of a read lie in the shape: remainders by an extent do, others if numbers show it."""
        try:
            shapes = infer_shapes(self.cascade)
        except VerifyError:  # half of a rewrite
            return False
        extents = self.extents
        numbers: dict[Size, int] = {size: extents[rank] for rank, size in shapes.ranks.items() if rank in extents}
        numbers |= extents  # type: ignore[arg-type]  # a symbol is a size

        def known(part: Expr) -> Interval:
            match part:
                case Rank() if part.name in extents:
                    return 0, extents[part.name] - 1
                case Extent() if part.name in numbers:
                    return numbers[part.name], numbers[part.name]
                case _:
                    return ANY

        def holds(index: Expr, size: Size) -> bool:
            match index:
                case Rank():
                    return True
                case Apply(op="mod", args=(_, Extent(name))) if name == size:
                    return True
                case _:
                    low, high = interval(index, known)
                    return low >= 0 and high < (numbers.get(size, 0) if isinstance(size, str) else size)

        def behind(index: Expr, size: Size, values: int) -> bool:
            """Whether a coordinate is an earlier one of its rank, and no earlier than the first value."""
            match index:
                case Apply(op="sub", args=(Rank(name), Const(value))):
                    return 0 <= value <= values and shapes.ranks.get(name) == size
                case _:
                    return False

        shape = shapes.tensors.get(read.tensor)  # which half of a rewrite may lack as well
        begun = self.begun.get(read.tensor, {})
        return shape is not None and all(
            holds(index, size) or behind(index, size, begun.get(dim, 0))
            for dim, (index, size) in enumerate(zip(read.index, shape, strict=True))
        )


def _both(*regions: Region) -> Region:
    """Where all of some values are present."""
    found: frozenset[Expr] = frozenset()
    for region in regions:
        if region is None:
            return None
        found |= region
    return found


def _conjuncts(where: Expr | None) -> tuple[Expr, ...]:
    if isinstance(where, Apply) and where.op == "and":
        return tuple(test for arg in where.args for test in _conjuncts(arg))
    return () if where is None else (where,)
