"""Set-up on a fresh machine: pyproject, lock, environment.yml, Makefile and the installed packages agree."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

import nslora

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
MAKEFILE = (ROOT / "Makefile").read_text()
UNLOCKED = {"torch", "pycosat"}
# What a distribution is imported as, where the names differ.
IMPORTED_AS = {"scikit-learn": "sklearn", "ipython": "IPython"}
# Declared, but without an import statement: used by other packages, run as commands, or loaded by file.
NOT_IMPORTED = {
    "gguf",
    "litellm",
    "ipykernel",
    "jupyterlab",
    "if-verifiable",
    "tabulate",
}


def locked() -> list[tuple[Requirement, list[str]]]:
    """Each requirement of the lock with its SHA-256 hashes."""
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.lstrip().startswith("#")]
    return [
        (Requirement(line.split("--hash")[0]), re.findall(r"--hash=sha256:([0-9a-f]{64})\b", line))
        for line in lines
    ]


LOCK = {canonicalize_name(requirement.name): requirement for requirement, _ in locked()}


def version(name: str) -> str:
    """The version that the lock pins."""
    (specifier,) = LOCK[canonicalize_name(name)].specifier
    return specifier.version


def declared(*extras: str) -> list[Requirement]:
    """Requirements of pyproject.toml and of its extras."""
    lists = [
        PROJECT["dependencies"],
        *(PROJECT["optional-dependencies"][extra] for extra in extras),
    ]
    return [Requirement(line) for lines in lists for line in lines]


def test_every_locked_package_is_pinned_and_hashed() -> None:
    for requirement, hashes in locked():
        assert [s.operator for s in requirement.specifier] == ["=="], requirement
        assert hashes, requirement


def test_lock_leaves_out_what_differs_by_machine() -> None:
    """torch builds and their CUDA parts differ by machine; pycosat has no wheels."""
    assert not {name for name in LOCK if name in UNLOCKED or re.match("nvidia-|cuda-|triton", name)}
    (left_out,) = re.findall(r"^UNLOCKED := (.*)$", MAKEFILE, re.MULTILINE)
    assert set(left_out.split()) == UNLOCKED


def test_lock_satisfies_every_declared_requirement() -> None:
    for requirement in declared("dev", "bench", "cluster", "peers"):
        if requirement.name not in UNLOCKED:
            assert requirement.specifier.contains(version(requirement.name)), requirement


def test_installed_packages_are_the_locked_ones() -> None:
    apply = [r for r in LOCK.values() if not r.marker or r.marker.evaluate()]
    wrong = {
        r.name: metadata.version(r.name)
        for r in apply
        if metadata.version(r.name) != version(r.name)
    }
    assert wrong == {}


def test_malicious_litellm_releases_are_refused() -> None:
    (litellm,) = [r for r in declared() if r.name == "litellm"]
    assert not any(litellm.specifier.contains(bad) for bad in ("1.82.7", "1.82.8"))


def imported(source: str) -> set[str]:
    """Top-level names of the packages that `source` imports, by statement or by `import_module("name")`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found |= {alias.name.split(".")[0] for alias in names}
            case ast.ImportFrom(module=str(module), level=0):
                found.add(module.split(".")[0])
            case ast.Call(func=ast.Name("import_module"), args=[ast.Constant(str(name))]):
                found.add(name.split(".")[0])
    return found


def test_declared_requirements_are_the_imported_ones() -> None:
    files = (ROOT / "src" / "nslora").rglob("*.py")
    found = set().union(*(imported(path.read_text(encoding="utf-8")) for path in files))
    needed = [r.name for r in declared("bench", "cluster", "peers") if r.name not in NOT_IMPORTED]
    expected = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in needed}
    assert found - sys.stdlib_module_names - {"nslora"} == expected


def test_data_files_of_the_library_are_installed_with_it() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    installed = set()
    for package, patterns in tools["setuptools"]["package-data"].items():
        folder = ROOT / "src" / package.replace(".", "/")
        installed |= {path for pattern in patterns for path in folder.glob(pattern)}
    library = ROOT / "src" / "nslora"
    # without hidden files, which say how code is formatted
    data = {path for end in ("toml", "json", "html") for path in library.rglob(f"[!.]*.{end}")}
    assert data == installed
    assert library / "tasks" / "world.toml" in data


def test_math_needs_nothing_that_must_be_compiled() -> None:
    """reasoning-gym imports pycosat, which has no wheels, although its arithmetic never uses it."""
    code = """if True:
        import sys
        class Block:
            def find_spec(self, name, *_):
                if name == "pycosat":
                    raise ModuleNotFoundError(name)
        sys.meta_path.insert(0, Block())
        from nslora import config
        from nslora.tasks import build
        print(len(build.build(config.RunConfig(task="math", items=4, test_items=4)).train))
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr


def test_torch_of_the_makefile_satisfies_pyproject_and_pythons_agree() -> None:
    (torch,) = re.findall(r"^TORCH := torch==(\S+)$", MAKEFILE, re.MULTILINE)
    (required,) = [r for r in declared() if r.name == "torch"]
    assert required.specifier.contains(torch)
    low, high = re.findall(r"\((\d+, \d+)\) <= sys.version_info\[:2\] < \((\d+, \d+)\)", MAKEFILE)[
        0
    ]
    assert PROJECT["requires-python"] == f">={low.replace(', ', '.')},<{high.replace(', ', '.')}"


def test_conda_environment_agrees_with_pyproject_and_lock() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert pip == {"pip": ["-r requirements.lock"]}
    (python,) = [line for line in conda if line.startswith("python=")]
    assert SpecifierSet(PROJECT["requires-python"]).contains(python.removeprefix("python="))
    (required,) = [r for r in declared() if r.name == "torch"]
    assert f"pytorch{required.specifier}" in conda
    assert {"torch" if line.startswith("pytorch") else line for line in conda} >= UNLOCKED


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (
        nslora.__version__
        == PROJECT["version"]
        == citation["version"]
        == metadata.version("nslora")
    )
    assert Version(nslora.__version__)


def test_console_script_is_the_command() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="nslora")
    assert script.value == PROJECT["scripts"]["nslora"]
    assert callable(script.load())


def make(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run make outside of any make that runs the tests."""
    inherited = {
        k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")
    }
    command = ["make", *arguments]
    return subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=120
    )


def test_help_is_the_default_goal_and_lists_every_target() -> None:
    listed = make().stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)
    assert make("help").stdout == listed
    targets = re.findall(r"^  make (\S+) ", listed, re.MULTILINE)
    assert targets == phony.split()


def test_targets_pass_their_settings_on() -> None:
    command = make("--dry-run", "reproduce", "PROFILE=smoke", "JOBS=2", "REUSE=1").stdout
    assert "reproduce --profile smoke --jobs 2 --reuse" in command
    assert "--reuse" not in make("--dry-run", "reproduce").stdout


def test_no_recipe_swallows_a_failure() -> None:
    recipes = [line.strip("\t@") for line in MAKEFILE.splitlines() if line.startswith("\t")]
    assert not [
        line for line in recipes if line.startswith("-") or "|| true" in line or "|| :" in line
    ]


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("exit 1", "needs Python 3.11 to 3.14"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "lacks the venv module"),
    ],
    ids=["python too old", "no venv"],
)
def test_set_up_without_a_fit_python_says_so_in_one_sentence(
    tmp_path: Path, script: str, sentence: str
) -> None:
    folder = tmp_path / "with a space"
    folder.mkdir()
    for name in ("Makefile", "requirements.lock", "pyproject.toml"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    done = make("figures", f"PYTHON={python}", cwd=folder)
    first, *rest = done.stderr.splitlines()
    assert sentence in first
    assert all(line.startswith("make: ***") for line in rest)
    assert done.returncode == 2
    assert not (folder / ".venv").exists()


def test_paper_without_latex_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "make").symlink_to(
        next(Path(p, "make") for p in os.get_exec_path() if Path(p, "make").exists())
    )
    done = make("paper", PATH=str(tmp_path))
    assert "apt install latexmk" in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        ("=== 3 passed in 0.12s ===", 0, 0),
        ("=== 1 failed, 2 passed in 75.10s (0:01:15) ===", 2, 2),
        ("nothing ran", 0, 1),
    ],
)
def test_continuous_integration_ends_with_the_closing_line(
    tmp_path: Path, output: str, status: int, expected: int
) -> None:
    fake = tmp_path / "make"
    fake.write_text(
        f"#!/bin/sh\necho 'called with' $*\necho '{output}'\necho trailing\nexit {status}\n"
    )
    fake.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = subprocess.run(
        [ROOT / ".ci" / "run"], env=os.environ | {"PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == expected
    assert "called with test" in done.stdout
    if "===" in output:
        assert done.stdout.splitlines()[-1] == output
