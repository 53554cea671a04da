"""A stream shared by several programs: each folds a part of it, a second kernel merges their states.

    D[m] = sum[n] P[m,n]  in a fold with  merge D[m] = D'[m] * exp(R'[m] - R[m])
    -->  programs leave D_part[p,m], R_part[p,m];  then  R[m] = max[p] R_part[p,m],
         D[m] = sum[p] D_part[p,m] * exp(R_part[p,m] - R[m])

What merges is the merge of the fold, once more: nothing is known of what is folded.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence

from cascade.backends.triton.lower import guarded_merge, reducer_of
from cascade.backends.triton.partition import Group, Trips
from cascade.backends.triton.plan import Partial
from cascade.backends.triton.recurrence import stepped
from cascade.backends.triton.shares import Shares
from cascade.inference import stated
from cascade.ir import (
    Apply,
    Cascade,
    Const,
    DType,
    Einsum,
    Expr,
    Extent,
    Fold,
    Local,
    Param,
    Rank,
    Read,
    Reduce,
    Result,
    Size,
    Stmt,
    Target,
)
from cascade.ops import REDUCERS
from cascade.walk import defines, map_expressions, reads, rewrite


def divisible(group: Group, stored: Collection[str]) -> bool:
    """Whether the stream of a group can be shared: one trip, and behind it only states are needed.

    A state that begins with elements of its own would have them once a part; a recurrence goes on where the part
    before has ended.
    """
    if group.arrangement.stream is None or not group.arrangement.shared or stepped(group.statements):
        return False
    trips = Trips.of(group)
    states = [stmt for stmt in group.statements if trips.kind[defines(stmt)[0]] == "state"]
    begun = group.fold is not None and any(init.expr is not None for init in group.fold.init)
    merged = all(isinstance(stmt, Einsum) and REDUCERS[reducer_of(stmt)].op is not None for stmt in states)
    return trips.count == 1 and merged and not begun and all(trips.kind[name] != "block" for name in stored)


def merging(
    name: str,
    group: Group,
    partial: Sequence[Partial],
    part: str,
    results: Sequence[Result],
    shapes: Mapping[str, tuple[Size, ...]],
    sizes: Mapping[str, Size],
    extents: Mapping[str, int],
    dtypes: Mapping[str, DType],
    shares: Shares | None = None,
) -> Cascade:
    """The cascade that merges what programs have left of a group, and goes on from there to its results.

    `shapes` and `dtypes` are those of tensors, `sizes` the extents of ranks, `extents` the numbers of symbols. With
    `shares` a coordinate has those of all parts that its tables name.
    """
    trips = Trips.of(group)
    tensors = {item.state: item for item in partial}
    flags = [item for item in partial if trips.kind.get(item.state) != "state"]
    at: Expr = Rank(part) if shares is None else shares.place
    body: list[Stmt] = [_seen(item, part) for item in flags] if shares is None else []
    seen: dict[str, Expr] = {item.state: Read(item.state, tuple(map(Rank, item.ranks))) for item in flags}
    if shares is not None:  # part by part, so that one trip is enough
        seen = {item.state: _flag(item, at) for item in flags}
    for stmt in group.statements:
        kind = trips.kind[defines(stmt)[0]]
        if kind == "state":
            assert isinstance(stmt, Einsum)
            tests = (seen[t.name] if isinstance(t, Local) else t for t in tensors[stmt.target.name].live)
            own = () if shares is None else (shares.own,)
            body.append(_merged(stmt, group, tensors, part, at, _all_of((*tests, *own))))
        elif kind in ("of state", "after", "before"):
            body.append(stmt)
    body = _needed(body, {result.name for result in results})
    bound = {size for result in results for size in result.shape} | {sizes[rank] for i in partial for rank in i.ranks}
    if shares is not None:
        dtypes, shapes = {**dtypes, shares.before: DType.I32}, {**shapes, shares.before: (sizes[part],)}
    body = [numbered(stmt, bound, extents) for stmt in body]
    known = {made for stmt in body for made in defines(stmt)}
    stored = {item.tensor.name: item for item in partial}
    params = []
    for read in dict.fromkeys(read for stmt in body for read in reads(stmt) if read not in known):
        if read in stored:
            item = stored[read]
            params.append(Param(read, item.tensor.dtype, tuple(sizes[rank] for rank in (part, *item.ranks))))
        else:
            params.append(Param(read, dtypes[read], shapes[read]))
    typed = tuple(dataclasses.replace(result, dtype=result.dtype or dtypes[result.name]) for result in results)
    schedule = () if shares is None else _folded(body, group, part)
    return stated(Cascade(name, tuple(params), typed, tuple(body), schedule), sizes)


def numbered(stmt: Stmt, bound: Collection[Size], extents: Mapping[str, int]) -> Stmt:
    """A statement with numbers for the extents that no tensor of its cascade has."""

    def number(expr: Expr) -> Expr:
        return Const(extents[expr.name]) if isinstance(expr, Extent) and expr.name not in bound else expr

    return map_expressions(stmt, lambda expr: rewrite(expr, number))


def _needed(body: Sequence[Stmt], results: Collection[str]) -> list[Stmt]:
    """The statements that the results are made of: what comes before the stream may be for the states alone."""
    needed = set(results)
    found: list[Stmt] = []
    for stmt in reversed(body):
        if not needed.isdisjoint(defines(stmt)):
            needed |= set(reads(stmt))
            found.append(stmt)
    return found[::-1]


def _all_of(tests: Iterable[Expr]) -> Expr | None:
    """The tests as one; None where there are none."""
    known = list(tests)
    return functools.reduce(lambda a, b: Apply("and", (a, b)), known) if known else None


def _folded(body: Sequence[Stmt], group: Group, part: str) -> tuple[Fold, ...]:
    """The fold of a group over parts instead of the stream: a coordinate may have any number of them."""
    fold, made = group.fold, [name for stmt in body for name in defines(stmt)]
    if fold is None:
        return ()
    update, final = (tuple(name for name in made if name in names) for names in (fold.update, fold.finalize))
    return (dataclasses.replace(fold, rank=part, update=update, finalize=final),)


def _flag(item: Partial, at: Expr) -> Expr:
    """Whether anything was present in a part: flags are stored as integers."""
    return Apply("gt", (Read(item.tensor.name, (at, *map(Rank, item.ranks))), Const(0)))


def _seen(item: Partial, part: str) -> Einsum:
    """Whether anything was present in any part."""
    return Einsum(Target(item.state, item.ranks), Reduce("any", (part,), _flag(item, Rank(part))))


def _merged(
    stmt: Einsum,
    group: Group,
    partial: Mapping[str, Partial],
    part: str,
    at: Expr,
    where: Expr | None,
) -> Einsum:
    """A state as the reduction over the parts, which lie `at` some place, of what each of them counts for."""
    name, ranks = stmt.target.name, stmt.target.ranks
    expr: Expr = Read(f"{name}'", tuple(map(Rank, ranks)))
    for merge in group.fold.merge if group.fold else ():
        if merge.target.name == name:
            expr = guarded_merge(merge, group)

    def parted(node: Expr) -> Expr:
        if isinstance(node, Read) and node.tensor.endswith("'"):
            item = partial[node.tensor[:-1]]
            kept = tuple(at for at in node.index if isinstance(at, Rank) and at.name in item.ranks)
            return Read(item.tensor.name, (at, *kept))
        return node

    reducer = {"count": "sum"}.get(reducer_of(stmt), reducer_of(stmt))  # what is counted in parts adds up
    return Einsum(stmt.target, Reduce(reducer, (part,), rewrite(expr, parted)), where)
