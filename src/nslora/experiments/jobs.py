"""Jobs: each runs one notebook on one backbone at one seed with papermill, in an operating-system process of its own.

A job is done when our own record says so. That record is written last, after every cell ran and every run of the job
has its record. A killed job goes on from its last finished run.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from nslora.experiments.grid import Job, Profile, costs_left, history, jobs, load, total
from nslora.runs.store import write_json
from nslora.types import UserError

TOKEN = "NSLORA_JOB"  # environment variable carried by every process of a job
SUBREAPER, PDEATHSIG = 36, 1  # prctl(2)
POLL_S = 0.2


def work(job: Job) -> None:
    """Execute the notebook of `job` in this process and write its done record last.

    Raises UserError for a parameter the notebook does not have, RuntimeError if a cell or a run is missing at the end.
    papermill's own verdict does not do: after a dead kernel or `sys.exit(0)` it reports success.
    """
    import nbformat
    from papermill import execute_notebook, inspect_notebook
    from traitlets.config import Config

    if unknown := sorted(set(job.parameters) - set(inspect_notebook(job.source))):
        raise UserError(
            f"notebook {job.notebook} has no parameter {unknown[0]!r} in its cell tagged 'parameters'."
        )
    identity, begun = job.identity(), time.monotonic()  # of what this process sees now
    part = job.executed.with_suffix(".part.ipynb")
    part.parent.mkdir(parents=True, exist_ok=True)
    executed = execute_notebook(
        nbformat.read(job.source, as_version=4),
        part,
        parameters=job.parameters,
        kernel_name="python3",
        language="python",
        progress_bar=False,
        cwd=job.source.parent,
        config=Config(
            {"KernelManager": {"transport": "ipc", "ip": f"{os.environ['IPYTHONDIR']}/k"}}
        ),
    )
    for number, cell in enumerate(executed.cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise RuntimeError(f"cell {number} of {job.notebook} never ran:\n{cell.source}")
    if missing := [cfg.run_id for cfg in job.configs if not job.profile.store.done(cfg)]:
        raise RuntimeError(f"notebook {job.notebook} ended without the run {missing[0]}.")
    os.replace(part, job.executed)
    done = {
        "identity": identity,
        "seconds": time.monotonic() - begun,
        "runs": [cfg.run_id for cfg in job.configs],
    }
    write_json(job.record, done)


def adopt() -> None:
    """Become the parent of orphaned descendants (Linux), so that none of them escapes `kill_tree`."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(SUBREAPER, 1, 0, 0, 0)


def marked(token: str) -> list[psutil.Process]:
    """Living descendants of this process that carry `token` in their environment."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.environ().get(TOKEN) == token:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            pass  # ended meanwhile, or waits for its parent to collect it
    return found


def kill_tree(token: str, process: subprocess.Popen[bytes] | None = None) -> None:
    """SIGKILL every descendant that carries `token`, until none is left; a kernel has a session of its own."""
    while victims := marked(token):
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.kill()
        if process is not None:
            process.wait()  # before psutil can collect its exit status
        psutil.wait_procs(victims, timeout=5)


def main(profile: str, notebook: str, backbone: str, seed: str) -> int:
    """A job's process; its standard error is the job's log. When its parent dies, it dies with all its tree."""
    from papermill.exceptions import PapermillExecutionError

    token = os.environ[TOKEN]
    adopt()

    def stop(*_: object) -> None:
        kill_tree(token)
        os._exit(143)

    signal.signal(signal.SIGTERM, stop)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != int(token.split(":")[0]):
            return 143
    try:
        work(Job(load(profile), notebook, backbone, int(seed)))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except PapermillExecutionError as error:
        print(re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)), file=sys.stderr)
        print(
            f"cell {error.cell_index} of {notebook} failed: {error.ename}: {error.evalue}",
            file=sys.stderr,
        )
        return 1
    return 0


@dataclass
class Running:
    """A job under way: its process, and what must be given back when it ends."""

    job: Job
    process: subprocess.Popen[bytes]
    lock: IO[str]
    private: Path
    token: str
    started: float = field(default_factory=time.monotonic)

    @property
    def log(self) -> Path:
        """What the job said."""
        return self.job.profile.work / "logs" / f"{self.job.name}.log"

    def end(self) -> int:
        """Kill whatever is left of the job, give everything back, return its exit status."""
        kill_tree(self.token, self.process)
        self.lock.close()
        shutil.rmtree(self.private, ignore_errors=True)
        return self.process.wait()


def start(job: Job, reuse: bool) -> Running | None:
    """Start the process of `job`; None if another process of this folder is at it.

    With `reuse`, finished records that came with the repository count as done; without it the job really runs.
    """
    work = job.profile.work
    for folder in ("jobs", "logs"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    lock = (work / "jobs" / f"{job.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    if reuse:
        for cfg in job.configs:
            job.profile.store.accept(cfg)
    private = Path(
        tempfile.mkdtemp(prefix="ns", dir="/tmp" if os.path.isdir("/tmp") else None)
    )  # short: sockets
    token = f"{os.getpid()}:{job.profile.name}:{job.name}"
    env = os.environ | {"JUPYTER_PREFER_ENV_PATH": "1", "IPYTHONDIR": str(private), TOKEN: token}
    env.pop("JUPYTER_PATH", None)
    with (work / "logs" / f"{job.name}.log").open("wb") as log:
        key = (job.profile.name, job.notebook, job.backbone, str(job.seed))
        command = [sys.executable, "-m", "nslora.experiments.jobs", *key]
        process = subprocess.Popen(
            command,
            cwd=job.profile.root,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    return Running(job, process, lock, private, token)


def reproduce(
    profile: Profile,
    parallel: int = 1,
    shard: tuple[int, int] = (1, 1),
    reuse: bool = False,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Run every job of this shard that is not done; a failed job does not stop the others. Returns the failed names.

    Reports run last, on whichever shard finds all other jobs done.
    """
    everything = jobs(profile)
    grid = [job for job in everything if job.backbone]
    left = longest_first([job for job in grid[shard[0] - 1 :: shard[1]] if not job.done()])
    failed = run_jobs(left, parallel, reuse, say)
    if shard[1] > 1 and not all(job.done() for job in grid):
        say("reports are left to the shard that finishes last")
        return failed
    return failed + run_jobs(
        [job for job in everything if not job.backbone and not job.done()], 1, reuse, say
    )


def longest_first(queue: list[Job]) -> list[Job]:
    """Jobs by the time that earlier records let expect: a long one left for the end would run alone."""
    past = history(queue[0].profile, "results/**") if queue else []
    return sorted(queue, key=lambda job: -total(costs_left(job, past)[1]).seconds)


def run_jobs(queue: list[Job], parallel: int, reuse: bool, say: Callable[[str], None]) -> list[str]:
    """Run the jobs, `parallel` at a time; the names of those that failed. Every exit kills what still runs."""
    adopt()
    failed: list[str] = []
    running: list[Running] = []
    progress = Progress(queue, parallel, reuse, say) if queue else None
    try:
        while queue or running:
            while queue and len(running) < parallel:
                job = queue.pop(0)
                if (started := start(job, reuse)) is None:
                    say(f"{job.name}: runs in another process")
                    continue
                say(f"{job.name}: started")
                running.append(started)
            time.sleep(POLL_S)
            assert progress is not None
            progress.show()
            for one in [r for r in running if finished(r)]:
                running.remove(one)
                if problem := verdict(one):
                    failed.append(one.job.name)
                    say(
                        f"{one.job.name}: FAILED ({problem}); the end of {one.log}:\n{tail(one.log)}"
                    )
                else:
                    say(f"{one.job.name}: done in {time.monotonic() - one.started:.0f} s")
    finally:
        for one in running:
            one.end()
    return failed


def finished(one: Running) -> bool:
    """Whether the process ended or ran out of time."""
    return (
        one.process.poll() is not None or time.monotonic() - one.started > one.job.profile.limit_s
    )


def verdict(one: Running) -> str:
    """End the job; what went wrong, or an empty string. Only our own done record counts as success."""
    late = one.process.poll() is None
    status = one.end()
    if late:
        return f"over its limit of {one.job.profile.limit_s:.0f} s"
    if status:
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return "" if one.job.done() else "no done record"


def tail(log: Path, lines: int = 40) -> str:
    """The last lines of a log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


class Progress:
    """Says one line per run that finishes, with the time left. A run that two jobs share counts once."""

    def __init__(
        self, queue: list[Job], parallel: int, reuse: bool, say: Callable[[str], None]
    ) -> None:
        self.profile, self.parallel, self.say = queue[0].profile, parallel, say
        self.names = {job.name for job in queue}
        self.known = len(self.profile.finished)
        done = self.profile.store.accept if reuse else self.profile.store.done
        self.total = sum(not done(cfg) for cfg in {cfg for job in queue for cfg in job.configs})
        self.seconds: dict[str, float] = {}

    def show(self) -> None:
        """Say what finished since the last call."""
        entries = self.profile.finished
        for entry in entries[self.known :]:
            if entry["job"] in self.names and entry["run"] not in self.seconds:
                self.seconds[entry["run"]] = entry["seconds"]
                left = (
                    (self.total - len(self.seconds))
                    * sum(self.seconds.values())
                    / len(self.seconds)
                    / self.parallel
                )
                self.say(
                    f"[{len(self.seconds)}/{self.total}] {entry['run']}: success {entry['success']:.2f} "
                    f"in {entry['seconds']:.0f} s; about {left / 60:.0f} min left"
                )
        self.known = len(entries)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
