"""How many multiprocessors kernels may count on, where others run beside them.

    with within(100):
        kernel(...)      a kernel whose programs stay on their multiprocessors starts as many as 100 hold

A kernel with a program a tile needs no limit: whatever else runs takes places as its programs end. One whose programs
stay would leave no place until it is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

_LIMIT: ContextVar[int | None] = ContextVar("limit", default=None)


@contextlib.contextmanager
def within(multiprocessors: int | None) -> Iterator[None]:
    """Kernels that are launched for the first time in here count on so many; on all with None."""
    token = _LIMIT.set(multiprocessors)
    try:
        yield
    finally:
        _LIMIT.reset(token)


def at_most(multiprocessors: int) -> int:
    """How many of so many may be counted on."""
    limit = _LIMIT.get()
    return multiprocessors if limit is None else max(1, min(limit, multiprocessors))
