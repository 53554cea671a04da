"""Fits of machines of several devices to published microbenchmarks: `python -m benchmarks.links FOLDER`.

FOLDER holds tables of others' measurements as CSV (TokenWeave's artifact, APEX+'s profiles, reports on Flux). What is
printed are the fields of `backends/distributed/machines/h100x8.toml` that come from them; a test prints them again and
compares. Each is a line t = latency + bytes / (links * share), by least squares of relative errors.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from cascade.backends.distributed.machine import US_PER_BYTE_AT_1_GBS

LINK_GBS = 450.0  # NVLink 4, a direction
DEVICES = 8
BYTES = 2  # of an element of 16 bits

Points = Iterable[tuple[float, float]]
"""Bytes that a device moves, and microseconds."""


def line(points: Points) -> tuple[float, float]:
    """The latency in microseconds and the share of the links of the line with least relative errors."""
    found = [(moved * US_PER_BYTE_AT_1_GBS / LINK_GBS, us) for moved, us in points]
    one, x, xx, y, xy = (
        sum(term(moved, us) / us**2 for moved, us in found)
        for term in (lambda m, t: 1.0, lambda m, t: m, lambda m, t: m * m, lambda m, t: t, lambda m, t: m * t)
    )
    slope = (one * xy - x * y) / (one * xx - x * x)
    return (y - slope * x) / one, 1 / slope


def rows(folder: Path, name: str) -> Iterator[dict[str, str]]:
    """The rows of a table."""
    with (folder / name).open(encoding="utf-8") as file:
        yield from csv.DictReader(file)


def column(folder: Path, name: str, key: str, share: float) -> Points:
    """The times of a column by tokens, of collectives that move this share of a tensor."""
    for row in rows(folder, name):
        yield BYTES * int(row["tokens"]) * int(row["hidden_size"]) * share, float(row[key])


def fits(folder: Path) -> Mapping[str, tuple[float, float]]:
    """Latency and share by the table of the machine file that has them."""
    whole, part = 1 + 1 / DEVICES, (DEVICES - 1) / DEVICES
    kernels, budgets = "tokenweave_fig4_arln_kernels_us.csv", "tokenweave_fig10_fused_arln_ctas_us.csv"
    found = {
        "collectives.all-reduce": line(column(folder, kernels, "multimem_all_reduce_us", whole)),
        "collectives.reduce-scatter": line(column(folder, kernels, "multimem_rs_us", part)),
        "collectives.all-gather": line(column(folder, kernels, "multimem_ag_us", part)),
    }
    pairs = [row for row in rows(folder, "nccl_collectives_us.csv") if row["gpu"].startswith("H100") and row["nodes"] == "1"]
    for name, own, devices, share in (("all-to-all", "alltoall", "8", part), ("shift", "sendrecv", "2", 1.0)):
        chosen = [r for r in pairs if r["collective"] == own and r["gpus_per_node"] == devices and int(r["size_kb"]) >= 1024]
        found[f"collectives.{name}"] = line((1024 * int(row["size_kb"]) * share, float(row["time_us"])) for row in chosen)
    for blocks in (2, 4, 8, 16):
        found[f"fused.{blocks}"] = line(column(folder, budgets, f"fused_arln_us_ctas_{blocks}", whole))
    reports = [row for row in rows(folder, "flux_issue90_8xh100_ms.csv") if row["op"] == "gemm_rs_N8192_K28672"]
    stored = reports[::2]  # the others are left for a test
    found["stores"] = line((BYTES * int(r["M"]) * 8192 * part, 1000 * float(r["flux_ms"])) for r in stored)
    return found


def text(folder: Path) -> str:
    """The fields as TOML."""
    return "\n".join(
        f"[{name}]\nlatency_us = {latency:.1f}\nshare = {share:.3f}\n" for name, (latency, share) in fits(folder).items()
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    print(text(parser.parse_args().folder))  # noqa: T201
