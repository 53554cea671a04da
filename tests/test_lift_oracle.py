"""What lifting makes of a cascade, against three witnesses that know nothing of lifting.

* A finite field: plain and lifted cascade, walked element by element over numbers mod 2**61 - 1, give the same, exactly.
* Brute force: the fewest trips over n for which interpolation between fixed frames reproduces the reference, as a black
  box, are the trips that lifting finds, and those that follow from how the program was put together.
* The interpreter in float64: every block, every split, every order of the elements gives what plain statements mean.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, TypeAlias

import lifting_programs
import pytest
import torch
from lifting_programs import Program

from cascade.compiled import Compiled
from cascade.frontend.build import parse_cascade
from cascade.inference import infer_shapes
from cascade.interp import Precision, run
from cascade.ir import (
    Apply, Cascade, Cast, Const, DType, Einsum, Expr, Extent, Fold, Param, Rank, Read, Reduce, Result, Split,
    Stmt, Target, TopK,
)  # fmt: skip
from cascade.ops import REDUCERS
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.inline import Inline
from cascade.passes.lift import lift_reductions
from cascade.passes.pass_count import count_passes
from cascade.text import render
from cascade.verify import verify
from cascade.walk import defines, free_ranks, reads, targets, walk
from tests import test_folds
from tests.test_oracles import assignments

PARTS = 4  # of a campaign, so that workers share it


@functools.cache
def made(seed: int, where: str | None = None) -> tuple[Program, Cascade, Cascade]:
    """A program of the generator, its canonical cascade, and what lifting makes of it; both valid."""
    program = lifting_programs.program(seed, where)
    source = parse_cascade(program.text)
    verify(source)
    plain = Canonicalize()(Inline()(source))
    lifted = lift_reductions(plain).cascade
    verify(lifted)
    return program, plain, lifted


# --- numbers of a finite field ---------------------------------------------------------------------------------------

P = 2**61 - 1
PRIMES = (31, 41, 61, 151, 331, 1321)
ORDER = math.prod(PRIMES)  # of the base of exp: prime to all small numbers, so that exponents are divided by them
BASE = pow(37, (P - 1) // ORDER, P)  # 37 generates all of the field
CLOSE = 1e-9


class NoMeaning(Exception):
    """An operation that the field cannot follow: the cascade is counted, and not judged."""


@dataclass(frozen=True, slots=True)
class Number:
    """A value: `residue` in the field; `shadow`, the real number that it is close to, decides what is larger.

    `exact` is the rational number, where it is one; `power` is exp of the value, where exp is defined: BASE to the
    rational, and a product where the value is a sum. `log` is what the value is exp of, through products and quotients.
    """

    residue: int
    shadow: float
    exact: Fraction | None = None
    power: int | None = None
    log: Number | None = None


def rational(value: Fraction | int) -> Number:
    """A rational number in the field, and as an exponent."""
    exact = Fraction(value)
    return quotient(exact.numerator, exact.denominator)


@functools.lru_cache(1 << 16)
def quotient(numerator: int, denominator: int) -> Number:
    """The rational number in lowest terms; the walks of a cascade, one for each plan, come by the same ones."""
    exact = Fraction(numerator, denominator)
    residue = numerator * pow(denominator, -1, P) % P
    known = math.gcd(denominator, ORDER) == 1
    return Number(residue, float(exact), exact, raised(BASE, exact) if known else None)


def raised(base: int, exponent: Fraction) -> int:
    """A power with a rational exponent; a root is unique in the group of ORDER elements, elsewhere it has no meaning."""
    if exponent.denominator == 1:
        return pow(base, int(exponent) % (P - 1), P)
    if math.gcd(exponent.denominator, ORDER) != 1 or pow(base, ORDER, P) != 1:
        raise NoMeaning("a root")
    return pow(base, exponent.numerator * pow(exponent.denominator, -1, ORDER) % ORDER, P)


def opaque(name: str, x: Number, shadow: float) -> Number:
    """A function of which nothing is known but that it is one; exp of it is as good as any."""
    digest = hashlib.blake2b(f"{name} {x.residue}".encode(), digest_size=8).digest()
    value = int.from_bytes(digest, "big")
    return Number(value % P, shadow, None, pow(BASE, value % ORDER, P))


def add(a: Number, b: Number) -> Number:
    if a.exact is not None and b.exact is not None:
        return rational(a.exact + b.exact)
    power = None if a.power is None or b.power is None else a.power * b.power % P
    return Number((a.residue + b.residue) % P, a.shadow + b.shadow, None, power)


def multiply(a: Number, b: Number) -> Number:
    if a.exact is not None and b.exact is not None:
        return rational(a.exact * b.exact)
    log = add(logarithm(a), logarithm(b)) if (a.log or b.log) and a.shadow > 0 and b.shadow > 0 else None
    return Number(a.residue * b.residue % P, a.shadow * b.shadow, None, scaled_power(a, b), log)


def scaled_power(a: Number, b: Number) -> int | None:
    """exp of a product, one factor of it rational."""
    number, other = (a, b) if a.exact is not None else (b, a)
    if number.exact is None or other.power is None:
        return None
    try:
        return raised(other.power, number.exact)
    except NoMeaning:
        return None


def inverse(a: Number) -> Number:
    if a.residue == 0:
        raise NoMeaning("a division by zero")
    if a.exact is not None:
        return rational(1 / a.exact)
    log = multiply(rational(-1), logarithm(a)) if a.shadow > 0 else None
    return Number(pow(a.residue, -1, P), 1 / a.shadow, None, None, log)


def exponential(a: Number) -> Number:
    if a.power is None:
        raise NoMeaning("exp of what has no power")
    if abs(a.shadow) > 600:
        raise NoMeaning("exp out of range")
    return Number(a.power, math.exp(a.shadow), Fraction(1) if a.exact == 0 else None, None, a)


def logarithm(a: Number) -> Number:
    """The inverse of exp: known for products of exp, else a symbol, whose exp is the value."""
    if a.log is not None:
        return a.log
    if a.exact == 1:
        return rational(0)
    if not a.shadow > 0:
        raise NoMeaning("log of what is not positive")
    return dataclasses.replace(opaque("log", a, math.log(a.shadow)), power=a.residue)


def root(a: Number) -> Number:
    """A square root: the same function of equal numbers, and multiplicative."""
    if a.shadow < 0:
        raise NoMeaning("the root of a negative number")
    return Number(pow(a.residue, (P + 1) // 4, P), math.sqrt(a.shadow))


def power(a: Number, b: Number) -> Number:
    if b.exact is None or not a.shadow > 0:
        raise NoMeaning("a power with a general exponent")
    if b.exact.denominator == 2:
        return power(root(a), rational(b.exact * 2))
    return Number(raised(a.residue, b.exact), a.shadow ** float(b.exact))


def order(a: Number, b: Number) -> int:
    """-1, 0 or 1: by the shadows, which must tell numbers apart that differ in the field."""
    if a.residue == b.residue and math.isinf(a.shadow) == math.isinf(b.shadow):
        return 0
    if not math.isinf(a.shadow - b.shadow) and abs(a.shadow - b.shadow) <= CLOSE * max(abs(a.shadow), abs(b.shadow)):
        raise NoMeaning("numbers too close to tell which is larger")
    return 1 if a.shadow > b.shadow else -1


ZERO, ONE = rational(0), rational(1)


def rounded(how: Callable[[float], int], a: Number) -> Number:
    """floor or round, of what is not close to a step."""
    if a.exact is not None:
        return rational(how(a.exact))  # type: ignore[arg-type]
    if how(a.shadow - 1e-7) != how(a.shadow + 1e-7):
        raise NoMeaning("a number too close to a step")
    return rational(how(a.shadow))


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": add,
    "sub": lambda a, b: add(a, multiply(rational(-1), b)),
    "mul": multiply,
    "div": lambda a, b: multiply(a, inverse(b)),
    "neg": lambda a: multiply(rational(-1), a),
    "mod": lambda a, b: rational(a.exact % b.exact),
    "floordiv": lambda a, b: rational(a.exact // b.exact),
    "pow": power,
    "exp": exponential,
    "log": logarithm,
    "sqrt": root,
    "rsqrt": lambda a: inverse(root(a)),
    "abs": lambda a: a if order(a, ZERO) >= 0 else multiply(rational(-1), a),
    "sign": lambda a: rational(order(a, ZERO)),
    "relu": lambda a: a if order(a, ZERO) > 0 else ZERO,
    "floor": functools.partial(rounded, math.floor),
    "round": functools.partial(rounded, round),
    "max": lambda a, b: a if order(a, b) >= 0 else b,
    "min": lambda a, b: a if order(a, b) <= 0 else b,
    "eq": lambda a, b: order(a, b) == 0,
    "ne": lambda a, b: order(a, b) != 0,
    "lt": lambda a, b: order(a, b) < 0,
    "le": lambda a, b: order(a, b) <= 0,
    "gt": lambda a, b: order(a, b) > 0,
    "ge": lambda a, b: order(a, b) >= 0,
    "and": lambda a, b: a and b,
    "or": lambda a, b: a or b,
    "not": lambda a: not a,
    "select": lambda c, a, b: a if c else b,
    "tanh": lambda a: opaque("tanh", a, math.tanh(a.shadow)),
    "sigmoid": lambda a: opaque("sigmoid", a, 0.5 + 0.5 * math.tanh(a.shadow / 2)),
    "sin": lambda a: opaque("sin", a, math.sin(a.shadow)),
    "cos": lambda a: opaque("cos", a, math.cos(a.shadow)),
}
COMPARING = {"eq", "ne", "lt", "le", "gt", "ge", "max", "min", "select", "and", "or", "not"}


def operate(op: str, args: Sequence[Any]) -> Any:
    """An operation on numbers or truth values that are there; infinities are compared, and no more."""
    if op not in OPERATIONS:
        raise NoMeaning(op)
    if op not in COMPARING and any(math.isinf(arg.shadow) or math.isnan(arg.shadow) for arg in args):
        raise NoMeaning("arithmetic with an infinity")
    return OPERATIONS[op](*args)


def constant(value: float | bool) -> Any:
    if isinstance(value, bool):
        return value
    return Number(0, value) if math.isinf(value) else rational(Fraction(str(value)))


# --- a cascade, element by element -----------------------------------------------------------------------------------

Coordinates: TypeAlias = tuple[int, ...]
Tensor: TypeAlias = dict[Coordinates, Any]  # None where it is absent; no entry where it is not known yet
Plan: TypeAlias = Any  # of a fold: a list of elements; ("stream", plan, ...); ("merge", plan, plan)


@dataclass
class Walker:
    """Statements in any order in which each finds what it reads; folds as `plan` says."""

    cascade: Cascade
    store: dict[str, Tensor]
    sizes: Mapping[str, int]
    plan: Plan = ()
    window: dict[str, Sequence[int]] = field(default_factory=dict)

    def run(self) -> dict[str, Tensor]:
        """The results; what is absent is filled."""
        shapes = infer_shapes(self.cascade)
        self.extents = {rank: self.size(size) for rank, size in shapes.ranks.items()}
        folds = {name: item for item in self.cascade.schedule if isinstance(item, Fold) for name in item.update}
        waiting = list(self.cascade.body)
        while waiting:
            stmt = next(s for s in waiting if self.ready(folds.get(defines(s)[0]), s))
            fold = folds.get(defines(stmt)[0])
            together = [s for s in waiting if fold and folds.get(defines(s)[0]) is fold] or [stmt]
            if fold:
                FoldWalk(self, fold, together).run()
            else:
                self.store.update(self.compute(stmt))
            waiting = [s for s in waiting if s not in together]
        results = {}
        for result in self.cascade.results:
            fill = constant(result.fill.value)
            found = self.store[result.name]
            full = itertools.product(*(range(self.size(size)) for size in result.shape))
            results[result.name] = {at: fill if found[at] is None else found[at] for at in full}
        return results

    def size(self, size: int | str) -> int:
        return size if isinstance(size, int) else self.sizes[size]

    def ready(self, fold: Fold | None, stmt: Stmt) -> bool:
        """Whether everything is known that a statement, or the fold that it is part of, reads."""
        inside = set(fold.update) if fold else set()
        inside |= {name for s in self.cascade.body if not inside.isdisjoint(defines(s)) for name in defines(s)}
        members = [s for s in self.cascade.body if not inside.isdisjoint(defines(s))] or [stmt]
        return all(name in self.store or name in inside for s in members for name in reads(s))

    def along(self, rank: str) -> Sequence[int]:
        """The coordinates of a rank: those of the block at hand, where there is one."""
        return self.window.get(rank, range(self.extents[rank]))

    def points(self, ranks: Sequence[str]) -> Iterator[dict[str, int]]:
        for at in itertools.product(*map(self.along, ranks)):
            yield dict(zip(ranks, at, strict=True))

    def compute(self, stmt: Stmt) -> dict[str, Tensor]:
        """What a statement defines, at the coordinates of the block."""
        if isinstance(stmt, TopK):
            return self.choose(stmt)
        assert isinstance(stmt, Einsum)
        assert not stmt.inits
        ranks = stmt.target.ranks
        found: Tensor = {}
        for point in self.points(ranks):
            live = stmt.where is None or not set(free_ranks(stmt.where)) <= set(ranks) or self.value(stmt.where, point)
            found[tuple(point.values())] = self.value(stmt.expr, point, stmt.where) if live else None
        return {stmt.target.name: found}

    def choose(self, stmt: TopK) -> dict[str, Tensor]:
        """The largest elements and their coordinates."""
        kept = next(rank for rank in stmt.values.ranks if rank not in free_ranks(stmt.body))
        others = [rank for rank in stmt.values.ranks if rank != kept]
        found: dict[str, Tensor] = {stmt.values.name: {}, stmt.coords.name: {}}
        for point in self.points(others):
            pairs = []
            for n in self.along(stmt.rank):
                inner = {**point, stmt.rank: n}
                if stmt.where is None or self.value(stmt.where, inner):
                    pairs.append((self.value(stmt.body, inner), rational(n)))
            for j, pair in enumerate(largest(pairs, self.size(stmt.k))):
                at = tuple({**point, kept: j}[rank] for rank in stmt.values.ranks)
                found[stmt.values.name][at], found[stmt.coords.name][at] = pair
        return found

    def value(self, expr: Expr, point: Mapping[str, int], where: Expr | None = None) -> Any:
        """The value at a point; None where it is absent. `where` filters the reductions that bind a rank of it."""
        match expr:
            case Const():
                return constant(expr.value)
            case Rank():
                return rational(point[expr.name])
            case Extent():
                return rational(self.sizes[expr.name])
            case Cast(dtype=DType.F32 | DType.F64):
                return self.value(expr.arg, point, where)
            case Read():
                index = [self.value(e, point) for e in expr.index]
                if any(i is None for i in index):
                    return None
                return self.read(expr.tensor, tuple(int(i.exact) for i in index))
            case Apply(op="default"):
                found = self.value(expr.args[0], point, where)
                return self.value(expr.args[1], point, where) if found is None else found
            case Apply():
                args = [self.value(arg, point, where) for arg in expr.args]
                return None if any(arg is None for arg in args) else operate(expr.op, args)
            case Reduce():
                return self.reduce(expr, point, where)
            case _:
                raise NoMeaning(type(expr).__name__)

    def read(self, name: str, at: Coordinates) -> Any:
        """An element; what is not known yet must not be asked for."""
        return self.store[name][at]

    def reduce(self, expr: Reduce, point: Mapping[str, int], where: Expr | None) -> Any:
        concerned = where is not None and not set(free_ranks(where)).isdisjoint(expr.ranks)
        found = []
        for inner in self.points(expr.ranks):
            both = {**point, **inner}
            if not concerned or self.value(where, both):  # type: ignore[arg-type]
                found.append(self.value(expr.body, both, where))
        return folded(expr.reducer, found)


def folded(reducer: str, found: Sequence[Any]) -> Any:
    """The present values folded, without a memory of how each was made."""
    there = [value for value in found if value is not None]
    if reducer == "count":
        return rational(len(there)) if there else None
    if not there:
        return None
    op = REDUCERS[reducer].op
    if op is None:
        raise NoMeaning(reducer)
    total = functools.reduce(lambda a, b: operate(op, (a, b)), there)
    return dataclasses.replace(total, log=None) if isinstance(total, Number) else total


def largest(pairs: Sequence[tuple[Any, Number]], k: int) -> list[tuple[Any, Any]]:
    """The k largest present values with their coordinates; the lower coordinate of equals first."""
    there = [pair for pair in pairs if pair[0] is not None]
    there.sort(key=functools.cmp_to_key(lambda a, b: -order(a[0], b[0]) or order(a[1], b[1])))
    return [*there[:k], *[(None, None)] * (k - len(there))]


# --- a fold, by its merge ----------------------------------------------------------------------------------------------


@dataclass
class FoldWalk:
    """A fold, in any plan of blocks and merges: what an older state counts for is what `merge` says, and no more."""

    walker: Walker
    fold: Fold
    statements: list[Stmt]

    def run(self) -> None:
        named = {name: stmt for stmt in self.statements for name in defines(stmt)}
        self.statements = list(dict.fromkeys(named[name] for name in self.fold.update))
        self.merges = {merge.target.name: merge for merge in self.fold.merge}
        first = {init.target.name: init.expr for init in self.fold.init if init.expr is not None}
        plan = ("merge", "first", self.walker.plan) if first else self.walker.plan
        self.first = first
        self.state(plan)

    def state(self, plan: Plan) -> dict[str, Tensor]:
        """The state of a plan."""
        if plan == "first":
            return self.begin()
        if isinstance(plan, list):
            return self.step([], plan)
        kind, *parts = plan
        if kind == "merge":
            return self.step([self.state(part) for part in parts], None)
        state = self.step([], parts[0])
        for block in parts[1:]:
            state = self.step([state], block)
        return state

    def begin(self) -> dict[str, Tensor]:
        """The state of the virtual elements alone; what it has not is absent."""
        state: dict[str, Tensor] = {}
        for stmt in self.statements:
            target = targets(stmt)[0]
            if target.name in self.first:
                state[target.name] = self.elements(target, self.first[target.name])
                self.walker.store.update(state)
            elif not self.dated_by_block(stmt) and all(name in self.walker.store for name in reads(stmt)):
                self.walker.store.update(self.walker.compute(stmt))
        return state

    def dated_by_block(self, stmt: Stmt) -> bool:
        """Whether a statement is part of the state, or holds for a block only."""
        names = {name for name in defines(stmt)}
        return bool(names & set(self.fold.state)) or self.fold.rank in targets(stmt)[0].ranks or self.reduces(stmt)

    def reduces(self, stmt: Stmt) -> bool:
        if isinstance(stmt, TopK):
            return stmt.rank == self.fold.rank
        return isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) and self.fold.rank in stmt.expr.ranks

    def step(self, earlier: Sequence[dict[str, Tensor]], block: Sequence[int] | None) -> dict[str, Tensor]:
        """One state of those of some parts and of a block of elements."""
        walker, state = self.walker, {}
        walker.window = {} if block is None else {self.fold.rank: block}
        for stmt in self.statements:
            names = defines(stmt)
            if not self.dated_by_block(stmt):
                walker.store.update(walker.compute(stmt))
            elif names[0] not in self.fold.state:
                walker.store.update(walker.compute(stmt) if block is not None else {})
            else:
                found = [self.moved(stmt, part) for part in earlier if names[0] in part]
                found += [self.of_block(stmt)] if block is not None else []
                if found:
                    state.update(self.joined(stmt, found))
                    walker.store.update({name: state[name] for name in names})
        walker.window = {}
        return state

    def of_block(self, stmt: Stmt) -> dict[str, Tensor]:
        """What a block gives to a state: its reduction, or that of the member that the state joins with others."""
        if self.reduces(stmt):
            return self.walker.compute(stmt)
        inner = {name for s in self.statements if self.reduces(s) for name in defines(s)} - set(self.fold.state)
        assert isinstance(stmt, Einsum)
        read = next(e for e in walk(stmt.expr) if isinstance(e, Read) and e.tensor in inner)
        return {stmt.target.name: self.elements(stmt.target, read)}

    def elements(self, target: Target, expr: Expr) -> Tensor:
        return {tuple(p.values()): self.walker.value(expr, p) for p in self.walker.points(target.ranks)}

    def moved(self, stmt: Stmt, part: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the state of a part counts for in the state at hand."""
        absent = {
            target.name: {tuple(p.values()): None for p in self.walker.points(target.ranks)}
            for s in self.statements
            for target in targets(s)
            if target.name in self.fold.state
        }
        self.walker.store.update({f"{name}'": part.get(name, nothing) for name, nothing in absent.items()})
        return {target.name: self.elements(target, self.merges[target.name].expr) for target in targets(stmt)}

    def joined(self, stmt: Stmt, found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The contributions folded with the reducer of the state."""
        if isinstance(stmt, TopK):
            return self.joined_choice(stmt, found)
        assert isinstance(stmt, Einsum)
        if isinstance(stmt.expr, Reduce):
            reducer = "sum" if stmt.expr.reducer == "count" else stmt.expr.reducer
        else:
            assert isinstance(stmt.expr, Apply)
            reducer = next(row.name for row in REDUCERS.values() if row.op == stmt.expr.op)
        name = stmt.target.name
        return {name: {at: folded(reducer, [part[name][at] for part in found]) for at in found[0][name]}}

    def joined_choice(self, stmt: TopK, found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
        kept = next(i for i, rank in enumerate(stmt.values.ranks) if rank not in free_ranks(stmt.body))
        state: dict[str, Tensor] = {stmt.values.name: {}, stmt.coords.name: {}}
        rows: dict[Coordinates, list[tuple[Any, Any]]] = {}
        for part in found:
            for at, value in part[stmt.values.name].items():
                rows.setdefault((*at[:kept], *at[kept + 1 :]), []).append((value, part[stmt.coords.name][at]))
        for row, pairs in rows.items():
            for j, pair in enumerate(largest(pairs, self.walker.size(stmt.k))):
                at = (*row[:kept], j, *row[kept:])
                state[stmt.values.name][at], state[stmt.coords.name][at] = pair
        return state


def tree(elements: list[int], rng: random.Random) -> Plan:
    """A random tree of merges over blocks of one to three elements."""
    if len(elements) <= 1 or (len(elements) <= 3 and rng.random() < 0.3):
        return elements
    cut = rng.randint(1, len(elements) - 1)
    return ("merge", tree(elements[:cut], rng), tree(elements[cut:], rng))


FIELD_SIZES = {"M": 2, "N": 6, "E": 2, "F": 2}


def field_inputs(cascade: Cascade, seed: int) -> dict[str, Tensor]:
    """Small integers, in the field."""
    rng = random.Random(seed)
    found: dict[str, Tensor] = {}
    for param in cascade.params:
        low, high = (0, FIELD_SIZES["N"]) if param.name in lifting_programs.INTEGERS else (-4, 4)
        points = itertools.product(*(range(FIELD_SIZES[str(size)]) for size in param.shape))
        found[param.name] = {at: rational(rng.randint(low, high)) for at in points}
    return found


def residues(results: Mapping[str, Tensor]) -> dict[str, dict[Coordinates, Any]]:
    """What two runs must agree on."""
    return {
        name: {at: value.residue if isinstance(value, Number) else value for at, value in tensor.items()}
        for name, tensor in results.items()
    }


def agrees_in_the_field(seed: int) -> bool:
    """Checks the fold of a program in streams, tiles and trees; False where the field cannot follow."""
    program, plain, lifted = made(seed)
    given = field_inputs(plain, seed)
    rng, elements = random.Random(seed), list(range(FIELD_SIZES["N"]))
    shuffled = rng.sample(elements, len(elements))
    plans: dict[str, Plan] = {
        "one block": elements,
        "element by element": ("stream", *([n] for n in elements)),
        "tiles": ("stream", elements[:2], elements[2:5], elements[5:]),
        "tree": tree(elements, rng),
        "tree of shuffled elements": tree(shuffled, rng),
    }
    try:
        wanted = residues(Walker(plain, dict(given), FIELD_SIZES).run())
        for how, plan in plans.items():
            found = residues(Walker(lifted, dict(given), FIELD_SIZES, plan).run())
            assert found == wanted, f"seed {seed}, {how}\n{program.text}\n{render(lifted)}"
    except NoMeaning:
        return False
    return True


def test_the_field_is_one_and_exp_turns_sums_into_products() -> None:
    assert (P - 1) % ORDER == 0
    assert pow(BASE, ORDER, P) == 1
    assert all(pow(BASE, ORDER // prime, P) != 1 for prime in PRIMES)
    a, b, minus = rational(Fraction(7, 2)), rational(Fraction(-5, 3)), rational(-1)
    assert exponential(add(a, b)).residue == multiply(exponential(a), exponential(b)).residue
    x, y = add(exponential(a), exponential(b)), add(exponential(b), ONE)
    unlike = exponential(add(b, multiply(minus, logarithm(x))))
    assert unlike.residue == multiply(exponential(b), inverse(x)).residue
    quotient = logarithm(multiply(exponential(a), inverse(y)))
    assert quotient.residue == add(a, multiply(minus, logarithm(y))).residue


def test_the_walker_tells_a_right_fold_from_a_wrong_one() -> None:
    """The fold that is written by hand, in all plans; each of its mutants gives other numbers in some."""
    plans: list[Plan] = [("stream", *([n] for n in range(6))), ("merge", [0, 1], ("merge", [2], [5, 4, 3]))]

    def found(text: str, plan: Plan) -> dict[str, dict[Coordinates, Any]]:
        cascade = parse_cascade(text)
        return residues(Walker(cascade, field_inputs(cascade, 0), FIELD_SIZES, plan).run())

    plain = dataclasses.replace(parse_cascade(test_folds.SINK), schedule=())
    wanted = residues(Walker(plain, field_inputs(plain, 0), FIELD_SIZES).run())
    assert all(found(test_folds.SINK, plan) == wanted for plan in plans)
    for old, new in test_folds.MUTANTS.values():
        assert any(found(test_folds.SINK.replace(old, new), plan) != wanted for plan in plans), new


def test_lifted_cascades_are_exact_in_a_finite_field() -> None:
    followed = [agrees_in_the_field(seed) for seed in range(100)]
    assert sum(followed) >= 90


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(PARTS))
def test_many_lifted_cascades_are_exact_in_a_finite_field(part: int) -> None:
    followed = [agrees_in_the_field(seed) for seed in range(100 + part, 2100, PARTS)]
    assert sum(followed) >= 0.9 * len(followed)


# --- the fewest trips, by brute force --------------------------------------------------------------------------------

FRAMES = 6
DRAWS, DRAWS_ALONE = 2, 6  # of the data; more where each has a single row
ELEMENTS, ROWS, TRAINING = 32, 16, 48
TOLERANCE = 1e-6
Tensors: TypeAlias = Mapping[str, torch.Tensor]


def reduces(stmt: Stmt) -> bool:
    """Whether a statement folds n."""
    if isinstance(stmt, TopK):
        return stmt.rank == "n"
    return isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) and "n" in stmt.expr.ranks


@dataclass
class Search:
    """The trips of a canonical cascade by trial: which reductions can be computed beside what they depend on."""

    cascade: Cascade
    decided: dict[tuple[str, frozenset[str]], bool] = field(default_factory=dict)

    def fewest(self) -> int:
        """The smallest number of groups, one trip each, that reproduces the reference."""
        self.owner = {name: stmt for stmt in self.cascade.body for name in defines(stmt)}
        rows = any("M" in param.shape for param in self.cascade.params)
        self.data = [self.draw(seed) for seed in range(DRAWS if rows else DRAWS_ALONE)]
        results = {result.name for result in self.cascade.results}
        names = [
            defines(stmt)[0]
            for stmt in self.cascade.body
            if reduces(stmt) or ("n" in targets(stmt)[0].ranks and not results.isdisjoint(defines(stmt)))
        ]
        after = {name: self.producers(name) for name in names}
        for groups in range(1, len(names) + 1):
            for place in assignments(names, after, groups):
                if all(self.streams(name, {p for p in after[name] if place[p] == place[name]}) for name in names):
                    return groups
        raise AssertionError("one statement a group needs no frames")

    def draw(self, seed: int) -> tuple[Tensors, Tensors]:
        """Inputs of which every row has elements, and what the reductions are on them."""
        given = lifting_programs.inputs(self.cascade, seed, ELEMENTS, ROWS)
        if "len" in given:
            given["len"] = given["len"].clamp(min=2)
        if "low" in given:
            given["low"] = given["low"].clamp(max=ELEMENTS - 2)
        names = [name for stmt in self.cascade.body if reduces(stmt) for name in defines(stmt)]
        return given, self.compute(names, given)

    def producers(self, name: str) -> set[str]:
        """The reductions that a statement reads, through the maps between."""
        found: set[str] = set()
        todo = list(reads(self.owner[name]))
        while todo:
            stmt = self.owner.get(todo.pop())
            if stmt is not None and reduces(stmt):
                found.add(defines(stmt)[0])
            elif stmt is not None:
                todo += reads(stmt)
        return found

    def streams(self, name: str, beside: set[str]) -> bool:
        """Whether fixed frames of what a statement needs from its own trip say what it is in the true frame."""
        key = name, frozenset(beside)
        if key not in self.decided:
            stmt = self.owner[name]
            self.decided[key] = not beside or (
                reduces(stmt) and all(self.reproduces(stmt, beside, seed) for seed in range(len(self.data)))
            )
        return self.decided[key]

    # --- one reduction -----------------------------------------------------------------------------------------------

    def reproduces(self, stmt: Stmt, beside: set[str], seed: int) -> bool:
        """Whether a reduction is known from what it is in fixed frames, on one draw of data."""
        given, reference = self.data[seed]
        name, generator = defines(stmt)[0], torch.Generator().manual_seed(seed)
        truth = {p: reference[p] for p in sorted(self.producers(name))}
        positive = {p: all(bool((data[p] >= 0).all()) for _, data in self.data) for p in truth}
        frames = [
            truth | {p: other_frame(truth[p], positive[p], generator) for p in sorted(beside)} for _ in range(FRAMES)
        ]
        sums = isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) and stmt.expr.reducer in ("sum", "prod")
        found = (self.interpolated if sums else self.chosen)(stmt, given, truth, frames, seed)
        wanted = reference[name]
        return bool((found - wanted).abs().max() <= TOLERANCE * wanted.abs().max())

    def compute(
        self,
        names: Sequence[str],
        given: Tensors,
        known: Tensors | None = None,
        change: Callable[[Stmt], Stmt] = lambda stmt: stmt,
        fill: float = 0.0,
    ) -> dict[str, torch.Tensor]:
        """What some statements define, the tensors in `known` being parameters; `change` makes others of statements."""
        known = known or {}
        shapes = infer_shapes(self.cascade)
        needed, todo = set(names), list(names)
        while todo:
            stmt = self.owner.get(todo.pop())
            new = [] if stmt is None or not known.keys().isdisjoint(defines(stmt)) else reads(stmt)
            todo += [name for name in new if name not in needed]
            needed.update(new)
        body = tuple(
            change(stmt)
            for stmt in self.cascade.body
            if not needed.isdisjoint(defines(stmt)) and known.keys().isdisjoint(defines(stmt))
        )
        params = [param for param in self.cascade.params if param.name in needed]
        params += [Param(name, DType.F64, shapes.tensors[name]) for name in known if name in needed]
        left = {target.name: target.ranks for stmt in body for target in targets(stmt)}
        results = [Result(name, None, tuple(shapes.ranks[r] for r in left[name]), Const(fill)) for name in names]
        cut = dataclasses.replace(self.cascade, params=tuple(params), results=tuple(results), body=body)
        tensors = {param.name: (given | known)[param.name] for param in params}  # type: ignore[operator]
        return run(cut, tensors, precision=Precision.REFERENCE)

    def interpolated(
        self, stmt: Stmt, given: Tensors, truth: Tensors, frames: Sequence[Tensors], seed: int
    ) -> torch.Tensor:
        """The sum as a combination of the sums in fixed frames, with coefficients that fit other, single elements.

        The logarithm of a product is a sum.
        """
        assert isinstance(stmt, Einsum)
        assert isinstance(stmt.expr, Reduce)
        name, ranks, body = stmt.target.name, stmt.target.ranks, stmt.expr.body

        def single(other: Stmt) -> Stmt:
            """The reduction as the map of each element; no filter."""
            return Einsum(Target(name, (*ranks, "n")), body) if name in defines(other) else unfiltered(other)

        elements = lifting_programs.inputs(self.cascade, 100 + seed, TRAINING, ROWS)
        elements |= {p.name: given[p.name] for p in self.cascade.params if "N" not in p.shape}
        maps = [self.compute([name], elements, frame, single)[name] for frame in (*frames, truth)]
        sums = [self.compute([name], given, frame)[name] for frame in frames]
        if stmt.expr.reducer == "prod":
            maps, sums = [x.log() for x in maps], [x.log() for x in sums]
        kept = 1 if "m" in ranks else 0  # the frames differ from row to row, and so do the coefficients
        matrix = torch.stack(maps, -1).flatten(kept, -2)
        scale = matrix[..., :-1].abs().amax(-2, keepdim=True).clamp(min=1e-300)
        solved = torch.linalg.lstsq(matrix[..., :-1] / scale, matrix[..., -1:], rcond=1e-12, driver="gelsd").solution
        state = torch.stack(sums, -1).reshape(*matrix.shape[:kept], -1, FRAMES)
        found = (state @ (solved / scale.mT)).reshape(sums[0].shape)
        return found.exp() if stmt.expr.reducer == "prod" else found

    def chosen(self, stmt: Stmt, given: Tensors, truth: Tensors, frames: Sequence[Tensors], seed: int) -> torch.Tensor:
        """The extreme among the elements that win in some fixed frame, evaluated in the true one."""
        name, ranks = defines(stmt)[0], targets(stmt)[0].ranks
        if isinstance(stmt, TopK):
            ranks, body, sign, k = tuple(rank for rank in ranks if rank != "j"), stmt.body, 1.0, int(stmt.k)
        else:
            assert isinstance(stmt, Einsum)
            assert isinstance(stmt.expr, Reduce)
            body, sign, k = stmt.expr.body, -1.0 if stmt.expr.reducer == "min" else 1.0, 1

        def single(other: Stmt) -> Stmt:
            return Einsum(Target(name, (*ranks, "n")), body) if name in defines(other) else other

        def values(frame: Tensors) -> torch.Tensor:
            return sign * self.compute([name], given, frame, single, -sign * math.inf)[name]

        winners = torch.cat([values(frame).topk(k).indices for frame in frames], -1)
        true = values(truth)
        best = torch.full_like(true, -torch.inf).scatter(-1, winners, true.gather(-1, winners)).topk(k).values
        best = sign * best.masked_fill(best == -torch.inf, 0.0)
        return best if isinstance(stmt, TopK) else best.squeeze(-1)


def unfiltered(stmt: Stmt) -> Stmt:
    assert isinstance(stmt, (Einsum, TopK))
    return dataclasses.replace(stmt, where=None)


def other_frame(value: torch.Tensor, positive: bool, generator: torch.Generator) -> torch.Tensor:
    """Another value of the kind."""
    drawn = torch.rand((2, *value.shape), generator=generator, dtype=torch.float64)
    scaled = value.double() * 10 ** (drawn[0] - 0.5)
    return scaled if positive else scaled + 4 * (drawn[1] - 0.5)


def check_trips(seed: int) -> tuple[int, int]:
    """Lifting, brute force and the construction of the program give one number of trips."""
    program, plain, lifted = made(seed)
    assert count_passes(plain, "n").count == program.plain
    assert Search(plain).fewest() == program.lifted, f"seed {seed}: the witnesses differ\n{program.text}"
    found = count_passes(lifted, "n").count
    assert found == program.lifted, f"seed {seed}: {found} trips\n{program.text}\n{render(lifted)}"
    return program.plain, program.lifted


@pytest.mark.parametrize("seed", range(40))
def test_lifting_finds_the_fewest_trips(seed: int) -> None:
    check_trips(seed)


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(PARTS))
def test_lifting_finds_the_fewest_trips_for_many_seeds(part: int) -> None:
    counts = {check_trips(seed) for seed in range(40 + part, 540, PARTS)}
    assert {lifted for _, lifted in counts} == {1, 2, 3}, "the programs are too much alike"


# --- in float64 ------------------------------------------------------------------------------------------------------

RECIPES = ("normal", "large", "masked", "empty", "equal", "one")
LENGTHS = {"empty": 0, "one": 1}
BLOCKS = (1, 2, 3, 7)
WAYS = (*((block, 1) for block in BLOCKS), *((2, parts) for parts in range(2, 17)))


def recipe_inputs(cascade: Cascade, recipe: str, seed: int) -> dict[str, torch.Tensor]:
    """The inputs of a recipe; `masked`: the first tiles have no element."""
    n = LENGTHS.get(recipe, 13)
    kind = recipe if recipe in ("large", "equal") else "normal"
    given = lifting_programs.inputs(cascade, seed, n, recipe=kind)
    if recipe == "masked":
        given["low"] = torch.tensor([8, 11, 13])
    return given


def check_streams(seed: int, recipe: str, ways: Sequence[tuple[int, int]]) -> bool:
    """Every block and split of a lifted cascade gives what its plain statements give; False where nothing is lifted.

    A wave of 1e5 times a value says nothing: there is no reference for it.
    """
    program, plain, lifted = made(seed, "n >= low[m]" if recipe == "masked" else None)
    if not any(isinstance(item, Fold) for item in lifted.schedule):
        return False
    if recipe == "large" and not lifting_programs.WAVY.isdisjoint(program.parts):
        return False
    given = recipe_inputs(plain, recipe, seed)
    wanted = reference(plain, given)
    scales = scales_of(plain, wanted, seed)
    if recipe == "empty":  # a trip without an element has nothing to read out: a call runs the plain statements
        found = Compiled(parse_cascade(program.text))(**{param.name: given[param.name] for param in plain.params})
        results = found if isinstance(found, tuple) else (found,)
        compare(dict(zip(wanted, results, strict=True)), wanted, scales, recipe, program.text)
        return True
    for block, parts in ways:
        schedule = (*lifted.schedule, Split("n", parts=parts))
        found = run(dataclasses.replace(lifted, schedule=schedule), given, precision=Precision.REFERENCE, block=block)
        compare(
            found,
            wanted,
            scales,
            recipe,
            f"seed {seed}, {recipe}, block {block}, {parts} parts\n{program.text}\n{render(lifted)}",
        )
    if not program.filtered:
        order = torch.randperm(LENGTHS.get(recipe, 13), generator=torch.Generator().manual_seed(seed))
        moved = {p.name: along_n(given[p.name], p.shape, order) for p in plain.params}
        found = run(lifted, moved, precision=Precision.REFERENCE, block=2)
        again = {r.name: along_n(wanted[r.name], r.shape, order) for r in plain.results}
        values = {name: value for name, value in again.items() if value.is_floating_point()}
        compare(found, values, scales, recipe, f"seed {seed}, {recipe}, shuffled\n{program.text}\n{render(lifted)}")
    return True


def reference(cascade: Cascade, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return run(dataclasses.replace(cascade, schedule=()), given, precision=Precision.REFERENCE)


def along_n(tensor: torch.Tensor, shape: Sequence[int | str], order: torch.Tensor) -> torch.Tensor:
    """The tensor with its elements along n in another order."""
    return tensor.index_select(list(shape).index("N"), order) if "N" in shape else tensor


def scales_of(cascade: Cascade, wanted: Mapping[str, torch.Tensor], seed: int) -> dict[str, float]:
    """The largest magnitude of a result, here or on normal data: what cancels to nothing has the scale of its terms."""
    normal = reference(cascade, recipe_inputs(cascade, "normal", seed))
    finite = {name: [x[x.isfinite()].double().abs() for x in (wanted[name], normal[name])] for name in wanted}
    return {name: max((float(x.max()) for x in both if x.numel()), default=0.0) for name, both in finite.items()}


def compare(
    found: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    scales: Mapping[str, float],
    recipe: str,
    where: str,
) -> None:
    """Equal to 1e-12 of the scale; infinities alike; NaN only where the reference has it; coordinates exactly."""
    for name, value in wanted.items():
        if not value.is_floating_point():  # among weights that underflow to 0, the reference takes any
            assert recipe == "large" or torch.equal(found[name], value), f"{name}: {where}"
            continue
        assert not (found[name].isnan() & ~value.isnan()).any(), f"{name} has a NaN of its own: {where}"
        infinite = value.isinf()
        assert torch.equal(found[name][infinite], value[infinite]), f"{name}: {where}"
        off = (found[name] - value)[value.isfinite()].abs()
        worst = float(off.max()) if off.numel() else 0.0
        assert worst <= 1e-12 * scales[name], f"{name} is off by {worst / (scales[name] or 1):.1e}: {where}"


@pytest.mark.parametrize("recipe", RECIPES)
def test_lifted_cascades_stream_tile_and_split(recipe: str) -> None:
    ways = (*WAYS[: len(BLOCKS)], (2, 3), (2, 16))
    lifted = [check_streams(seed, recipe, ways) for seed in range(24)]
    assert sum(lifted) >= 12


@pytest.mark.campaign
@pytest.mark.parametrize("recipe", RECIPES)
def test_many_lifted_cascades_stream_tile_and_split(recipe: str) -> None:
    lifted = [check_streams(seed, recipe, WAYS) for seed in range(24, 224)]
    assert sum(lifted) >= 110
