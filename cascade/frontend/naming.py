"""The names of a traced cascade: tensors, rank variables, and the symbols of extents.

A group of ranks of one extent gets the symbol that the user gave it (`ranks("t=T")`), else the first name that a rank
of it has, in upper case. Ranks that nobody named share the letter of their group. A rank is a variable of its
statement: two of one name and one extent keep the name where they never meet, and take a suffix where they do.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade import ir
from cascade.errors import Note, Span
from cascade.frontend.emit import Emitter, position, symbol
from cascade.frontend.extents import Extents, find_extents
from cascade.frontend.forms import Invocation
from cascade.frontend.frames import fail
from cascade.frontend.functions import library_definitions
from cascade.frontend.notation import Tensor, Value
from cascade.frontend.program import Program
from cascade.frontend.uses import ordered_uses
from cascade.inference import stated
from cascade.ops import RESERVED
from cascade.scopes import signatures
from cascade.walk import children, expressions, fresh, map_expressions, rewrite, targets, walk

LETTERS = "IJKLMNPQRSUVWXYZ"


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

    def rank_names(
        self, stmt: ir.Stmt, apart: Mapping[str, set[str]], known: Mapping[str, str], *, named: bool
    ) -> dict[str, str]:
        """Names for the ranks of one statement, those the user named or the others, beside the `known` ones.

        `apart` has for every rank those that must not have its name there.
        """
        found = dict(known)
        for rank in ranks_of(stmt):
            variable = self.emitter.ranks[rank]
            if rank in found or variable.named is not named:
                continue
            root = self.extents.root(rank)
            wanted = legal(variable.name) if named else self._letter(root)
            wanted = wanted[:1].lower() + wanted[1:]
            used = {found[other] for other in apart[rank] if other in found}
            found[rank] = next(name for name in suffixed(wanted) if name not in used and self._fits(name, root))
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


def kept_apart(stmt: ir.Stmt, binding: Container[str]) -> dict[str, set[str]]:
    """For each rank of a statement those that need another name: two that one place sees, and all that a filter names.

    A reduction may bind a name that is free around it, `S[m,n] - max[n] S[m,n]`. `binding` are the functions that bind
    the ranks they work along, as `mean` does.
    """
    apart: dict[str, set[str]] = {rank: set() for rank in ranks_of(stmt)}
    bound: set[str] = set()

    def part(some: Iterable[str], others: Iterable[str]) -> None:
        for a in some:
            for b in others:
                if a != b:
                    apart[a].add(b)
                    apart[b].add(a)

    def free(expr: ir.Expr) -> set[str]:
        inner = {rank for child in children(expr) for rank in free(child)}
        match expr:
            case ir.Rank(name=name):
                return {name}
            case ir.Reduce(ranks=ranks):
                pass
            case ir.Use(function=function, ranks=ranks):
                if function not in binding:
                    return inner | set(ranks)
            case _:
                return inner
        part(ranks, inner | set(ranks))
        bound.update(ranks)
        return inner - set(ranks)

    outside = {rank for target in targets(stmt) for rank in target.ranks}
    outside |= {rank for expr in expressions(stmt) for rank in free(expr)}
    outside |= {stmt.rank} if isinstance(stmt, ir.TopK) else set()
    part(outside, outside)
    if isinstance(stmt, ir.Einsum | ir.TopK) and stmt.where is not None:
        part(free(stmt.where), bound)  # a filter applies inside the reductions over a rank that it names
    return apart


def binding_functions(uses: Iterable[ir.Definition]) -> set[str]:
    """The rank functions that bind every rank they work along, around all their operands."""
    known = signatures(uses)
    return {
        name
        for name, found in known.items()
        if all(must is None or must >= set(found.function.ranks) for must in found.must)
        and not found.free & set(found.function.ranks)
    }


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
    naming = Naming(extents, emitter, set(RESERVED) | {definition.name for definition in uses})
    name = fresh(name, set(naming.taken))
    binding = binding_functions(uses)
    apart = [kept_apart(stmt, binding) for stmt in stmts]
    for tensor in params:
        naming.name(symbol(tensor), tensor.name)
    ranks = [naming.rank_names(stmt, kept, {}, named=True) for stmt, kept in zip(stmts, apart, strict=True)]
    defined = _name_defined(naming, program)
    given = [_shape(naming, tensor) for tensor in params]
    returned = [_result_shape(naming, program, result) for result in program.results]
    for thing, wanted in defined:
        if symbol(thing) not in naming.tensors:
            naming.name(symbol(thing), wanted)
    body = tuple(
        renamed(stmt, naming, naming.rank_names(stmt, kept, known, named=False))
        for stmt, kept, known in zip(stmts, apart, ranks, strict=True)
    )
    inputs = tuple(
        ir.Param(naming.tensors[symbol(tensor)], tensor.dtype_declared, shape, span=tensor.span)
        for tensor, shape in zip(params, given, strict=True)
    )
    results = tuple(
        ir.Result(naming.tensors[symbol(result)], None, shape, fill, span=result.span)
        for result, shape, fill in zip(program.results, returned, fills, strict=True)
    )
    sizes = {rank: extents.fixed[root][0] for rank, root in naming.rank_groups.items() if root in extents.fixed}
    return stated(ir.Cascade(name, inputs, results, body, uses=uses, span=span), sizes)


def _name_defined(naming: Naming, program: Program) -> list[tuple[Value | Tensor, str]]:
    """Names what statements define by the user's variables as far as they are free; gives what all are to be called."""
    made: list[Value | Tensor] = [value for value in program.values if value.key in program.statements]
    made += [tensor for call in program.calls for tensor in call.results]
    names = {**program.recorder.hints, **program.recorder.names, **program.names}
    named = {**program.recorder.names, **program.names}
    defined = [(thing, legal(names.get(thing.key, ""))) for thing in sorted(made, key=lambda thing: thing.key)]
    for thing, wanted in defined:
        if thing.key in named and wanted and wanted not in naming.taken:
            naming.name(symbol(thing), wanted)
    for result in program.results:
        if not legal(named.get(result.key, "")):
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
