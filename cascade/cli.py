"""`cascadec`: arguments in, one call into the compiler, text or one JSON object out.

Exit codes: 0 done; 1 the program or its data is wrong; 2 the command line, a file or the environment is wrong; 70 a
bug in cascade, with a reproducer file; 130 interrupted. Results go to standard output, everything else to standard
error. Colours and boxes appear on a terminal only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import functools
import importlib
import json
import math
import os
import re
import shlex
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.shell_completion import shell_complete

import cascade as package
from cascade import comparison, explanation, pipeline, views
from cascade.compiled import Compiled, specialise, split_name
from cascade.errors import CascadeError, CommandError, Diagnostic, InternalError, Span, quoted_list
from cascade.files import write_whole
from cascade.inference import infer_shapes
from cascade.ir import Cascade, DType, Param, Result
from cascade.parameters import (
    BUG, COMMAND_WRONG, DONE, DTYPE, IN_PLACE, INTERRUPTED, JSON, MACHINE, PROGRAM_WRONG, SIZES, STATIC, LevelsType,
    MachineType, PassType, ProgramType, SizesType,
)  # fmt: skip
from cascade.passes import PASSES
from cascade.passes.base import parse_pass
from cascade.passes.canonicalize import Canonicalize
from cascade.passes.lift import lift_reductions
from cascade.passes.report import report, report_text
from cascade.programs import STANDARD_INPUT, find, sized, standard_input
from cascade.settings import COMPLETION, completion_asked, settings
from cascade.terminal import changes, emit, error_text, heading, progress, program, table
from cascade.text import render
from cascade.upkeep import cache_group, completion_command, doctor_command


def main() -> None:
    """The entry point of the command: runs it and ends the process with its exit code."""
    exit_on_interrupt()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by the caller, who does not want to hear
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if (asked := completion_asked()) is not None:  # by the script of `cascadec completion`
        sys.exit(shell_complete(commands, {}, "cascadec", COMPLETION, asked))
    sys.exit(run_command(sys.argv[1:]))


def run_command(arguments: list[str]) -> int:
    """Runs one command line; the exit code. Every error ends here as a message, never as a bare traceback."""
    as_json = "--json" in arguments
    arguments = [re.sub(r"^-:", "/dev/stdin:", argument) for argument in arguments]  # click takes `-:name` for options
    try:
        with commands.make_context("cascadec", list(arguments)) as context:
            commands.invoke(context)
        sys.stdout.flush()
        return DONE
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return complain_about_usage(error, as_json)
    except CascadeError as error:
        complain(error, as_json)
        return exit_code(error)
    except BrokenPipeError:  # the reader has what it wanted; nothing may be written at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EIO, errno.EBADF):
            return complain_about_bug(error, arguments, as_json)
        complain(output_error("standard output", error), False)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return COMMAND_WRONG
    except Exception as error:
        return complain_about_bug(error, arguments, as_json)


def exit_code(error: CascadeError) -> int:
    """Which side is wrong: the command line, its files and the environment, or the program and its data."""
    program = not isinstance(error, CommandError) or error.diagnostics[0].code == "C611"
    return PROGRAM_WRONG if program else COMMAND_WRONG


def exit_on_interrupt() -> None:
    """Ctrl-C ends the process at once with 130, even inside a long tensor operation.

    Python runs signal handlers between bytecodes of the main thread only, so a second thread waits for the byte that
    the interpreter writes when the signal arrives. Files are written whole and renamed, so none is left half done.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.signal(signal.SIGINT, lambda number, frame: None)
    signal.set_wakeup_fd(writer)

    def wait() -> None:
        while os.read(reader, 1) != bytes([signal.SIGINT]):
            pass
        os._exit(INTERRUPTED)

    threading.Thread(target=wait, daemon=True).start()


# --- the program a command is about ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What every command about a program takes."""

    file: str
    sizes: dict[str, int]
    dtype: DType | None
    json: bool


def load(options: Options) -> Cascade:
    """The verified cascade that the command line names, with the sizes and the type it states."""
    return sized(find(options.file).cascade, options.sizes)


# --- commands --------------------------------------------------------------------------------------------------------


MAX_ELEMENTS = 2**28  # of one tensor that `run` makes, in float64 as well


def about_program(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command its FILE and the options that every command about a program takes."""

    @click.argument("file", metavar="FILE", type=ProgramType())
    @SIZES
    @DTYPE
    @JSON
    @functools.wraps(command)
    def run(file: str, sizes: tuple[tuple[str, int], ...], dtype: str | None, as_json: bool, **rest: Any) -> None:
        command(Options(file, dict(sizes), DType(dtype) if dtype else None, as_json), **rest)

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package.__version__, prog_name="cascadec")
def commands() -> None:
    """Compile cascades of extended Einsums.

    FILE is a .cascade file, a .py file with functions decorated by @cascade.compile, or - for standard input.
    FILE:name picks one of several cascades; otherwise it is the last one.

    \b
    Examples:
      cascadec show examples/attention.cascade --after canonicalize
      cascadec run examples/attention.cascade -s M=128 -s N=128
    """


@commands.command()
@about_program
@click.option("--after", metavar="PASS", type=PassType(), help="Stop after this pass of the pipeline.")
@click.option("--steps", is_flag=True, help="Every step of the pipeline, not only the last.")
@click.option("--rich", is_flag=True, help="A tree: what runs together, ranks with passes, what each step changed.")
def show(options: Options, after: str | None, steps: bool, rich: bool) -> None:
    """Print a cascade as written, or after a pass of the pipeline.

    With sizes (-s) and --dtype the text is that of the cascade for these sizes and that type.

    \b
    Examples:
      cascadec show examples/attention.cascade --rich
      cascadec show examples/block.cascade --after canonicalize -s D=64
    """
    cascade = specialise(load(options), options.sizes, options.dtype)
    until = parse_pass(after, PASSES).name if after else None
    if rich:
        if until or steps:
            raise click.UsageError("--rich tells of the whole pipeline", click.get_current_context())
        told = explanation.overview(pipeline.run_pipeline(cascade))
        emit(told, lambda: views.overview(told), options.json)
        return
    if not steps:
        final = pipeline.run_pipeline(cascade, until).final if until else cascade
        text = render(final)
        emit({"cascade": cascade.name, "after": until, "text": text}, lambda: program(text), options.json)
        return
    trace = pipeline.run_pipeline(cascade, until)
    shown = [("source", True, render(cascade))]
    shown += [(step.name, step.after is not step.before, render(step.after)) for step in trace.steps]
    payload = [{"pass": name, "changed": changed, "text": text} for name, changed, text in shown]
    emit({"cascade": cascade.name, "steps": payload}, lambda: show_steps(shown), options.json)


def show_steps(steps: list[tuple[str, bool, str]]) -> None:
    """Every step under its heading."""
    for number, (name, changed, text) in enumerate(steps):
        heading(f"{'' if number == 0 else chr(10)}# {name}{'' if changed else ': nothing to do'}")
        if changed:
            program(text)


@commands.command()
@about_program
@MACHINE
@IN_PLACE
@STATIC
def explain(options: Options, name: str | None, in_place: tuple[tuple[str, str], ...], static: bool) -> None:
    """Explain a cascade: passes with their witness, what is lifted, what is not and why; on a machine, what it costs.

    On a GPU these are the kernels in order: what each fuses, moves and computes, its predicted time, what bounds it and
    for which share of it that is busy. On several devices it is the plan, on a spatial machine cycles and energy. Sizes
    that -s does not give are those that `emit` plans for, on a GPU; untyped parameters are bf16 there.

    \b
    Examples:
      cascadec explain examples/attention.cascade
      cascadec explain examples/block.cascade --machine h200 -s T=4096 -s D=4096 -s F=14336
    """
    request = explanation.Request(options.sizes, options.dtype, name, static, dict(in_place))
    told = explanation.explanation(pipeline.run_pipeline(load_typed(options)), request)
    emit(told, lambda: views.explanation(told), options.json)


@commands.command()
@about_program
@click.argument("other", metavar="[OTHER]", type=ProgramType(".cascade", ".py", ".json"), required=False)
@click.option("--pass", "step", metavar="PASS", type=PassType(), help="Of one FILE: the pass whose change is shown.")
@MACHINE
@STATIC
def diff(options: Options, other: str | None, step: str | None, name: str | None, static: bool) -> None:
    """Print what changed between two cascades, two schedules or two versions of a kernel; or what one pass changes.

    Of cascades: statements, schedule, passes, lifts, bytes and operations; with --machine each kernel and the whole. Of
    kernels: two files that `emit` wrote, or two .json files with what `emit --json` printed; they are read, never run.

    \b
    Examples:
      cascadec diff examples/attention.cascade examples/softmax.cascade
      cascadec diff examples/attention.cascade --pass lift
    """
    if (other is None) == (step is None):
        raise click.UsageError("give either OTHER, which FILE is compared with, or --pass", click.get_current_context())
    if step is not None:
        change_of_pass(options, step)
        return
    assert other is not None
    request = explanation.Request(options.sizes, options.dtype, name, static)
    told = comparison.of_files(options.file, other, request)
    emit(told, lambda: views.comparison(told), options.json)


def change_of_pass(options: Options, name: str) -> None:
    """What one pass changes, as a unified diff."""
    cascade = specialise(load(options), options.sizes, options.dtype)
    until = parse_pass(name, PASSES).name
    step = pipeline.run_pipeline(cascade, until).steps[-1]
    text = pipeline.step_diff(step)
    payload = {"cascade": cascade.name, "pass": until, "changed": bool(text), "diff": text}
    emit(payload, lambda: changes(text) if text else click.echo(f"{until}: nothing to do", err=True), options.json)


@commands.command()
@about_program
@click.option("--seed", type=click.IntRange(0, 2**32), default=0, show_default=True, help="Of the random inputs.")
@click.option("--without", metavar="PASS", type=PassType(), multiple=True, help="Leave out this pass of the pipeline.")
def run(options: Options, seed: int, without: tuple[str, ...]) -> None:
    """Run on random inputs and compare with the float64 reference.

    Sizes that -s does not give are small numbers; untyped parameters are f32, or i64 where they are used as integers.

    \b
    Examples:
      cascadec run examples/attention.cascade
      cascadec run examples/attention.cascade -s M=512 -s N=512 --dtype bf16 --seed 7
    """
    cascade = load(options)
    trial = importlib.import_module("cascade.trial")  # lazily: it needs torch
    sizes = trial.small_sizes(cascade, options.sizes)
    types = trial.param_types(cascade, options.dtype or DType.F32)
    check_elements(cascade, sizes)
    measured = trial.measure(cascade, Compiled(cascade, without), sizes, types, seed)
    results = {name: finite(dataclasses.asdict(verdict)) for name, verdict in measured.items()}
    ok = all(verdict.ok for verdict in measured.values())
    payload = {
        "cascade": cascade.name,
        "sizes": sizes,
        "defaulted": [name for name in sizes if name not in options.sizes],
        "inputs": {param.name: types[param.name].value for param in cascade.params},
        "seed": seed,
        "results": results,
        "ok": ok,
    }
    emit(payload, lambda: show_run(payload), options.json)
    if not ok:
        raise click.exceptions.Exit(PROGRAM_WRONG)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """The values with None for numbers that JSON cannot write."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def check_elements(cascade: Cascade, sizes: dict[str, int]) -> None:
    """No tensor that `run` makes is absurdly large."""
    declared: tuple[Param | Result, ...] = (*cascade.params, *cascade.results)
    for decl in declared:
        count = math.prod(size if isinstance(size, int) else sizes[size] for size in decl.shape)
        if count > MAX_ELEMENTS:
            message = f"{decl.name!r} would have {count} elements; the limit of `run` is {MAX_ELEMENTS}"
            raise CommandError(Diagnostic("C614", message, decl.span, "give smaller sizes with -s"))


def show_run(payload: dict[str, Any]) -> None:
    """What ran on what, and a row for every result."""
    sizes = [f"{n}={v}{' (default)' if n in payload['defaulted'] else ''}" for n, v in payload["sizes"].items()]
    inputs = [f"{name}: {dtype}" for name, dtype in payload["inputs"].items()]
    click.echo(f"{payload['cascade']} on random inputs {', '.join(inputs)}; seed {payload['seed']}")
    if sizes:
        click.echo(f"sizes {', '.join(sizes)}")
    rows: list[tuple[str, ...]] = []
    for name, result in payload["results"].items():
        shape = ",".join(map(str, result["shape"]))
        verdict = "ok" if result["ok"] else f"wrong: {result['reason']}"
        errors = ("-" if result[key] is None else f"{result[key]:.2e}" for key in ("max_error", "allowed"))
        rows.append((name, f"{result['dtype']}[{shape}]", *errors, verdict))
    table(("result", "type", "max error", "allowed", "verdict"), rows)


@commands.command()
@click.argument("file", metavar="[FILE]", type=ProgramType(), required=False)
@SIZES
@DTYPE
@JSON
@click.option("--partition", "levels", type=LevelsType(), multiple=True, help="Levels of a rank, outermost first.")
@click.option("--list", "listing", is_flag=True, help="List every pass of the compiler instead.")
def passes(
    file: str | None,
    sizes: tuple[tuple[str, int], ...],
    dtype: str | None,
    as_json: bool,
    levels: tuple[tuple[str, tuple[str, ...]], ...],
    listing: bool,
) -> None:
    """Print how often each rank is passed over, what is lifted, what blocks the rest, and what moves.

    With --list: the passes of the compiler, what each needs, ensures and does.

    \b
    Examples:
      cascadec passes examples/attention.cascade -s B=1 -s H=8 -s M=4096 -s N=4096 -s E=64 -s F=64
      cascadec passes --list --json
    """
    if listing and file is None:
        list_passes(as_json)
    elif listing or file is None:
        message = "give either FILE, whose passes are counted, or --list for the passes of the compiler"
        raise click.UsageError(message, click.get_current_context())
    else:
        count_file(Options(file, dict(sizes), DType(dtype) if dtype else None, as_json), dict(levels))


def count_file(options: Options, levels: dict[str, tuple[str, ...]]) -> None:
    """The report about the program that the command line names."""
    canonical = pipeline.run_pipeline(load(options), "canonicalize").final
    check_levels(canonical, levels)
    found = report(canonical, lift_reductions(canonical), options.sizes, options.dtype, levels)
    emit(found, lambda: click.echo(report_text(found), nl=False), options.json)


def check_levels(cascade: Cascade, levels: dict[str, tuple[str, ...]]) -> None:
    """The levels that the command line names are rank variables of the cascade."""
    known = list(infer_shapes(cascade).ranks)
    for level in (level for parts in levels.values() for level in parts):
        if level not in known:
            close = difflib.get_close_matches(level, known, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"its rank variables are {quoted_list(known, 20)}"
            message = f"{cascade.name!r} has no rank variable {level!r}: {hint}"
            raise click.BadParameter(message, click.get_current_context(), param_hint="'--partition'")


@commands.command("emit")
@about_program
@click.option("--backend", type=click.Choice(["triton"]), required=True, help="What the kernels are written in.")
@click.option("--arch", type=click.Choice(["sm_80", "sm_90"]), default="sm_90", show_default=True, help="The GPU.")
@click.option("-o", "--output", "folder", metavar="DIR", required=True, help="Where the files go.")
def emit_kernels(options: Options, backend: str, arch: str, folder: str) -> None:
    """Write the kernels as Python files that need torch and Triton only.

    Each has the kernels of a group, run() that launches them and, started as a program, a check against plain torch;
    with --bench also the time. What is in no kernel is plain torch. Sizes that -s does not give are 128 for a rank that
    a tile of a matrix product holds whole, 2 or 4 for batches and heads, else 4096; the files run for others too and
    say what is compiled in. Untyped parameters are bf16, or i64 where they are used as integers. The kernels are
    compiled for the GPU, which need not be there, and what shows is reported.

    \b
    Examples:
      cascadec emit examples/attention.cascade --backend triton -o out
      cascadec emit examples/block.cascade --backend triton -s D=1024 --dtype f16 -o out --json
    """
    if (empty := next((name for name, size in options.sizes.items() if not size), None)) is not None:
        raise click.BadParameter(f"{empty} is 0: nothing is launched then", param_hint="'--size'")
    writer = importlib.import_module(f"cascade.backends.{backend}.standalone")
    offline = importlib.import_module(f"cascade.backends.{backend}.offline")
    subject = subject_of(options, writer)
    made, facts = writer.with_facts(subject, arch, functools.partial(offline.facts, jobs=2))
    for name, text in made.files.items():
        write_whole(Path(folder) / name, text)
    machine = importlib.import_module(f"cascade.backends.{backend}.machine").machine_of_arch(arch)
    payload = {
        "cascade": subject.final.name,
        "arch": arch,
        "sizes": subject.sizes,
        "files": [str(Path(folder) / name) for name in made.files],
        "kernels": [
            kernel_json(kernel, found, folder, machine) for kernel, found in zip(made.kernels, facts, strict=True)
        ],
    }
    emit(payload, lambda: show_kernels(payload), options.json)


def subject_of(options: Options, writer: Any) -> Any:
    """What is emitted: the cascade through the pipeline, sizes, types, the range of the integers."""
    cascade = load(options)
    trial = importlib.import_module("cascade.trial")  # lazily: it needs torch
    types = trial.param_types(cascade, options.dtype or DType.BF16)
    steps = pipeline.run_pipeline(cascade).steps
    canonical = next(step.after for step in steps if step.name == Canonicalize.name)
    final = steps[-1].after
    sizes = writer.default_sizes(final, types, options.sizes)
    check_elements(cascade, sizes)
    return writer.Subject(canonical, final, sizes, types, functools.partial(trial.highest_values, canonical))


def kernel_json(kernel: Any, found: Any, folder: str, machine: Any) -> dict[str, Any]:
    """One kernel, its machine code and what is predicted; null where it does not compile, `failure` says why."""
    plan = kernel.kernel
    static = {name: getattr(found, name, None) for name in explanation.STATIC}
    return {
        "name": plan.name,
        "file": str(Path(folder) / kernel.file),
        "grid": kernel.grid,
        "tile": {axis.rank: axis.tile for axis in plan.axes if axis.tile > 1},
        "warps": plan.options.num_warps,
        "stages": plan.options.num_stages,
        "static": {**static, "serialized": [*(static["serialized"] or ())]},
        "model": explanation.modelled(kernel, machine, static["registers"], static["shared_bytes"]),
        "failure": getattr(found, "message", None),
    }


def show_kernels(payload: dict[str, Any]) -> None:
    """The files, and a row for every kernel."""
    sizes = ", ".join(f"{name}={size}" for name, size in payload["sizes"].items())
    click.echo(f"{payload['cascade']} for {payload['arch']}{f', planned for {sizes}' if sizes else ''}")
    click.echo("\n".join(payload["files"]))
    rows = []
    for kernel in payload["kernels"]:
        static = kernel["static"]
        facts = ("-" if static[name] is None else str(static[name]) for name in explanation.STATIC[:-1])
        grid, tile = (", ".join(f"{rank} {n}" for rank, n in kernel[key].items()) for key in ("grid", "tile"))
        remark = kernel["failure"] or " ".join(static["serialized"])
        rows.append((kernel["name"], grid, tile, *facts, " ".join(remark.split())))
    table(("kernel", "grid", "tile", "registers", "spills", "shared", "blocks/SM", "wgmma", "mma", "remarks"), rows)


SEARCHES = click.Choice(("fastest", "pareto"))


@commands.command("cost")
@about_program
@click.option(
    "--machine",
    "name",
    metavar="NAME|FILE",
    type=MachineType("gpu", "spatial"),
    required=True,
    help="A machine that is known, or a TOML file.",
)
@click.option("--mapping", "path", metavar="FILE", help="A TOML file; else the schedule's, else one is searched.")
@click.option("--search", type=SEARCHES, help="Search one mapping, or all unbeaten ones; from --mapping.")
@click.option("--after", metavar="PASS", type=PassType(), help="Cost the cascade after this pass of the pipeline.")
@click.option("--as-published", is_flag=True, help="Count as the published evaluation of the mapping did.")
@click.option("--symbolic", is_flag=True, help="Closed forms in the shape symbols, of a mapping that is given.")
@click.option("--save-mapping", "save", metavar="FILE", help="Write the mapping that was used: TOML, or FILE.cascade.")
def cost_command(
    options: Options,
    name: str,
    path: str | None,
    search: str | None,
    after: str | None,
    as_published: bool,
    symbolic: bool,
    save: str | None,
) -> None:
    """Print what a cascade costs on a modelled spatial machine: cycles, use of units, traffic, energy.

    All shape symbols need a size. The mapping is a file, or the regions of the schedule; with one the cascade is taken
    as written, one reduction a statement. Without one it goes through the pipeline, what the schedule groups shares a
    region, and a mapping is searched. --after chooses otherwise.

    \b
    Examples:
      cascadec cost examples/attention.cascade --machine fusemax -s B=1 -s H=8 -s M=4096 -s N=4096 -s E=64 -s F=64
      cascadec cost examples/softmax.cascade --machine fusemax -s M=64 -s N=4096 --search pareto
    """
    gpus = importlib.import_module("cascade.backends.triton.machine")
    if name.lower() in gpus.MACHINES:
        if path or as_published or save or after or symbolic or search:
            message = f"{name} is a GPU: the planner of kernels maps the cascade"
            raise click.UsageError(message, click.get_current_context())
        cost_of_kernels(options, gpus.machine(name))
        return
    systolic = {part: importlib.import_module(f"cascade.backends.systolic.{part}") for part in SYSTOLIC}
    machine = systolic["machine"].machine(name)
    written = load_typed(options)
    mapping = systolic["mapping"].scheduled(written)
    given = path is not None or mapping is not None
    until = parse_pass(after, PASSES).name if after else (Canonicalize.name if given else None)
    cascaded = systolic["work"].take_apart(pipeline.run_pipeline(written, until).final)
    if path is not None:
        mapping = systolic["mapping"].mapping(path)
    if mapping is None and symbolic:
        raise click.UsageError("--symbolic needs a --mapping, or regions in the schedule", click.get_current_context())
    if search == "pareto":
        cost_of_front(options, cascaded, machine, mapping, save)
        return
    if mapping is None or search is not None:
        with progress() as told:
            mapping = systolic["search"].search(cascaded, machine, options.sizes, told, mapping)
    if save is not None:
        write_whole(Path(save), mapping_text(save, cascaded.cascade, mapping))
    evaluator = systolic["cost"].Evaluator(cascaded, machine, mapping)
    if symbolic:
        forms = importlib.import_module("cascade.backends.systolic.symbolic")  # lazily: it needs SymPy
        closed = {"cascade": cascaded.cascade.name, "machine": name, **forms.forms_json(forms.closed_forms(evaluator))}
        emit(closed, lambda: show_forms(closed), options.json)
        return
    found = evaluator.cost(options.sizes, as_published)
    report = systolic["report"]
    payload = {"cascade": cascaded.cascade.name, "sizes": options.sizes, **report.cost_json(found, machine)}
    emit(payload, lambda: show_cost(report.summary(found, machine), report.einsum_rows(found)), options.json)


SYSTOLIC = ("machine", "mapping", "work", "search", "cost", "report")  # what a cost needs of its backend, loaded lazily


def cost_of_front(options: Options, cascaded: Any, machine: Any, start: Any, save: str | None) -> None:
    """The mappings that no other one beats in time, energy and bytes on chip; the fastest is what is saved."""
    report = importlib.import_module("cascade.backends.systolic.report")
    with progress() as told:
        pareto = importlib.import_module("cascade.backends.systolic.pareto")
        found = pareto.front(cascaded, machine, options.sizes, told, start)
    payload = {"cascade": cascaded.cascade.name, "machine": machine.name, "sizes": options.sizes}
    payload |= report.front_json(found)
    if save is not None:
        write_whole(Path(save), mapping_text(save, cascaded.cascade, found.mappings[0]))
    titles = ("time", "energy", "on chip", "traffic", "loops")

    def draw() -> None:
        click.echo(f"{machine.name}: {report.front_summary(found)}")
        table(titles, report.front_rows(found))

    emit(payload, draw, options.json)


def mapping_text(path: str, cascade: Cascade, mapping: Any) -> str:
    """A mapping as TOML; as the schedule of its cascade where the name of the file ends so."""
    writer = importlib.import_module("cascade.backends.systolic.mapping")
    as_schedule = path.endswith(".cascade")
    return render(writer.with_mapping(cascade, mapping)) if as_schedule else str(writer.render_mapping(mapping))


FIGURES = ("utilisation", "time", "speedup", "energy", "roofline", "pareto")


@commands.command("plan")
@about_program
@click.option(
    "--machine",
    "name",
    metavar="NAME",
    type=MachineType("several", "gpu"),
    required=True,
    help="A machine of several devices, or one GPU.",
)
@click.option("--trace", "trace", metavar="FILE", help="Write the timetable as a Chrome trace, which Perfetto opens.")
@click.option("--exact", is_flag=True, help="Prove the schedule: by search, and by OR-tools where that ends too early.")
def plan_command(options: Options, name: str, trace: str | None, exact: bool) -> None:
    """Plan a cascade for several devices: what is sharded, where its tokens are split, what runs beside what.

    The mesh is that of the schedule; what it does not say is chosen. On one GPU there is no mesh: slices of a rank and
    statements that do not need each other run beside each other on shares of its SMs. Times are modelled.

    \b
    Examples:
      cascadec plan layer.cascade --machine h100x8 -s T=4096 -s D=8192 -s F=28672
      cascadec plan layer.cascade --machine a100x8 -s T=8192 -s D=8192 -s F=28672 --trace layer.json
    """
    planner = importlib.import_module("cascade.backends.distributed.plan")
    machines = importlib.import_module("cascade.backends.distributed.machine")
    cascade = pipeline.run_pipeline(load(options), Canonicalize.name).final
    found = planner.plan(cascade, options.sizes, machines.node(name), options.dtype or DType.BF16, exact)
    if trace is not None:
        write_whole(Path(trace), json.dumps(planner.trace_json(found)))
    emit(planner.plan_json(found), lambda: click.echo(planner.plan_text(found)), options.json)


@commands.command("inspect")
@about_program
@click.option(
    "--machine", "machines", metavar="NAME|FILE", type=MachineType("gpu", "several", "spatial"), multiple=True,
    help="One of the machines; else h200.",
)  # fmt: skip
@click.option("--mapping", metavar="FILE", help="A TOML file for the costs; else the schedule's, else one is searched.")
@click.option("--as-published", is_flag=True, help="Count costs as the published evaluation of the mapping did.")
@click.option("--compile/--no-compile", "compiled", default=None, help="Compile the kernels; else where they are few.")
@click.option("-o", "--output", "path", metavar="FILE", help="The page; else the cascade's name with .html.")
def inspect_command(
    options: Options,
    machines: tuple[str, ...],
    mapping: str | None,
    as_published: bool,
    compiled: bool | None,
    path: str | None,
) -> None:
    """Write a page that shows what the compiler knows of a cascade: one HTML file that opens from disk.

    It has the equations, their graph, the passes over each rank, every step of the pipeline, the kernels beside the
    statements that they compute; for a spatial machine the cost, for several devices the plan. Sizes that -s does not
    give are supposed for kernels; costs and plans need them.

    \b
    Examples:
      cascadec inspect examples/attention.cascade -o attention.html
      cascadec inspect examples/softmax.cascade --machine h200 --machine fusemax -s M=64 -s N=4096 --no-compile
    """
    inspector = importlib.import_module("cascade.inspector")
    trace = pipeline.run_pipeline(load(options))
    asked = inspector.Asked(options.sizes, options.dtype, machines, mapping, as_published, compiled)
    page = inspector.inspect(trace, asked)
    where = page.save(path or f"{trace.source.name}.html")
    payload = {"cascade": trace.source.name, "file": str(where), "panels": page.panels}
    emit(payload, lambda: click.echo(f"{where}: {', '.join(page.panels)}"), options.json)


@commands.command("sweep")
@click.argument("file", metavar="FILE", type=ProgramType())
@click.option("-s", "--size", "sizes", type=SizesType(), multiple=True, help="Sizes of a shape symbol, M=1024,4096.")
@DTYPE
@JSON
@click.option(
    "--machine",
    "machines",
    metavar="NAME|FILE",
    type=MachineType("spatial"),
    multiple=True,
    required=True,
    help="One of the machines.",
)
@click.option("--mapping", "mappings", metavar="FILE", multiple=True, help="One of the mappings; else it is searched.")
@click.option("--search", type=SEARCHES, help="Search one mapping for each point, or all unbeaten ones.")
@click.option("--jobs", type=click.IntRange(1, 1024), default=1, show_default=True, help="Processes that share it.")
@click.option("--scheduler", metavar="ADDRESS", help="A Dask cluster that runs it instead.")
@click.option("-o", "--output", metavar="FILE", help="Where the rows go: CSV, or Parquet where the name ends so.")
@click.option("--plot", metavar="FILE", help="Write figures: an HTML page, or FILE.png, .pdf or .svg by matplotlib.")
@click.option("--figure", "kinds", type=click.Choice(FIGURES), multiple=True, help="One of the figures; else all.")
def sweep_command(
    file: str,
    sizes: tuple[tuple[str, tuple[int, ...]], ...],
    dtype: str | None,
    as_json: bool,
    machines: tuple[str, ...],
    mappings: tuple[str, ...],
    search: str | None,
    jobs: int,
    scheduler: str | None,
    output: str | None,
    plot: str | None,
    kinds: tuple[str, ...],
) -> None:
    """Print what a cascade costs over sizes, machines and mappings: a row for every combination, as CSV.

    \b
    Examples:
      cascadec sweep examples/softmax.cascade --machine tpu-v4-like --machine fusemax -s M=64 -s N=1024,4096,16384
      cascadec sweep examples/softmax.cascade --machine fusemax -s M=1,2,4 -s N=512 --plot front.png --figure pareto
    """
    sweeper = importlib.import_module("cascade.backends.systolic.sweep")
    listed = dict(sizes)
    first = {name: values[0] for name, values in listed.items()}
    cascade = load_typed(Options(file, first, DType(dtype) if dtype else None, as_json))
    given = mappings or sweeper.scheduled(cascade) is not None
    final = pipeline.run_pipeline(cascade, Canonicalize.name if given else None).final
    points = sweeper.points(machines, mappings, listed, search == "pareto")
    rows = sweeper.sweep(final, points, jobs, scheduler)
    if output is not None and output.endswith(".parquet"):
        write_whole(Path(output), sweeper.parquet_bytes(rows))
    elif output is not None:
        write_whole(Path(output), sweeper.csv_text(rows))
    if plot is not None:
        write_figures(plot, cascade.name, rows, list(listed), kinds or FIGURES)
    shown = {"cascade": cascade.name, "output": output, "plot": plot, "rows": rows}
    if (output is None and plot is None) or as_json:
        emit(shown, lambda: click.echo(sweeper.csv_text(rows), nl=False), as_json)


def write_figures(path: str, title: str, rows: list[Any], symbols: list[str], kinds: tuple[str, ...]) -> None:
    """The figures of a sweep, as what the name of the file ends in."""
    plotter = importlib.import_module("cascade.backends.systolic.plot")
    form = Path(path).suffix.removeprefix(".")
    drawer = importlib.import_module("cascade.backends.systolic.picture")
    if form in drawer.FORMATS:
        fixed = plotter.fixed_sizes(rows, symbols)
        found = plotter.figures(rows, symbols, kinds)
        write_whole(Path(path), drawer.picture(f"{title}: {fixed}" if fixed else title, found, form))
    else:
        write_whole(Path(path), plotter.page(title, rows, symbols, kinds))


def cost_of_kernels(options: Options, machine: Any) -> None:
    """What the planner's own model says of the kernels of the program on a GPU."""
    forecaster = importlib.import_module("cascade.backends.triton.forecast")
    trial = importlib.import_module("cascade.trial")  # lazily: it needs torch
    cascade = load(options)
    types = trial.param_types(cascade, options.dtype or DType.BF16)
    kernels, outside = forecaster.forecast(pipeline.run_pipeline(cascade).final, options.sizes, types, machine)
    payload = {
        "cascade": cascade.name,
        "sizes": options.sizes,
        **forecaster.forecast_json(kernels, outside, machine),
    }
    emit(payload, lambda: show_forecast(payload), options.json)


def show_forecast(payload: dict[str, Any]) -> None:
    """The time and the traffic, and a row for every kernel."""
    click.echo(f"{payload['machine']}: {payload['latency_s'] * 1e6:.1f} us, {payload['traffic_bytes']:.4g} bytes moved")
    for phase in payload["phases"]:
        click.echo(f"{phase['kernel']}: {phase['text']}")
    if payload["outside"]:
        click.echo(f"in no kernel, and not predicted: {', '.join(payload['outside'])}")


def load_typed(options: Options) -> Cascade:
    """The cascade that the command line names, untyped parameters with the type it states."""
    return specialise(load(options), {}, options.dtype)


def show_forms(closed: dict[str, Any]) -> None:
    """The closed forms: of every Einsum, and of what every region moves and holds."""
    table(
        ("einsum", "unit", "cycles"), [(name, one["unit"], one["cycles"]) for name, one in closed["per_einsum"].items()]
    )
    for region in closed["regions"]:
        click.echo(f"{region['name']}: {region['cycles']} cycles; {region['on_chip_bytes']} bytes on chip")
        table(("moved", "bytes"), list(region["moved"].items()))


def show_cost(lines: list[str], rows: list[tuple[str, ...]]) -> None:
    """The summary, and a row for every Einsum."""
    click.echo("\n".join(lines))
    table(("einsum", "unit", "points", "cycles", "of the time"), rows)


def list_passes(as_json: bool) -> None:
    """The passes of the compiler, a row for each."""
    rows = [
        {
            "name": cls.name,
            "options": [option.name for option in dataclasses.fields(cls)],
            "requires": [invariant.name for invariant in cls.requires],
            "ensures": [invariant.name for invariant in cls.ensures],
            "in_pipeline": cls.name in (step.name for step in pipeline.PIPELINE),
            "summary": (cls.__doc__ or "").split("\n")[0],
        }
        for cls in PASSES.values()
    ]
    emit({"passes": rows}, lambda: show_passes(rows), as_json)


def show_passes(rows: list[dict[str, Any]]) -> None:
    """A row for every pass."""
    columns = ("name", "options", "requires", "ensures", "summary")
    cells = [tuple(", ".join(v) if isinstance(v := row[c], list) else v for c in columns) for row in rows]
    table(("pass", *columns[1:]), cells)


for command in (doctor_command, cache_group, completion_command):
    commands.add_command(command)


# --- errors ----------------------------------------------------------------------------------------------------------


def complain(error: CascadeError, as_json: bool) -> None:
    """The diagnostics of an error: text on standard error, or JSON on standard output."""
    if settings_debug() >= 4:
        traceback.print_exception(error)
    if as_json:
        click.echo(json.dumps({"errors": [diagnostic_json(d) for d in error.diagnostics]}, indent=2))
        return
    error_text(str(error))


def settings_debug() -> int:
    """The debug level; 0 where the environment cannot be read, which is reported elsewhere."""
    with contextlib.suppress(CommandError):
        return settings().debug
    return 0


def diagnostic_json(diagnostic: Diagnostic) -> dict[str, Any]:
    """One finding with stable keys."""
    notes = [{"message": note.message, **place_json(note.span)} for note in diagnostic.notes]
    found = {"code": diagnostic.code, "message": diagnostic.message, **place_json(diagnostic.span)}
    return {**found, "help": diagnostic.help, "notes": notes}


def place_json(span: Span | None) -> dict[str, Any]:
    """Where a finding is; null where it has no place."""
    if span is None:
        return dict.fromkeys(("file", "line", "column", "end_line", "end_column"))
    ends = {"end_line": span.end_line, "end_column": span.end_column}
    return {"file": span.source.name, "line": span.line, "column": span.column, **ends}


def complain_about_usage(error: click.ClickException, as_json: bool) -> int:
    """A command line that click cannot read; click itself names the nearest option or command."""
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return COMMAND_WRONG
    context = error.ctx if isinstance(error, click.UsageError) else None
    command = context.command_path if context else "cascadec"
    complain(CommandError(Diagnostic("C604", error.format_message(), help=f"see {command} --help")), as_json)
    return COMMAND_WRONG


def complain_about_bug(error: Exception, arguments: list[str], as_json: bool) -> int:
    """A bug of ours: what happened, and a file with the command that shows it again."""
    message = str(error)
    if settings_debug() >= 4:
        traceback.print_exception(error)
    if not isinstance(error, InternalError):
        what = f"{type(error).__name__}: {error}"
        trace = "".join(traceback.format_exception(error))
        file, text = reported_program(arguments)
        command = shlex.join(["cascadec", *("{path}" if arg == file else arg for arg in arguments)])
        command = command.replace("'{path}'", "{path}")
        message = f"internal error: {what}\n{pipeline.reproducer(trace.rstrip(), command, text)}"
    if as_json:
        click.echo(json.dumps({"errors": [{"code": None, "message": message}]}, indent=2))
    click.echo(message, err=True)
    return BUG


def reported_program(arguments: list[str]) -> tuple[str | None, str]:
    """The argument that names the program, and the program's text; a Python program is left where it is."""
    for argument in arguments:
        path, _ = split_name(argument)
        if path in STANDARD_INPUT:
            return argument, standard_input().decode("utf-8", "replace")
        if path.endswith(".cascade") and Path(path).is_file():
            return argument, Path(path).read_text("utf-8", "replace")
    return None, ""


def output_error(where: str, error: OSError) -> CommandError:
    """The error for output that cannot be written."""
    return CommandError(Diagnostic("C612", f"cannot write {where}: {error.strerror}"))


if __name__ == "__main__":
    main()
