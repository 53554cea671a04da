"""The command: what it prints for people and for programs, its exit codes, its errors."""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cascade import cli
from cascade.cli import run_command
from cascade.pipeline import PIPELINE
from tests.timing import within

ROOT = Path(__file__).parent.parent
PROGRAM = """# two cascades
cascade double(X[N]) -> Y[N] { Y[n] = 2 * X[n] }
cascade gather(W[V,D], I[T], len[B]) -> E[T,D], L[B] fill -inf {
    E[t,d] = W[I[t],d]
    L[b] = max[n] exp(W[n,0]) where n < len[b]
}
"""
SOFTMAX = "cascade s(X[B,N]) -> Y[B,N] { Y[b,n] = softmax[n] 2.0 * X[b,n] }\n"
TRACED = """
import cascade as cs
print("this is the program speaking")

@cs.compile
def double(X):
    n = cs.ranks("n")
    return (2 * X[n])[n]

@cs.compile()
def triple(X):
    n = cs.ranks("n")
    return (3 * X[n])[n]

if __name__ == "__main__":
    raise SystemExit("run as a script")
"""


@pytest.fixture
def file(tmp_path: Path) -> str:
    """A file of two cascades."""
    path = tmp_path / "two.cascade"
    path.write_text(PROGRAM)
    return str(path)


@pytest.fixture
def softmax(tmp_path: Path) -> str:
    """A file of one cascade that the passes change."""
    path = tmp_path / "softmax.cascade"
    path.write_text(SOFTMAX)
    return str(path)


class Outcome:
    """A command line run in this process: exit code and what it wrote."""

    def __init__(self, capfd: pytest.CaptureFixture[str], *arguments: str) -> None:
        self.code = run_command(list(arguments))
        self.out, self.err = capfd.readouterr()

    @property
    def json(self) -> dict[str, object]:
        return json.loads(self.out)


def process(*arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    """A command line run as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "cascade.cli", *arguments], cwd=ROOT, capture_output=True, text=True, **options
    )


# --- show and diff ---------------------------------------------------------------------------------------------------


def test_show_prints_the_last_cascade(capfd: pytest.CaptureFixture[str], file: str) -> None:
    done = Outcome(capfd, "show", file)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(
        "cascade gather(W[V,D], I[T], len[B]) -> E[T,D], L[B] fill -inf {\n    E[t,d] = W[I[t],d]\n"
    )


def test_show_picks_by_name(capfd: pytest.CaptureFixture[str], file: str) -> None:
    done = Outcome(capfd, "show", f"{file}:double")
    assert done.out == "cascade double(X[N]) -> Y[N] {\n    Y[n] = 2 * X[n]\n}\n"


def test_show_unknown_name_is_an_error(capfd: pytest.CaptureFixture[str], file: str) -> None:
    done = Outcome(capfd, "show", f"{file}:doubel")
    assert done.code in (1, 2)
    assert "double" in done.err and done.out == ""


def test_show_takes_sizes_and_a_type(capfd: pytest.CaptureFixture[str], file: str) -> None:
    done = Outcome(capfd, "show", f"{file}:double", "-s", "N=8", "--dtype", "bf16")
    assert done.out.startswith("cascade double(X: bf16[8]) -> Y[8] {")


def test_show_after_a_pass(capfd: pytest.CaptureFixture[str], softmax: str) -> None:
    plain = Outcome(capfd, "show", softmax)
    after = Outcome(capfd, "show", softmax, "--after", "inline")
    assert "softmax[n]" in plain.out
    assert "softmax[n]" not in after.out


IDLE = {"group-rows"}  # passes that a softmax gives nothing to do
HEADINGS = [f"# {step.name}{': nothing to do' if step.name in IDLE else ''}" for step in PIPELINE]


def test_show_steps(capfd: pytest.CaptureFixture[str], softmax: str) -> None:
    done = Outcome(capfd, "show", softmax, "--steps")
    headings = [line for line in done.out.splitlines() if line.startswith("# ")]
    assert headings == ["# source", *HEADINGS]
    found = Outcome(capfd, "show", softmax, "--steps", "--json").json
    assert [step["pass"] for step in found["steps"]] == ["source", *(step.name for step in PIPELINE)]
    assert found["steps"][0]["text"] == Outcome(capfd, "show", softmax).out


def test_show_json(capfd: pytest.CaptureFixture[str], softmax: str) -> None:
    done = Outcome(capfd, "show", softmax, "--json", "--after", "canonicalize")
    assert done.json == {
        "cascade": "s",
        "after": "canonicalize",
        "text": Outcome(capfd, "show", softmax, "--after", "canonicalize").out,
    }


def test_show_reads_standard_input() -> None:
    done = process("show", "-:double", input=PROGRAM)
    assert done.stdout.startswith("cascade double(") and done.returncode == 0


def test_what_show_prints_is_what_it_reads(softmax: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = Outcome(capfd, "show", softmax, "--after", "canonicalize").out
    (tmp_path / "again.cascade").write_text(text)
    assert Outcome(capfd, "show", str(tmp_path / "again.cascade")).out == text


def test_diff(capfd: pytest.CaptureFixture[str], softmax: str) -> None:
    done = Outcome(capfd, "diff", softmax, "--pass", "inline")
    assert done.out.startswith("--- before inline\n+++ after inline\n@@")
    found = Outcome(capfd, "diff", softmax, "--pass", "inline", "--json").json
    assert found == {"cascade": "s", "pass": "inline", "changed": True, "diff": done.out}


def test_diff_of_nothing(capfd: pytest.CaptureFixture[str], file: str) -> None:
    done = Outcome(capfd, "diff", f"{file}:double", "--pass", "canonicalize")
    assert (done.code, done.out, done.err) == (0, "", "canonicalize: nothing to do\n")


# --- run -------------------------------------------------------------------------------------------------------------


def test_run(capfd: pytest.CaptureFixture[str], file: str) -> None:
    done = Outcome(capfd, "run", file, "-s", "V=7")
    assert (done.code, done.err) == (0, "")
    assert "I: i64, len: i64; seed 0" in done.out
    assert "V=7, D=4 (default)" in done.out
    assert done.out.count("  ok") == 2


def test_run_json(capfd: pytest.CaptureFixture[str], file: str) -> None:
    found = Outcome(capfd, "run", file, "--json", "-s", "D=2", "--dtype", "f16", "--seed", "3").json
    assert found["ok"] is True and found["seed"] == 3
    assert found["sizes"]["D"] == 2 and "D" not in found["defaulted"] and "V" in found["defaulted"]
    assert found["inputs"] == {"W": "f16", "I": "i64", "len": "i64"}
    result = found["results"]["E"]
    assert result["ok"] and result["dtype"] == "f16" and result["max_error"] <= result["allowed"]


@pytest.mark.parametrize("name", [step.name for step in PIPELINE])
def test_run_without_a_pass(capfd: pytest.CaptureFixture[str], softmax: str, name: str) -> None:
    assert Outcome(capfd, "run", softmax, "--without", name).code == 0


def test_run_outside_tolerance_exits_with_1(
    capfd: pytest.CaptureFixture[str], file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = cli.Compiled.__call__
    monkeypatch.setattr(cli.Compiled, "__call__", lambda self, *a, **k: real(self, *a, **k) + 1e-3)
    done = Outcome(capfd, "run", f"{file}:double", "--json")
    assert done.code == 1
    assert done.json["ok"] is False and done.json["results"]["Y"]["reason"] == "the largest error"


def test_run_is_the_same_twice(capfd: pytest.CaptureFixture[str], file: str) -> None:
    assert Outcome(capfd, "run", file, "--json").json == Outcome(capfd, "run", file, "--json").json


def test_run_refuses_what_cannot_fit(capfd: pytest.CaptureFixture[str], file: str) -> None:
    done = Outcome(capfd, "run", f"{file}:double", "-s", "N=1000000000000")
    assert done.code == 2
    assert "C614" in done.err and "1000000000000 elements" in done.err


# --- passes ----------------------------------------------------------------------------------------------------------


def test_passes(capfd: pytest.CaptureFixture[str]) -> None:
    done = Outcome(capfd, "passes", "--list")
    assert [line.split()[0] for line in done.out.splitlines()] == ["pass", *cli.PASSES]
    found = Outcome(capfd, "passes", "--list", "--json").json["passes"]
    assert [row["name"] for row in found] == list(cli.PASSES)
    assert all(row["summary"] for row in found)


def test_passes_of_a_program(capfd: pytest.CaptureFixture[str], softmax: str) -> None:
    done = Outcome(capfd, "passes", softmax)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("s: passes over its ranks\nn: 3 passes") and "inputs: X 3" in done.out
    assert done.out.endswith("passed once: b\n")


def test_passes_of_a_program_json(capfd: pytest.CaptureFixture[str], softmax: str) -> None:
    sizes = ["-s", "B=2", "-s", "N=8"]
    found = Outcome(capfd, "passes", softmax, "--json", *sizes, "--dtype", "f16").json
    assert list(found) == ["cascade", "ranks", "footprint", "lifted_footprint", "traffic"]
    assert found["cascade"] == "s" and found["ranks"]["n"]["plain"] == 3
    assert found["ranks"]["n"]["witness"] == ["Y_max", "Y_sum", "Y"]
    assert (found["traffic"]["unfused"], found["traffic"]["dtype"]) == (2 * (6 * 16 + 5 * 2), "f16")
    without = Outcome(capfd, "passes", softmax, "--json").json["traffic"]
    assert without["unfused"] is None and without["unfused_text"] == "20*B + 24*B*N"


def test_passes_of_a_partitioned_rank(capfd: pytest.CaptureFixture[str], file: str) -> None:
    found = Outcome(capfd, "passes", f"{file}:gather", "--partition", "all=t,d", "--json").json
    assert found["ranks"]["all"]["levels"] == ["t", "d"] and found["ranks"]["all"]["plain"] == 1
    assert "all (t, d)" in Outcome(capfd, "passes", file, "--partition", "all=t,d").out


# --- Python programs -------------------------------------------------------------------------------------------------


COST = ("cost", str(ROOT / "examples/softmax.cascade"), "-s", "M=64", "-s", "N=4096")


def test_cost(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command([*COST, "--machine", "tpu-v4-like"]) == 0
    out = capfd.readouterr().out
    assert out.startswith("tpu-v4-like: ") and "bound by " in out and "the ridge at" in out
    assert "einsum" in out and "vpu" in out


def test_cost_json(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command([*COST, "--machine", "tpu-v4-like", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    keys = (
        "machine",
        "latency_s",
        "cycles",
        "utilisation",
        "traffic_bytes",
        "energy_pj",
        "area_um2",
        "per_einsum",
        "phases",
    )
    assert set(keys) <= set(found)
    assert found["machine"] == "tpu-v4-like" and found["energy_pj"] > 0
    assert found["area_um2"] is None and "ISCA 2021" in found["energies_from"]  # what nobody has published is unknown
    assert found["traffic_bytes"] >= 2 * 2 * 64 * 4096


def test_cost_of_a_front(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "fastest.toml"
    command = [*COST, "--machine", "fusemax", "--search", "pareto"]
    assert run_command([*command, "--save-mapping", str(path)]) == 0
    shown = capfd.readouterr()
    assert "mappings that no other beats" in shown.out and "all forms tried" in shown.out and not shown.err
    assert run_command([*command, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["exhaustive"] and found["tried"] == found["forms"]
    assert found["front"][0]["mapping"] == path.read_text()
    times = [choice["latency_s"] for choice in found["front"]]
    assert times == sorted(times)
    started = [
        *COST,
        "--machine",
        "fusemax",
        "--mapping",
        str(path),
        "--after",
        "fuse",
        "--search",
        "fastest",
        "--json",
    ]
    assert run_command(started) == 0
    assert json.loads(capfd.readouterr().out)["latency_s"] == times[0]
    swept = ["sweep", *COST[1:], "--machine", "fusemax", "--search", "pareto", "--json"]
    assert run_command(swept) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [row["choice"] for row in rows] == list(range(len(times)))
    assert [row["on_chip_bytes"] for row in rows] == [choice["on_chip_bytes"] for choice in found["front"]]


def test_cost_writes_a_mapping_that_it_reads(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = str(tmp_path / "mapping.toml")
    assert run_command([*COST, "--machine", "fusemax", "--save-mapping", path, "--json"]) == 0
    first = capfd.readouterr().out
    assert run_command([*COST, "--machine", "fusemax", "--mapping", path, "--after", "fuse", "--json"]) == 0
    assert capfd.readouterr().out == first


def test_cost_takes_the_mapping_of_the_schedule(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = ROOT / "examples/fusemax_reproduction"
    path, sizes = str(tmp_path / "written.cascade"), (f"-s{size}" for size in ("B=2", "H=2", "M1=8", "M0=256"))
    options = [*sizes, "-sP=2048", "-sE=64", "-sF=64", "--machine", "fusemax", "--json"]
    program = f"{folder / 'cascades.cascade'}:one_pass"
    command = ["cost", program, *options, "--mapping", str(folder / "fusemax.toml"), "--save-mapping", path]
    assert run_command(command) == 0
    first = capfd.readouterr().out
    assert "region attention over b = 1, h = 1, rows: p = fit {" in Path(path).read_text()
    assert run_command(["cost", path, *options]) == 0
    assert capfd.readouterr().out == first
    assert run_command(["sweep", path, *options]) == 0
    assert json.loads(capfd.readouterr().out)["rows"][0]["cycles"] == json.loads(first)["cycles"]
    assert run_command(["cost", path, *options, "--search", "fastest"]) == 0
    assert json.loads(capfd.readouterr().out)["latency_s"] <= json.loads(first)["latency_s"]


def test_cost_in_closed_form(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mapping = tmp_path / "mapping.toml"
    names = ["Y_max", "Y_sum", "Y"]
    mapping.write_text("".join(f'[[regions]]\n[[regions.stages]]\neinsums = ["{name}"]\n' for name in names))
    command = [*COST[:2], "--machine", "fusemax", "--mapping", str(mapping), "--symbolic"]
    assert run_command(command) == 0
    assert "Y_max   2d    M*N/65536" in capfd.readouterr().out
    assert run_command([*command, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["regions"][0]["traffic_bytes"] == "2*M*N + 2*M"
    assert run_command([*COST, "--machine", "fusemax", "--symbolic"]) == 2


def test_cost_on_a_gpu_is_what_the_planner_says(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command([*COST, "--machine", "h200", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["machine"] == "h200" and found["latency_s"] > 0 and found["outside"] == []
    assert run_command([*COST, "--machine", "h200", "--as-published"]) == 2
    assert "the planner of kernels maps the cascade" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--machine", "fusemaxx"], 2, "did you mean 'fusemax'"),
        (["--machine", "missing.toml"], 2, "cannot read missing.toml"),
        (["--machine", "fusemax", "--mapping", "missing.toml"], 2, "cannot read missing.toml"),
        (["--machine", "eyeriss-like", "-s", "M=100000000000"], 0, ""),
    ],
)
def test_cost_of_what_is_wrong(capfd: pytest.CaptureFixture[str], more: list[str], code: int, says: str) -> None:
    assert run_command([*COST, *more]) == code
    assert says in capfd.readouterr().err


def test_cost_names_what_does_not_fit(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    machine = tmp_path / "small.toml"
    machine.write_text('extends = "fusemax"\n[buffer]\nbytes = 3\n')
    assert run_command([*COST, "--machine", str(machine)]) == 1
    assert "error[C540]: no mapping fits" in capfd.readouterr().err


SWEEP = ("sweep", str(ROOT / "examples/softmax.cascade"), "--machine", "fusemax", "-s", "M=64,128")


def test_sweep_prints_a_row_for_every_combination(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command([*SWEEP, "--machine", "tpu-v4-like", "-s", "N=512,1024"]) == 0
    header, *rows = capfd.readouterr().out.splitlines()
    assert header.startswith("machine,mapping,M,N,latency_s,cycles,utilisation_2d,utilisation_1d")
    assert [row.split(",")[:4:2] for row in rows[:2]] == [["fusemax", "64"], ["fusemax", "64"]]
    assert len(rows) == 8 and rows[4].startswith("tpu-v4-like,,64,512")


def test_sweep_in_processes_gives_the_same_rows(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    mapping, path = tmp_path / "mapping.toml", tmp_path / "rows.csv"
    names = ["Y_max", "Y_sum", "Y"]
    mapping.write_text("".join(f'[[regions]]\n[[regions.stages]]\neinsums = ["{name}"]\n' for name in names))
    sizes = "N=" + ",".join(str(size) for size in range(1, 101))
    command = [*SWEEP, "--mapping", str(mapping), "-s", sizes]
    assert run_command([*command, "--jobs", "2", "-o", str(path)]) == 0
    assert capfd.readouterr().out == ""
    assert run_command(command) == 0
    assert capfd.readouterr().out == path.read_text() and len(path.read_text().splitlines()) == 201


def test_sweep_tells_where_nothing_fits(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    machine = tmp_path / "small.toml"
    machine.write_text('extends = "fusemax"\n[buffer]\nbytes = 3\n')
    assert run_command([*SWEEP, "--machine", str(machine), "-s", "N=16", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert [("error" in row, row["machine"]) for row in rows] == [(False, "fusemax")] * 2 + [(True, str(machine))] * 2
    assert rows[2]["error"].startswith("no mapping fits")


def test_sweep_draws_figures(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.html"
    more = ["--machine", "tpu-v4-like", "-s", "N=512,1024,4096", "--plot", str(path)]
    assert run_command([*SWEEP, *more]) == 0
    assert capfd.readouterr().out == ""
    text = path.read_text()
    assert text.count("<svg") == text.count("<h2") == 9  # four units, time, speed-up, energy, roofline, front
    assert "M = 64" in text and "roof of fusemax" in text and "nan" not in text
    assert "Speed-up over the first by N" in text and "fusemax: 512, 1x" in text
    for drawing in re.findall("<svg.*?</svg>", text):
        ElementTree.fromstring(drawing)


def test_sweep_names_a_package_that_is_missing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for package, more in (
        ("pyarrow", ["-o", str(tmp_path / "rows.parquet")]),
        ("distributed", ["--scheduler", "here"]),
        ("matplotlib", ["--plot", str(tmp_path / "rows.png")]),
    ):
        monkeypatch.setitem(sys.modules, package, None)
        monkeypatch.setitem(sys.modules, f"{package}.figure", None)
        assert run_command([*SWEEP, "-s", "N=16", *more]) == 2
        said = capfd.readouterr().err
        assert f"needs {package}, which is not installed" in said and f"pip install {package}" in said


def test_sweep_draws_the_figures_that_are_asked_for(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.html"
    command = [*SWEEP, "-s", "N=512,1024", "--search", "pareto", "--figure", "pareto", "--figure", "energy"]
    assert run_command([*command, "--plot", str(path), "-o", str(tmp_path / "rows.csv")]) == 0
    text = path.read_text()
    assert text.count("<svg") == 2 and "Energy by M of fusemax" in text and "registers: 128" in text
    assert text.count("<circle") > 10  # every mapping of the front, and one bar for the fastest
    assert text.count("<rect") == 2 * 4


@pytest.mark.parametrize(("form", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")])
def test_sweep_draws_pictures(capfd: pytest.CaptureFixture[str], tmp_path: Path, form: str, begins: bytes) -> None:
    path = tmp_path / f"rows.{form}"
    assert run_command([*SWEEP, "--machine", "flat", "-s", "N=512,1024", "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(begins)


def test_sweep_writes_parquet(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    assert run_command([*SWEEP, "-s", "N=512,1024", "-o", str(path), "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert importlib.import_module("pyarrow.parquet").read_table(path).to_pylist() == rows


def test_sweep_runs_on_a_cluster(capfd: pytest.CaptureFixture[str]) -> None:
    distributed = importlib.import_module("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
    ) as cluster:
        command = [*SWEEP, "-s", "N=" + ",".join(map(str, range(8, 108)))]
        assert run_command([*command, "--scheduler", cluster.scheduler_address]) == 0
        there = capfd.readouterr().out
    assert run_command(command) == 0
    assert capfd.readouterr().out == there


def test_python_file(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text(TRACED)
    last = Outcome(capfd, "show", str(path))
    assert last.code == 0 and "3 * X[n]" in last.out
    assert last.err == "this is the program speaking\n"
    assert "2 * X[n]" in Outcome(capfd, "show", f"{path}:double").out
    assert Outcome(capfd, "run", f"{path}:double", "--json").json["ok"] is True
    unknown = Outcome(capfd, "show", f"{path}:quadruple")
    assert unknown.code == 2 and "double, triple" in unknown.err


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "x = 1\ny = x / 0\n",
            ":2:5: error[C611]: the program raised ZeroDivisionError: division by zero\n    y = x / 0",
        ),
        ("x = (1\n", ":1:5: error[C611]: the program raised SyntaxError"),
        ("raise SystemExit(3)\n", ":1:1: error[C611]: the program raised SystemExit: 3"),
    ],
)
def test_python_file_that_fails(capfd: pytest.CaptureFixture[str], tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "model.py"
    path.write_text(text)
    done = Outcome(capfd, "show", str(path))
    assert done.code == 1 and done.out == ""
    assert f"{path}{says}" in done.err


def test_python_file_without_cascades(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "model.py"
    path.write_text("x = 1\n")
    done = Outcome(capfd, "show", str(path))
    assert done.code == 2 and "decorate a function with @cascade.compile" in done.err


def test_program_text_is_never_run(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "evil.cascade"
    path.write_text(f"__import__('pathlib').Path({str(tmp_path / 'done')!r}).touch()\n")
    assert Outcome(capfd, "show", str(path)).code == 1
    assert not (tmp_path / "done").exists()


# --- errors ----------------------------------------------------------------------------------------------------------


def test_wrong_program_exits_with_1(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "wrong.cascade"
    path.write_text("cascade c(A[M]) -> Z[M] {\n    Z[m] = A[m] * B[m]\n}\n")
    done = Outcome(capfd, "show", str(path))
    assert done.code == 1 and done.out == ""
    assert done.err.startswith(f"{path}:2:19: error[C2")
    found = Outcome(capfd, "show", str(path), "--json")
    first = found.json["errors"][0]
    assert (found.code, found.err) == (1, "")
    assert (first["file"], first["line"], first["column"]) == (str(path), 2, 19)
    assert set(first) == {"code", "message", "file", "line", "column", "end_line", "end_column", "help", "notes"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["show", "FILE", "--jsn"], "--json"),
        (["shwo", "FILE"], "show"),
        (["show"], "FILE"),
        (["show", "FILE", "-s", "N"], "'N' is not NAME=NUMBER, such as B=4"),
        (["show", "FILE", "-s", "N=-1"], "-1 is not from 0 to"),
        (["show", "FILE", "-s", "N=1000000000000000000000000000000"], "is not"),
        (["run", "FILE:double", "-s", "M=4"], "C613"),
        (["run", "FILE", "--dtype", "f33"], "f32"),
        (["diff", "FILE", "--pass", "canonicalise"], "did you mean 'canonicalize'"),
        (["show", "FILE", "--after", "inlin"], "did you mean 'inline'"),
        (["run", "FILE", "--without", "inlin"], "did you mean 'inline'"),
        (["passes"], "give either FILE, whose passes are counted, or --list"),
        (["passes", "FILE", "--list"], "give either FILE, whose passes are counted, or --list"),
        (["passes", "FILE", "--partition", "n"], "'n' is not NAME=RANK,RANK, such as n=n1,n0"),
        (["passes", "FILE", "--partition", "n=t"], "does not name two or more different levels"),
        (["passes", "FILE", "--partition", "n=t,dd"], "has no rank variable 'dd': did you mean 'd'?"),
        (["passes", "FILE:double", "-s", "M=4"], "C613"),
        (["show", "/nowhere/there.cascade"], "cannot read /nowhere/there.cascade: No such file or directory"),
        (["show", "/"], "cannot read /: Is a directory"),
        (["show", "/nowhere/there.py"], "cannot read /nowhere/there.py: No such file or directory"),
    ],
)
def test_wrong_command_line_exits_with_2(
    capfd: pytest.CaptureFixture[str], file: str, arguments: list[str], says: str
) -> None:
    arguments = [argument.replace("FILE", file) for argument in arguments]
    done = Outcome(capfd, *arguments)
    assert (done.code, done.out) == (2, "")
    assert says in done.err and "error[C6" in done.err and "Traceback" not in done.err
    found = Outcome(capfd, *arguments, "--json")
    if "--jsn" not in arguments:
        assert found.code == 2 and found.json["errors"][0]["code"].startswith("C6") and found.err == ""


def test_bad_environment_exits_with_2(file: str) -> None:
    done = process("show", file, "--after", "inline", env={**os.environ, "CASCADE_CHECK": "9"})
    assert done.returncode == 2
    assert "error[C601]: environment variable CASCADE_CHECK is '9'" in done.stderr and "Traceback" not in done.stderr


def test_no_arguments_shows_the_help(capfd: pytest.CaptureFixture[str]) -> None:
    done = Outcome(capfd)
    assert done.code == 2 and "Usage: cascadec" in done.err


@pytest.mark.parametrize("what", ["in the command", "in a pass"])
def test_bug_exits_with_70_and_leaves_a_reproducer(
    capfd: pytest.CaptureFixture[str], file: str, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def crash(*_: object) -> str:
        raise KeyError("oops")

    if what == "in a pass":
        monkeypatch.setattr(type(PIPELINE[0]), "__call__", crash)
    else:
        monkeypatch.setattr(cli, "render", crash)
    done = Outcome(capfd, "show", f"{file}:double", "--after", "inline")
    assert (done.code, done.out) == (70, "")
    assert done.err.startswith("internal error: ") and "KeyError" in done.err
    command = done.err.rpartition("reproduce: ")[2]
    path = Path(next(word for word in command.split() if ".cascade" in word).partition(":")[0])
    assert "cascade double(X[N]) -> Y[N]" in path.read_text()
    monkeypatch.undo()
    assert Outcome(capfd, "show", f"{path}:double").code == 0


def test_help_has_two_examples(capfd: pytest.CaptureFixture[str]) -> None:
    done = Outcome(capfd, "--help")
    assert done.code == 0
    examples = [line.strip() for line in done.out.partition("Examples:\n")[2].splitlines()]
    assert len([line for line in examples if line.startswith("cascadec ")]) == 2


# --- streams ---------------------------------------------------------------------------------------------------------


def test_closed_reader_is_quiet(file: str) -> None:
    line = f"{sys.executable} -m cascade.cli show {file} --steps | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("0\n", "")


def test_closed_standard_output_is_quiet(file: str) -> None:
    line = f"{sys.executable} -m cascade.cli show {file} >&-"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode in (0, 2) and "Traceback" not in done.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
def test_full_disk_gives_the_reason(file: str) -> None:
    line = f"{sys.executable} -m cascade.cli show {file} > /dev/full"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == f"error[C612]: cannot write standard output: {os.strerror(errno.ENOSPC)}\n"


def test_interrupt_exits_with_130_within_a_second(tmp_path: Path) -> None:
    path = tmp_path / "slow.cascade"
    path.write_text("cascade slow(A[N,N], B[N,N]) -> Z[N,N] { Z[m,n] = sum[k] exp(A[m,k] * B[k,n]) }\n")
    command = [sys.executable, "-m", "cascade.cli", "run", str(path), "-s", "N=3000"]
    running = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(5)
    assert running.poll() is None, running.communicate()
    started = time.monotonic()
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=10)
    assert running.returncode == 130 and (out, err) == ("", "")
    assert within(time.monotonic() - started, 1)


def test_terminal_gets_colour_and_a_pipe_does_not(file: str) -> None:
    forced = process("show", file, env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm-256color"})
    assert "\x1b[" in forced.stdout
    assert "\x1b[" not in process("show", file).stdout


def test_version() -> None:
    assert process("--version").stdout == f"cascadec, version {cli.package.__version__}\n"
