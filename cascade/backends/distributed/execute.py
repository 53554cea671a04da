"""Runs the program of a plan by kernels: what a device computes are compiled cascades on boxes of plain tensors.

Every tensor of the program has one buffer of its full shape and its own type; a rank writes and reads the boxes that it
holds. Statements of a task that stand together are one cascade (`local.py`), compiled at its first call. Partial
results lie apart until they are merged. What ranks exchange are boxes, by the collectives of torch.distributed. On CUDA
the queues of the plan are streams (`streams.py`), and nothing waits for the device: a call can be captured into a CUDA
graph. Nothing is checked here: that each box is there in time is what simulated ranks and the checker of the plan have
shown.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor

from cascade.backends.placing import into
from cascade.backends.distributed.local import MERGED, Local, Piece, Wanted, local
from cascade.backends.distributed.simulate import moved
from cascade.backends.distributed.streams import Ordered, Queues
from cascade.backends.distributed.symmetric import Symmetric, symmetric
from cascade.bounds import absent_tensors
from cascade.errors import Diagnostic, UnsupportedError
from cascade.inference import infer_dtypes
from cascade.ir import Cascade, DType, Einsum, Reduce
from cascade.passes.reach import Box, left_over, meet
from cascade.passes.split_tokens import Touched, Touches
from cascade.placed import (
    REDUCING, Axes, Collective, Compute, Kind, Program, Window, coordinates, onward, stretch, windows_of,
)  # fmt: skip
from cascade.values import FROM_TORCH, TORCH_TYPES, identity_of
from cascade.walk import targets

Make: TypeAlias = Callable[[Cascade], Callable[..., Any]]
"""Compiles a cascade."""

Types: TypeAlias = tuple[DType, ...]
"""Of the parameters of a call, in their order."""

Group: TypeAlias = tuple[list[int], Any]
"""The ranks that differ along some axes only, and their process group."""

OPERATIONS: dict[str, tuple[Any, Callable[[Tensor, Tensor], Tensor]]] = {
    "sum": (dist.ReduceOp.SUM, torch.add), "prod": (dist.ReduceOp.PRODUCT, torch.mul),
    "max": (dist.ReduceOp.MAX, torch.maximum), "min": (dist.ReduceOp.MIN, torch.minimum),
}  # fmt: skip
"""How the library merges over ranks, and torch two parts on one."""


@dataclass(slots=True, eq=False)
class Part:
    """A partial result: its box, its values, the steps that gave it, and the axes over which it is merged already."""

    piece: Piece
    value: Tensor
    steps: tuple[Compute, ...]
    axes: frozenset[str] = frozenset()


@dataclass(slots=True, eq=False)
class Executor:
    """A program on one rank of a group, by kernels; compiled ones are kept from call to call.

    `make` compiles a cascade; `guarded` runs a collective, and says who is missing where it fails.
    """

    program: Program
    tasks: Sequence[Ordered]
    rank: int
    groups: Mapping[Axes, Group]
    make: Make
    guarded: Callable[[Collective, Sequence[int], Callable[[], None]], None]
    touches: Touches = field(init=False)
    places: list[dict[str, int]] = field(init=False)
    held: dict[str, list[list[Box]]] = field(init=False)
    absent: frozenset[str] = field(init=False)  # tensors that may be absent in places
    runs: list[list[tuple[int, ...]]] = field(init=False)  # of every task: collectives, and statements between them
    empty: frozenset[int] = field(init=False)  # steps of which this rank has no coordinates
    known: dict[Types, Mapping[str, DType]] = field(init=False, default_factory=dict)  # types of all tensors
    compiled: dict[object, tuple[Local, Callable[..., Any]] | None] = field(init=False, default_factory=dict)
    apart: set[object] = field(init=False, default_factory=set)  # statements that are no kernel together
    buffers: dict[str, Tensor] = field(init=False, default_factory=dict)
    parts: dict[str, list[Part]] = field(init=False, default_factory=dict)
    came: dict[tuple[str, Box], list[Tensor]] = field(init=False, default_factory=dict)  # and those of neighbours
    queues: Queues = field(init=False)
    shared: dict[object, Symmetric] = field(init=False, default_factory=dict)  # memory of a group on a stream

    def __post_init__(self) -> None:
        exchanging = {
            task.queue for task in self.tasks
            if all(isinstance(own := self.program.steps[step], Collective) and not own.arrived for step in task.steps)
        }  # fmt: skip
        self.queues = Queues(self.tasks, exchanging)
        self.touches = Touches.of(self.program)
        self.places = coordinates(self.program.axes)
        self.held = _held(self.program, self.touches)
        self.absent = absent_tensors(self.program.cascade, dict(self.program.sizes))
        self.runs = [self._runs(task) for task in self.tasks]
        self.empty = frozenset(
            number for number, step in enumerate(self.program.steps)
            if isinstance(step, Compute) and any(low >= high for low, high in self._windows(step).values())
        )  # fmt: skip

    def __call__(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The results, whole on every rank. Raises UnsupportedError (C555) where a task is no kernel."""
        names = [param.name for param in self.program.cascade.params]
        given = tuple(FROM_TORCH[tensors[name].dtype] for name in names)
        if given not in self.known:
            self.known[given] = infer_dtypes(self.program.cascade, dict(zip(names, given, strict=True)))
        types = self.known[given]
        device = next(iter(tensors.values())).device
        self.parts, self.came = {}, {}
        self.buffers = dict(tensors) | {
            name: torch.empty(self.touches.reach.shape(name), dtype=TORCH_TYPES[types[name]], device=device)
            for name in types.keys() - set(names)
        }
        with self.queues.call(device):
            for number in range(len(self.tasks)):
                with self.queues.task(number):
                    self._task(number, given)
        return {result.name: self._whole(result.name) for result in self.program.cascade.results}

    def _task(self, number: int, given: Types) -> None:
        """The steps of a task, in its queue."""
        for run in self.runs[number]:
            first = self.program.steps[run[0]]
            if isinstance(first, Collective):
                self._exchange(first)
            else:
                self._compute(number, run, given)

    def _runs(self, task: Ordered) -> list[tuple[int, ...]]:
        """The steps of a task: collectives by themselves, statements between them together."""
        found: list[tuple[int, ...]] = []
        for step in task.steps:
            alone = isinstance(self.program.steps[step], Collective)
            if found and not alone and not isinstance(self.program.steps[found[-1][0]], Collective):
                found[-1] = (*found[-1], step)
            else:
                found.append((step,))
        return found

    # --- statements --------------------------------------------------------------------------------------------------

    def _compute(self, task: int, run: tuple[int, ...], given: Types) -> None:
        """Statements as one kernel or few; each by itself where they are not of the same windows."""
        steps = [step for step in map(self.program.steps.__getitem__, run) if isinstance(step, Compute)]
        if self.empty.isdisjoint(run) and (run, given) not in self.apart:
            try:
                self._kernel(task, run, steps, given)
                return
            except UnsupportedError:
                if len(run) == 1:
                    raise
                self.apart.add((run, given))
        for number, step in zip(run, steps, strict=True):
            if number in self.empty:
                self._nothing(step, self.known[given])
            else:
                self._kernel(task, (number,), [step], given)

    def _kernel(self, task: int, run: tuple[int, ...], steps: Sequence[Compute], given: Types) -> None:
        """Statements by one compiled cascade."""
        key = run, given
        if key not in self.compiled:
            again = self._again(run)
            found = local(
                self.program, self.touches.reach, [*again, *steps], self.places[self.rank], self._wanted(run),
                self.known[given], f"task_{task}",
            )  # fmt: skip
            self.compiled[key] = (found, self.make(found.cascade)) if found.writes else None
        known = self.compiled[key]
        if known is None:  # whoever needs it computes it
            return
        of, call = known
        kept = (piece for piece in of.writes if not piece.reducer)
        with into({piece.name: _at(self.buffers[piece.tensor], piece.box) for piece in kept}):
            made = call(**{piece.name: _at(self.buffers[piece.tensor], piece.box) for piece in of.reads})
        for piece, value in zip(of.writes, made if isinstance(made, tuple) else (made,), strict=True):
            self.queues.keep(value)
            if piece.reducer:
                self._keep(Part(piece, value, tuple(s for s in steps if piece.tensor in self._defined(s))))
            else:
                self._write(piece.tensor, piece.box, value)

    def _nothing(self, step: Compute, types: Mapping[str, DType]) -> None:
        """A statement of which this rank has no coordinates: of a sum along them, nothing is its part."""
        windows = self._windows(step)
        for stmt in self.touches.reach.units[step.name].statements:
            target = targets(stmt)[0]
            box = tuple(windows.get(rank, self.touches.reach.full[rank]) for rank in target.ranks)
            if all(low < high for low, high in box):
                if not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce) or stmt.expr.reducer not in MERGED:
                    message = f"{target.name!r} is cut along what it reduces, and a rank has nothing of it"
                    raise UnsupportedError(Diagnostic("C555", message, help="load the plan without kernels"))
                value = torch.full(
                    [high - low for low, high in box], identity_of(stmt.expr.reducer, TORCH_TYPES[types[target.name]]),
                    dtype=TORCH_TYPES[types[target.name]], device=next(iter(self.buffers.values())).device,
                )  # fmt: skip
                cut = tuple(rank for rank in stmt.expr.ranks if rank in windows)
                self._keep(Part(Piece(target.name, target.name, box, stmt.expr.reducer, cut), value, (step,)))

    def _windows(self, step: Compute) -> dict[str, Window]:
        return windows_of(step, self.places[self.rank], self.program.axes, self.touches.reach.full)

    def _wanted(self, run: Sequence[int]) -> Wanted:
        """Of what some steps define, results and what steps outside of them read on this rank."""
        own = {one.tensor for number in run for one in self.touches.writes(self.program.steps[number])}
        results, absent = {result.name for result in self.program.cascade.results}, self.absent
        others = [step for number, step in enumerate(self.program.steps) if number not in run]
        found: dict[str, list[Box]] = {}
        for one in (one for step in others for one in self.touches.reads(step) if one.device == self.rank):
            found.setdefault(one.tensor, []).append(one.box)

        def wanted(name: str, box: Box) -> bool:
            read = name not in absent and any(meet(box, other) for other in found.get(name, ()))
            return name in own and (name in results or read)

        return wanted

    def _again(self, run: Sequence[int]) -> list[Compute]:
        """The steps before some that make what these read and may be absent in places: memory does not show that.

        With them comes what they need of their own task: it may be kept by nobody.
        """
        found, todo = set(run), list(run)
        while todo:
            number = todo.pop()
            read = [one for one in self.touches.reads(self.program.steps[number]) if one.device == self.rank]
            beside = () if number in run else next(r for runs in self.runs for r in runs if number in r)
            for other, step in enumerate(self.program.steps):
                if other not in found and isinstance(step, Compute) and self._makes(step, read, other in beside):
                    found.add(other)
                    todo.append(other)
        steps = [self.program.steps[number] for number in sorted(found - set(run))]
        return [step for step in steps if isinstance(step, Compute)]

    def _makes(self, step: Compute, read: Sequence[Touched], anything: bool) -> bool:
        """Whether a step makes any of what is read; of that which may be absent, or of anything."""
        written = [one for one in self.touches.writes(step) if one.device == self.rank]
        return any(
            one.tensor == other.tensor and meet(one.box, other.box)
            for one in written if anything or one.tensor in self.absent
            for other in read
        )  # fmt: skip

    def _defined(self, step: Compute) -> set[str]:
        return {name for name, _ in self.touches.reach.writes(step.name, {})}

    def _write(self, tensor: str, box: Box, value: Tensor) -> None:
        """Values into a box of a buffer, unless they were written there; the whole of one takes its place."""
        place = _at(self.buffers[tensor], box)
        if tuple(value.shape) == tuple(self.buffers[tensor].shape):
            self.buffers[tensor] = value
        elif value.data_ptr() != place.data_ptr() or value.stride() != place.stride():
            place.copy_(value)

    # --- partial results ---------------------------------------------------------------------------------------------

    def _keep(self, part: Part) -> None:
        """A part joined to what there is of the same box; written where nothing is missing any more."""
        waiting = self.parts.setdefault(part.piece.tensor, [])
        for other in [other for other in waiting if other.piece.box == part.piece.box and other.axes == part.axes]:
            waiting.remove(other)
            value = self.queues.keep(OPERATIONS[part.piece.reducer][1](other.value, part.value))
            part = Part(part.piece, value, (*other.steps, *part.steps), part.axes)
        if self._points(part) == math.prod(self.touches.reach.full[rank][1] for rank in part.piece.cut):
            self._write(part.piece.tensor, part.piece.box, part.value)
        else:
            waiting.append(part)

    def _points(self, part: Part) -> int:
        """How many coordinates of the ranks that are cut are in a part."""
        mine = self.places[self.rank]
        members = [place for place in self.places if all(place[n] == mine[n] for n in mine if n not in part.axes)]
        total = 0
        for place in members:
            for step in part.steps:
                windows = windows_of(step, place, self.program.axes, self.touches.reach.full)
                pairs = (windows.get(rank, self.touches.reach.full[rank]) for rank in part.piece.cut)
                total += math.prod(max(0, high - low) for low, high in pairs)
        return total

    # --- collectives -------------------------------------------------------------------------------------------------

    def _exchange(self, step: Collective) -> None:
        members, group = self.groups[step.axes]
        if step.reducer and step.reducer not in OPERATIONS:
            message = f"what is merged by {step.reducer!r} has no kernel"
            raise UnsupportedError(Diagnostic("C555", message, help="load the plan without kernels"))
        exchange = self._merge if step.kind in REDUCING else self._pass_on if step.passes else self._receive
        self.guarded(step, members, lambda: exchange(step, members, group))

    def _merge(self, step: Collective, members: Sequence[int], group: Any) -> None:
        """The parts of all members merged, on each: a box for all of them, or a stretch for each."""
        at = {dim: (low, high) for dim, low, high in step.at}
        waiting = self.parts.get(step.tensor, [])
        for part in [p for p in waiting if all(p.piece.box[dim] == window for dim, window in at.items())]:
            waiting.remove(part)
            box = part.piece.box
            if step.target is None:
                value = self._reduced(part.value, step, group)
            else:
                own = [stretch(box[step.target], member, len(members)) for member in range(len(members))]
                lengths = [high - low for low, high in own]
                value = self._scattered(part.value, step.target, lengths, members.index(self.rank), step, group)
                box = (*box[: step.target], own[members.index(self.rank)], *box[step.target + 1 :])
            piece = Piece(part.piece.name, step.tensor, box, part.piece.reducer, part.piece.cut)
            self._keep(Part(piece, value, part.steps, part.axes | set(step.axes)))

    def _reduced(self, value: Tensor, step: Collective, group: Any) -> Tensor:
        """The whole of what is merged, on every member: a small sum through memory that they share."""
        if step.reducer == "sum" and value.is_cuda:
            key = step.axes, torch.cuda.current_stream(value.device)
            if key not in self.shared:
                self.shared[key] = symmetric(group, value.device)
            if self.shared[key].takes(value):
                return self.queues.keep(self.shared[key].summed(value))
        merged = self.queues.keep(value.contiguous())
        dist.all_reduce(merged, OPERATIONS[step.reducer][0], group)
        return merged

    def _scattered(
        self, value: Tensor, dim: int, lengths: Sequence[int], me: int, step: Collective, group: Any
    ) -> Tensor:
        """A rank's stretch of what is merged: by a reduce-scatter where stretches are equal and the library has one."""
        keep, operation = self.queues.keep, OPERATIONS[step.reducer][0]
        if value.is_cuda and len(set(lengths)) == 1:
            first = keep(value.movedim(dim, 0).contiguous())
            merged = keep(torch.empty_like(first[: lengths[0]]))
            dist.reduce_scatter_tensor(merged, first, operation, group)
            return merged.movedim(0, dim)
        whole = keep(value.contiguous())
        dist.all_reduce(whole, operation, group)
        return whole.narrow(dim, sum(lengths[:me]), lengths[me])

    def _pass_on(self, step: Collective, members: Sequence[int], group: Any) -> None:
        """Partial results of a stretch merged and sent to the neighbour on one side; those of the other are received.

        What comes lies apart until it is passed on itself: the statement that makes this rank's own part of it may be
        running in another queue. With hop 0 it is where it stays.
        """
        me, count = members.index(self.rank), len(members)
        number, to = onward(me, step.hop, count)
        passed = [self._passed(step, box) for box in self._stretches(step, number, count)]
        if step.arrived:
            for part in passed:
                self._keep(part)
            return
        before, buffer = onward(me, -step.hop, count)[1], self.buffers[step.tensor]
        coming = self._stretches(step, onward(before, step.hop, count)[0], count)
        came = [self.queues.keep(buffer.new_empty(_extents(box))) for box in coming]
        sent = [self.queues.keep(part.value.contiguous()) for part in passed]
        _wait(
            [
                *(dist.P2POp(dist.isend, piece, members[to], group) for piece in sent),
                *(dist.P2POp(dist.irecv, piece, members[before], group) for piece in came),
            ]
        )
        for box, piece in zip(coming, came, strict=True):
            self.came.setdefault((step.tensor, box), []).append(piece)

    def _passed(self, step: Collective, box: Box) -> Part:
        """This rank's part of a box with what came of it, merged over the axes of a ring as far as it has come."""
        part = next(part for part in self.parts[step.tensor] if part.piece.box == box)
        self.parts[step.tensor].remove(part)
        pieces = [*self.came.pop((step.tensor, box), ()), part.value]
        value = self.queues.keep(functools.reduce(OPERATIONS[step.reducer][1], pieces))
        return Part(part.piece, value, part.steps, part.axes | set(step.axes))

    def _stretches(self, step: Collective, number: int, count: int) -> list[Box]:
        """The boxes of partial results that this rank makes at a stretch of the dimension to which they are scattered.

        Those of its neighbour, which differs along these axes only, are the same.
        """
        assert step.target is not None, "partial results go round to a dimension"
        at = {dim: (low, high) for dim, low, high in step.at}
        window = at.get(step.target, (0, self.touches.reach.shape(step.tensor)[step.target]))
        at[step.target] = stretch(window, number, count)
        computed = (own for own in self.program.steps if isinstance(own, Compute))
        made = (one for own in computed for one in self.touches.writes(own) if one.device == self.rank)
        boxes = dict.fromkeys(one.box for one in made if one.tensor == step.tensor and _points(one.box))
        return [box for box in boxes if all(box[dim] == window for dim, window in at.items())]

    def _receive(self, step: Collective, members: Sequence[int], group: Any) -> None:
        """Boxes of a tensor from others, and theirs to them."""
        me, shape, buffer = members.index(self.rank), self.touches.reach.shape(step.tensor), self.buffers[step.tensor]
        if step.kind is Kind.ALL_GATHER and buffer.is_cuda and self._gathered(step, members, group):
            return
        came: list[tuple[Box, Tensor]] = []
        work: list[dist.P2POp] = []
        for other, rank in enumerate(members):
            box = moved(step, shape, other, me, len(members)) if other != me else None
            if box is not None and _points(box):
                sent = self.queues.keep(_at(buffer, box).contiguous())
                work.append(dist.P2POp(dist.isend, sent, rank, group))
            box = moved(step, shape, me, other, len(members)) if other != me else None
            if box is not None and _points(box):
                came.append((box, self.queues.keep(torch.empty_like(_at(buffer, box)).contiguous())))
                work.append(dist.P2POp(dist.irecv, came[-1][1], rank, group))
        _wait(work)
        for box, piece in came:
            _at(buffer, box).copy_(piece)

    def _gathered(self, step: Collective, members: Sequence[int], group: Any) -> bool:
        """Boxes of one size by the all-gather of the library, into their place where they lie there one after another.

        False, and nothing is done, where they differ.
        """
        me, count = members.index(self.rank), len(members)
        shape, buffer = self.touches.reach.shape(step.tensor), self.buffers[step.tensor]
        boxes = [moved(step, shape, (other + 1) % count, other, count) for other in range(count)]
        given = [box for box in boxes if box is not None]
        if len(given) < count or len({_extents(box) for box in given}) > 1:
            return False
        own = self.queues.keep(_at(buffer, given[me]).contiguous())
        place = _at(
            buffer, tuple((min(l), max(h)) for l, h in (zip(*dim, strict=True) for dim in zip(*given, strict=True)))
        )
        if step.source == 0 and place.is_contiguous() and place.numel() == count * own.numel():
            dist.all_gather_into_tensor(place, own, group)
            return True
        came = self.queues.keep(own.new_empty((count, *own.shape)))
        dist.all_gather_into_tensor(came, own, group)
        for box, piece in zip(given, came, strict=True):
            _at(buffer, box).copy_(piece)
        return True

    # --- results -----------------------------------------------------------------------------------------------------

    def _whole(self, name: str) -> Tensor:
        """A result, with what other ranks have of it where no rank has all."""
        full = tuple((0, extent) for extent in self.touches.reach.shape(name))
        boxes = self.held.get(name, [[] for _ in self.places])
        if all(not left_over(full, own) for own in boxes):
            return self.buffers[name]
        for rank, own in enumerate(boxes):
            for box in own:
                piece = _at(self.buffers[name], box).contiguous()
                dist.broadcast(piece, rank)
                _at(self.buffers[name], box).copy_(piece)
        return self.buffers[name]


def _held(program: Program, touches: Touches) -> dict[str, list[list[Box]]]:
    """The boxes of every result that each device has in the end."""
    found = {result.name: [list[Box]() for _ in touches.places] for result in program.cascade.results}
    for step in program.steps:
        for one in touches.writes(step):
            if one.tensor in found and not one.partial:
                found[one.tensor][one.device].append(one.box)
    return found


def _wait(work: list[dist.P2POp]) -> None:
    """Point to point, all of it at once."""
    for request in dist.batch_isend_irecv(work) if work else ():
        request.wait()


def _at(tensor: Tensor, box: Box) -> Tensor:
    return tensor[tuple(slice(low, high) for low, high in box)]


def _extents(box: Box) -> tuple[int, ...]:
    return tuple(high - low for low, high in box)


def _points(box: Box) -> int:
    return math.prod(max(0, high - low) for low, high in box)
