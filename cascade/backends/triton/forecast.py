"""How long the kernels of a cascade would take on a GPU that is not there: the planner's own choice and model.

    forecast(final, sizes, types, machine("h200"))      a kernel each: its statements, its tiles, what is predicted

Nothing is modelled here. Groups, tiles and estimates are those of a call with contiguous tensors of these sizes; small
launches beside them, which make tables and bounds or merge shared streams, are not counted. What runs in no kernel is
named and not predicted. `launches` has the kernels themselves, those that merge as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from cascade.backends.triton.count import work
from cascade.backends.triton.emit import Source, emit
from cascade.backends.triton.explain import Launch
from cascade.backends.triton.machine import Estimate, Machine, Work
from cascade.backends.triton.partition import Group, Rest
from cascade.backends.triton.planner import Planner, Tiling
from cascade.backends.triton.restate import restated
from cascade.backends.triton.standalone import contiguous
from cascade.backends.triton.tune import Choice, choose, planned
from cascade.backends.triton.updates import Update, update_of
from cascade.inference import bind_sizes
from cascade.ir import Cascade, DType
from cascade.walk import defines


@dataclass(frozen=True, slots=True)
class Forecast:
    """One kernel: the names it defines, its tiles, what it is asked for, what the model says."""

    name: str
    defines: tuple[str, ...]
    tiling: Tiling
    work: Work
    estimate: Estimate


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
    planner = _planner(final, bind_sizes(final, {}, sizes), types, machine, in_place or {})
    found: list[Forecast] = []
    outside: list[str] = []
    for step in _chosen(planner, final.name, machine):
        if isinstance(step, Rest):
            outside += [name for stmt in step.statements for name in defines(stmt) if name not in planner.views]
            continue
        name, group, choice = step
        kernel, extents = planned(planner, name, group, planner.groups(), choice.tiling)
        names = tuple(name for stmt in group.statements for name in defines(stmt))
        found.append(Forecast(name, names, choice.tiling, work(kernel, extents), choice.estimate))
    return tuple(found), tuple(outside)


def launches(
    final: Cascade, sizes: Mapping[str, int], types: Mapping[str, DType], machine: Machine
) -> tuple[tuple[Launch | Rest, ...], dict[str, Source]]:
    """The same kernels as they would be launched, with what runs in none, in order; the text of each by its name."""
    planner = _planner(final, bind_sizes(final, {}, sizes), types, machine, {})
    found = tuple(_launches(planner, final.name, machine))
    return found, {step.kernel.name: emit(step.kernel) for step in found if isinstance(step, Launch)}


def _launches(planner: Planner, label: str, machine: Machine) -> Iterator[Launch | Rest]:
    """The kernels of a planner in order; behind one that shares a stream that which merges."""
    for step in _chosen(planner, label, machine):
        if isinstance(step, Rest):
            yield step
            continue
        name, group, choice = step
        kernel, extents = planned(planner, name, group, planner.groups(), choice.tiling)
        yield Launch(kernel, extents, choice)
        if choice.tiling.parts > 1:
            _, merger, _ = planner.split(name, group, planner.groups(), choice.tiling)
            yield from _launches(merger, f"{name}_merge", machine)


def _chosen(planner: Planner, label: str, machine: Machine) -> Iterator[tuple[str, Group, Choice] | Rest]:
    """Groups with the names of their kernels and their tiles, and what runs outside of kernels; views are left out."""
    groups = planner.groups()
    for number, group in enumerate(groups):
        name = f"{label}_{number}"
        if isinstance(group, Group):
            yield name, group, choose(planner, name, group, groups, machine)
        elif not all(one in planner.views for stmt in group.statements for one in defines(stmt)):
            yield group


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
    found = restated(final, bound, types, bound, frozenset(layouts))
    updates = {result: update_of(found.cascade, result, param) for result, param in in_place.items()}
    return Planner(
        found.cascade, found.joined.extents(bound), layouts, machine.arch >= "sm_90", why=found.why,
        views=found.joined.views, in_order=found.in_order,
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
