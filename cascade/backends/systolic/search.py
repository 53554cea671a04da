"""Mappings for a cascade that comes without one: the groups of its schedule as regions, loops found by trying.

What the schedule groups runs in one region, everything else alone. Ranks that move every tensor of a region are gone
through one coordinate at a time: nothing is shared between them. What is left to choose are loops over the other ranks
that all Einsums of a region, or of a stage, have: which, in which order, of which size. All orders of up to three loops
are tried, the outer ones as large as fits or a power of two, so for small regions the choice is the best there is of
this form: least time, then least traffic, then least on chip.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from cascade.backends.systolic.cost import Evaluator
from cascade.backends.systolic.machine import Machine
from cascade.backends.systolic.mapping import Mapping as Map
from cascade.backends.systolic.nest import ceil_div
from cascade.backends.systolic.work import Access, Cascaded, operations
from cascade.errors import CascadeError, CommandError, Diagnostic, UnsupportedError
from cascade.ir import Loop, Region, Stage
from cascade.passes.traffic import scheduled_groups

MOST_LOOPS = 3
MOST_TIMES = 32  # iterations of a loop that are tried beside the largest divisor
SIZES = (16, 256)
"""Sizes that are tried beside the largest that fits."""

Progress = Callable[[str, int, int], None]
"""Told the name of a region, how many of its forms were tried, and how many there are."""


def search(
    cascaded: Cascaded,
    machine: Machine,
    sizes: Mapping[str, int],
    progress: Progress | None = None,
    start: Map | None = None,
) -> Map:
    """The best mapping of the forms that are tried, for the sizes of all shape symbols; raises C540 where none fits.

    With a mapping to `start` from, its regions, stages and phases stay, and its loops are among those that are tried.
    """
    mapping = Map(tuple(regions(cascaded))) if start is None else start
    number = 0
    while number < len(mapping.regions):
        region = mapping.regions[number]
        try:
            found = [_best(Evaluator(cascaded, machine, mapping), number, sizes, progress)]
        except UnsupportedError:
            if len(region.statements) == 1 or region.phases:
                raise
            mapping = taken_apart(mapping, number)  # too large together
            continue
        for bound in bindings(cascaded, machine, mapping, region):
            with contextlib.suppress(UnsupportedError):
                found.append(_best(Evaluator(cascaded, machine, bound), number, sizes, progress))
        mapping = _moved(cascaded, machine, min(found, key=lambda best: best.rank), number, sizes).mapping
        number += 1
    return mapping


def taken_apart(mapping: Map, number: int) -> Map:
    """A mapping with a region for each Einsum of the one of that number."""
    parts = tuple(Region(name, (Stage((name,)),)) for name in mapping.regions[number].statements)
    return replace(mapping, regions=(*mapping.regions[:number], *parts, *mapping.regions[number + 1 :]))


def bindings(cascaded: Cascaded, machine: Machine, mapping: Map, region: Region) -> Iterator[Map]:
    """The mapping with all that a unit can do of a region on it, where the fastest unit may not be the best.

    That is where units reach memory on paths of their own (few operations a byte want the one with most bandwidth, many
    the one with lanes) and where an array has to be filled.
    """
    if region.phases or (len(machine.memories) < 2 and not any(unit.fill for unit in machine.units.values())):
        return
    seen = [Evaluator(cascaded, machine, mapping).unit]
    others = tuple(pair for pair in mapping.units if pair[0] not in region.statements)
    for unit in machine.units.values():
        able = [name for name in region.statements if operations(cascaded.works[name].steps, unit) is not None]
        bound = replace(mapping, units=(*others, *((name, unit.name) for name in able)))
        chosen = Evaluator(cascaded, machine, bound).unit
        if chosen not in seen:
            seen.append(chosen)
            yield bound


def _moved(cascaded: Cascaded, machine: Machine, best: _Best, number: int, sizes: Mapping[str, int]) -> _Best:
    """The mapping with Einsums of a region moved to another unit, one by one, where that takes less.

    Units of a region work at the same time, so what one can do may better be shared among them.
    """
    region = best.mapping.regions[number]
    if region.phases:
        return best
    for name, unit in itertools.product(region.statements, machine.units.values()):
        if operations(cascaded.works[name].steps, unit) is None:
            continue
        others = tuple(pair for pair in best.mapping.units if pair[0] != name)
        moved = replace(best.mapping, units=(*others, (name, unit.name)))
        with contextlib.suppress(CascadeError):
            rank = _rank(Evaluator(cascaded, machine, moved), number, region, sizes)
            if rank < best.rank:
                best = replace(best, mapping=moved, rank=rank)
    return best


Rank = tuple[float, int, int]  # seconds, bytes of memory, bytes on chip: the less the better


@dataclass(frozen=True, slots=True)
class _Best:
    """The mapping with the best loops of one region, and what the region costs."""

    mapping: Map
    rank: Rank


def _best(evaluator: Evaluator, number: int, sizes: Mapping[str, int], progress: Progress | None) -> _Best:
    """The best loops of one region."""
    region = evaluator.mapping.regions[number]
    best: tuple[Rank, Region] | None = None
    bare = replace(region, keep=(), capacity=None)
    forms = [region, *candidates(evaluator.cascaded, bare, evaluator.extents(sizes))]
    for at, candidate in enumerate(forms):
        if progress is not None:
            progress(region.name, at + 1, len(forms))
        try:
            rank = _rank(evaluator, number, candidate, sizes)
        except (CommandError, UnsupportedError):  # these loops cannot hold these Einsums, or not on chip
            continue
        if best is None or rank < best[0]:
            best = rank, candidate
    if best is None:
        raise lacking(evaluator, number, sizes)
    for candidate in _uneven(best[1], evaluator, sizes):
        try:
            rank = _rank(evaluator, number, candidate, sizes)
        except CascadeError:
            continue
        if rank < best[0]:
            best = rank, candidate
    return _Best(with_region(evaluator.mapping, number, best[1]), best[0])


def with_region(mapping: Map, number: int, region: Region) -> Map:
    """A mapping with another region in the place of one."""
    return replace(mapping, regions=(*mapping.regions[:number], region, *mapping.regions[number + 1 :]))


def _rank(evaluator: Evaluator, number: int, region: Region, sizes: Mapping[str, int]) -> Rank:
    """What a region costs in place of the one of that number."""
    cost = evaluator.region_cost(evaluator.plan(with_region(evaluator.mapping, number, region), number), sizes)
    return cost.seconds, cost.movement.bytes, cost.movement.held


def _uneven(region: Region, evaluator: Evaluator, sizes: Mapping[str, int]) -> Iterator[Region]:
    """The region with each loop that is as large as fits in few iterations of about the same length instead.

    What fits is a divisor; the fewest iterations that fit may be fewer where the last one is shorter.
    """
    extents = evaluator.extents(sizes)
    for at, old in enumerate(region.loops):
        if old.size is None:
            inner = [loop.size or 1 for stage in region.stages for loop in stage.loops if loop.rank == old.rank]
            least = max(inner, default=1)
            for times in range(2, MOST_TIMES + 1):
                size = ceil_div(ceil_div(extents[old.rank], least), times) * least
                yield replace(region, loops=(*region.loops[:at], replace(old, size=size), *region.loops[at + 1 :]))


def lacking(evaluator: Evaluator, number: int, sizes: Mapping[str, int]) -> UnsupportedError:
    """Why no form of a region runs: the bytes that the first one lacks, where it is the buffer."""
    region = evaluator.mapping.regions[number]
    bare = replace(region, keep=(), capacity=None)
    for candidate in (region, *candidates(evaluator.cascaded, bare, evaluator.extents(sizes))):
        try:
            _rank(evaluator, number, candidate, sizes)
        except CommandError:
            continue
        except UnsupportedError as error:
            return error
    message = f"no mapping fits: no loops of region {region.name!r} can run"
    return UnsupportedError(Diagnostic("C540", message, help="give a mapping file"))


def regions(cascaded: Cascaded) -> Iterator[Region]:
    """A region for every group of the schedule and every other Einsum, behind what it reads."""
    groups = scheduled_groups(cascaded.cascade)
    home: dict[str, tuple[str, ...]] = {}
    for name in cascaded.works:
        inside = next((group for group in groups if group & _defines(cascaded, name)), frozenset())
        members = tuple(other for other in cascaded.works if other not in home and inside & _defines(cascaded, other))
        if name not in home:
            home.update(dict.fromkeys(members or (name,), members or (name,)))
    left = list(dict.fromkeys(home.values()))
    done: set[str] = set()
    while left:
        ready = next((group for group in left if _needs(cascaded, group) <= done), left[0])
        left.remove(ready)
        done.update(ready)
        yield Region("+".join(ready[:1] if len(ready) == 1 else (ready[0], ready[-1])), tuple(_stages(cascaded, ready)))


def _defines(cascaded: Cascaded, name: str) -> frozenset[str]:
    return frozenset(access.tensor for access in cascaded.works[name].writes)


def _needs(cascaded: Cascaded, group: tuple[str, ...]) -> set[str]:
    """The Einsums outside of a group whose tensors it reads."""
    read = {access.tensor for name in group for access in cascaded.works[name].reads}
    return {cascaded.maker[name] for name in read if name in cascaded.maker} - set(group)


def _stages(cascaded: Cascaded, group: tuple[str, ...]) -> Iterator[Stage]:
    """The Einsums of a group by the pass in which they run, of the rank that is passed over most."""
    passes = max(cascaded.passes.values(), key=lambda found: len({found[name] for name in group if name in found}))
    numbers = {passes[name] for name in group if name in passes}
    if len(numbers) < 2:
        folded = {rank for name in group for rank in cascaded.works[name].reduced}
        late = [name for name in group if folded and not folded & set(cascaded.works[name].ranks)]
        while fed := [name for name in late if _feeds(cascaded, name, set(group) - set(late))]:
            late = [name for name in late if name not in fed]
        early = tuple(name for name in group if name not in late)
        yield from (Stage(part) for part in (early, tuple(late)) if part)
        return
    current: list[str] = []
    at = 0
    for name in group:
        number = max(at, passes.get(name, at))
        if current and number != at:
            yield Stage(tuple(current))
            current = []
        current.append(name)
        at = number
    yield Stage(tuple(current))


def _feeds(cascaded: Cascaded, name: str, others: set[str]) -> bool:
    """Whether one of some Einsums reads what an Einsum makes."""
    made = _defines(cascaded, name)
    return any(access.tensor in made for other in others for access in cascaded.works[other].reads)


def candidates(
    cascaded: Cascaded, region: Region, extents: Mapping[str, int], tiles: tuple[int, ...] = SIZES
) -> Iterator[Region]:
    """The region with loops in every way that is tried: the sizes of `tiles`, and as large as fits."""
    works = [cascaded.works[name] for name in region.statements]
    common = [rank for rank in works[0].ranks if all(rank in work.ranks for work in works)]
    every = [access for work in works for access in (*work.reads, *work.writes)]
    outer = [rank for rank in common if extents[rank] > 1 and all(_moves(access, rank) for access in every)]
    if len(outer) == len(common):
        outer = outer[:-1]
    points = tuple(Loop(rank, 1, rank) for rank in outer)
    rest = [rank for rank in common if rank not in outer and extents[rank] > 1]
    inner = [_own(cascaded, stage, {*common}, extents, tiles) for stage in region.stages]
    for shared in _orders(rest, extents, tiles):
        for own in itertools.product(*inner):
            stages = tuple(replace(stage, loops=loops) for stage, loops in zip(region.stages, own, strict=True))
            yield replace(region, loops=(*points, *shared), stages=stages)


def _moves(access: Access, rank: str) -> bool:
    """Whether every coordinate of a rank finds a tensor at others; data, divisions and windows may share some."""
    return any(place.ranks == (rank,) and place.steps is not None for place in access.places)


def _own(
    cascaded: Cascaded, stage: Stage, shared: set[str], extents: Mapping[str, int], tiles: tuple[int, ...]
) -> list[tuple[Loop, ...]]:
    """Loops of a stage's own, over one rank that its Einsums fold away or make together: none, or one of some size."""
    works = [cascaded.works[name] for name in stage.statements]
    ranks = dict.fromkeys(rank for work in works for rank in work.ranks if rank not in shared)
    full = [rank for rank in ranks if sum(rank in work.ranks for work in works) > 1 or len(works) == 1]
    found: list[tuple[Loop, ...]] = [()]
    for rank in full:
        found += [(Loop(rank, size, rank),) for size in tiles if size < extents[rank]]
    return found


def _orders(ranks: list[str], extents: Mapping[str, int], tiles: tuple[int, ...]) -> Iterator[tuple[Loop, ...]]:
    """Loops over some of the ranks in every order, the sizes of each: as large as fits, or one of a few."""
    for count in range(min(MOST_LOOPS, len(ranks)) + 1):
        for chosen in itertools.permutations(ranks, count):
            sizes = [(None, *(size for size in tiles if size < extents[rank])) for rank in chosen]
            for kinds in itertools.product(*sizes):
                yield tuple(Loop(rank, size, rank) for rank, size in zip(chosen, kinds, strict=True))
