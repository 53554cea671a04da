"""Tiles: the candidates, the model's order against measured times, choices by timing, and what is kept on disk."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from cascade.backends.triton import launch, tune
from cascade.backends.triton.explain import Launch, describe
from cascade.backends.triton.machine import Machine, machine
from cascade.backends.triton.offline import Failure, Request, StaticFacts
from cascade.backends.triton.partition import Group, Rest, power_of_two
from cascade.backends.triton.plan import Role
from cascade.backends.triton.planner import Layout, Planner, Tiling, contiguous
from cascade.backends.triton.tune import Choice, candidates, choose, planned, ranked
from cascade.compiled import from_text
from cascade.errors import UnsupportedError
from cascade.frontend.build import parse_cascade
from cascade.inference import bind_sizes
from cascade.ir import DType
from cascade.passes import memo
from cascade.pipeline import run_pipeline
from tests.timing import within

H100 = machine("h100")
ATTENTION = """cascade c(Q[B,H,M,E], K[B,H,N,E], V[B,H,N,F]) -> O[B,H,M,F] {{
    S[b,h,m,n] = Q[b,h,m,e] * K[b,h,n,e] / sqrt(E) {where}
    P[b,h,m,n] = softmax[n] S[b,h,m,n]
    O[b,h,m,f] = P[b,h,m,n] * V[b,h,n,f]
}}"""
FULL, CAUSAL = ATTENTION.format(where=""), ATTENTION.format(where="where n <= m")
GROUPED = """cascade c(Q[B,H,M,E], K[B,G,N,E], V[B,G,N,F]) -> O[B,H,M,F] {
    S[b,h,m,n] = Q[b,h,m,e] * K[b,h//4,n,e] / sqrt(E)
    P[b,h,m,n] = softmax[n] S[b,h,m,n]
    O[b,h,m,f] = P[b,h,m,n] * V[b,h//4,n,f]
}"""
PRODUCT = "cascade c(X[M,K], W[N,K]) -> Y[M,N] { Y[m,n] = X[m,k] * W[n,k] }"
TWO = """cascade c(X[M,K], W[N,K], U[N,K]) -> Y[M,N] {
    Y[m,n] = silu(sum[k] X[m,k] * W[n,k]) * (sum[k] X[m,k] * U[n,k])
}"""
ROWS = "cascade c(X[M,N]) -> Y[M,N] { Y[m,n] = softmax[n] X[m,n] }"
TURNED = "cascade c(X[M,N]) -> Y[N,M] { Y[n,m] = X[m,n] }"

Kind = tuple[str, dict[str, tuple[int, ...]]]


def attention(text: str, b: int, h: int, m: int, n: int, e: int) -> Kind:
    """Attention at these extents."""
    return text, {"Q": (b, h, m, e), "K": (b, h, n, e), "V": (b, h, n, e)}


KINDS: dict[str, Kind] = {
    "full": attention(FULL, 4, 32, 4096, 4096, 128),
    "causal": attention(CAUSAL, 4, 32, 4096, 4096, 128),
    "ragged": attention(CAUSAL, 1, 3, 1000, 1111, 80),
    "one": attention(FULL, 4, 32, 1, 8192, 128),
    "packed": (GROUPED, {"Q": (4, 32, 1, 128), "K": (4, 8, 8192, 128), "V": (4, 8, 8192, 128)}),
    "product": (PRODUCT, {"X": (8192, 4096), "W": (4096, 4096)}),
    "two products": (TWO, {"X": (8192, 4096), "W": (4096, 4096), "U": (4096, 4096)}),
    "small product": (PRODUCT, {"X": (16, 512), "W": (100, 512)}),
    "rows": (ROWS, {"X": (16384, 8192)}),
    "narrow rows": (ROWS, {"X": (65536, 100)}),
    "long rows": (ROWS, {"X": (64, 131072)}),
    "turned": (TURNED, {"X": (8192, 256)}),
}


def planner(kind: Kind) -> tuple[Planner, Group, Sequence[Group | Rest]]:
    """The planner of a call with contiguous bf16 tensors, and its only group."""
    text, shapes = kind
    cascade = run_pipeline(from_text(text, "<test>").cascade).final
    layouts = {name: Layout(shape, contiguous(shape), DType.BF16, True) for name, shape in shapes.items()}
    plans = Planner(cascade, bind_sizes(cascade, shapes, {}), layouts)
    (group,) = groups = plans.groups()
    assert isinstance(group, Group)
    return plans, group, groups


def label(tiling: Tiling, ranks: str) -> str:
    """A tiling in short: 128x64w4s2."""
    options = tiling.options
    return "x".join(str(tiling.of(rank)) for rank in ranks) + f"w{options.num_warps}s{options.num_stages}"


# --- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_candidates_fit_the_extents(name: str) -> None:
    plans, group, _ = planner(KINDS[name])
    found = candidates(plans, group)
    sides = plans.product_ranks(group)
    assert plans.default_tiling(group) in found and len(set(found)) == len(found) > 3
    for tiling in found:
        for rank, tile in tiling.tiles:
            least = 16 if rank in sides or rank in plans.packed(group) else 1
            assert tile & (tile - 1) == 0 and least <= tile <= max(least, power_of_two(plans.ranks[rank]), 16)
            if plans.roles(plans.arranged(group, tiling))[rank] is Role.WHOLE:
                assert tile >= plans.ranks[rank]


@pytest.mark.parametrize("name", ("full", "causal", "ragged"))
def test_edges_have_small_tiles_only_where_a_thread_has_no_registers_left(name: str) -> None:
    plans, group, _ = planner(KINDS[name])
    seen = set()
    for tiling in candidates(plans, group):
        results = tiling.of("m") * (tiling.of("n") + tiling.of("f")) / (32 * tiling.options.num_warps)
        small = results > 160 and tiling.of("n") > 32
        assert tiling.options.edge_tile == (32 if small else 0)
        seen.add(small)
    assert seen == {False, True}


def test_sums_of_all_products_fit_the_registers_of_a_thread() -> None:
    for name, count in (("product", 1), ("two products", 2)):
        plans, group, _ = planner(KINDS[name])
        each = [count * t.of("m") * t.of("n") / (32 * t.options.num_warps) for t in candidates(plans, group)]
        assert max(each) == 128.0  # the next would have 256, and a thread has 255


def test_packed_ranks_keep_the_tile_of_the_planner() -> None:
    plans, group, _ = planner(KINDS["packed"])
    base = plans.default_tiling(group)
    assert plans.packed(group) and {t.of(rank) for t in candidates(plans, group) for rank in plans.packed(group)} == {
        base.of(rank) for rank in plans.packed(group)
    }


@pytest.mark.parametrize("name", ["ragged", "one", "packed", "small product", "narrow rows", "turned"])
def test_every_candidate_has_a_plan(name: str) -> None:
    plans, group, groups = planner(KINDS[name])
    for tiling in candidates(plans, group):
        kernel, sizes = planned(plans, "c", group, groups, tiling)
        assert kernel.options == tiling.options and set(plans.extents) <= set(sizes)


# --- the model's order against an H100 -------------------------------------------------------------------------------

MEASURED = {  # milliseconds, Triton 3.6
    "full": (KINDS["full"], "mn", {
        "128x64w4s2": 2.058, "64x64w4s3": 2.200, "128x128w8s2": 2.324, "128x64w8s3": 2.328, "128x64w4s3": 2.331,
        "64x64w4s2": 2.452, "128x32w4s3": 2.482, "64x128w4s2": 2.818,
    }),
    "causal": (KINDS["causal"], "mn", {
        "128x64w4s2": 1.097, "64x64w4s3": 1.176, "128x64w8s3": 1.292, "128x64w4s3": 1.317, "128x128w8s2": 1.335,
        "64x64w4s2": 1.339, "128x32w4s3": 1.356, "64x128w4s2": 1.656,
    }),
    "causal of 64": (attention(CAUSAL, 4, 32, 4096, 4096, 64), "mn", {
        "64x128w4s2": 0.641, "128x64w4s3": 0.681, "64x64w4s3": 0.690, "64x64w4s2": 0.703, "128x64w8s3": 0.721,
        "128x64w4s2": 0.793, "128x32w4s3": 0.830, "128x128w8s2": 1.024,
    }),
    "product": (KINDS["product"], "mnk", {
        "128x256x64w8s3": 0.388, "256x128x64w8s3": 0.4215, "128x128x64w4s4": 0.525, "128x128x64w8s4": 0.530,
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", MEASURED)
def test_first_choice_is_within_five_percent_of_the_best(name: str) -> None:
    kind, ranks, times = MEASURED[name]
    plans, group, groups = planner(kind)
    order = ranked(plans, "c", group, groups, H100, candidates(plans, group))
    assert times[label(order[0][0], ranks)] <= 1.05 * min(times.values())
    for tiling, found in order:
        measured = times.get(label(tiling, ranks))
        assert measured is None or found.time_us / 1e3 == pytest.approx(measured, rel=0.5)


def test_many_tiles_are_gone_through_by_few_programs() -> None:
    plans, group, groups = planner(KINDS["product"])
    first = ranked(plans, "c", group, groups, H100, candidates(plans, group))[0][0]
    assert (first.options.resident, first.options.grouped) == (1, 16)  # tiles are twice as wide as high
    plans, group, groups = planner((PRODUCT, {"X": (1024, 4096), "W": (1024, 4096)}))  # at most 64 tiles of 128 x 128
    considered = candidates(plans, group)
    assert not any(tiling.options.resident for tiling in considered)
    first = ranked(plans, "c", group, groups, H100, considered)[0][0]
    assert (first.options.resident, first.options.pieces) == (0, 1)


def test_two_stages_are_too_few_for_a_short_round() -> None:
    plans, group, groups = planner(KINDS["product"])
    base = dict(plans.default_tiling(group).tiles) | {"m": 128, "n": 256, "k": 64}
    both = []
    for stages in (2, 3):
        options = dataclasses.replace(plans.default_tiling(group).options, num_warps=8, num_stages=stages)
        both.append(Tiling(tuple(base.items()), options))
    times = {
        tiling.options.num_stages: found.time_us for tiling, found in ranked(plans, "c", group, groups, H100, both)
    }
    assert times[2] / times[3] == pytest.approx(0.604 / 0.388, rel=0.1)


@pytest.mark.parametrize("name", KINDS)
def test_model_chooses_quickly(name: str) -> None:
    plans, group, groups = planner(KINDS[name])
    taken = []
    for _ in range(3):
        began = time.process_time()
        found = choose(plans, "c", group, groups, H100)
        taken.append(time.process_time() - began)
    assert within(min(taken), 0.1) and found.estimate.blocks_per_sm and "model" in found.how
    assert found == choose(plans, "c", group, groups, H100, deterministic=True, effort="full", timer=lambda t: 1.0)


def test_plans_that_differ_in_numbers_are_counted_as_they_are() -> None:
    plans, group, groups = planner(attention(CAUSAL, 8, 16, 1000, 1111, 80))
    for tiling, found in ranked(plans, "c", group, groups, H100, candidates(plans, group)):
        assert tiling.parts == 1
        kernel, sizes = planned(plans, "c", group, groups, tiling)
        assert tune.predict(H100, kernel, sizes) == found


# --- timing ----------------------------------------------------------------------------------------------------------


def stopwatch(times: dict[str, float | None], ranks: str = "mn") -> tuple[Callable[[Tiling], float | None], list[str]]:
    """A timer that gives these milliseconds, 9 for everything else, and what it was asked."""
    asked: list[str] = []

    def timer(tiling: Tiling) -> float | None:
        asked.append(label(tiling, ranks))
        return times.get(asked[-1], 9.0)

    return timer, asked


def test_fastest_is_kept(tmp_path: Path) -> None:
    plans, group, groups = planner(KINDS["causal"])
    timer, asked = stopwatch({"64x64w4s3": 1.0, "128x64w4s2": None})

    def found(effort: str = "quick", versions: tuple[str, ...] = ("3.6", "0.1")) -> Choice:
        return choose(plans, "c", group, groups, H100, effort, timer, tmp_path, versions)

    first = found()
    assert label(first.tiling, "mn") == "64x64w4s3" and "1 ms" in first.how and len(asked) == tune.QUICK
    assert found().tiling == first.tiling and "earlier run" in found().how and len(asked) == tune.QUICK
    assert len(list(tmp_path.iterdir())) == 1
    found(versions=("3.9", "0.1"))
    assert len(asked) == 2 * tune.QUICK and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("place", [0, 1])
def test_a_kept_choice_has_as_many_parts(place: int, tmp_path: Path) -> None:
    """Candidates that differ in nothing else: the one that was the fastest is found again."""
    plans, group, groups = planner(KINDS["packed"])
    alike: dict[Tiling, list[Tiling]] = {}
    for tiling in candidates(plans, group):
        alike.setdefault(dataclasses.replace(tiling, parts=1), []).append(tiling)
    fastest = next(tilings for tilings in alike.values() if len(tilings) > 1)[place]

    def found() -> Choice:
        return choose(
            plans, "c", group, groups, H100, "full", lambda tiling: 1.0 if tiling == fastest else 2.0, tmp_path
        )

    first, again = found(), found()
    assert first.tiling == again.tiling == fastest and "earlier run" in again.how


def test_damaged_entry_is_a_miss_and_a_warning(tmp_path: Path) -> None:
    plans, group, groups = planner(KINDS["causal"])
    timer, asked = stopwatch({})
    choose(plans, "c", group, groups, H100, "quick", timer, tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    for broken in ("", text[:-3], text.replace("[", "{"), "x" + text):
        path.write_text(broken)
        asked.clear()
        with pytest.warns(UserWarning, match="damaged"):
            choose(plans, "c", group, groups, H100, "quick", timer, tmp_path)
        assert len(asked) == tune.QUICK and path.read_text() == text


def test_entry_of_no_candidate_is_not_believed(tmp_path: Path) -> None:
    plans, group, groups = planner(KINDS["causal"])
    timer, asked = stopwatch({})
    choose(plans, "c", group, groups, H100, "quick", timer, tmp_path)
    (path,) = tmp_path.iterdir()
    memo.store(path, ((("m", 1 << 20),), (4, 2, 0, 0), 1, 0.1))
    asked.clear()
    choose(plans, "c", group, groups, H100, "quick", timer, tmp_path)
    assert len(asked) == tune.QUICK


def test_entry_is_for_calls_of_a_kind(tmp_path: Path) -> None:
    timer, asked = stopwatch({})

    def entries(kind: Kind) -> int:
        plans, group, groups = planner(kind)
        choose(plans, "c", group, groups, H100, "quick", timer, tmp_path)
        return len(list(tmp_path.iterdir()))

    assert entries(attention(CAUSAL, 4, 32, 4096, 4096, 128)) == 1
    assert entries(attention(CAUSAL, 4, 31, 4032, 3968, 128)) == 1  # the same powers of two
    assert entries(attention(CAUSAL, 4, 32, 8192, 4096, 128)) == 2
    assert entries(attention(CAUSAL, 4, 32, 4096, 4096, 64)) == 3
    assert entries(attention(CAUSAL, 4, 32, 4095, 4096, 128)) == 4  # ragged
    assert entries(attention(FULL, 4, 32, 4096, 4096, 128)) == 5


def test_full_effort_times_all_and_failures_do_not_win() -> None:
    plans, group, groups = planner(KINDS["causal"])
    timer, asked = stopwatch({})
    choose(plans, "c", group, groups, H100, "full", timer)
    assert len(asked) == len(ranked(plans, "c", group, groups, H100, candidates(plans, group)))
    none = choose(plans, "c", group, groups, H100, "quick", lambda tiling: None)
    assert "none of those timed ran" in none.how


def test_refused_tiles_are_not_chosen_again() -> None:
    plans, group, groups = planner(KINDS["causal"])
    first = choose(plans, "c", group, groups, H100)
    second = choose(plans, "c", group, groups, H100, refused={first.tiling})
    assert second.tiling == first.others[0].tiling


def test_without_a_device_what_spills_is_left_out() -> None:
    plans, group, groups = planner(KINDS["causal"])
    good = StaticFacts(128, 0, 65536, 2, 4, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 100, (), "3.6")

    def compiler(requests: Sequence[Request], arch: str) -> list[StaticFacts | Failure]:
        assert arch == "sm_90" and len(requests) == tune.QUICK
        bad: list[StaticFacts | Failure] = [
            dataclasses.replace(good, spills=8),
            dataclasses.replace(good, serialized=("C7511",)),
            Failure("no"),
        ]
        return [*bad, *([good] * (len(requests) - len(bad)))]

    order = ranked(plans, "c", group, groups, H100, candidates(plans, group))
    found = choose(plans, "c", group, groups, H100, "quick", compiler=compiler)
    assert found.tiling in {tiling for tiling, _ in order[3 : tune.QUICK]} and "compiled" in found.how


def test_where_all_that_were_compiled_spill_more_are() -> None:
    plans, group, groups = planner(KINDS["causal"])
    good = StaticFacts(128, 0, 65536, 2, 4, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 100, (), "3.6")
    asked: list[Request] = []

    def compiler(requests: Sequence[Request], arch: str) -> list[StaticFacts | Failure]:
        asked.extend(requests)
        return [dataclasses.replace(good, spills=8 * (len(asked) <= tune.QUICK)) for _ in requests]

    order = [tiling for tiling, _ in ranked(plans, "c", group, groups, H100, candidates(plans, group))]
    found = choose(plans, "c", group, groups, H100, "quick", compiler=compiler)
    assert tune.QUICK < len(order) <= 2 * tune.QUICK and len(asked) == len(set(asked)) == len(order)
    assert found.tiling in order[tune.QUICK :] and found.how == f"the model's first of {len(order)} that were compiled"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32, torch.int64])
def test_what_was_never_written_shows(dtype: torch.dtype) -> None:
    written = torch.ones(7, 5).to(dtype)
    assert launch.alike(written, written.clone())
    assert not launch.alike(launch.unset((7, 5), dtype, torch.device("cpu")), written)


def test_results_may_differ_by_rounding_only() -> None:
    wanted = torch.linspace(-3, 3, 1000)
    assert launch.alike(wanted * 1.001, wanted) and not launch.alike(wanted * 1.1, wanted)
    odd = wanted.clone()
    odd[3] = float("nan")
    assert not launch.alike(odd, wanted) and not launch.alike(wanted, odd) and launch.alike(odd, odd.clone())


ERRORS = [OutOfResources(300000, 232448, "shared memory"), RuntimeError("PassManager::run failed")]


class Absent(launch.Bench):
    """A device that is not there, on which every launch takes as long as any other."""

    @property
    def machine(self) -> Machine:
        return machine("h200")

    def measured(self, steps: Sequence[launch.Step], results: Sequence[str]) -> tuple[float, dict[str, torch.Tensor]]:
        for step in steps:
            self.advance(step)
        return 1.0, {name: self.tensors[name].zero_() for name in results}


@dataclasses.dataclass
class Compiler:
    """Stands for Triton: compiles no kernel but the one that it is asked for as the `room`-th; 0 for none, None for all."""

    error: Exception
    room: int | None
    asked: list[tuple[object, ...]] = dataclasses.field(default_factory=list)
    fits: tuple[object, ...] = ()
    ahead: list[tuple[object, ...]] = dataclasses.field(default_factory=list)  # before anything was launched

    def warmup(self, *arguments: object, grid: object, **options: int) -> None:
        assert not self.asked and not self.fits
        self.ahead.append((*(each for each in arguments if isinstance(each, int)), *options.items()))

    def __getitem__(self, grid: object) -> Callable[..., object]:
        def compile(*arguments: object, **options: int) -> object:
            one = (*(each for each in arguments if isinstance(each, int)), *options.items())
            if one != self.fits:
                self.asked.append(one)
                if self.room is not None and len(self.asked) != self.room:
                    raise self.error
                self.fits = one

        return compile


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception, int | None], Compiler]:
    """Has kernels compiled by a `Compiler` for a device that is not there."""

    def replace(error: Exception, room: int | None) -> Compiler:
        found = Compiler(error, room)
        monkeypatch.setattr(launch, "interpreted", lambda: False)
        monkeypatch.setattr(launch, "Bench", Absent)
        monkeypatch.setattr(launch, "module", lambda text, kernel: SimpleNamespace(**{kernel: found}))
        monkeypatch.setattr(launch, "relaunch", lambda *_: lambda tensors, stream: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, raising=False)
        return found

    return replace


@pytest.mark.parametrize("effort", ["none", "quick"])
@pytest.mark.parametrize("error", ERRORS)
def test_kernel_that_cannot_be_launched_gets_the_next_tiles(
    error: Exception, effort: str, compiler: Callable[[Exception, int | None], Compiler]
) -> None:
    """Also where it is to be launched for what is planned next, and with nothing compiled again that has failed."""
    launcher = launch.Launcher(run_pipeline(parse_cascade(PRODUCT), check=0).final, effort)
    room = tune.QUICK + 3
    asked = compiler(error, room).asked
    found = launcher({"X": torch.zeros(256, 128), "W": torch.zeros(192, 128)}, {})
    assert found is not None and found[0].shape == (256, 192)
    assert len(set(asked)) == len(asked) >= room


TWO = """cascade c(X[M,K], W[M,K], V[K,M]) -> Z[M,K] {
    Y[m,n] = silu(sum[k] X[m,k] * W[n,k])
    Z[m,l] = Y[n,m] * V[l,n]
}"""


@pytest.mark.parametrize(("effort", "times"), [("none", 1), ("quick", tune.QUICK)])
def test_what_will_be_launched_is_compiled_before_anything_is(
    effort: str, times: int, compiler: Callable[[Exception, int | None], Compiler]
) -> None:
    """Of every kernel, though one reads what another makes; once there is a choice, nothing more is."""
    own = TWO.replace("cascade c", "cascade ahead")  # no other test has its choices on disk
    launcher = launch.Launcher(run_pipeline(parse_cascade(own), check=0).final, effort)
    found = compiler(RuntimeError(), None)
    inputs = {"X": torch.zeros(256, 128), "W": torch.zeros(256, 128), "V": torch.zeros(128, 256)}
    launcher(inputs, {})
    assert {*found.asked} <= {*found.ahead} and len(found.ahead) >= 2 * times
    before = len(found.ahead)
    found.asked.clear()
    found.fits = ()
    launcher(inputs, {})
    assert len(found.ahead) == before


@pytest.mark.parametrize("effort", ["none", "quick"])
@pytest.mark.parametrize("seconds", [0.0, 0.2])
def test_what_is_compiled_for_long_is_said(
    effort: str,
    seconds: float,
    compiler: Callable[[Exception, int | None], Compiler],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compiler(RuntimeError(), None)
    monkeypatch.setattr(launch, "SILENT", 0.1)
    monkeypatch.setattr(launch, "compile_beside", lambda wanted: time.sleep(seconds))
    launcher = launch.Launcher(run_pipeline(parse_cascade(TWO), check=0).final, effort)
    launcher({"X": torch.zeros(256, 128), "W": torch.zeros(256, 128), "V": torch.zeros(128, 256)}, {})
    said = re.findall(r"cascade: compiling \d+ kernels\n", capsys.readouterr().err)
    assert len(said) == (effort == "quick" and seconds > 0.1)


@pytest.mark.parametrize("effort", ["none", "quick"])
@pytest.mark.parametrize("error", ERRORS)
def test_kernel_that_no_tiles_can_be_launched_of_is_one_error(
    error: Exception, effort: str, compiler: Callable[[Exception, int | None], Compiler]
) -> None:
    launcher = launch.Launcher(run_pipeline(parse_cascade(PRODUCT), check=0).final, effort)
    asked = compiler(error, 0).asked
    with pytest.raises(UnsupportedError) as caught:
        launcher({"X": torch.zeros(256, 128), "W": torch.zeros(192, 128)}, {})
    (told,) = caught.value.diagnostics
    assert told.code == "C532" and told.message.startswith("kernel c cannot be launched with any of ")
    assert str(error) in told.message and told.help is not None
    assert 'backend="interp"' in told.help and "-> O: bf16[...]" in told.help
    assert caught.value.__suppress_context__ and len(set(asked)) > tune.QUICK and len(asked) <= len(set(asked)) + 1


def test_error_of_another_kind_is_as_it_was(compiler: Callable[[Exception, int | None], Compiler]) -> None:
    asked = compiler(RuntimeError("an illegal memory access was encountered"), 0).asked
    launcher = launch.Launcher(run_pipeline(parse_cascade(PRODUCT), check=0).final)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        launcher({"X": torch.zeros(256, 128), "W": torch.zeros(192, 128)}, {})
    assert len(asked) == 1


# --- in words --------------------------------------------------------------------------------------------------------


def test_explanation_names_the_plan_and_the_next_best() -> None:
    plans, group, groups = planner(KINDS["causal"])
    choice = choose(plans, "c", group, groups, H100)
    kernel, sizes = planned(plans, "c", group, groups, choice.tiling)
    text = describe(Launch(kernel, sizes, choice), Rest((), "it calls another cascade"))
    assert "kernel c: 1 of 2" in text and "4096 programs of 128 m x 64 n" in text and "4 warps, 2 stages" in text
    assert choice.estimate.text() in text and "next: " in text and "registers a thread" in text
    assert "no kernel, it calls another cascade: 2 of 2" in text
    head, row, rest = text.splitlines()[:3]
    assert head.split() == ["step", "reads", "writes", "operations", "predicted", "measured", "of", "the", "bound"]
    size = 4 * 32 * 4096 * 128 * 2  # bytes of a tensor
    assert row.startswith("c ") and f"{3 * size / 1e6:.3g} MB" in row and f"{size / 1e6:.3g} MB" in row
    assert f"{choice.estimate.time_us:.1f} us" in row and f"% of {choice.estimate.bound}" in row
    assert rest.startswith("no kernel: it calls another cascade")


def test_explanation_has_the_time_that_was_measured(tmp_path: Path) -> None:
    plans, group, groups = planner(KINDS["causal"])
    for _ in ("timed", "kept"):
        choice = choose(plans, "c", group, groups, H100, effort="quick", timer=lambda tiling: 1.5, cache=tmp_path)
        kernel, sizes = planned(plans, "c", group, groups, choice.tiling)
        row = describe(Launch(kernel, sizes, choice), Launch(kernel, sizes, choice)).splitlines()[1:4]
        bound = dict(choice.estimate.parts)[choice.estimate.bound]
        assert "1500.0 us" in row[0] and row[0].endswith(f"{bound / 15:.0f}% of {choice.estimate.bound}")
        assert "3000.0 us" in row[2] and row[2].startswith("all ")
