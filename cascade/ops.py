"""The scalar operations and reducers of the language: one row each, no behaviour.

A row says how an operation is written, how many operands it takes, what kind of value it gives and which algebraic
facts the passes may use. What it computes is a row in `interp.py`; how a backend spells it is a row in that backend.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What an operation gives, from what it takes."""

    SAME = "same"  # the promoted type of the operands
    FLOAT = "float"  # a float, whatever it takes
    BOOL = "bool"


@dataclass(frozen=True, slots=True)
class Op:
    """A pointwise operation. `symbol` and `level` are set for infix and prefix ones (a higher level binds tighter)."""

    name: str
    arity: int
    kind: Kind = Kind.SAME
    symbol: str | None = None
    level: int = 0
    associative: bool = False
    commutative: bool = False
    identity: float | None = None
    monotone: int = 0  # 1 increasing, -1 decreasing in its only operand, 0 neither or unknown


@dataclass(frozen=True, slots=True)
class Reducer:
    """A reducer: `op` folds two elements, `identity` is the value of an empty unfiltered reduction."""

    name: str
    op: str | None  # the pointwise operation that merges two partial results; None for those that carry a payload
    identity: float | bool | None
    kind: Kind = Kind.SAME
    idempotent: bool = False


LEVEL_DEFAULT, LEVEL_OR, LEVEL_AND, LEVEL_NOT, LEVEL_COMPARE, LEVEL_SUM, LEVEL_PRODUCT, LEVEL_UNARY = range(1, 9)

_ROWS = (
    Op("default", 2, symbol="??", level=LEVEL_DEFAULT),
    Op("or", 2, Kind.BOOL, "or", LEVEL_OR, True, True, False),
    Op("and", 2, Kind.BOOL, "and", LEVEL_AND, True, True, True),
    Op("not", 1, Kind.BOOL, "not", LEVEL_NOT),
    Op("eq", 2, Kind.BOOL, "==", LEVEL_COMPARE, commutative=True),
    Op("ne", 2, Kind.BOOL, "!=", LEVEL_COMPARE, commutative=True),
    Op("lt", 2, Kind.BOOL, "<", LEVEL_COMPARE),
    Op("le", 2, Kind.BOOL, "<=", LEVEL_COMPARE),
    Op("gt", 2, Kind.BOOL, ">", LEVEL_COMPARE),
    Op("ge", 2, Kind.BOOL, ">=", LEVEL_COMPARE),
    Op("add", 2, Kind.SAME, "+", LEVEL_SUM, True, True, 0),
    Op("sub", 2, Kind.SAME, "-", LEVEL_SUM),
    Op("mul", 2, Kind.SAME, "*", LEVEL_PRODUCT, True, True, 1),
    Op("div", 2, Kind.FLOAT, "/", LEVEL_PRODUCT),
    Op("floordiv", 2, Kind.SAME, "//", LEVEL_PRODUCT),
    Op("mod", 2, Kind.SAME, "%", LEVEL_PRODUCT),
    Op("neg", 1, Kind.SAME, "-", LEVEL_UNARY, monotone=-1),
    Op("exp", 1, Kind.FLOAT, monotone=1),
    Op("exp2", 1, Kind.FLOAT, monotone=1),
    Op("log", 1, Kind.FLOAT, monotone=1),
    Op("log2", 1, Kind.FLOAT, monotone=1),
    Op("sqrt", 1, Kind.FLOAT, monotone=1),
    Op("rsqrt", 1, Kind.FLOAT),
    Op("abs", 1),
    Op("sign", 1, monotone=1),
    Op("floor", 1, monotone=1),
    Op("round", 1, monotone=1),
    Op("sin", 1, Kind.FLOAT),
    Op("cos", 1, Kind.FLOAT),
    Op("tanh", 1, Kind.FLOAT, monotone=1),
    Op("sigmoid", 1, Kind.FLOAT, monotone=1),
    Op("silu", 1, Kind.FLOAT),
    Op("gelu", 1, Kind.FLOAT),
    Op("relu", 1, monotone=1),
    Op("erf", 1, Kind.FLOAT, monotone=1),
    Op("pow", 2),
    Op("min", 2, Kind.SAME, None, 0, True, True, float("inf")),
    Op("max", 2, Kind.SAME, None, 0, True, True, float("-inf")),
    Op("select", 3),
    Op("clamp", 3),
)

OPS: dict[str, Op] = {row.name: row for row in _ROWS}
"""Every pointwise operation by its IR name."""

INFIX: dict[str, Op] = {row.symbol: row for row in _ROWS if row.symbol and row.arity == 2}
"""The two-operand operations by the symbol the text uses."""

FUNCTIONS: dict[str, Op] = {row.name: row for row in _ROWS if row.symbol is None}
"""The operations that text writes as calls, `exp(x)`. `cast` is a form of its own: it takes a type."""

REDUCERS: dict[str, Reducer] = {
    row.name: row
    for row in (
        Reducer("sum", "add", 0),
        Reducer("prod", "mul", 1),
        Reducer("max", "max", float("-inf"), idempotent=True),
        Reducer("min", "min", float("inf"), idempotent=True),
        Reducer("any", "or", False, Kind.BOOL, idempotent=True),
        Reducer("all", "and", True, Kind.BOOL, idempotent=True),
        Reducer("count", "add", 0),  # how many coordinates are present; what `mean` divides by
        Reducer("argmax", None, None),
        Reducer("argmin", None, None),
    )
}
"""Every primitive reducer; `mean`, `logsumexp` and `softmax` are functions of the library, written in the language."""

LIBRARY_REDUCTIONS = ("mean", "logsumexp", "softmax")
"""Rank functions of the library that are spelled like reducers and reserved like them."""

WORDS = (
    "cascade", "schedule", "def", "where", "init", "fill", "topk", "and", "or", "not", "cast", "true", "false", "inf",
    "nan", "mesh", "shard", "split", "fuse", "tile", "stream", "wait", "over", "into", "at", "on",
    "fold", "state", "update", "merge", "finalize", "empty",
)  # fmt: skip
RESERVED = frozenset(WORDS[:15]) | frozenset(FUNCTIONS) | frozenset(REDUCERS) | frozenset(LIBRARY_REDUCTIONS)
"""Names that no tensor, rank variable or symbol may take; the words of a schedule are free outside it."""
