"""What the planner's model says of every row that was measured on a GPU, without it: `python -m benchmarks.predicting`.

The tables in `benchmarks/results` are read, their workloads planned for contiguous tensors of the same sizes, and times
that `cascadec cost --machine` would print compared with those that were measured: of calls, and in the table `model` of
the model's own first choice for the kernel that takes longest. A row that cannot be planned like that says why: what a
filter leaves is told by data, or statements run outside of kernels. Without `--rows` a line for each table is printed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.__main__ import WORKLOADS, parser
from benchmarks.modelling import SHARE_BAR, TABLES, WITHIN
from benchmarks.table import RESULTS
from benchmarks.workload import Workload
from cascade.backends.triton.forecast import Forecast, forecast
from cascade.backends.triton.machine import Machine, machine_for
from cascade.frontend.build import parse_cascade
from cascade.inference import bind_sizes, infer_shapes
from cascade.ir import Cascade
from cascade.passes.points import LivePoints, iterated
from cascade.pipeline import run_pipeline
from cascade.values import FROM_TORCH
from cascade.walk import defines

DEVICE = "nvidia-h200"
CAPABILITY = (9, 0)


@dataclass(frozen=True)
class Row:
    """A measured row: its table and name, milliseconds measured and predicted, why these cannot be compared."""

    table: str
    name: str
    measured: float
    predicted: float
    why: str = ""

    @property
    def off(self) -> float:
        """By which share the prediction is off."""
        return self.predicted / self.measured - 1.0


def measured(device: str) -> dict[tuple[str, str], float]:
    """Milliseconds of ours by table and row, the latest of each."""
    found: dict[tuple[str, str], float] = {}
    tables = [json.loads(path.read_text()) for path in RESULTS.glob(f"*-{device}.json")]
    for table in sorted(tables, key=lambda table: str(table["date"])):
        for row in table["rows"] if table["table"] in (*WORKLOADS, "model") else ():
            ms = row.get("first_ms") if table["table"] == "model" else row["ms"].get("ours")
            if ms:
                found[table["table"], row["name"]] = ms
    return found


def workloads() -> dict[tuple[str, str], Workload]:
    """Every workload of every table, by table and name."""
    grid = ["--heads", "16,16/4", "--lengths", "2048,4096,8192", "--widths", "64,128"]
    options = parser().parse_args(["flex-grid", *grid])
    device = torch.device("cpu")
    found = {(table, row.name): row for table, make in WORKLOADS.items() for row in make(device, options)}
    return found | {("model", row.name): row for make in TABLES for row in make(device, options)}


def planned(workload: Workload, on: Machine) -> tuple[tuple[Forecast, ...], str]:
    """The kernels of a workload, and why their time is not that of a call; inputs are made without memory."""
    final = run_pipeline(parse_cascade(workload.text), check=0).final
    with FakeTensorMode():
        inputs = workload.inputs(torch.Generator())
    tensors: dict[str, Tensor] = {param.name: inputs[param.name] for param in final.params}
    sizes = bind_sizes(final, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, {})
    types = {name: FROM_TORCH[tensor.dtype] for name, tensor in tensors.items()}
    kernels, outside = forecast(final, sizes, types, on, workload.options.get("in_place", {}))
    reasons = [
        *(f"data tells how much of {name} there is" for name in told_by_data(final, sizes)[:1]),
        *(f"{name} is in no kernel" for name in outside[:1]),
    ]
    return kernels, "; ".join(reasons)


def told_by_data(final: Cascade, sizes: dict[str, int]) -> list[str]:
    """What is present in which statements only data tells."""
    points = LivePoints(infer_shapes(final), sizes)
    for stmt in final.body:
        points.points(iterated(stmt), points.filters(stmt, iterated(stmt)), defines(stmt)[0])
    return list(points.assumed)


def rows(device: str = DEVICE, only: str = "") -> Iterator[Row]:
    """Every row that was measured and whose workload there still is."""
    every, on = workloads(), machine_for(device.replace("-", " ").upper(), CAPABILITY)
    for key, ms in sorted(measured(device).items()):
        if key in every and only in key[1]:
            kernels, why = planned(every[key], on)
            times = [kernel.estimate.time_us / 1e3 for kernel in kernels]
            yield Row(*key, ms, max(times) if key[0] == "model" else sum(times), why)


def near(found: list[Row]) -> int:
    """How many predictions are as near as they should be."""
    return sum(abs(row.off) <= WITHIN for row in found)


def summary(found: list[Row]) -> list[str]:
    """A line for each table, one for all."""
    lines = [f"{'table':12}{'rows':>6}{f'within {WITHIN:.0%}':>12}{'median off':>12}{'most off':>10}"]
    for table in (*dict.fromkeys(row.table for row in found), "all"):
        some = [row for row in found if table in (row.table, "all") and not row.why]
        if some:
            offs = [abs(row.off) for row in some]
            share = f"{near(some) / len(some):.0%}"
            lines.append(f"{table:12}{len(some):6}{share:>12}{statistics.median(offs):12.1%}{max(offs):10.1%}")
    reasons = [row.why for row in found if row.why]
    lines += [f"not compared: {reasons.count(why)} rows, {why}" for why in dict.fromkeys(reasons)]
    return lines


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where fewer rows than the bar asks for are near."""
    command = argparse.ArgumentParser("python -m benchmarks.predicting", description=__doc__)
    command.add_argument("--device", default=DEVICE, help=f"as the tables name it (default {DEVICE})")
    command.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains this")
    command.add_argument("--rows", action="store_true", help="a line for every row")
    options = command.parse_args(arguments)
    found = list(rows(options.device, options.only))
    for row in found if options.rows else ():
        times = f"{row.measured:9.4f} ms {row.predicted:9.4f} ms {row.off:+7.1%}"
        print(f"{row.table:10} {row.name:46} {times}  {row.why}".rstrip())
    print("\n".join(summary(found)))
    compared: list[Any] = [row for row in found if not row.why]
    return int(near(compared) < SHARE_BAR * len(compared))


if __name__ == "__main__":
    raise SystemExit(main())
