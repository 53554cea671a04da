"""The mappings that no other one beats in time, energy and bytes on chip all at once.

The forms are those of the search (`search.py`), with loops of more sizes: powers of two, as fine as keeps a region
under `MOST_FORMS`, and as large as fits. A group of the schedule runs in one region or as one region for each Einsum.
Regions follow one another: seconds and energies add up, and the buffer is as large as the largest of them needs. Sums
and a maximum keep order, so what is beaten in a region is beaten in every mapping with it: the front of all
combinations is made of the fronts of the regions, and is exact for the forms that were tried.

Where a machine does not say what energy is, bytes of memory stand in its place.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from cascade.backends.systolic.cost import Evaluator
from cascade.backends.systolic.machine import Machine
from cascade.backends.systolic.mapping import Mapping as Map
from cascade.backends.systolic.search import (
    Progress, bindings, candidates, lacking, regions, taken_apart, with_region,
)  # fmt: skip
from cascade.backends.systolic.work import Cascaded
from cascade.errors import CommandError, UnsupportedError
from cascade.ir import Region

MOST_FORMS = 4000
STEPS = (1, 2, 4, 8)  # between the powers of two that are tried
FINEST = 24  # powers of two up to 2^23


@dataclass(frozen=True, slots=True)
class Choice:
    """A mapping, or the regions of a part of one: seconds, pJ (None: not known), bytes of memory and on chip."""

    seconds: float
    energy: float | None
    traffic: int
    held: int
    regions: tuple[Region, ...]
    units: tuple[tuple[str, str], ...] = ()

    @property
    def key(self) -> tuple[float, float, int]:
        """What is compared: the less of each the better."""
        return self.seconds, self.traffic if self.energy is None else self.energy, self.held

    def then(self, other: Choice) -> Choice:
        """This part of a mapping, and another one behind it."""
        energy = None if self.energy is None or other.energy is None else self.energy + other.energy
        return Choice(
            self.seconds + other.seconds, energy, self.traffic + other.traffic, max(self.held, other.held),
            (*self.regions, *other.regions), (*self.units, *other.units),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Front:
    """Mappings that none beats, fastest first, and what each costs.

    `tried` of `forms` ways to run a region were tried, with loops whose sizes are powers of `base`.
    """

    choices: tuple[Choice, ...]
    mappings: tuple[Map, ...]
    tried: int
    forms: int
    base: int

    @property
    def exhaustive(self) -> bool:
        """Whether all forms were tried."""
        return self.tried == self.forms


@dataclass(slots=True)
class _Counts:
    """What a search has tried so far."""

    tried: int = 0
    forms: int = 0
    base: int = 2


def unbeaten(found: Iterable[Choice]) -> list[Choice]:
    """The choices that no other one beats or equals, fastest first.

    Of those so far, `energies` rise and `held` falls: the last one with no more energy has the least on chip.
    """
    kept: list[Choice] = []
    energies: list[float] = []
    held: list[int] = []
    for choice in sorted(found, key=lambda choice: choice.key):
        _, energy, size = choice.key
        at = bisect.bisect_right(energies, energy)
        if at and held[at - 1] <= size:
            continue
        kept.append(choice)
        at = bisect.bisect_left(energies, energy)
        end = at
        while end < len(held) and held[end] >= size:
            end += 1
        energies[at:end], held[at:end] = [energy], [size]
    return kept


def front(
    cascaded: Cascaded,
    machine: Machine,
    sizes: Mapping[str, int],
    progress: Progress | None = None,
    start: Map | None = None,
) -> Front:
    """The front of a cascade for the sizes of all shape symbols; raises C540 where nothing fits.

    With a mapping to `start` from, its regions, stages and phases stay; its loops are among those that are tried.
    """
    mapping = Map(tuple(regions(cascaded))) if start is None else start
    found: list[Choice] = []
    counts = _Counts()
    for number, region in enumerate(mapping.regions):
        here = _region_front(cascaded, machine, mapping, number, sizes, progress, counts)
        if len(region.statements) > 1 and start is None:
            apart = taken_apart(mapping, number)
            fronts = (
                _region_front(cascaded, machine, apart, number + at, sizes, progress, counts)
                for at in range(len(region.statements))
            )
            here = unbeaten((*here, *_combined(fronts)))
        if not here:
            raise lacking(Evaluator(cascaded, machine, mapping), number, sizes)
        found = unbeaten(_pairs(found, here)) if number else here
    maps = tuple(
        replace(mapping, regions=choice.regions, units=tuple(dict((*mapping.units, *choice.units)).items()))
        for choice in found
    )
    return Front(tuple(found), maps, counts.tried, counts.forms, counts.base)


def _combined(fronts: Iterable[list[Choice]]) -> list[Choice]:
    """The front of regions one after another; empty where one of them has none."""
    found: list[Choice] | None = None
    for each in fronts:
        found = each if found is None else unbeaten(_pairs(found, each))
        if not found:
            break
    return found or []


def _pairs(one: list[Choice], other: list[Choice]) -> Iterator[Choice]:
    return (first.then(second) for first, second in itertools.product(one, other))


def _region_front(
    cascaded: Cascaded,
    machine: Machine,
    mapping: Map,
    number: int,
    sizes: Mapping[str, int],
    progress: Progress | None,
    counts: _Counts,
) -> list[Choice]:
    """The front of one region, on every binding; `counts` gets what was tried."""
    region = mapping.regions[number]
    found: list[Choice] = []
    for bound in (mapping, *bindings(cascaded, machine, mapping, region)):
        evaluator = Evaluator(cascaded, machine, bound)
        forms, every, base = forms_of(cascaded, region, evaluator.extents(sizes))
        units = tuple(pair for pair in bound.units if pair[0] in region.statements)
        counts.tried += len(forms)
        counts.forms += every
        counts.base = max(counts.base, base)
        for at, form in enumerate(forms):
            if progress is not None:
                progress(region.name, at + 1, len(forms))
            try:
                plan = evaluator.plan(with_region(bound, number, form), number)
                cost, energy = evaluator.region_energy(plan, sizes)
            except (CommandError, UnsupportedError):  # these loops cannot hold these Einsums, or not on chip
                continue
            found.append(Choice(cost.seconds, energy, cost.movement.bytes, cost.movement.held, (form,), units))
    return unbeaten(found)


def forms_of(cascaded: Cascaded, region: Region, extents: Mapping[str, int]) -> tuple[list[Region], int, int]:
    """The forms of a region that are tried, how many there are, and of which number their sizes are powers."""
    bare = replace(region, keep=(), capacity=None)
    for step in STEPS:
        tiles = tuple(1 << power for power in range(0, FINEST, step))
        forms = candidates(cascaded, bare, extents, tiles)
        listed = list(itertools.islice(forms, MOST_FORMS))
        if len(listed) < MOST_FORMS or step == STEPS[-1]:
            break
    return [region, *listed], 1 + len(listed) + sum(1 for _ in forms), 1 << step
