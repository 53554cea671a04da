"""Which definitions travel with a cascade, and in what order: callees first, otherwise by name.

The order depends on the definitions alone, not on where a file has them or which statement comes first, so that text,
Python and every pass agree on it.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping

from cascade.ir import Call, Definition, Function, Use
from cascade.walk import expressions, walk


def needs(definition: Definition) -> tuple[str, ...]:
    """The names of the definitions that a definition uses itself."""
    if isinstance(definition, Function):
        return tuple(dict.fromkeys(node.function for node in walk(definition.body) if isinstance(node, Use)))
    found: dict[str, None] = {}
    for stmt in definition.body:
        if isinstance(stmt, Call):
            found.setdefault(stmt.callee)
        for expr in expressions(stmt):
            found.update((node.function, None) for node in walk(expr) if isinstance(node, Use))
    return tuple(found)


def ordered_uses(definitions: Iterable[Definition]) -> tuple[Definition, ...]:
    """The definitions in the order in which a cascade carries them."""
    known = {definition.name: definition for definition in definitions}
    return tuple(known[name] for name in callees_first({name: needs(known[name]) for name in known}))


def callees_first(graph: Mapping[str, Iterable[str]]) -> list[str]:
    """The names, each after those it needs, otherwise by name; those that need themselves come last."""
    waiting = {name: {other for other in others if other in graph} for name, others in graph.items()}
    needed_by: dict[str, list[str]] = {name: [] for name in graph}
    for name, others in waiting.items():
        for other in others:
            needed_by[other].append(name)
    ready = sorted(name for name, others in waiting.items() if not others)
    order: list[str] = []
    while ready:
        name = heapq.heappop(ready)
        order.append(name)
        for caller in needed_by[name]:
            waiting[caller].discard(name)
            if not waiting[caller]:
                heapq.heappush(ready, caller)
    return order + sorted(graph.keys() - set(order))


def reachable(name: str, graph: Mapping[str, Iterable[str]]) -> set[str]:
    """The names that a name needs, directly or not."""
    found: set[str] = set()
    todo = [name]
    while todo:
        new = [other for other in graph[todo.pop()] if other in graph and other not in found]
        found.update(new)
        todo += new
    return found
