"""Queues of a plan as CUDA streams: what is recorded and waited for is enough for the plan, and no more than it says.

No GPU is here: streams and events are stand-ins that write down what happens, and a witness that knows nothing of queues
derives from that log which task is behind which.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from benchmarks.links import LLAMA
from cascade.backends.distributed import streams
from cascade.backends.distributed.machine import node
from cascade.backends.distributed.plan import Plan, plan, plan_json
from cascade.backends.distributed.runtime import ordered
from cascade.backends.distributed.streams import Ordered, Queues
from cascade.backends.share import at_most

GPU = torch.device("cuda", 0)


@dataclass(eq=False)
class Event:
    """A point in a stream: how much of it is before."""

    enable_timing: bool = False
    at: tuple[Stream, int] | None = None


@dataclass(eq=False)
class Stream:
    """What was put into a stream, in order: tasks, and events that it waits for."""

    device: Any = None
    priority: int = 0
    log: list[object] = field(default_factory=list)

    def record_event(self, event: Event) -> Event:
        event.at = self, len(self.log)
        return event

    def wait_event(self, event: Event) -> None:
        self.log.append(event)

    def wait_stream(self, other: Stream) -> None:
        self.log.append(other.record_event(Event()))


def before(stream: Stream, end: int, seen: set[tuple[int, int]]) -> set[int]:
    """The tasks that have ended when so much of a stream has: a walk over the log."""
    if (id(stream), end) in seen:
        return set()
    seen.add((id(stream), end))
    found: set[int] = set()
    for item in stream.log[:end]:
        if isinstance(item, int):
            found.add(item)
        elif isinstance(item, Event):
            assert item.at is not None, "an event is recorded before anything waits for it"
            found |= before(*item.at, seen)
    return found


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stream]:
    """The stream of the caller, on a device that is not there."""
    current = [Stream()]

    @contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(streams.torch.cuda, "Stream", Stream)
    monkeypatch.setattr(streams.torch.cuda, "Event", Event)
    monkeypatch.setattr(streams.torch.cuda, "stream", inside)
    monkeypatch.setattr(streams.torch.cuda, "current_stream", lambda device=None: current[-1])
    yield current[0]
    assert len(current) == 1


def issued(queues: Queues, caller: Stream) -> dict[int, set[int]]:
    """For every task of a call those that have surely ended when it begins."""
    found: dict[int, set[int]] = {}
    caller.log.append(-1)  # what the caller did before
    with queues.call(GPU):
        for number in range(len(queues.tasks)):
            with queues.task(number):
                stream = torch.cuda.current_stream()
                assert isinstance(stream, Stream) and stream is queues.streams[queues.tasks[number].queue]
                found[number] = before(stream, len(stream.log), set())
                stream.log.append(number)
    assert before(caller, len(caller.log), set()) == {-1, *found}, "the caller goes on behind all tasks"
    return found


@pytest.fixture(scope="module")
def split() -> Plan:
    """A layer in two slices, over eight devices."""
    found = plan(LLAMA.cascade(8), {"T": 4096, **LLAMA.sizes}, node("h100x8"))
    assert found.cut.cuts
    return found


def test_every_need_of_a_plan_is_waited_for(device: Stream, split: Plan) -> None:
    made = json.loads(json.dumps(plan_json(split)))
    queues = Queues(ordered(made["tasks"]), {"links out", "links in"})
    ended = issued(queues, device)
    place = {task["name"]: number for number, task in enumerate(made["tasks"])}
    for task in split.problem.tasks:
        needed = {place[split.problem.tasks[other].name] for other in task.needs}
        assert needed <= ended[place[task.name]] and -1 in ended[place[task.name]]
    apart = [n for n in ended if len(ended[n] - {-1}) < n]  # some tasks do not wait for all that were issued before
    assert apart, "slices run beside each other"


def test_a_wait_that_is_dropped_is_seen(device: Stream, split: Plan) -> None:
    made = plan_json(split)
    tasks = ordered(made["tasks"])
    waiting = next(n for n, task in enumerate(tasks) if task.waits)
    tasks[waiting] = Ordered(tasks[waiting].steps, tasks[waiting].queue, (), tasks[waiting].sms)
    ended = issued(Queues(tasks), device)
    place = {task["name"]: number for number, task in enumerate(made["tasks"])}
    names = [task.name for task in split.problem.tasks]
    assert any(
        place[names[other]] not in ended[place[task.name]] for task in split.problem.tasks for other in task.needs
    )


def test_queues_keep_their_order_and_exchanges_come_first(device: Stream) -> None:
    tasks = [
        Ordered((0,), "sms"),
        Ordered((1,), "links out", (0,)),
        Ordered((2,), "sms", (), 100),
        Ordered((3,), "sms", (1,)),
    ]
    queues = Queues(tasks, {"links out"})
    ended = issued(queues, device)
    assert {number: found - {-1} for number, found in ended.items()} == {0: set(), 1: {0}, 2: {0}, 3: {0, 1, 2}}
    assert queues.streams["links out"].priority < queues.streams["sms"].priority
    made = dict(queues.streams)
    issued(queues, device)
    assert made == queues.streams, "streams are made once"


def test_what_tasks_make_is_kept_until_the_call_is_over(device: Stream) -> None:
    queues = Queues([Ordered((0,), "sms")])
    with queues.call(GPU), queues.task(0):
        kept = queues.keep(torch.zeros(1))
        assert queues.alive == [kept]
    assert not queues.alive


def test_kernels_count_on_the_multiprocessors_of_their_task(device: Stream) -> None:
    queues = Queues([Ordered((0,), "sms", (), 100), Ordered((1,), "sms")])
    with queues.call(GPU):
        for number, wanted in ((0, 100), (1, 132)):
            with queues.task(number):
                assert at_most(132) == wanted
    assert at_most(132) == 132


def test_on_a_cpu_tasks_run_where_they_are() -> None:
    queues = Queues([Ordered((0,), "sms", (), 1)])
    with queues.call(torch.device("cpu")), queues.task(0):
        assert not queues.streams and at_most(4) == 4
    assert queues.keep(torch.zeros(1)) is not None and not queues.alive
