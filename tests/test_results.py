"""What is committed in results/ and shown in the README follows from the records."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from nslora.algorithm import router
from nslora.bench import report as bench_report
from nslora.config import RunConfig
from nslora.experiments import grid
from nslora.study import report
from nslora.types import Move, Prompt, Signal, StepRecord

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FOLDERS = [path.parent for path in sorted(ROOT.glob("results/**/claims.json"))]
each_folder = pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)


@each_folder
def test_tables_and_claims_follow_from_the_records(folder: Path) -> None:
    assert list((folder / "records").glob("*/run.json"))
    assert report.verify(folder) == []


def test_the_readme_shows_the_main_table() -> None:
    shown = re.search(r"<!-- main-table -->\n(.*?)<!-- /main-table -->", README, re.DOTALL)
    assert shown and shown[1].strip() == report.readme_table(ROOT / "results").strip()


def test_every_file_the_readme_links_to_is_there() -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", README)
    assert "results/figures/success.png" in links
    assert [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("name", ["quick", "full"])
def test_expected_costs_follow_from_the_receipts(name: str) -> None:
    profile = grid.load(name, ROOT)
    assert (profile.results / "expected.md").read_text(encoding="utf-8") == grid.expectation(
        profile
    )


@each_folder
def test_records_are_receipts(folder: Path) -> None:
    for path in (folder / "records").glob("*/run.json"):
        run = json.loads(path.read_text(encoding="utf-8"))
        assert run["run_id"] == path.parent.name
        assert (
            run["run_id"] == RunConfig.of(run["config"]).run_id
        )  # no new setting may rename an old run
        assert (
            run["weights"]
            and run["environment"]["revision"]
            and run["environment"]["versions"]["torch"]
        )
        assert run["cost"]["wall_s"] > 0
        assert run["final"]["test"]["n"] > 0


@each_folder
def test_todays_router_decides_as_the_records_say(folder: Path) -> None:
    """A changed decision must not leave runs of the old one under the same name."""
    for path in (folder / "records").glob("*/run.json"):
        cfg = RunConfig.of(json.loads(path.read_text(encoding="utf-8"))["config"])
        history: list[StepRecord] = []
        for line in (path.parent / "steps.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            typed = {
                "move": Move(row["move"]),
                "prompt": Prompt(**row["prompt"]),
                "signal": Signal(**row["signal"]),
            }
            step = StepRecord(**row | typed)
            if step.move is Move.STOP:  # the start, or that of another phase
                history = []
                continue
            if cfg.method != "random":
                decided = router.DECISIONS[cfg.method](
                    history, step.demand, cfg, np.random.default_rng(0)
                )
                assert decided is step.move, (path.parent.name, step.step)
            history.append(step)
        stopped = len(history) < cfg.moves and cfg.method in ("neurosymbolic", "oracle")
        assert not (stopped and router.unsettled(history, cfg)), path.parent.name


def test_no_weights_and_no_large_files_are_committed() -> None:
    files = [p for p in (ROOT / "results").rglob("*") if p.is_file()]
    assert [
        p
        for p in files
        if p.suffix in (".safetensors", ".gguf", ".bin", ".pkl") or p.stat().st_size > 2**20
    ] == []


def test_the_paper_reads_what_exists_and_uses_only_generated_numbers() -> None:
    paper = ROOT / "paper"
    text = (paper / "main.tex").read_text(encoding="utf-8")
    for kind, name in re.findall(r"\\(input|includegraphics)(?:\[[^]]*\])?\{([^}]+)\}", text):
        assert (paper / name).with_suffix(".tex" if kind == "input" else ".pdf").exists(), name
    defined = set(
        re.findall(
            r"\\newcommand\{\\(\w+)\}",
            (ROOT / "results" / "numbers.tex").read_text(encoding="utf-8"),
        )
    )
    assert {"runs", *re.findall(r"\\(claim\w+)", text)} <= defined
    body = re.sub(
        r"\[[^]]*\]|\d+\\%", "", text.split(r"\section{Results}")[1].split(r"\section{Limits}")[0]
    )
    assert not re.search(r"(?<![\w.])\d+(\.\d+)?(?![\w.])", body), "a result is typed by hand"


def test_the_benchmark_says_what_was_measured(tmp_path: Path) -> None:
    bench = ROOT / "results" / "bench"
    bench_report.write(tmp_path, json.loads((bench / "bench.json").read_text(encoding="utf-8")))
    for path in tmp_path.glob("*.*"):
        if path.suffix not in (".pdf", ".png"):
            assert (bench / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.skipif(shutil.which("latexmk") is None, reason="latexmk is not installed")
def test_the_paper_builds_with_every_reference(tmp_path: Path) -> None:
    for name in ("paper", "results"):
        skip = shutil.ignore_patterns(
            "records", "recordings", "main.aux", "main.bbl", "main.fdb_latexmk", "main.log"
        )
        shutil.copytree(ROOT / name, tmp_path / name, ignore=skip)
    command = ["latexmk", "-pdf", "-interaction=nonstopmode", "-halt-on-error", "main.tex"]
    done = subprocess.run(command, cwd=tmp_path / "paper", capture_output=True, text=True)
    log = (tmp_path / "paper" / "main.log").read_text(errors="replace")
    assert done.returncode == 0, log[-2000:]
    assert "undefined" not in log and "multiply defined" not in log
