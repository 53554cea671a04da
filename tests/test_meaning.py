"""Every construct against plain torch, in float64 to 1e-12: as written, inlined, canonical, and through `compile`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from cascade.errors import CallError
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.pipeline import run_pipeline
from cascade.verify import verify

B, H, M, N, E, V = 2, 4, 9, 9, 5, 6


@dataclass(frozen=True)
class Case:
    """A program, its inputs and what torch says."""

    name: str
    text: str
    inputs: dict[str, Tensor]
    expected: Callable[..., Tensor | tuple[Tensor, ...]]
    sizes: dict[str, int] = field(default_factory=dict)


CASES: list[Case] = []


def case(text: str, sizes: dict[str, int] | None = None, **inputs: Tensor):
    def add(expected: Callable[..., Tensor | tuple[Tensor, ...]]):
        CASES.append(Case(expected.__name__, text, inputs, expected, sizes or {}))
        return expected

    return add


def randn(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(hash(shape) % 1000)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


Q, K, VV = randn(B, H, M, E), randn(B, H, N, E) + 0.1, randn(B, H, N, V)
m_, n_ = torch.arange(M)[:, None], torch.arange(N)[None, :]


def attend(scores: Tensor, keep: Tensor | None, v: Tensor) -> Tensor:
    if keep is not None:
        scores = scores.masked_fill(~keep, -math.inf)
    return torch.nan_to_num(torch.softmax(scores, -1)) @ v


def scaled(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.mT / math.sqrt(E)


def attention(
    where: str = "", scores: str = "Q[b,h,m,e] * K[b,h,n,e] / sqrt(E)", params: str = "", more: str = ""
) -> str:
    return f"""
cascade attention(Q[B,H,M,E], K[B,H,N,E], V[B,H,N,F]{params}) -> O[B,H,M,F] {{
    S[b,h,m,n] = {scores} {where and "where " + where}
    R[b,h,m]   = max[n] S[b,h,m,n]{more}
    P[b,h,m,n] = exp(S[b,h,m,n] - R[b,h,m])
    D[b,h,m]   = sum[n] P[b,h,m,n]
    O[b,h,m,f] = sum[n] P[b,h,m,n] / D[b,h,m] * V[b,h,n,f]
}}"""


@case(attention(), Q=Q, K=K, V=VV)
def full(Q, K, V):
    return attend(scaled(Q, K), None, V)


@case(attention("n <= m"), Q=Q, K=K, V=VV)
def causal(Q, K, V):
    return attend(scaled(Q, K), n_ <= m_, V)


@case(attention("m - n < 3 and n <= m"), Q=Q, K=K, V=VV)
def window(Q, K, V):
    return attend(scaled(Q, K), (m_ - n_ < 3) & (n_ <= m_), V)


@case(attention("n < 4 or n <= m"), Q=Q, K=K, V=VV)
def prefix(Q, K, V):
    return attend(scaled(Q, K), (n_ < 4) | (n_ <= m_), V)


DOC = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 2, 3, 3]])


@case(
    attention("doc[b,m] == doc[b,n]", params=", doc: i64[B,M]").replace("N,E]", "M,E]").replace("N,F]", "M,F]"),
    Q=Q,
    K=K,
    V=VV,
    doc=DOC,
)
def document(Q, K, V, doc):
    return attend(scaled(Q, K), (doc[:, :, None] == doc[:, None, :])[:, None], V)


@case(attention("n < len[b]", params=", len: i32[B]"), Q=Q, K=K, V=VV, len=torch.tensor([4, 0], dtype=torch.int32))
def ragged(Q, K, V, len):
    return attend(scaled(Q, K), (n_ < len[:, None, None])[:, None], V)


SLOPE = 2.0 ** -torch.arange(1, H + 1, dtype=torch.float64)


@case(
    attention("n <= m", "(sum[e] Q[b,h,m,e] * K[b,h,n,e] / sqrt(E)) - slope[h] * (m - n)", ", slope[H]"),
    Q=Q, K=K, V=VV, slope=SLOPE,
)  # fmt: skip
def alibi(Q, K, V, slope):
    return attend(scaled(Q, K) - slope[:, None, None] * (m_ - n_), n_ <= m_, V)


@case(
    attention("n <= m", "cap * tanh((sum[e] Q[b,h,m,e] * K[b,h,n,e]) / cap)", ", cap[]"),
    Q=Q,
    K=K,
    V=VV,
    cap=torch.tensor(2.0).double(),
)
def softcap(Q, K, V, cap):
    return attend(cap * torch.tanh(Q @ K.mT / cap), n_ <= m_, V)


@case(
    attention("n <= m", "Q[b,h,m,e] * K[b,h//2,n,e] / sqrt(E)").replace("K[B,H,", "K[B,G,").replace("V[B,H,", "V[B,G,").replace("V[b,h,n,f]", "V[b,h//2,n,f]"),
    Q=Q, K=randn(B, 2, N, E), V=randn(B, 2, N, V),
)  # fmt: skip
def grouped_query(Q, K, V):
    return attend(scaled(Q, K.repeat_interleave(2, 1)), n_ <= m_, V.repeat_interleave(2, 1))


@case(
    attention("n <= m", params=", sink[H]").replace("max[n] S[b,h,m,n]", "max(max[n] S[b,h,m,n], sink[h])").replace(
        "D[b,h,m]   = sum[n] P[b,h,m,n]", "D[b,h,m] = (sum[n] P[b,h,m,n]) + exp(sink[h] - R[b,h,m])"),
    Q=Q, K=K, V=VV, sink=torch.linspace(-1, 2, H).double(),
)  # fmt: skip
def sink(Q, K, V, sink):
    scores = scaled(Q, K).masked_fill(n_ > m_, -math.inf)
    with_sink = torch.cat([scores, sink[None, :, None, None].expand(B, H, M, 1)], -1)
    return torch.softmax(with_sink, -1)[..., :-1] @ V


@case(attention(), Q=Q, K=randn(B, H, 13, E), V=randn(B, H, 13, V))
def cross(Q, K, V):
    return attend(scaled(Q, K), None, V)


PAGES = torch.tensor([[3, 0, 5], [1, 4, -1]])
LEN = torch.tensor([9, 7])
POOL = {"Q": Q, "K": randn(6, H, 4, E), "V": randn(6, H, 4, V), "pages": PAGES, "len": LEN}


def gathered(Q, K, V, pages, len):
    k = K[pages.clamp(min=0)].transpose(1, 2).reshape(B, H, 12, E)
    v = V[pages.clamp(min=0)].transpose(1, 2).reshape(B, H, 12, V.shape[-1])
    return attend(scaled(Q, k), (torch.arange(12) < len[:, None])[:, None, None], v)


@case(
    """cascade paged(Q[B,H,M,E], K[C,H,W,E], V[C,H,W,F], pages: i64[B,L], len: i64[B]) -> O[B,H,M,F] {
    S[b,h,m,l,w] = Q[b,h,m,e] * K[pages[b,l],h,w,e] / sqrt(E) where l*4 + w < len[b]
    P[b,h,m,l,w] = softmax[l,w] S[b,h,m,l,w]
    O[b,h,m,f]   = P[b,h,m,l,w] * V[pages[b,l],h,w,f] where l*4 + w < len[b]
}""",
    **POOL,
)
def paged(Q, K, V, pages, len):
    return gathered(Q, K, V, pages, len)


@case(
    attention("n < len[b]", "Q[b,h,m,e] * K[pages[b, n//4],h,n%4,e] / sqrt(E)", ", pages: i64[B,L], len: i64[B]")
    .replace("K[B,H,N,E]", "K[C,H,W,E]").replace("V[B,H,N,F]", "V[C,H,W,F]")
    .replace("V[b,h,n,f]", "V[pages[b, n//4],h,n%4,f] where n < len[b]").replace("O[B,H,M,F] {", "O[B,H,M,F] with n = N {"),
    {"N": 12}, **POOL,
)  # fmt: skip
def paged_by_quotient_and_remainder(Q, K, V, pages, len):
    return gathered(Q, K, V, pages, len)


X = randn(7, 11)


@case("cascade c(X[M,N]) -> Y[M,N] {\n Y[m,n] = softmax[n] X[m,n]\n}", X=X)
def softmax(X):
    return torch.softmax(X, -1)


@case("cascade c(X[M,N]) -> Y[M] {\n Y[m] = logsumexp[n] X[m,n]\n}", X=X)
def logsumexp(X):
    return torch.logsumexp(X, -1)


@case("cascade c(X[M,N]) -> L[M] fill -inf {\n L[m] = logsumexp[n] X[m,n] where n < m\n}", X=X)
def filtered_logsumexp(X):
    return torch.stack([torch.logsumexp(X[m, :m], -1) for m in range(7)])


@case("cascade c(X[M,D], g[D], b[D]) -> Y[M,D] {\n Y[m,d] = layernorm[d](X[m,d], g[d], b[d])\n}", X=X, g=X[0], b=X[1])
def layernorm(X, g, b):
    return F.layer_norm(X, (11,), g, b)


@case("cascade c(X[M,D], g[D]) -> Y[M,D] {\n Y[m,d] = rmsnorm[d](X[m,d], g[d])\n}", X=X, g=X[0])
def rmsnorm(X, g):
    return F.rms_norm(X, (11,), g, 1e-6)


@case(
    """cascade block(X[T,D], Wg[D,F], Wu[D,F], Wd[F,D], g[D]) -> Y[T,D] {
    N[t,d] = X[t,d] * rsqrt(mean[d] X[t,d]*X[t,d] + 1e-6) * g[d]
    H[t,f] = silu(sum[d] N[t,d]*Wg[d,f]) * (sum[d] N[t,d]*Wu[d,f])
    Y[t,d] = X[t,d] + sum[f] H[t,f]*Wd[f,d]
}""",
    X=X, Wg=randn(11, 13), Wu=randn(11, 13) * 2, Wd=randn(13, 11), g=X[3],
)  # fmt: skip
def swiglu_block(X, Wg, Wu, Wd, g):
    n = F.rms_norm(X, (11,), g, 1e-6)
    return X + (F.silu(n @ Wg) * (n @ Wu)) @ Wd


MOE = """cascade moe(X[T,D], Wr[D,N], W1[N,D,F], W2[N,F,D]) -> Y[T,D] {
    G[t,j], I[t,j] = topk[n, 2] softmax[n] (sum[d] X[t,d]*Wr[d,n])
    H[t,j,f] = silu(sum[d] X[t,d] * W1[I[t,j],d,f])
    Y[t,d]   = sum[j] G[t,j] / (sum[j] G[t,j]) * (sum[f] H[t,j,f] * W2[I[t,j],f,d])
}"""


@case(MOE, X=X, Wr=randn(11, 5), W1=randn(5, 11, 6), W2=randn(5, 6, 11))
def mixture_of_experts(X, Wr, W1, W2):
    gates, chosen = torch.topk(torch.softmax(X @ Wr, -1), 2)
    rows = []
    for x, gate, picks in zip(X, gates, chosen, strict=True):
        out = sum(g * (F.silu(x @ W1[i]) @ W2[i]) for g, i in zip(gate, picks, strict=True))
        rows.append(out / gate.sum())
    return torch.stack(rows)


@case(
    "cascade c(R[T,N]) -> G[T,3], I[T,3] {\n G[t,j], I[t,j] = topk[n, 3] R[t,n]\n}",
    R=torch.tensor([[1.0, 5, 5, 2], [4, 4, 4, 4]]).double(),
)
def topk_ties_go_to_the_lower_coordinate(R):
    return torch.tensor([[5.0, 5, 2], [4, 4, 4]]), torch.tensor([[1, 2, 3], [0, 1, 2]])


@case(
    "cascade c(X[B,S,C], W[K,C,D]) -> Y[B,S,D] {\n Y[b,t,d] = X[b,t+w,c] * W[w,c,d]\n}",
    X=randn(2, 8, 3),
    W=randn(3, 3, 4),
)
def convolution(X, W):
    padded = F.pad(X, (0, 0, 0, 2))
    return F.conv1d(padded.mT, W.permute(2, 1, 0)).mT


@case(
    "cascade c(X[B,S,C], W[K,C,D]) -> Y[B,T,D] {\n Y[b,t,d] = X[b,2*t+w-1,c] * W[w,c,d]\n}",
    {"T": 4},
    X=randn(2, 8, 3),
    W=randn(3, 3, 4),
)
def strided_convolution(X, W):
    return F.conv1d(F.pad(X, (0, 0, 1, 1)).mT, W.permute(2, 1, 0), stride=2).mT


@case(
    "cascade c(ids: i64[B,T], W[N,D]) -> Y[B,T,D] {\n Y[b,t,d] = W[ids[b,t],d]\n}",
    ids=torch.tensor([[0, 3, 2], [1, 1, 4]]),
    W=randn(5, 6),
)
def embedding(ids, W):
    return F.embedding(ids, W)


@case(
    "cascade c(A[T,D], X[T,D]) -> H[T,D] {\n H[t,d] = A[t,d] * H[t-1,d] + X[t,d]  init H[-1,d] = 0\n}", A=X, X=X.flip(0)
)
def linear_recurrence(A, X):
    h, rows = torch.zeros(11).double(), []
    for a, x in zip(A, X, strict=True):
        h = a * h + x
        rows.append(h)
    return torch.stack(rows)


@case("cascade c(X[T,D]) -> C[T,D] {\n C[t,d] = C[t-1,d] + X[t,d]  init C[-1,d] = 0\n}", X=X)
def cumulative_sum(X):
    return X.cumsum(0)


@case("cascade c(X[T,D]) -> C[T,D] {\n C[t,d] = sum[s] X[s,d] where s <= t\n}", X=X)
def cumulative_sum_by_filter(X):
    return X.cumsum(0)


@case(
    "cascade c(X[T]) -> F[T] {\n F[t] = F[t-1] + F[t-2] + X[t] init F[-1] = 1, F[-2] = 0\n}", X=torch.zeros(8).double()
)
def fibonacci(X):
    return torch.tensor([1, 2, 3, 5, 8, 13, 21, 34]).double()


@case(
    """cascade c(K[T,D], V[T,F], b[T], q[T,D]) -> O[T,F] {
    U[t,f]   = V[t,f] - (sum[d] K[t,d] * S[t-1,d,f])
    S[t,d,f] = S[t-1,d,f] + b[t] * K[t,d] * U[t,f]  init S[-1,d,f] = 0
    O[t,f]   = sum[d] q[t,d] * S[t,d,f]
}""",
    K=randn(6, 3), V=randn(6, 4), b=randn(6), q=randn(6, 3) + 1,
)  # fmt: skip
def delta_rule(K, V, b, q):
    state, rows = torch.zeros(3, 4).double(), []
    for t in range(6):
        state = state + b[t] * torch.outer(K[t], V[t] - K[t] @ state)
        rows.append(q[t] @ state)
    return torch.stack(rows)


@case(
    """cascade c(Z[T,N], y: i64[T]) -> L[] {
    P[t] = (logsumexp[n] Z[t,n]) - Z[t,y[t]]
    L = mean[t] P[t]
}""",
    Z=X, y=torch.tensor([0, 3, 10, 2, 2, 5, 9]),
)  # fmt: skip
def cross_entropy(Z, y):
    return F.cross_entropy(Z, y)


@case(
    "cascade c(X[M,N]) -> A[M], I[M], C[M] {\n A[m] = argmax[n] X[m,n]\n I[m] = argmin[n] X[m,n] where n > 2\n C[m] = count[n] X[m,n] where n > m\n}",
    X=X,
)
def arg_extremes_and_counts(X):
    return X.argmax(-1), X[:, 3:].argmin(-1) + 3, torch.tensor([10 - m for m in range(7)])


@case(
    "cascade c(X[M,N]) -> P[M], A[M], E[M], Z[M,N] {\n P[m] = prod[n] X[m,n]\n A[m] = all[n] (X[m,n] > -2)\n E[m] = any[n] (X[m,n] > 2)\n Z[m,n] = (X[m,n+1] ?? 7.0) + clamp(X[m,n], -1, 1)\n}",
    X=X,
)
def products_truths_and_defaults(X):
    shifted = torch.cat([X[:, 1:], torch.full((7, 1), 7.0)], 1)
    return X.prod(-1), (X > -2).all(-1), (X > 2).any(-1), shifted + X.clamp(-1, 1)


@case(
    """cascade inner(A[M,K], B[K,N]) -> C[M,N] fill 9 {
    C[m,n] = sum[k] A[m,k] * B[k,n] where n <= m
}
cascade outer(X[T,D], W[D,D]) -> Y[T,D] {
    Z = inner(X, W)
    Y[t,d] = Z[t,d] * 2
}""",
    X=randn(4, 4), W=randn(4, 4) + 1,
)  # fmt: skip
def a_cascade_in_a_cascade_gives_filled_results(X, W):
    return torch.where(torch.ones(4, 4).tril().bool(), X @ W, 9.0) * 2


@case(
    """cascade split(X[T,8]) -> Y[T,2,4] {
    Y[t,h,e] = X[t,h*4+e]
}
cascade outer(X[T,8]) -> Z[T] {
    Y = split(X)
    Z[t] = sum[h,e] Y[t,h,e] * Y[t,h,e]
}""",
    X=randn(3, 8),
)
def a_callee_whose_result_gives_the_extents(X):
    return (X * X).sum(-1)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_meaning(case: Case) -> None:
    cascade = parse_cascade(case.text)
    verify(cascade)
    expected = case.expected(**case.inputs)
    wanted = expected if isinstance(expected, tuple) else (expected,)
    for step in [cascade, *(s.after for s in run_pipeline(cascade).steps)]:
        found = run(step, case.inputs, case.sizes, Precision.REFERENCE)
        for have, want in zip(found.values(), wanted, strict=True):
            assert have.shape == want.shape
            assert torch.allclose(have.double(), want.double(), rtol=0, atol=1e-12)


def test_masked_nan_reaches_nothing_and_live_nan_exactly_its_readers() -> None:
    cascade = parse_cascade(attention("n < len[b]", params=", len: i32[B]"))
    lengths = torch.tensor([4, 2], dtype=torch.int32)
    clean = run(cascade, {"Q": Q, "K": K, "V": VV, "len": lengths})["O"]
    dirty_k, dirty_v = K.clone(), VV.clone()
    dirty_k[0, :, 4:], dirty_v[1, :, 2:] = math.nan, math.inf
    cleaned = run(cascade, {"Q": Q, "K": dirty_k, "V": dirty_v, "len": lengths})["O"]
    assert torch.allclose(cleaned, clean, rtol=0, atol=1e-12)
    live = VV.clone()
    live[1, 2, 0, 3] = math.nan
    found = run(cascade, {"Q": Q, "K": K, "V": live, "len": lengths})["O"]
    assert torch.equal(found.isnan(), _only(found, 1, 2, 3))


def _only(like: Tensor, b: int, h: int, f: int) -> Tensor:
    mask = torch.zeros_like(like, dtype=torch.bool)
    mask[b, h, :, f] = True
    return mask


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_meaning_on_the_device_of_the_tensors() -> None:
    for case in CASES:
        inputs = {name: tensor.cuda() for name, tensor in case.inputs.items()}
        expected = case.expected(**case.inputs)
        for have, want in zip(
            run(parse_cascade(case.text), inputs, case.sizes, Precision.REFERENCE).values(),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        ):
            assert have.is_cuda, case.name
            assert torch.allclose(have.cpu().double(), want.double(), rtol=0, atol=1e-12), case.name


@pytest.mark.parametrize(
    ("text", "inputs", "code", "place"),
    [
        ("Y[t] = A[t] // I[t]", {"A": torch.tensor([7, 7]), "I": torch.tensor([2, 0])}, "C310", (2, 12)),
        ("Y[t] = A[I[t]]", {"A": torch.tensor([7, 7]), "I": torch.tensor([1, 2])}, "C311", (2, 14)),
        ("Y[t] = A[I[t]]", {"A": torch.tensor([7, 7]), "I": torch.tensor([0.0, 1.0])}, "C312", (2, 14)),
    ],
)
def test_data_that_has_no_meaning_is_an_error_with_its_place(
    text: str, inputs: dict[str, Tensor], code: str, place: tuple[int, int]
) -> None:
    cascade = parse_cascade(f"cascade c(A[T], I[T]) -> Y[T] {{\n    {text}\n}}")
    with pytest.raises(CallError) as caught:
        run(cascade, inputs)
    (found,) = caught.value.diagnostics
    assert found.code == code and found.span is not None and (found.span.line, found.span.column) == place
    filtered = parse_cascade(f"cascade c(A[T], I[T]) -> Y[T] {{\n    {text} where t < 1\n}}")
    assert code == "C312" or int(run(filtered, inputs)["Y"][1]) == 0
