"""FuseMax by numbers: one configuration and model as text or JSON, or everything as one page.

    python -m examples.fusemax_reproduction --config fusemax --length 65536 --json
    python -m examples.fusemax_reproduction --page fusemax.html

Without sizes the model is BERT at batch 64. `--energies` names a table of energies, `energies.csv` in this folder where
there is one, that takes the place of those of the machines. `--published` names a folder with the published rows, which
the page then shows beside ours.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from cascade.backends.systolic.cost import one_after_another
from cascade.backends.systolic.report import cost_json, summary
from cascade.files import write_whole
from examples.fusemax_reproduction.configurations import (
    CHIP, CONFIGS, HERE, Chip, Dataflow, Model, attention, differences, layers, machine_of, search_dataflow,
    search_mapping,
)  # fmt: skip
from examples.fusemax_reproduction.page import page


TABLE = HERE / "energies.csv"  # taken where a user has put one there; none comes with the project


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("fusemax_reproduction", description=__doc__.split("\n")[0])
    parser.add_argument("--config", choices=CONFIGS)
    for name, size in (("batch", 64), ("heads", 12), ("e", 64), ("f", 64), ("d", 768), ("ffn", 3072), ("length", 1024)):
        parser.add_argument(f"--{name}", type=positive, default=size)
    parser.add_argument("--array", type=positive, default=CHIP.array, help="lanes along a side of the arrays")
    parser.add_argument("--buffer", type=positive, help="bytes of the buffer, else those of the configuration")
    parser.add_argument("--as-published", action="store_true", help="count energy as the published evaluation does")
    parser.add_argument("--dataflow", type=Path, help="FLAT's dataflow, a JSON object; else one is searched")
    parser.add_argument("--search", action="store_true", help="search the mapping instead of taking the published one")
    here = TABLE if TABLE.is_file() else None
    parser.add_argument("--energies", type=Path, default=here, help="a table of energies and areas of actions, CSV")
    parser.add_argument("--published", type=Path, help="a folder with the published rows, CSV")
    parser.add_argument("--page", type=Path, metavar="FILE", help="write all figures as one HTML page")
    parser.add_argument("--json", action="store_true")
    found = parser.parse_args()
    if (found.config is None) == (found.page is None):
        parser.error("give either --config or --page")
    return found


def positive(text: str) -> int:
    """A size: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def figures(options: argparse.Namespace) -> dict[str, Any]:
    """The attention of one configuration, and the whole layer, with the keys of `cascadec cost --json`."""
    model = Model(
        options.batch, options.heads, options.e, options.f, options.d, options.ffn, options.length
    )  # fmt: skip
    config = options.config
    energies = options.energies
    flow = Dataflow.of(json.loads(options.dataflow.read_text())) if options.dataflow else None
    if config == "flat":
        flow = flow or search_dataflow(model)
    mapped = search_mapping(config, model) if options.search else None
    chip = Chip(options.array, options.buffer)
    one = attention(config, model, flow, energies, options.as_published, mapped, chip)
    both = one_after_another((one, layers(config, model, energies, options.as_published, chip)))
    machine = machine_of(config, energies, chip)
    return {
        "config": config,
        "as_published": options.as_published,
        "text": {"attention": summary(one, machine), "end to end": summary(both, machine)},
        "dataflow": flow.row() if flow else None,
        "differences": [{"what": what, "energy": change} for what, change in differences(config, model, flow)],
        "attention": cost_json(one, machine),
        "end_to_end": cost_json(both, machine),
    }


def main() -> None:
    """Prints what the command line asks for."""
    options = arguments()
    if options.page is not None:
        write_whole(options.page, page(options.energies, options.published, options.as_published))
        print(f"written: {options.page}")
        return
    found = figures(options)
    text = found.pop("text")
    if options.json:
        print(json.dumps(found, indent=2, allow_nan=False))
        return
    if found["dataflow"]:
        text["dataflow"] = [", ".join(f"{name} {value}" for name, value in found["dataflow"].items())]
    told = [f"{one['what']} ({one['energy']:+.1%} energy)" for one in found["differences"]]
    text["what the published evaluation counts otherwise"] = told
    for part, lines in text.items():
        print("\n".join((f"{part}:", *(f"  {line}" for line in lines))))


if __name__ == "__main__":
    main()
