"""Campaigns over random programs: text and Python round trips, passes and streamed groups keep the meaning, no crash."""

from __future__ import annotations

import dataclasses
import random
import re
import time
from pathlib import Path

import generate
import pytest
import torch

import cascade as cs
from cascade.errors import CascadeError, ParseError, VerifyError
from cascade.frontend.build import decode, parse_cascade, parse_program
from cascade.frontend.trace import trace
from cascade.inference import infer_dtypes
from cascade.interp import Precision, run
from cascade.ir import Cascade, Einsum, Fuse, Rank, Read, Reduce, Tile, TopK
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.inline import Inline
from cascade.text import render
from cascade.values import FROM_TORCH
from cascade.verify import verify
from cascade.walk import defines, expressions, walk
from tests.timing import within

PROGRAMS = 2_000
MUTANTS = 20_000
PARTS = 8  # of a campaign, so that workers share it
SECONDS = 1.0  # the longest that any text may take
LIBRARY = Path(cs.__file__).with_name("frontend") / "library.cascade"
EXAMPLES = sorted(Path(__file__).parents[1].glob("examples/*.cascade"))


def valid(seed: int) -> tuple[Cascade, dict[str, torch.Tensor]] | None:
    """The random cascade of a seed with inputs; None for the few that do not verify (an extent nobody has)."""
    builder = generate.Builder(random.Random(seed))
    cascade = builder.build()
    try:
        verify(cascade)
    except VerifyError:
        return None
    pointers = {name: generate.symbol(there) for name, (_, there) in builder.index_params.items()}
    inputs = generate.inputs(cascade, seed, pointers)
    params = {size for param in cascade.params for size in param.shape}
    if any(isinstance(s, str) and s not in params for result in cascade.results for s in result.shape):
        return None
    return cascade, inputs


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return all(torch.allclose(found[n].double(), wanted[n].double(), 1e-9, 1e-9, equal_nan=True) for n in wanted)


def by_name(cascade: Cascade) -> Cascade:
    """The cascade with its statements in alphabetical order, and without spans in the way of a comparison."""
    return dataclasses.replace(cascade, body=tuple(sorted(cascade.body, key=lambda stmt: defines(stmt)[0])))


def traceable(cascade: Cascade) -> bool:
    """Whether every position of a parameter is read by a plain rank variable, which gives it the name of its symbol."""
    reads = [n for stmt in cascade.body for e in expressions(stmt) for n in walk(e) if isinstance(n, Read)]
    plain = {(read.tensor, d) for read in reads for d, index in enumerate(read.index) if isinstance(index, Rank)}
    return all((param.name, d) in plain for param in cascade.params for d in range(len(param.shape)))


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(PARTS))
def test_random_cascades_keep_their_text_their_python_form_and_their_meaning(part: int) -> None:
    checked = traced = streamed = 0
    wanted_count = PROGRAMS // PARTS
    for seed in range(part, PROGRAMS * 2, PARTS):
        if checked == wanted_count:
            break
        made = valid(seed)
        if made is None:
            continue
        cascade, inputs = made
        checked += 1
        assert parse_cascade(render(cascade)) == cascade, render(cascade)
        wanted = run(cascade, inputs, precision=Precision.REFERENCE)
        inlined = Inline()(cascade)
        verify(inlined)
        assert parse_cascade(render(inlined)) == inlined
        assert same(run(inlined, inputs, precision=Precision.REFERENCE), wanted), (seed, render(cascade))
        canonical = Canonicalize()(inlined)
        verify(canonical)
        assert parse_cascade(render(canonical)) == canonical
        assert same(run(canonical, inputs, precision=Precision.REFERENCE), wanted), (seed, render(cascade))
        found = infer_dtypes(cascade, {name: FROM_TORCH[t.dtype] for name, t in inputs.items()})
        assert all(FROM_TORCH[t.dtype] is found[n] for n, t in run(cascade, inputs).items()), (seed, render(cascade))
        if traceable(cascade):
            space: dict[str, object] = {"cs": cs}
            exec(generate.python_source(cascade), space)
            again = trace(space[cascade.name])
            assert by_name(again) == by_name(cascade), f"{seed}\n{render(again)}\n{render(cascade)}"
            traced += 1
        for grouped in random_groups(canonical, random.Random(seed)):
            for block in (1, 2, 3):
                parts = run(grouped, inputs, precision=Precision.REFERENCE, block=block)
                assert same(parts, wanted), (seed, block, render(grouped))
            streamed += 1
    assert checked == wanted_count
    assert min(traced, streamed) > wanted_count // 2, (traced, streamed)


def random_groups(cascade: Cascade, rng: random.Random) -> list[Cascade]:
    """The cascade with legal fused groups, grown statement by statement over a rank: what verifies may be streamed."""
    found = []
    for rank in rng.sample(generate.RANKS, 2):
        chosen: tuple[str, ...] = ()
        best: Cascade | None = None
        for stmt in cascade.body:
            if not concerns(stmt, rank):
                continue
            wider = (*chosen, defines(stmt)[0])
            grouped = dataclasses.replace(cascade, schedule=(Tile(((rank, 2),)), Fuse(wider, rank)))
            try:
                verify(grouped)
            except VerifyError:
                continue
            chosen, best = wider, grouped
        if best is not None:
            assert parse_cascade(render(best)) == best
            found.append(best)
    return found


def concerns(stmt: object, rank: str) -> bool:
    if isinstance(stmt, TopK):
        return rank == stmt.rank or rank in stmt.values.ranks
    assert isinstance(stmt, Einsum)
    return rank in stmt.target.ranks or (isinstance(stmt.expr, Reduce) and rank in stmt.expr.ranks)


def cascades_of(path: Path) -> list[bytes]:
    """Each cascade of a file as a program of its own, with the functions of the file that it mentions."""
    blocks = re.findall(r"^(?:cascade|def) .*?(?=^(?:cascade|def|#) |\Z)", path.read_text(), re.M | re.S)
    functions = {re.match(r"def (\w+)", block)[1]: block for block in blocks if block.startswith("def")}  # type: ignore[index]
    programs = [block for block in blocks if block.startswith("cascade")]
    return ["".join([*(f for n, f in functions.items() if n in text), text]).encode() for text in programs]


@pytest.mark.campaign
@pytest.mark.parametrize("part", range(PARTS))
def test_random_bytes_and_mutated_programs_give_only_cascade_errors_in_time(part: int) -> None:
    rng = random.Random(part)
    seeds = [program for path in (*EXAMPLES, LIBRARY) for program in cascades_of(path)]
    assert len(seeds) >= 12
    outcomes = {"parsed": 0, "refused": 0}
    for number in range(MUTANTS // PARTS):
        data = rng.randbytes(rng.randrange(200)) if number % 10 == 0 else mutated(rng.choice(seeds), rng)
        started = time.process_time()
        try:
            for cascade in parse_program(decode(data, "fuzz")):
                verify(cascade)
                assert parse_cascade(render(cascade)) == cascade
            outcomes["parsed"] += 1
        except CascadeError as error:
            assert str(error)
            outcomes["refused"] += 1
        taken = time.process_time() - started
        assert within(taken, SECONDS), data
    assert min(outcomes.values()) > MUTANTS // PARTS // 50, outcomes


FRAGMENTS = [b"[", b"]", b"(", b")", b"{", b"}", b"=", b"where", b"sum[n]", b"-> ", b",", b"\n", b"0", b"-1", b"??", b"n",
             b"init", b"topk", b"E", b"*", b"cascade", b"def", b"schedule", b"\x00", b"\xff", "é".encode(), b"#", b";"]  # fmt: skip


def mutated(data: bytes, rng: random.Random) -> bytes:
    """The program with a few bytes, words or lines dropped, doubled, swapped or put in."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(out) + 1)
        end = min(len(out), at + rng.choice((1, 1, 3, 20)))
        match rng.randrange(5):
            case 0:
                del out[at:end]
            case 1:
                out[at:at] = rng.choice(FRAGMENTS)
            case 2:
                out[at:end] = rng.choice(FRAGMENTS)
            case 3:
                out[at:at] = out[at:end]
            case _:
                other = rng.randrange(len(out) + 1)
                out[at:at] = out[other : other + rng.choice((1, 4, 30))]
    return bytes(out)


def test_decoding_refuses_what_is_not_text() -> None:
    with pytest.raises(ParseError):
        decode(b"\xff\xfe\x00", "x")
