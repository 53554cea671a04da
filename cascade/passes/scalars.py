"""Expressions on scalars, in float64 or in any number of digits: what a lift is decided and tested with.

No torch: an analysis has to answer in milliseconds. `None` is an absent value. A value that does not exist (a logarithm
of a negative number, an overflow) is NaN or an infinity, as in IEEE arithmetic.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import mpmath

from cascade.ir import Apply, Cast, Const, Expr, Read

Scalar = Any  # a float, or a number of mpmath; None for absent

HIGH = mpmath.MPContext()
HIGH.dps = 80


def evaluate(expr: Expr, value: Callable[[Expr], Scalar], high: bool = False) -> Scalar:
    """The value of an expression, `value` giving that of its reads, ranks, extents and parameters.

    `high` computes with 80 digits, else in float64.
    """
    match expr:
        case Const():
            return HIGH.mpf(expr.value) if high else float(expr.value)
        case Cast():
            return evaluate(expr.arg, value, high)
        case Apply(op="default"):
            found = evaluate(expr.args[0], value, high)
            return evaluate(expr.args[1], value, high) if found is None else found
        case Apply():
            args = [evaluate(arg, value, high) for arg in expr.args]
            if any(arg is None for arg in args):
                return None
            return _apply(expr.op, args, HIGH if high else math)
        case Read() | _:
            return value(expr)


def _apply(op: str, args: list[Scalar], ns: Any) -> Scalar:
    infinite, nan = (HIGH.inf, HIGH.nan) if ns is HIGH else (math.inf, math.nan)
    try:
        found = (PLAIN.get(op) or _named(op, ns))(*args)
    except OverflowError:
        return infinite
    except (ValueError, ZeroDivisionError):
        if op == "div" and args[0] == args[0] and args[0] != 0:
            return infinite if args[0] > 0 else -infinite
        return (
            -infinite if op in ("log", "log2") and args[0] == 0 else infinite if op == "rsqrt" and args[0] == 0 else nan
        )
    return nan if ns is HIGH and isinstance(found, HIGH.mpc) else found


@functools.cache
def _named(op: str, ns: Any) -> Callable[..., Scalar]:
    functions: Mapping[str, Callable[..., Scalar]] = {
        "exp": ns.exp,
        "exp2": lambda x: ns.exp(x * ns.log(2)) if ns is HIGH else 2.0**x,
        "log": ns.log,
        "log2": lambda x: ns.log(x) / ns.log(2),
        "sqrt": ns.sqrt,
        "rsqrt": lambda x: 1 / ns.sqrt(x),
        "sin": ns.sin,
        "cos": ns.cos,
        "tanh": ns.tanh,
        "erf": ns.erf,
        "floor": lambda x: ns.floor(x) if math.isfinite(x) else x,
        "round": lambda x: ns.nint(x) if ns is HIGH else float(round(x)) if math.isfinite(x) else x,
        "sigmoid": lambda x: _sigmoid(x, ns),
        "silu": lambda x: x * _sigmoid(x, ns),
        "gelu": lambda x: x * (1 + ns.erf(x / ns.sqrt(2))) / 2,
        "pow": lambda x, y: ns.power(x, y) if ns is HIGH else ns.pow(x, y),
        "floordiv": lambda x, y: ns.floor(x / y),
        "mod": lambda x, y: x - y * ns.floor(x / y),
    }
    return functions[op]


def _sigmoid(x: Scalar, ns: Any) -> Scalar:
    small = ns.exp(-abs(x))
    return 1 / (1 + small) if x >= 0 else small / (1 + small)


PLAIN: Mapping[str, Callable[..., Scalar]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "neg": lambda a: -a,
    "abs": abs,
    "sign": lambda a: (a > 0) - (a < 0) if a == a else a,
    "relu": lambda a: a if a != a or a > 0 else a * 0,
    "max": lambda a, b: a if a != a or a >= b else b,
    "min": lambda a, b: a if a != a or a <= b else b,
    "clamp": lambda x, low, high: min(max(x, low), high),
    "select": lambda c, a, b: a if c else b,
    "or": lambda a, b: bool(a) or bool(b),
    "and": lambda a, b: bool(a) and bool(b),
    "not": lambda a: not a,
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
