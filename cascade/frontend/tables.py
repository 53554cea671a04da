"""The tables of the parser, computed ahead: lark needs a quarter of a second for them, much of what a command takes.

`grammar.json` holds them as text, with the digest of `grammar.lark` and the version of lark that they are from: for any
other they are computed anew, and right all the same. `python -m cascade.frontend.tables` writes the file again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lark
from lark import Lark, Token
from lark.grammar import Rule
from lark.lexer import TerminalDef

FILE = Path(__file__).with_name("grammar.json")
STARTS = ("program", "header", "statement", "directive", "fold_head", "clause", "function")
GIVEN = ("transformer", "postlex")  # what a parser is told as it is made, and no table says


class KeepUnknown:
    """Tells lark not to drop the terminal that no rule takes."""

    always_accept = ("UNKNOWN",)

    def process(self, stream: Iterator[Token]) -> Iterator[Token]:
        return stream


def grammar() -> str:
    """The grammar as it is written."""
    return FILE.with_suffix(".lark").read_text(encoding="utf-8")


def parser(transformer: Any) -> Lark:
    """The parser for the grammar, from its tables where these are of this grammar and this lark."""
    text, found = grammar(), json.loads(FILE.read_text(encoding="utf-8"), object_hook=_numbered)
    if (found["lark"], found["grammar"]) != (lark.__version__, _digest(text)):
        return computed(text, transformer)
    given = {"transformer": transformer, "postlex": KeepUnknown()}
    loaded: Lark = Lark._load_from_dict(found["data"], found["memo"], **given)  # type: ignore[no-untyped-call]
    return loaded


def computed(text: str, transformer: Any = None) -> Lark:
    """The parser for a grammar, its tables computed."""
    given = {"transformer": transformer, "postlex": KeepUnknown()}
    return Lark(text, parser="lalr", lexer="basic", start=list(STARTS), **given)


def tables() -> str:
    """The tables of the grammar as text."""
    text = grammar()
    data, memo = computed(text).memo_serialize([TerminalDef, Rule])
    data["options"] = {name: value for name, value in data["options"].items() if name not in GIVEN}
    found = {"lark": lark.__version__, "grammar": _digest(text), "data": data, "memo": memo}
    return json.dumps(found, separators=(",", ":")) + "\n"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _numbered(read: dict[str, Any]) -> dict[Any, Any]:
    """Keys as they were: JSON has no numbers there."""
    return {int(key) if key.isdigit() else key: value for key, value in read.items()}


if __name__ == "__main__":
    FILE.write_text(tables(), encoding="utf-8")
