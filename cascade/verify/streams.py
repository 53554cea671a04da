"""Rules about streams: what a part reads was written before, by streams and waits alone; which waits are needless.

    split t into 2                          Y.1 reads H at t, so it needs H.1, and nothing makes it wait
    stream a { H.0, H.1 }           -->     C255, help: wait Y.1 on H.1
    stream b { Y.0, Y.1 }
    wait Y.0 on H.0

A part of a reader needs a part of a writer unless it provably does not: both stand plainly at ranks that are split
alike, or a filter compares such ranks (behind `n <= m` a part of m needs the parts of n up to its own). What no stream
and no wait names is computed for whoever reads it, so needs go through it. It shares no code with the interpreter,
which runs parts in random orders that streams and waits allow.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from cascade.errors import Diagnostic, Span, quoted_list
from cascade.ir import (
    Apply, Call, Cascade, Cast, Einsum, Expr, Part, Rank, Read, Reduce, Split, Stmt, Stream, TopK, Wait,
)  # fmt: skip
from cascade.scopes import Binder
from cascade.verify.cycles import offset
from cascade.verify.program import Program, cyclic, program_of, strongly_connected
from cascade.verify.schedule import part_text
from cascade.verify.statements import ranks_in_sight
from cascade.walk import children, defines, expressions, substitute, targets, walk
from cascade.wording import quote

Node: TypeAlias = tuple[int, int | None]
"""A part: the number of its statement, and its own; None for the whole."""

Digits: TypeAlias = Mapping[str, int]
"""Of each rank that is split, which of its stretches."""

MAYBE_ABSENT = ("default", "select")
"""Operations that are present where an operand is not."""


def check_streams(program: Program) -> Iterator[Diagnostic]:
    """C255: a part that streams name can run alone, and waits for all that it reads."""
    found = _Streams(program)
    if not found.places or not found.known:
        return
    wrong = list(found.unable())
    yield from wrong
    if wrong:
        return
    for node, needs in found.needs.items():
        late = [other for other in needs if other not in found.behind[node]]
        if late:
            message = f"{quote(found.text(node))} reads {quote(found.text(late[0]))}, and nothing makes it wait"
            hint = quoted_list(f"wait {found.text(node)} on {found.text(other)}" for other in late)
            yield Diagnostic("C255", message, found.places[node], hint)


def needless_waits(cascade: Cascade) -> tuple[str, ...]:
    """The waits of a verified cascade for what their part does not need, neither itself nor by what it needs."""
    found = _Streams(program_of(cascade, {}))
    if not found.places or not found.known:
        return ()
    needed = _closed({node: set(needs) for node, needs in found.needs.items()})
    return tuple(
        f"wait {part_text(wait.part)} on {part_text(wait.on)}: {part_text(wait.part)} does not need it"
        for wait in found.waits
        if found.node(wait.on) not in needed[found.node(wait.part)]
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """A read on the way to a part: its tensor and index, in terms of the part's ranks, and what holds there."""

    tensor: str
    index: tuple[Expr, ...]
    filters: tuple[Expr, ...]


@dataclass(eq=False)
class _Streams:
    """The parts that the streams and waits of a program name, what each needs and what each is behind."""

    program: Program
    own: dict[int, tuple[Expr, ...]] = field(default_factory=dict)  # what holds where a statement is present

    @cached_property
    def waits(self) -> tuple[Wait, ...]:
        """The waits of the schedule."""
        return tuple(item for item in self.program.cascade.schedule if isinstance(item, Wait))

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts as the schedule names them."""
        listed = (part for i in self.program.cascade.schedule if isinstance(i, Stream) for part in i.parts)
        return (*listed, *(part for wait in self.waits for part in (wait.part, wait.on)))

    @cached_property
    def known(self) -> bool:
        """Whether all that is named exists: another rule tells."""
        return all(p.name in self.program.owner and self._exists(p) for p in self.parts)

    def _exists(self, part: Part) -> bool:
        number = self.program.owner[part.name]
        counts = [_count(split) for split in self.splits[number]]
        return part.index is None or (bool(counts) and (None in counts or part.index < self.count(number)))

    @cached_property
    def places(self) -> dict[Node, Span | None]:
        """Every part with the place of its first mention."""
        found: dict[Node, Span | None] = {}
        for part in self.parts if self.known else ():
            found.setdefault(self.node(part), part.span)
        return found

    def node(self, part: Part) -> Node:
        """The part by the number of its statement."""
        return self.program.owner[part.name], part.index

    def text(self, node: Node) -> str:
        """A part as the schedule writes it."""
        return part_text(Part(defines(self._stmt(node[0]))[0], node[1]))

    def _stmt(self, number: int) -> Stmt:
        return self.program.facts[number].stmt

    # --- parts -------------------------------------------------------------------------------------------------------

    @cached_property
    def splits(self) -> list[list[Split]]:
        """The splits of the ranks of every statement."""
        schedule = [item for item in self.program.cascade.schedule if isinstance(item, Split)]
        sight = [ranks_in_sight(fact) for fact in self.program.facts]
        return [
            [split for split in schedule if isinstance(fact.stmt, Call) or split.rank in ranks]
            for fact, ranks in zip(self.program.facts, sight, strict=True)
        ]

    def count(self, number: int) -> int:
        """How many parts a statement has."""
        total = 1
        for split in self.splits[number]:
            total *= _count(split) or 1
        return total

    def digits(self, node: Node) -> dict[str, int]:
        """Of each rank that is split, which stretch a part has; the first split is the outermost."""
        number, index = node
        found: dict[str, int] = {}
        for split in reversed(self.splits[number] if index is not None else ()):
            index, found[split.rank] = divmod(index or 0, _count(split) or 1)
        return found

    def unable(self) -> Iterator[Diagnostic]:
        """Parts that cannot run alone."""
        for node, span in self.places.items():
            number, index = node
            stmt, name = self._stmt(number), quote(self.text((number, None)))
            if index is None:
                if others := [self.text(other) for other in self.places if other[0] == number and other != node]:
                    yield Diagnostic("C255", f"{name} is named as a whole and in parts, {others[0]}", span)
                continue
            ranks = {rank for target in targets(stmt) for rank in target.ranks} | _reduced(stmt)
            nested = self._nested(number)
            inner = [s.rank for s in self.splits[number] if s.rank not in ranks or s.rank in nested]
            if isinstance(stmt, Call) or inner:
                what = "is a call" if isinstance(stmt, Call) else f"needs {quote(inner[0])} as a whole"
                message, hint = (
                    f"{name} {what}: it has no parts that run alone",
                    f"name it as a whole: {self.text((number, None))}",
                )
                yield Diagnostic("C255", message, span, hint)
            elif None in [_count(split) for split in self.splits[number]]:
                yield Diagnostic("C255", f"how many parts {name} has is not known", span, "split a rank into a number")
            elif _reduced(stmt) & {split.rank for split in self.splits[number]}:
                missing = [i for i in range(self.count(number)) if (number, i) not in self.places]
                if missing:
                    message = f"{name} is a sum over its parts, and {self.text((number, missing[0]))} is in no stream"
                    yield Diagnostic("C255", message, span, "name all of its parts, or none")

    def _nested(self, number: int) -> set[str]:
        """The ranks of which a stretch is none of the statement: bound below its top, or counting what is kept."""
        stmt, body = self._stmt(number), self.program.facts[number].body
        if isinstance(stmt, TopK):
            return {rank for rank in targets(stmt)[0].ranks if rank not in body.free}
        top = stmt.expr if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else None
        return {rank for binder in body.binders if binder.node is not top for rank in _bound(binder)}

    # --- what comes before what --------------------------------------------------------------------------------------

    @cached_property
    def behind(self) -> dict[Node, set[Node]]:
        """For every part, all that surely ends before it starts."""
        found: dict[Node, set[Node]] = {node: set() for node in self.places}
        for item in self.program.cascade.schedule:
            if isinstance(item, Stream):
                for early, late in zip(item.parts, item.parts[1:], strict=False):
                    found[self.node(late)].add(self.node(early))
            elif isinstance(item, Wait):
                found[self.node(item.part)].add(self.node(item.on))
        return _closed(found)

    @cached_property
    def needs(self) -> dict[Node, tuple[Node, ...]]:
        """For every part, those that write what it reads."""
        return {
            node: tuple(dict.fromkeys(other for other in self._needs(node) if other != node)) for node in self.places
        }

    def _needs(self, node: Node) -> Iterator[Node]:
        digits = self.digits(node)
        todo, seen = list(self._reads(node[0], None, ())), set[_Place]()
        for place in todo:
            number = self.program.owner.get(place.tensor)
            if number is None or place in seen:
                continue
            seen.add(place)
            if (number, None) in self.places:
                yield number, None
                continue
            named = [i for i in range(self.count(number)) if (number, i) in self.places]
            for index in named:
                if self._meets(place, number, index, node[0], digits):
                    yield number, index
            if len(named) < self.count(number):
                todo += self._reads(number, place.index, place.filters)

    def _meets(self, place: _Place, number: int, index: int, reader: int, digits: Digits) -> bool:
        """Whether a read of the part of a reader may touch a part of what it reads."""
        ranks = next((t.ranks for t in targets(self._stmt(number)) if t.name == place.tensor), ())
        theirs = self.digits((number, index))
        for split in self.splits[number]:
            if split.rank not in ranks or len(place.index) != len(ranks):
                continue
            at, part = place.index[ranks.index(split.rank)], theirs[split.rank]
            alike = {s.rank: digits[s.rank] for s in self.splits[reader] if s.rank in digits and self._alike(s, split)}
            if any(not _may(relation, part, own) for relation, own in _relations(at, place.filters, alike)):
                return False
        return True

    def _alike(self, one: Split, other: Split) -> bool:
        """Whether two ranks are cut at the same coordinates."""
        extents = self.program.inference.shapes.ranks
        same = extents.get(one.rank) == extents.get(other.rank)
        return one.rank == other.rank or (same and (one.parts, one.cuts) == (other.parts, other.cuts))

    # --- what a statement reads --------------------------------------------------------------------------------------

    def _reads(self, number: int, index: Sequence[Expr] | None, filters: tuple[Expr, ...]) -> Iterator[_Place]:
        """The reads of a statement at some place of what it defines; ranks that it binds get names of their own."""
        stmt = self._stmt(number)
        if isinstance(stmt, Call):
            for name in stmt.args:
                yield _Place(name, (), ())
            return
        left = targets(stmt)[0].ranks
        fresh: dict[str, Expr] = {}
        if index is not None:
            filters = () if self._steps(number) else filters  # around a recurrence they would pile up
            inner = ranks_in_sight(self.program.facts[number])
            fresh = {rank: Rank(f"{defines(stmt)[0]}.{rank}") for rank in inner}
            if not self._steps(number) and len(index) == len(left):
                fresh |= dict(zip(left, index, strict=True))
        term = [node for node in _strict(_top(stmt)) if isinstance(node, Read)]
        held = (*_conjuncts(stmt.where), *(one for node in term for one in self._present(node)))
        for node in (node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)):
            told = held if any(node is other for other in term) else _conjuncts(stmt.where)
            where = tuple(substitute(one, fresh) for one in told)
            index_there = tuple(substitute(one, fresh) for one in node.index)
            yield _Place(node.tensor, index_there, tuple(dict.fromkeys((*filters, *where))))

    def _present(self, node: Read) -> tuple[Expr, ...]:
        """What holds where a read has a value, in terms of its index."""
        number = self.program.owner.get(node.tensor)
        stmt = None if number is None else self._stmt(number)
        if number is None or stmt is None or self._steps(number) or isinstance(stmt, Call):
            return ()
        left = next(target.ranks for target in targets(stmt) if target.name == node.tensor)
        if number not in self.own:
            inside = (one for read in _strict(_top(stmt)) if isinstance(read, Read) for one in self._present(read))
            self.own[number] = tuple(one for one in (*_conjuncts(stmt.where), *inside) if _ranks(one) <= set(left))
        if len(left) != len(node.index):
            return ()
        return tuple(substitute(one, dict(zip(left, node.index, strict=True))) for one in self.own[number])

    def _steps(self, number: int) -> bool:
        """Whether a statement is part of a recurrence."""
        return number in self._recurring

    @cached_property
    def _recurring(self) -> frozenset[int]:
        edges = self.program.needs
        return frozenset(n for members in strongly_connected(edges) if cyclic(members, edges) for n in members)


def _bound(binder: Binder) -> tuple[str, ...]:
    """The ranks that a reduction or a use of a function binds."""
    return (binder.node.rank,) if isinstance(binder.node, TopK) else binder.node.ranks


def _count(split: Split) -> int | None:
    """How many parts a split makes; None where a symbol says."""
    if split.cuts:
        return len(split.cuts) + 1
    return split.parts if isinstance(split.parts, int) else None


def _top(stmt: Stmt) -> Expr:
    """What a statement computes at a point of its iteration space."""
    if isinstance(stmt, TopK):
        return stmt.body
    assert isinstance(stmt, Einsum)
    return stmt.expr.body if isinstance(stmt.expr, Reduce) else stmt.expr


def _reduced(stmt: Stmt) -> set[str]:
    """The ranks that a statement folds at its top."""
    if isinstance(stmt, TopK):
        return {stmt.rank}
    return set(stmt.expr.ranks) if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else set()


def _strict(expr: Expr) -> Iterator[Expr]:
    """An expression and what of it must be present for the whole to be: not what is reduced, nor what has a default."""
    todo = [expr]
    for one in todo:
        if isinstance(one, Cast) or (isinstance(one, Apply) and one.op not in MAYBE_ABSENT):
            todo += children(one)
    yield from todo


def _conjuncts(where: Expr | None) -> tuple[Expr, ...]:
    """The conditions of a filter that must all hold."""
    todo = [] if where is None else [where]
    for one in todo:
        if isinstance(one, Apply) and one.op == "and":
            todo += one.args
    return tuple(todo)


def _ranks(expr: Expr) -> set[str]:
    return {node.name for node in walk(expr) if isinstance(node, Rank)}


MIRRORED = {"le": "ge", "lt": "gt", "ge": "le", "gt": "lt", "eq": "eq"}


def _relations(at: Expr, filters: Sequence[Expr], alike: Digits) -> Iterator[tuple[str, int]]:
    """How the stretch that an index falls into compares with stretches that are given, of ranks that are cut alike."""
    here = offset(at)
    if here is None:
        return
    if here[0] in alike:
        yield ("eq" if here[1] == 0 else "le" if here[1] < 0 else "ge"), alike[here[0]]
    for one in filters:
        if not isinstance(one, Apply) or one.op not in MIRRORED:
            continue
        sides = offset(one.args[0]), offset(one.args[1])
        for (left, right), op in ((sides, one.op), ((sides[1], sides[0]), MIRRORED[one.op])):
            if left is None or right is None or left[0] != here[0] or right[0] not in alike:
                continue
            far = right[1] - left[1] + here[1]  # index <op> right rank + far
            if op in ("le", "lt") and far <= 0:
                yield "le", alike[right[0]]
            elif op in ("ge", "gt") and far >= 0:
                yield "ge", alike[right[0]]
            elif op == "eq" and far == 0:
                yield "eq", alike[right[0]]


def _may(relation: str, part: int, own: int) -> bool:
    """Whether a stretch may stand in this relation to another."""
    return {"eq": part == own, "le": part <= own, "ge": part >= own}[relation]


def _closed(before: Mapping[Node, set[Node]]) -> dict[Node, set[Node]]:
    """All that each part is behind, however far."""
    found = {node: set(own) for node, own in before.items()}
    changed = True
    while changed:
        changed = False
        for own in found.values():
            more = own.union(*(found[other] for other in own))
            if more != own:
                own |= more
                changed = True
    return found
