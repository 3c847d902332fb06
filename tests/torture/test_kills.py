"""SIGKILL at named points and at random instants: what goes on ends with the same records, and leaves nothing."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from faulty import KEY, Faulty
from harness import Kind, Nursery

from nslora.disk import damaged, digest
from nslora.model import checkpoints
from nslora.runs.store import STATE, read_json, read_jsonl

TIMES = {"wall_s", "saved_s", "work_s", "moves_s", "peak_mb"}
# of what is written move by move, all but seconds
SAME = ("steps.jsonl", "hidden.jsonl", "scores.csv", "remade.jsonl")
# both kinds of moves in a row and by turns
RUN = {"method": "fixed:SNNS", "moves": 4}
TREE = {"method": "neurosymbolic", "moves": 2}
ADAPT = {"method": "fixed:SN", "moves": 2, "returned": "tuned", "max_new_tokens": 8}
POINTS = ("rename", "rename done", "batch", "adapter", "adapter done", "edit", "edits")


# ---- what must be the same


def record(folder: Path) -> dict[str, Any]:
    """Return what of a run's record does not depend on time."""
    assert damaged(folder) == ""
    receipt = read_json(folder / "run.json")
    receipt["cost"] = {key: n for key, n in receipt["cost"].items() if key not in TIMES}
    editor = receipt["editor"]
    # what an interrupted process was answered is replayed
    asked = editor.pop("calls") + editor.pop("replayed")
    receipt["editor"] = editor | {"seconds": 0, "requests": asked}
    # own data have a folder
    receipt["config"]["task"] = Path(receipt["config"]["task"]).name
    steps = [row["step"] for row in read_jsonl(folder / "clock.jsonl")]
    return {name: (folder / name).read_bytes() for name in SAME} | {"run": receipt, "clock": steps}


def of_run(folder: Path) -> Any:
    """Return the one record of a run's folder."""
    assert not list(folder.rglob(STATE))
    (path,) = (folder / "results" / "records").iterdir()
    return record(path)


def of_tree(folder: Path) -> Any:
    """Return the nodes of a tree without their seconds."""
    tree = folder / "results" / "tree"
    untimed = ("seconds", "sha256")
    nodes = [
        {key: value for key, value in node.items() if key not in untimed}
        for node in read_jsonl(tree / "nodes.jsonl")
    ]
    return nodes, read_json(tree / "instance.json")


def of_bundle(folder: Path) -> Any:
    """Return what of a bundle does not depend on time."""
    out = folder / "out"
    assert damaged(out / "adapter") == ""
    assert not list(folder.glob(".out*"))
    # a report tells seconds
    timed = ("report.html",)
    files = {
        path.relative_to(out).as_posix(): digest(path)
        for path in out.rglob("*")
        if path.is_file() and path.parent.name != "record" and path.name not in timed
    }
    return files, record(out / "record")


# ---- killing


@dataclass
class Victim:
    """A task that is killed, again and again, until it is let to its end.

    Attributes:
        same: what of its folder must be as if it had not been disturbed.
    """

    nursery: Nursery
    root: Path
    task: dict[str, Any]
    same: Callable[[Path], Any]
    want: Any = None
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)

    def prepare(self, name: str) -> dict[str, Any]:
        """Return the task in a new folder."""
        folder = self.root / name
        (folder / "tmp").mkdir(parents=True)
        rows = [{"question": f"Mood {n}?", "answer": ("good", "bad")[n % 2]} for n in range(12)]
        (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return self.task | {"folder": str(folder)}

    def undisturbed(self) -> None:
        """Do the task without a kill: what comes out, how long it takes, how often it passes each point."""
        task = self.prepare("whole")
        counts = Path(task["folder"]) / "counts.json"
        started = time.monotonic()
        assert self.nursery.run(task | {"counts": str(counts)}) == [0], self.said(task)
        self.seconds = time.monotonic() - started
        self.want = self.same(Path(task["folder"]))
        self.counts = read_json(counts)

    def said(self, task: dict[str, Any]) -> str:
        """Return the last of what the task's process said."""
        return (Path(task["folder"]) / "log.txt").read_text(errors="replace")[-2000:]

    def kill(self, kind: Kind, name: str, chance: random.Random) -> None:
        """Kill the task twice, at a point and at an instant; then let it end, and compare."""
        task = self.prepare(name)
        folder = Path(task["folder"])
        point = chance.choice([p for p in POINTS if self.counts.get(p)])
        number = chance.randint(1, self.counts[point])
        delay = chance.uniform(0.1, 1.0) * self.seconds
        # the second kill is a case of its own
        kind.tried += 1
        kind(f"{name}: {point} {number}, then {delay:.2f} s")
        status = self.nursery.run(task | {"point": (point, number)})
        assert status == [-signal.SIGKILL], (status, self.said(task))
        assert self.after_instant(task, delay) in (0, 2, -signal.SIGKILL), self.said(task)
        status = self.nursery.run(task)
        # where it was killed when only cleaning was left, there is nothing to do
        over = status == [2] and "is not empty; choose a new one" in self.said(task)
        assert status == [0] or over, self.said(task)
        assert self.same(folder) == self.want
        done = (folder / "moves.txt").read_text().split("\n")[:-1]
        assert len(done) == len(set(done)), f"moves were made again: {done}"
        assert not list((folder / "tmp").iterdir()), "something is left in the temporary folder"
        shutil.rmtree(folder)

    def after_instant(self, task: dict[str, Any], delay: float) -> int:
        """Kill the task's process after so many seconds, unless it has ended by then."""
        (pid,) = self.nursery.begin(task)
        time.sleep(delay)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        return self.nursery.end()[0]


@pytest.mark.parametrize(
    ("what", "settings", "same", "full"),
    [
        ("run", RUN, of_run, 12),
        ("tree", TREE, of_tree, 9),
        ("adapt", ADAPT, of_bundle, 7),
    ],
    ids=["run", "tree", "adapt"],
)
def test_what_was_killed_ends_as_if_it_had_not_been(
    kind, nursery, model, editor: Faulty, tmp_path, what, settings, same, full
) -> None:
    chosen = {**settings, "backbone": str(model), "editor_url": editor.url}
    environment = {"NSLORA_EDITOR_KEY": KEY}
    task = {"what": what, "settings": chosen, "environment": environment}
    victim = Victim(nursery, tmp_path, task, same)
    victim.undisturbed()
    chance = random.Random(f"kills of {what}")
    kills = kind(f"SIGKILL: `{what}`, twice at a point and at an instant")
    kills.each(range(kills.number(full)), lambda n: victim.kill(kills, f"killed-{n}", chance))


# ---- conversions and servers


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache that has the smallest default as it was downloaded, not converted."""
    if not checkpoints.is_cached("smollm2-135m"):
        pytest.skip("the smallest default is not downloaded")
    source = checkpoints.gguf("smollm2-135m")
    (tmp_path / "cache").mkdir()
    os.symlink(source, tmp_path / "cache" / source.name)
    (tmp_path / "tmp").mkdir()
    return tmp_path / "cache"


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: digest(path) for path in folder.iterdir()}


def test_a_killed_conversion_is_made_anew(kind, nursery: Nursery, cache: Path) -> None:
    kills = kind("SIGKILL: a conversion of weights")
    want = hashes(checkpoints.folder("smollm2-135m"))
    chance = random.Random("conversions")
    environment = {"NSLORA_CACHE": str(cache)}
    task = {"what": "convert", "weights": "smollm2-135m", "folder": str(cache.parent)}
    task |= {"environment": environment}
    place = cache / checkpoints.converted_path("smollm2-135m").name

    def check(n: int) -> None:
        (pid,) = nursery.begin(task)
        # once it is at work
        started = time.monotonic()
        while not list(cache.glob("*.new/*")) and time.monotonic() < started + 60:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 10))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        status = nursery.end()
        assert place.is_dir() == (status == [0])

    kills.each(range(kills.number(4)), check)
    assert nursery.run(task) == [0]
    assert hashes(place) == want
    assert {path.suffix for path in cache.iterdir()} == {".gguf", ".lock", ""} | {place.suffix}


def test_a_server_that_is_starting_dies_with_its_parent(kind, nursery: Nursery, tmp_path) -> None:
    if not checkpoints.is_cached("smollm2-135m"):
        pytest.skip("the smallest default is not downloaded")
    kills = kind("SIGKILL: a process whose editor server starts")
    chance = random.Random("servers")
    (tmp_path / "tmp").mkdir()

    def check(n: int) -> None:
        mark = {"NSLORA_TORTURED": f"{os.getpid()}-{n}"}
        engine = ("own", "llama.cpp")[n % 2]
        task = {"what": "serve", "weights": "smollm2-135m", "engine": engine}
        (pid,) = nursery.begin(task | {"folder": str(tmp_path), "environment": mark})
        time.sleep(chance.uniform(0, 8))
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        nursery.end()
        end = time.monotonic() + 60
        while marked(mark) and time.monotonic() < end:
            time.sleep(0.2)
        assert not marked(mark), "the server outlives its parent"
        assert not list((tmp_path / "tmp").iterdir())

    kills.each(range(kills.number(6)), check)


def marked(mark: dict[str, str]) -> list[psutil.Process]:
    """Return the living processes that have an environment of ours."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            if mark.items() <= process.environ().items():
                found.append(process)
    return found
