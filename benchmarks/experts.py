"""The table `experts`: gated experts that a router chooses, as plain maths, beside sorting by hand and eager torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import programs
from benchmarks.peers import compiled
from benchmarks.reductions import slice_of
from benchmarks.workload import Bar, Inputs, Peer, Workload, normal

SHAPES = (  # tokens, width, hidden, experts, chosen, milliseconds
    (8192, 4096, 14336, 8, 2, 9.0),
    (8192, 2048, 1408, 64, 6, 1.9),
    (64, 4096, 14336, 8, 2, 0.8),
)


def routed(inputs: Inputs, chosen: int) -> tuple[Tensor, Tensor]:
    """The weights of each token's experts, and which they are."""
    weights, experts = torch.topk(torch.softmax((inputs["X"] @ inputs["R"]).float(), -1), chosen)
    return weights / weights.sum(-1, keepdim=True), experts


def by_loop(inputs: Inputs, chosen: int) -> Tensor:
    """For each expert the tokens that chose it."""
    x = inputs["X"]
    weights, experts = routed(inputs, chosen)
    out = torch.zeros_like(x)
    for expert in range(len(inputs["G"])):
        token, slot = torch.where(experts == expert)
        hidden = F.silu(x[token] @ inputs["G"][expert]) * (x[token] @ inputs["U"][expert])
        out.index_add_(0, token, weights[token, slot, None].to(x.dtype) * (hidden @ inputs["V"][expert]))
    return out


def by_groups(inputs: Inputs, chosen: int) -> Tensor:
    """Rows sorted by expert, products of groups of them."""
    x = inputs["X"]
    weights, experts = routed(inputs, chosen)
    order = torch.argsort(experts.flatten(), stable=True)
    ends = torch.bincount(experts.flatten(), minlength=len(inputs["G"])).cumsum(0).to(torch.int32)
    rows = x[order // chosen]
    gate, up = (torch._grouped_mm(rows, inputs[name], offs=ends) for name in "GU")
    made = torch._grouped_mm(F.silu(gate) * up, inputs["V"], offs=ends)
    back = torch.empty_like(made)
    back[order] = made
    return (back.view(*experts.shape, -1) * weights[..., None]).sum(1).to(x.dtype)


def expected(inputs: Inputs, chosen: int) -> Tensor:
    """Sixteen tokens in float64, routed as all are."""
    exact = {name: inputs[name].double() for name in "R"} | {"X": slice_of(inputs["X"]).double()}
    weights, experts = routed(exact, chosen)
    out = torch.zeros_like(exact["X"])
    for token, slot in torch.cartesian_prod(*(torch.arange(extent) for extent in experts.shape)).tolist():
        expert, x = int(experts[token, slot]), exact["X"][token]
        gate, up, down = (inputs[name][expert].double() for name in "GUV")
        out[token] += weights[token, slot] * ((F.silu(x @ gate) * (x @ up)) @ down)
    return out


def found(out: Tensor, inputs: Inputs) -> Tensor:
    """The same tokens of what was computed."""
    return slice_of(out)


def table(device: torch.device, options: Any) -> Iterator[Workload]:
    """The table `experts`."""
    for tokens, width, hidden, experts, chosen, bar in SHAPES:
        title = f"top-{chosen} of {experts} experts {tokens} {width} {hidden}"
        size = (24, 32, 48, 4, 2) if options.tiny else (tokens, width, hidden, experts, chosen)
        yield row(title, size, device, bar)


def row(title: str, size: tuple[int, int, int, int, int], device: torch.device, bar: float) -> Workload:
    """A router and its experts; what is counted are their products."""
    tokens, width, hidden, experts, chosen = size

    def inputs(generator: torch.Generator) -> Inputs:
        """Logits on a grid, so that no rounding turns a choice."""
        router = torch.zeros(width, experts, dtype=torch.bfloat16, device=generator.device)
        router[:experts] = torch.eye(experts, device=generator.device)
        x = normal(generator, tokens, width)
        x[:, :experts] = torch.rand(tokens, experts, generator=generator, device=generator.device).argsort(1) / 16
        up = {name: normal(generator, experts, width, hidden) / width**0.5 for name in "GU"}
        return {"X": x, "R": router, **up, "V": normal(generator, experts, hidden, width) / hidden**0.5}

    def grouped(given: Inputs) -> Tensor:
        return by_groups(given, chosen)

    peers = {"torch.compile": Peer(compiled(grouped, device)), "eager": Peer(lambda given: by_loop(given, chosen))}
    flops = 6.0 * tokens * chosen * width * hidden
    text, bars = programs.EXPERTS.format(chosen=chosen), (Bar(ms=bar),)
    return Workload(title, text, inputs, lambda given: expected(given, chosen), found, peers, bars, flops)
