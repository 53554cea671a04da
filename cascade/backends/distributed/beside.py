"""Tasks of one device by their share of it: on all SMs, or confined to one side of a partition, beside the other side.

    partition 56 + 76 of 132 SMs           all: sms 132      a: sms 56, side a       b: sms 76, side b
    a sum over what is read once               260 us            300 us, 0.85 bandwidth    ...
    product, matrix                            170 us            ...                       290 us, 0.08 bandwidth

What reads memory needs few SMs for that, and what multiplies leaves the memory idle: side by side both take longer and
together less. A side is held by one task at a time, all SMs by a task that nothing stands beside. Besides, a mode holds
the share of the memory's bandwidth that it uses while it runs, so that what runs together never uses more than there
is. Beyond that sides slow each other down: one evicts from L2 what the other reads again, and the clock drops with the
power that both take. Of that a side is supposed to lose a fixed share (`CONTENDED`); how much it is differs from device
to device, so whoever loads a plan can have both ways timed there.

The matrix rate and the lanes are those of the SMs that a mode has; what so few draw of the memory, `Node` says. Sides
are multiples of what drivers give (`UNIT`), and what remains. A mode on all SMs that is no faster than one on a side is
none: it would keep others out for nothing.

Source: NanoFlow (arXiv 2408.12757), which overlaps kernels of one device by shares of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from cascade.backends.distributed.kernels import SMS, Clock, Layer, tasks_of
from cascade.backends.distributed.machine import Node
from cascade.placed import Compute, Program
from cascade.timetable import Mode, Problem, Timetable

ALL = "all"
SIDES = ("a", "b")
SIDE_QUEUES = tuple(f"{SMS} {side}" for side in SIDES)
"""The resources that sides are, and so what their queues are called."""

BANDWIDTH = "bandwidth"

UNIT = 8
"""SMs that a driver gives together, and the fewest of a side: what runs in clusters needs them so from sm_90 on."""

CONTENDED = 0.8
"""Of what a side reaches alone, what it reaches beside the other. On an H200 what reads in `benchmarks overlap` took
795 us on 52 SMs beside a product; by the model it takes 638 alone."""

EPSILON = 1e-6

LEAST_GAIN = 0.02
"""Of the serial time: overlap that saves less is not worth slices, streams and waits; no time is exact to that."""


def partitions(node: Node) -> Iterator[int]:
    """How many SMs side a can have."""
    return iter(range(UNIT, node.gpu.sms - UNIT + 1, UNIT))


def sides(node: Node, first: int) -> dict[str, int]:
    """How many SMs every side has, by the name of its mode."""
    return dict(zip(SIDES, (first, node.gpu.sms - first), strict=True))


def shared_problem(program: Program, layer: Layer, clock: Clock, first: int | None) -> Problem:
    """The tasks of one device with their modes: side a has so many SMs; without a number all run on all of them."""
    tasks = tasks_of(program, layer, clock.reach, lambda own: _modes(program, own, clock, first))
    held = ((side, 1.0) for side in SIDE_QUEUES)
    return Problem(tasks, (*held, (SMS, float(clock.node.gpu.sms)), (BANDWIDTH, 1.0)))


def kept_apart(problem: Problem, timetable: Timetable) -> Problem:
    """The same tasks, each also behind those that end before it starts and with which it would hold more than there is.

    A queue starts what is next as soon as it can: two readers of the memory that the timetable has one after the other
    would take from each other what neither then has.
    """
    capacity = problem.capacity()
    modes = [task.modes[slot.mode] for task, slot in zip(problem.tasks, timetable.slots, strict=True)]

    def conflict(one: Mode, other: Mode) -> bool:
        return any(one.demand(name) + other.demand(name) > capacity[name] + EPSILON for name, _ in one.demands)

    found = []
    for number, (task, slot) in enumerate(zip(problem.tasks, timetable.slots, strict=True)):
        ended = (
            n for n, other in enumerate(timetable.slots) if other.end_us <= slot.start_us + EPSILON and n != number
        )
        behind = {n for n in ended if conflict(modes[number], modes[n])}
        found.append(dataclasses.replace(task, needs=tuple(sorted({*task.needs, *behind}))))
    return dataclasses.replace(problem, tasks=tuple(found))


def _modes(program: Program, steps: Sequence[int], clock: Clock, first: int | None) -> tuple[Mode, ...]:
    computed = [step for number in steps if isinstance(step := program.steps[number], Compute)]
    node, work = clock.node, clock.work(tuple(computed))
    moved = work.moved + sum(work.merged)

    def mode(name: str, sms: int, *held: tuple[str, float]) -> Mode:
        us = clock.compute_us(computed, sms)
        us += (us - node.floor_us) * (1 / CONTENDED - 1) if held else 0.0
        return Mode(name, us, (*held, (SMS, float(sms)), (BANDWIDTH, moved / (us * node.gpu.bandwidth_tbs * 1e6))))

    whole = mode(ALL, node.gpu.sms)
    if first is None:
        return (whole,)
    ways = zip(SIDE_QUEUES, sides(node, first).items(), strict=True)
    found = [mode(name, sms, (queue, 1.0)) for queue, (name, sms) in ways]
    found.sort(key=lambda one: one.us)
    return (whole, *found) if whole.us < found[0].us else tuple(found)
