"""A cost, or a front of mappings, as one JSON object with stable keys, and as tables that a person reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cascade.backends.systolic.cost import Cost
from cascade.backends.systolic.machine import Machine
from cascade.backends.systolic.mapping import render_mapping
from cascade.backends.systolic.pareto import Choice, Front
from cascade.ir import Region
from cascade.text import render_loop

MOST_ROWS = 40  # of the table of a front


def cost_json(cost: Cost, machine: Machine) -> dict[str, Any]:
    """The cost with the keys of `cascadec cost --json`; None, null in JSON, for what is not known."""
    einsums = {
        name: {
            "unit": found.unit,
            "points": found.points,
            "cycles": found.cycles,
            "share": found.cycles / cost.cycles if cost.cycles else 0.0,
            "energy_pj": found.energy,
        }
        for name, found in cost.einsums.items()
    }
    phases = [
        {"region": region.name, "units": dict(phase.units), "drain": phase.drain, "cycles": phase.cycles}
        for region in cost.regions
        for phase in region.phases
    ]
    return {
        "machine": cost.machine,
        "latency_s": cost.seconds,
        "cycles": cost.cycles,
        "utilisation": cost.utilisation,
        "traffic_bytes": cost.traffic,
        "energy_pj": cost.energy_pj,
        "area_um2": machine.area(),
        "per_einsum": einsums,
        "phases": phases,
        "regions": [
            {
                "name": region.name,
                "seconds": region.seconds,
                "cycles": region.cycles,
                "memory_s": region.memory_s,
                "bound": region.bound,
                "on_chip_bytes": region.movement.held,
                "traffic_bytes": region.movement.bytes,
            }
            for region in cost.regions
        ],
        "energy_by": dict(cost.energy),
        "energies_from": machine.energies,
        "assumed": list(cost.assumed),
    }


def front_json(found: Front) -> dict[str, Any]:
    """The front as JSON: what each mapping costs and its text, and what was tried for it."""
    choices = [
        {
            "latency_s": choice.seconds,
            "energy_pj": choice.energy,
            "traffic_bytes": choice.traffic,
            "on_chip_bytes": choice.held,
            "mapping": render_mapping(mapping),
        }
        for choice, mapping in zip(found.choices, found.mappings, strict=True)
    ]
    return {"front": choices, "tried": found.tried, "forms": found.forms, "exhaustive": found.exhaustive}


def front_summary(found: Front) -> str:
    """What was tried, and what is left of it."""
    many = "all" if found.exhaustive else f"{found.tried} of {found.forms}"
    what = f"{many} forms tried, {found.tried} with sizes that are powers of {found.base} or fit"
    shown = len(_shown(found.choices))
    some = "" if shown == len(found.choices) else f", {shown} of them shown here, all with --json"
    return f"{len(found.choices)} mappings that no other beats in time, energy and bytes on chip{some}; {what}"


def front_rows(found: Front) -> list[tuple[str, ...]]:
    """Rows for mappings of a front: time, energy, bytes on chip, traffic, the loops of its regions.

    Of a long one those are left out that lie between others: the least of each, and some evenly between.
    """
    shown = sorted(_shown(found.choices))
    return [
        (
            seconds_text(choice.seconds),
            "unknown" if choice.energy is None else f"{choice.energy / 1e12:.4g} J",
            bytes_text(choice.held),
            bytes_text(choice.traffic),
            "; ".join(f"{region.name}: {_loops_text(region)}" for region in choice.regions),
        )
        for choice in (found.choices[at] for at in shown)
    ]


def _shown(choices: Sequence[Choice]) -> set[int]:
    """The places of the choices that a table has."""
    places = range(len(choices))
    if len(choices) <= MOST_ROWS:
        return set(places)
    least = {min(places, key=lambda at: choices[at].key[which]) for which in range(3)}
    return least | {round(number * (len(choices) - 1) / (MOST_ROWS - 1)) for number in range(MOST_ROWS)}


def _loops_text(region: Region) -> str:
    own = [" | ".join(map(render_loop, stage.loops)) for stage in region.stages if stage.loops]
    return ", ".join((*map(render_loop, region.loops), *(f"({loops})" for loops in own))) or "no loops"


def summary(cost: Cost, machine: Machine) -> list[str]:
    """What a person wants to know first, a line each: time, what bounds it, use of units, traffic, energy."""
    bounds = sorted(cost.regions, key=lambda region: -region.seconds)
    used = ", ".join(f"{unit} {share:.1%}" for unit, share in cost.utilisation.items())
    lines = [
        f"{machine.name}: {seconds_text(cost.seconds)}, {cost.cycles:.4g} cycles, units used {used}",
        f"bound by {bounds[0].bound}" if bounds else "nothing to do",
        f"traffic {bytes_text(cost.traffic)}; {_roofline(cost, machine)}",
    ]
    if cost.energy_pj is not None:
        shares = ", ".join(f"{name} {part / cost.energy_pj:.1%}" for name, part in cost.energy.items() if part)
        lines.append(f"energy {cost.energy_pj / 1e12:.4g} J: {shares}")
    if (area := machine.area()) is not None:
        lines.append(f"area {area / 1e6:.4g} mm2")
    if cost.assumed:
        lines.append(f"filters taken to hold everywhere in {', '.join(cost.assumed)}")
    return lines


def _roofline(cost: Cost, machine: Machine) -> str:
    """Where the cascade lies under the roof of the machine: operations a byte, and where its ridge is."""
    points = sum(found.cycles * machine.units[found.unit].lanes for found in cost.einsums.values())
    peak = sum(unit.lanes for unit in machine.units.values()) * machine.clock_hz
    ridge = peak / sum(memory.bandwidth for memory in machine.memories.values())
    if not cost.traffic:
        return "nothing moves"
    reach = points / cost.traffic
    side = "right of" if reach >= ridge else "left of"
    return f"{reach:.4g} lane cycles a byte, {side} the ridge at {ridge:.4g}"


def einsum_rows(cost: Cost) -> list[tuple[str, ...]]:
    """A row for every Einsum: its name, unit, points, cycles, the share of all time."""
    return [
        (name, found.unit, f"{found.points}", f"{found.cycles}", f"{found.cycles / (cost.cycles or 1.0):.1%}")
        for name, found in cost.einsums.items()
    ]


def seconds_text(seconds: float) -> str:
    """Seconds in the unit in which they read best."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.4g} {unit}"
    return f"{seconds * 1e9:.4g} ns"


def bytes_text(count: float) -> str:
    """Bytes in the unit in which they read best."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if count >= 1024**power:
            return f"{count / 1024**power:.4g} {unit}"
    return f"{count:.4g} B"
