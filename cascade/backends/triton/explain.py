"""What a call runs, in words: each kernel with its statements, its tiles, what is predicted of it, and what else was
considered.

    kernel mix: 1 of 1
        O[b,h,m,f] = ...
      4096 programs of 128 m x 64 n, 4 warps, 2 stages
      predicted 2280.2 us: matrix bound (...), 2 blocks per SM, 15.5 waves
      chosen as the model's first of 9; next: 64 m x 64 n, 4 warps, 3 stages: 2369.0 us; ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cascade.backends.triton.count import live_registers, programs, shared_memory
from cascade.backends.triton.offline import StaticFacts
from cascade.backends.triton.partition import Rest
from cascade.backends.triton.plan import Kernel, Role
from cascade.backends.triton.planner import Tiling
from cascade.backends.triton.tune import Candidate, Choice
from cascade.text import render_stmt


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel of a call: its plan, the values of its shape symbols, why it has these tiles, what it compiled to."""

    kernel: Kernel
    sizes: Mapping[str, int]
    choice: Choice | None = None
    facts: StaticFacts | None = None


def describe(*steps: Launch | Rest) -> str:
    """The steps of a call as text, in the order they run."""
    lines: list[str] = []
    for number, step in enumerate(steps, 1):
        if isinstance(step, Rest):
            lines.append(f"no kernel, {step.reason}: {number} of {len(steps)}")
            lines.extend(f"    {render_stmt(stmt)}" for stmt in step.statements)
            continue
        lines.append(f"kernel {step.kernel.name}: {number} of {len(steps)}")
        lines.extend(f"    {statement}" for statement in step.kernel.statements)
        lines.extend(f"  {line}" for line in _plan(step))
    return "\n".join(lines) + "\n"


def _plan(step: Launch) -> Iterator[str]:
    kernel = step.kernel
    tiles = [(axis.rank, axis.tile) for axis in kernel.axes if axis.role is not Role.POINT]
    yield from kernel.why
    count = plural(programs(kernel, step.sizes), "program")
    yield f"{count} of {tiles_text(Tiling(tuple(tiles), kernel.options))}"
    if nested := [axis.rank for axis in kernel.axes if axis.role is Role.INNER]:
        (stream,) = (axis.rank for axis in kernel.axes if axis.role is Role.STREAM)
        yield f"for each tile of {stream} a loop over {' and over '.join(nested)}: what it sums is never stored"
    for rank in (axis.rank for axis in kernel.axes if axis.told):
        yield f"a table says which part of which {rank} a program has: all are as long, however much each {rank} has"
    if kernel.singly:
        (stream,) = (axis.rank for axis in kernel.axes if axis.role is Role.STREAM)
        yield f"one coordinate of {stream} at a time: nothing composes the steps of {', '.join(kernel.singly)}"
    if step.choice is not None:
        yield f"predicted {step.choice.estimate.text()}"
        if step.choice.estimate.why:
            yield f"  {step.choice.estimate.why}"
        yield f"chosen as {step.choice.how}{_others(step.choice.others)}"
    if step.facts is None:
        yield f"guessed: {live_registers(kernel)} registers a thread, {shared_memory(kernel)} bytes of shared memory"
    else:
        yield _compiled(step.facts)


def tiles_text(tiling: Tiling) -> str:
    """Tiles and how they are launched: `128 m x 64 n, 4 warps, 2 stages`."""
    tiles = " x ".join(f"{tile} {rank}" for rank, tile in tiling.tiles) or "one coordinate"
    even = " on average, all as long" if tiling.even else ""
    parts = f", in {tiling.parts} parts{even}" if tiling.parts > 1 else ""
    options = tiling.options
    order = f", {options.grouped} tiles beside each other" if options.grouped else ""
    order += f", {plural(options.resident, 'program')} of each SM for all" if options.resident else ""
    order += f", ending in {options.pieces} pieces" if options.pieces > 1 else ""
    return f"{tiles}{parts}, {plural(options.num_warps, 'warp')}, {plural(options.num_stages, 'stage')}{order}"


def plural(count: int, noun: str) -> str:
    """The count with its noun: 1 warp, 4 warps."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _others(others: tuple[Candidate, ...]) -> str:
    """The next best candidates, each with its time: measured where it was, else predicted."""
    found = []
    for one in others:
        time = f"{one.estimate.time_us:.1f} us" if one.milliseconds is None else f"{one.milliseconds:.4g} ms"
        found.append(f"{tiles_text(one.tiling)}: {time}")
    return f"; next: {'; '.join(found)}" if found else ""


def _compiled(facts: StaticFacts) -> str:
    """What the machine code shows."""
    spilled = f", {facts.spills} bytes spilled" if facts.spills else ""
    waiting = f", products wait ({', '.join(facts.serialized)})" if facts.serialized else ""
    blocks = plural(facts.blocks_per_sm, "block")
    return (
        f"compiled: {facts.registers} registers a thread{spilled}, {facts.shared_bytes} bytes of shared memory, "
        f"{blocks} per SM{waiting}"
    )
