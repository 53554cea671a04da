"""Tensors that are read at a rank divided by a number: each element comes once, and stands for a group of neighbours.

The witness is the interpreter in float64, on the cascade as it is written.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

import cascade
from cascade import interp
from cascade.backends.triton.count import work
from cascade.backends.triton.plan import Load, every_op, render_kernel
from cascade.ir import DType
from cascade.values import Precision
from tests.planned import all_kernels, final, only_group, planner_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALVES = "select(d % 2 == 0, P[{0}] % 16, P[{0}] // 16 % 16) - 8"
QUARTERS = (
    "select(d % 4 == 0, P[f,d // 4] % 4, select(d % 4 == 1, P[f,d // 4] // 4 % 4, "
    "select(d % 4 == 2, P[f,d // 4] // 16 % 4, P[f,d // 4] // 64 % 4)))"
)
GROUPED = {
    "halves": "cascade c(X[T,D], P: i8[F,H], s[F,G]) -> Y[T,F] "
    f"{{ Y[t,f] = sum[d] X[t,d] * cast({HALVES.format('f,d // 2')}, f16) * s[f,d // 8] }}",
    "halves of columns": "cascade c(X[T,D], P: i8[H,F]) -> Y[T,F] "
    f"{{ Y[t,f] = sum[d] X[t,d] * cast({HALVES.format('d // 2,f')}, f16) }}",
    "quarters": f"cascade c(X[T,D], P: i8[F,Q]) -> Y[T,F] {{ Y[t,f] = sum[d] X[t,d] * cast({QUARTERS} - 2, f16) }}",
    "map": "cascade c(X[T,D], s[T,G]) -> Y[T,D] { Y[t,d] = X[t,d] * s[t,d // 8] }",
    "blocks": "cascade c(X[T,D], s[U,G]) -> Y[T,D] { Y[t,d] = X[t,d] * s[t // 4,d // 8] }",
    "whole": "cascade c(X[T,D], s[T,G]) -> Y[T] { Y[t] = sum[d] X[t,d] * s[t,d // 8] }",
    "filtered": "cascade c(X[T,D], s[T,G]) -> Y[T] { Y[t] = sum[d] X[t,d] * s[t,d // 8] where d <= 2 * t }",
    "truths": "cascade c(X[T,D], b: bool[T,G]) -> Y[T] { Y[t] = sum[d] select(b[t,d // 8], X[t,d], 0.0) }",
}


def inputs_of(text: str, width: int) -> dict[str, Tensor]:
    """Activations and what groups have; the last group of a width that is no multiple of it is cut."""
    generator = torch.Generator().manual_seed(11)
    groups = {f"{name}": -(-width // size) for name, size in (("H", 2), ("Q", 4), ("G", 8))}
    sizes = {"T": 24, "F": 48, "D": width, "U": 6, **groups}
    made = {
        DType.I8: lambda shape: torch.randint(-128, 128, shape, generator=generator).to(torch.int8),
        DType.BOOL: lambda shape: torch.randint(2, shape, generator=generator).bool(),
        None: lambda shape: torch.randn(shape, generator=generator).half(),
    }
    return {p.name: made[p.dtype]([sizes[str(size)] for size in p.shape]) for p in final(text).params}


def grouped(text: str, given: dict[str, Tensor]) -> set[tuple[str, str, int]]:
    """The tensors that come an element a group, the rank and the size of the group."""
    kernels = all_kernels(planner_for(final(text), given))
    loads = [op for kernel in kernels for op in every_op(kernel.ops) if isinstance(op, Load)]
    for op in loads:
        if op.grouped is not None:
            assert f"each for {op.grouped[1]} along {op.grouped[0]}" in "".join(map(render_kernel, kernels))
    return {(op.tensor, *op.grouped) for op in loads if op.grouped is not None}


@pytest.mark.parametrize("width", [64, 50], ids=["even", "cut"])
@pytest.mark.parametrize("name", GROUPED)
def test_kernels_compute_what_the_interpreter_does(name: str, width: int) -> None:
    given = inputs_of(GROUPED[name], width)
    found = cascade.compile(GROUPED[name], backend="triton")(**{key: t.to(DEVICE) for key, t in given.items()})
    exact = {key: t.double() if t.is_floating_point() else t for key, t in given.items()}
    (wanted,) = interp.run(final(GROUPED[name].replace("f16", "f64")), exact, precision=Precision.REFERENCE).values()
    assert float((found.double().cpu() - wanted).norm() / wanted.norm()) < 1e-3


def test_an_element_comes_once_for_its_group() -> None:
    for name, wanted in {
        "halves": {("P", "d", 2), ("s", "d", 8)},
        "halves of columns": {("P", "d", 2)},
        "quarters": {("P", "d", 4)},
        "whole": {("s", "d", 8)},
    }.items():
        assert grouped(GROUPED[name], inputs_of(GROUPED[name], 64)) == wanted, name


def test_bytes_are_those_of_groups() -> None:
    """Counted from the sizes of tensors: no byte goes through L2 again for another element of its group."""
    given = inputs_of(GROUPED["whole"], 64)
    planner = planner_for(final(GROUPED["whole"]), given)
    (kernel,) = all_kernels(planner)
    found = work(kernel, planner.extents)
    assert (found.read_bytes, found.l2_bytes) == (sum(2.0 * t.numel() for t in given.values()), 0.0)


def test_a_filter_that_cuts_tiles_smaller_than_groups_reads_single_elements() -> None:
    """Where a filter ends a loop its last tiles are smaller, and no group fits in."""
    text = GROUPED["filtered"].replace("d // 8", "d // 64")
    given = {"X": torch.randn(24, 65536).half(), "s": torch.randn(24, 1024).half()}
    planner = planner_for(final(text), given)
    group, sizes = only_group(planner), {}
    tiling = planner.default_tiling(group)
    for edge in (0, 32):
        cut = dataclasses.replace(tiling, options=dataclasses.replace(tiling.options, edge_tile=edge))
        kernel = planner.kernel("c", group, (group,), cut)
        sizes[edge] = [op.grouped for op in every_op(kernel.ops) if isinstance(op, Load) and op.tensor == "s"]
    assert sizes == {0: [("d", 64)], 32: [None]}


def test_a_group_that_ends_inside_a_tile_is_read_by_its_elements() -> None:
    """Beyond the extent some of its elements are absent, and tests tell them apart; not where a group ends there."""
    assert grouped(GROUPED["halves"], inputs_of(GROUPED["halves"], 51)) == set()
    assert grouped(GROUPED["halves"], inputs_of(GROUPED["halves"], 50)) == {("P", "d", 2)}


def test_a_number_that_is_no_power_of_two_is_read_by_elements() -> None:
    text = "cascade c(X[T,D], s[T,V]) -> Y[T] { Y[t] = sum[d] X[t,d] * s[t,d // 3] }"
    given = {"X": torch.randn(24, 64).half(), "s": torch.randn(24, 22).half()}
    assert grouped(text, given) == set()
