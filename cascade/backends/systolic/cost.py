"""What a cascade costs on a machine under a mapping: cycles, utilisation, traffic, energy. One evaluator for all.

    work       live points of an Einsum times what a point takes on its unit, spread over the lanes
    phases     units of a phase work at the same time: it lasts as long as its busiest unit; phases follow one another
    traffic    a tensor from outside is loaded where its tile changes, one that is made stays on chip or is spilled
    region     the longer of computing and moving; regions follow one another
    energy     operations, registers, accesses of the buffer and of memory, counted and multiplied

What stays on chip follows from the cascade: a tensor that is made in one stage and read in a later one is held for all
iterations of the stages' own loops, which is a whole fiber where they pass over a rank again. What is made and read in
the same iteration is in registers; a state carried from one iteration to the next is held for all of them. Data from
memory go through the buffer, are read from there by the units for every tile, and results go to memory directly, unless
iterations add to them. A unit reads no tensor from the buffer that it has made itself in the same iteration.

Filters count for work, exactly where `points.py` can; data move as whole tiles. An array that is filled and drained at
its edges takes `stream + rows + columns - 2` cycles for every pair of tiles that it holds, and `rows` more where these
are operands: Samajdar et al., SCALE-Sim, ISPASS 2020. Pairs of tiles in which no point is live are left out.

Units: cycles, seconds, bytes, pJ. Requires: canonical.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cascade.backends.systolic.machine import Machine, Unit
from cascade.backends.systolic.mapping import Mapping as Map
from cascade.backends.systolic.mapping import Placement, Published
from cascade.backends.systolic.movement import Movement, RegionPlan, plan_region
from cascade.backends.systolic.nest import Nest, ceil_div
from cascade.backends.systolic.work import Cascaded, Merge, Step, Work, operands, operations, take_apart
from cascade.errors import CommandError, Diagnostic, UnsupportedError, quoted_list
from cascade.inference import bind_sizes, infer_dtypes
from cascade.ir import Cascade, DType, Expr, Reduce
from cascade.passes import lattice
from cascade.passes.points import LivePoints, body_of
from cascade.passes.traffic import BYTES
from cascade.walk import free_ranks
from cascade.wording import suggest

WORDS = {1: DType.BF16, 2: DType.BF16, 4: DType.F32, 8: DType.F64}
"""The type of what the cascade states none for, by the bytes of a word; one of 8 bits stays one, sums included."""


@dataclass(frozen=True, slots=True)
class EinsumCost:
    """One Einsum: its unit, live points, cycles of that unit, and pJ of its operations (None: not known)."""

    unit: str
    points: int
    cycles: int
    energy: float | None


@dataclass(frozen=True, slots=True)
class PhaseCost:
    """Cycles of each unit in a phase, those of emptying an array, and of the whole."""

    units: Mapping[str, int]
    drain: int
    cycles: int


@dataclass(frozen=True, slots=True)
class RegionCost:
    """One region: cycles of computing, seconds of memory, and of the longer one; loops as they were fitted."""

    name: str
    cycles: int
    memory_s: float
    seconds: float
    bound: str
    phases: tuple[PhaseCost, ...]
    movement: Movement


@dataclass(frozen=True, slots=True)
class Cost:
    """What a cascade costs; see the module. `energy` has pJ by what takes them, None where a machine does not say.

    What a fold does to a state D for every block is an Einsum `D'` of its own.
    """

    machine: str
    seconds: float
    cycles: float
    busy: Mapping[str, int]
    traffic: int
    energy: Mapping[str, float | None]
    einsums: Mapping[str, EinsumCost]
    regions: tuple[RegionCost, ...]
    assumed: tuple[str, ...]

    @property
    def utilisation(self) -> dict[str, float]:
        """The share of the time in which each unit works."""
        return {unit: busy / self.cycles if self.cycles else 0.0 for unit, busy in self.busy.items()}

    @property
    def energy_pj(self) -> float | None:
        """All energy; None where a part is not known."""
        known = [part for part in self.energy.values() if part is not None]
        return math.fsum(known) if len(known) == len(self.energy) else None


def one_after_another(costs: Sequence[Cost]) -> Cost:
    """The cost of cascades that run one after another on one machine, their Einsums under names of their own."""
    busy = {unit: sum(cost.busy[unit] for cost in costs) for unit in costs[0].busy}
    return Cost(
        costs[0].machine,
        math.fsum(cost.seconds for cost in costs),
        math.fsum(cost.cycles for cost in costs),
        busy,
        sum(cost.traffic for cost in costs),
        {name: _sum([cost.energy[name] for cost in costs]) for name in costs[0].energy},
        {name: found for cost in costs for name, found in cost.einsums.items()},
        tuple(region for cost in costs for region in cost.regions),
        tuple(name for cost in costs for name in cost.assumed),
    )


@dataclass(slots=True, eq=False)
class Evaluator:
    """A cascade, a machine and a mapping, prepared: `cost` evaluates them for sizes."""

    cascaded: Cascaded
    machine: Machine
    mapping: Map
    unit: dict[str, Unit] = field(init=False)
    counts: dict[str, Counter[str]] = field(init=False)
    each: dict[str, int] = field(init=False)  # cycles of a point
    firsts: dict[str, list[_First]] = field(init=False)
    filters: dict[str, tuple[Expr, ...]] = field(init=False)
    place: dict[str, Placement] = field(init=False)
    widths: dict[str, int] = field(init=False)
    regions: tuple[RegionPlan, ...] = field(init=False)

    def __post_init__(self) -> None:
        _check_names(self.cascaded, self.machine, self.mapping)
        chosen = dict(self.mapping.units)
        for region in self.mapping.regions:
            chosen |= {name: unit for phase in region.phases for unit, names in phase.work for name in names}
        self.unit, self.counts = {}, {}
        for name, work in self.cascaded.works.items():
            self.unit[name], self.counts[name] = _bound(work.name, work.steps, self.machine, chosen.get(name))
        self.each = {name: _cycles(self.counts[name], self.unit[name]) for name in self.counts}
        self.firsts = {name: list(_firsts(work, self.unit[name])) for name, work in self.cascaded.works.items()}
        live = LivePoints(self.cascaded.shapes, {})
        self.filters = {name: live.filters(work.stmt, work.ranks) for name, work in self.cascaded.works.items()}
        self.place = dict(self.mapping.place)
        self.widths = _widths(self.cascaded.cascade, self.machine.word_bytes)
        self.regions = tuple(self.plan(self.mapping, number) for number in range(len(self.mapping.regions)))

    def plan(self, mapping: Map, number: int) -> RegionPlan:
        """A region of a mapping that binds as this one does, planned."""
        return plan_region(self.cascaded, mapping, number, self.widths, self.unit, self.machine.buffer.bytes)

    def region_cost(self, plan: RegionPlan, sizes: Mapping[str, int]) -> RegionCost:
        """The cost of one region, for a search."""
        bound, extents = self._sizes(sizes)
        return self._evaluated(plan, extents, LivePoints(self.cascaded.shapes, bound), Published())[0]

    def region_energy(self, plan: RegionPlan, sizes: Mapping[str, int]) -> tuple[RegionCost, float | None]:
        """The cost of one region, and its pJ; None where the machine does not say."""
        bound, extents = self._sizes(sizes)
        region, loads = self._evaluated(plan, extents, LivePoints(self.cascaded.shapes, bound), Published())
        einsums = {name: self._einsum(load, Published()) for name, load in loads.items()}
        return region, _sum(list(self._energy(loads, einsums, [region], Published()).values()))

    def latency(self, name: str) -> int:
        """Cycles that one point of an Einsum takes on a lane of its unit."""
        return self.each[name]

    def extents(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """The extents of all rank variables."""
        return self._sizes(sizes)[1]

    def _sizes(self, sizes: Mapping[str, int]) -> tuple[dict[str, int], dict[str, int]]:
        """The sizes of all symbols, and the extents of all rank variables."""
        bound = bind_sizes(self.cascaded.cascade, {}, sizes)
        ranks = self.cascaded.shapes.ranks
        return bound, {rank: size if isinstance(size, int) else bound[size] for rank, size in ranks.items()}

    def _evaluated(
        self, plan: RegionPlan, extents: Mapping[str, int], points: LivePoints, quirks: Published
    ) -> tuple[RegionCost, dict[str, _Load]]:
        """The cost of a region, and what its Einsums ask of their units."""
        movement = plan.movement(extents, points.sizes, quirks)
        loads = {
            name: self._load(self.cascaded.works[name], points, movement.nests[stage])
            for name, stage in plan.stage_of.items()
        }
        for merge in self._merges(plan):
            loads[f"{merge.state}'"] = self._merge(merge, plan, movement, extents)
        return self._region(plan, movement, loads), loads

    def cost(self, sizes: Mapping[str, int], as_published: bool = False) -> Cost:
        """The cost for the sizes of all shape symbols; raises C323 for one that is missing, C540 where nothing fits."""
        bound, extents = self._sizes(sizes)
        points = LivePoints(self.cascaded.shapes, bound)
        quirks = self.mapping.published if as_published else Published()
        loads: dict[str, _Load] = {}
        regions = []
        for plan in self.regions:
            region, inside = self._evaluated(plan, extents, points, quirks)
            regions.append(region)
            loads |= inside
        einsums = {name: self._einsum(load, quirks) for name, load in loads.items()}
        seconds = math.fsum(region.seconds for region in regions)
        busy = dict.fromkeys(self.machine.units, 0)
        for found in einsums.values():
            busy[found.unit] += found.cycles
        return Cost(
            self.machine.name,
            seconds,
            seconds * self.machine.clock_hz,
            busy,
            sum(region.movement.bytes for region in regions),
            self._energy(loads, einsums, regions, quirks),
            einsums,
            tuple(regions),
            tuple(points.assumed),
        )

    # --- work ---------------------------------------------------------------------------------------------------------

    def _load(self, work: Work, points: LivePoints, nest: Nest) -> _Load:
        """The points, operations and cycles of one Einsum on its unit."""
        extents = nest.extents
        unit, counts = self.unit[work.name], self.counts[work.name]
        live = self._points(work, points, extents)
        done = {name: count * live for name, count in counts.items()}
        place = self.place.get(work.name)
        depth = nest.cut(work.ranks)
        if unit.fill and place is None:
            place = best_placement(work, unit, {**extents, **nest.lengths(depth)})
            if place is not None and self.filters[work.name]:
                place = min(placements(work), key=lambda way: self._on_array(work, points, nest, way))
        each = self.each[work.name]
        if place is None:
            cycles = ceil_div(live, unit.lanes) * each
        else:  # every tile is laid on the array anew
            cycles = self._on_array(work, points, nest, place)
        for ranks, one, takes in self.firsts[work.name]:
            first = math.prod([extents[rank] for rank in ranks])
            for name, count in one.items():
                done[name] = done.get(name, 0) + count * first
            cycles += ceil_div(first, unit.lanes) * takes
        return _Load(unit, live, done, cycles)

    def _on_array(self, work: Work, points: LivePoints, nest: Nest, place: Placement) -> int:
        """Cycles of an Einsum whose tiles are laid on an array: those with live points, where that can be counted."""
        unit, each, depth = self.unit[work.name], self.each[work.name], nest.cut(work.ranks)
        live = live_folds(work, unit, place, nest, self.filters[work.name], points.sizes)
        if live is not None:
            folds, elements = live
            return elements * each + folds * edges(work, unit, place)
        tiles = nest.tiles(work.ranks, depth)
        return sum(weight * placed_cycles(work, unit, place, lengths, each) for weight, lengths in tiles)

    def _points(self, work: Work, points: LivePoints, extents: Mapping[str, int]) -> int:
        """The live points of an Einsum."""
        filters = self.filters[work.name]
        if not filters:
            return math.prod([extents[rank] for rank in work.ranks])
        return points.points(work.ranks, filters, work.name).value or 0

    def _merges(self, plan: RegionPlan) -> Iterator[Merge]:
        return (merge for merge in self.cascaded.merges if self.cascaded.maker.get(merge.state) in plan.stage_of)

    def _merge(self, merge: Merge, plan: RegionPlan, movement: Movement, extents: Mapping[str, int]) -> _Load:
        """What a fold does to a state for every block of its rank, on the unit of the state where that can do it."""
        name = self.cascaded.maker[merge.state]
        nest = movement.nests[plan.stage_of[name]]
        size = nest.lengths(len(nest.loops)).get(merge.rank, extents[merge.rank])
        unit, counts = self.unit[name], operations(merge.steps, self.unit[name])
        if counts is None:
            unit, counts = _bound(f"the merge of {merge.state}", merge.steps, self.machine, None)
        count = ceil_div(extents[merge.rank], size or 1) * math.prod(extents[rank] for rank in merge.ranks)
        done = {op: times * count for op, times in counts.items()}
        return _Load(unit, count, done, ceil_div(count, unit.lanes) * _cycles(counts, unit))

    def _einsum(self, load: _Load, quirks: Published) -> EinsumCost:
        energy = 0.0
        known = True
        for name, count in load.operations.items():
            operation = load.unit.operation(name)
            assert operation is not None, "a unit was chosen that has it"
            if name not in quirks.free:
                known &= operation.energy is not None
                energy += count * (operation.energy or 0.0)
        return EinsumCost(load.unit.name, load.points, load.cycles, energy if known else None)

    # --- time ---------------------------------------------------------------------------------------------------------

    def _region(self, plan: RegionPlan, movement: Movement, loads: Mapping[str, _Load]) -> RegionCost:
        phases = tuple(self._phases(plan, movement, loads))
        cycles = sum(phase.cycles for phase in phases)
        memories = self.machine.memories
        memory = max((count / memories[name].bandwidth for name, count in movement.by_memory.items()), default=0.0)
        computing = cycles / self.machine.clock_hz
        bound = "memory" if memory > computing else max(
            self.machine.units, key=lambda name: sum(phase.units.get(name, 0) for phase in phases)
        )  # fmt: skip
        return RegionCost(plan.region.name, cycles, memory, max(memory, computing), bound, phases, movement)

    def _phases(self, plan: RegionPlan, movement: Movement, loads: Mapping[str, _Load]) -> Iterator[PhaseCost]:
        """The phases of the mapping; one with everything in it where it names none."""
        named = [name for phase in plan.region.phases for _, names in phase.work for name in names]
        merges = tuple(f"{merge.state}'" for merge in self._merges(plan))
        rest = tuple(name for name in (*plan.region.statements, *merges) if name not in named)
        listed = [(names, phase.drain) for phase in plan.region.phases for names in [_names(phase.work)]]
        for names, drain in (*listed, *([(rest, None)] if rest else [])):
            units: dict[str, int] = {}
            for name in names:
                unit = loads[name].unit.name
                units[unit] = units.get(unit, 0) + loads[name].cycles
            emptied = 0
            if drain is not None:
                times = [self._fillings(name, plan, movement) for name in names if loads[name].unit.name == drain]
                emptied = self.machine.units[drain].rows * max(times, default=0)
            yield PhaseCost(units, emptied, max(units.values(), default=0) + emptied)

    def _fillings(self, name: str, plan: RegionPlan, movement: Movement) -> int:
        """How often the results of an Einsum fill its array, iteration by iteration."""
        work, nest = self.cascaded.works[name], movement.nests[plan.stage_of[name]]
        ranks = work.writes[0].ranks
        tiles = nest.tiles(work.ranks, nest.cut(work.ranks))
        lanes = self.unit[name].lanes
        return sum(count * ceil_div(math.prod(size[rank] for rank in ranks), lanes) for count, size in tiles)

    # --- energy -------------------------------------------------------------------------------------------------------

    def _energy(
        self,
        loads: Mapping[str, _Load],
        einsums: Mapping[str, EinsumCost],
        regions: list[RegionCost],
        quirks: Published,
    ) -> dict[str, float | None]:
        """pJ of operations, registers, buffer and memory."""
        memories, buffer = self.machine.memories, self.machine.buffer
        found: dict[str, float | None] = {"operations": _sum([cost.energy for cost in einsums.values()])}
        found["registers"] = math.fsum(_registers(load, quirks.one_lane) for load in loads.values())
        read = sum(region.movement.buffer_reads for region in regions) / buffer.access_bytes
        written = sum(region.movement.buffer_writes for region in regions) / buffer.access_bytes
        pairs = ((read, buffer.read), (written, buffer.write))
        found["buffer"] = _sum([None if each is None else count * each for count, each in pairs])
        for name, memory in memories.items():
            accesses = sum(region.movement.by_memory.get(name, 0) for region in regions) / memory.access_bytes
            found[name] = None if memory.energy is None else accesses * memory.energy
        return found


@dataclass(frozen=True, slots=True)
class _Load:
    """What an Einsum asks of its unit: points, operations of each kind, cycles."""

    unit: Unit
    points: int
    operations: dict[str, int]
    cycles: int


def evaluator(cascade: Cascade, machine: Machine, mapping: Map) -> Evaluator:
    """A canonical cascade prepared for a machine under a mapping."""
    return Evaluator(take_apart(cascade), machine, mapping)


_First: TypeAlias = tuple[tuple[str, ...], Counter[str], int]
"""The first value of a recurrence: its ranks, its operations at a point, their cycles."""


def _firsts(work: Work, unit: Unit) -> Iterator[_First]:
    for init in work.inits:
        counts = operations(init.steps, unit) or Counter()
        yield init.ranks, counts, _cycles(counts, unit)


def _names(work: tuple[tuple[str, tuple[str, ...]], ...]) -> tuple[str, ...]:
    return tuple(name for _, names in work for name in names)


def _widths(cascade: Cascade, word_bytes: int) -> dict[str, int]:
    """Bytes of an element of every tensor."""
    word = WORDS[word_bytes]
    types = infer_dtypes(cascade, {param.name: param.dtype or word for param in cascade.params})
    stated = word in {param.dtype for param in cascade.params} | {result.dtype for result in cascade.results}
    return {name: word_bytes if dtype is word and not stated else BYTES[dtype] for name, dtype in types.items()}


def _sum(parts: list[float | None]) -> float | None:
    known = [part for part in parts if part is not None]
    return math.fsum(known) if len(known) == len(parts) else None


def _cycles(counts: Mapping[str, int], unit: Unit) -> int:
    """Cycles that one point takes on a lane."""
    total = 0
    for name, count in counts.items():
        operation = unit.operation(name)
        assert operation is not None, "a unit was chosen that has it"
        total += count * operation.cycles
    return total


def _registers(load: _Load, one_lane: bool) -> float:
    """pJ of registers: an operation reads its operands and writes its result, on every lane that does it."""
    if load.unit.registers is None:
        return 0.0
    read = sum(count * operands(name) for name, count in load.operations.items())
    written = sum(load.operations.values())
    energy = read * load.unit.registers.read + written * load.unit.registers.write
    return energy / load.unit.lanes if one_lane else energy


# --- arrays ----------------------------------------------------------------------------------------------------------


def placed_cycles(work: Work, unit: Unit, place: Placement, extents: Mapping[str, int], each: int) -> int:
    """Cycles of an Einsum with ranks along the sides of an array, another one streaming through it.

    What does not move with the stream stays in the array. All other ranks are gone through one after another.
    """
    down, across = (math.prod(extents[rank] for rank in side) for side in place.sides)
    folds = ceil_div(down, unit.rows) * ceil_div(across, unit.columns)
    folds *= math.prod(extents[rank] for rank in work.ranks if rank not in place.ranks)
    return folds * ((extents[place.stream] if place.stream else 1) * each + edges(work, unit, place))


def edges(work: Work, unit: Unit, place: Placement) -> int:
    """Cycles in which an array fills and drains, for each tile that is laid on it."""
    stays = place.stream in work.reduced
    return unit.rows + unit.columns - 2 + (0 if stays else unit.rows) if unit.fill else 0


def live_folds(
    work: Work, unit: Unit, place: Placement, nest: Nest, filters: tuple[Expr, ...], sizes: Mapping[str, int]
) -> tuple[int, int] | None:
    """How often an array is laid out with live points in it, and the elements that stream through it for these.

    None without a filter, and where tiles with live points cannot be counted: where filters are no linear forms, where
    a side has several ranks, or tiles of the array do not begin where those of the loops do.
    """
    lengths = nest.inside(nest.cut(work.ranks))
    lanes = {rank: count for side, count in zip(place.sides, (unit.rows, unit.columns), strict=True) for rank in side}
    tile = {rank: min(lanes.get(rank, 1), lengths[rank]) for rank in work.ranks}
    whole = all(lengths[rank] in (nest.extents[rank], tile[rank]) or not lengths[rank] % tile[rank] for rank in lanes)
    if not filters or any(len(side) > 1 for side in place.sides) or not whole:
        return None
    concerned = {rank for test in filters for rank in free_ranks(test)}
    extents = {rank: nest.extents[rank] for rank in work.ranks if rank in concerned}
    found = []
    for step in (lengths[place.stream] if place.stream else 1, 1):
        each = {**tile, **({place.stream: step} if place.stream else {})}
        live = lattice.tiles(filters, extents, sizes, each)
        if live is None:
            return None
        others = (ceil_div(nest.extents[rank], each[rank]) for rank in work.ranks if rank not in concerned)
        found.append(live * math.prod(others))
    return found[0], found[1]


def placements(work: Work) -> Iterator[Placement]:
    """The ways to lay a sum of products on an array: its result stays, or an operand that has a folded rank does.

    An array passes one operand along its rows, another along its columns, so a rank along a side moves one of them
    alone: those that all operands have, as in a batch, are gone through in turn. Where an operand has no rank of its
    own, as the vector of a matrix-vector product, it takes one row, or goes through as one element.
    """
    body = body_of(work.stmt)
    if not (isinstance(body, Reduce) and body.reducer == "sum" and len(work.reads) > 1):
        return
    readers = {
        rank: {at for at, read in enumerate(work.reads) if rank in read.ranks}
        for rank in work.ranks
        if rank not in work.reduced
    }
    own: dict[str, set[int]] = {rank: found for rank, found in readers.items() if len(found) < len(work.reads)}
    for folded in work.reduced:
        for one, other in itertools.permutations({**own, "": set()}, 2):
            if not own.get(one, set()) & own.get(other, set()):
                yield Placement(one, other, folded)
                yield Placement(folded, one, other)


def best_placement(work: Work, unit: Unit, extents: Mapping[str, int]) -> Placement | None:
    """The fastest way to lay an Einsum on an array; None for one that is no product of matrices."""
    found = list(placements(work))
    return min(found, key=lambda place: placed_cycles(work, unit, place, extents, 1)) if found else None


# --- binding ---------------------------------------------------------------------------------------------------------


def _bound(name: str, steps: tuple[Step, ...], machine: Machine, wanted: str | None) -> tuple[Unit, Counter[str]]:
    """The unit of an Einsum and its operations there: the one that is named, else the fastest that can do them."""
    able: list[tuple[float, Unit, Counter[str]]] = []
    for unit in machine.units.values():
        counts = operations(steps, unit)
        if counts is not None and wanted in (None, unit.name):
            able.append((_cycles(counts, unit) / unit.lanes, unit, counts))
    if not able:
        raise _cannot(name, steps, machine, wanted)
    _, unit, counts = min(able, key=lambda found: found[0])
    return unit, counts


def _cannot(name: str, steps: tuple[Step, ...], machine: Machine, wanted: str | None) -> UnsupportedError:
    units = [unit for unit in machine.units.values() if wanted in (None, unit.name)]
    lacking = {step.op for step in steps if not any(unit.operation(step.op) for unit in units)}
    where = f"unit {wanted} of {machine.name} lacks" if wanted else f"no unit of {machine.name} has"
    what = f"{name} needs {quoted_list(sorted(lacking or {step.op for step in steps}))}"
    hint = "add the operation to a unit of the machine file, or bind the Einsum to another unit"
    return UnsupportedError(Diagnostic("C541", f"{what}, which {where}", help=hint))


def _check_names(cascaded: Cascaded, machine: Machine, mapping: Map) -> None:
    """The mapping runs every Einsum once, on units that there are, and names no other."""
    known = list(cascaded.works)
    run = [name for region in mapping.regions for name in region.statements]
    bound = [name for region in mapping.regions for phase in region.phases for name in _names(phase.work)]
    units = [unit for region in mapping.regions for phase in region.phases for unit, _ in phase.work]
    units += [phase.drain for region in mapping.regions for phase in region.phases if phase.drain is not None]
    for unit in (*units, *(unit for _, unit in mapping.units)):
        if unit not in machine.units:
            raise _misfit(f"no unit of {machine.name} is called {unit}", suggest(unit, machine.units, "its units are"))
    for name in (*run, *bound, *(name for name, _ in (*mapping.units, *mapping.place))):
        if name not in known:
            raise _misfit(f"the cascade has no Einsum {name}", suggest(name, known, "its Einsums are"))
    for name in known:
        if run.count(name) != 1:
            times = "in no region" if name not in run else "in more than one stage"
            raise _misfit(f"{name} runs {times}", "name every Einsum in one stage of one region")
    for name, place in mapping.place:
        ranks = cascaded.works[name].ranks
        for rank in place.ranks:
            if rank not in ranks:
                raise _misfit(f"{name} has no rank {rank} to lay on an array", suggest(rank, ranks, "its ranks are"))
            if place.ranks.count(rank) > 1:
                raise _misfit(f"{rank} of {name} is laid on an array twice", "name each rank once; others come in turn")


def _misfit(message: str, hint: str) -> CommandError:
    return CommandError(Diagnostic("C622", f"the mapping does not fit: {message}", help=hint))
