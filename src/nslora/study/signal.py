"""Does the monitoring signal tell when weights are saturated? What it said at each move, and what came after."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from collections.abc import Sequence

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from pandas import DataFrame

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


def numerical_moves(records: Records) -> DataFrame:
    """Return every move of the purely numerical main runs with its signal, and what was still to come after it.

    `left` is the best dev reward of all moves minus the best so far, `later` the number of moves that follow, `items`
    the number of dev items.
    """
    steps = records.of("main").steps.query("method in @NUMERICAL")
    steps = records.with_settings(steps.sort_values(["run_id", "step"]), "gain_eps")
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


def thresholds(records: Records, eps: Sequence[float] = THRESHOLDS) -> DataFrame:
    """Return what stopping at the first move with C1 > -eps would have cost and saved, in means with intervals.

    Per backbone, eps and `kind`: "dev reward given up" or "share of moves saved". A larger eps stops earlier. Runs
    that never stop give up nothing.
    """
    moves = numerical_moves(records)
    moves["moves"] = moves.groupby("run_id").step.transform("size")
    last = moves.drop_duplicates("run_id", keep="last")
    # where each run would have stopped, and its end where it would not
    stops = [
        pd.concat([moves[moves.c1 > -value], last]).drop_duplicates("run_id").assign(eps=value)
        for value in eps
    ]
    at = pd.concat(stops)
    given_up = at.assign(
        kind="dev reward given up",
        value=at.left,
        things=at["items"],
    )
    saved = at.assign(
        kind="share of moves saved",
        value=at.later / at.moves,
        things=at.moves,
    )
    frame = pd.concat([given_up, saved])
    frame["variance"] = stats.share_variance(frame.value, frame.things)
    return estimates(frame, ["backbone", "kind", "eps"])


@styled
def threshold_sensitivity(frame: DataFrame) -> Figure:
    """Draw dev reward given up and moves saved by the threshold of C1 (`thresholds`), a line per backbone."""
    fig = Figure(figsize=(PAGE, 2.6))
    for ax, here in panels(fig, frame, column="kind", sharey=True):
        lines = {"hue": "backbone", "marker": "o", "palette": "colorblind", **INTERVAL}
        sns.lineplot(
            spread(here),
            x="eps",
            y="share",
            ax=ax,
            **lines,
        )
        in_percent(ax.yaxis)
    legend_outside(fig)
    fig.supxlabel("eps: stop when C1 > -eps")
    fig.supylabel("percent")
    return fig


def traces(records: Records) -> DataFrame:
    """Return every move of one neurosymbolic run per backbone (its lowest seed), with its thresholds."""
    steps = records.of("main").steps.query("task == 'mixed' and method == 'neurosymbolic'")
    steps = steps.sort_values(["backbone", "seed", "run_id", "step"])
    first = steps[steps.run_id == steps.groupby("backbone").run_id.transform("first")]
    names = {"dev.value": "value", "signal.c1": "c1", "signal.c2": "c2", "signal.gain": "gain"}
    limits = ["c1_eps", "c2_eps"]
    frame = records.with_settings(first.rename(columns=names), *limits)
    return frame[["run_id", "backbone", "step", "move", "reason", *names.values(), *limits]]


@styled
def signal_traces(frame: DataFrame) -> Figure:
    """Draw dev reward, C1 and C2 over one run per backbone (`traces`), thresholds dashed, switch points dotted."""
    rows = {"value": "dev reward", "c1": "C1, relative\nchange of loss", "c2": "C2, gradient\nnorm"}
    n = frame.backbone.nunique()
    fig = Figure(figsize=(min(PAGE, 1.0 + 2.4 * n), 4.0))
    axes = fig.subplots(
        len(rows),
        n,
        squeeze=False,
        sharex="col",
        sharey="row",
    )
    for (backbone, run), (reward, c1, c2) in zip(frame.groupby("backbone"), axes.T, strict=True):
        for column, ax in zip(rows, (reward, c1, c2), strict=True):
            draw_moves(ax, run, column)
        reward.set(title=backbone, ylim=(0, 1.02))
        # C1 is small above -c1_eps, C2 below c2_eps
        c1.axhline(
            -run.c1_eps.iloc[0],
            color=INK,
            lw=0.8,
            ls="--",
        )
        c2.axhline(
            run.c2_eps.iloc[0],
            color=INK,
            lw=0.8,
            ls="--",
        )
    for label, ax in zip(rows.values(), axes[:, 0], strict=True):
        ax.set_ylabel(label)
    fig.supxlabel("move")
    name_moves(fig, list(frame.move))
    fig.align_ylabels()
    return fig
