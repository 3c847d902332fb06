"""`nslora reproduce` killed in the middle of a notebook, called twice at once, and with a key to keep."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from faulty import Faulty
from project import Project

from nslora.experiments import grid
from nslora.runs.store import STATE

CANARY = "sk-canary-7f3b91c2d5"
# by name: what is there when it is killed, and never before
POINTS: dict[str, Callable[[Path], bool]] = {
    "while a job starts": lambda root: bool(list(root.glob("runs/t/logs/*.log"))),
    "mid-notebook, in its first run": lambda root: bool(list(root.glob(f"runs/t/runs/*/{STATE}"))),
    "mid-notebook, between runs": lambda root: bool(grid.load("t", root).finished),
    "before the report": lambda root: bool(list(root.glob("runs/t/jobs/good-*.json"))),
}


@pytest.fixture(scope="module")
def undisturbed(model, editor: Faulty, tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project that was reproduced in peace, with a key that nothing may show."""
    project = Project(tmp_path_factory.mktemp("undisturbed") / "project", model, editor.url)
    process = project.begin(NSLORA_EDITOR_KEY=CANARY)
    shown = []
    while process.poll() is None:
        shown += [" ".join(one.cmdline()) for one in project.alive() if psutil.pid_exists(one.pid)]
        time.sleep(0.5)
    shown.append(process.communicate()[0])
    assert process.returncode == 0, shown[-1][-3000:]
    assert CANARY not in "".join(shown)
    return project


def test_reproduce_goes_on_after_every_kill(
    kind, undisturbed: Project, model, editor, tmp_path
) -> None:
    kills = kind("SIGKILL: `reproduce`, in the middle of its notebooks")
    chance = random.Random("reproduce")
    names = chance.sample(list(POINTS), len(POINTS)) * 3

    def check(n: int) -> None:
        project = Project(tmp_path / f"killed-{n}", model, editor.url)
        for point in names[2 * n : 2 * n + 2]:
            kills.tried += point != names[2 * n]
            process = project.begin()
            end = time.monotonic() + 200
            while not POINTS[point](project.root) and process.poll() is None:
                assert time.monotonic() < end, f"never {point}"
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 1))
            project.killed(process)
        project.reproduce()
        assert project.records() == undisturbed.records()
        made = [entry["run"] for entry in grid.load("t", project.root).finished]
        assert len(made) == len(set(made)), "a finished run was made again"

    kills.each(range(kills.number(4)), check)


def test_two_at_once_make_everything_once(
    kind, undisturbed: Project, model, editor, tmp_path
) -> None:
    trial = kind("two processes at once: `reproduce` in one folder")
    with trial():
        project = Project(tmp_path / "twice", model, editor.url)
        both = [project.begin(), project.begin()]
        said = [process.communicate(timeout=500)[0] for process in both]
        assert [process.returncode for process in both] == [0, 0], said
        assert project.records() == undisturbed.records()
        made = [entry["run"] for entry in grid.load("t", project.root).finished]
        assert len(made) == len(set(made)) == 2


def test_no_file_holds_the_key(kind, undisturbed: Project) -> None:
    secrets = kind("a key in files, logs, notebooks, recordings, process list")

    def check(path: Path) -> None:
        assert CANARY.encode() not in path.read_bytes()

    paths = [path for path in undisturbed.root.rglob("*") if path.is_file()]
    assert any(path.suffix == ".ipynb" for path in paths)
    assert any("recordings" in path.parts for path in paths)
    secrets.each(paths, check)
