"""Rules about statements whose rows run in the order of an index: every row by itself, its value known.

On purpose not built on what the pass uses that writes such groups: they would be wrong together.
"""

from __future__ import annotations

from collections.abc import Iterator

from cascade.errors import Diagnostic
from cascade.ir import Einsum, Expr, GroupBy, Rank, Read
from cascade.scopes import Facts
from cascade.verify.program import Program
from cascade.verify.schedule import not_canonical
from cascade.walk import children, defines, expressions, walk
from cascade.wording import pinpoint, quote


def check_rows(program: Program) -> Iterator[Diagnostic]:
    """C253: the statements of a `group ... by` can go through their rows in any order, those of one value together."""
    for item in program.cascade.schedule:
        if isinstance(item, GroupBy) and program.arity.get(item.key.tensor) is not None:
            yield from _key(item, program)
            for name in item.statements:
                fact = program.facts[program.owner[name]] if name in program.owner else None
                why = "" if fact is None else _refused(item, fact, program)
                if why:
                    yield Diagnostic("C253", f"{quote(name)} {why}", pinpoint(item.span, name), HINT)


HINT = "leave it out of the group: it runs as it is written"


def _key(item: GroupBy, program: Program) -> Iterator[Diagnostic]:
    """The index is a tensor read at different ranks."""
    key = item.key
    if program.arity[key.tensor] != len(key.index):
        message = f"{quote(key.tensor)} is read at {len(key.index)} of its {program.arity[key.tensor]} ranks"
        yield Diagnostic("C253", message, key.span, "write it as it is read")
    elif len(set(key.index)) < len(key.index):
        yield Diagnostic("C253", f"a rank stands twice in {quote(key.tensor)}", key.span, "write each rank once")


def _refused(item: GroupBy, fact: Facts, program: Program) -> str:
    """Why a statement cannot go through its rows in the order of the index; "" where it can."""
    stmt, ranks = fact.stmt, {index.name for index in item.key.index if isinstance(index, Rank)}
    if why := not_canonical(stmt):
        return why
    if not isinstance(stmt, Einsum) or stmt.inits or stmt.where is not None:
        return "is no plain equation: it chooses, filters or steps along a rank"
    if missing := sorted(ranks - set(stmt.target.ranks)):
        return f"does not have the rank {quote(missing[0])} of the index"
    nodes = [node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)]
    known = any(item.key in node.index or node.tensor in item.statements for node in nodes)
    if not known or set(defines(stmt)) & {item.key.tensor}:
        return f"neither indexes by {quote(item.key.tensor)} nor reads what does"
    for node in nodes:
        if node == item.key:
            continue
        for position, index in enumerate(node.index):
            if index == item.key and not _of_extent(node, position, item, program):
                return f"indexes {quote(node.tensor)} where its extent is not {item.size}"
            if index != item.key and not isinstance(index, Rank) and _mentions(index, ranks):
                return f"reads {quote(node.tensor)} at coordinates that it computes of {quote(sorted(ranks)[0])}"
    return ""


def _of_extent(read: Read, position: int, item: GroupBy, program: Program) -> bool:
    """Whether the dimension that the index goes to has the stated extent."""
    shape = program.inference.shapes.tensors.get(read.tensor)
    return shape is None or position >= len(shape) or shape[position] == item.size


def _mentions(expr: Expr, ranks: set[str]) -> bool:
    return (isinstance(expr, Rank) and expr.name in ranks) or any(_mentions(child, ranks) for child in children(expr))
