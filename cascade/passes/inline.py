"""Put the definitions that a cascade uses in the place of their uses.

    cascade f(X[N]) -> Y[N] {                 cascade f(X[N]) -> Y[N] {
        Y[n] = softmax[n] 2.0 * X[n]   -->        Y_x[n] = 2.0 * X[n]
    }                                             Y[n] = exp(Y_x[n] - (max[n] Y_x[n])) / (sum[n] exp(...))
                                              }

An argument that the body of a `def` mentions more than once, and that is more than a read, gets a statement of its
own, so that nothing is computed twice. How many coordinates are present (the divisor of a `mean`) is an extent where
none can be absent. A cascade used as a function contributes its statements under fresh names; its
results are filled where they may be absent, as they are when it runs on its own. Its schedule is left behind: how a
part runs is for the whole to say.

Requires: well-formed. Ensures: inlined.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, assert_never

from cascade.errors import Span
from cascade.inference import Shapes, infer_shapes, stated
from cascade.ir import (
    Apply, Call, Cascade, Cast, Const, Einsum, Expr, Extent, Function, Init, Local, Param, Rank, Read, Reduce, Result,
    Size, Stmt, Target, TopK, Use,
)  # fmt: skip
from cascade.presence import lacks, may_be_absent
from cascade.verify import Invariant, inlined, well_formed
from cascade.walk import (
    children, definition, free_ranks, fresh, map_expressions, names, part, rewrite, substitute, targets, walk,
    with_children,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Inline:
    """Expand every `def` and every cascade that the cascade uses."""

    name: ClassVar[str] = "inline"
    requires: ClassVar[tuple[Invariant, ...]] = (well_formed,)
    ensures: ClassVar[tuple[Invariant, ...]] = (inlined,)

    def __call__(self, cascade: Cascade) -> Cascade:
        if not cascade.uses:
            return cascade
        expansion = _Expansion(cascade)
        expanded = dataclasses.replace(cascade, body=expansion.body(), uses=())
        if not any(isinstance(stmt, Call) for stmt in cascade.body):
            return expanded
        return stated(expanded, expansion.extents)  # a callee's shapes are gone, the extents they gave are not


@dataclass(slots=True, eq=False)
class _Expansion:
    """The expansion of one cascade: its shapes, the names taken so far, and the statements so far."""

    cascade: Cascade
    shapes: Shapes = field(init=False)
    extents: dict[str, Size] = field(init=False)  # of the cascade's ranks and of those that come with callees
    taken: set[str] = field(init=False)
    absent: set[str] = field(init=False)
    done: list[Stmt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.shapes = infer_shapes(self.cascade)
        self.extents = dict(self.shapes.ranks)
        self.taken = names(self.cascade)
        self.absent = set(may_be_absent(self.cascade))

    def body(self) -> tuple[Stmt, ...]:
        for stmt in self.cascade.body:
            match stmt:
                case Call():
                    self._call(stmt)
                case Einsum() | TopK():
                    self.done.append(self._statement(stmt))
                case _:
                    assert_never(stmt)
        return tuple(self.done)

    # --- functions ---------------------------------------------------------------------------------------------------

    def _statement(self, stmt: Einsum | TopK) -> Stmt:
        left = targets(stmt)[0]
        scope = frozenset(left.ranks)
        where = None if stmt.where is None else self._expand(stmt.where, left, None, scope)
        if isinstance(stmt, TopK):
            return dataclasses.replace(
                stmt, body=self._expand(stmt.body, left, where, scope | {stmt.rank}), where=where
            )
        expr = self._expand(stmt.expr, left, where, scope)
        inits = tuple(dataclasses.replace(init, expr=self._expand(init.expr, left, None, scope)) for init in stmt.inits)
        return dataclasses.replace(stmt, expr=expr, where=where, inits=inits)

    def _expand(self, expr: Expr, left: Target, where: Expr | None, scope: frozenset[str]) -> Expr:
        """The expression of a statement that defines `left` under the filter `where`, without uses.

        `scope` are the ranks in sight: those of the left side and of the reductions around the expression.
        """
        inner = scope | frozenset(expr.ranks) if isinstance(expr, (Reduce, Use)) else scope
        expr = with_children(expr, tuple(self._expand(child, left, where, inner) for child in children(expr)))
        if not isinstance(expr, Use):
            return expr
        function = definition(self.cascade, expr.function)
        assert isinstance(function, Function)
        given = dict(zip(function.params, expr.args, strict=True))
        body = self._counted(_along(function, expr), given, where)
        mentions = _mentions(body)
        arguments = {
            name: self._named(arg, left, name, where, inner) if mentions.count(name) > 1 else arg
            for name, arg in given.items()
        }
        return self._expand(substitute(body, {}, arguments), left, where, scope)  # a definition may use others

    def _counted(self, body: Expr, given: Mapping[str, Expr], where: Expr | None) -> Expr:
        """The body of a `def` with counts of parameters that are never absent replaced by the extents they are."""

        def change(expr: Expr) -> Expr:
            if not (isinstance(expr, Reduce) and expr.reducer == "count" and isinstance(expr.body, Local)):
                return expr
            filtered = where is not None and not set(free_ranks(where)).isdisjoint(expr.ranks)
            if filtered or lacks(given[expr.body.name], self.absent, where, self.cascade):
                return expr
            sizes = [_size(self.extents[rank], expr.span) for rank in expr.ranks]
            return functools.reduce(lambda a, b: Apply("mul", (a, b), span=expr.span), sizes)

        simpler = rewrite(body, change)
        return simpler if set(_mentions(simpler)) == set(_mentions(body)) else body  # no rank may go unbound

    def _named(self, arg: Expr, left: Target, name: str, where: Expr | None, scope: frozenset[str]) -> Expr:
        """The argument `name` by a tensor of its own, where it is more than a read or a number."""
        if not isinstance(arg, (Reduce, Apply, Cast)):
            return arg
        ranks, carried = part(arg, where, scope, left.ranks)
        target = Target(fresh(f"{left.name}_{name}", self.taken), ranks, span=arg.span)
        self.done.append(Einsum(target, arg, carried, span=arg.span))
        if carried is not None or lacks(arg, self.absent, where, self.cascade):
            self.absent.add(target.name)
        return _read(target)

    # --- cascades ----------------------------------------------------------------------------------------------------

    def _call(self, stmt: Call) -> None:
        found = definition(self.cascade, stmt.callee)
        assert isinstance(found, Cascade)
        callee = Inline()(found)
        renaming = self._renaming(callee, stmt)
        absent = may_be_absent(callee)
        params = {param.name for param in callee.params}
        direct = {r.name for r in callee.results if r.name not in absent | params and r.dtype is None}
        for result, name in zip(callee.results, stmt.targets, strict=True):
            if result.name in direct:
                renaming.tensors[result.name] = name
        for inside in callee.body:
            for target in targets(inside):
                if target.name not in renaming.tensors:
                    renaming.tensors[target.name] = fresh(f"{stmt.targets[0]}_{target.name}", self.taken)
            self.done.append(renaming.statement(inside))
        for result, name in zip(callee.results, stmt.targets, strict=True):
            if result.name not in direct:
                filled = result.name in absent | params
                self.done.append(self._output(result, renaming.tensors[result.name], name, stmt, filled))

    def _renaming(self, callee: Cascade, stmt: Call) -> _Renaming:
        """The caller's names for what the callee has: tensors, sizes, and ranks of the same extent where they meet."""
        tensors = dict(zip((param.name for param in callee.params), stmt.args, strict=True))
        declared: tuple[Param | Result, ...] = (*callee.params, *callee.results)
        sizes: dict[str, Size] = {}
        for decl, actual in zip(declared, (*stmt.args, *stmt.targets), strict=True):
            pairs = zip(decl.shape, self.shapes.tensors[actual], strict=True)
            sizes.update((symbol, size) for symbol, size in pairs if isinstance(symbol, str))
        extents = {
            rank: sizes.get(size, size) if isinstance(size, str) else size
            for rank, size in infer_shapes(callee).ranks.items()
        }
        return _Renaming(tensors, {rank: self._rank(rank, size) for rank, size in extents.items()}, sizes)

    def _rank(self, rank: str, size: Size) -> str:
        """The caller's rank variable of that name where it has that extent, else a fresh one."""
        if self.extents.get(rank) == size:
            return rank
        name = fresh(rank, self.taken)
        self.extents[name] = size
        return name

    def _output(self, result: Result, tensor: str, name: str, stmt: Call, filled: bool) -> Einsum:
        """The result as a caller sees it: filled where it may be absent, rounded to its declared type."""
        ranks: list[str] = []
        for size in self.shapes.tensors[name]:
            same = (rank for rank, extent in self.extents.items() if extent == size and rank not in ranks)
            ranks.append(next(same, None) or self._rank("i", size))
        value: Expr = Read(tensor, tuple(Rank(rank, span=stmt.span) for rank in ranks), span=stmt.span)
        if filled:
            value = Apply("default", (value, result.fill), span=stmt.span)
        if result.dtype is not None:
            value = Cast(result.dtype, value, span=stmt.span)
        return Einsum(Target(name, tuple(ranks), span=stmt.span), value, span=stmt.span)


def _mentions(body: Expr) -> list[str]:
    return [node.name for node in walk(body) if isinstance(node, Local)]


def _size(size: Size, span: Span | None) -> Expr:
    return Const(size, span=span) if isinstance(size, int) else Extent(size, span=span)


def _read(target: Target) -> Read:
    return Read(target.name, tuple(Rank(rank, span=target.span) for rank in target.ranks), span=target.span)


def _along(function: Function, use: Use) -> Expr:
    """The body of a `def` with its formal ranks replaced by those of the use, and placed where the use stands."""
    if len(function.ranks) == 1:
        actual = {function.ranks[0]: use.ranks}
    else:
        actual = {formal: (rank,) for formal, rank in zip(function.ranks, use.ranks, strict=True)}

    def change(expr: Expr) -> Expr:
        expr = with_children(expr, tuple(change(child) for child in children(expr)))
        if isinstance(expr, (Reduce, Use)):
            expr = dataclasses.replace(
                expr, ranks=tuple(new for rank in expr.ranks for new in actual.get(rank, (rank,)))
            )
        elif isinstance(expr, Rank):
            expr = dataclasses.replace(expr, name=actual.get(expr.name, (expr.name,))[0])
        return dataclasses.replace(expr, span=use.span)

    return change(function.body)


@dataclass(frozen=True, slots=True, eq=False)
class _Renaming:
    """Statements of a callee in the names of the caller."""

    tensors: dict[str, str]
    ranks: Mapping[str, str]
    sizes: Mapping[str, Size]

    def statement(self, stmt: Stmt) -> Stmt:
        stmt = map_expressions(stmt, self.expression)
        match stmt:
            case Einsum():
                inits = tuple(self._init(init) for init in stmt.inits)
                return dataclasses.replace(stmt, target=self._target(stmt.target), inits=inits)
            case TopK():
                k = self.sizes.get(stmt.k, stmt.k) if isinstance(stmt.k, str) else stmt.k
                values, coords = self._target(stmt.values), self._target(stmt.coords)
                return dataclasses.replace(stmt, values=values, coords=coords, rank=self.ranks[stmt.rank], k=k)
            case Call():
                raise AssertionError("an inlined cascade calls no other")
            case _:
                assert_never(stmt)

    def _target(self, target: Target) -> Target:
        name, ranks = self.tensors[target.name], tuple(self.ranks[rank] for rank in target.ranks)
        return dataclasses.replace(target, name=name, ranks=ranks)

    def _init(self, init: Init) -> Init:
        return dataclasses.replace(init, rank=self.ranks[init.rank])

    def expression(self, expr: Expr) -> Expr:
        expr = with_children(expr, tuple(self.expression(child) for child in children(expr)))
        match expr:
            case Read():
                return dataclasses.replace(expr, tensor=self.tensors[expr.tensor])
            case Rank():
                return dataclasses.replace(expr, name=self.ranks[expr.name])
            case Extent():
                return _size(self.sizes.get(expr.name, expr.name), expr.span)
            case Reduce():
                return dataclasses.replace(expr, ranks=tuple(self.ranks[rank] for rank in expr.ranks))
            case _:
                return expr
