"""What signal and classifier knew: moves with what was left, thresholds, ROC, confusion, calibration."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from synthetic import write_grid, write_record

from nslora.algorithm import needs
from nslora.study import records, signal, stats, when_figures


@pytest.fixture(scope="module")
def main(tmp_path_factory) -> records.Records:
    folder = tmp_path_factory.mktemp("results")
    write_grid(folder)
    return records.load(folder)


def told(folder: Path, dev: list[float], c1: list[float | None]) -> records.Records:
    """One lora run whose moves have these dev values and signals."""
    path = write_record(folder, task="facts", method="lora", moves=len(c1)) / "steps.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    for step, value, change in zip(steps, dev, [None, *c1], strict=True):
        step["dev"]["value"], step["signal"]["c1"] = value, change
    path.write_text("".join(json.dumps(step) + "\n" for step in steps))
    return records.load(folder)


def test_what_is_left_is_the_best_reward_still_to_come(tmp_path: Path) -> None:
    moves = signal.lora_moves(told(tmp_path, [0.1, 0.4, 0.7, 0.6, 0.7], [None, -0.5, -0.3, 0.1]))
    assert moves.left.tolist() == pytest.approx([0.3, 0.0, 0.0, 0.0])
    assert moves.later.tolist() == [3, 2, 1, 0]
    assert moves.c1.fillna(9).tolist() == [9, -0.5, -0.3, 0.1]


def test_a_larger_threshold_stops_earlier_gives_up_more_and_saves_more(tmp_path: Path) -> None:
    run = told(tmp_path, [0.1, 0.4, 0.5, 0.6, 0.7], [None, -0.5, -0.3, 0.1])
    table = signal.thresholds(run, (0.0, 0.4, 0.6)).pivot(
        index="eps", columns="kind", values="mean"
    )
    assert table["dev reward given up"].tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert table["share of moves saved"].tolist() == pytest.approx([0.0, 0.25, 0.5])


def test_a_run_that_never_stops_gives_up_and_saves_nothing(tmp_path: Path) -> None:
    run = told(tmp_path, [0.1, 0.4, 0.7], [None, -0.9])
    assert signal.thresholds(run, (0.1,))["mean"].tolist() == [0.0, 0.0]


def test_the_curve_has_the_area_that_is_said(main: records.Records) -> None:
    rows, curve = signal.one_need(signal.predicted_needs(main)), signal.roc(main)
    assert set(rows.need) == {"content", "style"} and (rows.success < 1).all()
    for backbone, line in curve.groupby("backbone"):
        mine = rows[rows.backbone == backbone]
        area = float(np.trapezoid(line.tpr.astype(float), line.fpr.astype(float)))
        assert area == pytest.approx(stats.auroc(mine.label, mine.score))
        assert (
            line["mean"].iloc[0] == pytest.approx(area)
            and line.low.iloc[0] < area < line.high.iloc[0]
        )
        assert set(line.n) == {3}


def test_most_content_goes_to_the_weights_and_most_style_does_not(main: records.Records) -> None:
    shares = signal.routed(main).weights.unstack()
    assert (shares.content > 0.9).all() and (shares["style"] < 0.5).all()
    table = signal.calibration(main)
    assert table.n.sum() == len(signal.one_need(signal.predicted_needs(main)))
    assert table.content.is_monotonic_increasing


def test_single_features_stand_beside_the_classifier(tmp_path: Path) -> None:
    assert signal.against_thresholds(tmp_path).empty
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(80, len(needs.FEATURES))), columns=list(needs.FEATURES))
    frame = frame.assign(
        label=(frame.nll > 0).astype(float), fact=[f"f{i // 2}" for i in range(80)]
    )
    frame.to_csv(tmp_path / "probe-x.csv", index=False)
    areas = signal.against_thresholds(tmp_path).set_index("score").auroc
    assert areas["NLL of the gold answer"] == 1.0
    assert areas["need classifier (cross-validated)"] > 0.9
    assert 0.3 < areas["reward, reversed"] < 0.7


def test_no_records_are_empty_frames_and_all_figures_draw(
    tmp_path: Path, main: records.Records
) -> None:
    nothing = records.load(tmp_path)
    assert (
        signal.lora_moves(nothing).empty
        and signal.thresholds(nothing).empty
        and signal.roc(nothing).empty
    )
    assert signal.calibration(nothing).empty and signal.routed(nothing).empty
    assert len(when_figures.threshold_sensitivity(signal.thresholds(main)).axes) == 2
    assert len(when_figures.need_roc(signal.roc(main)).axes[0].lines) == 3
