"""A dask scheduler with two worker processes, one of which is killed in the middle of a job."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import toy
from distributed import LocalCluster
from harness import ROOT

from nslora.experiments import cluster, grid

# says which process is at it, then takes its time
SLOW = """
import os, time
with open(f"../at-{os.environ['WORKER']}-{seed}", "w") as file:
    file.write(NAME)
time.sleep(3)
"""


@contextmanager
def worker(address: str, name: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A dask worker without a nanny: a process that can be killed for good."""
    options = ["--no-nanny", "--no-dashboard", "--nthreads", "1", "--name", name]
    environment = os.environ | {"WORKER": name, "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-m", "dask", "worker", address, *options]
    command += ["--local-directory", str(folder)]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def address() -> Iterator[str]:
    with LocalCluster(n_workers=0, dashboard_address=":0") as local:
        yield local.scheduler_address  # pyright: ignore[reportAttributeAccessIssue]


def test_a_killed_worker_changes_nothing(kind, address: str, tmp_path: Path) -> None:
    kills = kind("SIGKILL: a worker of a cluster, in the middle of a job")

    def check(n: int) -> None:
        root = tmp_path / str(n)
        root.mkdir()
        toy.make(root, good=(SLOW, toy.RUNS))
        toy.edit(root, "seeds = [0]", "seeds = [0, 1, 2]")
        profile, said = grid.load("t", root), list[str]()
        ended: list[list[str]] = []

        def reproduce() -> None:
            ended.append(cluster.reproduce(profile, address, say=said.append))

        with ExitStack() as stack:
            first = stack.enter_context(worker(address, "first", root))
            stack.enter_context(worker(address, "second", root))
            running = threading.Thread(target=reproduce)
            running.start()
            end = time.monotonic() + 120
            while not list(root.glob("at-first-*")):
                assert time.monotonic() < end, said
                time.sleep(0.1)
            first.kill()
            running.join(300)
        assert ended == [[]], said
        assert all(job.done() for job in grid.jobs(profile))
        made = (root / "made.txt").read_text().split()
        # six runs, each finished once: the killed job had not finished any
        assert len(made) == len(set(made)) == 6
        at = {path.name.rpartition("-")[2] for path in root.glob("at-second-*")}
        assert at >= {path.name.rpartition("-")[2] for path in root.glob("at-first-*")}

    kills.each(range(kills.number(2)), check)
