"""Lifts in words: the lines of a report, names that a reader knows, and folds as text that memo keys are made of."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping

from cascade.ir import Cascade, Einsum, Expr, Fold, Read, Reduce, Target
from cascade.passes.lifts import Lifted, Lifting
from cascade.passes.trips import operand, renamed
from cascade.text import render_expr
from cascade.walk import children, defines, with_children


def render_fold(cascade: Cascade, fold: Fold) -> str:
    """The statements and merges of a fold, the names in it replaced by numbers: equal folds have equal text."""
    numbers: dict[str, str] = {}

    def number(name: str) -> str:
        base = name.rstrip("'")
        return numbers.setdefault(base, f"t{len(numbers)}") + name[len(base) :]

    def plain(expr: Expr) -> Expr:
        expr = with_children(expr, tuple(map(plain, children(expr))))
        return dataclasses.replace(expr, tensor=number(expr.tensor)) if isinstance(expr, Read) else expr

    lines = []
    for stmt in cascade.body:
        if set(defines(stmt)) & set(fold.update):
            exprs = [render_expr(plain(e)) for e in (operand(stmt), getattr(stmt, "expr", None)) if e is not None][:1]
            reducer = (
                stmt.expr.reducer if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else type(stmt).__name__
            )
            lines.append(f"{[number(name) for name in defines(stmt)]} {reducer} {exprs} {getattr(stmt, 'where', None)}")
    lines += [f"{number(merge.target.name)} {render_expr(plain(merge.expr))}" for merge in fold.merge]
    lines += [f"{number(init.target.name)} {init.expr and render_expr(plain(init.expr))}" for init in fold.init]
    return "\n".join([fold.rank, *map(number, fold.state), *lines])


def told(item: Lifted, fold: Fold, joined: Mapping[str, str]) -> Lifted:
    """What is told of a lift, where states of its fold gave way to such with virtual elements."""
    if not joined:
        return item
    state = tuple(joined.get(name, name) for name in item.state)
    inits = {i.target.name: i for i in fold.init}
    merges = {m.target.name: m for m in fold.merge}
    left = {name: render_target(inits[name].target) for name in state}
    begin = {name: "empty" if (e := inits[name].expr) is None else render_expr(e) for name in state}
    return dataclasses.replace(
        item,
        state=state,
        init=tuple(f"{left[name]} = {begin[name]}" for name in state),
        merge=tuple(f"{left[name]} = {render_expr(merges[name].expr)}" for name in state),
    )


def render_target(target: Target) -> str:
    """A left side."""
    return f"{target.name}[{','.join(target.ranks)}]" if target.ranks else target.name


def with_names(found: Lifting, renamed_: Mapping[str, str]) -> Lifting:
    """The same with tensors renamed."""
    if not renamed_:
        return found

    def name(old: str) -> str:
        return renamed_.get(old, old)

    def expr(old: Expr) -> Expr:
        return renamed_reads(old, {**renamed_, **{f"{a}'": f"{b}'" for a, b in renamed_.items()}})

    def fold(old: Fold) -> Fold:
        merges = tuple(dataclasses.replace(m, expr=expr(m.expr)) for m in old.merge)
        inits = tuple(dataclasses.replace(i, expr=None if i.expr is None else expr(i.expr)) for i in old.init)
        return dataclasses.replace(old, update=tuple(map(name, old.update)), merge=merges, init=inits)

    cascade = found.cascade
    body = tuple(renamed(stmt, renamed_) for stmt in cascade.body)
    schedule = tuple(fold(item) if isinstance(item, Fold) else item for item in cascade.schedule)
    pattern = re.compile(r"\b(" + "|".join(map(re.escape, renamed_)) + r")\b")

    def text(lines: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(pattern.sub(lambda m: renamed_[m.group(0)], line) for line in lines)

    lifted = tuple(
        dataclasses.replace(item, update=text(item.update), merge=text(item.merge), finalize=text(item.finalize))
        for item in found.lifted
    )
    return Lifting(dataclasses.replace(cascade, body=body, schedule=schedule), lifted, found.blocked)


def renamed_reads(expr: Expr, names: dict[str, str]) -> Expr:
    if isinstance(expr, Read):
        return dataclasses.replace(expr, tensor=names.get(expr.tensor, expr.tensor))
    return with_children(expr, tuple(renamed_reads(child, names) for child in children(expr)))


def short(expr: Expr) -> str:
    """An expression without the ranks of its reads."""

    def bare(e: Expr) -> Expr:
        if isinstance(e, Read):
            return Read(e.tensor, ())
        return with_children(e, tuple(bare(child) for child in children(e)))

    return render_expr(bare(expr))
