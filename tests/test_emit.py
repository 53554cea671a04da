"""`cascadec emit`: files that run without the project, check themselves, say what they were compiled for."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import math
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cascade import trial
from cascade.backends.triton import standalone, tune
from cascade.backends.triton.offline import Failure, Request, StaticFacts
from cascade.backends.triton.reference import interval, python_names, reference_lines
from cascade.backends.triton.standalone import Subject, default_sizes
from cascade.cli import run_command
from cascade.errors import CascadeError, UnsupportedError
from cascade.frontend.build import parse_cascade
from cascade.inference import bind_sizes, infer_shapes
from cascade.interp import Precision, run
from cascade.ir import Apply, Cascade, Const, DType, Extent, Rank
from cascade.passes.canonicalize import Canonicalize
from cascade.pipeline import run_pipeline
from cascade.text import render
from cascade.values import FROM_TORCH
from cascade.verify import verify
from cascade.walk import targets
from tests import generate, test_paired
from tests.kernel_programs import PROGRAMS, Program
from tests.test_mixed import MIXED
from tests.tolerance import Draw

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"
GEMM = "cascade gemm(A[M,K], B[K,N]) -> C[M,N] { C[m,n] = sum[k] A[m,k] * B[k,n] }\n"
LOSS = """
cascade loss(Z[T,N], y: i64[T]) -> L[] {
    P[t] = (logsumexp[n] Z[t,n]) - Z[t,y[t]]
    L = mean[t] P[t]
}
"""
LAGS = "cascade lags(X[B,T]) -> Y[B,T] { Y[b,t] = 0.5 * Y[b,t-2] + X[b,t]  init Y[b,-1] = 0.0, Y[b,-2] = 0.0 }\n"
TANH = "cascade t(A[M,K], B[K,N]) -> C[M,N] { C[m,n] = tanh(sum[k] A[m,k] * B[k,n]) }\n"
WIDE = GEMM.replace("-> C[", "-> C: f32[")  # of bf16 tensors, and no bf16 in the kernel
DECODE = """
cascade decode(Q[B,H,E], K[B,G,N,E], V[B,G,N,F], length: i32[B]) -> O[B,H,F] {
    S[b,h,n] = Q[b,h,e] * K[b,h//2,n,e] / sqrt(E) where n < length[b]
    P[b,h,n] = softmax[n] S[b,h,n]
    O[b,h,f] = sum[n] P[b,h,n] * V[b,h//2,n,f]
}
"""
DOCUMENTS = (EXAMPLES / "attention.cascade").read_text().replace("N,", "M,").replace(
    "V[B,H,M,F])", "V[B,H,M,F], doc: i64[B,M])"
).replace("n <= m", "doc[b,m] == doc[b,n]")  # fmt: skip
WINDOW = (EXAMPLES / "attention.cascade").read_text().replace("n <= m", "n <= m and m - n < 70")
WORDS = """
cascade pid(tl[L,Run], run[Run]) -> sizes[L,Run], torch[L] {
    sizes[lambda,pid_] = tl[lambda,pid_] * run[pid_]
    torch[lambda] = sum[pid_] sizes[lambda,pid_]
}
"""
REFUSING = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "cascade":
            raise ImportError("cascade is not here")

sys.meta_path.insert(0, Refuse())
"""
"""A `sitecustomize.py`: whatever starts beside it cannot import the project."""


@pytest.fixture
def written(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Any:
    """Emits a program, given as a path or as text, and returns the JSON object that the command prints."""

    def emit(program: Path | str, *options: str, code: int = 0) -> dict[str, Any]:
        if isinstance(program, str):
            path = tmp_path / "program.cascade"
            path.write_text(program)
            program = path
        words = ["emit", str(program), "--backend", "triton", "-o", str(tmp_path / "out"), "--json", *options]
        assert run_command(words) == code
        return json.loads(capfd.readouterr().out)

    return emit


def started(file: Path, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """A file run in Triton's interpreter, by a process in which nothing of the project can be imported."""
    (tmp_path / "sitecustomize.py").write_text(REFUSING)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, str(file)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )


def sized(**sizes: int) -> list[str]:
    """Sizes as options of the command."""
    return [word for name, size in sizes.items() for word in ("-s", f"{name}={size}")]


# --- the files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "options", "files"),
    [
        (EXAMPLES / "attention.cascade", sized(B=2, H=2, M=64, N=96, E=16, F=16), ["attention"]),
        (EXAMPLES / "softmax.cascade", sized(M=6, N=100), ["rows"]),
        (GEMM, sized(M=48, N=40, K=160), ["gemm"]),
        (LOSS, sized(T=8, N=64), ["loss_0", "loss_1", "loss"]),
        ("cascade p(X[M,N]) -> P[M] { P[m] = prod[n] X[m,n] }\n", sized(M=8, N=40), ["p"]),
        (test_paired.program(test_paired.ONE["a stream"]), sized(B=3, M=4, L=5, W=6, C=9, E=16, F=16), ["c"]),
        (test_paired.program(test_paired.ONE["a picture"]), sized(B=2, M=40, L=8, W=12, E=16, F=16), ["c"]),
    ],
    ids=["attention", "softmax", "gemm", "two-groups", "tiny-results", "pages", "a-picture"],
)
def test_file_runs_and_checks_itself_without_the_project(
    program: Path | str, options: list[str], files: list[str], written: Any, tmp_path: Path
) -> None:
    found = written(program, *options, "--dtype", "f16")
    assert found["files"] == [str(tmp_path / "out" / f"{name}.py") for name in files]
    done = started(Path(found["files"][-1]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "largest error" in done.stdout
    assert {line.split()[1].partition(".")[0] for line in imports(found)} <= {"math", "sys", "torch", "triton", *files}
    assert "cascade" not in {line.split()[1].partition(".")[0] for line in imports(found)}


def imports(found: dict[str, Any]) -> list[str]:
    """The import lines of the files."""
    lines = [line for name in found["files"] for line in Path(name).read_text().splitlines()]
    return [line for line in lines if line.startswith(("import ", "from "))]


def test_file_of_which_few_programs_go_through_many_tiles(written: Any, tmp_path: Path) -> None:
    file = Path(written(GEMM, *sized(M=2048, N=2304, K=512), "--dtype", "f16")["files"][0])
    assert "tl.num_programs(0), flatten=True" in file.read_text() and "[(min(programs, " in file.read_text()
    done = started(file, tmp_path)
    assert done.returncode == 0 and "largest error" in done.stdout, done.stderr


def test_self_check_finds_a_wrong_kernel(written: Any, tmp_path: Path) -> None:
    file = Path(written(EXAMPLES / "softmax.cascade", *sized(M=6, N=100), "--dtype", "f16")["files"][0])
    text = file.read_text()
    file.write_text(text.replace("tl.sum(", "1.02 * tl.sum(", 1))
    assert file.read_text() != text
    assert started(file, tmp_path).returncode == 1


@pytest.mark.parametrize("large", [True, False])
def test_check_is_at_sizes_for_which_the_reference_has_room(
    large: bool, written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With --bench the time is that of the planned sizes, whatever the reference has room for."""
    monkeypatch.setattr(standalone, "MOST", 2**14 if large else 2**28)
    file = Path(written(GEMM, *sized(M=520, N=40, K=48), "--dtype", "f16")["files"][0])
    text = file.read_text()
    assert ("checked at smaller sizes" in text) is large
    for real, stand_in in (
        ("cuda = torch.cuda.is_available()", "cuda = True"),
        ('device = "cuda" if cuda else "cpu"', 'device = "cpu"'),
        ("triton.testing.do_bench(lambda: run(*inputs))", "1.0 * (tuple(results.shape) == (520, 40))"),
        ('if "--bench" in sys.argv[1:]:', "if True:"),
    ):
        assert real in text
        text = text.replace(real, stand_in)
    file.write_text(text)
    done = started(file, tmp_path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    told = ["checked at smaller sizes, for the memory that the reference takes: M=248"] if large else []
    assert lines[0].startswith("1.0000 ms, ") and lines[1:-1] == told and lines[-1].startswith("C: largest error")


def test_sizes_of_a_check_are_no_larger_and_as_aligned(written: Any) -> None:
    """What is compiled in, and what strides are multiples of, is as it was planned."""
    text = (EXAMPLES / "attention.cascade").read_text()
    for sizes, told in (
        ({"B": 4, "H": 16, "M": 8192, "N": 8192, "E": 128, "F": 128}, "M=2048, N=2048"),
        ({"B": 4, "H": 16, "M": 8192, "N": 8191, "E": 128, "F": 128}, "M=2048, N=2047"),
        ({"B": 1, "H": 2, "M": 4096, "N": 4096, "E": 128, "F": 128}, ""),
    ):
        (file,) = written(text, *sized(**sizes))["files"]
        found = re.findall(r"checked at smaller sizes, .*: (.*)\"", Path(file).read_text())
        assert found == ([told] if told else [])


def test_needs_a_gpu_or_the_interpreter(written: Any, tmp_path: Path) -> None:
    file = written(GEMM, *sized(M=16, N=16, K=16))["files"][0]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "TRITON_INTERPRET=1" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["attention", "decode", "tanh", "wide", "table"])
def test_bf16_files_check_themselves_in_the_interpreter(name: str, written: Any, tmp_path: Path) -> None:
    """There bf16 is float32, and assembly is spelled out: the same file at smaller sizes of its own."""
    attention = (EXAMPLES / "attention.cascade").read_text()
    text = {"attention": attention, "decode": DECODE, "tanh": TANH, "wide": WIDE, "table": MIXED["table"]}[name]
    (file,) = written(text, *sized(E=16, F=16) if name not in ("tanh", "wide") else ())["files"]
    done = started(Path(file), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    error = re.search(r"error (\S+),", done.stdout)
    assert error is not None and float(error[1]) < 1e-4  # no rounding to 16 bits
    assert Path(file).read_text().count("there all that is bf16 is float32") == 1
    assert ("knows no assembly" in Path(file).read_text()) is (name == "tanh")


def test_stream_that_programs_share_is_merged_in_the_same_file(
    written: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = written(DECODE, *sized(B=2, H=4, G=2, N=4096, E=16, F=16), "--dtype", "f16")
    assert [kernel["name"] for kernel in found["kernels"]] == ["decode", "decode_merge"]
    parts = found["kernels"][0]["grid"]["n_part"]
    assert parts > 1 and f"N_PARTS = {parts}  # programs that share a stream" in Path(found["files"][0]).read_text()
    if torch.cuda.is_available():
        return
    module = load(found["files"][0], monkeypatch)
    for b, h, g, n in ((2, 4, 2, 300), (1, 2, 1, 1), (3, 3, 2, 77)):
        q, k, v = (torch.randn(*shape, dtype=torch.float16) for shape in ((b, h, 16), (b, g, n, 16), (b, g, n, 16)))
        length = torch.randint(0, n + 1, (b,), dtype=torch.int32)
        assert module.largest_error(module.run(q, k, v, length), module.reference(q, k, v, length)) < 2**-8, (b, h, n)
    with pytest.raises(ValueError, match="H is 6: 2 for each of G, which is 2, at most"):
        module.run(torch.randn(1, 6, 16).half(), *[torch.randn(1, 2, 40, 16).half()] * 2, torch.tensor([40]).int())


def test_bounds_that_depend_on_data_are_found_in_the_same_file(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = written(DOCUMENTS, *sized(B=2, H=2, M=256, E=16, F=16), "--dtype", "f16")
    names = [kernel["name"] for kernel in found["kernels"]]
    assert names == ["attention_bounds", "attention"]
    assert all(set(kernel["static"]) == STATIC for kernel in found["kernels"])
    if torch.cuda.is_available():
        return
    module = load(found["files"][0], monkeypatch)
    for b, h, m in ((2, 2, 256), (1, 1, 70), (2, 1, 16)):
        q, k, v = (torch.randn(b, h, m, 16, dtype=torch.float16) for _ in range(3))
        for doc in (torch.arange(m).expand(b, m) // 30, torch.randint(0, 3, (b, m)), torch.zeros(b, m).long()):
            doc = doc.contiguous()
            assert module.largest_error(module.run(q, k, v, doc), module.reference(q, k, v, doc)) < 2**-8, (b, h, m)


def test_rows_are_sorted_on_the_device(written: Any, tmp_path: Path) -> None:
    found = written(EXAMPLES / "moe.cascade", *sized(T=256, D=128, N=16, F=256), "--dtype", "f16")
    assert [Path(name).name for name in found["files"]] == [*(f"moe_{number}.py" for number in range(4)), "moe.py"]
    text = Path(found["files"][1]).read_text()
    assert "keys, places = sorted_rows(I, N)\n" in text and "moe_1[(" in text
    done = started(Path(found["files"][-1]), tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_loop_that_stores_has_boxes_of_its_own_at_the_edges(monkeypatch: pytest.MonkeyPatch, written: Any) -> None:
    monkeypatch.setattr(tune, "CROWDED", 0)
    file = written(EXAMPLES / "block.cascade", *sized(T=64, D=256, F=64), "--dtype", "f16")["files"][0]
    assert "Y_desc_2" in Path(file).read_text()
    if torch.cuda.is_available():
        return
    module = load(file, monkeypatch)
    for t, d in ((64, 256), (5, 200), (70, 328)):
        shapes = ((t, d), (d, 64), (d, 64), (64, d), (d,))
        given = [torch.randn(shape, dtype=torch.float16) / shape[0] ** 0.5 for shape in shapes]
        assert module.largest_error(module.run(*given), module.reference(*given)) < 2**-8, (t, d)


def test_names_that_mean_something_in_python_or_in_the_file(written: Any, tmp_path: Path) -> None:
    found = written(WORDS, *sized(L=6, Run=40), "--dtype", "f32")
    done = started(Path(found["files"][-1]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("sizes: largest error") and "\ntorch: largest error" in done.stdout


@pytest.mark.campaign
def test_text_is_the_same_whatever_the_process(tmp_path: Path) -> None:
    texts = []
    for seed, folder in (("0", ROOT), ("1", tmp_path), ("77", tmp_path)):
        words = ["emit", str(EXAMPLES / "attention.cascade"), "--backend", "triton", "-o", str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        subprocess.run(
            [sys.executable, "-m", "cascade.cli", *words], cwd=folder, env=environment, check=True, capture_output=True
        )
        texts.append((tmp_path / seed / "attention.py").read_bytes())
    assert len(set(texts)) == 1


def load(file: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """An emitted file as a module, beside which others are found."""
    path = Path(file)
    monkeypatch.syspath_prepend(path.parent)
    for name in [name for name in sys.modules if (path.parent / f"{name}.py").exists()]:
        monkeypatch.delitem(sys.modules, name)
    return importlib.import_module(path.stem)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU")
def test_other_sizes_and_layouts_run_and_what_is_compiled_in_is_checked(
    written: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = sized(B=2, H=2, M=100, N=100, E=16, F=16)
    file = written(EXAMPLES / "attention.cascade", *sizes, "--dtype", "f16")["files"][0]
    module = load(file, monkeypatch)

    def tensors(b: int, h: int, m: int, n: int, e: int = 16) -> list[torch.Tensor]:
        return [torch.randn(b, h, length, e, dtype=torch.float16) for length in (m, n, n)]

    for shape in ((2, 2, 100, 100), (1, 3, 33, 70), (3, 1, 64, 64), (1, 1, 1, 1)):
        given = tensors(*shape)
        assert module.largest_error(module.run(*given), module.reference(*given)) < 2**-8, shape
    q, k, v = tensors(2, 2, 40, 24)
    swapped = torch.randn(2, 40, 2, 16, dtype=torch.float16).transpose(1, 2)
    assert module.largest_error(module.run(swapped, k, v), module.reference(swapped, k, v)) < 2**-8
    for wrong, message in (
        ((q.float(), k, v), "Q is torch.float32, compiled for torch.float16"),
        ((q[0], k, v), "Q has 3 dimensions, compiled for 4"),
        (
            (*tensors(2, 2, 40, 24, 32),),
            "Q has extent 32 in dimension 3, compiled for E = 16: emit another file with -s E=32",
        ),
        ((q, k, v[:, :, :20]), "V has extent 20 in dimension 2, where N is 24"),
        ((q[:, :, :0], k, v), "Q has extent 0 in dimension 2, nothing to compute"),
        ((q.transpose(2, 3).contiguous().transpose(2, 3), k, v), "Q has stride 40 in dimension 3, compiled for 1 "),
        (
            (q.flatten()[1:-15].reshape(-1)[:2048].view(2, 2, 32, 16), k, v),
            "TMA needs multiples of 8 elements and of 16 bytes",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            module.run(*wrong)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU")
def test_rows_of_any_length_and_what_a_program_cannot_hold(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    file = written(EXAMPLES / "softmax.cascade", *sized(M=64, N=1000), "--dtype", "f32")["files"][0]
    module = load(file, monkeypatch)
    for m, n in ((64, 64), (1, 1), (3, 1000), (70, 5), (2, 9000)):
        x = torch.randn(m, n)
        assert module.largest_error(module.run(x), module.reference(x)) < 1e-4, (m, n)
    with pytest.raises(ValueError, match=r"N is 1000000, 32768 at most: .* emit another file with -s N=1000000"):
        module.run(torch.randn(1, 1_000_000))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU")
def test_what_is_proved_of_some_sizes_is_tested_for_all(written: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """At equal lengths every row of a window meets something, and at short ones the window is everything."""
    file = written(WINDOW, *sized(B=1, H=1, M=64, N=64, E=16, F=16), "--dtype", "f16")["files"][0]
    module = load(file, monkeypatch)
    for m, n in ((64, 64), (200, 40), (40, 200), (200, 200)):
        q, k, v = (torch.randn(1, 1, length, 16, dtype=torch.float16) for length in (m, n, n))
        assert module.largest_error(module.run(q, k, v), module.reference(q, k, v)) < 2**-8, (m, n)


def test_sizes_that_a_kernel_rests_on_are_compiled_in(written: Any, tmp_path: Path) -> None:
    file = Path(written(EXAMPLES / "attention.cascade", *sized(M=256, N=256))["files"][0])
    assert 'STATIC = {"E": 128, "F": 128}  # sizes that are numbers in the kernels\n' in file.read_text()
    text = "cascade s(X[M,N]) -> Y[M] { Y[m] = sum[n] X[m,n] }\n"
    file = Path(written(text, *sized(M=1, N=64))["files"][0])
    assert 'STATIC = {"M": 1}' in file.read_text()


PADDED = (
    (EXAMPLES / "attention.cascade")
    .read_text()
    .replace("V[B,H,N,F])", "V[B,H,N,F], keep: bool[B,N])")
    .replace("n <= m", "n <= m and keep[b,n]")
)
CLEAN = StaticFacts(128, 0, 65536, 2, 4, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0, 1, 100, (), "3.6")


def test_what_spills_with_the_first_tiles_has_others(written: Any) -> None:
    """The planner's own tiles of this one spill; those that are written do not."""
    bounds, kernel = written(PADDED, "-s", "E=128", "-s", "F=128")["kernels"]
    assert bounds["name"] == "attention_bounds" and bounds["static"]["spills"] == 0
    assert kernel["static"]["spills"] == 0 and kernel["static"]["wgmma"] > 0 and not kernel["static"]["serialized"]


@pytest.mark.parametrize(("spilling", "asked"), [(0, 1), (2, 3), (tune.QUICK, tune.QUICK)])
def test_tiles_are_passed_over_until_none_spills(spilling: int, asked: int) -> None:
    cascade, requests = parse_cascade(GEMM), []
    found = subject_at(cascade, dict.fromkeys("MKN", 4096), dict.fromkeys("AB", DType.BF16))

    def compiler(new: Sequence[Request], arch: str) -> list[StaticFacts | Failure]:
        requests.extend(new)
        return [dataclasses.replace(CLEAN, spills=8 * (len(requests) <= spilling)) for _ in new]

    made, (facts,) = standalone.with_facts(found, "sm_90", compiler)
    assert len(requests) == asked == len(set(requests))
    first = standalone.standalone(found)
    assert (made.files == first.files) == (spilling in (0, tune.QUICK))
    assert bool(facts.spills) == (spilling == tune.QUICK)


FAST = ("decode", "document", "layernorm", "topk_routing", "gemm_bias_gelu", "total")
SLOW = tuple(name for name in PROGRAMS if name not in FAST)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU")
@pytest.mark.parametrize("name", [*FAST, *(pytest.param(name, marks=pytest.mark.campaign) for name in SLOW)])
def test_every_program(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = PROGRAMS[name]
    draw = Draw(program, program.small, "normal", torch.float32, "cpu")
    inputs = draw.inputs(0)
    cascade = parse_cascade(program.text)
    found = subject(cascade, program, inputs)
    try:
        made = standalone.standalone(found)
    except UnsupportedError as error:
        assert {d.code for d in error.diagnostics} == {"C531"}
        return
    for file, text in made.files.items():
        (tmp_path / file).write_text(text)
    module = load(str(tmp_path / file), monkeypatch)
    ours, wanted = module.run(**inputs, **draw.given()), module.reference(**inputs, **draw.given())
    several = isinstance(ours, tuple)
    for a, b in zip(ours if several else (ours,), wanted if several else (wanted,), strict=True):
        assert module.largest_error(a, b) < 1e-3


def subject(cascade: Cascade, program: Program, inputs: dict[str, torch.Tensor]) -> Subject:
    """What is emitted for a program at the sizes of some inputs."""
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    sizes = bind_sizes(cascade, shapes, program.given(program.complete(program.small)))
    return subject_at(cascade, sizes, {name: FROM_TORCH[tensor.dtype] for name, tensor in inputs.items()})


def subject_at(cascade: Cascade, sizes: dict[str, int], types: dict[str, DType]) -> Subject:
    """What is emitted for a cascade at some sizes."""
    verify(cascade)
    steps = run_pipeline(cascade).steps
    canonical = next(step.after for step in steps if step.name == Canonicalize.name)
    return Subject(canonical, steps[-1].after, sizes, types, lambda _: {})


# --- the reference ---------------------------------------------------------------------------------------------------


def referred(cascade: Cascade, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> tuple[torch.Tensor, ...]:
    """What the lines of the reference compute."""
    canonical = run_pipeline(cascade, "canonicalize", check=0).final
    words = [*(p.name for p in canonical.params), *(t.name for stmt in canonical.body for t in targets(stmt))]
    names = python_names(
        [*words, *infer_shapes(canonical).ranks, *sizes], ("torch", "math", "there", "body", "ordered")
    )
    types = {name: FROM_TORCH[tensor.dtype] for name, tensor in inputs.items()}
    lines = reference_lines(canonical, types, sizes, names)
    scope: dict[str, Any] = {"torch": torch, "math": math, **{names[size]: sizes[size] for size in lines.sizes}}
    scope |= {names[n]: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    exec("\n".join([*lines.lines, f"results = ({', '.join(lines.results)},)"]), scope)
    found: tuple[torch.Tensor, ...] = scope["results"]
    return found


@pytest.mark.parametrize("part", range(4))
def test_reference_means_what_random_cascades_mean(part: int) -> None:
    checked = 0
    for seed in range(part, 400, 4):
        builder = generate.Builder(random.Random(seed))
        cascade = builder.build()
        try:
            verify(cascade)
            pointers = {name: generate.symbol(there) for name, (_, there) in builder.index_params.items()}
            inputs = generate.inputs(cascade, seed, pointers)
            sizes = bind_sizes(cascade, {name: tuple(t.shape) for name, t in inputs.items()}, {})
            found = referred(cascade, inputs, sizes)
        except CascadeError:  # no valid cascade, or one that steps along a rank
            continue
        wanted = run(cascade, inputs, sizes, Precision.REFERENCE)
        checked += 1
        for ours, (name, right) in zip(found, wanted.items(), strict=True):
            assert not trial.unlike(ours, right), f"{name}, seed {seed}\n{render(cascade)}"
    assert checked > 50


def test_interval_of_index_arithmetic() -> None:
    expr = Apply("sub", (Apply("mul", (Rank("i"), Const(2))), Apply("floordiv", (Extent("N"), Const(3)))))
    values = [i * 2 - 10 // 3 for i in range(5)]
    assert interval(expr, {"i": 5}, {"N": 10}) == (min(values), max(values))
    assert interval(Apply("mod", (Rank("i"), Const(3))), {"i": 5}, {}) == (0, 2)
    assert interval(Apply("floordiv", (Const(1), Rank("i"))), {"i": 5}, {}) is None


# --- sizes -----------------------------------------------------------------------------------------------------------


def defaults(text: str, **given: int) -> dict[str, int]:
    """The default sizes of a program whose parameters are bf16, or integers where they index."""
    cascade = parse_cascade(text)
    types = trial.param_types(cascade, DType.BF16)
    return default_sizes(run_pipeline(cascade).final, types, given)


def test_default_sizes() -> None:
    attention = (EXAMPLES / "attention.cascade").read_text()
    expected = {"B": 2, "H": 4, "M": 4096, "N": 4096, "E": 128, "F": 128}
    assert defaults(attention) == expected
    assert defaults(attention, N=64, E=32) == expected | {"N": 64, "E": 32}
    assert defaults(GEMM) == {"M": 4096, "N": 4096, "K": 4096}
    assert defaults("cascade s(X[M,N]) -> Y[M,N] { Y[m,n] = softmax[n] X[m,n] }") == {"M": 4096, "N": 4096}


def test_default_sizes_of_what_no_rank_has_and_of_what_is_too_large() -> None:
    grouped = "cascade g(Q[B,H,E], K[B,G,N,E]) -> S[B,H,N] { S[b,h,n] = sum[e] Q[b,h,e] * K[b,h//4,n,e] }"
    found = defaults(grouped)
    assert found["G"] == -(-found["H"] // 4)
    cube = "cascade c(X[A,B,C]) -> Y[A,B,C] { Y[a,b,c] = 2.0 * X[a,b,c] }"
    assert math.prod(defaults(cube).values()) <= standalone.MOST


# --- the command -----------------------------------------------------------------------------------------------------

STATIC = {"registers", "spills", "shared_bytes", "blocks_per_sm", "wgmma", "mma", "serialized"}


def test_json(written: Any) -> None:
    found = written(EXAMPLES / "attention.cascade")
    (kernel,) = found["kernels"]
    assert {"name", "file", "grid", "tile", "static"} <= set(kernel)
    assert set(kernel["static"]) == STATIC and kernel["static"]["wgmma"] > 0 and kernel["static"]["serialized"] == []
    assert kernel["grid"]["h"] == 4 and kernel["tile"]["e"] == 128 and found["sizes"]["N"] == 4096


def test_json_of_an_older_gpu(written: Any) -> None:
    (kernel,) = written(GEMM, *sized(M=256, N=256, K=256), "--arch", "sm_80")["kernels"]
    assert set(kernel["static"]) == STATIC and kernel["static"]["wgmma"] == 0 and kernel["static"]["mma"] > 0


def test_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["emit", str(EXAMPLES / "softmax.cascade"), "--backend", "triton", "-o", str(tmp_path), "--arch", "sm_80"]
    assert run_command(words) == 0
    out = capfd.readouterr().out
    assert out.startswith("rows for sm_80, planned for M=4096, N=4096\n") and "registers" in out
    assert str(tmp_path / "rows.py") in out


def test_what_triton_cannot_compile_is_said_and_written(
    written: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offline = importlib.import_module("cascade.backends.triton.offline")
    monkeypatch.setattr(offline, "facts", lambda requests, *_, **__: [offline.Failure("no compiler") for _ in requests])
    (kernel,) = written(GEMM)["kernels"]
    assert set(kernel["static"]) == STATIC and kernel["static"]["registers"] is None
    assert kernel["failure"] == "no compiler"
    assert (tmp_path / "out" / "gemm.py").exists()


@pytest.mark.parametrize(
    ("program", "options", "exit_code", "code", "message"),
    [
        (LAGS, [], 1, "C531", "Y would run outside kernels: "),
        (GEMM, ["-s", "Q=3"], 2, "C613", "no shape symbol 'Q'"),
        (GEMM, ["-s", "M=0"], 2, "C604", "M is 0"),
        (GEMM, ["-s", "M=1048576", "-s", "N=1048576"], 2, "C614", "elements"),
        (GEMM, ["--arch", "sm_12"], 2, "C604", "'sm_80', 'sm_90'"),
    ],
)
def test_errors(
    program: str, options: list[str], exit_code: int, code: str, message: str, written: Any, tmp_path: Path
) -> None:
    (error,) = written(program, *options, code=exit_code)["errors"]
    assert error["code"] == code and message in error["message"]
    assert not (tmp_path / "out").exists()


def test_output_that_is_a_file_is_an_error(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    words = ["emit", str(EXAMPLES / "softmax.cascade"), "--backend", "triton", "-o", str(tmp_path / "file")]
    assert run_command(words) == 2
    assert "C612" in capfd.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_only_files_of_the_same_name_are_overwritten(written: Any, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for name in ("gemm.py", "other.py"):
        (folder / name).write_text("mine")
    written(GEMM)
    assert (folder / "other.py").read_text() == "mine" and "def run(A, B):" in (folder / "gemm.py").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["gemm.py", "other.py"]
