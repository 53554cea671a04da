"""The Einstein convention: a rank of the right side that nothing binds is summed over the whole right side.

    Z[m,n] = A[m,k] * B[k,n]   -->   Z[m,n] = sum[k] A[m,k] * B[k,n]

Only where the right side is a single product: in a sum of terms it would count some of them several times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import assert_never

from cascade.errors import Diagnostic
from cascade.ir import Apply, Call, Einsum, Expr, Read, Reduce, Stmt, TopK, Use
from cascade.ops import LEVEL_PRODUCT, OPS
from cascade.scopes import Signatures, scan
from cascade.text import render_stmt
from cascade.walk import children, free_ranks, targets
from cascade.wording import quote

FACTORS = ("mul", "div", "neg")
MAX_HELP = 120  # characters of a rewritten equation that a help line shows


def contract(stmt: Stmt, known: Signatures) -> Stmt | Diagnostic:
    """The statement with its implicit sum written out, or why it can have none."""
    match stmt:
        case Call():
            return stmt
        case Einsum():
            body, bound = stmt.expr, stmt.target.ranks
        case TopK():
            body, bound = stmt.body, (*stmt.values.ranks, stmt.rank)
        case _:
            assert_never(stmt)
    found = scan(body, known)
    ranks = tuple(rank for rank in found.free if rank not in bound)
    if not ranks or not found.complete:
        return stmt
    if is_product(body) and not any(adds(factor, frozenset(ranks)) for factor in factors(body)):
        return with_body(stmt, Reduce("sum", ranks, body, span=body.span))
    listed = ", ".join(quote(rank) for rank in ranks)
    verb = "is" if len(ranks) == 1 else "are"
    message = f"{listed} {verb} neither on the left nor reduced, and the right side is not a single product"
    return Diagnostic("C211", message, found.free[ranks[0]], advice(stmt, body, ranks))


def with_body(stmt: Einsum | TopK, body: Expr) -> Einsum | TopK:
    """The statement with another right side."""
    if isinstance(stmt, Einsum):
        return dataclasses.replace(stmt, expr=body)
    return dataclasses.replace(stmt, body=body)


def is_product(expr: Expr) -> bool:
    """Whether the expression is a read, or a chain of `*` and `/`; the application of a function is not."""
    while isinstance(expr, Apply) and expr.op == "neg":
        expr = expr.args[0]
    return isinstance(expr, Read) or (isinstance(expr, Apply) and expr.op in FACTORS)


def factors(expr: Expr) -> list[Expr]:
    """The operands of a chain of `*` and `/`."""
    found: list[Expr] = []
    todo = [expr]
    while todo:
        node = todo.pop()
        if isinstance(node, Apply) and node.op in FACTORS:
            todo += node.args
        else:
            found.append(node)
    return found


def adds(factor: Expr, ranks: frozenset[str]) -> bool:
    """Whether a factor has one of the ranks inside a sum of terms, where a sum over it is not what it seems."""
    todo = [(factor, ranks)]
    while todo:
        node, wanted = todo.pop()
        if isinstance(node, (Reduce, Use)):
            wanted -= frozenset(node.ranks)
        if not wanted or isinstance(node, Read):
            continue
        level = OPS[node.op].level if isinstance(node, Apply) and node.op in OPS else 0
        if 0 < level < LEVEL_PRODUCT and not wanted.isdisjoint(free_ranks(node)):
            return True
        todo += [(child, wanted) for child in children(node)]
    return False


def advice(stmt: Einsum | TopK, body: Expr, ranks: Sequence[str]) -> str:
    """The equation with the sum written where it was probably meant."""
    listed = ",".join(ranks)
    if isinstance(body, Use) and set(ranks) & set(body.ranks):
        left = targets(stmt)[0]
        return f"{body.function}[{','.join(body.ranks)}] keeps its rank: {left.name}[{','.join((*left.ranks, *ranks))}]"
    text = render_stmt(with_body(stmt, summed(body, ranks)))
    return f"write sum[{listed}]: {text}" if len(text) <= MAX_HELP else f"write sum[{listed}] before what has {listed}"


def summed(expr: Expr, ranks: Sequence[str]) -> Expr:
    """The expression with the terms that have the ranks summed over them."""
    here = tuple(rank for rank in ranks if rank in free_ranks(expr))
    if not here:
        return expr
    if isinstance(expr, Apply) and expr.op in ("add", "sub"):
        return dataclasses.replace(expr, args=tuple(summed(arg, here) for arg in expr.args))
    return Reduce("sum", here, expr)
