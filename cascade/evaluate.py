"""The value of an expression over windows of coordinates: the expression half of the interpreter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

from cascade import values as v
from cascade.errors import CallError, Diagnostic
from cascade.inference import FLOATS, Shapes
from cascade.ir import (
    Apply, Call, Cascade, Cast, Const, DType, Einsum, Expr, Extent, Function, Local, Rank, Read, Reduce, Size, Stmt,
    Use,
)  # fmt: skip
from cascade.scopes import scan, signatures, visible
from cascade.values import Precision, Value
from cascade.walk import definition, free_ranks, targets, walk

Windows: TypeAlias = Mapping[str, tuple[int, int]]
"""Half-open stretches of coordinates, by rank; a rank without one runs over its whole extent."""


@dataclass(slots=True, eq=False)
class Stored:
    """A tensor while the cascade runs: positional data, mask of the present coordinates, and type.

    `low` is the first coordinate of each dimension: negative along a rank that carries initial values.
    """

    data: Tensor
    dtype: DType
    present: Tensor | None = None
    low: tuple[int, ...] = ()
    weak: bool = False

    def at(self, dimension: int) -> int:
        """The first coordinate along a dimension."""
        return self.low[dimension] if self.low else 0

    def place(self, windows: Iterable[tuple[int, int]]) -> tuple[slice, ...]:
        """The slices of the data at these coordinates."""
        return tuple(slice(start - self.at(d), stop - self.at(d)) for d, (start, stop) in enumerate(windows))

    def slice(self, ranks: tuple[str, ...], windows: Iterable[tuple[int, int]]) -> Value:
        """The value at these coordinates, with its dimensions named."""
        windows = tuple(windows)
        if all(start == self.at(d) and stop - start == self.data.shape[d] for d, (start, stop) in enumerate(windows)):
            return Value(self.data, ranks, self.dtype, self.present, self.weak)
        place = self.place(windows)
        present = None if self.present is None else self.present[place]
        return Value(self.data[place], ranks, self.dtype, present, self.weak)


@dataclass(slots=True, eq=False)
class State:
    """One run of a cascade: its shapes and sizes, and what every tensor holds so far."""

    cascade: Cascade
    shapes: Shapes
    extents: Mapping[str, int]
    precision: Precision
    device: torch.device
    store: dict[str, Stored] = field(default_factory=dict)
    mentioned: dict[int, frozenset[str]] = field(default_factory=dict)  # the free ranks of each filter, by its identity

    def filter_ranks(self, where: Expr) -> frozenset[str]:
        """The ranks whose coordinates a filter depends on, seen through the definitions it uses."""
        if id(where) not in self.mentioned:
            known = signatures(visible(self.cascade).values())
            self.mentioned[id(where)] = frozenset(scan(where, known).free)
        return self.mentioned[id(where)]

    def extent(self, size: Size) -> int:
        """The number that an extent stands for."""
        return size if isinstance(size, int) else self.extents[size]

    def full(self, rank: str) -> tuple[int, int]:
        """All coordinates of a rank variable."""
        return 0, self.extent(self.shapes.ranks[rank])


@dataclass(slots=True, eq=False)
class Evaluation:
    """The evaluation of one statement over given windows."""

    state: State
    stmt: Stmt
    windows: Windows
    bound: frozenset[str] = (
        frozenset()
    )  # the rank variables in scope: the left side's and those of the reductions around
    locals: Mapping[str, Value] = field(default_factory=dict)
    formal: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    masks: list[Value] = field(default_factory=list)  # the filter over these windows, once it was asked for
    filtering: bool = False  # whether this evaluates the filter itself

    def statement(self, expr: Expr, reduced: tuple[str, ...] = ()) -> Value:
        """The right side, or a top-k body along the rank `reduced`, with the statement's filter applied."""
        scope = frozenset(rank for target in targets(self.stmt) for rank in target.ranks) | frozenset(reduced)
        inner = self.inside(self.windows, scope, self.masks)
        value = inner.value(expr)
        mask = inner.filter_in_scope()
        return value if mask is None else v.keep(value, mask)

    def inside(self, windows: Windows, bound: frozenset[str], masks: list[Value]) -> Evaluation:
        """The evaluation over other windows, in another scope."""
        return Evaluation(self.state, self.stmt, windows, bound, self.locals, self.formal, masks, self.filtering)

    def filter_in_scope(self) -> Value | None:
        """The mask of the statement's filter, where every rank it mentions is in scope."""
        where = where_of(self.stmt)
        if where is None or self.filtering or not self.state.filter_ranks(where) <= self.bound:
            return None
        if not self.masks:
            self.masks.append(replace(self, locals={}, formal={}, filtering=True).value(where))
        return self.masks[0]

    def value(self, expr: Expr) -> Value:
        """The value of an expression over its free ranks."""
        match expr:
            case Const():
                return v.constant(expr.value, self.state.device)
            case Extent():
                return v.constant(self.state.extents[expr.name], self.state.device)
            case Rank():
                return self._coordinates(self.formal.get(expr.name, (expr.name,))[0])
            case Local():
                return self.locals[expr.name]
            case Read():
                return self._read(expr)
            case Apply():
                return self._apply(expr)
            case Cast():
                return v.cast(self.value(expr.arg), expr.dtype, self.state.precision)
            case Reduce():
                return self._reduce(expr)
            case Use():
                return self._use(expr)
            case _:
                assert_never(expr)

    def _apply(self, expr: Apply) -> Value:
        args = [self.value(arg) for arg in expr.args]
        if expr.op in v.PARTIAL and (mask := self.filter_in_scope()) is not None:
            args[-1] = v.keep(args[-1], mask)  # what the filter removes need not have a value
        return v.apply(expr.op, args, self.state.precision, expr.span)

    def window(self, rank: str) -> tuple[int, int]:
        return self.windows.get(rank) or self.state.full(rank)

    def spread(self, value: Value, ranks: Iterable[str]) -> Value:
        """The value with these ranks among its own, at the extent of their windows."""
        wanted = v.union(value.ranks, tuple(ranks))
        fixed = frozenset(ranks)
        there = value.data.shape if value.present is None else value.present.shape
        shape = {r: b if a == 1 else a for r, a, b in zip(value.ranks, value.data.shape, there, strict=True)}
        extents = [self.window(r)[1] - self.window(r)[0] if r in fixed else shape[r] for r in wanted]
        return v.expand(value, wanted, extents)

    def _coordinates(self, rank: str) -> Value:
        start, stop = self.window(rank)
        return Value(torch.arange(start, stop, device=self.state.device), (rank,), DType.I64, None, weak=True)

    def _use(self, expr: Use) -> Value:
        function = definition(self.state.cascade, expr.function)
        assert isinstance(function, Function)
        actual = tuple(rank for name in expr.ranks for rank in self.formal.get(name, (name,)))
        pairs = {function.ranks[0]: actual} if len(function.ranks) == 1 else {
            formal: (rank,) for formal, rank in zip(function.ranks, actual, strict=True)
        }  # fmt: skip
        arguments = {name: self.value(arg) for name, arg in zip(function.params, expr.args, strict=True)}
        return replace(self, locals=arguments, formal=pairs).value(function.body)

    # --- reductions --------------------------------------------------------------------------------------------------

    def _reduce(self, expr: Reduce) -> Value:
        ranks = tuple(rank for name in expr.ranks for rank in self.formal.get(name, (name,)))
        hidden = {rank for rank in ranks if any(rank in target.ranks for target in targets(self.stmt))}
        windows = {rank: window for rank, window in self.windows.items() if rank not in hidden}
        inner = self.inside(windows, self.bound | frozenset(ranks), [] if hidden else self.masks)
        where = where_of(self.stmt)
        concerned = where is not None and not self.state.filter_ranks(where).isdisjoint(ranks)
        mask = inner.filter_in_scope() if concerned else None
        if expr.reducer == "sum":
            contracted = inner._contract(expr.body, ranks, mask)
            if contracted is not None:
                return contracted
        value = inner.value(expr.body)
        if mask is not None:
            value = v.keep(value, mask)
        return v.reduce(expr.reducer, inner.spread(value, ranks), ranks, self.state.precision)

    def _contract(self, body: Expr, ranks: tuple[str, ...], mask: Value | None) -> Value | None:
        """A sum of a product by torch's einsum, so that the product itself is never held."""
        over, under = _product(body)
        if len(over) < 2:
            return None
        factors, divisors = [self.value(e) for e in over], [self.value(e) for e in under]
        dtype, weak = v.common_type([*factors, *divisors])
        if weak or dtype not in FLOATS:
            return None
        factors, after = self._divide(factors, divisors, ranks)
        if mask is not None:
            factors = _masked(factors, mask)
        covered = v.union(*(factor.ranks for factor in factors))
        if any(rank not in covered for rank in ranks):
            factors[0] = self.spread(factors[0], [rank for rank in ranks if rank not in covered])
        result = v.contract([self.spread(f, f.ranks) for f in factors], ranks, dtype, self.state.precision)
        for divisor in after if result is not None else ():
            assert result is not None
            result = v.apply("div", (result, divisor), self.state.precision)
        return result

    def _divide(
        self, factors: list[Value], divisors: list[Value], ranks: tuple[str, ...]
    ) -> tuple[list[Value], list[Value]]:
        """Each divisor into a factor that has its ranks; what has no reduced rank may wait until after the sum."""
        factors, after = list(factors), []
        for divisor in divisors:
            host = next((i for i, f in enumerate(factors) if set(divisor.ranks) <= set(f.ranks)), None)
            if host is not None:
                factors[host] = v.apply("div", (factors[host], divisor), self.state.precision)
            elif not set(divisor.ranks) & set(ranks):
                after.append(divisor)
            else:
                one = v.constant(1.0, self.state.device)
                factors.append(v.apply("div", (one, divisor), self.state.precision))
        return factors, after

    # --- reads -------------------------------------------------------------------------------------------------------

    def _read(self, expr: Read) -> Value:
        stored = self.state.store[expr.tensor]
        plain = [self._plain(index) for index in expr.index]
        ranks = tuple(rank for rank in plain if rank is not None)
        if len(set(ranks)) == len(plain):
            return stored.slice(ranks, (self.window(rank) for rank in ranks))
        return self._gather(expr, stored)

    def _plain(self, index: Expr) -> str | None:
        return self.formal.get(index.name, (index.name,))[0] if isinstance(index, Rank) else None

    def _gather(self, expr: Read, stored: Stored) -> Value:
        """A read at computed coordinates: outside the shape an affine one is absent, an indirect one is an error."""
        indices = [self.value(index) for index in expr.index]
        ranks = v.union(*(index.ranks for index in indices))
        places: list[Tensor] = []
        present: Tensor | None = None
        for d, (index, value) in enumerate(zip(expr.index, indices, strict=True)):
            if value.dtype in FLOATS:
                hint = "index with integers: cast(x, i64) rounds, or pass an integer tensor"
                raise CallError(
                    Diagnostic("C312", f"an index of '{expr.tensor}' is {value.dtype.value}", index.span, hint)
                )
            place = v.align(value.data, value.ranks, ranks)
            there = None if value.present is None else v.align(value.present, value.ranks, ranks)
            first, last = stored.at(d), stored.at(d) + stored.data.shape[d] - 1
            inside = (place >= first) & (place <= last)
            if any(isinstance(node, Read) for node in walk(index)):
                self._refuse_outside(expr, d, Value(place, ranks, DType.I64, there), inside)
            present = v.both(present, there, None if bool(inside.all()) else inside)
            places.append(place.clamp(first, max(first, last)) - first)
        if stored.data.numel() == 0:
            nothing = torch.zeros((1,) * len(ranks), dtype=stored.data.dtype, device=self.state.device)
            extents = [self.window(rank)[1] - self.window(rank)[0] for rank in ranks]
            empty = nothing.expand(tuple(extents))
            return Value(empty, ranks, stored.dtype, empty.bool(), stored.weak)
        if stored.present is not None:
            present = v.both(present, stored.present[tuple(places)])
        return Value(stored.data[tuple(places)], ranks, stored.dtype, present, stored.weak)

    def _refuse_outside(self, expr: Read, d: int, place: Value, inside: Tensor) -> None:
        """An index that comes from data must be in range at every coordinate that the statement keeps."""
        live: list[Tensor | None] = [~inside, place.present]
        ranks, mask = place.ranks, self.filter_in_scope()
        if mask is not None:
            ranks = v.union(ranks, mask.ranks)
            live = [None if part is None else v.align(part, place.ranks, ranks) for part in live]
            live += [None if part is None else v.align(part, mask.ranks, ranks) for part in (mask.data, mask.present)]
        wrong = v.both(*live)
        if wrong is None or not bool(wrong.any()):
            return
        worst = int(v.align(place.data, place.ranks, ranks).expand(wrong.shape)[wrong][0])
        extent = self.state.store[expr.tensor].data.shape[d]
        message = f"index {worst} is outside '{expr.tensor}', which has {extent} coordinates there"
        hint = "mend the index tensor, or filter such coordinates with `where`"
        raise CallError(Diagnostic("C311", message, expr.index[d].span, hint))


def where_of(stmt: Stmt) -> Expr | None:
    """The filter of a statement."""
    return None if isinstance(stmt, Call) else stmt.where


def _masked(factors: list[Value], mask: Value) -> list[Value]:
    """The factors with a filter put on one that has its ranks, else beside them as a factor of ones."""
    host = next((i for i, f in enumerate(factors) if set(mask.ranks) <= set(f.ranks)), None)
    if host is not None:
        factors[host] = v.keep(factors[host], mask)
        return factors
    test = v.both(mask.data, mask.present)
    assert test is not None
    ones = torch.ones_like(test, dtype=torch.float32)
    return [*factors, Value(ones, mask.ranks, DType.F32, test, weak=True)]


def _product(expr: Expr) -> tuple[list[Expr], list[Expr]]:
    """The factors and divisors of a chain of `*` and `/`."""
    if isinstance(expr, Apply) and expr.op in ("mul", "div"):
        over, under = _product(expr.args[0])
        other_over, other_under = _product(expr.args[1])
        if expr.op == "div":
            other_over, other_under = other_under, other_over
        return over + other_over, under + other_under
    return [expr], []


def materialised(stmt: Einsum) -> Iterator[tuple[str, ...]]:
    """The ranks of every intermediate that evaluation holds whole: gathers, and maps outside a summed product."""
    stack: list[tuple[Expr, bool]] = [(stmt.expr, False)]
    while stack:
        node, summed = stack.pop()
        match node:
            case Reduce():
                stack.append((node.body, node.reducer == "sum"))
            case Apply(op="mul" | "div") if summed:
                stack.extend((arg, True) for arg in node.args)
            case Apply() | Cast() | Use():
                yield free_ranks(node)
                stack.extend((arg, False) for arg in (node.args if not isinstance(node, Cast) else (node.arg,)))
            case Read():
                if not all(isinstance(index, Rank) for index in node.index):
                    yield free_ranks(node)
            case _:
                pass
