"""Which states are gauges: the results do not change when all that is measured against one is moved to another frame.

The largest score of a softmax is one: any other number would do, a stale maximum or one per tile, and its gradient is
zero. What is saved for later is then only what does not depend on the frame, such as R + log(D).

Tested on scalars: the state is moved by its own merges, as if a part had another frame, and everything that the results
need behind the trip is computed from both.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from cascade.ir import Cascade, Einsum, Expr, Extent, Fold, Rank, Read, Reduce, Stmt
from cascade.passes.scalars import Scalar, evaluate
from cascade.walk import defines, walk

SHIFTS = (0.75, -1.25, 2.0)
CLOSE = 1e-9


def gauges(cascade: Cascade, fold: Fold) -> tuple[str, ...]:
    """The states of a fold that others are measured against, and that no result depends on."""
    own = {merge.target.name: merge.expr for merge in fold.merge}
    frames = {
        node.tensor[:-1]
        for name, expr in own.items()
        for node in walk(expr)
        if isinstance(node, Read) and node.tensor.endswith("'") and node.tensor[:-1] != name
    }
    owner: dict[str, Stmt] = {name: stmt for stmt in cascade.body for name in defines(stmt)}
    extremes = [name for name in fold.state if name in frames and _is_extreme(owner[name])]
    return tuple(name for name in extremes if all(_same(cascade, fold, owner, name, shift) for shift in SHIFTS))


def _is_extreme(stmt: Stmt) -> bool:
    return isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) and stmt.expr.reducer in ("max", "min")


def _same(cascade: Cascade, fold: Fold, owner: dict[str, Stmt], name: str, shift: float) -> bool:
    rng = random.Random(5)
    before = {state: rng.uniform(0.5, 1.5) for state in fold.state}
    outside: dict[str, Scalar] = {}
    after = {name: before[name] + shift}
    for state in fold.state:
        if state != name:
            merge = next(m.expr for m in fold.merge if m.target.name == state)
            after[state] = _Values(owner, after, before, outside, rng).of(merge)
    results = [r.name for r in cascade.results]
    one, other = ([_Values(owner, s, {}, outside, rng).tensor(r) for r in results] for s in (before, after))
    return all(_close(a, b) for a, b in zip(one, other, strict=True))


def _close(a: Scalar, b: Scalar) -> bool:
    return a is not None and b is not None and math.isclose(a, b, rel_tol=CLOSE, abs_tol=CLOSE)


@dataclass(slots=True, eq=False)
class _Values:
    """Tensors as numbers, from the states of a fold; what does not depend on them is drawn once."""

    owner: dict[str, Stmt]
    state: dict[str, Scalar]
    part: dict[str, Scalar]
    outside: dict[str, Scalar]
    rng: random.Random
    known: dict[str, Scalar] = field(default_factory=dict)

    def of(self, expr: Expr) -> Scalar:
        """The value of an expression."""

        def leaf(node: Expr) -> Scalar:
            match node:
                case Read() if node.tensor.endswith("'"):
                    return self.part[node.tensor[:-1]]
                case Read():
                    return self.tensor(node.tensor)
                case Reduce():
                    return self.of(node.body)
                case Extent():
                    return 6.0
                case Rank():
                    return 1.0
                case _:
                    return None

        return evaluate(expr, leaf)

    def tensor(self, name: str) -> Scalar:
        """The value of a tensor: a state, computed from states, or drawn."""
        if name in self.state:
            return self.state[name]
        if name not in self.known:
            stmt = self.owner.get(name)
            if isinstance(stmt, Einsum) and not stmt.inits and self._depends(stmt):
                self.known[name] = self.of(stmt.expr)
            else:
                self.known[name] = self.outside.setdefault(name, self.rng.uniform(0.5, 1.5))
        return self.known[name]

    def _depends(self, stmt: Stmt) -> bool:
        """Whether a statement needs a state."""
        todo, seen = [stmt], set()
        while todo:
            reads = [n.tensor for e in _right(todo.pop()) for n in walk(e) if isinstance(n, Read)]
            if any(name in self.state for name in reads):
                return True
            todo += [self.owner[name] for name in reads if name in self.owner and name not in seen]
            seen.update(reads)
        return False


def _right(stmt: Stmt) -> tuple[Expr, ...]:
    return (stmt.expr,) if isinstance(stmt, Einsum) else ()
