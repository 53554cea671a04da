"""What lifting finds: the reductions that a fold carries, those that it cannot, and why; values, no behaviour."""

from __future__ import annotations

from dataclasses import dataclass

from cascade.ir import Cascade


@dataclass(frozen=True, slots=True)
class Lifted:
    """A reduction that is computed in the same trip as what it depends on.

    `kind` is its reducer, or "affine" for a recurrence. `terms` is the rank of its map as a function of the state and
    the element: how many accumulators it takes. `correction` is what an older state is multiplied with, or how it is
    moved, in readable maths; "" where it counts as it is. `init`, `update`, `merge` and `finalize` are lines of text.
    """

    reduction: str
    rank: str
    kind: str
    terms: int
    producers: tuple[str, ...]
    state: tuple[str, ...]
    correction: str = ""
    init: tuple[str, ...] = ()
    update: tuple[str, ...] = ()
    merge: tuple[str, ...] = ()
    finalize: tuple[str, ...] = ()
    deferred: tuple[str, ...] = ()  # factors that wait until the trip is over
    frame: str = ""  # what the terms are measured against, where they are
    anchors: tuple[str, ...] = ()  # the states that the frame is made of
    gauge: bool = False  # no result of the cascade depends on which frame it is


@dataclass(frozen=True, slots=True)
class Blocked:
    """A reduction that needs another trip: the edge that forces it, the condition that fails, and the evidence.

    `item` names a condition of `legality.py`, or "separable" where the map has no finite rank; `evidence` are the
    numeric ranks at growing numbers of samples (empty where the reason is not one of rank).
    """

    reduction: str
    rank: str
    edge: tuple[str, str]  # from the producer to the reduction
    item: str
    code: str
    reason: str
    evidence: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Lifting:
    """The cascade after lifting, and what was found on the way."""

    cascade: Cascade
    lifted: tuple[Lifted, ...] = ()
    blocked: tuple[Blocked, ...] = ()
