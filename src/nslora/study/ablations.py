"""Which parts matter: runs with one setting changed, against the runs of the main comparison. Without torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import json
import textwrap

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nslora.study.figures import GREEN, PAGE, styled
from nslora.study.records import MEASURES, Records, by_measure, estimates, paired

COLUMNS = ["row", "backbone", "change", "mean", "low", "high", "half", "n", "interval", "method"]


def change(settings: str, main: str) -> dict[str, object]:
    """The settings (both given as JSON) that differ from the main ones."""
    ours, theirs = json.loads(settings), json.loads(main)
    return {name: value for name, value in ours.items() if value != theirs[name]}


def ablations(records: Records, task: str = "mixed", method: str = "neurosymbolic") -> pd.DataFrame:
    """What one changed setting does to a method: its runs minus its main ones, paired by seed and item.

    One row per measure (`row`, see records.MEASURES), backbone and change, shares with intervals. Runs that differ in
    several settings are left out.
    """
    scores, reference = records.scores, records.main.runs
    parts = {}
    for backbone, group in scores[(scores.task == task) & (scores.method == method)].groupby(
        "backbone"
    ):
        main = reference.settings[(reference.task == task) & (reference.backbone == backbone)].iloc[
            0
        ]
        for settings in sorted(set(group.settings) - {main}):
            changed = change(settings, main)
            if len(changed) == 1 and main in set(group.settings):
                ((name, value),) = changed.items()
                for row, (split, metric) in MEASURES.items():
                    differences = paired(group, settings, main, "settings", metric, split)
                    parts[row, backbone, f"{name} = {json.dumps(value)}"] = differences.droplevel(
                        "backbone"
                    )
    if not parts:
        return pd.DataFrame(columns=COLUMNS)
    table = estimates(
        pd.concat(parts, names=["row", "backbone", "change"]), ["row", "backbone", "change"]
    )
    return by_measure(table).assign(method=method)


@styled
def ablation_dots(frame: pd.DataFrame) -> Figure:
    """A dot and an interval per change, in points; rows by backbone, columns by measure.

    Left of zero, the part that was changed mattered. A backbone without an ability to keep has an empty field.
    Intervals of few seeds may leave what is possible; they are drawn up to 100 points.
    """
    backbones, measures = (
        sorted(set(frame.backbone)),
        [row for row in MEASURES if row in set(frame.row)],
    )
    changes = frame[frame.row == measures[0]].groupby("change")["mean"].mean().sort_values().index
    size = (
        min(PAGE, 2.0 + 1.8 * len(measures)),
        0.5 + max(0.8, 0.4 + 0.18 * len(changes)) * len(backbones),
    )
    fig = Figure(figsize=size, layout="constrained")
    axes = fig.subplots(len(backbones), len(measures), squeeze=False, sharey=True, sharex="col")
    for (i, j), ax in np.ndenumerate(axes):
        here = frame[(frame.backbone == backbones[i]) & (frame.row == measures[j])]
        rows = here.set_index("change").reindex(changes)
        ax.axvline(0, color="#dddddd", lw=1, zorder=0)
        ax.hlines(
            range(len(rows)),
            *(100 * rows[end].clip(-1, 1) for end in ("low", "high")),
            color=GREEN,
            alpha=0.7,
        )
        ax.plot(100 * rows["mean"], range(len(rows)), "o", color=GREEN, ms=4.5)
        ax.set(title=measures[j] if i == 0 else "", ylim=(len(rows) - 0.5, -0.5))
        ax.set_xlim(
            min(ax.get_xlim()[0], -1), max(ax.get_xlim()[1], 1)
        )  # no ticks in hundredths of a point
        ax.set_yticks(range(len(rows)), changes)
        ax.tick_params(axis="y", length=0)
        if j == 0:
            ax.set_ylabel(textwrap.fill(backbones[i], 9), fontweight="bold")
    fig.supxlabel("change against the unchanged method, points", fontsize=8)
    return fig
