"""Recurrences that are affine in what they carry: maps S -> A * S + b, which compose, so that parts can be merged.

    S[t,d] = A[t,d] * S[t-1,d] + X[t,d]      a part of t is the pair (A, b) with S_after = A * S_before + b;
                                             two parts in order give (A'' * A', A'' * b' + b'')

Linear attention, decay and state-space layers are such. The monoid is not commutative: parts are merged in the order of
the rank. (Blelloch 1990, "Prefix sums and their applications".) This is told, not scheduled: a recurrence stays in one
trip as it is.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Iterator

from cascade.ir import Apply, Cascade, Const, Einsum, Expr, Local, Rank, Read
from cascade.order import units
from cascade.passes.accumulate import added, mul
from cascade.passes.lifts import Lifted
from cascade.passes.memo import remembered
from cascade.passes.scalars import Scalar, evaluate
from cascade.passes.separate import Atoms, Separation, separate
from cascade.text import render_expr, render_stmt
from cascade.walk import substitute, walk


def affine_scans(cascade: Cascade) -> Iterator[Lifted]:
    """The recurrences of one statement, one step back, that are affine in what they carry."""
    for unit in units(cascade.body, ()):
        stmt = unit.statements[0]
        if unit.cyclic and len(unit.statements) == 1 and isinstance(stmt, Einsum) and len(stmt.inits) == 1:
            found = _affine(stmt)
            if found is not None:
                yield found


def _affine(stmt: Einsum) -> Lifted | None:
    """The factor and the term of an affine recurrence."""
    name = stmt.target.name
    atoms = Atoms(_side(name))
    abstract = atoms.abstract(stmt.expr)
    own = {letter for letter, part in atoms.parts.items() if letter.startswith("r")}
    if own != {"r0"} or not isinstance(atoms.parts["r0"], Read) or any(isinstance(n, Read) for n in walk(abstract)):
        return None
    key = ("affine", render_expr(abstract))
    found: Separation = remembered("separation", key, lambda: separate(abstract, atoms.shifts))
    if len(found.families) != 1 or found.families[0].a is not None:
        return None
    factors: list[Expr] = []
    others: list[Expr] = []
    for part in found.families[0].terms:
        value = substitute(part.weight, {}, atoms.parts)
        state = part.factors[0] if len(part.factors) == 1 else None
        scale: Expr = Const(1)
        if isinstance(state, Apply) and state.op == "mul" and isinstance(state.args[0], Const):
            scale, state = state.args
        if state == Local("r0"):
            factors.append(mul(value, scale))
        elif isinstance(state, Const):
            others.append(mul(value, state))
        else:
            return None
    factor, term = (added(terms) if terms else Const(0) for terms in (factors, others))
    if not _holds(stmt, factor, term):
        return None
    return Lifted(
        reduction=name,
        rank=stmt.inits[0].rank,
        kind="affine",
        terms=2,
        producers=(name,),
        state=("A", "b"),
        correction=f"{name}' * A''",
        init=("A = 1", "b = 0"),
        update=(render_stmt(stmt), f"A = {render_expr(factor)}", f"b = {render_expr(term)}"),
        merge=("A = A'' * A'", "b = A'' * b' + b''"),
        finalize=(f"{name} = A * {render_expr(stmt.inits[0].expr)} + b",),
    )


def _holds(stmt: Einsum, factor: Expr, term: Expr) -> bool:
    """Whether steps composed by random trees of merges give what the recurrence gives step by step, on samples."""
    rng = random.Random(3)
    for _ in range(4):
        steps: list[dict[str, float]] = [{} for _ in range(7)]
        start = carried = rng.uniform(-2, 2)
        maps: list[tuple[Scalar, Scalar]] = []
        for step in steps:
            draw = functools.partial(_drawn, step, rng, stmt.target.name)
            maps.append(
                (evaluate(factor, functools.partial(draw, None)), evaluate(term, functools.partial(draw, None)))
            )
            carried = evaluate(stmt.expr, functools.partial(draw, carried))
        while len(maps) > 1:
            at = rng.randrange(len(maps) - 1)
            (a, b), (later_a, later_b) = maps[at : at + 2]
            maps[at : at + 2] = [(later_a * a, later_a * b + later_b)]
        if not math.isclose(maps[0][0] * start + maps[0][1], carried, rel_tol=1e-9, abs_tol=1e-9):
            return False
    return True


def _drawn(step: dict[str, float], rng: random.Random, name: str, carried: Scalar, node: Expr) -> Scalar:
    """A number for a part of one step: what is carried, or the same one whenever it is asked for."""
    if isinstance(node, Read) and node.tensor == name:
        return carried
    return step.setdefault(repr(node), rng.uniform(-1.5, 1.5))


def _side(name: str) -> Callable[[Expr], str]:
    def side(expr: Expr) -> str:
        own = [isinstance(n, Read) and n.tensor == name for n in walk(expr) if isinstance(n, (Read, Rank))]
        if isinstance(expr, Read) and expr.tensor == name:
            return "r"
        others = any(isinstance(n, Read) and n.tensor != name for n in walk(expr))
        return "m" if any(own) and (others or _steps(expr, name)) else "r" if any(own) else "x" if others else ""

    return side


def _steps(expr: Expr, name: str) -> bool:
    """Whether an expression around the carried value computes with coordinates of its own."""
    inside = {id(n) for node in walk(expr) if isinstance(node, Read) and node.tensor == name for n in walk(node)}
    return any(isinstance(n, Rank) and id(n) not in inside for n in walk(expr))
