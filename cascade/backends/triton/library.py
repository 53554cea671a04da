"""Plain products of large matrices, which a library multiplies as well: which these are, and how long it would take.

    C[m,n] = sum[k] A[m,k] * B[n,k]      of 16-bit tensors, with nothing else in their kernel: a candidate beside tiles

What a kernel gains over a library is what it does to operands and results on their way. Where it does nothing, the
library's may be the faster one: it has warps of their own for loads, and tiles for every shape. It is taken where the
model says that it is faster by more than the model tells such products apart, or where it was when both were timed.

Only where tiles fill the device: of smaller products the library sums parts in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cascade.backends.triton.machine import Estimate, Machine
from cascade.backends.triton.partition import Group, Rest
from cascade.backends.triton.planner import Planner, Tiling
from cascade.backends.triton.products import matrix_product
from cascade.ir import DType, Einsum, Expr, Rank, Read

CLEARLY = 0.03
"""By what share of the time the library must be faster: less is between two runs of one kernel."""

SHARE = 0.95
"""Of the matrix rate that its waves of tiles reach: cuBLAS in a stored table of products on an H200 is within 7 %."""

TILES = ((256, 128), (128, 256), (128, 128))
"""Of its kernels on 16 bits, as their names say."""

TYPES, WIDTH = (DType.BF16, DType.F16), 2  # and the bytes of one of their numbers


@dataclass(frozen=True, slots=True)
class Side:
    """A tensor as a matrix: its name, and its dimensions in the order in which the product has them, a batch first."""

    name: str
    dims: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Multiplied:
    """A product of two tensors into another: its sides, the extents of batch, rows, columns and the reduced rank."""

    result: str
    left: Side
    right: Side
    batch: int
    rows: int
    columns: int
    over: int


def multiplied(planner: Planner, group: Group, groups: Sequence[Group | Rest]) -> Multiplied | None:
    """How a group is one product of two tensors and nothing else; None where it is more, or less."""
    stmt, name = group.statements[0], group.names[0]
    found = matrix_product(stmt)
    if len(group.statements) != 1 or group.rows is not None or found is None or not isinstance(stmt, Einsum):
        return None
    if stmt.where is not None or found.rest or found.grouped or planner.stored(group, groups) != (name,):
        return None
    batch = [rank for rank in stmt.target.ranks if rank not in found.rows | found.columns]
    if len(found.rows) != 1 or len(found.columns) != 1 or len(batch) > 1:
        return None
    (row,), (column,) = found.rows, found.columns
    left, right = _side(found.left, (*batch, row, found.over)), _side(found.right, (*batch, found.over, column))
    if left is None or right is None or stmt.target.ranks != (*batch, row, column):
        return None
    if not _suits(planner, left, right, name):
        return None
    first = planner.ranks[batch[0]] if batch else 1
    return Multiplied(name, left, right, first, *(planner.ranks[rank] for rank in (row, column, found.over)))


def _side(factors: Sequence[Expr], wanted: Sequence[str]) -> Side | None:
    """Factors that are a tensor as it lies, with these ranks and no others."""
    match factors:
        case (Read() as read,):
            at = [index.name if isinstance(index, Rank) else "" for index in read.index]
            return Side(read.tensor, tuple(map(at.index, wanted))) if sorted(at) == sorted(wanted) else None
    return None


def _suits(planner: Planner, left: Side, right: Side, name: str) -> bool:
    """Whether the library multiplies such tensors without copying them: 16 bits, one type, elements side by side."""
    if name in planner.updates or {left.name, right.name} & planner.absent:
        return False
    kind = planner.tensor(name).dtype
    sides = [(planner.tensor(side.name), side.dims[-2:]) for side in (left, right)]
    near = all(1 in (tensor.strides[dims[0]], tensor.strides[dims[1]]) for tensor, dims in sides)
    return near and kind in TYPES and all(tensor.dtype is kind for tensor, _ in sides)


def estimated(machine: Machine, product: Multiplied) -> Estimate | None:
    """How long the library would take; None where its tiles do not fill the machine, or its rate is not known."""
    rate = machine.matrix_tflops.get("bf16")
    found = []
    for tall, wide in TILES:
        tiles = product.batch * -(-product.rows // tall) * -(-product.columns // wide)
        waves = -(-tiles // machine.sms)
        found.append((waves * machine.sms * 2.0 * tall * wide * product.over, waves, tiles))
    if rate is None or min(tiles for _, _, tiles in found) < machine.sms:
        return None
    flops, waves, _ = min(found)
    matrix = flops / (SHARE * rate * 1e6)
    sizes = product.rows * product.over, product.over * product.columns, product.rows * product.columns
    memory = WIDTH * product.batch * sum(sizes) / (machine.bandwidth_tbs * 1e6)
    bound, longest = max(("matrix", matrix), ("memory", memory), key=lambda part: part[1])
    parts = (("matrix", matrix), ("memory", memory), ("launch", machine.launch_us))
    return Estimate(longest + machine.launch_us, bound, parts, 1, float(waves), "by the tiles that its kernels have")


def candidate(
    planner: Planner, group: Group, groups: Sequence[Group | Rest], machine: Machine
) -> tuple[Tiling, Estimate] | None:
    """The library in the place of a group's kernel, and what the model says of it; None where it cannot take it."""
    product = multiplied(planner, group, groups)
    found = None if product is None else estimated(machine, product)
    if found is None:
        return None
    tiling = planner.default_tiling(group)
    return Tiling(tiling.tiles, tiling.options, library=True), found
