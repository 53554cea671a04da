"""Arrays that are filled and drained at their edges: against one that passes numbers from element to element.

The witness has a grid of registers and moves them a cycle at a time. It must give the product, and its last number must
leave the array in the cycle that the model says. SCALE-Sim (Samajdar et al., ISPASS 2020) counts the same.
"""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import dataclass, replace

import pytest

from cascade.backends.systolic.cost import evaluator
from cascade.backends.systolic.machine import Machine, parse_machine
from cascade.backends.systolic.mapping import Mapping, Placement, Region, Stage
from cascade.compiled import from_text
from cascade.ir import Cascade
from cascade.pipeline import run_pipeline

Matrix = list[list[int]]

GEMM = "cascade gemm(A[M,K], B[K,N]) -> C[M,N] {\n C[m,n] = sum[k] A[m,k] * B[k,n]\n}"
PLACES = {
    "output": Placement("m", "n", "k"), "weight": Placement("k", "n", "m"), "input": Placement("k", "m", "n"),
}  # fmt: skip


# --- the witness -----------------------------------------------------------------------------------------------------


@dataclass
class Grid:
    """What every element of an array holds, and the cycles since it was empty."""

    rows: int
    columns: int
    cycles: int = 0

    def still_output(self, left: Matrix, top: Matrix) -> Matrix:
        """left[r,t] comes in from the left, top[t,c] from above, each row and column a cycle later; sums stay."""
        streams = len(top)
        across = [[0] * self.columns for _ in range(self.rows)]
        down = [[0] * self.columns for _ in range(self.rows)]
        sums = [[0] * self.columns for _ in range(self.rows)]
        for cycle in range(streams + self.rows + self.columns - 2):
            for r, c in itertools.product(reversed(range(self.rows)), reversed(range(self.columns))):
                late = cycle - r if c == 0 else cycle - c  # which element of the stream is due at an edge
                due = 0 <= late < streams
                across[r][c] = across[r][c - 1] if c else (left[r][late] if due else 0)
                due = 0 <= cycle - c < streams
                down[r][c] = down[r - 1][c] if r else (top[cycle - c][c] if due else 0)
                sums[r][c] += across[r][c] * down[r][c]
            self.cycles += 1
        return sums

    def still_operand(self, held: Matrix, stream: Matrix) -> Matrix:
        """held[r,c] is shifted in row by row; stream[t,r] comes in from the left and sums go down and out below."""
        self.cycles += self.rows
        streams = len(stream)
        across = [[0] * self.columns for _ in range(self.rows)]
        sums = [[0] * self.columns for _ in range(self.rows)]
        found = [[0] * self.columns for _ in range(streams)]
        for cycle in range(streams + self.rows + self.columns - 2):
            for r, c in itertools.product(reversed(range(self.rows)), reversed(range(self.columns))):
                due = 0 <= cycle - r < streams
                across[r][c] = across[r][c - 1] if c else (stream[cycle - r][r] if due else 0)
                sums[r][c] = (sums[r - 1][c] if r else 0) + across[r][c] * held[r][c]
            for c in range(self.columns):
                late = cycle - c - (self.rows - 1)
                if 0 <= late < streams:
                    found[late][c] = sums[self.rows - 1][c]
            self.cycles += 1
        return found


def block(matrix: Matrix, row: int, column: int, rows: int, columns: int) -> Matrix:
    """A block of a matrix, zeros beyond its edges."""
    return [
        [matrix[r][c] if r < len(matrix) and c < len(matrix[0]) else 0 for c in range(column, column + columns)]
        for r in range(row, row + rows)
    ]


def transposed(matrix: Matrix) -> Matrix:
    """Rows as columns."""
    return [list(row) for row in zip(*matrix, strict=True)]


def run(left: Matrix, right: Matrix, stays: str, rows: int, columns: int) -> tuple[Matrix, int]:
    """A product on an array, block after block, and the cycles of all."""
    if stays == "input":  # the transposed product, whose weights are the transposed input
        found, cycles = run(transposed(right), transposed(left), "weight", rows, columns)
        return transposed(found), cycles
    height, depth, width = len(left), len(right), len(right[0])
    found = [[0] * width for _ in range(height)]
    grid = Grid(rows, columns)
    along = height if stays == "output" else depth
    for row, column in itertools.product(range(0, along, rows), range(0, width, columns)):
        if stays == "output":
            part = grid.still_output(block(left, row, 0, rows, depth), block(right, 0, column, depth, columns))
            base = row
        else:
            part = grid.still_operand(block(right, row, column, rows, columns), block(left, 0, row, height, rows))
            base = 0
        for r, c in itertools.product(range(len(part)), range(columns)):
            if base + r < height and column + c < width:
                found[base + r][column + c] += part[r][c]
    return found, grid.cycles


# --- the model -------------------------------------------------------------------------------------------------------


def array(rows: int, columns: int) -> Machine:
    """An array of that size with a buffer that holds everything."""
    return parse_machine(f'extends = "scale-sim-32"\n[buffer]\nbytes = 1e15\n[units.2d]\n{rows = }\n{columns = }')


def gemm() -> Cascade:
    """The product of two matrices."""
    return run_pipeline(from_text(GEMM, "test", None).cascade, "canonicalize").final


ON_ARRAY = Mapping((Region("all", (Stage(("C",)),)),), (("C", "2d"),))


def modelled(on: Machine, sizes: dict[str, int], stays: str) -> int:
    """Cycles of the product by the model."""
    mapping = replace(ON_ARRAY, place=(("C", PLACES[stays]),))
    return evaluator(gemm(), on, mapping).cost(sizes).einsums["C"].cycles


@pytest.mark.parametrize("stays", PLACES)
def test_numbers_leave_the_array_when_the_model_says(stays: str) -> None:
    rng = random.Random(stays)
    for _ in range(25):
        m, n, k, rows, columns = (rng.randint(1, 7) for _ in range(5))
        left = [[rng.randint(-9, 9) for _ in range(k)] for _ in range(m)]
        right = [[rng.randint(-9, 9) for _ in range(n)] for _ in range(k)]
        found, cycles = run(left, right, stays, rows, columns)
        wanted = [[sum(a * b for a, b in zip(row, at, strict=True)) for at in transposed(right)] for row in left]
        assert found == wanted
        assert cycles == modelled(array(rows, columns), {"M": m, "N": n, "K": k}, stays), (m, n, k, rows, columns)


SIDES = (8, 16, 32, 64, 128, 256)


@pytest.mark.parametrize("stays", PLACES)
def test_over_sizes_of_the_array(stays: str) -> None:
    """SCALE-Sim's closed form, with its names: S_R and S_C along the sides, T in time; every shape of 64 to 65 536 elements."""
    sizes = {"M": 3025, "N": 96, "K": 363}  # the first layer of AlexNet
    s_r, s_c, t = {"output": "MNK", "weight": "KNM", "input": "KMN"}[stays]
    for rows, columns in itertools.product(SIDES, SIDES):
        folds = math.ceil(sizes[s_r] / rows) * math.ceil(sizes[s_c] / columns)
        filled = (rows if stays != "output" else 0) + rows + columns - 2
        assert modelled(array(rows, columns), sizes, stays) == folds * (filled + sizes[t]), (rows, columns)


def test_the_way_that_is_taken_by_default_is_the_fastest() -> None:
    sizes = {"M": 100, "N": 30, "K": 70}
    for rows, columns in itertools.product(SIDES[:4], SIDES[:4]):
        on = array(rows, columns)
        free = evaluator(gemm(), on, ON_ARRAY).cost(sizes).einsums["C"].cycles
        assert free <= min(modelled(on, sizes, stays) for stays in PLACES)


PHYSICAL = [
    (
        "batched",
        "A[B,M,K], W[B,K,N]) -> C[B,M,N] {\n C[b,m,n] = sum[k] A[b,m,k] * W[b,k,n]",
        {"B": 3, "M": 5, "K": 4, "N": 6},
    ),
    ("vectors", "A[B,K], W[B,K,N]) -> C[B,N] {\n C[b,n] = sum[k] A[b,k] * W[b,k,n]", {"B": 3, "K": 4, "N": 6}),
    (
        "heads",
        "A[B,M,K], W[G,K,N]) -> C[B,M,N] {\n C[b,m,n] = sum[k] A[b,m,k] * W[b//2,k,n]",
        {"B": 4, "G": 2, "M": 5, "K": 4, "N": 6},
    ),
]


@pytest.mark.parametrize(("name", "program", "sizes"), PHYSICAL)
def test_a_batch_is_gone_through_in_turn(name: str, program: str, sizes: dict[str, int]) -> None:
    """Operands that a rank moves both cannot lie along a side: each of a batch takes what one takes alone."""
    cascade = run_pipeline(from_text(f"cascade {name}({program}\n}}", "test", None).cascade, "canonicalize").final
    on = array(4, 3)
    batched = evaluator(cascade, on, ON_ARRAY).cost(sizes).einsums["C"].cycles
    alone = {"M": sizes.get("M", 1), "N": sizes["N"], "K": sizes["K"]}
    left = [[1] * alone["K"] for _ in range(alone["M"])]
    right = [[1] * alone["N"] for _ in range(alone["K"])]
    fastest = min(run(left, right, stays, 4, 3)[1] for stays in PLACES)
    assert batched == sizes["B"] * fastest
