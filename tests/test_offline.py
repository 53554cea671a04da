"""Kernels compiled without a GPU: what the facts say of good and bad kernels, with this Triton and the oldest one."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from cascade.backends.triton.offline import Failure, Request, StaticFacts, blocks_per_sm, compile_offline, facts

ROOT = Path(__file__).parent.parent
TRITON36 = ROOT / ".venv-triton36" / "bin" / "python"
HEADER = "import triton\nimport triton.language as tl\n\n@triton.jit\n"

GEMM = """
def gemm(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ASSUME: tl.constexpr):
    if ASSUME:
        tl.assume(K > 0)
    m = tl.program_id(0) * BM
    n = tl.program_id(1) * BN
    acc = tl.zeros([BM, BN], tl.float32)
    for k in range(0, K, BK):
        acc = tl.dot(a.load([m, k]), b.load([n, k]).T, acc)
    c.store([m, n], acc.to(tl.bfloat16))
"""

COPY = """
def copy(x, y, N, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + i, tl.load(x + i, mask=i < N, other=0.0), mask=i < N)
"""

# Two products with a normalised exponential between them; the places of Q, K and V as the descriptors have them.
TWO_PRODUCTS = """
def two_products(dq, dk, dv, do, c, S, H, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr):
    tl.assume(S > 0)
    b = tl.program_id(1)
    h = tl.program_id(2)
    m0 = tl.program_id(0) * BM
    q = dq.load([{q}]).reshape([BM, D])
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n0 in range(0, S, BN):
        k = dk.load([{k}]).reshape([BN, D])
        s = tl.dot(q, k.T)
        new = tl.maximum(top, tl.max(s, 1) * c)
        p = tl.exp2(s * c - new[:, None])
        old = tl.exp2(top - new)
        total = total * old + tl.sum(p, 1)
        v = dv.load([{k}]).reshape([BN, D])
        acc = tl.dot(p.to(tl.bfloat16), v, acc * old[:, None])
        top = new
    out = (acc * (1.0 / total)[:, None]).to(tl.bfloat16)
    do.store([{o}], out.reshape({shape}))
"""
PLACES = {
    "flat": ("(b * H + h) * S + {}, 0", "{},D"),
    "leading": ("b, h, {}, 0", "1,1,{},D"),
    "middle": ("b, {}, h, 0", "1,{},1,D"),
}


def descriptor(*block: int | str) -> str:
    """The type of a host descriptor with this block."""
    return f"tensordesc<bf16[{','.join(map(str, block))}]>"


def gemm(bm: int, bn: int, warps: int, stages: int, assume: bool = True) -> Request:
    """C = A B^T with tiles of bm x bn, 64 deep."""
    return Request(
        source=HEADER + GEMM,
        kernel="gemm",
        types=(("a", descriptor(bm, 64)), ("b", descriptor(bn, 64)), ("c", descriptor(bm, bn)), ("K", "i32")),
        constants=(("BM", bm), ("BN", bn), ("BK", 64), ("ASSUME", assume)),
        aligned=("K",),
        num_warps=warps,
        num_stages=stages,
    )


def copy(*aligned: str) -> Request:
    """y = x through pointers, 8 numbers a thread."""
    return Request(HEADER + COPY, "copy", (("x", "*bf16"), ("y", "*bf16"), ("N", "i32")), (("B", 1024),), aligned)


def two_products(left: str, right: str, bm: int = 128, bn: int = 64, d: int = 64, warps: int = 4) -> Request:
    """Q (and the result) at the place `left`, K and V at the place `right`."""
    place, block = zip(PLACES[left], PLACES[right], strict=True)
    shape = block[0].format("BM")
    source = TWO_PRODUCTS.format(
        q=place[0].format("m0"), k=place[1].format("n0"), o=place[0].format("m0"), shape=f"[{shape}]"
    )
    rows = descriptor(block[0].format(bm).replace("D", str(d)))
    columns = descriptor(block[1].format(bn).replace("D", str(d)))
    return Request(
        source=HEADER + source,
        kernel="two_products",
        types=(("dq", rows), ("dk", columns), ("dv", columns), ("do", rows), ("c", "fp32"), ("S", "i32"), ("H", "i32")),
        constants=(("BM", bm), ("BN", bn), ("D", d)),
        aligned=("S",),
        num_warps=warps,
        num_stages=2,
    )


@pytest.fixture(params=["this", "oldest"])
def python(request: pytest.FixtureRequest) -> str:
    """An interpreter with a Triton: the one of the tests, and one with the oldest that is supported."""
    if request.param == "this":
        return sys.executable
    if not TRITON36.exists():
        pytest.skip("no .venv-triton36; `make test` makes it")
    return str(TRITON36)


@functools.cache
def answer(request: Request, python: str, arch: str = "sm_90") -> StaticFacts | Failure:
    """The answer for one request."""
    return facts([request], arch, python, jobs=1)[0]


def compiled(request: Request, python: str, arch: str = "sm_90") -> StaticFacts:
    """The facts of one kernel that compiles."""
    found = answer(request, python, arch)
    assert isinstance(found, StaticFacts), found.message
    return found


def test_versions(python: str) -> None:
    version = compiled(copy(), python).triton
    assert version.startswith("3.6.") == (python == str(TRITON36))


def test_gemm(python: str) -> None:
    found = compiled(gemm(128, 128, 4, 4), python)
    assert found.wgmma > 0 and found.mma == 0
    assert found.spills == 0 and found.serialized == () and found.waits == 2
    assert found.tma_loads == 8 and found.tma_stores == 1  # 3 stages of 2 before the loop, 2 in it
    assert found.shared_bytes >= 4 * 2 * 128 * 64 * 2
    assert found.blocks_per_sm == 1 and found.num_warps == 4
    assert found.exp2 == found.shared_loads == found.async_copies == found.wide_loads == 0


def test_more_shared_memory_than_there_is(python: str) -> None:
    found = compiled(gemm(128, 256, 8, 6), python)
    assert found.shared_bytes > 232_448
    assert found.blocks_per_sm == 0 and found.spills == 0


def test_too_many_numbers_for_the_registers(python: str) -> None:
    found = compiled(gemm(256, 256, 4, 2), python)
    assert found.registers == 255
    assert found.spills > 0 and found.serialized


def test_the_oldest_triton_serializes_without_the_assumption(python: str) -> None:
    """Known and kept in sight: without `tl.assume(K > 0)`, Triton 3.6 waits for every product of this kernel."""
    assert compiled(gemm(128, 256, 8, 3), python).serialized == ()
    found = compiled(gemm(128, 256, 8, 3, assume=False), python)
    assert found.serialized == (("C7515",) if python == str(TRITON36) else ())
    assert found.spills == 0


def test_another_architecture(python: str) -> None:
    found = compiled(gemm(128, 128, 4, 3), python, "sm_80")
    assert found.wgmma == found.tma_loads == 0 and found.mma > 0


def test_wide_accesses_need_alignment(python: str) -> None:
    wide, narrow = compiled(copy("x", "y", "N"), python), compiled(copy(), python)
    assert (wide.wide_loads, wide.wide_stores) == (1, 1)
    assert (narrow.wide_loads, narrow.wide_stores) == (0, 0)
    assert wide.shared_bytes == 0 and wide.blocks_per_sm == 16  # 2048 threads


@pytest.mark.parametrize(("d", "bm", "bn", "warps"), [(64, 128, 64, 4), (128, 128, 64, 4)])
def test_leading_coordinates_cost_nothing(python: str, d: int, bm: int, bn: int, warps: int) -> None:
    """A block of [1, 1, rows, D], reshaped, is the operand of a product as it is in shared memory, also transposed."""
    flat = compiled(two_products("flat", "flat", bm, bn, d, warps), python)
    leading = compiled(two_products("leading", "leading", bm, bn, d, warps), python)
    same = ("wgmma", "mma", "waits", "shared_bytes", "shared_loads", "shared_stores", "tma_loads", "tma_stores", "exp2")
    for name in (*same, "spills", "serialized", "blocks_per_sm"):
        assert getattr(leading, name) == getattr(flat, name), name
    assert leading.serialized == () and leading.spills == 0 and leading.shared_loads == 0
    assert abs(leading.registers - flat.registers) <= 8
    assert abs(leading.instructions - flat.instructions) <= 48


def test_coordinates_in_the_middle_cost_registers_on_the_left(python: str) -> None:
    """Known and kept in sight: a block of [1, rows, 1, D] is fine as a right operand; as a left one it is first read
    into registers, which overflow. A descriptor whose strides are permuted has such a coordinate in front."""
    leading = compiled(two_products("leading", "leading", d=128), python)
    right = compiled(two_products("leading", "middle", d=128), python)
    left = compiled(two_products("middle", "leading", d=128), python)
    assert (right.serialized, right.spills, right.shared_loads) == ((), 0, 0)
    assert right.shared_bytes == leading.shared_bytes and right.wgmma == leading.wgmma
    assert left.shared_loads > 0 and left.spills > 0 and left.serialized


BAD_INSTRUCTION = """
def copy(x, y, N, B: tl.constexpr):
    i = tl.inline_asm_elementwise("no.such $0, $1;", "=r,r", [tl.arange(0, B)], tl.int32, True, 1)
    tl.store(y + i, tl.load(x + i))
"""
SPECIALISED = """
def copy(x, y, N, B: tl.constexpr):
    tl.assume(N > 0)
    acc = tl.zeros([B, B], tl.float32)
    for k in tl.range(0, N, B, warp_specialize=True):
        i = (k + tl.arange(0, B))[:, None] * B + tl.arange(0, B)[None, :]
        acc = tl.dot(tl.load(x + i), tl.load(y + i), acc)
    tl.store(y + tl.arange(0, B)[:, None] * B + tl.arange(0, B)[None, :], acc.to(tl.bfloat16))
"""
BROKEN = {
    "refused by a pass": (dataclasses.replace(copy(), source=HEADER + SPECIALISED), "still has uses"),
    "refused by the assembler": (dataclasses.replace(copy(), source=HEADER + BAD_INSTRUCTION), "PTXASError"),
    "no power of two": (dataclasses.replace(copy(), constants=(("B", 1000),)), "power of 2"),
    "another name": (dataclasses.replace(copy(), kernel="paste"), "no jit function 'paste'"),
    "an argument missing": (dataclasses.replace(copy(), constants=()), "takes x, y, N, B"),
    "no Python": (dataclasses.replace(copy(), source="def ("), "SyntaxError"),
    "an undefined name": (
        dataclasses.replace(copy(), source=HEADER + COPY.replace("i < N", "i < M")),
        "M is not defined",
    ),
}


def test_a_kernel_that_does_not_compile_is_a_failure(python: str) -> None:
    answers = facts((request for request, _ in BROKEN.values()), python=python)
    for found, (name, (_, message)) in zip(answers, BROKEN.items(), strict=True):
        assert isinstance(found, Failure) and message in found.message, name


def test_a_compiler_that_crashes_costs_one_kernel() -> None:
    crash = dataclasses.replace(copy(), source="import os\nos._exit(7)\n")
    first, second, third = facts([copy(), crash, copy()], jobs=1)
    assert isinstance(first, StaticFacts) and first == third
    assert second == Failure("the compiler ended with code 7")


def test_a_compiler_that_hangs_is_given_up() -> None:
    hang = dataclasses.replace(copy(), source="while True:\n    pass\n")
    assert facts([hang, hang], seconds=0.5) == [Failure("no answer within 0.5 s")] * 2


def test_no_such_interpreter() -> None:
    (found,) = facts([copy()], python="/nowhere/python")
    assert isinstance(found, Failure) and "/nowhere/python" in found.message


def test_nothing_to_compile() -> None:
    assert facts([]) == []


def test_unknown_architecture() -> None:
    with pytest.raises(ValueError, match="nothing is known of 'sm_42'"):
        facts([], "sm_42")


def test_answers_are_in_order_and_repeatable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from a process that interprets its kernels."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    requests = [gemm(128, 128, 4, stages) for stages in (4, 3, 2)] + [BROKEN["no power of two"][0]]
    alone = [answer(request, sys.executable) for request in requests]
    assert facts(requests, jobs=2) == alone
    assert isinstance(alone[-1], Failure)


def test_the_module_answers_lines(python: str) -> None:
    lines = [json.dumps({"arch": "sm_90", "request": dataclasses.asdict(request)}) for request in (copy(), copy("x"))]
    command = ["env", "-u", "TRITON_INTERPRET", python, "-m", "cascade.backends.triton.offline"]
    done = subprocess.run(command, cwd=ROOT, input="\n".join(lines), capture_output=True, text=True, check=True)
    answers = [json.loads(line)["facts"] for line in done.stdout.splitlines()]
    assert [StaticFacts(**{**a, "serialized": tuple(a["serialized"])}) for a in answers] == [
        compiled(copy(), python),
        compiled(copy("x"), python),
    ]


def test_triton_is_all_that_is_loaded() -> None:
    code = """
    import sys
    from cascade.backends.triton.offline import Request, compile_offline
    assert "triton" not in sys.modules
    compile_offline(Request({source!r}, "copy", (("x", "*bf16"), ("y", "*bf16"), ("N", "i32")), (("B", 1024),)))
    assert not {{"torch", "lark", "sympy", "numpy"}} & set(sys.modules), sorted(sys.modules)
    """
    program = textwrap.dedent(code).format(source=HEADER + COPY)
    subprocess.run(["env", "-u", "TRITON_INTERPRET", sys.executable, "-c", program], cwd=ROOT, check=True)


def test_a_process_that_interprets_cannot_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set in this process"):
        compile_offline(copy())


def test_blocks_per_sm_by_hand() -> None:
    assert blocks_per_sm("sm_90", 98_336, 250, 4) == 2
    assert blocks_per_sm("sm_90", 40_992, 106, 4) == 4
    assert blocks_per_sm("sm_90", 163_872, 188, 8) == 1
    assert blocks_per_sm("sm_90", 232_448, 32, 4) == 1
    assert blocks_per_sm("sm_90", 232_449, 32, 4) == 0
    assert blocks_per_sm("sm_90", 0, 16, 1) == 32
    assert blocks_per_sm("sm_90", 0, 200, 1) == 8  # 2 warps on each quarter, though 10 would fit all registers
    assert blocks_per_sm("sm_90", 0, 255, 16) == 0
    assert blocks_per_sm("sm_80", 98_336, 64, 4) == 1
    assert blocks_per_sm("sm_80", 166_912, 64, 4) == 1


def test_blocks_per_sm_another_way() -> None:
    """With whole warpgroups, quarters do not matter: blocks are added until something is used up."""
    for shared, registers, warps in itertools.product(range(0, 230_000, 9_472), range(16, 256, 8), (4, 8, 16)):
        blocks = 0
        while (
            (blocks + 1) * (shared + 1024) <= 233_472
            and (blocks + 1) * registers * 32 * warps <= 65_536
            and (blocks + 1) * 32 * warps <= 2048
            and blocks < 32
        ):
            blocks += 1
        assert blocks_per_sm("sm_90", shared, registers, warps) == blocks
