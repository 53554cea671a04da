"""What one device computes of some statements, as a cascade of its own.

    compute S, P, U along h over tp at m=512:1024        H = 8; on the second of two devices
    -->  cascade task(A[512,4,E], C[N,HK,E], V[N,HK,E]) -> U[512,4,E] {
             S[h,m,n] = A[m,h,e] * C[n,(h+4)*HK//8,e] / sqrt(E)   where n <= m + 512
             ...
         }

Ranks count from the beginning of their window. A tensor that is read at a rank plainly is the box of that rank's
window; one that is read at a computed coordinate is there as a whole. What a rank is compared or computed with gets the
beginning back. So a task is compiled as any other cascade is, and called with boxes of the tensors of the program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn, TypeAlias

from cascade.bounds import absent_tensors
from cascade.errors import Diagnostic, UnsupportedError
from cascade.ir import (
    Apply, Call, Cascade, Const, DType, Einsum, Expr, Extent, Given, Param, Rank, Read, Reduce, Result, Stmt, TopK,
)  # fmt: skip
from cascade.ops import REDUCERS
from cascade.passes.points import iterated
from cascade.passes.reach import Box, Reach, inside
from cascade.placed import Compute, Program, Window, windows_of
from cascade.walk import children, defines, fresh, map_expressions, reads, targets, with_children


Wanted: TypeAlias = Callable[[str, Box], bool]
"""Whether a box of a tensor is read by anything else."""

MERGED = ("sum", "prod", "max", "min")
"""Reducers whose partial results are merged element by element."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a tensor of the program, and what the task calls it.

    Of a partial result, by what it is merged, and the ranks along which each device has a part of it.
    """

    name: str
    tensor: str
    box: Box
    reducer: str = ""
    cut: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Local:
    """A task on one device: a cascade, the boxes that it is called with, and those that its results are."""

    cascade: Cascade
    reads: tuple[Piece, ...]
    writes: tuple[Piece, ...]


def local(
    program: Program,
    reach: Reach,
    steps: Sequence[Compute],
    place: Mapping[str, int],
    wanted: Wanted,
    types: Mapping[str, DType],
    name: str,
) -> Local:
    """What the device at `place` computes of some steps, in their order; no window of theirs may be empty.

    `wanted` tells what others read, `types` are those of all tensors of the program. Raises C555 where this is no
    cascade: a recurrence, a fold or the largest few cut along their rank, a partial result that is read before it is
    merged, a tensor that may be absent in places and goes to another task.
    """
    maker = _Maker(program, reach, types)
    for step in steps:
        windows = windows_of(step, place, program.axes, reach.full)
        for tensor, box in reach.reads(step.name, windows):
            if tensor in maker.boxes and not inside(box, maker.boxes[tensor]):
                maker.refuse(step.name, f"reads more of {tensor} than is made beside it")
        for stmt in reach.units[step.name].statements:
            maker.add(stmt, {rank: window for rank, window in windows.items() if window != reach.full[rank]})
    return maker.local(name, wanted)


@dataclass(slots=True, eq=False)
class _Maker:
    """A local cascade in the making."""

    program: Program
    reach: Reach
    types: Mapping[str, DType]
    body: list[Stmt] = field(default_factory=list)
    boxes: dict[str, Box] = field(default_factory=dict)  # of what the task defines
    partial: dict[str, str] = field(default_factory=dict)  # of these, partial results, with their reducers
    cut: dict[str, tuple[str, ...]] = field(default_factory=dict)  # and the ranks that they have a part of
    pieces: dict[tuple[str, Box], str] = field(default_factory=dict)
    extents: dict[str, Window] = field(default_factory=dict)  # the window of every rank
    taken: set[str] = field(default_factory=set)

    def add(self, stmt: Stmt, windows: Mapping[str, Window]) -> None:
        """A statement on its windows, behind those before it."""
        name = defines(stmt)[0]
        if isinstance(stmt, Call) or (isinstance(stmt, Einsum) and stmt.inits):
            self.refuse(name, "is a recurrence or a call")
        for rank in iterated(stmt):
            window = windows.get(rank, self.reach.full[rank])
            if self.extents.setdefault(rank, window) != window:
                self.refuse(name, f"has another window of {rank} than a statement before it")
        cut = [rank for rank in iterated(stmt) if rank in windows and rank not in targets(stmt)[0].ranks]
        if cut:
            self.partial[name], self.cut[name] = self.reducer(stmt, name), tuple(cut)
        if early := [read for read in reads(stmt) if read in self.partial]:
            self.refuse(name, f"reads {early[0]}, of which each device has a part only")
        self.body.append(map_expressions(stmt, lambda expr: self.moved(expr, windows)))
        for target in targets(stmt):
            self.boxes[target.name] = tuple(windows.get(rank, self.reach.full[rank]) for rank in target.ranks)

    def reducer(self, stmt: Stmt, name: str) -> str:
        """By what partial results of a statement are merged, elementwise."""
        top = stmt.expr if isinstance(stmt, Einsum) else None
        if isinstance(stmt, TopK) or not isinstance(top, Reduce) or top.reducer not in MERGED:
            self.refuse(name, "is cut along what it reduces, and is no sum, product or extreme")
        return top.reducer

    def refuse(self, name: str, why: str) -> NoReturn:
        message = f"{name!r} {why}: it has no kernel on one device"
        raise UnsupportedError(Diagnostic("C555", message, help="load the plan without kernels"))

    def moved(self, expr: Expr, windows: Mapping[str, Window]) -> Expr:
        """An expression with ranks that count from the beginning of their windows."""
        match expr:
            case Rank():
                low, _ = windows.get(expr.name, (0, 0))
                return _plus(expr, low)
            case Extent():
                return Const(self.reach.extent(expr.name))
            case Read():
                return self.read(expr, windows)
            case _:
                return with_children(expr, tuple(self.moved(child, windows) for child in children(expr)))

    def read(self, node: Read, windows: Mapping[str, Window]) -> Read:
        """A read of a box, at coordinates that count from its beginning."""
        if node.tensor in self.boxes:
            box, name = self.boxes[node.tensor], node.tensor
        else:
            box = tuple(
                windows.get(index.name, self.reach.full[index.name]) if isinstance(index, Rank) else (0, extent)
                for index, extent in zip(node.index, self.reach.shape(node.tensor), strict=True)
            )
            name = self.piece(node.tensor, box)
        index = []
        for part, (low, high) in zip(node.index, box, strict=True):
            whole = isinstance(part, Rank) and windows.get(part.name, self.reach.full[part.name]) == (low, high)
            index.append(part if whole else _plus(self.moved(part, windows), -low))
        return dataclasses.replace(node, tensor=name, index=tuple(index))

    def piece(self, tensor: str, box: Box) -> str:
        """What the task calls a box of a tensor."""
        if (tensor, box) not in self.pieces:
            self.pieces[tensor, box] = fresh(tensor, self.taken)
        return self.pieces[tensor, box]

    def fill(self, tensor: str, declared: Mapping[str, Const]) -> Const:
        """What stands where a result is absent: of a partial one, what changes nothing when it is merged."""
        if tensor in self.partial:
            return Const(REDUCERS[self.partial[tensor]].identity or 0)
        return declared.get(tensor, Const(0))

    def local(self, name: str, wanted: Wanted) -> Local:
        """The cascade with its pieces."""
        params = tuple(Param(own, self.types[t], _extents(box)) for (t, box), own in self.pieces.items())
        made = [tensor for tensor in self.boxes if wanted(tensor, self.boxes[tensor])]
        fills = {result.name: result.fill for result in self.program.cascade.results}
        absent = absent_tensors(self.program.cascade, self.reach.sizes)
        if gaps := [tensor for tensor in made if tensor in absent and tensor not in fills]:
            self.refuse(gaps[0], "may be absent in places, which memory does not show")
        results = tuple(Result(t, self.types[t], _extents(self.boxes[t]), self.fill(t, fills)) for t in made)
        given = tuple(Given(rank, high - low) for rank, (low, high) in self.extents.items())
        cascade = Cascade(name, params, results, tuple(self.body), uses=self.program.cascade.uses, given=given)
        return Local(
            cascade,
            tuple(Piece(own, tensor, box) for (tensor, box), own in self.pieces.items()),
            tuple(Piece(t, t, self.boxes[t], self.partial.get(t, ""), self.cut.get(t, ())) for t in made),
        )


def _extents(box: Box) -> tuple[int, ...]:
    return tuple(high - low for low, high in box)


def _plus(expr: Expr, number: int) -> Expr:
    if not number:
        return expr
    return Apply("add", (expr, Const(number))) if number > 0 else Apply("sub", (expr, Const(-number)))
