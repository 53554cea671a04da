"""Plans: the same every time, made by algebra alone, and with the axes and groups that the extents call for."""

from __future__ import annotations

import ast
import io
import itertools
import math
import os
import pathlib
import subprocess
import sys
import tokenize

import pytest
import torch

import cascade
from cascade.backends.triton.explain import Launch, describe
from cascade.backends.triton.partition import Arrangement, Group, Rest
from cascade.backends.triton.plan import Dot, Fold, Kernel, Loop, Role, every_op, render_kernel
from cascade.backends.triton.planner import powers
from cascade.ir import DType
from cascade.walk import reads
from tests.kernel_programs import PROGRAMS
from tests.planned import all_kernels, emitted, final, only_group, planner_for
from tests.tolerance import Draw

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = pathlib.Path(__file__).parent.parent
BACKENDS = sorted((ROOT / "cascade" / "backends").rglob("*.py"))
WORKLOADS = (
    "attention", "softmax", "flash", "layernorm", "layer_norm", "rmsnorm", "rms_norm", "gemm", "matmul", "convolution",
    "decode", "prefill", "causal", "alibi", "softcap", "moe", "expert", "transformer", "llama",
    "cross_entropy", "logsumexp", "kv_cache", "paged",
)  # fmt: skip


def kernels(name: str, dtype: torch.dtype = torch.float16, **sizes: int) -> tuple[Kernel, ...]:
    """The kernels of a program at small sizes, some of them replaced."""
    program = PROGRAMS[name]
    draw = Draw(program, {**program.small, **sizes}, dtype=dtype)
    return all_kernels(planner_for(final(program.text), draw.inputs(0), draw.given()))


def texts() -> str:
    """The plan and the text of the kernels of every other program."""
    return "\n".join(
        part
        for name in list(PROGRAMS)[::2]
        for kernel in kernels(name)
        for part in (render_kernel(kernel), emitted(kernel))
    )


# --- sums along a stream ---------------------------------------------------------------------------------------------


def folds_in_loops(name: str, **sizes: int) -> list[str]:
    """The tensors that the loops of a program's kernels add up."""
    ops = [op for kernel in kernels(name, **sizes) for loop in kernel.ops if isinstance(loop, Loop) for op in loop.body]
    return [op.name for op in ops if isinstance(op, Fold) and op.reducer == "sum"]


def test_a_sum_is_added_up_behind_the_loop_where_nothing_needs_it_before() -> None:
    assert folds_in_loops("row_sum", N=40_000) == []
    assert "A_sum_1" not in folds_in_loops("variance", N=40_000)
    assert "W_sum_sum_1" in folds_in_loops("variance", N=40_000)  # the average of every tile needs it


def test_a_row_that_is_gone_through_again_has_no_registers_for_that() -> None:
    assert folds_in_loops("layernorm", N=40_000)


# --- the same every time ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_plan_prints_and_is_made_the_same_again(name: str) -> None:
    first, second = kernels(name), kernels(name)
    assert first == second
    for kernel in first:
        text = render_kernel(kernel)
        assert text.startswith(f"kernel {kernel.name} {{\n") and text.endswith("}\n")
        assert text == render_kernel(next(other for other in second if other.name == kernel.name))
        assert all(f"{axis.role.value} {axis.rank} = " in text for axis in kernel.axes)
        assert "<" not in text.replace("<=", "").replace(" < ", ""), "an object without a text of its own"


def test_the_seed_of_hashes_shows_nowhere() -> None:
    script = "import hashlib\nfrom tests.test_plan import texts\nprint(hashlib.sha256(texts().encode()).hexdigest())"
    found = []
    for seed in ("1", "4242"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        made = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=ROOT, check=True
        )
        found.append(made.stdout.split()[-1])
    assert found[0] == found[1]


# --- algebra alone ---------------------------------------------------------------------------------------------------


def words_of(path: pathlib.Path) -> set[str]:
    """The names, strings and words of strings of a source file, comments and docstrings aside, in lower case."""
    source = path.read_text()
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        first.value.lineno
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(first := node.body[0], ast.Expr)
    }
    kinds = (tokenize.NAME, tokenize.STRING)
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {
        t.string.lower()
        for t in tokens
        if t.type in kinds and not (t.type == tokenize.STRING and t.start[0] in docstrings)
    }


@pytest.mark.parametrize("path", BACKENDS, ids=lambda path: path.stem)
def test_no_workload_has_a_name(path: pathlib.Path) -> None:
    found = {(word, name) for word in words_of(path) for name in WORKLOADS if name in word}
    assert not found


@pytest.mark.parametrize("path", BACKENDS, ids=lambda path: path.stem)
def test_no_workload_has_a_name_in_prose(path: pathlib.Path) -> None:
    text = path.read_text().lower()
    assert not [name for name in WORKLOADS if name in text]


# --- groups ----------------------------------------------------------------------------------------------------------


def groups(text: str, given: dict[str, int] | None = None, **shapes: tuple[int, ...]) -> tuple[Group | Rest, ...]:
    """The groups of a program on tensors of these shapes."""
    return planner_for(final(text), {name: torch.zeros(shape) for name, shape in shapes.items()}, given).groups()


def test_what_a_fold_joins_is_one_group() -> None:
    draw = Draw(PROGRAMS["causal"], PROGRAMS["causal"].large[1])
    shapes = {name: spec.extents(draw.sizes) for name, spec in PROGRAMS["causal"].inputs.items()}
    (group,) = groups(PROGRAMS["causal"].text, **shapes)
    assert isinstance(group, Group) and group.fold is not None
    assert group.arrangement.stream == "n" and set(group.arrangement.shared) == {"b", "h", "m"}
    assert set(group.arrangement.whole) == {"e", "f"}


CHAIN = "cascade c(A[M,K], B[K,N], D[N,P]) -> Y[M,P] {\n C[m,n] = A[m,k] * B[k,n]\n Y[m,p] = C[m,n] * D[n,p]\n}"
NORMED = PROGRAMS["norm_gemm"].text


def test_a_chain_of_long_products_is_two_groups() -> None:
    first, second = groups(CHAIN, A=(256, 4096), B=(4096, 4096), D=(4096, 4096))
    assert isinstance(first, Group) and first.names == ("C",) and first.arrangement.stream == "k"
    assert isinstance(second, Group) and second.names == ("Y",) and second.arrangement.stream == "n"


def test_a_norm_and_the_long_product_behind_it_are_two_groups() -> None:
    first, second = groups(NORMED, A=(2048, 4096), g=(4096,), B=(4096, 4096))
    assert isinstance(first, Group) and first.arrangement.shared == ("m",) and first.arrangement.whole == ("k",)
    assert isinstance(second, Group) and second.arrangement.shared == ("m", "n") and second.arrangement.stream == "k"


def test_an_operand_that_two_products_read_is_made_apart_from_a_wide_one() -> None:
    """It is stored for the other anyway, and a thousand columns that lie whole in a tile leave few rows for each."""
    text = """cascade both(X[T,D], g[D], Q[H,D], K[F,D]) -> A[T,H], B[T,F] {
        Y[t,d] = X[t,d] * g[d]; A[t,h] = Y[t,d] * Q[h,d]; B[t,f] = Y[t,d] * K[f,d]
    }"""
    shapes = {"X": (4096, 8192), "g": (8192,), "Q": (8192, 8192), "K": (1024, 8192)}
    found = planner_for(final(text), {n: torch.empty(s, dtype=torch.bfloat16) for n, s in shapes.items()}).groups()
    assert [group.names for group in found] == [("Y",), ("A",), ("B",)]


def test_a_norm_that_is_short_goes_with_its_product() -> None:
    (group,) = groups(NORMED, A=(9, 21), g=(21,), B=(21, 11))
    assert isinstance(group, Group) and group.arrangement.stream == "k" and group.fold is not None


def test_a_total_of_rows_is_a_group_of_its_own() -> None:
    first, second = groups(PROGRAMS["mean_cross_entropy"].text, X=(64, 1000), y=(64,))
    assert isinstance(first, Group) and isinstance(second, Group)
    assert first.arrangement.shared == ("m",) and second.arrangement.shared == ()


def test_what_no_kernel_computes_says_why() -> None:
    text = "cascade c(X[N]) -> A[N], B[N] {\n A[n] = B[n-1] + X[n] init A[-1] = 0\n B[n] = A[n-1] init B[-1] = 0\n}"
    (rest,) = groups(text, X=(37,))
    assert isinstance(rest, Rest) and rest.names == ("A", "B")
    assert rest.reason == "its statements need each other's earlier coordinates"


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        ("C[m,n-1] + C[m,n-2]  init C[m,-1] = 0, C[m,-2] = 0", "elsewhere than one step back along n"),
        ("sum[k] X[m,k] * C[k,n-1]  init C[m,-1] = 0", "elsewhere than one step back along n"),
        ("sum[k] X[m,k] * C[m,n-1]  init C[m,-1] = 0", "reduces at each step along n"),
        ("(C[m,n-1] ?? 0) + X[m,n]  init C[m,-1] = 0", "asks whether what it carries is present"),
        ("C[m,n-1] + X[m,n]  where n >= 3  init C[m,-1] = 0", "its filter does not say where along n it ends"),
    ],
)
def test_a_recurrence_that_no_kernel_holds_says_why(step: str, reason: str) -> None:
    rest = groups(f"cascade c(X[M,M]) -> C[M,M] {{\n C[m,n] = {step}\n}}", X=(5, 5))[-1]
    assert isinstance(rest, Rest) and rest.names[-1:] == ("C",) and reason in rest.reason, rest


def test_a_recurrence_shares_a_kernel_with_what_is_around_it() -> None:
    (group,) = groups(PROGRAMS["scan_between_maps"].text, X=(64, 1000))
    assert isinstance(group, Group) and group.names == ("V", "C", "Y", "T", "E")
    assert group.arrangement == Arrangement(("m",), None, ("n",))
    (group,) = groups(PROGRAMS["scan_between_maps"].text, X=(64, 100_000))
    assert isinstance(group, Group) and group.arrangement == Arrangement(("m",), "n", ())


def test_what_nothing_composes_is_streamed_one_by_one() -> None:
    text = PROGRAMS["steps_that_do_not_compose"].text
    planner = planner_for(final(text), {name: torch.empty(64, 100) for name in "XG"})
    group = only_group(planner)
    assert group.arrangement == Arrangement(("m",), "n", ()) and planner.default_tiling(group).of("n") == 1
    kernel = planner.kernel("c", group, planner.groups(), planner.default_tiling(group))
    assert kernel.singly == ("H",) and "one coordinate of n at a time" in describe(Launch(kernel, planner.extents))


def test_groups_stand_in_an_order_in_which_they_can_run() -> None:
    for program in PROGRAMS.values():
        draw = Draw(program, program.small)
        made = planner_for(final(program.text), draw.inputs(0), draw.given())
        known = {param.name for param in made.cascade.params}
        for item in made.groups():
            for stmt in item.statements:
                read = set(reads(stmt)) - set(item.names)
                assert read <= known, f"{program.name}: {read - known} is not there yet"
            known |= set(item.names)
        assert {result.name for result in made.cascade.results} <= known


# --- axes ------------------------------------------------------------------------------------------------------------


def head_axes(extent: int) -> tuple[list[int], bool]:
    """The tiles of the reduced rank of scores of this head size, and whether they cover exactly its extent."""
    (kernel,) = kernels("full", M=32, N=64, E=extent, F=16)
    axes = [axis for axis in kernel.axes if axis.role is Role.WHOLE and axis.rank != "f"]
    return [axis.tile for axis in axes], all(axis.exact for axis in axes)


@pytest.mark.parametrize(("extent", "tiles"), [(80, [64, 16]), (96, [64, 32]), (576, [512, 64]), (112, [64, 32, 16])])
def test_reduced_ranks_in_pieces(extent: int, tiles: list[int]) -> None:
    assert head_axes(extent) == (tiles, True) and sum(tiles) == extent


@pytest.mark.parametrize(("extent", "tile"), [(72, 128), (120, 128), (240, 256), (5, 16), (33, 64)])
def test_reduced_ranks_that_are_padded(extent: int, tile: int) -> None:
    assert head_axes(extent) == ([tile], False)


@pytest.mark.parametrize("extent", [16, 64, 128, 256])
def test_powers_of_two_fit(extent: int) -> None:
    assert head_axes(extent) == ([extent], True)


def test_the_powers_of_a_number() -> None:
    for extent in range(1, 2000):
        found = powers(extent)
        assert sum(found) == extent and all(a > b for a, b in itertools.pairwise(found))
        assert all(power & (power - 1) == 0 for power in found)


@pytest.mark.parametrize(("heads", "each"), [(8, 4), (16, 2), (8, 8)])
def test_rows_that_share_an_operand_lie_in_one_tile(heads: int, each: int) -> None:
    text = PROGRAMS["decode"].text.replace("h//2", f"h//{each}")
    inputs = {"Q": (3, heads, 64), "K": (3, heads // each, 300, 64), "V": (3, heads // each, 300, 64)}
    tensors = {name: torch.zeros(shape, dtype=torch.float16) for name, shape in inputs.items()}
    made = planner_for(final(text), tensors | {"len": torch.zeros(3, dtype=torch.int32)})
    (kernel,) = all_kernels(made)
    axis = kernel.axis("h")
    assert axis.role is Role.TILE and axis.tile == 16 and axis.step == each and axis.advance == each
    assert made.packed(only_group(made)) == {"h": each}


def test_rows_that_share_nothing_are_points() -> None:
    (kernel,) = kernels("full", M=32, N=64, E=16, F=16)
    assert kernel.axis("h").role is Role.POINT and kernel.axis("m").role is Role.TILE and kernel.axis("m").step == 0


def test_every_tile_is_a_power_of_two_and_exact_where_it_divides() -> None:
    for name in PROGRAMS:
        for kernel in kernels(name):
            for axis in kernel.axes:
                assert axis.tile & (axis.tile - 1) == 0 and axis.tile > 0
                if isinstance(axis.extent, int):
                    assert not axis.exact or axis.extent % axis.tile == 0
            assert len({axis.rank for axis in kernel.axes}) == len(kernel.axes)


def test_what_fits_no_tile_runs_outside_kernels() -> None:
    text = "cascade t(X[M,N]) -> Y[] {\n Y = sum[m,n] X[m,n]\n}"
    (rest,) = planner_for(final(text), {"X": torch.zeros(1, 1).expand(5000, 5000)}).groups()
    assert isinstance(rest, Rest) and "tile" in rest.reason


def test_what_reduces_the_results_of_a_short_product_stays_with_it() -> None:
    """A router: logits, their softmax and the largest of it, one kernel; of many classes the fold is the stream."""
    text = """cascade router(X[T,D], R[D,N]) -> W[T,2], I[T,2] {
        W[t,k], I[t,k] = topk[n, 2] softmax[n] (sum[d] X[t,d] * R[d,n])
    }"""
    for classes, groups in ((64, 1), (4096, 2)):
        x, r = torch.empty(512, 2048, dtype=torch.bfloat16), torch.empty(2048, classes, dtype=torch.bfloat16)
        assert len(planner_for(final(text), {"X": x, "R": r}).groups()) == groups


def test_products_in_full_precision_are_rounded_once() -> None:
    """Where terms cancel as well; parts of a long rank are rounded each."""
    generator = torch.Generator().manual_seed(0)
    call = cascade.compile("cascade c(A[M,K], B[K,N]) -> C[M,N] { C[m,n] = A[m,k] * B[k,n] }", backend="triton")
    for extent, right in ((63, 0.999), (1000, 0.5)):
        a, b = (torch.randn(shape, generator=generator) ** 3 for shape in ((33, extent), (extent, 40)))
        gold = a.double() @ b.double()
        ours = call(A=a.to(DEVICE), B=b.to(DEVICE)).cpu()
        assert (ours == gold.float()).float().mean() > right > (a @ b == gold.float()).float().mean()


def test_scores_in_full_precision_are_scaled_before_they_are_rounded() -> None:
    """In short pieces, as operands in f64 take registers; what is the same in every round is read in each."""
    (kernel,) = kernels("full", torch.float32, B=1, H=2, M=300, N=300, E=192, F=192)
    dots = [op for op in every_op(kernel.ops) if isinstance(op, Dot)]
    assert [kernel.axis(op.over).tile for op in dots] == [64, 64, 64, kernel.axis("n").tile]
    text = emitted(kernel)
    assert text.count("out_dtype=tl.float64") == 4 and f"S = (S_sum * {1 / 192**0.5!r}).to(tl.float32)" in text
    loop = text.index("for n_first")
    assert all(loop < text.index(f" {name} = Q_desc.load(") for name in ("q", "q_1", "q_2"))


def test_a_product_with_a_vector_in_full_precision_is_a_sum_by_coordinate() -> None:
    (kernel,) = kernels("matrix_vector", torch.float32, M=1001, K=8191)
    assert kernel.axis("m").role is Role.POINT and kernel.axis("k").parts == 1
    assert "C_lanes = C_lanes + a * b" in emitted(kernel)


@pytest.mark.parametrize("length", [63, 119, 300, 1000])
def test_sums_in_full_precision_add_elements_far_apart_first(length: int) -> None:
    """Along a row that rises sums of neighbours are large, and so are their roundings."""
    generator = torch.Generator().manual_seed(length)
    x = torch.linspace(-1, 1, length) + 0.3 * torch.randn(200, length, generator=generator)
    gold = x.double().sum(1)
    neighbours = torch.nn.functional.pad(x, (0, 1024 - length))
    while neighbours.shape[1] > 1:
        neighbours = neighbours[:, ::2] + neighbours[:, 1::2]
    call = cascade.compile(PROGRAMS["row_sum"].text, backend="triton")
    for other in (1, 37):  # lengths that change share a long tile
        call(X=x[:, :other].contiguous().to(DEVICE))
    ours = call(X=x.to(DEVICE)).cpu()
    assert (ours - gold).square().mean() <= (neighbours[:, 0] - gold).square().mean() / 2


@pytest.mark.parametrize("length", [300, 1000, 5000])
def test_the_few_additions_that_join_threads_round_once(length: int) -> None:
    """Of numbers that are nearly equal, every rounding of these would be one of the whole."""
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(300, length, generator=generator) - 1000
    gold = x.double().sum(1)
    ours = cascade.compile(PROGRAMS["row_sum"].text, backend="triton")(X=x.to(DEVICE)).cpu()
    assert ((ours - gold).abs() <= 0.8 * torch.finfo(torch.float32).eps * 2.0 ** gold.abs().log2().floor()).all()


@pytest.mark.parametrize("length", [1024, 4096])
def test_long_streams_in_full_precision_keep_what_roundings_leave_over(length: int) -> None:
    """A product whose terms rise: half-way its sum is hundreds of times what it comes to."""
    generator = torch.Generator().manual_seed(length)
    a, ramp = torch.rand(16, length, generator=generator) / 2 + 0.5, torch.linspace(-1, 1, length)[:, None]
    b = ramp + 0.3 * torch.randn(length, 16, generator=generator)
    gold = a.double() @ b.double()
    chain = torch.zeros(16, 16)
    for first in range(0, length, 16):
        chain = chain + a[:, first : first + 16] @ b[first : first + 16]
    call = cascade.compile("cascade c(A[M,K], B[K,N]) -> C[M,N] { C[m,n] = A[m,k] * B[k,n] }", backend="triton")
    ours = call(A=a.to(DEVICE), B=b.to(DEVICE)).cpu()
    assert (ours - gold).square().mean() <= (chain - gold).square().mean() / 4
    b[length // 3, 2], b[length // 2, 3] = math.inf, math.nan
    assert torch.equal(call(A=a.to(DEVICE), B=b.to(DEVICE)).cpu().isinf(), (a @ b).isinf())


def test_what_is_left_over_moves_with_its_state() -> None:
    """And only there: in full precision, over many tiles, where a merge multiplies what was summed; not in f64."""
    moving = "P_sum_rest = P_sum_rest * P_max_shift"
    long, short = (
        {"B": 1, "G": 2, "J": 8, "N": 131_072, "E": 64, "F": 64},
        {"B": 1, "G": 2, "J": 8, "N": 64, "E": 64, "F": 64},
    )
    text = emitted(kernels("decode_grouped", torch.float32, **long)[0])
    assert moving in text and "O_sum_rest" not in text
    assert "O_sum = tl.zeros([BLOCK_J, BLOCK_F], tl.float64)" in text
    assert "O_sum = P_max_shift[:, None] * O_sum\n" in text and "O_sum_whole = O_sum.to(tl.float32)" in text
    assert "_rest" not in emitted(kernels("decode_grouped", torch.float32, **short)[0])
    assert "_rest" not in emitted(kernels("decode_grouped", torch.bfloat16, **long)[0])


def test_a_drift_composes_without_its_factor() -> None:
    """1 - a rounds the same way at every step: only what a step adds is composed."""
    x, h = torch.randn(40, 100, generator=torch.Generator().manual_seed(0)) - 1000, torch.zeros(40)
    gold, state = [], h.double()
    for n in range(100):
        state = state + torch.tensor(0.1).double() * (x[:, n].double() - state)
        gold.append(state)
    call = cascade.compile(PROGRAMS["moving_average"].text, backend="triton")
    ours = call(X=x.to(DEVICE), a=torch.tensor(0.1, device=DEVICE), h=h.to(DEVICE)).cpu()
    assert (ours - torch.stack(gold, 1)).abs().max() <= 3e-7 * 1000
    exact, narrow = (kernels("moving_average", dtype, M=40, N=100) for dtype in (torch.float32, torch.bfloat16))
    assert "drifted" in emitted(exact[0]) and "composed" in emitted(narrow[0])


def test_levels_of_a_scan_leave_no_roundings() -> None:
    """A large step at the end is added at every level, and each would round: two roundings are left, a product and H."""
    generator, rows = torch.Generator().manual_seed(1), 150
    x = torch.randn(rows, 100, generator=generator)
    x[:, -1] = 500 * (1 + torch.rand(rows, generator=generator))
    a, state = torch.tensor(0.1), torch.zeros(rows, dtype=torch.float64)
    for n in range(100):
        state = state + a.double() * (x[:, n].double() - state)
    call = cascade.compile(PROGRAMS["moving_average"].text, backend="triton")
    ours = call(X=x.to(DEVICE), a=a.to(DEVICE), h=torch.zeros(rows, device=DEVICE)).cpu()[:, -1]
    assert ((ours - state) / state).abs().max() <= 2.1 * 2.0**-24


def test_only_sums_in_full_precision_are_in_levels() -> None:
    exact, short = (kernels("row_sum", dtype, M=5, N=1000) for dtype in (torch.float32, torch.float16))
    assert "tl.reshape(" in emitted(exact[0]) and "tl.reshape(" not in emitted(short[0])


@pytest.mark.parametrize(
    ("dtype", "rows", "expected"),
    [
        (torch.bfloat16, 8192, DType.BF16),
        (torch.bfloat16, 16, DType.F32),
        (torch.float16, 8192, DType.F32),  # sums may leave its range
        (torch.float32, 8192, DType.F32),
    ],
)
def test_what_lies_between_kernels_has_16_bits_where_the_others_would_take_long(
    dtype: torch.dtype, rows: int, expected: DType
) -> None:
    text = """cascade c(X[T,D], A[T,K], W[K,D]) -> Y[T,D] {
        Z[t,d] = X[t,d] + (sum[k] A[t,k] * W[k,d])
        S[t] = sum[d] Z[t,d] * Z[t,d]
        Y[t,d] = Z[t,d] / S[t]
    }"""
    inputs = {"X": (rows, 2048), "A": (rows, 512), "W": (512, 2048)}
    planner = planner_for(final(text), {name: torch.empty(shape, dtype=dtype) for name, shape in inputs.items()})
    made = {tensor.name: tensor.dtype for kernel in all_kernels(planner) for tensor in kernel.tensors}
    assert made["Z"] is expected
    assert made.get("S", DType.F32) is DType.F32
