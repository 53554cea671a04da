"""What documents show of the measurements: `python -m benchmarks.shown` writes it, nothing of it is typed in.

A document holds what it shows between two comments, a whole table or one number:

    <!-- begin generated: speeds --> ... <!-- end generated -->
    <!-- begin generated: ms ours of causal 4 32 4096 128 -->1.15 ms<!-- end generated -->

and the pictures are files beside the pages. `--check` writes nothing and fails where something is out of date.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path

from benchmarks.kept import OURS, Row, rows

ROOT = Path(__file__).parents[1]
DEVICE = "nvidia-h200"
PEERS = {  # of a column, in the order in which they are looked for
    "FlexAttention": ("flex",),
    "cuDNN, cuBLAS": ("cudnn", "cublas", "product"),
    "torch.compile": ("torch.compile",),
}
ALONE = {("linear", "product"), ("gelu", "cublas")}  # a word of the row, a peer: it computes the product and no more
SPEEDS = {
    "full 4 32 4096 128": "attention, 4 x 32 heads, 4096 x 4096, width 128",
    "causal 4 32 4096 128": "the same, causal",
    "causal 2 32/8 8192 128": "causal with grouped heads, 2 x 32/8, 8192",
    "softcap 4 16 8192 128": "softcap, 4 x 16 heads, 8192",
    "window 1024 4 16 8192 128": "sliding window of 1024",
    "document 1100 4 16 8192 128": "documents of about 1100",
    "decode 1 32/8 131072 128": "one query, 32/8 heads, 131072 keys",
    "matmul 8192 4096 4096": "product of 8192 x 4096 x 4096",
    "matmul+bias+gelu 8192 4096 4096": "bias and gelu behind 8192 x 4096 x 4096",
    "linear, cross-entropy 8192 4096 128256": "linear layer and cross-entropy, 8192 x 4096 x 128256",
    "rmsnorm, linear 8192 4096 4096": "RMSNorm and a linear layer, 8192 x 4096 x 4096",
    "layernorm, linear 8192 4096 4096": "LayerNorm and a linear layer",
    "gated mlp 8192 4096 14336": "gated block, 8192 x 4096 x 14336",
    "top-2 of 8 experts 8192 4096 14336": "experts, 2 of 8, 8192 x 4096 x 14336",
    "top-6 of 64 experts 8192 2048 1408": "experts, 6 of 64, 8192 x 2048 x 1408",
    "decoder layer 8192 4096 14336": "decoder layer, 8192 tokens of width 4096",
    "decode ragged 32 32/8 16384 128": "one query, 32 sequences of up to 16384",
    "decoder step 32 8192 4096 14336": "one more token of 32 sequences of 8192",
    "softmax 16384 8192": "softmax of 16384 x 8192",
    "entropy 8192 32768": "entropy of 8192 x 32768",
    "cumulative sum 16384 8192": "cumulative sum of 16384 x 8192",
    "rmsnorm 16384 8192": "RMSNorm of 16384 x 8192",
    "softmax top-8 65536 256": "softmax, top 8, renormalise, 65536 x 256",
}
"""Rows of the table, in its order, and how a reader calls them."""

PICTURED = {
    "full 4 32 4096 128": "attention",
    "causal 4 32 4096 128": "causal attention",
    "softcap 4 16 8192 128": "softcap attention",
    "window 1024 4 16 8192 128": "sliding window",
    "decode 1 32/8 131072 128": "one query",
    "matmul 8192 4096 4096": "matrix product",
    "matmul+bias+gelu 8192 4096 4096": "product, bias, gelu",
    "linear, cross-entropy 8192 4096 128256": "linear, cross-entropy",
    "top-6 of 64 experts 8192 2048 1408": "mixture of experts",
    "decoder layer 8192 4096 14336": "decoder layer",
    "softmax 16384 8192": "softmax",
    "entropy 8192 32768": "entropy",
    "rmsnorm 16384 8192": "RMSNorm",
    "softmax top-8 65536 256": "softmax, top 8",
}
"""Rows of the picture."""

# --- numbers ---------------------------------------------------------------------------------------------------------


def milliseconds(ms: float) -> str:
    """Milliseconds with three digits."""
    return f"{ms:#.3g}" if ms < 100 else f"{ms:.0f}"


def peer_of(row: Row, names: tuple[str, ...]) -> str | None:
    """The first of these contenders that has a time."""
    return next((name for name in names if name in row.ms), None)


def is_alone(row: Row, peer: str) -> bool:
    """Whether the peer computes only the product of the row."""
    return any(word in row.name and peer == name for word, name in ALONE)


def speeds(kept: Mapping[str, Row]) -> str:
    """The table of speeds."""
    titles = [f"on one {device_name(kept)}, milliseconds", "ours", *PEERS]
    lines = [f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
    for name, title in SPEEDS.items():
        row = kept[name]
        cells = [milliseconds(row.ms[OURS]) if OURS in row.ms else row.failed.get(OURS, "not measured")]
        for names in PEERS.values():
            peer = peer_of(row, names)
            alone = peer is not None and is_alone(row, peer)
            cells.append("" if peer is None else milliseconds(row.ms[peer]) + ", the product alone" * alone)
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def device_name(kept: Mapping[str, Row]) -> str:
    """The device as people call it, without its maker."""
    return next(iter(kept.values())).device.removeprefix("NVIDIA ")


def one_number(kind: str, contender: str, row: Row) -> str:
    """`ms ours`, `times flex`: one number of a row; `beyond`: the memory that a call of ours takes."""
    if kind == "beyond":
        return f"{row.beyond / 2**20:.0f} MiB"
    if kind == "ms":
        return f"{milliseconds(row.ms[contender])} ms"
    times = row.times(contender)
    if kind != "times" or times is None:
        raise KeyError(f"{kind} {contender} of {row.name}")
    return f"{times:.2f}"


# --- the picture -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Theme:
    """Colours of a picture; `marks` are those of the peers."""

    ink: str
    faint: str
    line: str
    page: str
    marks: tuple[str, str, str]


THEMES = {
    "light": Theme("#1f2328", "#59636e", "#d1d9e0", "#ffffff", ("#0969da", "#8250df", "#bc4c00")),
    "dark": Theme("#f0f6fc", "#9198a1", "#3d444d", "#0d1117", ("#58a6ff", "#bc8cff", "#f0883e")),
}
LEFT, WIDTH, TOP, STEP, RIGHT = 190, 420, 64, 26, 110
LOWEST, HIGHEST = 0.7, 45.0  # times as fast: the ends of the axis, which is logarithmic
TICKS = (1, 2, 5, 10, 20, 40)


def place(times: float) -> float:
    """Where on the axis a ratio lies."""
    return LEFT + WIDTH * math.log(times / LOWEST) / math.log(HIGHEST / LOWEST)


def mark(kind: int, x: float, y: float, colour: str) -> str:
    """A mark of its own form for each peer: a circle, a square, a triangle."""
    if kind == 0:
        return f'<circle cx="{x:.1f}" cy="{y}" r="5.5" fill="{colour}"/>'
    if kind == 1:
        return f'<rect x="{x - 5:.1f}" y="{y - 5}" width="10" height="10" fill="{colour}"/>'
    return f'<path d="M{x - 6:.1f} {y + 5}L{x:.1f} {y - 6}L{x + 6:.1f} {y + 5}Z" fill="{colour}"/>'


def picture(kept: Mapping[str, Row], theme: Theme) -> str:
    """How many times as fast as its peers ours is, as SVG: a line for each row, a mark for each peer."""
    bottom = TOP + STEP * len(PICTURED)
    title = f"How many times as fast as its peers, on one {device_name(kept)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" viewBox="0 0 {LEFT + WIDTH + RIGHT} {bottom + 48}" '
        f'font-family="system-ui, sans-serif" font-size="13" fill="{theme.ink}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="100%" height="100%" fill="{theme.page}"/>',
        f'<text x="12" y="24" font-size="15" font-weight="600">{escape(title)}</text>',
        f'<text x="{LEFT + WIDTH + RIGHT - 12}" y="{TOP - 14}" text-anchor="end" fill="{theme.faint}">ours</text>',
        f'<text x="{place(1) + 6:.1f}" y="{bottom + 38}" fill="{theme.faint}">ours is faster &#8594;</text>',
        *axis(theme, bottom),
        *legend(theme),
    ]
    for number, (name, called) in enumerate(PICTURED.items()):
        parts += line(kept[name], called, TOP + STEP * number + STEP // 2, theme)
    return "\n".join([*parts, "</svg>", ""])


def axis(theme: Theme, bottom: int) -> Iterator[str]:
    """The grid; as fast as the peer is a stronger line."""
    for tick in TICKS:
        strong = f'stroke="{theme.faint}" stroke-width="1.5"' if tick == 1 else f'stroke="{theme.line}"'
        yield f'<path d="M{place(tick):.1f} {TOP - 6}V{bottom}" {strong}/>'
        x, faint = f"{place(tick):.1f}", theme.faint
        yield f'<text x="{x}" y="{bottom + 20}" text-anchor="middle" fill="{faint}">{tick}x</text>'


def legend(theme: Theme) -> Iterator[str]:
    """Which mark is which peer."""
    for kind, (peer, x) in enumerate(zip(PEERS, (LEFT, LEFT + 128, LEFT + 276), strict=True)):
        yield mark(kind, x + 6, TOP - 18, theme.marks[kind])
        yield f'<text x="{x + 18}" y="{TOP - 14}" fill="{theme.faint}">{escape(peer)}</text>'


def line(row: Row, called: str, y: int, theme: Theme) -> Iterator[str]:
    """One workload: its name, a mark for each peer, the time of ours."""
    yield f'<text x="{LEFT - 12}" y="{y + 4}" text-anchor="end">{escape(called)}</text>'
    for kind, names in enumerate(PEERS.values()):
        peer = peer_of(row, names)
        times = None if peer is None or is_alone(row, peer) else row.times(peer)
        if times is not None:
            told = escape(f"{called}: {times:.2f} times as fast as {peer}")
            yield f"<g><title>{told}</title>{mark(kind, place(times), y, theme.marks[kind])}</g>"
    ours = f"{milliseconds(row.ms[OURS])} ms" if OURS in row.ms else "not measured"
    yield f'<text x="{LEFT + WIDTH + RIGHT - 12}" y="{y + 4}" text-anchor="end" fill="{theme.faint}">{ours}</text>'


PICTURE = """\
<picture>
  <source media="(prefers-color-scheme: dark)" srcset="docs/pictures/speeds-dark.svg">
  <img alt="How many times as fast as its peers each kernel is; the table below has the numbers" \
src="docs/pictures/speeds-light.svg">
</picture>"""

# --- documents -------------------------------------------------------------------------------------------------------

GENERATED = re.compile(r"(<!-- begin generated: (?P<what>.*?) -->)(?P<shown>.*?)(<!-- end generated -->)", re.S)


def filled(text: str, kept: Mapping[str, Row]) -> str:
    """A document with what it shows of the measurements put in place."""

    def shown(found: re.Match[str]) -> str:
        what, inline = found["what"], "\n" not in found["shown"]
        if what in ("speeds", "picture"):
            made = PICTURE if what == "picture" else speeds(kept)
            return f"{found[1]}\n{made}\n{found[4]}"
        number = re.fullmatch(r"(\w+)(?: (\S+))? of (.*)", what)
        if number is None or not inline:
            raise KeyError(what)
        return f"{found[1]}{one_number(number[1], number[2] or OURS, kept[number[3]])}{found[4]}"

    return GENERATED.sub(shown, text)


def documents(kept: Mapping[str, Row]) -> Iterator[tuple[Path, str]]:
    """Every file that shows measurements, and what it should be."""
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        yield path, filled(path.read_text(encoding="utf-8"), kept)
    for name, theme in THEMES.items():
        yield ROOT / "docs" / "pictures" / f"speeds-{name}.svg", picture(kept, theme)


def main(arguments: list[str] | None = None) -> int:
    """The command; 1 where `--check` finds something out of date."""
    command = argparse.ArgumentParser("python -m benchmarks.shown", description=__doc__.split("\n")[0])
    command.add_argument("--check", action="store_true", help="write nothing; fail where something is out of date")
    options = command.parse_args(arguments)
    stale = [(p, t) for p, t in documents(rows(DEVICE)) if not p.exists() or p.read_text(encoding="utf-8") != t]
    for path, text in stale:
        print(f"{path.relative_to(ROOT)}: {'out of date' if options.check else 'written'}")
        if not options.check:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
