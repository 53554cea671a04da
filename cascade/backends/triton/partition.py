"""Which statements share a kernel, and how the ranks lie in it.

A kernel spreads the ranks that all its statements have over the programs of its grid. Of the other ranks one may be
streamed, in tiles and in as many trips as its statements need; the rest must fit into a tile whole. Statements join
the kernel of what they read as long as such an arrangement exists: nothing is asked about what they compute. A rank
that a recurrence steps along is streamed, in order, or whole. The reduced rank of a product whose result is used along
the stream alone may be too long to be whole: it is gone through anew, in a loop of its own, for every tile of the
stream. What moves less than a launch takes also joins what lies as it does, needed or not.

    Z[t,v] = sum[d] X[t,d] * W[v,d];  R[t] = max[v] Z[t,v]    -->    t shared, v streamed, d inner: no Z in memory
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass

from cascade.bounds import absent_tensors, conjuncts
from cascade.backends.triton.products import MatrixProduct, matrix_product
from cascade.backends.triton.recurrence import composition, is_last, refusal, stepped
from cascade.backends.triton.rows import Rows
from cascade.inference import infer_shapes
from cascade.ir import Call, Cascade, Directive, Einsum, Fold, Fuse, GroupBy, Rank, Read, Reduce, Stmt, TopK
from cascade.order import members, units
from cascade.recent import recently
from cascade.walk import defines, expressions, free_ranks, reads, targets, tensors_read, walk

VIEW = "the same memory in another shape"
NO_TILE = "its ranks fit no tile, with one of them streamed"
ROW_LIMIT = 32768  # elements of a row that a program may hold at once
STEPS_LIMIT = 8192  # the same where they are stepped through: a scan has them several times
PRODUCT_LIMIT = 1024  # extent of a rank that a tile of a matrix product may have whole
MANY = 128  # programs that keep a GPU busy
GROUP_SIDE = 64  # rows of a product from which on four warps share it, and take operands from shared memory
SHORT = 128  # a reduced rank of a matrix product up to this extent needs no loop
WHOLE_SIDE = 0.3  # of the time of a product: what it costs that a side of it lies whole in a tile, not in many
WIDE_SIDE = 256  # coordinates of such a side from which on it costs more: there are fewer rows for each
OPERATIONS = 230  # that tensor cores do while a byte moves to or from memory
LAUNCH = 8_000_000  # bytes that move in the time that one more kernel takes
ELEMENT = 2  # bytes of a stored element, about
PART = 4  # bytes of a result of a part of a stream
FEWEST_ROWS = 16  # of a product, in a tile


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The ranks of a group: shared out over programs, streamed, whole in a tile, or gone through for every tile of the
    stream."""

    shared: tuple[str, ...]
    stream: str | None
    whole: tuple[str, ...]
    inner: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Statements of one kernel in order, how their ranks lie, and the fold that carries a state along the stream.

    Where they go through `rows` in the order of an index, `written` are the statements as they stand in the cascade.
    """

    statements: tuple[Stmt, ...]
    arrangement: Arrangement
    fold: Fold | None
    rows: Rows | None = None
    written: tuple[Stmt, ...] = ()

    @property
    def plain(self) -> tuple[Stmt, ...]:
        """The statements as they stand in the cascade."""
        return self.written or self.statements

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that is defined in the kernel."""
        return tuple(name for stmt in self.statements for name in defines(stmt))


@dataclass(frozen=True, slots=True)
class Rest:
    """Statements that no kernel computes, and why: they run one by one, as the interpreter runs them."""

    statements: tuple[Stmt, ...]
    reason: str

    @property
    def names(self) -> tuple[str, ...]:
        """Everything that is defined here."""
        return tuple(name for stmt in self.statements for name in defines(stmt))


def partition(
    cascade: Cascade,
    extents: Mapping[str, int],
    views: Collection[str] = (),
    instead: Mapping[str, Stmt] | None = None,
) -> tuple[Group | Rest, ...]:
    """The statements of a canonical cascade in groups, in an order in which they can run.

    `extents` are those of ranks; `views` are what is the same memory as another tensor: nothing computes that. What is
    computed `instead` of a statement, by the name of what that defines, has no kernel with what is not.
    """
    found: list[_Growing] = []
    apart = {*views, *(instead or {})}
    nests = {
        stmt: nest
        for nest in _nests(cascade, extents)
        if all(apart.isdisjoint(defines(each)) for each in nest)
        for stmt in nest
    }
    for unit in units(cascade.body, ()):
        if unit.cyclic and len(unit.statements) > 1:
            found.append(_Growing.of(unit.statements, "its statements need each other's earlier coordinates"))
            continue
        for stmt in unit.statements:
            if stmt in nests:
                found += [_Growing.of(nests[stmt], None)] if stmt is nests[stmt][-1] else []
            elif not set(views).isdisjoint(defines(stmt)):
                found.append(_Growing.of((stmt,), VIEW))
            elif (other := (instead or {}).get(defines(stmt)[0])) is not None:
                found.append(dataclasses.replace(_Growing.of((other,), refused(other)), closed=True))
            else:
                found = _placed(stmt, found, cascade, extents)
    found = _beside(_led(found, cascade, extents), cascade, extents)
    return tuple(_finished(item, cascade, extents) for item in found)


def _led(found: list[_Growing], cascade: Cascade, extents: Mapping[str, int]) -> list[_Growing]:
    """The groups, each with what it alone reads of groups before it if every program computes that once."""
    results = {result.name for result in cascade.results}
    for group in found[::-1]:
        readers = [other for other in found if other is not group and not group.made.isdisjoint(other.needed)]
        if len(readers) != 1 or not results.isdisjoint(group.made) or group.reason or group.closed:
            continue
        (then,) = readers
        if not then.reason and not then.closed and leads(group.statements, then.statements, cascade, extents):
            merged = _Growing.of((*group.statements, *then.statements), None)
            found = [merged if each is then else each for each in found if each is not group]
    return found


def _beside(found: Sequence[_Growing], cascade: Cascade, extents: Mapping[str, int]) -> list[_Growing]:
    """The groups with those in one that need nothing of each other, lie alike and are launches for the most part."""
    done: list[_Growing] = []
    for group in found:
        at = None
        for place, other in reversed([*enumerate(done)]):
            if not group.needed.isdisjoint(other.made):
                break
            at = place if _lie_alike(other, group, cascade, extents) else at
        if at is None:
            done.append(group)
        else:
            merged = _Growing.of((*done[at].statements, *group.statements), None)
            done[at] = dataclasses.replace(merged, closed=group.closed)
    return done


def _lie_alike(first: _Growing, then: _Growing, cascade: Cascade, extents: Mapping[str, int]) -> bool:
    """Whether two groups without products lie over programs in one way, and move less than a launch takes."""
    statements = (*first.statements, *then.statements)
    if first.reason or then.reason or first.closed is not then.closed or any(map(matrix_product, statements)):
        return False
    lying = [arrange(each, cascade, extents) for each in (first.statements, then.statements, statements)]
    if any(_row_order(each, cascade) for each in statements) or len({*lying}) > 1 or lying[0] is None:
        return False
    stream = lying[0].stream
    return (stream is None or fold_along(statements, stream, cascade) is None) and _moved(statements, extents) <= LAUNCH


def leads(first: Sequence[Stmt], then: Sequence[Stmt], cascade: Cascade, extents: Mapping[str, int]) -> bool:
    """Whether statements can stand before the stream of a kernel with products, which computes each element once.

    It lies over programs as it did: only what they read is another tensor, and one kernel is less. Products of many
    rows wait for each other where an operand is computed before them.
    """
    if any(map(matrix_product, first)) or not all(isinstance(stmt, Einsum) and not stmt.inits for stmt in first):
        return False
    made = {name for stmt in first for name in defines(stmt)}
    products = [found for stmt in then if (found := matrix_product(stmt)) is not None]
    sides = [side for found in products for side in ((found.left, found.rows), (found.right, found.columns))]
    fed = [ranks for terms, ranks in sides if not made.isdisjoint(tensors_read(terms))]
    many = any(_coordinates(list(ranks), extents) >= GROUP_SIDE for ranks in fed)
    if not products or many or any(_row_order(stmt, cascade) for stmt in (*first, *then)):
        return False
    before, together = arrange(then, cascade, extents), arrange([*first, *then], cascade, extents)
    if before is None or together is None or before.stream is None or together.stream != before.stream:
        return False
    shared = set(together.shared)
    alike = shared == set(before.shared) and together.inner == before.inner
    ranks = [set(all_ranks(stmt)) for stmt in first]
    once = all(shared <= set(targets(stmt)[0].ranks) for stmt in first)
    return alike and once and all(own <= shared | set(together.whole) for own in ranks)


def _nests(cascade: Cascade, extents: Mapping[str, int]) -> Iterator[tuple[Stmt, ...]]:
    """The statements of folds whose trip has tiles of several products, which loops within it can sum.

    No statement joins one product with another that it does not read: so these are placed together.
    """
    order = [stmt for unit in units(cascade.body, ()) for stmt in unit.statements]
    for item in cascade.schedule:
        if not isinstance(item, Fold):
            continue
        names = {*item.update, *item.finalize}
        mine = tuple(stmt for stmt in order if names.issuperset(defines(stmt)))
        inner = {found.over for stmt in mine if (found := matrix_product(stmt)) is not None and found.two_sided}
        if len(inner - {item.rank}) < 2 or any(refused(stmt) is not None for stmt in mine):
            continue
        arrangement = arrange(mine, cascade, extents)
        between = order[order.index(mine[0]) : order.index(mine[-1])]
        others = [stmt for stmt in between if stmt not in mine]
        apart = any(not names.isdisjoint(reads(stmt)) for stmt in others)
        if arrangement is not None and inner - {item.rank} <= set(arrangement.inner) and not apart:
            yield mine


@dataclass(slots=True)
class _Growing:
    """A group that statements still join, unless it is closed; one that runs outside kernels has its reason."""

    statements: list[Stmt]
    reason: str | None
    made: set[str]
    needed: set[str]
    closed: bool = False

    @classmethod
    def of(cls, statements: Sequence[Stmt], reason: str | None) -> _Growing:
        found = cls([], reason, set(), set())
        for stmt in statements:
            found.add(stmt)
        return found

    def add(self, stmt: Stmt) -> None:
        self.statements.append(stmt)
        self.made |= set(defines(stmt))
        self.needed |= set(reads(stmt))


def _placed(stmt: Stmt, found: list[_Growing], cascade: Cascade, extents: Mapping[str, int]) -> list[_Growing]:
    """The groups with one more statement, in the group from which it reads most, or in a new one.

    Groups that it needs as well come before that one.
    """
    needed, companions = set(reads(stmt)), set(_companions(stmt, cascade))
    reason = refused(stmt)
    options: list[tuple[int, int, list[int]]] = []
    for at, group in enumerate(found if reason is None else ()):
        apart = _row_order(group.statements[0], cascade) is not _row_order(stmt, cascade)
        if group.reason is None and not group.closed and not apart and not (needed | companions).isdisjoint(group.made):
            ahead = _ahead(at, needed, found)
            if ahead is not None and _worthwhile(group.statements, stmt, cascade, extents):
                options.append((_read_from(stmt, group.made, extents), at, ahead))
    if not options:
        return [*found, _Growing.of((stmt,), reason)]
    _, at, ahead = max(options)
    found[at].add(stmt)
    behind = [place for place in range(at + 1, len(found)) if place not in ahead]
    ordered = [found[place] for place in (*range(at), *ahead, at, *behind)]
    return _joined(ordered, found[at], needed, cascade, extents)


def _joined(
    found: list[_Growing], last: _Growing, needed: Set[str], cascade: Cascade, extents: Mapping[str, int]
) -> list[_Growing]:
    """The groups with those in one that a statement of the last needs and that lie over programs as it does.

    Nothing had them together before: each reads other data. Products keep their kernels, and the tiles these want.
    What moves so little that launches are most of its time need not lie as it did, if there are programs enough.
    """
    for group in found[: found.index(last)][::-1]:
        between = found[found.index(group) + 1 : found.index(last)]
        if group.reason or group.closed or needed.isdisjoint(group.made) or any(map(matrix_product, group.statements)):
            continue
        if any(map(matrix_product, last.statements)) or any(not group.made.isdisjoint(g.needed) for g in between):
            continue
        merged = _Growing.of((*group.statements, *last.statements), None)
        if any(_row_order(each, cascade) for each in merged.statements):
            continue
        lying = [arrange(each.statements, cascade, extents) for each in (group, last, merged)]
        alike = len({None if a is None else (frozenset(a.shared), a.stream) for a in lying}) == 1
        if alike or _is_short(merged.statements, lying[-1], extents):
            found = [merged if each is last else each for each in found if each is not group]
            last = merged
    return found


def _is_short(statements: Sequence[Stmt], together: Arrangement | None, extents: Mapping[str, int]) -> bool:
    """Whether what statements read and write takes less time than a launch, by programs that keep a GPU busy."""
    if together is None or together.stream is not None or _coordinates(together.shared, extents) < MANY:
        return False
    return _moved(statements, extents) <= LAUNCH


def _moved(statements: Sequence[Stmt], extents: Mapping[str, int]) -> int:
    """The bytes that statements read and write, were nothing of it kept."""
    written = sum(_coordinates(target.ranks, extents) for stmt in statements for target in targets(stmt))
    return ELEMENT * (written + sum(_coordinates(ranks, extents) for _, ranks in set(_accesses(statements))))


def _ahead(at: int, needed: Set[str], found: Sequence[_Growing]) -> list[int] | None:
    """The groups behind one that must run before it if it needs these tensors; None where they need it themselves."""
    wanted = set(needed)
    ahead: list[int] = []
    for place in range(len(found) - 1, at, -1):
        if not wanted.isdisjoint(found[place].made):
            wanted |= found[place].needed
            ahead.append(place)
    own = found[at].made
    if any(not own.isdisjoint(found[place].needed) for place in ahead):
        return None
    return ahead[::-1]


def _read_from(stmt: Stmt, made: Set[str], extents: Mapping[str, int]) -> int:
    """The elements that a statement reads of some tensors."""
    return sum(_coordinates(ranks, extents) for name, ranks in set(_accesses([stmt])) if name in made)


def _worthwhile(group: Sequence[Stmt], stmt: Stmt, cascade: Cascade, extents: Mapping[str, int]) -> bool:
    """Whether a statement can join a group without leaving most of a GPU idle that both would use alone."""
    together = arrange([*group, stmt], cascade, extents)
    if together is None:
        return False
    if any(matrix_product(other) for other in (*group, stmt)):
        return _pays(group, stmt, together, cascade, extents)
    if together.stream is not None:
        return True  # it can be shared by programs
    alone = [arrange(group, cascade, extents), arrange([stmt], cascade, extents)]
    programs = [_coordinates(found.shared, extents) for found in alone if found is not None]
    return _coordinates(together.shared, extents) >= min(*programs, MANY)


def _pays(
    group: Sequence[Stmt], stmt: Stmt, together: Arrangement, cascade: Cascade, extents: Mapping[str, int]
) -> bool:
    """Whether what need not move between kernels is worth what products lose of which a side lies whole in a tile.

    With few rows that is the time in which they read a long side: too few programs share it. Or programs share what is
    streamed, and each writes results of its own, which another kernel reads.
    """
    lost, parted = 0.0, 0
    before = arrange(group, cascade, extents)
    for other in (*group, stmt):
        product = matrix_product(other)
        if product is None:
            continue
        alone = arrange([stmt], cascade, extents) if other is stmt else before
        sides = product.rows | product.columns
        apart = set(all_ranks(other)) - sides - set(reduced_ranks(other))
        if alone is not None and apart & set(together.whole) and apart.isdisjoint(alone.whole):
            return False  # a product for each coordinate that a tile has: its tiles would have three ranks
        if alone is not None and _mixed(product, together) and not _mixed(product, alone):
            return False  # so would they here
        if not sides.isdisjoint(together.whole) and alone is not None and sides.isdisjoint(alone.whole):
            touched = sum(_coordinates(ranks, extents) for _, ranks in set(_accesses([other])))
            whole = [side for side in (product.rows, product.columns) if not side.isdisjoint(together.whole)]
            if any(len(side & {*together.whole, *together.shared}) > 1 for side in whole):
                return False  # its tiles would have three ranks: tensor cores multiply what has two
            widest = max(_coordinates(list(side), extents) for side in whole)
            operations = max(1.0, widest / WIDE_SIDE) * 2 * _coordinates(all_ranks(other), extents)
            lost += max(operations, touched * ELEMENT * OPERATIONS) if widest > PRODUCT_LIMIT else operations
            parts = MANY // max(1, _coordinates(together.shared, extents) // FEWEST_ROWS)
            parted += parts * _coordinates(targets(other)[0].ranks, extents) * 2 * PART
    read = [set(_accesses(group)), set(_accesses([stmt]))]
    made = {name for other in group for name in defines(other)}
    own = defines(stmt)
    readers = {name: found for name in made if own in (found := _readers(cascade).get(name, ()))}
    before_it = {name: found[: found.index(own)] for name, found in readers.items()}
    elsewhere = {name for name, found in before_it.items() if not all(made.issuperset(other) for other in found)}
    twice = made - elsewhere - {result.name for result in cascade.results}  # neither written nor read any more
    moved = sum(
        _coordinates(ranks, extents) * (2 if name in twice else 1 if name in made or (name, ranks) in read[0] else 0)
        for name, ranks in read[1]
    )
    return WHOLE_SIDE * lost <= (moved * ELEMENT + LAUNCH - parted) * OPERATIONS


def _mixed(product: MatrixProduct, arrangement: Arrangement) -> bool:
    """Whether a side of a product has the stream and a rank that programs share out: a tile has some of each."""
    sides = (product.rows, product.columns)
    return any(arrangement.stream in side and not side.isdisjoint(arrangement.shared) for side in sides)


@recently
def _readers(cascade: Cascade) -> Mapping[str, list[tuple[str, ...]]]:
    """What the statements that read a tensor define, in the order of the cascade."""
    found: dict[str, list[tuple[str, ...]]] = {name: [] for stmt in cascade.body for name in defines(stmt)}
    for stmt in cascade.body:
        for name in reads(stmt):
            if name in found:
                found[name].append(defines(stmt))
    return found


def _accesses(statements: Sequence[Stmt]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The tensors that statements read, with the ranks of their coordinates."""
    for stmt in statements:
        for expr in expressions(stmt):
            for node in walk(expr):
                if isinstance(node, Read):
                    yield node.tensor, tuple(dict.fromkeys(rank for part in node.index for rank in free_ranks(part)))


def _coordinates(ranks: Sequence[str], extents: Mapping[str, int]) -> int:
    count = 1
    for rank in ranks:
        count *= extents[rank]
    return count


def _companions(stmt: Stmt, cascade: Cascade) -> Iterator[str]:
    """The statements that the schedule has beside this one in a group."""
    for item in cascade.schedule:
        if isinstance(item, (Fuse, Fold)) and not set(defines(stmt)).isdisjoint(members(item)):
            yield from members(item)


def _row_order(stmt: Stmt, cascade: Cascade) -> GroupBy | None:
    """The group of the schedule in whose order the rows of a statement run."""
    groups = (item for item in cascade.schedule if isinstance(item, GroupBy))
    return next((item for item in groups if not set(defines(stmt)).isdisjoint(item.statements)), None)


def refused(stmt: Stmt) -> str | None:
    """Why a statement cannot stand in a kernel at all; None where it can."""
    if isinstance(stmt, Call):
        return "it calls another cascade"
    return refusal(stmt) if isinstance(stmt, Einsum) and stmt.inits else None


def _finished(item: _Growing, cascade: Cascade, extents: Mapping[str, int]) -> Group | Rest:
    statements = item.statements
    if item.reason is not None:
        return Rest(tuple(statements), item.reason)
    arrangement = arrange(statements, cascade, extents)
    if arrangement is None:  # one statement by itself: what joins others is arranged before it does
        return Rest(tuple(statements), NO_TILE)
    fold = None if arrangement.stream is None else fold_along(statements, arrangement.stream, cascade)
    return Group(tuple(statements), arrangement, fold)


def fold_along(statements: Sequence[Stmt], rank: str, cascade: Cascade) -> Fold | None:
    """What of a fold of the schedule over a rank concerns some statements.

    None where a state joins a reduction that stands in another kernel, or moves with a state that does: those are
    complete then, and nothing moves.
    """
    names = {name for stmt in statements for name in defines(stmt)}
    along = {name for stmt in statements if rank in reduced_ranks(stmt) for name in defines(stmt)}
    for item in cascade.schedule:
        if isinstance(item, Fold) and item.rank == rank and not names.isdisjoint(item.state):
            states = [stmt for stmt in statements if not set(defines(stmt)).isdisjoint(item.state)]
            steps = all(set(defines(stmt)) <= along or not along.isdisjoint(reads(stmt)) for stmt in states)
            fold = restricted(item, names)
            moved = {node.tensor.rstrip("'") for m in fold.merge for node in walk(m.expr) if isinstance(node, Read)}
            return fold if steps and moved & {*item.state, *item.update} <= names else None
    return None


def restricted(fold: Fold, names: Collection[str]) -> Fold:
    """The part of a fold that concerns some statements."""
    return dataclasses.replace(
        fold,
        state=tuple(name for name in fold.state if name in names),
        init=tuple(init for init in fold.init if init.target.name in names),
        update=tuple(name for name in fold.update if name in names),
        merge=tuple(merge for merge in fold.merge if merge.target.name in names),
        finalize=tuple(name for name in fold.finalize if name in names),
    )


def without(item: Directive, gone: Collection[str]) -> Directive | None:
    """A part of the schedule with some statements left out; None where nothing is left of it."""
    if isinstance(item, Fuse):
        left = tuple(name for name in item.statements if name not in gone)
        return dataclasses.replace(item, statements=left) if len(left) > 1 else None
    if not isinstance(item, Fold):
        return item
    kept = restricted(item, {*item.state, *item.update, *item.finalize} - {*gone})
    return kept if kept.state else None


def tied(cascade: Cascade) -> frozenset[str]:
    """What a trip or an order of rows of the schedule names: nothing may take the place of these statements."""
    found: set[str] = set()
    for item in cascade.schedule:
        if isinstance(item, Fold):
            found |= {*item.state, *item.update, *item.finalize}
        elif isinstance(item, GroupBy):
            found |= set(item.statements)
    return frozenset(found)


def replaced(cascade: Cascade, made: Mapping[Stmt, Sequence[Stmt]]) -> Cascade:
    """The cascade with others in the place of some statements that nothing is tied to, by themselves."""
    gone = {name for stmt in made for name in defines(stmt)}
    schedule = (item for item in cascade.schedule if not isinstance(item, Fuse) or gone.isdisjoint(item.statements))
    body = (new for stmt in cascade.body for new in made.get(stmt, (stmt,)))
    return dataclasses.replace(cascade, body=tuple(body), schedule=tuple(schedule))


def arrange(statements: Sequence[Stmt], cascade: Cascade, extents: Mapping[str, int]) -> Arrangement | None:
    """How the ranks of some statements can lie in one kernel; None where they cannot."""
    own = {target.name: target.ranks for stmt in statements for target in targets(stmt)}
    if any(not _plain(stmt, own, statements, cascade) for stmt in statements):
        return None
    steps = {stmt.inits[0].rank for stmt in stepped(statements)}
    if len(steps) > 1:
        return None
    kept = [set(ranks) for ranks in own.values()]
    reduced = {rank for stmt in statements for rank in reduced_ranks(stmt)}
    common = set.intersection(*kept) - reduced - steps
    if not common and len(statements) > 1 and any(kept):
        return None
    ranks = list(dict.fromkeys(rank for stmt in statements for rank in all_ranks(stmt)))
    shared = tuple(rank for rank in ranks if rank in common)
    others = [rank for rank in ranks if rank not in common]
    products = [found for stmt in statements if (found := matrix_product(stmt)) is not None]
    if products:
        return None if steps else _with_products(shared, others, statements, cascade, extents)
    return _rows(shared, others, statements, extents, next(iter(steps), None))


def _with_products(
    shared: tuple[str, ...],
    others: list[str],
    statements: Sequence[Stmt],
    cascade: Cascade,
    extents: Mapping[str, int],
) -> Arrangement | None:
    """With matrix products: the rank of a fold, or the longest reduced rank, is streamed; the others must be short.

    Where they are not, that of another fold; or what a single product sums over: its results may be short enough to be
    reduced as a whole.
    """
    reduced = [rank for stmt in statements for rank in reduced_ranks(stmt)]
    products = [found.over for stmt in statements if (found := matrix_product(stmt)) is not None]
    last = products[-1]
    folded = {item.rank for item in cascade.schedule if isinstance(item, Fold)} & set(reduced)
    chosen = {rank for s in statements if isinstance(s, TopK) for rank in (s.rank, *s.values.ranks)}  # whole
    candidates = sorted(
        {r for r in others if r in reduced and r not in chosen and (extents[r] > SHORT or r in folded)},
        key=lambda rank: (rank in folded, rank == last, extents[rank]),
        reverse=True,
    )
    others_too = [rank for rank in candidates[1:] if rank in folded or {rank} == set(products)]
    for stream in (*(candidates[:1] or (None,)), *others_too):
        arrangement = _streamed(stream, shared, others, statements, cascade, extents)
        if arrangement is not None:
            return arrangement
    return None


def _streamed(
    stream: str | None,
    shared: tuple[str, ...],
    others: list[str],
    statements: Sequence[Stmt],
    cascade: Cascade,
    extents: Mapping[str, int],
) -> Arrangement | None:
    """With this rank as the stream; None where others are too long to be whole in a tile.

    Of several products that give tiles of the stream each has operands that lie whole: then all go through what is
    long for one of them, if they can. What one sums over and another has in its result lies there for both, and an
    operand that each trip computes of others lies there as it was and as it is.
    """
    several = [stmt for stmt in statements if stream is not None and _gives_tiles(stmt, stream)]
    products = [found for stmt in statements if (found := matrix_product(stmt)) is not None]
    twice = {found.over for found in products} & {rank for found in products for rank in found.rows | found.columns}
    computed = {rank for stmt in several if stream is not None and (rank := _computed_along(stmt, stream))}
    twice |= computed
    for most in dict.fromkeys((PRODUCT_LIMIT // max(1, len(several)), PRODUCT_LIMIT)):
        limits = {rank: min(most, PRODUCT_LIMIT // 2) if rank in computed else most for rank in others}
        inner = () if stream is None else _inner(stream, limits, statements, cascade, extents)
        whole = tuple(rank for rank in others if rank != stream and rank not in inner)
        if any(extents[rank] > (PRODUCT_LIMIT // 2 if rank in twice else PRODUCT_LIMIT) for rank in whole):
            continue
        widest = max((held(stmt, set(whole), extents) for stmt in statements), default=1)
        arrangement = Arrangement(shared, stream, whole, inner)
        if widest <= PRODUCT_LIMIT * 2 and not (inner and not _in_one_trip(statements, arrangement, cascade, extents)):
            return arrangement
    return None


def _gives_tiles(stmt: Stmt, stream: str) -> bool:
    """Whether a statement is a product that a trip over the stream makes tiles of."""
    product = matrix_product(stmt)
    return product is not None and product.over != stream and stream in targets(stmt)[0].ranks


def _computed_along(stmt: Stmt, stream: str) -> str | None:
    """What a product sums over, if its operand that has the stream is computed of several tensors with that rank."""
    product = matrix_product(stmt)
    if product is None:
        return None
    side = product.left if stream in product.rows else product.right
    nodes = {node for term in side for node in walk(term) if isinstance(node, Read)}
    return product.over if sum(product.over in free_ranks(node) for node in nodes) > 1 else None


def _inner(
    stream: str, limits: Mapping[str, int], statements: Sequence[Stmt], cascade: Cascade, extents: Mapping[str, int]
) -> tuple[str, ...]:
    """The reduced ranks of products that give tiles of the stream, too long for an operand to have them whole."""
    found: list[str] = []
    for rank, most in limits.items():
        concerned = [stmt for stmt in statements if rank in all_ranks(stmt)]
        if rank != stream and extents[rank] > most and all(_gone_through(s, rank, stream, cascade) for s in concerned):
            found.append(rank)
    return tuple(found)


def _gone_through(stmt: Stmt, rank: str, stream: str, cascade: Cascade) -> bool:
    """Whether a statement is a product over a rank that a loop within the stream can sum, all of it being present."""
    product = matrix_product(stmt)
    if product is None or not isinstance(stmt, Einsum) or reduced_ranks(stmt) != (rank,) or product.over != rank:
        return False
    known = stmt.where is None or rank not in free_ranks(stmt.where)
    nodes = [node for node in walk(stmt.expr) if isinstance(node, Read)]
    plain = all(part == Rank(rank) or rank not in free_ranks(part) for node in nodes for part in node.index)
    return known and plain and stream in stmt.target.ranks and absent_tensors(cascade).isdisjoint(reads(stmt))


def _in_one_trip(
    statements: Sequence[Stmt], arrangement: Arrangement, cascade: Cascade, extents: Mapping[str, int]
) -> bool:
    """Whether all that needs tiles which an inner loop makes can share one trip: nothing is made twice, or stored."""
    stream, inner = arrangement.stream, set(arrangement.inner)
    assert stream is not None
    made = {name for stmt in statements if inner & set(reduced_ranks(stmt)) for name in defines(stmt)}
    tiles, needing = set(made), set(made)  # what has the stream; what depends on that
    along: list[Stmt] = []
    for stmt in cascade.body:
        if needing.isdisjoint(reads(stmt)):
            continue
        needing |= set(defines(stmt))
        if stream in all_ranks(stmt):
            along.append(stmt)
            tiles |= {target.name for target in targets(stmt) if stream in target.ranks}
        elif not tiles.isdisjoint(reads(stmt)):
            return False  # an element that some index picks
    if not tiles.isdisjoint(result.name for result in cascade.results):
        return False
    wanted = {name for stmt in along for name in reads(stmt)} & needing
    for stmt in reversed(cascade.body):  # what stands between a state and the tiles that it is needed for
        if not wanted.isdisjoint(defines(stmt)) and stmt not in along:
            wanted |= set(reads(stmt)) & needing
    together = [s for s in cascade.body if s in statements or s in along or not wanted.isdisjoint(defines(s))]
    if len(together) > len(statements):
        found = arrange(together, cascade, extents)
        return found is not None and found.stream == stream and inner <= set(found.inner)
    group = Group(tuple(statements), arrangement, fold_along(statements, stream, cascade))
    return Trips.of(group).count == 1


def _rows(
    shared: tuple[str, ...],
    others: list[str],
    statements: Sequence[Stmt],
    extents: Mapping[str, int],
    along: str | None,
) -> Arrangement | None:
    """Without matrix products: everything is whole while it fits, else the longest rank is streamed.

    That is the rank `along` which recurrences step, if any; where nothing composes their steps it is streamed anyway.
    """
    limit = ROW_LIMIT if along is None else 0 if steps_singly(statements) else STEPS_LIMIT
    if max((held(stmt, set(others), extents) for stmt in statements), default=1) <= limit:
        return Arrangement(shared, None, tuple(others))
    stream = max(others, key=lambda rank: extents[rank]) if along is None else along
    whole = tuple(rank for rank in others if rank != stream)
    if any(isinstance(stmt, TopK) and stmt.rank == stream for stmt in statements):
        return None
    fits = max(held(stmt, set(whole), extents) for stmt in statements) <= ROW_LIMIT // 16
    return Arrangement(shared, stream, whole) if fits else None


def steps_singly(statements: Sequence[Stmt]) -> bool:
    """Whether a recurrence among statements goes one coordinate at a time: nothing composes its steps."""
    return any(composition(stmt) is None for stmt in stepped(statements))


def held(stmt: Stmt, whole: set[str], extents: Mapping[str, int]) -> int:
    """The elements of the largest tile of a statement over these ranks."""
    product = matrix_product(stmt)
    groups: list[set[str] | frozenset[str]] = [set(all_ranks(stmt))]
    if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce):  # what is the same along a rank is folded once
        tests = [test for test in conjuncts(stmt.where) if set(stmt.expr.ranks) & set(free_ranks(test))]
        elements = {rank for expr in (stmt.expr.body, *tests) for rank in free_ranks(expr)}
        groups = [elements | set(stmt.expr.ranks), set(stmt.target.ranks)]
    if isinstance(stmt, TopK):
        groups = [set(stmt.values.ranks), set(all_ranks(stmt)) - set(stmt.values.ranks) | {stmt.rank}]
    if product is not None:
        target = set(targets(stmt)[0].ranks)
        summed = set(reduced_ranks(stmt))
        groups = [target, product.columns | summed, product.rows | summed]
    size = 1
    for ranks in groups:
        found = 1
        for rank in ranks & whole:
            found *= power_of_two(extents[rank])
        size = max(size, found)
    return size


def power_of_two(extent: int) -> int:
    """The smallest power of two that is not less."""
    return 1 << max(0, extent - 1).bit_length()


def _plain(stmt: Stmt, own: Mapping[str, tuple[str, ...]], statements: Sequence[Stmt], cascade: Cascade) -> bool:
    """Whether what a statement reads of the same kernel stands at its own coordinates.

    A statement that has not the rank which a recurrence steps along may read where it ends.
    """
    made = defines(stmt)
    ends = {s.target.name: s for s in stepped(statements) if s.inits[0].rank not in all_ranks(stmt)}
    for expr in expressions(stmt):
        for node in walk(expr):
            inside = isinstance(node, Read) and node.tensor in own and node.tensor not in made
            if not isinstance(node, Read) or not inside or node.index == tuple(map(Rank, own[node.tensor])):
                continue
            ended = ends.get(node.tensor)
            if ended is None or not is_last(node, ended, infer_shapes(cascade).ranks[ended.inits[0].rank]):
                return False
    return True


def reduced_ranks(stmt: Stmt) -> tuple[str, ...]:
    """The ranks that a statement folds."""
    if isinstance(stmt, TopK):
        return (stmt.rank,)
    return stmt.expr.ranks if isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) else ()


def all_ranks(stmt: Stmt) -> tuple[str, ...]:
    """The ranks of a statement: of its targets, of what it folds, of its filter."""
    found = dict.fromkeys(rank for target in targets(stmt) for rank in target.ranks)
    found |= dict.fromkeys(reduced_ranks(stmt))
    found |= dict.fromkeys(rank for expr in expressions(stmt) for rank in free_ranks(expr))
    return tuple(found)


# --- the trips of a kernel -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trips:
    """Where each statement of a group runs: before the stream, in a trip over it, behind one.

    Kinds: `before`, `block` (a tile of the stream), `state` (carried), `inner` (the tile's part of a state), `of state`
    (a map of a state in its trip), `after`.
    """

    group: Group
    kind: Mapping[str, str]
    number: Mapping[str, int]

    @staticmethod
    def of(group: Group) -> Trips:
        """The trips of a group."""
        stream, fold = group.arrangement.stream, group.fold
        kind: dict[str, str] = {}
        number: dict[str, int] = {}
        for stmt in group.statements:
            name = defines(stmt)[0]
            updated = fold is not None and name in fold.update
            joins = fold is not None and name in fold.state
            reduces = stream in reduced_ranks(stmt)
            block = stream is not None and any(stream in target.ranks for target in targets(stmt))
            known = [read for read in reads(stmt) if read in kind]
            at = 0
            for read in known:
                together = updated and fold is not None and read in fold.update
                later = kind[read] in ("state", "of state", "after") and not together and (block or reduces)
                at = max(at, number[read] + later)
            if joins or reduces:
                found = "state" if joins or not updated else "inner"
            elif block:
                found = "block"
            elif all(kind[read] == "before" for read in known):
                found = "before"
            else:
                found = "of state" if updated else "after"
            for defined in defines(stmt):
                kind[defined], number[defined] = found, at
        return Trips(group, kind, number)

    @property
    def count(self) -> int:
        """The number of loops."""
        return max((self.number[name] + 1 for name, kind in self.kind.items() if kind not in ("before",)), default=0)

    @property
    def before(self) -> Iterator[Stmt]:
        """What needs no trip."""
        return (stmt for stmt in self.group.statements if self.kind[defines(stmt)[0]] == "before")

    def after(self, trip: int) -> Iterator[Stmt]:
        """What runs behind a trip."""
        for stmt in self.group.statements:
            name = defines(stmt)[0]
            if self.kind[name] == "after" and self.number[name] == trip:
                yield stmt

    def read_after(self, tensor: str, trip: int) -> bool:
        """Whether a later trip reads a tensor as well."""
        return any(tensor in reads(stmt) for later in range(trip + 1, self.count) for stmt in self.statements(later))

    def statements(self, trip: int) -> tuple[Stmt, ...]:
        """What runs in a trip: its own statements, and again the tiles of earlier trips that they need."""
        needed: set[str] = set()
        for stmt in reversed(self.group.statements):
            name = defines(stmt)[0]
            own = self.number[name] == trip and self.kind[name] in ("block", "state", "inner", "of state")
            again = self.kind[name] == "block" and needed & set(defines(stmt))
            if own or again:
                needed |= set(defines(stmt)) | set(reads(stmt))
        order = {name: place for place, name in enumerate(self.group.fold.update)} if self.group.fold else {}
        found = [
            stmt
            for stmt in self.group.statements
            if set(defines(stmt)) <= needed
            and (self.kind[defines(stmt)[0]] == "block" or self.number[defines(stmt)[0]] == trip)
            and self.kind[defines(stmt)[0]] in ("block", "state", "inner", "of state")
        ]
        inside = [stmt for stmt in found if defines(stmt)[0] in order]
        if len(inside) == len(found):
            return tuple(sorted(found, key=lambda stmt: order[defines(stmt)[0]]))
        return tuple(found)
