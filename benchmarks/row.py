"""One row: ours and its peers are built, checked against float64 on a slice, then timed in alternation."""

from __future__ import annotations

import functools
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.ours import build
from benchmarks.timing import Budget, input_sets, measure, reason
from benchmarks.workload import Bar, Inputs, Peer, Workload, size_of

ALL_WRONG = 1e-2  # error of ours over the slice, relative
ROW_WRONG = 5e-2  # error of the worst row of the slice, relative
PEER_DIFFERS = 5e-2
APART = 0.1  # difference of the worst row between ours and a peer, both rounded, relative
OURS = "ours"


@dataclass
class Result:
    """What was measured of a workload: milliseconds by contender, and what there is to say about it."""

    name: str
    ms: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=dict)  # against float64, relative, over the slice
    failed: dict[str, str] = field(default_factory=dict)  # why a contender has no time
    doubts: dict[str, str] = field(default_factory=dict)  # what is odd about a contender that has one
    bars: list[dict[str, Any]] = field(default_factory=list)
    flops: float = 0.0
    moved: float = 0.0
    first_seconds: float = 0.0  # of ours, from the text to the first result
    beyond: int = 0  # bytes that a call of ours allocates at most beyond its inputs and results

    @property
    def verdict(self) -> str:
        """Whether ours reaches every bar: `pass`, `short`, `wrong`, `failed`, or nothing where there is no bar."""
        if OURS not in self.ms:
            return "wrong" if self.failed.get(OURS, "").startswith("wrong") else "failed"
        judged = [bar["reached"] for bar in self.bars if not bar["goal"] and bar["reached"] is not None]
        if not judged:
            return ""
        return "pass" if min(judged) >= 1 else "short"


def measure_row(workload: Workload, device: torch.device, effort: str, budget: Budget, copy: float) -> Result:
    """Builds, checks and times a workload. `copy` is the bandwidth of a copy in bytes per second."""
    result = Result(workload.name, flops=workload.flops, moved=workload.moved)
    try:
        collect(result, workload, device, effort, budget)
    except Exception as error:  # such as no memory for the inputs: a line of the table
        result.failed.setdefault(OURS, reason(error))
    result.bars = [judged(bar, result, copy) for bar in workload.bars]
    release(device)
    return result


def collect(result: Result, workload: Workload, device: torch.device, effort: str, budget: Budget) -> None:
    """Fills in the errors and the times."""
    generator = torch.Generator(device=device).manual_seed(20)
    sets = [workload.inputs(generator)]
    count = input_sets(device, size_of(sets[0]))
    sets += [workload.inputs(generator) for _ in range(count - 1)]
    wanted = workload.expected(sets[0])
    contenders: dict[str, Sequence[Callable[[], Any]]] = {}
    ours, calls = our_calls(result, workload, sets, device, effort, wanted)
    if calls:
        contenders[OURS] = calls
    for name, peer in workload.peers.items():
        theirs, calls = peer_calls(result, name, peer, workload, sets, wanted)
        if calls:
            contenders[name] = calls
        if calls and peer.checked and ours is not None and OURS in contenders and name not in result.doubts:
            far = apart(ours, theirs, workload.settled(sets[0]))
            if not far <= APART:
                result.failed[OURS] = f"wrong: a row outside of the checked slice differs from {name} by {far:.2g}"
                del contenders[OURS]
            ours = None  # one look at all of the results is enough
        del theirs
    medians, failures = measure(contenders, device, budget)
    result.ms.update(medians)
    result.failed.update(failures)


def our_calls(
    result: Result, workload: Workload, sets: list[Inputs], device: torch.device, effort: str, wanted: Tensor
) -> tuple[Any, Sequence[Callable[[], Any]]]:
    """The results, and calls of the compiled cascade for each set of inputs; none if it fails or is wrong."""
    try:
        started = time.perf_counter()
        compiled = build(workload.text, effort, device.type, workload.options)
        first = compiled(**sets[0])
        synchronise(device)
        result.first_seconds = time.perf_counter() - started
        poison(made(first, sets[0]))
        del first
        found = watched(result, compiled, sets[0], device)
        error, worst = errors(workload.found(found, sets[0]), wanted)
        result.error[OURS] = error
        if not finite(found):
            result.failed[OURS] = "wrong: not every result is finite"
        elif not (error <= ALL_WRONG and worst <= ROW_WRONG):
            result.failed[OURS] = f"wrong: error {error:.2g}, worst row {worst:.2g}"
    except Exception as error:
        result.failed[OURS] = reason(error)
    if OURS in result.failed:
        return None, []
    return made(found, sets[0]), [functools.partial(compiled, **inputs) for inputs in sets]


def watched(result: Result, compiled: Callable[..., Any], inputs: Inputs, device: torch.device) -> Any:
    """The results of a call that compiles nothing any more; notes the memory that it takes beyond them."""
    if device.type != "cuda":
        return compiled(**inputs)
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    found = compiled(**inputs)
    synchronise(device)
    result.beyond = torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    return found


def peer_calls(
    result: Result, name: str, peer: Peer, workload: Workload, sets: list[Inputs], wanted: Tensor
) -> tuple[Any, Sequence[Callable[[], Any]]]:
    """The results, and calls of a peer for each set of inputs; none if it fails."""
    try:
        with torch.no_grad():
            prepared = [peer.prepare(inputs) for inputs in sets]
            found = peer.run(prepared[0])
        if peer.checked:
            error, _ = errors(workload.found(found, sets[0]), wanted)
            result.error[name] = error
            if not error <= PEER_DIFFERS:
                result.doubts[name] = f"computes something else: error {error:.2g}"
    except Exception as error:
        result.failed[name] = reason(error)
        return None, []

    def call(inputs: Inputs) -> Any:
        with torch.no_grad():
            return peer.run(inputs)

    return found, [functools.partial(call, inputs) for inputs in prepared]


def errors(found: Tensor, wanted: Tensor) -> tuple[float, float]:
    """The relative error over all rows, and that of the worst row; nan where a result is."""
    if found.shape != wanted.shape:
        raise ValueError(f"a result of shape {list(found.shape)} where {list(wanted.shape)} is right")
    found = found.double()
    return float((found - wanted).norm() / wanted.norm()), worst_row(found.flatten(1), wanted.flatten(1))


def apart(ours: Any, theirs: Any, settled: slice | Tensor = slice(None)) -> float:
    """The largest difference of a settled row of floating-point results, relative to the row; nan where a result is."""
    worst = 0.0
    for one, other in zip(tensors(ours), tensors(theirs), strict=True):
        if one.is_floating_point():
            width = one.shape[-1] if one.dim() > 1 else 1
            one, other = (part.reshape(-1, width)[settled].float() for part in (one, other))
            far = worst_row(one, other)
            worst = far if math.isnan(far) else max(worst, far)
    return worst


def worst_row(found: Tensor, wanted: Tensor) -> float:
    """The relative error of the worst row of a matrix; a row that is nearly zero is held against the others."""
    rows, sizes = (found - wanted).norm(dim=1), wanted.norm(dim=1)
    typical = sizes.norm() / max(1, len(sizes)) ** 0.5
    return float((rows / torch.maximum(sizes, 0.1 * typical)).max())


def judged(bar: Bar, result: Result, copy: float) -> dict[str, Any]:
    """The bar beside what was reached: 1 and more is enough, None where it could not be told."""
    limit: float | None = bar.ms or None
    if bar.copy:
        limit = result.moved / (bar.factor * copy) * 1e3
    elif bar.peer:
        limit = result.ms[bar.peer] / bar.factor if bar.peer in result.ms else None
    ours = result.ms.get(OURS)
    reached = limit / ours if limit and ours else None
    return {"text": bar.text, "goal": bar.goal, "limit_ms": limit, "reached": reached}


def tensors(value: Any) -> list[Tensor]:
    """The tensors of one result or of several."""
    return [value] if isinstance(value, Tensor) else [part for part in value if isinstance(part, Tensor)]


def made(value: Any, inputs: Inputs) -> list[Tensor]:
    """The results that are not in the memory of an input."""
    given = {tensor.data_ptr() for tensor in inputs.values()}
    return [part for part in tensors(value) if part.data_ptr() not in given]


def finite(value: Any) -> bool:
    """Whether every number in the results is finite."""
    return all(bool(torch.isfinite(part).all()) for part in tensors(value))


def poison(value: Any) -> None:
    """Fills results with NaN before they are freed: whatever takes their memory next must write all of it."""
    for part in tensors(value):
        if part.is_floating_point():
            part.fill_(torch.nan)


def synchronise(device: torch.device) -> None:
    """Waits for the device; raises if it was lost."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Gives back what a row held: memory, and what was compiled for it."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.empty_cache()
        except RuntimeError:  # the device is lost; the next row says so
            return
