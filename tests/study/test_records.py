"""Reading finished records, choosing the main comparison, and pairing by seed and item."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import REWRITTEN, START, write_record

from nslora.study import records, stats
from nslora.types import UserError


def edit_steps(folder: Path, change: Callable[[list[dict]], list[dict]]) -> None:
    path = folder / "steps.jsonl"
    rows = change([json.loads(line) for line in path.read_text().splitlines()])
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_no_records_are_empty_frames(tmp_path: Path) -> None:
    loaded = records.load(tmp_path)
    assert loaded.runs.empty and loaded.steps.empty and loaded.scores.empty
    assert (
        records.success(loaded).empty
        and records.gains(loaded).empty
        and records.curves(loaded).empty
    )
    assert (
        records.interaction(loaded).empty
        and records.traces(loaded).empty
        and records.diffs(loaded).empty
    )


def test_load_keeps_text_as_it_is_and_skips_unfinished_folders(tmp_path: Path) -> None:
    folder = write_record(tmp_path, task="facts", method="lora", seed=3)
    folder.rename(folder.with_name("other"))
    write_record(tmp_path, task="facts", method="lora", seed=4).rename(folder.with_name("x.part"))
    loaded = records.load(tmp_path)
    assert list(loaded.runs.seed) == [3] and loaded.runs["final.test.n"].iloc[0] == 12
    assert list(loaded.scores.output[:2]) == [
        'two\nlines, "quoted"',
        "NA",
    ]  # a reply "NA" is not a missing value
    assert np.isnan(loaded.steps["signal.c1"].iloc[0]) and loaded.steps["signal.c1"].iloc[2] < 0


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("run.json", '"config"', '"settings"'),
        ("run.json", "}", ""),
        ("run.json", '"items"', '"itemz"'),
        (
            "steps.jsonl",
            "{",
            "",
        ),
        ("scores.csv", "content_strict", "strict"),
    ],
)
def test_damaged_record_is_one_sentence_naming_the_run(
    tmp_path: Path, file: str, old: str, new: str
) -> None:
    folder = write_record(tmp_path, task="facts", method="lora")
    path = folder / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=f"^the run record {folder.name} cannot be read"):
        records.load(tmp_path)


def test_main_comparison_leaves_out_ablations(tmp_path: Path) -> None:
    for seed in range(2):
        for method in ("frozen", "lora"):
            write_record(tmp_path, task="facts", method=method, seed=seed)
    for seed in range(5):  # more runs, but of one method
        write_record(tmp_path, task="facts", method="lora", seed=seed, rank=4)
    for arm in ("gold", "verified"):  # of the remaking study, on a task without a comparison
        write_record(tmp_path, task="math", method="alternate", targets=arm)
    loaded = records.load(tmp_path)
    assert len(loaded.runs) == 11 and len(loaded.main.runs) == 4
    assert (
        set(loaded.main.scores.run_id)
        == set(loaded.main.steps.run_id)
        == set(loaded.main.runs.run_id)
    )


def test_success_is_the_mean_of_seed_means(tmp_path: Path) -> None:
    for seed in range(3):
        write_record(tmp_path, task="mixed", method="monitor", seed=seed)
    loaded = records.load(tmp_path)
    row = records.success(loaded).iloc[0]
    expected = stats.t_interval(loaded.runs["final.test.success"])
    assert (row["mean"], row.low, row.high, row.n) == pytest.approx(
        (expected.mean, expected.low, expected.high, 3)
    )


def test_pairs_are_alike_in_everything_else(tmp_path: Path) -> None:
    rows = [
        ("facts", "a", "lora", 0, "1", 1.0),
        ("facts", "a", "textgrad", 0, "1", 0.0),
        ("facts", "a", "lora", 0, "2", 0.0),
        ("facts", "a", "textgrad", 1, "2", 1.0),  # other seeds: no pair
        ("facts", "b", "lora", 0, "1", 0.5),
        ("facts", "a", "frozen", 0, "1", 1.0),
    ]
    frame = pd.DataFrame(rows, columns=["task", "backbone", "method", "seed", "id", "success"])
    frame = frame.assign(rule="r", settings="{}", split="test")
    pairs = records.paired(frame, "lora", "textgrad")
    assert pairs.to_numpy().tolist() == [1.0] and pairs.index.get_level_values("backbone")[0] == "a"
    assert records.paired(frame, "lora", "oracle").empty


def test_gains_are_over_frozen(tmp_path: Path) -> None:
    for method, skill in {"frozen": (0.0, 1.0), "lora": (1.0, 1.0), "textgrad": (0.0, 1.0)}.items():
        write_record(tmp_path, skill, task="facts", method=method)
    gains = records.gains(records.load(tmp_path)).set_index("method")["mean"]
    assert gains.to_dict() == {"lora": 1.0, "textgrad": 0.0}


def test_progress_counts_from_the_start_and_to_the_budget(tmp_path: Path) -> None:
    folder = write_record(tmp_path, task="mixed", method="neurosymbolic", moves=6)

    def stop_early_and_fall_back(rows: list[dict]) -> list[dict]:
        rows[4]["dev"]["value"] = 0.0
        return rows[:5]

    edit_steps(folder, stop_early_and_fall_back)
    run = records.progress(records.load(tmp_path)).set_index("move")
    assert list(run.index) == list(range(7))
    assert run.value.is_monotonic_increasing and run.value[6] == run.value[3] > 0
    assert (
        run.tokens[0] == 0
        and run.tokens[3] == 3 * 2000
        and run.tokens[6] == run.tokens[4] == 6000 + 5 * 400
    )
    assert run.seconds[6] == run.seconds[4] > run.seconds[3]


def test_traces_show_one_run_per_backbone_with_its_thresholds(tmp_path: Path) -> None:
    for seed in (2, 1):
        write_record(tmp_path, task="mixed", method="neurosymbolic", seed=seed, c1_eps=0.07)
    trace = records.traces(records.load(tmp_path))
    assert trace.run_id.nunique() == 1 and "-s1-" in trace.run_id[0]
    assert set(trace.c1_eps) == {0.07} and list(trace.step) == list(range(7))


def test_diffs_take_the_first_run_that_changed_its_prompt(tmp_path: Path) -> None:
    edited = {
        0: START,
        1: START | {"question": "{question} Be brief."},
        2: REWRITTEN,
    }  # 1: the template alone
    for seed, prompt in edited.items():
        folder = write_record(tmp_path, task="mixed", method="neurosymbolic", seed=seed)
        run = json.loads((folder / "run.json").read_text())
        run["best"]["prompt"] = prompt
        (folder / "run.json").write_text(json.dumps(run))
    diff = records.diffs(records.load(tmp_path))
    assert set(diff.seed) == {1} and "".join(diff.token[diff.op == "+"]) == " Be brief."
    assert "".join(diff.token[diff.op != "-"]) == "\n".join(edited[1].values())
