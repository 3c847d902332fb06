"""When: what the signal and the need classifier knew at each move, against what came of it. Without torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import roc_curve

from nslora.algorithm import needs
from nslora.study import stats
from nslora.study.records import Records, estimates
from nslora.types import Move, Need

THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # of c1_eps
MOVED = [
    "run_id",
    "task",
    "rule",
    "backbone",
    "seed",
    "step",
    "c1",
    "c2",
    "left",
    "later",
    "gain_eps",
]
NEEDED = ["run_id", "backbone", "seed", "step", "need", "success", "p_content"]


def lora_moves(records: Records) -> pd.DataFrame:
    """Every move of the `lora` runs with its signal, and what was still to come after it.

    `left` is the best dev reward of all moves minus the best so far, `later` the number of moves that follow.
    """
    steps = records.main.steps
    rows = [pd.DataFrame(columns=MOVED)]
    for _, run in steps[steps.method == "lora"].sort_values("step").groupby("run_id"):
        known = {
            "c1": run["signal.c1"],
            "c2": run["signal.c2"],
            "left": run["dev.value"].max() - run["dev.value"].cummax(),
            "later": run.step.max() - run.step,
            "gain_eps": json.loads(run.settings.iloc[0])["gain_eps"],
        }
        rows.append(run.assign(**known)[run.move == Move.NUMERICAL][MOVED])
    return pd.concat([row for row in rows if len(row)] or rows, ignore_index=True)


def thresholds(records: Records, eps: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """What stopping at the first move with C1 > -eps would have cost and saved, in means with intervals.

    Per backbone, eps and `kind`: "dev reward given up" or "share of moves saved". A larger eps stops earlier. Runs
    that never stop give up nothing.
    """
    rows = []
    for _, run in lora_moves(records).groupby("run_id"):
        for value in eps:
            stopped = run[run.c1 > -value].head(1)
            at = stopped.iloc[0] if len(stopped) else run.iloc[-1]
            head = (at.backbone, value, at.seed, at.task, at.rule)
            rows.append((*head, "dev reward given up", at.left))
            rows.append((*head, "share of moves saved", at.later / len(run)))
    names = ["backbone", "eps", "seed", "task", "rule", "kind"]
    frame = pd.DataFrame(rows, columns=[*names, "value"])
    return estimates(
        frame.set_index(names).value.astype(float), ["backbone", "kind", "eps"]
    ).assign(method="lora")


def predicted_needs(records: Records) -> pd.DataFrame:
    """P(content) of every training item at every routed move (task mixed), with its hidden need."""
    steps = records.main.steps
    routed = steps[
        (steps.task == "mixed")
        & steps.method.isin(("classifier", "neurosymbolic"))
        & (steps.step > 0)
    ]
    rows = [
        (step.run_id, step.backbone, step.seed, step.step, need, success, p_content)
        for _, step in routed.iterrows()
        for _, need, success, p_content in step["detail.needs"]
    ]
    return pd.DataFrame(rows, columns=NEEDED)


def one_need(predicted: pd.DataFrame) -> pd.DataFrame:
    """The failing items that need content or style, not both: `label` (content) and `score`, to be told apart."""
    rows = predicted[(predicted.success < 1) & (predicted.need != Need.BOTH)]
    return rows.assign(label=rows.need == Need.CONTENT, score=rows.p_content)


def roc(records: Records) -> pd.DataFrame:
    """ROC curve of P(content) per backbone (all moves and seeds together), with the area's interval over items.

    Columns backbone, method, fpr, tpr, mean, low, high (the area), n (seeds) and interval.
    """
    rows = [
        pd.DataFrame(
            columns=["backbone", "method", "fpr", "tpr", "mean", "low", "high", "n", "interval"]
        )
    ]
    for backbone, group in one_need(predicted_needs(records)).groupby("backbone"):
        area = stats.auroc_interval(group.label, group.score)
        if np.isnan(area.mean):
            continue
        fpr, tpr, _ = roc_curve(
            group.label.to_numpy(bool), group.score.to_numpy(float), drop_intermediate=False
        )
        curve = pd.DataFrame(
            {"backbone": backbone, "method": "neurosymbolic", "fpr": fpr, "tpr": tpr}
        )
        said = {"mean": area.mean, "low": area.low, "high": area.high, "n": group.seed.nunique()}
        rows.append(curve.assign(**said, interval=f"{area.kind} of the area"))
    return pd.concat([row for row in rows if len(row)] or rows, ignore_index=True)


def routed(records: Records) -> pd.DataFrame:
    """Confusion per backbone: of the failing items of each hidden need, the share that went to the weights."""
    predicted = predicted_needs(records)
    failing = predicted[predicted.success < 1]
    to_weights = (failing.p_content >= 0.5).astype(float)
    return (
        to_weights.groupby([failing.backbone, failing.need])
        .agg(["mean", "size"])
        .rename(columns={"mean": "weights"})
    )


def calibration(records: Records, bins: int = 5) -> pd.DataFrame:
    """Mean P(content) and share of content needs per bin of P(content), failing items with one need."""
    rows = one_need(predicted_needs(records))
    edges = pd.cut(rows.score.astype(float), np.linspace(0, 1, bins + 1), include_lowest=True)
    table = rows.groupby(edges, observed=True).agg(
        predicted=("score", "mean"), content=("label", "mean"), n=("label", "size")
    )
    return table.rename_axis("P(content)").reset_index()


def against_thresholds(folder: Path) -> pd.DataFrame:
    """AUROC for the counterfactual labels of the probe runs: the classifier, cross-validated, and single features.

    One row per score: name, auroc, low, high, n (items); none without probe runs. A feature's sign is the one that its
    meaning gives it.
    """
    frame = needs.probes(folder)
    if frame.empty:
        return pd.DataFrame(columns=["score", "auroc", "low", "high", "n"])
    x, label = frame[list(needs.FEATURES)].to_numpy(), frame.label.to_numpy()
    scores = {
        "need classifier (cross-validated)": needs.out_of_fold(x, label, frame.fact.to_numpy()),
        "NLL of the gold answer": frame.nll,
        "reward, reversed": -frame.reward,
        "share of gold words missing": -frame.recall,
    }
    areas = {name: stats.auroc_interval(label, score) for name, score in scores.items()}
    return pd.DataFrame(
        [(name, a.mean, a.low, a.high, a.n) for name, a in areas.items()],
        columns=["score", "auroc", "low", "high", "n"],
    )
