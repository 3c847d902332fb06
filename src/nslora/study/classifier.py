"""Can it be told what an input needs? Estimated needs against hidden ones, and single features."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from nslora.algorithm import needs
from nslora.study import stats
from nslora.study.figures import GREY, PAGE, in_percent, styled
from nslora.study.records import Records
from nslora.types import Need

# methods that decide by estimated needs
ESTIMATING = ("needs-only", "neurosymbolic")
NEEDED = ["run_id", "backbone", "seed", "step", "need", "success", "p_content"]
AREA = ["mean", "low", "high", "n"]


def estimated_needs(records: Records) -> pd.DataFrame:
    """Return P(content) and the hidden need of every training item and move of main runs on mixed."""
    steps = records.of("main").steps
    steps = steps[(steps.task == "mixed") & steps.method.isin(ESTIMATING) & (steps.step > 0)]
    rows = [
        (move.run_id, move.backbone, move.seed, move.step, need, success, p_content)
        for _, move in steps.iterrows()
        for _, need, success, p_content in move["hidden.needs"]
    ]
    return pd.DataFrame(rows, columns=NEEDED)


def one_need(estimated: pd.DataFrame) -> pd.DataFrame:
    """Return the failing items that need content or style, not both, with `label` (content) and `score`."""
    rows = estimated[(estimated.success < 1) & (estimated.need != Need.BOTH)]
    return rows.assign(label=rows.need == Need.CONTENT, score=rows.p_content)


def roc(records: Records) -> pd.DataFrame:
    """Return the ROC curve of P(content) per backbone, all moves and seeds together, with its area's interval.

    Columns backbone, fpr, tpr, mean, low, high (of the area) and n (items).
    """
    curves = [pd.DataFrame(columns=["backbone", "fpr", "tpr", *AREA])]
    for backbone, group in one_need(estimated_needs(records)).groupby("backbone"):
        area = stats.auroc_interval(group.label, group.score)
        # one need only: nothing to tell apart
        if np.isnan(area.mean):
            continue
        labels, scores = group.label.to_numpy(bool), group.score.to_numpy(float)
        fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
        curve = pd.DataFrame({"backbone": backbone, "fpr": fpr, "tpr": tpr})
        curves.append(curve.assign(mean=area.mean, low=area.low, high=area.high, n=area.n))
    return pd.concat(curves[1:] or curves, ignore_index=True)


def calibration(records: Records) -> pd.DataFrame:
    """Return mean P(content) and the share of content needs per bin of P(content), failing items with one need."""
    rows = one_need(estimated_needs(records))
    # five bins of equal width over [0, 1]
    edges = np.linspace(0, 1, 6)
    by_bin = rows.groupby(
        pd.cut(rows.score.astype(float), edges, include_lowest=True), observed=True
    )
    table = by_bin.agg(predicted=("score", "mean"), content=("label", "mean"), n=("label", "size"))
    return table.rename_axis("P(content)").reset_index()


def single_features(folder: Path) -> pd.DataFrame:
    """Return the AUROC for the labels of the probes in `folder`: classifier (cross-validated) and single features.

    One row per score: name, auroc, low, high, n (items); none without probe runs. A feature's sign is the one that its
    meaning gives it.
    """
    columns = ["score", "auroc", "low", "high", "n"]
    frame = needs.probes(folder)
    if frame.empty:
        return pd.DataFrame(columns=columns)
    x, label = frame[list(needs.FEATURES)].to_numpy(), frame.label.to_numpy()
    scores = {
        "need classifier (cross-validated)": needs.out_of_fold(x, label, frame.fact.to_numpy()),
        "NLL of the gold answer": frame.nll,
        "reward, reversed": -frame.reward,
        "share of gold words missing": -frame.recall,
    }
    areas = {name: stats.auroc_interval(label, score) for name, score in scores.items()}
    rows = [(name, area.mean, area.low, area.high, area.n) for name, area in areas.items()]
    return pd.DataFrame(rows, columns=columns)


@styled
def need_roc(frame: pd.DataFrame) -> Figure:
    """Draw ROC curves (`roc`): content needs sent to the weights against style needs sent there."""
    fig = Figure(figsize=(PAGE / 2, 3.0), layout="constrained")
    ax = fig.subplots()
    labels = {
        row.backbone: f"{row.backbone}\nAUROC {row.mean:.2f} [{row.low:.2f}, {row.high:.2f}]"
        for row in frame.drop_duplicates("backbone").astype({"mean": float}).itertuples()
    }
    curves = frame.assign(label=frame.backbone.map(labels)).astype({"fpr": float, "tpr": float})
    lines = {"hue": "label", "palette": "colorblind", "estimator": None, "sort": False}
    sns.lineplot(curves, x="fpr", y="tpr", ax=ax, **lines)
    ax.axline((0, 0), slope=1, color=GREY, lw=0.8, ls=":")
    for axis, need in ((ax.xaxis, "style"), (ax.yaxis, "content")):
        in_percent(axis)
        axis.set_label_text(f"{need} needs sent to the weights, percent")
    ax.legend(fontsize=6.5, loc="lower right")
    return fig
