"""Pages of the documents as programs: every fenced block of a page is run, in order, in one folder and one namespace.

    python    runs; where a `text` block follows, it is what is printed
    console   each command prints what stands under it; one that ends in an error prints one
    cascade   whole programs mean the same after the pipeline as before, on random inputs; parts are in an example
    toml      is in an example or a shipped machine, or a file of the page
    text      follows a `python` block

A block behind a line that ends in "file `name`:" is written into that file, and run by a command of the page.
"""

from __future__ import annotations

import contextlib
import io
import linecache
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cascade import trial
from cascade.cli import run_command
from cascade.compiled import Compiled
from cascade.frontend.build import parse_program
from cascade.ir import DType
from cascade.text import render
from cascade.verify import verify

ROOT = Path(__file__).parents[1]
FENCE = re.compile(r"^```([^\n`]*)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"file\s`([\w.-]+)`:\n+\Z")
KINDS = {"python", "console", "cascade", "toml", "text"}
LIMIT_S = 300


@dataclass
class Block:
    """A fenced block: its kind, its text, the file that it is."""

    kind: str
    text: str
    file: str = ""


@dataclass(frozen=True)
class Command:
    """A `$` line, lines that end in a backslash joined, and the output that is shown under it."""

    text: str  # as it is shown
    output: str

    @property
    def words(self) -> list[str]:
        """The command and its arguments."""
        return shlex.split(self.text.replace("\\\n", " "))


def blocks_of(text: str) -> list[Block]:
    """The fenced blocks of a page; the kind of a directive of the site is in braces."""
    found = []
    for match in FENCE.finditer(text):
        named = FILE.search(text, 0, match.start())
        found.append(Block(match[1], match[2], named[1] if named else ""))
    return found


def commands_in(block: str) -> Iterator[Command]:
    """The commands of a `console` block."""
    for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
        match = re.match(r"((?:.*\\\n)*.*)\n", part)
        assert match is not None
        yield Command(match[1], part[match.end() :])


@dataclass
class Page:
    """A page that is being run."""

    name: str
    folder: Path
    namespace: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("examples", "benchmarks"):
            (self.folder / name).symlink_to(ROOT / name)

    def run(self, text: str) -> str:
        """Runs every block; the page with what they print."""
        blocks = blocks_of(text)
        strange = [block.kind for block in blocks if block.kind not in KINDS and not block.kind.startswith("{")]
        assert not strange, strange
        shown = iter(self.shown(blocks))
        return FENCE.sub(lambda match: f"```{match[1]}\n{next(shown)}```", text)

    def shown(self, blocks: list[Block]) -> Iterator[str]:
        """The text of each block as it should be."""
        printed = None
        for block in blocks:
            if block.kind == "text":
                assert printed is not None, f"nothing prints {block.text!r}"
                yield printed
                printed = None
                continue
            printed = self.python(block.text) if block.kind == "python" and not block.file else None
            if block.file:
                (self.folder / block.file).write_text(block.text)
            elif block.kind == "cascade":
                check_program(block.text)
            elif block.kind == "toml":
                files = [path for folder in ("examples", "cascade") for path in (ROOT / folder).rglob("*.toml")]
                assert any(block.text in path.read_text() for path in files), block.text
            yield "".join(map(self.console, commands_in(block.text))) if block.kind == "console" else block.text

    def python(self, text: str) -> str:
        """What a block of Python prints."""
        out, file = io.StringIO(), f"{self.name}.py"
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # what an error shows of it
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out):
            exec(compile(text, file, "exec"), self.namespace)
        return out.getvalue()

    def console(self, command: Command) -> str:
        """A command with what it prints; one of ours fails where it prints an error, other programs do not."""
        words, settings = command.words, {}
        while re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            name, _, settings[name] = words.pop(0).partition("=")
        if words[0] != "cascadec":
            return f"$ {command.text}\n{self.program(words, settings)}"
        code, printed = self.cascadec(words[1:])
        assert (code != 0) == bool(re.search(r"(^|: )error\[C", printed, re.M)), printed
        return f"$ {command.text}\n{printed}"

    def cascadec(self, words: list[str]) -> tuple[int, str]:
        """The exit code of a command of ours and what it prints, in this process."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.chdir(self.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = run_command(words)
        return code, out.getvalue() + err.getvalue()

    def program(self, words: list[str], settings: dict[str, str]) -> str:
        """What another program prints: Python, or `make`, of which only the plan is looked at."""
        program, *rest = words
        assert program in ("python", "make"), program
        argv = [sys.executable, *rest] if program == "python" else ["make", "-C", str(ROOT), "--dry-run", *rest]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONPATH": path, **settings}
        done = subprocess.run(argv, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr
        return done.stdout if program == "python" else ""  # warnings are no part of a page


def check_program(text: str) -> None:
    """A whole program is read back as it is printed, and runs; a part of one is in an example."""
    if not re.search(r"^cascade ", text, re.M):
        assert any(text in path.read_text() for path in (ROOT / "examples").rglob("*.cascade")), text
        return
    for cascade in parse_program(text, "<page>"):
        verify(cascade)
        assert parse_program(render(cascade), "<page>")[-1] == cascade
        sizes = trial.small_sizes(cascade, {})
        verdicts = trial.measure(cascade, Compiled(cascade), sizes, trial.param_types(cascade, DType.F32), 0)
        assert all(verdict.ok for verdict in verdicts.values()), verdicts
