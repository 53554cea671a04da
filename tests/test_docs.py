"""The documents are run: sessions of Python, shell commands with the output that is shown under them, and links.

What a page of `docs` shows under a block is what the block prints: `pytest tests/test_docs.py --update-golden` puts it
there, and whoever does so reads the page again. `tests/blocks.py` says what each kind of block is held to.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import cascade
from cascade import ir, ops, trial
from cascade.compiled import read_program
from cascade.frontend.build import parse_cascade, parse_program
from cascade.ir import DType
from tests.blocks import ROOT, Page, blocks_of, commands_in

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES]
QUICK = {"index", "language", "explanation", "contract", "fusemax"}  # in seconds; the others are campaigns
BROKEN = "cascade f(A[M]) -> Z[M] {\n    Z[m] = A[m] * C[m]\n}\n"
NOTEBOOK = ROOT / "docs" / "tour.ipynb"


def blocks(path: Path, kind: str) -> list[str]:
    """The fenced blocks of a document of one kind."""
    return [block.text for block in blocks_of(path.read_text()) if block.kind == kind]


README_COMMANDS = [command for block in blocks(README, "console") for command in commands_in(block)]


def test_the_python_session_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (session,) = blocks(README, "python")
    exec(compile(session, "README.md", "exec"), {})
    assert "cascade attention(" in capsys.readouterr().out


def test_what_the_readme_says_first_is_so() -> None:
    program, found = blocks(README, "")[0], blocks(README, "text")[0]
    assert program in read_program(str(ROOT / "examples/attention.cascade"))
    assert found in cascade.parse(program).explain()


@pytest.mark.parametrize("command", README_COMMANDS, ids=lambda command: command.text[:90])
def test_a_shell_command_prints_what_the_readme_shows(command: Any, tmp_path: Path) -> None:
    (tmp_path / "broken.cascade").write_text(BROKEN)
    found = Page("README", tmp_path).console(command).removeprefix(f"$ {command.text}\n")
    assert not command.output or found.strip() == command.output.strip()
    emitted = functions("".join(path.read_text() for path in (tmp_path / "out").glob("*.py")))
    shown = {name: body for block in blocks(README, "py") for name, body in functions(block).items()}
    assert all(body == emitted[name] for name, body in shown.items() if name in emitted)
    assert "cascadec emit" not in command.text or set(shown) & set(emitted)


def test_the_kernels_of_the_layer_are_those_that_explain_tells(tmp_path: Path) -> None:
    (command,) = (
        command for command in README_COMMANDS if command.text.startswith("cascadec explain examples/decoder")
    )
    (shown,) = (block for block in blocks(README, "text") if block.startswith("kernel "))
    assert shown in Page("README", tmp_path).console(command)


def functions(text: str) -> dict[str, str]:
    """The functions of a Python text, however they are laid out."""
    return {node.name: ast.dump(node) for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def test_the_step_of_the_readme_runs() -> None:
    (block,) = (block for block in blocks(README, "py") if "def " not in block)
    step = parse_cascade(read_program(str(ROOT / "examples/decoder_step.cascade")))
    sizes = {"H": 4, "G": 2, "E": 8, "N": 6, "B": 2, "D": 16, "F": 8}
    inputs = trial.random_inputs(step, sizes, trial.param_types(step, DType.F32), 0)
    given = {"x": inputs.pop("X"), "K": inputs.pop("K"), "V": inputs.pop("V"), "lengths": inputs.pop("len")}
    before = given["K"].clone()
    place = given["K"].data_ptr()
    namespace: dict[str, Any] = {"cs": cascade, **given, "rest": inputs}
    exec(block.replace("examples/", f"{ROOT}/examples/"), namespace)
    assert namespace["K"].data_ptr() == place and not torch.equal(namespace["K"], before)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in QUICK else [pytest.mark.campaign], id=path.stem) for path in PAGES],
)
def test_a_page_shows_what_its_blocks_print(path: Path, tmp_path: Path, update_golden: bool) -> None:
    text = path.read_text()
    found = Page(path.stem, tmp_path).run(text)
    if update_golden:
        path.write_text(found)
    else:
        assert steady(found) == steady(text)


def steady(text: str) -> str:
    """A page without the digits of errors, which are those of a CPU's exponential; of what power of ten they are stays."""
    told = re.sub(r"(largest error )\d\.\d+(e[-+]\d+)", r"\1\2", text)
    return re.sub(r"\d\.\d+(e-\d+)(?=.* ok$)", r"\1", told, flags=re.M)


def test_a_page_that_shows_something_else_is_found(tmp_path: Path) -> None:
    wrong = "```python\nprint(1)\n```\n\n```text\n2\n```\n"
    assert Page("wrong", tmp_path).run(wrong) == wrong.replace("2", "1")
    refused = (
        "```text\nnobody prints this\n```\n",
        "```py\n1\n```\n",
        "```cascade\ncascade f(\n```\n",
        "```toml\na = 1\n```\n",
    )
    for number, text in enumerate(refused):
        (tmp_path / str(number)).mkdir()
        with pytest.raises((AssertionError, cascade.CascadeError)):
            Page("wrong", tmp_path / str(number)).run(text)


def test_the_notebook_shows_what_its_cells_print(tmp_path: Path, update_golden: bool) -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    page = Page("tour", tmp_path)
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed = page.python("".join(cell["source"])).splitlines(keepends=True)
        shown = [{"name": "stdout", "output_type": "stream", "text": printed}] if printed else []
        assert update_golden or cell["outputs"] == shown
        cell["outputs"] = shown
    if update_golden:
        NOTEBOOK.write_text(json.dumps(notebook, indent=1) + "\n")


def nodes(value: object) -> Iterator[str]:
    """The kinds of all nodes below a value of the IR."""
    if dataclasses.is_dataclass(value):
        yield type(value).__name__
        for one in dataclasses.fields(value):
            yield from nodes(getattr(value, one.name) if one.name != "span" else ())
    for part in value if isinstance(value, tuple) else ():
        yield from nodes(part)


def test_the_language_has_every_construct_on_its_page() -> None:
    """Every node of the IR, every operation, reducer, type and word is in a program of the page; each of them runs."""
    programs = [block for block in blocks_of((ROOT / "docs/language.md").read_text()) if block.kind == "cascade"]
    whole = [block.text for block in programs if not block.file]
    used = {kind for text in whole for cascade in parse_program(text) for kind in nodes(cascade)}
    kinds = {name for name, one in vars(ir).items() if inspect.isclass(one) and issubclass(one, ir.Node)}
    assert kinds - {"Node"} <= used, kinds - used
    symbols, code = list(ops.INFIX), "\n".join(whole)
    words = [*ops.FUNCTIONS, *ops.REDUCERS, *ops.LIBRARY_REDUCTIONS, *ops.WORDS, *(kind.value for kind in DType)]
    words += ["group", "by", "with", "region", "stage", "keep", "in", "spill", "phase", "drain", "capacity", "double"]
    words += ["bind", "place"]
    assert [word for word in words if not re.search(rf"\b{word}\b", code)] == []
    assert [symbol for symbol in symbols if symbol not in code] == []


def test_every_promise_names_tests_that_there_are() -> None:
    page = (ROOT / "docs/contract.md").read_text()
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", page)
    assert len(named) > 30
    for file, test in named:
        assert test in functions((ROOT / "tests" / file).read_text()), f"{file}::{test}"
    promises = [line for line in page.splitlines() if line.startswith("| ") and "shown by" not in line]
    assert all("::test_" in line for line in promises)


def test_the_cascade_at_the_top_is_the_example() -> None:
    (shown,) = re.findall(r"^```\n(cascade attention.*?)^```$", README.read_text(), re.M | re.S)
    assert shown in (ROOT / "examples/attention.cascade").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S)
    for target in [*re.findall(r"\]\(([^)#]+)\)", prose), *re.findall(r'(?:src|srcset)="([^"]+)"', prose)]:
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_every_example_is_listed() -> None:
    for example in (ROOT / "examples").glob("[0-9][0-9]_*.py"):
        assert f"`{example.stem}`" in README.read_text()
