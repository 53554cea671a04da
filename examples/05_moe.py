"""A mixture of experts as plain maths: routing, indexing the weights by data, and combining.

Run it with `python -m examples.05_moe`.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

import cascade as cs


@cs.compile
def moe(X, Wr, W1, W2):
    t, d, n, f = cs.ranks("t d n f")
    j = cs.ranks("j=2")
    R = cs.softmax[n](cs.sum[d](X[t, d] * Wr[d, n]))
    G, I = cs.topk[n, j](R)
    H = cs.silu(cs.sum[d](X[t, d] * W1[I, d, f]))
    Y = cs.sum[j](G / cs.sum[j](G) * cs.sum[f](H * W2[I, f, d]))
    return Y[t, d]


def loop_over_experts(X, Wr, W1, W2):
    """What everyone writes by hand: for each expert, the tokens that chose it."""
    gates, chosen = torch.topk(torch.softmax(X @ Wr, -1), 2)
    gates = gates / gates.sum(-1, keepdim=True)
    out = torch.zeros_like(X)
    for expert in range(W1.shape[0]):
        token, slot = torch.where(chosen == expert)
        out.index_add_(0, token, gates[token, slot, None] * (F.silu(X[token] @ W1[expert]) @ W2[expert]))
    return out


def main() -> None:
    """The plain maths equals the loop, whatever the routing: even, skewed, or experts that nobody chose."""
    x, wr = torch.randn(64, 32), torch.randn(32, 8)
    x[:, 0] = 1.0  # a constant feature, so that a row of the router is a bias
    w1, w2 = torch.randn(8, 32, 48) / 6, torch.randn(8, 48, 32) / 7
    print(moe.cascade)
    bias = torch.zeros(32, 8)
    bias[0, 3:] = -100.0
    for name, router in {"even": wr, "skewed": wr * torch.linspace(0.1, 3, 8), "three experts": wr + bias}.items():
        found = moe(x, router, w1, w2)
        torch.testing.assert_close(found, loop_over_experts(x, router, w1, w2), rtol=1e-4, atol=1e-5)
        print(f"{name:13} routing: equal to a loop over experts")


if __name__ == "__main__":
    main()
