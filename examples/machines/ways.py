"""The ways to run a cascade on a modelled machine that are compared: each Einsum alone, grouped, or by a mapping."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cascade.backends.systolic.cost import Cost, Evaluator
from cascade.backends.systolic.machine import machine
from cascade.backends.systolic.mapping import mapping
from cascade.backends.systolic.search import search
from cascade.backends.systolic.work import Cascaded, take_apart
from cascade.compiled import from_text
from cascade.passes.canonicalize import Canonicalize
from cascade.pipeline import run_pipeline


@dataclass(frozen=True)
class Way:
    """One way to run a cascade: its name, the Einsums, a mapping file or None for a search."""

    name: str
    cascaded: Cascaded
    path: str | None = None

    def evaluator(self, on: str, sizes: Mapping[str, int]) -> Evaluator:
        """The way on a machine, a shipped one or a file."""
        chosen = machine(on)
        found = search(self.cascaded, chosen, sizes) if self.path is None else mapping(self.path)
        return Evaluator(self.cascaded, chosen, found)

    def cost(self, on: str, sizes: Mapping[str, int]) -> Cost:
        """What it costs there."""
        return self.evaluator(on, sizes).cost(sizes)


def lanes(evaluator: Evaluator, cost: Cost) -> dict[str, float]:
    """The share of the lanes of each unit that have something to do while it works, on what the Einsums ask of it."""
    done: dict[str, int] = {}
    busy: dict[str, int] = {}
    for name in evaluator.cascaded.works:
        einsum, unit = cost.einsums[name], evaluator.unit[name]
        done[unit.name] = done.get(unit.name, 0) + einsum.points * evaluator.latency(name)
        busy[unit.name] = busy.get(unit.name, 0) + einsum.cycles * unit.lanes
    return {unit: work / busy[unit] for unit, work in done.items() if busy[unit]}


def ways(text: str, name: str | None = None, mappings: Sequence[str] = ()) -> list[Way]:
    """The ways to run the cascade of that name in a program; mappings are of its Einsums as written."""
    cascade = from_text(text, "<example>", name).cascade
    written = take_apart(run_pipeline(cascade, Canonicalize.name).final)
    fused = take_apart(run_pipeline(cascade).final)
    return [Way("alone", written), Way("fused", fused), *(Way(Path(path).stem, written, path) for path in mappings)]
