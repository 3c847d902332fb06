"""What is committed in results/, and shown in README and paper, follows from the records."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nslora.algorithm import router
from nslora.algorithm.needs import Needs
from nslora.bench import report as bench_report
from nslora.config import METHODS, RunConfig
from nslora.experiments import forecast, grid
from nslora.runs import store
from nslora.study import report
from nslora.types import Prompt, Signal, StepRecord

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAPER = (ROOT / "paper" / "main.tex").read_text(encoding="utf-8")
FOLDERS = [path.parent for path in sorted(ROOT.glob("results/*/claims.json"))]
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


def between(text: str, mark: str) -> str:
    """The part of the README that is generated."""
    found = re.search(rf"<!-- {mark} -->\n(.*?)<!-- /{mark} -->", text, re.DOTALL)
    assert found, f"the README has no place for {mark}"
    return found[1].strip()


@each_folder
def test_tables_and_claims_follow_from_the_records(folder: Path) -> None:
    assert report.verify(folder) == []


def test_the_study_and_the_quick_profile_are_among_them() -> None:
    assert {"full", "quick"} <= {folder.name for folder in FOLDERS}
    assert list((ROOT / "results/quick/records").glob("*/run.json"))


def test_the_readme_shows_what_the_records_say() -> None:
    quick, full = ROOT / "results" / "quick", ROOT / "results" / "full"
    assert between(README, "main-table") == str(report.show_table(quick)).strip()
    profiles = [grid.load(name, ROOT) for name in ("smoke", "quick", "full")]
    assert between(README, "sizes") == forecast.sizes(profiles).strip()
    assert between(README, "claims-table") == str(report.readme_claims(full)).strip()
    sys.path.append(str(ROOT / "tests" / "torture"))
    from harness import table  # pyright: ignore[reportMissingImports]

    assert between(README, "reliability") == table(ROOT / "results" / "reliability.json")


def test_every_file_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert "results/quick/figures/success.png" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_expected_costs_follow_from_the_receipts() -> None:
    profile = grid.load("quick", ROOT)
    written = (profile.results / "expected.md").read_text(encoding="utf-8")
    assert written == forecast.table(profile)


@each_folder
def test_records_are_receipts_of_the_second_edition(folder: Path) -> None:
    for path in (folder / "records").glob("*/run.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        assert run["schema"] == 2 and run["study"] in grid.STUDIES
        assert all((path.parent / name).exists() for name in store.FILES)
        assert run["run_id"] == path.parent.name == RunConfig.of(run["config"]).run_id
        assert run["weights"] and run["environment"]["revision"]
        assert run["environment"]["versions"]["torch"]
        assert run["cost"]["wall_s"] > 0 and run["final"]["test"]["n"] > 0
        cells = {"frozen+initial", "frozen+final", "tuned+initial", "tuned+final"}
        assert set(run["factorial"]) == cells


@each_folder
def test_todays_router_decides_as_the_records_say(folder: Path) -> None:
    """A changed decision must not leave runs of the old one under the same name."""
    for path in (folder / "records").glob("*/run.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        cfg = RunConfig.of(run["config"])
        decide = router.DECISIONS[cfg.row.decision]
        moves: list[StepRecord] = []
        for row in store.read_jsonl(path.parent / "steps.jsonl"):
            typed = {"prompt": Prompt(**row["prompt"]), "signal": Signal(**row["signal"])}
            step = StepRecord(**row | typed)
            if step.move == "start":  # of the run, or of another phase
                moves = []
                continue
            needs = replace(recorded_needs(step), follows=run["follows"])
            choice = decide(moves, needs, cfg)
            assert (choice.move, choice.reason) == (step.move, step.reason), path.parent.name
            moves.append(step)


def recorded_needs(step: StepRecord) -> Needs:
    """Needs of a thousand failing examples with the demand of a step."""
    if not step.demand:
        return Needs(np.ones(1, bool))
    content, style = (round(1000 * step.demand[kind]) for kind in ("content", "style"))
    failing = np.arange(1000) < content + style
    return Needs(failing, (np.arange(1000) < content).astype(float))


def test_no_weights_and_no_large_files_are_committed() -> None:
    files = [p for p in (ROOT / "results").rglob("*") if p.is_file()]
    weights = (".safetensors", ".gguf", ".bin", ".pkl")
    assert [p for p in files if p.suffix in weights or p.stat().st_size > 2**20] == []


def test_the_paper_reads_what_exists_and_uses_only_generated_numbers() -> None:
    paper = ROOT / "paper"
    for kind, name in re.findall(r"\\(input|includegraphics)(?:\[[^]]*\])?\{([^}]+)\}", PAPER):
        if "#1" in name:  # of the study, where it is made
            continue
        suffix = ".tex" if kind == "input" else ".pdf"
        assert (paper / name).with_suffix(suffix).exists(), name
    exploratory = (paper / "exploratory.tex").read_text(encoding="utf-8")
    defined = set(re.findall(r"\\newcommand\{\\(\w+)\}", exploratory))
    assert set(re.findall(r"\\(expl[A-Z]\w*)", PAPER)) == defined
    results = PAPER.split(r"\section{Results}")[1].split(r"\section{Threats")[0]
    full = (ROOT / "results" / "full" / "numbers.tex").read_text(encoding="utf-8")
    # of a claim on one backbone
    named = set(re.findall(r"\\oneach\{(\w+)\}", PAPER))
    assert named and all(f"\\{name}EstimateSmollmTwoOneThreeFiveM}}" in full for name in named)
    body = re.sub(r"\[[^]]*\]|\d+\\%", "", results)
    assert not re.search(r"(?<![\w.])\d+(\.\d+)?(?![\w.])", body), "a result is typed by hand"


def test_the_paper_has_the_algorithm_and_the_methods_of_the_code() -> None:
    loop = (ROOT / "src/nslora/algorithm/loop.py").read_text(encoding="utf-8")
    margin = re.findall(r"# -+ ?(\d)(?:: (.*))?$", loop, re.MULTILINE)
    box = PAPER.split(r"\begin{algorithm}")[1].split(r"\end{algorithm}")[0]
    lines = box.split(r"\STATE")[1:]
    whys = [m[1] if (m := re.search(r"\\why\{([^}]*)\}", line)) else "" for line in lines]
    assert [(str(i), why) for i, why in enumerate(whys, 1)] == margin
    rows = re.findall(
        r"^\\METHOD\{(.+?)\}\{(.+?)\}\{(.+?)\}\{(.+?)\}\{(.+?)\}$", PAPER, re.MULTILINE
    )
    assert [name for name, *_ in rows] == list(METHODS)
    for name, decision, needs, targets, inputs in rows:
        row = METHODS[name]
        assert (decision, needs) == (row.decision, row.needs)
        assert (targets, inputs) in ((row.targets, row.inputs), ("--", "--"))


def test_the_paper_tells_the_settings_and_the_instances_of_the_study() -> None:
    trees = grid.load("full", ROOT).schedules
    told = re.findall(r"(?m)^\\SETTING\{(.+?)\}\{(.+?)\}", PAPER)
    assert len(told) > 10
    for name, value in told:
        settings = {cfg.settings[name.replace("\\", "")] for cfg in trees if cfg.task == "mixed"}
        # a second learning rate is told beside it, and the third is a family
        assert float(value) in settings and (len(settings) == 1 or name == "lr"), name
    families = re.findall(r"(?m)^\\FAMILY\{.+\}\{(.+?)\}\{(\d+)\}$", PAPER)
    assert sum(len(backbones.split(", ")) * int(n) for backbones, n in families) == len(trees)


@pytest.mark.parametrize("name", ["LOG.md", "LOG-speed.md"])
def test_a_log_has_an_index_and_each_entry_a_summary(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    headings = re.findall(r"(?m)^## (.*)$", text)
    anchors = [re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings]
    assert re.findall(r"\]\(#([^)]+)\)", text) == anchors
    for entry in re.split(r"(?m)^## ", text)[1:]:
        assert re.match(r".*\n\n> ", entry), entry[:60]


def test_the_benchmark_says_what_was_measured(tmp_path: Path) -> None:
    bench = ROOT / "results" / "bench"
    bench_report.write(tmp_path, json.loads((bench / "bench.json").read_text(encoding="utf-8")))
    for path in tmp_path.glob("*.*"):
        if path.suffix not in (".pdf", ".png"):
            assert (bench / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.skipif(shutil.which("latexmk") is None, reason="latexmk is not installed")
def test_the_paper_builds_with_every_reference(tmp_path: Path) -> None:
    skip = shutil.ignore_patterns("records", "recordings", "notebooks", "main.[!tp]*")
    for name in ("paper", "results"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    command = ["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path / "paper", capture_output=True, text=True)
    log = (tmp_path / "paper" / "main.log").read_text(errors="replace")
    assert done.returncode == 0, log[-2000:]
    assert "undefined" not in log and "multiply defined" not in log
