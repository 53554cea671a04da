"""Rows in the order of an index that is data: a rank that counts them, and which of them each tile has.

    group {H} by I[t,j] < N      with H[t,j,f] = sum[d] X[t,d] * W[I[t,j],d,f]
    -->  H[row,f] = sum[d] X[t_row[row],d] * W[I_here,d,f], stored at t_row[row], j_row[row]

Rows are sorted on the device by the value of the index, equal ones in the order they have. A tile has rows of one value
only: what is left of it counts -1, and is neither read nor stored. A table tells which rows and which value each tile
has, and how many tiles there are: the host knows no more than a bound, and waits for nothing. A row whose index is out
of range is in no tile: the device asserts that there is none, as it does for torch's own indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cascade.ir import Apply, Const, Einsum, Expr, Extent, GroupBy, Rank, Read, Size, Target
from cascade.walk import children, fresh, rewrite, with_children

FEWEST, MOST = 16, 128  # rows of a tile
MEMORY_BOUND = 64  # rows of a value up to which weights that are read count, not operations: a tile has them all
MOST_VALUES = 4096  # of an index: every program that makes a table looks each of them up among the rows


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a group: the rank that counts them in order, and what its statements call their coordinates."""

    item: GroupBy
    rank: str
    symbol: str  # the extent of the rank: tiles with what they have in vain
    order: str  # table: the row at each place, -1 in vain
    value: str  # table: the value of each tile
    count: str  # table: how many tiles there are
    row: str  # the row at hand
    here: str  # the value at hand
    places: tuple[tuple[str, str], ...]  # each rank of the index, and the coordinates of the rows along it

    @property
    def index(self) -> str:
        """The tensor by which rows are ordered."""
        return self.item.key.tensor

    @property
    def ranks(self) -> tuple[str, ...]:
        """The ranks of the index."""
        return tuple(rank for rank, _ in self.places)

    @property
    def names(self) -> tuple[str, ...]:
        """What only the kernel knows: the tables, rows, values and coordinates."""
        return (self.order, self.value, self.count, self.row, self.here, *(name for _, name in self.places))

    def place(self, rank: str) -> Expr:
        """The coordinate of a row along a rank of the index."""
        return Read(dict(self.places)[rank], (Rank(self.rank),))

    def leading(self, sizes: Mapping[str, Size]) -> tuple[Einsum, ...]:
        """The statements from which a row is known."""
        at = (Rank(self.rank),)
        found = [
            Einsum(Target(self.here, ()), Read(self.value, ())),
            Einsum(Target(self.row, (self.rank,)), Read(self.order, at)),
        ]
        flat: Expr = Apply("max", (Read(self.row, at), Const(0)))  # a row in vain is read at the first coordinates
        for number, (rank, name) in reversed(list(enumerate(self.places))):
            size = sizes[rank]
            extent: Expr = Const(size) if isinstance(size, int) else Extent(size)
            last = flat if number == 0 else Apply("mod", (flat, extent))
            found.append(Einsum(Target(name, (self.rank,)), last))
            flat = Apply("floordiv", (flat, extent))
        return tuple(found)

    def rewritten(self, stmt: Einsum, own: Mapping[str, Target], value: str) -> Einsum:
        """A statement over rows instead of the ranks of the index.

        `own` are the tensors that are made with it, `value` is what the one value of the index is called.
        """
        expr = rewrite(stmt.expr, lambda node: Read(value, ()) if node == self.item.key else node)
        return dataclasses.replace(stmt, target=self.target(stmt.target), expr=self.expression(expr, own))

    def target(self, target: Target) -> Target:
        """A left side over rows, the others of its ranks behind."""
        return Target(target.name, (self.rank, *(rank for rank in target.ranks if rank not in self.ranks)))

    def expression(self, expr: Expr, own: Mapping[str, Target]) -> Expr:
        """An expression of a row."""
        if isinstance(expr, Rank):
            return self.place(expr.name) if expr.name in self.ranks else expr
        if isinstance(expr, Read) and expr.tensor in own and self.beside(expr, own[expr.tensor]):
            pairs = zip(own[expr.tensor].ranks, expr.index, strict=True)
            return Read(expr.tensor, (Rank(self.rank), *(index for rank, index in pairs if rank not in self.ranks)))
        return with_children(expr, tuple(self.expression(child, own) for child in children(expr)))

    def beside(self, read: Read, target: Target) -> bool:
        """Whether a tensor of the same rows is read at the row at hand."""
        pairs = zip(target.ranks, read.index, strict=True)
        return all(index == Rank(rank) for rank, index in pairs if rank in self.ranks)

    def scattered(self, target: Target) -> tuple[Expr, ...]:
        """The coordinates at which a left side is stored."""
        return tuple(self.place(rank) if rank in self.ranks else Rank(rank) for rank in target.ranks)

    def tables(self, block: int) -> tuple[str, str, str]:
        """The names of the tables for tiles of so many rows."""
        return (f"{self.order}_{block}", f"{self.value}_{block}", f"{self.count}_{block}")

    def tiled(self, stmt: Einsum, block: int) -> Einsum:
        """A leading statement with the tables for tiles of so many rows."""
        order, value, _ = self.tables(block)
        tile = Apply("floordiv", (Rank(self.rank), Const(block)))

        def named(node: Expr) -> Expr:
            if node == Read(self.value, ()):
                return Read(value, (tile,))
            return Read(order, node.index) if isinstance(node, Read) and node.tensor == self.order else node

        return dataclasses.replace(stmt, expr=rewrite(stmt.expr, named))


def rows_of(item: GroupBy, taken: set[str]) -> Rows:
    """The rows of a group, under names that nothing has; `taken` grows by them."""
    tensor = item.key.tensor
    ranks = [index.name for index in item.key.index if isinstance(index, Rank)]
    rank, symbol = fresh("row", taken), fresh("ROWS", taken)
    order, value, count = (fresh(f"{tensor}_{what}", taken) for what in ("order", "value", "count"))
    row, here = fresh("at_row", taken), fresh(f"{tensor}_here", taken)
    places = tuple((rank_, fresh(f"{rank_}_row", taken)) for rank_ in ranks)
    return Rows(item, rank, symbol, order, value, count, row, here, places)


def most_tiles(rows: int, values: int, block: int) -> int:
    """How many tiles there are at most: all that are full, and one for the rest of each value."""
    return rows // block + min(values, rows)


def expected_tiles(rows: int, values: int, block: int) -> int:
    """How many tiles there are about, where values are equally frequent."""
    each = max(1, -(-rows // max(values, 1)))
    return min(values, rows) * -(-each // block)


def rows_a_tile(rows: int, values: int) -> int:
    """How many rows a tile has: twice those of a value where they are few, so that an operand is read once."""
    each = max(1, rows // max(values, 1))
    above = 1 << max(0, each - 1).bit_length()
    return max(FEWEST, min(MEMORY_BOUND, 2 * above)) if each <= MEMORY_BOUND else min(MOST, above)


def members(rows: Collection[Rows]) -> dict[str, Rows]:
    """The rows of each statement."""
    return {name: one for one in rows for name in one.item.statements}


SORTED = '''
import torch


def sorted_rows(index, values):
    """The values of an index in order, and the rows that have them; rows of one value keep their order."""
    wide = index.reshape(-1).to(torch.int32 if index.dtype is torch.int8 else index.dtype)
    narrow = torch.int16 if values < 2**15 else torch.int32  # an index out of range stays out of it
    return torch.sort(wide.clamp(-1, values).to(narrow), stable=True)
'''

BLOCKS = '''
import torch
import triton
import triton.language as tl


@triton.jit
def first_place(keys_ptr, wanted, count, STEPS: tl.constexpr):
    """Where each of some values would stand first among keys in order."""
    low, high = wanted * 0, wanted * 0 + count
    for _ in range(STEPS):
        middle = (low + high) // 2
        less = tl.load(keys_ptr + middle, mask=low < high, other=0).to(tl.int32) < wanted
        low, high = tl.where((low < high) & less, middle + 1, low), tl.where((low < high) & less, high, middle)
    return low


@triton.jit
def rows_by_value(
    keys_ptr, places_ptr, order_ptr, value_ptr, count_ptr, count,
    VALUES: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr, BLOCK: tl.constexpr,
):
    """The rows of a tile, all of one value, -1 behind them; how many tiles there are, whether all rows are in one."""
    tile = tl.program_id(0)
    values = tl.arange(0, LANES)
    first = first_place(keys_ptr, values, count, STEPS)
    end = first_place(keys_ptr, values + 1, count, STEPS)
    tiles = tl.where(values < VALUES, (end - first + BLOCK - 1) // BLOCK, 0)
    before = tl.cumsum(tiles, 0) - tiles
    mine = (before <= tile) & (tile < before + tiles)
    start = tl.sum(tl.where(mine, first + (tile - before) * BLOCK, 0), 0)
    stop = tl.sum(tl.where(mine, end, 0), 0)
    lanes = tl.arange(0, BLOCK)
    rows = tl.load(places_ptr + start + lanes, mask=start + lanes < stop, other=-1)
    tl.store(order_ptr + tile * BLOCK + lanes, rows.to(tl.int32))
    tl.store(value_ptr + tile, tl.sum(tl.where(mine, values, 0), 0))
    tl.store(count_ptr, tl.sum(tiles, 0), mask=tile == 0)
    rows_in_tiles = tl.sum(tl.where(values < VALUES, end - first, 0), 0)
    tl.store(count_ptr + 1, (rows_in_tiles == count).to(tl.int32), mask=tile == 0)


def tiles_of_rows(keys, places, order, value, count, values, block):
    """Fills the tables: which rows and which value each tile has, and how many tiles there are.

    Asserts on the device that no index is out of range; the host does not wait for it.
    """
    lanes, steps = max(16, triton.next_power_of_2(values)), len(keys).bit_length()
    rows_by_value[(len(value),)](
        keys, places, order, value, count, len(keys), VALUES=values, LANES=lanes, STEPS=steps, BLOCK=block,
    )
    torch._assert_async(count[1], "an index from data points outside of the operand that it chooses")
'''
