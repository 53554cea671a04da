"""Kernels that need nothing of each other as one launch: which these are, and that results are the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cascade
from cascade.backends.triton.partition import Group, Rest, partition
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.pipeline import run_pipeline
from tests.planned import final

MAPS = "cascade c(X[M,N], Z[M,N]) -> Y[M,N], W[M,N] { Y[m,n] = exp(X[m,n])\n W[m,n] = 2 * Z[m,n] + 1 }"
ALONE = {
    "other ranks": "cascade c(X[M,N], Z[M,K]) -> Y[M,N], W[M,K] { Y[m,n] = exp(X[m,n])\n W[m,k] = 2 * Z[m,k] }",
    "a result the other needs": "cascade c(X[M,N], Z[M,N]) -> Y[M,N], W[M,N] { Y[m,n] = exp(X[m,n])\n W[m,n] = Y[m,N-1-n] * Z[m,n] }",
}
CACHES = """cascade c(X[B,E], Z[B,E], K[B,N,E], V[B,N,E], len: i32[B]) -> C[B,N,E], D[B,N,E], S[B,E] {
    C[b,n,e] = select(n == len[b], exp(X[b,e]), K[b,n,e])
    D[b,n,e] = select(n == len[b], Z[b,e], V[b,n,e])
    S[b,e]   = sum[n] C[b,n,e] * D[b,n,e]
}"""
LITTLE, MUCH = 64, 4096


def groups(text: str, extent: int) -> list[tuple[str, ...]]:
    """The names that each kernel of a cascade defines where every rank has this extent."""
    cascade = final(text)
    ranks = {rank: extent for stmt in cascade.body for rank in "mnk"}
    found: tuple[Group | Rest, ...] = partition(cascade, ranks)
    assert all(isinstance(one, Group) for one in found)
    return [one.names for one in found]


def test_what_is_little_and_lies_alike_is_one_launch() -> None:
    assert groups(MAPS, LITTLE) == [("Y", "W")]
    assert groups(MAPS, MUCH) == [("Y",), ("W",)]


@pytest.mark.parametrize("name", ALONE)
def test_anything_else_has_a_launch_each(name: str) -> None:
    assert [one[-1] for one in groups(ALONE[name], LITTLE)] == ["Y", "W"]


def test_one_is_launched_with_those_before_what_it_does_not_need() -> None:
    text = """cascade c(X[M,N], Z[M,N]) -> Y[M,N], V[M,N], W[M,N] {
    Y[m,n] = exp(X[m,n])
    V[m,n] = Y[m,N-1-n] + X[m,n]
    W[m,n] = 2 * Z[m,n]
}"""
    assert groups(text, LITTLE) == [("Y", "W"), ("V",)]
    assert groups(text.replace("2 * Z[m,n]", "2 * V[m,N-1-n]"), LITTLE) == [("Y",), ("V",), ("W",)]


def test_the_results_are_those_of_the_cascade() -> None:
    compiled: Any = cascade.compile(MAPS, backend="triton")
    inputs = {name: torch.randn(37, 50) for name in "XZ"}
    found = compiled(**inputs)
    gold = run(run_pipeline(parse_cascade(MAPS)).final, inputs, {}, Precision.REFERENCE)
    assert len(compiled.sources()) == 1
    for ours, name in zip(found, "YW", strict=True):
        torch.testing.assert_close(ours.double(), gold[name], rtol=1e-5, atol=1e-5)


def test_two_caches_grow_in_one_launch() -> None:
    in_place = {"C": "K", "D": "V"}
    compiled: Any = cascade.compile(CACHES, backend="triton", in_place=in_place)
    plain: Any = cascade.compile(CACHES, backend="interp")
    inputs = {name: torch.randn(3, 8) for name in "XZ"} | {name: torch.randn(3, 20, 8) for name in "KV"}
    inputs["len"] = torch.tensor([0, 19, 20]).int()  # the last has no room left
    for _ in range(3):
        expected = plain(**inputs)
        *caches, total = compiled(**inputs)
        for cache, (result, param), wanted in zip(caches, in_place.items(), expected, strict=False):
            assert cache.data_ptr() == inputs[param].data_ptr(), result
            torch.testing.assert_close(cache, wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(total, expected[2], rtol=1e-4, atol=1e-4)
        inputs["len"] = (inputs["len"] + 7) % 21
    assert sum("C_place" in text and "D_place" in text for text in compiled.sources().values()) == 1
    assert "2 of 2" in compiled.explain()
