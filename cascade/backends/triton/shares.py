"""A stream of which data says how much each coordinate of another rank has, shared evenly: as many tiles a program.

    D[b] = sum[n] P[b,n]  where n < len[b]    with tiles of 64 n, programs for 32 parts of every b on average
    -->  tiles of all b together, a 32 * B-th of them a program; a program has tiles of one b only, so that there are
         at most 33 * B of them, each told by tables of which b it has a part, from which n on, and up to which

The tables are a cascade that runs on the device before the kernel: nothing waits for them but the kernel. A long row is
in as many parts as its tiles come to, an empty one in none; what merges the parts of a row reads where they lie.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from cascade.backends.triton.index import Index, conjunction
from cascade.ir import (
    Apply, Cascade, Const, DType, Einsum, Expr, Extent, Fuse, Init, Param, Rank, Read, Reduce, Result, Size, Target,
)  # fmt: skip
from cascade.walk import free_ranks, fresh, walk


@dataclass(frozen=True, slots=True)
class Uneven:
    """What is visited of a stream at a coordinate of `rank`, as its data says: from the beginning if `first` is None.

    Where it stops may lie behind the end of the stream: a kernel knows better, and parts there have nothing to do.
    """

    rank: str
    first: Expr | None
    stop: Expr


@dataclass(frozen=True, slots=True)
class Shares:
    """The tables of parts, by their number: whose part it is, its stretch.

    And which parts a coordinate c has: how many come before those of c stands at c + 1, so that up to c + 2 is read;
    there are two parts more than coordinates at least.
    """

    uneven: Uneven
    part: str  # the rank that counts the parts
    whose: str
    begins: str
    ends: str
    before: str

    @property
    def tables(self) -> tuple[str, ...]:
        """The tensors, one number a part."""
        return (self.whose, self.begins, self.ends, self.before)

    def read(self, table: str) -> Expr:
        """A number of the part at hand."""
        return Read(table, (Rank(self.part),))

    def parts_before(self, ahead: int) -> Expr:
        """How many parts come before those of the coordinate at hand, or of one `ahead`."""
        return Read(self.before, (Apply("add", (Rank(self.uneven.rank), Const(1 + ahead))),))

    @property
    def own(self) -> Expr:
        """Whether a coordinate has so many parts."""
        return Apply("lt", (Rank(self.part), Apply("sub", (self.parts_before(1), self.parts_before(0)))))

    @property
    def place(self) -> Expr:
        """Where such a part of the coordinate lies among all."""
        return Apply("add", (self.parts_before(0), Rank(self.part)))


def shares_of(uneven: Uneven, part: str, taken: Collection[str]) -> Shares:
    """Shares with names of their own."""
    used = set(taken)
    names = [fresh(f"{part}_{what}", used) for what in ("whose", "begins", "ends", "before")]
    return Shares(uneven, part, *names)


def tables_of(
    shares: Shares,
    each: int,
    tile: int,
    extents: Mapping[str, Size],
    count: int,
    shapes: Mapping[str, tuple[Size, ...]],
    dtypes: Mapping[str, DType],
) -> Index:
    """The cascade of the tables: `each` programs on average a coordinate, `count` parts, `tile` of the stream a tile.

    `extents` are those of ranks, `shapes` and `dtypes` those of tensors.
    """
    made = _Tables(shares, tile, extents, set(extents) | set(shapes) | set(shares.tables))
    made.statements(each)
    ends = [end for end in (shares.uneven.first, shares.uneven.stop) if end is not None]
    params = dict.fromkeys(n.tensor for end in ends for n in walk(end) if isinstance(n, Read))
    size = extents[shares.part]
    results = tuple(Result(name, DType.I32, (size,)) for name in shares.tables)
    typed = tuple(Param(name, dtypes[name], shapes[name]) for name in params)
    together = Fuse(tuple(stmt.target.name for stmt in made.body), shares.part)
    cascade = Cascade("shares", typed, results, tuple(made.body), (together,))
    return Index(cascade, {}, {size: count} if isinstance(size, str) else {}, {}, {r.name: r.shape for r in results})


class _Tables:
    """What writes the statements: all have the rank of parts, so that one kernel computes them."""

    def __init__(self, shares: Shares, tile: int, extents: Mapping[str, Size], taken: set[str]) -> None:
        self.shares, self.tile, self.extents, self.taken = shares, tile, extents, taken
        self.body: list[Einsum] = []
        self.rank, self.part = Rank(shares.uneven.rank), Rank(shares.part)
        self.size = _extent(extents[shares.uneven.rank])

    def statements(self, each: int) -> None:
        """All of them, in order."""
        shares, rank, part, tile = self.shares, self.rank, self.part, Const(self.tile)
        low: Expr = Const(0)
        if shares.uneven.first is not None:
            low = self.map("low", (rank, part), Apply("floordiv", (Apply("max", (shares.uneven.first, low)), tile)))
        high = self.map("high", (rank, part), shares.uneven.stop)
        long = _over(high, tile) if low == Const(0) else Apply("sub", (_over(high, tile), low))
        tiles = self.map("tiles", (rank, part), Apply("max", (long, Const(0))))
        total = self.sum("total", tiles)
        programs = Apply("mul", (self.size, Const(each)))
        length = self.map("length", (part,), Apply("max", (_over(total, programs), Const(1))))
        parts = self.map("parts", (rank, part), _over(tiles, length))
        upto = self.running("upto", parts)
        self.sum(shares.before, self.where(Apply("lt", (Apply("add", (rank, Const(1))), part)), parts))
        done = Apply("le", (upto, part))
        row, ahead = self.sum("row", self.where(done, Const(1))), self.sum("ahead", self.where(done, parts))
        mine = Apply("eq", (rank, row))
        lowest = low if low == Const(0) else self.sum("lowest", self.where(mine, low))
        highest = self.sum("highest", self.where(mine, high))
        self.map(shares.whose, (part,), Apply("min", (row, Apply("sub", (self.size, Const(1))))))
        before = Apply("mul", (Apply("sub", (part, ahead)), length))
        first = self.map(shares.begins, (part,), Apply("mul", (Apply("add", (lowest, before)), tile)))
        end = Apply("add", (first, Apply("mul", (length, tile))))
        self.map(shares.ends, (part,), Apply("min", (end, highest)))

    def map(self, wanted: str, ranks: Sequence[Rank], expr: Expr) -> Expr:
        """A statement that defines a tensor over some ranks, as what reads it."""
        name = wanted if wanted in self.shares.tables else fresh(wanted, self.taken)
        anew = [rank for rank in ranks if rank.name not in free_ranks(expr)]
        where = conjunction([Apply("lt", (rank, _extent(self.extents[rank.name]))) for rank in anew]) if anew else None
        self.body.append(Einsum(Target(name, tuple(rank.name for rank in ranks)), expr, where))
        return Read(name, tuple(ranks))

    def sum(self, wanted: str, body: Expr) -> Expr:
        """A sum over the coordinates that are uneven, for every part."""
        return self.map(wanted, (self.part,), Reduce("sum", (self.rank.name,), body))

    def where(self, test: Expr, value: Expr) -> Expr:
        """A value where a test holds, else 0."""
        return Apply("select", (test, value, Const(0)))

    def running(self, wanted: str, element: Expr) -> Expr:
        """The running sum along the coordinates."""
        name = fresh(wanted, self.taken)
        target = Target(name, (self.rank.name, self.part.name))
        before = Read(name, (Apply("sub", (self.rank, Const(1))), self.part))
        init = Init(self.rank.name, -1, Const(0))
        self.body.append(Einsum(target, Apply("add", (before, element)), None, (init,)))
        return Read(name, (self.rank, self.part))


def _extent(size: Size) -> Expr:
    return Const(size) if isinstance(size, int) else Extent(size)


def _over(number: Expr, by: Expr) -> Expr:
    """A quotient, rounded up."""
    return Apply("floordiv", (Apply("add", (number, Apply("sub", (by, Const(1))))), by))
