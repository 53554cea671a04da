"""The watch of exchanges on GPUs: what ends in time is forgotten, what does not is told once; memory of a group."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cascade.backends.distributed import watch
from cascade.backends.distributed.symmetric import LARGEST, Symmetric, symmetric
from cascade.backends.distributed.watch import SHARE, Watch
from tests.ranks import start


@dataclass
class Event:
    """Work on a device that is not there."""

    ended: bool = False

    def query(self) -> bool:
        return self.ended


def watching(timeout_s: float) -> tuple[Watch, list[str]]:
    """A watch that no thread looks after, and what it told."""
    told: list[str] = []
    made = Watch(timeout_s, told.append)
    made.thread = watch.threading.current_thread()
    return made, told


def test_what_ends_in_time_is_forgotten() -> None:
    made, told = watching(0.0)
    made.add(Event(ended=True), lambda: "never")
    assert made.look() and not made.pending and not told


def test_the_first_that_does_not_end_is_told_once() -> None:
    made, told = watching(0.02)
    events = [Event(), Event()]
    for number, event in enumerate(events):
        made.add(event, lambda number=number: f"exchange {number}")
    assert made.look() and not told, "there is time left"
    time.sleep(0.02 * SHARE)
    assert not made.look() and told == ["exchange 0"]
    events[0].ended = True
    assert not made.look() and told == ["exchange 0", "exchange 1"] and len(made.pending) == 1


def test_devices_without_shared_memory_say_so() -> None:
    assert start(2, refusal) == ["devices of type cpu have none"] * 2


def refusal(rank: int) -> str | None:
    """Why this rank has no memory that others see."""
    assert dist.group.WORLD is not None
    return symmetric(dist.group.WORLD, torch.device("cpu")).why


def test_a_sum_goes_through_it_by_type_and_size_alone() -> None:
    made = Symmetric("g", torch.empty(LARGEST, dtype=torch.uint8))
    taken = torch.empty(64, 8, dtype=torch.bfloat16)
    assert made.takes(taken) and made.takes(taken.mT) and made.takes(torch.empty(LARGEST // 4))
    for other in (torch.empty(0), torch.empty(1 + LARGEST // 4), torch.empty(3), torch.empty(8, dtype=torch.float64)):
        assert not made.takes(other)
    assert not Symmetric("g", None, "no").takes(taken)
