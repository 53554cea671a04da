"""What a terminal shows: program text, differences, tables, trees, sparklines, timelines; plain text everywhere else.

    table(("einsum", "cycles"), rows)       boxes on a terminal, aligned columns in a pipe
    tree(Branch("n", (Branch("3 passes"),)))    guides on a terminal, indentation in a pipe
    sparkline((0.1, 0.9))                   blocks on a terminal, ASCII in a pipe

Everything that depends on where output goes is decided here. A stream that is no terminal gets neither colour nor boxes
nor letters beyond ASCII of our own, so that its text is the same everywhere; `NO_COLOR` takes colours from a terminal,
and `COLUMNS` says how wide lines may be, 80 where nothing says it.
"""

from __future__ import annotations

import contextlib
import json
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click
from rich.console import Console
from rich.highlighter import RegexHighlighter
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text
from rich.theme import Theme
from rich.tree import Tree

BLOCKS = "▁▂▃▄▅▆▇█"
ASCII = "_.:-=+*#"
"""Heights of a sparkline, from nothing to all, on a terminal and elsewhere."""
NARROWEST = 40
"""Columns that are filled whatever the terminal says."""


CODE = "code"
"""The style of lines that are program text."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A line of a tree and those below it; `style` colours the line on a terminal, `CODE` as program text."""

    label: str
    below: tuple[Branch, ...] = ()
    style: str = ""


class CascadeHighlighter(RegexHighlighter):
    """Colours for program text on a terminal."""

    highlights = [  # noqa: RUF012  (rich's class attribute)
        r"(?P<keyword>\b(cascade|schedule|def|where|init|fill|topk|and|or|not|cast|fuse|tile|split|shard|mesh|stream|wait|over|into|at|on"
        r"|fold|state|update|merge|finalize|empty)\b)",
        r"(?P<reducer>\b[a-z]\w*(?=\[[^\]]*\] ))",
        r"(?P<number>(?<![\w.])\d+(\.\d+)?(e[+-]?\d+)?\b)",
        r"(?P<tensor>\b\w+(?=\[))",
        r"(?P<comment>#.*)",
    ]


def console(stderr: bool = False) -> Console:
    """A terminal to draw on; plain where the stream is none."""
    colours = {"keyword": "bold magenta", "reducer": "cyan", "number": "green", "tensor": "bold", "comment": "dim"}
    return Console(stderr=stderr, theme=Theme(colours), highlight=False, soft_wrap=True)


def columns() -> int:
    """How wide lines may be."""
    return max(NARROWEST, console().width)


def emit(payload: Mapping[str, Any], draw: Callable[[], None], as_json: bool) -> None:
    """The one JSON object, or what a person reads."""
    if as_json:
        click.echo(json.dumps(payload, indent=2, allow_nan=False))
    else:
        draw()


# --- text ------------------------------------------------------------------------------------------------------------


def program(text: str) -> None:
    """Program text, coloured on a terminal."""
    out = console()
    if out.is_terminal:
        out.print(CascadeHighlighter()(Text(text)), end="")
    else:
        click.echo(text, nl=False)


def changes(text: str) -> None:
    """A unified diff, coloured on a terminal."""
    out = console()
    if not out.is_terminal:
        click.echo(text, nl=False)
        return
    styles = {"+": "green", "-": "red", "@": "cyan"}
    for line in text.splitlines():
        out.print(Text(line, styles.get(line[:1], "")))


def heading(text: str) -> None:
    """A line that names what follows."""
    out = console()
    if out.is_terminal:
        out.print(Text(text, "dim"))
    else:
        click.echo(text)


def error_text(text: str) -> None:
    """What is wrong, on standard error: its code, its place and its help stand out on a terminal."""
    out = console(stderr=True)
    if not out.is_terminal:
        click.echo(text, err=True)
        return
    shown = Text(text)
    shown.highlight_regex(r"error\[C\d+\]", "bold red")
    shown.highlight_regex(r"(?m)^ +\^+$", "red")
    shown.highlight_regex(r"(?m)^help:", "bold green")
    shown.highlight_regex(r"note:", "bold cyan")
    out.print(shown)


# --- tables and trees ------------------------------------------------------------------------------------------------


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table with boxes on a terminal, aligned columns elsewhere."""
    out = console()
    if out.is_terminal:
        drawn = Table(*titles)
        for row in rows:
            drawn.add_row(*(Text(cell) for cell in row))
        out.print(drawn, soft_wrap=False)
        return
    widths = [max(len(row[i]) for row in (titles, *rows)) for i in range(len(titles))]
    for row in (titles, *rows):
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def tree(root: Branch) -> None:
    """A tree: with guides on a terminal, by indentation elsewhere; long lines go on below where they began."""
    out = console()
    if out.is_terminal:
        drawn = Tree(_line(root), guide_style="dim")
        _grow(drawn, root)
        out.print(drawn, soft_wrap=False)
        return
    for line in tree_lines(root, columns()):
        click.echo(line)


def _grow(drawn: Tree, branch: Branch) -> None:
    for one in branch.below:
        _grow(drawn.add(_line(one)), one)


def _line(branch: Branch) -> Text:
    """The label in the colours that the branch asks for."""
    return CascadeHighlighter()(Text(branch.label)) if branch.style == CODE else Text(branch.label, branch.style)


def tree_lines(branch: Branch, width: int, depth: int = 0) -> Iterator[str]:
    """A tree as plain lines of at most `width` columns, two further in for each level."""
    indent = "  " * depth
    room = max(width, len(indent) + NARROWEST)
    wrapped = textwrap.wrap(
        branch.label, room, initial_indent=indent, subsequent_indent=f"{indent}    ", break_on_hyphens=False,
        break_long_words=False,
    )  # fmt: skip
    yield from wrapped or [""]
    for one in branch.below:
        yield from tree_lines(one, width, depth + 1)


# --- pictures of a line ----------------------------------------------------------------------------------------------


def letters() -> str:
    """The heights of a sparkline where output goes."""
    out = console()
    return BLOCKS if out.is_terminal and out.encoding.startswith("utf") else ASCII


def sparkline(shares: Sequence[float], heights: str = ASCII) -> str:
    """A letter for each share of a whole, the higher the more: `_.=#`."""
    return "".join(heights[min(len(heights) - 1, int(max(0.0, share) * len(heights)))] for share in shares)


def timeline(rows: Sequence[tuple[str, Sequence[tuple[float, float]]]], end: float) -> Iterator[str]:
    """A line of time for each row, a bar for each of its stretches: `a |###===   |`; neighbours differ."""
    if not rows or end <= 0:
        return
    margin = min(max(len(name) for name, _ in rows), 24)
    width = max(10, columns() - margin - 3)
    for name, stretches in rows:
        line = [" "] * width
        for number, (first, last) in enumerate(stretches):
            place = min(width - 1, int(first / end * width))
            for at in range(place, min(width, max(place + 1, round(last / end * width)))):
                line[at] = "#="[number % 2]
        yield f"{name[:margin]:{margin}} |{''.join(line)}|"


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None] | None]:
    """How far a search has come, as a bar on standard error; None where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    with Progress(console=console(stderr=True), transient=True) as bars:
        tasks: dict[str, TaskID] = {}

        def told(region: str, tried: int, forms: int) -> None:
            if region not in tasks:
                tasks[region] = bars.add_task(region)
            bars.update(tasks[region], completed=tried, total=forms)

        yield told
