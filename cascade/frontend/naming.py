"""The names of a traced cascade: tensors, rank variables, and the symbols of the extents, which are found here too.

Two ranks have one extent where they stand at one position of a tensor. A group of ranks of one extent gets the symbol
that the user gave it (`ranks("t=T")`), else the first name that a rank of it has in upper case. Ranks that nobody named
share the letter of their group. A rank is a variable of its statement: two of one name and one extent keep the name
where they never meet, and take a suffix where they do.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade import ir
from cascade.errors import Note, Span
from cascade.frontend.emit import Emitter, Program, position, symbol
from cascade.frontend.frames import fail
from cascade.frontend.functions import library_definitions
from cascade.frontend.notation import At, Element, Invocation, RankVariable, Tensor, Value
from cascade.frontend.uses import ordered_uses
from cascade.ops import RESERVED
from cascade.walk import expressions, fresh, map_expressions, rewrite, targets, walk

LETTERS = "IJKLMNPQRSUVWXYZ"


# --- extents ---------------------------------------------------------------------------------------------------------


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
        if isinstance(size, str) or index in tensor.ones:
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
            rank = _shifted(item)
            if rank is None:
                continue
            root = extents.root(rank)
            if root not in extents.declared and root not in extents.fixed:
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


def _shifted(index: ir.Expr) -> str | None:
    """The rank at the start of a sum: t in `t + w` and `t - 1`."""
    while isinstance(index, ir.Apply) and index.op in ("add", "sub"):
        index = index.args[0]
        if isinstance(index, ir.Rank):
            return index.name
    return None


# --- names -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Naming:
    """The names of one cascade; `taken` are those that mean something already."""

    extents: Extents
    emitter: Emitter
    taken: set[str]
    tensors: dict[str, str] = field(default_factory=dict)
    symbols: dict[str, ir.Size] = field(default_factory=dict)  # of the roots
    rank_groups: dict[str, str] = field(default_factory=dict)  # name of a rank -> root
    letters: dict[str, str] = field(default_factory=dict)  # root -> the name of its unnamed ranks

    def name(self, thing: str, wanted: str) -> None:
        """Name a tensor."""
        self.tensors[thing] = fresh(legal(wanted) or "T", self.taken)

    def rank_names(self, stmt: ir.Stmt, known: Mapping[str, str], *, named: bool) -> dict[str, str]:
        """Names for the ranks of one statement, those the user named or the others, beside the `known` ones."""
        found = dict(known)
        used = set(known.values())
        for rank in ranks_of(stmt):
            variable = self.emitter.ranks[rank]
            if rank in found or variable.named is not named:
                continue
            root = self.extents.root(rank)
            wanted = legal(variable.name) if named else self._letter(root)
            wanted = wanted[:1].lower() + wanted[1:]
            found[rank] = next(name for name in suffixed(wanted) if name not in used and self._fits(name, root))
            used.add(found[rank])
            self.rank_groups[found[rank]] = root
            self.taken.add(found[rank])
        return found

    def _fits(self, name: str, root: str) -> bool:
        """Whether ranks of a group may have a name: it is free, or they have it already."""
        return self.rank_groups.get(name) == root if name in self.rank_groups else name not in self.taken

    def _letter(self, root: str) -> str:
        """The name of the ranks of a group that nobody named: its symbol in lower case, or the next letter."""
        if root not in self.letters:
            size = self.symbols.get(root)
            names = (size.lower(),) if isinstance(size, str) else self._free_letters()
            self.letters[root] = next(iter(names))
        return self.letters[root]

    def _free_letters(self) -> Iterator[str]:
        used = {*self.letters.values(), *self.taken, *(name.lower() for name in self.taken)}
        return (letter.lower() for letter in letters() if letter.lower() not in used and letter not in used)

    def size(self, node: str, wanted: str | None = None) -> ir.Size:
        """The size of a group, by the symbol it has or gets."""
        root = self.extents.root(node)
        if root in self.symbols:
            return self.symbols[root]
        found = self.extents.fixed[root][0] if root in self.extents.fixed else self._symbol(root, node, wanted)
        self.symbols[root] = fresh(found, self.taken) if isinstance(found, str) else found
        return self.symbols[root]

    def _symbol(self, root: str, node: str, wanted: str | None) -> str:
        variable = self.emitter.ranks.get(self.extents.plain.get(root, node))
        if variable is not None and variable.named:
            return legal(variable.name).upper()
        named = [r for n, r in self.emitter.ranks.items() if r.named and self.extents.root(n) == root]
        if named:
            return legal(named[0].name).upper()
        if variable is None and (there := [s for n, s in self.extents.called if self.extents.root(n) == root]):
            return there[0]
        if variable is None and wanted is not None:
            return wanted
        if root not in self.letters:
            self.letters[root] = next(self._free_letters())
        return self.letters[root].upper()


def legal(name: str) -> str:
    """A name as an ASCII identifier that starts with a letter; "" where nothing is left of it."""
    plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9_]", "_", plain).lstrip("_0123456789")


def suffixed(name: str) -> Iterator[str]:
    """`name`, `name_1`, `name_2`, ..."""
    yield name
    count = 0
    while True:
        count += 1
        yield f"{name}_{count}"


def letters() -> Iterator[str]:
    """I, J, K, ..., I_1, J_1, ..."""
    yield from LETTERS
    count = 0
    while True:
        count += 1
        yield from (f"{letter}_{count}" for letter in LETTERS)


def ranks_of(stmt: ir.Stmt) -> tuple[str, ...]:
    """The ranks of a statement, in the order in which its text has them."""
    found: dict[str, None] = {rank: None for target in targets(stmt) for rank in target.ranks}
    if isinstance(stmt, ir.TopK):
        found.setdefault(stmt.rank)
    for expr in expressions(stmt):
        for node in walk(expr):
            match node:
                case ir.Rank(name=name):
                    found.setdefault(name)
                case ir.Reduce(ranks=ranks) | ir.Use(ranks=ranks):
                    found.update((rank, None) for rank in ranks if rank not in found)
                case _:
                    pass
    return tuple(found)


def renamed(stmt: ir.Stmt, naming: Naming, ranks: Mapping[str, str]) -> ir.Stmt:
    """A statement with names for its serial numbers."""

    def change(expr: ir.Expr) -> ir.Expr:
        match expr:
            case ir.Rank():
                return dataclasses.replace(expr, name=ranks[expr.name])
            case ir.Extent():
                size = naming.size(expr.name)
                return ir.Const(size, span=expr.span) if isinstance(size, int) else ir.Extent(size, span=expr.span)
            case ir.Read():
                return dataclasses.replace(expr, tensor=naming.tensors[expr.tensor])
            case ir.Reduce() | ir.Use():
                return dataclasses.replace(expr, ranks=tuple(ranks[rank] for rank in expr.ranks))
            case _:
                return expr

    def target(old: ir.Target) -> ir.Target:
        return ir.Target(naming.tensors[old.name], tuple(ranks[rank] for rank in old.ranks), span=old.span)

    stmt = map_expressions(stmt, lambda expr: rewrite(expr, change))
    match stmt:
        case ir.Einsum():
            inits = tuple(dataclasses.replace(init, rank=ranks[init.rank]) for init in stmt.inits)
            return dataclasses.replace(stmt, target=target(stmt.target), inits=inits)
        case ir.TopK():
            k = stmt.k if isinstance(stmt.k, int) else naming.size(stmt.k)
            values, coords = target(stmt.values), target(stmt.coords)
            return dataclasses.replace(stmt, values=values, coords=coords, rank=ranks[stmt.rank], k=k)
        case ir.Call():
            found = tuple(naming.tensors[name] for name in stmt.targets)
            return dataclasses.replace(stmt, targets=found, args=tuple(naming.tensors[name] for name in stmt.args))


# --- the cascade -----------------------------------------------------------------------------------------------------


def build(
    name: str, params: Sequence[Tensor], program: Program, fills: Sequence[ir.Const], span: Span | None
) -> ir.Cascade:
    """The cascade of a program. What the user named comes first, then symbols, then what nobody named."""
    emitter = Emitter(program)
    stmts = emitter.statements()
    extents = find_extents(program, emitter, stmts, params)
    uses = definitions(stmts, program.calls)
    naming = Naming(extents, emitter, {name, *RESERVED, *(definition.name for definition in uses)})
    for tensor in params:
        naming.name(symbol(tensor), tensor.name)
    ranks = [naming.rank_names(stmt, {}, named=True) for stmt in stmts]
    defined = _name_defined(naming, program)
    inputs = tuple(
        ir.Param(naming.tensors[symbol(t)], t.dtype_declared, _shape(naming, t), span=t.span) for t in params
    )
    results = tuple(
        ir.Result(naming.tensors[symbol(t)], None, _result_shape(naming, program, t), fill, span=t.span)
        for t, fill in zip(program.results, fills, strict=True)
    )
    for thing in defined:
        if symbol(thing) not in naming.tensors:
            naming.name(symbol(thing), program.recorder.hints.get(thing.key, ""))
    ranks = [naming.rank_names(stmt, known, named=False) for stmt, known in zip(stmts, ranks, strict=True)]
    body = tuple(renamed(stmt, naming, known) for stmt, known in zip(stmts, ranks, strict=True))
    return ir.Cascade(name, inputs, results, body, uses=uses, span=span)


def _name_defined(naming: Naming, program: Program) -> list[Value | Tensor]:
    """Everything that statements define, in order; what the user named and what is returned gets its name."""
    defined: list[Value | Tensor] = [value for value in program.values if value.key in program.statements]
    defined += [tensor for call in program.calls for tensor in call.results]
    defined.sort(key=lambda thing: thing.key)
    names = {**program.recorder.names, **program.names}
    for thing in defined:
        if wanted := legal(names.get(thing.key, "")):
            naming.name(symbol(thing), wanted)
    for result in program.results:
        if symbol(result) not in naming.tensors:
            naming.name(symbol(result), "out")
    return defined


def _shape(naming: Naming, tensor: Tensor) -> tuple[ir.Size, ...]:
    """The sizes of a parameter, or of a result of a called cascade."""
    letter = legal(tensor.name)[:1].upper() or "T"
    other = f"{letter}{legal(tensor.name)[1:]}"
    return tuple(naming.size(position(symbol(tensor), i), f"{other}{i}") for i in range(tensor.rank_count or 0))


def _result_shape(naming: Naming, program: Program, result: Value | Tensor) -> tuple[ir.Size, ...]:
    if isinstance(result, Tensor):
        return _shape(naming, result)
    return tuple(naming.size(symbol(rank)) for rank in program.order(result))


def definitions(stmts: Iterable[ir.Stmt], calls: Iterable[Invocation]) -> tuple[ir.Definition, ...]:
    """What the statements use: functions of the library, and the cascades that are called with what they use."""
    nodes = (node for stmt in stmts for expr in expressions(stmt) for node in walk(expr))
    functions = sorted({node.function for node in nodes if isinstance(node, ir.Use)})
    found = {definition.name: definition for definition in library_definitions(*functions)} if functions else {}
    for call in calls:
        for definition in (*call.callee.uses, call.callee):
            other = found.setdefault(definition.name, definition)
            if other != definition:
                note = Note("the other one is defined here", other.span) if other.span else None
                help = "give one of the two functions another name"
                raise fail("C425", f"two definitions are called {definition.name}", help, at=call.place.span, note=note)
    return ordered_uses(found.values())
