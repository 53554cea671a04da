"""Elements of made tensors at coordinates that data gives, computed anew where that is less than storing the tensor.

    Z[t,v] = sum[d] X[t,d] * W[v,d];  P[t] = L[t] - Z[t,y[t]]
    -->  Z_pick[t] = sum[d] X[t,d] * W[y[t],d]  where y[t] >= 0 and y[t] < V;  P[t] = L[t] - Z_pick[t]

Nothing is asked about what the tensor is: its statement is written down with other coordinates. A coordinate outside
the tensor is absent, as it was. Elements are counted: those that the new statements go through, those that it has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping

from cascade.bounds import conjuncts
from cascade.inference import infer_shapes
from cascade.ir import Apply, Call, Cascade, Const, Einsum, Expr, Extent, Rank, Read, Reduce, Size, Stmt, Target
from cascade.walk import defines, expressions, free_ranks, fresh, map_expressions, names, rewrite, substitute, walk


def with_picks(cascade: Cascade, extents: Mapping[str, int]) -> Cascade:
    """The cascade with picked elements as statements of their own; itself where there are none worth it.

    `extents` are those of shape symbols.
    """
    current = cascade
    while (found := next(_worthwhile(current, extents), None)) is not None:
        current = _picked(current, *found)
    return current


def _worthwhile(cascade: Cascade, extents: Mapping[str, int]) -> Iterator[tuple[Stmt, Read, Einsum]]:
    """The reads of made tensors at coordinates from data, each with its statement and that which makes the tensor."""
    ranks = infer_shapes(cascade).ranks

    def count(wanted: tuple[str, ...]) -> int:
        sizes = (ranks[rank] for rank in dict.fromkeys(wanted))
        return math.prod(size if isinstance(size, int) else extents[size] for size in sizes)

    made = {s.target.name: s for s in cascade.body if isinstance(s, Einsum) and not s.inits}
    stored = {result.name for result in cascade.results}
    for stmt in cascade.body:
        for read in (node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)):
            maker = made.get(read.tensor)
            from_data = any(isinstance(node, Read) for part in read.index for node in walk(part))
            if maker is None or not from_data or read.tensor in stored or read.tensor in defines(stmt):
                continue
            folded = maker.expr.ranks if isinstance(maker.expr, Reduce) else ()
            free = free_ranks(read)
            if set(free) & set(folded):
                continue  # the same rank would mean two things
            if count((*free, *folded)) < count(maker.target.ranks):
                yield stmt, read, maker


def _picked(cascade: Cascade, stmt: Stmt, read: Read, maker: Einsum) -> Cascade:
    """The cascade with a read as a read of a statement of its own, which stands before the one that reads."""
    free = free_ranks(read)
    at = dict(zip(maker.target.ranks, read.index, strict=True))
    shape = infer_shapes(cascade).tensors[read.tensor]
    name = fresh(f"{read.tensor}_pick", names(cascade))
    own = [] if isinstance(stmt, Call) else conjuncts(stmt.where)
    tests = [test for test in own if set(free_ranks(test)) <= set(free)]
    tests += [substitute(test, at) for test in conjuncts(maker.where)]
    for part, size in zip(read.index, shape, strict=True):
        if not isinstance(part, Rank):
            tests += [Apply("ge", (part, Const(0))), Apply("lt", (part, _extent(size)))]
    where = functools.reduce(lambda a, b: Apply("and", (a, b)), dict.fromkeys(tests)) if tests else None
    pick = Einsum(Target(name, free), substitute(maker.expr, at), where, span=stmt.span)
    instead = Read(name, tuple(map(Rank, free)))
    changed = map_expressions(stmt, lambda expr: rewrite(expr, lambda node: instead if node == read else node))
    body = [new for old in cascade.body for new in ((pick, changed) if old is stmt else (old,))]
    return dataclasses.replace(cascade, body=tuple(body))


def _extent(size: Size) -> Expr:
    return Const(size) if isinstance(size, int) else Extent(size)
