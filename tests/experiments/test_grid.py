"""The grid and its jobs, with real papermill, kernels, signals and stores; only the runs themselves are stand-ins."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import nbformat
import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy import BLOCK, RUNS, make, notebook

from nslora.experiments import grid, jobs
from nslora.experiments.jobs import TOKEN
from nslora.model import checkpoints
from nslora.runs.store import append_json, write_json
from nslora.types import UserError

ROOT = Path(__file__).parents[2]
BACKBONE = "smollm2-135m"


def command(*more: str) -> list[str]:
    return [sys.executable, "-m", "nslora.cli", "reproduce", "--profile", "t", *more]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT / "src")}


def reproduce(root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*more), cwd=root, env=environment(), capture_output=True, text=True, timeout=400
    )


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
            if TOKEN in (env := process.environ()) and env.get("PROJECT") == str(root):
                found.append(process.pid)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass
    return found


def test_a_clone_really_runs_then_a_second_call_does_nothing_and_reuse_takes_what_is_there(
    tmp_path,
):
    make(tmp_path, good=(RUNS,))
    profile = grid.load("t", tmp_path)
    for cfg in profile.notebooks["good"]:  # a clone has results/, not runs/
        committed = profile.store.record(cfg)
        committed.mkdir(parents=True)
        (committed / "run.json").write_text("{}")
    first = reproduce(tmp_path)
    assert first.returncode == 0, first.stderr
    assert len(made(tmp_path)) == 2
    report = nbformat.read(tmp_path / "runs/t/notebooks/09_paper.ipynb", as_version=4)
    assert "2 records" in str(report.cells[-1].outputs)

    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "runs/t/jobs").glob("*.json")}
    assert len(stamps) == 2
    assert reproduce(tmp_path).returncode == 0
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps

    shutil.rmtree(tmp_path / "runs")
    again = reproduce(tmp_path, "--reuse")
    assert again.returncode == 0, again.stderr
    assert len(made(tmp_path)) == 2


def test_a_job_is_done_until_its_notebook_its_runs_or_the_records_of_a_report_change(tmp_path):
    make(tmp_path, good=(RUNS,))
    profile = grid.load("t", tmp_path)
    job, report = grid.jobs(profile)
    for cfg in job.configs:
        scratch = profile.store.begin(cfg)
        (scratch / "run.json").write_text("{}")
        profile.store.publish(cfg, ["run.json"])
    for one in (job, report):
        write_json(one.record, {"identity": one.identity()})
        assert one.done()
    record = profile.store.record(job.configs[0]) / "run.json"
    record.write_text('{"new": 1}')
    assert job.done()
    assert not report.done()
    record.unlink()
    assert not job.done()
    record.write_text("{}")
    assert job.done()
    notebook(tmp_path, "good", RUNS + "pass")
    assert not job.done()


def test_what_papermill_calls_success_is_not_ours_and_other_jobs_go_on(tmp_path):
    make(
        tmp_path,
        dead=("import os, signal; os.kill(os.getpid(), signal.SIGKILL)",),
        exits=("import sys; sys.exit(0)", "print('never')"),
        raises=("1 / 0",),
        idle=("print('makes no runs')",),
    )
    notebook(tmp_path, "unknown", "1", parameters='profile: str = "t"')
    (tmp_path / "experiments.toml").write_text(
        (tmp_path / "experiments.toml").read_text() + BLOCK.format(name="unknown")
    )
    done = reproduce(tmp_path, "--jobs", "2")
    assert done.returncode == 1
    assert "09_paper: done" in done.stderr
    assert [p.stem for p in (tmp_path / "runs/t/jobs").glob("*.json")] == ["09_paper"]
    for name, words in {
        "dead": "Kernel died",
        "exits": "never ran",
        "raises": "ZeroDivisionError",
        "idle": "ended without the run",
        "unknown": "has no parameter 'backbone'",
    }.items():
        assert f"{name}-{BACKBONE}-s0: FAILED" in done.stderr
        assert words in (tmp_path / f"runs/t/logs/{name}-{BACKBONE}-s0.log").read_text()
        assert words in done.stderr


CHILD = """
import os, subprocess, time
subprocess.Popen(["sleep", "1000"], start_new_session=True)
Path = __import__("pathlib").Path
Path("../child.txt").write_text("started")
time.sleep(1000)
"""


def test_a_job_over_its_limit_is_killed_with_all_its_descendants(tmp_path, monkeypatch):
    monkeypatch.setenv("PROJECT", str(tmp_path))
    for minutes in (
        0.2,
        1,
        4,
    ):  # on a busy machine the first limit can strike before the child is there
        make(tmp_path, minutes=minutes, report=False, slow=(CHILD,))
        done = reproduce(tmp_path)
        assert done.returncode == 1
        assert "over its limit" in done.stderr
        assert not alive(tmp_path)
        if (tmp_path / "child.txt").exists():
            break
    assert (tmp_path / "child.txt").exists()


# Between the two runs: says so, and waits for a file, so that the test can strike.
GATE = """
    from time import sleep
    if cfg.method == "lora":
        Path("../gate.txt").touch()
        while not Path("../go.txt").exists():
            sleep(0.05)
    if not store"""


def test_killed_at_any_point_nothing_survives_and_the_job_goes_on_from_its_last_run(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("PROJECT", str(tmp_path))
    make(tmp_path, report=False, good=(RUNS.replace("\n    if not store", GATE),))

    def started() -> subprocess.Popen[str]:
        (tmp_path / "gate.txt").unlink(missing_ok=True)
        before = signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # `make test &` has it ignored, children too
        process = subprocess.Popen(
            command(), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
        )
        signal.signal(signal.SIGINT, before)
        wait_for(lambda: (tmp_path / "gate.txt").exists() or process.poll() is not None)
        return process

    def ended(process: subprocess.Popen[str], status: int) -> str:
        errors = process.communicate(timeout=60)[1]
        assert process.returncode == status, errors
        wait_for(lambda: not alive(tmp_path), 20)
        assert not list((tmp_path / "runs/t/jobs").glob("good*.json"))
        assert len(made(tmp_path)) == 1, "the finished run must not be made again"
        return errors

    first = started()
    (job,) = psutil.Process(first.pid).children()
    job.kill()
    assert "killed by signal 9" in ended(first, 1)

    second = started()
    assert "runs in another process" in reproduce(tmp_path).stderr, (
        "one job must not run twice at once"
    )
    second.send_signal(signal.SIGINT)
    assert "goes on from" in ended(second, 130)

    third = started()
    third.kill()
    ended(third, -9)

    (tmp_path / "go.txt").touch()
    last = reproduce(tmp_path)
    assert last.returncode == 0, last.stderr
    assert len(made(tmp_path)) == len(set(made(tmp_path))) == 2


@given(st.integers(1, 40), st.integers(1, 9))
def test_shards_part_the_jobs(jobs, shards):
    parts = [list(range(jobs))[i - 1 :: shards] for i in range(1, shards + 1)]
    assert sorted(sum(parts, [])) == list(range(jobs))


def test_blocks_expand_to_checked_runs(tmp_path):
    make(tmp_path, good=(RUNS,))
    block = "\n[[profiles.t.notebooks.good]]\n"
    block += 'backbones = ["b"]\ntasks = ["facts", "style"]\nrules = ["json", "bullet"]\n'
    toml = (tmp_path / "experiments.toml").read_text()
    (tmp_path / "experiments.toml").write_text(
        toml + block + 'methods = ["lora"]\nseeds = [0, 1]\nsettings = {items = 5}\n'
    )
    profile = grid.load("t", tmp_path)
    mine = [c for c in profile.notebooks["good"] if c.backbone == "b"]
    assert [(c.task, c.rule, c.seed, c.items, c.moves) for c in mine] == [
        ("facts", "end_phrase", 0, 5, 2),
        ("facts", "end_phrase", 1, 5, 2),
        *(("style", rule, seed, 5, 2) for rule in ("json", "bullet") for seed in (0, 1)),
    ]
    assert {c.lr for c in profile.notebooks["good"] if c.backbone == BACKBONE} == {1e-3}
    assert [job.name for job in grid.jobs(profile)] == [
        f"good-{BACKBONE}-s0",
        "good-b-s0",
        "good-b-s1",
        "09_paper",
    ]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("profiles.t", "profiles.other", "unknown profile 't'; choose from other"),
        ("items = 3", "itemz = 3", "unknown setting 'itemz'"),
        ('methods = ["frozen"', 'method = ["frozen"', "unknown or missing key 'method'"),
        ("seeds = [0]", "", "unknown or missing key 'seeds'"),
        ("notebooks.good", "notebooks.bad", "notebooks/bad.ipynb is missing"),
        ("[settings]", "[settings", "not valid TOML"),
    ],
)
def test_wrong_experiments_get_one_sentence(tmp_path, old, new, words):
    make(tmp_path, good=(RUNS,))
    text = (tmp_path / "experiments.toml").read_text()
    assert old in text
    (tmp_path / "experiments.toml").write_text(text.replace(old, new))
    with pytest.raises(UserError, match=words):
        grid.load("t", tmp_path)


def test_the_plan_takes_costs_from_like_runs(tmp_path):
    make(tmp_path, good=(RUNS,))
    profile = grid.load("t", tmp_path)
    lora = next(c for c in profile.notebooks["good"] if c.method == "lora")
    record = tmp_path / "results/other/records/x"
    record.mkdir(parents=True)
    like = {"task": "facts", "backbone": BACKBONE, "method": "lora", "moves": 4}
    editor = {"tokens_in": 300, "tokens_out": 100, "money": 0.5}
    run = {"run_id": "x", "config": like, "cost": {"wall_s": 60, "peak_mb": 900}, "editor": editor}
    (record / "run.json").write_text(json.dumps(run))
    row = grid.plan(profile)[0]
    assert (row["left"], row["unknown"], row["seconds"], row["tokens"]) == (2, 1, 30, 200)
    assert grid.expected(lora, [run]) == (30, 200, 0.25, 900)
    assert grid.expected(lora, []) is None
    assert grid.total([]) == grid.Cost()
    assert grid.total([grid.Cost(1, 2, 3, 4), grid.Cost(1, 2, 3, 2)]) == (2, 4, 6, 4)


def test_the_table_of_expected_costs_shows_what_is_not_known_as_missing(tmp_path):
    make(tmp_path, good=(RUNS,))
    profile = grid.load("t", tmp_path)
    size = sum(checkpoints.BACKBONES[name].bytes for name in ("smollm2-135m", "qwen2.5-coder-1.5b"))
    assert f"| good | 2 | 2 | - | - | {size / 1e9:.1f} | - | - |" in grid.expectation(profile)
    cfg = profile.notebooks["good"][1]
    record = tmp_path / "results/records" / cfg.run_id
    record.mkdir(parents=True)
    editor = {"tokens_in": 3000, "tokens_out": 1000, "money": 0.5}
    run = {
        "run_id": cfg.run_id,
        "config": asdict(cfg),
        "cost": {"wall_s": 7200, "peak_mb": 900},
        "editor": editor,
    }
    (record / "run.json").write_text(json.dumps(run))
    assert f"| good | 2 | 1 | 2.0 | 0.9 | {size / 1e9:.1f} | 4,000 | 0.50 |" in grid.expectation(
        profile
    )
    own = profile.results / "records" / cfg.run_id
    own.mkdir(parents=True)
    (own / "run.json").write_text(json.dumps(run | {"cost": {"wall_s": 3600, "peak_mb": 800}}))
    assert f"| good | 2 | 1 | 1.0 | 0.8 | {size / 1e9:.1f} | 4,000 | 0.50 |" in grid.expectation(
        profile
    ), "its own"


def test_the_job_expected_to_take_longest_starts_first(tmp_path):
    make(tmp_path, first=(RUNS,), second=(RUNS,), third=(RUNS,))
    text = (tmp_path / "experiments.toml").read_text()
    for name, seed in (("second", 1), ("third", 2)):
        head, tail = text.split(f"[[profiles.t.notebooks.{name}]]")
        text = f"{head}[[profiles.t.notebooks.{name}]]" + tail.replace(
            "seeds = [0]", f"seeds = [{seed}]", 1
        )
    (tmp_path / "experiments.toml").write_text(text)
    queue = [job for job in grid.jobs(grid.load("t", tmp_path)) if job.backbone]
    assert jobs.longest_first(queue) == queue
    for job, seconds in zip(queue[:2], (30, 90), strict=True):
        cfg = next(cfg for cfg in job.configs if cfg.method == "frozen")
        record = tmp_path / "results/other/records" / cfg.run_id
        record.mkdir(parents=True)
        run = {
            "run_id": cfg.run_id,
            "config": asdict(cfg),
            "cost": {"wall_s": seconds, "peak_mb": 1},
        }
        (record / "run.json").write_text(
            json.dumps(run | {"editor": {"tokens_in": 0, "tokens_out": 0, "money": 0}})
        )
    # the third has no record of its own: the mean of the others
    assert [job.notebook for job in jobs.longest_first(queue)] == ["second", "third", "first"]


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
