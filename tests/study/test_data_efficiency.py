"""The remaking study on synthetic records: arms and sizes are told apart, and other runs stay out of it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import yaml
from synthetic import write_record

from nslora.config import CHOICES
from nslora.study import data_efficiency, records, report


@pytest.fixture
def study(tmp_path: Path) -> records.Records:
    for seed in range(3):
        for items in (8, 32):
            for targets, skill in (("gold", 0.25), ("verified", 0.75)):
                shared = {
                    "task": "math",
                    "seed": seed,
                    "items": items,
                    "targets": targets,
                    "test_items": 40,
                }
                folder = write_record(tmp_path, (skill, 1.0), method="alternate", **shared)
                source = {"gold": "gold", "verified": "remade"}[targets]
                lines = [
                    json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()
                ]
                for line in lines:
                    if line["move"] == "numerical":
                        line["detail"]["pairs"] = {source: items}
                (folder / "steps.jsonl").write_text(
                    "".join(json.dumps(line) + "\n" for line in lines)
                )
        write_record(
            tmp_path, (1.0, 1.0), task="math", method="lora", seed=seed, items=8, targets="gold"
        )
        write_record(
            tmp_path,
            (1.0, 1.0),
            task="mixed",
            method="alternate",
            seed=seed,
            items=8,
            targets="gold",
        )
    return records.load(tmp_path)


def test_success_by_arm_and_number_of_problems(study: records.Records) -> None:
    frame = data_efficiency.efficiency(study).set_index(["targets", "items"])
    assert sorted(frame.index) == [("gold", 8), ("gold", 32), ("verified", 8), ("verified", 32)]
    assert frame.loc[("gold", 8), "mean"] == pytest.approx(0.25, abs=0.15)
    assert frame.loc[("verified", 32), "mean"] == pytest.approx(0.75, abs=0.15)
    assert set(frame.n) == {3}
    axes = data_efficiency.data_efficiency(data_efficiency.efficiency(study)).axes
    assert [len(ax.lines) for ax in axes] == [2]


def test_a_second_round_is_told_from_as_many_epochs_in_one(
    study: records.Records, tmp_path: Path
) -> None:
    assert data_efficiency.iterating(study).empty
    before, pairs = data_efficiency.efficiency(study), data_efficiency.counts(study)
    shared = {"task": "math", "items": 32, "targets": "verified", "test_items": 40}
    for seed in range(3):
        write_record(tmp_path, (1.0, 1.0), method="alternate", seed=seed, moves=4, **shared)
        write_record(tmp_path, (0.5, 1.0), method="alternate", seed=seed, epochs=8, **shared)
    both = records.load(tmp_path)
    table = data_efficiency.iterating(both).set_index("schedule")
    assert table["items"].tolist() == [32] * 3 and set(table.n) == {3}
    expected = {"4 moves, 1 epochs": 1.0, "6 moves, 8 epochs": 0.5, "6 moves, 1 epochs": 0.75}
    assert table["mean"].to_dict() == pytest.approx(expected, abs=0.15)
    assert data_efficiency.efficiency(both).equals(before) and data_efficiency.counts(both).equals(
        pairs
    )


def test_the_amount_of_training_data_is_shown_by_source(study: records.Records) -> None:
    table = data_efficiency.counts(study).set_index(["targets", "items"])
    assert table.loc[("gold", 32), "gold"] == 32 and table.loc[("gold", 32), "remade"] == 0
    assert table.loc[("verified", 8), "remade"] == 8


def test_baking_is_told_from_keeping_the_prompt(tmp_path: Path) -> None:
    skills = {"frozen": 0.0, "textgrad": 0.5}
    for seed in range(3):
        shared = {"task": "style", "rule": "json", "seed": seed, "test_items": 40}
        for method, skill in skills.items():
            write_record(tmp_path, (1.0, skill), method=method, **shared)
        for bake, skill in ((False, 1.0), (True, 0.25)):
            write_record(
                tmp_path,
                (1.0, skill),
                method="alternate",
                bake=bake,
                moves=2,
                returned="tuned",
                **shared,
            )
        write_record(
            tmp_path, (1.0, 0.0), method="alternate", **shared
        )  # of another study, as is all of the next
        write_record(tmp_path, (1.0, 0.0), method="alternate", **shared, backbone="gemma3-270m")
    frame = data_efficiency.baking(records.load(tmp_path))
    assert frame.arm.tolist() == ["nothing", "prompt", "prompt and weights", "weights"]
    assert frame["mean"].tolist() == pytest.approx([0.0, 0.5, 1.0, 0.25], abs=0.15)
    assert set(frame.n) == {3}
    report.build(tmp_path)
    rows = [
        line.split(" | ") for line in (tmp_path / "tables" / "baking.md").read_text().splitlines()
    ]
    assert [row[0].strip("| ") for row in rows[2:6]] == frame.arm.tolist()
    assert [float(row[1].split(" ")[0]) for row in rows[2:6]] == pytest.approx(
        100 * frame["mean"], abs=0.05
    )


def test_without_runs_there_is_nothing(tmp_path: Path) -> None:
    empty = records.load(tmp_path)
    tables = (
        data_efficiency.efficiency,
        data_efficiency.iterating,
        data_efficiency.counts,
        data_efficiency.baking,
    )
    assert all(frame(empty).empty for frame in tables)


def test_the_arms_are_those_that_a_run_can_have() -> None:
    assert set(data_efficiency.ARMS) == set(CHOICES["targets"]) - {"remade"}


def test_the_remade_pairs_of_all_runs_are_one_dataset_with_a_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert data_efficiency.save_dataset(tmp_path, tmp_path / "remade") == []
    base = {
        "question": "1 + 1?",
        "answer": "It is 2.",
        "backbone": "a",
        "source": "remade",
        "run": "one",
    }
    runs = {
        "one": [base, base | {"question": "1 + 2?", "answer": "3"}],
        "two": [
            base | {"run": "two"},
            base | {"backbone": "b", "source": "rewritten", "run": "two"},
        ],
    }
    for name, rows in runs.items():
        (tmp_path / "records" / name).mkdir(parents=True)
        (tmp_path / "records" / name / "remade.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows)
        )
    data, card = data_efficiency.save_dataset(tmp_path, tmp_path / "remade")
    loaded = datasets.load_dataset(
        "json", data_files=str(data), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert [row["run"] for row in loaded] == ["one", "one", "two"]
    text = card.read_text()
    assert (
        "3 questions" in text
        and "| a | remade | 2 | 1 |" in text
        and "| b | rewritten | 1 | 1 |" in text
    )
    about = yaml.safe_load(text.split("---")[1])
    assert about["license"] == "apache-2.0"
    monkeypatch.setattr(data_efficiency, "SHARD", 2)
    *parts, _ = data_efficiency.save_dataset(tmp_path, tmp_path / "parts")
    assert [len(path.read_text().splitlines()) for path in parts] == [2, 1]
    assert parts == sorted((tmp_path / "parts").glob(about["configs"][0]["data_files"])), (
        "the card names the files"
    )
    assert "".join(path.read_text() for path in parts) == data.read_text()
    monkeypatch.setattr(data_efficiency, "SHARD", 3)
    whole, _ = data_efficiency.save_dataset(tmp_path, tmp_path / "parts")
    assert list((tmp_path / "parts").glob("train-*.jsonl")) == [whole], (
        "no file of a larger data set is left"
    )
