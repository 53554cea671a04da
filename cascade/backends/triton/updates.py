"""Results that take the memory of a parameter, of which only what differs is written.

    C[b,g,n,e] = select(n == len[b], R[b,g,e], K[b,g,n,e])   with C in the place of K
    -->  C[b,g,len[b],e] = R[b,g,e]   where len[b] is a coordinate of n

What is written has no rank that the test tells, so it is a kernel over the others, however long that rank is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from cascade.bounds import conjuncts
from cascade.inference import infer_shapes
from cascade.ir import Apply, Cascade, Const, Einsum, Expr, Extent, Rank, Read, Target
from cascade.text import render_expr, render_stmt
from cascade.walk import expressions, free_ranks, substitute, walk


@dataclass(frozen=True, slots=True)
class Update:
    """What is written of a result, and where.

    `stmt` defines the result over the ranks that are left, where its coordinates lie inside the parameter `of`; `place`
    are these coordinates, one a dimension.
    """

    of: str
    stmt: Einsum
    place: tuple[Expr, ...]

    @property
    def text(self) -> str:
        """The statement with the coordinates that it writes."""
        _, equals, rest = render_stmt(self.stmt).partition(" = ")
        return f"{self.stmt.target.name}[{','.join(map(render_expr, self.place))}]{equals}{rest}"


def update_of(cascade: Cascade, result: str, param: str) -> Update | str:
    """How a result updates a parameter; a string says why it does not, and is computed as a whole."""
    reads = Counter(n.tensor for s in cascade.body for e in expressions(s) for n in walk(e) if isinstance(n, Read))
    stmt = next((s for s in cascade.body if isinstance(s, Einsum) and s.target.name == result), None)
    if stmt is None or stmt.where is not None or stmt.inits:
        return f"{result} is not {param} with other values where a test says so"
    same = Read(param, tuple(map(Rank, stmt.target.ranks)))
    if not isinstance(stmt.expr, Apply) or stmt.expr.op != "select" or stmt.expr.args[2] != same:
        return f"{result} is not {param} with other values where a test says so"
    if reads[param] > 1:
        return f"{param} is read elsewhere, where its old values are wanted"
    test, new, _ = stmt.expr.args
    told: dict[str, Expr] = {}
    for part in conjuncts(test):
        found = _told(part, [rank for rank in stmt.target.ranks if rank not in told])
        if found is None or not set(free_ranks(found[1])).isdisjoint({*told, found[0]}):
            return f"which coordinates of {result} are new is not told by equations"
        told[found[0]] = found[1]
    if any(not set(free_ranks(expr)).isdisjoint(told) for expr in told.values()):
        return f"which coordinates of {result} are new is not told by equations"
    return _written(cascade, stmt, param, told, substitute(new, told))


def _told(test: Expr, ranks: list[str]) -> tuple[str, Expr] | None:
    """The rank of which a test tells the coordinate, and which it is."""
    if not isinstance(test, Apply) or test.op != "eq":
        return None
    for one, other in (test.args, test.args[::-1]):
        if isinstance(one, Rank) and one.name in ranks:
            return one.name, other
    return None


def _written(cascade: Cascade, stmt: Einsum, param: str, told: dict[str, Expr], new: Expr) -> Update:
    sizes = infer_shapes(cascade).ranks
    inside: list[Expr] = []
    for rank, expr in told.items():
        size = sizes[rank]
        extent = Const(size) if isinstance(size, int) else Extent(size)
        inside += [Apply("ge", (expr, Const(0))), Apply("lt", (expr, extent))]
    where = inside[0]
    for test in inside[1:]:
        where = Apply("and", (where, test))
    target = Target(stmt.target.name, tuple(rank for rank in stmt.target.ranks if rank not in told))
    place = tuple(told.get(rank, Rank(rank)) for rank in stmt.target.ranks)
    return Update(param, Einsum(target, new, where, span=stmt.span), place)
