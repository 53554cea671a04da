"""Whether the partial results that go round rings come to where they stay, each part once: by definition and plainly.

    compute Y along f over tp along t over tp hop 1      device p makes its part of shard p + 1 of t
    shift Y over tp by sum to 0 hop 1                    and hands it to device p + 1
    compute Y along f over tp along t over tp            where it meets that device's own part
    shift Y over tp by sum to 0                          and is whole

Written apart from the rewrite that makes rings (`passes/exchanges.py`) and from what simulates them: devices are
counted out one by one, and shards are told by their numbers only. Findings are sentences; none means valid.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from cascade.placed import Axes, Collective, Compute, Program
from cascade.walk import targets

Parts: TypeAlias = Counter[int]
"""Whose parts have been merged, by the numbers of the devices, and how often each."""

At: TypeAlias = tuple[tuple[int, int, int], ...]
"""The slice of a tensor that a ring is of, by its dimensions."""


@dataclass(slots=True)
class _Ring:
    """A tensor that goes round: what every device has of every shard of its own, what came to it, what is whole."""

    count: int
    own: dict[tuple[int, int], Parts] = field(default_factory=dict)
    came: dict[tuple[int, int], Parts] = field(default_factory=dict)
    whole: dict[int, Parts] = field(default_factory=dict)


def check_rings(program: Program) -> Iterator[str]:
    """What is wrong with the rings of a program: a part that is passed on before it is made, lost, or counted twice."""
    rings: dict[tuple[str, Axes, int | None, At], _Ring] = {}
    for step in program.steps:
        if isinstance(step, Collective) and step.passes:
            key = step.tensor, step.axes, step.target, step.at
            rings.setdefault(key, _Ring(program.devices(step.axes)))
    for (tensor, axes, target, at), ring in rings.items():
        ranks = next(t.ranks for stmt in program.cascade.body for t in targets(stmt) if t.name == tensor)
        for step in program.steps:
            if isinstance(step, Collective):
                if step.passes and (step.tensor, step.axes, step.target, step.at) == (tensor, axes, target, at):
                    yield from _passed(ring, step)
                continue
            hops = [along.hop for along in step.along if along.rank == ranks[target or 0] and along.axes == axes]
            if hops and step.name == tensor and _slice(step, ranks) == at:
                for device in range(ring.count):
                    ring.own.setdefault((device, (device + hops[0]) % ring.count), Counter())[device] += 1
        for device in range(ring.count):
            wanted = Counter(range(ring.count))
            if (found := ring.whole.get(device, Counter())) != wanted:
                parts = ", ".join(map(str, sorted(found.elements()))) or "none"
                yield f"device {device} has of its shard of {tensor} the parts of {parts}, not one of each device"


def _passed(ring: _Ring, step: Collective) -> Iterator[str]:
    """A step of a ring: every device merges what it has of one shard, and hands it on."""
    moved: list[tuple[int, int, Parts]] = []
    for device in range(ring.count):
        shard = (device + step.hop) % ring.count
        if (device, shard) not in ring.own:
            yield f"device {device} passes on shard {shard} of {step.tensor} before it has made its part"
        parts = ring.own.pop((device, shard), Counter()) + ring.came.pop((device, shard), Counter())
        moved.append((device, shard, parts))
    for device, shard, parts in moved:
        if step.hop:
            to = (device + (1 if step.hop > 0 else -1)) % ring.count
            ring.came[to, shard] = ring.came.get((to, shard), Counter()) + parts
        else:
            ring.whole[device] = ring.whole.get(device, Counter()) + parts


def _slice(step: Compute, ranks: tuple[str, ...]) -> At:
    """The slice of a tensor with these ranks that a statement makes."""
    return tuple(sorted((ranks.index(rank), low, high) for rank, low, high in step.at if rank in ranks))
