"""Does the monitoring signal tell when weights are saturated? What it said at each move, and what came after."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from nslora.study import stats
from nslora.study.figures import (
    INK,
    INTERVAL,
    PAGE,
    draw_moves,
    in_percent,
    legend_outside,
    name_moves,
    panels,
    spread,
    styled,
)
from nslora.study.records import IDENTITY, Records, estimates
from nslora.types import Move

# of c1_eps
THRESHOLDS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# methods that tune weights and nothing else
NUMERICAL = ("lora", "lora-rft", "lora-remade")
MOVED = ["run_id", *IDENTITY, "step", "c1", "c2", "left", "later", "gain_eps", "items"]


def numerical_moves(records: Records) -> pd.DataFrame:
    """Return every move of the purely numerical main runs with its signal, and what was still to come after it.

    `left` is the best dev reward of all moves minus the best so far, `later` the number of moves that follow, `items`
    the number of dev items.
    """
    steps = records.of("main").steps
    steps = steps[steps.method.isin(NUMERICAL)].sort_values(["run_id", "step"])
    steps = records.with_settings(steps, "gain_eps")
    # of each run
    runs = steps.groupby("run_id")
    moves = steps.assign(
        c1=steps["signal.c1"],
        c2=steps["signal.c2"],
        left=runs["dev.value"].transform("max") - runs["dev.value"].cummax(),
        later=runs.step.transform("max") - steps.step,
        items=steps["dev.n"],
    )
    return moves[moves.move == Move.NUMERICAL][MOVED].reset_index(drop=True)


def thresholds(records: Records, eps: Sequence[float] = THRESHOLDS) -> pd.DataFrame:
    """Return what stopping at the first move with C1 > -eps would have cost and saved, in means with intervals.

    Per backbone, eps and `kind`: "dev reward given up" or "share of moves saved". A larger eps stops earlier. Runs
    that never stop give up nothing.
    """
    moves = numerical_moves(records)
    moves["moves"] = moves.groupby("run_id").step.transform("size")
    last = moves.drop_duplicates("run_id", keep="last")
    rows = [pd.DataFrame(columns=["backbone", "kind", "eps", "seed", "value", "variance"])]
    for value in eps:
        # where the run would have stopped, and its end where it would not
        first = moves[moves.c1 > -value].drop_duplicates("run_id")
        at = pd.concat([first, last]).drop_duplicates("run_id")
        at = at[["backbone", "seed", "left", "later", "moves", "items"]].assign(eps=value)
        saved = at.later / at.moves
        kinds = {
            "dev reward given up": (at.left, at["items"]),
            "share of moves saved": (saved, at.moves),
        }
        for kind, (share, things) in kinds.items():
            variance = stats.share_variance(share, things)
            rows.append(at.assign(kind=kind, value=share, variance=variance))
    frame = pd.concat(rows[1:] if len(moves) else rows)
    return estimates(frame, ["backbone", "kind", "eps"])


@styled
def threshold_sensitivity(frame: pd.DataFrame) -> Figure:
    """Draw dev reward given up and moves saved by the threshold of C1 (`thresholds`), a line per backbone."""
    fig = Figure(figsize=(PAGE, 2.6), layout="constrained")
    for ax, here in panels(fig, frame, column="kind", sharey=True):
        lines = {"hue": "backbone", "marker": "o", "palette": "colorblind", **INTERVAL}
        sns.lineplot(spread(here), x="eps", y="share", ax=ax, **lines)
        in_percent(ax.yaxis)
    legend_outside(fig)
    fig.supxlabel("eps: stop when C1 > -eps", fontsize=8)
    fig.supylabel("percent", fontsize=8)
    return fig


def traces(records: Records) -> pd.DataFrame:
    """Return every move of one neurosymbolic run per backbone (its lowest seed), with its thresholds."""
    main = records.of("main")
    runs = main.runs[(main.runs.task == "mixed") & (main.runs.method == "neurosymbolic")]
    first = runs.sort_values(["seed", "run_id"]).groupby("backbone").run_id.first()
    steps = main.steps[main.steps.run_id.isin(first)].sort_values(["backbone", "step"])
    names = {"dev.value": "value", "signal.c1": "c1", "signal.c2": "c2", "signal.gain": "gain"}
    frame = records.with_settings(steps.rename(columns=names), "c1_eps", "c2_eps")
    columns = ["run_id", "backbone", "step", "move", "reason", *names.values(), "c1_eps", "c2_eps"]
    return frame[columns].reset_index(drop=True)


@styled
def signal_traces(frame: pd.DataFrame) -> Figure:
    """Draw dev reward, C1 and C2 over one run per backbone (`traces`), thresholds dashed, switch points dotted."""
    rows = {"value": "dev reward", "c1": "C1, relative\nchange of loss", "c2": "C2, gradient\nnorm"}
    backbones = list(frame.backbone.unique())
    fig = Figure(figsize=(min(PAGE, 1.0 + 2.4 * len(backbones)), 4.0), layout="constrained")
    axes = fig.subplots(len(rows), len(backbones), squeeze=False, sharex="col", sharey="row")
    for (i, j), ax in np.ndenumerate(axes):
        run, column = frame[frame.backbone == backbones[j]], list(rows)[i]
        draw_moves(ax, run, column)
        # C1 is small above -c1_eps, C2 below c2_eps
        limits = {"c1": -run.c1_eps.iloc[0], "c2": run.c2_eps.iloc[0]}
        if column in limits:
            ax.axhline(limits[column], color=INK, lw=0.8, ls="--")
        if j == 0:
            ax.set_ylabel(rows[column])
        if i == 0:
            ax.set(title=backbones[j], ylim=(0, 1.02))
    fig.supxlabel("move", fontsize=8)
    name_moves(fig, list(frame.move))
    fig.align_ylabels()
    return fig
