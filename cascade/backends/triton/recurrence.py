"""Recurrences one step back: which of them a kernel can hold, and how a tile of steps is one step.

    C[m,n] = C[m,n-1] + X[m,n]                sum       steps compose by the operation itself
    H[t,d] = A[t,d] * H[t-1,d] + X[t,d]       affine    steps are pairs (A, X), composed as maps
    Y[t,d] = tanh(Y[t-1,d] + X[t,d])          singly    nothing composes them: one coordinate at a time

An absent coordinate ends a recurrence: whatever comes behind it is absent. So a test is that of its own coordinate only
where it can fail but once and for all along the rank, as `t < length[b]` does.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from cascade.bounds import conjuncts
from cascade.ir import Apply, Const, Einsum, Expr, Extent, Rank, Read, Reduce, Size, Stmt
from cascade.passes.scan import ONE, affine
from cascade.walk import free_ranks, walk

EXTREMES = ("max", "min")


@dataclass(frozen=True, slots=True)
class Composition:
    """How steps compose: `sum`, `max` or `min` of one element each, or `affine` or `drift` of more.

    An `affine` step takes S to A * S + b, a `drift` to S + (a * S + b): its elements are A or a, and b. A drift has a
    third, which begins as 0: what roundings of sums of b leave over. Else a large b is rounded at each level of a scan.
    """

    kind: str
    elements: tuple[Expr, ...]


def stepped(stmts: Collection[Stmt]) -> list[Einsum]:
    """The recurrences among statements."""
    return [stmt for stmt in stmts if isinstance(stmt, Einsum) and stmt.inits]


def carried(stmt: Einsum) -> Read:
    """What a recurrence reads of itself."""
    init = stmt.inits[0]
    before = Apply("sub", (Rank(init.rank), Const(1)))
    return Read(stmt.target.name, tuple(before if rank == init.rank else Rank(rank) for rank in stmt.target.ranks))


def refusal(stmt: Einsum) -> str | None:
    """Why a recurrence of one statement cannot stand in a kernel; None where it can."""
    rank, name = stmt.inits[0].rank, stmt.target.name
    own = {node for node in walk(stmt.expr) if isinstance(node, Read) and node.tensor == name}
    if own != {carried(stmt)} or [init.at for init in stmt.inits] != [-1]:
        return f"it reads itself elsewhere than one step back along {rank}"
    if any(isinstance(node, Reduce) for node in walk(stmt.expr)):
        return f"it reduces at each step along {rank}"
    if any(isinstance(node, Apply) and node.op == "default" and own & set(walk(node)) for node in walk(stmt.expr)):
        return "it asks whether what it carries is present"
    if any(rank in free_ranks(test) and not ends(test, rank) for test in conjuncts(stmt.where)):
        return f"its filter does not say where along {rank} it ends"
    return None


def composition(stmt: Einsum) -> Composition | None:
    """How the steps of a recurrence compose; None where nothing is known of it."""
    own = carried(stmt)
    if isinstance(stmt.expr, Apply) and stmt.expr.op in EXTREMES:
        free = tuple(arg for arg in stmt.expr.args if own not in walk(arg))
        return Composition(stmt.expr.op, free) if len(free) == 1 and own in stmt.expr.args else None
    found = affine(stmt)
    if found is None:
        return None
    return Composition("sum", (found[1],)) if found[0] == ONE else Composition("affine", found)


def drift(found: Composition) -> Composition | None:
    """Affine steps whose factors are 1 and something as what they add: 1 - a rounds, and all steps the same way."""
    if found.kind != "affine" or not isinstance(found.elements[0], Apply):
        return None
    factor, term = found.elements
    match factor:
        case Apply(op="sub", args=(one, less)) if one == ONE:
            return Composition("drift", (Apply("neg", (less,)), term, Const(0.0)))
        case Apply(op="add", args=(one, more)) if one == ONE:
            return Composition("drift", (more, term, Const(0.0)))
        case _:
            return None


def in_pairs(stmts: Collection[Stmt]) -> bool:
    """Whether some recurrence among statements composes pairs or more, which take twice the registers."""
    return any(found.kind == "affine" for stmt in stepped(stmts) if (found := composition(stmt)) is not None)


def ends(test: Expr, rank: str) -> bool:
    """Whether a test that fails at a coordinate of a rank fails at all later ones."""
    if not isinstance(test, Apply) or test.op not in ("lt", "le", "gt", "ge"):
        return False
    low, high = test.args if test.op in ("lt", "le") else test.args[::-1]
    return _rises(low, rank) and rank not in free_ranks(high)


def _rises(expr: Expr, rank: str) -> bool:
    """Whether an expression is a coordinate of a rank, and what does not depend on it."""
    if expr == Rank(rank):
        return True
    if not isinstance(expr, Apply) or expr.op not in ("add", "sub"):
        return False
    first, second = (rank in free_ranks(arg) for arg in expr.args)
    if not first:
        return expr.op == "add" and _rises(expr.args[1], rank)
    return not second and _rises(expr.args[0], rank)


def is_last(read: Read, stmt: Einsum, size: Size) -> bool:
    """Whether a recurrence is read at the last coordinate of its rank, which has this extent, and plainly else."""
    rank = stmt.inits[0].rank
    last = Const(size - 1) if isinstance(size, int) else Apply("sub", (Extent(size), Const(1)))
    wanted = tuple(last if own == rank else Rank(own) for own in stmt.target.ranks)
    return read == Read(stmt.target.name, wanted)
