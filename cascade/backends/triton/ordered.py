"""Rows that stay in the order of an index between kernels, and operands that are put in it once.

    H[t,j,f] = sum[d] X[t,d] * W[I[t,j],d,f];  group {H} by I[t,j] < N
    -->  X_rows[t,j,d] = X[t,d];  H[t,j,f] = sum[d] X_rows[t,j,d] * W[I[t,j],d,f]
         group {X_rows} by I[t,j] < N;  group {H} by I[t,j] < N

What only groups of one index read, each at its own rows, lies in memory in the order of that index, those of a value
from the beginning of a tile on. A tile of rows that lie together goes to the matrix units as a box; rows that are
gathered take the way through registers, for every tile of the result again. So an operand that others made is copied
into that order where products take longer than what they read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cascade.backends.triton.operands import SHORT
from cascade.backends.triton.partition import ELEMENT, LAUNCH, OPERATIONS, all_ranks
from cascade.backends.triton.products import factors
from cascade.inference import FLOATS, infer_dtypes, infer_shapes
from cascade.ir import Cascade, DType, Einsum, GroupBy, Rank, Read, Reduce, Stmt, Target
from cascade.walk import defines, expressions, free_ranks, fresh, map_expressions, names, reads, rewrite, walk

GATHERED = 0.08  # of the time of a product: what a gathered side costs; 16384 x 4096 x 14336, on an H200


def with_ordered_operands(cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType]) -> Cascade:
    """The cascade with operands of grouped products in the order of their rows, where that is worth a copy.

    `extents` are those of shape symbols, `inputs` the types of the parameters.
    """
    items = [item for item in cascade.schedule if isinstance(item, GroupBy)]
    if not items:
        return cascade
    program, taken = _Program.of(cascade, extents, inputs), names(cascade)
    copies: dict[tuple[Read, Read], tuple[Einsum, GroupBy]] = {}
    changed: dict[Stmt, Stmt] = {}
    for item in items:
        for read in program.gathered(item):
            if (read, item.key) not in copies:
                copies[read, item.key] = _copy(read, item, taken)
            target = copies[read, item.key][0].target
            at = {read: Read(target.name, tuple(map(Rank, target.ranks)))}
            for product in program.products(item):
                before = changed.get(product, product)
                changed[product] = map_expressions(before, lambda e, at=at: rewrite(e, lambda node: at.get(node, node)))  # type: ignore[misc]
    body: list[Stmt] = []
    for stmt in cascade.body:
        mine = changed.get(stmt, stmt)
        made = (copy for copy, _ in copies.values())
        body += [copy for copy in made if copy.target.name in reads(mine) and copy not in body]
        body.append(mine)
    schedule = (*cascade.schedule, *(item for _, item in copies.values()))
    return dataclasses.replace(cascade, body=tuple(body), schedule=schedule)


def _copy(read: Read, item: GroupBy, taken: set[str]) -> tuple[Einsum, GroupBy]:
    """An operand with a copy of its row for every row of a group, and the order in which these lie."""
    rows = free_ranks(item.key)
    target = Target(fresh(f"{read.tensor}_rows", taken), (*rows, *(r for r in free_ranks(read) if r not in rows)))
    return Einsum(target, read), dataclasses.replace(item, statements=(target.name,))


def in_order(cascade: Cascade, inputs: Mapping[str, DType]) -> frozenset[str]:
    """The tensors that lie in the order of an index: groups make and read them, and nothing else."""
    groups = {name: item for item in cascade.schedule if isinstance(item, GroupBy) for name in item.statements}
    if not groups:
        return frozenset()
    dtypes = infer_dtypes(cascade, inputs)
    made = {stmt.target.name: stmt.target for stmt in cascade.body if isinstance(stmt, Einsum)}
    fixed = {result.name for result in cascade.results}
    readers: dict[str, set[str]] = {}
    for stmt in cascade.body:
        for name in reads(stmt):
            readers.setdefault(name, set()).add(defines(stmt)[0])

    def alike(name: str, item: GroupBy) -> bool:
        """Whether a statement goes through the same rows, in 16 bits."""
        other = groups.get(name)
        kinds = {dtypes[read] for read in reads(_owner(cascade, name))} & FLOATS
        return other is not None and (other.key, other.size) == (item.key, item.size) and kinds <= set(SHORT)

    def kept(name: str, item: GroupBy) -> bool:
        behind = readers.get(name, set())
        stored = not behind <= set(item.statements)
        along = all(_at_own_rows(_owner(cascade, reader), made[name], item) for reader in behind)
        return stored and along and all(alike(one, item) for one in (name, *behind))

    return frozenset(name for name, item in groups.items() if name not in fixed and kept(name, item))


def _owner(cascade: Cascade, name: str) -> Stmt:
    return next(stmt for stmt in cascade.body if name in defines(stmt))


def _at_own_rows(stmt: Stmt, target: Target, item: GroupBy) -> bool:
    """Whether a statement reads a tensor of the same rows at those that it computes."""
    rows = free_ranks(item.key)
    found = [n for e in expressions(stmt) for n in walk(e) if isinstance(n, Read) and n.tensor == target.name]
    return all(
        index == Rank(rank)
        for node in found
        for rank, index in zip(target.ranks, node.index, strict=True)
        if rank in rows
    )


@dataclass(frozen=True, slots=True)
class _Program:
    """A cascade with what decides: extents of ranks and types of tensors, and which group makes a tensor."""

    cascade: Cascade
    sizes: Mapping[str, int]
    values: Mapping[str, int]
    dtypes: Mapping[str, DType]
    owner: Mapping[str, GroupBy]

    @classmethod
    def of(cls, cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType]) -> _Program:
        shapes = infer_shapes(cascade)
        items = [item for item in cascade.schedule if isinstance(item, GroupBy)]
        return cls(
            cascade,
            {rank: size if isinstance(size, int) else extents[size] for rank, size in shapes.ranks.items()},
            {name: item.size if isinstance(item.size, int) else extents[item.size]
             for item in items for name in item.statements},
            infer_dtypes(cascade, inputs),
            {name: item for item in items for name in item.statements},
        )  # fmt: skip

    def products(self, item: GroupBy) -> list[Einsum]:
        """The products of a group with what its index chooses."""
        return [
            stmt for stmt in self.cascade.body
            if isinstance(stmt, Einsum) and stmt.target.name in item.statements and isinstance(stmt.expr, Reduce)
            and any(item.key in node.index for node in walk(stmt.expr) if isinstance(node, Read))
        ]  # fmt: skip

    def gathered(self, item: GroupBy) -> Iterator[Read]:
        """What the products of a group read row by row in the order of others, and is worth a copy in theirs."""
        found: dict[Read, list[Einsum]] = {}
        for stmt in self.products(item):
            assert isinstance(stmt.expr, Reduce)
            for term in factors(stmt.expr.body):
                if isinstance(term, Read) and self.is_side(term, stmt.expr, item) and self.made_apart(term, item):
                    found.setdefault(term, []).append(stmt)
        yield from (read for read, products in found.items() if self.worth_copying(read, products, item))

    def is_side(self, read: Read, reduction: Reduce, item: GroupBy) -> bool:
        """Whether a factor is an operand with rows of the group, of 16 bits, as it lies in memory."""
        ranks = set(free_ranks(read))
        plain = all(isinstance(index, Rank) for index in read.index) and len(ranks) == len(read.index)
        sides = not ranks.isdisjoint(reduction.ranks) and not ranks.isdisjoint(free_ranks(item.key))
        return plain and sides and self.dtypes[read.tensor] in SHORT

    def made_apart(self, read: Read, item: GroupBy) -> bool:
        """Whether the rows of a tensor are not those of the group already."""
        other = self.owner.get(read.tensor)
        return other is None or (other.key, other.size) != (item.key, item.size)

    def worth_copying(self, read: Read, products: list[Einsum], item: GroupBy) -> bool:
        """Whether products that gather lose more by it than it takes to write and read a copy.

        What waits for the operand that the index chooses loses nothing.
        """
        operations = sum(2 * math.prod(self.sizes[rank] for rank in all_ranks(stmt)) for stmt in products)
        rows = math.prod(self.sizes[rank] for rank in free_ranks(item.key))
        chosen = operations // (2 * rows) * self.values[products[0].target.name]
        width = math.prod(self.sizes[rank] for rank in free_ranks(read) if rank not in free_ranks(item.key))
        moved = 2 * rows * width * ELEMENT
        return operations > chosen * ELEMENT * OPERATIONS and GATHERED * operations > (moved + LAUNCH) * OPERATIONS
