"""Parameters that seldom change: what is kept of them, when it is computed anew, and that results are the same."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cascade
from cascade.backends.triton.constants import divided
from cascade.backends.triton.kept import Kept
from cascade.errors import CallError, CascadeError
from cascade.frontend.build import parse_cascade
from cascade.inference import infer_shapes
from cascade.interp import run
from cascade.ir import DType
from cascade.pipeline import run_pipeline
from cascade.text import render_stmt
from cascade.verify import verify
from tests.generate import random_cascade

RMS = "cascade c(X[T,D], g[D], W[F,D]) -> Y[T,F] { N[t,d] = rmsnorm[d](X[t,d], g[d]); Y[t,f] = sum[d] N[t,d] * W[f,d] }"
LAYER = """cascade c(X[T,D], g[D], W[F,D]) -> Y[T,F] {
    U[t]   = sum[d] X[t,d] / D
    S[t]   = sum[d] (X[t,d] - U[t]) * (X[t,d] - U[t]) / D
    Y[t,f] = sum[d] (X[t,d] - U[t]) * rsqrt(S[t] + 1e-6) * g[d] * W[f,d]
}"""
BYTES = "cascade c(X[T,D], s[F], W: i8[F,D]) -> Y[T,F] { Y[t,f] = sum[d] X[t,d] * (W[f,d] * s[f]) }"
TURNED = "cascade c(X[T,D], g[D]) -> Y[T,D] { G[t,d] = g[d] * t; H[d] = exp(g[d]); Y[t,d] = X[t,d] * G[t,d] + H[d] }"
LARGEST = "cascade c(X[T,D], W[F,D]) -> Y[T,F], M[F] { M[f] = max[d] W[f,d]; Y[t,f] = sum[d] X[t,d] * W[f,d] / M[f] }"
ROWS = "cascade c(X[T,D], W[N,D], I: i32[T]) -> Y[T] { P[n,d] = softmax[d] W[n,d]; Y[t] = sum[d] X[t,d] * P[I[t],d] }"
CASES = {"rms": (RMS, "gW"), "layer": (LAYER, "gW"), "gain": (LAYER, "g"), "turned": (TURNED, "g"),
         "largest": (LARGEST, "W"), "rows": (ROWS, "W"), "bytes": (BYTES, "Ws")}  # fmt: skip
SIZES = {"T": 24, "D": 32, "F": 48, "N": 5}


def given(text: str, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Random tensors for a program."""
    found = {}
    for param in parse_cascade(text).params:
        shape = [SIZES[str(size)] for size in param.shape]
        if param.dtype is None:
            found[param.name] = torch.randn(shape).to(dtype)
        else:
            whole = torch.int8 if param.dtype is DType.I8 else torch.int32
            found[param.name] = torch.randint(0, 5, shape).to(whole)
    return found


def exact(text: str, tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """The results in float64."""
    inputs = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return tuple(run(parse_cascade(text), inputs, {}).values())


def results(function: Callable[..., Any], tensors: dict[str, Tensor]) -> tuple[Tensor, ...]:
    found = function(**tensors)
    return found if isinstance(found, tuple) else (found,)


def parts(text: str, constant: str, kind: DType = DType.BF16) -> Any:
    """A program in two."""
    final = run_pipeline(parse_cascade(text)).final
    return divided(final, SIZES, {p.name: p.dtype or kind for p in final.params}, constant)


def made(text: str, constant: str, kind: DType = DType.BF16) -> list[str]:
    """What is made once."""
    found = parts(text, constant, kind)
    return [] if found is None else [render_stmt(stmt) for stmt in found.once.body]


def test_a_gain_goes_into_the_weights_and_their_sums_are_kept() -> None:
    right = "Y_sum_right[f,d] = cast(W[f,d] * g[d], bf16)"
    assert made(RMS, "gW") == [right]
    assert made(LAYER, "gW") == [right, "Y_sum_1[f] = sum[d] Y_sum_right[f,d]"]
    assert [r.dtype for r in parts(LAYER, "gW").once.results] == [DType.BF16, DType.F32], "sums are not rounded"


def test_what_is_longer_than_what_it_is_made_of_is_not_kept() -> None:
    assert made(BYTES, "Ws") == []
    outer = "cascade c(X[T,D], u[F], v[D]) -> Y[T,F] { O[f,d] = u[f] + v[d]; Y[t,f] = sum[d] X[t,d] * O[f,d] }"
    assert made(outer, "uv") == []


def test_what_needs_more_than_constants_is_computed_in_every_call() -> None:
    assert made(RMS, "W") == made(LAYER, "g") == []
    assert made(TURNED, "g", DType.F32) == ["H[d] = exp(g[d])"], "t is a coordinate of what changes"
    assert made(LARGEST, "W") == [], "a result is written in every call"


@pytest.mark.parametrize("case", CASES)
def test_both_parts_together_are_the_program(case: str) -> None:
    text, constant = CASES[case]
    found = parts(text, constant, DType.F64)
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in given(text).items()}
    if found is None:
        return
    verify(found.once)
    verify(found.rest)
    kept = run(found.once, {p.name: tensors[p.name] for p in found.once.params}, {})
    again = tuple(run(found.rest, {**tensors, **kept}, {}).values())
    for one, other in zip(again, exact(text, tensors), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_with_constants(case: str, dtype: torch.dtype) -> None:
    text, constant = CASES[case]
    function = cascade.compile(text, backend="triton", constant=tuple(constant))
    tensors = given(text, dtype)
    bound = {"rtol": 1e-4, "atol": 1e-4} if dtype is torch.float32 else {"rtol": 0.05, "atol": 0.1}
    for _ in range(3):
        tensors["X"] = torch.randn(tensors["X"].shape).to(dtype)
        for one, other in zip(results(function, tensors), exact(text, tensors), strict=True):
            torch.testing.assert_close(one.double(), other, **bound)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many times something was computed to be kept: the length of the list."""
    calls: list[int] = []
    before = Kept.compute

    def compute(self: Kept, *args: Any) -> dict[str, Tensor]:
        calls.append(1)
        return before(self, *args)

    monkeypatch.setattr(Kept, "compute", compute)
    return calls


def test_it_is_computed_once_for_each_version(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    function = cascade.compile(LAYER, backend="triton", constant=("g", "W"))
    tensors = given(LAYER)

    def right() -> None:
        torch.testing.assert_close(function(**tensors).double(), exact(LAYER, tensors)[0], rtol=1e-4, atol=1e-4)

    for _ in range(3):
        right()
    assert len(calls) == 1
    tensors["W"].mul_(2)
    right()
    right()
    assert len(calls) == 2
    with torch.no_grad():
        tensors["g"][3] = 7.0
    right()
    assert len(calls) == 3
    tensors["W"] = tensors["W"].clone()  # another tensor, of the same version as one before
    right()
    assert len(calls) == 4
    tensors["X"] = torch.randn(7, SIZES["D"])  # other rows, the same weights
    right()
    assert len(calls) == 4


def test_layers_that_share_a_function_keep_what_is_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = counted(monkeypatch)
    function = cascade.compile(RMS, backend="triton", constant=("g", "W"))
    layers = [given(RMS) for _ in range(3)]
    for _ in range(3):
        for tensors in layers:
            torch.testing.assert_close(function(**tensors).double(), exact(RMS, tensors)[0], rtol=1e-4, atol=1e-4)
    assert len(calls) == 3
    (launcher,) = function._launchers.values()
    ((_, kept),) = launcher.parts.values()
    assert len(kept.made) == 3
    layers.clear()
    del tensors
    gc.collect()
    assert not kept.made, "what is kept lives as long as its constants"


def test_a_tensor_in_the_place_of_one_that_is_gone_is_another() -> None:
    function = cascade.compile(RMS, backend="triton", constant=("g", "W"))
    tensors = given(RMS)
    for seed in range(3):  # memory is often given out again at the same address
        tensors["W"] = torch.full((SIZES["F"], SIZES["D"]), float(seed))
        torch.testing.assert_close(function(**tensors).double(), exact(RMS, tensors)[0], rtol=1e-4, atol=1e-4)


def test_explain_says_what_is_kept() -> None:
    function = cascade.compile(RMS, backend="triton", constant=("g", "W"))
    function(**given(RMS))
    assert "Y_sum_right: once for each version of g, W" in function.explain()
    plain = cascade.compile(BYTES, backend="triton", constant=("W", "s"))
    plain(**given(BYTES))
    assert "nothing is kept of W, s" in plain.explain()
    assert function.sources().keys() > plain.sources().keys() or len(function.sources()) > 1


@pytest.mark.parametrize(
    ("constant", "in_place", "message"),
    [
        (("Wx",), {}, "constant: c has no parameter 'Wx'"),
        (("K",), {"C": "K"}, "constant: K changes in every call: C is written in its place"),
    ],
)
def test_what_cannot_be_constant(constant: tuple[str, ...], in_place: dict[str, str], message: str) -> None:
    text = "cascade c(X[N], K[N], W[N]) -> C[N] { C[n] = K[n] + X[n] * W[n] }"
    with pytest.raises(CallError) as caught:
        cascade.compile(text, constant=constant, in_place=in_place)
    assert caught.value.diagnostics[0].code == "C344" and message in str(caught.value)


def test_a_tensor_without_versions_is_refused() -> None:
    function = cascade.compile(RMS, backend="triton", constant=("g", "W"))
    tensors = given(RMS)
    with torch.inference_mode():
        tensors["W"] = torch.randn(SIZES["F"], SIZES["D"])
        with pytest.raises(CallError, match="made in inference mode") as caught:
            function(**tensors)
    assert caught.value.diagnostics[0].code == "C344"


def test_random_cascades_are_the_same_in_two() -> None:
    done = 0
    for seed in range(160):
        try:
            cascade_of = run_pipeline(random_cascade(seed)).final
        except CascadeError:
            continue
        rng = random.Random(seed)
        shapes = [param.shape for param in cascade_of.params]
        sizes = {str(size): rng.choice((2, 3, 5)) for shape in shapes for size in shape if isinstance(size, str)}
        if not {size for size in infer_shapes(cascade_of).ranks.values() if isinstance(size, str)} <= set(sizes):
            continue
        kinds = {param.name: param.dtype or DType.F64 for param in cascade_of.params}
        chosen = [name for name in kinds if rng.random() < 0.6]
        found = divided(cascade_of, sizes, kinds, chosen) if set(kinds.values()) == {DType.F64} else None
        if found is None:
            continue
        tensors = {
            param.name: torch.rand([size if isinstance(size, int) else sizes[size] for size in param.shape]).double()
            for param in cascade_of.params
        }
        try:
            whole = run(cascade_of, tensors, {})
        except CascadeError:  # an index from data
            continue
        kept = run(found.once, {param.name: tensors[param.name] for param in found.once.params}, {})
        again = run(found.rest, {**tensors, **kept}, {})
        for name, expected in whole.items():
            torch.testing.assert_close(again[name], expected, rtol=1e-9, atol=1e-9, equal_nan=True)
        done += 1
    assert done >= 15
