"""A spatial machine: arrays and vector units with a table of operations each, one shared buffer, paths to memory.

A machine is a TOML file, one of those in `machines/` or a user's own. It may extend a shipped one, whose fields hold
where it says nothing:

    extends = "fusemax"                     rows and columns of an array, energies of another process, ...
    units.1d.operations.div = false         a table that is false is taken out

    clock_hz = 940e6                        cycles a second, of everything
    word_bytes = 2                          of an element whose type nobody states
    [memories.dram]                         a path to memory: bytes a second, bytes and pJ an access
    bandwidth = 429496729600
    access_bytes = 8
    energy = 249.6
    [buffer]                                what all units share: bytes, bytes an access, pJ a read and a write
    bytes = 16777216
    access_bytes = 512
    [units.2d]                              an array of rows * columns lanes; one of one row is a vector unit
    rows = 256
    columns = 256
    fill = false                            whether filling and draining an array takes its time
    [units.2d.operations]                   what one lane can do
    mac = { cycles = 1, energy = 1.5 }      a product whose result is added: `mul-add`; pJ, and `area`, um^2 of a lane
    exp = { made_of = { mac = 6 } }         as long, and as much energy, as what it is made of
    [units.2d.registers]                    of one lane: pJ a read and a write of a word; `area`
    read = 0.3
    write = 0.2

Operations are those of the language; `sub` and `neg` are an `add` and `min` is a `max` where the table does not say
otherwise, and `other` stands for all that it does not name. Two operations in a row may be one, `sub-exp`: the first
feeds the second. What the language counts as free (comparisons, choices, casts, indices) takes no time here either.

Energies (pJ: `energy` of an operation and of an access of memory, `read` and `write` of registers and the buffer) and
areas (um^2) may be left out; what depends on them is then unknown. The text `energies` says where they are from. GPUs
are modelled where kernels are planned for them, in `backends/triton/machine.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import PurePath
from types import MappingProxyType
from typing import Any

from cascade.backends.systolic.fields import Table, load_toml, read_text
from cascade.errors import CommandError, Diagnostic
from cascade.ops import OPS
from cascade.wording import quote, suggest

SAME = MappingProxyType({"sub": "add", "neg": "add", "min": "max", "relu": "max", "clamp": "max", "mul": "mac"})
"""Operations that lanes for another can do, where a table names only that one."""

FUSED = "mul-add"
MAC = "mac"
OTHER = "other"
MOST = 2.0**60


@dataclass(frozen=True, slots=True)
class Operation:
    """What one operation takes on one lane: cycles, pJ and um^2; None where nobody says."""

    cycles: int
    energy: float | None = None
    area: float | None = None


@dataclass(frozen=True, slots=True)
class Registers:
    """The registers of one lane: pJ a read and a write of a word, um^2."""

    read: float
    write: float
    area: float | None = None


@dataclass(frozen=True, slots=True)
class Unit:
    """An array of lanes that work in step. `fill` is whether data enter at its edges and take their time through it."""

    name: str
    rows: int
    columns: int
    operations: Mapping[str, Operation]
    memory: str
    fill: bool = False
    registers: Registers | None = None

    @property
    def lanes(self) -> int:
        """How many operations go on at once."""
        return self.rows * self.columns

    def operation(self, name: str) -> Operation | None:
        """What an operation takes here; None where the unit cannot do it."""
        named = self.operations.get(name)
        if named is None and name in SAME:
            named = self.operations.get(SAME[name])
        if named is None and "-" not in name:
            named = self.operations.get(OTHER)
        return named


@dataclass(frozen=True, slots=True)
class Memory:
    """A path to memory: bytes a second, bytes and pJ an access."""

    name: str
    bandwidth: float
    access_bytes: int
    energy: float | None = None


@dataclass(frozen=True, slots=True)
class Buffer:
    """What units share on chip: bytes; bytes, pJ of an access; um^2."""

    bytes: int
    access_bytes: int
    read: float | None = None
    write: float | None = None
    area: float | None = None


@dataclass(frozen=True, slots=True)
class Machine:
    """A spatial machine; `source` says where its numbers are from, `energies` where those of energy and area are."""

    name: str
    source: str
    energies: str
    clock_hz: float
    word_bytes: int
    buffer: Buffer
    memories: Mapping[str, Memory]
    units: Mapping[str, Unit]

    def area(self) -> float | None:
        """The um^2 of lanes, registers and buffer; None where one of them is unknown."""
        parts: list[float | None] = [self.buffer.area]
        for unit in self.units.values():
            lane = [op.area for op in unit.operations.values()] + [unit.registers.area if unit.registers else 0.0]
            known = [area for area in lane if area is not None]
            parts.append(sum(known) * unit.lanes if len(known) == len(lane) else None)
        found = [part for part in parts if part is not None]
        return sum(found) if len(found) == len(parts) else None


# --- files -----------------------------------------------------------------------------------------------------------


def shipped() -> tuple[str, ...]:
    """The names of the machines that come with the project."""
    folder = resources.files("cascade.backends.systolic") / "machines"
    return tuple(sorted(PurePath(entry.name).stem for entry in folder.iterdir() if entry.name.endswith(".toml")))


def machine(name: str) -> Machine:
    """The shipped machine of that name, or the one of a file whose name ends in `.toml`.

    Raises C605 for a name that is none, C620 and C621 for a file that is none or has a field wrong.
    """
    if name.endswith(".toml"):
        return parse_machine(read_text(name), name)
    return parse_machine(_shipped_text(name), f"machine {name}")


def parse_machine(text: str, where: str = "machine") -> Machine:
    """The machine of a TOML text; `where` names it in errors."""
    return from_tables(load_toml(text, where), where)


def from_tables(tables: Mapping[str, Any], where: str = "machine") -> Machine:
    """The machine of the tables of a TOML file."""
    values = dict(tables)
    base = values.pop("extends", None)
    if base is not None:
        if not isinstance(base, str):
            raise CommandError(Diagnostic("C621", f"{where}: extends is {base!r}", help="it is the name of a machine"))
        values = _over(load_toml(_shipped_text(base), f"machine {base}"), values)
    return _machine(Table(where, "", values))


def _shipped_text(name: str) -> str:
    if name not in shipped():
        hint = suggest(name, shipped(), "machines of this model are")
        raise CommandError(Diagnostic("C605", f"no machine is named {quote(name)}", help=hint))
    return (resources.files("cascade.backends.systolic") / "machines" / f"{name}.toml").read_text(encoding="utf-8")


def _over(base: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    """A table with the fields of another in their places; false takes a table out."""
    found = dict(base)
    for key, value in change.items():
        old = found.get(key)
        found[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        if isinstance(old, dict) and value is False:
            del found[key]
    return found


def _machine(table: Table) -> Machine:
    memories = {name: _memory(table.table("memories").table(name), name) for name in table.table("memories").names()}
    if not memories:
        table.values.pop("memories", None)
        table.refuse("memories", "a table with a table for each path to memory")
    units = {name: _unit(table.table("units").table(name), name, memories) for name in table.table("units").names()}
    if not units:
        table.values.pop("units", None)
        table.refuse("units", "a table with a table for each array and vector unit")
    found = Machine(
        table.text("name"),
        table.text("source", ""),
        table.text("energies", ""),
        table.number("clock_hz", 1.0, 1e15),
        _word(table),
        _buffer(table.table("buffer", needed=True)),
        MappingProxyType(memories),
        MappingProxyType(units),
    )
    table.asked.update(("memories", "units"))
    table.done()
    return found


def _word(table: Table) -> int:
    found = table.whole("word_bytes", 1, 8, 2)
    if found not in (1, 2, 4, 8):
        table.refuse("word_bytes", "1, 2, 4 or 8")
    return found


def _memory(table: Table, name: str) -> Memory:
    found = Memory(
        name,
        table.number("bandwidth", 1.0, 1e18),
        table.whole("access_bytes", 1, 1 << 20, 1),
        table.maybe("energy", 0.0, 1e15),
    )
    table.done()
    return found


def _buffer(table: Table) -> Buffer:
    found = Buffer(
        table.whole("bytes", 1, 1 << 60),
        table.whole("access_bytes", 1, 1 << 20, 1),
        table.maybe("read", 0.0, 1e15),
        table.maybe("write", 0.0, 1e15),
        table.maybe("area", 0.0, 1e18),
    )
    table.done()
    return found


def _unit(table: Table, name: str, memories: Mapping[str, Memory]) -> Unit:
    rows, columns = table.whole("rows", 1, 1 << 30, 1), table.whole("columns", 1, 1 << 30)
    operations = _operations(table.table("operations", needed=True))
    registers = None
    if "registers" in table.values:
        inner = table.table("registers")
        registers = Registers(
            inner.number("read", 0.0, 1e15), inner.number("write", 0.0, 1e15), inner.maybe("area", 0.0, 1e15)
        )
        inner.done()
    memory = table.choice("memory", tuple(memories), next(iter(memories)))
    found = Unit(name, rows, columns, operations, memory, table.flag("fill", False), registers)
    table.done()
    return found


def _operations(table: Table) -> Mapping[str, Operation]:
    found: dict[str, Operation] = {}
    made: list[tuple[str, Table]] = []
    for name in table.names():
        _known(table, name)
        inner = table.table(name)
        if "made_of" in inner.values:
            made.append((name, inner))
        else:
            energy, area = inner.maybe("energy", 0.0, 1e15), inner.maybe("area", 0.0, 1e15)
            found[name] = Operation(inner.whole("cycles", 0, 1 << 30), energy, area)
            inner.done()
    for name, inner in made:
        found[name] = _made(inner, found)
    return MappingProxyType(found)


def _made(table: Table, found: Mapping[str, Operation]) -> Operation:
    """An operation done by others: their cycles and energies, no area of its own."""
    parts = table.table("made_of")
    cycles, energy = 0, 0.0
    known = True
    for name in parts.names():
        if name not in found:
            parts.refuse(name, f"an operation of the same table: {', '.join(found)}")
        times = parts.whole(name, 0, 1 << 20)
        cycles += times * found[name].cycles
        known &= found[name].energy is not None
        energy += times * (found[name].energy or 0.0)
    table.done()
    return Operation(cycles, energy if known else None, 0.0)


def _known(table: Table, name: str) -> None:
    """Raises C621 for an operation that the language does not have."""
    parts = [part for part in name.split("-") if part]
    known = all(part in OPS for part in parts) and 1 <= len(parts) <= 2 and "-".join(parts) == name
    if not (known or name in (MAC, OTHER)):
        place = f"{table.path}.{name}"
        hint = suggest(name, (MAC, OTHER, *OPS), "operations are, alone or two as in sub-exp,")
        raise CommandError(Diagnostic("C621", f"{table.where}: {place} is no operation", help=hint))
