"""The table `model`: how good the machine model's choice of tiles is, against a stopwatch on every candidate.

For each workload of the tables attention, decode, rows and gemm the kernel that takes most of the call is planned, its
candidates are put in the model's order, and all of them are timed: first one look at each, then those that are near the
fastest and the model's first four in turns. Without a GPU the plumbing runs with times that are made up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor

from benchmarks import attention, products, reductions
from benchmarks.ours import build
from benchmarks.row import release, synchronise
from benchmarks.table import Table, cell
from benchmarks.timing import Budget, events_around, input_sets, measure, reason
from benchmarks.workload import Workload, size_of
from cascade.backends.triton.launch import Bench, KernelStep, Launcher, Step, alike, has_descriptors, layout, unset
from cascade.backends.triton.machine import Estimate, Machine, machine
from cascade.backends.triton.partition import Group, Rest
from cascade.backends.triton.planner import Planner, Tiling
from cascade.backends.triton.tune import candidates, ranked
from cascade.errors import UnsupportedError
from cascade.inference import bind_sizes

TABLES: tuple[Callable[[torch.device, Any], Iterator[Workload]], ...] = (
    attention.forward, attention.decoding, reductions.table, products.table,
)  # fmt: skip
TOP = 4  # of the model's order: the best of them
TOP_BAR = 1.05  # times the best of all, at most
WITHIN = 0.25  # of the measured time a prediction should lie
SHARE_BAR = 0.8  # of the rows
NEAR = 1.3  # times the fastest look: up to here a candidate is timed again
SHORT_MS = 0.1  # a look at shorter kernels shows the host
LOOKING = 0.7  # of a workload's time, the rest is for turns
ROUNDS = 8

Steps = Sequence[Step]


@dataclass(eq=False)
class Tried:
    """A candidate: what the model says of it, and its milliseconds or why there are none."""

    tiling: Tiling
    estimate: Estimate | None  # None where the model holds that it cannot run
    ms: float | None = None
    why: str = ""
    calls: list[Callable[[], None]] = field(default_factory=list, repr=False)

    @property
    def predicted_ms(self) -> float:
        """What the model says; infinite where it holds that this cannot run."""
        return math.inf if self.estimate is None else self.estimate.time_us / 1e3

    @property
    def text(self) -> str:
        """The tiles, warps, stages and parts, `m128 n64 w4 s2`."""
        options, parts = self.tiling.options, self.tiling.parts
        tiles = " ".join(f"{rank}{tile}" for rank, tile in self.tiling.tiles)
        return f"{tiles} w{options.num_warps} s{options.num_stages}" + (f" p{parts}" if self.tiling.shared else "")


@dataclass(eq=False)
class Subject:
    """The kernel of a call that takes most of its time by the model, its candidates, the tensors that it finds."""

    label: str
    group: Group
    order: list[Tried]
    planner: Planner
    launcher: Launcher
    bench: Bench | None  # None without a GPU
    sets: list[dict[str, Tensor]]
    memory: dict[object, Tensor] = field(default_factory=dict)  # what candidates write into, one after another

    def steps(self, tiling: Tiling) -> Steps:
        """The launches of a candidate: with it what merges a stream that is shared, and bounds that depend on data."""
        groups = self.planner.groups()
        return tuple(self.launcher.built(self.planner, self.label, self.group, groups, tiling, self.bench))

    @property
    def results(self) -> tuple[str, ...]:
        """What the kernel leaves in memory."""
        return self.planner.stored(self.group, self.planner.groups())

    def written(self, steps: Steps, device: torch.device) -> dict[str, Tensor]:
        """The tensors that these steps write, in which it shows what they leave out."""
        found = {}
        for name, shape, dtype in (item for step in steps for item in step.made):
            found[name] = self.memory.setdefault((name, shape, dtype), torch.empty(shape, dtype=dtype, device=device))
            found[name].copy_(unset(shape, dtype, device))
        return found


def table(device: torch.device, options: Any) -> Iterator[Table]:
    """The table, once after every row; each row has its share of the time that is left."""
    columns = ["workload", "timed", "best ms", "its place", "first ms", f"best of {TOP} ms", "predicted us", "verdict"]
    found = Table("model", columns)
    everything = [workload for make in TABLES for workload in make(device, options)]
    asked = [workload for workload in everything if options.only in workload.name]
    budget = Budget(min(options.rounds, ROUNDS), options.seconds)
    lost = ""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for number, workload in enumerate(asked):
            why = lost or ("not run: out of time (--seconds)" if budget.spent() else "")
            left = max(0.0, budget.seconds - (time.monotonic() - budget.started))
            try:
                if why:
                    raise RuntimeError(why)
                share = Budget(budget.rounds, left / (len(asked) - number))
                add(found, workload.name, tried(workload, device, share, pool))
                synchronise(device)
            except Exception as error:  # a line of the table
                failed = why or reason(error)
                lost = failed if isinstance(error, torch.AcceleratorError) else lost
                found.rows.append([workload.name, *["-"] * (len(columns) - 2), "failed"])
                found.data.append({"name": workload.name, "failed": failed, "verdict": "failed"})
            release(device)
            found.notes = notes(found.data, device)
            yield found


# --- one row ---------------------------------------------------------------------------------------------------------


def tried(workload: Workload, device: torch.device, budget: Budget, pool: ThreadPoolExecutor) -> Subject:
    """The main kernel of a workload with its candidates timed."""
    subject = subject_of(workload, device)
    if subject.bench is None:
        pretend(subject)
        return subject
    with torch.cuda.device(subject.bench.device):
        look(subject, budget, pool)
        turns(subject, budget)
    return subject


def subject_of(workload: Workload, device: torch.device) -> Subject:
    """Plans the call of a workload and computes what its main kernel reads; raises where no kernel computes it."""
    cascade = build(workload.text, "none", device.type).trace.final
    generator = torch.Generator(device=device).manual_seed(20)
    given = [workload.inputs(generator)]
    given += [workload.inputs(generator) for _ in range(input_sets(device, size_of(given[0])) - 1)]
    sets: list[dict[str, Tensor]] = [{param.name: one[param.name] for param in cascade.params} for one in given]
    first = sets[0]
    extents = bind_sizes(cascade, {name: tuple(tensor.shape) for name, tensor in first.items()}, {})
    layouts = {name: layout(tensor) for name, tensor in first.items()}
    planner = Planner(cascade, extents, layouts, descriptors=has_descriptors(first))
    launcher = Launcher(cascade)
    where = next(iter(first.values())).device
    bench = Bench(where, "none", first) if where.type == "cuda" else None
    steps = launcher.steps(planner, cascade.name, bench)
    if bench is None or len(planner.groups()) == 1:
        list(steps)  # what later kernels know of earlier ones' results comes from planning them
    else:
        runs = [Bench(where, "full", tensors) for tensors in sets]
        for step in steps:
            for run in runs:
                run.advance(step)
        sets = [run.tensors for run in runs]
    label, group, order = main_kernel(planner, machine("h100") if bench is None else bench.machine)
    return Subject(label, group, order, planner, launcher, bench, sets)


def main_kernel(planner: Planner, device: Machine) -> tuple[str, Group, list[Tried]]:
    """The kernel whose first choice takes longest by the model, and all its candidates in the model's order."""
    groups, name = planner.groups(), planner.cascade.name
    found: list[tuple[str, Group, list[Tried]]] = []
    why = "no statement has a kernel"
    for number, group in enumerate(groups):
        if isinstance(group, Rest):
            continue
        label = name if len(groups) == 1 else f"{name}_{number}"
        try:
            order = in_order(planner, label, group, groups, device)
        except UnsupportedError as error:
            why = reason(error)
            continue
        if order and order[0].estimate is not None:
            found.append((label, group, order))
    if not found:
        raise ValueError(why)
    return max(found, key=lambda one: one[2][0].predicted_ms)


def in_order(
    planner: Planner, label: str, group: Group, groups: Sequence[Group | Rest], device: Machine
) -> list[Tried]:
    """Every candidate in the model's order; at the end those that cannot run by the model."""
    considered = candidates(planner, group)
    order = [Tried(tiling, estimate) for tiling, estimate in ranked(planner, label, group, groups, device, considered)]
    kept = {one.tiling for one in order}
    return order + [Tried(tiling, None) for tiling in considered if tiling not in kept]


def pretend(subject: Subject) -> None:
    """Builds every candidate and takes the model at its word, but for some percent."""
    for place, one in enumerate(subject.order):
        try:
            subject.steps(one.tiling)
        except Exception as error:
            one.why = reason(error)
            continue
        one.ms = one.predicted_ms * (1.1 - 0.01 * (place % 7)) if one.estimate is not None else None
        one.why = "" if one.ms is not None else "does not fit by the model"


# --- the stopwatch ---------------------------------------------------------------------------------------------------


def look(subject: Subject, budget: Budget, pool: ThreadPoolExecutor) -> None:
    """Compiles the candidates, several at a time, then checks and times each once, in the model's order."""
    several = 2 * (os.cpu_count() or 1)
    wanted: dict[str, Tensor] = {}
    until = Budget(1, LOOKING * budget.seconds, budget.started)
    for start in range(0, len(subject.order), several):
        some = subject.order[start : start + several]
        steps = compiled(subject, some, until, pool)
        for one in some:
            if one.why:
                continue
            if until.spent() and start + some.index(one) >= TOP:
                one.why = "not timed: out of time"
                continue
            try:
                found = prepared(subject, one, steps[one])
                wanted = wanted or found
                if not all(alike(found[name], wanted[name]) for name in subject.results):
                    one.why, one.calls = "gives other results than the model's first", []
                    continue
                one.ms = events_around(functools.partial(every, one.calls)) / len(one.calls)
            except torch.AcceleratorError:
                raise
            except Exception as error:
                one.why, one.calls = reason(error), []


def compiled(subject: Subject, some: Sequence[Tried], until: Budget, pool: ThreadPoolExecutor) -> dict[Tried, Steps]:
    """The launches of these candidates, in the cache of Triton by now; one that fails says why when it is launched."""
    found: dict[Tried, Steps] = {}
    make: Any = getattr(triton, "AsyncCompileMode", None)
    mode: AbstractContextManager[Any] = nullcontext() if make is None else make(pool, ignore_errors=True)
    with mode:
        for one in some:
            if until.spent() and subject.order.index(one) >= TOP:
                one.why = "not timed: out of time"
                continue
            try:
                found[one] = subject.steps(one.tiling)
                if make is not None:
                    compile_only(found[one], subject.sets[0])
            except Exception as error:
                one.why = reason(error)
    return found


def compile_only(steps: Steps, given: Mapping[str, Tensor]) -> None:
    """Asks for the kernels of these steps, without a launch."""
    tensors, device = dict(given), next(iter(given.values())).device
    for step in (step for step in steps if isinstance(step, KernelStep)):
        tensors |= {name: torch.empty(shape, dtype=dtype, device=device) for name, shape, dtype in step.made}
        arguments, options = step.arguments(tensors)
        step.function.warmup(*arguments, grid=step.grid, **options)


def prepared(subject: Subject, one: Tried, steps: Steps) -> dict[str, Tensor]:
    """Launches a candidate on every set of inputs and keeps the calls; its results on the first, unset before."""
    assert subject.bench is not None
    written = subject.written(steps, subject.bench.device)
    found: dict[str, Tensor] = {}
    for given in subject.sets:
        tensors = {**given, **written}
        one.calls.append(functools.partial(run, steps, tensors))
        one.calls[-1]()
        found = found or {name: tensors[name].clone() for name in subject.results}
    return found


def run(steps: Steps, tensors: dict[str, Tensor]) -> None:
    """One call."""
    for step in steps:
        step(tensors)


def every(calls: Sequence[Callable[[], None]]) -> None:
    """Each call once."""
    for call in calls:
        call()


def turns(subject: Subject, budget: Budget) -> None:
    """Times again, in turns because clocks drift, what is near the fastest, and the model's first few."""
    looks = [one.ms for one in subject.order if one.ms is not None]
    limit = max(NEAR * min(looks, default=0.0), SHORT_MS)
    again = {
        str(place): one
        for place, one in enumerate(subject.order)
        if one.ms is not None and (one.ms <= limit or place < TOP)
    }
    device = next(iter(subject.sets[0].values())).device
    medians, failures = measure({name: one.calls for name, one in again.items()}, device, budget)
    for name, one in again.items():
        one.ms, one.why = medians.get(name), failures.get(name, "")
    for one in subject.order:
        one.calls = []  # they hold tensors


# --- what is told of it ----------------------------------------------------------------------------------------------


def add(found: Table, name: str, subject: Subject) -> None:
    """Adds the row of a workload."""
    order = subject.order
    timed = [one for one in order if one.ms is not None]
    data: dict[str, Any] = {
        "name": name, "kernel": subject.label, "kernels": len(subject.planner.groups()), "candidates": len(order),
        "timed": len(timed), "tried": [told(one) for one in order],
    }  # fmt: skip
    if not timed:
        raise ValueError(f"no candidate ran: {order[0].why}")
    best = min(timed, key=milliseconds)
    first, top = milliseconds(order[0]), min(map(milliseconds, order[:TOP]))
    data |= {
        "best_ms": best.ms, "best_place": order.index(best) + 1, "first_ms": first,
        "first_ratio": first / milliseconds(best), "top_ms": top, "top_ratio": top / milliseconds(best),
        "predicted_us": order[0].predicted_ms * 1e3, "off": order[0].predicted_ms / first - 1.0,
    }  # fmt: skip
    passed = "pass" if data["top_ratio"] <= TOP_BAR else "short"
    data["verdict"] = "-" if subject.bench is None else passed
    found.data.append(data)
    found.rows.append([
        name, f"{len(timed)}/{len(order)}", cell(best.ms), str(data["best_place"]), against(first, best),
        against(top, best), f"{data['predicted_us']:.1f} ({data['off']:+.0%})", data["verdict"],
    ])  # fmt: skip


def milliseconds(one: Tried) -> float:
    """The time of a candidate; infinite where it has none."""
    return math.inf if one.ms is None else one.ms


def against(ms: float, best: Tried) -> str:
    """Milliseconds, and how many times those of the best they are."""
    return f"{cell(ms)} ({ms / milliseconds(best):.2f})" if math.isfinite(ms) else "none ran"


def told(one: Tried) -> dict[str, Any]:
    """A candidate as the JSON holds it."""
    predicted = {} if one.estimate is None else dataclasses.asdict(one.estimate)
    return {"tiles": one.text, "ms": one.ms, "why": one.why, "estimate": predicted}


def notes(rows: Sequence[dict[str, Any]], device: torch.device) -> list[str]:
    """The shares of all rows, what could not be timed, and what the columns mean."""
    ran = [row for row in rows if "off" in row]
    found = []
    if ran:
        near = sum(abs(row["off"]) <= WITHIN for row in ran)
        found.append(
            f"predicted within {WITHIN:.0%} of measured: {near} of {len(ran)} rows, {near / len(ran):.0%} "
            f"(bar {SHARE_BAR:.0%}: {'pass' if near >= SHARE_BAR * len(ran) else 'short'})"
        )
        good = sum(row["top_ratio"] <= TOP_BAR for row in ran)
        found.append(f"best of the model's first {TOP} within {TOP_BAR - 1:.0%} of the best: {good} of {len(ran)} rows")
        firsts = sum(row["first_ratio"] <= TOP_BAR for row in ran)
        found.append(f"the model's first within {TOP_BAR - 1:.0%} of the best: {firsts} of {len(ran)} rows")
    found += gathered((row["failed"], row["name"]) for row in rows if "failed" in row)
    for row in ran:
        missing = gathered((one["why"], one["tiles"]) for one in row["tried"] if one["why"])
        found += [f"{row['name']}: {line}" for line in missing]
    found.append(
        "In brackets: times the best; of a prediction, of the model's first, how far it is from measured. "
        "Several kernels: the one with most predicted time, with what merges its parts."
    )
    if device.type != "cuda":
        found.append("No GPU: the times are made up.")
    return found


def gathered(failures: Iterable[tuple[str, str]]) -> list[str]:
    """Each reason once, with those that it holds for."""
    reasons: dict[str, list[str]] = {}
    for why, who in failures:
        reasons.setdefault(why, []).append(who)
    return [f"{why} [{'; '.join(who)}]" for why, who in reasons.items()]
