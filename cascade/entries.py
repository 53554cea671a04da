"""What lies in the cache folder: every kind of entry, how large it is, whether it holds, and how it is removed.

    listed()                      all entries: kind, file, bytes, when they were written
    damage(entry)                 why an entry does not hold, as its reader would find; None where it does
    removed(entries)              those that are gone afterwards

Entries are told by folder and name; whatever else lies there was not written by cascade and is not touched, and nor are
folders. Other processes may read and write meanwhile: an entry that vanishes was removed by someone else, and a file
that is being written is left alone until it is an hour old.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import stat
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.passes.memo import opened
from cascade.pipeline import REPRODUCE, bug_hash
from cascade.settings import settings

ABANDONED_S = 3600.0
"""A file that is still being written after so long is what an interrupted process left."""
HASHED = r"[0-9a-f]{64}\.json"
WRITING = r"\.(?:{})\.[a-z0-9_]{{8}}"
"""The name of a file until it is renamed, see `files.py`."""


@dataclass(frozen=True, slots=True)
class Kind:
    """What one folder of the cache holds: the form of its names, and what is wrong with a text that does not hold."""

    name: str
    holds: str
    files: str
    damage: Callable[[Path, bytes], str | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One file that cascade wrote: its kind, bytes, when it was written; `unfinished` until it is renamed."""

    kind: str
    path: Path
    size: int
    written: float
    unfinished: bool = False

    def age(self, now: float) -> float:
        """Seconds since it was written."""
        return max(0.0, now - self.written)


def _sealed(path: Path, content: bytes) -> str | None:
    """What is wrong with an entry that has the hash of its content in its first line."""
    try:
        opened(_text(content))
    except (ValueError, KeyError, TypeError) as error:
        return f"{error}" if str(error).startswith("its hash") else "its content is none that is known"
    return None


def _text(content: bytes) -> str:
    """The content as `read_text` gives it."""
    return io.TextIOWrapper(io.BytesIO(content), encoding="utf-8").read()


def _timed(path: Path, content: bytes) -> str | None:
    """The same for tiles that were timed."""
    known: Callable[[Any], bool] = importlib.import_module("cascade.backends.triton.tune").is_entry
    return _sealed(path, content) or (None if known(opened(_text(content))) else "its content is no choice of tiles")


def _reproducer(path: Path, content: bytes) -> str | None:
    """The same for the program that shows a bug, whose name has the hash of what happened and of the program."""
    told, *program = re.split(rf"^{REPRODUCE}.*\n", content.decode(), maxsplit=1, flags=re.M)
    if not program or path.stem != f"bug-{bug_hash(told, program[0])}":
        return "its name is not the hash of its content: it was edited"
    return None


KINDS = {
    kind.name: kind
    for kind in (
        Kind("lifts", "what lifting decided", HASHED, _sealed),
        Kind("tuned", "tiles that were timed", HASHED, _timed),
        Kind("bugs", "programs that show a bug in cascade", r"bug-[0-9a-f]{12}\.cascade", _reproducer),
    )
}
"""Every kind of entry, by the name of its folder. Machine code is kept by Triton, in a folder of its own."""


def listed(kinds: Collection[str] = (), older_than: float = 0.0, now: float | None = None) -> tuple[Entry, ...]:
    """The entries of these kinds, all where none is named, that are at least so many seconds old."""
    moment = time.time() if now is None else now
    chosen = [kind for kind in KINDS.values() if not kinds or kind.name in kinds]
    found = (entry for kind in chosen for entry in _of(kind, settings().cache_dir / kind.name))
    return tuple(entry for entry in found if entry.age(moment) >= older_than)


def _of(kind: Kind, folder: Path) -> Iterator[Entry]:
    """The entries in the folder of a kind; files only, never what a link leads to."""
    for path, facts in _files(folder):
        writing = re.fullmatch(WRITING.format(kind.files), path.name) is not None
        if writing or re.fullmatch(kind.files, path.name):
            yield Entry(kind.name, path, facts.st_size, facts.st_mtime, writing)


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The plain files of a folder, in order; none where there is no such folder, or where it cannot be read."""
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = sorted(os.listdir(folder))
    for name in names:
        with contextlib.suppress(OSError):  # removed by another process meanwhile
            facts = (folder / name).lstat()
            if stat.S_ISREG(facts.st_mode):
                yield folder / name, facts


def strangers() -> tuple[Path, ...]:
    """What lies in the cache folder and was not written by cascade."""
    folder = settings().cache_dir
    ours = {entry.path for entry in listed()} | {folder / kind for kind in KINDS}
    found: list[Path] = []
    for place in (folder, *(folder / kind for kind in KINDS)):
        with contextlib.suppress(OSError):
            found += [path for path in sorted(place.iterdir()) if path not in ours]
    return tuple(found)


def damage(entry: Entry) -> str | None:
    """Why an entry does not hold, asked as its reader asks; None where it does, or where it is gone by now."""
    if entry.unfinished:
        return None
    try:
        return KINDS[entry.kind].damage(entry.path, entry.path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    except UnicodeDecodeError:
        return "it is no text"


def removed(entries: Sequence[Entry], now: float | None = None) -> tuple[tuple[Entry, ...], tuple[Entry, ...]]:
    """Removes entries: those that are gone, and those that could not be removed or may still be written."""
    moment = time.time() if now is None else now
    gone: list[Entry] = []
    left: list[Entry] = []
    for entry in entries:
        if entry.unfinished and entry.age(moment) < ABANDONED_S:
            left.append(entry)
            continue
        try:
            entry.path.unlink(missing_ok=True)
        except OSError:
            left.append(entry)
        else:
            gone.append(entry)
    return tuple(gone), tuple(left)


# --- as JSON ---------------------------------------------------------------------------------------------------------


def entry_json(entry: Entry, now: float) -> dict[str, Any]:
    """One entry with stable keys."""
    return {
        "kind": entry.kind,
        "path": str(entry.path),
        "bytes": entry.size,
        "age_s": round(entry.age(now), 1),
        "unfinished": entry.unfinished,
    }


def sizes_json() -> dict[str, Any]:
    """How many entries of each kind there are, and their bytes; what else lies there."""
    entries = listed()
    kinds = {
        kind.name: {
            "holds": kind.holds,
            "entries": sum(entry.kind == kind.name for entry in entries),
            "bytes": sum(entry.size for entry in entries if entry.kind == kind.name),
        }
        for kind in KINDS.values()
    }
    return {
        "folder": str(settings().cache_dir),
        "kinds": kinds,
        "entries": len(entries),
        "bytes": sum(entry.size for entry in entries),
        "strangers": [str(path) for path in strangers()],
    }
