"""Probing: both moves are tried on seeds and rules of their own, and rows carry counterfactual labels."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from scripted import Scripted, lowercase
from tinymodel import config

from nslora.algorithm import needs
from nslora.algorithm.session import Session
from nslora.experiments import probe
from nslora.tasks.build import build
from nslora.types import Need


def test_probes_share_no_seed_with_experiments_and_no_setting_of_the_run_that_is_given() -> None:
    given = config(method="lora", targets="gold", needs="recall", seed=2, study="main", lr=2e-3)
    probes = [probe.configure(given, n) for n in range(len(probe.PROBES))]
    assert [cfg.seed for cfg in probes] == [probe.SEED + n for n in range(len(probes))]
    assert {cfg.lr for cfg in probes} == {given.lr}
    assert {cfg.settings["targets"] for cfg in probes} == {"gold"}
    # four rules and two tasks at least
    assert len({cfg.rule for cfg in probes}) >= 4
    assert {cfg.task for cfg in probes} == {"mixed", "math"}
    first = probes[0]
    people = []
    for cfg in (first, first.but(seed=0)):
        task = build(cfg)
        invented = [e for e in task.train if task.hidden[e.id].need is not Need.STYLE]
        people.append({e.question for e in invented})
    assert not people[0] & people[1]


def test_rows_hold_features_and_labels_of_three_states(tiny, memo, tmp_path) -> None:
    cfg = probe.configure(config(backbone=tiny.name), 1).but(items=2, test_items=2, replay_pool=6)
    session = Session(cfg, build(cfg), tiny, Scripted(lowercase), tmp_path, memo)
    frame = probe.collect(session, epochs=2, edits=1)
    assert frame.groupby("state").size().to_dict() == {"frozen": 6, "prompt": 6, "weights": 6}
    assert np.isfinite(frame[list(needs.FEATURES)].to_numpy()).all()
    assert set(frame["label"].dropna()) <= {0.0, 1.0}
    assert set(frame["need"]) == {"content", "style", "both"}
    assert set(frame["rule"]) == {"bullet"} and set(frame["task"]) == {"mixed"}
    # frozen and prompt states are of the frozen weights, so the neutral nll is one
    by_state = {name: rows["nll_neutral"].tolist() for name, rows in frame.groupby("state")}
    assert by_state["frozen"] == by_state["prompt"] != by_state["weights"]


def rows_of(backbone: str, task: str, seed: int) -> pd.DataFrame:
    """Return sixty labelled rows in which nll tells the label."""
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame(rng.normal(size=(60, len(needs.FEATURES))), columns=list(needs.FEATURES))
    frame["label"] = (frame["nll"] > 0).astype(float)
    frame.loc[:5, "label"] = np.nan
    frame["fact"] = [f"s{seed}-f{i // 3}" for i in range(60)]
    frame["backbone"], frame["task"], frame["rule"] = backbone, task, f"rule-{task}"
    return frame


def test_training_writes_the_classifier_and_its_report(tmp_path) -> None:
    for seed, (backbone, task) in enumerate([("a", "mixed"), ("a", "math"), ("b", "mixed")]):
        frame = rows_of(backbone, task, seed)
        frame.to_csv(tmp_path / f"probe-{backbone}-{task}.csv", index=False)
    report = probe.train(tmp_path, tmp_path / "needs.json")
    assert report["rows"] == 3 * 54 and report["probes"] == 3
    assert report["content"] + report["style"] == report["rows"]
    assert json.loads((tmp_path / "report.json").read_text()) == report
    weights = needs.NeedClassifier.parse((tmp_path / "needs.json").read_text()).weights
    assert weights[needs.FEATURES.index("nll")] > 0
    for column, values in (("task", {"mixed", "math"}), ("backbone", {"a", "b"})):
        left_out = report[f"leave one {column} out"]
        assert set(left_out) == values
        for areas in left_out.values():
            assert set(areas) == {"classifier", *needs.FEATURES}
            assert areas["classifier"] > 0.9 and areas["nll"] == 1.0
            assert abs(areas["recall"] - 0.5) < 0.25


def test_a_probe_left_out_is_not_in_the_fit(tmp_path) -> None:
    """Where the left-out task turns the labels round, its AUROC must be below one half."""
    straight, turned = rows_of("a", "mixed", 0), rows_of("a", "math", 1)
    turned["label"] = 1 - turned["label"]
    frame = pd.concat([straight, turned]).dropna(subset=["label"])
    areas = probe.left_out(frame, "task")
    assert areas["math"]["classifier"] == pytest.approx(0, abs=0.1)
    assert areas["math"]["nll"] == 0.0
