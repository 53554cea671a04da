"""Machines of several GPUs, and of one: how long a collective takes on their links, what a part of a GPU draws.

    node("h100x8").collective_us(Kind.ALL_REDUCE, 134e6, 8)        about 500
    node("h200").bandwidth_tbs(33)                                 2.15, half of what all SMs draw together

Time is a latency and what a device moves over its rate, as in the model of Hockney. Of a tensor of S bytes, all devices
together, each of P devices moves S (P-1)/P in a gather, a scatter or an all-to-all, S/P in a shift, and 2 S (P-1)/P in
an all-reduce; where the switch multicasts and reduces, S (1 + 1/P) in an all-reduce.

The GPUs are those of `backends/triton/machine.py`. Everything else is a file in `machines`, which names its sources and
says what was fitted to them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import PurePath
from typing import Any

from cascade.backends.systolic.fields import Table, load_toml
from cascade.backends.triton.machine import MACHINES as GPUS
from cascade.backends.triton.machine import Machine
from cascade.errors import CommandError, Diagnostic
from cascade.placed import Kind
from cascade.wording import suggest

US_PER_BYTE_AT_1_GBS = 1e-3
LONGEST_US = 1e6

DRAWING = 0.5
"""Which share of the SMs of a GPU draws the whole bandwidth of its memory, with many loads under way on each.

On an H200 copies, and kernels that read much once, draw a little more than this says on 32 confined SMs, and a little
less on 64: `python -m benchmarks overlap`, benchmarks/results/overlap-nvidia-h200.txt. Of other GPUs it is supposed.
"""


@dataclass(frozen=True, slots=True)
class Fit:
    """Of one way to move data: its latency, and which share of a direction of the links it reaches."""

    latency_us: float
    share: float


@dataclass(frozen=True, slots=True)
class Node:
    """Devices that are linked all to all by switches: their GPU, how many, GB/s of a direction of one device's links.

    `slots` is how many SMs a collective takes while it runs; `multicast`: the switch reduces and multicasts.
    `fused` is, by thread blocks, what one kernel reaches that scatters, does what is local to its rows and gathers,
    empty where there is none; `stores`, what the tiles of a product reach that are stored to peers as they are
    made; `awaits`, whether the tiles of one can wait for shards that copies bring. `host_us` is how long the host
    is busy with one launch; nothing is said of it where it is 0. `floor_us` is what a kernel takes beside its work:
    a launch, the first loads, the last stores; `product_us`, what products take beyond that: filling and draining
    their pipelines, operands that nothing has touched yet. `sustained` is which share of the matrix rate of the GPU
    remains when it multiplies without a pause. `sm_tbs` is what one SM draws of the memory at most, where kernels are
    confined to some; else it is left open, infinite.
    """

    name: str
    gpu: Machine
    devices: int
    gbs: float
    multicast: bool
    slots: int
    fits: Mapping[Kind, Fit]
    fused: Mapping[int, Fit]
    stores: Fit | None
    host_us: float
    sustained: float
    awaits: bool = True
    floor_us: float = 8.0
    product_us: float = 8.0
    sm_tbs: float = math.inf

    def bandwidth_tbs(self, sms: int) -> float:
        """What so many SMs draw of the memory."""
        return min(self.gpu.bandwidth_tbs, sms * self.sm_tbs)

    def collective_us(self, kind: Kind, size: float, devices: int) -> float:
        """How long a collective takes on a tensor of so many bytes, those of all devices together."""
        share = (devices - 1) / devices
        if kind is Kind.ALL_REDUCE:
            share = 1 + 1 / devices if self.multicast else 2 * share
        elif kind is Kind.ALL_TO_ALL:
            share /= devices  # of its own shard a device keeps one part
        elif kind is Kind.SHIFT:
            share = 1 / devices
        return self._moved_us(self.fits[kind], size * share) if devices > 1 else 0.0

    def fused_us(self, blocks: int, size: float, devices: int) -> float:
        """How long one kernel of so many thread blocks takes to scatter and gather a tensor of so many bytes."""
        return self._moved_us(self.fused[blocks], size * (1 + 1 / devices))

    def stored_us(self, size: float, devices: int) -> float:
        """How long a product's tiles are under way that it stores to peers; infinite where nothing is known of it."""
        if self.stores is None:
            return float("inf")
        return self._moved_us(self.stores, size * (devices - 1) / devices)

    def _moved_us(self, fit: Fit, moved: float) -> float:
        return fit.latency_us + moved / (self.gbs * fit.share) * US_PER_BYTE_AT_1_GBS

    def held_us(self, size: float, devices: int) -> float:
        """How long the links are busy for so many bytes of parameters that are gathered, beside other work."""
        fit = self.fits[Kind.ALL_GATHER]
        return size * (devices - 1) / devices / (self.gbs * fit.share) * US_PER_BYTE_AT_1_GBS

    def compute_us(self, flops: float, moved: float) -> float:
        """The least time of so many operations of 16-bit floats, and of so many bytes, on one device."""
        return max(flops / self.gpu.matrix_tflops["bf16"], moved / self.gpu.bandwidth_tbs) * 1e-6


@functools.cache
def shipped() -> tuple[str, ...]:
    """The machines that can be named."""
    folder = resources.files("cascade.backends.distributed") / "machines"
    return tuple(sorted(PurePath(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml")))


@functools.cache
def node(name: str) -> Node:
    """The machine of that name; CommandError (C605) with the closest name where there is none."""
    if (gpu := GPUS.get(name.lower())) is not None:
        return alone(gpu)
    return _node(Table(f"machine {name}", "", _fields(name.lower())))


def alone(gpu: Machine) -> Node:
    """One GPU: no links; kernels may be confined to some of its SMs. Floors are those of several of them, if known."""
    sm_tbs = gpu.bandwidth_tbs / (DRAWING * gpu.sms)
    found = Node(gpu.name, gpu, 1, 1.0, False, 0, {}, {}, None, 0.0, 1.0, awaits=False, sm_tbs=sm_tbs)
    alike = next((several for several in map(node, shipped()) if several.gpu == gpu), found)
    return replace(found, floor_us=alike.floor_us, product_us=alike.product_us)


def _fields(name: str) -> dict[str, Any]:
    """The fields of a machine file, those of the one it extends included: a table in it replaces one there."""
    if name not in shipped():
        help_line = suggest(name, shipped(), "the machines of several devices are")
        raise CommandError(Diagnostic("C605", f"there is no machine {name!r} of several devices", help=help_line))
    text = (resources.files("cascade.backends.distributed") / "machines" / f"{name}.toml").read_text(encoding="utf-8")
    own = load_toml(text, f"machine {name}")
    base = own.pop("extends", None)
    return own if base is None else {**_fields(base), **own}


def _node(table: Table) -> Node:
    """Raises C621 for a field with a value out of range, or one that means nothing."""
    kinds, fused, stores = table.table("collectives", needed=True), table.table("fused"), table.table("stores")
    found = Node(
        table.text("name"),
        GPUS[table.choice("gpu", tuple(GPUS))],
        table.whole("devices", 2, 1024),
        table.number("gbs", 1.0, 1e6),
        table.flag("multicast", False),
        table.whole("slots", 0, 1024),
        {kind: _fit(kinds.table(kind.value, needed=True)) for kind in Kind},
        {int(blocks): _fit(fused.table(blocks)) for blocks in fused.names()},
        _fit(stores) if stores.values else None,
        table.number("host_us", 0.0, LONGEST_US, 0.0),
        table.number("sustained", 0.1, 1.0, 1.0),
        table.flag("awaits", True),
        table.number("floor_us", 0.0, LONGEST_US, 8.0),
        table.number("product_us", 0.0, LONGEST_US, 8.0),
    )
    kinds.done()
    table.done()
    return found


def _fit(table: Table) -> Fit:
    found = Fit(table.number("latency_us", 0.0, LONGEST_US), table.number("share", 1e-3, 1.0))
    table.done()
    return found
