"""Can it be told what an input needs? Estimated needs against hidden ones, and single features."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from pandas import DataFrame
from sklearn.metrics import roc_curve

from nslora.algorithm import needs
from nslora.study import stats
from nslora.study.figures import GREY, PAGE, in_percent, styled
from nslora.study.records import Records, complete
from nslora.types import Need

# methods that decide by estimated needs
ESTIMATING = ("needs-only", "numerical-first", "neurosymbolic")
RUN = ["run_id", "backbone", "seed", "step"]
# what is recorded of an item
ITEM = ["item", "need", "success", "p_content"]


def estimated_needs(records: Records) -> DataFrame:
    """Return P(content) and the hidden need of every training item and move of main runs on mixed."""
    steps = complete(records.of("main").steps, ["hidden.needs"])
    steps = steps.query("task == 'mixed' and method in @ESTIMATING and step > 0")
    # one row per item
    rows = steps.explode("hidden.needs").dropna(subset="hidden.needs").reset_index()
    needed = DataFrame(rows.pop("hidden.needs").tolist(), rows.index, ITEM)
    return rows[RUN].join(needed)


def one_need(estimated: DataFrame) -> DataFrame:
    """Return the failing items that need content or style, not both, with `label` (content) and `score`."""
    rows = estimated[(estimated.success < 1) & (estimated.need != Need.BOTH)]
    return rows.assign(label=rows.need == Need.CONTENT, score=rows.p_content)


def roc(records: Records) -> DataFrame:
    """Return the ROC curve of P(content) per backbone, all moves and seeds together, with its area's interval.

    Columns backbone, fpr, tpr, mean, low, high (of the area) and n (items).
    """
    curves = [DataFrame(columns=["backbone", "fpr", "tpr", *stats.ROW])]
    for backbone, group in one_need(estimated_needs(records)).groupby("backbone"):
        area = stats.auroc_interval(group.label, group.score)
        # one need only: nothing to tell apart
        if np.isnan(area.mean):
            continue
        scores = group.score.astype(float)
        fpr, tpr, _ = roc_curve(
            group.label.astype(bool),
            scores,
            drop_intermediate=False,
        )
        curve = DataFrame({"backbone": backbone, "fpr": fpr, "tpr": tpr})
        curves.append(curve.assign(**vars(area)))
    return pd.concat(curves[1:] or curves, ignore_index=True)


def calibration(records: Records) -> DataFrame:
    """Return mean P(content) and the share of content needs per bin of P(content), failing items with one need."""
    rows = one_need(estimated_needs(records))
    # five of equal width
    bins = pd.cut(
        rows.score.astype(float),
        np.linspace(0, 1, 6),
        include_lowest=True,
    )
    by_bin = rows.groupby(bins, observed=True)
    table = by_bin.agg(
        predicted=("score", "mean"),
        content=("label", "mean"),
        n=("label", "size"),
    )
    return table.rename_axis("P(content)").reset_index()


def single_features(folder: Path) -> DataFrame:
    """Return the AUROC for the labels of the probes in `folder`: classifier (cross-validated) and single features.

    One row per score: name, auroc, low, high, n (items); none without probe runs. A feature's sign is the one that its
    meaning gives it.
    """
    frame = needs.probes(folder)
    if frame.empty:
        return DataFrame(columns=["score", "auroc"])
    x, label = frame[list(needs.FEATURES)].to_numpy(), frame.label.to_numpy()
    scores = {
        "need classifier (cross-validated)": needs.out_of_fold(x, label, frame.fact.to_numpy()),
        "NLL of the gold answer": frame.nll,
        "reward, reversed": -frame.reward,
        "share of gold words missing": -frame.recall,
    }
    areas = [{"score": name, **vars(stats.auroc_interval(label, scores[name]))} for name in scores]
    return DataFrame(areas).rename(columns={"mean": "auroc"})


@styled
def need_roc(frame: DataFrame) -> Figure:
    """Draw ROC curves (`roc`): content needs taken for content against style needs taken for it."""
    fig = Figure(figsize=(PAGE / 2, 3.0))
    ax = fig.subplots()
    labels = [
        f"{row.backbone}\nAUROC {row.mean:.2f} [{row.low:.2f}, {row.high:.2f}]"
        for row in frame.itertuples()
    ]
    curves = frame.assign(label=labels)
    lines = {"hue": "label", "palette": "colorblind", "estimator": None, "sort": False}
    sns.lineplot(curves, x="fpr", y="tpr", ax=ax, **lines)
    ax.axline(
        (0, 0),
        slope=1,
        color=GREY,
        lw=0.8,
        ls=":",
    )
    for axis, need in ((ax.xaxis, "style"), (ax.yaxis, "content")):
        in_percent(axis)
        axis.set_label_text(f"{need} needs taken for content, percent")
    ax.legend(fontsize=6.5, loc="lower right")
    return fig
