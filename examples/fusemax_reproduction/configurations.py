"""The configurations: which cascade runs on which machine under which mapping, for sizes of a model."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cascade import pipeline
from cascade.backends.systolic.cost import Cost, Evaluator, evaluator
from cascade.backends.systolic.machine import Machine, from_tables
from cascade.backends.systolic.mapping import Mapping as Map
from cascade.backends.systolic.mapping import Published, loop, mapping
from cascade.backends.systolic.movement import RegionPlan
from cascade.backends.systolic.search import search
from cascade.backends.systolic.work import take_apart
from cascade.compiled import from_text
from cascade.errors import UnsupportedError
from cascade.ir import Cascade, Loop, Region, Stage
from examples.fusemax_reproduction.energies import read_energies

HERE = Path(__file__).parent
CONFIGS = ("unfused", "flat", "cascade", "architecture", "fusemax")
TILE = 256  # coordinates along a side of the arrays
TENSORS = ("Q", "K", "QK", "A", "V", "AV")  # of which FLAT chooses what is on chip
STATIONARITIES = ("output", "weight", "input")

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
class Chip:
    """Lanes along a side of the arrays, and bytes of the buffer where it is not that of the configuration."""

    array: int = TILE
    buffer: int | None = None


CHIP = Chip()


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
        on_chip = frozenset(name for name in TENSORS if row[f"{name}_loc"] == "onchip")
        stationarity = (str(row["QK_stationarity"]), str(row["AV_stationarity"]))
        return Dataflow(str(row["fusion_granularity"]), int(float(row["P1"])), on_chip, stationarity)

    def row(self) -> dict[str, str]:
        """The JSON object that `of` reads."""
        places = {f"{name}_loc": "onchip" if name in self.on_chip else "offchip" for name in TENSORS}
        stays = {"QK_stationarity": self.stationarity[0], "AV_stationarity": self.stationarity[1]}
        return {"fusion_granularity": self.granularity, "P1": str(self.rows), **places, **stays}


@functools.cache
def canonical(name: str) -> Cascade:
    """A cascade of `cascades.cascade`, one reduction a statement."""
    path = HERE / "cascades.cascade"
    return pipeline.run_pipeline(from_text(path.read_text(), str(path), name).cascade, "canonicalize").final


@functools.cache
def machine_of(config: str, energies: Path | None = None, chip: Chip = CHIP) -> Machine:
    """The machine of a configuration; `energies` names a table of what actions take."""
    fields = read_energies(energies, MACHINES[config]) if energies else {}
    side = {"columns": chip.array}
    fields = merged(fields, {"units": {"2d": {"rows": chip.array, **side}, "1d": side}})
    if chip.buffer is not None:
        fields = merged(fields, {"buffer": {"bytes": chip.buffer}})
    return from_tables({"extends": MACHINES[config], **merged(fields, CHANGES.get(config, {}))}, config)


def merged(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """Two tables, tables in them merged as well."""
    found = dict(one)
    for key, value in other.items():
        old = found.get(key)
        found[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return found


def resized(found: Map, chip: Chip) -> Map:
    """A mapping with tiles for arrays of another size."""

    def loops(old: tuple[Loop, ...]) -> tuple[Loop, ...]:
        return tuple(replace(one, size=chip.array) if one.size == TILE else one for one in old)

    regions = (
        replace(
            region, loops=loops(region.loops),
            stages=tuple(replace(stage, loops=loops(stage.loops)) for stage in region.stages),
        )
        for region in found.regions
    )  # fmt: skip
    return found if chip.array == TILE else replace(found, regions=tuple(regions))


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


def sizes_of(cascade: str, model: Model, chip: Chip = CHIP) -> dict[str, int]:
    """The shape symbols of a cascade for a model."""
    both = {"B": model.batch, "H": model.heads, "P": model.length, "E": model.e, "F": model.f}
    match cascade:
        case "one_pass":
            return {**both, "M1": -(-model.length // chip.array), "M0": min(chip.array, model.length)}
        case "three_pass":
            return {**both, "M": model.length}
        case _:
            inner = model.heads * model.e
            return {"T": model.batch * model.length, "D": model.d, "A": inner, "S": model.ffn}


@functools.cache
def prepared(config: str, mapped: Map, energies: Path | None = None, chip: Chip = CHIP) -> Evaluator:
    """The attention of a configuration, ready to be evaluated."""
    return evaluator(canonical(CASCADES[config]), machine_of(config, energies, chip), resized(mapped, chip))


def attention(
    config: str,
    model: Model,
    dataflow: Dataflow | None = None,
    energies: Path | None = None,
    as_published: bool = False,
    mapped: Map | None = None,
    chip: Chip = CHIP,
) -> Cost:
    """The cost of the attention of a model, under the published mapping or the one that is given."""
    found = prepared(config, mapped or mapping_of(config, model, dataflow), energies, chip)
    return found.cost(sizes_of(CASCADES[config], model, chip), as_published)


def search_mapping(config: str, model: Model) -> Map:
    """The published mapping with other loops where these are faster, or move less in the same time."""
    cascade, machine = canonical(CASCADES[config]), machine_of(config)
    theirs = mapping_of(config, model)
    return search(take_apart(cascade), machine, sizes_of(CASCADES[config], model), start=theirs)


@functools.cache
def around(config: str, energies: Path | None = None, chip: Chip = CHIP) -> Evaluator:
    """The linear layers of a configuration, ready to be evaluated."""
    return evaluator(canonical("linear"), machine_of(config, energies, chip), resized(published("linear"), chip))


@functools.cache
def published(name: str) -> Map:
    """A mapping file of this folder."""
    return mapping(str(HERE / f"{name}.toml"))


def layers(
    config: str, model: Model, energies: Path | None = None, as_published: bool = False, chip: Chip = CHIP
) -> Cost:
    """The cost of the linear layers around it."""
    return around(config, energies, chip).cost(sizes_of("linear", model), as_published)


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


def dataflows(length: int) -> Iterator[Dataflow]:
    """All dataflows that FLAT chooses among: granularity and rows, where six tensors are, what stays in the array."""
    for granularity, rows in granularities(length):
        for count in range(len(TENSORS) + 1):
            for on_chip in itertools.combinations(TENSORS, count):
                for stays in itertools.product(STATIONARITIES, repeat=2):
                    yield Dataflow(granularity, rows, frozenset(on_chip), stays)


def granularities(length: int) -> list[tuple[str, int]]:
    """A head at a time, or some of its rows."""
    return [("head", TILE), *(("row", TILE * times) for times in (1, 2, 4) if TILE * times <= length)]


@functools.cache
def best_dataflow(e: int, f: int, length: int) -> Dataflow:
    """The dataflow that takes least time, then least traffic, of those that fit.

    Batches and heads are gone through one by one, so they change nothing. For every granularity and place of the
    scores, the best setting of the first product is found, then of the second: only what both have on chip joins them.
    What cannot be better is left out: where scores are off chip they are written and read, beside every tensor once.
    """
    model = Model(1, 1, e, f, e, e, length)
    least = 2 * (length * (2 * e + 2 * f))  # bytes of Q, K, V and AV
    scores = [frozenset(found) for found in (("QK", "A"), ("A",), ("QK",), ())]
    best: tuple[tuple[float, int], Dataflow] | None = None
    for on_chip, (granularity, rows) in itertools.product(scores, granularities(length)):
        if best is not None and best[0][1] <= least + 4 * length * length * (2 - len(on_chip)):
            continue
        here: tuple[tuple[float, int], Dataflow] | None = None
        flow = Dataflow(granularity, rows, on_chip, ("output", "output"))
        for number, tensors in enumerate((("Q", "K"), ("V", "AV"))):
            tried = [*settings(flow, number, tensors)] if number == 0 or here else []
            found = [(rank, each) for each in tried if (rank := cost_of(each, model)) is not None]
            here = min(found, key=lambda pair: pair[0], default=here)
            flow = here[1] if here else flow
        if here is not None and (best is None or here[0] < best[0]):
            best = here
    assert best is not None, "rows of scores off chip fit everywhere"
    return best[1]


def settings(flow: Dataflow, number: int, tensors: tuple[str, ...]) -> Iterator[Dataflow]:
    """A dataflow with every stationarity of one product, and its own tensors on chip or not."""
    for stays in STATIONARITIES:
        chosen = (stays, flow.stationarity[1]) if number == 0 else (flow.stationarity[0], stays)
        for count in range(len(tensors) + 1):
            for more in itertools.combinations(tensors, count):
                yield replace(flow, on_chip=flow.on_chip | set(more), stationarity=chosen)


@functools.cache
def flat_plan(flow: Dataflow) -> tuple[Evaluator, RegionPlan]:
    """The attention under a dataflow, planned: what binds Einsums to units is the same for all of them."""
    first = prepared("flat", flat_mapping(Dataflow("head", TILE, frozenset(), ("output", "output"))))
    return first, first.plan(flat_mapping(flow), 0)


def cost_of(flow: Dataflow, model: Model) -> tuple[float, int] | None:
    """Seconds and bytes of memory of the attention under a dataflow; None where it does not fit."""
    found, plan = flat_plan(flow)
    try:
        region = found.region_cost(plan, sizes_of("three_pass", model))
    except UnsupportedError:
        return None
    return region.seconds, region.movement.bytes


def search_dataflow(model: Model) -> Dataflow:
    """The best dataflow of FLAT for a model."""
    return best_dataflow(model.e, model.f, model.length)


# --- what was published otherwise ------------------------------------------------------------------------------------

WORDS = {
    "one_lane": "registers are charged for one lane of an array, not for all that work",
    "free": "no energy is charged for {}",
    "unbuffered": "the buffer is not charged for {}",
    "read_once": "what several Einsums read of {} is charged once",
    "read_again": "a whole {} is charged one more read than anything makes of it",
}


def differences(config: str, model: Model, dataflow: Dataflow | None = None) -> list[tuple[str, float]]:
    """What the published evaluation of a configuration counts in another way, and what each does to energy alone."""
    mapped = mapping_of(config, model, dataflow)
    sizes = sizes_of(CASCADES[config], model)
    corrected = prepared(config, mapped).cost(sizes).energy_pj or 0.0
    found = []
    for name, words in WORDS.items():
        value = getattr(mapped.published, name)
        if value:
            alone = replace(mapped, published=replace(Published(), **{name: value}))
            energy = prepared(config, alone).cost(sizes, as_published=True).energy_pj or 0.0
            what = words if value is True else words.format(", ".join(value))
            found.append((what, energy / corrected - 1.0))
    return found
