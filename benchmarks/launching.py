"""The table `launch`: what a call costs the host, and how often changing lengths compile something.

A call of a tiny problem is timed without waiting for the device. Ours stands beside a kernel of the same maths that is
written by hand and launched by Triton, result allocated in both. Then a hundred calls of growing length are made while
what Triton compiles is counted.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import programs, reductions
from benchmarks.ours import build
from benchmarks.peers import compiled
from benchmarks.row import errors, release, synchronise
from benchmarks.table import Table
from benchmarks.timing import Budget, reason
from benchmarks.workload import Inputs, normal

CALLS = 200  # fewer than the launches that a device lets wait
BAR_US = 15.0
LENGTHS = 100
WRONG = 2e-2  # relative error


def attend(inputs: Inputs) -> Any:
    """PyTorch's own causal attention."""
    return scaled_dot_product_attention(inputs["Q"], inputs["K"], inputs["V"], is_causal=True)


def rows(length: int, generator: torch.Generator) -> Inputs:
    """Sixteen rows."""
    return {"X": normal(generator, 16, length)}


def heads(length: int, generator: torch.Generator) -> Inputs:
    """Two heads."""
    return {name: normal(generator, 1, 2, length, 64) for name in "QKV"}


CASES: dict[str, tuple[str, Callable[[int, torch.Generator], Inputs], Callable[[Inputs], Any], int]] = {
    "softmax": (programs.SOFTMAX, rows, reductions.softmax, 256),
    "attention": (programs.attention(where="n <= m"), heads, attend, 64),
}


def table(device: torch.device, options: Any) -> Iterator[Table]:
    """The table, once after every row."""
    columns = ["measurement", "ours", "bare triton", "ours above it", "eager", "torch.compile", "bar", "verdict"]
    found = Table("launch", columns)
    found.notes.append("Microseconds of the host for one call that does not wait for the device; medians.")
    budget = Budget(options.rounds, options.seconds)
    for name in CASES:
        for measurement in (calls, lengths):
            title = f"{name}: {'host us per call' if measurement is calls else f'{LENGTHS} lengths'}"
            if options.only in title:
                try:
                    measurement(found, name, title, device, options, budget)
                except Exception as error:
                    found.rows.append([title, "failed", *[""] * 5, "failed"])
                    found.notes.append(f"{title}: {reason(error)}")
                    found.data.append({"name": title, "failed": reason(error), "verdict": "failed"})
                release(device)
                yield found


def calls(found: Table, name: str, title: str, device: torch.device, options: Any, budget: Budget) -> None:
    """A row of microseconds per call."""
    text, make, maths, length = CASES[name]
    inputs = make(length, torch.Generator(device=device).manual_seed(20))
    ours, optimised = build(text, options.effort, device.type), compiled(maths, device)
    contenders: dict[str, Callable[[], Any]] = {"ours": lambda: ours(**inputs)}
    if device.type == "cuda":
        bare = getattr(importlib.import_module("benchmarks.bare"), name)
        contenders["bare triton"] = lambda: bare(inputs)
    contenders |= {"eager": lambda: maths(inputs), "torch.compile": lambda: optimised(inputs)}
    failed = wrong(contenders, maths(exact(inputs)))
    for who in failed:
        del contenders[who]
    found.notes += [f"{title}: {who}: {why}" for who, why in failed.items()]
    us = host_microseconds(contenders, device, 3 if options.tiny else CALLS, budget)
    above = us["ours"] - us["bare triton"] if {"ours", "bare triton"} <= us.keys() else None
    if "ours" in failed:
        verdict = "failed"
    elif above is None or options.tiny:
        verdict = "-"
    else:
        verdict = "pass" if above <= BAR_US else "short"
    cells = [f"{us[who]:.1f}" if who in us else "-" for who in ("ours", "bare triton", "eager", "torch.compile")]
    shown = "-" if above is None else f"{above:.1f}"
    found.rows.append([title, *cells[:2], shown, *cells[2:], f"<= {BAR_US:g} us above", verdict])
    found.data.append({"name": title, "us": us, "above_us": above, "failed": failed, "verdict": verdict})


def exact(inputs: Inputs) -> Inputs:
    """The inputs in float64."""
    return {name: value.double() for name, value in inputs.items()}


def wrong(contenders: dict[str, Callable[[], Any]], right: Tensor) -> dict[str, str]:
    """Who fails or computes something else, and why."""
    found = {}
    for who, call in contenders.items():
        try:
            error, _ = errors(call(), right)
            if not error < WRONG:
                found[who] = f"wrong: error {error:.2g}"
        except Exception as error:
            found[who] = reason(error)
    return found


def host_microseconds(
    contenders: dict[str, Callable[[], Any]], device: torch.device, count: int, budget: Budget
) -> dict[str, float]:
    """The median microseconds of one call, contenders in alternation."""
    samples: dict[str, list[float]] = {who: [] for who in contenders}
    for done in range(budget.rounds):
        if done >= 3 and budget.spent():
            break
        for who, call in contenders.items():
            call()
            synchronise(device)
            started = time.perf_counter()
            for _ in range(count):
                call()
            samples[who].append((time.perf_counter() - started) / count * 1e6)
            synchronise(device)
    return {who: statistics.median(taken) for who, taken in samples.items()}


def lengths(found: Table, name: str, title: str, device: torch.device, options: Any, budget: Budget) -> None:
    """A row of how much is compiled while the length grows from call to call."""
    text, make, maths, first = CASES[name]
    generator = torch.Generator(device=device).manual_seed(20)
    count, step = (3, 5) if options.tiny else (LENGTHS, 37)
    ours = build(text, "none", device.type)  # tuning would compile for every length it tries
    worst = 0.0
    started = time.perf_counter()
    with compilations() as seen:
        for turn in range(count):
            inputs = make(first + step * turn, generator)
            error, _ = errors(ours(**inputs), maths(exact(inputs)))
            worst = max(worst, error)
    seconds = time.perf_counter() - started
    kernels = "?" if seen is None else str(len(seen))
    verdict = "-" if worst < WRONG else "wrong"
    found.rows.append([title, f"{kernels} kernels", *[""] * 4, "none", verdict])
    found.notes.append(f"{title}: {seconds:.1f} s with the references; worst error {worst:.2g}")
    compiled_anew = None if seen is None else seen.count(False)
    found.data.append(
        {"name": title, "kernels": kernels, "not_from_disk": compiled_anew, "worst": worst, "verdict": verdict}
    )


@contextmanager
def compilations() -> Iterator[list[bool] | None]:
    """What Triton compiles meanwhile: for each kernel whether it was found on disk; None if Triton cannot tell."""
    seen: list[bool] = []

    def listen(*, cache_hit: bool, **_: Any) -> None:
        seen.append(cache_hit)

    try:
        settings: Any = importlib.import_module("triton").knobs.compilation
        before = settings.listener
    except (ImportError, AttributeError):
        yield None
        return
    settings.listener = listen
    try:
        yield seen
    finally:
        settings.listener = before
