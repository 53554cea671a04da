"""What a program of many devices means: all of its ranks in one process, on tensors in float64.

Every rank has a whole buffer of every tensor, in which everything is NaN that the rank was never given: a step that
reads what its device does not hold makes a wrong number, never a lucky one. Beside it stands a mask of what the rank
holds; a collective moves that and nothing else. Partial results lie apart, where no statement sees them, and are merged
in the order of the devices by the interpreter's own rule for parts of a reduction; those that come round a ring, when
they are passed on. A result is what all ranks together
hold of it; they must agree where more than one does, and what nobody holds stays NaN.

Steps run in the order of the program, or in any other that the caller gives: a wrong order shows in the numbers.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cascade import values as v
from cascade.errors import InternalError
from cascade.evaluate import Stored, Windows
from cascade.inference import infer_shapes
from cascade.interp import Machine, Partial, PartState
from cascade.ir import Einsum, Fold, Target, TopK
from cascade.order import Unit
from cascade.passes.points import iterated
from cascade.passes.reach import units_by_name
from cascade.passes.shard import FOLD, reducer_of
from cascade.placed import (
    REDUCING, Axes, Collective, Compute, Kind, Program, Window, coordinates, number_along, onward, slices, stretch,
    windows_of,
)  # fmt: skip
from cascade.values import FROM_TORCH, Precision
from cascade.walk import defines, targets


def simulate(program: Program, inputs: Mapping[str, Tensor], order: Sequence[int] | None = None) -> dict[str, Tensor]:
    """The results of a program on simulated ranks, in float64; `order` permutes its steps.

    Raises InternalError where two ranks hold different values of one element of a result.
    """
    ranks = Ranks(program, inputs)
    for number in range(len(program.steps)) if order is None else order:
        ranks.run(number)
    return {result.name: ranks.result(result.name) for result in program.cascade.results}


@dataclass(slots=True, eq=False)
class Part:
    """A partial result of one rank: the box that it is of, which windows of the reduced ranks are in it, its value."""

    box: tuple[Window, ...]
    covered: tuple[tuple[Window, ...], ...]
    value: Partial | PartState

    @property
    def points(self) -> int:
        """How many coordinates of the reduced ranks are in it."""
        return sum(math.prod(high - low for low, high in box) for box in self.covered)


@dataclass(frozen=True, slots=True, eq=False)
class Reduction:
    """A statement that reduces, or a fold: how the interpreter makes parts of it, joins them and shows the result."""

    unit: Unit
    ranks: tuple[str, ...]  # of the left side that a partial result belongs to
    reduced: tuple[str, ...]

    def part(self, machine: Machine, windows: Windows) -> Partial | PartState:
        """What these windows alone give; no buffer shows it."""
        if isinstance(self.unit.group, Fold):
            fold, statements = self.unit.group, self.unit.statements
            return _hidden(machine, fold.state, lambda: machine.fold(fold, statements, windows))
        return machine.partial(self._statement, windows)

    def joined(self, machine: Machine, windows: Windows, parts: Sequence[Part]) -> Partial | PartState:
        """Parts merged, earlier coordinates first; no buffer shows it."""
        values = [part.value for part in sorted(parts, key=lambda part: part.covered)]
        if isinstance(self.unit.group, Fold):
            fold, states = self.unit.group, [value for value in values if isinstance(value, dict)]
            return _hidden(machine, fold.state, lambda: machine.merged(fold, self.unit.statements, windows, states))
        plain = [value for value in values if isinstance(value, tuple)]
        return functools.reduce(functools.partial(machine.joined, self._statement), plain)

    def show(self, machine: Machine, windows: Windows, value: Partial | PartState) -> None:
        """Stores a whole result where statements read it."""
        if isinstance(self.unit.group, Fold):
            assert isinstance(value, dict)
            machine.merged(self.unit.group, self.unit.statements, windows, [value])
        else:
            assert isinstance(value, tuple)
            machine.hold(self._statement, value, {rank: windows.get(rank, machine.full(rank)) for rank in self.ranks})

    @property
    def shown(self) -> tuple[Target, ...]:
        """The tensors that are whole when all parts are joined."""
        found = [target for stmt in self.unit.statements for target in targets(stmt)]
        if isinstance(self.unit.group, Fold):
            return tuple(target for target in found if self.unit.group.rank not in target.ranks)
        return tuple(found)

    @property
    def reducer(self) -> str:
        """What a collective that merges must say."""
        return FOLD if isinstance(self.unit.group, Fold) else reducer_of(self._statement)

    @property
    def _statement(self) -> Einsum | TopK:
        stmt = self.unit.statements[0]
        assert isinstance(stmt, (Einsum, TopK)), "a canonical cascade has no calls"
        return stmt


def reduction(unit: Unit) -> Reduction | None:
    """How a unit is reduced; None for a map and for a recurrence."""
    stmt = unit.statements[0]
    left = targets(stmt)[0].ranks
    if isinstance(unit.group, Fold):
        states = (target.ranks for one in unit.statements for target in targets(one))
        state = next(ranks for ranks in states if unit.group.rank not in ranks)
        return Reduction(unit, tuple(rank for rank in state if _common(unit, rank)), (unit.group.rank,))
    reduced = tuple(rank for rank in iterated(stmt) if rank not in left)
    return Reduction(unit, left, reduced) if reduced and not unit.cyclic else None


def _common(unit: Unit, rank: str) -> bool:
    return all(rank in target.ranks for stmt in unit.statements for target in targets(stmt))


def _hidden(machine: Machine, names: Sequence[str], run: Callable[[], PartState]) -> PartState:
    """What a run gives, with the buffers of these tensors as they were before."""
    before = {name: _clone(machine.store[name]) for name in names if name in machine.store}
    found = run()
    for name in names:
        machine.store.pop(name, None)
    machine.store.update(before)
    return found


def _clone(stored: Stored) -> Stored:
    present = None if stored.present is None else stored.present.clone()
    return replace(stored, data=stored.data.clone(), present=present)


@dataclass(slots=True, eq=False)
class Device:
    """One rank: its coordinates, the interpreter with its buffers, what it holds of them, its partial results.

    What `came` from a neighbour lies apart from its own parts until it is passed on with them.
    """

    place: Mapping[str, int]
    machine: Machine
    held: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)
    came: dict[str, list[Part]] = field(default_factory=dict)

    def hold(self, name: str, box: Sequence[Window]) -> None:
        """Notes that the rank has this box of a tensor."""
        shape = self.machine.store[name].data.shape
        low = self.machine.store[name].low or (0,) * len(shape)
        mask = self.held.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        mask[tuple(slice(a - first, b - first) for (a, b), first in zip(box, low, strict=True))] = True


class Ranks:
    """All ranks of a program and what they hold so far."""

    def __init__(
        self,
        program: Program,
        inputs: Mapping[str, Tensor],
        only: int | None = None,
        precision: Precision = Precision.REFERENCE,
    ) -> None:
        self.program = program
        self.precision = precision
        self.sizes = dict(program.sizes)
        self.shapes = infer_shapes(program.cascade)
        self.units = units_by_name(program.cascade)
        self.owner = {name: unit for unit in self.units.values() for stmt in unit.statements for name in defines(stmt)}
        places = coordinates(program.axes)
        self.devices = [self._device(place, inputs) for place in (places if only is None else [places[only]])]

    def _device(self, place: Mapping[str, int], inputs: Mapping[str, Tensor]) -> Device:
        machine = Machine(self.program.cascade, self.shapes, self.sizes, self.precision, torch.device("cpu"))
        device = Device(place, machine)
        for param in self.program.cascade.params:
            given = inputs[param.name]
            data = given.to(self.precision.storage(FROM_TORCH[given.dtype])).clone()
            inside = torch.ones(given.shape, dtype=torch.bool)
            for at in (at for at in self.program.places if at.tensor == param.name):
                number, count = number_along(place, at.axes, self.program.axes), self.program.devices(at.axes)
                mine = torch.zeros(given.shape[at.dim], dtype=torch.bool)
                for window in slices(given.shape[at.dim], at.cuts):
                    mine[slice(*stretch(window, number, count))] = True
                inside &= mine.reshape([-1 if dim == at.dim else 1 for dim in range(given.dim())])
            data = torch.where(inside, data, _unknown(data.dtype))
            machine.store[param.name] = Stored(data, FROM_TORCH[given.dtype])
            device.held[param.name] = inside
        return device

    def run(self, number: int) -> None:
        """One step of the program on every rank."""
        step = self.program.steps[number]
        if isinstance(step, Compute):
            for device in self.devices:
                self._compute(device, step)
        else:
            for group in self._groups(step.axes):
                self._exchange(group, step)

    # --- statements --------------------------------------------------------------------------------------------------

    def _compute(self, device: Device, step: Compute) -> None:
        machine, unit = device.machine, self.units[step.name]
        full = {rank: machine.full(rank) for rank in self.shapes.ranks}
        windows = windows_of(step, device.place, self.program.axes, full)
        reduced = reduction(unit)
        if reduced is None:
            machine.run(unit.statements, windows, ())
            self._holds(device, [target for stmt in unit.statements for target in targets(stmt)], windows)
            return
        here = {rank: windows.get(rank, full[rank]) for rank in reduced.ranks}
        covered = tuple(windows.get(rank, full[rank]) for rank in reduced.reduced)
        part = Part(tuple(here.values()), (covered,), reduced.part(machine, windows))
        self.keep(device, reduced, part)
        inner = [t for stmt in unit.statements for t in targets(stmt) if t not in reduced.shown]
        self._holds(device, inner, windows)

    def keep(self, device: Device, reduced: Reduction, part: Part) -> None:
        """A part joined to what the rank has of the same box; it is shown when every coordinate is in it."""
        here = dict(zip(reduced.ranks, part.box, strict=True))
        waiting = device.parts.setdefault(defines(reduced.unit.statements[0])[0], [])
        for earlier in [other for other in waiting if other.box == part.box]:
            waiting.remove(earlier)
            value = reduced.joined(device.machine, here, (earlier, part))
            part = Part(part.box, tuple(sorted((*earlier.covered, *part.covered))), value)
        extents = [device.machine.full(rank)[1] for rank in reduced.reduced]
        if part.points >= math.prod(extents):
            reduced.show(device.machine, here, part.value)
            self._holds(device, reduced.shown, here)
        else:
            waiting.append(part)

    def _holds(self, device: Device, defined: Iterable[Target], windows: Mapping[str, Window]) -> None:
        for target in defined:
            low = device.machine.store[target.name].low or (0,) * len(target.ranks)
            box = [windows.get(rank, device.machine.full(rank)) for rank in target.ranks]
            box = [(first if a == 0 else a, b) for (a, b), first in zip(box, low, strict=True)]
            device.hold(target.name, box)

    # --- collectives -------------------------------------------------------------------------------------------------

    def _groups(self, axes: Axes) -> list[list[Device]]:
        """The devices that take part together: those that differ along these axes only, in order."""
        found: dict[tuple[tuple[str, int], ...], list[Device]] = {}
        for device in self.devices:
            others = tuple((name, at) for name, at in device.place.items() if name not in axes)
            found.setdefault(others, []).append(device)
        for group in found.values():
            group.sort(key=lambda device: number_along(device.place, axes, self.program.axes))
        return list(found.values())

    def _exchange(self, group: Sequence[Device], step: Collective) -> None:
        if step.kind in REDUCING:
            self._reduce(group, step)
            return
        if step.passes:
            self._pass(group, step)
            return
        shape = self.shape(step.tensor)
        taken = [self._snapshot(device, name) for device in group for name in (step.tensor,)]
        for number, device in enumerate(group):
            for other, source in enumerate(taken):
                box = moved(step, shape, number, other, len(group))
                if box is not None and source is not None and other != number:
                    receive(device, step.tensor, source, box)

    def _snapshot(self, device: Device, name: str) -> tuple[Stored, Tensor] | None:
        """What a rank holds of a tensor before a collective; None where it has nothing of it."""
        if name not in device.held:
            return None
        stored = device.machine.store[name]
        return _clone(stored), device.held[name].clone()

    def _reduce(self, group: Sequence[Device], step: Collective) -> None:
        """The partial results of a group merged: for everyone, or each for its stretch."""
        unit = self.owner[step.tensor]
        reduced, name = reduction(unit), defines(unit.statements[0])[0]
        if reduced is None or step.reducer != reduced.reducer:
            return  # another operator would merge other things than were computed: nobody gets anything
        at = {dim: (low, high) for dim, low, high in step.at}
        boxes = dict.fromkeys(
            part.box
            for part in group[0].parts.get(name, ())
            if all(part.box[dim] == window for dim, window in at.items())
        )
        for box in boxes:
            found = [part for device in group for part in device.parts.get(name, ()) if part.box == box]
            if len(found) != len(group):
                continue  # a rank has nothing to give yet
            covered = tuple(sorted(window for part in found for window in part.covered))
            for number, device in enumerate(group):
                here = dict(zip(reduced.ranks, box, strict=True))
                whole = Part(box, covered, reduced.joined(device.machine, here, found))
                device.parts[name] = [part for part in device.parts[name] if part.box != box]
                self.keep(device, reduced, part_of(whole, reduced, step.target, number, len(group)))

    def _pass(self, group: Sequence[Device], step: Collective) -> None:
        """The partial results of a stretch from every rank to its neighbour; at the end they are what is kept."""
        passed = [
            (onward(number, step.hop, len(group))[1], part)
            for number, device in enumerate(group)
            for part in self.passed(device, step, number, len(group))
        ]
        for number, part in passed:
            self.receive_part(group[number], step, part)

    def passed(self, device: Device, step: Collective, number: int, count: int) -> list[Part]:
        """What rank `number` of `count` passes on: its parts of a stretch, each with what came of it; it has them no
        more. Nothing where another operator would merge other things than were computed."""
        unit = self.owner[step.tensor]
        reduced, name = reduction(unit), defines(unit.statements[0])[0]
        if reduced is None or step.reducer != reduced.reducer:
            return []
        assert step.target is not None, "partial results go round to a dimension"
        at = {dim: (low, high) for dim, low, high in step.at}
        window = at.get(step.target, (0, self.shape(step.tensor)[step.target]))
        at[step.target] = stretch(window, onward(number, step.hop, count)[0], count)
        found = []
        for part in device.parts.get(name, ()):
            if all(part.box[dim] == window for dim, window in at.items()):
                parts = [*(other for other in device.came.get(name, ()) if other.box == part.box), part]
                covered = tuple(sorted(window for one in parts for window in one.covered))
                here = dict(zip(reduced.ranks, part.box, strict=True))
                found.append((parts, Part(part.box, covered, reduced.joined(device.machine, here, parts))))
        gone = [part for parts, _ in found for part in parts]
        for waiting in (device.parts, device.came):
            waiting[name] = [part for part in waiting.get(name, ()) if part not in gone]
        return [part for _, part in found]

    def receive_part(self, device: Device, step: Collective, part: Part) -> None:
        """A partial result that a rank was passed: apart from its own, or, where it stays, with them."""
        unit = self.owner[step.tensor]
        reduced, name = reduction(unit), defines(unit.statements[0])[0]
        if step.arrived and reduced is not None:
            self.keep(device, reduced, part)
        else:
            device.came.setdefault(name, []).append(part)

    # --- results -----------------------------------------------------------------------------------------------------

    def shape(self, name: str) -> tuple[int, ...]:
        """The extents of a tensor."""
        return tuple(size if isinstance(size, int) else self.sizes[size] for size in self.shapes.tensors[name])

    def result(self, name: str) -> Tensor:
        """A result as all ranks together hold it, absent coordinates filled."""
        result = next(result for result in self.program.cascade.results if result.name == name)
        whole = torch.full(self.shape(name), torch.nan, dtype=torch.float64)
        for device in self.devices:
            if name not in device.held:
                continue
            data = device.machine.result(result).to(torch.float64)
            mask = device.held[name]
            mask = mask[tuple(slice(mask.shape[d] - extent, None) for d, extent in enumerate(data.shape))]
            both = mask & ~whole.isnan()
            if not torch.allclose(data[both], whole[both], rtol=1e-9, atol=1e-9, equal_nan=True):
                raise InternalError(f"ranks hold different values of {name!r}")
            whole = torch.where(mask & whole.isnan(), data, whole)
        return whole


def moved(step: Collective, shape: Sequence[int], to: int, of: int, count: int) -> tuple[Window, ...] | None:
    """The box that one of `count` devices gets from another; None where they do not meet."""
    box: list[Window] = [(0, extent) for extent in shape]
    for dim, low, high in step.at:
        box[dim] = low, high
    assert step.source is not None
    window = box[step.source]
    if step.kind is Kind.SHIFT:
        if of != (to + (1 if step.hop > 0 else -1)) % count:
            return None
        box[step.source] = stretch(window, (to + step.hop) % count, count)
        return tuple(box)
    box[step.source] = stretch(window, of, count)
    if step.kind is Kind.ALL_TO_ALL:
        assert step.target is not None
        box[step.target] = stretch(box[step.target], to, count)
    return tuple(box)


def _unknown(dtype: torch.dtype) -> Tensor:
    """What stands for an element that a rank does not have."""
    if dtype.is_floating_point:
        return torch.tensor(torch.nan, dtype=dtype)
    return torch.tensor(False) if dtype is torch.bool else torch.tensor(torch.iinfo(dtype).min // 2, dtype=dtype)


def part_of(whole: Part, reduced: Reduction, dim: int | None, number: int, count: int) -> Part:
    """What a device has of a merged result: all of it, or its stretch of one dimension."""
    if dim is None:
        return whole
    window = whole.box[dim]
    mine = stretch(window, number, count)
    place = slice(mine[0] - window[0], mine[1] - window[0])
    assert isinstance(whole.value, tuple), "states of a fold are merged for everyone"
    box = (*whole.box[:dim], mine, *whole.box[dim + 1 :])
    return Part(box, whole.covered, tuple(_cut(one, reduced.ranks[dim], place) for one in whole.value))


def _cut(value: v.Value, rank: str, place: slice) -> v.Value:
    """A stretch of a value along one of its ranks."""
    at = tuple(place if name == rank else slice(None) for name in value.ranks)
    return replace(value, data=value.data[at], present=None if value.present is None else value.present[at])


def receive(device: Device, name: str, source: tuple[Stored, Tensor], box: tuple[Window, ...]) -> None:
    """What another rank holds of a box of a tensor, written into a rank's own buffer."""
    stored, held = source
    if name not in device.held:
        empty = torch.full_like(stored.data, 0) + _unknown(stored.data.dtype)
        device.machine.store[name] = replace(stored, data=empty, present=None)
        device.held[name] = torch.zeros_like(held)
    mine = device.machine.store[name]
    low = stored.low or (0,) * len(box)
    place = tuple(slice(a - first, b - first) for (a, b), first in zip(box, low, strict=True))
    moved = torch.zeros_like(held)
    moved[place] = held[place]
    data = torch.where(moved, stored.data, mine.data)
    present = mine.present
    if stored.present is not None or present is not None:
        ones = torch.ones_like(moved)
        present = torch.where(
            moved, ones if stored.present is None else stored.present, ones if present is None else present
        )
    device.machine.store[name] = replace(mine, data=data, present=present)
    device.held[name] = device.held[name] | moved
