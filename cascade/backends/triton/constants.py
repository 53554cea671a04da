"""What parameters that seldom change come to by themselves, as a cascade of its own: computed once for their values.

    Y_sum[t,f] = sum[d] X[t,d] * g[d] * W[f,d];  S[f] = sum[d] g[d] * W[f,d]      g and W constant
    -->  Y_sum_right[f,d] = cast(W[f,d] * g[d], bf16);  S[f] = sum[d] ...          once
         Y_sum[t,f] = sum[d] X[t,d] * Y_sum_right[f,d]                             in every call, S and this given

Nothing is kept that has more bytes than what it is made of: weights of 4 bits stay in 4.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from cascade.backends.triton.operands import with_constant_operands
from cascade.backends.triton.partition import all_ranks, without
from cascade.backends.triton.plan import BYTES
from cascade.bounds import absent_tensors
from cascade.errors import VerifyError
from cascade.inference import infer_dtypes, infer_shapes
from cascade.ir import Cascade, Cast, DType, Einsum, Extent, Fold, GroupBy, Param, Read, Result, Size, Stmt
from cascade.order import units
from cascade.verify import verify
from cascade.walk import defines, expressions, reads, walk

SHORT = (DType.F16, DType.BF16)


@dataclass(frozen=True, slots=True)
class Divided:
    """A cascade in two: `once` makes from constants what `rest` reads as parameters behind the author's."""

    once: Cascade
    rest: Cascade


def divided(
    cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType], constant: Collection[str]
) -> Divided | None:
    """The cascade in two, at extents of the shape symbols and types of the parameters; None where nothing is kept, or
    where a part would not stand alone.

    Operands of products that constants make are statements of their own first.
    """
    alone = {stmt.target.name for stmt in _Made.of(cascade, extents, inputs, constant).decided()}
    prepared = with_constant_operands(cascade, extents, inputs, {*constant, *alone})
    made = _Made.of(prepared, extents, inputs, constant)
    moved = made.moved()
    kept = made.wanted(moved)
    if not kept:
        return None
    gone = {stmt.target.name for stmt in moved}
    needed = {name for stmt in moved for name in reads(stmt)}
    results = tuple(Result(name, made.stored(name), made.shapes[name]) for name in kept)
    rest = [stmt for stmt in prepared.body if gone.isdisjoint(defines(stmt))]
    others = {name for stmt in rest for name in defines(stmt)}
    once = dataclasses.replace(
        prepared,
        name=f"{prepared.name}_once",
        params=tuple(param for param in prepared.params if param.name in needed),
        results=results,
        body=tuple(moved),
        schedule=tuple(left for item in prepared.schedule if (left := without(item, others)) is not None),
        given=tuple(given for given in prepared.given if any(given.rank in all_ranks(stmt) for stmt in moved)),
    )
    left_over = dataclasses.replace(
        prepared,
        params=(*prepared.params, *(Param(result.name, result.dtype, result.shape) for result in results)),
        body=tuple(rest),
        schedule=tuple(left for item in prepared.schedule if (left := without(item, gone)) is not None),
        given=tuple(given for given in prepared.given if any(given.rank in all_ranks(stmt) for stmt in rest)),
    )
    return Divided(once, left_over) if _stands(once) and _stands(left_over) else None


def _stands(cascade: Cascade) -> bool:
    """Whether a part is a cascade by itself: all its extents are told, and its folds have all that they carry."""
    try:
        verify(cascade)
    except VerifyError:
        return False
    told = {size for param in cascade.params for size in param.shape}
    return all(isinstance(size, int) or size in told for size in infer_shapes(cascade).ranks.values())


@dataclass(frozen=True, slots=True)
class _Made:
    """A cascade with what decides: the constants, extents and types of tensors."""

    cascade: Cascade
    constant: frozenset[str]
    dtypes: Mapping[str, DType]
    shapes: Mapping[str, tuple[Size, ...]]
    ranks: Mapping[str, Size]
    extents: Mapping[str, int]
    apart: frozenset[str]  # what cannot be moved: results, what a fold or a group of rows needs, what may be absent

    @classmethod
    def of(
        cls, cascade: Cascade, extents: Mapping[str, int], inputs: Mapping[str, DType], constant: Collection[str]
    ) -> _Made:
        shapes = infer_shapes(cascade)
        apart = {result.name for result in cascade.results} | set(absent_tensors(cascade))
        for item in cascade.schedule:
            apart |= set(item.statements) if isinstance(item, GroupBy) else set()
            apart |= _moved_by(item) if isinstance(item, Fold) else set()
        dtypes = infer_dtypes(cascade, inputs)
        return cls(cascade, frozenset(constant), dtypes, shapes.tensors, shapes.ranks, extents, frozenset(apart))

    def moved(self) -> list[Einsum]:
        """The statements that constants alone decide, in order, each of them worth keeping or needed for one that is.

        What has more bytes than what it is made of is computed in every call, and what it is made of kept.
        """
        heavy: set[str] = set()
        while True:
            found = self.decided(heavy)
            kept = self.wanted(found)
            more = {name for name in kept if self.bytes_of(name) > sum(map(self.bytes_of, self.origins(name, found)))}
            if not more:
                return self.needed(found, kept)
            heavy |= more

    def decided(self, but: Collection[str] = ()) -> list[Einsum]:
        """The statements that constants alone decide, in order, without some and what needs those."""
        found: list[Einsum] = []
        known = set(self.constant)
        for unit in units(self.cascade.body, ()):
            for stmt in unit.statements if not unit.cyclic else ():
                if isinstance(stmt, Einsum) and stmt.target.name not in but and self.is_decided(stmt, known):
                    found.append(stmt)
                    known.add(stmt.target.name)
        return found

    def is_decided(self, stmt: Einsum, known: Collection[str]) -> bool:
        """Whether a statement depends on these tensors alone, its ranks and numbers included."""
        symbols = {size for param in self.cascade.params if param.name in self.constant for size in param.shape}
        nodes = [node for expr in expressions(stmt) for node in walk(expr)]
        used = {self.ranks[rank] for rank in all_ranks(stmt)} | {n.name for n in nodes if isinstance(n, Extent)}
        return (
            not stmt.inits
            and stmt.target.name not in self.apart
            and bool(reads(stmt))
            and set(known).issuperset(reads(stmt))
            and all(isinstance(size, int) or size in symbols for size in used)
        )

    def wanted(self, moved: Collection[Einsum]) -> list[str]:
        """What the statements that stay read of those that are moved."""
        rest = [stmt for stmt in self.cascade.body if stmt not in moved]
        read = {name for stmt in rest for name in reads(stmt)}
        return [stmt.target.name for stmt in moved if stmt.target.name in read]

    def needed(self, moved: Collection[Einsum], kept: Collection[str]) -> list[Einsum]:
        """The statements that make what is kept."""
        wanted = set(kept)
        for stmt in reversed(list(moved)):
            wanted |= set(reads(stmt)) if stmt.target.name in wanted else set()
        return [stmt for stmt in moved if stmt.target.name in wanted]

    def origins(self, name: str, moved: Collection[Einsum]) -> set[str]:
        """The constants of which something is made."""
        made: Mapping[str, Stmt] = {stmt.target.name: stmt for stmt in moved}
        if name not in made:
            return {name}
        return {origin for read in set(reads(made[name])) for origin in self.origins(read, moved)}

    def stored(self, name: str) -> DType:
        """The type in which something is kept: what an expression does not round stays as it was computed."""
        stmt = next((stmt for stmt in self.cascade.body if name in defines(stmt)), None)
        rounded = stmt is None or (isinstance(stmt, Einsum) and isinstance(stmt.expr, Cast | Read))
        return DType.F32 if self.dtypes[name] in SHORT and not rounded else self.dtypes[name]

    def bytes_of(self, name: str) -> int:
        """The bytes of a tensor."""
        count = math.prod(size if isinstance(size, int) else self.extents[size] for size in self.shapes[name])
        return count * BYTES[self.stored(name)]


def _moved_by(fold: Fold) -> set[str]:
    """What the merge and the beginning of other states of a fold read: these stay together."""
    parts = [(item.target.name, item.expr) for item in fold.merge]
    parts += [(item.target.name, item.expr) for item in fold.init if item.expr is not None]
    return {
        node.tensor.rstrip("'")
        for target, expr in parts
        for node in walk(expr)
        if isinstance(node, Read) and node.tensor.rstrip("'") != target
    }
