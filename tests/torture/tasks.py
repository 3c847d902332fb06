"""What the nursery forks: each task is done by a process of its own, which may kill itself at a named point."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

# imported once for all that are forked
import peft  # noqa: F401
import torch
import transformers  # noqa: F401
from tinymodel import config

import nslora
from nslora.editor import attempt, client, endpoint
from nslora.editor.client import Editor, Request
from nslora.experiments import schedules
from nslora.model import checkpoints
from nslora.model.lora import Learner
from nslora.runs.run import make_run
from nslora.runs.store import Store, write_json
from nslora.tasks import rules
from nslora.types import StepRecord, UserError

Task = dict[str, Any]
SETTINGS = {"rule": "lower_case", "seed": 1}
# what checks a rule is imported when it is first needed, and takes seconds
assert not rules.follows(rules.make("title"), "none")


# ---- tasks


def run(task: Task) -> None:
    """Make a run."""
    folder = Path(task["folder"])
    cfg = config(**SETTINGS | task["settings"])
    place = Store(folder / "results", folder / "runs")
    make_run(cfg, place, watch=watcher(folder))


def tree(task: Task) -> None:
    """Grow a tree of schedules."""
    folder = Path(task["folder"])
    cfg = config(**SETTINGS | task["settings"])
    place = Store(folder / "results", folder / "runs")
    note = noter(folder)

    def say(line: str) -> None:
        # "<run> [3/7] NS: dev ...": the node alone, once however long it took
        note(line.partition("]")[2].partition(":")[0])

    schedules.grow(cfg, folder / "results" / "tree", place, folder / "work", say)


def adapt(task: Task) -> None:
    """Adapt to own data."""
    folder = Path(task["folder"])
    cfg = config(**SETTINGS | task["settings"])
    changed = {name: getattr(cfg, name) for name in cfg.model_fields_set - {"items", "test_items"}}
    data = folder / "mine.jsonl"
    nslora.adapt(data, out=folder / "out", watch=watcher(folder), **changed)


def convert(task: Task) -> None:
    """Convert cached weights."""
    checkpoints.folder(task["weights"])


def serve(task: Task) -> None:
    """Ask a local server, which has to start first."""
    with Editor(task["weights"], threads=1, engine=task["engine"]) as editor:
        editor.complete(Request("", "Say hello.", 0, 0.0, 8))


def record(task: Task) -> None:
    """Ask the editor for the same replies as others do, and memoise the same values."""
    folder = Path(task["folder"])
    place = Store(folder / "results", folder / "runs")
    with Editor("gpt", task["url"], recordings=folder / "recordings") as editor:
        for seed in range(task["requests"]):
            reply = editor.complete(Request("You edit prompts.", "Improve this.", seed))
            value = place.memo(f"key-{seed}", lambda seed=seed: {"seed": seed, "text": "x" * 9999})
            assert reply and value["seed"] == seed


# ---- what they report


def noter(folder: Path) -> Callable[[str], None]:
    """Return a function that notes a finished move in a file that all processes of a folder share."""

    def note(line: str) -> None:
        with (folder / "moves.txt").open("a") as file:
            file.write(line.replace("\n", " ") + "\n")

    return note


def watcher(folder: Path) -> Callable[[StepRecord], None]:
    """Return a function that notes a run's finished steps by their numbers."""
    note = noter(folder)
    return lambda step: note(str(step.step))


# ---- points


def count_or_die(point: str, owner: Any, name: str, task: Task, counts: Counter[str]) -> None:
    """Have a function count its calls, and end the process by SIGKILL at the call that the task names.

    A point is "<name>" before, or "<name> done" after the call.
    """
    function = getattr(owner, name)
    wanted, number = task.get("point", ("", 0))

    def at(moment: str) -> None:
        counts[moment] += 1
        if moment == wanted and counts[moment] == number:
            os.kill(os.getpid(), signal.SIGKILL)

    @wraps(function)
    def counted(*args: Any, **kwargs: Any) -> Any:
        at(point)
        result = function(*args, **kwargs)
        at(f"{point} done")
        return result

    setattr(owner, name, counted)


def limit(task: Task) -> None:
    """Take from the process what the task says: room on disk, the right to write."""
    if size := task.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if user := task.get("user"):
        os.setgid(user)
        os.setuid(user)


def child(task: Task) -> int:
    """Do one task; return the exit status of the command line."""
    folder = Path(task["folder"])
    os.setsid()
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(task.get("environment", {}))
    tempfile.tempdir = str(folder / "tmp")
    os.environ["TMPDIR"] = tempfile.tempdir
    torch.set_num_threads(1)
    attempt.PAUSE_S = 0.0
    counts: Counter[str] = Counter()
    # between write and rename, and just after it
    for name in ("replace", "rename"):
        count_or_die("rename", os, name, task, counts)
    count_or_die("batch", Learner, "_step", task, counts)
    count_or_die("adapter", Learner, "save", task, counts)
    count_or_die("edit", endpoint, "post", task, counts)
    count_or_die("edits", client.Editor, "complete_all", task, counts)
    limit(task)
    try:
        globals()[task["what"]](task)
    except UserError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    if "counts" in task:
        write_json(Path(task["counts"]), counts)
    return 0


def main() -> None:
    """Fork a process per task of each line, and say how they end."""
    for line in sys.stdin:
        tasks = json.loads(line)
        children = []
        for task in tasks:
            pid = os.fork()
            if pid == 0:
                status = 70
                try:
                    status = child(task)
                finally:
                    if sys.exc_info()[0]:
                        traceback.print_exc()
                    sys.stderr.flush()
                    os._exit(status)
            children.append(pid)
        print(json.dumps(children), flush=True)
        ended = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
        print(json.dumps(ended), flush=True)


if __name__ == "__main__":
    main()
