"""Counts of what is absent nowhere, as the extents that they are.

    Z_x[t,d] = Z[t,d] * Z[t,d];  S[t] = sum[d] Z_x[t,d];  C[t] = count[d] Z_x[t,d];  Y[t,d] = Z[t,d] / (S[t] / C[t])
    -->  S[t] = sum[d] Z[t,d] * Z[t,d];  Y[t,d] = Z[t,d] / (S[t] / D)

It may take extents to say that nothing is: h//4 is one of the G keys of every head h where H is no more than 4 G. So
the passes leave such counts. What has a name only because it was summed and counted goes back into its sum.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Collection, Mapping

from cascade.backends.triton.partition import without
from cascade.bounds import absent_tensors
from cascade.inference import infer_dtypes, infer_shapes
from cascade.ir import Apply, Cascade, Const, DType, Einsum, Expr, Extent, Fold, Read, Reduce, Size, Stmt
from cascade.presence import lacks
from cascade.walk import defines, expressions, map_expressions, map_fold, reads, rewrite, substitute, walk


def with_extents(cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType]) -> Cascade:
    """The cascade without such counts; itself where there are none, or where a type would become another.

    `extents` are those of the shape symbols that are the same in all calls, `inputs` the types of the parameters.
    """
    results = {result.name for result in cascade.results}
    counts = [stmt for stmt in cascade.body if isinstance(stmt, Einsum) and _is_count(stmt)]
    counts = [stmt for stmt in counts if stmt.target.name not in results | _needed_on_the_way(cascade)]
    if not counts:
        return cascade
    absent, sizes = absent_tensors(cascade, extents), infer_shapes(cascade).ranks
    ranks = {rank: n for rank, size in sizes.items() if (n := size if isinstance(size, int) else extents.get(size))}
    found: dict[str, Expr] = {}
    counted: set[str] = set()
    for stmt in counts:
        assert isinstance(stmt.expr, Reduce)
        if not lacks(stmt.expr.body, absent, None, cascade, {**ranks, **extents}):
            found[stmt.target.name] = _elements([sizes[rank] for rank in stmt.expr.ranks])
            counted |= {node.tensor for node in walk(stmt.expr.body) if isinstance(node, Read)}
    changed = _without_names(_replaced(cascade, found), counted - results)
    before, after = infer_dtypes(cascade, inputs), infer_dtypes(changed, inputs)
    return changed if all(before[name] is dtype for name, dtype in after.items()) else cascade


def _needed_on_the_way(cascade: Cascade) -> set[str]:
    """What folds read of states while they are not complete: a count of the elements so far is no extent."""
    found: set[str] = set()
    for item in cascade.schedule:
        if isinstance(item, Fold):
            for merge in item.merge:
                read = {node.tensor.rstrip("'") for node in walk(merge.expr) if isinstance(node, Read)}
                found |= (read & set(item.state)) - {merge.target.name}
            updates = (stmt for stmt in cascade.body if not set(defines(stmt)).isdisjoint(item.update))
            found |= {name for stmt in updates for name in reads(stmt)} & set(item.state)
    return found


def _is_count(stmt: Einsum) -> bool:
    return isinstance(stmt.expr, Reduce) and stmt.expr.reducer == "count" and stmt.where is None and not stmt.inits


def _elements(sizes: list[Size]) -> Expr:
    parts: list[Expr] = [Const(size) if isinstance(size, int) else Extent(size) for size in sizes]
    return functools.reduce(lambda a, b: Apply("mul", (a, b)), parts[1:], parts[0])


def _replaced(cascade: Cascade, values: Mapping[str, Expr]) -> Cascade:
    """The cascade with values in the place of tensors, which are no longer computed."""

    def change(expr: Expr) -> Expr:
        return rewrite(expr, lambda node: values.get(node.tensor, node) if isinstance(node, Read) else node)

    body = (map_expressions(stmt, change) for stmt in cascade.body if values.keys().isdisjoint(defines(stmt)))
    left = (found for item in cascade.schedule if (found := without(item, values)) is not None)
    schedule = (map_fold(item, change) if isinstance(item, Fold) else item for item in left)
    return dataclasses.replace(cascade, body=tuple(body), schedule=tuple(schedule))


def _without_names(cascade: Cascade, names: Collection[str]) -> Cascade:
    """The cascade with plain maps of these names put into the one reduction that reads them."""
    for name in sorted(names):
        readers = Counter(s for s in cascade.body for e in expressions(s) for node in walk(e) if _reads(node, name))
        maps = [stmt for stmt in cascade.body if isinstance(stmt, Einsum) and stmt.target.name == name]
        if maps and len(readers) == 1 and all(map(_is_map, maps)) and all(map(_is_reduction, readers)):
            cascade = _put_in(cascade, maps[0])
    return cascade


def _reads(expr: Expr, name: str) -> bool:
    return isinstance(expr, Read) and expr.tensor == name


def _is_map(stmt: Einsum) -> bool:
    reduces = any(isinstance(node, Reduce) for node in walk(stmt.expr))
    return stmt.where is None and not stmt.inits and not reduces


def _is_reduction(stmt: Stmt) -> bool:
    return isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce)


def _put_in(cascade: Cascade, stmt: Einsum) -> Cascade:
    name, ranks = stmt.target.name, stmt.target.ranks

    def change(expr: Expr) -> Expr:
        def read(node: Expr) -> Expr:
            same = isinstance(node, Read) and node.tensor == name
            return substitute(stmt.expr, dict(zip(ranks, node.index, strict=True))) if same else node  # type: ignore[union-attr]

        return rewrite(expr, read)

    body = tuple(map_expressions(other, change) for other in cascade.body if other is not stmt)
    schedule = (found for item in cascade.schedule if (found := without(item, {name})) is not None)
    return dataclasses.replace(cascade, body=body, schedule=tuple(schedule))
