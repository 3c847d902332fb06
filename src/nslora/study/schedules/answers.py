"""What the trees say: value of adaptivity, regret of every router, test of the signal, and the map of first moves.

Intervals are Student's t over instances, their variance floored by the items'. Each table has a row per split and per
backbone, and one for all backbones together ("all").
"""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import pandas as pd
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nslora.study import stats
from nslora.study.figures import BLUE, INK, ORANGE, PAGE, dots, in_percent, panels, styled
from nslora.study.records import estimate, estimates
from nslora.study.schedules.routers import (
    ROUTERS,
    begun,
    best_fixed,
    by_schedule,
    chosen,
    ends_by,
    ends_of,
    inner_nodes,
    routed,
)
from nslora.study.schedules.trees import (
    COSTS,
    NEEDS,
    Trees,
    chosen_on_dev,
    difference,
    hindsight,
)
from nslora.study.stats import DIFFERENCE, SHARE, Interval

GROUP = ["split", "backbone"]
ESTIMATE = ["mean", "low", "high", "n"]
ALL = "all"
MOVE_NUMBER = "move number"
# What V is measured in, by the column of `Trees.nodes`.
MEASURES = {"test success": "test", "test success x retention": "retained"}
# What regret is measured from.
HINDSIGHT = "best in hindsight"
REGRETS = (HINDSIGHT, "best at equal cost", "best on dev of all")
# Blue where weights come first, orange where the prompt does; full colour from this difference on.
MAP = LinearSegmentedColormap.from_list("first move", [BLUE, "#ffffff", ORANGE])
WIDEST = 0.3


def populations(trees: Trees) -> Iterator[tuple[str, str, Trees, pd.Index]]:
    """Yield split, backbone (then "all"), the trees of that backbone of any split, and the instances of the split."""
    for split, group in trees.instances.groupby("split"):
        for backbone in sorted(set(group.backbone)):
            here = trees.where(trees.instances.backbone == backbone)
            yield split, backbone, here, group.index[group.backbone == backbone]
        yield split, ALL, trees, group.index


def at(ends: pd.DataFrame, instances: pd.Index | pd.Series) -> pd.DataFrame:
    """Return the ends of some instances."""
    return ends[ends.instance.isin(instances)]


def everywhere(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows once by their backbone and once more under "all"."""
    return pd.concat([frame, frame.assign(backbone=ALL)], ignore_index=True)


# ---------------------------------------------------------------------------------------------- value of adaptivity


@lru_cache(maxsize=4)
def adaptivity(trees: Trees) -> pd.DataFrame:
    """Return V = mean_i max_s R(i, s) - max_s mean_i R(i, s) with both of its parts, by `measure` and `quantity`.

    In hindsight both maxima are taken on the test items themselves, so chance adds to V. Without bias the schedule of
    an instance is chosen on its dev items and the fixed one on other instances: chance adds nothing, and V is what dev
    can tell. Where instances are few and of two minds, those left over outvote the one left out, so V is also given
    against the fixed schedule that is best in hindsight, where it is rather too small ("at least"). R is test success,
    or that times retention.
    """
    rows = []
    for split, backbone, here, instances in populations(trees):
        for measure, value in MEASURES.items():
            for kind, pair in choices(here, instances, value).items():
                for part, interval in value_of(here, *pair, value == "retained").items():
                    numbers = (interval.mean, interval.low, interval.high, interval.n)
                    rows.append((split, backbone, measure, f"{part}, {kind}", *numbers))
    return pd.DataFrame(rows, columns=[*GROUP, "measure", "quantity", *ESTIMATE])


def choices(
    trees: Trees, instances: pd.Index, value: str
) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Return for each way of choosing (the best schedule of each instance, the best fixed one) as ends."""
    # in hindsight the fixed schedule is chosen on the very instances
    fixed = ends_of(chosen(by_schedule(trees, value), [(instances, instances)]))
    others = at(best_fixed(trees, value), instances)
    on_dev = at(chosen_on_dev(trees), instances)
    return {
        "in hindsight": (at(hindsight(trees, value), instances), fixed),
        # an instance without others to choose on has no fixed schedule
        "without bias": (at(on_dev, others.instance), others),
        "at least": (on_dev, fixed),
    }


def value_of(
    trees: Trees, own: pd.DataFrame, fixed: pd.DataFrame, retained: bool
) -> dict[str, Interval]:
    """Return the intervals of V and of its two parts."""
    levels = {"best of each instance": own, "best fixed": fixed}
    return {
        "V": estimate(difference(trees, own, fixed, retained), DIFFERENCE),
        **{
            name: estimate(difference(trees, ends, None, retained, SHARE), SHARE)
            for name, ends in levels.items()
        },
    }


# ---------------------------------------------------------------------------------------------- routers


@lru_cache(maxsize=4)
def regrets(trees: Trees) -> pd.DataFrame:
    """Return the regret of every router in test success, by `measure` (REGRETS)."""
    if trees.instances.empty:
        return pd.DataFrame(columns=[*GROUP, "router", "measure", *ESTIMATE])
    everything = routed(trees)
    parts = []
    for name in ROUTERS:
        ends = everything[everything.router == name]
        affordable = ends.assign(schedule=ends.affordable)
        rivals = (hindsight(trees), affordable, chosen_on_dev(trees))
        for measure, rival in zip(REGRETS, rivals, strict=True):
            parts.append(difference(trees, rival, ends).assign(router=name, measure=measure))
    by = [*GROUP, "router", "measure"]
    frame = estimates(everywhere(pd.concat(parts)), by, DIFFERENCE)
    order = list(ROUTERS).index
    return frame.sort_values("router", key=lambda name: name.map(order), kind="stable")


def fixed_schedules(trees: Trees) -> pd.DataFrame:
    """Return the regret of every schedule of full depth in test success, the least over all backbones first."""
    if trees.instances.empty:
        return pd.DataFrame(columns=[*GROUP, "schedule", *ESTIMATE])
    ends = begun(trees).assign(weight=1.0)
    parts = [
        difference(trees, at(hindsight(trees), group.instance), group).assign(schedule=schedule)
        for schedule, group in ends.groupby("schedule")
    ]
    frame = estimates(everywhere(pd.concat(parts)), [*GROUP, "schedule"], DIFFERENCE)
    pooled = frame[frame.backbone == ALL].groupby("schedule")["mean"].mean()
    return frame.sort_values("schedule", key=lambda name: name.map(pooled), kind="stable")


def spending(trees: Trees) -> pd.DataFrame:
    """Return mean test success, success x retention, moves, tokens and seconds of every router."""
    columns = ["test", "retained", *COSTS]
    if trees.instances.empty:
        return pd.DataFrame(columns=[*GROUP, "router", *columns])
    everything = routed(trees)
    # of an instance first: a coin has many ends
    weighted = everything[columns].astype(float).mul(everything.weight, axis=0)
    runs = everything[[*GROUP, "router", "instance"]].join(weighted)
    runs = (
        runs.groupby([*GROUP, "router", "instance"], sort=False)[columns]
        .sum(min_count=1)
        .reset_index()
    )
    means = everywhere(runs).groupby([*GROUP, "router"], sort=False)[columns].mean()
    return means.reset_index()


def between(trees: Trees, a: str, b: str) -> pd.DataFrame:
    """Return test success of router `a` minus that of `b` per instance."""
    return difference(trees, ends_by(trees, a), ends_by(trees, b))


# ---------------------------------------------------------------------------------------------- the signal


@lru_cache(maxsize=4)
def signal_test(trees: Trees) -> pd.DataFrame:
    """Return how well each cue tells at an inner node that S is the better next move, by moves made (`after`).

    The label is the sign of the best test success below the S child minus that below the N child; nodes where both are
    equal say nothing. The estimate is the AUROC at a fixed number of moves, or, for all numbers, its mean over them
    by pairs of nodes; only the move number itself is scored across them.
    """
    columns = [*GROUP, "after", "cue", *ESTIMATE]
    if trees.instances.empty:
        return pd.DataFrame(columns=columns)
    cues = cues_of(trees)
    cues = cues[cues.prefers.abs() > 1e-9]
    rows = []
    for split, backbone, _, instances in populations(trees):
        here = cues[cues.instance.isin(instances)]
        for after in [*sorted(set(here.moves)), ALL]:
            nodes = here if after == ALL else here[here.moves == after]
            for cue, group in nodes.groupby("cue", sort=False):
                strata = np.zeros(len(group)) if cue == MOVE_NUMBER else group.moves
                area = stats.clustered_area(group.prefers > 0, group.score, group.instance, strata)
                if not np.isnan(area.mean):
                    numbers = (area.mean, area.low, area.high, area.n)
                    rows.append((split, backbone, str(after), cue, *numbers))
    return pd.DataFrame(rows, columns=columns)


def by_moves(trees: Trees) -> pd.DataFrame:
    """Return the rows of `signal_test` at a fixed number of moves, for `cue_dots`."""
    frame = signal_test(trees)
    # which says nothing there
    frame = frame[(frame.after != ALL) & (frame.cue != MOVE_NUMBER)]
    return frame.assign(row=frame.split + ", moves made: " + frame.after)


@styled
def cue_dots(frame: pd.DataFrame) -> Figure:
    """Draw areas and intervals (`by_moves`), with a line where a cue says nothing."""
    fig = dots(frame, "AUROC, percent", "cue")
    for ax in fig.axes:
        ax.axvline(0.5, color="#cccccc", lw=1, zorder=0)
    return fig


def cues_of(trees: Trees) -> pd.DataFrame:
    """Return every inner node once per cue that is known there, its `score` high where the cue says S.

    A loss that falls no more (C1), a small gradient (C2), edits that still gain, dev that rose with S or did not rise
    with N (in success, or in how likely its gold answers are), and more examples in need of style than of content, by
    each estimator. The move number says S early.
    """
    nodes = inner_nodes(trees)
    scores = {
        "C1": nodes.c1,
        "C2, reversed": -nodes.c2,
        "gain of edits": nodes.gain,
        "dev plateau": (-nodes.kind * nodes.rise).where(nodes.moves > 0),
        "dev NLL plateau": (-nodes.kind * nodes.fall).where(nodes.moves > 0),
        MOVE_NUMBER: -nodes.moves,
    }
    for name in estimators(trees):
        seen = inner_nodes(trees, name)
        scores[f"needs ({name})"] = seen["style"] - seen["content"]
    kept = nodes[["instance", "moves", "prefers"]]
    parts = [kept.assign(cue=cue, score=score.astype(float)) for cue, score in scores.items()]
    return pd.concat(parts, ignore_index=True).dropna(subset="score")


def estimators(trees: Trees) -> list[str]:
    """Return the estimators of needs that the nodes have."""
    names = [name.split(".") for name in trees.nodes if name.startswith("needs.")]
    return sorted({name[1] for name in names})


# ---------------------------------------------------------------------------------------------- the map


def first_moves(trees: Trees, by: Sequence[str] = ("family", "style")) -> pd.DataFrame:
    """Return what beginning with S brings over beginning with N in test success, per backbone and share of `style`.

    Each time with the continuation that is best on dev; a negative number is what beginning with the prompt costs.
    `style` is the share of needs that are of style, `follows` how far the backbone follows prompts, and `first` the
    move to begin with: either, where the interval has 0 inside.
    """
    if trees.instances.empty:
        return pd.DataFrame(columns=[*GROUP, *by, *ESTIMATE, "follows", "first"])
    prompt, weights = (chosen_on_dev(trees, letter) for letter in "SN")
    frame = difference(trees, prompt, weights).join(style_share(trees), on="instance")
    rows = estimates(frame, [*GROUP, *by], DIFFERENCE)
    follows = trees.instances.astype({"follows": float}).groupby(GROUP).follows.mean()
    first = np.select([rows.low > 0, rows.high < 0], ["prompt", "weights"], "either")
    return rows.join(follows, on=GROUP).assign(first=first)


def style_share(trees: Trees) -> pd.Series:
    """Return by instance the share of needs that are of style; an item that needs both counts for both."""
    shares = trees.instances[list(NEEDS)].astype(float)
    style = (shares["style"] + shares.both) / (shares.sum(axis=1) + shares.both)
    # shares of the same family are equal to the last bit
    return style.round(2).rename("style")


@styled
def first_move_map(frame: pd.DataFrame) -> Figure:
    """Draw `first_moves` by share of style needs: a circle per backbone and share, orange where the prompt comes first.

    Backbones lie in the order of how far they follow prompts; a circle has a dark edge where its interval leaves out 0.
    """
    frame = frame.sort_values("follows", kind="stable")
    # a row per backbone, from the one that follows no prompt up
    names = list(dict.fromkeys(frame.backbone))
    labels = [
        f"{name}\nfollows {100 * follows:.0f}%"
        for name, follows in frame.groupby("backbone", sort=False).follows.mean().items()
    ]
    fig = Figure(
        figsize=(PAGE, 1.1 + 0.62 * len(names) * frame.split.nunique()), layout="constrained"
    )
    for ax, here in panels(fig, frame, "split", sharex=True):
        y = here.backbone.map(names.index)
        colours = MAP((here["mean"].clip(-WIDEST, WIDEST) / WIDEST + 1) / 2)
        edges = np.where(here["first"] == "either", "#cccccc", INK)
        ax.scatter(here["style"], y, s=620, c=colours, edgecolors=edges)
        for row in here.assign(y=y).itertuples():
            text = f"{round(100 * row.mean):+d}\nn={row.n}"
            ax.text(row.style, row.y, text, ha="center", va="center", fontsize=6.5)
        ax.set_yticks(range(len(names)), labels)
        ax.set(xlim=(-0.09, 1.09), ylim=(-0.6, len(names) - 0.4), xticks=np.linspace(0, 1, 5))
        in_percent(ax.xaxis)
    fig.supxlabel("needs that are of style rather than of content, percent", fontsize=8)
    kinds = {"rewrite the prompt first": MAP(1.0), "tune the weights first": MAP(0.0)}
    marks = [Line2D([], [], color=colour, marker="o", ls="", ms=6) for colour in kinds.values()]
    fig.legend(marks, list(kinds), loc="outside upper right", ncols=2, handletextpad=0.1)
    return fig
