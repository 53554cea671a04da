"""Fields of TOML files, read with their paths: one error says which field of which file is wrong, and what fits there.

Nothing in a file is executed. A key that stands twice is refused by the TOML reader, one that means nothing by `done`.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from cascade.errors import CommandError, Diagnostic, quoted_list
from cascade.wording import suggest

T = TypeVar("T")


def load_toml(text: str, where: str) -> dict[str, Any]:
    """The tables of a TOML text; raises C620 with the line that is none."""
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise CommandError(Diagnostic("C620", f"{where} is no TOML file: {error}")) from None


def read_text(path: str) -> str:
    """The text of a file; raises C620 where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise CommandError(Diagnostic("C620", f"cannot read {path}: {reason}")) from None


@dataclass(slots=True)
class Table:
    """One table of a file: its place, its values, and which of them were asked for."""

    where: str  # the file
    path: str  # of the table in it; "" for the file itself
    values: dict[str, Any]
    asked: set[str] = field(default_factory=set)

    def refuse(self, key: str, wanted: str) -> NoReturn:
        """Raises C621 for the value of a key: its path, what it is, what it could be."""
        place = f"{self.path}.{key}" if self.path else key
        found = f"is {_shown(self.values[key])}" if key in self.values else "is missing"
        raise CommandError(Diagnostic("C621", f"{self.where}: {place} {found}", help=f"it is {wanted}"))

    def _get(self, key: str, wanted: str, default: T | None, check: Callable[[Any], T | None]) -> T:
        self.asked.add(key)
        if key not in self.values and default is not None:
            return default
        found = check(self.values.get(key))
        if found is None:
            self.refuse(key, wanted)
        return found

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        """A finite number from `low` to `high`."""
        return self._get(key, f"a number from {low:g} to {high:g}", default, lambda v: _number(v, low, high))

    def maybe(self, key: str, low: float, high: float) -> float | None:
        """A number in the range, None where the key is missing."""
        self.asked.add(key)
        return self.number(key, low, high) if key in self.values else None

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number from `low` to `high`; 1e9 is one."""
        wanted = f"a whole number from {low} to {high}"
        return self._get(key, wanted, default, lambda v: _whole(v, low, high))

    def text(self, key: str, default: str | None = None) -> str:
        """A text."""
        return self._get(key, "a text", default, lambda v: v if isinstance(v, str) else None)

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str:
        """One of some words."""
        return self._get(key, f"one of {quoted_list(allowed)}", default, lambda v: v if v in allowed else None)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        return self._get(key, "true or false", default, lambda v: v if isinstance(v, bool) else None)

    def texts(self, key: str, default: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """A list of texts."""

        def check(value: Any) -> tuple[str, ...] | None:
            fits = isinstance(value, list) and all(isinstance(item, str) for item in value)
            return tuple(value) if fits else None

        return self._get(key, "a list of texts", default, check)

    def table(self, key: str, needed: bool = False) -> Table:
        """The table of that key; an empty one where it may be missing."""
        self.asked.add(key)
        value = self.values.get(key, None if needed else {})
        if not isinstance(value, dict):
            self.refuse(key, "a table")
        return Table(self.where, f"{self.path}.{key}" if self.path else key, value)

    def tables(self, key: str) -> list[Table]:
        """The tables of an array of tables."""
        self.asked.add(key)
        value = self.values.get(key, [])
        if not (isinstance(value, list) and all(isinstance(item, dict) for item in value)):
            self.refuse(key, "an array of tables")
        path = f"{self.path}.{key}" if self.path else key
        return [Table(self.where, f"{path}[{number}]", item) for number, item in enumerate(value)]

    def names(self) -> Iterator[str]:
        """The keys, each asked for."""
        self.asked.update(self.values)
        return iter(self.values)

    def done(self) -> None:
        """Raises C621 for a key that nobody asked for: a misspelt one would change nothing, silently."""
        for key in self.values:
            if key not in self.asked:
                place = f"{self.path}.{key}" if self.path else key
                message = f"{self.where}: {place} means nothing here"
                raise CommandError(Diagnostic("C621", message, help=suggest(key, sorted(self.asked), "the keys are")))


def _number(value: Any, low: float, high: float) -> float | None:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return value if fits and low <= value <= high else None


def _whole(value: Any, low: int, high: int) -> int | None:
    found = _number(value, low, high)
    return int(found) if found is not None and found == int(found) else None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
