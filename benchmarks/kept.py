"""What was measured and kept: the rows of `results/`, the latest of each name; no package is needed to read them.

A table is a JSON file; of one that was kept as text only, the text is read.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS = "ours"
HEADER = re.compile(r"(?P<table>[\w-]+): (?P<device>[^,]+), torch .*, (?P<date>\d{4}-\d\d-\d\d \d\d:\d\d) UTC\n")
OUT_OF_TIME = "not run"


@dataclass(frozen=True)
class Row:
    """One workload as it was measured: milliseconds of each contender, and why others have none."""

    name: str
    table: str
    device: str
    date: str
    source: str  # the file
    ms: dict[str, float]
    failed: dict[str, str] = dataclasses.field(default_factory=dict)
    beyond: int = 0  # bytes that a call of ours takes beyond inputs and results, where that is known

    def times(self, peer: str) -> float | None:
        """How many times as fast as a peer ours is; None where one of them has no time."""
        ours, theirs = self.ms.get(OURS), self.ms.get(peer)
        return theirs / ours if ours and theirs else None


def rows(device: str, folder: Path = RESULTS) -> dict[str, Row]:
    """Every row of a device, named as in file names, `nvidia-h200`: the latest of each that found time to run."""
    found: dict[str, Row] = {}
    for row in sorted(every_row(device, folder), key=lambda row: row.date):
        if row.name not in found or not row.failed.get(OURS, "").startswith(OUT_OF_TIME):
            found[row.name] = row
    return found


def every_row(device: str, folder: Path = RESULTS) -> Iterator[Row]:
    """The rows of all tables of workloads."""
    for path in sorted({path.with_suffix("") for path in folder.glob(f"*-{device}.*")}):
        data, text = path.with_suffix(".json"), path.with_suffix(".txt")
        if data.exists():
            yield from from_json(json.loads(data.read_text(encoding="utf-8")), data.name)
        elif (header := HEADER.match(text.read_text(encoding="utf-8"))) is not None:
            yield from from_text(text.read_text(encoding="utf-8"), header.groupdict(), text.name)


def from_json(table: dict[str, Any], source: str) -> Iterator[Row]:
    """The rows of a table of workloads; other tables have none."""
    for row in table["rows"]:
        if "ms" in row and "failed" in row:
            name, beyond = row["name"], row.get("beyond", 0)
            yield Row(name, table["table"], table["device"], table["date"], source, row["ms"], row["failed"], beyond)


def from_text(text: str, header: dict[str, str], source: str) -> Iterator[Row]:
    """The same of what `table.py` wrote: columns stand two blanks apart, `2.540 (1.20)` is a peer and its ratio."""
    _, titles, _, *lines = text.splitlines()[1:]
    columns = [title.removesuffix(" ms") for title in re.split(r" {2,}", titles)]
    if "bars (reached)" not in columns:  # no table of workloads
        return
    reasons = dict(re.findall(r"^(\S+): (.*) \[", text, re.M))
    for line in lines[: lines.index("")]:
        cells = dict(zip(columns, re.split(r" {2,}", line), strict=True))
        contenders = [name for name in columns[1:-2] if name != "rate"]
        ms = {name: float(cells[name].split(" ")[0]) for name in contenders if re.match(r"[\d.]+( |$)", cells[name])}
        failed = {name: reasons.get(name, "failed") for name in contenders if cells[name] == "failed"}
        if OURS not in ms:
            failed[OURS] = reasons.get(OURS, "failed")
        yield Row(cells[columns[0]], header["table"], header["device"], header["date"], source, ms, failed)
