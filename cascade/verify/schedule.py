"""Rules about the schedule: what it names exists, its numbers make sense, and its fused groups can stream.

The rule for groups is on purpose not built on the analysis that the fusing pass uses: if the two shared code, they
would be wrong together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import assert_never

from cascade.errors import Diagnostic, Note, Span, quoted_list
from cascade.ir import (
    Bind, Call, Einsum, Fold, Fuse, GroupBy, Loop, Mesh, Part, Place, Rank, Read, Reduce, Region, Shard, Split, Stmt,
    Stream, Tile, TopK, Use, Wait,
)  # fmt: skip
from cascade.scopes import Facts
from cascade.verify.cycles import offset
from cascade.verify.program import Program, cyclic, strongly_connected
from cascade.verify.statements import ranks_in_sight
from cascade.walk import defines, fold_parts, reads, targets, walk
from cascade.wording import pinpoint, quote, suggest


def check_schedule_names(program: Program) -> Iterator[Diagnostic]:
    """C240: the ranks, statements, axes and parts that a schedule names exist."""
    ranks = sorted(frozenset[str]().union(*map(ranks_in_sight, program.facts)))
    axes = [directive.axis for directive in program.cascade.schedule if isinstance(directive, Mesh)]
    for directive in program.cascade.schedule:
        match directive:
            case Mesh():
                pass
            case Shard():
                yield from _unknown(directive.rank, "rank variable", ranks, directive.span)
                yield from _unknown(directive.axis, "mesh axis", axes, directive.span, "over")
            case Split():
                yield from _unknown(directive.rank, "rank variable", ranks, directive.span)
            case Fuse():
                for name in directive.statements:
                    yield from _unknown(name, "statement", program.owner, directive.span)
                yield from _unknown(directive.rank, "rank variable", ranks, directive.span, "over")
            case Fold():
                yield from _unknown(directive.rank, "rank variable", ranks, directive.span)
                yield from _unknown_in_fold(directive, program)
            case GroupBy():
                for name in directive.statements:
                    yield from _unknown(name, "statement", program.owner, directive.span)
                yield from _unknown(directive.key.tensor, "tensor", program.arity, directive.key.span, "")
                for index in directive.key.index:
                    for node in walk(index):
                        if isinstance(node, Rank):
                            yield from _unknown(node.name, "rank variable", ranks, node.span)
            case Tile():
                for rank, _ in directive.sizes:
                    yield from _unknown(rank, "rank variable", ranks, directive.span)
            case Stream():
                for part in directive.parts:
                    yield from _unknown_part(part, program)
            case Wait():
                yield from _unknown_part(directive.part, program)
                yield from _unknown_part(directive.on, program)
            case Region() | Bind() | Place():
                yield from _unknown_in_mapping(directive, ranks, program)
            case _:
                assert_never(directive)


def _unknown(name: str, what: str, known: Iterable[str], span: Span | None, after: str = "") -> Iterator[Diagnostic]:
    if name not in known:
        plural = "mesh axes" if what == "mesh axis" else f"{what}s"
        hint = suggest(name, known, plural)
        if what == "mesh axis":
            hint += f"; declare it: mesh {name} = 8"
        yield Diagnostic("C240", f"there is no {what} {quote(name)}", pinpoint(span, name, after), hint)


def _unknown_in_fold(fold: Fold, program: Program) -> Iterator[Diagnostic]:
    for line in ("state", "update", "finalize"):
        for name in getattr(fold, line):
            yield from _unknown(name, "statement", program.owner, fold.span, line)
    for part in fold_parts(fold):
        yield from _unknown(part.target.name, "statement", program.owner, part.target.span)


def _unknown_in_mapping(
    directive: Region | Bind | Place, ranks: Sequence[str], program: Program
) -> Iterator[Diagnostic]:
    """Statements, ranks and tensors that where and when things run is said of."""
    match directive:
        case Region():
            for stage in directive.stages:
                for name in stage.statements:
                    yield from _unknown(name, "statement", program.owner, stage.span)
            for loop in loops_of(directive):
                yield from _unknown(loop.rank, "rank variable", ranks, loop.span)
            for name in (*(name for name, _ in directive.keep), *directive.spill):
                yield from _unknown(name, "tensor", program.arity, directive.span)
        case Bind():
            for name in directive.statements:
                yield from _unknown(name, "statement", program.owner, directive.span)
        case Place():
            yield from _unknown(directive.statement, "statement", program.owner, directive.span)
            for rank in (*directive.rows, *directive.columns, *((directive.stream,) if directive.stream else ())):
                yield from _unknown(rank, "rank variable", ranks, directive.span, "on")
        case _:
            assert_never(directive)


def loops_of(region: Region) -> tuple[Loop, ...]:
    """All loops of a region, those that its stages share first."""
    return (*region.loops, *(loop for stage in region.stages for loop in stage.loops))


def _unknown_part(part: Part, program: Program) -> Iterator[Diagnostic]:
    yield from _unknown(part.name, "statement", program.owner, part.span)
    if part.name not in program.owner or part.index is None:
        return
    fact = program.facts[program.owner[part.name]]
    in_sight = None if isinstance(fact.stmt, Call) else ranks_in_sight(fact)
    splits = [
        directive
        for directive in program.cascade.schedule
        if isinstance(directive, Split) and (in_sight is None or directive.rank in in_sight)
    ]
    if not splits:
        hint = f"split one of its ranks: split {next(iter(sorted(in_sight or ())), 't')} into 2"
        yield Diagnostic("C240", f"nothing splits {quote(part.name)}: it has no parts", part.span, hint)
        return
    counts = [len(split.cuts) + 1 if split.cuts else split.parts for split in splits]
    most = 1
    for count in counts:
        if not isinstance(count, int):
            return
        most *= count
    if part.index >= most > 0:
        hint = f"its parts are {quoted_list(f'{part.name}.{i}' for i in range(min(most, 9)))}"
        yield Diagnostic("C240", f"{quote(part.name)} has no part {part.index}", part.span, hint)


def check_schedule_numbers(program: Program) -> Iterator[Diagnostic]:
    """C241: axes, parts and tiles have extents of 1 or more; cuts rise and lie inside the rank."""
    for directive in program.cascade.schedule:
        match directive:
            case Mesh():
                yield from _below_one(directive.size, f"axis {quote(directive.axis)}", directive.span)
            case Split():
                yield from _split_numbers(directive, program)
            case Tile():
                for rank, size in directive.sizes:
                    yield from _below_one(size, f"the tile of {quote(rank)}", directive.span)
            case Region():
                for loop in loops_of(directive):
                    yield from _below_one(loop.size, f"the loop over {quote(loop.rank)}", loop.span)
                if directive.capacity is not None:
                    what = f"the capacity of {quote(directive.name)}"
                    yield from _below_one(directive.capacity, what, directive.span)
            case _:
                pass


def _below_one(size: int | str | None, what: str, span: Span | None) -> Iterator[Diagnostic]:
    if isinstance(size, int) and size < 1:
        yield Diagnostic("C241", f"{what} has extent {size}", pinpoint(span, str(size), "="), "write 1 or more")


def _split_numbers(split: Split, program: Program) -> Iterator[Diagnostic]:
    if (split.parts is None) == (not split.cuts):
        hint = f"split {split.rank} into 2, or split {split.rank} at 4096"
        yield Diagnostic("C241", "a split has a number of parts, or cuts", split.span, hint)
    elif isinstance(split.parts, int) and split.parts < 1:
        yield Diagnostic(
            "C241", f"{quote(split.rank)} is split into {split.parts} parts", split.span, "write 1 or more"
        )
    extent = program.inference.shapes.ranks.get(split.rank)
    before = 0
    for cut in split.cuts:
        place = pinpoint(split.span, str(cut), "at")
        if cut <= before:
            message = f"the cut {cut} does not lie behind {before}"
            yield Diagnostic(
                "C241", message, place, "cuts are positive and rise: each starts a part with something in it"
            )
        elif isinstance(extent, int) and cut >= extent:
            message = f"the cut {cut} lies outside of {quote(split.rank)}, which has extent {extent}"
            yield Diagnostic("C241", message, place, f"cut below {extent}")
        before = max(before, cut)


def check_schedule_twice(program: Program) -> Iterator[Diagnostic]:
    """C245: a schedule says each thing once."""
    first: dict[tuple[str, ...], Span | None] = {}
    for key, what, span in _said(program):
        if key in first:
            note = Note("first here", first[key])
            yield Diagnostic("C245", f"{what} twice", span, "keep one of the two", (note,) if note.span else ())
        first.setdefault(key, span)
    groups = [directive for directive in program.cascade.schedule if isinstance(directive, (Fuse, Fold))]
    yield from _overlapping(groups, program)


def _said(program: Program) -> Iterator[tuple[tuple[str, ...], str, Span | None]]:
    """What every directive settles: a key, the words for a message, the place."""
    for number, directive in enumerate(program.cascade.schedule):
        span = directive.span
        match directive:
            case Mesh():
                yield ("mesh", directive.axis), f"axis {quote(directive.axis)} is declared", span
            case Shard():
                key = ("shard", directive.rank, directive.axis)
                yield key, f"{quote(directive.rank)} is sharded over {quote(directive.axis)}", span
            case Split():
                yield ("split", directive.rank), f"{quote(directive.rank)} is split", span
            case Fuse() | Fold():
                for name in statements_of(directive):
                    key = ("fuse", str(program.owner.get(name, name)), directive.rank)
                    verb = "fused" if isinstance(directive, Fuse) else "folded"
                    what = f"{quote(name)} is {verb} over {quote(directive.rank)}"
                    yield key, what, pinpoint(span, name, "" if isinstance(directive, Fuse) else "update")
                if isinstance(directive, Fold):
                    yield from _said_in_fold(directive, str(number))
            case GroupBy():
                for name in directive.statements:
                    one = ("group", str(program.owner.get(name, name)))
                    yield one, f"{quote(name)} is grouped", pinpoint(span, name)
            case Tile():
                for rank, _ in directive.sizes:
                    yield ("tile", rank), f"{quote(rank)} is tiled", pinpoint(span, rank)
            case Stream():
                yield ("stream", directive.name), f"stream {quote(directive.name)} is declared", span
                for part in directive.parts:
                    owner = str(program.owner.get(part.name, part.name))  # one statement may have two names
                    yield ("part", owner, str(part.index)), f"{part_text(part)} is in a stream", part.span
            case Wait():
                key = ("wait", part_text(directive.part), part_text(directive.on))
                yield key, f"{part_text(directive.part)} waits on {part_text(directive.on)}", span
            case Region():
                yield ("region", directive.name), f"region {quote(directive.name)} is declared", span
                for stage in directive.stages:
                    for name in stage.statements:
                        runs = ("stage", str(program.owner.get(name, name)))
                        yield runs, f"{quote(name)} runs in a region", pinpoint(stage.span, name)
                for name, _ in directive.keep:
                    yield ("keep", directive.name, name), f"{quote(name)} is kept", span
            case Bind():
                for name in directive.statements:
                    yield ("bind", str(program.owner.get(name, name))), f"{quote(name)} is bound", pinpoint(span, name)
            case Place():
                yield ("place", directive.statement), f"{quote(directive.statement)} is placed", span
            case _:
                assert_never(directive)


def _said_in_fold(fold: Fold, number: str) -> Iterator[tuple[tuple[str, ...], str, Span | None]]:
    """What the lines of one fold settle, its updates aside."""
    for name in fold.state:
        yield ("state", number, name), f"{quote(name)} is in the state", pinpoint(fold.span, name, "state")
    for name in fold.finalize:
        yield ("finalize", number, name), f"{quote(name)} is finalized", pinpoint(fold.span, name, "finalize")
    for init in fold.init:
        yield ("init", number, init.target.name), f"the first {quote(init.target.name)} is given", init.span
    for merge in fold.merge:
        yield ("merge", number, merge.target.name), f"the merge of {quote(merge.target.name)} is given", merge.span


def statements_of(group: Fuse | Fold) -> tuple[str, ...]:
    """The statements that one trip computes, by the names that the schedule gives."""
    return group.statements if isinstance(group, Fuse) else group.update


def part_text(part: Part) -> str:
    """A part as the schedule writes it: `mlp.1`."""
    return part.name if part.index is None else f"{part.name}.{part.index}"


def _overlapping(groups: Sequence[Fuse | Fold], program: Program) -> Iterator[Diagnostic]:
    """Two groups with a statement in common must be one inside of the other."""
    members: dict[int, list[int]] = {}
    for number, group in enumerate(groups):
        for statement in {program.owner[name] for name in statements_of(group) if name in program.owner}:
            members.setdefault(statement, []).append(number)
    told: set[tuple[int, int]] = set()
    for statement, numbers in sorted(members.items()):
        for one, other in pairwise(numbers):
            outer, inner = groups[one], groups[other]
            nested = set(statements_of(inner)) <= set(statements_of(outer))
            if nested or outer.rank == inner.rank or (one, other) in told:
                continue
            told.add((one, other))
            name = defines(program.facts[statement].stmt)[0]
            message = f"{quote(name)} is in two groups, and the second is not inside of the first"
            note = Note("the first group", outer.span)
            hint = "write the larger group first, and only statements of it in the other"
            yield Diagnostic("C245", message, inner.span, hint, (note,) if note.span else ())


LEVELS = ("all", "tile", "dram", "registers")


def check_regions(program: Program) -> Iterator[Diagnostic]:
    """C254: the loops of a region can be told apart, and what it names is its own."""
    regions = [directive for directive in program.cascade.schedule if isinstance(directive, Region)]
    for region in regions:
        yield from _labels(region)
        inside = {program.owner[name] for name in region.statements if name in program.owner}
        stmts = [program.facts[number].stmt for number in sorted(inside)]
        touched = dict.fromkeys(name for stmt in stmts for name in (*defines(stmt), *reads(stmt)))
        for name in (*(name for name, _ in region.keep), *region.spill):
            if name in program.arity and name not in touched:
                message = f"nothing in region {quote(region.name)} touches {quote(name)}"
                yield Diagnostic("C254", message, region.span, suggest(name, touched, "its tensors are"))
        for phase in region.phases:
            for name in (name for _, names in phase.work for name in names):
                if program.owner.get(name) not in inside:
                    message = f"a phase of {quote(region.name)} runs {quote(name)}, which none of its stages does"
                    hint = suggest(name, region.statements, "its statements are")
                    yield Diagnostic("C254", message, pinpoint(phase.span, name), hint)


def _labels(region: Region) -> Iterator[Diagnostic]:
    """Loops around one statement have different labels, and a tensor stays inside of one of them or at a level."""
    for stage in region.stages:
        seen: set[str] = set()
        for loop in (*region.loops, *stage.loops):
            if loop.label in seen:
                message, hint = f"two loops are called {quote(loop.label)}", f"give one a label: outer: {loop.rank} = 4"
                yield Diagnostic("C254", message, loop.span, hint)
            seen.add(loop.label)
    known = [*dict.fromkeys(loop.label for loop in loops_of(region)), *LEVELS]
    for name, level in region.keep:
        if level not in known:
            message = f"{quote(name)} is kept in {quote(level)}, which is no loop of region {quote(region.name)}"
            yield Diagnostic("C254", message, region.span, suggest(level, known, "its loops and the other levels are"))


def check_waits(program: Program) -> Iterator[Diagnostic]:
    """C246: no part waits for itself, through the order of streams and other waits."""
    number: dict[tuple[int | str, int | None], int] = {}
    parts: list[Part] = []
    pairs: list[tuple[Part, Part]] = []
    for directive in program.cascade.schedule:
        if isinstance(directive, Stream):
            pairs += ((later, part) for part, later in pairwise(directive.parts) if later != part)
        elif isinstance(directive, Wait):
            pairs.append((directive.part, directive.on))
    keys = [(program.owner.get(part.name, part.name), part.index) for pair in pairs for part in pair]
    for key, part in zip(keys, (part for pair in pairs for part in pair), strict=True):
        if number.setdefault(key, len(parts)) == len(parts):
            parts.append(part)
    edges: list[list[int]] = [[] for _ in parts]
    for key, on in zip(keys[::2], keys[1::2], strict=True):
        edges[number[key]].append(number[on])
    for members in strongly_connected(edges):
        if cyclic(members, edges):
            listed = quoted_list(part_text(parts[i]) for i in members)
            message = f"{listed} waits for itself" if len(members) == 1 else f"{listed} wait for each other"
            hint = "a stream runs its parts in order: drop a wait, or change the order"
            yield Diagnostic("C246", message, parts[members[0]].span, hint)


# --- fused groups ----------------------------------------------------------------------------------------------------


def check_groups(program: Program) -> Iterator[Diagnostic]:
    """C242 to C244, C247, C248: a group can be computed in one trip over its rank, block by block."""
    ranks = frozenset[str]().union(*map(ranks_in_sight, program.facts))
    for directive in program.cascade.schedule:
        if isinstance(directive, Fuse) and directive.rank in ranks:
            members = dict.fromkeys(program.owner[name] for name in directive.statements if name in program.owner)
            refused = {number: tuple(member(directive, number, program)) for number in members}
            for found in refused.values():
                yield from found
            yield from _streams(directive, [number for number in members if not refused[number]], program)
            yield from closed(directive, list(members), program)


def member(group: Fuse | Fold, number: int, program: Program) -> Iterator[Diagnostic]:
    """C242, C243 for one statement of a group, or of a fold that does not need it all the same."""
    fact = program.facts[number]
    stmt = fact.stmt
    name = next(name for name in statements_of(group) if program.owner.get(name) == number)
    place = pinpoint(group.span, name, "" if isinstance(group, Fuse) else "update")
    why = not_canonical(stmt)
    if why:
        yield Diagnostic(
            "C242", f"{quote(name)} {why}", place, "fuse statements of one Einsum each: canonicalize first"
        )
    elif not carries(stmt, group.rank) and not reduces(stmt, group.rank):
        message = f"{quote(name)} neither has the rank {quote(group.rank)} nor reduces it"
        yield Diagnostic("C243", message, place, "leave it out of the group: it runs before or behind the trip")


def not_canonical(stmt: Stmt) -> str:
    """Why a statement is not one Einsum, with one reduction at most and that at the top; "" where it is."""
    if isinstance(stmt, Call):
        return f"uses the cascade {quote(stmt.callee)}"
    top = stmt.expr if isinstance(stmt, Einsum) else stmt.body
    inside = top.body if isinstance(stmt, Einsum) and isinstance(top, Reduce) else top
    others = [] if stmt.where is None else [stmt.where]
    others += [init.expr for init in stmt.inits] if isinstance(stmt, Einsum) else []
    for expr in (inside, *others):
        for node in walk(expr):
            if isinstance(node, Use):
                return f"uses {quote(node.function)}"
            if isinstance(node, Reduce):
                return f"holds a reduction, {node.reducer}[{','.join(node.ranks)}], that is not at its top"
    return ""


def carries(stmt: Stmt, rank: str) -> bool:
    """Whether what the statement defines has the rank: each block of it is final."""
    return any(rank in target.ranks for target in targets(stmt))


def reduces(stmt: Stmt, rank: str) -> bool:
    """Whether the statement folds the rank: what it defines is final behind the last block only."""
    if isinstance(stmt, TopK):
        return stmt.rank == rank
    return isinstance(stmt, Einsum) and isinstance(stmt.expr, Reduce) and rank in stmt.expr.ranks


def _streams(group: Fuse, members: Sequence[int], program: Program) -> Iterator[Diagnostic]:
    """C244, C247: what a member reads of another is final, and computed, when its block comes."""
    rank = quote(group.rank)
    for number in members:
        name = quote(defines(program.facts[number].stmt)[0])
        told: set[str] = set()
        for read in reads_of(program.facts[number], members, program):
            producer = program.facts[program.owner[read.tensor]].stmt
            reduced = not carries(producer, group.rank)
            if read.tensor in told or not (reduced or runs_ahead(read, group.rank, program)):
                continue
            told.add(read.tensor)
            if reduced:
                message = f"{name} reads {quote(read.tensor)}, which this group is still reducing over {rank}"
                note = Note(f"{quote(read.tensor)} is reduced here", producer.span)
                hint = f"end the group before {name}: it needs another trip over {rank}, with a group of its own"
                yield Diagnostic("C244", message, read.span, hint, (note,) if note.span else ())
            else:
                yield ahead(name, read, group.rank)


def ahead(name: str, read: Read, rank: str) -> Diagnostic:
    """C247 for a read of what has the rank."""
    message = f"{name} reads {quote(read.tensor)} outside of the block of {quote(rank)} that is at hand"
    return Diagnostic("C247", message, read.span, f"inside the group it may be read at {rank}, {rank}-1 and before")


def reads_of(fact: Facts, members: Sequence[int], program: Program) -> Iterator[Read]:
    """What a member reads of the group."""
    for scan in fact.scans():
        for read, _ in scan.reads:
            if program.owner.get(read.tensor) in members and program.arity.get(read.tensor) == len(read.index):
                yield read


def runs_ahead(read: Read, rank: str, program: Program) -> bool:
    """Whether a read may touch a coordinate of the rank that the trip has not come to."""
    found = offset(read.index[program.targets[read.tensor].ranks.index(rank)])
    return found is None or found[0] != rank or found[1] > 0


def closed(group: Fuse | Fold, members: Sequence[int], program: Program) -> Iterator[Diagnostic]:
    """C248: nothing that a member needs waits for another member to finish."""
    inside = set(members)
    below: dict[int, int] = {}  # outside statements that a member needs, each with who needs it
    todo = list(members)
    for number in todo:
        for other in program.needs[number]:
            if other in inside and number in inside:
                continue
            if other in inside:
                needed, between = defines(program.facts[other].stmt)[0], defines(program.facts[number].stmt)[0]
                message = (
                    f"{quote(between)} stands outside of the group, needs {quote(needed)} of it, and the group needs it"
                )
                hint = "put it into the group, or end the group before what needs it"
                after = "" if isinstance(group, Fuse) else "update"
                yield Diagnostic("C248", message, pinpoint(group.span, needed, after), hint)
                return
            if other not in below:
                below[other] = number
                todo.append(other)
