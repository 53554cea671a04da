"""Run the rows of a product together that share an operand which data chooses.

    H_sum[t,j,f] = sum[d] X[t,d] * W[I[t,j],d,f]          the same statements, and
    H[t,j,f] = silu(H_sum[t,j,f])                    -->      group {H_sum, H} by I[t,j] < N

Row by row each reads a matrix of its own. In the order of I the rows of one value make a matrix product with one
operand, so that it is read once for many of them. Products of one index and of the same ranks that do not need each
other are one group, with the maps that go on with what they give. A sum over ranks of the index and of the operand at
once is taken apart: the product first, the weighted sum over rows behind it. What is stored of a row is rounded: with
its weight, what cancels in a sum of equal rows would not.

    Y[t,d] = sum[j,f] G[t,j] * H[t,j,f] * V[I[t,j],f,d]  -->  Y_rows[t,j,d] = sum[f] H[t,j,f] * V[I[t,j],f,d]
                                                              Y[t,d] = sum[j] G[t,j] * Y_rows[t,j,d]

Requires: inlined, canonical. Ensures: canonical. Rests on: a product is what it is in whatever order its rows are gone
through. What does not pay stays as it is, and `judged` says why: an operand without a rank of its own is no matrix,
another side with ranks of its own has rows enough already. How many rows a value has is not known here; it weighs no
sizes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from cascade.inference import infer_shapes, stated
from cascade.ir import (
    Apply, Cascade, Einsum, Expr, Fold, Fuse, GroupBy, Rank, Read, Reduce, Size, Stmt,
    Target,
)  # fmt: skip
from cascade.text import render_expr
from cascade.verify import Invariant, canonical, inlined, well_formed
from cascade.walk import expressions, free_ranks, fresh, map_expressions, map_fold, names, reads, rewrite, walk


@dataclass(frozen=True, slots=True)
class GroupRows:
    """Products with an operand that data chooses, and what follows them, in groups of rows of one value."""

    name: ClassVar[str] = "group-rows"
    requires: ClassVar[tuple[Invariant, ...]] = (well_formed, inlined, canonical)
    ensures: ClassVar[tuple[Invariant, ...]] = (canonical,)

    def __call__(self, cascade: Cascade) -> Cascade:
        after = _apart(cascade)
        made = tuple(_groups(after))
        if not made:
            return cascade
        return _rows_first(dataclasses.replace(after, schedule=(*after.schedule, *made)), made)


@dataclass(frozen=True, slots=True)
class Judged:
    """A product with an operand that data chooses: by which index, of how many values, and why it is in no group."""

    name: str
    key: Read
    size: Size
    reason: str = ""


def judged(cascade: Cascade) -> tuple[Judged, ...]:
    """Every product of a canonical cascade with an operand that data chooses, in order."""
    shapes = infer_shapes(cascade).tensors
    return tuple(found for stmt in cascade.body if (found := _judge(stmt, shapes)) is not None)


# --- products --------------------------------------------------------------------------------------------------------


def _judge(stmt: Stmt, shapes: Mapping[str, tuple[Size, ...]]) -> Judged | None:
    """What is known of a statement; None where it is no sum of a product with an operand that data chooses."""
    if not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce) or stmt.expr.reducer != "sum":
        return None
    terms = _factors(stmt.expr.body)
    chosen = [(term, place) for term in terms if isinstance(term, Read) for place in _places(term)]
    if len(terms) < 2 or not chosen:
        return None
    operand, place = chosen[0]
    key = operand.index[place]
    assert isinstance(key, Read)
    found = Judged(stmt.target.name, key, shapes[operand.tensor][place])
    reason = _unsuited(stmt, stmt.expr, terms, operand, found) if len(chosen) == 1 else MORE_THAN_ONE
    if not reason and not _plain(stmt, found, shapes):
        reason = "a factor is read at coordinates that are computed of a row's"
    return dataclasses.replace(found, reason=reason)


def _places(read: Read) -> Iterator[int]:
    """The dimensions of a read that a tensor indexes."""
    return (place for place, index in enumerate(read.index) if isinstance(index, Read))


MORE_THAN_ONE = "more than one operand is chosen by data"


def _unsuited(stmt: Einsum, reduction: Reduce, terms: Sequence[Expr], operand: Read, found: Judged) -> str:
    """Why the rows of a product are not grouped; "" where they are."""
    key = found.key
    if stmt.where is not None or stmt.inits:
        return "the product is filtered"
    if not all(isinstance(index, Rank) for index in key.index) or len(set(key.index)) < len(key.index):
        return f"{render_expr(key)} is not read at ranks alone"
    rows = set(free_ranks(key))
    own = {rank for index in operand.index if index != key for rank in free_ranks(index)}
    others = {rank for term in terms if term is not operand for rank in free_ranks(term)}
    if own & rows:
        return f"{operand.tensor} differs from row to row by more than {key.tensor}"
    if not own & others & set(reduction.ranks):
        return f"nothing is summed of {operand.tensor} together with another factor"
    if not (own - others) & set(stmt.target.ranks):
        return f"{operand.tensor} has no rank of its own in the result: a row of it is used once"
    if beside := sorted((others - rows - own) & set(stmt.target.ranks)):
        return f"the other side has {beside[0]}, rows enough for each {render_expr(key)}"
    if not rows <= set(stmt.target.ranks):
        return "the sum is over the rows as well"
    return ""


def _plain(stmt: Einsum, found: Judged, shapes: Mapping[str, tuple[Size, ...]]) -> bool:
    """Whether everything is read at a row itself, and what the index chooses has as many values."""
    rows = set(free_ranks(found.key))
    nodes = [node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)]
    return all(
        shapes[node.tensor][place] == found.size
        if index == found.key
        else isinstance(index, Rank) or rows.isdisjoint(free_ranks(index))
        for node in nodes
        for place, index in enumerate(node.index)
    )


def _factors(expr: Expr) -> tuple[Expr, ...]:
    if isinstance(expr, Apply) and expr.op == "mul":
        return (*_factors(expr.args[0]), *_factors(expr.args[1]))
    return (expr,)


# --- sums over rows --------------------------------------------------------------------------------------------------


def _apart(cascade: Cascade) -> Cascade:
    """The cascade with products that are summed over rows at once taken apart, if the product can be grouped then."""
    kept = {name for item in cascade.schedule if isinstance(item, (Fuse, Fold)) for name in _members(item)}
    shapes, taken = infer_shapes(cascade), names(cascade)
    body: list[Stmt] = []
    for stmt in cascade.body:
        alone = isinstance(stmt, Einsum) and stmt.target.name not in kept
        body += (_parts(stmt, shapes.tensors, taken) if alone else None) or [stmt]
    if len(body) == len(cascade.body):
        return cascade
    return stated(dataclasses.replace(cascade, body=tuple(body)), shapes.ranks)


def _members(item: Fuse | Fold) -> tuple[str, ...]:
    return item.statements if isinstance(item, Fuse) else (*item.update, *item.finalize)


def _parts(stmt: Stmt, shapes: Mapping[str, tuple[Size, ...]], taken: set[str]) -> list[Stmt] | None:
    """The product of each row and the sum over rows; None where the sum is over no rows, or the product no better."""
    found = _judge(stmt, shapes)
    if found is None or not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce):
        return None
    over = [rank for rank in stmt.expr.ranks if rank in free_ranks(found.key)]
    inner = tuple(rank for rank in stmt.expr.ranks if rank not in over)
    if not over or not inner:
        return None
    terms = _factors(stmt.expr.body)
    inside = [term for term in terms if not set(free_ranks(term)).isdisjoint(inner)]
    rows = tuple(free_ranks(found.key))
    ranks = (*rows, *(rank for rank in stmt.target.ranks if rank not in rows))
    kept = {rank for term in inside for rank in free_ranks(term)}
    target = Target(f"{stmt.target.name}_rows", tuple(rank for rank in ranks if rank in kept), span=stmt.span)
    part = Einsum(target, Reduce("sum", inner, _product(inside)), span=stmt.span)
    again = _judge(part, shapes)
    if again is None or again.reason:
        return None
    target = dataclasses.replace(target, name=fresh(target.name, taken))
    read = Read(target.name, tuple(map(Rank, target.ranks)))
    outside = [term for term in terms if term not in inside]
    whole = dataclasses.replace(stmt, expr=Reduce("sum", tuple(over), _product([*outside, read]), span=stmt.expr.span))
    return [dataclasses.replace(part, target=target), whole]


def _product(terms: Sequence[Expr]) -> Expr:
    found = terms[0]
    for term in terms[1:]:
        found = Apply("mul", (found, term))
    return found


# --- the order of ranks ----------------------------------------------------------------------------------------------


def _rows_first(cascade: Cascade, groups: Sequence[GroupBy]) -> Cascade:
    """The cascade with the ranks of the index in front in what groups define: a row lies in one piece in memory.

    Results keep the ranks that are declared.
    """
    fixed = {result.name for result in cascade.results}
    moved: dict[str, tuple[int, ...]] = {}
    for item in groups:
        rows = free_ranks(item.key)
        for stmt in cascade.body:
            if isinstance(stmt, Einsum) and stmt.target.name in item.statements and stmt.target.name not in fixed:
                ranks = stmt.target.ranks
                order = [ranks.index(rank) for rank in (*rows, *(rank for rank in ranks if rank not in rows))]
                if order != sorted(order):
                    moved[stmt.target.name] = tuple(order)

    def placed(target: Target) -> Target:
        known = moved.get(target.name)
        return target if known is None else dataclasses.replace(target, ranks=tuple(target.ranks[at] for at in known))

    def read(node: Expr) -> Expr:
        known = moved.get(node.tensor.removesuffix("'")) if isinstance(node, Read) else None
        if known is None or not isinstance(node, Read):
            return node
        return dataclasses.replace(node, index=tuple(node.index[at] for at in known))

    def statement(stmt: Stmt) -> Stmt:
        stmt = map_expressions(stmt, lambda expr: rewrite(expr, read))
        return dataclasses.replace(stmt, target=placed(stmt.target)) if isinstance(stmt, Einsum) else stmt

    def fold(item: Fold) -> Fold:
        item = map_fold(item, lambda expr: rewrite(expr, read))
        init = tuple(dataclasses.replace(one, target=placed(one.target)) for one in item.init)
        return dataclasses.replace(
            item, init=init, merge=tuple(dataclasses.replace(one, target=placed(one.target)) for one in item.merge)
        )

    if not moved:
        return cascade
    schedule = tuple(fold(item) if isinstance(item, Fold) else item for item in cascade.schedule)
    return dataclasses.replace(cascade, body=tuple(map(statement, cascade.body)), schedule=schedule)


# --- groups ----------------------------------------------------------------------------------------------------------


def _groups(cascade: Cascade) -> Iterator[GroupBy]:
    """Products of one index that do not need each other, and the maps that go on with them."""
    known = {name for item in cascade.schedule if isinstance(item, GroupBy) for name in item.statements}
    products = {found.name: found for found in judged(cascade) if not found.reason and found.name not in known}
    owner = {stmt.target.name: stmt for stmt in cascade.body if isinstance(stmt, Einsum)}
    shapes = infer_shapes(cascade).tensors
    groups: list[tuple[Judged, list[str]]] = []
    for stmt in cascade.body:
        if not isinstance(stmt, Einsum) or stmt.target.name in known:
            continue
        found = products.get(stmt.target.name)
        home = next((g for g in groups if _joins(stmt, found, g[0], g[1], owner, shapes)), None)
        if home is not None:
            home[1].append(stmt.target.name)
        elif found is not None:
            groups.append((found, [stmt.target.name]))
    return (GroupBy(tuple(members), found.key, found.size) for found, members in groups)


def _joins(
    stmt: Einsum, found: Judged | None, first: Judged, members: Sequence[str], owner: dict[str, Einsum],
    shapes: Mapping[str, tuple[Size, ...]],
) -> bool:  # fmt: skip
    """Whether a statement belongs to a group: another product beside its products, or a map of what they give."""
    leader = owner[first.name]
    if set(stmt.target.ranks) != set(leader.target.ranks):
        return False
    if found is not None:
        assert isinstance(stmt.expr, Reduce) and isinstance(leader.expr, Reduce)
        same = (found.key, found.size) == (first.key, first.size) and set(stmt.expr.ranks) == set(leader.expr.ranks)
        return same and not _needs(stmt, set(members), owner)
    maps = not any(isinstance(node, Reduce) for node in walk(stmt.expr)) and stmt.where is None and not stmt.inits
    return maps and not set(reads(stmt)).isdisjoint(members) and _plain(stmt, first, shapes)


def _needs(stmt: Einsum, members: set[str], owner: dict[str, Einsum]) -> bool:
    """Whether a statement needs one of some others, directly or not."""
    todo, seen = list(reads(stmt)), set[str]()
    while todo:
        name = todo.pop()
        if name in members:
            return True
        if name not in seen and name in owner:
            seen.add(name)
            todo += reads(owner[name])
    return False
