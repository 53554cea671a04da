"""The table `devices`: a layer over all GPUs of a machine as its plan has it, beside the same layer without a split.

One process a GPU. First its collectives are timed, from which the model of the machine follows; then a layer of 70B is
planned on it for some lengths and runs by kernels: as planned, in slices on streams; the same slices in one queue; and
whole, one task after the other, as a program without overlap does. All are graphs, in turns. On a CPU: two processes on
gloo.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import socket
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cascade.distributed
from benchmarks.links import LLAMA, line
from benchmarks.row import ALL_WRONG
from benchmarks.table import Table
from benchmarks.timing import events_around
from cascade.backends.distributed.machine import Fit, Node, node
from cascade.backends.distributed.plan import Plan, plan, plan_json, whole
from cascade.backends.distributed.symmetric import symmetric
from cascade.compiled import Compiled
from cascade.ir import Cascade
from cascade.placed import Kind

LENGTHS = (4096, 8192)
SMALL = {"D": 64, "H": 4, "HK": 4, "E": 16, "F": 96}
SMALL_SUMS = tuple(1 << bits for bits in (12, 14, 16, 18))  # bytes of an all-reduce
SIZES = tuple(1 << bits for bits in (20, 22, 24, 26, 27))  # bytes of all devices together
BLOCKS = (8, 16, 24)  # that an exchange may take
TURNS = 10
BAR = 0.98  # of the layer without a split: what a plan may lose


def table(device: torch.device, options: Any) -> Iterator[Table]:
    """The table, once after all rows."""
    world = torch.cuda.device_count() if device.type == "cuda" else 2
    found = Table(
        "devices", ["layer", "devices", "whole ms", "in one queue", "planned ms", "modelled", "split", "bar", "verdict"]
    )
    if world < 2:
        found.notes.append("not run: a machine of several GPUs is needed")
        yield found
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        arguments = (world, free_port(), device.type, options.tiny, options.rounds, str(path))
        torch.multiprocessing.spawn(worker, arguments, world)  # type: ignore[no-untyped-call]
        rows, node_text = torch.load(path)
    found.notes += node_text
    for row in rows:
        found.rows.append(cells(row, world, options.tiny))
        found.data.append({**row, "verdict": found.rows[-1][-1]})
        yield found


def cells(row: Mapping[str, Any], world: int, tiny: bool) -> list[str]:
    """A row of the table; small sizes reach no bar."""
    ms, us = row["ms"], row["modelled_us"]
    ratio = ms["whole"] / ms["planned"]
    verdict = "wrong" if not row["error"] <= ALL_WRONG else "-" if tiny else "pass" if ratio >= BAR else "short"
    modelled = f"{us['planned'] / 1e3:.3f} ({us['whole'] / us['planned']:.3f})"
    return [
        row["name"], str(world), f"{ms['whole']:.3f}", f"{ms['one queue']:.3f}", f"{ms['planned']:.3f} ({ratio:.3f})",
        modelled, row["split"], f"{BAR} x whole ({ratio / BAR:.3f})", verdict,
    ]  # fmt: skip


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def worker(rank: int, world: int, port: int, kind: str, tiny: bool, rounds: int, path: str) -> None:
    """One process: rank 0 writes what came out."""
    device = torch.device(kind, rank) if kind == "cuda" else torch.device("cpu")
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", rank=rank, world_size=world)
    base = dataclasses.replace(
        node("h200x8"), name="here", devices=world, fused={}, stores=None, awaits=False, host_us=0.0
    )
    machine, told = fitted(base, world, device, tiny) if kind == "cuda" else (base, [])
    rows = [layer(tokens, world, machine, device, tiny, rounds) for tokens in ((96,) if tiny else LENGTHS)]
    if rank == 0:
        torch.save((rows, told), path)
    dist.barrier()
    dist.destroy_process_group()


# --- exchanges -------------------------------------------------------------------------------------------------------


def fitted(base: Node, world: int, device: torch.device, tiny: bool) -> tuple[Node, list[str]]:
    """The machine with the collectives that were timed here; the fewest blocks within 3 % of the fastest."""
    tried = {blocks: timed_collectives(blocks, world, device, tiny) for blocks in BLOCKS}
    largest = {blocks: sum(points[-1][1] for points in found.values()) for blocks, found in tried.items()}
    blocks = next(blocks for blocks in BLOCKS if largest[blocks] <= 1.03 * min(largest.values()))
    fits, told = dict(base.fits), [f"exchanges by NCCL with at most {blocks} thread blocks: " + str(largest)]
    for kind, points in tried[blocks].items():
        latency, share = line(points)
        fits[kind] = Fit(max(0.0, latency), share)
        told.append(f"{kind.value}: {latency:.1f} us and {share:.3f} of {base.gbs:.0f} GB/s; {points}")
    told += small_sums(world, device)
    return dataclasses.replace(base, fits=fits, multicast=False, slots=blocks), told


def small_sums(world: int, device: torch.device) -> list[str]:
    """What small sums take by NCCL, and through memory that the devices share."""
    group = dist.new_group(list(range(world)))
    shared = symmetric(group, device)
    if shared.why is not None:
        return [f"no memory that devices share: {shared.why}"]
    told = []
    for size in SMALL_SUMS:
        given = torch.ones(size // 2, dtype=torch.bfloat16, device=device)
        kept = given.clone()
        if not torch.equal(shared.summed(given), given * world):
            return ["sums through shared memory are wrong"]
        library = slowest(functools.partial(dist.all_reduce, kept, group=group), device)
        own = slowest(functools.partial(shared.summed, given), device)
        told.append(f"sum of {size >> 10} KB: NCCL {1e3 * library:.1f} us, shared memory {1e3 * own:.1f} us")
    return told


def timed_collectives(
    blocks: int, world: int, device: torch.device, tiny: bool
) -> dict[Kind, list[tuple[float, float]]]:
    """Bytes that a device moves and microseconds, by kind, of groups that take so many blocks."""
    options = dist.ProcessGroupNCCL.Options()
    options.config.max_ctas = blocks
    group = dist.new_group(list(range(world)), pg_options=options)
    found: dict[Kind, list[tuple[float, float]]] = {}
    for kind in (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER, Kind.ALL_GATHER):
        for size in SIZES[:1] if tiny else SIZES:
            whole_one = torch.zeros(size // 2, dtype=torch.bfloat16, device=device)
            part = torch.zeros(size // 2 // world, dtype=torch.bfloat16, device=device)
            run: dict[Kind, Callable[[], Any]] = {
                Kind.ALL_REDUCE: functools.partial(dist.all_reduce, whole_one, group=group),
                Kind.REDUCE_SCATTER: functools.partial(dist.reduce_scatter_tensor, part, whole_one, group=group),
                Kind.ALL_GATHER: functools.partial(dist.all_gather_into_tensor, whole_one, part, group=group),
            }
            share = (world - 1) / world * (2 if kind is Kind.ALL_REDUCE else 1)
            found.setdefault(kind, []).append((size * share, 1e3 * slowest(run[kind], device)))
    return found


def slowest(run: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one of some calls in a row, on the rank that takes longest."""
    for _ in range(3):
        run()
    dist.barrier()
    torch.cuda.synchronize()
    ms = torch.tensor(events_around(lambda: [run() for _ in range(TURNS)]) / TURNS, device=device)
    dist.all_reduce(ms, dist.ReduceOp.MAX)
    return float(ms)


# --- layers ----------------------------------------------------------------------------------------------------------


def layer(tokens: int, world: int, machine: Node, device: torch.device, tiny: bool, rounds: int) -> dict[str, Any]:
    """One length: planned once for all ranks, run in three ways, compared with the layer on one device."""
    sizes = {"T": tokens, **(SMALL if tiny else LLAMA.sizes)}
    source = LLAMA.cascade(world)
    made: list[Any] = [None]
    if dist.get_rank() == 0:
        both = plan(source, sizes, machine), whole(source, sizes, machine)
        made = [[(plan_json(one), told(one)) for one in both]]
    dist.broadcast_object_list(made)
    (planned, split), (apart, alone) = made[0]
    tensors = inputs(source, sizes, device)
    load = functools.partial(cascade.distributed.load, kernels=True)
    runs = {"whole": load(in_one_queue(apart)), "one queue": load(in_one_queue(planned)), "planned": load(planned)}
    wanted = Compiled(source)(**tensors)
    error = max(apart_from(run(**tensors)["Y"], wanted) for run in runs.values())
    calls = {name: functools.partial(run, **tensors) for name, run in runs.items()}
    ms = turns(calls, device, rounds) if device.type == "cuda" else dict.fromkeys(calls, 1.0)
    return {
        "name": f"layer of 70B, {tokens} tokens", "ms": ms, "split": split["split"], "error": error,
        "modelled_us": {"planned": split["us"], "whole": alone["us"]},
        "tasks": tasks_of(runs["planned"], planned, tensors) if device.type == "cuda" else [],
    }  # fmt: skip


def told(found: Plan) -> dict[str, Any]:
    """What the model says of a plan."""
    cuts = ", ".join(map(str, found.cut.cuts))
    return {"us": found.timetable.makespan_us, "split": f"{found.rank} at {cuts}" if cuts else "none"}


def in_one_queue(made: Mapping[str, Any]) -> dict[str, Any]:
    """The plan with its tasks one after the other, each with all multiprocessors."""
    return {
        **made,
        "tasks": [{**task, "resource": "sms", "waits": [], "sms": None} for task in made["tasks"]],
        "otherwise": None,
    }


def inputs(source: Cascade, sizes: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """The same on every rank: activations of about 1, weights by the width that they sum over."""
    generator = torch.Generator(device).manual_seed(0)
    found = {}
    for param in source.params:
        shape = [sizes[extent] if isinstance(extent, str) else extent for extent in param.shape]
        drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        scale = (
            (shape[-1] if param.name != "Wo" else shape[-1] * shape[-2]) ** -0.5 if param.name.startswith("W") else 1.0
        )
        found[param.name] = (drawn * scale).to(torch.bfloat16 if device.type == "cuda" else torch.float32)
    return found


def apart_from(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest element."""
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())


def turns(calls: Mapping[str, Callable[[], Any]], device: torch.device, rounds: int) -> dict[str, float]:
    """The median milliseconds of each, as graphs, in turns, on the slowest rank."""
    ready: dict[str, Callable[[], Any]] = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        dist.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        ready[name] = graph.replay
        ready[name]()
    samples: dict[str, list[float]] = {name: [] for name in ready}
    for _ in range(rounds):
        for name, call in ready.items():
            samples[name].append(slowest(call, device))
    return {name: statistics.median(found) for name, found in samples.items()}


def tasks_of(run: Any, made: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> list[dict[str, Any]]:
    """When every task of a call began and ended on this rank, beside what the plan has it: microseconds."""
    queues = run.executor.queues
    queues.timed = True
    for _ in range(3):
        torch.cuda.synchronize()
        dist.barrier()
        run(**tensors)
    spans = queues.spans()
    queues.timed = False
    return [
        {
            "name": task["name"],
            "mode": task["mode"],
            "us": end - start,
            "modelled_us": task["end"] - task["start"],
            "at": start,
        }
        for task, (start, end) in zip(made["tasks"], spans, strict=True)
    ]
