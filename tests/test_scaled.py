"""Scales of a product's rows and columns in its operands: where that is done, where not, and that results are right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import cascade
from cascade.backends.triton.scaled import with_scaled_operands
from cascade.frontend.build import parse_cascade
from cascade.interp import run
from cascade.ir import Cascade, DType, Result
from cascade.pipeline import run_pipeline
from cascade.text import render_stmt
from cascade.verify import verify
from tests.tolerance import judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NORMS = """cascade both(Q[M,H,E], g[E], K[N,H,E], k[E], V[N,H,E]) -> O[H,M,E] {
    A[m,h,e] = rmsnorm[e](Q[m,h,e], g[e]); C[n,h,e] = rmsnorm[e](K[n,h,e], k[e])
    S[h,m,n] = A[m,h,e] * C[n,h,e] / sqrt(E) where n <= m
    P[h,m,n] = softmax[n] S[h,m,n]; O[h,m,e] = P[h,m,n] * V[n,h,e] }"""
BYTES = """cascade bytes(Q: i8[M,E], q[M], K: i8[N,E], k[N], V[N,E]) -> O[M,E] {
    S[m,n] = (sum[e] Q[m,e] * K[n,e]) * q[m] * k[n] / E; P[m,n] = softmax[n] S[m,n]; O[m,e] = P[m,n] * V[n,e] }"""
BIASED = """cascade biased(Q[M,E], q[M], K[N,E], b[M,N], V[N,E]) -> O[M,E] {
    Z[m,n] = sum[e] Q[m,e] * K[n,e]; S[m,n] = Z[m,n] * exp(q[m]) * b[m,n]
    P[m,n] = softmax[n] S[m,n]; O[m,e] = P[m,n] * V[n,e] }"""
BESIDE = """cascade beside(Q[M,E], g[E], K[N,E], b[M,N], V[N,E]) -> O[M,E] {
    A[m,e] = rmsnorm[e](Q[m,e], g[e]); Z[m,n] = sum[e] A[m,e] * K[n,e]; S[m,n] = Z[m,n] * b[m,n]
    P[m,n] = softmax[n] S[m,n]; O[m,e] = P[m,n] * V[n,e] }"""
LINEAR = (
    "cascade c(X[M,E], g[E], W[N,E]) -> Y[M,N] { A[m,e] = rmsnorm[e](X[m,e], g[e]); Y[m,n] = sum[e] A[m,e] * W[n,e] }"
)
SIZES = {"M": 70, "N": 90, "H": 2, "E": 32}
LARGE = {"M": 8192, "N": 8192, "H": 8, "E": 128}
FEW = {"M": 1, "N": 65536, "H": 8, "E": 128}


def final(text: str) -> Cascade:
    return run_pipeline(parse_cascade(text)).final


def types(found: Cascade, kind: DType = DType.BF16) -> dict[str, DType]:
    return {param.name: param.dtype or kind for param in found.params}


def scaled(text: str, sizes: dict[str, int]) -> Cascade:
    found = final(text)
    return with_scaled_operands(found, sizes, types(found), sizes)


def made(text: str, sizes: dict[str, int]) -> list[str]:
    """The statements that are new."""
    before = {render_stmt(stmt) for stmt in final(text).body}
    return [line for stmt in scaled(text, sizes).body if (line := render_stmt(stmt)) not in before]


def given(text: str, kind: torch.dtype) -> dict[str, Tensor]:
    found = {}
    for param in parse_cascade(text).params:
        shape = [size if isinstance(size, int) else SIZES[size] for size in param.shape]
        whole = torch.randint(-4, 5, shape).to(torch.int8)
        found[param.name] = whole if param.dtype is DType.I8 else (torch.randn(shape) / 2).to(kind)
    return found


def test_norms_of_both_sides_go_into_operands() -> None:
    assert made(NORMS, LARGE) == [
        "S_left[m,h,e] = cast(Q[m,h,e] * g[e] * k[e] * rsqrt(A_sum[m,h] / E + 1e-06), bf16)",
        "S_right[n,h,e] = cast(K[n,h,e] * rsqrt(C_sum[n,h] / E + 1e-06), bf16)",
        "S[h,m,n] = sum[e] 1.0 / sqrt(E) * S_left[m,h,e] * S_right[n,h,e] where n <= m",
    ]


def test_what_has_ranks_of_both_sides_stays() -> None:
    assert made(BESIDE, LARGE) == [
        "Z_left[m,e] = cast(Q[m,e] * g[e] * rsqrt(A_sum[m] / E + 1e-06), bf16)",
        "Z[m,n] = sum[e] K[n,e] * Z_left[m,e]",
    ]


def test_an_operand_that_is_longer_than_what_it_saves_is_not_stored() -> None:
    assert not [line for line in made(NORMS, FEW) if "_right" in line], "all keys for one row of queries"


@pytest.mark.parametrize(
    "text", [LINEAR, BYTES, BIASED], ids=["no stream", "written behind", "written behind, one side"]
)
def test_where_nothing_is_gained_nothing_changes(text: str) -> None:
    before = final(text)
    assert with_scaled_operands(before, LARGE, types(before), LARGE) is before


def test_a_sum_that_is_a_result_stays() -> None:
    found = final(BESIDE)
    before = replace(found, results=(*found.results, Result("Z_sum", None, ("M", "N"))))
    assert with_scaled_operands(before, LARGE, types(before), LARGE) is before


@pytest.mark.parametrize("text", [NORMS, BYTES, BIASED, BESIDE, LINEAR])
def test_meaning_stays(text: str) -> None:
    before = final(text)
    found = with_scaled_operands(before, LARGE, types(before, DType.F64), LARGE)
    verify(found)
    tensors = given(text, torch.float64)
    for one, other in zip(run(found, tensors, {}).values(), run(before, tensors, {}).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("text", [NORMS, BYTES, BIASED, BESIDE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_of_what_it_makes(text: str, dtype: torch.dtype) -> None:
    kind = DType.F32 if dtype is torch.float32 else DType.BF16
    found = with_scaled_operands(final(text), LARGE, types(final(text), kind), LARGE)
    tensors = given(text, dtype)
    on_device = {name: tensor.to(DEVICE) for name, tensor in tensors.items()}
    results = cascade.compile(found, backend="triton")(**on_device)
    verdict = judge_all(results.cpu(), standard(parse_cascade(text), tensors, {}))
    assert verdict.ok, verdict
