"""A router on a tree goes where a run with its decision goes: the tree made by real moves of a random model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, lowercase

from nslora.algorithm import loop
from nslora.algorithm.router import DECISIONS
from nslora.algorithm.session import State
from nslora.config import METHODS
from nslora.experiments import schedules
from nslora.runs.store import Store
from nslora.study import report
from nslora.study.schedules import load, route
from nslora.study.schedules.answers import adaptivity
from nslora.study.schedules.routers import ROUTERS, routed
from nslora.types import Candidate

SETTINGS: dict[str, Any] = {"method": "neurosymbolic", "moves": 2, "mix": "1:1:0"}
# until something is decided otherwise
CHANGES: tuple[dict[str, Any], ...] = (
    {},
    {"c1_eps": 0.9, "c2_eps": 99.0},
    {"demand_floor": 2.0},
    {"follows_floor": 0.0},
)


def test_a_router_goes_where_a_run_goes(opened, tiny, tmp_path: Path) -> None:
    cfg = opened(**SETTINGS).cfg
    folder = tmp_path / "schedules" / cfg.run_id
    place, said = Store(tmp_path / "results", tmp_path / "runs"), []
    editor = Scripted(lowercase)
    schedules.grow(cfg, folder, place, tmp_path / "work", said.append, editor, tiny)
    trees = load(folder.parent)
    (instance,) = trees.instances.to_dict("records")
    assert (instance["family"], instance["depth"]) == ("mixed 1:1:0 lower_case", 2)
    # every router, and what the trees say, read what the tree's maker writes
    assert set(routed(trees).router) == set(ROUTERS) - {
        "best fixed",
        "dev plateau",
        "monitor, tuned",
        "learned",
    }, "there is no other instance to choose on"
    assert (adaptivity(trees).n <= 1).all()
    report.build(tmp_path / "quick")
    assert report.verify(tmp_path / "quick") == []

    ways = set()
    for method in ("monitor", "needs-only", "numerical-first", "neurosymbolic"):
        for settings in CHANGES:
            decision = METHODS[method].decision
            run = opened(**SETTINGS, **settings)
            states: list[State] = []
            # the decision alone differs: targets, needs and inputs are those of the tree
            with pytest.MonkeyPatch.context() as patch:
                patch.setitem(DECISIONS, METHODS["neurosymbolic"].decision, DECISIONS[decision])
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
