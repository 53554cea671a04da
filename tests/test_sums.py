"""Combinations of sums as one sum: which, what they mean, and the kernels.

The witnesses: the interpreter on the cascade before and after, and torch in float64.
"""

from __future__ import annotations

import pytest
import torch

import cascade
from cascade import interp
from cascade.backends.triton.sums import with_sums
from cascade.inference import infer_shapes
from cascade.ir import Cascade, DType
from cascade.text import render_stmt
from cascade.values import Precision
from cascade.verify import verify
from tests.planned import final
from tests.tolerance import judge

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CENTRED = """cascade c(X[T,D], W[F,D], g[D]) -> Y[T,F] {
    U[t] = mean[d] X[t,d]
    S[t] = mean[d] (X[t,d] - U[t]) * (X[t,d] - U[t])
    Y[t,f] = sum[d] (X[t,d] - U[t]) * rsqrt(S[t] + 0.01) * g[d] * W[f,d]
}"""
APART = """cascade c(X[T,D], W[F,D], g[D], h[D], r[T], u[T], c[F]) -> Y[T,F] {
    A[t,f] = sum[d] X[t,d] * g[d] * W[f,d]
    B[f] = sum[d] g[d] * W[f,d]
    C[f] = sum[d] h[d] * W[f,d]
    Y[t,f] = 2.0 * A[t,f] * r[t] - B[f] * r[t] * u[t] + C[f] - c[f]
}"""
KEPT = {
    "a sum is read elsewhere": APART.replace("-> Y[T,F]", "-> Y[T,F], B[F]"),
    "a coefficient is made of the sum": APART.replace("u[t] +", "A[t,f] +"),
    "its terms depend on a filter": APART.replace("W[f,d]\n    B", "W[f,d] where d <= t\n    B"),
    "two ranks": APART.replace("C[f] = sum[d] h[d] * W[f,d]", "C[f] = sum[t] X[t,f] * r[t]").replace("W[F,D]", "W[D,D]")
    .replace("Y[T,F]", "Y[T,D]").replace("c[F]", "c[D]"),
}  # fmt: skip
SIZES = {"T": 20, "D": 300, "F": 1100}  # more columns than a program that goes through a row of X can have
TYPES = {DType.F32: torch.float32, DType.BF16: torch.bfloat16, DType.F16: torch.float16}


def one_sum(plain: Cascade, dtype: DType) -> Cascade:
    """The cascade with its combinations as single sums, at the sizes of these tests."""
    ranks = {rank: SIZES[str(size)] for rank, size in infer_shapes(plain).ranks.items()}
    return with_sums(plain, ranks, dict.fromkeys((param.name for param in plain.params), dtype))


def given(plain: Cascade, shift: float = 0.0) -> dict[str, torch.Tensor]:
    """Inputs in f32."""
    generator = torch.Generator().manual_seed(5)
    shapes = {param.name: [SIZES[str(size)] for size in param.shape] for param in plain.params}
    return {name: torch.randn(shape, generator=generator) + shift * (name == "X") for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (CENTRED, "Y[t,f] = sum[d] g[d] * W[f,d] * ((X[t,d] - U[t]) * rsqrt(S[t] + 0.01))"),
        (APART, "Y_sum[t,f] = sum[d] W[f,d] * ((X[t,d] * 2.0 - u[t]) * r[t] * g[d] + h[d])"),
    ],
    ids=["lifted", "written"],
)
def test_combined_sums_are_one(text: str, wanted: str) -> None:
    plain = final(text)
    found = one_sum(plain, DType.F32)
    verify(found)
    assert wanted in [render_stmt(stmt) for stmt in found.body]
    inputs = given(plain)
    before, after = (interp.run(it, inputs, precision=Precision.REFERENCE)["Y"] for it in (plain, found))
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("text", [CENTRED, APART], ids=["lifted", "written"])
def test_the_kernels_have_one_sum(text: str, dtype: DType) -> None:
    call = cascade.compile(text, backend="triton")
    inputs = {name: tensor.to(DEVICE, TYPES[dtype]) for name, tensor in given(final(text), shift=3.0).items()}
    ours = call(**inputs)
    gold, eager = (
        interp.run(call.cascade, inputs, precision=precision)["Y"]
        for precision in (Precision.REFERENCE, Precision.EAGER)
    )
    verdict = judge(ours, gold, eager)
    assert verdict.ok, verdict
    products = [text for text in call.sources().values() if "tl.dot(" in text]
    assert len(products) == 1 and products[0].count("tl.dot(") == 1 and "one sum: what the sums" in call.explain()


def test_data_far_from_what_16_bits_hold_is_scaled_before_it_is_rounded() -> None:
    """The results are in range; the data times a factor is not."""
    call = cascade.compile(CENTRED, backend="triton")
    inputs = {name: tensor.to(DEVICE, torch.float16) for name, tensor in given(final(CENTRED)).items()}
    inputs |= {"X": inputs["X"] * 10000, "g": inputs["g"] * 100}
    gold = interp.run(call.cascade, inputs, precision=Precision.REFERENCE)["Y"]
    torch.testing.assert_close(call(**inputs).double(), gold, rtol=2e-2, atol=2e-2 * float(gold.abs().max()))


@pytest.mark.parametrize("reason", KEPT)
def test_sums_stay_apart_where(reason: str) -> None:
    plain = final(KEPT[reason])
    assert one_sum(plain, DType.F32) is plain


def test_sums_stay_apart_where_one_trip_finds_all_of_it() -> None:
    plain = final(CENTRED)
    few = {rank: SIZES[str(size)] for rank, size in infer_shapes(plain).ranks.items()} | {"f": 24}
    assert with_sums(plain, few, dict.fromkeys("XWg", DType.F32)) is plain


def test_sums_stay_apart_where_their_trip_makes_what_they_are_multiplied_with() -> None:
    """Weights that follow from a running maximum, and what they are divided by: nothing is known before the trip."""
    plain = final("""cascade c(Q[M,E], K[N,E], V[N,F]) -> O[M,F] {
        S[m,n] = Q[m,e] * K[n,e]
        R[m] = max[n] S[m,n]
        A[m,f] = sum[n] exp(S[m,n] - R[m]) * V[n,f]
        B[m,f] = sum[n] S[m,n] * V[n,f]
        O[m,f] = A[m,f] - R[m] * B[m,f]
    }""")
    sizes = {"m": 40, "n": 300, "e": 16, "f": 16}
    assert with_sums(plain, sizes, dict.fromkeys("QKV", DType.F32)) is plain
