"""The configurations: which cascade runs on which machine under which mapping, for sizes of a model."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cascade import pipeline
from cascade.backends.systolic.cost import Cost, Evaluator, evaluator
from cascade.backends.systolic.machine import Machine, from_tables
from cascade.backends.systolic.mapping import Mapping as Map
from cascade.backends.systolic.mapping import Published, loop, mapping
from cascade.backends.systolic.search import search
from cascade.backends.systolic.work import take_apart
from cascade.compiled import from_text
from cascade.errors import UnsupportedError
from cascade.ir import Cascade, Region, Stage
from examples.fusemax_reproduction.energies import read_energies

HERE = Path(__file__).parent
CONFIGS = ("unfused", "flat", "cascade", "architecture", "fusemax")
TILE = 256  # coordinates along a side of the arrays

CASCADES = {
    "unfused": "three_pass", "flat": "three_pass", "cascade": "one_pass", "architecture": "one_pass",
    "fusemax": "one_pass",
}  # fmt: skip
MACHINES = {"unfused": "unfused", "flat": "flat", "cascade": "flat", "architecture": "fusemax", "fusemax": "fusemax"}
CHANGES: dict[str, dict[str, Any]] = {"cascade": {"units": {"1d": {"operations": {"sub-exp": False}}}}}
"""What a configuration charges in another way than its machine: +Cascade takes a cycle to subtract before it takes the
exponential, FLAT and the unfused baseline do not."""


@dataclass(frozen=True)
class Model:
    """The sizes of an encoder: batch, heads, head sizes, width, width inside of the layers, tokens."""

    batch: int
    heads: int
    e: int
    f: int
    d: int
    ffn: int
    length: int


@dataclass(frozen=True)
class Dataflow:
    """What FLAT's search chooses: what stays on chip, how the products are mapped, the rows of a step."""

    granularity: str
    rows: int
    on_chip: frozenset[str]
    stationarity: tuple[str, str]

    @staticmethod
    def of(row: Mapping[str, Any]) -> Dataflow:
        """The dataflow of a row or JSON object with the names of FLAT's tables: `Q_loc`, `QK_stationarity`, `P1`."""
        names = ("Q", "K", "QK", "A", "V", "AV")
        on_chip = frozenset(name for name in names if row[f"{name}_loc"] == "onchip")
        stationarity = (str(row["QK_stationarity"]), str(row["AV_stationarity"]))
        return Dataflow(str(row["fusion_granularity"]), int(float(row["P1"])), on_chip, stationarity)


@functools.cache
def canonical(name: str) -> Cascade:
    """A cascade of `cascades.cascade`, one reduction a statement."""
    path = HERE / "cascades.cascade"
    return pipeline.run_pipeline(from_text(path.read_text(), str(path), name).cascade, "canonicalize").final


@functools.cache
def machine_of(config: str, energies: Path | None = None) -> Machine:
    """The machine of a configuration; `energies` names a table of what actions take."""
    fields = read_energies(energies, MACHINES[config]) if energies else {}
    return from_tables({"extends": MACHINES[config], **merged(fields, CHANGES.get(config, {}))}, config)


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables, tables in them merged as well."""
    found = dict(one)
    for key, value in other.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def mapping_of(config: str, model: Model, dataflow: Dataflow | None = None) -> Map:
    """The published mapping of a configuration for a model."""
    if config == "flat":
        flow = dataflow or search_dataflow(model)
        again = model.length >= LONG // 4 if "QK" in flow.on_chip else model.length > LONG
        return read_again(flat_mapping(flow), ("QK",) if again else ())
    found = published(config)
    match config:
        case "unfused":
            return read_again(long_unfused(found, model), ("QK",) if model.length > LONG else ())
        case "cascade":
            large = ("QK", "SLN") if model.length >= LONG else ()
            return read_again(found, (*large, *(("RNV",) if model.length > LONG else ())))
        case _:
            return read_again(found, ("RNV",) if model.length >= LONG else ())


def read_again(found: Map, tensors: tuple[str, ...]) -> Map:
    """The mapping, with tensors whose buffer the published counts of long sequences read once more in all."""
    return replace(found, published=replace(found.published, read_again=tensors))


def sizes_of(cascade: str, model: Model) -> dict[str, int]:
    """The shape symbols of a cascade for a model."""
    both = {"B": model.batch, "H": model.heads, "P": model.length, "E": model.e, "F": model.f}
    match cascade:
        case "one_pass":
            return {**both, "M1": -(-model.length // TILE), "M0": min(TILE, model.length)}
        case "three_pass":
            return {**both, "M": model.length}
        case _:
            inner = model.heads * model.e
            return {"T": model.batch * model.length, "D": model.d, "A": inner, "S": model.ffn}


@functools.cache
def prepared(config: str, mapped: Map, energies: Path | None = None) -> Evaluator:
    """The attention of a configuration, ready to be evaluated."""
    return evaluator(canonical(CASCADES[config]), machine_of(config, energies), mapped)


def attention(
    config: str,
    model: Model,
    dataflow: Dataflow | None = None,
    energies: Path | None = None,
    as_published: bool = False,
    mapped: Map | None = None,
) -> Cost:
    """The cost of the attention of a model, under the published mapping or the one that is given."""
    found = prepared(config, mapped or mapping_of(config, model, dataflow), energies)
    return found.cost(sizes_of(CASCADES[config], model), as_published)


def search_mapping(config: str, model: Model) -> Map:
    """The published mapping with other loops where these are faster, or move less in the same time."""
    cascade, machine = canonical(CASCADES[config]), machine_of(config)
    theirs = mapping_of(config, model)
    return search(take_apart(cascade), machine, sizes_of(CASCADES[config], model), start=theirs)


@functools.cache
def around(config: str, energies: Path | None = None) -> Evaluator:
    """The linear layers of a configuration, ready to be evaluated."""
    return evaluator(canonical("linear"), machine_of(config, energies), published("linear"))


@functools.cache
def published(name: str) -> Map:
    """A mapping file of this folder."""
    return mapping(str(HERE / f"{name}.toml"))


def layers(config: str, model: Model, energies: Path | None = None, as_published: bool = False) -> Cost:
    """The cost of the linear layers around it."""
    return around(config, energies).cost(sizes_of("linear", model), as_published)


# --- mappings that depend on the model -------------------------------------------------------------------------------


def long_unfused(found: Map, model: Model) -> Map:
    """The unfused mapping at lengths from which on the published runs partition the queries as at the longest.

    What 1M queries are cut into, so that a part fits, 256K queries are cut into as well: K and V are read as often.
    """
    if not LONG <= model.length < LONGEST:
        return found
    longest = prepared("unfused", found).cost(sizes_of("three_pass", replace(model, length=LONGEST)))
    rows = {region.name: region.movement.nests[0].lengths(3).get("p", LONGEST) for region in longest.regions}
    regions = tuple(
        replace(region, loops=(*region.loops[:2], loop(f"rows: p = {model.length * rows[region.name] // LONGEST}")))
        if region.loops[2].size is None
        else region
        for region in found.regions
    )
    return replace(found, regions=regions)


LONG, LONGEST = 256 * 1024, 1024 * 1024


def flat_mapping(flow: Dataflow) -> Map:
    """FLAT's three-pass attention under a dataflow: rows of the scores on chip, spilled as far as they do not fit.

    Where the scores are on chip, the passes over them run in turn; where they are not, the softmax takes a row at a
    time. A product whose output stays in the array loads both operands for every tile. Where the weights stay, K or V,
    all rows of the step go past each tile of them; where the input stays, all weights go past each tile of it. Sums
    that leave the array before they are complete go to memory and back, unless they are kept on chip.
    """
    rows = (loop(f"rows: p = {flow.rows}"),) if flow.granularity == "row" else ()
    outer = (loop("b = 1"), loop("h = 1"), *rows)
    inside = outer[-1].label
    keep: dict[str, str] = {}
    tiles = []
    unbuffered = ["SN"]  # as published, and operands that stay in the array
    for product, stays, operands in (("QK", flow.stationarity[0], ("Q", "K")), ("AV", flow.stationarity[1], ("V",))):
        loops = (loop("p = 256"), loop("m = 256"))
        tiles.append(Stage((product,), loops[::-1] if stays == "weight" else loops))
        if stays == "output":
            keep |= dict.fromkeys(operands, "tile")
        elif product not in flow.on_chip and product == "AV":
            keep[product] = "tile"
        unbuffered += operands[-1:] if stays == "weight" else ()
    keep |= {name: inside for name in ("Q", "K", "V", "AV") if name in flow.on_chip}
    keep |= {name: "dram" for name in ("QK", "A") if name not in flow.on_chip}
    if "QK" in flow.on_chip:
        softmax = [Stage(("GM",)), Stage(("SN", "SD")), Stage(("A",))]
        keep |= {"GM": "registers", "SD": "registers"}
    else:
        softmax = [Stage(("GM", "SN", "SD", "A"), (loop("row: p = 1"),))]
    region = Region(
        "attention",
        (tiles[0], *softmax, tiles[1]),
        outer,
        tuple(keep.items()),
        tuple(name for name in ("QK", "SN", "A") if {"SN": "QK"}.get(name, name) in flow.on_chip),
        double=True,
    )
    return Map((region,), published=Published(unbuffered=tuple(unbuffered), one_lane=True))


def dataflows(model: Model) -> list[Dataflow]:
    """The dataflows that FLAT chooses among."""
    chosen = []
    for granularity, rows in (("head", TILE), *(("row", TILE * times) for times in (1, 2, 4))):
        for on_chip in ((), ("Q",), ("QK", "A"), ("Q", "QK", "A")):
            chosen += [
                Dataflow(granularity, rows, frozenset(on_chip), (stays, stays)) for stays in ("output", "weight")
            ]
    return [flow for flow in chosen if flow.granularity == "head" or flow.rows <= model.length]


def search_dataflow(model: Model) -> Dataflow:
    """The dataflow that takes least time, then least traffic, of those that fit."""
    best: tuple[float, int] | None = None
    found: Dataflow | None = None
    for flow in dataflows(model):
        try:
            cost = prepared("flat", flat_mapping(flow)).cost(sizes_of("three_pass", model))
        except UnsupportedError:
            continue
        if best is None or (cost.seconds, cost.traffic) < best:
            best, found = (cost.seconds, cost.traffic), flow
    assert found is not None, "rows of scores off chip fit everywhere"
    return found
