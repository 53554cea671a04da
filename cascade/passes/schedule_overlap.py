"""When tasks run: list scheduling by critical path, an exact search, and queues with the waits that are left.

    tasks   MLP 0, all-reduce 0, MLP 1, all-reduce 1
    sms     | MLP 0 | MLP 1 |                      makespan 30, bound 28, serial 40, exposed 8
    links           | all-reduce 0 | all-reduce 1 |

`list_schedule` starts what is ready, longest way to the end first, wherever resources allow; from there a narrow search
(`schedule_search.py`) shortens it, and where that proves nothing, seeded changes of the order and of the modes that are
preferred. `exact_schedule` widens the search until it is a proof; what is too wide for it goes to CP-SAT (the extra
`overlap`) or HiGHS (`schedule_flow.py`). A timetable that meets the bound of `schedule_bound.py` is proved by that
alone.

`repeated` is a layer that follows itself: copies whose first tasks wait for the last ones of the copy before.
`cycle_us` is by how much one more copy makes it longer.

Sources: list scheduling, Graham (1969); the resource-constrained problem with modes, Brucker et al. (1999).
"""

from __future__ import annotations

import dataclasses
import heapq
import importlib
import importlib.util
import random
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import inf
from typing import Any

from cascade.errors import CommandError, Diagnostic
from cascade.passes.schedule_bound import EPSILON, conflicts, lower_bound, shortest_us, tails_us
from cascade.passes.schedule_flow import PACKAGE, flow_schedule
from cascade.passes.schedule_search import Search
from cascade.timetable import Mode, Problem, Queues, Slot, Task, Timetable

WIDTH = 16
"""States of a level in the search behind a list schedule; 0: no search."""

WIDTHS = (256, 4096)
"""Those of the exact search, one after the other: what a narrower one finds rules out states of a wider one."""

ROUNDS = 200
"""Orders that are tried where a narrow search proves nothing."""

FEW = 4000
"""Steps of a narrow search before it is as narrow as can be: a fraction of a second."""

STEPS = 100_000
"""Those of an exact search, some ten seconds, before a solver is asked."""

TICKS_PER_US = 100
"""Times of the exact solver are whole numbers of these."""

WORKERS = 8
"""Threads of the exact solver: as many strategies take turns, whatever the number of cores."""


def serial_us(problem: Problem) -> float:
    """How long it takes one task after the other, each in its fastest mode."""
    return sum(min(mode.us for mode in task.modes) for task in problem.tasks)


def exposed_us(problem: Problem, timetable: Timetable, resources: Sequence[str], hides: str) -> float:
    """For how long tasks that hold some of these resources run, and no task that holds the other alone."""
    busy: list[tuple[float, float]] = []
    cover: list[tuple[float, float]] = []
    for task, slot in zip(problem.tasks, timetable.slots, strict=True):
        mode = task.modes[slot.mode]
        if any(mode.demand(resource) for resource in resources):
            busy.append((slot.start_us, slot.end_us))
        elif mode.demand(hides):
            cover.append((slot.start_us, slot.end_us))
    edges = sorted({edge for pair in (*busy, *cover) for edge in pair})
    total = 0.0
    for start, stop in pairwise(edges):
        inside = [any(low <= start and stop <= high for low, high in pairs) for pairs in (busy, cover)]
        total += stop - start if inside == [True, False] else 0.0
    return total


# --- list scheduling -------------------------------------------------------------------------------------------------


def list_schedule(problem: Problem, width: int = WIDTH, seed: int = 0) -> Timetable:
    """The shortest timetable that list scheduling comes to: by critical path alone where the width is 0.

    Else a search of that width shortens it; where that proves nothing, so do other orders.
    """
    best, bound = _by_paths(problem), lower_bound(problem) * (1 + EPSILON) if width else 0.0
    if not width or best.makespan_us <= bound:
        return dataclasses.replace(best, optimal=best.makespan_us <= bound)
    found = Search(problem).run(best, width, FEW)
    best = found.timetable or best
    if not found.proved:
        back = _reversed(problem)
        ways = best, _climbed(problem, ROUNDS // 2, seed, bound), _mirrored(_climbed(back, ROUNDS // 2, seed, bound))
        best = min(ways, key=_length)
    return dataclasses.replace(best, optimal=found.proved or best.makespan_us <= bound)


def searched(problem: Problem, width: int = WIDTH, below_us: float = inf) -> Timetable:
    """The timetable by critical path, made shorter by a search of that width and nothing else: where many problems are
    tried in which a task has modes that leave others room, which critical paths alone do not weigh.

    What is not shorter than some time is not searched for: who looks for the least of many knows of a shorter one.
    """
    start = _by_paths(problem)
    if min(start.makespan_us, below_us) <= shortest_us(problem):
        return start
    return Search(problem).run(start, width, FEW, below_us).timetable or start


def _by_paths(problem: Problem) -> Timetable:
    """The shortest timetable by critical path, of the tasks or of them in reverse."""
    ahead, back = _climbed(problem), _climbed(_reversed(problem))
    return ahead if ahead.makespan_us <= back.makespan_us * (1 + EPSILON) else _mirrored(back)


def _mirrored(timetable: Timetable) -> Timetable:
    """A timetable of tasks in reverse as one of the tasks."""
    end = timetable.makespan_us
    return Timetable(
        tuple(Slot(slot.mode, end - slot.end_us, end - slot.start_us) for slot in reversed(timetable.slots))
    )


def _length(timetable: Timetable) -> float:
    return timetable.makespan_us


def _reversed(problem: Problem) -> Problem:
    """The tasks in reverse: each waits for those that need it. A timetable of it, mirrored, may wait on purpose."""
    last = len(problem.tasks) - 1
    needs: list[list[int]] = [[] for _ in problem.tasks]
    for number, task in enumerate(problem.tasks):
        for other in task.needs:
            needs[other].append(last - number)
    tasks = [
        dataclasses.replace(task, needs=tuple(sorted(own))) for task, own in zip(problem.tasks, needs, strict=True)
    ]
    return dataclasses.replace(problem, tasks=tuple(reversed(tasks)))


def _climbed(problem: Problem, rounds: int = 0, seed: int = 0, bound: float = 0.0) -> Timetable:
    """The timetable by critical path, and what is not longer by seeded changes of weights and preferred modes."""
    tails = tails_us(problem)
    count = len(problem.tasks)
    order, modes = tails, [False] * count
    best = min((_started(problem, order, preferred) for preferred in (modes, [True] * count)), key=_length)
    rng = random.Random(seed)
    for _ in range(rounds):
        if best.makespan_us <= bound:
            break
        other, preferred = list(order), list(modes)
        for number in rng.sample(range(count), min(count, rng.randint(1, 4))):
            other[number] = tails[number] * rng.uniform(0.5, 2.0)
            preferred[number] = rng.random() < 0.5
        found = _started(problem, other, preferred)
        if found.makespan_us <= best.makespan_us:
            best, order, modes = found, other, preferred
    return best


def _started(problem: Problem, weights: Sequence[float], last: Sequence[bool]) -> Timetable:
    """The timetable in which every task starts as soon as it may: of those that are ready the one of most weight.

    Of the modes that fit, each task takes the first one, or the last one.
    """
    count = len(problem.tasks)
    free = dict(problem.capacities)
    missing = [len(task.needs) for task in problem.tasks]
    readers: list[list[int]] = [[] for _ in range(count)]
    for number, task in enumerate(problem.tasks):
        for other in task.needs:
            readers[other].append(number)
    place = {number: at for at, number in enumerate(sorted(range(count), key=lambda n: -weights[n]))}
    ready = [number for number in range(count) if not missing[number]]
    running: list[tuple[float, int, Mode]] = []
    slots: dict[int, Slot] = {}
    now = 0.0
    while ready or running:
        waiting = []
        for number in sorted(ready, key=place.__getitem__):
            mode = _fitting(problem.tasks[number], free, last[number])
            if mode is None:
                waiting.append(number)
                continue
            chosen = problem.tasks[number].modes[mode]
            for resource, amount in chosen.demands:
                free[resource] -= amount
            slots[number] = Slot(mode, now, now + chosen.us)
            heapq.heappush(running, (now + chosen.us, number, chosen))
        ready, now = waiting, running[0][0]
        while running and running[0][0] <= now + EPSILON:
            _, number, ended = heapq.heappop(running)
            for resource, amount in ended.demands:
                free[resource] += amount
            for reader in readers[number]:
                missing[reader] -= 1
                if not missing[reader]:
                    ready.append(reader)
    return Timetable(tuple(slots[number] for number in range(count)))


def _fitting(task: Task, free: dict[str, float], last: bool) -> int | None:
    """The first mode that what is free allows, or the last one."""
    count = len(task.modes)
    for number in range(count - 1, -1, -1) if last else range(count):
        for resource, amount in task.modes[number].demands:
            if amount > free[resource] + EPSILON:
                break
        else:
            return number
    return None


# --- the exact solver ------------------------------------------------------------------------------------------------


def exact_schedule(problem: Problem, seconds: float = 10.0) -> Timetable:
    """The shortest timetable, by search; else what a solver finds in this time. `optimal` where it is proved.

    CP-SAT rounds times up to hundredths of a microsecond; where it is not installed, HiGHS solves small problems.
    Raises C623 where the search is not enough and neither is installed.
    """
    start = list_schedule(problem)
    search, left = Search(problem), STEPS
    for width in WIDTHS:
        if start.optimal:
            return start
        found = search.run(start, width, left)
        start = dataclasses.replace(found.timetable or start, optimal=found.proved)
        left -= found.steps
    return start if start.optimal else solved(problem, start, seconds)


def solved(problem: Problem, start: Timetable, seconds: float) -> Timetable:
    """The shortest timetable that a solver finds in this time, from another one on."""
    if importlib.util.find_spec("ortools") is not None:
        return _by_constraints(problem, start, seconds)
    if importlib.util.find_spec(PACKAGE) is not None:
        return flow_schedule(problem, start, lower_bound(problem), seconds)
    message = "to prove the schedule of so many tasks needs OR-tools or HiGHS, and neither is installed"
    raise CommandError(Diagnostic("C623", message, help="pip install cascade-compiler[overlap]"))


def _by_constraints(problem: Problem, start: Timetable, seconds: float) -> Timetable:
    """What CP-SAT finds from a timetable on."""
    cp: Any = importlib.import_module("ortools.sat.python.cp_model")
    model = cp.CpModel()
    horizon = round(start.makespan_us * TICKS_PER_US) + len(problem.tasks) + 1
    begins = [model.new_int_var(0, horizon, f"s{number}") for number in range(len(problem.tasks))]
    ends = [model.new_int_var(0, horizon, f"e{number}") for number in range(len(problem.tasks))]
    chosen: list[list[Any]] = []
    held: list[tuple[Any, Mode]] = []
    for number, (task, slot) in enumerate(zip(problem.tasks, start.slots, strict=True)):
        picks = [model.new_bool_var(f"m{number}_{mode}") for mode in range(len(task.modes))]
        model.add_exactly_one(picks)
        for mode, pick in zip(task.modes, picks, strict=True):
            ticks = -int(-mode.us * TICKS_PER_US // 1)
            name = f"i{number}_{mode.name}"
            held.append((model.new_optional_interval_var(begins[number], ticks, ends[number], pick, name), mode))
        for other in task.needs:
            model.add(begins[number] >= ends[other])
        model.add_hint(begins[number], round(slot.start_us * TICKS_PER_US))
        for at, pick in enumerate(picks):
            model.add_hint(pick, at == slot.mode)
        chosen.append(picks)
    _share(problem, model, held)
    makespan = model.new_int_var(int(lower_bound(problem) * TICKS_PER_US), horizon, "makespan")
    model.add_max_equality(makespan, ends)
    model.minimize(makespan)
    return _solved(problem, start, cp, model, (begins, chosen), seconds)


def _share(problem: Problem, model: Any, held: Sequence[tuple[Any, Mode]]) -> None:
    """What is held together is there. Modes in conflict never run beside each other, which follows, and proves more."""
    for resource, capacity in problem.capacities:
        pairs = [(interval, round(mode.demand(resource) * TICKS_PER_US)) for interval, mode in held]
        pairs = [(interval, amount) for interval, amount in pairs if amount]
        if pairs:
            model.add_cumulative([one for one, _ in pairs], [own for _, own in pairs], round(capacity * TICKS_PER_US))
    for together in conflicts(problem):
        model.add_no_overlap([interval for interval, mode in held if tuple(sorted(mode.demands)) in together])


def _solved(
    problem: Problem,
    start: Timetable,
    cp: Any,
    model: Any,
    variables: tuple[list[Any], list[list[Any]]],
    seconds: float,
) -> Timetable:
    """What the solver makes of a model: its timetable, or the one it started from where it found none."""
    solver = cp.CpSolver()
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.num_workers = WORKERS
    status = solver.solve(model)
    if status not in (cp.OPTIMAL, cp.FEASIBLE):
        return start
    slots = []
    for task, begin, picks in zip(problem.tasks, *variables, strict=True):
        number = next(number for number, pick in enumerate(picks) if solver.value(pick))
        begin_us = solver.value(begin) / TICKS_PER_US
        slots.append(Slot(number, begin_us, begin_us + task.modes[number].us))
    return Timetable(tuple(slots), optimal=status == cp.OPTIMAL)


# --- layers that follow each other -----------------------------------------------------------------------------------


def repeated(problem: Problem, carried: Sequence[tuple[int, int]], copies: int) -> Problem:
    """So many copies of the tasks; `carried` are pairs (task, which task of the copy before it needs)."""
    count = len(problem.tasks)
    tasks: list[Task] = []
    for copy in range(copies):
        for number, task in enumerate(problem.tasks):
            needs = [copy * count + other for other in task.needs]
            needs += [(copy - 1) * count + early for late, early in carried if late == number and copy]
            tasks.append(Task(f"{task.name} @{copy}", task.modes, tuple(sorted(needs))))
    return Problem(tuple(tasks), problem.capacities)


def cycle_us(
    problem: Problem,
    carried: Sequence[tuple[int, int]],
    copies: int = 4,
    schedule: Callable[[Problem], Timetable] = list_schedule,
) -> float:
    """The time between the ends of two copies, where copies follow each other without a break."""
    return (schedule(repeated(problem, carried, copies)).makespan_us - schedule(problem).makespan_us) / (copies - 1)


# --- what is run -----------------------------------------------------------------------------------------------------


def queues_of(problem: Problem, timetable: Timetable, kinds: Sequence[str]) -> Queues:
    """Queues whose tasks never overlap, and the waits between them that order alone does not give.

    `kinds` are resources in order: a task joins a queue of the first one that it holds. A wait is left out where the
    queue, or another wait, has it already.
    """
    lanes: dict[str, list[list[int]]] = {}
    for number in sorted(range(len(problem.tasks)), key=lambda n: (timetable.slots[n].start_us, n)):
        slot = timetable.slots[number]
        mode = problem.tasks[number].modes[slot.mode]
        kind = next((resource for resource in kinds if mode.demand(resource)), kinds[0])
        for lane in lanes.setdefault(kind, []):
            if timetable.slots[lane[-1]].end_us <= slot.start_us + EPSILON:
                lane.append(number)
                break
        else:
            lanes[kind].append([number])
    queues = tuple(
        (kind if place == 0 else f"{kind}.{place}", tuple(lane))
        for kind, found in lanes.items()
        for place, lane in enumerate(found)
    )
    before = {late: early for _, lane in queues for early, late in pairwise(lane)}
    behind: dict[int, set[int]] = {}
    waits: list[tuple[int, int]] = []
    for number in sorted(range(len(problem.tasks)), key=lambda n: (timetable.slots[n].start_us, n)):
        known: set[int] = set()
        if number in before:
            known |= {before[number]} | behind[before[number]]
        for other in sorted(problem.tasks[number].needs, key=lambda n: -timetable.slots[n].end_us):
            if other not in known:
                waits.append((number, other))
                known |= {other} | behind[other]
        behind[number] = known
    return Queues(queues, tuple(waits))
