"""Where and when the Einsums of a cascade run: partitions, loop order, what stays on chip, which unit does what.

A mapping is a list of regions that run one after another. A region has loops that its stages share; stages run in turn
inside of them, each with loops of its own; the Einsums of a stage run together in every iteration. A loop names a rank
and how many of its coordinates an iteration takes, outermost first, so a rank in two loops is partitioned twice; what
no loop takes apart is spread over the lanes of a unit. In TOML:

    [[regions]]
    name = "fused"
    loops = ["b = 1", "h = 1", "rows: m = fit"]     fit: as large as the buffer allows
    keep = { Q = "rows" }                           Q stays on chip inside of the loop called `rows`
    [[regions.stages]]
    einsums = ["QK", "LM", "RM"]
    loops = ["n1 = 1", "m = 256"]
    [[regions.phases]]                              units that work at the same time; one after another
    work = { 2d = ["QK", "LM"], 1d = ["RM"] }

`keep` holds a tensor inside of a loop, by its label (the rank, where no other is given); `all` is the whole tensor,
`tile` what one iteration takes, loaded in each anew, `dram` is off chip, `registers` in the units. Left out: a tensor
from outside is loaded for every iteration that needs other elements, and one that is made stays as long as nothing must
be made twice. `spill` are tensors that may stay partly off chip where not all fits. `place` lays ranks along the sides
of an array.

A schedule has the same in its own words, `region`, `bind` and `place` (`ir.py`): `scheduled` reads them, `directives`
writes them.

`published` holds what the published evaluation of a mapping counts in another way than this model; it takes effect
only where that is asked for.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace

from cascade.backends.systolic.fields import Table, load_toml, read_text
from cascade.errors import CommandError, Diagnostic
from cascade.ir import Bind, Cascade, Directive, Loop, Phase, Place, Region, Stage
from cascade.text import render_loop
from cascade.walk import fresh

FIT = "fit"
ALL, TILE, DRAM, REGISTERS = "all", "tile", "dram", "registers"
LEVELS = (ALL, TILE, DRAM, REGISTERS)


@dataclass(frozen=True, slots=True)
class Placement:
    """The ranks along the rows and the columns of an array, and the one that streams through it.

    A side may have several ranks, `c*r`: the coordinates of one for each coordinate of the other, side by side. An
    empty text is no rank: one row, one column, or one element that goes through.
    """

    rows: str
    columns: str
    stream: str

    @property
    def sides(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The ranks along the rows and along the columns."""
        down, across = (
            [rank.strip() for rank in side.split("*")] if side else [] for side in (self.rows, self.columns)
        )
        return tuple(down), tuple(across)

    @property
    def ranks(self) -> tuple[str, ...]:
        """All of them; the others of an Einsum are gone through one coordinate at a time."""
        down, across = self.sides
        return (*down, *across, *((self.stream,) if self.stream else ()))


@dataclass(frozen=True, slots=True)
class Published:
    """What a published evaluation counts in another way: see the fields.

    Tensors whose accesses of the buffer are not counted, that are read once by all readers together, or once more;
    operations without energy; registers of one lane instead of all.
    """

    unbuffered: tuple[str, ...] = ()
    read_once: tuple[str, ...] = ()
    read_again: tuple[str, ...] = ()
    free: tuple[str, ...] = ()
    one_lane: bool = False


@dataclass(frozen=True, slots=True)
class Mapping:
    """Regions in the order in which they run, the units of Einsums that no phase names, places on arrays."""

    regions: tuple[Region, ...]
    units: tuple[tuple[str, str], ...] = ()
    place: tuple[tuple[str, Placement], ...] = ()
    published: Published = field(default_factory=Published)


# --- schedules -------------------------------------------------------------------------------------------------------


def scheduled(cascade: Cascade) -> Mapping | None:
    """The mapping that the schedule of a cascade states; None where it has no regions."""
    regions = tuple(item for item in cascade.schedule if isinstance(item, Region))
    binds = (item for item in cascade.schedule if isinstance(item, Bind))
    units = tuple((name, bind.unit) for bind in binds for name in bind.statements)
    places = (item for item in cascade.schedule if isinstance(item, Place))
    place = tuple(
        (item.statement, Placement("*".join(item.rows), "*".join(item.columns), item.stream or "")) for item in places
    )
    return Mapping(regions, units, place) if regions else None


def directives(mapping: Mapping) -> tuple[Directive, ...]:
    """A mapping as directives; what a published evaluation counts otherwise has no words in a schedule."""
    units: dict[str, list[str]] = {}
    for name, unit in mapping.units:
        units.setdefault(unit, []).append(name)
    taken: set[str] = set()
    regions = (replace(region, name=fresh(_identifier(region.name), taken)) for region in mapping.regions)
    binds = (Bind(tuple(names), unit) for unit, names in units.items())
    places = (Place(name, *at.sides, at.stream or None) for name, at in mapping.place)
    return (*regions, *binds, *places)


def with_mapping(cascade: Cascade, mapping: Mapping) -> Cascade:
    """The cascade with a mapping in its schedule, in the place of one that is there."""
    others = tuple(item for item in cascade.schedule if not isinstance(item, Region | Bind | Place))
    return replace(cascade, schedule=(*others, *directives(mapping)))


def _identifier(name: str) -> str:
    """A name of the language for the name of a region, which is any text."""
    word = re.sub(r"\W", "_", name, flags=re.ASCII)
    return word if re.match(r"[A-Za-z_]", word) else f"region_{word}"


# --- text ------------------------------------------------------------------------------------------------------------


def mapping(path: str) -> Mapping:
    """The mapping of a TOML file; raises C620 and C621 for a file that is none or has a field wrong."""
    return parse_mapping(read_text(path), path)


def parse_mapping(text: str, where: str = "mapping") -> Mapping:
    """The mapping of a TOML text; `where` names it in errors."""
    table = Table(where, "", load_toml(text, where))
    regions = tuple(_region(inner, number) for number, inner in enumerate(table.tables("regions")))
    if not regions:
        table.values.pop("regions", None)
        table.refuse("regions", "an array of tables, one for each region")
    published = table.table("published")
    found = Mapping(
        regions,
        _words(table.table("units")),
        tuple((name, _placement(table.table("place").table(name))) for name in table.table("place").names()),
        Published(
            published.texts("unbuffered", ()),
            published.texts("read_once", ()),
            published.texts("read_again", ()),
            published.texts("free", ()),
            published.flag("one_lane", False),
        ),
    )
    published.done()
    table.done()
    return found


def render_mapping(mapping: Mapping) -> str:
    """The mapping as the TOML text that reads back as it."""
    lines: list[str] = []
    for title, pairs in (("units", mapping.units),):
        if pairs:
            lines += [f"[{title}]", *(f"{name} = {_text(value)}" for name, value in pairs), ""]
    if mapping.place:
        lines.append("[place]")
        for name, at in mapping.place:
            lines.append(f'{name} = {{ rows = "{at.rows}", columns = "{at.columns}", stream = "{at.stream}" }}')
        lines.append("")
    if mapping.published != Published():
        quirks = mapping.published
        lines.append("[published]")
        for key in ("unbuffered", "read_once", "read_again", "free"):
            if value := getattr(quirks, key):
                lines.append(f"{key} = {_list(value)}")
        lines += [*(["one_lane = true"] if quirks.one_lane else []), ""]
    for region in mapping.regions:
        lines += _region_lines(region)
    return "\n".join(lines)


def _region_lines(region: Region) -> list[str]:
    lines = ["[[regions]]", f"name = {_text(region.name)}"]
    if region.loops:
        lines.append(f"loops = {_list(tuple(map(render_loop, region.loops)))}")
    if region.keep:
        lines.append(f"keep = {{ {', '.join(f'{name} = {_text(level)}' for name, level in region.keep)} }}")
    if region.spill:
        lines.append(f"spill = {_list(region.spill)}")
    if region.capacity is not None:
        lines.append(f"capacity = {region.capacity}")
    if region.double:
        lines.append("double = true")
    for stage in region.stages:
        lines += ["", "[[regions.stages]]", f"einsums = {_list(stage.statements)}"]
        if stage.loops:
            lines.append(f"loops = {_list(tuple(map(render_loop, stage.loops)))}")
    for phase in region.phases:
        work = ", ".join(f"{unit} = {_list(names)}" for unit, names in phase.work)
        lines += ["", "[[regions.phases]]", f"work = {{ {work} }}"]
        if phase.drain is not None:
            lines.append(f"drain = {_text(phase.drain)}")
    return [*lines, ""]


def _text(value: str) -> str:
    return f'"{value}"'


def _list(values: tuple[str, ...]) -> str:
    return f"[{', '.join(map(_text, values))}]"


def _region(table: Table, number: int) -> Region:
    stages = tuple(Stage(inner.texts("einsums"), _loops(inner)) for inner in table.tables("stages"))
    if not stages or not all(stage.statements for stage in stages):
        table.values.pop("stages", None)
        table.refuse("stages", "an array of tables with the Einsums of each stage")
    for inner in table.tables("stages"):
        inner.asked.update(("einsums", "loops"))
        inner.done()
    found = Region(
        table.text("name", f"region {number}"),
        stages,
        _loops(table),
        _words(table.table("keep")),
        table.texts("spill", ()),
        tuple(_phase(inner) for inner in table.tables("phases")),
        table.whole("capacity", 1, 1 << 60) if "capacity" in table.values else None,
        table.flag("double", False),
    )
    table.asked.add("capacity")
    table.done()
    _labels(found, table)
    return found


def _labels(region: Region, table: Table) -> None:
    """Raises C621 where a loop cannot be told from another, or a tensor stays inside of a loop that is none."""
    for stage in region.stages:
        labels = [loop.label for loop in (*region.loops, *stage.loops)]
        twice = next((label for label in labels if labels.count(label) > 1), None)
        if twice is not None:
            message = f"{table.where}: {table.path} has two loops called {twice}"
            raise CommandError(Diagnostic("C621", message, help=f'give one a label: "outer: {twice} = 4"'))
    known = {loop.label for stage in region.stages for loop in (*region.loops, *stage.loops)}
    for name, level in region.keep:
        if level not in known and level not in LEVELS:
            message = f"{table.where}: {table.path}.keep.{name} is {level!r}"
            hint = f"it is the label of a loop ({', '.join(sorted(known))}), all, tile, dram or registers"
            raise CommandError(Diagnostic("C621", message, help=hint))


def _phase(table: Table) -> Phase:
    work = table.table("work", needed=True)
    found = Phase(
        tuple((unit, work.texts(unit)) for unit in work.names()),
        table.text("drain") if "drain" in table.values else None,
    )
    table.asked.add("drain")
    table.done()
    return found


def _placement(table: Table) -> Placement:
    found = Placement(table.text("rows"), table.text("columns"), table.text("stream"))
    table.done()
    return found


def _words(table: Table) -> tuple[tuple[str, str], ...]:
    return tuple((name, table.text(name)) for name in table.names())


def _loops(table: Table) -> tuple[Loop, ...]:
    found = []
    for text in table.texts("loops", ()):
        match = re.fullmatch(r"(?:(\w+): *)?([A-Za-z_]\w*) *= *(fit|[1-9][0-9]{0,17})", text, re.ASCII)
        if match is None:
            place = f"{table.path}.loops" if table.path else "loops"
            hint = 'it is "rank = size" or "label: rank = size", with a number or fit, such as "m = 256"'
            raise CommandError(Diagnostic("C621", f"{table.where}: {place} has {text!r}", help=hint))
        label, rank, size = match.groups()
        found.append(Loop(rank, None if size == FIT else int(size), label or rank))
    return tuple(found)


def loop(text: str) -> Loop:
    """One loop from its text."""
    return _loops(Table("loop", "", {"loops": [text]}))[0]
