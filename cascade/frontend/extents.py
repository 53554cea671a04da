"""The extents of a traced cascade: which ranks and dimensions have one extent, and what it is.

Two ranks have one extent where they stand at one position of a tensor. A rank that is only ever shifted (`t + w`) has
the extent of the dimension it is shifted in; a dimension that is only ever chosen from (`W[I[t, j], d]`, I from a
choice along n) has that of the rank it was chosen along.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from cascade import ir
from cascade.errors import Note, Span
from cascade.frontend.emit import Emitter, position, symbol
from cascade.frontend.forms import At, Element, Invocation
from cascade.frontend.frames import fail
from cascade.frontend.notation import RankVariable, Tensor, Value
from cascade.frontend.program import Program
from cascade.walk import expressions, targets, walk


@dataclass(slots=True, eq=False)
class Extents:
    """Groups of ranks and positions of tensors that have one extent."""

    parent: dict[str, str] = field(default_factory=dict)
    fixed: dict[str, tuple[ir.Size, Span | None]] = field(default_factory=dict)  # of a group's root
    plain: dict[str, str] = field(default_factory=dict)  # root -> the first rank that is an index of a parameter there
    declared: set[str] = field(default_factory=set)  # roots of groups with a position of a parameter
    symbols: dict[str, str] = field(default_factory=dict)  # the user's symbols -> one rank or position of each
    called: list[tuple[str, str]] = field(default_factory=list)  # ranks or positions, and a called cascade's symbol

    def root(self, node: str) -> str:
        while (above := self.parent.get(node, node)) != node:
            self.parent[node] = self.parent.get(above, above)
            node = above
        return node

    def fix(self, node: str, size: ir.Size, span: Span | None) -> None:
        """State the extent of a group; groups of one symbol are one."""
        if isinstance(size, str):
            self.unite(self.symbols.setdefault(size, node), node)
        root = self.root(node)
        known, other = self.fixed.setdefault(root, (size, span))
        if known != size:
            note = Note(f"it is {known} here", other) if other else None
            help = "ranks that index one dimension have one extent: give them one number, or one symbol"
            raise fail("C416", f"the extent of one dimension is both {known} and {size}", help, at=span, note=note)

    def unite(self, a: str, b: str) -> None:
        """State that two ranks or positions have one extent."""
        a, b = self.root(a), self.root(b)
        if a == b:
            return
        self.parent[b] = a
        if b in self.plain:
            self.plain.setdefault(a, self.plain.pop(b))
        if b in self.declared:
            self.declared.add(a)
        if b in self.fixed:
            self.fix(a, *self.fixed.pop(b))


def find_extents(program: Program, emitter: Emitter, stmts: Sequence[ir.Stmt], params: Sequence[Tensor]) -> Extents:
    """Every group that the statements show."""
    extents = Extents()
    orders = {target.name: target.ranks for stmt in stmts for target in targets(stmt)}
    for tensor in params:
        _state_sizes(extents, tensor)
    for name, rank in emitter.ranks.items():
        if rank.size is not None:
            extents.fix(name, rank.size, rank.span)
    for pair in emitter.equal:
        extents.unite(*pair)
    for value in program.values:
        _state_value(extents, value)
    reads = [node for stmt in stmts for expr in expressions(stmt) for node in walk(expr) if isinstance(node, ir.Read)]
    for read in reads:
        for index, item in enumerate(read.index):
            if isinstance(item, ir.Rank):
                extents.unite(_dimension(orders, read.tensor, index), item.name)
    for stmt in stmts:
        if isinstance(stmt, ir.TopK):
            _state_count(extents, stmt)
    for call in program.calls:
        _state_call(extents, call, orders)
    _prefer_first(extents, reads, params)
    _settle_shifted(extents, reads, orders)
    _settle_chosen(extents, reads, orders, stmts)
    return extents


def _dimension(orders: Mapping[str, Sequence[str]], tensor: str, index: int) -> str:
    """The extent of a dimension: that of its rank for a statement, else its own."""
    return orders[tensor][index] if tensor in orders else position(tensor, index)


def _state_sizes(extents: Extents, tensor: Tensor) -> None:
    for index in range(tensor.rank_count or 0):
        node = position(symbol(tensor), index)
        extents.declared.add(extents.root(node))
        size = tensor.sizes[index] if tensor.sizes is not None else None
        if isinstance(size, str) or index in tensor.relied:
            extents.fix(node, 1 if size is None else size, tensor.span)


def _state_value(extents: Extents, value: Value) -> None:
    """What a value shows by itself, wherever and however it is written out."""
    if isinstance(value.form, Element):
        for index, operand in enumerate(value.operands):
            if isinstance(operand, RankVariable):
                extents.unite(position(symbol(value.form.tensor), index), symbol(operand))
    if isinstance(value.form, At):
        for rank, size in value.form.sizes:
            extents.fix(symbol(rank), size, value.span)


def _state_count(extents: Extents, stmt: ir.TopK) -> None:
    """The kept rank of a top-k has the extent `k`."""
    inside = {node.name for node in walk(stmt.body) if isinstance(node, ir.Rank)}
    kept = next(rank for rank in stmt.values.ranks if rank not in inside)
    if isinstance(stmt.k, int):
        extents.fix(kept, stmt.k, stmt.span)
    else:
        extents.unite(kept, stmt.k)
    for a, b in zip(stmt.values.ranks, stmt.coords.ranks, strict=True):
        extents.unite(a, b)


def _state_call(extents: Extents, call: Invocation, orders: Mapping[str, Sequence[str]]) -> None:
    """The sizes of a called cascade are those of the tensors it is given."""
    known: dict[str, str] = {}
    shapes = [decl.shape for decl in call.callee.params] + [decl.shape for decl in call.callee.results]
    for shape, tensor in zip(shapes, (*call.args, *call.results), strict=True):
        for index, size in enumerate(shape):
            node = _dimension(orders, symbol(tensor), index)
            if isinstance(size, int):
                extents.fix(node, size, call.place.span)
            else:
                extents.unite(known.setdefault(size, node), node)
                extents.called.append((node, size))


def _prefer_first(extents: Extents, reads: Iterable[ir.Read], params: Iterable[Tensor]) -> None:
    """Remember the first rank that indexes each dimension of a parameter, whose name becomes the symbol."""
    names = {symbol(tensor) for tensor in params}
    for read in reads:
        for item in read.index:
            if isinstance(item, ir.Rank) and read.tensor in names:
                extents.plain.setdefault(extents.root(item.name), item.name)


def _settle_shifted(extents: Extents, reads: Iterable[ir.Read], orders: Mapping[str, Sequence[str]]) -> None:
    """`X[b, t + w]`: a rank that is only ever shifted has the extent of the dimension it is shifted in."""
    for read in reads:
        for index, item in enumerate(read.index):
            free = (rank for rank in _terms(item) if extents.root(rank) not in extents.declared | set(extents.fixed))
            if (rank := next(free, None)) is not None and not isinstance(item, ir.Rank):
                extents.unite(_dimension(orders, read.tensor, index), rank)


def _settle_chosen(
    extents: Extents, reads: Iterable[ir.Read], orders: Mapping[str, Sequence[str]], stmts: Iterable[ir.Stmt]
) -> None:
    """`W[I[t, j], d]` with I from a choice along n: a dimension that is only ever chosen from has the extent of n."""
    chosen = {stmt.coords.name: stmt.rank for stmt in stmts if isinstance(stmt, ir.TopK)}
    for read in reads:
        for index, item in enumerate(read.index):
            node = extents.root(_dimension(orders, read.tensor, index))
            if isinstance(item, ir.Read) and item.tensor in chosen and node not in extents.plain:
                extents.unite(chosen[item.tensor], node)


def _terms(index: ir.Expr) -> list[str]:
    """The ranks that are terms of a sum: t and w in `t + w - 1`."""
    if isinstance(index, ir.Rank):
        return [index.name]
    if isinstance(index, ir.Apply) and index.op in ("add", "sub"):
        return [rank for arg in index.args for rank in _terms(arg)]
    return []
