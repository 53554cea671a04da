"""The statements for which kernels are planned: what is computed twice, or stored, to move or wait for less."""

from __future__ import annotations

from collections.abc import Mapping

from cascade.backends.triton.operands import with_operands
from cascade.backends.triton.picks import with_picks
from cascade.ir import Cascade, DType


def restated(cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType]) -> Cascade:
    """The cascade as kernels are planned for it, at extents of the shape symbols and types of the parameters."""
    return with_operands(with_picks(cascade, extents), extents, inputs)
