"""Sums of products of three factors and more, summed a pair at a time.

    Y[t,f] = sum[d,r] X[t,d] * A[d,r] * B[r,f]
    -->  Y_factor[t,r] = sum[d] X[t,d] * A[d,r];  Y[t,f] = sum[r] Y_factor[t,r] * B[r,f]

A product does not say in which order it is summed, and as it stands it takes an operation for every coordinate of all
its ranks together. Pairs take one for those of two factors, and most pairs are products of matrices. Which pairs come
first is the order of contraction with the fewest operations (Pfeifer, Haegeman and Verstraete, "Faster identification
of optimal contraction sequences for tensor networks", 2014), which NumPy finds.
"""

from __future__ import annotations

import dataclasses
import math
import string
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cascade.backends.triton.paired import multiplied_apart
from cascade.backends.triton.partition import replaced, tied
from cascade.backends.triton.products import factors, matrix_product, product, ranks_of
from cascade.bounds import absent_tensors
from cascade.inference import infer_dtypes
from cascade.ir import Cascade, Cast, DType, Einsum, Expr, Rank, Read, Reduce, Stmt, Target
from cascade.passes.accumulate import read
from cascade.walk import fresh, names, reads

FEWER = 4  # times fewer coordinates in all, from which on pairs are summed whatever they are
LITTLE = 1 << 16  # coordinates up to which a sum takes less than the launch of another kernel
MOST = 6  # factors of which the best order is sought; of more a good one is

SHORT = {DType.F16, DType.BF16}
FULL = {DType.F32, DType.F64}


def with_contractions(cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType]) -> Cascade:
    """The cascade with such sums in pairs; itself where there are none.

    `extents` are those of ranks, `inputs` the types of the parameters.
    """
    dtypes, taken, absent = infer_dtypes(cascade, inputs), names(cascade), absent_tensors(cascade)
    fixed = tied(cascade)
    made: dict[Stmt, list[Einsum]] = {}
    for stmt in cascade.body:
        if isinstance(stmt, Einsum) and stmt.target.name not in fixed and absent.isdisjoint(reads(stmt)):
            found = _Contraction.of(stmt, extents, dtypes)
            if found is not None and found.pays(extents):
                made[stmt] = found.statements(dtypes, taken)
    return replaced(cascade, made) if made else cascade


@dataclass(frozen=True, slots=True)
class _Step:
    """The product of two factors, summed over the ranks that nothing later has: factors of the sum, or steps."""

    sides: tuple[Expr | int, ...]
    over: tuple[str, ...]
    kept: tuple[str, ...]

    def coordinates(self, extents: Mapping[str, int]) -> int:
        """How many products it sums."""
        return math.prod(extents[rank] for rank in (*self.over, *self.kept))

    def statement(self, name: str, terms: Sequence[Expr]) -> Einsum:
        """What defines its result of its two factors, and of more that no rank tells apart."""
        body = product(terms)
        return Einsum(Target(name, self.kept), Reduce("sum", self.over, body) if self.over else body)


@dataclass(frozen=True, slots=True)
class _Contraction:
    """A sum of products as steps, of which the last gives what it defines."""

    stmt: Einsum
    summed: tuple[str, ...]
    steps: tuple[_Step, ...]
    rest: tuple[Expr, ...]  # factors that have nothing of what is summed over

    @classmethod
    def of(cls, stmt: Einsum, extents: Mapping[str, int], dtypes: Mapping[str, DType]) -> _Contraction | None:
        """The steps of a sum; None where all of its factors have what it sums over, are two, or are no such floats."""
        if not isinstance(stmt.expr, Reduce) or stmt.expr.reducer != "sum" or stmt.where is not None or stmt.inits:
            return None
        every = factors(stmt.expr.body)
        terms = [term for term in every if not ranks_of(term).isdisjoint(stmt.expr.ranks)]
        sums = {ranks_of(term) & set(stmt.expr.ranks) for term in terms}
        held = {dtypes[name] for name in (*reads(stmt), stmt.target.name)} <= SHORT | FULL
        if len(terms) < 3 or not held or len(sums) < 2 or set().union(*sums) < set(stmt.expr.ranks):
            return None
        steps: list[_Step] = []
        left: list[tuple[Expr | int, frozenset[str]]] = [(term, ranks_of(term)) for term in terms]
        own = frozenset().union(*(ranks for _, ranks in left)) & set(stmt.target.ranks)
        for pair in _order([ranks for _, ranks in left], own, extents):
            sides = [left[place] for place in pair]
            left = [one for place, one in enumerate(left) if place not in pair]
            after = {*stmt.target.ranks}.union(*(ranks for _, ranks in left))
            mine = frozenset().union(*(ranks for _, ranks in sides))
            inside = [rank for rank in (*stmt.target.ranks, *stmt.expr.ranks) if rank in mine]
            kept = tuple(rank for rank in inside if rank in after)
            over = tuple(rank for rank in inside if rank not in after)
            left.append((len(steps), frozenset(kept)))
            steps.append(_Step(tuple(side for side, _ in sides), over, kept))
        steps[-1] = dataclasses.replace(steps[-1], kept=stmt.target.ranks)  # the others have ranks of their own
        return cls(stmt, stmt.expr.ranks, tuple(steps), tuple(term for term in every if term not in terms))

    def pays(self, extents: Mapping[str, int]) -> bool:
        """Whether the steps are less to do than the whole at once, or make a product of matrices of most of it."""
        whole = math.prod(extents[rank] for rank in (*self.stmt.target.ranks, *self.summed))
        steps = [step.coordinates(extents) for step in self.steps]
        largest = self.steps[steps.index(max(steps))]
        parts = [
            Read(f" {side}", tuple(map(Rank, self.steps[side].kept))) if isinstance(side, int) else side
            for side in largest.sides
        ]
        found = matrix_product(largest.statement("", parts))
        matrices = found is not None and found.two_sided and sum(steps) <= 2 * whole
        matrices = matrices and not any(multiplied_apart(self.stmt))  # these are one as they are
        summed = all(step.over for step in self.steps[:-1])  # else a part is larger than what it is made of
        return len(steps) > 1 and summed and whole > LITTLE and (sum(steps) * FEWER <= whole or matrices)

    def statements(self, dtypes: Mapping[str, DType], taken: set[str]) -> list[Einsum]:
        """The statements of the steps.

        What they come to has the type of what it is made of; but where the whole has more bits it has f32, and where
        that is f16, whose numbers need not reach as far as parts of a sum that they hold.
        """
        name, given = self.stmt.target.name, {dtypes[tensor] for tensor in reads(self.stmt)}
        dtype = dtypes[name]
        wide = DType.F16 in given or (dtype in FULL and not given.isdisjoint(SHORT))
        made: list[Einsum] = []
        for step in self.steps:
            terms = [read(made[side].target) if isinstance(side, int) else side for side in step.sides]
            if wide and not any(isinstance(side, int) for side in step.sides):
                terms[0] = Cast(DType.F32, terms[0])
            last = len(made) == len(self.steps) - 1
            part = name if last and not (wide and dtype in SHORT) else fresh(f"{name}_factor", taken)
            made.append(step.statement(part, [*terms, *self.rest] if last else terms))
        if made[-1].target.name != name:
            made.append(Einsum(self.stmt.target, Cast(dtype, read(made[-1].target))))
        return [*made[:-1], dataclasses.replace(made[-1], span=self.stmt.span)]


def _order(
    sides: Sequence[Collection[str]], kept: Collection[str], extents: Mapping[str, int]
) -> Sequence[Sequence[int]]:
    """The places of the factors that are multiplied in each step; what a step gives stands behind those left."""
    ranks = sorted({rank for own in sides for rank in own})
    letters = dict(zip(ranks, string.ascii_letters, strict=False))
    words = ["".join(sorted(letters[rank] for rank in own)) for own in (*sides, kept)]
    shapes = (np.broadcast_to(0.0, [extents[rank] for rank in sorted(own)]) for own in sides)
    how = "optimal" if len(sides) <= MOST else "greedy"
    path, _ = np.einsum_path(f"{','.join(words[:-1])}->{words[-1]}", *shapes, optimize=how)
    return [tuple(pair) for pair in path[1:]]
