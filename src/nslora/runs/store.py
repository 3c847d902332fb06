"""Sole owner of the results folder: run folders, atomic publication, receipts.

A run writes into `<work>/<run_id>/` and is published to `<results>/records/<run_id>/` by one rename when it is
finished. A killed run leaves no record and starts again from its beginning; since runs are deterministic, it ends
with the same record as an undisturbed one.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import platform
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from nslora.config import RunConfig
from nslora.types import Scored, StepRecord

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
CACHED = (".safetensors", ".part")  # never published: weights stay out of results/


@dataclass(frozen=True)
class Store:
    """Where finished records live, and where unfinished runs and checkpoints do (git-ignored)."""

    results: Path
    work: Path

    def record(self, cfg: RunConfig) -> Path:
        """Folder of the run's finished record."""
        return self.results / "records" / cfg.run_id

    def scratch(self, cfg: RunConfig) -> Path:
        """Folder of the run's checkpoints; kept after the run, for exporting its adapter."""
        return self.work / cfg.run_id

    def done(self, cfg: RunConfig) -> bool:
        """Whether the run has a finished record here and was made (or accepted) in this working folder."""
        return (self.scratch(cfg) / "done").exists() and (self.record(cfg) / "run.json").exists()

    def accept(self, cfg: RunConfig) -> bool:
        """Count a finished record that came with the repository as done; False when there is none."""
        if not (self.record(cfg) / "run.json").exists():
            return False
        self.scratch(cfg).mkdir(parents=True, exist_ok=True)
        (self.scratch(cfg) / "done").touch()
        return True

    @contextmanager
    def alone(self, cfg: RunConfig) -> Iterator[None]:
        """Let one process at a time make the run: two notebooks may share it. The lock ends with its process."""
        self.work.mkdir(parents=True, exist_ok=True)
        with open(self.work / f"{cfg.run_id}.lock", "w") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def begin(self, cfg: RunConfig) -> Path:
        """An empty scratch folder for a run from its beginning."""
        folder = self.scratch(cfg)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def publish(self, cfg: RunConfig, names: Sequence[str]) -> Path:
        """Move the named files of the scratch folder to the run's record at once, then mark it done."""
        scratch, record = self.scratch(cfg), self.record(cfg)
        staged = record.with_name(record.name + ".part")
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir(parents=True)
        for name in names:
            shutil.copy2(scratch / name, staged / name)
        shutil.rmtree(record, ignore_errors=True)
        staged.rename(record)
        (scratch / "done").touch()
        return record

    def memo(self, key: str, compute: Callable[[], Any]) -> Any:
        """JSON value computed once per working folder, such as a frozen baseline shared by methods."""
        path = self.work / "memo" / f"{key}.json"
        if not path.exists():
            write_json(path, compute())
        return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    part.replace(path)


def append_json(path: Path, value: Any) -> None:
    """Append one JSON line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(value, ensure_ascii=False) + "\n")


def append_step(path: Path, step: StepRecord) -> None:
    """Append one move to a steps.jsonl."""
    append_json(path, asdict(step))


def write_scores(path: Path, splits: Mapping[str, Sequence[Scored]]) -> None:
    """One CSV row per final item of every split, output included."""
    with path.open("w", encoding="utf-8", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(
            ("split", "id", "need", "success", "content", "content_strict", "style", "output")
        )
        for split, scored in splits.items():
            for s in scored:
                r = s.reward
                row = (
                    split,
                    s.example.id,
                    s.example.need.value,
                    r.success,
                    r.content,
                    r.content_strict,
                    r.style,
                )
                out.writerow((*row, s.output))


def environment(threads: int, device: str, dtype: str) -> dict[str, Any]:
    """The receipt's part on what the run ran on: code revision, versions, processor, threads."""
    return {
        "revision": git("rev-parse", "HEAD"),
        "dirty": bool(
            git("status", "--porcelain", "--untracked-files=no", "--", ":/src", ":/notebooks")
        ),
        "versions": {name: version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": processor(),
        "device": device,
        "dtype": dtype,
        "threads": threads,
    }


def git(*args: str) -> str:
    """Output of a git command in the source tree, or "unknown" outside a repository."""
    done = subprocess.run(
        ("git", *args), cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def processor() -> str:
    """Model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        "unknown",
    )


def peak_megabytes() -> float:
    """Peak resident memory of this process so far, in MB (children not counted)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
