"""Blocks of layers in kernels, by the tolerance rule: types, recipes and numbers of rows; a GPU has the campaign's sizes."""

from __future__ import annotations

import pytest
import torch

import cascade
from tests.block_programs import BLOCKS
from tests.tolerance import Draw, confirmed

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS = ((1, torch.float32), (17, torch.float16), (64, torch.bfloat16))


@pytest.mark.parametrize("name", BLOCKS)
def test_kernels_are_as_right_as_the_cascade_run_plainly(name: str) -> None:
    program = BLOCKS[name]
    call = cascade.compile(program.text, backend="triton")
    recipes = program.recipes()
    for turn, (rows, dtype) in enumerate(ROWS):
        draw = Draw(program, {**program.small, "T": rows}, recipes[turn % len(recipes)], dtype, DEVICE)
        verdict = confirmed(call, cascade.compile(program.text).cascade, draw)
        assert verdict.ok, f"{rows} rows, {dtype}: {verdict}"
    assert "no kernel" not in call.explain().replace("no kernel of its own", "")


@pytest.mark.parametrize("name", [name for name, program in BLOCKS.items() if program.rows == "T"])
def test_kernels_stay_right_where_sizes_change_from_call_to_call(name: str) -> None:
    program = BLOCKS[name]
    call = cascade.compile(program.text, backend="triton")
    for rows, width, hidden in ((5, 40, 19), (37, 300, 131), (1, 521, 66)):
        draw = Draw(program, {**program.small, "T": rows, "D": width, "F": hidden}, device=DEVICE)
        verdict = confirmed(call, cascade.compile(program.text).cascade, draw)
        assert verdict.ok, f"{rows} rows of {width}, {hidden}: {verdict}"


@pytest.mark.parametrize("name", BLOCKS)
def test_a_campaign_has_sizes_of_layers(name: str) -> None:
    """Large sizes bind every symbol that a small one does."""
    program = BLOCKS[name]
    for sizes in program.large:
        assert {*program.complete(sizes)} == {*program.complete(program.small)}
        for spec in program.inputs.values():
            assert all(extent > 0 for extent in spec.extents(program.complete(sizes)))
