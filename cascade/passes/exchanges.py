"""Rewrites of the collectives of a distributed program, each with what it proves before it changes anything.

    R2  scatter_gather   all-reduce Y                      = reduce-scatter Y to t; all-gather Y from t
    R3  gather_later     all-gather X from t; compute S    = compute S along t; all-gather S from t
    R4  by_shards        all-gather X from t; compute S    = compute S at its own shard, then at each that comes by
    R4  by_rows         compute S along k; scatter S to t = compute S at a shard of t, farthest first, add, pass it on
    R4  by_parts         compute S along k; scatter S to t = compute S at a part of n, scatter that, then the next part
    R6  refactor_axis    all-reduce over tp = 8            = all-reduce over inner = 4; all-reduce over outer = 2
    R7  another_form     compute Y along k; all-reduce Y   = all-gather X; compute Y along n; all-gather Y

What cannot be proved is refused with the reason (C552). They take programs that are not yet split into slices, and
their results mean the same, up to the order in which sums are taken.

Sources: R2 is the decomposition of Thakur et al., "Optimization of Collective Communication Operations in MPICH"
(2005); R3 and R2 together are sequence parallelism (arXiv 2205.05198); R4 is "Overlap Communication with Dependent
Computation via Decomposition" (Wang et al., ASPLOS 2023), by groups of waves FlashOverlap (2504.19519); R6 is
hierarchical reduction; R7 is used by NanoFlow (arXiv 2408.12757). R4 over a fold of keys is ring attention
(2310.01889), both ways TokenRing (2412.20501); R4 along rows is also async tensor parallelism of PyTorch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NoReturn

from cascade.errors import Diagnostic, UnsupportedError
from cascade.ir import Mesh, Rank, Read, Stmt
from cascade.ops import OPS, REDUCERS
from cascade.passes.reach import units_by_name
from cascade.passes.shard import FOLD, Held, Sharding
from cascade.placed import (
    REDUCING, Along, Axes, Axis, Collective, Compute, Kind, Place, Program, Step, slices,
)  # fmt: skip
from cascade.walk import expressions, reads, targets, walk
from cascade.wording import quote


def scatter_gather(program: Program, number: int, dim: int) -> Program:
    """R2: the all-reduce of step `number` as a reduce-scatter to a dimension and an all-gather.

    Proves: the dimension is not sharded already, and has a coordinate for every device. States of a fold, which are
    several tensors, are merged for everyone.
    """
    step = _collective(program, number, Kind.ALL_REDUCE)
    if step.reducer == FOLD:
        _refuse(f"the states of {quote(step.tensor)} are merged for everyone")
    sharding = Sharding(program.cascade, dict(program.sizes))
    shape = sharding.reach.shape(step.tensor)
    if not 0 <= dim < len(shape) or shape[dim] < program.devices(step.axes):
        _refuse(f"dimension {dim} of {quote(step.tensor)} has no coordinate for each of the devices")
    if any(at == dim for at, _ in made(program, step.tensor)):
        _refuse(f"dimension {dim} of {quote(step.tensor)} is sharded already")
    scatter = dataclasses.replace(step, kind=Kind.REDUCE_SCATTER, target=dim)
    gather = Collective(Kind.ALL_GATHER, step.tensor, step.axes, source=dim)
    return _with_steps(program, (*program.steps[:number], scatter, gather, *program.steps[number + 1 :]))


def gather_later(program: Program, number: int) -> Program:
    """R3: the all-gather of step `number` behind the first statement that reads its tensor, on what that defines.

    Proves: the statement runs everywhere over these axes, keeps a rank that stands plainly at the gathered dimension,
    and finds in the shards all that it reads of the tensor. Where others need the tensor whole, it is gathered for
    them behind the statement.
    """
    step = _collective(program, number, Kind.ALL_GATHER)
    sharding = Sharding(program.cascade, dict(program.sizes))
    at = next((i for i in range(number + 1, len(program.steps)) if _reads(program.steps[i], step.tensor, sharding)), 0)
    reader = program.steps[at]
    if not at or not isinstance(reader, Compute):
        _refuse(f"no statement reads {quote(step.tensor)} behind its all-gather")
    if any(set(along.axes) & set(step.axes) for along in reader.along):
        _refuse(f"{quote(reader.name)} is spread over {'*'.join(step.axes)} already")
    held = _held_before(program, number)
    stmts = sharding.reach.units[reader.name].statements
    ranks = sharding.possible(sharding.reach.units[reader.name])
    for rank in ranks:
        local = dataclasses.replace(reader, along=(*reader.along, Along(rank, step.axes)))
        kept = all(rank in target.ranks for stmt in stmts for target in targets(stmt))
        if kept and _at(stmts, step.tensor, rank, step.source) and sharding.is_enough(local, step.tensor, held):
            break
    else:
        _refuse(f"{quote(reader.name)} is not local to the shards of {quote(step.tensor)}")
    gathers = [
        Collective(Kind.ALL_GATHER, target.name, step.axes, source=target.ranks.index(rank))
        for stmt in stmts
        for target in targets(stmt)
    ]
    others = _needed_whole(program, at, step, held, sharding)
    steps = (*program.steps[:number], *program.steps[number + 1 : at], local, *gathers, *((step,) if others else ()))
    return _needed(_with_steps(program, (*steps, *program.steps[at + 1 :])), sharding)


def by_shards(program: Program, number: int, both_ways: bool = False) -> Program:
    """R4: the all-gathers from step `number` on and the statement behind them, shard by shard as they come by.

    Each device starts with the shard it has: the order of tiles is another on each, and where it stands undoes it.
    Along a rank that is reduced, the parts are merged where they are made: a fold over keys becomes a ring. Shards come
    from one side, or `both_ways` from the nearer one. Proves: the statement runs along no rank over these axes that is
    the same, it may run in parts along a rank that stands plainly at every gathered dimension, and it finds in one
    shard all that it reads of each tensor at a stretch of that rank.
    """
    step = _collective(program, number, Kind.ALL_GATHER)
    sharding = Sharding(program.cascade, dict(program.sizes))
    at = number
    gathers: list[tuple[Collective, Held]] = []
    while isinstance(one := program.steps[at], Collective) and one.kind is Kind.ALL_GATHER and one.axes == step.axes:
        gathers.append((one, _held_before(program, at)))
        at += 1
    reader = program.steps[at]
    if not isinstance(reader, Compute) or not all(_reads(reader, one.tensor, sharding) for one, _ in gathers):
        _refuse("what stands behind the all-gather does not read all that is gathered")
    unit = sharding.reach.units[reader.name]
    for rank in sharding.possible(unit):
        local = dataclasses.replace(reader, along=(*reader.along, Along(rank, step.axes)))
        plain = all(_at(unit.statements, one.tensor, rank, one.source) for one, _ in gathers)
        free = all(rank != along.rank for along in reader.along)
        if free and plain and all(sharding.is_enough(local, one.tensor, held) for one, held in gathers):
            break
    else:
        _refuse(f"{quote(reader.name)} needs more of {quote(step.tensor)} than one shard at a time")
    steps: list[Step] = []
    for hop in _hops(program.devices(step.axes), both_ways):
        if hop:
            steps += [dataclasses.replace(one, kind=Kind.SHIFT, hop=hop) for one, _ in gathers]
        steps.append(dataclasses.replace(reader, along=(*reader.along, Along(rank, step.axes, hop))))
    whole = [one for one, held in gathers if _needed_whole(program, at, one, held, sharding)]
    if whole:
        _refuse(f"{quote(whole[0].tensor)} is needed whole behind {quote(reader.name)}")
    return _with_steps(program, (*program.steps[:number], *steps, *program.steps[at + 1 :]))


def _hops(devices: int, both_ways: bool) -> list[int]:
    """How far shards come from, or go: one after the other, or by turns on either side."""
    if not both_ways:
        return list(range(devices))
    return [0, *(hop for far in range(1, devices // 2 + 1) for hop in (far, -far))][:devices]


def by_rows(program: Program, number: int, both_ways: bool = False) -> Program:
    """R4: the reduce-scatter of step `number` and the statement whose partial results it merges, by shards of rows.

    Rows are coordinates of the dimension that is scattered. Each device begins with the shard that has the longest way
    to go and ends with its own: again the order of tiles is another on each, and where a shard ends undoes it. A shard
    goes round the ring; every device merges its own part with what comes, and passes it on while it computes the next.
    Shards go one way, or `both_ways`, each by the shorter one. Proves: the reducer merges in any order; the statement
    is whole, what it gives is partial over these axes and no others, the rank that stands at the dimension is one
    along which it may run in parts and does not yet, and there is a coordinate of it for every device.
    """
    step = _collective(program, number, Kind.REDUCE_SCATTER)
    merged = REDUCERS.get(step.reducer)
    if merged is None or merged.op is None or not OPS[merged.op].commutative:
        _refuse(f"{quote(step.reducer)} does not merge in any order, and parts come by in another one on each device")
    sharding = Sharding(program.cascade, dict(program.sizes))
    names = _makers(program, step)
    places = [at for at, one in enumerate(program.steps) if isinstance(one, Compute) and one.name in names]
    maker = program.steps[places[0]]
    assert isinstance(maker, Compute) and step.target is not None
    unit = sharding.reach.units[maker.name]
    ranks = targets(unit.statements[0])[0].ranks
    rank = ranks[step.target]
    if len(places) > 1 or maker.at:
        _refuse(f"{quote(maker.name)} is not whole")
    if [along.axes for along in maker.along if along.rank not in ranks] != [step.axes]:
        _refuse(f"{quote(step.tensor)} is not partial over {'*'.join(step.axes)} alone")
    if rank not in sharding.possible(unit) or rank in {along.rank for along in maker.along}:
        _refuse(f"{quote(maker.name)} cannot run in parts along {quote(rank)}, or does so already")
    devices = program.devices(step.axes)
    if sharding.reach.full[rank][1] < devices:
        _refuse(f"{quote(rank)} has no coordinate for each of the devices")
    steps: list[Step] = []
    for hop in reversed(_hops(devices, both_ways)):
        steps.append(dataclasses.replace(maker, along=(*maker.along, Along(rank, step.axes, hop))))
        steps.append(dataclasses.replace(step, kind=Kind.SHIFT, hop=hop))
    between = program.steps[places[0] + 1 : number]
    return _with_steps(program, (*program.steps[: places[0]], *steps, *between, *program.steps[number + 1 :]))


def by_parts(program: Program, number: int, rank: str, cuts: Sequence[int]) -> Program:
    """R4: the collective of step `number` and the statement whose partial results it merges, part by part of a rank.

    While a part is exchanged, the next one is computed. Cuts at whole waves of tiles cost the statement nothing; there
    may be as many parts as devices. The shards of the result stay what they are: what follows sees no difference.
    Proves: the collective merges a whole result, the statement keeps the rank in all that it defines and runs along it
    over no axis, and the result is not scattered along it.
    """
    step = program.steps[number] if 0 <= number < len(program.steps) else None
    if not isinstance(step, Collective) or step.kind not in REDUCING or step.at:
        _refuse(f"step {number} merges no whole result")
    sharding = Sharding(program.cascade, dict(program.sizes))
    at = next(
        i for i, one in enumerate(program.steps) if isinstance(one, Compute) and one.name in _makers(program, step)
    )
    maker = program.steps[at]
    assert isinstance(maker, Compute)
    unit = sharding.reach.units[maker.name]
    ranks = [target.ranks for stmt in unit.statements for target in targets(stmt)]
    if rank not in sharding.possible(unit) or not all(rank in own for own in ranks):
        _refuse(f"{quote(maker.name)} cannot run in parts along {quote(rank)}")
    dim = ranks[0].index(rank)
    if maker.at or dim == step.target or rank in {along.rank for along in maker.along}:
        _refuse(f"{quote(step.tensor)} is spread along {quote(rank)}")
    low, high = sharding.reach.full[rank]
    if list(cuts) != sorted({cut for cut in cuts if low < cut < high}):
        _refuse(f"cuts of {quote(rank)} rise from {low + 1} to {high - 1}")
    windows = slices(high, cuts)
    computes = [dataclasses.replace(maker, at=((rank, *window),)) for window in windows]
    exchanges = [dataclasses.replace(step, at=((dim, *window),)) for window in windows]
    between = program.steps[at + 1 : number]
    return _with_steps(program, (*program.steps[:at], *computes, *between, *exchanges, *program.steps[number + 1 :]))


def _makers(program: Program, step: Collective) -> set[str]:
    """The unit that defines the tensor of a collective, by its first name."""
    found = units_by_name(program.cascade).items()
    return {name for name, unit in found if step.tensor in {t.name for s in unit.statements for t in targets(s)}}


def refactor_axis(program: Program, axis: str, outer: Axis, inner: Axis) -> Program:
    """R6: an axis as two; an all-reduce over it is one over the inner devices, then one over the outer ones.

    Proves: the sizes multiply to that of the axis, and the names are new. Devices keep their order, so shards stay.
    """
    old = next((one for one in program.axes if one.name == axis), None)
    if old is None or outer.size * inner.size != old.size:
        _refuse(f"the axis {quote(axis)} is not {outer.size} times {inner.size} devices")
    if outer.name == inner.name or {outer.name, inner.name} & {one.name for one in program.axes}:
        _refuse(f"{quote(outer.name)} and {quote(inner.name)} are not two new names")

    def spread(axes: Axes) -> Axes:
        return tuple(name for one in axes for name in ((outer.name, inner.name) if one == axis else (one,)))

    steps: list[Step] = []
    for step in program.steps:
        if isinstance(step, Compute):
            along = tuple(dataclasses.replace(one, axes=spread(one.axes)) for one in step.along)
            steps.append(dataclasses.replace(step, along=along))
        elif step.kind is Kind.ALL_REDUCE and step.axes == (axis,):
            steps += [dataclasses.replace(step, axes=(inner.name,)), dataclasses.replace(step, axes=(outer.name,))]
        else:
            steps.append(dataclasses.replace(step, axes=spread(step.axes)))
    places = tuple(Place(place.tensor, place.dim, spread(place.axes)) for place in program.places)
    axes = tuple(one for other in program.axes for one in ((outer, inner) if other.name == axis else (other,)))
    mesh = tuple(item for item in program.cascade.schedule if not (isinstance(item, Mesh) and item.axis == axis))
    mesh = (Mesh(outer.name, outer.size), Mesh(inner.name, inner.size), *mesh)
    cascade = dataclasses.replace(program.cascade, schedule=mesh)
    return Program(cascade, axes, program.sizes, places, tuple(steps))


def another_form(program: Program, name: str, along: tuple[Along, ...]) -> Program:
    """R7: the statement of that name along other ranks; what stands before and behind it follows by the algebra.

    Proves: the ranks are among those along which the statement may run in parts (`Sharding.possible`).
    """
    sharding = Sharding(program.cascade, dict(program.sizes))
    if name not in sharding.reach.units:
        _refuse(f"no statement defines {quote(name)}")
    possible = sharding.possible(sharding.reach.units[name])
    for one in along:
        if one.rank not in possible:
            _refuse(f"{quote(name)} cannot run in parts along {quote(one.rank)}")
    choice = {step.name: step.along for step in program.steps if isinstance(step, Compute)}
    return sharding.program({**choice, name: along})


# --- what the proofs ask ---------------------------------------------------------------------------------------------


def _refuse(reason: str) -> NoReturn:
    raise UnsupportedError(Diagnostic("C552", f"the rewrite is not proved: {reason}"))


def _collective(program: Program, number: int, kind: Kind) -> Collective:
    """The collective of that kind at a step, whole and not in slices."""
    step = program.steps[number] if 0 <= number < len(program.steps) else None
    if not isinstance(step, Collective) or step.kind is not kind or step.at:
        _refuse(f"step {number} is no whole {kind.value}")
    return step


def _with_steps(program: Program, steps: Sequence[Step]) -> Program:
    return dataclasses.replace(program, steps=tuple(steps))


def _reads(step: Step, tensor: str, sharding: Sharding) -> bool:
    """Whether a step is a statement that reads the tensor."""
    if not isinstance(step, Compute):
        return False
    return any(tensor in reads(stmt) for stmt in sharding.reach.units[step.name].statements)


def made(program: Program, tensor: str) -> Held:
    """How what a statement defines is sharded before any collective; of a parameter, how it is placed."""
    units = units_by_name(program.cascade)
    for step in program.steps:
        defined = units[step.name].statements if isinstance(step, Compute) else ()
        for target in (target for stmt in defined for target in targets(stmt) if target.name == tensor):
            along = step.along if isinstance(step, Compute) else ()
            return tuple(sorted((target.ranks.index(one.rank), one.axes) for one in along if one.rank in target.ranks))
    return tuple(sorted((place.dim, place.axes) for place in program.places if place.tensor == tensor))


def _held_before(program: Program, number: int) -> Held:
    """How the tensor of a collective is sharded when its turn comes."""
    last = program.steps[number]
    assert isinstance(last, Collective)
    held = dict(made(program, last.tensor))
    for step in program.steps[:number]:
        if isinstance(step, Collective) and step.tensor == last.tensor:
            if step.source is not None:
                held.pop(step.source, None)
            if step.target is not None:
                held[step.target] = step.axes
    return tuple(sorted(held.items()))


def _at(stmts: Sequence[Stmt], tensor: str, rank: str, dim: int | None) -> bool:
    """Whether every read of the tensor by these statements has the rank, plainly, at that dimension."""
    nodes = [
        node
        for stmt in stmts
        for expr in expressions(stmt)
        for node in walk(expr)
        if isinstance(node, Read) and node.tensor == tensor
    ]
    return dim is not None and bool(nodes) and all(node.index[dim] == Rank(rank) for node in nodes)


def _needed(program: Program, sharding: Sharding) -> Program:
    """The program without the all-gathers of tensors that nothing needs whole any more."""
    for number, step in enumerate(program.steps):
        if isinstance(step, Collective) and step.kind is Kind.ALL_GATHER:
            held = _held_before(program, number)
            if not _needed_whole(program, number, step, held, sharding):
                steps = (*program.steps[:number], *program.steps[number + 1 :])
                return _needed(_with_steps(program, steps), sharding)
    return program


def _needed_whole(program: Program, at: int, gather: Collective, held: Held, sharding: Sharding) -> bool:
    """Whether anything behind a step needs more of a gathered tensor than its shards."""
    if gather.tensor in {result.name for result in program.cascade.results}:
        return True
    later = (step for step in program.steps[at + 1 :] if _reads(step, gather.tensor, sharding))
    return any(isinstance(step, Compute) and not sharding.is_enough(step, gather.tensor, held) for step in later)
