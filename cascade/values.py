"""Tensors with named ranks and absent coordinates, and what each operation and reducer does to them, on torch.

The arithmetic half of the interpreter. A `Value` is a torch tensor whose dimensions are rank variables, a mask of the
coordinates that are present, and the element type the language gives it. Data at absent coordinates is arbitrary and
never reaches a present one: reductions replace it by the reducer's identity before they fold.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from cascade.errors import CallError, Diagnostic, Span
from cascade.inference import FLOATS, Typed, meet, type_of_apply, type_of_reduce
from cascade.ir import Const, DType
from cascade.ops import REDUCERS

TORCH_TYPES: dict[DType, torch.dtype] = {
    DType.BF16: torch.bfloat16,
    DType.F16: torch.float16,
    DType.F32: torch.float32,
    DType.F64: torch.float64,
    DType.F8E4M3: torch.float8_e4m3fn,
    DType.F8E5M2: torch.float8_e5m2,
    DType.I8: torch.int8,
    DType.I32: torch.int32,
    DType.I64: torch.int64,
    DType.BOOL: torch.bool,
}
FROM_TORCH: dict[torch.dtype, DType] = {torch_type: dtype for dtype, torch_type in TORCH_TYPES.items()}


class Precision(Enum):
    """How numbers are held while a cascade is interpreted."""

    REFERENCE = "reference"  # every float in float64, every integer in int64: what a cascade means
    COMPUTE = "compute"  # the types of the language: 16- and 8-bit floats computed in f32, rounded in the results
    EAGER = "eager"  # as COMPUTE, and every statement's result rounded to its type, as an unfused program would

    def storage(self, dtype: DType) -> torch.dtype:
        """The torch type in which values of a language type are computed."""
        if dtype is DType.BOOL:
            return torch.bool
        if dtype not in FLOATS:
            return torch.int64
        return torch.float64 if self is Precision.REFERENCE or dtype is DType.F64 else torch.float32


@dataclass(frozen=True, slots=True, eq=False)
class Value:
    """`data[ranks]` with its type; `present` is None where every coordinate is, else a mask of the same ranks.

    A dimension, of the data or of the mask, may have extent 1 where it does not vary along its rank. Constants and
    coordinates are `weak`: they take the type of what they meet.
    """

    data: Tensor
    ranks: tuple[str, ...]
    dtype: DType
    present: Tensor | None = None
    weak: bool = False


def align(data: Tensor, ranks: Sequence[str], wanted: Sequence[str]) -> Tensor:
    """The tensor with its dimensions in the order `wanted`, extent 1 where it has no such rank."""
    if ranks == wanted:
        return data
    if not ranks:
        return data.reshape((1,) * len(wanted))
    order = [ranks.index(rank) for rank in wanted if rank in ranks]
    moved = data if order == list(range(len(order))) else data.permute(order)
    for position, rank in enumerate(wanted):
        if rank not in ranks:
            moved = moved.unsqueeze(position)
    return moved


def union(*groups: Sequence[str]) -> tuple[str, ...]:
    """The names of all groups, each once, in order of first appearance."""
    first = groups[0] if groups else ()
    if all(group == first for group in groups[1:]):
        return tuple(first)  # names differ within a group, so it is the union itself
    return tuple(dict.fromkeys(name for group in groups for name in group))


def both(*masks: Tensor | None) -> Tensor | None:
    """Where all masks hold; None stands for everywhere."""
    result: Tensor | None = None
    for mask in masks:
        result = mask if result is None else result if mask is None else result & mask
    return result


def constant(value: bool | int | float, device: torch.device) -> Value:
    """A number as a weak value; it is exact until it meets a type."""
    if isinstance(value, bool):
        return Value(torch.tensor(value, device=device), (), DType.BOOL)
    if isinstance(value, int):
        return Value(torch.scalar_tensor(value, dtype=torch.int64, device=device), (), DType.I64, weak=True)
    return Value(torch.scalar_tensor(value, dtype=torch.float64, device=device), (), DType.F32, weak=True)


def typed(value: Value) -> Typed:
    """The type of a value, as inference speaks of it."""
    return Typed(value.dtype, value.weak)


def common_type(args: Sequence[Value]) -> tuple[DType, bool]:
    """The type that operands meet in, and whether it is still weak."""
    found = meet([typed(arg) for arg in args])
    assert found is not None
    return found.dtype, found.weak


def convert(value: Value, dtype: DType, weak: bool, precision: Precision) -> Tensor:
    """The data in the type that an operation computes in; weak floats stay in float64."""
    target = torch.float64 if weak and dtype in FLOATS else precision.storage(dtype)
    return value.data if value.data.dtype is target else value.data.to(target)


PARTIAL = ("floordiv", "mod", "pow")  # of integers, these have no value for some right operands

_POINTWISE: dict[str, Callable[..., Tensor]] = {
    "or": torch.logical_or,
    "and": torch.logical_and,
    "not": torch.logical_not,
    "eq": torch.eq,
    "ne": torch.ne,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.true_divide,
    "floordiv": torch.floor_divide,
    "mod": torch.remainder,
    "neg": torch.neg,
    "exp": torch.exp,
    "exp2": torch.exp2,
    "log": torch.log,
    "log2": torch.log2,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "abs": torch.abs,
    "sign": torch.sign,
    "floor": lambda x: torch.floor(x) if x.is_floating_point() else x,
    "round": lambda x: torch.round(x) if x.is_floating_point() else x,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "erf": torch.erf,
    "pow": torch.pow,
    "min": torch.minimum,
    "max": torch.maximum,
    "clamp": lambda x, low, high: torch.minimum(torch.maximum(x, low), high),
}
"""What every pointwise operation computes; `default` and `select` have arms of their own in `apply`."""


def apply(op: str, args: Sequence[Value], precision: Precision, span: Span | None = None) -> Value:
    """A pointwise operation; present where all operands are, `default` where either is. `span` is for errors."""
    ranks = union(*[arg.ranks for arg in args])
    operands = args[1:] if op == "select" else args
    result_type, dtype, weak = _types(op, tuple([(arg.dtype, arg.weak) for arg in args]))
    data = [align(convert(arg, dtype, weak, precision), arg.ranks, ranks) for arg in operands]
    masks = [None if arg.present is None else align(arg.present, arg.ranks, ranks) for arg in args]
    if op == "default":
        return _default(data, masks, ranks, dtype, weak)
    if op == "select":
        chosen = align(args[0].data.bool(), args[0].ranks, ranks)
        return Value(torch.where(chosen, data[0], data[1]), ranks, dtype, both(*masks), weak)
    if op in PARTIAL and dtype not in FLOATS:
        _check_integer_operands(op, data[1], both(*masks), span)
        data[1] = data[1].masked_fill(data[1] == 0, 1) if op != "pow" else data[1].clamp(min=0)
    return Value(_POINTWISE[op](*data), ranks, result_type.dtype, both(*masks), result_type.weak)


@functools.cache
def _types(op: str, args: tuple[tuple[DType, bool], ...]) -> tuple[Typed, DType, bool]:
    """The type of a result, and the one that the operands are brought to: that, for a comparison their own.

    Operands are given as types that are weak or not.
    """
    operands = [Typed(dtype, weak) for dtype, weak in args]
    result = type_of_apply(op, operands)
    assert result is not None
    if op in ("and", "or", "not"):
        return result, DType.BOOL, False
    computed = meet(operands[1:] if op == "select" else operands) if result.dtype is DType.BOOL else result
    assert computed is not None
    return result, computed.dtype, computed.weak


def _default(data: list[Tensor], masks: list[Tensor | None], ranks: tuple[str, ...], dtype: DType, weak: bool) -> Value:
    if masks[0] is None:
        return Value(data[0], ranks, dtype, None, weak)
    present = None if masks[1] is None else masks[0] | masks[1]
    return Value(torch.where(masks[0], data[0], data[1]), ranks, dtype, present, weak)


def _check_integer_operands(op: str, right: Tensor, present: Tensor | None, span: Span | None) -> None:
    """Integer division by zero and integer powers below zero have no value: say so instead of inventing one."""
    bad = right < 0 if op == "pow" else right == 0
    if bool((bad if present is None else bad & present).any()):
        what = "an integer raised to a negative power" if op == "pow" else "an integer divided by zero"
        hint = "make an operand a float, or filter these coordinates with `where`"
        raise CallError(Diagnostic("C310", what, span, hint))


def cast(value: Value, dtype: DType, precision: Precision) -> Value:
    """The value rounded to a type, held in the type it is computed in."""
    rounded = value.data.to(TORCH_TYPES[dtype]).to(precision.storage(dtype))
    return Value(rounded, value.ranks, dtype, value.present)


def keep(value: Value, mask: Value) -> Value:
    """The value where a predicate holds: coordinates that fail it become absent."""
    ranks = union(value.ranks, mask.ranks)
    test = both(mask.data, mask.present)
    assert test is not None
    present = None if value.present is None else align(value.present, value.ranks, ranks)
    data = align(value.data, value.ranks, ranks)
    return Value(data, ranks, value.dtype, both(align(test, mask.ranks, ranks), present), value.weak)


def expand(value: Value, ranks: Sequence[str], extents: Sequence[int]) -> Value:
    """The value over exactly these ranks at their full extents."""
    ranks, shape = tuple(ranks), tuple(extents)
    if value.ranks == ranks and value.data.shape == shape and (value.present is None or value.present.shape == shape):
        return value
    data = align(value.data, value.ranks, ranks).expand(shape)
    present = None if value.present is None else align(value.present, value.ranks, ranks).expand(shape)
    return Value(data, ranks, value.dtype, present, value.weak)


def identity_of(reducer: str, storage: torch.dtype) -> bool | int | float:
    """The value of a reduction over nothing, in a torch type."""
    identity = REDUCERS[reducer].identity
    assert identity is not None
    if isinstance(identity, float) and not storage.is_floating_point and storage is not torch.bool:
        return torch.iinfo(storage).max if identity > 0 else torch.iinfo(storage).min
    return identity > 0 if storage is torch.bool else identity


def reduce(reducer: str, value: Value, ranks: Sequence[str], precision: Precision) -> Value:
    """A fold over the present coordinates of `ranks`, which the value has at full extent."""
    kept = tuple(rank for rank in value.ranks if rank not in ranks)
    order = (*kept, *ranks)
    split = len(kept)
    data = align(value.data, value.ranks, order).flatten(split)
    present = None if value.present is None else align(value.present, value.ranks, order).flatten(split)
    result = type_of_reduce(reducer, typed(value))
    assert result is not None
    some = None if present is None else present.any(-1)
    if reducer in ("argmax", "argmin"):
        return _arg_extreme(reducer, data, present, kept)
    if reducer == "count":
        ones = torch.ones_like(data, dtype=torch.int64) if present is None else present.long()
        return Value(ones.sum(-1), kept, result.dtype, some)
    if not value.weak:
        data = data.to(precision.storage(value.dtype if reducer in ("any", "all") else result.dtype))
    identity = identity_of(reducer, data.dtype)
    if present is not None:
        data = data.masked_fill(~present, identity)
    return Value(_fold(reducer, data, identity), kept, result.dtype, some, result.weak)


def _fold(reducer: str, data: Tensor, identity: bool | int | float) -> Tensor:
    if data.shape[-1] == 0:
        return torch.full(data.shape[:-1], identity, dtype=data.dtype, device=data.device)
    match reducer:
        case "sum":
            return data.sum(-1)
        case "prod":
            return data.prod(-1)
        case "max":
            return data.amax(-1)
        case "min":
            return data.amin(-1)
        case "any":
            return data.any(-1)
        case "all":
            return data.all(-1)
        case _:
            raise AssertionError(reducer)


def _arg_extreme(reducer: str, data: Tensor, present: Tensor | None, kept: tuple[str, ...]) -> Value:
    """The lowest coordinate of an extreme present element (of a NaN, where there is one)."""
    if present is None:
        present = torch.ones_like(data, dtype=torch.bool)
    fold = "max" if reducer == "argmax" else "min"
    identity = identity_of(fold, data.dtype)
    best = _fold(fold, data.masked_fill(~present, identity), identity).unsqueeze(-1)
    candidates = present & ((data == best) | (data != data))
    count = data.shape[-1]
    coordinates = torch.arange(count, device=data.device).expand(data.shape)
    first = _fold("min", coordinates.masked_fill(~candidates, count), count)
    return Value(first, kept, DType.I64, present.any(-1))


def top_k(value: Value, rank: str, k: int, kept: str) -> tuple[Value, Value]:
    """The k largest present elements along a rank, sorted, ties to the lower coordinate: values and coordinates."""
    order = (*(r for r in value.ranks if r != rank), rank)
    data = align(value.data, value.ranks, order)
    present = (
        torch.ones_like(data, dtype=torch.bool) if value.present is None else align(value.present, value.ranks, order)
    )
    missing = k - data.shape[-1]
    if missing > 0:
        data = torch.nn.functional.pad(data, (0, missing))
        present = torch.nn.functional.pad(present, (0, missing))
    by_value = torch.sort(data, dim=-1, descending=True, stable=True).indices
    by_presence = torch.sort(present.gather(-1, by_value).byte(), dim=-1, descending=True, stable=True).indices
    chosen = by_value.gather(-1, by_presence)[..., :k]
    there = None if value.present is None and missing <= 0 else present.gather(-1, chosen)
    ranks = (*order[:-1], kept)
    values = Value(data.gather(-1, chosen), ranks, value.dtype, there, value.weak)
    return values, Value(chosen, ranks, DType.I64, there)


def contract(factors: Sequence[Value], ranks: Sequence[str], dtype: DType, precision: Precision) -> Value | None:
    """The sum over `ranks` of a product of float factors without forming the product; None where that is unsafe.

    It is unsafe where a factor holds a NaN or an infinity and some coordinates are absent: the zero that stands for an
    absent factor does not silence it.
    """
    kept = tuple(rank for rank in union(*(factor.ranks for factor in factors)) if rank not in ranks)
    masks = [factor for factor in factors if factor.present is not None]
    data = [convert(factor, dtype, False, precision) for factor in factors]
    if masks and not all(bool(torch.isfinite(d).all()) for d in data):
        return None
    for position, factor in enumerate(factors):
        if factor.present is not None:
            data[position] = data[position].masked_fill(~factor.present, 0)
    letters = {rank: index for index, rank in enumerate(union(*(factor.ranks for factor in factors)))}
    if len(letters) > 50:
        return None
    operands: list[Any] = []
    for factor, tensor in zip(factors, data, strict=True):
        operands += [tensor, [letters[rank] for rank in factor.ranks]]
    result = torch.einsum(*operands, [letters[rank] for rank in kept])
    return Value(result, kept, dtype, _any_present(masks, ranks, kept))


def _any_present(masks: Sequence[Value], ranks: Sequence[str], kept: tuple[str, ...]) -> Tensor | None:
    """Where a product with these factors has a present coordinate along the reduced ranks."""
    if not masks:
        return None
    mask_ranks = union(*(mask.ranks for mask in masks))
    found = both(*(align(mask.present, mask.ranks, mask_ranks) for mask in masks if mask.present is not None))
    assert found is not None
    reduced = [index for index, rank in enumerate(mask_ranks) if rank in ranks]
    if reduced:
        found = found.any(dim=reduced)
    return align(found, tuple(rank for rank in mask_ranks if rank not in ranks), kept)


def merge(reducer: str, old: Value, new: Value, precision: Precision) -> Value:
    """Two partial results of one reduction, over the same ranks, folded into one.

    Their type is the same, but where one is the constant that a fold begins with: that takes the type of what it meets.
    """
    op = REDUCERS[reducer].op
    assert op is not None
    both_there = apply(op, (replace(old, present=None), replace(new, present=None)), precision)
    if old.present is None and new.present is None:
        return both_there
    data, dtype, weak = both_there.data, both_there.dtype, both_there.weak
    there_old = torch.ones_like(data, dtype=torch.bool) if old.present is None else old.present
    there_new = torch.ones_like(data, dtype=torch.bool) if new.present is None else new.present
    alone = torch.where(there_new, convert(new, dtype, weak, precision), convert(old, dtype, weak, precision))
    return Value(torch.where(there_old & there_new, data, alone), old.ranks, dtype, there_old | there_new, weak)


def filled(data: Tensor, present: Tensor | None, fill: Const) -> Tensor:
    """The data with its absent coordinates set to a constant, as a result is stored."""
    if present is None:
        return data
    value = fill.value
    if not data.is_floating_point() and isinstance(value, float) and not math.isfinite(value):
        value = torch.iinfo(data.dtype).max if value > 0 else torch.iinfo(data.dtype).min
    return torch.where(present, data, torch.tensor(value, device=data.device).to(data.dtype))
