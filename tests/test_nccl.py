"""Plans on GPUs over NCCL: sums through shared memory, a rank that is gone, partial results that go round a ring.

They need GPUs, and are skipped where there are too few.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.devices import SMALL, inputs
from benchmarks.links import LLAMA
from benchmarks.timing import captured
from cascade.backends.distributed.machine import Node, node
from cascade.backends.distributed.plan import plan, plan_json, plan_of
from cascade.backends.distributed.symmetric import symmetric
from cascade.distributed import load
from cascade.ir import Mesh, Shard
from cascade.passes.exchanges import by_rows, scatter_gather
from cascade.passes.shard import stated
from tests.ranks import SECONDS
from tests.test_shard import canonical

GPUS = torch.cuda.device_count()
PRODUCT = "cascade c(X[T,K], W[K,E]) -> Y[T,E] { Y[t,e] = X[t,k] * W[k,e] }"
SIZES = {"T": 2048, "K": 4096, "E": 1024}


def machine(devices: int) -> Node:
    """So many GPUs of one host."""
    return dataclasses.replace(node("h200x8"), name="here", devices=devices, fused={}, stores=None, awaits=False)


@pytest.mark.skipif(GPUS < 1, reason="needs a GPU")
def test_a_group_of_one_sums_to_itself() -> None:
    assert _processes(1, alone) == ["None True True"]


def alone(rank: int, path: Path) -> None:
    """Sums of one member."""
    assert dist.group.WORLD is not None
    made = symmetric(dist.group.WORLD, torch.device("cuda", rank))
    given = [torch.randn(64, 24, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    path.write_text(" ".join(map(str, (made.why, *(torch.equal(made.summed(one), one) for one in given)))))


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_a_rank_that_is_gone_is_named_on_gpus() -> None:
    """The host of rank 0 has long launched everything: what its device waits for is told before torch ends it."""
    found, none = _processes(2, gone)
    assert found.startswith("error[C349]: rank 0: the collective 'all-reduce") and "rank 1 has not come to it" in found
    assert none == ""


def gone(rank: int, path: Path) -> None:
    """A call of both ranks, then one of rank 0 alone."""
    source, sizes = LLAMA.cascade(2), {"T": 96, **SMALL}
    loaded = load(plan_json(plan(source, sizes, machine(2))), timeout_s=SECONDS, kernels=True)
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


@pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")
def test_partial_results_go_round() -> None:
    for told in _processes(min(GPUS, 4), ring):
        error, graph, shifts = told.split()
        assert float(error) < 1e-2 and graph == "True" and int(shifts) == min(GPUS, 4) - 1, told


def ring(rank: int, path: Path) -> None:
    """A product over a ring, by kernels: its error against float64, whether a captured call gives the same, shifts."""
    world = dist.get_world_size()
    cascade = canonical(PRODUCT, Mesh("p", world), Shard("k", "p"))
    program = scatter_gather(stated(cascade, SIZES), 1, 0)
    program = by_rows(program, 1)
    loaded = load(plan_json(plan_of(program, machine(world))), timeout_s=SECONDS, kernels=True)
    tensors = inputs(cascade, SIZES, torch.device("cuda", rank))
    found = loaded(**tensors)["Y"].clone()
    gold = tensors["X"].double() @ tensors["W"].double()
    kept: list[torch.Tensor] = []
    graph = captured(lambda: kept.append(loaded(**tensors)["Y"]))
    assert graph is not None
    graph.replay()
    torch.cuda.synchronize()
    error = float((found.double() - gold).abs().max() / gold.abs().max())
    shifts = sum(
        task["name"].startswith("shift") and "hop" in task["name"]
        for task in plan_json(plan_of(program, machine(world)))["tasks"]
    )
    path.write_text(f"{error} {torch.equal(kept[-1], found)} {shifts}")


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
