"""Launches after the first: nothing is checked again, and no descriptor is encoded twice.

Triton encodes every descriptor of every launch anew, which of a kernel with six of them is most of what a launch costs
the host. An encoded descriptor is a function of the address of its tensor and of what stays the same from launch to
launch (shape, strides, box, type), so the last ones are kept by address; a caching allocator hands out few of them.

This goes around the wrapper with which Triton 3.6 expands descriptors. Where another version keeps another form, a
launch goes through the compiled kernel's own `run`, which asks for descriptors as they are.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from triton.tools.tensor_descriptor import TensorDescriptor

KEPT = 256  # encoded descriptors of an argument

Slot: TypeAlias = tuple[int, str, "Encoder | None"]
"""The position of an argument, the name of its tensor, and what makes its descriptor; None of a pointer."""


@dataclass(slots=True, eq=False)
class Encoder:
    """Descriptors that differ in the address of the tensor only."""

    fields: dict[str, Any]  # of the descriptor, all but its tensor
    encode: Callable[[TensorDescriptor], Any] | None = None  # None: the launch encodes
    known: dict[int, Any] = field(default_factory=dict)  # by address

    def __call__(self, tensor: Any) -> Any:
        """The argument for a tensor of the same shape and strides."""
        if self.encode is None:
            return self.described(tensor)
        address = tensor.data_ptr()
        found = self.known.get(address)
        if found is None:
            if len(self.known) >= KEPT:
                self.known.clear()
            found = self.known[address] = self.encode(self.described(tensor))
        return found

    def described(self, tensor: Any) -> TensorDescriptor:
        """A descriptor of the same shape for another tensor: nothing is checked again."""
        found = object.__new__(TensorDescriptor)
        found.__dict__.update(self.fields)
        found.base = tensor
        return found


@dataclass(slots=True, eq=False)
class Relaunch:
    """A compiled kernel with all of its arguments but the tensors'."""

    start: Callable[..., Any]  # called with grid, stream, `base` and the arguments
    base: tuple[Any, ...]
    grid: tuple[int, int, int]
    template: list[Any]
    slots: tuple[Slot, ...]

    def __call__(self, tensors: Any, stream: int) -> None:
        """Launches for these tensors, by name, on a stream of the current device."""
        arguments = self.template.copy()
        for position, name, encoder in self.slots:
            arguments[position] = tensors[name].data_ptr() if encoder is None else encoder(tensors[name])
        self.start(*self.grid, stream, *self.base, *arguments)


def relaunch(compiled: Any, grid: tuple[int, int, int], arguments: Sequence[Any], names: dict[int, str]) -> Relaunch:
    """Launches of a kernel after the first, which had these arguments: `names` are of the tensors, by position."""
    hooks = (None, None, None)  # launch metadata, and what is called before and after
    run = compiled.run
    wrapper = unwrapped(run)
    start, encode = (run, None) if wrapper is None else (wrapper.launcher, wrapper.encode)
    metadata = iter(() if wrapper is None else wrapper.metadata)
    template: list[Any] = []
    slots: list[Slot] = []
    for position, argument in enumerate(arguments):
        encoder = None
        expanded = [None if position in names else argument]
        if isinstance(argument, TensorDescriptor):
            encoder = Encoder({**vars(argument), "base": None})
            if encode is not None:
                of = next(metadata)
                expanded = encode(argument, of)  # the encoded one, then shape and strides as the kernel sees them
                encoder.encode = functools.partial(first, encode, of)
        if position in names:
            slots.append((len(template), names[position], encoder))
        template += expanded
    base: tuple[Any, ...] = (compiled.function, compiled.packed_metadata, *hooks)
    if wrapper is not None:
        options = (run.launch_cooperative_grid, run.launch_pdl)
        base = (compiled.function, *options, None, None, compiled.packed_metadata, *hooks)  # and no scratch memory
    return Relaunch(start, base, grid, template, tuple(slots))


def first(encode: Callable[[Any, Any], list[Any]], metadata: Any, descriptor: TensorDescriptor) -> Any:
    """The encoded descriptor alone."""
    return encode(descriptor, metadata)[0]


@dataclass(frozen=True, slots=True)
class Wrapper:
    """What Triton 3.6 wraps around the launcher of a kernel with descriptors."""

    launcher: Callable[..., Any]
    encode: Callable[[Any, Any], list[Any]]
    metadata: Sequence[Any]  # of every descriptor, in order


def unwrapped(run: Any) -> Wrapper | None:
    """The parts of a launcher that expands descriptors; None where it expands none, or has another form."""
    if getattr(run, "global_scratch_size", 1) or getattr(run, "profile_scratch_size", 1):
        return None
    wrapper = getattr(run, "launch", None)
    if not inspect.isfunction(wrapper):
        return None
    held = inspect.getclosurevars(wrapper).nonlocals
    encode = wrapper.__globals__.get("make_tensordesc_arg")
    if set(held) != {"launcher", "tensordesc_indices", "tensordesc_meta"} or not inspect.isfunction(encode):
        return None
    if list(inspect.signature(encode).parameters) != ["arg", "metadata"] or not all(held["tensordesc_meta"]):
        return None
    return Wrapper(held["launcher"], encode, held["tensordesc_meta"])
