"""`cascadec emit`: files that run without the project, check themselves, say what they were compiled for."""

from __future__ import annotations

import importlib
import json
import re
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cascade import trial
from cascade.backends.triton import standalone
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
from tests import generate
from tests.kernel_programs import PROGRAMS, Program
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
    ],
    ids=["attention", "softmax", "gemm", "two-kernels"],
)
def test_file_runs_and_checks_itself_without_the_project(
    program: Path | str, options: list[str], files: list[str], written: Any, tmp_path: Path
) -> None:
    found = written(program, *options, "--dtype", "f16")
    assert found["files"] == [str(tmp_path / "out" / f"{name}.py") for name in files]
    done = started(Path(found["files"][-1]), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "largest error" in done.stdout
    assert "cascade" not in {line.split()[1].partition(".")[0] for line in imports(found)}


def imports(found: dict[str, Any]) -> list[str]:
    """The import lines of the files."""
    lines = [line for name in found["files"] for line in Path(name).read_text().splitlines()]
    return [line for line in lines if line.startswith(("import ", "from "))]


def test_file_of_which_few_programs_go_through_many_tiles(written: Any, tmp_path: Path) -> None:
    file = Path(written(GEMM, *sized(M=2048, N=2304, K=512), "--dtype", "f16")["files"][0])
    assert "tl.num_programs(0), flatten=True" in file.read_text() and "grid = (min(programs, " in file.read_text()
    done = started(file, tmp_path)
    assert done.returncode == 0 and "largest error" in done.stdout, done.stderr


def test_self_check_finds_a_wrong_kernel(written: Any, tmp_path: Path) -> None:
    file = Path(written(EXAMPLES / "softmax.cascade", *sized(M=6, N=100), "--dtype", "f16")["files"][0])
    text = file.read_text()
    file.write_text(text.replace("tl.sum(", "1.02 * tl.sum(", 1))
    assert file.read_text() != text
    assert started(file, tmp_path).returncode == 1


def test_needs_a_gpu_or_the_interpreter(written: Any, tmp_path: Path) -> None:
    file = written(GEMM, *sized(M=16, N=16, K=16))["files"][0]
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "TRITON_INTERPRET=1" in done.stderr and "Traceback" not in done.stderr


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
        ((*tensors(2, 2, 40, 24, 32),), "Q has extent 32 in dimension 3, where E is 16"),
        ((q, k, v[:, :, :20]), "V has extent 20 in dimension 2, where N is 24"),
        ((q[:, :, :0], k, v), "Q has extent 0 in dimension 2, nothing to compute"),
        ((q.transpose(2, 3).contiguous().transpose(2, 3), k, v), "Q has stride 40 in dimension 3, compiled for 1"),
        ((q.flatten()[1:-15].reshape(-1)[:2048].view(2, 2, 32, 16), k, v), "does not lie on multiples of 16 bytes"),
    ):
        with pytest.raises(ValueError, match=message):
            module.run(*wrong)


def test_sizes_on_which_a_proof_rests_are_compiled_in(written: Any, tmp_path: Path) -> None:
    text = "cascade w(X[M,N]) -> Y[M] { Y[m] = max[n] exp(X[m,n] + 1.0) where n < m + 200 }\n"
    file = Path(written(text, *sized(M=64, N=64))["files"][0])
    assert '"N": 64' in file.read_text()
    file = Path(written(EXAMPLES / "attention.cascade", *sized(M=256, N=256))["files"][0])
    assert '    sizes = {"E": 128, "F": 128}  # compiled in\n' in file.read_text()
    assert re.search(r'raise ValueError\(f"M is \{M\}, compiled for multiples of (16|32|64|128)"\)', file.read_text())


@pytest.mark.campaign
@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is chosen where there is no GPU")
@pytest.mark.parametrize("name", PROGRAMS)
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
    verify(cascade)
    steps = run_pipeline(cascade).steps
    canonical = next(step.after for step in steps if step.name == Canonicalize.name)
    shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
    sizes = bind_sizes(cascade, shapes, program.given(program.complete(program.small)))
    types = {name: FROM_TORCH[tensor.dtype] for name, tensor in inputs.items()}
    return Subject(canonical, steps[-1].after, sizes, types, {})


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

STATIC = {"registers", "spills", "shared_bytes", "blocks_per_sm", "wgmma", "serialized"}


def test_json(written: Any) -> None:
    found = written(EXAMPLES / "attention.cascade")
    (kernel,) = found["kernels"]
    assert {"name", "file", "grid", "tile", "static"} <= set(kernel)
    assert set(kernel["static"]) == STATIC and kernel["static"]["wgmma"] > 0 and kernel["static"]["serialized"] == []
    assert kernel["grid"]["h"] == 4 and kernel["tile"]["e"] == 128 and found["sizes"]["N"] == 4096


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
    assert kernel["static"] is None and kernel["failure"] == "no compiler"
    assert (tmp_path / "out" / "gemm.py").exists()


@pytest.mark.parametrize(
    ("program", "options", "exit_code", "code", "message"),
    [
        (LAGS, [], 1, "C531", "Y would run outside kernels: "),
        (GEMM, ["-s", "Q=3"], 2, "C613", "no shape symbol 'Q'"),
        (GEMM, ["-s", "M=0"], 2, "C604", "M is 0"),
        (GEMM, ["-s", "M=1048576", "-s", "N=1048576"], 2, "C614", "elements"),
        (GEMM, ["--arch", "sm_12"], 2, "C604", "sm_12"),
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
