"""What scales rows or columns of a product, in its operands where its tiles are used along a stream.

    fold e { S_sum[m,n] = sum[e] Q[m,e] * K[n,e];  finalize S[m,n] = S_sum[m,n] * r[m] * c[n] };  R[m] = max[n] S[m,n]
    -->  S_left[m,e] = cast(Q[m,e] * r[m], bf16);  S[m,n] = sum[e] S_left[m,e] * K[n,e] ...

A result is scaled once, as it is written. Tiles of a stream are scaled each time, by data that is loaded for it, while
the next product waits; so an operand that is worth a kernel of its own has the scales of its side as well. Only scales
that a fold applies to the sum when it ends: these were in an operand, which has its own rounding, before the lift.
What is written behind a sum stays there: an operand would be rounded that the cascade does not round.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from cascade.backends.triton.operands import Program, Terms, ranks_in
from cascade.backends.triton.partition import Group, partition, reduced_ranks, without
from cascade.backends.triton.products import MatrixProduct, factors, matrix_product, product, ranks_of
from cascade.ir import Cascade, Directive, DType, Einsum, Expr, Fold, Rank, Read, Reduce, Stmt, Target
from cascade.walk import fresh, names, reads


def with_scaled_operands(
    cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType], certain: Mapping[str, int]
) -> Cascade:
    """The cascade with such scales in operands that are stored for it; itself where there are none.

    `extents` are those of shape symbols, of which some are `certain`; `inputs` are the types of the parameters.
    """
    pairs = [pair for stmt in cascade.body if (pair := _Scaled.of(stmt, cascade)) is not None]
    if not pairs:
        return cascade
    program = Program.of(cascade, extents, inputs, certain)
    groups = [group for group in partition(cascade, program.sizes) if isinstance(group, Group)]
    taken = names(cascade)
    changed: dict[Stmt, tuple[Stmt, ...]] = {}
    for pair in pairs:
        if pair.is_streamed(groups) and (sides := pair.stored_sides(program)):
            changed |= pair.restated(program, sides, taken)
    if not changed:
        return cascade
    body = tuple(new for stmt in cascade.body for new in changed.get(stmt, (stmt,)))
    schedule = tuple(left for item in cascade.schedule if (left := _without(item, pairs, changed)) is not None)
    return dataclasses.replace(cascade, body=body, schedule=schedule)


def _without(item: Directive, pairs: Sequence[_Scaled], changed: Mapping[Stmt, object]) -> Directive | None:
    """A part of the schedule without the products; what scales them is no end of their trips any more."""
    gone: set[str] = set()
    for pair in pairs:
        if pair.total in changed:
            along = isinstance(item, Fold) and item.rank in reduced_ranks(pair.total)
            gone |= {pair.total.target.name, *((pair.stmt.target.name,) if along else ())}
    return without(item, gone)


@dataclass(frozen=True, slots=True)
class _Side:
    """A side of a product: its name, its factors, those of the other side, what scales it."""

    name: str
    terms: Terms
    other: Terms
    scales: Terms


@dataclass(frozen=True, slots=True)
class _Scaled:
    """A statement that is a product, which nothing else reads, times factors that a fold has behind it."""

    stmt: Einsum
    total: Einsum
    product: MatrixProduct
    scales: Terms

    @classmethod
    def of(cls, stmt: Stmt, cascade: Cascade) -> _Scaled | None:
        """How a statement is a product times something; None where it is not."""
        if not isinstance(stmt, Einsum) or stmt.inits or isinstance(stmt.expr, Reduce):
            return None
        made = {one.target.name: one for one in cascade.body if isinstance(one, Einsum)}
        terms = factors(stmt.expr)
        totals = [term for term in terms if isinstance(term, Read) and term.tensor in made and _is_total(term, made)]
        if len(totals) != 1 or len(terms) < 2:
            return None
        total = made[totals[0].tensor]
        found = matrix_product(total)
        users = [one for one in cascade.body if total.target.name in reads(one)]
        if not any(total.target.name in f.state and stmt.target.name in f.finalize for f in _folds(cascade)):
            return None
        if found is None or len(users) > 1 or total.target.name in {result.name for result in cascade.results}:
            return None
        return cls(stmt, total, found, tuple(term for term in terms if term is not totals[0]))

    def is_streamed(self, groups: Iterable[Group]) -> bool:
        """Whether a kernel goes along a rank of the result, and uses its tiles as they are made."""
        own = next((group for group in groups if self.stmt in group.statements), None)
        stream = None if own is None else own.arrangement.stream
        return stream in self.stmt.target.ranks and stream not in reduced_ranks(self.total)

    def stored_sides(self, program: Program) -> list[_Side]:
        """The sides with scales that are worth storing."""
        both = (("left", self.product.left, self.product.rows), ("right", self.product.right, self.product.columns))
        parts = {name: tuple(term for term in terms if ranks_of(term) & own) for name, terms, own in both}
        owns = {name: own for name, _, own in both}
        found = []
        for name, other in (("left", "right"), ("right", "left")):
            scales = tuple(s for s in self.scales if ranks_of(s) & owns[name] and not ranks_of(s) & owns[other])
            terms = (*parts[name], *scales)
            plain = all(map(program.is_plain, terms)) and bool(parts[name])
            if scales and plain and program.worth_storing(terms, self.total):
                found.append(_Side(name, parts[name], parts[other], scales))
        return found

    def restated(self, program: Program, sides: Sequence[_Side], taken: set[str]) -> dict[Stmt, tuple[Stmt, ...]]:
        """What stands in the place of the product and of its scaling: operands, the product of these, what is left."""
        assert isinstance(self.total.expr, Reduce)
        terms = Counter(factors(self.total.expr.body))
        gains = [
            t
            for t in (*self.product.left, *self.product.right)
            if not ranks_of(t) & (self.product.rows | self.product.columns)
        ]
        made: list[Stmt] = []
        for side in sides:
            mine = (*side.terms, *gains)
            gains = []  # with the first side
            target = Target(fresh(f"{self.stmt.target.name}_{side.name}", taken), ranks_in((*mine, *side.scales)))
            made.append(Einsum(target, program.narrowed((*mine, *side.scales), side.other), span=self.total.span))
            terms = terms - Counter(mine) + Counter([Read(target.name, tuple(map(Rank, target.ranks)))])
        total: Expr = dataclasses.replace(self.total.expr, body=product(list(terms.elements())))
        left = Counter(factors(self.stmt.expr)) - Counter(scale for side in sides for scale in side.scales)
        if sum(left.values()) == 1 and self.stmt.where is None:
            return {
                self.total: tuple(made),
                self.stmt: (dataclasses.replace(self.total, target=self.stmt.target, expr=total),),
            }
        rest = dataclasses.replace(self.stmt, expr=product(list(left.elements())))
        return {self.total: (*made, dataclasses.replace(self.total, expr=total)), self.stmt: (rest,)}


def _folds(cascade: Cascade) -> list[Fold]:
    return [item for item in cascade.schedule if isinstance(item, Fold)]


def _is_total(read: Read, made: Mapping[str, Einsum]) -> bool:
    """Whether a read is of a whole product, coordinate by coordinate."""
    stmt = made[read.tensor]
    found = matrix_product(stmt)
    return found is not None and found.two_sided and read.index == tuple(map(Rank, stmt.target.ranks))
