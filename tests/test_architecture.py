"""The shape of the library: one-way imports, light modules, short files and functions, honest error handling."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "nslora"
# A module imports only from modules to its left.
# fmt: off
ORDER = [
    "types", "config", "rules", "worlds", "grading", "own", "problems", "tasks", "fetch", "weights", "attention",
    "kernels", "decode", "backbones", "recordings", "server", "editor", "lora", "evaluate", "wording", "rewrite",
    "controls", "remake", "monitor", "needs", "router", "stats", "store", "session", "moves", "loop", "probe",
    "records", "when", "figures", "when_figures", "ablations", "remaking", "adaptability", "costs", "claims", "report",
    "grid", "jobs", "cluster", "bundle", "bench_sides", "bench_report", "bench", "cli",
]
# fmt: on
HEAVY = {"torch", "transformers", "peft", "textgrad", "xllamacpp", "datasets"}
MODULES = sorted(p for p in SOURCE.glob("*.py") if p.name != "__init__.py")
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in MODULES}
each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def imported(tree: ast.Module) -> set[str]:
    """Modules of the library that `tree` imports, inside functions too."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.ImportFrom(module=None, level=1, names=names) | ast.ImportFrom(module="nslora", names=names):
                found |= {alias.name for alias in names}
            case ast.ImportFrom(module=str(module), level=1):
                found.add(module.split(".")[0])
            case ast.ImportFrom(module=str(module)) if module.startswith("nslora."):
                found.add(module.split(".")[1])
            case ast.Import(names=names):
                found |= {alias.name.split(".")[1] for alias in names if alias.name.startswith("nslora.")}
    return found


@each_module
def test_imports_go_one_way(path: Path) -> None:
    assert path.stem in ORDER, f"give {path.stem} its place in ORDER"
    left = set(ORDER[: ORDER.index(path.stem)])
    assert imported(TREES[path]) <= left


def test_imported_sees_every_form_of_import() -> None:
    code = "import nslora.a; from nslora import b; from nslora.c import d; from . import e\ndef f(): from .g import h"
    assert imported(ast.parse(code)) == {"a", "b", "c", "e", "g"}


def test_light_modules_import_no_model_library() -> None:
    """Figures are rebuilt without torch, and wrong input is answered at once."""
    code = "import sys, nslora.types, nslora.config, nslora.stats, nslora.report, nslora.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "nslora.cli" in loaded
    assert not HEAVY & set(loaded)


@each_module
def test_files_and_functions_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 300
    functions = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno and f.end_lineno - f.lineno >= 80}
    assert long == {}


@each_module
def test_no_error_is_caught_blindly(path: Path) -> None:
    """`except:`, `except Exception` and `except BaseException` hide mistakes."""
    handlers = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.ExceptHandler)]
    blind = [h.lineno for h in handlers if h.type is None or {"Exception", "BaseException"} & names(h.type)]
    assert blind == []


def names(node: ast.expr) -> set[str]:
    """Bare names in an expression."""
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def test_there_is_no_drawer_for_odds_and_ends() -> None:
    assert not {"utils", "util", "helpers", "common", "misc"} & {path.stem for path in MODULES}
