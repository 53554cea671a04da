"""What the commands show of a cascade and of the installation: trees, explanations, differences, completion, doctor,
cache. Every figure is compared with that of another command, or with one that is counted here."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.shell_completion import ShellComplete

from cascade.backends.triton import tune
from cascade import comparison, doctor, entries, parameters, pipeline, settings, terminal, upkeep
from cascade.cli import commands, run_command
from cascade.frontend.build import parse_cascade
from cascade.passes import memo
from tests.timing import within

ROOT = Path(__file__).parent.parent
ATTENTION = str(ROOT / "examples/attention.cascade")
SOFTMAX = str(ROOT / "examples/softmax.cascade")
MOE = str(ROOT / "examples/moe.cascade")
SIZES = ("-s", "B=1", "-s", "H=4", "-s", "M=512", "-s", "N=512", "-s", "E=64", "-s", "F=64")
COLOUR = re.compile(r"\x1b\[[0-9;]*(3[0-7]|9[0-7])[0-9;]*m")
LAYER = """cascade layer(X[T,D], Wu[F,D], Wd[D,F]) -> Y[T,D] {
    J[t,f] = relu(sum[d] X[t,d] * Wu[f,d])
    Y[t,d] = X[t,d] + sum[f] J[t,f] * Wd[d,f]
} schedule {
    mesh tp = 8
    shard f over tp
}
"""


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of this test alone."""
    folder = tmp_path / "its cache"
    monkeypatch.setenv("CASCADE_CACHE_DIR", str(folder))
    settings.settings.cache_clear()
    yield folder
    monkeypatch.undo()
    settings.settings.cache_clear()


@pytest.fixture
def shell(capfd: pytest.CaptureFixture[str]) -> Any:
    """Runs a command line in this process: its exit code, what it printed, what it complained of."""

    def run(*words: str) -> tuple[int, str, str]:
        code = run_command(list(words))
        out, err = capfd.readouterr()
        return code, out, err

    return run


@pytest.fixture
def told(shell: Any) -> Any:
    """The JSON that a command prints."""

    def run(*words: str) -> Any:
        code, out, err = shell(*words, "--json")
        assert code in (0, 1), err
        return json.loads(out)

    return run


def process(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    """A command line as a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CASCADE_CHECK": "0", **more}
    command = [sys.executable, "-m", "cascade", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# --- the terminal ----------------------------------------------------------------------------------------------------

RICH = [("show", "--rich", MOE), ("explain", ATTENTION), ("diff", ATTENTION, SOFTMAX), ("doctor", "--quick")]


def drawn(shell: Any, monkeypatch: pytest.MonkeyPatch, *words: str, **environment: str) -> str:
    """What a command prints in an environment that says these things about its terminal, and nothing else."""
    for name in ("COLUMNS", "NO_COLOR", "FORCE_COLOR", "TERM", "LINES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code, out, err = shell(*words)
    assert (code, err) == (0, "")
    return str(out)


@pytest.mark.parametrize("words", RICH, ids=lambda words: words[0])
def test_a_pipe_gets_plain_text_that_fits(
    shell: Any, own_cache: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    """The cache is of this test alone: that of all tests grows between two looks."""
    narrow, wide = (drawn(shell, monkeypatch, *words, COLUMNS=columns) for columns in ("80", "200"))
    assert narrow.isascii() and "\x1b" not in narrow
    prose = [line for line in narrow.splitlines() if line[:1] not in ("+", "-", " ") or words[0] != "diff"]
    assert all(len(line) <= 80 for line in prose if len(line.split()) > 1 and "/" not in line)
    assert "".join(narrow.split()) == "".join(wide.split())  # what is said does not depend on the width
    assert drawn(shell, monkeypatch, *words) == narrow


@pytest.mark.parametrize("words", RICH[:3], ids=lambda words: words[0])
def test_a_terminal_gets_colours_unless_it_wants_none(
    shell: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    forced = {"FORCE_COLOR": "1", "TERM": "xterm-256color", "COLUMNS": "80"}
    coloured = drawn(shell, monkeypatch, *words, **forced)
    assert COLOUR.search(coloured) and not COLOUR.search(drawn(shell, monkeypatch, *words, **forced, NO_COLOR="1"))
    if words[0] != "diff":
        lines = re.sub(r"\x1b\[[0-9;]*m", "", coloured).splitlines()
        assert any("├── " in line for line in lines) and all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("width", [40, 60, 200])
def test_tree_lines_keep_to_the_width_and_lose_nothing(width: int) -> None:
    words = " ".join(f"word{number}" for number in range(40))
    root = terminal.Branch("top", (terminal.Branch(words, (terminal.Branch(words),)), terminal.Branch("last")))
    lines = list(terminal.tree_lines(root, width))
    assert all(len(line) <= max(width, 4 + terminal.NARROWEST) for line in lines)
    assert " ".join(lines).split() == ["top", *words.split(), *words.split(), "last"]
    assert lines[0] == "top" and lines[1].startswith("  word0") and lines[-1] == "  last"


def test_sparkline_is_monotone() -> None:
    drawn = terminal.sparkline([number / 100 for number in range(101)])
    heights = [terminal.ASCII.index(letter) for letter in drawn]
    assert heights == sorted(heights) and {heights[0], heights[-1]} == {0, len(terminal.ASCII) - 1}
    assert terminal.sparkline((-1.0, 2.0)) == terminal.ASCII[0] + terminal.ASCII[-1]


def test_timeline_has_every_stretch_where_it_is() -> None:
    (line, other) = terminal.timeline([("a", [(0.0, 5.0)]), ("bb", [(5.0, 7.5), (7.5, 10.0)])], 10.0)
    first, second = (text.partition("|")[2].rstrip("|") for text in (line, other))
    assert len(line) == len(other) == terminal.columns()
    assert abs(first.count("#") - len(first) / 2) <= 1 and first.rstrip("#").strip() != first
    assert abs(second.count("#") - second.count("=")) <= 1 and second.index("#") >= len(second) // 2 - 1


# --- show and explain ------------------------------------------------------------------------------------------------


def leaves(listed: list[dict[str, Any]]) -> list[str]:
    """The statements of a tree, in order."""
    return [name for one in listed for name in (leaves(one["below"]) if "group" in one else [one["statement"]])]


@pytest.mark.parametrize("name", ["attention", "block", "moe", "minilm", "ring_attention", "softmax"])
def test_the_tree_has_every_statement_once(told: Any, name: str) -> None:
    path = ROOT / "examples" / f"{name}.cascade"
    found = told("show", "--rich", str(path))
    final = pipeline.run_pipeline(parse_cascade(path.read_text(), str(path))).final
    text = str(told("show", str(path), "--after", "fuse")["text"])
    assert sorted(leaves(found["together"])) == sorted(
        line.strip() for line in text.partition("{")[2].partition("} schedule")[0].splitlines() if " = " in line
    )
    assert found["steps"][-1]["statements"] == len(final.body)


def test_the_tree_says_what_passes_says(told: Any) -> None:
    shown, counted = told("show", "--rich", MOE)["ranks"], told("passes", MOE)["ranks"]
    assert {name: (one["plain"], one["lifted"], one["witness"]) for name, one in shown.items()} == {
        name: (one["plain"], one["lifted"], one["witness"]) for name, one in counted.items()
    }


def test_rich_tells_of_the_whole_pipeline(shell: Any) -> None:
    code, _, err = shell("show", "--rich", SOFTMAX, "--after", "lift")
    assert code == 2 and "C604" in err


def test_explain_agrees_with_cost(told: Any) -> None:
    found, cost = (
        told("explain", ATTENTION, "--machine", "h200", *SIZES),
        told("cost", ATTENTION, "--machine", "h200", *SIZES),
    )
    assert found["predicted_us"] == pytest.approx(cost["latency_s"] * 1e6)
    assert found["read_bytes"] + found["write_bytes"] == cost["traffic_bytes"]
    (kernel,) = found["kernels"]
    assert kernel["bound"] == next(iter(cost["per_einsum"].values()))["unit"]
    assert kernel["of_bound"] == pytest.approx(kernel["units"][kernel["bound"]])
    assert kernel["flops"] >= 2 * 2 * 4 * 512 * 512 * 64 / 2  # two products, half of it behind the diagonal
    assert kernel["defines"][-1] == "O" and len(kernel["statements"]) == len(kernel["defines"])
    assert found["defaulted"] == [] and found["outside"] == []


def test_explain_tells_sizes_that_were_not_given(told: Any, shell: Any) -> None:
    found = told("explain", ATTENTION, "--machine", "a100", "-s", "M=256")
    assert found["sizes"]["M"] == 256 and "M" not in found["defaulted"] and "N" in found["defaulted"]
    assert found["passes"]["traffic"]["unfused"] is not None and found["passes"]["traffic"]["dtype"] == "bf16"
    text = shell("explain", ATTENTION, "--machine", "a100", "-s", "M=256")[1]
    assert "M=256," in text and f"N={found['sizes']['N']}*" in text
    assert f"{found['predicted_us']:.1f} us" in text


def test_explain_has_every_rejected_edge(told: Any, shell: Any) -> None:
    found, counted = told("explain", MOE), told("passes", MOE)["ranks"]
    edges = {(rank, *item["edge"]) for rank, one in counted.items() for item in one["blocked"]}
    assert {(item["rank"], item["producer"], item["reduction"]) for item in found["rejected"]} == edges != set()
    text = " ".join(shell("explain", MOE)[1].split())
    assert all(f"{rank}: {producer} -> {reduction}" in text for rank, producer, reduction in edges)
    assert all(item["reason"] in text and item["code"] in text for item in found["rejected"])


def test_explain_of_a_plan_and_of_a_cost(told: Any, shell: Any, tmp_path: Path) -> None:
    layer = tmp_path / "layer.cascade"
    layer.write_text(LAYER)
    sizes = ("-s", "T=1024", "-s", "D=1024", "-s", "F=4096")
    assert told("explain", str(layer), "--machine", "h100x8", *sizes)["plan"] == told(
        "plan", str(layer), "--machine", "h100x8", *sizes
    )
    text = shell("explain", str(layer), "--machine", "h100x8", *sizes)[1]
    assert "no schedule takes less than" in text and re.search(r"^sms +\|[#= ]+\|$", text, re.M)
    rows = ("-s", "M=64", "-s", "N=512")
    cost = told("cost", SOFTMAX, "--machine", "fusemax", *rows)
    assert told("explain", SOFTMAX, "--machine", "fusemax", *rows)["cost"]["cycles"] == cost["cycles"]


def test_what_a_kernel_cannot_hold_is_named(told: Any) -> None:
    found = told("explain", str(ROOT / "examples/mixture_of_experts.cascade"), "--machine", "h100")
    assert found["outside"] and all(one["names"] and one["reason"] for one in found["outside"])


def test_explain_compiles_where_it_is_asked_to(told: Any) -> None:
    (kernel,) = told("explain", SOFTMAX, "--machine", "h100", "-s", "M=64", "-s", "N=256", "--static")["kernels"]
    assert kernel["static"]["registers"] > 0 and kernel["static"]["spills"] == 0 and kernel["failure"] is None


def test_explain_writes_into_a_cache_where_it_is_told_to(told: Any) -> None:
    sizes = {"B": 8, "N": 8192, "D": 1024, "E": 128, "H": 8, "G": 2, "F": 2048}
    words = [str(ROOT / "examples/decoder_step.cascade"), "--machine", "h200"]
    words += [word for name, size in sizes.items() for word in ("-s", f"{name}={size}")]
    cache = 2 * 8 * 2 * 8192 * 128  # bytes
    apart, within = (
        told("explain", *words, *more)["kernels"] for more in ((), ("--in-place", "K_new=K", "--in-place", "V_new=V"))
    )
    written = [sum(kernel["write_bytes"] for kernel in kernels) for kernels in (apart, within)]
    assert written[0] > 2 * cache > 20 * written[1]
    assert all(kernel["of_bound"] <= 1 for kernel in (*apart, *within))


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (("explain", SOFTMAX, "--machine", "h20"), "C605", "did you mean 'h200'?"),
        (("explain", SOFTMAX, "--machine", "fusemx"), "C605", "did you mean 'fusemax'?"),
        (("explain", SOFTMAX, "--machine", "fusemax"), "C323", "give -s M=... -s N=..."),
        (("explain", SOFTMAX, "--machine", "h100", "-s", "N=0"), "C323", "nothing is launched"),
        (("explain", SOFTMAX, "--static"), "C604", "--machine: h200"),
        (("explain", SOFTMAX, "--in-place", "Y=X"), "C604", "--machine: h200"),
        (("explain", SOFTMAX, "--in-place", "Y"), "C604", "RESULT=PARAM, such as K_new=K"),
        (("explain", SOFTMAX, "--machine", "h200", "--in-place", "Y=Z"), "C343", "has no parameter 'Z'"),
        (("explain", SOFTMAX, "--static", "--machine", "fusemax"), "C604", "--machine: h200"),
        (("explain", SOFTMAX, "-s", "Z=1"), "C613", "its shape symbols are M, N"),
        (("diff", SOFTMAX), "C604", "give either OTHER"),
        (("diff", SOFTMAX, MOE, "--pass", "lift"), "C604", "give either OTHER"),
        (("diff", SOFTMAX, MOE, "-s", "Z=1"), "C613", "no shape symbol 'Z'"),
        (("diff", SOFTMAX, "/nowhere.cascade"), "C610", "No such file"),
        (("diff", "/nowhere.json", "/nowhere.json"), "C610", "No such file"),
        (("diff", SOFTMAX, "/nowhere.json"), "C616", "is a kernel and"),
        (("cache", "clear", "--older-than", "soon"), "C604", "such as 30m, 12h or 7d"),
        (("cache", "list", "--kind", "lift"), "C604", "lifts"),
        (("cache", "verfy"), "C604", "verify"),
        (("completion", "tcsh"), "C604", "bash"),
    ],
)
def test_mistakes_are_told(shell: Any, words: tuple[str, ...], code: str, says: str) -> None:
    exit_code, out, err = shell(*words)
    assert exit_code == 2 and out == "" and f"error[{code}]" in err and says in err and "Traceback" not in err
    exit_code, out, _ = shell(*words, "--json")
    assert exit_code == 2 and json.loads(out)["errors"][0]["code"] == code


# --- diff ------------------------------------------------------------------------------------------------------------


def written(tmp_path: Path, name: str, before: str, after: str) -> str:
    """Attention with one word replaced, as a file."""
    text = Path(ATTENTION).read_text()
    assert text.count(before) == 1
    (tmp_path / name).write_text(text.replace(before, after))
    return str(tmp_path / name)


def test_diff_of_equals_is_nothing(told: Any, shell: Any) -> None:
    found = told("diff", ATTENTION, ATTENTION, "--machine", "h200", *SIZES)
    assert found["same"] and found["diff"] == "" and found["ranks"] == {}
    assert all(one["ratio"] == 1.0 for one in (*found["amounts"].values(), *found["whole"].values()))
    assert (
        shell("diff", ATTENTION, ATTENTION)[1]
        == f"{ATTENTION} -> {ATTENTION}: the same\nbytes and operations are the same\n"
    )


def test_diff_of_cascades(told: Any, shell: Any, tmp_path: Path) -> None:
    window = written(tmp_path, "window.cascade", "where n <= m", "where n <= m and m < n + 128")
    machine = ("--machine", "h200", *SIZES)
    found = told("diff", ATTENTION, window, *machine)
    sides = [told("explain", path, *machine) for path in (ATTENTION, window)]
    assert [one["name"] for one in found["statements"]["changed"]] == ["S"] and not found["same"]
    for key in ("predicted_us", "read_bytes", "flops"):
        assert [found["whole"][key][side] for side in ("before", "after")] == [side[key] for side in sides]
    for key in ("unfused", "fused", "flops", "transcendental"):
        amounts = [side["passes"]["traffic"][key] for side in sides]
        assert found["amounts"][key] == {"before": amounts[0], "after": amounts[1], "ratio": amounts[1] / amounts[0]}
    live = [sum(n <= m and m < n + limit for m in range(512) for n in range(512)) for limit in (10**6, 128)]
    exps = found["amounts"]["transcendental"]
    assert (exps["before"], exps["after"]) == (4 * live[0], 4 * live[1])
    (kernel,) = found["kernels"]
    assert kernel["predicted_us"]["ratio"] < 1.0
    text = shell("diff", ATTENTION, window, *machine)[1]
    assert "+    S[b,h,m,n] = " in text and f"{found['whole']['predicted_us']['ratio']:.3g}x" in text


def test_diff_of_schedules(told: Any, shell: Any, tmp_path: Path) -> None:
    text = Path(ATTENTION).read_text().rstrip()
    other = tmp_path / "other.cascade"
    other.write_text(f"{text} schedule {{\n    fuse {{S, R}} over n\n}}\n")
    found = told("diff", ATTENTION, str(other), *SIZES)
    assert found["statements"] == {"added": [], "removed": [], "changed": []} and not found["same"]
    assert "fuse {S, R} over n" in found["schedule"]["added"]
    counted = [told("passes", path)["ranks"]["n"]["lifted"] for path in (ATTENTION, str(other))]
    assert [found["ranks"]["n"]["lifted"][side] for side in ("before", "after")] == counted and counted[0] != counted[1]
    assert "R -> D over n" in " ".join(found["rejected"]["added"])
    back = told("diff", str(other), ATTENTION, *SIZES)
    assert back["schedule"] == {"added": found["schedule"]["removed"], "removed": found["schedule"]["added"]}
    assert "+ fuse {S, R} over n" in shell("diff", ATTENTION, str(other), *SIZES)[1]


def test_diff_of_two_plans_and_of_two_costs(told: Any, shell: Any, tmp_path: Path) -> None:
    one, other = tmp_path / "one.cascade", tmp_path / "other.cascade"
    one.write_text(LAYER)
    other.write_text(LAYER.replace("shard f over tp", "shard t over tp"))
    machine = ("--machine", "h100x8", "-s", "T=1024", "-s", "D=1024", "-s", "F=4096")
    found = told("diff", str(one), str(other), *machine)
    plans = [told("plan", str(path), *machine)["makespan_us"] for path in (one, other)]
    assert [found["whole"]["makespan_us"][side] for side in ("before", "after")] == plans
    assert "makespan us" in shell("diff", str(one), str(other), *machine)[1]
    exps = tmp_path / "exps.cascade"
    exps.write_text("cascade rows(X[M,N]) -> Y[M,N] { Y[m,n] = exp(X[m,n]) }\n")
    costs = ("--machine", "fusemax", "-s", "M=64", "-s", "N=512")
    found = told("diff", SOFTMAX, str(exps), *costs)
    cycles = [told("cost", path, *costs)["cycles"] for path in (SOFTMAX, str(exps))]
    assert [found["whole"]["cycles"][side] for side in ("before", "after")] == cycles


def test_kernels_are_paired_by_what_they_define() -> None:
    def kernel(name: str, *defines: str) -> dict[str, Any]:
        return {"kernel": name, "defines": list(defines)}

    before = [kernel("a", "N", "Q"), kernel("b", "S", "P"), kernel("c", "Z")]
    after = [kernel("x", "N"), kernel("y", "Q", "S", "P"), kernel("z", "W")]
    names = [tuple(side and side["kernel"] for side in pair) for pair in comparison.pairs(before, after)]
    assert names == [("a", "x"), ("b", "y"), ("c", None), (None, "z")]


@pytest.fixture(scope="module")
def emitted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two versions of the kernel of a softmax, each a folder with its files and `kernel.json`."""
    folders = []
    for number, sizes in enumerate((("-s", "M=64", "-s", "N=256"), ("-s", "M=64", "-s", "N=8192"))):
        folder = tmp_path_factory.mktemp(f"kernel{number}")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            assert run_command(["emit", SOFTMAX, "--backend", "triton", "-o", str(folder), *sizes, "--json"]) == 0
        (folder / "kernel.json").write_text(printed.getvalue())
        folders.append(folder)
    return folders[0], folders[1]


def test_diff_of_emitted_files(told: Any, shell: Any, emitted: tuple[Path, Path]) -> None:
    one, other = (str(folder / "rows.py") for folder in emitted)
    found = told("diff", one, other, "--machine", "h100", "-s", "M=64", "-s", "N=256")
    assert not found["same"] and found["what"] == "kernels"
    numbers = [
        dict(re.findall(r"\b(\w+)=(\d+)", Path(path).read_text().rpartition("rows[(")[2])) for path in (one, other)
    ]
    expected = {f"rows.{key}": numbers[0][key] for key in numbers[0] if numbers[0][key] != numbers[1].get(key)}
    assert expected and {key: found["launched"][key]["before"] for key in expected} == expected
    assert found["cascade"]["same"] and found["cascade"]["whole"]["predicted_us"]["ratio"] == 1.0
    counts = [len(re.findall(r"\btl\.load\(", Path(path).read_text())) for path in (one, other)]
    assert found["instructions"].get("tl.load", {"before": counts[0]})["before"] == counts[0]
    same = told("diff", one, one)
    assert same["same"] and same["functions"]["diff"] == {}
    text = shell("diff", one, other)[1]
    assert all(f"{key}: {value} -> " in text for key, value in expected.items())


def test_diff_of_what_emit_printed(told: Any, shell: Any, emitted: tuple[Path, Path]) -> None:
    one, other = (str(folder / "kernel.json") for folder in emitted)
    found = told("diff", one, other)
    sides = [json.loads(Path(path).read_text())["kernels"][0] for path in (one, other)]
    assert found["sizes"]["N"] == {"before": 256, "after": 8192, "ratio": 32.0}
    changed = found["kernels"]["rows"]
    for table in ("static", "model", "tile"):
        for key, value in sides[0][table].items():
            if value != sides[1][table].get(key):
                assert changed[f"{table}.{key}"]["before"] == value
    assert changed["model.predicted_us"]["ratio"] > 1.0 and changed["model.read_bytes"]["ratio"] == 32.0
    assert told("diff", one, one)["same"] and "model.read_bytes" in shell("diff", one, other)[1]


def test_an_emitted_file_is_read_and_never_run(shell: Any, tmp_path: Path, emitted: tuple[Path, Path]) -> None:
    mark = tmp_path / "done"
    evil = tmp_path / "evil.py"
    evil.write_text(f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n{(emitted[0] / 'rows.py').read_text()}")
    assert shell("diff", str(evil), str(emitted[0] / "rows.py"))[0] == 0 and not mark.exists()


def test_a_program_of_a_user_is_no_emitted_file(tmp_path: Path, emitted: tuple[Path, Path]) -> None:
    (tmp_path / "model.py").write_text("import triton\nimport cascade as cs\ndef run(): ...\n")
    (tmp_path / "broken.py").write_text("import triton\ndef run(:\n")
    assert comparison.is_kernel_file(str(emitted[0] / "rows.py"))
    for name in ("model.py", "broken.py", "absent.py", "text.cascade"):
        assert not comparison.is_kernel_file(str(tmp_path / name))


@pytest.mark.parametrize("text", ["{", "[]", '{"kernels": 1}', '{"kernels": [1], "sizes": {}}', "[" * 100_000])
def test_json_that_is_none_of_ours_is_refused(shell: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "kernel.json").write_text(text)
    code, _, err = shell("diff", str(tmp_path / "kernel.json"), str(tmp_path / "kernel.json"))
    assert code == 2 and "error[C616]" in err


# --- help ------------------------------------------------------------------------------------------------------------


def every_command(group: click.Group, before: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that name it, groups included."""
    for name, command in group.commands.items():
        yield (*before, name), command
        if isinstance(command, click.Group):
            yield from every_command(command, (*before, name))


COMMANDS = dict(every_command(commands))


def examples(command: click.Command) -> list[str]:
    """The examples of a command's help."""
    found = (command.help or "").partition("Examples:\n")[2]
    return [line.strip() for line in found.splitlines() if line.strip()]


EXAMPLES = {text: words for words, command in COMMANDS.items() for text in examples(command)}


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_shows_two_examples_of_the_command(shell: Any, words: tuple[str, ...]) -> None:
    found = examples(COMMANDS[words])
    assert len(found) == 2 and all(text.startswith(f"cascadec {' '.join(words)}") for text in found)
    code, out, _ = shell(*words, "--help")
    assert code == 0 and all(text in out for text in found)


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_names_options_that_there_are(text: str) -> None:
    words = shlex.split(text)[1:]
    command: click.Command = commands
    while isinstance(command, click.Group):
        command = command.commands[words.pop(0)]
    known = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    assert {word for word in words if word.startswith("-")} <= known


@pytest.mark.parametrize("text", EXAMPLES)
def test_an_example_runs(
    shell: Any, own_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """In a folder with the examples and a layer for several devices."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "layer.cascade").write_text(LAYER)
    monkeypatch.chdir(tmp_path)
    code, out, err = shell(*shlex.split(text)[1:])
    assert code == 0, err
    assert out or "-o" in text or "--plot" in text
    if "--json" in text:
        json.loads(out)


def test_every_leaf_takes_json() -> None:
    for words, command in COMMANDS.items():
        flags = {name for param in command.params for name in param.opts}
        assert isinstance(command, click.Group) or "--json" in flags, words


# --- completion ------------------------------------------------------------------------------------------------------


def completed(*words: str) -> list[str]:
    """What the last word may become, folders as they stand."""
    asked = ShellComplete(commands, {}, "cascadec", settings.COMPLETION)
    return [item.value for item in asked.get_completions(list(words[:-1]), words[-1])]


def test_completion_of_commands_and_options() -> None:
    assert completed("") == [name for name in sorted(commands.commands)] and completed("do") == ["doctor"]
    assert completed("cache", "") == sorted(upkeep.cache_group.commands)
    assert "--machine" in completed("explain", "--m") and completed("show", "--ri") == ["--rich"]
    assert completed("completion", "") == list(parameters.SHELLS)
    assert completed("cache", "clear", "--kind", "t") == ["tuned"]


def test_completion_of_machines_and_passes() -> None:
    assert completed("plan", "x", "--machine", "h") == ["h100x8", "h200x8", "h200", "h100"]
    assert completed("explain", "x", "--machine", "h200") == ["h200", "h200x8"]
    assert "fusemax" in completed("cost", "x", "--machine", "") and "h100x8" not in completed(
        "cost", "x", "--machine", ""
    )
    assert completed("diff", "x", "--pass", "")[: len(pipeline.PIPELINE)] == [step.name for step in pipeline.PIPELINE]


def test_completion_of_files_and_symbols(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("one.cascade", "two.py", "three.txt", ".hidden.cascade", "kernel.json"):
        (tmp_path / name).write_text("raise SystemExit('never run')")
    (tmp_path / "folder").mkdir()
    shutil.copy(SOFTMAX, tmp_path / "folder" / "rows.cascade")
    assert completed("show", "") == ["", "one.cascade", "two.py"]  # "": the shell completes folders
    assert completed("show", "o") == ["one.cascade"] and completed("show", ".h") == [".hidden.cascade"]
    assert completed("show", "folder/") == ["folder/rows.cascade"]
    assert "kernel.json" in completed("diff", "one.cascade", "k") and completed("show", "nowhere/") == []
    assert completed("show", "folder/rows.cascade", "-s", "") == ["M=", "N="]
    assert completed("show", "two.py", "-s", "") == [] and completed("show", "one.cascade", "-s", "") == []


@pytest.mark.parametrize("shell_name", parameters.SHELLS)
def test_completion_protocol(shell_name: str) -> None:
    asked = {"COMP_WORDS": "cascadec doc", "COMP_CWORD": "doc" if shell_name == "fish" else "1"}
    done = process(**asked, **{settings.COMPLETION: f"{shell_name}_complete"})
    assert (done.returncode, done.stderr) == (0, "") and "doctor" in done.stdout and "plain" in done.stdout


@pytest.mark.parametrize("shell_name", parameters.SHELLS)
def test_completion_script(shell: Any, told: Any, shell_name: str) -> None:
    code, out, _ = shell("completion", shell_name)
    assert code == 0 and out.startswith(f"# to install: {parameters.INSTALL[shell_name]}\n")
    assert f"{settings.COMPLETION}={shell_name}_complete" in out
    assert told("completion", shell_name)["script"] == out


def test_the_script_completes_in_bash(shell: Any, tmp_path: Path) -> None:
    (tmp_path / "cascadec").write_text(f'#!/bin/sh\nPYTHONPATH={ROOT} exec {sys.executable} -m cascade "$@"\n')
    (tmp_path / "cascadec").chmod(0o755)
    (tmp_path / "script").write_text(shell("completion", "bash")[1])
    line = "source script; COMP_WORDS=(cascadec explain x --machine h200x); COMP_CWORD=4; "
    line += '_cascadec_completion cascadec; echo "${COMPREPLY[@]}"'
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout == "h200x8\n", done.stderr


# --- doctor ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "wanted", "holds"),
    [
        ("2.13.0+cu128", ">=2.11,<2.14", True),
        ("2.14.0", ">=2.11,<2.14", False),
        ("2.9", ">=2.11", False),
        ("3.2", ">=3.2.0", True),
        ("1.2.3", "==1.2.3", True),
        ("1.2.4", "!=1.2.4", False),
        ("2024.10.0", ">=2024.1", True),
        ("1.0", "", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, wanted: str, holds: bool) -> None:
    assert doctor.admitted(version, wanted) is holds


def test_the_ranges_are_those_of_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (ROOT / "pyproject.toml").read_text()
    checkout, python = doctor.requirements()
    assert all(f'"{one.requirement}' in text for one in checkout) and f'requires-python = "{python}"' in text
    assert {"torch", "triton", "sympy", "networkx", "lark", "ortools", "highspy", "matplotlib"} <= {
        p.name for p in checkout
    }
    assert not any(one.extra == "test" for one in checkout)
    monkeypatch.setattr(doctor, "_checkout", lambda: None)  # as where it is installed
    installed, _ = doctor.requirements()
    assert {(one.name, one.extra) for one in installed} == {(one.name, one.extra) for one in checkout}


def broken_modules(folder: Path, *names: str) -> str:
    """A path on which these modules cannot be imported."""
    for name in names:
        (folder / f"{name}.py").write_text("raise ImportError('it is hidden')\n")
    return os.pathsep.join([str(folder), str(ROOT)])


def test_doctor_where_torch_and_triton_are_broken(tmp_path: Path) -> None:
    done = process("doctor", "--json", PYTHONPATH=broken_modules(tmp_path, "torch", "triton"))
    found = json.loads(done.stdout)
    assert done.returncode == 1 and found["ok"] is False and "Traceback" not in done.stderr
    states = {(one["section"], one["name"]): one for one in found["checks"]}
    assert states["package", "torch"]["state"] == states["package", "triton"]["state"] == "broken"
    assert "it is hidden" in states["package", "torch"]["says"] and states["package", "sympy"]["state"] == "ok"
    assert states["compiler", "offline"]["state"] == "broken"
    commands_ = {one["what"].split(":")[0]: one["command"] for one in found["problems"] if one["needed"]}
    requirement = next(one.requirement for one in doctor.requirements()[0] if one.name == "torch")
    assert commands_["package torch"] == doctor.pip("--force-reinstall", "--no-cache-dir", requirement)


def test_doctor_where_the_command_line_is_broken(tmp_path: Path) -> None:
    path = broken_modules(tmp_path, "lark")
    done = process("doctor", "--quick", PYTHONPATH=path)
    assert done.returncode in (0, 1) and "package lark" in done.stdout and "Traceback" not in done.stderr
    other = process("show", SOFTMAX, PYTHONPATH=path)
    assert other.returncode == 2 and "error[C624]" in other.stderr and "-m cascade.doctor" in other.stderr


def test_a_package_that_is_absent_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "_version", lambda name: {"torch": None, "lark": "3.0", "ortools": None}.get(name, "99")
    )
    wanted = {one.name: one for one in doctor.requirements()[0]}
    absent, old, extra = (doctor._package(wanted[name], None) for name in ("torch", "lark", "ortools"))
    assert (absent.state, absent.mend) == ("broken", doctor.pip(wanted["torch"].requirement))
    assert old.state == "broken" and "3.0 is not in >=1.2,<2" in old.says
    assert extra.state == "note" and doctor.healthy([extra]) and not doctor.healthy([absent])
    assert str(extra.mend) in doctor.advice([extra]) and "cascade can work here" in doctor.advice([extra])


def test_a_module_that_is_hidden_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    wanted = {one.name: one for one in doctor.requirements()[0]}
    assert doctor._package(wanted["torch"], {"torch": None}).state == "broken"
    (device,) = doctor._devices(tuple(wanted.values()), None)
    assert device.state == "note"


def test_a_crash_on_import_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fine_one.py").write_text("print('{noise')")
    (tmp_path / "dies.py").write_text("import os; os._exit(3)")
    (tmp_path / "last_one.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    found, devices = doctor.importing(["fine_one", "dies", "last_one", "not_there"])
    assert devices is None and found["fine_one"] is found["last_one"] is None
    assert "code 3" in str(found["dies"]) and "No module named" in str(found["not_there"])


def test_doctor_tells_of_settings(tmp_path: Path) -> None:
    wrong = {"CASCADE_CHEK": "1", "CASCADE_DEBUG": "9", "CASCADE_CACHE_DIR": str(tmp_path / "is a file")}
    (tmp_path / "is a file").write_text("")
    done = process("doctor", "--quick", "--json", **wrong)
    states = {one["name"]: one for one in json.loads(done.stdout)["checks"] if one["section"] == "setting"}
    assert done.returncode == 1
    assert states["CASCADE_CHEK"]["state"] == "warning" and "CASCADE_CHECK" in states["CASCADE_CHEK"]["says"]
    assert states["CASCADE_DEBUG"]["mend"] == "unset CASCADE_DEBUG" and states["CASCADE_DUMP"]["state"] == "ok"
    assert states["CASCADE_CACHE_DIR"]["state"] == "broken"


def test_settings_are_all_known() -> None:
    documented = re.findall(r"^    (CASCADE_\w+)", settings.__doc__ or "", re.M)
    assert tuple(documented) == settings.KNOWN
    assert len(settings.KNOWN) == len(settings.Settings.__slots__)
    assert all(one.known and one.refused is None for one in settings.variables({}))


def test_a_cache_that_cannot_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CASCADE_CACHE_DIR", "/proc/nothing/here")
    found = doctor._cache()
    assert found.state == "warning" and found.mend and found.mend.startswith("export CASCADE_CACHE_DIR=")


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, *rows: str) -> None:
    """A driver that lists these GPUs."""
    (folder / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{row}'\n" for row in rows))
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


def test_devices_and_their_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, "580.1, NVIDIA H200", "580.1, NVIDIA H200")
    wanted = doctor.requirements()[0]
    devices = [["NVIDIA H200", "sm_90", 150_000_000_000]] * 2
    found = list(doctor._devices(wanted, {"cuda": "12.8", "devices": devices}))
    assert [one.found for one in found] == ["NVIDIA H200, sm_90, 150 GB, driver 580.1"] * 2
    assert {one.state for one in found} == {"ok"}
    for cuda, mend in ((None, "--force-reinstall"), ("12.8", "nvidia-smi")):
        (unseen,) = doctor._devices(wanted, {"cuda": cuda, "devices": []})
        assert unseen.state == "warning" and "NVIDIA H200" in unseen.found and mend in str(unseen.mend)


def test_no_device_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'no devices were found'\nexit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    (found,) = doctor._devices(doctor.requirements()[0], {"cuda": None, "devices": []})
    assert found.state == "note" and doctor.healthy([found])


def test_doctor_without_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "cascade.doctor", "--quick", "--json"], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and json.loads(done.stdout)["ok"] is True


def test_doctor_starts_fast_and_loads_little() -> None:
    code = "import sys, cascade.doctor; print(sorted({'torch', 'triton', 'lark', 'click', 'rich', 'sympy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
    started = time.perf_counter()
    assert process("doctor", "--quick").returncode == 0
    assert within(time.perf_counter() - started, 2.0)


# --- the cache -------------------------------------------------------------------------------------------------------


def filled(folder: Path) -> dict[str, Path]:
    """A cache with an entry of each kind, damaged ones, one that is being written, and what is not ours."""
    kept = ("a", 1)
    for name in ("1" * 64, "2" * 64):
        memo.store(folder / "lifts" / f"{name}.json", kept)
    tiles = ((("m", 64),), (4, 2), False, False, 1, 0.25)
    memo.store(folder / "tuned" / f"{'3' * 64}.json", tiles)
    memo.store(folder / "tuned" / f"{'4' * 64}.json", ("no", "tiles"))
    pipeline.reproducer(
        "it broke\nbadly", "cascadec show {path}", "# a comment\r\ncascade c(A[M]) -> Z[M] { Z[m] = A[m] }\n"
    )
    broken = folder / "lifts" / f"{'2' * 64}.json"
    broken.write_text(broken.read_text().replace("a", "b"))
    paths = {"unfinished": folder / "lifts" / f".{'5' * 64}.json.abcd_123", "note": folder / "lifts" / "notes.txt"}
    paths |= {"deep": folder / "lifts" / "deep", "link": folder / "lifts" / f"{'6' * 64}.json", "top": folder / "mine"}
    paths["unfinished"].write_text("half")
    paths["note"].write_text("mine")
    paths["deep"].mkdir()
    paths["link"].symlink_to(paths["note"])
    paths["top"].write_text("mine as well")
    return paths


def test_cache_lists_what_is_ours(own_cache: Path, told: Any) -> None:
    paths = filled(own_cache)
    found = told("cache", "list")["entries"]
    assert [one["kind"] for one in found].count("lifts") == 3 and len(found) == 6
    assert all(Path(one["path"]).stat().st_size == one["bytes"] for one in found)
    assert [Path(one["path"]) for one in found if one["unfinished"]] == [paths["unfinished"]]
    sizes = told("cache", "size")
    assert sizes["entries"] == 6 and sizes["bytes"] == sum(one["bytes"] for one in found)
    assert set(map(Path, sizes["strangers"])) == {paths[name] for name in ("note", "deep", "link", "top")}
    assert told("cache", "list", "--kind", "bugs")["entries"][0]["kind"] == "bugs"
    assert told("cache", "list", "--older-than", "1h")["entries"] == []


def test_cache_verify_finds_what_the_reader_refuses(own_cache: Path, told: Any, shell: Any) -> None:
    filled(own_cache)
    code, out, err = shell("cache", "verify")
    assert code == 1 and "its hash is not that of its content" in out and "no choice of tiles" in out
    assert "cascadec cache clear --damaged --yes" in err
    wrong = {Path(one["path"]).name[0] for one in told("cache", "verify")["entries"]}
    assert wrong == {"2", "4"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        refused = {
            p.name[0]
            for p in (own_cache / "lifts").glob("?" * 64 + ".json")
            if not p.is_symlink() and memo.load(p) is None
        }
    assert refused == {"2"} and len(caught) == 1
    (bug,) = (own_cache / "bugs").iterdir()
    bug.write_text(bug.read_text() + "# edited\n")
    assert bug.name in {Path(one["path"]).name for one in told("cache", "verify", "--kind", "bugs")["entries"]}
    assert shell("cache", "clear", "--damaged", "--yes")[0] == 0
    code, out, _ = shell("cache", "verify")
    assert code == 0 and "all hold" in out and len(told("cache", "list")["entries"]) == 3


def test_cache_clear_removes_ours_only(own_cache: Path, told: Any, shell: Any) -> None:
    paths = filled(own_cache)
    code, out, err = shell("cache", "clear")
    assert code == 2 and "give --yes" in err and len(told("cache", "list")["entries"]) == 6
    assert told("cache", "clear", "--kind", "tuned", "--yes")["removed"] and not list((own_cache / "tuned").iterdir())
    found = told("cache", "clear", "--yes")
    assert found["left"] == [str(paths["unfinished"])] and len(found["removed"]) == 3
    assert all(path.exists() for path in paths.values()) and (own_cache / "bugs").is_dir()
    os.utime(paths["unfinished"], (0, 0))  # what a process left long ago
    assert told("cache", "clear", "--yes", "--older-than", "1d")["removed"] == [str(paths["unfinished"])]
    assert paths["note"].read_text() == "mine"


def test_cache_clear_by_age(own_cache: Path, told: Any) -> None:
    filled(own_cache)
    old = own_cache / "lifts" / f"{'1' * 64}.json"
    os.utime(old, (time.time() - 7200, time.time() - 7200))
    assert told("cache", "clear", "--older-than", "90m", "--yes")["removed"] == [str(old)]


@pytest.mark.parametrize(("answer", "left"), [("y\n", 0), ("n\n", 1), ("", 1)])
def test_cache_clear_asks_on_a_terminal(
    own_cache: Path, told: Any, monkeypatch: pytest.MonkeyPatch, shell: Any, answer: str, left: int
) -> None:
    memo.store(own_cache / "lifts" / f"{'1' * 64}.json", ("a", 1))

    def asked(question: str, **_: object) -> bool:
        assert "Remove 1 entry of" in question
        if not answer:
            raise click.exceptions.Abort
        return answer == "y\n"

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(click, "confirm", asked)
    assert shell("cache", "clear")[0] == 0
    assert len(told("cache", "list")["entries"]) == left


@pytest.mark.parametrize(("answer", "left"), [(b"y\n", 0), (b"n\n", 1), (b"\x04", 1)])
def test_the_question_on_a_real_terminal(own_cache: Path, answer: bytes, left: int) -> None:
    memo.store(own_cache / "lifts" / f"{'1' * 64}.json", ("a", 1))
    ours, theirs = pty.openpty()
    os.write(ours, answer)
    command = [sys.executable, "-m", "cascade", "cache", "clear"]
    done = subprocess.run(command, cwd=ROOT, stdin=theirs, capture_output=True, text=True)
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 0 and "Remove 1 entry of" in done.stderr and done.stdout.startswith("removed ")
    assert len(list((own_cache / "lifts").iterdir())) == left


def test_an_empty_cache(own_cache: Path, shell: Any) -> None:
    for words in (("list",), ("size",), ("verify",), ("clear",), ("clear", "--yes")):
        code, out, err = shell("cache", *words)
        assert (code, err) == (0, "") and out
    assert not own_cache.exists()


def test_cache_is_cleared_while_others_use_it(own_cache: Path) -> None:
    """Another thread writes and reads entries all the while: none is ever damaged, nothing raises."""
    stop, failures = threading.Event(), []

    def use() -> None:
        number = 0
        while not stop.is_set():
            path = own_cache / "lifts" / f"{number % 7:064x}.json"
            try:
                memo.store(path, ("entry", number))
                if memo.load(path) not in (None, ("entry", number)):
                    failures.append("another value")
            except Exception as error:
                failures.append(repr(error))
            number += 1

    user = threading.Thread(target=use)
    sweeps, removed, end = 0, 0, time.monotonic() + 60
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        user.start()
        try:
            # Two hundred sweeps may pass before a busy machine lets the other thread write at all.
            while (sweeps < 200 or removed < 20) and time.monotonic() < end:
                found = entries.listed()
                assert all(entries.damage(entry) is None for entry in found)
                removed += len(entries.removed(found)[0])
                sweeps += 1
        finally:
            stop.set()
            user.join()
    assert not failures and removed >= 20


def test_a_reader_of_tiles_believes_no_other_entry() -> None:
    assert tune.is_entry(((("m", 1),), (4,), False, False, 1, 0.5))
    assert not any(map(tune.is_entry, (None, (), (1, 2, 3), ("a",) * 6, "text", 4)))
    assert entries.damage(entries.Entry("tuned", Path("/nowhere"), 0, 0.0)) is None
