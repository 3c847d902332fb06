"""Run the same jobs on many machines: a dask scheduler hands them to workers that share the folder.

A worker makes a job as `make reproduce` does on one machine: in a process of its own, under the
job's lock, done when its record says so. What runs where is dask's affair: Slurm through
dask-jobqueue, Kubernetes through dask-kubernetes, or workers started by hand.
"""

from functools import partial
from pathlib import Path
from typing import Any

from nslora.experiments import jobs
from nslora.experiments.grid import Job, Profile, load
from nslora.types import UserError

# for a scheduler to answer
WAIT_S = 30


def reproduce(
    profile: Profile,
    address: str,
    gpu: bool = False,
    reuse: bool = False,
    say: jobs.Say = print,
) -> list[str]:
    """Run every job of a profile that is not done on dask workers, reports at the end and here.

    Each job takes one thread of a worker, with `gpu` also one unit of its resource "GPU". A worker
    that is lost gives its jobs back. Returns the names of the jobs that failed. Raises UserError
    when no scheduler answers at `address`.
    """
    with _connect(address) as client:
        run = partial(_run, client, gpu=gpu, reuse=reuse, say=say)
        return jobs.reproduce(profile, run, reuse, say)


def _connect(address: str) -> Any:
    try:
        from distributed import Client
    except ImportError as error:
        raise UserError(
            "--cluster needs dask; install it with pip install 'nslora[cluster]'."
        ) from error
    try:
        return Client(address, timeout=WAIT_S)
    except (OSError, ValueError) as error:
        raise UserError(f"no dask scheduler answers at {address!r} ({error}).") from None


def _run(client: Any, queue: list[Job], *, gpu: bool, reuse: bool, say: jobs.Say) -> list[str]:
    """Hand the jobs out, the first ones first; return the names of those that failed."""
    from distributed import as_completed

    # dask hands out as many of a resource as a worker says that it has
    slot = {"GPU": 1} if gpu else None
    futures = {}
    for number, job in enumerate(queue):
        # small and plain: a worker may be another machine, with its own checkout
        key = (
            job.profile.name,
            str(job.profile.root),
            job.notebook,
            job.backbone,
            job.seed,
        )
        future = client.submit(
            make, *key, reuse, key=f"nslora {key}", priority=-number, resources=slot
        )
        futures[future] = job.name
    failed = []
    for future in as_completed(futures):
        name = futures[future]
        problem = str(future.exception()) if future.status == "error" else future.result()
        if problem:
            failed.append(name)
        say(f"{name}: FAILED\n{problem}" if problem else f"{name}: done")
    return failed


def make(profile: str, root: str, notebook: str, backbone: str, seed: int, reuse: bool) -> str:
    """Run a job on a worker unless it is done; return what went wrong, or an empty string."""
    job = Job(load(profile, Path(root)), notebook, backbone, seed)
    # dask runs a finished task again when the worker with its result is lost
    if job.done():
        return ""
    lines: list[str] = []
    failed = jobs.run_jobs([job], 1, reuse, lines.append)
    return "\n".join(lines) if failed or not job.done() else ""
