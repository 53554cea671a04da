"""The exact schedule as a mixed-integer program, for HiGHS: small problems, where CP-SAT is not installed.

    x[i,j]      whether task i ends before task j starts
    y[i,m]      the mode of task i
    f[i,j,r]    how much of a resource j takes over from i; 0 where i does not end before j starts

What a task holds of a resource comes from tasks that have ended or was never held, and goes on to tasks that have not
started: where such flows exist, no more is held than there is. Times are continuous, so the optimum is exact.

Source: the flow-based formulation of Artigues, Michelon and Reusser (2003), with modes.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

from cascade.timetable import Mode, Problem, Slot, Timetable

GAP = 1e-6
"""By which share of the makespan a timetable may be longer than the best one and count as proved."""

PACKAGE = "highspy"


def flow_schedule(problem: Problem, start: Timetable, bound_us: float, seconds: float) -> Timetable:
    """The shortest timetable that HiGHS finds in this time; `start` where it finds none that is shorter."""
    highs: Any = importlib.import_module(PACKAGE)
    model = highs.Highs()
    for name, value in (
        ("log_to_console", False),
        ("output_flag", False),
        ("time_limit", seconds),
        ("mip_rel_gap", GAP),
    ):
        model.setOptionValue(name, value)
    horizon = start.makespan_us  # the unit of time: large constants are then 1
    before = _before(problem, model)
    picks = [[model.addBinary() for _ in task.modes] for task in problem.tasks]
    starts = [model.addVariable(0.0, 1.0) for _ in problem.tasks]
    end = model.addVariable(bound_us / horizon * (1 - GAP), 1.0)
    for task, pick, begin in zip(problem.tasks, picks, starts, strict=True):
        model.addConstr(sum(pick) == 1)
        model.addConstr(begin + _of(pick, [mode.us / horizon for mode in task.modes]) <= end)
    for (one, other), first in before.items():
        us = _of(picks[one], [mode.us / horizon for mode in problem.tasks[one].modes])
        model.addConstr(starts[one] + us - starts[other] + first <= 1)
        if (other, one) in before:
            model.addConstr(first + before[other, one] <= 1)
    for resource, capacity in problem.capacities:
        _flows(problem, model, before, picks, (resource, capacity))
    model.minimize(end)
    if model.getInfo().primal_solution_status != highs.SolutionStatus.kSolutionStatusFeasible:
        return start
    modes = [max(range(len(pick)), key=lambda mode: model.val(pick[mode])) for pick in picks]
    pairs = {pair for pair, first in before.items() if model.val(first) > 0.5}
    found = _earliest([task.modes[mode] for task, mode in zip(problem.tasks, modes, strict=True)], modes, pairs)
    proved = model.getModelStatus() == highs.HighsModelStatus.kOptimal
    best = found if found.makespan_us < start.makespan_us else start
    return Timetable(best.slots, optimal=proved)


def _of(pick: Sequence[Any], values: Sequence[float]) -> Any:
    """The value that goes with the mode that is picked."""
    return sum(one * value for one, value in zip(pick, values, strict=True))


def _before(problem: Problem, model: Any) -> Mapping[tuple[int, int], Any]:
    """For pairs of tasks whether the first ends before the second starts: 1 where it is needed, else to be found."""
    behind: list[set[int]] = []
    for task in problem.tasks:
        behind.append(set(task.needs).union(*(behind[other] for other in task.needs)))
    count = range(len(problem.tasks))
    return {
        (one, other): model.addVariable(float(one in behind[other]), 1.0, type=_integer())
        for one in count
        for other in count
        if one != other and other not in behind[one]
    }


def _integer() -> Any:
    highs: Any = importlib.import_module(PACKAGE)
    return highs.HighsVarType.kInteger


def _flows(
    problem: Problem,
    model: Any,
    before: Mapping[tuple[int, int], Any],
    picks: Sequence[Sequence[Any]],
    held: tuple[str, float],
) -> None:
    """What of a resource goes from which task to which, in shares of all that there is."""
    resource, capacity = held
    demands = [[mode.demand(resource) / capacity for mode in task.modes] for task in problem.tasks]
    users = [number for number, own in enumerate(demands) if max(own)]
    into: dict[int, list[Any]] = {number: [model.addVariable(0.0, 1.0)] for number in users}  # what nobody held before
    out: dict[int, list[Any]] = {number: [model.addVariable(0.0, 1.0)] for number in users}  # what nobody takes on
    if users:
        model.addConstr(sum(found[0] for found in into.values()) <= 1)
    for (one, other), first in before.items():
        if one in into and other in into:
            flow = model.addVariable(0.0, 1.0)
            model.addConstr(flow - min(max(demands[one]), max(demands[other])) * first <= 0)
            out[one].append(flow)
            into[other].append(flow)
    for number in users:
        demand = _of(picks[number], demands[number])
        model.addConstr(sum(into[number]) - demand == 0)
        model.addConstr(sum(out[number]) - demand == 0)


def _earliest(modes: Sequence[Mode], numbers: Sequence[int], pairs: set[tuple[int, int]]) -> Timetable:
    """The timetable in which every task starts when those before it have ended, without a solver's roundings."""
    slots: dict[int, Slot] = {}
    while len(slots) < len(modes):
        number = next(n for n in range(len(modes)) if n not in slots and all(o in slots for o, m in pairs if m == n))
        begin = max((slots[one].end_us for one, other in pairs if other == number), default=0.0)
        slots[number] = Slot(numbers[number], begin, begin + modes[number].us)
    return Timetable(tuple(slots[number] for number in range(len(modes))))
