"""Extents that change from call to call: how many kernels they take, and that results stay right."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import cascade
from benchmarks import launching, programs
from cascade.backends.triton import launch
from cascade.backends.triton.launch import Bench, CallPlan, KernelStep, Launcher, allocated, layout
from cascade.backends.triton.planner import LONG_SUM
from cascade.inference import bind_sizes
from tests.block_programs import BLOCKS
from tests.kernel_programs import PROGRAMS, Program
from tests.planned import OnAnH200
from tests.tolerance import Draw, confirmed

PRODUCT = "cascade product(X[T,D], W[D,F]) -> Y[T,F] { Y[t,f] = sum[d] X[t,d] * W[d,f] }"
CAUSAL = programs.attention(where="n <= m")


def plans(compiled: Any) -> list[CallPlan]:
    """The plans of every kind of call, in the order they were made."""
    (launcher,) = compiled._launchers.values()
    return list(launcher.plans.values())


def texts(compiled: Any) -> set[str]:
    """The kernels of all calls."""
    return {step.source.text for plan in plans(compiled) for step in plan.steps if isinstance(step, KernelStep)}


@pytest.mark.parametrize("lengths", [(256, 300, 37, 900, 1500, 2, 3000), (1, 2, 3, 17, 64, 65, 100)])
def test_rows_of_many_lengths_take_two_kernels(lengths: tuple[int, ...]) -> None:
    compiled: Any = cascade.compile(programs.SOFTMAX, backend="triton")
    for length in lengths:
        x = torch.randn(3, length)
        assert torch.allclose(compiled(X=x).double(), torch.softmax(x.double(), -1), atol=1e-6)
    assert len(texts(compiled)) == 2  # the first length has its own


@pytest.mark.parametrize(("lengths", "most"), [((64, 101, 138, 249, 400), 1), ((1, 2, 31, 130, 16), 2)])
def test_streams_of_many_lengths_take_few_kernels(lengths: tuple[int, ...], most: int) -> None:
    compiled: Any = cascade.compile(CAUSAL, backend="triton")
    for length in lengths:
        attends(compiled, length, 32)
    found = {tuple(s.source.text for s in plan.steps if isinstance(s, KernelStep)) for plan in plans(compiled)[1:]}
    assert len(found) <= most  # beside those of the first length


def attends(compiled: Any, length: int, width: int) -> None:
    """One call against PyTorch's own."""
    q, k, v = (torch.randn(1, 2, length, width) for _ in range(3))
    right = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert torch.allclose(compiled(Q=q, K=k, V=v).double(), right, atol=1e-5)


def test_a_rank_that_tiles_hold_whole_is_not_supposed_to_be_longer() -> None:
    compiled: Any = cascade.compile(CAUSAL, backend="triton")
    for width in (16, 32, 80):
        attends(compiled, 40, width)
        assert len(plans(compiled)[-1].steps) == 1


@pytest.mark.parametrize("length", [64, 333])
def test_heads_that_share_keys_attend_at_every_width(length: int) -> None:
    """Sums that are none of matrices as planned for one width are such for many, and hold a rank whole."""
    program = PROGRAMS["decode"]
    compiled: Any = cascade.compile(program.text, backend="triton")
    for width in (16, 32, 24, 80, 64):
        draw = Draw(program, {**program.small, "N": length, "E": width, "F": width}, dtype=torch.float32)
        verdict = confirmed(compiled, cascade.compile(program.text).cascade, draw)
        assert verdict.ok, verdict


def test_many_batches_of_a_product_take_few_kernels() -> None:
    compiled: Any = cascade.compile(PRODUCT, backend="triton")
    w = torch.randn(48, 40)
    for rows in (8, 1, 2, 5, 16, 60, 64):
        x = torch.randn(rows, 48)
        assert torch.allclose(compiled(x, w).double(), x.double() @ w.double(), atol=1e-4)
    assert len(texts(compiled)) <= 3


def test_triton_compiles_anew_only_for_sizes_that_lanes_are_tested_against() -> None:
    """Whether the number of batches is a multiple of 16 makes no other kernel: it only says which one a program has."""
    compiled: Any = cascade.compile("cascade c(X[B,M,K]) -> Y[B,M] { Y[b,m] = sum[k] X[b,m,k] }", backend="triton")
    x = torch.randn(2, 5, 300)
    assert torch.allclose(compiled(X=x).double(), x.double().sum(-1), atol=1e-4)
    (text,) = texts(compiled)
    assert '\n@triton.jit(do_not_specialize=["B"])\ndef c(' in text and "k < K" in text and "m < M" in text


def test_tensors_lie_the_same_when_timed_and_when_called() -> None:
    """Strides are arguments that a kernel keeps from its first launch, which may be one that is timed."""
    device = torch.device("cpu")
    bench = Bench(device, "none", {}, ("Y",))
    for name in ("Y", "Z"):
        for shape in ((), (5,), (3, 1), (2, 7), (4, 16), (2, 3, 40)):
            found = bench.unset(name, shape, torch.float32)
            called = allocated(name, shape, torch.float32, device, ("Y",))
            assert found.stride() == called.stride() and found.shape == called.shape and bool(found.isnan().all())
            assert name != "Y" or found.is_contiguous()


def test_few_outputs_after_many_are_shared_by_enough_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that suit many outputs make one program of few: parts of what is summed over fill the device then."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    compiled = cascade.compile(PRODUCT)
    launcher = Launcher(compiled.trace.final, "none", compiled.cascade)
    for rows, over, columns in ((6_000_000, 333, 257), (16, 4_000_000, 64)):
        x, w = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((rows, over), (over, columns)))
        extents = {"T": rows, "D": over, "F": columns}
        planner = launcher.planner(extents, {"X": layout(x), "W": layout(w)}, descriptors=True)
        bench = OnAnH200(torch.device("meta"), "none", {"X": x, "W": w})
        steps = [step for step in launcher.steps(planner, "product", bench) if isinstance(step, KernelStep)]
    assert [step.kernel.name for step in steps] == ["product", "product_merge"]
    assert math.prod(steps[0].grid) >= 128


@pytest.mark.parametrize("first", [(127, 333, 257), (4000, 333, 4000)])
def test_no_program_of_few_adds_up_too_long(first: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was planned for: an accumulator of the tensor cores loses with each step what it cuts off."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    compiled = cascade.compile(PRODUCT)
    launcher = Launcher(compiled.trace.final, "none", compiled.cascade)
    for rows, over, columns in (first, (16, 33_000_000, 64)):
        x, w = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in ((rows, over), (over, columns)))
        planner = launcher.planner({"T": rows, "D": over, "F": columns}, {"X": layout(x), "W": layout(w)}, True)
        bench = OnAnH200(torch.device("meta"), "none", {"X": x, "W": w})
        product = next(iter(launcher.steps(planner, "product", bench)))
    assert isinstance(product, KernelStep) and over <= LONG_SUM * math.prod(product.grid)


@pytest.mark.parametrize("name", ["softmax", "attention"])
def test_a_length_that_changes_is_compiled_three_times(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Triton counts: by text, constants, which numbers are 1, which strides and sizes are multiples of 16."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    text, make, _, first = launching.CASES[name]
    compiled = cascade.compile(text)
    launcher = Launcher(compiled.trace.final, "none", compiled.cascade)
    seen = set()
    for length in range(first, first + 37 * 40, 37):
        inputs = make(length, torch.Generator().manual_seed(1))
        extents = bind_sizes(launcher.cascade, {key: tuple(value.shape) for key, value in inputs.items()}, {})
        planner = launcher.planner(extents, {key: layout(value) for key, value in inputs.items()}, descriptors=True)
        device = OnAnH200(torch.device("meta"), "none", dict(inputs))
        tensors = dict(inputs)
        for step in launcher.steps(planner, name, device):
            assert isinstance(step, KernelStep)
            results = [result.name for result in launcher.cascade.results]
            tensors |= {key: allocated(key, shape, dtype, device.device, results) for key, shape, dtype in step.made}
            seen.add((step.source.text, step.source.num_warps, step.source.num_stages, *specialised(step, tensors)))
    assert len(seen) <= 3


@pytest.mark.parametrize(
    ("program", "changed", "dtype"),
    [
        (PROGRAMS["shared_prefix"], {"B": 64, "H": 8, "L": 4096, "N": 512, "E": 128, "F": 128}, torch.float32),
        (BLOCKS["gated_block"], {"T": 5, "D": 521, "F": 131}, torch.float32),
        (BLOCKS["linear_divergence"], {"T": 37, "D": 1024, "F": 131}, torch.float32),
        (PROGRAMS["strided_convolution"], {"S": 300, "T": 150, "D": 65}, torch.float16),
    ],
)
def test_the_model_has_tiles_that_fit(
    program: Program, changed: dict[str, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a call of other sizes, so that extents are none of the kernel's numbers."""
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    compiled = cascade.compile(program.text)
    launcher = Launcher(compiled.trace.final, "none", compiled.cascade)
    for sizes in (program.small, {**program.small, **changed}):
        draw = Draw(program, sizes, dtype=dtype)
        inputs = draw.inputs(0)
        shapes = {key: tuple(value.shape) for key, value in inputs.items()}
        extents = bind_sizes(launcher.cascade, shapes, draw.given())
        planner = launcher.planner(extents, {key: layout(value) for key, value in inputs.items()}, descriptors=True)
        assert list(launcher.steps(planner, program.name, OnAnH200(torch.device("meta"), "none", dict(inputs))))
        for choice in launcher.choices.values():
            assert choice.estimate.blocks_per_sm > 0 and "none that fits" not in choice.how, choice.tiling


def specialised(step: KernelStep, tensors: dict[str, torch.Tensor]) -> Iterator[object]:
    """What of a launch's numbers Triton compiles in."""
    free = re.search(rf"do_not_specialize=\[(.*?)\]\)\ndef {step.source.kernel}\(", step.source.text)
    for argument in step.source.arguments:
        value = {
            "constant": argument.value,
            "size": step.extents.get(argument.symbol),
            "stride": tensors[argument.tensor].stride(argument.position) if argument.kind == "stride" else None,
        }.get(argument.kind)
        if argument.kind == "constant":
            yield value
        elif value is not None and not (free and f'"{argument.name}"' in free[1]):
            yield value == 1, value % 16 == 0
