"""One cascade as the rules of the verifier see it: what they share, computed once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from cascade.errors import Diagnostic, Span
from cascade.inference import Inference, arities, declarations, infer
from cascade.ir import Call, Cascade, Definition, Einsum, Expr, Fold, Read, Stmt, Target
from cascade.scopes import Facts, Signature, facts, signatures, visible
from cascade.walk import fold_parts, map_expressions, reads, rewrite, targets
from cascade.wording import pinpoint


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """A cascade, the definitions that it may use, and the facts about its statements."""

    cascade: Cascade
    definitions: Mapping[str, Definition]
    signatures: Mapping[str, Signature]
    facts: tuple[Facts, ...]
    folded: tuple[Facts, ...]  # the expressions of folds, as if statements defined their targets
    inference: Inference
    arity: Mapping[str, int]  # ranks of every tensor, those of unknown callees aside
    places: Mapping[str, Span | None]  # where every tensor is first declared or defined
    owner: Mapping[str, int]  # the number of the statement that defines a tensor
    needs: tuple[tuple[int, ...], ...]  # the statements that each statement reads
    targets: Mapping[str, Target]  # by tensor
    symbols: Mapping[str, Span | None]  # where every shape symbol is first declared


Rule: TypeAlias = Callable[[Program], Iterator[Diagnostic]]
"""A named rule: the findings of one kind, in program order."""


def program_of(cascade: Cascade, around: Mapping[str, Definition]) -> Program:
    """The cascade and everything the rules need to know about it."""
    definitions = visible(cascade, around)
    known = signatures(definitions.values())
    all_facts = tuple(facts(stmt, known) for stmt in cascade.body)
    places: dict[str, Span | None] = {}
    params = {param.name for param in cascade.params}  # one that is defined again, by mistake, is read as declared
    owner: dict[str, int] = {}
    by_name: dict[str, Target] = {}
    for param in cascade.params:
        places.setdefault(param.name, pinpoint(param.span, param.name))
    for number, stmt in enumerate(cascade.body):
        for target in targets(stmt):
            places.setdefault(target.name, target.span)
            if target.name not in params:
                owner.setdefault(target.name, number)
                by_name.setdefault(target.name, target)
        for name in stmt.targets if isinstance(stmt, Call) else ():
            places.setdefault(name, pinpoint(stmt.span, name))
            if name not in params:
                owner.setdefault(name, number)
    symbols: dict[str, Span | None] = {}
    for decl in declarations(cascade):
        for size in decl.shape:
            if isinstance(size, str):
                symbols.setdefault(size, decl.span)
    for given in cascade.given:
        if isinstance(given.size, str):
            symbols.setdefault(given.size, given.span)
    folded = tuple(facts(stmt, known) for stmt in _fold_statements(cascade))
    found = infer(cascade, definitions, all_facts)
    if folded:  # they must agree with the extents; they do not give any
        whole = [facts(stmt, known) for stmt in _whole_states(folded, by_name)]
        found = replace(found, conflicts=infer(cascade, definitions, (*all_facts, *whole)).conflicts)
    arity = arities(cascade, definitions)
    needs = tuple(tuple(owner[name] for name in reads(stmt) if name in owner) for stmt in cascade.body)
    return Program(cascade, definitions, known, all_facts, folded, found, arity, places, owner, needs, by_name, symbols)


def _fold_statements(cascade: Cascade) -> Iterator[Einsum]:
    for directive in cascade.schedule:
        for part in fold_parts(directive) if isinstance(directive, Fold) else ():
            if part.expr is not None:
                yield Einsum(part.target, part.expr, span=part.span)


def _whole_states(folded: Sequence[Facts], defined: Mapping[str, Target]) -> Iterator[Stmt]:
    """The expressions of folds with partial states read as whole ones, whose shape they have."""

    def whole(node: Expr) -> Expr:
        return replace(node, tensor=state_of(node.tensor)) if isinstance(node, Read) else node

    for fact in folded:
        target = targets(fact.stmt)[0]
        if target.name in defined and target.ranks == defined[target.name].ranks:
            yield map_expressions(fact.stmt, lambda expr: rewrite(expr, whole))


def state_of(name: str) -> str:
    """The state that a name means: itself, and `R` for `R'`."""
    return name.removesuffix("'")


def strongly_connected(edges: Sequence[Sequence[int]]) -> list[list[int]]:
    """The classes of nodes that reach each other, without recursion (Kosaraju); `edges[i]` are the successors of i."""
    back: list[list[int]] = [[] for _ in edges]
    for node, after in enumerate(edges):
        for other in after:
            back[other].append(node)
    finished: list[int] = []
    seen = [False] * len(edges)
    for root in range(len(edges)):
        work = [(root, iter(edges[root]))] if not seen[root] else []
        seen[root] = True
        while work:
            node, rest = work[-1]
            step = next((other for other in rest if not seen[other]), None)
            if step is None:
                finished.append(work.pop()[0])
            else:
                seen[step] = True
                work.append((step, iter(edges[step])))
    classes: list[list[int]] = []
    taken = [False] * len(edges)
    for root in reversed(finished):
        if taken[root]:
            continue
        members, todo = [], [root]
        taken[root] = True
        while todo:
            members.append(todo.pop())
            fresh = [other for other in back[members[-1]] if not taken[other]]
            for other in fresh:
                taken[other] = True
            todo.extend(dict.fromkeys(fresh))
        classes.append(sorted(members))
    return classes


def cyclic(members: Sequence[int], edges: Sequence[Sequence[int]]) -> bool:
    """Whether a class is a cycle: more than one node, or one that follows itself."""
    return len(members) > 1 or members[0] in edges[members[0]]
