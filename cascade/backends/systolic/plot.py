"""Rows of a sweep as figures: use of units, time, speed-up, energy, a roofline, what no other point beats.

What is compared is a machine under a mapping; the axis is the symbol with most sizes, and of the other symbols the
first sizes. Of a front the fastest mapping is drawn, and all of them where the front is. A page is HTML with SVG in it
and no script, so that it opens anywhere and can be compared as text; pictures are drawn by matplotlib (`picture.py`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from cascade.backends.systolic.machine import machine
from cascade.backends.systolic.report import bytes_text, seconds_text

Row: TypeAlias = dict[str, Any]
Series: TypeAlias = dict[str, list[tuple[float, float]]]

WIDTH, HEIGHT, LEFT, BOTTOM = 640.0, 240.0, 70.0, 30.0
BAR = 0.8  # of the room of a group
COLOURS = ("#457b9d", "#e76f51", "#2a9d8f", "#e9c46a", "#8d99ae", "#9b5de5", "#264653", "#f4a261")
HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; max-width: 720px; margin: 2em auto; padding: 0 1em }}
h2 {{ font-size: 1.1em; margin: 1.6em 0 .3em }} svg {{ width: 100% }} text {{ font-size: 11px; fill: currentColor }}
@media (prefers-color-scheme: dark) {{ body {{ background: #181818; color: #ddd }} }}
</style></head><body><h1>{title}</h1>
"""


Bars: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Heights by group, by bar in it, by part of the bar."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Lines and dots over two axes, each logarithmic or from 0, or bars; `show` writes what is drawn upwards."""

    kind: str
    title: str
    show: Callable[[float], str]
    lines: Series = field(default_factory=dict)
    dots: Series | None = None  # those of the lines
    logs: tuple[bool, bool] = (True, True)
    bars: Bars = field(default_factory=dict)


KINDS = ("utilisation", "time", "speedup", "energy", "roofline", "pareto")


def figures(rows: Sequence[Row], symbols: Sequence[str], kinds: Sequence[str] = KINDS) -> list[Figure]:
    """The figures of a sweep over some symbols, those of some kinds."""
    every = along(rows, symbols)
    best = [row for row in every if not row.get("choice")]
    if not best:
        return []
    axis, _ = _axis(best, symbols)
    found = []
    for column in dict.fromkeys(name for row in best for name in row if name.startswith("utilisation_")):
        title = f"Use of {column.removeprefix('utilisation_')} by {axis}"
        found.append(Figure("utilisation", title, percent, series(best, axis, column), logs=(True, False)))
    found.append(Figure("time", f"Time by {axis}", seconds_text, series(best, axis, "latency_s")))
    found.append(Figure("speedup", f"Speed-up over the first by {axis}", times, bars=speed_ups(best, axis)))
    if energies := energy_parts(best, axis):
        of = ", ".join(dict.fromkeys(map(label, best)))  # in the order of the bars
        found.append(Figure("energy", f"Energy by {axis} of {of}", joules, bars=energies))
    found += [roofline(best), pareto(every, axis)]
    return [figure for figure in found if figure.kind in kinds]


def along(rows: Sequence[Row], symbols: Sequence[str]) -> list[Row]:
    """The rows that ran, those along the axis."""
    good = [row for row in rows if "error" not in row]
    _, first = _axis(good, symbols)
    return [row for row in good if all(row[name] == size for name, size in first.items())]


def fixed_sizes(rows: Sequence[Row], symbols: Sequence[str]) -> str:
    """The sizes that are the same in all figures."""
    _, first = _axis([row for row in rows if "error" not in row], symbols)
    return ", ".join(f"{name} = {size}" for name, size in first.items())


def page(title: str, rows: Sequence[Row], symbols: Sequence[str], kinds: Sequence[str] = KINDS) -> str:
    """The figures of a sweep as HTML."""
    fixed = fixed_sizes(rows, symbols)
    head = (HEAD.format(title=html.escape(title)), f"<p>{html.escape(fixed)}</p>" if fixed else "")
    return "\n".join((*head, *map(draw, figures(rows, symbols, kinds)), "</body></html>\n"))


def _axis(rows: Sequence[Row], symbols: Sequence[str]) -> tuple[str, dict[str, int]]:
    """The symbol with most sizes, and the first size of every other one."""
    sizes = {name: list(dict.fromkeys(row[name] for row in rows)) for name in symbols}
    axis = max(sizes, key=lambda name: len(sizes[name]), default="")
    return axis, {name: found[0] for name, found in sizes.items() if name != axis and found}


def label(row: Row) -> str:
    """What is compared: a machine under a mapping."""
    return f"{row['machine']} {row['mapping']}".strip()


def series(rows: Sequence[Row], axis: str, column: str) -> Series:
    """A column along the axis, a line for each machine under each mapping."""
    found: Series = {}
    for row in rows:
        if row.get(column) is not None:
            found.setdefault(label(row), []).append((float(row[axis]) if axis else 0.0, float(row[column])))
    return found


def speed_ups(rows: Sequence[Row], axis: str) -> Bars:
    """How much faster each is than the first, at the same size."""
    lines = series(rows, axis, "latency_s")
    base = dict(next(iter(lines.values())))
    found: Bars = {f"{x:g}": {} for x in base}
    for name, line in lines.items():
        for x, time in line:
            if time and x in base:
                found[f"{x:g}"][name] = {name: base[x] / time}
    return found


def energy_parts(rows: Sequence[Row], axis: str) -> Bars:
    """The energy of each at the same size, by what takes it; of the rows where all of it is known."""
    found: Bars = {}
    for row in rows:
        if row["energy_pj"] is not None:
            parts = {name.removeprefix("energy_"): row[name] for name in row if name.startswith("energy_")}
            parts.pop("pj")
            found.setdefault(str(row[axis]) if axis else "", {})[label(row)] = parts
    return found


def percent(value: float) -> str:
    return f"{value:.0%}"


def times(value: float) -> str:
    return f"{value:.3g}x"


def roofline(rows: Sequence[Row]) -> Figure:
    """Lane cycles a second against lane cycles a byte, under what the machine of each line can do."""
    found: Series = {}
    for row in rows:
        if row["traffic_bytes"] and row["latency_s"] and row["lane_cycles"]:
            work = row["lane_cycles"]
            found.setdefault(label(row), []).append((work / row["traffic_bytes"], work / row["latency_s"]))
    roofs: Series = {}
    for name in dict.fromkeys(row["machine"] for row in rows):
        on = machine(name)
        peak = sum(unit.lanes for unit in on.units.values()) * on.clock_hz
        rate = sum(memory.bandwidth for memory in on.memories.values())
        reach = [x for line in found.values() for x, _ in line] or [1.0]
        low, high = min(*reach, peak / rate) / 2, max(*reach, peak / rate) * 2
        roofs[f"roof of {name}"] = [(low, low * rate), (peak / rate, peak), (high, peak)]
    return Figure("roofline", "Roofline: lane cycles a second by lane cycles a byte", quantity, roofs, found)


def pareto(rows: Sequence[Row], axis: str) -> Figure:
    """Time against energy where all of it is known, else against traffic, at the largest size of the axis; a line
    through what no other point beats."""
    largest = max((row[axis] for row in rows), default=0) if axis else 0
    rows = [row for row in rows if not axis or row[axis] == largest]
    known = all(row["energy_pj"] is not None for row in rows)
    column, show = ("energy_pj", joules) if known else ("traffic_bytes", bytes_text)
    dots: Series = {}
    for row in rows:
        dots.setdefault(label(row), []).append((float(row["latency_s"]), float(row[column])))
    front: list[tuple[float, float]] = []
    for x, y in sorted(point for found in dots.values() for point in found):
        if not front or y < front[-1][1]:
            front.append((x, y))
    what = "Energy" if known else "Traffic"
    at = f" at {axis} = {largest}" if axis else ""
    return Figure("pareto", f"{what} by time{at}, with what no other point beats", show, {"front": front}, dots)


def joules(value: float) -> str:
    return f"{value / 1e12:.3g} J"


def quantity(value: float) -> str:
    return f"{value:.3g}"


# --- drawing ---------------------------------------------------------------------------------------------------------


def draw(figure: Figure) -> str:
    """A figure as HTML: its title, what the colours mean, the drawing."""
    shapes, colour = _bars(figure) if figure.bars else _curves(figure)
    if not shapes:
        return ""
    legend = " ".join(f'<span style="color:{colour[name]}">&#9632;</span> {html.escape(name)}' for name in colour)
    body = f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img">{"".join(shapes)}</svg>'
    return f"<h2>{html.escape(figure.title)}</h2><p>{legend}</p>{body}"


def colours(names: Iterable[str]) -> dict[str, str]:
    """A colour for each name."""
    return {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(dict.fromkeys(names))}


def _curves(figure: Figure) -> tuple[list[str], dict[str, str]]:
    """Lines and dots, with the least and the most written beside the axes."""
    lines = _drawn(figure.lines, figure.logs)
    dots = lines if figure.dots is None else _drawn(figure.dots, figure.logs)
    every = [point for line in (*lines.values(), *dots.values()) for point in line]
    if not every:
        return [], {}
    to_x = _scale([x for x, _ in every], figure.logs[0], LEFT, WIDTH - 10)
    to_y = _scale([y for _, y in every], figure.logs[1], HEIGHT - BOTTOM, 10)
    colour = colours((*lines, *dots))
    shapes = [_frame(every, figure.show, figure.logs[1])]
    for name, line in lines.items():
        points = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in line)
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour[name]}" stroke-width="1.5"/>')
    for name, line in dots.items():
        for x, y in line:
            told = html.escape(f"{name}: {x:g}, {figure.show(y)}")
            place = f'cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3" fill="{colour[name]}"'
            shapes.append(f"<circle {place}><title>{told}</title></circle>")
    return shapes, colour


def _bars(figure: Figure) -> tuple[list[str], dict[str, str]]:
    """Groups of bars beside each other, the parts of a bar upon each other."""
    colour = colours(part for group in figure.bars.values() for bar in group.values() for part in bar)
    top = max((sum(bar.values()) for group in figure.bars.values() for bar in group.values()), default=0.0) or 1.0
    floor, step = HEIGHT - BOTTOM, (WIDTH - 10 - LEFT) / len(figure.bars)
    shapes = [_axes(figure.show(top), figure.show(0.0))]
    for number, (group, bars) in enumerate(figure.bars.items()):
        wide = step * BAR / max(1, len(bars))
        for at, (name, parts) in enumerate(bars.items()):
            x, y = LEFT + number * step + at * wide, floor
            for part, value in parts.items():
                high = (floor - 10) * value / top
                y -= high
                told = html.escape(f"{name}{'' if part == name else f', {part}'}: {group}, {figure.show(value)}")
                place = f'x="{x:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" fill="{colour[part]}"'
                shapes.append(f"<rect {place}><title>{told}</title></rect>")
        middle = LEFT + (number + BAR / 2) * step
        shapes.append(f'<text x="{middle:.0f}" y="{floor + 16:.0f}" text-anchor="middle">{html.escape(group)}</text>')
    return shapes, colour


def _drawn(lines: Mapping[str, list[tuple[float, float]]], logs: tuple[bool, bool]) -> Series:
    """The points that axes can show: what is 0 has no place on a logarithmic one."""
    return {
        name: [(x, y) for x, y in line if (x > 0 or not logs[0]) and (y > 0 or not logs[1])]
        for name, line in lines.items()
    }


def _scale(values: Sequence[float], log: bool, start: float, end: float) -> Callable[[float], float]:
    """From values to places: the least and the most at the ends, or from 0."""
    low, high = (math.log(min(values)), math.log(max(values))) if log else (0.0, max(values))
    reach = (high - low) or 1.0
    return lambda value: start + ((math.log(value) if log else value) - low) / reach * (end - start)


def _frame(points: Sequence[tuple[float, float]], show: Callable[[float], str], log: bool) -> str:
    """The axes, with what stands at their ends."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    bottom = HEIGHT - BOTTOM + 16
    texts = (
        f'<text x="{LEFT:.0f}" y="{bottom:.0f}" text-anchor="start">{min(xs):g}</text>'
        f'<text x="{WIDTH - 10:.0f}" y="{bottom:.0f}" text-anchor="end">{max(xs):g}</text>'
    )
    return _axes(show(max(ys)), show(min(ys) if log else 0.0)) + texts


def _axes(most: str, least: str) -> str:
    """The lines of both axes, the most and the least beside the one that goes up."""
    floor = HEIGHT - BOTTOM
    texts = "".join(
        f'<text x="{LEFT - 6:.0f}" y="{y:.0f}" text-anchor="end">{html.escape(text)}</text>'
        for y, text in ((14.0, most), (floor, least))
    )
    return f'<path d="M{LEFT} 10V{floor}H{WIDTH - 10}" fill="none" stroke="currentColor"/>{texts}'
