"""Compute reductions that depend on each other in one trip over their rank, by a state that is carried along.

    R[m] = max[n] X[m,n]                             R[m] = max[n] X[m,n]
    P[m,n] = exp(X[m,n] - R[m])              -->     F[m] = select(R[m] == -inf, 0.0, R[m])
    D[m] = sum[n] P[m,n]                             P[m,n] = exp(X[m,n] - F[m])
                                                     D[m] = sum[n] P[m,n]
                                                 } schedule {
                                                     fold n { state R, D ... merge D[m] = D'[m] * exp(R'[m] - F[m]) }

A sum lifts where its map has finite rank as a function of state and element (`separate.py`), a maximum where the map is
monotone in the element (`monotone.py`); `accumulate.py` makes the accumulators, `legality.py` says when it is allowed,
and `prove.py` runs every fold before it is used. What the trip does not need waits until it is over: 1/D of attention,
the scale of a norm behind its product.

Requires: canonical. Ensures: canonical. It does not decide whether a trip less is faster; that is for a backend.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from cascade.ir import Cascade, Fold, Fuse
from cascade.passes.legality import named
from cascade.passes.lifter import Lifter
from cascade.passes.lifts import Blocked, Lifted, Lifting
from cascade.passes.memo import recent, remembered
from cascade.passes.prove import Proof, prove
from cascade.passes.scan import affine_scans
from cascade.passes.telling import render_fold
from cascade.passes.trips import folded
from cascade.verify import Invariant, canonical, inlined, well_formed


@dataclass(frozen=True, slots=True)
class Lift:
    """Dependent reductions in one trip: a state that is carried, and one merge."""

    name: ClassVar[str] = "lift"
    requires: ClassVar[tuple[Invariant, ...]] = (well_formed, inlined, canonical)
    ensures: ClassVar[tuple[Invariant, ...]] = (canonical,)
    ordered: bool = False  # keep the order of floating-point sums: nothing that reassociates is lifted

    def __call__(self, cascade: Cascade) -> Cascade:
        return lift_reductions(cascade, self.ordered).cascade


def lift_reductions(cascade: Cascade, ordered: bool = False) -> Lifting:
    """What lifting makes of a canonical cascade: every rank in turn, each trip proved before it is kept."""
    return recent(cascade, ordered, functools.partial(_lifted, cascade, ordered))


def _lifted(cascade: Cascade, ordered: bool) -> Lifting:
    lifted: list[Lifted] = []
    blocked: list[Blocked] = []
    current = cascade
    for rank in _ranks(cascade):
        refused: dict[str, Blocked] = {}
        while True:
            found = Lifter(current, rank, ordered, refused).run()
            failed = {b.reduction: b for b in _failures(current, found, rank)}
            if not failed:
                break
            refused |= failed
        current = found.cascade
        lifted += found.lifted
        blocked += found.blocked
    lifted += affine_scans(cascade)
    return Lifting(current, tuple(lifted), tuple(blocked))


def _ranks(cascade: Cascade) -> tuple[str, ...]:
    """The ranks that at least two statements reduce, or one of them a read of the other's."""
    counts: dict[str, int] = {}
    for stmt in cascade.body:
        for rank in folded(stmt):
            counts[rank] = counts.get(rank, 0) + 1
    return tuple(rank for rank, count in counts.items() if count > 1)


def _failures(before: Cascade, found: Lifting, rank: str) -> Iterator[Blocked]:
    """The lifted reductions whose fold does not prove itself, and folds that overlap those of another rank."""
    old = {name for item in before.schedule if isinstance(item, (Fold, Fuse)) for name in _members(item)}
    folds = [item for item in found.cascade.schedule if isinstance(item, Fold) and item not in before.schedule]
    for fold in folds:
        mine = [item for item in found.lifted if set(item.state) & set(fold.state)]
        if not old.isdisjoint(fold.update):
            for item in mine:
                edge = (item.producers[0], item.reduction)
                yield named(
                    "overlap", item.reduction, rank, edge, "a statement of it is in a trip of the schedule already"
                )
            continue
        proof: Proof = remembered(
            "proof", (render_fold(found.cascade, fold),), functools.partial(prove, found.cascade, fold)
        )
        guilty = [item for item in mine if proof.state < 0 or fold.state[proof.state] in item.state]
        for item in (guilty or mine) if proof.item else ():
            edge = (item.producers[0], item.reduction)
            name = fold.state[proof.state] if proof.state >= 0 else ""
            yield named(proof.item, item.reduction, rank, edge, proof.reason.replace("{state}", name))


def _members(item: Fold | Fuse) -> tuple[str, ...]:
    return item.update if isinstance(item, Fold) else item.statements
