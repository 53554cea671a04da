"""How long the kernels of a cascade would take on a GPU that is not there: the planner's own choice and model.

    forecast(final, sizes, types, machine("h200"))      a kernel each: its statements, its tiles, what is predicted

Nothing is modelled here. Groups, tiles and estimates are those of a call with contiguous tensors of these sizes; small
launches beside them, which make tables and bounds or merge shared streams, are not counted. What runs in no kernel is
named and not predicted. `launches` has the kernels themselves, those that merge as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cascade.backends.triton.apart import elsewhere, parts
from cascade.backends.triton.count import work
from cascade.backends.triton.emit import emit
from cascade.backends.triton.explain import Launch
from cascade.backends.triton.machine import Estimate, Machine, Work
from cascade.backends.triton.offline import LIMITS, Failure, StaticFacts, facts
from cascade.backends.triton.partition import Group, Rest
from cascade.backends.triton.plan import Kernel
from cascade.backends.triton.planner import Planner, Tiling, gaps
from cascade.backends.triton.restate import restated
from cascade.backends.triton.standalone import contiguous
from cascade.backends.triton.static import request
from cascade.backends.triton.tune import Choice, choose, planned
from cascade.backends.triton.updates import Update, update_of
from cascade.errors import UnsupportedError
from cascade.inference import bind_sizes
from cascade.ir import Cascade, DType
from cascade.walk import defines


@dataclass(frozen=True, slots=True)
class Forecast:
    """One kernel: the names it defines, its plan and the values of its symbols, its tiles and why, what it does."""

    name: str
    defines: tuple[str, ...]
    kernel: Kernel
    sizes: Mapping[str, int]
    choice: Choice
    work: Work

    @property
    def tiling(self) -> Tiling:
        """The tiles that were chosen."""
        return self.choice.tiling

    @property
    def estimate(self) -> Estimate:
        """What the model says of it."""
        return self.choice.estimate


def forecast(
    final: Cascade,
    sizes: Mapping[str, int],
    types: Mapping[str, DType],
    machine: Machine,
    in_place: Mapping[str, str] | None = None,
) -> tuple[tuple[Forecast, ...], tuple[str, ...]]:
    """The kernels of a cascade after the pipeline, in order, and the names of what runs in none.

    `in_place` are results that take the memory of a parameter, as `compile` has it.
    """
    found, views = steps(final, sizes, types, machine, in_place)
    outside = [name for one in found if isinstance(one, Rest) for name in one.names if name not in views]
    return tuple(one for one in found if isinstance(one, Forecast)), tuple(outside)


def steps(
    final: Cascade,
    sizes: Mapping[str, int],
    types: Mapping[str, DType],
    machine: Machine,
    in_place: Mapping[str, str] | None = None,
) -> tuple[tuple[Forecast | Rest, ...], frozenset[str]]:
    """What runs, in order: kernels, and between them what is in none; and the names of views, which cost nothing."""
    planner = _planner(final, bind_sizes(final, {}, sizes), types, machine, in_place or {})
    found = [step if isinstance(step, Rest) else step[2] for step in _chosen(planner, final.name, machine)]
    return tuple(found), frozenset(planner.views)


def static_facts(kernels: Sequence[Kernel | None], machine: Machine) -> list[StaticFacts | Failure | None]:
    """What the machine code of each kernel shows, compiled for the machine; None where nothing compiles for it."""
    own = [kernel for kernel in kernels if kernel is not None]
    if machine.arch not in LIMITS or not own:
        return [None] * len(kernels)
    found = iter(facts([request(kernel, emit(kernel)) for kernel in own], machine.arch, jobs=2))
    return [None if kernel is None else next(found) for kernel in kernels]


def launches(
    final: Cascade, sizes: Mapping[str, int], types: Mapping[str, DType], machine: Machine
) -> tuple[Launch | Rest, ...]:
    """The same kernels as they would be launched, with what runs in none, in order."""
    return tuple(_launches(_planner(final, bind_sizes(final, {}, sizes), types, machine, {}), final.name, machine))


def _launches(planner: Planner, label: str, machine: Machine) -> Iterator[Launch | Rest]:
    """The kernels of a planner in order; behind one that shares a stream that which merges."""
    for step in _chosen(planner, label, machine):
        if isinstance(step, Rest):
            yield step
            continue
        own, group, found = step
        yield Launch(found.kernel, found.sizes, found.choice)
        if found.tiling.shared:
            _, merger, _ = own.split(found.name, group, own.groups(), found.tiling)
            yield from _launches(merger, f"{found.name}_merge", machine)


def _chosen(planner: Planner, label: str, machine: Machine) -> Iterator[tuple[Planner, Group, Forecast] | Rest]:
    """Groups with their planner and kernel, and what runs outside of kernels, as in a launch; views are left out."""
    groups = planner.groups()
    for number, group in enumerate(groups):
        if isinstance(group, Group):
            yield from _forecasts(planner, f"{label}_{number}", group, groups, machine)
        elif not all(one in planner.views for stmt in group.statements for one in defines(stmt)):
            yield group


def _forecasts(
    planner: Planner, name: str, group: Group, groups: Sequence[Group | Rest], machine: Machine
) -> Iterator[tuple[Planner, Group, Forecast] | Rest]:
    """The kernels of a group with the tiles that the model prefers; why there is none, where no plan holds it."""
    try:
        choice = choose(planner, name, group, groups, machine, others=elsewhere(planner, name, group, groups, machine))
        if not choice.tiling.apart:
            yield planner, group, _forecast(planner, name, group, groups, choice)
            return
        for one in parts(planner, name, group, groups, choice.tiling.apart):
            own = one.choice(machine)
            yield one.planner, one.group, _forecast(one.planner, one.label, one.group, one.groups, own)
    except UnsupportedError as error:
        yield Rest(group.plain, error.diagnostics[0].message)


def _forecast(planner: Planner, name: str, group: Group, groups: Sequence[Group | Rest], choice: Choice) -> Forecast:
    kernel, extents = planned(planner, name, group, groups, choice.tiling)
    names = tuple(name for stmt in group.statements for name in defines(stmt))
    return Forecast(name, names, kernel, extents, choice, work(kernel, extents))


def _planner(
    final: Cascade, bound: Mapping[str, int], types: Mapping[str, DType], machine: Machine, in_place: Mapping[str, str]
) -> Planner:
    """The planner of a first call with contiguous tensors: ranks that lie side by side are one, as in a launch."""
    layouts = {
        param.name: contiguous(
            [size if isinstance(size, int) else bound[size] for size in param.shape], types[param.name]
        )
        for param in final.params
    }
    found = restated(final, bound, types, bound, {name: gaps(layout) for name, layout in layouts.items()})
    updates = {result: update_of(found.cascade, result, param) for result, param in in_place.items()}
    return Planner(
        found.cascade, found.joined.extents(bound), layouts, machine.arch >= "sm_90", why=found.why,
        views=found.joined.views, joined=found.joined.sizes, in_order=found.in_order,
        updates={result: update for result, update in updates.items() if isinstance(update, Update)},
    )  # fmt: skip


def forecast_json(kernels: tuple[Forecast, ...], outside: tuple[str, ...], machine: Machine) -> dict[str, Any]:
    """The kernels with the keys of `cascadec cost --json`; cycles are those of the GPU's clock."""
    seconds = sum(kernel.estimate.time_us for kernel in kernels) / 1e6
    busy: dict[str, float] = {}
    for kernel in kernels:
        for unit, time in kernel.estimate.parts:
            busy[unit] = busy.get(unit, 0.0) + time / 1e6
    return {
        "machine": machine.name,
        "latency_s": seconds,
        "cycles": seconds * machine.clock_ghz * 1e9,
        "utilisation": {unit: time / seconds for unit, time in busy.items()},
        "traffic_bytes": sum(kernel.work.read_bytes + kernel.work.write_bytes for kernel in kernels),
        "energy_pj": None,
        "area_um2": None,
        "per_einsum": {
            kernel.name: {
                "unit": kernel.estimate.bound,
                "einsums": list(kernel.defines),
                "cycles": kernel.estimate.time_us * machine.clock_ghz * 1e3,
                "share": kernel.estimate.time_us / 1e6 / seconds,
            }
            for kernel in kernels
        },
        "phases": [{"kernel": kernel.name, "text": kernel.estimate.text()} for kernel in kernels],
        "outside": list(outside),
    }
