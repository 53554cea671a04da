"""Computed operands of matrix products, made once and stored where that is less than computing them for every tile.

    Y[t,f] = sum[d] X[t,d] * g[d] * W[f,d]
    -->  Y_right[f,d] = cast(W[f,d] * g[d], bf16);  Y[t,f] = sum[d] X[t,d] * Y_right[f,d]

A tile of an operand goes from memory to the matrix units by itself; one that is computed takes the way through
registers, for every tile of the result again, and so does one of 8 bits that is only widened to the 16 of the other
side. Where the result has few tiles that is still less than to store it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from cascade.bounds import absent_tensors
from cascade.backends.triton.partition import ELEMENT, LAUNCH, OPERATIONS, all_ranks, partition
from cascade.backends.triton.plan import BYTES
from cascade.backends.triton.products import factors, matrix_product, product, ranks_of
from cascade.inference import infer_dtypes, infer_shapes
from cascade.ir import Apply, Cascade, Cast, Const, DType, Einsum, Expr, Rank, Read, Reduce, Size, Stmt, Target
from cascade.walk import defines, fresh, names, reads, walk

COMPUTED = 0.8  # of the time of a product: what a computed side costs; bytes widened, 8192 x 4096 x 4096, on an H200
SHORT = (DType.F16, DType.BF16)
BYTE = (DType.I8, DType.F8E4M3, DType.F8E5M2)

Terms: TypeAlias = tuple[Expr, ...]
"""The factors of a side of a product."""


def with_operands(
    cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType], certain: Mapping[str, int]
) -> Cascade:
    """The cascade with operands that are worth storing as statements of their own; itself where there are none.

    `extents` are those of shape symbols, of which some are `certain`: proofs use those. `inputs` are the types of the
    parameters. Other sums of the same terms read the stored operand as well: what is to cancel against the product has
    been rounded as it was.
    """
    program = Program.of(cascade, extents, inputs, certain)
    sides = (
        (stmt, *found) for stmt in cascade.body for found in program.computed_sides(stmt)
        if program.worth_storing(found[1], stmt)
    )  # fmt: skip
    return _storing(cascade, program, sides)


def with_constant_operands(
    cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType], constant: Collection[str]
) -> Cascade:
    """The cascade with what `constant` tensors come to, as operands, as statements of their own.

    They are to be made once, so it pays wherever they have no more bytes than what they are made of.
    """
    program = Program.of(cascade, extents, inputs, {})
    sides = (
        (stmt, *found) for stmt in cascade.body for found in program.constant_sides(stmt, constant)
        if program.is_no_longer(*found[1:])
    )  # fmt: skip
    return _storing(cascade, program, sides)


def _storing(cascade: Cascade, program: Program, sides: Iterable[tuple[Stmt, str, Terms, Terms]]) -> Cascade:
    """The cascade with sides of products as statements, each written once."""
    taken = names(cascade)
    stored: list[_Stored] = []
    for stmt, side, terms, other in sides:
        if not any(Counter(known.terms) == Counter(terms) for known in stored):
            target = Target(fresh(f"{defines(stmt)[0]}_{side}", taken), ranks_in(terms))
            stored.append(_Stored(terms, Einsum(target, program.narrowed(terms, other), span=stmt.span)))
    if not stored:
        return cascade
    body: list[Stmt] = []
    for stmt in cascade.body:
        changed = stmt
        for operand in stored:
            changed = operand.read_by(changed)
        wanted = [operand.stmt for operand in stored if operand.stmt.target.name in reads(changed)]
        body += [made for made in wanted if made not in body]
        body.append(changed)
    return dataclasses.replace(cascade, body=tuple(body))


@dataclass(frozen=True, slots=True)
class _Stored:
    """Factors of a product, and the statement that stores what they come to."""

    terms: tuple[Expr, ...]
    stmt: Einsum

    def read_by(self, stmt: Stmt) -> Stmt:
        """A sum with a read in the place of the factors; any other statement as it is."""
        if (
            not isinstance(stmt, Einsum)
            or stmt.inits
            or not isinstance(stmt.expr, Reduce)
            or stmt.expr.reducer != "sum"
        ):
            return stmt
        there = Counter(factors(stmt.expr.body))
        if not Counter(self.terms) <= there:
            return stmt
        rest = (there - Counter(self.terms)).elements()
        read = Read(self.stmt.target.name, tuple(map(Rank, self.stmt.target.ranks)))
        return dataclasses.replace(stmt, expr=dataclasses.replace(stmt.expr, body=product([read, *rest])))


@dataclass(frozen=True, slots=True)
class Program:
    """A cascade with what decides: extents of ranks, types and origins of tensors."""

    cascade: Cascade
    extents: Mapping[str, int]
    sizes: Mapping[str, int]
    shapes: Mapping[str, tuple[Size, ...]]
    dtypes: Mapping[str, DType]
    made: frozenset[str]
    absent: frozenset[str]
    short_results: bool

    @classmethod
    def of(
        cls, cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType], certain: Mapping[str, int]
    ) -> Program:
        shapes = infer_shapes(cascade)
        dtypes = infer_dtypes(cascade, inputs)
        return cls(
            cascade,
            extents,
            {rank: size if isinstance(size, int) else extents[size] for rank, size in shapes.ranks.items()},
            shapes.tensors,
            dtypes,
            frozenset(name for stmt in cascade.body for name in defines(stmt)),
            absent_tensors(cascade, certain) - _maps(cascade),
            not any(dtypes[result.name] in (DType.F32, DType.F64) for result in cascade.results),
        )

    def computed_sides(self, stmt: Stmt) -> Iterator[tuple[str, Terms, Terms]]:
        """The sides of a matrix product that are no tensor as it lies in memory, each with the other side.

        A factor of the reduced rank alone goes to a side that is computed anyway, else to the one of fewer elements.
        """
        found = matrix_product(stmt)
        if found is None or not found.rows or not found.columns:
            return
        sides = {
            "left": [term for term in found.left if ranks_of(term) & found.rows],
            "right": [term for term in found.right if ranks_of(term) & found.columns],
        }
        across = {"left": "right", "right": "left"}
        order = sorted(sides, key=lambda s: (self.is_stored(sides[s], sides[across[s]]), self.elements(sides[s])))
        sides[order[0]] += [term for term in (*found.left, *found.right) if term not in sides["left"] + sides["right"]]
        for side, other in across.items():
            lies = len(sides[side]) == 1 and isinstance(sides[side][0], Read)
            plain = all(map(self.is_plain, sides[side]))
            if plain and (not lies or self.is_widened(sides[side], sides[other])):
                yield side, tuple(sides[side]), tuple(sides[other])

    def constant_sides(self, stmt: Stmt, constant: Collection[str]) -> Iterator[tuple[str, Terms, Terms]]:
        """The sides of a matrix product that come of constants, more of them than one as it lies in memory.

        Constant factors of the reduced rank alone go to such a side.
        """
        found = matrix_product(stmt)
        if found is None or not found.rows or not found.columns:
            return

        def is_constant(term: Expr) -> bool:
            tensors = {node.tensor for node in walk(term) if isinstance(node, Read)}
            return bool(tensors) and tensors <= set(constant) and self.is_plain(term)

        left = tuple(term for term in found.left if ranks_of(term) & found.rows)
        right = tuple(term for term in found.right if ranks_of(term) & found.columns)
        shared = tuple(t for t in (*found.left, *found.right) if t not in (*left, *right) and is_constant(t))
        for side, own, other in (("left", left, right), ("right", right, left)):
            terms = (*own, *shared)
            if own and all(map(is_constant, own)) and (len(terms) > 1 or not isinstance(own[0], Read)):
                yield side, terms, other
                return

    def is_no_longer(self, terms: Sequence[Expr], other: Sequence[Expr]) -> bool:
        """Whether what factors come to has no more bytes than the tensors that they read."""
        read = {node.tensor for term in terms for node in walk(term) if isinstance(node, Read)}
        before = sum(BYTES[self.dtypes[name]] * self.count_of(name) for name in read)
        made = self.narrowed(terms, other)
        kind = made.dtype if isinstance(made, Cast) else DType.F64 if DType.F64 in self.dtypes.values() else DType.F32
        return BYTES[kind] * self.elements(terms) <= before

    def count_of(self, name: str) -> int:
        """The elements of a tensor."""
        return math.prod(size if isinstance(size, int) else self.extents[size] for size in self.shapes[name])

    def is_stored(self, terms: Sequence[Expr], other: Sequence[Expr]) -> bool:
        """Whether factors are one tensor that the caller gives, in the type in which it is multiplied."""
        given = len(terms) == 1 and isinstance(terms[0], Read) and terms[0].tensor not in self.made
        return given and not self.is_widened(terms, other)

    def is_widened(self, terms: Sequence[Expr], other: Sequence[Expr]) -> bool:
        """Whether factors are one tensor of bytes that is multiplied with floats of 16 bits, in their type.

        That type has every number of 8 bits exactly.
        """
        one = terms[0] if len(terms) == 1 else None
        return isinstance(one, Read) and self.dtypes[one.tensor] in BYTE and self.met(other) in SHORT

    def met(self, other: Sequence[Expr]) -> DType | None:
        """The type of the tensors of a side; None where they have several."""
        found = {self.dtypes[node.tensor] for term in other for node in walk(term) if isinstance(node, Read)}
        return found.pop() if len(found) == 1 else None

    def is_plain(self, term: Expr) -> bool:
        """Whether a factor has a value at all of its coordinates, or these tell where it has none."""
        nodes = [node for node in walk(term) if isinstance(node, Read)]
        return all(
            node.tensor not in self.absent and all(isinstance(part, Rank) or _is_quotient(part) for part in node.index)
            for node in nodes
        )

    def elements(self, terms: Sequence[Expr]) -> int:
        """The elements of what factors come to."""
        return math.prod(self.sizes[rank] for rank in ranks_in(terms))

    def worth_storing(self, terms: Sequence[Expr], stmt: Stmt) -> bool:
        """Whether a product loses more by computing an operand than it takes to write and read it.

        It is no launch more where a kernel before makes what the operand is computed from: that writes it then.
        """
        lost = COMPUTED * 2 * math.prod(self.sizes[rank] for rank in all_ranks(stmt))
        moved = 2 * self.elements(terms) * ELEMENT
        if lost <= moved * OPERATIONS:
            return False
        return lost > (moved + LAUNCH) * OPERATIONS or self.is_made_before(terms, stmt)

    def is_made_before(self, terms: Sequence[Expr], stmt: Stmt) -> bool:
        """Whether factors are computed from what another kernel than that of the product makes."""
        read = {node.tensor for term in terms for node in walk(term) if isinstance(node, Read)} & self.made
        own = next(
            group for group in partition(self.cascade, self.sizes) if not set(defines(stmt)).isdisjoint(group.names)
        )
        return bool(read) and read.isdisjoint(own.names)

    def narrowed(self, terms: Sequence[Expr], other: Sequence[Expr]) -> Expr:
        """What factors come to, in the 16 bits of the tensor that they are multiplied with unless results have more."""
        found, kind = product(terms), self.met(other)
        if not self.short_results and not self.is_widened(terms, other):
            own = {self.dtypes[node.tensor] for term in terms for node in walk(term) if isinstance(node, Read)}
            return found if DType.F64 in own else Cast(DType.F32, found)
        return Cast(kind, found) if kind in SHORT else found


def ranks_in(terms: Sequence[Expr]) -> tuple[str, ...]:
    """The ranks of factors, in the order of the read that has most of them: so the operand lies as that tensor does."""
    longest = max(
        (node for term in terms for node in walk(term) if isinstance(node, Read)),
        key=lambda node: len(ranks_of(node)),
    )
    return tuple(
        dict.fromkeys(node.name for term in (longest, *terms) for node in walk(term) if isinstance(node, Rank))
    )


def _maps(cascade: Cascade) -> frozenset[str]:
    """The tensors that are maps of parameters: coordinates alone say where they are absent."""
    found = {param.name for param in cascade.params}
    for stmt in cascade.body:
        if isinstance(stmt, Einsum) and stmt.where is None and not stmt.inits and found.issuperset(reads(stmt)):
            found |= set() if any(isinstance(node, Reduce) for node in walk(stmt.expr)) else {stmt.target.name}
    return frozenset(found)


def _is_quotient(part: Expr) -> bool:
    """Whether a coordinate is that of a group: a rank divided by a number."""
    return (
        isinstance(part, Apply)
        and part.op == "floordiv"
        and isinstance(part.args[0], Rank)
        and isinstance(part.args[1], Const)
    )
