"""Schedules: valid by a checker that shares nothing with the scheduler, bounded, near the best, which a search proves and
brute force and solvers find as well, and with no wait too few or too many."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from cascade.errors import CommandError
from cascade.passes.schedule_bound import conflicts, lower_bound, shortest_us, works
from cascade.passes.schedule_flow import flow_schedule
from cascade.passes.schedule_overlap import (
    cycle_us, exact_schedule, exposed_us, list_schedule, queues_of, repeated, searched, serial_us, solved,
)  # fmt: skip
from cascade.passes.schedule_search import Search
from cascade.timetable import Mode, Problem, Queues, Slot, Task, Timetable
from cascade.verify.timetable import (
    check_queues, check_ranks, check_timetable, check_written, implied, over_synchronised,
)  # fmt: skip
from tests.timing import slowness

KINDS = ("sms", "links")


def task(name: str, us: float, resource: str, *needs: int) -> Task:
    return Task(name, (Mode("only", us, ((resource, 1.0),)),), needs)


def two_halves() -> Problem:
    """Two halves of tokens through a layer of two products, each followed by a collective."""
    tasks = []
    for half in range(2):
        at = 4 * half
        tasks += [
            task(f"a{half}", 10, "sms", *((0,) if half else ())), task(f"ra{half}", 8, "links", at),
            task(f"b{half}", 12, "sms", at + 1), task(f"rb{half}", 8, "links", at + 2),
        ]  # fmt: skip
    return Problem(tuple(tasks), (("sms", 1.0), ("links", 1.0)))


def random_problem(rng: random.Random, count: int) -> Problem:
    tasks = []
    for number in range(count):
        needs = tuple(sorted(rng.sample(range(number), min(number, rng.randint(0, 2)))))
        kind = rng.choice(KINDS)
        modes = [Mode("whole", float(rng.randint(1, 20)), ((kind, 4.0),))]
        if kind == "sms" and rng.random() < 0.5:
            modes.append(Mode("shared", modes[0].us * 1.25, ((kind, 3.0),)))
        if kind == "links" and rng.random() < 0.5:
            modes = [dataclasses.replace(modes[0], demands=(("links", 4.0), ("sms", 1.0)))]
        tasks.append(Task(f"t{number}", tuple(modes), needs))
    return Problem(tuple(tasks), (("sms", 4.0), ("links", 4.0)))


def brute_force(problem: Problem) -> float:
    """The shortest makespan over all orders of starting and all modes, each task as early as resources allow."""
    best = float("inf")
    for order in itertools.permutations(range(len(problem.tasks))):
        place = {number: at for at, number in enumerate(order)}
        if any(place[other] > place[n] for n, one in enumerate(problem.tasks) for other in one.needs):
            continue
        for modes in itertools.product(*(range(len(one.modes)) for one in problem.tasks)):
            slots: dict[int, Slot] = {}
            for number in order:
                mode = problem.tasks[number].modes[modes[number]]
                ready = max((slots[other].end_us for other in problem.tasks[number].needs), default=0.0)
                for start in sorted({ready, *(s.end_us for s in slots.values() if s.end_us > ready)}):
                    trial = {**slots, number: Slot(modes[number], start, start + mode.us)}
                    if fits(problem, trial):
                        slots = trial
                        break
            best = min(best, max(slot.end_us for slot in slots.values()))
    return best


def fits(problem: Problem, slots: dict[int, Slot]) -> bool:
    for at in {slot.start_us for slot in slots.values()}:
        for resource, capacity in problem.capacities:
            running = (n for n, s in slots.items() if s.start_us <= at < s.end_us)
            if sum(problem.tasks[n].modes[slots[n].mode].demand(resource) for n in running) > capacity + 1e-9:
                return False
    return True


def test_two_halves_hide_their_collectives() -> None:
    problem = two_halves()
    found = list_schedule(problem)
    assert not list(check_timetable(problem, found))
    assert (serial_us(problem), lower_bound(problem), found.makespan_us) == (76, 52, 52)
    assert exposed_us(problem, found, ["links"], "sms") == 52 - 44


@pytest.mark.parametrize("seed", range(15))
def test_schedules_are_valid_and_above_their_bound(seed: int) -> None:
    problem = random_problem(random.Random(seed), 30)
    found = list_schedule(problem)
    assert not list(check_timetable(problem, found))
    assert lower_bound(problem) - 1e-6 <= found.makespan_us <= serial_us(problem) * 1.25 + 1e-6
    queues = queues_of(problem, found, KINDS)
    assert not list(check_queues(problem, queues)) and not list(over_synchronised(problem, queues))


def test_list_schedules_are_near_the_best_by_brute_force() -> None:
    problems = [random_problem(random.Random(seed), 5) for seed in range(25)]
    found = [(list_schedule(p).makespan_us, brute_force(p), lower_bound(p)) for p in problems]
    assert all(ours >= best - 1e-6 >= bound - 2e-6 for ours, best, bound in found)
    assert sum(ours for ours, _, _ in found) <= 1.05 * sum(best for _, best, _ in found)


@pytest.mark.parametrize("seed", range(15))
def test_wide_problems_are_scheduled_too(seed: int) -> None:
    """Of thirty tasks with little order a narrow search proves nothing; what it comes to is no longer than by paths."""
    problem = random_problem(random.Random(100 + seed), 30)
    found, rough = list_schedule(problem), list_schedule(problem, 0)
    assert not list(check_timetable(problem, found)) and not list(check_timetable(problem, rough))
    assert lower_bound(problem) - 1e-6 <= found.makespan_us <= rough.makespan_us + 1e-6
    assert found == list_schedule(problem)


# --- what is proved --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_the_search_finds_what_brute_force_finds(seed: int) -> None:
    problem = random_problem(random.Random(seed), 5)
    found = Search(problem).run(Timetable(tuple(one_by_one(problem))), 10**6, 10**6)
    best = list_schedule(problem) if found.timetable is None else found.timetable
    assert found.proved and not list(check_timetable(problem, best))
    assert best.makespan_us == pytest.approx(brute_force(problem), abs=1e-6)


def test_the_best_timetable_may_wait_on_purpose() -> None:
    """A long product that starts at once delays what the links wait for: the search lets the SMs idle for a moment."""
    problem = Problem(
        (
            task("made", 1, "links"), task("long", 10, "sms"), task("short", 1, "sms", 0),
            task("exchange", 10, "links", 2),
        ),
        (("sms", 1.0), ("links", 1.0)),
    )  # fmt: skip
    found = exact_schedule(problem)
    assert found.optimal and found.makespan_us == brute_force(problem) == 12
    assert found.slots[1].start_us == 2


@pytest.mark.skipif(importlib.util.find_spec("ortools") is None, reason="OR-tools is not installed")
@pytest.mark.parametrize("seed", range(8))
def test_the_search_and_the_solver_prove_the_same(seed: int) -> None:
    problem = random_problem(random.Random(seed), 10)
    one, other = exact_schedule(problem), solved(problem, Timetable(tuple(one_by_one(problem))), 20.0 * slowness())
    assert one.optimal and other.optimal
    assert not list(check_timetable(problem, one)) and not list(check_timetable(problem, other))
    assert one.makespan_us == pytest.approx(other.makespan_us, abs=0.5)
    assert list_schedule(problem).makespan_us <= 1.05 * one.makespan_us


def test_a_narrow_search_says_that_it_proved_nothing() -> None:
    problem = random_problem(random.Random(3), 12)
    start = Timetable(tuple(one_by_one(problem)))
    narrow, wide = Search(problem).run(start, 1, 10**6), Search(problem).run(start, 10**6, 10**6)
    spent = Search(problem).run(start, 10**6, 1)
    assert wide.proved and not narrow.proved and not spent.proved and wide.timetable is not None
    for found in (narrow.timetable, spent.timetable):
        assert found is not None and found.makespan_us >= wide.timetable.makespan_us
        assert not list(check_timetable(problem, found))


@pytest.mark.parametrize("seed", range(20))
def test_what_runs_beside_each_other_is_never_more_than_one_by_any_measure(seed: int) -> None:
    rng = random.Random(seed)
    problem = random_problem(rng, 12)
    free = Problem(tuple(dataclasses.replace(one, needs=()) for one in problem.tasks), problem.capacities)
    measures = works(problem)
    for _ in range(200):
        together = {
            number: Slot(rng.randrange(len(free.tasks[number].modes)), 0.0, 1.0)
            for number in rng.sample(range(12), rng.randint(1, 4))
        }
        if fits(free, together):
            for work in measures:
                assert sum(work.rates[number][slot.mode] for number, slot in together.items()) <= 1 + 1e-6


def test_products_that_leave_a_few_slots_free_are_in_conflict() -> None:
    """By their shares of slots two such products are less work than one after the other, which they must run."""
    modes = (Mode("whole", 10.0, (("sms", 132.0),)), Mode("shared", 10.4, (("sms", 124.0),)))
    problem = Problem((Task("a", modes), Task("b", modes)), (("sms", 132.0),))
    assert conflicts(problem) == [frozenset({(("sms", 132.0),), (("sms", 124.0),)})]
    assert (
        max(sum(10.4 * 124 / 132 for _ in "ab"), 10.4)
        < 20
        == lower_bound(problem)
        == exact_schedule(problem).makespan_us
    )


@pytest.mark.parametrize("seed", range(20))
def test_sets_in_conflict_are_all_the_largest_ones(seed: int) -> None:
    """Against every set of demands, looked at one by one."""
    problem = random_problem(random.Random(seed), 4)
    every = list(dict.fromkeys(tuple(sorted(mode.demands)) for task in problem.tasks for mode in task.modes))

    def clash(one: tuple[tuple[str, float], ...], other: tuple[tuple[str, float], ...]) -> bool:
        return any(dict(one).get(name, 0) + dict(other).get(name, 0) > most for name, most in problem.capacities)

    sets = [
        frozenset(chosen)
        for size in range(1, len(every) + 1)
        for chosen in itertools.combinations(every, size)
        if all(clash(one, other) for one in chosen for other in chosen)
    ]
    assert set(conflicts(problem)) == {one for one in sets if not any(one < other for other in sets)}


@pytest.mark.parametrize("seed", range(20))
def test_what_is_not_below_a_time_is_not_searched_for(seed: int) -> None:
    problem = random_problem(random.Random(seed), 10)
    found = searched(problem)
    assert shortest_us(problem) <= lower_bound(problem) <= found.makespan_us + 1e-6
    assert searched(problem, below_us=found.makespan_us + 1).makespan_us == pytest.approx(found.makespan_us)
    for below in (found.makespan_us, shortest_us(problem), 0.0):
        other = searched(problem, below_us=below)
        assert other.makespan_us >= found.makespan_us - 1e-6 and not list(check_timetable(problem, other))


@pytest.mark.parametrize("seed", range(25))
def test_bounds_are_below_the_best_and_above_the_critical_path(seed: int) -> None:
    problem = random_problem(random.Random(500 + seed), 5)
    paths = [0.0] * 5
    for number, one in enumerate(problem.tasks):
        paths[number] = min(mode.us for mode in one.modes) + max((paths[other] for other in one.needs), default=0.0)
    assert max(paths) - 1e-6 <= lower_bound(problem) <= brute_force(problem) + 1e-6


def test_small_problems_are_proved_without_the_first_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    """HiGHS finds what brute force finds; where it is not installed either, the error says what to install."""
    known = importlib.util.find_spec
    problem = random_problem(random.Random(4), 5)
    start = Timetable(tuple(one_by_one(problem)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ortools" else known(name))
    if known("highspy") is not None:
        for seed in range(6):
            problem = random_problem(random.Random(seed), 5)
            start = Timetable(tuple(one_by_one(problem)))
            found = flow_schedule(problem, start, lower_bound(problem), 10.0)
            assert found.optimal and not list(check_timetable(problem, found))
            assert found.makespan_us == pytest.approx(brute_force(problem), abs=1e-3)
            assert solved(problem, start, 10.0).makespan_us == pytest.approx(found.makespan_us, abs=1e-3)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert exact_schedule(problem).optimal  # the search is enough
    with pytest.raises(CommandError, match="C623"):
        solved(problem, start, 10.0)


def one_by_one(problem: Problem) -> Iterator[Slot]:
    """One task after the other: the longest timetable that anyone would start from."""
    now = 0.0
    for one in problem.tasks:
        yield Slot(0, now, now + one.modes[0].us)
        now += one.modes[0].us


def test_layers_in_a_row_overlap_more_than_one_alone() -> None:
    problem = two_halves()
    carried = [(0, 3), (4, 7)]  # each half needs its own result of the layer before
    assert 44 <= lower_bound(problem) <= 52 and len(repeated(problem, carried, 3).tasks) == 24
    assert 44 <= cycle_us(problem, carried) <= 52


# --- the checker -----------------------------------------------------------------------------------------------------


def valid() -> tuple[Problem, Timetable, Queues]:
    problem = two_halves()
    found = list_schedule(problem)
    return problem, found, queues_of(problem, found, KINDS)


def late(timetable: Timetable, number: int, by: float) -> Timetable:
    slots = list(timetable.slots)
    slots[number] = Slot(slots[number].mode, slots[number].start_us + by, slots[number].end_us + by)
    return Timetable(tuple(slots))


TIMETABLES: dict[str, Callable[[Timetable], Timetable]] = {
    "a task before what it needs": lambda t: late(t, 2, -9.0),
    "two tasks on one resource": lambda t: late(t, 4, -1.0),
    "a task that ends too soon": lambda t: Timetable((Slot(0, 0.0, 9.0), *t.slots[1:])),
    "a task missing": lambda t: Timetable(t.slots[:-1]),
    "a mode that is not there": lambda t: Timetable((Slot(1, 0.0, 10.0), *t.slots[1:])),
    "before the start": lambda t: late(t, 0, -1.0),
}


@pytest.mark.parametrize("name", TIMETABLES)
def test_a_wrong_timetable_is_found(name: str) -> None:
    problem, timetable, _ = valid()
    assert not list(check_timetable(problem, timetable))
    assert list(check_timetable(problem, TIMETABLES[name](timetable)))


def test_every_wait_is_needed_and_a_needless_one_is_found() -> None:
    problem, _, queues = valid()
    assert queues.waits and not list(check_queues(problem, queues))
    for wait in queues.waits:
        fewer = dataclasses.replace(queues, waits=tuple(other for other in queues.waits if other != wait))
        assert list(check_queues(problem, fewer))
    behind = set(implied(queues))
    more = next((a, b) for a in range(8) for b in range(8) if (a, b) not in behind and b == 1 and a == 4)
    assert list(over_synchronised(problem, dataclasses.replace(queues, waits=(*queues.waits, more))))


def test_waits_in_a_circle_and_tasks_in_no_queue_are_found() -> None:
    problem, _, queues = valid()
    first = queues.queues[0][1]
    circle = dataclasses.replace(queues, waits=(*queues.waits, (first[0], first[-1])))
    assert list(check_queues(problem, circle)) == ["waits go in a circle"]
    gone = dataclasses.replace(queues, queues=((queues.queues[0][0], first[1:]), *queues.queues[1:]))
    assert list(check_queues(problem, gone)) == ["a task is in no queue, or in two"]


def test_ranks_issue_collectives_in_one_order() -> None:
    assert not list(check_ranks({0: ["a", "b"], 1: ["a", "b"]}))
    assert list(check_ranks({0: ["a", "b"], 1: ["b", "a"]})) and list(check_ranks({0: ["a", "b"], 1: ["a"]}))


def test_what_is_computed_twice_is_found() -> None:
    assert not list(check_written({(0, "Y"): [((0, 4),), ((4, 8),)]}))
    assert list(check_written({(0, "Y"): [((0, 5),), ((4, 8),)]}))
