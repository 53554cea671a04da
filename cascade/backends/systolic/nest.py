"""A loop nest over tiles of ranks: how often a tile is fetched, how much of a tensor that is, how large the tile is.

Loops stand outermost first; one takes `size` coordinates of its rank an iteration. A load stands just inside of the
innermost loop that moves its tensor: further out, its data would be others; further in, they would be fetched again.
So what it fetches in all is the tensor, once for every iteration of the loops around it that do not move it:

    for p by 4                K[n,e], loaded in the loop over n: N*E elements for each of the ceil(P/4) tiles of p
        for n by 8            Q[p,e], loaded in the loop over p: P*E elements, once

A tile at the end of a rank may be smaller. Where a rank is partitioned twice, the inner size divides the outer one, so
tiles of the inner loop are those of the rank, whatever the outer loop is. A loop of one iteration is no loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from cascade.backends.systolic.work import Access, Place


def ceil_div(a: int, b: int) -> int:
    """The least whole number that is not below a / b."""
    return -(-a // b)


@dataclass(frozen=True, slots=True)
class Nest:
    """Loops, each a rank and a size, outermost first; the extents of all ranks; sizes of shape symbols.

    `after` says for each loop of a mapping how many of these there are up to it: one of one iteration is left out.
    """

    loops: tuple[tuple[str, int], ...]
    extents: Mapping[str, int]
    sizes: Mapping[str, int]
    after: tuple[int, ...] = ()
    _inside: dict[int, dict[str, int]] = field(default_factory=dict, compare=False, repr=False)

    @property
    def structure(self) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """The loops without their sizes: two nests with the same have the same depths."""
        return tuple([rank for rank, _ in self.loops]), self.after

    def cut(self, ranks: Collection[str], depth: int | None = None) -> int:
        """How many loops, of the first `depth`, stand around what these ranks move."""
        at = len(self.loops) if depth is None else depth
        while at and self.loops[at - 1][0] not in ranks:
            at -= 1
        return at

    def prefix(self, ranks: Collection[str]) -> int:
        """How many of the outermost loops all move what has these ranks."""
        at = 0
        for rank, _ in self.loops:
            if rank not in ranks:
                break
            at += 1
        return at

    def lengths(self, depth: int) -> dict[str, int]:
        """How many coordinates of each partitioned rank an iteration of the first `depth` loops takes, at most."""
        return dict(self.loops[:depth])  # an inner loop over the same rank takes fewer, and comes later

    def inside(self, depth: int) -> dict[str, int]:
        """How many coordinates of every rank an iteration of the first `depth` loops takes, at most."""
        found = self._inside.get(depth)
        if found is None:
            found = self._inside[depth] = {**self.extents, **dict(self.loops[:depth])}
        return found

    def trips(self, depth: int, without: Collection[str] = ()) -> int:
        """The iterations of the first `depth` loops, those over some ranks left out."""
        total = 1
        for rank, size in self.lengths(depth).items():
            if rank not in without:
                total *= ceil_div(self.extents[rank], size)
        return total

    def moved(self, access: Access, depth: int) -> int:
        """The elements that are fetched where a load stands inside of the first `depth` loops."""
        ranks = access.ranks
        again = self.trips(depth, ranks) if depth else 1
        if access.plain:  # tiles of a rank add up to it, where the tensor is as long as the rank
            total = again
            for rank, extent in access.sides:
                reach = self.extents[rank]
                if reach > (extent if isinstance(extent, int) else self.sizes[extent]):
                    break
                total *= reach
            else:
                return total
        total = 0
        for weight, lengths in self.tiles(ranks, depth):
            total += weight * math.prod(self._span(place, lengths) for place in access.places)
        return again * total

    def footprint(self, access: Access, depth: int, carried: str | None = None) -> int:
        """The elements of the largest tile inside of the first `depth` loops, of one generation of a carried tensor."""
        lengths = self.inside(depth)
        if not access.plain:
            if carried is not None:
                lengths = {**lengths, carried: 1}
            return math.prod([self._span(place, lengths) for place in access.places])
        total = 1
        for rank, extent in access.sides:
            reach = 1 if rank == carried else lengths[rank]
            total *= min(reach, extent if isinstance(extent, int) else self.sizes[extent])
        return total

    def tiles(self, ranks: Collection[str], depth: int) -> Iterator[tuple[int, dict[str, int]]]:
        """The tiles of some ranks by their lengths, with how many there are of each kind: a last one may be short."""
        kinds = []
        sizes = self.inside(depth)
        for rank in ranks:
            full, rest = divmod(self.extents[rank], sizes[rank] or 1)
            kinds.append([(rank, full, sizes[rank]), *([(rank, 1, rest)] if rest else [])])
        for chosen in itertools.product(*kinds):
            yield math.prod(count for _, count, _ in chosen), {rank: length for rank, _, length in chosen}

    def _extent(self, place: Place) -> int:
        return place.extent if isinstance(place.extent, int) else self.sizes[place.extent]

    def _span(self, place: Place, lengths: Mapping[str, int]) -> int:
        """How many coordinates of one place a tile of these lengths touches."""
        if not place.ranks:
            return 1
        extent = self._extent(place)
        if place.steps == (1,):
            return min(extent, lengths[place.ranks[0]])
        if any(not lengths[rank] for rank in place.ranks):
            return 0
        if place.steps is None:
            return min(extent, math.prod(lengths[rank] for rank in place.ranks))
        reach = sum(step * (lengths[rank] - 1) for rank, step in zip(place.ranks, place.steps, strict=True))
        return min(extent, reach + 1)
