"""What went wrong, where, and what to try next: spans, diagnostics and the error classes.

A *diagnostic* is one finding: a stable code, a message, the span it is about, optional notes (further spans, such
as the other of two declarations in a conflict) and a help line. An error carries one or more of them. Spans come
from program text or from a traced Python frame; both render alike:

    demo.cascade:2:12: error[C203]: 'Z' is not defined
        B[i] = Z[i]
               ^^^^
    help: tensors defined here: A
"""

from __future__ import annotations

import linecache
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A named program text; `text` is None for a Python file, whose lines are read when an error needs them."""

    name: str
    text: str | None = None
    lines: list[str] = field(default_factory=list, repr=False)

    def line(self, number: int) -> str:
        """The 1-based line `number` without its end, or "" where there is none."""
        if self.text is None:
            return linecache.getline(self.name, number).rstrip("\n")
        if not self.lines:
            self.lines.extend(self.text.split("\n"))
        return self.lines[number - 1].rstrip("\r") if 0 < number <= len(self.lines) else ""


@dataclass(frozen=True, slots=True)
class Span:
    """A half-open stretch of a source; lines and columns count from 1, columns in characters."""

    source: Source
    line: int
    column: int
    end_line: int
    end_column: int

    def to(self, other: Span | None) -> Span:
        """The stretch from the start of this span to the end of `other`."""
        if other is None:
            return self
        return Span(self.source, self.line, self.column, other.end_line, other.end_column)


@dataclass(frozen=True, slots=True)
class Note:
    """A second place that a diagnostic is about."""

    message: str
    span: Span | None = None


@dataclass(frozen=True, slots=True)
class Diagnostic:
    """One finding with its stable code (`C203`), see the table in ARCHITECTURE.md."""

    code: str
    message: str
    span: Span | None = None
    help: str | None = None
    notes: tuple[Note, ...] = ()

    def __str__(self) -> str:
        return render_diagnostic(self)


class CascadeError(Exception):
    """A user's mistake, or a limit of the compiler: one or more diagnostics, rendered by `str`."""

    def __init__(self, diagnostics: Diagnostic | Iterable[Diagnostic]) -> None:
        found = (diagnostics,) if isinstance(diagnostics, Diagnostic) else tuple(diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = found
        super().__init__("\n\n".join(render_diagnostic(d) for d in found))


class ParseError(CascadeError):
    """The text is not a program (C1xx)."""


class VerifyError(CascadeError):
    """The program is not a valid cascade (C2xx)."""


class CallError(CascadeError):
    """The tensors or sizes of a call do not fit the cascade, or its data do not (C3xx)."""


class TraceError(CascadeError):
    """A traced Python function uses something the language has no form for (C4xx)."""


class UnsupportedError(CascadeError):
    """A valid cascade that a pass or a backend cannot take (C5xx)."""


class CommandError(CascadeError):
    """A file, an option or the environment stands in the way (C6xx)."""


class InternalError(Exception):
    """A bug in cascade itself: an invariant broke. The command line exits with 70 and leaves a reproducer."""


def render_diagnostic(diagnostic: Diagnostic) -> str:
    """The diagnostic as the text a person reads: place and message, source line, caret, notes, help."""
    lines = [f"{place(diagnostic.span)}error[{diagnostic.code}]: {diagnostic.message}"]
    lines += excerpt(diagnostic.span)
    for note in diagnostic.notes:
        lines.append(f"{place(note.span)}note: {note.message}")
        lines += excerpt(note.span)
    if diagnostic.help:
        lines.append(f"help: {diagnostic.help}")
    return "\n".join(lines)


def place(span: Span | None) -> str:
    """`file:line:col: `, or nothing where there is no span."""
    return f"{span.source.name}:{span.line}:{span.column}: " if span else ""


MAX_EXCERPT = 160  # characters of a source line that an error shows


def excerpt(span: Span | None) -> list[str]:
    """The source line and a caret line under the span; a long line is cut to a window around the caret."""
    if span is None:
        return []
    text = span.source.line(span.line)
    if not text.strip():
        return []
    start = span.column - 1
    stop = span.end_column - 1 if span.end_line == span.line else len(text)
    offset = max(0, start - MAX_EXCERPT // 2) if len(text) > MAX_EXCERPT else 0
    shown = text[offset : offset + MAX_EXCERPT]
    indent = len(shown) - len(shown.lstrip()) if not offset else 0
    lead = columns(shown[indent : start - offset])
    width = max(1, columns(shown[start - offset : stop - offset]))
    return [f"    {printable(shown[indent:])}", f"    {' ' * lead}{'^' * width}"]


def columns(text: str) -> int:
    """Terminal cells that the text takes once made printable."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in printable(text))


def printable(text: str) -> str:
    """The text with tabs as one blank and control, format and surrogate characters as `?`: inert in a terminal."""
    return "".join(" " if c == "\t" else "?" if unicodedata.category(c) in ("Cc", "Cf", "Cs") else c for c in text)


def quoted_list(names: Iterable[str], limit: int = 8) -> str:
    """`a, b, c` for a help line, cut after `limit` names."""
    listed = list(names)
    return ", ".join(listed[:limit]) + (", ..." if len(listed) > limit else "")
