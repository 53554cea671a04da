"""Compiled layers wait for nothing: no step asks a tensor for what it holds, and a GPU captures and replays each.

The layers are those of the tables `layers` and `experts`, in small sizes.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import experts, layers
from benchmarks.ours import build
from benchmarks.timing import captured
from benchmarks.workload import Workload

GPU = torch.cuda.is_available()
SEED = 7
ASKING = ("aten._local_scalar_dense", "aten.nonzero", "aten.equal", "aten.is_nonzero", "aten.unique", "aten._unique2")
"""Operations whose result the host has to wait for: what is in a tensor, or a shape that depends on it."""


class Asked(TorchDispatchMode):
    """The operations of this kind that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(ASKING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def workloads(kind: str) -> Iterator[Workload]:
    """The layers of both tables, small."""
    device, options = torch.device(kind), argparse.Namespace(tiny=True, only="")
    return itertools.chain(layers.table(device, options), experts.table(device, options))


NAMES = [workload.name for workload in workloads("cpu")]


def chosen(name: str, kind: str) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A compiled layer and two sets of inputs."""
    found = next(workload for workload in workloads(kind) if workload.name == name)
    generator = torch.Generator(device=kind).manual_seed(SEED)
    one, other = found.inputs(generator), found.inputs(generator)
    return build(found.text, "none", kind, {"backend": "triton", **(found.options or {})}), dict(one), dict(other)


def results(made: Any) -> list[torch.Tensor]:
    """The results of a call."""
    return [made] if isinstance(made, torch.Tensor) else list(made)


@pytest.mark.parametrize("name", NAMES)
def test_no_step_asks_what_a_tensor_holds(name: str) -> None:
    """Without a GPU in Triton's interpreter, where the steps around kernels are those of a GPU."""
    compiled, given, _ = chosen(name, "cuda" if GPU else "cpu")
    compiled(**given)
    with Asked() as asked:
        compiled(**given)
    assert not asked.found


def test_asking_would_be_seen() -> None:
    with Asked() as asked:
        torch.ones(1).item()
        torch.ones(2).nonzero()
    assert len(asked.found) == 2


@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_layer_gives_for_other_data_what_a_call_gives(name: str) -> None:
    compiled, given, other = chosen(name, "cuda")
    kept: list[list[torch.Tensor]] = []
    compiled(**given)
    graph = captured(lambda: kept.append(results(compiled(**given))))
    assert graph is not None, "the layer waits for the device"
    if "kept" not in name:  # of a constant parameter the graph has what it was
        for tensor, value in zip(given.values(), other.values(), strict=True):
            tensor.copy_(value)
    graph.replay()
    torch.cuda.synchronize()
    for replayed, called in zip(kept[0], results(compiled(**given)), strict=True):
        assert torch.equal(replayed, called)
