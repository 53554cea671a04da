"""Results are written where the caller has a place for them, and only where it is like a new tensor."""

from __future__ import annotations

import pytest
import torch

import cascade
from cascade.backends.placing import into, place_of

TEXT = "cascade scaled(X[M,N], Y[M,N]) -> A[M,N], B[M] { A[m,n] = 2 * X[m,n] + Y[m,n]; B[m] = sum[n] X[m,n] }"
X, Y = torch.randn(4, 16), torch.randn(4, 16)


@pytest.mark.parametrize("turns", [1, 3])
def test_a_result_is_written_into_its_place(turns: int) -> None:
    call = cascade.compile(TEXT, backend="triton")
    rows = torch.full((12, 16), torch.nan)
    for _ in range(turns):
        with into({"A": rows[4:8]}):
            a, b = call(X, Y)
    assert a.data_ptr() == rows[4:8].data_ptr()
    torch.testing.assert_close(rows[4:8], 2 * X + Y)
    torch.testing.assert_close(b, X.sum(1))
    assert rows[:4].isnan().all() and rows[8:].isnan().all()
    again, _ = call(X, Y)
    assert again.data_ptr() != rows[4:8].data_ptr(), "a place is one for calls in its block alone"


@pytest.mark.parametrize(
    "place",
    [
        torch.zeros(4, 32)[:, :16], torch.zeros(5, 16), torch.zeros(4, 16, dtype=torch.float64),
        torch.zeros(65)[1:].view(4, 16),
    ],
    ids=["gaps", "shape", "type", "base"],
)  # fmt: skip
def test_a_place_that_is_not_alike_is_left_alone(place: torch.Tensor) -> None:
    before = place.clone()
    with into({"A": place}):
        a, _ = cascade.compile(TEXT, backend="triton")(X, Y)
    torch.testing.assert_close(a, 2 * X + Y)
    assert a.data_ptr() != place.data_ptr() and torch.equal(place, before)


def test_without_places_there_are_none() -> None:
    assert place_of("A", ((4, 16), torch.float32, (16, 1))) is None
