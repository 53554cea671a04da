"""The fast rows of operations: as exact as they say, and the same where numbers end."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cascade
from cascade.backends.triton.spell import HELPERS
from tests.planned import all_kernels, emitted, final, planner_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALLEST = 2.0**-24  # of the numbers of 16 bits


def every_short_float() -> Tensor:
    """All numbers of 16 bits, NaN and infinities included."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16).to(DEVICE)


def test_gelu_of_every_short_float() -> None:
    x = every_short_float()
    made = cascade.compile("cascade c(X[I]) -> Y: f16[I] { Y[i] = gelu(X[i]) }", backend="triton")
    found = made(x).double()
    wide = x.double()
    wanted = 0.5 * wide * torch.special.erfc(-wide / math.sqrt(2))
    known = x.isfinite()
    allowed = wanted.abs() * 2 * 2.0**-11 + SMALLEST  # of the row, and rounding
    assert ((found - wanted).abs() <= allowed)[known].all()
    assert torch.equal(found[~known].nan_to_num(0.5), wanted[~known].nan_to_num(0.5))


def test_gelu_of_results_of_32_bits_is_exact() -> None:
    x = torch.linspace(-6, 6, 4001, device=DEVICE)
    made = cascade.compile("cascade c(X[I]) -> Y[I] { Y[i] = gelu(X[i]) }", backend="triton")
    assert torch.allclose(made(x), torch.nn.functional.gelu(x), rtol=1e-5, atol=1e-6)


UNIT = 2.0**-24  # of numbers of 32 bits


@pytest.mark.parametrize(
    ("call", "wanted", "low", "high", "units"),
    [("exp(X[i])", torch.exp, -87.3, 88.7, 4), ("tanh(X[i])", torch.tanh, -12.0, 12.0, 2)],
    ids=["exp", "tanh"],
)
def test_functions_of_32_bits_are_exact(
    call: str, wanted: Callable[[Tensor], Tensor], low: float, high: float, units: int
) -> None:
    made = cascade.compile(f"cascade c(X[I]) -> Y[I] {{ Y[i] = {call} }}", backend="triton")
    x = torch.cat([torch.linspace(low, high, 20001), torch.linspace(-1, 1, 20001)]).to(DEVICE)
    gold = wanted(x.double())
    assert ((made(x).double() - gold).abs() <= units * UNIT * gold.abs()).all()
    ends = torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1e30, -1e30, 89.0, -104.0], device=DEVICE)
    assert torch.equal(made(ends).nan_to_num(0.5), wanted(ends.double()).float().nan_to_num(0.5))


def test_a_quotient_of_few_numbers_is_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn((2, 100_000), generator=generator) * 1000
    exact = a.double() / b.double()
    for off in (-2, -1, 0, 1, 2):  # units that the hardware's division may be off by
        q = (exact.float().view(torch.int32) + off).view(torch.float32)
        rest = (a.double() - q.double() * b.double()).float()  # what a fused multiply-add leaves
        better = q + rest / b
        assert ((better.double() - exact).abs() <= 1.001 * UNIT * exact.abs()).all()
    names: dict[str, Any] = {"tl": Arithmetic, "triton": Arithmetic}
    exec(HELPERS["quotient"], names)
    ends = [(math.inf, 3.0), (-3.0, 0.0), (3.0, math.inf), (math.nan, 1.0), (0.0, 5.0), (-3000.0, 3.0)]
    for x, y in ends:
        found = names["quotient"](torch.tensor(x), torch.tensor(y))
        assert torch.equal(found.nan_to_num(0.5), (torch.tensor(x) / torch.tensor(y)).nan_to_num(0.5))


class Arithmetic:
    """What the helper needs of Triton, on tensors of PyTorch; the multiply-add with one rounding."""

    jit = staticmethod(lambda function: function)
    where = staticmethod(torch.where)
    fma = staticmethod(lambda a, b, c: (a.double() * b.double() + c.double()).float())


def test_a_mean_is_divided_and_a_tile_multiplied() -> None:
    """In full precision by one over the divisor and what that leaves over, in 16 bits by one over it alone."""
    text = "cascade c(X[M,N]) -> Y[M,N] { U[m] = (sum[n] X[m,n]) / N; Y[m,n] = (X[m,n] - U[m]) / (1.0 + abs(U[m])) }"
    for dtype, division in ((torch.float32, "Y = divided("), (torch.bfloat16, "1.0 / (")):
        kernels = all_kernels(planner_for(final(text), {"X": torch.zeros(3000, 100, dtype=dtype)}))
        (source,) = map(emitted, kernels)
        assert re.search(r"quotient\(U_sum, \(N \+ 0\.0\)\)", source) and division in source


@pytest.mark.parametrize(("dtype", "common"), [("bf16", True), ("f32", False)])
def test_few_numbers_with_a_divisor_in_common_are_multiplied_where_results_are_short(dtype: str, common: bool) -> None:
    text = f"""cascade route(X: {dtype}[T,N]) -> G: {dtype}[T,8] {{
        P[t,n] = softmax[n] X[t,n]
        W[t,k], I[t,k] = topk[n, 8] P[t,n]
        G[t,k] = W[t,k] / (sum[k] W[t,k])
    }}"""
    made = cascade.compile(text, backend="triton")
    x = torch.randn(40, 64).to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    found = made(x).double()
    largest = torch.softmax(x.double(), 1).topk(8).values
    wanted = largest / largest.sum(1, keepdim=True)
    assert ((found - wanted).abs() <= (2**-8 if dtype == "bf16" else 2**-21) * wanted).all()
    (source,) = made.sources().values()
    assert ("* (1.0 / P_sum)" in source) == ("* (1.0 / G_sum)" in source) == common and "quotient(W" not in source
