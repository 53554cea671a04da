"""Machine and mapping files with something wrong: every outcome is a cost or one error that says what and where.

A field of a shipped file is taken out, renamed, given another type, a number at or beyond its range, or text that means
something elsewhere. What is refused names the path of a field, its value and what would fit, or the region and the
bytes it lacks; nothing else is raised, nothing is run, and what is accepted is a finite cost.
"""

from __future__ import annotations

import copy
import json
import math
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.backends.systolic.cost import Cost, Evaluator
from cascade.backends.systolic.machine import from_tables, machine, parse_machine, shipped
from cascade.backends.systolic.mapping import parse_mapping
from cascade.backends.systolic.search import search
from cascade.backends.systolic.work import Cascaded, take_apart
from cascade.compiled import from_text
from cascade.errors import CascadeError
from cascade.pipeline import run_pipeline

ROOT = Path(__file__).parent.parent
REPRODUCTION = ROOT / "examples" / "fusemax_reproduction"
CASCADES = (REPRODUCTION / "cascades.cascade").read_text()
MAPPINGS = {
    "unfused": ("three_pass", "unfused"), "cascade": ("one_pass", "flat"), "architecture": ("one_pass", "fusemax"),
    "fusemax": ("one_pass", "fusemax"), "linear": ("linear", "fusemax"),
}  # fmt: skip
SIZES = {
    "three_pass": {"B": 2, "H": 2, "M": 512, "P": 256, "E": 16, "F": 16},
    "one_pass": {"B": 2, "H": 2, "M1": 4, "M0": 128, "P": 256, "E": 16, "F": 16},
    "linear": {"T": 256, "D": 64, "A": 64, "S": 128},
}
CODES = {"C540", "C541", "C605", "C620", "C621", "C622"}


def cascaded(name: str) -> Cascaded:
    """A cascade of the reproduction, taken apart."""
    return take_apart(run_pipeline(from_text(CASCADES, "test", name).cascade, "canonicalize").final)


APART = {name: cascaded(name) for name in SIZES}
SMALL = take_apart(
    run_pipeline(
        from_text(
            "cascade p(A[M,K], B[K,N]) -> C[M,N] {\n C[m,n] = relu(sum[k] A[m,k] * B[k,n])\n}", "test", None
        ).cascade
    ).final
)

# --- mutations -------------------------------------------------------------------------------------------------------

NUMBERS = [0, 1, -1, 1.5, 2**31, 2**60, 2**61, 10**30, 1e308, math.inf, -math.inf, math.nan, 1e-300]
OTHERS = [True, False, "", "x", "fit", "dram", "tile", "all", "../x", "__import__('os')", [], {}, [1], ["x"], {"x": 1}]
LOOPS = [
    "m = 0",
    "m = -1",
    "m = fit",
    "q = 1",
    "p = 3",
    "m: p = 2",
    "m = 1; n = 2",
    "p = 999999999999999999999",
    "b = 7",
]
anything = st.sampled_from([*NUMBERS, *OTHERS]) | st.integers() | st.floats() | st.text(max_size=8)


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in nested tables and lists."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for key, part in inner for path in paths(part, (*at, key)))]


@st.composite
def mutated(draw: st.DrawFn, tables: dict[str, Any]) -> dict[str, Any]:
    """The tables with one to three places changed."""
    found = copy.deepcopy(tables)
    for _ in range(draw(st.integers(1, 3))):
        *outer, last = draw(st.sampled_from(paths(found)[1:]))
        holder = found
        for key in outer:
            holder = holder[key]
        kind = draw(st.sampled_from(("set", "set", "set", "take out", "double", "rename")))
        old = holder[last]
        if kind == "take out":
            del holder[last]
        elif kind == "rename" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["x", f"{last}s", "clock", "mac", "2d"]))] = holder.pop(last)
        elif kind == "double" and isinstance(old, (int, float, list)):
            holder[last] = old * 2
        elif isinstance(old, str):
            holder[last] = draw(st.sampled_from([*LOOPS, "Q", "QK", "1d", "2d", "b"]) | anything)
        else:
            holder[last] = draw(anything)
        if not paths(found)[1:]:
            break
    return found


def toml(value: Any) -> str:
    """A value as TOML text, tables inline."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(key)} = {toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def written(tables: dict[str, Any]) -> str:
    """Tables as a TOML file."""
    return "\n".join(f"{toml(key)} = {toml(part)}" for key, part in tables.items())


def outcome(run: Any) -> Cost | None:
    """A cost whose figures are numbers, or None for one error of the kinds that there are for it."""
    try:
        cost: Cost = run()
    except CascadeError as error:
        (finding,) = error.diagnostics
        assert finding.code in CODES, finding
        assert len(finding.message) < 400, finding
        told(finding.code, finding.message, finding.help)
        return None
    assert math.isfinite(cost.seconds) and cost.seconds >= 0 and cost.traffic >= 0
    assert all(0 <= share <= 1 + 1e-9 for share in cost.utilisation.values())
    return cost


def told(code: str, message: str, help: str | None) -> None:
    """A wrong field is named with its path and what fits there; what has no room with the bytes it lacks."""
    if code == "C621":
        assert re.search(r": \S+.* (is|are|has|means|two)\b", message), message
        assert help, message
    if code == "C540" and "loops of region" not in message:
        assert re.search(r"region '.*' needs \d+ bytes on chip: the buffer lacks \d+", message), message


TABLES = {
    name: tomllib.loads((ROOT / f"cascade/backends/systolic/machines/{name}.toml").read_text()) for name in shipped()
}


@settings(max_examples=400)
@given(data=st.data(), name=st.sampled_from(shipped()))
def test_a_changed_machine_is_costed_or_refused(data: st.DataObject, name: str) -> None:
    changed = data.draw(mutated(TABLES[name]))
    sizes = {"M": 24, "K": 8, "N": 16}

    text = written(changed)

    def run() -> Cost:
        on = parse_machine(text)
        return Evaluator(SMALL, on, search(SMALL, on, sizes)).cost(sizes)

    outcome(run)


@settings(max_examples=400)
@given(data=st.data(), name=st.sampled_from(sorted(MAPPINGS)))
def test_a_changed_mapping_is_costed_or_refused(data: st.DataObject, name: str) -> None:
    cascade, on = MAPPINGS[name]
    changed = data.draw(mutated(tomllib.loads((REPRODUCTION / f"{name}.toml").read_text())))
    text = written(changed)

    def run() -> Cost:
        return Evaluator(APART[cascade], machine(on), parse_mapping(text)).cost(SIZES[cascade], as_published=True)

    outcome(run)


@settings(max_examples=200)
@given(st.sampled_from(sorted(MAPPINGS)), st.data())
def test_a_file_cut_off_or_garbled_is_refused_or_costed(name: str, data: st.DataObject) -> None:
    cascade, on = MAPPINGS[name]
    text = (REPRODUCTION / f"{name}.toml").read_text()
    at = data.draw(st.integers(0, len(text)))
    put = data.draw(st.text(max_size=4))
    gone = data.draw(st.integers(0, 12))
    garbled = text[:at] + put + text[at + gone :]
    outcome(lambda: Evaluator(APART[cascade], machine(on), parse_mapping(garbled)).cost(SIZES[cascade]))


@pytest.mark.parametrize("name", sorted(MAPPINGS))
@pytest.mark.parametrize("bytes_", [1, 1000, 40_000])
def test_a_buffer_that_is_too_small_says_by_how_much(name: str, bytes_: int) -> None:
    """With the bytes that are said to be lacking the region fits, or another one is told of."""
    cascade, base = MAPPINGS[name]
    on = TABLES[base] | {"buffer": {**TABLES[base]["buffer"], "bytes": bytes_}}
    mapping = parse_mapping((REPRODUCTION / f"{name}.toml").read_text())
    regions: set[str] = set()
    for _ in range(len(mapping.regions) + 1):
        try:
            Evaluator(APART[cascade], from_tables(on), mapping).cost(SIZES[cascade])
            return
        except CascadeError as error:
            found = re.search(
                r"region '(.*)' needs \d+ bytes on chip: the buffer lacks (\d+)", error.diagnostics[0].message
            )
            assert found and found[1] not in regions
            regions.add(found[1])
            on["buffer"]["bytes"] += int(found[2])
    raise AssertionError("never fits")
