"""The words of a command line as types: each is converted, refused with the reason, and completed by the shell.

    -s B=4          SizeType, by the shape symbols of the cascade that stands before
    --machine h2    MachineType, by the machines that there are
    examples/at     ProgramType, by the programs in the folder

What completes reads names and program text; it runs no program, and finds nothing where it cannot read.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeAlias

import click
from click.shell_completion import CompletionItem, get_completion_class

from cascade.arguments import shape_symbols
from cascade.compiled import from_text, read_program, split_name
from cascade.errors import CascadeError
from cascade.ir import DType
from cascade.modelled import families
from cascade.passes import PASSES
from cascade.pipeline import PIPELINE
from cascade.settings import COMPLETION

SHELLS = ("bash", "zsh", "fish")
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
MAX_SIZE = 2**63 - 1

INSTALL = {
    "bash": "echo 'eval \"$(cascadec completion bash)\"' >> ~/.bashrc",
    "zsh": "echo 'eval \"$(cascadec completion zsh)\"' >> ~/.zshrc",
    "fish": "cascadec completion fish > ~/.config/fish/completions/cascadec.fish",
}
"""What a user types once for each shell; the next shell that is started completes."""


DONE, PROGRAM_WRONG, COMMAND_WRONG, BUG, INTERRUPTED = 0, 1, 2, 70, 130
"""The exit codes of a command: see `cli.py`."""


def items(words: Iterable[str], incomplete: str) -> list[CompletionItem]:
    """The words that begin as what was typed does."""
    return [CompletionItem(word) for word in words if word.startswith(incomplete)]


def script(commands: click.Command, shell: str) -> str:
    """What a shell reads to complete `cascadec`, with the command that installs it as its first line."""
    made = get_completion_class(shell)
    assert made is not None  # click has all of SHELLS
    source = made(commands, {}, "cascadec", COMPLETION).source()
    return f"# to install: {INSTALL[shell]}\n{source.strip()}\n"


class ProgramType(click.ParamType[str]):
    """A program's file, or what else `suffixes` name; folders lead to them."""

    name = "FILE"

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes or (".cascade", ".py")

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The files of these kinds that begin so; the shell itself completes folders."""
        folder, _, begun = incomplete.rpartition("/")
        above = f"{folder}/" if "/" in incomplete else ""
        found: list[CompletionItem] = []
        with contextlib.suppress(OSError):
            entries = sorted(Path(above or ".").expanduser().iterdir())
            here = [one for one in entries if one.name.startswith(begun) and (begun or not one.name.startswith("."))]
            if any(one.is_dir() for one in here):
                found.append(CompletionItem(incomplete, type="dir"))
            found += [CompletionItem(f"{above}{one.name}") for one in here if one.suffix in self.suffixes]
        return found


class PassType(click.ParamType[str]):
    """The name of a pass, which whoever takes it looks up."""

    name = "PASS"

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The passes of the pipeline, then the others."""
        return items(dict.fromkeys((*(step.name for step in PIPELINE), *PASSES)), incomplete)


class MachineType(click.ParamType[str]):
    """The name of a machine, of the families that the command models: `gpu`, `several`, `spatial`."""

    name = "NAME"

    def __init__(self, *families: str) -> None:
        self.families = families

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The machines of these families."""
        return items((name for family in self.families for name in families()[family]), incomplete)


class DurationType(click.ParamType[float]):
    """`7d`, a stretch of time in seconds, minutes, hours, days or weeks."""

    name = "DURATION"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d{1,9})([smhdw])", value, re.ASCII)
        if match is None:
            self.fail(f"{value!r} is no stretch of time, such as 30m, 12h or 7d", param, ctx)
        return float(int(match[1]) * SECONDS[match[2]])


class SizeType(click.ParamType[tuple[str, int]]):
    """`NAME=NUMBER`, the size of a shape symbol."""

    name = "NAME=NUMBER"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"([A-Za-z_]\w*)=(-?\d{1,30})", value, re.ASCII)
        if match is None:
            self.fail(f"{value!r} is not NAME=NUMBER, such as B=4", param, ctx)
        number = int(match.group(2))
        if not 0 <= number <= MAX_SIZE:
            self.fail(f"{number} is not from 0 to {MAX_SIZE}", param, ctx)
        return match.group(1), number

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        """The shape symbols of the program that stands before; a Python program is not run for this."""
        stated = [str(word) for word in (ctx.params.get("file"), *ctx.args) if word]  # args: where -s has no value yet
        path, name = split_name(stated[0] if stated else "")
        with contextlib.suppress(CascadeError):
            if path.endswith(".cascade") and "=" not in incomplete:
                symbols = shape_symbols(from_text(read_program(path), path, name).cascade)
                return [CompletionItem(f"{symbol}=") for symbol in symbols if symbol.startswith(incomplete)]
        return []


class MemoryType(click.ParamType[tuple[str, str]]):
    """`RESULT=PARAM`, a result that takes the memory of a parameter."""

    name = "RESULT=PARAM"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        result, equals, of = value.partition("=")
        if not (result and equals and of):
            self.fail(f"{value!r} is not RESULT=PARAM, such as K_new=K", param, ctx)
        return result, of


class LevelsType(click.ParamType[tuple[str, tuple[str, ...]]]):
    """`NAME=RANK,RANK`, the levels of a partitioned rank, outermost first."""

    name = "NAME=RANK,RANK"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[str, ...]]:
        if isinstance(value, tuple):
            return value
        name, _, listed = value.partition("=")
        levels = tuple(listed.split(","))
        if not all(re.fullmatch(r"[A-Za-z_]\w*", word, re.ASCII) for word in (name, *levels)):
            self.fail(f"{value!r} is not NAME=RANK,RANK, such as n=n1,n0", param, ctx)
        if len(set(levels)) != len(levels) or len(levels) < 2:
            self.fail(f"{value!r} does not name two or more different levels, such as n=n1,n0", param, ctx)
        return name, levels


class SizesType(click.ParamType[tuple[str, tuple[int, ...]]]):
    """`NAME=NUMBER,NUMBER`, sizes of a shape symbol."""

    name = "NAME=NUMBER,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, tuple):
            return value
        name, _, listed = value.partition("=")
        one = SizeType()
        return name, tuple(one.convert(f"{name}={number}", param, ctx)[1] for number in listed.split(","))


# --- options that several commands take ------------------------------------------------------------------------------

Decorator: TypeAlias = Callable[[Callable[..., None]], Callable[..., None]]
SIZES: Decorator = click.option(
    "-s", "--size", "sizes", type=SizeType(), multiple=True, help="The size of a shape symbol, B=4."
)
DTYPE: Decorator = click.option(
    "--dtype", type=click.Choice([d.value for d in DType]), help="The type of untyped parameters."
)
JSON: Decorator = click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
MACHINE: Decorator = click.option(
    "--machine", "name", metavar="NAME|FILE", type=MachineType("gpu", "several", "spatial"),
    help="A GPU, a machine of several devices, or a modelled spatial machine; none needs to be there.",
)  # fmt: skip
IN_PLACE: Decorator = click.option(
    "--in-place", "in_place", type=MemoryType(), multiple=True,
    help="On a GPU: a result that takes the memory of a parameter, K_new=K; as often as there are such.",
)  # fmt: skip
STATIC: Decorator = click.option(
    "--static", is_flag=True, help="Compile the kernels, and tell what machine code shows."
)
