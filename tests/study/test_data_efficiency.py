"""The remaking study on synthetic records: arms and sizes are told apart, and other runs stay out of it."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import yaml
from synthetic import write_lines, write_record

from nslora.study import data_efficiency, records

STUDY = {"study": "data-efficiency", "task": "math", "method": "alternate"}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> records.Records:
    folder = tmp_path_factory.mktemp("results")
    for seed in range(3):
        for items in (8, 32):
            for targets, skill in (("gold", 0.25), ("verified", 0.75)):
                arm = {"seed": seed, "items": items, "targets": targets, "test_items": 40}
                path = write_record(folder, (skill, 1.0), **STUDY, **arm) / "steps.jsonl"
                steps = [json.loads(line) for line in path.read_text().splitlines()]
                source = {"gold": "gold", "verified": "remade"}[targets]
                for step in steps:
                    if step["move"] == "numerical":
                        step["evidence"]["pairs"] = {source: items}
                write_lines(path, steps)
        # of another study, and of another task
        write_record(folder, (1.0, 1.0), task="math", method="alternate", seed=seed, targets="gold")
        other = STUDY | {"task": "mixed", "targets": "gold"}
        write_record(folder, (1.0, 1.0), seed=seed, **other)
    return records.load(folder)


def test_success_by_arm_and_number_of_problems(study: records.Records) -> None:
    frame = data_efficiency.efficiency(study).set_index(["targets", "items"])
    assert sorted(frame.index) == [("gold", 8), ("gold", 32), ("verified", 8), ("verified", 32)]
    assert frame.loc[("gold", 8), "mean"] == pytest.approx(0.25, abs=0.15)
    assert frame.loc[("verified", 32), "mean"] == pytest.approx(0.75, abs=0.15)
    assert set(frame.n) == {3}
    fig = data_efficiency.data_efficiency(frame.reset_index())
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == ["bare results", "own verified working"]
    assert [text.get_text() for text in fig.axes[0].get_xticklabels()] == ["8", "32"]


def test_the_amount_of_training_data_is_shown_by_source(study: records.Records) -> None:
    table = data_efficiency.counts(study).set_index(["targets", "items"])
    assert table.loc[("gold", 32), "gold"] == 32 and table.loc[("gold", 32), "remade"] == 0
    assert table.loc[("verified", 8), "remade"] == 8


def test_baking_is_told_from_keeping_the_prompt(tmp_path: Path) -> None:
    for seed in range(3):
        shared = {"task": "style", "rule": "json", "seed": seed, "test_items": 40}
        for method, skill in {"frozen": 0.0, "textgrad": 0.5}.items():
            write_record(tmp_path, (1.0, skill), method=method, **shared)
        baking = {"study": "baking", "method": "alternate", "moves": 2, **shared}
        for bake, skill in ((False, 1.0), (True, 0.25)):
            write_record(tmp_path, (1.0, skill), bake=bake, **baking)
        # of the main study, and of a backbone on which nothing was baked
        write_record(tmp_path, (1.0, 0.0), method="alternate", **shared)
        write_record(tmp_path, (1.0, 0.0), method="frozen", **shared, backbone="gemma3-270m")
    frame = data_efficiency.baking(records.load(tmp_path))
    assert frame.arm.tolist() == ["nothing", "prompt", "prompt and weights", "weights"]
    assert frame["mean"].tolist() == pytest.approx([0.0, 0.5, 1.0, 0.25], abs=0.15)
    assert set(frame.n) == {3} and set(frame.backbone) == {"smollm2-135m"}


def test_without_runs_there_is_nothing(tmp_path: Path) -> None:
    empty = records.load(tmp_path)
    tables = (data_efficiency.efficiency, data_efficiency.counts, data_efficiency.baking)
    assert all(frame(empty).empty for frame in tables)


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
    assert "3 questions" in text
    cells = {tuple(word.strip() for word in line.split("|")[1:-1]) for line in text.split("\n")}
    assert {("a", "remade", "2", "1"), ("b", "rewritten", "1", "1")} <= cells
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


def test_one_arm_alone_is_drawn(study: records.Records) -> None:
    frame = data_efficiency.efficiency(study)
    fig = data_efficiency.data_efficiency(frame[frame.targets == "gold"])
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["bare results"]
