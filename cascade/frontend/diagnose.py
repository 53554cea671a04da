"""What is wrong with a text that does not parse: one message for each mistake, in the words of the language.

Each piece of the text is parsed alone. Where the parser stops, the words that it would have taken say what is missing;
what stands there instead says what was probably meant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lark.exceptions import UnexpectedToken

from cascade.errors import Diagnostic, Source
from cascade.frontend.characters import character_mistakes
from cascade.frontend.nodes import (
    PRODUCT, CascadeText, Clause, DefinitionText, Equation, FoldHead, Header, Mistake, fold_of,
)  # fmt: skip
from cascade.frontend.parser import accepted, feed, finish, interactive, parse, scan
from cascade.frontend.pieces import EXAMPLE, MAX_FOUND, Cutter, Piece, after
from cascade.frontend.tokens import CLAUSES, CONNECTIVES, DIRECTIVES, REGION_LINES, WITHIN_LINES, Word, layout
from cascade.ir import Directive, Read
from cascade.ops import RESERVED
from cascade.wording import closest, quote

Definitions = tuple[DefinitionText, ...]


def read_definitions(source: Source) -> tuple[Definitions | None, list[Diagnostic]]:
    """The definitions of a text and its mistakes; None where they leave too little to go on with."""
    found = list(character_mistakes(source))
    if not found:
        try:
            definitions: Definitions = parse(layout(scan(source)), "program")
            return definitions, []
        except (UnexpectedToken, Mistake):
            pass  # said better below, piece by piece
    return diagnose(source, found)


def diagnose(source: Source, found: list[Diagnostic]) -> tuple[Definitions | None, list[Diagnostic]]:
    """The mistakes of a text that does not parse, and what can be built in spite of them."""
    words: list[Word] = []
    try:
        words.extend(scan(source))
    except Mistake as mistake:  # the text is beyond a limit
        return None, [*found, mistake.diagnostic]
    cutter = Cutter()
    cutter.cut(words)
    found += cutter.found
    assembly = Assembly(found)
    for piece in cutter.pieces:
        if len(found) >= MAX_FOUND:
            return None, found
        assembly.take(piece)
    if not found:
        found.append(whole_text(words))
    return assembly.definitions() if cutter.whole else None, found


def whole_text(words: list[Word]) -> Diagnostic:
    """The mistake of a text whose pieces are right alone, so that two of them stand wrongly beside each other."""
    try:
        parse_piece(Piece("program", words))
    except Mistake as mistake:
        return mistake.diagnostic
    return Diagnostic("C105", "this is not a program", words[0].span if words else None, f"write\n{EXAMPLE}")


@dataclass(slots=True, eq=False)
class Assembly:
    """The definitions of a text, put together from its pieces; a statement that is lost keeps its left side."""

    found: list[Diagnostic]
    done: list[DefinitionText] = field(default_factory=list)
    header: Header | None = None
    body: list[Equation] = field(default_factory=list)
    directives: list[Directive] = field(default_factory=list)
    head: FoldHead | None = None  # of the fold at hand, unless it has a mistake: then its lines are passed over
    clauses: list[Clause | None] = field(default_factory=list)  # None for one that is lost
    whole: bool = True  # no header or `def` is lost
    broken_off: str | None = None  # the help for the statement before, if it ended too early

    def take(self, piece: Piece) -> None:
        """The next piece."""
        equation = piece.rule == "statement" and any(word.type == "EQUAL" for word in piece.words)
        if piece.rule == "statement" and (self.broken_off == LIST_GOES_ON or (self.broken_off and not equation)):
            self.broken_off = GOES_ON if self.broken_off == GOES_ON else None
            return  # the rest of the statement before
        if piece.rule in ("clause", "fold_end") and self.passed_over(piece):
            return
        value: Any = None
        self.broken_off = None
        if piece.sound and all(word.isascii() for word in piece.words):  # else its mistake is known
            try:
                value = parse_piece(piece)
            except Mistake as mistake:
                self.found.append(mistake.diagnostic)
                help_ = mistake.diagnostic.help
                self.broken_off = help_ if help_ in (GOES_ON, LIST_GOES_ON) else None
                first = mistake.diagnostic.span == piece.words[0].span
                if self.broken_off and first and piece.rule == "statement" and self.body:
                    self.body[-1] = replace(self.body[-1], expr=None)  # it should have gone on here
                    return
        self.keep(piece, value)

    def keep(self, piece: Piece, value: Any) -> None:
        """Puts what the grammar made of a piece where it belongs; None where the piece is lost."""
        if piece.rule == "statement":
            value = value or lost(piece.words)
            self.body += [value] if value else []
        elif piece.rule == "directive":
            self.directives += [value] if value else []
        elif piece.rule == "fold_head":
            self.head, self.clauses = value, []
        elif piece.rule == "clause":
            self.clauses.append(value)
        elif piece.rule == "header":
            self.end()
            self.header = value
        else:
            self.done += [value] if value else []
        self.whole &= value is not None or piece.rule in IN_SCHEDULE

    def passed_over(self, piece: Piece) -> bool:
        """Whether a piece of a fold is not to be parsed: its end, and what belongs to a mistake before."""
        if self.head is None:
            return True
        if piece.rule == "clause":
            return self.broken_off is not None and piece.words[0] not in CLAUSES
        if len(piece.words) > 1:
            found = piece.words[1]
            message = f"expected the end of the line, found {quote(found)}"
            self.found.append(Diagnostic("C105", message, found.span))
        elif (clauses := [clause for clause in self.clauses if clause is not None]) == self.clauses:
            self.directives.append(fold_of(self.head, clauses))
        self.head = self.broken_off = None
        return True

    def end(self) -> None:
        """The end of the cascade at hand."""
        if self.header is not None:
            name, params, results, given, span = self.header
            body, directives = tuple(self.body), tuple(self.directives)
            self.done.append(CascadeText(name, params, results, given, body, directives, span))
        self.header, self.body, self.directives = None, [], []

    def definitions(self) -> Definitions | None:
        """All definitions, if they are worth going on with."""
        self.end()
        return tuple(self.done) if self.whole else None


IN_SCHEDULE = ("directive", "fold_head", "clause")


def lost(words: list[Word]) -> Equation | None:
    """A statement that cannot be read: only the names on its left are known."""
    left, depth = list[Read](), 0
    for word in words:
        if word.type == "EQUAL":
            return Equation(tuple(left), None, None, (), None, words[0].span.to(words[-1].span)) if left else None
        if word.type in ("NAME", "PRIMED") and depth == 0:
            left.append(Read(word.removesuffix("'"), (), span=word.span))
        depth += {"LSQB": 1, "RSQB": -1}.get(word.type, 0)
    if left and len(words) > 1 and words[0].type in ("NAME", "PRIMED") and words[1].type == "LSQB":
        return Equation((left[0],), None, None, (), None, words[0].span.to(words[-1].span))
    return None


# --- one piece -------------------------------------------------------------------------------------------------------


def parse_piece(piece: Piece) -> Any:
    """What the grammar makes of a piece; raises its mistake."""
    words = layout(piece.words, WITHIN.get(piece.rule, ()))
    if piece.rule != "program":
        words.pop()
    parser, taken = interactive(piece.rule), 0
    try:
        for word in words:
            feed(parser, word)
            taken += 1
        return finish(parser)
    except UnexpectedToken:
        raise explain(piece.rule, words, taken) from None


WITHIN = {"directive": ("schedule",), "fold_head": ("schedule",), "clause": ("fold",)}


def explain(rule: str, words: Sequence[Word], at: int) -> Mistake:
    """The mistake where the parser stopped: what it would have taken there, and what stands there."""
    parser = interactive(rule)
    for word in words[:at]:
        feed(parser, word)
    accepts = accepted(parser)
    before = words[at - 1] if at else None
    found = words[at] if at < len(words) and words[at].type != "_NL" else None
    where = found.span if found is not None else after(before) if before is not None else None
    goes_on = before is None and found is not None and found.type in INFIXES
    if found is not None and found in RESERVED and "NAME" in accepts and not takes_operand(accepts) and not goes_on:
        return Mistake("C201", f"'{found}' is reserved", where, f"choose another name, such as {found}1")
    if before is not None and before.type == "REDUCER" and "LSQB" in accepts and not starts_operand(found):
        return Mistake("C201", f"'{before}' is reserved", before, f"choose another name, such as {before}1")
    wanted = expected(rule, accepts)
    shown = quote(found) if found is not None else "'{'" if rule == "fold_head" else "the end of the line"
    return Mistake("C105", f"expected {wanted}, found {shown}", where, hint(rule, accepts, before, found))


def takes_operand(accepts: frozenset[str]) -> bool:
    """Whether an expression may start here."""
    return "INT" in accepts and "LPAR" in accepts


def starts_operand(found: Word | None) -> bool:
    """Whether a word may begin an expression."""
    return found is not None and found.type in ("NAME", "PRIMED", "REDUCER", "INT", "FLOAT", "LPAR", "MINUS")


def expected(rule: str, accepts: frozenset[str]) -> str:
    """What the parser would have taken, in words."""
    if takes_operand(accepts):
        wanted = ["an operand"]
    elif "NAME" in accepts and "INT" in accepts:
        wanted = ["a number or a shape symbol"]
    elif "TIMES" in accepts:
        wanted = ["an operator", *(SHOWN[kind] for kind in ("RSQB", "RPAR", "COMMA", "EQUAL") if kind in accepts)]
    else:
        wanted = [shown for kind, shown in SHOWN.items() if kind in accepts]
    if "$END" in accepts and not takes_operand(accepts):
        wanted.append("'{'" if rule in ("header", "fold_head") else "the end of the line")
    first, last = ", ".join(wanted[:-1]), wanted[-1] if wanted else "nothing more"
    return f"{first} or {last}" if first else last


SHOWN = {
    "NAME": "a name", "INT": "a number", "LSQB": "'['", "RSQB": "']'", "LPAR": "'('", "RPAR": "')'", "LBRACE": "'{'",
    "RBRACE": "'}'", "COLON": "':'", "COMMA": "','", "EQUAL": "'='", "ARROW": "'->'", "DOT": "'.'", "OVER": "'over'",
    "INTO": "'into'", "AT": "'at'", "ON": "'on'", "BY": "'by'", "IN": "'in'",
    "MESH": "a directive", "STATE": "a line of a fold", "STAGE": "a line of a region",
    "_NL": "the end of the line", "CASCADE": "a cascade", "DEF": "a def",
}  # fmt: skip

INSTEAD = {
    "^": "a power is pow(a, b)",
    "@": "a matrix product names its ranks: Z[m,n] = sum[k] A[m,k] * B[k,n]",
    "&": "write 'and'",
    "|": "write 'or'",
    "!": "write 'not', or '!=' for unequal",
    "~": "write 'not'",
    "?": "a choice is select(condition, a, b); a value in place of an absent one is a ?? b",
    ".": "a number has digits on both sides of its point, as 0.5",
    "\\": "an expression goes on at the next line inside of parentheses",
    "'": "the language has no strings",
    '"': "the language has no strings",
    "$": "names are written with letters, digits and _",
}
GOES_ON = "an expression goes on at the next line inside of parentheses"
LIST_GOES_ON = "a list goes on in the same line"
INFIXES = ("PLUS", "MINUS", "TIMES", "AND", "OR", "COMPARE")
EXTENTS = "a declaration lists extents, as in A[M,K]; a scalar is declared a[]"


def hint(rule: str, accepts: frozenset[str], before: Word | None, found: Word | None) -> str | None:
    """What was probably meant by what stands where the parser stopped."""
    kind = found.type if found is not None else "$END"
    last = before.type if before is not None else ""
    if found is not None and found in INSTEAD:
        return INSTEAD[found]
    if last == "REDUCER" and "LSQB" in accepts:
        return f"the ranks that {before} works along stand in brackets: {before}[k] x"
    if kind == "$END" and takes_operand(accepts):
        return GOES_ON
    if kind == "$END" and last == "COMMA":
        return LIST_GOES_ON
    if before is None and kind in INFIXES:
        return GOES_ON
    if "EQUAL" in accepts and rule in ("statement", "function"):
        return equation_hint(rule, kind, found)
    if kind == "EQUAL":
        return "equality is '=='; a single '=' stands once, behind the left side"
    if kind == "COMPARE" and "AND" in accepts and "COMPARE" not in accepts:
        return "comparisons do not chain: write a < b and b < c"
    if kind == "TIMES" and last == "TIMES" and takes_operand(accepts):
        return "a power is pow(a, b)" if found == before == "*" else None
    if kind == "PRIMED" and "NAME" in accepts and not takes_operand(accepts):
        return "what is defined has no prime: the merge of a fold reads primed names, the states of a part"
    if kind == "EMPTY":
        return "only a first state may be `empty`: init R[m] = empty"
    if kind == "WHERE" and rule == "clause":
        return "what is filtered stands in the statements of the fold: a merge takes every element"
    if rule == "fold_head":
        return "a fold goes along one rank: fold n { ... }"
    if kind == "WHERE":
        return "a filter stands once, at the end of a statement and before `init`"
    if "TIMES" in accepts and kind != "MINUS" and starts_operand(found):
        return PRODUCT
    if rule == "header":
        return EXTENTS if "COLON" in accepts or kind in ("MINUS", "FLOAT") else None
    return directive_hint(accepts, found) if rule in ("directive", "clause") and found is not None else None


def equation_hint(rule: str, kind: str, found: Word | None) -> str | None:
    """What was meant where a `=` is missing."""
    if rule == "function":
        return "write def f(x) = ..."
    if found == "==":
        return "a left side is followed by a single '='"
    if kind in ("PLUS", "MINUS", "TIMES"):
        return "a tensor is defined once, by one equation: Z[m] = ..."
    return "a statement is an equation: Z[m,n] = sum[k] A[m,k] * B[k,n]"


def directive_hint(accepts: frozenset[str], found: Word) -> str | None:
    """The closest word of a schedule, or of a fold in it."""
    if "STAGE" in accepts:
        close = closest(found, REGION_LINES)
        return f"did you mean {quote(close)}?" if close else f"lines of a region: {', '.join(REGION_LINES)}"
    if "STATE" in accepts:
        close = closest(found, CLAUSES)
        return f"did you mean {quote(close)}?" if close else f"lines of a fold: {', '.join(CLAUSES)}"
    words = (
        DIRECTIVES if "MESH" in accepts else [word for word in (*CONNECTIVES, *WITHIN_LINES) if word.upper() in accepts]
    )
    close = closest(found, words)
    if close:
        return f"did you mean {quote(close)}?"
    return f"directives: {', '.join(DIRECTIVES)}" if "MESH" in accepts else None
