"""Probing: both moves are tried on seeds and rules of their own, and rows carry counterfactual labels."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from scripted import Scripted, helpful

from nslora.algorithm import needs
from nslora.algorithm.session import Session
from nslora.config import RunConfig
from nslora.experiments import probe
from nslora.tasks import build

CFG = RunConfig(
    items=3,
    test_items=3,
    max_new_tokens=16,
    rank=4,
    lr=2e-3,
    candidates=2,
    method="lora",
    seed=2,
    replay=0.0,
)


def test_probe_runs_share_no_seed_or_method_with_experiments() -> None:
    cfg = probe.configure(CFG, 1)
    assert (cfg.task, cfg.seed, cfg.lr) == ("mixed", probe.SEED + 1, CFG.lr)
    assert len({probe.configure(CFG, n).rule for n in range(3)}) == 3
    people = [
        {e.question for e in build.build(c).examples("train") if e.need != "style"}
        for c in (CFG, cfg)
    ]
    assert not people[0] & people[1]


def test_rows_hold_features_and_labels_of_three_states(store, backbone) -> None:
    cfg = probe.configure(CFG, 1)
    with Scripted(helpful) as editor:
        session = Session(cfg, build.build(cfg), backbone, editor, store.begin(cfg), store.memo)
        frame = probe.collect(session, epochs=2, edits=1)
    backbone.model = backbone.model.unload()
    assert frame.groupby("state").size().to_dict() == {"frozen": 9, "prompt": 9, "weights": 9}
    assert np.isfinite(frame[list(needs.FEATURES)].to_numpy()).all()
    assert set(frame["label"].dropna()) <= {0.0, 1.0}
    assert set(frame["need"]) == {"content", "style", "both"}


def test_training_writes_the_classifier_and_its_report(tmp_path) -> None:
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(60, len(needs.FEATURES))), columns=list(needs.FEATURES))
    frame["label"] = (frame["nll"] > 0).astype(float)
    frame.loc[:5, "label"] = np.nan
    frame["fact"] = [f"f{i // 3}" for i in range(60)]
    frame.to_csv(tmp_path / "probe-a-b.csv", index=False)
    report = probe.train(tmp_path, tmp_path / "needs.json")
    assert report["rows"] == 54
    assert float(str(report["label_auroc_cross_validated"])) > 0.8
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert needs.NeedClassifier.parse((tmp_path / "needs.json").read_text()).weights[1] > 0
