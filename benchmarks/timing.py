"""Milliseconds: medians over rounds in which every contender takes its turn, because clocks drift.

On CUDA a sample is timed by events around enough launches to fill some milliseconds. What runs for less than a
millisecond is captured in a graph, so that gaps between launches are not measured. Launches rotate over several sets
of inputs that together exceed the cache.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

Call = Callable[[], Any]

SAMPLE_MS = 10.0
GRAPH_BELOW_MS = 1.0
ESTIMATES = 3
MOST_LAUNCHES = 256
CACHES = 4  # rotated inputs exceed the cache so many times
MOST_SETS = 32
FEWEST_ROUNDS = 3


@dataclass
class Budget:
    """How long measurements may go on: `rounds` each, and none beyond the fewest once `seconds` have passed."""

    rounds: int
    seconds: float
    started: float = field(default_factory=time.monotonic)

    def spent(self) -> bool:
        """Whether the time is over."""
        return time.monotonic() - self.started > self.seconds


def input_sets(device: torch.device, bytes_of_one: int) -> int:
    """How many sets of inputs are rotated: 1 where one set exceeds the cache often enough."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(MOST_SETS, -(-CACHES * cache // max(1, bytes_of_one))))


def measure(
    contenders: Mapping[str, Sequence[Call]], device: torch.device, budget: Budget
) -> tuple[dict[str, float], dict[str, str]]:
    """The median milliseconds of each contender, and why one could not be timed.

    A contender is a list of calls that do the same on different inputs.
    """
    samplers: dict[str, Callable[[], float]] = {}
    failures: dict[str, str] = {}
    for name, calls in contenders.items():
        try:
            samplers[name] = cuda_sampler(calls) if device.type == "cuda" else host_sampler(calls)
        except Exception as error:  # a contender that fails is a line of the table
            failures[name] = reason(error)
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    for done in range(budget.rounds):
        if done >= FEWEST_ROUNDS and budget.spent():
            break
        for name, sample in samplers.items():
            if name not in failures:
                try:
                    samples[name].append(sample())
                except Exception as error:
                    failures[name] = reason(error)
    medians = {name: statistics.median(found) for name, found in samples.items() if name not in failures}
    return medians, failures


def host_sampler(calls: Sequence[Call]) -> Callable[[], float]:
    """Samples of milliseconds by the clock of the host, for results that are there when a call returns."""
    for call in calls:
        call()

    def sample() -> float:
        started = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - started) * 1e3 / len(calls)

    return sample


def cuda_sampler(calls: Sequence[Call]) -> Callable[[], float]:
    """Samples of milliseconds by events of the device."""
    for call in calls:
        call()

    def run(turns: int) -> None:
        for _ in range(turns):
            for call in calls:
                call()

    estimate = min(events_around(lambda: run(1)) for _ in range(ESTIMATES)) / len(calls)  # a slow host is slow at times
    wanted = min(MOST_LAUNCHES, max(1, round(SAMPLE_MS / max(estimate, 1e-3))))
    turns = max(1, round(wanted / len(calls)))
    launches = turns * len(calls)
    graph = captured(lambda: run(turns)) if estimate < GRAPH_BELOW_MS else None
    if graph is None:
        return lambda: events_around(lambda: run(turns)) / launches
    graph.replay()
    return lambda: events_around(graph.replay) / launches


def captured(run: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
    """A graph of what this launches; None where it cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()  # raises if the device is lost; a refused capture is timed by events alone
        return None
    return graph


def events_around(run: Call) -> float:
    """The milliseconds of the device between the first and the last launch."""
    make: Any = torch.cuda.Event
    start, stop = make(enable_timing=True), make(enable_timing=True)
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop))


def copy_rate(device: torch.device, budget: Budget, size: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a copy within the memory of the device."""
    if device.type != "cuda":
        size = 1 << 20
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    for _ in range(20):  # the clocks come up
        target.copy_(source)
    ways: dict[str, Sequence[Call]] = {
        "copy": [lambda: target.copy_(source)],
        "kernel": [lambda: torch.neg(source, out=target)],
    }
    medians, _ = measure(ways, device, budget)
    return 2 * size / (min(medians.values()) * 1e-3)


def reason(error: BaseException) -> str:
    """Why something failed, in one line."""
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {' '.join(lines[:2]) or 'no message'}"
    return text if len(text) <= 200 else text[:197] + "..."
