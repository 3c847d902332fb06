"""Pre-registration: written once and before anything is run, and everything that differs from it is named."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from grown import write_tree
from toy import RUNS, make

from nslora.experiments import grid, preregistration, registration
from nslora.runs.store import code, write_json
from nslora.study import claims
from nslora.types import UserError

pytestmark = pytest.mark.pure

# prints the modules of the library that judging needs, below study/ and among the decisions
IMPORTED = """
import sys
import nslora.study.claims
for name in sorted(sys.modules):
    path = name.replace(".", "/").removeprefix("nslora/")
    parts = getattr(sys.modules[name], "__path__", None)
    if name.startswith("nslora.study"):
        print(path + ("/__init__.py" if parts else ".py"))
"""


@pytest.fixture
def profile(tmp_path: Path, monkeypatch) -> grid.Profile:
    """A small profile, whose code is that of a commit."""
    monkeypatch.setattr(preregistration, "git", lambda *args: "abc" if "HEAD" in args else "")
    make(tmp_path, good=(RUNS,))
    return grid.load("t", tmp_path)


def tune(profile: grid.Profile, seed: int, by: str) -> Path:
    """Write a finished tree of tuning, made by some code."""
    write_tree(profile.trees, seed=seed, depth=2)
    (tree,) = profile.trees.glob(f"*-s{seed}")
    about = json.loads((tree / "instance.json").read_text())
    write_json(tree / "instance.json", about | {"environment": {"code": by}})
    return tree


def publish(profile: grid.Profile, name: str, by: str) -> None:
    folder = profile.results / "records" / name
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"study": "main", "environment": {"code": by}})


def plant(profile: grid.Profile, name: str, split: str, by: str) -> None:
    folder = profile.root / "results" / "schedules" / name
    folder.mkdir(parents=True)
    write_json(folder / "instance.json", {"split": split, "environment": {"code": by}})


def test_it_holds_runs_claims_and_code(profile) -> None:
    content = tomllib.loads(preregistration.freeze(profile).read_text())
    assert content["code"] == code()
    assert content["revision"] == "abc"
    assert content["runs"] == sorted(cfg.run_id for cfg in profile.notebooks["good"])
    assert [row["key"] for row in content["claims"]] == list(claims.CLAIMS)
    by_key = {row["key"]: row for row in content["claims"]}
    assert by_key["knowledge-kept"]["comparisons"][0].endswith("> 90 points")
    assert all(row["comparisons"][0] for row in content["claims"])


def test_tuning_trees_and_what_judges_are_registered(profile, monkeypatch) -> None:
    """Rivals are chosen on trees of tuning, and routers decide when trees are judged: both could change late."""
    tree = tune(profile, 100, code())
    preregistration.freeze(profile)
    assert preregistration.disagreements(profile) == []

    nodes = (tree / "nodes.jsonl").read_bytes()
    (tree / "nodes.jsonl").write_bytes(nodes + b"\n")
    tune(profile, 101, code())
    said = preregistration.disagreements(profile)
    assert len([line for line in said if "is not the registered one" in line]) == len(said) == 3
    shutil.rmtree(profile.trees)
    (line,) = preregistration.disagreements(profile)
    assert line == f"the tuning tree {tree.name} is not the registered one."
    tune(profile, 100, code())
    assert preregistration.disagreements(profile) == []

    monkeypatch.setattr(preregistration, "judge", lambda: "1" * 64)
    (line,) = preregistration.disagreements(profile)
    assert "the code that judges" in line and "1" * 64 in line
    amendments = registration.path_of(profile.root).with_name("amendments.toml")
    row = f'[[amendments]]\ndate = "2026-12-01"\njudge = "{"1" * 64}"\nwhy = "Wrong."\n'
    amendments.write_text(row)
    assert preregistration.disagreements(profile) == []
    given_up = row.replace(f'judge = "{"1" * 64}"', 'abandoned = "a-run"')
    amendments.write_text(row + given_up)
    assert preregistration.disagreements(profile) == ["a-run was abandoned: Wrong."]
    amendments.write_text(row.replace("why", "reason"))
    with pytest.raises(UserError, match="amendments.toml cannot be read"):
        preregistration.disagreements(profile)


def test_rivals_are_chosen_on_finished_trees_of_the_frozen_code(profile) -> None:
    """Else the best fixed schedule would be chosen on the test trees, or on moves that are no more."""
    (cfg,) = [one for one in profile.runs if one.method == "lora"]
    studied = replace(profile, schedules=(cfg.but(study="schedules"),))
    with pytest.raises(UserError, match=f"no tree of tuning is finished on {cfg.backbone}"):
        preregistration.freeze(studied)
    tree = tune(studied, 100, "0" * 64)
    with pytest.raises(UserError, match=r"json-s100 is of other code"):
        preregistration.freeze(studied)
    shutil.rmtree(tree)
    tune(studied, 100, code())
    preregistration.freeze(studied)


def test_a_notebook_opened_by_hand_makes_no_run_of_the_study_either(profile, monkeypatch) -> None:
    preregistration.freeze(profile)
    monkeypatch.setattr(registration, "code", lambda: "0" * 64)
    monkeypatch.chdir(profile.root)
    with pytest.raises(UserError, match="this is other code"):
        grid.run_all("t", "good", "smollm2-135m", 0)


def test_what_judges_is_all_that_verdicts_import() -> None:
    """Of study/ and of the decisions: else a change there would go unsaid."""
    root = Path(preregistration.nslora.__file__).parent
    assert all((root / name).exists() for name in preregistration.JUDGES)
    done = subprocess.run(
        (sys.executable, "-c", IMPORTED),
        capture_output=True,
        text=True,
        check=True,
        cwd=root.parent,
    )
    # drawing and reading decide nothing
    others = {"study/__init__.py", "study/figures.py", "study/signal.py"}
    assert set(done.stdout.split()) - others <= set(preregistration.JUDGES)


def test_a_study_is_registered_once_and_before_it_is_run(profile, monkeypatch) -> None:
    run = profile.notebooks["good"][0].run_id
    publish(profile, run, code())
    with pytest.raises(UserError, match=f"{run}.* cannot be registered"):
        preregistration.freeze(profile)
    (profile.results / "records" / run / "run.json").unlink()
    preregistration.freeze(profile)
    with pytest.raises(UserError, match="registered once"):
        preregistration.freeze(profile)


def test_changes_and_seeds_of_tuning_are_refused(profile, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(preregistration, "git", lambda *args: " M src/nslora/config.py")
    with pytest.raises(UserError, match="commit"):
        preregistration.freeze(profile)
    new = "?? src/nslora/algorithm/new.py"
    monkeypatch.setattr(preregistration, "git", lambda *args: new if ":/src" in args else "")
    with pytest.raises(UserError, match="commit"):
        preregistration.freeze(profile)
    monkeypatch.setattr(preregistration, "git", lambda *args: "")
    text = (tmp_path / "experiments.toml").read_text()
    (tmp_path / "experiments.toml").write_text(text.replace("seeds = [0]", "seeds = [100]"))
    with pytest.raises(UserError, match="seed of tuning"):
        preregistration.freeze(grid.load("t", tmp_path))


def test_other_code_makes_no_run_of_the_study(profile, monkeypatch) -> None:
    registration.require_frozen_code(profile.root, profile.name)
    preregistration.freeze(profile)
    registration.require_frozen_code(profile.root, profile.name)
    monkeypatch.setattr(registration, "code", lambda: "0" * 64)
    with pytest.raises(UserError, match=r"git worktree add ../frozen .* make .venv/ready"):
        registration.require_frozen_code(profile.root, profile.name)


def test_what_is_not_as_registered_is_named(profile, monkeypatch) -> None:
    preregistration.freeze(profile)
    first = profile.notebooks["good"][0].run_id
    publish(profile, first, code())
    assert preregistration.disagreements(profile) == []

    other = {"study": "main", "environment": {"code": "0"}}
    write_json(profile.results / "records" / first / "run.json", other)
    publish(profile, "another", code())
    second = profile.notebooks["good"][1].run_id
    publish(profile, second, code())
    elsewhere = {"study": "ablations", "environment": {"code": code()}}
    write_json(profile.results / "records" / second / "run.json", elsewhere)
    plant(profile, "unlisted", "test", code())
    monkeypatch.setattr(preregistration, "STATISTICS", "Some.")
    monkeypatch.setitem(claims.CLAIMS, "beats-both", ("It beats one of them.", []))
    said = "\n".join(preregistration.disagreements(profile))
    assert f"{first} was made by other code" in said
    assert "another is no part" in said
    # of another study
    assert f"{second} is no part" in said
    assert "unlisted is no part" in said
    assert "claim beats-both is not the registered one" in said
    assert "the statistics are not" in said
    assert len(said.splitlines()) == 6


def test_what_is_not_made_yet_is_counted(profile) -> None:
    assert preregistration.progress(profile) == ""
    preregistration.freeze(profile)
    runs = [cfg.run_id for cfg in profile.notebooks["good"]]
    publish(profile, runs[0], code())
    assert f"1 of {len(runs)} runs and 0 of 0 trees are made" in preregistration.progress(profile)


def test_a_receipt_without_an_environment_and_a_damaged_instance_are_said(profile) -> None:
    preregistration.freeze(profile)
    run = profile.notebooks["good"][0].run_id
    publish(profile, run, code())
    write_json(profile.results / "records" / run / "run.json", {"study": "main"})
    assert "made by other code" in "".join(preregistration.disagreements(profile))
    plant(profile, "tree", "test", code())
    (profile.root / "results" / "schedules" / "tree" / "instance.json").write_text("{")
    with pytest.raises(UserError, match=r"instance.json cannot be read"):
        preregistration.disagreements(profile)


def test_another_profile_is_not_bound(profile) -> None:
    preregistration.freeze(replace(profile, name="u"))
    publish(profile, "another", "0")
    assert preregistration.disagreements(profile) == []
