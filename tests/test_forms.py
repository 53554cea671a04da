"""Forms that people write and no table times: all of them are kernels, which a compiler finishes with and which are right.

Planned for an H200 at the sizes that they have, compiled offline; run small, held against the reference by the rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import cascade
from cascade.backends.triton import launch
from cascade.backends.triton.emit import emit
from cascade.backends.triton.launch import KernelStep, Launcher, RestStep, layout
from cascade.backends.triton.offline import StaticFacts, facts
from cascade.backends.triton.static import request
from cascade.inference import bind_sizes
from tests.planned import OnAnH200
from tests.tolerance import judge_all, standard

LITTLE = 1024  # bytes of a thread in memory, of what the model takes untimed: tuning throws out all that spill
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Form:
    """A cascade, the sizes that it is planned for and those that it is run at."""

    text: str
    large: dict[str, int]
    small: dict[str, int]


ATTENDS = "P[b,h,m,n] = softmax[n] S[b,h,m,n]; O[b,h,m,f] = P[b,h,m,n] * V[b,h,n,f]"
FORMS = {
    "keys that are padding": Form(
        "cascade c(Q[B,H,M,E], K[B,H,N,E], V[B,H,N,F], live: bool[B,N]) -> O[B,H,M,F] {"
        f"S[b,h,m,n] = Q[b,h,m,e] * K[b,h,n,e] / sqrt(E) where n <= m and live[b,n]; {ATTENDS} }}",
        {"B": 4, "H": 16, "M": 4096, "N": 4096, "E": 128, "F": 128},
        {"B": 2, "H": 2, "M": 9, "N": 21, "E": 5, "F": 6},
    ),
    "heads that hear each other": Form(
        "cascade c(Q[B,G,M,E], K[B,G,N,E], V[B,H,N,F], T[H,G]) -> O[B,H,M,F] {"
        "R[b,g,m,n] = Q[b,g,m,e] * K[b,g,n,e] / sqrt(E); S[b,h,m,n] = T[h,g] * R[b,g,m,n];"
        f"{ATTENDS} }}",
        {"B": 4, "G": 16, "H": 16, "M": 2048, "N": 2048, "E": 64, "F": 64},
        {"B": 2, "G": 3, "H": 4, "M": 9, "N": 21, "E": 5, "F": 6},
    ),
    "edges of triangles": Form(
        "cascade c(Q[B,I,M,H,E], K[B,I,N,H,E], V[B,I,N,H,F], T[B,H,M,N]) -> O[B,I,M,H,F] {"
        "S[b,i,m,h,n] = (sum[e] Q[b,i,m,h,e] * K[b,i,n,h,e]) / sqrt(E) + T[b,h,m,n];"
        "P[b,i,m,h,n] = softmax[n] S[b,i,m,h,n]; O[b,i,m,h,f] = P[b,i,m,h,n] * V[b,i,n,h,f] }",
        {"B": 1, "I": 512, "M": 512, "N": 512, "H": 4, "E": 32, "F": 32},
        {"B": 1, "I": 3, "M": 9, "N": 21, "H": 2, "E": 5, "F": 6},
    ),
    "along one side of a picture": Form(
        "cascade c(Q[B,H,M,J,E], K[B,H,N,J,E], V[B,H,N,J,F]) -> O[B,H,M,J,F] {"
        "S[b,h,m,j,n] = Q[b,h,m,j,e] * K[b,h,n,j,e] / sqrt(E); P[b,h,m,j,n] = softmax[n] S[b,h,m,j,n];"
        "O[b,h,m,j,f] = P[b,h,m,j,n] * V[b,h,n,j,f] }",
        {"B": 4, "H": 8, "M": 128, "N": 128, "J": 128, "E": 64, "F": 64},
        {"B": 1, "H": 2, "M": 9, "N": 21, "J": 3, "E": 5, "F": 6},
    ),
    "distances in a picture": Form(
        "cascade c(Q[B,M,N,E], K[B,M,N,E], V[B,M,N,F], R[H,W]) -> O[B,M,N,F] {"
        "S[b,m,n,x,y] = (sum[e] Q[b,m,n,e] * K[b,x,y,e]) / sqrt(E) + R[m-x+8,n-y+8];"
        "P[b,m,n,x,y] = softmax[x,y] S[b,m,n,x,y]; O[b,m,n,f] = P[b,m,n,x,y] * V[b,x,y,f] }",
        {"B": 64, "M": 9, "N": 9, "H": 17, "W": 17, "E": 64, "F": 64},
        {"B": 2, "M": 3, "N": 5, "H": 17, "W": 17, "E": 5, "F": 6},
    ),
    **{
        f"one vector for a sequence, {width} wide": Form(
            "cascade c(X[B,T,D], w[D]) -> Y[B,D] {"
            "S[b,t] = X[b,t,d] * w[d]; P[b,t] = softmax[t] S[b,t]; Y[b,d] = P[b,t] * X[b,t,d] }",
            {"B": 64, "T": 4096, "D": width}, {"B": 3, "T": 37, "D": width // 32},
        )
        for width in (256, 1024)
    },
    "norms of batches": Form(
        "cascade c(X[B,C,H,W], g[C], s[C]) -> Y[B,C,H,W] {"
        "U[c] = mean[b,h,w] X[b,c,h,w]; D[c] = mean[b,h,w] (X[b,c,h,w] - U[c]) * (X[b,c,h,w] - U[c]);"
        "Y[b,c,h,w] = (X[b,c,h,w] - U[c]) * rsqrt(D[c] + 1e-5) * g[c] + s[c] }",
        {"B": 32, "C": 256, "H": 56, "W": 56}, {"B": 3, "C": 2, "H": 5, "W": 7},
    ),
    "norms of groups": Form(
        "cascade c(X[B,G,C,H,W], g[G,C], s[G,C]) -> Y[B,G,C,H,W] {"
        "U[b,k] = mean[c,h,w] X[b,k,c,h,w]; D[b,k] = mean[c,h,w] (X[b,k,c,h,w] - U[b,k]) * (X[b,k,c,h,w] - U[b,k]);"
        "Y[b,k,c,h,w] = (X[b,k,c,h,w] - U[b,k]) * rsqrt(D[b,k] + 1e-5) * g[k,c] + s[k,c] }",
        {"B": 16, "G": 32, "C": 16, "H": 64, "W": 64}, {"B": 2, "G": 2, "C": 3, "H": 5, "W": 7},
    ),
    "a softmax of pictures": Form(
        "cascade c(X[B,H,W]) -> Y[B,H,W] { Y[b,h,w] = softmax[h,w] X[b,h,w] }",
        {"B": 256, "H": 128, "W": 128}, {"B": 2, "H": 5, "W": 7},
    ),
    "distances of points": Form(
        "cascade c(X[M,D], Y[N,D]) -> Z[M] {"
        "S[m,n] = sum[d] (X[m,d] - Y[n,d]) * (X[m,d] - Y[n,d]); Z[m] = logsumexp[n] (-0.5 * S[m,n]) }",
        {"M": 8192, "N": 8192, "D": 64}, {"M": 5, "N": 37, "D": 6},
    ),
    "a loss that spreads": Form(
        "cascade c(X[T,D], W[V,D], y: i64[T]) -> L[T] {"
        "Z[t,v] = X[t,d] * W[v,d]; A[t] = logsumexp[v] Z[t,v]; U[t] = mean[v] Z[t,v];"
        "L[t] = A[t] - 0.9 * Z[t,y[t]] - 0.1 * U[t] }",
        {"T": 8192, "D": 4096, "V": 32000}, {"T": 5, "D": 24, "V": 37},
    ),
    "attention without a softmax": Form(
        "cascade c(Q[B,H,N,E], K[B,H,N,E], V[B,H,N,F]) -> O[B,H,N,F] {"
        "T[b,h,e,f] = sum[n] exp(K[b,h,n,e]) * V[b,h,n,f]; Z[b,h,e] = sum[n] exp(K[b,h,n,e]);"
        "O[b,h,n,f] = (sum[e] exp(Q[b,h,n,e]) * T[b,h,e,f]) / (sum[e] exp(Q[b,h,n,e]) * Z[b,h,e]) }",
        {"B": 4, "H": 16, "N": 4096, "E": 64, "F": 64}, {"B": 2, "H": 2, "N": 21, "E": 5, "F": 6},
    ),
}  # fmt: skip


def given(text: str, sizes: dict[str, int], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Inputs of a form."""
    generator, found = torch.Generator().manual_seed(7), dict[str, Tensor]()
    for param in cascade.compile(text).cascade.params:
        shape = [size if isinstance(size, int) else sizes[size] for size in param.shape]
        if device == "meta":
            kinds = {"live": torch.bool, "y": torch.int64}
            found[param.name] = torch.empty(shape, dtype=kinds.get(param.name, dtype), device=device)
        elif param.name == "live":
            found["live"] = (torch.rand(shape, generator=generator) < 0.7).to(device)
        elif param.name == "y":
            found["y"] = torch.randint(0, sizes["V"], shape, generator=generator).to(device)
        else:
            found[param.name] = torch.randn(shape, generator=generator).to(device, dtype)
    return found


@pytest.mark.parametrize("name", FORMS)
def test_large_ones_are_kernels_that_compile(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    form, compiled = FORMS[name], cascade.compile(FORMS[name].text)
    inputs = given(form.text, form.large, torch.bfloat16, "meta")
    launcher = Launcher(compiled.trace.final, "none", compiled.cascade)
    extents = bind_sizes(launcher.cascade, {key: tuple(value.shape) for key, value in inputs.items()}, {})
    planner = launcher.planner(extents, {key: layout(value) for key, value in inputs.items()}, descriptors=True)
    steps = list(launcher.steps(planner, "c", OnAnH200(torch.device("meta"), "none", dict(inputs))))
    outside = [step.group.reason for step in steps if isinstance(step, RestStep)]
    assert not outside, outside
    kernels = [step.kernel for step in steps if isinstance(step, KernelStep)]
    assert all(math.isfinite(choice.estimate.time_us) for choice in launcher.choices.values())
    answers = facts([request(one, emit(one)) for one in kernels], jobs=2)
    for kernel, found in zip(kernels, answers, strict=True):
        assert isinstance(found, StaticFacts), f"{kernel.name}: {found}"
        assert found.spills <= LITTLE, f"{kernel.name}: {found.spills} bytes"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_small_ones_are_right(name: str, dtype: torch.dtype) -> None:
    form = FORMS[name]
    call, inputs = cascade.compile(form.text, backend="triton"), given(form.text, form.small, dtype, DEVICE)
    verdict = judge_all(call(**inputs), standard(call.cascade, inputs, {}))
    assert verdict.ok, verdict
    assert "no kernel" not in call.explain()
