"""Rules about the graph of statements: no cycle but through earlier coordinates of one rank, with first values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cascade.errors import Diagnostic, Note, quoted_list
from cascade.ir import Apply, Call, Const, Einsum, Expr, Init, Rank, Read
from cascade.scopes import Binder
from cascade.verify.program import Program, cyclic, strongly_connected
from cascade.walk import defines, targets
from cascade.wording import pinpoint, quote


@dataclass(frozen=True, slots=True, eq=False)
class Edge:
    """One statement reads what another defines: where, inside of which reductions, and whether for a first value."""

    reader: int
    producer: int
    read: Read | None = None  # None for an argument of a call
    binder: Binder | None = None
    first_value: bool = False


def edges_of(program: Program) -> list[Edge]:
    """Every read of a tensor that a statement defines."""
    found: list[Edge] = []
    for number, fact in enumerate(program.facts):
        if isinstance(fact.stmt, Call):
            names = [name for name in fact.stmt.args if name in program.owner]
            found += [Edge(number, program.owner[name]) for name in names]
        for scan in fact.scans():
            first_value = any(scan is init for init in fact.inits)
            for read, binder in scan.reads:
                if read.tensor in program.owner:
                    found.append(Edge(number, program.owner[read.tensor], read, binder, first_value))
    return found


def offset(index: Expr) -> tuple[str, int] | None:
    """`t-2` as (t, -2), `t` as (t, 0); None for an index of another form."""
    total = 0
    while isinstance(index, Apply) and index.op in ("add", "sub") and len(index.args) == 2:
        left, right = index.args
        if isinstance(left, Const) and index.op == "add":
            left, right = right, left
        if not isinstance(right, Const) or type(right.value) is not int:
            return None
        total += right.value if index.op == "add" else -right.value
        index = left
    return (index.name, total) if isinstance(index, Rank) else None


def lag(edge: Edge, rank: str, program: Program) -> int | None:
    """How many coordinates of the rank a read lies behind its statement; None where that is not a fixed number."""
    read = edge.read
    if read is None or edge.first_value or (edge.binder is not None and rank in edge.binder.sees):
        return None
    left = program.targets.get(read.tensor)
    here = targets(program.facts[edge.reader].stmt)
    if left is None or rank not in left.ranks or len(left.ranks) != len(read.index) or rank not in here[0].ranks:
        return None
    found = offset(read.index[left.ranks.index(rank)])
    return -found[1] if found is not None and found[0] == rank else None


def check_cycles(program: Program) -> Iterator[Diagnostic]:
    """C225 to C229: statements that need each other step along one rank, from first values."""
    by_reader: list[list[Edge]] = [[] for _ in program.facts]
    for edge in edges_of(program):
        by_reader[edge.reader].append(edge)
    after = [[edge.producer for edge in edges] for edges in by_reader]
    stepping: set[int] = set()
    for members in strongly_connected(after):
        if cyclic(members, after):
            stepping.update(members)
            inside = set(members)
            within = [edge for reader in members for edge in by_reader[reader] if edge.producer in inside]
            yield from _cycle(members, within, program)
    for number, fact in enumerate(program.facts):
        if isinstance(fact.stmt, Einsum) and fact.stmt.inits:
            yield from _first_values(fact.stmt)
            if number not in stepping:
                yield _unused(fact.stmt, fact.stmt.inits[0])


def _cycle(members: Sequence[int], within: list[Edge], program: Program) -> Iterator[Diagnostic]:
    stmts = [program.facts[i].stmt for i in members]
    ranks = [target.ranks for stmt in stmts for target in targets(stmt)] if not any(
        isinstance(stmt, Call) for stmt in stmts
    ) else [()]  # fmt: skip
    common = [rank for rank in ranks[0] if all(rank in other for other in ranks)]
    given = [init.rank for stmt in stmts if isinstance(stmt, Einsum) for init in stmt.inits]
    steps = [rank for rank in dict.fromkeys((*given, *common)) if rank in common and _steps(rank, within, program)]
    if not steps:
        yield _no_step(members, within, common, program)
        return
    yield from _check_first_values(members, steps[0], within, program)


def _steps(rank: str, within: list[Edge], program: Program) -> bool:
    """Whether the statements can be computed coordinate by coordinate along the rank."""
    lags = [lag(edge, rank, program) for edge in within]
    if any(found is None or found < 0 for found in lags):
        return False
    number = {node: i for i, node in enumerate(sorted({edge.reader for edge in within}))}
    now: list[list[int]] = [[] for _ in number]
    for edge, found in zip(within, lags, strict=True):
        if found == 0:
            now[number[edge.reader]].append(number[edge.producer])
    return not any(cyclic(part, now) for part in strongly_connected(now))


def _no_step(members: Sequence[int], within: list[Edge], common: list[str], program: Program) -> Diagnostic:
    """The finding for a cycle that is no recurrence, by what comes closest to being one."""
    earlier: dict[str, Edge] = {}
    for edge in within:
        lags = {rank: lag(edge, rank, program) for rank in common}
        place = edge.read.span if edge.read else None
        name = quote(edge.read.tensor) if edge.read else ""
        if edge.first_value:
            hint = "it may read tensors that do not depend on this one"
            return Diagnostic("C228", f"a first value depends on {name}, which it is to start", place, hint)
        late = next((rank for rank, found in lags.items() if found is not None and found < 0), None)
        if late is not None and not any(found for found in lags.values() if found is not None and found > 0):
            message = f"{name} is read at a later coordinate of {quote(late)} than it is being computed at"
            hint = f"a recurrence reads what comes before: {late}-1; to go backwards, reverse the rank of what it reads"
            return Diagnostic("C229", message, place, hint)
        if edge.read and not any(lags.values()) and _is_computed(edge.read):
            message = f"{name} is read at a coordinate that is not a fixed number of steps back"
            return Diagnostic("C229", message, place, "a recurrence reads t-1, t-2, ... of one rank")
        for rank, found in lags.items():
            if found:
                earlier.setdefault(rank, edge)
    if len(earlier) > 1:
        first, second = list(earlier.items())[:2]
        message = f"the recurrence steps along {quote(first[0])} and along {quote(second[0])}"
        note = Note(f"a step along {quote(first[0])}", first[1].read.span if first[1].read else None)
        hint = "a recurrence has one iterative rank: write one scan after the other"
        place = second[1].read.span if second[1].read else None
        return Diagnostic("C229", message, place, hint, (note,) if note.span else ())
    return _plain_cycle(members, within, program)


def _is_computed(read: Read) -> bool:
    return any(not isinstance(index, Rank) for index in read.index)


def _plain_cycle(members: Sequence[int], within: list[Edge], program: Program) -> Diagnostic:
    path = _path(members[0], within)
    names = [defines(program.facts[i].stmt)[0] for i in path]
    if len(path) == 1:
        message = f"{quote(names[0])} is defined by itself"
    else:
        message = (
            f"these statements need each other: {' -> '.join((*names[:12], *(['...'] if path[12:] else [names[0]])))}"
        )
    stmt = program.facts[path[0]].stmt
    place = next((edge.read.span for edge in within if edge.reader == path[0] and edge.read), None)
    spans = [(name, program.places.get(name)) for name in names[1:5]]
    notes = tuple(Note(f"{quote(name)} is defined here", span) for name, span in spans if span)
    hint = "break the cycle, or step along a rank: H[t] = ... H[t-1] ... init H[-1] = 0"
    return Diagnostic("C225", message, place or stmt.span, hint, notes)


def _path(start: int, within: list[Edge]) -> list[int]:
    """The statements of a shortest cycle through `start`, each reading the next."""
    after: dict[int, list[int]] = {}
    for edge in within:
        after.setdefault(edge.reader, []).append(edge.producer)
    before: dict[int, int] = {}
    todo = [start]
    for node in todo:
        for other in after.get(node, ()):
            if other == start:
                path = [node]
                while path[-1] != start:
                    path.append(before[path[-1]])
                return path[::-1]
            if other not in before:
                before[other] = node
                todo.append(other)
    return [start]


def _check_first_values(
    members: Sequence[int], rank: str, within: list[Edge], program: Program
) -> Iterator[Diagnostic]:
    """C226 to C228 for a recurrence along a rank: what is read at an earlier coordinate has values to start from."""
    deepest: dict[str, tuple[int, Edge]] = {}
    for edge in within:
        found = lag(edge, rank, program)
        if edge.read is not None and found and found > deepest.get(edge.read.tensor, (0, edge))[0]:
            deepest[edge.read.tensor] = found, edge
    for number in members:
        stmt = program.facts[number].stmt
        inits = stmt.inits if isinstance(stmt, Einsum) else ()
        astray = [init for init in inits if init.rank != rank]
        for init in astray:
            message = f"a first value along {quote(init.rank)}, but the recurrence steps along {quote(rank)}"
            yield Diagnostic("C228", message, init.span, f"give it at {rank} = -1")
        for name in defines(stmt) if not astray else ():
            if name in deepest:
                yield from _missing(name, rank, inits, *deepest[name], program)
        if inits and not any(name in deepest for name in defines(stmt)):
            assert isinstance(stmt, Einsum)
            yield _unused(stmt, inits[0])


def _missing(
    name: str, rank: str, inits: tuple[Init, ...], back: int, edge: Edge, program: Program
) -> Iterator[Diagnostic]:
    given = {init.at for init in inits if init.rank == rank}
    wanted = [at for at in range(-1, -min(back, 1000) - 1, -1) if at not in given]
    if not wanted or edge.read is None:
        return
    ranks = program.targets[name].ranks

    def at(coordinate: int) -> str:
        return f"{name}[{','.join(str(coordinate) if other == rank else other for other in ranks)}]"

    message = f"{quote(name)} is read at {rank}-{back} and has no first value {at(wanted[0])}"
    listed = ", ".join(f"{at(coordinate)} = 0" for coordinate in range(-1, max(-back, -3) - 1, -1))
    yield Diagnostic("C226", message, edge.read.span, f"give it behind the equation: init {listed}")


def _unused(stmt: Einsum, init: Init) -> Diagnostic:
    name = stmt.target.name
    message = f"{quote(name)} has a first value and reads no earlier coordinate of itself"
    index = ",".join(f"{rank}-1" if rank == init.rank else rank for rank in stmt.target.ranks)
    hint = f"drop the init; where others read it at an earlier coordinate, write {name}[{index}] ?? 0"
    return Diagnostic("C227", message, init.span, hint)


def _first_values(stmt: Einsum) -> Iterator[Diagnostic]:
    """C228: first values stand at -1, -2, ... of one rank of the left side, each once."""
    name, ranks = stmt.target.name, stmt.target.ranks
    seen: set[int] = set()
    for init in stmt.inits:
        if init.rank not in ranks:
            hint = f"ranks of {name}: {quoted_list(ranks)}" if ranks else f"{quote(name)} has no ranks"
            message = f"{quote(init.rank)} is not a rank of {quote(name)}"
            yield Diagnostic("C228", message, pinpoint(init.span, init.rank), hint)
        elif init.at >= 0 or init.at in seen:
            what = "is given twice" if init.at in seen else "is not before the first coordinate"
            message = f"the first value of {quote(name)} at {init.at} {what}"
            yield Diagnostic("C228", message, init.span, "first values stand at -1, -2, ..., each once")
        seen.add(init.at)
