"""The case runner, and the checks that tests share.

A case file is a program with its own expected outcome:

    # run: <command> [options]
    <input>
    ---
    <expected text>

The commands: `parse` and `show [--after PASS]` expect canonical text, `verify` expects `ok`, `trace [name]` runs
Python source and expects the text of the function it compiles, `pass-count [rank]` expects the passes over one rank or
every rank, and one or more spellings of passes, such as `inline canonicalize`, expect the text after them. A program
that is refused expects the rendered diagnostics; positions are those in the case file. Passes are executed as well: the
driver checks round trip and meaning after each of them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cascade import trial
from cascade.compiled import Compiled
from cascade.errors import CascadeError
from cascade.frontend.build import parse_cascade
from cascade.ir import Cascade
from cascade.passes import PASSES
from cascade.passes.base import parse_pass
from cascade.passes.pass_count import Passes, all_passes
from cascade.pipeline import run_pipeline
from cascade.text import render
from cascade.verify import verify

CASES = Path(__file__).parent / "cases"
SEEDS = range(3)


@dataclass(frozen=True)
class Case:
    """A case file taken apart; `program` keeps the first line, a comment, so that line numbers are the file's."""

    path: Path
    command: str
    options: list[str]
    program: str
    expected: str


def case_files() -> list[Path]:
    """Every case file, in order."""
    return sorted(CASES.rglob("*.case"))


def read_case(path: Path) -> Case:
    """The case that a file holds."""
    text = path.read_text(encoding="utf-8")
    first, _, _ = text.partition("\n")
    assert first.startswith("# run: "), f"{path}: the first line must be `# run: <command>`"
    command, *options = split_words(first.removeprefix("# run: "))
    program, divider, expected = text.partition("\n---\n")
    assert divider, f"{path}: no line `---` between input and expected text"
    return Case(path, command, options, program + "\n", expected)


def split_words(text: str) -> list[str]:
    """The words of a `# run:` line; the options of a pass, in braces, stay together."""
    words: list[str] = []
    for word in text.split():
        if words and words[-1].count("{") > words[-1].count("}"):
            words[-1] += f" {word}"
        else:
            words.append(word)
    return words


def check_case(path: Path, update: bool = False) -> None:
    """Runs the case and compares; with `update`, writes what came out once it has been executed."""
    case = read_case(path)
    found = outcome(case)
    if found == case.expected:
        return
    if update:
        path.write_text(f"{case.program.rstrip(chr(10))}\n---\n{found}", encoding="utf-8")
        return
    change = difflib.unified_diff(case.expected.splitlines(), found.splitlines(), "expected", "found", lineterm="")
    raise AssertionError(f"{path}\n" + "\n".join(change))


def outcome(case: Case) -> str:
    """What the case's command gives: text, or the diagnostics of the error that it raises."""
    run = COMMANDS.get(case.command, run_passes)
    try:
        return run(case)
    except CascadeError as error:
        return f"{error}\n".replace(str(case.path), case.path.name)


def parsed(case: Case) -> Cascade:
    """The case's last cascade, unverified."""
    return parse_cascade(case.program, case.path.name)


def run_parse(case: Case) -> str:
    """Canonical text, which must parse to the same cascade."""
    cascade = parsed(case)
    check_round_trip(cascade)
    return render(cascade)


def run_verify(case: Case) -> str:
    """`ok` for a valid cascade, whose text must parse to the same."""
    cascade = parsed(case)
    verify(cascade)
    check_round_trip(cascade)
    return "ok\n"


def run_show(case: Case) -> str:
    """The text at a point of the pipeline."""
    cascade = parsed(case)
    verify(cascade)
    until = case.options[case.options.index("--after") + 1] if "--after" in case.options else None
    return render(run_pipeline(cascade, until, check=2).final if until else cascade)


def run_trace(case: Case) -> str:
    """The text of the function that the case's Python source compiles, the last one or the one of that name."""
    scope: dict[str, object] = {"__name__": "case"}
    exec(compile(case.program, str(case.path), "exec"), scope)
    found = {name: value for name, value in scope.items() if isinstance(value, Compiled)}
    assert found, f"{case.path}: no function is compiled"
    cascade = (found[case.options[0]] if case.options else list(found.values())[-1]).cascade
    verify(cascade)
    check_round_trip(cascade)
    return render(cascade)


def run_pass_count(case: Case) -> str:
    """The passes over every rank of the canonical cascade, or over the one that the case names."""
    counts = all_passes(run_pipeline(parsed(case), "canonicalize", check=2).final)
    return "".join(passes_text(counts[rank]) for rank in case.options or counts)


def passes_text(passes: Passes) -> str:
    """`n: 3 passes, 5 phases`, and below it the passes over each input and the witness."""
    levels = f" ({', '.join(passes.levels)})" if passes.levels != (passes.rank,) else ""
    counts = f"{amount(passes.count, 'pass', 'passes')}, {amount(passes.phases, 'phase', 'phases')}"
    inputs = ", ".join(f"{name} {count}" for name, count in passes.inputs.items()) or "none"
    witness = ", ".join(passes.witness) or "none"
    return f"{passes.rank}{levels}: {counts}\n  inputs: {inputs}\n  witness: {witness}\n"


def amount(count: int, one: str, many: str) -> str:
    """`1 pass`, `2 passes`."""
    return f"{count} {one if count == 1 else many}"


def run_passes(case: Case) -> str:
    """The text after the passes of the case, each checked by the driver, and the meaning on more inputs."""
    passes = [parse_pass(word, PASSES) for word in (case.command, *case.options)]
    source = parsed(case)
    final = run_pipeline(source, check=2, passes=passes).final
    check_same_meaning(source, final)
    return render(final)


COMMANDS: dict[str, Callable[[Case], str]] = {
    "parse": run_parse,
    "verify": run_verify,
    "show": run_show,
    "trace": run_trace,
    "pass-count": run_pass_count,
}


# --- checks that tests share -----------------------------------------------------------------------------------------


def check_round_trip(cascade: Cascade) -> None:
    """The cascade's text parses to the cascade."""
    again = parse_cascade(render(cascade), "<rendered>", cascade.name)
    assert again == cascade, f"the text parses to another cascade\n{render(cascade)}---\n{render(again)}"


def check_same_meaning(before: Cascade, after: Cascade) -> None:
    """Both cascades give the same results in float64 on tiny random inputs."""
    for seed in SEEDS:
        found = trial.difference(before, after, seed)
        assert not found, f"{found} (seed {seed})\n{render(before)}---\n{render(after)}"
