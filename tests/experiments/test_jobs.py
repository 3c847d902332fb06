"""Jobs with real papermill, kernels, signals and stores; only the runs themselves are stand-ins."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import nbformat
import psutil
from toy import BLOCK, RUNS, edit, finish, make, notebook

from nslora.experiments import grid, jobs
from nslora.experiments.jobs import TOKEN
from nslora.experiments.notebook import clean
from nslora.runs.store import append_json

ROOT = Path(__file__).parents[2]
BACKBONE = "smollm2-135m"
COMMAND = [sys.executable, "-m", "nslora.cli", "reproduce", "--profile", "t"]


def begin(root: Path, *more: str) -> subprocess.Popen[str]:
    """Start `nslora reproduce` in a project folder."""
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src"), "PROJECT": str(root)}
    # `make test &` has SIGINT ignored, and children inherit that
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*COMMAND, *more], cwd=root, env=environment, stderr=subprocess.PIPE, text=True
    )
    signal.signal(signal.SIGINT, before)
    return process


def reproduce(root: Path, *more: str, status: int = 0) -> str:
    """Run `nslora reproduce` to its end; return what it said."""
    process = begin(root, *more)
    errors = process.communicate(timeout=400)[1]
    assert process.returncode == status, errors
    return errors


def made(root: Path) -> list[str]:
    path = root / "made.txt"
    return path.read_text().splitlines() if path.exists() else []


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.05)


def alive(root: Path) -> list[int]:
    """Processes of jobs of this project folder, wherever they hang in the process tree."""
    found = []
    for process in psutil.process_iter():
        try:
            env = process.environ()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        if TOKEN in env and env.get("PROJECT") == str(root):
            found.append(process.pid)
    return found


def stamps(root: Path) -> dict[Path, int]:
    paths = [*root.glob("runs/t/jobs/*.json"), *root.glob("results/t/notebooks/*")]
    return {path: path.stat().st_mtime_ns for path in paths}


FAILURES = {
    "dead": "Kernel died",
    "exits": "never ran",
    "idle": "ended without the run",
    "unknown": "has no parameter 'backbone'",
}


def test_a_clone_really_runs_and_what_papermill_calls_success_is_not_ours(tmp_path):
    make(
        tmp_path,
        good=(RUNS,),
        dead=("import os, signal; os.kill(os.getpid(), signal.SIGKILL)",),
        exits=("import sys; sys.exit(0)", "print('never')"),
        idle=("print('makes no runs')",),
    )
    notebook(tmp_path, "unknown", "1", parameters='profile: str = "t"')
    with (tmp_path / "experiments.toml").open("a") as file:
        file.write(BLOCK.format(name="unknown"))
    # runs of its own: the others end without theirs
    block = BLOCK.format(name="good")
    edit(tmp_path, block, block.replace("seeds = [0]", "seeds = [1]"))
    profile = grid.load("t", tmp_path)
    for cfg in profile.notebooks["good"]:  # a clone has results/, not runs/
        finish(replace(profile.store, work=tmp_path / "elsewhere"), cfg)

    # failures are told with their reason, and the other jobs go on
    errors = reproduce(tmp_path, "--jobs", "2", status=1)
    for name, words in FAILURES.items():
        assert f"{name}-{BACKBONE}-s0: FAILED" in errors
        assert words in errors
        assert words in (tmp_path / f"runs/t/logs/{name}-{BACKBONE}-s0.log").read_text()
    assert len(made(tmp_path)) == 2
    done = {f"good-{BACKBONE}-s1", "09_paper"}
    assert {path.stem for path in tmp_path.glob("runs/t/jobs/*.json")} == done
    assert {path.stem for path in tmp_path.glob("results/t/notebooks/*")} == done
    check_published(tmp_path / "results/t/notebooks/09_paper.ipynb", tmp_path)

    # without what fails, a second call does nothing
    toml = (tmp_path / "experiments.toml").read_text()
    for name in FAILURES:
        toml = toml.replace(BLOCK.format(name=name), "")
    (tmp_path / "experiments.toml").write_text(toml)
    before = stamps(tmp_path)
    assert len(before) == 6
    reproduce(tmp_path)
    assert stamps(tmp_path) == before


def check_published(path: Path, root: Path) -> None:
    """The executed report: outputs as they were, nothing of this machine or this moment."""
    text = path.read_text()
    nb = nbformat.reads(text, as_version=4)
    nbformat.validate(nb)
    outputs = json.dumps(nb.cells[-1].outputs)
    assert "2 records in ." in outputs
    assert "<object>" in outputs
    assert "image/png" in outputs
    for trace in (str(root), "papermill", " at 0x", "execution_time", "svg"):
        assert trace not in text
    assert [cell.id for cell in nb.cells] == ["0", "1", "2"]
    page = path.with_suffix(".html").read_text()
    assert "2 records in ." in page
    assert "data:image/png;base64" in page
    assert len(page) < 60_000


def test_cleaning_keeps_what_means_something(tmp_path):
    cell = nbformat.v4.new_code_cell("x")
    cell.metadata |= {"tags": ["a"], "execution": {"iopub.execute_input": "2026"}}
    widget = "application/vnd.jupyter.widget-view+json"
    picture = f"iVBOR{tmp_path}/b"  # may hold any letters
    data = {"image/svg+xml": "<svg>", widget: {"model_id": "1"}, "image/png": picture}
    warning = f"one\n{tmp_path}/b\n/tmp/ipykernel_12/34.py:1: UserWarning"
    cell.outputs = [
        nbformat.v4.new_output("display_data", data),
        nbformat.v4.new_output("stream", text=warning, name="stderr"),
    ]
    nb = nbformat.v4.new_notebook(cells=[cell], metadata={"papermill": {"duration": 3}})
    cleaned = nbformat.reads(clean(nb, tmp_path), as_version=4)
    assert cleaned.metadata == {}
    assert cleaned.cells[0].metadata == {"tags": ["a"]}
    assert cleaned.cells[0].outputs[0].data == {"image/png": picture}
    assert cleaned.cells[0].outputs[1].text == "one\n./b\ncell:1: UserWarning"


def test_cleaning_reads_pictures_once(tmp_path):
    """A notebook's pictures are words of megabytes: read from every letter on, they took minutes."""
    picture = "iVBORw0KGgo" * 20_000
    outputs = [nbformat.v4.new_output("display_data", {"image/png": picture})]
    cell = nbformat.v4.new_code_cell("x", outputs=outputs)
    started = time.monotonic()
    cleaned = clean(nbformat.v4.new_notebook(cells=[cell]), tmp_path)
    assert time.monotonic() - started < 2
    assert picture in cleaned


CHILD = """
import subprocess, time
from pathlib import Path
subprocess.Popen(["sleep", "1000"], start_new_session=True)
Path("../child.txt").write_text("started")
time.sleep(1000)
"""


def test_a_job_over_its_limit_is_killed_with_all_its_descendants(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    make(tmp_path, report=False, slow=(CHILD,))
    profile, said = grid.load("t", tmp_path), list[str]()
    job = grid.Job(replace(profile, limit_s=1), "slow", BACKBONE)
    # on a busy machine the limit would strike before the child is there
    late = jobs.Running.late.fget
    assert late
    child = tmp_path / "child.txt"
    patient = property(lambda running: late(running) and child.exists())
    monkeypatch.setattr(jobs.Running, "late", patient)
    assert jobs.run_jobs([job], 1, False, said.append) == [job.name]
    assert "over its limit of 1 s" in said[-1]
    assert not alive(tmp_path)


# Between the two runs: says so, and waits for a file, so that the test can strike.
GATE = """
    from pathlib import Path
    from time import sleep
    if cfg.method == "lora":
        Path("../gate.txt").touch()
        while not Path("../go.txt").exists():
            sleep(0.05)
    if not store"""


def test_killed_at_any_point_nothing_survives_and_the_job_goes_on_from_its_last_run(tmp_path):
    make(tmp_path, report=False, good=(RUNS.replace("\n    if not store", GATE),))
    gate = tmp_path / "gate.txt"
    (job,) = grid.jobs(grid.load("t", tmp_path))

    def at_gate(process: subprocess.Popen[str]) -> subprocess.Popen[str]:
        wait_for(lambda: gate.exists() or process.poll() is not None)
        gate.unlink()
        return process

    def ended(process: subprocess.Popen[str], status: int) -> str:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == status, errors
        assert not job.record.exists()
        assert len(made(tmp_path)) == 1, "the finished run must not be made again"
        return errors

    first = at_gate(begin(tmp_path))
    psutil.Process(first.pid).children()[0].kill()
    assert "killed by signal 9" in ended(first, 1)
    assert not alive(tmp_path)

    # a second call waits for the first one's end, then does what is left
    second = at_gate(begin(tmp_path))
    third = begin(tmp_path)
    assert third.stderr
    assert "another process reproduces 't'" in third.stderr.readline()
    second.send_signal(signal.SIGINT)
    assert "goes on from" in ended(second, 130)
    at_gate(third)
    third.kill()
    ended(third, -9)
    wait_for(lambda: not alive(tmp_path), 20)
    assert not jobs.private_folder(job).exists()

    (tmp_path / "go.txt").touch()
    reproduce(tmp_path)
    assert len(made(tmp_path)) == len(set(made(tmp_path))) == 2
    assert not jobs.private_folder(job).exists()


def test_a_run_that_two_jobs_share_counts_once(tmp_path):
    make(tmp_path, good=(RUNS,), other=(RUNS,))
    profile, said = grid.load("t", tmp_path), []
    queue = [job for job in grid.jobs(profile) if job.backbone]
    progress = jobs.Progress(queue, 2, reuse=False, say=said.append)
    first, second = profile.notebooks["good"]
    assert progress.total == 2
    profile.work.mkdir(parents=True)
    for job, cfg in ((queue[0], first), (queue[-1], first), (queue[-1], second)):
        entry = {"job": job.name, "run": cfg.run_id, "seconds": 60.0, "success": 1.0}
        append_json(profile.work / "progress.jsonl", entry)
        progress.show()
    assert [line.split("]")[0] for line in said] == ["[1/2", "[2/2"]
    assert said[-1].endswith("about 0 min left")
