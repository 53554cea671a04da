"""The planner's model against every time that was measured on a GPU, planned again without it."""

from __future__ import annotations

import pytest

from benchmarks.modelling import SHARE_BAR
from benchmarks.predicting import main, measured, near, rows
from benchmarks.table import RESULTS


@pytest.mark.campaign
def test_most_measured_times_are_predicted() -> None:
    found = list(rows())
    compared = [row for row in found if not row.why]
    assert {row.table for row in compared} == {table for table, _ in measured("nvidia-h200")}
    assert near(compared) >= SHARE_BAR * len(compared)
    assert all(row.predicted > 0 for row in found)


def test_ranks_are_joined_and_views_are_free_as_in_a_launch() -> None:
    (row,) = rows(only="decoder layer")
    assert not row.why and abs(row.off) < 0.25


def test_a_row_that_data_decides_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "document 1100 4 16 2048 64", "--rows"]) == 0
    line, *_ = capsys.readouterr().out.splitlines()
    assert line.endswith("data tells how much of S_sum there is")


def test_times_are_those_that_were_kept() -> None:
    """The table as text has the same number of the same row."""
    kept = measured("nvidia-h200")["gemm", "matmul 8192 8192 8192"]
    text = (RESULTS / "gemm-nvidia-h200.txt").read_text()
    (line,) = (line for line in text.splitlines() if line.startswith("matmul 8192 8192 8192"))
    assert f"{kept:.3f}" in line
