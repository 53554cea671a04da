"""The integers that an expression can come to, by arithmetic on intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from cascade.ir import Apply, Cast, Const, Expr
from cascade.ops import OPS, Kind

Interval: TypeAlias = tuple[int, int]
"""The least and the largest value."""

Known: TypeAlias = Callable[[Expr], Interval]
"""The values of a coordinate, a size or a variable."""

ANY: Interval = (-(1 << 63), (1 << 63) - 1)
"""All values of the largest type of integers."""


def interval(expr: Expr, known: Known) -> Interval:
    """A stretch with every value of an expression of integers, were each operation exact."""
    match expr:
        case Const():
            return int(expr.value), int(expr.value)
        case Cast():
            return interval(expr.arg, known)
        case Apply(op="select"):
            return _hull([interval(arg, known) for arg in expr.args[1:]])
        case Apply() if OPS[expr.op].kind is Kind.BOOL:
            return 0, 1
        case Apply():
            return _applied(expr.op, [interval(arg, known) for arg in expr.args])
        case _:
            return known(expr)


def _applied(op: str, args: Sequence[Interval]) -> Interval:
    low, high = args[0]
    first, last = args[-1]
    most = max(abs(low), abs(high))
    match op:
        case "add":
            return low + first, high + last
        case "sub":
            return low - last, high - first
        case "mul":
            ends = [a * b for a in args[0] for b in args[1]]
            return min(ends), max(ends)
        case "neg":
            return -high, -low
        case "min":
            return min(low, first), min(high, last)
        case "max" | "relu":
            return (max(low, first), max(high, last)) if op == "max" else (max(low, 0), max(high, 0))
        case "floordiv":
            ends = [a // b for a in args[0] for b in args[1]] if first > 0 else [-most, most]
            return min(ends), max(ends)
        case "mod":
            return (0, last - 1) if first > 0 else (min(first, 0), max(last, 0))
        case "clamp":
            return _hull(args)
        case "abs" | "sign":
            return -most, most
        case _:
            return ANY


def _hull(args: Sequence[Interval]) -> Interval:
    return min(low for low, _ in args), max(high for _, high in args)
