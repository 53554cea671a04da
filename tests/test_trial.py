"""Trial runs: inputs that fit a cascade, and a tolerance rule that lets no wrong result through."""

from __future__ import annotations

import pytest
import torch

from cascade.errors import CallError
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.ir import DType
from cascade.trial import agree, difference, highest_values, measure, param_types, random_inputs, small_sizes

ATTENTION = """cascade attention(Q[M,E], K[N,E], V[N,F], bias[N]) -> O[M,F] {
    S[m,n] = (sum[e] Q[m,e] * K[n,e]) + bias[n]
    P[m,n] = exp(S[m,n] - max[n] S[m,n])
    O[m,f] = sum[n] P[m,n] / (sum[n] P[m,n]) * V[n,f]
}"""


@pytest.mark.parametrize(
    ("statement", "high"),
    [
        ("Y[t,d] = W[I[t],d]", 8),
        ("Y[t,d] = W[2*I[t]+1,d]", 3),
        ("Y[t,d] = W[8-I[t],d]", 8),
        ("Y[t,d] = W[I[t]+t,d]", 4),
        ("Y[t,d] = W[I[t]//2,d]", 8),
        ("J[t] = I[t] + 6; Y[t,d] = W[J[t],d]", 2),
        ("Y[t,d] = max[v] W[v,d] where v < I[t]", 9),
        ("Y[t,d] = W[0,d] where I[t] != 0", None),
    ],
)
def test_integers_fit_what_they_index(statement: str, high: int | None) -> None:
    cascade = parse_cascade(f"cascade c(W[V,D], I[T]) -> Y[T,D] {{ {statement} }}")
    sizes = {"V": 9, "D": 2, "T": 5}
    assert highest_values(cascade, sizes).get("I") == high
    assert param_types(cascade, DType.F16) == {"W": DType.F16, "I": DType.I64}
    run(cascade, random_inputs(cascade, sizes, param_types(cascade, DType.F32)), sizes)


def test_what_argmax_takes_is_no_integer() -> None:
    cascade = parse_cascade("cascade c(W[V,D], R[T,V]) -> Y[T,D] { I[t] = argmax[v] R[t,v]; Y[t,d] = W[I[t],d] }")
    assert param_types(cascade, DType.F32)["R"] is DType.F32


def test_inputs_are_the_same_for_the_same_seed() -> None:
    cascade = parse_cascade(ATTENTION)
    sizes, types = small_sizes(cascade, {"M": 7}), param_types(cascade, DType.BF16)
    assert sizes["M"] == 7 and set(sizes) == {"M", "E", "N", "F"}
    first, second, other = (random_inputs(cascade, sizes, types, seed) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert all(tensor.dtype is torch.bfloat16 for tensor in first.values())


def test_small_sizes_leave_room_for_topk() -> None:
    cascade = parse_cascade("cascade c(X[T,N]) -> G[T,9], I[T,9] { G[t,j], I[t,j] = topk[n, 9] X[t,n] }")
    assert small_sizes(cascade, {})["N"] == 9


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (("P[m,n] / (sum[n] P[m,n])", "P[m,n]"), True),
        (("+ bias[n]", "- bias[n]"), True),
        (("max[n]", "min[n]"), False),  # any shift will do
        (("sum[n] P[m,n] / (sum[n] P[m,n]) * V[n,f]", "(sum[n] P[m,n] * V[n,f]) / (sum[n] P[m,n])"), False),
    ],
)
def test_difference_of_meaning(change: tuple[str, str], found: bool) -> None:
    assert change[0] in ATTENTION
    before, after = parse_cascade(ATTENTION), parse_cascade(ATTENTION.replace(*change))
    assert bool(difference(before, after)) is found


def test_difference_looks_at_what_is_not_finite() -> None:
    before = parse_cascade("cascade c(X[N]) -> Y[N] { Y[n] = X[n] * 0 + 1.0 / (n - 1) }")
    after = parse_cascade("cascade c(X[N]) -> Y[N] { Y[n] = X[n] * 0 - 1.0 / (1 - n) }")
    assert "not finite" in difference(before, after)


def test_large_cascades_are_not_run() -> None:
    huge = parse_cascade("cascade c(X[1000000,1000000]) -> Y[1000000] { Y[m] = sum[n] X[m,n] }")
    assert difference(huge, huge) == ""


def test_inputs_that_do_not_fit_are_no_difference() -> None:
    cascade = parse_cascade("cascade c(X[N], I[N]) -> Y[N] { Y[n] = X[I[n] * I[n] + 100] }")
    with pytest.raises(CallError):
        run(cascade, random_inputs(cascade, {"N": 3}, param_types(cascade, DType.F32)), {"N": 3})
    assert difference(cascade, cascade) == ""


# --- the tolerance rule ----------------------------------------------------------------------------------------------


def results(dtype: torch.dtype, keys: int = 8191) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The weighted mean of many values: rounded once, in float64, and one that drops the last key."""
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(64, keys, generator=generator).to(dtype).double()
    v = torch.randn(keys, 16, generator=generator).to(dtype).double()
    gold = (p / p.sum(1, True)) @ v
    dropped = (p[:, :-1] / p[:, :-1].sum(1, True)) @ v[:-1]
    return gold.to(dtype), gold, dropped.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_rounded_result_agrees_and_a_dropped_key_does_not(dtype: torch.dtype) -> None:
    eager, gold, dropped = results(dtype)
    assert agree(eager, gold, eager).ok
    assert not agree(dropped, gold, eager).ok


def test_one_bad_row_is_found() -> None:
    gold = torch.randn(100, 64, dtype=torch.float64)
    eager = gold.float()
    ours = eager.clone()
    ours[17] += 2.2e-7 * gold[17].sign()
    assert agree(ours, gold, eager).reason == "a row's error"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_must_stand_where_gold_has_it(bad: float) -> None:
    gold = torch.ones(4, 4, dtype=torch.float64)
    ours = gold.float()
    ours[1, 2] = bad
    assert not agree(ours, gold, gold.float()).ok
    gold[1, 2] = bad
    assert agree(ours, gold, gold.float()).ok
    gold[1, 2] = -bad if bad == float("inf") else 0.0
    assert not agree(ours, gold, gold.float()).ok


def test_integers_are_equal() -> None:
    gold = torch.arange(6)
    assert agree(gold, gold, gold).ok
    assert agree(gold + (gold == 3), gold, gold).reason == "integers differ"


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0), ()])
def test_empty_and_scalar_results(shape: tuple[int, ...]) -> None:
    data = torch.ones(shape)
    assert agree(data, data.double(), data).ok


def test_measure_judges_every_result() -> None:
    cascade = parse_cascade("cascade c(X[N]) -> Y[N], Z[] { Y[n] = 2 * X[n]; Z = sum[n] X[n] }")
    types = param_types(cascade, DType.F32)

    def wrong(X: torch.Tensor, N: int) -> tuple[torch.Tensor, torch.Tensor]:
        return 2 * X, X.sum() + 1

    verdicts = measure(cascade, wrong, {"N": 5}, types, 0)
    assert [verdict.ok for verdict in verdicts.values()] == [True, False]
    assert run(cascade, {"X": torch.ones(5)}, precision=Precision.REFERENCE)["Z"] == 5
