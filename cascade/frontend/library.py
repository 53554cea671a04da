"""The library of the language: definitions that a text may use without having them, from `library.cascade`."""

from __future__ import annotations

import functools
import re
from pathlib import Path

from cascade.errors import Source

HEADS = re.compile(r"^(def|cascade) ([A-Za-z_][A-Za-z0-9_]*)", re.MULTILINE)


@functools.cache
def library_source() -> Source:
    """The text of the library."""
    path = Path(__file__).with_name("library.cascade")
    return Source(str(path), path.read_text(encoding="utf-8"))


@functools.cache
def library_names() -> dict[str, bool]:
    """The names that the library defines, and whether they are cascades; found without parsing it."""
    return {name: word == "cascade" for word, name in HEADS.findall(library_source().text or "")}
