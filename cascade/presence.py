"""Which tensors of a cascade may have absent coordinates: a conservative answer that needs no data."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import assert_never

from cascade.ir import (
    Apply, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Local, Rank, Read, Reduce, Stmt, TopK, Use,
)  # fmt: skip
from cascade.order import units
from cascade.walk import definition, defines, free_ranks


def may_be_absent(cascade: Cascade, extents: Mapping[str, int] | None = None) -> frozenset[str]:
    """The tensors with a coordinate that is absent for some data; `extents` are those of ranks, where known."""
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
            inits = any(lacks(init.expr, absent, None, cascade) for init in stmt.inits)
            return inits or stmt.where is not None or lacks(stmt.expr, absent, stmt.where, cascade)
        case TopK():
            enough = isinstance(stmt.k, int) and extents.get(stmt.rank, 0) >= stmt.k  # fewer leave the rest absent
            return not enough or stmt.where is not None or lacks(stmt.body, absent, None, cascade)
        case Call():
            return False  # what a cascade gives is filled
        case _:
            assert_never(stmt)


def lacks(expr: Expr, absent: Collection[str], where: Expr | None, cascade: Cascade) -> bool:
    """Whether an expression of a statement with the filter `where` may be absent, the tensors `absent` being so."""

    def inside(part: Expr) -> bool:
        return lacks(part, absent, where, cascade)

    match expr:
        case Const() | Rank() | Extent() | Local():
            return False
        case Read():
            return expr.tensor in absent or any(not isinstance(i, (Rank, Const)) or inside(i) for i in expr.index)
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
