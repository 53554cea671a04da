"""What holds of the project as a whole: `import cascade` is fast and light, the metadata agree with each other."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import cascade
from cascade.ops import FUNCTIONS
from tests.timing import within

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "triton", "numpy", "sympy", "networkx", "lark", "click", "rich")


def python(code: str) -> str:
    """What a fresh interpreter prints for this code."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout


def loaded(code: str) -> set[str]:
    """Which of the heavy packages this code loads."""
    text = python(f"{code}\nimport sys, json; print(json.dumps(sorted(set(sys.modules) & set({HEAVY}))))")
    return set(json.loads(text.splitlines()[-1]))


def test_import_loads_nothing_heavy() -> None:
    assert loaded("import cascade") == set()


def test_text_needs_no_torch() -> None:
    program = "cascade double(X[N]) -> Y[N] { Y[n] = 2 * X[n] }"
    assert loaded(f"import cascade; str(cascade.parse({program!r}).trace.final)") <= {"lark"}


def test_import_takes_less_than_0_3_s() -> None:
    code = "import time; t = time.perf_counter(); import cascade; print(time.perf_counter() - t)"
    assert within(min(float(python(code)) for _ in range(3)), 0.3)


@pytest.mark.parametrize("name", cascade.__all__)
def test_public_name_exists(name: str) -> None:
    assert getattr(cascade, name).__doc__, f"cascade.{name} has no docstring"


def test_every_function_of_the_language_is_public() -> None:
    assert set(FUNCTIONS) <= set(cascade.__all__)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_here"):
        _ = cascade.nothing_here


def project() -> dict[str, object]:
    """The `[project]` table of pyproject.toml."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def names(requirements: object) -> set[str]:
    """The distribution names of requirement strings, normalised."""
    assert isinstance(requirements, list)
    return {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_direct_dependency_is_pinned() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    extras = project()["optional-dependencies"]
    assert isinstance(extras, dict)
    wanted = names(project()["dependencies"]).union(*map(names, extras.values()))
    assert wanted <= names(lines)
    assert [line.lower() for line in lines] == sorted(line.lower() for line in lines)


def test_ci_runs_the_tests() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o100
    assert "make test" in script.read_text()


@pytest.mark.parametrize("target", ["demo", "test", "check", "docs", "clean"])
def test_makefile_has_the_target(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
