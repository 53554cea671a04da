"""Exchanges in parts and by shards of rows, and exchanges that are one kernel with what is computed around them: they
mean the same, wait for what they must, and take what was measured, or lose where that lost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch

from cascade.backends.distributed.fused import fused
from cascade.backends.distributed.kernels import Clock, Layer, groups, layer_of, problem_of
from cascade.backends.distributed.machine import node
from cascade.backends.distributed.simulate import simulate
from cascade.errors import UnsupportedError
from cascade.ir import Mesh, Shard
from cascade.passes.exchanges import by_parts, by_rows, by_shards, gather_later, refactor_axis, scatter_gather
from cascade.passes.reach import Reach
from cascade.passes.schedule_overlap import serial_us
from cascade.passes.shard import stated
from cascade.passes.split_tokens import dependencies, lacks, split
from cascade.placed import Axis, Collective, Compute, Kind, Program, Step, read_program, render_program
from cascade.verify.rings import check_rings
from tests.test_shard import ATTENTION, SIZES, agrees, canonical, collectives, first, lifted, sharded
from tests.test_split_tokens import changed, results, right, swapped


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


# --- by shards of rows -----------------------------------------------------------------------------------------------


def ring(devices: int = 4, both_ways: bool = False, dim: int = 0) -> Program:
    """A layer whose sum goes to tokens, or to columns, shard by shard round a ring; gathered again behind it."""
    before = sharded(devices)
    program = scatter_gather(before, first(before, Kind.ALL_REDUCE, "S"), dim)
    return by_rows(program, first(program, Kind.REDUCE_SCATTER, "S"), both_ways)


def is_right(program: Program) -> bool:
    """What simulated ranks say; where it is so, no device lacks anything and every part comes once."""
    assert not right(program) or not (list(lacks(program)) or list(check_rings(program)))
    return right(program)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_a_scatter_goes_by_shards_of_rows(devices: int, both_ways: bool) -> None:
    """Of ten rows over devices that do not divide them; whole, and in slices of which some devices have no row."""
    program = ring(devices, both_ways)
    assert collectives(program)[:devices] == [("shift", "S")] * devices
    agrees(program, SIZES)
    assert is_right(program) and is_right(split(program, "t", (4,)))


def test_columns_go_round_like_rows() -> None:
    program = ring(3, dim=1)
    agrees(program, SIZES)
    assert is_right(program)


def test_each_device_begins_with_the_shard_that_goes_farthest_and_waits_for_no_other() -> None:
    """A shard is computed beside the one before it, and passed on behind itself and what came of it."""
    for both_ways, order in ((False, [3, 2, 1, 0]), (True, [2, -1, 1, 0])):
        program = ring(4, both_ways)
        needs = dependencies(program)
        made = [n for n, s in enumerate(program.steps) if isinstance(s, Compute) and s.name == "S"]
        passed = [n for n, s in enumerate(program.steps) if isinstance(s, Collective) and s.passes]
        hops = [getattr(program.steps[n], "hop", None) for n in passed]
        assert hops == order == [program.steps[n].along[1].hop for n in made]  # type: ignore[union-attr]
        assert len({needs[n] for n in made}) == 1 and not set(needs[made[0]]) & {*made, *passed}
        for number, hop in zip(passed, hops, strict=True):
            before = {n for n, h in zip(passed, hops, strict=True) if h in (hop + 1, hop - 1) and abs(h) > abs(hop)}
            assert set(needs[number]) == {made[hops.index(hop)], *before}


@pytest.mark.parametrize("reducer", ["sum", "prod", "max", "min", "any", "all"])
@pytest.mark.parametrize("devices", [2, 4, 8])
def test_what_merges_in_any_order_goes_round(reducer: str, devices: int) -> None:
    """Where a filter leaves a device nothing of a row too, and parts of no coordinates."""
    body = "X[t,n] > 0" if reducer in ("any", "all") else "X[t,n]"
    text = f"cascade c(X[T,N]) -> Y[T] {{ Y[t] = {reducer}[n] {body}   where n <= t }}"
    sizes = {"T": 9, "N": 9}
    before = stated(canonical(text, Mesh("p", devices), Shard("n", "p")), sizes)
    name = next(step.tensor for step in before.steps if isinstance(step, Collective))
    program = scatter_gather(before, first(before, Kind.ALL_REDUCE, name), 0)
    program = by_rows(program, first(program, Kind.REDUCE_SCATTER, name))
    agrees(program, sizes)
    assert is_right(program)


def test_one_axis_of_two_is_a_ring() -> None:
    schedule = (Mesh("dp", 2), Mesh("tp", 3), Shard("e", "dp"), Shard("f", "tp"))
    text = "cascade c(X[T,F], W[F,E]) -> Y[T,E] { Y[t,e] = X[t,f] * W[f,e] }"
    sizes = {"T": 7, "F": 5, "E": 4}
    before = stated(canonical(text, *schedule), sizes)
    program = scatter_gather(before, first(before, Kind.ALL_REDUCE, "Y"), 0)
    program = by_rows(program, first(program, Kind.REDUCE_SCATTER, "Y"))
    agrees(program, sizes)
    assert is_right(program)


def test_shards_that_come_by_go_on_round() -> None:
    """Both halves of one layer: what is gathered comes shard by shard, what is scattered goes so."""
    text = """cascade c(X[T,D], Wu[D,F], Wd[F,E]) -> Y[T,E] {
        M[x,d] = 2 * X[x,d]
        H[t,f] = M[t,d] * Wu[d,f]
        Y[t,e] = H[t,f] * Wd[f,e]
    }"""
    sizes = {"T": 9, "D": 4, "F": 6, "E": 5}
    program = stated(canonical(text, Mesh("tp", 4), Shard("x", "tp"), Shard("f", "tp")), sizes)
    program = by_shards(program, first(program, Kind.ALL_GATHER, "M"))
    program = scatter_gather(program, first(program, Kind.ALL_REDUCE, "Y"), 0)
    program = by_rows(program, first(program, Kind.REDUCE_SCATTER, "Y"))
    assert [step.hop for step in program.steps if isinstance(step, Collective)] == [1, 2, 3, 3, 2, 1, 0, 0]
    agrees(program, sizes)
    assert is_right(program)


def refused(program: Program, number: int, why: str) -> None:
    with pytest.raises(UnsupportedError, match=f"C552.*{why}"):
        by_rows(program, number)


def test_what_cannot_go_round_is_refused() -> None:
    before = scattered()
    number = first(before, Kind.REDUCE_SCATTER, "S")
    step, maker = before.steps[number], before.steps[number - 1]
    assert isinstance(step, Collective) and isinstance(maker, Compute)

    def instead(*steps: Step) -> Program:
        return dataclasses.replace(before, steps=(*before.steps[: number - 1], *steps, *before.steps[number + 1 :]))

    refused(before, number - 1, "no whole reduce-scatter")
    refused(sharded(), first(sharded(), Kind.ALL_REDUCE, "S"), "no whole reduce-scatter")
    refused(instead(maker, dataclasses.replace(step, at=((1, 0, 5),))), number, "no whole reduce-scatter")
    halves = (dataclasses.replace(maker, at=(("d", *window),)) for window in ((0, 2), (2, 5)))
    refused(instead(*halves, step), number + 1, "'S' is not whole")
    refused(instead(dataclasses.replace(maker, at=(("d", 0, 5),)), step), number, "'S' is not whole")
    spread = dataclasses.replace(maker, along=(*maker.along, dataclasses.replace(maker.along[0], rank="t")))
    refused(instead(spread, step), number, "or does so already")
    few = dataclasses.replace(before, sizes=tuple((name, 3 if name == "T" else size) for name, size in before.sizes))
    refused(few, number, "no coordinate for each of the devices")


def test_what_is_partial_over_other_axes_too_does_not_go_round() -> None:
    program = refactor_axis(sharded(), "tp", Axis("node", 2), Axis("gpu", 2))
    program = scatter_gather(program, first(program, Kind.ALL_REDUCE, "S"), 0)
    refused(program, first(program, Kind.REDUCE_SCATTER, "S"), "not partial over gpu alone")


@pytest.mark.parametrize(
    "text", ["Y[t] = argmax[n] X[t,n]", "Y[t] = argmin[n] X[t,n]", "Y[t,j], I[t,j] = topk[n, 2] X[t,n]"]
)
def test_what_keeps_the_first_of_equals_does_not_go_round(text: str) -> None:
    results = "Y[T,2], I[T,2]" if "topk" in text else "Y[T]"
    cascade = canonical(f"cascade c(X[T,N]) -> {results} {{ {text} }}", Mesh("p", 3), Shard("n", "p"))
    program = stated(cascade, {"T": 5, "N": 7})
    program = scatter_gather(program, first(program, Kind.ALL_REDUCE, "Y"), 0)
    refused(program, 1, "does not merge in any order")


def test_the_states_of_a_fold_do_not_go_round() -> None:
    """They are merged for everyone, by no reduce-scatter."""
    sizes = {"H": 3, "M": 5, "N": 9, "E": 3, "F": 2}
    program = stated(lifted(ATTENTION, Mesh("cp", 3), Shard("n", "cp")), sizes)
    lead = next(step.tensor for step in program.steps if isinstance(step, Collective))
    refused(program, first(program, Kind.ALL_REDUCE, lead), "no whole reduce-scatter")
    with pytest.raises(UnsupportedError, match=r"C552.*merged for everyone"):
        scatter_gather(program, first(program, Kind.ALL_REDUCE, lead), 0)
    as_scatter = changed(program, lambda s: dataclasses.replace(s, kind=Kind.REDUCE_SCATTER, target=0) if isinstance(s, Collective) else s)  # fmt: skip
    refused(as_scatter, first(as_scatter, Kind.REDUCE_SCATTER, lead), "'fold' does not merge in any order")


def test_equal_parts_would_be_chosen_by_their_order() -> None:
    """Why the coordinate of an extreme does not go round: of equals the first is kept, and the ring has another first."""
    text = "cascade c(X[T,N]) -> Y[T] { Y[t] = argmax[n] X[t,n] }"
    before = stated(canonical(text, Mesh("p", 4), Shard("n", "p")), {"T": 4, "N": 4})
    before = scatter_gather(before, first(before, Kind.ALL_REDUCE, "Y"), 0)
    as_max = changed(before, lambda s: dataclasses.replace(s, reducer="max") if isinstance(s, Collective) and s.reducer else s)  # fmt: skip
    program = by_rows(as_max, first(as_max, Kind.REDUCE_SCATTER, "Y"))
    program = changed(program, lambda s: dataclasses.replace(s, reducer="argmax") if isinstance(s, Collective) and s.reducer else s)  # fmt: skip
    inputs = {"X": torch.tensor([[0.0, 1.0, 1.0, 0.0]] * 4, dtype=torch.float64)}
    assert simulate(before, inputs)["Y"].tolist() == [1.0] * 4
    assert simulate(program, inputs)["Y"].tolist() != [1.0] * 4


TEXT = """mesh tp = 2
size D = 5
size E = 7
size F = 11
size T = 10
place Wu 1 over tp
place Wd 0 over tp
compute H_sum along f over tp
compute H along f over tp
compute S along f over tp along t over tp hop 1
shift S over tp by sum to 0 hop 1
compute S along f over tp along t over tp
shift S over tp by sum to 0
all-gather S over tp from 0
compute Z
compute Q
compute M
compute Y
"""


def test_a_ring_of_partial_results_as_text() -> None:
    program = ring(2)
    assert render_program(program) == TEXT and read_program(TEXT, program.cascade) == program
    for wrong in ("by sum hop 1", "to 0 hop 1", "from 0 by sum to 0", "hop 1"):
        with pytest.raises(UnsupportedError, match="C550"):
            read_program(TEXT.replace("by sum to 0 hop 1", wrong), program.cascade)


def shifts(change: Callable[[Collective], Step | None]) -> Callable[[Program], Program]:
    """A change of the shifts of partial results; None drops one."""
    return lambda program: changed(program, lambda s: change(s) if isinstance(s, Collective) and s.passes else s)


def made(change: Callable[[int], int | None]) -> Callable[[Program], Program]:
    """A change of the hops of the statement that makes what goes round; None drops one."""

    def of(step: Step) -> Step | None:
        if not isinstance(step, Compute) or step.name != "S":
            return step
        hop = change(step.along[1].hop)
        own = step.along[0], dataclasses.replace(step.along[1], hop=hop or 0)
        return None if hop is None else dataclasses.replace(step, along=own)

    return lambda program: changed(program, of)


def at(program: Program, hop: int, kind: type[Step] = Collective) -> int:
    """The step that passes a shard on, or makes it."""
    return next(
        n for n, s in enumerate(program.steps)
        if isinstance(s, kind) and (s.passes and s.hop == hop if isinstance(s, Collective) else s.name == "S" and s.along[1].hop == hop)
    )  # fmt: skip


MUTANTS: dict[str, Callable[[Program], Program]] = {
    "an add dropped: a shard is not passed on": shifts(lambda s: None if s.hop == 2 else s),
    "an add dropped: a part is not made": made(lambda hop: None if hop == 1 else hop),
    "the last add dropped": shifts(lambda s: s if s.hop else None),
    "a hop too far": shifts(lambda s: dataclasses.replace(s, hop=s.hop + 1)),
    "a hop too near": shifts(lambda s: dataclasses.replace(s, hop=max(0, s.hop - 1))),
    "the other way": shifts(lambda s: dataclasses.replace(s, hop=-s.hop)),
    "parts of the other way": made(lambda hop: -hop),
    "a part twice": made(lambda hop: 1 if hop == 2 else hop),
    "passed on before it is made": lambda p: swapped(p, at(p, 2), at(p, 2, Compute)),
    "passed on before it has come": lambda p: swapped(p, at(p, 2), at(p, 1)),
    "max for sum": shifts(lambda s: dataclasses.replace(s, reducer="max")),
    "to the other dimension": shifts(lambda s: dataclasses.replace(s, target=1)),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_a_ring_is_killed(name: str) -> None:
    """By the numbers; and where parts are lost or counted twice, by the rule that counts them out."""
    program = ring(4)
    assert is_right(program)
    mutant = MUTANTS[name](program)
    assert mutant != program and not right(mutant)
    assert bool(list(check_rings(mutant))) is (name not in ("max for sum",))


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
