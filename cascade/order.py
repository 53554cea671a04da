"""In which order statements can run: dependency order, cycles along an iterative rank, and fused groups.

Shared by the interpreter and the passes. The verifier does not use it: it has a reachability of its own, so that a
mistake here cannot hide itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, assert_never

from cascade.errors import Diagnostic, UnsupportedError, quoted_list
from cascade.ir import Call, Einsum, Expr, Fold, Fuse, Rank, Read, Stmt, TopK
from cascade.walk import defines, reads, targets, walk


Group: TypeAlias = Fuse | Fold
"""What runs as one trip over a rank."""


def members(group: Group) -> tuple[str, ...]:
    """The names of the statements that run block by block."""
    return group.update if isinstance(group, Fold) else group.statements


@dataclass(frozen=True, slots=True)
class Unit:
    """What runs as one: a statement, the statements of a cycle, or those of a fused group."""

    statements: tuple[Stmt, ...]
    group: Group | None = None
    cyclic: bool = False


def units(statements: Sequence[Stmt], fused: tuple[Group, ...]) -> list[Unit]:
    """The statements as single ones, cycles and fused groups, in an order in which each finds what it reads."""
    owner: dict[str, int] = {name: i for i, stmt in enumerate(statements) for name in defines(stmt)}
    inside: dict[int, Group] = {}
    for group in fused:
        for name in members(group):
            if name in owner:
                inside.setdefault(owner[name], group)
    edges = [[owner[name] for name in reads(stmt) if name in owner] for stmt in statements]
    first: dict[int, int] = {}
    for index, group in inside.items():  # a group is one node: tie its members together
        leader = first.setdefault(id(group), index)
        edges[leader].append(index)
        edges[index].append(leader)
    found = []
    for component in components(edges):
        groups = {id(inside[i]): inside[i] for i in component if i in inside}
        together = tuple(statements[i] for i in component)
        if len(groups) > 1 or (groups and any(i not in inside for i in component)):
            raise _no_order(groups, together)
        cyclic = not groups and (len(component) > 1 or component[0] in edges[component[0]])
        found.append(Unit(together, next(iter(groups.values()), None), cyclic))
    return found


def _no_order(groups: Mapping[int, Group], together: Sequence[Stmt]) -> UnsupportedError:
    group = next(iter(groups.values()))
    others = [name for stmt in together for name in defines(stmt) if name not in members(group)]
    message = f"the group over '{group.rank}' needs {quoted_list(others)}, and {quoted_list(others)} needs the group"
    return UnsupportedError(Diagnostic("C501", message, group.span, help="put them into the group, or split the group"))


def components(edges: Sequence[Sequence[int]]) -> list[list[int]]:
    """Strongly connected components, dependencies first, members in program order (Tarjan, without recursion)."""
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    on_stack: set[int] = set()
    found: list[list[int]] = []
    for root in range(len(edges)):
        if root in order:
            continue
        work = [(root, iter(edges[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, rest = work[-1]
            for other in rest:
                if other not in order:
                    order[other] = low[other] = len(order)
                    stack.append(other)
                    on_stack.add(other)
                    work.append((other, iter(edges[other])))
                    break
                if other in on_stack:
                    low[node] = min(low[node], order[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    at = stack.index(node)
                    found.append(sorted(stack[at:]))
                    on_stack.difference_update(stack[at:])
                    del stack[at:]
    return found


def iterative_rank(statements: Sequence[Stmt]) -> str:
    """The rank along which a cycle of statements steps: the one their initial values name."""
    return next(init.rank for stmt in statements if isinstance(stmt, Einsum) for init in stmt.inits)


def order_within_step(statements: Sequence[Stmt], rank: str) -> list[Stmt]:
    """The statements of a cycle so that each finds what it reads at the current coordinate."""
    owner = {name: i for i, stmt in enumerate(statements) for name in defines(stmt)}
    ranks = {target.name: target.ranks for stmt in statements for target in targets(stmt)}
    edges: list[list[int]] = [[] for _ in statements]
    for i, stmt in enumerate(statements):
        for node in (n for e in _right(stmt) for n in walk(e) if isinstance(n, Read) and n.tensor in owner):
            here = node.index[ranks[node.tensor].index(rank)] if rank in ranks[node.tensor] else None
            if here is None or (isinstance(here, Rank) and here.name == rank):
                edges[i].append(owner[node.tensor])
    return [statements[i] for component in components(edges) for i in component]


def _right(stmt: Stmt) -> tuple[Expr, ...]:
    """The expressions of a statement that run at every step, its initial values left out."""
    match stmt:
        case Einsum():
            return (stmt.expr,) if stmt.where is None else (stmt.expr, stmt.where)
        case TopK():
            return (stmt.body,) if stmt.where is None else (stmt.body, stmt.where)
        case Call():
            return ()
        case _:
            assert_never(stmt)
