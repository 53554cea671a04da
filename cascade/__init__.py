"""cascade: a compiler for cascades of extended Einsums.

The names below are loaded when they are first used: `import cascade` loads neither torch nor Triton, so parsing,
printing and cost reports start at once on any machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what `__getattr__` loads, for type checkers and editors
    from cascade.compiled import Compiled, compile, parse
    from cascade.errors import (
        CallError, CascadeError, CommandError, InternalError, ParseError, TraceError, UnsupportedError, VerifyError,
    )  # fmt: skip
    from cascade.frontend.trace import (
        abs, all, any, argmax, argmin, cast, clamp, cos, count, default, erf, exp, exp2, floor, gelu, log, log2,
        logsumexp, max, mean, min, pow, prod, ranks, relu, round, rsqrt, scan, select, sigmoid, sign, silu, sin,
        softmax, sqrt, sum, tanh, topk, where,
    )  # fmt: skip

__all__ = [
    "compile", "parse", "Compiled",
    "ranks", "sum", "prod", "max", "min", "any", "all", "count", "mean", "argmax", "argmin", "logsumexp", "softmax",
    "topk", "scan", "where", "default", "select", "cast", "clamp", "pow", "exp", "exp2", "log", "log2", "sqrt", "rsqrt",
    "abs", "sign", "floor", "round", "sin", "cos", "tanh", "sigmoid", "silu", "gelu", "relu", "erf",
    "CascadeError", "ParseError", "VerifyError", "CallError", "TraceError", "UnsupportedError", "CommandError",
    "InternalError",
]  # fmt: skip

_ENTRIES = frozenset({"compile", "parse", "Compiled"})


def __getattr__(name: str) -> Any:
    if name.startswith("_"):
        raise AttributeError(f"module 'cascade' has no attribute {name!r}")
    if name not in __all__:
        if importlib.util.find_spec(f"cascade.{name}"):  # `from cascade import interp` asks here first
            raise AttributeError(f"module 'cascade.{name}' is not imported yet")
        return _from_library(name)
    home = "compiled" if name in _ENTRIES else "errors" if name.endswith("Error") else "frontend.trace"
    value = getattr(importlib.import_module(f"cascade.{home}"), name)
    globals()[name] = value
    return value


def _from_library(name: str) -> Any:
    """A definition of the library, for traced functions: `cs.rmsnorm[d](x, g)`, `cs.attention(Q, K, V)`."""
    trace = importlib.import_module("cascade.frontend.trace")
    try:
        return trace.library_callable(name)
    except KeyError:
        raise AttributeError(f"neither module 'cascade' nor its library has {name!r}") from None


def __dir__() -> list[str]:
    return sorted((*globals(), *__all__))
