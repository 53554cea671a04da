"""Counts of what is absent nowhere, as extents: where they are, that nothing else changes, and what shows it."""

from __future__ import annotations

import pytest
import torch

from cascade import interp
from cascade.backends.triton.counts import with_extents
from cascade.frontend.build import parse_cascade
from cascade.inference import infer_dtypes
from cascade.interp import Precision
from cascade.ir import Cascade, DType
from cascade.pipeline import run_pipeline
from cascade.verify import verify
from cascade.walk import defines

TEXT = """cascade c(Q[H,M,E], K[G,M,E], g[E]) -> Y[M,H,E] {{
    S[h,m,n] = Q[h,m,e] * K[h//{each},n,e] where {where}
    P[h,m,n] = softmax[n] S[h,m,n]
    U[m,h,e] = P[h,m,n] * K[h//{each},n,e]
    Y[m,h,e] = rmsnorm[e](U[m,h,e], g[e])
}}"""
SIZES = {"H": 4, "G": 2, "M": 7, "E": 5}
TYPES = dict.fromkeys("QKg", DType.BF16)


def final(each: int = 2, where: str = "n <= m") -> Cascade:
    """What the passes make of it."""
    return run_pipeline(parse_cascade(TEXT.format(each=each, where=where))).final


def names(cascade: Cascade) -> set[str]:
    """What a cascade defines."""
    return {name for stmt in cascade.body for name in defines(stmt)}


def test_a_mean_of_what_surely_is_divides_by_an_extent() -> None:
    plain = final()
    found = with_extents(plain, SIZES, TYPES)
    verify(found)
    assert names(plain) - names(found) == {"Y_count", "Y_x"}
    text = str(found)
    assert "sum[e] U[m,h,e] * U[m,h,e]" in text and "Y_sum[m,h] / E" in text
    assert "Y_count" not in text and "Y_x" not in text  # in no fold either
    inputs = {n: torch.randn([SIZES[s] for s in shape], dtype=torch.float64) for n, shape in SHAPES.items()}
    (before,), (after,) = (interp.run(it, inputs, precision=Precision.REFERENCE).values() for it in (plain, found))
    torch.testing.assert_close(after, before, rtol=1e-12, atol=1e-12)


SHAPES = {"Q": "HME", "K": "GME", "g": "E"}


@pytest.mark.parametrize(
    ("each", "where", "extents"),
    [
        (1, "n <= m", SIZES),  # half of the heads have no keys
        (2, "n < m", SIZES),  # nor has the first row
        (2, "n <= m", {}),  # nobody says how many heads there are
        (2, "n <= m", {**SIZES, "H": 5}),
    ],
)
def test_what_may_lack_something_is_counted(each: int, where: str, extents: dict[str, int]) -> None:
    plain = final(each, where)
    assert with_extents(plain, extents, TYPES) == plain


def test_a_count_that_is_a_result_stays() -> None:
    plain = run_pipeline(parse_cascade("cascade c(X[M,N]) -> C[M] { C[m] = count[n] X[m,n] }")).final
    assert with_extents(plain, {"M": 3, "N": 4}, {"X": DType.F32}) == plain


def test_a_count_that_makes_a_type_stays() -> None:
    """A tensor of integers is promoted with what it meets; an extent takes its type."""
    text = "cascade c(X[M,N]) -> Y[M] { C[m] = count[n] X[m,n]; Y[m] = C[m] / X[m,0] }"
    plain = run_pipeline(parse_cascade(text)).final
    for dtype in (DType.BF16, DType.F32):
        found = with_extents(plain, {"M": 3, "N": 4}, {"X": dtype})
        before, after = (infer_dtypes(each, {"X": dtype})["Y"] for each in (plain, found))
        assert before is after
