"""From the values of a traced program to statements, with serial numbers in place of names; `naming.py` gives those.

A value that is no statement is written out where it is used, with its free ranks replaced by what it is read at.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from cascade import ir
from cascade.errors import Span
from cascade.frontend.forms import (
    Applied, At, Casting, Choice, Chosen, Element, Filtered, Fold, Invocation, Literal, Loop, Ordered, Pointwise,
    Previous, Scan, SizeOf,
)  # fmt: skip
from cascade.frontend.notation import Operand, RankVariable, Tensor, Value, copy_axis
from cascade.frontend.program import Program
from cascade.walk import walk

Env: TypeAlias = Mapping[int, ir.Expr]  # what stands for the free ranks of a value that is read at other coordinates


def symbol(thing: Value | RankVariable | Tensor | Invocation) -> str:
    """What stands for the name of a thing until it has one."""
    return f"%{thing.place.key if isinstance(thing, Invocation) else thing.key}"


@dataclass(slots=True, eq=False)
class Emitter:
    """The statements of a program, with serial numbers for names."""

    program: Program
    ranks: dict[str, RankVariable] = field(default_factory=dict)
    equal: list[tuple[str, str]] = field(default_factory=list)  # ranks of one extent that no statement shows to be so

    def statements(self) -> list[ir.Stmt]:
        """Every statement, in the order in which the user's function made them."""
        made: list[tuple[int, ir.Stmt]] = [(call.place.key, self._call(call)) for call in self.program.calls]
        choices: dict[int, Choice] = {}
        for value in self.program.values:
            if value.key not in self.program.statements:
                continue
            if isinstance(value.form, Chosen):
                choices[value.form.choice.parts[0].key] = value.form.choice
            else:
                made.append((value.key, self._einsum(value)))
        made += [(key, self._topk(choice)) for key, choice in choices.items()]
        return [stmt for _, stmt in sorted(made, key=lambda pair: pair[0])]

    def _target(self, value: Value) -> ir.Target:
        return ir.Target(symbol(value), tuple(map(self._rank, self.program.order(value))), span=value.span)

    def _rank(self, rank: RankVariable) -> str:
        self.ranks[symbol(rank)] = rank
        return symbol(rank)

    def _einsum(self, value: Value) -> ir.Einsum:
        target = self._target(value)
        match value.form:
            case Filtered():
                body = self.expr(value.operands[0], {}, value.span)
                where = self.expr(value.operands[1], {}, value.span, inside=True)
                return ir.Einsum(target, body, where, span=value.span)
            case Scan(loop=loop, inits=count, filtered=filtered):
                body, *starts = (self.expr(operand, {}, value.span) for operand in value.operands[: 1 + count])
                rank = self._rank(loop.along)
                inits = tuple(
                    ir.Init(rank, -1 - i, start, span=start.span or value.span) for i, start in enumerate(starts)
                )
                where_ = self.expr(value.operands[-1], {}, value.span, inside=True) if filtered else None
                return ir.Einsum(target, body, where_, inits, span=value.span)
            case _:
                return ir.Einsum(target, self._form(value, {}, False), span=value.span)

    def _topk(self, choice: Choice) -> ir.TopK:
        value = choice.parts[0]
        body = self.expr(value.operands[0], {}, value.span)
        where = self.expr(value.operands[1], {}, value.span, inside=True) if len(value.operands) > 1 else None
        k = choice.k if isinstance(choice.k, int) else self._extent(choice.k, {})
        values, coords = (self._target(part) for part in choice.parts)
        return ir.TopK(values, coords, self._rank(choice.along), k, body, where, span=value.span)

    def _call(self, call: Invocation) -> ir.Call:
        args = tuple(symbol(self.program.tensor(arg)) for arg in call.args)
        return ir.Call(tuple(map(symbol, call.results)), call.callee.name, args, span=call.place.span)

    def expr(self, operand: Operand, env: Env, at: Span | None, inside: bool = False) -> ir.Expr:
        """An operand as an expression, with `env` for its free ranks; `at` is the place that uses it."""
        operand = self.program.resolve(operand)
        if isinstance(operand, RankVariable):
            return env.get(operand.key) or ir.Rank(self._rank(operand), span=at or operand.span)
        if self.program.inline(operand, inside):
            return self._form(operand, env, inside)
        index = tuple(self.expr(rank, env, at) for rank in self.program.order(operand))
        return ir.Read(symbol(operand), index, span=at or operand.span)

    def _form(self, value: Value, env: Env, inside: bool) -> ir.Expr:
        """A value written out."""
        span = value.span
        match value.form:
            case Literal(value=number):
                return ir.Const(number, span=span)
            case SizeOf() as size:
                return ir.Extent(self._extent(size, env), span=span)
            case Element(tensor=tensor):
                return ir.Read(symbol(tensor), self._all(value, env, True), span=span)
            case Previous(loop=loop):
                return self._previous(value, loop, env)
            case At(ranks=old):
                return self._at(value, old, env, inside)
            case Ordered():
                return self.expr(value.operands[0], env, span, inside)
            case Pointwise(op=op):
                return ir.Apply(op, self._all(value, env, inside), span=span)
            case Casting(dtype=dtype):
                return ir.Cast(dtype, self.expr(value.operands[0], env, span, inside), span=span)
            case Fold(reducer=reducer, along=along):
                inner, bound = self._bind(along, env)
                return ir.Reduce(reducer, bound, self.expr(value.operands[0], inner, span), span=span)
            case Applied(function=function, along=along):
                return self._use(value, function, along, env)
            case Filtered() | Chosen() | Scan():
                raise AssertionError("a statement of its own")
            case _:
                assert_never(value.form)

    def _all(self, value: Value, env: Env, inside: bool) -> tuple[ir.Expr, ...]:
        return tuple(self.expr(operand, env, value.span, inside) for operand in value.operands)

    def _extent(self, size: SizeOf, env: Env) -> str:
        if size.tensor is not None:
            return position(symbol(size.tensor), size.position)
        assert size.rank is not None
        here = env.get(size.rank.key)
        return here.name if isinstance(here, ir.Rank) else self._rank(size.rank)

    def _previous(self, value: Value, loop: Loop, env: Env) -> ir.Read:
        assert loop.value is not None and loop.order is not None
        given = dict(zip((rank.key for rank in loop.order), value.operands, strict=False))
        index = []
        for rank in self.program.order(loop.value):
            here = self.expr(given.get(rank.key, rank), env, value.span, True)
            back = not value.operands and rank.key == loop.along.key
            index.append(ir.Apply("sub", (here, ir.Const(1)), span=value.span) if back else here)
        return ir.Read(symbol(loop.value), tuple(index), span=value.span)

    def _at(self, value: Value, old: Sequence[RankVariable], env: Env, inside: bool) -> ir.Expr:
        """A value read at other coordinates: its statement there, or the value itself with its ranks replaced."""
        source, *index = value.operands
        there = {rank.key: self.expr(item, env, value.span, True) for rank, item in zip(old, index, strict=True)}
        for rank in old:
            here = there[rank.key]
            if isinstance(here, ir.Rank):
                self.equal.append((self._rank(rank), here.name))
        return self.expr(source, there, value.span, inside)

    def _bind(self, along: Sequence[RankVariable], env: Env) -> tuple[Env, tuple[str, ...]]:
        """The ranks that a reduction binds, others where its value is read at coordinates that mention them.

        They stay apart from the ranks that the value is read at, even where those stand for the same ones outside: a
        filter on the latter does not reach into the reduction. Names may fall together later, see `naming.py`.
        """
        inner, bound = dict(env), []
        for rank in along:
            inner.pop(rank.key, None)
            mentioned = {node.name for expr in inner.values() for node in walk(expr) if isinstance(node, ir.Rank)}
            name = self._rank(rank)
            if name in mentioned:
                name = self._rank(copy_axis(rank))
                inner[rank.key] = ir.Rank(name, span=rank.span)
                self.equal.append((self._rank(rank), name))
            bound.append(name)
        return inner, tuple(bound)

    def _use(self, value: Value, function: str, along: Sequence[RankVariable], env: Env) -> ir.Use:
        """A rank function: the ranks it keeps are those of where the value is read, the others it binds."""
        kept = {rank.key for rank in value.ranks}
        env, _ = self._bind([rank for rank in along if rank.key not in kept], env)
        names = []
        for rank in along:
            here = env.get(rank.key) or ir.Rank(self._rank(rank))
            assert isinstance(here, ir.Rank), "a rank function is read at other coordinates through a statement"
            names.append(here.name)
        return ir.Use(function, tuple(names), self._all(value, env, False), span=value.span)


def position(tensor: str, index: int) -> str:
    """What stands for the extent of a position of a tensor."""
    return f"{tensor}.{index}"
