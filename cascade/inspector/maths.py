"""Statements as typeset maths: trees of MathML elements, which the page makes elements of, never text that is parsed.

    O[m,f] = sum[n] P[m,n] / D[m] * V[n,f]   -->   mrow(msub(O, m f) = munder(sum, n) mfrac(P, D) V)

A tree is `[tag, attributes, children...]`, a child a tree or a string. Names of tensors have the attribute `data-name`,
by which the page links them to their definitions. Parentheses stand where the text of a cascade has them: MathML has
no precedence, only a fraction and a root hold together what stands in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, assert_never

from cascade.ir import (
    Apply, Call, Cast, Const, Einsum, Expr, Extent, Init, Local, Rank, Read, Reduce, Stmt, Target, TopK, Use,
)  # fmt: skip
from cascade.ops import LEVEL_COMPARE, LEVEL_PRODUCT, LEVEL_SUM, LEVEL_UNARY, OPS
from cascade.text import render_expr
from cascade.walk import expressions, walk

Tree: TypeAlias = list[Any]

LARGEST = 300  # nodes of an expression that is typeset; a longer one is better read as text
LEVEL_ATOM = LEVEL_UNARY + 1
SIGNS = {
    "mul": "⋅", "le": "≤", "ge": "≥", "ne": "≠", "eq": "=", "lt": "<", "gt": ">", "sub": "−", "and": "∧", "or": "∨",
    "floordiv": "div", "mod": "mod", "default": "??",
}  # fmt: skip
BIG = {"sum": "∑", "prod": "∏"}


def typeset(stmt: Stmt) -> Tree | None:
    """The statement as a tree; None where it is too long to be typeset, or deeper than a person reads."""
    parts = expressions(stmt)
    if sum(1 for part in parts for _ in walk(part)) > LARGEST or any(_depth(part) > LARGEST // 8 for part in parts):
        return None
    match stmt:
        case Einsum():
            row = [_target(stmt.target), _sign("="), _piece(stmt.expr)[0]]
        case TopK():
            pair = [_target(stmt.values), _sign(","), _target(stmt.coords)]
            row = [*pair, _sign("="), _under("topk", (f"{stmt.rank}, {stmt.k}",)), _enclosed(stmt.body, LEVEL_PRODUCT)]
        case Call():
            given = _spaced([_name(name) for name in stmt.args])
            row = [*_spaced([_name(name) for name in stmt.targets]), _sign("="), ["mi", {}, stmt.callee], _round(given)]
        case _:
            assert_never(stmt)
    if not isinstance(stmt, Call) and stmt.where is not None:
        row += _said("where", _piece(stmt.where)[0])
    if isinstance(stmt, Einsum) and stmt.inits:
        row += _said("init", *_spaced([_init(stmt.target, init) for init in stmt.inits]))
    return ["math", {"display": "block"}, ["mrow", {}, *row]]


def _said(word: str, *what: Tree) -> list[Tree]:
    return [["mspace", {"width": "1em"}], ["mtext", {}, word], ["mspace", {"width": "0.5em"}], *what]


def _init(target: Target, init: Init) -> Tree:
    index = [["mn", {}, str(init.at)] if rank == init.rank else ["mi", {}, rank] for rank in target.ranks]
    place = ["msub", {}, _name(target.name), ["mrow", {}, *_spaced(index)]]
    return ["mrow", {}, place, _sign("="), _piece(init.expr)[0]]


def _depth(expr: Expr) -> int:
    """How deep the expression is, without recursion: a pass may have made it deep."""
    deepest, level = 0, [expr]
    while level:
        deepest += 1
        level = [child for node in level for child in _children(node)]
    return deepest


def _children(expr: Expr) -> Sequence[Expr]:
    match expr:
        case Apply() | Use():
            return expr.args
        case Read():
            return expr.index
        case Cast():
            return (expr.arg,)
        case Reduce():
            return (expr.body,)
        case _:
            return ()


# --- expressions -----------------------------------------------------------------------------------------------------


def _piece(expr: Expr) -> tuple[Tree, int]:
    """The expression as a tree, and how strongly its last operator binds."""
    match expr:
        case Const():
            text = render_expr(expr)
            return ["mn", {}, text.replace("inf", "∞").replace("-", "−")], LEVEL_UNARY if "-" in text else LEVEL_ATOM
        case Rank() | Extent() | Local():
            return ["mi", {}, expr.name], LEVEL_ATOM
        case Read():
            return _read(expr), LEVEL_ATOM
        case Cast():
            return ["mrow", {}, ["mi", {}, expr.dtype.value], _round([_piece(expr.arg)[0]])], LEVEL_ATOM
        case Reduce():
            return _along(expr.reducer, expr.ranks, expr.body), LEVEL_PRODUCT
        case Use():
            if expr.ranks and len(expr.args) == 1:
                return _along(expr.function, expr.ranks, expr.args[0]), LEVEL_PRODUCT
            head = _under(expr.function, expr.ranks) if expr.ranks else ["mi", {}, expr.function]
            return ["mrow", {}, head, _round(_spaced([_piece(arg)[0] for arg in expr.args]))], LEVEL_ATOM
        case Apply():
            return _application(expr)
        case _:
            assert_never(expr)


def _read(read: Read) -> Tree:
    if not read.index:
        return _name(read.tensor)
    return ["msub", {}, _name(read.tensor), ["mrow", {}, *_spaced([_piece(index)[0] for index in read.index])]]


def _along(reducer: str, ranks: Sequence[str], body: Expr) -> Tree:
    """A reduction takes the product that follows it."""
    return ["mrow", {}, _under(reducer, ranks), _enclosed(body, LEVEL_PRODUCT)]


def _application(expr: Apply) -> tuple[Tree, int]:
    op = OPS[expr.op]
    if expr.op == "div":
        above, below = (_piece(arg)[0] for arg in expr.args)
        return ["mfrac", {}, above, below], LEVEL_ATOM
    if expr.op == "sqrt":
        return ["msqrt", {}, _piece(expr.args[0])[0]], LEVEL_ATOM
    if expr.op == "pow":
        base, power = expr.args
        return ["msup", {}, _enclosed(base, LEVEL_ATOM), _piece(power)[0]], LEVEL_ATOM
    if op.symbol is None:
        return ["mrow", {}, ["mi", {}, op.name], _round(_spaced([_piece(arg)[0] for arg in expr.args]))], LEVEL_ATOM
    sign = _sign(SIGNS.get(expr.op, op.symbol))
    if op.arity == 1:
        sign = ["mi", {}, "not"] if op.name == "not" else _sign("−")
        return ["mrow", {}, sign, _enclosed(expr.args[0], op.level)], op.level
    left, right = expr.args
    first = _enclosed(left, op.level + (op.level == LEVEL_COMPARE), starts=True)
    return ["mrow", {}, first, sign, _enclosed(right, op.level + 1)], op.level


def _enclosed(expr: Expr, level: int, starts: bool = False) -> Tree:
    """The operand, in parentheses where it binds less than `level` asks, or would take in what follows it."""
    tree, own = _piece(expr)
    takes = starts and level > LEVEL_SUM and _ends_open(expr)
    return _round([tree]) if own < level or takes else tree


def _ends_open(expr: Expr) -> bool:
    """Whether a reduction stands at the end of the expression: a product behind it would be its own."""
    while isinstance(expr, Apply) and OPS[expr.op].symbol is not None and expr.op != "div":
        expr = expr.args[-1]
    return isinstance(expr, Reduce) or (isinstance(expr, Use) and bool(expr.ranks) and len(expr.args) == 1)


# --- elements --------------------------------------------------------------------------------------------------------


def _target(target: Target) -> Tree:
    if not target.ranks:
        return _name(target.name)
    return ["msub", {}, _name(target.name), ["mrow", {}, *_spaced([["mi", {}, rank] for rank in target.ranks])]]


def _name(name: str) -> Tree:
    return ["mi", {"data-name": name}, name]


def _sign(text: str) -> Tree:
    return ["mo", {}, text]


def _under(name: str, ranks: Sequence[str]) -> Tree:
    sign = ["mo", {"movablelimits": "false"}, BIG[name]] if name in BIG else ["mi", {}, name]
    below = ["mrow", {}, *_spaced([["mi", {}, rank] for rank in ranks])]
    return ["mrow", {}, ["munder", {}, sign, below], ["mspace", {"width": "0.2em"}]]


def _round(inner: Sequence[Tree]) -> Tree:
    return ["mrow", {}, _sign("("), *inner, _sign(")")]


def _spaced(items: Sequence[Tree]) -> list[Tree]:
    """The items with commas between them."""
    return [part for number, item in enumerate(items) for part in ([_sign(",")] if number else []) + [item]]
