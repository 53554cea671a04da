"""The lifting of all reductions over one rank: the trip of each, what takes its place, and the folds of the trips."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade.inference import infer_shapes
from cascade.ir import (
    Apply, Cascade, Const, Einsum, Expr, Extent, Fold, FoldInit, FoldMerge, Local, Rank, Read, Reduce, Stmt,
    Target, TopK,
)  # fmt: skip
from cascade.order import units
from cascade.passes.accumulate import Made, Maker, NoAccumulator, read
from cascade.passes.gauge import gauges
from cascade.passes.legality import Domains, named, outside_frame
from cascade.passes.lifts import Blocked, Lifted, Lifting
from cascade.passes.memo import remembered
from cascade.passes.monotone import peel, sign_of
from cascade.passes.separate import FINE, Atoms, Separation, separate
from cascade.passes.telling import renamed_reads, short, told, with_names
from cascade.passes.trips import Trips, conjunction, folded, is_map, mentions, operand, own_reads
from cascade.passes.virtual import with_virtual
from cascade.presence import may_be_absent
from cascade.text import render_expr, render_stmt
from cascade.walk import children, defines, free_ranks, fresh, names, reads, substitute, targets, walk, with_children


@dataclass(slots=True, eq=False)
class Trip:
    """What one trip carries: states with their merges, and the lifts that made it."""

    states: dict[str, Expr] = field(default_factory=dict)  # merge by state
    made: list[tuple[str, Made]] = field(default_factory=list)
    finals: list[str] = field(default_factory=list)
    lifted: list[Lifted] = field(default_factory=list)


class Refused(Exception):
    """A reduction that is not lifted."""

    def __init__(self, item: str, reason: str, evidence: tuple[int, ...] = ()) -> None:
        super().__init__(reason)
        self.item, self.reason, self.evidence = item, reason, evidence


_Put = Callable[[Expr], Expr]  # an expression over atoms with the parts in their places
_Test = Callable[[Expr], bool]


@dataclass(eq=False)
class Lifter:
    """The lifting of all reductions over one rank."""

    cascade: Cascade
    rank: str
    ordered: bool
    refused: dict[str, Blocked]
    body: list[Stmt] = field(default_factory=list)
    current: dict[str, Stmt] = field(default_factory=dict)  # the same, by what they define
    blocked: list[Blocked] = field(default_factory=list)
    trips: dict[int, Trip] = field(default_factory=dict)
    makers: dict[int, Maker] = field(default_factory=dict)

    def run(self) -> Lifting:
        """The cascade with every reduction over the rank lifted that can be."""
        self.stmts = {name: stmt for stmt in self.cascade.body for name in defines(stmt)}
        cyclic = frozenset(
            name for unit in units(self.cascade.body, ()) if unit.cyclic for s in unit.statements for name in defines(s)
        )
        self.levels = Trips(self.rank, dict(self.stmts), cyclic)
        self.absent = may_be_absent(self.cascade)
        plain = {
            name: s for name, s in self.stmts.items() if isinstance(s, Einsum) and not s.inits and name not in cyclic
        }
        self.domains = Domains(self.rank, self.absent, plain)
        self.taken = names(self.cascade)
        maps = (stmt for stmt in self.cascade.body if is_map(stmt) and isinstance(stmt, Einsum) and stmt.where is None)
        self.named = {stmt.expr: stmt.target.name for stmt in maps}
        self.shapes = infer_shapes(self.cascade)
        self.types = " ".join(param.dtype.value if param.dtype else "?" for param in self.cascade.params)
        for stmt in self.cascade.body:
            if self.rank in folded(stmt) and not set(defines(stmt)) & cyclic:
                self.reduction(stmt)
            else:
                self.other(stmt)
        if not any(trip.made for trip in self.trips.values()):
            return Lifting(self.cascade, (), tuple(self.blocked))
        return self.assembled()

    def add(self, *stmts: Stmt) -> None:
        """Statements of the cascade that is made."""
        self.body += stmts
        for stmt in stmts:
            self.current.update((name, stmt) for name in defines(stmt))

    def other(self, stmt: Stmt) -> None:
        """A statement that does not fold the rank."""
        self.levels.enter(stmt)
        self.add(stmt)
        if self.levels.touches(stmt) and not is_map(stmt):
            trip = self.levels.streams[defines(stmt)[0]] - 1
            frames = tuple(n for e in own_reads(stmt) for n in self.levels.frames(e, trip)) if trip else ()
            for producer in self.levels.reductions_below(frames, trip)[:1]:
                why = f"'{defines(stmt)[0]}' stands between, and is not pointwise in {self.rank}"
                self.blocked.append(named("pointwise", defines(stmt)[0], self.rank, (producer, defines(stmt)[0]), why))

    def reduction(self, stmt: Stmt) -> None:
        """A statement that folds the rank: into the trip of what it reads where that can be, else into the next."""
        trip, alone = self.levels.earliest(stmt)
        body = operand(stmt)
        assert body is not None and isinstance(stmt, (Einsum, TopK))
        expr, filters = self.levels.inlined(body, trip)
        frames = self.levels.frames(expr, trip)
        name = defines(stmt)[0]
        producers = self.levels.reductions_below(frames, trip)
        if self.levels.too_late(expr, trip):  # behind a recurrence, or what is not pointwise: told where that stands
            trip, producers = alone, ()
        if producers:
            try:
                self.lift(stmt, expr, conjunction((*filters, stmt.where)), trip, producers)
            except Refused as no:
                edge = (producers[-1], name)
                self.blocked.append(named(no.item, name, self.rank, edge, no.reason, no.evidence))
                trip += 1
                self.add(stmt)
        else:
            self.add(stmt)
        self.levels.settle(stmt, trip)

    def lift(self, stmt: Einsum | TopK, expr: Expr, where: Expr | None, trip: int, producers: Sequence[str]) -> None:
        """The accumulators of one reduction; raises `Refused` where there are none."""
        name = defines(stmt)[0]
        if name in self.refused:
            raise Refused(self.refused[name].item, self.refused[name].reason, self.refused[name].evidence)
        reducer = "topk" if isinstance(stmt, TopK) else stmt.expr.reducer  # type: ignore[union-attr]
        if self.ordered and reducer in ("sum", "prod"):
            raise Refused("order", "lifting reassociates a floating-point sum, and the order was to be kept")
        if self.rank in [rank for target in targets(stmt) for rank in target.ranks]:
            raise Refused("pointwise", f"'{name}' keeps {self.rank} and reduces it")
        if across := self.varies(stmt, expr, trip):
            raise Refused("pointwise", f"'{name}' folds {across} as well, and the state differs along it")
        side = self.side(trip)
        if where is not None and any(isinstance(node, Read) and side(node) == "r" for node in walk(where)):
            raise Refused("domain", "its filter depends on the state")
        made = self.replaced(stmt, expr, where, trip, reducer)
        if lost := {rank for new in made.statements for rank in set(folded(new)) - _indexed(operand(new))}:
            raise Refused("form", f"nothing that is left of it tells the extent of {min(lost)}")
        self.place(stmt, made, trip)
        self.record(stmt, made, trip, tuple(producers), reducer)

    def varies(self, stmt: Einsum | TopK, expr: Expr, trip: int) -> str:
        """A rank beside this one that a statement folds and a state that it reads has; empty where there is none."""
        others = set(folded(stmt)) - {self.rank}
        side = self.side(trip)
        states = (node for node in walk(expr) if isinstance(node, Read) and side(node) == "r")
        return next((rank for node in states for rank in sorted(others.intersection(free_ranks(node)))), "")

    def side(self, trip: int) -> _Side:
        """Which side an expression is of, for a reduction of a trip."""
        known = (name for name, level in self.levels.level.items() if level == trip and not self.levels.carries(name))
        return _Side(self.rank, frozenset(known))

    def replaced(self, stmt: Einsum | TopK, expr: Expr, where: Expr | None, trip: int, reducer: str) -> Made:
        atoms = Atoms(self.side(trip))
        abstract = atoms.abstract(expr)
        gathered = next((node for node in walk(abstract) if isinstance(node, Read)), None)
        if gathered is not None:
            raise Refused("pointwise", f"'{gathered.tensor}' is read at a place that depends on the state")

        def concrete(part: Expr) -> Expr:
            return substitute(part, {}, atoms.parts)

        if reducer == "sum":
            assert isinstance(stmt, Einsum)
            return self.summed(stmt, expr, where, trip, abstract, atoms, concrete)
        if reducer == "count":
            return self.counted(stmt, expr, where, atoms)
        if reducer in ("max", "min", "argmax", "argmin", "topk"):
            return self.chosen(stmt, expr, where, abstract, concrete, reducer)
        if reducer == "prod":
            assert isinstance(stmt, Einsum)
            return self.multiplied(stmt, expr, where, abstract, atoms)
        raise Refused("form", f"no rule lifts {reducer}")

    def summed(
        self, stmt: Einsum, expr: Expr, where: Expr | None, trip: int, abstract: Expr, atoms: Atoms, concrete: _Put
    ) -> Made:
        """A sum: finite rank, no more and no less."""
        found = self.separation(expr, where, trip, abstract, atoms, concrete)
        if not found.families:
            raise Refused(found.item, found.reason, found.ranks)
        for item, reason in self.unbounded(found, expr, where, concrete):
            raise Refused(item, reason)
        filters = sorted((f for f in self.domains.of(expr) if not isinstance(f, Read)), key=render_expr)
        for chosen in (where, conjunction((where, *filters))):
            made = self.accumulated(found, stmt, expr, chosen, trip, atoms, concrete)
            if made is not None:
                made.terms = max(found.ranks[-1] if found.ranks else 0, 1)
                return made
        raise Refused("domain", "its terms have a value at other coordinates than their product")

    def separation(
        self, expr: Expr, where: Expr | None, trip: int, abstract: Expr, atoms: Atoms, concrete: _Put
    ) -> Separation:
        """The terms of a map; where the frames of its exponentials cancel, those without."""
        finer = atoms.finer(abstract, functools.partial(self.taken_in, trip=trip))
        maxima = self.maxima(atoms, trip) if finer else {}
        plain = ("sum", self.types, str(where), render_expr(abstract), repr(sorted(atoms.shifts.items())))
        if finer:
            taken = [f"{name} = {render_expr(part)}" for name, part in finer.items()]
            key = (*plain, repr(taken), repr(sorted(maxima.items())))
            fine: Separation = remembered("separation", key, lambda: separate(abstract, atoms.shifts, finer, maxima))
            if not any(self.unbounded(fine, expr, where, concrete)):
                return fine
        found: Separation = remembered("separation", plain, lambda: separate(abstract, atoms.shifts))
        return found

    def taken_in(self, expr: Expr, trip: int) -> Expr:
        """An expression of the state with sums of states, such as r + log(d), taken in: a frame may be hidden there."""
        if isinstance(expr, Read):
            stmt = self.current.get(expr.tensor)
            if stmt is None or self.levels.level.get(expr.tensor) != trip or self.levels.carries(expr.tensor):
                return expr
            if not isinstance(stmt, Einsum) or not is_map(stmt) or stmt.where is not None or not _is_sum(stmt.expr):
                return expr
            return self.taken_in(substitute(stmt.expr, dict(zip(stmt.target.ranks, expr.index, strict=True))), trip)
        return with_children(expr, tuple(self.taken_in(child, trip) for child in children(expr)))

    def unbounded(self, found: Separation, expr: Expr, where: Expr | None, concrete: _Put) -> Iterator[tuple[str, str]]:
        """Condition `domain` for everything that the terms are carried against."""
        for family in found.families:
            if family.exponential and family.rho is not None:
                for rho in (family.rho, *(frame for _, frame in family.frames)):
                    yield from outside_frame(expr, where, self.states_of(concrete(rho)), self.domains)

    def maxima(self, atoms: Atoms, trip: int) -> dict[str, str]:
        """The parts of the element whose largest value is a part of the state, and that part."""
        found = {}
        for name, part in atoms.parts.items():
            stmt = self.current.get(part.tensor) if isinstance(part, Read) and name.startswith("r") else None
            if not isinstance(stmt, Einsum) or not isinstance(part, Read) or not isinstance(stmt.expr, Reduce):
                continue
            if stmt.expr.reducer == "max" and stmt.expr.ranks == (self.rank,):
                body, _ = self.levels.inlined(stmt.expr.body, trip)
                element = substitute(body, dict(zip(stmt.target.ranks, part.index, strict=True)))
                if element in atoms.names:
                    found[atoms.names[element]] = name
        return found

    def accumulated(
        self, found: Separation, stmt: Einsum, expr: Expr, where: Expr | None, trip: int, atoms: Atoms, concrete: _Put
    ) -> Made | None:
        """The accumulators under a filter; None where one has a value at other coordinates than the whole map."""
        maker = self.makers.setdefault(trip, Maker(self.rank, self.taken, self.partial, self.named))
        before = dict(maker.known)
        present = next(self.present(expr, (self.rank,), atoms), None)
        try:
            made = maker.of(found.families, concrete, stmt, where, self.steady(where), self.size(expr, where), present)
        except NoAccumulator:
            raise Refused("form", "a term lacks a reduced rank beside the trip's") from None
        filters = {where, *_conjuncts(where)}
        for (total, _), target in maker.known.items():  # those that others have made as well
            if not isinstance(total, Reduce) or target.name not in made.states:
                continue
            if self.domains.of(self.levels_inlined(total.body)) | filters != self.domains.of(expr) | filters:
                maker.known = before
                return None
        return made

    def multiplied(self, stmt: Einsum, expr: Expr, where: Expr | None, abstract: Expr, atoms: Atoms) -> Made:
        """A product: G(x)**H(r) * c(r) is the product of G, to the power of H, times c once for every coordinate."""
        assert isinstance(stmt.expr, Reduce)
        value, factor = _power_of(abstract)
        if value is None:
            raise Refused("form", "a product lifts where its map is a power of the element times a factor of the state")
        base, power = (value.args[0], value.args[1]) if isinstance(value, Apply) else (value, None)
        element = substitute(base, {}, atoms.parts)
        if power is not None and sign_of(element, self.stmts) != 2:
            raise Refused("form", "a power moves out of a product where its base is known to be positive")
        if self.domains.of(element) != self.domains.of(expr) or not set(stmt.expr.ranks) <= set(free_ranks(element)):
            raise Refused("domain", "its base has a value at other coordinates than the power")
        made = Made(deferred=[substitute(e, {}, atoms.parts) for e in (power, factor) if e is not None])
        kept = tuple(rank for rank in stmt.target.ranks if rank in _bound(element, where))
        state = Target(fresh(f"{stmt.target.name}_prod", self.taken), kept)
        made.statements.append(Einsum(state, dataclasses.replace(stmt.expr, body=element), where))
        made.states.append(state.name)
        made.merges[state.name] = read(state, "'")
        made.value = read(state)
        if power is not None:
            made.value = Apply("pow", (made.value, substitute(power, {}, atoms.parts)))
        if factor is not None:
            made.value = Apply(
                "mul", (made.value, self.repeated(substitute(factor, {}, atoms.parts), stmt, expr, where))
            )
        return made

    def repeated(self, factor: Expr, stmt: Einsum, expr: Expr, where: Expr | None) -> Expr:
        """A factor of the state, once for every coordinate of the product."""
        assert isinstance(stmt.expr, Reduce)
        size = self.size(expr, where)
        if size is None or stmt.expr.ranks != (self.rank,):
            raise Refused("form", "how often a factor of the state counts is not an extent")
        return Apply("pow", (factor, size))

    def counted(self, stmt: Einsum | TopK, expr: Expr, where: Expr | None, atoms: Atoms) -> Made:
        """How many coordinates are present does not depend on values: those of a part of the element are counted."""
        assert isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce)
        fitting = self.present(expr, stmt.expr.ranks, atoms)
        part = next((part for part in fitting if self.stands_for(part, expr, where, stmt)), None)
        if part is None:
            raise Refused("domain", "no part of the element is present where all of it is")
        made = Made(value=read(stmt.target))
        made.statements.append(dataclasses.replace(stmt, expr=dataclasses.replace(stmt.expr, body=part), where=where))
        made.states.append(stmt.target.name)
        made.merges[stmt.target.name] = read(stmt.target, "'")
        return made

    def present(self, expr: Expr, ranks: Sequence[str], atoms: Atoms) -> Iterator[Expr]:
        """The parts of the element that have the ranks, and a value wherever along the rank the whole map has one."""
        whole = self.domains.of(expr)
        parts = (part for name, part in atoms.parts.items() if name.startswith("x"))
        return (p for p in parts if self.domains.of(p) == whole and set(ranks) <= set(free_ranks(p)))

    def stands_for(self, part: Expr, expr: Expr, where: Expr | None, stmt: Einsum | TopK) -> bool:
        """Whether a part of a map may be reduced in its place where no value of the rest is asked for.

        It has the ranks that are kept, and is absent wherever the rest is, without the rank as well.
        """
        kept = {rank for target in targets(stmt) for rank in target.ranks} & _bound(expr, where)
        own = self.domains.of(expr)
        apart = self.domains.apart(expr, own, where) <= self.domains.apart(part, own, where)
        return apart and kept <= _bound(part, where)

    def levels_inlined(self, body: Expr) -> Expr:
        """The operand of an accumulator with the maps that were made for it taken in."""
        own = {s.target.name: s for maker in self.makers.values() for s in _known(maker)}

        def change(e: Expr) -> Expr:
            if isinstance(e, Read) and e.tensor in own and not isinstance(own[e.tensor].expr, Reduce):
                return change(own[e.tensor].expr)
            return with_children(e, tuple(change(c) for c in children(e))) if not isinstance(e, Read) else e

        return change(body)

    def chosen(
        self, stmt: Einsum | TopK, expr: Expr, where: Expr | None, abstract: Expr, concrete: _Put, reducer: str
    ) -> Made:
        """An extreme: of the inner value of a monotone map."""

        def side(part: Expr) -> str:
            letters = {node.name[0] for node in walk(part) if isinstance(node, Local)} - {"c"}
            return "m" if len(letters) > 1 else letters.pop() if letters else ""

        found = peel(abstract, side, lambda part: sign_of(concrete(part), self.stmts))
        if found is None:
            raise Refused("order law", f"the {reducer} is of a map that is not known to be monotone in the element")
        value = concrete(found.inner)
        if self.domains.of(value) != self.domains.of(expr):
            raise Refused("domain", "its value has other coordinates than the map around it")
        strict, target = reducer in ("topk", "argmax", "argmin"), targets(stmt)[0]
        if strict and not found.strict:
            raise Refused("order law", f"the map may make different elements equal, and {reducer} tells them apart")
        if strict and not self.stands_for(value, expr, where, stmt):
            raise Refused("domain", "the map around its value may be absent where the value is not")
        flipped = {"max": "min", "min": "max", "argmax": "argmin", "argmin": "argmax"}
        if found.direction < 0 and reducer == "topk":
            raise Refused("order law", "the map is decreasing, and topk keeps the largest")
        made = Made()
        kept = target.ranks if strict else tuple(rank for rank in target.ranks if rank in _bound(value, where))
        state = Target(fresh(f"{target.name}_{'top' if strict else reducer}", self.taken), kept)
        if isinstance(stmt, TopK):
            made.statements.append(dataclasses.replace(stmt, values=state, body=value, where=where))
            made.states += [state.name, stmt.coords.name]
            made.merges[stmt.coords.name] = read(stmt.coords, "'")
        else:
            assert isinstance(stmt.expr, Reduce)
            kind = flipped[reducer] if found.direction < 0 else reducer
            state = target if reducer.startswith("arg") else state
            made.statements.append(Einsum(state, dataclasses.replace(stmt.expr, reducer=kind, body=value), where))
            made.states.append(state.name)
        made.merges[state.name] = read(state, "'")
        made.value = read(state) if state is target else concrete(found.around(read(state)))
        return made

    # --- what the makers ask ------------------------------------------------------------------------------------------

    def partial(self, expr: Expr) -> Expr:
        """An expression of states as one of the states of a part: maps between are taken in, states are primed."""
        if isinstance(expr, Read) and expr.tensor in self.levels.level and not self.levels.carries(expr.tensor):
            stmt = self.current.get(expr.tensor) or self.stmts.get(expr.tensor)
            if stmt is not None and self.levels.level[expr.tensor] >= 1:
                if self.rank in folded(stmt):
                    return dataclasses.replace(expr, tensor=expr.tensor + "'")
                if not isinstance(stmt, Einsum) or not is_map(stmt) or stmt.target.name in self.levels.cyclic:
                    raise Refused("pointwise", f"'{expr.tensor}' stands between, and is no map of the state")
                return self.partial(substitute(stmt.expr, dict(zip(stmt.target.ranks, expr.index, strict=True))))
        if isinstance(expr, Read):
            return expr
        return with_children(expr, tuple(self.partial(child) for child in children(expr)))

    def in_states(self, expr: Expr) -> Expr:
        """The expression with maps between taken in."""
        return _unprimed(self.partial(expr))

    def states_of(self, expr: Expr) -> list[Stmt]:
        """The reductions of the trip that an expression depends on."""
        found = {node.tensor for node in walk(self.in_states(expr)) if isinstance(node, Read)}
        return [stmt for name, stmt in self.current.items() if name in found and self.rank in folded(stmt)]

    def steady(self, where: Expr | None) -> _Test:
        """Whether a frame is, behind the last element, the average of what is averaged in the trip."""

        def test(rho: Expr) -> bool:
            plain = self.in_states(rho)
            if not isinstance(plain, Apply) or plain.op != "div":
                return False
            total, number = plain.args
            stmt = self.current.get(total.tensor) if isinstance(total, Read) else None
            if stmt is None or not isinstance(stmt, Einsum) or stmt.where != where or not isinstance(stmt.expr, Reduce):
                return False
            size = self.shapes.ranks[self.rank]
            whole = Const(size) if isinstance(size, int) else Extent(size)
            full = where is None and not self.domains.of(stmt.expr.body)
            counted = self.current.get(number.tensor) if isinstance(number, Read) else None
            own = isinstance(counted, Einsum) and counted.where == where
            own = own and isinstance(counted.expr, Reduce) and counted.expr.reducer == "count"  # type: ignore[union-attr]
            return stmt.expr.ranks == (self.rank,) and ((full and number == whole) or own)

        return test

    def size(self, expr: Expr, where: Expr | None) -> Expr | None:
        """How many coordinates of the rank are present, where that is its extent."""
        if where is not None or self.domains.of(expr):
            return None
        found = self.shapes.ranks[self.rank]
        return Const(found) if isinstance(found, int) else Extent(found)

    # --- putting it together -----------------------------------------------------------------------------------------

    def place(self, stmt: Einsum | TopK, made: Made, trip: int) -> None:
        """The new statements in place of the old one; the reduction is a state itself where nothing is left to do."""
        target = targets(stmt)[0]
        last = made.statements[-1] if made.statements else None
        at = self.trips.setdefault(trip, Trip())
        if isinstance(made.value, Read) and made.value == read(target):
            self.add(*made.statements)
        elif (
            isinstance(made.value, Read)
            and last is not None
            and targets(last)[0].ranks == target.ranks
            and (made.value == read(targets(last)[0]) and isinstance(last, Einsum))
        ):
            old = last.target.name
            self.add(*made.statements[:-1], dataclasses.replace(last, target=target))
            made.states[made.states.index(old)] = target.name
            merge = made.merges.pop(old)
            made.merges[target.name] = renamed_reads(merge, {f"{old}'": f"{target.name}'"})
            shared = self.makers[trip].known
            shared |= {key: target for key, found in shared.items() if found.name == old}
        else:
            self.add(*made.statements, Einsum(target, made.value))
            at.finals.append(target.name)
            self.levels.level[target.name] = trip
        for new in made.statements:
            self.levels.settle(new, trip, trip + 1 if any(self.rank in t.ranks for t in targets(new)) else None)
        for name in (*made.states, *(name for new in made.statements for name in defines(new))):
            self.levels.level[name] = trip
            if name in self.current:
                self.levels.place.setdefault(name, len(self.levels.place))
                self.levels.stmts[name] = self.current[name]
        self.levels.stmts[target.name] = self.current[target.name]
        at.states |= made.merges
        at.made.append((target.name, made))

    def record(self, stmt: Einsum | TopK, made: Made, trip: int, producers: tuple[str, ...], reducer: str) -> None:
        """What is told of the lift."""
        name = targets(stmt)[0].name
        guards = {target.name: key[0] for maker in self.makers.values() for key, target in maker.known.items()}

        def unguarded(expr: Expr) -> Expr:
            """The expression with the frame itself in place of its guard against -inf."""
            found = guards.get(expr.tensor) if isinstance(expr, Read) else None
            if isinstance(found, Apply) and found.op == "select":
                return found.args[2]
            return with_children(expr, tuple(unguarded(child) for child in children(expr)))

        corrections = tuple(dict.fromkeys(short(unguarded(expr)) for expr in made.corrections))
        moved = [f"{s} = {short(e)}" for s, e in made.merges.items() if e != Read(f"{s}'", getattr(e, "index", ()))]
        told_of = (*made.weights, *made.states)
        lines = list(dict.fromkeys(render_stmt(self.current[n]) for n in told_of if n in self.current))
        left = {t.name: t for n in told_of if n in self.current for t in targets(self.current[n])}
        shown = {s: f"{s}[{','.join(left[s].ranks)}]" if left[s].ranks else s for s in made.states}
        self.trips[trip].lifted.append(
            Lifted(
                reduction=name,
                rank=self.rank,
                kind=reducer,
                terms=made.terms,
                producers=producers,
                state=tuple(made.states),
                correction=corrections[0] if corrections else "; ".join(moved),
                init=tuple(f"{shown[s]} = empty" for s in made.states),
                update=tuple(lines),
                merge=tuple(f"{shown[s]} = {render_expr(e)}" for s, e in made.merges.items()),
                finalize=() if name in made.states else (render_stmt(self.current[name]),),
                deferred=tuple(dict.fromkeys(render_expr(e) for e in made.deferred)),
                frame="" if made.frame is None else render_expr(made.frame),
                anchors=tuple(n for s in self.states_of(made.frame) for n in defines(s))
                if made.frame is not None
                else (),
            )
        )

    def assembled(self) -> Lifting:
        """The cascade with its folds, in dependency order, without what nothing needs any more."""
        merges = {name: expr for trip in self.trips.values() for name, expr in trip.states.items()}
        body = _live(self.cascade, self.body, merges)
        ordered = tuple(stmt for unit in units(body, ()) for stmt in unit.statements)
        stmts = {name: stmt for stmt in ordered for name in defines(stmt)}
        whole = dataclasses.replace(self.cascade, body=ordered)
        results = [result.name for result in self.cascade.results]
        readers: dict[str, list[Stmt]] = {}
        for stmt in ordered:
            for name in reads(stmt):
                readers.setdefault(name, []).append(stmt)
        folds, lifted = [], []
        for number, trip in sorted(self.trips.items()):
            if trip.made:
                folds.append(self.fold(number, trip, ordered, stmts))
                free = gauges(folds[-1], readers, results)
                mine = [dataclasses.replace(item, gauge=bool(set(free) & set(item.anchors))) for item in trip.lifted]
                folds[-1], joined = with_virtual(whole, folds[-1], readers, self.whole)
                lifted += [told(item, folds[-1], joined) for item in mine]
        schedule = (*self.cascade.schedule, *folds)
        final = dataclasses.replace(self.cascade, body=ordered, schedule=schedule)
        return with_names(Lifting(final, tuple(lifted), tuple(self.blocked)), self.free_names(stmts))

    def whole(self, stmt: Einsum) -> bool:
        """Whether every coordinate of a reduction is present."""
        return stmt.where is None and isinstance(stmt.expr, Reduce) and not self.domains.of(stmt.expr.body)

    def free_names(self, stmts: Mapping[str, Stmt]) -> dict[str, str]:
        """Maps made for a trip that may have the name of the map which they replace: nothing needs that any more."""
        made = [target.name for maker in self.makers.values() for target in maker.known.values()]
        bases = {name: re.sub(r"_\d+$", "", name) for name in made if name in stmts}
        old = {target.name for stmt in self.cascade.body for target in targets(stmt)}
        return {name: base for name, base in bases.items() if base != name and base in old and base not in stmts}

    def fold(self, number: int, trip: Trip, ordered: Sequence[Stmt], stmts: dict[str, Stmt]) -> Fold:
        """The directive of one trip: its states, all that they and their merges need of each other, and the rest."""
        wanted = [name for name in trip.states if name in stmts]
        wanted += [name for item in trip.lifted for name in item.producers]
        wanted += [n.tensor.rstrip("'") for e in trip.states.values() for n in walk(e) if isinstance(n, Read)]
        update: set[str] = set()
        while wanted:
            name = wanted.pop()
            stmt = stmts.get(name)
            if stmt is None or name in update or not self.of_trip(name, stmt, number):
                continue
            update.update(defines(stmt))
            wanted += reads(stmt)
        members = [stmt for stmt in ordered if update & set(defines(stmt))]
        state = [target for stmt in members if self.rank in folded(stmt) for target in targets(stmt)]
        merges = tuple(FoldMerge(target, trip.states.get(target.name, read(target, "'"))) for target in state)
        finals = tuple(name for name in trip.finals if name in stmts and name not in update)
        listed = tuple(dict.fromkeys(defines(stmt)[0] for stmt in members))
        return Fold(self.rank, tuple(t.name for t in state), tuple(map(FoldInit, state)), listed, merges, finals)

    def of_trip(self, name: str, stmt: Stmt, number: int) -> bool:
        """Whether a statement belongs to the trip: a reduction of it, or a map of its states."""
        if self.rank in folded(stmt):
            return self.levels.level.get(name) == number
        if self.levels.carries(name):
            return self.levels.streams.get(name, 0) == number + 1 and any(
                self.levels.level.get(r) == number and not self.levels.carries(r) for r in reads(stmt)
            )
        return self.levels.level.get(name) == number


@dataclass(frozen=True, slots=True)
class _Side:
    """What an expression depends on: "x" the element, "r" what the trip is computing, "m" both, "" neither."""

    rank: str
    frames: frozenset[str]

    def __call__(self, expr: Expr) -> str:
        state = element = False
        for node in walk(expr):
            if isinstance(node, Read) and node.tensor in self.frames and not mentions(node, self.rank):
                state = True
            elif isinstance(node, Rank) and node.name == self.rank:
                element = True
        return "m" if state and element else "r" if state else "x" if element else ""


def _is_sum(expr: Expr) -> bool:
    """Whether an expression is a sum or difference of what is made of tensors by plain arithmetic."""
    if not isinstance(expr, Apply) or expr.op not in ("add", "sub"):
        return False
    inside = (node for node in walk(expr) if isinstance(node, Apply))
    return all(node.op in FINE for node in inside)


def _conjuncts(where: Expr | None) -> tuple[Expr, ...]:
    """The filters that a conjunction is made of."""
    if isinstance(where, Apply) and where.op == "and":
        return (*_conjuncts(where.args[0]), *_conjuncts(where.args[1]))
    return () if where is None else (where,)


def _power_of(abstract: Expr) -> tuple[Expr | None, Expr | None]:
    """A map over atoms as `x` or `pow(x, r)`, and a factor r where there is one; (None, None) for other maps."""

    def powered(expr: Expr) -> bool:
        plain = isinstance(expr, Local) and expr.name.startswith("x")
        return plain or (
            isinstance(expr, Apply)
            and expr.op == "pow"
            and all(isinstance(a, Local) and a.name[0] == side for a, side in zip(expr.args, "xr", strict=True))
        )

    if powered(abstract):
        return abstract, None
    if isinstance(abstract, Apply) and abstract.op == "mul":
        for one, other in (abstract.args, abstract.args[::-1]):
            if powered(one) and isinstance(other, Local) and other.name[0] in "rc":
                return one, other
    return None, None


def _known(maker: Maker) -> Iterator[Einsum]:
    for (expr, where), target in maker.known.items():
        yield Einsum(target, expr, where)


def _unprimed(expr: Expr) -> Expr:
    if isinstance(expr, Read):
        return dataclasses.replace(expr, tensor=expr.tensor.rstrip("'"))
    return with_children(expr, tuple(_unprimed(child) for child in children(expr)))


def _live(cascade: Cascade, body: Sequence[Stmt], merges: Mapping[str, Expr]) -> list[Stmt]:
    """The statements that a result, the schedule, or the merge of a state that is needed needs."""
    owner = {name: stmt for stmt in body for name in defines(stmt)}
    wanted = [result.name for result in cascade.results]
    for item in cascade.schedule:
        wanted += getattr(item, "statements", ()) or getattr(item, "update", ())
    seen: set[str] = set()
    while wanted:
        name = wanted.pop()
        if name not in seen and name in owner:
            seen.update(defines(owner[name]))
            wanted += reads(owner[name])
            moved = merges.get(name)
            wanted += [n.tensor.rstrip("'") for n in walk(moved) if isinstance(n, Read)] if moved is not None else []
    return [stmt for stmt in body if seen & set(defines(stmt))]


def _bound(expr: Expr, where: Expr | None) -> set[str]:
    """The ranks that an expression or its filter depends on."""
    return {*free_ranks(expr), *(() if where is None else free_ranks(where))}


def _indexed(expr: Expr | None) -> set[str]:
    """The ranks that stand alone as an index of some tensor: their extents are known."""
    nodes = () if expr is None else walk(expr)
    return {part.name for node in nodes if isinstance(node, Read) for part in node.index if isinstance(part, Rank)}
