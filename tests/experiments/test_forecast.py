"""Forecasts follow from receipts; what no receipt says is shown as unknown."""

from __future__ import annotations

import pytest
from toy import RUNS, cost, edit, finish, make

from nslora.experiments import forecast, grid
from nslora.experiments.forecast import Cost
from nslora.model import checkpoints
from nslora.runs.store import Store

pytestmark = pytest.mark.pure


@pytest.fixture
def profile(tmp_path):
    make(tmp_path, good=(RUNS,))
    return grid.load("t", tmp_path)


def test_the_plan_takes_costs_from_like_runs(profile):
    lora = profile.notebooks["good"][1]
    store = Store(profile.root / "results/other", profile.root / "runs/other")
    record = finish(store, lora.but(moves=4), **cost(60, 400, 0.5))
    row = forecast.plan(profile)[0]
    assert (row["left"], row["unknown"], row["seconds"], row["tokens"]) == (2, 1, 30, 200)
    past = forecast.history(profile, "results/**")
    assert [run["run_id"] for run in past] == [record.name]
    assert forecast.expected(lora, past) == (30, 200, 0.25, 900)
    assert forecast.expected(lora, []) is None


def test_costs_add_up_but_for_memory():
    assert forecast.total([]) == Cost()
    assert forecast.total([Cost(1, 2, 3, 4), Cost(1, 2, 3, 2)]) == (2, 4, 6, 4)


def test_the_table_shows_what_is_not_known_as_missing_and_prefers_own_receipts(profile):
    names = ("smollm2-135m", "qwen2.5-coder-1.5b")
    size = f"{sum(checkpoints.BACKBONES[name].bytes for name in names) / 1e9:.1f}"
    assert f"| good | 2 | 2 | - | - | {size} | - | - |" in forecast.table(profile)
    cfg = profile.notebooks["good"][1]
    full = Store(profile.root / "results/full", profile.root / "runs/full")
    finish(full, cfg, **cost(7200, 4000, 0.5))
    assert f"| good | 2 | 1 | 2.0 | 0.9 | {size} | 4,000 | 0.50 |" in forecast.table(profile)
    finish(profile.store, cfg, **cost(3600, 4000, 0.5, 800))
    assert f"| good | 2 | 1 | 1.0 | 0.8 | {size} | 4,000 | 0.50 |" in forecast.table(profile)
    # an incomplete receipt says nothing
    finish(profile.store, cfg)
    assert f"| good | 2 | 1 | 2.0 | 0.9 | {size} | 4,000 | 0.50 |" in forecast.table(profile)


def test_the_job_expected_to_take_longest_starts_first(tmp_path):
    make(tmp_path, good=(RUNS,))
    edit(tmp_path, "seeds = [0]", "seeds = [0, 1, 2]")
    profile = grid.load("t", tmp_path)
    queue = [job for job in grid.jobs(profile) if job.backbone]
    assert forecast.longest_first(queue) == queue
    other = Store(tmp_path / "results/other", tmp_path / "runs/other")
    for job, seconds in zip(queue[:2], (30, 90), strict=True):
        finish(other, job.configs[0], **cost(seconds))
    # the third has no receipt of its own: the mean of the others
    assert [job.seed for job in forecast.longest_first(queue)] == [1, 2, 0]
