"""The documents are run: sessions of Python, shell commands with the output that is shown under them, and links.

What a page of `docs` shows under a command is what the command prints: `pytest tests/test_docs.py --update-golden` puts
it there, and whoever does so reads the page again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("**/*.md"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *PAGES]
BROKEN = "cascade f(A[M]) -> Z[M] {\n    Z[m] = A[m] * C[m]\n}\n"


def blocks(path: Path, kind: str) -> list[str]:
    """The fenced blocks of a document of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", path.read_text(), re.M | re.S)


@dataclass(frozen=True)
class Command:
    """A `$` line of a document, lines that end in a backslash joined, and the output that is shown under it."""

    path: Path
    text: str  # as it is shown
    output: str

    @property
    def words(self) -> list[str]:
        """The command and its arguments."""
        return shlex.split(self.text.replace("\\\n", " "))


def commands(path: Path) -> list[Command]:
    """The shell commands of a document."""
    found = []
    for block in blocks(path, "console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            match = re.match(r"((?:.*\\\n)*.*)\n", part)
            assert match is not None
            found.append(Command(path, match[1], part[match.end() :]))
    return found


def printed(command: Command, folder: Path) -> str:
    """What a command prints, run in a folder that has the examples and the benchmarks."""
    for name in ("examples", "benchmarks"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "broken.cascade").write_text(BROKEN)
    program, *words = command.words
    if program == "python":
        argv = [sys.executable, *words]
    else:
        assert program == "cascadec"
        argv = [sys.executable, "-m", "cascade.cli", *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(argv, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == (1 if "broken" in command.text else 0), done.stderr
    return done.stdout + done.stderr


def named(found: list[Command]) -> dict[str, Any]:
    """The parameters of a test for each command."""
    return {"argvalues": found, "ids": [f"{each.path.stem}: {each.text}"[:90] for each in found]}


def test_the_python_session_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (session,) = blocks(README, "python")
    exec(compile(session, "README.md", "exec"), {})
    assert "cascade attention(" in capsys.readouterr().out


@pytest.mark.parametrize("command", **named(commands(README)))
def test_a_shell_command_prints_what_the_readme_shows(command: Command, tmp_path: Path) -> None:
    found = printed(command, tmp_path)
    assert not command.output or found.strip() == command.output.strip()


@pytest.mark.campaign
@pytest.mark.parametrize("command", **named([command for path in PAGES for command in commands(path)]))
def test_a_page_shows_what_its_commands_print(command: Command, tmp_path: Path, update_golden: bool) -> None:
    found = printed(command, tmp_path)
    if update_golden:
        text = command.path.read_text()
        shown = f"$ {command.text}\n{command.output}"
        assert text.count(shown) == 1
        command.path.write_text(text.replace(shown, f"$ {command.text}\n{found}"))
    else:
        assert found == command.output


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_the_blocks_of_a_page_are_run(path: Path, capsys: pytest.CaptureFixture[str], update_golden: bool) -> None:
    """Python prints what the text block behind it shows; what is shown of a file is in one of the examples."""
    for block in blocks(path, "python"):
        exec(compile(block, path.name, "exec"), {})
        text, found = path.read_text(), capsys.readouterr().out
        before, after = text.split(f"```python\n{block}```\n", 1)
        shown = re.match(r"\n```text\n(.*?)^```$", after, re.M | re.S)
        if update_golden and shown is not None:
            path.write_text(f"{before}```python\n{block}```\n\n```text\n{found}```{after[shown.end() :]}")
        elif shown is not None:
            assert shown[1] == found
    examples = "\n".join(file.read_text() for file in sorted((ROOT / "examples").rglob("*.cascade")))
    files = "\n".join(file.read_text() for file in sorted((ROOT / "examples").rglob("*.toml")))
    assert all(block in examples for block in blocks(path, "cascade"))
    assert all(block in files for block in blocks(path, "toml"))
    assert set(re.findall(r"^```(\w+)$", path.read_text(), re.M)) <= {"python", "text", "cascade", "toml", "console"}


def test_the_cascade_at_the_top_is_the_example() -> None:
    (shown,) = re.findall(r"^```\n(cascade attention.*?)^```$", README.read_text(), re.M | re.S)
    assert shown in (ROOT / "examples/attention.cascade").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("http") or (path.parent / target).exists(), target


def test_every_example_is_listed() -> None:
    for example in (ROOT / "examples").glob("[0-9][0-9]_*.py"):
        assert f"`{example.stem}`" in README.read_text()
