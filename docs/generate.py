"""The pages that nobody writes: commands from the help of `cascadec`, the notebook, the gallery, the public names.

They are made when the site is built, so none can be out of date; `tests/test_site.py` holds them against other sources.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

import cascade
from cascade.cli import commands
from cascade.ops import FUNCTIONS, LIBRARY_REDUCTIONS, REDUCERS

HERE = Path(__file__).parent
NOTEBOOK = HERE / "tour.ipynb"
WIDTH = 100  # columns of the help


def write_all(folder: Path) -> None:
    """Writes every generated page."""
    folder.mkdir(exist_ok=True)
    for name, make in PAGES.items():
        (folder / f"{name}.md").write_text(make(), encoding="utf-8")
    importlib.import_module("benchmarks.gallery").write(folder / "gallery")  # lazily: it needs torch and takes a while


# --- commands --------------------------------------------------------------------------------------------------------


def every_command(group: click.Group = commands, name: str = "cascadec") -> Iterator[tuple[str, click.Command]]:
    """Each command by its whole name, groups of commands opened."""
    for word, command in sorted(group.commands.items()):
        yield f"{name} {word}", command
        if isinstance(command, click.Group):
            yield from every_command(command, f"{name} {word}")


def help_of(name: str) -> str:
    """What `--help` prints of a command with this name, `cascadec show`."""
    context = click.Context(commands, info_name="cascadec", terminal_width=WIDTH, **commands.context_settings)
    for word in name.split()[1:]:
        group = context.command
        assert isinstance(group, click.Group)
        context = click.Context(group.commands[word], parent=context, info_name=word)
    return context.get_help()


def commands_page() -> str:
    """The help of the command and of all its commands."""
    parts = [
        "# Commands",
        "The help of `cascadec`, as it prints it. Exit codes: 0 done; 1 the program or its data is wrong; 2 the "
        "command line, a file or the environment is wrong; 70 a bug in cascade, with a file that shows it again; "
        "130 interrupted.",
        f"```text\n{help_of('cascadec')}\n```",
    ]
    for name, _ in every_command():
        parts += [f"## {name}", f"```text\n{help_of(name)}\n```"]
    return "\n\n".join(parts) + "\n"


# --- public names ----------------------------------------------------------------------------------------------------

OPERATIONS = frozenset(FUNCTIONS) - frozenset(REDUCERS)
REDUCING = (*REDUCERS, *LIBRARY_REDUCTIONS)
LIBRARY = Path(cascade.__file__).parent / "frontend" / "library.cascade"


def api_page() -> str:
    """Every public name with its docstring; operations and reducers, which share theirs, stand together."""
    shown = [name for name in cascade.__all__ if name not in OPERATIONS and name not in REDUCING]
    classes = [name for name in shown if inspect.isclass(getattr(cascade, name)) and not name.endswith("Error")]
    errors = [name for name in shown if name.endswith("Error")]
    others = [name for name in shown if name not in (*classes, *errors)]
    parts = [
        "# Public names",
        "What `import cascade as cs` has. Docstrings are those of the source.",
        "## Compiling and tracing",
        *(documented(name) for name in others),
        "## What is compiled",
        *(directive("class", name, "members:") for name in classes),
        "## Reducers",
        inspect.getdoc(cascade.sum) or "",
        "\n".join(f"* `cs.{name}[n](x)`" for name in cascade.__all__ if name in REDUCING),
        "## Operations, element by element",
        "On what a traced function computes with, as the operation of that name in the language.",
        "\n".join(f"* `{operation(name)}`" for name in cascade.__all__ if name in FUNCTIONS),
        "## The library",
        "Each definition is a function in Python as well: `cs.rmsnorm[d](x, g)`, `cs.attention(Q, K, V)`.",
        f"```cascade\n{LIBRARY.read_text(encoding='utf-8').rstrip()}\n```",
        "## Several devices",
        directive("function", "distributed.load"),
        directive("class", "distributed.Loaded", "members:"),
        "## Errors",
        *(directive("class", name, "show-inheritance:") for name in errors),
    ]
    return "\n\n".join(parts) + "\n"


def operation(name: str) -> str:
    """An operation with its operands."""
    return f"cs.{name}({', '.join('abc'[: FUNCTIONS[name].arity])})"


def documented(name: str) -> str:
    """A function, or an object that is called with ranks in brackets."""
    function = inspect.isfunction(getattr(cascade, name))
    return directive("function", name) if function else directive("data", name, "no-value:")


def directive(kind: str, name: str, *options: str) -> str:
    """A directive of autodoc."""
    body = "\n".join([f".. auto{kind}:: cascade.{name}", *(f"   :{option}" for option in options)])
    return f"```{{eval-rst}}\n{body}\n```"


# --- the notebook ----------------------------------------------------------------------------------------------------


def notebook_page() -> str:
    """The notebook with what its cells printed; `tests/test_site.py` runs them."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join(part for cell in cells for part in cell_parts(cell)) + "\n"


def cell_parts(cell: dict[str, Any]) -> Iterator[str]:
    """A cell as Markdown."""
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    yield f"```python\n{source}\n```"
    printed = "".join(text for output in cell["outputs"] for text in output.get("text", ()))
    if printed:
        yield f"```text\n{printed.rstrip()}\n```"


PAGES: dict[str, Callable[[], str]] = {"commands": commands_page, "api": api_page, "tour": notebook_page}
"""Generated pages by their names."""
