"""Traversal and substitution over the IR: the few functions that every stage needs and nobody should write twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import assert_never

from cascade.ir import (
    Apply, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Fold, FoldInit, FoldMerge, Function, Local, Param, Rank,
    Read, Reduce, Result, Stmt, Target, TopK, Use,
)  # fmt: skip


def children(expr: Expr) -> tuple[Expr, ...]:
    """The direct operands of an expression, index expressions of a read included."""
    match expr:  # what is most frequent first: every analysis comes by here
        case Apply() | Use():
            return expr.args
        case Read():
            return expr.index
        case Const() | Rank() | Extent() | Local():
            return ()
        case Cast():
            return (expr.arg,)
        case Reduce():
            return (expr.body,)
        case _:
            assert_never(expr)


def with_children(expr: Expr, new: tuple[Expr, ...]) -> Expr:
    """The expression with other operands; the same object where nothing changed."""
    old = children(expr)
    if len(old) == len(new) and all(a is b for a, b in zip(old, new, strict=True)):
        return expr
    match expr:
        case Const() | Rank() | Extent() | Local():
            return expr
        case Read():
            return dataclasses.replace(expr, index=new)
        case Apply() | Use():
            return dataclasses.replace(expr, args=new)
        case Cast():
            return dataclasses.replace(expr, arg=new[0])
        case Reduce():
            return dataclasses.replace(expr, body=new[0])
        case _:
            assert_never(expr)


def walk(expr: Expr) -> Iterator[Expr]:
    """The expression and everything below it, outside in, left to right, without recursion."""
    stack = [expr]
    while stack:
        node = stack.pop()
        yield node
        stack.extend(reversed(children(node)))


def rewrite(expr: Expr, change: Callable[[Expr], Expr]) -> Expr:
    """The expression with `change` applied to every node, operands first."""
    return change(with_children(expr, tuple(rewrite(child, change) for child in children(expr))))


def free_ranks(expr: Expr) -> tuple[str, ...]:
    """The rank variables that no reduction inside the expression binds, in order of first appearance.

    The ranks of a use count as free; `scopes.scan` sees through the `def` and knows.
    """
    found: dict[str, None] = {}
    _collect_free(expr, frozenset(), found)
    return tuple(found)


def _collect_free(expr: Expr, bound: frozenset[str], found: dict[str, None]) -> None:
    if isinstance(expr, Rank):
        if expr.name not in bound:
            found.setdefault(expr.name)
        return
    inner = bound | frozenset(expr.ranks) if isinstance(expr, Reduce) else bound
    if isinstance(expr, Use):
        for rank in expr.ranks:
            if rank not in bound:
                found.setdefault(rank)
    for child in children(expr):
        _collect_free(child, inner, found)


def tensors_read(exprs: Iterable[Expr]) -> tuple[str, ...]:
    """The tensors that the expressions read, in order of first appearance."""
    return tuple(dict.fromkeys(node.tensor for expr in exprs for node in walk(expr) if isinstance(node, Read)))


def expressions(stmt: Stmt) -> tuple[Expr, ...]:
    """Every expression of a statement: the right side, the filter, the initial values."""
    match stmt:
        case Einsum():
            inits = tuple(init.expr for init in stmt.inits)
            return (stmt.expr, *((stmt.where,) if stmt.where is not None else ()), *inits)
        case TopK():
            return (stmt.body, *((stmt.where,) if stmt.where is not None else ()))
        case Call():
            return ()
        case _:
            assert_never(stmt)


def map_expressions(stmt: Stmt, change: Callable[[Expr], Expr]) -> Stmt:
    """The statement with `change` applied to each of its expressions as a whole."""
    match stmt:
        case Einsum():
            return dataclasses.replace(
                stmt,
                expr=change(stmt.expr),
                where=None if stmt.where is None else change(stmt.where),
                inits=tuple(dataclasses.replace(init, expr=change(init.expr)) for init in stmt.inits),
            )
        case TopK():
            where = None if stmt.where is None else change(stmt.where)
            return dataclasses.replace(stmt, body=change(stmt.body), where=where)
        case Call():
            return stmt
        case _:
            assert_never(stmt)


def fold_parts(fold: Fold) -> tuple[FoldInit | FoldMerge, ...]:
    """The first states and the merges of a fold."""
    return (*fold.init, *fold.merge)


def fold_expressions(fold: Fold) -> tuple[Expr, ...]:
    """Every expression of a fold: its first states that are not empty, and its merges."""
    return tuple(piece.expr for piece in fold_parts(fold) if piece.expr is not None)


def map_fold(fold: Fold, change: Callable[[Expr], Expr]) -> Fold:
    """The fold with `change` applied to each of its expressions as a whole."""
    return dataclasses.replace(
        fold,
        init=tuple(i if i.expr is None else dataclasses.replace(i, expr=change(i.expr)) for i in fold.init),
        merge=tuple(dataclasses.replace(merge, expr=change(merge.expr)) for merge in fold.merge),
    )


def targets(stmt: Stmt) -> tuple[Target, ...]:
    """The targets of a statement; a call defines whole tensors and has none with ranks."""
    match stmt:
        case Einsum():
            return (stmt.target,)
        case TopK():
            return (stmt.values, stmt.coords)
        case Call():
            return ()
        case _:
            assert_never(stmt)


def defines(stmt: Stmt) -> tuple[str, ...]:
    """The names of the tensors that a statement defines."""
    return stmt.targets if isinstance(stmt, Call) else tuple(target.name for target in targets(stmt))


def reads(stmt: Stmt) -> tuple[str, ...]:
    """The names of the tensors that a statement reads, its own earlier coordinates included."""
    return tuple(dict.fromkeys(stmt.args)) if isinstance(stmt, Call) else tensors_read(expressions(stmt))


def substitute(expr: Expr, ranks: Mapping[str, Expr], locals_: Mapping[str, Expr] | None = None) -> Expr:
    """The expression with free rank variables, and parameters of a `def`, replaced.

    The caller makes sure that no replacement has a free rank that a reduction inside `expr` binds.
    """
    if isinstance(expr, Rank):
        return ranks.get(expr.name, expr)
    if isinstance(expr, Local) and locals_ is not None:
        return locals_.get(expr.name, expr)
    inner = {r: e for r, e in ranks.items() if r not in expr.ranks} if isinstance(expr, Reduce) else ranks
    return with_children(expr, tuple(substitute(child, inner, locals_) for child in children(expr)))


def names(cascade: Cascade) -> set[str]:
    """Every name that the cascade uses for a tensor, a rank variable, a symbol, a definition or a stream."""
    found = {cascade.name}
    declared: tuple[Param | Result, ...] = (*cascade.params, *cascade.results)
    for decl in declared:
        found.update((decl.name, *(size for size in decl.shape if isinstance(size, str))))
    for given in cascade.given:
        found.update((given.rank, *((given.size,) if isinstance(given.size, str) else ())))
    for stmt in cascade.body:
        found.update(defines(stmt))
        found.update(reads(stmt))
        for target in targets(stmt):
            found.update(target.ranks)
        for expr in expressions(stmt):
            found.update(_names_in(expr))
    for directive in cascade.schedule:
        if isinstance(directive, Fold):
            found.update(_names_of_fold(directive))
    found.update(definition.name for definition in cascade.uses)
    return found


def _names_of_fold(fold: Fold) -> Iterator[str]:
    """The names of a fold; a primed one says nothing but its state."""
    yield from (fold.rank, *fold.state, *fold.update, *fold.finalize)
    for piece in fold_parts(fold):
        yield from (piece.target.name, *piece.target.ranks)
    for expr in fold_expressions(fold):
        yield from _names_in(expr)
    yield from (name.removesuffix("'") for name in tensors_read(fold_expressions(fold)))


def _names_in(expr: Expr) -> Iterator[str]:
    for node in walk(expr):
        match node:
            case Rank() | Extent():
                yield node.name
            case Reduce() | Use():
                yield from node.ranks


def fresh(wanted: str, taken: set[str]) -> str:
    """`wanted`, or `wanted_1`, `wanted_2`, ... whichever is first unused; the name is added to `taken`."""
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name


def definition(cascade: Cascade, name: str) -> Function | Cascade | None:
    """The definition of that name that travels with the cascade."""
    return next((found for found in cascade.uses if found.name == name), None)


def part(
    expr: Expr, where: Expr | None, scope: frozenset[str], left: tuple[str, ...]
) -> tuple[tuple[str, ...], Expr | None]:
    """The ranks and the filter of a statement that is to hold `expr`, taken out of one with the left side `left`.

    `scope` are the ranks in sight around `expr`. The filter `where` goes along if a reduction of `expr` binds a rank of
    it: then the value depends on the other ranks of the filter as well. It also goes along if all its ranks are free
    in `expr`: there it removes only coordinates that the statement `expr` came from removes too. The ranks of the left
    side come first, in its order.
    """
    free = free_ranks(expr)
    carried, ranks = None, free
    if where is not None:
        wanted = free_ranks(where)
        bound = {rank for node in walk(expr) if isinstance(node, Reduce) for rank in node.ranks}
        if set(wanted) <= set(free) or (not bound.isdisjoint(wanted) and set(wanted) <= scope | bound):
            carried, ranks = where, (*free, *(rank for rank in wanted if rank not in bound and rank not in free))
    return (*(rank for rank in left if rank in ranks), *(rank for rank in ranks if rank not in left)), carried
