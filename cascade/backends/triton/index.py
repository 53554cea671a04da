"""Filters that read data: which tiles of a stream a tile of rows can meet, found on the device before the kernel runs.

    where doc[b,m] == doc[b,n]   with tiles of 128 rows m and 64 columns n
    -->  the least and the largest doc of every tile; first and last tile of n whose range meets that of a tile of m;
         and the stretch of tiles where every pair is equal, which needs no test
    where keep[b,n]              the same of numbers that are 0 or 1, compared with 1

The index is a cascade like any other and is planned as one. It is exact for what is sorted, wide but right otherwise.
All its tables have the same ranks, and so has what they are made of: a program finds the ends of all tiles of n for its
tiles of m itself. So one launch makes all tables, where another would take longer than what is read again.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from cascade.backends.triton.products import ranks_of
from cascade.ir import (
    Apply,
    Cascade,
    Cast,
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

    def has(self, name: str) -> bool:
        """Whether a tensor is one of these."""
        return name in (self.first, self.stop, self.whole_first, self.whole_stop)

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
    truths: bool = True,
) -> Index | None:
    """The index for those tests that compare integers read along the stream, or are truths; None where there is none.

    `rows` are the tiled ranks, `tiles` coordinates per tile, `numbers` the extents of ranks in this call; `truths`
    says whether those have a place in it.
    """
    compared = [test for test in tests if truths or (isinstance(test, Apply) and test.op in MIRRORED)]
    found = {test: sides for test in compared if (sides := _sides(test, stream, rows, dtypes)) is not None}
    if not found:
        return None
    own = sorted({rank for one in found.values() for rank in ranks_of(one.column) | ranks_of(one.row)} - {stream})
    points, tiled = (tuple(rank for rank in own if (rank in tiles) is inside) for inside in (False, True))
    maker = _Maker(stream, points, tiled, tiles, sizes, set(sizes) | set(shapes) | set(numbers))
    entries = {test: maker.bounds(sides) for test, sides in found.items()}
    read = dict.fromkeys(n.tensor for test in entries for n in walk(test) if isinstance(n, Read))
    params = tuple(Param(name, dtypes[name], shapes[name]) for name in read)
    cascade = Cascade(
        "bounds", params, tuple(maker.results), tuple(maker.body), maker.schedule(), given=tuple(maker.given)
    )
    counted = {symbol: -(-numbers[rank] // tile) for symbol, (rank, tile) in maker.added.items()}
    counts = {symbol: (sizes[rank], tile) for symbol, (rank, tile) in maker.added.items()}
    return Index(cascade, entries, counted, counts, {result.name: result.shape for result in maker.results})


def _sides(test: Expr, stream: str, rows: Collection[str], dtypes: Mapping[str, DType]) -> _Sides | None:
    """A test as a comparison of integers of which one side has the stream and the other at most one tiled rank.

    A truth that is read is one as well: 1 or 0, and at least 1.
    """
    inner = test.args[0] if isinstance(test, Apply) and test.op == "not" else test
    if isinstance(inner, Read) and dtypes[inner.tensor] is DType.BOOL:
        plain = all(isinstance(part, Rank | Const) for part in inner.index)
        apart = stream in ranks_of(inner) and not ranks_of(inner) & set(rows)
        return _Sides(Cast(DType.I32, inner), "ge" if inner is test else "lt", Const(1)) if plain and apart else None
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


@dataclass(slots=True, eq=False)
class _Maker:
    """What makes the statements of an index. Where `together`, each is made anew for all coordinates of the tables."""

    stream: str
    points: tuple[str, ...]  # the ranks of all tables: one coordinate at a time, and tiles of others
    tiled: tuple[str, ...]
    tiles: Mapping[str, int]
    sizes: Mapping[str, Size]
    taken: set[str]
    body: list[Einsum] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    added: dict[str, tuple[str, int]] = field(default_factory=dict)
    given: list[Given] = field(default_factory=list)
    pairs: list[Fuse] = field(default_factory=list)
    counting: dict[str, str] = field(default_factory=dict)  # by rank: the rank that counts its tiles
    known: dict[tuple[Expr, str], tuple[Expr, Expr]] = field(default_factory=dict)  # least and largest values

    def bounds(self, sides: _Sides) -> Entry:
        """Makes the statements for one test, and the four results that they give."""
        column, ranks = self.tile_rank(self.stream), (*self.points, *map(self.tile_rank, self.tiled))
        inside = next(iter(ranks_of(sides.row) & set(self.tiles)), None)
        low, high = self.ends(sides.column, self.stream, "column")
        row_low, row_high = self.ends(sides.row, inside, "row")
        possible, sure = _conditions(sides.op, low, high, row_low, row_high)
        count = Extent(self.symbol(column))
        names = [fresh(f"{self.stream}_{what}", self.taken) for what in ("first", "stop", "whole", "until", "wholes")]
        first, stop, whole, until, wholes = names
        at = tuple(map(Rank, ranks))
        for name, reducer, test, there, other in (
            (first, "min", possible, Rank(column), count),
            (stop, "max", possible, Apply("add", (Rank(column), Const(1))), Const(0)),
            (whole, "min", sure, Rank(column), count),
            (until, "max", sure, Apply("add", (Rank(column), Const(1))), Const(0)),
            (wholes, "sum", sure, Const(1), Const(0)),
        ):
            chosen = Apply("select", (test, there, other))
            self.body.append(Einsum(Target(name, ranks), Reduce(reducer, (column,), chosen)))
        together = fresh(f"{self.stream}_together", self.taken)
        contiguous = Apply("eq", (Read(wholes, at), Apply("sub", (Read(until, at), Read(whole, at)))))
        end = Apply("select", (contiguous, Read(until, at), Read(whole, at)))
        self.body.append(Einsum(Target(together, ranks), end))
        shape = tuple(self.sizes.get(rank, self.symbol(rank)) for rank in ranks)
        self.results.extend(Result(name, DType.I32, shape) for name in (first, stop, whole, together))
        tile_of = (Apply("floordiv", (Rank(rank), Const(self.tiles[rank]))) for rank in self.tiled)
        return Entry(first, stop, whole, together, (*map(Rank, self.points), *tile_of), self.tiles[self.stream])

    def schedule(self) -> tuple[Fuse, ...]:
        """All statements in one trip over a rank of the tables: one kernel; and the ends of tiles in pairs."""
        names = tuple(stmt.target.name for stmt in self.body)
        ranks = (*self.points, *map(self.tile_rank, self.tiled))
        return (*(Fuse(names, rank) for rank in ranks[-1:]), *self.pairs)

    def tile_rank(self, rank: str) -> str:
        """The rank that counts the tiles of another."""
        if rank not in self.counting:
            name = self.counting[rank] = fresh(f"{rank}_tile", self.taken)
            self.added[self.symbol(name)] = (rank, self.tiles[rank])
            self.given.append(Given(name, self.symbol(name)))
        return self.counting[rank]

    def symbol(self, rank: str) -> str:
        """The shape symbol of a rank that the index adds."""
        return rank.upper()

    def extent(self, rank: str) -> Expr:
        """The extent of a rank of the index."""
        size = self.sizes.get(rank, self.symbol(rank))
        return Extent(size) if isinstance(size, str) else Const(size)

    def ends(self, expr: Expr, rank: str | None, what: str) -> tuple[Expr, Expr]:
        """The least and the largest value of an expression over each tile of a rank."""
        if rank is None:
            return expr, expr
        if (expr, rank) in self.known:
            return self.known[expr, rank]
        inner, tile = fresh(f"{rank}_in_tile", self.taken), self.tile_rank(rank)
        self.given.append(Given(inner, self.tiles[rank]))
        place = Apply("add", (Apply("mul", (Rank(tile), Const(self.tiles[rank]))), Rank(inner)))
        body = substitute(expr, {rank: place})
        tiled = (other for other in map(self.tile_rank, self.tiled) if other != tile)
        over = (*self.points, tile, *tiled)  # last is what lies side by side in the tables: programs have tiles of it
        bound = ranks_of(expr) | {tile}
        anew = [Apply("lt", (Rank(other), self.extent(other))) for other in over if other not in bound]
        where = conjunction(anew) if anew else None
        found: list[Expr] = []
        names: list[str] = []
        for reducer in ("min", "max"):
            name = fresh(f"{what}_{reducer}", self.taken)
            self.body.append(Einsum(Target(name, over), Reduce(reducer, (inner,), body), where))
            names.append(name)
            found.append(Read(name, tuple(map(Rank, over))))
        self.pairs.append(Fuse(tuple(names), inner))
        return self.known.setdefault((expr, rank), (found[0], found[1]))


def _conditions(op: str, low: Expr, high: Expr, row_low: Expr, row_high: Expr) -> tuple[Expr, Expr]:
    """Whether `column op row` holds for some pair of two tiles, and whether for all of them."""

    meet = conjunction([Apply("le", (row_low, high)), Apply("le", (low, row_high))])
    one = conjunction([Apply("eq", (row_low, row_high)), Apply("eq", (low, high)), Apply("eq", (low, row_low))])
    match op:
        case "eq":
            return meet, one
        case "ne":
            return Apply("not", (one,)), Apply("not", (meet,))
        case "lt" | "le":
            return Apply(op, (low, row_high)), Apply(op, (high, row_low))
        case _:
            return Apply(op, (high, row_low)), Apply(op, (low, row_high))


def conjunction(tests: Sequence[Expr]) -> Expr:
    """Whether all of some tests hold."""
    return functools.reduce(lambda a, b: Apply("and", (a, b)), tests)


def widest(op: str, ends: Sequence[Expr | None]) -> Expr | None:
    """The largest or the smallest of some bounds; those that are None say nothing."""
    known = [end for end in ends if end is not None]
    found = known[0] if known else None
    for end in known[1:]:
        assert found is not None
        found = Apply(op, (found, end))
    return found
