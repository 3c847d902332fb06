"""A small project folder: a grid of notebooks whose runs are stand-ins, for the tests of what runs them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nslora.config import RunConfig
from nslora.runs.store import FILES, Store

TOML = """
reports = [{reports}]
[settings]
items = 3
[backbones."smollm2-135m"]
lr = 1e-3
[profiles.t]
results = "results/t"
job_minutes = 5
settings = {{ moves = 2 }}
"""
BLOCK = """
[[profiles.t.notebooks.{name}]]
study = "main"
backbones = ["smollm2-135m"]
tasks = ["facts"]
methods = ["frozen", "lora"]
seeds = [0]
"""
PARAMETERS = 'profile: str = "t"\nbackbone: str = "none"\nseed: int = 0'
# Makes the runs that are missing as run.make_run does, without models: one line in made.txt per run really made.
RUNS = """
import sys
sys.path.insert(0, TESTS)
import toy
from nslora.experiments import grid
store = grid.load(profile).store
for cfg in grid.configs(profile, NAME, backbone, seed):
    if not store.done(cfg):
        toy.finish(store, cfg)
        with open("../made.txt", "a") as made:
            made.write(cfg.run_id + "\\n")
"""
# A report: how many records there are, in which folder, and a picture.
COUNT = """
from pathlib import Path
import matplotlib.pyplot as plt
print(len(list(Path("../results/t/records").glob("*"))), "records in", Path("..").resolve())
plt.figure(figsize=(1, 1))
plt.plot([0, 1])
plt.show()
object()
"""


def finish(store: Store, cfg: RunConfig, **receipt: object) -> Path:
    """Publish a whole record without content but for its receipt; return its folder."""
    scratch = store.begin(cfg)
    for name in FILES:
        (scratch / name).touch()
    content = {"run_id": cfg.run_id, "config": cfg.settings, **receipt}
    (scratch / "run.json").write_text(json.dumps(content))
    return store.publish(cfg)


def cost(seconds: float, tokens: int = 0, money: float = 0, peak_mb: float = 900) -> dict:
    """The parts of a receipt that forecasts read."""
    editor = {"tokens_in": tokens, "tokens_out": 0, "money": money}
    return {"cost": {"wall_s": seconds, "peak_mb": peak_mb}, "editor": editor}


def notebook(root: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> None:
    """Write a notebook with a cell of parameters before the given cells."""
    import nbformat  # takes a second, and the stand-ins import this module too

    first = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
    nb = nbformat.v4.new_notebook(cells=[first, *map(nbformat.v4.new_code_cell, cells)])
    nb.metadata["kernelspec"] = {
        "name": "python3",
        "display_name": "Python 3",
        "language": "python",
    }
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(nb, root / "notebooks" / f"{name}.ipynb")


def make(root: Path, report: bool = True, **notebooks: tuple[str, ...]) -> None:
    """Make a project folder with these notebooks (their cells by name) and a report."""
    blocks = "".join(BLOCK.format(name=name) for name in notebooks)
    toml = TOML.format(reports=repr("09_paper") * report) + blocks
    (root / "experiments.toml").write_text(toml)
    tests = repr(str(Path(__file__).parent))
    for name, cells in notebooks.items():
        filled = [cell.replace("NAME", repr(name)).replace("TESTS", tests) for cell in cells]
        notebook(root, name, *filled)
    notebook(root, "09_paper", COUNT, parameters='profile: str = "t"')


def copy_project(root: Path) -> Path:
    """Copy what the runner needs of this project into a folder: its notebooks and its grid."""
    project = Path(__file__).parents[1]
    shutil.copytree(project / "notebooks", root / "notebooks")
    shutil.copy(project / "experiments.toml", root)
    return root


def edit(root: Path, old: str, new: str) -> None:
    """Replace a part of the project's experiments.toml, which must be there."""
    path = root / "experiments.toml"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
