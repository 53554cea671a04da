"""The graph of a cascade's Einsums, laid out by passes: a column is a trip, what stands in it can share one.

    S R | P D | O      three columns for softmax(Q K) V as written; one after lifting

A statement stands one column after what it reads where some rank is traversed anew between the two: where that rank's
pass number (`pass_count`) is higher for the reader. Within a column statements stand in the order in which they run.
Numbers are columns and rows; the page turns them into places.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cascade.ir import Cascade, Fold, Fuse, GroupBy, Stmt
from cascade.passes.pass_count import Passes, all_passes
from cascade.text import render_directive
from cascade.walk import defines, reads, targets


@dataclass(frozen=True, slots=True)
class Place:
    """Where a statement or an input stands: its column, its row in it; `kind` is input, value or result."""

    name: str
    kind: str
    column: int
    row: int
    ranks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Together:
    """Statements that run in one trip over a rank, and the directive that says so."""

    kind: str
    along: str
    statements: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Graph:
    """Places of all statements, what reads what, and what runs together."""

    places: tuple[Place, ...]
    edges: tuple[tuple[str, str], ...]
    together: tuple[Together, ...]


def graph(cascade: Cascade) -> Graph:
    """The graph of a canonical cascade, in the order of its statements."""
    counts = all_passes(cascade)
    owner = {name: stmt for stmt in cascade.body for name in defines(stmt)}
    columns = _columns(cascade, counts, owner)
    results = {result.name for result in cascade.results}
    used: dict[int, int] = {}
    places = []
    for param in cascade.params:
        places.append(Place(param.name, "input", 0, used.setdefault(0, 0), tuple(map(str, param.shape))))
        used[0] += 1
    for stmt in cascade.body:
        column = columns[defines(stmt)[0]]
        kind = "result" if results & set(defines(stmt)) else "value"
        ranks = targets(stmt)[0].ranks if targets(stmt) else ()
        places.append(Place(defines(stmt)[0], kind, column, used.setdefault(column, 0), ranks))
        used[column] += 1
    return Graph(tuple(places), _edges(cascade, owner), _together(cascade))


def _columns(cascade: Cascade, counts: Mapping[str, Passes], owner: Mapping[str, Stmt]) -> dict[str, int]:
    """The column of every name; inputs stand in column 0, the first trip is column 1."""
    found: dict[str, int] = {}
    for stmt in cascade.body:  # in dependency order, where it is canonical; what is read of itself does not count
        own = defines(stmt)[0]
        column = 1
        for read in reads(stmt):
            if read in found and owner.get(read) is not stmt:
                column = max(column, found[read] + _later(counts, read, own))
        for name in defines(stmt):
            found[name] = column
    return found


def _later(counts: Mapping[str, Passes], read: str, reader: str) -> bool:
    """Whether some rank is traversed anew between what is read and its reader."""
    pairs = ((passes.number.get(read, 0), passes.number.get(reader, 0)) for passes in counts.values())
    return any(0 < before < after for before, after in pairs)


def _edges(cascade: Cascade, owner: Mapping[str, Stmt]) -> tuple[tuple[str, str], ...]:
    """From what is read to what reads it, each by the first name of its statement."""
    known = {param.name: param.name for param in cascade.params}
    known |= {name: defines(stmt)[0] for name, stmt in owner.items()}
    found = {(known[read], defines(stmt)[0]): None for stmt in cascade.body for read in reads(stmt) if read in known}
    return tuple(found)


def _together(cascade: Cascade) -> tuple[Together, ...]:
    found = []
    for item in cascade.schedule:
        match item:
            case Fold():
                names = (*item.update, *item.finalize)
                found.append(Together("fold", item.rank, names, render_directive(item)))
            case Fuse():
                found.append(Together("fuse", item.rank, item.statements, render_directive(item)))
            case GroupBy():
                found.append(Together("group", item.key.tensor, item.statements, render_directive(item)))
            case _:
                pass
    return tuple(found)
