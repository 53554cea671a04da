"""Kernels compiled beside each other, before any of them is launched.

A launch compiles what it launches, and the next one waits. Most of a compilation is outside Python's lock, in MLIR,
LLVM and the assembler: several in threads take little longer than the longest of them, and launches find what is made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import triton


@dataclass(frozen=True, slots=True)
class Wanted:
    """A launch that is to come: Triton's function, the grid, what it will be called with, and its options."""

    function: Any
    grid: tuple[int, int, int]
    arguments: Sequence[Any]
    options: Mapping[str, Any]


def compile_beside(wanted: Sequence[Wanted], workers: int | None = None) -> None:
    """Compiles what launches want, in as many threads as there are processors, or `workers`.

    What does not compile is left to its launch, which says why; all of it, where a caller has Triton compile its way.
    """
    with (
        contextlib.suppress(RuntimeError),  # another such mode is active
        ThreadPoolExecutor(workers or os.cpu_count()) as pool,
        triton.AsyncCompileMode(pool, ignore_errors=True),
    ):
        for one in wanted:
            with contextlib.suppress(Exception):
                one.function.warmup(*one.arguments, grid=one.grid, **one.options)
