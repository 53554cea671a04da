"""Answers about the cascades that were asked about last: many a stage asks the same of the very same one.

By identity, as an equal cascade may stand in another file with other spans; so an answer may hold spans, and nothing is
hashed. What is remembered is one tuple, replaced as a whole: threads may ask at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")

LATEST = 8  # subjects that are remembered; a stage goes back and forth between a few


def recently(find: Callable[[S], T]) -> Callable[[S], T]:
    """The function, which is not run again for the very objects that it was asked about last; it must be pure."""
    latest: tuple[tuple[S, T], ...] = ()

    @functools.wraps(find)
    def answer(subject: S) -> T:
        nonlocal latest
        for known, found in latest:
            if known is subject:
                return found
        found = find(subject)
        latest = ((subject, found), *latest[: LATEST - 1])
        return found

    return answer
