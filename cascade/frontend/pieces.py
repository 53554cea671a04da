"""A text that does not parse, cut into the pieces that can be parsed alone: headers, statements, directives, `def`s.

A fold is cut into its head, its lines ("clause") and its end, so that a mistake in one line says nothing about others.

Statements end at newlines, so that a mistake in one says nothing about the next. Brackets are matched here; where one
is never closed, its piece ends before the first line that can only be a new one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cascade.errors import Diagnostic, Note, Span
from cascade.frontend.tokens import Word

OPENS = ("LPAR", "LSQB")
CLOSES = {"RPAR": "LPAR", "RSQB": "LSQB", "RBRACE": "LBRACE"}
PARTNER = {"(": ")", "[": "]", "{": "}"}
NEVER_ENCLOSED = ("CASCADE", "DEF", "SCHEDULE", "EQUAL", "LBRACE", "RBRACE")
UNFINISHED = ("body", "schedule", "brace", "fold")
RULES = {"body": "statement", "fold": "clause"}
MAX_FOUND = 20
EXAMPLE = """\
    cascade matmul(A[M,K], B[K,N]) -> Z[M,N] {
        Z[m,n] = sum[k] A[m,k] * B[k,n] }"""


@dataclass(slots=True)
class Piece:
    """Words that one rule of the grammar takes; not `sound` where a bracket in it is wrong."""

    rule: str
    words: list[Word] = field(default_factory=list)
    sound: bool = True


@dataclass(slots=True, eq=False)
class Cutter:
    """Goes through the words once, keeping the open brackets and where in a cascade it is."""

    pieces: list[Piece] = field(default_factory=list)
    found: list[Diagnostic] = field(default_factory=list)
    whole: bool = True  # every brace has its partner, nothing stands outside of a definition
    inside: str = "top"  # or "stray", "body", "end" (of a body), "brace" (of a schedule, expected), "schedule", "fold"
    brace: Word | None = None  # the one that opened the body, the schedule or the fold
    outer: Word | None = None  # the one of the schedule around a fold
    tail: Piece | None = None  # the end of a fold, to which the rest of its line belongs
    open: list[Word] = field(default_factory=list)
    piece: Piece | None = None

    def cut(self, words: Sequence[Word]) -> None:
        """All pieces of a text."""
        for number, word in enumerate(words):
            if len(self.found) >= MAX_FOUND:
                self.whole = False
                return
            if word.type == "_NL":
                self.newline(word, words[number + 1].type if number + 1 < len(words) else "_NL")
            else:
                self.take(word)
        if self.open:
            self.unclosed(None)
        self.end()
        if self.inside in UNFINISHED:
            self.unclosed_brace()

    def newline(self, word: Word, following: str) -> None:
        """A newline ends a piece outside brackets and headers, unless the next line continues it."""
        self.tail = None
        goes_on = following in ("WHERE", "INIT", "DEFAULT") and (following != "INIT" or self.inside != "fold")
        if self.piece is None:
            if self.inside == "end" and following != "SCHEDULE":
                self.inside = "top"
        elif self.open or self.piece.rule == "header" or (goes_on and word != ";"):
            self.piece.words.append(word)
        elif self.heads_fold():
            self.found.append(Diagnostic("C105", "expected '{' after the head of a fold", after(self.piece.words[-1])))
            self.piece.sound = False
            self.start_fold(None)
        else:
            self.end()

    def take(self, word: Word) -> None:
        """One word that is no newline."""
        kind = word.type
        if self.open and kind in NEVER_ENCLOSED and self.new_piece_at(word):
            self.unclosed(word)
        elif self.piece and self.piece.rule == "header" and self.ends_header(kind):
            self.header_without_brace(word)
        elif kind in ("CASCADE", "DEF") and self.piece is None:
            if self.inside in UNFINISHED:
                self.unclosed_brace()
            self.inside = "top"
            self.piece = Piece("header" if kind == "CASCADE" else "function", [word])
        elif kind == "LBRACE":
            self.left_brace(word)
        elif kind == "RBRACE" and not self.open:
            self.right_brace(word)
        elif kind == "SCHEDULE" and self.inside == "end":
            self.inside, self.brace = "brace", word
        else:
            self.add(word)

    def ends_header(self, kind: str) -> bool:
        """Whether a word shows that the brace after a header is missing; `with n = N` belongs to it."""
        assert self.piece is not None
        return kind in ("DEF", "CASCADE", "RBRACE") or (kind == "EQUAL" and "with" not in self.piece.words)

    def add(self, word: Word) -> None:
        """A word of a piece."""
        if self.piece is None:
            if self.inside in ("top", "end"):
                self.inside, self.whole = "stray", False
                self.found.append(Diagnostic("C105", OUTSIDE, word.span, f"write it inside of one:\n{EXAMPLE}"))
            if self.inside == "brace":
                self.unclosed_brace()
                self.inside, self.brace = "schedule", None
            if self.inside == "stray":
                self.piece = Piece("stray", [word])
                return
            self.piece = self.tail or Piece(RULES.get(self.inside, "directive"))
        self.piece.words.append(word)
        if word.type in OPENS:
            self.open.append(word)
        elif word.type in CLOSES:
            self.close(word)

    # --- brackets

    def close(self, word: Word) -> None:
        """A closing bracket; after a wrong one, the rest of the piece is not looked at."""
        assert self.piece is not None
        if self.open and self.open[-1].type == CLOSES[word.type]:
            self.open.pop()
            return
        if self.piece.sound and self.piece.rule != "stray":
            notes = (Note(f"'{self.open[-1]}' is opened here", self.open[-1].span),) if self.open else ()
            what = f"does not close '{self.open[-1]}'" if self.open else "closes nothing"
            self.found.append(Diagnostic("C104", f"'{word}' {what}", word.span, None, notes))
        self.piece.sound = False
        self.open.clear()

    def new_piece_at(self, word: Word) -> bool:
        """Whether a word that no bracket can enclose shows that a bracket is not closed: it is on a later line."""
        last = self.open[-1]
        if word.type in ("CASCADE", "DEF"):
            return self.piece is not None and self.piece.words[-1].type == "_NL"
        if word.type == "RBRACE":
            return last.type != "LBRACE"
        if word.type == "LBRACE":
            return self.piece is not None and self.piece.rule == "header"
        if self.piece is not None and self.piece.words[0] == "region" and self.inside == "schedule":
            return False  # loops of stages have a `=`
        return word.line > last.line and not (self.piece is not None and self.piece.rule == "header")

    def unclosed(self, word: Word | None) -> None:
        """Reports the innermost open bracket and goes on after its piece: with the line of `word`, or `word` itself."""
        piece, opener = self.piece, self.open[-1]
        if piece is not None and piece.rule != "stray" and piece.sound:
            help_ = f"close it with '{PARTNER[opener]}'"
            self.found.append(Diagnostic("C104", f"'{opener}' is never closed", opener.span, help_))
        self.open.clear()
        line: list[Word] = []
        if piece is not None:
            piece.sound = False
            line = line_before(piece.words, word) if word is not None and word.type == "EQUAL" else []
        if piece is None or piece.rule != "header" or word is None or word.type != "LBRACE":
            self.end()
        for again in (*line, *([word] if word is not None else [])):
            self.take(again)

    # --- braces

    def left_brace(self, word: Word) -> None:
        """The start of a body or a schedule, or of the names in a directive."""
        if self.piece is not None and self.piece.rule == "header":
            self.end()
            self.inside, self.brace = "body", word
        elif self.piece is None and self.inside == "brace":
            self.inside, self.brace = "schedule", word
        elif self.heads_fold():
            self.start_fold(word)
        elif self.piece is None and self.inside == "fold" and self.brace is None:
            self.brace = word
        else:
            self.add(word)
            self.open.append(word)

    def right_brace(self, word: Word) -> None:
        """The end of a body, a schedule or a fold."""
        self.end()
        if self.inside == "fold":
            self.inside, self.brace = "schedule", self.outer
            self.tail = Piece("fold_end", [word])
            self.pieces.append(self.tail)
            return
        if self.inside in ("body", "schedule"):
            self.inside = "end" if self.inside == "body" else "top"
        elif self.inside != "stray":
            self.complain("C104", f"'{word}' closes nothing", word.span)
            self.inside = "top"

    def heads_fold(self) -> bool:
        """Whether the piece at hand is the head of a fold, the open brackets aside."""
        return self.inside == "schedule" and self.piece is not None and self.piece.words[0] == "fold"

    def start_fold(self, brace: Word | None) -> None:
        """The start of the lines of a fold, behind its head."""
        assert self.piece is not None
        self.piece.rule = "fold_head"
        self.end()
        self.inside, self.outer, self.brace = "fold", self.brace, brace

    def unclosed_brace(self) -> None:
        """Reports the brace of a body or schedule that goes on to the end, or into the next definition."""
        if self.brace is not None and self.brace.type == "SCHEDULE":
            self.complain("C105", "expected '{' after 'schedule'", after(self.brace))
        elif self.brace is not None:
            self.found.append(Diagnostic("C104", "'{' is never closed", self.brace.span, "close it with '}'"))
        self.whole = False

    def header_without_brace(self, word: Word) -> None:
        """Reports a header that runs into what should be its body, or into the next definition."""
        assert self.piece is not None
        words = self.piece.words
        line = line_before(words, word) if word.type == "EQUAL" and words[0].line < word.line else []
        last = next(w for w in reversed(words) if w.type != "_NL")
        self.complain("C105", "expected '{' after the header", after(last), whole=self.whole)
        self.piece.sound = False
        self.end()
        self.inside, self.brace = "body", None
        for again in (*line, word):
            self.take(again)

    # --- pieces

    def end(self) -> None:
        """The end of the piece at hand."""
        if self.piece is not None and self.piece.rule != "stray" and self.piece is not self.tail:
            self.pieces.append(self.piece)
        self.piece = None

    def complain(self, code: str, message: str, span: Span, whole: bool = False) -> None:
        """Notes a mistake of structure."""
        self.found.append(Diagnostic(code, message, span))
        self.whole = whole


OUTSIDE = "this stands outside of a cascade"


def line_before(words: list[Word], word: Word) -> list[Word]:
    """Takes from the end of `words` those that stand on the line of `word`."""
    start = len(words)
    while start and words[start - 1].line == word.line and words[start - 1].type != "_NL":
        start -= 1
    line = words[start:]
    del words[start:]
    return line


def after(word: Word) -> Span:
    """The place right after a word."""
    return Span(word.source, word.line, word.end_column, word.line, word.end_column + 1)
