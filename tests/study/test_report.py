"""Tables, figures and numbers of a synthetic results folder, and that tampering with any of them is seen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from grown import write_tree
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from synthetic import write_record

from nslora.study import claims, records, report
from nslora.study.schedules import load


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of one seed with everything built from it, pictures too."""
    results = tmp_path_factory.mktemp("small")
    for method in ("frozen", "lora-remade", "textgrad", "neurosymbolic"):
        write_record(results, task="mixed", method=method)
    write_record(results, study="ablations", task="mixed", replay=0.0)
    report.build(results)
    return results


def test_build_writes_every_kind_of_file(small: Path) -> None:
    names = {path.name for path in small.rglob("*") if "records" not in path.parts}
    kinds = ("success", "interaction", "cost_curves", "signal_traces", "ablations")
    kinds += ("threshold_sensitivity", "need_roc", "cost_parts")
    assert {f"{kind}.{end}" for kind in kinds for end in ("pdf", "png", "csv", "json")} <= names
    tables = ("main", "claims", "verdicts", "factorial", "needs", "decided", "cost")
    assert {f"{kind}.{end}" for kind in tables for end in ("md", "tex", "csv")} <= names
    assert {"claims.json", "numbers.tex"} <= names
    assert report.verify(small) == []


def test_an_empty_folder_is_no_error(tmp_path: Path) -> None:
    made = {path.name for path in report.build(tmp_path)}
    assert made == {
        f"{name}.{end}" for name in ("main", "claims", "verdicts") for end in ("md", "tex", "csv")
    } | {
        "claims.json",
        "numbers.tex",
    }
    assert report.show_table(tmp_path) == "no finished runs yet" and report.verify(tmp_path) == []
    assert "not run" in report.readme_claims(tmp_path)


def test_sidecars_name_the_interval_and_the_runs_behind_it(grid: Path) -> None:
    shown = json.loads((grid / "figures" / "interaction.json").read_text())
    assert shown["interval"].startswith("95%, Student's t") and shown["n_seeds"] == "3"
    assert len(shown["sources"]) == 12 * 2 * 3
    assert all(name.startswith("mixed-") for name in shown["sources"])
    traces = json.loads((grid / "figures" / "signal_traces.json").read_text())
    assert len(traces["sources"]) == 2 and "no interval" in traces["interval"]
    changed = json.loads((grid / "figures" / "ablations.json").read_text())
    assert len(changed["sources"]) == 3 * 2 * 3, "frozen, the main runs and those with a change"


def test_main_table_cells_are_the_records_numbers(loaded: records.Records) -> None:
    table = report.main_table(loaded)
    runs = loaded.of("main").runs.query(
        "task == 'mixed' and backbone == 'smollm2-135m' and method == 'lora'"
    )
    cell = str(table.loc["lora", ("mixed", "smollm2-135m")])
    assert cell.startswith(f"{100 * runs['final.test.success'].mean():.1f} [")
    assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", cell)
    assert table.loc["oracle", ("facts", "smollm2-135m")] == "-"
    assert table.loc["ceiling of prompts", ("mixed", "smollm2-135m")] == "33.3"
    assert list(table.columns.unique(0)) == ["facts", "style", "math", "mixed"]


def test_tables_agree_in_every_form(grid: Path) -> None:
    markdown = report.show_table(grid)
    assert markdown == (grid / "tables" / "main.md").read_text()
    assert markdown._repr_markdown_() == markdown and "| lora " in markdown
    tex = (grid / "tables" / "main.tex").read_text()
    # two rows of heads, twelve methods, two ceilings
    assert tex.count(r"\\") == 2 + 12 + 2


def test_seeds_and_rules_short_of_the_table_are_marked(tmp_path: Path) -> None:
    for seed in range(2):
        for rule in ("json", "bullet"):
            write_record(tmp_path, task="style", method="textgrad", rule=rule, seed=seed)
    write_record(tmp_path, task="style", method="lora", rule="json")
    cells = report.main_table(records.load(tmp_path)).iloc[:, 0]
    assert re.fullmatch(r"\d+\.\d \(n=1, 1 of 2 rules\)", str(cells["lora"]))
    assert "rule" not in str(cells["textgrad"])
    assert "seeds: 1-2." in report.show_table(tmp_path)


def test_the_two_by_two_and_what_decided_are_tables(grid: Path) -> None:
    table = (grid / "tables" / "factorial.md").read_text()
    assert "smollm2-135m<br>tuned+initial" in table
    decided = (grid / "tables" / "decided.md").read_text()
    assert "NNNSSN (3)" in decided and "not saturated (12), saturated (6)" in decided


def test_numbers_are_distinct_latex_commands(grid: Path, loaded: records.Records) -> None:
    text = (grid / "numbers.tex").read_text()
    commands = re.findall(r"^\\newcommand\{\\([A-Za-z]+)\}\{[^{}]+\}$", text, re.M)
    assert len(commands) == len(set(commands)) == len(text.splitlines())
    value = dict(re.findall(r"\\newcommand\{\\(\w+)\}\{(.*)\}", text))
    cell = str(report.main_table(loaded).loc["lora", ("mixed", "smollm2-135m")])
    assert cell.startswith(value["successMixedSmollmTwoOneThreeFiveMLora"])
    assert value["claimNeedClassifierVerdict"] in ("holds", "undecided")
    # of trees, which this folder has none of
    assert value["claimBeatsBothVerdict"] == "not run"


@given(st.lists(st.text("aZ9._-: ", max_size=8), min_size=1, max_size=4))
def test_macro_names_are_letters(words: list[str]) -> None:
    assert re.fullmatch("[A-Za-z]*", report.macro("success", *words))


def test_claims_tables_say_what_claims_json_says(
    grid: Path, loaded: records.Records, judged: dict[str, Any]
) -> None:
    stored = json.loads((grid / "claims.json").read_text())
    assert stored == judged
    table, short = (grid / "tables" / "claims.md").read_text(), report.readme_claims(grid)
    for claim in stored["claims"]:
        for row in claim["comparisons"]:
            cells = (claim["key"], row["comparison"], row["backbone"], claims.points(row))
            pattern = r"\s*\|\s*".join(re.escape(cell) for cell in cells)
            assert re.search(rf"\| {pattern} ", table)
        line = next(line for line in short.splitlines() if line.startswith(f"| {claim['claim']}"))
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        assert cells[1] == claim["verdict"]
        assert cells[2:4] == [
            claim["backbones"].get(name, "-") for name in sorted(set(loaded.runs.backbone))
        ]


def test_any_frame_becomes_a_table_of_texts(tmp_path: Path) -> None:
    frame = pd.DataFrame({"x": ["a"], "n": [12345.6], "share": [0.12345], "gone": [None]})
    table = report.plain(frame, "x")
    assert table.loc["a"].tolist() == ["12,346", "0.123", "-"]
    paths = report.save_table(table, frame, tmp_path / "t", "said")
    assert "|" in paths[0].read_text() and r"\toprule" in paths[1].read_text()


def test_build_removes_what_earlier_versions_left_behind(tmp_path: Path) -> None:
    report.build(tmp_path)
    old = tmp_path / "figures" / "kept.csv"
    old.parent.mkdir()
    old.write_text("a figure that has another name now")
    assert report.verify(tmp_path) == [
        "figures/kept.csv is stored but does not follow from the records."
    ]
    report.build(tmp_path)
    assert not old.exists()


def test_verify_sees_whatever_was_changed(tmp_path: Path) -> None:
    for method in ("lora-remade", "textgrad"):
        record = write_record(tmp_path, task="facts", method=method)
    report.build(tmp_path, images=False)
    assert report.verify(tmp_path) == []
    stored = (tmp_path / "claims.json").read_text()
    (tmp_path / "claims.json").write_text(stored.replace("not run", "holds"))
    (tmp_path / "tables" / "extra.md").write_text("typed by hand")
    (tmp_path / "figures" / "success.csv").unlink()
    run = json.loads((record / "run.json").read_text())
    run["final"]["test"]["content"] += 0.01
    run["factorial"]["tuned+final"]["success"] += 0.01
    (record / "run.json").write_text(json.dumps(run))
    assert report.verify(tmp_path) == [
        f"{record.name}: run.json and scores.csv disagree on test content.",
        f"{record.name}: run.json and scores.csv disagree on tuned+final success.",
        "claims.json differs from what the records give.",
        "figures/success.csv is missing.",
        "tables/extra.md is stored but does not follow from the records.",
    ]


def test_of_a_study_that_has_not_begun_only_its_trees_are_verified(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "schedules", seed=10)
    # replies for the trees are kept there
    (tmp_path / "full" / "recordings").mkdir(parents=True)
    assert report.verify(tmp_path / "full") == []
    nodes = folder / "nodes.jsonl"
    nodes.write_text(nodes.read_text().replace('"test_items": "1', '"test_items": "0', 1))
    (said,) = report.verify(tmp_path / "full")
    assert "test items disagree" in said
    (tmp_path / "full" / "claims.json").write_text("{}")
    assert "claims.json differs from what the records give." in report.verify(tmp_path / "full")


def test_edits_and_signals_of_unseen_trees_are_counted(tmp_path: Path) -> None:
    worth = {"": 0.0, "N": 0.5, "S": 0.25, "NN": 0.5, "NS": 0.25, "SN": 0.75, "SS": 0.75}
    signals = {"N": {"c2": 1.0}, "NN": {"c1": -0.05, "c2": 0.4}, "SN": {"c1": -0.9, "c2": 0.6}}
    for seed in (10, 100):  # of these tuning has seen one
        write_tree(
            tmp_path, worth.__getitem__, seed=seed, depth=2, signal=lambda s: signals.get(s, {})
        )
    # the better move is known at the start alone: after N, what N had is returned, and below S either ends alike
    assert report.tree_counts(load(tmp_path)) == {
        "edits": 3,
        "editsAccepted": 3,
        "editsLost": 1,  # NS
        "editsGained": 2,
        "nodes": 3,
        "nodesUnequal": 1,
        "cOneNodes": 2,
        "cOneSmall": 1,
        "cTwoNodes": 3,
        "cTwoSmall": 1,
    }
    assert report.tree_counts(load(tmp_path, "tuning")) == {}


@pytest.mark.parametrize("method", ["neurosymbolic", "frozen"])
def test_picture_of_a_finished_run(tmp_path: Path, method: str) -> None:
    fig = report.run_picture(write_record(tmp_path, task="mixed", method=method))
    assert isinstance(fig, Figure)
    titles = {ax.get_title("left") for ax in fig.axes}
    assert {"dev reward", "training loss, nats per token"} <= titles
