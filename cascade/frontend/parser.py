"""The one lark parser: built once, at the first text. Words in, the values of `nodes.py` out."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, cast

from lark import Lark, Token
from lark.parsers.lalr_interactive_parser import InteractiveParser

from cascade.errors import Source
from cascade.frontend import tables
from cascade.frontend.nodes import Mistake, Nodes
from cascade.frontend.tokens import Word

MAX_WORDS = 20_000  # of one statement: far above what anybody writes, far below what takes a second to parse


@functools.cache
def grammar() -> Lark:
    """The parser for `grammar.lark`. Lark caches no table on disk: it would unpickle it."""
    lark = tables.parser(Nodes())
    lark.lexer = lark._build_lexer()  # `Lark.lex` makes one for every text where there is none
    return lark


def scan(source: Source) -> Iterator[Word]:
    """The words of a text as lark finds them, newlines inside brackets included."""
    count = depth = 0
    for token in grammar().lex(source.text or ""):
        kind = token.type
        word = Word.at(token, kind, source, cast(int, token.line), cast(int, token.column))
        depth = depth + 1 if kind in ("LPAR", "LSQB") else depth - 1 if kind in ("RPAR", "RSQB") else depth
        if kind in ("EQUAL", "LBRACE", "RBRACE") or (kind == "_NL" and depth <= 0):
            count = depth = 0
        count += 1
        if count > MAX_WORDS:
            help_ = "give its parts statements of their own; a sum over a rank is sum[k]"
            raise Mistake("C106", f"a statement is longer than {MAX_WORDS} words, the limit", word, help_)
        yield word


def parse(words: Sequence[Word], start: str) -> Any:
    """What the rule `start` makes of the words; raises lark's UnexpectedToken or a Mistake."""
    parser = interactive(start)
    for word in words:
        feed(parser, word)
    return finish(parser)


def interactive(start: str) -> InteractiveParser:
    """A parser that takes one word after the other."""
    return grammar().parse_interactive("", start=start)


def feed(parser: InteractiveParser, word: Word) -> None:
    """Gives the parser its next word; of a lark token it uses no more than the type."""
    parser.feed_token(cast(Token, word))


def finish(parser: InteractiveParser) -> Any:
    """What the rule makes of the words so far, if it may end here."""
    return parser.feed_eof()  # type: ignore[no-untyped-call]


def accepted(parser: InteractiveParser) -> frozenset[str]:
    """The terminals that the parser would take next."""
    return frozenset(parser.accepts())  # type: ignore[no-untyped-call]
