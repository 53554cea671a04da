"""Set-up for every test: all checks on, deterministic searches, one thread a worker, and a count of the skips."""

from __future__ import annotations

import importlib
import inspect
import os
import tempfile
import types
from collections.abc import Iterator

os.environ["CASCADE_CHECK"] = "2"  # before anything of cascade is imported: it is read once
os.environ["CASCADE_CACHE_DIR"] = tempfile.mkdtemp(prefix="cascade-test-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU, slowly


def remember_builtins(interpreter: types.ModuleType, core: types.ModuleType) -> None:
    """Has Triton's interpreter look for the builtins of its language once, not at every launch of a kernel.

    That is a fifth of the time of a small kernel. What it puts in their place it takes back after each launch.
    """
    found: dict[object, list[tuple[str, object]]] = {}

    def patch(package: object, builder: object, scope: object) -> None:
        if package not in found:
            found[package] = [pair for pair in inspect.getmembers(package) if core.is_builtin(pair[1])]
        for name, member in found[package]:
            interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    remember_builtins(*map(importlib.import_module, ("triton.runtime.interpreter", "triton.language.core")))

hypothesis.settings.register_profile("cascade", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("cascade")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` rewrites the expected text of case files, after executing it."""
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected text of the case files")


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether case files are to be rewritten."""
    return bool(request.config.getoption("--update-golden"))


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """A closing word about the skips, so that none goes unnoticed; a missing device is the only good reason for one."""
    yield
    terminalreporter.write_line(f"{len(terminalreporter.stats.get('skipped', []))} skipped")
