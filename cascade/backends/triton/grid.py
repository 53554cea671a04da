"""In which order programs go through the tiles of a grid, and in how many pieces they do what follows their loop.

    grouped    tiles of two ranks, g of the first beside each other: what runs at a time reads few rows and few columns
    resident   programs, as many as the GPU holds at a time, each with tile after tile: loads of the next begin early
    pieces     the columns of a tile in halves behind the loop: fewer registers, less shared memory on the way out

Whether a kernel can have them is told by its plan alone; `suited` leaves out what it cannot have.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from cascade.backends.triton.lower import uses
from cascade.backends.triton.plan import Dot, Keep, Kernel, Let, Load, Loop, Mask, Op, Role, Store

NARROWEST = 32  # columns of a piece: what leaves in one go stays long enough for wide stores


@dataclass(frozen=True, slots=True)
class Ending:
    """What follows the only loop of a kernel: its ops, the rank of which they may be done in pieces, and the variables
    over that rank that they have from before."""

    ops: tuple[Op, ...]
    rank: str
    crossing: tuple[str, ...]


def suited(kernel: Kernel) -> Kernel:
    """The kernel with those of its options that it can have."""
    options, end = kernel.options, ending(kernel)
    wide = end is not None and kernel.axis(end.rank).tile >= NARROWEST * options.pieces
    kept = dataclasses.replace(
        options,
        grouped=options.grouped if _two_tiled(kernel) else 0,
        resident=options.resident if _goes_on(kernel) else 0,
        pieces=options.pieces if wide else 1,
    )
    return kernel if kept == options else dataclasses.replace(kernel, options=kept)


def _two_tiled(kernel: Kernel) -> bool:
    """Whether the grid begins with two tiled axes, or one and the parts of a stream with loops in it; and no tile is to
    start before others."""
    first, nested = kernel.grid[:2], any(axis.role is Role.INNER for axis in kernel.axes)
    tiled = [axis.role is Role.TILE for axis in first]
    return kernel.reverse is None and (tiled == [True, True] or (nested and tiled == [True, False]))


def _goes_on(kernel: Kernel) -> bool:
    """Whether a program may have tile after tile: its only loop has products and is equally long everywhere."""
    loop = _only_loop(kernel)
    return loop is not None and loop.first is None and loop.stop is None


def _only_loop(kernel: Kernel) -> Loop | None:
    """The only loop of a kernel, where it has products and is written once: whole tiles and edges alike."""
    loops = [op for op in kernel.ops if isinstance(op, Loop)]
    if len(loops) != 1 or kernel.careful is not None or not any(isinstance(op, Dot) for op in loops[0].body):
        return None
    return loops[0] if loops[0].inner is None or not loops[0].edges else None


def ending(kernel: Kernel) -> Ending | None:
    """What follows the loop, where the columns of its product may be done in pieces: nothing takes two together."""
    loop = _only_loop(kernel)
    if loop is None:
        return None
    after = kernel.ops[kernel.ops.index(loop) + 1 :]
    columns = {op.axes[1] for op in loop.body if isinstance(op, Dot)}
    if len(columns) != 1 or not all(isinstance(op, (Let, Load, Mask, Keep, Store)) for op in after):
        return None
    (rank,) = columns
    axis = kernel.axis(rank)
    made = {op.name for op in after if isinstance(op, (Let, Load, Mask))}
    used = {name for op in after for name in (*uses(op), *((op.name,) if isinstance(op, Keep) else ()))} - made
    over = [(name, axes) for name, axes, _ in kernel.variables if name in used and rank in axes]
    if axis.role is not Role.TILE or axis.step or any(len(axes) != 2 or axes[1] != rank for _, axes in over):
        return None
    return Ending(after, rank, tuple(name for name, _ in over))
