"""Characters that a program text may not hold: what they are, and what they were probably meant as."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator

from cascade.errors import Diagnostic, Source, Span

STRANGE = re.compile(r"[^\t\n\r\x20-\x7e]+|\r(?!\n)")
MAX_MISTAKES = 20
MEANT = {
    "×": "*", "·": "*", "∗": "*", "⋅": "*", "÷": "/", "∕": "/", "−": "-", "–": "-", "—": "-", "‐": "-", "≤": "<=",
    "≥": ">=", "≠": "!=", "→": "->", "∞": "inf", "∑": "sum[...]", "Σ": "sum[...]", "∏": "prod[...]", "√": "sqrt(...)",
    "∧": "and", "∨": "or", "¬": "not", "“": "", "”": "", "‘": "", "’": "", "，": ",", "；": ";", "：": ":",
}  # fmt: skip
LOOKALIKES = dict(
    zip(
        "АВСЕНІЈКМОРЅТХаеорсухіјѕԁһԛԝΑΒΕΖΗΙΚΜΝΟΡΤΥΧανορτυχıƖǀ٠۰०১",
        "ABCEHIJKMOPSTXaeopcyxijsdhqwABEZHIKMNOPTYXavoptuxiIl0001",
        strict=True,
    )
)
"""Cyrillic, Greek and other characters that are drawn like ASCII ones; the compatibility forms are Unicode's own."""


def character_mistakes(source: Source) -> Iterator[Diagnostic]:
    """C102: every run of characters that is not ASCII; in a comment, only those that are invisible or change order."""
    text = source.text or ""
    if text.isascii() and not STRANGE.search(text):
        return
    count = 0
    for number, line in enumerate(text.split("\n"), 1):
        shown = line.removesuffix("\r")
        comment = shown.find("#")
        for found in STRANGE.finditer(shown):
            run, start = found.group(), found.start()
            if 0 <= comment < start:
                run, start = invisible(run, start)
            if run:
                span = Span(source, number, start + 1, number, start + 1 + len(run))
                yield Diagnostic("C102", description(run, 0 <= comment < start), span, advice(run))
                count += 1
            if count == MAX_MISTAKES:
                return


def invisible(run: str, start: int) -> tuple[str, int]:
    """The first character of a run that has no place even in a comment, and its column."""
    for offset, char in enumerate(run):
        if unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
            return char, start + offset
    return "", start


def description(run: str, in_comment: bool) -> str:
    """The code point of the first character, and why it is refused."""
    first = run[0]
    name = unicodedata.name(first, "control character" if unicodedata.category(first) == "Cc" else "unnamed")
    why = "is not ASCII"
    if unicodedata.bidirectional(first) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"):
        why = "changes the order in which the text is shown"
    elif unicodedata.category(first) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        why = "is invisible"
    return f"U+{ord(first):04X} {name} {why}{', also in a comment' if in_comment else ''}"


def advice(run: str) -> str:
    """What to write instead."""
    meant = "".join(MEANT.get(char, LOOKALIKES.get(char, unicodedata.normalize("NFKC", char))) for char in run)
    if meant.isascii() and meant.isprintable() and meant.strip():
        return f"write {meant.strip()}"
    if run.isspace():
        return "write an ordinary blank"
    if not run.isprintable():
        return "delete it"
    return "names are written with the letters a-z and A-Z, digits and _"
