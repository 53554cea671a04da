"""What a pass is, and how it is spelled on a command line.

A pass is a frozen dataclass: its fields are its options, and calling it maps a cascade to a cascade. It names the
invariants that it needs and those that it establishes; the driver in `pipeline.py` checks both. A pass that finds
nothing to do returns the same object, so `after is before` means unchanged.

The spelling follows from the class: `Fuse(over="m", tiles=(4, 8))` is `fuse{over=m tiles=4,8}`; options that have
their default are left out. `parse_pass` reads it back.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from cascade.errors import CommandError, Diagnostic, quoted_list
from cascade.ir import Cascade
from cascade.verify import Invariant


class Pass(Protocol):
    """A step of the pipeline. One name in six places: file, class, spelling, case folder, log label, heading."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    name: ClassVar[str]
    requires: ClassVar[tuple[Invariant, ...]]
    ensures: ClassVar[tuple[Invariant, ...]]

    def __call__(self, cascade: Cascade, /) -> Cascade:
        """The cascade after the pass; the same object where there was nothing to do."""
        ...


PassTable = Mapping[str, type[Pass]]
"""Pass classes by name, as `passes.PASSES`."""


def pass_name(cls: type) -> str:
    """The name that belongs to a pass class: `SplitTokens` is `split-tokens`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()


def spelling(step: Pass) -> str:
    """The pass as a command line writes it, options at their default left out."""
    options = [
        f"{option.name}={value_text(getattr(step, option.name))}"
        for option in dataclasses.fields(step)
        if getattr(step, option.name) != option.default
    ]
    return step.name + ("{" + " ".join(options) + "}" if options else "")


def value_text(value: object) -> str:
    """An option's value as text: lists by commas, truth values in lower case."""
    if isinstance(value, tuple):
        return ",".join(value_text(item) for item in value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def parse_pass(text: str, known: PassTable) -> Pass:
    """The pass that `text` spells, such as `fuse{over=m}`."""
    match = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:\{([^{}]*)\})?\s*", text)
    if match is None:
        raise misspelt(f"{text!r} does not spell a pass", "write its name, or name{option=value option=value}")
    name, options = match.group(1), match.group(2) or ""
    if name not in known:
        raise unknown_pass(name, known)
    cls = known[name]
    hints = typing.get_type_hints(cls)
    fields = {option.name: hints[option.name] for option in dataclasses.fields(cls)}
    values = dict(parse_option(word, name, fields) for word in options.split())
    try:
        return cls(**values)
    except TypeError:  # an option without a default was not given
        raise misspelt(f"pass {name!r} lacks an option", f"its options are {quoted_list(fields)}") from None


def parse_option(word: str, name: str, fields: Mapping[str, Any]) -> tuple[str, Any]:
    """The name and value that one `option=value` of pass `name` gives."""
    option, equals, text = word.partition("=")
    if option not in fields:
        close = difflib.get_close_matches(option, fields, n=1)
        listed = f"its options are {quoted_list(fields)}" if fields else "it has no options"
        raise misspelt(f"pass {name!r} has no option {option!r}", f"did you mean {close[0]!r}?" if close else listed)
    try:
        if not equals:
            raise ValueError
        return option, parse_value(text, fields[option])
    except ValueError:
        wanted = getattr(fields[option], "__name__", str(fields[option]))
        raise misspelt(f"option {option!r} of pass {name!r} is {text!r}", f"write {option}=<{wanted}>") from None


def parse_value(text: str, hint: Any) -> Any:
    """The value of type `hint` that the text writes; ValueError where it writes none."""
    if typing.get_origin(hint) is tuple:
        return tuple(parse_value(item, typing.get_args(hint)[0]) for item in text.split(",") if item)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):  # `int | None`: None is the default, never written
        return parse_value(text, next(arg for arg in typing.get_args(hint) if arg is not types.NoneType))
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError
        return text == "true"
    return hint(text)


def unknown_pass(name: str, known: PassTable | typing.Iterable[str]) -> CommandError:
    """The error for a name that no pass has."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    help_line = f"did you mean {close[0]!r}?" if close else f"the passes are {quoted_list(names, 20)}"
    return CommandError(Diagnostic("C602", f"there is no pass {name!r}", help=help_line))


def misspelt(message: str, help_line: str) -> CommandError:
    """The error for a pass whose options are written wrongly."""
    return CommandError(Diagnostic("C603", message, help=help_line))
