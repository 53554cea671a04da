"""Exponents in base two: the hardware's exponential is 2^x, so what is only ever exponentiated is kept as x * log2(e).

    R = max[n] S;  P = exp(S - R)    -->    R2 = max[n] S2;  P = exp2(S2 - R2)    with S2 = S * log2(e)

Every tensor that an exponential reads linearly changes its unit, with everything that it is made of linearly; whoever
else reads it multiplies by ln(2). A factor that a definition has anyway takes up log2(e), so the change is free.

Not where a difference of a tensor and what it is made of is needed as well, X - R of an entropy: it cancels, exactly
only in one unit. The exponential multiplies it by log2(e) then, in the place of a second difference.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator, Mapping, Sequence

from cascade.backends.triton.products import factors, product
from cascade.ir import Apply, Const, Einsum, Expr, Fold, FoldInit, FoldMerge, Read, Reduce, Stmt
from cascade.walk import children, defines, reads, walk, with_children

LOG2E, LN2 = 1.0 / math.log(2.0), math.log(2.0)


def in_base_two(
    statements: Sequence[Stmt], fold: Fold | None, stored: Collection[str] = (), stream: str | None = None
) -> tuple[tuple[Stmt, ...], Fold | None, frozenset[str]]:
    """The statements and their fold with exponentials to base two, and the tensors whose unit has changed.

    What is `stored` keeps its unit: others read it. So does a sum along the `stream`: every tile would have a factor.
    """
    own = {name: stmt for stmt in statements if isinstance(stmt, Einsum) for name in defines(stmt)}
    merges = [] if fold is None else [merge.expr for merge in fold.merge]
    exact = frozenset(name for expr in [*(s.expr for s in own.values()), *merges] for name in cancelling(expr, own))
    changed: set[str] = set()
    ordered = {name for stmt in statements if not isinstance(stmt, Einsum) for name in reads(stmt)}  # kept as it is
    todo = [
        name
        for expr in [*(stmt.expr for stmt in own.values()), *merges]
        for node in walk(expr)
        if isinstance(node, Apply) and node.op == "exp"
        for name in linear_reads(node.args[0])
    ]
    while todo:
        name = todo.pop().rstrip("'")
        fixed = name in stored or name in ordered or name in changed or name in exact or name not in own
        if not fixed and not sums_along(own[name], stream) and takes_factors(own[name].expr):
            changed.add(name)
            todo.extend(linear_reads(own[name].expr))
    units = _Units(frozenset(changed), exact)
    after = tuple(units.statement(stmt) for stmt in statements)
    return after, None if fold is None else units.fold(fold), frozenset(changed)


def scaled_by(expr: Expr, factor: float) -> Expr:
    """An expression times a number, which goes into the terms of a sum: there it often meets another one."""
    match expr:
        case Apply(op="add" | "sub"):
            return dataclasses.replace(expr, args=tuple(scaled_by(arg, factor) for arg in expr.args))
        case Apply(op="neg"):
            return scaled_by(expr.args[0], -factor)
        case _:
            return product([*factors(expr), Const(factor)])


def sums_along(stmt: Einsum, rank: str | None) -> bool:
    """Whether a statement is a sum over a rank."""
    return isinstance(stmt.expr, Reduce) and stmt.expr.reducer == "sum" and rank in stmt.expr.ranks


def takes_factors(expr: Expr) -> bool:
    """Whether a factor can go into an expression or stand beside it: most reductions can have neither."""
    return not isinstance(expr, Reduce) or expr.reducer in ("max", "min", "sum")


def linear_reads(expr: Expr) -> Iterator[str]:
    """The tensors that an expression reads in places where a factor can be taken out."""
    match expr:
        case Read():
            yield expr.tensor
        case Apply(op="add" | "sub" | "neg" | "max" | "min"):
            for arg in expr.args:
                yield from linear_reads(arg)
        case Apply(op="select"):
            yield from linear_reads(expr.args[1])
            yield from linear_reads(expr.args[2])
        case Reduce(reducer="max" | "min"):
            yield from linear_reads(expr.body)
        case _:
            return


def cancelling(expr: Expr, own: Mapping[str, Einsum]) -> Iterator[str]:
    """The tensors whose differences are needed outside exponentials: both sides of one are made of the same."""
    if isinstance(expr, Apply) and expr.op == "exp":
        return
    if isinstance(expr, Apply) and expr.op in ("add", "sub"):
        left, right = (made_of(arg, own) for arg in expr.args)
        if left & right:
            yield from (left | right) & own.keys()
    for child in children(expr):
        yield from cancelling(child, own)


def made_of(expr: Expr, own: Mapping[str, Einsum]) -> set[str]:
    """The tensors whose size an expression has: through sums, products and extremes, definitions included."""
    found: set[str] = set()
    todo = [expr]
    while todo:
        match todo.pop():
            case Read(tensor=tensor):
                name = tensor.rstrip("'")
                if name not in found and name in own:
                    todo.append(own[name].expr)
                found.add(name)
            case Apply(op="add" | "sub" | "neg" | "max" | "min" | "mul" | "div", args=args):
                todo.extend(args)
            case Apply(op="select", args=args):
                todo.extend(args[1:])
            case Reduce(reducer="max" | "min", body=body):
                todo.append(body)
            case _:
                pass
    return found


@dataclasses.dataclass(frozen=True, slots=True)
class _Units:
    """The tensors whose values are exponents to base two, and those of which differences must be exact."""

    changed: frozenset[str]
    exact: frozenset[str]

    def has(self, name: str) -> bool:
        return name.rstrip("'") in self.changed

    def statement(self, stmt: Stmt) -> Stmt:
        if not isinstance(stmt, Einsum):
            return stmt
        expr = self.scaled(stmt.expr) if self.has(stmt.target.name) else self.natural(stmt.expr)
        inits = tuple(dataclasses.replace(init, expr=self.natural(init.expr)) for init in stmt.inits)
        return dataclasses.replace(stmt, expr=expr, inits=inits)

    def fold(self, fold: Fold) -> Fold:
        """The inits and merges in the new units."""

        def part(item: FoldInit | FoldMerge) -> Expr | None:
            if item.expr is None:
                return None
            return self.scaled(item.expr) if self.has(item.target.name) else self.natural(item.expr)

        inits = tuple(dataclasses.replace(init, expr=part(init)) for init in fold.init)
        merges = tuple(dataclasses.replace(merge, expr=part(merge) or merge.expr) for merge in fold.merge)
        return dataclasses.replace(fold, init=inits, merge=merges)

    def natural(self, expr: Expr) -> Expr:
        """An expression that gives what it gave before."""
        match expr:
            case Read() if self.has(expr.tensor):
                return Apply("mul", (expr, Const(LN2)))
            case Apply(op="exp"):
                return Apply("exp2", (self.scaled(expr.args[0]),))
            case Apply(op="eq" | "ne") if any(_infinite(arg) for arg in expr.args):
                return expr  # an infinity is one in every unit
            case _:
                return with_children(expr, tuple(map(self.natural, children(expr))))

    def scaled(self, expr: Expr) -> Expr:
        """An expression times log2(e)."""
        match expr:
            case Read() if self.has(expr.tensor):
                return expr
            case Const() if expr.value == 0 or _infinite(expr):
                return expr
            case Apply(op="add" | "sub" | "neg" | "max" | "min") if self.exact.isdisjoint(linear_reads(expr)):
                return dataclasses.replace(expr, args=tuple(map(self.scaled, expr.args)))
            case Apply(op="select"):
                return dataclasses.replace(
                    expr, args=(self.natural(expr.args[0]), self.scaled(expr.args[1]), self.scaled(expr.args[2]))
                )
            case Reduce(reducer="max" | "min" | "sum"):
                return dataclasses.replace(expr, body=self.scaled(expr.body))
            case _:
                return product([*factors(self.natural(expr)), Const(LOG2E)])


def _infinite(expr: Expr) -> bool:
    return isinstance(expr, Const) and isinstance(expr.value, float) and math.isinf(expr.value)
