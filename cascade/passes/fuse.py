"""Compute in one trip over a rank the reductions that share a pass over it, and the maps that stream into them.

    S[m,n] = sum[e] Q[m,e] * K[n,e]                  the same statements, and
    R[m] = max[n] S[m,n]                       -->       fuse {S, R} over n
    P[m,n] = exp(S[m,n] - R[m])                          fuse {P, D} over n
    D[m] = sum[n] P[m,n]

A group is the reductions of one pass, as `pass_count` numbers them, and what they read of maps that keep the rank: a
map of their pass, or an earlier one that nobody else reads. What else keeps the rank stays outside, and may read the
group's maps, which are final. A fold of the schedule takes in what streams into it, and independent reductions of its
passes as states that count as they are. Where a `split` names the rank, a group is such a fold: its parts are merged.
Where something outside stands between a map and a group that needs both, the group gets a copy of its own, if the map
is read from what the group reads anyway.

A statement is in one group at most. Ranks with folds and splits choose first, then those with most statements to fuse.
Groups and folds of the author keep their statements. Requires: inlined, canonical. Ensures: canonical. It rests on
`pass_count`; what may be fused is `may_fuse`, judged by the verifier with rules of its own. Recurrences stay outside:
a group would have to step through them. It weighs no costs, and makes no groups within groups.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

from cascade.ir import (
    Apply, Call, Cascade, Const, Directive, Einsum, Expr, Fold, FoldInit, FoldMerge, Rank, Read, Reduce, Split, Stmt,
    Target, TopK, Use,
)  # fmt: skip
from cascade.ir import Fuse as FuseGroup
from cascade.order import Group, components, members
from cascade.passes.pass_count import all_passes
from cascade.verify import Invariant, canonical, inlined, well_formed
from cascade.walk import (
    defines, expressions, fold_parts, free_ranks, fresh, map_expressions, names, reads, rewrite, targets, tensors_read,
    walk,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Fuse:
    """Reductions that share a pass over a rank, and the maps that stream into them, in one trip; `over` one rank."""

    over: str | None = None

    name: ClassVar[str] = "fuse"
    requires: ClassVar[tuple[Invariant, ...]] = (well_formed, inlined, canonical)
    ensures: ClassVar[tuple[Invariant, ...]] = (canonical,)

    def __call__(self, cascade: Cascade) -> Cascade:
        graph = _graph(cascade)
        wanted = [rank for rank in _worth(cascade) if self.over in (None, rank)]
        numbers = {rank: passes.number for rank, passes in all_passes(cascade, {}).items()} if wanted else {}
        sizes = {
            rank: sum(made.size() for made in _trip(cascade, graph, rank, numbers[rank]).chosen()) for rank in wanted
        }
        first = {item.rank for item in cascade.schedule if isinstance(item, (Fold, Split))}
        for rank in sorted(wanted, key=lambda rank: (rank not in first, -sizes[rank])):
            after = _scheduled(cascade, _trip(cascade, graph, rank, numbers[rank]))
            if after.body is not cascade.body:  # copies
                graph = _graph(after)
                numbers = {other: passes.number for other, passes in all_passes(after, {}).items()}
            cascade = after
        return cascade


def _worth(cascade: Cascade) -> list[str]:
    """The ranks that some statement reduces, in order of first appearance."""
    return list(dict.fromkeys(rank for stmt in cascade.body for rank in _reduced(stmt)))


# --- statements and a rank -------------------------------------------------------------------------------------------


class FusionClass(Enum):
    """How the iteration spaces of two Einsums lie to each other, by their rank variables."""

    ISOMORPHIC = "RI"
    SUBSETTED = "RSb"
    SUPERSETTED = "RSp"
    DISJOINT = "RD"


def fusion_class(producer: Stmt, consumer: Stmt) -> FusionClass:
    """RI for the same ranks, RSb where the consumer has fewer, RSp where it has more, RD where each has one of its own.

    The classes of TeAAL and Mambalaya. They say which loops two Einsums can share, not whether they may: `may_fuse`.
    """
    ours, theirs = frozenset(iteration_ranks(producer)), frozenset(iteration_ranks(consumer))
    if ours == theirs:
        return FusionClass.ISOMORPHIC
    if theirs < ours:
        return FusionClass.SUBSETTED
    return FusionClass.SUPERSETTED if ours < theirs else FusionClass.DISJOINT


def iteration_ranks(stmt: Stmt) -> tuple[str, ...]:
    """The rank variables of an Einsum's iteration space: those it keeps, those it folds, and any that it mentions."""
    found = [rank for target in targets(stmt) for rank in target.ranks]
    found += [stmt.rank] if isinstance(stmt, TopK) else []
    for node in (node for expr in expressions(stmt) for node in walk(expr)):
        if isinstance(node, Rank):
            found.append(node.name)
        elif isinstance(node, (Reduce, Use)):
            found += node.ranks
    return tuple(dict.fromkeys(found))


def _reduced(stmt: Stmt) -> tuple[str, ...]:
    if isinstance(stmt, TopK):
        return (stmt.rank,)
    return stmt.expr.ranks if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else ()


def _keeps(stmt: Stmt, rank: str) -> bool:
    return any(rank in target.ranks for target in targets(stmt))


def _shift(index: Expr) -> tuple[str, int] | None:
    """The rank variable and the number that an index adds to it; None for an index of another form."""
    if isinstance(index, Rank):
        return index.name, 0
    if not isinstance(index, Apply) or index.op not in ("add", "sub"):
        return None
    base, number = index.args
    if index.op == "add" and isinstance(base, Const):
        base, number = number, base
    inner = _shift(base)
    if inner is None or not isinstance(number, Const) or type(number.value) is not int:
        return None
    return inner[0], inner[1] + (number.value if index.op == "add" else -number.value)


def _in_time(read: Read, target: Target, rank: str, exact: bool = False) -> bool:
    """Whether a trip over the rank has come to what is read; with `exact`, whether it is at it."""
    if len(read.index) != len(target.ranks):
        return True
    found = _shift(read.index[target.ranks.index(rank)])
    return found is not None and found[0] == rank and (found[1] == 0 if exact else found[1] <= 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """The statements by number: what each reads of others, what it needs, who needs it, which are recurrences.

    A state of a fold needs what its first value and its merge read.
    """

    body: tuple[Stmt, ...]
    owner: Mapping[str, int]
    reads: tuple[tuple[tuple[int, Read], ...], ...]
    needs: tuple[tuple[int, ...], ...]
    readers: tuple[tuple[int, ...], ...]
    cyclic: frozenset[int]

    def numbers(self, group: Group) -> frozenset[int]:
        """The statements of a group."""
        return frozenset(self.owner[name] for name in members(group) if name in self.owner)

    def in_time(self, reader: int, producer: int, rank: str, exact: bool) -> bool:
        """Whether all that one statement reads of another is at hand when its block of the rank comes."""
        made = {target.name: target for target in targets(self.body[producer])}
        found = (read for other, read in self.reads[reader] if other == producer)
        return all(_in_time(read, made[read.tensor], rank, exact) for read in found)

    def order(self, groups: Collection[Collection[int]]) -> list[list[int]]:
        """What runs as one, each behind what it needs: statements, recurrences, and the groups."""
        edges = [list(needs) for needs in self.needs]
        for group in groups:
            leader = min(group, default=0)
            for number in group:
                edges[leader].append(number)
                edges[number].append(leader)
        return components(edges)


def _graph(cascade: Cascade) -> _Graph:
    body = cascade.body
    owner = {name: number for number, stmt in enumerate(body) for name in defines(stmt)}
    found = [
        [n for e in expressions(stmt) for n in walk(e) if isinstance(n, Read) and n.tensor in owner] for stmt in body
    ]
    needs = [dict.fromkeys(owner[name] for name in reads(stmt) if name in owner) for stmt in body]
    for fold in (item for item in cascade.schedule if isinstance(item, Fold)):
        for part in fold_parts(fold):
            wanted = tensors_read(() if part.expr is None else (part.expr,))
            for number in {owner[name] for name in wanted if name in owner and name not in members(fold)}:
                needs[owner[part.target.name]].setdefault(number)
    readers: list[list[int]] = [[] for _ in body]
    for number, below in enumerate(needs):
        for other in below:
            readers[other].append(number)
    edges = [list(below) for below in needs]
    cycles = (c for c in components(edges) if len(c) > 1 or c[0] in edges[c[0]])
    return _Graph(
        body,
        owner,
        tuple(tuple((owner[read.tensor], read) for read in dict.fromkeys(reads)) for reads in found),
        tuple(map(tuple, needs)),
        tuple(map(tuple, readers)),
        frozenset(number for cycle in cycles for number in cycle),
    )


# --- what may be fused -----------------------------------------------------------------------------------------------


def may_fuse(cascade: Cascade, statements: Sequence[str], rank: str) -> tuple[str, ...]:
    """Why one trip over the rank cannot compute these Einsums block by block; nothing where it can.

    Groups that the schedule has already stay as they are, each a trip of its own.
    """
    graph = _graph(cascade)
    unknown = [f"there is no statement '{name}'" for name in statements if name not in graph.owner]
    if not any(rank in iteration_ranks(stmt) for stmt in cascade.body):
        unknown.append(f"there is no rank '{rank}'")
    numbers = [graph.owner[name] for name in statements if name in graph.owner]
    twice = (f"'{defines(graph.body[n])[0]}' is named twice" for n in dict.fromkeys(numbers) if numbers.count(n) > 1)
    found = [*unknown, *twice, *_overlaps(cascade, graph, frozenset(numbers), rank)]
    for number in dict.fromkeys(numbers):
        found += _strange(graph.body[number], rank) or _waits(graph, number, numbers, rank)
    others = [graph.numbers(group) for group in cascade.schedule if isinstance(group, (FuseGroup, Fold))]
    return (*found, *_between(graph, frozenset(numbers), [group for group in others if group.isdisjoint(numbers)]))


def _overlaps(cascade: Cascade, graph: _Graph, inside: frozenset[int], rank: str) -> Iterator[str]:
    """What other groups have to do with a new one: it may stand within one over another rank."""
    for group in cascade.schedule:
        if not isinstance(group, (FuseGroup, Fold)) or graph.numbers(group).isdisjoint(inside):
            continue
        name = defines(graph.body[min(graph.numbers(group) & inside)])[0]
        if group.rank == rank:
            yield f"'{name}' is in a trip over '{rank}' already"
        elif not inside <= graph.numbers(group):
            yield f"'{name}' is in a trip over '{group.rank}' already, and others are not"


def _strange(stmt: Stmt, rank: str) -> list[str]:
    """Why a statement is no member of any group over the rank."""
    name = defines(stmt)[0]
    top = stmt.expr.body if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else None
    nodes = [n for e in expressions(stmt) for n in walk(e) if isinstance(n, (Reduce, Use))]
    if isinstance(stmt, Call) or len(nodes) > (top is not None) or any(isinstance(node, Use) for node in nodes):
        return [f"'{name}' is not one Einsum"]
    if isinstance(stmt, TopK) and _keeps(stmt, rank) and rank not in free_ranks(stmt.body):
        return [f"'{name}' counts what it keeps by '{rank}': all of it is known at once"]
    if _keeps(stmt, rank) or rank in _reduced(stmt):
        return []
    return [f"'{name}' neither has the rank '{rank}' nor reduces it"]


def _waits(graph: _Graph, number: int, inside: Collection[int], rank: str) -> list[str]:
    """What a member reads of its group before it is final, or before the trip has come to it."""
    found = []
    name = defines(graph.body[number])[0]
    for other in graph.needs[number]:
        if other not in inside or not isinstance(graph.body[other], (Einsum, TopK)):
            continue
        needed = defines(graph.body[other])[0]
        if not _keeps(graph.body[other], rank):
            found.append(f"'{name}' reads '{needed}', which is final behind the last block of '{rank}' only")
        elif not graph.in_time(number, other, rank, exact=False):
            found.append(f"'{name}' reads '{needed}' ahead of the block of '{rank}' that is at hand")
    return found


def _between(graph: _Graph, inside: frozenset[int], others: Sequence[frozenset[int]]) -> list[str]:
    """What stands outside of a group, needs it, and is needed by it; other groups run as one."""
    together = {number: other for other in others for number in other}
    todo, seen = list(inside), set(inside)
    for number in todo:
        for other in graph.needs[number]:
            if other in inside and number not in inside:
                outer, needed = defines(graph.body[number])[0], defines(graph.body[other])[0]
                return [f"'{outer}' stands outside, needs '{needed}' of the group, and the group needs it"]
            if other not in seen:
                todo += new if (new := together.get(other)) else (other,)
                seen.update(new or (other,))
    return []


# --- one rank --------------------------------------------------------------------------------------------------------

NOBODY, ANYBODY = -1, 1 << 60
"""The level of what needs no group, below all; of what no group needs, above all."""


@dataclass(slots=True, eq=False)
class _Making:
    """A group in the making, or a fold that may take statements in.

    On the way down from a group, outside of it, only groups of lower levels are met: so there is an order to run them.
    `closed` are the members of a fold that no other member may read: its states, and what depends on them.
    """

    level: int
    passes: frozenset[int]
    fold: Fold | None = None
    closed: frozenset[int] = frozenset()
    members: set[int] = field(default_factory=set)
    new: list[int] = field(default_factory=list)
    copies: list[int] = field(default_factory=list)

    def size(self) -> int:
        """How many statements are new in the group."""
        return len(self.new) + len(self.copies)

    def take(self, number: int) -> None:
        """Makes a statement a member."""
        self.members.add(number)
        self.new.append(number)


@dataclass(slots=True, eq=False)
class _Trip:
    """All groups over one rank: reductions choose theirs on the way forward, maps are drawn in on the way back."""

    graph: _Graph
    rank: str
    number: Mapping[str, int]
    order: list[list[int]]
    free: frozenset[int]  # statements without a group
    results: frozenset[int]
    split: bool
    folds: list[_Making]
    plain: dict[int, _Making] = field(default_factory=dict)  # by pass
    home: dict[int, _Making] = field(default_factory=dict)
    copied: dict[int, _Making] = field(default_factory=dict)
    single: list[_Making] = field(default_factory=list)  # for reductions of a split rank that no group takes

    def chosen(self) -> list[_Making]:
        """The groups that gain by what is new in them: it shares a trip, or has parts that must be merged."""
        least = 1 if self.split else 2
        plain = sorted(self.plain.values(), key=lambda made: made.level)
        shared = [made for made in plain if made.size() >= least]
        return [*(made for made in self.folds if made.size()), *shared, *self.single]

    def pass_of(self, number: int) -> int:
        """The pass of a statement."""
        return self.number.get(defines(self.graph.body[number])[0], 0)

    def run(self) -> None:
        """Fills the groups."""
        for made in self.folds:
            self.home.update(dict.fromkeys(made.members, made))
        self._forward(self._backward() if self.folds else {})
        self._backward(draw=True)
        if self.split:
            left = (n for n in sorted(self.free - self.home.keys()) if self.rank in _reduced(self.graph.body[n]))
            self.single = [_Making(NOBODY, frozenset(), new=[number]) for number in left]

    # --- reductions, forward -----------------------------------------------------------------------------------------

    def _forward(self, needed_by: Mapping[int, int]) -> None:
        """Each reduction joins the first group that it depends on through maps alone, which stream.

        `depth` is the highest level that a statement depends on; `streams` the fold whose maps it can be computed with.
        """
        depth: dict[int, int] = {}
        streams: dict[int, _Making] = {}
        for together in self.order:
            number = together[0]
            if number in self.free and len(together) == 1:
                stmt = self.graph.body[number]
                for made in self._options(number, reduction=self.rank in _reduced(stmt)):
                    if needed_by.get(number, ANYBODY) <= made.level or not self._fits(number, made, depth, streams):
                        continue
                    if self.rank in _reduced(stmt):
                        self.home[number] = made
                        made.take(number)
                    elif any(self.home.get(other, streams.get(other)) is made for other in self.graph.needs[number]):
                        streams[number] = made
                    break
            below = [depth.get(other, NOBODY) for n in together for other in self.graph.needs[n]]
            below += [self.home[n].level for n in together if n in self.home]
            depth.update(dict.fromkeys(together, max(below, default=NOBODY)))

    def _options(self, number: int, reduction: bool) -> list[_Making]:
        """The groups over the rank that a statement belongs to by its pass: folds first."""
        at = self.pass_of(number)
        found = [made for made in self.folds if at in made.passes]
        if reduction:
            level = (at + 1) * (len(self.folds) + 1) - 1
            found.append(self.plain.setdefault(at, _Making(level, frozenset((at,)))))
        return found

    def _fits(self, number: int, made: _Making, depth: Mapping[int, int], streams: Mapping[int, _Making]) -> bool:
        """Whether all that a statement needs of a group streams, and the rest needs groups of lower levels only."""
        for other in self.graph.needs[number]:
            if self.home.get(other) is made or streams.get(other) is made:
                if not _keeps(self.graph.body[other], self.rank) or other in made.closed:
                    return False
                if not self.graph.in_time(number, other, self.rank, self.split):
                    return False
            elif depth[other] >= made.level:
                return False
        return True

    # --- maps, backward ----------------------------------------------------------------------------------------------

    def _backward(self, draw: bool = False) -> dict[int, int]:
        """The lowest level of a group that needs a statement, for those outside.

        With `draw`, a map that streams into a group joins it; one that something in between needs too is copied.
        """
        found: dict[int, int] = {}
        for together in reversed(self.order):
            readers = [reader for n in together for reader in self.graph.readers[n]]
            far = [found[reader] for reader in readers if reader not in self.home and reader in found]
            near = [made for reader in readers for made in self._homes(reader)]
            number = together[0]
            if draw and near and len(together) == 1 and number in self.free and number not in self.home:
                self._draw(number, min(near, key=lambda made: made.level), min(far, default=ANYBODY))
            levels = (*far, *(made.level for made in near))
            if levels:
                found.update(dict.fromkeys((n for n in together if n not in self.home), min(levels)))
        return found

    def _homes(self, reader: int) -> list[_Making]:
        """The groups in which a statement, or a copy of it, is computed."""
        return [made for made in (self.home.get(reader), self.copied.get(reader)) if made is not None]

    def _draw(self, number: int, made: _Making, far: int) -> None:
        """Makes a map a member of the group that reads it, if it streams into it."""
        stmt = self.graph.body[number]
        readers = [reader for reader in self.graph.readers[number] if made in self._homes(reader)]
        if not _keeps(stmt, self.rank) or self.rank in _reduced(stmt):
            return
        if not all(self.graph.in_time(reader, number, self.rank, self.split) for reader in readers):
            return
        alone = len(readers) == len(self.graph.readers[number]) and number not in self.results
        if self.pass_of(number) not in made.passes and not alone:
            return
        if far > made.level:
            self.home[number] = made
            made.take(number)
        elif self._is_cheap(number, made):
            self.copied[number] = made
            made.copies.append(number)

    def _is_cheap(self, number: int, made: _Making) -> bool:
        """Whether a group can compute a map from what it reads anyway, and from what is smaller than the map."""
        stmt = self.graph.body[number]
        if not isinstance(stmt, Einsum) or isinstance(stmt.expr, Reduce):
            return False
        inside = (*made.members, *made.copies)
        known = {name for member in inside for name in reads(self.graph.body[member])}
        nodes = [node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)]
        return all(node.tensor in known or len(free_ranks(node)) < len(stmt.target.ranks) for node in nodes)


def _trip(cascade: Cascade, graph: _Graph, rank: str, number: Mapping[str, int]) -> _Trip:
    """The groups over a rank that join those of the schedule."""
    groups = [group for group in cascade.schedule if isinstance(group, (FuseGroup, Fold))]
    inside = [graph.numbers(group) for group in groups]
    folds = [
        (group, numbers)
        for group, numbers in zip(groups, inside, strict=True)
        if isinstance(group, Fold) and group.rank == rank and sum(not numbers.isdisjoint(n) for n in inside) == 1
    ]
    open_folds = [group for group, _ in folds]
    fixed = [numbers for group, numbers in zip(groups, inside, strict=True) if group not in open_folds]
    kept = graph.cyclic.union(*inside)
    trip = _Trip(
        graph,
        rank,
        number,
        graph.order(fixed),
        frozenset(n for n, stmt in enumerate(graph.body) if n not in kept and not _strange(stmt, rank)),
        frozenset(graph.owner[result.name] for result in cascade.results if result.name in graph.owner),
        any(isinstance(item, Split) and item.rank == rank for item in cascade.schedule),
        _levelled(graph, rank, number, folds, graph.order(inside) if folds else []),
    )
    trip.run()
    return trip


def _levelled(
    graph: _Graph,
    rank: str,
    number: Mapping[str, int],
    folds: Sequence[tuple[Fold, frozenset[int]]],
    order: Sequence[Sequence[int]],
) -> list[_Making]:
    """The folds over a rank, each at a level above those it depends on and above the groups of its passes before it."""
    found: list[_Making] = []
    at = {n: fold for fold, numbers in folds for n in numbers}
    deepest: dict[int, int] = {}
    for together in order:
        last = max((deepest.get(other, 0) for n in together for other in graph.needs[n]), default=0)
        fold = at.get(together[0])
        if fold is not None:
            numbers = graph.numbers(fold)
            names = (defines(graph.body[n])[0] for n in numbers)
            passes = frozenset(number[name] for name in names if name in number)
            last = max(last, *passes)
            level = last * (len(folds) + 1) + len(found)
            found.append(_Making(level, passes, fold, _closed(graph, fold, rank), set(numbers)))
        deepest.update(dict.fromkeys(together, last))
    return found


def _closed(graph: _Graph, fold: Fold, rank: str) -> frozenset[int]:
    """The members of a fold that hold for a block or for the state so far: new members do not read them."""
    found: set[int] = set()
    for number in dict.fromkeys(graph.owner[name] for name in fold.update):
        stmt = graph.body[number]
        if not _keeps(stmt, rank) or number in graph.cyclic or not found.isdisjoint(graph.needs[number]):
            found.add(number)
    return frozenset(found)


# --- the schedule ----------------------------------------------------------------------------------------------------


def _scheduled(cascade: Cascade, trip: _Trip) -> Cascade:
    """The cascade with the groups of a trip; the same object where there is none."""
    if not trip.chosen():
        return cascade
    body, copies = _copied(cascade, trip)

    def directive(made: _Making) -> Directive:
        new = _names(trip, made, copies)
        if made.fold is None and not trip.split:
            return FuseGroup(tuple(new), trip.rank)
        return _extended(made.fold or Fold(trip.rank, (), (), (), ()), new, trip)

    extended = {id(made.fold): directive(made) for made in trip.chosen() if made.fold is not None}
    schedule = [extended.get(id(item), item) for item in cascade.schedule]
    schedule += [directive(made) for made in trip.chosen() if made.fold is None]
    return dataclasses.replace(cascade, body=body, schedule=tuple(schedule))


def _names(trip: _Trip, made: _Making, copies: Mapping[int, str]) -> dict[str, int]:
    """The names of the statements that are new in a group, in program order, each with its number."""
    found = {number: defines(trip.graph.body[number])[0] for number in made.new}
    found.update((number, copies[number]) for number in made.copies)
    return {found[number]: number for number in sorted(found)}


def _copied(cascade: Cascade, trip: _Trip) -> tuple[tuple[Stmt, ...], dict[int, str]]:
    """The statements, the maps that a group gets a copy of with their copies behind them; the names of those."""
    chosen = [made for made in trip.chosen() if made.copies]
    if not chosen:
        return cascade.body, {}
    taken = names(cascade)
    copies = {n: fresh(defines(trip.graph.body[n])[0], taken) for made in chosen for n in sorted(made.copies)}
    body: list[Stmt] = []
    for number, stmt in enumerate(cascade.body):
        made = trip.home.get(number)
        body.append(stmt if made is None else _reading(stmt, made, trip, copies))
        if number in copies and isinstance(stmt, Einsum):
            named = dataclasses.replace(stmt, target=dataclasses.replace(stmt.target, name=copies[number]))
            body.append(_reading(named, trip.copied[number], trip, copies))
    return tuple(body), copies


def _reading(stmt: Stmt, made: _Making, trip: _Trip, copies: Mapping[int, str]) -> Stmt:
    """A statement that reads the copies of its group."""
    renamed = {defines(trip.graph.body[number])[0]: copies[number] for number in made.copies if number in copies}

    def change(node: Expr) -> Expr:
        if isinstance(node, Read) and node.tensor in renamed:
            return dataclasses.replace(node, tensor=renamed[node.tensor])
        return node

    if renamed.keys().isdisjoint(reads(stmt)):
        return stmt
    return map_expressions(stmt, lambda expr: rewrite(expr, change))


def _extended(fold: Fold, new: Mapping[str, int], trip: _Trip) -> Fold:
    """The fold with new statements, in an order in which each finds what it reads; new states count as they are."""
    states: list[Target] = []
    for number in new.values():
        stmt = trip.graph.body[number]
        states += targets(stmt) if trip.rank in _reduced(stmt) else ()
    plain = [Read(f"{state.name}'", tuple(map(Rank, state.ranks))) for state in states]
    return dataclasses.replace(
        fold,
        state=(*fold.state, *(state.name for state in states)),
        init=(*fold.init, *map(FoldInit, states)),
        update=tuple(_in_order(fold, new, trip)),
        merge=(*fold.merge, *map(FoldMerge, states, plain)),
    )


def _in_order(fold: Fold, new: Mapping[str, int], trip: _Trip) -> list[str]:
    """The statements of a fold in its own order, the new ones of program order before the first that needs them."""
    name_of = {number: name for name, number in new.items()}
    done: dict[str, None] = {}
    for name in fold.update:
        needed: set[int] = set()
        todo = [trip.graph.owner[name]]
        while todo:
            found = [n for n in trip.graph.needs[todo.pop()] if n in name_of and n not in needed]
            needed.update(found)
            todo += found
        done.update(dict.fromkeys(name_of[number] for number in sorted(needed)))
        done.setdefault(name)
    done.update(dict.fromkeys(new))
    return list(done)
