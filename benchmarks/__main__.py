"""`python -m benchmarks TABLE`: ours beside its peers, one table for each command.

Every row checks ours against float64 on a slice before it is timed; ours and the peers take turns. What fails is a line
of the table with its reason. On CUDA the table is kept in `benchmarks/results`, as text and as JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import (
    attention, compiling, costing, devices, emulated, experts, launching, layers, overlap, products, reductions,
    splitting,
)  # fmt: skip
from benchmarks.row import OURS, Result, measure_row, synchronise
from benchmarks.table import Table, default_path, environment, header, table_of, write
from benchmarks.timing import Budget, copy_rate, reason
from benchmarks.workload import Workload

WORKLOADS: dict[str, Callable[[torch.device, Any], Iterator[Workload]]] = {
    "attention": attention.forward,
    "flex-grid": attention.grid,
    "decode": attention.decoding,
    "rows": reductions.table,
    "gemm": products.table,
    "layers": layers.table,
    "experts": experts.table,
}


def model(device: torch.device, options: Any) -> Iterator[Table]:
    """The table `model`, loaded where it is asked for: it needs Triton."""
    found: Iterator[Table] = importlib.import_module("benchmarks.modelling").table(device, options)
    return found


OTHERS: dict[str, Callable[[torch.device, Any], Iterator[Table]]] = {
    "launch": launching.table,
    "compile": compiling.table,
    "model": model,
    "cost": costing.table,
    "devices": devices.table,
    "emulated": emulated.table,
    "split": splitting.table,
    "overlap": overlap.table,
}
NO_ROW = 3
ALONE_SECONDS = 150.0
SECONDS = {  # of each where all are run
    "attention": 70.0, "flex-grid": 100.0, "decode": 40.0, "rows": 100.0, "gemm": 50.0, "layers": 120.0,
    "experts": 60.0, "launch": 30.0, "compile": 80.0, "model": 150.0,
    "cost": 40.0, "devices": 150.0, "emulated": 60.0, "split": 60.0, "overlap": 90.0,
}  # fmt: skip
GRACE_SECONDS = 90  # for what a row takes beyond the time of its table


def parser() -> argparse.ArgumentParser:
    """The options of the command."""
    found = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    found.add_argument("table", choices=[*SECONDS, "all"])
    found.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this")
    found.add_argument("--rounds", type=int, default=20, help="turns of every contender (default 20)")
    found.add_argument("--effort", choices=["none", "quick", "full"], default="quick", help="how ours is tuned")
    found.add_argument("--seconds", type=float, help="after these no rounds or rows begin (150)")
    found.add_argument("-o", "--output", type=Path, metavar="FILE", help="the text of the table; of `all` a folder")
    found.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    found.add_argument("--tiny", action="store_true", help="small sizes: whether everything runs, not how fast")
    grid = found.add_argument_group("flex-grid")
    grid.add_argument("--heads", type=words(str), default=["16"], help="query/key heads (default 16; also 16/4)")
    grid.add_argument("--lengths", type=words(int), default=[8192], help="lengths (default 8192), 2048,4096,...")
    grid.add_argument("--widths", type=words(int), default=[128], help="widths of a head (default 128; also 64)")
    return found


def words(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    """Values between commas."""
    return lambda text: [kind(word) for word in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    """Runs the command; returns its exit code: 1 if ours failed or was wrong in some row, 3 if no row was asked for."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser().parse_args(arguments)
    if options.table == "all":
        return run_all(arguments, options)
    options.seconds = ALONE_SECONDS if options.seconds is None else options.seconds
    device = torch.device(options.device)
    facts = environment(device)
    if options.tiny:
        facts["device"] += ", small sizes: not a measurement"
    path = options.output or (
        default_path(options.table, facts) if device.type == "cuda" and not options.tiny else None
    )
    last = Table(options.table, ["no row of this name"])
    make = workload_tables if options.table in WORKLOADS else OTHERS[options.table]
    for last in make(device, options):
        if last.rows:
            print(f"{options.table}: {last.rows[-1][0]}: {last.rows[-1][-1]}", file=sys.stderr, flush=True)
        if path:
            write(last, facts, path)
    print(last.text(header(facts)))
    if not last.rows:
        return NO_ROW
    return int(any(row["verdict"] in ("failed", "wrong") for row in last.data))


def workload_tables(device: torch.device, options: Any) -> Iterator[Table]:
    """The table of workloads, once after every row; rows that found no time or no device say so."""
    budget = Budget(options.rounds, options.seconds)
    copy = copy_rate(device, Budget(5, 10.0))
    results: list[Result] = []
    lost = ""
    for workload in WORKLOADS[options.table](device, options):
        if options.only not in workload.name:
            continue
        if options.tiny:  # small sizes reach no bar
            workload = dataclasses.replace(workload, bars=())
        why = lost or ("not run: out of time (--seconds)" if budget.spent() else "")
        if why:
            results.append(Result(workload.name, failed={OURS: why}))
        else:
            results.append(measure_row(workload, device, options.effort, budget, copy))
            lost = loss(device, workload.name)
        yield table_of(options.table, results, copy)


def loss(device: torch.device, name: str) -> str:
    """Why nothing runs on the device any more, if that is so."""
    try:
        synchronise(device)
    except Exception as error:
        return f"not run: the device was lost in {name}: {reason(error)}"
    return ""


def run_all(arguments: list[str], options: Any) -> int:
    """Every table in a process of its own, so that one that is lost does not take the others with it."""
    passed = [word for word in arguments if word != "all"]
    if options.output:
        at = next(place for place, word in enumerate(passed) if word.startswith(("-o", "--output")))
        del passed[at : at + (2 if passed[at] in ("-o", "--output") else 1)]
    failed = False
    for name, default in SECONDS.items():
        more = [] if options.seconds is not None else ["--seconds", f"{default:g}"]
        more += ["-o", str(options.output / f"{name}.txt")] if options.output else []
        limit = (default if options.seconds is None else options.seconds) + GRACE_SECONDS
        command = [sys.executable, "-m", "benchmarks", name, *passed, *more]
        try:
            code = subprocess.run(command, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {limit:g} s; the rows before are in its file", file=sys.stderr)
            code = 1
        failed = failed or code not in (0, NO_ROW)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
