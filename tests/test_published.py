"""The model of machines of several devices against published tables, where they are at hand: every row, other models'
rows than those of the fits included, and the sign of every row on which a published system loses."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from benchmarks.links import LLAMA, MODELS, PREFILL, QWEN, apart, rows, text
from cascade.backends.distributed.fused import awaited, stored
from cascade.backends.distributed.kernels import Clock, Layer, problem_of
from cascade.backends.distributed.machine import node
from cascade.ir import Mesh, Shard
from cascade.passes.exchanges import by_parts, by_rows, by_shards
from cascade.passes.reach import Reach
from cascade.passes.schedule_bound import lower_bound
from cascade.passes.schedule_overlap import exact_schedule, list_schedule
from cascade.passes.shard import stated
from cascade.passes.split_tokens import split
from cascade.placed import Collective, Kind, Program
from cascade.timetable import Mode, Problem, Task
from cascade.verify.timetable import check_timetable
from tests.test_exchanges import layered
from tests.test_shard import canonical

PUBLISHED = Path("/work/shared/data/overlap")
HERE = pytest.mark.skipif(not PUBLISHED.is_dir(), reason="the published tables are not on this machine")
ROWS = [
    *(("Llama", devices, 1024 << doubled) for devices in (8, 4) for doubled in range(7)),
    *(("Mixtral", 8, 1024 << doubled) for doubled in range(7)),
    *(("Qwen", 8, 1024 << doubled) for doubled in range(6)),
]
"""The model of a row, its devices and its tokens."""

ALONE = dataclasses.replace(node("h100x8"), sustained=1.0)
"""For kernels that were timed by themselves."""

pytestmark = HERE


@functools.cache
def measured(name: str, devices: int, tokens: int) -> dict[str, float]:
    """Microseconds of a layer, whole and in slices."""
    model = MODELS[name]
    if model is QWEN:  # of this one only what was derived from a figure is at hand
        table = "derived_tokenweave_optimality_gap.csv"
        keys = {"whole": "baseline_ms", "no_reduce": "no_allreduce_ms", "split": "tokenweave_ms"}
        found = [r for r in rows(PUBLISHED, table) if r["model"].startswith(name) and int(r["tokens"]) == tokens]
    else:
        keys = {"whole": "baseline_multimem_ms", "no_reduce": "no_allreduce_ms", "split": "tokenweave_ms"}
        asked = {"tp": str(devices), "prompt_len": str(tokens)}
        table = [r for r in rows(PUBLISHED, PREFILL) if r["model"].startswith(name)]
        found = [r for r in table if asked.items() <= r.items()]
    (row,) = found
    return {key: model.measured_us(row, column) for key, column in keys.items()}


@pytest.mark.campaign
@pytest.mark.parametrize(("name", "devices", "tokens"), ROWS)
def test_layers_take_what_was_measured(name: str, devices: int, tokens: int) -> None:
    """In slices: within 5 % from 4096 tokens on and 10 % below. Whole, with all-reduces and norms on all rows: 6 %.

    Layers of Llama without collectives were fitted on eight devices, and the host's time to the slices of the mixture
    below 4096 tokens, by which it alone is what they wait for. Slices against the published baseline: where they lost,
    ours lose and the plan declines.
    """
    times, found = measured(name, devices, tokens), MODELS[name].plan(tokens, devices)
    whole, _ = apart(MODELS[name].reduced(tokens, devices), node("h100x8"))
    assert found.cut.split_us == pytest.approx(times["split"], rel=0.10 if tokens < 4096 else 0.05)
    assert whole == pytest.approx(times["whole"], rel=0.06)
    assert (found.cut.split_us < whole) == (times["split"] < times["whole"])
    if times["split"] > times["whole"]:
        assert found.cut.declined is not None and not found.cut.cuts


@pytest.mark.parametrize(("name", "devices", "tokens"), ROWS)
def test_layers_without_collectives_take_what_was_measured(name: str, devices: int, tokens: int) -> None:
    """Within 3 %, of which those of Llama on eight devices were fitted by one number; 5 % on four devices."""
    whole, links = apart(MODELS[name].reduced(tokens, devices), node("h100x8"))
    assert whole - links == pytest.approx(
        measured(name, devices, tokens)["no_reduce"], rel=0.05 if devices == 4 else 0.03
    )


def test_the_losses_of_the_mixture_are_its_two_smallest_rows() -> None:
    lost = [row for row in ROWS if measured(*row)["split"] > measured(*row)["whole"]]
    assert lost == [("Mixtral", 8, 1024), ("Mixtral", 8, 2048)]


# --- collectives and their fits --------------------------------------------------------------------------------------


@pytest.mark.campaign
def test_machine_files_say_what_the_fits_print() -> None:
    path = Path(__file__).parents[1] / "cascade" / "backends" / "distributed" / "machines" / "h100x8.toml"
    shipped = tomllib.loads(path.read_text(encoding="utf-8"))
    for key, value in tomllib.loads(text(PUBLISHED)).items():
        assert shipped[key] == value, key


def test_collectives_take_what_was_measured() -> None:
    columns = {
        Kind.ALL_REDUCE: "multimem_all_reduce_us", Kind.REDUCE_SCATTER: "multimem_rs_us", Kind.ALL_GATHER: "multimem_ag_us",
    }  # fmt: skip
    for row in rows(PUBLISHED, "tokenweave_fig4_arln_kernels_us.csv"):
        size = 2 * int(row["tokens"]) * int(row["hidden_size"])
        for kind, column in columns.items():
            assert node("h100x8").collective_us(kind, size, 8) == pytest.approx(float(row[column]), rel=0.08)


@pytest.mark.parametrize("blocks", node("h100x8").fused)
def test_fused_exchanges_take_what_was_measured(blocks: int) -> None:
    for row in rows(PUBLISHED, "tokenweave_fig10_fused_arln_ctas_us.csv"):
        size = 2 * int(row["tokens"]) * int(row["hidden_size"])
        wanted = float(row[f"fused_arln_us_ctas_{blocks}"])
        assert node("h100x8").fused_us(blocks, size, 8) == pytest.approx(wanted, rel=0.13)


# --- what splitting costs --------------------------------------------------------------------------------------------

MLP = """
cascade mlp(M[T,D], Wg[F,D], Wu[F,D], Wd[D,F]) -> Y[T,D] {
    J[t,f] = silu(sum[d] M[t,d] * Wg[f,d]) * (sum[d] M[t,d] * Wu[f,d])
    Y[t,d] = J[t,f] * Wd[d,f]
}
"""


def products_us(tokens: int, cuts: tuple[int, ...] = ()) -> float:
    """The two kernels of an MLP on one of eight devices, slice after slice, without the collective."""
    sizes = {"T": tokens, "D": 8192, "F": 28672}
    whole = stated(canonical(MLP, Mesh("tp", 8), Shard("f", "tp")), sizes)
    program = split(whole, "t", cuts) if cuts else whole
    clock, windows = Clock.of(whole, ALONE), len(cuts) + 1
    steps = [step for step in program.steps if not isinstance(step, Collective)]
    kernels = [steps[piece::windows] for piece in range(windows)]
    return sum(
        clock.compute_us([step for step in one if (step.name == "Y") == last], 132)
        for one in kernels
        for last in (0, 1)
    )


def test_splitting_costs_what_was_measured() -> None:
    """The published cost of the best cut of an MLP: the median difference is within 3 points.

    The whole and two halves, to which kernels were fitted: within 4 % in the mean square and 8 % at most.
    """
    differences, off = [], []
    for row in rows(PUBLISHED, "tokenweave_fig9_mlp_split_h100.csv"):
        tokens = int(row["tokens"])
        best = min(products_us(tokens, (cut,)) for cut in range(256, tokens - 255, 256))
        wanted = float(row["best_offset_split_us"]) / float(row["no_split_us"])
        differences.append(100 * abs(best / products_us(tokens) - wanted))
        off.append(products_us(tokens) / float(row["no_split_us"]) - 1)
        off.append(products_us(tokens, (tokens // 2,)) / float(row["equal_split_us"]) - 1)
    assert statistics.median(differences) <= 3
    assert max(map(abs, off)) <= 0.08 and statistics.mean(one**2 for one in off) <= 0.04**2


# --- products beside their collectives -------------------------------------------------------------------------------

SCATTERED = """
cascade scattered(X[T,F], W[D,F]) -> Y[T,D] {
    S[t,d] = X[t,f] * W[d,f]
    Y[t,d] = 2 * S[t,d]
}
"""
GATHERED = """
cascade gathered(X[T,D], W[F,D]) -> Y[T,F] {
    N[t,d] = 2 * X[t,d]
    Y[t,f] = N[t,d] * W[f,d]
}
"""
EIGHT = (Mesh("tp", 8), Shard("f", "tp"), Shard("t", "tp"))


def scatter(rows_: int, columns: int, summed: int) -> Program:
    """A product of so many rows and columns a device, and the reduce-scatter behind it."""
    found = stated(canonical(SCATTERED, *EIGHT), {"T": rows_, "D": columns, "F": 8 * summed})
    return dataclasses.replace(found, steps=found.steps[:2])


def gather(rows_: int, columns: int, summed: int) -> Program:
    """What is gathered, the all-gather, and a product of so many columns a device."""
    found = stated(canonical(GATHERED, *EIGHT), {"T": rows_, "D": summed, "F": 8 * columns})
    return dataclasses.replace(found, steps=found.steps[:3])


def time_us(program: Program, way: Callable[[Program, Layer, Reach], Layer] | None = None) -> float:
    """The makespan of a program, without what makes the operand that is gathered."""
    layer, reach = layered(program)
    problem = problem_of(program, layer if way is None else way(program, layer, reach), Clock.of(program, ALONE))
    made = sum(task.modes[0].us for task in problem.tasks if task.name == "N.0")
    return list_schedule(problem).makespan_us - made


def reports(op: str) -> list[tuple[int, float, float]]:
    """Rows, and microseconds apart and in one kernel, of a report on Flux."""
    found = [row for row in rows(PUBLISHED, "flux_issue90_8xh100_ms.csv") if row["op"] == op]
    return [(int(row["M"]), 1000 * float(row["torch_ms"]), 1000 * float(row["flux_ms"])) for row in found]


def test_products_that_store_to_peers_lose_on_every_row() -> None:
    """Three of the six rows were fitted; each is within 3 %, and apart is faster in all, as was measured."""
    for number, (count, apart_us, stored_us) in enumerate(reports("gemm_rs_N8192_K28672")):
        program = scatter(count, 8192, 28672 // 8)
        assert time_us(program) < time_us(program, stored) and apart_us < stored_us
        if number % 2:
            assert time_us(program, stored) == pytest.approx(stored_us, rel=0.03)


def test_products_that_wait_for_shards_win_where_it_was_measured() -> None:
    """The right sign on every row, the loss at 1024 rows included; within 10 %. None of these rows was fitted."""
    for count, apart_us, awaited_us in reports("ag_gemm"):
        program = gather(count, 7168, 8192)
        assert time_us(program, awaited) == pytest.approx(awaited_us, rel=0.10)
        assert (time_us(program, awaited) < time_us(program)) == (awaited_us < apart_us)


def test_kernels_that_wait_lose_their_last_wave_where_they_do_not_wait_too() -> None:
    """The same kernels behind a whole gather, which nothing was fitted to: slower than a library's where much of the last
    wave is empty, and only there."""
    for row in rows(PUBLISHED, "flux_issue90_8xh100_ms.csv"):
        if row["op"] == "ag_gemm":
            waves = int(row["M"]) // 128 * (7168 // 256) / 132
            slower = float(row["flux_no_overlap_ms"]) / float(row["torch_ms"])
            assert (slower > 1.02) == (math.ceil(waves) / waves > 1.1)


def variants(op: str) -> dict[tuple[str, str], float]:
    """Microseconds of reports on async tensor parallelism, by rows and variant."""
    found = [row for row in rows(PUBLISHED, "pytorch_async_tp_points.csv") if row["op"] == op]
    scale = {"us": 1.0, "ms": 1000.0}
    return {(row["M"], row["variant"]): float(row["value"]) * scale[row["unit"]] for row in found}


def test_a_gather_shard_by_shard_loses_and_one_kernel_wins_as_measured() -> None:
    times = variants("all_gather+matmul")
    plain, shards, native = (
        times["2048", name] for name in ("nccl+cublas", "decomposed async-tp", "native comm-aware async-tp")
    )
    program = gather(2048, 3584, 8192)
    number = next(n for n, step in enumerate(program.steps) if isinstance(step, Collective))
    assert native < plain < shards
    assert time_us(program, awaited) < time_us(program) < time_us(by_shards(program, number))


def test_few_rows_lose_part_by_part_on_every_row() -> None:
    """Measured on another machine, whose products are faster still: the sign is what is compared."""
    times = variants("scaled_mm+reduce_scatter")
    counts = {int(count) for count, _ in times}
    for count in sorted(counts):
        program = scatter(count, 16384, 7168)
        cuts = [16384 * part // 8 for part in range(1, 8)]
        assert times[str(count), "fused"] > times[str(count), "unfused"]
        assert time_us(by_parts(program, 1, "d", cuts)) > time_us(program)
        assert time_us(by_rows(program, 1)) > time_us(program)


# --- how near the bound ----------------------------------------------------------------------------------------------


def halves(tokens: int, computed_us: float, reduce_us: float, share: float, layers: int = 4) -> Problem:
    """Layers of two halves of tokens, as published: computing and reducing, each alone on its resource."""
    tasks: list[Task] = []

    def add(us: float, resource: str, needs: Sequence[int | None]) -> int:
        known = tuple(sorted(number for number in needs if number is not None))
        tasks.append(Task(f"{resource} {len(tasks)}", (Mode("only", us, ((resource, 1.0),)),), known))
        return len(tasks) - 1

    last: list[int | None] = [None, None]
    for _ in range(layers):
        keys: int | None = None
        for half in (0, 1):
            keys = add(computed_us * share / 2, "sms", (last[half], keys))
            reduced = add(reduce_us, "links", (keys,))
            products = add(computed_us * (1 - share) / 2, "sms", (reduced,))
            last[half] = add(reduce_us, "links", (products,))
    return Problem(tuple(tasks), (("sms", 1.0), ("links", 1.0)))


@pytest.mark.parametrize("tokens", [1024, 2048, 8192, 32768])
def test_published_instances_are_within_two_and_a_half_percent_of_their_bound(tokens: int) -> None:
    """Four layers, two halves: near the bound, proved, and as long as the prototype's schedule was."""
    table = rows(PUBLISHED, "derived_tokenweave_optimality_gap.csv")
    row = next(r for r in table if r["model"].startswith("Llama") and int(r["tokens"]) == tokens)
    kernels = {int(r["tokens"]): r for r in rows(PUBLISHED, "tokenweave_fig4_arln_kernels_us.csv")}
    computed = LLAMA.measured_us(row, "compute_only_bound_ms_via_fig4")
    reduce_us = float(kernels[tokens // 2]["multimem_all_reduce_us"])
    problem = halves(tokens, computed, reduce_us, 1 / 3)  # what of a layer is attention matters little
    found, best = list_schedule(problem), exact_schedule(problem)
    work = sum(task.modes[0].us for task in problem.tasks if task.modes[0].demand("sms"))
    assert not list(check_timetable(problem, found)) and best.optimal
    assert work <= lower_bound(problem) <= best.makespan_us + 1 and found.makespan_us <= 1.025 * work
    name = f"tokenweave_llama70b_tp8_T{tokens}_4layers"
    prototypes = rows(PUBLISHED, "derived_schedule_prototypes.csv")
    published = next(
        float(r["makespan_us"]) for r in prototypes if (r["instance"], r["method"]) == (name, "CP-SAT S=2")
    )
    assert best.makespan_us / 4 == pytest.approx(published, rel=0.01)
