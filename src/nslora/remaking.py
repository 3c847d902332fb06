"""Is remade data worth reusing? Success on math by number of problems and by what weights are trained on. No torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .figures import BLUE, GREEN, INK, ORANGE, PAGE, styled
from .records import UNIT, Records, estimates

ARMS = {  # settings.targets of the study's runs, in the order of the legend
    "gold": ("raw answers", BLUE, "-"),
    "duplicated": ("raw answers, each twice", BLUE, ":"),
    "verified": ("remade answers alone", GREEN, "-"),
    "both": ("raw and remade answers", GREEN, ":"),
    "unverified": ("remade answers, right or wrong", ORANGE, "-"),
}


def efficiency(records: Records, method: str = "alternate") -> pd.DataFrame:
    """Test success on math per backbone, arm (`targets`) and number of training problems (`items`), with intervals.

    Only runs of `method` that differ from each other in nothing else.
    """
    scores = records.scores[(records.scores.task == "math") & (records.scores.split == "test")]
    settings = scores.settings.map(json.loads)
    scores = scores.assign(targets=[s["targets"] for s in settings], items=[s["items"] for s in settings])
    arms = scores[(scores.method == method) & scores.targets.isin(ARMS)]
    by = ["backbone", "targets", "items"]
    table = estimates(arms.set_index([*UNIT, "targets", "items"]).success, by)
    return table.assign(method=method)


def counts(records: Records, method: str = "alternate") -> pd.DataFrame:
    """Mean number of training pairs per source and epoch of the study's runs, by backbone, arm and items."""
    steps = records.steps[(records.steps.task == "math") & (records.steps.method == method)]
    steps = steps[steps.move == "numerical"]
    rows = [
        {"backbone": step.backbone, "targets": s["targets"], "items": s["items"], **step.filter(like="detail.pairs.")}
        for _, step in steps.iterrows()
        if (s := json.loads(step.settings))["targets"] in ARMS
    ]
    if not rows:
        return pd.DataFrame(columns=["backbone", "targets", "items"])
    frame = pd.DataFrame(rows).fillna(0).rename(columns=lambda name: name.removeprefix("detail.pairs."))
    return frame.groupby(["backbone", "targets", "items"]).mean().reset_index()


@styled
def data_efficiency(frame: pd.DataFrame) -> Figure:
    """Test success against the number of training problems, a line per arm and a panel per backbone.

    `frame` is that of `efficiency` (shares, shown in percent).
    """
    backbones = sorted(set(frame.backbone))
    fig = Figure(figsize=(min(PAGE, 2.2 + 2.4 * len(backbones)), 2.7), layout="constrained")
    for ax, backbone in zip(np.ravel(fig.subplots(1, len(backbones), sharey=True)), backbones, strict=True):
        for arm, (words, colour, dashes) in ARMS.items():
            line = frame[(frame.backbone == backbone) & (frame.targets == arm)].sort_values("items")
            if len(line):
                ax.plot(line["items"], 100 * line["mean"], "o", ls=dashes, ms=3, color=colour, label=words)
                low, high = (100 * line[end].clip(0, 1) for end in ("low", "high"))
                ax.fill_between(line["items"], low, high, color=colour, alpha=0.1, lw=0)
        ticks = sorted(set(frame["items"]))
        ax.set(title=backbone, xscale="log", xlabel="training problems", ylim=(0, None))
        ax.set_xticks(ticks, [str(tick) for tick in ticks])
        ax.minorticks_off()
    fig.axes[0].set_ylabel("test success, percent")
    fig.legend(*fig.axes[0].get_legend_handles_labels(), loc="outside upper left", ncols=3, frameon=False,
               fontsize=7, labelcolor=INK)  # fmt: skip
    return fig
