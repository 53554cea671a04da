"""What torch's functions and methods mean on traced values: one row each, by torch's names.

A torch function that meets a traced value comes here through `__torch_function__`, a method or an attribute of one
through `__getattr__`. Torch itself is not imported: rows are found by name, and their parameters are named as torch
names them, so that a call with an option that has no row here is refused rather than misread.
"""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cascade import ops
from cascade.errors import TraceError, quoted_list
from cascade.frontend.forms import At, Element, Filtered, Ordered, Pointwise, SizeOf
from cascade.frontend.frames import fail
from cascade.frontend.functions import cast
from cascade.frontend.notation import Notation, Tensor, Value, axes_of, operand, pointwise
from cascade.frontend.positional import (
    along_dimensions, cumulative, dimension, dimensions, einsum, extent, gather_rows, matmul, permute, reduce,
    repeat_interleave, reshape, squeeze, subscript, transpose, triangle, unsqueeze, view,
)  # fmt: skip
from cascade.ir import DType

__all__ = ["call", "attribute", "subscript"]

# --- dispatch --------------------------------------------------------------------------------------------------------


def call(name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """A call of a torch function by its name."""
    row = FORMS.get(name.strip("_") if name.startswith("__") else name)
    for item in (*args, *kwargs.values()):
        for inner in item if isinstance(item, tuple | list) else (item,):
            if hasattr(inner, "untyped_storage") and not isinstance(inner, Notation):
                operand(inner)  # refused: a tensor that is not a parameter
    if row is None:
        raise unsupported(f"torch.{name}", name)
    try:
        inspect.signature(row).bind(*args, **kwargs)
    except TypeError as mismatch:
        parameters = inspect.signature(row).parameters.values()
        options = ", ".join(p.name if p.default is p.empty else f"{p.name}={p.default}" for p in parameters)
        raise fail("C427", f"this form of torch.{name} is not supported: {mismatch}", f"{name}({options})") from None
    return row(*args, **kwargs)


class UnknownAttribute(TraceError, AttributeError):
    """An attribute that traced values do not have; `hasattr` says so too."""


def attribute(value: Any, name: str) -> Any:
    """An attribute or a method of a torch tensor on a traced value."""
    if name in PROPERTIES:
        return PROPERTIES[name](value)
    if name in FORMS:
        return lambda *args, **kwargs: call(name, (value, *args), kwargs)
    raise UnknownAttribute(unsupported(f"the tensor method or attribute {name!r}", name).diagnostics)


def unsupported(what: str, name: str) -> TraceError:
    """The error for a name that has no row, with what to write instead."""
    advice = INSTEAD.get(name)
    if advice is None and name.endswith("_") and name.rstrip("_") in FORMS:
        advice = f"nothing is stored into a tensor: x = x.{name.rstrip('_')}(...)"
    if advice is None:
        close = difflib.get_close_matches(name, (*FORMS, *PROPERTIES), n=3)
        advice = f"nearest supported: {quoted_list(close or _COMMON)}; or write it in index notation"
    return fail("C421", f"{what} has no form in the language", advice)


_COMMON = ("einsum", "matmul", "softmax", "sum", "mean", "amax", "where", "rms_norm")
INSTEAD = {
    "cat": "tensors are not joined: keep the parts apart, sum over each and add, or index one tensor with t - n",
    "stack": "tensors are not joined: pass the stacked tensor in as a parameter, W[l, d, f]",
    "chunk": "index the parts: x[t, f] and x[t, f + F], with the extent of f fixed by ranks('f=...') or a parameter",
    "split": "index the parts: x[t, f] and x[t, f + F], with the extent of f fixed by ranks('f=...') or a parameter",
    "detach": "a compiled cascade decides what is differentiated: write it without detach",
    "topk": "index notation has it: values, coordinates = cs.topk[n, j](x[t, n]) with j = cs.ranks('j=2')",
    "scatter": "nothing is stored into a tensor: select with where, or gather with an integer tensor, W[I[t, j], d]",
    "gather": "index with an integer tensor in index notation: W[I[t, j], d]",
    "item": "values are not known while tracing: compute with the tensor itself",
    "tolist": "values are not known while tracing: compute with the tensor itself",
    "conv1d": "write it as an affine index: cs.sum[w, c](X[b, t + w, c] * W[w, c, d])",
    "conv2d": "write it as an affine index: cs.sum[r, s, c](X[b, c, y + r, x + s] * W[d, c, r, s])",
    "multi_head_attention_forward": "write attention as plain maths, or call scaled_dot_product_attention",
}


# --- elementwise -----------------------------------------------------------------------------------------------------


def _operation(op: str) -> Callable[..., Value]:
    if ops.OPS[op].arity == 1:
        return lambda input: pointwise(op, input)
    return lambda input, other: pointwise(op, input, other)


def _add(input: Any, other: Any, *, alpha: float = 1) -> Value:
    return pointwise("add", input, other if alpha == 1 else pointwise("mul", alpha, other))


def _sub(input: Any, other: Any, *, alpha: float = 1) -> Value:
    return pointwise("sub", input, other if alpha == 1 else pointwise("mul", alpha, other))


def _div(input: Any, other: Any, *, rounding_mode: str | None = None) -> Value:
    if rounding_mode not in (None, "floor"):
        raise fail("C427", f"rounding_mode={rounding_mode!r} is not supported", "'floor', or none")
    return pointwise("floordiv" if rounding_mode else "div", input, other)


def _clamp(input: Any, min: Any = None, max: Any = None) -> Value:
    value = input if min is None else pointwise("max", input, min)
    return operand_value(value if max is None else pointwise("min", value, max))


def _gelu(input: Any, approximate: str = "none") -> Value:
    if approximate == "none":
        return pointwise("gelu", input)
    return along_dimensions("gelu_tanh", (), input)


def _softplus(input: Any, beta: float = 1, threshold: float = 20) -> Value:
    if beta != 1:
        return along_dimensions("softplus", (), pointwise("mul", beta, input)) / beta
    return along_dimensions("softplus", (), input)


def _leaky_relu(input: Any, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    x = _activation("relu")(input, inplace).operands[0]
    return pointwise("select", x > 0, x, negative_slope * x)


def _activation(op: str) -> Callable[..., Value]:
    def row(input: Any, inplace: bool = False) -> Value:
        if inplace:
            raise fail("C403", "a tensor is defined once, and nothing is stored into it afterwards", "inplace=False")
        return pointwise(op, input)

    return row


def _masked_fill(input: Any, mask: Any, value: Any) -> Value:
    return pointwise("select", mask, value, input)


def _where(condition: Any, input: Any, other: Any) -> Value:
    return pointwise("select", condition, input, other)


def _dropout(input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Value:
    if training and p > 0:
        raise fail("C421", "dropout draws random numbers, which the language has not", "training=False, or p=0")
    return operand_value(input)


def operand_value(x: Any) -> Value:
    """An operand as a value."""
    value = operand(x)
    return value if isinstance(value, Value) else view(value, (value,))


# --- reductions ------------------------------------------------------------------------------------------------------


def _reduction(reducer: str) -> Callable[..., Value]:
    def row(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
        return reduce(reducer, input if dtype is None else cast(input, dtype), dim, keepdim)

    return row


def _mean(input: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Value:
    return reduce("mean", input if dtype is None else cast(input, dtype), dim, keepdim, library=True)


def _logsumexp(input: Any, dim: Any, keepdim: bool = False) -> Value:
    return reduce("logsumexp", input, dim, keepdim, library=True)


def _extremum(op: str) -> Callable[..., Any]:
    def row(input: Any, dim: Any = None, keepdim: bool = False, *, other: Any = None) -> Any:
        other = dim if isinstance(dim, Notation) else other
        if other is not None:
            return pointwise(op, input, other)
        if dim is None:
            return reduce(op, input)
        return reduce(op, input, dim, keepdim), reduce(f"arg{op}", input, dim, keepdim)

    return row


def _var(
    input: Any, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: int | None = None
) -> Value:
    value = operand_value(input)
    axes = axes_of(value)
    away = pointwise("sub", value, _mean(value, dim, True))
    number = functools.reduce(lambda a, b: a * b, (extent(axes[i]) for i in dimensions(axes, dim)))
    less = (1 if unbiased else 0) if correction is None else correction
    return reduce("sum", away * away, dim, keepdim) / (number - less if less else number)


def _normalised(function: str) -> Callable[..., Value]:
    def row(input: Any, dim: Any = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
        if dim is None:
            raise fail("C427", f"{function} needs the dimension it works along", f"{function}(x, dim=-1)")
        return along_dimensions(function, (dim,), input if dtype is None else cast(input, dtype))

    return row


def _rms_norm(input: Any, normalized_shape: Any, weight: Any = None, eps: float | None = None) -> Value:
    weight = 1 if weight is None else weight
    if eps is None:
        raise fail("C427", "rms_norm needs its eps, whose default depends on the element type", "eps=1e-6")
    if eps == 1e-6:
        return along_dimensions("rmsnorm", _last(normalized_shape), input, weight)
    return along_dimensions("rmsnorm_eps", _last(normalized_shape), input, weight, eps)


def _layer_norm(
    input: Any, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Value:  # fmt: skip
    operands = (input, 1 if weight is None else weight, 0 if bias is None else bias)
    if eps == 1e-5:
        return along_dimensions("layernorm", _last(normalized_shape), *operands)
    return along_dimensions("layernorm_eps", _last(normalized_shape), *operands, eps)


def _last(shape: Any) -> list[int]:
    """The dimensions that a norm works over: as many, from the end, as its shape has."""
    count = len(shape) if isinstance(shape, tuple | list) else 1
    return list(range(-count, 0))


# --- products and attention ------------------------------------------------------------------------------------------


def _linear(input: Any, weight: Any, bias: Any = None) -> Value:
    product = matmul(input, transpose(weight, -1, -2) if len(axes_of(operand(weight))) > 1 else weight)
    return product if bias is None else product + bias


def _addmm(input: Any, mat1: Any, mat2: Any) -> Value:
    return pointwise("add", input, matmul(mat1, mat2))


def _einsum(equation: str, *operands: Any) -> Value:
    flat = operands[0] if len(operands) == 1 and isinstance(operands[0], tuple | list) else operands
    return einsum(equation, flat)


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None,
) -> Value:  # fmt: skip
    """Scaled dot-product attention as plain maths; a Boolean mask, and the causal one, are filters."""
    if dropout_p:
        raise fail("C421", "dropout draws random numbers, which the language has not", "dropout_p=0")
    query = operand_value(query)
    scores = matmul(query, transpose(key, -1, -2))
    scores = scores / pointwise("sqrt", extent(axes_of(query)[-1])) if scale is None else scores * scale
    axes = axes_of(scores)
    row, column = axes[-2:]
    if is_causal and row is not None and column is not None:
        scores = Value(Filtered(), (scores, column <= row), ranks=scores.ranks, axes=axes)
    if attn_mask is not None:
        kind = dtype_known(attn_mask)
        if kind is None:
            help = "say so: trace(fn, shapes, dtypes={'mask': 'bool'}), or write q @ k.mT + mask and softmax yourself"
            raise fail("C426", "whether attn_mask is Boolean is not known while tracing", help)
        scores = scores.where(attn_mask) if kind is DType.BOOL else scores + attn_mask
    return matmul(along_dimensions("softmax", (-1,), scores), value)


def dtype_known(x: Any) -> DType | None:
    """The type of a value where it is evident: a declared parameter, a view of one, or a predicate."""
    if isinstance(x, Tensor):
        return x.dtype_declared
    if isinstance(x, Value) and isinstance(x.form, Element):
        return x.form.tensor.dtype_declared
    if isinstance(x, Value) and isinstance(x.form, At | Ordered):
        return dtype_known(x.operands[0])
    if isinstance(x, Value) and isinstance(x.form, Pointwise) and ops.OPS[x.form.op].kind is ops.Kind.BOOL:
        return DType.BOOL
    return None


def _embedding(
    input: Any, weight: Any, padding_idx: int | None = None, max_norm: float | None = None, norm_type: float = 2.0,
    scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Value:  # fmt: skip
    if max_norm is not None:
        raise fail("C427", "embedding with max_norm stores into its table", "max_norm=None")
    return gather_rows(weight, input)


# --- shapes and types ---------------------------------------------------------------------


def _shape(x: Any) -> tuple[Any, ...]:
    if isinstance(x, Tensor):
        if x.rank_count is None:
            axes_of(operand(x))  # refused: its shape is not known
        sizes = x.sizes or (None,) * (x.rank_count or 0)
        return tuple(1 if size == 1 else Value(SizeOf(tensor=x, position=i)) for i, size in enumerate(sizes))
    order = x.ranks if x.axes is None else x.axes
    return tuple(1 if axis is None else extent(axis) for axis in order)


def _size(x: Any, dim: int | None = None) -> Any:
    shape = _shape(x)
    return shape if dim is None else shape[dimension(shape, dim)]


def _sizes(shape: Sequence[Any]) -> Sequence[Any]:
    return shape[0] if len(shape) == 1 and isinstance(shape[0], tuple | list) else shape


def _to(x: Any, dtype: Any) -> Value:
    return cast(x, dtype) if str(dtype).startswith("torch.") or isinstance(dtype, DType) else _no_type(dtype)


def _no_type(dtype: Any) -> Value:
    help = "x.to(torch.bfloat16) rounds; a cascade runs on the device of its tensors"
    raise fail("C427", f"to({dtype!r}) is not supported", help)


def _casting(dtype: DType) -> Callable[..., Value]:
    return lambda x: cast(x, dtype)


PROPERTIES: dict[str, Callable[[Any], Any]] = {
    "shape": _shape,
    "ndim": lambda x: len(_shape(x)),
    "T": lambda x: permute(x, range(len(_shape(x)))[::-1]),
    "mT": lambda x: transpose(x, -1, -2),
}

_UNARY = ("exp", "exp2", "log", "log2", "sqrt", "rsqrt", "abs", "sign", "floor", "round", "sin", "cos", "tanh", "erf",
          "sigmoid", "neg")  # fmt: skip
_BINARY = ("mul", "pow", "eq", "ne", "lt", "le", "gt", "ge")
_RENAMED = {
    "negative": "neg", "absolute": "abs", "multiply": "mul", "maximum": "max", "minimum": "min", "fmax": "max",
    "remainder": "mod", "floor_divide": "floordiv", "logical_and": "and", "logical_or": "or", "logical_not": "not",
    "bitwise_and": "and", "bitwise_or": "or", "bitwise_not": "not", "greater": "gt", "greater_equal": "ge",
    "less": "lt", "less_equal": "le", "not_equal": "ne", "and": "and", "or": "or", "invert": "not", "mod": "mod",
}  # fmt: skip
_REDUCTIONS = {"sum": "sum", "prod": "prod", "amax": "max", "amin": "min", "all": "all", "any": "any",
               "argmax": "argmax", "argmin": "argmin"}  # fmt: skip

FORMS: dict[str, Callable[..., Any]] = {
    **{name: _operation(name) for name in (*_UNARY, *_BINARY)},
    **{name: _operation(op) for name, op in _RENAMED.items()},
    **{name: _reduction(reducer) for name, reducer in _REDUCTIONS.items()},
    "add": _add, "sub": _sub, "subtract": _sub, "div": _div, "divide": _div, "true_divide": _div, "truediv": _div,
    "rsub": lambda input, other: pointwise("sub", other, input),
    "rtruediv": lambda input, other: pointwise("div", other, input),
    "rpow": lambda input, other: pointwise("pow", other, input),
    "square": lambda input: pointwise("mul", input, input),
    "reciprocal": lambda input: pointwise("div", 1, input),
    "ceil": lambda input: -pointwise("floor", pointwise("neg", input)),
    "clamp": _clamp, "clip": _clamp,
    "clamp_min": lambda input, min: _clamp(input, min),
    "clamp_max": lambda input, max: _clamp(input, None, max),
    "softplus": _softplus, "silu": _activation("silu"), "relu": _activation("relu"), "gelu": _gelu,
    "leaky_relu": _leaky_relu,
    "masked_fill": _masked_fill, "where": _where, "dropout": _dropout,
    "max": _extremum("max"), "min": _extremum("min"), "mean": _mean, "logsumexp": _logsumexp, "var": _var,
    "std": lambda input, dim=None, **options: pointwise("sqrt", _var(input, dim, **options)),
    "softmax": _normalised("softmax"), "log_softmax": _normalised("logsoftmax"),
    "rms_norm": _rms_norm, "layer_norm": _layer_norm,
    "matmul": matmul, "mm": matmul, "bmm": matmul, "mv": matmul, "dot": matmul, "linear": _linear, "addmm": _addmm,
    "einsum": _einsum, "scaled_dot_product_attention": _attention, "embedding": _embedding,
    "transpose": lambda input, dim0, dim1: transpose(input, dim0, dim1),
    "swapaxes": lambda input, axis0, axis1: transpose(input, axis0, axis1),
    "t": lambda input: permute(input, range(len(_shape(input)))[::-1]),
    "permute": lambda input, *dims: permute(input, _sizes(dims)),
    "unsqueeze": lambda input, dim: unsqueeze(input, dim),
    "squeeze": lambda input, dim=None: squeeze(input, dim),
    "reshape": lambda input, *shape: reshape(input, _sizes(shape)),
    "repeat_interleave": lambda input, repeats, dim: repeat_interleave(input, repeats, dim),
    "cumsum": lambda input, dim: cumulative("add", 0, input, dim),
    "cumprod": lambda input, dim: cumulative("mul", 1, input, dim),
    "size": _size, "dim": lambda input: len(_shape(input)), "to": _to, "type": _to, "contiguous": operand_value,
    "view": lambda input, *shape: reshape(input, _sizes(shape)),
    "float": _casting(DType.F32), "double": _casting(DType.F64), "half": _casting(DType.F16),
    "bfloat16": _casting(DType.BF16), "int": _casting(DType.I32), "long": _casting(DType.I64),
    "bool": _casting(DType.BOOL),
    "tril": lambda input, diagonal=0: triangle(input, True, diagonal),
    "triu": lambda input, diagonal=0: triangle(input, False, diagonal),
}  # fmt: skip
