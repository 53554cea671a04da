"""What a user waits for: importing, parsing and verifying examples, and a model of a hundred layers, in linear time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from cascade.frontend.build import parse_program
from cascade.passes.canonicalize import Canonicalize
from cascade.text import render
from cascade.verify import verify
from tests.timing import least, within

EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.cascade"))
LAYER = """    N{i}[t,d] = X{i}[t,d] * rsqrt(mean[d] X{i}[t,d]*X{i}[t,d] + 1e-6) * g[d]
    Q{i}[t,h,e] = N{i}[t,d] * Wq[d,h,e]
    K{i}[t,h,e] = N{i}[t,d] * Wk[d,h,e]
    V{i}[t,h,e] = N{i}[t,d] * Wv[d,h,e]
    S{i}[h,m,n] = Q{i}[m,h,e] * K{i}[n,h,e] / sqrt(E)   where n <= m
    R{i}[h,m] = max[n] S{i}[h,m,n]
    P{i}[h,m,n] = exp(S{i}[h,m,n] - R{i}[h,m])
    D{i}[h,m] = sum[n] P{i}[h,m,n]
    U{i}[m,h,e] = P{i}[h,m,n] / D{i}[h,m] * V{i}[n,h,e]
    A{i}[t,d] = U{i}[t,h,e] * Wo[h,e,d]
    Y{i}[t,d] = X{i}[t,d] + A{i}[t,d]
    M{i}[t,d] = Y{i}[t,d] * rsqrt(mean[d] Y{i}[t,d]*Y{i}[t,d] + 1e-6) * g[d]
    G{i}[t,f] = M{i}[t,d] * Wg[d,f]
    H{i}[t,f] = M{i}[t,d] * Wu[d,f]
    B{i}[t,f] = silu(G{i}[t,f])
    C{i}[t,f] = B{i}[t,f] * H{i}[t,f]
    E{i}[t,d] = C{i}[t,f] * Wd[f,d]
    F{i}[t,d] = Y{i}[t,d] + E{i}[t,d]
    L{i}[t,d] = F{i}[t,d] * 0.5
    X{j}[t,d] = L{i}[t,d] + F{i}[t,d]
"""


def model(layers: int) -> str:
    """A cascade of 20 statements a layer."""
    weights = "g[D], Wq[D,H,E], Wk[D,H,E], Wv[D,H,E], Wo[H,E,D], Wg[D,F], Wu[D,F], Wd[F,D]"
    body = "".join(LAYER.format(i=i, j=i + 1) for i in range(layers))
    return f"cascade model(X0[T,D], {weights}) -> X{layers}[T,D] {{\n{body}}}\n"


def read(text: str) -> None:
    cascade = parse_program(text)[-1]
    verify(cascade)
    render(cascade)


@pytest.mark.campaign
def test_2000_statements_take_seconds_and_grow_linearly() -> None:
    assert len(parse_program(model(100))[-1].body) == 2_000
    small, large = (least(read, 2 * [model(layers)]) for layers in (25, 100))
    assert within(large, 5)
    assert large < 10 * small  # 4 times the statements: linear is 4, quadratic 16


def test_2000_statements_are_canonicalized_in_seconds() -> None:
    text = model(100).replace("mean[d]", "sum[d]")
    assert within(least(Canonicalize(), (parse_program(text)[-1] for _ in range(2))), 5)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_parses_and_verifies_in_a_fresh_process(path: Path) -> None:
    program = (
        "import time; started = time.process_time()\n"
        "from cascade.frontend.build import parse_program\n"
        "from cascade.verify import verify\n"
        "loaded = time.process_time()\n"
        f"for cascade in parse_program(open({str(path)!r}).read()): verify(cascade)\n"
        "print(time.process_time() - loaded)"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True) for _ in range(3)
    ]
    assert within(min(float(run.stdout) for run in runs), 0.2), [run.stdout for run in runs]
