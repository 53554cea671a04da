"""The statements for which kernels are planned: what is computed twice, stored, or moved out of a loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from cascade.backends.triton.contractions import with_contractions
from cascade.backends.triton.counts import with_extents
from cascade.backends.triton.divided import with_divisions
from cascade.backends.triton.joined import Joined, with_joined
from cascade.backends.triton.paired import with_paired, with_summed, with_views
from cascade.backends.triton.nested import with_nested
from cascade.backends.triton.operands import with_operands
from cascade.backends.triton.ordered import in_order, with_ordered_operands
from cascade.backends.triton.picks import with_picks
from cascade.backends.triton.prologues import with_prologues
from cascade.backends.triton.scaled import with_scaled_operands
from cascade.backends.triton.scales import with_scales
from cascade.backends.triton.sums import with_sums
from cascade.inference import infer_shapes
from cascade.ir import Cascade, DType, Einsum, Reduce
from cascade.walk import defines

PICKED = "an element a row, computed anew: less than to store the whole tensor"
STORED = "an operand made once: a product that computes it for every tile of its result would take longer"
ORDERED = "an operand in the order of the rows that read it: tiles of it lie together, and no product gathers them"
STREAMED = "scales of rows and columns are in operands made once: every tile along the stream would be scaled"
IN_PAIRS = "a sum of two factors, or of what they come to: all factors at once would take more operations"
ROWS = "what a row comes to: all rows at once are more than a tile of a kernel"
SUMMED = "one sum: what the sums that it was made of are multiplied with is known before"
COUNTED = "with the extents in the place of counts: none of what they count is absent"
JOINED = "ranks that lie side by side in all that the kernel touches are one"
SCALED = "the bare sum: what it is multiplied with is the same along it, and comes behind its loop"


@dataclass(frozen=True, slots=True)
class Restated:
    """A cascade as kernels are planned for it, and why it has statements that the author's has not, by their names."""

    cascade: Cascade
    why: Mapping[str, str]
    joined: Joined
    in_order: frozenset[str] = frozenset()  # tensors that lie in memory in the order of an index


def restated(
    cascade: Cascade,
    extents: Mapping[str, int],
    inputs: Mapping[str, DType],
    certain: Mapping[str, int],
    gaps: Mapping[str, Collection[int]] | None = None,
    here: Mapping[str, int] | None = None,
) -> Restated:
    """The cascade as kernels are planned for it, at extents of the shape symbols and types of the parameters.

    Some extents are `certain`: proofs may use them. Others may be larger than those of a call, which are `here` then.
    Ranks are joined where it is known which dimensions of parameters have `gaps` behind them, and rows then lie in the
    order in which they are read.
    """

    def of_ranks(found: Cascade) -> dict[str, int]:
        ranks = infer_shapes(found).ranks
        return {rank: size if isinstance(size, int) else extents[size] for rank, size in ranks.items()}

    steps: tuple[tuple[Callable[[Cascade], Cascade], str], ...] = (
        (lambda found: with_extents(found, certain, inputs), COUNTED),
        (lambda found: with_nested(found, of_ranks(found), inputs), ROWS),
        (lambda found: with_picks(found, extents), PICKED),
        (lambda found: with_sums(found, of_ranks(found), inputs), SUMMED),
        (lambda found: with_scaled_operands(found, extents, inputs, certain), STREAMED),
        (lambda found: with_operands(found, extents, inputs, certain), STORED),
        (lambda found: found if gaps is None else with_ordered_operands(found, extents, inputs), ORDERED),
        (lambda found: with_scales(found, of_ranks(found)), SCALED),
    )
    why: dict[str, str] = {}
    given = {name for stmt in cascade.body for name in defines(stmt)}
    cascade = with_contractions(cascade, of_ranks(cascade), inputs)
    why |= dict.fromkeys((n for stmt in cascade.body for n in defines(stmt) if n not in given), IN_PAIRS)
    paired = with_summed(with_paired(cascade, here or extents, certain), certain)
    extents, certain = paired.extents(extents), paired.extents(certain)
    cascade = with_divisions(paired.cascade, certain)
    cascade = with_prologues(cascade, of_ranks(cascade))
    for step, reason in steps:
        known, before = {name for stmt in cascade.body for name in defines(stmt)}, sums(cascade)
        cascade = step(cascade)
        made = {name for stmt in cascade.body for name in defines(stmt)} - known | sums(cascade) - before
        why |= dict.fromkeys(sorted(made), reason)
    cascade = with_prologues(cascade, of_ranks(cascade))
    joined = dataclasses.replace(paired, cascade=cascade)
    joined = joined if gaps is None else with_joined(with_views(joined, gaps), extents, gaps)
    known = {name for stmt in cascade.body for name in defines(stmt)}
    why |= dict.fromkeys((n for s in joined.cascade.body for n in defines(s) if n not in known), JOINED)
    ordered = frozenset[str]() if gaps is None else in_order(joined.cascade, inputs)
    return Restated(joined.cascade, why, joined, ordered)


def sums(cascade: Cascade) -> set[str]:
    """What a cascade defines as a reduction."""
    return {stmt.target.name for stmt in cascade.body if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce)}
