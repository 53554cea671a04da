"""What a program of many devices means: all of its ranks in one process, on tensors in float64.

Every rank has a whole buffer of every tensor, in which everything is NaN that the rank was never given: a step that
reads what its device does not hold makes a wrong number, never a lucky one. Beside it stands a mask of what the rank
holds; a collective moves that and nothing else. Partial results lie apart, where no statement sees them, and are merged
in the order of the devices by the interpreter's own rule for parts of a reduction. A result is what all ranks together
hold of it; they must agree where more than one does, and what nobody holds stays NaN.

Steps run in the order of the program, or in any other that the caller gives: a wrong order shows in the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from cascade import values as v
from cascade.errors import InternalError
from cascade.evaluate import Stored
from cascade.inference import infer_shapes
from cascade.interp import Machine, Partial
from cascade.ir import Einsum, Reduce, Stmt, TopK
from cascade.order import Unit, units
from cascade.placed import (
    REDUCING, Axes, Collective, Compute, Kind, Program, Window, coordinates, number_along, stretch, windows_of,
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
    """A partial result of one rank: the box that it is of, the axes along which it is to be merged, its value."""

    box: tuple[Window, ...]
    axes: Axes
    value: Partial


@dataclass(slots=True, eq=False)
class Device:
    """One rank: its coordinates, the interpreter with its buffers, what it holds of them, its partial results."""

    place: Mapping[str, int]
    machine: Machine
    held: dict[str, Tensor] = field(default_factory=dict)
    parts: dict[str, list[Part]] = field(default_factory=dict)

    def hold(self, name: str, box: Sequence[Window]) -> None:
        """Notes that the rank has this box of a tensor."""
        shape = self.machine.store[name].data.shape
        low = self.machine.store[name].low or (0,) * len(shape)
        mask = self.held.setdefault(name, torch.zeros(shape, dtype=torch.bool))
        mask[tuple(slice(a - first, b - first) for (a, b), first in zip(box, low, strict=True))] = True


class Ranks:
    """All ranks of a program and what they hold so far."""

    def __init__(self, program: Program, inputs: Mapping[str, Tensor]) -> None:
        self.program = program
        self.sizes = dict(program.sizes)
        self.shapes = infer_shapes(program.cascade)
        self.units: dict[str, Unit] = {defines(unit.statements[0])[0]: unit for unit in units(program.cascade.body, ())}
        self.owner = {target.name: stmt for stmt in program.cascade.body for target in targets(stmt)}
        self.devices = [self._device(place, inputs) for place in coordinates(program.axes)]

    def _device(self, place: Mapping[str, int], inputs: Mapping[str, Tensor]) -> Device:
        machine = Machine(self.program.cascade, self.shapes, self.sizes, Precision.REFERENCE, torch.device("cpu"))
        device = Device(place, machine)
        for param in self.program.cascade.params:
            given = inputs[param.name]
            box: list[Window] = [(0, extent) for extent in given.shape]
            for at in self.program.places:
                if at.tensor == param.name:
                    number = number_along(place, at.axes, self.program.axes)
                    box[at.dim] = stretch(box[at.dim], number, self.program.devices(at.axes))
            data = given.to(torch.float64) if given.dtype.is_floating_point else given.clone()
            inside = torch.zeros(given.shape, dtype=torch.bool)
            inside[tuple(slice(a, b) for a, b in box)] = True
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
        windows = windows_of(step, device.place, self.program.axes, {r: machine.full(r) for r in self.shapes.ranks})
        if unit.cyclic:
            machine.run(unit.statements, windows, ())
            for stmt in unit.statements:
                self._holds(device, stmt, windows)
            return
        stmt = unit.statements[0]
        kept = set(targets(stmt)[0].ranks)
        split = tuple(axis for along in step.along if along.rank not in kept for axis in along.axes)
        cut = any(rank not in kept for rank, _, _ in step.at)
        assert isinstance(stmt, (Einsum, TopK)), "a canonical cascade has no calls"
        found = machine.partial(stmt, windows)
        here = {rank: windows.get(rank, machine.full(rank)) for rank in targets(stmt)[0].ranks}
        if split or cut:
            waiting = device.parts.setdefault(targets(stmt)[0].name, [])
            self._join(device, stmt, waiting, Part(tuple(here.values()), split, found), complete=not split)
            return
        machine.hold(stmt, found, here)
        self._holds(device, stmt, windows)

    def _join(self, device: Device, stmt: Einsum | TopK, waiting: list[Part], part: Part, complete: bool) -> None:
        """A partial result beside those of the same box: slices of a reduced rank are merged where they are made."""
        for earlier in waiting:
            if earlier.box == part.box and earlier.axes == part.axes:
                earlier.value = device.machine.joined(stmt, earlier.value, part.value)
                part = earlier
                break
        else:
            waiting.append(part)
        if complete:  # what is on one device may be read when all slices are in; until then it is a wrong number
            here = dict(zip(targets(stmt)[0].ranks, part.box, strict=True))
            device.machine.hold(stmt, part.value, here)
            self._holds(device, stmt, here)

    def _holds(self, device: Device, stmt: Stmt, windows: Mapping[str, Window]) -> None:
        for target in targets(stmt):
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
        shape = self._shape(step.tensor)
        taken = [self._snapshot(device, name) for device in group for name in (step.tensor,)]
        for number, device in enumerate(group):
            for other, source in enumerate(taken):
                box = self._moved(step, shape, number, other, len(group))
                if box is not None and source is not None and other != number:
                    _copy(device, step.tensor, source, box)

    def _moved(self, step: Collective, shape: Sequence[int], to: int, of: int, count: int) -> tuple[Window, ...] | None:
        """The box that one device gets from another; None where they do not meet."""
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

    def _snapshot(self, device: Device, name: str) -> tuple[Stored, Tensor] | None:
        """What a rank holds of a tensor before a collective; None where it has nothing of it."""
        if name not in device.held:
            return None
        stored = device.machine.store[name]
        present = None if stored.present is None else stored.present.clone()
        return replace(stored, data=stored.data.clone(), present=present), device.held[name].clone()

    def _reduce(self, group: Sequence[Device], step: Collective) -> None:
        """The partial results of a group merged: for everyone, or each for its stretch."""
        stmt = self.owner[step.tensor]
        assert isinstance(stmt, (Einsum, TopK))
        if step.reducer != (
            stmt.expr.reducer if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else "topk"
        ):
            return  # another operator would merge other things than were computed: nobody gets anything
        at = {dim: (low, high) for dim, low, high in step.at}
        name = targets(stmt)[0].name
        boxes = dict.fromkeys(
            part.box
            for part in group[0].parts.get(name, ())
            if set(step.axes) <= set(part.axes) and all(part.box[dim] == window for dim, window in at.items())
        )
        for box in boxes:
            found = [
                part for device in group for part in device.parts.get(name, ())
                if part.box == box and set(step.axes) <= set(part.axes)
            ]  # fmt: skip
            if len(found) != len(group):
                continue  # a rank has nothing to give yet
            whole = functools.reduce(functools.partial(group[0].machine.joined, stmt), [part.value for part in found])
            for number, (device, part) in enumerate(zip(group, found, strict=True)):
                self._give(device, stmt, step, part, whole, (number, len(group)))

    def _give(
        self, device: Device, stmt: Einsum | TopK, step: Collective, part: Part, whole: Partial, number: tuple[int, int]
    ) -> None:
        """What a device has of a merged result: all of it, or its stretch; partial still, along other axes."""
        target, box, value = targets(stmt)[0], list(part.box), whole
        if step.target is not None:
            box[step.target] = stretch(part.box[step.target], *number)
            first = part.box[step.target][0]
            place = slice(box[step.target][0] - first, box[step.target][1] - first)
            value = tuple(_cut(one, target.ranks[step.target], place) for one in whole)
        device.parts[target.name].remove(part)
        rest = tuple(axis for axis in part.axes if axis not in step.axes)
        if rest:
            device.parts[target.name].append(Part(tuple(box), rest, value))
            return
        here = dict(zip(target.ranks, box, strict=True))
        device.machine.hold(stmt, value, here)
        self._holds(device, stmt, here)

    # --- results -----------------------------------------------------------------------------------------------------

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else self.sizes[size] for size in self.shapes.tensors[name])

    def result(self, name: str) -> Tensor:
        """A result as all ranks together hold it, absent coordinates filled."""
        result = next(result for result in self.program.cascade.results if result.name == name)
        whole = torch.full(self._shape(name), torch.nan, dtype=torch.float64)
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


def _unknown(dtype: torch.dtype) -> Tensor:
    """What stands for an element that a rank does not have."""
    if dtype.is_floating_point:
        return torch.tensor(torch.nan, dtype=dtype)
    return torch.tensor(False) if dtype is torch.bool else torch.tensor(torch.iinfo(dtype).min // 2, dtype=dtype)


def _cut(value: v.Value, rank: str, place: slice) -> v.Value:
    """A stretch of a value along one of its ranks."""
    at = tuple(place if name == rank else slice(None) for name in value.ranks)
    return replace(value, data=value.data[at], present=None if value.present is None else value.present[at])


def _copy(device: Device, name: str, source: tuple[Stored, Tensor], box: tuple[Window, ...]) -> None:
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
