"""Rules about folds: one trip over a rank computes `update`, and every state says how a part of it is merged.

Whether a merge is the right one these rules do not decide: the interpreter runs it, and wrong ones give other numbers.
They see to it that every value is known where it is used, and that no older value is taken for one of today. A value is
*dated* where it depends on a state: another block changes the state, and then it would be another value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from cascade.errors import Diagnostic, Note, Span, quoted_list
from cascade.ir import Apply, Call, Einsum, Expr, Fold, FoldInit, FoldMerge, Rank, Read, Reduce, Stmt, TopK, Use
from cascade.ops import REDUCERS
from cascade.verify.program import Program, state_of
from cascade.verify.schedule import ahead, carries, closed, member, not_canonical, reads_of, reduces, runs_ahead
from cascade.verify.statements import ranks_in_sight
from cascade.walk import defines, fold_parts, walk
from cascade.wording import pinpoint, quote

UNMOVED = frozenset({"max", "min", "argmax", "argmin", "topk"})
"""Reducers that choose: what they take may depend on no state, because the choice among older elements would change."""

CHOOSERS = frozenset({"argmax", "argmin", "topk"})
"""Reducers whose state is a coordinate, or has one beside it: a merge takes it as it is."""


@dataclass(frozen=True, slots=True, eq=False)
class Trip:
    """A fold whose names exist, as its rules see it; statements are their numbers."""

    fold: Fold
    program: Program
    members: tuple[int, ...]
    below: Mapping[int, frozenset[int]]  # for each member, the members that it needs
    states: frozenset[int]
    joins: Mapping[int, int]  # a map that stands in for a reduction, and the reduction

    def stmt(self, number: int) -> Stmt:
        """The statement of that number."""
        return self.program.facts[number].stmt

    def name(self, number: int) -> str:
        """What the schedule calls a statement."""
        return next(
            (name for name in defines(self.stmt(number)) if name in self.fold.update), defines(self.stmt(number))[0]
        )

    def place(self, line: str, name: str) -> Span | None:
        """Where a name stands in a line of the fold."""
        return pinpoint(self.fold.span, name, line)

    def dated(self, number: int) -> bool:
        """Whether what a member computes depends on a state."""
        return not self.below[number].isdisjoint(self.states)

    def chooser(self, number: int) -> str:
        """The reducer of a state."""
        stmt = self.stmt(self.joins.get(number, number))
        if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce):
            return stmt.expr.reducer
        return "topk" if isinstance(stmt, TopK) else ""


def check_folds(program: Program) -> Iterator[Diagnostic]:
    """C242 to C244 and C247 to C249 for folds."""
    ranks = frozenset[str]().union(*map(ranks_in_sight, program.facts))
    for fold in program.cascade.schedule:
        if not isinstance(fold, Fold):
            continue
        named = (*fold.state, *fold.update, *fold.finalize, *(part.target.name for part in fold_parts(fold)))
        if fold.rank not in ranks or any(name not in program.owner for name in named):
            continue  # C240 says so
        members = tuple(dict.fromkeys(program.owner[name] for name in fold.update))
        strange = [found for number in members for found in _strange(fold, number, program)]
        yield from strange
        if not strange:
            trip = _trip(fold, members, program)
            for rule in RULES:
                yield from rule(trip)


def _trip(fold: Fold, members: tuple[int, ...], program: Program) -> Trip:
    edges = {number: frozenset(program.needs[number]) for number in members}
    below = {number: _closure(number, {n: edges[n] & edges.keys() for n in members}) for number in members}
    carried = [number for number in members if not set(_names(number, program)).isdisjoint(fold.state)]
    given = {program.owner[init.target.name] for init in fold.init if init.expr is not None}
    joins: dict[int, int] = {}
    for number in carried:
        joined = _joined(number, fold, members, program)
        if joined is not None and (number in given or joined not in carried):
            joins[number] = joined
    reduced = {number for number in carried if reduces(program.facts[number].stmt, fold.rank)} - set(joins.values())
    return Trip(fold, program, members, below, frozenset(reduced | joins.keys()), joins)


def _names(number: int, program: Program) -> tuple[str, ...]:
    return defines(program.facts[number].stmt)


def _owners(names: Iterable[str], program: Program) -> Iterator[int]:
    return (program.owner[name] for name in names if name in program.owner)


def _closure(start: int, edges: Mapping[int, Iterable[int]]) -> frozenset[int]:
    """What is reached from a node; the node itself where it is on a cycle."""
    found: set[int] = set()
    todo = [start]
    while todo:
        new = [node for node in edges[todo.pop()] if node not in found]
        found.update(new)
        todo += new
    return frozenset(found)


def _joined(number: int, fold: Fold, members: Iterable[int], program: Program) -> int | None:
    """The reduction that a map joins with virtual elements, `R[m] = max(X_max[m], sink)`; None for other statements."""
    stmt = program.facts[number].stmt
    if not isinstance(stmt, Einsum) or stmt.where is not None or stmt.inits or not isinstance(stmt.expr, Apply):
        return None
    for read in stmt.expr.args if not carries(stmt, fold.rank) else ():
        owner = program.owner.get(read.tensor) if isinstance(read, Read) else None
        if not isinstance(read, Read) or owner is None or owner not in members:
            continue
        other = program.facts[owner].stmt
        if not isinstance(other, Einsum) or not isinstance(other.expr, Reduce) or fold.rank not in other.expr.ranks:
            continue
        plain = read.index == tuple(map(Rank, other.target.ranks)) and set(stmt.target.ranks) == set(other.target.ranks)
        if plain and other.expr.reducer in REDUCERS and REDUCERS[other.expr.reducer].op == stmt.expr.op:
            return owner
    return None


# --- members ---------------------------------------------------------------------------------------------------------


def _strange(fold: Fold, number: int, program: Program) -> Iterator[Diagnostic]:
    """C242: a member that is no canonical Einsum."""
    stmt = program.facts[number].stmt
    if not_canonical(stmt):
        yield from member(fold, number, program)
    elif carries(stmt, fold.rank) and reduces(stmt, fold.rank):
        name = defines(stmt)[0]
        message = f"{quote(name)} keeps {quote(fold.rank)} and reduces it"
        yield Diagnostic(
            "C242", message, pinpoint(fold.span, name, "update"), "give the reduction another rank variable"
        )


def _needed(trip: Trip) -> Iterator[Diagnostic]:
    """C243: a member without the rank follows a state, and something of the trip needs it."""
    merged = {state_of(read.tensor) for part in _parts(trip) for read in _reads_in(part)}
    for number in trip.members:
        stmt = trip.stmt(number)
        if carries(stmt, trip.fold.rank) or reduces(stmt, trip.fold.rank) or number in trip.joins:
            continue
        if not trip.dated(number):
            yield from member(trip.fold, number, trip.program)
        elif merged.isdisjoint(defines(stmt)) and not any(number in trip.below[n] for n in trip.members):
            name = trip.name(number)
            message = f"{quote(name)} does not have the rank {quote(trip.fold.rank)}, and nothing of the fold needs it"
            hint = f"compute it behind the trip: finalize {name}"
            yield Diagnostic("C243", message, trip.place("update", name), hint)


def _in_order(trip: Trip) -> Iterator[Diagnostic]:
    """C249: `update` runs in order, recurrences aside."""
    at = {number: position for position, number in enumerate(trip.members)}
    for number in trip.members:
        for read in _distinct(reads_of(trip.program.facts[number], trip.members, trip.program)):
            other = trip.program.owner[read.tensor]
            if at[other] > at[number] and number not in trip.below[other]:
                name, late = quote(trip.name(number)), quote(read.tensor)
                message = f"{name} stands before {late} in the update, and reads it"
                hint = f"the statements of `update` run in order: move {late} before {name}"
                yield Diagnostic("C249", message, trip.place("update", trip.name(number)), hint)


def _streams(trip: Trip) -> Iterator[Diagnostic]:
    """C244, C247: what a member reads of the trip is of its own block, or of earlier ones that no state has changed."""
    rank = trip.fold.rank
    for number in trip.members:
        for read in _distinct(reads_of(trip.program.facts[number], trip.members, trip.program)):
            owner = trip.program.owner[read.tensor]
            if not carries(trip.stmt(owner), rank):
                continue
            name = quote(trip.name(number))
            if runs_ahead(read, rank, trip.program):
                yield ahead(name, read, rank)
            elif trip.dated(owner) and read.index[trip.program.targets[read.tensor].ranks.index(rank)] != Rank(rank):
                message = f"{name} reads an earlier {quote(read.tensor)}, which depends on {_states_below(owner, trip)}"
                hint = f"the state has changed since: read it at {rank}, or end the fold before {quote(read.tensor)}"
                yield Diagnostic("C244", message, read.span, hint)


def _closed(trip: Trip) -> Iterator[Diagnostic]:
    """C248, as for a group."""
    return closed(trip.fold, trip.members, trip.program)


# --- states ----------------------------------------------------------------------------------------------------------


def _state(trip: Trip) -> Iterator[Diagnostic]:
    """C249: the state is what the trip reduces, and has a first value and a merge for each part of it."""
    fold, rank = trip.fold, quote(trip.fold.rank)
    inside = set(trip.joins.values())
    reduced = [number for number in trip.members if reduces(trip.stmt(number), fold.rank) and number not in inside]
    wanted = [name for number in (*reduced, *trip.joins) for name in _names(number, trip.program)]
    if not reduced and not trip.joins:
        message = f"nothing that the fold updates reduces {rank}"
        hint = f"maps run in one trip without a state: fuse {{...}} over {fold.rank}"
        yield Diagnostic("C249", message, trip.place("fold", fold.rank), hint)
    for name in dict.fromkeys(wanted):
        if name not in fold.state:
            message = f"{quote(name)} is reduced over {rank}, and is not in the state"
            hint = f"carry it from block to block: state {', '.join((*fold.state, name))}"
            yield Diagnostic("C249", message, trip.place("update", name), hint)
    for name in fold.state:
        if name not in wanted:
            yield _no_state(name, trip)
        else:
            yield from _complete(name, trip)
    for part in fold_parts(fold):
        if part.target.name not in fold.state:
            message = f"{quote(part.target.name)} is not in the state"
            yield Diagnostic("C249", message, part.target.span, f"states of this fold: {quoted_list(fold.state)}")


def _no_state(name: str, trip: Trip) -> Diagnostic:
    """The finding for a name in the state that is no reduction over the rank."""
    number, place = trip.program.owner[name], trip.place("state", name)
    if number not in trip.members:
        return Diagnostic("C249", f"{quote(name)} is in the state, and not updated", place, "put it into `update`")
    outer = next((m for m, inner in trip.joins.items() if inner == number), None)
    if outer is not None:
        message = f"{quote(name)} is carried inside of {quote(trip.name(outer))}, and in the state as well"
        return Diagnostic("C249", message, place, f"drop it, or begin with `init {trip.name(outer)}[...] = empty`")
    joined = _joined(number, trip.fold, trip.members, trip.program)
    if joined is not None:
        return _lacks_first(name, joined, place, trip)
    message = f"{quote(name)} is in the state, and does not reduce {quote(trip.fold.rank)}"
    return Diagnostic("C249", message, place, "a state is a reduction over the rank of the fold: drop the others")


def _lacks_first(name: str, joined: int, place: Span | None, trip: Trip) -> Diagnostic:
    """The finding for a state that joins a reduction with elements, and is empty first."""
    message = f"{quote(name)} joins {quote(trip.name(joined))} with an element that its first state does not have"
    hint = f"begin with it, as in `init {name}[...] = sink`, or carry {trip.name(joined)} instead"
    return Diagnostic("C249", message, place, hint)


def _complete(name: str, trip: Trip) -> Iterator[Diagnostic]:
    """One part of the state has an init and a merge, with its ranks; more than one is C245."""
    ranks = trip.program.targets[name].ranks
    left = f"{name}[{','.join(ranks)}]" if ranks else name
    inits = [init for init in trip.fold.init if init.target.name == name]
    merges = [merge for merge in trip.fold.merge if merge.target.name == name]
    older = left.replace(name, f"{name}'", 1)
    for line, count, form in (("init", len(inits), "empty"), ("merge", len(merges), older)):
        if not count:
            hint = f"write `{line} {left} = {form}`" + " and what moves it" * (line == "merge")
            yield Diagnostic("C249", f"{quote(name)} has no `{line}`", trip.place("state", name), hint)
    for part in fold_parts(trip.fold):
        if part.target.name == name and part.target.ranks != ranks:
            message = f"{quote(name)} is defined with {_listed(ranks)}, and has {_listed(part.target.ranks)} here"
            yield Diagnostic("C249", message, part.target.span, f"write {left}")
    number = trip.program.owner[name]
    for init in inits:
        if number in trip.joins and init.expr is None:
            yield _lacks_first(name, trip.joins[number], init.span, trip)
        elif number not in trip.joins and init.expr is not None:
            message = f"{quote(name)} begins with an element that its statement does not have"
            hint = (
                f"write `init {left} = empty`; to add an element, give it a statement that joins it: max({left}, ...)"
            )
            yield Diagnostic("C249", message, init.span, hint)
    for merge in merges:
        if trip.chooser(number) in CHOOSERS and not _is_plain(merge):
            message = f"{quote(name)} comes from {trip.chooser(number)}, and its merge changes it"
            hint = f"write `merge {left} = {older}`"
            yield Diagnostic("C249", message, merge.span, hint)


def _listed(ranks: tuple[str, ...]) -> str:
    return f"the rank{'s' * (len(ranks) > 1)} {quoted_list(ranks)}" if ranks else "no ranks"


def _is_plain(merge: FoldMerge) -> bool:
    """Whether a merge takes the state of a part as it is."""
    return merge.expr == Read(f"{merge.target.name}'", tuple(map(Rank, merge.target.ranks)))


def _moved(trip: Trip) -> Iterator[Diagnostic]:
    """C244: a state that depends on another one says what it counts for when that one changes."""
    for number in (n for n in trip.members if n in trip.states):
        if number in trip.below[number]:
            message = f"{quote(trip.name(number))} depends on its own state"
            hint = "a block would need the state behind the last one: end the fold before it"
            yield Diagnostic("C244", message, trip.stmt(number).span, hint)
        elif trip.below[number] & trip.states:
            yield from _stale(number, trip)


def _stale(number: int, trip: Trip) -> Iterator[Diagnostic]:
    name, others, chooser = quote(trip.name(number)), _states_below(number, trip), trip.chooser(number)
    if chooser in UNMOVED:
        message = f"{name} takes the {chooser} of what depends on {others} of the same fold"
        hint = f"which element is chosen may change with the state: end the fold before {name}, with a trip of its own"
        yield Diagnostic("C244", message, trip.stmt(number).span, hint)
        return
    for merge in trip.fold.merge:
        if trip.program.owner[merge.target.name] == number and _is_plain(merge):
            other = trip.name(min(trip.below[number] & trip.states))
            message = f"{name} depends on {others}, and its merge takes an older {name} as it is"
            note = Note(f"{name} is computed here", trip.stmt(number).span)
            hint = f"say what an older one counts for when {other} has changed: ... * exp({other}'[...] - {other}[...])"
            yield Diagnostic("C244", message, merge.span, hint, (note,) if note.span else ())


def _states_below(number: int, trip: Trip) -> str:
    """The states that a member depends on, in words."""
    found = [quote(trip.name(n)) for n in trip.members if n in trip.below[number] & trip.states and n != number]
    return f"the state{'s' * (len(found) > 1)} {quoted_list(found)}"


def _outside(trip: Trip) -> Iterator[Diagnostic]:
    """C244, C249: what holds for one block, or for the state so far, is read inside of the trip only."""
    inner = {inside: outer for outer, inside in trip.joins.items()}
    dated = [n for n in trip.members if carries(trip.stmt(n), trip.fold.rank) and trip.dated(n)]
    for number in (*dated, *inner):
        name = trip.name(number)
        for reader, place in _readers(number, trip):
            if number in inner and reader != inner[number]:
                message = (
                    f"{quote(name)} is carried inside of {quote(trip.name(inner[number]))}: it holds for a block only"
                )
                hint = f"read {quote(trip.name(inner[number]))}, or carry {quote(name)} in the state of its own"
                yield Diagnostic("C249", message, place, hint)
            elif number not in inner and reader not in trip.members:
                message = f"{quote(name)} depends on {_states_below(number, trip)}, and is needed outside of the fold"
                hint = f"its blocks are computed with states that change later: compute {quote(name)} behind the fold"
                yield Diagnostic("C244", message, place, hint)


def _readers(number: int, trip: Trip) -> Iterator[tuple[int | None, Span | None]]:
    """The statements that read a member, each once with the place; None for the caller."""
    names = _names(number, trip.program)
    for result in trip.program.cascade.results:
        if result.name in names:
            yield None, result.span
    for reader, fact in enumerate(trip.program.facts):
        if isinstance(fact.stmt, Call) and not set(names).isdisjoint(fact.stmt.args):
            yield reader, fact.stmt.span
        found = (read.span for scan in fact.scans() for read, _ in scan.reads if read.tensor in names)
        yield from ((reader, span) for span in list(found)[:1])


# --- first values and merges -----------------------------------------------------------------------------------------


def _parts(trip: Trip) -> Iterator[FoldInit | FoldMerge]:
    """The inits and merges of the states."""
    return (part for part in fold_parts(trip.fold) if trip.program.owner[part.target.name] in trip.states)


def _reads_in(part: FoldInit | FoldMerge) -> list[Read]:
    nodes = () if part.expr is None else walk(part.expr)
    return [node for node in nodes if isinstance(node, Read)]


def _distinct(found: Iterable[Read]) -> list[Read]:
    """One read of each tensor at each index."""
    return list(dict.fromkeys(found))


def _expressions(trip: Trip) -> Iterator[Diagnostic]:
    """C249: an init and a merge compute one element, at the ranks of their left side, from what is known there."""
    for part in _parts(trip):
        yield from _pointwise(part, part.expr)
        for read in _distinct(_reads_in(part)):
            why, hint = _unknown_yet(part, read, trip)
            if why:
                line = "an init" if isinstance(part, FoldInit) else "a merge"
                message = f"{line} of {quote(part.target.name)} reads {quote(read.tensor)}, {why}"
                yield Diagnostic("C249", message, read.span, hint)


def _pointwise(part: FoldInit | FoldMerge, expr: Expr | None) -> Iterator[Diagnostic]:
    line = "an init" if isinstance(part, FoldInit) else "a merge"
    nodes = () if expr is None else tuple(walk(expr))
    reductions = [node for node in nodes if isinstance(node, (Reduce, Use))]
    for node in reductions or nodes:
        if isinstance(node, (Reduce, Use)):
            what = node.reducer if isinstance(node, Reduce) else node.function
            message = f"{line} computes one element, and uses {quote(what)}"
            yield Diagnostic("C249", message, node.span, "give it a statement of its own, and read that")
        elif isinstance(node, Rank) and node.name not in part.target.ranks:
            message = f"{line} mentions {quote(node.name)}, which is not on its left"
            yield Diagnostic("C249", message, node.span, f"{quote(part.target.name)} has {_listed(part.target.ranks)}")


def _unknown_yet(part: FoldInit | FoldMerge, read: Read, trip: Trip) -> tuple[str, str | None]:
    """Why a read of an init or a merge has no value there, and what to do; "" where it has one."""
    name, fold = state_of(read.tensor), trip.fold
    owner = trip.program.owner.get(name)
    if read.tensor != name:
        if name not in trip.program.places:
            return "", None  # C203
        if isinstance(part, FoldInit):
            return "a part of the state, and no part comes before it", f"read {name}"
        if name not in fold.state:
            return "which is not in the state", f"states of this fold: {quoted_list(fold.state)}"
        return "", None
    if owner is None:
        return "", None  # a parameter
    if owner not in trip.members:
        late = not _needs(owner, trip.program).isdisjoint(trip.members)
        return ("which needs the fold", "read what is known before the trip") if late else ("", None)
    if carries(trip.stmt(owner), fold.rank):
        return f"which has the rank {quote(fold.rank)}", "read states, and what does not depend on the rank"
    if owner in trip.joins.values():
        return "which holds for a block only", f"read {trip.name(next(m for m, n in trip.joins.items() if n == owner))}"
    if isinstance(part, FoldInit):
        return _before_init(part, owner, trip)
    at = trip.members.index
    if at(owner) >= at(trip.program.owner[part.target.name]):
        own = owner == trip.program.owner[part.target.name]
        hint = f"read the part, {name}'" if own else f"move {quote(name)} before {quote(part.target.name)} in `update`"
        return ("which it computes" if own else "which comes after it in the update"), hint
    return "", None


def _before_init(part: FoldInit, owner: int, trip: Trip) -> tuple[str, str | None]:
    """Whether an init may read a member without the rank: the states in it have their first value already."""
    names = [init.target.name for init in trip.fold.init]
    known = {trip.program.owner[name] for name in names[: names.index(part.target.name)]}
    if owner == trip.program.owner[part.target.name]:
        return "which it begins", "make it of what is known before the trip"
    lacking = ({owner} if owner in trip.states else trip.below[owner] & trip.states) - known
    if not lacking:
        return "", None
    late = quote(trip.name(min(lacking)))
    return f"and {late} has no first value yet", f"write the init of {late} before this one"


def _needs(number: int, program: Program) -> frozenset[int]:
    """The statements that a statement needs, itself included."""
    found = {number}
    todo = [number]
    while todo:
        new = [n for n in program.needs[todo.pop()] if n not in found]
        found.update(new)
        todo += new
    return frozenset(found)


# --- behind the trip -------------------------------------------------------------------------------------------------


def _finalize(trip: Trip) -> Iterator[Diagnostic]:
    """C249: what is finalized is a function of the final state, without the rank."""
    for name in trip.fold.finalize:
        number, why = trip.program.owner[name], ""
        stmt = trip.stmt(number)
        if number in trip.members:
            why, hint = "is updated in the trip as well", "it is final behind the last block: drop it here"
        elif carries(stmt, trip.fold.rank) or reduces(stmt, trip.fold.rank):
            why, hint = f"goes over {quote(trip.fold.rank)} again", "leave it out: it is another trip"
        elif _needs(number, trip.program).isdisjoint(trip.states):
            why, hint = "depends on no state of the fold", "leave it out: it runs before or behind the trip"
        if why:
            yield Diagnostic("C249", f"{quote(name)} is finalized, and {why}", trip.place("finalize", name), hint)


RULES: tuple[Callable[[Trip], Iterator[Diagnostic]], ...] = (
    _needed,
    _in_order,
    _streams,
    _closed,
    _state,
    _moved,
    _outside,
    _expressions,
    _finalize,
)
