"""Numbers of the analyses against a second, dumber way to get them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import dependent
import generate
import pytest
import torch

from cascade.errors import UnsupportedError, VerifyError
from cascade.interp import Precision, run
from cascade.ir import Cascade, Fuse, Rank, Stmt
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.inline import Inline
from cascade.passes.pass_count import all_passes, count_passes, footprint
from cascade.text import render
from cascade.verify import verify
from cascade.walk import defines, expressions, reads, walk
from tests.test_random import valid

FAST, CAMPAIGN = 30, 240
PARTS = 4  # of the campaign, so that workers share it
BLOCKS = (1, 2)


def assignments(names: Sequence[str], after: Mapping[str, set[str]], groups: int) -> Iterator[dict[str, int]]:
    """Every way to put the statements into that many groups, none of them empty, that run one after the other."""

    def extend(place: dict[str, int]) -> Iterator[dict[str, int]]:
        if len(place) == len(names):
            if len(set(place.values())) == groups:
                yield dict(place)
            return
        name = names[len(place)]
        for group in range(max((place[other] for other in after[name]), default=0), groups):
            yield from extend({**place, name: group})

    return extend({})


def dependencies(cascade: Cascade, names: Sequence[str]) -> dict[str, set[str]]:
    """The full statements that each of them needs, through whatever stands between."""
    below: dict[str, set[str]] = {}
    for stmt in cascade.body:
        found = {name for read in reads(stmt) for name in (*below.get(read, ()), read)}
        below.update(dict.fromkeys(defines(stmt), found))
    return {name: below[name] & set(names) for name in names}


def reproduces(cascade: Cascade, place: Mapping[str, int], wanted: Sequence[dict[str, torch.Tensor]]) -> bool:
    """Whether the groups, run block by block, give the results of the cascade on all inputs."""
    groups = [tuple(name for name in place if place[name] == group) for group in sorted(set(place.values()))]
    fused = dataclasses.replace(cascade, schedule=tuple(Fuse(group, "n") for group in groups))
    for seed, results in zip(dependent.SEEDS, wanted, strict=True):
        tensors = dependent.inputs(cascade, seed)
        for block in BLOCKS:
            try:
                found = run(fused, tensors, precision=Precision.REFERENCE, block=block)
            except UnsupportedError:  # the groups need each other
                return False
            if not all(torch.allclose(found[name], results[name], 1e-9, 1e-9) for name in results):
                return False
    return True


def fewest_groups(cascade: Cascade) -> int:
    """The smallest number of trips over n in which the interpreter, block by block, still computes the cascade."""
    names = [defines(stmt)[0] for stmt in cascade.body if visits(stmt, "n")]
    after = dependencies(cascade, names)
    wanted = [run(cascade, dependent.inputs(cascade, seed), precision=Precision.REFERENCE) for seed in dependent.SEEDS]
    for groups in range(1, len(names) + 1):
        if any(reproduces(cascade, place, wanted) for place in assignments(names, after, groups)):
            return groups
    raise AssertionError("one statement a group is no fusion at all")


def visits(stmt: Stmt, rank: str) -> bool:
    """Whether a statement has the rank, as a look at it tells: the analysis is not asked."""
    nodes = (node for expr in expressions(stmt) for node in walk(expr))
    return any(isinstance(node, Rank) and node.name == rank for node in nodes)


def check_count(seed: int) -> int:
    """The count of passes is the smallest number of groups."""
    source = dependent.chain(seed)
    verify(source)
    cascade = Canonicalize()(Inline()(source))
    passes = count_passes(cascade, "n")
    assert passes.count == fewest_groups(cascade), f"seed {seed}: {passes}\n{render(cascade)}"
    assert len(passes.witness) == passes.count
    return passes.count


@pytest.mark.parametrize("seed", range(FAST))
def test_passes_are_the_fewest_groups_that_the_interpreter_can_stream(seed: int) -> None:
    check_count(seed)


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(PARTS))
def test_passes_are_the_fewest_groups_for_many_seeds(part: int) -> None:
    counts = [check_count(seed) for seed in range(FAST + part, FAST + CAMPAIGN, PARTS)]
    assert {1, 2, 3, 4} <= set(counts), "the cascades are too much alike"


# --- what the verifier lets a group be -------------------------------------------------------------------------------


def accepted(cascade: Cascade, statements: Sequence[str], rank: str) -> bool:
    """Whether the verifier, which knows nothing of passes, lets the statements be one group over the rank."""
    try:
        verify(dataclasses.replace(cascade, schedule=(Fuse(tuple(statements), rank),)))
    except VerifyError:
        return False
    return True


def check_groups(seed: int) -> tuple[int, int]:
    """The full statements of each pass are a legal group, those of two passes in a row are none; how many were tried."""
    made = valid(seed)
    if made is None:
        return 0, 0
    cascade = Canonicalize()(Inline()(made[0]))
    counts = all_passes(cascade)
    footprint(cascade, counts)
    groups = pairs = 0
    for rank in (rank for rank in generate.RANKS if rank in counts):
        passes = counts[rank]
        assert len(passes.witness) == passes.count
        first = [defines(stmt)[0] for stmt in cascade.body if passes.full.issuperset(defines(stmt))]
        for p in sorted({passes.number[name] for name in first}):
            now = [name for name in first if passes.number[name] == p]
            assert accepted(cascade, now, rank), f"seed {seed}: pass {p} over {rank}, {now}\n{render(cascade)}"
            both = [name for name in first if passes.number[name] in (p, p + 1)]
            groups += 1
            if len(both) > len(now):
                assert not accepted(cascade, both, rank), f"seed {seed}: over {rank}, {both}\n{render(cascade)}"
                pairs += 1
    return groups, pairs


@pytest.mark.campaign
def test_a_pass_is_what_the_verifier_lets_be_one_group() -> None:
    tried = [check_groups(seed) for seed in range(800)]
    groups, pairs = map(sum, zip(*tried, strict=True))
    assert (groups > 2_000, pairs > 200) == (True, True), (groups, pairs)
