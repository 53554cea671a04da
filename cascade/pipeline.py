"""The compiler on one page: every pass, in order, and the driver that runs and checks them.

    source --inline--> no abbreviations --canonicalize--> one reduction a statement
           --lift--> fewer trips, a state carried along each --group-rows--> rows that share an operand, together
           --fuse--> what shares a trip, in groups

Values are immutable, so the trace is the debugger: print after any pass, diff any two steps, stop anywhere and
interpret. How much is checked between passes is `CASCADE_CHECK`, see `settings.py`.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cascade.errors import CascadeError, CommandError, InternalError, VerifyError
from cascade.files import write_whole
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade
from cascade.passes.base import Pass, spelling, unknown_pass
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.fuse import Fuse
from cascade.passes.group_rows import GroupRows
from cascade.passes.inline import Inline
from cascade.passes.lift import Lift
from cascade.settings import settings
from cascade.text import render
from cascade.verify import Invariant, verify, well_formed

PIPELINE: tuple[Pass, ...] = (
    Inline(),  # first: every later pass sees Einsums only, none of the names they were abbreviated with
    Canonicalize(),  # then: one reduction a statement, in dependency order; a pass can count and move whole statements
    Lift(),  # before grouping: reductions that depend on each other share a trip if a state can be carried
    GroupRows(),  # before trips are shared: a sum over rows and an operand that data chooses becomes two sums
    Fuse(),  # last: statements of one trip run block by block, in the folds that lifting made or in groups
)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of a run; `after is before` where it found nothing to do."""

    name: str
    before: Cascade
    after: Cascade


@dataclass(frozen=True, slots=True)
class Trace:
    """A whole run: what went in, and every step."""

    source: Cascade
    steps: tuple[Step, ...]

    @property
    def final(self) -> Cascade:
        """The cascade after the last step."""
        return self.steps[-1].after if self.steps else self.source


def run_pipeline(
    cascade: Cascade,
    until: str | None = None,
    check: int | None = None,
    without: Collection[str] = (),
    passes: Sequence[Pass] = PIPELINE,
) -> Trace:
    """The cascade taken through the passes, as far as the pass named `until`, those named in `without` left out.

    A program that does not verify is the user's mistake and raises `VerifyError`; whatever goes wrong after that is
    ours and raises `InternalError`, unless a pass refuses the program with an error of its own.
    """
    level = settings().check if check is None else check
    names = [step.name for step in passes]
    for name in (*([until] if until else []), *without):
        if name not in names:
            raise unknown_pass(name, names)
    verify(cascade)
    steps: list[Step] = []
    current = cascade
    for step in passes[: names.index(until) + 1 if until else None]:
        if step.name in without or (without and unmet(step.requires, current)):
            continue  # with a pass switched off, those that build on it are off as well
        started = time.perf_counter()
        after = apply(step, current, level, cascade)
        report(step, current, after, time.perf_counter() - started)
        steps.append(Step(step.name, current, after))
        current = after
    if level == 0 and current is not cascade:
        verify(current)
    trace = Trace(cascade, tuple(steps))
    dump(trace)
    return trace


def apply(step: Pass, before: Cascade, level: int, source: Cascade) -> Cascade:
    """The cascade after one pass, checked as far as the level says; `source` is what the whole run started from.

    `before` is verified: the driver has just done it, so `well_formed` is not asked again.
    """
    needed = [invariant for invariant in step.requires if invariant is not well_formed]
    if level >= 1 and (failed := unmet(needed, before)):
        raise broken(step, source, before, before, f"needs {failed}")
    try:
        after = step(before)
    except CascadeError:  # a refusal, with its own code and span
        raise
    except Exception as error:
        raise broken(step, source, before, before, f"raised {type(error).__name__}: {error}") from error
    if after is before or level == 0:
        return after
    try:
        verify(after)
    except VerifyError as error:
        raise broken(step, source, before, after, f"made an invalid cascade\n{error}") from error
    if failed := unmet(step.ensures, after):
        raise broken(step, source, before, after, f"promises {failed}")
    if level >= 2 and (failed := text_difference(after) or meaning_difference(source, after)):
        raise broken(step, source, before, after, failed)
    return after


def unmet(invariants: Sequence[Invariant], cascade: Cascade) -> str:
    """The first of the invariants that does not hold, and why; "" where all hold."""
    for invariant in invariants:
        if found := invariant.holds(cascade):
            return f"{invariant.name!r}, which does not hold\n" + "\n".join(map(str, found))
    return ""


def text_difference(cascade: Cascade) -> str:
    """How the cascade differs from what its own text parses to; "" where it does not."""
    text = render(cascade)
    try:
        again = parse_cascade(text, "<rendered>", cascade.name)
    except CascadeError as error:
        return f"made a cascade whose text does not parse\n{error}"
    if again == cascade:
        return ""
    return f"made a cascade whose text parses to another\n{diff(text, render(again), 'text', 'text, parsed')}"


def meaning_difference(before: Cascade, after: Cascade) -> str:
    """How the two differ on tiny random inputs in float64; "" where they do not."""
    trial = importlib.import_module("cascade.trial")  # lazily: it needs torch
    for seed in range(2):
        if found := trial.difference(before, after, seed):
            return f"changed the meaning: {found}"
    return ""


# --- what a person sees ----------------------------------------------------------------------------------------------


def diff(before: str, after: str, left: str, right: str) -> str:
    """The unified diff of two texts; "" where they are equal."""
    lines = difflib.unified_diff(before.splitlines(), after.splitlines(), left, right, lineterm="")
    return "".join(f"{line}\n" for line in lines)


def step_diff(step: Step) -> str:
    """What one step changed."""
    return diff(render(step.before), render(step.after), f"before {step.name}", f"after {step.name}")


def report(step: Pass, before: Cascade, after: Cascade, seconds: float) -> None:
    """What `CASCADE_DEBUG` asks to see of one pass, on standard error."""
    level = settings().debug
    if level == 0:
        return
    counts = f"{len(before.body)} -> {len(after.body)} statements"
    lines = [f"cascade: {before.name}: {spelling(step)}: {counts}, {seconds * 1e3:.1f} ms\n"]
    if level >= 2:
        lines.append(step_diff(Step(step.name, before, after)))
    if level >= 3:
        lines.append(render(after))
    sys.stderr.write("".join(lines))


def dump(trace: Trace) -> None:
    """The text of every step, as files in `CASCADE_DUMP`."""
    folder = settings().dump
    if folder is None:
        return
    write_whole(folder / f"{trace.source.name}.00.source.cascade", render(trace.source))
    for number, step in enumerate(trace.steps, 1):
        write_whole(folder / f"{trace.source.name}.{number:02}.{step.name}.cascade", render(step.after))


def broken(step: Pass, source: Cascade, before: Cascade, after: Cascade, what: str) -> InternalError:
    """The error for a bug of ours: the pass, what went wrong, the change, and the command that shows it again."""
    text = f"pass {spelling(step)!r} {what}"
    change = "" if after is before else "\n" + step_diff(Step(step.name, before, after)).rstrip("\n")
    after_step = f" --after {step.name}" if step.name in (known.name for known in PIPELINE) else ""
    command = f"CASCADE_CHECK=2 cascadec show {{path}}{after_step}"
    return InternalError(f"internal error: {text}{change}\n{reproducer(text, command, render(source))}")


REPRODUCE = "# reproduce: "
"""How the line of a reproducer file begins that has the command; what happened is before it, the program behind."""


def bug_hash(told: str, program: str) -> str:
    """The hash in the name of a reproducer file."""
    return hashlib.sha256((told + program).encode()).hexdigest()[:12]


def reproducer(what: str, command: str, program: str) -> str:
    """Leaves the program as a file, `{path}` in the command standing for it; the lines that say where it is."""
    folder = settings().dump or settings().cache_dir / "bugs"
    told = "".join(f"# {line}\n" for line in what.splitlines())
    path = folder / f"bug-{bug_hash(told, program)}.cascade"
    command = command.replace("{path}", str(path))
    comment = f"{told}{REPRODUCE}{command}\n"
    try:
        write_whole(path, comment + program)
    except CommandError as error:
        return f"no reproducer file: {error}"
    return f"reproduce: {command}"
