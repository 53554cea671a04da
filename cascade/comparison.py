"""What changed between two cascades, two schedules of one cascade, or two versions of one kernel.

    compared(trace, other, request)     statements, directives, passes, lifts, bytes, operations, and on a machine times
    kernels(left, right)                two emitted files, or what `cascadec emit --json` printed of them

Every amount stands as `before` and `after`, with their `ratio` where both are numbers that have one. Kernels are paired
by what they define. An emitted file is read as text and as a syntax tree and is never run; nor is anything in JSON.
"""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cascade import pipeline
from cascade.arguments import shape_symbols
from cascade.compiled import read_program, specialise
from cascade.errors import CascadeError, CommandError, Diagnostic
from cascade.explanation import Request, explanation
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade
from cascade.passes.canonicalize import Canonicalize
from cascade.programs import find, sized
from cascade.text import render, render_directive, render_stmt
from cascade.verify import verify
from cascade.walk import defines

AMOUNTS = ("unfused", "fused", "flops", "transcendental", "lifted_flops", "lifted_transcendental")
KERNEL_AMOUNTS = ("predicted_us", "read_bytes", "write_bytes", "flops", "registers", "shared_bytes", "blocks_per_sm")
KERNEL_WORDS = ("tile", "bound")
PLAN_AMOUNTS = ("makespan_us", "bound_us", "serial_us", "cycle_us", "exposed_comm_us", "launches")
COST_AMOUNTS = ("latency_s", "cycles", "traffic_bytes", "energy_pj")


def change(before: Any, after: Any) -> dict[str, Any]:
    """Two values, and how the second stands to the first where that means something."""
    found: dict[str, Any] = {"before": before, "after": after}
    numbers = all(isinstance(one, int | float) and not isinstance(one, bool) for one in (before, after))
    return found | {"ratio": after / before if numbers and before else None}


def differs(found: Mapping[str, Any]) -> bool:
    """Whether a change is one."""
    return bool(found["before"] != found["after"])


def of_files(before: str, after: str, request: Request) -> dict[str, Any]:
    """What changed between what two files hold: kernels where both are emitted, else cascades.

    Raises C616 where only one of them is a kernel, C613 for a size of a symbol that neither cascade has.
    """
    emitted = [is_kernel_file(file) for file in (before, after)]
    if all(emitted):
        return kernels(before, after, request)
    if any(emitted):
        kernel, other = (before, after) if emitted[0] else (after, before)
        message = f"{kernel} is a kernel and {other} is none"
        raise CommandError(Diagnostic("C616", message, help=f"compare two cascades, or {EMIT_HELP}"))
    left, right = find(before).cascade, find(after).cascade
    shared = set(shape_symbols(left)) | set(shape_symbols(right))
    sized(left, [name for name in request.sizes if name not in shared])
    typed = [pipeline.run_pipeline(specialise(side, {}, request.dtype)) for side in (left, right)]
    return {**compared(typed[0], typed[1], request), "before": before, "after": after}


# --- cascades --------------------------------------------------------------------------------------------------------


def compared(before: pipeline.Trace, after: pipeline.Trace, request: Request) -> dict[str, Any]:
    """What changed between two cascades; with a machine also what each costs there."""
    left = explanation(before, _known(before, request, request.sizes))
    planned = {**left["sizes"], **request.sizes}  # what the first was planned for, the second is planned for as well
    right = explanation(after, _known(after, request, planned))
    payload: dict[str, Any] = {
        "what": "cascades",
        "before": before.source.name,
        "after": after.source.name,
        "diff": pipeline.diff(render(before.source), render(after.source), "before", "after"),
        "statements": _statements(_canonical(before), _canonical(after)),
        "schedule": _lines(_directives(before.final), _directives(after.final)),
        "ranks": _ranks(left["passes"]["ranks"], right["passes"]["ranks"]),
        "lifted": _lines(_lifts(left), _lifts(right)),
        "rejected": _lines(_refusals(left), _refusals(right)),
        "amounts": _amounts(left["passes"]["traffic"], right["passes"]["traffic"]),
        "machine": request.machine,
    }
    for key, compare in MODELLED.items():
        if key in left and key in right:
            payload |= compare(left, right)
    payload["same"] = _same(payload)
    return payload


def _known(trace: pipeline.Trace, request: Request, sizes: Mapping[str, int]) -> Request:
    """The request with the sizes of those symbols that this one of the two has."""
    known = set(shape_symbols(trace.source))
    return replace(request, sizes={name: size for name, size in sizes.items() if name in known})


def _same(payload: Mapping[str, Any]) -> bool:
    """Whether the two are one and the same after the pipeline: statements, schedule and amounts."""
    lists = (payload["statements"], payload["schedule"])
    return not any(found[key] for found in lists for key in found) and not any(
        map(differs, payload["amounts"].values())
    )


def _canonical(trace: pipeline.Trace) -> Cascade:
    return next(step.after for step in trace.steps if step.name == Canonicalize.name)


def _statements(before: Cascade, after: Cascade) -> dict[str, Any]:
    """The statements in canonical form: added, removed, and those that define the same by another expression."""
    left = {", ".join(defines(stmt)): render_stmt(stmt) for stmt in before.body}
    right = {", ".join(defines(stmt)): render_stmt(stmt) for stmt in after.body}
    return {
        "added": [text for name, text in right.items() if name not in left],
        "removed": [text for name, text in left.items() if name not in right],
        "changed": [
            {"name": name, "before": text, "after": right[name]}
            for name, text in left.items()
            if name in right and right[name] != text
        ],
    }


def _directives(final: Cascade) -> list[str]:
    """Each directive in one line: `fold n { state R; update S, R; ... }`."""
    texts = (render_directive(item).splitlines() for item in final.schedule)
    return ["; ".join(line.strip() for line in lines).replace("{; ", "{ ").replace("; }", " }") for lines in texts]


def _lines(before: Sequence[str], after: Sequence[str]) -> dict[str, list[str]]:
    """What is in one of two lists only."""
    added, removed = Counter(after), Counter(before)
    return {"added": [*(added - removed).elements()], "removed": [*(removed - added).elements()]}


def _ranks(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The ranks over which another number of passes is made, or for another reason; null where a rank is not."""
    found: dict[str, Any] = {}
    for rank in dict.fromkeys((*before, *after)):
        left, right = before.get(rank, {}), after.get(rank, {})
        one = {key: change(left.get(key), right.get(key)) for key in ("plain", "lifted", "phases", "witness")}
        if any(map(differs, one.values())):
            found[rank] = one
    return found


def _lifts(payload: Mapping[str, Any]) -> list[str]:
    ranks = payload["passes"]["ranks"]
    lifts = [(rank, item) for rank, found in ranks.items() for item in found["lifts"]]
    return [
        f"{item['reduction']} over {rank}" + "".join(f", in the trip of {name}" for name in item["producers"][-1:])
        for rank, item in lifts
    ]


def _refusals(payload: Mapping[str, Any]) -> list[str]:
    return [
        f"{item['producer']} -> {item['reduction']} over {item['rank']}: {item['reason']}"
        + (f" ({item['code']})" if item["code"] else "")
        for item in payload["rejected"]
    ]


def _amounts(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """Bytes and operations: numbers where both are known, else polynomials."""
    found = {}
    for key in AMOUNTS:
        known = before[key] is not None and after[key] is not None
        found[key] = change(before[key], after[key]) if known else change(before[f"{key}_text"], after[f"{key}_text"])
    return found


# --- on a machine ----------------------------------------------------------------------------------------------------


def _gpu(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The kernels, paired by what they define, and the whole."""
    whole = {key: change(before[key], after[key]) for key in ("predicted_us", "read_bytes", "write_bytes", "flops")}
    listed = [paired_kernel(left, right) for left, right in pairs(before["kernels"], after["kernels"])]
    outside = [[name for one in side["outside"] for name in one["names"]] for side in (before, after)]
    sizes = {"before": before["sizes"], "after": after["sizes"]}
    return {"sizes": sizes, "whole": whole, "kernels": listed, "outside": change(*outside)}


def pairs(
    before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]]:
    """Kernels of two cascades side by side: those that define most in common first; None where one has no other."""
    shared = [
        (len(set(left["defines"]) & set(right["defines"])), -abs(i - j), i, j)
        for i, left in enumerate(before) for j, right in enumerate(after)
    ]  # fmt: skip
    partner: dict[int, int] = {}
    for common, _, i, j in sorted(shared, reverse=True):
        if common and i not in partner and j not in partner.values():
            partner[i] = j
    found: list[tuple[Mapping[str, Any] | None, Mapping[str, Any] | None]] = [
        (one, after[partner[i]] if i in partner else None) for i, one in enumerate(before)
    ]
    return found + [(None, one) for j, one in enumerate(after) if j not in partner.values()]


def paired_kernel(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Any]:
    """What changed in one kernel; null on the side that has none."""
    left, right = before or {}, after or {}
    found: dict[str, Any] = {key: change(left.get(key), right.get(key)) for key in ("kernel", "defines", *KERNEL_WORDS)}
    found |= {key: change(left.get(key), right.get(key)) for key in KERNEL_AMOUNTS}
    facts = [side.get("static") or {} for side in (left, right)]
    found["static"] = {
        key: change(facts[0].get(key), facts[1].get(key)) for key in dict.fromkeys([*facts[0], *facts[1]])
    }
    return found


def _plan(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The plans: their times, what is split, and how many tasks run how long."""
    left, right = before["plan"], after["plan"]
    lasts = [_lasting(side) for side in (left, right)]
    return {
        "whole": {key: change(left[key], right[key]) for key in PLAN_AMOUNTS},
        "split": change(left["split"], right["split"]),
        "exchange": change(left["exchange"], right["exchange"]),
        "tasks": {name: change(*(side.get(name) for side in lasts)) for name in dict.fromkeys([*lasts[0], *lasts[1]])},
    }


def _lasting(plan: Mapping[str, Any]) -> dict[str, float]:
    return {task["name"]: task["end"] - task["start"] for task in plan["tasks"]}


def _cost(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The costs on a spatial machine."""
    left, right = before["cost"], after["cost"]
    units = dict.fromkeys([*left["utilisation"], *right["utilisation"]])
    einsums = dict.fromkeys([*left["per_einsum"], *right["per_einsum"]])
    return {
        "whole": {key: change(left[key], right[key]) for key in COST_AMOUNTS},
        "units": {unit: change(left["utilisation"].get(unit), right["utilisation"].get(unit)) for unit in units},
        "einsums": {name: change(_cycles(left, name), _cycles(right, name)) for name in einsums},
    }


def _cycles(cost: Mapping[str, Any], name: str) -> Any:
    return cost["per_einsum"].get(name, {}).get("cycles")


MODELLED: dict[str, Callable[[Mapping[str, Any], Mapping[str, Any]], dict[str, Any]]] = {
    "kernels": _gpu,
    "plan": _plan,
    "cost": _cost,
}
"""How two explanations are compared, by what each machine adds to them."""


# --- kernels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class KernelFile:
    """An emitted file, read: what it says of itself, its functions by name, and which numbers it is launched with.

    `cascade` is what its documentation says that it computes, None where that is not all that a cascade takes.
    """

    path: str
    title: str
    statements: tuple[str, ...]
    functions: Mapping[str, str]
    launched: Mapping[str, str]
    instructions: Mapping[str, int]
    cascade: Cascade | None
    static: Mapping[str, int]


def is_kernel_file(file: str) -> bool:
    """Whether a file is one that `cascadec emit` wrote, or the JSON that it printed; told by its text."""
    if file.endswith(".json"):
        return True
    if not file.endswith(".py") or not Path(file).is_file():
        return False
    try:
        tree = ast.parse(Path(file).read_bytes())
    except (OSError, ValueError, SyntaxError, RecursionError):
        return False
    imported = {name.partition(".")[0] for node in ast.walk(tree) for name in _imported(node)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    return "triton" in imported and "cascade" not in imported and "run" in functions


def _imported(node: ast.AST) -> list[str]:
    """The modules that a statement imports."""
    match node:
        case ast.Import(names=names):
            return [one.name for one in names]
        case ast.ImportFrom(module=str(module)):
            return [module]
        case _:
            return []


def kernels(before: str, after: str, request: Request) -> dict[str, Any]:
    """What changed between two versions of a kernel: two emitted files, or two objects that `emit --json` printed."""
    if before.endswith(".json") != after.endswith(".json"):
        message = f"{before} and {after} are not of one kind"
        raise CommandError(
            Diagnostic("C616", message, help="compare two emitted .py files, or two .json of emit --json")
        )
    if before.endswith(".json"):
        return _objects(before, after)
    left, right = read_kernel(before), read_kernel(after)
    payload = _files(left, right)
    if left.cascade is not None and right.cascade is not None:
        asked = replace(request, sizes={**right.static, **left.static, **request.sizes})
        traces = [pipeline.run_pipeline(side) for side in (left.cascade, right.cascade)]
        payload["cascade"] = compared(traces[0], traces[1], asked)
    return payload


def read_kernel(path: str) -> KernelFile:
    """An emitted file as text and syntax tree; C616 where it is no Python."""
    text = read_program(path)
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        raise CommandError(Diagnostic("C616", f"{path} is no emitted kernel: {error}", help=EMIT_HELP)) from None
    title, _, rest = (ast.get_docstring(tree) or "").partition("\n")
    functions = {node.name: _source(text, node) for node in tree.body if isinstance(node, ast.FunctionDef)}
    jitted = [node for node in tree.body if isinstance(node, ast.FunctionDef) and _is_jitted(node)]
    numbers = {
        target.id: ast.unparse(node.value)
        for node in tree.body if isinstance(node, ast.Assign)
        for target in node.targets if isinstance(target, ast.Name) and target.id.isupper()
    }  # fmt: skip
    for launch in _launches(tree, {node.name for node in jitted}):
        numbers |= launch
    statements = tuple(line.strip() for line in rest.splitlines() if line.strip())
    static = _integers(tree)
    return KernelFile(path, title, statements, functions, numbers, _instructions(jitted), _stated(tree), static)


EMIT_HELP = "give files that `cascadec emit --backend triton -o DIR` wrote"


def _integers(tree: ast.Module) -> dict[str, int]:
    """The sizes that are numbers in the kernels, `STATIC = {"E": 128}`."""
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="STATIC")], value=ast.Dict(keys=keys, values=values)):
                pairs = zip(keys, values, strict=True)
                return {
                    key.value: value.value for key, value in pairs
                    if isinstance(key, ast.Constant) and isinstance(value, ast.Constant)
                    and isinstance(key.value, str) and isinstance(value.value, int)
                }  # fmt: skip
            case _:
                pass
    return {}


def _stated(tree: ast.Module) -> Cascade | None:
    """The cascade that the documentation of a file states: as text, or its statements and what `run` takes and gives.

    `Y[M] of X[M,N] and W[N], all bf16`   -->   cascade kernel(X[M,N], W[N]) -> Y[M] { ... }
    """
    title, _, rest = (ast.get_docstring(tree, clean=False) or "").partition("\n")
    run = next((node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "run"), None)
    told = " ".join((ast.get_docstring(run) or "").split("\n\n")[0].split()) if run else ""
    gives, _, takes = told.partition(" of ")
    alike = re.search(r", (?:all )?(\w+)\.$", told)
    every = alike[1] if alike else None
    text = "\n".join(line for line in rest.splitlines() if line.startswith("    "))
    if not text.lstrip().startswith("cascade "):
        name = re.match(r"\w+", title)
        declared = f"{_declared(takes, every)}) -> {_declared(gives, every)}"
        text = f"cascade {name[0] if name else 'kernel'}({declared} {{\n{text}\n}}"
    try:
        found = parse_cascade(text, "<kernel>")
        verify(found)
    except CascadeError:
        return None
    return found


def _declared(told: str, every: str | None) -> str:
    """`X[M,N] bf16 and I[M] i64` as a declaration: `X: bf16[M,N], I: i64[M]`."""
    found = re.findall(r"(\w+)(\[[\w,]*\])(?: (?!and\b|of\b)(\w+))?", told)
    typed = [(name, f": {dtype or every}" if dtype or every else "", shape) for name, shape, dtype in found]
    return ", ".join(map("".join, typed))


def _source(text: str, node: ast.FunctionDef) -> str:
    return (ast.get_source_segment(text, node) or "") + "\n"


def _is_jitted(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(one).startswith("triton.jit") for one in node.decorator_list)


def _launches(tree: ast.Module, names: set[str]) -> list[dict[str, str]]:
    """The grid and the named numbers of every launch, `kernel[grid](..., BLOCK_M=64, num_warps=4)`."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Subscript(value=ast.Name(id=name), slice=grid)) if name in names:
                numbers = {f"{name}.{one.arg}": ast.unparse(one.value) for one in node.keywords if one.arg}
                found.append({f"{name} grid": ast.unparse(grid), **numbers})
            case _:
                pass
    return found


def _instructions(jitted: Sequence[ast.FunctionDef]) -> dict[str, int]:
    """How often each operation of Triton is written down, and how often a descriptor is loaded or stored."""
    called = [
        ast.unparse(node.func) for function in jitted for node in ast.walk(function) if isinstance(node, ast.Call)
    ]
    named = (re.sub(r"^\w+_desc\.", "descriptor.", name) for name in called)
    return dict(sorted(Counter(name for name in named if re.fullmatch(r"(tl|descriptor)(\.\w+)+", name)).items()))


def _files(before: KernelFile, after: KernelFile) -> dict[str, Any]:
    names = dict.fromkeys([*before.functions, *after.functions])
    functions = {
        name: pipeline.diff(left, right, f"before {name}", f"after {name}")
        for name in names
        if (left := before.functions.get(name, "")) != (right := after.functions.get(name, ""))
    }
    found = {
        "what": "kernels",
        "before": before.path,
        "after": after.path,
        "title": change(before.title, after.title),
        "statements": _lines(before.statements, after.statements),
        "launched": _changed(before.launched, after.launched),
        "instructions": _changed(before.instructions, after.instructions),
        "functions": {
            "added": [name for name in names if name not in before.functions],
            "removed": [name for name in names if name not in after.functions],
            "diff": functions,
        },
    }
    return {**found, "same": not functions and not any(found["statements"].values()) and not found["launched"]}  # type: ignore[attr-defined]


def _changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The keys whose values differ."""
    found = {key: change(before.get(key), after.get(key)) for key in dict.fromkeys([*before, *after])}
    return {key: one for key, one in found.items() if differs(one)}


def _objects(before: str, after: str) -> dict[str, Any]:
    """What changed between two answers of `emit --json`: sizes, tiles, grids, what the machine code shows."""
    left, right = _object(before), _object(after)
    named = [{one["name"]: one for one in side["kernels"]} for side in (left, right)]
    found: dict[str, Any] = {
        "what": "kernels",
        "before": before,
        "after": after,
        "target": _changed(*({key: side.get(key) for key in ("cascade", "arch")} for side in (left, right))),
        "sizes": _changed(left["sizes"], right["sizes"]),
        "kernels": {
            name: _facts(*(side.get(name) for side in named)) for name in dict.fromkeys([*named[0], *named[1]])
        },
    }
    changed = (found["target"], found["sizes"], *found["kernels"].values())
    return {**found, "same": not any(changed)}


def _facts(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> dict[str, Any]:
    """What changed in one kernel, facts of tables by their names: `tile.n`, `static.registers`."""
    flat = [_flat(side or {}) for side in (before, after)]
    return _changed(*flat)


def _flat(kernel: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in kernel.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": one for name, one in value.items()}
        elif key != "file":
            found[key] = value
    return found


def _object(path: str) -> Mapping[str, Any]:
    """The JSON in a file; C616 where it is none that `emit --json` prints."""
    text = read_program(path)
    try:
        found = json.loads(text)
        if all(isinstance(one["name"], str) for one in found["kernels"]) and isinstance(found["sizes"], dict):
            return dict(found)
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise CommandError(Diagnostic("C616", f"{path} is not what emit --json prints", help=EMIT_HELP + " --json"))
