"""What a device computes of a task as a cascade of its own, and plans that run by compiled cascades on gloo processes.

The witness of a local cascade is the interpreter on the whole one: it is called with boxes of what that computed.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade import interp
from cascade.backends.distributed.local import local
from cascade.bounds import absent_tensors
from cascade.inference import infer_dtypes
from cascade.ir import DType, Mesh, Result
from cascade.passes.reach import Reach
from cascade.passes.shard import stated
from cascade.passes.split_tokens import split
from cascade.placed import Compute, Program, coordinates
from cascade.text import render_stmt
from cascade.trial import param_types, random_inputs
from cascade.values import Precision
from cascade.verify import verify
from cascade.walk import defines, reads
from tests.ranks import run_by_kernels, run_kernels_of, start
from tests.test_distributed_run import SMALL, block, programs, small_plan
from tests.test_shard import canonical
from tests.test_split_tokens import SIZES, tensor_parallel

many: Any = importlib.import_module("examples.10_many_devices")
BY_KERNELS = (
    "a layer in slices", "an all-to-all", "what is absent", "rows go round", "rows go round in slices", "rows go both ways",
    "extremes go round",
)  # fmt: skip
REFUSED = {
    "the largest": "cut along what it reduces",
    "states of a fold": "of which each device has a part only",
    "a ring": "of which each device has a part only",
}


def whole(program: Program, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Every tensor of a program, as one device computes it."""
    cascade = program.cascade
    shapes = Reach(cascade, dict(program.sizes)).shapes.tensors
    names = [name for stmt in cascade.body for name in defines(stmt)]
    every = tuple(Result(name, None, shapes[name]) for name in names)

    return {
        **inputs,
        **interp.run(dataclasses.replace(cascade, results=every), inputs, dict(program.sizes), Precision.REFERENCE),
    }


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_statements_on_a_device_are_boxes_of_what_one_device_computes(devices: int) -> None:
    """Every statement of a layer, in slices of tokens that are not even, with heads and hidden columns sharded."""
    program = split(tensor_parallel(devices), "t", (4,))
    inputs = random_inputs(program.cascade, SIZES, param_types(program.cascade, DType.F64), 0)
    tensors, reach = whole(program, inputs), Reach(program.cascade, SIZES)
    types = infer_dtypes(program.cascade, param_types(program.cascade, DType.F64))
    seen, absent = 0, absent_tensors(program.cascade, SIZES)
    for place in coordinates(program.axes):
        for step in program.steps:
            if isinstance(step, Compute):
                statements = reach.units[step.name].statements
                if {n for s in statements for n in (*defines(s), *reads(s))} & absent:
                    continue  # what is absent is not seen in memory
                found = local(program, reach, [step], place, lambda name, box: True, types, "task")
                verify(found.cascade)
                boxes = {p.name: tensors[p.tensor][tuple(slice(*w) for w in p.box)].double() for p in found.reads}
                results = interp.run(found.cascade, boxes, {}, Precision.REFERENCE)
                for piece in (piece for piece in found.writes if not piece.reducer):
                    wanted = tensors[piece.tensor][tuple(slice(*w) for w in piece.box)]
                    torch.testing.assert_close(results[piece.name], wanted, rtol=1e-12, atol=1e-12)
                    seen += 1
    assert seen > 10 * devices


def test_filters_and_computed_coordinates_count_from_the_beginning_of_the_cascade() -> None:
    text = "cascade c(Q[M], K[N], L[J]) -> S[M,N], G[M] { S[m,n] = Q[m] * K[n] where n <= m\n G[m] = L[m // 2] + m }"
    program = split(stated(canonical(text, Mesh("p", 1)), {"M": 8, "N": 8, "J": 4}), "m", (5,))
    reach, types = Reach(program.cascade, dict(program.sizes)), dict.fromkeys("QKLSG", DType.F32)
    steps = [step for step in program.steps if isinstance(step, Compute) and ("m", 5, 8) in step.at]
    texts = [
        render_stmt(stmt)
        for step in steps
        for stmt in local(program, reach, [step], {"p": 0}, lambda name, box: True, types, "t").cascade.body
    ]
    assert texts == ["S[m,n] = Q[m] * K[n] where n <= m + 5", "G[m] = L[(m+5)//2] + (m + 5)"]


@pytest.mark.parametrize("devices", [2, 4])
def test_processes_give_by_kernels_what_one_device_gives(devices: int) -> None:
    given, wanted = {}, {}
    for name, program in programs(devices).items():
        if name in BY_KERNELS:
            sizes = dict(program.sizes)
            inputs = random_inputs(program.cascade, sizes, param_types(program.cascade, DType.F64), 0)
            given[name] = program, inputs
            wanted[name] = interp.run(program.cascade, inputs, sizes, Precision.REFERENCE)
    assert given.keys() == set(BY_KERNELS)
    for found in start(devices, run_by_kernels, given):
        assert not isinstance(found, str), found
        for name, results in found.items():
            for result, data in results.items():
                torch.testing.assert_close(data.double(), wanted[name][result].double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("devices", [2, 4])
def test_examples_by_kernels(devices: int) -> None:
    """Those whose devices merge states of a softmax are refused, and so is what is absent behind an all-to-all."""
    refused = {"ring", "ring, both ways", "dispatch and combine"}
    for name, made in many.PROGRAMS.items():
        program = made(devices)
        inputs = random_inputs(program.cascade, dict(program.sizes), param_types(program.cascade, DType.F64), 0)
        wanted = interp.run(program.cascade, inputs, dict(program.sizes), Precision.REFERENCE)
        for found in start(devices, run_by_kernels, {name: (program, inputs)}):
            assert isinstance(found, str) is (name in refused), (name, found)
            if isinstance(found, str):
                assert "C555" in found
                continue
            for result, data in found[name].items():
                torch.testing.assert_close(data.double(), wanted[result].double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_kernel_is_refused_on_every_rank(name: str) -> None:
    program = programs(2)[name]
    inputs = random_inputs(program.cascade, dict(program.sizes), param_types(program.cascade, DType.F64), 0)
    for found in start(2, run_by_kernels, {name: (program, inputs)}):
        assert isinstance(found, str) and "C555" in found and REFUSED[name] in found


@pytest.mark.parametrize("backend", ["interp", "triton"])
def test_a_plan_runs_by_kernels_and_keeps_them(backend: str) -> None:
    made: dict[str, Any] = json.loads(json.dumps(small_plan()))
    inputs = random_inputs(block(), SMALL, param_types(block(), DType.F32), 0)
    wanted = interp.run(block(), inputs, SMALL, Precision.REFERENCE)["Y"]
    for found in start(2, run_kernels_of, made, inputs, backend):
        assert not isinstance(found, str), found
        assert found["compiled"] == found["compiled again"] > 0
        assert float((found["Y"].double() - wanted).abs().max()) <= 1e-5 * (1 + float(wanted.abs().max()))
