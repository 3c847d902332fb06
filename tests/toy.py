"""A small project folder: a grid of notebooks whose runs are stand-ins, for the tests of what runs them."""

from __future__ import annotations

from pathlib import Path

import nbformat

TOML = """
reports = [{reports}]
[settings]
items = 3
[backbones."smollm2-135m"]
lr = 1e-3
[profiles.t]
results = "results/t"
job_minutes = {minutes}
settings = {{ moves = 2 }}
"""
BLOCK = """
[[profiles.t.notebooks.{name}]]
backbones = ["smollm2-135m"]
tasks = ["facts"]
methods = ["frozen", "lora"]
seeds = [0]
"""
# Makes the runs that are missing as run.run does, without models: one line in made.txt per run really made.
RUNS = """
import json, time
from pathlib import Path
from nslora.experiments import grid
store = grid.load(profile).store
for cfg in grid.configs(profile, NAME, backbone, seed):
    if not store.done(cfg):
        scratch = store.begin(cfg)
        (scratch / "run.json").write_text(json.dumps({"run_id": cfg.run_id, "config": {"moves": 2}}))
        store.publish(cfg, ["run.json"])
        with open("../made.txt", "a") as made:
            made.write(cfg.run_id + "\\n")
"""


def notebook(
    root: Path,
    name: str,
    *cells: str,
    parameters: str = 'profile: str = "t"\nbackbone: str = "none"\nseed: int = 0',
) -> None:
    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nb = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    nb.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(nb, root / "notebooks" / f"{name}.ipynb")


def make(root: Path, minutes: float = 5, report: bool = True, **notebooks: tuple[str, ...]) -> None:
    """A project folder with these notebooks (their cells by name) and a report that counts records."""
    (root / "experiments.toml").write_text(
        TOML.format(minutes=minutes, reports=repr("09_paper") * report)
        + "".join(BLOCK.format(name=name) for name in notebooks)
    )
    for name, cells in notebooks.items():
        notebook(root, name, *(cell.replace("NAME", repr(name)) for cell in cells))
    count = "from pathlib import Path\nprint(len(list(Path('../results/t/records').glob('*'))), 'records')"
    notebook(root, "09_paper", count, parameters='profile: str = "t"')
