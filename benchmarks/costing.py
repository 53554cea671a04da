"""The table `cost`: how long the model of spatial machines takes on this host: a reproduction, a sweep, an evaluation.

The reproduction begins with nothing prepared but the imports; FLAT's dataflows are searched in it. An evaluation is
the median of many with everything prepared.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.table import Table
from cascade.backends.systolic.sweep import points, sweep
from examples.fusemax_reproduction.configurations import (
    CASCADES, CONFIGS, HERE, Model, canonical, mapping_of, prepared, sizes_of,
)  # fmt: skip
from examples.fusemax_reproduction.page import LENGTHS, MODELS, evaluate

REPRODUCTION, SWEEP, EVALUATION = "reproduction, 24 points x 5", "sweep, 10 000 points", "evaluation"
BARS = {REPRODUCTION: 2.0, SWEEP: 30.0, EVALUATION: 1e-3}  # seconds
JOBS = 2
TINY = 10  # times fewer


def table(device: torch.device, options: Any) -> Iterator[Table]:
    """The table, once after every row; the device plays no part."""
    found = Table("cost", ["what", "seconds", "bar", "verdict"])
    found.notes.append(f"seconds on the host; the sweep in {JOBS} processes; an evaluation with everything prepared")
    rows: dict[str, Callable[[bool], float]] = {REPRODUCTION: reproduction, SWEEP: swept}
    rows |= {f"{EVALUATION} of {config}": functools.partial(evaluation, config=config) for config in CONFIGS}
    for name, measure in rows.items():
        if options.only not in name:
            continue
        seconds = measure(options.tiny)
        bar = next(bar for what, bar in BARS.items() if name.startswith(what))
        verdict = "-" if options.tiny else "pass" if seconds <= bar else "short"
        found.rows.append([name, f"{seconds:.3g}", f"<= {bar:g}", verdict])
        found.data.append({"name": name, "seconds": seconds, "verdict": verdict})
        yield found


def reproduction(tiny: bool) -> float:
    """Seconds of all configurations for all models and lengths, attention and whole layers."""
    lengths = dict(list(LENGTHS.items())[:1]) if tiny else LENGTHS
    start = time.perf_counter()
    evaluate(lengths=lengths)
    return time.perf_counter() - start


def swept(tiny: bool) -> float:
    """Seconds of a sweep over batches, heads, widths of a head and lengths of one-pass attention."""
    few = TINY if tiny else 1
    sizes = {"B": range(1, 1 + 100 // few), "H": (8, 12, 16, 20), "E": (64,), "F": (64,), "M0": (256,)}
    lengths = {"M1": range(8, 8 + 5), "P": range(2048, 2048 + 256 * 5, 256)}
    found = points(("fusemax",), (str(HERE / "fusemax.toml"),), {**sizes, **lengths})
    start = time.perf_counter()
    rows = sweep(canonical("one_pass"), found, JOBS)
    seconds = time.perf_counter() - start
    assert len(rows) == len(found) == 10_000 // few and not any("error" in row for row in rows)
    return seconds


def evaluation(tiny: bool, config: str) -> float:
    """Seconds of one evaluation of a configuration, the median of many."""
    model = Model(64, *MODELS["BERT"], LENGTHS["64K"])
    found = prepared(config, mapping_of(config, model))
    sizes = sizes_of(CASCADES[config], model)
    taken = []
    for _ in range(200 // (TINY if tiny else 1)):
        start = time.perf_counter()
        found.cost(sizes)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
