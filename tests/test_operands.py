"""Operands of products that are stored: which, what they mean, and what the kernels then give.

The witnesses: the interpreter on the cascade before and after, and torch in float64.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cascade
from cascade import interp
from cascade.backends.triton import operands
from cascade.backends.triton.operands import with_operands
from cascade.backends.triton.partition import Group
from cascade.backends.triton.plan import Load, every_op
from cascade.ir import DType, Einsum
from cascade.text import render_stmt
from cascade.values import Precision
from cascade.verify import verify
from tests.planned import final, planner_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RMS = """cascade c(X[T,D], g[D], W[F,D]) -> Y[T,F] {
 N[t,d] = X[t,d] * rsqrt(mean[d] X[t,d] * X[t,d] + 1e-6) * g[d]
 Y[t,f] = N[t,d] * W[f,d]
}"""
LAYER = """cascade c(X[T,D], g[D], W[F,D]) -> Y[T,F] {
 U[t] = mean[d] X[t,d]
 S[t] = mean[d] (X[t,d] - U[t]) * (X[t,d] - U[t])
 Y[t,f] = sum[d] (X[t,d] - U[t]) * rsqrt(S[t] + 1e-6) * g[d] * W[f,d]
}"""
GELU = "cascade c(X[T,D], W[D,F]) -> Y[T,F] { Y[t,f] = sum[d] gelu(X[t,d]) * W[d,f] }"
TWICE = """cascade c(X[T,D], A[D,F], B[D,F]) -> Y[T,F] {
 Y[t,f] = (sum[d] tanh(X[t,d]) * A[d,f]) * (sum[d] tanh(X[t,d]) * B[d,f])
}"""
SCALED = "cascade c(X[T,D], W: i8[F,D], s[F,G]) -> Y[T,F] { Y[t,f] = sum[d] X[t,d] * W[f,d] * s[f,d // 8] }"
FILTERED = "cascade c(X[T,D], m[T,D], W[D,F]) -> Y[T,F] { Y[t,f] = sum[d] X[t,d] * m[t,d] * W[d,f] where d <= t }"
CASES = {"rms": RMS, "layer": LAYER, "gelu": GELU, "twice": TWICE, "scaled": SCALED, "filtered": FILTERED}
SIZES = {"T": 21, "D": 40, "F": 33, "G": 5}


def inputs_of(text: str, dtype: torch.dtype) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)
    found: dict[str, Tensor] = {}
    for param in final(text).params:
        shape = [SIZES[str(size)] for size in param.shape]
        if param.dtype is DType.I8:
            found[param.name] = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
        else:
            found[param.name] = (torch.randn(shape, generator=generator) + 0.5).to(dtype)
    return found


def expected(name: str, given: Mapping[str, Tensor]) -> Tensor:
    x = {key: value.double() for key, value in given.items()}
    match name:
        case "rms":
            return F.rms_norm(x["X"], x["g"].shape, x["g"], 1e-6) @ x["W"].T
        case "layer":
            return F.layer_norm(x["X"], x["g"].shape, x["g"], None, 1e-6) @ x["W"].T
        case "gelu":
            return F.gelu(x["X"]) @ x["W"]
        case "twice":
            return (x["X"].tanh() @ x["A"]) * (x["X"].tanh() @ x["B"])
        case "scaled":
            return x["X"] @ (x["W"] * x["s"].repeat_interleave(8, 1)).T
    return torch.tril(x["X"] * x["m"]) @ x["W"]


def types_of(given: Mapping[str, Tensor], short: DType) -> dict[str, DType]:
    return {name: DType.I8 if value.dtype is torch.int8 else short for name, value in given.items()}


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Storing costs nothing."""
    monkeypatch.setattr(operands, "OPERATIONS", 0)


@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_changes_no_meaning(name: str, always: None) -> None:
    plain, given = final(CASES[name]), inputs_of(CASES[name], torch.float64)
    stored = with_operands(plain, SIZES, types_of(given, DType.F64), SIZES)
    verify(stored)
    assert len(stored.body) == len(plain.body) + 1  # once, for both products of `twice` too
    (before,), (after,) = (interp.run(it, given, precision=Precision.REFERENCE).values() for it in (plain, stored))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("name", CASES)
def test_kernels_of_stored_operands_compute_what_torch_does(name: str, dtype: torch.dtype, always: None) -> None:
    given = {key: value.to(DEVICE) for key, value in inputs_of(CASES[name], dtype).items()}
    call = cascade.compile(CASES[name], backend="triton")
    found, wanted = call(**given), expected(name, given)
    assert re.search(r"^  \w+_(left|right) is an operand made once", call.explain(), re.M)
    limit = 1e-5 if dtype is torch.float32 else 4e-3
    assert float((found.double() - wanted).norm() / wanted.norm()) < limit


@pytest.mark.parametrize("operations", [230, 0], ids=["computed", "stored"])
def test_terms_beyond_a_shorter_tensor_are_left_out(operations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales for 32 of 40 columns, and a map of the weights between: what has none is no term of the sum."""
    monkeypatch.setattr(operands, "OPERATIONS", operations)
    text = SCALED.replace("{ Y", "{ Q[f,d] = 0.5 * W[f,d]; Y").replace("* W[f,d] * s", "* Q[f,d] * s")
    given = inputs_of(SCALED, torch.float32)
    given["s"] = given["s"][:, :4].contiguous()
    call = cascade.compile(text, backend="triton")
    found = call(**{key: value.to(DEVICE) for key, value in given.items()})
    assert ("_right" in call.explain()) == (operations == 0)
    x = {key: value.double() for key, value in given.items()}
    wanted = x["X"][:, :32] @ (0.5 * x["W"][:, :32] * x["s"].repeat_interleave(8, 1)).T
    torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-5, atol=1e-4)


NIBBLES = "select(d % 2 == 0, P[f,d // 2] % 16, P[f,d // 2] // 16 % 16) - 8"
BYTES = {
    "column": "cascade c(X[T,D], W: i8[F,D], s[F]) -> Y[T,F] { Y[t,f] = sum[d] X[t,d] * W[f,d] * s[f] }",
    "group": SCALED,
    "nibbles": "cascade c(X[T,D], P: i8[F,E], s[F,G]) -> Y[T,F] "
    f"{{ Y[t,f] = sum[d] X[t,d] * cast({NIBBLES}, f16) * s[f,d // 8] }}",
}


TORCH_BYTES = {"i8": torch.int8, "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2}


@pytest.mark.parametrize("name", BYTES)
def test_weights_of_few_bits_are_widened_on_their_way_into_a_product(name: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, weights = torch.randn(19, 64, generator=generator).half(), torch.randint(-8, 8, (48, 64), generator=generator)
    scales = torch.rand(48, 1 if name == "column" else 8, generator=generator).half()
    packed = (weights + 8)[:, ::2] + 16 * (weights + 8)[:, 1::2]
    given = {"X": x, "s": scales[:, 0] if name == "column" else scales}
    given |= {"P": packed.to(torch.uint8).view(torch.int8)} if name == "nibbles" else {"W": weights.to(torch.int8)}
    call = cascade.compile(BYTES[name], backend="triton")
    found = call(**{key: value.to(DEVICE) for key, value in given.items()})
    assert "tl.dot" in "".join(call.sources().values()) and "_right[" not in call.explain()
    wanted = x.double() @ (weights * scales.double().repeat_interleave(64 // scales.shape[1], 1)).T
    assert float((found.double().cpu() - wanted).norm() / wanted.norm()) < 1e-3


@pytest.mark.parametrize("kind", ["i8", "f8e4m3", "f8e5m2"])
@pytest.mark.parametrize("result", ["f16", "f32"])
def test_bytes_are_stored_in_the_type_that_they_meet_and_lose_nothing(kind: str, result: str, always: None) -> None:
    generator = torch.Generator().manual_seed(5)
    weights = torch.randint(-8, 8, (48, 64), generator=generator).to(TORCH_BYTES[kind])
    given = {"X": torch.randn(19, 64, generator=generator).half(), "W": weights, "s": torch.rand(48).half()}
    text = BYTES["column"].replace("i8", kind).replace("Y[T,F]", f"Y: {result}[T,F]")
    call = cascade.compile(text, backend="triton")
    found = call(**{key: value.to(DEVICE) for key, value in given.items()})
    assert "_right[f,d] = cast(W[f,d], f16)" in "".join(call.sources().values())
    wanted = given["X"].double() @ (weights.double() * given["s"].double()[:, None]).T
    assert float((found.double().cpu() - wanted).norm() / wanted.norm()) < (1e-6 if result == "f32" else 1e-3)


def test_a_sum_of_products_of_bytes_is_exact() -> None:
    """It is an integer, and larger than what floats of 32 bits hold."""
    a, b = torch.full((20, 2001), 127, dtype=torch.int8), torch.full((2001, 24), 127, dtype=torch.int8)
    call = cascade.compile(
        "cascade c(A: i8[M,K], B: i8[K,N]) -> Y: i32[M,N] { Y[m,n] = sum[k] A[m,k] * B[k,n] }", backend="triton"
    )
    found = call(A=a.to(DEVICE), B=b.to(DEVICE))
    assert bool((found.cpu() == 127 * 127 * 2001).all()) and "tl.dot" not in "".join(call.sources().values())


def stored_at(text: str, sizes: Mapping[str, int]) -> dict[str, str]:
    """The statements that are new at some sizes, as text."""
    plain = final(text)
    types = {p.name: p.dtype or DType.BF16 for p in plain.params}
    new = [stmt for stmt in with_operands(plain, sizes, types, sizes).body if stmt not in plain.body]
    return {stmt.target.name: render_stmt(stmt) for stmt in new if isinstance(stmt, Einsum)}


def test_an_operand_is_stored_for_many_rows_and_computed_for_few() -> None:
    wide = {"D": 4096, "F": 4096}
    many = stored_at(RMS, {"T": 8192, **wide})
    assert (
        many["Y_sum_right"] == "Y_sum_right[f,d] = cast(W[f,d] * g[d], bf16)"
    )  # the smaller side: that of the weights
    assert many["Y_sum"] == "Y_sum[t,f] = sum[d] Y_sum_right[f,d] * X[t,d]"
    assert stored_at(RMS, {"T": 16, **wide}) == {}
    assert "Y_sum_left" in stored_at(RMS, {"T": 2048, "D": 8192, "F": 16384})


@pytest.mark.parametrize("kind", ["i8", "f8e4m3", "f8e5m2"])
def test_bytes_are_widened_once_for_many_rows_and_inside_the_product_for_few(kind: str) -> None:
    text, wide = BYTES["column"].replace("i8", kind), {"D": 4096, "F": 4096}
    assert stored_at(text, {"T": 8192, **wide})["Y_right"] == "Y_right[f,d] = cast(W[f,d], bf16)"
    assert stored_at(text, {"T": 16, **wide}) == {}
    exact = text.replace("X[T,D]", "X: f32[T,D]")  # widened to f32, to multiply off the matrix units
    assert stored_at(exact, {"T": 8192, **wide}) == {}


def test_what_scales_the_reduced_rank_goes_to_the_bytes_that_are_widened_anyway() -> None:
    text = "cascade c(X[T,D], g[D], W: i8[F,D]) -> Y[T,F] { Y[t,f] = sum[d] X[t,d] * g[d] * W[f,d] }"
    many = stored_at(text, {"T": 8192, "D": 4096, "F": 16384})  # though the other side has fewer elements
    assert many["Y_right"] == "Y_right[f,d] = cast(W[f,d] * g[d], bf16)"


def test_what_cancels_against_a_product_reads_what_it_reads() -> None:
    """The mean's part of a norm: weights rounded for the product and weights summed are the same."""
    many = stored_at(LAYER, {"T": 8192, "D": 4096, "F": 4096})
    assert many["Y_sum_1"] == "Y_sum_1[f] = sum[d] Y_sum_right[f,d]"


def test_a_matrix_that_meets_a_vector_beside_a_product_is_read_once() -> None:
    """And what merges the parts of both is one kernel: it moves so little that a launch would take longer."""
    sizes = {"X": (16, 4096), "g": (4096,), "W": (4096, 4096)}
    given = {name: torch.empty(shape, dtype=torch.float16) for name, shape in sizes.items()}
    planner = planner_for(final(LAYER), given)
    groups = planner.groups()
    group = next(g for g in groups if isinstance(g, Group) and "Y" in g.names)
    kernel = planner.kernel("c", group, groups, planner.default_tiling(group))
    assert [op.tensor for op in every_op(kernel.ops) if isinstance(op, Load)].count("W") == 1
    tiling = dataclasses.replace(planner.default_tiling(group), parts=2)
    assert len(planner.split("c", group, groups, tiling)[2]) == 1


def test_an_operand_keeps_its_digits_where_a_result_has_them() -> None:
    many = stored_at(RMS.replace("Y[T,F]", "Y: f32[T,F]"), {"T": 8192, "D": 4096, "F": 4096})
    assert many["Y_sum_right"] == "Y_sum_right[f,d] = cast(W[f,d] * g[d], f32)"


@pytest.mark.parametrize("operand", ["X[I[t],d] * g[d]", "X[t,d + 1] * g[d]"], ids=["picked", "moved"])
def test_what_may_lie_outside_of_a_tensor_is_not_stored(operand: str) -> None:
    text = f"cascade c(X[T,D], I: i32[T], g[D], W[D,F]) -> Y[T,F] {{ Y[t,f] = sum[d] {operand} * W[d,f] }}"
    plain = stored_at(text, {"T": 8192, "D": 4096, "F": 65536})
    assert plain == {}
