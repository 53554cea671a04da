"""Slices of tokens: they mean the whole, depend on each other where their index sets meet and nowhere else, and every
wrong program of a list of mutants is found out by its numbers on simulated ranks."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import pytest
import torch

from cascade.backends.distributed.simulate import simulate
from cascade.errors import CascadeError, UnsupportedError
from cascade.interp import Precision, run
from cascade.ir import DType, Mesh, Shard
from cascade.passes.exchanges import by_shards, gather_later, scatter_gather
from cascade.passes.reach import left_over
from cascade.passes.shard import Sharding, cheapest, stated
from cascade.passes.split_tokens import best_cut, dependencies, lacks, split
from cascade.placed import Collective, Compute, Kind, Place, Program, Step
from cascade.trial import param_types, random_inputs
from tests.test_shard import ATTENTION, EXAMPLES, RING, Links, agrees, canonical, first, lifted

DECODER = (EXAMPLES / "decoder_layer.cascade").read_text(encoding="utf-8")
SIZES = {"T": 11, "D": 5, "H": 8, "G": 2, "E": 4, "F": 9}


def tensor_parallel(devices: int = 2) -> Program:
    """A decoder layer on a mesh as the search lays it, with the sizes of a small one."""
    large = {"T": 4096, "D": 8192, "H": 64, "G": 16, "E": 128, "F": 28672}
    cascade = canonical(DECODER, Mesh("tp", devices))
    steps = cheapest(cascade, large, Links()).steps
    return Sharding(cascade, SIZES).program({step.name: step.along for step in steps if isinstance(step, Compute)})


def legal_order(needs: Sequence[Sequence[int]], rng: random.Random, late: int | None = None) -> list[int]:
    """The steps in a random order in which each stands behind what it needs; `late` as late as it can."""
    done: list[int] = []
    left = set(range(len(needs)))
    while left:
        ready = sorted(step for step in left if not left.intersection(needs[step]))
        ready = [step for step in ready if step != late] or ready
        done.append(rng.choice(ready))
        left.remove(done[-1])
    return done


def results(
    program: Program, order: Sequence[int] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """What the program gives in an order of its steps, and what its cascade means."""
    inputs = random_inputs(program.cascade, dict(program.sizes), param_types(program.cascade, DType.F64), 0)
    wanted = run(program.cascade, inputs, dict(program.sizes), Precision.REFERENCE)
    return simulate(program, inputs, order), wanted


def right(program: Program, order: Sequence[int] | None = None) -> bool:
    """Whether the program gives what its cascade means."""
    try:
        found, wanted = results(program, order)
    except (CascadeError, IndexError, KeyError):
        return False
    return all(torch.allclose(found[name], wanted[name].double(), rtol=1e-10, atol=1e-10) for name in wanted)


@pytest.mark.parametrize("cuts", [(4,), (1,), (10,), (3, 4, 9)])
@pytest.mark.parametrize("devices", [2, 4])
def test_slices_mean_the_whole(cuts: tuple[int, ...], devices: int) -> None:
    agrees(split(tensor_parallel(devices), "t", cuts), SIZES)


def test_queries_are_split_and_keys_are_not() -> None:
    program = split(tensor_parallel(), "t", (4,))
    scores = [step for step in program.steps if isinstance(step, Compute) and step.name == "S"]
    assert [step.at for step in scores] == [(("m", 0, 4),), (("m", 4, 11),)]


def test_a_slice_needs_the_keys_up_to_its_last_row_only() -> None:
    program = split(tensor_parallel(), "t", (4,))
    needs = dependencies(program)

    def number(name: str, at: tuple[str, int, int]) -> int:
        return next(
            i for i, s in enumerate(program.steps) if isinstance(s, Compute) and s.name == name and s.at == (at,)
        )

    values = number("V", ("t", 0, 4)), number("V", ("t", 4, 11))
    assert values[0] in needs[number("U", ("m", 0, 4))] and values[1] not in needs[number("U", ("m", 0, 4))]
    assert set(values) <= set(needs[number("U", ("m", 4, 11))])


@pytest.mark.parametrize("seed", range(6))
def test_any_legal_order_gives_the_same(seed: int) -> None:
    program = split(tensor_parallel(), "t", (5,))
    assert right(program, legal_order(dependencies(program), random.Random(seed)))


def test_every_dependency_is_needed() -> None:
    """Without one of them some order is legal in which a step reads what nobody has written: it shows."""
    text = "cascade c(X[T,D], W[D,F], V[F,D]) -> Y[T,D] { H[t,f] = X[t,d] * W[d,f]\n Y[t,e] = H[t,f] * V[f,e] }"
    program = stated(canonical(text, Mesh("tp", 2), Shard("f", "tp")), {"T": 6, "D": 3, "F": 4})
    program = split(program, "t", (2,))
    needs = dependencies(program)
    dropped = 0
    for step, needed in enumerate(needs):
        for other in needed:
            fewer = [tuple(i for i in own if (n, i) != (step, other)) for n, own in enumerate(needs)]
            order = legal_order(fewer, random.Random(0), late=other)
            if order.index(other) > order.index(step):
                dropped += 1
                assert not right(program, order), f"{step} does not need {other}"
    assert dropped == sum(map(len, needs))


def test_a_fold_is_split_by_its_queries_and_its_states_merge_together() -> None:
    sizes = {"H": 2, "M": 6, "N": 7, "E": 2, "F": 2}
    program = stated(lifted(ATTENTION, Mesh("cp", 3), Shard("n", "cp")), sizes)
    program = split(program, "m", (2,))
    assert len([step for step in program.steps if isinstance(step, Collective)]) == 2
    agrees(program, sizes)


def test_a_recurrence_keeps_the_order_of_its_slices() -> None:
    text = "cascade c(A[T,D], X[T,D]) -> H[T,D] { H[t,d] = A[t,d] * H[t-1,d] + X[t,d]  init H[-1,d] = 0 }"
    program = split(stated(canonical(text, Mesh("tp", 2), Shard("d", "tp")), {"T": 7, "D": 4}), "t", (2, 5))
    assert dependencies(program) == ((), (0,), (0, 1))
    agrees(program, {"T": 7, "D": 4})


def test_slices_of_a_reduced_rank_are_parts() -> None:
    text = "cascade c(X[T,D]) -> Y[T,D], L[D] { Y[t,d] = 2 * X[t,d]\n L[d] = Y[t,d] }"
    program = split(stated(canonical(text, Mesh("tp", 2), Shard("d", "tp")), {"T": 7, "D": 4}), "t", (2,))
    agrees(program, {"T": 7, "D": 4})


def test_a_split_that_cannot_be_is_refused() -> None:
    program = tensor_parallel()
    for rank, cuts in (("zz", (1,)), ("t", (0,)), ("t", (11,)), ("t", (5, 5))):
        with pytest.raises(UnsupportedError, match="C553"):
            split(program, rank, cuts)


@pytest.mark.parametrize("devices", [2, 3])
def test_nothing_is_lacking_in_what_shards_and_slices_give(devices: int) -> None:
    program = tensor_parallel(devices)
    assert not list(lacks(program))
    assert list(lacks(dataclasses.replace(program, steps=program.steps[1:])))


def test_what_boxes_leave_of_a_box() -> None:
    rng = random.Random(0)
    for _ in range(200):
        box, *others = [
            tuple(tuple(sorted((rng.randint(0, 5), rng.randint(0, 5)))) for _ in range(2)) for _ in range(4)
        ]

        def points(one: tuple[tuple[int, int], ...]) -> set[tuple[int, int]]:
            return {(i, j) for i in range(*one[0]) for j in range(*one[1])}

        pieces = [points(piece) for piece in left_over(box, others)]
        assert set().union(*pieces) == points(box) - set().union(*map(points, others))
        assert sum(map(len, pieces)) == len(set().union(*pieces))


# --- where to cut ----------------------------------------------------------------------------------------------------


def waves(
    cuts: tuple[int, ...], rough: bool = False, extent: int = 4096, wave: int = 1000, extra: float = 0.0
) -> float:
    """A time that goes by waves of so many coordinates, with an extra for each slice, over half of which is hidden."""
    edges = [0, *cuts, extent]
    parts = [-(-(b - a) // wave) * 100.0 + extra for a, b in pairwise(edges)]
    return sum(parts) - 0.5 * min(parts) * (len(parts) > 1)


def test_cuts_fall_on_waves() -> None:
    found = best_cut(4096, 128, waves)
    assert found.declined is None and found.split_us == min(waves((cut,)) for cut in range(128, 4096, 128))
    assert found.split_us < waves((2048,)) or found.cuts == (2048,)


def test_a_split_that_does_not_pay_is_declined_with_the_number() -> None:
    found = best_cut(4096, 128, lambda cuts, rough: waves(cuts, extra=400.0))
    assert not found.cuts and found.split_us is not None and found.split_us > found.whole_us
    assert found.declined is not None and f"{found.split_us:.1f} us" in found.declined
    assert best_cut(100, 64, waves).declined == "100 coordinates are less than two tiles of 64"


def test_cuts_of_the_author_are_taken() -> None:
    assert best_cut(4096, 128, waves, fixed=[(300,)]).cuts == (300,)


# --- mutants ---------------------------------------------------------------------------------------------------------


def sequence_parallel() -> Program:
    """One collective of each kind that reduces and gathers, a residual in shards, two slices."""
    text = """
    cascade layer(X[T,D], Wu[D,F], Wd[F,D], Wl[D,E]) -> Y[T,E] {
        H[t,f] = relu(sum[d] X[t,d] * Wu[d,f])
        S[t,d] = H[t,f] * Wd[f,d]
        Z[t,d] = X[t,d] + S[t,d]
        Y[t,e] = Z[t,d] * Wl[d,e]
    }
    """
    program = stated(
        canonical(text, Mesh("tp", 3), Shard("f", "tp"), Shard("e", "tp")), {"T": 7, "D": 5, "F": 6, "E": 4}
    )
    program = scatter_gather(program, first(program, Kind.ALL_REDUCE, "S"), 0)
    return split(gather_later(program, first(program, Kind.ALL_GATHER, "S")), "t", (3,))


def ring() -> Program:
    cascade = lifted(RING, Mesh("cp", 3), Shard("m", "cp"), Shard("t", "cp"))
    program = stated(cascade, {"H": 1, "M": 6, "N": 7, "E": 2, "F": 2})
    return by_shards(program, first(program, Kind.ALL_GATHER, "K"))


def changed(program: Program, change: Callable[[Step], Step | None]) -> Program:
    """The program with its steps changed; None drops one."""
    return dataclasses.replace(program, steps=tuple(new for step in program.steps if (new := change(step)) is not None))


def of_kind(kind: Kind, **fields: object) -> Callable[[Step], Step]:
    return lambda s: dataclasses.replace(s, **fields) if isinstance(s, Collective) and s.kind is kind else s


def one_slice_gone(name: str, which: int) -> Callable[[Step], Step | None]:
    return lambda s: None if (s.name if isinstance(s, Compute) else s.tensor) == name and s.at[0][1] == which else s


def once(program: Program, kind: Kind) -> Iterator[int]:
    return (i for i, s in enumerate(program.steps) if isinstance(s, Collective) and s.kind is kind)


def swapped(program: Program, i: int, j: int) -> Program:
    steps = list(program.steps)
    steps[i], steps[j] = steps[j], steps[i]
    return dataclasses.replace(program, steps=tuple(steps))


def hop(change: Callable[[int], int]) -> Callable[[Step], Step]:
    return lambda s: dataclasses.replace(s, hop=change(s.hop)) if isinstance(s, Collective) and s.hop else s


def wrong_slice(step: Step) -> Step:
    """The scatter of the second slice does the first once more."""
    late = isinstance(step, Collective) and step.kind is Kind.REDUCE_SCATTER and step.at[0][1] == 3
    return dataclasses.replace(step, at=((0, 0, 3),)) if late else step


def off_by_one(step: Step) -> Step:
    late = isinstance(step, Compute) and step.name == "Z" and step.at[0][1] == 3
    return dataclasses.replace(step, at=(("t", 4, 7),)) if late else step


def dropped_waits(program: Program) -> Program:
    """The second slice's keys are taken before they are made: all slices of attention stand before all keys."""
    steps = sorted(program.steps, key=lambda s: not (isinstance(s, Compute) and s.name == "S"))
    return dataclasses.replace(program, steps=tuple(steps))


def key_order_dropped() -> Program:
    """The first slice's keys are made behind the second slice of queries."""
    program = split(tensor_parallel(), "t", (5,))
    late = [s for s in program.steps if isinstance(s, Compute) and s.name in ("K", "C_R", "C") and s.at[0][1] == 0]
    rest = [s for s in program.steps if s not in late]
    at = next(i for i, s in enumerate(rest) if isinstance(s, Compute) and s.name == "S" and s.at[0][1] == 5)
    return dataclasses.replace(program, steps=(*rest[: at + 1], *late, *rest[at + 1 :]))


MUTANTS: dict[str, Callable[[], Program]] = {
    "dropped wait": lambda: dropped_waits(split(tensor_parallel(), "t", (5,))),
    "dropped key order": key_order_dropped,
    "a slice twice": lambda: changed(sequence_parallel(), wrong_slice),
    "a slice of the residual skipped": lambda: changed(sequence_parallel(), one_slice_gone("Z", 3)),
    "a slice of a gather skipped": lambda: changed(sequence_parallel(), one_slice_gone("Z", 0)),
    "mean for sum": lambda: changed(sequence_parallel(), of_kind(Kind.REDUCE_SCATTER, reducer="mean")),
    "max for sum": lambda: changed(sequence_parallel(), of_kind(Kind.REDUCE_SCATTER, reducer="max")),
    "gather before scatter": lambda: swapped(
        sequence_parallel(), next(once(sequence_parallel(), Kind.REDUCE_SCATTER)), next(once(sequence_parallel(), Kind.ALL_GATHER))
    ),
    "scatter to another dimension": lambda: changed(sequence_parallel(), of_kind(Kind.REDUCE_SCATTER, target=1)),
    "gather from another dimension": lambda: changed(sequence_parallel(), of_kind(Kind.ALL_GATHER, source=1)),
    "a slice off by one": lambda: changed(sequence_parallel(), off_by_one),
    "a parameter placed by another dimension": lambda: dataclasses.replace(
        sequence_parallel(), places=(Place("Wu", 0, ("tp",)), Place("Wd", 0, ("tp",)), Place("Wl", 1, ("tp",)))
    ),
    "shards of a ring too far": lambda: changed(ring(), hop(lambda far: far + 1)),
    "a ring the other way": lambda: changed(ring(), hop(lambda far: -far)),
    "a shard of a ring dropped": lambda: dataclasses.replace(ring(), steps=tuple(s for s in ring().steps if not (isinstance(s, Collective) and s.tensor == "V" and s.hop == 1))),
}  # fmt: skip


def test_what_is_mutated_is_right() -> None:
    assert right(sequence_parallel()) and right(ring())


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_killed(name: str) -> None:
    assert not right(MUTANTS[name]())
