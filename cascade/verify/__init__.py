"""Whether a cascade is valid: small independent rules, each with its code and a place, and the named invariants.

Every rule looks at the whole cascade and yields what it finds; all findings of all rules are reported at once, in the
order of the text. A rule keeps quiet about what follows from a mistake that another rule reports. No rule raises,
recurses into an expression or depends on another having passed. The tables of codes are in ARCHITECTURE.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from cascade.errors import Diagnostic, VerifyError
from cascade.ir import (
    Bind, Call, Cascade, Definition, Einsum, Fold, Function, Fuse, GroupBy, Place, Reduce, Region, Stream, Use, Wait,
)  # fmt: skip
from cascade.scopes import Signatures
from cascade.verify.cycles import check_cycles
from cascade.verify.folds import check_folds
from cascade.verify.names import (
    check_meanings, check_repeated_ranks, check_results, check_single, check_spelling, check_undefined,
)  # fmt: skip
from cascade.verify.program import Rule, program_of, strongly_connected
from cascade.verify.rows import check_rows
from cascade.verify.schedule import (
    check_groups, check_regions, check_schedule_names, check_schedule_numbers, check_schedule_twice, check_waits,
    not_canonical,
)  # fmt: skip
from cascade.verify.statements import (
    check_extents, check_fills, check_filters, check_given, check_indices, check_kinds, check_left, check_magnitudes,
    check_operands, check_reads, check_reduced, check_right, check_topk,
)  # fmt: skip
from cascade.verify.streams import check_streams
from cascade.verify.uses import check_calls, check_function, check_recursion, check_uses
from cascade.walk import defines, expressions, reads, walk
from cascade.wording import quote

MAX_FINDINGS = 100
"""More findings of one cascade than a person reads."""

RULES: tuple[Rule, ...] = (
    check_spelling,
    check_meanings,
    check_single,
    check_undefined,
    check_repeated_ranks,
    check_results,
    check_left,
    check_right,
    check_reduced,
    check_filters,
    check_reads,
    check_indices,
    check_kinds,
    check_operands,
    check_uses,
    check_calls,
    check_topk,
    check_extents,
    check_given,
    check_magnitudes,
    check_fills,
    check_cycles,
    check_schedule_names,
    check_schedule_numbers,
    check_schedule_twice,
    check_waits,
    check_streams,
    check_regions,
    check_groups,
    check_rows,
    check_folds,
)


def verify(cascade: Cascade) -> None:
    """Raises all that is wrong with a cascade, and with the definitions that travel with it, as one error."""
    found = findings(cascade)
    if found:
        raise VerifyError(found)


def findings(cascade: Cascade) -> tuple[Diagnostic, ...]:
    """All that is wrong with a cascade, in the order of its text, cut at `MAX_FINDINGS`."""
    recursion = tuple(check_recursion(cascade))
    return tuple(sorted(islice(chain(recursion, _definitions(cascade)), MAX_FINDINGS), key=_place))


def _place(found: Diagnostic) -> tuple[bool, str, int, int]:
    span = found.span
    return (True, "", 0, 0) if span is None else (False, span.source.name, span.line, span.column)


def _definitions(cascade: Cascade) -> Iterator[Diagnostic]:
    """The findings about the cascade and about everything it uses, each definition once."""
    todo: list[tuple[Definition, Mapping[str, Definition], Signatures]] = [(cascade, {}, {})]
    seen: set[int] = set()
    for definition, around, known in todo:
        if id(definition) in seen:
            continue
        seen.add(id(definition))
        if isinstance(definition, Function):
            yield from check_function(definition, around, known)
            continue
        program = program_of(definition, around)
        for rule in RULES:
            yield from rule(program)
        todo += [(used, program.definitions, program.signatures) for used in definition.uses]


# --- invariants ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Invariant:
    """A named normal form: what passes require and ensure. `holds` gives the reasons why it does not, if any."""

    name: str
    code: str
    holds: Callable[[Cascade], tuple[Diagnostic, ...]]


def _used(cascade: Cascade) -> tuple[Diagnostic, ...]:
    """C251: every use of a `def` and every call of a cascade that is left."""
    found: list[Diagnostic] = []
    for stmt in cascade.body:
        if isinstance(stmt, Call):
            found.append(Diagnostic("C251", f"{quote(stmt.callee)} is not expanded", stmt.span))
        for expr in expressions(stmt):
            nodes = (node for node in walk(expr) if isinstance(node, Use))
            found += [Diagnostic("C251", f"{quote(node.function)} is not expanded", node.span) for node in nodes]
    return tuple(found)


def _uncanonical(cascade: Cascade) -> tuple[Diagnostic, ...]:
    """C252: a reduction below the top of a statement, a statement before what it reads, one that nothing needs."""
    return (*_nested(cascade), *_disordered(cascade), *_dead(cascade))


def _nested(cascade: Cascade) -> Iterator[Diagnostic]:
    for stmt in cascade.body:
        name = quote(defines(stmt)[0])
        if why := not_canonical(stmt):
            yield Diagnostic("C252", f"{name} {why}", stmt.span)
        if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce):
            for rank in stmt.expr.ranks:
                if rank in stmt.target.ranks:
                    yield Diagnostic("C252", f"{name} keeps {quote(rank)} and reduces it", stmt.span)


def _disordered(cascade: Cascade) -> Iterator[Diagnostic]:
    owner = {name: number for number, stmt in enumerate(cascade.body) for name in defines(stmt)}
    edges = [[owner[name] for name in reads(stmt) if name in owner] for stmt in cascade.body]
    recurrence = {number: members for members in strongly_connected(edges) for number in members}
    for number, stmt in enumerate(cascade.body):
        for other in edges[number]:
            if other > number and other not in recurrence[number]:
                late = defines(cascade.body[other])[0]
                message = f"{quote(defines(stmt)[0])} stands before {quote(late)}, which it reads"
                yield Diagnostic("C252", message, stmt.span)


def _dead(cascade: Cascade) -> Iterator[Diagnostic]:
    owner = {name: number for number, stmt in enumerate(cascade.body) for name in defines(stmt)}
    todo = [result.name for result in cascade.results]
    for directive in cascade.schedule:
        if isinstance(directive, (Fuse, GroupBy, Region, Bind, Place)):
            todo += directive.statements
        elif isinstance(directive, Fold):
            todo += (*directive.update, *directive.finalize)
        elif isinstance(directive, Stream):
            todo += [part.name for part in directive.parts]
        elif isinstance(directive, Wait):
            todo += [directive.part.name, directive.on.name]
    needed: set[int] = set()
    for name in todo:
        if name in owner and owner[name] not in needed:
            needed.add(owner[name])
            todo += reads(cascade.body[owner[name]])
    for number, stmt in enumerate(cascade.body):
        if number not in needed:
            yield Diagnostic("C252", f"nothing needs {quote(defines(stmt)[0])}", stmt.span)


well_formed = Invariant("well_formed", "C250", findings)
inlined = Invariant("inlined", "C251", _used)
canonical = Invariant("canonical", "C252", _uncanonical)
