"""Streams that several programs share: the merged parts are what one program computes, whatever a part has of it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cascade.backends.triton import partition, planner
from cascade.backends.triton.count import work
from cascade.backends.triton.launch import KernelStep, place
from cascade.backends.triton.offline import StaticFacts, facts
from cascade.backends.triton.partition import Group
from cascade.backends.triton.shares import Uneven, shares_of, tables_of
from cascade.backends.triton.split import divisible
from cascade.backends.triton.static import request
from cascade.backends.triton.tune import candidates, sized
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.ir import Cascade, DType, Rank, Read
from cascade.verify import verify
from tests.kernel_programs import PROGRAMS, Program, attention
from tests.planned import Chosen, all_kernels, call_of, final, launch, only_group, planner_for, with_stream
from tests.tolerance import Draw, confirmed, judge, judge_all, same_bits, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PARTS = (2, 3, 7)
DRAWS = 6  # of inputs, on one of which at least roundings are as small as they must be
LONG = {"N": 50, "K": 150}  # some tiles of a stream, the last of them ragged
FOLDED = ("full", "causal", "window", "prefix", "document", "ragged", "padded", "masked", "alibi", "softcap", "grouped_query", "sink",
    "cross", "picture", "paged", "paged_by_quotient_and_remainder", "decode", "decode_grouped", "latent", "latent_shared",
    "latent_slice", "with_logsumexp", "with_entropy", "norm_gemm", "differential", "shared_prefix", "simplicial")  # fmt: skip
SUMMED = ("gemm", "batched_gemm", "gemm_bias_gelu", "gemm_prologue", "gemm_transposed", "gated", "convolution",
    "strided_convolution", "low_rank", "bilinear", "bilinear_form")  # fmt: skip
STREAMED = ("logsumexp", "entropy", "kl", "cross_entropy", "mean_cross_entropy", "masked_logsumexp",
    "triangle_logsumexp", "row_sum", "extremes", "truths", "products", "matrix_vector",
    "cumulative_sum_by_filter", "variance", "counts")  # fmt: skip


@functools.cache
def source(name: str) -> Cascade:
    """A program as written."""
    return parse_cascade(PROGRAMS[name].text)


@functools.cache
def prepared(name: str) -> Cascade:
    """A program as the backend gets it."""
    return final(PROGRAMS[name].text)


def sizes_of(program: Program) -> dict[str, int]:
    """Small sizes with a stream of several tiles."""
    return {name: LONG.get(name, size) for name, size in program.small.items()} | (
        {"M": 50} if program.name in ("document", "causal", "window") else {}
    )


def check(name: str, parts: int, dtype: torch.dtype) -> None:
    """A program whose streams are shared gives what the same tiles give unshared, and what the rule allows."""
    program = PROGRAMS[name]
    draw = Draw(program, sizes_of(program), "padding" if program.padding else "normal", dtype, DEVICE)
    tile = 64 if name == "paged_by_quotient_and_remainder" else 16  # Triton's interpreter has no masks of one page
    launcher = Chosen(prepared(name), tile=tile, parts=parts)
    verdict = confirmed(call_of(launcher), source(name), draw)
    assert launcher.shared, "the stream was not shared"
    assert verdict.ok, f"{name} in {parts} parts: {verdict}"
    inputs, given = draw.inputs(0), draw.given()
    whole = call_of(Chosen(prepared(name), tile=tile))(**inputs, **given)
    for ours, wanted in zip(call_of(launcher)(**inputs, **given), whole, strict=True):
        assert near(ours, wanted), f"{name} in {parts} parts differs from one"


def near(ours: Tensor, wanted: Tensor) -> bool:
    """Whether two results differ in the order of a sum at most."""
    if not ours.dtype.is_floating_point:
        return torch.equal(ours, wanted)
    a, b = ours.double(), wanted.double()
    known = b.isfinite()
    if not torch.equal(a[~known].nan_to_num(), b[~known].nan_to_num()) or not torch.equal(known, a.isfinite()):
        return False
    largest = b[known].abs().max() if known.any() else b.new_zeros(())
    return bool(((a - b)[known].abs() <= 32 * torch.finfo(ours.dtype).eps * largest).all())


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short rows are streamed as long ones are."""
    monkeypatch.setattr(planner, "LONG_ROW", 16)


# --- every program that can be shared --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", (*FOLDED, *SUMMED))
def test_every_folded_program_in_parts(name: str) -> None:
    check(name, 3, torch.float32)


@pytest.mark.parametrize("name", STREAMED)
def test_every_streamed_row_in_parts(name: str, streams: None) -> None:
    check(name, 3, torch.float32)


@pytest.mark.campaign
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", (*FOLDED, *SUMMED, *STREAMED))
def test_every_program_in_any_number_of_parts(name: str, parts: int, streams: None) -> None:
    check(name, parts, torch.float16)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", ["causal", "ragged", "masked_logsumexp"])
def test_16_bits_in_parts(name: str, parts: int, streams: None) -> None:
    check(name, parts, torch.float16)


def test_every_program_here_can_be_shared(streams: None) -> None:
    for name in (*FOLDED, *SUMMED, *STREAMED):
        draw = Draw(PROGRAMS[name], sizes_of(PROGRAMS[name]))
        made = planner_for(prepared(name), draw.inputs(0), draw.given())
        groups = made.groups()
        assert any(isinstance(g, partition.Group) and divisible(g, made.stored(g, groups)) for g in groups), name


# --- even parts of ragged batches ------------------------------------------------------------------------------------

UNEVEN = ("ragged", "decode")
STRETCH = attention("start[b] <= n and n < stop[b]", params=", start: i32[B], stop: i32[B]", results=", L[B,H,M] fill -inf",
    more="\n    L[b,h,m] = R[b,h,m] + log(D[b,h,m])")  # fmt: skip


def batches(rows: int, most: int) -> list[list[int]]:
    """Lengths of rows: none, one long one among short ones, first, last and alone, all alike, rising."""
    return [
        [0] * rows, [most] + [1] * (rows - 1), [3] * (rows - 1) + [most], [0] * (rows - 1) + [most], [17] * rows,
        [most * row // rows for row in range(rows)], [-4] * rows, [2 * most] * rows,
    ]  # fmt: skip


@functools.cache
def both(text: str) -> tuple[Cascade, Cascade]:
    """A program as written, and as the backend gets it."""
    return parse_cascade(text), final(text)


def evenly(text: str, draws: Callable[[int], dict[str, Tensor]], parts: int) -> None:
    """A program in even parts passes on one of a few draws at least, and gives the same bits again."""
    written, made = both(text)
    launcher = Chosen(made, parts=parts, even=True)
    call = call_of(launcher)
    for seed in range(DRAWS):
        inputs = {name: tensor.to(DEVICE) for name, tensor in draws(seed).items()}
        found = call(**inputs)
        verdict = judge_all(found, standard(written, inputs, {}))
        if not verdict.rounding:
            break
    assert verdict.ok, f"{parts} parts: {verdict}"
    assert all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(found, call(**inputs), strict=True))
    (plan,) = launcher.plans.values()
    assert plan is not None
    names = [step.kernel.name for step in plan.steps if isinstance(step, KernelStep)]
    label = names[1]
    assert names == [f"{label}_bounds", label, f"{label}_merge"]
    assert "a table says which part of which b a program has" in launcher.explain()


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", UNEVEN)
def test_ragged_batches_in_even_parts(name: str, parts: int) -> None:
    program = PROGRAMS[name]
    draw = Draw(program, sizes_of(program))
    rows = draw.inputs(0)["len"].shape[0]
    for lengths in batches(rows, LONG["N"])[:: 1 if parts == 3 else 3]:
        length = {"len": torch.tensor(lengths, dtype=torch.int32)}
        evenly(program.text, lambda seed, length=length: draw.inputs(seed) | length, parts)  # type: ignore[misc]


def test_stretches_in_even_parts() -> None:
    starts, stops = torch.tensor([0, 40, 17, 60, 89]), torch.tensor([90, 40, 30, 20, 90])

    def draw(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(5, 1, n, 8, generator=generator) for n in (3, 90, 90))
        return {"Q": q, "K": k, "V": v, "start": starts.int(), "stop": stops.int()}

    for parts in (1, 2, 7):
        evenly(STRETCH, draw, parts)


def test_rows_of_one_length_are_a_part_each_and_two_rows_have_room_for_their_tables() -> None:
    program = PROGRAMS["ragged"]
    for rows in (2, 5):
        draw = Draw(program, {**sizes_of(program), "B": rows})
        for lengths in ([LONG["N"]] * rows, [LONG["N"] - 7] + [16] * (rows - 1), [0] * rows):
            length = {"len": torch.tensor(lengths, dtype=torch.int32)}
            evenly(program.text, lambda seed, draw=draw, length=length: draw.inputs(seed) | length, 1)  # type: ignore[misc]


@pytest.mark.parametrize("parts", [1, 2, 6])
def test_what_merges_even_parts_has_tiles_for_those_of_a_row(parts: int) -> None:
    """All rows have several times as many: a tile of those would read as much of other rows."""
    program = PROGRAMS["ragged"]
    made = planner_for(final(program.text), Draw(program, {**sizes_of(program), "B": 32, "N": 8000}).inputs(0))
    group = only_group(made)
    tiling = dataclasses.replace(made.default_tiling(group), parts=parts, even=True)
    kernel, merger, groups = made.split("c", group, made.groups(), tiling)
    (merging,) = (one for one in groups if isinstance(one, Group))
    (part,) = (rank for rank in merger.merges)
    assert merger.actual[part] == 32 * (parts + 1) and merger.merges == {part: parts + 1}
    room = 1 << parts.bit_length()
    assert {each.of(part) for each in (merger.default_tiling(merging), *candidates(merger, merging))} == {room}
    found = merger.kernel("m", merging, groups, merger.default_tiling(merging))
    stored = sum(math.prod(map(merger.number, one.tensor.shape)) for one in kernel.partial)
    assert work(found, sized(merger, found)).read_bytes < 4 * stored * 2


@pytest.mark.parametrize("lengths", [DType.I32, DType.I64])
def test_tables_compile_for_lengths_of_any_type(lengths: DType) -> None:
    text = PROGRAMS["ragged"].text.replace("len: i32", f"len: {lengths.value}")
    launcher = Chosen(final(text), parts=3, even=True)
    inputs = Draw(PROGRAMS["ragged"], {**sizes_of(PROGRAMS["ragged"]), "B": 9000}).inputs(0)  # tiles of rows
    inputs["len"] = inputs["len"].to(torch.int64 if lengths is DType.I64 else torch.int32)
    plan = launcher.plan(inputs, {})
    assert plan is not None
    table = next(step for step in plan.steps if isinstance(step, KernelStep))
    (found,) = facts([request(table.kernel, table.source)], "sm_90")
    assert isinstance(found, StaticFacts), found


def test_the_tables_share_all_tiles_alike() -> None:
    uneven = Uneven("b", Read("start", (Rank("b"),)), Read("stop", (Rank("b"),)))
    shapes, types = {"start": ("B",), "stop": ("B",)}, {"start": DType.I32, "stop": DType.I32}
    shares = shares_of(uneven, "part", ())
    generator = torch.Generator().manual_seed(0)
    for rows, each, tile in ((1, 2, 16), (2, 3, 4), (5, 2, 16), (7, 5, 8), (40, 2, 1), (2, 1, 8), (30, 1, 4)):
        count = max((each + 1) * rows, rows + 2)
        index = tables_of(shares, each, tile, {"b": "B", "part": "PARTS"}, count, shapes, types)
        verify(index.cascade)
        start, length = (torch.randint(0, most, (rows,), generator=generator) for most in (50, 200))
        length = length * (torch.rand(rows, generator=generator) < 0.7)
        data = {"start": start.int(), "stop": (start + length).int()}
        found = {name: table.tolist() for name, table in run(index.cascade, data, index.sizes).items()}
        whose, begins, ends, before = (found[name] for name in shares.tables)
        ends_of = (start + length).tolist()
        tiles = [-(-end // tile) - first // tile for first, end in zip(start.tolist(), ends_of, strict=True)]
        longest = max(1, -(-sum(tiles) // (each * rows)))
        used = [part for part in range(count) if begins[part] < ends[part]]
        for row in range(rows):
            mine = range(before[row + 1], before[row + 2])
            assert all(whose[part] == row for part in mine)
            covered = [n for part in mine for n in range(begins[part], ends[part])]
            first = int(start[row]) // tile * tile
            assert covered == list(range(first, ends_of[row])), (row, covered)
            used = [part for part in used if part not in mine]
        assert not used
        assert all(ends[part] - begins[part] <= longest * tile for part in range(count))


def uneven_of(text: str, inputs: dict[str, Tensor]) -> Uneven | None:
    """What data says of the stream of a program's only group."""
    made = planner_for(final(text), inputs)
    return made.uneven(only_group(made))


def test_what_is_uneven() -> None:
    for name in UNEVEN:
        found = uneven_of(PROGRAMS[name].text, Draw(PROGRAMS[name], PROGRAMS[name].small).inputs(0))
        assert found is not None and (found.rank, found.first) == ("b", None)
    for name in ("full", "causal", "document", "paged", "cross"):
        assert uneven_of(PROGRAMS[name].text, Draw(PROGRAMS[name], PROGRAMS[name].small).inputs(0)) is None, name
    one = Draw(PROGRAMS["ragged"], {**PROGRAMS["ragged"].small, "B": 1}).inputs(0)
    assert uneven_of(PROGRAMS["ragged"].text, one) is None, "a row alone is shared evenly as it is"


# --- parts without anything ------------------------------------------------------------------------------------------

KEPT = attention("keep[b,n] > 0", params=", keep[B,N]", results=", L[B,H,M] fill -inf",
    more="\n    L[b,h,m] = R[b,h,m] + log(D[b,h,m])")  # fmt: skip


@pytest.mark.parametrize("live", [(), (0,), (49,), (20, 21), (0, 49)], ids=str)
def test_parts_that_are_masked_throughout(live: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 1, n, 8, generator=generator) for n in (9, 50, 50))
    keep = torch.zeros(2, 50)
    keep[0, list(live)] = 1.0
    dead = keep[:, None, :, None] == 0
    inputs = {"Q": q, "K": k.masked_fill(dead, torch.nan), "V": v.masked_fill(dead, torch.inf), "keep": keep}
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    by = standard(parse_cascade(KEPT), inputs, {})
    for parts in (3, 4):
        launcher = Chosen(final(KEPT), parts=parts)
        results = call_of(launcher)(**inputs)
        assert launcher.shared and judge_all(results, by).ok, f"{parts} parts: {judge_all(results, by)}"


@pytest.mark.parametrize("lengths", [(0, 0, 0), (0, 1, 50), (16, 17, 0), (32, 33, 48)], ids=str)
def test_lengths_that_leave_parts_empty(lengths: tuple[int, ...]) -> None:
    program = PROGRAMS["ragged"]
    draw = Draw(program, {**program.small, "N": 50}, device=DEVICE)
    length = {"len": torch.tensor(lengths, dtype=torch.int32, device=DEVICE)}
    for parts in (2, 7):
        call = call_of(Chosen(prepared("ragged"), parts=parts))
        for seed in range(DRAWS):
            inputs = draw.inputs(seed) | length
            verdict = judge_all(call(**inputs), standard(source("ragged"), inputs, {}))
            if not verdict.rounding:
                break
        assert verdict.ok, f"{parts} parts: {verdict}"


def test_more_parts_than_coordinates() -> None:
    program = PROGRAMS["full"]
    draw = Draw(program, {**program.small, "N": 3}, device=DEVICE)
    assert confirmed(call_of(Chosen(prepared("full"), parts=7)), source("full"), draw).ok


def test_parts_give_the_same_bits_again() -> None:
    program = PROGRAMS["causal"]
    inputs = Draw(program, {**program.small, "M": 50, "N": 50}, device=DEVICE).inputs(0)
    call = call_of(Chosen(prepared("causal"), parts=3))
    first = call(**inputs)
    assert all(same_bits(a, b) for a, b in zip(call(**inputs), first, strict=True))


# --- what merges -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["causal", "ragged", "with_entropy", "sink", "grouped_query", "gemm", "gated"])
def test_what_merges_is_a_cascade_with_the_same_meaning(name: str) -> None:
    program = PROGRAMS[name]
    draw = Draw(program, sizes_of(program), device=DEVICE)
    inputs, given = draw.inputs(0), draw.given()
    made = planner_for(prepared(name), inputs, given)
    group = only_group(made)
    stream = group.arrangement.stream
    assert stream is not None
    kernel, merger, _ = made.split(
        "split", group, made.groups(), with_stream(made.default_tiling(group), stream, 16, 3)
    )
    verify(merger.cascade)
    assert {item.tensor.name for item in kernel.partial} <= {param.name for param in merger.cascade.params}
    tensors: dict[str, Tensor] = dict(inputs)
    for item in kernel.partial:
        shape, dtype = place(item.tensor, merger)
        tensors[item.tensor.name] = torch.full(
            shape, torch.nan if dtype.is_floating_point else -77, dtype=dtype, device=DEVICE
        )
    launch(kernel, merger.extents, tensors)
    read = {param.name: tensors[param.name] for param in merger.cascade.params}
    symbols = {size for param in merger.cascade.params for size in param.shape if isinstance(size, str)}
    sizes = {name: extent for name, extent in merger.extents.items() if name in symbols}
    results = run(merger.cascade, read, sizes, Precision.COMPUTE)
    by = standard(source(name), inputs, given)
    for result, gold in by.gold.items():
        verdict = judge(results[result].to(by.eager[result].dtype), gold, by.eager[result])
        assert verdict.ok, f"{name} {result}: {verdict}"


# --- what cannot be shared -------------------------------------------------------------------------------------------


def shareable(text: str, **shapes: tuple[int, ...]) -> bool:
    """Whether the only group of a program, on tensors of these shapes, can be shared."""
    made = planner_for(final(text), {name: torch.zeros(shape) for name, shape in shapes.items()})
    group = only_group(made)
    return divisible(group, made.stored(group, made.groups()))


def test_without_a_stream_there_is_nothing_to_share() -> None:
    assert not shareable("cascade c(X[M,N]) -> Y[M] {\n Y[m] = sum[n] X[m,n]\n}", X=(5, 37))


def test_what_is_written_tile_by_tile_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "ROW_LIMIT", 32)
    one_trip = "cascade c(X[M,N]) -> Z[M,N], Y[M] {\n Z[m,n] = exp(X[m,n])\n Y[m] = sum[n] Z[m,n]\n}"
    assert not shareable(one_trip, X=(5, 37))
    assert shareable(one_trip.replace("Z[M,N], ", ""), X=(5, 37))


def test_what_takes_two_trips_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "ROW_LIMIT", 32)
    assert not shareable(PROGRAMS["softmax"].text, X=(5, 37))
    assert not shareable(PROGRAMS["rows_by_their_largest"].text, X=(5, 37))


def test_a_reducer_without_an_operation_is_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "ROW_LIMIT", 32)
    assert not shareable("cascade c(X[M,N]) -> I[M] {\n I[m] = argmax[n] X[m,n]\n}", X=(5, 37))


def test_a_total_has_no_program_to_share_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(partition, "ROW_LIMIT", 32)
    assert not shareable("cascade c(X[N]) -> Y[] {\n Y = sum[n] X[n]\n}", X=(37,))


def test_kernels_of_programs_that_are_not_shared_have_no_part() -> None:
    for name in ("softmax", "gemm", "causal"):
        draw = Draw(PROGRAMS[name], PROGRAMS[name].small)
        for kernel in all_kernels(planner_for(prepared(name), draw.inputs(0), draw.given())):
            assert not kernel.partial and all(axis.parts == 1 for axis in kernel.axes)


def test_no_program_that_can_be_shared_is_missing_here(streams: None) -> None:
    found = set()
    for name, program in PROGRAMS.items():
        draw = Draw(program, sizes_of(program))
        made = planner_for(prepared(name), draw.inputs(0), draw.given())
        groups = made.groups()
        if any(isinstance(g, partition.Group) and divisible(g, made.stored(g, groups)) for g in groups):
            found.add(name)
    assert found == {*FOLDED, *SUMMED, *STREAMED}


def test_a_tensor_may_be_called_as_the_parts_of_a_state_are() -> None:
    text = "cascade c(X[M,N], Z_part[M]) -> Z[M], W[M] { Z[m] = sum[n] X[m,n]; W[m] = Z_part[m] * 2 + Z[m] }"
    inputs = {"X": torch.randn(2, 40_000, device=DEVICE), "Z_part": torch.randn(2, device=DEVICE)}
    launcher = Chosen(final(text), tile=1024, parts=3)
    verdict = judge_all(call_of(launcher)(**inputs), standard(parse_cascade(text), inputs, {}))
    assert launcher.shared and verdict.ok, verdict
