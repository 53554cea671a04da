"""Rules about definitions: what the body of a `def` may say, and how functions and cascades are used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from cascade.errors import Diagnostic, Note, quoted_list
from cascade.ir import Call, Cascade, Definition, Extent, Function, Local, Param, Rank, Read, Reduce, Use
from cascade.ops import REDUCERS, WORDS
from cascade.scopes import Scan, Signatures, along, scan, visible
from cascade.verify.names import (
    RANK,
    TENSOR,
    refuse_name,
    repeated,
    repeated_in,
    unknown_function_hint,
    unknown_operations,
)
from cascade.verify.program import Program, cyclic, strongly_connected
from cascade.verify.statements import lacking, ranks_text, wrong_operands
from cascade.walk import expressions, walk
from cascade.wording import NAME, pinpoint, quote, suggest

MAX_NESTING = 100
"""How deep definitions may use each other: what a pass that expands them can still walk."""


def check_uses(program: Program) -> Iterator[Diagnostic]:
    """C231: a `def` is used as it is defined."""
    for fact in program.facts:
        for found in fact.scans():
            yield from wrong_uses(found, program.definitions, program)


def wrong_uses(within: Scan, definitions: Mapping[str, Definition], program: Program | None) -> Iterator[Diagnostic]:
    """C231 for one expression; within the body of a `def` there is no program."""
    for node in within.nodes:
        found = definitions.get(node.function) if isinstance(node, Use) else None
        if not isinstance(node, Use) or found is None:
            continue
        place = pinpoint(node.span, node.function)
        if isinstance(found, Cascade):
            hint = f"give it a statement of its own: A = {declaration_text(found)}"
            yield Diagnostic("C231", f"{quote(found.name)} is a cascade, a function of whole tensors", place, hint)
            continue
        shown = f"it is declared {function_text(found)}"
        if len(found.params) != len(node.args):
            message = f"{quote(found.name)} takes {_count(len(found.params), 'value')}, given {len(node.args)}"
            yield Diagnostic("C231", message, place, shown)
        if along(found, node.ranks) is None:
            message = f"{quote(found.name)} works along {ranks_text(len(found.ranks))}, given {len(node.ranks)}"
            yield Diagnostic("C231", message, place, shown)
        elif len(node.ranks) > len(found.ranks) and program is not None:
            sig = program.signatures.get(found.name)
            if sig is not None and sig.coordinates:
                message = f"{quote(found.name)} uses the coordinate of its rank, so it works along one rank only"
                yield Diagnostic("C231", message, place, shown)


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def function_text(function: Function) -> str:
    """The head of a `def` as it is written."""
    ranks = f"[{','.join(function.ranks)}]" if function.ranks else ""
    return f"{function.name}{ranks}({', '.join(function.params)})"


def declaration_text(cascade: Cascade) -> str:
    """The parameters of a cascade as they are declared."""
    shown = (f"{p.name}[{','.join(map(str, p.shape))}]" for p in cascade.params)
    return f"{cascade.name}({quoted_list(shown)})"


def check_calls(program: Program) -> Iterator[Diagnostic]:
    """C232: a cascade is called as it is declared."""
    for fact in program.facts:
        if isinstance(fact.stmt, Call):
            yield from _call(fact.stmt, program)


def _call(stmt: Call, program: Program) -> Iterator[Diagnostic]:
    callee = program.definitions.get(stmt.callee)
    place = pinpoint(stmt.span, stmt.callee, "=")
    if isinstance(callee, Function):
        hint = f"name the ranks of both sides, as in A[m] = {function_text(callee)}"
        yield Diagnostic("C232", f"{quote(callee.name)} is a function of elements, not of whole tensors", place, hint)
    if not isinstance(callee, Cascade):
        return
    if len(stmt.args) != len(callee.params):
        message = f"{quote(callee.name)} takes {_count(len(callee.params), 'tensor')}, given {len(stmt.args)}"
        yield Diagnostic("C232", message, place, f"it is declared {declaration_text(callee)}")
    if len(stmt.targets) != len(callee.results):
        message = f"{quote(callee.name)} gives {_count(len(callee.results), 'tensor')}, taken {len(stmt.targets)}"
        yield Diagnostic("C232", message, place, f"its results: {quoted_list(r.name for r in callee.results)}")
    for name, param in zip(stmt.args, callee.params, strict=False):
        yield from _argument(name, param, stmt, program)


def _argument(name: str, param: Param, stmt: Call, program: Program) -> Iterator[Diagnostic]:
    count = program.arity.get(name)
    place = pinpoint(stmt.span, name, "(")
    hint = f"it is declared {param.name}[{','.join(map(str, param.shape))}]"
    if count is not None and count != len(param.shape):
        message = f"{quote(stmt.callee)} takes {ranks_text(len(param.shape))} there; {quote(name)} has {count}"
        yield Diagnostic("C232", message, place, hint)
    own = next((p for p in program.cascade.params if p.name == name), None)
    if own is not None and own.dtype is not None and param.dtype not in (None, own.dtype):
        assert param.dtype is not None
        message = f"{quote(stmt.callee)} takes {param.dtype.value} there; {quote(name)} is {own.dtype.value}"
        yield Diagnostic("C232", message, place, f"round it in a statement before: cast(..., {param.dtype.value})")


# --- the bodies of functions -----------------------------------------------------------------------------------------


def check_function(
    function: Function, definitions: Mapping[str, Definition], known: Signatures
) -> Iterator[Diagnostic]:
    """The findings about one `def`, taken by itself; `definitions` and their signatures are what it may use."""
    yield from _head(function)
    found = scan(function.body, known)
    for name, span, _ in unknown_operations(found, definitions):
        yield Diagnostic("C203", f"{quote(name)} is not defined", span, unknown_function_hint(name, definitions))
    yield from _body(function, found)
    yield from repeated_in(found)
    yield from lacking(found, None)
    yield from wrong_operands(found)
    yield from wrong_uses(found, definitions, None)


def _head(function: Function) -> Iterator[Diagnostic]:
    """C201, C202, C205: the names that a `def` gives."""
    name = function.name
    if not NAME.fullmatch(name) or name in WORDS[:15] or name in REDUCERS:  # built-in functions may be defined anew
        what = "is reserved" if NAME.fullmatch(name) else "is no name"
        yield Diagnostic("C201", f"{quote(name)} {what}", pinpoint(function.span, name), "name the function otherwise")
    for rank in function.ranks:
        yield from refuse_name(RANK, rank, function.span)
    for param in function.params:
        yield from refuse_name(TENSOR, param, function.span)
    for again in repeated((*function.ranks, *function.params)):
        both = again in function.ranks and again in function.params
        message = f"{quote(again)} {'is a rank and a value' if both else 'stands twice in the head'} of {quote(name)}"
        yield Diagnostic("C202" if both else "C205", message, pinpoint(function.span, again, "("), "rename one of them")


def _body(function: Function, found: Scan) -> Iterator[Diagnostic]:
    """C203, C230: the body of a `def` speaks of its own values and ranks, and of nothing else."""
    name, told = function.name, set[str]()
    for node in found.nodes:
        match node:
            case Local() if node.name not in function.params:
                hint = suggest(node.name, function.params, f"values of {name}")
                yield Diagnostic("C203", f"{quote(node.name)} is not defined", node.span, hint)
            case Read(index=()):
                own = f"or make it one: {_with_param(function, node.tensor)}"
                hint = f"{suggest(node.tensor, function.params, f'values of {name}')}; {own}"
                yield Diagnostic("C203", f"{quote(node.tensor)} is not defined", node.span, hint)
            case Read():
                message = f"the body of {quote(name)} reads the tensor {quote(node.tensor)}"
                hint = f"make it a value of the function: {_with_param(function, node.tensor)}"
                yield Diagnostic("C230", message, node.span, hint)
            case Extent():
                message = f"the body of {quote(name)} mentions the size {quote(node.name)}"
                hint = f"make it a value of the function: {_with_param(function, node.name.lower())}"
                yield Diagnostic("C230", message, node.span, hint)
            case Rank() | Reduce() | Use():
                for rank in (node.name,) if isinstance(node, Rank) else node.ranks:
                    if rank not in function.ranks and rank not in told:
                        told.add(rank)
                        message = f"{quote(rank)} is not a rank of {quote(name)}"
                        more = Function(name, (*function.ranks, rank), function.params, function.body)
                        hint = f"write `def {function_text(more)} = ...`"
                        yield Diagnostic("C230", message, pinpoint(node.span, rank), hint)
            case _:
                pass
    used = {rank for binder in found.binders for rank in getattr(binder.node, "ranks", ())}
    used |= {node.name for node in found.nodes if isinstance(node, Rank)}
    for rank in function.ranks:
        if rank not in used:
            message = f"the body of {quote(name)} does not use its rank {quote(rank)}"
            yield Diagnostic("C230", message, pinpoint(function.span, rank, "["), "reduce over it, or drop it")


def _with_param(function: Function, name: str) -> str:
    return function_text(Function(function.name, function.ranks, (*function.params, name), function.body))


# --- recursion -------------------------------------------------------------------------------------------------------


def check_recursion(cascade: Cascade) -> Iterator[Diagnostic]:
    """C233, C236: definitions do not use themselves, and do not nest too deep."""
    known: dict[str, Definition] = {cascade.name: cascade, **visible(cascade)}
    names = list(known)
    number = {name: i for i, name in enumerate(names)}
    edges = [[number[name] for name in _used(definition) if name in number] for definition in known.values()]
    depth = [0] * len(names)
    for members in reversed(strongly_connected(edges)):  # what is used comes before what uses it
        if cyclic(members, edges):
            yield _recursion([known[names[i]] for i in members])
            return
        depth[members[0]] = 1 + max((depth[i] for i in edges[members[0]]), default=0)
    deepest = max(range(len(names)), key=depth.__getitem__)
    if depth[deepest] > MAX_NESTING:
        message = f"{quote(names[deepest])} nests definitions {depth[deepest]} deep"
        hint = f"the limit is {MAX_NESTING}: give parts of it statements of their own"
        yield Diagnostic("C236", message, known[names[deepest]].span, hint)


def _used(definition: Definition) -> list[str]:
    """The names of the definitions that a definition uses."""
    if isinstance(definition, Function):
        return [node.function for node in walk(definition.body) if isinstance(node, Use)]
    found = [stmt.callee for stmt in definition.body if isinstance(stmt, Call)]
    nodes = (node for stmt in definition.body for expr in expressions(stmt) for node in walk(expr))
    return found + [node.function for node in nodes if isinstance(node, Use)]


def _recursion(members: list[Definition]) -> Diagnostic:
    names = [member.name for member in members]
    message = (
        f"{quote(names[0])} uses itself" if len(names) == 1 else f"{quoted_list(map(quote, names))} use each other"
    )
    notes = tuple(Note(f"{quote(m.name)} is defined here", pinpoint(m.span, m.name)) for m in members[1:4] if m.span)
    hint = "a definition may use only others; a recurrence is written with an iterative rank: H[t] = ... H[t-1] ..."
    return Diagnostic("C233", message, pinpoint(members[0].span, names[0]), hint, notes)
