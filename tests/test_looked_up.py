"""A stream that lies where a table of pages says: once looked up for each page, and how its tiles are chosen.

The witnesses: the tolerance rule, the machine code that Triton makes, and a count with the other loop.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from cascade.backends.triton.count import shared_memory, work
from cascade.backends.triton.emit import emit
from cascade.backends.triton.forecast import static_facts
from cascade.backends.triton.launch import KernelStep
from cascade.backends.triton.machine import machine
from cascade.backends.triton.offline import StaticFacts
from cascade.backends.triton.plan import Kernel, Load, Loop, every_op
from cascade.backends.triton.planner import Planner
from cascade.backends.triton.tune import candidates, ranked
from cascade.ir import DType
from tests.planned import Chosen, call_of, final, only_group, planner_for
from tests.test_static import PAGES as POOL
from tests.test_static import planner_of
from tests.tolerance import judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = """
cascade paged(Q[B,H,M,E], K[C,H,W,E], V[C,H,W,F], pages: i32[B,L], len: i32[B]) -> O[B,H,M,F] {
    S[b,h,m,l,w] = (sum[e] Q[b,h,m,e] * K[pages[b,l],h,w,e]) / sqrt(E) where l*W + w < len[b]
    P[b,h,m,l,w] = softmax[l,w] S[b,h,m,l,w]
    O[b,h,m,f]   = sum[l,w] P[b,h,m,l,w] * V[pages[b,l],h,w,f] where l*W + w < len[b]
}"""


def given(pages: int, rows: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Two rows of so many pages of so many keys; the last of a row is not full, and behind it are none."""
    generator = torch.Generator().manual_seed(pages * rows)
    count = 2 * pages + 1
    found = {"Q": torch.randn(2, 2, 3, 16, generator=generator)}
    found |= {name: torch.randn(count, 2, rows, 16, generator=generator) for name in "KV"}
    found = {name: tensor.to(dtype) for name, tensor in found.items()}
    table = torch.randperm(2 * pages, generator=generator).reshape(2, pages).to(torch.int32)
    length = torch.tensor([pages * rows - rows // 2, max(1, pages * rows // 3)], dtype=torch.int32)
    missing = torch.arange(pages) * rows >= length[1]
    table[1][missing] = torch.tensor([-1, count], dtype=torch.int32).repeat(pages)[: int(missing.sum())]
    return {name: tensor.to(DEVICE) for name, tensor in (found | {"pages": table, "len": length}).items()}


def kernel_of(launcher: Chosen, inputs: dict[str, Tensor]) -> Kernel:
    """The kernel of a call that multiplies."""
    plan = launcher.plan(inputs, {})
    assert plan is not None
    steps = [step for step in plan.steps if isinstance(step, KernelStep)]
    return next(step.kernel for step in steps if step.kernel.name == "paged")


def looked_up(kernel: Kernel) -> Load:
    """How a kernel reads the table."""
    return next(op for op in every_op(kernel.ops) if isinstance(op, Load) and op.tensor == "pages")


@pytest.mark.parametrize(
    ("rows", "tile", "grouped"),
    [(2, 16, 2), (16, 16, 0), (16, 64, 16), (48, 64, 16), (6, 16, 2), (5, 16, 1), (64, 32, 0)],
)
def test_keys_of_a_page_share_a_place(rows: int, tile: int, grouped: int) -> None:
    """A power of two of them that divides page and tile; where a tile is all on one page it is one number."""
    load = looked_up(kernel_of(Chosen(final(TEXT), tile=tile), given(192, rows)))
    assert (load.axes, load.grouped) == (
        ((), None) if not grouped else (("lw",), ("lw", grouped) if grouped > 1 else None)
    )


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("tile", [16, 32])
def test_pages_of_any_length(tile: int, parts: int) -> None:
    """In turn, so that the later kernels are for changing tables, and at last for changing pages."""
    launcher = Chosen(final(TEXT), tile=tile, parts=parts)
    seen = []
    for pages, rows in ((8, 4), (7, 4), (21, 4), (3, 4), (2, 32), (3, 6), (1, 1)):
        inputs = given(pages, rows)
        seen.append(looked_up(kernel_of(launcher, inputs)))
        verdict = judge_all(call_of(launcher)(**inputs), standard(launcher.cascade, inputs, {}))
        assert verdict.ok, (pages, rows, verdict)
    assert [load.grouped for load in seen] == [("lw", 4)] * 4 + [None] * 3


def test_a_table_that_grows_is_read_by_pages() -> None:
    """The end of the keys is one of pages as well: it is asked for each page, and of the table's own end not at all."""
    launcher = Chosen(final(TEXT), tile=32)
    for pages in (8, 7, 9):
        kernel = kernel_of(launcher, given(pages, 16))
    text = emit(kernel).text
    assert "mask=(lw_first // 16 + tl.arange(0, BLOCK_LW // 16)) < LW // 16" in text
    assert "< L)" not in text.replace("< LW)", "")


def planned(rows: int = 16) -> Planner:
    """The planner of a decoding step over a pool of pages."""
    sizes = {**POOL.sizes, "W": rows, "L": 8192 // rows, "C": 32 * 8192 // rows}
    return planner_of(dataclasses.replace(POOL, sizes=sizes), DType.BF16)


@pytest.mark.parametrize("rows", [16, 64])
def test_shared_memory_of_what_is_looked_up_is_known(rows: int) -> None:
    """A stage less holds keys where their places are fetched ahead as a tile; the machine code is the witness."""
    planner, plans = planned(rows), list[Kernel]()
    group = only_group(planner)
    base = planner.default_tiling(group)
    for tile, stages in itertools.product((32, 64), (2, 3, 4, 5)):
        tiles = {**dict(base.tiles), group.arrangement.stream or "": tile}
        options = dataclasses.replace(base.options, num_warps=4, num_stages=stages, edge_tile=0)
        tiling = dataclasses.replace(base, tiles=tuple(tiles.items()), options=options, parts=1)
        plans.append(planner.kernel("paged", group, planner.groups(), tiling))
    for plan, facts in zip(plans, static_facts(plans, machine("h200")), strict=True):
        assert isinstance(facts, StaticFacts)
        assert shared_memory(plan) == pytest.approx(facts.shared_bytes, rel=0.02), plan.options


def test_a_loop_without_edges_of_its_own_has_no_shorter_tiles() -> None:
    """What is asked of all tiles alike is counted by whole tiles, and a choice of tiles at edges is none."""
    planner = planned()
    group = only_group(planner)
    base = dataclasses.replace(planner.default_tiling(group), parts=1)
    short, long = (
        dataclasses.replace(base, options=dataclasses.replace(base.options, edge_tile=edge)) for edge in (16, 0)
    )
    plans = [planner.kernel("paged", group, planner.groups(), tiling) for tiling in (short, long)]
    assert all(op.inner is None for plan in plans for op in every_op(plan.ops) if isinstance(op, Loop))
    assert work(plans[0], planner.extents) == work(plans[1], planner.extents)
    found = ranked(planner, "paged", group, planner.groups(), machine("h200"), (short, long))
    assert [tiling for tiling, _ in found] == [long]


def test_few_rows_have_short_tiles_of_many_stages() -> None:
    planner = planned()
    found = candidates(planner, only_group(planner))
    kinds = {(dict(one.tiles)["lw"], one.options.num_warps, one.options.num_stages) for one in found}
    assert {(32, 4, 5), (64, 8, 3), (64, 4, 2)} <= kinds


def test_what_is_divided_by_is_a_number_until_it_changes() -> None:
    """A choice of tiles is kept for the number; a kernel for several has it as an argument."""
    text = "cascade c(X[M], Y[L], U[W]) -> Z[M] { Z[m] = X[m] * Y[m // W] * U[m % W] }"
    inputs = {"X": torch.zeros(64), "Y": torch.zeros(16)}
    one, other = (planner_for(final(text), inputs | {"U": torch.zeros(size)}) for size in (4, 8))
    group = only_group(one)
    assert one.static(group).numbers == {"W": 4}
    assert one.bucket(group) != other.bucket(only_group(other))
    changing = dataclasses.replace(one, moving=frozenset({"W"}))
    assert not changing.static(only_group(changing)).numbers
