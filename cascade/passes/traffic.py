"""What a cascade moves and computes: bytes with and without fusion, operations per point of each iteration space.

    S[m,n] = sum[e] Q[m,e] * K[n,e]      2*E*M*N operations, reads Q and K, writes S
    P[m,n] = exp(S[m,n])                 M*N transcendental ones, reads S, writes P

Unfused, every statement reads each tensor that it mentions once and writes what it defines. Fused, the statements of a
group run as one: a tensor that only the group needs is not moved at all, one that it needs from outside is read once,
one that it makes for others is written once. A recurrence has its own earlier coordinates at hand. Tensors count whole,
also where they are read at a few coordinates.

Operations are those of the expression, for every live point: arithmetic, and one for each point that is folded;
comparisons, choices, casts, filters, constants and the arithmetic of indices are free. Transcendental operations are
counted apart.

Filters count: operations are those of live points (`points.py`), and `assumed` names the statements whose filters were
taken to hold everywhere. Without all sizes the amounts are polynomials in the symbols, as text.

Requires: canonical. It counts tensors that are moved once; what a footprint larger than the memory at hand spills is a
question of the mapping.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cascade.inference import fold, infer_dtypes, infer_shapes
from cascade.ir import Apply, Cascade, DType, Einsum, Expr, Fold, Fuse, Rank, Read, Reduce, Stmt, TopK
from cascade.passes.amounts import Amount, product, total
from cascade.passes.points import LivePoints, body_of
from cascade.walk import defines, reads

TRANSCENDENTAL = frozenset(
    ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "erf", "pow")
)
FREE = frozenset(("default", "or", "and", "not", "eq", "ne", "lt", "le", "gt", "ge", "select"))
"""Comparisons and choices: no arithmetic."""

BYTES = {
    DType.BF16: 2, DType.F16: 2, DType.F32: 4, DType.F64: 8, DType.F8E4M3: 1, DType.F8E5M2: 1, DType.I8: 1,
    DType.I32: 4, DType.I64: 8, DType.BOOL: 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes moved by every statement on its own and by the groups, operations, and where filters were assumed to hold.

    `statements` has the arithmetic and the transcendental operations of each statement, by its first name.
    """

    unfused: Amount
    fused: Amount
    flops: Amount
    transcendental: Amount
    statements: Mapping[str, tuple[Amount, Amount]]
    assumed: tuple[str, ...]


def traffic(
    cascade: Cascade,
    sizes: Mapping[str, int] | None = None,
    groups: Sequence[Collection[str]] | None = None,
    dtype: DType = DType.F32,
) -> Traffic:
    """What the cascade moves and computes; parameters without a type have `dtype`, the groups are the schedule's."""
    given = sizes or {}
    shapes = infer_shapes(cascade)
    types = infer_dtypes(cascade, {param.name: dtype for param in cascade.params})
    moved = {name: product(shape, given).times(BYTES[types[name]]) for name, shape in shapes.tensors.items()}
    points = LivePoints(shapes, given)
    statements = {defines(stmt)[0]: _work(points, stmt) for stmt in cascade.body}
    return Traffic(
        _moved(cascade, (), moved),
        _moved(cascade, scheduled_groups(cascade) if groups is None else groups, moved),
        total(flops for flops, _ in statements.values()),
        total(slow for _, slow in statements.values()),
        statements,
        tuple(points.assumed),
    )


# --- bytes -----------------------------------------------------------------------------------------------------------


def scheduled_groups(cascade: Cascade) -> tuple[frozenset[str], ...]:
    """The outermost groups of the schedule: statements that one `fuse` or one `fold` names together."""
    found: list[frozenset[str]] = []
    for directive in cascade.schedule:
        if isinstance(directive, Fuse):
            found.append(frozenset(directive.statements))
        elif isinstance(directive, Fold):
            found.append(frozenset((*directive.update, *directive.finalize)))
    return tuple(group for group in dict.fromkeys(found) if not any(group < other for other in found))


def _moved(cascade: Cascade, groups: Sequence[Collection[str]], moved: Mapping[str, Amount]) -> Amount:
    """The bytes that cross between memory and the groups, a statement outside of all being a group of its own."""
    home: dict[str, int] = {}
    members: list[list[Stmt]] = [[] for _ in groups]
    for stmt in cascade.body:
        at = next((i for i, group in enumerate(groups) if not set(group).isdisjoint(defines(stmt))), len(members))
        if at == len(members):
            members.append([])
        members[at].append(stmt)
        home.update(dict.fromkeys(defines(stmt), at))
    kept = {result.name for result in cascade.results}
    crossing: list[str] = []
    for at, inside in enumerate(members):
        read = dict.fromkeys(name for stmt in inside for name in reads(stmt) if home.get(name) != at)
        crossing += read
        kept.update(name for name in read if name in home)
    crossing += [name for name in home if name in kept]
    return total(moved[name] for name in crossing)


# --- operations ------------------------------------------------------------------------------------------------------


def _work(points: LivePoints, stmt: Stmt) -> tuple[Amount, Amount]:
    """The arithmetic and the transcendental operations of one statement."""
    live = points.of(stmt)
    flops, slow = operations(body_of(stmt))
    flops += isinstance(stmt, TopK)
    found = [(live.times(flops), live.times(slow))]
    if isinstance(stmt, Einsum):
        for init in stmt.inits:
            first = points.of_init(stmt, init)
            found.append((first.times(operations(init.expr)[0]), first.times(operations(init.expr)[1])))
    return total(flops for flops, _ in found), total(slow for _, slow in found)


def operations(body: Expr) -> tuple[int, int]:
    """The arithmetic and the transcendental operations of an expression at one point; constants are computed before."""

    def combine(node: Expr, args: list[tuple[bool, int, int]]) -> tuple[bool, int, int]:
        if isinstance(node, (Read, Rank)):
            return True, 0, 0  # what stands in an index is an address
        varies = any(arg[0] for arg in args)
        flops, slow = sum(arg[1] for arg in args), sum(arg[2] for arg in args)
        if isinstance(node, Reduce):
            return True, flops + 1, slow
        if not varies or not isinstance(node, Apply) or node.op in FREE:
            return varies, flops, slow
        return (True, flops, slow + 1) if node.op in TRANSCENDENTAL else (True, flops + 1, slow)

    _, flops, slow = fold(body, combine)
    return flops, slow
