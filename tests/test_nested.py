"""Reductions of which no kernel has tiles, over one rank after the other: which, what they mean, and the kernels.

The witnesses: the interpreter on the cascade before and after, the tolerance rule, and how ranks can lie without it.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cascade
from cascade import interp
from cascade.backends.triton.nested import with_nested
from cascade.backends.triton.partition import arrange
from cascade.inference import infer_dtypes, infer_shapes
from cascade.ir import Cascade, DType
from cascade.text import render_stmt
from cascade.values import Precision
from cascade.verify import verify
from tests.planned import final
from tests.tolerance import judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"B": 60, "N": 9000, "E": 16, "M": 3}  # nine thousand are no tile's whole side
PROGRAMS = {
    "a mean of pairs": "cascade c(X[B,E], Y[N,E]) -> Z[] { S[b,n] = X[b,e] * Y[n,e]; Z = mean[b,n] sigmoid(S[b,n] / 4) }",
    "the largest": "cascade c(X[B,N]) -> Z[] { Z = max[b,n] X[b,n] * X[b,n] }",
    "a truth": "cascade c(X[B,N]) -> Z[], A[] { Z = select(any[b,n] X[b,n] > 0.5, 1, 0); A = select(all[b,n] X[b,n] < 0.4, 1, 0) }",
    "below a diagonal": "cascade c(X[B,N]) -> Z[] { Z = sum[b,n] X[b,n] where n < b }",
    "nothing of it": "cascade c(X[B,N]) -> Z[] fill 7 { Z = sum[b,n] X[b,n] where n < b - 10000 }",
    "three ranks": "cascade c(X[B,M,N]) -> Z[] { Z = sum[b,m,n] X[b,m,n] * X[b,m,n] }",
    "a rank stays": "cascade c(X[M,B,N]) -> Z[M] { Z[m] = sum[b,n] abs(X[m,b,n]) }",
    "a distance": "cascade c(X[B,N], Y[B,N]) -> Z[] { Z = sqrt(sum[b,n] (X[b,n] - Y[b,n]) * (X[b,n] - Y[b,n])) }",
}  # fmt: skip


def in_two(plain: Cascade, dtype: DType) -> Cascade:
    extents = {rank: 9000 if str(size) == "B" else SIZES[str(size)] for rank, size in infer_shapes(plain).ranks.items()}
    return with_nested(plain, extents, {param.name: dtype for param in plain.params})


def given(plain: Cascade, dtype: torch.dtype, few: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {param.name: [-(-SIZES[str(size)] // few) for size in param.shape] for param in plain.params}
    return {name: torch.randn(shape, generator=generator).to(DEVICE, dtype) / 8 for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16, DType.F16])
@pytest.mark.parametrize("name", PROGRAMS)
def test_they_mean_the_same(name: str, dtype: DType) -> None:
    plain = final(PROGRAMS[name])
    changed, types = in_two(plain, dtype), {param.name: dtype for param in plain.params}
    verify(changed)
    assert changed is not plain
    for result in plain.results:
        assert infer_dtypes(changed, types)[result.name] is infer_dtypes(plain, types)[result.name]
    inputs = given(plain, torch.float64, few=20)
    before, after = (interp.run(one, inputs, precision=Precision.REFERENCE) for one in (plain, changed))
    rounded = 0.0 if dtype is DType.F32 else 1e-2  # the result is brought to the type that it has
    for result in before:
        torch.testing.assert_close(after[result], before[result], rtol=1e-10 + rounded, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", PROGRAMS)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    call = cascade.compile(PROGRAMS[name], backend="triton")
    inputs = given(call.cascade, dtype)
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict
    assert "no kernel" not in call.explain()


def test_without_it_there_is_no_tile() -> None:
    plain = final(PROGRAMS["the largest"])
    extents = {"b": 9000, "n": 9000}
    assert arrange(plain.body, plain, extents) is None
    for stmt in with_nested(plain, extents, {"X": DType.F32}).body:
        assert arrange([stmt], plain, extents) is not None


def test_parts_of_a_sum_in_16_bits_have_32() -> None:
    plain = final(PROGRAMS["below a diagonal"])
    assert [render_stmt(stmt) for stmt in in_two(plain, DType.BF16).body] == [
        "Z_row[b] = sum[n] cast(X[b,n], f32) where n < b", "Z_whole = sum[b] Z_row[b]", "Z = cast(Z_whole, bf16)",
    ]  # fmt: skip
    assert [render_stmt(stmt) for stmt in in_two(plain, DType.F32).body] == [
        "Z_row[b] = sum[n] X[b,n] where n < b", "Z = sum[b] Z_row[b]",
    ]  # fmt: skip


def test_products_of_matrices_stay() -> None:
    """Both ranks that this sums over are one in its kernel: it has no tiles as it is written."""
    text = "cascade c(X[M,B,N], Y[M,B,N]) -> G[M,M] { G[m,k] = X[m,b,n] * Y[k,b,n] }"
    plain = final(text)
    extents = {"m": 100, "k": 100, "b": 9000, "n": 9000}
    assert arrange(plain.body, plain, extents) is None
    assert with_nested(plain, extents, dict.fromkeys("XY", DType.BF16)) is plain
    call = cascade.compile(text, backend="triton")
    inputs = given(call.cascade, torch.float32, few=20)
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok and any("tl.dot" in source for source in call.sources().values()), verdict


def test_what_fits_stays() -> None:
    plain = final("cascade c(X[M,B,N]) -> Z[M] { Z[m] = sum[b,n] X[m,b,n] }")
    extents = {"m": 100, "b": 8, "n": 16}
    assert with_nested(plain, extents, {"X": DType.BF16}) is plain
    assert with_nested(plain, {"m": 100, "b": 4096, "n": 4096}, {"X": DType.BF16}) is not plain
