"""What becomes a statement of a traced cascade, and what stays inside one.

A value becomes a statement when the user named it, when two places use it, when it is filtered, chosen or scanned,
when another place reads it at other coordinates, and when it is returned; all else stays inside the expression that
uses it, as it was written. Coordinates (`m - n`), predicates over them and reads of parameters are places rather than
results: named or not, they stay inside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from cascade.frontend.forms import (
    At, Casting, Chosen, Element, Filtered, Invocation, Literal, Loop, Ordered, Pointwise, Previous, Scan, SizeOf,
)  # fmt: skip
from cascade.frontend.frames import Recorder
from cascade.frontend.notation import Operand, RankVariable, Tensor, Value

MAX_DEPTH = 100  # of an expression: a longer chain is cut into statements, well before the limit of the text form
MAX_PLACE = 64  # operations in a predicate or an index that is repeated wherever it is used


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
