"""The table `compile`: seconds from the text to the first result, in fresh processes with empty caches."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.first import CASES, LAYERS
from benchmarks.row import ALL_WRONG
from benchmarks.table import Table
from benchmarks.timing import Budget

ROOT = Path(__file__).parents[1]
BAR_SECONDS = 3.0  # cold, of one kernel
TUNED_SECONDS = 30.0
LIMIT_SECONDS = 150.0


def table(device: torch.device, options: Any) -> Iterator[Table]:
    """The table, once after every row."""
    columns = ["cascade", "cold s", "of it loading", "caches kept s", "quick tuning s", "bar", "verdict"]
    found = Table("compile", columns)
    found.notes.append(
        "cold: effort none, empty caches; caches kept: a second process; quick tuning: effort quick, empty caches. "
        "Each ends with the first result; PyTorch, inputs on the device and Python's bytecode, which pip writes, "
        "are there before the clock starts."
    )
    budget = Budget(options.rounds, options.seconds)
    with tempfile.TemporaryDirectory() as bytecode, tempfile.TemporaryDirectory() as caches:
        outcome(next(iter(CASES)), "none", device, True, caches, bytecode)  # what it imports is compiled, as pip does
        for name in CASES:
            if options.only in name:
                yield from row(name, found, budget, device, options.tiny, bytecode)


def row(name: str, found: Table, budget: Budget, device: torch.device, tiny: bool, bytecode: str) -> Iterator[Table]:
    """The table with one more row."""
    with tempfile.TemporaryDirectory() as caches, tempfile.TemporaryDirectory() as others:
        cold = outcome(name, "none", device, tiny, caches, bytecode)
        kept = outcome(name, "none", device, tiny, caches, bytecode)
        late = {"failed": "not run: out of time"}
        quick = late if budget.spent() else outcome(name, "quick", device, tiny, others, bytecode)
    runs = {"cold": cold, "caches kept": kept, "quick": quick}
    bars = {"cold": BAR_SECONDS} if name not in LAYERS else {}
    bars["quick"] = TUNED_SECONDS
    verdict = judged(runs, bars, tiny)
    told = ", ".join(f"<= {most:g} s {which}" for which, most in bars.items())
    cells = [seconds(cold, "first"), seconds(cold, "loaded"), seconds(kept, "first"), seconds(quick, "first")]
    found.rows.append([name, *cells, told, verdict])
    found.notes += [f"{name}: {which}: {run['failed']}" for which, run in runs.items() if "failed" in run]
    found.data.append({"name": name, **runs, "verdict": verdict})
    yield found


def judged(runs: Mapping[str, dict[str, Any]], bars: Mapping[str, float], tiny: bool) -> str:
    """What is to be said of runs that have bars, in seconds to the first result; small sizes reach none."""
    asked = [runs[which] for which in bars]
    if any("failed" in run for run in asked):
        return "failed"
    if not all(run["error"] <= ALL_WRONG for run in asked):
        return "wrong"
    if tiny:
        return "-"
    return "pass" if all(runs[which]["first"] <= most for which, most in bars.items()) else "short"


def seconds(run: dict[str, Any], which: str) -> str:
    """The seconds of a run in a cell."""
    return f"{run[which]:.2f}" if which in run else "-"


def outcome(name: str, effort: str, device: torch.device, tiny: bool, caches: str, bytecode: str) -> dict[str, Any]:
    """What one fresh process measured, or why it did not."""
    folders = {"TRITON_CACHE_DIR": f"{caches}/triton", "CASCADE_CACHE_DIR": f"{caches}/cascade"}
    folders |= {"PYTHONPYCACHEPREFIX": bytecode, "PYTHONDONTWRITEBYTECODE": ""}
    command = [sys.executable, "-m", "benchmarks.first", name, "--effort", effort, "--device", device.type]
    try:
        done = subprocess.run(
            [*command, *(["--tiny"] if tiny else [])], cwd=ROOT, env={**os.environ, **folders},
            capture_output=True, text=True, timeout=LIMIT_SECONDS,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"no result after {LIMIT_SECONDS:g} s"}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    if done.returncode:
        return {"failed": lines[-1][:160] if lines else f"exit code {done.returncode}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found
