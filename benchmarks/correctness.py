"""The correctness campaign: every program of `tests/kernel_programs.py` against the reference, by the tolerance rule.

    python -m benchmarks.correctness [--seconds N] [--jobs N] [--only NAME ...] [--kind KIND]
                                     [--blocks] [--huge] [--interp]

On a GPU: types, recipes, all lengths to 300, primes, 8k and 128k, head sizes, strided, expanded and unaligned inputs,
every rank in turn empty, 70,000 independent outputs, 100 repeats with the same bits. `--huge` tries what takes tens of
gigabytes instead: a tensor of more than 2^31 elements, by its independent outputs and by its longest rank. `--blocks`
takes the programs of `tests/block_programs.py`: layers at the widths that they have. Without a GPU, small sizes
through Triton's interpreter; `--interp` lets the interpreter stand in for the kernels, which tries the campaign itself.
Programs take turns, each first with the cases that say most, so a short
campaign has seen all of them; `--jobs` shares the programs among processes, as most of the time is spent on compiling.
A case that raises is a failure with its first line; where the device is lost, the
campaign starts itself again behind that case. A verdict on rounding fails if it does on six draws of inputs. The last
thing printed is a table, written to `benchmarks/results/` on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cascade
from cascade.ir import Cascade
from tests.block_programs import BLOCKS
from tests.kernel_programs import PROGRAMS, Program, Sizes, Tensors
from tests.tolerance import Draw, Verdict, confirmed, filled_with_nan, judge_all, same_bits, standard

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
RESULTS = Path(__file__).parent / "results"
EVERY = PROGRAMS | BLOCKS
TYPES = (torch.float16, torch.bfloat16, torch.float32)
PRIMES = (1, 2, 3, 5, 7, 13, 17, 31, 61, 127, 131, 257, 509, 1021)
EDGES = (15, 16, 33, 63, 64, 65, 128, 129, 255, 256)  # around the extents that tiles have
HEADS = (16, 32, 64, 80, 96, 128, 160, 192, 256)
EVERY_LENGTH = ("causal", "ragged", "decode_grouped", "softmax", "masked_logsumexp", "layernorm", "gemm", "row_sum")
MANY = 70_000  # independent outputs: more than a dimension of a grid holds
KEPT = 2 << 30  # bytes of free memory that torch may hold on to
REPEATS = 100
GRACE = 45.0  # seconds after which a process that should have ended is ended: a case may take long to compile
HUGE = 1 << 31  # elements that the largest tensor of a huge case has more than
PERIOD = 127  # independent outputs of a huge case that differ: no rank of `large` has as many coordinates
BY_PLACE = frozenset({"triangle_logsumexp"})  # programs whose outputs depend on their coordinate along `batch`
CHUNK = 1 << 28  # elements that are compared at a time


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to try: what kind of case, on which draw."""

    kind: str
    draw: Draw
    layout: str = ""

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.draw.sizes.items())
        words = (self.kind, self.layout, self.draw.recipe, str(self.draw.dtype).removeprefix("torch."), sizes)
        return " ".join(word for word in words if word)


@dataclass(slots=True)
class Tally:
    """What a program has seen."""

    cases: int = 0
    failures: int = 0
    no_memory: int = 0
    first: str = ""
    verdict: str = ""


@dataclass(slots=True)
class Progress:
    """How far a campaign is: cases done of each program, and since when; it survives the loss of a device."""

    started: float
    tallies: dict[str, Tally] = field(default_factory=dict)
    tried: dict[str, int] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Written for `load`."""
        path.write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> Progress:
        """What was saved."""
        data = json.loads(path.read_text(encoding="utf-8"))
        tallies = {name: Tally(**tally) for name, tally in data["tallies"].items()}
        return cls(data["started"], tallies, data["tried"])


# --- layouts: the same values, otherwise in memory -------------------------------------------------------------------


def _floats(change: Callable[[Tensor], Tensor], inputs: Tensors) -> Tensors:
    return {n: change(t) if t.is_floating_point() and t.dim() and t.numel() else t for n, t in inputs.items()}


def transposed(tensor: Tensor) -> Tensor:
    """Its ranks in the opposite order in memory."""
    order = tuple(reversed(range(tensor.dim())))
    return tensor.permute(order).contiguous().permute(order)


def stepped(tensor: Tensor) -> Tensor:
    """Every other element of a memory full of NaN."""
    wide = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1]), math.nan)
    wide[..., ::2] = tensor
    return wide[..., ::2]


def expanded(tensor: Tensor) -> Tensor:
    """Its first slice everywhere, with stride 0."""
    return tensor[:1].expand(tensor.shape)


def shifted(tensor: Tensor) -> Tensor:
    """One element behind the start of an allocation: its base is not a multiple of 16 bytes."""
    flat = tensor.new_full((tensor.numel() + 1,), math.nan)
    flat[1:] = tensor.reshape(-1)
    return flat[1:].view(tensor.shape)


def boxed(tensor: Tensor) -> Tensor:
    """In the middle of a larger tensor full of NaN: a read outside shows, and so does a write."""
    box = tensor.new_full(tuple(extent + 6 for extent in tensor.shape), math.nan)
    inside = tuple(slice(3, 3 + extent) for extent in tensor.shape)
    box[inside] = tensor
    return box[inside]


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": transposed, "stepped": stepped, "expanded": expanded, "shifted": shifted, "boxed": boxed,
}  # fmt: skip


# --- the cases of a program, those that say most first ---------------------------------------------------------------


def cases(program: Program) -> Iterator[Case]:
    """Every case of a program, but those with a huge tensor."""
    small = Draw(program, program.small, device=DEVICE)
    recipes = program.recipes()
    for dtype, recipe in _diagonal(TYPES, recipes):
        yield Case("recipe", replace(small, dtype=dtype, recipe=recipe))
    yield from _empty(program, small)
    for layout, dtype in itertools.product(LAYOUTS, TYPES):
        laid = functools.partial(_floats, LAYOUTS[layout])
        yield Case("layout", replace(small, dtype=dtype, laid=laid), layout)
    if not CUDA:
        return
    for i, sizes in enumerate(program.large):
        for dtype, recipe in _diagonal(TYPES, recipes if i == 0 else recipes[:4]):
            if dtype is torch.float16 and recipe in program.overflows:
                continue
            yield Case("large", replace(small, sizes=sizes, dtype=dtype, recipe=recipe))
    for length, dtype in itertools.product((*PRIMES, *EDGES), TYPES):
        yield Case(
            "length", replace(small, sizes=_of_length(program, length), dtype=dtype, recipe=_rotating(recipes, length))
        )
    yield from _many_and_long(program, small)
    for head, dtype in itertools.product(HEADS if program.heads else (), TYPES):
        sizes = {**program.large[0], **dict.fromkeys(program.heads, head)}
        yield Case("head size", replace(small, sizes=sizes, dtype=dtype, recipe=_rotating(recipes, head)))
    yield Case("repeats", replace(small, sizes=program.large[0], dtype=torch.float16))
    if program.name in EVERY_LENGTH:
        for length, dtype in itertools.product(range(1, 301), TYPES):
            sizes = _of_length(program, length)
            yield Case("length", replace(small, sizes=sizes, dtype=dtype, recipe=_rotating(recipes, length + 1)))


def huge_cases(program: Program) -> Iterator[Case]:
    """A tensor of more than 2^31 elements: of independent outputs, which repeat, and of a rank that long."""
    few = Draw(program, program.large[0], dtype=torch.float16, device=DEVICE)
    if program.batch and program.name not in BY_PLACE:
        yield Case("huge", replace(few, sizes={**few.sizes, program.batch: PERIOD}))
    if program.long is not None:
        longest = max(program.long, key=program.long.__getitem__)
        having = [given for given in program.inputs.values() if longest in given.shape.split()]
        times = HUGE // max(math.prod(given.extents(program.long)) for given in having) + 1
        sizes = {**program.long, longest: program.long[longest] * times}
        yield Case("huge rank", replace(few, sizes=sizes))


def _diagonal(types: tuple[torch.dtype, ...], recipes: tuple[str, ...]) -> Iterator[tuple[torch.dtype, str]]:
    """All pairs, the types taking turns."""
    for turn in range(len(types)):
        for i, recipe in enumerate(recipes):
            yield types[(i + turn) % len(types)], recipe


def _rotating(recipes: tuple[str, ...], turn: int) -> str:
    return recipes[turn % len(recipes)]


def _of_length(program: Program, length: int) -> Sizes:
    return {**program.small, **dict.fromkeys(program.lengths, length)}


def _empty(program: Program, small: Draw) -> Iterator[Case]:
    """Every rank in turn without a coordinate, and every length 0: no row has a live element."""
    for symbol in program.small:
        if symbol not in program.extra:
            yield Case("empty rank", replace(small, sizes={**program.small, symbol: 0}))
    ends = [name for name in ("len", "stop") if name in program.inputs]
    if ends:

        def nothing(inputs: Tensors) -> Tensors:
            return {name: torch.zeros_like(t) if name in ends else t for name, t in inputs.items()}

        for dtype in TYPES:
            yield Case("no live element", replace(small, dtype=dtype, laid=nothing))


def _many_and_long(program: Program, small: Draw) -> Iterator[Case]:
    """More independent outputs than a dimension of a grid holds, and a rank of 131,072."""
    if program.batch:
        few = {symbol: min(size, 4) for symbol, size in program.small.items()} if program.heads else program.small
        yield Case("70,000", replace(small, sizes={**few, program.batch: MANY}, dtype=torch.float16))
    if program.long is not None:
        for dtype, recipe in zip(TYPES, ("spike", "rising", "normal"), strict=True):
            yield Case("long", replace(small, sizes=program.long, dtype=dtype, recipe=recipe))


# --- running a case --------------------------------------------------------------------------------------------------


@functools.cache
def compiled(name: str, interp: bool) -> tuple[Callable[..., Any], Cascade]:
    """The kernels of a program, or the interpreter, and its cascade as written."""
    text = EVERY[name].text
    return cascade.compile(text, backend="interp" if interp else "triton"), cascade.compile(text).cascade


def outcome(case: Case, interp: bool) -> Verdict:
    """The verdict on a case."""
    call, source = compiled(case.draw.program.name, interp)
    if CUDA:
        poison()
    if case.kind == "repeats":
        return repeated(call, case.draw)
    judged = {"huge": over_and_over, "huge rank": at_length}.get(case.kind, confirmed)
    return judged(call, source, case.draw)


def poison() -> None:
    """Fills the free memory that torch's allocator holds with NaN, so that whatever reads or keeps it shows.

    Of much of it most goes back first: other processes, and Triton for its kernels, take from what torch leaves.
    """
    if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > KEPT:
        torch.cuda.empty_cache()
    held = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    blocks = [
        torch.full((size,), math.nan, device=DEVICE) for size in (1 << 8, 1 << 12, 1 << 16, 1 << 20) for _ in range(4)
    ]
    blocks.append(torch.full((max(1, min(held // 8, 1 << 26)),), math.nan, device=DEVICE))
    torch.cuda.synchronize()
    del blocks


def repeated(call: Callable[..., Any], draw: Draw) -> Verdict:
    """Whether the same call gives the same bits every time."""
    inputs, given = draw.inputs(0), draw.given()
    first = _listed(call(**inputs, **given))
    for turn in range(1, REPEATS if CUDA else 3):
        for ours, before in zip(_listed(call(**inputs, **given)), first, strict=True):
            if not same_bits(ours, before):
                return Verdict("bits differ", detail=f"in call {turn + 1}")
    return Verdict()


def _listed(results: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [results] if isinstance(results, Tensor) else list(results)


def over_and_over(call: Callable[..., Any], source: Cascade, draw: Draw) -> Verdict:
    """The verdict on every output of a program that is given its independent inputs again and again.

    Outputs of a later turn have the bits of the first, or pass by themselves.
    """
    inputs, given, batch = draw.inputs(0), draw.given(), draw.program.batch
    by = standard(source, inputs, given)
    largest = max(t.numel() for t in (*inputs.values(), *by.gold.values()) if PERIOD in t.shape)
    turns = HUGE // largest + 1
    for name, spec in draw.program.inputs.items():
        if batch in spec.shape.split():
            axis = spec.shape.split().index(batch)
            inputs[name] = inputs[name].repeat([turns if i == axis else 1 for i in range(inputs[name].dim())])
    with filled_with_nan():
        ours = _listed(call(**inputs, **given))
    axes = [gold.shape.index(PERIOD) for gold in by.gold.values()]
    taken = [t.unflatten(axis, (turns, PERIOD)).movedim(axis, 0) for t, axis in zip(ours, axes, strict=True)]
    others = sorted({0, *(turn for t in taken for turn in _other_bits(t))})
    for turn in others:
        verdict = judge_all([t[turn] for t in taken], by)
        if not verdict.ok:
            return replace(verdict, detail=f"{verdict.detail}, turn {turn} of {turns}")
    return Verdict()


def _other_bits(turns: Tensor) -> list[int]:
    """The turns, along the first rank, that have not the bits of the first."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[turns.element_size()]
    found = []
    step = max(1, CHUNK // max(1, turns[0].numel()))
    for start in range(0, len(turns), step):
        some = turns[start : start + step].contiguous().view(bits)
        wrong = (some != turns[0].contiguous().view(bits)).flatten(1).any(1)
        found.extend((wrong.nonzero().flatten() + start).tolist())
    return found


def at_length(call: Callable[..., Any], source: Cascade, draw: Draw) -> Verdict:
    """The verdict on a program with a huge rank; of the processes that share a device one at a time holds the gold."""
    with alone():
        inputs, given = draw.inputs(0), draw.given()
    with filled_with_nan():
        ours = _listed(call(**inputs, **given))
    with alone():
        if not draw.program.rows:
            return judge_all(ours, standard(source, inputs, given))
        for row in range(draw.sizes[draw.program.rows]):
            here = slice(row, row + 1)
            shapes = {name: spec.shape.split() for name, spec in draw.program.inputs.items()}
            one = {name: t[here] if draw.program.rows in shapes[name] else t for name, t in inputs.items()}
            verdict = judge_all([result[here] for result in ours], standard(source, one, given))
            if not verdict.ok:
                return replace(verdict, detail=f"{verdict.detail}, row {row}")
    return Verdict()


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """While this holds, no other process of the campaign is in here; memory that torch holds on to goes back after."""
    with (Path(tempfile.gettempdir()) / "cascade-correctness.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            torch.cuda.empty_cache()


def try_case(case: Case, tally: Tally, interp: bool) -> bool:
    """Runs a case and counts it; False where the device is lost."""
    alive, verdict = True, ""
    try:
        found = outcome(case, interp)
        verdict = "" if found.ok else str(found)
    except torch.OutOfMemoryError:
        tally.no_memory += 1
        return True
    except Exception as error:  # whatever a case raises is a failure of that case
        lines = str(error).strip().splitlines() or [""]
        verdict = f"{type(error).__name__}: {lines[0]}"
        alive = device_answers()
    tally.cases += 1
    if verdict:
        tally.failures += 1
        if not tally.first:
            tally.first, tally.verdict = str(case), verdict
        print(f"FAILED {case.draw.program.name}: {case}: {verdict}", flush=True)
    return alive


def device_answers() -> bool:
    """Whether the device still works: an illegal access takes the whole process with it."""
    if not CUDA:
        return True
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device=DEVICE).sum() == 1)
    except Exception:  # of whatever class: the context is gone
        return False


# --- the campaign ----------------------------------------------------------------------------------------------------


def campaign(options: argparse.Namespace, progress: Progress) -> None:
    """Programs take turns with their cases until all are done or time is up."""
    programs = options.only or list(BLOCKS if options.blocks else PROGRAMS)
    names = programs[options.share :: options.jobs]
    lists = {}
    for name in names:
        every = huge_cases(EVERY[name]) if options.huge else cases(EVERY[name])
        wanted = (case for case in every if options.kind in (None, case.kind))
        lists[name] = itertools.islice(wanted, progress.tried.setdefault(name, 0), None)
        progress.tallies.setdefault(name, Tally())
    while lists:
        for name in list(lists):
            if time.time() - progress.started > options.seconds:
                return
            case = next(lists[name], None)
            if case is None:
                del lists[name]
                continue
            progress.tried[name] += 1
            began = time.time()
            works = try_case(case, progress.tallies[name], options.interp)
            if options.huge:
                print(f"{name}: {case}: {time.time() - began:.1f} s", flush=True)
            if options.keep:
                progress.save(options.keep)
            if not works:
                start_again(progress)


def start_again(progress: Progress) -> None:
    """This campaign in a new process, behind the case that lost the device."""
    path = Path(tempfile.mkdtemp(prefix="cascade-correctness-")) / "progress.json"
    progress.save(path)
    kept = [word for word in sys.argv[1:] if not word.startswith("--resume=")]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.correctness", *kept, f"--resume={path}"])


def shared_campaign(options: argparse.Namespace, progress: Progress) -> None:
    """The campaign in `jobs` processes, each with its share of the programs; one that does not end is ended."""
    folder = Path(tempfile.mkdtemp(prefix="cascade-correctness-"))
    kept = [folder / f"{share}.json" for share in range(options.jobs)]
    command = [sys.executable, "-m", "benchmarks.correctness", *sys.argv[1:]]
    jobs = [subprocess.Popen([*command, f"--share={share}", f"--keep={path}"]) for share, path in enumerate(kept)]
    for job in jobs:
        try:
            job.wait(max(1.0, progress.started + options.seconds + GRACE - time.time()))
        except subprocess.TimeoutExpired:
            job.kill()
    found = [Progress.load(path) for path in kept if path.exists()]
    progress.tallies |= {name: tally for one in found for name, tally in sorted(one.tallies.items())}


def table(progress: Progress) -> str:
    """Program, cases, failures, cases that did not fit into memory, the first failing case and its verdict."""
    rows: list[tuple[str, ...]] = [("program", "cases", "failed", "no memory", "first failing case: verdict")]
    for name, tally in progress.tallies.items():
        first = f"{tally.first}: {tally.verdict}" if tally.first else ""
        rows.append((name, str(tally.cases), str(tally.failures), str(tally.no_memory), first))
    every = progress.tallies.values()
    sums = (sum(t.cases for t in every), sum(t.failures for t in every), sum(t.no_memory for t in every))
    rows.append(("all", *map(str, sums), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3)), row[4]]) for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Runs the campaign; 1 where a case failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.correctness", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--seconds", type=float, default=480, help="when to stop (480)")
    parser.add_argument("--only", nargs="+", choices=list(EVERY), metavar="NAME", help="these programs")
    parser.add_argument("--blocks", action="store_true", help="layers, in the place of the programs of kernels")
    parser.add_argument("--kind", help="one kind of case: recipe, empty rank, layout, large, length, long, ...")
    parser.add_argument("--huge", action="store_true", help="tensors of more than 2^31 elements, instead")
    parser.add_argument("--interp", action="store_true", help="the interpreter in the place of the kernels")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the programs (1)")
    parser.add_argument("--share", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--keep", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if not CUDA:
        os.environ.setdefault("TRITON_INTERPRET", "1")
    progress = Progress.load(options.resume) if options.resume else Progress(time.time())
    if options.jobs > 1 and options.share is None:
        shared_campaign(options, progress)
    else:
        options.share = options.share or 0
        campaign(options, progress)
    device = torch.cuda.get_device_name() if CUDA else "cpu"
    spent = time.time() - progress.started
    now = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
    versions = f"torch {torch.__version__}, triton {metadata.version('triton')}, {now}"
    text = f"{device}, {versions}, jobs {options.jobs}, {spent:.0f} s\n{table(progress)}"
    if not options.keep:
        print(text, end="")
    if CUDA and not options.only and not options.kind and not options.keep:
        RESULTS.mkdir(exist_ok=True)
        parts = [part for part in ("blocks", "huge") if getattr(options, part)]
        name = "-".join(["correctness", *parts, *device.lower().split()])
        (RESULTS / f"{name}.txt").write_text(text, encoding="utf-8")
    return int(any(tally.failures for tally in progress.tallies.values()))


if __name__ == "__main__":
    sys.exit(main())
