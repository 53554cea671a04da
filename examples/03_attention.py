"""Attention and its variants: causal, sliding window, documents, grouped queries. A filter is a predicate, not a mask.

Run it with `python -m examples.03_attention`.
"""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import cascade as cs


def attention(keep):
    """Attention over the keys that `keep(b, m, n)` lets a query see."""

    @cs.compile
    def attention(Q, K, V, doc):
        b, h, m, n, e, f = cs.ranks("b h m n e f")
        S = (cs.sum[e](Q[b, h, m, e] * K[b, h // 2, n, e]) / cs.sqrt(e.extent)).where(keep(doc, b, m, n))
        P = cs.exp(S - cs.max[n](S))
        O = cs.sum[n](P * V[b, h // 2, n, f]) / cs.sum[n](P)
        return O[b, h, m, f]

    return attention


VARIANTS = {
    "causal": lambda doc, b, m, n: (n <= m) & (doc[b, m] >= 0),
    "window": lambda doc, b, m, n: (n <= m) & (m - n < 16) & (doc[b, m] >= 0),
    "document": lambda doc, b, m, n: (n <= m) & (doc[b, m] == doc[b, n]),
}


def main() -> None:
    """Every variant equals scaled_dot_product_attention with the mask that it never needs."""
    q, k, v = torch.randn(2, 8, 100, 32), torch.randn(2, 4, 100, 32), torch.randn(2, 4, 100, 32)
    doc = torch.arange(100).div(30, rounding_mode="floor").expand(2, 100)
    m, n = torch.arange(100)[:, None], torch.arange(100)[None, :]
    masks = {
        "causal": n <= m,
        "window": (n <= m) & (m - n < 16),
        "document": ((n <= m) & (doc[:, :, None] == doc[:, None, :]))[:, None],
    }
    shared, key, value = q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    for name, keep in VARIANTS.items():
        variant = attention(keep)
        found = variant(q, k, v, doc)
        wanted = sdpa(shared, key, value, attn_mask=masks[name])
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
        print(f"{name:9} equals scaled_dot_product_attention to {(found - wanted).abs().max():.1e}")

    text = cs.compile("examples/attention.cascade")
    found = text(q, key, value)
    torch.testing.assert_close(found, sdpa(shared, key, value, is_causal=True), rtol=1e-4, atol=1e-5)
    print("examples/attention.cascade equals scaled_dot_product_attention(is_causal=True)")


if __name__ == "__main__":
    main()
