"""What a region moves: loads and stores of memory, accesses of the buffer, what must be on chip at the same time.

A region is planned once: which tensors come from outside, which are made, which leave, where each is held. For given
extents, `movement` fits the loops that are to be as large as the buffer allows, spills what may be spilled, and counts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from cascade.backends.systolic.machine import Unit
from cascade.backends.systolic.mapping import ALL, DRAM, REGISTERS, TILE, Published
from cascade.backends.systolic.mapping import Mapping as Map
from cascade.backends.systolic.nest import Nest, ceil_div
from cascade.backends.systolic.work import Access, Cascaded, Work
from cascade.errors import CommandError, Diagnostic, UnsupportedError
from cascade.ir import Loop, Region
from cascade.text import render_loop
from cascade.wording import suggest

Direction: TypeAlias = Literal["read", "written"]


@dataclass(frozen=True, slots=True)
class Reader:
    """One Einsum that reads a tensor, in a stage."""

    stage: int
    work: Work
    access: Access


@dataclass(frozen=True, slots=True)
class Written:
    """How a tensor is made: by which Einsum in which stage, the last stage that reads it, how it is written.

    `still` are its ranks without those along which its own stage reads it at other coordinates, as an earlier iteration
    left it. `adds` is whether the Einsum folds ranks away.
    """

    work: Work
    first: int
    last: int
    access: Access
    still: frozenset[str]
    reduced: frozenset[str]


@dataclass(slots=True)
class Movement:
    """Bytes that a region moves. `moved` has those of memory by tensor and direction, `spilled` the share that is
    kept off chip of what is spilled, `held` the bytes on chip of each stage at its fullest."""

    nests: tuple[Nest, ...]
    held: int
    spilled: float
    depths: Mapping[str, int | None]  # of made tensors: how many loops stand around where each is held
    moved: dict[tuple[str, Direction], int] = field(default_factory=dict)
    by_memory: dict[str, int] = field(default_factory=dict)
    buffer_reads: int = 0
    buffer_writes: int = 0

    @property
    def bytes(self) -> int:
        """All that crosses between chip and memory."""
        return sum(self.by_memory.values())


Structure: TypeAlias = tuple[tuple[tuple[str, ...], tuple[int, ...]], ...]
"""The loops of every stage without their sizes: what depths depend on."""
Spot: TypeAlias = tuple[int, Access, int, str | None]
"""Where a tile is: the stage, the access, how many loops are around it, the rank of which it has one coordinate."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """What is on chip: of each loaded tensor the bytes of an element and where its readers hold it, of each made one
    the first and the last stage that need it, the bytes of an element, and where it is held."""

    rooms: tuple[tuple[int, tuple[Spot, ...]], ...]
    lives: tuple[tuple[int, int, int, Spot], ...]


@dataclass(frozen=True, slots=True, eq=False)
class RegionPlan:
    """A region of a mapping, planned: see `plan_region`."""

    cascaded: Cascaded
    region: Region
    widths: Mapping[str, int]
    units: Mapping[str, Unit]
    capacity: int
    stage_of: Mapping[str, int]
    readers: Mapping[str, tuple[Reader, ...]]
    outside: tuple[str, ...]  # tensors that are loaded
    made: tuple[str, ...]  # tensors that are made and read here, on chip
    leaves: tuple[str, ...]  # tensors that are stored
    keep: Mapping[str, str]
    written: Mapping[str, Written]
    stage_loops: tuple[tuple[Loop, ...], ...]  # of each stage, the shared ones first
    fed: Mapping[str, tuple[Reader, ...]]  # of each tensor, the readers whose units have not just made it themselves
    tiles: dict[Structure, Tiles] = field(default_factory=dict)  # of the structures that were asked for
    checked: set[Structure] = field(default_factory=set)

    def movement(self, extents: Mapping[str, int], sizes: Mapping[str, int], quirks: Published) -> Movement:
        """What the region moves for these extents; raises C540 where it does not fit, C622 where it cannot run so."""
        nests = self._fitted(extents, sizes)
        structure = tuple([nest.structure for nest in nests])
        if structure not in self.checked:
            for stage, nest in enumerate(nests):
                self._check(stage, nest)
            self.checked.add(structure)
        held = self.need(nests)
        depths = {tensor: self.made_depth(tensor, nests) for tensor in self.made}
        found = Movement(nests, held, self._spilled(nests, held), depths)
        for tensor in self.outside:
            self._load(tensor, found, quirks)
        for tensor in self.leaves:
            self._store(tensor, found)
        for tensor in self.made:
            self._keep(tensor, found, quirks)
        for tensor in (*self.outside, *self.made):
            self._feed(tensor, found, quirks)
        for name in self.region.statements:
            self._accumulate(self.cascaded.works[name], found)
        return found

    # --- loops --------------------------------------------------------------------------------------------------------

    def nests(self, extents: Mapping[str, int], sizes: Mapping[str, int], fit: Mapping[str, int]) -> tuple[Nest, ...]:
        """The nest of every stage, loops to be fitted with the sizes of `fit`, by label; loops of one iteration out."""
        found = []
        for stage in range(len(self.region.stages)):
            loops: list[tuple[str, int]] = []
            after: list[int] = []
            outer = dict(extents)
            for loop in self.stage_loops[stage]:
                size = fit[loop.label] if loop.size is None else loop.size
                if size < outer[loop.rank]:
                    if outer[loop.rank] % size and outer[loop.rank] != extents[loop.rank]:
                        message = f"{render_loop(loop)} does not divide the {outer[loop.rank]} of the loop around it"
                        raise _misfit(message, "an inner tile is a divisor of the outer one")
                    outer[loop.rank] = size
                    loops.append((loop.rank, size))
                after.append(len(loops))
            found.append(Nest(tuple(loops), extents, sizes, tuple(after)))
        return tuple(found)

    def _fitted(self, extents: Mapping[str, int], sizes: Mapping[str, int]) -> tuple[Nest, ...]:
        """The nests with every fitted loop, outermost first, as large as leaves room for the rest."""
        fitted = {
            loop.label: loop
            for stage in range(len(self.region.stages))
            for loop in self.stage_loops[stage]
            if loop.size is None
        }
        fit = {label: self._least(loop) for label, loop in fitted.items()}
        for label, loop in fitted.items():
            least = fit[label]
            tiles = ceil_div(extents[loop.rank], least)
            low, high = 0, len(steps := divisors(tiles)) - 1
            while low < high:  # what is held does not shrink as a tile grows
                middle = (low + high + 1) // 2
                trial = self.nests(extents, sizes, {**fit, label: least * steps[middle]})
                low, high = (middle, high) if self.need(trial) <= self.capacity else (low, middle - 1)
            fit[label] = least * steps[low] if steps else least
        return self.nests(extents, sizes, fit)

    def _least(self, loop: Loop) -> int:
        """The least size of a loop to be fitted: that of the loops over its rank inside of it."""
        inner = []
        for stage in range(len(self.region.stages)):
            loops = self.stage_loops[stage]
            if loop in loops:
                after = loops[loops.index(loop) + 1 :]
                inner += [found.size for found in after if found.rank == loop.rank and found.size is not None]
        return max(inner, default=1)

    def _depth(self, level: str, stage: int, nest: Nest) -> int | None:
        """How many loops of a nest stand around the level of that name; None where the stage has no such loop."""
        if level == ALL:
            return 0
        if level in (TILE, REGISTERS, DRAM):
            return len(nest.loops)
        loops = self.stage_loops[stage]
        at = next((number for number, loop in enumerate(loops) if loop.label == level), None)
        return None if at is None else nest.after[at]

    def _shared(self, nest: Nest) -> int:
        """How many loops of a nest all stages share."""
        return nest.after[len(self.region.loops) - 1] if self.region.loops else 0

    def _check(self, stage: int, nest: Nest) -> None:
        """Every Einsum moves with all loops around it, and none runs before a pass that it needs is over."""
        for name in self.region.stages[stage].statements:
            work = self.cascaded.works[name]
            depth = nest.cut(work.ranks)
            other = next((rank for rank, _ in nest.loops[:depth] if rank not in work.ranks), None)
            if other is not None:
                message = f"{name} lacks {other}, a loop around one that moves it"
                raise _misfit(message, "put it into another stage, or the loop further in")
        for at, (rank, _) in enumerate(nest.loops):
            numbers = self.cascaded.passes[rank]
            inside = self.region.statements if at < self._shared(nest) else self.region.stages[stage].statements
            passes = {numbers[name]: name for name in inside if name in numbers}
            if len(passes) > 1:
                (_, first), (_, then), *_ = sorted(passes.items())
                message = f"{then} needs all of {rank} from {first}, and a loop over {rank} holds both"
                raise _misfit(message, "put them into stages with a loop each, or take the loop out")

    # --- what is on chip ----------------------------------------------------------------------------------------------

    def need(self, nests: tuple[Nest, ...]) -> int:
        """The bytes on chip at the fullest: what is loaded has its own room, what is made shares it in time."""
        structure = tuple([nest.structure for nest in nests])
        tiles = self.tiles.get(structure)
        if tiles is None:
            tiles = self.tiles[structure] = self._tiles(nests)
        room = 0
        for width, spots in tiles.rooms:
            room += width * max([nests[spot[0]].footprint(*spot[1:]) for spot in spots])
        lives = []
        for first, last, width, spot in tiles.lives:
            if size := width * nests[spot[0]].footprint(*spot[1:]):
                lives.append((first, last, size))
        return room + max([_at_once(stage, lives) for stage in range(len(nests))])

    def _tiles(self, nests: tuple[Nest, ...]) -> Tiles:
        """What is on chip under loops like these, whatever their sizes."""
        times = 2 if self.region.double else 1
        rooms = [(times * self.widths[tensor], self._spots(tensor, nests)) for tensor in self.outside]
        for tensor in self.leaves:
            if tensor not in self.made and self._adds(tensor, nests):
                made = self.written[tensor]
                spot = (made.first, made.access, self.stored_depth(tensor, nests), made.work.iterative)
                rooms.append((times * self.widths[tensor], (spot,)))
        lives = []
        for tensor in self.made:
            depth = self.made_depth(tensor, nests)
            if depth is not None:
                made = self.written[tensor]
                spot = (made.first, made.access, depth, made.work.iterative)
                lives.append((made.first, made.last, self.widths[tensor], spot))
        return Tiles(tuple(rooms), tuple(lives))

    def _spots(self, tensor: str, nests: tuple[Nest, ...]) -> tuple[Spot, ...]:
        """Where the readers of a loaded tensor hold its tiles."""
        readers = self.readers[tensor]
        return tuple((each.stage, each.access, self.held_in(tensor, each, nests), None) for each in readers)

    def _room(self, tensor: str, nests: tuple[Nest, ...]) -> int:
        """The bytes of the tile of a loaded tensor, where it is largest."""
        spots = self._spots(tensor, nests)
        return max(nests[spot[0]].footprint(*spot[1:]) for spot in spots) * self.widths[tensor]

    def made_depth(self, tensor: str, nests: tuple[Nest, ...]) -> int | None:
        """How many loops stand around where a made tensor is held; None where that is in registers."""
        made = self.written[tensor]
        nest = nests[made.first]
        level = self.keep.get(tensor)
        if level in (REGISTERS, TILE):
            return None
        if level is not None:
            found = self._depth(level, made.first, nest)
            if found is not None:
                return found
        depth = nest.prefix(made.still)
        if made.first < made.last:
            return min(depth, self._shared(nest))
        return None if depth >= nest.cut(made.work.ranks) else depth

    def _made_footprint(self, tensor: str, nests: tuple[Nest, ...]) -> int:
        """The bytes of a made tensor in the buffer."""
        depth = self.made_depth(tensor, nests)
        if depth is None:
            return 0
        made = self.written[tensor]
        return nests[made.first].footprint(made.access, depth, made.work.iterative) * self.widths[tensor]

    def _spilled(self, nests: tuple[Nest, ...], held: int) -> float:
        """The share of the tensors to be spilled that has no room; raises C540 where the rest has none either."""
        lacking = held - self.capacity
        if lacking <= 0:
            return 0.0
        spillable = [self._made_footprint(name, nests) for name in self.region.spill if name in self.made]
        room = max(spillable, default=0)
        if lacking > room:
            message = (
                f"region {self.region.name!r} needs {held} bytes on chip: the buffer lacks {lacking - room} of them"
            )
            largest = max((*self.outside, *self.made), key=lambda name: self._bytes_of(name, nests))
            hint = f"the largest is {largest}, {self._bytes_of(largest, nests)} bytes; smaller tiles, or another level"
            raise UnsupportedError(Diagnostic("C540", f"no mapping fits: {message}", help=hint))
        return lacking / room

    def _bytes_of(self, tensor: str, nests: tuple[Nest, ...]) -> int:
        return self._room(tensor, nests) if tensor in self.outside else self._made_footprint(tensor, nests)

    # --- memory -------------------------------------------------------------------------------------------------------

    def held_in(self, tensor: str, reader: Reader, nests: tuple[Nest, ...]) -> int:
        """How many loops of a reader's stage stand around where a loaded tensor is held."""
        nest = nests[reader.stage]
        level = self.keep.get(tensor)
        if level == TILE:
            return self._executed(reader.work, nest)
        depth = None if level is None else self._depth(level, reader.stage, nest)
        return nest.cut(reader.access.ranks, len(nest.loops) if depth is None else depth)

    def _load(self, tensor: str, found: Movement, quirks: Published) -> None:
        """Loads of a tensor from outside: once where all stages share what is held, else in every stage."""
        stages: dict[int, int] = {}
        for reader in self.readers[tensor]:
            nest = found.nests[reader.stage]
            count = nest.moved(reader.access, self.held_in(tensor, reader, found.nests))
            stages[reader.stage] = max(count, stages.get(reader.stage, 0))
        level = self.keep.get(tensor)
        shared = level == ALL or level in {loop.label for loop in self.region.loops}
        elements = max(stages.values()) if shared else sum(stages.values())
        count = elements * self.widths[tensor]
        self._move(tensor, "read", count, self.readers[tensor][0].work, found)
        if tensor not in quirks.unbuffered:
            found.buffer_writes += count

    def _adds(self, tensor: str, nests: tuple[Nest, ...]) -> bool:
        """Whether iterations of a loop add to the tensor."""
        made = self.written[tensor]
        return any(rank in made.reduced for rank, _ in nests[made.first].loops)

    def stored_depth(self, tensor: str, nests: tuple[Nest, ...]) -> int:
        """How many loops stand around where a tensor that leaves is summed up."""
        made = self.written[tensor]
        nest = nests[made.first]
        level = self.keep.get(tensor)
        depth = None if level in (None, DRAM) else self._depth(level, made.first, nest)
        return nest.prefix(made.access.ranks) if depth is None else depth

    def _store(self, tensor: str, found: Movement) -> None:
        """Stores of a tensor that leaves; where it is held for less than its sum, partial results come back."""
        made = self.written[tensor]
        nest = found.nests[made.first]
        whole = nest.moved(made.access, 0) * self.widths[tensor]
        depth = nest.cut(made.access.ranks, self.stored_depth(tensor, found.nests))
        count = nest.moved(made.access, depth) * self.widths[tensor]
        self._move(tensor, "written", count, made.work, found)
        if count > whole:
            self._move(tensor, "read", count - whole, made.work, found)
            found.buffer_writes += count - whole

    def _move(self, tensor: str, way: Direction, count: int, work: Work, found: Movement) -> None:
        memory = self.units[work.name].memory
        found.moved[tensor, way] = found.moved.get((tensor, way), 0) + count
        found.by_memory[memory] = found.by_memory.get(memory, 0) + count

    # --- the buffer ---------------------------------------------------------------------------------------------------

    def _executed(self, work: Work, nest: Nest) -> int:
        """How many loops stand around an Einsum."""
        return nest.cut(work.ranks)

    def _keep(self, tensor: str, found: Movement, quirks: Published) -> None:
        """Writes of a made tensor into the buffer; a spilled share goes to memory, and back for every later stage."""
        made = self.written[tensor]
        nest = found.nests[made.first]
        if found.depths[tensor] is None:
            return
        if tensor not in quirks.unbuffered and not self._adds(tensor, found.nests):
            found.buffer_writes += nest.moved(made.access, self._executed(made.work, nest)) * self.widths[tensor]
        if tensor in self.region.spill and found.spilled:
            whole = nest.moved(made.access, 0) * self.widths[tensor]
            again = len({reader.stage for reader in self.readers[tensor]} - {made.first})
            self._move(tensor, "written", round(found.spilled * whole), made.work, found)
            self._move(tensor, "read", round(found.spilled * whole * again), made.work, found)

    def _feed(self, tensor: str, found: Movement, quirks: Published) -> None:
        """Reads of the buffer by units: a tile for every iteration, nothing of what a unit has just made itself."""
        if tensor in quirks.unbuffered or found.depths.get(tensor, 0) is None:
            return
        counts = [
            found.nests[reader.stage].moved(reader.access, self._executed(reader.work, found.nests[reader.stage]))
            for reader in self.fed[tensor]
        ]
        elements = max(counts, default=0) if tensor in quirks.read_once else sum(counts)
        if tensor in quirks.read_again:
            elements += max(counts, default=0)
        found.buffer_reads += elements * self.widths[tensor]

    def _accumulate(self, work: Work, found: Movement) -> None:
        """Where iterations add to a result, the buffer has it: read but for the first time, and written, every time."""
        nest = found.nests[self.stage_of[work.name]]
        for access in work.writes:
            if self._adds(access.tensor, found.nests):
                count = nest.moved(access, self._executed(work, nest))
                found.buffer_writes += count * self.widths[access.tensor]
                found.buffer_reads += (count - nest.moved(access, 0)) * self.widths[access.tensor]


def plan_region(
    cascaded: Cascaded,
    mapping: Map,
    number: int,
    widths: Mapping[str, int],
    units: Mapping[str, Unit],
    buffer: int,
) -> RegionPlan:
    """The region of that number: what comes from outside, what is made, what leaves."""
    region = mapping.regions[number]
    stage_of = {name: at for at, stage in enumerate(region.stages) for name in stage.statements}
    keep = dict(region.keep)
    readers: dict[str, list[Reader]] = {}
    for name, stage in stage_of.items():
        for access in cascaded.works[name].reads:
            readers.setdefault(access.tensor, []).append(Reader(stage, cascaded.works[name], access))
    later = {
        access.tensor
        for other in mapping.regions[number + 1 :]
        for name in other.statements
        for access in cascaded.works[name].reads
    }
    later.update(result.name for result in cascaded.cascade.results)
    here = [name for name, maker in cascaded.maker.items() if maker in stage_of]
    _check_region(cascaded, region, readers, here)
    outside = tuple(name for name in readers if name not in here or keep.get(name) == DRAM)
    made = tuple(name for name in here if name in readers and name not in outside)
    leaves = tuple(name for name in here if name in later or name in outside)
    capacity = min(buffer, region.capacity or buffer)
    written = {name: _written(cascaded, name, stage_of, readers.get(name, [])) for name in here}
    loops = tuple((*region.loops, *stage.loops) for stage in region.stages)
    every = {name: tuple(found) for name, found in readers.items()}

    def at_hand(tensor: str, reader: Reader) -> bool:
        """Whether the reader's unit has made these elements in the same iteration."""
        maker = cascaded.maker.get(tensor)
        if maker is None or stage_of.get(maker) != reader.stage or units[maker] is not units[reader.work.name]:
            return False
        return not any(place.shifted for place in reader.access.places)

    fed = {name: tuple(reader for reader in found if not at_hand(name, reader)) for name, found in every.items()}
    return RegionPlan(
        cascaded, region, widths, units, capacity, stage_of, every, outside, made, leaves, keep, written, loops, fed
    )


def _written(cascaded: Cascaded, tensor: str, stage_of: Mapping[str, int], readers: list[Reader]) -> Written:
    """How a tensor of a region is made."""
    work = cascaded.works[cascaded.maker[tensor]]
    access = next(access for access in work.writes if access.tensor == tensor)
    first = stage_of[work.name]
    earlier = {
        rank
        for reader in readers
        if reader.stage == first
        for at, place in zip(access.places, reader.access.places, strict=True)
        if place.shifted or place.ranks != at.ranks
        for rank in at.ranks
    }
    last = max([first, *(reader.stage for reader in readers)])
    return Written(work, first, last, access, frozenset(access.ranks) - earlier, frozenset(work.reduced))


def _check_region(
    cascaded: Cascaded, region: Region, readers: Mapping[str, list[Reader]], here: Collection[str]
) -> None:
    """Loops are over ranks, tensors of `keep` and `spill` are there, and stages run behind what they read."""
    ranks = cascaded.shapes.ranks
    for loop in (*region.loops, *(loop for stage in region.stages for loop in stage.loops)):
        if loop.rank not in ranks:
            message = f"a loop of region {region.name!r} is over {loop.rank}, which is no rank of the cascade"
            raise _misfit(message, suggest(loop.rank, ranks, "its ranks are"))
    for name in (*dict(region.keep), *region.spill):
        if name not in readers and name not in here:
            hint = suggest(name, (*readers, *here), "its tensors are")
            raise _misfit(f"region {region.name!r} has no tensor {name}", hint)
    stage_of = {name: at for at, stage in enumerate(region.stages) for name in stage.statements}
    for name, found in readers.items():
        made = stage_of.get(cascaded.maker.get(name, ""))
        for reader in found:
            if made is not None and reader.stage < made:
                raise _misfit(
                    f"{reader.work.name} reads {name}, which a later stage makes", "change the order of stages"
                )


def _at_once(stage: int, lives: list[tuple[int, int, int]]) -> int:
    """The bytes of made tensors in a stage: one that dies gives its room to one of its size that is born."""
    total = 0
    dying: list[int] = []
    born: list[int] = []
    for first, last, size in lives:
        if first <= stage <= last:
            total += size
            if first < stage == last:
                dying.append(size)
            elif first == stage < last:
                born.append(size)
    for size in born:
        if size in dying:
            dying.remove(size)
            total -= size
    return total


MOST_DIVISOR = 1 << 20


def divisors(number: int) -> list[int]:
    """The divisors of a number, in order; of one above 2^40 those up to 2^20 and what they divide it into."""
    low = [at for at in range(1, min(math.isqrt(number), MOST_DIVISOR) + 1) if number % at == 0]
    return sorted({*low, *(number // at for at in low)})


def _misfit(message: str, hint: str) -> CommandError:
    return CommandError(Diagnostic("C622", f"the mapping does not fit: {message}", help=hint))
