"""What a person reads of what the compiler knows: each view draws one JSON object of another module on the terminal.

    explanation(payload)        tables and trees, a timeline of the kernels, a sparkline for each unit
    comparison(payload)         what changed, and nothing else

Views decide nothing and compute no figure but shares of a whole; what they show, `--json` has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click

from cascade.doctor import Check
from cascade.terminal import CODE, Branch, changes, heading, letters, sparkline, table, timeline, tree

LEAST_SHARE = 0.005
"""Of a unit that is shown: one that is hardly used says nothing."""
MOST_TASKS = 12
"""Of a plan, and of differences, in a view; the object has all."""


def quantity(count: float | None, unit: str) -> str:
    """A number of units with three digits: `33.6 MB`."""
    if count is None:
        return "-"
    for prefix in ("", "k", "M", "G"):
        if count < 999.5:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} T{unit}"


def share(part: float | None) -> str:
    """A share in percent."""
    return "-" if part is None else f"{100 * part:.0f}%"


def microseconds(count: float | None) -> str:
    """A time in microseconds."""
    return "-" if count is None else f"{count:.1f} us"


def counted(count: int, one: str, many: str = "") -> str:
    """The count with its noun."""
    return f"{count} {one if count == 1 else many or one + 's'}"


# --- the cascade -----------------------------------------------------------------------------------------------------


def overview(payload: Mapping[str, Any]) -> None:
    """`show --rich`: the cascade as a tree."""
    title = f"{payload['cascade']}({', '.join(payload['parameters'])}) -> {', '.join(payload['results'])}"
    below = [Branch("einsums", tuple(_together(payload["together"])), "bold")]
    if payload["directives"]:
        below.append(Branch("schedule", tuple(map(_code, payload["directives"])), "bold"))
    below.append(Branch("ranks", tuple(_ranks(payload["ranks"])), "bold"))
    below.append(Branch("steps", tuple(map(_step, payload["steps"])), "bold"))
    tree(Branch(title, tuple(below), CODE))


def _code(text: str) -> Branch:
    return Branch(text, (), CODE)


def _together(listed: Sequence[Mapping[str, Any]]) -> Iterator[Branch]:
    """Einsums, those of a fold or of a group below it."""
    for one in listed:
        if "group" in one:
            yield Branch(one["group"], tuple(_together(one["below"])), "cyan")
        else:
            behind = f"   # behind the {', '.join(one['finalizes'])}" if one["finalizes"] else ""
            yield Branch(f"{one['statement']}{behind}", (), CODE)


def _passes(found: Mapping[str, Any]) -> str:
    """`3 passes -> 1`."""
    plain, lifted = found["plain"], found["lifted"]
    return counted(plain, "pass", "passes") + ("" if plain == lifted else f" -> {lifted}")


def _ranks(ranks: Mapping[str, Any]) -> Iterator[Branch]:
    """Each rank with its passes and the chain that forces them; those that are passed over once, in a line."""
    quiet = []
    for rank, found in ranks.items():
        if found["plain"] <= 1 and found["lifted"] == found["plain"]:
            quiet.append(rank)
            continue
        witness = f": {' -> '.join(found['witness'])}" if found["witness"] else ""
        inputs = [f"{name} {_arrow(one['plain'], one['lifted'])}" for name, one in found["inputs"].items()]
        extent = f" of {found['extent']}" if found.get("extent") else ""
        below = (Branch(f"inputs: {', '.join(inputs)}"),) if inputs else ()
        yield Branch(f"{rank}{extent}: {_passes(found)}{witness}", below)
    if quiet:
        yield Branch(f"passed over once at most: {', '.join(quiet)}")


def _arrow(before: Any, after: Any) -> str:
    return f"{before}" if before == after else f"{before} -> {after}"


def _step(step: Mapping[str, Any]) -> Branch:
    if not step["changed"]:
        return Branch(f"{step['pass']}: nothing to do")
    lines = f"+{step['added']} -{step['removed']} lines"
    return Branch(f"{step['pass']}: {lines}, {counted(step['statements'], 'statement')}")


# --- the explanation -------------------------------------------------------------------------------------------------


def explanation(payload: Mapping[str, Any]) -> None:
    """`explain`: passes, lifts, what is rejected, what runs together and, for a machine, what that costs."""
    passes = payload["passes"]
    ranks = Branch("passes", tuple(_ranks(passes["ranks"])), "bold")
    lifted = [item for found in passes["ranks"].values() for item in found["lifts"]]
    below = [ranks]
    if lifted:
        below.append(Branch("lifts", tuple(map(_lift, lifted)), "bold"))
    refused = tuple(map(_refusal, payload["rejected"])) or (Branch("none"),)
    below.append(Branch("rejected edges", refused, "bold"))
    below.append(Branch("runs together", tuple(_together(payload["together"])), "bold"))
    below.append(Branch("moves and computes", tuple(_amounts(passes["traffic"])), "bold"))
    tree(Branch(f"cascade {payload['cascade']}", tuple(below)))
    for key, draw in MODELLED.items():
        if key in payload:
            click.echo()
            draw(payload)
    if payload["machine"] is None:
        click.echo("no machine is named: --machine h200, h100x8 or fusemax says what it costs there")


def _lift(item: Mapping[str, Any]) -> Branch:
    """A reduction that a fold carries, and how."""
    trip = f" in the trip of {', '.join(item['producers'])}" if item["producers"] else ""
    below = [
        Branch(f"{label}: {line.removeprefix(f'{label} ')}", (), CODE)
        for label in ("init", "update", "merge", "finalize")
        for line in item[label]
    ]
    below += [Branch(f"correction: {item['correction']}")] if item["correction"] else []
    below += [Branch(f"deferred: {', '.join(item['deferred'])}")] if item["deferred"] else []
    gauge = ": a gauge, no result depends on it" if item["gauge"] else ""
    below += [Branch(f"frame: {item['frame']}{gauge}")] if item["frame"] else []
    state = f"; state {', '.join(item['state'])}" if item["state"] else ""
    return Branch(f"{item['reduction']}: {item['kind']}{trip}{state}; {counted(item['rank'], 'term')}", tuple(below))


def _refusal(item: Mapping[str, Any]) -> Branch:
    condition = ", ".join(filter(None, (item["condition"], item["code"])))
    below = [Branch(item["reason"])] + ([Branch(f"condition: {condition}")] if condition else [])
    if item["evidence"]:
        below.append(
            Branch(f"evidence: numeric rank {', '.join(map(str, item['evidence']))} at growing numbers of samples")
        )
    return Branch(f"{item['rank']}: {item['producer']} -> {item['reduction']}", tuple(below))


def _amounts(found: Mapping[str, Any]) -> Iterator[Branch]:
    """Bytes and operations, as written and as lifted and fused."""
    for title, before, after, unit in (
        ("bytes", "unfused", "fused", "B"),
        ("operations", "flops", "lifted_flops", "OP"),
        ("transcendental", "transcendental", "lifted_transcendental", "OP"),
    ):
        if found[before] is not None and found[after] is not None:
            yield Branch(f"{title}: {_arrow(quantity(found[before], unit), quantity(found[after], unit))}")
        else:
            yield Branch(f"{title}: {_arrow(found[f'{before}_text'], found[f'{after}_text'])}")


def _sizes(payload: Mapping[str, Any]) -> str:
    """The sizes, those that were not given marked."""
    guessed = payload.get("defaulted", ())
    return ", ".join(f"{name}={size}{'*' if name in guessed else ''}" for name, size in payload["sizes"].items())


def _kernels(payload: Mapping[str, Any]) -> None:
    """The kernels of a call on one GPU."""
    kernels = payload["kernels"]
    heading(f"kernels on {payload['machine']}, {payload['dtype']}, {_sizes(payload)}")
    if payload["defaulted"]:
        click.echo("* not given; -s gives sizes")
    rows: list[tuple[str, ...]] = [
        (
            one["kernel"], quantity(one["read_bytes"], "B"), quantity(one["write_bytes"], "B"),
            quantity(one["flops"], "FLOP") if one["flops"] else "", microseconds(one["predicted_us"]),
            f"{share(one['of_bound'])} of {one['bound']}",
        )
        for one in kernels
    ]  # fmt: skip
    if len(kernels) > 1:
        sums = [
            quantity(payload[key], unit) for key, unit in (("read_bytes", "B"), ("write_bytes", "B"), ("flops", "FLOP"))
        ]
        rows.append(("all", *sums, microseconds(payload["predicted_us"]), ""))
    table(("kernel", "reads", "writes", "products", "predicted", "bound"), rows)
    _over_time(kernels)
    for one in kernels:
        tree(_kernel(one))
    for one in payload["outside"]:
        click.echo(f"in no kernel, and not predicted: {', '.join(one['names'])}: {one['reason']}")


def _over_time(kernels: Sequence[Mapping[str, Any]]) -> None:
    """When each kernel runs, and how busy each unit is in it."""
    times = [one["predicted_us"] for one in kernels]
    if not kernels or None in times:
        return
    total, begun = sum(times), 0.0
    rows = []
    for one in kernels:
        rows.append((one["kernel"], [(begun, begun + one["predicted_us"])]))
        begun += one["predicted_us"]
    if len(kernels) > 1:
        click.echo()
        for line in timeline(rows, total):
            click.echo(line)
    click.echo()
    units = dict.fromkeys(unit for one in kernels for unit in one["units"])
    busy = {unit: [one["units"].get(unit, 0.0) for one in kernels] for unit in units}
    whole = {
        unit: sum(part * us for part, us in zip(parts, times, strict=True)) / total for unit, parts in busy.items()
    }
    listed = [
        (unit, share(whole[unit]), sparkline(parts, letters()))
        for unit, parts in busy.items()
        if whole[unit] >= LEAST_SHARE
    ]
    table(("unit", "busy", "kernel by kernel"), listed)
    click.echo()


def _kernel(one: Mapping[str, Any]) -> Branch:
    """One kernel: what it fuses, its tiles, what is predicted, why they were chosen, what it compiled to."""
    below = [Branch(f"fuses {counted(len(one['statements']), 'statement')}", tuple(map(_code, one["statements"])))]
    below += map(Branch, one["why"])
    below.append(Branch(one["library"] or f"{counted(one['programs'], 'program')} of {one['tile']}"))
    below.append(Branch(f"predicted {one['says']}"))
    limits = one["because"].partition("; ")[2]
    below += [Branch(limits)] if limits else []
    below.append(Branch(f"chosen as {one['chosen']}"))
    if one["failure"]:
        below.append(Branch(f"does not compile: {one['failure']}", (), "red"))
    elif one["static"]:
        facts = one["static"]
        below.append(
            Branch("compiled: " + ", ".join(f"{key} {facts[key]}" for key in facts if facts[key] not in ((), None)))
        )
    return Branch(f"kernel {one['kernel']}: {', '.join(one['defines'])}", tuple(below), "bold")


def _plan(payload: Mapping[str, Any]) -> None:
    """The plan for several devices: what was decided, a line of time for each queue, the longest tasks."""
    plan = payload["plan"]
    heading(f"plan for {plan['machine']}, {payload['dtype']}, {_sizes(payload)}")
    split = f"{plan['split']['rank']} at {', '.join(map(str, plan['split']['cuts']))}" if plan["split"] else "none"
    way, end = plan["exchange"], plan["makespan_us"]
    below = [
        Branch(f"modelled {end:.1f} us; no schedule takes less than {plan['bound_us']:.1f} us"),
        Branch(f"one after another {plan['serial_us']:.1f} us"),
        Branch(f"split: {split}" + (f"; {plan['declined']}" if plan["declined"] else "")),
        Branch(f"exchanges: {way['way']}" + (f", {way['blocks']} thread blocks each" if way["blocks"] else "")),
        Branch(f"exposed communication: {plan['exposed_comm_us']:.1f} us"),
        Branch(f"launches: {plan['launches']}"),
    ]
    tree(Branch(counted(len(plan["tasks"]), "task"), tuple(below)))
    queues: dict[str, list[tuple[float, float]]] = {}
    for task in plan["tasks"]:
        queues.setdefault(task["resource"], []).append((task["start"], task["end"]))
    click.echo()
    for line in timeline(list(queues.items()), end):
        click.echo(line)
    click.echo()
    longest = sorted(plan["tasks"], key=lambda task: (task["start"] - task["end"], task["name"]))[:MOST_TASKS]
    rows = []
    for task in longest:
        lasts = task["end"] - task["start"]
        span = (f"{task['start']:.1f}", f"{task['end']:.1f}")
        rows.append((task["name"], task["resource"], *span, share(lasts / end if end else None)))
    table(("longest tasks", "queue", "from us", "to us", "of all"), rows)


def _cost(payload: Mapping[str, Any]) -> None:
    """The cost on a spatial machine."""
    cost = payload["cost"]
    heading(f"cost on {cost['machine']}, {_sizes(payload)}")
    tree(Branch(f"{cost['cycles']:.4g} cycles", tuple(map(Branch, payload["summary"]))))
    phases = cost["phases"]
    rows = []
    for unit, used in cost["utilisation"].items():
        parts = [one["units"].get(unit, 0) / one["cycles"] if one["cycles"] else 0.0 for one in phases]
        rows.append((unit, share(used), sparkline(parts, letters())))
    table(("unit", "busy", "phase by phase"), rows)
    heads = ("einsum", "unit", "cycles", "of the time")
    table(
        heads,
        [(name, one["unit"], f"{one['cycles']}", share(one["share"])) for name, one in cost["per_einsum"].items()],
    )


MODELLED = {"kernels": _kernels, "plan": _plan, "cost": _cost}
"""What draws what a machine of each family adds."""


# --- differences -----------------------------------------------------------------------------------------------------


def comparison(payload: Mapping[str, Any]) -> None:
    """`diff A B`: what changed, and nothing else."""
    click.echo(f"{payload['before']} -> {payload['after']}" + (": the same" if payload["same"] else ""))
    if payload["what"] == "kernels":
        _kernel_changes(payload)
        return
    if payload["diff"]:
        changes(payload["diff"])
    below = [
        branch
        for title, found in (
            ("schedule", payload["schedule"]),
            ("lifted", payload["lifted"]),
            ("rejected", payload["rejected"]),
        )
        if (branch := _signed(title, found)) is not None
    ]
    ranks = tuple(Branch(f"{rank}: {_rank_change(found)}") for rank, found in payload["ranks"].items())
    below = ([Branch("passes", ranks, "bold")] if ranks else []) + below
    amounts = {key: one for key, one in payload["amounts"].items() if one["before"] != one["after"]}
    words = {key: one for key, one in amounts.items() if isinstance(one["before"], str)}
    if words:
        listed = (Branch(f"{key.replace('_', ' ')}: {one['before']} -> {one['after']}") for key, one in words.items())
        below.append(Branch("amounts", tuple(listed), "bold"))
    if below:
        tree(Branch("what changed", tuple(below)))
    if numbers := {key: one for key, one in amounts.items() if key not in words}:
        table(*_amount_rows(numbers))
    if not amounts:
        click.echo("bytes and operations are the same")
    if payload["machine"] is not None:
        _machine_changes(payload)


def _signed(title: str, found: Mapping[str, Any]) -> Branch | None:
    lines = [Branch(f"- {line}", (), "red") for line in found["removed"]]
    lines += [Branch(f"+ {line}", (), "green") for line in found["added"]]
    return Branch(title, tuple(lines), "bold") if lines else None


def _rank_change(found: Mapping[str, Any]) -> str:
    """`passes 3, lifted 1 -> 3, phases 5`: the passes of one rank before and after, and the chain where it changed."""
    plain, lifted, phases = (
        _arrow(_none(found[key]["before"]), _none(found[key]["after"])) for key in ("plain", "lifted", "phases")
    )
    before, after = (" -> ".join(found["witness"][side] or ["none"]) for side in ("before", "after"))
    witness = "" if before == after else f"; witness {before}, now {after}"
    return f"passes {plain}, lifted {lifted}, phases {phases}{witness}"


def _none(value: Any) -> Any:
    return "none" if value is None else value


def _amount_rows(found: Mapping[str, Any]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """A row for each amount: before, after, and their ratio."""
    units = {"unfused": "B", "fused": "B", "read_bytes": "B", "write_bytes": "B", "traffic_bytes": "B"}
    rows: list[tuple[str, ...]] = [
        (key.replace("_", " "), _value(key, one["before"], units), _value(key, one["after"], units), ratio(one))
        for key, one in found.items()
    ]
    return ("amount", "before", "after", "ratio"), rows


def _value(key: str, value: Any, units: Mapping[str, str]) -> str:
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if key.endswith("_us"):
        return f"{value:.2f} us"
    if key.endswith("_s"):
        return f"{value * 1e6:.4g} us"
    return quantity(value, units.get(key, "")).strip()


def ratio(one: Mapping[str, Any]) -> str:
    """How the second stands to the first: `0.50x`, `same`."""
    if one["before"] == one["after"]:
        return "same"
    return "" if one["ratio"] is None else f"{one['ratio']:.3g}x"


def _machine_changes(payload: Mapping[str, Any]) -> None:
    """What changed on the machine: the whole, and each kernel, task, unit and Einsum that changed."""
    click.echo()
    heading(f"on {payload['machine']}" + (f", {_both(payload['sizes'])}" if "sizes" in payload else ""))
    table(*_amount_rows(payload["whole"]))
    if "kernels" in payload:
        _kernel_table(payload["kernels"])
        outside = payload["outside"]
        if outside["before"] or outside["after"]:
            click.echo(f"in no kernel: {_arrow(*(', '.join(outside[key]) or 'none' for key in ('before', 'after')))}")
    for key in ("split", "exchange"):
        if key in payload and payload[key]["before"] != payload[key]["after"]:
            click.echo(f"{key}: {_words(payload[key]['before'])} -> {_words(payload[key]['after'])}")
    for key, title in (("tasks", "task, us"), ("units", "unit, share"), ("einsums", "einsum, cycles")):
        found = {name: one for name, one in payload.get(key, {}).items() if one["before"] != one["after"]}
        if found:
            rows = [(name, _short(one["before"]), _short(one["after"]), ratio(one)) for name, one in found.items()]
            table((title, "before", "after", "ratio"), rows[:MOST_TASKS])
            if len(rows) > MOST_TASKS:
                click.echo(f"... {len(rows) - MOST_TASKS} more, all with --json")


def _words(found: Mapping[str, Any] | None) -> str:
    """A small object in words: `rank t, cuts 512`."""
    parts = [] if found is None else [(key, value) for key, value in found.items() if value is not None]
    shown = (f"{key} {', '.join(map(str, value)) if isinstance(value, list) else value}" for key, value in parts)
    return ", ".join(shown) or "none"


def _both(sizes: Mapping[str, Any]) -> str:
    joined = {**sizes["before"], **sizes["after"]}
    return ", ".join(f"{name}={size}" for name, size in joined.items())


def _short(value: Any) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _kernel_table(kernels: Sequence[Mapping[str, Any]]) -> None:
    """A row for each kernel; below it the tiles and the facts that changed."""
    rows = []
    for one in kernels:
        names = dict.fromkeys(filter(None, (one["kernel"]["before"], one["kernel"]["after"])))
        moved = [
            sum(filter(None, (one[key][side] for key in ("read_bytes", "write_bytes")))) for side in ("before", "after")
        ]
        times = [microseconds(one["predicted_us"][side]) for side in ("before", "after")]
        rows.append(
            (" -> ".join(names), *times, ratio(one["predicted_us"]), *(quantity(count, "B") for count in moved))
        )
    table(("kernel", "before", "after", "ratio", "bytes before", "bytes after"), rows)
    for one in kernels:
        told = [
            f"{key.replace('_', ' ')}: {_none(one[key]['before'])} -> {_none(one[key]['after'])}"
            for key in ("tile", "bound", *FACTS)
            if one[key]["before"] != one[key]["after"]
        ]
        told += [
            f"{key.replace('_', ' ')}: {_none(found['before'])} -> {_none(found['after'])}"
            for key, found in one["static"].items()
            if found["before"] != found["after"]
        ]
        if told and one["kernel"]["before"] and one["kernel"]["after"]:
            tree(Branch(f"{one['kernel']['after']}", tuple(map(Branch, told))))


FACTS = ("registers", "shared_bytes", "blocks_per_sm")
"""Of a kernel, guessed where nothing is compiled."""


def _kernel_changes(payload: Mapping[str, Any]) -> None:
    """What changed between two versions of a kernel."""
    below = [
        Branch(key, tuple(Branch(_changed(name, one)) for name, one in payload[key].items()), "bold")
        for key in ("target", "sizes", "launched", "instructions")
        if payload.get(key)
    ]
    if "statements" in payload and (branch := _signed("statements", payload["statements"])) is not None:
        below.append(branch)
    for name, found in payload.get("kernels", {}).items():
        if found:
            below.append(
                Branch(f"kernel {name}", tuple(Branch(_changed(key, one)) for key, one in found.items()), "bold")
            )
    if below:
        tree(Branch("what changed", tuple(below)))
    for text in payload.get("functions", {}).get("diff", {}).values():
        changes(text)
    if "cascade" in payload:
        click.echo()
        comparison(payload["cascade"])


def _changed(name: str, one: Mapping[str, Any]) -> str:
    found = f" ({ratio(one)})" if one["ratio"] is not None else ""
    return f"{name}: {_short(one['before'])} -> {_short(one['after'])}{found}"


# --- the installation ------------------------------------------------------------------------------------------------

STYLES = {"ok": "", "note": "dim", "warning": "yellow", "broken": "bold red"}
"""The colour of each state of a check on a terminal; the word stands beside it."""


def check(found: Check) -> None:
    """One finding of `doctor`, as soon as it is known."""
    tree(Branch(found.line, (), STYLES[found.state]))


AGES = ((86400.0, "d"), (3600.0, "h"), (60.0, "min"))


def age(seconds: float) -> str:
    """A stretch of time in the unit in which it reads best."""
    for factor, unit in AGES:
        if seconds >= factor:
            return f"{seconds / factor:.0f} {unit}"
    return f"{seconds:.0f} s"


def entries(listed: Sequence[Mapping[str, Any]], folder: str) -> None:
    """Entries of the cache, a row for each, and all of them; what is wrong with one where something is."""
    wrong = any(one["damage"] for one in listed)
    rows = []
    for one in listed:
        told = (one["kind"], one["path"].rpartition("/")[2], quantity(one["bytes"], "B"), age(one["age_s"]))
        rows.append((*told, one["damage"] or "") if wrong else told)
    if rows:
        table(("kind", "entry", "size", "age", *(("damage",) if wrong else ())), rows)
    size = quantity(sum(one["bytes"] for one in listed), "B")
    click.echo(f"{counted(len(listed), 'entry', 'entries')}, {size} in {folder}")


def sizes(payload: Mapping[str, Any]) -> None:
    """How large the cache is."""
    rows = [
        (name, f"{one['entries']}", quantity(one["bytes"], "B"), one["holds"]) for name, one in payload["kinds"].items()
    ]
    rows.append(("all", f"{payload['entries']}", quantity(payload["bytes"], "B"), payload["folder"]))
    table(("kind", "entries", "size", "what"), rows)
    if payload["strangers"]:
        click.echo(f"not written by cascade, and left alone: {', '.join(payload['strangers'])}")


def cleared(payload: Mapping[str, Any]) -> str:
    """What `cache clear` did."""
    left = (
        f"; {counted(len(payload['left']), 'entry', 'entries')} left: in use, or not ours to remove"
        if payload["left"]
        else ""
    )
    return f"removed {counted(len(payload['removed']), 'entry', 'entries')}, {quantity(payload['bytes'], 'B')}{left}"
