"""When a reduction may be lifted: each condition by name, with its code and what it asks.

A reduction that breaks one stays in a trip of its own, and the report names the edge, the condition and the evidence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade.ir import Einsum, Expr, Rank, Read, Reduce, Stmt, TopK
from cascade.passes.lifts import Blocked
from cascade.walk import substitute, walk

ITEMS: dict[str, tuple[str, str]] = {
    "pointwise": ("C511", "every use of the state between two reductions is pointwise in the rank"),
    "domain": ("C512", "what is folded has a value only where the state that it is measured against has one"),
    "invertible": ("C513", "the frame can be left again at every partial state, not only at the last one"),
    "identity": ("C514", "a part without elements is an empty state, and changes nothing"),
    "bounded": ("C515", "measured against a state that has seen it, an element stays bounded"),
    "contracting": ("C516", "what an older state is multiplied with is never more than one"),
    "cancellation": ("C517", "no raw moment of second or higher degree is subtracted from another"),
    "rounding": ("C518", "nothing is rounded between the state and the sum"),
    "order": ("C519", "the author does not ask for the order of floating-point sums"),
    "separable": ("C521", "the map has finite rank as a function of state and element"),
    "form": ("C522", "a rule knows the accumulators"),
    "order law": ("C523", "the map is monotone in the element"),
    "overlap": ("C524", "a statement runs in one trip only"),
    "proof": ("C525", "the trip gives, on samples, what the cascade gives"),
}
"""The conditions. That a memo's key holds reducer, types and domain is a property of `memo.py`, not of a cascade."""


def named(
    item: str, reduction: str, rank: str, edge: tuple[str, str], reason: str, evidence: tuple[int, ...] = ()
) -> Blocked:
    """The finding that a condition is broken."""
    return Blocked(reduction, rank, edge, item, ITEMS[item][0], reason, evidence)


@dataclass(frozen=True, slots=True)
class Domains:
    """Where expressions have a value along one rank: the filters that decide, and the reads of what may be absent."""

    rank: str
    absent: Collection[str]
    maps: Mapping[str, Einsum]  # what is looked through
    known: dict[Read, frozenset[Expr]] = field(default_factory=dict)

    def of(self, expr: Expr) -> frozenset[Expr]:
        """The filters and reads that decide at which coordinates of the rank an expression has a value."""
        found: set[Expr] = set()
        for node in walk(expr):
            if isinstance(node, Read) and self._decides(node):
                found |= self._read(node)
        return frozenset(found)

    def _read(self, node: Read) -> frozenset[Expr]:
        """What decides where a read has a value, once for each."""
        if node not in self.known:
            stmt = self.maps.get(node.tensor)
            if stmt is None or not all(isinstance(i, Rank) for i in node.index):
                self.known[node] = frozenset((node,))
            else:
                actual = dict(zip(stmt.target.ranks, node.index, strict=True))
                if isinstance(stmt.expr, Reduce):
                    self.known[node] = self._of_reduction(node, stmt, actual)
                    return self.known[node]
                filters = [] if stmt.where is None else [substitute(stmt.where, actual)]
                self.known[node] = self.of(substitute(stmt.expr, actual)) | frozenset(filters)
        return self.known[node]

    def _of_reduction(self, node: Read, stmt: Einsum, actual: Mapping[str, Expr]) -> frozenset[Expr]:
        """A reduction of what is always present, under a filter of what it keeps, is present where the filter holds."""
        assert isinstance(stmt.expr, Reduce)
        inside = Domains(self.rank, self.absent, {})
        own = any(isinstance(n, Read) and inside.reads_absent(n) for n in walk(stmt.expr.body))
        if stmt.where is None or own or any(n.name in stmt.expr.ranks for n in walk(stmt.where) if isinstance(n, Rank)):
            return frozenset((node,))
        return frozenset((substitute(stmt.where, actual),))

    def apart(self, expr: Expr, own: frozenset[Expr], where: Expr | None) -> frozenset[Expr]:
        """What decides without the rank whether an expression has a value: reads that may be absent, and filters.

        A reduction over the rank is present with any of its elements; so it decides nothing itself where it has one
        wherever `own` and the filter `where` hold.
        """
        found: set[Expr] = set()
        for node in walk(expr):
            if isinstance(node, Read) and self.reads_absent(node):
                found |= self._apart(node, own, where)
        return frozenset(found)

    def _apart(self, node: Read, own: frozenset[Expr], where: Expr | None) -> frozenset[Expr]:
        stmt = self.maps.get(node.tensor)
        alone = frozenset[Expr]() if self._decides(node) else frozenset((node,))
        if stmt is None or not all(isinstance(i, Rank) for i in node.index):
            return alone
        actual = dict(zip(stmt.target.ranks, node.index, strict=True))
        tested = None if stmt.where is None else substitute(stmt.where, actual)
        body = substitute(stmt.expr, actual)
        if isinstance(body, Reduce):
            covers = tested in (None, where) and self.of(body.body) <= own
            return self.apart(body.body, own, where) if self.rank in body.ranks and covers else alone
        filters = () if tested is None or any(n == Rank(self.rank) for n in walk(tested)) else (tested,)
        return self.apart(body, own, where) | frozenset(filters)

    def reads_absent(self, node: Read) -> bool:
        """Whether a read may be absent."""
        return node.tensor in self.absent or any(not isinstance(i, Rank) for i in node.index)

    def _decides(self, node: Read) -> bool:
        along = any(isinstance(inside, Rank) and inside.name == self.rank for inside in walk(node))
        return along and self.reads_absent(node)


def outside_frame(
    expr: Expr, where: Expr | None, frames: Sequence[Stmt], domains: Domains
) -> Iterator[tuple[str, str]]:
    """Condition `domain` for a map that is measured against the reductions `frames`."""
    own = domains.of(expr)
    for stmt in frames:
        theirs = _operand(stmt)
        if theirs is None:
            continue
        filtered = getattr(stmt, "where", None)
        if not domains.of(theirs) <= own or filtered not in (None, where):
            name = stmt.values.name if isinstance(stmt, TopK) else stmt.target.name if isinstance(stmt, Einsum) else ""
            yield "domain", f"'{name}' leaves out elements that are measured against it: they are not bounded by it"


def _operand(stmt: Stmt) -> Expr | None:
    if isinstance(stmt, TopK):
        return stmt.body
    return stmt.expr.body if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else None
