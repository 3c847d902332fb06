"""Several processes in one folder, full disks and folders of somebody else: nothing is corrupt, and one sentence."""

from __future__ import annotations

import os
import random
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faulty import KEY, Faulty
from harness import Nursery
from test_kills import ADAPT, RUN, TREE, Victim, hashes, of_bundle, of_run, of_tree

from nslora.editor.replay import Recordings, Request
from nslora.model import checkpoints
from nslora.runs.store import Store

NOBODY = 65534


def test_four_at_once_record_and_memoise(kind, nursery: Nursery, editor: Faulty, tmp_path) -> None:
    """All ask for the same replies and the same values, and each gets whole ones."""
    trial = kind("four processes at once: recordings, memos, conversions")
    environment = {"NSLORA_EDITOR_KEY": KEY, "NSLORA_EDITOR_BUDGET": ""}

    def check(n: int) -> None:
        folder = tmp_path / str(n)
        (folder / "tmp").mkdir(parents=True)
        task = {"what": "record", "folder": str(folder), "url": editor.url, "requests": 20}
        assert nursery.run(*[task | {"environment": environment}] * 4) == [0] * 4
        recordings = Recordings(folder / "recordings", "replay", "remote", "gpt")
        for seed in range(20):
            assert recordings.find(Request("You edit prompts.", "Improve this.", seed))
            value = Store(folder, folder / "runs").memo(f"key-{seed}", dict)
            assert value == {"seed": seed, "text": "x" * 9999}
        assert not list(folder.rglob("*.part"))

    trial.each(range(trial.number(6)), check)


def test_four_at_once_convert_once(kind, nursery: Nursery, tmp_path) -> None:
    if not checkpoints.is_cached("smollm2-135m"):
        pytest.skip("the smallest default is not downloaded")
    trial = kind("four processes at once: recordings, memos, conversions")
    want = hashes(checkpoints.folder("smollm2-135m"))
    source = checkpoints.gguf("smollm2-135m")
    cache = tmp_path / "cache"
    cache.mkdir()
    (tmp_path / "tmp").mkdir()
    os.symlink(source, cache / source.name)
    task = {"what": "convert", "weights": "smollm2-135m", "folder": str(tmp_path)}
    with trial():
        assert nursery.run(*[task | {"environment": {"NSLORA_CACHE": str(cache)}}] * 4) == [0] * 4
        assert hashes(cache / source.stem) == want


def task_of(what: str, settings: dict[str, Any], model: Path, editor: Faulty) -> dict[str, Any]:
    chosen = {**settings, "backbone": str(model), "editor_url": editor.url}
    environment = {"NSLORA_EDITOR_KEY": KEY}
    return {"what": what, "settings": chosen, "environment": environment}


def test_the_second_adapt_to_a_folder_says_so(kind, nursery, model, editor, tmp_path) -> None:
    trial = kind("two processes at once: `adapt` to one folder")
    victim = Victim(nursery, tmp_path, task_of("adapt", ADAPT, model, editor), of_bundle)
    victim.undisturbed()

    def check(n: int) -> None:
        task = victim.prepare(f"twice-{n}")
        folder = Path(task["folder"])
        statuses = nursery.run(task, task)
        assert sorted(statuses) == [0, 2], victim.said(task)
        assert of_bundle(folder) == victim.want
        log = victim.said(task)
        assert "another process adapts to" in log or "is not empty" in log

    trial.each(range(trial.number(4)), check)


def test_two_runs_of_one_folder_make_one(kind, nursery, model, editor, tmp_path) -> None:
    trial = kind("two processes at once: `run` in one folder")
    victim = Victim(nursery, tmp_path, task_of("run", RUN, model, editor), of_run)
    victim.undisturbed()

    def check(n: int) -> None:
        task = victim.prepare(f"twice-{n}")
        assert nursery.run(task, task) == [0, 0], victim.said(task)
        assert of_run(Path(task["folder"])) == victim.want

    trial.each(range(trial.number(4)), check)


@pytest.mark.parametrize(
    ("what", "settings", "same", "full"),
    [("run", RUN, of_run, 24), ("tree", TREE, of_tree, 24), ("adapt", ADAPT, of_bundle, 24)],
    ids=["run", "tree", "adapt"],
)
def test_a_full_disk_is_one_sentence(
    kind, nursery, model, editor, tmp_path, what, settings, same, full
) -> None:
    """Writing fails from some size on, at every writer; with room again, the work goes on."""
    trial = kind("a full disk, a folder that cannot be written")
    victim = Victim(nursery, tmp_path, task_of(what, settings, model, editor), same)
    victim.undisturbed()
    sizes = sorted(p.stat().st_size for p in (tmp_path / "whole").rglob("*") if p.is_file())
    chance = random.Random(f"disk of {what}")

    def check(n: int) -> None:
        task = victim.prepare(f"full-{n}")
        # some writer needs more, and the sentence itself has room
        largest = max(2000, chance.choice(sizes) - 1)
        status = nursery.run(task | {"largest_file": largest})
        assert_one_sentence(victim, task, status)
        assert nursery.run(task) == [0] or status == [0], victim.said(task)
        assert same(Path(task["folder"])) == victim.want
        shutil.rmtree(task["folder"])

    trial.each(range(trial.number(full)), check)


def assert_one_sentence(victim: Victim, task: dict[str, Any], status: list[int]) -> None:
    """Where the task has not succeeded, it says why and shows no traceback."""
    said = victim.said(task)
    assert status in ([0], [2]), said
    assert "Traceback" not in said
    if status == [2]:
        last = said.rstrip("\n").split("\n")[-1]
        # a user who is nobody may not look into the cache of another, either
        assert re.search("cannot (write|read)", last) and last.endswith("."), said


@pytest.fixture
def public(model: Path) -> Iterator[Path]:
    """A folder that nobody can look into, which pytest's own are not, with the tiny model."""
    folder = Path(tempfile.mkdtemp(prefix="nslora-torture-"))
    folder.chmod(0o755)
    shutil.copytree(model, folder / "tiny")
    for path in (folder / "tiny").iterdir():
        path.chmod(0o644)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("what", ["run", "tree", "adapt"])
def test_a_folder_of_somebody_else_is_one_sentence(kind, nursery, public, editor, what) -> None:
    """The root user may write anywhere, so its process becomes nobody's."""
    trial = kind("a full disk, a folder that cannot be written")
    settings = {"run": RUN, "tree": TREE, "adapt": ADAPT}[what]
    task = task_of(what, settings, public / "tiny", editor)
    victim = Victim(nursery, public, task, of_run)
    user = {"user": NOBODY} if os.geteuid() == 0 else {}

    def check(closed: str) -> None:
        task = victim.prepare(f"{what}-{closed}")
        folder = Path(task["folder"])
        # all but one folder are everybody's
        for path in (folder, folder / "tmp"):
            path.chmod(0o777)
        place = folder / closed
        place.mkdir(exist_ok=True)
        place.chmod(0o555)
        status = nursery.run(task | user)
        place.chmod(0o755)
        assert status == [2], victim.said(task)
        assert_one_sentence(victim, task, status)

    places = {"run": ("results", "runs"), "tree": ("results", "runs", "work"), "adapt": (".",)}
    trial.each(places[what], check)


def test_a_useless_cache_is_one_sentence(kind, nursery, tmp_path) -> None:
    trial = kind("a full disk, a folder that cannot be written")
    (tmp_path / "tmp").mkdir()
    task = {"what": "convert", "weights": "smollm2-135m", "folder": str(tmp_path)}

    def check(environment: dict[str, str]) -> None:
        status = nursery.run(task | {"environment": environment})
        said = (tmp_path / "log.txt").read_text()
        assert status == [2] and "Traceback" not in said, said
        assert "set NSLORA_CACHE to another folder." in said

    (tmp_path / "file").write_text("")
    places = ({"NSLORA_CACHE": "/dev/null"}, {"HOME": "/dev/null", "NSLORA_CACHE": ""})
    trial.each((*places, {"NSLORA_CACHE": str(tmp_path / "file" / "cache")}), check)
