"""What adaptation costs: seconds by kind of work, tokens, memory and editor requests, and what they bring."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

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


def costs(records: Records) -> pd.DataFrame:
    """Return the mean cost of a run on mixed per backbone and method: seconds, tokens, editor requests, peak MB."""
    main = records.of("main").runs
    runs = main[main.task == "mixed"]
    if runs.empty:
        return pd.DataFrame()
    frame = pd.DataFrame(
        {
            "backbone": runs.backbone,
            "method": runs.method,
            "wall seconds": runs["cost.wall_s"],
            "tokens trained": runs["cost.train_tokens"],
            "tokens generated": runs["cost.generated_tokens"],
            "editor requests": runs["editor.calls"] + runs["editor.replayed"],
            "editor tokens": runs["editor.tokens_in"] + runs["editor.tokens_out"],
            "money": runs["editor.money"],
        }
    )
    by = ["backbone", "method"]
    means = frame.groupby(by).mean()
    means["peak MB"] = runs.groupby(by)["cost.peak_mb"].max()
    means["runs"] = frame.groupby(by).size()
    return in_order(means.reset_index())


def parts(records: Records) -> pd.DataFrame:
    """Return mean minutes of a run on mixed by kind of work (keys of PARTS) per backbone and method, and n (seeds).

    The frozen references and everything outside the moves is `rest`. Replies that were shared between runs count in
    each, as if it had made them.
    """
    main = records.of("main")
    runs = main.runs[main.runs.task == "mixed"].set_index("run_id")
    columns = ["backbone", "method", "part", "mean", "n"]
    if runs.empty:
        return pd.DataFrame(columns=columns)
    steps = main.steps[main.steps.run_id.isin(runs.index)]
    # [run, kind of move]
    seconds = steps.pivot_table(
        index="run_id", columns="move", values="clock.seconds", aggfunc="sum"
    )
    seconds = seconds.reindex(index=runs.index, columns=["numerical", "symbolic"]).fillna(0.0)
    seconds["rest"] = runs["cost.wall_s"] - seconds.sum(axis=1)
    own = runs[["backbone", "method", "seed"]].join(seconds / 60)
    table = own.melt(["backbone", "method", "seed"], var_name="part", value_name="mean")
    grouped = table.groupby(["backbone", "method", "part"])
    means = grouped.agg(mean=("mean", "mean"), n=("seed", "nunique"))
    return in_order(means.reset_index())[columns]


@styled
def cost_parts(frame: pd.DataFrame) -> Figure:
    """Draw stacked bars of minutes per run by kind of work, a panel per backbone; `frame` is that of `parts`."""
    # one order of methods in all panels
    methods = list(dict.fromkeys(in_order(frame[["method"]]).method))
    order = pd.Categorical(frame.method, categories=methods)
    frame = frame.assign(method=order, part=frame.part.map(PARTS))
    size = (min(PAGE, 2.0 + 2.6 * frame.backbone.nunique()), 0.9 + 0.22 * len(methods))
    fig = Figure(figsize=size, layout="constrained")
    colours = dict(zip(PARTS.values(), (BLUE, ORANGE, GREY), strict=True))
    bars = {
        "hue_order": list(colours)[::-1],
        "palette": colours,
        "multiple": "stack",
        "shrink": 0.8,
    }
    for ax, here in panels(fig, frame, column="backbone", sharey=True):
        # a histogram whose counts are minutes is a stacked bar
        sns.histplot(here, y="method", hue="part", weights="mean", ax=ax, **bars)
        ax.tick_params(axis="y", length=0)
    legend_outside(fig)
    fig.supxlabel("minutes per run", fontsize=8)
    return fig


def progress(records: Records) -> pd.DataFrame:
    """Return per run on mixed and move the best dev reward so far, and tokens and seconds spent up to it.

    Tokens are those trained on and the editor's. A run that stopped early keeps its last values up to its budget of
    moves. `variance` is that of the reward as a share of the dev items.
    """
    main = records.of("main")
    steps = main.steps[(main.steps.task == "mixed") & (main.steps.method != "frozen")]
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


def curves(records: Records) -> pd.DataFrame:
    """Return means over seeds of `progress` with intervals of the value, per backbone, method and move."""
    runs, by = progress(records), ["backbone", "method", "move"]
    spent = runs.groupby(by)[["tokens", "seconds"]].mean().reset_index()
    return in_order(estimates(runs, by).merge(spent, on=by))


@styled
def cost_curves(frame: pd.DataFrame) -> Figure:
    """Draw the best dev reward so far against moves, tokens and seconds (`curves`), a row of panels per backbone."""
    lines = frame.assign(tokens=frame.tokens / 1000)
    # the same lines three times, along another axis each
    long = pd.concat([lines.assign(unit=words, x=lines[name]) for name, words in UNITS.items()])
    long = long.astype({"x": float}).reset_index(drop=True)
    fig = Figure(figsize=(PAGE, 0.7 + 1.75 * frame.backbone.nunique()), layout="constrained")
    for ax, here in panels(fig, long, "backbone", "unit", sharey="row", sharex="col"):
        draw_lines(ax, here, "x")
        ax.set(ylim=(0, 1.02))
    legend_outside(fig)
    fig.supylabel("best dev reward so far", fontsize=8)
    return fig
