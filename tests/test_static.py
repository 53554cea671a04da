"""Every kernel that the benchmarks run, compiled for a GPU that is not there: what its machine code shows.

With this Triton and with the oldest one that is supported, at the sizes of the benchmarks and with the planner's own
tiles: nothing spills, no product waits for the one before it, tiles that were planned by descriptor come by descriptor.
How many blocks fit on a multiprocessor is written down in `tests/cases/static`, a file for each Triton;
`pytest tests/test_static.py --update-golden` writes them.
"""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import functools
import pickle
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import pytest

from benchmarks import programs
from cascade import trial
from cascade.backends.triton.emit import Source, emit
from cascade.backends.triton.machine import MACHINES
from cascade.backends.triton.offline import Failure, StaticFacts, facts
from cascade.backends.triton.partition import Group, Rest
from cascade.backends.triton.restate import restated
from cascade.backends.triton.plan import Dot, Kernel, Load, every_op
from cascade.backends.triton.planner import Planner
from cascade.backends.triton.standalone import contiguous
from cascade.backends.triton.static import request
from cascade.backends.triton.tune import candidates, choose, planned
from cascade.frontend.build import parse_cascade
from cascade.ir import DType
from cascade.pipeline import run_pipeline
from cascade.settings import settings
from tests.block_programs import BLOCKS
from tests.kernel_programs import PROGRAMS

ROOT = Path(__file__).parent.parent
TRITON36 = ROOT / ".venv-triton36" / "bin" / "python"
GOLDEN = Path(__file__).parent / "cases" / "static"
WGMMA_ROWS = 64  # with fewer a product runs on the tensor cores of a warp, synchronously

pytestmark = pytest.mark.campaign

CAUSAL = "n <= m"
ALIBI = "{s} - slope[h] * (m - n)"
SOFTCAP = "30.0 * tanh({s} / 30.0)"
D128 = {"B": 4, "H": 32, "M": 4096, "N": 4096, "E": 128, "F": 128}
D64 = {**D128, "E": 64, "F": 64}
GROUPED = {"B": 2, "H": 32, "G": 8, "M": 8192, "N": 8192, "E": 128, "F": 128}
ROWS = {"M": 16384, "N": 8192}


@dataclass(frozen=True)
class Shipped:
    """A program of the benchmarks, or a recurrence of the tests, at one of the sizes that are timed."""

    name: str
    text: str
    sizes: Mapping[str, int]


def attentions() -> Iterator[Shipped]:
    """Attention with its variants, for heads of 64 and of 128."""
    for width, sizes in ((128, D128), (64, D64)):
        yield Shipped(f"full D{width}", programs.attention(), sizes)
        yield Shipped(f"causal D{width}", programs.attention(where=CAUSAL), sizes)
        yield Shipped(f"window D{width}", programs.attention(where=f"{CAUSAL} and m - n < 1024"), sizes)
        yield Shipped(f"alibi D{width}", programs.attention(1, ALIBI, CAUSAL, ", slope: f32[H]"), sizes)
        yield Shipped(f"softcap D{width}", programs.attention(score=SOFTCAP), sizes)
        narrow = {**GROUPED, "E": width, "F": width}
        yield Shipped(f"grouped D{width}", programs.attention(4, where=CAUSAL), narrow)
        yield Shipped(f"decode D{width}", programs.decode(4), {**narrow, "B": 32})
    keep = programs.attention(where=f"{CAUSAL} and keep[b,n]", params=", keep: bool[B,N]")
    yield Shipped("padded D64", keep, D64)
    yield Shipped("differential", programs.DIFFERENTIAL, {**D128, "H": 16})
    yield Shipped("sigmoid", programs.SIGMOID, {**D128, "H": 16})


SHIPPED = (
    *attentions(),
    Shipped("softmax", programs.SOFTMAX, ROWS),
    Shipped("softmax, long rows", programs.SOFTMAX, {"M": 2048, "N": 131072}),
    Shipped("rmsnorm", programs.RMSNORM, ROWS),
    Shipped("residual rmsnorm", programs.RESIDUAL_RMSNORM, ROWS),
    Shipped("layernorm", programs.LAYERNORM, ROWS),
    Shipped("entropy", programs.ENTROPY, ROWS),
    Shipped("kl", programs.KL, ROWS),
    Shipped("variance", programs.VARIANCE, ROWS),
    Shipped("cumulative sum", programs.CUMULATIVE_SUM, ROWS),
    Shipped("decayed state", PROGRAMS["decayed_state"].text, ROWS),
    Shipped("scan between maps", PROGRAMS["scan_between_maps"].text, ROWS),
    Shipped("states by length", PROGRAMS["states_by_length"].text, {"B": 8, "N": 4096, "D": 2048}),
    Shipped("routing", programs.ROUTE, {"T": 65536, "N": 256}),
    Shipped("gemm", programs.MATMUL, {"M": 8192, "N": 4096, "K": 4096}),
    Shipped("gemm, bias, gelu", programs.MATMUL_GELU, {"M": 8192, "N": 4096, "K": 4096}),
    Shipped("linear, cross-entropy", programs.LINEAR_LOSS, {"T": 8192, "D": 4096, "V": 128256}),
    Shipped("batched gemm", programs.MATMUL_BATCHED, {"B": 16, "M": 2048, "N": 2048, "K": 2048}),
    Shipped("rmsnorm, linear", programs.RMSNORM_LINEAR, {"T": 8192, "D": 4096, "F": 4096}),
    Shipped("rmsnorm, linear of few rows", programs.RMSNORM_LINEAR, {"T": 16, "D": 4096, "F": 4096}),
    Shipped("layernorm, linear", programs.LAYERNORM_LINEAR, {"T": 8192, "D": 4096, "F": 4096}),
    Shipped("weights of 8 bits", programs.INT8_LINEAR, {"T": 8192, "D": 4096, "F": 4096}),
    Shipped("weights of 4 bits", programs.INT4_LINEAR, {"T": 16, "D": 4096, "F": 4096, "E": 2048, "G": 32}),
    Shipped("gated mlp", programs.GATED_MLP, {"T": 8192, "D": 4096, "F": 14336}),
    Shipped("experts", programs.EXPERTS.format(chosen=2), {"T": 8192, "D": 4096, "F": 14336, "N": 8}),
    Shipped("many experts", programs.EXPERTS.format(chosen=6), {"T": 8192, "D": 2048, "F": 1408, "N": 64}),
    Shipped("experts of few rows", programs.EXPERTS.format(chosen=2), {"T": 64, "D": 4096, "F": 14336, "N": 8}),
)
SEPARATE = programs.attention(where="doc[b,m] == doc[b,n]", params=", doc: i64[B,M]", square=True)
RAGGED = programs.decode(4).replace("]) ->", "], len: i32[B]) ->").replace("sqrt(E)", "sqrt(E) where n < len[b]", 1)
PAGES = Shipped(
    "pages", PROGRAMS["paged"].text, {"B": 32, "H": 8, "M": 8, "C": 16384, "L": 512, "W": 16, "E": 128, "F": 128}
)
BEFORE = (Shipped("documents", SEPARATE, {**D64, "M": 8192}), Shipped("ragged", RAGGED, {**GROUPED, "B": 32}), PAGES)
PAGED = ("pages_bounds", "pages", "pages_merge")
VERSIONS = ("3.9", "3.6")
CROWDED = {
    ("3.9", "alibi D128"), ("3.6", "alibi D128"), ("3.6", "window D128"), ("3.6", "rmsnorm"),
}  # fmt: skip
"""What runs out of registers with the planner's own tiles, so that products may wait; the machine model takes others."""


@dataclass(frozen=True)
class Built:
    """One kernel of a program, as it would be launched."""

    kernel: Kernel
    source: Source


def kernels(planner: Planner, name: str) -> Iterator[Built]:
    """The kernels of a cascade; a stream that is shared takes one more, which merges."""
    groups = planner.groups()
    for number, group in enumerate(groups):
        assert not isinstance(group, Rest), f"{name}: {group.reason}"
        label = name if len(groups) == 1 else f"{name}_{number}"
        tiling = planner.default_tiling(group)
        if planner.uneven(group) is not None:
            tiling = dataclasses.replace(tiling, parts=max(tiling.parts, 2), even=True)
        merger = None
        if tiling.parts > 1:
            kernel, merger, _ = planner.split(label, group, groups, tiling)
        else:
            kernel = planner.kernel(label, group, groups, tiling)
        if kernel.index is not None:
            yield from kernels(planner.indexer(kernel.index, groups), f"{label}_bounds")
        yield Built(kernel, emit(kernel))
        if merger is not None:
            yield from kernels(merger, f"{label}_merge")


@functools.cache
def built(name: str) -> tuple[Built, ...]:
    """The kernels of a shipped program."""
    planner = planner_of(next(item for item in SHIPPED if item.name == name))
    return tuple(kernels(planner, planner.cascade.name))


def planner_of(shipped: Shipped, working: DType = DType.BF16) -> Planner:
    """The planner of a program on tensors of one type."""
    cascade = run_pipeline(parse_cascade(shipped.text), check=1).final
    types = trial.param_types(cascade, working)
    layouts = {
        param.name: contiguous([s if isinstance(s, int) else shipped.sizes[s] for s in param.shape], types[param.name])
        for param in cascade.params
    }
    found = restated(cascade, shipped.sizes, types, shipped.sizes)
    return Planner(found.cascade, found.joined.extents(shipped.sizes), layouts, joined=found.joined.sizes)


def python_of(version: str) -> str:
    """The interpreter with that Triton."""
    python = str(TRITON36) if version == "3.6" else sys.executable
    if not Path(python).exists():
        pytest.skip("no .venv-triton36; `make test` makes it")
    return python


Facts: TypeAlias = dict[str, tuple[StaticFacts | Failure, ...]]
"""What the kernels of programs show, by the name of the program."""


def shown(wanted: Mapping[str, tuple[Built, ...]], version: str, label: str) -> Facts:
    """What kernels show with one Triton, all compiled in one go by the worker of this run that asks first.

    The others wait for it: it has a compiler for each of two processors.
    """
    python, path = python_of(version), settings().cache_dir / f"{label}-{version}.pickle"
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            requests = [request(one.kernel, one.source) for many in wanted.values() for one in many]
            path.write_bytes(pickle.dumps(facts(requests, "sm_90", python, 2)))
        found = iter(pickle.loads(path.read_bytes()))
    return {name: tuple(next(found) for _ in many) for name, many in wanted.items()}


@functools.cache
def compiled(version: str) -> Facts:
    """What all kernels show with one Triton."""
    return shown({shipped.name: built(shipped.name) for shipped in SHIPPED}, version, "shipped")


def wide_products(kernel: Kernel) -> bool:
    """Whether every product of a kernel has rows enough for asynchronous tensor cores, and 16-bit operands."""
    dtypes = {name: dtype for name, _, dtype in kernel.variables}
    dots = products(kernel)
    short = all(dtypes.get(op.left) in (DType.BF16, DType.F16) for op in dots)
    return bool(dots) and short and all(kernel.axis(op.axes[0]).tile >= WGMMA_ROWS for op in dots)


@pytest.mark.parametrize("name", [shipped.name for shipped in SHIPPED])
@pytest.mark.parametrize("version", VERSIONS)
def test_machine_code_is_as_planned(version: str, name: str) -> None:
    for one, found in zip(built(name), compiled(version)[name], strict=True):
        assert isinstance(found, StaticFacts), f"{one.kernel.name}: {found.message}"
        assert found.triton.startswith(f"{version}.")
        if (version, name) not in CROWDED:
            assert found.spills == 0, f"{one.kernel.name} spills {found.spills} bytes a thread"
            assert found.serialized == (), f"{one.kernel.name}: products wait for each other, {found.serialized}"
        assert found.blocks_per_sm > 0, f"{one.kernel.name} does not fit on a multiprocessor"
        if wide_products(one.kernel):
            assert found.wgmma > 0 and found.waits > 0, f"{one.kernel.name} has no asynchronous product"
        if any(isinstance(op, Load) and op.box is not None for op in every_op(one.kernel.ops)):
            assert found.tma_loads > 0, f"{one.kernel.name} loads no tile by descriptor"


@functools.cache
def fine() -> dict[str, Built]:
    """Kernels of f32 at sizes of the benchmarks, with the planner's own tiles."""
    found = {}
    for name, text, sizes in (
        *(
            (f"full D{width}", programs.attention(), {**D128, "E": width, "F": width})
            for width in (64, 80, 128, 192, 256)
        ),
        ("softcap D128", programs.attention(score=SOFTCAP), D128),
        ("causal D64", programs.attention(where=CAUSAL), D64),
        ("decode D128", programs.decode(4), {**GROUPED, "B": 32}),
        ("gemm", programs.MATMUL, {"M": 4096, "N": 4096, "K": 4096}),
        ("batched gemm", programs.MATMUL_BATCHED, {"B": 16, "M": 2048, "N": 2048, "K": 2048}),
        ("linear, cross-entropy", programs.LINEAR_LOSS, {"T": 8192, "D": 4096, "V": 128256}),
        ("gated mlp", programs.GATED_MLP, {"T": 8192, "D": 4096, "F": 14336}),
    ):
        planner = planner_of(Shipped(name, text, sizes), DType.F32)
        found |= {f"{name} {number}": one for number, one in enumerate(kernels(planner, "c")) if products(one.kernel)}
    return found


def products(kernel: Kernel) -> list[Dot]:
    """The matrix products of a kernel."""
    return [op for op in every_op(kernel.ops) if isinstance(op, Dot)]


@pytest.mark.parametrize("version", VERSIONS)
def test_products_of_f32_run_on_the_tensor_cores_in_f64(version: str) -> None:
    answers = facts([request(one.kernel, one.source) for one in fine().values()], "sm_90", python_of(version), 2)
    assert len(answers) >= 12
    for (name, one), found in zip(fine().items(), answers, strict=True):
        assert isinstance(found, StaticFacts), f"{name}: {found}"
        assert all(op.exact for op in products(one.kernel)), name
        assert found.mma_f64 == found.mma > 0, f"{name} multiplies elsewhere"
        assert found.spills == 0, f"{name} spills {found.spills} bytes a thread"
        assert found.num_warps * found.blocks_per_sm >= 8, f"{name} has {found.blocks_per_sm} blocks"


@pytest.mark.parametrize("version", VERSIONS)
def test_products_of_f32_fit_on_a_multiprocessor(version: str) -> None:
    """Two, each with an operand that a tile has whole, in pieces, or where both would be too long goes through.

    Or one whose operand is computed of others, which lie there too.
    """
    shipped = [
        *(Shipped("KL", programs.LINEAR_KL, {"T": 37, "D": wide, "E": wide, "V": 131}) for wide in (300, 521, 1024)),
        Shipped("in groups", BLOCKS["loss_of_bytes_in_groups"].text, {"T": 37, "D": 700, "F": 70, "G": 6}),
    ]
    found = []
    for planner in (planner_of(one, DType.F32) for one in shipped):
        groups = planner.groups()
        for group in groups:
            assert not isinstance(group, Rest)
            tiling = choose(planner, "c", group, groups, MACHINES["h200"]).tiling
            kernel, _ = planned(planner, "c", group, groups, tiling)
            found.append(Built(kernel, emit(kernel)))
    answers = facts([request(one.kernel, one.source) for one in found], "sm_90", python_of(version), 2)
    for one, answer in zip(found, answers, strict=True):
        assert isinstance(answer, StaticFacts), f"{one.kernel.statements}: {answer}"
        assert answer.blocks_per_sm > 0, f"{one.kernel.axes} takes {answer.shared_bytes} bytes"


@functools.cache
def going_on() -> tuple[Built, ...]:
    """Kernels of which a few programs go through all tiles, as the tables of candidates have them."""
    found = []
    for name in ("gemm", "gemm, bias, gelu", "batched gemm"):
        planner = planner_of(next(item for item in SHIPPED if item.name == name))
        ((group,), groups) = planner.groups(), planner.groups()
        assert not isinstance(group, Rest)
        for tiling in candidates(planner, group):
            if tiling.options.resident:
                kernel = planner.kernel("c", group, groups, tiling)
                assert kernel.options == tiling.options
                found.append(Built(kernel, emit(kernel)))
    return tuple(found)


@pytest.mark.parametrize("version", VERSIONS)
def test_kernels_before_others_do_not_spill(version: str) -> None:
    python = python_of(version)
    wanted = [built for item in BEFORE for built in kernels(planner_of(item), item.name)]
    names = [one.kernel.name for one in wanted]
    assert names == ["documents_bounds", "documents", "ragged_bounds", "ragged", "ragged_merge", *PAGED]
    for name, found in zip(
        names, facts([request(b.kernel, b.source) for b in wanted], "sm_90", python, 2), strict=True
    ):
        assert isinstance(found, StaticFacts), f"{name}: {found}"
        assert found.spills == 0 and not found.serialized, f"{name}: {found.spills} bytes, {found.serialized}"


@pytest.mark.parametrize("version", VERSIONS)
def test_programs_that_go_on_overlap(version: str) -> None:
    requests = [request(one.kernel, one.source) for one in going_on()]
    answers = facts(requests, "sm_90", python_of(version), 2)
    assert len(answers) > 15
    for one, found in zip(going_on(), answers, strict=True):
        told = f"{one.kernel.statements} {one.kernel.options}"
        assert isinstance(found, StaticFacts), told
        assert (found.serialized, found.waits) == ((), 3), told  # of a round, of a tile, of the last
        crowded = one.kernel.options.pieces == 1 and len(one.kernel.statements) > 1
        assert found.spills <= (128 if crowded else 0), told
        assert found.blocks_per_sm == one.kernel.options.resident, told
        assert found.tma_stores == one.kernel.options.pieces, told


@functools.cache
def in_order(name: str) -> tuple[Built, ...]:
    """The kernels whose rows are sorted by an index: with the planner's own tiles, and with the model's first."""
    planner = planner_of(next(item for item in SHIPPED if item.name == name))
    groups = planner.groups()
    found = []
    for number, group in enumerate(groups):
        assert not isinstance(group, Rest)
        if group.rows is None:
            continue
        chosen = choose(planner, f"c_{number}", group, groups, MACHINES["h100"])
        for tiling in (planner.default_tiling(group), chosen.tiling):
            kernel = planner.kernel(f"c_{number}", group, groups, tiling)
            found.append(Built(kernel, emit(kernel)))
    return tuple(found)


def test_a_loop_of_two_products_over_sorted_rows_is_not_joined_with_one_of_tiles() -> None:
    """In a joined loop both sums begin anew between products, which then wait for each other: C7515 of the assembler."""
    planner = planner_of(next(item for item in SHIPPED if item.name == "experts"))
    groups = [group for group in planner.groups() if isinstance(group, Group) and group.rows is not None]
    joined = [any(tiling.options.resident for tiling in candidates(planner, group)) for group in groups]
    assert [len(planner.products(group)) for group in groups] == [2, 1] and joined == [False, True]


@functools.cache
def facts_in_order(version: str) -> Facts:
    """What they show with one Triton."""
    return shown({item.name: in_order(item.name) for item in SHIPPED if "experts" in item.name}, version, "in-order")


@pytest.mark.parametrize("name", [item.name for item in SHIPPED if "experts" in item.name])
@pytest.mark.parametrize("version", VERSIONS)
def test_gathered_rows_and_boxes_of_operands_overlap(version: str, name: str) -> None:
    assert len(in_order(name)) == 4
    for one, found in zip(in_order(name), facts_in_order(version)[name], strict=True):
        told = f"{one.kernel.statements} {one.kernel.options}"
        assert isinstance(found, StaticFacts), told
        assert (found.spills, found.serialized) == (0, ()), told
        assert found.blocks_per_sm > 0 and found.tma_loads > 0 and found.async_copies > 0, told
        if wide_products(one.kernel):
            assert found.wgmma > 0 and found.waits > 0, told


@pytest.mark.parametrize(("version", "name"), sorted(CROWDED))
def test_what_is_known_to_spill_still_does(version: str, name: str) -> None:
    spilt = [found.spills for found in compiled(version)[name] if isinstance(found, StaticFacts)]
    assert any(spilt), f"{name} no longer spills with Triton {version}: take it out of CROWDED"


@pytest.mark.parametrize("version", VERSIONS)
def test_blocks_that_fit_on_a_multiprocessor(version: str, update_golden: bool) -> None:
    text = table(compiled(version))
    path = GOLDEN / f"triton-{version}.txt"
    if update_golden:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8")
    change = difflib.unified_diff(expected.splitlines(), text.splitlines(), "expected", "found", lineterm="")
    assert text == expected, "\n".join(change)


def table(found: Mapping[str, tuple[StaticFacts | Failure, ...]]) -> str:
    """A line for each kernel: its tiles, and how many blocks of how much shared memory fit."""
    rows = [("program", "kernel", "tile", "warps", "stages", "blocks/SM", "shared")]
    for name, many in found.items():
        for one, known in zip(built(name), many, strict=True):
            tile = " ".join(f"{axis.rank}{axis.tile}" for axis in one.kernel.axes if axis.tile > 1)
            options = one.kernel.options
            facts_ = (known.blocks_per_sm, known.shared_bytes) if isinstance(known, StaticFacts) else ("-", "-")
            words = (name, one.kernel.name, tile, options.num_warps, options.num_stages, *facts_)
            rows.append(tuple(map(str, words)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() + "\n" for row in rows
    )
