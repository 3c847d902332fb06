"""Ablations: one changed setting at a time, paired with the main comparison."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pandas as pd
import pytest
from matplotlib.collections import LineCollection
from synthetic import write_grid, write_record

from nslora.study import ablations, records


def test_one_changed_setting_is_compared_with_the_main_runs(tmp_path: Path) -> None:
    write_grid(tmp_path, seeds=3)
    for seed in range(3):
        shared = {"task": "mixed", "backbone": "smollm2-135m", "seed": seed}
        write_record(tmp_path, (0.0, 0.0), method="neurosymbolic", replay=0.0, **shared)
        write_record(
            tmp_path, (1.0, 1.0), method="neurosymbolic", replay=0.0, rank=8, **shared
        )  # two changes
        write_record(tmp_path, (0.0, 0.0), method="lora", gate=False, **shared)  # another method
    loaded = records.load(tmp_path)
    everything = ablations.ablations(loaded)
    assert list(everything.row.unique()) == list(records.MEASURES)
    frame = everything[everything.row == "test success"].set_index(["backbone", "change"])
    assert list(frame.loc["qwen2.5-coder-0.5b"].index) == ["rank = 4"]
    assert sorted(frame.loc["smollm2-135m"].index) == ["rank = 4", "replay = 0.0"]
    row = frame.loc[("smollm2-135m", "replay = 0.0")]
    main = records.success(loaded).set_index(["task", "backbone", "method"])
    assert row["mean"] == pytest.approx(
        -main.loc[("mixed", "smollm2-135m", "neurosymbolic"), "mean"]
    )
    assert row.n == 3 and row.low < row["mean"] < row.high
    kept = everything.set_index(["row", "backbone", "change"]).loc[
        ("known facts kept", "smollm2-135m", "replay = 0.0")
    ]
    main = records.interaction(loaded, "mixed").set_index(["row", "backbone", "method"])["mean"]
    assert kept["mean"] == pytest.approx(
        1 - main.loc["known facts kept", "smollm2-135m", "neurosymbolic"]
    )
    assert len(ablations.ablation_dots(everything).axes) == 2 * 3


def test_intervals_are_drawn_no_further_than_is_possible() -> None:
    row = {
        "row": "test success",
        "backbone": "b",
        "change": "rank = 4",
        "mean": -0.2,
        "low": -2.8,
        "high": 2.4,
    }
    (ax,) = ablations.ablation_dots(pd.DataFrame([row])).axes
    (line,) = cast(LineCollection, ax.collections[0]).get_segments()
    assert [x for x, _ in line] == [-100, 100]


def test_an_axis_without_any_change_spans_points_and_not_hundredths_of_them() -> None:
    row = {
        "row": "test success",
        "backbone": "b",
        "change": "rank = 4",
        "mean": 0.0,
        "low": 0.0,
        "high": 0.0,
    }
    (ax,) = ablations.ablation_dots(pd.DataFrame([row])).axes
    assert ax.get_xlim() == (-1, 1)


def test_changes_are_named_by_value() -> None:
    assert ablations.change('{"a": 1, "b": "x"}', '{"a": 1, "b": "y"}') == {"b": "x"}
    assert ablations.change('{"a": 1}', '{"a": 1}') == {}


def test_no_records_have_no_ablations(tmp_path: Path) -> None:
    nothing = ablations.ablations(records.load(tmp_path))
    assert nothing.empty and nothing.drop(columns=["method", "interval"]).empty, (
        "the notebook shows it like this"
    )
    write_record(tmp_path, task="mixed", method="neurosymbolic")
    assert list(ablations.ablations(records.load(tmp_path)).columns) == list(nothing.columns)
