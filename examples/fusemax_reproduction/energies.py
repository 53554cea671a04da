"""Energies and areas of actions, from a table, as the fields of machine files.

The table is CSV with the columns `component`, `action`, `energy_pJ` and `area_um2`, one row for each action, as the
public artifact of the paper has them (45 nm): multiply-add, adder, comparator, exponential unit, divider, registers of
each array, buffers by size, memory. They take the place of what the machine files of the project have.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def read_energies(path: Path, machine: str) -> dict[str, Any]:
    """The fields for a machine, `fusemax` or one with FLAT's arrays."""
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))

    def find(start: str, action: str, column: str = "energy_pJ") -> float:
        row = next(row for row in rows if row["component"].startswith(start) and row["action"].startswith(action))
        return float(row[column].split()[0] or 0)

    def operation(start: str) -> dict[str, float]:
        return {"energy": find(start, "compute"), "area": find(start, "compute", "area_um2")}

    ours = machine == "fusemax"
    mac, add, largest, divide = (operation(name) for name in ("fp16 MAC", "fp16 adder", "max", "divide"))
    add["area"] = 0.0  # the adder of the multiply-add
    arrays: dict[str, Any] = {"2d": {"mac": mac}, "1d": {"mac": mac, "add": add, "max": largest, "div": divide}}
    if ours:
        arrays["2d"] |= {"add": add, "max": largest}
    else:
        exp = operation("exp unit")
        together = {"energy": add["energy"] + exp["energy"], "area": 0.0}
        arrays["1d"] |= {"exp": exp, "sub-exp": together}
    units: dict[str, Any] = {}
    for unit, table in arrays.items():
        registers = "register file FuseMax" if ours else f"register file FLAT {unit.upper()}"
        energy = {action: find(registers, action) for action in ("read", "write")}
        units[unit] = {"operations": table, "registers": energy | {"area": find(registers, "read", "area_um2")}}
    buffer = f"global buffer {16 if ours else 32} MB"
    return {
        "units": units,
        "buffer": {action: find(buffer, action) for action in ("read", "write")},
        "memories": {"dram": {"energy": find("DRAM", "read")}},
    }
