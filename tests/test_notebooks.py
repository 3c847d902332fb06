"""The notebooks: clean sources, honest parameters, and all of them executed at toy size by the real runner."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from dataclasses import asdict
from pathlib import Path

import nbformat
import pytest
from synthetic import write_record

from nslora.experiments import grid

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
            assert not re.search(r"^\s*!|^%%|get_ipython|os\.system", cell.source, re.MULTILINE), (
                "hides failures"
            )
            assert not re.search(r"^(def|class) ", cell.source, re.MULTILINE), (
                "algorithms belong in src/"
            )
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
        assert not {"backbone", "seed"} & set(given), "it reads the runs of all of them"
    else:
        assert grid.configs("quick", path.stem, given["backbone"], int(given["seed"]))


def test_every_notebook_is_in_every_profile():
    for name in tomllib.loads((ROOT / "experiments.toml").read_text())["profiles"]:
        profile = grid.load(name, ROOT)
        assert {path.stem for path in NOTEBOOKS} == {*profile.notebooks, *profile.reports}


def reproduce(root: Path, *more: str) -> grid.Profile:
    """The smoke profile in a project folder of its own, every job done."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "nslora.cli", "reproduce", "--profile", "smoke", *more]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    profile = grid.load("smoke", root)
    assert all(job.done() for job in grid.jobs(profile))
    return profile


@pytest.fixture
def project(tmp_path):
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copy(ROOT / "experiments.toml", tmp_path)
    return tmp_path


def best_is_last(record: Path) -> None:
    """Make the last move of a made-up record its best, with an adapter checkpoint that is not there."""
    *earlier, last = (
        json.loads(line) for line in (record / "steps.jsonl").read_text().splitlines()
    )
    steps = [*earlier, last | {"adapter": "adapter-02"}]
    (record / "steps.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    run = json.loads((record / "run.json").read_text())
    run["best"]["step"] = last["step"]
    (record / "run.json").write_text(json.dumps(run))


def test_all_notebooks_read_the_records_of_a_clone(project):
    """Every cell but the runs themselves, on records with made-up replies: quick, since no model is loaded."""
    profile = grid.load("smoke", project)
    for cfg in dict.fromkeys(cfg for runs in profile.notebooks.values() for cfg in runs):
        best_is_last(write_record(profile.results, **asdict(cfg)))
    reproduce(project, "--reuse")
    assert not profile.finished, "no run was to be made"
    shown = {job.notebook: json.dumps(read(job.executed)) for job in grid.jobs(profile)}
    assert {name: "image/png" in text for name, text in shown.items()} == dict.fromkeys(shown, True)
    assert "<ins>" in shown["00_quickstart"]
    assert "is not in this working folder" in shown["00_quickstart"], (
        "a clone has no checkpoints to bundle"
    )
    for name in shown:
        assert "undecided" in shown[name].lower()


def test_all_notebooks_run_at_toy_size(project):
    """The smoke profile with real models: records, executed notebooks, figures and claims come out."""
    profile = reproduce(project)
    runs = {cfg.run_id for runs in profile.notebooks.values() for cfg in runs}
    assert (
        {path.name for path in profile.results.glob("records/*")}
        == runs
        == {e["run"] for e in profile.finished}
    )
    figure = profile.results / "figures" / "success.png"
    assert figure.stat().st_size > 1000
    assert len(json.loads((profile.results / "claims.json").read_text())["claims"]) >= 7
