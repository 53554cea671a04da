"""Where a traced value comes from in the user's Python: the place of the call that made it, and its local name.

The user's frame is the innermost one that belongs neither to cascade nor to torch. Local names are observed at every
operation, because a name that is bound anew in a loop (`h = layer(h)`) shows only its latest value; frames are held to
the end of the trace, because a helper's last names are bound after its last operation.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from types import CodeType, FrameType

from cascade.errors import Diagnostic, Note, Source, Span, TraceError

_SERIAL = itertools.count()  # orders values by creation; it never becomes part of a name


class Placed:
    """Something made while tracing: its serial number and the user's call that made it."""

    __slots__ = ("key", "span")

    def __init__(self, span: Span | None = None) -> None:
        self.key = next(_SERIAL)
        self.span = span


class Recorder:
    """What one trace sees of the user's frames: which local name every value was given first."""

    def __init__(self, root: FrameType | None) -> None:
        self.root = root
        self.names: dict[int, str] = {}  # value -> the variable that holds it
        self.hints: dict[int, str] = {}  # value -> the parameter of a helper that it was passed as
        self._frames: dict[int, FrameType] = {}
        self._passed: dict[int, dict[str, object]] = {}

    def observe(self, frame: FrameType | None) -> None:
        """Note the names in a user's frame and in its callers, out to the traced function."""
        while frame is not None and frame is not self.root:
            if not internal(frame):
                self._read(frame)
            frame = frame.f_back

    def finish(self) -> None:
        """Note the names that every frame of the trace ended with."""
        for frame in self._frames.values():
            self._read(frame)

    def _read(self, frame: FrameType) -> None:
        variables = frame.f_locals
        if id(frame) not in self._frames:
            self._frames[id(frame)] = frame
            self._passed[id(frame)] = {name: variables.get(name) for name in _arguments(frame.f_code)}
        passed = self._passed[id(frame)]
        for name, value in variables.items():
            if isinstance(value, Placed):
                named = self.hints if name in passed and passed[name] is value else self.names
                named.setdefault(value.key, name)


def _arguments(code: CodeType) -> tuple[str, ...]:
    """The names of a function's parameters."""
    stars = bool(code.co_flags & inspect.CO_VARARGS) + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    return code.co_varnames[: code.co_argcount + code.co_kwonlyargcount + stars]


def internal(frame: FrameType) -> bool:
    """Whether a frame belongs to cascade or to torch rather than to the user."""
    return str(frame.f_globals.get("__name__", "")).partition(".")[0] in ("cascade", "torch")


def user_frame() -> FrameType | None:
    """The frame of the user's call that is being traced."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and internal(frame):
        frame = frame.f_back
    return frame


def place(frame: FrameType | None) -> Span | None:
    """The expression that a frame is evaluating, as a span of its file."""
    if frame is None:
        return None
    line, end_line, column, end_column = _positions(frame.f_code)[frame.f_lasti // 2]
    line = line or frame.f_lineno
    end_line = end_line or line
    source = _source(frame.f_code.co_filename)
    start = _character(source, line, column or 0)
    end = _character(source, end_line, end_column) if end_column is not None else start
    return Span(source, line, start, end_line, end)


@functools.lru_cache(maxsize=256)
def _positions(code: CodeType) -> tuple[tuple[int | None, int | None, int | None, int | None], ...]:
    return tuple(code.co_positions())


@functools.lru_cache(maxsize=256)
def _source(filename: str) -> Source:
    return Source(filename)


def _character(source: Source, line: int, offset: int) -> int:
    """The 1-based column in characters of an offset in bytes, which is what Python records."""
    text = source.line(line)
    return offset + 1 if text.isascii() else len(text.encode()[:offset].decode(errors="ignore")) + 1


def definition_place(function: Callable[..., object], name: str | None = None) -> Span | None:
    """The name of a Python function where it is defined, or the parameter `name` of it."""
    code = getattr(function, "__code__", None)
    if code is None:
        return None
    source, first = _source(code.co_filename), code.co_firstlineno
    for line, text in itertools.islice(_lines(source, first), 40):
        found = re.search(rf"\b{re.escape(name or function.__name__)}\b", text)
        if found and not text.lstrip().startswith("@"):
            return Span(source, line, found.start() + 1, line, found.end() + 1)
    return Span(source, first, 1, first, 1)


def _lines(source: Source, first: int) -> Iterator[tuple[int, str]]:
    return ((line, source.line(line)) for line in itertools.count(first))


def fail(
    code: str, message: str, help: str | None = None, *, at: Span | None = None, note: Note | None = None
) -> TraceError:
    """The error of the user's call that is being traced, or of the place `at`; the caller raises it."""
    span = at or place(user_frame())
    return TraceError(Diagnostic(code, message, span, help, (note,) if note else ()))
