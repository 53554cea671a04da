"""The commands about the installation itself: `doctor`, `cache`, `completion`.

They need no program. What they tell is found by `doctor.py` and `entries.py`; here arguments become one call.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from cascade import doctor, entries, views
from cascade.parameters import INSTALL, JSON, PROGRAM_WRONG, SHELLS, Decorator, DurationType, script
from cascade.settings import settings
from cascade.terminal import emit


@click.command("doctor")
@click.option("--quick", is_flag=True, help="Import and compile nothing: versions, settings and the cache only.")
@JSON
def doctor_command(quick: bool, as_json: bool) -> None:
    """Look at the installation: versions, devices, the compiler, the cache, settings; and the commands that mend it.

    The exit code is 0 where cascade can work, and 1 where something that it needs is broken.

    \b
    Examples:
      cascadec doctor
      cascadec doctor --quick --json
    """
    found: list[doctor.Check] = []
    for check in doctor.checks(quick):
        found.append(check)
        if not as_json:
            views.check(check)
    emit(doctor.report_json(found), lambda: click.echo(doctor.advice(found)), as_json)
    if not doctor.healthy(found):
        raise click.exceptions.Exit(PROGRAM_WRONG)


@click.group("cache")
def cache_group() -> None:
    """Look after the cache folder: what lifting decided, tiles that were timed, programs that show bugs.

    Other processes may use it meanwhile. What cascade did not write is left alone.

    \b
    Examples:
      cascadec cache size
      cascadec cache clear --older-than 30d --yes
    """


KIND: Decorator = click.option(
    "--kind", "kinds", type=click.Choice(tuple(entries.KINDS)), multiple=True, help="Entries of this kind only."
)
OLDER: Decorator = click.option(
    "--older-than", "age", metavar="DURATION", type=DurationType(), default=0.0, help="Only those so old: 30m, 12h, 7d."
)


@cache_group.command("list")
@KIND
@OLDER
@JSON
def cache_list(kinds: tuple[str, ...], age: float, as_json: bool) -> None:
    """Print every entry: its kind, size and age.

    \b
    Examples:
      cascadec cache list
      cascadec cache list --kind lifts --older-than 7d --json
    """
    tell_entries(entries.listed(kinds, age), {}, as_json)


def tell_entries(found: tuple[entries.Entry, ...], damaged: dict[Path, str], as_json: bool) -> None:
    """Entries of the cache, with what is wrong with them."""
    now = time.time()
    rows = [{**entries.entry_json(entry, now), "damage": damaged.get(entry.path)} for entry in found]
    folder = str(settings().cache_dir)
    emit({"folder": folder, "entries": rows}, lambda: views.entries(rows, folder), as_json)


@cache_group.command("size")
@JSON
def cache_size(as_json: bool) -> None:
    """Print how many entries of each kind there are, and how large they are.

    \b
    Examples:
      cascadec cache size
      cascadec cache size --json
    """
    found = entries.sizes_json()
    emit(found, lambda: views.sizes(found), as_json)


@cache_group.command("verify")
@KIND
@JSON
def cache_verify(kinds: tuple[str, ...], as_json: bool) -> None:
    """Check every entry as its reader does, by its hash; the exit code is 1 where one does not hold.

    A damaged entry is never used: what it held is decided anew. `cache clear --damaged` removes it.

    \b
    Examples:
      cascadec cache verify
      cascadec cache verify --kind tuned --json
    """
    found = entries.listed(kinds)
    damaged = {entry.path: why for entry in found if (why := entries.damage(entry)) is not None}
    if as_json or damaged:
        tell_entries(tuple(entry for entry in found if entry.path in damaged), damaged, as_json)
    if damaged:
        if not as_json:
            click.echo("to remove them: cascadec cache clear --damaged --yes", err=True)
        raise click.exceptions.Exit(PROGRAM_WRONG)
    if not as_json:
        click.echo(f"{views.counted(len(found), 'entry', 'entries')} in {settings().cache_dir}: all hold")


@cache_group.command("clear")
@KIND
@OLDER
@click.option("--damaged", is_flag=True, help="Only those that do not hold, see verify.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@JSON
def cache_clear(kinds: tuple[str, ...], age: float, damaged: bool, yes: bool, as_json: bool) -> None:
    """Remove entries, after asking on a terminal; what is needed again is decided anew.

    \b
    Examples:
      cascadec cache clear --kind tuned --yes
      cascadec cache clear --older-than 30d --damaged --yes --json
    """
    found = [entry for entry in entries.listed(kinds, age) if not damaged or entries.damage(entry) is not None]
    what = f"{views.counted(len(found), 'entry', 'entries')} of {settings().cache_dir}"
    if found and not yes:
        if as_json or not sys.stdin.isatty():
            raise click.UsageError(f"this would remove {what}: give --yes", click.get_current_context())
        found = found if agreed(f"Remove {what}?") else []
    gone, left = entries.removed(found)
    paths = {"removed": [str(entry.path) for entry in gone], "left": [str(entry.path) for entry in left]}
    payload = {"folder": str(settings().cache_dir), "bytes": sum(entry.size for entry in gone), **paths}
    emit(payload, lambda: click.echo(views.cleared(payload)), as_json)


def agreed(question: str) -> bool:
    """Whether who sits at the terminal says yes; the end of input is a no."""
    try:
        return click.confirm(question, err=True)
    except click.exceptions.Abort:
        return False


@click.command("completion")
@click.argument("shell", type=click.Choice(SHELLS))
@JSON
def completion_command(shell: str, as_json: bool) -> None:
    """Print what a shell needs to complete commands, options, files, machines and passes; its first line installs it.

    \b
    Examples:
      cascadec completion bash
      cascadec completion fish --json
    """
    text = script(click.get_current_context().find_root().command, shell)
    payload = {"shell": shell, "install": INSTALL[shell], "script": text}
    emit(payload, lambda: click.echo(text, nl=False), as_json)
