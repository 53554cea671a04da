"""Plans for one device: modes by shares of its SMs, what runs beside what, what is declined, and that it means the same.

The machine that runs anything here is no GPU: plans run by the interpreter, and streams by a driver that is made up.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from click.testing import CliRunner

import cascade.distributed
from cascade import interp, pipeline
from cascade.backends.distributed import confined, kernels, runtime
from cascade.backends.distributed.beside import (
    BANDWIDTH, CONTENDED, LEAST_GAIN, SIDE_QUEUES, kept_apart, partitions, shared_problem, sides,
)  # fmt: skip
from cascade.backends.distributed.kernels import LAST_WAVE, SMS, Clock, layer_of
from cascade.backends.distributed.machine import DRAWING, Node, alone, node
from cascade.backends.distributed.plan import Plan, in_a_row, plan, plan_json, plan_text, whole
from cascade.backends.triton.machine import MACHINES
from cascade.cli import commands
from cascade.errors import CallError, UnsupportedError
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade, DType
from cascade.passes.shard import undivided
from cascade.passes.split_tokens import dependencies
from cascade.timetable import Problem, Queues, Slot, Timetable
from cascade.trial import param_types, random_inputs
from cascade.values import Precision
from cascade.verify.timetable import check_queues, check_timetable, implied, over_synchronised
from tests.timing import least, within

EXAMPLES = Path(__file__).parents[1] / "examples"
PAIR = (EXAMPLES / "product_beside_decode.cascade").read_text(encoding="utf-8")
LAYER = (EXAMPLES / "decode_layer.cascade").read_text(encoding="utf-8")
LARGE_PAIR = {"T": 4096, "D": 4096, "F": 8192, "B": 64, "H": 32, "HK": 8, "N": 8192, "E": 128}
LARGE_LAYER = {"B": 2048, "N": 1024, "D": 4096, "H": 32, "HK": 8, "E": 128, "F": 14336}
SMALL_LAYER = {"B": 16, "N": 64, "D": 16, "H": 4, "HK": 2, "E": 4, "F": 24}
SMALL_PAIR = {"T": 5, "D": 8, "F": 6, "B": 3, "H": 4, "HK": 2, "N": 7, "E": 4}
H200 = node("h200")


def canonical(text: str) -> Cascade:
    return pipeline.run_pipeline(parse_cascade(text, "<one device>"), "canonicalize").final


def slow(memory: float, matrix: float) -> Node:
    """An H200 that takes for a handful of numbers as long as the real one for many."""
    gpu = H200.gpu
    rates = {dtype: rate * matrix for dtype, rate in gpu.matrix_tflops.items()}
    made = dataclasses.replace(gpu, matrix_tflops=rates, bandwidth_tbs=gpu.bandwidth_tbs * memory, clock_ghz=1e3)
    return alone(made)


@functools.cache
def small_plan(split: bool) -> Plan:
    """A plan that overlaps: of a layer in two slices, or of a pair; products have as many tiles as large ones have."""
    text, sizes = (LAYER + " schedule { split b into 2 }", SMALL_LAYER) if split else (PAIR, SMALL_PAIR)
    with mock.patch.object(kernels, "TILES", ((1, 1, 1.0),)):
        found = plan(canonical(text), sizes, slow(1e-7, 3e-10))
    assert found.way.first is not None and bool(found.cut.cuts) == split, plan_text(found)
    return found


def problem(text: str, sizes: dict[str, int], first: int | None) -> Problem:
    program = undivided(canonical(text), sizes)
    needs = dependencies(program)
    layer = layer_of((), [], needs)
    steps = tuple((number,) for number in range(len(program.steps)))
    return shared_problem(program, dataclasses.replace(layer, steps=steps, needs=needs), Clock.of(program, H200), first)


# --- modes -----------------------------------------------------------------------------------------------------------


def test_what_moves_bytes_takes_its_time_by_what_so_many_sms_draw() -> None:
    sizes = {"M": 1 << 26}
    text = "cascade c(X[M]) -> Y[M] { Y[m] = 2 * X[m] }"
    moved_us = 2 * 2 * (1 << 26) / 4.3e6
    (task,) = problem(text, sizes, 40).tasks
    modes = {mode.name: mode for mode in task.modes}
    assert modes["a"].us == pytest.approx(H200.floor_us + moved_us * DRAWING * 132 / 40 / CONTENDED)
    assert modes["b"].us == pytest.approx(H200.floor_us + moved_us / CONTENDED)  # 92 SMs draw all there is
    assert modes["all"].us == pytest.approx(H200.floor_us + moved_us), "nothing is beside it"
    for name, sms in (("a", 40), ("b", 92)):
        assert dict(modes[name].demands) == {
            f"sms {name}": 1.0, SMS: sms, BANDWIDTH: pytest.approx(moved_us / modes[name].us)
        }  # fmt: skip
    (task,) = problem(text, sizes, None).tasks
    assert [(mode.name, mode.demand(SMS)) for mode in task.modes] == [("all", 132.0)]


def test_what_multiplies_takes_its_time_by_its_sms() -> None:
    text = "cascade c(X[M,K], W[K,N]) -> Y[M,N] { Y[m,n] = X[m,k] * W[k,n] }"
    (task,) = problem(text, {"M": 4096, "K": 4096, "N": 4096}, 64).tasks
    for mode in task.modes:
        waves = 32 * 16 / mode.demand(SMS)  # tiles of 128 x 256
        waves += LAST_WAVE * (-waves % 1)
        tile_us = 2 * 128 * 256 * 4096 / (790e6 / 132 * 0.91)
        alone = (mode.us - H200.floor_us) * (1.0 if mode.name == "all" else CONTENDED) - H200.product_us
        assert alone <= waves * tile_us + 1e-6
        assert alone >= 0.98 * 2 * 4096**3 / 790e6 * 132 / mode.demand(SMS)
        assert mode.demand(BANDWIDTH) == pytest.approx(3 * 2 * 4096**2 / 4.3e6 / mode.us)
    assert [(mode.name, mode.demand(SMS)) for mode in task.modes] == [("all", 132.0), ("b", 68.0), ("a", 64.0)]


@pytest.mark.parametrize("name", MACHINES)
def test_sides_are_what_a_driver_gives(name: str) -> None:
    machine = node(name)
    for first in partitions(machine):
        one, other = sides(machine, first).values()
        assert one % 8 == 0 and one >= 8 and other >= 8 and one + other == machine.gpu.sms
    assert machine.devices == 1 and machine.bandwidth_tbs(machine.gpu.sms) == machine.gpu.bandwidth_tbs
    assert machine.bandwidth_tbs(8) == pytest.approx(8 * machine.gpu.bandwidth_tbs / (DRAWING * machine.gpu.sms))


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_product_runs_beside_an_attention_that_does_not_need_it() -> None:
    found = plan(canonical(PAIR), LARGE_PAIR, H200)
    assert found.timetable.makespan_us < found.serial_us / 1.1 and found.cycle_us is None and not found.cut.cuts
    assert {name for name, _ in found.queues.queues} == set(SIDE_QUEUES) and not found.queues.waits
    assert in_a_row(found, 3) is found.problem
    assert "beside" in plan_text(found) and "exchanges" not in plan_text(found)


def test_a_layer_is_cut_and_one_half_reads_its_cache_beside_products_of_the_other() -> None:
    found = plan(canonical(LAYER), LARGE_LAYER, H200)
    assert found.rank == "b" and len(found.cut.cuts) == 1 and found.cut.declined is None
    assert found.bound_us <= found.timetable.makespan_us < found.serial_us / 1.05
    slots, names = found.timetable.slots, [task.name for task in found.problem.tasks]
    attention = [slots[number] for number, name in enumerate(names) if name.startswith("U.")]
    products = [slots[number] for number, name in enumerate(names) if name.startswith(("Q.", "J.", "Y."))]
    assert any(a.start_us < p.end_us and p.start_us < a.end_us for a in attention for p in products)


@pytest.mark.parametrize("split", [False, True])
def test_what_runs_together_never_uses_more_bandwidth_than_there_is(split: bool) -> None:
    found = small_plan(split)
    assert not list(check_timetable(found.problem, found.timetable))
    slots = found.timetable.slots
    for at in {slot.start_us + 1e-6 for slot in slots}:
        pairs = zip(found.problem.tasks, slots, strict=True)
        held = [task.modes[slot.mode] for task, slot in pairs if slot.start_us <= at < slot.end_us]
        assert sum(mode.demand(BANDWIDTH) for mode in held) <= 1 + 1e-6
        assert sum(mode.demand(SMS) for mode in held) <= 132


def test_a_timetable_that_uses_more_bandwidth_is_found() -> None:
    reading = problem("cascade c(X[M], V[M]) -> Y[M], Z[M] { Y[m] = 2 * X[m]\n Z[m] = 3 * V[m] }", {"M": 1 << 26}, 64)
    modes = {name: number for number, name in enumerate(mode.name for mode in reading.tasks[0].modes)}
    table = Timetable(tuple(
        dataclasses.replace(slot, mode=modes[side], end_us=task.modes[modes[side]].us)
        for side, task, slot in zip("ab", reading.tasks, [Slot(0, 0.0, 0.0)] * 2, strict=True)
    ))  # fmt: skip
    assert any(BANDWIDTH in finding for finding in check_timetable(reading, table))


def test_two_tasks_on_one_side_are_found() -> None:
    found = small_plan(False)
    (one, other), tasks = found.timetable.slots, found.problem.tasks
    mode = [mode.name for mode in tasks[1].modes].index(tasks[0].modes[one.mode].name)
    moved = Slot(mode, other.start_us, other.start_us + tasks[1].modes[mode].us)
    assert any("of 1 sms " in finding for finding in check_timetable(found.problem, Timetable((one, moved))))


SHIPPED = {
    "pair": (PAIR, LARGE_PAIR),
    "layer": (LAYER, LARGE_LAYER),
    "layer of fewer keys": (LAYER, {**LARGE_LAYER, "N": 512}),
    "large layer": (LAYER, {**LARGE_LAYER, "B": 8192, "N": 2048}),
    "small layer": (LAYER, {**LARGE_LAYER, "B": 64}),
}


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("name", SHIPPED)
def test_a_plan_is_made_in_a_second(name: str, machine: str) -> None:
    text, sizes = SHIPPED[name]
    fresh = (dataclasses.replace(canonical(text), name=f"fresh_{number}") for number in range(3))
    assert within(least(lambda cascade: plan(cascade, sizes, node(machine)), fresh), 1.0)


def test_plans_never_take_longer_than_one_task_after_the_other_and_say_why() -> None:
    few = plan(canonical(LAYER), {**LARGE_LAYER, "B": 64}, H200)
    assert few.timetable.makespan_us == pytest.approx(few.serial_us) and not few.cut.cuts and few.way.first is None
    assert [name for name, _ in few.queues.queues] == [SMS] and not few.queues.waits
    assert few.cut.declined is not None and "64 coordinates are less than two tiles" in few.cut.declined
    assert f"{few.serial_us:.1f} us one after the other" in few.cut.declined
    assert {task["mode"] for task in plan_json(few)["tasks"]} == {"all"}
    stated = plan(canonical(LAYER + " schedule { split b into 8 }"), {**LARGE_LAYER, "B": 256}, H200)
    assert not stated.cut.cuts and stated.cut.declined is not None and "cut at 32, 64" in stated.cut.declined
    single = plan(canonical("cascade c(X[M]) -> Y[M] { Y[m] = 2 * X[m] }"), {"M": 128}, H200)
    assert single.cut.declined is not None and single.cut.declined.startswith("there is one task")
    for found in (few, stated, single):
        assert found.timetable.makespan_us <= found.serial_us * (1 + 1e-9)
    for found in (small_plan(False), small_plan(True)):
        assert found.timetable.makespan_us <= (1 - LEAST_GAIN) * found.serial_us


def test_what_a_plan_is_compared_with_has_one_queue() -> None:
    found = whole(canonical(PAIR), LARGE_PAIR, H200)
    assert found.timetable.makespan_us == pytest.approx(found.serial_us)
    assert [name for name, _ in found.queues.queues] == [SMS]


def test_a_mesh_of_more_devices_is_refused() -> None:
    text = LAYER + " schedule { mesh tp = 2\n shard h over tp }"
    with pytest.raises(UnsupportedError, match="C554"):
        plan(canonical(text), LARGE_LAYER, H200)


def test_a_wait_that_is_missing_is_found() -> None:
    found = small_plan(True)
    apart = kept_apart(found.problem, found.timetable)
    assert found.queues.waits and not list(over_synchronised(apart, found.queues))
    for number in range(len(found.queues.waits)):
        waits = found.queues.waits[:number] + found.queues.waits[number + 1 :]
        assert list(check_queues(apart, Queues(found.queues.queues, waits))), found.queues.waits[number]


def test_whatever_the_queues_allow_at_a_time_fits_the_device() -> None:
    found = plan(canonical(LAYER), LARGE_LAYER, H200)
    modes = [task.modes[slot.mode] for task, slot in zip(found.problem.tasks, found.timetable.slots, strict=True)]
    behind: dict[int, set[int]] = {n: set() for n in range(len(modes))}
    edges = implied(found.queues)
    for _ in modes:  # as long as a way can be
        for late, early in edges:
            behind[late] |= {early} | behind[early]
    for one, other in itertools.combinations(range(len(modes)), 2):
        if one not in behind[other] and other not in behind[one]:
            for name, most in found.problem.capacities:
                assert modes[one].demand(name) + modes[other].demand(name) <= most + 1e-6, (one, other, name)


@pytest.mark.parametrize("machine", MACHINES)
def test_the_command_plans_for_one_gpu(machine: str, tmp_path: Path) -> None:
    path = tmp_path / "pair.cascade"
    path.write_text(PAIR, encoding="utf-8")
    sizes = [word for name, size in LARGE_PAIR.items() for word in ("-s", f"{name}={size}")]
    result = CliRunner().invoke(commands, ["plan", str(path), "--machine", machine, *sizes, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert found["machine"] == machine and (found["partition"] is None) == (found["otherwise"] is None)
    if machine == "a100":  # what its memory gives takes half of its SMs: beside each other both wait
        assert found["partition"] is None and "beside each other tasks take" in found["declined"]
        return
    assert sum(found["partition"]) == MACHINES[machine].sms
    assert {task["resource"]: task["sms"] for task in found["tasks"]} == dict(
        zip(SIDE_QUEUES, found["partition"], strict=True)
    )


# --- what is run -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize("split", [False, True])
def test_a_plan_means_what_its_cascade_means_without_a_process_group(split: bool, by_kernels: bool) -> None:
    assert not torch.distributed.is_initialized()
    found = small_plan(split)
    text, sizes = (LAYER, SMALL_LAYER) if split else (PAIR, SMALL_PAIR)
    source = canonical(text)
    inputs = random_inputs(source, sizes, param_types(source, DType.F64), 0)
    wanted = interp.run(source, inputs, sizes, Precision.REFERENCE)
    loaded = cascade.distributed.load(json.dumps(plan_json(found)), kernels=by_kernels)
    results = loaded(Precision.REFERENCE, **inputs)
    for name, data in results.items():
        torch.testing.assert_close(data.double(), wanted[name].double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("faster", ["beside", "row"])
def test_the_faster_way_on_the_device_is_kept(faster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    source = canonical(PAIR)
    inputs = random_inputs(source, SMALL_PAIR, param_types(source, DType.F64), 0)
    made = plan_json(small_plan(False))
    loaded = cascade.distributed.load(json.dumps(made), kernels=True, effort="quick")
    ways = {"beside": loaded.executor, "row": loaded.otherwise}
    assert loaded.otherwise is not None and {task.queue for task in loaded.otherwise.tasks} == {SMS}
    loaded(**inputs)
    assert loaded.otherwise is not None and loaded.why is None, "a CPU has no clock to ask"
    monkeypatch.setattr(runtime, "_can_time", lambda device: True)
    monkeypatch.setattr(runtime, "_ms", lambda way, tensors: 1.0 if way is ways[faster] else 2.0)
    results = loaded(**inputs)
    assert loaded.executor is ways[faster] and loaded.otherwise is None
    assert loaded.why is not None and loaded.why.startswith({"beside": "beside", "row": "one after"}[faster])
    wanted = interp.run(source, inputs, SMALL_PAIR, Precision.REFERENCE)
    for name, data in results.items():
        torch.testing.assert_close(data.double(), wanted[name].double(), rtol=1e-12, atol=1e-12)
    assert cascade.distributed.load(made, kernels=True).otherwise is None, "without an effort nothing is timed"


def test_what_runs_otherwise_is_a_program_without_exchanges() -> None:
    made = json.loads(json.dumps(plan_json(small_plan(False))))
    for change in ({"tasks": []}, {"program": ""}, {"tasks": made["otherwise"]["tasks"] * 2}):
        with pytest.raises(CallError, match="C347"):
            cascade.distributed.load({**made, "otherwise": {**made["otherwise"], **change}}, effort="quick")


def test_a_plan_for_several_devices_needs_a_process_group() -> None:
    text = "cascade c(X[M,K], W[K,N]) -> Y[M,N] { Y[m,n] = X[m,k] * W[k,n] } schedule { mesh p = 2\n shard k over p }"
    found = plan_json(plan(canonical(text), {"M": 256, "K": 256, "N": 256}, node("h100x8")))
    with pytest.raises(CallError, match="C348"):
        cascade.distributed.load(found)


# --- streams ---------------------------------------------------------------------------------------------------------


class Driver:
    """A driver of 132 SMs that gives them in eights; what it is asked is kept."""

    def __init__(self, rounds_to: int = 8) -> None:
        self.rounds_to = rounds_to
        self.asked: list[str] = []
        self.contexts: list[int] = []

    def __call__(self, name: str, *arguments: Any) -> None:
        self.asked.append(name)
        getattr(self, name, lambda *_: None)(*arguments)

    def cuDeviceGetDevResource(self, device: Any, resource: Any, kind: int) -> None:
        assert kind == confined.SM_RESOURCE
        self.put(resource, 132)

    def cuDevSmResourceSplitByCount(self, group: Any, _: Any, whole: Any, rest: Any, flags: int, least: Any) -> None:
        count = -(-least.value // self.rounds_to) * self.rounds_to
        self.put(group, count)
        self.put(rest, 132 - count)

    def cuDevResourceGenerateDesc(self, described: Any, resource: Any, count: Any) -> None:
        self.contexts.append(confined._count(resource))

    def cuGreenCtxStreamCreate(self, stream: Any, context: Any, flags: Any, priority: Any) -> None:
        stream._obj.value = 7 + len(self.contexts)

    def put(self, resource: Any, count: int) -> None:
        ctypes.c_uint.from_buffer(resource, confined.COUNT_AT).value = count


def test_sides_share_no_multiprocessor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(confined, "_stream", lambda handle, number, sms, why: (handle, sms))
    driver: Any = Driver()
    found: Any = confined._split(driver, 56, 0)
    assert found == ((8, 56), (9, 76)) and driver.contexts == [56, 76]
    assert driver.asked.count("cuGreenCtxCreate") == 2 and driver.asked.count("cuDevSmResourceSplitByCount") == 1


def test_what_does_not_split_is_refused_with_a_reason() -> None:
    driver: Any = Driver()
    with pytest.raises(confined._RefusedError, match="132 SMs and a rest"):
        confined._split(driver, 132, 0)
    missing: Any = confined._Driver.__new__(confined._Driver)
    missing.library = object()
    with pytest.raises(confined._RefusedError, match="the driver has no cuDeviceGet"):
        missing("cuDeviceGet")


def test_without_such_a_driver_streams_are_ordinary_and_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> Any:
        raise OSError(f"{name}: not found")

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(ctypes, "CDLL", absent)
    monkeypatch.setattr(confined, "_ordinary", lambda number, why: (number, why))
    found: Any = confined.sides(24, 3)
    assert found == ((3, "libcuda.so.1: not found"),) * 2
    confined._sides.cache_clear()
