"""What only one kernel reads, once in each of its programs, by the names that ranks have there.

    A[t,h,e] = X[t,h,e] * c[t,e] + R[t,h,e];  S[h,m,n] = sum[e] A[m,h,e] * C[n,h,e];  R = max[n] S ...
    -->  A[m,h,e] = X[m,h,e] * c[m,e] + R[m,h,e]          with the tile of S that it is for, before the stream over n

So a rotary embedding or a norm of queries needs no kernel and no memory of its own, whatever reads them. Keys are not
computed like that: each program that goes through them would do it again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

from cascade.backends.triton.partition import Group, all_ranks, leads, partition, without
from cascade.inference import infer_shapes
from cascade.ir import Cascade, Einsum, Expr, Rank, Read, Reduce, Stmt, Target
from cascade.walk import defines, expressions, map_expressions, reads, rewrite, walk


def with_prologues(cascade: Cascade, extents: Mapping[str, int]) -> Cascade:
    """The cascade with ranks renamed where statements can then stand in the kernel that reads them; else itself.

    `extents` are those of ranks.
    """
    current = cascade
    while _has_other_names(current) and (found := next(_prologues(current, extents), None)) is not None:
        current = found
    return current


def _has_other_names(cascade: Cascade) -> bool:
    """Whether something is read at other rank variables than it was made with: else there is nothing to rename."""
    ranks = {stmt.target.name: stmt.target.ranks for stmt in cascade.body if isinstance(stmt, Einsum)}
    nodes = (node for stmt in cascade.body for expr in expressions(stmt) for node in walk(expr))
    found = (node for node in nodes if isinstance(node, Read) and node.tensor in ranks)
    return any(node.index != tuple(map(Rank, ranks[node.tensor])) for node in found)


def _prologues(cascade: Cascade, extents: Mapping[str, int]) -> Iterator[Cascade]:
    """The cascade with the statements of a kernel by the names of ranks of another, for each pair that this suits."""
    groups = [group for group in partition(cascade, extents) if isinstance(group, Group)]
    results = {result.name for result in cascade.results}
    for first in groups:
        made = set(first.names)
        readers = [stmt for stmt in cascade.body if stmt not in first.plain and not made.isdisjoint(reads(stmt))]
        then = next((group for group in groups if readers and all(stmt in group.plain for stmt in readers)), None)
        maps = all(isinstance(stmt, Einsum) and not stmt.inits for stmt in first.plain)
        if then is None or not maps or not results.isdisjoint(made):
            continue
        names = _names(first, readers, cascade)
        if names is not None and any(old != new for old, new in names.items()):
            changed = {stmt: renamed(stmt, names) for stmt in first.plain}
            if leads(tuple(changed.values()), then.plain, cascade, extents):
                body = tuple(changed.get(stmt, stmt) for stmt in cascade.body)
                kept = (without(item, made) for item in cascade.schedule)
                yield dataclasses.replace(cascade, body=body, schedule=tuple(item for item in kept if item is not None))


def _names(first: Group, readers: list[Stmt], cascade: Cascade) -> dict[str, str] | None:
    """The ranks of a kernel's statements by their names where these are read; None where that is not one for each."""
    sizes = infer_shapes(cascade).ranks
    ranks = {name: stmt.target.ranks for stmt in first.plain if isinstance(stmt, Einsum) for name in defines(stmt)}
    found: dict[str, str] = {}
    for read in (node for stmt in readers for expr in expressions(stmt) for node in walk(expr)):
        if not isinstance(read, Read) or read.tensor not in ranks:
            continue
        for old, part in zip(ranks[read.tensor], read.index, strict=True):
            if not isinstance(part, Rank) or found.setdefault(old, part.name) != part.name:
                return None
            if sizes[old] != sizes[part.name]:
                return None
    every = {rank for stmt in first.plain for rank in all_ranks(stmt)}
    found |= {rank: rank for rank in every - set(found)}
    return found if len(set(found.values())) == len(found) else None


def renamed(stmt: Stmt, names: Mapping[str, str]) -> Stmt:
    """A statement with other names for its ranks."""

    def change(expr: Expr) -> Expr:
        if isinstance(expr, Rank):
            return Rank(names[expr.name])
        if isinstance(expr, Reduce):
            return dataclasses.replace(expr, ranks=tuple(names[rank] for rank in expr.ranks))
        return expr

    assert isinstance(stmt, Einsum), "groups of other statements have no names"
    changed = map_expressions(stmt, lambda expr: rewrite(expr, change))
    assert isinstance(changed, Einsum)
    target = Target(stmt.target.name, tuple(names[rank] for rank in stmt.target.ranks))
    return dataclasses.replace(changed, target=target)
