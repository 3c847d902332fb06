"""Routers on trees whose best schedules are known: folds, coins, tuning, learning, lookahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from grown import FLAT, toward, write_tree

from nslora.study.schedules import Trees, load, route, routers, trees

pytestmark = pytest.mark.pure

FACTS, FORM = "facts 12+0+0", "style 0+12+0 json"


def two_kinds(folder: Path, seeds: range = range(100, 104), **settings) -> Trees:
    """Families of which one is best begun with N and one with S; needs tell which."""
    for number, (goal, style) in enumerate((("NNN", 0.0), ("SNN", 1.0))):
        for copy in range(2):
            for seed in seeds:
                write_tree(
                    folder,
                    toward(goal),
                    family=f"{(FACTS, FORM)[number]} {copy}",
                    seed=seed,
                    style=style,
                    follows=0.9,
                    needs=lambda schedule, style=style: (0, 1) if style > len(schedule) else (1, 0),
                    **settings,
                )
    return load(folder)


def success(data: Trees, ends) -> float:
    rows = trees.scored(data, ends)
    return float((rows.test * rows.weight).sum() / len(data.instances))


def test_folds_leave_out_a_family_or_else_an_instance(tmp_path: Path) -> None:
    data = two_kinds(tmp_path, range(100, 102))
    pairs = list(routers.folds(data.instances))
    assert len(pairs) == 4
    for others, held_out in pairs:
        families = [set(data.instances.family[part]) for part in (others, held_out)]
        assert not families[0] & families[1] and len(families[1]) == 1
    one_family = data.instances[data.instances.family == f"{FACTS} 0"]
    assert [(len(o), len(h)) for o, h in routers.folds(one_family)] == [(1, 1), (1, 1)]
    assert list(routers.folds(one_family[:1])) == []
    assert len(list(routers.folds(data.instances, by_family=False))) == 8


def test_test_instances_are_judged_by_what_tuning_instances_say(tmp_path: Path) -> None:
    for seed in (100, 101):
        write_tree(tmp_path, toward("NNN"), seed=seed)
    for seed in (10, 11):
        write_tree(tmp_path, toward("SSS"), seed=seed)
    data = load(tmp_path)
    ends = routers.best_fixed(data).set_index("instance").schedule
    assert set(ends) == {"NNN"}
    test = data.where(data.instances.split == "test")
    assert set(routers.best_fixed(test).schedule) == {"SSS"}


def test_a_coin_is_the_mean_of_all_schedules(tmp_path: Path) -> None:
    write_tree(tmp_path, FLAT, np.random.default_rng(1))
    data = load(tmp_path)
    leaves = data.nodes[data.nodes.moves == 3]
    assert len(leaves) == 8
    assert success(data, routers.begun(data)) == pytest.approx(leaves.test.mean())
    first = leaves.test[leaves.index.get_level_values(1).str.startswith("S")]
    assert success(data, routers.begun(data, "S")) == pytest.approx(first.mean())


def test_needs_find_the_best_first_move_and_a_fixed_schedule_cannot(tmp_path: Path) -> None:
    data = two_kinds(tmp_path)
    rows = routers.routed(data)
    regret = (rows.regret * rows.weight).groupby(rows.router).sum() / len(data.instances)
    # needs decide alone, with the signal where none has anything to say, and where prompts are followed
    needing = ("needs-only", "numerical first", "neurosymbolic", "oracle needs")
    assert [regret[name] for name in needing] == [0, 0, 0, 0]
    assert regret["hindsight"] == 0
    assert regret["all, best on dev"] == regret["learned"] == 0
    # without an instance the other kind has the majority of its fold
    assert regret["best fixed"] == 1
    assert regret["weights only"] == pytest.approx(0.5)
    assert regret["prompts only"] == pytest.approx((1 + 1 - 7 / 20) / 2), "a third, of 20 items"
    assert set(rows.router) == set(routers.ROUTERS)
    assert (rows.regret >= -1e-9).all() and (rows.regret_cost >= -1e-9).all()
    weights = rows.groupby(["router", "instance"]).weight.sum()
    assert weights.to_numpy() == pytest.approx(1.0) and len(weights) == len(routers.ROUTERS) * 16


def ends(data, name: str) -> str:
    """The schedule of the only instance."""
    (schedule,) = routers.ends_by(data, name).schedule
    return schedule


def test_without_the_signal_weights_are_tuned_to_the_end(tmp_path: Path) -> None:
    content, small = (lambda schedule: (0.9, 0.0)), (lambda schedule: {"c1": -0.01, "c2": 1.0})
    write_tree(tmp_path, follows=0.9, needs=content, signal=small)
    data = load(tmp_path)
    assert ends(data, "neurosymbolic") == "NSN"
    assert ends(data, "neurosymbolic, no signal") == "NNN"


def test_without_needs_a_prompt_is_tried_where_no_form_is_asked_for(tmp_path: Path) -> None:
    write_tree(tmp_path, follows=0.9, needs=lambda schedule: (0.9, 0.0))
    data = load(tmp_path)
    assert ends(data, "neurosymbolic") == "NNN"
    assert ends(data, "neurosymbolic, no needs").startswith("S")


def test_without_following_a_prompt_is_tried_on_a_backbone_that_follows_none(
    tmp_path: Path,
) -> None:
    write_tree(tmp_path, follows=0.1, needs=lambda schedule: (0.5, 0.5))
    data = load(tmp_path)
    assert ends(data, "neurosymbolic") == "NNN"
    assert ends(data, "neurosymbolic, no following").startswith("S")


def test_the_learned_router_learns_from_other_families_only(tmp_path: Path) -> None:
    """Only one family wants S, so no other family can teach it."""
    for family, goal in (("a", "NNN"), ("b", "NNN"), ("c", "SSS")):
        for seed in (100, 101):
            write_tree(tmp_path, toward(goal), family=family, seed=seed, style=float(goal > "R"))
    data = load(tmp_path)
    ends = routers.learned(data).set_index("instance").schedule
    assert set(ends[data.instances.family == "c"]) == {"NNN"}


def test_thresholds_are_tuned_where_others_say_so(tmp_path: Path) -> None:
    """C1 is small at 0.3 everywhere: only thresholds of 0.4 and more see saturation after two N."""

    def signal(schedule: str) -> dict[str, float]:
        if schedule.endswith("S"):
            return {"gain": 0.05}
        return {"c1": -0.3, "c2": 9.0} if schedule.count("N") > 1 else {"c2": 9.0}

    for family in "ab":
        write_tree(tmp_path, toward("NNS"), family=family, signal=signal)
    data = load(tmp_path)
    assert routers.method(data, "monitor").schedule.tolist() == ["NNN", "NNN"]
    ends = routers.tuned_monitor(data)
    assert ends.schedule.tolist() == ["NNS", "NNS"]
    assert ends.why[0].startswith("c1_eps = 0.4")


def test_a_plateau_changes_the_kind_of_move(tmp_path: Path) -> None:
    worth = {"N": 0.5, "NN": 0.5, "NNS": 0.5}
    write_tree(tmp_path, lambda schedule: worth.get(schedule, 0.0), depth=4)
    assert route(routers.plateau("N"), load(tmp_path)).schedule.tolist() == ["NNSN"]
    assert route(routers.plateau("S"), load(tmp_path)).schedule.tolist() == ["SNSN"]


def test_lookahead_pays_for_both_moves(tmp_path: Path) -> None:
    write_tree(tmp_path, toward("SNSN"), depth=4)
    data = load(tmp_path)
    within, twice = (routers.lookahead(data, times).iloc[0] for times in (1, 2))
    assert (within.schedule, twice.schedule) == ("SN", "SNSN")
    assert (within.moves, twice.moves) == (4, 8)
    assert within.tokens == 10 + 2 * (110 + 230) and within.seconds == 1 + 2 * 30
    row = trees.scored(data, routers.lookahead(data)).iloc[0]
    # 690 tokens pay for SNSN (10 + 2 * 340) too
    assert (row.test, row.affordable, row.regret_cost) == (0.5, "SNSN", 0.5)


def test_trying_everything_pays_for_the_whole_tree(tmp_path: Path) -> None:
    write_tree(tmp_path, toward("SN"), depth=2)
    row = routers.all_tried(load(tmp_path)).iloc[0]
    assert (row.schedule, row.moves, row.tokens) == ("SN", 6, 10 + 3 * 110 + 3 * 230)


def test_inner_nodes_know_the_best_below_each_child(tmp_path: Path) -> None:
    worth = {"NS": 0.9, "S": 0.4, "SN": 0.6}
    write_tree(tmp_path, lambda schedule: worth.get(schedule, 0.0), depth=2)
    nodes = routers.inner_nodes(load(tmp_path)).set_index("schedule")
    assert list(nodes.index) == ["", "N", "S"]
    assert nodes[["below_N", "below_S"]].loc[""].tolist() == [0.9, 0.6]
    assert nodes.prefers.tolist() == pytest.approx([-0.3, 0.9, -0.2])
    assert nodes.kind.tolist() == [0, 1, -1] and nodes.rise.tolist() == [0, 0, 0.4]
    assert nodes.fall.tolist() == pytest.approx([0, 0, 0.4])
