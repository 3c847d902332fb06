"""Execute a job's notebook with papermill, and publish it with its outputs."""

from __future__ import annotations

import html
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from nslora.experiments.grid import Job
from nslora.runs.store import write_json, write_text
from nslora.types import UserError

# what stays of the metadata: the rest says when, how fast and by which Python it was executed
KEPT_OF_NOTEBOOK = ("kernelspec",)
KEPT_OF_CELL = ("tags",)
DROPPED_TYPES = (
    "image/svg+xml",  # images are kept as PNG
    "application/pdf",
    "application/vnd.jupyter.widget-view+json",  # has no picture without a kernel
)
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font-family: sans-serif; line-height: 1.5; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
pre {{ overflow-x: auto; }}
.input pre {{ background: #f6f6f6; padding: .6rem; }}
.prompt, .anchor-link {{ display: none; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; }}
th, td {{ padding: .2rem .6rem; text-align: right; }}
tr:nth-child(even) {{ background: #f6f6f6; }}
</style></head><body>
{body}
</body></html>
"""


def work(job: Job) -> None:
    """Execute the notebook of `job` in this process, publish it, and write its done record last.

    Raises UserError for a parameter the notebook does not have, RuntimeError if a cell or a run is
    missing at the end. papermill's own verdict does not do: after a dead kernel or `sys.exit(0)` it
    reports success.
    """
    # of what this process sees now: a later change makes the job undone
    identity = job.identity()
    start = time.monotonic()
    executed = _execute(job)
    for number, cell in enumerate(executed.cells):
        if cell.cell_type == "code" and cell.source.strip() and cell.execution_count is None:
            raise RuntimeError(f"cell {number} of {job.notebook} never ran:\n{cell.source}")
    runs = [cfg.run_id for cfg in job.configs]
    for cfg in job.configs:
        if not job.profile.store.done(cfg):
            raise RuntimeError(f"notebook {job.notebook} ended without the run {cfg.run_id}.")
    publish(executed, job)
    done = {"identity": identity, "seconds": time.monotonic() - start, "runs": runs}
    write_json(job.record, done)


def _execute(job: Job) -> Any:
    """Run all cells in a kernel of their own; return the notebook with its outputs."""
    import nbformat
    from papermill import execute_notebook, inspect_notebook
    from traitlets.config import Config

    if unknown := sorted(set(job.parameters) - set(inspect_notebook(job.source))):
        raise UserError(
            f"notebook {job.notebook} has no parameter {unknown[0]!r} "
            "in its cell tagged 'parameters'."
        )
    # papermill writes here after each cell; what is published is another file
    unfinished = job.profile.work / "notebooks" / f"{job.name}.ipynb"
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    # sockets in a private folder: ports could be taken by another job
    ipc = {"transport": "ipc", "ip": f"{os.environ['IPYTHONDIR']}/k"}
    return execute_notebook(
        nbformat.read(job.source, as_version=4),
        unfinished,
        parameters=job.parameters,
        kernel_name="python3",
        language="python",
        progress_bar=False,
        cwd=job.source.parent,
        config=Config({"KernelManager": ipc}),
    )


def publish(notebook: Any, job: Job) -> None:
    """Write an executed notebook to the results, as .html and then as .ipynb, each whole or not."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = clean(notebook, job.profile.root)
    # the full template adds 280 kB of styles to each page
    body, _ = HTMLExporter(template_name="basic").from_notebook_node(notebook)
    page = PAGE.format(title=html.escape(job.name), body=body)
    write_text(job.executed.with_suffix(".html"), page)
    write_text(job.executed, nbformat.writes(notebook) + "\n")


def clean(notebook: Any, root: Path) -> Any:
    """Return the notebook without what differs between two executions and means nothing.

    These are times, versions, ids, memory addresses, and the folder of the project.
    """
    from nbformat import from_dict

    cells = [_clean_cell(cell, str(number), root) for number, cell in enumerate(notebook.cells)]
    metadata = _only(notebook.metadata, KEPT_OF_NOTEBOOK)
    return from_dict({**notebook, "metadata": metadata, "cells": cells})


def _clean_cell(cell: Any, number: str, root: Path) -> dict[str, Any]:
    cleaned = {**cell, "id": number, "metadata": _only(cell.metadata, KEPT_OF_CELL)}
    if cell.cell_type == "code":
        cleaned["outputs"] = [_clean_output(output, root) for output in cell.outputs]
    return cleaned


def _clean_output(output: Any, root: Path) -> dict[str, Any]:
    """Clean one output: `text` of a stream, or `data` by media type."""
    cleaned = dict(output)
    if "text" in output:
        cleaned["text"] = _clean_text(output["text"], root)
    if "data" in output:
        cleaned["data"] = {
            kind: _clean_text(value, root) if isinstance(value, str) else value
            for kind, value in output["data"].items()
            if kind not in DROPPED_TYPES
        }
    return cleaned


def _clean_text(text: str, root: Path) -> str:
    """Replace folders of this machine and memory addresses."""
    text = text.replace(str(root), ".")
    text = text.replace(sys.prefix, ".venv")
    text = text.replace(str(Path.home()), "~")
    # where a warning of a cell says that it comes from
    text = re.sub(r"\S*/ipykernel_\d+/\d+\.py", "cell", text)
    return re.sub(r" at 0x[0-9a-f]{6,}", "", text)


def _only(metadata: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: metadata[name] for name in names if name in metadata}
