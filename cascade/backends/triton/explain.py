"""What a call runs, in words: a table of its kernels, then each with its statements, its tiles, what is predicted of
it, and what else was considered.

    step  reads    writes  operations     predicted  measured   of the bound
    mix   403 MB   134 MB  1.1 TFLOP      2280.2 us  2138.0 us  64% of matrix

    kernel mix: 1 of 1
        O[b,h,m,f] = ...
      4096 programs of 128 m x 64 n, 4 warps, 2 stages
      predicted 2280.2 us: matrix bound (...), 2 blocks per SM, 15.5 waves
      chosen as the model's first of 9; next: 64 m x 64 n, 4 warps, 3 stages: 2369.0 us; ...
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cascade.backends.triton.count import live_registers, programs, shared_memory, work
from cascade.backends.triton.machine import Work
from cascade.backends.triton.offline import Failure, StaticFacts
from cascade.backends.triton.partition import Rest
from cascade.backends.triton.plan import Kernel, Role
from cascade.backends.triton.planner import Tiling
from cascade.backends.triton.tune import Candidate, Choice
from cascade.text import render_stmt


BY_LIBRARY = "no kernel of its own: PyTorch's library of matrix products multiplies, on a GPU cuBLAS"
"""What is said of a step that has none."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A kernel of a call: its plan, the values of its shape symbols, why it has these tiles, what it compiled to."""

    kernel: Kernel
    sizes: Mapping[str, int]
    choice: Choice | None = None
    facts: StaticFacts | Failure | None = None

    @property
    def by_library(self) -> bool:
        """Whether a library multiplies in the place of the kernel."""
        return self.choice is not None and self.choice.tiling.library


def describe(*steps: Launch | Rest) -> str:
    """The steps of a call as text, in the order they run."""
    lines = [*_table(steps), ""] if any(isinstance(step, Launch) and step.choice for step in steps) else []
    for number, step in enumerate(steps, 1):
        if isinstance(step, Rest):
            lines.append(f"no kernel, {step.reason}: {number} of {len(steps)}")
            lines.extend(f"    {render_stmt(stmt)}" for stmt in step.statements)
            continue
        lines.append(f"kernel {step.kernel.name}: {number} of {len(steps)}")
        lines.extend(f"    {statement}" for statement in step.kernel.statements)
        lines.extend(f"  {line}" for line in _plan(step))
    return "\n".join(lines) + "\n"


def _table(steps: Sequence[Launch | Rest]) -> Iterator[str]:
    """What each step moves and computes, how long it takes, and how much of that the unit is busy that bounds it."""
    rows: list[tuple[str, ...]] = [("step", "reads", "writes", "operations", "predicted", "measured", "of the bound")]
    counted = [(step, work(step.kernel, step.sizes)) for step in steps if isinstance(step, Launch) and step.choice]
    known = {id(step): _row(step, found) for step, found in counted}
    for step in steps:
        name = step.kernel.name if isinstance(step, Launch) else f"no kernel: {step.reason}"
        rows.append(known.get(id(step), (name, "", "", "", "", "", "")))
    if len(counted) > 1:
        choices = [step.choice for step, _ in counted if step.choice is not None]
        times = [choice.milliseconds for choice in choices if choice.milliseconds is not None]
        rows.append((
            "all", quantity(sum(found.read_bytes for _, found in counted), "B"),
            quantity(sum(found.write_bytes for _, found in counted), "B"),
            _operations(sum(found.matrix_flops for _, found in counted)),
            f"{sum(choice.estimate.time_us for choice in choices):.1f} us",
            f"{1e3 * sum(times):.1f} us" if len(times) == len(choices) else "", "",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip()


def _row(step: Launch, found: Work) -> tuple[str, ...]:
    """A line of the table. Bytes are those of memory; operations those of matrix products."""
    choice = step.choice
    assert choice is not None
    estimate, measured = choice.estimate, choice.milliseconds
    taken = estimate.time_us if measured is None else 1e3 * measured
    busy = dict(estimate.parts).get(estimate.bound)
    return (
        step.kernel.name, quantity(found.read_bytes, "B"), quantity(found.write_bytes, "B"),
        _operations(found.matrix_flops),
        f"{estimate.time_us:.1f} us", "" if measured is None else f"{taken:.1f} us",
        "" if busy is None else f"{100 * busy / taken:.0f}% of {estimate.bound}",
    )  # fmt: skip


def quantity(count: float, unit: str) -> str:
    """A number of units with three digits, `33.6 MB`: each prefix is a thousand times the one before."""
    for prefix in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} T{unit}"


def _operations(flops: float) -> str:
    return quantity(flops, "FLOP") if flops else ""


def _plan(step: Launch) -> Iterator[str]:
    kernel = step.kernel
    tiles = [(axis.rank, axis.tile) for axis in kernel.axes if axis.role is not Role.POINT]
    yield from kernel.why
    if step.choice is not None and step.by_library:
        yield BY_LIBRARY
        yield f"predicted {step.choice.estimate.text()}"
        yield f"  {step.choice.estimate.why}"
        yield f"chosen as {step.choice.how}{_others(step.choice.others)}"
        return
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
    if tiling.library:
        return "the library's"
    if tiling.apart:
        return f"{' and '.join(tiling.apart)} by the library, others after"
    tiles = " x ".join(f"{tile} {rank}" for rank, tile in tiling.tiles) or "one coordinate"
    even = " on average, all as long" if tiling.even else ""
    parts = f", in {plural(tiling.parts, 'part')}{even}" if tiling.shared else ""
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


def _compiled(facts: StaticFacts | Failure) -> str:
    """What the machine code shows, or why there is none."""
    if isinstance(facts, Failure):
        return f"does not compile: {facts.message}"
    spilled = f", {facts.spills} bytes spilled" if facts.spills else ""
    waiting = f", products wait ({', '.join(facts.serialized)})" if facts.serialized else ""
    blocks = plural(facts.blocks_per_sm, "block")
    return (
        f"compiled: {facts.registers} registers a thread{spilled}, {facts.shared_bytes} bytes of shared memory, "
        f"{blocks} per SM{waiting}"
    )
