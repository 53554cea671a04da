"""From traced values to a cascade: what becomes a statement, what stays inside one, and how everything is named.

A value becomes a statement when the user named it, when two places use it, when it is filtered, chosen or scanned,
when another place reads it at other coordinates, and when it is returned; all else stays inside the expression that
uses it, as it was written. Coordinates (`m - n`), predicates over them and reads of parameters are places rather than
results: named or not, they stay inside.

Expressions are built with serial numbers in place of names; names are given last, in `naming.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, assert_never

from cascade import ir
from cascade.frontend.frames import Recorder
from cascade.frontend.notation import (
    Applied, At, Casting, Choice, Chosen, Element, Filtered, Fold, Invocation, Literal, Loop, Operand, Ordered,
    Pointwise, Previous, RankVariable, Scan, SizeOf, Tensor, Value, copy_axis,
)  # fmt: skip
from cascade.walk import walk

MAX_DEPTH = 100  # of an expression: a longer chain is cut into statements, well before the limit of the text form
MAX_PLACE = 64  # operations in a predicate or an index that is repeated wherever it is used

Env: TypeAlias = Mapping[int, ir.Expr]  # what stands for the free ranks of a value that is read at other coordinates


def symbol(thing: Value | RankVariable | Tensor | Invocation) -> str:
    """What stands for the name of a thing until it has one."""
    return f"%{thing.place.key if isinstance(thing, Invocation) else thing.key}"


@dataclass(slots=True, eq=False)
class Program:
    """All that the results need: values and calls in the order they were made, and who uses what how often."""

    results: Sequence[Value | Tensor]
    recorder: Recorder
    values: list[Value] = field(default_factory=list)
    calls: list[Invocation] = field(default_factory=list)
    uses: Counter[int] = field(default_factory=Counter)
    aliases: dict[int, Value] = field(default_factory=dict)  # values that only order another
    orders: dict[int, tuple[RankVariable, ...]] = field(default_factory=dict)  # that they give it
    names: dict[int, str] = field(default_factory=dict)  # the user's variables
    statements: set[int] = field(default_factory=set)
    depth: dict[int, int] = field(default_factory=dict)
    place_size: dict[int, int] = field(default_factory=dict)  # of values that are places; others are not in it

    def __post_init__(self) -> None:
        self._reach()
        keys = [value.key for value in self.values]
        self.names = {key: self.recorder.names[key] for key in keys if key in self.recorder.names}
        for value in self.values:
            self._measure_place(value)
        self._count_uses()
        self._settle_orders()
        self._choose_statements()

    def _reach(self) -> None:
        """Find everything that the results are made of."""
        found: dict[int, Value] = {}
        calls: dict[int, Invocation] = {}
        stack: list[object] = list(self.results)
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor) and item.origin is not None and item.origin.place.key not in calls:
                calls[item.origin.place.key] = item.origin
                stack.extend(item.origin.args)
            elif isinstance(item, Value) and item.key not in found:
                found[item.key] = item
                stack.extend(_made_of(item))
        self.values = [found[key] for key in sorted(found)]
        self.calls = [calls[key] for key in sorted(calls)]

    def _measure_place(self, value: Value) -> None:
        """Note the size of a value that is a place: a coordinate, a predicate, a read of a parameter."""
        match value.form:
            case Literal() | SizeOf() | Element() | Pointwise() | Casting():
                pass
            case Ordered() if value.axes is not None:  # a view
                pass
            case At(rename=rename):
                # Elsewhere than in its own shape a value is absent, even where its formula would not be.
                if not rename and not _is_whole_read(value.operands[0]):
                    return
            case _:
                return
        sizes = [1 if isinstance(o, RankVariable) else self.place_size.get(o.key) for o in value.operands]
        known = [size for size in sizes if size is not None]
        if len(known) == len(sizes) and sum(known) < MAX_PLACE:
            self.place_size[value.key] = 1 + sum(known)

    def _count_uses(self) -> None:
        """How many places use a value; a place within a place is written out there and does not count."""
        for thing in (*self.results, *(arg for call in self.calls for arg in call.args)):
            self.uses[thing.key] += 1
        for consumer in reversed(self.values):  # what uses a value was made after it, the steps of a scan aside
            if isinstance(consumer.form, Chosen) and consumer.form.part == 1:
                continue  # the two parts of a choice have one operand
            inside = _place_operands(consumer)
            if consumer.key in self.place_size and not self.uses[consumer.key]:
                inside = range(len(consumer.operands))
            for position, operand in enumerate(consumer.operands):
                if isinstance(operand, Value) and not (position in inside and operand.key in self.place_size):
                    self.uses[operand.key] += 1

    def _settle_orders(self) -> None:
        """`O = ...; return O[b, h, m, f]`: the order is that of O itself where nothing speaks against it."""
        returned = {result.key for result in self.results}
        for value in self.values:
            source = self.resolve(value.operands[0]) if isinstance(value.form, Ordered) else None
            if isinstance(source, Value) and self._is_alias(value, source, returned):
                self.aliases[value.key] = source
                self.orders[source.key] = self.order(value)
                self.uses[source.key] += self.uses[value.key] - 1
                if value.key in self.names:
                    self.names[source.key] = self.names[value.key]
                if value.key in returned:
                    returned.add(source.key)
        self.results = [self.tensor(result) for result in self.results]

    def _is_alias(self, value: Value, source: Value, returned: set[int]) -> bool:
        """Whether a value that orders another is that other one, rather than a copy of it."""
        place = source.key in self.place_size
        if value.axes is not None and place:
            return False  # a view of a parameter is read where it is used
        same = [rank.key for rank in self.order(source)] == [rank.key for rank in self.order(value)]
        if isinstance(source.form, Chosen) and not same:
            return False  # both parts of a choice have one order
        if self.uses[source.key] == 1:
            return True
        free = same or source.key not in self.orders
        one_name = value.key not in self.names or source.key not in self.names
        return value.key in returned and source.key not in returned and free and one_name and not place

    def _choose_statements(self) -> None:
        passed = [self.tensor(arg) for call in self.calls for arg in call.args]
        forced = {thing.key for thing in (*self.results, *passed)}
        for value in self.values:
            source = self.resolve(value.operands[0]) if isinstance(value.form, At) else None
            if isinstance(value.form, At) and not value.form.rename and isinstance(source, Value):
                forced |= set() if _is_whole_read(source) else {source.key}
        for value in self.values:
            if value.key in self.aliases:
                continue
            inner = [self.resolve(operand) for operand in value.operands]
            depth = 1 + max((self.depth.get(o.key, 0) for o in inner if o.key not in self.statements), default=0)
            self.depth[value.key] = depth
            if value.key in forced or self._stands_alone(value, inner, depth):
                self.statements.add(value.key)

    def _stands_alone(self, value: Value, inner: Sequence[Operand], depth: int) -> bool:
        """Whether a value becomes a statement for its own sake."""
        match value.form:
            case Filtered() | Chosen() | Scan():
                return True
            case Previous() | Literal() | SizeOf():
                return False
            case Ordered():
                return value.key in self.names and value.axes is None
            case At() if inner[0].key in self.statements:
                return False
        ordered = value.key in self.orders
        if value.key in self.place_size and not self.uses[value.key]:
            return False  # a predicate or an index, written out wherever it is needed
        if value.key in self.place_size and not ordered and (_is_read(value) or not _reads(value)):
            return False
        return value.key in self.names or self.uses[value.key] > 1 or depth > MAX_DEPTH

    # --- questions about a value, once all is known ------------------------------------------------------------------

    def resolve(self, operand: Operand) -> Operand:
        """The value that an operand stands for, past those that only order it."""
        while operand.key in self.aliases:
            operand = self.aliases[operand.key]
        return operand

    def tensor(self, thing: Tensor | Value) -> Tensor | Value:
        """What a whole tensor, returned or passed on, stands for."""
        found = self.resolve(thing) if isinstance(thing, Value) else thing
        assert not isinstance(found, RankVariable)
        return found

    def order(self, value: Value) -> tuple[RankVariable, ...]:
        """The ranks of the tensor that a value becomes, in their order."""
        if value.key in self.orders:
            return self.orders[value.key]
        return value.ranks if value.axes is None else tuple(axis for axis in value.axes if axis is not None)

    def inline(self, operand: Operand, inside: bool) -> bool:
        """Whether an operand is written out where it is used; `inside`: in an index or a predicate."""
        place = inside and operand.key in self.place_size and operand.key not in self.orders
        return place or operand.key not in self.statements


def _made_of(value: Value) -> Iterable[object]:
    """What a value cannot do without."""
    yield from value.operands
    match value.form:
        case Element(tensor=tensor):
            yield tensor
        case SizeOf(tensor=Tensor() as tensor):
            yield tensor
        case Chosen(choice=choice):
            yield from choice.parts
        case Previous(loop=Loop(value=Value() as whole)):
            yield whole


def _place_operands(value: Value) -> range:
    """The operands that are indices or predicates."""
    match value.form:
        case Element() | Previous():
            return range(len(value.operands))
        case At():
            return range(1, len(value.operands))
        case Filtered() | Chosen():
            return range(1, len(value.operands))
        case Scan(inits=inits):
            return range(1 + inits, len(value.operands))
        case _:
            return range(0)


def _is_read(value: Operand) -> bool:
    """Whether a place is an element of a parameter and nothing else."""
    while isinstance(value, Value) and isinstance(value.form, At | Ordered):
        value = value.operands[0]
    return isinstance(value, Value) and isinstance(value.form, Element)


def _is_whole_read(value: Operand) -> bool:
    """Whether a value is a parameter under other names for its ranks: `X[t, d]`."""
    if not isinstance(value, Value) or not isinstance(value.form, Element):
        return False
    keys = {operand.key for operand in value.operands if isinstance(operand, RankVariable)}
    return len(keys) == len(value.operands)


def _reads(value: Value) -> bool:
    """Whether a place reads a tensor, rather than being made of coordinates alone."""
    stack: list[Operand] = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, Value):
            if isinstance(item.form, Element):
                return True
            stack.extend(item.operands)
    return False


# --- expressions -----------------------------------------------------------------------------------------------------


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
                body, where = self.expr(value.operands[0], {}), self.expr(value.operands[1], {}, inside=True)
                return ir.Einsum(target, body, where, span=value.span)
            case Scan(loop=loop, inits=count, filtered=filtered):
                body, *starts = (self.expr(operand, {}) for operand in value.operands[: 1 + count])
                rank = self._rank(loop.along)
                inits = tuple(
                    ir.Init(rank, -1 - i, start, span=start.span or value.span) for i, start in enumerate(starts)
                )
                where_ = self.expr(value.operands[-1], {}, inside=True) if filtered else None
                return ir.Einsum(target, body, where_, inits, span=value.span)
            case _:
                return ir.Einsum(target, self._form(value, {}, False), span=value.span)

    def _topk(self, choice: Choice) -> ir.TopK:
        value = choice.parts[0]
        body = self.expr(value.operands[0], {})
        where = self.expr(value.operands[1], {}, inside=True) if len(value.operands) > 1 else None
        k = choice.k if isinstance(choice.k, int) else self._extent(choice.k, {})
        values, coords = (self._target(part) for part in choice.parts)
        return ir.TopK(values, coords, self._rank(choice.along), k, body, where, span=value.span)

    def _call(self, call: Invocation) -> ir.Call:
        args = tuple(symbol(self.program.tensor(arg)) for arg in call.args)
        return ir.Call(tuple(map(symbol, call.results)), call.callee.name, args, span=call.place.span)

    def expr(self, operand: Operand, env: Env, inside: bool = False) -> ir.Expr:
        """An operand as an expression, with `env` for its free ranks."""
        operand = self.program.resolve(operand)
        if isinstance(operand, RankVariable):
            return env.get(operand.key) or ir.Rank(self._rank(operand), span=operand.span)
        if self.program.inline(operand, inside):
            return self._form(operand, env, inside)
        index = tuple(self.expr(rank, env) for rank in self.program.order(operand))
        return ir.Read(symbol(operand), index, span=operand.span)

    def _form(self, value: Value, env: Env, inside: bool) -> ir.Expr:
        """A value written out."""
        span = value.span
        match value.form:
            case Literal(value=number):
                return ir.Const(number, span=span)
            case SizeOf() as size:
                return ir.Extent(self._extent(size, env), span=span)
            case Element(tensor=tensor):
                return ir.Read(symbol(tensor), self._all(value.operands, env, True), span=span)
            case Previous(loop=loop):
                return self._previous(value, loop, env)
            case At(ranks=old):
                return self._at(value, old, env, inside)
            case Ordered():
                return self.expr(value.operands[0], env, inside)
            case Pointwise(op=op):
                return ir.Apply(op, self._all(value.operands, env, inside), span=span)
            case Casting(dtype=dtype):
                return ir.Cast(dtype, self.expr(value.operands[0], env, inside), span=span)
            case Fold(reducer=reducer, along=along):
                inner, bound = self._bind(along, env)
                return ir.Reduce(reducer, bound, self.expr(value.operands[0], inner), span=span)
            case Applied(function=function, along=along):
                return self._use(value, function, along, env)
            case Filtered() | Chosen() | Scan():
                raise AssertionError("a statement of its own")
            case _:
                assert_never(value.form)

    def _all(self, operands: Iterable[Operand], env: Env, inside: bool) -> tuple[ir.Expr, ...]:
        return tuple(self.expr(operand, env, inside) for operand in operands)

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
            here = self.expr(given.get(rank.key, rank), env, True)
            back = not value.operands and rank.key == loop.along.key
            index.append(ir.Apply("sub", (here, ir.Const(1)), span=value.span) if back else here)
        return ir.Read(symbol(loop.value), tuple(index), span=value.span)

    def _at(self, value: Value, old: Sequence[RankVariable], env: Env, inside: bool) -> ir.Expr:
        """A value read at other coordinates: its statement there, or the value itself with its ranks replaced."""
        source, *index = value.operands
        there = {rank.key: self.expr(item, env, True) for rank, item in zip(old, index, strict=True)}
        for rank in old:
            here = there[rank.key]
            if isinstance(here, ir.Rank):
                self.equal.append((self._rank(rank), here.name))
        return self.expr(source, there, inside)

    def _bind(self, along: Sequence[RankVariable], env: Env) -> tuple[Env, tuple[str, ...]]:
        """The ranks that a reduction binds, other ones where its value is read at coordinates that mention them."""
        mentioned = {node.name for expr in env.values() for node in walk(expr) if isinstance(node, ir.Rank)}
        inner, bound = dict(env), []
        for rank in along:
            inner.pop(rank.key, None)
            if symbol(rank) in mentioned:
                other = copy_axis(rank)
                inner[rank.key] = ir.Rank(self._rank(other), span=rank.span)
                self.equal.append((self._rank(rank), symbol(other)))
                rank = other
            bound.append(self._rank(rank))
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
        return ir.Use(function, tuple(names), self._all(value.operands, env, False), span=value.span)


def position(tensor: str, index: int) -> str:
    """What stands for the extent of a position of a tensor."""
    return f"{tensor}.{index}"
