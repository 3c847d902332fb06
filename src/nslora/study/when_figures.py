"""Figures of `when`: thresholds of the signal, and the ROC curve of the need classifier."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from nslora.study.figures import BLUE, GREEN, GREY, ORANGE, PAGE, styled

LINES = (BLUE, ORANGE, GREEN, GREY)  # one per backbone


@styled
def threshold_sensitivity(frame: pd.DataFrame) -> Figure:
    """Dev reward given up and moves saved by the threshold of C1, a line per backbone with its interval.

    `frame` is that of `when.thresholds` (shares, shown in percent).
    """
    kinds = sorted(set(frame.kind))
    fig = Figure(figsize=(PAGE, 2.4), layout="constrained")
    for ax, kind in zip(fig.subplots(1, len(kinds)), kinds, strict=True):
        for (backbone, rows), colour in zip(
            frame[frame.kind == kind].groupby("backbone"), LINES, strict=False
        ):
            ax.plot(rows.eps, 100 * rows["mean"], "o-", ms=3, color=colour, label=backbone)
            ax.fill_between(
                rows.eps,
                100 * rows.low.clip(0, 1),
                100 * rows.high.clip(0, 1),
                color=colour,
                alpha=0.15,
                lw=0,
            )
        ax.set(title=kind, xlabel="threshold: stop when C1 > -eps, eps", ylabel="percent")
        ax.set_ylim(bottom=min(0, ax.get_ylim()[0]))
    fig.axes[0].legend(frameon=False, fontsize=7)
    return fig


@styled
def need_roc(frame: pd.DataFrame) -> Figure:
    """ROC curves of `when.roc`: content needs found against style needs sent to the weights."""
    fig = Figure(figsize=(PAGE / 2, 3.0), layout="constrained")
    ax = fig.subplots()
    ax.plot([0, 100], [0, 100], color=GREY, lw=0.8, ls=":")
    for (backbone, rows), colour in zip(frame.groupby("backbone"), LINES, strict=False):
        area = rows.iloc[0]
        label = f"{backbone}\nAUROC {area['mean']:.2f} [{area.low:.2f}, {area.high:.2f}]"
        ax.plot(
            100 * rows.fpr.astype(float), 100 * rows.tpr.astype(float), color=colour, label=label
        )
    ax.set(
        xlabel="style needs sent to the weights, percent",
        ylabel="content needs sent to the weights, percent",
    )
    ax.legend(frameon=False, fontsize=6.5, loc="lower right")
    return fig
