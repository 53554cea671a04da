"""Sharding: placements and collectives by the algebra, the rewrites of collectives, and what they mean on simulated
ranks in float64 against the cascade on one device."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from cascade import pipeline
from cascade.backends.distributed.simulate import simulate
from cascade.errors import CascadeError, UnsupportedError
from cascade.frontend.build import parse_cascade
from cascade.inference import bind_sizes
from cascade.interp import Precision, run
from cascade.ir import Cascade, Directive, DType, Mesh, Shard
from cascade.passes.exchanges import another_form, by_shards, gather_later, refactor_axis, scatter_gather
from cascade.passes.shard import Sharding, cheapest, stated
from cascade.passes.split_tokens import dependencies
from cascade.placed import Along, Axis, Collective, Compute, Kind, Program, read_program, render_program, stretch
from cascade.trial import param_types, random_inputs
from tests.test_random import valid

EXAMPLES = Path(__file__).parents[1] / "examples"
RANDOM = 500
PARTS = 4
LAYER = """
cascade layer(X[T,D], g[D], Wu[D,F], Wd[F,D], Wl[D,E]) -> Y[T,E] {
    H[t,f] = relu(sum[d] X[t,d] * Wu[d,f])
    S[t,d] = H[t,f] * Wd[f,d]
    Z[t,d] = X[t,d] + S[t,d]
    Q[t]   = Z[t,d] * Z[t,d]
    M[t,d] = Z[t,d] * rsqrt(Q[t] + 1) * g[d]
    Y[t,e] = M[t,d] * Wl[d,e]
}
"""
SIZES = {"T": 10, "D": 5, "F": 11, "E": 7}


class Links:
    """Costs by round numbers: 600 TFLOP/s, 3 TB/s, links of 400 GB/s with 10 us."""

    def compute_us(self, flops: float, moved: float) -> float:
        return max(flops / 600e6, moved / 3e6)

    def collective_us(self, kind: Kind, size: float, devices: int) -> float:
        return 10 + (2 if kind is Kind.ALL_REDUCE else 1) * self.held_us(size, devices)

    def held_us(self, size: float, devices: int) -> float:
        return size * (devices - 1) / devices / 400e3


def canonical(text: str, *schedule: Directive) -> Cascade:
    """The canonical cascade of a text with another schedule."""
    cascade = dataclasses.replace(parse_cascade(text, "<test>"), schedule=schedule)
    return pipeline.run_pipeline(cascade, "canonicalize").final


def agrees(program: Program, sizes: Mapping[str, int], seed: int = 0) -> None:
    """The program on simulated ranks gives what its cascade means on one device, and its text reads back."""
    cascade = program.cascade
    assert read_program(render_program(program), cascade) == program
    inputs = random_inputs(cascade, sizes, param_types(cascade, DType.F64), seed)
    wanted = run(cascade, inputs, sizes, Precision.REFERENCE)
    for name, found in simulate(program, inputs).items():
        torch.testing.assert_close(found, wanted[name].double(), rtol=1e-12, atol=1e-12)


def collectives(program: Program) -> list[tuple[str, str]]:
    return [(step.kind.value, step.tensor) for step in program.steps if isinstance(step, Collective)]


def first(program: Program, kind: Kind, tensor: str) -> int:
    return next(
        number for number, step in enumerate(program.steps)
        if isinstance(step, Collective) and step.kind is kind and step.tensor == tensor
    )  # fmt: skip


def test_a_summed_shard_is_a_partial_result() -> None:
    program = stated(canonical(LAYER, Mesh("tp", 4), Shard("f", "tp")), SIZES)
    assert collectives(program) == [("all-reduce", "S")]
    assert {(place.tensor, place.dim) for place in program.places} == {("Wu", 1), ("Wd", 0)}
    agrees(program, SIZES)


def test_a_read_at_another_place_is_an_all_gather() -> None:
    text = "cascade c(X[N,E]) -> Y[N,E] { K[n,e] = 2 * X[n,e]\n Y[m,e] = sum[n] K[n,e]  where n <= m }"
    program = stated(canonical(text, Mesh("cp", 3), Shard("m", "cp"), Shard("n", "cp")), {"N": 7, "E": 2})
    assert collectives(program) == [("all-gather", "K")]
    agrees(program, {"N": 7, "E": 2})


def test_another_rank_of_the_same_tensor_is_an_all_to_all() -> None:
    text = "cascade c(X[A,B]) -> Y[A,B] { K[a,b] = 2 * X[a,b]\n Y[i,j] = 1 + K[i,j] }"
    cascade = canonical(text, Mesh("sp", 2), Shard("a", "sp"), Shard("j", "sp"))
    program = stated(cascade, {"A": 5, "B": 4})
    assert collectives(program) == [("all-to-all", "K")]
    agrees(program, {"A": 5, "B": 4})


def test_grouped_heads_need_nothing_where_the_groups_lie_together() -> None:
    text = "cascade c(Q[H], K[G]) -> Y[H] { A[g] = 2 * K[g]\n Y[h] = Q[h] * A[h//4] }"
    schedule = (Mesh("tp", 2), Shard("h", "tp"), Shard("g", "tp"))
    assert not collectives(stated(canonical(text, *schedule), {"H": 16, "G": 4}))
    uneven = stated(canonical(text, *schedule), {"H": 12, "G": 3})  # 6 heads a device: the second group is shared
    assert collectives(uneven) == [("all-gather", "A")]
    agrees(uneven, {"H": 12, "G": 3})


@pytest.mark.parametrize("reducer", ["sum", "max", "min", "prod", "argmax", "argmin"])
def test_partial_results_merge_by_their_reducer(reducer: str) -> None:
    cascade = canonical(f"cascade c(X[M,N]) -> Y[M] {{ Y[m] = {reducer}[n] X[m,n] }}", Mesh("p", 3), Shard("n", "p"))
    program = stated(cascade, {"M": 3, "N": 8})
    assert collectives(program) == [("all-reduce", "Y")]
    agrees(program, {"M": 3, "N": 8})


def test_a_choice_of_the_largest_merges() -> None:
    text = "cascade c(X[M,N]) -> G[M,2], I[M,2] { G[m,j], I[m,j] = topk[n, 2] X[m,n] }"
    agrees(stated(canonical(text, Mesh("p", 3), Shard("n", "p")), {"M": 3, "N": 8}), {"M": 3, "N": 8})


def test_the_mesh_alone_gives_tensor_parallelism_where_weights_outweigh_activations() -> None:
    text = (EXAMPLES / "decoder_layer.cascade").read_text(encoding="utf-8")
    sizes = {"T": 4096, "D": 8192, "H": 64, "G": 16, "E": 128, "F": 28672}
    program = cheapest(canonical(text, Mesh("tp", 8)), sizes, Links())
    assert collectives(program) == [
        ("all-gather", "N"), ("reduce-scatter", "Z_sum"), ("all-gather", "M"), ("reduce-scatter", "Y_sum"),
    ]  # fmt: skip
    assert {"Wq", "Wk", "Wv", "Wo", "Wg", "Wu", "Wd"} < {place.tensor for place in program.places}
    small = {"T": 11, "D": 5, "H": 8, "G": 2, "E": 4, "F": 9}
    agrees(
        Sharding(program.cascade, small).program({s.name: s.along for s in program.steps if isinstance(s, Compute)}),
        small,
    )


def test_activations_that_outweigh_weights_are_what_is_sharded() -> None:
    text = "cascade c(X[T,D], W[D,D]) -> Y[T,D] { H[t,e] = X[t,d] * W[d,e]\n Y[t,e] = relu(H[t,e]) }"
    program = cheapest(canonical(text, Mesh("p", 4)), {"T": 1 << 20, "D": 64}, Links())
    assert not collectives(program)
    assert ("X", 0) in {(place.tensor, place.dim) for place in program.places}


def test_what_cannot_be_sharded_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="C551"):
        stated(canonical(LAYER), SIZES)
    with pytest.raises(UnsupportedError, match="C550"):
        read_program("compute H along", canonical(LAYER))


@pytest.mark.parametrize("devices", [1, 2, 3, 8])
def test_stretches_cover_a_window_once(devices: int) -> None:
    for length in range(20):
        found = [at for p in range(devices) for at in range(*stretch((5, 5 + length), p, devices))]
        assert found == list(range(5, 5 + length))


# --- rewrites --------------------------------------------------------------------------------------------------------


def sharded(devices: int = 4) -> Program:
    return stated(canonical(LAYER, Mesh("tp", devices), Shard("f", "tp")), SIZES)


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_an_all_reduce_is_a_scatter_and_a_gather_that_goes_behind_what_is_local(devices: int) -> None:
    before = sharded(devices)
    program = scatter_gather(before, first(before, Kind.ALL_REDUCE, "S"), 0)
    assert collectives(program) == [("reduce-scatter", "S"), ("all-gather", "S")]
    agrees(program, SIZES)
    for tensor in ("S", "Z", "Q", "M"):
        if ("all-gather", tensor) in collectives(program):
            program = gather_later(program, first(program, Kind.ALL_GATHER, tensor))
            agrees(program, SIZES)
    assert collectives(program) == [("reduce-scatter", "S"), ("all-gather", "Y")]


def test_a_scatter_to_the_rank_that_is_summed_next_keeps_its_gather() -> None:
    before = sharded()
    program = scatter_gather(before, first(before, Kind.ALL_REDUCE, "S"), 1)
    program = gather_later(program, first(program, Kind.ALL_GATHER, "S"))
    agrees(program, SIZES)
    with pytest.raises(UnsupportedError, match="not local to the shards of 'Z'"):
        gather_later(program, first(program, Kind.ALL_GATHER, "Z"))


@pytest.mark.parametrize("devices", [2, 4])
def test_a_gather_comes_shard_by_shard(devices: int) -> None:
    before = sharded(devices)
    program = scatter_gather(before, first(before, Kind.ALL_REDUCE, "S"), 0)
    program = by_shards(program, first(program, Kind.ALL_GATHER, "S"))
    assert sum(kind == "shift" for kind, _ in collectives(program)) == devices - 1
    agrees(program, SIZES)


def test_an_axis_is_two() -> None:
    program = refactor_axis(sharded(), "tp", Axis("node", 2), Axis("gpu", 2))
    assert collectives(program) == [("all-reduce", "S"), ("all-reduce", "S")]
    agrees(program, SIZES)
    inner = first(program, Kind.ALL_REDUCE, "S")
    assert inner in dependencies(program)[inner + 1], "the outer sum takes what the inner one leaves"
    program = scatter_gather(program, first(program, Kind.ALL_REDUCE, "S"), 0)  # inside a node; between nodes a sum
    assert collectives(program)[0] == ("reduce-scatter", "S")
    with pytest.raises(UnsupportedError, match="C552"):
        refactor_axis(sharded(), "tp", Axis("node", 3), Axis("gpu", 2))
    with pytest.raises(UnsupportedError, match="two new names"):
        refactor_axis(sharded(), "tp", Axis("tp", 2), Axis("gpu", 2))


def test_a_product_has_two_forms() -> None:
    before = sharded()
    program = another_form(before, "S", (Along("d", ("tp",)),))
    assert collectives(program) == [("all-gather", "H"), ("all-gather", "S")]
    assert ("Wd", 1) in {(place.tensor, place.dim) for place in program.places}
    agrees(program, SIZES)
    assert another_form(program, "S", (Along("f", ("tp",)),)) == before
    with pytest.raises(UnsupportedError, match="cannot run in parts along 'e'"):
        another_form(before, "S", (Along("e", ("tp",)),))


# --- random cascades -------------------------------------------------------------------------------------------------

MESHES = ((Mesh("p", 2),), (Mesh("p", 3),), (Mesh("p", 2), Mesh("q", 2)), (Mesh("p", 4),))


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(PARTS))
def test_random_cascades_mean_the_same_at_random_placements(part: int) -> None:
    checked = exchanged = 0
    for seed in range(part, 2 * RANDOM, PARTS):
        made = valid(seed)
        if made is None or checked == RANDOM // PARTS:
            continue
        cascade, inputs = made
        cascade = dataclasses.replace(cascade, schedule=MESHES[seed // PARTS % len(MESHES)])
        cascade = pipeline.run_pipeline(cascade, "canonicalize").final
        try:
            sizes = bind_sizes(cascade, {name: tuple(data.shape) for name, data in inputs.items()}, {})
            wanted = run(cascade, inputs, sizes, Precision.REFERENCE)
        except CascadeError:  # data that the cascade refuses
            continue
        sharding, rng = Sharding(cascade, sizes), random.Random(seed)
        program = sharding.program({name: rng.choice(list(sharding.options(name))) for name in sharding.reach.units})
        for name, found in simulate(program, inputs).items():
            torch.testing.assert_close(found, wanted[name].double(), rtol=1e-9, atol=1e-9, equal_nan=True)
        checked += 1
        exchanged += len(collectives(program))
    assert checked == RANDOM // PARTS and exchanged > checked


# --- small layers at every placement ---------------------------------------------------------------------------------

LAYERS, SHOWN = 500, 10  # in a campaign, and always
PLACEMENTS = 64  # a layer with more of them is left out


def small_layer(rng: random.Random) -> tuple[str, dict[str, int]]:
    """A layer of two to four statements on tokens: products, maps with a residual, rows measured, earlier rows summed."""
    sizes, params = {"T": rng.randint(2, 5), "D": rng.randint(2, 4)}, ["X[T,D]"]
    width, lines, last, kept = "d", [], "X", {"d": "X"}
    for number in range(rng.randint(1, 3)):
        name = f"A{number}"
        match rng.randrange(4):
            case 0:
                new, symbol = f"f{number}", f"F{number}"
                sizes[symbol] = rng.randint(2, 4)
                params.append(f"W{number}[{'D' if width == 'd' else width.upper()},{symbol}]")
                lines.append(f"{name}[t,{new}] = sum[{width}] {last}[t,{width}] * W{number}[{width},{new}]")
                width = new
            case 1:
                lines.append(f"{name}[t,{width}] = relu({last}[t,{width}]) + {kept.get(width, last)}[t,{width}]")
            case 2:
                reducer = rng.choice(["max", "sum", "min"])
                lines.append(f"R{number}[t] = {reducer}[{width}] {last}[t,{width}]")
                lines.append(f"{name}[t,{width}] = {last}[t,{width}] - R{number}[t]")
            case _:
                test = rng.choice(["u <= t", "t - u < 2 and u <= t", "u >= t"])
                lines.append(f"{name}[t,{width}] = sum[u] {last}[u,{width}]   where {test}")
        last = kept[width] = name
    symbol = "D" if width == "d" else width.upper()
    body = "\n    ".join(lines)
    return f"cascade layer({', '.join(params)}) -> {last}[T,{symbol}] {{\n    {body}\n}}", sizes


def at_every_placement(layers: int, seed: int = 0, step: int = 1) -> tuple[int, int]:
    """Checks so many layers on two or three devices, along every rank of every statement; programs, collectives."""
    checked = programs = exchanged = 0
    while checked < layers:
        seed += step
        text, sizes = small_layer(random.Random(seed))
        cascade = canonical(text, Mesh("p", 2 + seed % 2))
        sharding = Sharding(cascade, sizes)
        ways = [list(sharding.options(name)) for name in sharding.reach.units]
        if math.prod(map(len, ways)) > PLACEMENTS:
            continue
        checked += 1
        inputs = random_inputs(cascade, sizes, param_types(cascade, DType.F64), seed)
        wanted = run(cascade, inputs, sizes, Precision.REFERENCE)
        made = {sharding.program(dict(zip(sharding.reach.units, way, strict=True))) for way in itertools.product(*ways)}
        for program in made:
            for name, found in simulate(program, inputs).items():
                torch.testing.assert_close(found, wanted[name].double(), rtol=1e-12, atol=1e-12, msg=text)
            exchanged += len(collectives(program))
        programs += len(made)
    return programs, exchanged


def test_small_layers_mean_the_same_at_every_placement() -> None:
    programs, exchanged = at_every_placement(SHOWN)
    assert programs > 5 * SHOWN and exchanged > programs / 2


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(PARTS))
def test_many_small_layers_mean_the_same_at_every_placement(part: int) -> None:
    programs, exchanged = at_every_placement(LAYERS // PARTS, part, PARTS)
    assert programs > 5 * LAYERS // PARTS and exchanged > programs / 2


# --- states of folds -------------------------------------------------------------------------------------------------

ATTENTION = """
cascade attention(Q[H,M,E], K[H,N,E], V[H,N,F]) -> O[H,M,F] {
    S[h,m,n] = Q[h,m,e] * K[h,n,e]   where n <= m + 3
    P[h,m,n] = softmax[n] S[h,m,n]
    O[h,m,f] = P[h,m,n] * V[h,n,f]
}
"""


def lifted(text: str, *schedule: Directive) -> Cascade:
    """The cascade with its folds, on a mesh."""
    final = pipeline.run_pipeline(parse_cascade(text, "<test>")).final
    return dataclasses.replace(final, schedule=(*schedule, *final.schedule))


@pytest.mark.parametrize("devices", [2, 3, 4])
def test_the_state_of_a_fold_is_what_devices_merge(devices: int) -> None:
    program = stated(
        lifted(ATTENTION, Mesh("cp", devices), Shard("n", "cp")), sizes := {"H": 2, "M": 5, "N": 9, "E": 3, "F": 2}
    )
    assert [step.reducer for step in program.steps if isinstance(step, Collective)] == ["fold"]
    agrees(program, sizes)


def test_heads_and_keys_are_sharded_together() -> None:
    cascade = lifted(ATTENTION, Mesh("tp", 2), Mesh("cp", 3), Shard("h", "tp"), Shard("n", "cp"))
    agrees(stated(cascade, sizes := {"H": 3, "M": 5, "N": 9, "E": 3, "F": 2}), sizes)


RING = ATTENTION.replace("K[H,N,E], V[H,N,F]", "A[H,N,E], B[H,N,F]").replace(
    "{\n", "{\n    K[h,t,e] = tanh(A[h,t,e])\n    V[h,t,f] = tanh(B[h,t,f])\n", 1
)


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
@pytest.mark.parametrize("both_ways", [False, True])
def test_a_fold_over_gathered_keys_is_a_ring(devices: int, both_ways: bool) -> None:
    cascade = lifted(RING, Mesh("cp", devices), Shard("m", "cp"), Shard("t", "cp"))
    sizes = {"H": 2, "M": 9, "N": 10, "E": 3, "F": 2}
    before = stated(cascade, sizes)
    assert collectives(before) == [("all-gather", "K"), ("all-gather", "V")]
    agrees(before, sizes)
    program = by_shards(before, first(before, Kind.ALL_GATHER, "K"), both_ways)
    assert {kind for kind, _ in collectives(program)} == {"shift"} and len(collectives(program)) == 2 * (devices - 1)
    agrees(program, sizes)
