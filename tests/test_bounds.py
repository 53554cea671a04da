"""Filters as loop bounds, against the enumeration of every coordinate of small tiles; proofs, against every size."""

from __future__ import annotations

import functools
import itertools
import operator
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import cast

import pytest

from cascade.bounds import Bounds, always, conjuncts, loop_bounds, never_empty
from cascade.frontend.build import parse_cascade
from cascade.ir import Apply, Const, Einsum, Expr, Extent, Local, Rank, Read, Reduce
from cascade.text import render_expr
from cascade.walk import rewrite, walk

DECLARED = "X[B,M,N], Y[W], length[B], doc[B,N], bound[B,M], keep[B,N], flag[B,M], weight[B,M]"
SIZES = {"b": "B", "m": "M", "n": "N"}
SQUARE = {"b": "B", "m": "N", "n": "N"}
RANDOM = 1500


def condition(text: str) -> Expr:
    """A filter as a user writes it."""
    stmt = parse_cascade(f"cascade c({DECLARED}) -> Z[B,M] {{\n Z[b,m] = sum[n] X[b,m,n] where {text}\n}}").body[0]
    assert isinstance(stmt, Einsum) and stmt.where is not None
    return stmt.where


def bounds(text: str, tiles: tuple[str, ...] = ("m",), **known: tuple[str, ...]) -> Bounds:
    """The bounds of n."""
    return loop_bounds(conjuncts(condition(text)), "n", tiles, **known)


def shown(expr: Expr | None) -> str:
    """A bound as text, with `-` for an open one."""
    if expr is None:
        return "-"
    return render_expr(rewrite(expr, lambda node: Extent(node.name) if isinstance(node, Local) else node))


# --- what the usual filters give -------------------------------------------------------------------------------------

USUAL = (
    # filter, first, stop, full first, full stop
    ("n <= m", "-", "m_last + 1", "-", "m_first + 1"),
    ("n < m", "-", "m_last", "-", "m_first"),
    ("m >= n", "-", "m_last + 1", "-", "m_first + 1"),
    ("not (n > m)", "-", "m_last + 1", "-", "m_first + 1"),
    ("n >= m", "m_first", "-", "m_last", "-"),
    ("n == m", "m_first", "m_last + 1", "m_last", "m_first + 1"),
    ("m - n < W and n <= m", "m_first - W + 1", "m_last + 1", "m_last - W + 1", "m_first + 1"),
    ("m - n < 8 and n <= m", "m_first - 7", "m_last + 1", "m_last - 7", "m_first + 1"),
    ("abs(m - n) < 8", "m_first - 7", "m_last + 8", "m_last - 7", "m_first + 8"),
    ("n < 4 or n <= m", "-", "max(4, m_last + 1)", "-", "max(4, m_first + 1)"),
    ("(n < 4 or m - n < W) and n <= m", "-", "m_last + 1", "m_last - W + 1", "m_first + 1"),
    ("n < length[b]", "-", "length[b]", "-", "length[b]"),
    ("n < length[b] and n <= m", "-", "min(m_last + 1, length[b])", "-", "min(m_first + 1, length[b])"),
    ("n < bound[b,m]", "-", "max[m] bound[b,m]", "-", "min[m] bound[b,m]"),
    ("n >= bound[b,m]", "min[m] bound[b,m]", "-", "max[m] bound[b,m]", "-"),
    ("n <= m + N - M", "-", "m_last + N - M + 1", "-", "m_first + N - M + 1"),
    ("n // 4 <= m // 4", "-", "m_last // 4 * 4 + 4", "-", "m_first // 4 * 4 + 4"),
    ("n <= m // 4 * 4 + 3", "-", "m_last // 4 * 4 + 4", "-", "m_first // 4 * 4 + 4"),
    ("n // 4 == m // 4", "m_first // 4 * 4", "m_last // 4 * 4 + 4", "m_last // 4 * 4", "m_first // 4 * 4 + 4"),
    ("n // W <= m // W", "-", "m_last // W * W + W", "-", "m_first // W * W + W"),
    ("n * 3 <= m", "-", "m_last // 3 + 1", "-", "m_first // 3 + 1"),
    ("n * 4 <= m * 2 + 1", "-", "m_last // 2 + 1", "-", "m_first // 2 + 1"),
    ("n * W <= m", "-", "m_last // W + 1", "-", "m_first // W + 1"),
    ("m * W <= n", "m_first * W", "-", "m_last * W", "-"),
    ("n + m < N", "-", "N - m_first", "-", "N - m_last"),
    ("n < 8 or (n >= 4 and n < m)", "-", "max(8, m_last)", "-", "max(8, m_first)"),
    ("n >= 0", "-", "-", "-", "-"),
    ("n <= m and 0 < W", "-", "m_last + 1", "-", "m_first + 1"),
    ("n < max(m, 3)", "-", "max(3, m_last)", "-", "max(3, m_first)"),
    ("n != m and n <= m", "-", "m_last + 1", "-", "m_first"),
)


@pytest.mark.parametrize(("text", "first", "stop", "full_first", "full_stop"), USUAL, ids=[row[0] for row in USUAL])
def test_usual_filters(text: str, first: str, stop: str, full_first: str, full_stop: str) -> None:
    found = bounds(text)
    assert (shown(found.first), shown(found.stop)) == (first, stop)
    assert (shown(found.full_first), shown(found.full_stop)) == (full_first, full_stop)
    assert not found.never_full and found.rest == ()


def test_no_filter_is_everything() -> None:
    assert loop_bounds((), "n", ("m",)) == Bounds(None, None, None, None, False, ())
    assert conjuncts(None) == ()


def test_conjuncts_are_in_order() -> None:
    assert [render_expr(part) for part in conjuncts(condition("n <= m and (n < 4 or m < 2) and b < 3"))] == [
        "n <= m",
        "n < 4 or m < 2",
        "b < 3",
    ]


def test_a_point_rank_stays_what_it_is() -> None:
    found = bounds("n <= m and n >= b", ("m",))
    assert (shown(found.first), shown(found.stop)) == ("b", "m_last + 1")
    assert shown(bounds("n <= m", ()).stop) == "m + 1" == shown(bounds("n <= m", ()).full_stop)


@pytest.mark.parametrize("text", ["doc[b,n] == doc[b,m]", "(m - n) % 4 == 0", "n * n <= m", "n < 5.5", "keep[b,n] > 0"])
def test_what_no_bound_decides_is_listed(text: str) -> None:
    found = bounds(f"{text} and n <= m")
    assert (shown(found.first), shown(found.stop)) == ("-", "m_last + 1")
    assert found.never_full and found.full_stop == Const(0)
    assert [render_expr(part) for part in found.rest] == [text]


def test_conditions_on_rows_shut_a_tile() -> None:
    found = bounds("n < length[b] and m < length[b]")
    assert shown(found.stop) == "select(m_first < length[b], length[b], 0)"
    assert shown(found.full_stop) == "select(m_last < length[b], length[b], 0)"
    found = bounds("n <= m and weight[b,m] > 0.5", inexact=("weight",))
    assert shown(found.stop) == "select(any[m] (weight[b,m] > 0.5), m_last + 1, 0)"
    assert shown(found.full_stop) == "select(all[m] (weight[b,m] > 0.5), m_first + 1, 0)"
    assert bounds("n < 0").stop == Const(0) and bounds("n < 0").never_full


def test_the_other_rank_of_a_pair_may_be_streamed() -> None:
    found = loop_bounds(conjuncts(condition("m - n < W and n <= m")), "m", ("n",))
    assert [shown(part) for part in (found.first, found.stop)] == ["n_first", "n_last + W"]
    assert [shown(part) for part in (found.full_first, found.full_stop)] == ["n_last", "n_first + W"]


def test_what_may_be_absent_is_nowhere_full() -> None:
    """`x or y` is absent where y is, so x alone makes no coordinate present."""
    assert bounds("n < 4 or n < bound[b,m]", absent=("bound",)).never_full
    assert bounds("n < length[b // 2]").never_full
    assert shown(bounds("n < length[b // 2]").stop) == "length[b//2]"
    assert bounds("n < 9 // b").never_full  # nothing is divided by 0


def test_inexact_bounds_are_no_bounds() -> None:
    found = bounds("n < length[b]", inexact=("length",))
    assert found.stop is None and found.never_full and len(found.rest) == 1


# --- proofs ----------------------------------------------------------------------------------------------------------

NEVER_EMPTY = (
    # filter, proved where M is N, proved where M and N are any sizes
    ("n <= m", True, True),
    ("n < m", False, False),
    ("n >= m", True, False),
    ("m - n < W and n <= m", True, False),
    ("abs(m - n) < W", True, False),
    ("n // 4 == m // 4 and n <= m", True, False),
    ("n // 4 <= m // 4", True, True),
    ("n // W == m // W", True, False),
    ("n == m // 4", True, False),
    ("n % 4 == m % 4", True, False),
    ("(m - n) % W == 0 and n <= m", True, False),
    ("doc[b,n] == doc[b,m] and n <= m", True, False),
    ("n < 4 or doc[b,n] == doc[b,m]", True, True),
    ("n < length[b]", False, False),
    ("n <= m + N - M", False, False),
    ("n != m", False, False),
    ("n >= m // 4 * 4 and n <= m", True, False),
    ("n + m < N", True, False),
    ("n <= m and b < 3", False, False),
    ("n <= m and b < B", True, True),
    ("n * W <= m", True, True),
    ("n >= N - 1", True, True),
    ("m - n < 2 and n < m + 1 and n >= 0", True, False),
)


@pytest.mark.parametrize(("text", "square", "any_sizes"), NEVER_EMPTY, ids=[row[0] for row in NEVER_EMPTY])
def test_never_empty(text: str, square: bool, any_sizes: bool) -> None:
    parts = conjuncts(condition(text))
    assert never_empty(parts, "n", SQUARE) == square
    assert never_empty(parts, "n", SIZES) == any_sizes


def test_the_offset_of_causal_rows_may_be_known() -> None:
    parts = conjuncts(condition("n <= m + 96 - 32"))
    assert never_empty(parts, "n", {"m": 32, "n": 96, "b": "B"})
    assert not never_empty(conjuncts(condition("n <= m + 32 - 96")), "n", {"m": 96, "n": 32, "b": "B"})
    assert not always(parts, {"m": 32, "n": 96})
    assert always(conjuncts(condition("n < 96 and n <= m + 95")), {"m": 32, "n": 96})


def test_always() -> None:
    assert always(conjuncts(condition("n < N and n >= 0 and m // 4 * 4 <= m")), SIZES)
    assert always(conjuncts(condition("n // 4 < 2")), {"n": 8}) and not always(
        conjuncts(condition("n // 4 < 2")), {"n": 9}
    )
    assert not always(conjuncts(condition("n < N")), {"n": "M"})
    assert not always(conjuncts(condition("m * 3 <= m * m")), {"m": 4})  # it holds at both ends, and not between
    assert not always(conjuncts(condition("doc[b,n] == doc[b,n]")), SIZES, inexact=("doc",))  # nan is not nan
    assert always(conjuncts(condition("doc[b,n] == doc[b,n]")), SIZES)
    assert not always(conjuncts(condition("doc[b,n] == doc[b,n]")), SIZES, absent=("doc",))
    assert always((), SIZES) and never_empty((), "n", SIZES)


# --- the second way: every coordinate --------------------------------------------------------------------------------

COMPUTES: dict[str, Callable[..., int | bool]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "neg": operator.neg,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "min": min,
    "max": max,
    "abs": abs,
    "clamp": lambda x, low, high: min(max(x, low), high),
    "select": lambda test, yes, no: yes if test else no,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "and": lambda x, y: x and y,
    "or": lambda x, y: x or y,
    "not": operator.not_,
}
FOLDS: dict[str, Callable[..., int | bool]] = {"max": max, "min": min, "any": any, "all": all}


@dataclass(frozen=True)
class World:
    """Sizes, data and a tile, in which an expression has a value."""

    extents: Mapping[str, int]  # of ranks
    data: Callable[[str, tuple[int, ...]], int]
    tile: Mapping[str, range] = field(default_factory=dict)

    def value(self, expr: Expr, at: Mapping[str, int]) -> int | bool:
        """The value at some coordinates."""
        match expr:
            case Const():
                return cast(int, expr.value)
            case Rank():
                return at[expr.name]
            case Extent():
                return self.extents[expr.name.lower()]
            case Local():
                rank, _, end = expr.name.rpartition("_")
                return self.tile[rank][0 if end == "first" else -1]
            case Read():
                return self.data(expr.tensor, tuple(int(self.value(index, at)) for index in expr.index))
            case Apply():
                return COMPUTES[expr.op](*(self.value(arg, at) for arg in expr.args))
            case Reduce():
                points = itertools.product(*(self.tile[rank] for rank in expr.ranks))
                return FOLDS[expr.reducer](
                    [self.value(expr.body, {**at, **dict(zip(expr.ranks, p, strict=True))}) for p in points]
                )
        raise AssertionError(expr)

    def rows(self) -> Iterator[dict[str, int]]:
        """The coordinates of the tile."""
        for point in itertools.product(*self.tile.values()):
            yield dict(zip(self.tile, point, strict=True))


def noise(seed: int) -> Callable[[str, tuple[int, ...]], int]:
    """Tensors of small whole numbers."""
    return functools.cache(lambda tensor, index: random.Random(f"{seed} {tensor} {index}").randrange(-2, 12))


def integer(rng: random.Random, depth: int, streamed: bool) -> Expr:
    """A random whole number, with n in it where it is `streamed`."""
    if depth == 0:
        if streamed:
            return Rank("n")
        return rng.choice((Rank("m"), Rank("h"), Rank("b"), Const(rng.randrange(-3, 9)), Extent("N"), Extent("M")))
    match rng.randrange(12):
        case 0 | 1 | 2:
            pair = [integer(rng, depth - 1, streamed), integer(rng, rng.randrange(depth), False)]
            rng.shuffle(pair)
            return Apply(rng.choice(("add", "sub")), tuple(pair))
        case 3:
            return Apply("mul", (integer(rng, depth - 1, streamed), Const(rng.choice((-3, -2, -1, 0, 2, 4)))))
        case 4 | 5:
            by = rng.choice((Const(2), Const(3), Const(4), Const(-2), Extent("N")))
            return Apply("floordiv", (integer(rng, depth - 1, streamed), by))
        case 6:
            return Apply("mod", (integer(rng, depth - 1, streamed), Const(rng.randrange(2, 5))))
        case 7:
            return Apply(
                rng.choice(("min", "max")), (integer(rng, depth - 1, streamed), integer(rng, depth - 1, False))
            )
        case 8:
            return Apply(rng.choice(("abs", "neg")), (integer(rng, depth - 1, streamed),))
        case 9 if not streamed:
            return rng.choice((Read("length", (Rank("b"),)), Read("bound", (Rank("b"), Rank("m")))))
        case 10:
            return Apply("mul", (integer(rng, depth - 1, streamed), rng.choice((Rank("m"), Extent("M")))))
        case _:
            return integer(rng, depth - 1, streamed)


def predicate(rng: random.Random, depth: int) -> Expr:
    """A random filter; a few of its conditions say nothing of n, and a few read data along it."""
    if depth == 0:
        op = rng.choice(("lt", "le", "gt", "ge", "lt", "le", "eq", "ne"))
        if rng.random() < 0.05:
            return Apply(op, (Read("doc", (Rank("n"),)), Read("doc", (Rank("m"),))))
        pair = [integer(rng, rng.randrange(3), rng.random() < 0.85), integer(rng, rng.randrange(3), False)]
        rng.shuffle(pair)
        return Apply(op, tuple(pair))
    match rng.randrange(5):
        case 0:
            return Apply("not", (predicate(rng, depth - 1),))
        case 1 | 2:
            return Apply("and", (predicate(rng, depth - 1), predicate(rng, depth - 1)))
        case _:
            return Apply("or", (predicate(rng, depth - 1), predicate(rng, rng.randrange(depth))))


def tile_of(rng: random.Random, extents: Mapping[str, int], tiled: tuple[str, ...]) -> dict[str, range]:
    """A tile of some ranks, and one coordinate of the others."""
    tile = {}
    for rank in ("b", "h", "m"):
        first = rng.randrange(extents[rank])
        length = rng.randrange(1, 5) if rank in tiled else 1
        tile[rank] = range(first, min(first + length, extents[rank]))
    return tile


def numbers(found: Bounds, world: World) -> tuple[range, range]:
    """The visited and the full stretch as numbers, clamped as a caller does."""
    at = {rank: part[0] for rank, part in world.tile.items()}  # a bound names no tiled rank outside a reduction

    def stretch(first: Expr | None, stop: Expr | None) -> range:
        low = max(0, 0 if first is None else int(world.value(first, at)))
        extent = world.extents["n"]
        return range(low, extent if stop is None else min(extent, int(world.value(stop, at))))

    return stretch(found.first, found.stop), stretch(found.full_first, found.full_stop)


def present(where: Expr, world: World) -> dict[int, list[bool]]:
    """For each coordinate of n, whether it is present in each row of the tile."""
    rows = list(world.rows())
    return {n: [bool(world.value(where, {**row, "n": n})) for row in rows] for n in range(world.extents["n"])}


def unbound(found: Bounds, tiled: tuple[str, ...]) -> bool:
    """Whether no bound names a tiled rank outside a reduction."""
    ends = [end for end in (found.first, found.stop, found.full_first, found.full_stop) if end is not None]
    closed = [rewrite(end, lambda node: Const(0) if isinstance(node, Reduce) else node) for end in ends]
    return not {node.name for end in closed for node in walk(end) if isinstance(node, Rank)} & {*tiled, "n"}


@pytest.mark.parametrize("part", range(4))
def test_random_filters_against_every_coordinate(part: int) -> None:
    """Nothing present is left out, nothing absent is taken for full; for many, some of both is gained."""
    narrowed = full = 0
    for seed in range(part, RANDOM, 4):
        rng = random.Random(seed)
        where = predicate(rng, rng.randrange(3))
        tiled = rng.choice((("m",), ("m", "h"), (), ("b", "m")))
        found = loop_bounds(conjuncts(where), "n", tiled)
        assert unbound(found, tiled), (seed, render_expr(where))
        for _ in range(4):
            extents = {rank: rng.randrange(1, 14) for rank in ("b", "h", "m", "n")}
            world = World(extents, noise(seed), tile_of(rng, extents, tiled))
            visited, inside = numbers(found, world)
            for n, rows in present(where, world).items():
                assert n in visited or not any(rows), (seed, render_expr(where), world.tile, n)
                assert n not in inside or all(rows), (seed, render_expr(where), world.tile, n)
            assert not (found.never_full and inside)
            narrowed += len(visited) < extents["n"]
            full += len(inside) > 0
    assert narrowed > RANDOM / 3 and full > RANDOM / 5


AFFINE = tuple(row[0] for row in USUAL if not any(hard in row[0] for hard in ("(n < 4", "!=")))


@pytest.mark.parametrize("text", AFFINE)
def test_bounds_of_affine_filters_are_exact(text: str) -> None:
    """The first and the last coordinate that any row has, and every coordinate that all rows have: no more, no less."""
    where = condition(text)
    found = loop_bounds(conjuncts(where), "n", ("m",))
    for seed in range(60):
        rng = random.Random(seed)
        extents = {rank: rng.randrange(1, 20) for rank in ("b", "h", "m", "n", "w")}
        world = World(extents, noise(seed), tile_of(rng, extents, ("m",)))
        visited, inside = numbers(found, world)
        rows = present(where, world)
        some = [n for n, row in rows.items() if any(row)]
        every = [n for n, row in rows.items() if all(row)]
        if some:
            assert (visited.start, visited.stop) == (some[0], some[-1] + 1), (world.extents, world.tile)
        elif len(conjuncts(where)) == 1 and "abs" not in text and "==" not in text:
            assert not visited
        if "(n >= 4" not in text:
            assert list(inside) == every, (world.extents, world.tile)


@pytest.mark.parametrize("part", range(4))
def test_random_affine_conjunctions_are_exact(part: int) -> None:
    """One tiled rank, one bound from each side: c n + d op a m + e, floors on either side included."""
    tight = 0
    for seed in range(part, RANDOM, 4):
        rng = random.Random(seed)
        parts = [affine(rng, op) for op in rng.choice((("le",), ("ge",), ("le", "ge"), ("lt", "gt")))]
        where = functools.reduce(lambda a, b: Apply("and", (a, b)), parts)
        found = loop_bounds(conjuncts(where), "n", ("m",))
        assert found.rest == ()
        extents = {rank: rng.randrange(1, 20) for rank in ("b", "h", "m", "n")}
        world = World(extents, noise(seed), tile_of(rng, extents, ("m",)))
        visited, inside = numbers(found, world)
        rows = present(where, world)
        assert list(inside) == [n for n, row in rows.items() if all(row)], (seed, render_expr(where), world.tile)
        for part_bounds, one in ((loop_bounds((one,), "n", ("m",)), one) for one in parts):
            alone = [n for n, row in present(one, world).items() if any(row)]
            assert list(numbers(part_bounds, world)[0]) == alone, (seed, render_expr(one), world.tile)
        some = [n for n, row in rows.items() if any(row)]
        tight += list(visited) == list(range(some[0], some[-1] + 1)) if some else not visited
    assert tight > RANDOM / 4 * 0.9  # the rest are hulls of rows that no single bound of theirs reaches


def affine(rng: random.Random, op: str) -> Expr:
    """(c n + d) [// k] op (a m + e) [// l], solved for n it is an upper bound for `le` and `lt`."""
    left: Expr = Apply("add", (Apply("mul", (Rank("n"), Const(rng.randrange(1, 4)))), Const(rng.randrange(-5, 6))))
    right: Expr = Apply("add", (Apply("mul", (Rank("m"), Const(rng.randrange(-3, 4)))), Const(rng.randrange(-5, 20))))
    if rng.random() < 0.4:
        left = Apply("floordiv", (left, Const(rng.randrange(1, 5))))
    if rng.random() < 0.4:
        right = Apply("floordiv", (right, Const(rng.choice((-2, 2, 3, 4)))))
    return Apply(op, (left, right))


@pytest.mark.parametrize("part", range(4))
def test_random_proofs_against_every_size(part: int) -> None:
    """What is proved holds for all sizes tried; what holds for all of them is proved now and then."""
    proved = {"always": 0, "never_empty": 0}
    for seed in range(part, RANDOM, 4):
        rng = random.Random(seed)
        where = predicate(rng, rng.randrange(3))
        number = rng.randrange(1, 6)
        sizes = rng.choice(({"m": "N", "n": "N"}, {"m": "M", "n": "N"}, {"m": number, "n": "N"}, {"m": "M", "n": "M"}))
        parts, extents = conjuncts(where), {"b": "B", "h": 3, **sizes}
        claims = always(parts, extents), never_empty(parts, "n", extents)
        for size in range(1, 7) if any(claims) else ():
            numbers_of = {"B": 2, "N": size, "M": rng.randrange(1, 7)}
            actual = {r: numbers_of[s] if isinstance(s, str) else s for r, s in extents.items()}
            world = World({"n": numbers_of["N"], "m": numbers_of["M"]}, noise(seed))
            others = [dict(zip("bhm", p, strict=True)) for p in itertools.product(*(range(actual[r]) for r in "bhm"))]
            for at in others:
                holds = [bool(world.value(where, {**at, "n": n})) for n in range(actual["n"])]
                assert all(holds) or not claims[0], (seed, render_expr(where), extents, numbers_of, at)
                assert any(holds) or not claims[1], (seed, render_expr(where), extents, numbers_of, at)
        proved["always"] += claims[0]
        proved["never_empty"] += claims[1]
    assert proved["always"] > RANDOM / 100 and proved["never_empty"] > RANDOM / 20


def test_long_filters_take_no_time() -> None:
    """Many conjuncts, many alternatives, deep minima and floors: bounded work, and still right."""
    choices = functools.reduce(lambda a, b: Apply("or", (a, b)), [condition(f"n == {2 * k}") for k in range(60)])
    found = loop_bounds((choices,), "n", ("m",))
    assert (shown(found.first), shown(found.stop)) == ("-", "119")
    deep: Expr = Rank("m")
    for k in range(40):
        deep = Apply(("min", "max", "floordiv")[k % 3], (deep, Const(k + 2) if k % 3 == 2 else Extent(f"E{k}")))
    where = Apply("le", (Rank("n"), deep))
    assert loop_bounds((where,), "n", ("m",)).stop is not None
    assert not never_empty((where,), "n", {"m": "M", "n": "N"})
