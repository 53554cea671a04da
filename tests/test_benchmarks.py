"""The benchmarks run: every table at small sizes on the CPU, and what decides between pass, short, wrong and failed.

How fast anything is, only a GPU can tell. Here every program agrees with its float64 reference, a peer that fails is a
line of the table, and a wrong result is never timed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import attention, compiling, emulated, launching, overlap, row, splitting, timing
from benchmarks.__main__ import OTHERS, SECONDS, WORKLOADS, main
from benchmarks.row import OURS, Result, apart, errors, judged, measure_row
from benchmarks.timing import Budget, measure
from benchmarks.workload import Bar, Inputs, Peer, Workload
from cascade.backends.distributed.machine import node
from cascade.backends.distributed.plan import plan_json, plan_of
from cascade.backends.distributed.runtime import ordered
from cascade.backends.distributed.streams import Ordered
from cascade.ir import Mesh, Shard
from cascade.passes.exchanges import by_rows, scatter_gather
from cascade.passes.shard import stated
from tests.test_shard import canonical

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
SLOW = pytest.mark.campaign


def run(table: str, tmp_path: Path, *more: str) -> tuple[int, dict[str, object], str]:
    """The exit code, the JSON and the text of a table at small sizes."""
    path = tmp_path / f"{table}.txt"
    code = main([table, "--tiny", "--device", "cpu", "--rounds", "1", "-o", str(path), *more])
    return code, json.loads(path.with_suffix(".json").read_text()), path.read_text()


def test_every_table_is_known() -> None:
    assert {*WORKLOADS, *OTHERS} == set(SECONDS)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("table", [pytest.param(t, marks=SLOW if t == "flex-grid" else ()) for t in WORKLOADS])
def test_every_row_of_a_table_is_right(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, data, text = run(table, tmp_path)
    assert code == 0, text
    assert text.strip() in capsys.readouterr().out
    for line in data["rows"]:
        assert OURS in line["ms"] and line["error"][OURS] < 1e-2
        assert line["bars"] == [] and line["doubts"] == {}, line
        assert set(line["failed"]) <= {"cudnn", "liger"}, line
        assert len(line["ms"]) > 1, "no peer ran"


@pytest.mark.filterwarnings("ignore")
def test_the_grid_with_shared_heads(tmp_path: Path) -> None:
    code, data, text = run(
        "flex-grid", tmp_path, "--heads", "16,16/4", "--lengths", "2048", "--widths", "64", "--only", "alibi"
    )
    assert code == 0 and len(data["rows"]) == 2, text


@pytest.mark.filterwarnings("ignore")
def test_the_launch_table(tmp_path: Path) -> None:
    code, data, text = run("launch", tmp_path)
    assert code == 0 and len(data["rows"]) == 4, text
    assert "host us per call" in text


@pytest.mark.filterwarnings("ignore")
def test_the_model_table(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    code, data, text = run("model", tmp_path, "--only", "softmax")
    assert code == 0 and len(data["rows"]) == 3, text
    assert "within 25% of measured: 3 of 3 rows" in text and "the times are made up" in text
    for line in data["rows"]:
        assert line["best_ms"] == min(one["ms"] for one in line["tried"] if one["ms"] is not None)
        assert line["best_ms"] <= line["top_ms"] <= line["first_ms"] and line["candidates"] == len(line["tried"])


@pytest.mark.filterwarnings("ignore")
def test_tables_of_plans_that_run(tmp_path: Path) -> None:
    """Slices of a block, a plan with emulated links, a layer on two processes: they run, and what they give is right."""
    code, data, text = run("split", tmp_path)
    assert code == 0 and [line["name"] for line in data["rows"]] == ["split 512", "split 768"], text
    x, *weights = torch.randn(12, 8), torch.randn(6, 8), torch.randn(6, 8), torch.randn(8, 6)
    (whole,), parts = splitting.sliced(x, weights, ())(), splitting.sliced(x, weights, (5,))()
    torch.testing.assert_close(torch.cat(parts), whole)
    code, data, text = run("emulated", tmp_path)
    (line,) = data["rows"]
    assert code == 0 and line["replayed"] <= 1.001 * sum(task["ms"] for task in line["tasks"]), text
    code, data, text = run("devices", tmp_path)
    (line,) = data["rows"]
    assert code == 0 and line["error"] < 1e-4 and {"whole", "one queue", "planned"} == set(line["ms"]), text


@pytest.mark.filterwarnings("ignore")
def test_rows_that_go_round_take_their_time_on_emulated_links() -> None:
    """One rank alone, to which nothing comes: its own shard of the sum is its own part of it."""
    text = "cascade c(X[T,F], W[F,D]) -> Y[T,D] { Y[t,d] = X[t,f] * W[f,d] }"
    program = stated(canonical(text, Mesh("tp", 4), Shard("f", "tp")), {"T": 8, "F": 12, "D": 3})
    program = by_rows(scatter_gather(program, 1, 0), 1)
    found = plan_of(program, node("h100x8"))
    tensors = {"X": torch.randn(8, 12), "W": torch.randn(12, 3)}
    link = emulated.Link(torch.device("cpu"))
    alone = emulated.Emulated(found.program, ordered(plan_json(found)["tasks"]), found.node, link)(tensors)["Y"]
    torch.testing.assert_close(alone[:2], tensors["X"][:2, :3] @ tensors["W"][:3])


def test_a_replay_starts_tasks_behind_what_they_wait_for() -> None:
    tasks = [
        Ordered((0,), "a"),
        Ordered((1,), "b", (0,)),
        Ordered((2,), "a"),
        Ordered((3,), "a", (1,)),
        Ordered((4,), "c"),
    ]
    assert emulated.replayed(tasks, [2.0, 5.0, 1.0, 1.0, 4.0]) == 8.0
    assert emulated.replayed(tasks, [2.0, 0.0, 4.0, 1.0, 9.0]) == 9.0


def test_the_cost_table(tmp_path: Path) -> None:
    code, data, text = run("cost", tmp_path)
    assert code == 0 and len(data["rows"]) == 2 + 5, text
    assert all(line["seconds"] > 0 and line["verdict"] == "-" for line in data["rows"])


@pytest.mark.filterwarnings("ignore")
def test_the_overlap_table(tmp_path: Path) -> None:
    code, data, text = run("overlap", tmp_path)
    assert code == 0, text
    assert "8 SMs: copy" in text and "The model supposes 65.2 GB/s an SM" in text
    for line in (line for line in data["rows"] if "error" in line):
        assert line["error"] < 1e-2 and line["modelled_us"]["planned"] <= line["modelled_us"]["whole"] * (1 + 1e-9)
    assert [overlap.judged(ratio, 1.15) for ratio in (1.2, 1.0, 0.97)] == ["pass", "short", "failed"]


@SLOW
def test_the_compile_table_in_fresh_processes(tmp_path: Path) -> None:
    code, data, text = run("compile", tmp_path, "--only", "softmax")
    (line,) = data["rows"]
    assert code == 0, text
    assert line["cold"]["first"] >= line["cold"]["loaded"] > 0 and line["cold"]["error"] < 1e-2


def test_the_compile_table_judges_what_has_a_bar() -> None:
    runs = {"cold": {"first": 4.0, "error": 0.0}, "quick": {"first": 9.0, "error": 0.0}}
    assert compiling.judged(runs, {"cold": 3.0, "quick": 30.0}, False) == "short"
    assert compiling.judged(runs, {"quick": 30.0}, False) == "pass"
    assert compiling.judged(runs, {"quick": 30.0}, True) == "-"
    assert compiling.judged(runs | {"quick": {"failed": "late"}}, {"quick": 30.0}, False) == "failed"
    assert compiling.judged(runs | {"quick": {"first": 1.0, "error": 1.0}}, {"quick": 30.0}, False) == "wrong"


def test_no_row_and_no_time(tmp_path: Path) -> None:
    assert main(["gemm", "--tiny", "--device", "cpu", "--only", "nothing like it"]) == 3
    code, data, text = run("gemm", tmp_path, "--seconds", "0")
    assert code == 1 and "out of time" in text
    assert {line["verdict"] for line in data["rows"]} == {"failed"}


DOUBLE = "cascade double(X[M,N]) -> Y[M,N] {\n Y[m,n] = 2 * X[m,n]\n}"


def doubled(text: str = DOUBLE, **peers: Peer) -> Workload:
    """A workload that doubles a matrix."""

    def inputs(generator: torch.Generator) -> Inputs:
        return {"X": torch.randn(4, 5, generator=generator)}

    return Workload(
        "double", text, inputs, lambda given: 2 * given["X"][:2].double(), lambda out, given: out[:2], peers,
        (Bar(ms=1e6), Bar(2.0, peer="other"), Bar(copy=True, goal=True)), moved=160.0,
    )  # fmt: skip


def measured(workload: Workload) -> Result:
    return measure_row(workload, CPU, "none", Budget(3, 5.0), 1e12)


def test_a_wrong_result_is_not_timed() -> None:
    result = measured(doubled(DOUBLE.replace("2 *", "2.1 *"), other=Peer(lambda given: given["X"] * 2)))
    assert result.verdict == "wrong" and OURS not in result.ms and "other" in result.ms


def test_a_result_that_is_wrong_outside_of_the_slice_is_not_timed() -> None:
    text = DOUBLE.replace("2 * X[m,n]", "select(m < 2, 2, 2.5) * X[m,n]")
    result = measured(doubled(text, other=Peer(lambda given: given["X"] * 2)))
    assert result.verdict == "wrong" and "outside" in result.failed[OURS] and OURS not in result.ms


def test_a_failing_cascade_and_a_failing_peer_are_lines() -> None:
    def fails(given: Inputs) -> None:
        raise RuntimeError("no such thing\nand more")

    result = measured(doubled("cascade broken(", other=Peer(fails)))
    assert result.verdict == "failed" and result.ms == {}
    assert result.failed["other"] == "RuntimeError: no such thing and more"


def test_a_peer_that_computes_something_else_is_noticed() -> None:
    result = measured(doubled(other=Peer(lambda given: given["X"] * 3)))
    assert "something else" in result.doubts["other"] and OURS in result.ms


def test_a_bar_says_how_much_of_it_was_reached() -> None:
    result = Result("r", ms={OURS: 2.0, "other": 3.0}, moved=4e9)
    assert judged(Bar(1.25, peer="other"), result, 4e12)["reached"] == pytest.approx(1.2)
    assert judged(Bar(0.5, copy=True), result, 4e12)["reached"] == pytest.approx(1.0)
    assert judged(Bar(ms=1.0), result, 4e12)["reached"] == pytest.approx(0.5)
    assert judged(Bar(peer="absent"), result, 4e12)["reached"] is None
    result.bars = [judged(Bar(1.25, peer="other"), result, 1.0), judged(Bar(ms=1.0, goal=True), result, 1.0)]
    assert result.verdict == "pass"
    result.bars.append(judged(Bar(ms=1.0), result, 1.0))
    assert result.verdict == "short"


def test_nan_is_never_right() -> None:
    right = torch.ones(3, 4, dtype=torch.float64)
    error, worst = errors(right * torch.nan, right)
    assert not error <= row.ALL_WRONG and not worst <= row.ROW_WRONG
    assert not apart(right * torch.nan, right) <= row.APART


def test_contenders_take_turns() -> None:
    order: list[str] = []
    contenders = {name: [lambda name=name: order.append(name)] for name in ("a", "b")}
    medians, failures = measure(contenders, CPU, Budget(3, 5.0))
    assert set(medians) == {"a", "b"} and not failures
    assert order == ["a", "b", *["a", "b"] * 3]


def test_rounds_stop_when_the_time_is_over() -> None:
    order: list[int] = []
    measure({"a": [lambda: order.append(0)]}, CPU, Budget(100, 0.0))
    assert len(order) == 1 + timing.FEWEST_ROUNDS


def test_live_pairs_are_those_of_the_masks() -> None:
    length = 48
    m, n = torch.arange(length)[:, None], torch.arange(length)[None, :]
    shape = attention.Shape(2, 4, 4, length, 16)
    for variant in attention.variants(tiny=True):
        inputs = variant.more(shape, CPU)
        zero = torch.tensor(0)
        live = variant.mask(inputs)(zero, zero, m, n) if variant.mask else torch.ones(length, length)
        assert variant.live(length) == int(live.sum()), variant.name
    variant, shape = attention.padded(), attention.Shape(attention.PADDED_BATCHES, 1, 1, length, 1)
    seen = variant.mask and variant.mask(variant.more(shape, torch.device("cpu")))
    found = [int(seen(torch.tensor(b), zero, m, n).sum()) for b in range(shape.batches)] if seen else []
    assert variant.live(length) == sum(found) / shape.batches and len(set(found)) == shape.batches


def test_compilations_are_counted() -> None:
    knobs = pytest.importorskip("triton").knobs
    with launching.compilations() as seen:
        assert seen is not None
        knobs.compilation.listener(src=None, metadata={}, metadata_group={}, times=None, cache_hit=False)
    assert seen == [False] and knobs.compilation.listener is None


BARE = """
import torch
from benchmarks import bare, launching
generator = torch.Generator().manual_seed(1)
for name, (_, make, maths, length) in launching.CASES.items():
    inputs = {key: value.float() for key, value in make(length - 3, generator).items()}
    torch.testing.assert_close(getattr(bare, name)(inputs), maths(inputs), rtol=1e-4, atol=1e-5)
"""


def test_the_bare_kernels_are_right_in_the_interpreter_of_triton() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", BARE], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_all_passes_its_options_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen: list[list[str]] = []

    def note(command: list[str], timeout: float) -> SimpleNamespace:
        seen.append(command[3:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", note)
    assert main(["all", "--tiny", "-o", str(tmp_path), "--rounds", "2"]) == 0
    assert seen[0] == ["attention", "--tiny", "--rounds", "2", "--seconds", "70", "-o", str(tmp_path / "attention.txt")]
    assert [command[0] for command in seen] == list(SECONDS)
