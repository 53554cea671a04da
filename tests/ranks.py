"""What one process of a group does in the tests of plans on torch.distributed, and how a group is started."""

from __future__ import annotations

import datetime
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from cascade.backends.distributed.runtime import Loaded
from cascade.compiled import Compiled
from cascade.distributed import load
from cascade.errors import CascadeError
from cascade.placed import Program
from cascade.values import Precision

SECONDS = 20  # the timeout of a group
SHORT = 3  # and of the collectives of a plan on it


def start(world: int, work: Callable[..., Any], *arguments: object) -> list[Any]:
    """What `work(rank, *arguments)` gives on every rank of a gloo group; the text of an error where it raises one."""
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_process, (world, folder, work, arguments), nprocs=world, start_method="fork")
        paths = [Path(folder, f"{rank}.pt") for rank in range(world)]
        return [torch.load(path, weights_only=False) if path.exists() else None for path in paths]


def _process(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group("gloo", f"file://{folder}/store", timeout, world, rank)
    try:
        found = work(rank, *arguments)
    except CascadeError as error:
        found = str(error)
    torch.save(found, Path(folder, f"{rank}.pt"))
    if not isinstance(found, str):
        dist.barrier()
        dist.destroy_process_group()


def run_programs(rank: int, given: Mapping[str, tuple[Program, Mapping[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """The results of some programs, their steps in order."""
    found = {}
    for name, (program, inputs) in given.items():
        loaded = Loaded(program, range(len(program.steps)), name)
        found[name] = loaded(Precision.REFERENCE, **inputs)
    return found


def run_plan(rank: int, plan: dict[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The results of a plan in the types of its inputs."""
    return load(plan)(**inputs)


def run_plans(rank: int, plans: list[dict[str, Any]]) -> None:
    """A plan of its own on every rank."""
    load(plans[rank])


def die(rank: int, program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank 1 ends before its first step, when both have loaded the plan: else rank 0 would still be making groups."""
    loaded = Loaded(program, range(len(program.steps)), "one program")
    if rank == 1:
        loaded.store.wait(["loaded by 0"])
        os._exit(0)
    loaded.store.set("loaded by 0", "")
    return loaded(Precision.REFERENCE, **inputs)


def stall(rank: int, program: Program, inputs: Mapping[str, Tensor], kernels: bool = False) -> dict[str, Tensor] | str:
    """Rank 1 lives and does not come."""
    make = Compiled if kernels else None
    loaded = Loaded(program, range(len(program.steps)), "one program", timeout_s=SHORT, make=make)
    if rank == 1:
        time.sleep(3 * SHORT)
        return "late"
    return loaded(Precision.REFERENCE, **inputs)


def run_orders(rank: int, program: Program, orders: list[list[int]]) -> None:
    """One plan, its steps in an order of its own on every rank."""
    Loaded(program, orders[rank], "one program")


def run_by_kernels(
    rank: int, given: Mapping[str, tuple[Program, Mapping[str, Tensor]]]
) -> dict[str, dict[str, Tensor]]:
    """The results of some programs, each statement a compiled cascade."""
    found = {}
    for name, (program, inputs) in given.items():
        loaded = Loaded(program, range(len(program.steps)), name, make=Compiled)
        found[name] = loaded(**inputs)
    return found


def run_kernels_of(rank: int, plan: dict[str, Any], inputs: Mapping[str, Tensor], backend: str) -> dict[str, Any]:
    """The results of the second of two calls by kernels, and how many were compiled after each."""
    loaded = load(plan, kernels=True, backend=backend)
    loaded(**inputs)
    assert loaded.executor is not None
    count = len(loaded.executor.compiled)
    return {**loaded(**inputs), "compiled": count, "compiled again": len(loaded.executor.compiled)}
