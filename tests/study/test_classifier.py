"""What the estimate of needs knew: ROC, confusion, calibration, single features."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from nslora.algorithm import needs
from nslora.study import classifier, records, stats


def test_the_curve_has_the_area_that_is_named(loaded: records.Records) -> None:
    rows = classifier.one_need(classifier.estimated_needs(loaded))
    assert set(rows.need) == {"content", "style"} and (rows.success < 1).all()
    curve = classifier.roc(loaded)
    for backbone, line in curve.groupby("backbone"):
        mine = rows[rows.backbone == backbone]
        area = float(np.trapezoid(line.tpr.astype(float), line.fpr.astype(float)))
        assert area == pytest.approx(stats.auroc(mine.label, mine.score))
        assert line["mean"].iloc[0] == pytest.approx(area)
        assert line.low.iloc[0] < area < line.high.iloc[0] and set(line.n) == {len(mine)}
    legend = classifier.need_roc(curve).axes[0].get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert len(labels) == 2 and all("AUROC 0." in label for label in labels)


def test_the_estimate_is_calibrated_where_it_separates(loaded: records.Records) -> None:
    table = classifier.calibration(loaded)
    assert table.n.sum() == len(classifier.one_need(classifier.estimated_needs(loaded)))
    assert table.content.is_monotonic_increasing


def test_single_features_stand_beside_the_classifier(tmp_path: Path) -> None:
    assert classifier.single_features(tmp_path).empty
    rng = np.random.default_rng(0)
    frame = pd.DataFrame(rng.normal(size=(80, len(needs.FEATURES))), columns=list(needs.FEATURES))
    facts = [f"f{i // 2}" for i in range(80)]
    frame = frame.assign(label=(frame.nll > 0).astype(float), fact=facts)
    frame.to_csv(tmp_path / "probe-x.csv", index=False)
    areas = classifier.single_features(tmp_path).set_index("score").auroc
    assert areas["NLL of the gold answer"] == 1.0
    assert areas["need classifier (cross-validated)"] > 0.9
    assert 0.3 < areas["reward, reversed"] < 0.7


def test_no_records_are_empty_frames(tmp_path: Path) -> None:
    nothing = records.load(tmp_path)
    frames = (classifier.estimated_needs, classifier.roc, classifier.calibration)
    assert all(frame(nothing).empty for frame in frames)
