"""What a cascade does not say: extents of ranks, shapes and types of tensors, numbers for the symbols of a call.

Extents come from unification. Every position of a tensor and every rank variable is a node; a plain index `A[m,k]`, a
target and a call make nodes equal; declarations say what a node is. Two different extents in one class are a conflict
that names both places, a class without any cannot be inferred. Symbols are never made equal: `M` and `N` stay apart.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias, TypeVar, assert_never

from cascade.errors import CallError, Diagnostic, Note, Span, VerifyError, quoted_list
from cascade.ir import (
    Apply, Call, Cascade, Cast, Const, Definition, DType, Einsum, Expr, Extent, Function, Given, Local, Param, Rank,
    Read, Reduce, Result, Size, Stmt, TopK, Use,
)  # fmt: skip
from cascade.ops import OPS, Kind
from cascade.order import units
from cascade.recent import recently
from cascade.scopes import Facts, facts, signatures, visible
from cascade.walk import children, defines, targets
from cascade.wording import NAME, pinpoint, quote, suggest

MAX_ELEMENTS = 1 << 62
"""The most elements that a tensor may have: what an offset of 64 bits can reach in bytes of any type is less."""


# --- shapes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Shapes:
    """The extent of every rank variable and the shape of every tensor of a cascade."""

    ranks: Mapping[str, Size]
    tensors: Mapping[str, tuple[Size, ...]]


@dataclass(frozen=True, slots=True)
class Inference:
    """Shapes as far as they are known, the conflicts, and a finding for each rank or tensor left without an extent."""

    shapes: Shapes
    conflicts: tuple[Diagnostic, ...]
    unknown: dict[str, Diagnostic]


@recently
def infer_shapes(cascade: Cascade) -> Shapes:
    """The extents and shapes of a cascade; raises all conflicts, and whatever cannot be inferred, as one error."""
    definitions = visible(cascade)
    known = signatures(definitions.values())
    found = infer(cascade, definitions, [facts(stmt, known) for stmt in cascade.body])
    if found.conflicts or found.unknown:
        raise VerifyError((*found.conflicts, *found.unknown.values()))
    return found.shapes


def stated(cascade: Cascade, extents: Mapping[str, Size]) -> Cascade:
    """The cascade with exactly the extents given in its header that its body needs, where `extents` has them.

    A rewrite may take away the read that gave a rank its extent, or the last statement that had the rank.
    """
    known = signatures(visible(cascade).values())
    bare = dataclasses.replace(cascade, given=())
    unknown = infer(bare, visible(bare), [facts(stmt, known) for stmt in bare.body]).unknown
    places = {given.rank: given.span for given in cascade.given}
    given = tuple(Given(rank, extents[rank], span=places.get(rank)) for rank in unknown if rank in extents)
    return cascade if given == cascade.given else dataclasses.replace(cascade, given=given)


def infer(cascade: Cascade, definitions: Mapping[str, Definition], known: Sequence[Facts]) -> Inference:
    """Extents and shapes with what stands in their way, for any cascade, valid or not."""
    table = _Extents()
    arity = arities(cascade, definitions)
    for decl in declarations(cascade):
        for position, size in enumerate(decl.shape[: arity[decl.name]]):
            table.declare((decl.name, position), size, f"in {decl.name}", decl.span)
    for given in cascade.given:
        table.declare((given.rank, RANK), given.size, "in the header", given.span)
    for number, fact in enumerate(known):
        if isinstance(fact.stmt, Call):
            _unify_call(fact.stmt, number, definitions, arity, table)
        else:
            _unify_statement(fact, arity, table)
    return _resolve(cascade, known, arity, table)


def declarations(cascade: Cascade) -> tuple[Param | Result, ...]:
    """What the header of a cascade declares, parameters first."""
    return (*cascade.params, *cascade.results)


def declared_sizes(cascade: Cascade) -> Iterator[Size]:
    """Every extent that the header of a cascade states."""
    for decl in declarations(cascade):
        yield from decl.shape
    yield from (given.size for given in cascade.given)


def arities(cascade: Cascade, definitions: Mapping[str, Definition]) -> dict[str, int]:
    """The number of ranks of every tensor, as its first declaration or definition has it."""
    found: dict[str, int] = {}
    for param in cascade.params:
        found.setdefault(param.name, len(param.shape))
    for stmt in cascade.body:
        for target in targets(stmt):
            found.setdefault(target.name, len(target.ranks))
        callee = definitions.get(stmt.callee) if isinstance(stmt, Call) else None
        if isinstance(stmt, Call) and isinstance(callee, Cascade):
            for name, result in zip(stmt.targets, callee.results, strict=False):
                found.setdefault(name, len(result.shape))
    for result in cascade.results:
        found.setdefault(result.name, len(result.shape))
    return found


Spot: TypeAlias = tuple[str, int]
"""A position of a tensor; `(rank, -1)` is a rank variable, `(number and symbol, -2)` a symbol of a called cascade."""

RANK, SYMBOL = -1, -2


@dataclass(frozen=True, slots=True)
class _Known:
    """An extent, who says so, and the place: of the declaration, or of the index that first passed it on."""

    size: Size
    who: str
    place: Span | None
    passed_on: bool = False


@dataclass(slots=True, eq=False)
class _Extents:
    """Classes of spots that have one extent (union-find)."""

    parent: dict[Spot, Spot] = field(default_factory=dict)
    known: dict[Spot, _Known] = field(default_factory=dict)  # of the node that stands for a class
    declared: dict[Spot, _Known] = field(default_factory=dict)
    doubtful: list[Spot] = field(default_factory=list)  # used where something else is wrong: not worth a finding
    conflicts: dict[tuple[str, frozenset[str]], Diagnostic] = field(default_factory=dict)

    def find(self, node: Spot) -> Spot:
        """The node that stands for the class."""
        parent = self.parent
        while (up := parent.setdefault(node, node)) != node:
            parent[node] = node = parent.setdefault(up, up)
        return node

    def size(self, node: Spot) -> Size | None:
        """The extent of a node, if it is known."""
        known = self.known.get(self.find(node))
        return None if known is None else known.size

    def declare(self, node: Spot, size: Size, who: str, place: Span | None) -> None:
        """The node has this extent."""
        root = self.find(node)
        old = self.known.get(root)
        new = _Known(size, who, place)
        if old is None:
            self.known[root] = self.declared[node] = new
        elif old.size != size:
            self.conflict(node[0], old, new, place)

    def unite(self, what: str, left: Spot, right: Spot, place: Span | None) -> None:
        """The nodes have the same extent, as the text at `place` says."""
        a, b = self.find(left), self.find(right)
        if a == b:
            return
        one, other = self.known.get(a), self.known.pop(b, None)
        if one is not None and other is not None and one.size != other.size:
            self.known[b] = other
            self.conflict(what, one, self.declared.get(right, other), place)
            return
        self.parent[b] = a
        merged = one or other
        if merged is not None:
            place = merged.place if merged.passed_on else place
            self.known[a] = _Known(merged.size, merged.who, place, passed_on=True)

    def conflict(self, what: str, one: _Known, other: _Known, place: Span | None) -> None:
        """Two extents for one class, of `what` at `place`: the first time is worth a finding."""
        label = quote(what) if NAME.fullmatch(what) else what
        where = f"{one.size} and {other.size} {one.who}" if one.who == other.who else ""
        message = f"{label} is {where or f'{one.size} {one.who} and {other.size} {other.who}'}"
        notes = [
            Note(f"{known.size} comes from here", pinpoint(known.place, what, "["))
            for known in (one, other)
            if known.place not in (None, place)
        ]
        if isinstance(one.size, int) and isinstance(other.size, int):
            hint = "make the two extents equal, or use a rank variable for each"
        else:
            hint = (
                f"nothing makes {one.size} and {other.size} equal: declare one extent, or use a rank variable for each"
            )
        found = Diagnostic("C220", message, pinpoint(place, what, "["), hint, tuple(notes))
        self.conflicts.setdefault((label, frozenset((str(one.size), str(other.size)))), found)


def _unify_statement(fact: Facts, arity: Mapping[str, int], table: _Extents) -> None:
    for scan in fact.scans():
        for read, _ in scan.reads:
            _unify_read(read, arity.get(read.tensor), table)
    for target in targets(fact.stmt):
        if target.ranks != targets(fact.stmt)[0].ranks:
            continue  # the coordinates of a top-k, with other ranks than its values: a finding of its own
        for position, rank in enumerate(target.ranks[: arity[target.name]]):
            table.unite(rank, (rank, RANK), (target.name, position), target.span)
    if isinstance(fact.stmt, TopK) and len(kept := kept_ranks(fact.stmt, fact)) == 1:
        table.declare((kept[0], RANK), fact.stmt.k, "by topk", pinpoint(fact.stmt.span, str(fact.stmt.k), "topk"))


def kept_ranks(stmt: TopK, fact: Facts) -> tuple[str, ...]:
    """The ranks of a top-k's targets that its body does not have: exactly one, which counts the kept coordinates."""
    return tuple(rank for rank in dict.fromkeys(stmt.values.ranks) if rank not in fact.body.free)


def _unify_read(read: Read, arity: int | None, table: _Extents) -> None:
    for position, index in enumerate(read.index):
        if not isinstance(index, Rank):
            continue
        if arity == len(read.index):
            node = (read.tensor, position)
            table.unite(index.name, (index.name, RANK), node, index.span or read.span)
        else:
            table.doubtful.append((index.name, RANK))


def _unify_call(
    stmt: Call, number: int, definitions: Mapping[str, Definition], arity: Mapping[str, int], table: _Extents
) -> None:
    """The caller's tensors have the declared shapes of the callee, whose symbols are new with every call."""
    callee = definitions.get(stmt.callee)
    if not isinstance(callee, Cascade):
        return
    pairs: list[tuple[str, Param | Result]] = list(zip(stmt.args, callee.params, strict=False))
    fits = len(stmt.args) == len(callee.params) and all(arity.get(name) == len(decl.shape) for name, decl in pairs)
    if not fits:
        table.doubtful += [(name, position) for name in stmt.targets for position in range(arity.get(name, 0))]
        return
    for name, decl in (*pairs, *zip(stmt.targets, callee.results, strict=False)):
        if arity.get(name) != len(decl.shape):
            continue
        for position, size in enumerate(decl.shape):
            node = (f"{number} {size}", SYMBOL)
            label = f"{size} of {callee.name}"
            if isinstance(size, int):
                table.declare(node, size, f"for {callee.name}", decl.span)
                label = f"rank {position + 1} of {name}"
            table.unite(label, node, (name, position), pinpoint(stmt.span, name))


def _resolve(cascade: Cascade, known: Sequence[Facts], arity: Mapping[str, int], table: _Extents) -> Inference:
    """The extent of every rank variable and tensor, and a finding for each class that has none."""
    ranks: dict[str, Size] = {}
    unknown: dict[str, Diagnostic] = {}
    excused = {table.find(node) for node in table.doubtful}
    for name, span in _rank_variables(known):
        if name in ranks or name in unknown:
            continue
        root = table.find((name, RANK))
        if root in table.known:
            ranks[name] = table.known[root].size
        elif root not in excused:
            excused.add(root)
            unknown[name] = _no_extent(name, pinpoint(span, name))
    tensors: dict[str, tuple[Size, ...]] = {}
    calls = {name: fact.stmt.span for fact in known if isinstance(fact.stmt, Call) for name in fact.stmt.targets}
    for name, count in arity.items():
        nodes = [(name, position) for position in range(count)]
        sizes = [table.size(node) for node in nodes]
        tensors[name] = tuple(size for size in sizes if size is not None)
        lacking = [i for i, node in enumerate(nodes) if sizes[i] is None and table.find(node) not in excused]
        if lacking and name in calls:
            unknown[f"{name}[{lacking[0]}]"] = _no_result_extent(name, lacking[0], pinpoint(calls[name], name))
    complete = {name: shape for name, shape in tensors.items() if len(shape) == arity[name]}
    return Inference(Shapes(ranks, complete), tuple(table.conflicts.values()), unknown)


def _rank_variables(known: Sequence[Facts]) -> Iterator[tuple[str, Span | None]]:
    """Every mention of a rank variable."""
    for fact in known:
        for target in targets(fact.stmt):
            for rank in target.ranks:
                yield rank, target.span
        if isinstance(fact.stmt, TopK):
            yield fact.stmt.rank, fact.stmt.span
        for scan in fact.scans():
            for node in scan.nodes:
                if isinstance(node, Rank):
                    yield node.name, node.span
                elif isinstance(node, (Reduce, Use)):
                    for rank in node.ranks:
                        yield rank, node.span


def _no_extent(rank: str, place: Span | None) -> Diagnostic:
    hint = (
        f"use {quote(rank)} alone as an index of a tensor, as in X[{rank[:60]}], or give the extent behind the "
        f"results: with {rank[:60]} = {rank[:60].upper()}"
    )
    return Diagnostic("C221", f"the extent of {quote(rank)} cannot be inferred", place, hint)


def _no_result_extent(name: str, position: int, place: Span | None) -> Diagnostic:
    message = f"the extent of rank {position + 1} of {quote(name)} cannot be inferred"
    hint = "no argument of the call has this extent: read the tensor at ranks that are known, or declare it as a result"
    return Diagnostic("C221", message, place, hint)


# --- types -----------------------------------------------------------------------------------------------------------

F8 = frozenset({DType.F8E4M3, DType.F8E5M2})
FLOATS = F8 | {DType.BF16, DType.F16, DType.F32, DType.F64}
_INTEGERS = (DType.BOOL, DType.I8, DType.I32, DType.I64)  # each holds those before it
_WIDE = (DType.F32, DType.F64)


def promote(a: DType, b: DType) -> DType:
    """The type in which operands of two types meet; 8-bit floats meet in f32, f16 and bf16 as well."""
    if a not in FLOATS and b not in FLOATS:
        return max(a, b, key=_INTEGERS.index)
    if a not in FLOATS or b not in FLOATS:
        return a if a in FLOATS else b
    if a in F8 and b in F8:
        return DType.F32
    if a in F8 or b in F8 or a is b:
        return b if a in F8 else a
    return DType.F64 if DType.F64 in (a, b) else DType.F32


@dataclass(frozen=True, slots=True)
class Typed:
    """A type, and whether it is weak: constants, coordinates and extents take the type of what they meet."""

    dtype: DType
    weak: bool = False


Maybe: TypeAlias = Typed | None
"""The type of an expression; None inside a recurrence whose type is still being found."""


def meet(args: Sequence[Maybe]) -> Maybe:
    """The common type of operands; those of unknown type have no say."""
    known = [arg for arg in args if arg is not None]
    if not known:
        return None
    strong = [arg.dtype for arg in known if not arg.weak]
    weak_float = any(arg.weak and arg.dtype in FLOATS for arg in known)
    if not strong:
        return Typed(DType.F32 if weak_float else DType.I64, weak=True)
    dtype = strong[0]
    for other in strong[1:]:
        dtype = promote(dtype, other)
    if weak_float and dtype not in FLOATS:
        return Typed(DType.F32)
    return Typed(DType.I64 if dtype is DType.BOOL and len(strong) < len(known) else dtype)


def type_of_apply(op: str, args: Sequence[Maybe]) -> Maybe:
    """The type of a pointwise operation."""
    kind = OPS[op].kind
    if kind is Kind.BOOL:
        return Typed(DType.BOOL)
    found = meet(args[1:] if op == "select" else args)
    if found is None:
        return None
    if kind is Kind.FLOAT and found.dtype not in FLOATS:
        return Typed(DType.F32, found.weak)
    if found.dtype is DType.BOOL and op not in ("select", "default", "min", "max"):
        return Typed(DType.I64)
    return found


def type_of_reduce(reducer: str, body: Maybe) -> Maybe:
    """The type of a reduction from the type of its elements."""
    if reducer in ("any", "all"):
        return Typed(DType.BOOL)
    if reducer in ("argmax", "argmin", "count"):
        return Typed(DType.I64)
    if body is None or reducer not in ("sum", "prod") or body.dtype in FLOATS:
        return body
    return Typed(DType.I64, body.weak and body.dtype is DType.I64)


def infer_dtypes(cascade: Cascade, inputs: Mapping[str, DType]) -> dict[str, DType]:
    """The nominal type of every tensor of a verified cascade, its untyped parameters having those of `inputs`."""
    given = {param.name: Typed(param.dtype or inputs[param.name]) for param in cascade.params}
    found = _Types(visible(cascade)).cascade(cascade, given)
    declared = {result.name: result.dtype for result in cascade.results if result.dtype is not None}
    return {name: typed.dtype for name, typed in found.items()} | declared


@dataclass(slots=True, eq=False)
class _Types:
    """The types of one cascade and of what it uses."""

    definitions: Mapping[str, Definition]
    memo: dict[tuple[str, tuple[Maybe, ...]], Maybe] = field(default_factory=dict)

    def cascade(self, cascade: Cascade, given: Mapping[str, Typed]) -> dict[str, Typed]:
        """The type of every tensor, in dependency order; a recurrence is gone through until its types stay."""
        found: dict[str, Typed] = dict(given)
        for unit in units(cascade.body, ()):
            for _ in range(len(DType)):
                before = [found.get(name) for stmt in unit.statements for name in defines(stmt)]
                for stmt in unit.statements:
                    self.statement(stmt, found)
                if not unit.cyclic or before == [found.get(n) for stmt in unit.statements for n in defines(stmt)]:
                    break
            for stmt in unit.statements:
                for name in defines(stmt):
                    found.setdefault(name, Typed(DType.F32))
        return found

    def statement(self, stmt: Stmt, found: dict[str, Typed]) -> None:
        """The types of what one statement defines, as far as they are known yet."""
        match stmt:
            case Einsum():
                parts = [self.expression(e, found) for e in (stmt.expr, *(init.expr for init in stmt.inits))]
                typed = meet(parts) if stmt.inits else parts[0]
                if typed is not None:
                    found[stmt.target.name] = typed
            case TopK():
                typed = self.expression(stmt.body, found)
                if typed is not None:
                    found[stmt.values.name] = typed
                found[stmt.coords.name] = Typed(DType.I64)
            case Call():
                callee = self.definitions[stmt.callee]
                assert isinstance(callee, Cascade)
                given = {p.name: found[name] for p, name in zip(callee.params, stmt.args, strict=True)}
                inner = _Types(visible(callee, self.definitions)).cascade(callee, given)
                for name, result in zip(stmt.targets, callee.results, strict=True):
                    found[name] = Typed(result.dtype) if result.dtype else inner[result.name]
            case _:
                assert_never(stmt)

    def expression(self, expr: Expr, tensors: Mapping[str, Typed], params: Mapping[str, Maybe] | None = None) -> Maybe:
        """The type of an expression over tensors, or of the body of a `def` over its parameters."""

        def combine(node: Expr, args: list[Maybe]) -> Maybe:
            match node:
                case Const():
                    return type_of_constant(node.value)
                case Rank() | Extent():
                    return Typed(DType.I64, weak=True)
                case Read():
                    return tensors.get(node.tensor)
                case Local():
                    return (params or {})[node.name]
                case Apply():
                    return type_of_apply(node.op, args)
                case Cast():
                    return Typed(node.dtype)
                case Reduce():
                    return type_of_reduce(node.reducer, args[0])
                case Use():
                    return self.use(node.function, tuple(args))
                case _:
                    assert_never(node)

        return fold(expr, combine)

    def use(self, name: str, args: tuple[Maybe, ...]) -> Maybe:
        """The type of a `def` applied to operands of these types."""
        if (name, args) not in self.memo:
            function = self.definitions[name]
            assert isinstance(function, Function)
            params = dict(zip(function.params, args, strict=True))
            self.memo[name, args] = self.expression(function.body, {}, params)
        return self.memo[name, args]


def type_of_constant(value: bool | int | float) -> Typed:
    """Truth values are bool; numbers are weak."""
    if isinstance(value, bool):
        return Typed(DType.BOOL)
    return Typed(DType.I64 if isinstance(value, int) else DType.F32, weak=True)


T = TypeVar("T")


def fold(expr: Expr, combine: Callable[[Expr, list[T]], T]) -> T:
    """The value of an expression from the values of its operands, without recursion."""
    todo = [(expr, False)]
    done: list[T] = []
    while todo:
        node, ready = todo.pop()
        below = children(node)
        if below and not ready:
            todo.append((node, True))
            todo.extend((child, False) for child in reversed(below))
        else:
            first = len(done) - len(below)
            done[first:] = [combine(node, done[first:])]
    return done[0]


# --- sizes of a call -------------------------------------------------------------------------------------------------


def bind_sizes(cascade: Cascade, args: Mapping[str, tuple[int, ...]], given: Mapping[str, int]) -> dict[str, int]:
    """The number of every shape symbol, from the shapes of the arguments and the sizes given by name."""
    findings: list[Diagnostic] = []
    bound: dict[str, tuple[int, str]] = {}
    symbols = dict.fromkeys(size for size in declared_sizes(cascade) if isinstance(size, str))
    for symbol, value in given.items():
        findings += _refuse_size(symbol, value, symbols)
        bound[symbol] = value, "by keyword"
    for param in cascade.params:
        if param.name in args:
            findings += _bind_param(param, tuple(args[param.name]), bound)
    for symbol in symbols:
        if symbol not in bound and not findings:
            findings.append(_no_size(symbol, cascade))
    if findings:
        raise CallError(findings)
    sizes = {symbol: bound[symbol][0] for symbol in symbols}
    too_large = [found for decl in declarations(cascade) for found in _refuse_elements(decl, sizes)]
    if too_large:
        raise CallError(too_large)
    return sizes


def _refuse_size(symbol: str, value: int, symbols: Mapping[str, None]) -> Iterator[Diagnostic]:
    if symbol not in symbols:
        yield Diagnostic("C326", f"{quote(symbol)} is no shape symbol", help=suggest(symbol, symbols, "shape symbols"))
    elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
        message = f"the size of {quote(symbol)} is {str(value)[:60]}"
        yield Diagnostic("C324", message, help="an extent is an integer, 0 or more")


def _bind_param(param: Param, shape: tuple[int, ...], bound: dict[str, tuple[int, str]]) -> Iterator[Diagnostic]:
    """The symbols of one declared shape bound to the extents of the tensor that came for it."""
    declared = f"{param.name}[{','.join(map(str, param.shape))}]"
    if len(shape) != len(param.shape):
        message = f"{quote(param.name)} has {_ranks(len(shape))}, declared with {len(param.shape)}"
        yield Diagnostic("C320", message, param.span, f"declared {declared}, given the shape {shape_text(shape)}")
        return
    for position, (size, extent) in enumerate(zip(param.shape, shape, strict=True)):
        place = pinpoint(param.span, str(size), "[")
        if isinstance(size, int) and size != extent:
            message = f"rank {position + 1} of {quote(param.name)} has extent {extent}, declared {size}"
            yield Diagnostic("C322", message, place, f"declared {declared}, given the shape {shape_text(shape)}")
        elif isinstance(size, str):
            value, who = bound.setdefault(size, (extent, f"in {quote(param.name)}"))
            if value != extent:
                message = f"{quote(size)} is {value} {who} and {extent} in {quote(param.name)}"
                yield Diagnostic("C321", message, place, f"declared {declared}, given the shape {shape_text(shape)}")


def _ranks(count: int) -> str:
    return f"{count} rank" if count == 1 else f"{count} ranks"


def shape_text(shape: tuple[int, ...]) -> str:
    """A shape as the language writes extents: `[4,64]`."""
    return f"[{quoted_list(map(str, shape), 16)}]".replace(", ", ",")


def _no_size(symbol: str, cascade: Cascade) -> Diagnostic:
    decl = next((d for d in declarations(cascade) if symbol in d.shape), None)
    message = f"the size of {quote(symbol)} is unknown: no argument has it"
    place = pinpoint(decl.span, symbol, "[") if decl else None
    return Diagnostic("C323", message, place, f"pass it by keyword: {cascade.name}(..., {symbol}=...)")


def _refuse_elements(decl: Param | Result, sizes: Mapping[str, int]) -> Iterator[Diagnostic]:
    extents = [size if isinstance(size, int) else sizes[size] for size in decl.shape]
    elements = math.prod(extents)
    if elements > MAX_ELEMENTS:
        message = f"{quote(decl.name)} of shape {shape_text(tuple(extents))} would have {amount(elements)} elements"
        yield Diagnostic("C325", message, decl.span, f"the limit is 2^62, {amount(MAX_ELEMENTS)}")


def amount(count: int) -> str:
    """A number of elements, by its magnitude where it has many digits."""
    return str(count) if count < 10**12 else f"about 10^{math.floor(math.log10(count) + 1e-9)}"
