"""The report: its keys, its numbers before lifting and after, and what a person reads of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from cascade.compiled import Compiled
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade, DType
from cascade.passes.lift import lift_reductions
from cascade.passes.lifts import Blocked, Lifted, Lifting
from cascade.passes.report import WIDTH, report, report_text
from cascade.pipeline import run_pipeline
from tests.check import CASES, read_case
from tests.test_folds import SINK

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.cascade"))
COUNTED = sorted((CASES / "pass_count").glob("*.case"))
SIZES = {"M": 6, "N": 13, "E": 4, "F": 3}
LIFTED = Lifted(
    reduction="D0",
    rank="n",
    kind="sum",
    terms=1,
    producers=("R0",),
    state=("R", "D"),
    correction="exp(R' - G)",
    init=("init D[m] = exp(sink[m] - G[m])",),
    update=("D0[m] = sum[n] P[m,n]",),
    merge=("merge D[m] = D'[m] * exp(R'[m] - G[m])",),
    finalize=("O[m,f] = T[m,f] / D[m]",),
    deferred=("1 / D[m]",),
    frame="R[m]",
    gauge=True,
)
BLOCKED = Blocked("T", "n", ("D0", "T"), "separable", "C999", "the map has no finite rank: " + "word " * 40, (4, 8, 11))


def canonical(text: str) -> Cascade:
    """The cascade as the report wants it."""
    return run_pipeline(parse_cascade(text), "canonicalize", check=0).final


def by_hand() -> tuple[Cascade, Lifting]:
    """A cascade, and what lifting could make of it: the fold of another test, and one reduction that stays behind."""
    folded = canonical(SINK)
    return dataclasses.replace(folded, schedule=()), Lifting(folded, (LIFTED,), (BLOCKED,))


# --- the object ------------------------------------------------------------------------------------------------------


def test_a_rank_before_and_after() -> None:
    found = report(*by_hand())
    assert list(found) == ["cascade", "ranks", "footprint", "lifted_footprint", "traffic"]
    assert list(found["ranks"]) == ["m", "n", "e", "f"]
    rank = found["ranks"]["n"]
    assert (rank["plain"], rank["lifted"], rank["phases"]) == (2, 1, 4)
    assert rank["inputs"] == {"K": {"plain": 2, "lifted": 1}, "V": {"plain": 1, "lifted": 1}}
    assert (rank["witness"], rank["levels"]) == (["R0", "P"], ["n"])
    assert (found["footprint"]["S"], found["lifted_footprint"]["S"]) == ("N", "1")
    assert all(not found["ranks"][other]["lifts"] for other in "mef")


def test_what_lifting_found() -> None:
    rank = report(*by_hand())["ranks"]["n"]
    (lift,), (block,) = rank["lifts"], rank["blocked"]
    assert list(lift) == [
        "reduction", "kind", "rank", "state", "correction", "frame", "init", "update", "merge", "finalize", "deferred",
        "gauge", "producers",
    ]  # fmt: skip
    assert (lift["reduction"], lift["rank"], lift["state"], lift["gauge"]) == ("D0", 1, ["R", "D"], True)
    assert block["edge"] == ["D0", "T"] and block["evidence"] == [4, 8, 11]
    assert set(block) == {"reduction", "reason", "evidence", "item", "code", "edge"}


def test_a_fold_that_was_written_by_hand_counts_as_lifted() -> None:
    found = report(canonical(SINK))
    assert (found["ranks"]["n"]["plain"], found["ranks"]["n"]["lifted"]) == (2, 1)


def test_amounts_with_and_without_sizes() -> None:
    moved = report(*by_hand(), sizes=SIZES, dtype=DType.BF16)["traffic"]
    m, n, e, f = SIZES.values()
    outside = m * e + n * e + n * f + m + m * f + m  # what the fold reads once, O and L
    assert (moved["fused"], moved["fused_text"], moved["dtype"]) == (2 * outside, str(2 * outside), "bf16")
    assert moved["unfused"] > moved["fused"] and moved["assumed"] == []
    unknown = report(*by_hand())["traffic"]
    assert unknown["fused"] is None and unknown["unfused"] is None and unknown["flops"] is None
    assert unknown["fused_text"] == "4*E*M + 4*E*N + 4*F*M + 4*F*N + 8*M"
    assert unknown["transcendental"] is None and unknown["transcendental_text"] == "2*M + M*N"


def test_partitioned_ranks_beside_those_that_the_notation_tells() -> None:
    cascade = canonical("cascade c(X[P,Q], Y[K1,K0]) -> Z[] { Z = sum[p,q] X[p,q] * sum[k1,k0] Y[k1,k0] }")
    assert list(report(cascade)["ranks"]) == ["k1", "k0", "p", "q", "k"]
    found = report(cascade, levels={"x": ("p", "q"), "p": ("q", "p")})["ranks"]
    assert list(found) == ["k1", "k0", "p", "q", "k", "x", "q,p"]
    assert found["x"]["levels"] == ["p", "q"] and found["p"]["levels"] == ["p"]
    assert report(cascade, levels={"x": ("p", "q")})["ranks"]["x"]["plain"] == 1


@pytest.mark.parametrize("path", [*COUNTED, *EXAMPLES], ids=lambda path: path.stem)
def test_lifting_never_costs_a_pass(path: Path) -> None:
    text = path.read_text() if path in EXAMPLES else read_case(path).program
    cascade = canonical(text)
    found = report(cascade, lift_reductions(cascade))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for rank, passes in found["ranks"].items():
        assert passes["lifted"] <= passes["plain"], rank
        for name, count in passes["inputs"].items():
            assert count["lifted"] <= count["plain"], (rank, name)
    assert max(map(len, report_text(found).splitlines())) <= WIDTH


# --- the text --------------------------------------------------------------------------------------------------------

TEXT = """\
attention: passes over its ranks
n: 2 passes -> 1   (R0 -> P; 4 phases)
    inputs: K 2 -> 1, V 1
    D0 is lifted: sum in the trip of R0; state R, D; 1 term
        init       D[m] = exp(sink[m] - G[m])
        update     D0[m] = sum[n] P[m,n]
        merge      D[m] = D'[m] * exp(R'[m] - G[m])
        finalize   O[m,f] = T[m,f] / D[m]
        correction exp(R' - G)
        deferred   1 / D[m]: until the trip is over
        frame      R[m]: a gauge, no result depends on which frame it is
    T needs another trip, after D0: the map has no finite rank: word word
        condition  separable, C999
        evidence   numeric rank 4, 8, 11 at growing numbers of samples
elements held: S: N -> 1; everything else: 1
"""


def test_text_of_a_cascade_that_is_lifted() -> None:
    cascade, lifting = by_hand()
    short = dataclasses.replace(BLOCKED, reason="the map has no finite rank: word word")
    text = report_text(report(cascade, dataclasses.replace(lifting, blocked=(short,)), SIZES))
    assert text.startswith(TEXT)
    assert text.endswith("passed once: m, e, f\n")
    assert "unfused, " in text and " times less\n" in text and "operations: " in text


def test_text_is_no_wider_than_a_terminal() -> None:
    text = report_text(report(*by_hand()))
    assert max(map(len, text.splitlines())) <= WIDTH
    assert "bytes unfused: " in text and "bytes fused: 4*E*M + " in text


def test_text_of_a_cascade_with_nothing_to_say() -> None:
    text = report_text(report(canonical("cascade c(A[M,K], B[K,N]) -> Z[M,N] { Z[m,n] = A[m,k] * B[k,n] }")))
    assert text == (
        "c: passes over its ranks\n"
        "elements held: everything: 1\n"
        "bytes: 4*K*M + 4*K*N + 4*M*N, no statements being fused\n"
        "operations: 2*K*M*N; transcendental: 0\n"
        "passed once: m, n, k\n"
    )


def test_text_of_a_long_chain_is_cut() -> None:
    steps = "".join(f" Y{i} = sum[n] X[n] * Y{i - 1}\n" for i in range(1, 40))
    found = report(canonical(f"cascade c(X[N]) -> Y39[] {{\n Y0 = sum[n] X[n]\n{steps}}}"))
    assert len(found["ranks"]["n"]["witness"]) == 40
    assert "Y21 -> ... 17 more ... -> Y39; 40 phases)" in report_text(found).replace("\n    ", " ")


def test_text_of_partitions_and_of_filters_that_were_not_counted() -> None:
    cascade = canonical("cascade c(X[K1,K0], L: i64[]) -> Z[] { Z = sum[k1,k0] X[k1,k0] where k0 < L }")
    text = report_text(report(cascade))
    assert "counted without their filters: Z\n" in text and "passed once: k1, k0, k (k1, k0)\n" in text


@pytest.mark.parametrize("without", [(), ("lift",), ("canonicalize",)])
def test_explain_begins_with_the_report(without: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    cascade, lifting = by_hand()
    monkeypatch.setattr("cascade.compiled.lift_reductions", lambda found: lifting)
    known = report_text(report(cascade, None if "lift" in without else lifting))
    compiled = Compiled(cascade)
    compiled._last = run_pipeline(cascade, "canonicalize", 0, [name for name in without if name != "lift"])
    compiled.without = without
    assert compiled.explain().startswith(f"{known}\ncascade attention: {len(cascade.body)} statements\n")
