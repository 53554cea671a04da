"""Streams and waits that a program writes itself: any order that they allow gives what the cascade means; without a wait
that the verifier asks for, it is refused, and some order shows why."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Iterator

import pytest
import torch

from cascade import pipeline
from cascade.arguments import shape_symbols
from cascade.errors import CascadeError, VerifyError
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.ir import Cascade, DType, Part, Split, Stream, Wait
from cascade.passes.report import report, report_text
from cascade.trial import param_types, random_inputs
from cascade.verify import findings, verify
from cascade.verify.streams import needless_waits
from cascade.walk import defines, expressions, targets, walk
from tests.test_random import same, valid

LAYER = """
cascade layer(X[T,D], Wk[T,D], W[D,F], V[F,D]) -> Y[T,D], L[D] {
    K[t,d]   = X[t,d] * Wk[t,d]
    S[m,n]   = X[m,d] * K[n,d]   where n <= m
    A[m,d]   = S[m,n] * K[n,d]
    H[t,f]   = relu(sum[d] A[t,d] * W[d,f])
    Y[t,d]   = H[t,f] * V[f,d]
    L[d]     = sum[t] Y[t,d]
} schedule {
    split t into 3
    split m into 3
    stream keys { K.0, K.1, K.2 }
    stream two { Y.0, Y.2 }
    stream ends { L.1, L.0, L.2 }
    wait A.0 on K.0
    wait A.1 on K.1
    wait A.2 on K.2
    wait Y.0 on A.0
    wait Y.1 on A.1
    wait Y.2 on A.2
    wait L.0 on Y.0
    wait L.1 on Y.1
    wait L.2 on Y.2
}
"""
SIZES = {"T": 7, "D": 3, "F": 2}
SEEDS = range(24)
RANDOM = 60


def layer(*changes: tuple[str, str]) -> Cascade:
    text = LAYER
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_cascade(text, "<layer>")


def orders(cascade: Cascade, seeds: range = SEEDS) -> Iterator[bool]:
    """For some orders that are allowed, whether they give what the cascade means without streams."""
    sizes = {symbol: SIZES[symbol] for symbol in shape_symbols(cascade)}
    inputs = random_inputs(cascade, sizes, param_types(cascade, DType.F64), 0)
    plain = dataclasses.replace(cascade, schedule=())
    wanted = run(plain, inputs, sizes, Precision.REFERENCE)
    for seed in seeds:
        yield same(run(cascade, inputs, sizes, Precision.REFERENCE, seed=seed), wanted)


@pytest.mark.parametrize("until", [None, "inline", "canonicalize", "lift"])
def test_any_order_that_is_allowed_gives_the_same_behind_every_pass(until: str | None) -> None:
    cascade = pipeline.run_pipeline(layer(), until).final if until else layer()
    verify(cascade)
    assert all(orders(cascade))
    assert all(orders(pipeline.run_pipeline(layer()).final, range(4)))


WAITS = [line.strip() for line in LAYER.splitlines() if line.strip().startswith("wait")]


@pytest.mark.parametrize("wait", WAITS)
def test_without_a_wait_it_is_refused_and_some_order_is_wrong(wait: str) -> None:
    cascade = layer((f"    {wait}\n", ""))
    (found,) = findings(cascade)
    assert found.code == "C255" and found.help is not None and wait in found.help
    assert not all(orders(cascade))


def test_keys_behind_a_filter_need_not_be_waited_for() -> None:
    """The filter is that of what is read: A itself has none. Without it, all keys are needed."""
    verify(layer())
    found = findings(layer(("   where n <= m", "")))
    assert [(one.code, one.help) for one in found] == [
        ("C255", "wait A.0 on K.1, wait A.0 on K.2"), ("C255", "wait A.1 on K.2"),
    ]  # fmt: skip
    assert not all(orders(layer(("   where n <= m", ""))))


def test_a_wait_that_is_not_needed_is_reported_and_is_no_error() -> None:
    assert needless_waits(layer()) == ()
    cascade = layer(("wait Y.0 on A.0", "wait Y.0 on A.0\n    wait Y.0 on K.1"))
    verify(cascade)
    assert needless_waits(cascade) == ("wait Y.0 on K.1: Y.0 does not need it",)
    assert all(orders(cascade))
    canonical = pipeline.run_pipeline(cascade, "canonicalize").final
    assert "needless: wait Y.0 on K.1: Y.0 does not need it" in report_text(report(canonical))
    assert report(canonical)["needless_waits"] == list(needless_waits(cascade))
    assert "needless_waits" not in report(dataclasses.replace(canonical, schedule=()))


def test_a_recurrence_goes_part_after_part() -> None:
    text = """
    cascade c(A[T,D], X[T,D]) -> H[T,D] {
        B[t,d] = 2 * X[t,d]
        H[t,d] = A[t,d] * H[t-1,d] + B[t,d]   init H[-1,d] = 0
    } schedule { split t into 3
        stream a { H.0, H.1, H.2 }
        stream b { B.2, B.1, B.0 }
        wait H.0 on B.0
        wait H.1 on B.1
        wait H.2 on B.2
    }"""
    cascade = parse_cascade(text, "<recurrence>")
    verify(cascade)
    assert all(orders(cascade))
    other = parse_cascade(text.replace("H.0, H.1, H.2", "H.1, H.0, H.2"), "<recurrence>")
    with pytest.raises(VerifyError, match=r"'H\.1' reads 'H\.0'"):
        verify(other)
    assert not any(orders(other))


# --- random cascades -------------------------------------------------------------------------------------------------


def scheduled(cascade: Cascade, rng: random.Random) -> Cascade:
    """The cascade with a rank or two in parts, some statements in parts or whole in streams, and the waits for them."""
    ranks = sorted({rank for stmt in cascade.body for target in targets(stmt) for rank in target.ranks})
    splits = tuple(
        Split(rank, parts=rng.randint(2, 3)) for rank in rng.sample(ranks, min(len(ranks), rng.randint(1, 2)))
    )
    named: list[Part] = []
    for stmt in cascade.body:
        inside = {rank for expr in expressions(stmt) for node in walk(expr) for rank in getattr(node, "ranks", ())}
        inside |= {rank for target in targets(stmt) for rank in target.ranks}
        count = math.prod(split.parts for split in splits if split.rank in inside and isinstance(split.parts, int))
        if rng.random() < 0.7:
            name = rng.choice(defines(stmt))
            named += [Part(name, i) for i in range(count)] if count > 1 else [Part(name)]
    waits: dict[tuple[Part, Part], None] = {}
    while True:
        streams = tuple(Stream(f"s{i}", (part,)) for i, part in enumerate(named))
        schedule = (*splits, *streams, *(Wait(part, on) for part, on in waits))
        found = dataclasses.replace(cascade, schedule=schedule)
        asked = [one for one in findings(found) if one.code == "C255"]
        if not asked:
            return found
        for one in asked:
            pairs = re.findall(r"wait (\S+?)(?:\.(\d+))? on (\w+?)(?:\.(\d+))?(?:,|$)", one.help or "")
            waits |= {(part(name, i), part(on, j)): None for name, i, on, j in pairs}
            if not pairs:  # it cannot run in parts
                name = re.findall(r"'(\w+)", one.message)[0]
                gone = next(defines(stmt) for stmt in cascade.body if name in defines(stmt))
                named = [other for other in named if other.name not in gone]


def part(name: str, index: str) -> Part:
    return Part(name, int(index) if index else None)


def in_streams(cascade: Cascade, rng: random.Random) -> Cascade:
    """The same in a few streams, whose parts stand in an order that is allowed."""
    first = {name: defines(stmt)[0] for stmt in cascade.body for name in defines(stmt)}
    waits = [item for item in cascade.schedule if isinstance(item, Wait)]
    left = [item.parts[0] for item in cascade.schedule if isinstance(item, Stream)]
    streams: dict[int, list[Part]] = {}
    while left:
        there = {(first[one.name], one.index) for one in left}
        late = {(w.part.name, w.part.index) for w in waits if (w.on.name, w.on.index) in there}
        free = [one for one in left if (first[one.name], one.index) not in late]
        chosen = rng.choice(free)
        left.remove(chosen)
        streams.setdefault(rng.randrange(3), []).append(chosen)
    found = tuple(Stream(f"s{number}", tuple(parts)) for number, parts in streams.items())
    splits = (item for item in cascade.schedule if isinstance(item, Split))
    return dataclasses.replace(cascade, schedule=(*splits, *found, *waits))


def test_random_schedules_that_are_valid_give_the_same_and_others_show() -> None:
    checked = refused = wrong = parts = 0
    for seed in range(4 * RANDOM):
        made = valid(seed)
        if made is None or checked >= RANDOM:
            continue
        cascade, inputs = made
        cascade = pipeline.run_pipeline(dataclasses.replace(cascade, schedule=()), "canonicalize").final
        try:
            wanted = run(cascade, inputs, None, Precision.REFERENCE)
        except CascadeError:  # data that the cascade refuses
            continue
        rng = random.Random(seed)
        apart = scheduled(cascade, rng)
        for one in (apart, in_streams(apart, rng)):
            verify(one)
            assert all(same(run(one, inputs, None, Precision.REFERENCE, seed=order), wanted) for order in range(3)), (
                seed
            )
        checked += 1
        parts += sum(isinstance(item, Stream) for item in apart.schedule)
        for wait in [item for item in apart.schedule if isinstance(item, Wait)][:2]:
            fewer = dataclasses.replace(apart, schedule=tuple(item for item in apart.schedule if item != wait))
            right = right_in(fewer, inputs, wanted)
            if not findings(fewer):
                assert right, seed
            refused += bool(findings(fewer))
            wrong += not right
    assert checked == RANDOM and parts > 3 * checked and refused and wrong > 0.6 * refused


def right_in(cascade: Cascade, inputs: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    """Whether some orders give what they should."""
    try:
        return all(same(run(cascade, inputs, None, Precision.REFERENCE, seed=order), wanted) for order in range(8))
    except (CascadeError, IndexError):  # an index that nothing has written
        return False
