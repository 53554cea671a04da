"""The watch of exchanges on GPUs: what ends in time is forgotten, what does not is told once; memory of a group."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.devices import SMALL, inputs
from benchmarks.links import LLAMA
from cascade.backends.distributed import watch
from cascade.backends.distributed.machine import node
from cascade.backends.distributed.plan import plan, plan_json
from cascade.backends.distributed.symmetric import LARGEST, Symmetric, symmetric
from cascade.backends.distributed.watch import SHARE, Watch
from cascade.distributed import load
from tests.ranks import SECONDS, start


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


@pytest.mark.skipif(torch.cuda.device_count() < 1, reason="needs a GPU")
def test_a_group_of_one_sums_to_itself() -> None:
    assert _processes(1, alone) == ["None True True"]


def alone(rank: int, path: Path) -> None:
    """Sums of one member."""
    assert dist.group.WORLD is not None
    made = symmetric(dist.group.WORLD, torch.device("cuda", rank))
    given = [torch.randn(64, 24, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    path.write_text(" ".join(map(str, (made.why, *(torch.equal(made.summed(one), one) for one in given)))))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_rank_that_is_gone_is_named_on_gpus() -> None:
    """The host of rank 0 has long launched everything: what its device waits for is told before torch ends it."""
    found, none = _processes(2, gone)
    assert found.startswith("error[C349]: rank 0: the collective 'all-reduce") and "rank 1 has not come to it" in found
    assert none == ""


def gone(rank: int, path: Path) -> None:
    """A call of both ranks, then one of rank 0 alone."""
    base = dataclasses.replace(node("h200x8"), name="here", devices=2, fused={}, stores=None, awaits=False)
    source, sizes = LLAMA.cascade(2), {"T": 96, **SMALL}
    loaded = load(plan_json(plan(source, sizes, base)), timeout_s=SECONDS, kernels=True)
    tensors = inputs(source, sizes, torch.device("cuda", rank))
    loaded(**tensors)
    torch.cuda.synchronize()
    dist.barrier()
    if rank == 1:
        os._exit(0)

    def tell(text: str) -> None:
        path.write_text(text)
        os._exit(0)

    assert loaded.watch is not None
    loaded.watch.tell = tell
    loaded(**tensors)
    torch.cuda.synchronize()


def _processes(world: int, work: Callable[[int, Path], None]) -> list[str]:
    """What a process of each GPU wrote."""
    with tempfile.TemporaryDirectory() as folder:
        spawned = mp.get_context("spawn")
        started = [spawned.Process(target=_process, args=(rank, world, folder, work)) for rank in range(world)]
        for process in started:
            process.start()
        for process in started:
            process.join(6 * SECONDS)
            process.kill()
        paths = [Path(folder, str(rank)) for rank in range(world)]
        return [path.read_text() if path.exists() else "" for path in paths]


def _process(rank: int, world: int, folder: str, work: Callable[[int, Path], None]) -> None:
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", f"file://{folder}/store", rank=rank, world_size=world)
    work(rank, Path(folder, str(rank)))


def test_a_sum_goes_through_it_by_type_and_size_alone() -> None:
    made = Symmetric("g", torch.empty(LARGEST, dtype=torch.uint8))
    taken = torch.empty(64, 8, dtype=torch.bfloat16)
    assert made.takes(taken) and made.takes(taken.mT) and made.takes(torch.empty(LARGEST // 4))
    for other in (torch.empty(0), torch.empty(1 + LARGEST // 4), torch.empty(3), torch.empty(8, dtype=torch.float64)):
        assert not made.takes(other)
    assert not Symmetric("g", None, "no").takes(taken)
