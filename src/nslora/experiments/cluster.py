"""The same jobs on many machines: a dask scheduler hands them to workers that share the project's folder.

A worker makes a job as `make reproduce` does on one machine: in a process of its own, under the job's lock, done when
its record says so. What runs where is dask's affair: Slurm through dask-jobqueue, Kubernetes through dask-kubernetes,
or workers started by hand.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nslora.experiments import jobs
from nslora.experiments.grid import Job, Profile, load
from nslora.types import UserError

WAIT_S = 30  # for a scheduler to answer


def reproduce(
    profile: Profile,
    address: str,
    gpu: bool = False,
    reuse: bool = False,
    say: Callable[[str], None] = print,
) -> list[str]:
    """Run every job of a profile that is not done on the workers of the scheduler at `address`, reports at the end.

    Each job takes one thread of a worker, with `gpu` also one unit of its resource "GPU". A worker that is lost gives
    its jobs back. Returns the names of the jobs that failed. Raises UserError when no scheduler answers.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise UserError(
            "--cluster needs dask; install it with pip install 'nslora[cluster]'."
        ) from error
    try:
        client = Client(address, timeout=WAIT_S)
    except (OSError, ValueError) as error:
        raise UserError(f"no dask scheduler answers at {address!r} ({error}).") from None
    failed: list[str] = []
    with client:
        slot = {"GPU": 1} if gpu else None
        left = jobs.longest_first(
            [job for job in jobs.jobs(profile) if job.backbone and not job.done()]
        )
        futures = {
            client.submit(
                make, *where(job), reuse, key=f"nslora {where(job)}", priority=-i, resources=slot
            ): job.name
            for i, job in enumerate(left)
        }
        for future in as_completed(futures):
            name = futures[future]
            problem = str(future.exception()) if future.status == "error" else future.result()
            failed += [name] if problem else []
            say(f"{name}: FAILED\n{problem}" if problem else f"{name}: done")
    reports = [job for job in jobs.jobs(profile) if not job.backbone and not job.done()]
    return failed + jobs.run_jobs(reports, 1, reuse, say)


def where(job: Job) -> tuple[str, str, str, str, int]:
    """What a worker needs to find the job: profile, the project's folder, notebook, backbone, seed."""
    return job.profile.name, str(job.profile.root), job.notebook, job.backbone, job.seed


def make(profile: str, root: str, notebook: str, backbone: str, seed: int, reuse: bool) -> str:
    """On a worker: run a job unless it is done; what went wrong, or an empty string."""
    job, said = Job(load(profile, Path(root)), notebook, backbone, seed), list[str]()
    if job.done():
        return ""
    failed = jobs.run_jobs([job], 1, reuse, said.append)
    return "\n".join(said) if failed or not job.done() else ""
