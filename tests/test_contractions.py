"""Sums of products of several factors in pairs: which, in which order, what they mean, and the kernels.

The witnesses: every order that there is, counted; the interpreter on the cascade before and after; the tolerance rule.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import pytest
import torch

import cascade
from cascade import interp
from cascade.backends.triton.contractions import with_contractions
from cascade.backends.triton.products import factors, ranks_of
from cascade.inference import infer_dtypes, infer_shapes
from cascade.ir import Cascade, DType, Einsum, Reduce
from cascade.text import render_stmt
from cascade.values import Precision
from cascade.verify import verify
from tests.planned import final
from tests.tolerance import judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"B": 40, "T": 70, "D": 64, "R": 16, "F": 48, "I": 16, "J": 32, "K": 20, "L": 24}
IN_PAIRS = {
    "low rank": ("X[T,D], A[D,R], B[R,F]", "Y[T,F]", "Y[t,f] = X[t,d] * A[d,r] * B[r,f]"),
    "scaled": ("X[T,D], A[D,R], B[R,F], s[], g[F]", "Y[T,F]", "Y[t,f] = 2 * s * X[t,d] * A[d,r] * B[r,f] / g[f]"),
    "no softmax between": ("Q[B,T,D], K[B,F,D], V[B,F,R]", "O[B,T,R]", "O[b,t,r] = Q[b,t,d] * K[b,f,d] * V[b,f,r]"),
    "core and sides": (
        "G[I,J,K], A[T,I], B[F,J], C[L,K]", "Y[T,F,L]", "Y[t,f,l] = G[i,j,k] * A[t,i] * B[f,j] * C[l,k]",
    ),
    "of computed factors": (
        "X[T,D], A[D,R], B[R,F]", "Y[T,F]", "Y[t,f] = sum[d,r] relu(X[t,d] - 0.25) * A[d,r] * exp(B[r,f])",
    ),
    "of another rank": ("X[T,D], A[D,R], B[R,F], g[L]", "Y[L,T,F]", "Y[l,t,f] = g[l] * X[t,d] * A[d,r] * B[r,f]"),
    "four in a row": (
        "X[T,D], A[D,R], B[R,J], C[J,F]", "Y[T,F]", "Y[t,f] = X[t,d] * A[d,r] * B[r,j] * C[j,f]",
    ),
}  # fmt: skip
FORM = "cascade c(X[T,D], A[D,F], Y[T,F]) -> Z[] { Z = X[t,d] * A[d,f] * Y[t,f] }"
KEPT = {
    "two factors": ("X[T,D,R], A[D,R,F]", "Y[T,F]", "Y[t,f] = X[t,d,r] * A[d,r,f]"),
    "one rank": ("X[T,D], s[D], A[D,F]", "Y[T,F]", "Y[t,f] = X[t,d] * s[d] * A[d,f]"),
    "all have both": ("X[T,D,R], s[D,R], A[D,R,F]", "Y[T,F]", "Y[t,f] = X[t,d,r] * s[d,r] * A[d,r,f]"),
    "a filter": ("X[T,D], A[D,R], B[R,F]", "Y[T,F]", "Y[t,f] = sum[d,r] X[t,d] * A[d,r] * B[r,f] where d <= t"),
    "what may be absent": (
        "X[T,D], A[D,R], B[R,F]", "Y[T,F]", "Z[t,d] = X[t,d] where d <= t; Y[t,f] = Z[t,d] * A[d,r] * B[r,f]",
    ),
    "whole numbers": ("X: i32[T,D], A: i32[D,R], B: i32[R,F]", "Y[T,F]", "Y[t,f] = X[t,d] * A[d,r] * B[r,f]"),
    "the largest": ("X[T,D], A[D,R], B[R,F]", "Y[T,F]", "Y[t,f] = max[d,r] X[t,d] * A[d,r] * B[r,f]"),
}  # fmt: skip


def program(parts: tuple[str, str, str]) -> str:
    params, result, body = parts
    return f"cascade c({params}) -> {result} {{ {body} }}"


def in_pairs(plain: Cascade, dtype: DType = DType.BF16, sizes: Mapping[str, int] = SIZES) -> Cascade:
    return with_contractions(plain, extents(plain, sizes), {param.name: dtype for param in plain.params})


def extents(plain: Cascade, sizes: Mapping[str, int] = SIZES) -> dict[str, int]:
    return {rank: size if isinstance(size, int) else sizes[size] for rank, size in infer_shapes(plain).ranks.items()}


def given(plain: Cascade, dtype: torch.dtype, sizes: Mapping[str, int] = SIZES) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {param.name: [sizes[str(size)] for size in param.shape] for param in plain.params}
    return {n: torch.randn(shape, generator=generator).to(DEVICE, dtype) for n, shape in shapes.items()}


def coordinates(stmt: Einsum, known: Mapping[str, int]) -> int:
    """How many products a statement sums."""
    assert isinstance(stmt.expr, Reduce)
    return math.prod(known[rank] for rank in {*stmt.target.ranks, *stmt.expr.ranks})


def fewest(sides: Sequence[frozenset[str]], kept: frozenset[str], known: Mapping[str, int]) -> int:
    """The fewest products in pairs, whatever the order: all of them tried."""
    if len(sides) == 1:
        return 0
    found = []
    for pair in itertools.combinations(range(len(sides)), 2):
        left = [side for place, side in enumerate(sides) if place not in pair]
        both = sides[pair[0]] | sides[pair[1]]
        rest = fewest([*left, both & kept.union(*left)], kept, known)
        found.append(math.prod(known[rank] for rank in both) + rest)
    return min(found)


@pytest.mark.parametrize("name", IN_PAIRS)
def test_pairs_are_those_with_the_fewest_products(name: str) -> None:
    plain = final(program(IN_PAIRS[name]))
    (stmt,) = (s for s in plain.body if isinstance(s, Einsum) and isinstance(s.expr, Reduce))
    assert isinstance(stmt.expr, Reduce)
    known = extents(plain)
    sides = [ranks_of(t) for t in factors(stmt.expr.body) if not ranks_of(t).isdisjoint(stmt.expr.ranks)]
    changed = in_pairs(plain)
    verify(changed)
    sums = [s for s in changed.body if isinstance(s, Einsum) and isinstance(s.expr, Reduce)]
    assert len(sums) > 1 and all(len({*s.target.ranks, *s.expr.ranks}) < len(known) for s in sums)  # type: ignore[union-attr]
    found = sum(coordinates(s, known) for s in sums)
    assert found <= 1.01 * fewest(sides, frozenset(stmt.target.ranks), known) * known.get(
        "l" if name == "of another rank" else "", 1
    )
    assert found * 4 <= coordinates(stmt, known)


@pytest.mark.parametrize("name", IN_PAIRS)
@pytest.mark.parametrize("dtype", [DType.F32, DType.BF16])
def test_they_mean_the_same(name: str, dtype: DType) -> None:
    plain = final(program(IN_PAIRS[name]))
    changed, types = in_pairs(plain, dtype), {param.name: dtype for param in plain.params}
    for result in plain.results:
        assert infer_dtypes(changed, types)[result.name] is infer_dtypes(plain, types)[result.name]
    parts = {name: found for name, found in infer_dtypes(changed, types).items() if "_factor" in name}
    assert parts and set(parts.values()) == {dtype}
    inputs = given(plain, torch.float64)
    before, after = (interp.run(one, inputs, precision=Precision.REFERENCE) for one in (plain, changed))
    for result in before:
        torch.testing.assert_close(after[result], before[result], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", KEPT)
def test_what_stays_as_it_is(name: str) -> None:
    plain = final(program(KEPT[name]))
    dtype = DType.I32 if name == "whole numbers" else DType.BF16
    assert in_pairs(plain, dtype, dict.fromkeys(SIZES, 256)) is plain


def test_what_is_little_or_carried_along_stays() -> None:
    low = final(program(IN_PAIRS["low rank"]))
    assert (
        in_pairs(low, sizes=dict.fromkeys(SIZES, 16)) is low
        and in_pairs(low, sizes=dict.fromkeys(SIZES, 17)) is not low
    )
    stream = final("""cascade c(Q[T,D], K[F,D], L[J,D], V[F,R], U[J,R]) -> O[T,R] {
        S[t,f,j] = Q[t,d] * K[f,d] * L[j,d]
        P[t,f,j] = softmax[f,j] S[t,f,j]
        O[t,r] = P[t,f,j] * V[f,r] * U[j,r]
    }""")
    assert in_pairs(stream, sizes=dict.fromkeys(SIZES, 256)) is stream


def test_a_form_is_a_product_of_matrices() -> None:
    """As many products as at once, but for tensor cores."""
    plain = final(FORM)
    assert [render_stmt(stmt) for stmt in in_pairs(plain).body] == [
        "Z_factor[d,f] = sum[t] X[t,d] * Y[t,f]", "Z = sum[d,f] A[d,f] * Z_factor[d,f]",
    ]  # fmt: skip
    call = cascade.compile(FORM, backend="triton")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        inputs = given(plain, dtype)
        verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
        assert verdict.ok and "no kernel" not in call.explain(), verdict


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", IN_PAIRS)
def test_kernels(name: str, dtype: torch.dtype) -> None:
    call = cascade.compile(program(IN_PAIRS[name]), backend="triton")
    for sizes in (SIZES, SIZES | {"T": 33, "D": 100, "I": 7}):
        inputs = given(call.cascade, dtype, sizes)
        verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
        assert verdict.ok, (sizes, verdict)
        assert "no kernel" not in call.explain()


def test_f16_is_not_asked_to_hold_a_part() -> None:
    """What is between two products may be beyond 65504 where no factor and no result is."""
    text = program(IN_PAIRS["low rank"])
    types = infer_dtypes(in_pairs(final(text), DType.F16), dict.fromkeys("XAB", DType.F16))
    assert types["Y_factor"] is DType.F32 and types["Y"] is DType.F16
    call = cascade.compile(text, backend="triton")
    inputs = given(call.cascade, torch.float16)
    inputs["X"] *= 5e3
    inputs["B"] *= 1e-3
    assert float((inputs["X"].double() @ inputs["A"].double()).abs().max()) > 65504
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_result_of_more_bits_has_parts_of_more(dtype: torch.dtype) -> None:
    text = program(IN_PAIRS["low rank"]).replace("Y[T,F] {", "Y: f32[T,F] {")
    types = infer_dtypes(in_pairs(final(text)), dict.fromkeys("XAB", DType.BF16))
    assert types["Y_factor"] is types["Y"] is DType.F32
    call = cascade.compile(text, backend="triton")
    inputs = given(call.cascade, dtype)
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict


def test_extents_of_nothing() -> None:
    low = final(program(IN_PAIRS["low rank"]))
    assert in_pairs(low, sizes=SIZES | {"D": 0, "R": 0}) is low


def test_it_is_said_why() -> None:
    call = cascade.compile(program(IN_PAIRS["low rank"]), backend="triton")
    call(**given(call.cascade, torch.bfloat16))
    assert "Y_factor is a sum of two factors" in " ".join(call.explain().split())


def test_one_side_of_a_product_over_two_ranks_is_made_of_a_factor_for_each() -> None:
    """What no pair of factors makes cheaper: the two ranks are one, and a kernel has it as a product of matrices."""
    text = "cascade c(X[B,I], W[F,I,J], Y[B,J]) -> Z[B,F] { Z[b,f] = X[b,i] * W[f,i,j] * Y[b,j] }"
    call = cascade.compile(text, backend="triton")
    for dtype in (torch.float32, torch.bfloat16):
        for sizes in (SIZES, SIZES | {"J": 20}, SIZES | {"B": 3, "J": 128}):
            inputs = given(call.cascade, dtype, sizes)
            verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
            assert verdict.ok, (sizes, verdict)
            assert "no kernel" not in call.explain()
            assert any("tl.dot" in source and "ij" in source for source in call.sources().values())
