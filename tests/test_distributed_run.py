"""Plans on torch.distributed: gloo processes give what one device gives; what does not fit is refused, and a rank that
is gone is an error, never a hang."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import pytest
import torch

from cascade.backends.distributed.machine import node
from cascade.backends.distributed.plan import fingerprint, plan, plan_json, plan_of
from cascade.distributed import load
from cascade.errors import CallError
from cascade.interp import Precision, run
from cascade.ir import DType, Mesh, Shard
from cascade.passes.exchanges import by_rows, by_shards, scatter_gather
from cascade.passes.shard import stated
from cascade.passes.split_tokens import split
from cascade.placed import Collective, Kind, Program
from cascade.trial import param_types, random_inputs
from tests.ranks import SECONDS, SHORT, die, run_orders, run_plan, run_plans, run_programs, stall, start
from tests.test_distributed_plan import EXAMPLE, block
from tests.test_shard import ATTENTION, LAYER, RING, canonical, first, lifted
from tests.test_shard import SIZES as LAYER_SIZES
from tests.test_split_tokens import SIZES, tensor_parallel

SMALL = {"T": 7, "D": 4, "H": 8, "HK": 8, "E": 2, "F": 9}


def programs(devices: int) -> dict[str, Program]:
    """Programs that need every kind of collective."""
    keys = lifted(RING, Mesh("cp", devices), Shard("m", "cp"), Shard("t", "cp"))
    ring = stated(keys, {"H": 1, "M": 6, "N": 7, "E": 2, "F": 2})
    swap = "cascade c(X[A,B]) -> Y[A,B] { K[a,b] = 2 * X[a,b]\n Y[i,j] = 1 + K[i,j] }"
    largest = "cascade c(X[M,N]) -> G[M,2], I[M,2] { G[m,j], I[m,j] = topk[n, 2] X[m,n] }"
    cut = "cascade c(X[M,N]) -> Y[M] { Y[m] = max[n] X[m,n]  where n <= m }"
    fold = lifted(ATTENTION, Mesh("cp", devices), Shard("n", "cp"))
    layer = stated(canonical(LAYER, Mesh("tp", devices), Shard("f", "tp")), LAYER_SIZES)
    extremes = stated(canonical(cut, Mesh("p", devices), Shard("n", "p")), {"M": 5, "N": 9})
    return {
        "a layer in slices": split(tensor_parallel(devices), "t", (4,)),
        "a ring": by_shards(ring, first(ring, Kind.ALL_GATHER, "K")),
        "both ways": by_shards(ring, first(ring, Kind.ALL_GATHER, "K"), both_ways=True),
        "an all-to-all": stated(canonical(swap, Mesh("p", devices), Shard("a", "p"), Shard("j", "p")), {"A": 5, "B": 6}),
        "the largest": stated(canonical(largest, Mesh("p", devices), Shard("n", "p")), {"M": 3, "N": 9}),
        "what is absent": stated(canonical(cut, Mesh("p", devices), Shard("n", "p")), {"M": 3, "N": 9}),
        "rows go round": rows_round(layer, "S"),
        "rows go round in slices": split(rows_round(layer, "S"), "t", (4,)),
        "rows go both ways": rows_round(layer, "S", both_ways=True),
        "extremes go round": rows_round(extremes, "Y"),
        "states of a fold": stated(fold, {"H": 2, "M": 5, "N": 9, "E": 3, "F": 2}),
    }  # fmt: skip


def rows_round(program: Program, tensor: str, both_ways: bool = False) -> Program:
    """The partial results of a tensor scattered to its rows round a ring, and gathered."""
    program = scatter_gather(program, first(program, Kind.ALL_REDUCE, tensor), 0)
    return by_rows(program, first(program, Kind.REDUCE_SCATTER, tensor), both_ways)


@pytest.mark.parametrize("devices", [2, 4])
def test_processes_give_what_one_device_gives(devices: int) -> None:
    given, wanted = {}, {}
    for name, program in programs(devices).items():
        sizes = dict(program.sizes)
        inputs = random_inputs(program.cascade, sizes, param_types(program.cascade, DType.F64), 0)
        given[name] = program, inputs
        wanted[name] = run(program.cascade, inputs, sizes, Precision.REFERENCE)
    for found in start(devices, run_programs, given):
        assert not isinstance(found, str), found
        for name, results in found.items():
            for result, data in results.items():
                torch.testing.assert_close(data.double(), wanted[name][result].double(), rtol=1e-12, atol=1e-12)


def small_plan(cuts: str = "3") -> dict[str, Any]:
    text = EXAMPLE.read_text(encoding="utf-8").replace("mesh tp = 8", "mesh tp = 2")
    text = text.replace("shard f over tp", f"shard f over tp\n    split t at {cuts}")
    return json.loads(json.dumps(plan_json(plan(block(text), SMALL, node("h100x8")))))


def test_a_plan_made_elsewhere_runs() -> None:
    made = small_plan()
    assert made["split"] == {"rank": "t", "cuts": [3]}
    inputs = random_inputs(block(), SMALL, param_types(block(), DType.F32), 0)
    wanted = run(block(), inputs, SMALL, Precision.REFERENCE)["Y"]
    for found in start(2, run_plan, made, inputs):
        assert float((found["Y"].double() - wanted).abs().max()) <= 1e-6 * (1 + float(wanted.abs().max()))


@pytest.mark.parametrize("devices", [2, 4])
def test_a_plan_whose_rows_go_round_runs_from_its_json(devices: int) -> None:
    """In the order of its tasks, in which what is passed on stands beside what is computed."""
    program = programs(devices)["rows go round"]
    made = json.loads(json.dumps(plan_json(plan_of(program, node("h100x8")))))
    assert made["program"].count("shift S over tp by sum to 0") == devices
    inputs = random_inputs(program.cascade, LAYER_SIZES, param_types(program.cascade, DType.F32), 0)
    wanted = run(program.cascade, inputs, LAYER_SIZES, Precision.REFERENCE)["Y"]
    for found in start(devices, run_plan, made, inputs):
        assert float((found["Y"].double() - wanted).abs().max()) <= 1e-6 * (1 + float(wanted.abs().max()))


def test_ranks_with_two_plans_and_a_group_of_another_size_are_refused() -> None:
    one, other = small_plan(), small_plan("4")
    for found in start(2, run_plans, [one, other]):
        assert "C348" in found and "rank 1 has another plan" in found
    assert all("C348" in found for found in start(1, run_plans, [one]))


def test_a_plan_that_was_changed_is_refused() -> None:
    made = small_plan()
    for change in ({"version": 0}, {"hash": "0"}, {"machine": "h200x8"}, {"program": ""}, {"tasks": []}):
        with pytest.raises(CallError, match="C347"):
            load({**made, **change})
    with pytest.raises(CallError, match="C347"):
        load("{}")
    assert made["hash"] == fingerprint(block(made["cascade"]), SMALL, "h100x8")


def test_a_rank_that_is_gone_is_an_error_that_names_the_collective() -> None:
    program = dataclasses.replace(tensor_parallel(2))
    inputs = random_inputs(program.cascade, SIZES, param_types(program.cascade, DType.F64), 0)
    begun = time.monotonic()
    found = start(2, die, program, inputs)[0]
    assert isinstance(found, str) and "C349" in found and "rank 0: the collective" in found
    assert "rank 1 has not come to it" in found
    assert time.monotonic() - begun < 3 * SECONDS


def test_a_rank_that_does_not_come_is_named_within_the_timeout() -> None:
    program = tensor_parallel(2)
    inputs = random_inputs(program.cascade, SIZES, param_types(program.cascade, DType.F64), 0)
    begun = time.monotonic()
    found, late = start(2, stall, program, inputs)
    assert "C349" in found and "rank 1 has not come to it" in found and late == "late"
    assert time.monotonic() - begun < SHORT + SECONDS


@pytest.mark.parametrize("kernels", [False, True])
def test_a_rank_that_does_not_come_to_a_ring_is_named(kernels: bool) -> None:
    program = programs(2)["rows go round"]
    inputs = random_inputs(program.cascade, LAYER_SIZES, param_types(program.cascade, DType.F64), 0)
    begun = time.monotonic()
    found, late = start(2, stall, program, inputs, kernels)
    assert "C349" in found and "'shift S over tp by sum to 0 hop 1' failed" in found and late == "late"
    assert "rank 1 has not come to it" in found and time.monotonic() - begun < SHORT + SECONDS


def test_ranks_that_issue_collectives_in_another_order_are_refused() -> None:
    """One hash, and on rank 1 two collectives have changed places: the first that differs is named."""
    program = stated(
        lifted(RING, Mesh("cp", 2), Shard("m", "cp"), Shard("t", "cp")), {"H": 1, "M": 6, "N": 7, "E": 2, "F": 2}
    )
    order = list(range(len(program.steps)))
    swapped = [i for i, step in enumerate(program.steps) if isinstance(step, Collective)]
    other = [swapped[1] if i == swapped[0] else swapped[0] if i == swapped[1] else i for i in order]
    for found in start(2, run_orders, program, [order, other]):
        assert "C348" in found and "collective 0 is all-gather K" in found and "on rank 1" in found
