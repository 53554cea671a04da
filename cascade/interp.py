"""What a cascade means, on torch: every construct of the IR has an arm here, and the arm can give a wrong number.

Statements run in dependency order. Each is evaluated over *windows*, a stretch of coordinates per rank, which gives
streaming, stepping and bounded memory with one mechanism:

* a fused group (`fuse {R, P} over n`) runs its statements block by block along n, carrying partial reductions from
  block to block. A statement of the group that reads a reduction of the same group sees the partial value, and one
  that reads ahead of the block sees NaN: an illegal fusion changes the numbers.
* statements that read each other at earlier coordinates of a rank run one coordinate at a time along it.
* a statement whose intermediate would be large is evaluated in stretches of one of its ranks.

`Precision.REFERENCE` is the meaning (float64); the other precisions are how the same cascade runs eagerly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import assert_never

import torch
from torch import Tensor

from cascade import values as v
from cascade.evaluate import Evaluation, State, Stored, Windows, materialised
from cascade.inference import FLOATS, bind_sizes, infer_shapes
from cascade.ir import (
    Call, Cascade, DType, Einsum, Fuse, Param, Rank, Read, Reduce, Result, Stmt, Target, Tile, TopK, Use,
)  # fmt: skip
from cascade.order import iterative_rank, order_within_step, units
from cascade.values import Precision, Value
from cascade.walk import defines, definition, expressions, free_ranks, targets, walk

__all__ = ["Precision", "run"]

DEFAULT_BLOCK = 64  # coordinates of a fused rank that one block covers, where no tile says otherwise
MAX_ELEMENTS = 1 << 27  # elements of an intermediate above which a statement is evaluated in stretches


def run(
    cascade: Cascade,
    inputs: Mapping[str, Tensor],
    sizes: Mapping[str, int] | None = None,
    precision: Precision = Precision.COMPUTE,
    block: int | None = None,
) -> dict[str, Tensor]:
    """The results of a verified cascade on these tensors, in declared order.

    `sizes` binds shape symbols that no input has; `block` sets the block extent of every fused rank. Results have
    their declared type, else the type the language gives them; float64 for every float under `REFERENCE`.
    """
    shapes = infer_shapes(cascade)
    extents = bind_sizes(cascade, {name: tuple(tensor.shape) for name, tensor in inputs.items()}, sizes or {})
    device = next((tensor.device for tensor in inputs.values()), torch.device("cpu"))
    machine = _Machine(cascade, shapes, extents, precision, device, block=block, passing=passing_ranks(cascade))
    for param in cascade.params:
        machine.store[param.name] = _given(param, inputs[param.name], precision)
    machine.run(cascade.body, {}, groups(cascade))
    return {result.name: machine.result(result) for result in cascade.results}


def groups(cascade: Cascade) -> tuple[Fuse, ...]:
    """The fused groups of the schedule, outermost first."""
    return tuple(directive for directive in cascade.schedule if isinstance(directive, Fuse))


def passing_ranks(cascade: Cascade) -> dict[str, frozenset[str]]:
    """The fused ranks along which a tensor need not outlive its block: nobody outside its group reads it.

    Such a tensor is held one block at a time, which is what keeps the memory of a streamed group bounded.
    """
    if not groups(cascade):
        return {}
    kept = {result.name for result in cascade.results}
    kept.update(name for unit in units(cascade.body, ()) if unit.cyclic for s in unit.statements for name in defines(s))
    own = {target.name: target.ranks for stmt in cascade.body for target in targets(stmt)}
    found: dict[str, set[str]] = {}
    for group in groups(cascade):
        for stmt in cascade.body:
            for target in targets(stmt):
                if target.name in group.statements and target.name not in kept and group.rank in target.ranks:
                    found.setdefault(target.name, set()).add(group.rank)
    for group in groups(cascade):
        for stmt in cascade.body:
            inside = not set(defines(stmt)).isdisjoint(group.statements)
            for name, plain in _positions_read(stmt, own):
                if name in found and not (inside and group.rank in plain):
                    found[name].discard(group.rank)
    return {name: frozenset(ranks) for name, ranks in found.items()}


def _positions_read(stmt: Stmt, own: Mapping[str, tuple[str, ...]]) -> Iterator[tuple[str, set[str]]]:
    """The tensors that a statement reads, each with its ranks that stand plainly at their own position."""
    if isinstance(stmt, Call):
        yield from ((name, set()) for name in stmt.args)
    for read in (node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)):
        pairs = zip(read.index, own.get(read.tensor, ()), strict=False)
        yield read.tensor, {rank for index, rank in pairs if isinstance(index, Rank) and index.name == rank}


def _given(param: Param, tensor: Tensor, precision: Precision) -> Stored:
    dtype = v.FROM_TORCH[tensor.dtype]
    return Stored(tensor.to(precision.storage(dtype)), dtype)


@dataclass(slots=True, eq=False)
class _Machine(State):
    """The execution of a cascade: units in order, each statement over its windows, results into the store."""

    block: int | None = None
    passing: Mapping[str, frozenset[str]] = field(default_factory=dict)  # see `passing_ranks`
    extremes: dict[str, Value] = field(default_factory=dict)  # the best values behind a streamed argmax or argmin

    # --- order of execution ------------------------------------------------------------------------------------------

    def run(self, statements: Sequence[Stmt], windows: Windows, fused: tuple[Fuse, ...]) -> None:
        """The statements in dependency order, groups block by block, cycles coordinate by coordinate."""
        for unit in units(statements, fused):
            if unit.group is not None:
                rest = tuple(group for group in fused if group is not unit.group)
                for stretch in self._blocks(unit.group.rank, windows):
                    self.run(unit.statements, {**windows, unit.group.rank: stretch}, rest)
            elif unit.cyclic:
                self._scan(unit.statements, windows)
            else:
                self._execute(unit.statements[0], windows)

    def _blocks(self, rank: str, windows: Windows) -> Iterator[tuple[int, int]]:
        start, stop = windows.get(rank, self.full(rank))
        tiles = (dict(tile.sizes) for tile in self.cascade.schedule if isinstance(tile, Tile))
        step = self.block or next((tile[rank] for tile in tiles if rank in tile), DEFAULT_BLOCK)
        for low in range(start, max(stop, start + 1), step):  # an empty rank has one empty block: identities are set
            yield low, min(low + step, stop)

    def _scan(self, statements: Sequence[Stmt], windows: Windows) -> None:
        """Statements that depend on each other's earlier coordinates, one coordinate after the other."""
        rank = iterative_rank(statements)
        start, stop = windows.get(rank, self.full(rank))
        ordered = order_within_step(statements, rank)
        for stmt in ordered:
            if start == 0 and isinstance(stmt, Einsum) and stmt.inits:
                self._initialise(stmt)
        for step in range(start, stop):
            for stmt in ordered:
                self._execute(stmt, {**windows, rank: (step, step + 1)})
        for stmt in ordered:  # over an empty rank no step allocates
            for target in targets(stmt):
                if target.name not in self.store:
                    self._allocate(target, DType.F32, {rank: self.full(rank) for rank in target.ranks}, weak=False)

    def _initialise(self, stmt: Einsum) -> None:
        """The initial values, stored at the negative coordinates of the iterative rank."""
        target = stmt.target
        for init in stmt.inits:
            value = Evaluation(self, stmt, {}).value(init.expr)
            others = tuple(rank for rank in target.ranks if rank != init.rank)
            value = v.expand(value, others, [self.full(rank)[1] for rank in others])
            here = {rank: (init.at, init.at + 1) if rank == init.rank else self.full(rank) for rank in target.ranks}
            lifted = v.expand(value, target.ranks, lengths(here))
            self._write(target, lifted, here, _low(stmt))

    # --- one statement -----------------------------------------------------------------------------------------------

    def _execute(self, stmt: Stmt, windows: Windows) -> None:
        match stmt:
            case Einsum():
                for stretch in self._stretches(stmt, windows):
                    self._einsum(stmt, stretch)
            case TopK():
                self._top_k(stmt, windows)
            case Call():
                self._call(stmt)
            case _:
                assert_never(stmt)

    def _stretches(self, stmt: Einsum, windows: Windows) -> Iterator[Windows]:
        """The windows, cut along the statement's longest rank where an intermediate would be too large."""

        def length(rank: str) -> int:
            start, stop = windows.get(rank, self.full(rank))
            return stop - start

        along = {rank for node in walk(stmt.expr) if isinstance(node, (Reduce, Use)) for rank in node.ranks}
        along |= self.passing.get(stmt.target.name, frozenset())  # a block of those is held whole
        free = [rank for rank in stmt.target.ranks if rank not in along]
        largest = max((math.prod(map(length, ranks)) for ranks in materialised(stmt)), default=0)
        if largest <= MAX_ELEMENTS or not free:
            yield windows
            return
        rank = max(free, key=length)
        start, stop = windows.get(rank, self.full(rank))
        step = max(1, (stop - start) * MAX_ELEMENTS // largest)
        for low in range(start, stop, step):
            yield {**windows, rank: (low, min(low + step, stop))}

    def _einsum(self, stmt: Einsum, windows: Windows) -> None:
        target = stmt.target
        value = Evaluation(self, stmt, windows).statement(stmt.expr)
        here = {rank: windows.get(rank, self.full(rank)) for rank in target.ranks}
        value = v.expand(value, target.ranks, lengths(here))
        if isinstance(stmt.expr, Reduce):
            streamed = [rank for rank in stmt.expr.ranks if rank in windows and rank not in target.ranks]
            if streamed:
                first = all(windows[rank][0] == 0 for rank in streamed)
                value = self._carry(stmt, stmt.expr, value, windows, here, first)
        self._write(target, value, here, _low(stmt))

    def _carry(
        self, stmt: Einsum, reduction: Reduce, value: Value, windows: Windows, here: Windows, first: bool
    ) -> Value:
        """The partial reduction of this block folded into what the earlier blocks left."""
        name, reducer = stmt.target.name, reduction.reducer
        old = None if first else self._slice(stmt.target, here)
        if reducer not in ("argmax", "argmin"):
            return value if old is None else v.merge(reducer, old, value, self.precision)
        fold = "max" if reducer == "argmax" else "min"
        companion = replace(stmt, expr=replace(reduction, reducer=fold))
        best = Evaluation(self, companion, windows).statement(companion.expr)
        best = v.expand(best, stmt.target.ranks, lengths(here))
        value = replace(value, data=value.data + windows[reduction.ranks[0]][0])
        if old is None:
            self.extremes[name] = best
            return value
        before = self.extremes[name]
        self.extremes[name] = merged = v.merge(fold, before, best, self.precision)
        stays = (merged.data == before.data) | before.data.isnan()
        if before.present is not None:
            stays = stays & before.present
        return Value(torch.where(stays, old.data, value.data), value.ranks, DType.I64, merged.present)

    def _top_k(self, stmt: TopK, windows: Windows) -> None:
        kept = next(rank for rank in stmt.values.ranks if rank not in free_ranks(stmt.body))
        k = self.extent(stmt.k)
        evaluation = Evaluation(self, stmt, windows)
        body = evaluation.spread(evaluation.statement(stmt.body, (stmt.rank,)), (stmt.rank,))
        best, where = v.top_k(body, stmt.rank, k, kept)
        where = replace(where, data=where.data + windows.get(stmt.rank, (0, 0))[0])
        here = {rank: windows.get(rank, self.full(rank)) for rank in stmt.values.ranks}
        best = v.expand(best, stmt.values.ranks, lengths(here))
        where = v.expand(where, stmt.values.ranks, lengths(here))
        if stmt.rank in windows and windows[stmt.rank][0] > 0:
            best, where = self._carry_top_k(stmt, kept, k, best, where, here)
        self._write(stmt.values, best, here, ())
        self._write(stmt.coords, replace(where, ranks=stmt.values.ranks), here, ())

    def _carry_top_k(
        self, stmt: TopK, kept: str, k: int, best: Value, where: Value, here: Windows
    ) -> tuple[Value, Value]:
        """The k largest of the earlier blocks and of this one; earlier coordinates stand first, so ties keep them."""
        axis = stmt.values.ranks.index(kept)
        old_best, old_where = self._slice(stmt.values, here), self._slice(stmt.coords, here)
        there = [
            torch.ones_like(x.data, dtype=torch.bool) if x.present is None else x.present for x in (old_best, best)
        ]
        data = torch.cat([old_best.data, best.data.to(old_best.data.dtype)], axis)
        both = Value(data, stmt.values.ranks, best.dtype, torch.cat(there, axis))
        joined, chosen = v.top_k(both, kept, k, kept)
        coordinates = v.align(torch.cat([old_where.data, where.data], axis), stmt.values.ranks, joined.ranks)
        kept_at = Value(coordinates.gather(-1, chosen.data), joined.ranks, DType.I64, joined.present)
        ranks, extents = stmt.values.ranks, lengths(here)
        return v.expand(joined, ranks, extents), v.expand(kept_at, ranks, extents)

    def _call(self, stmt: Call) -> None:
        callee = definition(self.cascade, stmt.callee)
        assert isinstance(callee, Cascade)
        arguments = {p.name: self.store[name] for p, name in zip(callee.params, stmt.args, strict=True)}
        shapes = infer_shapes(callee)
        wanted = dict(zip((result.name for result in callee.results), stmt.targets, strict=True))
        given = {
            size: self.extent(actual)
            for result in callee.results
            for size, actual in zip(result.shape, self.shapes.tensors[wanted[result.name]], strict=True)
            if isinstance(size, str)
        }
        extents = bind_sizes(callee, {name: tuple(s.data.shape) for name, s in arguments.items()}, given)
        inner = _Machine(callee, shapes, extents, self.precision, self.device, dict(arguments), block=self.block)
        inner.passing = passing_ranks(callee)
        inner.run(callee.body, {}, groups(callee))
        for result in callee.results:
            self.store[wanted[result.name]] = inner.output(result)

    # --- storage -----------------------------------------------------------------------------------------------------

    def _write(self, target: Target, value: Value, here: Windows, low: tuple[int, ...]) -> None:
        """The value stored at these windows of the target; what was never written stays NaN."""
        if self.precision is Precision.EAGER and not value.weak:
            value = v.cast(value, value.dtype, self.precision)
        low = low or (0,) * len(target.ranks)
        passing = self.passing.get(target.name, frozenset())
        held = {
            rank: here[rank] if rank in passing else (first, self.full(rank)[1])
            for rank, first in zip(target.ranks, low, strict=True)
        }
        if all(here[rank] == held[rank] for rank in target.ranks):
            starts = tuple(start for start, _ in held.values())
            first = starts if any(starts) else ()
            self.store[target.name] = Stored(value.data, value.dtype, value.present, first, value.weak)
            return
        stored = self.store.get(target.name)
        if stored is None or [stored.at(d) for d in range(len(held))] != [start for start, _ in held.values()]:
            stored = self._allocate(target, value.dtype, held, value.weak)
        if stored.dtype is not value.dtype or stored.weak != value.weak:
            self._retype(stored, value)
        place = stored.place(here[rank] for rank in target.ranks)
        stored.data[place] = value.data.to(stored.data.dtype)
        if value.present is not None and stored.present is None:
            stored.present = torch.ones_like(stored.data, dtype=torch.bool)
        if stored.present is not None:
            stored.present[place] = True if value.present is None else value.present

    def _allocate(self, target: Target, dtype: DType, held: Windows, weak: bool) -> Stored:
        """Room for a tensor at these coordinates, NaN until it is written."""
        storage = torch.float64 if weak and dtype in FLOATS else self.precision.storage(dtype)
        fill: float | int | bool = math.nan if storage.is_floating_point else 0
        if storage is torch.int64:
            fill = torch.iinfo(storage).min // 2
        data = torch.full(lengths(held), fill, dtype=storage, device=self.device)
        stored = Stored(data, dtype, None, tuple(start for start, _ in held.values()), weak)
        self.store[target.name] = stored
        return stored

    def _retype(self, stored: Stored, value: Value) -> None:
        """A recurrence may start from a constant and go on with a typed tensor: the stored type follows."""
        dtype, weak = v.common_type((Value(stored.data, (), stored.dtype, None, stored.weak), value))
        storage = torch.float64 if weak and dtype in FLOATS else self.precision.storage(dtype)
        stored.data, stored.dtype, stored.weak = stored.data.to(storage), dtype, weak

    def _slice(self, target: Target, here: Windows) -> Value:
        return self.store[target.name].slice(target.ranks, (here[rank] for rank in target.ranks))

    def output(self, result: Result) -> Stored:
        """A result at the coordinates 0, 1, ..., filled where it is absent and of its declared type."""
        stored = self.store[result.name]
        inside = tuple(slice(-low, None) for low in stored.low) if stored.low else ()
        present = None if stored.present is None else stored.present[inside]
        data = v.filled(stored.data[inside], present, result.fill)
        if result.dtype is None:
            return Stored(data, stored.dtype, weak=stored.weak)
        return Stored(v.cast(Value(data, (), stored.dtype), result.dtype, self.precision).data, result.dtype)

    def result(self, result: Result) -> Tensor:
        """A result as the caller gets it: rounded to its type, contiguous, sharing memory with no input."""
        stored = self.output(result)
        exact = self.precision is Precision.REFERENCE and stored.dtype in FLOATS
        wanted = torch.float64 if exact else v.TORCH_TYPES[stored.dtype]
        return stored.data.to(wanted).clone(memory_format=torch.contiguous_format)


def lengths(windows: Windows) -> list[int]:
    """The number of coordinates of each window."""
    return [stop - start for start, stop in windows.values()]


def _low(stmt: Einsum) -> tuple[int, ...]:
    """The first coordinate of each dimension: the earliest initial value along the iterative rank, else 0."""
    earliest = {init.rank: min(other.at for other in stmt.inits) for init in stmt.inits}
    return tuple(earliest.get(rank, 0) for rank in stmt.target.ranks)
