"""Rows of a sweep as one page of figures: use of units, time, speed-up, a roofline, what no other point beats.

HTML with SVG in it and no script, so that it opens anywhere and can be compared as text. What is compared is a machine
under a mapping; the axis is the symbol with most sizes, and of the other symbols the first sizes.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from cascade.backends.systolic.machine import machine
from cascade.backends.systolic.report import bytes_text, seconds_text

Row: TypeAlias = dict[str, Any]
Series: TypeAlias = dict[str, list[tuple[float, float]]]

WIDTH, HEIGHT, LEFT, BOTTOM = 640.0, 240.0, 70.0, 30.0
COLOURS = ("#457b9d", "#e76f51", "#2a9d8f", "#e9c46a", "#8d99ae", "#9b5de5", "#264653", "#f4a261")
HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; max-width: 720px; margin: 2em auto; padding: 0 1em }}
h2 {{ font-size: 1.1em; margin: 1.6em 0 .3em }} svg {{ width: 100% }} text {{ font-size: 11px; fill: currentColor }}
@media (prefers-color-scheme: dark) {{ body {{ background: #181818; color: #ddd }} }}
</style></head><body><h1>{title}</h1>
"""


def page(title: str, rows: Sequence[Row], symbols: Sequence[str]) -> str:
    """The figures of a sweep over some symbols."""
    good = [row for row in rows if "error" not in row]
    axis, first = _axis(good, symbols)
    along = [row for row in good if all(row[name] == size for name, size in first.items())]
    fixed = ", ".join(f"{name} = {size}" for name, size in first.items())
    parts = [HEAD.format(title=html.escape(title)), f"<p>{html.escape(fixed)}</p>" if fixed else ""]
    if along:
        for column in dict.fromkeys(name for row in along for name in row if name.startswith("utilisation_")):
            unit = column.removeprefix("utilisation_")
            parts.append(chart(f"Use of {unit} by {axis}", series(along, axis, column), percent, logs=(True, False)))
        parts.append(chart(f"Time by {axis}", series(along, axis, "latency_s"), seconds_text))
        parts.append(chart(f"Speed-up over the first by {axis}", speed_ups(along, axis), times, logs=(True, False)))
        parts.append(roofline(along))
        parts.append(pareto(along))
    return "\n".join((*parts, "</body></html>\n"))


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


def speed_ups(rows: Sequence[Row], axis: str) -> Series:
    """How much faster each is than the first, at the same size."""
    lines = series(rows, axis, "latency_s")
    base = dict(next(iter(lines.values())))
    return {name: [(x, base[x] / time) for x, time in line if time and x in base] for name, line in lines.items()}


def percent(value: float) -> str:
    return f"{value:.0%}"


def times(value: float) -> str:
    return f"{value:.3g}x"


def roofline(rows: Sequence[Row]) -> str:
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
    return chart("Roofline: lane cycles a second by lane cycles a byte", roofs, quantity, dots=found)


def pareto(rows: Sequence[Row]) -> str:
    """Time against energy where all of it is known, else against traffic; a line through what no other point beats."""
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
    return chart(f"{what} by time, with the points that no other beats", {"front": front}, show, dots=dots)


def joules(value: float) -> str:
    return f"{value / 1e12:.3g} J"


def quantity(value: float) -> str:
    return f"{value:.3g}"


# --- drawing ---------------------------------------------------------------------------------------------------------


def chart(
    title: str,
    lines: Series,
    show: Callable[[float], str],
    logs: tuple[bool, bool] = (True, True),
    dots: Mapping[str, list[tuple[float, float]]] | None = None,
) -> str:
    """Lines and dots over two axes, each logarithmic or from 0, with the least and the most written beside them."""
    lines, dots = _drawn(lines, logs), _drawn(lines if dots is None else dots, logs)
    every = [point for line in (*lines.values(), *dots.values()) for point in line]
    if not every:
        return ""
    to_x = _scale([x for x, _ in every], logs[0], LEFT, WIDTH - 10)
    to_y = _scale([y for _, y in every], logs[1], HEIGHT - BOTTOM, 10)
    names = list(dict.fromkeys((*lines, *dots)))
    colour = {name: COLOURS[at % len(COLOURS)] for at, name in enumerate(names)}
    shapes = [_frame(every, show, logs[1])]
    for name, line in lines.items():
        points = " ".join(f"{to_x(x):.1f},{to_y(y):.1f}" for x, y in line)
        shapes.append(f'<polyline points="{points}" fill="none" stroke="{colour[name]}" stroke-width="1.5"/>')
    for name, line in dots.items():
        for x, y in line:
            told = html.escape(f"{name}: {x:g}, {show(y)}")
            place = f'cx="{to_x(x):.1f}" cy="{to_y(y):.1f}" r="3" fill="{colour[name]}"'
            shapes.append(f"<circle {place}><title>{told}</title></circle>")
    legend = " ".join(f'<span style="color:{colour[name]}">&#9632;</span> {html.escape(name)}' for name in names)
    body = f'<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT:.0f}" role="img">{"".join(shapes)}</svg>'
    return f"<h2>{html.escape(title)}</h2><p>{legend}</p>{body}"


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
    floor, bottom = HEIGHT - BOTTOM, HEIGHT - BOTTOM + 16
    words = (
        (LEFT - 6, 14.0, "end", show(max(ys))), (LEFT - 6, floor, "end", show(min(ys) if log else 0.0)),
        (LEFT, bottom, "start", f"{min(xs):g}"), (WIDTH - 10, bottom, "end", f"{max(xs):g}"),
    )  # fmt: skip
    texts = "".join(
        f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{html.escape(text)}</text>'
        for x, y, anchor, text in words
    )
    return f'<path d="M{LEFT} 10V{floor}H{WIDTH - 10}" fill="none" stroke="currentColor"/>{texts}'
