"""Programs of layers that kernels are tested on: norms before products, gated blocks, losses, few bits, experts.

`benchmarks.correctness --blocks` runs them on a GPU at the widths of layers; they are no part of what is swept otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor

from tests.kernel_programs import Input, Program, Sizes

ROOT = Path(__file__).parent.parent
WIDTHS = (4096, 5120, 7168)
ROWS = (1, 16, 300)
LINEAR: tuple[Sizes, ...] = (
    {"T": 37, "D": 97, "F": 131},
    {"T": 37, "D": 700, "F": 131},
    {"T": 5, "D": 1024, "F": 70},
    *({"T": rows, "D": width, "F": 131} for width in WIDTHS for rows in ROWS),
    {"T": 8192, "D": 4096, "F": 512},
)
X = Input("T D", weighs="D", partner=True)
GAIN = Input("D", centre=1.0, spread=0.3)
WEIGHT = Input("F D", drives="D", spread=0.05)
UNLIKELY = frozenset({"negative"})  # sums of a thousand numbers far from 0, which no layer has


def bytes_of(shape: str) -> Callable[[Sizes, Generator], Tensor]:
    """Whole numbers of 8 bits."""

    def made(sizes: Sizes, generator: Generator) -> Tensor:
        extents = [sizes[word] for word in shape.split()]
        return torch.randint(-128, 128, extents, generator=generator).to(torch.int8)

    return made


def scales_of(shape: str) -> Callable[[Sizes, Generator], Tensor]:
    """Scales of such weights: all positive."""

    def made(sizes: Sizes, generator: Generator) -> Tensor:
        return (torch.rand([sizes[word] for word in shape.split()], generator=generator) + 0.5) / 128

    return made


def words(sizes: Sizes, generator: Generator) -> Tensor:
    """A word for each row."""
    return torch.randint(0, max(1, sizes["F"]), (sizes["T"],), generator=generator)


def routing(kind: str) -> Callable[[Sizes, Generator], Tensor]:
    """The experts of each row: all alike, most of them few, all the last one, or none of the first half."""

    def made(sizes: Sizes, generator: Generator) -> Tensor:
        shape, experts = (sizes["T"], sizes["J"]), max(1, sizes["N"])
        index = torch.randint(0, experts, shape, generator=generator)
        if kind == "skewed":
            index = index * torch.randint(0, 2, shape, generator=generator) // 2
        elif kind == "one":
            index = torch.full_like(index, experts - 1)
        elif kind == "empty":
            index = experts // 2 + index // 2
        return index.clamp(0, experts - 1)

    return made


def linear(name: str, text: str, inputs: dict[str, Input], **options: object) -> Program:
    """A program around X[T,D] W[F,D]."""
    fields: dict[str, object] = {
        "inputs": inputs, "small": {"T": 5, "D": 40, "F": 19}, "large": LINEAR, "lengths": ("T",), "rows": "T",
        "reach": 1.0, "without": UNLIKELY,
    }  # fmt: skip
    return Program(name=name, text=text, **{**fields, **options})  # type: ignore[arg-type]


def experts(kind: str) -> Program:
    """A gated block whose weights an index chooses."""
    large = (
        {"T": 37, "D": 131, "F": 97, "N": 7, "J": 2}, {"T": 131, "D": 97, "F": 131, "N": 256, "J": 8},
        {"T": 64, "D": 4096, "F": 16, "N": 8, "J": 2}, {"T": 8192, "D": 64, "F": 48, "N": 8, "J": 2},
        {"T": 300, "D": 64, "F": 80, "N": 1, "J": 1}, {"T": 16, "D": 512, "F": 64, "N": 64, "J": 6},
    )  # fmt: skip
    return linear(
        f"experts_{kind}",
        """cascade c(X[T,D], I: i64[T,J], G[T,J], W[N,D,F], U[N,D,F], V[N,F,D]) -> Y[T,D] {
    H[t,j,f] = silu(sum[d] X[t,d] * W[I[t,j],d,f]) * (sum[d] X[t,d] * U[I[t,j],d,f])
    Y[t,d] = sum[j] G[t,j] * (sum[f] H[t,j,f] * V[I[t,j],f,d])
}""",
        {
            "X": Input("T D", weighs="D"), "I": Input("T J", make=routing(kind)), "G": Input("T J"),
            "W": Input("N D F", spread=0.1), "U": Input("N D F", spread=0.1), "V": Input("N F D", spread=0.1),
        },
        small={"T": 6, "D": 24, "F": 17, "N": 5, "J": 2}, large=large,
        without=UNLIKELY | {"spike"},  # the gate of a spike has no rounding that two orders of sums share
        overflows=frozenset({"integers"}),
    )  # fmt: skip


def layer() -> Program:
    """A whole decoder layer."""
    sizes = {"T": 24, "D": 96, "E": 16, "H": 8, "G": 2, "F": 48}
    wide = {"D": 512, "E": 64, "H": 8, "G": 2, "F": 1000}
    small = 0.08
    return Program(
        "decoder_layer",
        (ROOT / "examples/decoder_layer.cascade").read_text(encoding="utf-8"),
        {
            "X": Input("T D"), "cosine": Input("T E"), "sine": Input("T E"), "g1": GAIN, "g2": GAIN,
            "Wq": Input("H E D", spread=small), "Wk": Input("G E D", spread=small), "Wv": Input("G E D", spread=small),
            "Wo": Input("D H E", spread=small), "Wg": Input("F D", spread=small), "Wu": Input("F D", spread=small),
            "Wd": Input("D F", spread=small),
        },
        small=sizes, large=tuple({**wide, "T": rows} for rows in (1, 16, 131, 300)), lengths=("T",),
        without=frozenset({"rising", "falling", "spike", "negative", "integers", "nan"}),
    )  # fmt: skip


BLOCKS: dict[str, Program] = {
    program.name: program
    for program in (
        linear(
            "rmsnorm_linear",
            "cascade c(X[T,D], g[D], W[F,D]) -> Y[T,F] {\n N[t,d] = rmsnorm[d](X[t,d], g[d])\n Y[t,f] = N[t,d] * W[f,d]\n}",
            {"X": X, "g": GAIN, "W": WEIGHT},
        ),
        linear(
            "layernorm_linear",
            "cascade c(X[T,D], g[D], b[D], W[F,D]) -> Y[T,F] {\n"
            " N[t,d] = layernorm[d](X[t,d], g[d], b[d])\n Y[t,f] = N[t,d] * W[f,d]\n}",
            {"X": X, "g": GAIN, "b": Input("D", spread=0.3), "W": WEIGHT},
        ),
        linear(
            "residual_norm_linear",
            "cascade c(X[T,D], R[T,D], g[D], W[F,D]) -> A[T,D], Y[T,F] {\n A[t,d] = X[t,d] + R[t,d]\n"
            " N[t,d] = rmsnorm[d](A[t,d], g[d])\n Y[t,f] = N[t,d] * W[f,d]\n}",
            {"X": X, "R": Input("T D"), "g": GAIN, "W": WEIGHT},
        ),
        linear(
            "gated_block",
            "cascade c(X[T,D], G[F,D], U[F,D], W[D,F]) -> Y[T,D] {\n"
            " H[t,f] = silu(sum[d] X[t,d] * G[f,d]) * (sum[d] X[t,d] * U[f,d])\n Y[t,d] = H[t,f] * W[d,f]\n}",
            {"X": X, "G": Input("F D", spread=0.05), "U": Input("F D", spread=0.05), "W": Input("D F", spread=0.05)},
        ),
        linear(
            "linear_loss",
            "cascade c(X[T,D], W[F,D], y: i64[T]) -> L: f32[T] {\n"
            " Z[t,v] = X[t,d] * W[v,d]\n L[t] = (logsumexp[v] Z[t,v]) - Z[t,y[t]]\n}",
            {"X": X, "W": WEIGHT, "y": Input("T", make=words)},
        ),
        linear(
            "linear_divergence",
            "cascade c(X[T,D], W[F,D], U[T,D], M[F,D]) -> L: f32[T] {\n S[t,v] = X[t,d] * W[v,d]\n"
            " H[t,v] = U[t,d] * M[v,d]\n A[t,v] = S[t,v] - logsumexp[v] S[t,v]\n"
            " B[t,v] = H[t,v] - logsumexp[v] H[t,v]\n L[t] = sum[v] exp(B[t,v]) * (B[t,v] - A[t,v])\n}",
            {"X": X, "W": WEIGHT, "U": Input("T D"), "M": Input("F D", spread=0.05)},
        ),
        linear(
            "eight_bits",
            "cascade c(X[T,D], W: i8[F,D], s[F]) -> Y[T,F] {\n Y[t,f] = sum[d] X[t,d] * W[f,d] * s[f]\n}",
            {"X": X, "W": Input("F D", make=bytes_of("F D")), "s": Input("F", make=scales_of("F"))},
        ),
        linear(
            "bytes_as_floats",
            "cascade c(X[T,D], W: i8[F,D], s[F]) -> Y[T,F] {\n"
            " Q[f,d] = cast(W[f,d], f16)\n Y[t,f] = X[t,d] * Q[f,d] * s[f]\n}",
            {"X": X, "W": Input("F D", make=bytes_of("F D")), "s": Input("F", make=scales_of("F"))},
        ),
        linear(
            "four_bits",
            "cascade c(X[T,D], W: i8[F,E], s[F,G]) -> Y[T,F] {\n"
            " Q[f,d] = select(d % 2 == 0, W[f,d // 2] % 16, W[f,d // 2] // 16 % 16) - 8\n"
            " Y[t,f] = X[t,d] * Q[f,d] * s[f,d // 128]\n}",
            {"X": X, "W": Input("F E", make=bytes_of("F E")), "s": Input("F G", make=scales_of("F G"))},
            complete=lambda sizes: {**sizes, "E": -(-sizes["D"] // 2), "G": -(-sizes["D"] // 128)},
        ),
        linear(
            "loss_of_bytes_in_groups",
            "cascade c(X[T,D], W: i8[F,D], s[F,G]) -> L: f32[T] {\n"
            " Z[t,v] = sum[d] X[t,d] * W[v,d] * s[v,d // 128]\n L[t] = logsumexp[v] Z[t,v]\n}",
            {"X": X, "W": Input("F D", make=bytes_of("F D")), "s": Input("F G", make=scales_of("F G"))},
            complete=lambda sizes: {**sizes, "G": -(-sizes["D"] // 128)},
        ),
        *map(experts, ("even", "skewed", "one", "empty")),
        layer(),
    )
}
