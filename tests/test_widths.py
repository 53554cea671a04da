"""Integers in kernels are exact: they have as many bits as coordinates, sizes and the types of data may ask for."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cascade.backends.triton.spell import HELPERS, MANTISSA
from cascade.backends.triton.widths import fits, values_of
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.intervals import interval
from cascade.ir import Apply, Cast, Const, DType, Expr, Rank
from tests.planned import Chosen, all_kernels, call_of, emitted, final, planner_for

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EDGES = (-(2**31), 1 - 2**31, -65537, -65536, -46341, -3, 0, 1, 2, 46341, 65536, 65537, 2**30, 2**31 - 2, 2**31 - 1)
SHORT = (-128, -127, -3, 0, 1, 100, 127)
DATA = {
    "J": torch.tensor(EDGES, dtype=torch.int32),
    "K": torch.tensor((*EDGES[::-1], 5, 7), dtype=torch.int32),
    "S": torch.tensor((*SHORT, *SHORT, 1), dtype=torch.int8),
    "R": torch.tensor((*SHORT[::-1], *SHORT, 1, 2, 3), dtype=torch.int8),
    "X": torch.arange(17.0) / 4 - 2,
}
PROGRAMS = {
    "a square in a filter": ("J: i32[M], X[N]", "A[M]", "A[m] = sum[n] X[n] where J[m] * J[m] < n + 5"),
    "a sum in a filter": ("J: i32[M], K: i32[N], X[N]", "A[M]", "A[m] = sum[n] X[n] where J[m] + K[n] > 0"),
    "a difference": ("J: i32[M], K: i32[N], X[N]", "A[M]", "A[m] = sum[n] X[n] where J[m] - K[n] > 0"),
    "a product": ("J: i32[M], K: i32[N]", "A: i64[M,N]", "A[m,n] = J[m] * K[n] + 1"),
    "the extreme of products": ("J: i32[M], K: i32[N]", "A: i64[M]", "A[m] = max[n] (J[m] * K[n])"),
    "a sign": ("J: i32[M]", "A: i64[M]", "A[m] = -J[m]"),
    "a quotient": ("J: i32[M]", "A: i64[M]", "A[m] = J[m] // (0 - 1)"),
    "a size": ("J: i32[M]", "A: i64[M]", "A[m] = abs(J[m]) + 1"),
    "a power": ("J: i32[M]", "A: i64[M]", "A[m] = pow(J[m], 2)"),
    "a power that becomes a float": ("J: i32[M]", "A: f32[M]", "A[m] = pow(J[m], 2) * 0.5"),
    "remainders": ("J: i32[M], K: i32[N]", "A: i64[M,N]", "A[m,n] = (J[m] + K[n]) % 7 + (J[m] + K[n]) // 5"),
    "quotients of what is not negative": (
        "S: i8[M], R: i8[N]",
        "A: i64[M,N]",
        "T[m,n] = max(S[m] * R[n], 0)\n    U[m] = sum[n] T[m,n]\n    A[m,n] = U[m] // (T[m,n] + 3) + U[m] % (T[m,n] + 5)",
    ),
    "quotients of a sum": (
        "S: i8[M], R: i8[N]",
        "A: i64[M,N]",
        "T[m,n] = S[m] * R[n]\n    U[m] = sum[n] T[m,n]\n    A[m,n] = U[m] // (abs(R[n]) + 3) + U[m] % (abs(R[n]) + 5)",
    ),
    "short integers": ("S: i8[M], R: i8[N]", "A: i64[M,N]", "A[m,n] = S[m] * R[n] - S[m]"),
    "short integers in a filter": ("S: i8[M], R: i8[N], X[N]", "A[M]", "A[m] = sum[n] X[n] where S[m] * R[n] < 300"),
    "a short integer and a number": ("S: i8[M]", "A: i64[M]", "A[m] = S[m] * 300"),
    "a sum of short integers": ("S: i8[M], R: i8[N]", "A: i64[M]", "A[m] = sum[n] (S[m] + R[n])"),
    "coordinates": ("J: i32[M], X[N]", "A[M]", "A[m] = sum[n] X[n] where (m + 100000) * (n + 100000) > J[m]"),
    "a choice": ("J: i32[M]", "A: i64[M]", "A[m] = select(J[m] > 0, 5000000000, J[m])"),
    "a comparison": ("J: i32[M]", "A: bool[M]", "A[m] = J[m] + 5000000000 > 5000000003"),
    "a large number": ("J: i32[M]", "A: i64[M]", "A[m] = 5000000000 where m < M and J[m] > 0"),
}


@pytest.mark.parametrize(
    ("name", "rounds"), [("quotients of what is not negative", False), ("quotients of a sum", True)]
)
def test_division_rounds_down_where_it_can_be_told_apart(name: str, rounds: bool) -> None:
    params, result, lines = PROGRAMS[name]
    cascade = final(f"cascade c({params}) -> {result} {{\n    {lines}\n}}")
    (kernel,) = all_kernels(planner_for(cascade, {param.name: DATA[param.name] for param in cascade.params}))
    assert ("floor_divide(" in emitted(kernel)) is ("floor_modulo(" in emitted(kernel)) is rounds


class Bits:
    """A tensor of torch with the methods that helpers of kernels call."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __sub__(self, other: float) -> Bits:
        return Bits(self.tensor - other)

    def __or__(self, other: int) -> Bits:
        return Bits(self.tensor | other)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Bits:
        return Bits(self.tensor.view(dtype) if bitcast else self.tensor.to(dtype))


@pytest.mark.parametrize(("kind", "dtype"), [(DType.BF16, torch.bfloat16), (DType.F16, torch.float16)])
def test_integers_of_few_values_are_floats_without_conversion(kind: DType, dtype: torch.dtype) -> None:
    """The text of the helper, run by torch on every stretch of integers that it is written for."""
    name, count = f"short_{kind.value}", 1 << MANTISSA[kind]
    types = SimpleNamespace(
        int16=torch.int16, int32=torch.int32, bfloat16=torch.bfloat16, float16=torch.float16, constexpr=int
    )
    scope: dict[str, Any] = {"triton": SimpleNamespace(jit=lambda it: it), "tl": types}
    exec(HELPERS[name], scope)
    for low in {-count, 1 - count, -count // 2, -8, -1, 0, 1}:
        for kind_of in (torch.int64, torch.int32, torch.int8):
            integers = torch.arange(low, low + count, dtype=torch.int32)
            integers = integers[integers == integers.to(kind_of)].to(kind_of)
            assert torch.equal(scope[name](Bits(integers), low).tensor, integers.to(dtype))


@pytest.mark.parametrize(
    ("kind", "expr", "short"),
    [
        ("bf16", "W[f,d] % 16 - 8", True), ("bf16", "W[f,d]", False), ("f16", "W[f,d]", True),
        ("bf16", "W[f,d] % 128", True), ("bf16", "W[f,d] % 129", False), ("f32", "W[f,d] % 16", False),
        ("bf16", "W[f,d] % 16 + 1000", False),
    ],
)  # fmt: skip
def test_others_are_converted(kind: str, expr: str, short: bool) -> None:
    text = f"cascade c(X[T,D], W: i8[F,D]) -> Y[T,F] {{ Q[f,d] = cast({expr}, {kind})\n Y[t,f] = X[t,d] * Q[f,d] }}"
    kinds = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.bfloat16}
    inputs = {"X": torch.empty(16, 256, dtype=kinds[kind]), "W": torch.empty(64, 256, dtype=torch.int8)}
    (kernel,) = all_kernels(planner_for(final(text), inputs))
    assert (f"short_{kind}(" in emitted(kernel)) is short


@pytest.mark.parametrize("name", PROGRAMS)
def test_integers_are_exact(name: str) -> None:
    params, result, line = PROGRAMS[name]
    text = f"cascade c({params}) -> {result} {{\n    {line}\n}}"
    source = parse_cascade(text)
    inputs: dict[str, Tensor] = {param.name: DATA[param.name] for param in source.params}
    (wanted,) = run(source, inputs, precision=Precision.REFERENCE).values()
    on_device = {key: tensor.to(DEVICE) for key, tensor in inputs.items()}
    (found,) = call_of(Chosen(final(text)))(**on_device)
    torch.testing.assert_close(found.cpu().to(wanted.dtype), wanted, rtol=1e-6, atol=0)


ENDS = {"i": (-5, 3), "j": (0, 4), "k": (1, 6)}


def trees(depth: int) -> list[Expr]:
    """Expressions of integers over three coordinates."""
    leaves: list[Expr] = [Rank("i"), Rank("j"), Rank("k"), Const(-3), Const(2)]
    if not depth:
        return leaves
    inner = leaves[:3] + trees(depth - 1)[-8:]
    found: list[Expr] = [Apply(op, (a,)) for op in ("neg", "abs", "relu", "sign") for a in inner]
    pairs = list(itertools.product(inner, leaves))
    found += [Apply(op, pair) for op in ("add", "sub", "mul", "min", "max", "floordiv", "mod") for pair in pairs]
    found += [Apply("clamp", (a, Const(-2), b)) for a, b in pairs if b != Const(-3)]
    found += [Apply("select", (Apply("lt", pair), *pair)) for pair in pairs]
    return [*found, Cast(DType.I64, found[-1])]


def value(expr: Expr, at: dict[str, int]) -> int | None:
    """An expression at some coordinates, by Python; None where it divides by 0."""
    match expr:
        case Const():
            return int(expr.value)
        case Rank():
            return at[expr.name]
        case Cast():
            return value(expr.arg, at)
    assert isinstance(expr, Apply)
    args = [value(arg, at) for arg in expr.args]
    if any(arg is None for arg in args) or (expr.op in ("floordiv", "mod") and args[1] == 0):
        return None
    by = {
        "neg": lambda a: -a, "abs": abs, "relu": lambda a: max(a, 0), "sign": lambda a: (a > 0) - (a < 0),
        "add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b, "min": min, "max": max,
        "floordiv": lambda a, b: a // b, "mod": lambda a, b: a % b, "lt": lambda a, b: a < b,
        "clamp": lambda a, b, c: min(max(a, b), c), "select": lambda a, b, c: b if a else c,
    }  # fmt: skip
    return int(by[expr.op](*args))


def test_an_interval_holds_every_value() -> None:
    for expr in trees(2):
        low, high = interval(expr, lambda leaf: ENDS[leaf.name])  # type: ignore[attr-defined]
        for i, j, k in itertools.product(*(range(low, high + 1) for low, high in ENDS.values())):
            found = value(expr, {"i": i, "j": j, "k": k})
            assert found is None or low <= found <= high, (expr, i, j, k)


def test_types_hold_their_ends() -> None:
    for dtype, bits in ((DType.I8, 8), (DType.I32, 32), (DType.I64, 64)):
        low, high = values_of(dtype)
        assert fits((low, high), dtype) and not fits((low - 1, 0), dtype) and not fits((0, high + 1), dtype)
        assert high - low + 1 == 2**bits
