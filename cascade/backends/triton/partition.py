"""Which statements share a kernel, and how the ranks lie in it.

A kernel spreads the ranks that all its statements have over the programs of its grid. Of the other ranks one may be
streamed, in tiles and in as many trips as its statements need; the rest must fit into a tile whole. Statements join
the kernel of what they read as long as such an arrangement exists: nothing is asked about what they compute. A rank
that a recurrence steps along is streamed, in order, or whole.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from cascade.backends.triton.products import matrix_product
from cascade.backends.triton.recurrence import composition, is_last, refusal, stepped
from cascade.inference import infer_shapes
from cascade.ir import Call, Cascade, Einsum, Fold, Fuse, Rank, Read, Reduce, Stmt, TopK
from cascade.order import members, units
from cascade.walk import defines, expressions, free_ranks, reads, targets, walk

ROW_LIMIT = 32768  # elements of a row that a program may hold at once
STEPS_LIMIT = 8192  # the same where they are stepped through: a scan has them several times
PRODUCT_LIMIT = 1024  # extent of a rank that a tile of a matrix product may have whole
MANY = 128  # programs that keep a GPU busy
SHORT = 128  # a reduced rank of a matrix product up to this extent needs no loop


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The ranks of a group: shared out over programs, streamed, or whole in a tile."""

    shared: tuple[str, ...]
    stream: str | None
    whole: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Statements of one kernel in order, how their ranks lie, and the fold that carries a state along the stream."""

    statements: tuple[Stmt, ...]
    arrangement: Arrangement
    fold: Fold | None

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that is defined in the kernel."""
        return tuple(name for stmt in self.statements for name in defines(stmt))


@dataclass(frozen=True, slots=True)
class Rest:
    """Statements that no kernel computes, and why: they run one by one, as the interpreter runs them."""

    statements: tuple[Stmt, ...]
    reason: str

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that is defined here."""
        return tuple(name for stmt in self.statements for name in defines(stmt))


def partition(cascade: Cascade, extents: Mapping[str, int]) -> tuple[Group | Rest, ...]:
    """The statements of a canonical cascade in groups, in an order in which they can run."""
    found: list[list[Stmt] | Rest] = []
    for unit in units(cascade.body, ()):
        if unit.cyclic and len(unit.statements) > 1:
            found.append(Rest(unit.statements, "its statements need each other's earlier coordinates"))
            continue
        for stmt in unit.statements:
            _place(stmt, found, cascade, extents)
    return tuple(item if isinstance(item, Rest) else _finished(item, cascade, extents) for item in found)


def _place(stmt: Stmt, found: list[list[Stmt] | Rest], cascade: Cascade, extents: Mapping[str, int]) -> None:
    """Adds a statement to the last group that it can join, or begins another."""
    if (reason := refused(stmt)) is not None:
        found.append(Rest((stmt,), reason))
        return
    needed = set(reads(stmt))
    companions = set(_companions(stmt, cascade))
    for group in reversed(found):
        made = set(group.names) if isinstance(group, Rest) else {name for s in group for name in defines(s)}
        near = isinstance(group, list) and bool(needed & made or companions & made)
        if isinstance(group, list) and near and _worthwhile(group, stmt, cascade, extents):
            group.append(stmt)
            return
        if needed & made:  # it must come after this group
            break
    found.append([stmt])


def _worthwhile(group: Sequence[Stmt], stmt: Stmt, cascade: Cascade, extents: Mapping[str, int]) -> bool:
    """Whether a statement can join a group without leaving most of a GPU idle that both would use alone."""
    together = arrange([*group, stmt], cascade, extents)
    if together is None:
        return False
    if together.stream is not None or any(matrix_product(other) for other in (*group, stmt)):
        return True  # a stream can be shared by programs
    alone = [arrange(group, cascade, extents), arrange([stmt], cascade, extents)]
    programs = [_coordinates(found.shared, extents) for found in alone if found is not None]
    return _coordinates(together.shared, extents) >= min(*programs, MANY)


def _coordinates(ranks: Sequence[str], extents: Mapping[str, int]) -> int:
    count = 1
    for rank in ranks:
        count *= extents[rank]
    return count


def _companions(stmt: Stmt, cascade: Cascade) -> Iterator[str]:
    """The statements that the schedule has beside this one in a group."""
    for item in cascade.schedule:
        if isinstance(item, (Fuse, Fold)) and not set(defines(stmt)).isdisjoint(members(item)):
            yield from members(item)


def refused(stmt: Stmt) -> str | None:
    """Why a statement cannot stand in a kernel at all; None where it can."""
    if isinstance(stmt, Call):
        return "it calls another cascade"
    return refusal(stmt) if isinstance(stmt, Einsum) and stmt.inits else None


def _finished(statements: Sequence[Stmt], cascade: Cascade, extents: Mapping[str, int]) -> Group | Rest:
    arrangement = arrange(statements, cascade, extents)
    if arrangement is None:  # one statement by itself: what joins others is arranged before it does
        return Rest(tuple(statements), "its ranks fit no tile, with one of them streamed")
    fold = None if arrangement.stream is None else fold_along(statements, arrangement.stream, cascade)
    return Group(tuple(statements), arrangement, fold)


def fold_along(statements: Sequence[Stmt], rank: str, cascade: Cascade) -> Fold | None:
    """What of a fold of the schedule over a rank concerns some statements.

    None where a state joins a reduction that stands in another kernel: it is complete then, and nothing moves.
    """
    names = {name for stmt in statements for name in defines(stmt)}
    along = {name for stmt in statements if rank in reduced_ranks(stmt) for name in defines(stmt)}
    for item in cascade.schedule:
        if isinstance(item, Fold) and item.rank == rank and not names.isdisjoint(item.state):
            states = [stmt for stmt in statements if not set(defines(stmt)).isdisjoint(item.state)]
            steps = all(set(defines(stmt)) <= along or not along.isdisjoint(reads(stmt)) for stmt in states)
            return _restricted(item, names) if steps else None
    return None


def _restricted(fold: Fold, names: set[str]) -> Fold:
    """The part of a fold that concerns some statements."""
    return dataclasses.replace(
        fold,
        state=tuple(name for name in fold.state if name in names),
        init=tuple(init for init in fold.init if init.target.name in names),
        update=tuple(name for name in fold.update if name in names),
        merge=tuple(merge for merge in fold.merge if merge.target.name in names),
        finalize=tuple(name for name in fold.finalize if name in names),
    )


def arrange(statements: Sequence[Stmt], cascade: Cascade, extents: Mapping[str, int]) -> Arrangement | None:
    """How the ranks of some statements can lie in one kernel; None where they cannot."""
    own = {target.name: target.ranks for stmt in statements for target in targets(stmt)}
    if any(not _plain(stmt, own, statements, cascade) for stmt in statements):
        return None
    steps = {stmt.inits[0].rank for stmt in stepped(statements)}
    if len(steps) > 1:
        return None
    kept = [set(ranks) for ranks in own.values()]
    reduced = {rank for stmt in statements for rank in reduced_ranks(stmt)}
    common = set.intersection(*kept) - reduced - steps
    if not common and len(statements) > 1 and any(kept):
        return None
    ranks = list(dict.fromkeys(rank for stmt in statements for rank in all_ranks(stmt)))
    shared = tuple(rank for rank in ranks if rank in common)
    others = [rank for rank in ranks if rank not in common]
    products = [found for stmt in statements if (found := matrix_product(stmt)) is not None]
    if products:
        return None if steps else _with_products(shared, others, statements, cascade, extents)
    return _rows(shared, others, statements, extents, next(iter(steps), None))


def _with_products(
    shared: tuple[str, ...],
    others: list[str],
    statements: Sequence[Stmt],
    cascade: Cascade,
    extents: Mapping[str, int],
) -> Arrangement | None:
    """With matrix products: the rank of a fold, or the longest reduced rank, is streamed; the others must be short."""
    reduced = [rank for stmt in statements for rank in reduced_ranks(stmt)]
    last = [found.over for stmt in statements if (found := matrix_product(stmt)) is not None][-1]
    folded = {item.rank for item in cascade.schedule if isinstance(item, Fold)} & set(reduced)
    candidates = sorted(
        {rank for rank in others if rank in reduced and (extents[rank] > SHORT or rank in folded)},
        key=lambda rank: (rank in folded, rank == last, extents[rank]),
        reverse=True,
    )
    stream = next(iter(candidates), None)
    whole = tuple(rank for rank in others if rank != stream)
    if any(extents[rank] > PRODUCT_LIMIT for rank in whole):
        return None
    widest = max((held(stmt, set(whole), extents) for stmt in statements), default=1)
    return Arrangement(shared, stream, whole) if widest <= PRODUCT_LIMIT * 2 else None


def _rows(
    shared: tuple[str, ...],
    others: list[str],
    statements: Sequence[Stmt],
    extents: Mapping[str, int],
    along: str | None,
) -> Arrangement | None:
    """Without matrix products: everything is whole while it fits, else the longest rank is streamed.

    That is the rank `along` which recurrences step, if any; where nothing composes their steps it is streamed anyway.
    """
    limit = ROW_LIMIT if along is None else 0 if steps_singly(statements) else STEPS_LIMIT
    if max((held(stmt, set(others), extents) for stmt in statements), default=1) <= limit:
        return Arrangement(shared, None, tuple(others))
    stream = max(others, key=lambda rank: extents[rank]) if along is None else along
    whole = tuple(rank for rank in others if rank != stream)
    if any(isinstance(stmt, TopK) and stmt.rank == stream for stmt in statements):
        return None
    fits = max(held(stmt, set(whole), extents) for stmt in statements) <= ROW_LIMIT // 16
    return Arrangement(shared, stream, whole) if fits else None


def steps_singly(statements: Sequence[Stmt]) -> bool:
    """Whether a recurrence among statements goes one coordinate at a time: nothing composes its steps."""
    return any(composition(stmt) is None for stmt in stepped(statements))


def held(stmt: Stmt, whole: set[str], extents: Mapping[str, int]) -> int:
    """The elements of the largest tile of a statement over these ranks."""
    product = matrix_product(stmt)
    groups: list[set[str] | frozenset[str]] = [set(all_ranks(stmt))]
    if isinstance(stmt, TopK):
        groups = [set(stmt.values.ranks), set(all_ranks(stmt)) - set(stmt.values.ranks) | {stmt.rank}]
    if product is not None:
        target = set(targets(stmt)[0].ranks)
        groups = [target, product.columns | {product.over}, product.rows | {product.over}]
    size = 1
    for ranks in groups:
        found = 1
        for rank in ranks & whole:
            found *= power_of_two(extents[rank])
        size = max(size, found)
    return size


def power_of_two(extent: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, extent - 1).bit_length()


def _plain(stmt: Stmt, own: Mapping[str, tuple[str, ...]], statements: Sequence[Stmt], cascade: Cascade) -> bool:
    """Whether what a statement reads of the same kernel stands at its own coordinates.

    A statement that has not the rank which a recurrence steps along may read where it ends.
    """
    made = defines(stmt)
    ends = {s.target.name: s for s in stepped(statements) if s.inits[0].rank not in all_ranks(stmt)}
    for expr in expressions(stmt):
        for node in walk(expr):
            inside = isinstance(node, Read) and node.tensor in own and node.tensor not in made
            if not isinstance(node, Read) or not inside or node.index == tuple(map(Rank, own[node.tensor])):
                continue
            ended = ends.get(node.tensor)
            if ended is None or not is_last(node, ended, infer_shapes(cascade).ranks[ended.inits[0].rank]):
                return False
    return True


def reduced_ranks(stmt: Stmt) -> tuple[str, ...]:
    """The ranks that a statement folds."""
    if isinstance(stmt, TopK):
        return (stmt.rank,)
    return stmt.expr.ranks if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else ()


def all_ranks(stmt: Stmt) -> tuple[str, ...]:
    """The ranks of a statement: of its targets, of what it folds, of its filter."""
    found = dict.fromkeys(rank for target in targets(stmt) for rank in target.ranks)
    found |= dict.fromkeys(reduced_ranks(stmt))
    found |= dict.fromkeys(rank for expr in expressions(stmt) for rank in free_ranks(expr))
    return tuple(found)
