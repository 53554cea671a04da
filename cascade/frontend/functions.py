"""The functions of the Python frontend: reducers, pointwise functions, choosing, scanning, cascades used as functions.

`sum[n](x)` and its like take their ranks in brackets. The names of this module are the public ones of the language, so
many of them shadow Python's own; nothing here uses those.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

from cascade import ops
from cascade.errors import quoted_list
from cascade.frontend.forms import Applied, Casting, Choice, Chosen, Fold, Invocation, Loop, Ordered, Scan, SizeOf
from cascade.frontend.frames import Placed, fail, place, user_frame
from cascade.frontend.notation import (
    Notation, Operand, PreviousValue, RankVariable, Tensor, Value, along_ranks, filtered, free, operand, plural,
    pointwise, rank_list, together, union, without,
)  # fmt: skip
from cascade.ir import Cascade, Definition, DType, Function
from cascade.scopes import along as formal_ranks, signatures

# --- pointwise -------------------------------------------------------------------------------------------------------


class PointwiseFunction:
    """`exp(x)`: an operation of `ops.FUNCTIONS`."""

    def __init__(self, name: str) -> None:
        self.name, self.__name__, self.arity = name, name, ops.FUNCTIONS[name].arity

    def __call__(self, *operands: object) -> Value:
        if len(operands) != self.arity:
            given = f"{self.name} takes {plural(self.arity, 'operand')}, not {len(operands)}"
            also = f"; the reducer is cs.{self.name}[n](x)" if self.name in ops.REDUCERS else ""
            raise fail("C415", given, f"cs.{self.name}({', '.join('abc'[: self.arity])}){also}")
        return pointwise(self.name, *operands)


def cast(value: object, dtype: object) -> Value:
    """`cast(x, "bf16")`: a rounding to a type, named as in the language or by torch's object."""
    operands, axes = together([value])
    return Value(Casting(dtype_of(dtype)), operands, axes=axes)


def dtype_of(written: object) -> DType:
    """The type that a name of the language or a torch type means."""
    named = written.value if isinstance(written, DType) else str(written).removeprefix("torch.")
    found = _TYPES.get(named)
    if found is None:
        raise fail("C413", f"{named!r} is not a type", f"types: {quoted_list((kind.value for kind in DType), 10)}")
    return found


_TYPES = {kind.value: kind for kind in DType} | {
    "bfloat16": DType.BF16, "float16": DType.F16, "half": DType.F16, "float32": DType.F32, "float": DType.F32,
    "float64": DType.F64, "double": DType.F64, "float8_e4m3fn": DType.F8E4M3, "float8_e5m2": DType.F8E5M2,
    "int8": DType.I8, "int32": DType.I32, "int": DType.I32, "int64": DType.I64, "long": DType.I64,
}  # fmt: skip


def where(value: object, predicate: object, *other: object) -> Value:
    """`where(x, n <= m)`: x where the predicate holds, absent elsewhere; with three operands, torch's `where`."""
    return pointwise("select", value, predicate, *other) if other else filtered(value, predicate)


def default(value: object, other: object) -> Value:
    """`default(x, c)`: x where it is present, c where it is absent."""
    return pointwise("default", value, other)


# --- reductions and rank functions -----------------------------------------------------------------------------------


class Reduction:
    """`sum[n](x)`: a reducer, with its ranks in brackets; `max(a, b)` and `min(a, b)` are pointwise."""

    def __init__(self, name: str) -> None:
        self.name, self.__name__ = name, name

    def __getitem__(self, written: object) -> Callable[[object], Value]:
        return functools.partial(fold, self.name, along_ranks(written, self.name))

    def __call__(self, *operands: object) -> Value:
        if self.name in ops.FUNCTIONS and len(operands) > 1:
            return FUNCTIONS[self.name](*operands)
        raise fail("C407", f"{self.name} needs the ranks it folds", f"cs.{self.name}[n](x), with n = cs.ranks('n')")


def fold(reducer: str, along: tuple[RankVariable, ...], body: object) -> Value:
    """A primitive reduction: its ranks leave the value."""
    value = _indexed(body, reducer)
    missing = without(along, free(value))
    if missing and free(value):
        message = f"the value that {reducer} folds has no rank {missing[0].name}; it has {rank_list(free(value))}"
        raise fail("C414", message, "reduce over a rank that is free in the expression inside the parentheses")
    loop = value.recurrent if isinstance(value, Value) else None
    if loop is not None and loop.order is not None and (foreign := without(along, loop.order)):
        message = f"the previous value has the ranks {rank_list(loop.order)}, and {reducer} folds {foreign[0].name}"
        raise fail("C419", message, "inside a reduction say which element is meant: prev[t - 1, d]")
    return Value(Fold(reducer, along), (value,), ranks=without(free(value), along))


def _indexed(object_: object, what: str) -> Operand:
    """An operand of index notation."""
    value = operand(object_)
    if isinstance(value, Value) and value.axes:
        help = f"index the tensor first, cs.{what}[n](x[m, n]), or use the method with a dimension, x.{what}(-1)"
        raise fail("C411", "this mixes index notation and whole tensors", help)
    return value


class LibraryFunction:
    """`softmax[n](x)`, `layernorm[d](x, g, b)`, `softcap(x, c)`: a function of the library, its ranks in brackets."""

    def __init__(self, name: str) -> None:
        self.name, self.__name__ = name, name

    def __getitem__(self, written: object) -> Callable[..., Value]:
        return functools.partial(apply_function, self.name, along_ranks(written, self.name))

    def __call__(self, *operands: object) -> Value:
        return apply_function(self.name, (), *operands)


def apply_function(name: str, along: tuple[RankVariable, ...], *operands: object) -> Value:
    """A function of the library over its operands; its definition tells which ranks it keeps."""
    function = library(name)
    assert isinstance(function, Function), name
    ranks_ = f"[{', '.join(function.ranks)}]" if function.ranks else ""
    form = f"cs.{name}{ranks_}({', '.join(function.params)})"
    if formal_ranks(function, tuple(str(rank.key) for rank in along)) is None:
        raise fail("C407", f"{name} works along {plural(len(function.ranks), 'rank')}, not {len(along)}", form)
    if len(operands) != len(function.params):
        raise fail("C415", f"{name} takes {plural(len(function.params), 'operand')}, not {len(operands)}", form)
    args = tuple(_indexed(o, name) for o in operands)
    return Value(Applied(name, along), args, ranks=kept_ranks(function, along, args))


def kept_ranks(
    function: Function, along: tuple[RankVariable, ...], args: Sequence[Operand]
) -> tuple[RankVariable, ...]:
    """The ranks of an application: those of its operands less those that the definition binds all around them."""
    pairs = formal_ranks(function, tuple(str(rank.key) for rank in along)) or {}
    bound = signatures(library_definitions(function.name))[function.name].must
    stays: list[tuple[RankVariable, ...]] = []
    for arg, formal in zip(args, bound, strict=True):
        gone = {key for name in formal or () for key in pairs.get(name, ())}
        stays.append(() if formal is None else tuple(rank for rank in free(arg) if str(rank.key) not in gone))
    return union(*stays)


def library(name: str) -> Definition:
    """The definition of that name in the library."""
    return library_definitions(name)[-1]


def library_definitions(*names: str) -> tuple[Definition, ...]:
    """The definitions of these names and those they use, callees first; the library is parsed when first asked for."""
    found: tuple[Definition, ...] = importlib.import_module("cascade.frontend.build").library_uses(names)
    return found


# --- choosing --------------------------------------------------------------------------------------------------------


class TopK:
    """`G, I = topk[n, j](x)` with `j = ranks("j=2")`, or `topk[n, 2, j](x)`: the largest along n and where they are."""

    __name__ = "topk"

    def __getitem__(self, written: object) -> Callable[..., tuple[Value, Value]]:
        items = written if isinstance(written, tuple) else (written,)
        along, *count, kept = items if len(items) in (2, 3) else (None, None)
        if not isinstance(along, RankVariable) or not isinstance(kept, RankVariable):
            help = "j = cs.ranks('j=2'), then values, coordinates = cs.topk[n, j](x); or cs.topk[n, 2, j](x)"
            raise fail("C420", "topk takes the rank it chooses along and the rank of the kept ones", help)
        return functools.partial(_choose, along, count[0] if count else kept.extent, kept)


def _choose(
    along: RankVariable, k: object, kept: RankVariable, body: object, where: object = None
) -> tuple[Value, Value]:
    value = _indexed(body, "topk")
    k = k.form if isinstance(k, Value) else k
    if isinstance(k, bool) or not isinstance(k, int | SizeOf):
        raise fail("C420", "topk keeps a number of elements", "a whole number, or the extent of a rank: j.extent")
    if not without((kept,), free(value)) or without((along,), free(value)):
        message = f"topk chooses along a rank of the value and adds one; the value has {rank_list(free(value))}"
        raise fail("C420", message, "values, coordinates = cs.topk[n, j](x), where x has n and not j")
    order = (*without(free(value), (along,)), kept)
    operands = (value,) if where is None else (value, operand(where))
    choice = Choice(along, k, kept)
    choice.parts.extend(Value(Chosen(choice, part), operands, ranks=order) for part in (0, 1))
    return choice.parts[0], choice.parts[1]


# --- iterative ranks -------------------------------------------------------------------------------------------------


class ScanFunction:
    """`H = scan[t](lambda prev: A[t, d] * prev + X[t, d], init=0)`: a value defined from its earlier coordinates.

    `prev` is the value one step back; `prev[t - 2, e]` reads it anywhere earlier, with its ranks in the order
    `order=(t, d)`, which is then also that of the result. Several initial values, `init=(a, b)`, are those at -1, -2.
    `where` filters the steps.
    """

    __name__ = "scan"

    def __getitem__(self, written: object) -> Callable[..., Value]:
        along = along_ranks(written, "scan")
        if len(along) != 1:
            raise fail("C419", "scan steps along one rank", "cs.scan[t](lambda prev: ..., init=0)")
        return functools.partial(_scan, along[0])


def _scan(
    along: RankVariable, step: Callable[[Any], object], init: object = None, order: object = None, where: object = None
) -> Value:
    if not callable(step) or isinstance(step, Notation) or init is None:
        form = "cs.scan[t](lambda prev: A[t, d] * prev + X[t, d], init=0)"
        raise fail("C419", "scan takes a function of the previous value, and the initial value", form)
    loop = Loop(along, None if order is None else along_ranks(order, "order"))
    body = _indexed(step(PreviousValue(loop)), "scan")
    found = free(body) if not without((along,), free(body)) else (along, *free(body))
    if loop.order is None and loop.asked:  # what the previous value has was not known: step again, knowing it
        loop = Loop(along, found)
        body = _indexed(step(PreviousValue(loop)), "scan")
        found = union((*free(body), along))
    ranks_ = loop.order or found
    if without(found, ranks_) or without(ranks_, found):
        message = f"the step has the ranks {rank_list(found)}, the scan {rank_list(ranks_)}"
        raise fail("C419", message, "order=(t, d) names the ranks of the step, the iterative one included")
    starts = tuple(_indexed(start, "scan") for start in (init if isinstance(init, tuple | list) else (init,)))
    filters = () if where is None else (operand(where),)
    loop.order = ranks_
    loop.value = Value(Scan(loop, len(starts), bool(filters)), (body, *starts, *filters), ranks=ranks_)
    return loop.value


# --- cascades as functions -------------------------------------------------------------------------------------------


def invoke(callee: Cascade, *args: object) -> Tensor | tuple[Tensor, ...]:
    """A cascade used as a function of whole tensors in a traced one: `A = invoke(attention.cascade, Q, K, V)`.

    A value is passed with its ranks in its own order. The results are tensors, to be indexed or returned.
    """
    if len(args) != len(callee.params):
        names = quoted_list(param.name for param in callee.params)
        raise fail("C415", f"{callee.name} takes {len(callee.params)} tensors, not {len(args)}", f"tensors: {names}")
    tensors: list[Tensor | Value] = []
    for param, arg in zip(callee.params, args, strict=True):
        tensor = arg if isinstance(arg, Tensor) else tensor_of(operand(arg))
        if isinstance(tensor, Tensor) and tensor.rank_count is None:
            tensor.rank_count, tensor.read = len(param.shape), place(user_frame())
        count = tensor.rank_count if isinstance(tensor, Tensor) else len(free(tensor))
        if count != len(param.shape):
            message = f"{param.name} of {callee.name} has {len(param.shape)} ranks, the tensor given has {count}"
            raise fail("C415", message, f"it is declared {param.name}[{','.join(map(str, param.shape))}]")
        tensors.append(tensor)
    recorder = next((tensor.recorder for tensor in tensors if tensor.recorder), None)
    if recorder is None:
        raise fail("C409", f"{callee.name} is given no tensor of the traced function", "call it with tensors instead")
    frame = user_frame()
    recorder.observe(frame)
    call = Invocation(callee, tuple(tensors), Placed(place(frame)))
    call.results.extend(
        Tensor(result.name, recorder, (None,) * len(result.shape), call.place.span, call) for result in callee.results
    )
    return call.results[0] if len(call.results) == 1 else tuple(call.results)


def tensor_of(value: Operand) -> Value:
    """An operand that can become a tensor: a coordinate as the values that it takes."""
    return Value(Ordered(), (value,)) if isinstance(value, RankVariable) else value


# --- the names of the language ---------------------------------------------------------------------------------------

FUNCTIONS = {name: PointwiseFunction(name) for name in ops.FUNCTIONS}
REDUCTIONS = {name: Reduction(name) for name in ops.REDUCERS}

sum, prod, max, min = (REDUCTIONS[name] for name in ("sum", "prod", "max", "min"))
any, all, count = (REDUCTIONS[name] for name in ("any", "all", "count"))
argmax, argmin = REDUCTIONS["argmax"], REDUCTIONS["argmin"]
mean, logsumexp, softmax = (LibraryFunction(name) for name in ops.LIBRARY_REDUCTIONS)
topk, scan = TopK(), ScanFunction()
exp, exp2, log, log2 = (FUNCTIONS[name] for name in ("exp", "exp2", "log", "log2"))
sqrt, rsqrt, abs, sign = (FUNCTIONS[name] for name in ("sqrt", "rsqrt", "abs", "sign"))
floor, round, sin, cos = (FUNCTIONS[name] for name in ("floor", "round", "sin", "cos"))
tanh, sigmoid, silu, gelu = (FUNCTIONS[name] for name in ("tanh", "sigmoid", "silu", "gelu"))
relu, erf, pow, select, clamp = (FUNCTIONS[name] for name in ("relu", "erf", "pow", "select", "clamp"))
