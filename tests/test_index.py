"""Bounds from an index of the data, against every pair of coordinates: nothing live is missed, whole tiles are whole."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from cascade.backends.triton import planner
from cascade.bounds import conjuncts
from cascade.backends.triton.index import Index, index_of
from cascade.backends.triton.launch import KernelStep
from cascade.backends.triton.plan import Keep, Kernel, Load, Loop, Mask, Seen
from cascade.frontend.build import parse_cascade
from cascade.inference import infer_dtypes, infer_shapes
from cascade.interp import Precision, run
from cascade.ir import Cascade, DType, Einsum, Expr
from cascade.verify import verify
from tests.kernel_programs import PROGRAMS, Program, Tensors, attention
from tests.planned import Chosen, call_of, final, planner_for
from tests.tolerance import Draw, judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DECLARED = (
    "X[B,M,N], doc: i64[B,N], group: i64[B,M], start: i32[B,M], key: i32[B], pair: i64[M,N], weight[B,N], step: i8[N], "
    "keep: bool[B,N], see: bool[M,N]"
)
TYPES = {
    "X": DType.F32, "doc": DType.I64, "group": DType.I64, "start": DType.I32, "key": DType.I32, "pair": DType.I64,
    "weight": DType.F32, "step": DType.I8, "keep": DType.BOOL, "see": DType.BOOL,
}  # fmt: skip
SYMBOLS = {"b": "B", "m": "M", "n": "N"}
COMPARED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip


def program(where: str) -> Cascade:
    """A reduction with a filter."""
    return parse_cascade(f"cascade c({DECLARED}) -> Z[B,M] {{\n Z[b,m] = sum[n] X[b,m,n] where {where}\n}}")


def indexed(where: str, numbers: dict[str, int], tiles: dict[str, int]) -> tuple[Index | None, tuple[Expr, ...]]:
    """The index for a filter, n being streamed and m tiled, and the tests of the filter."""
    cascade = program(where)
    stmt = cascade.body[0]
    assert isinstance(stmt, Einsum)
    tests = tuple(conjuncts(stmt.where))
    shapes = dict(infer_shapes(cascade).tensors)
    extents = {rank: numbers[symbol] for rank, symbol in SYMBOLS.items()}
    return index_of(tests, "n", ["m"], tiles, SYMBOLS, extents, shapes, infer_dtypes(cascade, TYPES)), tests


def documents(extent: int, batch: int, seed: int, kind: str) -> Tensor:
    """Integers along a rank: in steps of one, sorted with gaps, falling, or in no order."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "steps":
        return (torch.rand(batch, extent, generator=generator) < 0.2).long().cumsum(1)
    values = torch.randint(-4, 12, (batch, extent), generator=generator)
    if kind == "none":
        return values
    return values.sort(1, descending=kind == "falling").values


def tiles_of(live: Tensor, tile_m: int, tile_n: int) -> tuple[Tensor, Tensor]:
    """For every tile of m and of n whether any pair of coordinates is live, and whether all are: [B, M tiles, N tiles]."""
    some = [[part.flatten(1) for part in rows.split(tile_n, 2)] for rows in live.split(tile_m, 1)]
    any_ = torch.stack([torch.stack([part.any(1) for part in row], 1) for row in some], 1)
    all_ = torch.stack([torch.stack([part.all(1) for part in row], 1) for row in some], 1)
    return any_, all_


def check(
    where: str, live: Tensor, data: Tensors, tiles: dict[str, int], tight: bool = False, over_rows: bool = True
) -> None:
    """The bounds of a single test over these data hold for the pairs that are live, [B,M,N]."""
    numbers = dict(zip("BMN", live.shape, strict=True))
    index, tests = indexed(where, numbers, tiles)
    assert index is not None and set(index.entries) == set(tests) and len(tests) == 1
    verify(index.cascade)
    entry = index.entries[tests[0]]
    read = {param.name: data[param.name] for param in index.cascade.params}
    bound = {size for param in index.cascade.params for size in param.shape}
    extra = {s for result in index.cascade.results for s in result.shape if isinstance(s, str)} - bound
    found = run(index.cascade, read, {**index.sizes, **{s: numbers[s] for s in extra if s in numbers}})
    any_, all_ = tiles_of(live, tiles["m"] if over_rows else live.shape[1], tiles["n"])
    place = torch.arange(any_.shape[2])
    first, stop, whole, until = (
        found[name].reshape(*any_.shape[:2], 1)
        for name in (entry.first, entry.stop, entry.whole_first, entry.whole_stop)
    )
    visited, sure = (place >= first) & (place < stop), (place >= whole) & (place < until)
    assert not (any_ & ~visited).any(), f"{where}: a live pair is not visited"
    assert not (sure & ~all_).any(), f"{where}: a tile that is called whole is not"
    if tight:
        ends = any_.any(2, keepdim=True)
        assert torch.equal(torch.where(ends, first, 0), torch.where(ends, any_.int().argmax(2, keepdim=True), 0))
        assert int(visited.sum()) == sum(
            int(row.nonzero().max() - row.nonzero().min()) + 1 for row in any_.flatten(0, 1) if row.any()
        )


# --- every comparison, every order of the data -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["steps", "sorted", "falling", "none"])
@pytest.mark.parametrize("sign", COMPARED)
def test_every_comparison_of_two_reads(sign: str, kind: str) -> None:
    for seed in range(6):
        for m, n in ((12, 16), (13, 17), (1, 1), (5, 30)):
            doc, group = documents(n, 2, seed, kind), documents(m, 2, seed + (m != n), kind)
            for tile_m, tile_n in ((4, 4), (8, 2), (2, 16)):
                tiles, data = {"m": tile_m, "n": tile_n}, {"doc": doc, "group": group}
                live = COMPARED[sign](doc[:, None, :], group[:, :, None])
                check(f"doc[b,n] {sign} group[b,m]", live, data, tiles, tight=sign == "==" and kind == "steps")
                live = COMPARED[sign](group[:, :, None], doc[:, None, :])
                check(f"group[b,m] {sign} doc[b,n]", live, data, tiles)


@pytest.mark.parametrize("sign", COMPARED)
def test_comparisons_with_what_is_no_tile(sign: str) -> None:
    for seed in range(4):
        doc, key = documents(19, 3, seed, "sorted" if seed % 2 else "none"), torch.tensor([0, 5, 40], dtype=torch.int32)
        tiles, compared = {"m": 4, "n": 4}, COMPARED[sign]
        live = compared(doc, key[:, None].long())[:, None, :].expand(3, 7, 19)
        check(f"doc[b,n] {sign} key[b]", live, {"doc": doc, "key": key}, tiles, over_rows=False, tight=False)
        live = compared(doc, torch.tensor(3))[:, None, :].expand(3, 7, 19)
        check(f"doc[b,n] {sign} 3", live, {"doc": doc}, tiles, over_rows=False)


def test_comparisons_of_what_is_computed() -> None:
    for seed in range(6):
        doc, group = documents(17, 2, seed, "none"), documents(13, 2, seed + 1, "sorted")
        start = group.int()
        m, n = torch.arange(13)[None, :, None], torch.arange(17)[None, None, :]
        d, g, tiles = doc[:, None, :], group[:, :, None], {"m": 4, "n": 8}
        data = {"doc": doc, "group": group, "start": start}
        check("doc[b,n] + 1 == 2 * group[b,m]", d + 1 == 2 * g, data, tiles)
        check("doc[b,n] * n <= group[b,m] - m", d * n <= g - m, data, tiles)
        check("doc[b,n] % 3 == group[b,m] % 3", d % 3 == g % 3, data, tiles)
        check("start[b,m] <= n", g <= n.expand(2, 1, 17), data, tiles)
        check("max(doc[b,n], 2) != min(group[b,m], 5)", d.clamp(min=2) != g.clamp(max=5), data, tiles)


def test_large_integers_keep_apart() -> None:
    doc = 2**40 + torch.arange(16)[None] // 3
    group = 2**40 + torch.arange(12)[None] // 2
    check(
        "doc[b,n] == group[b,m]", doc[:, None, :] == group[:, :, None], {"doc": doc, "group": group}, {"m": 4, "n": 4}
    )


def test_small_integers() -> None:
    step = (torch.arange(300) % 256 - 128).to(torch.int8)
    start = torch.randint(-130, 130, (2, 9), generator=torch.Generator().manual_seed(0)).int()
    live = step.int()[None, None] > start[:, :, None]
    check("step[n] > start[b,m]", live, {"step": step, "start": start}, {"m": 4, "n": 16})


@pytest.mark.parametrize("kind", ["front", "back", "both", "holes", "all", "none"])
def test_truths(kind: str) -> None:
    place = torch.arange(37)[None]
    first, last = torch.tensor([[0], [9], [20]]), torch.tensor([[37], [30], [21]])
    keep = {
        "front": place >= first,
        "back": place < last,
        "both": (place >= first) & (place < last),
        "holes": (place >= first) & (place % 7 != 3),
        "all": place.expand(3, 37) >= 0,
        "none": place.expand(3, 37) < 0,
    }[kind]
    for where, live in (("keep[b,n]", keep), ("not keep[b,n]", ~keep)):
        for tile in (1, 4, 16, 64):
            tiles, every = {"m": 4, "n": tile}, live[:, None, :].expand(3, 7, 37)
            check(where, every, {"keep": keep}, tiles, tight=True, over_rows=False)


def test_what_has_no_index() -> None:
    numbers, tiles = {"B": 2, "M": 9, "N": 17}, {"m": 4, "n": 4}
    for where in (
        "weight[b,n] > 0",  # no integers
        "doc[b,n] == n",  # the stream on both sides
        "doc[b,n] == pair[m,n]",
        "pair[m,n] > 0",  # the stream and the rows in one read
        "doc[b,n//2] == group[b,m]",  # a computed index
        "doc[b,n] == group[b,m] or doc[b,n] == 0",
        "n <= m",
        "see[m,n]",
        "keep[b,n//2]",
        "keep[b,n] or n <= m",
    ):
        assert indexed(where, numbers, tiles)[0] is None, where
    index, tests = indexed("doc[b,n] == group[b,m] and weight[b,n] > 0 and n <= m", numbers, tiles)
    assert index is not None and set(index.entries) == {tests[0]}


def test_two_tests_have_names_of_their_own() -> None:
    numbers, tiles = {"B": 2, "M": 9, "N": 17}, {"m": 4, "n": 4}
    index, tests = indexed("doc[b,n] == group[b,m] and doc[b,n] >= start[b,m]", numbers, tiles)
    assert index is not None and set(index.entries) == set(tests)
    names = [result.name for result in index.cascade.results]
    assert len(set(names)) == len(names) == 8
    verify(index.cascade)


# --- compiled --------------------------------------------------------------------------------------------------------

DOCUMENT = PROGRAMS["document"]
CAUSAL = DOCUMENT.text.replace("doc[b,m] == doc[b,n]", "doc[b,m] == doc[b,n] and n <= m")
LEVELS = DOCUMENT.text.replace("doc[b,m] == doc[b,n]", "doc[b,n] <= doc[b,m]")
TWO = attention("doc[b,n] == group[b,m] and n < len[b]", params=", doc: i64[B,N], group: i64[B,M], len: i32[B]")
LENGTHS = (1, 15, 17, 64, 65, 130)


@functools.cache
def prepared(text: str) -> tuple[Cascade, Cascade]:
    """A program as written, and as the backend gets it."""
    return parse_cascade(text), final(text)


def attend(text: str, inputs: Tensors, tile: int = 64, parts: int = 1) -> None:
    """A program with an index passes."""
    written, made = prepared(text)
    inputs = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    verdict = judge_all(call_of(Chosen(made, tile=tile, parts=parts))(**inputs), standard(written, inputs, {}))
    assert verdict.ok, f"{[tuple(t.shape) for t in inputs.values()]}: {verdict}"


def drawn(program: Program, length: int) -> Tensors:
    """The inputs of one length."""
    return Draw(program, {**program.small, "H": 1, "M": length}).inputs(length)


@pytest.mark.parametrize("text", [DOCUMENT.text, CAUSAL, LEVELS], ids=["document", "causal", "levels"])
@pytest.mark.parametrize("kind", ["steps", "none"])
def test_compiled_lengths(text: str, kind: str) -> None:
    for length in LENGTHS:
        inputs = drawn(DOCUMENT, length) | {"doc": documents(length, 2, length, kind)}
        attend(text, inputs, tile=16)


@pytest.mark.parametrize("parts", [1, 3])
def test_lengths_that_change_from_call_to_call(parts: int) -> None:
    written, made = prepared(DOCUMENT.text)
    call = call_of(Chosen(made, tile=16, parts=parts))
    for length in LENGTHS:
        inputs = {name: tensor.to(DEVICE) for name, tensor in drawn(DOCUMENT, length).items()}
        verdict = judge_all(call(**inputs), standard(written, inputs, {}))
        assert verdict.ok, f"{length}: {verdict}"


@pytest.mark.parametrize("kind", ["steps", "none"])
def test_an_index_of_a_stream_that_is_shared(kind: str) -> None:
    attend(CAUSAL, drawn(DOCUMENT, 70) | {"doc": documents(70, 2, 0, kind)}, tile=16, parts=3)


@pytest.mark.parametrize("kind", ["steps", "sorted", "none"])
def test_rows_without_a_partner(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(3, 1, n, 8, generator=generator) for n in (37, 70, 70))
    doc, group = documents(70, 3, 0, kind), documents(37, 3, 1, kind) + 3
    group[1] = 1000
    lengths = torch.tensor([70, 70, 0], dtype=torch.int32)
    attend(TWO, {"Q": q, "K": k, "V": v, "doc": doc, "group": group, "len": lengths}, tile=16)


def test_the_bounds_are_in_the_plan() -> None:
    made = planner_for(prepared(CAUSAL)[1], drawn(DOCUMENT, 130))
    (group,) = made.groups()
    kernel = made.kernel("c", group, made.groups(), made.default_tiling(group))  # type: ignore[arg-type]
    assert kernel.index is not None
    results = {result.name for result in kernel.index.cascade.results}
    assert results <= {tensor.name for tensor in kernel.tensors}
    assert (
        set(run(kernel.index.cascade, {"doc": documents(130, 2, 0, "steps")}, kernel.index.sizes, Precision.COMPUTE))
        == results
    )


PADDED, MASKED = PROGRAMS["padded"], PROGRAMS["masked"]


@pytest.fixture(params=[1, 1 << 40], ids=["indexed", "tested"])
def truths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether products as small as those here have an index of truths."""
    monkeypatch.setattr(planner, "TRUTHS", request.param)
    return bool(request.param == 1)


@pytest.mark.parametrize("parts", [1, 3])
def test_keys_that_are_padding(parts: int, truths: bool) -> None:
    """In front, behind, with holes, in all of a batch, nowhere: lengths of several tiles."""
    for length in LENGTHS:
        inputs = Draw(PADDED, {**PADDED.small, "H": 1, "M": length, "N": length}).inputs(length)
        place = torch.arange(length)[None]
        first, last = torch.tensor([[length // 3], [0], [length]]), torch.tensor([[length], [length // 2], [length]])
        for keep in ((place >= first) & (place < last), inputs["keep"], torch.ones_like(inputs["keep"])):
            spoilt = {name: inputs[name].masked_fill(~keep[:, None, :, None], math.nan) for name in "KV"}
            attend(PADDED.text, {**inputs, **spoilt, "keep": keep}, tile=16, parts=parts)


def kernel_of(program: Program, length: int) -> Kernel:
    """The kernel of a program, with the planner's own tiles."""
    sizes = {**program.small, "M": length, "N": length, "E": 16, "F": 16}
    made = planner_for(prepared(program.text)[1], Draw(program, sizes).inputs(0))
    (group,) = made.groups()
    return made.kernel("c", group, made.groups(), made.default_tiling(group))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("batches", "length", "indexed"),
    [(16, 128, False), (1, 512, False), (16, 256, True), (8, 512, True), (1, 1024, True)],
)
def test_an_index_is_for_products_that_take_longer_than_its_launch(batches: int, length: int, indexed: bool) -> None:
    """On an H200 those that have one here were faster with it, and the others without, half of the keys padding."""
    inputs = {name: torch.empty(batches, 16, length, 64, device="meta") for name in "QKV"}
    made = planner_for(prepared(PADDED.text)[1], inputs | {"keep": torch.empty(batches, length, dtype=torch.bool)})
    (group,) = made.groups()
    kernel = made.kernel("c", group, made.groups(), made.default_tiling(group))  # type: ignore[arg-type]
    assert (kernel.index is not None) == indexed


def test_where_no_key_is_padding_nothing_is_tested(truths: bool) -> None:
    """Without an index, keys that are padding are tested for everywhere, and the diagonal at the edges."""
    kernel = kernel_of(PADDED, 130)
    loop, behind = (op for op in kernel.ops if isinstance(op, Loop))
    (mask,) = (op for op in loop.body if isinstance(op, Mask))
    assert (kernel.index is not None) == truths and loop.inner is not None
    assert (len(mask.live), len(mask.edge)) == ((0, 3) if truths else (1, 2))
    assert {op.tensor: (bool(op.live), bool(op.edge)) for op in loop.body if isinstance(op, Load)} == {
        "Q": (False, False), "K": (False, False), "keep": (False, True), "V": (not truths, True)
    }  # fmt: skip
    assert behind.unless == "seen" and not any(isinstance(op, Seen) for op in loop.body)


def test_what_data_says_of_each_pair_is_tested_everywhere() -> None:
    """It takes the test of the end of the stream with it: one loop, and one choice for each element."""
    loop, behind = (op for op in kernel_of(MASKED, 130).ops if isinstance(op, Loop))
    (mask,) = (op for op in loop.body if isinstance(op, Mask))
    assert loop.inner is None and len(mask.live) == len(mask.edge) == 1 and behind.unless == "seen"
    assert len([op for op in loop.body if isinstance(op, Keep)]) == 1


def test_tests_that_differ_by_row_are_left_out_of_whole_tiles_beside_what_data_says() -> None:
    """Truths that no index knows of, being at computed places, stand in all tiles; those of the diagonal do not."""
    text = PADDED.text.replace("keep[b,n]", "keep[b,n//2]").replace("bool[B,N]", "bool[B,C]")
    inputs = Draw(PADDED, {**PADDED.small, "M": 130, "N": 130}).inputs(0)
    inputs["keep"] = inputs["keep"][:, ::2].contiguous()
    made = planner_for(prepared(text)[1], inputs)
    (group,) = made.groups()
    kernel = made.kernel("c", group, made.groups(), made.default_tiling(group))  # type: ignore[arg-type]
    loop, _ = (op for op in kernel.ops if isinstance(op, Loop))
    (mask,) = (op for op in loop.body if isinstance(op, Mask))
    assert loop.inner is not None and len(mask.live) == 1 and len(mask.edge) == 2
    attend(text, inputs, tile=16)


# --- one kernel ------------------------------------------------------------------------------------------------------

GROUPS = attention("doc[b,n] == group[b,m] and kind[n] <= level[b,h,m] and n <= m + 3",
                   params=", doc: i64[B,N], group: i64[B,M], kind: i32[N], level: i64[B,H,M]")  # fmt: skip
COUNTED = (
    DOCUMENT.text.replace("doc: i64", "start: i64")
    .replace("    S[", "    doc[b,n] = sum[k] select(k <= n, start[b,k], 0)\n    S[", 1)
)  # fmt: skip


def steps_of(text: str, inputs: Tensors) -> list[str]:
    """The kernels of a call, in order."""
    chosen = Chosen(prepared(text)[1], tile=16)
    plan = chosen.plan({name: tensor.to(DEVICE) for name, tensor in inputs.items()}, {})
    assert plan is not None
    assert all(isinstance(step, KernelStep) for step in plan.steps)
    return [step.kernel.name for step in plan.steps if isinstance(step, KernelStep)]


def leveled(length: int) -> Tensors:
    """Inputs of a program with two tests on data, of different ranks."""
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(2, 3, length, 8, generator=generator) for _ in range(3))
    kind = torch.randint(0, 4, (length,), generator=generator).int().sort().values
    level = torch.randint(0, 4, (2, 3, length), generator=generator)
    doc, group = documents(length, 2, length, "steps"), documents(length, 2, length, "steps")
    return {"Q": q, "K": k, "V": v, "doc": doc, "group": group, "kind": kind, "level": level}


@pytest.mark.parametrize("length", [17, 70])
@pytest.mark.parametrize("text", [DOCUMENT.text, CAUSAL, LEVELS], ids=["document", "causal", "levels"])
def test_documents_take_one_kernel_before(text: str, length: int) -> None:
    assert steps_of(text, drawn(DOCUMENT, length)) == ["attention_bounds", "attention"]


@pytest.mark.parametrize("length", [17, 70])
def test_two_tests_of_different_ranks_take_one_kernel_before(length: int) -> None:
    inputs = leveled(length)
    assert steps_of(GROUPS, inputs) == ["attention_bounds", "attention"]
    attend(GROUPS, inputs, tile=16)


def test_data_that_a_kernel_before_makes() -> None:
    for length in (17, 70):
        inputs = {name: tensor for name, tensor in drawn(DOCUMENT, length).items() if name != "doc"}
        start = torch.rand(2, length, generator=torch.Generator().manual_seed(length)) < 0.1
        names = steps_of(COUNTED, inputs | {"start": start.long()})
        assert names == ["attention_0", "attention_1_bounds", "attention_1"]
        attend(COUNTED, inputs | {"start": start.long()}, tile=16)
