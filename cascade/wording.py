"""How a diagnostic points at a name and speaks of it: exact places, quoted names, the closest known one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from cascade.errors import Span, quoted_list

NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
PRIMED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*'")  # a partial state, in the merge of a fold
MAX_NAME = 60  # characters of a name that a message shows
MAX_CANDIDATES = 5_000  # names that are compared with a misspelt one


def quote(name: str) -> str:
    """The name in quotes, cut where it is long and inert where it is no name at all."""
    if PRIMED.fullmatch(name) and len(name) <= MAX_NAME:
        return f'"{name}"'
    shown = name if NAME.fullmatch(name) else ascii(name)[1:-1]
    return f"'{shown[:MAX_NAME]}...'" if len(shown) > MAX_NAME else f"'{shown}'"


def pinpoint(span: Span | None, name: str, after: str = "") -> Span | None:
    """The first place inside a span (behind `after`) where a word is spelled out; the span itself if it is not."""
    if span is None:
        return None
    word = re.compile(rf"(?<![\w.]){re.escape(name)}(?!\w)")
    for number in range(span.line, min(span.end_line, span.line + 100) + 1):
        text = span.source.line(number)
        start = span.column - 1 if number == span.line else 0
        stop = span.end_column - 1 if number == span.end_line else len(text)
        if after:
            found = text.find(after, start, stop)
            if found < 0:
                continue
            start, after = found + len(after), ""
        match = word.search(text, start, stop)
        if match:
            return Span(span.source, number, match.start() + 1, number, match.end() + 1)
    return span


def closest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like this one, upper and lower case being alike; None where none is close."""
    folded: dict[str, str] = {}
    for candidate in known:
        if candidate != name and len(folded) < MAX_CANDIDATES:
            folded.setdefault(candidate.lower(), candidate)
    found = difflib.get_close_matches(name[:MAX_NAME].lower(), folded, n=1, cutoff=0.6)
    return folded[found[0]] if found else None


def suggest(name: str, known: Iterable[str], what: str) -> str:
    """The help for an unknown name: the closest known one, and what there is."""
    names = list(dict.fromkeys(known))
    close = closest(name, names)
    listed = f"{what}: {quoted_list(names)}" if names else f"{what}: none"
    return f"did you mean {quote(close)}? {listed}" if close else listed
