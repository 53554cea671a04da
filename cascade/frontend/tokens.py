"""Words of a program text, and the layout that says where a statement ends.

What a grammar cannot say is done here: a newline ends a statement only outside brackets and headers and not before
`where`, `init` or `??`; the words of a schedule are ordinary names everywhere else.
"""

from __future__ import annotations

import codecs
import itertools
from collections.abc import Iterable, Sequence

from cascade.errors import Diagnostic, ParseError, Source, Span

DIRECTIVES = ("mesh", "shard", "split", "fuse", "fold", "group", "tile", "stream", "wait", "region", "bind", "place")
CLAUSES = ("state", "init", "update", "merge", "finalize")  # the lines of a fold
CONNECTIVES = ("over", "into", "at", "on", "by")
REGION_LINES = ("stage", "keep", "spill", "phase", "capacity", "double")
WITHIN_LINES = ("over", "in", "drain")  # inside of a line of a region
AFTER_RESULT = ("RSQB", "INT", "FLOAT", "INF", "NAN", "TRUE", "FALSE")  # the end of a shape, or of a fill
CONTINUES = ("WHERE", "INIT", "DEFAULT", "SCHEDULE")
BYTE_ORDER_MARKS = (
    ("UTF-32", codecs.BOM_UTF32_LE),  # before UTF-16, whose mark is its beginning
    ("UTF-32", codecs.BOM_UTF32_BE),
    ("UTF-16", codecs.BOM_UTF16_LE),
    ("UTF-16", codecs.BOM_UTF16_BE),
)


class Word(str):
    """A token of the grammar, `type` its terminal; a word lies on one line."""

    __slots__ = ("type", "source", "line", "column", "end_column")

    type: str
    source: Source
    line: int
    column: int
    end_column: int

    @classmethod
    def at(cls, text: str, type_: str, source: Source, line: int, column: int) -> Word:
        """The word `text` whose first character stands at a line and column."""
        word = cls(text)
        word.type, word.source, word.line, word.column = type_, source, line, column
        word.end_column = column + (1 if type_ == "_NL" else len(text))
        return word

    @property
    def span(self) -> Span:
        """Where the word stands."""
        return Span(self.source, self.line, self.column, self.line, self.end_column)

    def retyped(self, type_: str) -> Word:
        """The same word as another terminal."""
        return Word.at(self, type_, self.source, self.line, self.column)


def layout(raw: Iterable[Word], within: Sequence[str] = ()) -> list[Word]:
    """The words with an `_NL` exactly where a statement, directive or definition ends, and schedule words told apart.

    A piece of a text may be laid out alone; of a directive, or a line of a fold, one has to know that it is one.
    """
    out: list[Word] = []
    braces = list(within)  # what is in the open ones: a "body", a "schedule", a "fold", a "region", a "set" of names
    depth, header, fresh = 0, False, False
    for word in raw:
        kind, before = word.type, out[-1].type if out else "_NL"
        if kind == "_NL":
            fresh = True
            if depth or header or before in ("_NL", "LBRACE") or braces[-1:] in (["set"], ["region"]):
                continue
            end_clause(out, braces)
        elif kind in ("LPAR", "LSQB"):
            depth += 1
        elif kind in ("RPAR", "RSQB"):
            depth = max(0, depth - 1)
        elif kind == "CASCADE":
            header = not braces
        elif kind == "LBRACE":
            braces.append(held_in(out, before, header, braces))
            depth, header = 0, False
        elif kind == "RBRACE":
            end_clause(out, braces)
            held = braces.pop() if braces else "body"
            if held not in ("set", "region") and before not in ("_NL", "LBRACE"):
                out.append(word.retyped("_NL"))
        elif kind == "NAME" and header and word == "with" and before in AFTER_RESULT:
            word = word.retyped("WITH")
        elif kind == "NAME" and braces[-1:] == ["schedule"]:
            word = schedule_word(word, before)
        elif kind == "NAME" and braces[-1:] == ["region"]:
            word = region_word(word, before, fresh)
        elif kind == "NAME" and braces[-1:] == ["fold"]:
            word = word.retyped(word.upper()) if word in CLAUSES and before in ("_NL", "LBRACE") else word
        elif kind in CONTINUES and before == "_NL" and continues(out, kind) and (kind, *braces[-1:]) != FIRST_STATE:
            out.pop()
        out.append(word)
        fresh = False
    end_clause(out, braces)
    if out and out[-1].type != "_NL":
        last = out[-1]
        out.append(Word.at("", "_NL", last.source, last.line, last.end_column))
    return out


def held_in(out: list[Word], before: str, header: bool, braces: Sequence[str]) -> str:
    """What a brace that opens behind these words holds."""
    if before == "SCHEDULE":
        return "schedule"
    if header:
        return "body"
    if "FOLD" in (before, *(word.type for word in out[-2:-1])):
        return "fold"
    if braces[-1:] != ["schedule"]:
        return "set"
    line = itertools.takewhile(lambda word: word.type not in ("_NL", "LBRACE"), reversed(out))
    return "region" if "REGION" in {word.type for word in line} else "set"


FIRST_STATE = ("INIT", "fold")  # in a fold, `init` starts a line


def end_clause(out: list[Word], braces: Sequence[str]) -> None:
    """At the end of a line of a fold: `empty` that stands alone behind its `=` is the word."""
    if braces[-1:] == ["fold"] and len(out) > 1 and out[-1] == "empty" and out[-2].type == "EQUAL":
        out[-1] = out[-1].retyped("EMPTY")


def continues(out: list[Word], kind: str) -> bool:
    """Whether a word of `CONTINUES` belongs to the line before it: a `;` ends it for good."""
    return len(out) > 1 and out[-1] != ";" and (out[-2].type == "RBRACE") == (kind == "SCHEDULE")


def schedule_word(word: Word, before: str) -> Word:
    """A name inside a schedule as the directive or connective it is there: first of its line, or after an operand."""
    first, after_operand = before in ("_NL", "LBRACE"), before in ("NAME", "INT", "RBRACE")
    known = DIRECTIVES if first else CONNECTIVES if after_operand else ()
    return word.retyped(word.upper()) if word in known else word


def region_word(word: Word, before: str, fresh: bool) -> Word:
    """A name inside a region as the word that it is there: first of its line, or after an operand."""
    first, after_operand = fresh or before == "LBRACE", before in ("NAME", "INT", "RBRACE")
    known = REGION_LINES if first else WITHIN_LINES if after_operand else ()
    return word.retyped(word.upper()) if word in known else word


def decode(data: bytes, name: str = "<text>") -> str:
    """The text of a program file in UTF-8, with or without a byte order mark; an error names the byte and its place."""
    for encoding, mark in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            message = f"the text is {encoding}, not UTF-8: it starts with the byte order mark {mark.hex(' ').upper()}"
            raise undecodable(data, name, 0, message)
    nul = data.find(0)
    if nul >= 0:
        near = data[max(0, nul - 8) : nul + 8]
        guess = "; the text looks like UTF-16" if near.count(0) * 3 >= len(near) > 1 else ""
        raise undecodable(data, name, nul, f"NUL (byte 0x00) at offset {nul}{guess}")
    try:
        return data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        start = error.start
        message = f"byte 0x{data[start]:02X} at offset {start} is not UTF-8 ({error.reason})"
        raise undecodable(data, name, start, message) from None


def undecodable(data: bytes, name: str, offset: int, message: str) -> ParseError:
    """The error for a byte of a file, placed by the lines and characters before it."""
    source = Source(name, data.decode("utf-8", errors="replace"))
    line = data.count(b"\n", 0, offset) + 1
    column = len(data[data.rfind(b"\n", 0, offset) + 1 : offset].decode("utf-8", errors="replace")) + 1
    return ParseError(
        Diagnostic("C101", message, Span(source, line, column, line, column + 1), "save the file as UTF-8")
    )
