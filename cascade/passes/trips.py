"""In which trip over a rank every statement can run, if maps between reductions are taken into their readers.

What `pass_count` counts is the cascade as written. Here a reduction that reads, through maps, what an earlier reduction
of the same trip gives is first asked whether it can be lifted into that trip; what it cannot starts the next one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from cascade.ir import Apply, Const, Einsum, Expr, Rank, Read, Reduce, Stmt, TopK
from cascade.walk import children, defines, expressions, substitute, targets, walk, with_children


def operand(stmt: Stmt) -> Expr | None:
    """What a reduction folds; None for a map."""
    if isinstance(stmt, TopK):
        return stmt.body
    return stmt.expr.body if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else None


def folded(stmt: Stmt) -> tuple[str, ...]:
    """The ranks that a statement reduces."""
    if isinstance(stmt, TopK):
        return (stmt.rank,)
    return stmt.expr.ranks if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else ()


def is_map(stmt: Stmt) -> bool:
    """Whether the statement is pointwise and no recurrence."""
    return isinstance(stmt, Einsum) and not isinstance(stmt.expr, Reduce) and not stmt.inits


def own_reads(stmt: Stmt) -> Iterator[Read]:
    """Every read of a statement, those in indices and filters included."""
    return (node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read))


def mentions(expr: Expr, rank: str) -> bool:
    """Whether the expression depends on the coordinate of a rank."""
    return any(isinstance(node, Rank) and node.name == rank for node in walk(expr))


@dataclass(slots=True, eq=False)
class Trips:
    """The trips over one rank. `level` of a tensor that has the rank is the trip in which it can be computed inside of
    a reader; of one that has not, the trip after which it is known (0: before all). `streams` is the trip in which a
    tensor that has the rank can be computed as a statement of its own.
    """

    rank: str
    stmts: dict[str, Stmt]  # by the tensors they define
    cyclic: frozenset[str]
    level: dict[str, int] = field(default_factory=dict)
    streams: dict[str, int] = field(default_factory=dict)
    place: dict[str, int] = field(default_factory=dict)  # the order in which tensors were settled

    def settle(self, stmt: Stmt, level: int, streams: int | None = None) -> None:
        """Notes the trip of a statement."""
        for name in defines(stmt):
            self.place.setdefault(name, len(self.place))
            self.level[name] = level
            if streams is not None:
                self.streams[name] = streams

    def ranks(self, tensor: str) -> tuple[str, ...]:
        """The rank variables that a tensor is defined along."""
        stmt = self.stmts.get(tensor)
        return () if stmt is None else next((t.ranks for t in targets(stmt) if t.name == tensor), ())

    def carries(self, tensor: str) -> bool:
        """Whether the tensor is defined along the rank."""
        return self.rank in self.ranks(tensor)

    def touches(self, stmt: Stmt) -> bool:
        """Whether the statement has the rank."""
        if self.rank in folded(stmt) or any(self.rank in target.ranks for target in targets(stmt)):
            return True
        return any(mentions(expr, self.rank) for expr in expressions(stmt))

    def along(self, read: Read) -> bool:
        """Whether a read of a tensor with the rank stands at the coordinate at hand."""
        return read.index[self.ranks(read.tensor).index(self.rank)] == Rank(self.rank)

    def earliest(self, stmt: Stmt) -> tuple[int, int]:
        """The trip of a statement inside of its reader, and as one of its own."""
        inside, alone = 1, 1
        for read in own_reads(stmt):
            if read.tensor not in self.level or read.tensor in defines(stmt):
                continue
            level = self.level[read.tensor]
            if self.carries(read.tensor):
                streams = self.streams[read.tensor]
                if self.along(read):
                    inside, alone = max(inside, level), max(alone, streams)
                else:
                    later = streams if self._behind(read) else streams + 1
                    inside, alone = max(inside, later), max(alone, later)
            elif mentions(read, self.rank):
                inside, alone = max(inside, level + 1), max(alone, level + 1)
            else:
                inside, alone = max(inside, level), max(alone, level + 1)
        return inside, alone

    def _behind(self, read: Read) -> bool:
        """Whether a read stands a fixed number of coordinates back, or ahead by a bounded number."""
        index = read.index[self.ranks(read.tensor).index(self.rank)]
        shifted = isinstance(index, Apply) and index.op in ("add", "sub") and index.args[0] == Rank(self.rank)
        return shifted and isinstance(index, Apply) and isinstance(index.args[1], Const)

    def enter(self, stmt: Stmt) -> None:
        """Settles a statement that does not fold the rank."""
        if not self.touches(stmt):
            known = [self.known(read) for read in own_reads(stmt)]
            self.settle(stmt, max(known, default=0))
            return
        inside, alone = self.earliest(stmt)
        if not self._inlines(stmt):
            inside = alone
        self.settle(stmt, inside, alone)

    def known(self, read: Read) -> int:
        """The trip after which all of what is read is known."""
        return self.streams.get(read.tensor, self.level.get(read.tensor, 0))

    def _inlines(self, stmt: Stmt) -> bool:
        """Whether a statement can be taken into its readers: a map that stands on its own."""
        return is_map(stmt) and not any(name in self.cyclic for name in defines(stmt))

    def inlined(self, expr: Expr, trip: int) -> tuple[Expr, tuple[Expr, ...]]:
        """The expression with maps that are too late for the trip taken in, and the filters of those."""
        filters: dict[Expr, None] = {}
        return self._inline(expr, trip, filters), tuple(filters)

    def _late(self, tensor: str, trip: int) -> bool:
        """Whether a tensor with the rank cannot be a statement of the trip."""
        return self.carries(tensor) and self.streams.get(tensor, 0) > trip

    def too_late(self, expr: Expr, trip: int) -> bool:
        """Whether an expression, maps taken in, still reads what cannot be a statement of the trip."""
        return any(isinstance(node, Read) and self._late(node.tensor, trip) for node in walk(expr))

    def _inline(self, expr: Expr, trip: int, filters: dict[Expr, None]) -> Expr:
        stmt = self.stmts.get(expr.tensor) if isinstance(expr, Read) else None
        if (
            isinstance(expr, Read)
            and isinstance(stmt, Einsum)
            and self._late(expr.tensor, trip)
            and self._inlines(stmt)
        ):
            actual = dict(zip(stmt.target.ranks, expr.index, strict=True))
            if stmt.where is not None:
                filters[substitute(stmt.where, actual)] = None
            return self._inline(substitute(stmt.expr, actual), trip, filters)
        return with_children(expr, tuple(self._inline(child, trip, filters) for child in children(expr)))

    def frames(self, expr: Expr, trip: int) -> tuple[str, ...]:
        """The tensors without the rank that the trip itself is computing."""
        found = (
            node.tensor
            for node in walk(expr)
            if isinstance(node, Read)
            and self.level.get(node.tensor) == trip
            and not self.carries(node.tensor)
            and not mentions(node, self.rank)
        )
        return tuple(dict.fromkeys(found))

    def reductions_below(self, names: tuple[str, ...], trip: int) -> tuple[str, ...]:
        """The reductions of the trip that these tensors without the rank depend on."""
        found: dict[str, None] = {}
        seen: set[str] = set()
        todo = list(names)
        while todo:
            name = todo.pop()
            stmt = self.stmts.get(name)
            if stmt is None or name in seen or self.level.get(name) != trip or self.carries(name):
                continue
            seen.add(name)
            if self.rank in folded(stmt):
                found[defines(stmt)[0]] = None
            else:
                todo.extend(read.tensor for read in own_reads(stmt))
        return tuple(sorted(found, key=self.place.__getitem__))


def conjunction(filters: tuple[Expr | None, ...]) -> Expr | None:
    """All of the filters, each once."""
    given = list(dict.fromkeys(f for f in filters if f is not None))
    result = given[0] if given else None
    for other in given[1:]:
        assert result is not None
        result = Apply("and", (result, other))
    return result


def renamed(stmt: Stmt, names: Mapping[str, str]) -> Stmt:
    """The statement with tensors renamed, on both sides."""

    def change(expr: Expr) -> Expr:
        expr = with_children(expr, tuple(change(child) for child in children(expr)))
        if isinstance(expr, Read):
            base = expr.tensor.rstrip("'")
            primes = expr.tensor[len(base) :]
            return dataclasses.replace(expr, tensor=names.get(base, base) + primes)
        return expr

    assert isinstance(stmt, Einsum | TopK)
    if isinstance(stmt, TopK):
        values, coords = (dataclasses.replace(t, name=names.get(t.name, t.name)) for t in (stmt.values, stmt.coords))
        where = None if stmt.where is None else change(stmt.where)
        return dataclasses.replace(stmt, values=values, coords=coords, body=change(stmt.body), where=where)
    return dataclasses.replace(
        stmt,
        target=dataclasses.replace(stmt.target, name=names.get(stmt.target.name, stmt.target.name)),
        expr=change(stmt.expr),
        where=None if stmt.where is None else change(stmt.where),
        inits=tuple(dataclasses.replace(init, expr=change(init.expr)) for init in stmt.inits),
    )
