"""The rules of ARCHITECTURE.md that a parser can check: imports run downhill, dependencies have one home, functions
fit a screen, every pass has its cases, every example checks itself."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from cascade.passes import PASSES
from cascade.passes.base import pass_name

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "cascade"

# Each stage may import only from those above it, and from itself. A folder is one stage.
LAYERS = (
    {"errors"},
    {"settings", "files", "recent"},
    {"ops"},
    {"ir"},
    {"walk", "wording"},
    {"placed", "timetable"},
    {"scopes", "order", "intervals"},
    {"inference"},
    {"presence"},
    {"bounds"},
    {"text", "verify", "values"},
    {"evaluate"},
    {"interp"},
    {"frontend", "passes"},
    {"backends"},
    {"arguments"},
    {"trial"},
    {"pipeline"},
    {"modelled"},
    {"inspector"},
    {"compiled"},
    {"distributed"},
    {"terminal", "programs", "doctor", "entries"},
    {"explanation", "parameters"},
    {"comparison", "views"},
    {"upkeep"},
    {"cli", "__init__"},
    {"__main__"},
)
SETTINGS_READERS = {"pipeline", "compiled", "cli", "backends", "doctor", "entries", "parameters", "upkeep"}
TORCH_HOMES = {
    "values",
    "evaluate",
    "interp",
    "trial",
    "arguments",
    "frontend.trace",
    "frontend.positional",
    "backends.triton.launch",
    "backends.triton.kept",
    "backends.distributed.simulate",
    "backends.distributed.runtime",
    "backends.distributed.execute",
    "backends.distributed.streams",
    "backends.distributed.confined",
    "backends.distributed.symmetric",
}
HOMES = {
    "lark": {"frontend"},
    "torch": TORCH_HOMES,
    "triton": {
        "backends.triton.ahead",
        "backends.triton.launch",
        "backends.triton.offline",
        "backends.triton.relaunch",
    },
    "sympy": {"passes", "backends.systolic"},
    "networkx": {"passes"},
    "numpy": {"backends.triton.contractions"},
    "click": {"cli", "upkeep", "parameters", "views", "terminal"},
    "rich": {"terminal"},
}
MAX_LINES = 60


def modules() -> dict[str, Path]:
    """Every module of the package by its name below `cascade`."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def parametrized(test: object) -> object:
    """Runs a test for every module of the package."""
    return pytest.mark.parametrize("name", TREES)(test)


def imports(tree: ast.Module, lazy: bool = True) -> Iterator[str]:
    """Every module that is imported: statements outside `if TYPE_CHECKING`, and `import_module` of a literal."""
    skipped = {id(node) for guard in ast.walk(tree) if is_type_guard(guard) for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        match node:
            case ast.Import():
                yield from (alias.name for alias in node.names)
            case ast.ImportFrom(module=str(module)):
                yield from (submodule(module, alias.name) for alias in node.names)
            case ast.Call(func=ast.Attribute(attr="import_module"), args=[ast.Constant(value=str(module)), *_]) if lazy:
                yield module


def is_type_guard(node: ast.AST) -> bool:
    """Whether the node is `if TYPE_CHECKING:`, whose imports never run."""
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def submodule(module: str, name: str) -> str:
    """`from cascade import text` imports `cascade.text`; `from cascade.ir import Rank` imports `cascade.ir`."""
    full = f"{module}.{name}"
    return full if full.removeprefix("cascade.") in MODULES else module


def own(module: str) -> str | None:
    """The name below `cascade` of one of our modules, else None."""
    return module.removeprefix("cascade.") if module.startswith("cascade.") else None


def layer(name: str) -> int:
    """The position of a module's stage; a module that is in no stage must be given one above."""
    stage = name.partition(".")[0]
    found = [position for position, names in enumerate(LAYERS) if stage in names]
    assert found, f"cascade/{name} has no place in LAYERS of tests/test_architecture.py"
    return found[0]


def functions(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


@parametrized
def test_imports_run_downhill(name: str) -> None:
    stage = name.partition(".")[0]
    for imported in filter(None, map(own, imports(TREES[name]))):
        target = imported.partition(".")[0]
        if target == stage or (name == "__init__" and layer(imported) < layer(name)):
            continue
        allowed = layer(imported) < layer(name) or {target, stage} <= {"walk", "wording", "verify", "text", "values"}
        assert allowed, f"{name} imports {imported}"


def test_no_import_cycles() -> None:
    graph = {name: {m for m in map(own, imports(tree, lazy=False)) if m in TREES} for name, tree in TREES.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for imported in sorted(graph[name]):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@parametrized
def test_dependencies_have_one_home(name: str) -> None:
    for imported in imports(TREES[name]):
        homes = HOMES.get(imported.partition(".")[0])
        if homes is not None:
            at_home = any(name == home or name.startswith(f"{home}.") for home in homes)
            assert at_home, f"{name} imports {imported}; its homes are {sorted(homes) or 'none'}"


@parametrized
def test_settings_are_read_in_few_places(name: str) -> None:
    if "settings" in map(own, imports(TREES[name])):
        assert name.partition(".")[0] in SETTINGS_READERS or name == "passes.memo", (
            f"{name} may not read the environment"
        )
    if name != "settings":
        read = {n.attr for n in ast.walk(TREES[name]) if isinstance(n, ast.Attribute)} & {"environ", "getenv"}
        assert not read, f"{name} reads the environment; that is for settings.py"


@parametrized
def test_functions_import_nothing(name: str) -> None:
    for function in functions(TREES[name]):
        for node in ast.walk(function):
            found = isinstance(node, ast.Import | ast.ImportFrom)
            assert not found, f"{name}: {function.name} imports something"


@parametrized
def test_module_has_a_docstring(name: str) -> None:
    assert ast.get_docstring(TREES[name]), f"cascade/{name} has no docstring"


@parametrized
def test_functions_fit_a_screen(name: str) -> None:
    lines = MODULES[name].read_text(encoding="utf-8").splitlines()
    for function in functions(TREES[name]):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        excused = "# long because" in "\n".join(lines[function.lineno - 2 : function.lineno + 1])
        assert length <= MAX_LINES or excused, f"{name}: {function.name} has {length} lines"


@parametrized
def test_only_the_command_prints(name: str) -> None:
    for node in ast.walk(TREES[name]):
        called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
        assert not called or name == "cli", f"{name} prints at line {node.lineno}"


@pytest.mark.parametrize("name", PASSES)
def test_pass_has_one_name(name: str) -> None:
    cls = PASSES[name]
    stem = name.replace("-", "_")
    assert cls.name == name == pass_name(cls)
    assert cls.__module__ == f"cascade.passes.{stem}"
    assert dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen
    assert list((ROOT / "tests/cases" / stem).glob("*.case")), f"tests/cases/{stem} has no case"


EXAMPLES = sorted((ROOT / "examples").glob("[0-9][0-9]_*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_checks_itself(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), f"{path.name} has no docstring"
    assert "main" in {function.name for function in functions(tree)}, f"{path.name} has no main()"
    checks = any(isinstance(node, ast.Assert) for node in ast.walk(tree)) or "assert_close(" in text
    assert checks, f"{path.name} does not check its own claim"


def test_error_codes_are_in_the_table() -> None:
    table = set(re.findall(r"^\| (C\d{3}) \|", (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"), re.M))
    used = {code for path in MODULES.values() for code in re.findall(r'"(C\d{3})"', path.read_text(encoding="utf-8"))}
    assert used <= table, f"not in the table of ARCHITECTURE.md: {sorted(used - table)}"
    assert table <= used, f"in the table of ARCHITECTURE.md, but nowhere raised: {sorted(table - used)}"
