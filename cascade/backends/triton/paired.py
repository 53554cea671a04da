"""Two ranks that are only ever reduced together, as one rank.

    S[b,l,w] = sum[e] Q[b,e] * K[pages[b,l],w,e] where l*W + w < len[b];  Y[b,f] = sum[l,w] S[b,l,w] * V[pages[b,l],w,f]
    -->  S[b,lw] = sum[e] Q[b,e] * K[pages[b,lw//W],lw%W,e] where lw < len[b]
         Y[b,f] = sum[lw] S[b,lw] * V[pages[b,lw//W],lw%W,f]

A matrix product sums over one rank: of two it would go through the first by single coordinates, each with as many rows
as the second has. Of the one that both make, tiles are as long as suits the product. So it is with pages of a table,
where every row is looked up, and with rows and columns of a picture, where a trip over either carries a state. What
is given at both side by side, without gaps between them, is the same memory in another shape.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

from cascade.backends.triton.joined import Joined
from cascade.backends.triton.partition import all_ranks, tied
from cascade.backends.triton.products import factors, folded, matrix_product, ranks_of
from cascade.inference import infer_shapes, stated
from cascade.ir import (
    Apply, Cascade, Const, Directive, Einsum, Expr, Extent, Fold, Fuse, Given, Rank, Read, Reduce, Size, Stmt, Target,
)  # fmt: skip
from cascade.walk import children, defines, expressions, fresh, map_expressions, map_fold, names, rewrite, targets, walk

LONG = 256  # rows of a page, above which tiles of one page are as long as any, and need no table
REDUCERS = frozenset({"sum", "max", "min", "any", "all", "count", "prod"})  # which give no coordinate


def with_paired(cascade: Cascade, extents: Mapping[str, int], certain: Mapping[str, int]) -> Joined:
    """The cascade with such ranks as one; `extents` are those of shape symbols, `certain` those that calls share."""
    found = Joined(cascade)
    while (pair := next(_pairs(found, found.extents(extents), certain), None)) is not None:
        found = pair.applied(found)
    return found


def with_summed(before: Joined, certain: Mapping[str, int]) -> Joined:
    """The cascade with sums over one rank in products that sum over several, for each of these by itself.

    Y[t,d] = sum[w,c] X[t+w,c] * W[w,c,d]          -->  Y[t,d] = sum[wc] X[t+wc//C,wc%C] * W[wc//C,wc%C,d]
    Z[t,d] = sum[h,e] U[h,t,e] * W[h,e,d]          -->  Z[t,d] = sum[he] U[he//E,t,he%E] * W[he//E,he%E,d]

    A tile along one of them alone has a product for each coordinate of the other. Where they lie side by side in all
    factors these are in another shape instead (`joined.py`).
    """
    while (found := next(_summed(before, certain), None)) is not None:
        before = found[0].applied_to(before, found[1])
    return before


def _summed(before: Joined, certain: Mapping[str, int]) -> Iterator[tuple[_Pair, Einsum]]:
    """The first two ranks that a product sums over, as they lie in the factor that has them side by side, if any."""
    fixed, sizes = tied(before.cascade), infer_shapes(before.cascade).ranks
    for stmt in before.cascade.body:
        found = matrix_product(stmt)
        if found is None or not found.two_sided or not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce):
            continue
        reads = [node for node in walk(stmt.expr) if isinstance(node, Read)]
        looks_up = any(isinstance(inner, Read) for node in reads for at in node.index for inner in walk(at))
        if len(stmt.expr.ranks) < 2 or stmt.where is not None or looks_up or stmt.target.name in fixed:
            continue
        ranks = {rank for rank in stmt.expr.ranks if sizes[rank] in before.sizes}
        orders = [
            [at.name for at in _together(node.index, ranks)[0] or node.index if isinstance(at, Rank)] for node in reads
        ]
        pairs = [p for order in orders for p in itertools.pairwise(order) if set(p) <= set(stmt.expr.ranks)]
        every = [order for order in orders if set(order) & set(stmt.expr.ranks)]
        if pairs and all(pairs[0] in itertools.pairwise(order) for order in every):
            continue
        moved = {rank for node in reads for at in node.index if isinstance(at, Apply) for rank in ranks_of(at)}
        pairs.sort(key=lambda pair: not moved.issuperset(pair))  # the places of a window first
        first, second = pairs[0] if pairs else stmt.expr.ranks[:2]
        yield _Pair(first, second, (sizes[first], sizes[second]), certain, before.sizes), stmt


def with_views(before: Joined, gaps: Mapping[str, Collection[int]]) -> Joined:
    """The cascade with parameters in another shape that are read at the parts of such a rank, side by side.

    `gaps` are the dimensions of parameters that do not lie together with the next one.
    """
    found: dict[str, set[Read]] = {}
    given = {param.name for param in before.cascade.params}
    for node in (node for stmt in before.cascade.body for expr in expressions(stmt) for node in walk(expr)):
        if isinstance(node, Read) and node.tensor in given:
            found.setdefault(node.tensor, set()).add(node)
    taken, sizes = names(before.cascade), infer_shapes(before.cascade).ranks
    ranks = {rank for rank, size in sizes.items() if size in before.sizes}
    for name, nodes in found.items():
        (node, *others), own = nodes, gaps.get(name)
        index, inner = _together(node.index, ranks)
        if inner and not others and own is not None and inner.isdisjoint(own):
            before = _viewed(before, node, index, fresh(f"{name}_flat", taken), own, inner)
    return before


def _together(index: tuple[Expr, ...], ranks: Collection[str]) -> tuple[tuple[Rank, ...], frozenset[int]]:
    """Coordinates with such a rank in the place of its parts, side by side, and its dimensions but the last.

    Nothing where others than ranks are among them, or one twice.
    """
    found: list[tuple[Expr, tuple[int, ...]]] = [(part, (dim,)) for dim, part in enumerate(index)]
    at = 0
    while at + 1 < len(found):
        (first, own), (second, more) = found[at : at + 2]
        parts = isinstance(first, Apply) and isinstance(second, Apply) and (first.op, second.op) == ("floordiv", "mod")
        if parts and children(first) == children(second):
            found[at : at + 2] = [(children(first)[0], own + more)]
            at = max(0, at - 1)
        else:
            at += 1
    plain = tuple(part for part, dims in found if isinstance(part, Rank) and (len(dims) == 1 or part.name in ranks))
    if len(plain) < len(found) or len(set(plain)) < len(plain):
        return (), frozenset()
    return plain, frozenset(dim for _, dims in found for dim in dims[:-1])


def _viewed(
    before: Joined, node: Read, index: tuple[Rank, ...], name: str, gaps: Collection[int], inner: Collection[int]
) -> Joined:
    """The cascade with one parameter in the other shape."""
    view = Einsum(Target(name, tuple(rank.name for rank in index)), node)

    def change(expr: Expr) -> Expr:
        return rewrite(expr, lambda one: Read(name, index) if one == node else one)

    body = (view, *(map_expressions(stmt, change) for stmt in before.cascade.body))
    return dataclasses.replace(
        before,
        cascade=dataclasses.replace(before.cascade, body=body),
        views={**before.views, name: node.tensor},
        gaps={**before.gaps, name: frozenset(dim - sum(one < dim for one in inner) for dim in gaps)},
    )


def _pairs(before: Joined, extents: Mapping[str, int], certain: Mapping[str, int]) -> Iterator[_Pair]:
    """The pairs of ranks that can be one."""
    cascade = before.cascade
    if not all(isinstance(item, Fold | Fuse) for item in cascade.schedule):
        return
    sizes = infer_shapes(cascade).ranks

    def extent(rank: str) -> int:
        size = sizes[rank]
        return size if isinstance(size, int) else extents[size]

    pages = (pair for pair in _looked_up(cascade) if extent(pair[1]) <= LONG)
    apart = (pair for stmt in cascade.body for pair in multiplied_apart(stmt))
    for first, second in dict.fromkeys((*pages, *_carried_along(cascade), *apart)):
        pair = _Pair(first, second, (sizes[first], sizes[second]), certain, before.sizes)
        if pair.suits(cascade):
            yield pair


def _looked_up(cascade: Cascade) -> Iterator[tuple[str, str]]:
    """A rank that looks up one coordinate of a tensor, and one that stands plainly beside it, both reduced at once."""
    nodes = [node for stmt in cascade.body for expr in expressions(stmt) for node in walk(expr)]
    reduced = [set(node.ranks) for node in nodes if isinstance(node, Reduce)]
    for node in (node for node in nodes if isinstance(node, Read)):
        inside = {rank for at in node.index if isinstance(at, Read) for rank in ranks_of(at)}
        for second in (at.name for at in node.index if isinstance(at, Rank)):
            for first in sorted(inside - {second}):
                if any({first, second} <= ranks for ranks in reduced):
                    yield first, second


def _carried_along(cascade: Cascade) -> Iterator[tuple[str, str]]:
    """A rank that a state is carried along and one that a product sums over with it, as they stand side by side."""
    along = {item.rank for item in cascade.schedule if isinstance(item, Fold)}
    for stmt in cascade.body:
        if matrix_product(stmt) is None or not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce):
            continue
        for index in (node.index for node in walk(stmt.expr) if isinstance(node, Read)):
            for pair in itertools.pairwise(at.name if isinstance(at, Rank) else "" for at in index):
                if along & set(pair) and set(pair) <= set(stmt.expr.ranks):
                    yield pair


def multiplied_apart(stmt: Stmt) -> Iterator[tuple[str, str]]:
    """Two ranks that a factor of a sum has side by side, and of which others have one each: these are one side.

    Z[b,o] = sum[i,j] X[b,i] * W[o,i,j] * Y[b,j] is a product of matrices over the one rank, and of neither of the two.
    """
    if not isinstance(stmt, Einsum) or not isinstance(stmt.expr, Reduce) or stmt.expr.reducer != "sum":
        return
    terms, kept = factors(stmt.expr.body), set(stmt.target.ranks)
    for whole in (term for term in terms if isinstance(term, Read)):
        for pair in itertools.pairwise(at.name if isinstance(at, Rank) else "" for at in whole.index):
            apart = [ranks_of(term) for term in terms if not ranks_of(term).isdisjoint(pair) and term != whole]
            one_each = {frozenset(ranks & set(pair)) for ranks in apart} == {frozenset({rank}) for rank in pair}
            own, others = ranks_of(whole) & kept, frozenset().union(*apart) & kept
            if one_each and set(pair) <= set(stmt.expr.ranks) and own - others and others - own:
                yield pair


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two ranks, their sizes, and the extents of which kernels may have numbers."""

    first: str
    second: str
    sizes: tuple[Size, Size]
    certain: Mapping[str, int]
    joined: Mapping[str, tuple[Size, Size]]  # what the extents of ranks that are two are made of

    @property
    def both(self) -> set[str]:
        """Their names."""
        return {self.first, self.second}

    def number(self, expr: Expr) -> Expr:
        """An extent as a number where it is certain."""
        return Const(self.certain[expr.name]) if isinstance(expr, Extent) and expr.name in self.certain else expr

    @property
    def width(self) -> Expr:
        """How many coordinates of the second there are to one of the first."""

        def extent(size: Size) -> Expr:
            if size in self.joined:
                return folded(Apply("mul", tuple(map(extent, self.joined[str(size)]))))
            return Const(size) if isinstance(size, int) else self.number(Extent(size))

        return extent(self.sizes[1])

    def suits(self, cascade: Cascade) -> bool:
        """Whether whatever has one of them has both, in what statements define, reduce, and read of each other."""
        own = {target.name: target.ranks for stmt in cascade.body for target in targets(stmt)}
        made = {name for name, ranks in own.items() if self.both & set(ranks)}
        kept = made.isdisjoint(result.name for result in cascade.results)
        trips = {item.rank for item in cascade.schedule if isinstance(item, Fold | Fuse)} & self.both
        return kept and len(trips) < 2 and all(self.stands(stmt, own) for stmt in cascade.body)

    def stands(self, stmt: Stmt, own: Mapping[str, tuple[str, ...]]) -> bool:
        """Whether one statement has both or neither so."""
        nodes = [node for expr in expressions(stmt) for node in walk(expr)]
        sums = [node for node in nodes if isinstance(node, Reduce) and self.both & set(node.ranks)]
        ranks = [*(set(target.ranks) for target in targets(stmt)), *(set(node.ranks) for node in sums)]
        if not any(self.both & some for some in ranks):
            return self.both.isdisjoint(rank for expr in expressions(stmt) for rank in ranks_of(expr))
        if not isinstance(stmt, Einsum) or stmt.inits or any(node.reducer not in REDUCERS for node in sums):
            return False
        reads = [node for node in nodes if isinstance(node, Read) and self.both & set(own.get(node.tensor, ()))]
        plain = all(node.index == tuple(map(Rank, own[node.tensor])) for node in reads)
        return plain and all(len(self.both & some) != 1 for some in ranks)

    def applied(self, before: Joined) -> Joined:
        """The cascade with them as one rank."""
        cascade, taken = before.cascade, names(before.cascade)
        symbol = fresh(f"{self.first}{self.second}".upper(), taken)
        rank = Rank(fresh(f"{self.first}{self.second}", taken))
        along = (stmt for stmt in cascade.body if any(self.both & set(target.ranks) for target in targets(stmt)))
        one = _One(self, rank, {name for stmt in along for name in defines(stmt)})
        found = dataclasses.replace(
            cascade,
            body=tuple(map(one.statement, cascade.body)),
            schedule=tuple(map(one.directive, cascade.schedule)),
            given=(*(given for given in cascade.given if given.rank not in self.both), Given(rank.name, symbol)),
        )
        ranks = {name: size for name, size in infer_shapes(cascade).ranks.items() if name not in self.both}
        return Joined(stated(found, {**ranks, rank.name: symbol}), {**before.sizes, symbol: self.sizes})

    def applied_to(self, before: Joined, stmt: Einsum) -> Joined:
        """The cascade with them as one rank in one statement, which sums over both."""
        cascade, taken = before.cascade, names(before.cascade)
        symbol = fresh(f"{self.first}{self.second}".upper(), taken)
        rank = Rank(fresh(f"{self.first}{self.second}", taken))
        body = tuple(_One(self, rank, set()).statement(one) if one is stmt else one for one in cascade.body)
        here = {name for one in body for name in all_ranks(one)}
        schedule = (
            item for item in cascade.schedule
            if not isinstance(item, Fuse) or item.rank not in self.both or stmt.target.name not in item.statements
        )  # fmt: skip
        given = (*(given for given in cascade.given if given.rank in here), Given(rank.name, symbol))
        found = dataclasses.replace(cascade, body=body, schedule=tuple(schedule), given=given)
        ranks = {name: size for name, size in infer_shapes(cascade).ranks.items() if name in here}
        return Joined(stated(found, {**ranks, rank.name: symbol}), {**before.sizes, symbol: self.sizes}, before.views)


@dataclass(frozen=True, slots=True)
class _One:
    """The one rank in the place of two, and what is made along them."""

    pair: _Pair
    rank: Rank
    made: set[str]

    @property
    def parts(self) -> dict[str, Expr]:
        """The coordinates of the two."""
        return {
            self.pair.first: Apply("floordiv", (self.rank, self.pair.width)),
            self.pair.second: Apply("mod", (self.rank, self.pair.width)),
        }

    def ranks(self, ranks: Sequence[str]) -> tuple[str, ...]:
        """Ranks with the one in the place of both."""
        return tuple(dict.fromkeys(self.rank.name if one in self.pair.both else one for one in ranks))

    def statement(self, stmt: Stmt) -> Stmt:
        """A statement with the one rank."""
        found = map_expressions(stmt, self.expression)
        if not isinstance(found, Einsum):
            return found
        return dataclasses.replace(found, target=Target(found.target.name, self.ranks(found.target.ranks)))

    def directive(self, item: Directive) -> Directive:
        """A part of the schedule with the one rank."""
        if not isinstance(item, Fold | Fuse):
            return item
        found = map_fold(item, self.expression) if isinstance(item, Fold) else item
        return dataclasses.replace(found, rank=self.rank.name) if found.rank in self.pair.both else found

    def expression(self, expr: Expr) -> Expr:
        """An expression with the one rank."""
        return rewrite(expr, self.changed)

    def changed(self, node: Expr) -> Expr:
        """An expression whose operands have the one rank already: where its parts make it up, it stands itself."""
        match node:
            case Rank():
                return self.parts.get(node.name, node)
            case Reduce():
                return dataclasses.replace(node, ranks=self.ranks(node.ranks))
            case Read() if node.tensor in self.made:
                index = (self.rank if at in self.parts.values() else at for at in node.index)
                return dataclasses.replace(node, index=tuple(dict.fromkeys(index)))
            case Apply(op="add"):
                return self.rank if self.is_sum(node) else node
            case _:
                return node

    def is_sum(self, node: Apply) -> bool:
        """Whether an expression puts the one rank together of its parts."""
        first, second = self.parts.values()
        for whole, rest in (node.args, node.args[::-1]):
            if rest == second and isinstance(whole, Apply) and whole.op == "mul":
                factors = tuple(map(self.pair.number, whole.args))
                if factors in ((first, self.pair.width), (self.pair.width, first)):
                    return True
        return False
