"""Costs of synthetic runs: the parts add up to the whole, and shared totals are those of the receipts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from matplotlib.patches import Rectangle
from synthetic import write_lines, write_record

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
    assert frame.loc["lora", "numerical"] == pytest.approx(steps["clock.seconds"].sum() / 3 / 60)
    assert set(costs.parts(some).n) == {3}
    ax, *_ = costs.cost_parts(costs.parts(some)).axes
    # bars of one method end at its wall time
    widths = [patch.get_bbox().x1 for patch in ax.patches if isinstance(patch, Rectangle)]
    assert max(widths) == pytest.approx(80 / 60)


def test_costs_are_means_of_the_receipts(some: records.Records) -> None:
    table = costs.costs(some).set_index("method")
    assert list(table.index) == list(METHODS)
    assert table.loc["textgrad", "editor requests"] == 31  # 30 + seed
    assert table.loc["lora", "runs"] == 3 and table.loc["lora", "peak MB"] == 900


def test_without_records_there_is_nothing_to_show(tmp_path: Path) -> None:
    empty = records.load(tmp_path)
    assert costs.costs(empty).empty and costs.parts(empty).empty and costs.progress(empty).empty
    assert costs.curves(empty).empty


def test_progress_counts_from_the_start_and_to_the_budget(tmp_path: Path) -> None:
    folder = write_record(tmp_path, task="mixed", method="neurosymbolic", moves=6)
    rows = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    # it falls back at its fourth move, and stops there
    rows[4]["dev"]["value"] = 0.0
    write_lines(folder / "steps.jsonl", rows[:5])
    for name in ("clock", "hidden"):
        beside = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        write_lines(folder / f"{name}.jsonl", beside[:5])
    run = costs.progress(records.load(tmp_path)).set_index("move")
    assert list(run.index) == list(range(7))
    assert run.value.is_monotonic_increasing and run.value[6] == run.value[3] > 0
    assert run.tokens[0] == 0 and run.tokens[3] == 3 * 2000
    assert run.tokens[6] == run.tokens[4] == 4 * 2000
    assert run.seconds[6] == run.seconds[4] > run.seconds[3]
    assert (run.variance > 0).all()
