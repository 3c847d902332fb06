"""What the trees say, where it is known: value of adaptivity, regret, signal test, map; and its files."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from grown import FLAT, toward, write_tree

from nslora.study import claims, records, report
from nslora.study.schedules import Trees, answers, load, routers

pytestmark = pytest.mark.pure


def two_kinds(folder: Path, seeds: range, backbone: str = "smollm2-135m", **settings) -> None:
    """A family that wants weights and one that wants the prompt first; needs tell which, gain tells nothing."""
    for family, goal, style in (("facts", "NNN", 0.25), ("style", "SNN", 0.75)):
        for seed in seeds:
            shares = {"style": style, "backbone": backbone, "seed": seed}
            write_tree(
                folder,
                toward(goal, 0.8),
                family=family,
                needs=lambda schedule, style=style: (1 - style, style * (not schedule)),
                signal=lambda schedule: {"gain": 0.1} if schedule[-1:] == "S" else {},
                **shares,
                **settings,
            )


def value(frame: pd.DataFrame, quantity: str, measure="test success", **where: str) -> dict:
    rows = frame[(frame.quantity == quantity) & (frame.measure == measure)]
    for name, wanted in where.items():
        rows = rows[rows[name] == wanted]
    (row,) = rows.to_dict("records")
    return row


def test_value_of_adaptivity_is_the_known_one(tmp_path: Path) -> None:
    """Each kind reaches 0.8 by its own schedule and 0 by the other's; the fixed schedule is right for half."""
    two_kinds(tmp_path, range(100, 103), retention=0.5)
    two_kinds(tmp_path, range(10, 14))
    table = answers.adaptivity(load(tmp_path))
    for split, n in (("tuning", 6), ("test", 8)):
        for kind in ("in hindsight", "at least"):
            row = value(table, f"V, {kind}", split=split, backbone="smollm2-135m")
            assert row["mean"] == pytest.approx(0.4) and row["n"] == n
            assert row["low"] < 0.4 < row["high"]
    row = value(table, "V, without bias", split="test", backbone="all")
    assert row["mean"] == pytest.approx(0.4), "chosen on the tuning instances"
    halved = value(
        table, "V, in hindsight", "test success x retention", split="tuning", backbone="all"
    )
    assert halved["mean"] == pytest.approx(0.2)
    parts = ("best of each instance, in hindsight",)
    assert value(table, *parts, split="test", backbone="all")["mean"] == pytest.approx(0.8)


def test_there_is_no_value_where_one_schedule_is_best_everywhere(tmp_path: Path) -> None:
    for family in "abc":
        for seed in (100, 101):
            write_tree(tmp_path, toward("SNN", 0.9), family=family, seed=seed)
    table = answers.adaptivity(load(tmp_path))
    rows = table[table.quantity.str.startswith("V, ")]
    assert len(rows) == 3 * 2 * 2 and (rows["mean"] == 0).all()
    assert (rows.low < 0).all() and (rows.high > 0).all()


def test_chance_adds_nothing_to_the_unbiased_value(tmp_path: Path) -> None:
    """On pure noise hindsight finds much that is not there."""
    rng = np.random.default_rng(3)
    for seed in range(100, 160):
        write_tree(tmp_path, FLAT, rng, family=f"f{seed % 6}", seed=seed)
    table = answers.adaptivity(load(tmp_path))
    where = {"backbone": "all"}
    biased = value(table, "V, in hindsight", **where)
    assert biased["low"] > 0.05
    row = value(table, "V, without bias", **where)
    assert row["low"] < 0 < row["high"] and abs(row["mean"]) < 0.05
    assert value(table, "V, at least", **where)["mean"] < row["mean"]


def test_one_instance_has_a_value_in_hindsight_only(tmp_path: Path) -> None:
    write_tree(tmp_path, toward("SN"))
    table = answers.adaptivity(load(tmp_path))
    assert value(table, "V, in hindsight", backbone="all")["n"] == 1
    assert value(table, "V, without bias", backbone="all")["n"] == 0


def test_regrets_of_every_router(tmp_path: Path) -> None:
    two_kinds(tmp_path, range(100, 102))
    two_kinds(tmp_path, range(100, 102), "gemma3-270m")
    trees = load(tmp_path)
    table = answers.regrets(trees)
    assert list(dict.fromkeys(table.router)) == list(routers.ROUTERS)
    means = table[table.measure == answers.HINDSIGHT].pivot(
        index="router", columns="backbone", values="mean"
    )
    assert means.loc["needs-only"].tolist() == [0, 0, 0]
    assert means.loc["weights only"].to_numpy() == pytest.approx(0.4)
    assert set(table[table.backbone == "all"].n) == {8}
    assert (table.low < table.high).all()
    spending = answers.spending(trees).set_index(["backbone", "router"])
    assert spending.loc[("all", "weights only"), "tokens"] == 340
    coin = spending.loc[("all", "coin")]
    assert (coin.moves, coin.tokens) == (3, 10 + 3 * (110 + 230) / 2)


def test_every_fixed_schedule_has_its_regret(tmp_path: Path) -> None:
    two_kinds(tmp_path, range(100, 103))
    table = answers.fixed_schedules(load(tmp_path))
    table = table[table.backbone == "all"].set_index("schedule")
    assert len(table) == 8 and set(table.index[:2]) == {"NNN", "SNN"} and set(table.n) == {6}
    assert table["mean"][["NNN", "SNN"]].to_numpy() == pytest.approx(0.4)
    # of 20 items a third of 0.8 is five, of the other kind none
    assert table["mean"]["SSS"] == pytest.approx((0.8 + 0.8 - 0.25) / 2)


def test_a_cue_that_knows_the_better_move_has_an_area_of_one(tmp_path: Path) -> None:
    two_kinds(tmp_path, range(100, 106))
    table = answers.signal_test(load(tmp_path))
    first = table[(table.after == "0") & (table.backbone == "all")].set_index("cue")["mean"]
    assert first["needs (asked)"] == 1 and first["move number"] == 0.5
    # nothing has moved yet
    assert set(first.index) == {"needs (asked)", "needs (hidden)", "move number"}
    rows = table[table.cue == "needs (asked)"]
    assert (rows.low < 1).all() and (rows.high == 1).all() and set(rows.n) == {12}


def test_a_cue_without_news_has_an_area_of_a_half(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    for seed in range(100, 130):
        write_tree(
            tmp_path,
            FLAT,
            rng,
            seed=seed,
            depth=4,
            signal=lambda schedule: {"gain": rng.random()} if schedule.endswith("S") else {},
        )
    table = answers.signal_test(load(tmp_path))
    row = table[(table.cue == "gain of edits") & (table.after == "all") & (table.backbone == "all")]
    assert row.low.item() < 0.5 < row.high.item() and row.high.item() - row.low.item() < 0.5


def test_the_map_says_what_to_begin_with_and_what_the_other_costs(tmp_path: Path) -> None:
    two_kinds(tmp_path, range(100, 106), follows=0.8)
    for seed in range(100, 103):
        write_tree(
            tmp_path, backbone="gemma3-270m", family="even", seed=seed, style=0.5, follows=0.1
        )
    table = answers.first_moves(load(tmp_path)).set_index("family")
    assert table["first"].to_dict() == {"facts": "weights", "style": "prompt", "even": "either"}
    assert table["mean"].to_dict() == pytest.approx({"facts": -0.8, "style": 0.8, "even": 0.0})
    assert (table.low < table["mean"]).all() and (table["mean"] < table.high).all()
    assert table["style"].to_dict() == {"facts": 0.25, "style": 0.75, "even": 0.5}
    assert table.follows.to_dict() == pytest.approx({"facts": 0.8, "style": 0.8, "even": 0.1})
    fig = answers.first_move_map(answers.first_moves(load(tmp_path), by=["style"]))
    (ax,) = fig.axes
    labels = [text.get_text() for text in ax.get_yticklabels()]
    assert labels == ["gemma3-270m\nfollows 10%", "smollm2-135m\nfollows 80%"]
    assert {text.get_text() for text in ax.texts} == {"-80\nn=6", "+80\nn=6", "+0\nn=3"}


def test_an_item_that_needs_both_counts_for_both() -> None:
    instances = pd.DataFrame({"content": [0.0, 1.0, 0.5], "style": [0.0, 0.0, 0.0]}, list("abc"))
    shares = answers.style_share(Trees(instances.assign(both=[1.0, 0.0, 0.5])))
    assert shares.to_dict() == {"a": 0.5, "b": 0.0, "c": 0.33}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results without records beside a folder of trees, tuning and test, on two backbones."""
    root = tmp_path_factory.mktemp("study")
    for backbone in ("smollm2-135m", "qwen2.5-coder-0.5b"):
        for seeds in (range(100, 103), range(10, 16)):
            two_kinds(root / "schedules", seeds, backbone)
    report.build(root / "quick")
    return root / "quick"


def test_tables_and_figures_follow_from_the_trees(results: Path) -> None:
    tables = (
        "adaptivity",
        "regret",
        "fixed_schedules",
        "routers",
        "router_costs",
        "signal_test",
        "first_moves",
    )
    for name in tables:
        assert (results / "tables" / f"{name}.md").exists()
    for name in ("adaptivity", "regret", "signal_test", "first_move"):
        assert (results / "figures" / f"{name}.png").stat().st_size > 2000
        about = json.loads((results / "figures" / f"{name}.json").read_text())
        assert about["n_instances"] and len(about["sources"]) == 2 * 2 * 9
        assert "over instances" in about["interval"]
    assert report.verify(results) == []
    path = results.parent / "schedules" / about["sources"][0] / "nodes.jsonl"
    stored = path.read_text()
    path.write_text(stored.replace("11110000", "11010000"))
    said = report.verify(results)
    path.write_text(stored)
    assert any("test items disagree" in line for line in said)
    assert "tables/adaptivity.csv differs from what the records give." in said


def test_claims_are_judged_on_the_test_instances(results: Path) -> None:
    judged = {claim["key"]: claim for claim in claims.judged(records.load(results))["claims"]}
    (row, *_) = judged["adaptivity-pays"]["comparisons"]
    assert row["n"] == 12 and row["estimate"] == pytest.approx(0.4)
    assert row["low"] > 0
    # both kinds occur in each family, and half of them want the prompt first
    assert judged["prompt-first"]["verdict"] == "undecided"
    # no backbone here follows prompts, so that nobody asks what needs bring there
    assert {row["estimate"] for row in judged["needs-add"]["comparisons"]} == {None}
    assert judged["needs-add"]["verdict"] == judged["deciding-pays"]["verdict"] == "not run"
    assert judged["facts-numerical"]["verdict"] == "not run"


def test_needs_and_signal_are_judged_where_prompts_are_followed(tmp_path: Path) -> None:
    for seeds in (range(100, 103), range(10, 16)):
        two_kinds(tmp_path / "schedules", seeds, follows=0.9)
    judged = {c["key"]: c for c in claims.judged(records.load(tmp_path / "quick"))["claims"]}
    # the second comparison: needs alone against the best fixed schedule, on the backbone and on all
    assert [row["estimate"] for row in judged["needs-add"]["comparisons"][2:]] == pytest.approx(
        [0.4, 0.4]
    )
    # the signal of these trees says nothing
    assert judged["signal-adds"]["verdict"] in ("fails", "undecided")


def test_prompt_first_averages_schedules_of_one_length(tmp_path: Path) -> None:
    """Where one need is all that is asked for, it says nothing."""
    for family, style in (("mixed", 0.5), ("facts", 0.0)):
        write_tree(tmp_path, toward("SN"), family=family, style=style, depth=2)
    (row,) = claims.prompt_first(claims.of_both_needs(load(tmp_path))).to_dict("records")
    # SN: 1, SS: a half; NN and NS: 0
    assert (row["family"], row["value"]) == ("mixed", 0.75)


def test_tuning_instances_decide_no_claim(tmp_path: Path) -> None:
    two_kinds(tmp_path / "schedules", range(100, 106))
    judged = claims.judged(records.load(tmp_path / "quick"))["claims"]
    assert {claim["verdict"] for claim in judged} == {"not run"}


def test_two_instances_leave_it_undecided(tmp_path: Path) -> None:
    two_kinds(tmp_path / "schedules", range(10, 11), follows=0.9)
    judged = {c["key"]: c for c in claims.judged(records.load(tmp_path / "quick"))["claims"]}
    assert judged["prompt-first"]["verdict"] == judged["deciding-pays"]["verdict"] == "undecided"
