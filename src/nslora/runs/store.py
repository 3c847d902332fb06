"""Own the results folder: run folders, atomic publication, receipts.

A run writes into `<work>/<run_id>/` and is published to `<results>/records/<run_id>/` by one rename
when it is finished. A killed run leaves no record and goes on from its last finished move; since
runs are deterministic, it ends with the same record as an undisturbed one.
"""

import csv
import hashlib
import json
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock

from nslora.config import RunConfig
from nslora.disk import SUMS, damaged, saving, sealed, unsealed, write_sums

# of a record; other ones are not read
SCHEMA = 2
# where an unfinished run stands, in its scratch folder (`runs.state`)
STATE = "state.json"
# the files of a record
FILES = (
    # receipt: settings, weights, environment, final scores, cost
    "run.json",
    # one line per move, the same wherever it is computed
    "steps.jsonl",
    # how long each move took, here
    "clock.jsonl",
    # what no decision saw: needs and rules, for the reports
    "hidden.jsonl",
    # one row per scored item
    "scores.csv",
    # reusable training pairs
    "remade.jsonl",
)
# those that a run writes move by move
LINES = ("steps.jsonl", "clock.jsonl", "hidden.jsonl")
# a record holds SHA256SUMS, too; those of before have none
# of scores.csv
COLUMNS: tuple[str, ...] = (
    "split",
    "id",
    "fact",
    "need",
    "question",
    "answer",
    "success",
    "value",
    "content",
    "content_strict",
    "style",
    "output",
)
# what a run or a tree executes: packages, and modules beside them
EXECUTED = ("tasks", "model", "editor", "algorithm", "runs")
MODULES = ("config.py", "types.py", "disk.py", "experiments/schedules.py")
# whose versions a result may depend on
PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "textgrad",
    "datasets",
    "xllamacpp",
    "numpy",
    "scikit-learn",
)


@dataclass(frozen=True)
class Store:
    """Where finished records live (`results`), and unfinished runs and checkpoints (`work`)."""

    results: Path
    work: Path

    def record(self, cfg: RunConfig) -> Path:
        """Return the folder of the run's finished record."""
        return self.results / "records" / cfg.run_id

    def scratch(self, cfg: RunConfig) -> Path:
        """Return the folder of the run's checkpoints; it is kept, for exporting the adapter."""
        return self.work / cfg.run_id

    def done(self, cfg: RunConfig) -> bool:
        """Tell whether the run was made (or accepted) in this folder and its record is whole."""
        return (self.scratch(cfg) / "done").exists() and self._whole(cfg)

    def accept(self, cfg: RunConfig) -> bool:
        """Count a whole record that came with the repository as done; False when there is none."""
        if not self._whole(cfg):
            return False
        scratch = self.scratch(cfg)
        scratch.mkdir(parents=True, exist_ok=True)
        (scratch / "done").touch()
        return True

    def _whole(self, cfg: RunConfig) -> bool:
        return not missing_or_damaged(self.record(cfg))

    def alone(self, cfg: RunConfig) -> BaseFileLock:
        """Return the run's lock: two notebooks may share a run, and one at a time makes it."""
        path = self.work / f"{cfg.run_id}.lock"
        with saving(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return FileLock(path)

    def begin(self, cfg: RunConfig) -> Path:
        """Make an empty scratch folder for a run from its beginning."""
        folder = self.scratch(cfg)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def publish(self, cfg: RunConfig, whole: bool = True) -> Path:
        """Copy FILES of the scratch folder to the run's record at once, then mark the run done.

        A run that is not `whole` goes on later from its state.
        """
        scratch = self.scratch(cfg)
        record = self.record(cfg)
        # beside records/, where nobody reads a copy that was cut short
        staged = self.results / f"{cfg.run_id}.part"
        with saving(record):
            shutil.rmtree(staged, ignore_errors=True)
            staged.mkdir(parents=True)
            for name in FILES:
                shutil.copy2(scratch / name, staged / name)
            write_sums(staged)
            # killed from here on, the run is not done, and begins again
            shutil.rmtree(record, ignore_errors=True)
            record.parent.mkdir(exist_ok=True)
            staged.rename(record)
            if not whole:
                return record
            # whoever deletes the record wants the run to be made anew
            (scratch / STATE).unlink(missing_ok=True)
            (scratch / "done").touch()
        return record

    def memo(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return a JSON value that is computed once per working folder.

        Methods share a frozen baseline so. A damaged file is computed again.
        """
        path = self.work / "memo" / f"{key}.json"
        try:
            return unsealed(read_json(path))["value"]
        except (FileNotFoundError, ValueError):
            pass
        write_json(path, sealed({"value": compute()}))
        # read back, so that the first caller gets what all others get (lists for tuples)
        return unsealed(read_json(path))["value"]


def missing_or_damaged(record: Path) -> str:
    """Return the name of a file of a record that cannot be used; "" if all can."""
    for name in FILES:
        if not (record / name).exists():
            return name
    # records of before have no checksums
    return damaged(record) if (record / SUMS).exists() else ""


def write_text(path: Path, text: str) -> None:
    """Write text so that the file is either the old one or the whole new one; or raise UserError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    with saving(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(text, encoding="utf-8")
            # one step for whoever reads it
            part.replace(path)
        except OSError:
            # half a file must not fill the disk
            with suppress(OSError):
                part.unlink()
            raise


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))


def append_json(path: Path, value: Any) -> None:
    """Append one JSON line; or raise UserError."""
    with saving(path), path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Any]) -> None:
    """Write JSON lines so that the file is either the old one or the whole new one."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[Any]:
    """Read a file of JSON lines.

    Lines end at "\\n" only: `str.splitlines` would also cut strings at U+2028 and its like.
    """
    text = path.read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def write_scores(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write one CSV row per scored item; keys of a row are COLUMNS, a missing one stays empty."""
    with saving(path), path.open("w", encoding="utf-8", newline="") as file:
        # all text in quotes: a bare carriage return in a reply would end its row
        quoting = csv.QUOTE_NONNUMERIC
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n", quoting=quoting)
        table.writeheader()
        table.writerows(rows)


def read_scores(record: Path, split: str) -> dict[str, dict[str, Any]]:
    """Return the graded rows of a split, by their id."""
    with (record / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, quoting=csv.QUOTE_NONNUMERIC)
        return {row["id"]: row for row in rows if row["split"] == split}


def environment(threads: int, device: str, dtype: str) -> dict[str, Any]:
    """Return the receipt's part on what the run ran on: code, versions, processor, threads."""
    # results and prose may change
    sources = (":/src", ":/notebooks")
    changed = git("status", "--porcelain", "--untracked-files=no", "--", *sources)
    return {
        "code": code(),
        "revision": git("rev-parse", "HEAD"),
        "dirty": bool(changed),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "device": device,
        "dtype": dtype,
        "threads": threads,
    }


@cache
def code() -> str:
    """Return the SHA-256 of the files that a run or a tree executes (EXECUTED and MODULES)."""
    root = Path(__file__).parents[1]
    files = [root / name for name in MODULES]
    for package in EXECUTED:
        files += [path for path in (root / package).rglob("*") if path.is_file()]
    digest = hashlib.sha256()
    for path in sorted(files):
        # caches of Python and of linters, which git does not know
        if not any(part.startswith((".", "__pycache__")) for part in path.relative_to(root).parts):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0")
            digest.update(path.read_bytes())
    return digest.hexdigest()


def git(*args: str) -> str:
    """Return a git command's output in the source tree, or "unknown" outside a repository."""
    folder = Path(__file__).parent
    done = subprocess.run(
        ("git", *args), cwd=folder, capture_output=True, text=True, encoding="utf-8", check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def processor() -> str:
    """Return the model name of the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return platform.processor()
    # a line per core: "model name	: ..."
    model = re.search(r"^model name\s*:\s*(.+)", text, re.MULTILINE)
    return model[1].strip() if model else "unknown"


def peak_megabytes() -> float:
    """Return the peak resident memory of this process so far, in MB (children not counted)."""
    # Linux counts in kilobytes, macOS in bytes
    unit = 1024**2 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
