"""Coordinates that neighbours share are one division where sizes are known, and mean what they meant."""

from __future__ import annotations

import itertools

import pytest
import torch

import cascade
from cascade import interp
from cascade.backends.triton.divided import divided, with_divisions
from cascade.frontend.build import parse_cascade
from cascade.ir import Apply, Const, Expr, Extent, Rank
from cascade.text import render

from cascade.values import Precision
from tests.tolerance import judge_all, standard

DECODE = """
cascade decode(Q[B,H,E], K[B,HK,N,E], V[B,HK,N,E]) -> U[B,H,E] {
    S[b,h,n] = Q[b,h,e] * K[b,h*HK//H,n,e] / sqrt(E)
    P[b,h,n] = softmax[n] S[b,h,n]
    U[b,h,e] = P[b,h,n] * V[b,h*HK//H,n,e]
}
"""


def value(expr: Expr, rank: int, extents: dict[str, int]) -> int:
    """What a coordinate comes to, one operation after the other."""
    match expr:
        case Rank():
            return rank
        case Const(number):
            assert isinstance(number, int)
            return number
        case Extent(name):
            return extents[name]
        case Apply(op, (left, right)):
            one, other = value(left, rank, extents), value(right, rank, extents)
            return {"add": one + other, "mul": one * other, "floordiv": one // other if op == "floordiv" else 0}[op]
    raise AssertionError(expr)


def test_the_coordinate_is_the_same() -> None:
    changed = 0
    for more, times, by in itertools.product((-3, 0, 2, 4, 8), (1, 2, 3, 4), (1, 2, 4, 6, 8, 12)):
        over = Apply("add", (Rank("h"), Const(more))) if more else Rank("h")
        for product in ((over, Extent("A")), (Extent("A"), over)):
            before = Apply("floordiv", (Apply("mul", product), Extent("B")))
            extents = {"A": times, "B": by}
            after = divided(before, extents)
            changed += after != before
            assert all(value(before, rank, extents) == value(after, rank, extents) for rank in range(-9, 40))
            assert (after == before) == (by % times != 0 or by == times or more % (by // times) != 0)
    assert changed > 50


def test_symbols_that_change_from_call_to_call_stay() -> None:
    found = parse_cascade(DECODE, "<decode>")
    assert with_divisions(found, {"H": 32}) is found
    assert "K[b,h//4,n,e]" in render(with_divisions(found, {"H": 32, "HK": 8}))
    assert with_divisions(found, {"H": 8, "HK": 8}) is found  # a bare rank would have two extents


@pytest.mark.parametrize(("heads", "shared"), [(8, 2), (6, 6), (6, 4), (4, 1)])
def test_heads_that_share_keys_are_one_tile(heads: int, shared: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads, 16)
    k, v = torch.randn(2, shared, 40, 16), torch.randn(2, shared, 40, 16)
    call = cascade.compile(DECODE, backend="triton")
    verdict = judge_all(call(q, k, v), standard(call.cascade, {"Q": q, "K": k, "V": v}, {}))
    assert verdict.ok, verdict
    (text,) = call.sources().values()
    assert ("K[b,h//" in text) == (heads > shared and heads % shared == 0)
    wanted = interp.run(
        with_divisions(call.cascade, {"H": heads, "HK": shared}), {"Q": q, "K": k, "V": v}, {}, Precision.REFERENCE
    )
    torch.testing.assert_close(call(q, k, v).double(), wanted["U"], rtol=1e-4, atol=1e-5)
