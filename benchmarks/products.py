"""The table `gemm`: matrix products, alone, in batches and with what follows them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import programs
from benchmarks.peers import plain
from benchmarks.reductions import slice_of
from benchmarks.workload import Bar, Inputs, Peer, Workload, normal


def mm(inputs: Inputs) -> Tensor:
    """The bare product."""
    return torch.mm(inputs["A"], inputs["B"])


def bias_gelu(inputs: Inputs) -> Tensor:
    """A linear layer and its activation."""
    return F.gelu(torch.addmm(inputs["bias"], inputs["A"], inputs["B"]))


def expected(inputs: Inputs) -> Tensor:
    """Sixteen rows in float64."""
    if "W" in inputs:
        last: Tensor = slice_of(inputs["A"][-1]).double() @ inputs["W"][-1].double()
        return last
    product: Tensor = slice_of(inputs["A"]).double() @ inputs["B"].double()
    return F.gelu(product + inputs["bias"].double()) if "bias" in inputs else product


def found(out: Tensor, inputs: Inputs) -> Tensor:
    """The same rows of what was computed; of a batch, those of its last product."""
    return slice_of(out[-1] if out.dim() == 3 else out)


def table(device: torch.device, options: Any) -> Iterator[Workload]:
    """The table `gemm`."""
    for size in ((8192, 4096, 4096), (4096, 4096, 4096), (8192, 8192, 8192)):
        yield product("matmul", size, {"cublas": Peer(mm)}, options.tiny)
    epilogue = {"cublas": Peer(mm, checked=False)} | plain(bias_gelu, device)
    yield product("matmul+bias+gelu", (8192, 4096, 4096), epilogue, options.tiny, bias=True)
    yield batched((16, 2048, 2048, 2048), options.tiny)


def product(name: str, size: tuple[int, int, int], peers: dict[str, Peer], tiny: bool, bias: bool = False) -> Workload:
    """M x N x K, both operands with contiguous rows."""
    m, n, k = (24, 40, 32) if tiny else size

    def inputs(generator: torch.Generator) -> Inputs:
        operands: Inputs = {"A": normal(generator, m, k), "B": normal(generator, k, n) / k**0.5}
        return operands | {"bias": normal(generator, n)} if bias else operands

    text = programs.MATMUL_GELU if bias else programs.MATMUL
    bars = (Bar(1.0, peer="torch.compile"),) if bias else ()
    title = f"{name} {' '.join(map(str, size))}"
    return Workload(title, text, inputs, expected, found, peers, bars, flops=2.0 * m * n * k)


def batched(size: tuple[int, int, int, int], tiny: bool) -> Workload:
    """Several products of the same shape."""
    b, m, n, k = (2, 24, 40, 32) if tiny else size

    def inputs(generator: torch.Generator) -> Inputs:
        return {"A": normal(generator, b, m, k), "W": normal(generator, b, k, n) / k**0.5}

    peers = {"cublas": Peer(lambda given: torch.bmm(given["A"], given["W"]))}
    title = f"matmul batched {' '.join(map(str, size))}"
    return Workload(title, programs.MATMUL_BATCHED, inputs, expected, found, peers, flops=2.0 * b * m * n * k)
