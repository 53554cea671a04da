"""The table `rows`: norms, softmaxes and what else reduces rows, then two attentions that have no fused peer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import programs
from benchmarks.attention import Shape, checked
from benchmarks.attention import found as attended
from benchmarks.peers import liger, plain
from benchmarks.workload import Bar, Inputs, Peer, Workload, normal

BF16 = torch.bfloat16
COMPILED = Bar(0.98, peer="torch.compile")
Maths = Callable[[Inputs], Any]


def slice_of(value: Tensor) -> Tensor:
    """Sixteen rows, from the first to the last; a number stands for itself."""
    if value.dim() == 0:
        return value.reshape(1, 1)
    chosen = torch.linspace(0, len(value) - 1, min(16, len(value)), device=value.device).long()
    return value[chosen].reshape(len(chosen), -1)


def sliced(out: Any, inputs: Inputs) -> Tensor:
    """The checked rows of one result, or of several side by side."""
    return torch.cat([slice_of(part) for part in out], 1) if isinstance(out, tuple) else slice_of(out)


def exact(maths: Maths, whole: tuple[str, ...] = ()) -> Callable[[Inputs], Tensor]:
    """The maths on the checked rows in float64; inputs named in `whole` belong to all rows."""

    def expected(inputs: Inputs) -> Tensor:
        rows = {
            name: (value if name in whole else slice_of(value)).double() if value.is_floating_point() else value
            for name, value in inputs.items()
        }
        out = maths(rows)
        return torch.cat([part.reshape(len(part), -1) for part in (out if isinstance(out, tuple) else (out,))], 1)

    return expected


def like(inputs: Inputs) -> torch.dtype:
    """What the maths computes in: float32 for 16 bits, else the type of the inputs."""
    dtype: torch.dtype = inputs["X"].dtype
    return torch.float32 if dtype is BF16 else dtype


def rmsnorm(inputs: Inputs) -> Tensor:
    """Rows of root mean square 1, times a gain."""
    x: Tensor = inputs["X"].to(like(inputs))
    out: Tensor = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * inputs["g"]
    return out.to(inputs["X"].dtype)


def residual_rmsnorm(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The sum of two tensors, and its rows normalised."""
    total = inputs["X"] + inputs["R"]
    return total, rmsnorm({"X": total, "g": inputs["g"]})


def layernorm(inputs: Inputs) -> Tensor:
    """PyTorch's own."""
    return F.layer_norm(inputs["X"], inputs["X"].shape[-1:], inputs["g"], inputs["h"], 1e-5)


def softmax(inputs: Inputs) -> Tensor:
    """PyTorch's own."""
    return torch.softmax(inputs["X"], -1)


def entropy(inputs: Inputs) -> Tensor:
    """The entropy of the softmax of each row."""
    p = torch.softmax(inputs["X"].to(like(inputs)), -1)
    return (-(p * p.log()).sum(-1)).to(inputs["X"].dtype)


def divergence(inputs: Inputs) -> Tensor:
    """The Kullback-Leibler divergence between the softmaxes of two rows."""
    p = torch.log_softmax(inputs["X"].to(like(inputs)), -1)
    q = torch.log_softmax(inputs["Z"].to(like(inputs)), -1)
    return (p.exp() * (p - q)).sum(-1).to(inputs["X"].dtype)


def variance(inputs: Inputs) -> Tensor:
    """The mean square of each row less its mean."""
    x: Tensor = inputs["X"]
    return x.to(like(inputs)).var(-1, correction=0).to(x.dtype)


def cumulative_sum(inputs: Inputs) -> Tensor:
    """The sums of a row up to each of its elements."""
    x: Tensor = inputs["X"]
    return torch.cumsum(x, -1, dtype=like(inputs)).to(x.dtype)


def route(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The eight most likely of each row, scaled to add up to 1."""
    weights, chosen = torch.topk(torch.softmax(inputs["X"].to(like(inputs)), -1), 8)
    return (weights / weights.sum(-1, keepdim=True)).to(inputs["X"].dtype), chosen


def routed(out: tuple[Tensor, Tensor], inputs: Inputs) -> Tensor:
    """The weights, and the logits that were chosen: where some are equal the indices may differ, these may not."""
    weights, chosen = out
    return torch.cat([slice_of(weights), slice_of(inputs["X"].gather(1, chosen.long()))], 1)


def routed_exactly(inputs: Inputs) -> Tensor:
    """The same in float64."""
    rows = {"X": slice_of(inputs["X"]).double()}
    weights, chosen = route(rows)
    return torch.cat([weights, rows["X"].gather(1, chosen)], 1)


def cross_entropy(inputs: Inputs) -> Tensor:
    """PyTorch's own, in float32."""
    return F.cross_entropy(inputs["Z"].float(), inputs["y"])


def cross_entropy_exactly(inputs: Inputs) -> Tensor:
    """In float64, some rows at a time."""
    parts = zip(inputs["Z"].split(256), inputs["y"].split(256), strict=True)
    total = sum(float(F.cross_entropy(z.double(), y, reduction="sum")) for z, y in parts)
    return torch.tensor([[total / len(inputs["y"])]], dtype=torch.float64, device=inputs["Z"].device)


def table(device: torch.device, options: Any) -> Iterator[Workload]:
    """The table `rows`."""
    yield from norms(device, options.tiny)
    yield from statistics(device, options.tiny)
    yield from attentions(device, options.tiny)


def matrix(
    name: str, text: str, maths: Maths, shape: tuple[int, int], bars: tuple[Bar, ...], peers: dict[str, Peer],
    tiny: bool, names: str = "X", vectors: str = "", results: float = 1.0,
) -> Workload:  # fmt: skip
    """A workload over matrices `names` and vectors along their rows; `results` matrices are written."""
    rows, columns = (24, 64) if tiny else shape

    def inputs(generator: torch.Generator) -> Inputs:
        found: Inputs = {matrix: normal(generator, rows, columns) for matrix in names}
        return found | {vector: normal(generator, columns) for vector in vectors}

    moved = 2.0 * rows * columns * (len(names) + results)
    expected = exact(maths, tuple(vectors))
    return Workload(f"{name} {shape[0]} {shape[1]}", text, inputs, expected, sliced, peers, bars, moved=moved)


def norms(device: torch.device, tiny: bool) -> Iterator[Workload]:
    """Norms, softmax."""
    large = (16384, 8192)
    peers = plain(rmsnorm, device) | liger("liger_rms_norm", "X", "g", more=(1e-6, 0.0, "llama", False))
    yield matrix("rmsnorm", programs.RMSNORM, rmsnorm, large, (COMPILED,), peers, tiny, "X", "g")
    peers = plain(residual_rmsnorm, device)
    yield matrix(
        "residual+rmsnorm", programs.RESIDUAL_RMSNORM, residual_rmsnorm, large, (COMPILED,), peers, tiny, "XR", "g", 2.0
    )
    peers = plain(layernorm, device) | liger("liger_layer_norm", "X", "g", "h", more=(1e-5,))
    yield matrix("layernorm", programs.LAYERNORM, layernorm, large, (COMPILED,), peers, tiny, "X", "gh")
    for shape, of_copy, ms in ((large, 0.88, 0.142), ((2048, 131072), 0.757, 0.33)):
        peers = plain(softmax, device) | liger("liger_softmax", "X")
        bars = (Bar(of_copy, copy=True), Bar(ms=ms, goal=True))
        yield matrix("softmax", programs.SOFTMAX, softmax, shape, bars, peers, tiny)


def statistics(device: torch.device, tiny: bool) -> Iterator[Workload]:
    """One number or a few for each row, and running sums."""
    wide = (8192, 32768)
    for name, text, maths, of_copy, ms, names in (
        ("entropy", programs.ENTROPY, entropy, 0.845, 0.148, "X"),
        ("kl", programs.KL, divergence, 0.943, 0.265, "XZ"),
        ("variance", programs.VARIANCE, variance, 0.954, 0.131, "X"),
    ):
        bars = (Bar(of_copy, copy=True), Bar(ms=ms, goal=True))
        yield matrix(name, text, maths, wide, bars, plain(maths, device), tiny, names, results=1 / wide[1])
    bars, peers = (COMPILED, Bar(0.85, copy=True, goal=True)), plain(cumulative_sum, device)
    yield matrix("cumulative sum", programs.CUMULATIVE_SUM, cumulative_sum, (16384, 8192), bars, peers, tiny)
    routed_rows, experts = (24, 64) if tiny else (65536, 256)
    yield Workload(
        "softmax top-8 65536 256", programs.ROUTE, lambda generator: {"X": normal(generator, routed_rows, experts)},
        routed_exactly, routed, plain(route, device), (Bar(ms=0.037),), moved=routed_rows * (2.0 * experts + 16 + 32),
    )  # fmt: skip
    tokens, words = (24, 64) if tiny else (4096, 128256)

    def logits(generator: torch.Generator) -> Inputs:
        labels = torch.randint(0, words, (tokens,), generator=generator, device=device)
        return {"Z": normal(generator, tokens, words), "y": labels}

    yield Workload(
        "cross-entropy 4096 128256", programs.CROSS_ENTROPY, logits, cross_entropy_exactly, sliced,
        plain(cross_entropy, device), (Bar(1.0, peer="torch.compile"),), moved=2.0 * tokens * words,
    )  # fmt: skip


def weights(q: Tensor, k: Tensor, rows: Tensor, gate: bool) -> Tensor:
    """The causal attention weights of these queries: softmax of the scores, or sigmoid less log of the length."""
    scores = (q @ k.mT) / math.sqrt(q.shape[-1])
    live = torch.arange(k.shape[-2], device=q.device) <= rows[:, None]
    if gate:
        return torch.sigmoid(scores - math.log(k.shape[-2])).masked_fill(~live, 0.0)
    return torch.softmax(scores.masked_fill(~live, -math.inf), -1)


def gated(inputs: Inputs) -> Tensor:
    """Attention by sigmoid, where every weight stands for itself."""
    q, k, v = inputs["Q"], inputs["K"], inputs["V"]
    out: Tensor = weights(q, k, torch.arange(q.shape[-2], device=q.device), True) @ v
    return out


def differential(inputs: Inputs) -> Tensor:
    """The difference of two attention patterns."""
    q, k, r, l, v = (inputs[name] for name in "QKRLV")
    rows = torch.arange(q.shape[-2], device=q.device)
    difference = weights(q, k, rows, False) - inputs["lam"][:, None, None] * weights(r, l, rows, False)
    out: Tensor = difference.to(v.dtype) @ v
    return out


def attended_exactly(gate: bool) -> Callable[[Inputs], Tensor]:
    """The first and the last head for the checked queries, in float64."""

    def expected(inputs: Inputs) -> Tensor:
        rows = checked(inputs["Q"].shape[2], inputs["Q"].device)
        found = []
        for b, h in ((0, 0), (-1, -1)):
            one = {name: inputs[name][b, h].double() for name in inputs if name != "lam"}
            pattern = weights(one["Q"][rows], one["K"], rows, gate)
            if "lam" in inputs:
                pattern = pattern - inputs["lam"][h].double() * weights(one["R"][rows], one["L"], rows, gate)
            found.append(pattern @ one["V"])
        return torch.cat(found)

    return expected


def attentions(device: torch.device, tiny: bool) -> Iterator[Workload]:
    """Differential and sigmoid attention."""
    whole = Shape(4, 16, 16, 4096, 128)
    shape = whole.small() if tiny else whole
    pairs = shape.batches * shape.heads * shape.length * (shape.length + 1) / 2
    for name, text, maths, names, ms in (
        ("differential", programs.DIFFERENTIAL, differential, "QKRLV", 1.15),
        ("sigmoid", programs.SIGMOID, gated, "QKV", 0.60),
    ):

        def inputs(generator: torch.Generator, names: str = names) -> Inputs:
            size = (shape.batches, shape.heads, shape.length, shape.width)
            found: Inputs = {tensor: normal(generator, *size) for tensor in names}
            if "R" in names:
                # well below 1: where the patterns cancel, an error has nothing to be measured against
                found["lam"] = 0.2 + 0.4 * torch.rand(shape.heads, generator=generator, device=device)
            return found

        products = 4 if "R" in names else 2
        yield Workload(
            f"{name} attention causal {whole.text}", text, inputs, attended_exactly(name == "sigmoid"), attended,
            plain(maths, device, eager=False), (Bar(ms=ms),), flops=2.0 * products * pairs * shape.width,
        )  # fmt: skip
