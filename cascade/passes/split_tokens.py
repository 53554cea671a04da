"""Splits a rank of a distributed program into slices that depend on each other only where their index sets meet.

    compute H along f over tp            compute H along f over tp at t=0:512      compute H ... at t=512:1024
    compute Y along f over tp    -->     compute Y along f over tp at t=0:512      compute Y ... at t=512:1024
    all-reduce Y over tp by sum          all-reduce Y over tp by sum at 0=0:512    all-reduce Y ... at 0=512:1024

R1. The rank is that of a statement; the dimension it stands for is followed through what is read plainly, from readers
to what they read and back, and every statement is split along one of its ranks.
Where a statement reduces the rank, its slices are partial results that merge where they are made, and what follows is
whole. A tensor that is sharded along the split dimension is sharded within each slice.

`dependencies` says which steps a step needs: those that write a box that it reads, on the same device (`reach.py`). A
filter counts: a slice of queries behind a triangle needs the keys up to its last row, so slices keep the order in which
keys and values are written, and need no other. A split after which a device would lack something is refused (C553).

`best_cut` searches cuts, and declines a split that does not pay, with the reason and the number.

Sources: TokenWeave (arXiv 2505.11329) splits tokens in two; NanoFlow (2408.12757) splits into nano-batches; that cuts
should fall on waves of tiles is TokenWeave's smart splitting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade.errors import Diagnostic, UnsupportedError
from cascade.ir import Einsum, Fold, Rank, Read
from cascade.passes.reach import Box, Reach, left_over, meet
from cascade.passes.shard import FOLD
from cascade.placed import (
    REDUCING, Collective, Compute, Kind, Place, Program, Step, Window, coordinates, number_along, onward, slices,
    stretch, windows_of,
)  # fmt: skip
from cascade.recent import recently
from cascade.walk import expressions, targets, walk
from cascade.wording import quote


def split(program: Program, rank: str, cuts: Sequence[int]) -> Program:
    """The program with every step that has the rank in slices at these cuts; all slices of a step stand together.

    Raises C553 where no statement keeps the rank, a cut lies outside, or a device would lack what it reads.
    """
    found = sliced(program, rank, cuts)
    if lacking := next(lacks(found), None):
        _refuse(f"device {lacking[1]} would lack {quote(lacking[2])} for {quote(_name(found.steps[lacking[0]]))}")
    return found


def sliced(program: Program, rank: str, cuts: Sequence[int]) -> Program:
    """What `split` gives, without the proof that no device lacks anything: for a search, which proves what it takes."""
    reach = Reach.of(program.cascade, dict(program.sizes))
    _, extent = reach.full.get(rank, (0, 0))
    if list(cuts) != sorted({cut for cut in cuts if 0 < cut < extent}):
        _refuse(f"cuts of {quote(rank)} rise from 1 to {extent - 1}")
    along, dims = split_ranks(reach, rank)
    if not along:
        _refuse(f"no statement keeps {quote(rank)}")
    windows = slices(extent, cuts)
    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step, Compute):
            own = along.get(step.name)
            steps += [step] if own is None else [_at_rank(step, own, window) for window in windows]
        else:
            dim = dims.get(step.tensor)
            steps += [step] if dim is None else [_at_dim(step, dim, window) for window in windows]
    places = tuple(
        dataclasses.replace(place, cuts=tuple(cuts)) if dims.get(place.tensor) == place.dim else place
        for place in program.places
    )
    return dataclasses.replace(program, steps=tuple(steps), places=places)


def split_ranks(reach: Reach, rank: str) -> tuple[dict[str, str], dict[str, int]]:
    """Along which rank each unit is split, by its first name, and along which dimension each tensor."""
    known = _splits(reach)
    if rank not in known:
        known[rank] = _split_ranks(reach, rank)
    return known[rank]


@recently
def _splits(reach: Reach) -> dict[str, tuple[dict[str, str], dict[str, int]]]:
    """Where the answers of `split_ranks` are kept."""
    return {}


def _split_ranks(reach: Reach, rank: str) -> tuple[dict[str, str], dict[str, int]]:
    kept = {name: _kept(reach, name) for name in reach.units}
    along = {name: rank for name, ranks in kept.items() if rank in ranks}
    dims: dict[str, int] = {}
    forward = False
    while True:
        before = len(along), len(dims)
        for name, own in along.items():
            for stmt in reach.units[name].statements:
                dims |= {target.name: target.ranks.index(own) for target in targets(stmt) if own in target.ranks}
        for name in reversed(tuple(reach.units)):  # from readers to what they read
            for tensor, index in _reads(reach, name):
                if tensor not in dims and name in along and along[name] in index:
                    dims[tensor] = index.index(along[name])
            for stmt in reach.units[name].statements:
                for target in targets(stmt):
                    if name not in along and target.name in dims and target.ranks[dims[target.name]] in kept[name]:
                        along[name] = target.ranks[dims[target.name]]
        if forward:
            for name in reach.units:
                for tensor, index in _reads(reach, name):
                    if name not in along and tensor in dims and index[dims[tensor]] in kept[name]:
                        along[name] = str(index[dims[tensor]])
        if before == (len(along), len(dims)):
            if forward:
                return along, dims
            forward = True


def _kept(reach: Reach, name: str) -> tuple[str, ...]:
    """The ranks that all that a unit defines keeps: of a fold, those of its states."""
    found = [target.ranks for stmt in reach.units[name].statements for target in targets(stmt)]
    return tuple(rank for rank in found[0] if all(rank in ranks for ranks in found))


def _reads(reach: Reach, name: str) -> Iterator[tuple[str, tuple[str | None, ...]]]:
    """What a unit reads, with the rank that stands plainly at each dimension."""
    for stmt in reach.units[name].statements:
        for node in (node for expr in expressions(stmt) for node in walk(expr)):
            if isinstance(node, Read):
                yield node.tensor, tuple(index.name if isinstance(index, Rank) else None for index in node.index)


def _at_rank(step: Compute, rank: str, window: Window) -> Compute:
    return dataclasses.replace(step, at=(*step.at, (rank, *window)))


def _at_dim(step: Collective, dim: int, window: Window) -> Collective:
    return dataclasses.replace(step, at=(*step.at, (dim, *window)))


def _name(step: Step) -> str:
    return step.name if isinstance(step, Compute) else step.tensor


def _refuse(reason: str) -> None:
    raise UnsupportedError(Diagnostic("C553", f"the split is refused: {reason}"))


# --- what steps touch ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Touched:
    """A box of a tensor on one device; `partial` where it is of partial results, which collectives alone read."""

    device: int
    tensor: str
    partial: bool
    box: Box


@dataclass(frozen=True, eq=False)
class Touches:
    """What the steps of a program read and write on every device."""

    program: Program
    reach: Reach
    places: Sequence[Mapping[str, int]]
    known: dict[tuple[Step, bool], list[Touched]] = field(default_factory=dict)

    @staticmethod
    def of(program: Program) -> Touches:
        """The touches of a program: the same for the very same one, which keeps its answers."""
        return _touches(program)

    def given(self) -> list[Touched]:
        """What devices hold of the parameters."""
        found = []
        for param in self.program.cascade.params:
            shape = self.reach.shape(param.name)
            for device, place in enumerate(self.places):
                boxes: list[Box] = [tuple((0, extent) for extent in shape)]
                for at in (at for at in self.program.places if at.tensor == param.name):
                    boxes = [box for one in boxes for box in self._placed(one, at, place, shape[at.dim])]
                found += [Touched(device, param.name, False, box) for box in boxes]
        return found

    def _placed(self, box: Box, at: Place, place: Mapping[str, int], extent: int) -> Iterator[Box]:
        number, count = number_along(place, at.axes, self.program.axes), self.program.devices(at.axes)
        for window in slices(extent, at.cuts):
            yield (*box[: at.dim], stretch(window, number, count), *box[at.dim + 1 :])

    def reads(self, step: Step) -> list[Touched]:
        """What a step reads."""
        if (step, False) not in self.known:
            self.known[step, False] = self._reads(step)
        return self.known[step, False]

    def writes(self, step: Step) -> list[Touched]:
        """What a step writes."""
        if (step, True) not in self.known:
            self.known[step, True] = self._writes(step)
        return self.known[step, True]

    def _reads(self, step: Step) -> list[Touched]:
        if isinstance(step, Compute):
            return [
                Touched(device, tensor, False, box)
                for device, place in enumerate(self.places)
                for tensor, box in self.reach.reads(step.name, self._windows(step, place))
            ]
        found = []
        for to, of, tensor, box in self._exchanged(step):
            if step.kind in REDUCING:
                found += [Touched(device, tensor, True, box) for device in (to, of)]
            else:
                found.append(Touched(of, tensor, step.passes, box))
        return list(dict.fromkeys(found))

    def _writes(self, step: Step) -> list[Touched]:
        if not isinstance(step, Compute):
            partial = step.passes and not step.arrived
            return list(
                dict.fromkeys(Touched(to, tensor, partial, box) for to, _, tensor, box in self._exchanged(step))
            )
        partial = self.is_partial(step)
        return [
            Touched(device, tensor, partial, box)
            for device, place in enumerate(self.places)
            for tensor, box in self.reach.writes(step.name, self._windows(step, place))
        ]

    def is_partial(self, step: Compute) -> bool:
        """Whether a collective must merge what a step gives: its slices and hops together do not cover a rank."""
        ranks = _kept(self.reach, step.name)
        spread = [one for one in step.along if one.rank not in ranks]
        hops = {
            one.hop % self.program.devices(one.axes)
            for other in self.program.steps
            if isinstance(other, Compute) and other.name == step.name
            for one in other.along
            if one.rank in {own.rank for own in spread}
        }
        return any(len(hops) < self.program.devices(one.axes) for one in spread)

    def _windows(self, step: Compute, place: Mapping[str, int]) -> dict[str, Window]:
        return windows_of(step, place, self.program.axes, self.reach.full)

    def _exchanged(self, step: Collective) -> Iterator[tuple[int, int, str, Box]]:
        """Which device gets which box of which tensor from which other: of a fold, the states go together."""
        axes, count = step.axes, self.program.devices(step.axes)
        for to, place in enumerate(self.places):
            for of, other in enumerate(self.places):
                if any(place[name] != other[name] for name in place if name not in axes):
                    continue
                mine, theirs = (number_along(one, axes, self.program.axes) for one in (place, other))
                if step.passes:
                    passed, onto = onward(theirs, step.hop, count)
                    if onto != mine:
                        continue
                    mine = passed
                elif to == of:
                    continue
                elif step.kind is Kind.SHIFT:
                    if theirs != (mine + (1 if step.hop > 0 else -1)) % count:
                        continue
                    theirs = (mine + step.hop) % count
                for tensor, whole in self._wholes(step):
                    box = list(whole)
                    if step.source is not None:
                        box[step.source] = stretch(whole[step.source], theirs, count)
                    if step.target is not None:
                        box[step.target] = stretch(whole[step.target], mine, count)
                    yield to, of, tensor, tuple(box)

    def _wholes(self, step: Collective) -> Iterator[tuple[str, Box]]:
        """The tensors of a collective, each with the box that its slice is of."""
        unit = self.reach.units.get(step.tensor)
        ranks = () if unit is None else targets(unit.statements[0])[0].ranks
        named = {ranks[dim]: (low, high) for dim, low, high in step.at} if step.reducer == FOLD else {}
        for tensor, order in self._states(step):
            box: list[Window] = [(0, extent) for extent in self.reach.shape(tensor)]
            for dim, window in (
                [(order.index(rank), window) for rank, window in named.items()]
                if named
                else [(dim, (low, high)) for dim, low, high in step.at]
            ):
                box[dim] = window
            yield tensor, tuple(box)

    def _states(self, step: Collective) -> list[tuple[str, tuple[str, ...]]]:
        """The tensor of a collective; all that a fold leaves behind, where it merges its states."""
        if step.reducer != FOLD:
            return [(step.tensor, ())]
        unit = self.reach.units[step.tensor]
        assert isinstance(unit.group, Fold)
        left = (target for stmt in unit.statements for target in targets(stmt))
        return [(target.name, target.ranks) for target in left if unit.group.rank not in target.ranks]


@recently
def _touches(program: Program) -> Touches:
    return Touches(program, Reach.of(program.cascade, dict(program.sizes)), coordinates(program.axes))


def dependencies(program: Program) -> tuple[tuple[int, ...], ...]:
    """For every step, the earlier ones that it must wait for, in order.

    It waits for those that write a box that it reads; a slice of a recurrence for the slice before it; a part of a
    reduction for nothing, a merge of parts over some axes for one over others, and a reader of the whole for all parts.
    """
    touches = Touches.of(program)
    writes = [touches.writes(step) for step in program.steps]
    by_tensor: dict[tuple[int, str, bool], list[tuple[int, Box]]] = {}
    found: list[tuple[int, ...]] = []
    for number, step in enumerate(program.steps):
        needed = {
            earlier
            for touched in touches.reads(step)
            for earlier, box in by_tensor.get((touched.device, touched.tensor, touched.partial), ())
            if meet(box, touched.box)
        }
        needed |= _earlier_slices(program, number, touches.reach) | _earlier_merges(program, number, touches)
        found.append(tuple(sorted(needed)))
        for touched in writes[number]:
            key = touched.device, touched.tensor, touched.partial
            by_tensor.setdefault(key, []).append((number, touched.box))
    return tuple(found)


def _earlier_slices(program: Program, number: int, reach: Reach) -> set[int]:
    """The slices of a recurrence that stand before a slice of it."""
    step = program.steps[number]
    if not isinstance(step, Compute) or not reach.units[step.name].cyclic:
        return set()
    stepped = {i.rank for s in reach.units[step.name].statements if isinstance(s, Einsum) for i in s.inits}
    if stepped.isdisjoint(rank for rank, _, _ in step.at):
        return set()
    return {i for i, other in enumerate(program.steps[:number]) if _name(other) == step.name}


def _earlier_merges(program: Program, number: int, touches: Touches) -> set[int]:
    """The merges over other axes that stand before a merge of the same parts: it takes what they leave."""
    step = program.steps[number]
    if not isinstance(step, Collective) or step.kind not in REDUCING:
        return set()
    return {
        earlier
        for earlier, other in enumerate(program.steps[:number])
        if isinstance(other, Collective) and other.kind in REDUCING and other.tensor == step.tensor
        and any(
            one.device == two.device and one.tensor == two.tensor and meet(one.box, two.box)
            for one in touches.reads(other) for two in touches.reads(step)
        )
    }  # fmt: skip


def lacks(program: Program) -> Iterator[tuple[int, int, str]]:
    """Each step, device and tensor where something is read that no earlier step and no place gives."""
    touches = Touches.of(program)
    held: dict[tuple[int, str, bool], list[Box]] = {}
    for touched in touches.given():
        held.setdefault((touched.device, touched.tensor, False), []).append(touched.box)
    for number, step in enumerate(program.steps):
        for touched in touches.reads(step):
            known = held.get((touched.device, touched.tensor, touched.partial), ())
            if isinstance(step, Compute) and left_over(touched.box, known):
                yield number, touched.device, touched.tensor
        for touched in touches.writes(step):
            held.setdefault((touched.device, touched.tensor, touched.partial), []).append(touched.box)


# --- where to cut ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cut:
    """What a search came to: the cuts, or none and why; the times without and with the best split, in microseconds."""

    cuts: tuple[int, ...]
    declined: str | None
    whole_us: float
    split_us: float | None


def best_cut(
    extent: int, tile: int, time_us: Callable[[tuple[int, ...], bool], float], fixed: Collection[tuple[int, ...]] = ()
) -> Cut:
    """The cut into two of least time, among multiples of a tile; none where no split is faster than the whole.

    `fixed` are cuts that the author gives: they are taken without a search. The search goes from the middle outwards
    by steps that halve, which finds the valley of a curve with spikes of waves at a few evaluations; these may be rough
    ones, which `time_us` is told, and the cut that is found is judged by another.
    """
    whole = time_us((), False)
    if fixed:
        cuts = next(iter(fixed))
        return Cut(cuts, None, whole, time_us(cuts, False))
    if extent < 2 * tile:
        return Cut((), f"{extent} coordinates are less than two tiles of {tile}", whole, None)
    times: dict[int, float] = {}

    def at(cut: int) -> float:
        cut = min(max(tile, cut // tile * tile), (extent - 1) // tile * tile)
        if cut not in times:
            times[cut] = time_us((cut,), True)
        return times[cut]

    step = extent // 4
    at(extent // 2)
    while step >= tile:
        best = min(times, key=lambda cut: times[cut])
        at(best - step)
        at(best + step)
        step //= 2
    best = min(times, key=lambda cut: times[cut])
    split_us = time_us((best,), False)
    if split_us < whole:
        return Cut((best,), None, whole, split_us)
    loss = 100 * (split_us / whole - 1)
    reason = f"the best cut, at {best}, takes {split_us:.1f} us, {loss:.1f} % more than {whole:.1f} us without"
    return Cut((), reason, whole, split_us)
