"""Run jobs: each executes one notebook in an operating-system process of its own.

A job is done when our own record says so. That record is written last, after every cell ran and
every run of the job has its record. A killed job goes on from the last
finished move of its runs.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any, cast

import psutil
from filelock import BaseFileLock, FileLock, Timeout

from nslora.disk import saving
from nslora.experiments.forecast import longest_first
from nslora.experiments.grid import Job, Profile, jobs, load
from nslora.experiments.notebook import work
from nslora.runs.preflight import one_engine
from nslora.types import UserError

Say = Callable[[str], None]
# runs jobs, the first ones first, and returns the names of those that failed
Run = Callable[[list[Job]], list[str]]

# environment variable carried by every process of a job
TOKEN = "NSLORA_JOB"
# names the folder of a job's Jupyter, of its sockets and of all that is temporary
PRIVATE = "IPYTHONDIR"
# prctl(2)
SUBREAPER = 36
# prctl(2)
PDEATHSIG = 1
POLL_S = 0.2
# lines of a failed job's log that are shown
TAIL = 40


# ---- the scheduler's side


def reproduce(profile: Profile, run: Run, reuse: bool, say: Say) -> list[str]:
    """Run every job of a profile that is not done, reports last and here; return the names that failed.

    A failed job does not stop the others. With `reuse`, finished records that came with the
    repository count as done; without it they are made anew.
    """
    with alone(profile, say):
        # seen under the lock: another process may just have made some of them
        grid = [job for job in jobs(profile) if job.backbone and not job.done()]
        failed = run(longest_first(grid))
        # asked for anew, and run one by one: each sees the records as they are then
        reports = [job for job in jobs(profile) if not job.backbone and not job.done()]
        return failed + run_jobs(reports, 1, reuse, say)


@contextmanager
def alone(profile: Profile, say: Say) -> Iterator[None]:
    """Let one process at a time reproduce a profile in this folder; a second one waits."""
    profile.work.mkdir(parents=True, exist_ok=True)
    lock = FileLock(profile.work / "reproduce.lock")
    try:
        held = lock.acquire(timeout=0)
    except Timeout:
        say(f"another process reproduces {profile.name!r} in this folder; waiting for its end")
        held = lock.acquire()
    with held:
        yield


def run_jobs(queue: list[Job], parallel: int, reuse: bool, say: Say) -> list[str]:
    """Run jobs, `parallel` at a time; return the names that failed. Every exit kills what runs."""
    if not queue:
        return []
    adopt()
    with one_engine([cfg for job in queue for cfg in job.configs], parallel):
        return _run_all(queue, parallel, reuse, say)


def _run_all(queue: list[Job], parallel: int, reuse: bool, say: Say) -> list[str]:
    # the caller keeps its list
    waiting = list(queue)
    running: list[Running] = []
    failed = []
    progress = Progress(queue, parallel, reuse, say)
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                if started := start(job, reuse):
                    running.append(started)
                    say(f"{job.name}: started")
                else:
                    say(f"{job.name}: runs in another process")
            time.sleep(POLL_S)
            # a run is told when its job still goes on with the next one
            progress.show()
            for ended in [one for one in running if one.ended or one.late]:
                running.remove(ended)
                if problem := verdict(ended):
                    failed.append(ended.job.name)
                say(ended.job.name + ending(ended, problem))
    finally:
        for one in running:
            one.end()
    return failed


def ending(ended: Running, problem: str) -> str:
    """Say how a job ended; of one that failed, show the last lines of its log."""
    log = ended.job.log
    if not problem:
        return f": done in {time.monotonic() - ended.started:.0f} s"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    tail = "\n".join(lines[-TAIL:])
    return f": FAILED ({problem}); the end of {log}:\n{tail}"


@dataclass
class Running:
    """A job under way: its process, and what must be given back when it ends."""

    job: Job
    process: subprocess.Popen[bytes]
    lock: BaseFileLock
    private: Path
    token: str
    started: float = field(default_factory=time.monotonic)

    @property
    def ended(self) -> bool:
        """Whether the process is over."""
        return self.process.poll() is not None

    @property
    def late(self) -> bool:
        """Whether the job is over its limit."""
        return time.monotonic() - self.started > self.job.profile.limit_s

    def end(self) -> int:
        """Kill whatever is left of the job, give everything back, return its exit status."""
        # children first, then what they used, then the right to start the job again
        kill_tree(self.token, self.process)
        shutil.rmtree(self.private, ignore_errors=True)
        self.lock.release()
        return self.process.wait()


def start(job: Job, reuse: bool) -> Running | None:
    """Start the process of `job`; None if another process of this folder is at it."""
    path = job.record.with_suffix(".lock")
    with saving(path):
        for folder in (path.parent, job.log.parent):
            folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return None
    if reuse:
        for cfg in job.configs:
            job.profile.store.accept(cfg)
    private = private_folder(job)
    shutil.rmtree(private, ignore_errors=True)
    with saving(private):
        # fails if somebody else's folder or link is there
        private.mkdir(mode=0o700)
    token = f"{os.getpid()}:{job.profile.name}:{job.name}"
    return Running(job, _spawn(job, private, token), lock, private, token)


def _spawn(job: Job, private: Path, token: str) -> subprocess.Popen[bytes]:
    """Start `main` in a process of its own, with a kernel that reads nobody's Jupyter settings."""
    environment = {
        **os.environ,
        "JUPYTER_PREFER_ENV_PATH": "1",
        PRIVATE: str(private),
        # a kernel that is killed leaves its connection file
        "JUPYTER_RUNTIME_DIR": str(private),
        "TMPDIR": str(private),
        TOKEN: token,
    }
    # kernels of this interpreter only, with the settings of nobody
    environment.pop("JUPYTER_PATH", None)
    key = (job.profile.name, job.notebook, job.backbone, str(job.seed))
    with saving(job.log), job.log.open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "nslora.experiments.jobs", *key],
            cwd=job.profile.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def private_folder(job: Job) -> Path:
    """Return the job's folder for Jupyter's files and sockets.

    Its name is the job's own: what is left behind where scheduler and job are killed at once is replaced.
    """
    # a socket's path has at most 107 characters, and TMPDIR may be a deep folder
    parent = Path("/tmp") if os.path.isdir("/tmp") else Path(tempfile.gettempdir())
    digest = hashlib.sha256(str(job.record).encode()).hexdigest()
    return parent / f"nslora-{os.getuid()}-{digest[:12]}"


def verdict(ended: Running) -> str:
    """End the job; return what went wrong, or "". Only our own done record counts as success."""
    # asked before `end`, which ends it
    late = not ended.ended
    status = ended.end()
    if late:
        return f"over its limit of {ended.job.profile.limit_s:.0f} s"
    if status:
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return "" if ended.job.done() else "its notebook or its records changed while it ran"


class Progress:
    """Say one line per run that finishes, with the time left. A run of two jobs counts once."""

    def __init__(self, queue: list[Job], parallel: int, reuse: bool, say: Say) -> None:
        self.profile = queue[0].profile
        self.parallel = parallel
        self.say = say
        self.names = {job.name for job in queue}
        # entries that an earlier process made, or we saw
        self.read = len(self.profile.finished)
        # of each run that finished since
        self.seconds: dict[str, float] = {}
        # with reuse, a record that came with the repository is not made again
        done = self.profile.store.accept if reuse else self.profile.store.done
        runs = {cfg.run_id: cfg for job in queue for cfg in job.configs}
        self.total = sum(not done(cfg) for cfg in runs.values())

    def show(self) -> None:
        """Say what finished since the last call."""
        for entry in self.profile.finished[self.read :]:
            self.read += 1
            run, seconds = entry["run"], entry["seconds"]
            if entry["job"] not in self.names or run in self.seconds:
                continue
            self.seconds[run] = seconds
            n, left = len(self.seconds), self.total - len(self.seconds)
            minutes = left * mean(self.seconds.values()) / self.parallel / 60
            self.say(
                f"[{n}/{self.total}] {run}: success {entry['success']:.2f} "
                f"in {seconds:.0f} s; about {minutes:.0f} min left"
            )


# ---- processes


def adopt() -> None:
    """Become the parent of orphaned descendants (Linux): none of them escapes `kill_tree`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(
            SUBREAPER,
            1,
            0,
            0,
            0,
        )


def marked(token: str) -> list[psutil.Process]:
    """Return living descendants of this process that carry `token` in their environment."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        # it may have ended meanwhile, or wait for its parent to collect it
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if _environment(process).get(TOKEN) == token:
                processes.append(process)
    return processes


def _environment(process: psutil.Process) -> dict[str, str]:
    """Return the environment of a process, which shows none while it becomes another program."""
    for _ in range(100):
        environment = process.environ()
        if environment or process.status() == psutil.STATUS_ZOMBIE:
            return environment
        time.sleep(0.01)
    return {}


def kill_tree(token: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """SIGKILL every descendant that carries `token`, until none is left.

    A signal to the process group would miss the kernel, which has a session of its own.
    """
    while victims := marked(token):
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        if process is not None:
            # before psutil can collect its exit status
            process.wait()
        psutil.wait_procs(victims, timeout=5)


# ---- the job's side


def main(profile: str, notebook: str, backbone: str, seed: str) -> int:
    """Be a job's process; its standard error is the job's log."""
    # jsonschema, which reads notebooks, would build a grammar for addresses: a second at each start
    sys.modules["rfc3987_syntax"] = cast(Any, None)
    from papermill.exceptions import PapermillExecutionError

    # else the job would go on without anybody who sees its limit
    if not _die_with_parent(os.environ[TOKEN]):
        remove_private_folder()
        return 143
    try:
        work(Job(load(profile), notebook, backbone, int(seed)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except PapermillExecutionError as error:
        # a sentence that is meant for the user, in a cell
        if error.ename == UserError.__name__:
            print(error.evalue, file=sys.stderr)
            return 2
        # without the colours of a terminal
        traceback = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
        print(traceback, file=sys.stderr)
        cell = f"cell {error.cell_index} of {notebook} failed"
        print(f"{cell}: {error.ename}: {error.evalue}", file=sys.stderr)
        return 1
    finally:
        # a signal that comes now would find nobody to do it
        remove_private_folder()
    return 0


def remove_private_folder() -> None:
    """Remove the folder that this job's process was given for Jupyter."""
    shutil.rmtree(os.environ[PRIVATE], ignore_errors=True)


def _die_with_parent(token: str) -> bool:
    """See to it that this process ends with its parent, and takes its tree along.

    False if the parent, whose id starts `token`, is already gone.
    """
    adopt()

    def stop(*_: object) -> None:
        # again, for another thread may just be starting a kernel
        for _try in range(5):
            kill_tree(token)
            # the parent may be gone, who would do it
            remove_private_folder()
            time.sleep(POLL_S / 2)
        # 128 + SIGTERM; at once, for this is a signal handler
        os._exit(143)

    signal.signal(signal.SIGTERM, stop)
    return end_with(int(token.split(":")[0]))


def end_with(parent: int) -> bool:
    """Have this process get SIGTERM when its parent ends (Linux); False if that is already gone."""
    if sys.platform != "linux":
        return True
    ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    # it may have died before we asked to be told
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
