"""Trees of schedules: what is read, what a run returns, where routers go, and what they cost and lose."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from grown import FLAT, schedules, toward, write_tree
from synthetic import write_lines

from nslora.algorithm import loop, router
from nslora.config import RunConfig
from nslora.study.schedules import Trees, load, route, trees
from nslora.types import Move, UserError

pytestmark = pytest.mark.pure


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "nodes.jsonl").read_text().splitlines()]


def test_no_trees_are_empty_frames(tmp_path: Path) -> None:
    for empty in (load(tmp_path), Trees()):
        assert empty.instances.empty and empty.nodes.empty
        assert empty.cut(2).where(empty.instances.split == "test").nodes.empty
        assert trees.disagreements(empty) == []
        with pytest.raises(UserError, match="no finished trees"):
            route(lambda moves, needs, cfg: "N", empty)


def test_an_instance_and_its_nodes_are_rows(tmp_path: Path) -> None:
    write_tree(tmp_path, style=0.25, follows=0.7, depth=2, retention=0.5)
    write_tree(tmp_path, seed=10, depth=1)
    data = load(tmp_path)
    (name, _) = data.instances.index
    row = data.instances[data.instances.split == "tuning"].iloc[0]
    assert (row.backbone, row.task, row.seed, row.depth) == ("smollm2-135m", "mixed", 100, 2)
    assert (row.content, row["style"], row.both, row.follows) == (0.75, 0.25, 0.0, 0.7)
    nodes = load(tmp_path, split="tuning").nodes
    assert list(nodes.index.get_level_values("schedule")) == schedules(2)
    assert nodes["needs.asked.style"].tolist() == [0.5] * 7
    assert nodes.retained.tolist() == pytest.approx([0.25] * 7)
    # the start scores 10 tokens; N trains 100 and S asks the editor for 200
    costs = nodes.droplevel("instance")[["moves", "tokens", "seconds"]]
    assert costs.loc["NS"].tolist() == [2, 10 + 110 + 230, 1 + 10 + 20]


def test_a_run_returns_what_the_loop_returns(tmp_path: Path) -> None:
    """Whatever the scores, ties included."""
    write_tree(tmp_path, FLAT, np.random.default_rng(0), depth=4, dev=3)
    data = load(tmp_path)
    (name,) = data.instances.index
    histories, _ = trees.histories_of(data, "asked")
    cfg = RunConfig()
    for schedule in schedules(4):
        moves = histories[name, schedule]
        best = loop.best([moves.start, *moves], cfg)
        node = data.nodes.loc[(name, schedule)]
        assert node.returned == schedule[: best.step]
        assert node.test == data.nodes["test.success"][name, node.returned]
        assert node.dev == best.dev["success"]
        assert node.right.count("1") / 20 == pytest.approx(node.test)


def test_a_tree_that_still_grows_is_left_out_and_named(tmp_path: Path) -> None:
    folder = write_tree(tmp_path)
    write_lines(folder / "nodes.jsonl", rows_of(folder)[:-1])
    data = load(tmp_path)
    assert data.unfinished == (folder.name,) and data.nodes.empty
    (folder / "nodes.jsonl").unlink()
    assert load(tmp_path).unfinished == (folder.name,)


def test_a_damaged_tree_is_named(tmp_path: Path) -> None:
    folder = write_tree(tmp_path)
    rows = rows_of(folder)
    rows[3]["test_items"] = "01"
    write_lines(folder / "nodes.jsonl", rows)
    with pytest.raises(UserError, match="different numbers of test items"):
        load(tmp_path)
    (folder / "nodes.jsonl").write_text('{"schedule": ')
    with pytest.raises(UserError, match=r"s100 cannot be read \(JSONDecodeError"):
        load(tmp_path)
    instance = json.loads((folder / "instance.json").read_text())
    (folder / "instance.json").write_text(json.dumps(instance | {"schema": 2}))
    with pytest.raises(UserError, match="schema 2, not 1"):
        load(tmp_path)


def test_a_decision_sees_what_the_loop_shows_it(tmp_path: Path) -> None:
    """Moves with signals, and the demand that was estimated before each of them; null stays unknown."""
    write_tree(
        tmp_path,
        toward("SNN"),
        needs=lambda schedule: (0.1 * len(schedule), 0.9 - 0.1 * len(schedule)),
        signal=lambda schedule: {"gain": 0.3} if schedule.endswith("S") else {"c1": -0.2, "c2": 2},
    )
    seen = []

    def watch(moves, needs, cfg):
        seen.append((moves, needs, cfg))
        return router.Choice(Move.SYMBOLIC if not moves else Move.NUMERICAL, "a reason")

    (row,) = route(watch, load(tmp_path), c1_eps=0.4).to_dict("records")
    assert (row["schedule"], row["why"]) == ("SNN", "a reason; a reason; a reason")
    moves, needs, cfg = seen[2]
    assert [step.move for step in moves] == ["symbolic", "numerical"]
    assert (moves.start.move, moves.start.dev["success"]) == ("start", 0.0)
    assert (moves[0].signal.gain, moves[0].signal.c1, moves[1].signal.c1) == (0.3, None, -0.2)
    assert moves[1].demand == {"content": 0.1, "style": 0.8}
    assert (needs.content, needs.style) == pytest.approx((0.2, 0.7))
    assert (cfg.c1_eps, cfg.moves, cfg.seed) == (0.4, 3, 100)


def test_the_algorithms_decisions_are_routed_as_they_are(tmp_path: Path) -> None:
    def signal(schedule: str) -> dict[str, float]:
        # the second epoch of a phase changes little; edits gain once
        if schedule.endswith("S"):
            return {"gain": 0.5 if schedule.count("S") == 1 else 0.0}
        return {"c1": -0.01, "c2": 3} if schedule.endswith("NN") else {"c2": 3}

    write_tree(tmp_path, depth=5, signal=signal)
    data = load(tmp_path)
    by = {name: route(decide, data, "none") for name, decide in router.DECISIONS.items()}
    assert by["signal"].schedule.tolist() == ["NNSSN"]
    assert by["signal"].why[0].startswith("the first move; LoRA still learns; LoRA is saturated")
    assert by["stop"].schedule.tolist() == [""] and by["numerical"].schedule.tolist() == ["NNNNN"]
    assert by["once symbolic"].schedule.tolist() == ["S"]
    given = route(router.DECISIONS["schedule"], data, method="fixed:SNS")
    assert given.schedule.tolist() == ["SNS"] and given.moves.tolist() == [3]


def test_needs_of_every_estimator_can_be_seen(tmp_path: Path) -> None:
    write_tree(tmp_path, needs=lambda schedule: (0.9, 0.1))
    data = load(tmp_path)
    decide = router.DECISIONS["demand"]
    assert route(decide, data, "hidden").schedule.tolist() == ["NNN"]
    assert route(decide, data, "none").why[0].startswith("more examples need content")
    with pytest.raises(UserError, match=r"needs\.recall\.content"):
        route(decide, data, "recall")


def test_a_router_has_to_name_a_move(tmp_path: Path) -> None:
    write_tree(tmp_path)
    with pytest.raises(UserError, match="not 'weights'"):
        route(lambda moves, needs, cfg: "weights", load(tmp_path))


def test_regret_is_measured_at_equal_moves_at_equal_cost_and_on_dev(tmp_path: Path) -> None:
    """SNN reaches 1, NNN 0.6; what NNN costs buys no S and two N."""
    worth = {"S": 0.2, "SN": 0.5, "SNN": 1.0, "N": 0.3, "NN": 0.4, "NNN": 0.6}
    write_tree(tmp_path, lambda schedule: worth.get(schedule, 0.0))
    data = load(tmp_path)
    row = route(lambda moves, needs, cfg: "N", data).iloc[0]
    assert (row.returned, row.test, row.dev) == ("NNN", 0.6, 0.6)
    assert (row.moves, row.tokens, row.seconds) == (3, 10 + 3 * 110, 31)
    assert row.regret == pytest.approx(0.4) and row.regret_dev == pytest.approx(0.4)
    # 340 tokens pay for S alone, NN, and NNN itself
    assert row.affordable == "NNN" and row.regret_cost == 0
    by_moves = route(lambda moves, needs, cfg: "N", data, cost="moves").iloc[0]
    assert by_moves.affordable == "SNN" and by_moves.regret_cost == pytest.approx(0.4)
    short = route(lambda moves, needs, cfg: "N", data.cut(1)).iloc[0]
    assert (short.schedule, short.regret) == ("N", 0.0)


def test_equals_on_dev_are_chosen_with_the_same_weight(tmp_path: Path) -> None:
    """The order of letters favours neither N nor S; fewer moves come first."""
    write_tree(tmp_path, lambda schedule: float(schedule[:1] == "S") or float(schedule[:1] == "N"))
    ends = trees.chosen_on_dev(load(tmp_path))
    assert ends.schedule.tolist() == ["N", "S"] and ends.weight.tolist() == [0.5, 0.5]


def test_items_of_one_fact_count_as_one(tmp_path: Path) -> None:
    alone, together = (
        write_tree(tmp_path / str(n), toward("SNN", 0.5), facts=facts)
        for n, facts in enumerate((None, [f"f{i // 5}" for i in range(20)]))
    )
    variances = []
    for folder in (alone, together):
        data = load(folder.parent)
        end = trees.hindsight(data)
        variances.append(trees.difference(data, end).variance[0])
    assert variances[1] > 2 * variances[0] > 0


def test_success_that_is_not_that_of_its_items_is_seen(tmp_path: Path) -> None:
    folder = write_tree(tmp_path)
    assert trees.disagreements(load(tmp_path)) == []
    rows = rows_of(folder)
    rows[2]["test"]["success"] += 0.05
    write_lines(folder / "nodes.jsonl", rows)
    (said,) = trees.disagreements(load(tmp_path))
    assert said.endswith("test success and test items disagree at 'S'.")
