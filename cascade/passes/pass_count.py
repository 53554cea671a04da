"""How often a cascade must traverse each rank: passes per rank, per input and per partition level, with a witness.

    S[m,n] = sum[e] Q[m,e] * K[n,e]      pass 1 over n
    R[m] = max[n] S[m,n]                 pass 1, ended by R: no part of it is known before the last n
    P[m,n] = exp(S[m,n] - R[m])          pass 2, because it visits every n again and needs R
    D[m] = sum[n] P[m,n]                 pass 2, ended by D
    O[m,f] = sum[n] P[m,n] / D[m] * V[n,f]    pass 3: 3 passes (K 3, V 1), 5 phases, witness R, D, O

The definition is that of Nayak et al., "FuseMax: Leveraging Extended Einsums to Optimize Attention Accelerator Design",
MICRO 2024, section 3: a pass over a fiber is one traversal of all its elements, and another one is needed whenever an
element must be visited again after every other element was visited. The count belongs to the cascade, not to a mapping:
Einsums of one pass can be fused along the rank at any granularity, Einsums of different passes cannot.

For one logical rank, given as its partition levels, outermost first, an Einsum is *full* if an operand, its output or
the coordinates it computes with carry all levels. Every tensor has `(p, barrier)`; inputs have `(0, no)`. Then

    need         = the largest, over operands, of p + (1 if the operand is a barrier and the Einsum is full)
    p            = max(1, need) if the Einsum is full, else need
    barrier(out) = the Einsum iterates the outermost level and its output lacks it, or it is not full and an operand at
                   the largest p is a barrier

A read streams where its index along the outermost level is the rank variable plus a constant (for an iterative tensor
along its iterative rank: minus a constant). Anything else, the terminal coordinate of a recurrence included, needs all
of the tensor that was defined along that variable: for this reader it is a barrier.

A recurrence is iterated to a fixed point. Along its iterative rank, what it reads of earlier generations is no barrier;
along every other rank the passes are those of one generation, and earlier generations are taken as given.

A `fold` of the schedule carries a state along its rank. What its members read of each other is no barrier over that
rank, where it is the outermost level: a state and the maps of it are known so far, and the merge moves what was made
with an older one. To everything outside of the fold, states are the barriers that they were.

Requires: canonical (for anything with nested reductions the numbers mean nothing). It returns names, no spans: what
stands where is a question to the cascade at hand. It does not look for rewrites that need fewer passes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cascade.inference import infer_shapes
from cascade.ir import Apply, Cascade, Const, Directive, Einsum, Expr, Fold, Rank, Read, Reduce, Stmt, TopK
from cascade.order import Unit, iterative_rank, order_within_step, units
from cascade.walk import children, defines, expressions, targets, walk

# --- what is counted -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Passes:
    """The passes over one logical rank: how many, and the chain of Einsums that forces them.

    `witness` has one name a pass: the reductions that end the earlier passes, then what needs the last. `number` is the
    pass of every statement that has the rank or depends on one that has, by the names it defines; `full` those that
    visit every element of the rank. `phases` counts dependency levels: more than passes where nothing is visited twice.
    """

    rank: str
    levels: tuple[str, ...]
    count: int
    phases: int
    inputs: Mapping[str, int]
    witness: tuple[str, ...]
    number: Mapping[str, int]
    full: frozenset[str]
    barriers: frozenset[str]


def count_passes(cascade: Cascade, rank: str, levels: tuple[str, ...] | None = None) -> Passes:
    """The passes over a rank variable, over a partitioned rank by its stem, or over the `levels` given for it.

    A rank that the cascade does not have is passed over 0 times.
    """
    graph = _graph(cascade)
    if levels is None:
        levels = (rank,) if rank in graph.ranks else partitions(cascade).get(rank, (rank,))
    return _count(graph, rank, levels)


def all_passes(cascade: Cascade, levels: Mapping[str, tuple[str, ...]] | None = None) -> dict[str, Passes]:
    """The passes over every rank variable, in order of first appearance, then over the partitioned ranks.

    `levels` names the partitioned ranks, outermost level first, where the notation (`n1`, `n0`) does not tell.
    """
    graph = _graph(cascade)
    found = {rank: _count(graph, rank, (rank,)) for rank in graph.ranks}
    logical = _partitions(cascade, graph) if levels is None else levels
    return found | {rank: _count(graph, rank, parts) for rank, parts in logical.items()}


def partitions(cascade: Cascade) -> dict[str, tuple[str, ...]]:
    """The partitioned ranks that the notation tells: `n1`, `n0`, each over its own shape, are the levels of `n`.

    Levels end in consecutive digits down to 0 and stand together, outermost first, in some tensor. Where the stem is a
    rank variable too, the partitioned rank is named by its levels: `n1,n0`.
    """
    return _partitions(cascade, _graph(cascade))


def _partitions(cascade: Cascade, graph: _Graph) -> dict[str, tuple[str, ...]]:
    stems: dict[str, dict[int, str]] = {}
    for name in graph.ranks:
        match = re.fullmatch(r"(.*[^0-9])(0|[1-9][0-9]*)", name)
        if match:
            stems.setdefault(match[1], {})[int(match[2])] = name
    found: dict[str, tuple[str, ...]] = {}
    for stem, digits in stems.items():
        depth = next(digit for digit in range(len(digits) + 1) if digit not in digits)
        parts = tuple(digits[digit] for digit in reversed(range(depth)))
        if depth > 1 and any(_in_order(parts, ranks) for ranks in graph.shapes):
            found[f"{','.join(parts)}" if stem in graph.ranks else stem] = parts
    if not found:
        return found
    extents = infer_shapes(cascade).ranks
    return {name: parts for name, parts in found.items() if len({extents[part] for part in parts}) == len(parts)}


def _in_order(parts: Sequence[str], ranks: Sequence[str]) -> bool:
    rest = iter(ranks)
    return all(part in rest for part in parts)


# --- the cascade, as far as passes depend on it ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Place:
    """One index of a read: a rank variable plus a constant (`rank` is None for any other form), and what it mentions.

    `fixed` is an index that is the same at every point: a number, an extent.
    """

    rank: str | None
    shift: int
    mentions: tuple[str, ...]
    fixed: bool


@dataclass(frozen=True, slots=True)
class _Access:
    """A read: the ranks that its indices mention outside of other reads; `back` for an earlier generation."""

    tensor: str
    index: tuple[_Place, ...]
    carried: frozenset[str]
    back: bool


@dataclass(frozen=True, slots=True, eq=False)
class _Node:
    """A statement: the ranks of its output, of its iteration space, of the coordinates it computes with."""

    names: tuple[str, ...]
    ranks: frozenset[str]
    iterated: frozenset[str]
    coordinates: frozenset[str]
    reads: tuple[_Access, ...]
    cycle: str | None  # the iterative rank of the recurrence that it is part of


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    """All statements, those of a unit together and each after what it reads of its own generation."""

    inputs: tuple[str, ...]
    units: tuple[tuple[_Node, ...], ...]
    owner: Mapping[str, _Node]
    left: Mapping[str, tuple[str, ...]]  # the ranks that a tensor was defined along
    ranks: tuple[str, ...]
    shapes: frozenset[tuple[str, ...]]  # the ranks that stand together in a target or a read
    folds: Mapping[str, Mapping[str, int]]  # for each rank that is folded, which fold updates a tensor

    def nodes(self) -> Iterator[_Node]:
        """Every statement, in order."""
        for unit in self.units:
            yield from unit

    def touching(self, levels: Sequence[str]) -> list[_Node]:
        """The statements that have one of the levels."""
        wanted = set(levels)
        return [node for node in self.nodes() if not wanted.isdisjoint(node.iterated)]

    def needs_all(self, access: _Access, rank: str) -> bool:
        """Whether a read needs all of a tensor that was defined along the rank: it does not move along with it."""
        left = self.left.get(access.tensor, ())
        if rank not in left:
            return False
        place = access.index[left.index(rank)]
        return place.rank != rank or (place.shift > 0 and self.owner[access.tensor].cycle == rank)

    def together(self, node: _Node, access: _Access, rank: str) -> bool:
        """Whether one fold over the rank updates both the reader and what it reads."""
        home = self.folds.get(rank, {})
        return node.names[0] in home and home[node.names[0]] == home.get(access.tensor)


def _graph(cascade: Cascade) -> _Graph:
    left = {target.name: target.ranks for stmt in cascade.body for target in targets(stmt)}
    found = tuple(_unit(unit, left) for unit in units(cascade.body, ()))
    ranks: dict[str, None] = {}
    for stmt in cascade.body:
        ranks.update(dict.fromkeys(_mentioned(stmt)))
    shapes = set(left.values())
    for node in (node for unit in found for node in unit):
        shapes.update(tuple(rank for place in access.index for rank in place.mentions) for access in node.reads)
    owner = {name: node for unit in found for node in unit for name in node.names}
    params = tuple(param.name for param in cascade.params)
    return _Graph(params, found, owner, left, tuple(ranks), frozenset(shapes), _folds(cascade.schedule, owner))


def _folds(schedule: Sequence[Directive], owner: Mapping[str, _Node]) -> dict[str, dict[str, int]]:
    """For each rank that is folded, the number of the fold that updates a tensor."""
    found: dict[str, dict[str, int]] = {}
    for number, fold in enumerate(directive for directive in schedule if isinstance(directive, Fold)):
        names = [name for update in fold.update if update in owner for name in owner[update].names]
        found.setdefault(fold.rank, {}).update(dict.fromkeys(names, number))
    return found


def _unit(unit: Unit, left: Mapping[str, tuple[str, ...]]) -> tuple[_Node, ...]:
    if not unit.cyclic:
        return tuple(_node(stmt, left, None, frozenset()) for stmt in unit.statements)
    rank = iterative_rank(unit.statements)
    members = frozenset(name for stmt in unit.statements for name in defines(stmt))
    return tuple(_node(stmt, left, rank, members) for stmt in order_within_step(unit.statements, rank))


def _node(stmt: Stmt, left: Mapping[str, tuple[str, ...]], cycle: str | None, members: frozenset[str]) -> _Node:
    reads: dict[_Access, None] = {}
    for node in (node for expr in expressions(stmt) for node in walk(expr) if isinstance(node, Read)):
        index = tuple(map(_place, node.index))
        back = cycle is not None and node.tensor in members and index[left[node.tensor].index(cycle)].shift < 0
        carried = frozenset(rank for place in index for rank in place.mentions)
        reads[_Access(node.tensor, index, carried, back)] = None
    ranks = frozenset(rank for target in targets(stmt) for rank in target.ranks)
    coordinates = frozenset(rank for expr in expressions(stmt) for rank in _coordinates(expr))
    return _Node(defines(stmt), ranks, frozenset(_mentioned(stmt)), coordinates, tuple(reads), cycle)


def _place(index: Expr) -> _Place:
    shift, base = 0, index
    while isinstance(base, Apply) and base.op in ("add", "sub"):
        one, other = base.args
        if base.op == "add" and isinstance(one, Const):
            one, other = other, one
        if not isinstance(other, Const) or type(other.value) is not int:
            break
        shift += other.value if base.op == "add" else -other.value
        base = one
    fixed = not any(isinstance(node, (Rank, Read)) for node in walk(index))
    return _Place(base.name if isinstance(base, Rank) else None, shift, _coordinates(index), fixed)


def _coordinates(expr: Expr) -> tuple[str, ...]:
    """The rank variables that an expression computes with, outside of the indices of reads."""
    found: dict[str, None] = {}
    stack = [expr]
    while stack:
        node = stack.pop()
        if isinstance(node, Rank):
            found[node.name] = None
        elif not isinstance(node, Read):
            stack.extend(reversed(children(node)))
    return tuple(found)


def _mentioned(stmt: Stmt) -> Iterator[str]:
    """Every rank variable of a statement: its iteration space."""
    for target in targets(stmt):
        yield from target.ranks
    if isinstance(stmt, TopK):
        yield stmt.rank
    for expr in expressions(stmt):
        for node in walk(expr):
            if isinstance(node, Rank):
                yield node.name
            elif isinstance(node, Reduce):
                yield from node.ranks
    if isinstance(stmt, Einsum):
        yield from (init.rank for init in stmt.inits)


# --- counting --------------------------------------------------------------------------------------------------------


def _count(graph: _Graph, rank: str, levels: tuple[str, ...]) -> Passes:
    touching = graph.touching(levels)
    sweep = _Sweep(graph, levels)
    sweep.run()
    used = _used(graph, sweep, touching)
    visits = {name: sum(mask >> bit & 1 for mask in used.values()) for bit, name in enumerate(graph.inputs)}
    inputs = {name: count for name, count in visits.items() if count}
    number = {name: p for name, (p, _) in sweep.state.items()}
    full = [node for node in touching if sweep.full(node)]
    if inputs:
        most = graph.inputs.index(max(inputs, key=inputs.__getitem__))
        needed = sorted(p for p, mask in used.items() if mask >> most & 1)
        full_readers = [node for node in full if sweep.sources.get(node.names[0], 0) >> most & 1]
    else:
        needed, full_readers = sorted({number[node.names[0]] for node in full}), full
    return Passes(
        rank,
        levels,
        len(needed),
        _phases(graph, levels),
        inputs,
        _witness(sweep, needed, full_readers),
        number,
        frozenset(name for node in full for name in node.names),
        frozenset(name for name, (_, barrier) in sweep.state.items() if barrier),
    )


@dataclass(slots=True, eq=False)
class _Sweep:
    """One trip over the statements for one logical rank; a tensor without a state is like an input: (0, no barrier)."""

    graph: _Graph
    levels: tuple[str, ...]
    state: dict[str, tuple[int, bool]] = field(default_factory=dict)
    sources: dict[str, int] = field(default_factory=dict)  # the inputs that a full statement reads the rank of, as bits

    def run(self) -> None:
        """The state of every tensor that has the rank or depends on one that has."""
        for unit in self.graph.units:
            changed = [self._visit(node) for node in unit]
            while unit[0].cycle is not None and any(changed):
                changed = [self._visit(node) for node in unit]

    def carries(self, ranks: frozenset[str]) -> bool:
        """Whether all levels are among the ranks."""
        return all(level in ranks for level in self.levels)

    def full(self, node: _Node) -> bool:
        """Whether the statement visits every element of the rank."""
        if self.carries(node.ranks) or self.carries(node.coordinates):
            return True
        return any(self.carries(access.carried) for access in node.reads)

    def ends(self, node: _Node) -> bool:
        """Whether the output is complete only behind the last coordinate of the outermost level."""
        return self.levels[0] in node.iterated and self.levels[0] not in node.ranks

    def operands(self, node: _Node) -> Iterator[tuple[_Access, int, bool]]:
        """What the statement reads: the pass of it, and whether it is a barrier to this reader."""
        for access in node.reads:
            state = self.state.get(access.tensor)
            if state is None:
                continue
            if not access.back:
                yield access, state[0], state[1] or self.graph.needs_all(access, self.levels[0])
            elif node.cycle == self.levels[0]:
                yield access, state[0], False

    def waits(self, node: _Node, access: _Access) -> bool:
        """Whether a barrier ends a pass for this reader: not where a fold carries it from block to block."""
        outermost = self.levels[0]
        return not self.graph.together(node, access, outermost) or self.graph.needs_all(access, outermost)

    def _visit(self, node: _Node) -> bool:
        """The state of what one statement defines; whether it is another than before."""
        found = list(self.operands(node))
        touches = not node.iterated.isdisjoint(self.levels)
        if not touches and not found:
            return False
        full = touches and self.full(node)
        largest = max((p for _, p, _ in found), default=0)
        if full:
            p = max(1, largest, *(p + 1 for access, p, barrier in found if barrier and self.waits(node, access)))
        else:
            p = largest
        barrier = self.ends(node) or (not full and any(b for _, q, b in found if q == largest))
        changed = self.state.get(node.names[0]) != (p, barrier)
        self.state.update(dict.fromkeys(node.names, (p, barrier)))
        return changed


def _used(graph: _Graph, sweep: _Sweep, touching: Sequence[_Node]) -> dict[int, int]:
    """In which passes the inputs are visited, themselves or as what is derived from them and still has the rank.

    Sets of inputs are the bits of a number. Recurrences feed themselves: repeated until nothing is added.
    """
    bits = {name: 1 << bit for bit, name in enumerate(graph.inputs)}
    derived: dict[str, int] = {}
    used: dict[int, int] = {}
    changed = True
    while changed:
        changed = False
        for node in touching:
            name = node.names[0]
            found = 0
            for access in node.reads:
                if sweep.carries(access.carried):
                    found |= bits.get(access.tensor, 0) | derived.get(access.tensor, 0)
            if found == sweep.sources.get(name, 0):
                continue
            changed = any(other.cycle for other in touching)
            sweep.sources[name] = found
            if sweep.carries(node.ranks):
                derived.update(dict.fromkeys(node.names, found))
    for node in touching:
        if found := sweep.sources.get(node.names[0], 0):
            p = sweep.state[node.names[0]][0]
            used[p] = used.get(p, 0) | found
    return used


def _phases(graph: _Graph, levels: Sequence[str]) -> int:
    """The longest chain of statements that have the rank, each needing the one before, within one generation."""
    wanted = set(levels)
    depth: dict[str, int] = {}
    for node in graph.nodes():
        found = max((depth.get(access.tensor, 0) for access in node.reads if not access.back), default=0)
        found += not wanted.isdisjoint(node.iterated)
        if found:
            depth.update(dict.fromkeys(node.names, found))
    return max(depth.values(), default=0)


# --- the witness -----------------------------------------------------------------------------------------------------


def _witness(sweep: _Sweep, needed: Sequence[int], readers: Sequence[_Node]) -> tuple[str, ...]:
    """The chain that forces the passes `needed`: what ends each of them but the last, and what needs the last."""
    if not needed:
        return ()
    node = next(node for node in readers if sweep.state[node.names[0]][0] == needed[-1])
    chain = [node.names[0]]
    while sweep.state[node.names[0]][0] > 1:
        node = _ended_before(sweep, node)
        if sweep.state[node.names[0]][0] in needed:
            chain.append(node.names[0])
    return tuple(reversed(chain))


def _ended_before(sweep: _Sweep, node: _Node) -> _Node:
    """The reduction, or recurrence, that ends the pass before that of `node`: it is what `node` waits for."""
    p = sweep.state[node.names[0]][0]

    def same_pass(reader: _Node) -> Iterator[tuple[_Access, bool]]:
        for access, q, barrier in sweep.operands(reader):
            if q == p or (q == p - 1 and barrier and sweep.full(reader) and sweep.waits(reader, access)):
                yield access, q == p - 1

    waits_for = _nearest(sweep, node, same_pass)

    def inherited(reader: _Node) -> Iterator[tuple[_Access, bool]]:
        for access, q, barrier in sweep.operands(reader):
            if q == p - 1 and barrier:
                below = sweep.graph.owner[access.tensor]
                yield access, sweep.ends(below) or not sweep.state[access.tensor][1]

    own = sweep.ends(waits_for) or not sweep.state[waits_for.names[0]][1]
    return waits_for if own else _nearest(sweep, waits_for, inherited)


def _nearest(sweep: _Sweep, start: _Node, follow: Callable[[_Node], Iterator[tuple[_Access, bool]]]) -> _Node:
    """The first statement, breadth first along `follow`, that an edge with the mark leads to."""
    todo, seen = [start], {start.names[0]}
    for node in todo:
        for access, found in follow(node):
            below = sweep.graph.owner[access.tensor]
            if found:
                return below
            if below.names[0] not in seen:
                seen.add(below.names[0])
                todo.append(below)
    raise AssertionError(f"nothing forces the pass of {start.names[0]}")


# --- what must be held -----------------------------------------------------------------------------------------------


def footprint(cascade: Cascade, counts: Mapping[str, Passes]) -> dict[str, tuple[str, ...]]:
    """The live footprint of every tensor: the extents of the ranks along which it must be held whole.

    Along a rank that is passed over once while the tensor is in use, one element at a time is enough. What is visited
    in two passes, or made in one and visited in a later one, is held whole (or spilled and read again), and so is what
    is read at coordinates that do not move along. `extents_text` writes the product.
    """
    graph = _graph(cascade)
    shapes = infer_shapes(cascade).tensors
    whole: dict[str, set[int]] = {name: set() for name in shapes}
    for passes in counts.values():
        _hold(graph, passes, whole)
    return {name: tuple(str(shape[at]) for at in sorted(whole[name])) for name, shape in shapes.items()}


def extents_text(extents: Sequence[str]) -> str:
    """A product of extents as text: `M*N`, and `1` for the empty one."""
    return "*".join(extents) or "1"


def _hold(graph: _Graph, passes: Passes, whole: dict[str, set[int]]) -> None:
    """Adds the positions along the levels of one logical rank at which tensors are held whole."""
    levels = set(passes.levels)
    visits: dict[str, set[int]] = {}
    places: dict[str, set[int]] = {}

    def visit(tensor: str, node: _Node, at: Iterator[int]) -> None:
        visits.setdefault(tensor, set()).add(passes.number[node.names[0]])
        places.setdefault(tensor, set()).update(at)

    for node in graph.nodes():
        touches = not levels.isdisjoint(node.iterated)
        if touches and levels <= node.ranks:
            for name in node.names:
                visit(name, node, (at for at, rank in enumerate(graph.left[name]) if rank in levels))
        for access in node.reads:
            if touches and levels <= access.carried:
                at = (at for at, place in enumerate(access.index) if not levels.isdisjoint(place.mentions))
                visit(access.tensor, node, at)
            if graph.needs_all(access, passes.levels[0]):
                _hold_read(graph, access, passes.levels[0], whole)
    for tensor, numbers in visits.items():
        if len(numbers) > 1:
            whole[tensor].update(places[tensor])


def _hold_read(graph: _Graph, access: _Access, rank: str, whole: dict[str, set[int]]) -> None:
    at = graph.left[access.tensor].index(rank)
    if not access.index[at].fixed:
        whole[access.tensor].add(at)
