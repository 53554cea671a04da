"""Spreads a cascade over a mesh: where every tensor lies, what is a partial result, which collectives stand between.

    mesh tp = 8                          place Wu 1 over tp, place Wd 0 over tp
    shard f over tp              -->     compute H along f over tp
    H[t,f] = X[t,d] * Wu[d,f]            compute Y along f over tp        f is summed: partial sums
    Y[t,e] = H[t,f] * Wd[f,e]            all-reduce Y over tp by sum

A statement runs along one rank for each axis, or along none and is computed everywhere. What follows is algebra, for
every axis on its own: a rank that the left side keeps shards the result, one that is reduced makes it partial, with the
reducer as the operator that merges. An operand is enough where the box that a device reads (`reach.py`) lies in its
shard; else the shards change by the cheapest collective that makes it enough: reduce-scatter and all-to-all where a
shard is enough, all-gather and all-reduce where it is not. A replicated tensor is its own shards, for nothing.

`stated` follows what the schedule says and runs all else everywhere. `cheapest` chooses, by cost over placements: a
beam of partial programs, statement by statement. Parameters are stored once over the mesh: what a device needs of one
beyond its shard is gathered at every call and paid for by the byte. That is what makes tensor parallelism of a layer
whose weights outweigh its activations; nothing asks what a layer is.

Sources: placements as in GSPMD (arXiv 2105.04663) and torch's DTensor; the plan of Megatron-LM (1909.08053) and its
sequence-parallel form (2205.05198) are what the search finds on their layers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeAlias

from cascade.errors import Diagnostic, UnsupportedError
from cascade.inference import bind_sizes, infer_dtypes
from cascade.ir import Cascade, DType, Einsum, Fold, Mesh, Rank, Read, Reduce, Shard, Stmt, TopK
from cascade.order import Unit
from cascade.passes.points import iterated
from cascade.passes.reach import Box, Reach, inside
from cascade.passes.traffic import BYTES, traffic
from cascade.placed import (
    Along, Axes, Axis, Collective, Compute, Kind, Place, Program, Step, Window, coordinates, number_along, stretch,
    windows_of,
)  # fmt: skip
from cascade.walk import defines, expressions, free_ranks, reads, targets, walk
from cascade.wording import quote

BEAM = 96
"""Partial programs that are expanded for every statement, shared among the ways to run it."""

FOLD = "fold"
"""What merges the states of a fold: the merges that lifting found."""

Held: TypeAlias = tuple[tuple[int, Axes], ...]
"""Which dimensions of a tensor are sharded over what; none is replicated."""

Choice: TypeAlias = Mapping[str, tuple[Along, ...]]
"""Along which ranks each statement runs, by the first name that it defines."""


class Costs(Protocol):
    """What the search weighs, in microseconds."""

    def compute_us(self, flops: float, moved: float) -> float:
        """So many operations and bytes on one device."""
        ...

    def collective_us(self, kind: Kind, size: float, devices: int) -> float:
        """A collective on a tensor of so many bytes, all devices together."""
        ...

    def held_us(self, size: float, devices: int) -> float:
        """So many bytes of parameters that are gathered at a call."""
        ...


@dataclass(frozen=True, slots=True)
class Partial:
    """A result that devices have parts of: along which axes, by which reducer it is merged, how else it is sharded.

    `lead` is the tensor that a collective names: the first of a fold, whose states are merged together.
    """

    axes: tuple[Axes, ...]
    reducer: str
    held: Held
    lead: str


@dataclass(frozen=True, eq=False)
class State:
    """A program so far: what it costs, what devices hold of each tensor, where parameters were put, its steps."""

    cost: float = 0.0
    held: Mapping[str, frozenset[Held]] = field(default_factory=dict)
    partial: Mapping[str, Partial] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()


def stated(cascade: Cascade, sizes: Mapping[str, int]) -> Program:
    """The program that `mesh` and `shard` of the schedule say; statements without a sharded rank run everywhere.

    The cascade is canonical. Raises C551 where there is no mesh or a rank cannot be sharded.
    """
    return Sharding(cascade, sizes).program({})


def cheapest(cascade: Cascade, sizes: Mapping[str, int], costs: Costs, dtype: DType = DType.BF16) -> Program:
    """The program of least cost among those that keep what the schedule says; parameters without a type have `dtype`.

    The cascade is canonical. Raises C551 where there is no mesh or a rank cannot be sharded.
    """
    sharding = Sharding(cascade, sizes, costs, dtype)
    return sharding.finished(sharding.search(), leave=True)


def undivided(cascade: Cascade, sizes: Mapping[str, int]) -> Program:
    """The program of one device: every statement whole, nothing sharded. The cascade is canonical."""
    reach = Reach.of(cascade, dict(sizes))
    return Program(cascade, (), tuple(sorted(sizes.items())), (), tuple(Compute(name) for name in reach.units))


@dataclass(eq=False)
class Sharding:
    """A cascade on a mesh, and what follows from running its statements along given ranks."""

    cascade: Cascade
    given: Mapping[str, int]
    costs: Costs | None = None
    dtype: DType = DType.BF16
    enough: dict[tuple[Compute, str, Held], bool] = field(default_factory=dict)
    fitting: dict[tuple[Compute, str], tuple[Held, ...]] = field(default_factory=dict)
    times: dict[Compute, float] = field(default_factory=dict)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """A number for every symbol."""
        return bind_sizes(self.cascade, {}, self.given)

    @cached_property
    def reach(self) -> Reach:
        """What statements touch."""
        return Reach.of(self.cascade, self.sizes)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The mesh of the schedule."""
        found = tuple(
            Axis(item.axis, item.size if isinstance(item.size, int) else self.sizes[item.size])
            for item in self.cascade.schedule
            if isinstance(item, Mesh)
        )
        if not found:
            message = f"the schedule of {quote(self.cascade.name)} has no mesh"
            raise UnsupportedError(Diagnostic("C551", message, help="declare one: schedule { mesh tp = 8 }"))
        return found

    @cached_property
    def places(self) -> list[dict[str, int]]:
        """The coordinates of every device."""
        return coordinates(self.axes)

    @cached_property
    def params(self) -> frozenset[str]:
        """The names of the parameters."""
        return frozenset(param.name for param in self.cascade.params)

    @cached_property
    def bytes(self) -> dict[str, float]:
        """The bytes of every tensor; what is computed in 32 bits from 16 travels in 16."""
        types = infer_dtypes(self.cascade, {param.name: self.dtype for param in self.cascade.params})
        widest = BYTES[self.dtype]
        return {
            name: math.prod(self.reach.shape(name)) * min(BYTES[dtype], widest if dtype is DType.F32 else 8)
            for name, dtype in types.items()
        }

    @cached_property
    def operations(self) -> dict[str, float]:
        """The operations of every statement, transcendental ones counted once."""
        found = traffic(self.cascade, self.sizes, (), self.dtype).statements
        return {name: float(sum(amount.value or 0 for amount in amounts)) for name, amounts in found.items()}

    @cached_property
    def flops(self) -> dict[str, float]:
        """The operations of every unit."""
        return {
            name: sum(self.operations[defines(stmt)[0]] for stmt in unit.statements)
            for name, unit in self.reach.units.items()
        }

    @cached_property
    def outside(self) -> dict[str, tuple[str, ...]]:
        """What every unit reads that the statement that reads it does not define, by the unit's first name."""
        return {
            name: tuple(
                tensor
                for tensor in dict.fromkeys(t for stmt in unit.statements for t in reads(stmt))
                if all(tensor not in defines(stmt) for stmt in unit.statements)
            )
            for name, unit in self.reach.units.items()
        }

    # --- along what a statement may run ------------------------------------------------------------------------------

    def stated(self, name: str) -> tuple[Along, ...]:
        """What the schedule says of a unit: of two ranks that share an axis, the one that stands first."""
        possible = self.possible(self.reach.units[name])
        rank_of: dict[str, str] = {}
        for item in self.cascade.schedule:
            if isinstance(item, Shard) and item.rank in possible:
                rank_of.setdefault(item.axis, item.rank)
        found = {
            rank: tuple(axis.name for axis in self.axes if rank_of.get(axis.name) == rank) for rank in rank_of.values()
        }
        return tuple(Along(rank, axes) for rank, axes in found.items())

    def possible(self, unit: Unit) -> tuple[str, ...]:
        """The ranks along which a unit can run in parts that are independent, or merge."""
        if isinstance(unit.group, Fold):
            common = [rank for rank in targets(unit.statements[0])[0].ranks if rank != unit.group.rank]
            everywhere = (r for r in common if all(r in t.ranks for stmt in unit.statements for t in targets(stmt)))
            return (*everywhere, unit.group.rank)
        if not unit.cyclic:
            stmt = unit.statements[0]
            kept = set(targets(stmt)[0].ranks) - set(free_ranks(stmt.body)) if isinstance(stmt, TopK) else set()
            return tuple(rank for rank in iterated(stmt) if rank not in kept)
        stepped = {init.rank for stmt in unit.statements if isinstance(stmt, Einsum) for init in stmt.inits}
        own = {target.name: target.ranks for stmt in unit.statements for target in targets(stmt)}
        ranks = [rank for rank in next(iter(own.values())) if rank not in stepped]
        return tuple(rank for rank in ranks if all(_keeps(stmt, rank, own) for stmt in unit.statements))

    def options(self, name: str) -> Iterator[tuple[Along, ...]]:
        """The ways to run a unit: for each axis a rank long enough, or none; where the schedule speaks, that."""
        if found := self.stated(name):
            yield found
            return
        ranks = self.possible(self.reach.units[name])
        for chosen in itertools.product((None, *ranks), repeat=len(self.axes)):
            taken = [rank for rank in dict.fromkeys(chosen) if rank is not None]
            spread = [
                Along(rank, tuple(axis.name for axis, own in zip(self.axes, chosen, strict=True) if own == rank))
                for rank in taken
            ]
            if all(self.reach.full[a.rank][1] >= self.devices(a.axes) for a in spread):
                yield tuple(spread)

    def devices(self, axes: Axes) -> int:
        """How many devices some axes have together."""
        return math.prod(axis.size for axis in self.axes if axis.name in axes)

    # --- what is enough for whom -------------------------------------------------------------------------------------

    def box(self, tensor: str, held: Held, place: Mapping[str, int]) -> Box:
        """What a device holds of a tensor that is sharded so."""
        box: list[Window] = [(0, extent) for extent in self.reach.shape(tensor)]
        for dim, axes in held:
            box[dim] = stretch(box[dim], number_along(place, axes, self.axes), self.devices(axes))
        return tuple(box)

    def is_enough(self, step: Compute, tensor: str, held: Held) -> bool:
        """Whether every device finds what it reads of a tensor in its shard."""
        key = step, tensor, held
        if key not in self.enough:
            self.enough[key] = all(
                inside(box, self.box(tensor, held, place))
                for place in self.places
                for name, box in self.reach.reads(step.name, windows_of(step, place, self.axes, self.reach.full))
                if name == tensor
            )
        return self.enough[key]

    def fits(self, step: Compute, tensor: str) -> tuple[Held, ...]:
        """The ways to shard a tensor over the axes of a step that are enough for it, finest first."""
        key = step, tensor
        if key not in self.fitting:
            dims = range(len(self.reach.shape(tensor)))
            found: dict[Held, None] = {}
            for chosen in itertools.product((None, *dims), repeat=len(step.along)):
                pairs = [(dim, a.axes) for dim, a in zip(chosen, step.along, strict=True) if dim is not None]
                if len({dim for dim, _ in pairs}) == len(pairs):
                    held = tuple(sorted(pairs))
                    if self.is_enough(step, tensor, held):
                        found[held] = None
            finest = sorted(found, key=lambda held: -math.prod(self.devices(axes) for _, axes in held))
            self.fitting[key] = tuple(finest)
        return self.fitting[key]

    # --- one statement more ------------------------------------------------------------------------------------------

    def after(self, state: State, name: str, along: tuple[Along, ...]) -> State:
        """The program with one unit more, and what it takes for every device to find what it reads."""
        step = Compute(name, along)
        for tensor in self.outside[name]:
            state = self.provided(state, step, tensor)
        held, partial = dict(state.held), dict(state.partial)
        fold = self.reach.units[name].group
        for stmt in self.reach.units[name].statements:
            for target in targets(stmt):
                kept = [(target.ranks.index(a.rank), a.axes) for a in along if a.rank in target.ranks]
                split = tuple(a.axes for a in along if a.rank not in target.ranks)
                if split and isinstance(fold, Fold):
                    partial[target.name] = Partial(split, FOLD, tuple(sorted(kept)), name)
                elif split:
                    partial[target.name] = Partial(split, reducer_of(stmt), tuple(sorted(kept)), target.name)
                else:
                    held[target.name] = frozenset({tuple(sorted(kept))})
        return State(state.cost + self.compute_us(step), held, partial, (*state.steps, step))

    def compute_us(self, step: Compute) -> float:
        """What the costs say of a unit on one device; 0 where nobody asks."""
        if self.costs is None:
            return 0.0
        if step not in self.times:
            share = 1 / math.prod(self.devices(a.axes) for a in step.along)
            stmts = self.reach.units[step.name].statements
            names = {name for stmt in stmts for name in (*reads(stmt), *defines(stmt))}
            moved = sum(self.bytes[name] for name in names)
            self.times[step] = self.costs.compute_us(self.flops[step.name] * share, moved * share)
        return self.times[step]

    def provided(self, state: State, step: Compute, tensor: str) -> State:
        """The program with collectives behind which the tensor is enough for a step."""
        if tensor in self.params:
            return self._stored(state, step, tensor)
        while tensor in state.partial:
            state = self._merged(state, tensor, self.fits(step, tensor))
        if any(self.is_enough(step, tensor, held) for held in state.held[tensor]):
            return state
        found = [self._moved(state, step, tensor, held) for held in sorted(state.held[tensor])]
        return min(found, key=lambda other: other.cost)

    def _stored(self, state: State, step: Compute, tensor: str) -> State:
        """A parameter lies as its first reader wants it, and everywhere where two want it differently."""
        finest = self.fits(step, tensor)[0]
        if tensor not in state.held:
            held: Held = finest
        elif any(self.is_enough(step, tensor, held) for held in state.held[tensor]):
            return state
        else:
            held = ()
        missing = 1.0 if not held else 0.0
        cost = self.costs.held_us(self.bytes[tensor] * missing, len(self.places)) if self.costs else 0.0
        return dataclasses.replace(state, cost=state.cost + cost, held={**state.held, tensor: frozenset({held})})

    def _merged(self, state: State, tensor: str, wanted: Sequence[Held]) -> State:
        """The partial results along one axis merged: scattered where a shard is enough, else for everyone."""
        partial = state.partial[tensor]
        axes, rest = partial.axes[0], partial.axes[1:]
        taken = {dim for dim, _ in partial.held}
        target = next((dim for held in wanted for dim, own in held if own == axes and dim not in taken), None)
        if partial.reducer == FOLD or (target is not None and self.reach.shape(tensor)[target] < self.devices(axes)):
            target = None
        kind = Kind.ALL_REDUCE if target is None else Kind.REDUCE_SCATTER
        step = Collective(kind, partial.lead, axes, partial.reducer, None, target)
        state = self._exchanged(state, step, partial.held)
        waiting, held = dict(state.partial), dict(state.held)
        for name in [name for name, other in waiting.items() if other.lead == partial.lead]:
            other = waiting.pop(name)
            lies = other.held if target is None else tuple(sorted((*other.held, (target, axes))))
            if rest:
                waiting[name] = dataclasses.replace(other, axes=rest, held=lies)
            else:
                held[name] = frozenset({lies})
        return dataclasses.replace(state, partial=waiting, held=held)

    def _moved(self, state: State, step: Compute, tensor: str, held: Held) -> State:
        """The shards of a tensor changed, one dimension after the other, until they are enough."""
        while not self.is_enough(step, tensor, held):
            dim, axes = held[-1]
            others = held[:-1]
            swaps = (wanted for wanted in self.fits(step, tensor) for d, own in wanted if own == axes and d != dim)
            swap = next(
                (d for wanted in swaps for d, own in wanted if own == axes and d not in {d for d, _ in others}), None
            )
            kind, target = (Kind.ALL_GATHER, None) if swap is None else (Kind.ALL_TO_ALL, swap)
            state = self._exchanged(state, Collective(kind, tensor, axes, "", dim, target), others)
            held = others if swap is None else tuple(sorted((*others, (swap, axes))))
            state = dataclasses.replace(state, held={**state.held, tensor: state.held[tensor] | {held}})
        return state

    def _exchanged(self, state: State, step: Collective, others: Held) -> State:
        """The program with a collective more, on a tensor that is otherwise sharded so."""
        share = math.prod(self.devices(axes) for _, axes in others)
        devices = self.devices(step.axes)
        cost = self.costs.collective_us(step.kind, self.bytes[step.tensor] / share, devices) if self.costs else 0.0
        return dataclasses.replace(state, cost=state.cost + cost, steps=(*state.steps, step))

    # --- whole programs ----------------------------------------------------------------------------------------------

    def program(self, choice: Choice) -> Program:
        """The program in which every unit runs along what `choice` says, or else the schedule; results are whole."""
        state = State()
        for name in self.reach.units:
            state = self.after(state, name, choice.get(name, self.stated(name)))
        return self.finished(state, leave=False)

    def search(self) -> State:
        """The cheapest program that the beam finds."""
        beam = [State()]
        names = list(self.reach.units)
        for number, name in enumerate(names):
            behind = (t for other in names[number + 1 :] for s in self.reach.units[other].statements for t in reads(s))
            later = sorted({*behind, *(result.name for result in self.cascade.results)})
            ways = list(self.options(name))
            best: dict[object, State] = {}
            for state in beam:
                for along in ways:
                    found = self.after(state, name, along)
                    key = _live(found, later)
                    if key not in best or found.cost < best[key].cost:
                        best[key] = found
            beam = sorted(best.values(), key=lambda state: state.cost)[: max(4, BEAM // len(ways))]
        return min((self._results(state, leave=True) for state in beam), key=lambda state: state.cost)

    def finished(self, state: State, leave: bool) -> Program:
        """A program of all statements: results merged, parameters where they were put."""
        state = self._results(state, leave)
        places = tuple(
            Place(param.name, dim, axes)
            for param in self.cascade.params
            for held in state.held.get(param.name, ())
            for dim, axes in held
        )
        sizes = tuple(sorted(self.sizes.items()))
        return Program(self.cascade, self.axes, sizes, places, state.steps)

    def _results(self, state: State, leave: bool) -> State:
        """No result stays partial: it is left in shards, as a parameter of its shape is, or else is made whole."""
        for result in self.cascade.results:
            alike = [p.name for p in self.cascade.params if self.reach.shape(p.name) == self.reach.shape(result.name)]
            wanted = [held for name in alike for held in state.held.get(name, ())] if leave else []
            while result.name in state.partial:
                state = self._merged(state, result.name, wanted)
        return state


def _keeps(stmt: Stmt, rank: str, own: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether a statement of a recurrence has the rank, and reads the recurrence at its own coordinate of it."""
    if rank not in targets(stmt)[0].ranks:
        return False
    nodes = (node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read) and node.tensor in own)
    return all(rank in own[node.tensor] and node.index[own[node.tensor].index(rank)] == Rank(rank) for node in nodes)


def reducer_of(stmt: Stmt) -> str:
    """The reducer at the top of a statement; `topk` of one that chooses."""
    if isinstance(stmt, TopK):
        return "topk"
    assert isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce)
    return stmt.expr.reducer


def _live(state: State, later: Sequence[str]) -> object:
    """What of a program so far the rest of it depends on."""
    return (
        tuple((name, state.held[name]) for name in later if name in state.held),
        tuple((name, state.partial[name]) for name in later if name in state.partial),
    )
