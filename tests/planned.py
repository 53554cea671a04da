"""Plans made by hand, for tests that look into them or choose tiles that the planner would not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from cascade.backends.triton.emit import emit
from cascade.backends.triton.launch import Bench, Groups, KernelStep, Launcher, layout
from cascade.backends.triton.machine import Machine, machine_for
from cascade.backends.triton.partition import Group
from cascade.backends.triton.plan import Kernel, Options
from cascade.backends.triton.planner import Planner, Tiling
from cascade.backends.triton.split import divisible
from cascade.frontend.build import parse_cascade
from cascade.inference import bind_sizes
from cascade.ir import Cascade
from cascade.pipeline import run_pipeline


def final(text: str) -> Cascade:
    """A program as the backend gets it."""
    return run_pipeline(parse_cascade(text)).final


def planner_for(cascade: Cascade, inputs: Mapping[str, Tensor], given: Mapping[str, int] | None = None) -> Planner:
    """The planner of a call."""
    extents = bind_sizes(cascade, {name: tuple(tensor.shape) for name, tensor in inputs.items()}, given or {})
    return Planner(cascade, extents, {name: layout(tensor) for name, tensor in inputs.items()})


def only_group(planner: Planner) -> Group:
    """The group of a cascade that is a single kernel."""
    (group,) = planner.groups()
    assert isinstance(group, Group)
    return group


def all_kernels(planner: Planner) -> tuple[Kernel, ...]:
    """The kernel of every group with the planner's own tiles, the stream not shared."""
    groups = planner.groups()
    made = [
        planner.kernel(f"{planner.cascade.name}_{number}", group, groups, planner.default_tiling(group))
        for number, group in enumerate(groups)
        if isinstance(group, Group)
    ]
    return tuple(made)


def emitted(kernel: Kernel) -> str:
    """The text of a kernel, as it is compiled for a GPU."""
    return emit(kernel).text


class OnAnH200(Bench):
    """A device that is not there: the model of its machine chooses."""

    @property
    def machine(self) -> Machine:
        return machine_for("NVIDIA H200", (9, 0))


@dataclass(slots=True, eq=False)
class Chosen(Launcher):
    """A launcher whose streams go in tiles of `tile` coordinates, and are shared by `parts` programs where they can.

    With `even` by as many on average, where data says how much a coordinate has of the stream.
    """

    tile: int = 16
    parts: int = 1
    even: bool = False
    shared: int = 0  # groups whose stream was shared

    def tiling(self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench | None) -> Tiling:
        tiling = dataclasses.replace(planner.default_tiling(group), parts=1)
        stream = group.arrangement.stream
        if stream is None or label.endswith(("_merge", "_bounds")):
            return tiling
        parts = self.parts if divisible(group, planner.stored(group, groups)) else 1
        self.shared += parts > 1
        return dataclasses.replace(with_stream(tiling, stream, self.tile, parts), even=self.even)


def with_stream(tiling: Tiling, stream: str, tile: int, parts: int) -> Tiling:
    """The tiling with another tile of the stream, where that does not go one coordinate at a time, and parts of it."""
    tiles = dict(tiling.tiles)
    tiles[stream] = min(tile, tiles[stream])
    options = Options(tiling.options.num_warps, tiling.options.num_stages)
    return Tiling(tuple(tiles.items()), options, parts)


def call_of(launcher: Launcher) -> Callable[..., tuple[Tensor, ...]]:
    """A launcher as a function of tensors and sizes by name."""

    def call(**arguments: Tensor | int) -> tuple[Tensor, ...]:
        tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
        sizes = {name: a for name, a in arguments.items() if isinstance(a, int)}
        results = launcher(tensors, sizes)
        assert results is not None, "an extent of 0 is no matter of kernels"
        return results

    return call


def launch(kernel: Kernel, extents: Mapping[str, int], tensors: dict[str, Tensor]) -> None:
    """Runs one kernel; what it writes must be there."""
    KernelStep(kernel, emit(kernel, portable=not torch.cuda.is_available()), extents, ())(tensors)
