"""What the page shows, as one JSON object: a panel each, from the passes and backends that know it.

Nothing is computed here that has another home: passes are those of `report`, kernels those of the planner, times those
of its model, costs and plans those of their backends. Everything is text, numbers and lists of these; the page builds
its elements from them, so no text of a program is ever read as markup.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from cascade.backends.triton.count import work
from cascade.backends.triton.explain import BY_LIBRARY, Launch, tiles_text
from cascade.backends.triton.machine import Machine
from cascade.backends.triton.partition import Rest
from cascade.backends.triton.plan import Role
from cascade.inspector.graph import Graph, graph
from cascade.inspector.links import line_names, owner
from cascade.inspector.maths import typeset
from cascade.ir import Cascade, DType, Stmt
from cascade.modelled import cost_on, plan_on
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.lift import Lift, lift_reductions
from cascade.passes.report import report
from cascade.pipeline import Trace, run_pipeline
from cascade.text import render, render_declaration, render_stmt
from cascade.walk import defines, reads

Panel = dict[str, Any]

PATTERN = re.compile(r"[A-Za-z_]\w*")
TOUCHING_US = 1e-6  # between the end of a task and what begins with it
CHANNELS = ("matrix", "exp", "vector", "memory", "l2", "latency", "launch")


# --- the program and its passes --------------------------------------------------------------------------------------


def program(trace: Trace) -> Panel:
    """The program as it was written, its declarations and its statements, before and after the pipeline."""
    source, final = trace.source, trace.final
    file, text = _source_text(source)
    known = {param.name for param in source.params} | {name for stmt in source.body for name in defines(stmt)}
    return {
        "cascade": source.name,
        "file": file,
        "source": text.split("\n"),
        "declared": [_declared("input", render_declaration(param), param.name) for param in source.params]
        + [_declared("result", render_declaration(result), result.name) for result in source.results],
        "written": [_statement(stmt, known) for stmt in source.body],
        "final": [_statement(stmt, known) for stmt in final.body],
    }


def _declared(kind: str, text: str, name: str) -> Panel:
    return {"kind": kind, "name": name, "text": text}


def _statement(stmt: Stmt, known: Collection[str]) -> Panel:
    """One statement: what it defines and reads, as text and as maths, the line of the source it came from."""
    names = defines(stmt)
    return {
        "names": names,
        "reads": reads(stmt),
        "text": render_stmt(stmt),
        "math": typeset(stmt),
        "line": 0 if stmt.span is None or stmt.span.source.text is None else stmt.span.line,
        "origin": next((name for name in names if name in known), owner(names[0], known)),
    }


def _source_text(source: Cascade) -> tuple[str, str]:
    """The name and the text of what the author wrote where that was text; the cascade as text where it was Python."""
    spans = [stmt.span for stmt in source.body if stmt.span is not None]
    name = spans[0].source.name if spans else ""
    text = spans[0].source.text if spans else None
    return name, (render(source) if text is None else text).rstrip()


def analysis(trace: Trace, sizes: Mapping[str, int], dtype: DType | None) -> Panel:
    """Passes over each rank with their witness, what lifting found, what moves; the graph, plain and lifted."""
    reached = [step.after for step in trace.steps if step.name == Canonicalize.name]
    canonical = reached[0] if reached else run_pipeline(trace.source, Canonicalize.name).final
    lifting = lift_reductions(canonical) if any(step.name == Lift.name for step in trace.steps) else None
    found = report(canonical, lifting, sizes, dtype)
    return {**found, "graphs": {"plain": _graph(graph(canonical)), "lifted": _graph(graph(trace.final))}}


def _graph(found: Graph) -> Panel:
    return {
        "nodes": [[p.name, p.kind, p.column, p.row, list(p.ranks)] for p in found.places],
        "edges": [list(edge) for edge in found.edges],
        "together": [
            {"kind": t.kind, "along": t.along, "statements": list(t.statements), "text": t.text}
            for t in found.together
        ],
    }  # fmt: skip


def steps(trace: Trace) -> list[Panel]:
    """Every step of the pipeline: whether it changed something, and its text, line by line, against the one before."""
    shown = [{"name": "source", "changed": True, "lines": [[" ", line] for line in render(trace.source).split("\n")]}]
    for step in trace.steps:
        before, after = render(step.before).split("\n"), render(step.after).split("\n")
        changed = step.after is not step.before
        shown.append({"name": step.name, "changed": changed, "lines": _difference(before, after) if changed else []})
    return shown


def _difference(before: Sequence[str], after: Sequence[str]) -> list[list[str]]:
    """All lines of the text after, and where they are gone those of the text before: [" ", "-" or "+", line]."""
    found: list[list[str]] = []
    for tag, a, b, c, d in difflib.SequenceMatcher(None, before, after).get_opcodes():
        found += [[" ", line] for line in after[c:d]] if tag == "equal" else []
        found += [["-", line] for line in before[a:b]] if tag != "equal" else []
        found += [["+", line] for line in after[c:d]] if tag != "equal" else []
    return found


# --- kernels ---------------------------------------------------------------------------------------------------------


def kernels(
    launches: Sequence[Launch | Rest],
    texts: Mapping[str, str],
    machine: Machine,
    source: Cascade,
    told: Mapping[str, Any],
) -> Panel:
    """The kernels of a call in order: statements beside text, line by line, tiles, times, what they compiled to.

    `texts` are those of the kernels, by name: what a library does has none. `told` is what is known of the call: sizes,
    type, where it ran.
    """
    known = {param.name for param in source.params} | {name for stmt in source.body for name in defines(stmt)}
    shown = [
        _outside(step, known)
        if isinstance(step, Rest)
        else _kernel(step, texts.get(step.kernel.name, f"# {BY_LIBRARY}"), machine, known)
        for step in launches
    ]
    predicted = [one["predicted_us"] for one in shown if one.get("predicted_us") is not None]
    measured = [one["measured_us"] for one in shown if one.get("measured_us") is not None]
    whole = len(measured) == sum("text" in one for one in shown) and bool(measured)
    return {
        **told,
        "machine": machine.name,
        "bandwidth_tbs": machine.bandwidth_tbs,
        "matrix_tflops": dict(machine.matrix_tflops),
        "predicted_us": sum(predicted),
        "measured_us": sum(measured) if whole else None,
        "kernels": shown,
    }


def _outside(group: Rest, known: Collection[str]) -> Panel:
    return {
        "name": group.names[0],
        "statements": [_origin(render_stmt(stmt), known) for stmt in group.statements],
        "reason": group.reason,
    }


def _kernel(launch: Launch, text: str, machine: Machine, known: Collection[str]) -> Panel:
    """One kernel."""
    kernel, choice = launch.kernel, launch.choice
    statements = [_origin(line, known) for line in kernel.statements]
    named = {name for one in statements for name in one["names"]} | {tensor.name for tensor in kernel.tensors}
    done = work(kernel, launch.sizes)
    parts = {} if choice is None else dict(choice.estimate.parts)
    return {
        "name": kernel.name,
        "statements": statements,
        "text": text.rstrip().split("\n"),
        "lines": [[line, list(names)] for line, names in line_names(text, kernel.name, named).items()],
        "why": [*kernel.why, *(() if choice is None else _why(choice))],
        "tiles": None if choice is None else tiles_text(choice.tiling),
        "grid": [axis.rank for axis in kernel.grid],
        "stream": [axis.rank for axis in kernel.axes if axis.role is Role.STREAM],
        "programs": None if launch.by_library else done.programs,
        "read_bytes": done.read_bytes,
        "write_bytes": done.write_bytes,
        "matrix_flops": done.matrix_flops,
        "matrix_dtype": done.matrix_dtype,
        "predicted_us": None if choice is None else finite(choice.estimate.time_us),
        "measured_us": None if choice is None or choice.milliseconds is None else 1e3 * choice.milliseconds,
        "bound": None if choice is None else choice.estimate.bound,
        "busy_us": [[unit, parts[unit]] for unit in CHANNELS if unit in parts],
        "blocks_per_sm": None if choice is None else choice.estimate.blocks_per_sm,
        "waves": None if choice is None else finite(choice.estimate.waves),
        "static": _static(launch.facts),
    }


def _why(choice: Any) -> list[str]:
    """Why a kernel has its tiles, and the next best."""
    others = [
        f"next: {tiles_text(one.tiling)}: "
        + (
            f"{one.estimate.time_us:.1f} us predicted"
            if one.milliseconds is None
            else f"{1e3 * one.milliseconds:.1f} us"
        )
        for one in choice.others
    ]
    return [*([choice.estimate.why] if choice.estimate.why else []), f"chosen as {choice.how}", *others]


def _static(facts: Any) -> Panel | None:
    """What the machine code of a kernel shows; None where it was not compiled."""
    if facts is None:
        return None
    fields = ("registers", "spills", "shared_bytes", "blocks_per_sm", "wgmma", "mma", "tma_loads", "tma_stores")
    return {
        **{name: getattr(facts, name, None) for name in fields},
        "serialized": list(getattr(facts, "serialized", ())),
        "failure": getattr(facts, "message", None),
    }


def _origin(text: str, known: Collection[str]) -> Panel:
    """A statement of a kernel by its text, with the statement of the author that it came from, by name."""
    names = [match.group() for part in text.partition(" = ")[0].split(", ") if (match := PATTERN.match(part))]
    origins = [owner(name, known) for name in names]
    return {"names": names, "text": text, "origin": next((name for name in origins if name), None)}


def finite(value: float) -> float | None:
    """The number, or None where it is none that JSON has."""
    return value if math.isfinite(value) else None


# --- costs and plans -------------------------------------------------------------------------------------------------


def cost(trace: Trace, sizes: Mapping[str, int], name: str, path: str | None, as_published: bool) -> Panel:
    """What the cascade costs on a spatial machine, and by which mapping."""
    found = cost_on(trace, sizes, name, path, as_published)
    mapping = found["mapping"].rstrip().split("\n")
    return {**found.pop("cost"), **found, "sizes": dict(sizes), "mapping": mapping}


def plan(trace: Trace, sizes: Mapping[str, int], dtype: DType, name: str) -> Panel:
    """The plan of a cascade for several devices, with the chain of tasks that decides how long it takes."""
    found = plan_on(trace, sizes, dtype, name)
    return {**found, "sizes": dict(sizes), "critical": critical(found["tasks"])}


def critical(tasks: Sequence[Mapping[str, Any]]) -> list[str]:
    """The chain of tasks that ends last, each of which begins when the one before it ends, first to last.

    Of several it is the one that begins first; where these are as long, one along waits.
    """
    chains: dict[str, list[Mapping[str, Any]]] = {}
    for task in sorted(tasks, key=lambda one: (one["start"], one["end"])):
        before = [one for one in tasks if one["name"] in chains and abs(one["end"] - task["start"]) < TOUCHING_US]
        before.sort(key=lambda one: (chains[one["name"]][0]["start"], one["name"] not in task["waits"]))
        chains[task["name"]] = [*(chains[before[0]["name"]] if before else ()), task]
    last = max(tasks, key=lambda task: task["end"], default=None)
    return [] if last is None else [task["name"] for task in chains[last["name"]]]
