"""The figures of a sweep as a picture or PDF, drawn by matplotlib, which is loaded where it is asked for."""

from __future__ import annotations

import importlib
import io
import math
from collections.abc import Sequence
from typing import Any

from cascade.backends.systolic.plot import BAR, Figure, colours
from cascade.errors import CommandError, Diagnostic

FORMATS = ("png", "pdf", "svg")
COLUMNS = 2
SIZE = (6.4, 3.2)  # inches of a figure


def picture(title: str, figures: Sequence[Figure], form: str) -> bytes:
    """The figures beside each other in a file of that format; raises C623 where matplotlib is not installed."""
    try:
        plots: Any = importlib.import_module("matplotlib.figure")
    except ImportError:
        hint = "pip install matplotlib, or name a file that ends in .html"
        message = f"a {form.upper()} file of figures needs matplotlib, which is not installed"
        raise CommandError(Diagnostic("C623", message, help=hint)) from None
    lines = max(1, math.ceil(len(figures) / COLUMNS))
    sheet = plots.Figure(figsize=(SIZE[0] * COLUMNS, SIZE[1] * lines), layout="constrained")
    sheet.suptitle(title)
    for at, figure in enumerate(figures):
        axes = sheet.add_subplot(lines, COLUMNS, at + 1)
        axes.set_title(figure.title, fontsize="medium")
        _bars(axes, figure) if figure.bars else _curves(axes, figure)
        axes.legend(fontsize="x-small")
    file = io.BytesIO()
    sheet.savefig(file, format=form)
    return file.getvalue()


def _curves(axes: Any, figure: Figure) -> None:
    dots = figure.lines if figure.dots is None else figure.dots
    colour = colours((*figure.lines, *dots))
    for name, line in figure.lines.items():
        axes.plot(*zip(*line, strict=True), color=colour[name], label=name)
    for name, line in dots.items():
        told = None if name in figure.lines else name
        axes.plot(*zip(*line, strict=True), "o", color=colour[name], label=told, markersize=4)
    for log, scale in zip(figure.logs, (axes.set_xscale, axes.set_yscale), strict=True):
        scale("log" if log else "linear")
    if not figure.logs[1]:
        axes.set_ylim(bottom=0.0)


def _bars(axes: Any, figure: Figure) -> None:
    colour = colours(part for group in figure.bars.values() for bar in group.values() for part in bar)
    told: set[str] = set()
    for number, bars in enumerate(figure.bars.values()):
        wide = BAR / max(1, len(bars))
        for at, parts in enumerate(bars.values()):
            bottom = 0.0
            for part, value in parts.items():
                text = None if part in told else part
                axes.bar(number + at * wide, value, wide, bottom, color=colour[part], label=text, align="edge")
                told.add(part)
                bottom += value
    axes.set_xticks([number + BAR / 2 for number in range(len(figure.bars))], list(figure.bars))
