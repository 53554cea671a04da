"""Statements before the stream of the kernel that reads them: which are, which are not, and that results are right."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cascade
from cascade.backends.triton.partition import Group, partition
from cascade.backends.triton.prologues import with_prologues
from cascade.frontend.build import parse_cascade
from cascade.inference import infer_shapes
from cascade.interp import run
from cascade.ir import Cascade
from cascade.pipeline import run_pipeline
from cascade.verify import verify

TURN = "R[t,h,e] = select(e < E // 2, -1, 1) * Q[t,h,(e + E//2) % E]; A[t,h,e] = Q[t,h,e] * c[t,e] + R[t,h,e] * s[t,e]"
BEHIND = "P[{r},h,n] = softmax[n] S[{r},h,n]; O[{r},h,e] = P[{r},h,n] * V[{r},n,e]"
STEP = f"""cascade step(Q[B,H,E], c[B,E], s[B,E], K[B,N,E], V[B,N,E]) -> O[B,H,E] {{
    {TURN}; S[t,h,n] = A[t,h,e] * K[t,n,e] / sqrt(E); {BEHIND.format(r="t")} }}"""
RENAMED = f"""cascade step(Q[B,H,E], c[B,E], s[B,E], K[B,N,E], V[B,N,E]) -> O[B,H,E] {{
    {TURN}; S[b,h,n] = A[b,h,e] * K[b,n,e] / sqrt(E); {BEHIND.format(r="b")} }}"""
NORMED = f"""cascade step(Q[B,H,E], g[E], K[B,N,E], V[B,N,E]) -> O[B,H,E] {{
    A[t,h,e] = rmsnorm[e](Q[t,h,e], g[e]); S[b,h,n] = A[b,h,e] * K[b,n,e]; {BEHIND.format(r="b")} }}"""
MANY = f"""cascade many(Q[M,H,E], c[M,E], s[M,E], K[N,H,E], V[N,H,E]) -> O[H,M,E] {{
    {TURN}; S[h,m,n] = A[m,h,e] * K[n,h,e] where n <= m; P[h,m,n] = softmax[n] S[h,m,n]; O[h,m,e] = P[h,m,n] * V[n,h,e] }}"""
KEYS = """cascade keys(Q[M,H,E], K[N,H,E], c[N,E], V[N,H,E]) -> O[H,M,E] {
    A[n,h,e] = K[n,h,e] * c[n,e] + K[n,h,(e + 1) % E]; S[h,m,n] = Q[m,h,e] * A[n,h,e]
    P[h,m,n] = softmax[n] S[h,m,n]; O[h,m,e] = P[h,m,n] * V[n,h,e] }"""
BOTH = """cascade both(Q[M,H,E], g[E], K[N,H,E], k[E], V[N,H,E]) -> O[H,M,E] {
    A[m,h,e] = rmsnorm[e](Q[m,h,e], g[e]); C[n,h,e] = rmsnorm[e](K[n,h,e], k[e])
    S[h,m,n] = A[m,h,e] * C[n,h,e] / sqrt(E) where n <= m
    P[h,m,n] = softmax[n] S[h,m,n]; O[h,m,e] = P[h,m,n] * V[n,h,e] }"""
TWICE = STEP.replace("-> O[B,H,E]", "-> O[B,H,E], Y[B,H]").replace("; S[t,h,n]", "; Y[t,h] = sum[e] A[t,h,e]; S[t,h,n]")
KEPT = STEP.replace("-> O[B,H,E]", "-> O[B,H,E], A[B,H,E]")
CHOSEN = """cascade chosen(X[T,N], W[D,E], K[B,E], V[T,E]) -> O[B,E] {
    c[t,j], i[t,j] = topk[n, 2] X[t,n]; G[t] = sum[j] c[t,j]
    S[b,m] = sum[e] K[b,e] * V[m,e] * G[m]; P[b,m] = softmax[m] S[b,m]; O[b,e] = P[b,m] * V[m,e] }"""
SIZES = {"B": 3, "H": 4, "E": 32, "N": 200, "M": 96, "T": 70, "D": 8}
LARGE = {"B": 32, "H": 8, "E": 128, "N": 8192, "M": 8192, "T": 4096, "D": 8}


def final(text: str) -> Cascade:
    return run_pipeline(parse_cascade(text)).final


def extents(found: Cascade, sizes: dict[str, int]) -> dict[str, int]:
    return {rank: size if isinstance(size, int) else sizes[size] for rank, size in infer_shapes(found).ranks.items()}


def kernels(text: str, sizes: dict[str, int]) -> list[tuple[str, ...]]:
    """What each kernel defines."""
    before = final(text)
    found = with_prologues(before, extents(before, sizes))
    verify(found)
    groups = partition(found, extents(found, sizes))
    return [group.names for group in groups if isinstance(group, Group)]


def given(text: str, sizes: dict[str, int]) -> dict[str, Tensor]:
    params = parse_cascade(text).params
    return {p.name: torch.randn([size if isinstance(size, int) else sizes[size] for size in p.shape]) for p in params}


@pytest.mark.parametrize(
    ("text", "sizes"),
    [(STEP, SIZES), (STEP, LARGE), (RENAMED, SIZES), (RENAMED, LARGE), (NORMED, LARGE)],
    ids=["step, small", "step", "renamed, small", "renamed", "normed"],
)
def test_queries_of_a_few_rows_are_computed_where_they_are_read(text: str, sizes: dict[str, int]) -> None:
    (only,) = kernels(text, sizes)
    assert {"S", "O"} <= set(only) and not {"A", "A_sum"}.isdisjoint(only)


def test_many_rows_keep_a_kernel_of_their_own() -> None:
    assert [names for names in kernels(MANY, LARGE) if "A" in names] == [("R", "A")]


def test_what_each_program_would_compute_again_is_stored() -> None:
    assert [names for names in kernels(KEYS, LARGE) if "A" in names] == [("A",)]


def test_norms_of_queries_and_keys_leave_no_scores_in_memory() -> None:
    (fused,) = [names for names in kernels(BOTH, LARGE) if "S" in names]
    assert {"S_sum", "S", "P_max", "O"} <= set(fused)


@pytest.mark.parametrize("text", [TWICE, KEPT], ids=["read twice", "a result"])
def test_what_others_need_is_stored(text: str) -> None:
    assert all("S" not in names for names in kernels(text, LARGE) if "A" in names)


def test_what_is_chosen_keeps_its_kernel() -> None:
    assert all("S" not in names for names in kernels(CHOSEN, LARGE) if "c" in names)


def test_nothing_changes_where_nothing_is_gained() -> None:
    before = final(MANY)
    assert with_prologues(before, extents(before, LARGE)) is before


@pytest.mark.parametrize("text", [STEP, RENAMED, NORMED, MANY, KEYS, BOTH, CHOSEN, TWICE, KEPT])
def test_another_name_is_the_same_program(text: str) -> None:
    before = final(text)
    found = with_prologues(before, extents(before, SIZES))
    tensors = {name: tensor.double() for name, tensor in given(text, SIZES).items()}
    for one, other in zip(run(found, tensors, {}).values(), run(before, tensors, {}).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize(
    "text", [STEP, RENAMED, NORMED, TWICE, KEPT], ids=["step", "renamed", "normed", "twice", "kept"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_kernels_are_right(text: str, dtype: torch.dtype) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in given(text, SIZES).items()}
    exact = run(parse_cascade(text), {name: tensor.double() for name, tensor in tensors.items()}, {}).values()
    results = cascade.compile(text, backend="triton")(**tensors)
    bound = 1e-5 if dtype is torch.float32 else 0.05
    for one, other in zip(results if isinstance(results, tuple) else (results,), exact, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=bound, atol=bound)
