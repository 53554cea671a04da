"""Results in the place of parameters: what is written of them, what is refused, and that nothing else changes."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import cascade
from cascade.backends.triton.updates import Update, update_of
from cascade.errors import CallError
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade
from cascade.pipeline import run_pipeline
from cascade.text import render_expr, render_stmt

GROWING = """cascade c(X[B,G,E], Q[B,G,E], K[B,G,N,E], len: i32[B]) -> O[B,G,E], C[B,G,N,E] {
    C[b,g,n,e] = select(n == len[b], 2 * X[b,g,e], K[b,g,n,e])
    S[b,g,n] = Q[b,g,e] * C[b,g,n,e] where n <= max(len[b], 0)
    P[b,g,n] = softmax[n] S[b,g,n]
    O[b,g,e] = P[b,g,n] * C[b,g,n,e]
}"""
MOVED = "cascade c(X[N], K[N]) -> C[N] { C[n] = select(n > 0, X[n], K[n]) }"
TWICE = "cascade c(X[B], K[B,N], len: i32[B]) -> C[B,N], S[B] { C[b,n] = select(n == len[b], X[b], K[b,n]); S[b] = sum[n] K[b,n] }"


def final(text: str) -> Cascade:
    """What the passes make of it."""
    return run_pipeline(parse_cascade(text)).final


def given(length: int, lengths: tuple[int, ...], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of a call of `GROWING`."""
    batch = len(lengths)
    x, q = (torch.randn(batch, 2, 16, dtype=dtype) for _ in range(2))
    return {"X": x, "Q": q, "K": torch.randn(batch, 2, length, 16, dtype=dtype), "len": torch.tensor(lengths).int()}


def test_what_is_written_has_no_rank_that_is_told() -> None:
    found = update_of(final(GROWING), "C", "K")
    assert isinstance(found, Update)
    assert render_stmt(found.stmt) == "C[b,g,e] = 2 * X[b,g,e] where len[b] >= 0 and len[b] < N"
    assert [render_expr(part) for part in found.place] == ["b", "g", "len[b]", "e"]
    assert found.text == "C[b,g,len[b],e] = 2 * X[b,g,e] where len[b] >= 0 and len[b] < N"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (MOVED, "which coordinates of C are new is not told by equations"),
        (TWICE, "K is read elsewhere, where its old values are wanted"),
        ("cascade c(X[N], K[N]) -> C[N] { C[n] = X[n] + K[n] }", "C is not K with other values where a test says so"),
        (
            "cascade c(X[N], K[N], I: i32[N]) -> C[N] { C[n] = select(n == I[n], X[n], K[n]) }",
            "which coordinates of C are new is not told by equations",
        ),
    ],
)
def test_what_is_no_update_is_computed_and_copied(text: str, reason: str) -> None:
    assert update_of(final(text), "C", "K") == reason
    program = parse_cascade(text)
    sizes = {"B": 3, "N": 5}
    inputs: dict[str, Tensor] = {p.name: torch.randn([sizes[str(s)] for s in p.shape]) for p in program.params}
    inputs |= {name: torch.zeros(t.shape, dtype=torch.int32) for name, t in inputs.items() if name in ("I", "len")}
    wanted = cascade.compile(text, backend="interp")(**inputs)
    compiled = cascade.compile(text, backend="triton", in_place={"C": "K"})
    found = compiled(**inputs)
    wanted, found = (one if isinstance(one, tuple) else (one,) for one in (wanted, found))
    assert found[0].data_ptr() == inputs["K"].data_ptr()
    for ours, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, right)
    assert f"C is computed apart and copied into K: {reason}" in compiled.explain()


@pytest.mark.parametrize("backend", ["interp", "triton"])
@pytest.mark.parametrize("length", [40, 64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_cache_grows_in_place(backend: str, length: int, dtype: torch.dtype) -> None:
    compiled: Any = cascade.compile(GROWING, backend=backend, in_place={"C": "K"})
    plain: Any = cascade.compile(GROWING, backend="interp")
    inputs = given(length, (5, length - 1, 17), dtype)
    for _ in range(3):  # the third goes straight to the plan
        output, cache = plain(**inputs)
        found, same = compiled(**inputs)
        assert same is inputs["K"] or same.data_ptr() == inputs["K"].data_ptr()
        torch.testing.assert_close(inputs["K"], cache, rtol=0, atol=0)
        torch.testing.assert_close(found, output, rtol=1e-3, atol=1e-3)
        inputs["len"] = (inputs["len"] + 1) % length
        inputs["X"] = inputs["X"] + 1


def test_a_strided_cache_and_places_outside_of_it() -> None:
    compiled: Any = cascade.compile(GROWING, backend="triton", in_place={"C": "K"})
    inputs = given(32, (-1, 32, 7))
    memory = torch.full((32, 3, 2, 17), float("nan"))
    view = memory[..., :16].permute(1, 2, 0, 3)
    view.copy_(inputs["K"])
    before = view.clone()
    _, cache = compiled(**(inputs | {"K": view}))
    assert cache.data_ptr() == memory.data_ptr() and bool(memory[..., 16].isnan().all())
    before[2, :, 7] = 2 * inputs["X"][2]
    torch.testing.assert_close(cache, before, rtol=0, atol=0)


def test_only_new_coordinates_are_written() -> None:
    compiled: Any = cascade.compile(GROWING, backend="triton", in_place={"C": "K"})
    compiled(**given(64, (3, 9)))
    texts = [text for text in compiled.sources().values() if re.search(r"store\(C_place", text)]
    assert len(texts) == 1 and "BLOCK_N" not in texts[0] and "K_ptr" not in "".join(compiled.sources().values())


@pytest.mark.parametrize(
    ("in_place", "says"),
    [
        ({"D": "K"}, "c has no result 'D'"),
        ({"C": "Kc"}, "c has no parameter 'Kc'"),
        ({"O": "K"}, "O is [B,G,E], but K is [B,G,N,E]"),
    ],
)
def test_memory_that_a_result_cannot_have_is_refused(in_place: dict[str, str], says: str) -> None:
    with pytest.raises(CallError, match=re.escape(says)) as caught:
        cascade.compile(GROWING, in_place=in_place)
    assert caught.value.diagnostics[0].code == "C343"


def test_tensors_that_cannot_be_written_are_refused() -> None:
    compiled: Any = cascade.compile(GROWING, in_place={"C": "K"})
    inputs = given(8, (3,))
    with pytest.raises(CallError, match="C is f32, but the tensor given for K is f16"):
        compiled(**(inputs | {"K": inputs["K"].half()}))
    with pytest.raises(CallError, match="expanded"):
        compiled(**(inputs | {"K": inputs["K"][:, :1].expand(1, 2, 8, 16)}))
