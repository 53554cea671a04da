"""A transformer block: attention with rotary embedding and a gated MLP, two cascades composed in a third.

Run it with `python -m examples.04_block`.
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

import cascade as cs

TEXT = """
# Half-split rotary embedding: coordinate e turns with its partner half a head away, by an angle of its position.
cascade turn(X[T,H,E], angle[T,E]) -> Y[T,H,E] {
    R[t,h,e] = select(e < E // 2, -1, 1) * X[t,h,(e + E//2) % E]
    Y[t,h,e] = X[t,h,e] * cos(angle[t,e]) + R[t,h,e] * sin(angle[t,e])
}

cascade mix(X[T,D], angle[T,E], g[D], Wq[D,H,E], Wk[D,H,E], Wv[D,H,E], Wo[H,E,D]) -> Y[T,D] {
    N[t,d]   = rmsnorm[d](X[t,d], g[d])
    Q[t,h,e] = N[t,d] * Wq[d,h,e]
    K[t,h,e] = N[t,d] * Wk[d,h,e]
    V[t,h,e] = N[t,d] * Wv[d,h,e]
    A = turn(Q, angle)
    C = turn(K, angle)
    S[h,m,n] = A[m,h,e] * C[n,h,e] / sqrt(E)   where n <= m
    P[h,m,n] = softmax[n] S[h,m,n]
    U[m,h,e] = P[h,m,n] * V[n,h,e]
    Y[m,d]   = X[m,d] + sum[h,e] U[m,h,e] * Wo[h,e,d]
}

cascade block(
    X[T,D], angle[T,E], g1[D], Wq[D,H,E], Wk[D,H,E], Wv[D,H,E], Wo[H,E,D], g2[D], Wg[D,F], Wu[D,F], Wd[F,D]
) -> Y[T,D] {
    Z = mix(X, angle, g1, Wq, Wk, Wv, Wo)
    N[t,d] = rmsnorm[d](Z[t,d], g2[d])
    G[t,f] = silu(sum[d] N[t,d]*Wg[d,f]) * (sum[d] N[t,d]*Wu[d,f])
    Y[t,d] = Z[t,d] + sum[f] G[t,f]*Wd[f,d]
}
"""


def plain(X, angle, g1, Wq, Wk, Wv, Wo, g2, Wg, Wu, Wd):
    """The same block in plain torch."""
    t, d = X.shape
    n = F.rms_norm(X, (d,), g1, 1e-6)
    q, k, v = (torch.einsum("td,dhe->hte", n, w) for w in (Wq, Wk, Wv))

    def turn(x):
        left, right = x.chunk(2, -1)
        return x * angle.cos() + torch.cat([-right, left], -1) * angle.sin()

    scores = (turn(q) @ turn(k).mT / math.sqrt(q.shape[-1])).masked_fill(~torch.ones(t, t).tril().bool(), -math.inf)
    z = X + torch.einsum("hte,hed->td", scores.softmax(-1) @ v, Wo)
    n = F.rms_norm(z, (d,), g2, 1e-6)
    return z + (F.silu(n @ Wg) * (n @ Wu)) @ Wd


def main() -> None:
    """The composed block equals plain torch."""
    t, d, h, e, f = 40, 64, 4, 16, 96
    frequencies = 10000.0 ** (-torch.arange(e // 2) / (e // 2))
    angle = (torch.arange(t)[:, None] * frequencies).repeat(1, 2)
    shapes = {"g1": (d,), "Wq": (d, h, e), "Wk": (d, h, e), "Wv": (d, h, e), "Wo": (h, e, d), "g2": (d,),
              "Wg": (d, f), "Wu": (d, f), "Wd": (f, d)}  # fmt: skip
    weights = {name: torch.randn(shape) / math.sqrt(shape[0]) for name, shape in shapes.items()}
    x = torch.randn(t, d)
    block = cs.parse(TEXT)
    found = block(x, angle, **weights)
    torch.testing.assert_close(found, plain(x, angle, **weights), rtol=1e-4, atol=1e-4)
    print(f"{len(block.cascade.body)} statements as written; equal to plain torch on {t} tokens of width {d}")


if __name__ == "__main__":
    main()
