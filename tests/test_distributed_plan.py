"""Plans for several devices: what they say, how fast they are made, and what machines they are for."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from cascade import pipeline
from cascade.backends.distributed import decompose
from cascade.backends.distributed.kernels import Clock, groups
from cascade.backends.distributed.machine import Node, node, shipped
from cascade.backends.distributed.plan import Plan, in_a_row, plan, plan_json, plan_of, plan_text, trace_json
from cascade.backends.distributed.simulate import simulate
from cascade.cli import commands
from cascade.errors import CommandError, UnsupportedError
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.ir import Cascade, DType, Mesh, Shard
from cascade.passes.schedule_bound import lower_bound
from cascade.passes.schedule_overlap import exact_schedule, list_schedule
from cascade.passes.shard import Sharding, cheapest
from cascade.passes.split_tokens import Touches, dependencies, lacks, split
from cascade.placed import Collective, Compute, Kind, Program, read_program, render_program
from cascade.trial import param_types, random_inputs
from cascade.timetable import Mode, Problem, Queues, Task
from cascade.verify.rings import check_rings
from cascade.verify.timetable import check_ranks, check_timetable, check_written, implied
from tests.test_shard import canonical
from tests.timing import least, within

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples" / "tensor_parallel_block.cascade"
LLAMA = {"D": 8192, "H": 64, "HK": 8, "E": 128, "F": 28672}


def block(text: str | None = None) -> Cascade:
    cascade = parse_cascade(text or EXAMPLE.read_text(encoding="utf-8"), "<block>")
    return pipeline.run_pipeline(cascade, "canonicalize").final


def planned(tokens: int, machine: str = "h100x8", devices: int = 8, **other: int) -> Plan:
    text = EXAMPLE.read_text(encoding="utf-8").replace("mesh tp = 8", f"mesh tp = {devices}")
    return plan(block(text), {"T": tokens, **LLAMA, **other}, node(machine))


def test_a_layer_of_a_large_model_is_split_and_its_communication_hidden() -> None:
    found = planned(8192)
    assert found.rank == "t" and len(found.cut.cuts) == 1 and found.cut.declined is None
    assert found.bound_us <= found.timetable.makespan_us < 0.95 * found.serial_us
    assert found.cycle_us is not None and found.cycle_us < 0.85 * found.serial_us
    kinds = [step.kind for step in found.program.steps if isinstance(step, Collective)]
    assert kinds.count(Kind.REDUCE_SCATTER) == kinds.count(Kind.ALL_GATHER) == 4


def test_few_tokens_are_not_split_and_the_plan_says_why() -> None:
    found = planned(512)
    assert not found.cut.cuts and found.cut.split_us is not None and found.cut.split_us > found.cut.whole_us
    assert found.cut.declined is not None and f"{found.cut.split_us:.1f} us" in found.cut.declined
    assert planned(128).cut.declined == "128 coordinates are less than two tiles of 128"


LADDER = {key: size for key, size in LLAMA.items() if key != "HK"}
SHIPPED: dict[str, tuple[str, dict[str, int]]] = {
    **{f"block of {tokens}": ("tensor_parallel_block", {"T": tokens, **LLAMA}) for tokens in (1024, 2048, 4096, 8192)},
    **{f"ladder of {tokens}": ("ladder_residual", {"T": tokens, **LADDER}) for tokens in (512, 2048)},
    "experts": ("expert_parallel", {"B": 2, "P": 8, "T": 4096, "D": 7168, "N": 64, "F": 2048, "C": 256}),
    "fewer experts": ("expert_parallel", {"B": 2, "P": 8, "T": 2048, "D": 4096, "N": 32, "F": 2048, "C": 256}),
    "decode": ("nano_batched_decode", {"B": 2048, "N": 1024, **LLAMA}),
    "few decoded": ("nano_batched_decode", {"B": 256, "N": 1024, **LLAMA}),
    "ring": ("ring_attention", {"T": 65536, "D": 4096, "H": 32, "E": 128}),
}


@pytest.mark.parametrize("machine", shipped())
@pytest.mark.parametrize("name", SHIPPED)
def test_a_plan_is_made_in_a_second(name: str, machine: str) -> None:
    """Of a cascade that was never asked about; of one layer in half of that."""
    file, sizes = SHIPPED[name]
    limit = 1.0 if file == "ladder_residual" else 0.5  # two layers
    cascade = block((ROOT / "examples" / f"{file}.cascade").read_text(encoding="utf-8"))
    fresh = (dataclasses.replace(cascade, name=f"{cascade.name}_{number}") for number in range(3))  # nothing was kept
    assert within(least(lambda cascade: plan(cascade, sizes, node(machine)), fresh), limit)


@pytest.mark.campaign
@pytest.mark.parametrize("machine", shipped())
@pytest.mark.parametrize("name", SHIPPED)
def test_schedules_of_plans_are_proved_and_list_schedules_near(name: str, machine: str) -> None:
    """Of one layer and of four in a row, up to sixty tasks in ten seconds of one core, without a solver."""
    file, sizes = SHIPPED[name]
    found = plan(block((ROOT / "examples" / f"{file}.cascade").read_text(encoding="utf-8")), sizes, node(machine))
    for problem in (found.problem, in_a_row(found, 4)):
        started = time.process_time()
        best = exact_schedule(problem)
        near = list_schedule(problem)
        few = len(problem.tasks) <= 60
        assert not few or (best.optimal and within(time.process_time() - started, 10.0))
        assert not list(check_timetable(problem, best)) and not list(check_timetable(problem, near))
        assert lower_bound(problem) - 1e-6 <= best.makespan_us <= near.makespan_us <= 1.05 * best.makespan_us


def test_four_layers_in_a_row_are_proved_and_shorter_than_four_alone() -> None:
    found = planned(4096)
    problem = in_a_row(found, 4)
    best = exact_schedule(problem)
    assert best.optimal and len(problem.tasks) == 4 * len(found.row.steps) == 56
    assert best.makespan_us < 4 * exact_schedule(found.problem).makespan_us
    assert not planned(512).row.carried and in_a_row(planned(512), 4) == planned(512).problem


def test_an_exchange_is_one_kernel_where_a_machine_has_one() -> None:
    """The way is what the search found fastest; without such kernels in the machine's file it is not there."""
    found = planned(8192)
    modes = [mode.name for task in found.problem.tasks for mode in task.modes]
    assert found.way.name == "fused" and found.way.blocks in found.node.fused and "fused" in modes
    apart = planned(8192, "a100x8")
    assert apart.way.name in ("apart", "awaited") and not apart.node.fused
    assert plan_json(found)["exchange"] == {"way": "fused", "blocks": found.way.blocks}
    plain = plan(block(), dict(found.program.sizes), dataclasses.replace(found.node, fused={}, stores=None))
    assert found.cycle_us is not None and plain.cycle_us is not None and found.cycle_us < plain.cycle_us


def test_exchanges_go_part_by_part_where_that_beats_every_cut() -> None:
    """Links of an A100 are slow and its cut is declined: a product in parts of its columns gains, by the same model."""
    found = planned(8192, "a100x8")
    assert found.parts.declined is None and not found.cut.cuts and found.cut.declined is not None
    plain = plan_of(cheapest(block(), dict(found.program.sizes), found.node), found.node)
    assert plain.parts.kept == () and found.cycle_us is not None and plain.cycle_us is not None
    assert found.cycle_us < plain.cycle_us and not list(lacks(found.program))
    (kept,) = found.parts.kept
    assert kept.us == found.cycle_us and kept.without_us == plain.cycle_us and kept.name == "reduce-scatter Z_sum"
    parts = [step for step in found.program.steps if isinstance(step, Collective) and step.at]
    assert len(parts) == 4 and [step.at[0][1] % 256 for step in parts] == [0] * 4
    assert plan_json(found)["parts"] == {"kept": [{"exchange": kept.name, "in": "4 parts of d"}], "declined": None}
    assert "exchanges in parts: reduce-scatter Z_sum in 4 parts of d" in plan_text(found)


def test_rows_go_round_where_that_beats_parts_of_columns_and_every_cut() -> None:
    """On slow links, beside a narrow block: the second sum of a layer by shards of rows, by the same model and as data."""
    found = planned(8192, "a100x8", F=16384)
    assert [(one.name, one.parts) for one in found.parts.kept] == [
        ("reduce-scatter Z_sum", "4 parts of d"), ("reduce-scatter Y_sum", "shards of t"),
    ]  # fmt: skip
    assert found.cycle_us is not None and found.cycle_us < found.parts.kept[0].us < found.cut.whole_us
    assert not list(lacks(found.program)) and not list(check_rings(found.program))
    made = json.loads(json.dumps(plan_json(found)))
    assert read_program(made["program"], found.program.cascade) == found.program
    ring = [s for s in found.program.steps if isinstance(s, Collective) and s.passes]
    assert [step.hop for step in ring] == [7, 6, 5, 4, 3, 2, 1, 0]
    resources = {task["name"].rpartition(".")[0]: task["resource"] for task in made["tasks"]}
    assert resources["shift Y_sum hop 7"] == "links out" and resources["shift Y_sum"] == "sms"  # merged, not moved


def test_a_ring_of_partial_results_is_a_pipeline_that_leaves_its_last_merge_exposed() -> None:
    """Beside products that take longer than the links: behind the last of them one merge is left."""
    text = """cascade c(X[T,F], W[D,F]) -> Y[T,D] {
        S[t,d] = X[t,f] * W[d,f]
        Y[t,d] = 2 * S[t,d]
    }"""
    cascade = canonical(text, Mesh("tp", 8), Shard("f", "tp"), Shard("t", "tp"))
    found = plan(cascade, {"T": 32768, "D": 8192, "F": 28672}, node("h100x8"))
    assert [one.parts for one in found.parts.kept] == ["shards of t"] and found.cut.declined is not None
    times = {t.name.rpartition(".")[0]: s for t, s in zip(found.problem.tasks, found.timetable.slots, strict=True)}
    assert plan_json(found)["exposed_comm_us"] == pytest.approx(0, abs=1e-6)
    assert times["shift S hop 1"].end_us <= times["S"].end_us == pytest.approx(times["shift S"].start_us)
    shard = 32768 * 8192 * 2 / 8
    clock = Clock.of(found.program, found.node)
    first, later, last = (s for s in found.program.steps if isinstance(s, Collective) and s.hop in (7, 6, 0))
    moved = found.node.collective_us(Kind.SHIFT, 8 * shard, 8)
    merged = found.node.floor_us + 3 * shard / (found.node.gpu.bandwidth_tbs * 1e6)
    wanted = (moved, moved + merged, merged)
    assert tuple(map(clock.collective_us, (first, later, last))) == pytest.approx(wanted)


def test_exchanges_in_parts_are_declined_with_the_number() -> None:
    few, cut, stated = planned(1024, "a100x8"), planned(4096), plan(*split_example())
    assert few.parts.declined is not None and few.parts.tried and not any(one.kept for one in few.parts.tried)
    (least,) = (one for one in few.parts.tried if str(one) == few.parts.declined)
    assert least.alone and f"{least.us:.1f} us" in few.parts.declined and least.us > least.without_us
    assert cut.cut.cuts and cut.parts.declined is not None and "and slices" in cut.parts.declined
    assert stated.parts.declined == "the schedule says where to cut" and not stated.parts.tried
    assert f"exchanges in parts: none; {few.parts.declined}" in plan_text(few)


def split_example() -> tuple[Cascade, dict[str, int], Node]:
    text = EXAMPLE.read_text(encoding="utf-8").replace("mesh tp = 8", "mesh tp = 8\n    split t into 2")
    return block(text), {"T": 2048, **LLAMA}, node("h100x8")


@pytest.mark.parametrize("devices", [2, 4])
def test_every_way_in_parts_means_what_the_program_means(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of parts of few coordinates, so that a small program has them."""
    monkeypatch.setattr(decompose, "TILE", 1)
    sizes = {"T": 9, "D": 8, "H": 8, "HK": 8, "E": 2, "F": 9}
    text = EXAMPLE.read_text(encoding="utf-8").replace("mesh tp = 8", f"mesh tp = {devices}")
    found = ways_in_parts(program := cheapest(block(text), sizes, node("h100x8")))
    assert {way.parts for way in found} >= {"2 parts of d", "4 parts of d"}
    mean_the_same(program, found)


@pytest.mark.parametrize("devices", [2, 4])
def test_every_way_in_parts_of_a_layer_laid_as_a_large_one(devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums are scattered there, so that rows may go round."""
    monkeypatch.setattr(decompose, "TILE", 1)
    cascade = block(EXAMPLE.read_text(encoding="utf-8").replace("mesh tp = 8", f"mesh tp = {devices}"))
    large = cheapest(cascade, {"T": 4096, **LLAMA}, node("h100x8"))
    along = {step.name: step.along for step in large.steps if isinstance(step, Compute)}
    program = Sharding(cascade, {"T": 9, "D": 8, "H": 8, "HK": 8, "E": 2, "F": 9}).program(along)
    found = ways_in_parts(program)
    assert {way.parts for way in found} >= {"shards of t", "2 parts of d", "4 parts of d"}
    mean_the_same(program, found)


def ways_in_parts(program: Program) -> list[decompose.Decomposed]:
    clock = Clock.of(program, node("h100x8"))
    exchanges = [step for step in program.steps if isinstance(step, Collective)]
    return [way for step in exchanges for way in decompose.decompositions(program, step, clock)]


def mean_the_same(program: Program, found: list[decompose.Decomposed]) -> None:
    sizes = dict(program.sizes)
    inputs = random_inputs(program.cascade, sizes, param_types(program.cascade, DType.F64), 0)
    wanted = run(program.cascade, inputs, sizes, Precision.REFERENCE)
    for way in found:
        assert way.program != program and not list(lacks(way.program)) and not list(check_rings(way.program))
        for name, value in simulate(way.program, inputs).items():
            torch.testing.assert_close(value, wanted[name], rtol=1e-12, atol=1e-12)


def test_the_estimate_of_parts_is_what_a_schedule_of_them_takes() -> None:
    rng = random.Random(0)
    for _ in range(20):
        stages = [[float(rng.randint(1, 9)) for _ in range(4)] for _ in range(2)]
        tasks = []
        for part in range(4):
            for stage in range(2):  # behind the same stage of the part before, and the stage before of the same part
                needs = [2 * (part - 1) + stage] * (part > 0) + [2 * part] * stage
                mode = Mode("only", stages[stage][part], ((f"stage {stage}", 1.0),))
                tasks.append(Task(f"{part}.{stage}", (mode,), tuple(needs)))
        best = exact_schedule(Problem(tuple(tasks), (("stage 0", 1.0), ("stage 1", 1.0))))
        assert best.optimal and best.makespan_us == pytest.approx(decompose.pipelined(*stages))


def test_a_mesh_of_one_device_exchanges_nothing_in_parts() -> None:
    text = EXAMPLE.read_text(encoding="utf-8").replace("mesh tp = 8", "mesh tp = 1")
    assert plan(block(text), {"T": 2048, **LLAMA}, node("h100x8")).parts.kept == ()


def test_a_host_that_launches_slowly_declines_a_split() -> None:
    slow = dataclasses.replace(node("h100x8"), host_us=400.0)
    found = plan(block(), {"T": 8192, **LLAMA}, slow)
    assert found.cut.declined is not None and found.cut.split_us is not None
    assert found.cycle_us is not None and found.cycle_us >= 400.0 * found.launches
    assert plan(block(), {"T": 8192, **LLAMA}, dataclasses.replace(slow, host_us=0.0)).cut.cuts


def test_a_machine_file_says_what_is_wrong_with_it() -> None:
    with pytest.raises(CommandError, match="C605"):
        node("h100x9")
    assert node("h200x8").fits == node("h100x8").fits and node("h200x8").gpu.name == "h200"
    for name in shipped():
        assert {kind for kind in Kind} == set(node(name).fits)


def test_what_a_plan_runs_means_what_its_cascade_means() -> None:
    large = planned(8192).program
    sizes = {"T": 7, "D": 4, "H": 8, "HK": 8, "E": 2, "F": 9}
    cascade = large.cascade
    program = split(cheapest(cascade, sizes, node("h100x8")), "t", (3,))
    inputs = random_inputs(cascade, sizes, param_types(cascade, DType.F64), 0)
    wanted = run(cascade, inputs, sizes, Precision.REFERENCE)["Y"].double()
    assert float((simulate(program, inputs)["Y"] - wanted).abs().max()) <= 1e-12 * (1 + float(wanted.abs().max()))


def test_every_element_is_computed_once_and_ranks_agree_on_the_order() -> None:
    found = planned(4096)
    boxes: dict[tuple[int, str], list[tuple[tuple[int, int], ...]]] = {}
    for one in written(found):
        boxes.setdefault(one[0], []).append(one[1])
    assert not list(check_written(boxes))
    order = [str(step) for step in found.program.steps if isinstance(step, Collective)]
    assert not list(check_ranks(dict.fromkeys(range(8), order)))


def written(found: Plan) -> Iterator[tuple[tuple[int, str], tuple[tuple[int, int], ...]]]:
    touches = Touches.of(found.program)
    for step in found.program.steps:
        if not isinstance(step, Collective):
            for one in touches.writes(step):
                yield (one.device, one.tensor), one.box


def test_attention_is_one_task_and_products_of_one_operand_are() -> None:
    program = cheapest(block(), {"T": 4096, **LLAMA}, node("h100x8"))
    names = [
        {step.name for number in group.steps if not isinstance(step := program.steps[number], Collective)}
        for group in groups(program, dependencies(program))
    ]
    assert any({"S", "P_max", "P_sum", "P", "U"} == one for one in names)
    assert any({"Q", "K", "V"} <= one for one in names) and any({"J_sum", "J_sum_1", "J"} <= one for one in names)


def test_cuts_of_the_schedule_are_taken() -> None:
    text = EXAMPLE.read_text(encoding="utf-8").replace("shard f over tp", "shard f over tp\n    split t at 512, 1024")
    found = plan(block(text), {"T": 2048, **LLAMA}, node("h200x8"))
    assert found.cut.cuts == (512, 1024)


def test_a_mesh_larger_than_the_machine_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="C554"):
        planned(1024, devices=16)
    with pytest.raises(CommandError, match="C605"):
        node("h10x8")


@pytest.mark.parametrize("machine", shipped())
def test_the_command_writes_json_a_trace_and_text(machine: str, tmp_path: Path) -> None:
    sizes = [word for name, size in {"T": 4096, **LLAMA}.items() for word in ("-s", f"{name}={size}")]
    trace = tmp_path / "trace.json"
    line = ["plan", str(EXAMPLE), "--machine", machine, *sizes]
    out = CliRunner().invoke(commands, [*line, "--json", "--trace", str(trace)])
    assert out.exit_code == 0
    found = json.loads(out.output)
    keys = {"split", "declined", "makespan_us", "bound_us", "serial_us", "exposed_comm_us", "tasks"}
    assert keys <= set(found) and (found["split"] is None) == (found["declined"] is not None)
    names = [task["name"] for task in found["tasks"]]
    assert len(set(names)) == len(names)
    ends = {task["name"]: task["end"] for task in found["tasks"]}
    for task in found["tasks"]:
        assert {"name", "resource", "start", "end", "waits"} <= set(task)
        assert all(ends[other] <= task["start"] + 1e-6 for other in task["waits"])
    events = json.loads(trace.read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(names)
    text = CliRunner().invoke(commands, line).output
    assert "modelled" in text and "split:" in text


def test_the_program_of_a_plan_reads_back() -> None:
    found = planned(4096)
    assert read_program(render_program(found.program), found.program.cascade) == found.program
    assert plan_json(found)["program"] == render_program(found.program)
    assert plan_json(found)["hash"] != plan_json(planned(2048))["hash"]
    assert trace_json(found)["traceEvents"] and plan_text(found)


# --- what queues and waits allow ---------------------------------------------------------------------------------------


def small_plan() -> Plan:
    """A plan with two slices, small enough to run."""
    text = EXAMPLE.read_text(encoding="utf-8").replace("mesh tp = 8", "mesh tp = 2")
    text = text.replace("shard f over tp", "shard f over tp\n    split t at 3")
    return plan(block(text), {"T": 7, "D": 4, "H": 8, "HK": 8, "E": 2, "F": 9}, node("h100x8"))


def interleaved(found: Plan, queues: Queues, rng: random.Random, last: int | None = None) -> list[int]:
    """The steps of the tasks in a random order that queues and waits allow; task `last` as late as it can be."""
    before = implied(queues)
    left, order = set(range(len(found.problem.tasks))), []
    while left:
        ready = sorted(task for task in left if not any(late == task and early in left for late, early in before))
        chosen = rng.choice([task for task in ready if task != last] or ready)
        left.remove(chosen)
        order += found.steps[chosen]
    return order


def right(found: Plan, order: list[int]) -> bool:
    cascade, sizes = found.program.cascade, dict(found.program.sizes)
    inputs = random_inputs(cascade, sizes, param_types(cascade, DType.F64), 0)
    wanted = run(cascade, inputs, sizes, Precision.REFERENCE)["Y"].double()
    try:
        return torch.allclose(simulate(found.program, inputs, order)["Y"], wanted, rtol=1e-12, atol=1e-12)
    except KeyError:  # of a tensor that is read nothing at all was written
        return False


def test_any_order_that_queues_and_waits_allow_gives_the_same() -> None:
    found = small_plan()
    orders = [interleaved(found, found.queues, random.Random(seed)) for seed in range(8)]
    assert len(set(map(tuple, orders))) > 1 and all(right(found, order) for order in orders)


def test_without_a_wait_some_order_is_wrong() -> None:
    found = small_plan()
    assert found.queues.waits
    for wait in found.queues.waits:
        fewer = dataclasses.replace(found.queues, waits=tuple(one for one in found.queues.waits if one != wait))
        assert not right(found, interleaved(found, fewer, random.Random(0), last=wait[1])), wait
