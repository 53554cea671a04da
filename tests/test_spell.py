"""The fast rows of operations: as exact as they say, and the same where numbers end."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import cascade

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
