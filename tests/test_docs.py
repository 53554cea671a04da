"""The documents are run: the session of the README, its shell commands with the output it shows, and its links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted(ROOT.glob("*.md"))
BROKEN = "cascade f(A[M]) -> Z[M] {\n    Z[m] = A[m] * C[m]\n}\n"


def blocks(kind: str) -> list[str]:
    """The fenced blocks of the README of one kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", README, re.M | re.S)


def test_the_python_session_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (session,) = blocks("python")
    exec(compile(session, "README.md", "exec"), {})
    assert "cascade attention(" in capsys.readouterr().out


def shell_commands() -> list[tuple[str, str]]:
    """Every `$` line of the README with the output shown under it."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = part.partition("\n")
            found.append((command, output))
    return found


@pytest.mark.parametrize(("command", "output"), shell_commands(), ids=[command for command, _ in shell_commands()])
def test_a_shell_command_prints_what_the_readme_shows(command: str, output: str, tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / "broken.cascade").write_text(BROKEN)
    program, *words = command.split()
    assert program == "cascadec"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    argv = [sys.executable, "-m", "cascade.cli", *words]
    done = subprocess.run(argv, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == (1 if "broken" in command else 0), done.stderr
    assert not output or (done.stdout + done.stderr).strip() == output.strip()


def test_the_cascade_at_the_top_is_the_example() -> None:
    (shown,) = re.findall(r"^```\n(cascade attention.*?)^```$", README, re.M | re.S)
    assert shown in (ROOT / "examples/attention.cascade").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    prose = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("http") or (ROOT / target).exists(), target


def test_every_example_is_listed() -> None:
    for example in (ROOT / "examples").glob("[0-9][0-9]_*.py"):
        assert f"`{example.stem}`" in README
