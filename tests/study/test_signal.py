"""What the signal said: moves with what was left after them, thresholds, traces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from synthetic import write_lines, write_record

from nslora.study import records, signal


def numerical_run(folder: Path, dev: list[float], c1: list[float | None]) -> records.Records:
    """One lora run whose moves have these dev values and signals."""
    path = write_record(folder, task="facts", method="lora", moves=len(c1)) / "steps.jsonl"
    steps = [json.loads(line) for line in path.read_text().splitlines()]
    for step, value, change in zip(steps, dev, [None, *c1], strict=True):
        step["dev"]["value"], step["signal"]["c1"] = value, change
    write_lines(path, steps)
    return records.load(folder)


def test_what_is_left_is_the_best_reward_still_to_come(tmp_path: Path) -> None:
    run = numerical_run(tmp_path, [0.1, 0.4, 0.7, 0.6, 0.7], [None, -0.5, -0.3, 0.1])
    moves = signal.numerical_moves(run)
    assert moves.left.tolist() == pytest.approx([0.3, 0.0, 0.0, 0.0])
    assert moves.later.tolist() == [3, 2, 1, 0]
    assert moves.c1.fillna(9).tolist() == [9, -0.5, -0.3, 0.1]
    assert set(moves.gain_eps) == {0.02} and set(moves["items"]) == {12}


def test_a_larger_threshold_stops_earlier_gives_up_more_and_saves_more(tmp_path: Path) -> None:
    run = numerical_run(tmp_path, [0.1, 0.4, 0.5, 0.6, 0.7], [None, -0.5, -0.3, 0.1])
    table = signal.thresholds(run, (0.0, 0.4, 0.6))
    means = table.pivot(index="eps", columns="kind", values="mean")
    assert means["dev reward given up"].tolist() == pytest.approx([0.0, 0.1, 0.2])
    assert means["share of moves saved"].tolist() == pytest.approx([0.0, 0.25, 0.5])


def test_a_run_that_never_stops_gives_up_and_saves_nothing(tmp_path: Path) -> None:
    run = numerical_run(tmp_path, [0.1, 0.4, 0.7], [None, -0.9])
    assert signal.thresholds(run, (0.1,))["mean"].tolist() == [0.0, 0.0]


def test_traces_show_one_run_per_backbone_with_its_thresholds(tmp_path: Path) -> None:
    for seed in (2, 1):
        write_record(tmp_path, task="mixed", method="neurosymbolic", seed=seed, c1_eps=0.07)
    trace = signal.traces(records.load(tmp_path))
    assert trace.run_id.nunique() == 1 and "-s1-" in trace.run_id[0]
    assert set(trace.c1_eps) == {0.07} and list(trace.step) == list(range(7))
    assert trace.reason[4] == "saturated"
    fig = signal.signal_traces(trace)
    # of C1 and C2 a threshold each
    assert sum(line.get_linestyle() == "--" for ax in fig.axes for line in ax.lines) == 2


def test_thresholds_are_drawn_with_a_line_per_backbone(loaded: records.Records) -> None:
    table = signal.thresholds(loaded)
    assert ((table.low < table.high) & (table.low >= 0)).all() and set(table.n) == {3}
    fig = signal.threshold_sensitivity(table)
    labels = [text.get_text() for text in fig.legends[0].get_texts()]
    assert labels == ["qwen2.5-coder-0.5b", "smollm2-135m"] and len(fig.axes) == 2


def test_no_records_are_empty_frames(tmp_path: Path) -> None:
    nothing = records.load(tmp_path)
    frames = (signal.numerical_moves, signal.thresholds, signal.traces)
    assert all(frame(nothing).empty for frame in frames)
