"""Machines by what they are; what their models say of a cascade: a cost on a spatial one, a plan for several devices.

    family("h200"), family("h100x8"), family("fusemax")        gpu, several, spatial

Nothing is decided here: costs are those of a given, a stated or a searched mapping, plans those of the planner.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from cascade.arguments import shape_symbols
from cascade.errors import CommandError, Diagnostic, quoted_list
from cascade.ir import Cascade, DType
from cascade.passes.canonicalize import Canonicalize
from cascade.pipeline import Trace, run_pipeline
from cascade.wording import suggest


def families() -> dict[str, tuple[str, ...]]:
    """The names of machines by what they are: one GPU, several devices, a modelled spatial machine."""
    return {
        "gpu": tuple(importlib.import_module("cascade.backends.triton.machine").MACHINES),
        "several": importlib.import_module("cascade.backends.distributed.machine").shipped(),
        "spatial": importlib.import_module("cascade.backends.systolic.machine").shipped(),
    }


def family(name: str) -> str:
    """What a machine is; CommandError (C605) with the closest name of any family where there is none."""
    known = families()
    for kind, names in known.items():
        if name.lower() in names or (kind == "spatial" and name.endswith(".toml")):
            return kind
    listed = [one for names in known.values() for one in names]
    hint = suggest(name, listed, "the machines are")
    raise CommandError(Diagnostic("C605", f"there is no machine {name!r}", help=hint))


def need_sizes(cascade: Cascade, sizes: Mapping[str, int]) -> None:
    """CommandError (C323) where the size of a shape symbol is open."""
    missing = [name for name in shape_symbols(cascade) if name not in sizes]
    if missing:
        plural = "size" if len(missing) == 1 else "sizes"
        hint = f"give {' '.join(f'-s {name}=...' for name in missing)}"
        raise CommandError(Diagnostic("C323", f"the {plural} of {quoted_list(missing)} must be known", help=hint))


def plan_on(trace: Trace, sizes: Mapping[str, int], dtype: DType, name: str) -> dict[str, Any]:
    """The plan for several devices as `cascadec plan --json` has it."""
    need_sizes(trace.source, sizes)
    planner = importlib.import_module("cascade.backends.distributed.plan")
    machines = importlib.import_module("cascade.backends.distributed.machine")
    canonical = run_pipeline(trace.source, Canonicalize.name).final
    found: dict[str, Any] = planner.plan_json(planner.plan(canonical, dict(sizes), machines.node(name), dtype))
    return found


def cost_on(
    trace: Trace, sizes: Mapping[str, int], name: str, path: str | None = None, as_published: bool = False
) -> dict[str, Any]:
    """The cost as `cascadec cost --json` has it, a summary in words, and the mapping.

    The mapping is that of the file `path`, else that of the schedule, else the fastest that is found.
    """
    need_sizes(trace.source, sizes)
    parts = ("machine", "mapping", "work", "search", "cost", "report")
    machines, mappings, work, search, cost, told = (
        importlib.import_module(f"cascade.backends.systolic.{part}") for part in parts
    )
    machine = machines.machine(name)
    mapping = mappings.mapping(path) if path is not None else mappings.scheduled(trace.source)
    given = mapping is not None
    source = run_pipeline(trace.source, Canonicalize.name).final if given else trace.final
    cascaded = work.take_apart(source)
    mapping = mapping if given else search.search(cascaded, machine, dict(sizes))
    found = cost.Evaluator(cascaded, machine, mapping).cost(dict(sizes), as_published)
    return {
        "cost": told.cost_json(found, machine),
        "summary": told.summary(found, machine),
        "mapping": mappings.render_mapping(mapping),
        "searched": not given,
    }
