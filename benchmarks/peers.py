"""Other ways to compute the same: PyTorch's attention kernels, FlexAttention, `torch.compile`, Liger."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.workload import Inputs, Peer

Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # of batch, head, query and key
Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # of the score and the same

LARGE_MASK = 1 << 29  # pairs beyond which a mask is not made whole before its blocks are counted


def compiled(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """The function behind `torch.compile` for its shapes; as it is on a CPU, where nothing is timed in earnest."""
    return function if device.type == "cpu" else torch.compile(function, dynamic=False)


def plain(function: Callable[[Inputs], Any], device: torch.device, eager: bool = True) -> dict[str, Peer]:
    """The plain maths in torch: compiled and, unless that would not fit or tell nothing, as it is."""
    optimised = compiled(function, device)
    found = {"torch.compile": Peer(optimised)}
    return found | {"eager": Peer(function)} if eager else found


def sdpa(backend: SDPBackend, causal: bool) -> Peer:
    """One backend of `scaled_dot_product_attention`; heads that share keys get copies of them if it asks for that."""

    def run(inputs: Inputs) -> Tensor:
        q, k, v = four(inputs["Q"]), inputs["k"], inputs["v"]
        with sdpa_kernel(backend):
            shared = k.shape[1] != q.shape[1]
            out = scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=shared)
        return out.reshape(inputs["Q"].shape)

    def prepare(inputs: Inputs) -> Inputs:
        prepared = {**inputs, "k": inputs["K"], "v": inputs["V"]}
        group = inputs["Q"].shape[1] // inputs["K"].shape[1]
        try:
            run(prepared)
        except RuntimeError:
            if group == 1:
                raise
            prepared |= {name: prepared[name].repeat_interleave(group, 1) for name in "kv"}
        return prepared

    return Peer(run, prepare)


def flex(
    device: torch.device,
    mask: Callable[[Inputs], Mask] | None = None,
    score: Callable[[Inputs], Score] | None = None,
    batched: bool = False,
) -> Peer:
    """Compiled FlexAttention; `mask` and `score` make its functions from the inputs.

    The block mask is made before anything is timed; `batched` says that it differs between the batches.
    """
    attend, make_large = compiled(flex_attention, device), compiled(create_block_mask, device)

    def prepare(inputs: Inputs) -> Inputs:
        q, k = four(inputs["Q"]), inputs["K"]
        batches = len(q) if batched else None
        lengths = q.shape[2], k.shape[2]
        large = (batches or 1) * math.prod(lengths) > LARGE_MASK
        make_mask = make_large if large else create_block_mask
        block = mask and make_mask(mask(inputs), batches, None, *lengths, device=device.type)
        return {**inputs, "block": block, "score": score and score(inputs)}

    def run(inputs: Inputs) -> Tensor:
        q, k, v = four(inputs["Q"]), inputs["K"], inputs["V"]
        shared = k.shape[1] != q.shape[1]
        out: Tensor = attend(q, k, v, score_mod=inputs["score"], block_mask=inputs["block"], enable_gqa=shared)
        return out.reshape(inputs["Q"].shape)

    return Peer(run, prepare)


def four(q: Tensor) -> Tensor:
    """The queries with a rank for their number, which a single one for every head does not have."""
    return q if q.dim() == 4 else q.unsqueeze(2)


def liger(name: str, *operands: str, more: tuple[Any, ...] = ()) -> dict[str, Peer]:
    """A function of Liger's on these inputs; without Liger, a peer that fails and says so."""

    def run(inputs: Inputs) -> Any:
        functions = importlib.import_module("liger_kernel.transformers.functional")
        return getattr(functions, name)(*(inputs[operand] for operand in operands), *more)

    return {"liger": Peer(run)}
