"""The inspector: what the compiler knows of a cascade, from equations to passes to kernels to time, on one page.

    page = inspect(trace, Asked(sizes={"M": 4096}, machines=("h200", "fusemax")))
    page.save("page.html")

`panels` asks the passes and backends, `page` makes the file. Which panels it has depends on the machines: a GPU shows
kernels, a spatial machine a cost, several devices a plan.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cascade import __version__
from cascade.backends.triton.emit import emit
from cascade.backends.triton.explain import Launch
from cascade.backends.triton.forecast import launches, static_facts
from cascade.backends.triton.machine import Machine, machine
from cascade.backends.triton.partition import Rest
from cascade.backends.triton.standalone import default_sizes
from cascade.errors import CascadeError
from cascade.inspector import panels
from cascade.inspector.page import Page
from cascade.ir import DType
from cascade.modelled import family
from cascade.pipeline import Trace

FEW = 12  # kernels up to which all are compiled for their static facts without being asked to
DEFAULT_GPU = "h200"


@dataclass(frozen=True, slots=True)
class Asked:
    """What a page is to show.

    `sizes` of shape symbols; kernels take likely ones for those that are missing, costs and plans need them.
    `machines` by name or file; `compiled`: whether kernels are compiled for the GPU, None where there are few.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    dtype: DType | None = None
    machines: Sequence[str] = ()
    mapping: str | None = None
    as_published: bool = False
    compiled: bool | None = None


@dataclass(frozen=True, slots=True)
class Ran:
    """The kernels of a call that was made, in place of those that one would run: launches, texts by name, the GPU."""

    launches: Sequence[Launch | Rest]
    texts: Mapping[str, str]
    machine: Machine


def inspect(trace: Trace, asked: Asked | None = None, ran: Ran | None = None) -> Page:
    """The page of a cascade that went through the pipeline.

    Raises CommandError (C605) for a machine that nothing knows, and what its backend raises.
    """
    asked = asked or Asked()
    kinds = {name: family(name) for name in asked.machines}
    data: dict[str, Any] = {
        "version": __version__,
        "program": panels.program(trace),
        "analysis": panels.analysis(trace, asked.sizes, asked.dtype),
        "steps": panels.steps(trace),
        "kernels": [],
        "costs": [],
        "plans": [],
    }
    gpus = [name for name, kind in kinds.items() if kind == "gpu"] or ([] if ran else [DEFAULT_GPU])
    data["kernels"] = [kernels_run(trace, ran)] if ran else []
    data["kernels"] += [kernels_planned(trace, asked, name) for name in gpus]
    for name, kind in kinds.items():
        if kind == "spatial":
            data["costs"].append(panels.cost(trace, asked.sizes, name, asked.mapping, asked.as_published))
        elif kind == "several":
            data["plans"].append(panels.plan(trace, asked.sizes, asked.dtype or DType.BF16, name))
    return Page(f"{trace.source.name} - cascade inspector", data)


def kernels_planned(trace: Trace, asked: Asked, name: str) -> dict[str, Any]:
    """The kernels that a call would run on a GPU that need not be there; what no backend plans says why."""
    trial = importlib.import_module("cascade.trial")  # lazily: it needs torch
    gpu = machine(name)
    types = trial.param_types(trace.source, asked.dtype or DType.BF16)
    told: dict[str, Any] = {"dtype": (asked.dtype or DType.BF16).value, "ran": False, "given": sorted(asked.sizes)}
    try:
        sizes = default_sizes(trace.final, types, asked.sizes)
        found = launches(trace.final, sizes, types, gpu)
    except CascadeError as error:
        return {**told, "machine": gpu.name, "sizes": dict(asked.sizes), "kernels": [], "refused": str(error)}
    own = [step for step in found if isinstance(step, Launch)]
    kernels = [None if step.by_library else step.kernel for step in own]
    if asked.compiled or (asked.compiled is None and len(kernels) <= FEW):
        facts = iter(static_facts(kernels, gpu))
        found = tuple(replace(step, facts=next(facts)) if isinstance(step, Launch) else step for step in found)
    texts = {kernel.name: emit(kernel).text for kernel in kernels if kernel is not None}
    return panels.kernels(found, texts, gpu, trace.source, {**told, "sizes": sizes})


def kernels_run(trace: Trace, ran: Ran) -> dict[str, Any]:
    """The kernels that a call ran, with what was measured of them where it was tuned."""
    sizes = {name: size for step in ran.launches if isinstance(step, Launch) for name, size in step.sizes.items()}
    told = {"dtype": None, "ran": True, "given": sorted(sizes), "sizes": sizes}
    return panels.kernels(ran.launches, ran.texts, ran.machine, trace.source, told)
