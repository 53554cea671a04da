"""Which states are gauges: the results do not change when all that is measured against one is moved to another frame.

The largest score of a softmax is one: any other number would do, a stale maximum or one per tile, and its gradient is
zero. What is saved for later is then only what does not depend on the frame, such as R + log(D).

Tested on scalars: the state is moved by its own merges, as if a part had another frame, and everything that the results
need behind the trip is computed from both.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from cascade.ir import Einsum, Expr, Extent, Fold, Rank, Read, Reduce, Stmt
from cascade.passes.scalars import Scalar, evaluate
from cascade.walk import defines, walk

SHIFTS = (0.75, -1.25, 2.0)
CLOSE = 1e-9
FAR = 50  # statements that a change is followed through

Readers: TypeAlias = Mapping[str, Sequence[Stmt]]
Numbers: TypeAlias = dict[str, Scalar]


def gauges(fold: Fold, readers: Readers, results: Collection[str]) -> tuple[str, ...]:
    """The states of a fold that others are measured against, and that no result depends on.

    `readers` are the statements of the cascade that read a tensor, in order, `results` what it gives.
    """
    frames = {
        node.tensor[:-1]
        for merge in fold.merge
        for node in walk(merge.expr)
        if isinstance(node, Read) and node.tensor.endswith("'") and node.tensor[:-1] != merge.target.name
    }
    names = [name for name in fold.state if name in frames]
    return tuple(name for name in names if all(_same(fold, readers, results, name, shift) for shift in SHIFTS))


def _same(fold: Fold, readers: Readers, results: Collection[str], name: str, shift: float) -> bool:
    """Whether moving one state, and by their merges those measured against it, changes no result.

    What comes out equal is not followed further; what is followed too far counts as changed.
    """
    draw = _Draw(random.Random(5))
    before: Numbers = {state: draw.number(state) for state in fold.state}
    after: Numbers = {**before, name: before[name] + shift}
    moved = _Numbers(after, before, draw)
    inside = [stmt for state in fold.state for stmt in readers.get(state, ()) if set(defines(stmt)) & set(fold.update)]
    for stmt in dict.fromkeys(inside):  # the frames, which merges read
        if isinstance(stmt, Einsum) and fold.rank not in stmt.target.ranks and not isinstance(stmt.expr, Reduce):
            before[stmt.target.name] = _Numbers(before, {}, draw).of(stmt.expr)
            after[stmt.target.name] = moved.of(stmt.expr)
    for merge in fold.merge:
        if merge.target.name != name:
            after[merge.target.name] = moved.of(merge.expr)
    changed = [state for state in before if not _close(before[state], after[state])]
    seen: set[str] = set()
    for tensor in changed:
        if tensor in results or len(changed) > FAR:
            return False
        for stmt in readers.get(tensor, ()):
            target = defines(stmt)[0]
            if target in fold.update or target in seen or not isinstance(stmt, Einsum):
                if not isinstance(stmt, Einsum):
                    return False
                continue
            seen.add(target)
            before[target] = _Numbers(before, {}, draw).of(stmt.expr)
            after[target] = moved.of(stmt.expr)
            if not _close(before[target], after[target]):
                changed.append(target)
    return True


def _close(a: Scalar, b: Scalar) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE)


@dataclass(slots=True, eq=False)
class _Draw:
    """A number for every tensor that does not depend on the fold."""

    rng: random.Random
    drawn: Numbers = field(default_factory=dict)

    def number(self, name: str) -> Scalar:
        """The number of a tensor, the same whenever it is asked for."""
        return self.drawn.setdefault(name, self.rng.uniform(0.5, 1.5))


@dataclass(slots=True, eq=False)
class _Numbers:
    """Expressions as numbers, every tensor being one."""

    known: Numbers
    part: Numbers
    draw: _Draw

    def of(self, expr: Expr) -> Scalar:
        """The value of an expression; a reduction is that of its operand."""

        def leaf(node: Expr) -> Scalar:
            match node:
                case Read() if node.tensor.endswith("'"):
                    return self.part[node.tensor[:-1]]
                case Read():
                    return self.known[node.tensor] if node.tensor in self.known else self.draw.number(node.tensor)
                case Reduce():
                    return self.of(node.body)
                case Extent():
                    return 6.0
                case Rank():
                    return 1.0
                case _:
                    return None

        return evaluate(expr, leaf)
