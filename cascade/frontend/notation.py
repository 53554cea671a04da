"""The notation of the Python frontend: rank variables, tensors and values that build expressions when computed with.

    b, h, m, n, e = ranks("b h m n e")
    S = (sum[e](Q[b, h, m, e] * K[b, h, n, e]) / sqrt(e.extent)).where(n <= m)

A value knows its free ranks, in order of first appearance: those of what it is made of less those that were reduced.
A *whole* value is one of the positional style, `torch.softmax(x @ w, -1)`: it has axes instead, and the two styles meet
by indexing (`(x @ w)[t, f]`) and by explicit order (`(...)[t, f] @ w`). Nothing is decided here about what becomes a
statement or how anything is named: that is `emit.py`, at the end of the trace.
"""

from __future__ import annotations

import importlib
import numbers
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias

from cascade.errors import Note, Span, TraceError, quoted_list
from cascade.frontend.forms import (
    At, Element, Filtered, Form, Invocation, Literal, Loop, Ordered, Pointwise, Previous, Scan, SizeOf,
)  # fmt: skip
from cascade.frontend.frames import Placed, Recorder, fail, place, user_frame
from cascade.ir import DType, Size

# --- the objects a user holds ----------------------------------------------------------------------------------------


class Notation(Placed):
    """What all notation can do: arithmetic, comparison, predicates, and to refuse to be a Python value."""

    __slots__ = ()
    __hash__ = object.__hash__
    __array_ufunc__ = None  # numpy leaves its scalars' arithmetic to us

    def __add__(self, other: object) -> Value:
        return pointwise("add", self, other)

    def __radd__(self, other: object) -> Value:
        return pointwise("add", other, self)

    def __sub__(self, other: object) -> Value:
        return pointwise("sub", self, other)

    def __rsub__(self, other: object) -> Value:
        return pointwise("sub", other, self)

    def __mul__(self, other: object) -> Value:
        return pointwise("mul", self, other)

    def __rmul__(self, other: object) -> Value:
        return pointwise("mul", other, self)

    def __truediv__(self, other: object) -> Value:
        return pointwise("div", self, other)

    def __rtruediv__(self, other: object) -> Value:
        return pointwise("div", other, self)

    def __floordiv__(self, other: object) -> Value:
        return pointwise("floordiv", self, other)

    def __rfloordiv__(self, other: object) -> Value:
        return pointwise("floordiv", other, self)

    def __mod__(self, other: object) -> Value:
        return pointwise("mod", self, other)

    def __rmod__(self, other: object) -> Value:
        return pointwise("mod", other, self)

    def __pow__(self, other: object) -> Value:
        return pointwise("pow", self, other)

    def __rpow__(self, other: object) -> Value:
        return pointwise("pow", other, self)

    def __neg__(self) -> Value:
        return pointwise("neg", self)

    def __pos__(self) -> Notation:
        return self

    def __round__(self) -> Value:
        return pointwise("round", self)

    def __floor__(self) -> Value:
        return pointwise("floor", self)

    def __abs__(self) -> Value:
        return pointwise("abs", self)

    def __eq__(self, other: object) -> Value:  # type: ignore[override]
        return pointwise("eq", self, other)

    def __ne__(self, other: object) -> Value:  # type: ignore[override]
        return pointwise("ne", self, other)

    def __lt__(self, other: object) -> Value:
        return pointwise("lt", self, other)

    def __le__(self, other: object) -> Value:
        return pointwise("le", self, other)

    def __gt__(self, other: object) -> Value:
        return pointwise("gt", self, other)

    def __ge__(self, other: object) -> Value:
        return pointwise("ge", self, other)

    def __and__(self, other: object) -> Value:
        return pointwise("and", self, other)

    def __rand__(self, other: object) -> Value:
        return pointwise("and", other, self)

    def __or__(self, other: object) -> Value:
        return pointwise("or", self, other)

    def __ror__(self, other: object) -> Value:
        return pointwise("or", other, self)

    def __invert__(self) -> Value:
        return pointwise("not", self)

    def __matmul__(self, other: object) -> Any:
        return _torch().call("matmul", (self, other), {})

    def __rmatmul__(self, other: object) -> Any:
        return _torch().call("matmul", (other, self), {})

    def __bool__(self) -> bool:
        raise fail(
            "C401",
            "Python asks whether this is true, which is not known while the function is traced",
            "write predicates with & | ~ instead of and, or, not and chained comparisons, put them into "
            "(...).where(n <= m), choose with cs.select(cond, a, b), and use cs.max(a, b) for the larger of two",
        )

    def _unknown(self, wanted: str, instead: str) -> TraceError:
        message = f"Python asks for this as {wanted}, which is not known while the function is traced"
        return fail("C402", message, instead)

    def _extent(self, wanted: str, instead: str) -> int:
        """The extent that this is, where example shapes tell: from now on the dimension has exactly that extent."""
        match getattr(self, "form", None):
            case SizeOf(rank=RankVariable(example=int() as example, size=int() | None) as rank):
                rank.size = example
                return example
            case SizeOf(tensor=Tensor(sizes=tuple() as sizes) as tensor, position=position):
                example = sizes[position]
                if isinstance(example, int):
                    tensor.relied.add(position)
                    return example
        raise self._unknown(wanted, instead)

    def __float__(self) -> float:
        return float(self._extent("a number", "compute with it instead: cs.sqrt(x), x ** -0.5, cs.exp(x)"))

    def __int__(self) -> int:
        return self._extent(
            "a number", "compute with it instead: x // 2, cs.floor(x); cs.cast(x, 'i64') rounds to an integer"
        )

    def __index__(self) -> int:
        return self._extent("an integer", "a loop over a rank is a reduction, cs.sum[n](x), or a scan, cs.scan[t](...)")

    def __len__(self) -> int:
        raise self._unknown("a length", "the extent of a rank is n.extent")

    def __iter__(self) -> NoReturn:
        raise self._unknown(
            "a sequence",
            "there is nothing to loop over in one tensor: write cs.sum[n](x) or cs.scan[t](...); a parameter that is "
            "a list of tensors needs its structure: call the compiled function once, or give trace(fn, shapes=...)",
        )

    def __setitem__(self, index: object, value: object) -> NoReturn:
        raise fail(
            "C403",
            "a tensor is defined once, and nothing is stored into it afterwards",
            "build the value in one expression: cs.select(cond, new, old), or (...).where(n <= m) with .default(c)",
        )

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: object, args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # fmt: skip
        return _torch().call(getattr(function, "__name__", str(function)), tuple(args), dict(kwargs or {}))


def _torch() -> Any:
    """The positional style, loaded when it is first used: index notation does not need it."""
    return importlib.import_module("cascade.frontend.trace_torch")


class RankVariable(Notation):
    """A rank variable: an index, and the integer that is its coordinate. `named` ones were named by the user."""

    __slots__ = ("name", "size", "named", "example")

    def __init__(self, name: str, size: Size | None = None, *, named: bool = True, example: int | None = None) -> None:
        super().__init__(place(user_frame()))
        self.name, self.size, self.named, self.example = name, size, named, example

    @property
    def extent(self) -> Value:
        """How many coordinates the rank has, as an integer in expressions."""
        return Value(SizeOf(rank=self))

    def __repr__(self) -> str:
        return self.name if self.size is None else f"{self.name}={self.size}"


class Tensorial(Notation):
    """What whole tensors and values have beyond arithmetic: the methods and attributes of a torch tensor."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _torch().attribute(self, name)

    def where(self, predicate: object, other: object = None) -> Value:
        """This value where the predicate holds, absent elsewhere; given `other`, torch's meaning: `other` elsewhere.

        The filter is that of a statement: it holds for the expression as it is written, inside its reductions over the
        ranks that the predicate names too, but not inside what has a name, and so a statement, of its own.
        """
        return filtered(self, predicate) if other is None else pointwise("select", predicate, self, other)

    def default(self, other: object) -> Value:
        """This value where it is present, `other` where it is absent."""
        return pointwise("default", self, other)

    def fill(self, value: float) -> Filled:
        """For a returned tensor: its absent coordinates are stored as `value` instead of 0."""
        return Filled(self, value)


class Tensor(Tensorial):
    """A parameter of the traced function, or a result of a cascade it calls: to be indexed, or used whole."""

    __slots__ = ("name", "recorder", "sizes", "rank_count", "read", "origin", "relied", "dtype_declared")

    def __init__(
        self, name: str, recorder: Recorder, sizes: tuple[Size | None, ...] | None, span: Span | None = None,
        origin: Invocation | None = None, dtype: DType | None = None,
    ) -> None:  # fmt: skip
        super().__init__(span)
        self.dtype_declared = dtype
        self.name, self.recorder, self.sizes, self.origin = name, recorder, sizes, origin
        self.rank_count = None if sizes is None else len(sizes)
        self.read: Span | None = None
        self.relied: set[int] = set()  # the positions of which the trace took the example extent

    def __getitem__(self, index: object) -> Value:
        items = index if isinstance(index, tuple) else (index,)
        if _positional(items, self.rank_count):
            return _subscript(whole(self), items)
        span = place(user_frame())
        if self.rank_count is None and not any(isinstance(item, Notation) for item in items) and _sliced(items):
            help = f"slices need the shapes: trace(fn, shapes={{{self.name!r}: (4, 8)}}), or a call with tensors"
            raise fail("C410", f"{self.name} is cut in torch's way, and its shape is not known", help)
        if self.rank_count is None:
            self.rank_count, self.read = len(items), span
        if self.rank_count != len(items):
            note = Note(f"{self.name} has {self.rank_count} here", self.read) if self.read else None
            message = (
                f"{self.name} is indexed by {plural(len(items), 'rank')}, but it has {plural(self.rank_count, 'rank')}"
            )
            raise fail("C404", message, "every dimension gets one index; X[()] is a scalar", note=note)
        return Value(Element(self), tuple(coordinate(item) for item in items), recorder=self.recorder)

    def __repr__(self) -> str:
        return f"<tensor {self.name}>"


class Value(Tensorial):
    """An expression with free ranks; a whole one has `axes`, in torch's order, None where the extent is 1."""

    __slots__ = ("form", "operands", "ranks", "axes", "recorder", "recurrent")

    def __init__(
        self, form: Form, operands: tuple[Operand, ...] = (), ranks: tuple[RankVariable, ...] | None = None,
        axes: tuple[RankVariable | None, ...] | None = None, recorder: Recorder | None = None,
    ) -> None:  # fmt: skip
        frame = user_frame()
        super().__init__(place(frame))
        self.form, self.operands, self.axes = form, operands, axes or None
        self.ranks = union(*(free(operand) for operand in operands)) if ranks is None else ranks
        self.recurrent = _recurrent(form, operands)
        self.recorder = _one_recorder(operands, recorder)
        if self.recorder is not None:
            self.recorder.observe(frame)

    def __getitem__(self, index: object) -> Value:
        items = index if isinstance(index, tuple) else (index,)
        order = self.ranks if self.axes is None else self.axes
        if self.axes is not None and _positional(items, len(order)):
            return _subscript(self, items)
        if len(items) != len(order):
            listed = f" ({rank_list(self.ranks)})" if self.axes is None else ""
            given, has = plural(len(items), "rank"), plural(len(order), "rank")
            message = f"this value is indexed by {given}, but it has {has}{listed}"
            raise fail("C404", message, "its ranks are those not reduced, in order of first appearance")
        index_of = [coordinate(item) for item in items]
        if self.axes is None and _same_ranks(index_of, self.ranks):
            return Value(Ordered(), (self,), ranks=tuple(r for r in index_of if isinstance(r, RankVariable)))
        kept = [(rank, item) for rank, item in zip(order, index_of, strict=True) if rank is not None]
        return at(self, [rank for rank, _ in kept], [item for _, item in kept])

    def __repr__(self) -> str:
        return f"<value over {rank_list(self.ranks) or 'no ranks'}>"


class PreviousValue(Notation):
    """The value of a scan at an earlier coordinate: as it is one step back, indexed anywhere."""

    __slots__ = ("loop",)

    def __init__(self, loop: Loop) -> None:
        super().__init__(place(user_frame()))
        self.loop = loop

    def __getitem__(self, index: object) -> Value:
        items = tuple(coordinate(item) for item in (index if isinstance(index, tuple) else (index,)))
        self.loop.asked = True
        if self.loop.order is not None and len(items) != len(self.loop.order):
            given, has = plural(len(items), "rank"), rank_list(self.loop.order)
            message = f"the previous value is indexed by {given}, but it has {has}"
            raise fail("C404", message, "index the iterative rank at an earlier coordinate: prev[t - 1, d]")
        return Value(Previous(self.loop), items)

    def __repr__(self) -> str:
        return "<previous value>"


class Filled(Notation):
    """A tensor to return, and what its absent coordinates are stored as."""

    __slots__ = ("value", "fill")

    def __init__(self, value: Tensorial, fill: float) -> None:
        super().__init__(place(user_frame()))
        if not isinstance(fill, int | float):
            raise fail("C409", f"{described(fill)} cannot be what is stored", "a number: .fill(-math.inf)")
        self.value, self.fill = value, fill


Operand: TypeAlias = RankVariable | Value


def _recurrent(form: Form, operands: Iterable[Operand]) -> Loop | None:
    """The scan of whose previous value, taken without an index, this is made."""
    if isinstance(form, Previous):
        return None if operands else form.loop
    if isinstance(form, Scan):
        return None
    return next((o.recurrent for o in operands if isinstance(o, Value) and o.recurrent), None)


def _one_recorder(operands: Iterable[Operand], given: Recorder | None) -> Recorder | None:
    for operand in operands:
        recorder = operand.recorder if isinstance(operand, Value) else None
        if recorder is None:
            continue
        if given is not None and recorder is not given:
            raise fail("C405", "this mixes values of two traced functions", "pass the tensor in as a parameter")
        given = recorder
    return given


# --- ranks -----------------------------------------------------------------------------------------------------------

_RANK = re.compile(r"([A-Za-z][A-Za-z0-9_]*)(?:=([0-9]+|[A-Z][A-Za-z0-9_]*))?")


def ranks(names: str) -> Any:
    """Rank variables: `b, h, m = ranks("b h m")`; a single name gives the variable itself, as `sympy.symbols` does.

    `ranks("k=64")` fixes the extent, `ranks("t=T")` names its shape symbol: ranks of one symbol have one extent.
    """
    if not isinstance(names, str):
        raise fail("C406", f"ranks are named in a string, not by {described(names)}", "ranks('b h m')")
    found = []
    for word in names.replace(",", " ").split():
        match = _RANK.fullmatch(word)
        if match is None:
            help = "names are letters, digits and _; an extent is a number or an upper-case symbol: ranks('m k=64 t=T')"
            raise fail("C406", f"{word!r} is not a rank", help)
        size = match[2]
        found.append(RankVariable(match[1], int(size) if size and size.isdigit() else size))
    if not found:
        raise fail("C406", "no rank is named", "ranks('b h m')")
    return found[0] if len(found) == 1 else tuple(found)


def free(operand: Operand) -> tuple[RankVariable, ...]:
    """The ranks of an operand."""
    return (operand,) if isinstance(operand, RankVariable) else operand.ranks


def union(*groups: Iterable[RankVariable]) -> tuple[RankVariable, ...]:
    """All ranks of the groups, in order of first appearance."""
    return tuple({rank.key: rank for group in groups for rank in group}.values())


def without(group: Iterable[RankVariable], removed: Iterable[RankVariable]) -> tuple[RankVariable, ...]:
    """The ranks of a group less some."""
    gone = {rank.key for rank in removed}
    return tuple(rank for rank in group if rank.key not in gone)


def _same_ranks(index: Sequence[Operand], group: Sequence[RankVariable]) -> bool:
    keys = [item.key for item in index if isinstance(item, RankVariable)]
    return len(keys) == len(index) and len(set(keys)) == len(keys) and set(keys) == {rank.key for rank in group}


def rank_list(group: Iterable[RankVariable]) -> str:
    """The names of ranks, for messages."""
    return quoted_list(rank.name or "_" for rank in group)


def plural(count: int, noun: str) -> str:
    """`1 rank`, `3 ranks`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def along_ranks(written: object, what: str) -> tuple[RankVariable, ...]:
    """The ranks in `sum[n, e]`, checked."""
    items = written if isinstance(written, tuple) else (written,)
    found = tuple(item for item in items if isinstance(item, RankVariable))
    if len(found) != len(items) or not items:
        raise fail("C407", f"{what}[...] takes rank variables", f"n = cs.ranks('n'), then cs.{what}[n](x)")
    if len({rank.key for rank in found}) != len(found):
        raise fail("C407", f"{what} names a rank twice", f"cs.{what}[{rank_list(union(found))}](x)")
    return found


# --- operands --------------------------------------------------------------------------------------------------------


def together(objects: Sequence[object]) -> tuple[tuple[Operand, ...], tuple[RankVariable | None, ...] | None]:
    """The operands of one operation, and the axes of the result where the style is positional."""
    indexed = any(isinstance(o, RankVariable) or (isinstance(o, Value) and o.ranks and o.axes is None) for o in objects)
    # Beside index notation, a parameter that is used without an index can only be a scalar.
    operands = tuple(coordinate(o) if indexed and isinstance(o, Tensor) else operand(o) for o in objects)
    if any(isinstance(value, Value) and value.axes for value in operands):
        return broadcast(operands)
    return operands, None


def operand(object_: object) -> Operand:
    """What stands in an expression for a Python object: notation, or a number."""
    match object_:
        case RankVariable() | Value():
            return object_
        case Tensor():
            return whole(object_)
        case PreviousValue():
            object_.loop.asked = True
            return Value(Previous(object_.loop), ranks=object_.loop.order or ())
        case bool():
            return Value(Literal(object_))
        case numbers.Integral():
            return Value(Literal(int(object_)))
        case numbers.Real():
            return Value(Literal(float(object_)))
        case Filled():
            raise fail("C408", ".fill(c) is for a tensor that is returned", "inside an expression write .default(c)")
        case _:
            raise fail("C409", f"{described(object_)} cannot stand in an expression", _advice(object_))


def described(object_: object) -> str:
    """A Python object by its kind, for messages."""
    kind = type(object_)
    if kind.__module__.partition(".")[0] == "torch":
        return "a torch tensor that is not a parameter"
    return f"{'an' if kind.__name__[0] in 'aeiou' else 'a'} {kind.__name__}"


def _advice(object_: object) -> str:
    if type(object_).__module__.partition(".")[0] == "torch":
        return "tensors reach a traced function as its parameters: pass it in, or write its numbers"
    return "operands are tensors, rank variables and numbers"


def coordinate(item: object) -> Operand:
    """An index of index notation: an integer expression."""
    if _sliced((item,)):
        help = "index by rank variables, X[b, t + w, c]; torch's slices need the shapes: trace(fn, shapes=...)"
        raise fail("C404", "slices, None and ... are no coordinates", help)
    if isinstance(item, Tensor) and item.rank_count is None:
        return item[()]
    return operand(item)


def whole(tensor: Tensor) -> Value:
    """A tensor with an axis for every dimension, as torch sees it."""
    if tensor.rank_count == 0:
        return Value(Element(tensor), recorder=tensor.recorder)
    if tensor.sizes is None:
        help = (
            f"index it, {tensor.name}[b, m]; write {tensor.name}[()] for a scalar; or give example shapes: call the "
            f"compiled function once with tensors, or trace(fn, shapes={{{tensor.name!r}: (4, 8)}})"
        )
        raise fail("C410", f"{tensor.name} is used whole, and its shape is not known", help)
    axes = tuple(None if size == 1 else new_axis(size if isinstance(size, int) else None) for size in tensor.sizes)
    tensor.relied.update(position for position, axis in enumerate(axes) if axis is None)
    index = tuple(Value(Literal(0)) if axis is None else axis for axis in axes)
    return Value(Element(tensor), index, axes=axes, recorder=tensor.recorder)


def new_axis(example: int | None, size: Size | None = None) -> RankVariable:
    """A rank that nobody named; `example` is its extent in the example shapes."""
    return RankVariable("", size, named=False, example=example)


def copy_axis(rank: RankVariable) -> RankVariable:
    """A second rank variable over the same shape."""
    return RankVariable(rank.name, rank.size, named=rank.named, example=rank.example)


def axes_of(value: Operand) -> tuple[RankVariable | None, ...]:
    """The axes of an operand of a positional operation; index notation needs an order that the user wrote."""
    if isinstance(value, Value):
        if value.axes is not None:
            return value.axes
        written = isinstance(value.form, Ordered | Element | At) and _same_ranks(_plain_index(value), value.ranks)
        if len(value.ranks) <= 1 or written:
            return value.ranks
    help = "order its ranks, (...)[t, f], or index the whole tensor, x[t, f]: then all of it is index notation"
    raise fail("C411", "this mixes index notation and whole tensors", help)


def _plain_index(value: Value) -> Sequence[Operand]:
    match value.form:
        case Element():
            return value.operands
        case At():
            return value.operands[1:]
        case _:
            return value.ranks


def broadcast(operands: Sequence[Operand]) -> tuple[tuple[Operand, ...], tuple[RankVariable | None, ...]]:
    """The operands over common axes, matched from the last dimension as torch does."""
    shapes = [axes_of(operand) for operand in operands]
    dims = max(len(shape) for shape in shapes)
    padded = [(None,) * (dims - len(shape)) + shape for shape in shapes]
    axes: list[RankVariable | None] = []
    for i in range(dims):
        axis = _match([shape[i] for shape in padded], i - dims)
        # An outer product of a tensor with itself has the one axis twice.
        again = axis is not None and axis.key in {other.key for other in axes if other is not None}
        axes.append(copy_axis(axis) if again and axis is not None else axis)
    return tuple(rename(value, renaming(shape, axes)) for value, shape in zip(operands, padded, strict=True)), tuple(
        axes
    )


def renaming(old: Sequence[RankVariable | None], new: Sequence[RankVariable | None]) -> dict[int, RankVariable]:
    """The new axis for each old one."""
    return {a.key: b for a, b in zip(old, new, strict=True) if a is not None and b is not None}


def _match(candidates: Sequence[RankVariable | None], position: int) -> RankVariable | None:
    found = [axis for axis in candidates if axis is not None]
    for axis in found[1:]:
        same_extent(found[0], axis, f"dimension {position}")
    return found[0] if found else None


def same_extent(a: RankVariable, b: RankVariable, where: str) -> None:
    """Refuse two axes whose example extents differ."""
    if a.example is not None and b.example is not None and a.example != b.example:
        message = f"the extents {a.example} and {b.example} do not fit together in {where}"
        raise fail("C412", message, "extents are equal, or one of them is 1")


def rename(value: Operand, axes: Mapping[int, RankVariable]) -> Operand:
    """The operand over other axes."""
    if not isinstance(value, Value) or all(axes.get(rank.key, rank) is rank for rank in value.ranks):
        return value
    return at(value, value.ranks, [axes.get(rank.key, rank) for rank in value.ranks])


def at(
    value: Value, old: Sequence[RankVariable], new: Sequence[Operand], sizes: Sequence[tuple[RankVariable, int]] = ()
) -> Value:
    """A value at other coordinates; it is computed in place only where ranks are merely renamed."""
    plain = len({item.key for item in new if isinstance(item, RankVariable)}) == len(new)
    return Value(At(tuple(old), plain, tuple(sizes)), (value, *new), ranks=union(*(free(item) for item in new)))


def _sliced(items: Sequence[object]) -> bool:
    """Whether any item of an index is what index notation has not."""
    return any(isinstance(item, slice) or item is None or item is Ellipsis for item in items)


def _positional(items: Sequence[object], rank_count: int | None) -> bool:
    """Whether an index is written in torch's way rather than in index notation."""
    if _sliced(items):
        return rank_count is not None
    return rank_count is not None and len(items) < rank_count and not any(isinstance(i, RankVariable) for i in items)


def _subscript(value: Value, items: tuple[object, ...]) -> Value:
    result: Value = _torch().subscript(value, items)
    return result


# --- operations ------------------------------------------------------------------------------------------------------


def pointwise(op: str, *objects: object) -> Value:
    """A pointwise operation over the union of the operands' ranks."""
    operands, axes = together(objects)
    return Value(Pointwise(op), operands, axes=axes)


def filtered(value: object, predicate: object) -> Value:
    """The value where the predicate holds: a statement with that filter, on the expression as it is written."""
    body, test = operand(value), operand(predicate)
    if isinstance(body, Value) and body.axes:
        (body, test), axes = broadcast((body, test))
        return Value(Filtered(), (body, test), ranks=free(body), axes=axes)
    return Value(Filtered(), (body, test), ranks=free(body))
