"""Softmax by definition: what `softmax[n]` stands for, and what becomes of it in the pipeline.

Run it with `python -m examples.02_softmax`.
"""

from __future__ import annotations

import torch

import cascade as cs


@cs.compile
def rows(X):
    m, n = cs.ranks("m n")
    P = cs.exp(X[m, n] - cs.max[n](X[m, n]))
    Y = P / cs.sum[n](P)
    return Y[m, n]


def main() -> None:
    """Written out and from the library: both equal torch's, also where a row has no live coordinate."""
    x = torch.randn(50, 301)
    print(rows.cascade)
    torch.testing.assert_close(rows(x), torch.softmax(x, -1))
    library = cs.compile("examples/softmax.cascade")
    torch.testing.assert_close(library(x), torch.softmax(x, -1))

    ragged = cs.parse("""
    cascade ragged(X[M,N], len: i64[M]) -> Y[M,N] {
        Y[m,n] = softmax[n] X[m,n]   where n < len[m]
    }""")
    lengths = torch.tensor([0, 1, 301])
    found = ragged(x[:3], lengths)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(found[row, :length], torch.softmax(x[row, :length], -1))
        assert not found[row, length:].any(), "an absent coordinate is stored as the fill, 0"
    print("a row over nothing is absent, and stored as 0, not NaN")


if __name__ == "__main__":
    main()
