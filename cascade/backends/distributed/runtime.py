"""Runs the program of a plan on torch.distributed: one process a device, each with what it holds.

Steps run in the order of the plan's tasks, the same on every rank, so collectives meet. Statements are run by the
interpreter on buffers that are NaN where the rank holds nothing; what ranks exchange are boxes of these, by the
collectives of torch.distributed: sums, extremes and products as all-reduce, with presence beside them; shards as an
all-gather of pieces of one size; all-to-all and shifts point to point, those of partial results as objects. What no
reduction of the library merges (the coordinate of an extreme, the largest few, states of folds) is gathered whole and
merged by the interpreter, in the order of the ranks.

It is a functional backend: the same program on gloo as on simulated ranks, every buffer of the full shape. With a
compiler of cascades the same plan runs by kernels (`execute.py`), the interpreter being its witness.
"""

from __future__ import annotations

import datetime
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from cascade import values as v
from cascade.backends.distributed.execute import OPERATIONS, Executor, Make
from cascade.backends.distributed.plan import VERSION, fingerprint
from cascade.backends.distributed.simulate import Device, Part, Ranks, Reduction, moved, part_of, receive, reduction
from cascade.backends.distributed.streams import Ordered
from cascade.backends.distributed.watch import Watch
from cascade.errors import CallError, Diagnostic
from cascade.evaluate import Stored
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade
from cascade.placed import (
    REDUCING, Axes, Collective, Compute, Kind, Program, coordinates, number_along, onward, read_program, render_step,
)  # fmt: skip
from cascade.values import Precision
from cascade.verify.timetable import check_ranks
from cascade.walk import defines

TIMEOUT_S = 300.0
"""How long a collective waits for the other ranks."""

ROUNDS, TURNS = 7, 4
"""How often both ways to run a plan on one device are timed, and calls of each time."""


def load(
    plan: str | Mapping[str, Any], timeout_s: float = TIMEOUT_S, make: Make | None = None, timed: bool = False
) -> Loaded:
    """The program of a plan, given as its JSON, or as text of it, on the ranks of the default process group; a plan for
    one device needs no group.

    No collective waits longer than `timeout_s` seconds. `make` compiles what a rank computes of a task; without it the
    interpreter runs the statements. With `timed` the first call on a GPU finds out whether what a plan has on sides of
    the device is faster there than one task after the other, and the faster one runs from then on. Raises CallError:
    C347 for what is no plan, or one of another version, or whose hash does not fit what it says; C348 where the group
    has another number of ranks, or ranks have different plans.
    """
    try:
        found = json.loads(plan) if isinstance(plan, str) else dict(plan)
        version, said = found["version"], found["hash"]
        if version != VERSION:
            raise _refusal("C347", f"the plan has version {version}, and this is version {VERSION}", "make it anew")
        cascade = parse_cascade(found["cascade"], "<plan>")
        program = read_program(found["program"], cascade)
        machine, tasks = found["machine"], found["tasks"]
        order = [step for task in tasks for step in task["steps"]]
        instead = None if not (other := found.get("otherwise")) else _otherwise(other, cascade, said, make)
    except (ValueError, KeyError, TypeError):
        raise _refusal("C347", "this is no plan", "cascadec plan FILE --machine NAME --json makes one") from None
    if said != fingerprint(cascade, dict(program.sizes), machine) or sorted(order) != list(range(len(program.steps))):
        raise _refusal("C347", "the plan does not fit its hash: it was changed after it was made", "make it anew")
    loaded = Loaded(program, order, said, timeout_s, ordered(tasks), make)
    loaded.otherwise = instead if timed else None
    return loaded


def _otherwise(found: Mapping[str, Any], cascade: Cascade, said: str, make: Make | None) -> Executor | None:
    """The kernels of a program on one device whose tasks follow each other."""
    program, tasks = read_program(found["program"], cascade), ordered(found["tasks"])
    order = [step for task in tasks for step in task.steps]
    if sorted(order) != list(range(len(program.steps))) or any(isinstance(step, Collective) for step in program.steps):
        raise ValueError("not every step once, or exchanges")
    return None if make is None else Loaded(program, order, said, TIMEOUT_S, tasks, make).executor


def ordered(tasks: Sequence[Mapping[str, Any]]) -> list[Ordered]:
    """The tasks of a plan's JSON in their queues."""
    places = {task["name"]: place for place, task in enumerate(tasks)}
    return [
        Ordered(tuple(task["steps"]), task["resource"], tuple(places[name] for name in task["waits"]), task["sms"])
        for task in tasks
    ]


class Loaded:
    """A plan on this rank: call it with the tensors of the cascade."""

    made: ClassVar[Iterator[int]] = itertools.count()

    def __init__(
        self,
        program: Program,
        order: Sequence[int],
        said: str,
        timeout_s: float = TIMEOUT_S,
        tasks: Sequence[Ordered] = (),
        make: Make | None = None,
    ) -> None:
        self.program, self.order = program, order
        together = dist.is_initialized()
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        places = coordinates(program.axes)
        if self.world != len(places):
            message = f"the plan is for {len(places)} ranks, and the group has {self.world}"
            raise _refusal("C348", message, "start as many processes as the mesh has devices")
        issued = [render_step(step) for step in (program.steps[n] for n in order) if isinstance(step, Collective)]
        if issued and not together:
            raise _refusal(
                "C348", "the plan has collectives, and there is no process group", "init_process_group first"
            )
        plans: list[Any] = [(said, issued)] * self.world
        if together:
            dist.all_gather_object(plans, (said, issued))
        if other := next((rank for rank, one in enumerate(plans) if one[0] != plans[0][0]), None):
            raise _refusal("C348", f"rank {other} has another plan than rank 0", "load one plan everywhere")
        if wrong := next(check_ranks({rank: one[1] for rank, one in enumerate(plans)}), None):
            raise _refusal("C348", f"ranks would wait for each other: {wrong}", "load one plan everywhere")
        self.groups: dict[Axes, tuple[list[int], Any]] = {}
        self.name, self.calls = f"cascade {next(Loaded.made)}", 0
        self.store: Any = distributed_c10d._get_default_store() if together else None  # it has no public name
        self.issued = 0
        self.watch = Watch(timeout_s) if together and dist.get_backend() == "nccl" else None
        self.executor: Executor | None = None
        self.otherwise: Executor | None = None  # of the same, one task after the other, until both were timed
        self.why: str | None = None  # why which of them runs
        if make is not None:
            found = tasks or [Ordered((number,)) for number in order]
            self.executor = Executor(program, found, self.rank, self.groups, make, self.guarded)
        for axes in dict.fromkeys(step.axes for step in program.steps if isinstance(step, Collective)):
            for members in _members(program, axes):  # every rank makes all groups, in one order
                options = _urgent([task.sms for task in tasks if _exchanges(program, task)])
                group = dist.new_group(members, datetime.timedelta(seconds=timeout_s), pg_options=options)
                if self.rank in members:
                    self.groups[axes] = members, group

    def __call__(self, precision: Precision = Precision.COMPUTE, **tensors: Tensor) -> dict[str, Tensor]:
        """The results, whole on every rank; tensors are whole, and each rank takes its shards of them.

        Raises CallError (C349) where a collective fails, with this rank, the collective, and who has not come to it:
        a rank is gone, or late.
        """
        missing = [param.name for param in self.program.cascade.params if param.name not in tensors]
        if missing:
            raise _refusal("C334", f"the call does not give {missing[0]!r}", "pass every tensor by keyword")
        self.calls += 1
        self.issued = 0
        if self.executor is not None:
            if self.otherwise is not None:
                self._choose(self.executor, self.otherwise, tensors)
            return self.executor(tensors)
        worker = Worker(self, tensors, precision)
        for number in self.order:
            worker.run(number)
        return {result.name: worker.gathered(result.name) for result in self.program.cascade.results}

    def _choose(self, beside: Executor, row: Executor, tensors: Mapping[str, Tensor]) -> None:
        """Times both ways in turns, where there is a GPU to time them on, and keeps the faster one.

        How far a product and what reads the memory slow each other down is a matter of the one device: its clock drops
        with its power.
        """
        if not _can_time(next(iter(tensors.values())).device):
            return
        for way in (beside, row):
            way(tensors)  # compiles
        rounds = [(_ms(beside, tensors), _ms(row, tensors)) for _ in range(ROUNDS)]
        ms = [statistics.median(times) for times in zip(*rounds, strict=True)]
        self.executor, self.otherwise = (beside if ms[0] <= ms[1] else row), None
        chosen = "beside each other" if ms[0] <= ms[1] else "one after the other"
        self.why = f"{chosen}: tasks on sides of the device took {ms[0]:.3f} ms here, in a row {ms[1]:.3f} ms"

    def guarded(self, step: Collective, members: Sequence[int], run: Callable[[], None]) -> None:
        """Runs a collective; where it fails, the error says who has not come to it.

        On GPUs it is only launched: whether it ends in time is watched, and the error is printed.
        """
        self.issued += 1
        came = self.calls, self.issued
        try:
            self.store.set(f"{self.name} {self.calls} {self.rank}", str(self.issued))
            run()
        except RuntimeError as error:
            message = f"{self._failed(step, members, *came)}: {str(error).splitlines()[0]}"
            raise _refusal("C349", message, "see which rank ended, or raise the timeout of the group") from error
        if self.watch is not None and not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.current_stream().record_event()
            self.watch.add(event, lambda: f"error[C349]: {self._failed(step, members, *came)}: it did not end in time")

    def _failed(self, step: Collective, members: Sequence[int], call: int, issued: int) -> str:
        """Which collective failed, and which ranks have not come to it, as far as the store of the group can say."""
        failed = f"rank {self.rank}: the collective '{render_step(step)}' failed"
        try:
            came = {
                rank: int(self.store.get(key)) if self.store.check([key := f"{self.name} {call} {rank}"]) else 0
                for rank in members
            }
        except RuntimeError:  # the store was with a rank that is gone
            return failed
        late = [str(rank) for rank, count in came.items() if count < issued]
        return f"{failed}; rank {', '.join(late)} has not come to it" if late else failed


class Worker(Ranks):
    """One rank of a program: its own device, and collectives with the others."""

    def __init__(self, loaded: Loaded, tensors: Mapping[str, Tensor], precision: Precision) -> None:
        super().__init__(loaded.program, tensors, loaded.rank, precision)
        self.loaded = loaded
        self.device: Device = self.devices[0]

    def run(self, number: int) -> None:
        """One step on this rank."""
        step = self.program.steps[number]
        if isinstance(step, Compute):
            super().run(number)
            return
        members, group = self.loaded.groups[step.axes]
        exchange = self._merge if step.kind in REDUCING else self._pass_on if step.passes else self._receive
        self.loaded.guarded(step, members, lambda: exchange(step, members, group))

    # --- partial results ---------------------------------------------------------------------------------------------

    def _merge(self, step: Collective, members: Sequence[int], group: Any) -> None:
        unit = self.owner[step.tensor]
        reduced, name = reduction(unit), defines(unit.statements[0])[0]
        assert reduced is not None and reduced.reducer == step.reducer, "a plan merges by the reducer of its statement"
        at = {dim: (low, high) for dim, low, high in step.at}
        mine = [p for p in self.device.parts.get(name, ()) if all(p.box[dim] == window for dim, window in at.items())]
        for part in mine:
            self.device.parts[name].remove(part)
            merged = self._merged(reduced, part, len(members), group)
            place = members.index(self.loaded.rank)
            self.keep(self.device, reduced, part_of(merged, reduced, step.target, place, len(members)))

    def _merged(self, reduced: Reduction, part: Part, count: int, group: Any) -> Part:
        """The part of all members, on each: by the library where it knows the reducer."""
        small: list[Any] = [None] * count
        plain = reduced.reducer in OPERATIONS and isinstance(part.value, tuple)
        dist.all_gather_object(small, part.covered if plain else part, group)
        if plain and isinstance(part.value, tuple):
            covered = tuple(sorted(window for one in small for window in one))
            return Part(part.box, covered, (_all_reduced(part.value[0], reduced.reducer, group),))
        here = dict(zip(reduced.ranks, part.box, strict=True))
        covered = tuple(sorted(window for one in small for window in one.covered))
        return Part(part.box, covered, reduced.joined(self.device.machine, here, small))

    def _pass_on(self, step: Collective, members: Sequence[int], group: Any) -> None:
        """Partial results to the neighbour on one side, for those of the other; with hop 0 they are where they stay."""
        me, count = members.index(self.loaded.rank), len(members)
        parts = self.passed(self.device, step, me, count)
        if not step.arrived:
            to, of = (members[onward(me, hop, count)[1]] for hop in (step.hop, -step.hop))
            parts = _swapped(parts, to, of, me == 0, group)
        for part in parts:
            self.receive_part(self.device, step, part)

    # --- shards ------------------------------------------------------------------------------------------------------

    def _receive(self, step: Collective, members: Sequence[int], group: Any) -> None:
        me, shape, count = members.index(self.loaded.rank), self.shape(step.tensor), len(members)
        stored = self.device.machine.store.get(step.tensor)
        if stored is None:
            raise RuntimeError(f"this rank has nothing of {step.tensor}")
        boxes = [moved(step, shape, me, other, count) for other in range(count)]
        got: list[Tensor | None] = [None] * count
        packed = _packed(stored, self.device.held[step.tensor])
        if step.kind is Kind.ALL_GATHER:
            assert step.source is not None
            window = next(((low, high) for dim, low, high in step.at if dim == step.source), (0, shape[step.source]))
            longest = -(-(window[1] - window[0]) // count)
            own = _cut(packed, moved(step, shape, (me + 1) % count, me, count))
            own = _padded(own, step.source + 1, longest)
            pieces = [torch.empty_like(own) for _ in range(count)]
            dist.all_gather(pieces, own, group)
            got = [None if other == me else piece for other, piece in enumerate(pieces)]
        else:
            sends = {other: moved(step, shape, other, me, count) for other in range(count) if other != me}
            works = [dist.isend(_cut(packed, box), members[other], group) for other, box in sends.items() if box]
            for other, box in enumerate(boxes):
                if other != me and box is not None:
                    piece = torch.empty_like(_cut(packed, box))
                    dist.recv(piece, members[other], group)
                    got[other] = piece
            for work in works:
                if work is not None:
                    work.wait()
        for box, came in zip(boxes, got, strict=True):
            if box is not None and came is not None:
                receive(self.device, step.tensor, _unpacked(came, box, stored, step.source), box)

    def gathered(self, name: str) -> Tensor:
        """A result as all ranks together hold it."""
        result = next(result for result in self.program.cascade.results if result.name == name)
        data = self.device.machine.result(result)
        mask = self.device.held[name]
        mask = mask[tuple(slice(mask.shape[d] - extent, None) for d, extent in enumerate(data.shape))]
        pieces: list[Any] = [(mask, data)] * self.loaded.world
        if self.loaded.world > 1:
            dist.all_gather_object(pieces, (mask, data))
        whole = torch.zeros_like(data)
        for there, piece in pieces:
            whole = torch.where(there, piece, whole)
        return whole


def _can_time(device: torch.device) -> bool:
    """Whether there is a device whose clock can be asked now."""
    return device.type == "cuda" and not torch.cuda.is_current_stream_capturing()


def _ms(way: Executor, tensors: Mapping[str, Tensor]) -> float:
    """Milliseconds of a call on the current device, by its clock."""
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(TURNS):
        way(tensors)
    stop.record()
    stop.synchronize()
    return float(start.elapsed_time(stop)) / TURNS


def _exchanges(program: Program, task: Ordered) -> bool:
    """Whether a task does nothing but exchange."""
    steps = map(program.steps.__getitem__, task.steps)
    return all(isinstance(step, Collective) and not step.arrived for step in steps)


def _urgent(blocks: Sequence[int | None]) -> Any:
    """Of groups on GPUs: exchanges begin before what else waits, and take as many thread blocks as the plan has it."""
    if dist.get_backend() != "nccl":
        return None
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    options.config.max_ctas = max((count for count in blocks if count), default=options.config.max_ctas)
    return options


def _members(program: Program, axes: Axes) -> list[list[int]]:
    """The ranks of every group of devices that differ along these axes only, each in their order."""
    found: dict[tuple[tuple[str, int], ...], list[tuple[int, int]]] = {}
    for rank, place in enumerate(coordinates(program.axes)):
        others = tuple((name, at) for name, at in place.items() if name not in axes)
        found.setdefault(others, []).append((number_along(place, axes, program.axes), rank))
    return [[rank for _, rank in sorted(group)] for group in found.values()]


def _all_reduced(value: v.Value, reducer: str, group: Any) -> v.Value:
    """A value merged over a group: absent elements count as the identity, and are present where any rank has one."""
    present = torch.ones_like(value.data, dtype=torch.bool) if value.present is None else value.present
    identity = torch.as_tensor(v.identity_of(reducer, value.data.dtype), dtype=value.data.dtype)
    data = torch.where(present, value.data, identity).contiguous()
    dist.all_reduce(data, OPERATIONS[reducer][0], group)
    there = present.to(torch.uint8).contiguous()
    dist.all_reduce(there, dist.ReduceOp.MAX, group)
    return replace(value, data=data, present=None if bool(there.all()) else there.bool())


def _swapped(given: list[Any], to: int, of: int, late: bool, group: Any) -> list[Any]:
    """Objects of one neighbour, for this rank's to the other; one rank of a ring sends late, or all would wait."""
    came: list[Any] = [None]
    if late:
        dist.recv_object_list(came, of, group)
    dist.send_object_list([given], to, group)
    if not late:
        dist.recv_object_list(came, of, group)
    (found,) = came
    return list(found)


def _packed(stored: Stored, held: Tensor) -> Tensor:
    """The data of a tensor, where it is present, and where this rank has it, in one tensor."""
    present = torch.ones_like(held) if stored.present is None else stored.present
    wide = torch.float64 if stored.data.is_floating_point() else torch.int64
    return torch.stack([stored.data.to(wide), present.to(wide), held.to(wide)])


def _cut(packed: Tensor, box: tuple[tuple[int, int], ...] | None) -> Tensor:
    assert box is not None
    return packed[(slice(None), *(slice(low, high) for low, high in box))].contiguous()


def _padded(piece: Tensor, dim: int, length: int) -> Tensor:
    """The piece with zeros behind it, as long as the longest."""
    rest = list(piece.shape)
    rest[dim] = length - piece.shape[dim]
    return torch.cat([piece, piece.new_zeros(rest)], dim).contiguous()


def _unpacked(
    piece: Tensor, box: tuple[tuple[int, int], ...], stored: Stored, dim: int | None
) -> tuple[Stored, Tensor]:
    """What another rank sent, in buffers of the full shape."""
    if dim is not None:
        piece = piece.narrow(dim + 1, 0, box[dim][1] - box[dim][0])
    whole = torch.zeros((3, *stored.data.shape), dtype=piece.dtype)
    whole[(slice(None), *(slice(low, high) for low, high in box))] = piece
    present = whole[1].bool() | ~whole[2].bool()
    data = whole[0].to(stored.data.dtype)
    return replace(stored, data=data, present=None if bool(present.all()) else present), whole[2].bool()


def _refusal(code: str, message: str, hint: str) -> CallError:
    return CallError(Diagnostic(code, message, help=hint))
