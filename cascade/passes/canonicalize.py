"""Give every reduction a statement of its own, order statements by dependency, and drop what no result needs.

    cascade f(X[M,N]) -> Y[M,N] {                     cascade f(X[M,N]) -> Y[M,N] {
        Y[m,n] = X[m,n] / (sum[n] X[m,n])      -->        Y_sum[m] = sum[n] X[m,n]
    }                                                     Y[m,n] = X[m,n] / Y_sum[m]
                                                      }

After it each statement is a map, or one reduction of a map: the form in which passes over a rank can be counted and
fused. Equal reductions under equal filters share a statement. A new statement is named after the one it came from and
its reducer, and carries the filter where it concerns it.

Requires: inlined. Ensures: canonical. It does not simplify arithmetic: the author's rounding stays the author's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, assert_never

from cascade.inference import infer_shapes, stated
from cascade.ir import Call, Cascade, Einsum, Expr, Fold, Part, Rank, Read, Reduce, Stmt, Stream, Target, TopK, Wait
from cascade.order import units
from cascade.verify import Invariant, canonical, inlined, well_formed
from cascade.walk import (
    children, defines, expressions, free_ranks, fresh, names, part, reads, targets, walk,
    with_children,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Canonicalize:
    """One reduction a statement, dependency order, nothing dead."""

    name: ClassVar[str] = "canonicalize"
    requires: ClassVar[tuple[Invariant, ...]] = (well_formed, inlined)
    ensures: ClassVar[tuple[Invariant, ...]] = (canonical,)

    def __call__(self, cascade: Cascade) -> Cascade:
        body = _in_order(_live(cascade, _Naming(names(cascade)).body(cascade.body)))
        unchanged = len(body) == len(cascade.body) and all(a is b for a, b in zip(body, cascade.body, strict=True))
        if unchanged:
            return cascade
        return stated(dataclasses.replace(cascade, body=body), infer_shapes(cascade).ranks)


@dataclass(slots=True, eq=False)
class _Naming:
    """The naming of nested reductions: names taken, statements so far, and which reductions have a name."""

    taken: set[str]
    done: list[Stmt] = field(default_factory=list)
    known: dict[tuple[Expr, Expr | None], Read] = field(default_factory=dict)

    def body(self, body: Sequence[Stmt]) -> list[Stmt]:
        for stmt in body:
            self.done.append(self._statement(stmt))
        return self.done

    def _statement(self, stmt: Stmt) -> Stmt:
        if not any(isinstance(node, Reduce) for expr in expressions(stmt) for node in walk(expr)):
            return stmt
        left = targets(stmt)[0]
        match stmt:
            case Einsum():
                return self._einsum(stmt)
            case TopK():
                scope = frozenset((*left.ranks, stmt.rank))
                where = None if stmt.where is None else self._name(stmt.where, left, None, scope)
                return dataclasses.replace(stmt, body=self._name(stmt.body, left, where, scope), where=where)
            case Call():
                raise AssertionError("an inlined cascade has no calls")
            case _:
                assert_never(stmt)

    def _einsum(self, stmt: Einsum) -> Einsum:
        left, scope = stmt.target, frozenset(stmt.target.ranks)
        where = None if stmt.where is None else self._name(stmt.where, left, None, scope)
        top = stmt.expr
        if isinstance(top, Reduce) and set(top.ranks).isdisjoint(left.ranks):
            inner = self._name(top.body, left, where, scope | frozenset(top.ranks))
            expr: Expr = top if inner is top.body else dataclasses.replace(top, body=inner)
        else:
            expr = self._name(top, left, where, scope)
        inits = tuple(dataclasses.replace(init, expr=self._name(init.expr, left, None, scope)) for init in stmt.inits)
        kept = where if where is None or _in_scope(where, left, expr) else None
        if expr is top and kept is stmt.where and all(a.expr is b.expr for a, b in zip(inits, stmt.inits, strict=True)):
            return stmt
        return dataclasses.replace(stmt, expr=expr, where=kept, inits=inits)

    def _name(self, expr: Expr, left: Target, where: Expr | None, scope: frozenset[str]) -> Expr:
        """The expression with each reduction in it replaced by a read of a statement of its own.

        `scope` are the ranks in sight: those of the left side and of the reductions around the expression.
        """
        inner = scope | frozenset(expr.ranks) if isinstance(expr, Reduce) else scope
        expr = with_children(expr, tuple(self._name(child, left, where, inner) for child in children(expr)))
        if not isinstance(expr, Reduce):
            return expr
        ranks, carried = part(expr, where, scope, left.ranks)
        known = self.known.get((expr, carried))
        if known is None:
            name = fresh(f"{left.name}_{expr.reducer}", self.taken)
            self.done.append(Einsum(Target(name, ranks, span=expr.span), expr, carried, span=expr.span))
            known = Read(name, tuple(Rank(rank, span=expr.span) for rank in ranks), span=expr.span)
            self.known[expr, carried] = known
        return known


def _in_scope(where: Expr, left: Target, expr: Expr) -> bool:
    """Whether a filter still concerns a statement once the reductions below its top have gone."""
    bound = expr.ranks if isinstance(expr, Reduce) else ()
    return set(free_ranks(where)) <= {*left.ranks, *bound}


def _live(cascade: Cascade, body: Sequence[Stmt]) -> list[Stmt]:
    """The statements that a result, or the schedule, needs."""
    owner = {name: stmt for stmt in body for name in defines(stmt)}
    wanted = [result.name for result in cascade.results] + [name for name in _scheduled(cascade) if name in owner]
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name in seen or name not in owner:
            continue
        seen.update(defines(owner[name]))
        wanted.extend(reads(owner[name]))
    return [stmt for stmt in body if not seen.isdisjoint(defines(stmt))]


def _scheduled(cascade: Cascade) -> list[str]:
    """The statements that the schedule mentions."""
    found: list[str] = []
    for directive in cascade.schedule:
        parts: tuple[Part, ...] = ()
        if isinstance(directive, Stream):
            parts = directive.parts
        elif isinstance(directive, Wait):
            parts = (directive.part, directive.on)
        found += [part.name for part in parts]
        found += getattr(directive, "statements", ())
        found += (*directive.update, *directive.finalize) if isinstance(directive, Fold) else ()
    return found


def _in_order(body: Sequence[Stmt]) -> tuple[Stmt, ...]:
    """The statements so that each comes after what it reads; the author's order where that already holds."""
    return tuple(stmt for unit in units(body, ()) for stmt in unit.statements)
