"""The stream's measures on records made by hand: drops and recoveries, what is kept, regret, and the claim."""

from __future__ import annotations

import csv
import json
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
from synthetic import HEADER, split_means, write_record

from nslora.study import claims, records, report, stream

QUICK = [
    0.0,
    0.8,
    1.0,
    0.5,
    1.0,
    1.0,
    0.2,
    0.95,
    1.0,
]  # dev reward: three phases of a start and two moves
SLOW = [0.0, 0.2, 0.4, 0.1, 0.1, 0.2, 0.0, 0.0, 0.0]
FACTS = {"test-1": ("a", "b"), "test-2": ("a", "b", "c", "d"), "test": ("a", "b", "c", "d")}


def write_stream(
    results: Path, method: str, seed: int, rewards: list[float], forgotten: str = ""
) -> Path:
    """A record of the stream with the given dev rewards per step; `forgotten` facts are wrong at the end."""
    shared = {
        "task": "stream",
        "method": method,
        "seed": seed,
        "moves": 2,
        "items": 2,
        "test_items": 4,
    }
    folder = write_record(results, **shared)
    step = json.loads((folder / "steps.jsonl").read_text().splitlines()[0])
    moves = ["stop", "numerical", "symbolic"] * 3
    rows = [
        {**step, "step": i, "move": moves[i], "dev": {**step["dev"], "value": rewards[i]}}
        for i in range(9)
    ]
    if method == "frozen":
        rows = [row for row in rows if row["move"] == "stop"]
    (folder / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    graded: dict[str, list[tuple[object, ...]]] = {
        split: [
            (split, f"both:{fact}:job:{wording}", "both", right, right, right, 1.0, "x")
            for fact in facts
            for wording, right in enumerate((1.0, float(split != "test" or fact not in forgotten)))
        ]
        for split, facts in FACTS.items()
    }
    with (folder / "scores.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *chain(*graded.values())])
    run = json.loads((folder / "run.json").read_text())
    run["final"] = {split: split_means(rows) for split, rows in graded.items()}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def streamed(tmp_path: Path) -> records.Records:
    for seed in range(3):
        write_stream(tmp_path, "neurosymbolic", seed, QUICK)
        write_stream(tmp_path, "lora", seed, SLOW, forgotten="b")
        write_stream(tmp_path, "textgrad", seed, SLOW, forgotten="ab")
        write_stream(tmp_path, "frozen", seed, SLOW)
    return records.load(tmp_path)


def test_reward_is_the_best_so_far_of_each_phase(streamed: records.Records) -> None:
    frame = stream.by_move(streamed)
    run = frame[(frame.method == "lora") & (frame.seed == 0)]
    assert run.value.tolist() == [0.0, 0.2, 0.4, 0.1, 0.1, 0.2, 0.0, 0.0, 0.0]
    assert run.phase.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    stopped = frame[(frame.method == "frozen") & (frame.seed == 0)]
    assert (
        stopped.value.tolist() == [0.0] * 3 + [0.1] * 3 + [0.0] * 3
    )  # without moves, each phase's start is held


def test_recovery_counts_moves_until_most_of_the_old_level_is_back(
    streamed: records.Records,
) -> None:
    table = stream.recovery(stream.by_move(streamed))
    moves = table[table.seed == 0].set_index(["method", "phase"]).moves
    assert moves["neurosymbolic", 2] == 1 and moves["neurosymbolic", 3] == 1
    assert moves["lora", 2] == 3 and moves["lora", 3] == 3  # never within two moves
    assert pd.isna(moves["frozen", 2])  # there was no level to lose


def test_retention_and_regret(streamed: records.Records) -> None:
    kept = stream.retention(streamed).groupby("method").kept.mean()
    assert kept.to_dict() == {"neurosymbolic": 1.0, "lora": 0.5, "textgrad": 0.0, "frozen": 1.0}
    regret = stream.regrets(stream.by_move(streamed)).groupby("method").regret.mean()
    assert regret["neurosymbolic"] == pytest.approx(1 - sum(QUICK) / 9)
    table = stream.summary(streamed)
    assert table.loc[("smollm2-135m", "lora"), "test-3"] == pytest.approx(7 / 8)
    assert table.loc[("smollm2-135m", "lora"), "moves to recover, phase 2"] == 3
    assert set(table.seeds) == {3}


def test_the_claim_compares_regret(streamed: records.Records, tmp_path: Path) -> None:
    judged = {claim["key"]: claim for claim in claims.judged(streamed)["claims"]}["adaptability"]
    assert judged["verdict"] == "holds"
    assert judged["comparisons"][0]["difference"] == pytest.approx(
        (sum(QUICK) - sum(SLOW)) / 9, abs=1e-6
    )


def test_the_stream_stays_out_of_the_main_comparison(
    streamed: records.Records, tmp_path: Path
) -> None:
    assert streamed.main.runs.empty and report.main_frame(streamed).empty
    made = {path.name for path in report.build(tmp_path)}
    assert "stream.csv" in made and not {"success.csv", "threshold_sensitivity.csv"} & made
    assert json.loads((tmp_path / "figures" / "stream.json").read_text())["n_seeds"] == "3"
    assert report.verify(tmp_path) == []


def test_a_panel_per_backbone_and_three_lines_per_method(streamed: records.Records) -> None:
    (ax,) = stream.stream(stream.curves(streamed)).axes
    assert len(ax.lines) == 4 * 3 + 2  # and two dotted lines between phases


def test_without_runs_there_is_nothing(tmp_path: Path) -> None:
    empty = records.load(tmp_path)
    assert stream.curves(empty).empty and stream.summary(empty).empty
