"""The notebooks: clean sources, honest parameters, and every cell executed.

They run in this process, on made-up records and without a language model of any size; test_smoke.py runs them in
kernels and with real models.
"""

from __future__ import annotations

import ast
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
import pytest
from grown import toward, write_tree
from IPython.display import HTML, Image
from ipywidgets import interactive
from matplotlib.figure import Figure
from scripted import Scripted, lowercase
from synthetic import write_lines, write_record
from toy import copy_project

from nslora.experiments import grid

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NAMES = [path.stem for path in NOTEBOOKS]
REPORTS = list(grid.load("smoke", ROOT).reports)
# profiles that answer every question
WHOLE = ("quick", "full", "smoke")
PARAMETER = re.compile(r"(?P<name>\w+): (str|int|float|bool) = (?P<value>.+?)  # \w.*")
MAGIC = "%matplotlib inline\n"

each = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
# make what they show, and read no records
MAKERS = ("00_quickstart", "10_own_data")
each_report = pytest.mark.parametrize("name", [name for name in REPORTS if name not in MAKERS])
Execute = Callable[..., list[Any]]


# ---- sources


def read(path: Path) -> nbformat.NotebookNode:
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    return nb


def parameters(path: Path) -> dict[str, str]:
    """Name to default of the parameters cell, which must come first."""
    first, *others = read(path).cells
    assert "parameters" in first.metadata.get("tags", ())
    assert all("parameters" not in cell.metadata.get("tags", ()) for cell in others)
    lines = [PARAMETER.fullmatch(line) for line in first.source.splitlines()]
    assert all(lines), "every line must be `name: type = value  # meaning`"
    return {match["name"]: match["value"].strip('"') for match in lines if match}


def test_sources_hold_no_outputs():
    command = [sys.executable, "-m", "nbstripout", "--verify", *map(str, NOTEBOOKS)]
    subprocess.run(command, check=True)


@each
def test_the_library_computes_and_cells_show(path: Path) -> None:
    nb = read(path)
    assert nb.metadata.kernelspec.name == "python3"
    for cell in nb.cells:
        if cell.cell_type == "code":
            hides = re.search(r"^\s*!|^%%|get_ipython|os\.system", cell.source, re.MULTILINE)
            assert not hides, "hides failures"
            own = re.search(r"^(def|class) |\bprint\(", cell.source, re.MULTILINE)
            assert not own, "algorithms belong in src/, and tables are rendered"
            assert len(cell.source.splitlines()) <= 15


@each
def test_prose_asks_a_question_first_and_leads_every_few_cells(path: Path) -> None:
    nb = read(path)
    question = nb.cells[1].source
    assert question.startswith(f"# {path.stem[:2]} · ")
    assert question.splitlines()[0].endswith("?")
    kinds = "".join(cell.cell_type[0] for cell in nb.cells)
    assert "cccc" not in kinds
    assert "undecided" in "".join(cell.source for cell in nb.cells[-3:]).lower()


@each
def test_defaults_are_runs_of_the_quick_profile(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    given = parameters(path)
    assert given["profile"] == "quick"
    if path.stem in REPORTS:
        assert not {"backbone", "seed"} & set(given), "it reads the runs of all of them"
    else:
        assert grid.configs("quick", path.stem, given["backbone"], int(given["seed"]))


@pytest.mark.parametrize("name", WHOLE)
def test_every_notebook_is_in_the_profile(name: str) -> None:
    profile = grid.load(name, ROOT)
    assert set(NAMES) == {*profile.notebooks, *profile.reports}


# ---- executed in this process


def write_runs(profile: grid.Profile) -> None:
    """Write a made-up record of every run, as a clone has them; their checkpoints are not there."""
    runs = [cfg for runs in profile.notebooks.values() for cfg in runs]
    for cfg in {cfg.run_id: cfg for cfg in runs}.values():
        folder = write_record(profile.results, run_id=cfg.run_id, **cfg.settings)
        if cfg.method == "neurosymbolic":
            best_is_last(folder)
        if cfg.row.targets == "verified":
            write_lines(folder / "remade.jsonl", [remade(cfg)])
        assert profile.store.accept(cfg)


def best_is_last(folder: Path) -> None:
    """Make the last move of a record its best, with an adapter that is not there."""
    lines = (folder / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    *earlier, last = map(json.loads, lines)
    write_lines(folder / "steps.jsonl", [*earlier, last | {"adapter": "adapter-02"}])
    run = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    run["best"]["step"] = last["step"]
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")


def remade(cfg: Any) -> dict[str, Any]:
    """Return a row of remade.jsonl for the first training problem."""
    from nslora.tasks.build import build

    example = build(cfg).train[0]
    return {
        "question": example.question,
        "answer": "own working <b>",
        "parent": example.id,
        "source": "remade",
        "prompt_diff": [["+", "Count."]],
        "backbone": cfg.backbone,
        "run": cfg.run_id,
    }


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> grid.Profile:
    """The smoke profile in a project of its own, with a record of every run, and a tree of schedules."""
    profile = grid.load("smoke", copy_project(tmp_path_factory.mktemp("clone")))
    write_runs(profile)
    write_tree(profile.root / "results" / "schedules", toward("NSN", 0.8))
    return profile


@pytest.fixture
def execute(monkeypatch: pytest.MonkeyPatch) -> Iterator[Execute]:
    """A function that runs every cell of a job's notebook here and returns what it showed."""
    shown: list[Any] = []
    monkeypatch.setattr("IPython.display.display", lambda *values: shown.extend(values))

    def run(job: grid.Job) -> list[Any]:
        monkeypatch.chdir(job.source.parent)
        names: dict[str, Any] = {}
        cells = [cell for cell in read(job.source).cells if cell.cell_type == "code"]
        for i, cell in enumerate(cells):
            value = run_cell(cell.source.removeprefix(MAGIC), names)
            if i == 0:
                names.update(job.parameters)
            if value is not None:
                shown.append(value)
        return shown

    with pd.option_context("display.max_colwidth", 50):
        yield run


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """Run a cell and return the value of its last line, as a kernel shows it."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    if not isinstance(last, ast.Expr):
        return None
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names)


def rendered(shown: list[Any]) -> list[tuple[str, str]]:
    """Return kind and text of everything shown; anything but these kinds fails."""
    kinds: dict[type, Callable[[Any], tuple[str, str]]] = {
        Figure: lambda figure: ("picture", draw(figure)),
        Image: lambda image: ("picture", str(image.filename)),
        pd.DataFrame: lambda frame: ("table", frame.to_html()),
        HTML: lambda page: ("page", str(page.data)),
        interactive: lambda box: ("sliders", ", ".join(c.description for c in box.children[:-1])),
    }
    outputs = []
    for value in shown:
        as_markdown = ("text", getattr(value, "_repr_markdown_", str)())
        render = kinds.get(type(value))
        assert render or hasattr(value, "_repr_markdown_"), f"{type(value)} is not rendered"
        outputs.append(render(value) if render else as_markdown)
    return outputs


def draw(figure: Figure) -> str:
    """Draw a figure and return what is written in it."""
    file = io.BytesIO()
    figure.savefig(file, dpi=30)
    assert file.tell() > 500
    texts = [text for ax in figure.axes for text in (ax.get_title(), ax.get_ylabel())]
    return " ".join(texts)


def first_job(profile: grid.Profile, name: str) -> grid.Job:
    """Return the notebook's first job of the profile."""
    return next(job for job in grid.jobs(profile) if job.notebook == name)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MAKERS])
def test_a_notebook_answers_first_and_shows_everything_there_is(
    name: str, clone: grid.Profile, execute: Execute
) -> None:
    outputs = rendered(execute(first_job(clone, name)))
    assert not clone.finished, "no run was to be made"
    first, _ = outputs[0]
    assert first == "picture" or name == "09_paper", "the answer comes before the details"
    assert len([text for _, text in outputs if "undecided" in text or "not run" in text])


def test_the_main_comparison_lays_replies_side_by_side(
    clone: grid.Profile, execute: Execute
) -> None:
    texts = [text for kind, text in rendered(execute(first_job(clone, "04_main")))]
    replies = next(text for text in texts if "<th>output</th>" in text)
    methods = {cfg.method for cfg in clone.notebooks["04_main"]}
    assert {name for name in methods if f"<th>{name}</th>" in replies} == methods
    assert any("signal and demand" in text for text in texts), "the table of methods"
    assert any("saturated" in text for text in texts), "what decided"
    assert any("tuned+initial" in text for text in texts), "the 2 x 2"


def test_a_remade_answer_stands_beside_the_bare_result(
    clone: grid.Profile, execute: Execute
) -> None:
    outputs = rendered(execute(first_job(clone, "05_remaking")))
    pair = next(text for _, text in outputs if "bare result" in text)
    assert "own working &lt;b&gt;" in pair
    assert any("<ins>Count.</ins>" in text for kind, text in outputs if kind == "page")


def test_needs_are_shown_with_their_features_where_there_are_probes(
    clone: grid.Profile, execute: Execute, tmp_path: Path
) -> None:
    from nslora.algorithm.needs import FEATURES

    folder = clone.root / "results" / "classifier"
    folder.mkdir(parents=True)
    rows = [dict.fromkeys(FEATURES, float(i % 2)) for i in range(12)]
    probe = pd.DataFrame(rows).assign(label=[i % 2 for i in range(12)], fact=list("abcdefghijkl"))
    probe.to_csv(folder / "probe-one.csv", index=False)
    report = {"rows": 12, "leave one task out": {"mixed": {"classifier": 0.75, "nll": None}}}
    (folder / "report.json").write_text(json.dumps(report))
    try:
        texts = [text for _, text in rendered(execute(first_job(clone, "03_when_classifier")))]
    finally:
        shutil.rmtree(folder)
    assert any("shape" in text and "P(content)" in text for text in texts)
    assert any("cross-validated" in text for text in texts)
    assert any("leave one task out" in text and "0.75" in text for text in texts)


@each_report
def test_a_report_says_when_there_is_nothing_to_show(
    name: str, execute: Execute, tmp_path: Path
) -> None:
    profile = grid.load("smoke", copy_project(tmp_path))
    outputs = rendered(execute(first_job(profile, name)))
    assert any("Nothing to show" in text for _, text in outputs)
    assert not [kind for kind, _ in outputs if kind == "picture"]


def test_the_quickstart_makes_one_move_by_hand(
    clone: grid.Profile, execute: Execute, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    """A random model and a scripted editor stand in for those of the smoke profile."""
    editor = Scripted(lowercase)
    monkeypatch.setattr("nslora.model.backbone.load", lambda name, threads: tiny)
    monkeypatch.setattr("nslora.runs.run.open_editor", lambda cfg, store: editor)
    closed: list[bool] = []
    monkeypatch.setattr(editor, "close", lambda: closed.append(True))
    outputs = rendered(execute(first_job(clone, "00_quickstart")))
    texts = [text for _, text in outputs]
    assert any("Every reply must be in lower case." in text for text in texts), "the gradient"
    assert any("<ins>" in text for kind, text in outputs if kind == "page"), "the edits"
    assert len([text for text in texts if "reason" in text]) >= 2, "the decisions"
    assert closed == [True], "the editor's server was stopped"
    assert any("is not in this working folder" in text for text in texts), "no checkpoints here"
    assert not clone.finished, "no run was to be made"


def test_own_data_become_a_bundle_and_what_others_load(
    clone: grid.Profile, execute: Execute, monkeypatch: pytest.MonkeyPatch, tiny: Any
) -> None:
    """A random model stands in for that of the smoke profile."""
    from nslora.model import checkpoints
    from nslora.model.backbone import load

    def stand_in(name: str, threads: int, dtype: str = "float32", device: str = "cpu") -> Any:
        loaded = load(tiny.name, threads, "float32", "cpu")
        return replace(loaded, name=name, identity=checkpoints.identity(name))

    monkeypatch.setattr("nslora.model.backbone.load", stand_in)
    monkeypatch.setattr("nslora.runs.run.load", stand_in)
    outputs = rendered(execute(first_job(clone, "10_own_data")))
    texts = [text for _, text in outputs]
    assert "grader labels (60 rows)" in texts[0] and "picture" in dict(outputs)
    assert any("tuned weights" in text for text in texts), "the 2 x 2"
    assert any("model.safetensors" in text for text in texts), "the export"
    assert any("Sleeper to Zurich" in text for text in texts), "the chat"
