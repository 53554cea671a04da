"""Whether a timetable and the queues made of it are valid: written apart from the scheduler, by definition and plainly.

Findings are sentences; none means valid. `over_synchronised` is about waits that are correct and not needed: an event
too many changes no number and may remove all overlap.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations, pairwise

from cascade.timetable import Problem, Queues, Timetable

SLACK_US = 1e-6
"""By how much sums of times may differ from rounding."""


def check_timetable(problem: Problem, timetable: Timetable) -> Iterator[str]:
    """What is wrong with a timetable: tasks, times, order, resources."""
    if len(timetable.slots) != len(problem.tasks):
        yield f"{len(timetable.slots)} slots for {len(problem.tasks)} tasks"
        return
    for task, slot in zip(problem.tasks, timetable.slots, strict=True):
        if not 0 <= slot.mode < len(task.modes):
            yield f"{task.name} has no mode {slot.mode}"
            return
        if slot.start_us < -SLACK_US or abs(slot.end_us - slot.start_us - task.modes[slot.mode].us) > SLACK_US:
            yield f"{task.name} does not run for its time"
        for other in task.needs:
            if timetable.slots[other].end_us > slot.start_us + SLACK_US:
                yield f"{task.name} starts before {problem.tasks[other].name} ends"
    yield from _resources(problem, timetable)


def _resources(problem: Problem, timetable: Timetable) -> Iterator[str]:
    """At every start: what runs then holds no more of a resource than there is."""
    for slot in timetable.slots:
        at = slot.start_us + SLACK_US
        for resource, capacity in problem.capacities:
            held = sum(
                task.modes[other.mode].demand(resource)
                for task, other in zip(problem.tasks, timetable.slots, strict=True)
                if other.start_us <= at < other.end_us
            )
            if held > capacity + SLACK_US:
                yield f"at {at:.1f} us {held:g} of {capacity:g} {resource} are held"


def check_queues(problem: Problem, queues: Queues) -> Iterator[str]:
    """What is wrong with queues: a task missing or twice, a wait in a circle, a need that nothing enforces."""
    listed = [task for _, tasks in queues.queues for task in tasks]
    if sorted(listed) != list(range(len(problem.tasks))):
        yield "a task is in no queue, or in two"
        return
    behind = _closure(len(problem.tasks), implied(queues))
    if any(task in behind[task] for task in listed):
        yield "waits go in a circle"
        return
    for number, task in enumerate(problem.tasks):
        for other in task.needs:
            if other not in behind[number]:
                yield f"{task.name} does not wait for {problem.tasks[other].name}"


def over_synchronised(problem: Problem, queues: Queues) -> Iterator[str]:
    """Waits for something that the task does not need, neither itself nor by what it needs."""
    needed = _closure(len(problem.tasks), [(n, other) for n, task in enumerate(problem.tasks) for other in task.needs])
    for task, other in queues.waits:
        if other not in needed[task]:
            yield f"{problem.tasks[task].name} waits for {problem.tasks[other].name}, which it does not need"


def implied(queues: Queues) -> list[tuple[int, int]]:
    """Every pair of a task and one that surely ends before it starts: its predecessor in the queue, and its waits."""
    return [(late, early) for _, tasks in queues.queues for early, late in pairwise(tasks)] + list(queues.waits)


def _closure(count: int, edges: Iterable[tuple[int, int]]) -> list[set[int]]:
    """For every task, all that it is behind, however far."""
    behind: list[set[int]] = [set() for _ in range(count)]
    pairs = list(edges)
    changed = True
    while changed:
        changed = False
        for late, early in pairs:
            more = {early} | behind[early]
            if not more <= behind[late]:
                behind[late] |= more
                changed = True
    return behind


def check_ranks(orders: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """Whether all ranks issue their collectives in one order: two that each wait for the other's never return."""
    for (one, first), (other, second) in combinations(orders.items(), 2):
        for position, (mine, theirs) in enumerate(zip(first, second, strict=False)):
            if mine != theirs:
                yield f"collective {position} is {mine} on rank {one} and {theirs} on rank {other}"
                break
        else:
            if len(first) != len(second):
                yield f"rank {one} issues {len(first)} collectives and rank {other} {len(second)}"


def check_written(boxes: Mapping[tuple[int, str], Sequence[tuple[tuple[int, int], ...]]]) -> Iterator[str]:
    """Whether each element of a tensor is computed once on a device."""
    for (device, tensor), written in boxes.items():
        for one, other in combinations(written, 2):
            if all(max(a, c) < min(b, d) for (a, b), (c, d) in zip(one, other, strict=True)):
                yield f"device {device} computes {tensor} twice at {one} and {other}"
