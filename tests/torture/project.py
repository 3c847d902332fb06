"""A project whose notebook makes real runs of the tiny model, and the command that reproduces it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import toy
from faulty import KEY
from harness import ROOT
from test_kills import record

from nslora.experiments import grid, jobs

CELL = """
from nslora.experiments import grid
grid.run_all(profile, NAME, backbone, seed)
"""
SETTINGS = """settings = {{ moves = 2, items = 2, test_items = 2, max_new_tokens = 6, rank = 4, \
candidates = 2, replay_pool = 6, threads = 1, rule = "lower_case", editor_url = "{url}" }}"""


class Project:
    """A folder with experiments.toml, in which `nslora reproduce` is called."""

    def __init__(self, root: Path, model: Path, url: str) -> None:
        self.root = root
        (root / "tmp").mkdir(parents=True)
        toy.make(root, good=(CELL,))
        toy.edit(root, "settings = { moves = 2 }", SETTINGS.format(url=url))
        toy.edit(root, 'backbones = ["smollm2-135m"]', f"backbones = [{str(model)!r}]")
        toy.edit(root, 'methods = ["frozen", "lora"]', 'methods = ["lora", "textgrad"]')
        toy.edit(root, 'tasks = ["facts"]', 'tasks = ["mixed"]')

    def begin(self, *more: str, **environment: str) -> subprocess.Popen[str]:
        """Start `nslora reproduce`."""
        changes = {
            "PYTHONPATH": str(ROOT / "src"),
            "NSLORA_EDITOR_KEY": KEY,
            "PROJECT": str(self.root),
            "TMPDIR": str(self.root / "tmp"),
        }
        command = [sys.executable, "-m", "nslora.cli", "reproduce", "--profile", "t", *more]
        return subprocess.Popen(
            command,
            cwd=self.root,
            env=os.environ | changes | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def reproduce(self, *more: str, **environment: str) -> str:
        """Call `nslora reproduce` to its end; return what it said."""
        process = self.begin(*more, **environment)
        said = process.communicate(timeout=500)[0]
        assert process.returncode == 0, said[-3000:]
        return said

    def alive(self) -> list[psutil.Process]:
        """Return the living processes of its jobs, wherever they hang in the process tree."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                ours = process.environ().get("PROJECT") == str(self.root)
                if ours and process.pid != os.getpid():
                    found.append(process)
        return found

    def records(self) -> dict[str, Any]:
        """Return what of its records does not depend on time."""
        folders = (self.root / "results" / "t" / "records").iterdir()
        return {path.name: record(path) for path in folders}

    def killed(self, process: subprocess.Popen[str]) -> None:
        """Kill a call; nothing of it may stay."""
        process.send_signal(signal.SIGKILL)
        process.communicate()
        end = time.monotonic() + 60
        while self.alive() and time.monotonic() < end:
            time.sleep(0.2)
        assert not self.alive(), "a process outlives the one that was killed"
        profile = grid.load("t", self.root)
        for job in grid.jobs(profile):
            private = jobs.private_folder(job)
            assert not private.exists(), f"{private} is left, with {list(private.iterdir())}"
        left = list((self.root / "tmp").iterdir())
        assert not left, f"left in the temporary directory: {left}"
