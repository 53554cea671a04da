"""Products that a library may multiply: which these are, when it is taken, and that it gives what the kernel gives."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cascade.backends.triton import forecast, launch
from cascade.backends.triton.explain import describe
from cascade.backends.triton.library import CLEARLY, Multiplied, Side, candidate, estimated, multiplied
from cascade.backends.triton.machine import MACHINES, Estimate
from cascade.backends.triton.offline import Failure
from cascade.backends.triton.partition import Group, Rest
from cascade.backends.triton.planner import Layout, Planner, Tiling, contiguous
from cascade.backends.triton.tune import Choice, candidates, choose, ranked
from cascade.compiled import from_text
from cascade.inference import bind_sizes
from cascade.interp import Precision, run
from cascade.ir import DType
from cascade.pipeline import run_pipeline

H200 = MACHINES["h200"]
HEAD = "cascade c(X[M,K], W[N,K]{more}) -> Y[M,N] {{ Y[m,n] = {body} }}"
PLAIN = HEAD.format(more="", body="X[m,k] * W[n,k]")
BATCHED = "cascade c(X[I,K,M], W[I,K,N]) -> Y[I,M,N] { Y[i,m,n] = X[i,k,m] * W[i,k,n] }"
OTHERWISE = {
    "bias": HEAD.format(more=", b[N]", body="sum[k] X[m,k] * W[n,k] + b[n]"),
    "gain": HEAD.format(more=", g[K]", body="X[m,k] * g[k] * W[n,k]"),
    "number": HEAD.format(more="", body="X[m,k] * W[n,k] / 8"),
    "filter": HEAD.format(more="", body="X[m,k] * W[n,k]  where n <= m"),
    "scale": HEAD.format(more=", s[]", body="X[m,k] * W[n,k] * s"),
    "quotient": "cascade c(X[M,K], W[N,K]) -> Y[M,N] { Y[m,n] = X[m,k] * W[n//2,k] }",
    "turned": "cascade c(X[M,K,I], W[N,K,I]) -> Y[M,I,N] { Y[m,i,n] = X[m,k,i] * W[n,k,i] }",
    "two": "cascade c(X[M,K], W[N,K]) -> Y[M,N], Z[M,N] { Y[m,n] = X[m,k] * W[n,k]\n Z[m,n] = silu(Y[m,n]) }",
}
LARGE = {"M": 4096, "N": 4096, "K": 4096, "I": 16}

Planned = tuple[Planner, Group, tuple[Group | Rest, ...]]


def planned(
    text: str,
    sizes: dict[str, int] = LARGE,
    dtype: DType = DType.BF16,
    strides: dict[str, tuple[int, ...]] | None = None,
) -> Planned:
    """The planner of a call with contiguous tensors of these sizes, and the first of its groups."""
    cascade = run_pipeline(from_text(text, "<test>").cascade).final
    shapes = {param.name: tuple(sizes[str(size)] for size in param.shape) for param in cascade.params}
    layouts = {
        name: Layout(shape, (strides or {}).get(name, contiguous(shape)), dtype, True) for name, shape in shapes.items()
    }
    plans = Planner(cascade, bind_sizes(cascade, shapes, {}), layouts)
    groups = plans.groups()
    first = next(group for group in groups if isinstance(group, Group))
    return plans, first, groups


def test_a_plain_product_is_one_by_what_its_tensors_have() -> None:
    found = multiplied(*planned(PLAIN))
    assert found is not None
    assert (found.left.name, found.left.dims, found.right.name, found.right.dims) == ("X", (0, 1), "W", (1, 0))
    assert (found.batch, found.rows, found.columns, found.over) == (1, 4096, 4096, 4096)
    batched = multiplied(*planned(BATCHED))
    assert batched is not None and (batched.left.dims, batched.right.dims) == ((0, 2, 1), (0, 1, 2))
    assert batched.batch == 16


@pytest.mark.parametrize("name", OTHERWISE)
def test_what_has_more_to_do_is_a_kernel(name: str) -> None:
    assert multiplied(*planned(OTHERWISE[name])) is None


def test_other_types_and_strides_are_kernels() -> None:
    assert multiplied(*planned(PLAIN, dtype=DType.F32)) is None
    assert multiplied(*planned(PLAIN, strides={"X": (8192, 2)})) is None
    assert multiplied(*planned(PLAIN, strides={"X": (1, 4096)})) is not None


def test_small_products_are_kernels() -> None:
    small = planned(PLAIN, {**LARGE, "M": 64})
    assert multiplied(*small) is not None and candidate(*small, H200) is None


MEASURED = Path(__file__).parents[1] / "benchmarks" / "results" / "gemm-nvidia-h200.json"
MATMULS = {
    row["name"]: row["ms"]["cublas"]
    for row in json.loads(MEASURED.read_text(encoding="utf-8"))["rows"]
    if row["name"].startswith("matmul ") and "cublas" in row["ms"]
}


@pytest.mark.parametrize("name", MATMULS)
def test_its_time_is_near_what_was_measured(name: str) -> None:
    """Of cuBLAS on an H200, as the table `gemm` has it."""
    *batch, rows, columns, over = [int(word) for word in name.split() if word.isdigit()]
    side = Side("X", (0, 1))
    found = estimated(H200, Multiplied("Y", side, side, *(batch or [1]), rows, columns, over))
    assert found is not None and found.bound == "matrix"
    assert found.time_us == pytest.approx(1e3 * MATMULS[name], rel=0.07)


def chosen(
    share: float, effort: str = "none", times: tuple[float, float] = (1.0, 1.0), cache: Path | None = None
) -> Choice:
    """The choice where the library is said to take this share of the time of the model's first tiles."""
    plans, group, groups = planned(PLAIN)
    (_, first), *_ = ranked(plans, "c", group, groups, H200, candidates(plans, group))
    other = Tiling(plans.default_tiling(group).tiles, library=True)
    known = Estimate(share * first.time_us, "matrix", (), 1, 1.0, "")

    def timer(tiling: Tiling) -> float | None:
        return times[tiling.library]

    return choose(plans, "c", group, groups, H200, effort, timer, cache, others=lambda own_us: [(other, known)])


def test_the_model_takes_it_where_it_is_clearly_faster() -> None:
    assert not chosen(1.0).tiling.library and not chosen(1 - CLEARLY / 2).tiling.library
    assert chosen(1 - 2 * CLEARLY).tiling.library


def test_the_stopwatch_takes_it_where_it_was_clearly_faster(tmp_path: Path) -> None:
    assert not chosen(1.0, "quick", (1.0, 1 - CLEARLY / 2)).tiling.library
    found = chosen(1.5, "quick", (1.0, 0.9), tmp_path)
    assert found.tiling.library and found.milliseconds == 0.9
    kept = chosen(1.5, "quick", (1.0, 5.0), tmp_path)
    assert kept.tiling.library and "earlier run" in kept.how


def test_what_is_chosen_among_compiled_kernels_keeps_its_own_estimate() -> None:
    """Kernels are compiled where no clock can be asked, and none is for the library: nothing is known of it then."""
    plans, group, groups = planned(PLAIN)
    other = Tiling(plans.default_tiling(group).tiles, library=True)
    known = Estimate(1.0, "matrix", (), 1, 1.0, "")
    fails = [Failure("broken")]
    found = choose(
        plans, "c", group, groups, H200, "quick", None, compiler=lambda asked, arch: fails * len(asked),
        others=lambda own_us: [(other, known)],
    )  # fmt: skip
    assert found.tiling.library and found.estimate == known


@pytest.mark.parametrize("text", (PLAIN, BATCHED))
def test_a_step_of_it_gives_what_the_cascade_means(text: str) -> None:
    sizes = {"M": 37, "N": 24, "K": 19, "I": 3}
    cascade = run_pipeline(from_text(text, "<test>").cascade).final
    inputs = {
        param.name: torch.randn([sizes[str(size)] for size in param.shape], dtype=torch.bfloat16)
        for param in cascade.params
    }
    launcher = launch.Launcher(cascade)
    layouts = {name: launch.layout(tensor) for name, tensor in inputs.items()}
    plans = launcher.planner(bind_sizes(cascade, {n: tuple(t.shape) for n, t in inputs.items()}, {}), layouts, False)
    (group,) = groups = plans.groups()
    assert isinstance(group, Group)
    tiling = Tiling(plans.default_tiling(group).tiles, library=True)
    (step,) = launcher.built(plans, "c", group, groups, tiling, None)
    assert isinstance(step, launch.LibraryStep)
    tensors = dict(inputs) | {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in step.made}
    step(tensors)
    gold = run(cascade, inputs, {}, Precision.REFERENCE)["Y"]
    torch.testing.assert_close(tensors["Y"].double(), gold, rtol=2e-2, atol=2e-2)


def test_what_runs_says_so() -> None:
    plans, group, groups = planned(PLAIN)
    kernel, extents = forecast.planned(plans, "c", group, groups, plans.default_tiling(group))
    library, own = (describe(forecast.Launch(kernel, extents, chosen(share))) for share in (0.5, 1.0))
    line = "no kernel of its own: PyTorch's library of matrix products multiplies"
    assert line in library and line not in own
    assert "programs of" in own and "programs of" not in library
    assert "chosen as the model's first" in library
