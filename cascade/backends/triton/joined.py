"""Ranks that lie together in all that a kernel touches, as one rank.

    Z[m,d] = sum[h,e] U[m,h,e] * W[d,h,e]
    -->  U_flat[m,he] = U[m, he // E, he % E];  W_flat[d,he] = W[d, he // E, he % E]
         Z[m,d] = sum[he] U_flat[m,he] * W_flat[d,he]

A matrix product has rows, columns and a rank that it sums over; heads and their widths, or batches and their rows, are
one of these together. The statements that say so cost nothing: what they define is the same memory in another shape.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade.backends.triton.partition import NO_TILE, Rest, all_ranks, partition, without
from cascade.backends.triton.products import matrix_product
from cascade.inference import Shapes, infer_shapes, stated
from cascade.ir import (
    Apply, Cascade, Const, Directive, Einsum, Expr, Extent, Fold, Fuse, Given, GroupBy, Rank, Read, Reduce, Size, Stmt,
    Target,
)  # fmt: skip
from cascade.walk import defines, expressions, fresh, map_expressions, names, reads, rewrite, targets, walk


@dataclass(frozen=True, slots=True)
class Joined:
    """A cascade with ranks as one: the extents of these, by the two that make each, and which tensors are views."""

    cascade: Cascade
    sizes: Mapping[str, tuple[Size, Size]] = field(default_factory=dict)  # by their shape symbols, in order
    views: Mapping[str, str] = field(default_factory=dict)  # of which tensor
    gaps: Mapping[str, frozenset[int]] = field(default_factory=dict)  # of what is given: as `with_joined` has them

    def extents(self, known: Mapping[str, int]) -> dict[str, int]:
        """The known extents of shape symbols, and those of joined ranks where both of theirs are known."""
        found = dict(known)
        for symbol, sizes in self.sizes.items():
            numbers = [size if isinstance(size, int) else found.get(size) for size in sizes]
            if None not in numbers:
                found[symbol] = numbers[0] * numbers[1]  # type: ignore[operator]
        return found

    def with_parts(self, symbols: Collection[str]) -> frozenset[str]:
        """These symbols, and those of joined ranks that are made of one of them."""
        found = set(symbols)
        for symbol, sizes in self.sizes.items():
            found |= {symbol} if not found.isdisjoint(map(str, sizes)) else set()
        return frozenset(found)

    def parts(self, symbols: Collection[str]) -> frozenset[str]:
        """These symbols, and what those of joined ranks are made of."""
        found = set(symbols)
        for symbol in list(self.sizes)[::-1]:
            found |= {str(size) for size in self.sizes[symbol]} if symbol in found else set()
        return frozenset(found)


def with_joined(before: Joined, extents: Mapping[str, int], gaps: Mapping[str, Collection[int]]) -> Joined:
    """The cascade with such ranks as one, beside those that are already; `extents` are those of shape symbols.

    `gaps` are the dimensions of parameters that do not lie together with the next one, as heads of which some were
    taken lie apart between tokens: of two that do, another shape is the same memory. A parameter that is not among
    them has gaps everywhere. What kernels exchange has none.
    """
    everywhere = {param.name: range(len(param.shape)) for param in before.cascade.params}
    known = {name: frozenset(own) for name, own in {**everywhere, **gaps, **before.gaps}.items()}
    found = dataclasses.replace(before, gaps=known)
    while (pair := next(_pairs(found, found.extents(extents)), None)) is not None:
        found = pair.applied(found)
    return found


def _pairs(before: Joined, extents: Mapping[str, int]) -> Iterator[_Pair]:
    """The ranks that are one, of the rows, the columns or what a product sums over, in kernels of products alone.

    And where two ranks are one already: what attends to rows and columns of a picture often has rows and columns.
    """
    cascade = before.cascade
    shapes = infer_shapes(cascade)
    ranks = {rank: size if isinstance(size, int) else extents[size] for rank, size in shapes.ranks.items()}
    ranks_of_two = {rank for rank, size in shapes.ranks.items() if size in before.sizes}
    ordered = {name for item in cascade.schedule if isinstance(item, GroupBy) for name in item.statements}
    for group in partition(cascade, ranks, before.views):
        apart = isinstance(group, Rest) and group.reason != NO_TILE
        if apart or not ordered.isdisjoint(group.names):
            continue
        if not _sums_only(group.statements) and not any(ranks_of_two & set(all_ranks(s)) for s in group.statements):
            continue
        for stmt in group.statements:
            for first, second in _beside(stmt):
                pair = _Pair(first, second, group.statements, shapes)
                if all(map(pair.suits, group.statements)) and pair.lies_alike() and pair.lies_together(before.gaps):
                    yield pair


def _sums_only(statements: Sequence[Stmt]) -> bool:
    """Whether statements are sums, counts and maps."""
    nodes = [n for stmt in statements if isinstance(stmt, Einsum) and not stmt.inits for n in walk(stmt.expr)]
    sums = all(node.reducer in ("sum", "count") for node in nodes if isinstance(node, Reduce))
    return sums and all(isinstance(stmt, Einsum) for stmt in statements)


def _beside(stmt: Stmt) -> Iterator[tuple[str, str]]:
    """Ranks side by side on one side of a product, or both summed over."""
    product = matrix_product(stmt)
    if product is None or not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce):
        return
    sides = (product.rows, product.columns, frozenset(stmt.expr.ranks))
    indices = [stmt.target.ranks, *(_names(node.index) for node in walk(stmt.expr) if isinstance(node, Read))]
    for index in indices:
        for pair in itertools.pairwise(index):
            if any(side.issuperset(pair) for side in sides):
                yield pair


def _names(index: Sequence[Expr]) -> tuple[str, ...]:
    return tuple(part.name if isinstance(part, Rank) else "" for part in index)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two ranks, the statements of a kernel, and the shapes of the cascade."""

    first: str
    second: str
    statements: tuple[Stmt, ...]
    shapes: Shapes

    @property
    def ranks(self) -> tuple[Rank, Rank]:
        """Both."""
        return Rank(self.first), Rank(self.second)

    @property
    def reads(self) -> list[Read]:
        """What is read at both."""
        nodes = [node for stmt in self.statements for expr in expressions(stmt) for node in walk(expr)]
        return [node for node in nodes if isinstance(node, Read) and self.ranks[0] in node.index]

    @property
    def read(self) -> set[str]:
        """The tensors that are read at both."""
        return {node.tensor for node in self.reads}

    def suits(self, stmt: Stmt) -> bool:
        """Whether a statement has them side by side, and nowhere else."""
        if not isinstance(stmt, Einsum) or stmt.inits:
            return False
        nodes = [node for expr in expressions(stmt) for node in walk(expr)]
        indices = [node.index for node in nodes if isinstance(node, Read)]
        sums = [node.ranks for node in nodes if isinstance(node, Reduce)]
        together = all(map(self.lies, (tuple(map(Rank, stmt.target.ranks)), *indices)))
        used = 2 * sum(self.ranks[0] in index for index in indices)
        summed = all((self.first in ranks) == (self.second in ranks) for ranks in sums)
        return together and summed and used == sum(node in self.ranks for node in nodes)

    def lies_alike(self) -> bool:
        """Whether each tensor has them at one place, in all accesses, among ranks that are all different.

        One view of it, of all its elements, then serves every access.
        """
        accesses: list[tuple[str, tuple[Expr, ...]]] = [(node.tensor, node.index) for node in self.reads]
        for target in (target for stmt in self.statements for target in targets(stmt)):
            accesses += [(target.name, tuple(map(Rank, target.ranks)))] if self.first in target.ranks else []
        places: dict[str, set[int]] = {}
        for tensor, index in accesses:
            if not all(isinstance(part, Rank) for part in index) or len(set(index)) < len(index):
                return False
            places.setdefault(tensor, set()).add(index.index(self.ranks[0]))
        return all(len(at) == 1 for at in places.values())

    def lies_together(self, gaps: Mapping[str, frozenset[int]]) -> bool:
        """Whether what is given has no gaps between them."""
        return all(node.index.index(self.ranks[0]) not in gaps.get(node.tensor, ()) for node in self.reads)

    def lies(self, index: Sequence[Expr]) -> bool:
        """Whether coordinates have both, side by side and once, or neither."""
        at = [place for place, part in enumerate(index) if part in self.ranks]
        return not at or (len(at) == 2 and tuple(index[at[0] : at[0] + 2]) == self.ranks)

    def applied(self, before: Joined) -> Joined:
        """The cascade with them as one rank in these statements."""
        cascade, taken = before.cascade, names(before.cascade)
        sizes = (self.shapes.ranks[self.first], self.shapes.ranks[self.second])
        symbol = next((name for name, known in before.sizes.items() if known == sizes), None)
        symbol = symbol or fresh(f"{self.first}{self.second}".upper(), taken)
        flat = _Flat(self, Rank(fresh(f"{self.first}{self.second}", taken)), taken, dict(before.views))
        own = {name for stmt in self.statements for name in defines(stmt)}
        kept = {result.name for result in cascade.results}
        kept |= {name for stmt in cascade.body if stmt not in self.statements for name in reads(stmt)}
        body: list[Stmt] = [flat.view(param.name, self.shapes) for param in cascade.params if param.name in self.read]
        for stmt in cascade.body:
            body.append(flat.changed(stmt) if stmt in self.statements else stmt)
            for name in defines(stmt):
                if name in own and name in kept and isinstance(stmt, Einsum) and self.first in stmt.target.ranks:
                    body.append(flat.back(stmt, sizes[1]))
                elif name not in own and name in self.read:
                    body.append(flat.view(name, self.shapes))
        schedule = tuple(new for item in cascade.schedule for new in flat.directives(item, cascade.body))
        found = dataclasses.replace(
            cascade, body=tuple(body), schedule=schedule, given=(*cascade.given, Given(flat.rank.name, symbol))
        )
        found = stated(found, {**self.shapes.ranks, flat.rank.name: symbol})
        gaps = dict(before.gaps)
        for node in (node for node in self.reads if node.tensor in gaps):
            at = node.index.index(self.ranks[0])
            gaps[flat.name(node.tensor)] = frozenset(dim - (dim > at) for dim in before.gaps[node.tensor])
        return Joined(found, {**before.sizes, symbol: sizes}, flat.views, gaps)


@dataclass(slots=True)
class _Flat:
    """Statements with the one rank in the place of two, and what they call the tensors that have it."""

    pair: _Pair
    rank: Rank
    taken: set[str]
    views: dict[str, str]
    renamed: dict[str, str] = field(default_factory=dict)

    def name(self, tensor: str) -> str:
        """What a tensor is called in the other shape."""
        if tensor not in self.renamed:
            self.renamed[tensor] = fresh(f"{tensor}_flat", self.taken)
        return self.renamed[tensor]

    def joined(self, index: Sequence[Expr]) -> tuple[Expr, ...]:
        """Coordinates with one where both were."""
        return tuple(self.rank if part == self.pair.ranks[0] else part for part in index if part != self.pair.ranks[1])

    def expression(self, expr: Expr) -> Expr:
        def change(node: Expr) -> Expr:
            if isinstance(node, Read) and self.pair.ranks[0] in node.index:
                primes = node.tensor[len(node.tensor.rstrip("'")) :]
                return Read(self.name(node.tensor.rstrip("'")) + primes, self.joined(node.index))
            if isinstance(node, Reduce) and self.pair.first in node.ranks:
                ranks = (r for r in node.ranks if r != self.pair.second)
                return dataclasses.replace(
                    node, ranks=tuple(self.rank.name if rank == self.pair.first else rank for rank in ranks)
                )
            return node

        return rewrite(expr, change)

    def target(self, target: Target) -> Target:
        if self.pair.first not in target.ranks:
            return target
        joined = self.joined(tuple(map(Rank, target.ranks)))
        return Target(self.name(target.name), tuple(part.name for part in joined if isinstance(part, Rank)))

    def changed(self, stmt: Stmt) -> Stmt:
        """A statement with the one rank."""
        found = map_expressions(stmt, self.expression)
        return dataclasses.replace(found, target=self.target(found.target)) if isinstance(found, Einsum) else found

    def view(self, tensor: str, shapes: Shapes) -> Einsum:
        """A tensor that is read, in the other shape."""
        node = next(node for node in self.pair.reads if node.tensor == tensor)
        size = shapes.ranks[self.pair.second]
        width: Expr = Const(size) if isinstance(size, int) else Extent(size)
        parts: dict[Expr, Expr] = dict(
            zip(self.pair.ranks, (Apply(op, (self.rank, width)) for op in ("floordiv", "mod")), strict=True)
        )
        ranks = tuple(part.name for part in self.joined(node.index) if isinstance(part, Rank))
        target = Target(self.name(tensor), ranks)
        self.views[target.name] = tensor
        return Einsum(target, Read(tensor, tuple(parts.get(part, part) for part in node.index)))

    def back(self, stmt: Einsum, size: Size) -> Einsum:
        """What a statement defined, in its own shape."""
        width: Expr = Const(size) if isinstance(size, int) else Extent(size)
        first, second = self.pair.ranks
        one = Apply("add", (Apply("mul", (first, width)), second))
        index = self.joined(tuple(map(Rank, stmt.target.ranks)))
        self.views[stmt.target.name] = self.name(stmt.target.name)
        return Einsum(
            stmt.target, Read(self.name(stmt.target.name), tuple(one if p == self.rank else p for p in index))
        )

    def directives(self, item: Directive, body: Sequence[Stmt]) -> Iterator[Directive]:
        """A part of the schedule with the statements under their names, of a trip those with the rank by themselves."""
        own = {name for stmt in self.pair.statements for name in defines(stmt)}
        if isinstance(item, Fuse) and Rank(item.rank) in self.pair.ranks:
            if own.issuperset(item.statements):
                yield dataclasses.replace(item, statements=self.names(item.statements), rank=self.rank.name)
            elif (left := without(item, own)) is not None:
                yield left
        elif isinstance(item, Fuse):
            yield dataclasses.replace(item, statements=self.names(item.statements))
        elif not isinstance(item, Fold) or own.isdisjoint((*item.state, *item.update, *item.finalize)):
            yield item
        else:
            mine, rest = without(item, {*item.state, *item.update, *item.finalize} - own), without(item, own)
            parts = [part for part in (mine, rest) if isinstance(part, Fold)]
            if all(_is_closed(part, item, body) for part in parts):  # else no trip of one kernel
                yield from (self.renamed_fold(part) if part is mine else part for part in parts)

    def renamed_fold(self, item: Fold) -> Fold:
        """A trip of these statements alone, under their names."""
        init = (dataclasses.replace(i, target=self.target(i.target), expr=self.optional(i.expr)) for i in item.init)
        merge = (dataclasses.replace(m, target=self.target(m.target), expr=self.expression(m.expr)) for m in item.merge)
        return dataclasses.replace(
            item, state=self.names(item.state), init=tuple(init), update=self.names(item.update), merge=tuple(merge),
            finalize=self.names(item.finalize),
        )  # fmt: skip

    def optional(self, expr: Expr | None) -> Expr | None:
        return None if expr is None else self.expression(expr)

    def names(self, some: Sequence[str]) -> tuple[str, ...]:
        own = {name for stmt in self.pair.statements for name in defines(stmt)}
        return tuple(self.renamed.get(name, name) if name in own else name for name in some)


def _is_closed(part: Fold, whole: Fold, body: Sequence[Stmt]) -> bool:
    """Whether a part of a fold needs nothing of the other states and of what changes with them."""
    changing = set(whole.state)
    for stmt in body:
        if not changing.isdisjoint(reads(stmt)):
            changing |= set(defines(stmt)) & set(whole.update)
    others = changing - {*part.state, *part.update}
    own = [stmt for stmt in body if not {*part.state, *part.update}.isdisjoint(defines(stmt))]
    merged = {node.tensor.rstrip("'") for merge in part.merge for node in walk(merge.expr) if isinstance(node, Read)}
    return others.isdisjoint(merged) and all(others.isdisjoint(reads(stmt)) for stmt in own)
