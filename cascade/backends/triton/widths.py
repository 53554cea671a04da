"""How many bits integers need: which types have all values that an expression can come to.

The language has exact integers. A kernel computes them in 32 bits, or fewer where data has fewer, wherever that holds
every value that coordinates, sizes and the types of data allow; else in 64.
"""

from __future__ import annotations

from cascade.backends.triton.plan import BYTES
from cascade.intervals import Interval
from cascade.ir import DType


def values_of(dtype: DType) -> Interval:
    """All values of a type of integers or truth values."""
    if dtype is DType.BOOL:
        return 0, 1
    half = 1 << 8 * BYTES[dtype] - 1
    return -half, half - 1


def fits(values: Interval, dtype: DType) -> bool:
    """Whether a type has all of these values."""
    low, high = values_of(dtype)
    return low <= values[0] and values[1] <= high
