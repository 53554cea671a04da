"""The statements for which kernels are planned: what is computed twice, stored, or moved out of a loop."""

from __future__ import annotations

from collections.abc import Mapping

from cascade.backends.triton.operands import with_operands
from cascade.backends.triton.picks import with_picks
from cascade.backends.triton.scales import with_scales
from cascade.inference import infer_shapes
from cascade.ir import Cascade, DType


def restated(cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType]) -> Cascade:
    """The cascade as kernels are planned for it, at extents of the shape symbols and types of the parameters."""
    found = with_operands(with_picks(cascade, extents), extents, inputs)
    ranks = infer_shapes(found).ranks
    return with_scales(found, {r: size if isinstance(size, int) else extents[size] for r, size in ranks.items()})
