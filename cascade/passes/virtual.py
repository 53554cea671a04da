"""Virtual elements: what joins a reduction from outside becomes the state that its trip begins with.

    R0[m] = max[n] X[m,n]                               fold n { state R, D
    R[m] = max(R0[m], sink[m])                   -->        init R[m] = sink[m]
    D0[m] = sum[n] exp(X[m,n] - F[m])                       init D[m] = exp(sink[m] - F[m])
    D[m] = D0[m] + exp(sink[m] - R[m])                      ... }

A sink of attention is an element that every row has: it is folded in first, once, and not joined behind the trip. What
is added to a sum must be what such an element is worth in the frame of the state; then it moves as the sum does.

Only where every coordinate is present: a row without elements would be absent, and with a first element it is not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from cascade.ir import Apply, Cascade, Einsum, Expr, Fold, FoldInit, FoldMerge, Rank, Read, Reduce, Stmt
from cascade.ops import REDUCERS
from cascade.passes.gauge import Readers
from cascade.walk import children, defines, reads, targets, walk, with_children


@dataclass(frozen=True, slots=True)
class Joined:
    """A state that takes the place of a reduction: `outer = op(inner, element)`."""

    inner: str
    outer: Einsum
    element: Expr


def with_virtual(
    cascade: Cascade, fold: Fold, readers: Readers, whole: Callable[[Einsum], bool]
) -> tuple[Fold, dict[str, str]]:
    """The fold with virtual elements in its first state, and which state took the place of which.

    `readers` are the statements that read a tensor; `whole` tells of a reduction whether every coordinate is present.
    """
    if not any(isinstance(stmt, Einsum) and _is_join(stmt) for name in fold.state for stmt in readers.get(name, ())):
        return fold, {}
    owner = {name: stmt for stmt in cascade.body for name in defines(stmt)}
    found: dict[str, Joined] = {}
    for name in fold.state:
        stmt = owner[name]
        if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) and whole(stmt):
            joined = _joined(cascade, stmt, readers)
            if joined is not None and _fits(fold, owner, joined, found):
                found[name] = joined
    if not found:
        return fold, {}
    return _rebuilt(cascade, fold, found), {name: j.outer.target.name for name, j in found.items()}


def _is_join(stmt: Einsum) -> bool:
    return isinstance(stmt.expr, Apply) and stmt.expr.op in [row.op for row in REDUCERS.values()]


def _joined(cascade: Cascade, stmt: Einsum, readers: Readers) -> Joined | None:
    """The one reader of a reduction, where it joins it with something else by the reducer's own operation."""
    name = stmt.target.name
    found = readers.get(name, ())
    if len(found) != 1 or name in [result.name for result in cascade.results]:
        return None
    outer = found[0]
    assert isinstance(stmt.expr, Reduce)
    if not isinstance(outer, Einsum) or outer.where is not None or outer.target.ranks != stmt.target.ranks:
        return None
    own = Read(name, tuple(map(Rank, stmt.target.ranks)))
    joins = isinstance(outer.expr, Apply) and outer.expr.op == REDUCERS[stmt.expr.reducer].op
    if not joins or not isinstance(outer.expr, Apply) or own not in outer.expr.args:
        return None
    element = outer.expr.args[1 - outer.expr.args.index(own)]
    return Joined(name, outer, element)


def _fits(fold: Fold, owner: Mapping[str, Stmt], joined: Joined, found: Mapping[str, Joined]) -> bool:
    """Whether an element is joined: to an extreme, anything known before; to a sum, one in the state's frame."""
    merge = next(m.expr for m in fold.merge if m.target.name == joined.inner)
    own = Read(f"{joined.inner}'", tuple(map(Rank, joined.outer.target.ranks)))
    below = {n.tensor for n in walk(joined.element) if isinstance(n, Read)}
    elsewhere = [m for m in fold.merge if m.target.name != joined.inner and own in list(walk(m.expr))]
    if merge == own:
        return _known_before(below, fold, owner)
    frames = {j.outer.target.name: j for j in found.values()}
    anchor = next((frames[name] for name in below if name in frames), None)
    if anchor is None or elsewhere:
        return False
    value = Apply("exp", (Apply("sub", (anchor.element, Read(anchor.outer.target.name, own.index))),))
    return joined.element == value


def _known_before(names: Collection[str], fold: Fold, owner: Mapping[str, Stmt]) -> bool:
    """Whether tensors, and all that they are made of, need nothing of the fold, directly or through other ranks."""
    inside = {*fold.update, *fold.state, *fold.finalize}
    seen: set[str] = set()
    todo = list(names)
    while todo:
        name = todo.pop()
        if name in inside:
            return False
        if name in owner and name not in seen:
            seen.add(name)
            todo.extend(reads(owner[name]))
    return True


def _rebuilt(cascade: Cascade, fold: Fold, found: Mapping[str, Joined]) -> Fold:
    update = {*fold.update, *(j.outer.target.name for j in found.values())}
    order = [stmt for stmt in cascade.body if update & set(defines(stmt))]
    frames = _frames(order, found)
    init, merge = [], []
    for name in fold.state:
        joined = found.get(name)
        old = next(m for m in fold.merge if m.target.name == name)
        if joined is None:
            init.append(next(i for i in fold.init if i.target.name == name))
            merge.append(FoldMerge(old.target, _moved(old.expr, found)))
            continue
        target = joined.outer.target
        init.append(FoldInit(target, _in_frame(joined.element, frames)))
        merge.append(FoldMerge(target, _moved(old.expr, found)))
    return dataclasses.replace(
        fold,
        state=tuple(found[name].outer.target.name if name in found else name for name in fold.state),
        init=tuple(init),
        update=tuple(defines(stmt)[0] for stmt in order),
        merge=tuple(merge),
        finalize=tuple(name for name in fold.finalize if name not in update),
    )


def _frames(order: Sequence[Stmt], found: Mapping[str, Joined]) -> dict[str, Read]:
    """The guarded frame of every joined state, by its name."""
    outer = {j.outer.target.name for j in found.values()}
    result: dict[str, Read] = {}
    for stmt in order:
        if isinstance(stmt, Einsum) and isinstance(stmt.expr, Apply) and stmt.expr.op == "select":
            base = stmt.expr.args[2]
            if isinstance(base, Read) and base.tensor in outer:
                result[base.tensor] = Read(targets(stmt)[0].name, tuple(map(Rank, stmt.target.ranks)))
    return result


def _in_frame(expr: Expr, frames: Mapping[str, Read]) -> Expr:
    """The expression with guarded frames in place of the states."""
    if isinstance(expr, Read):
        return frames.get(expr.tensor, expr)
    return with_children(expr, tuple(_in_frame(child, frames) for child in children(expr)))


def _moved(expr: Expr, found: Mapping[str, Joined]) -> Expr:
    """A merge that speaks of the joined states: `max(R0', sink)` is R'."""
    if isinstance(expr, Apply):
        for name, joined in found.items():
            outer = joined.outer
            index = tuple(map(Rank, outer.target.ranks))
            assert isinstance(outer.expr, Apply)
            own = tuple(Read(f"{name}'", index) if a == Read(name, index) else a for a in outer.expr.args)
            if expr.op == outer.expr.op and expr.args == own:
                return Read(f"{outer.target.name}'", index)
    if isinstance(expr, Read):
        base = expr.tensor.removesuffix("'")
        if base in found and expr.tensor.endswith("'"):
            return dataclasses.replace(expr, tensor=f"{found[base].outer.target.name}'")
        return expr
    return with_children(expr, tuple(_moved(child, found) for child in children(expr)))
