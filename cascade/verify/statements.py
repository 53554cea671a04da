"""Rules about what a statement says: its ranks, reads, indices, kinds of values and extents."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field

from cascade.errors import Diagnostic, Note, Span, quoted_list
from cascade.inference import FLOATS, MAX_ELEMENTS, amount, declarations, fold, kept_ranks, shape_text
from cascade.ir import (
    Apply, Call, Cast, Const, DType, Einsum, Expr, Extent, Function, Local, Rank, Read, Reduce,
    Result, TopK, Use,
)  # fmt: skip
from cascade.ops import OPS, Kind
from cascade.scopes import Binder, Facts, Ranks, Scan
from cascade.verify.program import Program, state_of
from cascade.walk import expressions, targets, walk
from cascade.wording import closest, pinpoint, quote, suggest

# --- ranks -----------------------------------------------------------------------------------------------------------


def left_ranks(fact: Facts) -> tuple[str, ...]:
    """The ranks of a left side that its right side must have: those of a top-k but for the kept one."""
    stmt = fact.stmt
    if isinstance(stmt, Call):
        return ()
    left = targets(stmt)[0].ranks
    return tuple(rank for rank in left if rank not in kept_ranks(stmt, fact)) if isinstance(stmt, TopK) else left


def ranks_in_sight(fact: Facts) -> Ranks:
    """Every rank that a statement has on the left or reduces."""
    left = frozenset(rank for target in targets(fact.stmt) for rank in target.ranks)
    return left.union(*fact.body.scopes)


def not_on_right(fact: Facts) -> list[str]:
    """The ranks of the left side that nothing on the right has. A filter counts: it says what is kept."""
    if not fact.body.complete or isinstance(fact.stmt, Call):
        return []
    right = {**fact.body.free, **(fact.where.free if fact.where else {})}
    return [rank for rank in dict.fromkeys(left_ranks(fact)) if rank not in right and not rank[:1].isupper()]


def not_on_left(fact: Facts) -> dict[str, Span | None]:
    """The ranks of the right side that neither the left side nor a reduction binds."""
    if not fact.body.complete:
        return {}
    left = left_ranks(fact)
    return {rank: span for rank, span in fact.body.free.items() if rank not in left}


def not_in_operand(scan: Scan, where: Scan | None) -> list[tuple[Binder, str]]:
    """The ranks of reductions that their operands do not have, nor the filter that applies there."""
    found: list[tuple[Binder, str]] = []
    filtered: Mapping[str, object] = where.free if where else {}
    for binder in scan.binders if scan.complete else ():
        ranks = (binder.node.rank,) if isinstance(binder.node, TopK) else binder.node.ranks
        found += [(binder, rank) for rank in ranks if rank not in binder.used and rank not in filtered]
    return found


def check_left(program: Program) -> Iterator[Diagnostic]:
    """C210: every rank of a left side is bound on the right."""
    for fact in program.facts:
        for rank in not_on_right(fact):
            target = targets(fact.stmt)[0]
            place = pinpoint(target.span, rank, "[")
            if any(rank in scope for scope in fact.body.scopes):
                message = f"{quote(rank)} is not bound on the right: a reduction uses it up"
                yield Diagnostic("C210", message, place, _drop(target.name, target.ranks, rank))
            else:
                hint = _bind(rank, fact, program)
                yield Diagnostic("C210", f"{quote(rank)} is not bound on the right", place, hint)


def _drop(name: str, ranks: tuple[str, ...], rank: str) -> str:
    left = ",".join(other for other in ranks if other != rank)
    return f"drop it from the left: {name}[{left}] = ..." if left else f"drop it from the left: {name} = ..."


def _bind(rank: str, fact: Facts, program: Program) -> str:
    free = list(fact.body.free)
    close = closest(rank, [other for other in free if other not in targets(fact.stmt)[0].ranks])
    there = f"ranks there: {quoted_list(free)}" if free else "there are no ranks there"
    size = program.inference.shapes.ranks.get(rank)
    kept = "" if size is None else f"; if every {rank} is to have the same value, say so: `where {rank} < {size}`"
    return (f"did you mean {quote(close)}? " if close else "") + there + kept


def check_right(program: Program) -> Iterator[Diagnostic]:
    """C211: every rank of a right side is on the left, or a reduction binds it."""
    for fact in program.facts:
        target = targets(fact.stmt)[0] if targets(fact.stmt) else None
        for rank, span in not_on_left(fact).items():
            assert target is not None
            left = ",".join((*target.ranks, rank))
            term = next((text for read, _ in fact.body.reads if (text := _term(read, rank))), f"...{rank}...")
            hint = f"write `sum[{rank}] {term}` if it is to be summed, or keep it: {target.name}[{left}]"
            yield Diagnostic("C211", f"{quote(rank)} is neither on the left nor reduced", span, hint)
        if isinstance(fact.stmt, Einsum) and fact.inits:
            yield from _first_values(fact.stmt, fact.inits)


def _first_values(stmt: Einsum, scans: tuple[Scan, ...]) -> Iterator[Diagnostic]:
    for init, scan in zip(stmt.inits, scans, strict=True):
        others = [rank for rank in stmt.target.ranks if rank != init.rank]
        for rank, span in scan.free.items():
            if rank not in others:
                hint = f"it may have the ranks {quoted_list(others)}" if others else "it is one number"
                yield Diagnostic("C211", f"{quote(rank)} is not a rank of this first value", span, hint)


def _term(read: Read, rank: str) -> str:
    """A read as it would be written, where it has the rank as a plain index and is simple."""
    plain = [index.name for index in read.index if isinstance(index, Rank)]
    return f"{read.tensor}[{','.join(plain)}]" if rank in plain and len(plain) == len(read.index) else ""


def check_reduced(program: Program) -> Iterator[Diagnostic]:
    """C212: what is reduced over a rank has that rank."""
    for fact in program.facts:
        for scan in fact.scans():
            where = fact.where if scan is fact.body else None
            yield from lacking(scan, where, program.places)


def lacking(scan: Scan, where: Scan | None, tensors: Container[str] = ()) -> Iterator[Diagnostic]:
    """C212 for the reductions of one expression; a name that is a tensor as well has a finding already."""
    for binder, rank in not_in_operand(scan, where):
        if rank in tensors:
            continue
        node = binder.node
        what = "topk" if isinstance(node, TopK) else node.reducer if isinstance(node, Reduce) else node.function
        have = sorted(binder.used)
        there = f"ranks there: {quoted_list(have)}" if have else "there are no ranks there"
        message = f"what {what}[{rank}] works on does not have {quote(rank)}"
        hint = f"{there}; a reduction takes the product behind it, parenthesise to take more"
        yield Diagnostic("C212", message, pinpoint(node.span, rank, what), hint)


def check_filters(program: Program) -> Iterator[Diagnostic]:
    """C213: the ranks of a filter are in sight together, on the left or inside a reduction."""
    for fact in program.facts:
        if fact.where is None or not fact.body.complete or not fact.where.complete:
            continue
        left = frozenset(left_ranks(fact))
        scopes = [left, *(left | scope for scope in fact.body.scopes)]
        wanted = frozenset(fact.where.free)
        strange = [rank for rank in fact.where.free if not any(rank in scope for scope in scopes)]
        for rank in strange:
            if rank not in fact.body.free:
                message = f"the filter mentions {quote(rank)}, which is neither on the left nor reduced"
                hint = f"ranks in sight: {quoted_list(sorted(left.union(*scopes)))}"
                yield Diagnostic("C213", message, fact.where.free[rank], hint)
        if not strange and not any(wanted <= scope for scope in scopes):
            message = f"no reduction sees {quoted_list(sorted(wanted))} together, so the filter applies nowhere"
            hint = "split the filter, or give the inner reduction a statement and a filter of its own"
            yield Diagnostic("C213", message, _where_span(fact), hint)


def _where_span(fact: Facts) -> Span | None:
    where = None if isinstance(fact.stmt, Call) else fact.stmt.where
    return where.span if where else None


# --- reads and indices -----------------------------------------------------------------------------------------------


def check_reads(program: Program) -> Iterator[Diagnostic]:
    """C214: a tensor is read, and defined, with as many indices as it has ranks."""
    for fact in program.facts:
        for scan in fact.scans():
            for read, _ in scan.reads:
                if read.index or read.tensor not in ranks_in_sight(fact):  # else a rank of the same name: C202
                    yield from _wrong_count(read, read.tensor, program)
    for fact in program.folded:
        for read, _ in fact.body.reads:
            yield from _wrong_count(read, state_of(read.tensor), program)
    for result in program.cascade.results:
        count = program.arity[result.name]
        if count != len(result.shape):
            note = Note(f"{quote(result.name)} is declared with {len(result.shape)} here", result.span)
            message = f"{quote(result.name)} is defined with {ranks_text(count)}, declared with {len(result.shape)}"
            place = program.places.get(result.name)
            yield Diagnostic("C214", message, place, "give it the ranks that the header declares", (note,))


def _wrong_count(read: Read, name: str, program: Program) -> Iterator[Diagnostic]:
    """C214 for one read of the tensor of that name, or of a partial one."""
    count = program.arity.get(name)
    if count is not None and count != len(read.index):
        note = Note(f"{quote(name)} has {ranks_text(count)} here", program.places.get(name))
        message = f"{quote(read.tensor)} has {ranks_text(count)}, read with {len(read.index)}"
        hint = f"write {_shape_of(name, count, program).replace(name, read.tensor, 1)}"
        yield Diagnostic("C214", message, read.span, hint, (note,) if note.span else ())


def ranks_text(count: int) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count} rank" if count == 1 else f"{count} ranks"


def _shape_of(name: str, count: int, program: Program) -> str:
    """A tensor as a reader would write it: with the ranks it was defined with, else one index for each rank."""
    target = program.targets.get(name)
    decl = next((d for d in declarations(program.cascade) if d.name == name), None)
    sizes = decl.shape if decl else ("...",) * count
    names = target.ranks if target else [size.lower() if isinstance(size, str) else "..." for size in sizes]
    return f"{name}[{','.join(names)}]" if names else name


def check_indices(program: Program) -> Iterator[Diagnostic]:
    """C215: an index is a sum of coordinates, extents and integer reads, scaled, divided or wrapped by constants."""
    told: set[int] = set()
    for fact in (*program.facts, *program.folded):
        for scan in fact.scans():
            for read, _ in reversed(scan.reads):  # reads inside of indices come first
                for index in read.index:
                    if not isinstance(index, (Rank, Const)):
                        yield from _not_affine(index, read.tensor, told)


def _not_affine(index: Expr, tensor: str, told: set[int]) -> Iterator[Diagnostic]:
    wrong: list[tuple[Expr, str]] = []

    def constant(node: Expr, args: list[bool]) -> bool:
        """Whether a part of the index is the same at every coordinate."""
        match node:
            case Const() | Extent():
                return True
            case Apply(op="add" | "sub" | "neg"):
                return all(args)
            case Apply(op="mul") if any(args):
                return all(args)
            case Apply(op="floordiv" | "mod", args=(_, divisor)) if args[1]:
                if isinstance(divisor, Const) and not divisor.value:
                    wrong.append((node, "divides by zero"))
                return args[0]
            case Apply(op="mul"):
                wrong.append((node, "multiplies two coordinates"))
            case Apply(op="floordiv" | "mod"):
                wrong.append((node, "divides by something that varies"))
            case Apply(op="div"):
                wrong.append((node, "divides with `/`, which gives a float"))
            case Apply():
                wrong.append((node, f"applies {node.op}"))
            case Reduce():
                wrong.append((node, f"holds a reduction, {node.reducer}"))
            case Use():
                wrong.append((node, f"applies {node.function}"))
            case Cast():
                wrong.append((node, "holds a cast"))
            case _:
                pass
        return False

    fold(index, constant)
    for node, why in [found for found in wrong if id(found[0]) not in told][:1]:
        told.update(id(other) for other, _ in wrong)
        hint = f"give it a statement of its own, as in I[...] = ..., and read {tensor}[I[...]]"
        if isinstance(node, Apply) and node.op in ("div", "mod", "floordiv"):
            hint = "write // for a quotient, % for a remainder, of a number or an extent that is not 0"
        yield Diagnostic("C215", f"an index of {quote(tensor)} {why}", node.span or index.span, hint)


# --- kinds of values -------------------------------------------------------------------------------------------------

AFFINE = frozenset({"add", "sub", "neg", "mul", "floordiv", "mod"})
BOOL, INT, FLOAT = "a truth value", "an integer", "a float"
KindOf = str | None
"""What is known of a value before the types of the arguments are: one of the three, or None."""


def kind_of_type(dtype: DType | None) -> KindOf:
    """The kind of a declared type."""
    if dtype is None:
        return None
    return FLOAT if dtype in FLOATS else BOOL if dtype is DType.BOOL else INT


@dataclass(slots=True, eq=False)
class _Kinds:
    """The kinds of the tensors so far, and what was found wrong on the way."""

    tensors: dict[str, KindOf]
    functions: Mapping[str, Function]  # those that expressions may use
    params: Mapping[str, KindOf] = field(default_factory=dict)  # inside of one of them
    findings: list[Diagnostic] = field(default_factory=list)

    def combine(self, node: Expr, args: list[KindOf]) -> KindOf:
        """The kind of an expression from those of its operands."""
        match node:
            case Const():
                return BOOL if isinstance(node.value, bool) else INT if isinstance(node.value, int) else FLOAT
            case Rank() | Extent():
                return INT
            case Read():
                self.index(node, args)
                return self.tensors.get(node.tensor)
            case Apply():
                return self.apply(node, args)
            case Cast():
                return kind_of_type(node.dtype)
            case Reduce(reducer="any" | "all"):
                return BOOL
            case Reduce(reducer="argmax" | "argmin" | "count"):
                return INT
            case Reduce(reducer="sum" | "prod"):
                return INT if args[0] is BOOL else args[0]
            case Reduce(reducer="max" | "min"):
                return args[0]
            case Local():
                return self.params.get(node.name)
            case Use() if node.function in self.functions:
                return self.used(node.function, args)
            case _:
                return None

    def used(self, name: str, args: list[KindOf]) -> KindOf:
        """The kind of a `def` applied to operands of these kinds; what is wrong inside of it is told elsewhere."""
        function = self.functions[name]
        others = {other: known for other, known in self.functions.items() if other != name}  # one that uses itself ends
        inner = _Kinds({}, others, dict(zip(function.params, args, strict=False)))
        return fold(function.body, inner.combine)

    def index(self, read: Read, args: list[KindOf]) -> None:
        for index, kind in zip(read.index, args, strict=True):
            inside = (node.op for node in walk(index) if isinstance(node, Apply))
            if (kind is BOOL or kind is FLOAT) and all(op in AFFINE for op in inside):  # else C215 has said it
                message = f"an index of {quote(read.tensor)} is {kind}"
                hint = "an index is an integer: a coordinate, an extent or an element of an integer tensor"
                self.findings.append(Diagnostic("C216", message, index.span or read.span, hint))

    def apply(self, node: Apply, args: list[KindOf]) -> KindOf:
        op = OPS.get(node.op)
        if op is None or op.arity != len(args):
            return None
        if node.op in ("and", "or", "not"):
            for arg, kind in zip(node.args, args, strict=True):
                self.condition(arg, kind, f"an operand of `{node.op}`")
        if node.op == "select":
            self.condition(node.args[0], args[0], "the first operand of select")
            args = args[1:]
        if op.kind is not Kind.SAME:
            return BOOL if op.kind is Kind.BOOL else FLOAT
        if FLOAT in args:
            return FLOAT
        if None in args:
            return None
        return BOOL if set(args) == {BOOL} and node.op in ("select", "default", "min", "max") else INT

    def condition(self, expr: Expr, kind: KindOf, what: str) -> None:
        if kind is INT or kind is FLOAT:
            message = f"{what} is {kind}, not a condition"
            self.findings.append(Diagnostic("C217", message, expr.span, "compare it with something, as in `... != 0`"))


def check_kinds(program: Program) -> Iterator[Diagnostic]:
    """C216, C217: indices are integers, and conditions are conditions, as far as that is known before a call."""
    functions = {name: item for name, item in program.definitions.items() if isinstance(item, Function)}
    declared = {decl.name: kind_of_type(decl.dtype) for decl in reversed(declarations(program.cascade))}
    kinds = _Kinds(declared, functions)
    for fact in program.facts:
        stmt = fact.stmt
        if isinstance(stmt, Call):
            continue
        for init in stmt.inits if isinstance(stmt, Einsum) else ():
            fold(init.expr, kinds.combine)
        kind = fold(stmt.expr if isinstance(stmt, Einsum) else stmt.body, kinds.combine)
        if stmt.where is not None:
            kinds.condition(stmt.where, fold(stmt.where, kinds.combine), "the filter")
        if isinstance(stmt, TopK):
            kinds.tensors.setdefault(stmt.coords.name, INT)
        kinds.tensors.setdefault(targets(stmt)[0].name, None if isinstance(stmt, Einsum) and stmt.inits else kind)
    kinds.tensors.update({f"{name}'": kind for name, kind in kinds.tensors.items()})
    for fact in program.folded:
        for expr in expressions(fact.stmt):
            fold(expr, kinds.combine)
    yield from kinds.findings


def check_operands(program: Program) -> Iterator[Diagnostic]:
    """C219: an operation has as many operands as it takes."""
    for fact in (*program.facts, *program.folded):
        for scan in fact.scans():
            yield from wrong_operands(scan)


def wrong_operands(scan: Scan) -> Iterator[Diagnostic]:
    """C219 for one expression."""
    for node in scan.nodes:
        if isinstance(node, Apply) and node.op in OPS and len(node.args) != OPS[node.op].arity:
            count = OPS[node.op].arity
            hint = f"write {node.op}({', '.join('xyz'[:count])})"
            if node.op in ("min", "max") and len(node.args) == 1:
                hint += f", or {node.op}[n] x for the {node.op} along a rank"
            message = f"{node.op} takes {count} operand{'s' * (count != 1)}, given {len(node.args)}"
            yield Diagnostic("C219", message, node.span, hint)
        elif isinstance(node, Reduce) and not node.ranks:
            yield Diagnostic("C219", f"{node.reducer} names no rank", node.span, f"write {node.reducer}[n] x")


# --- top-k, extents and results ------------------------------------------------------------------------------------


def check_topk(program: Program) -> Iterator[Diagnostic]:
    """C234, C235: a top-k defines two tensors over the same ranks, one of which counts the kept coordinates."""
    for fact in program.facts:
        stmt = fact.stmt
        if not isinstance(stmt, TopK):
            continue
        values, coords = stmt.values, stmt.coords
        if values.ranks != coords.ranks:
            message = f"{quote(values.name)} and {quote(coords.name)} have different ranks"
            hint = f"write {values.name}[{','.join(values.ranks)}], {coords.name}[{','.join(values.ranks)}] = topk[...]"
            yield Diagnostic("C234", message, coords.span, hint)
        kept = kept_ranks(stmt, fact)
        if len(kept) != 1 and fact.body.complete:
            which = f"{quoted_list(map(quote, kept))} are all new" if kept else "there is none"
            message = f"one rank on the left counts the kept coordinates; {which}"
            hint = f"the left has the ranks on the right but for {quote(stmt.rank)}, and one new one"
            yield Diagnostic("C234", message, values.span, hint)
        extent = program.inference.shapes.ranks.get(stmt.rank)
        place = pinpoint(stmt.span, str(stmt.k), "topk")
        if isinstance(stmt.k, int) and stmt.k < 0:
            yield Diagnostic("C235", f"{stmt.k} coordinates cannot be kept", place, "keep 0 or more")
        elif isinstance(stmt.k, int) and isinstance(extent, int) and stmt.k > extent:
            hint = f"keep {extent} at most"
            yield Diagnostic("C235", f"{stmt.k} of {extent} coordinates cannot be kept", place, hint)


def check_extents(program: Program) -> Iterator[Diagnostic]:
    """C220, C221: extents agree, and every one is known. A rank that another rule blames is not reported again."""
    yield from program.inference.conflicts
    if not program.inference.unknown:
        return
    blamed = {*program.places, *program.symbols}
    for fact in program.facts:
        blamed.update(not_on_right(fact), not_on_left(fact))
        if isinstance(fact.stmt, TopK) and len(kept := kept_ranks(fact.stmt, fact)) != 1:
            blamed.update(kept)
        for scan in fact.scans():
            blamed.update(rank for _, rank in not_in_operand(scan, fact.where))
        if not all(scan.complete for scan in fact.scans()):
            blamed.update(left_ranks(fact))
    yield from (found for name, found in program.inference.unknown.items() if name not in blamed)


def check_given(program: Program) -> Iterator[Diagnostic]:
    """C224: an extent behind the results is that of a rank variable of the body, and given once."""
    ranks = (*program.inference.shapes.ranks, *program.inference.unknown)
    seen: set[str] = set()
    for given in program.cascade.given:
        if given.rank in seen:
            yield Diagnostic("C224", f"the extent of {quote(given.rank)} is given twice", given.span, "give it once")
        elif given.rank not in ranks:
            hint = suggest(given.rank, ranks, "rank variables here")
            yield Diagnostic("C224", f"no statement has the rank {quote(given.rank)}", given.span, hint)
        seen.add(given.rank)


def check_magnitudes(program: Program) -> Iterator[Diagnostic]:
    """C222: extents are not negative, and no tensor has more elements than can be counted."""
    for decl in declarations(program.cascade):
        for size in decl.shape:
            if isinstance(size, int) and size < 0:
                place = pinpoint(decl.span, str(size), "[")
                yield Diagnostic("C222", f"an extent of {quote(decl.name)} is {size}", place, "extents are 0 or more")
    for given in program.cascade.given:
        if isinstance(given.size, int) and given.size < 0:
            message = f"the extent of {quote(given.rank)} is {given.size}"
            yield Diagnostic("C222", message, given.span, "extents are 0 or more")
    for name, shape in program.inference.shapes.tensors.items():
        sizes = tuple(size for size in shape if isinstance(size, int))
        elements = math.prod(sizes)
        if len(sizes) == len(shape) and elements > MAX_ELEMENTS:
            message = f"{quote(name)} of shape {shape_text(sizes)} would have {amount(elements)} elements"
            yield Diagnostic("C222", message, program.places.get(name), f"the limit is 2^62, {amount(MAX_ELEMENTS)}")


RANGES: Mapping[DType, int] = {DType.I8: 1 << 7, DType.I32: 1 << 31, DType.I64: 1 << 63}
_FITS: Mapping[str, Callable[[bool | int | float, DType], bool]] = {
    BOOL: lambda value, _: value in (0, 1),
    INT: lambda value, dtype: type(value) is int and -RANGES[dtype] <= value < RANGES[dtype],
    FLOAT: lambda value, _: not isinstance(value, bool),
}


def check_fills(program: Program) -> Iterator[Diagnostic]:
    """C223: the fill of a result is a value of its type."""
    for result in program.cascade.results:
        kind = kind_of_type(result.dtype)
        if kind is None or result.dtype is None or _FITS[kind](result.fill.value, result.dtype):
            continue
        yield _fill(result, result.dtype)


def _fill(result: Result, dtype: DType) -> Diagnostic:
    value = str(result.fill.value).lower()
    message = f"the fill of {quote(result.name)} is {value[:40]}, which is no {dtype.value}"
    hint = "fill with true or false" if dtype is DType.BOOL else f"fill with a number of type {dtype.value}"
    return Diagnostic("C223", message, result.fill.span or result.span, hint)
