"""The shortest timetable, found and proved by what has been started: widths, dominance, bounds; no solver.

    level   started     runs      at      a state, when something ends: what has been started, when what runs then ends
    0       -           -         0.0
    1       A           A until   10.0    -->  start C, or B, or wait for the next end
    3       A, B        B until   22.0

A task starts at 0 or when another one ends: moving it forward until one of the two holds makes no timetable longer. So
from every state all sets of tasks that may start then, none included, lead to the next states. Of two states in which
the same tasks have been started and the same ones run, in the same modes, one in which nothing ends later makes the
other superfluous: what follows the other may follow it. States are on levels, by how many tasks have been started and
have ended; those that dominate each other are on one level, so levels are gone through once.

A layer cut in two is a few chains, so few sets of tasks can have been started, whatever the number of layers in a row;
and what is left to do, by the measures of `schedule_bound.py`, rules out most. Where no level has more states than the
width, the timetable is proved; with a narrow width the search is a heuristic, the same every time.

Sources: cutset dominance of Demeulemeester and Herroelen (1992), with modes Sprecher and Drexl (1998); levels as in
dynamic programs over the ideals of an order; a narrow width is a beam search.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import NamedTuple

from cascade.passes.schedule_bound import EPSILON, behind_us, tails_us, works
from cascade.timetable import Problem, Slot, Timetable

MEASURES = 6
"""So many of them bound what is left of a state: those with most work."""

MOST_SETS = 512
"""Sets of tasks that start together, of which a state tries so many; plans have about ten."""


_Starts = tuple[tuple[int, int], ...]
"""Tasks that start together, each with its mode."""


class _Run(NamedTuple):
    """A task that runs, in which mode, and when it ends."""

    task: int
    mode: int
    end_us: float


class _State(NamedTuple):
    """The moment at which something has ended: the tasks that have been started, as bits, and those that still run.

    `before` is the state at whose moment the tasks `starts`, with their modes, were started.
    """

    bound_us: float
    now_us: float
    started: int
    running: tuple[_Run, ...]
    before: _State | None
    starts: _Starts

    def dominates(self, other: _State) -> bool:
        """Whether nothing ends later than in another state, of the same tasks in the same modes."""
        pairs = zip(self.running, other.running, strict=True)
        return self.now_us <= other.now_us + EPSILON and all(a.end_us <= b.end_us + EPSILON for a, b in pairs)


_Level = dict[object, list[_State]]
"""The states with as many starts and ends, by what has been started and what runs."""


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search came to: a shorter timetable, if it found one; whether none is shorter; how many steps it made from
    one state to another."""

    timetable: Timetable | None
    proved: bool
    steps: int


class Search:
    """What stays the same for all states of a problem."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.names = [resource for resource, _ in problem.capacities]
        self.demands = [[tuple(map(mode.demand, self.names)) for mode in task.modes] for task in problem.tasks]
        self.needs = [sum(1 << other for other in task.needs) for task in problem.tasks]
        self.tails, self.behind = tails_us(problem), behind_us(problem)
        self.works = works(problem)[:MEASURES]
        self.late_first = sorted(range(len(problem.tasks)), key=lambda number: -self.behind[number])
        self.fronts: dict[int, tuple[int, ...]] = {}
        self.lefts: dict[int, tuple[list[float], list[list[float]]]] = {}

    def run(self, start: Timetable, width: int, steps: int, below_us: float = inf) -> Searched:
        """A timetable shorter than another one and than some time, by so many states of a level; by one, when so many
        steps were made."""
        levels: list[_Level] = [{} for _ in range(2 * len(self.problem.tasks) + 1)]
        levels[0][None] = [_State(0.0, 0.0, 0, (), None, ())]
        limit, best, proved, made = min(start.makespan_us, below_us) * (1 - EPSILON), None, True, 0
        for level in levels:
            found = [state for alike in level.values() for state in alike if state.bound_us < limit]
            level.clear()
            if len(found) > (most := width if made < steps else 1):
                proved, found = False, sorted(found, key=lambda state: state.bound_us)[:most]
            for state in found:
                if len(self._front(state.started)) + len(state.running) == 0:
                    if state.now_us < limit:
                        best, limit = state, state.now_us * (1 - EPSILON)
                    continue
                sets = list(self._sets(state))
                proved, made = proved and len(sets) < MOST_SETS, made + len(sets)
                for starts in sets:
                    self._keep(levels, state, starts, limit)
        return Searched(None if best is None else self._timetable(best), proved, made)

    def _keep(self, levels: Sequence[_Level], state: _State, starts: _Starts, limit: float) -> None:
        """The state behind these starts, when the next task ends, on its level; not if it is ruled out."""
        runs, started = list(state.running), state.started
        for task, mode in starts:
            runs.append(_Run(task, mode, state.now_us + self.problem.tasks[task].modes[mode].us))
            started |= 1 << task
        if not runs:
            return
        now = min(run.end_us for run in runs)
        running = tuple(sorted(run for run in runs if run.end_us > now + EPSILON))
        level = levels[2 * started.bit_count() - len(running)]
        alike = level.setdefault((started, tuple((run.task, run.mode) for run in running)), [])
        after = _State(state.bound_us, now, started, running, state, starts)
        if any(other.dominates(after) for other in alike):
            return
        bound = max(state.bound_us, self._path_us(after))
        bound = max(bound, self._work_us(after)) if bound < limit else bound
        if bound < limit:
            alike[:] = [*(other for other in alike if not after.dominates(other)), after._replace(bound_us=bound)]

    def _front(self, started: int) -> tuple[int, ...]:
        """The tasks that have not been started, and that all tasks they need have been."""
        if started not in self.fronts:
            self.fronts[started] = tuple(
                number
                for number, needs in enumerate(self.needs)
                if not started >> number & 1 and needs & started == needs
            )
        return self.fronts[started]

    def _sets(self, state: _State) -> Iterator[_Starts]:
        """The sets of tasks, with modes, that may start now beside what runs; those with the longest way first."""
        running = sum(1 << run.task for run in state.running)
        ended = state.started & ~running
        may = [number for number in self._front(state.started) if self.needs[number] & ended == self.needs[number]]
        may.sort(key=lambda number: -self.tails[number])
        free = [capacity for _, capacity in self.problem.capacities]
        for run in state.running:
            free = [left - held for left, held in zip(free, self.demands[run.task][run.mode], strict=True)]
        left = MOST_SETS

        def grow(place: int, chosen: _Starts, free: list[float]) -> Iterator[_Starts]:
            nonlocal left
            for at in range(place, len(may)):
                for mode, held in enumerate(self.demands[may[at]]):
                    if left > 0 and all(own <= there + EPSILON for own, there in zip(held, free, strict=True)):
                        rest = [there - own for own, there in zip(held, free, strict=True)]
                        yield from grow(at + 1, (*chosen, (may[at], mode)), rest)
            left -= 1
            if left >= 0:
                yield chosen

        yield from grow(0, (), free)

    def _path_us(self, state: _State) -> float:
        """The end, if only what each task needs held it up."""
        now, running = state.now_us, state.running
        end = max((run.end_us + self.behind[run.task] for run in running), default=now)
        for number in self._front(state.started):
            ready = max((run.end_us for run in running if self.needs[number] >> run.task & 1), default=now)
            end = max(end, ready + self.tails[number])
        return end

    def _work_us(self, state: _State) -> float:
        """The end, by the work that is left and what lies behind it, of what runs included."""
        places, longest = self._left(state.started)
        if not places:
            return state.now_us
        running = sorted(state.running, key=lambda run: -self.behind[run.task])
        at = [bisect_left(places, -self.behind[run.task]) for run in running]
        end = state.now_us
        for work, most in zip(self.works, longest, strict=True):
            done = state.now_us
            end = max(end, done + most[0])
            for run, place in zip(running, at, strict=True):
                done += (run.end_us - state.now_us) * work.rates[run.task][run.mode]
                end = max(end, done + most[place]) if place < len(most) else end
        return end

    def _left(self, started: int) -> tuple[list[float], list[list[float]]]:
        """What lies behind the tasks that are left, falling and negated; and by each measure, from each of them on, the
        longest that the work of all that have no less behind them takes together with that."""
        if started not in self.lefts:
            left = [number for number in self.late_first if not started >> number & 1]
            behind = [self.behind[number] for number in left]
            longest = []
            for work in self.works:
                totals = accumulate(work.least[number] for number in left)
                ends = [total + more for total, more in zip(totals, behind, strict=True)]
                longest.append(list(accumulate(reversed(ends), max))[::-1])
            self.lefts[started] = [-more for more in behind], longest
        return self.lefts[started]

    def _timetable(self, state: _State) -> Timetable:
        """When each task was started on the way to a state."""
        slots: dict[int, Slot] = {}
        while state.before is not None:
            for task, mode in state.starts:
                begin = state.before.now_us
                slots[task] = Slot(mode, begin, begin + self.problem.tasks[task].modes[mode].us)
            state = state.before
        return Timetable(tuple(slots[number] for number in range(len(slots))))
