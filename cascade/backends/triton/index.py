"""Filters that read data: which tiles of a stream a tile of rows can meet, found on the device before the kernel runs.

    where doc[b,m] == doc[b,n]   with tiles of 128 rows m and 64 columns n
    -->  the least and the largest doc of every tile; first and last tile of n whose range meets that of a tile of m;
         and the stretch of tiles where every pair is equal, which needs no test

The index is a cascade like any other and is planned as one. It is exact for what is sorted, wide but right otherwise.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cascade.backends.triton.products import ranks_of
from cascade.ir import (
    Apply,
    Cascade,
    Const,
    DType,
    Einsum,
    Expr,
    Extent,
    Fuse,
    Given,
    Param,
    Rank,
    Read,
    Reduce,
    Result,
    Size,
    Stmt,
    Target,
)
from cascade.walk import fresh, substitute, walk

INTEGERS = (DType.I8, DType.I32, DType.I64)
MIRRORED = {"eq": "eq", "ne": "ne", "lt": "gt", "le": "ge", "gt": "lt", "ge": "le"}


@dataclass(frozen=True, slots=True)
class Entry:
    """Where the bounds of a test stand: tensors of tile numbers, and their coordinates."""

    first: str
    stop: str
    whole_first: str
    whole_stop: str
    index: tuple[Expr, ...]
    tile: int  # coordinates of the stream that the numbers count at a time

    def read(self, name: str) -> Expr:
        """A number of the index for the tile at hand."""
        return Read(name, self.index)


@dataclass(frozen=True, slots=True)
class Index:
    """A cascade that computes the bounds of tests, and where they are found."""

    cascade: Cascade
    entries: Mapping[Expr, Entry]
    sizes: Mapping[str, int]  # of the symbols that the cascade adds
    counts: Mapping[str, tuple[Size, int]]  # of what they count the tiles: an extent, and the coordinates of a tile
    shapes: Mapping[str, tuple[Size, ...]]  # of its results


@dataclass(frozen=True, slots=True)
class _Sides:
    """A test as a comparison: what depends on the stream, the operation, what depends on the rows."""

    column: Expr
    op: str
    row: Expr


def index_of(
    tests: Collection[Expr],
    stream: str,
    rows: Collection[str],
    tiles: Mapping[str, int],
    sizes: Mapping[str, Size],
    numbers: Mapping[str, int],
    shapes: Mapping[str, tuple[Size, ...]],
    dtypes: Mapping[str, DType],
) -> Index | None:
    """The index for those tests that compare integers read along the stream with others; None where there is none.

    `rows` are the tiled ranks, `tiles` coordinates per tile, `numbers` the extents of ranks in this call.
    """
    body: list[Stmt] = []
    entries: dict[Expr, Entry] = {}
    results: list[Result] = []
    added: dict[str, tuple[str, int]] = {}
    given: list[Given] = []
    pairs: list[Fuse] = []
    taken = set(sizes) | set(shapes) | set(numbers)
    for test in tests:
        sides = _sides(test, stream, rows, dtypes)
        if sides is None:
            continue
        maker = _Maker(stream, tiles, sizes, taken, added, given, pairs)
        entry, made, bounds = maker.bounds(sides)
        entries[test] = entry
        body.extend(made)
        results.extend(bounds)
    if not entries:
        return None
    read = dict.fromkeys(n.tensor for test in entries for n in walk(test) if isinstance(n, Read))
    params = tuple(Param(name, dtypes[name], shapes[name]) for name in read)
    cascade = Cascade("bounds", params, tuple(results), tuple(body), tuple(pairs), given=tuple(given))
    counted = {symbol: -(-numbers[rank] // tile) for symbol, (rank, tile) in added.items()}
    counts = {symbol: (sizes[rank], tile) for symbol, (rank, tile) in added.items()}
    return Index(cascade, entries, counted, counts, {result.name: result.shape for result in results})


def _sides(test: Expr, stream: str, rows: Collection[str], dtypes: Mapping[str, DType]) -> _Sides | None:
    """A test as a comparison of integers of which one side has the stream and the other at most one tiled rank."""
    if not isinstance(test, Apply) or test.op not in MIRRORED:
        return None
    left, right = test.args
    reads = [node for node in walk(test) if isinstance(node, Read)]
    plain = all(isinstance(part, Rank | Const) for node in reads for part in node.index)
    if not reads or not plain or any(dtypes[node.tensor] not in INTEGERS for node in reads):
        return None
    for column, op, row in ((left, test.op, right), (right, MIRRORED[test.op], left)):
        tiled = ranks_of(row) & set(rows)
        apart = stream in ranks_of(column) and stream not in ranks_of(row)
        if apart and len(tiled) <= 1 and not ranks_of(column) & set(rows):
            return _Sides(column, op, row)
    return None


@dataclass(frozen=True, slots=True)
class _Maker:
    """What makes the statements of an index; `taken`, `added`, `given` and `pairs` grow as names are used."""

    stream: str
    tiles: Mapping[str, int]
    sizes: Mapping[str, Size]
    taken: set[str]
    added: dict[str, tuple[str, int]]
    given: list[Given]
    pairs: list[Fuse]

    def bounds(self, sides: _Sides) -> tuple[Entry, list[Stmt], list[Result]]:
        """The statements for one test, and the four results that they give."""
        points = sorted((ranks_of(sides.column) | ranks_of(sides.row)) - set(self.tiles))
        tiled = sorted(ranks_of(sides.row) & set(self.tiles))
        column, row = self.tile_rank(self.stream), self.tile_rank(tiled[0]) if tiled else None
        low, high, made = self.ends(sides.column, self.stream, column, "column")
        row_low, row_high, more = self.ends(sides.row, tiled[0] if tiled else None, row, "row")
        possible, sure = _conditions(sides.op, low, high, row_low, row_high)
        ranks = (*points, *((row,) if row else ()))
        count = Extent(self.symbol(column))
        names = [fresh(f"{self.stream}_{what}", self.taken) for what in ("first", "stop", "whole", "until", "wholes")]
        first, stop, whole, until, wholes = names
        at = tuple(map(Rank, ranks))
        statements: list[Stmt] = [*made, *more]
        for name, reducer, test, there, other in (
            (first, "min", possible, Rank(column), count),
            (stop, "max", possible, Apply("add", (Rank(column), Const(1))), Const(0)),
            (whole, "min", sure, Rank(column), count),
            (until, "max", sure, Apply("add", (Rank(column), Const(1))), Const(0)),
            (wholes, "sum", sure, Const(1), Const(0)),
        ):
            chosen = Apply("select", (test, there, other))
            statements.append(Einsum(Target(name, ranks), Reduce(reducer, (column,), chosen)))
        together = fresh(f"{self.stream}_together", self.taken)
        contiguous = Apply("eq", (Read(wholes, at), Apply("sub", (Read(until, at), Read(whole, at)))))
        end = Apply("select", (contiguous, Read(until, at), Read(whole, at)))
        statements.append(Einsum(Target(together, ranks), end))
        shape = tuple(self.sizes.get(rank, self.symbol(rank)) for rank in ranks)
        index: tuple[Expr, ...] = tuple(map(Rank, points))
        if tiled:
            index = (*index, Apply("floordiv", (Rank(tiled[0]), Const(self.tiles[tiled[0]]))))
        results = [Result(name, DType.I32, shape) for name in (first, stop, whole, together)]
        return Entry(first, stop, whole, together, index, self.tiles[self.stream]), statements, results

    def tile_rank(self, rank: str) -> str:
        """The rank that counts the tiles of another."""
        name = fresh(f"{rank}_tile", self.taken)
        self.added[self.symbol(name)] = (rank, self.tiles[rank])
        self.given.append(Given(name, self.symbol(name)))
        return name

    def symbol(self, rank: str) -> str:
        """The shape symbol of a rank that the index adds."""
        return rank.upper()

    def ends(self, expr: Expr, rank: str | None, tile: str | None, what: str) -> tuple[Expr, Expr, list[Einsum]]:
        """The least and the largest value of an expression over each tile of a rank."""
        if rank is None or tile is None:
            return expr, expr, []
        inner = fresh(f"{rank}_in_tile", self.taken)
        self.given.append(Given(inner, self.tiles[rank]))
        place = Apply("add", (Apply("mul", (Rank(tile), Const(self.tiles[rank]))), Rank(inner)))
        body = substitute(expr, {rank: place})
        ranks = (*sorted(ranks_of(expr) - {rank}), tile)
        found: list[Expr] = []
        made: list[Einsum] = []
        for reducer in ("min", "max"):
            name = fresh(f"{what}_{reducer}", self.taken)
            made.append(Einsum(Target(name, ranks), Reduce(reducer, (inner,), body)))
            found.append(Read(name, tuple(map(Rank, ranks))))
        self.pairs.append(Fuse(tuple(stmt.target.name for stmt in made), inner))
        return found[0], found[1], made


def _conditions(op: str, low: Expr, high: Expr, row_low: Expr, row_high: Expr) -> tuple[Expr, Expr]:
    """Whether `column op row` holds for some pair of two tiles, and whether for all of them."""

    def both(*parts: Expr) -> Expr:
        found = parts[0]
        for part in parts[1:]:
            found = Apply("and", (found, part))
        return found

    meet = both(Apply("le", (row_low, high)), Apply("le", (low, row_high)))
    one = both(Apply("eq", (row_low, row_high)), Apply("eq", (low, high)), Apply("eq", (low, row_low)))
    match op:
        case "eq":
            return meet, one
        case "ne":
            return Apply("not", (one,)), Apply("not", (meet,))
        case "lt" | "le":
            return Apply(op, (low, row_high)), Apply(op, (high, row_low))
        case _:
            return Apply(op, (high, row_low)), Apply(op, (low, row_high))


def widest(op: str, ends: Sequence[Expr | None]) -> Expr | None:
    """The largest or the smallest of some bounds; those that are None say nothing."""
    known = [end for end in ends if end is not None]
    found = known[0] if known else None
    for end in known[1:]:
        assert found is not None
        found = Apply(op, (found, end))
    return found
