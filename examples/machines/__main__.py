"""Runs a cascade on modelled machines in several ways and prints a row for each, the first one of a machine being 1x.

`alone`: the Einsums as written, each between loads and stores of its own; `fused`: what the pipeline makes of them, a
region for each of its groups. Mappings of both are searched; `--mapping` adds others, of the Einsums as written. Sizes
may be lists, `-s M=1,8,64`, every combination or, with `--together`, the first of each, the second, and so on.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path

from cascade.backends.systolic.cost import Cost
from cascade.backends.systolic.report import bytes_text, seconds_text
from cascade.errors import CascadeError
from examples.machines.ways import Way, lanes, ways

BUSY = 0.005  # a share of the time from which on an Einsum or a unit is worth a word
FIRST = ("machine", "sizes", "how", "time", "", "bound by")
REST = {
    "cost": ("units used", "traffic", "on chip"),
    "units": ("Einsums by unit",),
    "lanes": ("lanes at work", "traffic"),
}


def rows(found: list[Way], on: str, sizes: Mapping[str, int], label: str, show: str) -> Iterator[tuple[str, ...]]:
    """A row for every way."""
    first: Cost | None = None
    for way in found:
        evaluator = way.evaluator(on, sizes)
        cost = evaluator.cost(sizes)
        first = first or cost
        longest = max(cost.regions, key=lambda region: region.seconds)
        row = (
            cost.machine,
            label,
            way.name,
            seconds_text(cost.seconds),
            f"{first.seconds / cost.seconds:.3g}x",
            longest.bound,
        )
        if show == "units":
            yield (*row, units(cost))
        elif show == "lanes":
            yield (*row, shares(lanes(evaluator, cost)), bytes_text(cost.traffic))
        else:
            held = max(min(region.movement.held, evaluator.machine.buffer.bytes) for region in cost.regions)
            yield (*row, shares(cost.utilisation), bytes_text(cost.traffic), bytes_text(held))


def shares(found: Mapping[str, float]) -> str:
    """The shares of units, those that are worth a word."""
    return ", ".join(f"{unit} {share:.0%}" for unit, share in found.items() if share >= BUSY)


def units(cost: Cost) -> str:
    """The Einsums of each unit that are worth a word, the longest first."""
    found: dict[str, list[str]] = {}
    for name, einsum in sorted(cost.einsums.items(), key=lambda each: -each[1].cycles):
        if einsum.cycles >= BUSY * cost.cycles:
            found.setdefault(einsum.unit, []).append(name)
    return "; ".join(f"{unit}: {' '.join(names)}" for unit, names in found.items())


def text_table(head: tuple[str, ...], body: list[tuple[str, ...]]) -> str:
    """A table whose columns are as wide as they need; one in which nothing stands is left out."""
    kept = [at for at in range(len(head)) if any(row[at] for row in body)]
    lines = [tuple(row[at] for at in kept) for row in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def size(text: str) -> tuple[str, list[int]]:
    """`M=1,8`."""
    name, _, numbers = text.partition("=")
    return name, [int(number) for number in numbers.split(",")]


def points(sizes: Mapping[str, list[int]], together: bool) -> Iterator[dict[str, int]]:
    """The sizes of each point; together, a list of one number stays that number."""
    most = max(map(len, sizes.values()), default=1)
    lists = [numbers * most if together and len(numbers) == 1 else numbers for numbers in sizes.values()]
    for numbers in zip(*lists, strict=True) if together else itertools.product(*lists):
        yield dict(zip(sizes, numbers, strict=True))


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser("python -m examples.machines", description=__doc__)
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--name", help="the cascade of that name, where the file has several")
    parser.add_argument("--machine", action="append", required=True, metavar="NAME|FILE")
    parser.add_argument("--mapping", action="append", default=[], metavar="FILE")
    parser.add_argument("-s", "--size", action="append", default=[], type=size, metavar="NAME=NUMBER,...")
    parser.add_argument(
        "--only", action="append", metavar="HOW", help="these ways alone: alone, fused, a mapping's name"
    )
    parser.add_argument("--together", action="store_true", help="lists of sizes change together")
    parser.add_argument("--show", choices=REST, default="cost", help="what the last columns are (default cost)")
    chosen = parser.parse_args(arguments)
    every = ways(Path(chosen.file).read_text(), chosen.name, chosen.mapping)
    found = [way for way in every if chosen.only is None or way.name in chosen.only]
    sizes = dict(chosen.size)
    varied = [name for name, numbers in sizes.items() if len(numbers) > 1]
    body: list[tuple[str, ...]] = []
    for on, at in itertools.product(chosen.machine, list(points(sizes, chosen.together))):
        label = " ".join(f"{name}={at[name]}" for name in varied)
        body += rows(found, on, at, label, chosen.show)
    print(text_table((*FIRST, *REST[chosen.show]), body))


if __name__ == "__main__":
    try:
        main()
    except CascadeError as error:
        raise SystemExit(str(error)) from None
