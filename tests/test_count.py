"""What a kernel does, counted from its plan, against going through its programs one by one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import pytest

from cascade.backends.triton.count import (
    Trips, live_registers, programs, read_in_waves, rounds, shared_memory, trips, work,
)  # fmt: skip
from cascade.backends.triton.partition import Group
from cascade.backends.triton.plan import Kernel, Loop, Options, Role, every_op
from cascade.backends.triton.planner import Layout, Planner, Tiling, contiguous
from cascade.compiled import from_text
from cascade.inference import bind_sizes
from cascade.ir import DType
from cascade.pipeline import run_pipeline

ATTENTION = """cascade c(Q[H,M,E], K[H,N,E], V[H,N,F]) -> O[H,M,F] {{
    S[h,m,n] = Q[h,m,e] * K[h,n,e] / sqrt(E) {where}
    P[h,m,n] = softmax[n] S[h,m,n]
    O[h,m,f] = P[h,m,n] * V[h,n,f]
}}"""
PRODUCT = "cascade c(X[M,K], W[N,K]) -> Y[M,N] { Y[m,n] = X[m,k] * W[n,k] }"
ROWS = "cascade c(X[M,N]) -> Y[M,N] { Y[m,n] = softmax[n] X[m,n] }"
PLAIN = Options()
FILTERS: dict[str, Callable[[int, int], bool]] = {
    "": lambda m, n: True,
    "where n <= m": lambda m, n: n <= m,
    "where n > m": lambda m, n: n > m,
    "where n <= m and n > m - 40": lambda m, n: m - 40 < n <= m,
    "where n >= m + 5 and n < m + 70": lambda m, n: m + 5 <= n < m + 70,
}


def planner(text: str, **shapes: tuple[int, ...]) -> Planner:
    """The planner of a call with contiguous bf16 tensors."""
    cascade = run_pipeline(from_text(text, "<test>").cascade).final
    layouts = {name: Layout(shape, contiguous(shape), DType.BF16, True) for name, shape in shapes.items()}
    return Planner(cascade, bind_sizes(cascade, shapes, {}), layouts)


def kernel(plans: Planner, options: Options = PLAIN, **tiles: int) -> Kernel:
    """The only kernel of a call, with these tiles."""
    (group,) = groups = plans.groups()
    assert isinstance(group, Group)
    base = dict(plans.default_tiling(group).tiles) | tiles
    return plans.kernel("c", group, groups, Tiling(tuple(base.items()), options))


def attention(where: str, h: int, m: int, n: int, e: int) -> Planner:
    """The planner of attention."""
    return planner(ATTENTION.format(where=where), Q=(h, m, e), K=(h, n, e), V=(h, n, e))


def visited(where: str, rows: range, extent: int, tile: int) -> tuple[int, int]:
    """Tiles of the stream in which a row is live somewhere, and those that are live everywhere: pair by pair."""
    some = every = 0
    for first in range(0, extent, tile):
        columns = range(first, first + tile)
        live = [n < extent and FILTERS[where](m, n) for m, n in itertools.product(rows, columns)]
        some, every = some + any(live), every + all(live)
    return some, every


# --- trips -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", FILTERS)
@pytest.mark.parametrize(("m", "n", "rows", "tile"), [(192, 192, 64, 32), (150, 170, 32, 16), (64, 300, 16, 64)])
def test_rounds_are_those_that_have_something(where: str, m: int, n: int, rows: int, tile: int) -> None:
    plans = attention(where, 3, m, n, 16)
    plan = kernel(plans, m=rows, n=tile)
    (loop,) = (op for op in every_op(plan.ops) if isinstance(op, Loop) and op.unless is None)
    counted = trips(plan, loop, plans.extents)
    tiles = [visited(where, range(first, min(first + rows, m)), n, tile) for first in range(0, m, rows)]
    # A loop has consecutive tiles: never fewer than have anything, and none beyond where filters are intervals.
    assert counted.total == 3 * sum(some for some, _ in tiles)
    assert counted.whole <= 3 * sum(every for _, every in tiles)
    if where != "where n <= m and n > m - 40":  # a band narrower than its tiles has none that are whole
        assert counted.whole == 3 * sum(every for _, every in tiles)


def test_edges_in_smaller_tiles_are_counted_in_those() -> None:
    plans = attention("where n <= m", 1, 256, 256, 16)
    plain, fine = (kernel(plans, Options(edge_tile=edge), m=64, n=64) for edge in (0, 16))
    (loop,), (small,) = ([op for op in p.ops if isinstance(op, Loop)] for p in (plain, fine))
    assert trips(plain, loop, plans.extents) == Trips(6.0, 4.0)
    assert trips(fine, small, plans.extents) == Trips(6.0, 16.0)
    assert work(plain, plans.extents).matrix_flops == work(fine, plans.extents).matrix_flops


def test_bound_that_data_tells_counts_as_the_end() -> None:
    text = """cascade c(X[B,N,F], Y[B,M,F], len: i64[B]) -> Z[B,M] {
        Z[b,m] = sum[n,f] X[b,n,f] * Y[b,m,f] where n < len[b]
    }"""
    shapes = {"X": (2, 4096, 16), "Y": (2, 64, 16), "len": (2,)}
    cascade = run_pipeline(from_text(text, "<test>").cascade).final
    layouts = {
        name: Layout(shape, contiguous(shape), DType.I64 if name == "len" else DType.BF16, True)
        for name, shape in shapes.items()
    }
    plans = Planner(cascade, bind_sizes(cascade, shapes, {}), layouts)
    for group in plans.groups():
        if isinstance(group, Group) and group.arrangement.stream is not None:
            tiling = plans.default_tiling(group)
            plan = plans.kernel("c", group, plans.groups(), tiling)
            tiles = -(-plans.ranks[group.arrangement.stream] // tiling.of(group.arrangement.stream))
            loops = sum(isinstance(op, Loop) for op in plan.ops)
            assert rounds(plan, plans.extents) >= loops * tiles * programs(plan, plans.extents)


# --- operations and bytes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["", "where n <= m"])
def test_products_are_those_of_every_round(where: str) -> None:
    plans = attention(where, 2, 128, 128, 16)
    plan = kernel(plans, m=32, n=16)
    tiles = [visited(where, range(first, first + 32), 128, 16)[0] for first in range(0, 128, 32)]
    assert work(plan, plans.extents).matrix_flops == 2 * sum(tiles) * 2 * (2 * 32 * 16 * 16)


def brute_bytes(plan: Kernel, plans: Planner, reads: Mapping[str, tuple[str, ...]]) -> float:
    """Elements that every program of a product reads, two bytes each, one coordinate after the other."""
    total = 0
    for ranks in reads.values():
        steps = [range(-(-plans.ranks[a.rank] // a.advance)) for a in plan.grid]
        for place in itertools.product(*steps):
            at = dict(zip([a.rank for a in plan.grid], place, strict=True))
            count = 1
            for rank in ranks:
                axis, extent = plan.axis(rank), plans.ranks[rank]
                inside = range(at[rank] * axis.tile, (at[rank] + 1) * axis.tile) if rank in at else range(extent)
                count *= sum(coordinate < extent for coordinate in inside)
            total += 2 * count
    return total


@pytest.mark.parametrize(("m", "n", "k"), [(128, 64, 256), (100, 90, 200)])
def test_bytes_are_those_of_every_program(m: int, n: int, k: int) -> None:
    plans = planner(PRODUCT, X=(m, k), W=(n, k))
    plan = kernel(plans, m=32, n=16, k=64)
    found = work(plan, plans.extents)
    assert found.read_bytes == 2 * (m * k + n * k) and found.write_bytes == 2 * m * n
    every = brute_bytes(plan, plans, {"X": ("m", "k"), "W": ("n", "k")})
    stores = 2 * m * n * (128 / 32 - 1)  # 16 columns are a quarter of a line
    assert found.read_bytes + found.l2_bytes - stores == pytest.approx(every, rel=0.3 if k % 64 else 1e-9)


@pytest.mark.parametrize(
    ("grouped", "at_once"), [(0, 64), (0, 16), (0, 8), (4, 16), (4, 32), (8, 64), (4, 4), (8, 128)]
)
def test_waves_read_what_their_programs_do_not_share(grouped: int, at_once: int) -> None:
    """Every wave in turn: the rows and columns of its tiles, each once."""
    m, n, k = 32 * 16, 16 * 16, 64
    plans = planner(PRODUCT, X=(m, k), W=(n, k))
    plan = kernel(plans, Options(grouped=grouped), m=16, n=16, k=64)
    tiles_m, tiles_n = m // 16, n // 16
    order = [(i, j) for j in range(tiles_n) for i in range(tiles_m)]
    if grouped:
        starts = range(0, tiles_m, grouped)
        order = [(i, j) for start in starts for j in range(tiles_n) for i in range(start, start + grouped)]
    read = 0
    for first in range(0, len(order), at_once):
        wave = order[first : first + at_once]
        read += (len({i for i, _ in wave}) + len({j for _, j in wave})) * 16 * k * 2
    assert read_in_waves(plan, plans.extents, at_once) == read


def test_what_follows_a_loop_is_told_from_what_is_in_it() -> None:
    plain = planner(PRODUCT, X=(128, 2048), W=(128, 2048))
    ended = planner(PRODUCT.replace("X[m,k] * W[n,k]", "gelu(sum[k] X[m,k] * W[n,k])"), X=(128, 2048), W=(128, 2048))
    found, more = (work(kernel(plans, m=64, n=64, k=64), plans.extents) for plans in (plain, ended))
    assert more.tail_exps == more.exps == 128 * 128 and found.tail_exps == 0
    assert more.tail_vector == more.vector_flops > found.tail_vector > 0
    assert not found.goes_on and work(kernel(plain, Options(resident=1), m=64, n=64, k=64), plain.extents).goes_on


def test_a_program_that_goes_on_has_its_result_beside_operands() -> None:
    plans = planner(PRODUCT, X=(4096, 4096), W=(4096, 4096))
    every = (Options(8, 3), Options(8, 3, resident=1), Options(8, 3, resident=1, pieces=2))
    sizes = [shared_memory(kernel(plans, options, m=128, n=256, k=64)) for options in every]
    assert [size // 1024 for size in sizes] == [144, 208, 176]  # compiled: 147480, 213016, 180248 bytes


def test_rows_are_read_and_written_once() -> None:
    plans = planner(ROWS, X=(100, 1024))
    plan = kernel(plans, m=1)
    found = work(plan, plans.extents)
    assert (found.read_bytes, found.write_bytes, found.l2_bytes) == (204800.0, 204800.0, 0.0)
    assert (
        found.programs == programs(plan, plans.extents)
        and found.matrix_flops == 0
        and not found.dependent
        and found.stages == 1
    )
    assert 2 * 102400 <= found.exps <= 2.1 * 102400


def test_dependent_means_one_product_feeds_another() -> None:
    plans = attention("", 1, 64, 64, 16)
    assert work(kernel(plans), plans.extents).dependent
    plans = planner(PRODUCT, X=(64, 256), W=(64, 256))
    assert not work(kernel(plans), plans.extents).dependent


def test_columns_of_rows_in_memory_are_moved_in_vain() -> None:
    plans = planner("cascade c(X[M,N]) -> Y[N] { Y[n] = sum[m] X[m,n] }", X=(256, 256))
    (group,) = groups = plans.groups()
    assert isinstance(group, Group)
    vain = []
    for tile in (1, 16, 64):
        tiles = dict(plans.default_tiling(group).tiles) | {"n": tile}
        vain.append(work(plans.kernel("c", group, groups, Tiling(tuple(tiles.items()))), plans.extents).l2_bytes)
    assert vain[0] > vain[1] > vain[2] == 0


@pytest.mark.parametrize(("rows", "columns", "warps", "copies"), [(16, 32, 4, 4), (32, 32, 4, 2), (64, 32, 4, 1)])
def test_every_warp_of_a_small_product_computes_the_operand_that_it_multiplies(
    rows: int, columns: int, warps: int, copies: int
) -> None:
    text = "cascade c(X[M,K], g[K], W[K,N]) -> Y[M,N] { Y[m,n] = sum[k] tanh(X[m,k] * g[k]) * W[k,n] }"
    plans = planner(text, X=(1024, 64), g=(64,), W=(64, 1024))
    plan = kernel(plans, Options(warps, 2), m=rows, n=columns, k=64)
    once = (1024 // rows) * (1024 // columns) * rows * 64  # the operand of every program
    assert work(plan, plans.extents).exps == pytest.approx(copies * once, rel=0.01)


# --- registers and shared memory -------------------------------------------------------------------------------------

# Rows x stream, warps, stages, extent of a head: registers and shared memory that Triton 3.6 compiles to on sm_90.
COMPILED = [
    (128, 64, 4, 2, 128, 250, 98336), (64, 64, 4, 3, 128, 140, 114744), (128, 128, 8, 2, 128, 188, 163872),
    (64, 128, 4, 2, 64, 154, 73760), (128, 64, 8, 3, 64, 106, 65592), (64, 64, 4, 2, 64, 106, 40992),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "stream", "warps", "stages", "extent", "registers", "shared"), COMPILED)
def test_guesses_are_close(
    rows: int, stream: int, warps: int, stages: int, extent: int, registers: int, shared: int
) -> None:
    plan = kernel(attention("where n <= m", 1, 256, 256, extent), Options(warps, stages, 32), m=rows, n=stream)
    assert live_registers(plan) == pytest.approx(registers, rel=0.06)
    assert shared_memory(plan) == pytest.approx(shared, rel=0.02)


def test_product_keeps_operands_of_every_stage() -> None:
    plans = planner(PRODUCT, X=(512, 512), W=(512, 512))
    plan = kernel(plans, Options(8, 3), m=128, n=256, k=64)
    assert live_registers(plan) == pytest.approx(154, rel=0.06)
    assert shared_memory(plan) == pytest.approx(147480, rel=0.02)


def test_too_many_registers_are_spilled() -> None:
    plans = attention("", 4, 256, 256, 128)
    plan = kernel(plans, Options(4, 2, 32), m=128, n=128)
    found, fitting = work(plan, plans.extents), work(plan, plans.extents, registers=255)
    assert live_registers(plan) > 255 == found.registers and found.l2_bytes > fitting.l2_bytes


def test_every_axis_of_the_grid_counts() -> None:
    plans = attention("", 3, 100, 64, 16)
    plan = kernel(plans, m=32)
    assert [axis.role for axis in plan.grid] == [Role.TILE, Role.POINT]
    assert programs(plan, plans.extents) == 4 * 3
