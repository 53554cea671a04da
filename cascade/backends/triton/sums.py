"""Combinations of sums whose coefficients are known beforehand, as one sum.

    Y_sum[t,f] = sum[d] X[t,d] * W[f,d];  Y_sum_1[f] = sum[d] W[f,d];  Y[t,f] = Y_sum[t,f] * r[t] - Y_sum_1[f] * u[t]
    -->  Y[t,f] = sum[d] W[f,d] * (X[t,d] * r[t] - u[t])

Sums are taken apart like this so that what the coefficients are made of can be found on the same trip. Where another
kernel has found it before, that gains nothing, and the sums are one product and some more that read its operand again.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cascade.bounds import absent_tensors
from cascade.backends.triton.partition import Group, partition, without
from cascade.backends.triton.products import factors, matrix_product, product
from cascade.inference import infer_dtypes
from cascade.ir import (
    Apply, Cascade, Cast, Const, DType, Einsum, Expr, Rank, Read, Reduce, Stmt, Target,
)  # fmt: skip
from cascade.walk import defines, fresh, names, reads, walk

MINUS = Const(-1.0)  # what `factors` has for a sign


def with_sums(cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType]) -> Cascade:
    """The cascade with such combinations as single sums; itself where there are none.

    `extents` are those of ranks, `inputs` the types of the parameters.
    """
    dtypes = infer_dtypes(cascade, inputs)
    found = [one for stmt in cascade.body if (one := _Combination.of(stmt, cascade, dtypes)) is not None]
    if not found:
        return cascade
    groups = [group for group in partition(cascade, extents) if isinstance(group, Group)]
    found = [one for one in found if any(one.is_known_before(set(group.names)) for group in groups)]
    if not found:
        return cascade
    taken = names(cascade)
    gone = {name for one in found for name in (*one.summed, one.stmt.target.name)}
    made: dict[Stmt, tuple[Stmt, ...]] = {one.stmt: one.statements(taken) for one in found}
    dropped = {name for one in found for name in one.summed}
    kept = [stmt for stmt in cascade.body if dropped.isdisjoint(defines(stmt))]
    body = [new for stmt in kept for new in made.get(stmt, (stmt,))]
    schedule = [left for item in cascade.schedule if (left := without(item, gone)) is not None]
    return dataclasses.replace(cascade, body=tuple(body), schedule=tuple(schedule))


@dataclass(frozen=True, slots=True)
class _Combination:
    """A statement that adds up several sums along one rank, each times what does not depend on any of them."""

    stmt: Einsum
    sums: tuple[Einsum, ...]
    coefficients: tuple[tuple[Expr, ...], ...]  # of each sum
    rest: tuple[Expr, ...]  # addends without a sum
    dtype: DType

    @classmethod
    def of(cls, stmt: Stmt, cascade: Cascade, dtypes: Mapping[str, DType]) -> _Combination | None:
        """How a statement combines sums that nothing else reads; None where it does not, or they make no product."""
        if not isinstance(stmt, Einsum) or stmt.where is not None or stmt.inits:
            return None
        own = {one.target.name: one for one in cascade.body if isinstance(one, Einsum) and _is_sum(one)}
        users = Counter(name for one in cascade.body for name in set(reads(one)))
        sums: list[Einsum] = []
        coefficients: list[tuple[Expr, ...]] = []
        rest: list[Expr] = []
        for addend in _addends(stmt.expr):
            terms = factors(addend)
            summed = [term for term in terms if isinstance(term, Read) and term.tensor in own]
            if not summed:
                rest.append(addend)
                continue
            one = own[summed[0].tensor]
            if len(summed) > 1 or one in sums or summed[0].index != tuple(map(Rank, one.target.ranks)):
                return None
            sums.append(one)
            coefficients.append(tuple(term for term in terms if term is not summed[0]))
        results = {result.name for result in cascade.results}
        alone = all(users[one.target.name] == 1 and one.target.name not in results for one in sums)
        if len(sums) < 2 or not alone or len({_reduced(one) for one in sums}) > 1:
            return None
        found = cls(stmt, tuple(sums), tuple(coefficients), tuple(rest), dtypes[stmt.target.name])
        needed = {name for part in (stmt, *sums) for name in reads(part)} - set(found.summed)
        if not needed.isdisjoint(absent_tensors(cascade)):
            return None
        joined = matrix_product(found.joined(stmt.target))
        return found if joined is not None and joined.two_sided else None

    @property
    def summed(self) -> tuple[str, ...]:
        """The names of the sums."""
        return tuple(one.target.name for one in self.sums)

    def is_known_before(self, group: Collection[str]) -> bool:
        """Whether the kernel that defines all of these has a product and the combination, and no coefficient."""
        products = {one.target.name for one in self.sums if (found := matrix_product(one)) and found.two_sided}
        used = {node.tensor for one in self.coefficients for t in one for node in walk(t) if isinstance(node, Read)}
        return self.stmt.target.name in group and not products.isdisjoint(group) and used.isdisjoint(group)

    def joined(self, target: Target) -> Einsum:
        """The one sum.

        In 16 bits what scales all of it is multiplied into what differs, which is in range then as the results are; the
        data itself, times another factor, need not be.
        """
        bodies = [Counter(factors(one.expr.body)) for one in self.sums if isinstance(one.expr, Reduce)]
        common = functools.reduce(operator.and_, bodies)
        differing = factored([body - common + Counter(c) for body, c in zip(bodies, self.coefficients, strict=True)])
        differing = Cast(self.dtype, differing) if self.dtype in (DType.F16, DType.BF16) else differing
        assert isinstance(self.sums[0].expr, Reduce)
        expr = dataclasses.replace(self.sums[0].expr, body=product([*common.elements(), differing]))
        return Einsum(target, expr, span=self.stmt.span)

    def statements(self, taken: set[str]) -> tuple[Einsum, ...]:
        """What stands in the place of the sums and their combination."""
        target = self.stmt.target
        if not self.rest:
            return (self.joined(target),)
        total = Target(fresh(f"{target.name}_sum", taken), target.ranks)
        rest = [Counter(factors(addend)) for addend in self.rest]
        expr = added(Read(total.name, tuple(map(Rank, total.ranks))), rest)
        return self.joined(total), dataclasses.replace(self.stmt, expr=expr)


def factored(addends: Sequence[Counter[Expr]]) -> Expr:
    """A sum of products with what most of them share put outside, which is also the least to round: a*x - a*u is
    (x - u) * a."""
    shared = Counter(term for addend in addends for term in addend if term != MINUS)
    term, times = max(shared.items(), key=lambda item: item[1], default=(MINUS, 1))
    if times > 1:
        outside = Counter([term])
        inside = product([factored([addend - outside for addend in addends if term in addend]), term])
        rest = [addend for addend in addends if term not in addend]
        return inside if not rest else added(inside, rest)
    return added(product([*addends[0].elements()]), addends[1:])


def added(first: Expr, addends: Sequence[Counter[Expr]]) -> Expr:
    """A sum, with a difference where a sign is taken out."""
    for addend in addends:
        minus = addend[MINUS] == 1
        term = product([*(addend - Counter([MINUS] if minus else [])).elements()])
        first = Apply("sub" if minus else "add", (first, term))
    return first


def _is_sum(stmt: Einsum) -> bool:
    return stmt.where is None and not stmt.inits and isinstance(stmt.expr, Reduce) and stmt.expr.reducer == "sum"


def _reduced(stmt: Einsum) -> tuple[str, ...]:
    return stmt.expr.ranks if isinstance(stmt.expr, Reduce) else ()


def _addends(expr: Expr) -> Iterator[Expr]:
    """What an expression adds up; what it takes away with a sign."""
    match expr:
        case Apply(op="add"):
            for arg in expr.args:
                yield from _addends(arg)
        case Apply(op="sub"):
            yield from _addends(expr.args[0])
            yield from (Apply("neg", (addend,)) for addend in _addends(expr.args[1]))
        case _:
            yield expr
