"""Costs of synthetic runs: the parts add up to the whole, and shared totals are those of the receipts."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from synthetic import write_record

from nslora.study import costs, records

METHODS = ("frozen", "lora", "textgrad", "neurosymbolic")


@pytest.fixture
def some(tmp_path: Path) -> records.Records:
    for method in METHODS:
        for seed in range(3):
            write_record(tmp_path, task="mixed", method=method, seed=seed)
    return records.load(tmp_path)


def test_parts_add_up_to_the_wall_time_and_follow_the_kind_of_move(some: records.Records) -> None:
    frame = costs.parts(some).pivot(index="method", columns="part", values="mean")
    assert frame.sum(axis=1).round(6).eq(round(80 / 60, 6)).all()
    assert (frame.loc[["frozen", "textgrad"], "numerical"] == 0).all()
    assert (frame.loc[["frozen", "lora"], "symbolic"] == 0).all()
    steps = some.steps[(some.steps.method == "lora") & (some.steps.step > 0)]
    assert frame.loc["lora", "numerical"] == pytest.approx(steps["cost.seconds"].sum() / 3 / 60)
    assert set(costs.parts(some).n) == {3}
    assert isinstance(costs.cost_parts(costs.parts(some)), Figure)


def test_costs_are_means_of_the_receipts(some: records.Records) -> None:
    table = costs.costs(some).set_index("method")
    assert list(table.index) == list(METHODS)
    assert table.loc["textgrad", "editor requests"] == 31  # 30 + seed
    assert table.loc["lora", "runs"] == 3 and table.loc["lora", "peak MB"] == 900
    money = costs.charged(table.reset_index(), per_million=2.0).price
    assert money.tolist() == pytest.approx([0.002] * 4)  # a thousand tokens each


def test_without_records_there_is_nothing_to_show(tmp_path: Path) -> None:
    empty = records.load(tmp_path)
    assert costs.costs(empty).empty and costs.parts(empty).empty
    assert isinstance(costs.parts(empty), pd.DataFrame)
