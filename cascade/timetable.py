"""Tasks on the resources of one device, and when each of them runs: pure data, for schedulers and for who checks them.

Every device of a mesh runs the same tasks, so one timetable is that of all. A task has modes: how long it takes where
it has so much of each resource, such as thread-block slots or a direction of the links. Times are microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Mode:
    """A way to run a task: its time, and what it holds of each resource meanwhile."""

    name: str
    us: float
    demands: tuple[tuple[str, float], ...]

    def demand(self, resource: str) -> float:
        """What it holds of a resource."""
        return dict(self.demands).get(resource, 0.0)


@dataclass(frozen=True, slots=True)
class Task:
    """What is scheduled as one: its name, its modes, the tasks (by number, all of them earlier) that it waits for."""

    name: str
    modes: tuple[Mode, ...]
    needs: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Problem:
    """The tasks, and how much of each resource there is."""

    tasks: tuple[Task, ...]
    capacities: tuple[tuple[str, float], ...]

    def capacity(self) -> Mapping[str, float]:
        """How much there is of each resource, by name."""
        return dict(self.capacities)


@dataclass(frozen=True, slots=True)
class Slot:
    """When a task runs, and in which of its modes (by number)."""

    mode: int
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Timetable:
    """A slot for every task, in the order of the tasks; whether it is proved that none is shorter."""

    slots: tuple[Slot, ...]
    optimal: bool = False

    @property
    def makespan_us(self) -> float:
        """When the last task ends."""
        return max((slot.end_us for slot in self.slots), default=0.0)


@dataclass(frozen=True, slots=True)
class Queues:
    """What is run: queues of tasks, each in order and beside the others; `waits` are pairs (task, on which task)."""

    queues: tuple[tuple[str, tuple[int, ...]], ...]
    waits: tuple[tuple[int, int], ...]
