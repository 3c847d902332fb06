"""A playground: thresholds as sliders, and at once the path that they choose in a tree and what it loses.

from nslora.study.schedules import load, playground

playground.sliders(load())
"""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ipywidgets
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nslora.algorithm.router import DECISIONS
from nslora.config import METHODS, RunConfig
from nslora.study.figures import BLUE, INK, ORANGE, PAGE, in_percent, styled
from nslora.study.schedules.trees import Trees, decided, highest, scored

# methods to choose from; a slider that one of them does not use changes nothing
METHODS_TO_TRY = ("neurosymbolic", "numerical-first", "monitor", "needs-only", "oracle")
# of each slider: the least and greatest value, and a step
THRESHOLDS = {
    "c1_eps": (0.0, 1.0, 0.05),
    "c2_eps": (0.0, 3.0, 0.1),
    "gain_eps": (0.0, 0.5, 0.01),
    "follows_floor": (0.0, 1.0, 0.05),
}
COUNTS = {"patience": (1, 3), "reserve": (0, 3)}
# height of a schedule's name, as a share of the axis
LINE = 0.06
COLOUR = {"N": BLUE, "S": ORANGE}


def followed(trees: Trees, method: str = "neurosymbolic", **settings: Any) -> pd.DataFrame:
    """Return what the decision of a method makes of each instance under `settings`, as `trees.scored` has it."""
    row = METHODS[method]
    return scored(trees, decided(DECISIONS[row.decision], trees, row.needs, **settings))


def swept(trees: Trees, method: str, threshold: str, values: Sequence[float]) -> pd.DataFrame:
    """Return for each value of a threshold and each instance the path that is taken, and what it loses."""
    lost = [
        followed(trees, method, **{threshold: value}).assign(**{threshold: value})
        for value in values
    ]
    return pd.concat(lost)[[threshold, "instance", "schedule", "test", "regret"]]


@styled
def picture(trees: Trees, instance: str, method: str = "neurosymbolic", **settings: Any) -> Figure:
    """Draw a tree by moves and test success, with the path that a decision takes under `settings`.

    Blue edges are numerical moves, orange ones symbolic; the path is thick, and what its run returns has a ring. The
    star is the best schedule in hindsight.
    """
    routed = followed(trees, method, **settings)
    here = routed.set_index("instance").loc[instance]
    nodes = trees.nodes.loc[instance]
    fig = Figure(figsize=(PAGE, 3.1), layout="constrained")
    ax = fig.subplots()
    draw_edges(ax, nodes, here.schedule)
    (best,) = highest(trees.nodes.loc[[instance]], "test").schedule.head(1)
    for schedule, marker, size in ((here.returned, "o", 130), (best, "*", 150)):
        node = nodes.loc[schedule]
        ax.scatter(
            node.moves, node["test.success"], size, marker=marker, ec=INK, fc="none", zorder=3
        )
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set(xlabel="moves", ylabel="test success, percent", ylim=(-0.04, 1.04))
    in_percent(ax.yaxis)
    name = here.schedule or "no move"
    ax.set_title(
        f"{method}: {name}, {100 * here.regret:.0f} points below the best; "
        f"{100 * routed.regret.mean():.1f} in the mean of all instances",
        fontsize=8,
    )
    marks = [Line2D([], [], color=colour, lw=2) for colour in COLOUR.values()]
    fig.legend(marks, ["weights", "prompt"], loc="outside upper right", ncols=2)
    return fig


def draw_edges(ax: Axes, nodes: pd.DataFrame, path: str) -> None:
    """Draw the moves of a tree, those of `path` thick and the others pale, and name its whole schedules."""
    for schedule, node in nodes.iterrows():
        if not schedule:
            continue
        parent = nodes.loc[schedule[:-1]]
        taken = path.startswith(schedule)
        ax.plot(
            [parent.moves, node.moves],
            [parent["test.success"], node["test.success"]],
            color=COLOUR[schedule[-1]],
            lw=2.5 if taken else 0.9,
            alpha=1.0 if taken else 0.35,
        )
    leaves = nodes[nodes.moves == nodes.moves.max()].sort_values("test.success")
    height = -1.0
    for schedule, value in leaves["test.success"].items():
        # equal ones above each other
        height = max(height + LINE, value)
        weight = "bold" if schedule == path else "normal"
        place = (leaves.moves.max() + 0.06, height)
        ax.text(*place, schedule, fontsize=6.5, va="center", weight=weight)


def sliders(trees: Trees) -> ipywidgets.Widget:
    """Return sliders of the thresholds of a decision, with the picture of an instance under them."""
    defaults = RunConfig()
    controls: dict[str, Any] = {
        "instance": ipywidgets.Dropdown(options=list(trees.instances.index)),
        "method": ipywidgets.Dropdown(options=METHODS_TO_TRY),
    }
    for name, (low, high, by) in THRESHOLDS.items():
        value = getattr(defaults, name)
        controls[name] = ipywidgets.FloatSlider(value, min=low, max=high, step=by)
    for name, (low, high) in COUNTS.items():
        controls[name] = ipywidgets.IntSlider(getattr(defaults, name), min=low, max=high)
    for name, control in controls.items():
        control.description = name

    def draw(instance: str, method: str, **settings: Any) -> Figure:
        return picture(trees, instance, method, **settings)

    return ipywidgets.interactive(draw, **controls)
