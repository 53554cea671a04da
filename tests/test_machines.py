"""The modelled machines of the pages in `docs`, against figures by hand: units beside memory, arrays of filter rows."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest

from cascade.backends.systolic.cost import Evaluator
from cascade.backends.systolic.machine import machine
from cascade.backends.systolic.search import search
from examples.machines.ways import Way, lanes, ways

FOLDER = Path(__file__).parent.parent / "examples" / "machines"


def way(file: str, name: str | None = None, mapping: str | None = None) -> Way:
    """The Einsums of an example as written, searched or under a mapping."""
    every = ways((FOLDER / file).read_text(), name, [str(FOLDER / mapping)] if mapping else [])
    return every[-1] if mapping else every[0]


# --- units beside memory ---------------------------------------------------------------------------------------------

BESIDE = {"duplex-like": ("beside", "matrix"), "neupims-like": ("banks", "npu")}


def by_hand(on: str, unit: str, products: float, values: float) -> float:
    """Seconds of products on a unit by operations a byte alone: the longer of computing and moving 16-bit values."""
    chosen = machine(on)
    found = chosen.units[unit]
    rate = found.lanes / found.operations["mac"].cycles * chosen.clock_hz
    return max(products / rate, 2 * values / chosen.memories[found.memory].bandwidth)


def expected(on: str, products: float, values: float) -> str | None:
    """The unit with less time; None where they are within a fiftieth of each other."""
    near, far = (by_hand(on, unit, products, values) for unit in BESIDE[on])
    return None if abs(near - far) < 0.02 * far else BESIDE[on][near > far]


@pytest.mark.parametrize("on", BESIDE)
def test_weights_for_few_tokens_stay_beside_memory(on: str) -> None:
    seen = []
    for tokens in (1, 2, 4, 8, 12, 20, 24, 28, 40, 64, 128):
        sizes = {"T": tokens, "D": 2048, "F": 4096}
        found = way("projection.cascade").cost(on, sizes).einsums["Y"].unit
        values = tokens * 2048 + 2048 * 4096 + tokens * 4096
        wanted = expected(on, tokens * 2048 * 4096, values)
        assert wanted in (None, found), (tokens, found)
        seen.append(found)
    assert [unit for unit, _ in itertools.groupby(seen)] == list(BESIDE[on])  # one change, from near to far


@pytest.mark.parametrize("on", BESIDE)
def test_experts_with_few_tokens_stay_beside_memory(on: str) -> None:
    for tokens in (1, 4, 8, 40, 96):
        sizes = {"N": 8, "C": tokens, "D": 1024, "F": 2048}
        found = way("experts.cascade").cost(on, sizes)
        wanted = expected(on, 8 * tokens * 1024 * 2048, 8 * (tokens * 1024 + 1024 * 2048 + tokens * 2048))
        assert {found.einsums["H_sum"].unit, found.einsums["Y"].unit} == {wanted}, tokens


@pytest.mark.parametrize("on", BESIDE)
def test_attention_of_one_token_stays_beside_memory_and_a_prompt_does_not(on: str) -> None:
    cache = {"B": 4, "G": 2, "R": 1, "N": 2048, "E": 128, "F": 128}
    fused = ways((FOLDER / "decode.cascade").read_text())[1]
    assert {fused.cost(on, cache).einsums[name].unit for name in ("S", "O_sum")} == {BESIDE[on][0]}
    prompt = {"B": 1, "H": 2, "M": 2048, "N": 2048, "E": 128, "F": 128}
    fused = ways((FOLDER / "attention.cascade").read_text(), "causal")[1]
    assert BESIDE[on][1] in {fused.cost(on, prompt).einsums[name].unit for name in ("S", "O_sum")}


def test_units_in_one_region_load_on_paths_of_their_own() -> None:
    """What the vector unit adds to a region of products in banks does not move the cache to the processor's path."""
    decode = ways((FOLDER / "decode.cascade").read_text())[1].cascaded
    chosen, sizes = machine("neupims-like"), {"B": 4, "G": 2, "R": 1, "N": 2048, "E": 128, "F": 128}
    cost = Evaluator(decode, chosen, search(decode, chosen, sizes)).cost(sizes)
    cache = 2 * 2 * 4 * 2 * 2048 * 128
    assert sum(region.movement.by_memory.get("banks", 0) for region in cost.regions) >= cache
    assert sum(region.movement.by_memory.get("hbm", 0) for region in cost.regions) < cache / 16


# --- rows of filters -------------------------------------------------------------------------------------------------

LAYERS = [(32, 112), (128, 56), (256, 28), (512, 14), (1024, 7)]
ARRAYS = {16: "row-stationary-16.toml", 64: "row-stationary-64.toml"}


def used(name: str, mapping: str, array: int, sizes: dict[str, int]) -> float:
    """The share of the array's elements at work."""
    evaluator = way("mobilenet.cascade", name, mapping).evaluator(str(FOLDER / ARRAYS[array]), sizes)
    return lanes(evaluator, evaluator.cost(sizes))["pe"]


@pytest.mark.parametrize("array", ARRAYS)
def test_lanes_of_depthwise_layers_by_hand(array: int) -> None:
    """An element is at work if a filter row and an image row meet in it; walked over every load of the array."""
    for channels, length in LAYERS:
        sizes = {"C": channels, "P": length, "Q": length, "R": 3, "S": 3}
        work, loads = 0, 0
        for first in range(0, channels, 64):
            count = min(64, channels - first)
            for row in range(0, 3 * count, array):
                for column in range(0, length, array):
                    work += min(array, 3 * count - row) * min(array, length - column)
                    loads += array * array
        assert used("depthwise", "channels.toml", array, sizes) == pytest.approx(work / loads)
        tile = math.ceil(16 * length / array) * array
        assert used("depthwise", "filter-rows.toml", array, sizes) == pytest.approx(3 * 16 * length / tile / array)


def test_a_large_array_is_wasted_on_depthwise_layers_only() -> None:
    for channels, length in LAYERS[2:]:
        shape = {"C": channels, "P": length, "Q": length}
        small, large = (used("depthwise", "channels.toml", array, shape | {"R": 3, "S": 3}) for array in ARRAYS)
        assert large <= 0.5 * small + 1e-9
        assert used("pointwise", "dense.toml", 64, shape | {"K": channels}) > 0.95


# --- one task after another, or all at once --------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "out"), [(4096, 64), (4096, 512), (65536, 64), (65536, 512)])
def test_sequential_or_dataflow_by_hand(tokens: int, out: int) -> None:
    """Tasks in turn on all lanes, what has no room going out and in; or the longer task on half of the lanes."""
    sizes = {"T": tokens, "D": 64, "F": 1024, "G": out}
    on = machine(str(FOLDER / "reconfigurable.toml"))
    first, second, between = tokens * (64 + 1) * 1024, tokens * 1024 * out, 2 * tokens * 1024
    ends = 2 * tokens * (64 + out) + 2 * 1024 * (64 + out)
    beside = 2 * 1024 * (64 + out) + 2 * 256 * 64  # both weights, and a tile of X
    spilled = max(0, between + beside - on.buffer.bytes)
    rate, bandwidth = 65536 * on.clock_hz, on.memories["dram"].bandwidth
    sequential = max((first + second) / rate, (ends + 2 * spilled) / bandwidth)
    dataflow = max(first / (rate / 2), second / (rate / 2), ends / bandwidth)
    found = [
        way("chain.cascade", None, f"{name}.toml").cost(str(FOLDER / "reconfigurable.toml"), sizes)
        for name in ("sequential", "dataflow")
    ]
    assert [cost.seconds for cost in found] == pytest.approx([sequential, dataflow], rel=1e-3)
    assert (found[0].seconds < found[1].seconds) == (sequential < dataflow)
