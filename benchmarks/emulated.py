"""The table `emulated`: the program of a plan on one GPU, its exchanges copies to the host that take as long.

What a device computes in a layer over eight runs by its kernels, in the plan's queues; what the links do is done by a
copy engine, which leaves the multiprocessors alone, as the model of this machine has it. Two predictions stand beside
the stopwatch: the plan replayed with the times that its tasks take here one after the other, and the plan as modelled.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from benchmarks.devices import inputs, told
from benchmarks.links import LLAMA
from benchmarks.row import release
from benchmarks.table import Table
from benchmarks.timing import Budget, events_around, measure
from cascade.backends.distributed.execute import Executor, Part
from cascade.backends.distributed.kernels import Clock
from cascade.backends.distributed.local import Piece
from cascade.backends.distributed.machine import Node, node
from cascade.backends.distributed.plan import Plan, plan, plan_json
from cascade.backends.distributed.runtime import ordered
from cascade.backends.distributed.streams import Ordered
from cascade.compiled import Compiled
from cascade.placed import REDUCING, Collective, Program, onward, stretch

LENGTHS = (4096, 8192)
SMALL = {"D": 64, "H": 8, "HK": 8, "E": 16, "F": 96}
BAR = 0.10
HOST_BYTES = 1 << 28


def table(device: torch.device, options: Any) -> Iterator[Table]:
    """The table, once after every length."""
    columns = [
        "tokens",
        "one after the other ms",
        "planned ms",
        "replayed ms",
        "off",
        "modelled ms",
        "split",
        "bar",
        "verdict",
    ]
    found = Table("emulated", columns)
    machine = dataclasses.replace(node("h200x8"), slots=0, fused={}, stores=None, awaits=False, host_us=0.0)
    link = Link(device)
    found.notes.append(
        f"the copy engine moves {link.rate / 1e3:.1f} GB/s to the host, {link.latency_us:.1f} us at least"
    )
    for tokens in (96,) if options.tiny else LENGTHS:
        sizes = {"T": tokens, **(SMALL if options.tiny else LLAMA.sizes)}
        row = measured(plan(LLAMA.cascade(8), sizes, machine), machine, sizes, link, options)
        off = row["planned"] / row["replayed"] - 1
        verdict = "-" if options.tiny else "pass" if abs(off) <= BAR else "short"
        found.rows.append([
            str(tokens), *(f"{row[name]:.3f}" for name in ("serial", "planned", "replayed")), f"{100 * off:+.1f} %",
            f"{row['modelled']:.3f}", row["split"], f"within {100 * BAR:g} %", verdict,
        ])  # fmt: skip
        found.data.append({"name": f"emulated {tokens}", **row, "verdict": verdict})
        yield found


class Link:
    """A copy engine that stands for links: how many bytes it moves in a time."""

    def __init__(self, device: torch.device) -> None:
        size = HOST_BYTES if device.type == "cuda" else 1 << 12
        self.source = torch.zeros(size, dtype=torch.uint8, device=device)
        self.host = torch.zeros(size, dtype=torch.uint8)
        self.latency_us, self.rate = 0.0, 1e4  # bytes a microsecond
        if device.type == "cuda":  # registered, not pinned by torch, which cannot keep track of copies in a graph
            runtime: Any = torch.cuda.cudart()
            assert not int(runtime.cudaHostRegister(self.host.data_ptr(), size, 0)), "host memory can be registered"
            few, many = (1e3 * min(events_around(lambda n=n: self.move(n)) for _ in range(5)) for n in (1 << 12, size))
            self.latency_us, self.rate = few, (size - (1 << 12)) / (many - few)

    def move(self, size: int) -> None:
        """Copies so many bytes in the current stream."""
        self.host[:size].copy_(self.source[:size], non_blocking=True)

    def take(self, us: float) -> None:
        """Is busy for a time."""
        self.move(max(1, min(len(self.host), int((us - self.latency_us) * self.rate))))


class Emulated(Executor):
    """One rank alone: what others would give is not there, only the time that it takes."""

    def __init__(self, program: Program, tasks: Sequence[Ordered], machine: Node, link: Link) -> None:
        super().__init__(program, tasks, 0, {}, Compiled, lambda step, members, run: run())
        self.clock, self.link = Clock.of(program, machine), link

    def _exchange(self, step: Collective) -> None:
        devices = self.program.devices(step.axes)
        if not step.arrived:
            self.link.take(self.clock.collective_us(step))
        if step.passes:
            for box in self._stretches(step, onward(0, step.hop, devices)[0], devices):
                part = self._passed(step, box)
                if step.arrived:
                    self._keep(part)
        if step.kind not in REDUCING:
            return
        at = {dim: (low, high) for dim, low, high in step.at}
        waiting = self.parts.get(step.tensor, [])
        for part in [p for p in waiting if all(p.piece.box[dim] == window for dim, window in at.items())]:
            waiting.remove(part)
            box, value = part.piece.box, part.value
            if step.target is not None:
                low, high = stretch(box[step.target], 0, devices)
                value = value.narrow(step.target, low - box[step.target][0], high - low)
                box = (*box[: step.target], (low, high), *box[step.target + 1 :])
            piece = Piece(part.piece.name, step.tensor, box, part.piece.reducer, part.piece.cut)
            self._keep(Part(piece, value, part.steps, part.axes | set(step.axes)))

    def _whole(self, name: str) -> Tensor:
        return self.buffers[name]


def measured(found: Plan, machine: Node, sizes: Mapping[str, int], link: Link, options: Any) -> dict[str, Any]:
    """Milliseconds: as planned, one after the other, replayed with the times of the tasks here, and as modelled."""
    made = plan_json(found)
    tasks = ordered(made["tasks"])
    tensors = inputs(found.program.cascade, sizes, link.source.device)
    alone = [dataclasses.replace(task, queue="", waits=(), sms=None) for task in tasks]
    first = Emulated(found.program, alone, machine, link)
    ends = [0.0]
    for count in range(1, len(tasks) + 1):  # a task takes what one more of them takes longer
        some = Emulated(found.program, alone[:count], machine, link)
        some.compiled = first.compiled
        ends.append(median_ms(some, tensors, options))
    took = [max(0.0, end - start) for start, end in pairwise(ends)]
    return {
        "planned": median_ms(Emulated(found.program, tasks, machine, link), tensors, options),
        "serial": ends[-1], "replayed": replayed(tasks, took),
        "modelled": told(found)["us"] / 1e3, "split": told(found)["split"],
        "tasks": [
            {"name": task["name"], "ms": own, "modelled_ms": (task["end"] - task["start"]) / 1e3}
            for task, own in zip(made["tasks"], took, strict=True)
        ],
    }  # fmt: skip


def median_ms(run: Executor, tensors: Mapping[str, Tensor], options: Any) -> float:
    """The time of a program as a graph, in which no task waits for the host; its memory is given back."""
    device = next(iter(tensors.values())).device
    ready: Callable[[], Any] = functools.partial(run, dict(tensors))
    if device.type == "cuda":
        ready()
        run.buffers.clear()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(dict(tensors))
        ready = graph.replay
    ms, failed = measure({"it": [ready]}, device, Budget(options.rounds, options.seconds))
    assert not failed, failed
    run.buffers.clear()
    release(device)
    return ms["it"]


def replayed(tasks: Sequence[Ordered], took: Sequence[float]) -> float:
    """When the last task ends, where each starts behind what is before it in its queue and what it waits for."""
    ends: list[float] = []
    queues: dict[str, float] = {}
    for task, own in zip(tasks, took, strict=True):
        start = max([queues.get(task.queue, 0.0), *(ends[other] for other in task.waits)])
        ends.append(start + own)
        queues[task.queue] = ends[-1]
    return max(ends)
