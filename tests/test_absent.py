"""Data that is not finite: exactly what depends on it shows it, with its sign, and what is absent reaches nothing."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

import cascade
from cascade.backends.triton import partition, planner
from cascade.backends.triton.plan import Loop, Seen
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.ir import Cascade
from tests.kernel_programs import PRODUCTS, PROGRAMS, RECURRENCES, REDUCTIONS, ROWS, Program, Tensors, attention
from tests.planned import Chosen, all_kernels, call_of, final, planner_for
from tests.tolerance import Draw, judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STRANGE = (math.nan, math.inf, -math.inf)
MASKED = ("causal", "window", "prefix", "document", "ragged", "padded", "masked")
MORE = ("sink", "softcap", "grouped_query")
ROWWISE = tuple(program.name for program in (*ROWS, *REDUCTIONS) if "nan" not in program.without)
STEPPING = tuple(program.name for program in RECURRENCES)
IN_ANY_ORDER = ("low_rank", "bilinear", "bilinear_form")  # by the order of their sums infinity has a sign or none
SIDEWAYS = tuple(program.name for program in PRODUCTS if program.name not in IN_ANY_ORDER)


@functools.cache
def prepared(name: str) -> tuple[Cascade, Cascade]:
    """A program as written, and as the backend gets it."""
    return parse_cascade(PROGRAMS[name].text), final(PROGRAMS[name].text)


def floats(inputs: Tensors) -> list[str]:
    """The arguments that can be anything but finite."""
    return [name for name, tensor in inputs.items() if tensor.dtype.is_floating_point]


def check(name: str, inputs: Tensors, given: dict[str, int], tile: int = 16, parts: int = 1) -> dict[str, Tensor]:
    """The kernels pass, what is not finite included; gives gold."""
    written, made = prepared(name)
    by = standard(written, inputs, given)
    results = call_of(Chosen(made, tile=tile, parts=parts))(**inputs, **given)
    verdict = judge_all(results, by)
    assert verdict.ok or verdict.rounding, f"{name}: {verdict}"
    for ours, gold in zip(results, by.gold.values(), strict=True):  # one draw says little about rounding
        if ours.dtype.is_floating_point:
            tolerance = 100 * torch.finfo(ours.dtype).eps
            known = gold.isfinite() & ours.isfinite()
            torch.testing.assert_close(ours[known].double(), gold[known], rtol=tolerance, atol=10 * tolerance)
    return dict(by.gold)


def large(program: Program, length: int, recipe: str = "normal", dtype: torch.dtype = torch.float32) -> Draw:
    """Some batches, and several tiles along each length."""
    sizes = {**program.small, "B": 2, "H": 4, "G": 2, "M": length, "N": length}
    sizes = {symbol: size for symbol, size in sizes.items() if symbol in program.small}
    return Draw(program, sizes, recipe, dtype, DEVICE)


def strewn(tensor: Tensor, seed: int) -> Tensor:
    """One value that is not finite in each matrix of the last two ranks, at edges of tiles and in between."""
    generator = torch.Generator().manual_seed(seed)
    found = tensor.clone()
    matrices = found.view(-1, *found.shape[-2:])
    rows = [0, 15, 16, 31, matrices.shape[1] - 1]
    rows += torch.randint(0, matrices.shape[1], (3,), generator=generator).tolist()
    for number, matrix in enumerate(matrices):
        matrix[min(rows[number % len(rows)], len(matrix) - 1), (number + seed) % matrix.shape[1]] = STRANGE[number % 3]
    return found


@pytest.mark.parametrize("parts", [1, 2])
def test_a_part_of_which_one_frame_is_infinite_was_seen(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile without weight in the second distribution: the cross entropy is infinite, not that of the other tiles."""
    text = """cascade c(X[M,N], U[M,N]) -> A[M] {
    P[m,n] = softmax[n] X[m,n]
    W[m,n] = logsoftmax[n] U[m,n]
    A[m] = -(sum[n] P[m,n] * W[m,n])
}"""
    monkeypatch.setattr(planner, "LONG_ROW", 16)
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn((3, 40), generator=generator).to(DEVICE) for name in "XU"}
    inputs["U"][1, :16] = -math.inf
    launcher = Chosen(final(text), parts=parts)
    (found,) = call_of(launcher)(**inputs)
    assert bool(launcher.shared) == (parts > 1)
    wanted = run(parse_cascade(text), inputs, precision=Precision.REFERENCE)["A"]
    assert wanted[1] == math.inf and wanted[0].isfinite()
    torch.testing.assert_close(found, wanted.float())


ENTROPY = """cascade c(X[M,N]) -> A[M] {
    P[m,n] = softmax[n] X[m,n]
    L[m] = logsumexp[n] X[m,n]
    A[m] = sum[n] P[m,n] * (L[m] - X[m,n])
}"""


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("tiles", [1, 2])
def test_a_part_that_is_all_infinite_keeps_its_nan(parts: int, tiles: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """0 times infinity is NaN, also where the tiles that have it are all -inf: they are seen, not nothing."""
    monkeypatch.setattr(planner, "LONG_ROW", 16)
    inputs = {"X": torch.randn((3, 40), generator=torch.Generator().manual_seed(0)).to(DEVICE)}
    inputs["X"][1, : 16 * tiles] = -math.inf
    (found,) = call_of(Chosen(final(ENTROPY), parts=parts))(**inputs)
    wanted = run(parse_cascade(ENTROPY), inputs, precision=Precision.REFERENCE)["A"]
    assert wanted[1].isnan() and wanted[0].isfinite()
    torch.testing.assert_close(found, wanted.float(), equal_nan=True)


LIKE_NOTHING = {  # elements that are what stands for an absent one, behind elements that are absent
    "argmax": ("I[M] fill -1", "I[m] = argmax[n] X[m,n] where n > 3 * m", -math.inf),
    "argmin": ("I[M] fill -1", "I[m] = argmin[n] X[m,n] where n > 3 * m", math.inf),
    "argmax of integers": ("I[M] fill -1", "I[m] = argmax[n] J[m,n] where n > 3 * m", -(2**31)),
    "argmax of long integers": ("I[M] fill -1", "I[m] = argmax[n] L[m,n] where n > 3 * m", -(2**63)),
    "max of integers": ("A[M]", "A[m] = max[n] J[m,n] where n > 3 * m", -(2**31)),
    "max of long integers": ("A[M]", "A[m] = max[n] L[m,n] where n > 3 * m", -(2**63)),
    "min of long integers": ("A[M]", "A[m] = min[n] L[m,n] where n > 3 * m", 2**63 - 1),
    "topk": ("V[M,3] fill 7, I[M,3] fill -1", "V[m,z], I[m,z] = topk[n, 3] X[m,n] where n > 3 * m", -math.inf),
    "topk of short floats": ("V[M,3] fill 7, I[M,3]", "V[m,z], I[m,z] = topk[n, 3] H[m,n] where n > 3 * m", -math.inf),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", LIKE_NOTHING)
def test_what_is_present_is_told_from_what_is_absent(
    name: str, streamed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, line, value = LIKE_NOTHING[name]
    letter = next(letter for letter in "XJLH" if f"{letter}[m,n]" in line)
    kind = {"X": torch.float32, "J": torch.int32, "L": torch.int64, "H": torch.float16}[letter]
    declared = {"X": "f32", "J": "i32", "L": "i64", "H": "f16"}[letter]
    text = f"cascade c({letter}: {declared}[M,N]) -> {results} {{\n    {line}\n}}"
    if streamed:
        monkeypatch.setattr(planner, "LONG_ROW", 16)
    data = torch.full((16, 40), value, dtype=kind)
    wanted = run(parse_cascade(text), {letter: data}, precision=Precision.REFERENCE)
    found = call_of(Chosen(final(text)))(**{letter: data.to(DEVICE)})
    for ours, right in zip(found, wanted.values(), strict=True):
        assert torch.equal(ours.cpu().to(right.dtype), right), (ours, right)


def test_a_nan_of_any_sign_is_the_largest() -> None:
    text = "cascade c(X[M,N]) -> V[M,3], I[M,3] {\n    V[m,z], I[m,z] = topk[n, 3] X[m,n] where n > m\n}"
    data = torch.randn((5, 40), generator=torch.Generator().manual_seed(0))
    data[:, 20], data[:, 30] = -torch.tensor(math.nan), math.nan
    values, places = call_of(Chosen(final(text)))(X=data.to(DEVICE))
    wanted = run(parse_cascade(text), {"X": data}, precision=Precision.REFERENCE)
    assert torch.equal(places.cpu(), wanted["I"]) and places[0, :2].tolist() == [20, 30]
    torch.testing.assert_close(values.cpu(), wanted["V"].float(), equal_nan=True)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("length", "count"), [(16, 3), (40, 9), (100, 8), (256, 2), (256, 12)])
def test_the_largest_are_in_order_and_the_first_of_equals_wins(length: int, count: int, kind: torch.dtype) -> None:
    short = {torch.float16: "f16", torch.bfloat16: "bf16", torch.float32: "f32"}[kind]
    text = f"cascade c(X: {short}[M,N]) -> V[M,{count}], I[M,{count}] {{ V[m,z], I[m,z] = topk[n, {count}] X[m,n] }}"
    generator = torch.Generator().manual_seed(length + count)
    data = torch.randint(-3, 4, (11, length), generator=generator).to(kind)  # nearly all are equal to others
    data[1], data[2, 3], data[3, ::2] = -math.inf, math.inf, -0.0
    compiled = cascade.compile(text, backend="triton")
    values, places = (result.cpu() for result in compiled(X=data.to(DEVICE)))
    wanted, order = torch.sort(data, dim=1, descending=True, stable=True)
    assert torch.equal(places.long(), order[:, :count]) and torch.equal(values.to(kind), wanted[:, :count])
    (source,) = compiled.sources().values()
    assert ("largest(" in source) == (count > 2)


# --- live coordinates ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argument", ["V", "K", "Q"])
@pytest.mark.parametrize("name", MASKED)
def test_what_is_not_finite_reaches_exactly_its_rows(name: str, argument: str) -> None:
    draw = large(PROGRAMS[name], 40)
    inputs = draw.inputs(0)
    inputs[argument] = strewn(inputs[argument], 1)
    gold = check(name, inputs, draw.given())
    strange = ~next(iter(gold.values())).isfinite()
    assert strange.any() and not strange.all(), "the data excites nothing"


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("argument", ["V", "K", "Q"])
@pytest.mark.parametrize("name", (*MASKED, *MORE))
def test_what_is_not_finite_anywhere(name: str, argument: str, seed: int) -> None:
    draw = large(PROGRAMS[name], (40, 17)[seed])
    inputs = draw.inputs(seed)
    inputs[argument] = strewn(inputs[argument], seed)
    for tile in (16, 64):
        check(name, inputs, draw.given(), tile)


@pytest.mark.parametrize("name", MASKED)
def test_16_bits_that_are_not_finite(name: str) -> None:
    draw = large(PROGRAMS[name], 40, dtype=torch.float16)
    inputs = draw.inputs(2)
    check(name, {**inputs, "V": strewn(inputs["V"], 2)}, draw.given())


def test_one_by_one_by_the_index_of_wider_tiles() -> None:
    draw = Draw(PROGRAMS["document"], {**PROGRAMS["document"].small, "B": 1, "H": 1, "M": 130}, device=DEVICE)
    inputs = draw.inputs(0)
    inputs["doc"] = (torch.arange(130, device=DEVICE) >= 65).long()[None]
    inputs["V"][0, 0, 127, 0] = math.nan
    check("document", inputs, {}, tile=64)


@pytest.mark.parametrize("name", ["full", "ragged", "causal", "window", "prefix", "padded", "masked"])
def test_parts_that_are_not_finite(name: str) -> None:
    draw = large(PROGRAMS[name], 50)
    inputs = draw.inputs(3)
    for argument in ("V", "K"):
        check(name, {**inputs, argument: strewn(inputs[argument], 3)}, draw.given(), parts=3)


@pytest.mark.campaign
@pytest.mark.parametrize("name", ["causal", "prefix", "ragged"])
def test_long_tiles_that_are_not_finite(name: str) -> None:
    draw = large(PROGRAMS[name], 130)
    inputs = draw.inputs(4)
    inputs["V"][..., 100, 0] = math.nan
    inputs["V"][..., 64, 1] = math.inf
    check(name, inputs, draw.given(), tile=64)


# --- absent coordinates ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", STRANGE[:2], ids=str)
@pytest.mark.parametrize(
    "name", [n for n, p in PROGRAMS.items() if p.padding and p.name not in ("paged", "paged_by_quotient_and_remainder")]
)
def test_what_is_dead_for_all_rows_reaches_none(name: str, value: float) -> None:
    program = PROGRAMS[name]
    sizes = {**program.small, "N": 50}
    draw = Draw(program, sizes, device=DEVICE)
    inputs, given = draw.inputs(0), draw.given()
    assert program.padding is not None
    dead = program.padding(inputs, sizes)
    spoilt = {n: t.masked_fill(dead[n].to(DEVICE), value) if n in dead else t for n, t in inputs.items()}
    written, made = prepared(name)
    clean = run(written, inputs, given, Precision.REFERENCE)
    gold = check(name, spoilt, given)
    assert all(torch.allclose(gold[result], clean[result]) for result in clean), "the data is not dead"
    ours, wanted = call_of(Chosen(made))(**spoilt, **given), call_of(Chosen(made))(**inputs, **given)
    for found, plain in zip(ours, wanted, strict=True):
        assert torch.equal(found.isfinite(), plain.isfinite())
        torch.testing.assert_close(found, plain, equal_nan=True)


def test_rows_that_nothing_reaches_are_filled() -> None:
    draw = large(PROGRAMS["ragged"], 40)
    inputs = draw.inputs(0)
    inputs["len"].zero_()
    inputs |= {name: torch.full_like(inputs[name], math.nan) for name in ("K", "V")}
    gold = check("ragged", inputs, {})
    assert not gold["O"].any()


BIASED = attention(
    "n <= m and keep[b,n]",
    "(sum[e] Q[b,h,m,e] * K[b,h,n,e] / sqrt(E)) + bias[b,n]",
    ", keep: bool[B,N], bias[B,N]",
)


@pytest.mark.parametrize("parts", [1, 2])
def test_a_row_of_which_all_that_is_present_is_infinite_is_no_empty_one(parts: int) -> None:
    """Both have an extreme of -inf: one is NaN, as 0 / 0 is, the other absent. Found out behind the loop."""
    draw = large(PROGRAMS["padded"], 40)
    keep = torch.ones((2, 40), dtype=torch.bool)
    bias = torch.zeros((2, 40))
    keep[0, :20] = False  # rows of which nothing is present
    bias[1, :20] = -math.inf  # rows of which all is -inf
    inputs = {**draw.inputs(0), "keep": keep.to(DEVICE), "bias": bias.to(DEVICE)}
    (found,) = call_of(Chosen(final(BIASED), parts=parts))(**inputs)
    wanted = run(parse_cascade(BIASED), inputs, precision=Precision.REFERENCE)["O"]
    assert not found[0, :, :20].any() and found[1, :, :20].isnan().all() and found[:, :, 20:].isfinite().all()
    torch.testing.assert_close(found, wanted.float(), equal_nan=True)
    (kernel,) = all_kernels(planner_for(final(BIASED), inputs))
    first, second = (op for op in kernel.ops if isinstance(op, Loop))
    assert (first.unless, second.unless) == (None, "seen") and not any(isinstance(op, Seen) for op in first.body)


def test_a_filter_by_what_a_loop_carries_is_not_asked_behind_it() -> None:
    """Y runs beyond 2 in the first columns, where all of G is -inf, and is below it again in the end."""
    text = """cascade c(X[T,D], G[T,D]) -> A[D] fill 7 {
    Y[t,d] = select(Y[t-1,d] > 50.0, 0.0, Y[t-1,d] + X[t,d]) init Y[-1,d] = 0.0
    A[d] = max[t] G[t,d] where Y[t,d] > 2.0
}"""
    x = torch.tensor([0.5, 0.01]).repeat_interleave(4).repeat(40, 1)
    x[39] = -100.0
    inputs = {"X": x.to(DEVICE), "G": torch.full((40, 8), -math.inf, device=DEVICE)}
    (found,) = call_of(Chosen(final(text)))(**inputs)
    wanted = run(parse_cascade(text), inputs, precision=Precision.REFERENCE)["A"]
    assert wanted.tolist() == [-math.inf] * 4 + [7.0] * 4
    torch.testing.assert_close(found, wanted.float())


def test_only_what_may_be_spoilt_is_watched() -> None:
    for name, watched in (("causal", True), ("full", False), ("prefix", True), ("gemm", False)):
        draw = Draw(PROGRAMS[name], PROGRAMS[name].small)
        (kernel,) = all_kernels(planner_for(prepared(name)[1], draw.inputs(0), draw.given()))
        assert bool(kernel.watched) == watched and (kernel.careful is not None) == watched, name


# --- rows and products -----------------------------------------------------------------------------------------------


def every_argument(name: str, dtype: torch.dtype = torch.float32) -> None:
    """Each value that is not finite in each argument in turn."""
    program = PROGRAMS[name]
    draw = Draw(program, program.small, dtype=dtype, device=DEVICE)
    for number, value in enumerate(STRANGE):
        for argument in floats(draw.inputs(0)):
            inputs = draw.inputs(number)
            data = inputs[argument].view(-1)
            data[(number * 17 + 5) % data.numel()] = value
            check(name, inputs, draw.given())


@pytest.mark.parametrize("name", (*ROWWISE, *STEPPING, *SIDEWAYS))
def test_every_argument_in_turn(name: str) -> None:
    every_argument(name)


@pytest.mark.parametrize(
    "name",
    ["logsumexp", "entropy", "kl", "extremes", "row_sum", "column_max", "masked_logsumexp", "products", *STEPPING],
)
def test_every_argument_of_rows_that_are_streamed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "LONG_ROW", 16)
    every_argument(name)


@pytest.mark.parametrize(
    "name", ["softmax", "layernorm", "rmsnorm", "entropy", "masked_softmax", "rows_by_their_largest"]
)
def test_every_argument_of_rows_that_take_several_trips(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "ROW_LIMIT", 32)
    every_argument(name)


@pytest.mark.parametrize("long_row", [8192, 16])
def test_factors_whose_product_overflows(long_row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "LONG_ROW", long_row)
    text = """cascade c(X[M,N], A[M,N], L: i32[M]) -> H[M,N], E[M] fill 7 {
        H[m,n] = A[m,n] * H[m,n-1] + X[m,n]   where n < L[m]   init H[m,-1] = 0
        E[m] = H[m,N-1]
    }"""
    x = torch.zeros(3, 50, device=DEVICE)
    x[0, 30], x[1, 48], x[2, 5] = 1.0, 2.0, 3.0
    a = torch.full((3, 50), 1e20, device=DEVICE)
    a[0, 31:], a[2, 6:] = 1.0, 0.5
    inputs = {"X": x, "A": a, "L": torch.tensor([50, 50, 20], dtype=torch.int32, device=DEVICE)}
    last, end = call_of(Chosen(final(text), tile=16))(**inputs)
    assert last[0].tolist() == [0.0] * 30 + [1.0] * 20 and last[1, 49] == 2e20
    assert last[2, 20:].eq(0).all() and end.tolist() == [1.0, last[1, 49].item(), 7.0]


@pytest.mark.parametrize("name", ["alibi", "softcap", "sink", "sigmoid", "latent_shared", "decode", "decode_grouped"])
def test_every_argument_of_folded_programs(name: str) -> None:
    every_argument(name)
