"""Kernels run: plans by kind of call, sources made into functions, arguments put together, launched.

What a call may differ in without planning again is nothing but the addresses of its tensors; what it may differ in
without compiling again is every extent that no tile holds whole, as long as tiles fit or do not fit as they did.
"""

from __future__ import annotations

import hashlib
import linecache
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from cascade import interp
from cascade.backends.triton.emit import Argument, Source, emit, permutation
from cascade.backends.triton.partition import Group, Rest
from cascade.backends.triton.plan import Kernel
from cascade.backends.triton.planner import Layout, Planner
from cascade.inference import bind_sizes
from cascade.ir import Cascade, Param, Result
from cascade.values import FROM_TORCH, TORCH_TYPES, Precision
from cascade.walk import reads


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def runs_on(device: torch.device) -> bool:
    """Whether kernels can run on tensors of a device."""
    return device.type == "cuda" or interpreted()


@dataclass(slots=True, eq=False)
class Launcher:
    """A cascade that has been through the pipeline, as kernels; plans are kept by kind of call."""

    cascade: Cascade
    effort: str = "none"
    plans: dict[Any, CallPlan | None] = field(default_factory=dict)

    def __call__(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> tuple[Tensor, ...] | None:
        """The results for these tensors, all of them on one device that kernels run on.

        None where a rank has no coordinates: nothing is launched then.
        """
        key = (
            *((t.shape, t.stride(), t.dtype, t.data_ptr() & 15, t.device) for t in inputs.values()),
            *sizes.items(),
        )
        if key not in self.plans:
            self.plans[key] = self.plan(inputs, sizes)
        plan = self.plans[key]
        return None if plan is None else plan(inputs)

    def plan(self, inputs: Mapping[str, Tensor], sizes: Mapping[str, int]) -> CallPlan | None:
        """What a call with such tensors runs; None where some extent is 0."""
        extents = bind_sizes(self.cascade, {name: tuple(t.shape) for name, t in inputs.items()}, sizes)
        if 0 in extents.values() or any(0 in t.shape for t in inputs.values()):
            return None
        layouts = {name: layout(tensor) for name, tensor in inputs.items()}
        planner = Planner(self.cascade, extents, layouts, descriptors=has_descriptors(inputs))
        groups = planner.groups()
        steps: list[KernelStep | RestStep] = []
        for number, group in enumerate(groups):
            if isinstance(group, Rest):
                steps.append(RestStep(self.cascade, group, planner, extents))
                continue
            name = self.cascade.name if len(groups) == 1 else f"{self.cascade.name}_{number}"
            kernel = planner.kernel(name, group, groups, planner.default_tiling(group))
            steps.append(KernelStep(kernel, emit(kernel, portable=interpreted()), extents))
        device = next((tensor.device for tensor in inputs.values()), torch.device("cuda"))
        return CallPlan(self.cascade, planner, tuple(groups), tuple(steps), device)


def layout(tensor: Tensor) -> Layout:
    """Where a tensor lies."""
    return Layout(tuple(tensor.shape), tensor.stride(), FROM_TORCH[tensor.dtype], tensor.data_ptr() % 16 == 0)


def has_descriptors(inputs: Mapping[str, Tensor]) -> bool:
    """Whether the device copies boxes by descriptor: from compute capability 9.0 on, and the interpreter."""
    devices = {tensor.device for tensor in inputs.values() if tensor.is_cuda}
    return all(torch.cuda.get_device_capability(device) >= (9, 0) for device in devices)


@dataclass(slots=True, eq=False)
class CallPlan:
    """The steps of one kind of call, and what they write."""

    cascade: Cascade
    planner: Planner
    groups: tuple[Group | Rest, ...]
    steps: tuple[KernelStep | RestStep, ...]
    device: torch.device
    made: tuple[tuple[str, tuple[int, ...], torch.dtype], ...] = field(init=False)
    results: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        planner = self.planner
        made = []
        for group, step in zip(self.groups, self.steps, strict=True):
            for name in planner.stored(group, self.groups) if isinstance(step, KernelStep) else ():
                tensor = planner.tensor(name, planner.feeds_product(name, self.groups))
                shape = tuple(planner.number(size) for size in planner.shapes[name])
                made.append((name, shape, TORCH_TYPES[tensor.dtype]))
        self.made = tuple(made)
        self.results = tuple(result.name for result in self.cascade.results)

    def __call__(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Runs every step in order on the current stream."""
        tensors = dict(inputs)
        device = self.device
        for name, shape, dtype in self.made:
            tensors[name] = torch.empty(shape, dtype=dtype, device=device)
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                self.run(tensors)
        else:
            self.run(tensors)
        return tuple(tensors[name] for name in self.results)

    def run(self, tensors: dict[str, Tensor]) -> None:
        for step in self.steps:
            step(tensors)


@dataclass(slots=True, eq=False)
class RestStep:
    """Statements that no kernel computes, run by the interpreter on whole tensors."""

    cascade: Cascade
    group: Rest
    planner: Planner
    extents: Mapping[str, int]
    part: Cascade = field(init=False)
    inputs: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        planner, group = self.planner, self.group
        self.inputs = tuple(dict.fromkeys(n for s in group.statements for n in reads(s) if n not in group.names))
        params = tuple(Param(name, None, planner.shapes[name]) for name in self.inputs)
        known = {result.name: result for result in self.cascade.results}
        results = tuple(known.get(name, Result(name, None, planner.shapes[name])) for name in group.names)
        self.part = Cascade(
            self.cascade.name, params, results, group.statements, (), self.cascade.uses, self.cascade.given
        )

    def __call__(self, tensors: dict[str, Tensor]) -> None:
        given = {name: tensors[name] for name in self.inputs}
        tensors.update(interp.run(self.part, given, self.extents, Precision.COMPUTE))


@dataclass(slots=True, eq=False)
class KernelStep:
    """One launch: the arguments that stay, and the tensors that each call puts in."""

    kernel: Kernel
    source: Source
    extents: Mapping[str, int]
    function: Any = field(init=False)
    grid: tuple[int, int, int] = field(init=False)
    template: list[Any] = field(init=False)
    slots: tuple[tuple[int, Argument], ...] = field(init=False)
    compiled: Any = None

    def __post_init__(self) -> None:
        self.function = getattr(module(self.source), self.source.kernel)
        count = 1
        for extent, tile in self.source.grid:
            count *= -(-self.number(extent) // tile)
        self.grid = (count, 1, 1)
        self.template = []
        slots = []
        for position, argument in enumerate(self.source.arguments):
            self.template.append(self.fixed(argument))
            if argument.kind in ("pointer", "descriptor", "stride"):
                slots.append((position, argument))
        self.slots = tuple(slots)

    def number(self, extent: str | int) -> int:
        return extent if isinstance(extent, int) else self.extents[extent]

    def fixed(self, argument: Argument) -> Any:
        """What is the same in every call of this kind."""
        if argument.kind == "size":
            return self.extents[argument.symbol]
        return argument.value if argument.kind == "constant" else None

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Launches on the current stream of the current device."""
        arguments = self.template.copy()
        for position, argument in self.slots:
            tensor = tensors[argument.tensor]
            if argument.kind == "pointer":
                arguments[position] = tensor
            elif argument.kind == "stride":
                arguments[position] = tensor.stride(argument.position)
            else:
                arguments[position] = descriptor(tensor, argument.box)
        if self.compiled is None:
            self.first(arguments)
            return
        stream = torch._C._cuda_getCurrentRawStream(torch.cuda.current_device())
        found = self.compiled
        found.run(*self.grid, stream, found.function, found.packed_metadata, None, None, None, *arguments)

    def first(self, arguments: list[Any]) -> None:
        """The first launch compiles."""
        options = {"num_warps": self.source.num_warps, "num_stages": self.source.num_stages}
        found = self.function[self.grid](*arguments, **options)
        if not interpreted():
            self.compiled = found


def descriptor(tensor: Tensor, box: Sequence[int]) -> TensorDescriptor:
    """The descriptor of a tensor for boxes of this extent, dimensions in the order that the kernel expects."""
    order = permutation(box)
    shape, strides = tensor.shape, tensor.stride()
    inner = tensor.element_size()
    steps = [strides[d] if tensor.shape[d] > 1 or d == order[-1] else max(16 // inner, 1) for d in order]
    return TensorDescriptor(tensor, [shape[d] for d in order], steps, [box[d] for d in order])


MODULES: dict[str, types.ModuleType] = {}


def module(source: Source) -> types.ModuleType:
    """The text of a kernel as a module; the same text is made into one only once."""
    digest = hashlib.sha256(source.text.encode()).hexdigest()[:16]
    if digest not in MODULES:
        name = f"cascade_kernel_{source.kernel}_{digest}"
        file = f"<{name}>"
        linecache.cache[file] = (len(source.text), None, source.text.splitlines(keepends=True), file)
        made = types.ModuleType(name)
        made.__file__ = file
        exec(compile(source.text, file, "exec"), made.__dict__)
        MODULES[digest] = made
    return MODULES[digest]
