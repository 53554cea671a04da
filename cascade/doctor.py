"""Whether cascade can work here: versions, devices, the compiler of kernels, the cache, settings, and what mends them.

    for check in checks(): ...        each with its state and, where something is wrong, the exact command that mends it

The ranges are those that the project itself states. Nothing is imported here but what comes with Python: packages are
imported by child processes, so that one that is broken, absent or crashes is a finding. What takes no time comes first.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cascade.errors import CommandError
from cascade.settings import cache_folder, variables

DISTRIBUTION = "cascade-compiler"
OK, NOTE, WARNING, BROKEN = "ok", "note", "warning", "broken"
"""States: as it should be; something that is not there and need not be; something to look at; something needed."""
DEVELOPING = "test"
"""The extra of those who change cascade: nothing else needs it."""
PATIENCE_S = 120.0
HELD = "sys.path[:] = json.loads(sys.argv[1])\n"

IMPORTS = f"""
import importlib, json, sys
{HELD}
for name in sys.argv[2:]:
    print(json.dumps({{"begun": name}}), flush=True)
    try:
        importlib.import_module(name)
        failure = None
    except BaseException as error:
        failure = f"{{type(error).__name__}}: {{error}}".splitlines()[0][:300]
    print(json.dumps({{"name": name, "failure": failure}}), flush=True)
    if name == "torch" and failure is None:
        torch = sys.modules["torch"]
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        found = [torch.cuda.get_device_properties(number) for number in range(count)]
        listed = [[one.name, f"sm_{{one.major}}{{one.minor}}", one.total_memory] for one in found]
        print(json.dumps({{"cuda": torch.version.cuda, "devices": listed}}), flush=True)
"""
"""What a child process runs: each package is told before it is imported, so that a crash has a name; then the devices
that torch sees."""

KERNEL = """
import triton
import triton.language as tl


@triton.jit
def probe(X_ptr, N, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(X_ptr + n, tl.load(X_ptr + n, mask=n < N) * 2.0, mask=n < N)
"""
"""What is compiled to see whether kernels can be."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: what was looked at, its state, what was found, what is wanted, and the command that mends it."""

    section: str
    name: str
    state: str
    found: str
    wanted: str = ""
    says: str = ""
    mend: str | None = None

    @property
    def what(self) -> str:
        """What is wrong, without the rest."""
        return f"{self.section} {self.name}: {self.found}; {self.says}" if self.says else f"{self.section} {self.name}"

    @property
    def line(self) -> str:
        """All of it in a line, but for the command."""
        wanted = f"   ({self.wanted})" if self.wanted else ""
        says = f": {self.says}" if self.says and self.state != OK else ""
        return f"{self.state:8} {self.section} {self.name}: {self.found}{wanted}{says}"


@dataclass(frozen=True, slots=True)
class Package:
    """A distribution that the project asks for, in the words of its requirement; an extra where that alone needs it."""

    name: str
    requirement: str
    extra: str | None

    @property
    def module(self) -> str:
        """What is imported of it."""
        return self.name.replace("-", "_")

    @property
    def wanted(self) -> str:
        """The versions that are admitted: `>=2.11,<2.14`."""
        return self.requirement.removeprefix(self.name)


def healthy(found: Sequence[Check]) -> bool:
    """Whether nothing that is needed is broken."""
    return all(check.state != BROKEN for check in found)


def advice(found: Sequence[Check]) -> str:
    """For every finding that is not as it should be, the command that mends it; whether cascade can work."""
    wrong = [check for check in found if check.state in (WARNING, BROKEN) or (check.state == NOTE and check.mend)]
    lines = [line for check in wrong for line in (check.what, *([f"    {check.mend}"] if check.mend else ()))]
    broken = sum(check.state == BROKEN for check in wrong)
    verdict = f"what cascade needs is broken: {broken} of {len(found)}" if broken else "cascade can work here"
    return "\n".join([*([""] if lines else []), *lines, verdict])


def report_json(found: Sequence[Check]) -> dict[str, Any]:
    """All that was found, and what is to be mended, with stable keys."""
    problems = [
        {"what": check.what, "needed": check.state == BROKEN, "command": check.mend}
        for check in found
        if check.state in (WARNING, BROKEN)
    ]
    return {"ok": healthy(found), "checks": [asdict(check) for check in found], "problems": problems}


def checks(quick: bool = False) -> Iterator[Check]:
    """Everything, what is known at once first; `quick` imports and compiles nothing."""
    wanted, python = requirements()
    yield _python(python)
    yield from _settings()
    yield _cache()
    if quick:
        yield from (_package(package, None) for package in wanted)
        return
    with ThreadPoolExecutor(1) as pool:
        compiled = pool.submit(_compiler)
        failures, devices = importing([package.module for package in wanted if _version(package.name) is not None])
        yield from (_package(package, failures) for package in wanted)
        yield from _devices(wanted, devices)
        yield compiled.result()


# --- what the project asks for ---------------------------------------------------------------------------------------


def requirements() -> tuple[tuple[Package, ...], str]:
    """The packages that the project asks for, those of extras last, and the versions of Python."""
    project = _checkout()
    if project is not None:
        python = str(project["requires-python"])
        lines = [(line, None) for line in project["dependencies"]]
        extras: Mapping[str, list[str]] = project["optional-dependencies"]
        lines += [(line, extra) for extra, listed in extras.items() for line in listed]  # type: ignore[misc]
    else:
        told = importlib.metadata.metadata(DISTRIBUTION)
        python = str(told["Requires-Python"])
        lines = [_split_extra(line) for line in importlib.metadata.requires(DISTRIBUTION) or []]  # type: ignore[misc]
    found: dict[str, Package] = {}
    for line, extra in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        name = re.match(r"[\w.-]+", requirement)
        if name is None or extra == DEVELOPING or ("linux" in marker and sys.platform != "linux"):
            continue
        found.setdefault(name[0], Package(name[0], requirement.replace(" ", ""), extra))
    return tuple(found.values()), python


def _checkout() -> Mapping[str, Any] | None:
    """The `[project]` table of the checkout that cascade is run from; None where it is installed."""
    try:
        text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
        project: Mapping[str, Any] = tomllib.loads(text)["project"]
    except (OSError, ValueError, KeyError):
        return None
    return project if project.get("name") == DISTRIBUTION else None


def _split_extra(line: str) -> tuple[str, str | None]:
    """`ortools>=9.10; extra == "overlap"` as a requirement, and the extra that it belongs to."""
    match = re.search(r"""extra\s*==\s*["']([\w-]+)["']""", line)
    return line, match[1] if match else None


def admitted(version: str, wanted: str) -> bool:
    """Whether a version is in a range, by numbers: `2.13.0+cu128` is in `>=2.11,<2.14`."""

    def numbers(text: str) -> tuple[int, ...]:
        plain = re.match(r"\d+(\.\d+)*", text)
        found = [int(part) for part in plain[0].split(".")] if plain else []
        while found and found[-1] == 0:
            found.pop()
        return tuple(found)

    have = numbers(version)
    for operator, bound in re.findall(r"(>=|<=|==|!=|<|>)\s*([\w.]+)", wanted):
        limit = numbers(bound)
        holds = {
            ">=": have >= limit, "<=": have <= limit, "<": have < limit, ">": have > limit,
            "==": have == limit, "!=": have != limit,
        }  # fmt: skip
        if not holds[operator]:
            return False
    return True


def _version(name: str) -> str | None:
    """The version that is installed; None where none is."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def pip(*words: str) -> str:
    """The command by which this Python installs something."""
    return shlex.join([sys.executable, "-m", "pip", "install", *words])


# --- each in turn ----------------------------------------------------------------------------------------------------


def _python(wanted: str) -> Check:
    version = platform.python_version()
    if admitted(version, wanted):
        return Check("python", "version", OK, f"{version}, {sys.executable}", wanted)
    oldest = re.search(r"\d+\.\d+", wanted)
    mend = f"python{oldest[0] if oldest else 3} -m venv .venv"
    return Check("python", "version", BROKEN, version, wanted, f"this Python is not in {wanted}", mend)


def _settings() -> Iterator[Check]:
    """The environment variables: what they are set to, what is wrong with it, and those that mean nothing."""
    for one in variables():
        value = "not set" if one.value is None else repr(one.value)
        if one.refused is not None:
            yield Check("setting", one.name, BROKEN, value, "", one.refused, f"unset {one.name}")
        elif one.known:
            yield Check("setting", one.name, OK, value)
        else:
            near = f"; did you mean {one.nearest}?" if one.nearest else ""
            yield Check("setting", one.name, WARNING, value, "", f"no such setting{near}", f"unset {one.name}")


def _cache() -> Check:
    """The cache folder: how large it is, and whether it can be written to. Without it cascade is slower, not wrong."""
    try:
        folder = cache_folder()
    except CommandError as error:
        return Check("cache", "folder", NOTE, "not known", "", f"{error.diagnostics[0].message}, see above")
    files = [path for path in folder.rglob("*") if path.is_file()] if os.path.isdir(folder) else []
    found = f"{folder}, {len(files)} files, {_bytes(sum(map(_size, files)))}"
    refused = _unwritable(folder)
    if refused is None:
        return Check("cache", "folder", OK, found)
    says = f"cannot be written to ({refused}): what was decided is not kept"
    return Check("cache", "folder", WARNING, found, "", says, f"export CASCADE_CACHE_DIR={shlex.quote(_elsewhere())}")


def _elsewhere() -> str:
    return str(Path(tempfile.gettempdir()) / "cascade")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _unwritable(folder: Path) -> str | None:
    """Why nothing can be written to a folder, or below the nearest one above it that exists; None where it can."""
    place = next((one for one in (folder, *folder.parents) if os.path.exists(one)), folder)
    try:
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _bytes(count: int) -> str:
    """Bytes in the unit in which they read best."""
    for power, unit in ((3, "GB"), (2, "MB"), (1, "kB")):
        if count >= 1000**power:
            return f"{count / 1000**power:.3g} {unit}"
    return f"{count} B"


def _package(package: Package, failures: Mapping[str, str | None] | None) -> Check:
    """One package: installed, of a version that is admitted, and importable where that was tried."""
    version, section = _version(package.name), "package" if package.extra is None else f"extra {package.extra}"
    hidden = _hidden(package.module)
    failure = hidden if version is not None and hidden else (failures or {}).get(package.module)
    install = pip(package.requirement)
    if version is None:
        state = NOTE if package.extra else BROKEN
        says = f"{section} alone needs it" if package.extra else "cascade needs it"
        return Check(section, package.name, state, "not installed", package.wanted, says, install)
    state = WARNING if package.extra else BROKEN
    if not admitted(version, package.wanted):
        says = f"{version} is not in {package.wanted}"
        return Check(section, package.name, state, version, package.wanted, says, install)
    if failure is not None:
        says = f"it cannot be imported: {failure}"
        mend = pip("--force-reinstall", "--no-cache-dir", package.requirement)
        return Check(section, package.name, state, version, package.wanted, says, mend)
    return Check(section, package.name, OK, version, package.wanted)


def _hidden(module: str) -> str | None:
    """Why a module is not to be found in this process, though its package is installed; None where it is."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return None if found else "its files are not where Python looks for them"


def importing(modules: Sequence[str]) -> tuple[dict[str, str | None], Mapping[str, Any] | None]:
    """Why each module cannot be imported, None where it can; what torch says of devices, None where it says nothing.

    Each crash costs one child process.
    """
    found: dict[str, str | None] = {}
    devices: Mapping[str, Any] | None = None
    left = list(modules)
    while left:
        answers, ended = _child(IMPORTS, *left)
        for answer in answers:
            if "failure" in answer:
                found[answer["name"]] = answer["failure"]
            elif "devices" in answer:
                devices = answer
        begun = [answer["begun"] for answer in answers if "begun" in answer]
        crashed = begun[-1] if begun and begun[-1] not in found else (left[0] if not begun else None)
        if crashed is not None:
            found[crashed] = ended
        left = [name for name in left if name not in found]
    return found, devices


def _child(code: str, *words: str) -> tuple[list[dict[str, Any]], str]:
    """The lines of JSON that a Python of its own answers with, and how it ended."""
    command = [sys.executable, "-c", code, json.dumps(sys.path), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired as late:
        text = late.stdout.decode() if isinstance(late.stdout, bytes) else late.stdout or ""
        return _answers(text), f"no end within {PATIENCE_S:.0f} s"
    except OSError as error:
        return [], f"no process: {error.strerror or error}"
    told = done.stderr.strip().splitlines()
    return _answers(done.stdout), told[-1][:300] if told else f"the process ended with code {done.returncode}"


def _answers(text: str) -> list[dict[str, Any]]:
    found = []
    for line in text.splitlines():
        if line.startswith("{"):  # packages may print when they are imported
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def _devices(wanted: Sequence[Package], told: Mapping[str, Any] | None) -> Iterator[Check]:
    """The GPUs as torch sees them, and the driver. Without one, kernels are planned, compiled and not run."""
    driver, seen = _driver()
    if told is None:
        yield Check("device", "gpu", NOTE, ", ".join(seen) or "not known", "", "torch cannot be asked, see above")
        return
    listed = told["devices"]
    for number, (name, arch, memory) in enumerate(listed):
        yield Check("device", f"gpu {number}", OK, f"{name}, {arch}, {_bytes(memory)}, {driver or 'driver not known'}")
    if listed:
        return
    if not seen:
        yield Check("device", "gpu", NOTE, "none", "", "kernels are planned and compiled, and run nowhere here")
        return
    if told["cuda"] is None:
        torch = next(package.requirement for package in wanted if package.name == "torch")
        says, mend = "this build of torch knows no CUDA", pip("--force-reinstall", torch)
    else:
        says, mend = f"torch, built for CUDA {told['cuda']}, sees none of them", "nvidia-smi"
    yield Check("device", "gpu", WARNING, f"{', '.join(seen)}, {driver}", "", says, mend)


def _driver() -> tuple[str | None, list[str]]:
    """The driver, and the GPUs that it lists."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None, []
    query = [tool, "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None, []
    rows = [line.partition(", ") for line in done.stdout.splitlines() if ", " in line] if not done.returncode else []
    return (f"driver {rows[0][0]}", [name for _, _, name in rows]) if rows else (None, [])


def _compiler() -> Check:
    """Whether Triton compiles a kernel for a GPU that is not there."""
    offline = importlib.import_module("cascade.backends.triton.offline")
    request = offline.Request(KERNEL, "probe", (("X_ptr", "*fp32"), ("N", "i32")), (("BLOCK", 128),), ("X_ptr",))
    (answer,) = offline.facts([request], "sm_90", jobs=1, seconds=PATIENCE_S)
    if isinstance(answer, offline.Failure):
        says = f"it does not compile: {answer.message.splitlines()[0][:300]}"
        mend = pip(
            "--force-reinstall", "--no-cache-dir", *(p.requirement for p in requirements()[0] if p.name == "triton")
        )
        return Check("compiler", "offline", BROKEN, "no kernel", "", says, mend)
    return Check("compiler", "offline", OK, f"Triton {answer.triton} compiles for sm_90")


def main() -> int:
    """The same without `cascadec`, for where what that needs is broken: `python -m cascade.doctor`."""
    as_json = "--json" in sys.argv[1:]
    found = []
    for check in checks("--quick" in sys.argv[1:]):
        found.append(check)
        sys.stdout.write("" if as_json else f"{check.line}\n")
    sys.stdout.write(f"{json.dumps(report_json(found), indent=2) if as_json else advice(found)}\n")
    return 0 if healthy(found) else 1


if __name__ == "__main__":
    sys.exit(main())
