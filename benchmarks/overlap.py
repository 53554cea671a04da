"""The table `overlap`: what memory bounds beside what products bound on one GPU, as plans for one device have it.

Two cascades are planned: a product beside the attention of decodes that does not need it, and a layer of a decode,
whose sequences the plan cuts in two. Each runs by kernels in these ways, in turns: whole, one task after the other on
all SMs; in the slices of the plan in one queue; on streams that are confined to sides of the device. `planned` is what
a loaded plan runs: the faster of the first and the last, which it found out at its first call. What they give is
compared with what the cascade gives that is compiled as a whole. Before that, what so many confined SMs reach is
measured: of a copy, of the attention and of a product, alone and beside each other, from which the figures of the model
follow.
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cascade.distributed
from benchmarks.devices import apart_from, in_one_queue, inputs
from benchmarks.row import ALL_WRONG, release, synchronise
from benchmarks.table import Table
from benchmarks.timing import Budget, captured, events_around, reason
from cascade.backends.distributed.confined import confined, sides
from cascade.backends.distributed.machine import Node, alone, node
from cascade.backends.distributed.plan import Plan, plan, plan_json, whole
from cascade.backends.share import within
from cascade.backends.triton.machine import machine_for
from cascade.compiled import Compiled
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade
from cascade.passes.canonicalize import Canonicalize
from cascade.pipeline import run_pipeline

EXAMPLES = Path(__file__).parents[1] / "examples"
LEAST = 0.98  # of the serial program: what a plan may lose
TURNS = 10
CONFINED = (8, 16, 32, 64, 96)
BESIDE = (64, 72, 80, 96)  # SMs of products; the others read
LONG = 0.4  # seconds that work lasts whose clock and power are asked for
COPIED = 1 << 30  # bytes
PRODUCT = "cascade product(X[M,K], W[N,K]) -> Y[M,N] { Y[m,n] = X[m,k] * W[n,k] }"
DECODE = """cascade decode(Q[B,H,E], K[B,HK,N,E], V[B,HK,N,E]) -> U[B,H,E] {
    S[b,h,n] = Q[b,h,e] * K[b,h*HK//H,n,e] / sqrt(E)
    P[b,h,n] = softmax[n] S[b,h,n]
    U[b,h,e] = P[b,h,n] * V[b,h*HK//H,n,e]
}"""


@dataclass(frozen=True)
class Case:
    """A cascade: its file, its sizes, small ones, and how many times as fast as in series its plan is to be."""

    file: str
    sizes: Mapping[str, int]
    tiny: Mapping[str, int]
    bar: float


CASES = {
    "product beside decode": Case(
        "product_beside_decode",
        {"T": 4096, "D": 4096, "F": 8192, "B": 64, "H": 32, "HK": 8, "N": 8192, "E": 128},
        {"T": 16, "D": 32, "F": 16, "B": 2, "H": 4, "HK": 2, "N": 32, "E": 16},
        1.15,
    ),
    "layer of a decode": Case(
        "decode_layer",
        {"B": 2048, "N": 512, "D": 4096, "H": 32, "HK": 8, "E": 128, "F": 14336},
        {"B": 8, "N": 32, "D": 32, "H": 4, "HK": 2, "E": 16, "F": 48},
        1.05,
    ),
}


def table(device: torch.device, options: Any) -> Iterator[Table]:
    """The table, once after every row."""
    columns = ["cascade", "whole ms", "in one queue", "beside ms", "planned ms", "modelled", "plan", "bar", "verdict"]
    found = Table("overlap", columns)
    found.notes.append(
        "In brackets: how many times as fast as whole, measured and modelled. Medians of CUDA graphs in turns."
    )
    budget = Budget(options.rounds, options.seconds)
    machine = here(device)
    try:
        rates(found, machine, device, options.tiny)
    except Exception as error:
        found.notes.append(f"confined SMs: {reason(error)}")
    for title, case in CASES.items():
        if options.only not in title:
            continue
        try:
            row(found, title, case, machine, device, options, budget)
        except Exception as error:
            found.rows.append([title, "failed", *[""] * 6, "failed"])
            found.notes.append(f"{title}: {reason(error)}")
            found.data.append({"name": title, "failed": reason(error), "verdict": "failed"})
        release(device)
        yield found


def here(device: torch.device) -> Node:
    """The machine of the device; without a GPU, the one that is planned for."""
    if device.type != "cuda":
        return node("h200")
    return alone(machine_for(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)))


# --- cascades --------------------------------------------------------------------------------------------------------


def row(
    found: Table, title: str, case: Case, machine: Node, device: torch.device, options: Any, budget: Budget
) -> None:
    """One cascade: planned, run in three ways, compared."""
    text = (EXAMPLES / f"{case.file}.cascade").read_text(encoding="utf-8")
    source = run_pipeline(parse_cascade(text, case.file), Canonicalize.name).final
    sizes = case.tiny if options.tiny else case.sizes
    made, apart = plan(source, sizes, machine), whole(source, sizes, machine)
    tensors = given(source, sizes, device)
    load = functools.partial(cascade.distributed.load, kernels=True, effort=options.effort)
    planned = plan_json(made)
    runs: dict[str, Any] = {
        "whole": load(plan_json(apart)), "one queue": load(in_one_queue(planned)),
        "beside": load({**planned, "otherwise": None}), "planned": load(planned),
    }  # fmt: skip
    calls: dict[str, Callable[[], Any]] = {name: functools.partial(run, **tensors) for name, run in runs.items()}
    error = wrong(calls, source, tensors)
    eager, ms = turns(calls, device, budget)
    ratio, modelled = ms["whole"] / ms["planned"], made.serial_us / made.timetable.makespan_us
    verdict = "wrong" if not error <= ALL_WRONG else "-" if options.tiny else judged(ratio, case.bar)
    found.rows.append([
        title, *(f"{ms[way]:.3f}" for way in ("whole", "one queue", "beside")), f"{ms['planned']:.3f} ({ratio:.3f})",
        f"{made.timetable.makespan_us / 1e3:.3f} ({modelled:.3f})", told(made),
        f"{case.bar} x whole ({ratio / case.bar:.3f})", verdict,
    ])  # fmt: skip
    found.data.append({
        "name": title, "ms": ms, "eager_ms": eager, "error": error, "verdict": verdict, "sizes": dict(sizes),
        "modelled_us": {"planned": made.timetable.makespan_us, "whole": made.serial_us}, "plan": told(made),
        "tasks": spans(runs["beside"], planned, tensors, device),
        "whole_tasks": spans(runs["whole"], plan_json(apart), tensors, device),
    })  # fmt: skip
    if runs["planned"].why:
        found.notes.append(f"{title} runs {runs['planned'].why}")
    if made.cut.declined:
        found.notes.append(f"{title}: {made.cut.declined}")
    if eager != ms:
        found.notes.append(
            f"{title}, launched one by one: " + ", ".join(f"{who} {one:.3f} ms" for who, one in eager.items())
        )
    if verdict == "failed":
        found.notes.append(f"{title}: planned it is slower than {LEAST} x whole allows")


def given(source: Cascade, sizes: Mapping[str, int], device: torch.device) -> dict[str, Tensor]:
    """Tensors of about 1, weights by the width that they sum over; lengths are whole."""
    lengths = {param.name for param in source.params if param.name == "len"}
    drawn = inputs(source, sizes, device)
    return {
        name: torch.full_like(value, sizes["N"], dtype=torch.int32) if name in lengths else value
        for name, value in drawn.items()
    }


def wrong(calls: Mapping[str, Callable[[], Any]], source: Cascade, tensors: Mapping[str, Tensor]) -> float:
    """The largest error of any way to run it, against the cascade compiled as a whole."""
    made = Compiled(source)(**tensors)
    names = [result.name for result in source.results]
    wanted = dict(zip(names, made if isinstance(made, tuple) else (made,), strict=True))
    return max(apart_from(call()[name], wanted[name]) for call in calls.values() for name in names)


def judged(ratio: float, bar: float) -> str:
    """What a ratio comes to."""
    return "pass" if ratio >= bar else "short" if ratio >= LEAST else "failed"


def told(made: Plan) -> str:
    """What was decided, in short."""
    if made.way.first is None:
        return "one queue"
    sides = f"{made.way.first} + {made.node.gpu.sms - made.way.first} SMs"
    return f"{made.rank} at {', '.join(map(str, made.cut.cuts))}, {sides}" if made.cut.cuts else sides


def turns(
    calls: Mapping[str, Callable[[], Any]], device: torch.device, budget: Budget
) -> tuple[dict[str, float], dict[str, float]]:
    """The median milliseconds of each, in turns: of calls in a row, and of graphs."""
    for call in calls.values():
        for _ in range(2):
            call()
    if device.type != "cuda":
        plain = medians(calls, device, budget)
        return plain, plain
    graphs = {name: captured(call) for name, call in calls.items()}
    missing = [name for name, graph in graphs.items() if graph is None]
    if missing:
        raise RuntimeError(f"{missing[0]} cannot be captured in a graph")
    replays = {name: graph.replay for name, graph in graphs.items() if graph is not None}
    ms = medians(replays, device, budget)
    return medians(calls, device, Budget(3, 0.0)), ms


def medians(calls: Mapping[str, Callable[[], Any]], device: torch.device, budget: Budget) -> dict[str, float]:
    """The median milliseconds of each, in turns."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(budget.rounds):
        if done >= 3 and budget.spent():
            break
        for name, call in calls.items():
            samples[name].append(timed(call, device))
    return {name: statistics.median(taken) for name, taken in samples.items()}


def timed(call: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one of some calls in a row; on a CPU nothing is measured."""
    if device.type != "cuda":
        call()
        return 1.0
    call()
    return events_around(lambda: [call() for _ in range(TURNS)]) / TURNS


def spans(run: Any, made: Mapping[str, Any], tensors: Mapping[str, Tensor], device: torch.device) -> list[Any]:
    """When every task of a call began and ended, beside what the plan has it: microseconds."""
    if device.type != "cuda":
        return []
    run.executor.queues.timed = True
    for _ in range(3):
        run(**tensors)
    found = run.executor.queues.spans()
    run.executor.queues.timed = False
    keys = ("name", "mode", "resource", "sms")
    return [
        {**{key: task[key] for key in keys}, "us": end - start, "at": start, "modelled_us": task["end"] - task["start"]}
        for task, (start, end) in zip(made["tasks"], found, strict=True)
    ]


# --- what confined SMs reach -----------------------------------------------------------------------------------------


def rates(found: Table, machine: Node, device: torch.device, tiny: bool) -> None:
    """Notes of what so many SMs reach, and the same as data."""
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    size = 1 << 12 if tiny else COPIED
    copied = torch.zeros(size // kind.itemsize, dtype=kind, device=device)
    target = torch.empty_like(copied)
    extents = (16, 16, 16) if tiny else (4096, 4096, 8192)
    b, h, n, e = (2, 2, 32, 16) if tiny else (64, 8, 4096, 128)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=kind, device=device)

    product = {"X": drawn(extents[0], extents[1]), "W": drawn(extents[2], extents[1])}
    decode = {"Q": drawn(b, 4 * h, e), "K": drawn(b, h, n, e), "V": drawn(b, h, n, e)}
    flops = 2.0 * extents[0] * extents[1] * extents[2]
    for sms in (*CONFINED[: 1 if tiny else None], machine.gpu.sms):
        ways: dict[str, tuple[Callable[[], Any], float]] = {
            "copy": (lambda: target.copy_(copied), 2.0 * size),
            "decode": (functools.partial(compiled(DECODE), **decode), 2.0 * kind.itemsize * b * h * n * e),
            "product": (functools.partial(compiled(PRODUCT), **product), flops),
        }
        got, why, ms = on_some(sms, machine, ways, device)
        figures = {name: work / ms[name] / 1e9 for name, (_, work) in ways.items()}
        found.notes.append(
            f"{got} SMs: copy {figures['copy']:.3f} TB/s ({1e3 * figures['copy'] / got:.1f} GB/s an SM), decode "
            f"{figures['decode']:.3f} TB/s ({1e3 * figures['decode'] / got:.1f} GB/s an SM), product "
            f"{figures['product']:.1f} TFLOP/s ({1e3 * figures['product'] / got:.0f} GFLOP/s an SM)"
            + (f"; {why}" if why else "")
        )
        found.data.append({"name": f"{sms} SMs", "sms": got, "why": why, **figures, "verdict": "-"})
        if sms == machine.gpu.sms:
            found.notes += [f"{name} alone, on all SMs: {clock(call, device)}" for name, (call, _) in ways.items()]
    for first in BESIDE if device.type == "cuda" else ():
        told = beside(first, {name: ways[name] for name in ("product", "decode")}, device)
        found.notes.append(told)
    supposed = machine.bandwidth_tbs(1) * 1e3
    found.notes.append(f"The model supposes {supposed:.1f} GB/s an SM, {machine.gpu.bandwidth_tbs} TB/s at most.")


def compiled(text: str) -> Compiled:
    """Compiled anew, as tasks of plans are: kernels whose programs stay have the grid of their first launch."""
    return Compiled(parse_cascade(text, "overlap"), effort="none")


def on_some(
    sms: int, machine: Node, ways: Mapping[str, tuple[Callable[[], Any], float]], device: torch.device
) -> tuple[int, str | None, dict[str, float]]:
    """On how many SMs it ran, why not on as many as asked for, the milliseconds of each."""
    if device.type != "cuda" or sms == machine.gpu.sms:
        return sms, None, {name: timed(call, device) for name, (call, _) in ways.items()}
    stream = confined(sms, device)
    found = {}
    for name, (call, _) in ways.items():
        synchronise(device)
        with torch.cuda.stream(stream), within(stream.sms):
            found[name] = timed(call, device)
        synchronise(device)
    return stream.sms, stream.why, found


def beside(first: int, ways: Mapping[str, tuple[Callable[[], Any], float]], device: torch.device) -> str:
    """What two sides of the device reach at once, each with calls of one kind that last as long as the other's."""
    streams = dict(zip(ways, sides(first, device), strict=True))
    calls = dict.fromkeys(ways, 20)
    for _ in range(3):
        took = at_once(ways, streams, calls, device)
        longest = max(took.values())
        calls = {name: max(1, round(calls[name] * longest / took[name])) for name in ways}
    took = at_once(ways, streams, calls, device)
    rate = {name: calls[name] * work / took[name] / 1e9 for name, (_, work) in ways.items()}
    sms = {name: stream.sms for name, stream in streams.items()}

    def long() -> None:
        at_once(ways, streams, calls, device, wait=False)

    return (
        f"product on {sms['product']} SMs beside decode on {sms['decode']}: {rate['product']:.1f} TFLOP/s "
        f"({1e3 * rate['product'] / sms['product']:.0f} GFLOP/s an SM), {rate['decode']:.3f} TB/s "
        f"({1e3 * rate['decode'] / sms['decode']:.1f} GB/s an SM); {clock(long, device)}"
    )


def at_once(
    ways: Mapping[str, tuple[Callable[[], Any], float]], streams: Mapping[str, Any], calls: Mapping[str, int],
    device: torch.device, wait: bool = True,
) -> dict[str, float]:  # fmt: skip
    """So many calls of each on its own stream, all at once: the milliseconds from the first to the last of each."""
    if wait:
        synchronise(device)
    spans = {}
    for name, (call, _) in ways.items():
        stream = streams[name]
        with torch.cuda.stream(stream), within(stream.sms):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            begin.record(stream)
            for _ in range(calls[name]):
                call()
            end.record(stream)
        spans[name] = begin, end
    if not wait:
        return {}
    synchronise(device)
    return {name: float(begin.elapsed_time(end)) for name, (begin, end) in spans.items()}


def clock(call: Callable[[], Any], device: torch.device) -> str:
    """Clock and power while the device does nothing but such calls, as its driver says them."""
    if device.type != "cuda":
        return ""
    synchronise(device)
    begun = time.perf_counter()
    call()
    synchronise(device)
    for _ in range(max(1, round(LONG / (time.perf_counter() - begun)))):
        call()
    asked = [
        "nvidia-smi",
        f"--id={device.index or 0}",
        "--query-gpu=clocks.sm,power.draw.instant",
        "--format=csv,noheader",
    ]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        answer = f"no clock: {reason(error)}"
    synchronise(device)
    return answer
