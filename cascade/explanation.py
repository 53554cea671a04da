"""What the compiler knows of a cascade, as one JSON object: its shape, passes, lifts, refusals, what it costs.

    overview(trace)                        Einsums in their folds and groups, ranks with passes, what each step changed
    explanation(trace, request)            passes with witnesses, lifts, rejected edges, and the machine's part:
        "kernels"      one GPU: kernels in order, bytes, operations, predicted time, what bounds it and by how much
        "plan"         several devices: the plan, whose times are modelled
        "cost"         a modelled spatial machine: cycles, use of units, traffic, energy

Nothing is decided here: the numbers are those of `report`, of the planner's forecast, of the plan, of the cost model.
Times are predicted, for machines that need not be there.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cascade import pipeline
from cascade.errors import CallError, CommandError, Diagnostic
from cascade.inference import infer_shapes
from cascade.ir import Cascade, DType, Fold, Fuse, GroupBy, Stmt
from cascade.modelled import cost_on, families, family, plan_on
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.lift import lift_reductions
from cascade.passes.report import report
from cascade.text import render_declaration, render_directive, render_stmt
from cascade.walk import defines

STATIC = ("registers", "spills", "shared_bytes", "blocks_per_sm", "wgmma", "mma", "serialized")
"""What is told of a kernel's machine code."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a cascade: sizes, the type of untyped parameters, a machine, whether kernels are compiled."""

    sizes: Mapping[str, int] = field(default_factory=dict)
    dtype: DType | None = None
    machine: str | None = None
    static: bool = False
    in_place: Mapping[str, str] = field(default_factory=dict)  # results that take the memory of a parameter


# --- the cascade itself ----------------------------------------------------------------------------------------------


def overview(trace: pipeline.Trace) -> dict[str, Any]:
    """A cascade after the pipeline: which Einsums run together, its ranks, what each step changed."""
    final = trace.final
    passes = passes_of(trace)
    return {
        "cascade": final.name,
        "parameters": [render_declaration(param) for param in final.params],
        "results": [render_declaration(result) for result in final.results],
        "together": together(final),
        "directives": [
            render_directive(item).split("\n")[0].removesuffix(" {")
            for item in final.schedule
            if not isinstance(item, Fold | Fuse | GroupBy)
        ],
        "ranks": {
            rank: {"extent": str(infer_shapes(final).ranks.get(rank, "")), **{k: found[k] for k in SHOWN_OF_RANK}}
            for rank, found in passes["ranks"].items()
        },
        "steps": changes(trace),
    }


SHOWN_OF_RANK = ("plain", "lifted", "witness", "phases", "inputs")


def passes_of(trace: pipeline.Trace, request: Request | None = None) -> dict[str, Any]:
    """The report about the cascade in canonical form."""
    asked = request or Request()
    reached = [step.after for step in trace.steps if step.name == Canonicalize.name]
    return report(reached[0], lift_reductions(reached[0]), asked.sizes, asked.dtype)


def changes(trace: pipeline.Trace) -> list[dict[str, Any]]:
    """What each step did: statements behind it, and the lines of text that it added and removed."""
    found = []
    for step in trace.steps:
        lines = [] if step.after is step.before else pipeline.step_diff(step).splitlines()[2:]
        found.append({
            "pass": step.name, "changed": step.after is not step.before, "statements": len(step.after.body),
            "added": sum(line.startswith("+") for line in lines),
            "removed": sum(line.startswith("-") for line in lines),
        })  # fmt: skip
    return found


@dataclass(frozen=True, slots=True)
class _Group:
    """Statements that a directive names together, in words, and those that it runs behind the trip."""

    title: str
    names: frozenset[str]
    behind: frozenset[str] = frozenset()


def together(final: Cascade) -> list[dict[str, Any]]:
    """The statements as they run: each in the smallest of the groups that have it, groups inside of others."""
    groups = [found for item in final.schedule if (found := _group(item)) is not None]
    return _nested(final.body, sorted(groups, key=lambda group: -len(group.names)))


def _group(item: object) -> _Group | None:
    match item:
        case Fold():
            state = f", state {', '.join(item.state)}" if item.state else ""
            return _Group(f"fold over {item.rank}{state}", frozenset(item.update), frozenset(item.finalize))
        case Fuse():
            return _Group(f"one trip over {item.rank}", frozenset(item.statements))
        case GroupBy():
            return _Group(render_directive(item).partition("} ")[2], frozenset(item.statements))
        case _:
            return None


def _nested(body: Sequence[Stmt], groups: Sequence[_Group]) -> list[dict[str, Any]]:
    """The statements of a body, those of a group below it; what finalizes a fold stands behind it."""
    found: list[dict[str, Any]] = []
    left = list(body)
    while left:
        stmt = left[0]
        home = next((group for group in groups if group.names.intersection(defines(stmt))), None)
        if home is None:
            behind = [group.title.partition(",")[0] for group in groups if group.behind.intersection(defines(stmt))]
            found.append({"statement": render_stmt(stmt), "defines": list(defines(stmt)), "finalizes": behind})
            left = left[1:]
            continue
        inside = [one for one in left if home.names.intersection(defines(one))]
        inner = [group for group in groups if group is not home and group.names < home.names]
        found.append({"group": home.title, "below": _nested(inside, inner)})
        left = [one for one in left if one not in inside]
    return found


# --- what it costs to run --------------------------------------------------------------------------------------------


def explanation(trace: pipeline.Trace, request: Request) -> dict[str, Any]:
    """What is known of a cascade and, where a machine is named, what it costs to run there."""
    told: dict[str, Any] = {"sizes": dict(request.sizes), "dtype": request.dtype.value if request.dtype else None}
    asked = "--static compiles" if request.static else "--in-place is of" if request.in_place else None
    if asked and (request.machine is None or family(request.machine) != "gpu"):
        gpus = ", ".join(families()["gpu"])
        message = f"{asked} kernels, and kernels are those of a GPU"
        raise CommandError(Diagnostic("C604", message, help=f"name one with --machine: {gpus}"))
    if request.machine is not None:
        told |= MODELS[family(request.machine)](trace, request)
    dtype = DType(told["dtype"]) if told["dtype"] else None
    found = passes_of(trace, replace(request, sizes=told["sizes"], dtype=dtype))
    return {
        "cascade": trace.source.name,
        "machine": request.machine,
        **told,
        "passes": found,
        "rejected": rejected(found),
        "steps": changes(trace),
        "together": together(trace.final),
    }


def rejected(passes: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every edge between two reductions that is not lifted: the rank, the two, why, and the evidence."""
    return [
        {
            "rank": rank, "producer": item["edge"][0], "reduction": item["edge"][1], "reason": item["reason"],
            "condition": item["item"], "code": item["code"], "evidence": item["evidence"],
        }
        for rank, found in passes["ranks"].items() for item in found["blocked"]
    ]  # fmt: skip


def _on_gpu(trace: pipeline.Trace, request: Request) -> dict[str, Any]:
    """The kernels of a first call on one GPU. Sizes that are not given are those that `emit` plans for."""
    trial = importlib.import_module("cascade.trial")  # lazily: it needs torch
    forecaster = importlib.import_module("cascade.backends.triton.forecast")
    writer = importlib.import_module("cascade.backends.triton.standalone")
    machine = importlib.import_module("cascade.backends.triton.machine").machine(request.machine)
    try:
        importlib.import_module("cascade.arguments").check_in_place(trace.source, request.in_place)
    except CallError as error:  # what is wrong is the command, not the program
        raise CommandError(error.diagnostics) from None
    dtype = request.dtype or DType.BF16
    types = trial.param_types(trace.source, dtype)
    if empty := [name for name, size in request.sizes.items() if not size]:
        raise CommandError(
            Diagnostic("C323", f"{empty[0]} is 0: nothing is launched then", help=f"give -s {empty[0]}=1")
        )
    sizes = writer.default_sizes(trace.final, types, request.sizes)
    found, views = forecaster.steps(trace.final, sizes, types, machine, request.in_place)
    kernels = [step for step in found if isinstance(step, forecaster.Forecast)]
    plans = [None if kernel.tiling.library else kernel.kernel for kernel in kernels]
    compiled = forecaster.static_facts(plans, machine) if request.static else [None] * len(kernels)
    listed = [kernel_json(kernel, facts) for kernel, facts in zip(kernels, compiled, strict=True)]
    return {
        "sizes": sizes,
        "defaulted": [name for name in sizes if name not in request.sizes],
        "dtype": dtype.value,
        "kernels": listed,
        "outside": [
            {"names": names, "reason": step.reason}
            for step in found
            if not isinstance(step, forecaster.Forecast) and (names := [n for n in step.names if n not in views])
        ],
        "predicted_us": _sum(kernel["predicted_us"] for kernel in listed),
        **{key: sum(kernel[key] for kernel in listed) for key in ("read_bytes", "write_bytes", "flops")},
    }


def kernel_json(found: Any, facts: Any = None) -> dict[str, Any]:
    """One kernel: what it fuses, its tiles, what it moves and computes, what is predicted of it, and what bounds it."""
    explain = importlib.import_module("cascade.backends.triton.explain")
    estimate, work = found.estimate, found.work
    fits = math.isfinite(estimate.time_us)
    parts = dict(estimate.parts)
    return {
        "kernel": found.name,
        "defines": list(found.defines),
        "statements": list(found.kernel.statements),
        "why": [*found.kernel.why],
        "tile": explain.tiles_text(found.tiling),
        "library": explain.BY_LIBRARY if found.tiling.library else None,
        "programs": work.programs,
        "read_bytes": work.read_bytes,
        "write_bytes": work.write_bytes,
        "flops": work.matrix_flops,
        "vector_flops": work.vector_flops,
        "exps": work.exps,
        "predicted_us": estimate.time_us if fits else None,
        "bound": estimate.bound,
        "of_bound": parts[estimate.bound] / estimate.time_us if fits and estimate.bound in parts else None,
        "units": {unit: us / estimate.time_us for unit, us in parts.items()} if fits else {},
        "says": estimate.text(),
        "because": estimate.why,
        "chosen": found.choice.how,
        "registers": work.registers,
        "shared_bytes": work.shared_bytes,
        "blocks_per_sm": estimate.blocks_per_sm,
        "static": None if facts is None else {key: getattr(facts, key, None) for key in STATIC},
        "failure": getattr(facts, "message", None),
    }


def modelled(emitted: Any, machine: Any, registers: int | None, shared_bytes: int | None) -> dict[str, Any]:
    """What the model says of a kernel that is written to a file, at the sizes that it is planned for."""
    counter = importlib.import_module("cascade.backends.triton.count")
    tuner = importlib.import_module("cascade.backends.triton.tune")
    work = counter.work(emitted.kernel, emitted.extents, registers, shared_bytes)
    estimate = tuner.predict(machine, emitted.kernel, emitted.extents, registers, shared_bytes)
    return {
        "machine": machine.name,
        "predicted_us": estimate.time_us if math.isfinite(estimate.time_us) else None,
        "bound": estimate.bound,
        "read_bytes": work.read_bytes,
        "write_bytes": work.write_bytes,
        "flops": work.matrix_flops,
    }


def _sum(values: Iterable[float | None]) -> float | None:
    """The sum; None where one is not known."""
    found = list(values)
    return None if None in found else math.fsum(value for value in found if value is not None)


def _on_devices(trace: pipeline.Trace, request: Request) -> dict[str, Any]:
    """The plan for several devices."""
    dtype = request.dtype or DType.BF16
    return {"dtype": dtype.value, "plan": plan_on(trace, request.sizes, dtype, str(request.machine))}


def _on_arrays(trace: pipeline.Trace, request: Request) -> dict[str, Any]:
    """The cost on a modelled spatial machine, by the mapping of the schedule, else by the fastest that is found."""
    found = cost_on(trace, request.sizes, str(request.machine))
    return {"cost": found["cost"], "summary": found["summary"]}


MODELS = {"gpu": _on_gpu, "several": _on_devices, "spatial": _on_arrays}
"""What models a cascade on a machine of each family."""
