"""Every case file: its command is run, and the outcome is the expected text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.check import CASES, case_files, check_case


@pytest.mark.parametrize("path", case_files(), ids=lambda path: str(path.relative_to(CASES)))
def test_case(path: Path, update_golden: bool) -> None:
    check_case(path, update_golden)
