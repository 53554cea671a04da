"""Programs of many devices: statements of a cascade on stretches of their ranks, and collectives between them.

    mesh tp = 4
    place W 1 over tp                            of the parameter W a device holds its stretch of dimension 1
    compute H along f over tp                    each device computes H at its stretch of f
    compute Y along f over tp at t=0:512         a slice; f is summed, so every device has a partial sum
    all-reduce Y over tp by sum at 0=0:512       and from here on the sum

All coordinates are those of the cascade. Over axes of together P devices, device number p (row-major) has the stretch
[lo + n*p//P, lo + n*(p+1)//P) of a window [lo, lo + n): stretches may be uneven, or empty. A tensor has one name
throughout: a step adds to what a device holds of it, so a gathered tensor still has its shards. A partial result can be
read by a collective only.

    all-reduce      partial -> replicated            all-gather   sharded -> replicated
    reduce-scatter  partial -> sharded on `to`       all-to-all   sharded on `from` -> sharded on `to`
    shift           device p gets stretch p + hop from its neighbour, p + 1 or p - 1
    shift by ...    device p passes its part of stretch p + hop of `to` on to the neighbour that is nearer to it

A shift with a reducer is a step of a ring that scatters partial results: a device merges its own part of a stretch with
what has come of it, and passes that on. With hop 0 the stretch has come to the device that keeps it, which merges the
last part and moves nothing.

Pure data and its text; what a program means is in `backends/distributed/simulate.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise
from typing import TypeAlias

from cascade.errors import Diagnostic, UnsupportedError
from cascade.ir import Cascade

Window: TypeAlias = tuple[int, int]
"""A half-open stretch of coordinates."""

Axes: TypeAlias = tuple[str, ...]
"""Mesh axes over which something is spread together, outermost first."""


class Kind(Enum):
    """What a collective does."""

    ALL_REDUCE = "all-reduce"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_GATHER = "all-gather"
    ALL_TO_ALL = "all-to-all"
    SHIFT = "shift"


REDUCING = (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER)


@dataclass(frozen=True, slots=True)
class Axis:
    """An axis of devices: its name and how many there are along it."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Place:
    """Of a parameter, each device holds its stretch of one dimension; without a place it holds all.

    Where the dimension is cut into slices, it holds its stretch of each.
    """

    tensor: str
    dim: int
    axes: Axes
    cuts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Along:
    """A rank of an iteration space spread over axes; with a hop, each device takes the stretch of a later device."""

    rank: str
    axes: Axes
    hop: int = 0


@dataclass(frozen=True, slots=True)
class Compute:
    """A statement, by the first name that it defines, on each device's stretches within a window of its ranks."""

    name: str
    along: tuple[Along, ...] = ()
    at: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Collective:
    """What devices along some axes exchange of one tensor, within a window of its dimensions.

    `reducer` is that of the partial results; `source` and `target` are the dimensions that are sharded before and
    after; `hop` is how far a shift has come, or of partial results how far they still go.
    """

    kind: Kind
    tensor: str
    axes: Axes
    reducer: str = ""
    source: int | None = None
    target: int | None = None
    hop: int = 0
    at: tuple[tuple[int, int, int], ...] = ()

    @property
    def passes(self) -> bool:
        """Whether it is a shift of partial results."""
        return self.kind is Kind.SHIFT and bool(self.reducer)

    @property
    def arrived(self) -> bool:
        """Whether it merges partial results that are where they stay, and moves nothing."""
        return self.passes and not self.hop


Step: TypeAlias = Compute | Collective


@dataclass(frozen=True, slots=True)
class Program:
    """A canonical cascade on a mesh: sizes of its symbols, where parameters lie, the steps in one valid order.

    Every device runs all steps.
    """

    cascade: Cascade
    axes: tuple[Axis, ...]
    sizes: tuple[tuple[str, int], ...]
    places: tuple[Place, ...]
    steps: tuple[Step, ...]

    def devices(self, axes: Axes) -> int:
        """How many devices some axes have together."""
        known = {axis.name: axis.size for axis in self.axes}
        return math.prod(known[name] for name in axes)


def stretch(window: Window, number: int, count: int) -> Window:
    """The stretch of a window that device `number` of `count` has."""
    low, high = window
    length = high - low
    return low + length * number // count, low + length * (number + 1) // count


def coordinates(axes: Sequence[Axis]) -> list[dict[str, int]]:
    """The coordinates of every device of a mesh, in row-major order."""
    found: list[dict[str, int]] = [{}]
    for axis in axes:
        found = [{**place, axis.name: number} for place in found for number in range(axis.size)]
    return found


def number_along(place: Mapping[str, int], axes: Axes, mesh: Sequence[Axis]) -> int:
    """The number of a device among those that some axes have together, row-major."""
    sizes = {axis.name: axis.size for axis in mesh}
    number = 0
    for name in axes:
        number = number * sizes[name] + place[name]
    return number


def slices(extent: int, cuts: Sequence[int]) -> list[Window]:
    """The windows that cuts make of [0, extent), in order."""
    edges = [0, *cuts, extent]
    return list(pairwise(edges))


def onward(number: int, hop: int, count: int) -> tuple[int, int]:
    """What a shift of partial results has a device pass on: which stretch, and to which device; itself with hop 0."""
    return (number + hop) % count, (number + (hop > 0) - (hop < 0)) % count


def windows_of(
    step: Compute, place: Mapping[str, int], mesh: Sequence[Axis], full: Mapping[str, Window]
) -> dict[str, Window]:
    """The windows that a device computes: those of the slice, and its stretches of them."""
    windows = {rank: (low, high) for rank, low, high in step.at}
    sizes = {axis.name: axis.size for axis in mesh}
    for along in step.along:
        count = math.prod(sizes[name] for name in along.axes)
        number = (number_along(place, along.axes, mesh) + along.hop) % count
        windows[along.rank] = stretch(windows.get(along.rank, full[along.rank]), number, count)
    return windows


# --- text ------------------------------------------------------------------------------------------------------------


def render_program(program: Program) -> str:
    """The program as text, without its cascade; `read_steps` reads it back."""
    lines = [f"mesh {axis.name} = {axis.size}" for axis in program.axes]
    lines += [f"size {name} = {size}" for name, size in program.sizes]
    for place in program.places:
        cuts = f" at {','.join(map(str, place.cuts))}" if place.cuts else ""
        lines.append(f"place {place.tensor} {place.dim} over {'*'.join(place.axes)}{cuts}")
    return "\n".join([*lines, *map(render_step, program.steps)]) + "\n"


def render_step(step: Step) -> str:
    """A step as a line."""
    if isinstance(step, Compute):
        along = [f"along {a.rank} over {'*'.join(a.axes)}" + (f" hop {a.hop}" if a.hop else "") for a in step.along]
        return " ".join(["compute", step.name, *along, *_at(step.at)])
    words = [step.kind.value, step.tensor, "over", "*".join(step.axes)]
    words += ["by", step.reducer] if step.reducer else []
    for word, value in (("from", step.source), ("to", step.target), ("hop", step.hop or None)):
        words += [] if value is None else [word, str(value)]
    return " ".join([*words, *_at(step.at)])


def _at(windows: Sequence[tuple[str | int, int, int]]) -> list[str]:
    return ["at", *(f"{what}={low}:{high}" for what, low, high in windows)] if windows else []


def read_program(text: str, cascade: Cascade) -> Program:
    """The program that a text spells, of this cascade; raises C550 with the line that is none."""
    axes: list[Axis] = []
    sizes: list[tuple[str, int]] = []
    places: list[Place] = []
    steps: list[Step] = []
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        try:
            match words:
                case []:
                    continue
                case ["mesh", name, "=", size]:
                    axes.append(Axis(name, int(size)))
                case ["size", name, "=", size]:
                    sizes.append((name, int(size)))
                case ["place", tensor, dim, "over", over, *rest] if not rest or (len(rest) == 2 and rest[0] == "at"):
                    cuts = tuple(map(int, rest[1].split(","))) if rest else ()
                    places.append(Place(tensor, int(dim), tuple(over.split("*")), cuts))
                case _:
                    steps.append(read_step(words))
        except (ValueError, IndexError, KeyError):
            message = f"line {number} of a distributed program means nothing: {line.strip()[:80]!r}"
            hint = "it is `mesh`, `size`, `place`, `compute` or a collective"
            raise UnsupportedError(Diagnostic("C550", message, help=hint)) from None
    return Program(cascade, tuple(axes), tuple(sizes), tuple(places), tuple(steps))


def read_step(words: Sequence[str]) -> Step:
    """The step that the words of a line spell; ValueError where they spell none."""
    first, name, rest = words[0], words[1], list(words[2:])
    given, at = _clauses(rest)
    if first == "compute":
        along = []
        for key, value in given:
            if key == "along":
                along.append(Along(value, ()))
            elif key == "over":
                along[-1] = Along(along[-1].rank, tuple(value.split("*")))
            elif key == "hop":
                along[-1] = Along(along[-1].rank, along[-1].axes, int(value))
            else:
                raise ValueError(key)
        return Compute(name, tuple(along), at)
    found = dict(given)
    if not set(found) <= {"over", "by", "from", "to", "hop"}:
        raise ValueError(first)
    source, target = (int(found[word]) if word in found else None for word in ("from", "to"))
    where = tuple((int(dim), low, high) for dim, low, high in at)
    axes = tuple(found["over"].split("*"))
    if first == Kind.SHIFT.value and (found.keys() & {"by", "from", "to"}) not in ({"from"}, {"by", "to"}):
        raise ValueError(first)  # of shards, from one dimension; of partial results, to one
    return Collective(Kind(first), name, axes, found.get("by", ""), source, target, int(found.get("hop", "0")), where)


def _clauses(words: list[str]) -> tuple[list[tuple[str, str]], tuple[tuple[str, int, int], ...]]:
    """The `word value` pairs of a line, and the windows behind `at`."""
    cut = words.index("at") if "at" in words else len(words)
    pairs = words[:cut]
    if len(pairs) % 2:
        raise ValueError("a word without a value")
    return list(zip(pairs[::2], pairs[1::2], strict=True)), tuple(_windows(words[cut + 1 :]))


def _windows(words: Sequence[str]) -> Iterator[tuple[str, int, int]]:
    for word in words:
        match = re.fullmatch(r"(\w+)=(\d+):(\d+)", word)
        if match is None:
            raise ValueError(word)
        yield match.group(1), int(match.group(2)), int(match.group(3))
