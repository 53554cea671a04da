"""What a cascade means, on torch: every construct of the IR has an arm here, and the arm can give a wrong number.

Statements run in dependency order. Each is evaluated over *windows*, a stretch of coordinates per rank, which gives
streaming, stepping and bounded memory with one mechanism:

* a fused group (`fuse {R, P} over n`) runs its statements block by block along n, carrying partial reductions from
  block to block. A statement of the group that reads a reduction of the same group sees the partial value, and one
  that reads ahead of the block sees NaN: an illegal fusion changes the numbers.
* a fold (`fold n { ... }`) does the same with a state that depends on itself: what the earlier blocks left is moved
  into the new state by `merge` before it is folded in. Where a `split` cuts its rank, each part starts from nothing and
  the states of the parts are merged in a tree: a wrong merge changes the numbers.
* statements that read each other at earlier coordinates of a rank run one coordinate at a time along it.
* a statement that is grouped by an index (`group {H} by I[t] < N`) goes through its rows value after value, each with
  the value as one number: where rows do not differ in the index alone, the numbers are others.
* a statement whose intermediate would be large is evaluated in stretches of one of its ranks.
* where the schedule has `stream` or `wait`, the parts that they name run in one of the orders that these allow, chosen
  by a seed, on buffers that are NaN until a part has written them: a wait that is missing changes the numbers.
  What neither names is computed for each part that reads it, of what is there at that time.

`Precision.REFERENCE` is the meaning (float64); the other precisions are how the same cascade runs eagerly.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeAlias, assert_never

import torch
from torch import Tensor

from cascade import values as v
from cascade.evaluate import Evaluation, State, Stored, Windows, materialised
from cascade.inference import FLOATS, bind_sizes, infer_dtypes, infer_shapes
from cascade.ir import (
    Apply, Call, Cascade, DType, Einsum, Expr, Fold, Fuse, GroupBy, Param, Part, Rank, Read, Reduce, Result, Split,
    Stmt, Stream, Target, Tile, TopK, Use, Wait,
)  # fmt: skip
from cascade.ops import REDUCERS
from cascade.order import Group, Unit, iterative_rank, members, order_within_step, units
from cascade.values import Precision, Value
from cascade.walk import defines, definition, expressions, free_ranks, reads, rewrite, substitute, targets, walk

__all__ = ["Precision", "run"]

Partial: TypeAlias = tuple[Value, ...]
"""A reduction of some coordinates: its value, and what else it takes to fold it further."""

PartState: TypeAlias = dict[str, Partial]
"""The state of a fold over a part of its rank, by the first name that each statement defines; empty for nothing yet."""

EXTREMES = {"argmax": "max", "argmin": "min"}  # what stands behind a coordinate

ROW = "a row"  # the rank along which rows of one value lie: no program can have one of this name

DEFAULT_BLOCK = 64  # coordinates of a fused rank that one block covers, where no tile says otherwise
MAX_ELEMENTS = 1 << 27  # elements of an intermediate above which a statement is evaluated in stretches


def run(
    cascade: Cascade,
    inputs: Mapping[str, Tensor],
    sizes: Mapping[str, int] | None = None,
    precision: Precision = Precision.COMPUTE,
    block: int | None = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """The results of a verified cascade on these tensors, in declared order.

    `sizes` binds shape symbols that no input has; `block` sets the block extent of every fused rank; `seed` chooses
    among the orders that streams and waits allow. Results have their declared type, else the type the language gives
    them; float64 for every float under `REFERENCE`.
    """
    shapes = infer_shapes(cascade)
    extents = bind_sizes(cascade, {name: tuple(tensor.shape) for name, tensor in inputs.items()}, sizes or {})
    device = next((tensor.device for tensor in inputs.values()), torch.device("cpu"))
    machine = Machine(cascade, shapes, extents, precision, device, block=block, passing=passing_ranks(cascade))
    for param in cascade.params:
        machine.store[param.name] = _given(param, inputs[param.name], precision)
    if any(isinstance(item, (Stream, Wait)) for item in cascade.schedule):
        _Queued(machine, seed).run()
    else:
        machine.run(cascade.body, {}, groups(cascade))
    return {result.name: machine.result(result) for result in cascade.results}


def groups(cascade: Cascade) -> tuple[Group, ...]:
    """The fused groups and folds of the schedule, outermost first."""
    return tuple(directive for directive in cascade.schedule if isinstance(directive, (Fuse, Fold)))


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
                if target.name in members(group) and target.name not in kept and group.rank in target.ranks:
                    found.setdefault(target.name, set()).add(group.rank)
    for group in groups(cascade):
        for stmt in cascade.body:
            inside = not set(defines(stmt)).isdisjoint(members(group))
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
class Machine(State):
    """The execution of a cascade: units in order, each statement over its windows, results into the store."""

    block: int | None = None
    passing: Mapping[str, frozenset[str]] = field(default_factory=dict)  # see `passing_ranks`
    extremes: dict[str, Value] = field(default_factory=dict)  # the best values behind a streamed argmax or argmin
    unwritten: set[str] = field(default_factory=set)  # tensors whose buffers nothing has written yet

    small: bool = field(init=False)  # whether all ranks together have too few coordinates for a large intermediate

    def __post_init__(self) -> None:
        coordinates = math.prod(max(1, self.extent(size)) for size in self.shapes.ranks.values())
        self.small = coordinates <= MAX_ELEMENTS

    # --- order of execution ------------------------------------------------------------------------------------------

    def run(self, statements: Sequence[Stmt], windows: Windows, fused: tuple[Group, ...]) -> None:
        """The statements in dependency order, groups block by block, cycles coordinate by coordinate."""
        self.run_units(units(statements, fused), windows, fused)

    def run_units(self, ordered: Sequence[Unit], windows: Windows, fused: tuple[Group, ...]) -> None:
        """The units one after the other."""
        for unit in ordered:
            if isinstance(unit.group, Fold):
                self.fold(unit.group, unit.statements, windows)
            elif unit.group is not None:
                rest = tuple(group for group in fused if group is not unit.group)
                inner = units(unit.statements, rest)
                for stretch in self._blocks(unit.group.rank, windows):
                    self.run_units(inner, {**windows, unit.group.rank: stretch}, rest)
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
                    self.allocate(target, DType.F32, {rank: self.full(rank) for rank in target.ranks}, weak=False)

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
        if self.small:
            yield windows
            return

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
        here = {rank: windows.get(rank, self.full(rank)) for rank in target.ranks}
        streamed = [rank for rank in _reduced(stmt) if rank in windows and rank not in target.ranks]
        if not streamed:
            value = self._value(stmt, windows)
            self._write(target, v.expand(value, target.ranks, lengths(here)), here, _low(stmt))
            return
        found = self.partial(stmt, windows)
        if not all(windows[rank][0] == 0 for rank in streamed):
            found = self.joined(stmt, self._held(stmt, here), found)
        self.hold(stmt, found, here)

    def _value(self, stmt: Einsum, windows: Windows) -> Value:
        """The value of a statement over these windows: as it stands, or by values of an index."""
        for item in self.cascade.schedule:
            if isinstance(item, GroupBy) and stmt.target.name in item.statements:
                return self._by_value(item, stmt, windows)
        return Evaluation(self, stmt, windows).statement(stmt.expr)

    def _by_value(self, item: GroupBy, stmt: Einsum, windows: Windows) -> Value:
        """The rows of a statement in the order of an index: those of one value together, gathered and put back."""
        ranks = tuple(index.name for index in item.key.index if isinstance(index, Rank))
        here = {rank: windows.get(rank, self.full(rank)) for rank in (*ranks, *stmt.target.ranks)}
        key = self._slice(Target(item.key.tensor, ranks), {rank: here[rank] for rank in ranks})
        keys = key.data.reshape(-1)
        order = torch.sort(keys, stable=True).indices
        if key.present is not None:
            order = order[key.present.reshape(-1)[order]]
        if not len(order):
            return Evaluation(self, stmt, windows).statement(stmt.expr)
        others = tuple(rank for rank in stmt.target.ranks if rank not in ranks)
        counts = torch.unique_consecutive(keys[order], return_counts=True)[1].tolist()
        found: list[Value] = []
        for rows in torch.split(order, counts):
            places = torch.unravel_index(rows, [here[rank][1] - here[rank][0] for rank in ranks])
            at = {rank: place + here[rank][0] for rank, place in zip(ranks, places, strict=True)}
            value = self._rows(item, stmt, windows, at, keys[rows[0]])
            found.append(v.expand(value, (ROW, *others), [len(rows), *lengths({rank: here[rank] for rank in others})]))
        data = found[0].data.new_zeros((len(keys), *found[0].data.shape[1:]))
        present = torch.zeros_like(data, dtype=torch.bool)
        data[order] = torch.cat([value.data for value in found])
        present[order] = torch.cat([
            torch.ones_like(value.data, dtype=torch.bool) if value.present is None else value.present for value in found
        ])  # fmt: skip
        shape = lengths({rank: here[rank] for rank in (*ranks, *others)})
        there = None if bool(present.all()) else present.reshape(shape)
        return Value(data.reshape(shape), (*ranks, *others), found[0].dtype, there, found[0].weak)

    def _rows(self, item: GroupBy, stmt: Einsum, windows: Windows, at: Mapping[str, Tensor], value: Tensor) -> Value:
        """A statement at some rows of one value of the index, which is a number for all of them."""
        places = {rank: Read(f"{rank} of {ROW}", (Rank(ROW),)) for rank in at}
        chosen = Read(f"value of {ROW}", ())
        self.store |= {places[rank].tensor: Stored(place, DType.I64) for rank, place in at.items()}
        self.store[chosen.tensor] = Stored(value.to(torch.int64), DType.I64)
        expr = substitute(rewrite(stmt.expr, lambda node: chosen if node == item.key else node), places)
        target = Target(stmt.target.name, (ROW, *(rank for rank in stmt.target.ranks if rank not in at)))
        inside = {rank: window for rank, window in windows.items() if rank not in at}
        length = len(next(iter(at.values())))
        return Evaluation(self, replace(stmt, target=target, expr=expr), {**inside, ROW: (0, length)}).statement(expr)

    def _top_k(self, stmt: TopK, windows: Windows) -> None:
        here = {rank: windows.get(rank, self.full(rank)) for rank in stmt.values.ranks}
        found = self.partial(stmt, windows)
        if stmt.rank in windows and windows[stmt.rank][0] > 0:
            found = self.joined(stmt, self._held(stmt, here), found)
        self.hold(stmt, found, here)

    # --- partial reductions ------------------------------------------------------------------------------------------

    def partial(self, stmt: Einsum | TopK, windows: Windows) -> Partial:
        """What a reduction gives over these windows alone: its value, and what else it takes to fold it further.

        The coordinate of an extreme has the extreme with it, the kept values of a `topk` their coordinates.
        """
        ranks = targets(stmt)[0].ranks
        extents = lengths({rank: windows.get(rank, self.full(rank)) for rank in ranks})
        if isinstance(stmt, TopK):
            evaluation = Evaluation(self, stmt, windows)
            body = evaluation.spread(evaluation.statement(stmt.body, (stmt.rank,)), (stmt.rank,))
            best, where = v.top_k(body, stmt.rank, self.extent(stmt.k), self._kept(stmt))
            where = replace(where, data=where.data + windows.get(stmt.rank, (0, 0))[0])
            return v.expand(best, ranks, extents), v.expand(where, ranks, extents)
        value = v.expand(self._value(stmt, windows), ranks, extents)
        reduction = stmt.expr
        if not isinstance(reduction, Reduce) or reduction.reducer not in EXTREMES:
            return (value,)
        companion = replace(stmt, expr=replace(reduction, reducer=EXTREMES[reduction.reducer]))
        best = v.expand(Evaluation(self, companion, windows).statement(companion.expr), ranks, extents)
        return replace(value, data=value.data + windows.get(reduction.ranks[0], (0, 0))[0]), best

    def joined(self, stmt: Einsum | TopK, old: Partial, new: Partial) -> Partial:
        """Two partial reductions folded into one, `old` from earlier coordinates than `new`."""
        if isinstance(stmt, TopK):
            return self._joined_top_k(stmt, old, new)
        reducer = _reducer(stmt)
        if reducer not in EXTREMES:
            return (v.merge(reducer, old[0], new[0], self.precision),)
        before = old[1]
        best = v.merge(EXTREMES[reducer], before, new[1], self.precision)
        stays = (best.data == before.data) | before.data.isnan()
        if before.present is not None:
            stays = stays & before.present
        return Value(torch.where(stays, old[0].data, new[0].data), new[0].ranks, DType.I64, best.present), best

    def _joined_top_k(self, stmt: TopK, old: Partial, new: Partial) -> Partial:
        """The k largest of both; earlier coordinates stand first, so ties keep them."""
        ranks, kept, k = stmt.values.ranks, self._kept(stmt), self.extent(stmt.k)
        axis = ranks.index(kept)
        there = [
            torch.ones_like(x.data, dtype=torch.bool) if x.present is None else x.present for x in (old[0], new[0])
        ]
        data = torch.cat([old[0].data, new[0].data.to(old[0].data.dtype)], axis)
        joined, chosen = v.top_k(Value(data, ranks, new[0].dtype, torch.cat(there, axis)), kept, k, kept)
        coordinates = v.align(torch.cat([old[1].data, new[1].data], axis), ranks, joined.ranks)
        kept_at = Value(coordinates.gather(-1, chosen.data), joined.ranks, DType.I64, joined.present)
        extents = list(v.align(new[0].data, ranks, ranks).shape)
        return v.expand(joined, ranks, extents), v.expand(kept_at, ranks, extents)

    def _kept(self, stmt: TopK) -> str:
        """The rank of a `topk` that counts what it keeps."""
        return next(rank for rank in stmt.values.ranks if rank not in free_ranks(stmt.body))

    def _held(self, stmt: Einsum | TopK, here: Windows) -> Partial:
        """The partial reduction that earlier windows left."""
        held = tuple(self._slice(target, here) for target in targets(stmt))
        best = self.extremes.get(targets(stmt)[0].name)
        return held if best is None else (*held, best)

    def hold(self, stmt: Einsum | TopK, found: Partial, here: Windows) -> None:
        """Stores a partial reduction, as the value that others see."""
        for target, value in zip(targets(stmt), found, strict=False):
            self._write(target, value, here, ())
        if isinstance(stmt, Einsum) and len(found) > 1:
            self.extremes[stmt.target.name] = found[1]

    # --- folds -------------------------------------------------------------------------------------------------------

    def fold(self, fold: Fold, statements: Sequence[Stmt], windows: Windows) -> PartState:
        """One trip over a rank with a state: each part from its first block to its last, then the parts merged."""
        trip = _trip(fold, statements, windows)
        states: list[PartState] = []
        for part in self._parts(fold.rank, windows):
            state = self._first(trip) if not states else {}
            for block in self._blocks(fold.rank, {**windows, fold.rank: part}):
                state = self._step(trip, [state], {**windows, fold.rank: block})
            states.append(state)
        while len(states) > 1:
            odd = states[-1:] if len(states) % 2 else []
            states = [self._step(trip, pair, None) for pair in zip(states[::2], states[1::2], strict=False)] + odd
        return states[0]

    def merged(
        self, fold: Fold, statements: Sequence[Stmt], windows: Windows, states: Sequence[PartState]
    ) -> PartState:
        """The states of parts of a rank merged into one, which is stored as what others see."""
        return self._step(_trip(fold, statements, windows), states, None)

    def _parts(self, rank: str, windows: Windows) -> list[tuple[int, int]]:
        """The stretches that a `split` cuts a rank into; empty ones are left out."""
        start, stop = windows.get(rank, self.full(rank))
        split = next((item for item in self.cascade.schedule if isinstance(item, Split) and item.rank == rank), None)
        if split is None:
            return [(start, stop)]
        count = 1 if split.parts is None else self.extent(split.parts)
        cuts = split.cuts or tuple(start + (stop - start) * part // count for part in range(1, count))
        edges = [start, *(min(max(cut, start), stop) for cut in cuts), stop]
        return [pair for pair in pairwise(edges) if pair[0] < pair[1]] or [(start, stop)]

    def _first(self, trip: _Trip) -> PartState:
        """The state before the first element: nothing, but for the virtual elements that an `init` gives."""
        first = {init.target.name: init for init in trip.fold.init if init.expr is not None}
        state: PartState = {}
        for stmt in trip.statements if first else ():
            target = targets(stmt)[0]
            init = first.get(target.name)
            if init is not None and init.expr is not None:
                state[target.name] = (self._element(target, init.expr, trip.windows),)
                self._write(target, state[target.name][0], self._here(target, trip.windows), ())
            elif trip.is_of_state(stmt) and all(name in self.store for name in reads(stmt)):
                self._execute(stmt, trip.windows)  # what depends on the first state alone, for the inits behind it
        return state

    def _step(self, trip: _Trip, earlier: Sequence[PartState], block: Windows | None) -> PartState:
        """One state of the states of some parts and, where one is given, of a block of the rank.

        The statements run in order, so that each sees the new state of those before it.
        """
        after: PartState = {}
        for stmt in trip.statements:
            assert isinstance(stmt, (Einsum, TopK))
            target = targets(stmt)[0]
            if target.name in trip.fold.state:
                found = [self._moved(trip, stmt, state) for state in earlier if target.name in state]
                if block is not None:
                    found.append(self._block(trip, stmt, block))
                if not found:  # neither part has seen an element
                    continue
                after[target.name] = functools.reduce(functools.partial(self.joined, stmt), found)
                self.hold(stmt, after[target.name], self._here(target, trip.windows))
            elif trip.is_of_state(stmt):
                self._execute(stmt, trip.windows)
            elif block is not None and trip.reduces(stmt):  # of this block alone: a state joins it
                self.hold(stmt, self.partial(stmt, block), self._here(target, trip.windows))
            elif block is not None:
                self._execute(stmt, block)
        return after

    def _block(self, trip: _Trip, stmt: Einsum | TopK, block: Windows) -> Partial:
        """What a block gives to a state: its reduction, or that of the member which the state joins with others."""
        if trip.reduces(stmt):
            return self.partial(stmt, block)
        joined = next(
            node for node in walk(expressions(stmt)[0]) if isinstance(node, Read) and node.tensor in trip.inner
        )
        return (self._element(targets(stmt)[0], joined, trip.windows),)

    def _moved(self, trip: _Trip, stmt: Einsum | TopK, state: PartState) -> Partial:
        """What a state of some part counts for in the state at hand, by the merge of the fold."""
        target = targets(stmt)[0]
        merge = next(merge for merge in trip.fold.merge if merge.target.name == target.name)
        if merge.expr == Read(f"{target.name}'", tuple(map(Rank, target.ranks))):
            return state[target.name]
        for other in trip.statements:
            for position, part in enumerate(targets(other) if targets(other)[0].name in trip.fold.state else ()):
                here = self._here(part, trip.windows)
                value = state[targets(other)[0].name][position] if targets(other)[0].name in state else _absent(here)
                low = tuple(start for start, _ in here.values())
                self.store[f"{part.name}'"] = Stored(value.data, value.dtype, value.present, low, value.weak)
        return (self._element(target, merge.expr, trip.windows),)

    def _element(self, target: Target, expr: Expr, windows: Windows) -> Value:
        """The value of an expression at the ranks of a target."""
        value = Evaluation(self, Einsum(target, expr), windows).statement(expr)
        return v.expand(value, target.ranks, lengths(self._here(target, windows)))

    def _here(self, target: Target, windows: Windows) -> Windows:
        return {rank: windows.get(rank, self.full(rank)) for rank in target.ranks}

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
        inner = Machine(callee, shapes, extents, self.precision, self.device, dict(arguments), block=self.block)
        inner.passing = passing_ranks(callee)
        inner.run(callee.body, {}, groups(callee))
        for result in callee.results:
            self.store[wanted[result.name]] = inner.output(result)

    # --- storage -----------------------------------------------------------------------------------------------------

    def _write(self, target: Target, value: Value, here: Windows, low: tuple[int, ...]) -> None:
        """The value stored at these windows of the target; what was never written stays NaN."""
        if self.precision is Precision.EAGER and not value.weak:
            value = v.cast(value, value.dtype, self.precision)
        if target.name in self.unwritten:  # its type was a guess
            self.unwritten.remove(target.name)
            del self.store[target.name]
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
            stored = self.allocate(target, value.dtype, held, value.weak)
        if stored.dtype is not value.dtype or stored.weak != value.weak:
            self._retype(stored, value)
        place = stored.place(here[rank] for rank in target.ranks)
        stored.data[place] = value.data.to(stored.data.dtype)
        if value.present is not None and stored.present is None:
            stored.present = torch.ones_like(stored.data, dtype=torch.bool)
        if stored.present is not None:
            stored.present[place] = True if value.present is None else value.present

    def allocate(self, target: Target, dtype: DType, held: Windows, weak: bool) -> Stored:
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


@dataclass(frozen=True, slots=True, eq=False)
class _Trip:
    """A fold at hand: its statements in order, and the windows of the ranks around it."""

    fold: Fold
    statements: tuple[Stmt, ...]
    windows: Windows

    def reduces(self, stmt: Stmt) -> bool:
        """Whether the statement folds the rank of the trip."""
        return self.fold.rank in _reduced(stmt)

    def is_of_state(self, stmt: Stmt) -> bool:
        """Whether the statement is a map of the state so far, without the rank."""
        joins = targets(stmt)[0].name in self.fold.state
        return not joins and not self.reduces(stmt) and self.fold.rank not in targets(stmt)[0].ranks

    @property
    def inner(self) -> set[str]:
        """The reductions that a state joins with its virtual elements: they hold for a block only."""
        names = (defines(stmt)[0] for stmt in self.statements if self.reduces(stmt))
        return {name for name in names if name not in self.fold.state}


# --- streams ---------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Queued:
    """A cascade whose streams and waits say in which order named parts run.

    A part is what a statement defines within a window of each rank that the schedule splits. Parts of a reduction are
    hidden until the last of them has come, and then merged by coordinate, whatever came first.
    """

    machine: Machine
    seed: int
    units: tuple[Unit, ...] = ()
    owner: dict[str, int] = field(default_factory=dict)
    named: dict[int, set[int | None]] = field(default_factory=dict)  # the parts that the schedule names of each unit
    waiting: dict[tuple[object, ...], list[tuple[Windows, Partial]]] = field(default_factory=dict)

    def run(self) -> None:
        """All named parts in an order that is allowed, then what results need beside them."""
        cascade, machine = self.machine.cascade, self.machine
        self.units = tuple(units(cascade.body, groups(cascade)))
        self.owner = {
            name: i for i, unit in enumerate(self.units) for stmt in unit.statements for name in defines(stmt)
        }
        types = infer_dtypes(cascade, {param.name: machine.store[param.name].dtype for param in cascade.params})
        for stmt in cascade.body:
            for target in targets(stmt):
                self._empty(target, types[target.name])
        order = self._order()
        for name, index in order:
            if self._alone(self.owner[name]):
                self.named.setdefault(self.owner[name], set()).add(index)
        for name, index in order:
            if (unit := self.owner[name]) in self.named:
                self._refresh(unit, set())
                self._part(self.units[unit].statements[0], index)
        for unit in range(len(self.units)):
            self._rest(unit)

    def _empty(self, target: Target, dtype: DType) -> None:
        """A buffer of a tensor before anything is written: NaN; absent where a type has none."""
        full = {rank: self.machine.full(rank) for rank in target.ranks}
        stored = self.machine.allocate(target, dtype, full, weak=False)
        if not stored.data.is_floating_point():
            stored.present = torch.zeros_like(stored.data, dtype=torch.bool)
        self.machine.unwritten.add(target.name)

    def _order(self) -> list[tuple[str, int | None]]:
        """The named parts, each behind those before it in its stream and those it waits for; else at random.

        A statement goes by the first name that it defines.
        """
        first = {name: defines(stmt)[0] for stmt in self.machine.cascade.body for name in defines(stmt)}
        before: dict[tuple[str, int | None], set[tuple[str, int | None]]] = {}
        for item in self.machine.cascade.schedule:
            pairs: list[tuple[Part, Part]] = []
            if isinstance(item, Stream):
                pairs = [(item.parts[0], item.parts[0]), *pairwise(item.parts)]
            elif isinstance(item, Wait):
                pairs = [(item.on, item.part)]
            for early, late in (((first[a.name], a.index), (first[b.name], b.index)) for a, b in pairs):
                before.setdefault(early, set())
                before.setdefault(late, set()).update({early} - {late})
        rng, order = random.Random(self.seed), list[tuple[str, int | None]]()
        while before:
            ready = [part for part, early in before.items() if early.isdisjoint(before)]
            order.append(rng.choice(ready))  # a verified cascade has no circle of waits
            del before[order[-1]]
        return order

    def _alone(self, unit: int) -> bool:
        """Whether parts of a unit can run: a group, or a recurrence of several statements, runs where it is read."""
        return self.units[unit].group is None and len(self.units[unit].statements) == 1

    def _refresh(self, unit: int, done: set[int]) -> None:
        """What a unit reads and nothing names, computed anew of what is there now."""
        for name in (name for stmt in self.units[unit].statements for name in reads(stmt)):
            other = self.owner.get(name, unit)
            if other != unit and other not in done and (other not in self.named or self._missing(other)):
                done.add(other)
                self._refresh(other, done)
                self._rest(other)

    def _rest(self, unit: int) -> None:
        """The parts of a unit that nothing names."""
        if unit not in self.named:
            self.machine.run(self.units[unit].statements, {}, groups(self.machine.cascade))
        for index in self._missing(unit):
            self._part(self.units[unit].statements[0], index)

    def _missing(self, unit: int) -> list[int]:
        """The numbers of the parts that nothing names, of a unit of which something does."""
        found = self.named.get(unit, {None})
        return [] if None in found else [i for i in range(len(self._parts(unit))) if i not in found]

    def _parts(self, unit: int) -> list[Windows]:
        """The windows of every part of a statement: the first split of the schedule is the outermost."""
        stmt = self.units[unit].statements[0]
        ranks = (*(rank for target in targets(stmt) for rank in target.ranks), *_reduced(stmt))
        found: list[Windows] = [{}]
        for split in (item for item in self.machine.cascade.schedule if isinstance(item, Split)):
            if split.rank in ranks:
                extent = self.machine.full(split.rank)[1]
                count = len(split.cuts) + 1 if split.parts is None else self.machine.extent(split.parts)
                edges = [extent * part // count for part in range(count + 1)]
                edges = [0, *(min(cut, extent) for cut in split.cuts), extent] if split.cuts else edges
                found = [{**windows, split.rank: pair} for windows in found for pair in pairwise(edges)]
        return found

    def _part(self, stmt: Stmt, index: int | None) -> None:
        """One part of a statement, or all of it."""
        machine, unit = self.machine, self.owner[defines(stmt)[0]]
        windows: Windows = {} if index is None else self._parts(unit)[index]
        cut = [rank for rank in windows if rank in _reduced(stmt)]
        if not cut or not isinstance(stmt, (Einsum, TopK)):
            machine.run((stmt,), windows, ())
            return
        here = {rank: windows.get(rank, machine.full(rank)) for rank in targets(stmt)[0].ranks}
        waiting = self.waiting.setdefault((defines(stmt)[0], *here.items()), [])
        waiting.append((windows, machine.partial(stmt, windows)))
        points = sum(math.prod(b - a for a, b in (one[rank] for rank in cut)) for one, _ in waiting)
        if points == math.prod(machine.full(rank)[1] for rank in cut):
            waiting.sort(key=lambda part: [part[0][rank] for rank in cut])
            machine.hold(stmt, functools.reduce(functools.partial(machine.joined, stmt), (p for _, p in waiting)), here)


def _trip(fold: Fold, statements: Sequence[Stmt], windows: Windows) -> _Trip:
    owner = {name: stmt for stmt in statements for name in defines(stmt)}
    return _Trip(fold, tuple(dict.fromkeys(owner[name] for name in fold.update)), windows)


def _reduced(stmt: Stmt) -> tuple[str, ...]:
    """The ranks that a statement folds at its top."""
    if isinstance(stmt, TopK):
        return (stmt.rank,)
    return stmt.expr.ranks if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else ()


def _reducer(stmt: Einsum) -> str:
    """The reducer of a statement; of a map that joins a reduction with another value, the one whose operation it is."""
    if isinstance(stmt.expr, Reduce):
        return stmt.expr.reducer
    assert isinstance(stmt.expr, Apply)
    return next(row.name for row in REDUCERS.values() if row.op == stmt.expr.op)


def _absent(here: Windows) -> Value:
    """Nothing, at every coordinate of some windows."""
    data = torch.zeros(lengths(here))
    return Value(data, tuple(here), DType.F32, torch.zeros_like(data, dtype=torch.bool), weak=True)


def lengths(windows: Windows) -> list[int]:
    """The number of coordinates of each window."""
    return [stop - start for start, stop in windows.values()]


def _low(stmt: Einsum) -> tuple[int, ...]:
    """The first coordinate of each dimension: the earliest initial value along the iterative rank, else 0."""
    earliest = {init.rank: min(other.at for other in stmt.inits) for init in stmt.inits}
    return tuple(earliest.get(rank, 0) for rank in stmt.target.ranks)
