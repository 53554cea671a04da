"""How a benchmark gets ours: `cascade.compile`, alone in a module so that its import can be timed."""

from __future__ import annotations

from typing import Any

import cascade


def build(text: str, effort: str, device: str) -> Any:
    """The compiled cascade; a version that knows no efforts will do on a CPU, where nothing is timed in earnest."""
    make: Any = cascade.compile
    try:
        return make(text, effort=effort)
    except TypeError:
        if device != "cpu":
            raise
        return make(text)
