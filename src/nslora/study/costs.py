"""What adaptation costs: seconds by kind of work, tokens, memory and editor requests. Without torch."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from nslora.study.figures import BLUE, GREY, ORANGE, PAGE, styled
from nslora.study.records import Records, estimates, in_order

PARTS = {
    "numerical": "training and its dev scores",
    "symbolic": "edits and their dev scores",
    "rest": "everything else",
}
COLOURS = dict(zip(PARTS, (BLUE, ORANGE, GREY), strict=True))


def costs(records: Records, task: str = "mixed") -> pd.DataFrame:
    """Mean cost of a run per backbone and method: seconds, tokens, editor requests, and the highest memory in MB."""
    runs = records.main.runs
    runs = runs[runs.task == task]
    if runs.empty:
        return pd.DataFrame()
    frame = runs[["backbone", "method"]].assign(
        **{
            "wall seconds": runs["cost.wall_s"],
            "tokens trained": runs["cost.train_tokens"],
            "tokens generated": runs["cost.generated_tokens"],
            "editor requests": runs["editor.calls"] + runs["editor.replayed"],
            "editor tokens": runs["editor.tokens_in"] + runs["editor.tokens_out"],
            "runs": 1.0,
            "peak MB": runs["cost.peak_mb"],
        }
    )
    grouped = frame.groupby(["backbone", "method"])
    highest = {"runs": grouped.runs.sum(), "peak MB": grouped["peak MB"].max()}
    return in_order(grouped.mean().assign(**highest).reset_index())


def parts(records: Records, task: str = "mixed") -> pd.DataFrame:
    """Minutes of a run by kind of work (keys of PARTS) per backbone and method, with intervals over seeds.

    The frozen references and everything outside the moves is `rest`. Replies that were shared between runs count in
    each, as if it had made them.
    """
    runs, steps = records.main.runs, records.main.steps
    runs = runs[runs.task == task]
    index = ["backbone", "method", "seed", "rule"]
    if runs.empty:
        return pd.DataFrame(
            columns=["part", "backbone", "method", "mean", "low", "high", "half", "n", "interval"]
        )
    steps = steps[steps.run_id.isin(runs.run_id)]
    seconds = {
        part: steps["cost.seconds"].where(steps.move == part, 0.0).groupby(steps.run_id).sum()
        for part in PARTS
    }
    own = runs.set_index("run_id")
    frame = pd.DataFrame(seconds).reindex(own.index)
    frame["rest"] = own["cost.wall_s"] - frame.numerical - frame.symbolic
    minutes = (frame / 60).join(own[index]).set_index(index).rename_axis("part", axis=1).stack()
    return estimates(minutes.astype(float), ["part", "backbone", "method"])


@styled
def cost_parts(frame: pd.DataFrame) -> Figure:
    """Stacked bars of minutes per run by kind of work, a panel per backbone; `frame` is that of `parts`."""
    backbones = sorted(set(frame.backbone))
    methods = list(dict.fromkeys(in_order(frame[["method"]].drop_duplicates()).method))
    fig = Figure(
        figsize=(min(PAGE, 2.0 + 2.6 * len(backbones)), 0.9 + 0.22 * len(methods)),
        layout="constrained",
    )
    axes = np.ravel(fig.subplots(1, len(backbones), sharey=True))
    for ax, backbone in zip(axes, backbones, strict=True):
        here = (
            frame[frame.backbone == backbone]
            .pivot(index="method", columns="part", values="mean")
            .reindex(methods)
        )
        left = np.zeros(len(methods))
        for part, words in PARTS.items():
            width = here[part].fillna(0).to_numpy(float)
            ax.barh(
                range(len(methods)), width, left=left, color=COLOURS[part], label=words, height=0.7
            )
            left += width
        ax.set(title=backbone, ylim=(len(methods) - 0.4, -0.6))
        ax.set_yticks(range(len(methods)), methods)
        ax.tick_params(axis="y", length=0)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside upper right", ncols=3, frameon=False, fontsize=7)
    fig.supxlabel("minutes per run", fontsize=8)
    return fig


def charged(frame: pd.DataFrame, per_million: float) -> pd.DataFrame:
    """What an endpoint would charge per run, given its price of a million tokens; `frame` is that of `costs`."""
    money = frame["editor tokens"] * per_million / 1e6
    return frame[["backbone", "method"]].assign(
        **{"editor requests": frame["editor requests"], "price": money}
    )
