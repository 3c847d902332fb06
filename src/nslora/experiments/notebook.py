"""Execute a job's notebook with papermill, and publish it with its outputs."""

import html
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

from nslora.disk import saving
from nslora.experiments.grid import Job
from nslora.runs.store import write_json, write_text
from nslora.types import UserError

DROPPED_TYPES = (
    # images are kept as PNG
    "image/svg+xml",
    "application/pdf",
    # has no picture without a kernel
    "application/vnd.jupyter.widget-view+json",
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
    # after a dead kernel papermill calls every cell completed
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
    with saving(unfinished):
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

    text = clean(notebook, job.profile.root)
    # the full template adds 280 kB of styles to each page
    exporter = HTMLExporter(template_name="basic")
    body, _ = exporter.from_notebook_node(nbformat.reads(text, as_version=4))
    page = PAGE.format(title=html.escape(job.name), body=body)
    write_text(job.executed.with_suffix(".html"), page)
    write_text(job.executed, text)


def clean(notebook: Any, root: Path) -> str:
    """Return the notebook as text, without what differs between executions and means nothing.

    These are times, versions, ids, memory addresses, and the folders of this machine.
    """
    import nbformat
    from nbconvert.preprocessors import ClearMetadataPreprocessor

    clear = ClearMetadataPreprocessor(
        preserve_nb_metadata_mask={"kernelspec"}, preserve_cell_metadata_mask={"tags"}
    )
    notebook, _ = clear.preprocess(notebook.copy(), {})
    for number, cell in enumerate(notebook.cells):
        cell.id = str(number)
        for output in cell.get("outputs", ()):
            for kind in DROPPED_TYPES:
                output.get("data", {}).pop(kind, None)
    text = nbformat.writes(notebook) + "\n"
    folders = {root: ".", sys.prefix: ".venv", Path.home(): "~"}
    for folder, short in folders.items():
        # a path is not in the middle of a word, as it may be in a picture's base64
        text = re.sub(rf"(?<![\w+/]){re.escape(str(folder))}\b", short, text)
    # where a warning of a cell says that it comes from; begun at the start of a word only, since a
    # picture's base64 is a word of megabytes, to be read once
    text = re.sub(r"(?<![^\s\"])[^\s\"]*/ipykernel_\d+/\d+\.py", "cell", text)
    return re.sub(r" at 0x[0-9a-f]{6,}", "", text)
