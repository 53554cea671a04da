"""A map of a state and an element as a finite sum of terms, each a factor of the state times a factor of the element.

    exp(x - r) * (x - r)   =   exp(x - r) * x * 1  +  exp(x - r) * (-r)        two terms, in the frame r

A sum over elements of such a map is computed in one trip, whatever the state will be: one accumulator a term. No finite
number of terms, no finite additive state. `Family` holds the terms that share a frame: sums of `weight * u**j`, with
u = a - rho, and times exp(u) where `exponential`. Three forms:

* exponential: carried against rho, so that nothing overflows; an older sum is worth exp(rho' - rho) of its value, and
  what stands beside exp(u) linearly is carried against its own largest value;
* centred (j of 2 and more): carried against a running average of a, because raw moments cancel; a product of two such,
  (a - rho) * (b - sigma), against two averages;
* plain: no frame (a and rho are None).

Two oracles decide. The terms come from SymPy: expand, split exponents, collect by factors. Their smallest number is the
rank of the matrix of values of the map at sampled states and elements, in 80 digits, at 8, 16 and 32 samples: a rank
that goes on growing is infinite. Piecewise maps look low at few samples.

Where a frame cancels from what is read out, it is not in there. exp(x - r) / d * (log(d) + r - x) is -exp(u) * u / d +
exp(u) * log(d) / d: whatever r is, no digits are lost to it. To see that, atoms are taken apart into finer ones, log(d)
+ r into d and r, and exp(x - (r + log(d))) becomes exp(x - r) / d. Such a form is taken if rho is in none of its
factors, and if it is the same map on samples.

Atoms are `Local`s: x0, x1, ... for parts that depend on the element, r0, r1, ... for parts that depend on the state,
c0, c1, ... for what depends on neither, such as a temperature.
"""

from __future__ import annotations

import importlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from cascade.ir import Apply, Cast, Const, Expr, Local
from cascade.passes.scalars import HIGH, Scalar, evaluate
from cascade.walk import children, substitute, walk, with_children

SAMPLES = (8, 16, 32)
ROUNDING = ("round", "floor", "sign")
STEP = Local("u")  # in the linear part of a term, u = a - rho


@dataclass(frozen=True, slots=True)
class Terms:
    """The terms with one factor `weight` of the element: `factors[j]` is the factor of the state at u**j."""

    weight: Expr
    factors: tuple[Expr | None, ...]
    linear: Expr | None = None  # times a combination of u and of elements in frames of their own; one factor then


@dataclass(frozen=True, slots=True)
class Family:
    """Terms that share a frame: u = a - rho."""

    exponential: bool
    a: Expr | None
    rho: Expr | None
    terms: tuple[Terms, ...]
    b: Expr | None = None  # of a product (a - rho) * (b - sigma), the second factor
    sigma: Expr | None = None
    frames: tuple[tuple[str, Expr], ...] = ()  # of elements that `linear` mentions: each is carried less its frame


@dataclass(frozen=True, slots=True)
class Separation:
    """The families that a map is the sum of; none where it is not separable, with the reason. `ranks` is evidence."""

    families: tuple[Family, ...]
    ranks: tuple[int, ...]
    item: str = ""
    reason: str = ""


# --- atoms -----------------------------------------------------------------------------------------------------------

Side = Callable[[Expr], str]
"""What an expression depends on: "x" the element, "r" the state, "m" both, "" neither."""


@dataclass(slots=True, eq=False)
class Atoms:
    """The largest parts of a map that depend on one side alone, by the name of the `Local` that stands for them."""

    side: Side
    parts: dict[str, Expr] = field(default_factory=dict)
    names: dict[Expr, str] = field(default_factory=dict)
    shifts: dict[tuple[str, str], int] = field(default_factory=dict)  # (x, r): the sign of r beside x in some sum

    def local(self, expr: Expr) -> Expr:
        """The atom for a part of one side; numbers stay what they are."""
        if isinstance(expr, Const) and not isinstance(expr.value, bool):
            return expr
        if expr not in self.names:
            letter = self.side(expr) or "c"
            name = f"{letter}{sum(known.startswith(letter) for known in self.parts)}"
            self.names[expr], self.parts[name] = name, expr
        return Local(self.names[expr])

    def abstract(self, expr: Expr) -> Expr:
        """The map over atoms: sums and products gather their parts of one side first."""
        if self.side(expr) != "m":
            return self.local(expr)
        if isinstance(expr, Apply) and expr.op in ("add", "sub", "neg"):
            return self._gathered(list(_flat(expr, "add", "sub")), "add", "sub")
        if isinstance(expr, Apply) and expr.op in ("mul", "div"):
            return self._gathered(list(_flat(expr, "mul", "div")), "mul", "div")
        return with_children(expr, tuple(self.abstract(child) for child in children(expr)))

    def _gathered(self, terms: list[tuple[Expr, bool]], plus: str, minus: str) -> Expr:
        """A chain with its parts of the element first, then those of the state, then the mixed ones."""
        sides = {side: [t for t in terms if self.side(t[0]) in kinds] for side, kinds in SIDES}
        if all(self.side(expr) == "" for expr, _ in sides["x"]):  # what depends on neither goes with the state
            sides["r"], sides["x"] = sides["r"] + sides["x"], []
        done: list[tuple[Expr, bool]] = []
        for side in ("x", "r"):
            if sides[side]:
                first = all(negative for _, negative in sides[side])
                chain = _chain([(e, n != first) for e, n in sides[side]], plus, minus)
                done.append((self.local(chain), first))
        if plus == "add" and len(done) == 2 and not sides["m"]:
            (x, x_minus), (r, r_minus) = done
            if isinstance(x, Local) and isinstance(r, Local) and r.name.startswith("r"):
                self.shifts[x.name, r.name] = 1 if x_minus == r_minus else -1
        done += [(self.abstract(e), n) for e, n in sides["m"]]
        done.sort(key=lambda term: term[1])  # what is subtracted behind what is added
        return _chain(done, plus, minus)

    def finer(self, abstract: Expr, inlined: Callable[[Expr], Expr]) -> dict[str, Expr]:
        """The atoms of a map that are made of finer ones, by name; `inlined` takes in the maps of a state.

        What is exponentiated stays whole: it is what the frame is taken of.
        """
        powers = {n.name for e in walk(abstract) if _is(e, "exp", "exp2") for n in walk(e) if isinstance(n, Local)}
        whole = [expr for name, expr in self.parts.items() if name in powers and self.side(expr) == "x"]
        found: dict[str, Expr] = {}
        for name, expr in list(self.parts.items()) if powers else ():
            side = self.side(expr)
            fine = self._arithmetic(inlined(expr)) if side == "r" else Local(name)
            if side == "x" and expr not in whole:
                fine = self._sum(expr, whole)
            if fine != Local(name):
                found[name] = fine
        return found

    def _arithmetic(self, expr: Expr) -> Expr:
        """A part of the state over the tensors that it is made of."""
        if isinstance(expr, Apply) and expr.op in FINE:
            return Apply(expr.op, tuple(self._arithmetic(arg) for arg in expr.args))
        return self.local(expr)

    def _sum(self, expr: Expr, whole: Sequence[Expr]) -> Expr:
        """A part of the element over the terms that it is the sum of; those that make up one of `whole` are one."""
        terms = list(_flat(expr, "add", "sub"))
        if any(self.side(term) != "x" for term, _ in terms):
            return self.local(expr)
        done: list[tuple[Expr, bool]] = []
        for one in whole:
            for flip in (False, True):
                own = [(term, negative != flip) for term, negative in _flat(one, "add", "sub")]
                if all(term in terms for term in own):
                    terms = [term for term in terms if term not in own]
                    done.append((self.local(one), flip))
        done += [(self.local(term), negative) for term, negative in terms]
        return _chain(sorted(done, key=lambda term: term[1]), "add", "sub")


FINE = ("add", "sub", "mul", "div", "neg", "log", "log2")
SIDES = (("x", ("x", "")), ("r", ("r",)), ("m", ("m",)))


def _flat(expr: Expr, plus: str, minus: str, negative: bool = False) -> Iterator[tuple[Expr, bool]]:
    """The operands of a chain of one operation and its inverse, with whether each is inverted."""
    if isinstance(expr, Apply) and expr.op in (plus, minus):
        yield from _flat(expr.args[0], plus, minus, negative)
        yield from _flat(expr.args[1], plus, minus, negative != (expr.op == minus))
    elif isinstance(expr, Apply) and expr.op == "neg" and plus == "add":
        yield from _flat(expr.args[0], plus, minus, not negative)
    elif isinstance(expr, Apply) and expr.op == "neg":
        yield Const(-1), False
        yield from _flat(expr.args[0], plus, minus, negative)
    else:
        yield expr, negative


def _chain(terms: Sequence[tuple[Expr, bool]], plus: str, minus: str) -> Expr:
    """The chain of these operands, not inverted ones first where possible."""
    (result, negative), *rest = terms
    if negative:
        result = Apply("neg", (result,)) if plus == "add" else Apply("div", (Const(1.0), result))
    for expr, inverted in rest:
        result = Apply(minus if inverted else plus, (result, expr))
    return result


# --- the numeric rank ------------------------------------------------------------------------------------------------


def numeric_ranks(expr: Expr, samples: Sequence[int] = SAMPLES) -> tuple[int, ...]:
    """The rank of the map's values at sampled states and elements, for growing numbers of samples.

    Samples are real; where the map has no value there, positive. Empty where it has none there either.
    """
    names = sorted(_locals(expr))
    for low, high in ((-3.0, 3.0), (0.1, 3.0)):
        rng = random.Random(7)
        count = max(samples)
        rows, columns = (
            [{n: HIGH.mpf(rng.uniform(low, high)) for n in names if n.startswith(side)} for _ in range(count)]
            for side in "rx"
        )
        fixed = {n: HIGH.mpf(rng.uniform(max(low, 0.1), high)) for n in names if n.startswith("c")}
        found = []
        for k in samples:
            matrix = [[_at(expr, {**row, **column, **fixed}) for column in columns[:k]] for row in rows[:k]]
            if not all(HIGH.isfinite(value) for line in matrix for value in line):
                break
            found.append(_rank(matrix))
        if len(found) == len(samples):
            return tuple(found)
    return ()


def _at(expr: Expr, point: dict[str, Scalar]) -> Scalar:
    return HIGH.mpf(evaluate(expr, lambda node: point[node.name] if isinstance(node, Local) else HIGH.nan, high=True))


def _rank(matrix: list[list[Scalar]]) -> int:
    """The rank by Gaussian elimination with full pivoting; what is 40 digits smaller than the largest is zero."""
    rows = [list(line) for line in matrix]
    small = max(abs(value) for line in rows for value in line) * HIGH.mpf(10) ** -40
    rank, columns = 0, list(range(len(rows)))
    while rank < len(rows):
        size, i, j = max((abs(rows[i][j]), i, j) for i in range(rank, len(rows)) for j in columns)
        if size <= small:
            break
        rows[rank], rows[i] = rows[i], rows[rank]
        columns.remove(j)
        pivot = rows[rank]
        for row in rows[rank + 1 :]:
            factor = row[j] / pivot[j]
            if factor:
                for column in columns:
                    row[column] -= factor * pivot[column]
        rank += 1
    return rank


# --- the decision ---------------------------------------------------------------------------------------------------


def separate(
    expr: Expr,
    shifts: Mapping[tuple[str, str], int],
    finer: Mapping[str, Expr] | None = None,
    maxima: Mapping[str, str] | None = None,
) -> Separation:
    """The map over atoms as a sum of families, or why it is none.

    `finer` are the atoms that are made of finer ones, over those; `maxima` says which atom of the state is the largest
    value of which of the element.
    """
    if rounded := next((n for n in walk(expr) if isinstance(n, Cast) or _is(n, *ROUNDING)), None):
        what = f"a cast to {rounded.dtype.value}" if isinstance(rounded, Cast) else rounded.op  # type: ignore[union-attr]
        reason = f"{what} of what depends on the state is opaque: rounding does not commute with a change of the state"
        return Separation((), numeric_ranks(expr), "rounding", reason)
    families: tuple[Family, ...] | str | None = monomial(expr)
    if families is None:
        families = _symbolic().families(expr, shifts)
    if isinstance(families, str):
        return Separation((), numeric_ranks(expr), "cancellation", families)
    if families is None:
        ranks = numeric_ranks(expr)
        if not ranks or ranks[-1] > ranks[0]:
            return Separation((), ranks, "separable", "no finite state: its rank goes on growing with the samples")
        reason = f"its rank is {ranks[-1]}, but no form with so many terms was found"
        return Separation((), ranks, "form", reason)
    ranks = numeric_ranks(expr, SAMPLES[:2])
    if finer and _reads_out(families, finer, set((maxima or {}).values())):
        fine = substitute(expr, {}, finer)
        free: tuple[Family, ...] = _symbolic().frame_free(fine, maxima or {})
        if free and _same(fine, free):
            return Separation(free, ranks)
    return Separation(families, ranks)


def _symbolic() -> Any:
    return importlib.import_module("cascade.passes.symbolic")  # lazily: SymPy takes a while to load


def monomial(expr: Expr) -> tuple[Family, ...] | None:
    """The family of a map that is one term as it stands, exp(x - r) times one atom a side; None for all others.

    Most exponential maps are of this form, and need no computer algebra.
    """
    terms = list(_flat(expr, "mul", "div"))
    powers = [(node.args[0], inverted) for node, inverted in terms if isinstance(node, Apply) and node.op == "exp"]
    atoms = [(node, inverted) for node, inverted in terms if isinstance(node, Local)]
    if len(powers) != 1 or powers[0][1] or len(atoms) + 1 != len(terms):
        return None
    match powers[0][0]:
        case Apply(op="sub", args=(Local() as a, Local() as rho)) if a.name[0] == "x" and rho.name[0] == "r":
            pass
        case _:
            return None
    weights = [node for node, inverted in atoms if node.name[0] == "x" and not inverted]
    over = [node for node, inverted in atoms if node.name[0] == "r" and not inverted]
    under = [node for node, inverted in atoms if node.name[0] == "r" and inverted]
    few = max(len(weights), len(over), len(under)) <= 1 and len(weights) + len(over) + len(under) == len(atoms)
    if not few or {a, rho} & {node for node, _ in atoms} or over == under != []:
        return None
    factor: Expr = over[0] if over else Const(1)
    if under:
        factor = Apply("div", (factor if over else Const(1.0), under[0]))
    return (Family(True, a, rho, (Terms(weights[0] if weights else Const(1), (factor,)),)),)


def _reads_out(families: Sequence[Family], finer: Mapping[str, Expr], maxima: Set[str]) -> bool:
    """Whether a frame of an exponential, or a largest value, is among what its factors are made of; or is a sum."""
    for family in families:
        if family.exponential and family.rho is not None:
            rho = substitute(family.rho, {}, finer)
            frames = maxima | {name for name in _locals(rho) if name.startswith("r")}
            factors = [factor for part in family.terms for factor in part.factors if factor is not None]
            if rho != family.rho or any(frames & _locals(substitute(factor, {}, finer)) for factor in factors):
                return True
    return False


def _locals(expr: Expr) -> set[str]:
    return {node.name for node in walk(expr) if isinstance(node, Local)}


def _same(expr: Expr, families: Sequence[Family]) -> bool:
    """Whether exponential families add up to the map, on samples."""
    names = sorted(_locals(expr))
    rng = random.Random(5)
    for _ in range(4):
        point = {name: HIGH.mpf(rng.uniform(0.1, 3.0)) for name in names}
        wanted = _at(expr, point)
        found = sum((_at(term, point) for family in families for term in _written(family)), HIGH.mpf(0))
        if not HIGH.isfinite(wanted) or abs(found - wanted) > HIGH.mpf(10) ** -12 * (1 + abs(wanted)):
            return False
    return True


def _written(family: Family) -> Iterator[Expr]:
    """The terms of an exponential family, each as the expression that it stands for."""
    assert family.a is not None and family.rho is not None
    u = Apply("sub", (family.a, family.rho))
    moved: dict[str, Expr] = {name: Apply("sub", (Local(name), frame)) for name, frame in family.frames}
    for part in family.terms:
        value: Expr = Apply("mul", (Apply("exp", (u,)), part.weight))
        if part.linear is not None:
            value = Apply("mul", (value, substitute(part.linear, {}, {**moved, STEP.name: u})))
        for factor in part.factors:
            if factor is not None:
                yield Apply("mul", (value, factor))
            value = Apply("mul", (value, u))


def _is(node: Expr, *ops: str) -> bool:
    return isinstance(node, Apply) and node.op in ops
