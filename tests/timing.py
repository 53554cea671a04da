"""Limits of time that hold on a slow machine too: they are seconds of the machine on which they were written."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import TypeVar

T = TypeVar("T")

REFERENCE = 0.03  # seconds that `work` takes on that machine


def work() -> int:
    """What a compiler written in Python does: small objects in dictionaries, calls, text and sorting."""
    found: dict[tuple[int, str], list[int]] = {}
    for i in range(40_000):
        found.setdefault((i % 997, str(i % 89)), []).append(i)
    return sum(len(values) for _, values in sorted(found.items(), key=lambda item: item[0][1]))


def least(work: Callable[[T], object], inputs: Iterable[T]) -> float:
    """The seconds of this process that `work` takes, the least of its calls: one for each of the equal inputs.

    What else runs on a machine makes some calls slower and none faster. What earlier tests left in memory is kept from
    the collector meanwhile: else whoever allocates next pays for a walk over all of it."""
    taken = []
    for given in inputs:
        gc.collect()
        gc.freeze()
        try:
            started = time.process_time()
            work(given)
            taken.append(time.process_time() - started)
        finally:
            gc.unfreeze()
    return min(taken)


def slowness() -> float:
    """How many times longer this machine takes now than the one of the limits; 1 where it is faster. The slowest of
    three counts: what was measured may have met the same."""
    taken = []
    for _ in range(3):
        started = time.process_time()
        work()
        taken.append(time.process_time() - started)
    return max(1.0, max(taken) / REFERENCE)


def within(taken: float, seconds: float) -> bool:
    """Whether what was measured keeps to a limit, in seconds of this machine as it is now.

    How slow it is now is asked only of what takes longer than it may on the machine of the limits.
    A limit of seconds written down says what a user waits for. It is not to say how busy or how old the machine is
    that tests it: 2.6 times slower ones were seen in CI."""
    return taken < seconds or taken < seconds * slowness()
