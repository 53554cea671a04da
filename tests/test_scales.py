"""Factors that are the same along a stream, behind it: which, what they mean, and the kernels.

The witnesses: the interpreter on the cascade before and after, and torch in float64.
"""

from __future__ import annotations

import pytest
import torch

import cascade
from cascade import interp
from cascade.backends.triton.scales import with_scales
from cascade.text import render_stmt
from cascade.values import Precision
from cascade.verify import verify
from tests.planned import final
from tests.tolerance import judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALED = {
    "number": "Y[m,n] = sum[k] A[m,k] * B[k,n] / sqrt(K)",
    "column": "Y[m,n] = sum[k] A[m,k] * s[n] * B[k,n]",
    "row and column": "Y[m,n] = sum[k] A[m,k] * B[k,n] * r[m] / (1.0 + s[n] * s[n])",
    "fused": "Q[m,k] = tanh(A[m,k]); Y[m,n] = sum[k] Q[m,k] * B[k,n] * s[n]",
}
KEPT = {
    "it tells terms apart": "Y[m,n] = sum[k] A[m,k] * B[k,n] * s[2 * n]",
    "there may be no terms": "Y[m,n] = sum[k] A[m,k] * B[k,n] * s[n] where k <= m",
    "it moves along": "Y[m,n] = sum[k] A[m,k] * B[k,n] * r[k]",
    "two ranks are summed": "Y[m] = sum[k,n] A[m,k] * B[k,n] * s[n]",
}
SIZES = {"M": 40, "K": 300, "N": 24}


def program(body: str) -> str:
    ranks = "m" if body.startswith("Y[m] ") else "m,n"
    used = "".join(
        f", {name}[{size}]" for name, size in (("r", "K" if "r[k]" in body else "M"), ("s", "N")) if f"{name}[" in body
    )
    return f"cascade c(A[M,K], B[K,N]{used}) -> Y[{ranks.upper()}] {{ {body} }}"


@pytest.mark.parametrize("name", SCALED)
def test_a_sum_is_scaled_behind_its_loop(name: str) -> None:
    text = program(SCALED[name])
    plain = final(text)
    split = with_scales(plain, {rank.lower(): size for rank, size in SIZES.items()})
    verify(split)
    assert len(split.body) == len(plain.body) + 1 and render_stmt(split.body[-2]).startswith("Y_sum[m,n] = sum[k] ")
    generator = torch.Generator().manual_seed(5)
    given = {
        param.name: torch.randn([SIZES[str(size)] for size in param.shape], generator=generator)
        for param in plain.params
    }
    wanted, found = (interp.run(it, given, precision=Precision.REFERENCE)["Y"] for it in (plain, split))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    call = cascade.compile(text, backend="triton")
    ours = call(**{key: value.to(DEVICE) for key, value in given.items()})
    torch.testing.assert_close(ours.double().cpu(), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
    assert "Y_sum is the bare sum" in call.explain()
    source = "".join(call.sources().values())
    assert "Y_scaled" not in source and "tl.dot(" in source


@pytest.mark.parametrize("reason", KEPT)
def test_what_must_stay_in_the_sum_does(reason: str) -> None:
    plain = final(program(KEPT[reason]))
    assert with_scales(plain, {rank.lower(): size for rank, size in SIZES.items()}) is plain


def test_a_product_of_one_round_keeps_its_scale() -> None:
    """The sum is whole in a tile: its scale goes into what follows, exponents to base two."""
    text = """cascade c(Q[M,E], K[N,E], V[N,F]) -> O[M,F] {
        S[m,n] = Q[m,e] * K[n,e] / sqrt(E)
        O[m,f] = (softmax[n] S[m,n]) * V[n,f]
    }"""
    plain = final(text)
    assert with_scales(plain, {"m": 4096, "n": 4096, "e": 256, "f": 128}) == plain


IN_GROUPS = """cascade c(X[T,D], W: i8[V,D], s[V,G]) -> Y[T,V], L: f32[T] {
    Y[t,v] = sum[d] X[t,d] * W[v,d] * s[v,d//128]
    Z[t,v] = sum[d] X[t,d] * W[v,d] * s[v,d//128]
    L[t] = logsumexp[v] Z[t,v]
}"""
"""A factor that is one number for a tile of the stream, and says which terms there are."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "width", "words", "groups"), [(5, 300, 40, 3), (16, 512, 200, 4), (37, 700, 70, 2)])
def test_a_scale_of_a_group_of_the_stream(rows: int, width: int, words: int, groups: int, dtype: torch.dtype) -> None:
    """In two calls, so that the number of groups is no number in the second; the last shape lacks groups."""
    call, source = cascade.compile(IN_GROUPS, backend="triton"), cascade.compile(IN_GROUPS).cascade
    generator = torch.Generator().manual_seed(width)
    for more in (0, 128):
        inputs = {
            "X": torch.randn(rows, width + more, generator=generator).to(dtype),
            "W": torch.randint(-8, 8, (words, width + more), generator=generator).to(torch.int8),
            "s": (torch.rand(words, groups + more // 128, generator=generator) / 16).to(dtype),
        }
        inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
        verdict = judge_all(call(**inputs), standard(source, inputs, {}))
        assert verdict.ok, verdict
