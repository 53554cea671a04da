"""A cascade over sizes, machines and mappings: a row for every combination, in this process, in several, on a cluster.

Every worker prepares a machine and a mapping once and evaluates its sizes. A point at which nothing fits has a row too,
with the reason in `error`. Rows come in the order of the points, whoever computed them.
"""

from __future__ import annotations

import csv
import functools
import importlib
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeAlias

from cascade.backends.systolic.cost import Cost, Evaluator
from cascade.backends.systolic.machine import Machine, machine
from cascade.backends.systolic.mapping import Mapping as Map
from cascade.backends.systolic.mapping import mapping, scheduled
from cascade.backends.systolic.pareto import front
from cascade.backends.systolic.search import search
from cascade.backends.systolic.work import Cascaded, take_apart
from cascade.errors import CommandError, Diagnostic, UnsupportedError
from cascade.ir import Cascade

Row: TypeAlias = dict[str, Any]
CHUNK = 64  # points that a worker takes at a time


@dataclass(frozen=True, slots=True)
class Point:
    """One evaluation: a machine, a mapping file (None: that of the schedule, else one is searched), the sizes of all
    symbols; `front` for all mappings that no other beats."""

    machine: str
    mapping: str | None
    sizes: tuple[tuple[str, int], ...]
    front: bool = False


def points(
    machines: Sequence[str], mappings: Sequence[str], sizes: Mapping[str, Sequence[int]], front: bool = False
) -> tuple[Point, ...]:
    """Every combination, sizes changing fastest, the last symbol first."""
    combined = [tuple(zip(sizes, values, strict=True)) for values in itertools.product(*sizes.values())]
    paths = mappings or (None,)
    return tuple(Point(name, path, at, front) for name in machines for path in paths for at in combined)


def sweep(cascade: Cascade, found: Sequence[Point], jobs: int = 1, scheduler: str | None = None) -> list[Row]:
    """A row for every point of a canonical cascade, or for every choice of its front; `scheduler` is the address of a
    Dask cluster."""
    chunks = [found[at : at + CHUNK] for at in range(0, len(found), CHUNK)]
    task = functools.partial(_rows, cascade)
    if scheduler is not None:
        with _optional("distributed", "a sweep on a cluster").Client(scheduler) as client:
            parts: Iterable[list[Row]] = client.gather(client.map(task, chunks))
    elif jobs > 1 and len(chunks) > 1:
        with ProcessPoolExecutor(jobs) as pool:
            parts = list(pool.map(task, chunks))
    else:
        parts = map(task, chunks)
    return [row for part in parts for row in part]


def _rows(cascade: Cascade, chunk: Sequence[Point]) -> list[Row]:
    return [row for point in chunk for row in _rows_of(cascade, point)]


def _rows_of(cascade: Cascade, point: Point) -> list[Row]:
    """What a point costs, or why it cannot be run; on a front `choice` numbers its mappings from the fastest."""
    row: Row = {"machine": point.machine, "mapping": point.mapping or "", **dict(point.sizes)}
    try:
        costs = [evaluator.cost(dict(point.sizes)) for evaluator in _evaluators(cascade, point)]
    except UnsupportedError as error:
        return [row | {"error": error.diagnostics[0].message}]
    on = _machine(point.machine)
    choices = [{"choice": number} if point.front else {} for number in range(len(costs))]
    return [row | choice | _figures(cost, on) for choice, cost in zip(choices, costs, strict=True)]


def _evaluators(cascade: Cascade, point: Point) -> list[Evaluator]:
    start = scheduled(cascade) if point.mapping is None else _mapping(point.mapping)
    if start is not None and not point.front:
        return [_prepared(cascade, point.machine, start)]
    cascaded, chosen, sizes = _apart(cascade), _machine(point.machine), dict(point.sizes)
    if point.front:
        return [Evaluator(cascaded, chosen, each) for each in front(cascaded, chosen, sizes, start=start).mappings]
    return [Evaluator(cascaded, chosen, search(cascaded, chosen, sizes))]


@functools.lru_cache(64)
def _prepared(cascade: Cascade, name: str, given: Map) -> Evaluator:
    return Evaluator(_apart(cascade), _machine(name), given)


@functools.lru_cache(64)
def _mapping(path: str) -> Map:
    return mapping(path)


@functools.lru_cache(64)
def _machine(name: str) -> Machine:
    return machine(name)


@functools.lru_cache(8)
def _apart(cascade: Cascade) -> Cascaded:
    return take_apart(cascade)


def _figures(cost: Cost, on: Machine) -> Row:
    longest = max(cost.regions, key=lambda region: region.seconds, default=None)
    return {
        "latency_s": cost.seconds,
        "cycles": cost.cycles,
        **{f"utilisation_{unit}": share for unit, share in cost.utilisation.items()},
        "traffic_bytes": cost.traffic,
        "energy_pj": cost.energy_pj,
        **{f"energy_{part}": energy for part, energy in cost.energy.items()},
        "on_chip_bytes": max((region.movement.held for region in cost.regions), default=0),
        "bound": longest.bound if longest else "",
        "lane_cycles": sum(found.cycles * on.units[found.unit].lanes for found in cost.einsums.values()),
    }


def csv_text(rows: Sequence[Row]) -> str:
    """The rows as CSV, with the columns of all of them."""
    columns = dict.fromkeys(name for row in rows for name in row)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def parquet_bytes(rows: Sequence[Row]) -> bytes:
    """The rows as a Parquet file; needs pyarrow."""
    _optional("pyarrow", "a Parquet file")
    table = importlib.import_module("pyarrow").Table.from_pylist(list(rows))
    file = io.BytesIO()
    importlib.import_module("pyarrow.parquet").write_table(table, file)
    return file.getvalue()


def _optional(package: str, what: str) -> Any:
    """A package that only this needs; raises C623 where it is not installed."""
    try:
        return importlib.import_module(package)
    except ImportError:
        hint = f"pip install {package}"
        raise CommandError(Diagnostic("C623", f"{what} needs {package}, which is not installed", help=hint)) from None
