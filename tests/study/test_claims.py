"""Claims: what is compared, on which backbones a claim holds, and when nothing is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from grown import Worth, write_tree
from synthetic import write_record

from nslora.study import claims, records, stats
from nslora.types import UserError

pytestmark = pytest.mark.pure

KEYS = list(claims.CLAIMS)


def judge(results: Path) -> dict[str, dict[str, Any]]:
    judged = claims.judged(records.load(results))
    return {claim["key"]: claim for claim in judged["claims"]}


def write_trees(
    results: Path, worth: Worth, seeds: Sequence[int] = range(10, 16), **settings: Any
) -> None:
    """Trees of two moves beside the results, their nodes worth what `worth` says, up to chance."""
    for seed in seeds:
        rng = np.random.default_rng(seed)
        shared = {"depth": 2, "items": 24, "dev": 40, "seed": seed, **settings}
        write_tree(results.parent / "schedules", worth, rng, **shared)


def weights_or_prompts(weights: float, prompts: float) -> Worth:
    """What a schedule is worth by its first move."""
    return lambda schedule: {"N": weights, "S": prompts, "": 0.0}[schedule[:1]]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder of results, beside which trees are."""
    return tmp_path / "quick"


def test_without_records_nothing_was_run(tmp_path: Path) -> None:
    judged = claims.judged(records.load(tmp_path))
    text = json.dumps(judged)
    assert json.loads(text, parse_constant=pytest.fail) == judged
    assert {claim["verdict"] for claim in judged["claims"]} == {"not run"}
    assert all(row["n"] == 0 for claim in judged["claims"] for row in claim["comparisons"])
    assert [claim["key"] for claim in judged["claims"]] == KEYS


def test_one_instance_leaves_everything_undecided(place: Path) -> None:
    write_trees(place, weights_or_prompts(1.0, 0.0), [10], style=0.0)
    claim = judge(place)["facts-numerical"]
    assert claim["verdict"] == "undecided" and claim["backbones"] == {"smollm2-135m": "undecided"}
    assert claims.points(claim["comparisons"][0]) == "100.0 (one seed)"
    assert judge(place)["style-symbolic"]["verdict"] == "not run"


def test_a_claim_holds_where_each_backbone_says_so_and_pooling_decides_nothing(place: Path) -> None:
    write_trees(place, weights_or_prompts(0.9, 0.1), style=0.0)
    assert judge(place)["facts-numerical"]["verdict"] == "holds"
    write_trees(place, weights_or_prompts(0.5, 0.5), style=0.0, backbone="gemma3-270m")
    claim = judge(place)["facts-numerical"]
    assert claim["backbones"] == {"gemma3-270m": "undecided", "smollm2-135m": "holds"}
    pooled = claim["comparisons"][-1]
    assert pooled["backbone"] == "all" and pooled["low"] > 0.2 and claim["verdict"] == "undecided"


def test_a_claim_can_fail(place: Path) -> None:
    write_trees(place, weights_or_prompts(0.1, 0.9), style=0.0)
    assert judge(place)["facts-numerical"]["verdict"] == "fails"


def test_beating_one_of_two_is_not_beating_both(place: Path) -> None:
    # form is asked for, and prompts are followed: neurosymbolic begins as prompts alone do
    write_trees(place, weights_or_prompts(0.1, 0.9), follows=1.0, needs=lambda schedule: (0.0, 1.0))
    claim = judge(place)["beats-both"]
    over_weights, over_prompts = (row["estimate"] for row in claim["comparisons"][::2])
    assert over_weights > 0.5 and abs(over_prompts) < 0.1
    assert claim["verdict"] == "undecided"


def test_a_bound_below_zero_allows_a_small_loss(place: Path) -> None:
    # where both needs are there, a loss is another claim's
    write_trees(place, weights_or_prompts(0.9, 0.0), style=0.5, follows=1.0, family="both")
    for style, task in ((0.0, "mixed"), (1.0, "mixed"), (0.0, "math")):
        family = f"{task} {style}"
        flat = weights_or_prompts(1.0, 1.0)
        # enough instances for a small error
        write_trees(place, flat, range(10, 30), style=style, task=task, family=family)
    claim = judge(place)["not-worse"]
    assert [row["estimate"] for row in claim["comparisons"]] == [0, 0]
    assert claim["comparisons"][0]["n"] == 60 and claim["verdict"] == "holds"


def test_one_need_is_compared_with_the_better_move_of_the_instance(place: Path) -> None:
    """Never with a straw man: prompts alone, on a backbone that follows none."""
    # a backbone that follows no prompt has its weights tuned, whatever is needed
    write_trees(place, weights_or_prompts(0.5, 0.9), range(10, 20), style=1.0, follows=0.1)
    (row, _) = judge(place)["not-worse"]["comparisons"]
    assert row["estimate"] == pytest.approx(-0.4, abs=0.1)
    write_trees(place, weights_or_prompts(0.9, 0.5), range(20, 30), style=1.0, follows=0.1)
    (row, _) = judge(place)["not-worse"]["comparisons"]
    assert row["estimate"] == pytest.approx(-0.2, abs=0.1) and row["n"] == 20


def test_a_prompt_first_is_asked_of_facts_and_style_alone(place: Path) -> None:
    """A real task whose examples need both is none of them."""
    write_trees(place, weights_or_prompts(0.2, 0.9), style=0.5)
    write_trees(place, weights_or_prompts(0.9, 0.2), style=0.5, task="word_sorting", family="real")
    write_trees(place, weights_or_prompts(0.9, 0.2), style=0.0, family="facts")
    (row, _) = judge(place)["prompt-first"]["comparisons"]
    assert row["n"] == 6 and row["estimate"] > 0.5


def test_following_is_asked_where_prompts_are_not_followed(place: Path) -> None:
    def needs(schedule: str) -> tuple[float, float]:
        return 0.0, 1.0

    worth = weights_or_prompts(0.9, 0.2)
    write_trees(place, worth, follows=0.1, needs=needs)
    write_trees(place, worth, follows=0.9, backbone="qwen2.5-coder-0.5b", needs=needs)
    row, pooled = judge(place)["following-adds"]["comparisons"]
    assert row["backbone"] == "smollm2-135m" and row["estimate"] > 0.5
    assert pooled["estimate"] == row["estimate"]


def test_asking_more_often_than_textgrad_fails(tmp_path: Path) -> None:
    for seed in range(4):
        for method in ("neurosymbolic", "textgrad"):
            write_record(tmp_path, (0.5, 0.5), method=method, seed=seed)
    for record in (tmp_path / "records").glob("*neurosymbolic*"):
        run = json.loads((record / "run.json").read_text())
        run["editor"]["calls"] = 60
        (record / "run.json").write_text(json.dumps(run))
    claim = judge(tmp_path)["editor-asked-less"]
    assert claim["comparisons"][0]["estimate"] < -0.3 and claim["verdict"] == "fails"


def test_a_comparison_is_due_where_its_study_grew_such_trees(place: Path) -> None:
    flat = weights_or_prompts(1.0, 1.0)
    write_trees(place, flat, style=0.0)
    write_trees(place, flat, style=1.0, backbone="gemma3-270m")
    judged = judge(place)
    for key, backbone in (("facts-numerical", "smollm2-135m"), ("style-symbolic", "gemma3-270m")):
        assert [row["backbone"] for row in judged[key]["comparisons"]] == [backbone, "all"]
    assert len(judged["not-worse"]["comparisons"]) == 3
    assert judged["real-tasks"]["comparisons"][0]["backbone"] == "all"


def test_deeper_trees_of_tuning_compare_no_schedules(place: Path) -> None:
    flat = weights_or_prompts(0.5, 0.5)
    write_trees(place, flat, follows=0.9)
    write_trees(place, flat, [100], depth=3)
    rows = judge(place)["beats-fixed"]["comparisons"]
    assert len(rows) == 2 * 4 and {row["n"] for row in rows} == {6}


def test_fixed_schedules_are_compared_one_by_one(place: Path) -> None:
    worth = {"NN": 0.5, "SN": 0.9}

    def content(schedule: str) -> tuple[float, float]:
        return 0.9, 0.0

    write_trees(place, lambda schedule: worth.get(schedule, 0.2), follows=0.9, needs=content)
    # where no prompt is followed neurosymbolic is one of them
    write_trees(place, weights_or_prompts(0.5, 0.5), follows=0.1, backbone="gemma3-270m")
    rows = judge(place)["beats-fixed"]["comparisons"][::2]
    words = "test success on trees of backbones that follow prompts: neurosymbolic - "
    assert [row["comparison"].removeprefix(words) for row in rows] == ["NN", "NS", "SN", "SS"]
    estimates = [row["estimate"] for row in rows]
    assert estimates[0] == 0 and estimates == pytest.approx([0, 0.3, -0.4, 0.3], abs=0.12)


def test_what_is_kept_is_that_of_the_candidate_that_is_returned(place: Path) -> None:
    for retention in (0.5, 0.98):
        shutil.rmtree(place.parent / "schedules", ignore_errors=True)
        worth = weights_or_prompts(0.9, 0.1)
        write_trees(place, worth, retention=retention, follows=0.1)
        claim = judge(place)["knowledge-kept"]
        assert claim["comparisons"][0]["estimate"] == pytest.approx(retention)
        assert claim["verdict"] == ("holds" if retention > 0.9 else "fails")


def test_real_tasks_are_judged_against_the_frozen_backbone(place: Path) -> None:
    write_trees(place, weights_or_prompts(0.6, 0.1), task="word_sorting", follows=0.1)
    write_trees(place, weights_or_prompts(0.0, 0.0), family="another")
    over_frozen, _, over_weights, _ = judge(place)["real-tasks"]["comparisons"]
    assert over_frozen["estimate"] > 0.4 and over_frozen["n"] == 6
    assert over_weights["estimate"] == 0


def test_share_of_editor_requests_avoided(loaded: records.Records) -> None:
    values = claims.requests_avoided(loaded.of("main"))
    expected = [1 - (10 + seed) / (30 + seed) for seed in range(3)]
    assert values.groupby("seed").value.first().tolist() == pytest.approx(expected)
    assert (values.variance > 0).all()


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


def test_holm_counts_all_claims_run_or_not(judged: dict[str, Any]) -> None:
    """Not to run a claim that looks lost must not help the others."""
    tested = [claim for claim in judged["claims"] if claim["p"] is not None]
    assert 0 < len(tested) < len(KEYS)
    first = min(tested, key=lambda claim: claim["p"])
    raw = max(row["p"] for row in first["comparisons"] if row["backbone"] != "all")
    assert first["p"] == pytest.approx(raw * len(KEYS), rel=1e-3)
    assert judged["alpha"] == stats.ALPHA == pytest.approx(0.025)


def register(
    place: Path, trees: Sequence[str] = (), runs: Sequence[str] = (), where: str = ""
) -> None:
    """Write a pre-registration of these trees, and of runs ("study name") in a folder, else in `place`."""
    where = where or f"{place.parent.name}/{place.name}"
    place.mkdir(exist_ok=True)
    (place.parent / "preregistration.toml").write_text(
        f'results = "{where}"\nstudies = {json.dumps(runs)}\ntrees = {json.dumps(trees)}\n'
    )


def names_of_trees(place: Path) -> list[str]:
    return sorted(path.name for path in (place.parent / "schedules").iterdir())


def test_a_registered_claim_has_no_verdict_until_its_trees_are_made(place: Path) -> None:
    write_trees(place, weights_or_prompts(0.9, 0.1), style=0.0)
    names = names_of_trees(place)
    register(place, [*names, "another"])
    assert records.load(place).missing == (("schedules", "another"),)
    claim = judge(place)["facts-numerical"]
    assert claim["verdict"] == "incomplete" and set(claim["backbones"].values()) == {"incomplete"}
    assert claim["comparisons"][0]["estimate"] > 0.5
    assert claim["p"] is None, "what half a study says must not help the others"
    # what has not begun is not run
    assert judge(place)["real-tasks"]["verdict"] == "not run"
    register(place, names)
    assert judge(place)["facts-numerical"]["verdict"] == "holds"
    # every folder beside the trees judges them, but runs are those of one
    register(place, [*names, "another"], where="results/full")
    assert judge(place)["facts-numerical"]["verdict"] == "incomplete"
    # what cannot be made is given up in so many words
    row = '[[amendments]]\ndate = "2026-12-01"\nabandoned = "another"\nwhy = "No memory."\n'
    (place.parent / "amendments.toml").write_text(row)
    assert judge(place)["facts-numerical"]["verdict"] == "holds"


def test_runs_of_another_study_keep_no_verdict_back_and_can_take_none_away(place: Path) -> None:
    write_trees(place, weights_or_prompts(0.9, 0.1), style=0.0)
    register(place, names_of_trees(place), ["data-efficiency another"])
    before = judge(place)
    assert before["facts-numerical"]["verdict"] == "holds"
    made = []
    for seed in range(6):
        for targets, skill in (("verified", 1.0), ("gold", 0.0)):
            study = {"study": "data-efficiency", "task": "math", "method": "alternate"}
            record = write_record(place, (skill, 1.0), targets=targets, seed=seed, **study)
            made.append(f"data-efficiency {record.name}")
    register(place, names_of_trees(place), [*made, "data-efficiency another"])
    half = judge(place)
    assert half["remade-data"]["verdict"] == "incomplete" and half["remade-data"]["p"] is None
    assert half["facts-numerical"] == before["facts-numerical"]
    register(place, names_of_trees(place), made)
    whole = judge(place)
    assert whole["remade-data"]["verdict"] == "holds"
    # one more claim is tested: Holm's adjustment is no stricter than before, on a backbone and on all
    assert whole["facts-numerical"]["verdict"] == "holds"
    assert whole["facts-numerical"]["p"] <= before["facts-numerical"]["p"]
    # runs of another folder are not waited for
    register(place, names_of_trees(place), ["data-efficiency another"], where="results/full")
    assert judge(place)["remade-data"]["verdict"] == "holds"


@pytest.mark.parametrize(
    "text", ["results = ", 'results = "x"', 'results = "x"\nstudies = []\ntrees = 1']
)
def test_a_damaged_registration_is_one_sentence(place: Path, text: str) -> None:
    (place.parent / "preregistration.toml").write_text(text)
    with pytest.raises(UserError, match=r"preregistration.toml cannot be read .* restore it"):
        records.load(place)


def test_a_claim_that_holds_holds_on_each_backbone(judged: dict[str, Any]) -> None:
    for claim in judged["claims"]:
        if claim["verdict"] == "holds":
            assert set(claim["backbones"].values()) == {"holds"}
        for row in claim["comparisons"]:
            if row["n"]:
                assert row["low"] < row["high"]
                assert -1 <= row["low"] <= row["estimate"] <= row["high"] <= 1


def test_a_notebook_is_shown_verdicts_with_what_they_rest_on(place: Path) -> None:
    write_trees(place, weights_or_prompts(0.9, 0.1), style=0.0)
    loaded = records.load(place)
    table = claims.table(loaded, "facts-numerical", "adaptivity-pays")
    assert table.index.names[0] == "sentence"
    first = claims.judged(loaded)["claims"][0]
    assert table.iloc[0][claims.SHOWN] == claims.points(first["comparisons"][0])
    assert list(table.index.get_level_values("backbone")) == ["smollm2-135m", "all"] * 2


def test_a_missing_p_value_is_no_evidence() -> None:
    assert np.isnan(claims.worst([0.01, None])) and np.isnan(claims.worst([]))
    assert claims.worst([0.01, 0.2]) == 0.2
