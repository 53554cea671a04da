"""Rows that fit into a tile and are gone through in trips all the same: which, by whose choice, and with what results."""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import programs
from cascade.backends.triton.launch import Bench, Groups
from cascade.backends.triton.machine import MACHINES
from cascade.backends.triton.partition import Group
from cascade.backends.triton.plan import Fold, Loop, Options, every_op
from cascade.backends.triton.planner import Planner, Tiling
from cascade.backends.triton.tune import TRIPS, Shortlist, candidates, choose, shortlist
from cascade.frontend.build import parse_cascade
from cascade.inference import infer_shapes
from tests.kernel_programs import PROGRAMS
from tests.planned import Chosen, call_of, final, only_group, planner_for
from tests.tolerance import Draw, confirmed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = MACHINES["h200"]
AGAIN = {
    "a norm": programs.RMSNORM,
    "a norm of a sum": programs.RESIDUAL_RMSNORM,
    "a norm about the mean": programs.LAYERNORM,
    "a softmax": programs.SOFTMAX,
}
ONCE = {
    "one reduction": "cascade c(X[M,N]) -> Y[M] { Y[m] = sum[n] X[m,n] }",
    "a map": "cascade c(X[M,N]) -> Y[M,N] { Y[m,n] = exp(X[m,n]) }",
    "steps": programs.CUMULATIVE_SUM,
    "the largest": programs.ROUTE,
    "a product": "cascade c(X[M,K], W[N,K]) -> Y[M,N] { Y[m,n] = silu(sum[k] X[m,k] * W[n,k]) }",
}
LARGE = {"M": 16384, "N": 8192, "K": 4096, "T": 16384, "E": 256}


class InTrips(Chosen):
    """A launcher whose rows go in trips of `tile` coordinates."""

    def tiling(self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench | None) -> Tiling:
        found = planner.in_trips(group)
        assert found is not None and found.arrangement.stream is not None
        return Tiling(((found.arrangement.stream, self.tile),), Options(1, 2), in_trips=True)


def planner_of(text: str) -> tuple[Planner, Group]:
    """The planner of a large call on tensors of 16 bits, and its one group."""
    cascade = final(text)
    shapes = infer_shapes(cascade).tensors
    sizes = {param.name: [LARGE.get(str(size), size) for size in shapes[param.name]] for param in cascade.params}
    inputs = {name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in sizes.items()}  # type: ignore[call-overload]
    found = planner_for(cascade, inputs)
    return found, only_group(found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["rmsnorm", "residual_norm", "layernorm", "softmax"])
def test_results_are_as_right_as_those_of_rows_that_are_read_once(name: str, dtype: torch.dtype) -> None:
    """By the tolerance rule, on all kinds of data; lengths that tiles divide, and that they do not."""
    program = PROGRAMS[name]
    call = call_of(InTrips(final(program.text), tile=64))

    def results(**given: torch.Tensor | int) -> torch.Tensor | tuple[torch.Tensor, ...]:
        found = call(**given)
        return found[0] if len(found) == 1 else found

    for recipe, length in zip(program.recipes(), itertools.cycle((65, 300, 512))):
        draw = Draw(program, {**program.small, "M": 5, "N": length}, recipe, dtype, DEVICE)
        verdict = confirmed(results, parse_cascade(program.text), draw)
        assert verdict.ok, f"{recipe}, {length}: {verdict}"


@pytest.mark.parametrize("name", AGAIN)
def test_a_kernel_in_trips_stores_what_the_other_one_does(name: str) -> None:
    plans, group = planner_of(AGAIN[name])
    whole, trips = (
        plans.kernel("c", group, plans.groups(), tiling)
        for tiling in (plans.default_tiling(group), Tiling((("n", 2048),), Options(8, 2), in_trips=True))
    )
    assert {tensor.name for tensor in whole.tensors} == {tensor.name for tensor in trips.tensors}
    assert sum(isinstance(op, Loop) for op in whole.ops) == 0 and sum(isinstance(op, Loop) for op in trips.ops) == 2


def test_short_tiles_carry_their_sums_by_coordinate() -> None:
    plans, group = planner_of(programs.RMSNORM)
    for tile, inside in ((2048, False), (8192, True)):
        tiling = Tiling((("n", tile),), Options(8, 2), in_trips=True)
        kernel = plans.kernel("c", group, plans.groups(), tiling)
        loops = [op for op in kernel.ops if isinstance(op, Loop)]
        assert any(isinstance(op, Fold) for op in every_op(loops[0].body)) is inside


@pytest.mark.parametrize("name", ONCE)
def test_what_is_read_once_or_must_be_whole_is_not_gone_through_again(name: str) -> None:
    plans, group = planner_of(ONCE[name])
    assert plans.in_trips(group) is None
    assert not any(tiling.in_trips for tiling in candidates(plans, group))


@pytest.mark.parametrize("name", AGAIN)
def test_a_stopwatch_chooses_them_and_the_model_does_not(name: str) -> None:
    plans, group = planner_of(AGAIN[name])
    groups = plans.groups()
    assert not choose(plans, "c", group, groups, H200).tiling.in_trips
    for effort in ("quick", "full"):
        few = shortlist(plans, "c", group, groups, H200, effort)
        assert isinstance(few, Shortlist)
        tiles = [one.tiling for one in few.few if one.tiling.in_trips]
        assert {tiling.of("n") for tiling in tiles} == {*TRIPS}
        assert all(tiling.of("n") == tiling.options.num_warps * 32 * 8 for tiling in tiles)  # one wide load a thread
    fastest = tiles[-1]
    timed = choose(plans, "c", group, groups, H200, "quick", lambda tiling: 1.0 if tiling == fastest else 2.0)
    assert timed.tiling == fastest and plans.kernel("c", group, groups, timed.tiling).axis("n").tile == fastest.of("n")
