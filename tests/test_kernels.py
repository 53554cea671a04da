"""Kernels against the reference, by the tolerance rule; and the rule itself: what it catches, what it lets pass.

Without a GPU the kernels run on small sizes through Triton's interpreter; with one the same tests run on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import cascade
from cascade import trial
from cascade.backends.triton import planner
from cascade.backends.triton.launch import Launcher
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.ir import Cascade
from cascade.pipeline import run_pipeline
from cascade.verify import verify
from tests.kernel_programs import PROGRAMS, RECIPES, RECURRENCES, Program
from tests.planned import Chosen, call_of, final
from tests.tolerance import Draw, confirmed, filled_with_nan, judge, judge_all, same_bits, standard, verdict_on

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_RECIPES = (
    "causal",
    "ragged",
    "masked_softmax",
    "layernorm",
    "gemm",
    "decayed_state",
    "states_by_length",
)  # the others see one recipe a type
LENGTHS = range(1, 34, 2)


@functools.cache
def source(program: str) -> Cascade:
    """The program as written."""
    return parse_cascade(PROGRAMS[program].text)


@functools.cache
def kernels(program: str) -> Callable[..., Any]:
    """The compiled program."""
    return cascade.compile(PROGRAMS[program].text, backend="triton")


def check(program: Program, draw: Draw, call: Callable[..., Any] | None = None) -> None:
    """The kernels, or what stands in for them, pass."""
    verdict = confirmed(call or kernels(program.name), source(program.name), draw)
    assert verdict.ok, f"{program.name} on {draw.recipe} {draw.dtype} {dict(draw.sizes)}: {verdict}"


# --- the kernels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program(name: str, dtype: torch.dtype) -> None:
    program = PROGRAMS[name]
    check(program, Draw(program, program.small, "padding" if program.padding else "normal", dtype, DEVICE))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ALL_RECIPES)
def test_every_recipe(name: str, recipe: str) -> None:
    program = PROGRAMS[name]
    for dtype in (torch.float32, torch.float16) if recipe in program.recipes() else ():
        check(program, Draw(program, program.small, recipe, dtype, DEVICE))


@pytest.mark.parametrize("name", ["entropy", "kl", "with_entropy"])
@pytest.mark.parametrize("parts", [1, 2])
def test_very_negative_scores_cost_no_digits(name: str, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In f32, in tiles of 16: what is read out of the states does not have the frame in it."""
    monkeypatch.setattr(planner, "LONG_ROW", 16)
    program = PROGRAMS[name]
    call = call_of(Chosen(final(program.text), parts=parts))
    check(program, Draw(program, {**program.small, "M": 5, "N": 40}, "negative", device=DEVICE), call)


@pytest.mark.parametrize("recipe", ["rising", "falling"])
@pytest.mark.parametrize(("name", "rows"), [("total", 40), ("row_sum", 5), ("variance", 5)])
def test_partial_sums_far_from_the_whole_cost_no_digits(
    name: str, rows: int, recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In f32, in tiles: the elements cancel along the stream, and what was added up half-way is a thousand times as large."""
    monkeypatch.setattr(planner, "LONG_ROW", 16)
    program = PROGRAMS[name]
    call = call_of(Chosen(final(program.text), tile=64))
    check(program, Draw(program, {"M": rows, "N": 8000}, recipe, device=DEVICE), call)


@pytest.mark.parametrize("recipe", ["rising", "falling"])
@pytest.mark.parametrize("length", [16, 64, 128, 300])
def test_rows_that_are_short_for_their_kernel_pass_on_every_draw(length: int, recipe: str) -> None:
    """In f32, where lengths change: what a tile has of a row is summed as if there were more of it."""
    program = PROGRAMS["variance"]
    call = call_of(Launcher(final(program.text)))
    for before in (100, 3000):
        call(**Draw(program, {"M": 5, "N": before}, device=DEVICE).inputs(0))
    for seed in range(8):
        draw = Draw(program, {"M": 5, "N": length}, recipe, device=DEVICE)
        verdict = verdict_on(call, source(program.name), draw, 1000 * seed)
        assert verdict.ok, f"draw {seed}: {verdict}"


@pytest.mark.parametrize("name", ["causal", "softmax", "gemm", "decayed_state"])
def test_lengths(name: str) -> None:
    program = PROGRAMS[name]
    for length in LENGTHS:
        check(
            program, Draw(program, {**program.small, **dict.fromkeys(program.lengths, length)}, "spike", device=DEVICE)
        )


@pytest.mark.parametrize(
    "name", ["causal", "ragged", "softmax", "masked_logsumexp", "gemm", "row_sum", "cumulative_sum"]
)
def test_every_rank_in_turn_empty(name: str) -> None:
    program = PROGRAMS[name]
    for symbol in program.small:
        check(program, Draw(program, {**program.small, symbol: 0}, device=DEVICE))


@pytest.mark.parametrize("length", [7, 70, 40_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_a_number_is_true_unless_it_is_0(dtype: torch.dtype, length: int) -> None:
    """A part of 1, NaN, and what is 0 in its lower 32 bits."""
    text = "cascade c(X[M,N]) -> A[M], Z[M] { A[m] = all[n] X[m,n]; Z[m] = any[n] X[m,n] }"
    some = 1 << 33 if dtype is torch.int64 else 0.25
    x = torch.zeros(5, length, dtype=dtype, device=DEVICE)
    x[1, length // 2], x[2], x[3] = some, some, some
    x[3, length - 1] = 0
    x[4] = some if dtype is torch.int64 else math.nan
    call = cascade.compile(text, backend="triton")
    for found, wanted in zip(call(x), ([0, 0, 1, 0, 1], [0, 1, 1, 1, 1]), strict=True):
        assert found.tolist() == [bool(truth) for truth in wanted]
    assert "no kernel" not in call.explain()


READ_ACROSS = ("averages_by_their_size", "selective_scan")  # sums across the recurrences: in a kernel of their own


@pytest.mark.parametrize("name", [program.name for program in RECURRENCES])
def test_a_recurrence_and_what_is_around_it_are_one_kernel(name: str) -> None:
    program = PROGRAMS[name]
    kernels(name)(**Draw(program, program.small, device=DEVICE).inputs(0))
    text = kernels(name).explain()  # type: ignore[attr-defined]
    if name in READ_ACROSS:
        assert "kernel c_1: 2 of 2" in text and "no kernel" not in text
        return
    assert "kernel c: 1 of 1" in text and "no kernel" not in text
    assert ("one coordinate of n at a time" in text) == (name == "steps_that_do_not_compose")


STEPS = {
    "integers": "C[m,n-1] * 2 - I[m,n] init C[m,-1] = 1",
    "largest integer": "max(C[m,n-1], I[m,n]) init C[m,-1] = -5",
    "truth values": "C[m,n-1] or X[m,n] > 1.9 init C[m,-1] = false",
    "backwards": "C[m,n-1] * 0.9 + X[m,N-1-n] init C[m,-1] = 0",
    "a filter of rows": "C[m,n-1] + X[m,n] where m >= 2 init C[m,-1] = 0",
    "reads that end": "C[m,n-1] + X[m,n+2] init C[m,-1] = 0",
    "coordinates": "C[m,n-1] / 2 + n * m init C[m,-1] = 0",
}
OUTSIDE = {
    "reads that begin": "C[m,n-1] + X[m,n-2] init C[m,-1] = 0",
    "a filter that begins": "C[m,n-1] + X[m,n] where n >= 3 init C[m,-1] = 0",
    "a default": "(C[m,n-1] ?? 1) + X[m,n] where n >= 3 init C[m,-1] = 0",
}


@pytest.mark.parametrize("name", (*STEPS, *OUTSIDE))
def test_steps_of_all_kinds(name: str) -> None:
    step = {**STEPS, **OUTSIDE}[name]
    fill = "" if name == "truth values" else " fill 7"
    text = f"cascade c(X[M,N], I: i32[M,N]) -> C[M,N]{fill} {{ C[m,n] = {step} }}"
    generator = torch.Generator().manual_seed(0)
    inputs = {"X": torch.randn(6, 25, generator=generator), "I": torch.randint(-2, 3, (6, 25), generator=generator)}
    inputs = {"X": inputs["X"].to(DEVICE), "I": inputs["I"].int().to(DEVICE)}
    call = cascade.compile(text, backend="triton")
    by = standard(parse_cascade(text), inputs, {})
    assert judge_all(call(**inputs), by).ok
    assert ("no kernel" in call.explain()) == (name in OUTSIDE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_of_what_the_kernel_made_lies_in_one_piece(dtype: torch.dtype) -> None:
    """Pieces of a rank are slices of what lies in memory: of a tile in registers there are none."""
    text = "cascade c(X[T,D], W[E,D], V[D,E]) -> Y[T,D] { Z[t,e] = X[t,d] * W[e,d]; Y[t,d] = Z[t,e] * V[d,e] }"
    generator = torch.Generator().manual_seed(3)
    shapes = {"X": (20, 1100), "W": (64, 1100), "V": (1100, 64)}
    inputs = {n: torch.randn(s, generator=generator).to(DEVICE, dtype) for n, s in shapes.items()}
    call = cascade.compile(text, backend="triton")
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict
    assert "1 of 1" in call.explain()


def test_the_same_call_gives_the_same_bits() -> None:
    program = PROGRAMS["causal"]
    inputs = Draw(program, program.small, device=DEVICE).inputs(0)
    first = kernels("causal")(**inputs)
    assert all(same_bits(kernels("causal")(**inputs), first) for _ in range(3))


# --- the programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_pipeline_keeps_what_a_program_means(name: str) -> None:
    program, written = PROGRAMS[name], source(name)
    verify(written)
    final = run_pipeline(written).final
    for recipe in program.recipes():
        draw = Draw(program, program.small, recipe, torch.float64)
        inputs, given = draw.inputs(1), draw.given()
        wanted = run(written, inputs, given, Precision.REFERENCE)
        for result, found in run(final, inputs, given, Precision.REFERENCE).items():
            assert not trial.unlike(found, wanted[result]), f"{result} on {recipe}"


# --- the rule --------------------------------------------------------------------------------------------------------

KEYS = 8191


def rows_of_attention(q: Tensor, k: Tensor, v: Tensor, stop: int = KEYS, block: int = 128) -> Tensor:
    """Attention by a running maximum over blocks of keys, computed in f32 and rounded once."""
    q, k, v = q.float(), k[:stop].float(), v[:stop].float()
    best, total, out = torch.full((len(q), 1), -torch.inf), torch.zeros(len(q), 1), torch.zeros(len(q), v.shape[1])
    for start in range(0, stop, block):
        scores = q @ k[start : start + block].T / q.shape[1] ** 0.5
        new = torch.maximum(best, scores.amax(1, keepdim=True))
        weights = torch.exp(scores - new)
        total = total * torch.exp(best - new) + weights.sum(1, keepdim=True)
        out = out * torch.exp(best - new) + weights @ v[start : start + block]
        best = new
    return out / total


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["f32", "f16", "bf16"])
def test_the_rule_catches_a_dropped_key_and_allows_another_order(dtype: torch.dtype) -> None:
    program = PROGRAMS["full"]
    sizes = {"B": 1, "H": 1, "M": 16, "N": KEYS, "E": 16, "F": 16}
    caught = []
    for recipe in ("normal", "rising", "falling", "spike", "negative"):
        inputs = Draw(program, sizes, recipe, dtype).inputs(0)
        gold, eager = (
            run(source("full"), inputs, {}, precision)["O"][0, 0]
            for precision in (Precision.REFERENCE, Precision.EAGER)
        )
        q, k, v = (tensor[0, 0] for tensor in inputs.values())
        for block in (64, 100, 1000):
            verdict = judge(rows_of_attention(q, k, v, block=block).to(dtype), gold, eager)
            assert verdict.ok, f"{recipe}, blocks of {block}: {verdict}"
        if not judge(rows_of_attention(q, k, v, KEYS - 1).to(dtype), gold, eager).ok:
            caught.append(recipe)
    assert {"rising", "spike"} <= set(caught) and (dtype is torch.bfloat16 or "normal" in caught)


def test_each_clause_says_what_failed() -> None:
    gold = torch.randn(64, 33, generator=torch.Generator().manual_seed(0)).double()
    eager = gold.half()

    def clause(at: tuple[int, ...], value: float, exact: bool = False) -> str:
        ours = gold.half()
        ours[at] = value
        return judge(ours, gold, eager, exact=exact).clause

    assert judge(gold.half(), gold, eager).ok
    assert clause((3, 4), torch.nan) == clause((3, 4), -torch.inf) == "values that are not finite stand elsewhere"
    assert clause((3, 4), float(gold[3, 4]) + 0.01) == "largest error"
    assert judge((gold * 1.001).half(), gold, eager).clause == "root mean square error"
    small = torch.where(torch.arange(64)[:, None] == 5, gold * 1e-2, gold)
    wrong = small.clone()
    wrong[5] *= 1.1
    assert judge(wrong.half(), small, small.half()).clause == "error of a row"
    assert clause((3, 4), float(eager[3, 4]) + float(torch.finfo(torch.half).eps), exact=True) == "exact values differ"
    assert judge(torch.tensor([1, 2]), torch.tensor([1, 3]), torch.tensor([1, 3])).clause == "integers differ"
    assert judge(gold.half(), gold[:3], eager[:3]).clause == "shape" and judge(gold, gold, eager).clause == "type"


def test_overflow_is_judged_by_what_fits_the_type() -> None:
    gold = torch.tensor([1e5, -1e5, 65504.0, 65519.9, 1.0]).double()
    eager = gold.half()
    assert judge(gold.half(), gold, eager).ok
    assert not judge(torch.tensor([65504.0, -torch.inf, 65504, 65504, 1]).half(), gold, eager).ok
    assert not judge(torch.tensor([torch.inf, torch.inf, 65504, 65504, 1]).half(), gold, eager).ok
    assert judge(torch.tensor([torch.inf, -torch.inf, 65504, torch.inf, 1]).half(), gold, eager).ok  # on the brink


def test_what_hardware_flushes_is_no_error() -> None:
    gold = torch.tensor([[2.0**-128, 2.0**-130]], dtype=torch.float64)
    eager = gold.bfloat16()
    assert judge(torch.zeros_like(eager), gold, eager).ok
    assert not judge(torch.zeros_like(eager), gold * 16, eager * 16).ok


def test_the_rule_is_the_one_of_the_compiler() -> None:
    generator = torch.Generator().manual_seed(0)
    gold = torch.randn(17, 29, generator=generator).double()
    for dtype in (torch.float16, torch.float32):
        unit = torch.finfo(dtype).eps / 2
        eager = (gold * (1 + unit * torch.randn(gold.shape, generator=generator))).to(dtype)
        for scale in (0.5, 1, 1.5, 2, 3, 4, 8):
            ours = (gold * (1 + scale * unit * torch.randn(gold.shape, generator=generator))).to(dtype)
            assert judge(ours, gold, eager).ok == trial.agree(ours, gold, eager).ok


def test_what_is_not_written_shows() -> None:
    with filled_with_nan():
        assert torch.empty(5).isnan().all() and torch.empty(5, dtype=torch.float16).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
