"""One side of a benchmark, in a process of its own, so that its peak memory is its own.

`python -m nslora.bench.serve SPEC` prepares the side that SPEC (JSON) describes (`run`: a function of `sides` or
`moves`) and prints a line of JSON about it. Each line on standard input (arguments, as JSON) is answered by one
repetition and a line about it: the work done, the seconds, and the peak memory so far. The process ends when the pipe
closes.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from importlib import import_module

import psutil
import torch

from nslora.runs import store
from nslora.types import Json, UserError


def serve(spec: Json) -> None:
    """Answer requests for repetitions until the pipe closes."""
    cuda = torch.cuda.is_available()
    with os.fdopen(os.dup(1), "w") as answers:
        # libraries print, which is no answer
        os.dup2(2, 1)
        torch.set_num_threads(spec["threads"])
        if not cuda:
            # a side that needs more memory than there is breaks alone, not the machine
            free = psutil.virtual_memory().available
            resource.setrlimit(resource.RLIMIT_DATA, (free, free))
        # textgrad, which only moves need, would be memory of every side
        module, name = spec["run"].split(".")
        repeat = getattr(import_module(f"nslora.bench.{module}"), name)(spec)
        about = {key: spec[key] for key in ("device", "dtype")}
        about |= {"accelerator": torch.cuda.get_device_name()} if cuda else {}
        print(json.dumps(about), file=answers, flush=True)
        for line in sys.stdin:
            start = time.perf_counter()
            row = repeat(**json.loads(line))
            if cuda:
                # nothing is under way before either: each answer waits here
                torch.cuda.synchronize()
                row["peak_device_mb"] = torch.cuda.max_memory_allocated() / 2**20
            row |= {"seconds": time.perf_counter() - start, "peak_mb": store.peak_megabytes()}
            print(json.dumps(row), file=answers, flush=True)


if __name__ == "__main__":
    try:
        serve(json.loads(sys.argv[1]))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
