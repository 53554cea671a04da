"""Costs in closed form: work, traffic and what is on chip as expressions of the shape symbols, by SymPy.

    QK      B*E*H*M0*M1*P/65536 cycles of 2d
    K       2*B*E*H*M0*M1*P/p_rows bytes read: once for every tile of the rows, whose size is fitted

They hold where tiles divide their ranks, every loop has more than one iteration, and lanes divide the work; the size of
a loop to be fitted is the symbol `<rank>_<label>`. Filters are taken to hold everywhere, nothing is spilled, and
what a fold does to its states is left out. At such sizes they are the numbers of `cost.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy

from cascade.backends.systolic.cost import Evaluator, best_placement
from cascade.backends.systolic.mapping import ALL
from cascade.backends.systolic.movement import RegionPlan
from cascade.backends.systolic.nest import Nest
from cascade.backends.systolic.work import Access, Place, Work
from cascade.ir import Loop

Form = Any
"""A SymPy expression, or a number."""


@dataclass(frozen=True, slots=True)
class RegionForms:
    """One region: cycles of its phases, bytes of each tensor read and written, bytes on chip."""

    name: str
    cycles: Form
    moved: Mapping[tuple[str, str], Form]
    on_chip: Form

    @property
    def traffic(self) -> Form:
        """All bytes that cross between chip and memory."""
        return sympy.expand(sum(self.moved.values()))


@dataclass(frozen=True, slots=True)
class Forms:
    """A cascade on a machine under a mapping in closed form: cycles by Einsum, its unit, and the regions."""

    cycles: Mapping[str, Form]
    units: Mapping[str, str]
    regions: tuple[RegionForms, ...]


def closed_forms(evaluator: Evaluator) -> Forms:
    """The closed forms of what an evaluator evaluates."""
    ranks = evaluator.cascaded.shapes.ranks
    extents = {rank: symbol(size) if isinstance(size, str) else sympy.Integer(size) for rank, size in ranks.items()}
    cycles: dict[str, Form] = {}
    regions = []
    for plan in evaluator.regions:
        nests = [_nest(plan, stage, extents) for stage in range(len(plan.region.stages))]
        for name, stage in plan.stage_of.items():
            cycles[name] = _cycles(evaluator, evaluator.cascaded.works[name], nests[stage])
        regions.append(_region(evaluator, plan, tuple(nests), cycles))
    return Forms(cycles, {name: evaluator.unit[name].name for name in cycles}, tuple(regions))


def symbol(name: str) -> Form:
    """A shape symbol: a whole number above 0."""
    return sympy.Symbol(name, integer=True, positive=True)


def _nest(plan: RegionPlan, stage: int, extents: Mapping[str, Form]) -> Nest:
    """The loops of a stage, all of them but such as take a whole rank of known extent."""
    loops: list[tuple[str, Form]] = []
    after: list[int] = []
    for loop in plan.stage_loops[stage]:
        size = _size(loop)
        extent = extents[loop.rank]
        if not (extent.is_number and size.is_number and extent <= size):
            loops.append((loop.rank, size))
        after.append(len(loops))
    return Nest(tuple(loops), extents, {}, tuple(after))


def _size(loop: Loop) -> Form:
    return symbol(f"{loop.rank}_{loop.label}") if loop.size is None else sympy.Integer(loop.size)


# --- work ------------------------------------------------------------------------------------------------------------


def _cycles(evaluator: Evaluator, work: Work, nest: Nest) -> Form:
    """Cycles of an Einsum on its unit, the lanes dividing its points."""
    unit = evaluator.unit[work.name]
    each = evaluator.latency(work.name)
    place = evaluator.place.get(work.name)
    if place is None and unit.fill:
        place = best_placement(work, unit, dict.fromkeys(work.ranks, 1 << 20))
    points = math.prod(nest.extents[rank] for rank in work.ranks)
    if place is None:
        return points * each / sympy.Integer(unit.lanes)
    lengths = {**nest.extents, **nest.lengths(nest.cut(work.ranks))}
    stream = (lengths[place.stream] if place.stream else sympy.Integer(1)) * each
    folds = points / math.prod(nest.extents[rank] for rank in place.ranks)
    tiles = math.prod(nest.extents[rank] / lengths[rank] for rank in place.ranks)
    inside = sympy.Integer(1)
    for side, lanes in zip(place.sides, (unit.rows, unit.columns), strict=True):
        inside *= sympy.ceiling(math.prod(lengths[rank] for rank in side) / sympy.Integer(lanes))
    extra = unit.rows + unit.columns - 2 + (0 if place.stream in work.reduced else unit.rows)
    return folds * tiles * inside * (stream + (extra if unit.fill else 0))


# --- movement --------------------------------------------------------------------------------------------------------


def _region(evaluator: Evaluator, plan: RegionPlan, nests: tuple[Nest, ...], cycles: Mapping[str, Form]) -> RegionForms:
    moved: dict[tuple[str, str], Form] = {}
    rooms: list[Form] = []
    for tensor in plan.outside:
        width = plan.widths[tensor]
        stages: dict[int, list[Form]] = {}
        tiles: list[Form] = []
        for reader in plan.readers[tensor]:
            depth = plan.held_in(tensor, reader, nests)
            stages.setdefault(reader.stage, []).append(_moved(nests[reader.stage], reader.access, depth))
            tiles.append(_footprint(nests[reader.stage], reader.access, depth, None))
        level = plan.keep.get(tensor)
        shared = level == ALL or level in {loop.label for loop in plan.region.loops}
        each = [sympy.Max(*found) for found in stages.values()]
        moved[tensor, "read"] = width * (sympy.Max(*each) if shared else sum(each))
        rooms.append(width * sympy.Max(*tiles) * (2 if plan.region.double else 1))
    for tensor in plan.leaves:
        made, width = plan.written[tensor], plan.widths[tensor]
        nest = nests[made.first]
        stored = _moved(nest, made.access, nest.cut(made.access.ranks, plan.stored_depth(tensor, nests)))
        moved[tensor, "written"] = width * stored
        if partial := sympy.simplify(stored - _moved(nest, made.access, 0)):
            moved[tensor, "read"] = moved.get((tensor, "read"), 0) + width * partial
    busy = [_phase(evaluator, names, cycles) for names, _ in _phases(plan)]
    for names, drain in _phases(plan):
        inside = [name for name in names if drain is not None and evaluator.unit[name].name == drain]
        busy.append(sympy.Max(0, *(_emptied(evaluator, plan, name, nests) for name in inside)))
    return RegionForms(plan.region.name, sympy.expand(sum(busy)), moved, sympy.expand(sum(rooms) + _kept(plan, nests)))


def _kept(plan: RegionPlan, nests: tuple[Nest, ...]) -> Form:
    """The bytes of made tensors in the buffer, all at once: at least what is there at the fullest."""
    total = sympy.Integer(0)
    for tensor in plan.made:
        depth = plan.made_depth(tensor, nests)
        if depth is not None:
            made = plan.written[tensor]
            elements = _footprint(nests[made.first], made.access, depth, made.work.iterative)
            total += elements * plan.widths[tensor]
    return total


def _phases(plan: RegionPlan) -> list[tuple[tuple[str, ...], str | None]]:
    listed = [(tuple(name for _, names in phase.work for name in names), phase.drain) for phase in plan.region.phases]
    named = {name for names, _ in listed for name in names}
    rest = tuple(name for name in plan.region.statements if name not in named)
    return [*listed, *([(rest, None)] if rest else [])]


def _emptied(evaluator: Evaluator, plan: RegionPlan, name: str, nests: tuple[Nest, ...]) -> Form:
    """Cycles of emptying an array of the results of an Einsum, whose tiles the lanes divide."""
    unit, work, nest = evaluator.unit[name], evaluator.cascaded.works[name], nests[plan.stage_of[name]]
    results = _moved(nest, work.writes[0], nest.cut(work.ranks))
    return unit.rows * results / sympy.Integer(unit.lanes)


def _phase(evaluator: Evaluator, names: tuple[str, ...], cycles: Mapping[str, Form]) -> Form:
    """A phase lasts as long as its busiest unit."""
    busy: Counter[str] = Counter()
    for name in names:
        busy[evaluator.unit[name].name] += cycles[name]
    return sympy.Max(*(sympy.expand(form) for form in busy.values()))


def _moved(nest: Nest, access: Access, depth: int) -> Form:
    """`Nest.moved` where tiles divide their ranks."""
    lengths = nest.lengths(depth)
    again = math.prod(nest.extents[rank] / size for rank, size in lengths.items() if rank not in access.ranks)
    if access.plain:
        return again * math.prod(nest.extents[place.ranks[0]] for place in access.places if place.ranks)
    tiles = math.prod(nest.extents[rank] / size for rank, size in lengths.items() if rank in access.ranks)
    every = {**nest.extents, **lengths}
    return again * tiles * math.prod(_span(place, every) for place in access.places)


def _footprint(nest: Nest, access: Access, depth: int, carried: str | None) -> Form:
    lengths = {**nest.extents, **nest.lengths(depth)}
    if carried is not None:
        lengths[carried] = sympy.Integer(1)
    return sympy.Integer(1) * math.prod(_span(place, lengths) for place in access.places)


def _span(place: Place, lengths: Mapping[str, Form]) -> Form:
    if not place.ranks:
        return sympy.Integer(1)
    if place.steps is None:
        return math.prod(lengths[rank] for rank in place.ranks)
    return sum(step * (lengths[rank] - 1) for rank, step in zip(place.ranks, place.steps, strict=True)) + 1


def forms_json(forms: Forms) -> dict[str, Any]:
    """The forms as text with stable keys."""
    return {
        "per_einsum": {
            name: {"unit": forms.units[name], "cycles": str(sympy.simplify(form))}
            for name, form in forms.cycles.items()
        },
        "regions": [
            {
                "name": region.name,
                "cycles": str(region.cycles),
                "traffic_bytes": str(region.traffic),
                "moved": {f"{name} {way}": str(sympy.expand(form)) for (name, way), form in region.moved.items()},
                "on_chip_bytes": str(region.on_chip),
            }
            for region in forms.regions
        ],
    }
