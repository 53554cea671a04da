"""How a benchmark gets ours: `cascade.compile`, alone in a module so that its import can be timed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import cascade


def build(text: str, effort: str, device: str, options: Mapping[str, Any] | None = None) -> Any:
    """The compiled cascade; a version that knows no efforts will do on a CPU, where nothing is timed in earnest."""
    make: Any = cascade.compile
    try:
        return make(text, effort=effort, **(options or {}))
    except TypeError:
        if device != "cpu":
            raise
        return make(text)
