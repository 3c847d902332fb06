"""Claims: what is compared, on which backbones a claim holds, and when nothing is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic import write_record

from nslora.study import claims, records, stats

pytestmark = pytest.mark.pure

KEYS = list(claims.CLAIMS)


def judge(results: Path) -> dict[str, dict[str, Any]]:
    judged = claims.judged(records.load(results))
    return {claim["key"]: claim for claim in judged["claims"]}


def write_pair(
    results: Path, a: tuple[str, float], b: tuple[str, float], seeds: int = 6, **settings: Any
) -> None:
    """Runs of two methods on the same items, right with these chances."""
    for method, skill in (a, b):
        for seed in range(seeds):
            shared = {"method": method, "seed": seed, "test_items": 24, **settings}
            write_record(results, (skill, skill), **shared)


def test_without_records_nothing_was_run(tmp_path: Path) -> None:
    judged = claims.judged(records.load(tmp_path))
    text = json.dumps(judged)
    assert json.loads(text, parse_constant=pytest.fail) == judged
    assert {claim["verdict"] for claim in judged["claims"]} == {"not run"}
    assert all(row["n"] == 0 for claim in judged["claims"] for row in claim["comparisons"])
    assert [claim["key"] for claim in judged["claims"]] == KEYS


def test_one_seed_leaves_everything_undecided(tmp_path: Path) -> None:
    write_pair(tmp_path, ("lora-remade", 1.0), ("textgrad", 0.0), seeds=1, task="facts")
    claim = judge(tmp_path)["facts-numerical"]
    assert claim["verdict"] == "undecided" and claim["backbones"] == {"smollm2-135m": "undecided"}
    assert claims.points(claim["comparisons"][0]) == "100.0 (one seed)"
    assert judge(tmp_path)["style-symbolic"]["verdict"] == "not run"


def test_a_claim_holds_where_each_backbone_says_so_and_pooling_decides_nothing(
    tmp_path: Path,
) -> None:
    write_pair(tmp_path, ("lora-remade", 0.9), ("textgrad", 0.1), task="facts")
    assert judge(tmp_path)["facts-numerical"]["verdict"] == "holds"
    even = (("lora-remade", 0.5), ("textgrad", 0.5))
    write_pair(tmp_path, *even, task="facts", backbone="gemma3-270m")
    claim = judge(tmp_path)["facts-numerical"]
    assert claim["backbones"] == {"gemma3-270m": "undecided", "smollm2-135m": "holds"}
    pooled = claim["comparisons"][-1]
    assert pooled["backbone"] == "all" and pooled["low"] > 0.2 and claim["verdict"] == "undecided"


def test_a_claim_can_fail(tmp_path: Path) -> None:
    write_pair(tmp_path, ("lora-remade", 0.1), ("textgrad", 0.9), task="facts")
    assert judge(tmp_path)["facts-numerical"]["verdict"] == "fails"


def test_beating_one_of_two_is_not_beating_both(tmp_path: Path) -> None:
    write_pair(tmp_path, ("neurosymbolic", 0.7), ("lora-remade", 0.2))
    claim = judge(tmp_path)["beats-both"]
    assert claim["verdict"] == "undecided", "textgrad was not run"
    words = [claims.points(row) for row in claim["comparisons"]]
    assert words[2:] == ["not run", "not run"]
    for seed in range(6):
        write_record(tmp_path, (0.9, 0.9), method="textgrad", seed=seed, test_items=24)
    assert judge(tmp_path)["beats-both"]["verdict"] == "fails"


def test_a_bound_below_zero_allows_a_small_loss(tmp_path: Path) -> None:
    for task in ("facts", "style", "math"):
        methods = ("neurosymbolic", "lora-remade" if task != "style" else "textgrad")
        for method in methods:
            for seed in range(10):
                shared = {"task": task, "method": method, "seed": seed, "test_items": 24}
                write_record(tmp_path, (1.0, 1.0), **shared)
    assert judge(tmp_path)["not-worse"]["verdict"] == "holds"


def test_a_comparison_is_due_where_its_study_ran_its_task(tmp_path: Path) -> None:
    write_pair(tmp_path, ("neurosymbolic", 1.0), ("lora-remade", 1.0), task="facts")
    other = (("neurosymbolic", 1.0), ("textgrad", 1.0))
    write_pair(tmp_path, *other, task="style", backbone="gemma3-270m")
    rows = judge(tmp_path)["not-worse"]["comparisons"]
    assert [row["backbone"] for row in rows] == ["smollm2-135m", "all", "gemma3-270m", "all", "all"]


def test_fixed_schedules_are_compared_one_by_one(loaded: records.Records) -> None:
    words = [comparison.words for comparison in claims.against_fixed(loaded)]
    assert [word.rpartition(" ")[2] for word in words] == ["fixed:NNSN", "fixed:SNNN", "alternate"]
    nothing = records.Records(loaded.runs[:0], loaded.steps[:0], loaded.scores[:0])
    assert [c.words.rpartition(" ")[2] for c in claims.against_fixed(nothing)] == ["alternate"]


def test_share_of_editor_requests_avoided(loaded: records.Records) -> None:
    values = claims.requests_avoided(loaded.of("main"))
    expected = [1 - (10 + seed) / (30 + seed) for seed in range(3)]
    assert values.groupby("seed").value.first().tolist() == pytest.approx(expected)
    assert (values.variance > 0).all()


def test_saturation_scores_c1_against_what_came_later(loaded: records.Records) -> None:
    # the synthetic loss flattens with the reward
    assert (claims.saturation("c1", 1.0).values(loaded).value > 0.4).all()
    assert (claims.saturation("c1", -1.0).values(loaded).value < -0.4).all()


def test_remade_data_are_paired_across_targets_only(tmp_path: Path) -> None:
    study = {"study": "data-efficiency", "task": "math", "method": "alternate"}
    for seed in range(3):
        for targets, skill in (("verified", 1.0), ("gold", 0.0)):
            write_record(tmp_path, (skill, 1.0), targets=targets, seed=seed, **study)
        # without a partner at this rank, and of another study
        write_record(tmp_path, (0.0, 1.0), targets="verified", seed=seed, rank=4, **study)
        other = study | {"study": "main"}
        write_record(tmp_path, (0.0, 1.0), targets="verified", seed=seed, **other)
    values = claims.remade(records.load(tmp_path).of("data-efficiency"))
    assert len(values) == 3 * 12 and (values.value == 1.0).all()


def test_holm_counts_the_claims_that_were_tested(judged: dict[str, Any]) -> None:
    tested = [claim for claim in judged["claims"] if claim["p"] is not None]
    assert "adaptability" not in [claim["key"] for claim in tested]
    first = min(tested, key=lambda claim: claim["p"])
    raw = max(row["p"] for row in first["comparisons"] if row["backbone"] != "all")
    assert first["p"] == pytest.approx(raw * len(tested), rel=1e-3)
    assert judged["alpha"] == stats.ALPHA == pytest.approx(0.025)


def test_a_claim_that_holds_holds_on_each_backbone(judged: dict[str, Any]) -> None:
    for claim in judged["claims"]:
        if claim["verdict"] == "holds":
            assert set(claim["backbones"].values()) == {"holds"}
        for row in claim["comparisons"]:
            if row["n"]:
                assert row["low"] < row["high"]
                assert -1 <= row["low"] <= row["estimate"] <= row["high"] <= 1


def test_a_notebook_is_shown_verdicts_with_what_they_rest_on(
    loaded: records.Records, judged: dict[str, Any]
) -> None:
    table = claims.table(loaded, "facts-numerical", "style-symbolic")
    assert len(table) == 2 * 3 and table.index.names[0] == "sentence"
    first = judged["claims"][0]
    assert table.iloc[0][claims.SHOWN] == claims.points(first["comparisons"][0])
    assert table.index.get_level_values("backbone")[2] == "all"


def test_a_missing_p_value_is_no_evidence() -> None:
    assert np.isnan(claims.worst([0.01, None])) and np.isnan(claims.worst([]))
    assert claims.worst([0.01, 0.2]) == 0.2
