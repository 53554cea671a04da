"""Ranks that are only ever reduced together, as one: which, what the cascade means, and the kernels.

The witnesses: the interpreter on the cascade before and after, and the tolerance rule.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cascade
from cascade import interp
from cascade.backends.triton.joined import Joined
from cascade.backends.triton.paired import with_paired, with_summed
from cascade.text import render_stmt
from cascade.values import Precision
from cascade.verify import verify
from tests.planned import final
from tests.tolerance import judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"B": 3, "M": 4, "N": 3, "L": 5, "W": 6, "C": 9, "E": 16, "F": 16}
KEYS = "Q[B,M,E], K[C,W,E], V[C,W,F], pages: i64[B,L], len: i64[B]"
SCORES = "S[b,m,l,w] = Q[b,m,e] * K[pages[b,l],w,e] / sqrt(E)"
LIVE = "where l*W + w < len[b]"
WEIGHTED = f"P[b,m,l,w] = softmax[l,w] S[b,m,l,w]; O[b,m,f] = P[b,m,l,w] * V[pages[b,l],w,f] {LIVE}"
ONE = {
    "a stream": (KEYS, "O[B,M,F]", f"{SCORES} {LIVE}; {WEIGHTED}"),
    "a sum": (
        KEYS, "O[B,M,F]",
        f"{SCORES} {LIVE}; O[b,m,f] = sigmoid(S[b,m,l,w]) * V[pages[b,l],w,f] {LIVE}",
    ),
    "places as values": (
        f"{KEYS}, slope[M]", "O[B,M,F]",
        f"S[b,m,l,w] = (sum[e] Q[b,m,e] * K[pages[b,l],w,e]) / sqrt(E) + slope[m] * (l*W + w - len[b]) {LIVE};"
        f"{WEIGHTED}",
    ),
    "a mask of its own": (
        f"{KEYS}, live: bool[B,L,W]", "O[B,M,F]",
        f"{SCORES} where live[b,l,w]; P[b,m,l,w] = softmax[l,w] S[b,m,l,w];"
        "O[b,m,f] = P[b,m,l,w] * V[pages[b,l],w,f] where live[b,l,w]",
    ),
    "scales of pages": (
        f"{KEYS}, scale[C]", "O[B,M,F]",
        f"{SCORES} * scale[pages[b,l]] {LIVE}; {WEIGHTED}",
    ),
    "the second first": (
        KEYS, "O[B,M,F]",
        "S[b,m,w,l] = Q[b,m,e] * K[pages[b,l],w,e] where w + W*l < len[b]; P[b,m,w,l] = softmax[w,l] S[b,m,w,l];"
        "O[b,m,f] = P[b,m,w,l] * V[pages[b,l],w,f] where w + W*l < len[b]",
    ),
    "a picture": (
        "Q[B,M,E], K[B,L,W,E], V[B,L,W,F]", "O[B,M,F]",
        "S[b,m,l,w] = Q[b,m,e] * K[b,l,w,e]; P[b,m,l,w] = softmax[l,w] S[b,m,l,w]; O[b,m,f] = P[b,m,l,w] * V[b,l,w,f]",
    ),
    "a film": (
        "Q[B,M,E], K[B,N,L,W,E], V[B,N,L,W,F]", "O[B,M,F]",
        "S[b,m,n,l,w] = Q[b,m,e] * K[b,n,l,w,e]; P[b,m,n,l,w] = softmax[n,l,w] S[b,m,n,l,w];"
        "O[b,m,f] = P[b,m,n,l,w] * V[b,n,l,w,f]",
    ),
    "two pictures": (
        "Q[B,M,N,E], K[B,L,W,E], V[B,L,W,F], up[M,L], across[N,W]", "O[B,M,N,F]",
        "S[b,m,n,l,w] = (sum[e] Q[b,m,n,e] * K[b,l,w,e]) + up[m,l] + across[n,w];"
        "P[b,m,n,l,w] = softmax[l,w] S[b,m,n,l,w]; O[b,m,n,f] = P[b,m,n,l,w] * V[b,l,w,f]",
    ),
    "a window of a picture": (
        "Q[B,M,N,E], K[B,M,N,E], V[B,M,N,F]", "O[B,M,N,F]",
        "S[b,m,n,l,w] = Q[b,m,n,e] * K[b,l,w,e] where l - m < 2 and m - l < 2 and w - n < 3 and n - w < 3;"
        "P[b,m,n,l,w] = softmax[l,w] S[b,m,n,l,w]; O[b,m,n,f] = P[b,m,n,l,w] * V[b,l,w,f]",
    ),
}  # fmt: skip
APART = {
    "one is returned": (KEYS, "O[B,M,F], S[B,M,L,W]", f"{SCORES} {LIVE}; {WEIGHTED}"),
    "one stands by itself": (
        f"{KEYS}, U[C]", "O[B,M,F]",
        f"R[b,l] = exp(U[pages[b,l]]); {SCORES} * R[b,l] {LIVE}; {WEIGHTED}",
    ),
    "one is reduced before": (
        KEYS, "O[B,M,F]",
        f"{SCORES} {LIVE}; R[b,m,l] = max[w] S[b,m,l,w]; P[b,m,l,w] = softmax[l,w] (S[b,m,l,w] - R[b,m,l]);"
        f"O[b,m,f] = P[b,m,l,w] * V[pages[b,l],w,f] {LIVE}",
    ),
}  # fmt: skip


def program(parts: tuple[str, str, str]) -> str:
    params, result, body = parts
    return f"cascade c({params}) -> {result} {{ {body} }}"


def given(text: str, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Inputs of a program; of the first row one element is live, of the second all are."""
    generator, known = torch.Generator().manual_seed(7), SIZES | sizes
    found = {}
    for param in final(text).params:
        shape = [size if isinstance(size, int) else known[size] for size in param.shape]
        if param.name == "pages":
            found["pages"] = torch.randint(0, known["C"], shape, generator=generator).to(DEVICE)
        elif param.name == "len":
            most = known["L"] * known["W"]
            found["len"] = torch.tensor([1, most, *(1 + 7 * b % most for b in range(2, shape[0]))], device=DEVICE)
        elif param.name == "live":
            found["live"] = (torch.rand(shape, generator=generator) < 0.8).to(DEVICE)
        else:
            found[param.name] = torch.randn(shape, generator=generator).to(DEVICE, dtype)
    return found


@pytest.mark.parametrize("certain", [{}, {"W": 6}], ids=["", "certain"])
@pytest.mark.parametrize("name", ONE)
def test_both_are_one(name: str, certain: dict[str, int]) -> None:
    plain, inputs = final(program(ONE[name])), given(program(ONE[name]))
    found = with_paired(plain, SIZES, certain)
    verify(found.cascade)
    symbol = next(reversed(found.sizes))
    bound = {symbol: found.extents(SIZES)[symbol]}
    assert bound[symbol] == {"a film": 90, "a window of a picture": 12}.get(name, 30)
    before = interp.run(plain, inputs, precision=Precision.REFERENCE)
    after = interp.run(found.cascade, inputs, bound, precision=Precision.REFERENCE)
    for result in before:
        torch.testing.assert_close(after[result], before[result], rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ONE)
def test_kernels_of_both(name: str, dtype: torch.dtype) -> None:
    """At several lengths and widths of a page in turn: from the second width on kernels know none."""
    call = cascade.compile(program(ONE[name]), backend="triton")
    for sizes in ({"L": 5, "W": 16}, {"L": 9, "W": 16}, {"L": 40, "W": 3}, {"L": 3, "W": 70}, {"L": 7, "W": 1}):
        inputs = given(program(ONE[name]), dtype, **sizes)
        verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
        assert verdict.ok, (sizes, verdict)
        assert "no kernel" not in call.explain()
        assert sum("tl.dot" in text for text in call.sources().values()) == 1


@pytest.mark.parametrize("name", APART)
def test_they_stay_apart_where(name: str) -> None:
    text = program(APART[name])
    assert not with_paired(final(text), SIZES, SIZES).sizes
    call, inputs = cascade.compile(text, backend="triton"), given(text)
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict


def test_they_stay_apart_where_pages_are_longer_than_tiles() -> None:
    """Unless a state is carried along them: then a tile of a page is no part of the trip."""
    assert with_paired(final(program(ONE["a stream"])), SIZES | {"W": 257}, {}).sizes
    plain = final(program(ONE["a sum"]))
    assert with_paired(plain, SIZES | {"W": 256}, {}).sizes
    assert not with_paired(plain, SIZES | {"W": 257}, {}).sizes


@pytest.mark.parametrize("name", ["a picture", "a film"])
def test_what_lies_together_is_another_shape(name: str) -> None:
    """Of what is given without gaps; else each element is where it was."""
    text = program(ONE[name])
    call, inputs = cascade.compile(text, backend="triton"), given(text)
    apart = {name: torch.stack([tensor] * 2, 2)[:, :, 0] for name, tensor in inputs.items()}
    assert apart["K"].stride(1) == 2 * inputs["K"].stride(1)
    for some, shaped in ((inputs, True), (apart, False)):
        verdict = judge_all(call(**some), standard(call.cascade, some, {}))
        assert verdict.ok, verdict
        assert any("K_flat" in source for source in call.sources().values()) is shaped


def test_places_of_two_pictures_are_two_ranks() -> None:
    """The rows of a product as well as what it sums over, where no filter tells them apart."""
    text = program((
        "Q[B,M,N,E], K[B,L,W,E], V[B,L,W,F]", "O[B,M,N,F]",
        "S[b,m,n,l,w] = Q[b,m,n,e] * K[b,l,w,e]; P[b,m,n,l,w] = softmax[l,w] S[b,m,n,l,w];"
        "O[b,m,n,f] = P[b,m,n,l,w] * V[b,l,w,f]",
    ))  # fmt: skip
    call = cascade.compile(text, backend="triton")
    for sizes in ({}, {"M": 7, "L": 30}, {"N": 40, "W": 17}):
        inputs = given(text, torch.bfloat16, **sizes)
        verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
        assert verdict.ok, verdict
        assert any("sum[e] Q_flat[b,mn,e] * K_flat[b,lw,e]" in source for source in call.sources().values())


def test_a_filter_that_whole_tiles_pass_or_do_not_bounds_the_loop() -> None:
    """A tile is a row of the picture: which rows are near is the same for all of it."""
    text = program(ONE["a window of a picture"])
    call, inputs = cascade.compile(text, backend="triton"), given(text, torch.bfloat16, M=9, N=64)
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict
    (source,) = (text for text in call.sources().values() if "tl.dot" in text)
    assert (
        "m * 64 - 64" in source and "m * 64 + 128" in source
    )  # the first coordinate near, and the one behind the last


WINDOWS = {
    "along a line": (
        "X[B,S,C], W[K,C,D]", "Y[B,T,D] with t = T", "Y[b,t,d] = X[b,t+k,c] * W[k,c,d]", {"S": 42, "T": 40, "K": 3},
    ),
    "in steps": (
        "X[B,S,C], W[K,C,D]", "Y[B,T,D] with t = T", "Y[b,t,d] = X[b,2*t+k-1,c] * W[k,c,d]", {"S": 80, "T": 40, "K": 4},
    ),
    "channels first": (
        "X[B,C,S], W[D,C,K]", "Y[B,D,T] with t = T", "Y[b,d,t] = X[b,c,t+3*k] * W[d,c,k]", {"S": 49, "T": 40, "K": 4},
    ),
    "over a picture": (
        "X[B,H,S,C], W[J,K,C,D]", "Y[B,P,T,D] with t = T, p = P", "Y[b,p,t,d] = X[b,p+j,t+k,c] * W[j,k,c,d]",
        {"S": 42, "T": 40, "H": 8, "P": 6, "J": 3, "K": 3},
    ),
    "over a picture, channels first": (
        "X[B,C,H,S], W[D,C,J,K]", "Y[B,D,P,T] with t = T, p = P", "Y[b,d,p,t] = X[b,c,p+j,t+k] * W[d,c,j,k]",
        {"S": 42, "T": 40, "H": 8, "P": 6, "J": 3, "K": 3},
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WINDOWS)
def test_what_windows_sum_over_is_one(name: str, dtype: torch.dtype) -> None:
    """A product over the channels of all places of a window, whatever comes first in memory."""
    params, result, body, own = WINDOWS[name]
    call = cascade.compile(program((params, result, body)), backend="triton")
    for channels, more in ((32, 48), (33, 20), (3, 17)):
        sizes = {"B": 2, "C": channels, "D": more} | own
        generator = torch.Generator().manual_seed(7)
        shapes = {param.name: [sizes[str(size)] for size in param.shape] for param in call.cascade.params}
        inputs = {n: torch.randn(shape, generator=generator).to(DEVICE, dtype) for n, shape in shapes.items()}
        places = {symbol: sizes[symbol] for symbol in ("T", "P") if symbol in sizes}
        verdict = judge_all(call(**inputs, **places), standard(call.cascade, inputs, places))
        assert verdict.ok, (sizes, verdict)
        assert "no kernel" not in call.explain()
        assert all("tl.dot" in text for text in call.sources().values() if "merge" not in text)


SUMS = {
    "heads before rows": ("U[B,H,T,E], W[H,E,D]", "Z[B,T,D]", "Z[b,t,d] = U[b,h,t,e] * W[h,e,d]"),
    "side by side in the other": ("U[T,H,E], W[H,D,E]", "Z[T,D]", "Z[t,d] = U[t,h,e] * W[h,d,e]"),
    "nowhere side by side": ("U[B,H,T,E], W[E,D,H]", "Z[B,T,D]", "Z[b,t,d] = U[b,h,t,e] * W[e,d,h]"),
    "three": ("U[H,T,E,L], W[L,H,D,E]", "Z[T,D]", "Z[t,d] = U[h,t,e,l] * W[l,h,d,e]"),
    "of a computed side": ("U[H,T,E], W[H,E,D]", "Z[T,D]", "Z[t,d] = sum[h,e] silu(U[h,t,e]) * W[h,e,d] * 2"),
}  # fmt: skip


@pytest.mark.parametrize("name", SUMS)
def test_products_sum_over_one_rank(name: str) -> None:
    text, sizes = program(SUMS[name]), {"B": 2, "H": 3, "T": 20, "E": 32, "L": 2, "D": 24}
    plain = final(text)
    found = with_summed(Joined(plain), {})
    verify(found.cascade)
    assert len(found.sizes) == (2 if name == "three" else 1)
    for known in (sizes, sizes | {"E": 5, "H": 7}):
        generator = torch.Generator().manual_seed(7)
        shapes = {param.name: [known[str(size)] for size in param.shape] for param in plain.params}
        inputs = {n: torch.randn(shape, generator=generator).to(DEVICE) for n, shape in shapes.items()}
        bound = {str(made.size): found.extents(known)[str(made.size)] for made in found.cascade.given}
        before = interp.run(plain, inputs, precision=Precision.REFERENCE)
        after = interp.run(found.cascade, inputs, bound, precision=Precision.REFERENCE)
        torch.testing.assert_close(after["Z"], before["Z"], rtol=1e-12, atol=1e-12)
        call = cascade.compile(text, backend="triton")
        verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
        assert verdict.ok, verdict
        assert "no kernel" not in call.explain()
        assert any("tl.dot" in source for source in call.sources().values())


def test_a_layer_whose_heads_lie_before_its_rows() -> None:
    """What the heads see is read by another kernel, over heads and their columns as one."""
    text = """cascade layer(X[B,T,D], Wq[H,D,E], Wk[H,D,E], Wv[H,D,E], Wo[H,E,D], g[D]) -> Y[B,T,D] {
        L[b,t,d] = rmsnorm[d](X[b,t,d], g[d])
        Q[b,h,t,e] = L[b,t,d] * Wq[h,d,e]
        K[b,h,n,e] = L[b,n,d] * Wk[h,d,e]
        V[b,h,n,e] = L[b,n,d] * Wv[h,d,e]
        S[b,h,t,n] = Q[b,h,t,e] * K[b,h,n,e] / sqrt(E) where n <= t
        P[b,h,t,n] = softmax[n] S[b,h,t,n]
        U[b,h,t,e] = P[b,h,t,n] * V[b,h,n,e]
        Y[b,t,d] = X[b,t,d] + sum[h,e] U[b,h,t,e] * Wo[h,e,d]
    }"""
    call = cascade.compile(text, backend="triton")
    generator = torch.Generator().manual_seed(7)
    for batches, rows in ((2, 40), (1, 70), (2, 33)):
        known = {"B": batches, "T": rows, "D": 64, "H": 4, "E": 16}
        shapes = {param.name: [known[str(size)] for size in param.shape] for param in call.cascade.params}
        inputs = {n: torch.randn(shape, generator=generator).to(DEVICE) / 4 for n, shape in shapes.items()}
        verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
        assert verdict.ok and "no kernel" not in call.explain(), verdict


def test_what_is_one_is_said() -> None:
    found = with_paired(final(program(ONE["a stream"])), SIZES, {"W": 6}).cascade
    said = [render_stmt(stmt) for stmt in found.body]
    assert said[0] == "S[b,m,lw] = sum[e] Q[b,m,e] * K[pages[b,lw//6],lw%6,e] / sqrt(E) where lw < len[b]"
    assert "O_sum[b,m,f] = sum[lw] P_sum_exp[b,m,lw] * V[pages[b,lw//6],lw%6,f] where lw < len[b]" in said
