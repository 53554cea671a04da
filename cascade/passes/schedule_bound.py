"""What no timetable is shorter than: work by several measures, between what must come before it and behind it.

                                 a share of SMs     in conflict      a mean of both
    product on all SMs                1                 1                 1
    product that leaves a few         0.94              1                 0.97
    exchange on a few                 0.06              0                 0.03

What runs beside each other never comes to more than 1 by a *measure*, so the work of all tasks, each in its least mode,
is time. A resource is a measure: what a mode holds of it over what there is. So is a set of modes of which any two hold
too much of some resource to run beside each other: each of them counts 1. Two products that leave a few SMs free are
such a set, which shares of SMs do not see. Means of two measures are measures; the one with most work is found by
thirds, since the work is concave in the weight.

Sources: bounds from heads and tails, Carlier (1982); sets of modes in conflict as in the disjunctive bounds of Brucker
et al. (1998). Means are Lagrangian: each is a point of the dual of the linear program that chooses modes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from cascade.recent import recently
from cascade.timetable import Problem

EPSILON = 1e-9
"""Of what there is of a resource, and of the microseconds of a plan: what is less is rounding."""

MOST_SETS = 64
"""Of modes in conflict that are looked at: plans have about four."""

MIXED = 5
"""So many measures are mixed, two by two: those with most work."""

Demands = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Work:
    """A measure of tasks: the microseconds of each in its least mode, and what each of its modes counts meanwhile."""

    least: tuple[float, ...]
    rates: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, problem: Problem, rates: Sequence[Sequence[float]]) -> Work:
        """The work of tasks whose modes count so much."""
        pairs = zip(problem.tasks, rates, strict=True)
        least = (min(mode.us * rate for mode, rate in zip(task.modes, own, strict=True)) for task, own in pairs)
        return cls(tuple(least), tuple(map(tuple, rates)))


def heads_us(problem: Problem) -> list[float]:
    """The longest way from the start of all to the start of each task, in fastest modes."""
    heads: list[float] = []
    shortest = [min(mode.us for mode in task.modes) for task in problem.tasks]
    for task in problem.tasks:
        heads.append(max((heads[other] + shortest[other] for other in task.needs), default=0.0))
    return heads


def tails_us(problem: Problem) -> list[float]:
    """The longest way from the start of each task to the end of all, in fastest modes."""
    tails = [0.0] * len(problem.tasks)
    for number in reversed(range(len(problem.tasks))):
        tails[number] += min(mode.us for mode in problem.tasks[number].modes)
        for other in problem.tasks[number].needs:
            tails[other] = max(tails[other], tails[number])
    return tails


def behind_us(problem: Problem) -> list[float]:
    """The longest way from the end of each task to the end of all, in fastest modes."""
    pairs = zip(tails_us(problem), problem.tasks, strict=True)
    return [tail - min(mode.us for mode in task.modes) for tail, task in pairs]


def lower_bound(problem: Problem) -> float:
    """What no timetable is shorter than, in microseconds.

    Tasks that cannot start before some time, and after which the end is some way off, have what lies between for all
    their work. So the bound is the critical path, or by some measure the work between a head and a tail.
    """
    return _bound(problem, works(problem))


def shortest_us(problem: Problem) -> float:
    """The same by resources alone, which is a small part of the effort: where it is enough to rule a problem out."""
    return _bound(problem, _by_resources(problem))


def _bound(problem: Problem, measures: Iterable[Work]) -> float:
    heads, behind = heads_us(problem), behind_us(problem)
    bound = max(tails_us(problem), default=0.0)
    for work in measures:
        held = sorted((n for n, us in enumerate(work.least) if us), key=lambda n: -behind[n])
        for head in {heads[number] for number in held}:
            total = 0.0
            for number in held:
                if heads[number] >= head:
                    total += work.least[number]
                    bound = max(bound, head + total + behind[number])
    return bound


def _by_resources(problem: Problem) -> list[Work]:
    return [
        Work.of(problem, [[mode.demand(resource) / capacity for mode in task.modes] for task in problem.tasks])
        for resource, capacity in problem.capacities
    ]


@recently
def works(problem: Problem) -> tuple[Work, ...]:
    """The work of all tasks by resources, by sets of modes in conflict and by means of two of them, most work first."""
    modes = [[tuple(sorted(mode.demands)) for mode in task.modes] for task in problem.tasks]
    together = [[[float(own in one) for own in task] for task in modes] for one in conflicts(problem)]
    found = [*_by_resources(problem), *(Work.of(problem, rates) for rates in together)]
    found.sort(key=lambda work: -sum(work.least))
    mixed = (_mixed(problem, one, other) for one, other in combinations(found[:MIXED], 2))
    return tuple(sorted((*found, *mixed), key=lambda work: -sum(work.least)))


def conflicts(problem: Problem) -> list[frozenset[Demands]]:
    """Sets of demands of which any two, of one task's mode and another's, hold more of a resource than there is.

    None is part of another one (Bron and Kerbosch, with the pivot of Tomita, Tanaka and Takahashi).
    """
    every = list(dict.fromkeys(tuple(sorted(mode.demands)) for task in problem.tasks for mode in task.modes))
    against = _against(every, problem.capacities)
    alone = sum(1 << one for one, others in enumerate(against) if others >> one & 1)
    near = [others & ~(1 << one) for one, others in enumerate(against)]
    found: list[tuple[int, ...]] = []

    def grow(chosen: tuple[int, ...], may: int, seen: int) -> None:
        if not may | seen:
            found.append(tuple(sorted(chosen)))
            return
        pivot = max(_bits(may | seen), key=lambda one: (may & near[one]).bit_count())
        for one in _bits(may & ~near[pivot]):  # every set has one of these
            if len(found) < MOST_SETS:
                grow((*chosen, one), may & near[one], seen & near[one])
            may, seen = may & ~(1 << one), seen | 1 << one

    if alone:
        grow((), alone, 0)
    return [frozenset(every[one] for one in chosen) for chosen in sorted(found)]


def _against(every: Sequence[Demands], capacities: Iterable[tuple[str, float]]) -> list[int]:
    """For each demand those, as bits, with which it holds more of a resource than there is; it may be one of them."""
    against = [0] * len(every)
    for resource, capacity in capacities:
        held = [(number, amount) for number, own in enumerate(every) for name, amount in own if name == resource]
        for number, amount in held:
            for other, more in held:
                if amount + more > capacity + EPSILON:
                    against[number] |= 1 << other
    return against


def _bits(numbers: int) -> Iterator[int]:
    """The numbers of a set, rising."""
    while numbers:
        last = numbers & -numbers
        yield last.bit_length() - 1
        numbers ^= last


def _least(pairs: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The pairs that are least by some mean of their two: those than which no other is less by both."""
    found: list[tuple[float, float]] = []
    for a, b in sorted(pairs):
        if not found or b < found[-1][1]:
            found.append((a, b))
    return found


def _mixed(problem: Problem, one: Work, other: Work) -> Work:
    """The mean of two measures by which there is most work."""
    counted = [
        _least([(mode.us * a, mode.us * b) for mode, a, b in zip(task.modes, own, others, strict=True)])
        for task, own, others in zip(problem.tasks, one.rates, other.rates, strict=True)
    ]
    single = [task[0] for task in counted if len(task) == 1]
    first, second = sum(a for a, _ in single), sum(b for _, b in single)
    several = [task for task in counted if len(task) > 1]

    def total(weight: float) -> float:
        rest = 1 - weight
        return weight * first + rest * second + sum([min([weight * a + rest * b for a, b in task]) for task in several])

    low, high = 0.0, 1.0
    for _ in range(10):
        third = (high - low) / 3
        if total(low + third) > total(high - third):
            high -= third
        else:
            low += third
    weight = (low + high) / 2
    pairs = zip(one.rates, other.rates, strict=True)
    rates = [[weight * a + (1 - weight) * b for a, b in zip(*own, strict=True)] for own in pairs]
    return Work.of(problem, rates)
