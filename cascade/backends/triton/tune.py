"""Which tiles a kernel gets: candidates, the order the machine model puts them in, a choice by model or by stopwatch.

    candidates(planner, group)          -->  Tilings that suit how the ranks of the group lie
    ranked(planner, name, ...)          -->  them with their Estimate, the fastest first, without those that cannot run
    choose(planner, name, ..., effort)  -->  Choice: `none` takes the model's first, in milliseconds; `quick` times the
                                             best few, `full` all of them
    shortlist(...), timed(found, timer)      the same in two steps: what is to be timed is known, and compiled, before

A timed choice is kept on disk under everything that it depends on: the text of the cascade, the statements of the
group, how large the tensors are (to a power of two) and how they lie, the device, and the versions of Triton and of
this project. An entry is read as numbers, never run; a damaged one is a miss and a warning.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cascade.backends.triton.count import read_in_waves, rounds, work
from cascade.backends.triton.emit import emit
from cascade.backends.triton.grid import suited
from cascade.backends.triton.library import CLEARLY
from cascade.backends.triton.lower import unsupported
from cascade.backends.triton.machine import MAX_REGISTERS, WARP, Estimate, Machine, Work, estimate
from cascade.backends.triton.offline import LIMITS, Failure, Request, StaticFacts, facts
from cascade.backends.triton.partition import STEPS_LIMIT, Group, Rest, power_of_two
from cascade.backends.triton.plan import Axis, Fold, Kernel, Loop, Options, Role, every_op
from cascade.backends.triton.planner import (
    ACCUMULATED, EXACT_ACCUMULATED, FEW_PROGRAMS, Planner, Tiling, quotients,
)  # fmt: skip
from cascade.backends.triton.products import looking_up, matrix_product
from cascade.backends.triton.recurrence import in_pairs, stepped
from cascade.backends.triton.static import request
from cascade.errors import UnsupportedError
from cascade.passes.memo import load, store
from cascade.text import render, render_stmt
from cascade.walk import expressions, targets

VERSION = "15"  # of entries on disk; another one whenever a choice may change
QUICK = 6  # candidates that are timed with little effort
SHOWN = 4  # candidates besides the chosen one that a choice remembers
SMALLEST = 16  # side of a matrix product
EDGE_TILE = 32  # of a stream where tests stand and a thread has no registers left for those of more
CROWDED = 160  # results of products that a thread holds: with more of them it has none left
FOLDED = 2048  # elements that a thread folds at once, at most
THREAD = (8, 64)  # elements of a row that one thread should have, at least and at most
MOST_WARPS = 32  # of a program
TRIPS = (4096, 2048)  # elements of a row that is gone through in trips though it would fit
SINGLY = (1, 4)  # the same where each step is of one coordinate
MANY = 1024  # programs: where there are more, tiles smaller than they must be are not worth a try
UNTIMED = 0.1  # by what share of the time parts must be faster where only the model says so: it errs by as much
NARROWLY = 0.01  # by what share of the time parts must be faster where they are timed: they take memory between them
ALIKE = 0.01  # a difference below which the model does not tell plans apart: then the earlier candidate is taken
FETCH_US = 0.45  # from a request to the first byte of an operand that is in L2

Timer: TypeAlias = Callable[[Tiling], float | None]
"""Milliseconds of a group with these tiles; None where it does not run, or gives other results than the first."""
Others: TypeAlias = Callable[[float], Sequence[tuple[Tiling, Estimate]]]
"""What may take the place of a group's kernel, given the microseconds of its best tiles by the model."""
Compiler: TypeAlias = Callable[[Sequence[Request], str], Sequence[StaticFacts | Failure]]

# Tile of the rank that is a side, of the stream, warps, stages: products that carry a state along the stream.
ONE_SIDE = (
    (128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 3), (64, 128, 4, 2), (64, 64, 4, 2), (128, 128, 8, 2),
    (128, 64, 8, 3), (128, 32, 4, 3), (64, 32, 4, 3), (32, 64, 4, 3), (16, 64, 4, 3), (16, 128, 4, 3), (16, 64, 4, 2),
    (64, 128, 4, 3), (32, 128, 4, 4), (16, 256, 4, 4),
)  # fmt: skip
# A stream that lies where another tensor says, for few rows: what says so takes a stage of its own, and more programs
# wait for it at a time where tiles are short.
LOOKED_UP = ((16, 32, 4, 5), (16, 64, 8, 3), (16, 64, 4, 2))
# The same where operands are so wide that those do not fit.
WIDE = ((64, 32, 8, 2), (64, 32, 8, 1), (64, 16, 8, 2), (32, 32, 4, 2), (32, 16, 4, 2), (16, 32, 4, 2), (16, 16, 4, 1))
WIDTH = 256  # from which on they are
# Those of full precision.
EXACT_SIDE = (
    (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2), (32, 32, 8, 2), (128, 32, 8, 2), (64, 16, 4, 2), (32, 16, 4, 2),
    (32, 64, 4, 2), (16, 64, 4, 2), (16, 32, 4, 2), (16, 16, 4, 2), (16, 32, 8, 2), (16, 16, 8, 2),
)  # fmt: skip
# Tiles of both sides, of the stream, warps, stages.
TWO_SIDES = (
    (128, 256, 64, 8, 3), (256, 128, 64, 8, 3), (128, 256, 64, 8, 4), (128, 128, 64, 8, 4), (128, 128, 64, 4, 4),
    (128, 128, 64, 4, 3), (64, 256, 64, 4, 4), (256, 64, 64, 4, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4),
    (64, 64, 64, 4, 4), (64, 32, 64, 4, 4), (32, 64, 64, 4, 4), (16, 64, 128, 4, 4), (64, 16, 128, 4, 4),
    (32, 128, 128, 4, 3), (128, 32, 128, 4, 3), (32, 64, 128, 4, 3), (64, 32, 128, 4, 3),
    (16, 128, 64, 4, 4), (128, 16, 64, 4, 4), (128, 256, 32, 8, 3), (128, 128, 32, 8, 3), (64, 64, 32, 4, 3),
    (32, 32, 32, 4, 3), (16, 32, 256, 4, 4), (32, 16, 256, 4, 4), (16, 16, 256, 4, 4),
)  # fmt: skip
EXACT_SIDES = (
    (64, 64, 16, 4, 3), (64, 64, 32, 4, 3), (128, 64, 16, 4, 3), (128, 64, 32, 8, 3), (64, 128, 32, 8, 3),
    (128, 128, 16, 8, 3), (32, 64, 32, 4, 3), (64, 32, 32, 4, 3), (32, 32, 32, 4, 3), (16, 64, 32, 4, 3),
    (64, 16, 32, 4, 3), (16, 32, 64, 4, 3), (32, 16, 64, 4, 3), (16, 16, 64, 4, 3),
)  # fmt: skip
# Those of tensor cores with the programs of a multiprocessor that go through all tiles, and the pieces of a tile's end.
GOING_ON = (
    (128, 256, 64, 8, 3, 1, 1), (128, 256, 64, 8, 3, 1, 2), (128, 256, 64, 8, 4, 1, 2), (256, 128, 64, 8, 4, 1, 2),
    (256, 128, 64, 8, 3, 1, 1), (128, 128, 64, 4, 4, 1, 1), (128, 128, 64, 4, 3, 2, 2),
)  # fmt: skip
# Tiles of the rank that is a side, of the stream, of the reduced rank that each of its tiles is a loop over.
NESTED = (
    (128, 256, 64, 8, 4), (128, 256, 64, 8, 3), (256, 128, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 4),
    (128, 128, 64, 4, 4), (128, 128, 64, 4, 3), (64, 256, 64, 4, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4),
    (64, 64, 64, 4, 4), (32, 128, 64, 4, 4), (16, 128, 64, 4, 4), (16, 64, 128, 4, 4),
)  # fmt: skip
EXACT_NESTED = (
    (64, 64, 16, 4, 3), (64, 64, 32, 4, 3), (128, 64, 16, 8, 3), (64, 128, 16, 8, 3), (32, 64, 32, 4, 3),
    (16, 64, 32, 4, 3),
)  # fmt: skip
FINER = (32, 1)  # times as many parts of a stream as fill a GPU: with more the last round of programs is shorter
FEWEST = 4  # tiles of a part, so that its beginning and its end count for little
TABLED = 2048  # rows: each entry of the tables of even parts looks at all of them; so many fill a GPU in any order
AVERAGE = 0.5  # of the longest row: how long rows are where data says so, as far as is known before it is seen
BESIDE = 8  # tiles that read the same at a time, where each has a stream of its own
AT_A_TIME = 132  # programs, about: as many multiprocessors


@dataclass(frozen=True, slots=True)
class Candidate:
    """Tiles that were considered, what the model says of them, and their milliseconds where they were timed."""

    tiling: Tiling
    estimate: Estimate
    milliseconds: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The tiles of a kernel, what the model says of them, how they were chosen, the next best ones, and the time."""

    tiling: Tiling
    estimate: Estimate
    how: str
    others: tuple[Candidate, ...] = ()
    milliseconds: float | None = None  # where it was measured, now or in an earlier run


# --- candidates ------------------------------------------------------------------------------------------------------


def candidates(planner: Planner, group: Group) -> tuple[Tiling, ...]:
    """Tilings that suit how the ranks of a group lie; the planner's own first choice is one of them."""
    base = planner.default_tiling(group)
    found: Iterable[Tiling] = (_with_products if planner.products(group) else _rows)(planner, group, base)
    again = planner.in_trips(group)
    found = [*found, *(() if again is None else _trips(planner, again))]
    shared: list[Tiling] = []
    uneven = planner.uneven(group)
    tabled = uneven is not None and planner.ranks[uneven.rank] <= TABLED
    for tiling in (*found, base):
        for each in (1,) if tiling.in_trips else _parts(planner, group, tiling):
            if tabled:  # of rows of one length one part is a row
                shared += [dataclasses.replace(tiling, parts=count, even=True) for count in (max(each, 2), 1)]
            shared.append(dataclasses.replace(tiling, parts=each))
    return tuple(dict.fromkeys(shared))


def smaller(planner: Planner, group: Group) -> Iterator[Tiling]:
    """The planner's own tiles with the longest side halved, again and again: for what the tables have too wide ones.

    Such are sums over several ranks that lie whole beside two sides.
    """
    base = planner.default_tiling(group)
    fixed = {*planner.packed(group), *((group.rows.rank,) if group.rows is not None else ())}
    cut = {Role.TILE, Role.STREAM, Role.INNER}
    sides = [rank for rank, role in planner.roles(group).items() if role in cut and rank not in fixed]
    tiles, least = dict(base.tiles), SMALLEST if planner.products(group) else 1
    while (longest := max(sides, key=lambda rank: tiles[rank], default=None)) and tiles[longest] > least:
        tiles[longest] //= 2
        for warps in (8, 4, 2, 1):
            options = dataclasses.replace(base.options, num_warps=warps)
            yield dataclasses.replace(base, tiles=tuple(tiles.items()), options=options)


def _parts(planner: Planner, group: Group, tiling: Tiling) -> Iterator[int]:
    """By how many programs a stream may be shared: where tiles of it take long, also by more than fill a GPU once."""
    parts, stream = planner.default_parts(group, dict(tiling.tiles)), group.arrangement.stream
    if not group.arrangement.inner or stream is None or not planner.divisible(group):
        yield from (parts, 2 * parts) if parts > 1 else (1,)
        return
    steps = -(-planner.ranks[stream] // tiling.of(stream))
    lengths = (max(FEWEST, -(-steps // (parts * times))) for times in FINER)
    yield from dict.fromkeys(-(-steps // length) for length in lengths)


def _with_products(planner: Planner, group: Group, base: Tiling) -> Iterator[Tiling]:
    """The tables of tiles, cut to the extents; with more sides than two only warps and stages are varied."""
    sides = [rank for rank, role in planner.roles(group).items() if role is Role.TILE]
    stream = group.arrangement.stream
    packed = planner.packed(group)

    def cut(rank: str, tile: int) -> int:
        if group.rows is not None and rank == group.rows.rank:
            return base.of(rank) if planner.lies_in_order(group) else min(tile, base.of(rank))
        if rank in packed or (rank == stream and planner.steps_singly(group)):
            return base.of(rank)
        return min(tile, max(SMALLEST, power_of_two(planner.ranks[rank])))

    exact = planner.exact(group)
    width = max((base.of(rank) for rank in group.arrangement.whole), default=0)
    across = planner.across(group, {rank: base.of(rank) for rank in group.arrangement.whole})
    few = len(sides) == 1 and base.of(sides[0]) <= SMALLEST
    usual = LOOKED_UP if few and _stream_looked_up(planner, group) else ONE_SIDE
    one = EXACT_SIDE if exact else WIDE if max(width, across) > WIDTH else usual
    table: Sequence[tuple[int, ...]] = {1: one, 2: EXACT_SIDES if exact else TWO_SIDES}.get(len(sides), ())
    nested = group.arrangement.inner
    if nested:
        table = (EXACT_NESTED if exact else NESTED) if len(sides) == 1 else ()
    going_on: Sequence[tuple[int, ...]] = GOING_ON if len(sides) == 2 and not exact else ()
    if any(matrix_product(stmt) is None for stmt in group.statements):  # what follows the loop needs registers
        going_on = sorted(going_on, key=lambda row: row[-1] == 1)
    for *tiles, warps, stages, resident, pieces in (*going_on, *((*row, 0, 1) for row in table)):
        named = dict(zip([*sides, *([stream] if stream is not None else [])], tiles, strict=False))
        named |= dict.fromkeys(nested, tiles[-1])
        chosen = dict(base.tiles) | {rank: cut(rank, tile) for rank, tile in named.items()}
        if nested and stream is not None:
            halves = 1 if exact else 2  # half of the registers are for what follows the sums
            across = halves * planner.summed(group) * chosen[stream]
        room = EXACT_ACCUMULATED * warps // 4 if exact else ACCUMULATED
        if len(sides) == 1 and chosen[sides[0]] > 16 and chosen[sides[0]] * across > room:
            continue
        small = not exact and any(chosen[rank] < 64 and chosen[rank] < cut(rank, 64) for rank in sides)
        if small and _programs(planner, group, chosen) > MANY:
            continue
        count = _programs(planner, group, chosen)
        if resident and group.rows is not None and len(planner.products(group)) > 1:
            continue  # a loop that is joined begins accumulators anew between two products, which then wait (C7515)
        sums = _accumulated(planner, group, chosen) * (2 if exact else 1)
        if len(sides) == 2 and sums > MAX_REGISTERS * WARP * warps:
            continue
        if resident and count <= resident * FEW_PROGRAMS:
            continue  # each would have one tile
        beside = BESIDE if nested else 0
        if len(sides) == 2 and count > FEW_PROGRAMS:
            beside = _beside(planner, group, sides, chosen)
        crowded = sums > CROWDED * WARP * warps
        edge = EDGE_TILE if crowded and stream is not None and chosen[stream] > EDGE_TILE else 0
        yield Tiling(tuple(chosen.items()), Options(warps, stages, edge, beside, resident, pieces))
    for warps, stages in () if table else ((4, 2), (4, 3), (8, 2), (8, 3)):
        options = dataclasses.replace(base.options, num_warps=warps, num_stages=stages)
        yield dataclasses.replace(base, options=options)


def _stream_looked_up(planner: Planner, group: Group) -> bool:
    """Whether an operand of a product lies along the stream where another tensor says."""
    terms = (term for stmt in planner.products(group) for term in expressions(stmt))
    return any(group.arrangement.stream in looking_up(term) for term in terms)


def _beside(planner: Planner, group: Group, sides: Sequence[str], tiles: Mapping[str, int]) -> int:
    """How many tiles of the first side are beside each other: what runs at a time reads about as much of either side.

    A side of several operands is read as often.
    """
    read: list[set[object]] = [set(), set()]
    for stmt in planner.products(group):
        found = matrix_product(stmt)
        pairs = () if found is None else ((found.left, found.rows), (found.right, found.columns))
        for (terms, ranks), (at, rank) in itertools.product(pairs, enumerate(sides)):
            if rank in ranks:
                read[at].add(terms)
    first, second = (max(1, len(terms)) * tiles[rank] for terms, rank in zip(read, sides, strict=True))
    return 1 << max(0, int(math.log2(AT_A_TIME * second / first) / 2))


def _accumulated(planner: Planner, group: Group, tiles: Mapping[str, int]) -> int:
    """The elements of the sums of all products of a group, which a program holds together."""
    made = (target for stmt in planner.products(group) for target in targets(stmt))
    return sum(math.prod(tiles.get(rank, 1) for rank in target.ranks) for target in made)


def _programs(planner: Planner, group: Group, tiles: Mapping[str, int]) -> int:
    """The programs of a grid with these tiles."""
    return math.prod(planner.programs(group, tiles, planner.ranks))


def _rows(planner: Planner, group: Group, base: Tiling) -> list[Tiling]:
    """As many elements a program as give each thread enough to do; those with about 32 a thread, 4 warps come first."""
    found = list(_all_rows(planner, group, base))

    def unusual(tiling: Tiling) -> float:
        warps = tiling.options.num_warps
        each = planner.held(group, dict(tiling.tiles)) / (32 * warps)
        return abs(math.log2(each / 32)) + abs(math.log2(warps / 4)) / 2

    return sorted(found, key=unusual)


def _all_rows(planner: Planner, group: Group, base: Tiling) -> Iterator[Tiling]:
    """Every number of warps with every tile that gives each thread enough to do."""
    roles = planner.roles(group)
    stream = group.arrangement.stream
    tiled = [rank for rank, role in roles.items() if role is Role.TILE]
    whole = {rank: base.of(rank) for rank, role in roles.items() if role is Role.WHOLE}
    singly, steps = planner.steps_singly(group), bool(stepped(group.statements))
    least, most = SINGLY if singly else (THREAD[0], THREAD[1] // 2) if in_pairs(group.statements) else THREAD
    streams = [1]
    if stream is not None and not singly:
        streams = _stream_tiles(planner.length(stream), bool(tiled), planner.goes_again(group), steps)
        across = planner.held(group, whole | dict.fromkeys((*tiled, stream), 1))
        if streams[0] * across > MOST_WARPS * WARP * most // 4:  # what lies whole beside it is wide for long ones
            streams += _stream_tiles(planner.length(stream), True, planner.goes_again(group), steps)
    for tile in streams:
        for lengths in _lengths([planner.ranks[rank] for rank in tiled]):
            tiles = whole | ({stream: tile} if stream is not None else {}) | dict(zip(tiled, lengths, strict=True))
            tiles |= {group.rows.rank: base.of(group.rows.rank)} if group.rows is not None else {}
            held = planner.held(group, tiles)
            for warps in (1, 2, 4, 8, 16, MOST_WARPS):
                if least <= held // (WARP * warps) <= most:
                    yield Tiling(tuple(tiles.items()), Options(warps, 2))


def _trips(planner: Planner, group: Group) -> Iterator[Tiling]:
    """Tiles for rows that are gone through again though they fit: two trips or more, one wide load of each thread."""
    stream = group.arrangement.stream
    assert stream is not None
    for tile in TRIPS:
        if tile < planner.ranks[stream]:
            yield Tiling(((stream, tile),), Options(tile // (WARP * THREAD[0]), 2), in_trips=True)


def _stream_tiles(extent: int, beside: bool, again: bool, steps: bool) -> list[int]:
    """Tiles of a stream without products: short beside a tile of rows, else a good part of a row.

    Where rows are gone through again, large ones: of fewer rows at a time more is still in the cache. A scan has its
    elements several times: no more of them than registers hold.
    """
    most = power_of_two(extent)
    lengths = (16, 32, 64) if beside else (16384, 32768) if again else (1024, 2048, 4096, 8192, 16384)
    return sorted({min(tile, most) for tile in lengths if not steps or tile <= STEPS_LIMIT})


def _lengths(extents: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Tiles of the tiled ranks, whose last one lies contiguously: that is long, those before it share what is left."""
    if not extents:
        yield ()
        return
    most = [power_of_two(extent) for extent in extents]
    for last in sorted({min(1 << bits, most[-1]) for bits in range(12)}):
        if len(extents) == 1:
            yield (last,)
            continue
        for before in sorted({min(1 << bits, most[-2]) for bits in range(8)}):
            if last == min(most[-1], 64) or last > 64:
                yield (*(1 for _ in extents[2:]), before, last)


# --- the model's order -----------------------------------------------------------------------------------------------


def planned(
    planner: Planner, name: str, group: Group, groups: Sequence[Group | Rest], tiling: Tiling
) -> tuple[Kernel, Mapping[str, int]]:
    """The kernel of a group with these tiles, and the values of its shape symbols; the first one of a shared stream."""
    if tiling.shared:
        kernel, merger, _ = planner.split(name, group, groups, tiling)
        return kernel, {**merger.extents, **(kernel.index.sizes if kernel.index else {})}
    kernel = planner.kernel(name, group, groups, tiling)
    return kernel, sized(planner, kernel)


def sized(planner: Planner, kernel: Kernel) -> dict[str, int]:
    """The values of a kernel's shape symbols; of tiles and parts that only the device counts, about as many as are."""
    more = kernel.index.sizes if kernel.index else {}
    merged = {size: parts for rank, parts in planner.merges.items() if isinstance(size := planner.sizes[rank], str)}
    return {**planner.typical, **more, **planner.padded(kernel.rows, expected=True), **merged}


def ranked(
    planner: Planner,
    name: str,
    group: Group,
    groups: Sequence[Group | Rest],
    machine: Machine,
    considered: Sequence[Tiling],
) -> list[tuple[Tiling, Estimate]]:
    """The candidates that can run with what the model says of them, the fastest first.

    Plans that differ in nothing but numbers are made once: lowering takes far longer than counting. Of a shared stream
    the programs are counted, not what merges their states: that is one short launch more. Where data says how long
    rows are, even parts take another one, and as long as rows do on average; others wait for the longest row. What goes
    through rows again comes last: how much of them is still in the cache only a stopwatch tells.
    """
    uneven = planner.uneven(group) is not None
    others = frozenset(considered)
    plans: dict[object, Kernel | None] = {}
    found: list[tuple[Tiling, Estimate]] = []
    for tiling in considered:
        arranged = planner.arranged(group, tiling)
        axes = _axes(planner, arranged, tiling)
        key = tiling.in_trips, _form(planner, arranged, axes, tiling)
        if key not in plans:
            try:
                plans[key] = planner.kernel(name, group, groups, dataclasses.replace(tiling, parts=1, even=False))
            except UnsupportedError:
                plans[key] = None
        kernel = plans[key]
        if kernel is None or (tiling.options.edge_tile and _undivided(kernel) and _without_edge(tiling) in others):
            continue
        sizes, kernel = sized(planner, kernel), _retiled(kernel, axes, tiling)
        if not _compiles(kernel):
            continue
        predicted = predict(machine, kernel, sizes)
        if uneven:
            longer = (
                0.0 if tiling.even else (1 - AVERAGE) / max(1.0, predicted.waves)
            )  # the last wave has a longest row
            busy = tuple((unit, us if unit == "launch" else AVERAGE * us) for unit, us in predicted.parts)
            predicted = dataclasses.replace(predicted, time_us=predicted.time_us * (AVERAGE + longer), parts=busy)
        if tiling.shared:
            launches = machine.launch_us * (1 + tiling.even)
            predicted = dataclasses.replace(predicted, time_us=predicted.time_us + launches)
        if predicted.blocks_per_sm:
            found.append((tiling, predicted))
    return sorted(found, key=lambda pair: (pair[0].in_trips, round(math.log(pair[1].time_us) / ALIKE)))


def _without_edge(tiling: Tiling) -> Tiling:
    """The tiling whose tiles at edges are as long as all."""
    return dataclasses.replace(tiling, options=dataclasses.replace(tiling.options, edge_tile=0))


def _undivided(kernel: Kernel) -> bool:
    """Whether no loop has edges of its own."""
    return not any(isinstance(op, Loop) and op.inner is not None for op in every_op(kernel.ops))


def _axes(planner: Planner, group: Group, tiling: Tiling) -> dict[str, Axis]:
    static = planner.static(group)
    return {rank: planner.axis(group, rank, role, tiling, static) for rank, role in planner.roles(group).items()}


def _form(planner: Planner, group: Group, axes: Mapping[str, Axis], tiling: Tiling) -> object:
    """Everything about a tiling that the ops of a plan depend on, beyond the numbers that they are counted with."""
    if planner.grouped(group):
        return tiling.tiles
    if group.rows is not None:  # tables are for tiles of one size
        same = tiling.of(group.rows.rank)
        return (same, *((axis.exact, axis.tile < SMALLEST, axis.tile > 256) for axis in axes.values()))
    static = planner.static(group)
    shared = sorted(
        (rank, math.gcd(axes[rank].tile, by))  # so many neighbours have one element of what is read at the quotient
        for rank, size in quotients(group) if rank in axes and isinstance(by := static.size(size), int)
    )  # fmt: skip
    return *shared, *((axis.exact, axis.step, axis.tile < SMALLEST, axis.tile > 256) for axis in axes.values())


def _retiled(kernel: Kernel, axes: Mapping[str, Axis], tiling: Tiling) -> Kernel:
    """A plan of the same form with the numbers of another tiling."""
    edge = tiling.options.edge_tile
    ops = tuple(dataclasses.replace(op, edge_tile=edge) if isinstance(op, Loop) else op for op in kernel.ops)
    same = tuple(axis if axis.role is Role.WHOLE else axes[axis.rank] for axis in kernel.axes)
    same = tuple(dataclasses.replace(a, parts=tiling.parts) if a.role is Role.STREAM else a for a in same)
    return suited(dataclasses.replace(kernel, axes=same, ops=ops, options=tiling.options))


def predict(
    machine: Machine,
    kernel: Kernel,
    sizes: Mapping[str, int],
    registers: int | None = None,
    shared_bytes: int | None = None,
) -> Estimate:
    """What the model says of a kernel; registers and shared memory are guessed where they are not known."""
    asked = work(kernel, sizes, registers, shared_bytes)
    found = estimate(machine, asked)
    if asked.matrix_flops and found.blocks_per_sm and asked.read_bytes > machine.l2_mb * 1e6:
        read = read_in_waves(kernel, sizes, min(asked.programs, machine.sms * found.blocks_per_sm))
        again = max(0.0, read - asked.read_bytes)
        asked = dataclasses.replace(asked, read_bytes=read, l2_bytes=max(0.0, asked.l2_bytes - again))
        found = estimate(machine, asked)
    late = _late(machine, asked, found, rounds(kernel, sizes))
    return dataclasses.replace(found, time_us=found.time_us * late) if late > 1.0 else found


def _late(machine: Machine, work: Work, found: Estimate, rounds: float) -> float:
    """By how much a loop takes longer because operands come later than they are wanted.

    A loop of s stages asks for its operands s - 1 rounds ahead. Where these rounds are shorter than the way from L2, a
    program waits for the rest; other resident ones go on meanwhile. Slower memory makes them late anyway.
    """
    if work.stages < 2 or not rounds or not found.blocks_per_sm:
        return 1.0
    parts = dict(found.parts)
    units = [parts[name] for name in ("matrix", "exp", "vector")]
    busy = (sum(units) if work.dependent else max(units)) * machine.sms / rounds
    ahead = work.stages - 1
    busy = max(busy, parts["memory"] * machine.sms / rounds)
    fetch = FETCH_US + work.flight_bytes / ahead / (machine.l2_bandwidth_tbs * 1e6 / machine.sms)
    resident = min(found.blocks_per_sm, max(1.0, work.programs / machine.sms))
    lasts = found.time_us * resident * machine.sms / rounds
    return 1.0 + max(0.0, fetch - ahead * busy) / (lasts * resident)


# --- the choice ------------------------------------------------------------------------------------------------------


def choose(
    planner: Planner,
    name: str,
    group: Group,
    groups: Sequence[Group | Rest],
    machine: Machine,
    effort: str = "none",
    timer: Timer | None = None,
    cache: Path | None = None,
    versions: tuple[str, ...] = (),
    deterministic: bool = False,
    refused: Collection[Tiling] = (),
    compiler: Compiler = facts,
    others: Others = lambda own_us: (),
) -> Choice:
    """The tiles of a group's kernel.

    `timer` measures a candidate, without one the best are compiled for the machine and what spills is left out; more
    are until one of them is left. The rest is as `shortlist` has it.
    """
    effort = "none" if deterministic else effort
    found = shortlist(planner, name, group, groups, machine, effort, cache, versions, refused, others)
    if isinstance(found, Choice):
        return found
    if timer is None:
        few, rest = found.few, [one for one in found.order if one not in found.few]
        compiled = _compiled(planner, name, group, groups, machine, few, compiler)
        tried = len(few)
        while rest and all(one.tiling.elsewhere for one in compiled):
            few, rest = tuple(rest[:QUICK]), rest[QUICK:]
            compiled += _compiled(planner, name, group, groups, machine, few, compiler)
            tried += len(few)
        return _chosen(compiled or found.order, 0, f"the model's first of {tried} that were compiled")
    return timed(found, timer)


@dataclass(frozen=True, slots=True)
class Shortlist:
    """Candidates that are to be timed, among all in the model's order, and where the choice will be kept."""

    order: tuple[Candidate, ...]
    few: tuple[Candidate, ...]
    path: Path | None


def shortlist(
    planner: Planner,
    name: str,
    group: Group,
    groups: Sequence[Group | Rest],
    machine: Machine,
    effort: str,
    cache: Path | None = None,
    versions: tuple[str, ...] = (),
    refused: Collection[Tiling] = (),
    others: Others = lambda own_us: (),
) -> Shortlist | Choice:
    """What is to be timed before there is a choice; the choice where nothing is.

    `effort` is `none`, `quick` or `full`. `cache` is the folder of timed choices, `versions` what they depend on
    besides the cascade and the call. Candidates that were `refused` by the device are not taken again. The `others`,
    which are no kernel with tiles, are taken where they are clearly faster.
    """

    def fitting(tilings: Iterable[Tiling]) -> list[Candidate]:
        considered = tuple(tiling for tiling in tilings if tiling not in refused)
        return [Candidate(*one) for one in ranked(planner, name, group, groups, machine, considered)]

    order = fitting(candidates(planner, group)) or fitting(smaller(planner, group))
    if not order:
        return _last_resort(planner, name, group, groups, machine)
    own_us = order[0].estimate.time_us
    beside = [Candidate(*one) for one in others(own_us) if one[0] not in refused]
    clearly = [
        one for one in beside if one.estimate.time_us < (1 - (UNTIMED if one.tiling.apart else CLEARLY)) * own_us
    ]
    clearly.sort(key=lambda one: one.estimate.time_us)
    order = [*clearly, *order, *(one for one in beside if one not in clearly)]
    if effort == "none":
        return _chosen(order, 0, f"the model's first of {len(order)}")
    path = None if cache is None else cache / f"{_digest(planner, group, machine, versions)}.json"
    kept = None if path is None or not path.exists() else _kept(path, order)
    if kept is not None:
        return kept
    others_too = [one for one in order[QUICK:] if one.tiling.elsewhere]
    trips = [one for one in order[QUICK:] if one.tiling.in_trips]
    few = order if effort == "full" else [*order[:QUICK], *others_too, *trips]
    return Shortlist(tuple(order), tuple(few), path)


def timed(found: Shortlist, timer: Timer) -> Choice:
    """The fastest of those on a shortlist, which is kept on disk; the model's first of the rest where none runs."""
    measured = [dataclasses.replace(one, milliseconds=timer(one.tiling)) for one in found.few]
    running = [one for one in measured if one.milliseconds is not None]
    if not running:
        rest = [one for one in found.order if one.tiling not in {tried.tiling for tried in found.few}]
        return _chosen(rest or found.order, 0, "the model's first: none of those timed ran")
    margin = {one.tiling: CLEARLY if one.tiling.library else NARROWLY if one.tiling.apart else 0.0 for one in running}
    running.sort(key=lambda one: (one.milliseconds or 0.0) / (1 - margin[one.tiling]))
    if found.path is not None:
        store(found.path, _entry(running[0]))
    return _chosen(running, 0, f"the fastest of {len(running)} timed: {running[0].milliseconds:.4g} ms")


def _chosen(order: Sequence[Candidate], place: int, how: str) -> Choice:
    chosen = order[place]
    others = tuple(one for one in order if one is not chosen)[:SHOWN]
    return Choice(chosen.tiling, chosen.estimate, how, others, chosen.milliseconds)


def _compiles(kernel: Kernel) -> bool:
    """Whether a thread folds no more elements at once than a compiler finishes with: it writes each of them out."""
    tiles = {axis.rank: axis.tile for axis in kernel.axes}
    folds = (op for op in every_op(kernel.ops) if isinstance(op, Fold))
    widest = max((math.prod(tiles[rank] for rank in {*op.axes, *op.over}) for op in folds), default=0)
    return widest <= FOLDED * WARP * kernel.options.num_warps


def _last_resort(planner: Planner, name: str, group: Group, groups: Sequence[Group | Rest], machine: Machine) -> Choice:
    """The planner's own tiles where the model believes in none; UnsupportedError where there is no plan at all."""
    tiling = planner.default_tiling(group)
    kernel, sizes = planned(planner, name, group, groups, tiling)
    if not _compiles(kernel):
        raise unsupported("a sum over tiles of more elements than a compiler finishes with", group.statements[0])
    return Choice(tiling, predict(machine, kernel, sizes), "the planner's own: the model finds none that fits")


def _compiled(
    planner: Planner,
    name: str,
    group: Group,
    groups: Sequence[Group | Rest],
    machine: Machine,
    order: Sequence[Candidate],
    compiler: Compiler,
) -> list[Candidate]:
    """The candidates that compile without spills or waits, by what the model says of their true registers."""
    if machine.arch not in LIMITS:
        return list(order)
    own = [one for one in order if not one.tiling.elsewhere]
    plans = [planned(planner, name, group, groups, one.tiling) for one in own]
    answers = compiler([request(kernel, emit(kernel)) for kernel, _ in plans], machine.arch)
    found = [one for one in order if one.tiling.elsewhere]  # nothing of it is compiled here
    for one, (kernel, sizes), answer in zip(own, plans, answers, strict=True):
        if isinstance(answer, Failure) or not is_clean(answer):
            continue
        known = predict(machine, kernel, sizes, answer.registers, answer.shared_bytes)
        found.append(dataclasses.replace(one, estimate=known))
    return sorted(found, key=lambda one: (one.tiling.in_trips, one.estimate.time_us))


def is_clean(found: StaticFacts | Failure) -> bool:
    """Whether a kernel compiles, fits, has all it computes with in registers, and no product waits for another."""
    return isinstance(found, StaticFacts) and not found.spills and not found.serialized and found.blocks_per_sm > 0


# --- on disk ---------------------------------------------------------------------------------------------------------


def _digest(planner: Planner, group: Group, machine: Machine, versions: Sequence[str]) -> str:
    """The name of an entry: the hash of everything that a choice depends on."""
    static = planner.static(group)
    extents = {
        rank: extent if isinstance(static.size(planner.sizes[rank]), int) else [power_of_two(extent), extent % 64 == 0]
        for rank, extent in planner.ranks.items()
    }
    tensors = dict.fromkeys(read for stmt in group.statements for read in planner.outside_reads(stmt, group))
    layouts = [
        [tensor.name, tensor.dtype.value, list(tensor.strides), tensor.described]
        for tensor in map(planner.tensor, tensors)
    ]
    statements = [render_stmt(stmt) for stmt in group.statements]
    told = [render(planner.cascade), statements, extents, dict(static.numbers), layouts]
    key = [VERSION, *versions, machine.name, machine.arch, *told]
    return hashlib.sha256(json.dumps(key).encode()).hexdigest()


def _entry(chosen: Candidate) -> tuple[object, ...]:
    """A candidate as the numbers that are written."""
    options = dataclasses.astuple(chosen.tiling.options)
    tiling = chosen.tiling
    return (tiling.tiles, options, tiling.even, tiling.apart or tiling.library, tiling.parts, chosen.milliseconds)


def is_entry(value: object) -> bool:
    """Whether a value that was read has the form of `_entry`."""
    return isinstance(value, tuple) and len(value) == 6 and isinstance(value[-1], int | float)


def _kept(path: Path, order: Sequence[Candidate]) -> Choice | None:
    """The choice that an entry holds, where it is one of the candidates; tiles of anything else are not believed.

    In how many parts a stream goes follows from its extent, which may be another one of about the same size: the
    candidate with as many, else the first with such tiles.
    """
    entry = load(path)
    if not is_entry(entry):
        return None
    *tiles, parts, milliseconds = entry
    alike = [place for place, one in enumerate(order) if [*_entry(one)[:-2]] == tiles]
    place = next((place for place in alike if order[place].tiling.parts == parts), next(iter(alike), None))
    if place is None:
        return None
    known = [*order[:place], dataclasses.replace(order[place], milliseconds=milliseconds), *order[place + 1 :]]
    return _chosen(known, place, f"kept from an earlier run: {milliseconds:.4g} ms there")
