"""Exchanges that are one kernel with what is computed around them: which steps are then one task.

    reduce-scatter Z        compute M along t        all-gather M       -->      exchange M
    reduce-scatter Y, and in the next layer  compute N along t, all-gather N     one kernel at the seam of two layers

Rows that have come in can go through what is local to them and out again while others are still on their way in, so
both directions of the links are busy at once and what lies between them is never stored. This is R2 and R3 of
`passes/exchanges.py` read as a mode: no step changes, only which steps are one task. Such a kernel is told by what it
consists of: statements that run along the axes of the exchange, products none, all between the scatter and the gathers,
and no way from one to another of them through anything else.

Where a layer follows itself, a chain may cross from one copy to the next; its end then counts to the copy in which it
begins. That moves tasks in the cycle and changes neither what they need nor how long a cycle is.

    compute Y along f, reduce-scatter Y        -->      Y, its tiles stored to the devices that add them up

    all-gather M, compute J along f            -->      J, its tiles waiting for the shards of their rows

The other two (`stored`, `awaited`) are R4 in the grain of tiles. Stores out of a product reach less of the links than
copies do; a wave of tiles waits for all shards that it has rows of.

Sources: the fused all-reduce and norm of TokenWeave (arXiv 2505.11329), whose budget of thread blocks is a mode here;
stores out of a product are Flux (2406.06858).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cascade.backends.distributed.kernels import Layer, has_product, is_product
from cascade.ir import Rank
from cascade.passes.reach import Reach
from cascade.placed import Axes, Collective, Compute, Kind, Program
from cascade.walk import defines, targets

Chain = Mapping[int, int]
"""Tasks that are one kernel, each with how many copies of the layer after the scatter it stands."""


def fused(program: Program, layer: Layer, reach: Reach) -> Layer:
    """The layer with every exchange that can be one kernel as one task, those from one copy into the next included."""
    search = _Search(program, layer, reach)
    for scatter in range(len(layer.steps)):
        if chain := search.chain(scatter):
            return fused(program, joined(layer, chain), reach)
    return layer


def stored(program: Program, layer: Layer, reach: Reach) -> Layer:
    """The layer with every reduce-scatter in one task with the product whose partial results it adds up."""
    search = _Search(program, layer, reach)
    for scatter, needed in enumerate(layer.needs):
        if search.exchange(scatter, Kind.REDUCE_SCATTER) and len(needed) == 1 and search.is_product(needed[0]):
            return stored(program, joined(layer, {needed[0]: 0, scatter: 0}), reach)
    return layer


def awaited(program: Program, layer: Layer, reach: Reach) -> Layer:
    """The layer with every all-gather in one task with the product whose rows it gathers."""
    search = _Search(program, layer, reach)
    for product, needed in enumerate(layer.needs):
        for gather in needed:
            if search.is_awaited(gather, product):
                return awaited(program, joined(layer, {gather: 0, product: 0}), reach)
    return layer


class _Search:
    """Two copies of a layer as one graph of tasks: a chain begins in the first one."""

    def __init__(self, program: Program, layer: Layer, reach: Reach) -> None:
        self.program = program
        self.layer = layer
        self.reach = reach
        self.count = len(layer.steps)
        self.before: list[set[int]] = [set() for _ in range(2 * self.count)]
        for late, needed in enumerate(layer.needs):
            for early in needed:
                self.before[late].add(early)
                self.before[late + self.count].add(early + self.count)
        for late, early in layer.carried:
            self.before[late + self.count].add(early)
        self.behind: list[set[int]] = [set() for _ in self.before]
        for late, needs in enumerate(self.before):
            for early in needs:
                self.behind[early].add(late)

    def chain(self, scatter: int) -> Chain:
        """What follows a scatter up to its gathers; empty where there is none, or it cannot be one kernel."""
        step = self.exchange(scatter, Kind.REDUCE_SCATTER)
        if step is None:
            return {}
        axes = step.axes
        behind = self._all(scatter, self.behind)
        inner, gathers = {scatter}, set()
        for late in sorted(behind):
            if not self.before[late] & behind <= inner:
                continue  # something else of the scatter comes in between
            gather = self.exchange(late, Kind.ALL_GATHER)
            if gather is not None and gather.axes == axes:
                gathers.add(late)
            elif self._is_local(late, axes):
                inner.add(late)
        members = gathers | {task for task in inner if gathers & self._all(task, self.behind)}
        ends = {task for task in members if task >= self.count}
        outside = {task for member in members for task in self._all(member, self.behind)} - members
        if not gathers or any(members & self._all(task, self.behind) for task in outside):
            return {}
        if any(early >= self.count and early not in members for task in ends for early in self.before[task]):
            return {}
        return {task % self.count: task // self.count for task in sorted(members)}

    def _all(self, task: int, edges: Sequence[set[int]]) -> set[int]:
        """All tasks that edges lead to, however far."""
        seen: set[int] = set()
        todo = [task]
        while todo:
            more = edges[todo.pop()] - seen
            seen |= more
            todo += more
        return seen

    def exchange(self, task: int, kind: Kind) -> Collective | None:
        """The collective that a task is, if it is of that kind."""
        steps = self.layer.steps[task % self.count]
        step = self.program.steps[steps[0]]
        return step if len(steps) == 1 and isinstance(step, Collective) and step.kind is kind else None

    def _is_local(self, task: int, axes: Axes) -> bool:
        """Whether a task computes on its own rows: along these axes, and no products."""
        steps = self._computed(task)
        spread = all([along.axes for along in step.along] == [axes] for step in steps)
        return bool(steps) and spread and not self.is_product(task)

    def is_product(self, task: int) -> bool:
        """Whether a task computes products, and exchanges nothing."""
        return any(has_product(self.reach, step) for step in self._computed(task))

    def is_awaited(self, gather: int, product: int) -> bool:
        """Whether a task multiplies what an all-gather brings, by rows, and nothing comes between the two."""
        step = self.exchange(gather, Kind.ALL_GATHER)
        if step is None or not self.is_product(product):
            return False
        nodes = [
            (stmt, node)
            for one in self._computed(product)
            for stmt in self.reach.units[one.name].statements
            if is_product(stmt)
            for node in self.reach.nodes[defines(stmt)[0]]
            if node.tensor == step.tensor and step.source is not None
        ]
        rows = all(
            node.index[step.source or 0] in {Rank(rank) for rank in targets(stmt)[0].ranks} for stmt, node in nodes
        )
        between = self._all(gather, self.behind) & self._all(product, self.before)
        return bool(nodes) and rows and not between

    def _computed(self, task: int) -> list[Compute]:
        """The statements of a task; none where it exchanges something."""
        steps = [self.program.steps[number] for number in self.layer.steps[task % self.count]]
        found = [step for step in steps if isinstance(step, Compute)]
        return found if len(found) == len(steps) else []


def joined(layer: Layer, chain: Chain) -> Layer:
    """The layer with a chain as one task."""
    first = min(chain)
    edges = {(late, early, 0) for late, needed in enumerate(layer.needs) for early in needed}
    edges |= {(late, early, 1) for late, early in layer.carried}

    def home(task: int) -> int:
        return first if task in chain else task

    moved = {
        (home(late), home(early), apart + chain.get(early, 0) - chain.get(late, 0)) for late, early, apart in edges
    }
    members: dict[int, list[int]] = {}
    for task in range(len(layer.steps)):
        members.setdefault(home(task), []).append(task)
    needs = {own: {early for late, early, apart in moved if late == own != early and not apart} for own in members}
    order: list[int] = []
    while len(order) < len(members):
        order.append(next(own for own in members if own not in order and needs[own] <= set(order)))
    place = {own: number for number, own in enumerate(order)}
    return Layer(
        tuple(tuple(sorted(step for task in members[own] for step in layer.steps[task])) for own in order),
        tuple(tuple(sorted(place[early] for early in needs[own])) for own in order),
        tuple(sorted((place[late], place[early]) for late, early, apart in moved if apart)),
    )
