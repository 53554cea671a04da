"""Fused groups are run block by block: memory stays bounded, and an illegal group gives other numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cascade.errors import VerifyError
from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.ir import Cascade
from cascade.verify import verify

UNSTABLE = """
cascade unstable(Q[M,E], K[N,E], V[N,F]) -> O[M,F] {
    S[m,n] = sum[e] Q[m,e] * K[n,e] where n <= m
    P[m,n] = exp(S[m,n])
    D[m] = sum[n] P[m,n]
    A[m,f] = sum[n] P[m,n] * V[n,f]
    O[m,f] = A[m,f] / D[m]
} schedule {
    fuse {S, P, D, A, O} over m
    fuse {S, P, D, A} over n
    tile m = 512, n = 512
}
"""
THREE_PASSES = """
cascade attention(Q[M,E], K[N,E], V[N,F]) -> O[M,F] {{
    S[m,n] = sum[e] Q[m,e] * K[n,e]
    R[m] = max[n] S[m,n]
    P[m,n] = exp(S[m,n] - R[m])
    D[m] = sum[n] P[m,n]
    O[m,f] = sum[n] P[m,n] / D[m] * V[n,f]
}} schedule {{
    fuse {{{group}}} over n
    tile n = 4
}}
"""


def inputs(m: int, n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"Q": (m, 4), "K": (n, 4), "V": (n, 3)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = q @ k.T
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
    return scores.softmax(-1) @ v


@pytest.mark.parametrize("block", [1, 3, 16, 100])
def test_nested_groups_give_the_same_numbers(block: int) -> None:
    cascade = parse_cascade(UNSTABLE)
    verify(cascade)
    tensors = inputs(33, 33)
    found = run(cascade, tensors, precision=Precision.REFERENCE, block=block)["O"]
    torch.testing.assert_close(found, reference(*tensors.values(), causal=True), rtol=1e-12, atol=1e-12)


def fused(group: str) -> Cascade:
    return parse_cascade(THREE_PASSES.format(group=group))


@pytest.mark.parametrize("group", ["S, R", "P, D", "S"])
def test_a_legal_group_gives_the_same_numbers(group: str) -> None:
    verify(fused(group))
    tensors = inputs(5, 13)
    found = run(fused(group), tensors, precision=Precision.REFERENCE)["O"]
    torch.testing.assert_close(found, reference(*tensors.values(), causal=False), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", ["S, R, P", "P, D, O", "S, R, P, D, O"])
def test_an_illegal_group_is_refused_and_would_give_other_numbers(group: str) -> None:
    with pytest.raises(VerifyError) as caught:
        verify(fused(group))
    assert {diagnostic.code for diagnostic in caught.value.diagnostics} == {"C244"}
    tensors = inputs(5, 13)
    found = run(fused(group), tensors, precision=Precision.REFERENCE)["O"]
    assert not (found - reference(*tensors.values(), causal=False)).abs().max() < 0.01


@pytest.mark.campaign
def test_memory_of_a_group_is_that_of_its_blocks() -> None:
    """10,000 x 10,000 scores are 400 MB in f32; blocks of 512 x 512 are 1 MB."""
    program = f"""
import resource, torch
from cascade.frontend.build import parse_cascade
from cascade.interp import run
cascade = parse_cascade({UNSTABLE!r})
tensors = {{"Q": torch.randn(10000, 4) / 2, "K": torch.randn(10000, 4) / 2, "V": torch.randn(10000, 3)}}
run(cascade, {{name: tensor[:600] for name, tensor in tensors.items()}})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(cascade, tensors)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 100, f"{done.stdout.strip()} MB more"
