"""A router on a tree goes where a run with its decision goes: the tree made of real runs of a random model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from grown import right, schedules
from synthetic import write_lines

from nslora.algorithm import loop
from nslora.algorithm.needs import ESTIMATORS
from nslora.algorithm.router import DECISIONS, Choice
from nslora.algorithm.session import Session, State
from nslora.config import METHODS
from nslora.study.schedules import load, route
from nslora.types import Candidate, Move

LETTERS = {"N": Move.NUMERICAL, "S": Move.SYMBOLIC}
SETTINGS: dict[str, Any] = {"method": "neurosymbolic", "moves": 2}
# until something is decided otherwise
CHANGES: tuple[dict[str, Any], ...] = ({}, {"c1_eps": 0.9, "c2_eps": 99.0}, {"demand_floor": 2.0})


def forced(run: Session, schedule: str) -> list[State]:
    """Every state of a run that makes these moves under the policy of `neurosymbolic`."""
    estimate = ESTIMATORS[run.cfg.row.needs]
    states = [loop.begin(run, State(Candidate(run.task.initial_prompt)))]
    for letter in schedule:
        choice, state = Choice(LETTERS[letter], ""), states[-1]
        needs = estimate(run, state)
        outcome = loop.MOVES[choice.move](run, state, needs)
        states.append(loop.after(run, state, needs, choice, outcome))
    return states


def line(run: Session, schedule: str, state: State) -> dict[str, Any]:
    """A line of nodes.jsonl; the test scores are of no matter here."""
    record = json.loads(json.dumps(asdict(state.history[-1])))
    needs = ESTIMATORS[run.cfg.row.needs](run, state)
    asked = {"content": needs.content, "style": needs.style}
    kept = ("dev", "train", "signal", "evidence", "bill", "prompt")
    return {name: record[name] for name in kept} | {
        "schedule": schedule,
        "needs": {"asked": asked},
        "test": {"success": 0.5, "value": 0.5, "n": 2},
        "test_items": "".join(map(str, right(0.5, 2, None))),
        "locality": None,
        "promptability": None,
        "seconds": 0.0,
    }


def test_a_router_goes_where_a_run_goes(opened, tmp_path: Path) -> None:
    nodes: dict[str, dict[str, Any]] = {}
    for schedule in schedules(2)[3:]:
        run = opened(**SETTINGS)
        for length, state in enumerate(forced(run, schedule)):
            prefix = schedule[:length]
            node = line(run, prefix, state)
            # runs that begin alike are alike
            assert nodes.setdefault(prefix, node) == node
    folder = tmp_path / "schedules" / "tiny"
    folder.mkdir(parents=True)
    write_lines(folder / "nodes.jsonl", [nodes[schedule] for schedule in schedules(2)])
    instance = {"schema": 1, "instance": "tiny", "family": "mixed", "split": "tuning", "depth": 2}
    instance |= {"shares": {}, "follows": 0.0, "config": run.cfg.settings}
    (folder / "instance.json").write_text(json.dumps(instance))
    trees = load(folder.parent)

    ways = set()
    for method in ("monitor", "needs-only", "neurosymbolic"):
        for settings in CHANGES:
            decision = METHODS[method].decision
            run = opened(**SETTINGS, **settings)
            states: list[State] = []
            # the decision alone differs: targets and needs are those of the tree
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(DECISIONS, "signal and demand", DECISIONS[decision])
                state = State(Candidate(run.task.initial_prompt))
                loop.adapt(run, state, lambda state, needs, made=states: made.append(state))
            made = "".join(step.move[0].upper() for step in states[-1].moves)
            (row,) = route(DECISIONS[decision], trees, **settings).to_dict("records")
            assert (row["schedule"], row["returned"]) == (
                made,
                made[: loop.best(states[-1].history, run.cfg).step],
            )
            ways.add(made)
            reasons = [step.reason for step in states[-1].moves]
            assert row["why"].split("; ")[: len(reasons)] == reasons
    assert {"NN", "NS"} <= ways
