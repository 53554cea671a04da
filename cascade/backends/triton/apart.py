"""Products out of a kernel that combines them, each by a library, and a kernel for what is left.

    A[t,f] = sum[d] X[t,d] * G[f,d]                     A by the library
    B[t,f] = sum[d] X[t,d] * U[f,d]              -->    B by the library, or with the rest
    H[t,f] = silu(A[t,f]) * B[t,f]                      a kernel for H

One kernel stores nothing between, but two sums leave it half the tile that one has, or what follows a sum keeps tensor
cores waiting. Which takes longer depends on the machine: the others are candidates beside tiles where the model says
that they are no slower or not much. What goes between is no larger than what is written anyhow: memory is not traded.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cascade.backends.triton.library import WIDTH, Multiplied, candidate, estimated, multiplied
from cascade.backends.triton.lower import unsupported
from cascade.backends.triton.machine import Estimate, Machine
from cascade.backends.triton.partition import Group, Rest, all_ranks
from cascade.backends.triton.planner import Planner, Tiling
from cascade.backends.triton.split import numbered
from cascade.backends.triton.tune import Choice, Others, choose
from cascade.errors import UnsupportedError
from cascade.inference import stated
from cascade.ir import Cascade, Param
from cascade.walk import reads, targets

NEAR = 1.1
"""Times the best tiles of one kernel, by the model: what takes longer is not tried."""


@dataclass(frozen=True, slots=True)
class Part:
    """One of the kernels in the place of one: its planner and label, its group among others, how it is to run."""

    planner: Planner
    label: str
    group: Group
    groups: tuple[Group | Rest, ...]
    product: Multiplied | None  # what the library multiplies; None where the group is planned as any other

    @property
    def tiling(self) -> Tiling:
        """That of the library."""
        own = self.planner.default_tiling(self.group)
        return Tiling(own.tiles, own.options, library=True)

    def choice(self, machine: Machine, of_all: Choice | None = None) -> Choice:
        """What the model says of it, with how they were chosen `of_all`.

        UnsupportedError where it knows nothing of the library's product.
        """
        if self.product is None:
            return choose(self.planner, self.label, self.group, self.groups, machine)
        found = estimated(machine, self.product)
        if found is None:
            raise unsupported(f"{self.product.result} by a library, on {machine.name}")
        told = "" if of_all is None else f", {of_all.how}"
        return Choice(self.tiling, found, f"one of {len(self.groups)} kernels in the place of one{told}")


def elsewhere(planner: Planner, label: str, group: Group, groups: Sequence[Group | Rest], machine: Machine) -> Others:
    """What may take the place of a group's kernel, of what the model says that it is near the time of its tiles."""

    def found(own_us: float) -> list[tuple[Tiling, Estimate]]:
        whole = candidate(planner, group, groups, machine)
        if whole is not None:
            return [whole]
        return [*_in_parts(planner, label, group, groups, machine, NEAR * own_us)]

    return found


def _in_parts(
    planner: Planner, label: str, group: Group, groups: Sequence[Group | Rest], machine: Machine, within_us: float
) -> Iterator[tuple[Tiling, Estimate]]:
    """All of its products by the library, and all but the last, where that takes less than so long."""
    names = _products(planner, group, groups)
    for apart in dict.fromkeys((names, names[:-1])):
        if not apart or _least_us(planner, group, apart, machine) > within_us:
            continue
        try:
            kernels = tuple(parts(planner, label, group, groups, apart))
            estimate = _together(kernels, [one.choice(machine).estimate for one in kernels])
        except UnsupportedError:
            continue
        if estimate.time_us < within_us:
            tiling = planner.default_tiling(group)
            yield Tiling(tiling.tiles, tiling.options, apart=apart), estimate


def _products(planner: Planner, group: Group, groups: Sequence[Group | Rest]) -> tuple[str, ...]:
    """The products of a group that the library could multiply and that are no larger than what is written anyhow."""
    stored = planner.stored(group, groups)
    involved = {*group.names, *(name for stmt in group.statements for name in reads(stmt))}
    if group.rows is not None or involved & (planner.absent | {*planner.updates}):
        return ()
    most = max(math.prod(planner.numbers(name)) for name in stored)
    found = (target.name for stmt in planner.products(group) for target in targets(stmt))
    return tuple(name for name in found if name not in stored and math.prod(planner.numbers(name)) <= most)


def _least_us(planner: Planner, group: Group, apart: Sequence[str], machine: Machine) -> float:
    """What it takes at least: all products at the machine's best rate, and what goes between out and back."""
    rate = machine.matrix_tflops.get("bf16", math.inf)
    products = planner.products(group)
    flops = sum(2.0 * math.prod(planner.ranks[rank] for rank in all_ranks(stmt)) for stmt in products)
    between = sum(2.0 * WIDTH * math.prod(planner.numbers(name)) for name in apart)
    return flops / (rate * 1e6) + between / (machine.bandwidth_tbs * 1e6)


def _together(kernels: Sequence[Part], estimates: Sequence[Estimate]) -> Estimate:
    """The times of kernels that run one after the other."""
    busy: Counter[str] = Counter()
    for one in estimates:
        busy.update(dict(one.parts))
    longest = max(estimates, key=lambda one: one.time_us)
    told = (
        f"{' and '.join(part.group.names)} {'by the library ' if part.product else ''}{one.time_us:.1f} us"
        for part, one in zip(kernels, estimates, strict=True)
    )
    total, waves = sum(one.time_us for one in estimates), sum(one.waves for one in estimates)
    return Estimate(total, longest.bound, tuple(busy.items()), longest.blocks_per_sm, waves, ", ".join(told))


# --- the kernels -----------------------------------------------------------------------------------------------------


def parts(
    planner: Planner, label: str, group: Group, groups: Sequence[Group | Rest], apart: Sequence[str]
) -> Iterator[Part]:
    """The kernels that take the place of a group's, in order; UnsupportedError where the library cannot multiply."""
    inner = planner_of_parts(planner, label, group, groups, apart)
    found = inner.groups()
    for number, one in enumerate(found):
        if isinstance(one, Rest):
            raise unsupported(one.reason)
        product = multiplied(inner, one, found) if one.names[0] in apart else None
        if product is None and one.names[0] in apart:
            raise unsupported(f"{one.names[0]} by a library")
        yield Part(inner, f"{label}_{number}", one, found, product)


def planner_of_parts(
    planner: Planner, label: str, group: Group, groups: Sequence[Group | Rest], apart: Sequence[str]
) -> Planner:
    """The planner of a group's statements with kernels of their own for what is `apart`."""
    results = tuple(
        dataclasses.replace(planner.result(name), dtype=planner.written(name, groups).dtype)
        for name in planner.stored(group, groups)
    )
    made = set(group.names)
    given = dict.fromkeys(name for stmt in group.statements for name in reads(stmt) if name not in made)
    params = tuple(Param(name, planner.dtypes[name], planner.shapes[name]) for name in given)
    bound = {size for one in params for size in one.shape} | {size for one in results for size in one.shape}
    body = tuple(numbered(stmt, bound, planner.extents) for stmt in group.statements)
    cascade = stated(Cascade(label, params, results, body), planner.sizes)
    layouts = {name: planner.layouts.get(name) or planner.made(name, groups) for name in given}
    return Planner(
        cascade, planner.extents, layouts, planner.descriptors, planner.moving, planner.supposed, joined=planner.joined,
        narrow=planner.narrow, apart=frozenset(apart),
    )  # fmt: skip
