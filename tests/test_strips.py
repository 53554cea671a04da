"""Loops over two ranks as one that visit, of the second, what a filter leaves for a tile of rows.

The witnesses: the tolerance rule; the head of the loop run as Python, against the tiles that have a live element; and
the model, which counts these.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import cascade
from cascade.backends.triton.count import trips
from cascade.backends.triton.paired import with_paired
from cascade.backends.triton.plan import Kernel, Loop
from cascade.backends.triton.planner import Planner
from cascade.inference import bind_sizes
from cascade.backends.triton.launch import layout
from tests.planned import emitted, final, only_group
from tests.tolerance import judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Test = Callable[[int, int], bool]
FILTERS: dict[str, tuple[str, Test, Test]] = {  # what tells l from m, and what tells w from m
    "a window of both": (
        "l <= m and m < l + 5 and w <= m and m < w + 9", lambda m, l: l <= m < l + 5, lambda m, w: w <= m < w + 9,
    ),
    "all before": ("l <= m and w <= m", lambda m, l: l <= m, lambda m, w: w <= m),
    "all behind": ("w >= m", lambda m, l: True, lambda m, w: w >= m),
    "around a stretched place": (
        "w - 2*m < 7 and 2*m - w < 20", lambda m, l: True, lambda m, w: -20 < w - 2 * m < 7,
    ),
    "none of some rows": ("w < m - 20", lambda m, l: True, lambda m, w: w < m - 20),
}  # fmt: skip


def program(where: str) -> str:
    return f"""cascade c(Q[B,M,E], K[B,L,E], J[B,W,E], V[B,L,F], U[B,W,F]) -> O[B,M,F] {{
    S[b,m,l,w] = Q[b,m,e] * K[b,l,e] * J[b,w,e] / sqrt(E) where {where}
    P[b,m,l,w] = softmax[l,w] S[b,m,l,w]
    O[b,m,f] = P[b,m,l,w] * V[b,l,f] * U[b,w,f]
}}"""


def given(text: str, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    known = {"B": 2, "M": 70, "L": 6, "W": 64, "E": 16, "F": 16} | sizes
    generator = torch.Generator().manual_seed(5)
    shapes = {param.name: [known[str(size)] for size in param.shape] for param in final(text).params}
    return {name: torch.randn(shape, generator=generator).to(DEVICE, dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FILTERS)
def test_results_are_those_of_the_cascade(name: str, dtype: torch.dtype) -> None:
    """At several lengths of the second rank in turn: of one tile, of tiles, and such that tiles do not divide."""
    text = program(FILTERS[name][0])
    for sizes in ({}, {"W": 256, "L": 3, "M": 130}, {"W": 128, "L": 40, "M": 9}, {"W": 50}, {"W": 7}):
        call, inputs = cascade.compile(text, backend="triton"), given(text, dtype, **sizes)
        verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
        assert verdict.ok, (sizes, verdict)
        assert "no kernel" not in call.explain()
        used = any("lw_length" in source for source in call.sources().values())
        assert used is (sizes.get("W", 0) >= 128), sizes


def test_lengths_that_change_are_right() -> None:
    """Of one call: its kernels have a number for what coordinates are divided by until that changes."""
    text = program(FILTERS["a window of both"][0])
    call = cascade.compile(text, backend="triton")
    for sizes in ({"W": 128}, {"W": 128, "M": 130, "L": 4}, {"W": 256}, {"W": 192}, {"W": 128}, {"W": 60}):
        inputs = given(text, **sizes)
        verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
        assert verdict.ok, (sizes, verdict)


@pytest.mark.parametrize("name", FILTERS)
def test_tiles_are_those_of_the_rows_and_of_the_stretch(name: str) -> None:
    where, of_row, of_stretch = FILTERS[name]
    sizes = {"B": 2, "M": 130, "L": 6, "W": 256, "LW": 6 * 256, "E": 16, "F": 16}
    kernel, (loop,) = kernel_of(program(where), **sizes)
    assert loop.strip is not None and loop.strip.width == 256
    tile, rows, visited = kernel.axis("lw").tile, kernel.axis("m").tile, 0
    for m_first in range(0, 130, rows):
        mine = range(m_first, min(m_first + rows, 130))
        places = visits(emitted(kernel), mine[0], mine[-1], tile, sizes["LW"])
        near = [l for l in range(6) if any(of_row(m, l) for m in mine)]
        tiles = [w // tile for w in range(256) if any(of_stretch(m, w) for m in mine)]
        stretch = range(min(tiles), max(tiles) + 1) if tiles else ()
        assert places == [l * 256 + at * tile for l in near for at in stretch]
        visited += len(places)
    assert trips(kernel, loop, sizes).total == 2 * visited


def kernel_of(text: str, **sizes: int) -> tuple[Kernel, list[Loop]]:
    """The kernel of a program for some sizes, the stream not shared, and its loops that have products."""
    inputs = {name: tensor.to("cpu") for name, tensor in given(text, torch.bfloat16, **sizes).items()}
    cascade_ = final(text)
    known = bind_sizes(cascade_, {name: tuple(tensor.shape) for name, tensor in inputs.items()}, {})
    joined = with_paired(cascade_, known, known)
    layouts = {name: layout(tensor) for name, tensor in inputs.items()}
    planner = Planner(joined.cascade, joined.extents(known), layouts, joined=joined.sizes)
    group = only_group(planner)
    kernel = planner.kernel("c", group, planner.groups(), planner.default_tiling(group))
    return kernel, [op for op in kernel.ops if isinstance(op, Loop) and op.unless is None]


def visits(text: str, m_first: int, m_last: int, tile: int, extent: int) -> list[int]:
    """Where tiles begin that the text of a kernel visits, its lines run as Python for one tile of rows."""
    functions = SimpleNamespace(maximum=max, minimum=min, range=range)
    names = {"tl": functions, "m_first": m_first, "m_last": m_last, "BLOCK_LW": tile, "LW": extent}
    for line in re.findall(r"^    (lw_\w+ = .*)", text, re.MULTILINE):
        exec(line, names)
    bounds, place = re.findall(r"for lw_at in (tl\.range.*):\n +lw_first = (.*)", text)[0]
    return [eval(place, names, {"lw_at": at}) for at in eval(bounds, names)]
