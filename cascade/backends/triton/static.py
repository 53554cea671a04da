"""A kernel's text as a request to the offline compiler: what its arguments would be in the call that was planned."""

from __future__ import annotations

from collections.abc import Mapping

from cascade.backends.triton.emit import Argument, Source, permutation
from cascade.backends.triton.offline import Request
from cascade.backends.triton.plan import Kernel
from cascade.backends.triton.spell import POINTERS


def request(kernel: Kernel, source: Source, strides: Mapping[str, tuple[int, ...]] | None = None) -> Request:
    """The request for a kernel; strides that are not given count as multiples of 16, bases as aligned."""
    types: list[tuple[str, str]] = []
    constants: list[tuple[str, int]] = []
    aligned: list[str] = []
    for argument in source.arguments:
        if argument.kind == "constant":
            constants.append((argument.name, argument.value))
            continue
        types.append((argument.name, type_of(argument, kernel)))
        given = (strides or {}).get(argument.tensor)
        if argument.kind == "pointer" or (
            argument.kind == "stride" and (given is None or given[argument.position] % 16 == 0)
        ):
            aligned.append(argument.name)
    return Request(
        source.text,
        source.kernel,
        tuple(types),
        tuple(constants),
        tuple(aligned),
        num_warps=source.num_warps,
        num_stages=source.num_stages,
    )


def type_of(argument: Argument, kernel: Kernel) -> str:
    """The type of an argument as Triton's signatures write it."""
    if argument.kind in ("size", "stride"):
        return "i32"
    element = POINTERS[next(tensor.dtype for tensor in kernel.tensors if tensor.name == argument.tensor)]
    if argument.kind == "pointer":
        return f"*{element}"
    box = (argument.box[position] for position in permutation(argument.box))
    return f"tensordesc<{element}[{','.join(str(size) for size in box)}]>"
