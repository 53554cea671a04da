"""A plan: a cascade laid over a machine of several devices, its tokens split where that pays, scheduled and checked.

    plan(canonical, {"T": 4096, ...}, node("h100x8"))      cuts, tasks, queues and waits, makespan and bound

The mesh and what is sharded are those of the schedule; what it leaves open is chosen by cost (`passes/shard.py`). A
`split` of the schedule gives cuts; without one the rank that most steps can be split along is cut in two, the cut is
searched, and declined where the whole is faster. Exchanges run apart, or as one kernel with what is computed around
them, whichever the model says is faster; or part by part (`decompose.py`), where that beats the cut. Of what is taken
it is proved that no device lacks anything; the timetable and its queues go through the checker, which shares nothing
with the scheduler.

On a node of one device nothing is exchanged and no mesh is needed: tasks that do not need each other, those of two
slices above all, run beside each other on shares of its SMs (`beside.py`), or one after the other where that gains
little.

All times are modelled. A plan is data: it is made anywhere, and carries its version and a hash of the cascade, the
machine and the sizes, by which whoever runs it refuses another one.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cascade.backends.distributed.beside import LEAST_GAIN, SIDE_QUEUES, kept_apart, partitions, shared_problem, sides
from cascade.backends.distributed.decompose import Decomposed, decompositions
from cascade.backends.distributed.fused import awaited, fused, stored
from cascade.backends.distributed.kernels import (
    IN,
    OUT,
    SMS,
    TILES,
    Clock,
    Group,
    Layer,
    groups,
    launches,
    layer_of,
    problem_of,
)
from cascade.backends.distributed.machine import Node
from cascade.errors import Diagnostic, InternalError, UnsupportedError
from cascade.inference import bind_sizes
from cascade.ir import Cascade, DType, Mesh, Split
from cascade.passes.reach import Box, Reach, left_over, meet
from cascade.passes.schedule_bound import lower_bound
from cascade.passes.schedule_overlap import (
    cycle_us, exact_schedule, exposed_us, list_schedule, queues_of, repeated, searched, serial_us,
)  # fmt: skip
from cascade.passes.shard import cheapest, undivided
from cascade.passes.split_tokens import Cut, Touches, best_cut, dependencies, lacks, sliced, split, split_ranks
from cascade.placed import Collective, Compute, Program, Step, render_program
from cascade.text import render
from cascade.timetable import Problem, Queues, Timetable
from cascade.verify.rings import check_rings
from cascade.verify.timetable import check_queues, check_timetable, over_synchronised
from cascade.walk import targets

VERSION = 3
"""Of the JSON of a plan."""

ROUGH = 0
"""The width of the search behind a list schedule, for every cut and way that is tried: critical paths alone."""

JUDGED = 4
"""That of the search by which a way that may be taken is judged: layers in a row are up to a tenth faster than by
critical paths, which go on with the other slice where the exchange of one could begin."""

LARGEST = 20
"""Tasks of a program without slices that is judged so: with more, such as two layers, a search of its slices takes as
long as all the rest."""

FAR = 4
"""How far partitions of a device that are tried first lie apart, in what a driver gives together."""

COPIES = 3
"""Layers in a row by which one that follows itself is judged."""


@dataclass(frozen=True, slots=True)
class Way:
    """How exchanges run: `apart`, `fused` with what is local to their rows, by so many thread blocks, or tile by tile:
    `stored` by the product before them, `awaited` by the one behind them.

    On one device, how tasks run: `apart`, or `beside` each other, `first` being the SMs of side a.
    """

    name: str
    blocks: int | None = None
    first: int | None = None


APART = Way("apart")
QUEUES = (OUT, IN, *SIDE_QUEUES, SMS)
"""Resources by which tasks are queued: of those that one holds, the first."""


@dataclass(frozen=True, slots=True)
class Tried:
    """An exchange part by part: which, in which parts, how long it takes so and without; whether it is kept.

    `alone`: the times are estimates of the exchange and its statement alone, else of the program.
    """

    name: str
    parts: str
    us: float
    without_us: float
    kept: bool
    alone: bool

    def __str__(self) -> str:
        """What came of it, with the number."""
        change = 100 * (self.us / self.without_us - 1)
        than = f"{abs(change):.1f} % {'less' if change < 0 else 'more'} than {self.without_us:.1f} us"
        what = "it and its statement take" if self.alone else "the layer takes"
        return f"{self.name} in {self.parts}: {what} {self.us:.1f} us, {than} without"


@dataclass(frozen=True, slots=True)
class Parts:
    """What a search for exchanges part by part came to: what was tried, and why the plan has none, if it has none."""

    tried: tuple[Tried, ...]
    declined: str | None

    @property
    def kept(self) -> tuple[Tried, ...]:
        """Those of the plan."""
        return tuple(one for one in self.tried if one.kept) if self.declined is None else ()


@dataclass(frozen=True, eq=False)
class Plan:
    """What was decided, and how good it is: times in microseconds, on one device as on all.

    `way` is how exchanges run; `row` are the tasks of a copy where layers follow each other, and `launches` how often
    the host launches something for it.
    """

    program: Program
    node: Node
    rank: str | None
    cut: Cut
    way: Way
    parts: Parts
    problem: Problem
    steps: tuple[tuple[int, ...], ...]
    row: Layer
    timetable: Timetable
    queues: Queues
    bound_us: float
    serial_us: float
    cycle_us: float | None
    launches: int


def plan(
    cascade: Cascade, sizes: Mapping[str, int], node: Node, dtype: DType = DType.BF16, exact: bool = False
) -> Plan:
    """The plan of a canonical cascade; `exact` asks the solver for the schedule of what the search took.

    Raises C551 without a mesh where there are several devices, C554 where the machine has fewer of them than the mesh,
    C553 where cuts of the schedule cannot be.
    """
    return _planned(_laid_out(cascade, sizes, node, dtype), node, exact, True)


def whole(cascade: Cascade, sizes: Mapping[str, int], node: Node, dtype: DType = DType.BF16) -> Plan:
    """The same without slices and with every exchange in one piece: what a plan is compared with. Raises as `plan`."""
    return _planned(_laid_out(cascade, sizes, node, dtype), node, False, False, False)


def _laid_out(cascade: Cascade, sizes: Mapping[str, int], node: Node, dtype: DType) -> Program:
    """The cascade over the mesh of its schedule; on one device, whole."""
    bound = bind_sizes(cascade, {}, sizes)
    if node.devices > 1:
        return cheapest(cascade, bound, node, dtype)
    _enough(stated_devices(cascade, bound), node)
    return undivided(cascade, bound)


def plan_of(program: Program, node: Node, exact: bool = False) -> Plan:
    """The plan of a program that was laid out before, as one whose collectives were rewritten (`passes/exchanges.py`):
    they stay what they are.

    Raises C554 and C553 as `plan` does.
    """
    return _planned(program, node, exact, False)


def _planned(program: Program, node: Node, exact: bool, decompose: bool, slices: bool = True) -> Plan:
    """The plan of a program; `decompose`, whether its exchanges may go part by part, `slices`, whether it is split, and
    on one device whether anything runs beside anything."""
    _enough(program.devices(tuple(axis.name for axis in program.axes)), node)
    first = _Maker(program, node)
    rank, cut = first.search() if slices else (None, Cut((), "none is looked for", first.serial_us, None))
    maker, cut, parts = _in_parts(first, cut) if decompose else (first, cut, Parts((), "none is looked for"))
    chosen = split(maker.program, rank, cut.cuts) if rank is not None and cut.cuts else maker.program
    made = maker.whole if chosen is maker.program else maker.made(chosen)
    best_us, way = maker.best(made, chosen)
    problem, layer = made.problem(chosen, maker.clock, way)
    timetable = exact_schedule(problem) if exact else list_schedule(problem)
    if node.devices == 1 and (why := _why_apart(timetable.makespan_us, first.serial_us, layer, cut, slices)):
        cut, way, chosen, made = dataclasses.replace(cut, cuts=(), declined=why), APART, program, first.whole
        problem, layer = made.problem(chosen, first.clock, way)
        timetable = list_schedule(problem)
    apart = kept_apart(problem, timetable) if way.name == "beside" else problem
    queues = queues_of(apart, timetable, QUEUES)
    wrong = [
        *check_rings(chosen), *check_timetable(problem, timetable), *check_queues(apart, queues),
        *over_synchronised(apart, queues),
    ]  # fmt: skip
    if wrong:
        raise InternalError(f"the schedule of a plan is not valid: {wrong[0]}")
    return Plan(
        chosen, node, rank, cut, way, parts, problem, layer.steps, made.of(way)[1], timetable, queues,
        lower_bound(problem), first.serial_us, best_us if made.repeats else None,
        made.launches(chosen, maker.clock, way),
    )  # fmt: skip


def stated_devices(cascade: Cascade, sizes: Mapping[str, int]) -> int:
    """How many devices the mesh of the schedule has, one without a mesh."""
    meshes = (item for item in cascade.schedule if isinstance(item, Mesh))
    return math.prod(item.size if isinstance(item.size, int) else sizes[item.size] for item in meshes)


def _enough(devices: int, node: Node) -> None:
    if devices > node.devices:
        message = f"the mesh has {devices} devices and {node.name} has {node.devices}"
        raise UnsupportedError(Diagnostic("C554", message, help="a smaller mesh, or another --machine"))


def _why_apart(us: float, serial: float, layer: Layer, cut: Cut, slices: bool) -> str | None:
    """Why tasks of one device run one after the other, all on all SMs; None where overlap is worth it."""
    if not slices:
        return cut.declined
    if us <= (1 - LEAST_GAIN) * serial:
        return None
    if len(layer.steps) < 2:
        return f"there is one task; {cut.declined}"
    gain = 100 * (1 - us / serial)
    said = "no less than" if gain < 0.05 else f"{gain:.1f} % less than"
    where = f", cut at {', '.join(map(str, cut.cuts))}," if cut.cuts else ""
    why = f"beside each other tasks{where} take {us:.1f} us, {said} {serial:.1f} us one after the other"
    return why if cut.declined is None else f"{why}; {cut.declined}"


def _in_parts(whole: _Maker, cut: Cut) -> tuple[_Maker, Cut, Parts]:
    """The program with exchanges part by part where that is faster than any cut, or the one that there is.

    Cuts that the schedule gives are taken as they are.
    """
    if whole.is_cut:
        return whole, cut, Parts((), "the schedule says where to cut")
    best = min(cut.whole_us, cut.split_us or cut.whole_us)
    maker, us, tried = whole.decomposed(cut.whole_us, best)
    if us >= best:
        return whole, cut, Parts(tried, _why_whole(tried, us, cut.whole_us, best))
    if lacking := next(lacks(maker.program), None):
        raise InternalError(f"device {lacking[1]} would lack {lacking[2]} for an exchange in parts")
    loss = f"{best:.1f} us, {100 * (best / us - 1):.1f} % more than {us:.1f} us with exchanges in parts"
    declined = f"the best cut, at {cut.cuts[0]}, takes {loss}" if cut.cuts else cut.declined
    return maker, dataclasses.replace(cut, cuts=(), declined=declined), Parts(tried, None)


def _why_whole(tried: Sequence[Tried], us: float, whole_us: float, best_us: float) -> str:
    """Why no exchange goes part by part: no way, no gain for one alone, or less than slices gain."""
    saved = sum(max(0.0, one.without_us - one.us) for one in tried if one.alone)
    if us < whole_us:
        return f"the layer takes {us:.1f} us, {100 * (us / best_us - 1):.1f} % more than {best_us:.1f} us in slices"
    if saved:
        return f"they save {saved:.1f} us at most of {whole_us:.1f} us, and slices {whole_us - best_us:.1f} us"
    return str(min(tried, key=lambda one: one.us / one.without_us)) if tried else "no exchange can go part by part"


def in_a_row(found: Plan, copies: int) -> Problem:
    """So many copies of a layer as one problem; one where it does not follow itself."""
    if found.node.devices == 1:
        return found.problem
    one = problem_of(found.program, found.row, Clock.of(found.program, found.node), found.way.blocks)
    return repeated(one, found.row.carried, copies) if found.row.carried else one


def carried_on(program: Program, steps: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """Pairs of a task and one that it needs of the copy before, where a result is the parameter of the next.

    That is where it has the shape and the shards of a parameter, the only one that does.
    """
    touches = Touches.of(program)
    shape = touches.reach.shape
    given: dict[str, set[tuple[int, Box]]] = {}
    for one in touches.given():
        given.setdefault(one.tensor, set()).add((one.device, one.box))
    found: set[tuple[int, int]] = set()
    for result in program.cascade.results:
        alike = [param.name for param in program.cascade.params if shape(param.name) == shape(result.name)]
        written = [
            (task, one.device, one.box)
            for task, own in enumerate(steps)
            for step in own
            for one in touches.writes(program.steps[step])
            if one.tensor == result.name and not one.partial
        ]
        covered: dict[int, list[Box]] = {}
        for _, device, box in written:
            covered.setdefault(device, []).append(box)
        if len(alike) != 1 or any(left_over(box, covered.get(device, ())) for device, box in given[alike[0]]):
            continue
        for task, own in enumerate(steps):
            reads = [one for step in own for one in touches.reads(program.steps[step]) if one.tensor == alike[0]]
            found |= {
                (task, other) for one in reads for other, device, box in written
                if device == one.device and meet(box, one.box)
            }  # fmt: skip
    return sorted(found)


@dataclass(frozen=True, slots=True)
class _Made:
    """The tasks of a program, which depend on where cuts lie in their times only: for every way in which exchanges can
    run, those of one copy alone and those in a row of copies."""

    layers: Mapping[str, tuple[Layer, Layer]]

    @property
    def repeats(self) -> bool:
        """Whether a copy needs something of the one before it."""
        return bool(self.layers[APART.name][1].carried)

    def problem(self, program: Program, clock: Clock, way: Way) -> tuple[Problem, Layer]:
        """The tasks of one copy with their times."""
        layer = self.of(way)[0]
        if clock.node.devices == 1:
            return shared_problem(program, layer, clock, way.first), layer
        return problem_of(program, layer, clock, way.blocks), layer

    def of(self, way: Way) -> tuple[Layer, Layer]:
        """The tasks of one copy alone and of one in a row; on one device the same ones for every way."""
        return self.layers.get(way.name, self.layers[APART.name])

    def time_us(self, program: Program, clock: Clock, way: Way, below_us: float = math.inf) -> float:
        """From one copy to the next where they follow each other, else the makespan; where it is not below a time, some
        time that is not either.

        The host launches a copy while another one runs: where that takes longer, it is what counts.
        """
        if way.first is not None:
            return searched(self.problem(program, clock, way)[0], below_us=below_us).makespan_us
        return self.by(lambda problem: list_schedule(problem, ROUGH), program, clock, way)

    def judged_us(self, program: Program, clock: Clock, way: Way) -> float:
        """The same by a search, of a way that is taken."""
        return self.by(lambda problem: searched(problem, JUDGED), program, clock, way)

    def by(self, schedule: Callable[[Problem], Timetable], program: Program, clock: Clock, way: Way) -> float:
        """The time by the timetables of a scheduler."""
        if not self.repeats:
            return schedule(self.problem(program, clock, way)[0]).makespan_us
        layer = self.layers[way.name][1]
        device_us = cycle_us(problem_of(program, layer, clock, way.blocks), layer.carried, COPIES, schedule)
        return max(device_us, clock.node.host_us * self.launches(program, clock, way))

    def launches(self, program: Program, clock: Clock, way: Way) -> int:
        """How often the host launches something for one copy of a row."""
        return launches(program, self.of(way)[1], clock.reach)


class _Maker:
    """What stays the same while cuts are tried: the groups and the clock."""

    def __init__(self, program: Program, node: Node) -> None:
        self.program = program
        self.reach = Reach.of(program.cascade, dict(program.sizes))
        self.needs = dependencies(program)
        self.found: tuple[Group, ...] = groups(program, self.needs)
        self.clock = Clock.of(program, node)
        self.times: dict[tuple[Step, ...], dict[Way, float]] = {}
        self.judged: dict[tuple[Step, ...], dict[Way, float]] = {}
        self.whole = self.made(program)

    def made(self, program: Program) -> _Made:
        """The tasks of the program, or of the program in slices."""
        per_step: list[list[int]] = []
        at = 0
        for step in self.program.steps:
            own = [at]
            while program.steps[at].at != step.at and at + 1 < len(program.steps) and _same(program, at, at + 1):
                at += 1
                own.append(at)
            per_step.append(own)
            at += 1
        alone = layer_of(self.found, per_step, self.needs if program is self.program else dependencies(program))
        follows = self.clock.node.devices > 1  # on one device a copy is judged, and run, by itself
        cycle = dataclasses.replace(alone, carried=tuple(carried_on(program, alone.steps)) if follows else ())
        layers = {APART.name: (alone, cycle)}
        for name, may, joined in (
            ("fused", bool(self.clock.node.fused), fused), ("stored", self.clock.node.stores is not None, stored),
            ("awaited", self.clock.node.awaits, awaited),
        ):  # fmt: skip
            if may and (other := joined(program, cycle, self.reach)) != cycle:
                layers[name] = joined(program, alone, self.reach), other
        return _Made(layers)

    @property
    def serial_us(self) -> float:
        """How long the program takes that is not split, one task after the other."""
        return serial_us(self.whole.problem(self.program, self.clock, APART)[0])

    def best(self, made: _Made, program: Program, rough: bool = False) -> tuple[float, Way]:
        """The least time, judged by a search, and the way that reaches it; a rough one tries one number of thread
        blocks, or partitions that lie apart, and is not judged."""
        ways, tried = [APART], self.clock.node.slots if rough else 0
        if self.clock.node.devices == 1:
            ways.append(self._partition(made, program, rough))
        if "fused" in made.layers:
            ways += [Way("fused", blocks) for blocks in ((tried,) if tried else self.clock.node.fused)]
        if not tried:
            ways += [Way(name) for name in ("stored", "awaited") if name in made.layers]
        times = [self._time_us(made, program, way) for way in ways]
        us, way = min(zip(times, ways, strict=True), key=lambda pair: pair[0])
        if rough or way.first is not None or len(self.whole.of(APART)[0].steps) > LARGEST:
            return us, way
        return min(us, self._judged_us(made, program, way)), way

    def _judged_us(self, made: _Made, program: Program, way: Way) -> float:
        """The time of a program by a search of the way that is taken; what was asked before is kept."""
        known = self.judged.setdefault(program.steps, {})
        if way not in known:
            known[way] = made.judged_us(program, self.clock, way)
        return known[way]

    def _time_us(self, made: _Made, program: Program, way: Way, below_us: float = math.inf) -> float:
        """The time of a program by one way, or some time that is not below one; what was asked before is kept."""
        known = self.times.setdefault(program.steps, {})
        if way not in known:
            found = made.time_us(program, self.clock, way, below_us)
            if found >= below_us:
                return found
            known[way] = found
        return known[way]

    def _partition(self, made: _Made, program: Program, rough: bool) -> Way:
        """The partition of one device of least time: those that lie apart first, then nearer ones around the best."""
        ways = [Way("beside", first=first) for first in partitions(self.clock.node)]
        step = FAR if rough else FAR // 2
        times: dict[int, float] = {}

        def try_all(places: Iterable[int]) -> None:
            for at in places:
                times[at] = self._time_us(made, program, ways[at], min(times.values(), default=math.inf))

        try_all(range(step // 2, len(ways), step))
        while step > (FAR // 2 if rough else 1):
            step //= 2
            best = min(times, key=lambda at: times[at])
            try_all({max(0, best - step), min(len(ways) - 1, best + step)} - times.keys())
        return ways[min(times, key=lambda at: times[at])]

    def search(self) -> tuple[str | None, Cut]:
        """The rank that is split and where, or why it is not."""
        whole, _ = self.best(self.whole, self.program)
        rank, fixed = self._stated()
        rank = rank or self._widest()
        if rank is None:
            return None, Cut((), "no rank of a result can be split", whole, None)
        known: list[_Made] = []

        def time_us(cuts: tuple[int, ...], rough: bool) -> float:
            if not cuts:
                return whole
            program = sliced(self.program, rank, cuts)
            if not known:  # where a single cut lies does not change which slices meet
                known.append(self.made(program))
            return self.best(known[0], program, rough)[0]

        return rank, best_cut(self.reach.full[rank][1], TILES[0][0], time_us, [fixed] if fixed else [])

    def decomposed(self, whole_us: float, limit_us: float) -> tuple[_Maker, float, tuple[Tried, ...]]:
        """The program with every exchange part by part that makes it faster, how long it then takes, what was tried.

        Each in the parts that do best for it and its statement alone. No program is made where what it and those behind
        it save alone does not come below a limit: those are estimates.
        """
        alone = [(step, _least(decompositions(self.program, step, self.clock))) for step in self._exchanges()]
        saved = sum(max(0.0, way.apart_us - way.us) for _, way in alone if way is not None)
        found, us = self, whole_us
        tried: list[Tried] = []
        for step, way in alone:
            name, left = f"{step.kind.value} {step.tensor}", saved
            saved -= max(0.0, way.apart_us - way.us) if way is not None else 0.0
            if way is not None and (way.us >= way.apart_us or us - left >= limit_us):
                tried.append(Tried(name, way.parts, way.us, way.apart_us, False, True))
            elif (again := _least(decompositions(found.program, step, found.clock))) is not None:
                other = _Maker(again.program, self.clock.node)
                other_us, _ = other.best(other.whole, again.program)
                tried.append(Tried(name, again.parts, other_us, us, other_us < us, False))
                if other_us < us:
                    found, us = other, other_us
        return found, us, tuple(tried)

    def _exchanges(self) -> Iterator[Collective]:
        return (step for step in self.program.steps if isinstance(step, Collective))

    @property
    def is_cut(self) -> bool:
        """Whether the schedule says where to cut."""
        return any(isinstance(item, Split) for item in self.program.cascade.schedule)

    def _stated(self) -> tuple[str | None, tuple[int, ...]]:
        """The rank and the cuts that the schedule gives; the first split is taken."""
        for item in self.program.cascade.schedule:
            if isinstance(item, Split):
                extent, parts = self.reach.full[item.rank][1], item.parts
                count = 0 if parts is None else self.reach.extent(parts)
                return item.rank, item.cuts or tuple(extent * part // count for part in range(1, count))
        return None, ()

    def _widest(self) -> str | None:
        """The rank along which most units and exchanged tensors can be split, of those of results."""
        results = {result.name for result in self.program.cascade.results}
        best: tuple[int, str | None] = (0, None)
        for unit in self.reach.units.values():
            for stmt in unit.statements:
                for target in targets(stmt):
                    for rank in target.ranks if target.name in results else ():
                        along, dims = split_ranks(self.reach, rank)
                        best = max(best, (len(along) + len(dims), rank), key=lambda pair: pair[0])
        return best[1]


def _least(ways: Iterable[Decomposed]) -> Decomposed | None:
    """The way that gains most, or loses least, for an exchange and its statement alone."""
    return min(ways, key=lambda way: way.us - way.apart_us, default=None)


def _same(program: Program, one: int, other: int) -> bool:
    """Whether two steps are slices of one."""
    first, second = program.steps[one], program.steps[other]
    if isinstance(first, Compute):
        return isinstance(second, Compute) and dataclasses.replace(first, at=second.at) == second
    return isinstance(second, Collective) and dataclasses.replace(first, at=second.at) == second


# --- as JSON, as a trace, as text ------------------------------------------------------------------------------------


def fingerprint(cascade: Cascade, sizes: Mapping[str, int], machine: str) -> str:
    """What a plan is of: a hash of the cascade, the machine and the sizes."""
    said = json.dumps([VERSION, render(cascade), sorted(sizes.items()), machine])
    return hashlib.sha256(said.encode()).hexdigest()


def plan_json(found: Plan) -> dict[str, Any]:
    """The plan with stable keys; times in microseconds, `waits` by name."""
    return {
        "version": VERSION,
        "hash": fingerprint(found.program.cascade, dict(found.program.sizes), found.node.name),
        "machine": found.node.name,
        "split": {"rank": found.rank, "cuts": list(found.cut.cuts)} if found.cut.cuts else None,
        "declined": found.cut.declined,
        "makespan_us": found.timetable.makespan_us,
        "bound_us": found.bound_us,
        "optimal": found.timetable.optimal,
        "serial_us": found.serial_us,
        "cycle_us": found.cycle_us,
        "launches": found.launches,
        "exchange": {"way": found.way.name, "blocks": found.way.blocks},
        "parts": {
            "kept": [{"exchange": one.name, "in": one.parts} for one in found.parts.kept],
            "declined": found.parts.declined,
        },
        **({"partition": _partition(found), "otherwise": _otherwise(found)} if found.node.devices == 1 else {}),
        "exposed_comm_us": exposed_us(found.problem, found.timetable, (OUT, IN), SMS),
        "tasks": _tasks_json(found),
        "program": render_program(found.program),
        "cascade": render(found.program.cascade),
    }


def _tasks_json(found: Plan) -> list[dict[str, Any]]:
    """The tasks in the order in which they start."""
    names, slots = [task.name for task in found.problem.tasks], found.timetable.slots
    queue = {task: name for name, tasks in found.queues.queues for task in tasks}
    waits: dict[int, list[str]] = {}
    for task, other in found.queues.waits:
        waits.setdefault(task, []).append(names[other])
    return [
        {
            "name": names[task],
            "resource": queue[task],
            "mode": found.problem.tasks[task].modes[slots[task].mode].name,
            "start": slots[task].start_us,
            "end": slots[task].end_us,
            "waits": waits.get(task, []),
            "sms": int(found.problem.tasks[task].modes[slots[task].mode].demand(SMS)),
            "steps": list(found.steps[task]),
        }
        for task in sorted(range(len(names)), key=lambda task: (slots[task].start_us, task))
    ]


def _otherwise(found: Plan) -> dict[str, Any] | None:
    """What one device runs where sides gain nothing: every statement whole, one task after the other; None without."""
    if found.way.first is None:
        return None
    program = undivided(found.program.cascade, dict(found.program.sizes))
    instead = _planned(program, found.node, False, False, False)
    return {"tasks": _tasks_json(instead), "program": render_program(program)}


def _partition(found: Plan) -> list[int] | None:
    """The SMs of both sides of the device; None where no task is confined."""
    return None if found.way.first is None else list(sides(found.node, found.way.first).values())


def trace_json(found: Plan) -> dict[str, Any]:
    """The timetable as Chrome trace events, a row for each queue, which Perfetto opens."""
    events: list[dict[str, Any]] = []
    for row, (name, tasks) in enumerate(found.queues.queues):
        events.append({"name": "thread_name", "ph": "M", "pid": 0, "tid": row, "args": {"name": name}})
        for task in tasks:
            slot = found.timetable.slots[task]
            events.append({
                "name": found.problem.tasks[task].name, "ph": "X", "pid": 0, "tid": row,
                "ts": slot.start_us, "dur": slot.end_us - slot.start_us,
            })  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _sms_text(found: Plan) -> str:
    """How the SMs of one device are shared."""
    parts = _partition(found)
    return f"all {found.node.gpu.sms} for every task" if parts is None else f"{parts[0]} beside {parts[1]}, or all"


def _exchanges_text(found: Plan) -> list[str]:
    """How exchanges run, and what they leave exposed."""
    blocks = f", {found.way.blocks} thread blocks each" if found.way.blocks else ""
    lines = [f"exchanges: {found.way.name}{blocks}"]
    kept = ", ".join(f"{one.name} in {one.parts}" for one in found.parts.kept)
    lines += [f"exchanges in parts: {kept or 'none'}" + (f"; {found.parts.declined}" if not kept else "")]
    exposed = exposed_us(found.problem, found.timetable, (OUT, IN), SMS)
    return [*lines, f"exposed communication: {exposed:.1f} us"]


def plan_text(found: Plan, width: int = 72) -> str:
    """The plan for a person: what was decided, a line of time for every queue, when each task runs."""
    end = found.timetable.makespan_us
    split_text = f"{found.rank} at {', '.join(map(str, found.cut.cuts))}" if found.cut.cuts else "none"
    lines = [f"{found.node.name}, modelled: {end:.1f} us, bound {found.bound_us:.1f}, serial {found.serial_us:.1f}"]
    lines += [f"split: {split_text}" + (f"; {found.cut.declined}" if found.cut.declined else "")]
    lines += [*(_exchanges_text(found) if found.node.devices > 1 else [f"SMs: {_sms_text(found)}"]), ""]
    for name, tasks in found.queues.queues:
        row = [" "] * width
        for number, task in enumerate(tasks):
            slot = found.timetable.slots[task]
            first = min(width - 1, int(slot.start_us / end * width))
            for place in range(first, max(first + 1, int(slot.end_us / end * width))):
                row[place] = "#="[number % 2]
        lines.append(f"{name:8} |{''.join(row)}|")
    order = sorted(range(len(found.problem.tasks)), key=lambda task: (found.timetable.slots[task].start_us, task))
    lines.append("")
    for task in order:
        slot = found.timetable.slots[task]
        lines.append(f"{slot.start_us:10.1f} {slot.end_us:10.1f}  {found.problem.tasks[task].name}")
    return "\n".join(lines)
