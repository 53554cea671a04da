"""Every environment variable that cascade reads: typed, documented here, read once.

    CASCADE_CHECK      0  verify on entry and exit of the pipeline only
                       1  verify after every pass (default)
                       2  also text round trip and interpreter equality on tiny random inputs after every pass
    CASCADE_DEBUG      0  silent (default)
                       1  one line per pass on standard error: statements before and after, milliseconds
                       2  also the diff of every pass that changed something
                       3  also the whole text after every pass
                       4  also the Python traceback of an error that the command reports
    CASCADE_DUMP       a folder that receives the text of every step of every pipeline run
    CASCADE_CACHE_DIR  the folder of caches and bug reproducers (default: cascade in the user's cache folder)

A fifth variable needs an entry in DECISIONS.md. `_CASCADEC_COMPLETE` is set by the shell that asks for completions.
"""

from __future__ import annotations

import difflib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cascade.errors import CommandError, Diagnostic

KNOWN = ("CASCADE_CHECK", "CASCADE_DEBUG", "CASCADE_DUMP", "CASCADE_CACHE_DIR")
"""The variables, in the order of the fields of `Settings`."""
COMPLETION = "_CASCADEC_COMPLETE"
"""What a shell sets where it wants completions of a command line."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The values of the environment variables, one field each."""

    check: int
    debug: int
    dump: Path | None
    cache_dir: Path


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable that is known, or that is set and looks as if it were one.

    `value` is what it is set to, None where it is not; `nearest` the known one that an unknown one may be meant for;
    `refused` why its value cannot be used.
    """

    name: str
    value: str | None
    nearest: str | None = None
    refused: str | None = None

    @property
    def known(self) -> bool:
        """Whether cascade reads it."""
        return self.name in KNOWN


def variables(environ: Mapping[str, str] | None = None) -> tuple[Variable, ...]:
    """Every known variable, then those that begin alike and mean nothing; none of them raises."""
    given = os.environ if environ is None else environ
    found = [Variable(name, given.get(name), None, _refused(given, name)) for name in KNOWN]
    for name in sorted(given):
        if name.startswith("CASCADE") and name not in KNOWN:
            close = difflib.get_close_matches(name, KNOWN, n=1)
            found.append(Variable(name, given[name], close[0] if close else None))
    return tuple(found)


def _refused(environ: Mapping[str, str], name: str) -> str | None:
    """Why the value of one variable cannot be used, None where it can."""
    try:
        read({name: environ[name]} if name in environ else {})
    except CommandError as error:
        return error.diagnostics[0].help
    return None


def cache_folder(environ: Mapping[str, str] | None = None) -> Path:
    """The folder of caches, whatever the other variables hold."""
    given = os.environ if environ is None else environ
    return folder(given, "CASCADE_CACHE_DIR") or user_cache(given) / "cascade"


def completion_asked() -> str | None:
    """What the shell asks of its completion, `bash_complete`; None where this is a command of its own."""
    return os.environ.get(COMPLETION) or None


@functools.cache
def settings() -> Settings:
    """The settings of this process, read from the environment at the first call."""
    return read(os.environ)


def read(environ: Mapping[str, str]) -> Settings:
    """The settings that an environment states; a bad value is an error, never a silent default."""
    return Settings(
        check=level(environ, "CASCADE_CHECK", 1, 2),
        debug=level(environ, "CASCADE_DEBUG", 0, 4),
        dump=folder(environ, "CASCADE_DUMP"),
        cache_dir=cache_folder(environ),
    )


def level(environ: Mapping[str, str], name: str, default: int, highest: int) -> int:
    """The whole number from 0 to `highest` that the variable holds; an empty one counts as not set."""
    text = environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit()) or int(text) > highest:
        raise bad(name, text, f"set it to a whole number from 0 to {highest}, or unset it for {default}")
    return int(text)


def folder(environ: Mapping[str, str], name: str) -> Path | None:
    """The folder that the variable names; it need not exist yet, but nothing else may stand in its place."""
    text = environ.get(name, "")
    if not text.strip():
        return None
    path = Path(text).expanduser()
    if os.path.exists(path) and not os.path.isdir(path):  # not those of Path: they raise where nobody may look
        raise bad(name, text, "set it to a folder; this is a file")
    return path


def user_cache(environ: Mapping[str, str]) -> Path:
    """The user's cache folder by the XDG convention."""
    return Path(environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")


def bad(name: str, value: str, help_line: str) -> CommandError:
    """The error for a variable whose value cannot be used."""
    return CommandError(Diagnostic("C601", f"environment variable {name} is {value!r}", help=help_line))
