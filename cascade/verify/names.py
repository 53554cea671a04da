"""Rules about names: what may be a name, that it means one thing, is defined once, and is defined at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from cascade.errors import Diagnostic, Note, Span, quoted_list
from cascade.inference import declarations
from cascade.ir import (
    Apply, Call, Cascade, Extent, Function, Local, Mesh, Rank, Reduce, Size, Split, TopK, Use,
)  # fmt: skip
from cascade.ops import FUNCTIONS, LIBRARY_REDUCTIONS, OPS, REDUCERS, RESERVED, WORDS
from cascade.scopes import Scan
from cascade.verify.program import Program, state_of
from cascade.walk import targets
from cascade.wording import NAME, closest, pinpoint, quote, suggest

TENSOR, RANK, SYMBOL, DEFINITION = "a tensor", "a rank variable", "a shape symbol", "a definition"
APPLICABLE = (*FUNCTIONS, *REDUCERS, *LIBRARY_REDUCTIONS)


def check_spelling(program: Program) -> Iterator[Diagnostic]:
    """C201: identifiers only, none of the reserved words, rank variables lower case and shape symbols upper case."""
    yield from _refuse_definition(program.cascade.name, program.cascade.span)
    seen: set[tuple[str, str]] = set()
    for role, name, span in introduced(program):
        if (role, name) not in seen and role is not DEFINITION:
            seen.add((role, name))
            yield from refuse_name(role, name, span)


def can_mean(role: str, name: str) -> bool:
    """Whether something of this role may have the name."""
    if not NAME.fullmatch(name) or name in RESERVED:
        return False
    return not name[0].isupper() if role is RANK else name[0].isupper() if role is SYMBOL else True


def refuse_name(role: str, name: str, span: Span | None) -> Iterator[Diagnostic]:
    """C201 for one name of a tensor, a rank variable or a symbol."""
    if can_mean(role, name):
        return
    place = _place(role, name, span)
    if not NAME.fullmatch(name):
        hint = "letters, digits and _, none of them accented; a digit does not come first"
        yield Diagnostic("C201", f"{quote(name)} is no name", place, hint)
    elif name in RESERVED:
        yield Diagnostic("C201", f"{quote(name)} is reserved", place, f"name {role} otherwise, such as {name}1")
    elif role is RANK:
        yield Diagnostic("C201", f"rank variables are lower case: {quote(name)}", place, f"write {name.lower()}")
    else:
        hint = f"write {name.upper()}" if name[0].isalpha() else "start it with a capital letter"
        yield Diagnostic("C201", f"shape symbols are upper case: {quote(name)}", place, hint)


def _place(role: str, name: str, span: Span | None) -> Span | None:
    return pinpoint(span, name, "[" if role in (RANK, SYMBOL) else "")


def _refuse_definition(name: str, span: Span | None) -> Iterator[Diagnostic]:
    """C201 for the name of a cascade: words of the grammar would not be read back."""
    if not NAME.fullmatch(name) or name in WORDS[:15]:
        what = "is reserved" if NAME.fullmatch(name) else "is no name"
        yield Diagnostic("C201", f"{quote(name)} {what}", pinpoint(span, name), "name the cascade otherwise")


def introduced(program: Program) -> Iterator[tuple[str, str, Span | None]]:
    """Every place that gives a name its meaning: role, name, and the span of what it stands in."""
    for decl in declarations(program.cascade):
        yield TENSOR, decl.name, decl.span
        for size in decl.shape:
            if isinstance(size, str):
                yield SYMBOL, size, decl.span
    for given in program.cascade.given:
        yield RANK, given.rank, given.span
        if isinstance(given.size, str):
            yield SYMBOL, given.size, given.span
    for fact in program.facts:
        stmt = fact.stmt
        for target in targets(stmt):
            yield TENSOR, target.name, target.span
            for rank in target.ranks:
                yield RANK, rank, target.span
        if isinstance(stmt, Call):
            yield from ((TENSOR, name, stmt.span) for name in stmt.targets)
        if isinstance(stmt, TopK):
            yield RANK, stmt.rank, stmt.span
        for scan in fact.scans():
            yield from _names_in(scan)
    for definition, span in used_definitions(program):
        yield DEFINITION, definition, span


def used_definitions(program: Program) -> Iterator[tuple[str, Span | None]]:
    """The definitions that the statements of a cascade use themselves, with the places."""
    for fact in program.facts:
        if isinstance(fact.stmt, Call) and fact.stmt.callee in program.definitions:
            yield fact.stmt.callee, fact.stmt.span
        for scan in fact.scans():
            for node in scan.nodes:
                if isinstance(node, Use) and node.function in program.definitions:
                    yield node.function, node.span


def _names_in(scan: Scan) -> Iterator[tuple[str, str, Span | None]]:
    for node in scan.nodes:
        if isinstance(node, Rank):
            yield RANK, node.name, node.span
        elif isinstance(node, (Reduce, Use)):
            yield from ((RANK, rank, node.span) for rank in node.ranks)


def check_meanings(program: Program) -> Iterator[Diagnostic]:
    """C202: one name means one thing in a cascade; a definition that only other definitions use takes no name here."""
    first: dict[str, tuple[str, Span | None]] = {}
    told: set[str] = set()
    for role, name, span in introduced(program):
        if role is not DEFINITION and not can_mean(role, name):
            continue  # C201 says that it cannot mean that
        before, place = first.setdefault(name, (role, span))
        if before is not role and name not in told:
            told.add(name)
            message = f"{quote(name)} is {role} here and {before} elsewhere"
            note = Note(f"{quote(name)} is {before} here", _place(before, name, place))
            yield Diagnostic("C202", message, _place(role, name, span), "one name means one thing: rename one", (note,))


def check_single(program: Program) -> Iterator[Diagnostic]:
    """C204: a tensor, a result and a definition are each defined once."""
    cascade = program.cascade
    yield from _twice((definition.name, definition.span) for definition in cascade.uses)
    yield from _twice((result.name, result.span) for result in cascade.results)
    made = [(param.name, param.span) for param in cascade.params]
    for stmt in cascade.body:
        made += [(target.name, target.span) for target in targets(stmt)]
        made += [(name, stmt.span) for name in (stmt.targets if isinstance(stmt, Call) else ())]
    yield from _twice(made, {param.name for param in cascade.params})


def _twice(made: Iterable[tuple[str, Span | None]], params: Iterable[str] = ()) -> Iterator[Diagnostic]:
    first: dict[str, Span | None] = {}
    for name, span in made:
        if name in first:
            what = "is a parameter and defined again" if name in params else "is defined twice"
            note = Note(f"{quote(name)} is first defined here", pinpoint(first[name], name))
            hint = "a name is defined once: rename one of the two, and what reads it"
            yield Diagnostic("C204", f"{quote(name)} {what}", pinpoint(span, name), hint, (note,))
        first.setdefault(name, span)


def check_repeated_ranks(program: Program) -> Iterator[Diagnostic]:
    """C205: the ranks of a target, and those of a reduction, are all different."""
    for fact in program.facts:
        for target in targets(fact.stmt):
            for rank in repeated(target.ranks):
                place = pinpoint(pinpoint(target.span, rank, "["), rank)
                hint = "give each rank of a tensor a variable of its own; a diagonal is read, as in Z[m] = A[m,m]"
                yield Diagnostic("C205", f"{quote(rank)} stands twice on the left of {quote(target.name)}", place, hint)
        for scan in fact.scans():
            yield from repeated_in(scan)


def repeated_in(scan: Scan) -> Iterator[Diagnostic]:
    """C205 for the reductions of an expression."""
    for node in scan.nodes:
        if isinstance(node, (Reduce, Use)):
            for rank in repeated(node.ranks):
                message = f"{quote(rank)} stands twice in one reduction"
                yield Diagnostic("C205", message, pinpoint(node.span, rank, "["), "name each rank once")


def repeated(names: Iterable[str]) -> list[str]:
    """The names that occur more than once."""
    seen: set[str] = set()
    again: dict[str, None] = {}
    for name in names:
        if name in seen:
            again[name] = None
        seen.add(name)
    return list(again)


def check_results(program: Program) -> Iterator[Diagnostic]:
    """C206: there is a result, and every result is defined."""
    cascade = program.cascade
    if not cascade.results:
        hint = "name what it gives, as in `-> Z[M,N]`"
        yield Diagnostic("C206", f"cascade {quote(cascade.name)} has no result", cascade.span, hint)
    for result in cascade.results:
        if result.name not in program.places:
            hint = suggest(result.name, program.owner, "tensors defined by a statement")
            message = f"no statement defines the result {quote(result.name)}"
            yield Diagnostic("C206", message, pinpoint(result.span, result.name), hint)


# --- undefined names -------------------------------------------------------------------------------------------------


def check_undefined(program: Program) -> Iterator[Diagnostic]:
    """C203: every tensor, symbol, function and cascade that is mentioned exists; each unknown name once."""
    told: set[str] = set()
    for name, span, hint_kind in _mentions(program):
        if name not in told:
            told.add(name)
            yield Diagnostic("C203", f"{quote(name)} is not defined", span, _hint(name, hint_kind, program))


def _mentions(program: Program) -> Iterator[tuple[str, Span | None, str]]:
    """Every mention of a name that nothing defines, with the kind of thing that is missing."""
    for fact in program.facts:
        stmt = fact.stmt
        if isinstance(stmt, Call):
            yield from _call_mentions(stmt, program)
        if isinstance(stmt, TopK):
            yield from _unknown_size(stmt.k, stmt.span, program)
        for scan in fact.scans():
            for read, _ in scan.reads:
                if read.tensor not in program.places and read.tensor not in program.arity:
                    yield read.tensor, read.span, TENSOR
            for node in scan.nodes:
                if isinstance(node, Extent):
                    yield from _unknown_size(node.name, node.span, program)
                elif isinstance(node, Local):
                    yield node.name, node.span, TENSOR
            yield from unknown_operations(scan, program.definitions)
    for fact in program.folded:
        yield from _fold_mentions(fact.body, program)
    for directive in program.cascade.schedule:
        if isinstance(directive, Mesh):
            yield from _unknown_size(directive.size, directive.span, program)
        elif isinstance(directive, Split) and directive.parts is not None:
            yield from _unknown_size(directive.parts, directive.span, program)


def _fold_mentions(scan: Scan, program: Program) -> Iterator[tuple[str, Span | None, str]]:
    """The names in an expression of a fold that nothing defines; a partial state is defined where its state is."""
    for read, _ in scan.reads:
        if state_of(read.tensor) not in program.places and state_of(read.tensor) not in program.arity:
            yield read.tensor, read.span, TENSOR
    for node in scan.nodes:
        if isinstance(node, Extent):
            yield from _unknown_size(node.name, node.span, program)
        elif isinstance(node, Local):
            yield node.name, node.span, TENSOR
    refused = {node.function for node in scan.nodes if isinstance(node, Use)}  # C249: it has no place there
    yield from unknown_operations(scan, refused)


def _call_mentions(stmt: Call, program: Program) -> Iterator[tuple[str, Span | None, str]]:
    if stmt.callee not in program.definitions:
        yield stmt.callee, pinpoint(stmt.span, stmt.callee, "="), DEFINITION
    for name in stmt.args:
        if name not in program.places and name not in program.arity:
            yield name, pinpoint(stmt.span, name, "("), TENSOR


def _unknown_size(size: Size, span: Span | None, program: Program) -> Iterator[tuple[str, Span | None, str]]:
    if isinstance(size, str) and size not in program.symbols:
        yield size, pinpoint(span, size), SYMBOL


def unknown_operations(scan: Scan, definitions: Iterable[str]) -> Iterator[tuple[str, Span | None, str]]:
    """The functions and reducers of an expression that do not exist."""
    for node in scan.nodes:
        if isinstance(node, Use) and node.function not in definitions:
            yield node.function, pinpoint(node.span, node.function), DEFINITION
        elif isinstance(node, Apply) and node.op not in OPS:
            yield node.op, pinpoint(node.span, node.op), DEFINITION
        elif isinstance(node, Reduce) and node.reducer not in REDUCERS:
            yield node.reducer, pinpoint(node.span, node.reducer), DEFINITION


def _hint(name: str, kind: str, program: Program) -> str:
    """What to try instead of an unknown name: what it is when it is something else, else the closest known one."""
    if kind is DEFINITION:
        return unknown_function_hint(name, program.definitions)
    if name != state_of(name):
        base = state_of(name)
        known = f"read {base}" if base in program.places else suggest(base, program.places, "tensors defined here")
        return f"a primed name is the state of a part, in the `merge` of a fold: {known}"
    if kind is SYMBOL:
        return suggest(name, program.symbols, "shape symbols of the declarations")
    meaning = program.definitions.get(name)
    if isinstance(meaning, Function):
        return f"{quote(name)} is a function: apply it to values, {name}(...)"
    if isinstance(meaning, Cascade):
        return f"{quote(name)} is a cascade: use it in a statement of its own, as in A = {name}(...)"
    if name in program.symbols:
        return f"{quote(name)} is a shape symbol, a number: it has no elements"
    return suggest(name, program.places, "tensors defined here")


def unknown_function_hint(name: str, definitions: Iterable[str]) -> str:
    """The closest function to an unknown one, or how to define it."""
    known = [*definitions, *APPLICABLE]
    close = closest(name, known)
    own = f"def {name}(x) = ..." if NAME.fullmatch(name) and len(name) < 60 else "def f(x) = ..."
    return f"did you mean {quote(close)}?" if close else f"define it: {own}; built in: {quoted_list(FUNCTIONS, 5)}"
