"""Jobs on a real dask scheduler with real workers; only the runs themselves are stand-ins."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from distributed import LocalCluster
from toy import RUNS, make

from nslora.experiments import cluster, grid
from nslora.types import UserError


@contextmanager
def scheduler(**options: Any) -> Iterator[str]:
    """The address of a scheduler on loopback that has one worker of one thread."""
    local: Any = LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", **options)
    with local:
        yield local.scheduler_address


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A scheduler whose worker has a GPU to give."""
    with scheduler(resources={"GPU": 1}) as address:
        yield address


def test_workers_make_every_job_once_and_the_report_comes_last(
    tmp_path: Path, address: str
) -> None:
    make(tmp_path, good=(RUNS,), bad=("1 / 0",))
    profile, said = grid.load("t", tmp_path), list[str]()
    good, bad, report = grid.jobs(profile)
    assert cluster.reproduce(profile, address, gpu=True, say=said.append) == [bad.name]
    assert [job.done() for job in (good, bad, report)] == [True, False, True]
    assert said.index(f"{good.name}: done") < said.index(f"{report.name}: started")
    # a job that fails is named with its last words
    assert any("FAILED" in line and "ZeroDivisionError" in line for line in said)

    stamps = {job.record: job.record.stat().st_mtime_ns for job in (good, report)}
    assert cluster.reproduce(profile, address, say=said.append) == [bad.name]
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps


def test_a_job_waits_for_a_free_gpu(tmp_path: Path) -> None:
    make(tmp_path, report=False, good=(RUNS,))
    profile = grid.load("t", tmp_path)
    with scheduler() as plain:
        call = {"address": plain, "gpu": True, "say": lambda line: None}
        waiting = threading.Thread(target=cluster.reproduce, args=(profile,), kwargs=call)
        waiting.start()
        waiting.join(timeout=2)
        assert waiting.is_alive() and not any(job.done() for job in grid.jobs(profile))
        options = [
            "--nthreads",
            "1",
            "--resources",
            "GPU=1",
            "--no-dashboard",
            "--local-directory",
            str(tmp_path),
        ]
        command = [sys.executable, "-m", "dask", "worker", plain, *options]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as worker:
            waiting.join(timeout=90)
            worker.terminate()
    assert all(job.done() for job in grid.jobs(profile))


def test_without_a_scheduler_there_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(tmp_path, good=(RUNS,))
    monkeypatch.setattr(cluster, "WAIT_S", 1)
    for address in ("tcp://127.0.0.1:9", "nonsense"):
        with pytest.raises(UserError, match="no dask scheduler answers at"):
            cluster.reproduce(grid.load("t", tmp_path), address)
