"""What adaptation costs: seconds by kind of work, tokens, memory and editor requests, and what they bring."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from pandas import DataFrame

from nslora.study import stats
from nslora.study.figures import (
    BLUE,
    GREY,
    ORANGE,
    PAGE,
    draw_lines,
    legend_outside,
    panels,
    styled,
)
from nslora.study.records import Records, estimates, in_order, until_budget

# Kinds of work, by the move that does it.
PARTS = {
    "numerical": "training and its dev scores",
    "symbolic": "edits and their dev scores",
    "rest": "everything else",
}
UNITS = {"move": "moves", "tokens": "thousand tokens", "seconds": "seconds"}


def costs(records: Records) -> DataFrame:
    """Return the mean cost of a run on mixed per backbone and method: seconds, tokens, editor requests, peak MB."""
    runs = records.of("main").runs.query("task == 'mixed'")
    if runs.empty:
        return DataFrame()
    groups = runs.groupby(["backbone", "method"])
    means = groups[runs.filter(regex=r"^(cost|editor)\.").columns].mean(numeric_only=True)
    table = {
        "wall seconds": means["cost.wall_s"],
        "tokens trained": means["cost.train_tokens"],
        "tokens generated": means["cost.generated_tokens"],
        "editor requests": means["editor.calls"] + means["editor.replayed"],
        "editor tokens": means["editor.tokens_in"] + means["editor.tokens_out"],
        "money": means["editor.money"],
        "peak MB": groups["cost.peak_mb"].max(),
        "runs": groups.size(),
    }
    return in_order(DataFrame(table).reset_index())


def parts(records: Records) -> DataFrame:
    """Return mean minutes of a run on mixed by kind of work (keys of PARTS) per backbone and method, and n (seeds).

    The frozen references and everything outside the moves is `rest`. Replies that were shared between runs count in
    each, as if it had made them.
    """
    runs = records.of("main").runs.query("task == 'mixed'")
    runs = runs.rename(columns={"cost.wall_s": "rest"}).set_index("run_id")
    if runs.empty:
        return DataFrame(columns=["method", "part"])
    # [run, kind of move]
    spent = records.steps.groupby(["run_id", "move"])["clock.seconds"].sum().unstack(fill_value=0.0)
    for move in ("numerical", "symbolic"):
        runs[move] = spent.get(move, 0.0)
        runs["rest"] -= runs[move]
    table = runs.melt(
        ["backbone", "method", "seed"],
        list(PARTS),
        "part",
        "seconds",
    )
    grouped = table.assign(mean=table.seconds / 60).groupby(["backbone", "method", "part"])
    return in_order(grouped.agg(mean=("mean", "mean"), n=("seed", "nunique")).reset_index())


@styled
def cost_parts(frame: DataFrame) -> Figure:
    """Draw stacked bars of minutes per run by kind of work, a panel per backbone; `frame` is that of `parts`."""
    # one order of methods in all panels
    methods = list(dict.fromkeys(in_order(frame[["method"]]).method))
    order = pd.Categorical(frame.method, categories=methods)
    frame = frame.assign(method=order, part=frame.part.map(PARTS))
    size = (min(PAGE, 2.0 + 2.6 * frame.backbone.nunique()), 0.9 + 0.22 * len(methods))
    fig = Figure(figsize=size)
    colours = dict(zip(PARTS.values(), (BLUE, ORANGE, GREY), strict=True))
    # a histogram whose counts are minutes is a stacked bar
    bars = {"y": "method", "weights": "mean", "multiple": "stack", "shrink": 0.8}
    parts = {"hue": "part", "hue_order": list(colours)[::-1], "palette": colours}
    for ax, here in panels(fig, frame, column="backbone", sharey=True):
        sns.histplot(here, ax=ax, **bars, **parts)
        ax.tick_params(axis="y", length=0)
    legend_outside(fig)
    fig.supxlabel("minutes per run")
    return fig


def progress(records: Records) -> DataFrame:
    """Return per run on mixed and move the best dev reward so far, and tokens and seconds spent up to it.

    Tokens are those trained on and the editor's. A run that stopped early keeps its last values up to its budget of
    moves. `variance` is that of the reward as a share of the dev items.
    """
    steps = records.of("main").steps.query("task == 'mixed' and method != 'frozen'")
    steps = records.with_settings(steps.sort_values(["run_id", "step"]), "moves")
    # bills are per move, so spending so far is their running sum
    tokens = steps[["bill.train_tokens", "bill.editor_tokens"]].fillna(0).sum(axis=1)
    runs = steps.run_id
    steps = steps.assign(
        value=steps["dev.value"].groupby(runs).cummax(),
        tokens=tokens.groupby(runs).cumsum(),
        seconds=steps["clock.seconds"].groupby(runs).cumsum(),
    )
    columns = ["backbone", "method", "seed", "rule", "value", "dev.n", "tokens", "seconds"]
    frame = until_budget(steps, ["run_id"], columns)
    return in_order(frame.assign(variance=stats.share_variance(frame.value, frame["dev.n"])))


def curves(records: Records) -> DataFrame:
    """Return means over seeds of `progress` with intervals of the value, per backbone, method and move."""
    runs, by = progress(records), ["backbone", "method", "move"]
    spent = runs.groupby(by)[["tokens", "seconds"]].mean().reset_index()
    return in_order(estimates(runs, by).merge(spent, on=by))


@styled
def cost_curves(frame: DataFrame) -> Figure:
    """Draw the best dev reward so far against moves, tokens and seconds (`curves`), a row of panels per backbone."""
    lines = frame.assign(tokens=frame.tokens / 1000)
    # the same lines three times, along another axis each
    long = pd.concat([lines.assign(unit=words, x=lines[name]) for name, words in UNITS.items()])
    long = long.astype({"x": float}).reset_index(drop=True)
    fig = Figure(figsize=(PAGE, 0.7 + 1.75 * frame.backbone.nunique()))
    for ax, here in panels(fig, long, "backbone", "unit", sharey="row", sharex="col"):
        draw_lines(ax, here, "x")
        ax.set(ylim=(0, 1.02))
    legend_outside(fig)
    fig.supylabel("best dev reward so far")
    return fig
