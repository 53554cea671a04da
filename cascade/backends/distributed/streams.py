"""The queues of a plan on one device: on CUDA a stream each, with events where a task of one waits for one of another.

A queue with exchanges has the higher priority: what others wait for starts as soon as it can. Queues of a side of the
device are streams whose kernels run on its SMs only (`confined.py`). Every queue begins behind what the caller's stream
had before the call, and the caller's stream goes on behind all of them, so that a call is as any other operation, also
where it is captured into a CUDA graph. Tensors that a task makes may be read by other queues: they are kept until the
call is over, as memory is given back to the queue that it was taken from.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from cascade.backends.distributed.beside import SIDE_QUEUES
from cascade.backends.distributed.confined import confined, sides
from cascade.backends.share import within

FIRST, LATER = -1, 0
"""Priorities of streams."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """A task where it is run: its steps, its queue, and the tasks of other queues, by place, that it waits for.

    `sms` is how many multiprocessors it may count on; all of them with None.
    """

    steps: tuple[int, ...]
    queue: str = ""
    waits: tuple[int, ...] = ()
    sms: int | None = None


@dataclass(slots=True, eq=False)
class Queues:
    """The tasks of a program in their queues; on a CPU one after the other, in the order in which they are given.

    `urgent` are the queues of exchanges. With `timed` every task is between two events: `spans` are its times.
    """

    tasks: Sequence[Ordered]
    urgent: Collection[str] = ()
    timed: bool = False
    streams: dict[str, torch.cuda.Stream] = field(init=False, default_factory=dict)
    done: dict[int, torch.cuda.Event] = field(init=False, default_factory=dict)
    begun: dict[int, torch.cuda.Event] = field(init=False, default_factory=dict)
    alive: list[torch.Tensor] = field(init=False, default_factory=list)
    start: torch.cuda.Event | None = field(init=False, default=None)

    @contextlib.contextmanager
    def call(self, device: torch.device) -> Iterator[None]:
        """All tasks of a call happen in here; what the caller's stream does next comes behind them."""
        if device.type != "cuda":
            yield
            return
        for queue in dict.fromkeys(task.queue for task in self.tasks):
            if queue not in self.streams:
                self.streams[queue] = self._stream(queue, device)
        self.done.clear()
        here = torch.cuda.current_stream(device)
        self.start = here.record_event(self._event())
        for stream in self.streams.values():
            stream.wait_event(self.start)
        yield
        for stream in self.streams.values():
            here.wait_stream(stream)
        self.alive.clear()

    @contextlib.contextmanager
    def task(self, number: int) -> Iterator[None]:
        """What is launched in here runs in the queue of a task, behind what the task waits for."""
        if not self.streams:
            yield
            return
        own = self.tasks[number]
        stream = self.streams[own.queue]
        for other in own.waits:
            stream.wait_event(self.done[other])
        if self.timed:
            self.begun[number] = stream.record_event(self._event())
        with torch.cuda.stream(stream), within(own.sms):
            yield
        self.done[number] = stream.record_event(self._event())

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor that other queues may read: it is not given back before the call is over."""
        if self.streams:
            self.alive.append(tensor)
        return tensor

    def spans(self) -> list[tuple[float, float]]:
        """When every task of the last call began and ended, in microseconds from its start; waits for the device."""
        torch.cuda.synchronize()
        assert self.timed and self.start is not None, "only a call that was timed on a device has spans"
        first = self.start
        return [
            (1000 * first.elapsed_time(self.begun[n]), 1000 * first.elapsed_time(self.done[n]))
            for n in range(len(self.tasks))
        ]

    def _stream(self, queue: str, device: torch.device) -> torch.cuda.Stream:
        """The stream of a queue; of both sides of a device by one partition."""
        own = {task.queue: task.sms for task in self.tasks if task.queue in SIDE_QUEUES and task.sms}
        if queue not in own:
            priority = FIRST if queue in self.urgent else LATER
            return torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]
        first = own.get(SIDE_QUEUES[0])
        number = SIDE_QUEUES.index(queue)
        return confined(own[queue], device, rest=True) if first is None else sides(first, device)[number]

    def _event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=self.timed)  # type: ignore[no-untyped-call]
