"""The smoke profile, made by the runner as users make it: every notebook in a kernel, and real models."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

from synthetic import write_record
from toy import copy_project

from nslora.experiments import grid

ROOT = Path(__file__).parents[1]


def reproduce(root: Path, *more: str) -> grid.Profile:
    """Make the smoke profile of a project folder, every job done."""
    env = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "nslora.cli", "reproduce", "--profile", "smoke", *more]
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    profile = grid.load("smoke", root)
    assert all(job.done() for job in grid.jobs(profile))
    return profile


def test_the_runner_reuses_the_records_of_a_clone(tmp_path: Path) -> None:
    """One notebook with runs in a kernel of its own; no model is loaded."""
    project = copy_project(tmp_path)
    text = (project / "experiments.toml").read_text(encoding="utf-8")
    head, smoke = text.split("[profiles.smoke]")
    settings, *blocks = smoke.split("\n[[")
    kept = [block for block in blocks if "07_ablations" in block]
    reports = re.sub(r"^reports = .*$", "reports = []", head.split("[profiles.")[0], flags=re.M)
    (project / "experiments.toml").write_text(
        "\n[[".join([f"{reports}[profiles.smoke]{settings}", *kept]), encoding="utf-8"
    )
    profile = grid.load("smoke", project)
    (cfg,) = profile.notebooks["07_ablations"]
    write_record(profile.results, run_id=cfg.run_id, **cfg.settings)
    reproduce(project, "--reuse")
    assert not profile.finished, "no run was to be made"
    (job,) = grid.jobs(profile)
    assert "undecided" in job.executed.read_text(encoding="utf-8")


def test_all_notebooks_run_at_toy_size(tmp_path: Path) -> None:
    """The smoke profile with real models: records, executed notebooks, figures and claims."""
    profile = reproduce(copy_project(tmp_path))
    names = {path.stem for path in ROOT.glob("notebooks/*.ipynb")}
    runs = {cfg.run_id for runs in profile.notebooks.values() for cfg in runs}
    records = {path.name for path in profile.results.glob("records/*")}
    assert records == runs == {entry["run"] for entry in profile.finished}
    shown = {job.notebook: job.executed.read_text(encoding="utf-8") for job in grid.jobs(profile)}
    assert {name for name in shown if "image/png" in shown[name]} == names
    assert not [name for name in shown if '"name": "stderr"' in shown[name]]
    figure = profile.results / "figures" / "success.png"
    assert figure.stat().st_size > 1000
    assert len(json.loads((profile.results / "claims.json").read_text())["claims"]) >= 7
