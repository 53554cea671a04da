"""A fold is run as it says: from block to block, in parts, by its merge; and a wrong one gives other numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from cascade.frontend.build import parse_cascade
from cascade.interp import Precision, run
from cascade.ir import Cascade
from cascade.verify import verify

SINK = """
cascade attention(Q[M,E], K[N,E], V[N,F], sink[M]) -> O[M,F], L[M] {
    S[m,n] = sum[e] Q[m,e] * K[n,e]
    R0[m] = max[n] S[m,n]
    R[m] = max(R0[m], sink[m])
    G[m] = select(R[m] == -inf, 0.0, R[m])
    P[m,n] = exp(S[m,n] - G[m])
    D0[m] = sum[n] P[m,n]
    D[m] = D0[m] + exp(sink[m] - R[m])
    T[m,f] = sum[n] P[m,n] * V[n,f]
    O[m,f] = T[m,f] / D[m]
    L[m] = R[m] + log(D[m])
} schedule {
    fold n {
        state R, D, T
        init R[m] = sink[m]
        init D[m] = exp(sink[m] - G[m])
        init T[m,f] = empty
        update S, R0, R, G, P, D0, D, T
        merge R[m] = R'[m]
        merge D[m] = D'[m] * exp(R'[m] - G[m])
        merge T[m,f] = T'[m,f] * exp(R'[m] - G[m])
        finalize O, L
    }
}
"""
CHOICE = """
cascade choice(X[M,N]) -> I[M], V[M,2], J[M,2] {
    I[m] = argmax[n] X[m,n] where n >= m
    V[m,j], J[m,j] = topk[n, 2] X[m,n] where n >= m
} schedule {
    fold n {
        state I, V, J
        init I[m] = empty
        init V[m,j] = empty
        init J[m,j] = empty
        update I, V
        merge I[m] = I'[m]
        merge V[m,j] = V'[m,j]
        merge J[m,j] = J'[m,j]
    }
}
"""
SPLITS = ("", "split n into 1", "split n into 4", "split n into 50", "split n at 1, 2, 9")


def with_split(text: str, split: str) -> Cascade:
    """The program, its rank split."""
    cascade = parse_cascade(text.rstrip().removesuffix("}") + f"    {split}\n}}\n")
    verify(cascade)
    return cascade


def inputs(m: int, n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"Q": (m, 4), "K": (n, 4), "V": (n, 3), "sink": (m,), "X": (m, n)}
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def both(cascade: Cascade, block: int, m: int = 6, n: int = 13) -> tuple[dict[str, torch.Tensor], ...]:
    """The results of the fold and those of the plain statements."""
    given = {param.name: inputs(m, n)[param.name] for param in cascade.params}
    plain = dataclasses.replace(cascade, schedule=())
    return tuple(run(c, given, precision=Precision.REFERENCE, block=block) for c in (cascade, plain))


@pytest.mark.parametrize("program", [SINK, CHOICE], ids=["sink", "choice"])
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("block", [1, 3, 100])
def test_a_fold_gives_what_its_statements_mean(program: str, split: str, block: int) -> None:
    found, wanted = both(with_split(program, split), block)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12)


def test_minus_infinity_and_rows_without_elements() -> None:
    """A first block of -inf leaves nothing behind; where it is all there is, the result is NaN as it is without a fold."""
    cascade = with_split(SINK, "split n into 3")
    given = {param.name: inputs(2, 9)[param.name] for param in cascade.params}
    given["K"] = torch.cat([torch.full((6, 4), -torch.inf, dtype=torch.float64), given["K"][6:]])
    given["Q"] = given["Q"].abs()
    given["sink"] = torch.full((2,), -torch.inf, dtype=torch.float64)
    found = run(cascade, given, precision=Precision.REFERENCE, block=2)
    scores = given["Q"] @ given["K"].T
    wanted = scores[:, 6:].softmax(-1) @ given["V"][6:]
    torch.testing.assert_close(found["O"], wanted, rtol=1e-12, atol=1e-12)


MUTANTS = {
    "correction dropped": ("D'[m] * exp(R'[m] - G[m])", "D'[m] * 1.0"),
    "correction inverted": ("D'[m] * exp(R'[m] - G[m])", "D'[m] * exp(G[m] - R'[m])"),
    "correction of another state": ("T'[m,f] * exp(R'[m] - G[m])", "T'[m,f] * exp(sink[m] - G[m])"),
    "virtual element lost": ("init D[m] = exp(sink[m] - G[m])", "init D[m] = 0.0 * sink[m]"),
    "virtual element in another frame": ("init D[m] = exp(sink[m] - G[m])", "init D[m] = exp(sink[m])"),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_fold_gives_other_numbers(mutant: str) -> None:
    old, new = MUTANTS[mutant]
    assert SINK.count(old) == 1
    found, wanted = both(with_split(SINK.replace(old, new), "split n into 2"), 3)
    assert not (found["O"] - wanted["O"]).abs().max() < 1e-6


@pytest.mark.parametrize("shift", [-3.0, 2.5])
def test_the_largest_score_is_a_gauge(shift: float) -> None:
    """What is divided by its own sum does not depend on the frame that both are carried in."""
    moved = SINK.replace("init R[m] = sink[m]", f"init R[m] = sink[m] + {shift}")
    found, wanted = both(with_split(moved, "split n into 2"), 3)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12)
