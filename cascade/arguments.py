"""The arguments of a call: matched with what is declared, checked one by one, bound to the parameters of a cascade.

Every error names the tensor, what is declared and what was given.
"""

from __future__ import annotations

import difflib
import importlib
import operator
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade.errors import CallError, Diagnostic, Span, quoted_list
from cascade.inference import bind_sizes, declared_sizes, infer_dtypes
from cascade.ir import Cascade, DType, Param, Result
from cascade.wording import suggest

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Parameter:
    """What a call may give: one with a default (of a Python function) may be left out, and be no tensor."""

    optional: bool = False
    by_name: bool = False
    default: Any = None
    span: Span | None = None


# --- matching --------------------------------------------------------------------------------------------------------


def match(
    title: str, parameters: Mapping[str, Parameter], tensors: Sequence[Any], named: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the call gives to each parameter, in declared order, and the remaining keywords, which are sizes."""
    positional = [name for name, parameter in parameters.items() if not parameter.by_name]
    if len(tensors) > len(positional):
        message = f"{title} takes {plural(len(positional), 'tensor')}, {len(tensors)} were given by position"
        raise fail("C331", message, None, "sizes are given by keyword")
    found = dict(zip(positional, tensors, strict=False))
    sizes: dict[str, Any] = {}
    for name, value in named.items():
        if name in found:
            raise fail("C333", f"{name!r} is given by position and by name", parameters[name].span, "give it once")
        (found if name in parameters else sizes)[name] = value
    missing = [name for name, parameter in parameters.items() if name not in found and not parameter.optional]
    if missing:
        close = [name for name in sizes if difflib.get_close_matches(name, missing)]
        hint = f"{close[0]!r} is no tensor of it" if close else "give it by position or by name"
        raise fail("C334", f"{title} needs {quoted_list(missing)}", parameters[missing[0]].span, hint)
    return {name: found.get(name, parameter.default) for name, parameter in parameters.items()}, sizes


def split_options(
    given: Mapping[str, Any], parameters: Mapping[str, Parameter]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tensors of a call, and its plain values: what parameters with a default are given that is no tensor."""
    options = {
        name: value
        for name, value in given.items()
        if parameters[name].optional and not any(is_tensor(leaf) for leaf in leaves(value))
    }
    return {name: value for name, value in given.items() if name not in options}, options


def leaves(value: Any) -> Iterator[Any]:
    """The tensors of an argument, one by one."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from leaves(item)
    else:
        yield value


def types_of(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The types of the tensors of an argument, by the names that tracing gives to them."""
    if isinstance(value, Mapping | list | tuple):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, item in items:
            yield from types_of(f"{name}_{key}", item)
    elif hasattr(value, "dtype"):
        yield name, value.dtype


def is_tensor(value: Any) -> bool:
    """Whether a value has a shape; its class is asked, since symbolic tensors refuse to tell theirs."""
    return hasattr(type(value), "shape") or is_symbolic({"": value})


def is_symbolic(values: Mapping[str, Any]) -> bool:
    """Whether any tensor is one of a function that is being traced."""
    notation = sys.modules.get("cascade.frontend.notation")  # not loaded: nothing is being traced
    return notation is not None and any(isinstance(leaf, notation.Notation) for leaf in leaves(list(values.values())))


def is_plain(values: Mapping[str, Any], parameters: Mapping[str, Parameter]) -> bool:
    """Whether every tensor stands for a parameter without a default, none in a list: names alone tell what is what."""
    optional = any(parameters[name].optional for name in values)
    return not optional and not any(isinstance(value, list | tuple | Mapping) for value in values.values())


def outline(value: Any, pattern: bool = False) -> Any:
    """The structure of an argument with shapes for tensors; as a pattern, only which extents are 1."""
    if isinstance(value, Mapping):
        return {name: outline(item, pattern) for name, item in value.items()}
    if isinstance(value, list | tuple):
        items = [outline(item, pattern) for item in value]
        return items if isinstance(value, list) else tuple(items)
    shape = tuple(getattr(value, "shape", ()))
    return tuple(1 if extent == 1 else 0 for extent in shape) if pattern else shape


def widened(shapes: Any) -> Any:
    """The outline with no extent of 1: every dimension gets a rank of its own."""
    if isinstance(shapes, Mapping):
        return {name: widened(item) for name, item in shapes.items()}
    if isinstance(shapes, list | tuple):
        items = [widened(item) for item in shapes]
        return items if isinstance(shapes, list) else tuple(items)
    return 2 if shapes == 1 else shapes


def frozen(value: Any) -> Any:
    """The value as a key: equal for equal values of the same types."""
    if isinstance(value, Mapping):
        return "dict", tuple((name, frozen(item)) for name, item in value.items())
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(frozen(item) for item in value)
    try:
        hash(value)
    except TypeError:
        message = f"a {type(value).__name__} cannot be an option of a traced function"
        raise fail("C340", message, None, "pass numbers, strings, truth values, or lists of them") from None
    return type(value), repr(value) if isinstance(value, float) else value  # 0.0 and -0.0 differ


def fits(cascade: Cascade, values: Mapping[str, Any]) -> bool:
    """Whether the extents that the cascade fixes are those of the tensors."""
    shapes = [tuple(getattr(leaf, "shape", ())) for leaf in leaves(values)]
    pairs = [pair for p, shape in zip(cascade.params, shapes, strict=True) for pair in zip(p.shape, shape, strict=True)]
    return all(declared == extent for declared, extent in pairs if isinstance(declared, int))


# --- checking --------------------------------------------------------------------------------------------------------


def bind(cascade: Cascade, arrays: Sequence[Any], sizes: dict[str, Any]) -> dict[str, Tensor]:
    """The tensor of every parameter, checked; `sizes` are checked as well and become ints."""
    check_sizes(cascade, sizes)
    torch = importlib.import_module("torch")
    tensors = [value for value in arrays if isinstance(value, torch.Tensor)]
    device = next((t.device for t in tensors if t.dim()), tensors[0].device if tensors else torch.device("cpu"))
    inputs = {p.name: to_tensor(p, value, device) for p, value in zip(cascade.params, arrays, strict=True)}
    check_devices(cascade, inputs, device)
    if torch.is_grad_enabled():
        check_no_gradient(cascade, inputs)
    bind_sizes(cascade, {name: tuple(tensor.shape) for name, tensor in inputs.items()}, sizes)
    return inputs


def shape_symbols(cascade: Cascade) -> tuple[str, ...]:
    """The shape symbols of a cascade, in order of first appearance."""
    return tuple(dict.fromkeys(size for size in declared_sizes(cascade) if isinstance(size, str)))


def check_sizes(cascade: Cascade, sizes: dict[str, Any]) -> None:
    """Every keyword that is no tensor is a shape symbol, its value an integer."""
    symbols = shape_symbols(cascade)
    names = [param.name for param in cascade.params]
    for name, value in sizes.items():
        if name not in symbols:
            close = difflib.get_close_matches(name, (*names, *symbols), n=1)
            known = f"its tensors are {quoted_list(names)}, its shape symbols {quoted_list(symbols) or 'none'}"
            hint = f"did you mean {close[0]!r}?" if close else known
            raise fail("C332", f"{cascade.name} has no tensor and no shape symbol {name!r}", None, hint)
        sizes[name] = operator.index(value) if hasattr(value, "__index__") else value


def check_structures(values: Mapping[str, Any]) -> None:
    """What a list, tuple or dictionary given for tensors holds is tensors."""
    for name, value in values.items():
        for leaf in leaves(value):
            if leaf is not value and not is_tensor(leaf):
                message = f"{name!r} is given a {type(value).__name__} that holds a {type(leaf).__name__}, not tensors"
                raise fail("C335", message, None, "wrap it in torch.tensor(...)")


def to_tensor(param: Param, value: Any, device: torch.device) -> Tensor:
    """The argument as a tensor of the declared type; a Python number will do for a scalar."""
    torch = importlib.import_module("torch")
    values = importlib.import_module("cascade.values")
    if isinstance(value, bool | int | float) and not param.shape:
        wanted = values.TORCH_TYPES[param.dtype] if param.dtype else None
        scalar: Tensor = torch.tensor(value, dtype=wanted, device=device)
        return scalar
    if not isinstance(value, torch.Tensor):
        kind = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        hint = "torch.from_numpy(...)" if kind.startswith("numpy.") else "torch.tensor(...)"
        raise fail("C335", f"{declaration(param)} is given a {kind}, not a tensor", param.span, f"wrap it in {hint}")
    found = values.FROM_TORCH.get(value.dtype)
    if found is None or value.layout is not torch.strided:
        what = f"{value.dtype} tensor" if found is None else f"tensor of layout {value.layout}"
        fix = f"the types are {quoted_list((d.value for d in DType), 20)}" if found is None else "call .to_dense()"
        raise fail("C336", f"{declaration(param)} is given a {what}", param.span, fix)
    if param.dtype not in (None, found):
        message = f"{param.name!r} is declared {param.dtype.value}, the tensor given is {found.value}"
        raise fail("C337", message, param.span, f"pass {param.name}.to({values.TORCH_TYPES[param.dtype]})")
    tensor: Tensor = value if value.dim() else value.to(device)
    return tensor


def check_devices(cascade: Cascade, inputs: Mapping[str, Tensor], device: torch.device) -> None:
    """All tensors live on one device; scalars were moved there."""
    first = next((name for name, tensor in inputs.items() if tensor.device == device), None)
    for name, tensor in inputs.items():
        if tensor.device != device:
            message = f"{name!r} is on {tensor.device}, {first!r} is on {device}"
            raise fail("C338", message, declared(cascade, name).span, f"move it: {name}.to({str(device)!r})")


def check_no_gradient(cascade: Cascade, inputs: Mapping[str, Tensor]) -> None:
    """No input wants a gradient: there is no backward pass yet, and a detached result would be a silent error."""
    for name, tensor in inputs.items():
        if tensor.requires_grad:
            hint = f"call it under torch.no_grad(), or pass {name}.detach()"
            message = f"{name!r} requires a gradient, and cascade has no backward pass yet"
            raise fail("C339", message, declared(cascade, name).span, hint)


def declared(cascade: Cascade, name: str) -> Param:
    """The parameter of that name."""
    return next(param for param in cascade.params if param.name == name)


def declaration(param: Param | Result) -> str:
    """A parameter as the text declares it."""
    return f"{param.name}{': ' + param.dtype.value if param.dtype else ''}[{','.join(map(str, param.shape))}]"


def plural(count: int, noun: str) -> str:
    """`1 tensor`, `3 tensors`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


# --- results that take the memory of parameters ----------------------------------------------------------------------


def check_in_place(cascade: Cascade, in_place: Mapping[str, str]) -> None:
    """Raises `CallError` where a result is to take memory that it cannot have."""
    results = {result.name: result for result in cascade.results}
    params = {param.name: param for param in cascade.params}
    for result, param in in_place.items():
        if result not in results:
            help_line = suggest(result, tuple(results), "its results")
            raise fail("C343", f"in_place: {cascade.name} has no result {result!r}", None, help_line)
        if param not in params:
            help_line = suggest(param, tuple(params), "its parameters")
            raise fail("C343", f"in_place: {cascade.name} has no parameter {param!r}", None, help_line)
        ours, theirs = results[result].shape, params[param].shape
        if ours != theirs:
            shapes = [",".join(map(str, shape)) for shape in (ours, theirs)]
            message = f"in_place: {result} is [{shapes[0]}], but {param} is [{shapes[1]}]"
            raise fail("C343", message, params[param].span, "a result takes the memory of a parameter of its shape")
        if list(in_place.values()).count(param) > 1:
            help_line = "give each result a parameter of its own"
            raise fail(
                "C343", f"in_place: two results are to take the memory of {param}", params[param].span, help_line
            )


def check_memory(cascade: Cascade, inputs: Mapping[str, Tensor], in_place: Mapping[str, str]) -> None:
    """Raises `CallError` where a tensor of this call cannot be written as a result is."""
    types = importlib.import_module("cascade.values").FROM_TORCH
    found = infer_dtypes(cascade, {name: types[tensor.dtype] for name, tensor in inputs.items()})
    spans = {param.name: param.span for param in cascade.params}
    for result, param in in_place.items():
        if found[result] is not found[param]:
            message = (
                f"in_place: {result} is {found[result].value}, but the tensor given for {param} is {found[param].value}"
            )
            raise fail("C343", message, spans[param], "a result takes the memory of a tensor of its type")
        given = inputs[param]
        if any(extent > 1 and stride == 0 for extent, stride in zip(given.shape, given.stride(), strict=True)):
            message = f"in_place: the tensor given for {param} is expanded: several coordinates are one element"
            raise fail("C343", message, spans[param], f"give {param}.contiguous()")


def check_constant(cascade: Cascade, constant: Sequence[str], in_place: Mapping[str, str]) -> None:
    """Raises `CallError` where what is said to be constant is no parameter, or is written."""
    params = {param.name: param for param in cascade.params}
    for name in constant:
        if name not in params:
            help_line = suggest(name, tuple(params), "its parameters")
            raise fail("C344", f"constant: {cascade.name} has no parameter {name!r}", None, help_line)
        if name in in_place.values():
            result = next(result for result, param in in_place.items() if param == name)
            message = f"constant: {name} changes in every call: {result} is written in its place"
            raise fail("C344", message, params[name].span, "leave it out of one of the two")


def fail(code: str, message: str, span: Span | None, help_line: str | None) -> CallError:
    """The error of a call, pointing at the declaration where there is one."""
    return CallError(Diagnostic(code, message, span, help_line))
