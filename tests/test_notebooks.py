"""The notebooks: clean sources, honest parameters, and all of them executed at toy size by the real runner."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pytest

from nslora import grid

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
PARAMETER = re.compile(r"(?P<name>\w+): (str|int|float|bool) = (?P<value>.+?)  # \w.*")


def read(path: Path) -> nbformat.NotebookNode:
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    return nb


def parameters(path: Path) -> dict[str, str]:
    """Name to default of the parameters cell, which must come first."""
    first, *others = read(path).cells
    assert "parameters" in first.metadata.get("tags", ())
    assert all("parameters" not in cell.metadata.get("tags", ()) for cell in others)
    found = [PARAMETER.fullmatch(line) for line in first.source.splitlines()]
    assert all(found), "every line must be `name: type = value  # meaning`"
    return {match["name"]: match["value"].strip('"') for match in found if match}


@each
def test_sources_are_clean(path):
    nb = read(path)
    assert nb.metadata.kernelspec.name == "python3"
    subprocess.run([sys.executable, "-m", "nbstripout", "--verify", str(path)], check=True)
    for cell in nb.cells:
        if cell.cell_type == "code":
            assert not re.search(r"^\s*!|^%%|get_ipython|os\.system", cell.source, re.MULTILINE), "hides failures"
            assert not re.search(r"^(def|class) ", cell.source, re.MULTILINE), "algorithms belong in src/"
            assert len(cell.source.splitlines()) <= 15


@each
def test_prose_asks_a_question_first_and_leads_every_few_cells(path):
    nb = read(path)
    assert nb.cells[1].source.startswith(f"# {path.stem[:2]} ")
    kinds = "".join(cell.cell_type[0] for cell in nb.cells)
    assert "cccc" not in kinds
    assert "undecided" in "".join(cell.source for cell in nb.cells[-3:]).lower()


@each
def test_defaults_are_runs_of_the_quick_profile(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    given = parameters(path)
    assert given["profile"] == "quick"
    if path.stem in grid.load("quick").reports:
        assert set(given) == {"profile"}
    else:
        assert grid.configs("quick", path.stem, given["backbone"], int(given["seed"]))


def test_every_notebook_is_in_every_profile():
    for name in tomllib.loads((ROOT / "experiments.toml").read_text())["profiles"]:
        profile = grid.load(name, ROOT)
        assert {path.stem for path in NOTEBOOKS} == {*profile.notebooks, *profile.reports}


def test_all_notebooks_run_at_toy_size(tmp_path):
    """The smoke profile in a project folder of its own: records, executed notebooks, figures and claims come out."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "experiments.toml", tmp_path)
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "nslora.cli", "reproduce", "--profile", "smoke"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    profile = grid.load("smoke", tmp_path)
    assert all(job.done() for job in grid.jobs(profile))
    runs = {cfg.run_id for runs in profile.notebooks.values() for cfg in runs}
    assert {path.name for path in profile.results.glob("records/*")} == runs
    for job in grid.jobs(profile):
        outputs = json.dumps(read(job.executed))
        assert '"output_type": "error"' not in outputs
    figure = profile.results / "figures" / "success.png"
    assert figure.stat().st_size > 1000
    assert "image/png" in json.dumps(read(grid.jobs(profile)[-1].executed))
    assert len(json.loads((profile.results / "claims.json").read_text())["claims"]) >= 7
