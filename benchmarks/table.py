"""Tables as text, and the same as JSON: what was measured where, when and with which versions."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import math
import platform
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.row import OURS, Result

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass
class Table:
    """A title, columns, rows of cells, and notes; `data` is what the JSON holds of it."""

    name: str
    columns: list[str]
    rows: list[list[str]] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    data: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def text(self, header: str) -> str:
        """The table with its header above and its notes below; the first column is aligned left, all others right."""
        lines = [self.columns, *self.rows]
        widths = [max(len(line[column]) for line in lines) for column in range(len(self.columns))]
        drawn = [
            "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip() for line in lines
        ]
        drawn.insert(1, "-" * (sum(widths) + 2 * len(widths) - 2))
        return "\n".join([f"{self.name}: {header}", "", *drawn, *([""] if self.notes else []), *self.notes, ""])


def environment(device: torch.device) -> dict[str, str]:
    """Where and when: the device, the versions, the date."""
    cuda = device.type == "cuda"
    cudnn: Any = torch.backends.cudnn
    return {
        "device": torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "cuda": str(torch.version.cuda) if cuda else "none",
        "cudnn": str(cudnn.version()) if cuda else "none",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def version(package: str) -> str:
    """The installed version of a package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def header(facts: dict[str, str]) -> str:
    """The environment in one line."""
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "triton", "cuda", "cudnn"))
    return f"{facts['device']}, {versions}, {facts['date']}"


def table_of(name: str, results: Sequence[Result], copy: float) -> Table:
    """The table of workloads: milliseconds of each contender, how many times as fast as it ours is, the bars."""
    peers = list(dict.fromkeys(name for result in results for name in (*result.ms, *result.failed) if name != OURS))
    table = Table(name, ["workload", "ours ms", "rate", *(f"{peer} ms" for peer in peers), "bars (reached)", "verdict"])
    for result in results:
        bars = "; ".join(f"{bar['text']} ({reached(bar['reached'])})" for bar in result.bars) or "none"
        cells = [peer_cell(result, peer) for peer in peers]
        table.rows.append([result.name, cell(result.ms.get(OURS)), rate(result), *cells, bars, result.verdict or "-"])
        table.data.append({**dataclasses.asdict(result), "verdict": result.verdict})
    table.notes += gathered(results)
    most = "; ".join(f"{result.beyond / 2**20:.1f} MiB [{result.name}]" for result in results if result.beyond)
    if most:
        table.notes.append(f"Memory that a call of ours takes beyond inputs and results: {most}.")
    explained = "In brackets: how many times as fast as the peer ours is; of a bar, 1 and more is enough."
    table.notes.append(f"{explained} A copy moves {copy / 1e12:.2f} TB/s, read and written.")
    return table


def gathered(results: Sequence[Result]) -> list[str]:
    """Why contenders have no time or a doubtful one: each reason once, with the rows that it holds for."""
    rows: dict[tuple[str, str], list[str]] = {}
    for result in results:
        for who, why in (result.failed | result.doubts).items():
            rows.setdefault((who, why), []).append(result.name)
    return [f"{who}: {why} [{'; '.join(names)}]" for (who, why), names in rows.items()]


def cell(ms: float | None) -> str:
    """Milliseconds with three digits that count."""
    if ms is None:
        return "-"
    return f"{ms:.4f}" if ms < 0.1 else f"{ms:.3f}" if ms < 10 else f"{ms:.1f}"


def peer_cell(result: Result, peer: str) -> str:
    """A peer's milliseconds and its ratio to ours; `?` where it computes something else."""
    ms = result.ms.get(peer)
    if ms is None:
        return "failed" if peer in result.failed else "-"
    doubt = "?" if peer in result.doubts else ""
    ours = result.ms.get(OURS)
    return f"{cell(ms)}{doubt}" + (f" ({ms / ours:.2f})" if ours else "")


def rate(result: Result) -> str:
    """What ours reaches, in TFLOP/s or TB/s."""
    ours = result.ms.get(OURS)
    if not ours:
        return "-"
    return f"{result.flops / ours / 1e9:.0f} TF" if result.flops else f"{result.moved / ours / 1e9:.2f} TB/s"


def reached(value: float | None) -> str:
    """What was reached of a bar."""
    return "-" if value is None else f"{value:.3f}"


def write(table: Table, facts: dict[str, str], path: Path) -> None:
    """Writes the table to this file and its data to a JSON file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(table.text(header(facts)), encoding="utf-8")
    content = {"table": table.name, **facts, "rows": finite(table.data), "notes": table.notes}
    path.with_suffix(".json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with null for the numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def default_path(name: str, facts: dict[str, str]) -> Path:
    """`results/attention-nvidia-h200.txt` for the table and the device."""
    device = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    return RESULTS / f"{name}-{device}.txt"
