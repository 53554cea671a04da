"""From text to cascades: parse, resolve names, write out implicit sums, attach what each cascade uses.

Parsing does not verify. But where a text has mistakes of its own, the verifier is asked about the rest of it, so that
everything that is wrong is said at once.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field, replace

from cascade.errors import Diagnostic, Note, ParseError, Source, Span, quoted_list
from cascade.frontend.contract import contract
from cascade.frontend.diagnose import read_definitions
from cascade.frontend.library import library_names, library_source
from cascade.frontend.nodes import CascadeText, DefinitionText, FunctionText
from cascade.frontend.pieces import EXAMPLE
from cascade.frontend.resolve import Callee, Resolved, resolve_cascade, resolve_function
from cascade.frontend.tokens import decode
from cascade.frontend.uses import callees_first, needs, reachable
from cascade.ir import Cascade, Definition, Function, Stmt, Use
from cascade.ops import FUNCTIONS, LIBRARY_REDUCTIONS, REDUCERS
from cascade.scopes import signatures
from cascade.verify import findings
from cascade.walk import fresh, walk
from cascade.wording import quote, suggest

__all__ = ["decode", "library_uses", "parse_cascade", "parse_program"]

MAX_TEXT = 16 * 2**20  # characters of one text
MAX_FOUND = 100  # mistakes that are reported at once


def parse_cascade(text: str, name: str = "<text>", pick: str | None = None) -> Cascade:
    """The cascade of that name in the text, or the last one."""
    cascades = parse_program(text, name)
    if pick is None:
        return cascades[-1]
    for cascade in cascades:
        if cascade.name == pick:
            return cascade
    help_ = suggest(pick, (cascade.name for cascade in cascades), "cascades there")
    raise ParseError(Diagnostic("C111", f"there is no cascade {quote(pick)} in {name}", help=help_))


def parse_program(text: str, name: str = "<text>") -> tuple[Cascade, ...]:
    """Every cascade of the text, each with the definitions that it uses; raises all mistakes as one error."""
    source = Source(name, text.removeprefix("\ufeff"))
    if len(text) > MAX_TEXT:
        message = f"{name} has {len(text)} characters, the limit is {MAX_TEXT}"
        raise ParseError(Diagnostic("C106", message, Span(source, 1, 1, 1, 2), "split the file"))
    texts, found = read_definitions(source)
    if texts is None:
        raise ParseError(ordered(found))
    program = build(texts, library_names())
    found += program.found
    names = [name for name in program.own if isinstance(program.definitions[name], Cascade)]
    cascades = [d for d in map(program.complete, names) if isinstance(d, Cascade)]
    if found:
        found += unsaid(cascades, found, program)
        raise ParseError(ordered(found))
    if not cascades:
        raise ParseError(no_cascade(source, program))
    return tuple(cascades)


def library_uses(names: Collection[str]) -> tuple[Definition, ...]:
    """The definitions of the library that have these names, and those that they use, callees first."""
    program = library()
    graph = program.graph
    closure = set(names).union(*(reachable(name, graph) for name in names))
    return tuple(program.complete(name) for name in callees_first({name: graph[name] for name in closure}))


@functools.cache
def library() -> Program:
    """The library, parsed when a name of it is first needed."""
    texts, found = read_definitions(library_source())
    program = build(texts or (), {})
    assert not found and not program.found, ParseError([*found, *program.found])
    return program


# --- one text --------------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class Program:
    """The definitions of a text and those it borrows from the library, by name, each without what it uses."""

    own: list[str] = field(default_factory=list)
    definitions: dict[str, Definition] = field(default_factory=dict)
    found: list[Diagnostic] = field(default_factory=list)
    doubtful: list[Span] = field(default_factory=list)  # what has a mistake already; see `Resolved`
    lost: list[Span] = field(default_factory=list)
    graph: dict[str, tuple[str, ...]] = field(default_factory=dict)
    done: dict[str, Definition] = field(default_factory=dict)

    def complete(self, name: str) -> Definition:
        """A definition with everything that it uses."""
        if name not in self.done:
            for other in callees_first({n: self.graph[n] for n in (*reachable(name, self.graph), name)}):
                self.done.setdefault(other, self.with_uses(other))
        return self.done[name]

    def with_uses(self, name: str) -> Definition:
        found = self.definitions[name]
        if isinstance(found, Function):
            return found
        order = callees_first({n: self.graph[n] for n in reachable(name, self.graph)})
        return replace(found, uses=tuple(self.done.get(n, self.definitions[n]) for n in order))


def build(texts: Iterable[DefinitionText], borrowed: dict[str, bool]) -> Program:
    """The program of these definitions; of `borrowed`, the library, it takes what it needs."""
    program = Program()
    unique = list(once(texts, program))
    callees = {name: Callee(name, cascade) for name, cascade in borrowed.items()}
    taken = set(callees) | {key(text) for text in unique}
    for text in unique:
        name = key(text)
        # a `def` may take the name of a built-in function; in the IR it has another, so that text is read alike by all
        own = fresh(f"{name}_def", taken) if isinstance(text, FunctionText) and name in FUNCTIONS else name
        callees[name] = Callee(own, isinstance(text, CascadeText))
    for text in unique:
        own = callees[key(text)].name
        program.own.append(own)
        resolved = resolve(text, own, callees)
        program.definitions[own] = resolved.definition
        program.graph[own] = needs(resolved.definition)
        program.found += resolved.found
        program.doubtful += resolved.doubtful
        program.lost += resolved.lost
    borrow(program, borrowed)
    sum_up(program)
    return program


def key(text: DefinitionText) -> str:
    """What a definition is known by.

    A cascade that is named like a reducer, or like the function along ranks that it uses, stands apart: the name means
    the reducer or the function, and no other cascade can call this one.
    """
    if not isinstance(text, CascadeText):
        return str(text.name)
    apart = text.name in (*REDUCERS, *LIBRARY_REDUCTIONS)
    if not apart and text.name in library_names():
        nodes = (node for equation in text.body if equation.expr is not None for node in walk(equation.expr))
        apart = any(isinstance(node, Use) and node.function == text.name and node.ranks for node in nodes)
    return f"cascade {text.name}" if apart else str(text.name)


def resolve(text: DefinitionText, name: str, callees: dict[str, Callee]) -> Resolved:
    """One definition under its name in the IR."""
    return resolve_function(text, name, callees) if isinstance(text, FunctionText) else resolve_cascade(text, callees)


def once(texts: Iterable[DefinitionText], program: Program) -> Iterator[DefinitionText]:
    """The definitions of different names; C204 for the others."""
    first: dict[str, DefinitionText] = {}
    for text in texts:
        before = first.setdefault(key(text), text)
        if before is text:
            yield text
            continue
        note = Note(f"{quote(text.name)} is first defined here", before.name.span)
        help_ = "a name is defined once: rename one of the two"
        program.found.append(Diagnostic("C204", f"{quote(text.name)} is defined twice", text.name.span, help_, (note,)))


def borrow(program: Program, borrowed: dict[str, bool]) -> None:
    """Adds what the text needs of the library; C112 where a definition of its own stands in the way."""
    wanted = {name for others in program.graph.values() for name in others if name not in program.definitions}
    if wanted.isdisjoint(borrowed):
        return
    shelf = library()
    for name in sorted(wanted & shelf.definitions.keys()):
        for other in (name, *sorted(reachable(name, shelf.graph))):
            theirs = shelf.definitions[other]
            mine = program.definitions.setdefault(other, theirs)
            program.graph.setdefault(other, shelf.graph[other])
            if mine != theirs:
                message = f"the library's {quote(name)} uses its {quote(other)}, which is defined otherwise here"
                help_ = f"rename {other}, or define {name} as well"
                program.found.append(Diagnostic("C112", message, mine.span, help_))


def sum_up(program: Program) -> None:
    """Writes the implicit sums of the text's own cascades."""
    known = signatures([program.definitions[name] for name in callees_first(program.graph)])
    for name in program.own:
        cascade = program.definitions[name]
        if isinstance(cascade, Cascade):
            body: list[Stmt] = []
            for stmt in cascade.body:
                summed = contract(stmt, known)
                if isinstance(summed, Diagnostic):
                    program.found.append(summed)
                    program.doubtful += [stmt.span] if stmt.span else []
                body.append(stmt if isinstance(summed, Diagnostic) else summed)
            program.definitions[name] = replace(cascade, body=tuple(body))


# --- mistakes --------------------------------------------------------------------------------------------------------


def unsaid(cascades: Iterable[Cascade], found: list[Diagnostic], program: Program) -> list[Diagnostic]:
    """What the verifier finds where no mistake is known yet; names that are not defined it may find anywhere."""
    lost, doubtful = lines_of(program.lost), lines_of(program.doubtful)
    said = {(d.code, d.span.line, d.span.column) for d in found if d.span}
    new: list[Diagnostic] = []
    for cascade in cascades:
        for finding in findings(cascade):
            span = finding.span
            if span is None or (span.source, span.line) in lost:
                continue
            if (span.source, span.line) in doubtful and finding.code != "C203":
                continue
            if (finding.code, span.line, span.column) not in said:
                said.add((finding.code, span.line, span.column))
                new.append(finding)
    return new


def lines_of(spans: Iterable[Span]) -> set[tuple[Source, int]]:
    """The lines that some spans touch."""
    return {(span.source, line) for span in spans for line in range(span.line, span.end_line + 1)}


def ordered(found: list[Diagnostic]) -> list[Diagnostic]:
    """The mistakes in the order of the text, no more than a person reads."""
    return sorted(found, key=lambda d: (d.span.line, d.span.column) if d.span else (0, 0))[:MAX_FOUND]


def no_cascade(source: Source, program: Program) -> Diagnostic:
    """C103: the text defines nothing that could run."""
    only = f": there are only definitions, {quoted_list(program.own)}" if program.own else ""
    return Diagnostic("C103", f"no cascade found{only}", Span(source, 1, 1, 1, 1), f"write one, such as\n{EXAMPLE}")
