"""Exchanges part by part beside the statement that makes what they exchange, or reads it: which may pay.

    compute Y, then reduce-scatter Y    -->    Y in four parts of its columns, each exchanged while the next is computed
    compute Y, then reduce-scatter Y    -->    Y in shards, farthest first, each passed on beside the next
    all-gather K, then fold S over K    -->    S of its own shard, then of each that comes by: a ring

The rewrites are R4 of `passes/exchanges.py`, which proves them. Smaller products waste more of their last wave and
every part has a latency, so what is hidden must be worth more than that. An estimate of the two alone, as a pipeline of
two stages, says what is worth a plan of its own; the plan decides.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from cascade.backends.distributed.kernels import TILES, Clock, has_product
from cascade.errors import UnsupportedError
from cascade.passes.exchanges import by_parts, by_rows, by_shards
from cascade.placed import REDUCING, Collective, Compute, Kind, Program, Step
from cascade.walk import targets

PARTS = (2, 4)
"""Into how many parts a result is cut; of more, each pays a latency and a floor that its share no longer hides."""

SHARDS = "shards"
"""The parts of what is gathered: each device begins with its own."""

TILE = max(columns for _, columns, _ in TILES)
"""Parts are so many coordinates, or a multiple: they end where tiles do."""


@dataclass(frozen=True, slots=True)
class Decomposed:
    """A program with one exchange part by part: in how many of what; the time of it and its statement, so and apart."""

    program: Program
    parts: str
    us: float
    apart_us: float


def decompositions(program: Program, step: Collective, clock: Clock) -> Iterator[Decomposed]:
    """The ways in which one exchange can go part by part; none where it has parts already, or each is refused."""
    if step.at or step not in program.steps:
        return
    number = program.steps.index(step)
    for parts, rewrite in _rewrites(program, number, step, clock):
        try:
            other = rewrite()
        except UnsupportedError:  # not proved: then there is no such way
            continue
        yield _compared(program, other, parts, clock)


def _rewrites(
    program: Program, number: int, step: Collective, clock: Clock
) -> Iterator[tuple[str, Callable[[], Program]]]:
    """What may be tried: shards that come by or go round, or a product in parts of a dimension, cut at whole tiles."""
    if step.kind is Kind.ALL_GATHER:
        yield SHARDS, functools.partial(by_shards, program, number)
    unit = clock.reach.units.get(step.tensor)
    if step.kind not in REDUCING or unit is None or not has_product(clock.reach, Compute(step.tensor, ())):
        return
    ranks = targets(unit.statements[0])[0].ranks
    if step.kind is Kind.REDUCE_SCATTER and step.target is not None:
        yield f"{SHARDS} of {ranks[step.target]}", functools.partial(by_rows, program, number)
    for dim, rank in enumerate(ranks):
        tiles = clock.reach.full[rank][1] // TILE
        for count in PARTS if dim != step.target else ():
            cuts = [TILE * (tiles * part // count) for part in range(1, count)]
            if tiles >= count:
                yield f"{count} parts of {rank}", functools.partial(by_parts, program, number, rank, cuts)


def _compared(program: Program, other: Program, parts: str, clock: Clock) -> Decomposed:
    """A rewritten program with the times of what was rewritten: part after part through both stages, and apart."""
    node = clock.node
    old, new = _others(program.steps, other.steps), _others(other.steps, program.steps)
    computed = [clock.compute_us([step], node.gpu.sms - node.slots) for step in new if isinstance(step, Compute)]
    later = dataclasses.replace(clock, program=other)
    moved = [later.collective_us(step) for step in new if isinstance(step, Collective)]
    if parts == SHARDS:  # of every shard but the own one as many tensors as are gathered
        own = max(1, len(moved) // max(1, len(computed) - 1))
        arrivals = [sum(moved[at : at + own]) for at in range(0, len(moved), own)]
        us = pipelined([0.0, *arrivals], computed)
    else:
        us = pipelined(computed, moved)
    apart = sum(
        clock.compute_us([step], node.gpu.sms) if isinstance(step, Compute) else clock.collective_us(step)
        for step in old
    )
    return Decomposed(other, parts, us, apart)


def _others(steps: Sequence[Step], known: Sequence[Step]) -> list[Step]:
    """The steps that are not among others."""
    found = set(known)
    return [step for step in steps if step not in found]


def pipelined(first: Sequence[float], second: Sequence[float]) -> float:
    """How long parts take that go through a first stage one by one, and through a second one in the same order."""
    ready = done = 0.0
    for one, other in zip(first, second, strict=True):
        ready += one
        done = max(ready, done) + other
    return done
