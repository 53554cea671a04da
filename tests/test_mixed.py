"""Programs whose tensors are of several types, products in full precision among them: both Tritons compile their
kernels, and these compute what the cascade means.

Triton 3.6 lays out the operands of a product for the narrowest load that they are computed from, element by element:
data, a bias, a mask that decides what counts, an index that says where to look.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping

import pytest

import cascade
from cascade import trial
from cascade.backends.triton.emit import short_sources
from cascade.backends.triton.offline import StaticFacts, facts
from cascade.backends.triton.plan import Dot, every_op
from cascade.backends.triton.static import request
from cascade.frontend.build import parse_cascade
from cascade.ir import DType
from tests.test_static import Built, Shipped, kernels, planner_of, python_of
from tests.tolerance import judge_all, standard

ATTENTION = """
cascade {name}(Q: {q}[B,H,M,E], K: {k}[B,H,N,E], V: {v}[B,H,N,F]{params}) -> O[B,H,M,F] {{
    S[b,h,m,n] = (sum[e] Q[b,h,m,e] * K[b,h,n,e]) / sqrt(E){bias}
    P[b,h,m,n] = softmax[n] S[b,h,m,n]
    O[b,h,m,f] = P[b,h,m,n] * V[b,h,n,f]
}}
"""
PRODUCT = "cascade {name}(X: {x}[M,K], W: {w}[N,K]) -> Y: f32[M,N] {{ Y[m,n] = X[m,k] * W[n,k]{scale} }}"
SIZES = {"B": 4, "H": 16, "M": 4096, "N": 4096, "E": 128, "F": 128, "R": 31, "K": 1024, "G": 8}
SMALL = {"B": 1, "H": 2, "M": 70, "N": 70, "E": 16, "F": 32, "R": 31, "K": 96, "G": 3}


def attention(
    name: str, q: str = "bf16", k: str = "bf16", v: str = "bf16", params: str = "", bias: str = ""
) -> tuple[str, str]:
    """An attention of these types, with more parameters and what is added to its scores."""
    text = ATTENTION.format(name=name, q=q, k=k, v=v, params=params, bias=bias)
    return name, text


def product(name: str, x: str, w: str, scale: str = "", params: str = "") -> tuple[str, str]:
    """A product of tensors of these types."""
    return name, PRODUCT.format(name=name, x=x, w=w, scale=scale).replace("[N,K])", f"[N,K]{params})")


MIXED: Mapping[str, str] = dict(
    [
        attention("table", params=", T: f32[H,R]", bias=" + T[h,m-n+R//2]  where m // 16 == n // 16"),
        attention("queries", q="f32"),
        attention("keys", k="f32"),
        attention("values", v="f16", q="f32", k="f32"),
        attention("bias", "f32", "f32", "f32", ", T: f16[M,N]", " + T[m,n]"),
        attention("mask", "f32", "f32", "f32", ", T: bool[M,N]", "  where T[m,n]"),
        attention("documents", "f32", "f32", "f32", ", T: i8[B,N]", "  where T[b,n] > 1"),
        product("weights", "f32", "bf16"),
        product("rows", "f16", "f32"),
        product("bytes", "f32", "i8"),
        product("eights", "f32", "f8e4m3"),
        product("groups", "f32", "f32", " * s[n,k//128]", ", s: f32[N,G]"),
    ]
)


@functools.cache
def built() -> dict[str, tuple[Built, ...]]:
    """The kernels of every program, with the planner's own tiles."""
    return {name: tuple(kernels(planner_of(Shipped(name, text, SIZES)), name)) for name, text in MIXED.items()}


@pytest.mark.parametrize("version", ["3.9", "3.6"])
@pytest.mark.campaign
def test_kernels_of_several_types_compile(version: str) -> None:
    wanted = [one for many in built().values() for one in many]
    answers = facts([request(one.kernel, one.source) for one in wanted], "sm_90", python_of(version), 2)
    for one, found in zip(wanted, answers, strict=True):
        assert isinstance(found, StaticFacts), f"{one.kernel.name}: {found.message}"
        assert found.triton.startswith(f"{version}.") and found.blocks_per_sm > 0
        assert found.spills <= 256, f"{one.kernel.name} spills {found.spills} bytes a thread"


def test_no_operand_in_f64_is_seen_to_come_from_short_data() -> None:
    """Only such operands are taken behind a sum of one element: products of 32-bit tensors are as they were."""
    for name, many in built().items():
        products = [(one, op) for one in many for op in every_op(one.kernel.ops) if isinstance(op, Dot) and op.exact]
        sides = {(one.source.text, side) for one, op in products for side in (op.left, op.right)
                 if side in short_sources(one.kernel)}  # fmt: skip
        assert bool(sides) is (name != "groups"), name
        for text, side in sides:
            assert re.search(rf"settled\((tl\.where\(n_first >= 0, )?{side}\b", text), (name, side)
    fine = planner_of(Shipped("fine", MIXED["keys"].replace("f32", "bf16").replace(": bf16[", "["), SIZES), DType.F32)
    assert "settled" not in "".join(one.source.text for one in kernels(fine, "fine"))


@pytest.mark.parametrize("name", MIXED)
def test_kernels_of_several_types_compute_what_the_cascade_means(name: str) -> None:
    program = parse_cascade(MIXED[name])
    sizes = {size: SMALL[size] for param in program.params for size in param.shape if isinstance(size, str)}
    inputs = trial.random_inputs(program, sizes, trial.param_types(program, DType.F32), seed=1)
    by_kernels, planned = cascade.compile(MIXED[name], backend="triton"), standard(program, inputs, {})
    verdict = judge_all(by_kernels(**inputs), planned)
    assert verdict.ok, verdict
    assert ("settled(" in "".join(by_kernels.sources().values())) is (name != "groups")
