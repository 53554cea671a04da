"""The Python frontend: a function that computes with tensors, traced into a cascade.

    def attention(Q, K, V):
        b, h, m, n, e, f = ranks("b h m n e f")
        S = (sum[e](Q[b, h, m, e] * K[b, h, n, e]) / sqrt(e.extent)).where(n <= m)
        P = exp(S - max[n](S))
        return (sum[n](P * V[b, h, n, f]) / sum[n](P))[b, h, m, f]

    trace(attention)  -->  cascade attention(Q[B,H,M,E], K[B,H,N,E], V[B,H,N,F]) -> out[B,H,M,F] {
                               S[b,h,m,n] = (sum[e] Q[b,h,m,e] * K[b,h,n,e]) / sqrt(E) where n <= m
                               P[b,h,m,n] = exp(S[b,h,m,n] - (max[n] S[b,h,m,n]))
                               out[b,h,m,f] = (sum[n] P[b,h,m,n] * V[b,h,n,f]) / (sum[n] P[b,h,m,n])
                           }

The function runs once, as ordinary Python, on symbolic tensors: loops unroll, helpers are called, nothing of its source
is read or rewritten. Statements are named as the user's variables are, a result that has no name is `out`.

Parameters with a default are plain Python values (`eps=1e-6`, `causal=True`); all others are tensors, or lists, tuples
and dictionaries of tensors, which become parameters of the cascade one by one: `W_0`, `W_1_gate`. How many a list holds
only `shapes` can tell.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from cascade.frontend.forms import Element, Ordered
from cascade.frontend.frames import Recorder, definition_place, fail
from cascade.frontend.functions import (
    LibraryFunction, abs, all, any, argmax, argmin, cast, clamp, cos, count, default, dtype_of, erf,
    exp, exp2, floor, gelu, invoke, library, log, log2, logsumexp, max, mean, min, pow, prod, relu,
    round, rsqrt, scan, select, sigmoid, sign, silu, sin, softmax, sqrt, sum, tanh, topk, where,
)  # fmt: skip
from cascade.frontend.naming import build, legal
from cascade.frontend.notation import (
    Filled, Notation, PreviousValue, RankVariable, Tensor, Value, described, new_axis, ranks, whole,
)  # fmt: skip
from cascade.frontend.program import Program
from cascade.ir import Cascade, Const, DType, Size

__all__ = [
    "trace", "invoke", "flatten", "ranks", "Notation", "RankVariable", "Tensor", "Value",
    "sum", "prod", "max", "min", "any", "all", "count", "argmax", "argmin", "mean", "logsumexp", "softmax",
    "topk", "scan", "where", "default", "select", "cast", "clamp", "pow", "exp", "exp2", "log", "log2", "sqrt", "rsqrt",
    "abs", "sign", "floor", "round", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu", "erf",
    "library_callable",
]  # fmt: skip


def trace(
    function: Callable[..., Any],
    shapes: Mapping[str, Any] | None = None,
    dtypes: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Cascade:
    """The cascade of a Python function.

    `shapes` gives an example shape for each tensor, by parameter: `{"x": (2, 64), "layers": [(64, 64), (64, 64)]}`.
    Index notation does not need it; torch's style, where dimensions have no names, and lists of tensors do. Only the
    number of dimensions and which of them are 1 are taken from a shape, never the numbers, except where the function
    itself cuts a dimension into parts of given sizes. A shape symbol may stand for a number: `{"x": ("T", "D")}`.
    `dtypes` declares types; `options` are values for parameters that have defaults.
    """
    recorder = Recorder(sys._getframe())
    types = {name: dtype_of(dtype) for name, dtype in (dtypes or {}).items()}
    positional, named, tensors = _arguments(function, recorder, shapes or {}, types, options or {})
    returned = function(*positional, **named)
    recorder.finish()
    results, fills = _results(function, returned)
    for tensor in tensors:
        if tensor.rank_count is None:
            help = "remove it, or give it a default: parameters with a default are no tensors"
            raise fail("C424", f"{tensor.name} is never used, so its ranks are not known", help, at=tensor.span)
    program = Program(results, recorder)
    name = legal(getattr(function, "__name__", "")) or "traced"
    return build(name, tensors, program, fills, definition_place(function))


# --- arguments -------------------------------------------------------------------------------------------------------


def _arguments(
    function: Callable[..., Any], recorder: Recorder, shapes: Mapping[str, Any], dtypes: Mapping[str, DType],
    options: Mapping[str, Any],
) -> tuple[list[Any], dict[str, Any], list[Tensor]]:  # fmt: skip
    """What the function is called with: symbolic tensors, and plain values where parameters have defaults."""
    positional: list[Any] = []
    named: dict[str, Any] = {}
    tensors: list[Tensor] = []
    for parameter in inspect.signature(function).parameters.values():
        name = parameter.name
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            help = "name the tensors one by one, or take a list of them: def f(x, weights)"
            place = definition_place(function, name)
            raise fail("C417", f"a traced function cannot take {parameter}", help, at=place)
        plain = parameter.default is not parameter.empty and name not in shapes
        value = options.get(name, parameter.default) if plain else None
        if not plain:
            span = definition_place(function, name)
            found = list(_leaves(name, shapes.get(name)))
            made = {n: Tensor(n, recorder, sizes, span, None, dtypes.get(n)) for n, sizes in found}
            tensors += made.values()
            value = _structure(name, shapes.get(name), made)
        if parameter.kind is parameter.KEYWORD_ONLY:
            named[name] = value
        else:
            positional.append(value)
    return positional, named, tensors


def _leaves(name: str, shape: Any) -> Iterator[tuple[str, tuple[Size, ...] | None]]:
    """The tensors of a parameter, each with its name and its sizes if they are known."""
    if isinstance(shape, Mapping):
        for key, item in shape.items():
            yield from _leaves(f"{name}_{key}", item)
    elif isinstance(shape, list) or (isinstance(shape, tuple) and not _is_shape(shape)):
        for i, item in enumerate(shape):
            yield from _leaves(f"{name}_{i}", item)
    else:
        sizes = getattr(shape, "shape", shape)
        yield name, None if sizes is None else tuple(size if isinstance(size, str) else int(size) for size in sizes)


def _structure(name: str, shape: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The symbolic tensor of a parameter, or the list, tuple or dictionary of them that its shapes show."""
    if isinstance(shape, Mapping):
        return {key: _structure(f"{name}_{key}", item, tensors) for key, item in shape.items()}
    if isinstance(shape, list) or (isinstance(shape, tuple) and not _is_shape(shape)):
        items = [_structure(f"{name}_{i}", item, tensors) for i, item in enumerate(shape)]
        return items if isinstance(shape, list) else tuple(items)
    return tensors[name]


def _is_shape(shape: tuple[Any, ...]) -> bool:
    return not [size for size in shape if not isinstance(size, int | str)]


def flatten(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of an argument under the names that they have as parameters of the cascade."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flatten(f"{name}_{key}", item)
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from flatten(f"{name}_{i}", item)
    else:
        yield legal(name), value


# --- results ---------------------------------------------------------------------------------------------------------


def _results(function: Callable[..., Any], returned: Any) -> tuple[list[Value | Tensor], list[Const]]:
    """The returned tensors, each a value of its own, and what their absent coordinates are stored as."""
    results: list[Value | Tensor] = []
    fills: list[Const] = []
    for item in returned if isinstance(returned, tuple | list) else (returned,):
        value, fill = (item.value, item.fill) if isinstance(item, Filled) else (item, 0)
        if not isinstance(value, Notation) or isinstance(value, PreviousValue | Filled):
            what = "nothing" if value is None else described(value)
            what += " among its results" if value is not returned else ""
            help = "a traced function returns one tensor, or a tuple of them"
            raise fail("C418", f"{function.__name__} returns {what}", help, at=definition_place(function))
        results.append(_result(value, [known.key for known in results]))
        fills.append(Const(fill))
    if not results:
        help = "a traced function returns one tensor, or a tuple of them"
        raise fail("C418", f"{function.__name__} returns no tensor", help, at=definition_place(function))
    return results, fills


def _result(value: Notation, before: list[int]) -> Value | Tensor:
    """A returned value as something that a statement can define; a second mention becomes a copy."""
    if isinstance(value, RankVariable):
        return Value(Ordered(), (value,))
    if isinstance(value, Tensor):
        return value if value.origin is not None and value.key not in before else _copy(value)
    assert isinstance(value, Value)
    if value.axes is not None and len(value.axes) != len(value.ranks):
        help = "return it without that dimension: x.squeeze(-1), or keepdim=False"
        raise fail("C423", "a returned tensor has a dimension of extent 1 that no rank stands for", help, at=value.span)
    return Value(Ordered(), (value,), ranks=value.ranks) if value.key in before else value


def _copy(tensor: Tensor) -> Value:
    """A parameter that is returned as it is."""
    if tensor.rank_count is None:
        return whole(tensor)
    index = tuple(new_axis(None) for _ in range(tensor.rank_count))
    return Value(Element(tensor), index, recorder=tensor.recorder)


def library_callable(name: str) -> Callable[..., Any]:
    """A definition of the library as a function of notation: `rmsnorm[d](x, g)`, `attention(Q, K, V)`.

    KeyError where the library has none of that name.
    """
    definition = library(name)
    if isinstance(definition, Cascade):
        return lambda *tensors: invoke(definition, *tensors)
    return LibraryFunction(name)
