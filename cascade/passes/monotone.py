"""The order law: which element is largest does not change under a monotone map, so the map can wait.

    max[n] exp(X[n] - R) / D   =   exp((max[n] X[n]) - R) / D        because exp is increasing and D is positive

`peel` takes a map over atoms apart into an inner value u of the element and a monotone map around it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cascade.ir import Apply, Cast, Const, Einsum, Expr, Extent, Read, Reduce, Stmt
from cascade.ops import OPS

NOT_STRICT = ("sign", "floor", "round", "relu", "max", "min", "clamp")  # these map different values to equal ones
MAX_DEPTH = 12


@dataclass(frozen=True, slots=True)
class Monotone:
    """`around(inner)` is the map: increasing (1) or decreasing (-1) in `inner`; strict where it keeps values apart."""

    inner: Expr
    around: Callable[[Expr], Expr]
    direction: int = 1
    strict: bool = True


Sign = Callable[[Expr], int]
"""What is known of a value of the state: 2 positive, 1 not negative, 0 nothing."""


def peel(expr: Expr, side: Callable[[Expr], str], sign: Sign) -> Monotone | None:
    """The map as a monotone one around a value of the element; None where it is not one that this rule sees."""
    if side(expr) in ("x", ""):
        return Monotone(expr, lambda inner: inner)
    if isinstance(expr, Cast):
        found = peel(expr.arg, side, sign)
        return found and _outside(found, lambda inner: Cast(expr.dtype, inner), 1, False)
    if not isinstance(expr, Apply) or expr.op in ("default", "select"):
        return None
    if len(expr.args) == 1:
        direction = OPS[expr.op].monotone
        found = peel(expr.args[0], side, sign) if direction else None
        return found and _outside(found, lambda inner: Apply(expr.op, (inner,)), direction, expr.op not in NOT_STRICT)
    moving = [i for i, arg in enumerate(expr.args) if side(arg) in ("x", "m")]
    if len(moving) != 1:
        return None
    at = moving[0]
    direction, strict = _operand(expr, at, sign)
    found = peel(expr.args[at], side, sign) if direction else None

    def around(inner: Expr) -> Expr:
        return Apply(expr.op, (*expr.args[:at], inner, *expr.args[at + 1 :]))

    return found and _outside(found, around, direction, strict)


def _outside(found: Monotone, around: Callable[[Expr], Expr], direction: int, strict: bool) -> Monotone:
    inner = found.around
    return Monotone(found.inner, lambda u: around(inner(u)), found.direction * direction, found.strict and strict)


def _operand(expr: Apply, at: int, sign: Sign) -> tuple[int, bool]:
    """How an operation of several operands depends on the one at `at`: its direction, 0 where unknown; strictness."""
    match expr.op:
        case "add":
            return 1, True
        case "sub":
            return (1 if at == 0 else -1), True
        case "mul":
            known = sign(expr.args[1 - at])
            return (1 if known else 0), known == 2
        case "div" if at == 0:
            return (1 if sign(expr.args[1]) else 0), True
        case "max" | "min":
            return 1, False
        case "clamp" if at == 0:
            return 1, False
        case _:
            return 0, False


def bounds(expr: Expr) -> tuple[float, float]:
    """Between what the values of an expression lie, whatever the data: by interval arithmetic."""
    args = [bounds(arg) for arg in expr.args] if isinstance(expr, Apply) else []
    match expr:
        case Const():
            return float(expr.value), float(expr.value)
        case Apply(op="tanh" | "sin" | "cos" | "erf"):
            return -1.0, 1.0
        case Apply(op="exp" | "exp2" | "abs" | "relu" | "sqrt"):
            return 0.0, math.inf
        case Apply(op="sigmoid"):
            return 0.0, 1.0
        case Apply(op="neg"):
            return -args[0][1], -args[0][0]
        case Apply(op="add"):
            return args[0][0] + args[1][0], args[0][1] + args[1][1]
        case Apply(op="sub"):
            return args[0][0] - args[1][1], args[0][1] - args[1][0]
        case Apply(op="mul") if all(math.isfinite(end) for arg in args for end in arg):
            corners = [a * b for a in args[0] for b in args[1]]
            return min(corners), max(corners)
        case _:
            return -math.inf, math.inf


def sign_of(expr: Expr, statements: Mapping[str, Stmt], depth: int = 0) -> int:
    """2 where the value is positive whatever the data, 1 where it is not negative, 0 where neither is known."""
    if depth > MAX_DEPTH:
        return 0
    if isinstance(expr, Apply) and bounds(expr)[0] > 0:
        return 2
    below = [sign_of(arg, statements, depth + 1) for arg in expr.args] if isinstance(expr, Apply) else []
    match expr:
        case Const():
            return 2 if expr.value > 0 else int(expr.value == 0)
        case Extent():
            return 1
        case Apply(op="exp" | "exp2" | "sigmoid" | "rsqrt"):
            return 2
        case Apply(op="abs" | "relu" | "sqrt"):
            return 1
        case Apply(op="mul") if expr.args[0] == expr.args[1]:
            return 1
        case Apply(op="mul" | "div" | "min"):
            return min(below)
        case Apply(op="add"):
            return max(below) if min(below) else 0
        case Apply(op="max"):
            return max(below)
        case Reduce(reducer="sum" | "max" | "min" | "prod"):
            return sign_of(expr.body, statements, depth + 1)
        case Reduce(reducer="count"):
            return 1
        case Read():
            stmt = statements.get(expr.tensor)
            return sign_of(stmt.expr, statements, depth + 1) if isinstance(stmt, Einsum) and not stmt.inits else 0
        case _:
            return 0
