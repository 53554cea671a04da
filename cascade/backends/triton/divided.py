"""Coordinates that neighbours share, as one division by a number.

    K[b,h*HK//H,n,e]   with H = 32, HK = 8   -->   K[b,h//4,n,e]

Whoever says how many heads share one in shape symbols says it for every ratio. Where the symbols are known, and one
divides the other, so many neighbours have the same coordinate: a kernel then has them in one tile, and reads it once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cascade.ir import Apply, Cascade, Const, Expr, Extent, Fold, Rank, Read
from cascade.walk import map_expressions, map_fold, rewrite


def with_divisions(cascade: Cascade, extents: Mapping[str, int]) -> Cascade:
    """The cascade with such coordinates; `extents` are those of the shape symbols that are the same in all calls."""

    def shorter(node: Expr) -> Expr:
        if not isinstance(node, Read):
            return node
        return dataclasses.replace(
            node, index=tuple(rewrite(at, lambda one: divided(one, extents)) for at in node.index)
        )

    def change(expr: Expr) -> Expr:
        return rewrite(expr, shorter)

    body = tuple(map_expressions(stmt, change) for stmt in cascade.body)
    schedule = tuple(map_fold(item, change) if isinstance(item, Fold) else item for item in cascade.schedule)
    found = dataclasses.replace(cascade, body=body, schedule=schedule)
    return cascade if found == cascade else found


def divided(expr: Expr, extents: Mapping[str, int]) -> Expr:
    """`(r + c) * a // b` as `r // k + c // k` where b is k times a, and k divides c; anything else as it is.

    Where k is 1 it stays: a bare rank would have two extents, whose symbols differ.
    """
    if not isinstance(expr, Apply) or expr.op != "floordiv":
        return expr
    over, by = expr.args[0], _number(expr.args[1], extents)
    if by is None or not isinstance(over, Apply) or over.op != "mul":
        return expr
    for rank, factor in (over.args, over.args[::-1]):
        times = _number(factor, extents)
        first, behind = _parts(rank, extents)
        width = by // times if times and by > times > 0 and by % times == 0 else 0
        if width and first is not None and behind % width == 0:
            found: Expr = Apply("floordiv", (first, Const(width)))
            return found if not behind else Apply("add", (found, Const(behind // width)))
    return expr


def _parts(expr: Expr, extents: Mapping[str, int]) -> tuple[Rank | None, int]:
    """A rank and what is added to it; None where it is something else."""
    if isinstance(expr, Rank):
        return expr, 0
    if isinstance(expr, Apply) and expr.op == "add":
        for rank, more in (expr.args, expr.args[::-1]):
            number = _number(more, extents)
            if isinstance(rank, Rank) and number is not None:
                return rank, number
    return None, 0


def _number(expr: Expr, extents: Mapping[str, int]) -> int | None:
    """A whole number, or the extent of a symbol, where it is one."""
    if isinstance(expr, Extent):
        return extents.get(expr.name)
    return expr.value if isinstance(expr, Const) and type(expr.value) is int else None
