"""Passes over ranks: the table of the literature, partition levels, what is held, what moves, and how fast it counts."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from cascade.frontend.build import parse_cascade, parse_program
from cascade.interp import Precision, run
from cascade.ir import Cascade, DType
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.inline import Inline
from cascade.passes.pass_count import all_passes, count_passes, extents_text, footprint, partitions
from cascade.passes.amounts import Amount, product
from cascade.passes.points import MAX_POINTS
from cascade.passes.traffic import traffic
from cascade.text import render
from cascade.verify import canonical
from tests.check import CASES, read_case
from tests.test_folds import SINK
from tests.test_speed import model
from tests.timing import least, within

TABLE = (
    ("attention_3_pass", {"n": 3}, {"K": 3, "V": 1}, "R D O"),
    ("attention_deferred_division", {"n": 2}, {"K": 2, "V": 1}, "R P"),
    ("attention_unstable", {"n": 2}, {"K": 2, "V": 1}, "D O"),
    ("fusemax_3_pass", {"n": 3}, {"K": 3, "V": 1}, "GM SD A"),
    ("fusemax_2_pass", {"n": 2}, {"K": 2, "V": 1}, "GM SN"),
    ("fusemax_1_pass", {"n": 1, "n1": 1, "n0": 2}, {"K": 1, "V": 1}, "BK"),
    ("layernorm", {"d": 3}, {"X": 3, "G": 1, "B": 1}, "Y_sum Y_sum_1 Y"),
    ("rmsnorm_gemm", {"d": 2}, {"X": 2, "G": 1, "W": 1}, "N_sum N"),
    ("rmsnorm_gemm_deferred", {"d": 1}, {"X": 1, "G": 1, "W": 1}, "A"),
    ("fusemax_cascade_1", {"k": 2}, {"A": 2, "B": 1}, "Y Z"),
    ("fusemax_cascade_2", {"k": 1}, {"A": 1, "B": 1}, "Y"),
    ("fusemax_cascade_3", {"i": 1}, {"A": 1, "B": 1}, "RY"),
)


def source(name: str) -> Cascade:
    """The cascade of a case, as it is written."""
    return parse_cascade(read_case(CASES / "pass_count" / f"{name}.case").program)


def prepared(text: str | Cascade) -> Cascade:
    """A cascade in the form that is counted."""
    cascade = Canonicalize()(Inline()(parse_cascade(text) if isinstance(text, str) else text))
    assert canonical.holds(cascade) == ()
    return cascade


@pytest.mark.parametrize(("name", "counts", "inputs", "witness"), TABLE, ids=lambda value: str(value)[:30])
def test_table(name: str, counts: dict[str, int], inputs: dict[str, int], witness: str) -> None:
    found = all_passes(prepared(source(name)))
    assert {rank: found[rank].count for rank in counts} == counts
    first = found[next(iter(counts))]
    assert (first.inputs, first.witness) == (inputs, tuple(witness.split()))


def test_the_cascades_of_the_table_are_one_function() -> None:
    """1, 2 and 3 passes give the same attention; FuseMax's three small cascades the same number."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((5, 4), (6, 4), (6, 3)))
    wanted = (q @ k.T).softmax(-1) @ v
    plain, parts = {"Q": q, "K": k, "V": v}, {"Q": q, "K": k.reshape(3, 2, 4), "V": v.reshape(3, 2, 3)}
    for name in ("attention_3_pass", "attention_deferred_division", "attention_unstable", "fusemax_3_pass"):
        found = next(iter(run(source(name), plain, precision=Precision.REFERENCE).values()))
        torch.testing.assert_close(found if name.startswith("attention") else found.T, wanted)
    two = run(source("fusemax_2_pass"), parts, precision=Precision.REFERENCE)["AV"]
    one = run(source("fusemax_1_pass"), plain, {"N1": 3, "N0": 2}, precision=Precision.REFERENCE)["AV"]
    torch.testing.assert_close(two.T, wanted)
    torch.testing.assert_close(one.T, wanted)
    a, b = (torch.randn(7, generator=generator, dtype=torch.float64).abs() for _ in range(2))
    first, second, third = (
        run(source(f"fusemax_cascade_{number}"), {"A": a, "B": b}, precision=Precision.REFERENCE)["Z"]
        for number in (1, 2, 3)
    )
    torch.testing.assert_close(first, second)
    assert bool(third.isnan())  # as printed it divides 0 by RY before the first generation, which the paper calls empty
    started = Canonicalize()(parse_cascade(render(source("fusemax_cascade_3")).replace("RY[-1] = 0", "RY[-1] = 1")))
    found = run(started, {"A": a, "B": b}, precision=Precision.REFERENCE)["Z"]
    torch.testing.assert_close(found, first + a.sum())  # (1 + Y) times the sum of A


# --- levels ----------------------------------------------------------------------------------------------------------


def test_levels_are_told_by_notation_or_given() -> None:
    two_pass = prepared(source("fusemax_2_pass"))
    assert partitions(two_pass) == {"n": ("n1", "n0")}
    assert count_passes(two_pass, "n").count == 2
    assert list(all_passes(two_pass, levels={})) == ["n1", "n0", "m", "e", "f"]
    assert all_passes(two_pass, levels={"keys": ("n1", "n0")})["keys"].count == 2
    assert count_passes(two_pass, "n0", ("n1", "n0")).count == 2
    assert partitions(prepared(source("no_levels"))) == {}


def test_three_levels_and_a_stem_that_is_a_rank() -> None:
    cascade = prepared("""
        cascade c(A[K2,K1,K0], B[K]) -> Y[], Z[K2,K1,K0] {
            Y = sum[k2,k1,k0] A[k2,k1,k0]
            L[k2] = sum[k1,k0] A[k2,k1,k0]
            Z[k2,k1,k0] = A[k2,k1,k0] / L[k2] * Y * sum[k] B[k]
        }
    """)
    found = all_passes(cascade)
    assert list(found) == ["k2", "k1", "k0", "k", "k2,k1,k0"]
    assert [passes.count for passes in found.values()] == [2, 2, 2, 1, 2]
    without = all_passes(
        prepared("""
        cascade c(A[K2,K1,K0]) -> Z[K2,K1,K0] {
            L[k2] = sum[k1,k0] A[k2,k1,k0]
            Z[k2,k1,k0] = A[k2,k1,k0] / L[k2]
        }
    """)
    )
    assert {rank: passes.count for rank, passes in without.items()} == {"k2": 1, "k1": 2, "k0": 2, "k": 1}


def test_a_rank_that_is_not_there_is_passed_over_0_times() -> None:
    found = count_passes(prepared(source("attention_3_pass")), "z")
    assert (found.count, found.phases, found.inputs, found.witness, found.number) == (0, 0, {}, (), {})


# --- what the fusing of Einsums asks ---------------------------------------------------------------------------------


def test_numbers_of_statements_and_barriers() -> None:
    found = count_passes(prepared(source("attention_3_pass")), "n")
    assert found.number == {"S": 1, "R": 1, "P": 2, "D": 2, "O": 3}
    assert found.full == {"S", "R", "P", "D", "O"}
    assert found.barriers == {"R", "D", "O"}


def test_a_value_that_was_put_together_waits_for_its_reductions() -> None:
    found = count_passes(
        prepared("""
            cascade c(X[N]) -> Z[N] {
                A = sum[n] X[n]
                B = max[n] X[n]
                V = A + B
                W = V * V
                Z[n] = X[n] * W
            }
        """),
        "n",
    )
    assert found.number == {"A": 1, "B": 1, "V": 1, "W": 1, "Z": 2}
    assert found.barriers == {"A", "B", "V", "W"}
    assert found.full == {"A", "B", "Z"}
    assert found.witness == ("A", "Z")


def test_ranks_that_only_made_tensors_have() -> None:
    """The second layer has to pass over its own n, which no input has."""
    found = all_passes(prepared(model(2)))
    assert (found["n"].count, found["n"].inputs) == (6, {})
    assert found["n"].witness == ("R0", "D0", "U0", "R1", "D1", "U1")
    assert found["t"].inputs == {"X0": 3}


@pytest.mark.parametrize(
    ("index", "count"),
    [("n", 1), ("n-1", 1), ("n+1", 1), ("n+1-3", 1), ("0", 2), ("N-1-n", 2), ("n//2", 2), ("I[n]", 2)],
)
def test_a_read_at_another_coordinate_needs_all(index: str, count: int) -> None:
    text = f"cascade c(X[N], I: i64[N]) -> Z[N] {{\n A[n] = exp(X[n])\n Z[n] = A[n] + A[{index}] + I[n]\n}}"
    assert count_passes(prepared(text), "n").count == count


@pytest.mark.parametrize(("index", "count"), [("n", 1), ("n-1", 1), ("N-1", 2), ("n+1", 2)])
def test_a_recurrence_may_be_read_at_the_generation_at_hand(index: str, count: int) -> None:
    text = f"cascade c(X[N]) -> Z[N] {{\n A[n] = A[n-1] + X[n] init A[-1] = 0\n Z[n] = X[n] * A[{index}]\n}}"
    assert count_passes(prepared(text), "n").count == count


# --- folds -----------------------------------------------------------------------------------------------------------


def unfolded(cascade: Cascade) -> Cascade:
    """The cascade without its schedule."""
    return dataclasses.replace(cascade, schedule=())


def test_a_fold_carries_what_was_a_barrier() -> None:
    cascade = prepared(SINK)
    plain, folded = count_passes(unfolded(cascade), "n"), count_passes(cascade, "n")
    assert (plain.count, plain.inputs, plain.witness) == (2, {"K": 2, "V": 1}, ("R0", "P"))
    assert (folded.count, folded.inputs, folded.witness) == (1, {"K": 1, "V": 1}, ("S",))
    assert (plain.number["P"], folded.number["P"]) == (2, 1)
    assert folded.barriers == plain.barriers
    assert held(unfolded(cascade)) == {"S": "N"}
    assert held(cascade) == {}


def test_a_fold_changes_nothing_over_other_ranks() -> None:
    cascade = prepared(SINK)
    plain, folded = all_passes(unfolded(cascade)), all_passes(cascade)
    assert {rank: plain[rank] for rank in "mef"} == {rank: folded[rank] for rank in "mef"}


@pytest.mark.parametrize("name", ["G", "D", "O", "L"])
def test_a_state_is_a_barrier_to_what_stands_outside_of_the_fold(name: str) -> None:
    """The states, the maps of them, and what is finalized: known behind the trip only."""
    index = "[m,0]" if name == "O" else "[m]"
    text = SINK.replace("L[M] {", "L[M], Z[M,N] {").replace(
        "\n} schedule", f"\n    Z[m,n] = S[m,n] * {name}{index}\n}} schedule"
    )
    cascade = prepared(text)
    folded = count_passes(cascade, "n")
    assert (folded.count, folded.number["P"], folded.number["Z"]) == (2, 1, 2)
    assert folded.witness[-1] == "Z" and folded.witness[0] in {"R0", "D0", "T"}
    assert count_passes(unfolded(cascade), "n").count == (2 if name == "G" else 3)
    assert held(cascade) == {"S": "N"}


LEVELS = """
cascade c(X[N1,N0]) -> Y[] {
    L[n1] = max[n0] X[n1,n0]
    R = max[n1] L[n1]
    P[n1,n0] = exp(X[n1,n0] - R)
    B[n1] = sum[n0] P[n1,n0]
    Y = sum[n1] B[n1]
} schedule {
    fold n1 {
        state R, Y
        init R = empty
        init Y = empty
        update L, R, P, B, Y
        merge R = R'
        merge Y = Y' * exp(R' - R)
    }
}
"""


def test_a_fold_counts_where_its_rank_is_the_outermost_level() -> None:
    """The block's maximum is still known behind the block only: two passes over the inner level."""
    cascade = prepared(LEVELS)
    assert {rank: passes.count for rank, passes in all_passes(unfolded(cascade)).items()} == {"n1": 2, "n0": 2, "n": 2}
    assert {rank: passes.count for rank, passes in all_passes(cascade).items()} == {"n1": 1, "n0": 2, "n": 1}


# --- footprints ------------------------------------------------------------------------------------------------------


def held(cascade: Cascade) -> dict[str, str]:
    """The tensors that are held by more than an element, with what is held."""
    found = footprint(cascade, all_passes(cascade))
    assert set(found) >= {param.name for param in cascade.params}
    return {name: extents_text(extents) for name, extents in found.items() if extents}


def test_what_is_visited_twice_is_held() -> None:
    assert held(prepared(source("attention_3_pass"))) == {"S": "N", "P": "N"}
    assert held(prepared(source("attention_deferred_division"))) == {"S": "N"}
    assert held(prepared(source("fusemax_cascade_1"))) == {"A": "K"}
    assert held(prepared(source("fusemax_cascade_2"))) == {}
    assert held(prepared(source("fusemax_cascade_3"))) == {}
    assert extents_text(()) == "1"


def test_one_pass_over_a_partitioned_rank_holds_a_tile() -> None:
    found = held(prepared(source("fusemax_1_pass")))
    assert found["BQK"] == "N0"
    assert all("N1" not in extents for extents in found.values())


def test_a_second_pass_over_a_partitioned_rank_holds_all_levels() -> None:
    assert held(prepared(source("fusemax_2_pass")))["SLN"] == "N1*N0"


def test_what_a_generation_leaves_is_held() -> None:
    assert held(prepared(source("recurrence_other_rank")))["S"] == "D"


# --- traffic ---------------------------------------------------------------------------------------------------------

CAUSAL = """
cascade attention(Q[M,E], K[N,E], V[N,F]) -> O[M,F] {
    S[m,n] = sum[e] Q[m,e] * K[n,e] where n <= m
    R[m] = max[n] S[m,n]
    P[m,n] = exp(S[m,n] - R[m])
    D[m] = sum[n] P[m,n]
    A[m,f] = sum[n] P[m,n] * V[n,f]
    O[m,f] = A[m,f] / D[m]
} schedule {
    fuse {P, D, A} over n
}
"""
SIZES = {"M": 5, "N": 7, "E": 2, "F": 3}


def test_operations_of_a_filtered_cascade_by_counting_in_a_loop() -> None:
    found = traffic(prepared(CAUSAL), SIZES)
    live = [(m, n) for m, n in itertools.product(range(5), range(7)) if n <= m]
    flops = transcendental = 0
    for _ in live:
        flops += 2 * 2 + 1 + 1 + 1 + 2 * 3  # S: multiply and add for each e; R; P subtracts; D; A for each f
        transcendental += 1
    assert (found.flops.value, found.transcendental.value) == (flops + 5 * 3, transcendental)
    assert found.assumed == ()
    assert found.statements["A"][0].value == 2 * 3 * len(live)


def test_bytes_with_and_without_groups() -> None:
    m, n, e, f = (SIZES[size] for size in "MNEF")
    cascade = prepared(CAUSAL)
    s_reads, p_reads = 2, 2
    unfused = (m * e + n * e + n * f + m * f) + m * n * (1 + s_reads + 1 + p_reads) + 2 * m + 2 * m + 2 * m * f
    assert traffic(cascade, SIZES).unfused.value == 4 * unfused
    assert traffic(cascade, SIZES).fused.value == 4 * (unfused - m * n * (1 + p_reads))
    whole = traffic(cascade, SIZES, groups=[{"S", "R", "P", "D", "A", "O"}])
    assert whole.fused.value == 4 * (m * e + n * e + n * f + m * f)
    assert traffic(cascade, SIZES, dtype=DType.BF16).unfused.value == 2 * unfused
    assert traffic(cascade, SIZES, groups=[]).fused == traffic(cascade, SIZES).unfused


def test_an_input_of_several_members_is_read_once() -> None:
    cascade = prepared(source("fusemax_cascade_2"))
    assert str(traffic(cascade).unfused) == "20 + 12*K"
    assert str(traffic(cascade, groups=[{"Y", "X"}]).fused) == "20 + 8*K"
    assert str(traffic(cascade, groups=[{"Y", "X", "Z"}]).fused) == "4 + 8*K"


def test_amounts_without_sizes_are_text() -> None:
    cascade = prepared(source("attention_all_ranks"))
    found = traffic(cascade)
    assert str(found.transcendental) == "B*F*H*M*N + B*H*M*N"
    assert found.flops.value is None
    assert traffic(cascade, {"B": 2, "H": 3, "M": 4, "N": 5}).transcendental == Amount((((), 120), (("F",), 120)))
    assert str(Amount()) == "0"
    assert product((3, "K"), {"K": 0}).value == 0


def test_filters_that_cannot_be_counted_are_taken_to_hold() -> None:
    text = "cascade c(X[M,N], L: i64[M]) -> Y[M], Z[M] {{\n Y[m] = sum[n] X[m,n] where {test}\n Z[m] = X[m,0]\n}}"
    sizes = {"M": 4, "N": 5}
    data = traffic(prepared(text.format(test="n < L[m]")), sizes)
    assert (data.assumed, data.flops.value) == (("Y",), 20)
    counted = traffic(prepared(text.format(test="n % 2 == 0 and n <= m")), sizes)
    assert (counted.assumed, counted.flops.value) == ((), 1 + 1 + 2 + 2)
    large = traffic(prepared(text.format(test="n <= m")), {"M": MAX_POINTS, "N": 2})
    assert (large.assumed, large.flops.value) == ((), 2 * MAX_POINTS - 1)
    odd = traffic(prepared(text.format(test="n % 2 <= m")), {"M": MAX_POINTS, "N": 2})
    assert (odd.assumed, odd.flops.value) == (("Y",), 2 * MAX_POINTS)
    assert traffic(prepared(text.format(test="n <= m"))).assumed == ("Y",)


# --- speed -----------------------------------------------------------------------------------------------------------


def test_2000_statements_are_counted_in_seconds() -> None:
    cascade = Canonicalize()(Inline()(parse_program(model(100))[-1]))
    assert len(cascade.body) >= 2_000

    def count(cascade: Cascade) -> None:
        footprint(cascade, all_passes(cascade))
        traffic(cascade)

    assert within(least(count, 2 * [cascade]), 3)
    assert all_passes(cascade)["n"].count == 300
