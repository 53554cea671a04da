"""Which tensors of a cascade may have absent coordinates: a conservative answer that needs no data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import assert_never

from cascade.errors import VerifyError
from cascade.inference import infer_shapes
from cascade.intervals import ANY, Interval, interval
from cascade.ir import (
    Apply, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Local, Rank, Read, Reduce, Size, Stmt, TopK, Use,
)  # fmt: skip
from cascade.order import units
from cascade.walk import definition, defines, free_ranks


def may_be_absent(cascade: Cascade, extents: Mapping[str, int] | None = None) -> frozenset[str]:
    """The tensors with a coordinate that is absent for some data; `extents` as below."""
    found: set[str] = set()
    for unit in units(cascade.body, ()):
        before = -1
        while before != len(found):  # a cycle feeds itself: go on until nothing is added
            before = len(found)
            for stmt in unit.statements:
                if _statement(stmt, found, cascade, extents or {}):
                    found.update(defines(stmt))
            if not unit.cyclic:
                break
    return frozenset(found)


def _statement(stmt: Stmt, absent: Collection[str], cascade: Cascade, extents: Mapping[str, int]) -> bool:
    match stmt:
        case Einsum():
            inits = any(lacks(init.expr, absent, None, cascade, extents) for init in stmt.inits)
            return inits or stmt.where is not None or lacks(stmt.expr, absent, stmt.where, cascade, extents)
        case TopK():
            enough = isinstance(stmt.k, int) and extents.get(stmt.rank, 0) >= stmt.k  # fewer leave the rest absent
            return not enough or stmt.where is not None or lacks(stmt.body, absent, None, cascade, extents)
        case Call():
            return False  # what a cascade gives is filled
        case _:
            assert_never(stmt)


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

    def inside(part: Expr) -> bool:
        return lacks(part, absent, where, cascade, extents)

    match expr:
        case Const() | Rank() | Extent() | Local():
            return False
        case Read():
            outside = any(not isinstance(i, Rank | Const) for i in expr.index) and not _within(
                expr, cascade, extents or {}
            )
            return expr.tensor in absent or outside or any(map(inside, expr.index))
        case Apply(op="default"):
            return all(map(inside, expr.args))
        case Apply():
            return any(map(inside, expr.args))
        case Cast():
            return inside(expr.arg)
        case Reduce():
            filtered = where is not None and not set(expr.ranks).isdisjoint(free_ranks(where))
            return filtered or inside(expr.body)
        case Use():
            found = definition(cascade, expr.function)
            return any(map(inside, expr.args)) or (
                found is not None and not isinstance(found, Cascade) and inside(found.body)
            )
        case _:
            assert_never(expr)


def _within(read: Read, cascade: Cascade, extents: Mapping[str, int]) -> bool:
    """Whether all coordinates of a read lie in the shape: remainders by an extent do, others where numbers show it."""
    try:
        shapes = infer_shapes(cascade)
    except VerifyError:  # half of a rewrite
        return False
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

    shape = shapes.tensors.get(read.tensor)  # which half of a rewrite may lack as well
    return shape is not None and all(map(holds, read.index, shape))
