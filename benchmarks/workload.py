"""What a row of a table is: a cascade, its inputs, what is right, what it is timed beside and what it has to reach."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]
"""The tensors of a cascade by name; a peer may add what it needs, such as a mask."""


def every_row(inputs: Inputs) -> slice | Tensor:
    """No rounding turns a choice that a row of the result hangs on."""
    return slice(None)


def unprepared(inputs: Inputs) -> Inputs:
    """The inputs as they are."""
    return inputs


@dataclass(frozen=True)
class Peer:
    """Another way to compute the same: `run` is timed, `prepare` and the first calls are not."""

    run: Callable[[Inputs], Any]
    prepare: Callable[[Inputs], Inputs] = unprepared
    checked: bool = True  # whether its results are those of the cascade: a bare product leaves the rest out


@dataclass(frozen=True)
class Bar:
    """What ours has to reach; exactly one of `peer`, `copy` and `ms` says against what.

    peer   at least `factor` times as fast as this peer
    copy   at least `factor` of the bandwidth of a copy that is measured in the same run
    ms     at most so many milliseconds
    A goal is reported and does not decide whether the row passes.
    """

    factor: float = 1.0
    peer: str = ""
    copy: bool = False
    ms: float = 0.0
    goal: bool = False

    @property
    def text(self) -> str:
        """The bar in words, `1.15 x flex` or `<= 0.6 ms`."""
        if self.ms:
            words = f"<= {self.ms:g} ms"
        else:
            words = f"{self.factor:g} x {'copy' if self.copy else self.peer}"
        return f"goal {words}" if self.goal else words


@dataclass(frozen=True)
class Workload:
    """One row of a table.

    `inputs` makes a new set of random inputs from a seeded generator; `expected` computes the results on a slice of
    them, in float64, and `found` takes the same slice out of what was computed: both with one row of the result a row.
    Inputs that are written keep their values from call to call. `flops` and `moved` are the operations and the bytes of
    one call: whichever is not 0 gives the rate that is shown. `settled` tells which rows of the result no rounding can
    turn, where data chooses what they are made of: the others are not held against those of a peer.
    """

    name: str
    text: str
    inputs: Callable[[torch.Generator], Inputs]
    expected: Callable[[Inputs], Tensor]
    found: Callable[[Any, Inputs], Tensor]
    peers: Mapping[str, Peer]
    bars: tuple[Bar, ...] = ()
    flops: float = 0.0
    moved: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)  # of compiling: results in place, constants
    settled: Callable[[Inputs], slice | Tensor] = every_row


def size_of(value: Any) -> int:
    """The bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    return sum(map(size_of, value)) if isinstance(value, tuple | list) else 0


def normal(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal random numbers on the device of the generator."""
    return torch.randn(*shape, generator=generator, device=generator.device, dtype=dtype)
