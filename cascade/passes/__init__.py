"""The passes, one file each; this literal table is all that there are. Their order is in `pipeline.py`."""

from __future__ import annotations

from cascade.passes.base import Pass
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.fuse import Fuse
from cascade.passes.group_rows import GroupRows
from cascade.passes.inline import Inline
from cascade.passes.lift import Lift

PASSES: dict[str, type[Pass]] = {
    "inline": Inline,
    "canonicalize": Canonicalize,
    "lift": Lift,
    "group-rows": GroupRows,
    "fuse": Fuse,
}
