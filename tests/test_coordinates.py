"""Coordinates of extremes along a stream: the extreme and where it stands are carried from tile to tile.

The witnesses: `torch.argmin` and `torch.argmax`, and the tolerance rule.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import cascade
from tests.planned import Chosen, all_kernels, call_of, emitted, final, planner_for
from tests.tolerance import judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = (
    "cascade c(X[M,N]) -> I[M], J[M], R[M] { I[m] = argmin[n] X[m,n]; J[m] = argmax[n] X[m,n]; R[m] = max[n] X[m,n] }"
)
NEAREST = """cascade nearest(X[N,D], C[K,D]) -> I[N], L[N], Y[N,D] {
    S[n,k] = (sum[d] C[k,d] * C[k,d]) - 2 * (sum[d] X[n,d] * C[k,d])
    I[n] = argmin[k] S[n,k]
    L[n] = min[k] S[n,k]
    Y[n,d] = C[I[n],d]
}"""


def rows(length: int, dtype: torch.dtype) -> Tensor:
    """Many equal numbers, infinities, NaN, and an extreme that comes last."""
    x = torch.randint(-3, 4, (8, length), generator=torch.Generator().manual_seed(1)).to(dtype)
    x[1] = 2
    x[2, -1], x[2, length // 2] = 9, -9
    if dtype.is_floating_point:
        x[3], x[4] = math.inf, -math.inf
        x[5, length // 3], x[5, length // 2] = math.nan, math.nan
        x[6, 0], x[7, -1] = math.nan, math.nan
    return x.to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 100, 257])
@pytest.mark.parametrize("tile", [16, 64])
def test_it_is_the_first_of_equals_in_tiles(
    length: int, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cascade.backends.triton.partition.ROW_LIMIT", 16)
    x = rows(length, dtype)
    (kernel,) = all_kernels(planner_for(final(ROWS), {"X": x}))
    assert ("I_extreme" in emitted(kernel)) is (length > 16)
    least, largest, value = call_of(Chosen(final(ROWS), tile=tile))(X=x)
    assert torch.equal(least, x.argmin(1)) and torch.equal(largest, x.argmax(1))
    torch.testing.assert_close(value, x.amax(1), rtol=0, atol=0, equal_nan=True)


def test_long_rows() -> None:
    call = cascade.compile(ROWS, backend="triton")
    x = rows(40_000, torch.float32)
    least, largest, _ = call(x)
    assert torch.equal(least, x.argmin(1)) and torch.equal(largest, x.argmax(1))
    assert "no kernel" not in call.explain()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [7, 700, 1100])
def test_the_nearest_of_many(count: int, dtype: torch.dtype) -> None:
    """A product that is never stored, of any length; what stands there is read behind it."""
    call = cascade.compile(NEAREST, backend="triton")
    generator = torch.Generator().manual_seed(2)
    inputs = {
        "X": torch.randint(-2, 3, (50, 24), generator=generator).to(DEVICE, dtype),
        "C": torch.randint(-2, 3, (count, 24), generator=generator).to(DEVICE, dtype),
    }
    found = call(**inputs)
    x, c = (inputs[name].double() for name in "XC")
    wanted = ((c * c).sum(1) - 2 * x @ c.T).argmin(1)  # whole numbers, all exact, with many equal
    assert torch.equal(found[0], wanted) and torch.equal(found[2], inputs["C"][wanted])
    verdict = judge_all(found, standard(call.cascade, inputs, {}))
    assert verdict.ok and "no kernel" not in call.explain(), verdict


def test_a_product_is_not_stored_for_it() -> None:
    text = "cascade c(X[M,D], C[K,D]) -> I[M] { S[m,k] = X[m,d] * C[k,d]; I[m] = argmax[k] S[m,k] }"
    call = cascade.compile(text, backend="triton")
    generator = torch.Generator().manual_seed(2)
    x, c = (torch.randint(-2, 3, (rows_, 16), generator=generator).to(DEVICE).float() for rows_ in (40, 1100))
    assert torch.equal(call(x, c), (x.double() @ c.double().T).argmax(1))
    (source,) = call.sources().values()
    assert "I_extreme" in source and "tl.dot" in source


def test_of_what_a_filter_leaves_it_is_right_as_well() -> None:
    text = "cascade c(X[M,D], C[K,D]) -> I[M] { S[m,k] = sum[d] X[m,d] * C[k,d] where k >= m; I[m] = argmax[k] S[m,k] }"
    call = cascade.compile(text, backend="triton")
    generator = torch.Generator().manual_seed(2)
    inputs = {name: torch.randn(rows_, 16, generator=generator).to(DEVICE) for name, rows_ in (("X", 40), ("C", 1100))}
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict
