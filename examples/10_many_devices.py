"""Layers over several devices: each gives, on all of them together, what its cascade means on one.

Run it with `python -m examples.10_many_devices`, which simulates four ranks in one process, or on as many processes as
you like with `torchrun --nproc-per-node 4 -m examples.10_many_devices`.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from cascade import pipeline
from cascade.backends.distributed.machine import node
from cascade.backends.distributed.simulate import simulate
from cascade.distributed import Loaded
from cascade.frontend.build import parse_program
from cascade.interp import run
from cascade.ir import Cascade, DType, Mesh
from cascade.passes.exchanges import by_rows, by_shards, scatter_gather
from cascade.passes.shard import Sharding, cheapest, stated
from cascade.passes.split_tokens import split
from cascade.placed import Collective, Compute, Kind, Program
from cascade.trial import param_types, random_inputs
from cascade.values import Precision

HERE = Path(__file__).parent
LAYER = {"T": 7, "D": 4, "H": 8, "HK": 8, "E": 2, "F": 9}
ROWS = {**LAYER, "T": 9}
LONG = {"T": 10, "D": 3, "H": 2, "E": 2}
LADDER = {"T": 9, "D": 4, "H": 8, "E": 2, "F": 9}
DECODE = {"B": 5, "N": 6, "D": 4, "H": 8, "HK": 8, "E": 2, "F": 9}
LARGE = {"T": 4096, "D": 8192, "H": 64, "E": 128, "F": 28672}  # a layer whose weights outweigh its activations
Sizes = dict[str, int]


def cascade_of(name: str, devices: int, until: str | None = "canonicalize") -> Cascade:
    """An example after some passes, on so many devices."""
    found = pipeline.run_pipeline(parse_program((HERE / f"{name}.cascade").read_text(), name)[-1], until).final
    schedule = (dataclasses.replace(one, size=devices) if isinstance(one, Mesh) else one for one in found.schedule)
    return dataclasses.replace(found, schedule=tuple(schedule))


def tensor_parallel(devices: int, sizes: Sizes = LAYER) -> Program:
    """Heads and hidden columns are sharded; tokens in two slices."""
    return split(stated(cascade_of("tensor_parallel_block", devices), sizes), "t", (sizes["T"] // 2,))


def rows_round(devices: int, sizes: Sizes = ROWS) -> Program:
    """The same layer, tokens whole: each sum goes to the tokens of every device, shard by shard round a ring."""
    program = stated(cascade_of("tensor_parallel_block", devices), sizes)
    while any(isinstance(step, Collective) and step.kind is Kind.ALL_REDUCE for step in program.steps):
        number = first(program, Kind.ALL_REDUCE)
        program = by_rows(scatter_gather(program, number, 0), number)
    return program


def expert_parallel(devices: int, sizes: Sizes | None = None) -> Program:
    """Two batches, each dispatched to the experts and combined behind them by an all-to-all."""
    small = {"B": 2, "P": devices, "T": 5, "D": 3, "N": 2 * devices, "F": 4, "C": 5}
    return split(stated(cascade_of("expert_parallel", devices), sizes or small), "b", (1,))


def gathered(devices: int, sizes: Sizes = LONG) -> Program:
    """A long context in shards: keys and values are gathered."""
    return stated(cascade_of("ring_attention", devices, None), sizes)


def ring(devices: int, sizes: Sizes = LONG) -> Program:
    """The same, shard after shard: each is folded where it comes by."""
    before = gathered(devices, sizes)
    return by_shards(before, first(before, Kind.ALL_GATHER))


def both_ways(devices: int, sizes: Sizes = LONG) -> Program:
    """The same, shards from the nearer side."""
    before = gathered(devices, sizes)
    return by_shards(before, first(before, Kind.ALL_GATHER), both_ways=True)


def ladder(devices: int, sizes: Sizes = LADDER) -> Program:
    """Blocks that read an older residual, laid as the search lays them at the sizes of a large model."""
    cascade = cascade_of("ladder_residual", devices)
    steps = cheapest(cascade, LARGE, node("h100x8")).steps
    along = {step.name: step.along for step in steps if isinstance(step, Compute)}
    return Sharding(cascade, sizes).program(along)


def nano_batched(devices: int, sizes: Sizes = DECODE) -> Program:
    """One more token of each sequence, in two batches of sequences."""
    return split(stated(cascade_of("nano_batched_decode", devices), sizes), "b", (sizes["B"] // 2,))


PROGRAMS: dict[str, Callable[[int], Program]] = {
    "tensor-parallel block": tensor_parallel, "sums round a ring": rows_round, "dispatch and combine": expert_parallel,
    "keys gathered": gathered, "ring": ring, "ring, both ways": both_ways, "ladder residual": ladder,
    "nano-batched decode": nano_batched,
}  # fmt: skip


def first(program: Program, kind: Kind) -> int:
    """The first collective of a kind."""
    return next(i for i, step in enumerate(program.steps) if isinstance(step, Collective) and step.kind is kind)


def difference(program: Program, results: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> float:
    """How far what devices give lies from what one gives, in float64, over the largest element."""
    cascade, sizes = program.cascade, dict(program.sizes)
    inputs = random_inputs(cascade, sizes, param_types(cascade, DType.F64), 0)
    wanted = run(cascade, inputs, sizes, Precision.REFERENCE)
    found = results(inputs)
    return max(float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp(min=1)) for n in wanted)


def main(devices: int = 4) -> None:
    """Runs every program on the processes of torchrun, or else on simulated ranks."""
    launched = dist.is_torchelastic_launched()
    if launched:
        dist.init_process_group("gloo")
        devices = dist.get_world_size()
    for name, made in PROGRAMS.items():
        program = made(devices)
        if launched:
            loaded = Loaded(program, range(len(program.steps)), name)
            far = difference(program, lambda given, own=loaded: own(Precision.REFERENCE, **given))
        else:
            far = difference(program, lambda given, own=program: simulate(own, given))
        assert far <= 1e-12, (name, far)
        kinds = Counter(step.kind.value for step in program.steps if isinstance(step, Collective))
        if not launched or dist.get_rank() == 0:
            said = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
            print(f"{name:22} {devices} devices, {len(program.steps):3} steps: {said}; within 1e-12 of one device")
    if launched:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
