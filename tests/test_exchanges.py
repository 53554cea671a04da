"""Exchanges in parts, and exchanges that are one kernel with what is computed around them: they mean the same, wait for
what they must, and take what was measured, or lose where that lost."""

from __future__ import annotations

import dataclasses

import pytest

from cascade.backends.distributed.fused import fused
from cascade.backends.distributed.kernels import Clock, Layer, groups, layer_of, problem_of
from cascade.backends.distributed.machine import node
from cascade.errors import UnsupportedError
from cascade.ir import Mesh, Shard
from cascade.passes.exchanges import by_parts, gather_later, scatter_gather
from cascade.passes.reach import Reach
from cascade.passes.schedule_overlap import serial_us
from cascade.passes.shard import stated
from cascade.passes.split_tokens import dependencies, split
from cascade.placed import Collective, Kind, Program
from tests.test_shard import ATTENTION, SIZES, agrees, canonical, collectives, first, lifted, sharded
from tests.test_split_tokens import results


def scattered(devices: int = 4) -> Program:
    """A layer whose sum is scattered to tokens; what is local to them stands before the gather."""
    program = sharded(devices)
    program = scatter_gather(program, first(program, Kind.ALL_REDUCE, "S"), 0)
    for tensor in ("S", "Z", "Q"):
        program = gather_later(program, first(program, Kind.ALL_GATHER, tensor))
    return program


# --- in parts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("cuts", [(2,), (1, 4), (1, 2, 3, 4)])
def test_a_scatter_goes_part_by_part(devices: int, cuts: tuple[int, ...]) -> None:
    before = scattered(devices)
    program = by_parts(before, first(before, Kind.REDUCE_SCATTER, "S"), "d", cuts)
    assert collectives(program).count(("reduce-scatter", "S")) == len(cuts) + 1
    agrees(program, SIZES)
    needs = dependencies(program)
    parts = [n for n, step in enumerate(program.steps) if getattr(step, "kind", None) is Kind.REDUCE_SCATTER]
    assert all(len(needs[part]) == 1 for part in parts) and len({needs[part] for part in parts}) == len(parts)


@pytest.mark.parametrize("rank", ["t", "d"])
def test_an_all_reduce_goes_part_by_part(rank: str) -> None:
    before = sharded()
    program = by_parts(before, first(before, Kind.ALL_REDUCE, "S"), rank, (1, 3))
    assert collectives(program) == [("all-reduce", "S")] * 3
    agrees(program, SIZES)


def test_the_states_of_a_fold_go_part_by_part() -> None:
    sizes = {"H": 3, "M": 5, "N": 9, "E": 3, "F": 2}
    before = stated(lifted(ATTENTION, Mesh("cp", 3), Shard("n", "cp")), sizes)
    lead = next(step.tensor for step in before.steps if isinstance(step, Collective))
    agrees(by_parts(before, first(before, Kind.ALL_REDUCE, lead), "m", (2,)), sizes)


def test_what_is_no_part_is_refused() -> None:
    before = scattered()
    number = first(before, Kind.REDUCE_SCATTER, "S")
    for rank, cuts, why in (
        ("t", (2,), "spread along 't'"),
        ("f", (2,), "parts along 'f'"),
        ("d", (0, 9), "rise from"),
    ):
        with pytest.raises(UnsupportedError, match=why):
            by_parts(before, number, rank, cuts)
    with pytest.raises(UnsupportedError, match="merges no whole result"):
        by_parts(before, number - 1, "d", (2,))


# --- as one kernel ---------------------------------------------------------------------------------------------------

SEAM = """
cascade two(X[T,D], V[F,D], W[D,F], V2[F,D], W2[D,F]) -> Y[T,D] {
    N[t,d] = 2 * X[t,d]
    H[t,f] = N[t,d] * V[f,d]
    S[t,d] = H[t,f] * W[d,f]
    Z[t,d] = X[t,d] + S[t,d]
    M[t,d] = 2 * Z[t,d]
    G[t,f] = M[t,d] * V2[f,d]
    R[t,d] = G[t,f] * W2[d,f]
    Y[t,d] = Z[t,d] + R[t,d]
}
"""
SMALL = {"T": 8, "D": 4, "F": 6}


def layered(program: Program) -> tuple[Layer, Reach]:
    needs = dependencies(program)
    found = layer_of(groups(program, needs), [[number] for number in range(len(program.steps))], needs)
    return found, Reach(program.cascade, dict(program.sizes))


def seam(devices: int) -> Program:
    """Two layers in a row, with the residual kept on shards of tokens."""
    schedule = (Mesh("tp", devices), Shard("f", "tp"), Shard("t", "tp"))
    return stated(canonical(SEAM, *schedule), SMALL)


def closed(layer: Layer) -> list[set[int]]:
    """The tasks that each task is behind, however far, by definition."""
    behind: list[set[int]] = []
    for needed in layer.needs:
        behind.append(set(needed).union(*(behind[other] for other in needed)))
    return behind


@pytest.mark.parametrize("devices", [2, 4])
def test_an_exchange_is_one_task_and_keeps_what_it_waits_for(devices: int) -> None:
    program = seam(devices)
    before, reach = layered(program)
    layer = fused(program, before, reach)
    exchanges = [own for own in layer.steps if len(own) > 1 and isinstance(program.steps[own[-1]], Collective)]
    assert len(exchanges) == 1 and len(layer.steps) < len(before.steps)
    home = {step: task for task, own in enumerate(layer.steps) for step in own}
    behind = closed(layer)
    for late, needed in enumerate(dependencies(program)):
        assert all(home[late] == home[early] or home[early] in behind[home[late]] for early in needed)
    found, wanted = results(program, [step for own in layer.steps for step in own])
    assert float((found["Y"] - wanted["Y"].double()).abs().max()) <= 1e-12


def test_slices_have_exchanges_of_their_own() -> None:
    program = split(seam(2), "t", (4,))
    needs = dependencies(program)
    layer = Layer(tuple((n,) for n in range(len(program.steps))), needs)
    found = fused(program, layer, Reach(program.cascade, dict(program.sizes)))
    exchanges = [own for own in found.steps if len(own) > 1]
    assert len(exchanges) == 2
    for own in exchanges:
        assert len({program.steps[number].at[0][1:] for number in own}) == 1  # of one slice


def test_the_seam_of_two_layers_is_the_exchange_of_one_that_follows_itself() -> None:
    """One layer in a row takes what the second of two layers adds, where nothing runs beside anything."""
    half = SEAM.replace("M[t,d] = 2 * Z[t,d]", "").split("    G[t,f]")[0].replace("    Z[t,d]", "    Y[t,d]") + "}"
    half = half.replace("two(X[T,D], V[F,D], W[D,F], V2[F,D], W2[D,F])", "one(X[T,D], V[F,D], W[D,F])").replace(
        "\n    \n", "\n"
    )
    large = {"T": 4096, "D": 8192, "F": 28672}
    schedule = (Mesh("tp", 8), Shard("f", "tp"), Shard("t", "tp"))
    times = []
    for text in (half, SEAM):
        program = stated(canonical(text, *schedule), large)
        layer, reach = layered(program)
        clock = Clock.of(program, node("h100x8"))
        times.append(serial_us(problem_of(program, fused(program, layer, reach), clock, 8)))
    one = stated(canonical(half, *schedule), large)
    layer, reach = layered(one)
    last = len(layer.steps) - 1
    carried = tuple((task, last) for task, own in enumerate(layer.steps) if {"N", "Y"} & names(one, own))
    cycle = fused(one, dataclasses.replace(layer, carried=carried), reach)
    assert len(cycle.steps) < len(layer.steps) and cycle.carried
    clock = Clock.of(one, node("h100x8"))
    assert serial_us(problem_of(one, cycle, clock, 8)) == pytest.approx(times[1] - times[0], rel=1e-6)


def names(program: Program, own: tuple[int, ...]) -> set[str]:
    return {getattr(program.steps[number], "name", "") for number in own}
