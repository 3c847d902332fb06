"""The stream's measures on records made by hand: drops and recoveries, what is kept, regret, and the claim."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import graded, split_means, write_lines, write_record, write_scores

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
    shared = {"study": "stream", "task": "stream", "method": method, "seed": seed, "moves": 2}
    folder = write_record(results, **shared)
    step = json.loads((folder / "steps.jsonl").read_text().splitlines()[0])
    moves = ["start", "numerical", "symbolic"] * 3
    rows = []
    for i, (move, value) in enumerate(zip(moves, rewards, strict=True)):
        rows.append({**step, "step": i, "move": move, "dev": {**step["dev"], "value": value}})
    if method == "frozen":
        rows = [row for row in rows if row["move"] == "start"]
    write_lines(folder / "steps.jsonl", rows)
    steps = [row["step"] for row in rows]
    write_lines(folder / "clock.jsonl", [{"step": step, "seconds": 1.0} for step in steps])
    hidden = [{"step": step, "dev": {}, "needs": []} for step in steps]
    write_lines(folder / "hidden.jsonl", hidden)
    scores = []
    for split, facts in FACTS.items():
        for fact in facts:
            for wording in range(2):
                wrong = wording and split == "test" and fact in forgotten
                scores.append(graded(split, f"{fact}:{wording}", "both", float(not wrong), 1.0))
    write_scores(folder, scores)
    run = json.loads((folder / "run.json").read_text())
    run["final"] = {
        split: split_means([row for row in scores if row["split"] == split]) for split in FACTS
    }
    run["factorial"] = {}
    (folder / "run.json").write_text(json.dumps(run))
    return folder


@pytest.fixture
def streamed(tmp_path: Path) -> records.Records:
    for seed in range(3):
        write_stream(tmp_path, "neurosymbolic", seed, QUICK)
        write_stream(tmp_path, "lora-remade", seed, SLOW, forgotten="b")
        write_stream(tmp_path, "textgrad", seed, SLOW, forgotten="ab")
        write_stream(tmp_path, "frozen", seed, SLOW)
    return records.load(tmp_path)


def test_reward_is_the_best_so_far_of_each_phase(streamed: records.Records) -> None:
    frame = stream.by_move(streamed)
    run = frame[(frame.method == "lora-remade") & (frame.seed == 0)]
    assert run.value.tolist() == [0.0, 0.2, 0.4, 0.1, 0.1, 0.2, 0.0, 0.0, 0.0]
    assert run.phase.tolist() == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    stopped = frame[(frame.method == "frozen") & (frame.seed == 0)]
    # without moves, each phase's start is held
    assert stopped.value.tolist() == [0.0] * 3 + [0.1] * 3 + [0.0] * 3


def test_recovery_counts_moves_until_most_of_the_old_level_is_back(
    streamed: records.Records,
) -> None:
    table = stream.recovery(stream.by_move(streamed))
    moves = table[table.seed == 0].set_index(["method", "phase"]).moves
    assert moves["neurosymbolic", 2] == 1 and moves["neurosymbolic", 3] == 1
    assert moves["lora-remade", 2] == 3 and moves["lora-remade", 3] == 3  # never within two moves
    assert pd.isna(moves["frozen", 2])  # there was no level to lose


def test_retention_and_regret(streamed: records.Records) -> None:
    kept = stream.retention(streamed).groupby("method").kept.mean()
    assert kept.to_dict() == {
        "neurosymbolic": 1.0,
        "lora-remade": 0.5,
        "textgrad": 0.0,
        "frozen": 1.0,
    }
    regret = stream.regrets(stream.by_move(streamed)).groupby("method").regret.mean()
    assert regret["neurosymbolic"] == pytest.approx(1 - sum(QUICK) / 9)
    table = stream.summary(streamed)
    assert table.loc[("smollm2-135m", "lora-remade"), "test-3"] == pytest.approx(7 / 8)
    assert table.loc[("smollm2-135m", "lora-remade"), "moves to recover, phase 2"] == 3
    assert set(table.seeds) == {3}


def test_the_claim_compares_regret(streamed: records.Records) -> None:
    judged = {claim["key"]: claim for claim in claims.judged(streamed)["claims"]}["adaptability"]
    assert [row["backbone"] for row in judged["comparisons"]] == ["smollm2-135m", "all"] * 2
    row = judged["comparisons"][0]
    assert row["estimate"] == pytest.approx((sum(QUICK) - sum(SLOW)) / 9, abs=1e-6)
    # all seeds are alike here, yet twelve dev items leave room
    assert 0 < row["low"] < row["estimate"] < row["high"]
    # three seeds are too few for one of so many claims
    assert judged["verdict"] == "undecided"


def test_the_stream_stays_out_of_the_main_comparison(
    streamed: records.Records, tmp_path: Path
) -> None:
    assert streamed.of("main").runs.empty and records.success(streamed).empty
    made = {path.name for path in report.build(tmp_path, images=False)}
    assert "stream.csv" in made and not {"success.csv", "threshold_sensitivity.csv"} & made
    assert json.loads((tmp_path / "figures" / "stream.json").read_text())["n_seeds"] == "3"
    assert report.verify(tmp_path) == []


def test_a_line_per_method_and_phase(streamed: records.Records) -> None:
    (ax,) = stream.stream(stream.curves(streamed)).axes
    drawn = [
        line for line in ax.lines if line.get_marker() == "o" and np.size(line.get_xdata()) == 3
    ]
    assert len(drawn) == 3 * 3


def test_without_runs_there_is_nothing(tmp_path: Path) -> None:
    empty = records.load(tmp_path)
    assert stream.curves(empty).empty and stream.summary(empty).empty
