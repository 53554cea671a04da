"""The table `split`: what it costs to run a gated block in two slices of its tokens, measured and as the model has it.

The block is what one of eight devices has of a 70B model's. Cuts are multiples of 256 in the middle half; the best of
them by the stopwatch stands beside the best of them by the model, as percent of the whole. The median difference over
all lengths is what matters: by it the planner decides whether to split.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.table import Table
from benchmarks.timing import Budget, measure
from benchmarks.workload import normal
from cascade.backends.distributed.kernels import Clock
from cascade.backends.distributed.machine import Node, node
from cascade.compiled import Compiled
from cascade.frontend.build import parse_cascade
from cascade.passes.shard import stated
from cascade.passes.split_tokens import split
from cascade.pipeline import run_pipeline
from cascade.placed import Collective

TEXT = """
cascade gated(M[T,D], Wg[F,D], Wu[F,D], Wd[D,F]) -> Y[T,D] {
    J[t,f] = silu(sum[d] M[t,d] * Wg[f,d]) * (sum[d] M[t,d] * Wu[f,d])
    Y[t,d] = J[t,f] * Wd[d,f]
}
"""
SHARDED = TEXT.rstrip() + " schedule {\n    mesh tp = 8\n    shard f over tp\n}\n"
DEVICES, WIDTH, HIDDEN = 8, 8192, 28672
LENGTHS = (1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
STEP = 256  # between cuts
EIGHTHS = (2, 3, 4, 5, 6)
BAR = 3.0  # points


def table(device: torch.device, options: Any) -> Iterator[Table]:
    """The table, once after every length."""
    found = Table("split", ["tokens", "whole ms", "best split ms", "cut", "costs", "model", "differ", "verdict"])
    lengths = (512, 768) if options.tiny else LENGTHS
    width, hidden = (32, 48) if options.tiny else (WIDTH, HIDDEN // DEVICES)
    budget = Budget(options.rounds, options.seconds)
    generator = torch.Generator(device).manual_seed(0)
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    weights = [normal(generator, *shape, dtype=kind) for shape in ((hidden, width), (hidden, width), (width, hidden))]
    weights = [weight * weight.shape[-1] ** -0.5 for weight in weights]
    differ: list[float] = []
    for tokens in lengths:
        cuts = sorted({max(STEP, tokens * part // 8 // STEP * STEP) for part in EIGHTHS})
        tensor = normal(generator, tokens, width, dtype=kind)
        ways = {"whole": sliced(tensor, weights, ())} | {str(cut): sliced(tensor, weights, (cut,)) for cut in cuts}
        ms, failed = measure({name: [call] for name, call in ways.items()}, device, budget)
        assert not failed, failed
        best = min(cuts, key=lambda cut: ms[str(cut)])
        cost = 100 * (ms[str(best)] / ms["whole"] - 1)
        wanted = 100 * (min(modelled_us(tokens, (cut,)) for cut in cuts) / modelled_us(tokens, ()) - 1)
        differ.append(abs(cost - wanted))
        median = statistics.median(differ)
        verdict = "-" if options.tiny else "pass" if median <= BAR else "short"
        found.rows.append([
            str(tokens), f"{ms['whole']:.3f}", f"{ms[str(best)]:.3f}", str(best), f"{cost:+.1f} %", f"{wanted:+.1f} %",
            f"{differ[-1]:.1f}", verdict,
        ])  # fmt: skip
        found.data.append(
            {"name": f"split {tokens}", "times": ms, "cost": cost, "modelled": wanted, "verdict": verdict}
        )
        found.notes = [
            f"median difference {median:.2f} points (bar {BAR:g}); the verdict is of all lengths up to its row"
        ]
        yield found


def sliced(tensor: Tensor, weights: Sequence[Tensor], cuts: tuple[int, ...]) -> Callable[[], Any]:
    """The block slice after slice, each by kernels of its own."""
    calls = [
        functools.partial(Compiled(parse_cascade(TEXT, "<gated>")), part, *weights)
        for part in tensor.tensor_split(list(cuts))
    ]
    return lambda: [call() for call in calls]


@functools.cache
def alone() -> Node:
    """The machine of the model."""
    return node("h200x8")


def modelled_us(tokens: int, cuts: tuple[int, ...]) -> float:
    """The same by the model of the planner: the two kernels of every slice, one after the other."""
    cascade = run_pipeline(parse_cascade(SHARDED, "<gated>"), "canonicalize").final
    whole = stated(cascade, {"T": tokens, "D": WIDTH, "F": HIDDEN})
    program = split(whole, "t", cuts) if cuts else whole
    clock, slices = Clock.of(whole, alone()), len(cuts) + 1
    steps = [step for step in program.steps if not isinstance(step, Collective)]
    kernels = [
        [step for step in steps[piece::slices] if (step.name == "Y") == last]
        for piece in range(slices)
        for last in (0, 1)
    ]
    return sum(clock.compute_us(kernel, alone().gpu.sms) for kernel in kernels)
