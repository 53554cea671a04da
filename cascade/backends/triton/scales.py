"""Factors that are the same along the stream of a matrix product, multiplied once behind it.

    Y[t,f] = sum[d] X[t,d] * W[f,d] * s[f]    -->    Y_sum[t,f] = sum[d] X[t,d] * W[f,d];  Y[t,f] = Y_sum[t,f] * s[f]

Within the loop they would be multiplied into every round's part of the sum, which the matrix units then cannot add up.
A product whose reduced rank lies whole in a tile has one round: what scales it stays, and goes into what follows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from cascade.bounds import absent_tensors
from cascade.backends.triton.partition import Group, partition
from cascade.backends.triton.products import factors, matrix_product, product
from cascade.ir import Cascade, Einsum, Expr, Fold, Fuse, GroupBy, Rank, Read, Reduce, Stmt, Target
from cascade.order import members
from cascade.walk import defines, fresh, names, walk


def with_scales(cascade: Cascade, extents: Mapping[str, int]) -> Cascade:
    """The cascade with such factors in statements of their own; itself where there are none.

    `extents` are those of ranks. A factor that may be absent stays in the sum: it says which terms there are. So does
    one of a sum with a filter, which may have no terms at all: nothing times infinity is not 0.
    """
    if not any(_outside(stmt, cascade) for stmt in cascade.body):
        return cascade
    taken = names(cascade)
    split: dict[Stmt, tuple[Stmt, Stmt]] = {}
    for group in partition(cascade, extents):
        if not isinstance(group, Group) or extents.get(group.arrangement.stream or "", 0) == 0:
            continue
        for stmt in group.statements:
            found, scale = matrix_product(stmt), _outside(stmt, cascade)
            if isinstance(stmt, Einsum) and scale and found is not None and found.over == group.arrangement.stream:
                split[stmt] = _split(stmt, scale, fresh(f"{stmt.target.name}_sum", taken))
    body = [new for stmt in cascade.body for new in split.get(stmt, (stmt,))]
    summed = {defines(stmt)[0]: defines(total)[0] for stmt, (total, _) in split.items()}
    schedule = [
        dataclasses.replace(item, statements=tuple(summed.get(name, name) for name in item.statements))
        if isinstance(item, Fuse)
        else item
        for item in cascade.schedule
    ]
    return dataclasses.replace(cascade, body=tuple(body), schedule=tuple(schedule))


def _outside(stmt: Stmt, cascade: Cascade) -> tuple[Expr, ...]:
    """The factors of a product's rounds that may as well be multiplied behind them."""
    found = matrix_product(stmt)
    folded = {name for item in cascade.schedule if isinstance(item, Fold) for name in members(item)}
    folded |= {name for item in cascade.schedule if isinstance(item, GroupBy) for name in item.statements}
    if found is None or not isinstance(stmt, Einsum) or stmt.where is not None or not folded.isdisjoint(defines(stmt)):
        return ()
    assert isinstance(stmt.expr, Reduce)
    absent = absent_tensors(cascade)
    reads = [node for term in found.rest for node in walk(term) if isinstance(node, Read)]
    plain = all(node.tensor not in absent and all(isinstance(part, Rank) for part in node.index) for node in reads)
    alone = stmt.expr.ranks == (found.over,)
    return found.rest if plain and alone else ()


def _split(stmt: Einsum, scale: tuple[Expr, ...], name: str) -> tuple[Stmt, Stmt]:
    """The sum under a name of its own, and what it is multiplied with."""
    assert isinstance(stmt.expr, Reduce)
    terms = [term for term in factors(stmt.expr.body) if term not in scale]
    total = Einsum(Target(name, stmt.target.ranks), dataclasses.replace(stmt.expr, body=product(terms)), span=stmt.span)
    return total, dataclasses.replace(stmt, expr=product([Read(name, tuple(map(Rank, stmt.target.ranks))), *scale]))
