"""Products that a library makes for a kernel: which these are, when they are, and that results are the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from benchmarks import programs
from cascade.backends.triton import forecast, planner
from cascade.backends.triton.apart import NEAR, elsewhere, parts, planner_of_parts
from cascade.backends.triton.explain import describe
from cascade.backends.triton.launch import Bench, Groups, Launcher, LibraryStep
from cascade.backends.triton.machine import MACHINES
from cascade.backends.triton.partition import Group
from cascade.backends.triton.planner import Planner, Tiling
from cascade.backends.triton.tune import NARROWLY, UNTIMED, Choice, choose
from cascade.errors import UnsupportedError
from cascade.frontend.build import parse_cascade
from cascade.ir import DType
from tests.kernel_programs import PROGRAMS
from tests.planned import call_of, final
from tests.test_library import LARGE, Planned, planned
from tests.tolerance import Draw, confirmed

H200 = MACHINES["h200"]
GATED = PROGRAMS["gated"].text
PRODUCTS = ("C_sum", "C_sum_1")
WITHOUT = {
    "what goes between is larger": (
        "cascade c(A[H,M,E], B[H,N,E], D[H,N,F]) -> C[H,M,F] { C[h,m,f] = sigmoid(sum[e] A[h,m,e] * B[h,n,e]) * D[h,n,f] }"
    ),
    "coordinates are absent": (
        "cascade c(A[M,K], B[K,N]) -> C[M,N] { S[m,n] = A[m,k] * B[k,n] where n <= m\n C[m,n] = silu(S[m,n]) }"
    ),
    "the product is a result": (
        "cascade c(A[M,K], B[K,N]) -> S[M,N], C[M,N] { S[m,n] = A[m,k] * B[k,n]\n C[m,n] = silu(S[m,n]) }"
    ),
    "operands are computed": "cascade c(A[M,K], B[K,N], g[M]) -> C[M,N] { C[m,n] = silu(sum[k] silu(A[m,k]) * B[k,n]) }",
    "scores are larger": programs.attention(),
    "results are absent": (
        "cascade c(A[M,K], B[K,N]) -> C[M,N] { S[m,n] = A[m,k] * B[k,n]\n C[m,n] = silu(S[m,n]) where n <= m }"
    ),
}


def of_gated(sizes: dict[str, int] = LARGE) -> Planned:
    return planned(GATED, sizes)


def others(found: Planned, own_us: float = 1e9) -> list[tuple[str, ...]]:
    """What the library could make of a group whose best tiles take so long."""
    plans, group, groups = found
    return [tiling.apart for tiling, _ in elsewhere(plans, "c", group, groups, H200)(own_us) if tiling.apart]


def test_all_products_of_a_kernel_are_or_all_but_one() -> None:
    assert others(of_gated()) == [PRODUCTS, PRODUCTS[:1]]
    assert others(planned(PROGRAMS["gemm_bias_gelu"].text)) == [("C_sum",)]


@pytest.mark.parametrize("name", WITHOUT)
def test_others_stay(name: str) -> None:
    found = planned(WITHOUT[name], {**LARGE, "B": 4, "H": 32, "E": 128, "F": 128})
    assert others(found) == [] and len(found[1].statements) > 1


def test_a_plain_product_is_the_library_s_as_a_whole() -> None:
    plans, group, groups = planned("cascade c(A[M,K], B[K,N]) -> C[M,N] { C[m,n] = A[m,k] * B[k,n] }")
    assert [tiling.library for tiling, _ in elsewhere(plans, "c", group, groups, H200)(1e9)] == [True]


def test_what_fills_no_device_or_takes_longer_is_not_tried() -> None:
    assert others(of_gated({**LARGE, "M": 64})) == []
    plans, group, groups = of_gated()
    found = elsewhere(plans, "c", group, groups, H200)
    longest = max(estimate.time_us for _, estimate in found(1e9))
    assert len(found(1.001 * longest / NEAR)) == 2 and len(found(0.999 * longest / NEAR)) == 1


def test_each_has_its_kernel_and_what_goes_between_has_sixteen_bits() -> None:
    plans, group, groups = of_gated()
    for apart, wanted in ((PRODUCTS, 3), (PRODUCTS[:1], 2)):
        inner = planner_of_parts(plans, "c", group, groups, apart)
        found = [*parts(plans, "c", group, groups, apart)]
        assert [part.label for part in found] == [f"c_{number}" for number in range(wanted)]
        assert tuple(part.group.names[0] for part in found if part.product) == apart
        assert [name for part in found for name in part.group.names] == [*group.names]
        assert {inner.written(name, inner.groups()).dtype for name in group.names} == {DType.BF16}
        assert [inner.numbers(name) for name in group.names] == [(4096, 4096)] * 3
    with pytest.raises(UnsupportedError, match="C by a library"):
        list(parts(plans, "c", group, groups, ("C",)))


def test_the_time_is_that_of_all_kernels() -> None:
    plans, group, groups = of_gated()
    for tiling, estimate in elsewhere(plans, "c", group, groups, H200)(1e9):
        each = [part.choice(H200).estimate for part in parts(plans, "c", group, groups, tiling.apart)]
        assert estimate.time_us == pytest.approx(sum(one.time_us for one in each))
        for unit in ("matrix", "memory", "launch"):
            assert dict(estimate.parts)[unit] == pytest.approx(sum(dict(one.parts)[unit] for one in each))
        assert estimate.why.count("by the library") == len(tiling.apart)


def chosen(effort: str, ratio: float = 1.0, by_model: float = 1.0, cache: Path | None = None) -> Choice:
    """The choice where parts take `ratio` of the time of tiles, and the model says that of its own they take so much."""
    plans, group, groups = of_gated()
    found = elsewhere(plans, "c", group, groups, H200)

    def said(own_us: float) -> list[tuple[Tiling, object]]:
        return [(tiling, dataclasses.replace(one, time_us=by_model * own_us)) for tiling, one in found(1e9)]

    def timer(tiling: Tiling) -> float:
        return ratio if tiling.apart else 1.0

    return choose(plans, "c", group, groups, H200, effort, timer, cache, others=said)  # type: ignore[arg-type]


def test_they_are_taken_where_that_is_clearly_faster(tmp_path: Path) -> None:
    assert not chosen("none", by_model=1 - UNTIMED / 2).tiling.apart
    assert chosen("none", by_model=1 - 2 * UNTIMED).tiling.apart
    taken = chosen("quick", 1 - 2 * NARROWLY, by_model=1.05, cache=tmp_path)
    kept = chosen("quick", 9.0, by_model=1.05, cache=tmp_path)
    assert taken.tiling.apart and kept.tiling == taken.tiling and "earlier run" in kept.how
    assert not chosen("quick", 1 - NARROWLY / 2, by_model=0.5).tiling.apart


class InParts(Launcher):
    """A launcher of which every group with these products is in parts."""

    apart: tuple[str, ...] = PRODUCTS

    def tiling(self, planner: Planner, label: str, group: Group, groups: Groups, bench: Bench | None) -> Tiling:
        found = planner.default_tiling(group)
        inside = set(self.apart) < set(group.names)
        return dataclasses.replace(found, apart=self.apart) if inside else found


@pytest.mark.parametrize("apart", [PRODUCTS, PRODUCTS[:1], PRODUCTS[1:]])
@pytest.mark.parametrize("recipe", ["normal", "spike", "rising"])
def test_the_results_are_those_of_the_cascade(
    apart: tuple[str, ...], recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planner, "LAUNCH", 0)  # what is small has 16 bits as well
    program = PROGRAMS["gated"]
    launcher = InParts(final(program.text))
    launcher.apart = apart
    for sizes in (program.small, {"M": 37, "N": 19, "K": 70}):
        draw = Draw(program, {**program.small, **sizes}, recipe, torch.bfloat16)
        verdict = confirmed(call_of(launcher), parse_cascade(program.text), draw)
        assert verdict.ok, f"{sizes}: {verdict}"
        steps = [] if launcher.last is None else launcher.last.steps
        assert [isinstance(step, LibraryStep) for step in steps] == [True] * len(apart) + [False]


def test_a_forecast_has_each_of_them() -> None:
    text = programs.GATED_MLP
    sizes = {"T": 8192, "D": 4096, "F": 14336}
    types = dict.fromkeys(("X", "G", "U", "W"), DType.BF16)
    found, outside = forecast.forecast(final(text), sizes, types, H200)
    assert outside == () and [one.choice.tiling.library for one in found] == [True, False, False]
    assert found[0].defines == ("H_sum",) and found[1].defines == ("H_sum_1", "H")
    told = describe(*forecast.launches(final(text), sizes, types, H200))
    assert told.count("PyTorch's library of matrix products multiplies") == 1
    assert "one of 2 kernels in the place of one" in told
