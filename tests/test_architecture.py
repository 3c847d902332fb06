"""The shape of the library: one-way imports, light modules, short files and functions, honest error handling."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections import Counter
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.pure

SOURCE = Path(__file__).parent.parent / "src" / "nslora"
# A package imports only from packages to its left (types, config, disk and cache are modules of the library itself).
ORDER = [
    "types",
    "config",
    "disk",
    "cache",
    "tasks",
    "model",
    "editor",
    "algorithm",
    "runs",
    "study",
    "experiments",
    "bench",
    "cli",
]
HEAVY = {"torch", "transformers", "peft", "textgrad", "xllamacpp", "datasets"}
MODULES = sorted(p for p in SOURCE.rglob("*.py") if p != SOURCE / "__init__.py")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
name = lambda path: path.relative_to(SOURCE).with_suffix("").as_posix().replace("/", ".")  # noqa: E731
each_module = pytest.mark.parametrize("path", MODULES, ids=name)


def imported(tree: ast.Module) -> set[str]:
    """Modules of the library that `tree` imports, inside functions too, as dotted names below `nslora`."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module="nslora", level=0, names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), level=0) if module.startswith("nslora."):
                found |= {f"{module}.{alias.name}".removeprefix("nslora.") for alias in node.names}
            case ast.Import(names=names):
                found |= {
                    a.name.removeprefix("nslora.") for a in names if a.name.startswith("nslora.")
                }
            case ast.ImportFrom(level=level) if level:
                found.add("a relative import")
    return found


@each_module
def test_packages_import_one_way(path: Path) -> None:
    package = name(path).split(".")[0]
    assert package in ORDER, f"give {package} its place in ORDER"
    allowed = {*ORDER[: ORDER.index(package) + 1], "__version__"}
    assert {module.split(".")[0] for module in imported(TREES[path])} <= allowed


def test_modules_import_each_other_without_a_cycle() -> None:
    graph = {name(p).removesuffix(".__init__"): set[str]() for p in MODULES}
    for path in MODULES:
        for target in imported(TREES[path]):
            hits = [m for m in graph if target == m or target.startswith(f"{m}.")]
            graph[name(path).removesuffix(".__init__")] |= {max(hits, key=len)} if hits else set()
    TopologicalSorter({m: to - {m} for m, to in graph.items()}).prepare()  # raises CycleError


def test_no_package_has_more_than_twelve_modules() -> None:
    full = Counter(path.parent for path in MODULES if path.name != "__init__.py")
    assert max(full.values()) <= 12


def test_imported_sees_every_form_of_import() -> None:
    code = "import nslora.a; from nslora import b; from nslora.c import d; from . import e\n"
    code += "def f(): from nslora.g.h import i"
    assert imported(ast.parse(code)) == {"a", "b", "c.d", "a relative import", "g.h.i"}


def test_light_modules_import_no_model_library() -> None:
    """Figures are rebuilt without torch, and wrong input is answered at once."""
    code = "import sys, nslora, nslora.config, nslora.study.report, nslora.cli; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "nslora.cli" in loaded
    assert not HEAVY & set(loaded)


@each_module
def test_functions_are_short(path: Path) -> None:
    functions = [
        n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {
        f.name: f.end_lineno - f.lineno + 1
        for f in functions
        if f.end_lineno and f.end_lineno - f.lineno > 60
    }
    assert long == {}


@each_module
def test_no_error_is_caught_blindly(path: Path) -> None:
    """`except:`, `except Exception` and `except BaseException` hide mistakes."""
    handlers = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.ExceptHandler)]
    blind = [
        h.lineno
        for h in handlers
        if h.type is None or {"Exception", "BaseException"} & names(h.type)
    ]
    assert blind == []


def names(node: ast.expr) -> set[str]:
    """Bare names in an expression."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & {path.stem for path in MODULES}
