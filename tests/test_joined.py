"""Ranks that are one in a kernel: which, what the cascade means, and the kernels.

The witnesses: the interpreter on the cascade before and after, and the tolerance rule.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import cascade
from cascade import interp
from cascade.backends.triton import launch
from cascade.backends.triton.joined import Joined, with_joined
from cascade.backends.triton.planner import Layout, contiguous, gaps, viewed
from cascade.ir import DType
from cascade.text import render_stmt
from cascade.values import Precision
from cascade.verify import verify
from tests.planned import final
from tests.tolerance import judge_all, standard

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZES = {"B": 2, "T": 18, "D": 1100, "H": 4, "G": 2, "E": 16, "N": 20, "F": 1030}
JOINED = {
    "summed": ("U[T,H,E], W[D,H,E]", "Y[T,D]", "Y[t,d] = sum[h,e] U[t,h,e] * W[d,h,e]"),
    "columns": ("X[T,D], W[H,E,D]", "Y[T,H,E]", "Y[t,h,e] = sum[d] X[t,d] * W[h,e,d]"),
    "rows": ("X[B,T,D], W[F,D], c[F]", "Y[B,T,F]", "Y[b,t,f] = relu(sum[d] X[b,t,d] * W[f,d] + c[f])"),
    "three": ("X[B,T,H,D], W[F,D]", "Y[B,T,H,F]", "Y[b,t,h,f] = sum[d] X[b,t,h,d] * W[f,d]"),
    "one after another": (
        "X[B,T,D], W[H,E,D], V[D,H,E]", "Y[B,T,D]",
        "Z[b,t,h,e] = sum[d] X[b,t,d] * W[h,e,d]; Y[b,t,d] = sum[h,e] Z[b,t,h,e] * V[d,h,e]",
    ),
    "behind rows that are empty": (
        "Q[T,H,E], K[N,H,E], W[D,H,E]", "Y[T,D]",
        "S[h,t,n] = Q[t,h,e] * K[n,h,e] where n < t - 3; P[h,t,n] = softmax[n] S[h,t,n]; "
        "U[t,h,e] = P[h,t,n] * K[n,h,e]; Y[t,d] = sum[h,e] U[t,h,e] * W[d,h,e]",
    ),
    "of two products that share rows": (
        "X[T,D], W[H,E,D], V[G,E,D]", "Y[T,H,E], Z[T,G,E]",
        "Y[t,h,e] = sum[d] X[t,d] * W[h,e,d]; Z[t,g,e] = sum[d] X[t,d] * V[g,e,d]",
    ),
    "by a number": ("X[B,T,D], W[4,E,D]", "Y[B,T,4,E]", "Y[b,t,h,e] = sum[d] X[b,t,d] * W[h,e,d]"),
    "where a filter knows": (
        "X[B,T,D], W[F,D], m: i32[B,T]", "Y[B,T,F] fill 0", "Y[b,t,f] = sum[d] X[b,t,d] * W[f,d] where m[b,t] > 0",
    ),
    "in a trip that two kernels share": (
        "X[B,T,D], W[F,D], V[D,F]", "Y[B,T,D], Z[B,T,F]",
        "Z[b,t,f] = sum[d] X[b,t,d] * W[f,d] / 40; R[b,t] = max[f] Z[b,t,f]; "
        "Y[b,t,d] = sum[f] exp(Z[b,t,f] - R[b,t]) * V[d,f]",
    ),
    "in a fold": (
        "X[T,D], W[H,E,D], V[F,H,E]", "Y[T,F]",
        "Q[t,h,e] = sum[d] X[t,d] * rsqrt(mean[d] X[t,d] * X[t,d] + 1.0) * W[h,e,d]; "
        "Y[t,f] = sum[h,e] Q[t,h,e] * V[f,h,e]",
    ),
}  # fmt: skip
APART = {
    "one of them alone": ("X[T,D], W[H,E,D], r[H]", "Y[T,H,E]", "Y[t,h,e] = sum[d] X[t,d] * W[h,e,d] * r[h]"),
    "in another order": ("U[T,E,H], W[D,H,E]", "Y[T,D]", "Y[t,d] = sum[h,e] U[t,e,h] * W[d,h,e]"),
    "a coordinate counts": ("U[T,H,E], W[D,H,E]", "Y[T,D]", "Y[t,d] = sum[h,e] U[t,h,e] * W[d,h,e] where e < 9"),
    "beside a number": ("X[B,T,D,F], W[F,D]", "Y[B,T,F]", "Y[b,t,f] = sum[d] X[b,t,d,0] * W[f,d]"),
    "at two places": ("X[E,E,E]", "Y[E,E]", "Y[f,g] = sum[h,e] X[h,e,f] * X[g,h,e]"),
    "beside one of them again": ("X[E,E,E], W[F,E]", "Y[E,F]", "Y[t,f] = sum[h,e] X[h,e,e] * X[t,h,e] * W[f,e]"),
    "all operands have them": ("X[B,H,T,D], W[B,H,F,D]", "Y[B,H,T,F]", "Y[b,h,t,f] = sum[d] X[b,h,t,d] * W[b,h,f,d]"),
}


def program(parts: tuple[str, str, str]) -> str:
    params, result, body = parts
    return f"cascade c({params}) -> {result} {{ {body} }}"


def given(text: str, dtype: torch.dtype = torch.float32, **sizes: int) -> dict[str, Tensor]:
    """Inputs of a program."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        param.name: [size if isinstance(size, int) else (SIZES | sizes)[size] for size in param.shape]
        for param in final(text).params
    }
    found = {name: torch.randn(s, generator=generator).to(DEVICE, dtype) / 2 for name, s in shapes.items()}
    return found | ({"m": (found["m"] > 0).int()} if "m" in found else {})


@pytest.mark.parametrize("name", JOINED)
def test_ranks_that_lie_together_are_one(name: str) -> None:
    text = program(JOINED[name])
    plain, inputs = final(text), given(text)
    joined = with_joined(Joined(plain), SIZES, dict.fromkeys(inputs, ()))
    verify(joined.cascade)
    assert joined.sizes and joined.views
    sizes = joined.extents(SIZES)
    bound = {symbol: sizes[symbol] for symbol in joined.sizes}
    before = interp.run(plain, inputs, precision=Precision.REFERENCE)
    after = interp.run(joined.cascade, inputs, bound, precision=Precision.REFERENCE)
    for name in before:
        torch.testing.assert_close(after[name], before[name], rtol=1e-12, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", JOINED)
@pytest.mark.parametrize("odd", [{}, {"E": 5, "T": 7, "D": 1101}], ids=["even", "odd"])
def test_kernels_of_joined_ranks(name: str, dtype: torch.dtype, odd: dict[str, int]) -> None:
    text = program(JOINED[name])
    call, inputs = cascade.compile(text, backend="triton"), given(text, dtype, **odd)
    found = call(**inputs)
    verdict = judge_all(found, standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict
    results = found if isinstance(found, tuple) else (found,)
    assert all(result.is_contiguous() for result in results)
    assert ("no kernel" in call.explain()) == ("empty" in name)  # which rows, one kernel knows
    assert "empty" in name or any("_flat" in text for text in call.sources().values())


@pytest.mark.parametrize("name", APART)
def test_ranks_stay_apart_where(name: str) -> None:
    text = program(APART[name])
    assert with_joined(Joined(final(text)), SIZES, dict.fromkeys(given(text), ())).cascade == final(text)
    call, inputs = cascade.compile(text, backend="triton"), given(text)
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict


def test_data_with_gaps_is_read_where_it_lies() -> None:
    text = program(JOINED["summed"])
    call, inputs = cascade.compile(text, backend="triton"), given(text)
    gaps = {name: torch.stack([tensor] * 2, -1)[..., 0] for name, tensor in inputs.items()}
    torch.testing.assert_close(call(**gaps), call(**inputs), rtol=1e-5, atol=1e-5)
    assert not with_joined(Joined(final(text)), SIZES, {}).views


def test_ranks_are_one_where_gaps_are_elsewhere() -> None:
    text = program(JOINED["summed"])
    call, plain = cascade.compile(text, backend="triton"), given(text)
    some = {name: torch.cat([tensor] * 3, 1)[:, 1 : tensor.shape[1] + 1] for name, tensor in plain.items()}
    assert not any(tensor.is_contiguous() for tensor in some.values())
    verdict = judge_all(call(**some), standard(call.cascade, some, {}))
    assert verdict.ok, verdict
    assert any("_flat" in text for text in call.sources().values())


@pytest.mark.parametrize("shape", [(4, 3, 8), (4, 1, 8), (1, 3, 8), (4, 3, 1), (1, 1, 8)])
@pytest.mark.parametrize("wide", range(3))
def test_what_lies_together_is_what_torch_can_view(shape: tuple[int, ...], wide: int) -> None:
    whole = torch.zeros([2 * n if dim == wide else n for dim, n in enumerate(shape)])
    tensor = whole.narrow(wide, 0, shape[wide])
    layout = Layout(tuple(shape), tensor.stride(), DType.F32, True)
    for at in range(2):
        merged = (*shape[:at], shape[at] * shape[at + 1], *shape[at + 2 :])
        if at in gaps(layout):
            with pytest.raises(RuntimeError):
                tensor.view(merged)
        else:
            steps = zip(merged, viewed(layout, merged), tensor.view(merged).stride(), strict=True)
            assert all(extent == 1 or ours == theirs for extent, ours, theirs in steps)


def test_lengths_that_change_share_kernels() -> None:
    text = program(JOINED["rows"])
    call, sources = cascade.compile(text, backend="triton"), set()
    for length in range(17, 57, 5):
        inputs = given(text, T=length)
        verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
        assert verdict.ok, verdict
        sources |= set(call.sources().values())
    assert len(sources) <= 3


def test_what_is_joined_is_said() -> None:
    text = program(JOINED["rows"])
    joined = with_joined(Joined(final(text)), SIZES, {"X": (), "W": (), "c": ()})
    assert [render_stmt(stmt) for stmt in joined.cascade.body] == [
        "X_flat[bt,d] = X[bt//T,bt%T,d]",
        "Y_sum_flat[bt,f] = sum[d] X_flat[bt,d] * W[f,d]",
        "Y_flat[bt,f] = relu(Y_sum_flat[bt,f] + c[f])",
        "Y[b,t,f] = Y_flat[b*T+t,f]",
    ]
    assert joined.sizes == {"BT": ("B", "T")} and joined.views == {"X_flat": "X", "Y": "Y_flat"}


def test_a_decoder_layer_is_kernels_alone() -> None:
    """At the sizes of Llama: what is planned, and not run."""
    made = final((Path(__file__).parents[1] / "examples" / "decoder_layer.cascade").read_text())
    sizes = {"T": 8192, "D": 4096, "H": 32, "G": 8, "E": 128, "F": 14336}
    layouts = {}
    for param in made.params:
        shape = tuple(sizes[str(size)] for size in param.shape)
        layouts[param.name] = Layout(shape, contiguous(shape), DType.BF16, True)
    launcher = launch.Launcher(made)
    planner = launcher.planner(sizes, layouts, descriptors=True)
    outside = [step.group for step in launcher.steps(planner, "layer", None) if isinstance(step, launch.RestStep)]
    assert not outside, [(group.names, group.reason) for group in outside]
