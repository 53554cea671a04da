"""Layers over several devices: the examples on simulated ranks and under torchrun, and the published systems, each of
which is an example or a program here that means what its cascade means and can be planned."""

from __future__ import annotations

import dataclasses
import importlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from cascade import pipeline
from cascade.backends.distributed.kernels import IN, OUT, SMS
from cascade.backends.distributed.machine import node
from cascade.backends.distributed.plan import Plan, plan, plan_of
from cascade.backends.distributed.simulate import simulate
from cascade.errors import VerifyError
from cascade.frontend.build import parse_cascade, parse_program
from cascade.interp import Precision, run
from cascade.ir import Cascade, DType, Mesh, Shard, Split
from cascade.passes.exchanges import another_form, by_rows, by_shards, refactor_axis, scatter_gather
from cascade.passes.reach import Reach
from cascade.passes.schedule_overlap import list_schedule
from cascade.passes.shard import stated
from cascade.passes.split_tokens import split
from cascade.placed import Along, Axis, Collective, Compute, Kind, Program, Step
from cascade.timetable import Mode, Problem, Task
from cascade.trial import param_types, random_inputs
from tests.test_shard import agrees, canonical, collectives, first, lifted
from tests.test_split_tokens import changed, of_kind, right, swapped

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "many-devices.md"
many = importlib.import_module("examples.10_many_devices")
LLAMA = {"D": 8192, "H": 64, "E": 128, "F": 28672}


def kinds(program: Program) -> list[str]:
    return [kind for kind, _ in collectives(program)]


# --- the examples ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("devices", [2, 4, 8])
@pytest.mark.parametrize("name", many.PROGRAMS)
def test_an_example_gives_on_simulated_ranks_what_it_means(name: str, devices: int) -> None:
    program = many.PROGRAMS[name](devices)
    assert many.difference(program, lambda given: simulate(program, given)) <= 1e-12
    assert collectives(program)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_examples_run_under_torchrun(processes: int) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run([*torchrun, "-m", "examples.10_many_devices"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count(f" {processes} devices") == len(many.PROGRAMS)


def test_what_is_dispatched_and_combined_is_a_mixture_of_experts() -> None:
    """The same result without slots and devices; a buffer with too few slots is an error, not a token less."""
    cascade = many.cascade_of("expert_parallel", 2)
    plain = parse_program("""
    cascade plain(X[B,P,T,D], g[D], Wr[N,D], W1[N,F,D], W2[N,D,F]) -> Y[B,P,T,D] {
        M[b,p,t,d] = rmsnorm[d](X[b,p,t,d], g[d])
        G[b,p,t,j], I[b,p,t,j] = topk[n, 2] softmax[n] (sum[d] M[b,p,t,d] * Wr[n,d])
        H[b,p,t,j,f] = silu(sum[d] M[b,p,t,d] * W1[I[b,p,t,j],f,d])
        Y[b,p,t,d] = X[b,p,t,d] + sum[j] G[b,p,t,j] / (sum[j] G[b,p,t,j]) * (sum[f] H[b,p,t,j,f] * W2[I[b,p,t,j],d,f])
    }""")[-1]
    sizes = {"B": 2, "P": 2, "T": 6, "D": 3, "N": 4, "F": 4}
    inputs = random_inputs(plain, sizes, param_types(plain, DType.F64), 0)
    wanted = run(plain, inputs, sizes, Precision.REFERENCE)["Y"]
    found = run(cascade, inputs, {**sizes, "C": 6}, Precision.REFERENCE)["Y"]
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    with pytest.raises(Exception, match="C311"):
        run(cascade, inputs, {**sizes, "C": 1}, Precision.REFERENCE)


def test_one_batch_computes_while_the_other_is_dispatched() -> None:
    sizes = {"B": 2, "P": 8, "T": 4096, "D": 7168, "N": 64, "F": 2048, "C": 256}
    found = plan(many.cascade_of("expert_parallel", 8), sizes, node("h100x8"))
    slots = {task.name: slot for task, slot in zip(found.problem.tasks, found.timetable.slots, strict=True)}
    assert found.cut.cuts == (1,) and found.timetable.makespan_us < found.serial_us
    late = max(("0", "1"), key=lambda batch: slots[f"all-to-all S.{batch}"].start_us)
    sent = slots[f"all-to-all S.{late}"]
    early = [slots[f"{name}.{'10'[int(late)]}"] for name in ("H", "E")]
    assert any(one.start_us < sent.end_us and one.end_us > sent.start_us for one in early)


def test_a_ring_hides_what_a_gather_leaves_exposed() -> None:
    sizes = {"T": 65536, "D": 4096, "H": 32, "E": 128}
    exposed = [
        exposed_of(plan_of(made(8, sizes), node("h100x8"))) for made in (many.gathered, many.ring, many.both_ways)
    ]
    assert exposed[0] > 1000 and exposed[1:] == pytest.approx([0, 0], abs=1e-6)


def test_a_plan_finds_the_ring_by_itself() -> None:
    """Where the softmax was lifted to a state that merges: the same steps as the author's rewrite."""
    sizes = {"T": 65536, "D": 4096, "H": 32, "E": 128}
    found = plan(many.cascade_of("ring_attention", 8, None), sizes, node("h100x8"))
    (kept,) = found.parts.kept
    assert (kept.name, kept.parts) == ("all-gather K", "shards") and kept.us < kept.without_us
    assert exposed_of(found) == pytest.approx(0, abs=1e-6)
    hops = [step.hop for step in found.program.steps if isinstance(step, Collective)]
    assert hops == [step.hop for step in many.ring(8, sizes).steps if isinstance(step, Collective)] and len(hops) == 14


def exposed_of(found: Plan) -> float:
    return found.timetable.makespan_us - sum(
        slot.end_us - slot.start_us
        for task, slot in zip(found.problem.tasks, found.timetable.slots, strict=True)
        if not task.modes[slot.mode].demand(OUT) and not task.modes[slot.mode].demand(IN)
    )


def standard() -> Cascade:
    """The layers of the ladder with a residual that is up to date."""
    text = (ROOT / "examples" / "ladder_residual.cascade").read_text()
    changes = {"M1 = feed(X,": "M1 = feed(X1,", "A2 = attend(X1,": "A2 = attend(X2,", "M2 = feed(X2,": "M2 = feed(X3,"}
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    text = text.replace(
        "Y[t,d] = X2[t,d] + A2[t,d] + M2[t,d]", "X3[t,d] = X2[t,d] + A2[t,d]\n Y[t,d] = X3[t,d] + M2[t,d]"
    )
    return pipeline.run_pipeline(parse_program(text)[-1], "canonicalize").final


def test_a_residual_that_is_one_block_old_hides_sums_and_is_another_function() -> None:
    """Planned whole: few tokens are not cut. The ladder is shorter than the same layers without it, and no pass made
    it: what it computes differs."""
    ladder, other = many.cascade_of("ladder_residual", 8), standard()
    sizes = {"T": 512, **LLAMA}
    one, two = (plan(cascade, sizes, node("h100x8")) for cascade in (ladder, other))
    assert not one.cut.cuts and not two.cut.cuts
    assert one.timetable.makespan_us < 0.95 * two.timetable.makespan_us
    assert one.serial_us == pytest.approx(two.serial_us, rel=0.05)
    small = {"T": 5, "D": 4, "H": 2, "E": 2, "F": 3}
    inputs = random_inputs(ladder, small, param_types(ladder, DType.F64), 0)
    results = [run(cascade, inputs, small, Precision.REFERENCE)["Y"] for cascade in (ladder, other)]
    assert float((results[0] - results[1]).abs().max()) > 0.1


# --- mutants ---------------------------------------------------------------------------------------------------------


def batches_swapped(step: Step) -> Step:
    """The second batch's slots are dispatched once more, in place of the first one's."""
    first_batch = isinstance(step, Collective) and step.tensor == "S" and step.at[0] == (0, 0, 1)
    return dataclasses.replace(step, at=((0, 1, 2),)) if first_batch else step


MUTANTS: dict[str, tuple[str, Callable[[Program], Program]]] = {
    "batches swapped": ("dispatch and combine", lambda p: changed(p, batches_swapped)),
    "sent to another dimension": ("dispatch and combine", lambda p: changed(p, of_kind(Kind.ALL_TO_ALL, target=3))),
    "combined before the experts": (
        "dispatch and combine", lambda p: swapped(p, *(next(i for i, s in enumerate(p.steps) if named(s) == n) for n in ("all-to-all S", "all-to-all E"))),
    ),
    "experts placed by another dimension": (
        "dispatch and combine", lambda p: dataclasses.replace(p, places=tuple(dataclasses.replace(one, dim=1) if one.tensor == "W1" else one for one in p.places)),
    ),
    "own shard skipped": ("ring", lambda p: changed(p, lambda s: None if isinstance(s, Compute) and s.name == "S" and not s.along[1].hop else s)),
    "a hop twice": ("ring, both ways", lambda p: changed(p, lambda s: hop_of(s, {2: 1}))),
    "a block's sum skipped": ("ladder residual", lambda p: changed(p, lambda s: None if named(s) == "reduce-scatter M1" else s)),
    "mean for sum": ("nano-batched decode", lambda p: changed(p, of_kind(Kind.ALL_REDUCE, reducer="mean"))),
}  # fmt: skip


def named(step: Step) -> str:
    return f"{step.kind.value} {step.tensor}" if isinstance(step, Collective) else step.name


def hop_of(step: Step, hops: Mapping[int, int]) -> Step:
    """The step with what its ranks are shifted by changed, of a statement only."""
    if not isinstance(step, Compute):
        return step
    along = tuple(dataclasses.replace(one, hop=hops.get(one.hop, one.hop)) for one in step.along)
    return dataclasses.replace(step, along=along)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_of_an_example_is_killed(name: str) -> None:
    example, mutate = MUTANTS[name]
    program = many.PROGRAMS[example](4)
    assert right(program)
    assert mutate(program) != program and not right(mutate(program))


# --- published systems -----------------------------------------------------------------------------------------------

Sizes = Mapping[str, int]
LAYER = """
cascade layer(X[T,D], Wu[D,F], Wd[F,E]) -> Y[T,E] {
    M[x,d] = 2 * X[x,d]
    H[t,f] = relu(sum[d] M[t,d] * Wu[d,f])
    Y[t,e] = H[t,f] * Wd[f,e]
}
"""
EXPERTS = """
cascade experts(X[T,D], G[T,N], W1[N,D,F], W2[N,F,E]) -> Y[T,E] {
    M[x,d]   = 2 * X[x,d]
    H[t,n,f] = relu(sum[d] M[t,d] * W1[n,d,f])   where G[t,n] > 0
    Y[t,e]   = sum[n,f] G[t,n] * H[t,n,f] * W2[n,f,e]
}
"""
DECODE = """
cascade decode(Q[B,H,E], K[B,H,N,E], V[B,H,N,E], len[B]) -> O[B,H,E] {
    S[b,h,n] = Q[b,h,e] * K[b,h,n,e]   where n < len[b]
    P[b,h,n] = softmax[n] S[b,h,n]
    O[b,h,e] = P[b,h,n] * V[b,h,n,e]
}
"""
PREFIX = """
cascade prefix(Q[B,E], Kp[L,E], Vp[L,E], K[B,N,E], V[B,N,E]) -> O[B,E] with n = A {
    I[n]     = min(n, L - 1)
    J[n]     = max(n - L, 0)
    C[b,n,e] = select(n < L, Kp[I[n],e], K[b,J[n],e])
    W[b,n,e] = select(n < L, Vp[I[n],e], V[b,J[n],e])
    S[b,n]   = Q[b,e] * C[b,n,e]
    P[b,n]   = softmax[n] S[b,n]
    O[b,e]   = P[b,n] * W[b,n,e]
}
"""
PLACED = """
cascade placed(X[T,D], G[T,N], home[N], W1[N,D,F], W2[N,F,D]) -> Y[T,D] {
    U[m,d,f] = W1[home[m],d,f]
    V[m,f,d] = W2[home[m],f,d]
    H[t,m,f] = relu(sum[d] X[t,d] * U[m,d,f])
    Y[t,d]   = sum[m,f] G[t,home[m]] * H[t,m,f] * V[m,f,d]
}
"""


def shards_as_they_come(sizes: Sizes) -> Program:
    program = stated(canonical(LAYER, Mesh("tp", 4), Shard("x", "tp"), Shard("f", "tp")), sizes)
    return by_shards(program, first(program, Kind.ALL_GATHER, "M"))


def shards_come_and_go(sizes: Sizes) -> Program:
    """What is gathered comes shard by shard; what is summed goes to its rows so."""
    program = shards_as_they_come(sizes)
    program = scatter_gather(program, first(program, Kind.ALL_REDUCE, "Y"), 0)
    return by_rows(program, first(program, Kind.REDUCE_SCATTER, "Y"))


def scattered_columns(sizes: Sizes) -> Program:
    program = stated(canonical(LAYER, Mesh("tp", 4), Shard("f", "tp")), sizes)
    return scatter_gather(program, first(program, Kind.ALL_REDUCE, "Y"), 1)


def tokens_by_source(sizes: Sizes) -> Program:
    program = stated(canonical(EXPERTS, Mesh("ep", 4), Shard("x", "ep"), Shard("n", "ep")), sizes)
    return by_shards(program, first(program, Kind.ALL_GATHER, "M"))


def experts(sizes: Sizes) -> Program:
    return stated(many.cascade_of("expert_parallel", sizes["P"]), sizes)


def keys_over_devices(sizes: Sizes) -> Program:
    return stated(lifted(DECODE, Mesh("cp", 4), Shard("n", "cp")), sizes)


def shared_prefix(sizes: Sizes) -> Program:
    return stated(lifted(PREFIX, Mesh("dp", 2), Shard("b", "dp")), sizes)


def folded_axes(sizes: Sizes) -> Program:
    """Batches over one axis and sources over the other; experts over both together."""
    schedule = (Mesh("dp", 2), Mesh("ep", 2), Shard("b", "dp"), Shard("p", "ep"), Shard("m", "dp"), Shard("m", "ep"))
    return stated(dataclasses.replace(many.cascade_of("expert_parallel", 2), schedule=schedule), sizes)


def chosen_homes(sizes: Sizes) -> Program:
    return stated(canonical(PLACED, Mesh("ep", 4), Shard("m", "ep")), sizes)


def another_product(sizes: Sizes) -> Program:
    """One sum over the devices is a gather instead."""
    program = stated(many.cascade_of("nano_batched_decode", 8), sizes)
    return another_form(program, "Z_sum", (Along("d", ("tp",)),))


def tokens(sizes: Sizes) -> Program:
    return stated(many.cascade_of("tensor_parallel_block", 8), sizes)


def cut(program: Program, rank: str, cuts: tuple[int, ...]) -> Program:
    """The program with cuts that its schedule says, for a plan."""
    rest = (item for item in program.cascade.schedule if not isinstance(item, Split))
    schedule = (*rest, Split(rank, cuts=cuts))
    return dataclasses.replace(program, cascade=dataclasses.replace(program.cascade, schedule=schedule))


FEW = {"T": 9, "D": 4, "F": 5, "E": 6}
LOTS = {"T": 4096, "D": 4096, "F": 8192, "E": 4096}
ROUTED = {"B": 2, "P": 2, "T": 6, "D": 3, "N": 4, "F": 4, "C": 6}
ROUTED_LARGE = {"B": 2, "P": 8, "T": 2048, "D": 4096, "N": 32, "F": 2048, "C": 256}


@dataclasses.dataclass(frozen=True)
class System:
    """What a published system does: a program, small sizes to run it, large ones to plan it, a rank in slices."""

    made: Callable[[dict[str, int]], Program]
    small: dict[str, int]
    large: dict[str, int]
    rank: str | None = None
    parts: int = 2

    def program(self, sizes: dict[str, int], slices: bool) -> Program:
        """The program, in slices, or with the cuts in its schedule."""
        whole = self.made(sizes)
        if self.rank is None:
            return whole
        extent = Reach(whole.cascade, sizes).full[self.rank][1]
        cuts = tuple(extent * part // self.parts for part in range(1, self.parts))
        return split(whole, self.rank, cuts) if slices else cut(whole, self.rank, cuts)


KEYS = {"T": 65536, "D": 4096, "H": 32, "E": 128}
SYSTEMS = {
    "TokenWeave": System(tokens, many.LAYER, {"T": 4096, "HK": 8, **LLAMA}, "t"),
    "NanoFlow": System(another_product, many.DECODE, {"B": 2048, "N": 1024, "HK": 8, **LLAMA}, "b"),
    "Flux, async tensor parallelism": System(shards_come_and_go, FEW, LOTS),
    "FlashOverlap": System(scattered_columns, FEW, {**LOTS, "T": 16384}, "t", 4),
    "Comet, layer 0": System(tokens_by_source, {**FEW, "N": 6}, {**LOTS, "N": 8}),
    "Comet, layer 1": System(tokens_by_source, {**FEW, "N": 6}, {**LOTS, "N": 8}, "e"),
    "Tutel": System(experts, ROUTED, ROUTED_LARGE, "s"),
    "Two-batch overlap": System(experts, {**ROUTED, "P": 4, "N": 8}, ROUTED_LARGE, "b"),
    "FlashDecoding, Lean": System(
        keys_over_devices, {"B": 3, "H": 2, "E": 2, "N": 11}, {"B": 8, "H": 32, "E": 128, "N": 65536}
    ),
    "Ring attention": System(lambda sizes: many.ring(8, sizes), many.LONG, KEYS),
    "TokenRing": System(lambda sizes: many.both_ways(8, sizes), many.LONG, KEYS),
    "Shared prefix": System(
        shared_prefix, {"B": 3, "L": 4, "N": 3, "E": 2, "A": 7}, {"B": 64, "L": 8192, "N": 512, "E": 128, "A": 8704}
    ),
    "MoE Parallel Folding": System(folded_axes, ROUTED, ROUTED_LARGE),
    "MoETuner": System(chosen_homes, {"T": 5, "D": 3, "F": 4, "N": 8}, {"T": 1024, "D": 1024, "F": 1024, "N": 8}),
    "Sarathi-Serve": System(tokens, many.LAYER, {"T": 2304, "HK": 8, **LLAMA}, "t", 3),
    "Ladder residual": System(lambda sizes: many.ladder(8, sizes), many.LADDER, {"T": 2048, **LLAMA}),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_what_a_system_does_means_the_same_and_can_be_planned(name: str) -> None:
    system = SYSTEMS[name]
    agrees(system.program(system.small, slices=True), system.small)
    found = plan_of(system.program(system.large, slices=False), node("h100x8"))
    assert found.bound_us - 1e-6 <= found.timetable.makespan_us <= found.serial_us * 1.25
    if system.rank:
        assert len(found.cut.cuts) == system.parts - 1
    elif found.cut.cuts:  # the search may cut what its author did not, where that gains
        assert found.cut.split_us is not None and found.cut.split_us < found.cut.whole_us


def test_keys_cut_where_a_shared_prefix_ends_merge_on_one_device() -> None:
    whole = lifted(PREFIX)
    parts = dataclasses.replace(whole, schedule=(Split("n", cuts=(4,)), *whole.schedule))
    sizes = {"B": 3, "L": 4, "N": 3, "E": 2, "A": 7}
    inputs = random_inputs(whole, sizes, param_types(whole, DType.F64), 0)
    one, other = (run(cascade, inputs, sizes, Precision.REFERENCE)["O"] for cascade in (whole, parts))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert not torch.equal(one, other)  # two states were merged


def test_an_axis_of_devices_is_two_for_the_collectives_of_a_layer() -> None:
    program = refactor_axis(
        stated(canonical(LAYER, Mesh("tp", 4), Shard("f", "tp")), FEW), "tp", Axis("a", 2), Axis("b", 2)
    )
    assert kinds(program) == ["all-reduce", "all-reduce"]
    agrees(program, FEW)


def test_the_page_lists_every_system() -> None:
    rows = re.findall(r"^\| ([^|]+?) \|", PAGE.read_text(encoding="utf-8"), re.M)
    assert [row for row in rows if row not in ("system", "---")] == [*SYSTEMS, "T3"]


def test_collectives_that_need_no_compute_unit_are_tasks_without_one() -> None:
    """T3's: the reduction is in the memory, so a product has all SMs beside it. No shipped machine has that."""
    product = Task("product", (Mode("whole", 10.0, ((SMS, 132.0),)),))
    scatter = Task("scatter", (Mode("in memory", 10.0, ((OUT, 1.0),)),))
    few = Task("scatter", (Mode("links", 10.0, ((OUT, 1.0), (SMS, 8.0))),))
    capacities = ((SMS, 132.0), (OUT, 1.0))
    assert list_schedule(Problem((product, scatter), capacities)).makespan_us == 10
    assert list_schedule(Problem((product, few), capacities)).makespan_us == 20


def test_parts_of_two_sizes_are_refused() -> None:
    """Attention in four nano-batches and products in two: a rank has one list of cuts."""
    text = (ROOT / "examples" / "nano_batched_decode.cascade").read_text()
    with pytest.raises(VerifyError, match="C245"):
        pipeline.run_pipeline(
            parse_cascade(text.replace("split b into 2", "split b into 2\n    split b into 4"), "<two>")
        )
