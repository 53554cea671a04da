"""What the Einsums of a cascade do, as far as no machine and no mapping is concerned: operations, and what they touch.

An Einsum is taken apart once: the operations of one point as a tree, the ranks it iterates, and for every tensor that
it reads the coordinates as linear forms of ranks. A sum over a product is one operation, `mac`, where a unit has it; so
is any other pair that a unit lists. Which pairs there are depends on the unit, and is decided here too.

What stands in an index, a comparison, a choice or a cast is free, and so is what does not depend on a tensor: it is
computed once. A factor of a sum that does not is taken out of the sum, into what is computed once. First values of
recurrences are computed as well, at the coordinates of the other ranks.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cascade.backends.systolic.machine import FUSED, MAC, Unit
from cascade.inference import Shapes, infer_shapes
from cascade.ir import Apply, Cascade, Einsum, Expr, Fold, FoldMerge, Rank, Read, Reduce, Size, Stmt, TopK
from cascade.ops import OPS, REDUCERS
from cascade.passes.lattice import linear
from cascade.passes.pass_count import all_passes
from cascade.passes.points import body_of, iterated
from cascade.passes.traffic import FREE
from cascade.walk import children, defines, expressions, free_ranks, targets, walk


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a tree and the steps whose results it takes, by position; `along` where it folds."""

    op: str
    takes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """One coordinate of a read: the rank variables it moves with, each with the size of its step.

    `steps` is None where the coordinate comes from data or is no linear form of ranks: every point of these ranks may
    then be at a coordinate of its own. `shifted` is whether a constant is added.
    """

    ranks: tuple[str, ...]
    steps: tuple[int, ...] | None
    extent: Size
    shifted: bool = False


@dataclass(frozen=True, slots=True)
class Access:
    """How an Einsum touches a tensor that it reads or defines: at which coordinates, and what moves them.

    `ranks` are the rank variables that move it; `plain`: every coordinate is constant or a rank variable of its own, so
    footprints are products, of what `sides` has: each rank with the extent of its dimension.
    """

    tensor: str
    index: tuple[Expr, ...]
    places: tuple[Place, ...]
    ranks: tuple[str, ...]
    plain: bool
    sides: tuple[tuple[str, Size], ...]


@dataclass(frozen=True, slots=True)
class First:
    """The first value of a recurrence: its operations at a point, the ranks that it has."""

    steps: tuple[Step, ...]
    ranks: tuple[str, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Work:
    """One Einsum: its statement, iteration space, operations at a point, reads and what it writes.

    `reduced` are the ranks it folds away, `iterative` the rank it steps along, if any.
    """

    name: str
    stmt: Stmt
    ranks: tuple[str, ...]
    reduced: tuple[str, ...]
    iterative: str | None
    steps: tuple[Step, ...]
    reads: tuple[Access, ...]
    writes: tuple[Access, ...]
    inits: tuple[First, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Merge:
    """What a fold does to one state for every block of its rank: the operations of a point, the ranks of the state."""

    state: str
    rank: str
    ranks: tuple[str, ...]
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Cascaded:
    """A cascade taken apart: its Einsums by their first names, in order, the merges of its folds, its shapes.

    `passes` says for every rank in which pass over it each Einsum runs that visits all of it.
    """

    cascade: Cascade
    shapes: Shapes
    works: Mapping[str, Work]
    maker: Mapping[str, str]  # of each tensor that is made: the Einsum
    merges: tuple[Merge, ...]
    passes: Mapping[str, Mapping[str, int]]


def take_apart(cascade: Cascade) -> Cascaded:
    """The Einsums of a canonical cascade and the merges of its folds."""
    shapes = infer_shapes(cascade)
    works = {defines(stmt)[0]: _work(stmt, shapes) for stmt in cascade.body}
    maker = {name: defines(stmt)[0] for stmt in cascade.body for name in defines(stmt)}
    left = {target.name: target.ranks for stmt in cascade.body for target in targets(stmt)}
    folds = [directive for directive in cascade.schedule if isinstance(directive, Fold)]
    merges = [_merge(fold, merge, works, left) for fold in folds for merge in fold.merge]
    passes = {
        rank: {name: found.number[name] for name in works if name in found.full}
        for rank, found in all_passes(cascade, {}).items()
    }
    return Cascaded(cascade, shapes, works, maker, tuple(merges), passes)


def _merge(fold: Fold, merge: FoldMerge, works: Mapping[str, Work], left: Mapping[str, tuple[str, ...]]) -> Merge:
    state = merge.target.name
    tree = _tree(merge.expr)
    return Merge(state, fold.rank, left[state], (*tree, Step(_joins(works, state), (len(tree) - 1,) if tree else ())))


def _joins(works: Mapping[str, Work], state: str) -> str:
    """The operation by which a part of a state joins the rest; the last one of a map that carries a state."""
    work = works.get(state)
    body = body_of(work.stmt) if work else None
    if isinstance(body, Reduce):
        return REDUCERS[body.reducer].op or "max"
    return work.steps[-1].op if work and work.steps else "add"


def _work(stmt: Stmt, shapes: Shapes) -> Work:
    name, left = defines(stmt)[0], targets(stmt)[0].ranks
    ranks = iterated(stmt)
    body = body_of(stmt)
    steps = _tree(body)
    if isinstance(stmt, TopK):
        steps = (*steps, Step("max", ()))
    reduced = (stmt.rank,) if isinstance(stmt, TopK) else body.ranks if isinstance(body, Reduce) else ()
    nodes = [node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)]
    reads = tuple(dict.fromkeys(_access(node.tensor, node.index, shapes) for node in nodes))
    writes = tuple(_access(t.name, tuple(Rank(rank) for rank in t.ranks), shapes) for t in targets(stmt))
    inits = stmt.inits if isinstance(stmt, Einsum) else ()
    firsts = tuple(First(_tree(init.expr), tuple(rank for rank in left if rank != init.rank)) for init in inits)
    stepped = inits[0].rank if inits else None
    return Work(name, stmt, ranks, tuple(r for r in reduced if r not in left), stepped, steps, reads, writes, firsts)


def _access(tensor: str, index: tuple[Expr, ...], shapes: Shapes) -> Access:
    places = tuple(_place(at, shapes.tensors[tensor][i]) for i, at in enumerate(index))
    moving = [place for place in places if place.ranks]
    ranks = tuple(dict.fromkeys(rank for place in moving for rank in place.ranks))
    plain = all(place.steps == (1,) for place in moving) and len(moving) == len(ranks)
    return Access(tensor, index, places, ranks, plain, tuple((rank, at.extent) for at in moving for rank in at.ranks))


def _place(index: Expr, extent: Size) -> Place:
    """One coordinate. Symbols may shift it; where they multiply a rank, the form is another for every size: none."""
    form, other = (linear(index, _Every(number)) for number in (0, 1))
    if form is None or other is None or form.factors != other.factors:
        return Place(free_ranks(index), None, extent)
    ranks = tuple(rank for rank, _ in form.factors)
    return Place(ranks, tuple(abs(factor) for _, factor in form.factors), extent, form.constant != 0)


class _Every(dict[str, int]):
    """The same size for every symbol."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> int:
        return self.number


# --- operations ------------------------------------------------------------------------------------------------------


def _tree(body: Expr) -> tuple[Step, ...]:
    """The operations of an expression at one point, each behind those that it takes."""
    steps: list[Step] = []

    def visit(node: Expr) -> tuple[bool, int | None]:
        if isinstance(node, (Read, Rank)):
            return True, None
        inner = (_without_factors(node.body),) if isinstance(node, Reduce) and node.reducer == "sum" else children(node)
        parts = [visit(child) for child in inner]
        varies = any(part[0] for part in parts)
        takes = tuple(at for _, at in parts if at is not None)
        if isinstance(node, Reduce):
            steps.append(Step(REDUCERS[node.reducer].op or "max", takes))
        elif varies and isinstance(node, Apply) and node.op not in FREE:
            steps.append(Step(node.op, takes))
        else:
            return varies, takes[0] if len(takes) == 1 else None
        return True, len(steps) - 1

    visit(body)
    return tuple(steps)


def _without_factors(body: Expr) -> Expr:
    """A product without the factors and the divisor that no tensor and no coordinate is in."""
    match body:
        case Apply(op="mul" | "div", args=(one, other)):
            left, right = _without_factors(one), other if body.op == "div" else _without_factors(other)
            if not _varies(right):
                return left
            if body.op == "mul" and not _varies(left):
                return right
            return Apply(body.op, (left, right))
        case _:
            return body


def _varies(expr: Expr) -> bool:
    return any(isinstance(node, (Read, Rank)) for node in walk(expr))


def operations(steps: tuple[Step, ...], unit: Unit) -> Counter[str] | None:
    """How often a unit does each of its operations at one point; None where it lacks one.

    An operation that takes the result of another is done with it in one where the unit lists the pair. A product that
    is added is a `mac` where it has that.
    """
    found: Counter[str] = Counter()
    gone: set[int] = set()
    for at in reversed(range(len(steps))):
        if at in gone:
            continue
        for inner in steps[at].takes:
            pair = f"{steps[inner].op}-{steps[at].op}"
            name = MAC if pair == FUSED and MAC in unit.operations else pair
            if inner not in gone and name in unit.operations:
                gone.add(inner)
                found[name] += 1
                break
        else:
            found[steps[at].op] += 1
    return found if all(unit.operation(name) for name in found) else None


@functools.cache
def operands(name: str) -> int:
    """How many words an operation takes from registers: three for a `mac`, else one for each operand."""
    last = name.rpartition("-")[2]
    return 3 if name in (MAC, FUSED) else OPS[last].arity + ("-" in name) if last in OPS else 2
