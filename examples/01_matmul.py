"""A matrix product, as text and as traced Python: one cascade, one meaning.

Run it with `python -m examples.01_matmul`.
"""

from __future__ import annotations

import torch

import cascade as cs

TEXT = """
cascade matmul(A[M,K], B[K,N]) -> C[M,N] {
    C[m,n] = A[m,k] * B[k,n]
}
"""


@cs.compile
def matmul(A, B):
    m, n, k = cs.ranks("m n k")
    C = cs.sum[k](A[m, k] * B[k, n])
    return C[m, n]


def main() -> None:
    """Both notations give the same cascade, and its results are those of torch."""
    a, b = torch.randn(96, 131), torch.randn(131, 64)
    from_text = cs.parse(TEXT)
    print(matmul.cascade)
    assert matmul.cascade == from_text.cascade, "the two notations differ"
    torch.testing.assert_close(matmul(a, b), a @ b)
    torch.testing.assert_close(from_text(A=a, B=b), a @ b)
    print("text and Python agree, and both equal a @ b")


if __name__ == "__main__":
    main()
