"""Machines of several GPUs: how long a collective takes on their links.

    machine("h100x8").collective_us(Kind.ALL_REDUCE, 134e6, 8)        about 500

Time is a latency and what a device moves over its rate, as in the model of Hockney. Of a tensor of S bytes, all devices
together, each of P devices moves S (P-1)/P in a gather, a scatter or an all-to-all, S/P in a shift, and 2 S (P-1)/P in
an all-reduce; where the switch multicasts and reduces, S (1 + 1/P) in an all-reduce.

The GPUs are those of `backends/triton/machine.py`. Links are nominal figures of NVIDIA's data sheets: NVLink 4 moves
450 GB/s in a direction (H100 and H200), NVLink 3 300 GB/s (A100). Which share of that is reached, and the latencies,
are fitted: for the H100 to the microbenchmarks of multicast kernels in the artifact of TokenWeave
(github.com/microsoft/tokenweave, MIT), within 8 %; the H200 has the same links. Of the A100 nothing was fitted: 0.78
of nominal is the bus bandwidth that users of NCCL's tests report for it. None was measured here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from cascade.backends.triton.machine import MACHINES as GPUS
from cascade.backends.triton.machine import Machine
from cascade.errors import CommandError, Diagnostic
from cascade.placed import Kind
from cascade.wording import suggest

US_PER_BYTE_AT_1_GBS = 1e-3


@dataclass(frozen=True, slots=True)
class Fit:
    """Of one kind of collective: its latency, and which share of a direction of the links it reaches."""

    latency_us: float
    share: float


@dataclass(frozen=True, slots=True)
class Node:
    """Devices that are linked all to all by switches: their GPU, how many, GB/s of a direction of one device's links.

    `slots` is how many SMs a collective takes while it runs; `multicast`: the switch reduces and multicasts.
    """

    name: str
    gpu: Machine
    devices: int
    gbs: float
    multicast: bool
    slots: int
    fits: Mapping[Kind, Fit]

    def collective_us(self, kind: Kind, size: float, devices: int) -> float:
        """How long a collective takes on a tensor of so many bytes, those of all devices together."""
        if devices == 1:
            return 0.0
        fit = self.fits[kind]
        share = (devices - 1) / devices
        if kind is Kind.ALL_REDUCE:
            share = 1 + 1 / devices if self.multicast else 2 * share
        elif kind is Kind.ALL_TO_ALL:
            share /= devices  # of its own shard a device keeps one part
        elif kind is Kind.SHIFT:
            share = 1 / devices
        return fit.latency_us + size * share / (self.gbs * fit.share) * US_PER_BYTE_AT_1_GBS

    def held_us(self, size: float, devices: int) -> float:
        """How long the links are busy for so many bytes of parameters that are gathered, beside other work."""
        fit = self.fits[Kind.ALL_GATHER]
        return size * (devices - 1) / devices / (self.gbs * fit.share) * US_PER_BYTE_AT_1_GBS

    def compute_us(self, flops: float, moved: float) -> float:
        """The least time of so many operations of 16-bit floats, and of so many bytes, on one device."""
        return max(flops / self.gpu.matrix_tflops["bf16"], moved / self.gpu.bandwidth_tbs) * 1e-6


def _fits(reduce: tuple[float, float], scatter: tuple[float, float], gather: tuple[float, float]) -> Mapping[Kind, Fit]:
    """Fits by kind; what exchanges pairs of shards is taken to be as fast as a gather."""
    return MappingProxyType({
        Kind.ALL_REDUCE: Fit(*reduce), Kind.REDUCE_SCATTER: Fit(*scatter), Kind.ALL_GATHER: Fit(*gather),
        Kind.ALL_TO_ALL: Fit(*gather), Kind.SHIFT: Fit(*gather),
    })  # fmt: skip


_HOPPER = _fits((14.0, 0.69), (13.0, 0.70), (11.0, 0.73))
_AMPERE = _fits((30.0, 0.78), (25.0, 0.78), (25.0, 0.78))

NODES: Mapping[str, Node] = MappingProxyType({
    node.name: node
    for node in (
        Node("h100x8", GPUS["h100"], 8, 450.0, True, 8, _HOPPER),
        Node("h200x8", GPUS["h200"], 8, 450.0, True, 8, _HOPPER),
        Node("a100x8", GPUS["a100"], 8, 300.0, False, 16, _AMPERE),
    )
})  # fmt: skip
"""The machines that can be named, by name."""


def node(name: str) -> Node:
    """The machine of that name; CommandError (C605) with the closest name where there is none."""
    found = NODES.get(name.lower())
    if found is None:
        help_line = suggest(name, NODES, "the machines of several devices are")
        raise CommandError(Diagnostic("C605", f"there is no machine {name!r} of several devices", help=help_line))
    return found
