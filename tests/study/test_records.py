"""Reading finished records, choosing a study, and pairing by seed and item."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import write_record

from nslora.runs.store import FILES
from nslora.study import records
from nslora.types import UserError


def test_no_records_are_empty_frames(tmp_path: Path) -> None:
    nothing = records.load(tmp_path)
    assert nothing.runs.empty and nothing.steps.empty and nothing.scores.empty
    frames = (
        records.success,
        records.interaction,
        records.factorial,
        records.by_need,
        records.ceilings,
        records.decided,
        records.by_rule,
    )
    assert all(frame(nothing).empty for frame in frames)


def test_settings_are_columns_and_the_rest_has_dotted_names(tmp_path: Path) -> None:
    write_record(tmp_path, task="facts", method="lora", seed=3, rank=4)
    write_record(tmp_path, study="ablations", task="mixed", seed=4)
    read = records.load(tmp_path)
    assert {"rank", "targets", "needs", "moves"} <= set(read.settings) <= set(read.runs)
    assert "settings" not in read.runs
    (first,) = read.of("main").runs.to_dict("records")
    assert first["rank"] == 4 and first["targets"] == "gold" and first["seed"] == 3
    assert first["final.test.n"] == 12 and "factorial.tuned+final.success" in first
    steps = read.of("ablations").steps
    assert set(steps.task) == {"mixed"} and steps.step.tolist() == list(range(7))
    assert np.isnan(steps["signal.c1"].iloc[0]) and steps["signal.c1"].iloc[2] < 0
    assert steps["clock.seconds"].iloc[1] > 12 and steps["hidden.dev.content"].notna().all()
    assert len(steps["hidden.needs"].iloc[3]) == 12
    joined = read.with_settings(read.scores, "rank", "lr")
    assert joined.groupby("study")["rank"].first().to_dict() == {"main": 4, "ablations": 16}


def test_text_stays_as_it_is_and_unfinished_folders_are_left_out(tmp_path: Path) -> None:
    folder = write_record(tmp_path, task="facts", method="lora", seed=3)
    write_record(tmp_path, task="facts", method="lora", seed=4).rename(folder.with_name("x.part"))
    (tmp_path / "records" / "empty").mkdir()
    read = records.load(tmp_path)
    assert list(read.runs.seed) == [3]
    # a reply or an answer "NA" is not a missing value
    assert list(read.scores.output[:2]) == ['two\nlines, "quoted"', "NA"]
    assert set(read.scores.answer) == {"NA"}


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("run.json", '"config"', '"settings"'),
        ("run.json", "}", ""),
        ("run.json", '"method"', '"way"'),
        ("steps.jsonl", "{", ""),
        ("clock.jsonl", '"step"', '"move"'),
        ("hidden.jsonl", "{", ""),
        ("scores.csv", "content_strict", "strict"),
    ],
)
def test_damaged_record_is_one_sentence_naming_the_run(
    tmp_path: Path, file: str, old: str, new: str
) -> None:
    folder = write_record(tmp_path, task="facts", method="lora")
    path = folder / file
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UserError, match=f"^the run record .*{folder.name} cannot be read"):
        records.load(tmp_path)


@pytest.mark.parametrize("file", FILES)
def test_a_record_that_lost_a_file_does_not_vanish(tmp_path: Path, file: str) -> None:
    folder = write_record(tmp_path, task="facts", method="lora")
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"{folder.name} has no {file}"):
        records.load(tmp_path)


@pytest.mark.parametrize("schema", [1, 3, None])
def test_a_record_of_another_schema_is_refused_with_what_to_do(
    tmp_path: Path, schema: int | None
) -> None:
    folder = write_record(tmp_path, task="facts", method="lora")
    run = json.loads((folder / "run.json").read_text()) | {"schema": schema}
    if schema is None:
        # the first edition named none
        del run["schema"]
    (folder / "run.json").write_text(json.dumps(run))
    with pytest.raises(
        UserError, match=f"{folder.name} has schema {schema or 1}, not 2: make its run again"
    ):
        records.load(tmp_path)


def test_success_is_the_mean_of_seed_means(tmp_path: Path) -> None:
    for seed in range(3):
        write_record(tmp_path, task="mixed", method="monitor", seed=seed)
    write_record(tmp_path, study="single", task="mixed", method="monitor", seed=9)
    read = records.load(tmp_path)
    row = records.success(read).iloc[0]
    means = read.of("main").runs["final.test.success"]
    assert row["mean"] == pytest.approx(means.mean()) and row.n == 3
    assert 0 <= row.low < row["mean"] < row.high <= 1


def test_pairs_are_alike_in_everything_else() -> None:
    rows = [
        ("facts", "a", "lora", 0, "1", 1.0),
        ("facts", "a", "textgrad", 0, "1", 0.0),
        ("facts", "a", "lora", 0, "2", 0.0),
        # another seed, another backbone, another method: no pair
        ("facts", "a", "textgrad", 1, "2", 1.0),
        ("facts", "b", "lora", 0, "1", 0.5),
        ("facts", "a", "frozen", 0, "1", 1.0),
    ]
    frame = pd.DataFrame(rows, columns=["task", "backbone", "method", "seed", "id", "success"])
    frame = frame.assign(rule="r", instance=0, fact=frame.id, split="test")
    pairs = records.paired(frame, "lora", "textgrad")
    assert pairs.value.tolist() == [1.0] and pairs.backbone.tolist() == ["a"]
    assert records.paired(frame, "lora", "oracle").empty
    other = frame.assign(instance=(frame.method == "textgrad").astype(int))
    assert records.paired(other, "lora", "textgrad").empty


def test_methods_meet_where_only_what_a_method_brings_differs(tmp_path: Path) -> None:
    write_record(tmp_path, task="mixed", method="lora")
    write_record(tmp_path, task="mixed", method="neurosymbolic")
    write_record(tmp_path, task="mixed", method="textgrad", items=6)
    runs = records.load(tmp_path).runs.set_index("method").instance
    assert runs["lora"] == runs["neurosymbolic"] != runs["textgrad"]


def test_the_two_by_two_names_weights_and_prompt(loaded: records.Records) -> None:
    table = records.factorial(loaded).set_index(["cell", "backbone", "method"])["mean"]
    assert list(dict.fromkeys(table.index.get_level_values("cell"))) == list(records.FACTORIAL)
    here = table.xs(("smollm2-135m", "neurosymbolic"), level=("backbone", "method"))
    assert here["frozen+initial"] < here["tuned+initial"] < here["tuned+final"]
    runs = loaded.of("main").where(loaded.of("main").runs.method == "neurosymbolic").runs
    stored = runs[(runs.task == "mixed") & (runs.backbone == "smollm2-135m")]
    assert here["tuned+initial"] == pytest.approx(stored["factorial.tuned+initial.success"].mean())


def test_success_by_hidden_need(loaded: records.Records) -> None:
    table = records.by_need(loaded).set_index(["method", "need", "backbone"])["mean"]
    assert table["lora", "content", "smollm2-135m"] > 0.7 > table["lora", "style", "smollm2-135m"]


def test_ceilings_are_shares_of_items_without_the_other_need(loaded: records.Records) -> None:
    table = records.ceilings(loaded)
    assert set(table.task) == {"mixed"} and len(table) == 4
    assert table["mean"].tolist() == pytest.approx([1 / 3] * 4)


def test_what_decided_lists_schedules_and_reasons(tmp_path: Path) -> None:
    for seed in range(2):
        write_record(tmp_path, task="mixed", method="neurosymbolic", seed=seed, moves=4)
        write_record(tmp_path, task="mixed", method="lora", seed=seed)
    (row,) = records.decided(records.load(tmp_path)).itertuples()
    assert (row.method, row.runs, row.schedules) == ("neurosymbolic", 2, "NNNS (2)")
    assert row.reasons == "not saturated (6), saturated (2)"
