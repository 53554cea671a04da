"""Accumulators in place of a dependent reduction: the states, the maps they read, their merges, and the read-out.

    D[m] = sum[n] exp(X[m,n] - R[m]) / Z      -->      F[m] = select(R[m] == -inf, 0.0, R[m])
                                                       P[m,n] = exp(X[m,n] - F[m])
                                                       D_sum[m] = sum[n] P[m,n]     merge D_sum' * exp(R' - F)
                                                       D[m] = D_sum[m] / Z

The frame F is what the state is measured against: R, but a number where nothing was seen yet, so that -inf less
-inf never arises. Sums of powers are carried against the running average (Chan, Golub, LeVeque 1979) and shifted by
binomials.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade.ir import Apply, Const, Einsum, Expr, Local, Rank, Read, Reduce, Target, TopK
from cascade.passes.separate import STEP, Family, Terms
from cascade.walk import fresh, free_ranks, substitute

ONE = Const(1)


class NoAccumulator(Exception):
    """A term that no accumulator of this kind can hold."""


def _outside(families: Sequence[Family]) -> Iterator[Expr]:
    """What stands outside of the sums: factors of the state, frames, and what an average is taken of."""
    for family in families:
        yield from (factor for part in family.terms for factor in part.factors if factor is not None)
        own = (frame for _, frame in family.frames)
        frames = (family.rho, family.sigma, None if family.exponential else family.a, family.b, *own)
        yield from (expr for expr in frames if expr is not None)


def mul(a: Expr, b: Expr) -> Expr:
    """The product, without factors of one."""
    if a in (ONE, Const(1.0)):
        return b
    return a if b in (ONE, Const(1.0)) else Apply("mul", (a, b))


def scaled(factor: Expr, value: Expr) -> Expr:
    """The value times a factor of the state: a quotient where the factor is one over something."""
    if isinstance(factor, Apply) and factor.op == "div" and factor.args[0] in (ONE, Const(1.0)):
        return Apply("div", (value, factor.args[1]))
    if isinstance(factor, Apply) and factor.op == "neg":
        return Apply("neg", (scaled(factor.args[0], value),))
    if isinstance(factor, Apply) and factor.op == "div" and factor.args[0] == Const(-1):
        return Apply("neg", (Apply("div", (value, factor.args[1])),))
    return mul(value, factor)


def added(terms: Sequence[Expr]) -> Expr:
    """The sum of some terms, what is negated behind a minus."""
    result = terms[0]
    for term in terms[1:]:
        minus = isinstance(term, Apply) and term.op == "neg"
        result = (
            Apply("sub", (result, term.args[0])) if minus and isinstance(term, Apply) else Apply("add", (result, term))
        )
    return result


def undivided(term: Expr, terms: Sequence[Expr]) -> Expr:
    """x * (a / x) as a, where another term is divided by x as well: where x is absent or 0, the sum shows it still."""
    match term:
        case Apply(op="neg"):
            return Apply("neg", (undivided(term.args[0], terms),))
        case Apply(op="mul", args=(x, Apply(op="div", args=(a, under)))) if x == under:
            bare = (t.args[0] if isinstance(t, Apply) and t.op == "neg" else t for t in terms)
            if any(isinstance(t, Apply) and t.op == "div" and t.args[1] == x for t in bare):
                return a
    return term


def powered(base: Expr, times: int) -> Expr:
    """base * base * ..."""
    result: Expr = ONE
    for _ in range(times):
        result = mul(result, base)
    return result


def binomial(power: int, step: Expr, of: Callable[[int], Expr | None]) -> Expr:
    """The moment about a frame from those about another, `step` away: sum_i C(j,i) step^(j-i) M_i."""
    terms = []
    for i in range(power, -1, -1):
        moment = of(i)
        if moment is not None:
            number = math.comb(power, i)
            terms.append(mul(mul(moment, powered(step, power - i)), Const(number)))
    return added(terms)


def read(target: Target, prime: str = "") -> Read:
    """A read of a tensor at its own ranks; primed, that of a part."""
    return Read(target.name + prime, tuple(map(Rank, target.ranks)))


@dataclass(slots=True, eq=False)
class Made:
    """What takes the place of one reduction: statements in order, merges by state, and how it is read out."""

    statements: list[Einsum | TopK] = field(default_factory=list)
    states: list[str] = field(default_factory=list)
    merges: dict[str, Expr] = field(default_factory=dict)
    value: Expr = ONE
    corrections: list[Expr] = field(default_factory=list)  # what older states are multiplied with
    weights: list[str] = field(default_factory=list)  # the maps exp(a - frame)
    frame: Expr | None = None
    deferred: list[Expr] = field(default_factory=list)
    terms: int = 1


@dataclass(slots=True, eq=False)
class Maker:
    """The making of accumulators along one rank, names and common statements shared by all of a trip."""

    rank: str
    taken: set[str]
    partial: Callable[[Expr], Expr]  # an expression of the state so far, as one of the primed states of a part
    named: Mapping[Expr, str]  # maps of the cascade, by what they compute
    known: dict[tuple[Expr, Expr | None], Target] = field(default_factory=dict)

    def of(
        self,
        families: Sequence[Family],
        atoms: Callable[[Expr], Expr],
        stmt: Einsum,
        where: Expr | None,
        steady: Callable[[Expr], bool],
        size: Expr | None,
        present: Expr | None,
    ) -> Made:
        """Accumulators for `stmt`, a sum of the families; `atoms` puts the parts of the map in place of the letters.

        `steady(rho)` tells whether a frame is, in the end, the average of what it is taken from; `size` is the number
        of present coordinates where that is an extent, else those where `present` has a value are counted.
        """
        made = Made()
        assert isinstance(stmt.expr, Reduce)
        outside = {rank for expr in _outside(families) for rank in free_ranks(atoms(expr))}
        kept = tuple(rank for rank in stmt.expr.ranks if rank != self.rank and rank in outside)
        job = _Job(self, made, stmt, where, atoms, size, present, kept)
        terms: list[Expr] = []
        for family in families:
            if family.exponential:
                terms += job.exponential(family)
            elif family.b is not None:
                terms.append(job.comoment(family, steady))
            elif family.a is not None:
                terms += job.centred(family, steady)
            else:
                terms += [term for part in family.terms for term in job.plain(part)]
        value = added([undivided(term, terms) for term in terms])
        made.value = Reduce("sum", kept, value) if kept else value
        return made

    def shared(self, base: str, ranks: tuple[str, ...], expr: Expr, where: Expr | None, made: Made) -> Target:
        """The tensor of a statement, made once for all that need it."""
        if (expr, where) not in self.known:
            target = Target(fresh(base, self.taken), ranks)
            self.known[expr, where] = target
            made.statements.append(Einsum(target, expr, where))
        return self.known[expr, where]


@dataclass(slots=True, eq=False)
class _Job:
    """One reduction being replaced."""

    maker: Maker
    made: Made
    stmt: Einsum
    where: Expr | None
    atoms: Callable[[Expr], Expr]
    size: Expr | None
    present: Expr | None
    kept: tuple[str, ...]  # reduced ranks that a factor or a frame depends on: they are summed behind the trip

    def exponential(self, family: Family) -> list[Expr]:
        """Sums of exp(u), u = a - rho, times powers of u."""
        assert family.a is not None and family.rho is not None
        a, rho = self.atoms(family.a), self.atoms(family.rho)
        frame = self.guarded(rho)
        u = Apply("sub", (a, frame))
        weight_map = Apply("exp", (u,))
        plain = Apply("exp", (Apply("sub", (a, rho)),))
        base = self.maker.named.get(plain, f"{self.stmt.target.name}_exp")
        weight = self.maker.shared(base, free_ranks(weight_map), weight_map, None, self.made)
        step = Apply("sub", (self.maker.partial(rho), frame))
        self.made.frame = rho
        self.made.weights.append(weight.name)
        correction = Apply("exp", (step,))
        self.made.corrections.append(correction)
        shifted: dict[str, Expr] = {STEP.name: u}
        steps: dict[str, Expr] = {STEP.name: step}
        for name, sigma in family.frames:
            own = self.guarded(self.atoms(sigma))
            shifted[name] = Apply("sub", (self.atoms(Local(name)), own))
            steps[name] = Apply("sub", (self.maker.partial(self.atoms(sigma)), own))
        result: list[Expr] = []
        for part in family.terms:
            factors = tuple(None if f is None else self.atoms(f) for f in part.factors)
            element = mul(read(weight), self.atoms(part.weight))
            if part.linear is not None:
                total, target = (self.state(mul(element, e)) for e in (ONE, substitute(part.linear, {}, shifted)))
                moved = mul(read(total, "'"), substitute(part.linear, {}, steps))
                self.made.merges[total.name] = mul(read(total, "'"), correction)
                self.made.merges[target.name] = mul(Apply("add", (read(target, "'"), moved)), correction)
                result += self.read_out(factors, [read(target)])
                continue
            moments = [self.state(mul(element, powered(u, j))) for j in range(len(factors))]
            for j, moment in enumerate(moments):
                older = binomial(j, step, lambda i, m=moments: read(m[i], "'"))  # type: ignore[misc]
                self.made.merges[moment.name] = mul(older, correction)
            result += self.read_out(factors, [read(moment) for moment in moments])
        return result

    def guarded(self, rho: Expr) -> Expr:
        """A frame that is a number also where nothing was seen yet."""
        number = Apply("select", (Apply("eq", (rho, Const(-math.inf))), Const(0.0), rho))
        base = f"{rho.tensor}_frame" if isinstance(rho, Read) else f"{self.stmt.target.name}_frame"
        return read(self.maker.shared(base, free_ranks(rho), number, None, self.made))

    def centred(self, family: Family, steady: Callable[[Expr], bool]) -> list[Expr]:
        """Sums of powers of a - rho, carried against the running average of a."""
        assert family.a is not None and family.rho is not None
        a, rho = self.atoms(family.a), self.atoms(family.rho)
        count = self.common("count", a)
        mean, step = self.average(a, count)
        u = Apply("sub", (a, read(mean)))
        result: list[Expr] = []
        for part in family.terms:
            factors = tuple(None if f is None else self.atoms(f) for f in part.factors)
            weight = self.atoms(part.weight)
            alone = weight in (ONE, Const(1.0))
            first = 2 if alone else 0
            moments = {j: self.state(mul(weight, powered(u, j))) for j in range(first, len(factors))}

            def moment(i: int, prime: str = "", m: dict[int, Target] = moments, alone: bool = alone) -> Expr | None:
                if i in m:
                    return read(m[i], prime)
                return read(count, prime) if i == 0 and alone else None  # the first moment about an average is 0

            for j, target in moments.items():
                self.made.merges[target.name] = binomial(j, step, lambda i, at=moment: at(i, "'"))  # type: ignore[misc]
            shift = Apply("sub", (read(mean), rho))
            about: list[Expr] = []
            for j in range(len(factors)):
                own = moment(j)
                about.append(
                    own if steady(rho) and own is not None else binomial(j, shift, moment) if j else own or ONE
                )
            result += self.read_out(factors, about)
        return result

    def comoment(self, family: Family, steady: Callable[[Expr], bool]) -> Expr:
        """A sum of (a - rho) * (b - sigma), carried against the running averages of both."""
        assert family.a is not None and family.b is not None and family.rho is not None and family.sigma is not None
        count = self.common("count", self.present if self.present is not None else self.atoms(family.a))
        sides = []
        for part, frame in ((family.a, family.rho), (family.b, family.sigma)):
            side, rho = self.atoms(part), self.atoms(frame)
            mean, step = self.average(side, count)
            shift = None if steady(rho) else Apply("sub", (read(mean), rho))
            sides.append((Apply("sub", (side, read(mean))), step, shift))
        (u, u_step, u_shift), (w, w_step, w_shift) = sides
        target = self.state(mul(u, w))
        self.made.merges[target.name] = Apply("add", (read(target, "'"), mul(mul(read(count, "'"), u_step), w_step)))
        value: Expr = read(target)
        if u_shift is not None and w_shift is not None:
            value = Apply("add", (value, mul(mul(read(count), u_shift), w_shift)))
        factor = family.terms[0].factors[0]
        assert factor is not None
        return self.read_out((self.atoms(factor),), [value])[0]

    def average(self, a: Expr, count: Target) -> tuple[Target, Expr]:
        """The running average of a value, and the step to it from that of a part."""
        total = self.common("sum", a)
        number, older = (Apply("max", (read(count, prime), ONE)) for prime in ("", "'"))
        mean = Apply("div", (read(total), number))
        target = self.maker.shared(f"{self.stmt.target.name}_mean", total.ranks, mean, None, self.made)
        self.made.frame = read(target)
        return target, Apply("sub", (Apply("div", (read(total, "'"), older)), read(target)))

    def common(self, reducer: str, a: Expr) -> Target:
        """The number, or the sum, of what is averaged: a state of its own, shared."""
        expr = Reduce(reducer, (self.maker.rank,), a)
        ranks = dict.fromkeys((*free_ranks(a), *(free_ranks(self.where) if self.where is not None else ())))
        kept = tuple(rank for rank in ranks if rank != self.maker.rank)
        target = self.maker.shared(f"{self.stmt.target.name}_{reducer}", kept, expr, self.where, self.made)
        if target.name not in self.made.states:
            self.made.states.append(target.name)
            self.made.merges[target.name] = read(target, "'")
        return target

    def plain(self, part: Terms) -> list[Expr]:
        """A sum that needs no frame."""
        factor = part.factors[0]
        assert factor is not None
        weight, outside = self.atoms(part.weight), self.atoms(factor)
        if self.maker.rank not in free_ranks(weight):
            assert isinstance(self.stmt.expr, Reduce)
            if self.present is None or any(r not in (self.maker.rank, *self.kept) for r in self.stmt.expr.ranks):
                raise NoAccumulator
            size = self.size if self.size is not None else read(self.common("count", self.present))
            self.made.deferred.append(outside)
            return [scaled(outside, mul(size, weight))]
        target = self.state(weight)
        self.made.merges[target.name] = read(target, "'")
        return self.read_out((outside,), [read(target)])

    def state(self, element: Expr) -> Target:
        """The accumulator of an element; it keeps the reduced ranks that something outside of the sum depends on."""
        assert isinstance(self.stmt.expr, Reduce)
        free = free_ranks(element)
        folded = tuple(rank for rank in self.stmt.expr.ranks if rank not in self.kept)
        if not set(folded) <= set(free):
            raise NoAccumulator  # each coordinate of the missing rank would have to count
        ranks = tuple(r for r in (*self.stmt.target.ranks, *self.kept) if r in free or self._filtered(r))
        total = Reduce("sum", folded, element)
        known = self.maker.known.get((total, self.where))
        target = self.maker.shared(
            f"{self.stmt.target.name}_sum", known.ranks if known else ranks, total, self.where, self.made
        )
        self.made.states.append(target.name)
        return target

    def _filtered(self, rank: str) -> bool:
        return self.where is not None and rank in free_ranks(self.where)

    def read_out(self, factors: Sequence[Expr | None], moments: Sequence[Expr]) -> list[Expr]:
        """The terms of the reduction, from its accumulators and the factors that waited."""
        found = []
        for factor, moment in zip(factors, moments, strict=True):
            if factor is not None:
                if not isinstance(factor, Const):
                    self.made.deferred.append(factor)
                found.append(scaled(factor, moment))
        return found
