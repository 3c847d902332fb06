"""Which parts matter: runs with one setting changed, against the runs of the main comparison. Without torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import json

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .figures import GREEN, PAGE, styled
from .records import Records, estimates, paired

COLUMNS = ["backbone", "change", "mean", "low", "high", "half", "n", "interval", "method"]


def change(settings: str, main: str) -> dict[str, object]:
    """The settings (both given as JSON) that differ from the main ones."""
    ours, theirs = json.loads(settings), json.loads(main)
    return {name: value for name, value in ours.items() if value != theirs[name]}


def ablations(records: Records, task: str = "mixed", method: str = "neurosymbolic") -> pd.DataFrame:
    """Test success of a method's runs with one setting changed, minus its main ones; paired by seed and item.

    One row per backbone and change, shares with intervals. Runs that differ in several settings are left out.
    """
    scores, reference = records.scores, records.main.runs
    parts = []
    for backbone, group in scores[(scores.task == task) & (scores.method == method)].groupby("backbone"):
        main = reference.settings[(reference.task == task) & (reference.backbone == backbone)].iloc[0]
        for settings in sorted(set(group.settings) - {main}):
            changed = change(settings, main)
            if len(changed) == 1 and main in set(group.settings):
                ((name, value),) = changed.items()
                differences = paired(group, settings, main, factor="settings")
                parts.append(pd.concat({f"{name} = {json.dumps(value)}": differences}, names=["change"]))
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    return estimates(pd.concat(parts), ["backbone", "change"]).assign(method=method)


@styled
def ablation_dots(frame: pd.DataFrame) -> Figure:
    """A dot and an interval per change and backbone, in points of test success; left of zero, the part mattered."""
    backbones = sorted(set(frame.backbone))
    changes = frame.groupby("change")["mean"].mean().sort_values().index
    fig = Figure(figsize=(min(PAGE, 2.0 + 2.6 * len(backbones)), 0.7 + 0.2 * len(changes)), layout="constrained")
    for ax, backbone in zip(np.ravel(fig.subplots(1, len(backbones), sharey=True)), backbones, strict=True):
        rows = frame[frame.backbone == backbone].set_index("change").reindex(changes)
        ax.axvline(0, color="#dddddd", lw=1, zorder=0)
        ax.hlines(range(len(rows)), 100 * rows.low, 100 * rows.high, color=GREEN, alpha=0.7)
        ax.plot(100 * rows["mean"], range(len(rows)), "o", color=GREEN, ms=4.5)
        ax.set(title=backbone, ylim=(len(rows) - 0.5, -0.5))
        ax.set_yticks(range(len(rows)), changes)
        ax.tick_params(axis="y", length=0)
    fig.supxlabel("change in test success against the full method, points", fontsize=8)
    return fig
