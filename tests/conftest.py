"""Set-up for every test: all checks on, searches and numbers deterministic, one thread a worker, the skips counted."""

from __future__ import annotations

import os
import tempfile
import zlib
from collections.abc import Iterator

os.environ["CASCADE_CHECK"] = "2"  # before anything of cascade is imported: it is read once
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share the folder that this run began with
    os.environ["CASCADE_CACHE_DIR"] = tempfile.mkdtemp(prefix="cascade-test-")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the workers are the parallelism
# Triton's interpreter computes with numpy, whose exponentials in f32 are 3.5 units off where it has AVX-512, 1 elsewhere
os.environ.setdefault("NPY_DISABLE_CPU_FEATURES", "X86_V4 AVX512_ICL AVX512_SPR")

import hypothesis
import pytest
import torch

from tests import interpreting

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton: kernels run on the CPU, slowly


if os.environ.get("TRITON_INTERPRET") == "1":
    interpreting.hasten()

hypothesis.settings.register_profile("cascade", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("cascade")


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--update-golden` rewrites the expected text of case files, after executing it."""
    parser.addoption("--update-golden", action="store_true", help="rewrite the expected text of the case files")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Campaigns first: a worker that takes a long test last leaves the others idle."""
    items.sort(key=lambda item: item.get_closest_marker("campaign") is None)


@pytest.fixture(autouse=True)
def _seeded(request: pytest.FixtureRequest) -> None:
    """The same numbers each time, whichever worker runs a test and whatever it ran before."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    """Whether case files are to be rewritten."""
    return bool(request.config.getoption("--update-golden"))


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """A closing word about the skips, so that none goes unnoticed; a missing device is the only good reason for one."""
    yield
    terminalreporter.write_line(f"{len(terminalreporter.stats.get('skipped', []))} skipped")
