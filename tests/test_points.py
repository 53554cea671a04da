"""Points of a box where filters hold: the closed form against enumeration, on random filters."""

from __future__ import annotations

import itertools
import random

import pytest

from cascade.ir import Apply, Const, Expr, Extent, Rank
from cascade.passes import lattice
from cascade.passes.points import closure

RANKS = ("m", "n", "k")
SIZES = {"W": 3}


def random_form(rng: random.Random, ranks: tuple[str, ...]) -> Expr:
    roll = rng.random()
    if roll < 0.45:
        return Rank(rng.choice(ranks))
    if roll < 0.6:
        return rng.choice((Const(rng.randint(-3, 6)), Extent("W")))
    if roll < 0.75:
        return Apply("mul", (Const(rng.choice((-1, 2, 3))), random_form(rng, ranks)))
    return Apply(rng.choice(("add", "sub")), (random_form(rng, ranks), random_form(rng, ranks)))


def random_test(rng: random.Random, depth: int, ranks: tuple[str, ...]) -> Expr:
    roll = rng.random()
    if depth == 0 or roll < 0.5:
        op = rng.choice(("lt", "le", "gt", "ge", "eq", "ne"))
        return Apply(op, (random_form(rng, ranks), random_form(rng, ranks)))
    if roll < 0.6:
        return Apply("not", (random_test(rng, depth - 1, ranks),))
    return Apply(rng.choice(("and", "or")), tuple(random_test(rng, depth - 1, ranks) for _ in range(2)))


def enumerated(tests: list[Expr], extents: dict[str, int]) -> int:
    compiled = [closure(test, tuple(extents), SIZES) for test in tests]
    points = itertools.product(*map(range, extents.values()))
    return sum(all(test(point) for test in compiled) for point in points)


def test_the_closed_form_counts_what_enumeration_counts() -> None:
    decided = 0
    for seed in range(1500):
        rng = random.Random(seed)
        ranks = RANKS[: rng.choice((1, 2, 2, 2, 3))]
        extents = {rank: rng.choice((0, 1, 2, 5, 9)) for rank in ranks}
        tests = [random_test(rng, 2, ranks) for _ in range(rng.randint(1, 2))]
        found = lattice.points(tests, extents, SIZES)
        decided += found is not None
        assert found in (None, enumerated(tests, extents)), seed
    assert decided > 1000  # else it shows little


@pytest.mark.parametrize("length", [1, 7, 4096, 1 << 20])
def test_a_triangle_and_a_band(length: int) -> None:
    extents = {"m": length, "n": length}
    causal = Apply("le", (Rank("n"), Rank("m")))
    near = Apply("lt", (Apply("sub", (Rank("m"), Rank("n"))), Const(128)))
    assert lattice.points([causal], extents, {}) == length * (length + 1) // 2
    rows = min(length, 128)
    assert lattice.points([causal, near], extents, {}) == rows * (rows + 1) // 2 + (length - rows) * 128


def tiles_with_points(tests: list[Expr], extents: dict[str, int], tile: dict[str, int]) -> int:
    """The tiles that have a point at which all tests hold, by looking at every point of each."""
    compiled = [closure(test, tuple(extents), SIZES) for test in tests]
    parts = [
        [range(at, min(at + tile[rank], extent)) for at in range(0, extent, tile[rank])]
        for rank, extent in extents.items()
    ]
    return sum(
        any(all(test(point) for test in compiled) for point in itertools.product(*chosen))
        for chosen in itertools.product(*parts)
    )


def test_tiles_that_have_points_are_counted_as_by_looking_at_each() -> None:
    decided = 0
    for seed in range(800):
        rng = random.Random(seed)
        ranks = RANKS[: rng.choice((1, 2, 2))]
        extents = {rank: rng.choice((1, 2, 5, 9, 16, 21)) for rank in ranks}
        tile = {rank: rng.choice((1, 2, 4, 4, 7)) for rank in ranks}
        tests: list[Expr] = [
            Apply(rng.choice(("lt", "le", "gt", "ge")), (random_form(rng, ranks), random_form(rng, ranks)))
        ]
        found = lattice.tiles(tests, extents, SIZES, tile)
        decided += found is not None
        assert found in (None, tiles_with_points(tests, extents, tile)), (seed, tests, extents, tile)
    assert decided > 600


@pytest.mark.parametrize(
    "tile", [{"m": 4, "n": 4}, {"m": 1, "n": 4}, {"m": 4, "n": 1}, {"m": 16, "n": 4}, {"m": 5, "n": 5}]
)
@pytest.mark.parametrize("near", [1, 3, 9])
def test_tiles_of_a_window(tile: dict[str, int], near: int) -> None:
    extents = {"m": 21, "n": 32}
    causal = Apply("le", (Rank("n"), Rank("m")))
    window = Apply("lt", (Apply("sub", (Rank("m"), Rank("n"))), Const(near)))
    assert lattice.tiles([causal, window], extents, {}, tile) == tiles_with_points([causal, window], extents, tile)


def test_what_it_cannot_count_is_none() -> None:
    odd = Apply("eq", (Apply("mod", (Rank("m"), Const(2))), Const(0)))
    steep = Apply("le", (Apply("mul", (Const(2), Rank("m"))), Apply("mul", (Const(3), Rank("n")))))
    three = Apply("le", (Apply("add", (Rank("m"), Rank("n"))), Rank("k")))
    extents = dict.fromkeys(RANKS, 4)
    assert [lattice.points([test], extents, {}) for test in (odd, steep, three)] == [None, None, None]
