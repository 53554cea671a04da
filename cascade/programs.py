"""The program that a command is about: a `.cascade` file, a `.py` file, standard input; a cascade of it by name.

    find("layer.cascade:mlp")       the cascade of that name, verified
    sized(cascade, {"T": 8})        refuses a size for a symbol that it does not have

Program text is data and is never run. A `.py` file is the user's own program, and is.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path

from cascade.arguments import shape_symbols
from cascade.compiled import Compiled, from_text, read_program, split_name
from cascade.errors import CommandError, CascadeError, Diagnostic, Source, Span, quoted_list
from cascade.frontend.tokens import decode
from cascade.ir import Cascade
from cascade.wording import closest

STANDARD_INPUT = ("-", "/dev/stdin")


def sized(cascade: Cascade, sizes: Iterable[str]) -> Cascade:
    """The cascade, where every size is that of one of its shape symbols; C613 with the closest name where it is not."""
    known = shape_symbols(cascade)
    for name in sizes:
        if name not in known:
            close = closest(name, known)
            symbols = f"its shape symbols are {quoted_list(known, 20)}" if known else "it has no shape symbols"
            hint = f"did you mean {close!r}?" if close else symbols
            raise CommandError(Diagnostic("C613", f"{cascade.name!r} has no shape symbol {name!r}", help=hint))
    return cascade


def find(file: str) -> Compiled:
    """What `FILE`, `FILE:name` or `-` names; a `.py` file is the user's own program and is run, text never is."""
    path, name = split_name(file)
    if path in STANDARD_INPUT:
        return from_text(decode(standard_input(), "<stdin>"), "<stdin>", name)
    if path.endswith(".py"):
        return from_python(Path(path), name)
    return from_text(read_program(path), path, name)


@functools.cache
def standard_input() -> bytes:
    """Everything on standard input, kept so that a bug report can hold it."""
    return sys.stdin.buffer.read()


def from_python(path: Path, name: str | None) -> Compiled:
    """The compiled function that a Python program defines: the last one, or the one of that name."""
    read_program(str(path))  # a file that cannot be read is reported like any other
    spec = importlib.util.spec_from_file_location(f"_cascadec_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise CommandError(Diagnostic("C610", f"cannot read {path}: not a Python program"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what it prints is not our output
            spec.loader.exec_module(module)
    except CascadeError:
        raise
    except (Exception, SystemExit) as error:
        raise program_failed(path, error) from error
    found = {key: value for key, value in vars(module).items() if isinstance(value, Compiled)}
    if name is None and found:
        return list(found.values())[-1]
    if name in found:
        return found[name]
    what = f"defines no cascade {name!r}" if name else "defines no compiled cascade"
    hint = f"it defines {quoted_list(found)}" if found else "decorate a function with @cascade.compile"
    raise CommandError(Diagnostic("C615", f"{path} {what}", help=hint))


def program_failed(path: Path, error: BaseException) -> CommandError:
    """The error for a Python program that raises while it is loaded, at the line of the program."""
    if isinstance(error, SyntaxError):
        line, column = error.lineno or 1, error.offset or 1
    else:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line, column = (frames[-1].lineno or 1, (frames[-1].colno or 0) + 1) if frames else (1, 1)
    span = Span(Source(str(path)), line, column, line, column + 1)
    return CommandError(Diagnostic("C611", f"the program raised {type(error).__name__}: {error}", span))
