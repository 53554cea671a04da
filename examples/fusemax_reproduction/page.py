"""The figures of the paper on one page: utilisation, speed-up and energy of attention and of whole layers, as HTML.

Bars are ours; a line across a bar is what was published, where a folder with the published rows is named. Speed-ups are
over the unfused baseline, energies relative to it.
"""

from __future__ import annotations

import csv
import html
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.backends.systolic.cost import Cost, one_after_another
from examples.fusemax_reproduction.configurations import (
    CONFIGS, LONGEST, Dataflow, Model, attention, differences, layers, search_mapping,
)  # fmt: skip

MODELS = {
    "BERT": (12, 64, 64, 768, 3072), "TrXL": (16, 64, 64, 1024, 4096), "T5": (8, 64, 64, 512, 2048),
    "XLM": (16, 128, 128, 2048, 8192),
}  # fmt: skip
LENGTHS = {"1K": 1 << 10, "4K": 1 << 12, "16K": 1 << 14, "64K": 1 << 16, "256K": 1 << 18, "1M": 1 << 20}
LABELS = {
    "unfused": "unfused", "flat": "FLAT", "cascade": "+Cascade", "architecture": "+Architecture",
    "fusemax": "+Binding (FuseMax)",
}  # fmt: skip
COLOURS = ("#8d99ae", "#457b9d", "#e9c46a", "#f4a261", "#2a9d8f")
FILES = {"unfused": "unfused", "flat": "flat", "cascade": "cascade", "architecture": "arch", "fusemax": "binding"}

Point = tuple[str, str, str]  # a configuration, a model, a length


@dataclass(frozen=True)
class Figure:
    """A figure: its title, ours by point, what was published by point, and how a value is written."""

    title: str
    ours: Mapping[Point, float]
    published: Mapping[Point, float]
    show: Callable[[float], str]


Costs = tuple[dict[Point, Cost], dict[Point, Cost]]  # of attention, and of whole layers


def evaluate(
    energies: Path | None = None,
    flows: Mapping[tuple[str, str], Dataflow] | None = None,
    as_published: bool = False,
    lengths: Mapping[str, int] = LENGTHS,
) -> Costs:
    """Every configuration for every model and length; FLAT under given dataflows, else under searched ones."""
    parts: dict[Point, Cost] = {}
    whole: dict[Point, Cost] = {}
    for config in CONFIGS:
        for name, sizes in MODELS.items():
            for length, tokens in lengths.items():
                model, at = Model(64, *sizes, tokens), (config, name, length)
                flow = (flows or {}).get((name, length))
                parts[at] = attention(config, model, flow, energies, as_published)
                whole[at] = one_after_another((parts[at], layers(config, model, energies, as_published)))
    return parts, whole


def page(energies: Path | None = None, published: Path | None = None, as_published: bool = False) -> str:
    """The page as HTML text; as published, FLAT runs the dataflows of the folder."""
    flows = chosen_flows(published) if as_published else {}
    costs = evaluate(energies, flows, as_published, LENGTHS)
    body = "\n".join(draw(figure) for figure in figures(*costs, rows(published)))
    lists = [
        ("Means", headlines(*costs)),
        ("With a search in the place of the published mappings", searched(LENGTHS)),
        ("What was published otherwise", otherwise()),
    ]
    told = "".join(
        f"<h2>{title}</h2><ul>{''.join(f'<li>{html.escape(line)}</li>' for line in lines)}</ul>"
        for title, lines in lists
    )
    return HEAD + f"{told}\n{legend()}\n{body}\n</body></html>\n"


def searched(lengths: Mapping[str, int]) -> list[str]:
    """What a search is worth on the machine of each configuration, BERT at every length."""
    lines = []
    for config in CONFIGS:
        for length, tokens in lengths.items():
            model = Model(64, *MODELS["BERT"], tokens)
            theirs = attention(config, model)
            ours = attention(config, model, mapped=search_mapping(config, model))
            faster, moved = theirs.seconds / ours.seconds, ours.traffic / theirs.traffic
            if faster > 1 or moved < 1:
                lines.append(f"{LABELS[config]} at {length}: {faster:.4f} times as fast, {moved:.2%} of the traffic")
    return lines


def otherwise() -> list[str]:
    """What the published evaluation counts otherwise, and what that does to the energy of BERT at 1M."""
    model = Model(64, *MODELS["BERT"], LONGEST)
    return [
        f"{LABELS[config]}: {what} ({change:+.1%} energy)"
        for config in CONFIGS
        for what, change in differences(config, model)
    ]


def figures(
    parts: Mapping[Point, Cost],
    whole: Mapping[Point, Cost],
    published: Mapping[Point, Mapping[str, float]],
) -> list[Figure]:
    """All figures."""

    def column(name: str) -> dict[Point, float]:
        return {at: row[name] for at, row in published.items()}

    found = [
        Figure("Use of the 2D array in attention", used(parts, "2d"), column("util_2d"), share),
        Figure("Use of the 1D array in attention", used(parts, "1d"), column("util_1d"), share),
        Figure("Speed-up of attention over unfused", speed(seconds(parts)), speed(column("latency")), times),
        Figure("Energy of attention, unfused is 1", ratio(energy(parts)), ratio(column("energy")), share),
        Figure("Speed-up of whole layers over unfused", speed(seconds(whole)), {}, times),
        Figure("Energy of whole layers, unfused is 1", ratio(energy(whole)), {}, share),
    ]
    for einsum in ("QK", "LM", "SLN", "SLD", "SLNV"):
        busy = {
            at: cost.einsums[einsum].cycles / cost.cycles
            for at, cost in parts.items()
            if at[0] == "fusemax" and einsum in cost.einsums
        }
        theirs = {at: row[einsum] for at, row in published.items() if at[0] == "fusemax" and einsum in row}
        found.append(Figure(f"Time that FuseMax's 2D array spends in {einsum}", busy, theirs, share))
    return found


def used(costs: Mapping[Point, Cost], unit: str) -> dict[Point, float]:
    return {at: cost.utilisation[unit] for at, cost in costs.items()}


def seconds(costs: Mapping[Point, Cost]) -> dict[Point, float]:
    return {at: cost.seconds for at, cost in costs.items()}


def energy(costs: Mapping[Point, Cost]) -> dict[Point, float]:
    """pJ; every machine of the paper says what its actions take."""
    return {at: known for at, cost in costs.items() if (known := cost.energy_pj) is not None}


def speed(found: Mapping[Point, float]) -> dict[Point, float]:
    return {at: found["unfused", at[1], at[2]] / value for at, value in found.items()}


def ratio(found: Mapping[Point, float]) -> dict[Point, float]:
    return {at: value / found["unfused", at[1], at[2]] for at, value in found.items()}


def share(value: float) -> str:
    return f"{value:.1%}"


def times(value: float) -> str:
    return f"{value:.2f}x"


def headlines(parts: Mapping[Point, Cost], whole: Mapping[Point, Cost]) -> list[str]:
    """FuseMax against its baselines: arithmetic means over models and lengths, geometric ones behind them."""
    lines = []
    for what, costs in (("attention", parts), ("end to end", whole)):
        for config in ("flat", "unfused"):
            gains = [costs[config, *at[1:]].seconds / cost.seconds for at, cost in costs.items() if at[0] == "fusemax"]
            line = f"{what}: {mean(gains):.2f}x over {LABELS[config]} (geometric mean {geometric(gains):.2f}x)"
            taken = energy(costs)
            saved = [taken[at] / taken[config, *at[1:]] for at in taken if at[0] == "fusemax"]
            line += f", at {mean(saved):.1%} of its energy ({geometric(saved):.1%})"
            lines.append(line)
    return lines


def mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def geometric(values: Sequence[float]) -> float:
    return math.exp(mean([math.log(value) for value in values]))


# --- what was published ----------------------------------------------------------------------------------------------


def rows(folder: Path | None) -> dict[Point, dict[str, float]]:
    """The published rows of attention, as far as there are any."""
    found: dict[Point, dict[str, float]] = {}
    for config, file in FILES.items():
        for row in read(folder, f"attn-{file}.csv"):
            numbers = {key: float(value) for key, value in row.items() if key not in ("model", "seq_len", "") and value}
            found[config, row["model"], row["seq_len"]] = numbers
    return found


def chosen_flows(folder: Path | None) -> dict[tuple[str, str], Dataflow]:
    """FLAT's dataflow on the large platform, by model and length."""
    table = [row for row in read(folder, "flat_dse_configs.csv") if row["platform"] == "cloud"]
    return {(row["models"], row["seq_len"]): Dataflow.of(row) for row in table}


def read(folder: Path | None, name: str) -> list[dict[str, Any]]:
    if folder is None or not (folder / name).is_file():
        return []
    with (folder / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# --- drawing ---------------------------------------------------------------------------------------------------------

HEAD = """<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>FuseMax reproduced</title><style>
body { font: 14px/1.4 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
h2 { font-size: 1.1em; margin: 1.6em 0 .3em } svg { width: 100% } text { font-size: 10px; fill: currentColor }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } }
</style></head><body><h1>FuseMax reproduced</h1>
<p>Nayak et al., MICRO 2024, from cascades, machines and mappings by one evaluator. A line across a bar is the published
value, where it was at hand.</p>
"""
HEIGHT, WIDTH, GAP, BAR = 120.0, 1080.0, 6.0, 0.9


def legend() -> str:
    """The colours of the configurations."""
    marks = (
        f'<span style="color:{colour}">&#9632;</span> {html.escape(LABELS[config])} '
        for config, colour in zip(CONFIGS, COLOURS, strict=True)
    )
    return f"<p>{''.join(marks)}</p>"


def draw(figure: Figure) -> str:
    """A figure as grouped bars, a group for each model and length."""
    configs = [config for config in CONFIGS if any(at[0] == config for at in figure.ours)]
    groups = [(name, length) for name in MODELS for length in LENGTHS]
    top = max([*figure.ours.values(), *figure.published.values()], default=1.0) or 1.0
    step = WIDTH / len(groups)
    bar = (step - GAP) / max(1, len(configs))
    shapes = []
    for number, (name, length) in enumerate(groups):
        for at, config in enumerate(configs):
            value = figure.ours[config, name, length]
            x, high = number * step + at * bar, HEIGHT * value / top
            told = f"{LABELS[config]}, {name} {length}: {figure.show(value)}"
            theirs = figure.published.get((config, name, length))
            line = ""
            if theirs is not None:
                told += f", published {figure.show(theirs)}"
                y = HEIGHT * (1 - theirs / top) + 4
                line = f'<path d="M{x:.1f} {y:.2f}h{bar * BAR:.1f}" stroke="currentColor"/>'
            shapes.append(
                f'<g><title>{html.escape(told)}</title><rect x="{x:.1f}" y="{HEIGHT - high + 4:.2f}" '
                f'width="{bar * BAR:.1f}" height="{high:.2f}" fill="{COLOURS[CONFIGS.index(config)]}"/>{line}</g>'
            )
        middle = number * step + (step - GAP) / 2
        shapes.append(f'<text x="{middle:.1f}" y="{HEIGHT + 16}" text-anchor="middle">{length}</text>')
        if length == "1K":
            shapes.append(f'<text x="{number * step:.1f}" y="{HEIGHT + 30}">{html.escape(name)}</text>')
    title = f"<h2>{html.escape(figure.title)}, up to {figure.show(top)}</h2>"
    return f'{title}<svg viewBox="0 0 {WIDTH:.0f} {HEIGHT + 36:.0f}" role="img">{"".join(shapes)}</svg>'
