"""Files that are written whole: no reader ever sees half of one."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from cascade.errors import CommandError, Diagnostic


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes the file whole and renames it into place, so that no reader ever sees half of it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
    except OSError as error:
        message = f"cannot write {path}: {error.strerror or error}"
        raise CommandError(Diagnostic("C612", message, help="name a folder that can be written to")) from None
