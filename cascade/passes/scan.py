"""Recurrences that are affine in what they carry: maps S -> A * S + b, which compose, so that parts can be merged.

    S[t,d] = A[t,d] * S[t-1,d] + X[t,d]      a part of t is the pair (A, b) with S_after = A * S_before + b;
                                             two parts in order give (A'' * A', A'' * b' + b'')

Linear attention, decay and state-space layers are such. The monoid is not commutative: parts are merged in the order of
the rank. (Blelloch 1990, "Prefix sums and their applications".) Linear algebra over the expression finds A and b; they
are tried on samples before they are used. A pass tells of it; a backend composes the elements of a tile by it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
from collections.abc import Iterator

from cascade.ir import Apply, Cascade, Const, Einsum, Expr, Local, Read
from cascade.order import units
from cascade.passes.accumulate import mul
from cascade.passes.lifts import Lifted
from cascade.passes.scalars import Scalar, evaluate
from cascade.text import render_expr, render_stmt
from cascade.walk import children, substitute, walk, with_children

ZERO, ONE = Const(0), Const(1)


def affine_scans(cascade: Cascade) -> Iterator[Lifted]:
    """The recurrences of one statement, one step back, that are affine in what they carry."""
    for unit in units(cascade.body, ()):
        stmt = unit.statements[0]
        if unit.cyclic and len(unit.statements) == 1 and isinstance(stmt, Einsum) and len(stmt.inits) == 1:
            found = affine(stmt)
            if found is not None:
                yield _told(stmt, *found)


def _told(stmt: Einsum, factor: Expr, term: Expr) -> Lifted:
    """An affine recurrence as it is reported."""
    name = stmt.target.name
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


@functools.lru_cache(1024)  # asked again for every choice of tiles
def affine(stmt: Einsum) -> tuple[Expr, Expr] | None:
    """The factor A and the term b of a recurrence S -> A * S + b; None where it is of another form.

    For numbers that are finite the two mean the same; where one is not, A * S + b may be NaN and the recurrence not.
    """
    atoms: dict[Expr, str] = {}
    abstract = dataclasses.replace(stmt, expr=_abstract(stmt.expr, stmt.target.name, atoms))
    found = _parts(abstract.expr, stmt.target.name)
    if found is None or not _holds(abstract, *found):
        return None
    known = {name: expr for expr, name in atoms.items()}
    return substitute(found[0], {}, known), substitute(found[1], {}, known)


def _abstract(expr: Expr, name: str, atoms: dict[Expr, str]) -> Expr:
    """An expression with a letter for each part that does not have what is carried; numbers stay."""
    if isinstance(expr, Const) or (isinstance(expr, Read) and expr.tensor == name):
        return expr
    if any(isinstance(node, Read) and node.tensor == name for node in walk(expr)):
        return with_children(expr, tuple(_abstract(child, name, atoms) for child in children(expr)))
    return Local(atoms.setdefault(expr, f"x{len(atoms)}"))


def _parts(expr: Expr, name: str) -> tuple[Expr, Expr] | None:
    """An expression as a factor of what is carried, and a term."""
    if not any(isinstance(node, Read) and node.tensor == name for node in walk(expr)):
        return ZERO, expr
    if isinstance(expr, Read) and expr.tensor == name:
        return ONE, ZERO
    parts = [_parts(arg, name) for arg in expr.args] if isinstance(expr, Apply) else []
    known = [part for part in parts if part is not None]
    if not isinstance(expr, Apply) or len(known) < len(parts):
        return None
    free = [part[0] == ZERO for part in known]
    match expr.op:
        case "add" | "sub":
            (a, b), (c, d) = known
            return _joined(expr.op, a, c), _joined(expr.op, b, d)
        case "neg":
            (a, b) = known[0]
            return _joined("sub", ZERO, a), _joined("sub", ZERO, b)
        case "mul" if any(free):
            scale, (a, b) = (expr.args[0], known[1]) if free[0] else (expr.args[1], known[0])
            return _scaled(a, scale), _scaled(b, scale)
        case "div" if free[1]:
            (a, b), by = known[0], expr.args[1]
            return Apply("div", (a, by)), ZERO if b == ZERO else Apply("div", (b, by))
        case "select" if free[0]:
            (a, b), (c, d) = known[1:]
            term = ZERO if b == d == ZERO else Apply("select", (expr.args[0], b, d))
            return Apply("select", (expr.args[0], a, c)), term
        case _:
            return None


def _joined(op: str, a: Expr, b: Expr) -> Expr:
    """A sum or a difference, without zeros."""
    if b == ZERO:
        return a
    if a == ZERO:
        return b if op == "add" else Const(-1) if b == ONE else Apply("neg", (b,))
    if op == "add" and isinstance(b, Apply) and b.op == "neg":
        return Apply("sub", (a, b.args[0]))
    return Apply(op, (a, b))


def _scaled(value: Expr, scale: Expr) -> Expr:
    """A product, without zeros and ones."""
    if value == Const(-1):
        return Apply("neg", (scale,))
    return ZERO if value == ZERO else mul(value, scale)


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
