"""What may be absent: the answer is conservative, and as sharp as coordinates that lie in the shape for all data."""

from __future__ import annotations

import pytest
import torch

from cascade import interp
from cascade.bounds import absent_tensors
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade
from cascade.presence import may_be_absent

EXTENTS = {"m": 8, "n": 6, "M": 8, "N": 6}
INSIDE = {
    "a remainder by the extent": "Y[m] = X[(m + M // 2) % M]",
    "a remainder of data": "Y[m] = X[J[m] % M]",
}
INSIDE_AT_SIZES = {
    "a quotient": "Y[m] = X[m // 2]",
    "a mirror": "Y[m] = X[M - 1 - m]",
    "one of another rank": "Y[n] = X[n + 2]",
    "a remainder by less": "Y[m] = X[m % 5]",
    "a choice": "Y[m] = X[select(m < 4, m, m - 4)]".replace("m - 4", "7 - m"),
}
OUTSIDE = {
    "a step back": "Y[m] = X[m - 1]",
    "data": "Y[m] = X[J[m]]",
    "twice": "Y[m] = X[2 * m]",
    "a remainder by more": "Y[m] = X[m % 9]",
    "a filter": "Y[m] = X[m] where m < 3",
}


def program(body: str) -> Cascade:
    given = "[n: N]" if "Y[n]" in body else ""
    ranks = "N" if given else "M"
    return parse_cascade(
        f"cascade c(X[M], J: i32[M]) -> Y[{ranks}] {'with n = N ' if given else ''}{{ Z{body[1:]}; Y[{ranks.lower()}] = Z[{ranks.lower()}] ?? 7 }}"
    )


@pytest.mark.parametrize("name", [*INSIDE, *INSIDE_AT_SIZES, *OUTSIDE])
def test_what_may_be_absent(name: str) -> None:
    found = program((INSIDE | INSIDE_AT_SIZES | OUTSIDE)[name])
    assert ("Z" in may_be_absent(found)) == (name not in INSIDE)
    assert ("Z" in may_be_absent(found, EXTENTS)) == (name in OUTSIDE)


@pytest.mark.parametrize("name", [*INSIDE, *INSIDE_AT_SIZES])
def test_what_may_not_be_is_present(name: str) -> None:
    """The default never shows, whatever the data."""
    found = program((INSIDE | INSIDE_AT_SIZES)[name])
    inputs = {"X": torch.arange(8.0) / 16, "J": torch.tensor([0, -3, 100, 8, 7, -8, 2, 1], dtype=torch.int32)}
    sizes = {"N": 6} if "N" in str(found) else {}
    assert bool((interp.run(found, inputs, sizes)["Y"] < 1).all())


def test_reductions_over_what_is_surely_there_are_present() -> None:
    """A row that sees itself has a maximum, a sum, and what is made of them; one that may see nothing has none."""
    text = """cascade c(X[M,M], J: i32[M]) -> Y[M] {{
        S[m,n] = X[m,n] where {where}
        R[m] = max[n] S[m,n]
        P[m,n] = exp(S[m,n] - R[m])
        Y[m] = sum[n] P[m,n] * X[m,n]
    }}"""
    for where in ("n <= m", "n <= m and m - n < 4", "n >= m", "n == 0", "J[n] == J[m]"):
        found = parse_cascade(text.format(where=where))
        assert absent_tensors(found) == {"S", "P"}, where
        assert {"S", "P", "R", "Y"} == may_be_absent(found)
    for where in ("n < m", "n <= m - 2", "J[n] < J[m]", "n < J[m]"):
        assert absent_tensors(parse_cascade(text.format(where=where))) == {"S", "P", "R", "Y"}, where


RECURRENCES = {
    "one step back": ("Z[m] = Z[m-1] / 2 + X[m] init Z[-1] = 0", True),
    "two steps back": ("Z[m] = Z[m-1] / 2 + Z[m-2] / 4 + X[m] init Z[-1] = 1, Z[-2] = 0", True),
    "two of one cycle": (
        "Z[m] = (Z[m-1] + U[m-1]) / 4 + X[m] init Z[-1] = 0; U[m] = Z[m] + U[m-1] / 2 init U[-1] = 1", True,
    ),
    "farther than what it begins with": ("Z[m] = Z[m-2] / 2 + X[m] init Z[-1] = 1", False),
    "a filter": ("Z[m] = Z[m-1] / 2 + X[m] where m > 2 init Z[-1] = 0", False),
    "an absent element": ("Z[m] = Z[m-1] / 2 + X[m-1] init Z[-1] = 0", False),
}  # fmt: skip


@pytest.mark.parametrize("name", RECURRENCES)
def test_a_recurrence_is_present_if_it_begins_early_enough(name: str) -> None:
    body, there = RECURRENCES[name]
    found = parse_cascade(f"cascade c(X[M]) -> Y[M] {{ {body}; Y[m] = Z[m] ?? 1000 }}")
    assert ("Z" not in may_be_absent(found)) is there
    given = interp.run(found, {"X": torch.arange(8.0) / 16})["Y"]
    assert bool((given < 1000).all()) is there


def test_what_a_recurrence_begins_with_is_known_to_its_own_cycle_alone() -> None:
    """A kernel leaves none of it to the next."""
    found = parse_cascade(
        "cascade c(X[M]) -> Y[M] { Z[m] = Z[m-1] / 2 + X[m] init Z[-1] = 3; W[m] = Z[m-1] * 2; Y[m] = W[m] ?? 7 }"
    )
    assert may_be_absent(found) == {"W"}
