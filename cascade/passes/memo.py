"""What lifting decided, kept in memory and on disk: the same map is not decided twice, in this process or another.

A key says all that an answer depends on: the reducer, the element types, the domain and the map over atoms. An entry is
one file, written whole and renamed, with the hash of its content; one that does not hold is a miss and a warning. It is
JSON, read into a closed set of values: nothing in a file is ever run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import warnings
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from cascade.errors import CommandError
from cascade.files import write_whole
from cascade.ir import Apply, Const, Local
from cascade.passes.prove import Proof
from cascade.passes.separate import Family, Separation, Terms
from cascade.settings import settings

VERSION = "5"  # another one whenever an answer may change
KNOWN: dict[str, type] = {c.__name__: c for c in (Apply, Const, Local, Proof, Family, Separation, Terms)}
MEMORY: dict[str, Any] = {}
RECENT: deque[tuple[object, object, Any]] = deque(maxlen=16)  # what was asked of the very same objects, spans and all
T = TypeVar("T")


def recent(subject: object, option: object, compute: Callable[[], T]) -> T:
    """What `compute` gives of an object, where it was not asked of this very one just before.

    By identity: an equal cascade may stand in another file, and its spans are other ones.
    """
    for known, asked, answer in RECENT:
        if known is subject and asked == option:
            value: T = answer
            return value
    found = compute()
    RECENT.append((subject, option, found))
    return found


def remembered(kind: str, key: tuple[str, ...], compute: Callable[[], T]) -> T:
    """What `compute` gives, from memory or disk where it was computed before for an equal key."""
    digest = hashlib.sha256(json.dumps([VERSION, kind, *key]).encode()).hexdigest()
    if digest not in MEMORY:
        path = settings().cache_dir / "lifts" / f"{digest}.json"
        found = load(path)
        if found is None:
            found = compute()
            store(path, found)
        MEMORY[digest] = found
    value: T = MEMORY[digest]
    return value


def load(path: Path) -> Any:
    """The value of an entry; None, and a warning where there is one, for none that holds."""
    try:
        return opened(path.read_text(encoding="utf-8"))
    except OSError:
        return None
    except (ValueError, KeyError, TypeError):
        pass
    warnings.warn(f"the cache entry {path} is damaged: it is decided anew", stacklevel=2)
    return None


def opened(text: str) -> Any:
    """The value in the text of an entry; ValueError, KeyError or TypeError where it does not hold."""
    seal, _, content = text.partition("\n")
    if seal != sealed(content):
        raise ValueError("its hash is not that of its content")
    return decoded(json.loads(content))


def store(path: Path, value: Any) -> None:
    """Writes an entry; where it cannot be written, the next process decides again."""
    text = json.dumps(encoded(value))
    try:
        write_whole(path, f"{sealed(text)}\n{text}")
    except CommandError:
        return


def sealed(text: str) -> str:
    """The hash of an entry's content."""
    return hashlib.sha256(text.encode()).hexdigest()


def encoded(value: Any) -> Any:
    """The value as JSON: nodes by their class, tuples as lists."""
    if dataclasses.is_dataclass(value) and type(value).__name__ in KNOWN:
        fields = [encoded(getattr(value, f.name)) for f in dataclasses.fields(value) if f.name != "span"]
        return {type(value).__name__: fields}
    return [encoded(item) for item in value] if isinstance(value, tuple) else value


def decoded(value: Any) -> Any:
    """The value that JSON stands for."""
    if isinstance(value, dict):
        ((name, fields),) = value.items()
        cls = KNOWN[name]
        names = [f.name for f in dataclasses.fields(cls) if f.name != "span"]
        return cls(**dict(zip(names, map(decoded, fields), strict=True)))
    return tuple(map(decoded, value)) if isinstance(value, list) else value
