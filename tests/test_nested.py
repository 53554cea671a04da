"""Products over a long rank in a loop for every tile of a stream, and elements picked from what they give.

What counts as long is set low, so that Triton's interpreter gets there. The witness is torch in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cascade
from cascade.backends.triton import partition
from cascade.backends.triton.launch import Bench, Groups, Launcher
from cascade.backends.triton.partition import Group
from cascade.backends.triton.picks import with_picks
from cascade.backends.triton.planner import Planner, Tiling
from tests.planned import call_of, final, planner_for
from tests.tolerance import filled_with_nan

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = ((7, 40, 50), (33, 100, 600))  # rows, reduced rank, words: ragged tiles, a stream that programs share
HEAD = "cascade c(X[T,D], W[V,D], y: i64[T]) -> P: f32[T] {\n Z[t,v] = sum[d] X[t,d] * W[v,d]\n"
PLAIN = HEAD + " P[t] = (logsumexp[v] Z[t,v]) - Z[t,y[t]]\n}"
IGNORING = HEAD + " P[t] = (logsumexp[v] Z[t,v]) - Z[t,y[t]] where y[t] != -100\n}"
SMOOTH = HEAD + " P[t] = (logsumexp[v] Z[t,v]) - 0.9 * Z[t,y[t]] - 0.1 * (mean[v] Z[t,v])\n}"
SQUARED = HEAD + " L[t] = logsumexp[v] Z[t,v]\n P[t] = L[t] - Z[t,y[t]] + 0.01 * L[t] * L[t]\n}"
CAPPED = """cascade c(X[T,D], W[V,D], y: i64[T]) -> P: f32[T] {
 Z[t,v] = 3.0 * tanh((sum[d] X[t,d] * W[v,d]) / 3.0)
 P[t] = (logsumexp[v] Z[t,v]) - Z[t,y[t]]
}"""


def lse(z: Tensor) -> Tensor:
    return torch.logsumexp(z, -1)


LOSSES: dict[str, tuple[str, Loss]] = {
    "cross-entropy": (PLAIN, lambda z, y: F.cross_entropy(z, y, reduction="none")),
    "ignore index": (IGNORING, lambda z, y: F.cross_entropy(z, y, reduction="none")),
    "label smoothing": (SMOOTH, lambda z, y: F.cross_entropy(z, y, reduction="none", label_smoothing=0.1)),
    "z-loss": (SQUARED, lambda z, y: F.cross_entropy(z, y, reduction="none") + 0.01 * lse(z) ** 2),
    "softcap": (CAPPED, lambda z, y: F.cross_entropy(3.0 * torch.tanh(z / 3.0), y, reduction="none")),
}


DISTILLED = """cascade c(X[T,D], W[V,D], U[T,E], M[V,E]) -> P: f32[T] {
 S[t,v] = X[t,d] * W[v,d]
 H[t,v] = U[t,e] * M[v,e]
 A[t,v] = S[t,v] - logsumexp[v] S[t,v]
 B[t,v] = H[t,v] - logsumexp[v] H[t,v]
"""
RELATIVE = DISTILLED + " P[t] = sum[v] exp(B[t,v]) * (B[t,v] - A[t,v])\n}"
BETWEEN = (
    DISTILLED
    + " C[t,v] = log(0.5 * exp(A[t,v]) + 0.5 * exp(B[t,v]))\n"
    + " P[t] = 0.5 * (sum[v] exp(B[t,v]) * (B[t,v] - C[t,v])) + 0.5 * (sum[v] exp(A[t,v]) * (A[t,v] - C[t,v]))\n}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("rows, inner, outer, words", [(7, 40, 50, 50), (33, 100, 70, 300)])
def test_distillation_makes_tiles_of_both_products_in_one_trip(
    rows: int, inner: int, outer: int, words: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "PRODUCT_LIMIT", 32)
    monkeypatch.setattr(partition, "SHORT", 32)
    x, u = torch.randn(rows, inner) * 2 / inner**0.5, torch.randn(rows, outer) * 2 / outer**0.5
    w, m = torch.randn(words, inner), torch.randn(words, outer)
    given = [tensor.to(DEVICE, dtype) for tensor in (x, w, u, m)]
    x, w, u, m = (tensor.double() for tensor in given)
    student, teacher = (F.log_softmax(z, -1) for z in (x @ w.T, u @ m.T))
    between = torch.logsumexp(torch.stack([student, teacher]), 0) - torch.log(torch.tensor(2.0))
    right = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    sides = [F.kl_div(between, one, reduction="none", log_target=True).sum(-1) for one in (student, teacher)]
    for text, wanted in ((RELATIVE, right), (BETWEEN, 0.5 * sides[0] + 0.5 * sides[1])):
        compiled = cascade.compile(text, backend="triton")
        with filled_with_nan():
            found = compiled(*given)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-3, atol=2e-3)
        stored = any("S_ptr" in code or "S_desc" in code for code in compiled.sources().values())
        assert stored == (text == BETWEEN)  # twice through the words: the products are not made twice


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_a_linear_layer_store_no_logits(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partition, "PRODUCT_LIMIT", 32)
    monkeypatch.setattr(partition, "SHORT", 32)
    text, loss = LOSSES[name]
    for rows, width, words in SIZES:
        x = torch.randn(rows, width, device=DEVICE).to(dtype)
        w = (torch.randn(words, width, device=DEVICE) / width**0.5).to(dtype)
        y = torch.randint(words, (rows,), device=DEVICE)
        if name == "ignore index":
            y[::3] = -100
        call = cascade.compile(text, backend="triton")
        found = call(X=x, W=w, y=y)
        assert "a loop over d: what it sums is never stored" in call.explain()
        torch.testing.assert_close(found.double(), loss(x.double() @ w.double().T, y), rtol=1e-5, atol=1e-5)


class Wide(Launcher):
    """A launcher whose inner tiles are far longer than the rank they go through."""

    nested = 0  # kernels with such a tile

    def tiling(self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench | None) -> Tiling:
        own = dataclasses.replace(planner.default_tiling(group), parts=1)
        if not group.arrangement.inner:
            return own
        self.nested += 1
        tiles = dict(own.tiles) | dict.fromkeys(group.arrangement.inner, 128)
        return dataclasses.replace(own, tiles=tuple(tiles.items()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
@pytest.mark.parametrize("width", [9, 16])
def test_an_inner_rank_far_shorter_than_its_tile(
    width: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By pointers and by descriptors, in memory that is NaN beyond: nothing of it is seen."""
    monkeypatch.setattr(partition, "PRODUCT_LIMIT", 8)
    monkeypatch.setattr(partition, "SHORT", 8)
    around = [torch.full((rows + 20, 64), torch.nan, dtype=dtype, device=DEVICE) for rows in (7, 50)]
    x, w = (whole[: len(whole) - 20, :width] for whole in around)
    x.normal_()
    w.normal_()
    y = torch.randint(50, (7,), device=DEVICE)
    launcher = Wide(final(PLAIN))
    with filled_with_nan():
        (found,) = call_of(launcher)(X=x, W=w, y=y)
    loss = F.cross_entropy(x.double() @ w.double().T, y, reduction="none")
    torch.testing.assert_close(found.double(), loss, rtol=1e-5, atol=1e-5)
    assert launcher.nested


def planner_of(text: str, rows: int = 16, width: int = 2048, words: int = 4096) -> Planner:
    x, w = torch.empty(rows, width, dtype=torch.bfloat16), torch.empty(words, width, dtype=torch.bfloat16)
    plain = planner_for(final(text), {"X": x, "W": w, "y": torch.empty(rows, dtype=torch.int64)})
    return Planner(with_picks(plain.cascade, plain.extents), plain.extents, plain.layouts)


def test_what_is_stored_anyway_is_summed_in_a_kernel_of_its_own() -> None:
    """Logits that are a result are made by a plain product: their programs are those of both sides."""
    planner = planner_of(PLAIN.replace("P: f32[T]", "P: f32[T], Z: f32[T,V]"))
    assert all(isinstance(group, Group) and not group.arrangement.inner for group in planner.groups())


def test_an_element_is_picked_where_that_is_less_than_storing_all() -> None:
    assert [stmt for stmt in planner_of(PLAIN).cascade.body if "Z_pick" in str(stmt)]
    few = planner_of(PLAIN, words=1024)  # to go through the reduced rank once a row is more
    assert not [stmt for stmt in few.cascade.body if "Z_pick" in str(stmt)]


@pytest.mark.parametrize(
    ("term", "width", "lies"),
    [
        ("W[v,d]", 1024, "whole"), ("W[v,d]", 1040, "inner"),
        ("W[v,d] * g[d]", 512, "whole"), ("W[v,d] * g[d]", 528, "inner"),
        ("W[v,d] * g[d//128]", 512, "whole"), ("W[v,d] * g[d//128]", 528, "stored"),
    ],
)  # fmt: skip
def test_an_operand_that_each_trip_computes_lies_there_twice(term: str, width: int, lies: str) -> None:
    """It is whole up to half the length; beyond, a loop goes through it, or where none can, the tiles are stored."""
    text = "cascade c(X[T,D], W[V,D], g[G]) -> P: f32[T] { Z[t,v] = sum[d] X[t,d] * TERM; P[t] = logsumexp[v] Z[t,v] }"
    plain = final(text.replace("TERM", term).replace("g[G]", "g[D]" if "[d]" in term else "g[G]"))
    extents = {"t": 64, "d": width, "v": 9000}
    groups = [group for group in partition.partition(plain, extents) if isinstance(group, Group)]
    (first, *others) = [group.arrangement for group in groups]
    assert "d" in {"whole": first.whole, "inner": first.inner, "stored": (first.stream,)}[lies]
    assert bool(others) == (lies == "stored")
