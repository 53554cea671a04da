"""In which order tiles are gone through, and in how many pieces they end: the results are the same bits."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from cascade.backends.triton.emit import emit
from cascade.backends.triton.launch import INTERPRETED, Bench, Groups, Launcher
from cascade.backends.triton.partition import Group
from cascade.backends.triton.plan import Kernel, Options, render_kernel
from cascade.backends.triton.planner import Planner, Tiling
from tests.planned import call_of, final, only_group, planner_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

PRODUCT = "cascade p(A[M,K], B[K,N]) -> C[M,N] { C[m,n] = A[m,k] * B[k,n] }"
TURNED = "cascade p(A[M,K], B[N,K]) -> C[M,N] { C[m,n] = A[m,k] * B[n,k] }"
BATCHED = "cascade p(A[Z,M,K], B[Z,K,N]) -> C[Z,M,N] { C[z,m,n] = A[z,m,k] * B[z,k,n] }"
ENDED = """cascade p(A[M,K], B[K,N], u[N], v[M], R[M,N]) -> C[M,N], D[M,N] {
    P[m,n] = A[m,k] * B[k,n]
    C[m,n] = gelu(P[m,n] + u[n]) * v[m]
    D[m,n] = select(n < m, P[m,n], 0.0) + R[m,n]
}"""
BEGUN = "cascade p(A[M,K], B[K,N], g[K]) -> C[M,N] { C[m,n] = relu(A[m,k] * g[k]) * B[k,n] }"
SUMMED = "cascade p(A[M,K], B[K,N]) -> y[M] { C[m,n] = A[m,k] * B[k,n]\n y[m] = sum[n] C[m,n] }"
TRIANGLE = "cascade p(A[M,K], B[K,N]) -> C[M,N] { C[m,n] = sum[k] A[m,k] * B[k,n] where k <= m }"

SHAPES = {
    PRODUCT: {"A": ("M", "K"), "B": ("K", "N")},
    TURNED: {"A": ("M", "K"), "B": ("N", "K")},
    BATCHED: {"A": ("Z", "M", "K"), "B": ("Z", "K", "N")},
    ENDED: {"A": ("M", "K"), "B": ("K", "N"), "u": ("N",), "v": ("M",), "R": ("M", "N")},
    BEGUN: {"A": ("M", "K"), "B": ("K", "N"), "g": ("K",)},
    SUMMED: {"A": ("M", "K"), "B": ("K", "N")},
    TRIANGLE: {"A": ("M", "K"), "B": ("K", "N")},
}
EVEN = {"M": 80, "N": 384, "K": 512, "Z": 2}  # 5 x 3 tiles: no number of those beside each other divides them
RAGGED = {"M": 72, "N": 328, "K": 520, "Z": 2}  # by descriptors
ODD = {"M": 77, "N": 323, "K": 517, "Z": 2}  # by pointers: loops with edges of their own
ORDERS = (
    {"grouped": 2}, {"resident": 1}, {"resident": 250}, {"pieces": 2}, {"pieces": 4},
    {"grouped": 4, "resident": 1, "pieces": 2},
)  # fmt: skip


@dataclasses.dataclass(slots=True, eq=False)
class Ordered(Launcher):
    """A launcher with small tiles and these options."""

    changes: dict[str, int] = dataclasses.field(default_factory=dict)

    def tiling(self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench | None) -> Tiling:
        return tiled(planner, group, self.changes)


def tiled(planner: Planner, group: Group, changes: dict[str, int]) -> Tiling:
    """Small tiles with these options, the columns wide enough for pieces."""
    base = planner.default_tiling(group)
    tiles = {rank: {"m": 16, "n": 128, "k": 256}.get(rank, tile) for rank, tile in base.tiles}
    return Tiling(tuple(tiles.items()), Options(4, 2, **changes))


def inputs(text: str, sizes: dict[str, int], dtype: torch.dtype = torch.float16) -> dict[str, Tensor]:
    torch.manual_seed(1)
    shapes = {name: [sizes[s] for s in shape] for name, shape in SHAPES[text].items()}
    return {name: torch.randn(shape).to(dtype).to(DEVICE) for name, shape in shapes.items()}


def kernel_of(text: str, sizes: dict[str, int], **changes: int) -> Kernel:
    """The kernel of a program with these options."""
    planner = planner_for(final(text), inputs(text, sizes))
    group = only_group(planner)
    return planner.kernel("p", group, planner.groups(), tiled(planner, group, changes))


TEXTS = {"product": PRODUCT, "turned": TURNED, "batched": BATCHED, "ended": ENDED, "begun": BEGUN}
CASES = [
    *((name, sizes, changes) for name in TEXTS for sizes in (EVEN, RAGGED) for changes in ORDERS),
    *((name, ODD, {"grouped": 2}) for name in TEXTS),
]


@pytest.mark.parametrize(("name", "sizes", "changes"), CASES)
def test_the_order_of_tiles_changes_no_bit(name: str, sizes: dict[str, int], changes: dict[str, int]) -> None:
    text, given = TEXTS[name], inputs(TEXTS[name], sizes)
    if (name, sizes) != ("begun", RAGGED):  # tests the end of the stream: `g` comes by pointers
        options = kernel_of(text, sizes, **changes).options
        assert {option: getattr(options, option) for option in changes} == changes
    wanted = call_of(Ordered(final(text)))(**given)
    found = call_of(Ordered(final(text), changes=changes))(**given)
    for ours, plain in zip(found, wanted, strict=True):
        assert ours.isfinite().all()
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("grouped", [0, 1, 2, 3, 8, 64])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (5, 3), (8, 8), (7, 1), (1, 9)])
def test_every_tile_is_gone_through_once(m: int, n: int, grouped: int) -> None:
    """The order by the text of the kernel, run as plain Python."""
    text = emit(kernel_of(PRODUCT, {"M": 16 * m, "N": 128 * n, "K": 512}, grouped=grouped)).text
    lines = text[text.index("    pid = ") : text.index("    m_first = ")].replace("tl.cdiv", "cdiv")
    lines = "\n".join(line.strip() for line in lines.replace("tl.minimum", "min").splitlines())
    found = []
    for pid in range(m * n):
        names = {"cdiv": lambda a, b: -(-a // b), "M": 16 * m, "N": 128 * n, "BLOCK_M": 16, "BLOCK_N": 128}
        names |= {"GROUP_M": grouped}
        exec(lines.replace("tl.program_id(0)", str(pid)), names)
        found.append((names["m_tile"], names["n_tile"]))
    assert sorted(found) == [(i, j) for i in range(m) for j in range(n)]
    if 1 < grouped < m:  # the first of them share few tiles of both ranks
        first = found[: grouped * min(n, 2)]
        assert {i for i, _ in first} == set(range(grouped)) and len({j for _, j in first}) == min(n, 2)


def test_options_that_a_kernel_cannot_have_are_left_out() -> None:
    every = {"grouped": 4, "resident": 3, "pieces": 2}
    assert kernel_of(PRODUCT, EVEN, **every).options == Options(4, 2, 0, 4, 3, 2)
    summed = kernel_of(SUMMED, {**EVEN, "N": 128}, **every).options  # takes columns together, has one tiled rank
    assert (summed.grouped, summed.pieces) == (0, 1)
    assert kernel_of(TRIANGLE, EVEN, **every).options.resident == 0  # its loops are not equally long
    assert kernel_of(PRODUCT, EVEN, pieces=8).options.pieces == 1  # pieces of 16 columns


def test_a_plan_prints_its_order() -> None:
    text = render_kernel(kernel_of(PRODUCT, EVEN, grouped=4, resident=3, pieces=2))
    for line in (
        "4 tiles of m beside each other",
        "3 programs of each multiprocessor",
        "what follows the loop in 2 pieces",
    ):
        assert line in text
    assert "tiles of" not in render_kernel(kernel_of(PRODUCT, EVEN))


def test_a_few_programs_go_through_all_tiles() -> None:
    launcher = Ordered(final(PRODUCT), changes={"resident": 1})
    call_of(launcher)(**inputs(PRODUCT, EVEN))
    (plan,) = (plan for plan in launcher.plans.values() if plan is not None)
    (step,) = plan.steps
    assert step.grid == (INTERPRETED, 1, 1)  # type: ignore[union-attr]
    assert math.prod(-(-extent // tile) for extent, tile in ((EVEN["M"], 16), (EVEN["N"], 128))) == 15
