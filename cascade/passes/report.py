"""What is known about a cascade without running it: passes, what lifting saves, what blocks the rest, what moves.

    n: 3 passes -> 1   (R -> D -> O; 5 phases)
        inputs: K 3 -> 1, V 1
        D is lifted: sum in the trip of R; state D; 1 term
            merge      D[m] = D'[m] * exp(R'[m] - R[m])
    elements held: S: N -> 1; P: N -> 1; everything else: 1
    passed once: m, e, f

`report` is one JSON object with stable keys, `report_text` what a person reads of it. The plain numbers are those of
the cascade without its schedule, the lifted ones those of the cascade that lifting made: there a fold carries what was
a barrier. "Fused" bytes are moved by the groups of that cascade's schedule, "unfused" ones by every statement on its
own. The operations of a merge are not counted: they are a few for each block, not for each element.

Requires: canonical. It decides nothing: the numbers are those of `pass_count` and `traffic`, the words those of `lift`.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cascade.inference import infer_shapes
from cascade.ir import Cascade, DType
from cascade.passes.amounts import Amount
from cascade.passes.lifts import Blocked, Lifted, Lifting
from cascade.passes.pass_count import Passes, all_passes, extents_text, footprint, partitions
from cascade.passes.fuse import Fuse
from cascade.passes.traffic import traffic
from cascade.verify.streams import needless_waits

WIDTH = 110
"""Columns of the text."""
SHOWN = 24
"""Items of a list that the text shows; the object has all."""

# --- one JSON object -------------------------------------------------------------------------------------------------


def report(
    cascade: Cascade,
    lifting: Lifting | None = None,
    sizes: Mapping[str, int] | None = None,
    dtype: DType | None = None,
    levels: Mapping[str, tuple[str, ...]] | None = None,
) -> dict[str, Any]:
    """What is known about a canonical cascade; without `lifting`, nothing is lifted.

    `levels` are partitioned ranks beside those that the notation tells, outermost level first. Amounts that need a size
    that is not given are null; the text beside them is a polynomial in the symbols.
    """
    found = lifting or Lifting(cascade)
    plain = dataclasses.replace(cascade, schedule=())
    named = _levels(plain, levels or {})
    before, after = all_passes(plain, named), all_passes(found.cascade, named)
    return {
        "cascade": cascade.name,
        "ranks": {rank: _rank(passes, after.get(rank), found) for rank, passes in before.items()},
        "footprint": _footprint(plain, before),
        "lifted_footprint": _footprint(found.cascade, after),
        "traffic": _traffic(plain, Fuse()(found.cascade), sizes or {}, dtype or DType.F32),
    } | ({"needless_waits": list(needless)} if (needless := needless_waits(cascade)) else {})


def _levels(cascade: Cascade, given: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The partitioned ranks of the notation and the given ones; one named like a rank variable by its levels."""
    ranks = infer_shapes(cascade).ranks
    named = {",".join(parts) if name in ranks else name: parts for name, parts in given.items()}
    return partitions(cascade) | named


def _rank(before: Passes, after: Passes | None, lifting: Lifting) -> dict[str, Any]:
    """What is known about one logical rank."""
    lifted = after.inputs if after else {}
    return {
        "plain": before.count,
        "lifted": after.count if after else 0,
        "phases": before.phases,
        "inputs": {name: {"plain": count, "lifted": lifted.get(name, 0)} for name, count in before.inputs.items()},
        "witness": list(before.witness),
        "levels": list(before.levels),
        "lifts": [_lift(item) for item in lifting.lifted if item.rank == before.rank],
        "blocked": [_block(item) for item in lifting.blocked if item.rank == before.rank],
    }


def _lift(item: Lifted) -> dict[str, Any]:
    return {
        "reduction": item.reduction,
        "kind": item.kind,
        "rank": item.terms,
        "state": list(item.state),
        "correction": item.correction,
        "frame": item.frame,
        "init": list(item.init),
        "update": list(item.update),
        "merge": list(item.merge),
        "finalize": list(item.finalize),
        "deferred": list(item.deferred),
        "gauge": item.gauge,
        "producers": list(item.producers),
    }


def _block(item: Blocked) -> dict[str, Any]:
    return {
        "reduction": item.reduction,
        "reason": item.reason,
        "evidence": list(item.evidence),
        "item": item.item,
        "code": item.code,
        "edge": list(item.edge),
    }


def _footprint(cascade: Cascade, counts: Mapping[str, Passes]) -> dict[str, str]:
    return {name: extents_text(extents) for name, extents in footprint(cascade, counts).items()}


def _traffic(plain: Cascade, lifted: Cascade, sizes: Mapping[str, int], dtype: DType) -> dict[str, Any]:
    """Bytes and operations before lifting, and after it with what shares a trip in groups.

    `assumed` are the statements whose filters were taken to hold everywhere.
    """
    before, after = traffic(plain, sizes, dtype=dtype), traffic(lifted, sizes, dtype=dtype)
    amounts = {
        "unfused": before.unfused,
        "fused": after.fused,
        "flops": before.flops,
        "transcendental": before.transcendental,
        "lifted_flops": after.flops,
        "lifted_transcendental": after.transcendental,
    }
    found: dict[str, Any] = {}
    for key, amount in amounts.items():
        found |= _amount(key, amount)
    return found | {"dtype": dtype.value, "assumed": list(before.assumed)}


def _amount(key: str, amount: Amount) -> dict[str, Any]:
    return {key: amount.value, f"{key}_text": str(amount)}


# --- what a person reads ---------------------------------------------------------------------------------------------


def report_text(payload: Mapping[str, Any]) -> str:
    """The report as text: the ranks with something to say, what is held and moved, and the other ranks in a line."""
    ranks: Mapping[str, Any] = payload["ranks"]
    lines = [f"{payload['cascade']}: passes over its ranks"]
    for rank, found in ranks.items():
        if not _is_quiet(found):
            lines += _rank_lines(rank, found)
    lines += _footprint_lines(payload["footprint"], payload["lifted_footprint"])
    lines += _traffic_lines(payload["traffic"])
    lines += (f"needless: {wait}" for wait in payload.get("needless_waits", ()))
    for title, count in (("passed once", 1), ("passed over not at all", 0)):
        quiet = [_title(rank, found) for rank, found in ranks.items() if _is_quiet(found) and found["plain"] == count]
        lines += _wrapped(f"{title}: {', '.join(quiet)}") if quiet else []
    return "\n".join(lines) + "\n"


def _is_quiet(found: Mapping[str, Any]) -> bool:
    """Whether a rank is passed over once at most, and nothing is to be said about it."""
    same = found["plain"] <= 1 and found["lifted"] == found["plain"]
    return same and not found["lifts"] and not found["blocked"]


def _title(rank: str, found: Mapping[str, Any]) -> str:
    levels = ", ".join(found["levels"])
    return rank if found["levels"] == [rank] or rank == ",".join(found["levels"]) else f"{rank} ({levels})"


def _rank_lines(rank: str, found: Mapping[str, Any]) -> Iterator[str]:
    passes = _change(_plural(found["plain"], "pass", "passes"), found["plain"], found["lifted"])
    why = [" -> ".join(_cut(found["witness"]))] if found["plain"] > 1 else []
    why.append(_plural(found["phases"], "phase", "phases"))
    yield from _wrapped(f"{_title(rank, found)}: {passes}   ({'; '.join(why)})", hang="    ")
    if found["inputs"]:
        inputs = (f"{name} {_change(n['plain'], n['plain'], n['lifted'])}" for name, n in found["inputs"].items())
        yield from _wrapped(f"inputs: {', '.join(inputs)}", "    ")
    for item in found["lifts"]:
        yield from _lift_lines(item)
    for item in found["blocked"]:
        yield from _block_lines(item)


def _lift_lines(item: Mapping[str, Any]) -> Iterator[str]:
    """A reduction that a fold carries: its state, and how it begins, goes on, is merged and ends."""
    trip = f" in the trip of {', '.join(item['producers'])}" if item["producers"] else ""
    state = f"; state {', '.join(item['state'])}" if item["state"] else ""
    terms = _plural(item["rank"], "term", "terms")
    yield from _wrapped(f"{item['reduction']} is lifted: {item['kind']}{trip}{state}; {terms}", "    ")
    for label in ("init", "update", "merge", "finalize"):
        for line in item[label]:
            yield from _labelled(label, line.removeprefix(f"{label} "))
    if item["correction"]:
        yield from _labelled("correction", item["correction"])
    if item["deferred"]:
        yield from _labelled("deferred", f"{', '.join(item['deferred'])}: until the trip is over")
    if item["frame"]:
        gauge = ": a gauge, no result depends on which frame it is" if item["gauge"] else ""
        yield from _labelled("frame", f"{item['frame']}{gauge}")
    elif item["gauge"]:
        yield from _labelled("gauge", "no result depends on which frame it is measured against")


def _block_lines(item: Mapping[str, Any]) -> Iterator[str]:
    """A reduction that needs another trip: after what, why, and the evidence."""
    producer, reduction = item["edge"]
    yield from _wrapped(f"{reduction} needs another trip, after {producer}: {item['reason']}", "    ")
    condition = ", ".join(filter(None, (item["item"], item["code"])))
    if condition:
        yield from _labelled("condition", condition)
    if item["evidence"]:
        ranks = ", ".join(map(str, item["evidence"]))
        yield from _labelled("evidence", f"numeric rank {ranks} at growing numbers of samples")


def _footprint_lines(before: Mapping[str, str], after: Mapping[str, str]) -> Iterator[str]:
    """The tensors that are held by more than an element, before lifting or after."""
    held = []
    for name in dict.fromkeys((*before, *after)):
        old, new = before.get(name, after.get(name)), after.get(name, "1")
        if (old, new) != ("1", "1"):
            held.append(f"{name}: {_change(old, old, new)}")
    rest = "everything else" if held else "everything"
    yield from _wrapped(f"elements held: {'; '.join([*_cut(held), f'{rest}: 1'])}")


def _traffic_lines(found: Mapping[str, Any]) -> Iterator[str]:
    """Bytes with and without fusion, operations before lifting and after."""
    unfused, fused = _number(found, "unfused"), _number(found, "fused")
    if unfused == fused:
        yield from _wrapped(f"bytes: {unfused}, no statements being fused")
    elif found["unfused"] is None or found["fused"] is None:
        yield from _wrapped(f"bytes unfused: {unfused}")
        yield from _wrapped(f"bytes fused: {fused}")
    else:
        ratio = f", {found['unfused'] / found['fused']:.1f} times less" if found["fused"] else ""
        yield from _wrapped(f"bytes: {unfused} unfused, {fused} fused{ratio}")
    for title, prefix in (("operations", ""), ("operations, lifted", "lifted_")):
        flops, slow = _number(found, f"{prefix}flops"), _number(found, f"{prefix}transcendental")
        if prefix and (flops, slow) == (_number(found, "flops"), _number(found, "transcendental")):
            continue
        yield from _wrapped(f"{title}: {flops}; transcendental: {slow}")
    if found["assumed"]:
        yield from _wrapped(f"counted without their filters: {', '.join(_cut(found['assumed']))}")


def _number(found: Mapping[str, Any], key: str) -> str:
    """An amount with separators, or the polynomial that it is."""
    return f"{found[key]:,}" if found[key] is not None else str(found[f"{key}_text"])


def _change(shown: object, old: object, new: object) -> str:
    """`3 -> 1`, or one of them where both are the same."""
    return f"{shown}" if old == new else f"{shown} -> {new}"


def _cut(items: Sequence[str]) -> list[str]:
    """The items, with a count in place of the middle of a long list."""
    if len(items) <= SHOWN:
        return list(items)
    return [*items[: SHOWN - 2], f"... {len(items) - SHOWN + 1} more ...", items[-1]]


def _plural(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}"


def _labelled(label: str, text: str) -> list[str]:
    """A line below a reduction, what it says in a column."""
    return _wrapped(f"{label:<11}{text}", " " * 8, " " * 11)


def _wrapped(text: str, indent: str = "", hang: str = "    ") -> list[str]:
    """The text in lines of `WIDTH` columns, those after the first further in."""
    return textwrap.wrap(text, WIDTH, initial_indent=indent, subsequent_indent=indent + hang, break_on_hyphens=False)
