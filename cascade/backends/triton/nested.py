"""Reductions over several ranks of which no kernel has tiles: over one of them, and over the others behind that.

    L = sum[b,n] f(S[b,n])   -->   L_row[b] = sum[n] f(S[b,n]);  L = sum[b] L_row[b]

A kernel goes through one rank in tiles and has others whole or shared out; a result without ranks leaves nothing to
share. What a row comes to is shared out by rows, often by the kernel that makes the row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cascade.backends.triton.partition import arrange, replaced, tied
from cascade.backends.triton.products import matrix_product, ranks_of
from cascade.inference import infer_dtypes
from cascade.ir import Cascade, Cast, DType, Einsum, Rank, Read, Reduce, Target
from cascade.passes.accumulate import read
from cascade.walk import fresh, names, reads, walk

ROUNDED = ("sum", "prod")  # of which a part in 16 bits is less than the whole is made of
REDUCERS = (*ROUNDED, "max", "min", "any", "all")  # of which parts are reduced as elements are
SHORT = {DType.F16, DType.BF16}


def with_nested(cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType]) -> Cascade:
    """The cascade with such reductions in two; itself where there are none.

    `extents` are those of ranks, `inputs` the types of the parameters.
    """
    fixed = tied(cascade)
    for stmt in cascade.body:
        if not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce) or stmt.inits or stmt.target.name in fixed:
            continue
        several = len(stmt.expr.ranks) > 1 and stmt.expr.reducer in REDUCERS
        product = matrix_product(stmt)
        if product is not None and product.two_sided:  # of which one rank is made of all that it sums over
            continue
        if several and arrange([stmt], cascade, extents) is None:
            made = _in_two(stmt, infer_dtypes(cascade, inputs), names(cascade))
            return with_nested(replaced(cascade, {stmt: made}), extents, inputs)
    return cascade


def _in_two(stmt: Einsum, dtypes: Mapping[str, DType], taken: set[str]) -> tuple[Einsum, ...]:
    """A reduction over what lies side by side, then over the others; parts of a sum in 16 bits have 32."""
    assert isinstance(stmt.expr, Reduce)
    target, inner = stmt.target, _inner(stmt.expr)
    others = tuple(rank for rank in stmt.expr.ranks if rank != inner)
    wide = stmt.expr.reducer in ROUNDED and not SHORT.isdisjoint(dtypes[name] for name in reads(stmt))
    body = Cast(DType.F32, stmt.expr.body) if wide else stmt.expr.body
    row = Target(fresh(f"{target.name}_row", taken), (*target.ranks, *others))
    part = dataclasses.replace(stmt, target=row, expr=dataclasses.replace(stmt.expr, ranks=(inner,), body=body))
    whole = dataclasses.replace(stmt.expr, ranks=others, body=read(row))
    if not (wide and dtypes[target.name] in SHORT):
        return part, Einsum(target, whole, span=stmt.span)
    total = Target(fresh(f"{target.name}_whole", taken), target.ranks)
    return part, Einsum(total, whole), Einsum(target, Cast(dtypes[target.name], read(total)), span=stmt.span)


def _inner(expr: Reduce) -> str:
    """The rank that comes last in what is read of most of them."""
    nodes = [node for node in walk(expr.body) if isinstance(node, Read)]
    longest = max(nodes, key=lambda node: len(ranks_of(node) & set(expr.ranks)), default=None)
    order = [part.name for part in longest.index if isinstance(part, Rank)] if longest is not None else []
    return max(expr.ranks, key=lambda rank: order.index(rank) if rank in order else -1)
