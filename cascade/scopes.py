"""Which rank variables an expression leaves free and which its reductions bind, seen through every `def` it uses.

One walk over an expression gives a `Scan`: its free ranks, its reads and which ranks are bound around each, and the
reductions with the ranks that each sees. Applying a `def` counts as what its body does: `softmax[n] x` leaves n free,
`mean[n] x` binds it. Nothing here recurses, so no expression is too deep.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from cascade.errors import Span
from cascade.ir import (
    Apply, Call, Cascade, Cast, Const, Definition, Einsum, Expr, Extent, Function, Local, Rank, Read, Reduce, Stmt,
    TopK, Use,
)  # fmt: skip

Ranks: TypeAlias = frozenset[str]
NONE: Ranks = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class Binder:
    """A reduction, a use of a rank function or a top-k, seen from inside.

    `sees` are the ranks that it, or a binder around it, binds for some place of its operand; `must` those that it
    binds for every place. They differ in `softmax`, whose parameter stands inside and outside of a reduction. `used`
    collects the ranks that occur in the operand.
    """

    node: Reduce | Use | TopK
    sees: Ranks
    must: Ranks
    used: set[str]
    outer: Binder | None = None
    dropped: bool = False  # around the operand of a parameter that the body does not mention


@dataclass(slots=True, eq=False)
class Scan:
    """What one walk over an expression finds."""

    free: dict[str, Span | None] = field(default_factory=dict)  # with the first place of each
    reads: list[tuple[Read, Binder | None]] = field(default_factory=list)
    locals: list[tuple[Local, Binder | None]] = field(default_factory=list)
    binders: list[Binder] = field(default_factory=list)  # one for each reduction, use or top-k with ranks
    scopes: list[Ranks] = field(default_factory=list)  # the ranks in sight inside each reduction, the left side's aside
    nodes: list[Expr] = field(default_factory=list)  # everything, outside in
    complete: bool = True  # False where it uses a `def` that is unknown or used wrongly


@dataclass(frozen=True, slots=True)
class Signature:
    """What a `def` does with its formal ranks."""

    function: Function
    may: tuple[Ranks, ...]  # per parameter
    must: tuple[Ranks | None, ...]  # per parameter; None where the body does not mention it
    free: Ranks  # formal ranks whose coordinate is used outside of every reduction over them
    coordinates: Ranks  # formal ranks whose coordinate is used at all
    scopes: tuple[Ranks, ...]
    complete: bool


Signatures: TypeAlias = Mapping[str, Signature]


@dataclass(frozen=True, slots=True)
class Facts:
    """What the verifier and inference know about one statement."""

    stmt: Stmt
    body: Scan  # the right side; that of a top-k without the rank it chooses along
    where: Scan | None = None
    inits: tuple[Scan, ...] = ()

    def scans(self) -> tuple[Scan, ...]:
        """The scan of every expression of the statement, in the order of `walk.expressions`."""
        return (self.body, *((self.where,) if self.where else ()), *self.inits)


def visible(cascade: Cascade, around: Mapping[str, Definition] | None = None) -> dict[str, Definition]:
    """The definitions that a cascade may use: those around it and those that travel with it."""
    return {**(around or {}), **{definition.name: definition for definition in cascade.uses}}


def signatures(definitions: Iterable[Definition]) -> dict[str, Signature]:
    """The signature of every function; each may use those before it."""
    done: dict[str, Signature] = {}
    for definition in definitions:
        if isinstance(definition, Function):
            done[definition.name] = signature(definition, done)
    return done


def signature(function: Function, known: Signatures) -> Signature:
    """What one `def` does with its formal ranks."""
    found = scan(function.body, known)
    may: dict[str, Ranks] = {}
    must: dict[str, Ranks] = {}
    for local, binder in found.locals:
        inside = _bound_everywhere(binder)
        if inside is not None:
            may[local.name] = may.get(local.name, NONE) | (binder.sees if binder else NONE)
            must[local.name] = must.get(local.name, inside) & inside
    return Signature(
        function,
        tuple(may.get(name, NONE) for name in function.params),
        tuple(must.get(name) for name in function.params),
        frozenset(found.free),
        frozenset(node.name for node in found.nodes if isinstance(node, Rank)),
        tuple(dict.fromkeys(found.scopes)),
        found.complete,
    )


def _bound_everywhere(binder: Binder | None) -> Ranks | None:
    """The ranks bound for certain at a place; None where the place is dropped."""
    found = NONE
    while binder is not None:
        if binder.dropped:
            return None
        found, binder = found | binder.must, binder.outer
    return found


def facts(stmt: Stmt, known: Signatures) -> Facts:
    """One walk over each expression of a statement."""
    match stmt:
        case Einsum():
            where = None if stmt.where is None else scan(stmt.where, known)
            return Facts(stmt, scan(stmt.expr, known), where, tuple(scan(init.expr, known) for init in stmt.inits))
        case TopK():
            chosen = frozenset((stmt.rank,))
            outer = Binder(stmt, chosen, chosen, set())
            body = scan(stmt.body, known, outer)
            body.binders.insert(0, outer)
            body.scopes.insert(0, chosen)
            return Facts(stmt, body, None if stmt.where is None else scan(stmt.where, known))
        case Call():
            return Facts(stmt, Scan())
        case _:
            assert_never(stmt)


def scan(expr: Expr, known: Signatures, outer: Binder | None = None) -> Scan:
    """The walk itself: outside in, left to right, with the innermost binder at hand."""
    found = Scan()
    stack: list[tuple[Expr, Binder | None]] = [(expr, outer)]
    while stack:
        node, binder = stack.pop()
        found.nodes.append(node)
        match node:
            case Const() | Extent():
                pass
            case Rank():
                _meet(node.name, node.span, binder, found)
            case Local():
                found.locals.append((node, binder))
                _meet_any(binder)
            case Read():
                found.reads.append((node, binder))
                stack.extend((index, binder) for index in reversed(node.index))
            case Apply():
                stack.extend((arg, binder) for arg in reversed(node.args))
            case Cast():
                stack.append((node.arg, binder))
            case Reduce():
                ranks = frozenset(node.ranks)
                inner = Binder(node, ranks | (binder.sees if binder else NONE), ranks, set(), binder)
                found.binders.append(inner)
                found.scopes.append(inner.sees)
                stack.append((node.body, inner))
            case Use():
                stack.extend(reversed(_use(node, binder, known, found)))
            case _:
                assert_never(node)
    return found


def _meet(rank: str, span: Span | None, binder: Binder | None, found: Scan) -> None:
    """A coordinate: bound by the binders around it that have its rank, else free."""
    while binder is not None:
        if binder.dropped:
            return
        binder.used.add(rank)
        if rank in binder.must:
            return
        binder = binder.outer
    found.free.setdefault(rank, span)


def _meet_any(binder: Binder | None) -> None:
    """A parameter of a `def`: it may have every rank."""
    while binder is not None and not binder.dropped:
        if not isinstance(binder.node, TopK):
            binder.used.update(binder.node.ranks)
        binder = binder.outer


def along(function: Function, ranks: tuple[str, ...]) -> dict[str, tuple[str, ...]] | None:
    """The actual ranks of each formal one: one for one, or all for a single formal rank; None where they do not fit."""
    if len(function.ranks) == len(ranks):
        return {formal: (actual,) for formal, actual in zip(function.ranks, ranks, strict=True)}
    return {function.ranks[0]: ranks} if len(function.ranks) == 1 and ranks else None


def _use(node: Use, outer: Binder | None, known: Signatures, found: Scan) -> list[tuple[Expr, Binder | None]]:
    """The operands of a use, each inside what the body of the `def` binds around its parameter."""
    sig = known.get(node.function)
    pairs = None if sig is None else along(sig.function, node.ranks)
    if sig is None or pairs is None or len(sig.function.params) != len(node.args):
        found.complete = False
        return [(arg, outer) for arg in node.args]
    found.complete &= sig.complete

    def actual(formal: Ranks) -> Ranks:
        return frozenset(rank for name in formal for rank in pairs.get(name, (name,)))

    used = set(actual(sig.coordinates))
    around = outer.sees if outer else NONE
    for rank in sorted(actual(sig.free)):
        _meet(rank, node.span, outer, found)
    found.scopes.extend(actual(scope) | around for scope in sig.scopes)
    if node.ranks:
        found.binders.append(Binder(node, around, NONE, used, outer))
    operands: list[tuple[Expr, Binder | None]] = []
    for arg, may, must in zip(node.args, sig.may, sig.must, strict=True):
        if must is None:
            operands.append((arg, Binder(node, around, NONE, used, outer, dropped=True)))
        elif node.ranks:
            operands.append((arg, Binder(node, actual(may) | around, actual(must), used, outer)))
        else:
            operands.append((arg, outer))
    return operands
