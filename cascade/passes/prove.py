"""Every fold is run before it is used: on scalars, element by element, in parts and by random trees of merges.

A second interpreter of folds, dumber than the first: one number for every tensor, one coordinate for every rank but
that of the trip. It finds what algebra on paper forgets: a part without elements, an element of -inf, a frame that
grows, elements of 1e5. What it compares with is the same fold given all elements at once, so that nothing is ever
moved.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cascade.ir import Apply, Cascade, Const, Einsum, Expr, Extent, Fold, Rank, Read, Reduce, Stmt, TopK
from cascade.passes.scalars import Scalar, evaluate
from cascade.walk import defines, walk

RECIPES = ("normal", "rising", "falling", "large", "equal", "one", "absent", "nothing", "infinite")
BREAKS = {"one": "identity", "absent": "identity", "nothing": "identity", "infinite": "invertible", "large": "bounded"}
ELEMENTS = 6
TOP = 3  # values that a top-k keeps here
CLOSE = 1e-9
BOUND = 1e6
State = dict[str, Scalar]
Element = dict[str, Scalar]


@dataclass(frozen=True, slots=True)
class Proof:
    """Nothing where the fold holds; else the condition that it breaks, by which of its states, and why.

    It speaks of a state by its number: equal folds under other names have equal proofs.
    """

    item: str = ""
    reason: str = ""  # `{state}` stands for the name
    state: int = -1  # -1 for all of them


def prove(cascade: Cascade, fold: Fold) -> Proof:
    """Runs the fold on samples: normal ones, large, equal, absent and infinite ones, and one element alone."""
    run = _Run(cascade, fold)
    rng = random.Random(11)
    failures: list[Proof] = []
    for recipe in RECIPES:
        for _ in range(2):
            found = run.failure(recipe, run.sample(recipe, rng), rng)
            failures += [] if found is None else [found]
    growing = (found for found in failures if found.item == "contracting")  # the reason behind what is unbounded
    return next(growing, failures[0] if failures else Proof())


class _Run:
    """A fold as a program on scalars."""

    def __init__(self, cascade: Cascade, fold: Fold) -> None:
        owner: dict[str, Stmt] = {name: stmt for stmt in cascade.body for name in defines(stmt)}
        self.fold = fold
        self.members = list(dict.fromkeys(owner[name] for name in fold.update))
        self.own = {name: stmt for stmt in self.members for name in defines(stmt)}
        self.merges = {merge.target.name: merge.expr for merge in fold.merge}
        self.inits = {init.target.name: init.expr for init in fold.init if init.expr is not None}
        self.corrections = {
            name: [n for n in walk(expr) if isinstance(n, Apply) and n.op == "exp"]
            for name, expr in self.merges.items()
        }
        self.fixed: dict[str, Scalar] = {}
        self.outside: dict[Read, tuple[bool, str]] = {}

    # --- samples

    def sample(self, recipe: str, rng: random.Random) -> list[Element]:
        """Elements: a number for every read of a tensor outside of the trip; none of them where it is absent."""
        atoms = sorted({repr(read) for read in self._atoms()})
        self.fixed = {atom: rng.uniform(0.5, 2.0) for atom in atoms}
        count = 1 if recipe == "one" else ELEMENTS
        elements: list[Element] = []
        for number in range(count):
            shift = {"rising": 3.0 * number, "falling": -3.0 * number}.get(recipe, 0.0)
            scale = 1e5 if recipe == "large" else 1.0
            elements.append({atom: scale * rng.gauss(0, 1) + shift for atom in atoms})
        if recipe == "equal":
            elements = [dict(elements[0]) for _ in elements]
        if recipe == "absent":
            elements[:3] = [{} for _ in range(3)]
        if recipe == "nothing":
            elements = [{} for _ in elements]
        if recipe == "infinite":
            elements[:2] = [dict.fromkeys(atoms, -math.inf) for _ in range(2)]
        return elements

    def _atoms(self) -> Iterator[Read]:
        for stmt in self.members:
            exprs = (stmt.body,) if isinstance(stmt, TopK) else (stmt.expr,) if isinstance(stmt, Einsum) else ()
            yield from (n for e in exprs for n in walk(e) if isinstance(n, Read) and n.tensor not in self.own)
        for expr in (*self.merges.values(), *self.inits.values()):
            for node in walk(expr):
                if isinstance(node, Read) and node.tensor.rstrip("'") not in self.own:
                    yield node

    # --- running

    def value(self, expr: Expr, element: Element | None, state: State, part: State | None = None) -> Scalar:
        """An expression at one element, for a state; primed reads are those of `part`."""

        def leaf(node: Expr) -> Scalar:
            match node:
                case Read() if node.tensor.endswith("'"):
                    return (part or {}).get(node.tensor[:-1])
                case Read() if node.tensor in self.own:
                    stmt = self.own[node.tensor]
                    if self._along(stmt):
                        assert isinstance(stmt, Einsum)
                        return self.value(stmt.expr, element, state)
                    return state.get(node.tensor)
                case Read():
                    moving, atom = self._outside(node)
                    return (element or {}).get(atom) if moving else self.fixed[atom]
                case Rank():
                    return 0.0 if element else None
                case Extent():
                    return float(ELEMENTS)
                case Reduce():
                    return self.value(node.body, element, state)
                case _:
                    return None

        return evaluate(expr, leaf)

    def _outside(self, read: Read) -> tuple[bool, str]:
        """Of a read of a tensor outside of the trip: whether it moves along the rank, and its name in a sample."""
        if read not in self.outside:
            moving = any(isinstance(i, Rank) and i.name == self.fold.rank for e in read.index for i in walk(e))
            self.outside[read] = moving, repr(read)
        return self.outside[read]

    def _along(self, stmt: Stmt) -> bool:
        return isinstance(stmt, Einsum) and self.fold.rank in stmt.target.ranks

    def step(self, parts: Sequence[State], block: Sequence[Element]) -> State:
        """One state of the states of some parts and of a block of elements."""
        state: State = {}
        for stmt in self.members:
            name = defines(stmt)[0]
            if self._along(stmt):
                continue
            if isinstance(stmt, Einsum) and not isinstance(stmt.expr, Reduce) and name not in self.merges:
                state[name] = self.value(stmt.expr, None, state)
                continue
            found = [part[name] for part in parts if part.get(name) is not None]
            if isinstance(stmt, Einsum):
                found = [self.value(self.merges[name], None, state, part) for part in parts if name in self.merges]
            state[name] = self.folded(stmt, [x for x in found if x is not None], block, state)
        return state

    def first(self) -> State:
        """The state before the first element: nothing, but for virtual elements."""
        state: State = {}
        for stmt in self.members if self.inits else ():
            name = defines(stmt)[0]
            if name in self.inits:
                state[name] = self.value(self.inits[name], None, state)
            elif isinstance(stmt, Einsum) and not self._along(stmt) and not isinstance(stmt.expr, Reduce):
                state[name] = self.value(stmt.expr, None, state)
        return state

    def folded(self, stmt: Stmt, older: list[Scalar], block: Sequence[Element], state: State) -> Scalar:
        """A reduction of a block, and of what older states count for."""
        if isinstance(stmt, Einsum) and isinstance(stmt.expr, Apply):  # a state that joins a reduction of the block
            inner = next(n.tensor for n in walk(stmt.expr) if isinstance(n, Read) and n.tensor in self.own)
            given = [x for x in (*older, state.get(inner)) if x is not None]
            return _joined(stmt.expr.op, given) if given else None
        body = stmt.body if isinstance(stmt, TopK) else stmt.expr.body  # type: ignore[union-attr]
        new = [x for x in (self.value(body, e, state) for e in block if e) if x is not None]
        if isinstance(stmt, TopK):
            return tuple(sorted([x for part in older for x in part] + new, reverse=True)[:TOP])
        return reduced(stmt.expr.reducer, older, new)  # type: ignore[union-attr]

    def failure(self, recipe: str, elements: list[Element], rng: random.Random) -> Proof | None:
        """What goes wrong on these elements."""
        first = self.first()
        whole = self.step([first] if first else [], elements)
        state: State = first
        for element in elements:
            before, state = state, self.step([state] if state else [], [element])
            if found := self.unbounded(recipe, before, state, element):
                return found
        leaves = [self.step([first] if first and not number else [], [e]) for number, e in enumerate(elements)]
        trees = [state, self.tree(leaves, rng), self.tree(self.tiles(first, elements, rng), rng)]
        for found_state in trees:
            for name in self.fold.state:
                if recipe == "large" and self.is_product(name):  # overflows in any order, and in each otherwise
                    continue
                if not close(found_state.get(name), whole.get(name), self.scale(name, elements, whole)):
                    values = f"{found_state.get(name)} in parts, {whole.get(name)} at once"
                    reason = f"on {recipe} elements '{{state}}' is {values}"
                    return Proof(BREAKS.get(recipe, "proof"), reason, self.fold.state.index(name))
        return None

    def unbounded(self, recipe: str, before: State, state: State, element: Element) -> Proof | None:
        """Conditions `bounded` and `contracting` at one step."""
        for name, factors in self.corrections.items():
            for factor in factors:
                found = self.value(factor, None, state, before)
                if found is not None and found > 1 + CLOSE:
                    reason = f"an older '{{state}}' is multiplied with {found:.3g}: it grows as elements come"
                    return Proof("contracting", reason, self.fold.state.index(name))
        weights = [s for s in self.members if self._along(s) and isinstance(s, Einsum) and _is_exp(s.expr)]
        for stmt in weights:
            assert isinstance(stmt, Einsum)
            found = self.value(stmt.expr, element, state) if element else None
            if found is not None and found > BOUND:
                return Proof("bounded", f"an element that the frame has seen is {found:.3g} in it")
        return None

    def is_product(self, name: str) -> bool:
        """Whether a state is a product."""
        stmt = self.own[name]
        return isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) and stmt.expr.reducer == "prod"

    def tree(self, states: list[State], rng: random.Random) -> State:
        """Some states merged two by two, neighbours first, in a random tree."""
        while len(states) > 1:
            at = rng.randrange(len(states) - 1)
            states[at : at + 2] = [self.step(states[at : at + 2], [])]
        return states[0]

    def tiles(self, first: State, elements: list[Element], rng: random.Random) -> list[State]:
        """The states of two consecutive parts; where elements are few or absent, with an empty part between them."""
        cut = rng.randrange(1, len(elements)) if len(elements) > 1 else 0
        empty = [] if elements[0] and len(elements) > 1 else [self.step([], [])]
        return [self.step([first] if first else [], elements[:cut]), *empty, self.step([], elements[cut:])]

    def scale(self, name: str, elements: list[Element], whole: State) -> float:
        """The size of what was added up: an error is measured against it."""
        stmt = self.own[name]
        if not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce):
            return 1.0
        values = [self.value(stmt.expr.body, e, whole) for e in elements if e]
        given = [*values, whole.get(name)]
        return float(1.0 + sum(abs(x) for x in given if x is not None and math.isfinite(x)))


def _is_exp(expr: Expr) -> bool:
    return isinstance(expr, Apply) and expr.op == "exp"


def reduced(reducer: str, older: list[Scalar], new: list[Scalar]) -> Scalar:
    """A fold of contributions; None for nothing. What is chosen is told by its value, not by its coordinate."""
    if reducer == "count":
        return sum(older) + len(new) if older or new else None
    given = older + new
    if not given:
        return None
    if any(isinstance(x, float) and math.isnan(x) for x in given):
        return math.nan
    if reducer == "sum":
        return math.fsum(given) if all(math.isfinite(x) for x in given) else sum(given)
    return FOLDS[reducer](given)


FOLDS: Mapping[str, Callable[[list[Scalar]], Scalar]] = {
    "max": max, "min": min, "argmax": max, "argmin": min, "prod": math.prod, "any": any, "all": all,
}  # fmt: skip


def _joined(op: str, values: list[Scalar]) -> Scalar:
    return functools.reduce(lambda a, b: evaluate(Apply(op, (Const(a), Const(b))), lambda _: None), values)


def close(found: Scalar, wanted: Scalar, scale: float) -> bool:
    """Whether two values agree as closely as a change of order explains; NaN only where it is wanted."""
    if found is None or wanted is None or isinstance(found, tuple):
        return bool(found == wanted) or (found is None and wanted is None)
    if not math.isfinite(wanted):
        return not math.isnan(found) or math.isnan(wanted)
    return math.isfinite(found) and abs(found - wanted) <= CLOSE * scale
