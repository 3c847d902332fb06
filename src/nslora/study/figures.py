"""Figures of tidy frames, at the width of a paper's column or page, the same bytes every time.

Weights are blue and prompts orange throughout; the neurosymbolic method is green and everything else grey.
"""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

import html
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter
from pandas import DataFrame

from nslora.runs.store import write_json, write_text

# seaborn's colorblind palette
BLUE, ORANGE, GREEN, SKY = "#0173b2", "#d55e00", "#029e73", "#56b4e9"
GREY, INK = "#9a9a9a", "#222222"
COLOURS = {
    "lora": SKY,
    "lora-remade": BLUE,
    "textgrad": ORANGE,
    # of the stream, which has neither lora nor textgrad
    "fixed:NN": SKY,
    "fixed:SS": ORANGE,
    "neurosymbolic": GREEN,
    "numerical": BLUE,
    "symbolic": ORANGE,
}
MOVES = {"start": "start", "numerical": "weights (LoRA)", "symbolic": "prompt (TextGrad)"}
# inches
PAGE = 6.9
STYLE: dict[str, Any] = {
    **sns.axes_style("ticks"),
    **sns.plotting_context("paper", font_scale=0.85),
    "font.family": "DejaVu Sans",
    "pdf.fonttype": 42,
    "savefig.dpi": 150,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "figure.constrained_layout.use": True,
    "figure.labelsize": 8,
    "legend.frameon": False,
}
# As a decorator: draw under STYLE, leave the caller's settings alone.
styled = mpl.rc_context(STYLE)

# How seaborn draws intervals that are known already: of the three rows of `spread` the middle and the range.
INTERVAL: dict[str, Any] = {"estimator": "median", "errorbar": ("pi", 100)}
POINT: dict[str, Any] = {"markersize": 4, "linestyle": "none", "err_kws": {"linewidth": 1.5}}

# how numbers are written: the same bytes on every machine
CSV: dict[str, Any] = {"index": False, "float_format": "%.6g", "lineterminator": "\n"}

# (op, token) pairs, op one of "=", "-", "+"
Diff = Sequence[Sequence[str]]


def palette(names: Sequence[str]) -> dict[str, str]:
    """Return the colour of each method, grey where it has none of its own."""
    return {name: COLOURS.get(name, GREY) for name in names}


def spread(frame: DataFrame) -> DataFrame:
    """Return three rows per estimate, its low end, mean and high end as `share`, for seaborn to draw under INTERVAL."""
    others = [name for name in frame if name not in ("low", "mean", "high")]
    return frame.melt(others, ["low", "mean", "high"], value_name="share")


def panels(
    fig: Figure, frame: DataFrame, row: str = "", column: str = "", **shape: Any
) -> Iterator[tuple[Axes, DataFrame]]:
    """Yield an axes and its rows of the frame for each value of one or two columns, the outer panels labelled.

    `shape` goes to `Figure.subplots`.
    """
    rows = list(frame[row].unique()) if row else [""]
    columns = list(frame[column].unique()) if column else [""]
    axes = fig.subplots(
        len(rows),
        len(columns),
        squeeze=False,
        **shape,
    )
    for (i, j), ax in np.ndenumerate(axes):
        here = frame[frame[row] == rows[i]] if row else frame
        here = here[here[column] == columns[j]] if column else here
        yield ax, here
        # a name is wider than one of many panels
        title = textwrap.fill(columns[j], 14 if len(columns) > 3 else 99)
        ax.set(
            xlabel="",
            ylabel="",
            title=title if i == 0 else "",
        )
        if j == 0:
            ax.set_ylabel(textwrap.fill(rows[i], 12), fontweight="bold")


def in_percent(axis: Axis) -> None:
    """Label an axis of shares in percent."""
    axis.set_major_formatter(PercentFormatter(1, symbol=""))


def legend_outside(fig: Figure, columns: int = 4) -> None:
    """Replace the legends of the panels by one above all of them, each label once."""
    entries = {}
    for ax in fig.axes:
        if legend := ax.get_legend():
            labels = [text.get_text() for text in legend.get_texts()]
            entries |= dict(zip(labels, legend.legend_handles, strict=True))
            legend.remove()
    fig.legend(
        list(entries.values()),
        list(entries),
        loc="outside upper right",
        ncols=columns,
    )


@styled
def save_figure(
    fig: Figure | None, frame: DataFrame, stem: Path, meta: dict[str, Any]
) -> list[Path]:
    """Write `stem`.pdf and .png, the numbers shown as .csv, and a .json that says what they are; returns the paths.

    Without a figure only the numbers and what they are.
    """
    paths = [stem.with_suffix(suffix) for suffix in (".csv", ".json", ".pdf", ".png")]
    write_text(paths[0], frame.to_csv(**CSV))
    write_json(paths[1], meta)
    if fig is None:
        return paths[:2]
    # without dates, so that the same numbers are the same bytes
    fig.savefig(paths[2], metadata={"CreationDate": None, "Producer": None, "Creator": None})
    fig.savefig(paths[3], metadata={"Software": None})
    return paths


@styled
def dots(frame: DataFrame, xlabel: str, y: str = "method") -> Figure:
    """Draw a point and an interval per value of `y`, panels in rows by `row` and in columns by backbone.

    `frame` has columns row, backbone, mean, low, high (shares, shown in percent) and the one that `y` names.
    """
    frame = frame.sort_values("backbone", kind="stable").reset_index(drop=True)
    # a row of panels is as high as it has names
    rows = frame.groupby("row", sort=False)[y].nunique()
    frame = frame.sort_values("row", key=lambda row: row.map(list(rows.index).index), kind="stable")
    heights = (0.45 + 0.15 * rows).clip(lower=0.9)
    size = (min(PAGE, 1.4 + 2.4 * frame.backbone.nunique()), 0.6 + heights.sum())
    fig = Figure(figsize=size)
    shape = {"sharex": True, "sharey": "row", "height_ratios": list(heights)}
    for ax, here in panels(fig, frame, "row", "backbone", **shape):
        names = list(frame[frame.row.isin(here.row)][y].unique())
        colours = palette(names) if y == "method" else dict.fromkeys(names, GREEN)
        hues = {"hue": y, "order": names, "hue_order": names, "palette": colours, "legend": False}
        sns.pointplot(
            spread(here),
            x="share",
            y=y,
            ax=ax,
            **INTERVAL,
            **hues,
            **POINT,
        )
        in_percent(ax.xaxis)
        ax.grid(axis="y", color="#eeeeee")
        ax.tick_params(axis="y", length=0)
    if frame["low"].min() < 0:
        # a change, to be read from zero
        for ax in fig.axes:
            ax.axvline(0, color="#cccccc", lw=1, zorder=0)
    fig.supxlabel(xlabel)
    fig.align_ylabels()
    return fig


def draw_lines(ax: Axes, here: DataFrame, x: str, **more: Any) -> None:
    """Draw a line with its interval for each method that has a colour, thin grey ones for all others."""
    ours = here.method.isin(list(COLOURS))
    if not ours.all():
        thin = {"units": "method", "estimator": None, "color": GREY, "lw": 0.7}
        sns.lineplot(
            here[~ours],
            x=x,
            y="mean",
            label="other methods",
            ax=ax,
            **thin,
        )
    # in the order of the frame
    names = list(dict.fromkeys(here[ours].method))
    hues = {"hue": "method", "hue_order": names, "palette": palette(names)}
    sns.lineplot(
        spread(here[ours]),
        x=x,
        y="share",
        ax=ax,
        **INTERVAL,
        **hues,
        **more,
    )


def draw_moves(ax: Axes, steps: DataFrame, column: str) -> None:
    """Draw a line of `column` over the moves, marks coloured by the kind of move, dotted where the kind changes."""
    # a move of the other kind has no loss or signal of this one
    shown = steps[np.isfinite(steps[column].astype(float))]
    ax.plot(
        shown.step,
        shown[column],
        color="#bbbbbb",
        lw=1,
        zorder=1,
    )
    colours = [COLOURS.get(move, INK) for move in shown.move]
    ax.scatter(
        shown.step,
        shown[column],
        c=colours,
        s=20,
        zorder=3,
        clip_on=False,
    )
    moves = steps[steps.step > 0]
    changed = moves.step[moves.move != moves.move.shift()]
    for step in changed.iloc[1:]:
        ax.axvline(step - 0.5, color="#888888", lw=0.7, ls=":")
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def name_moves(fig: Figure, moves: Sequence[str]) -> None:
    """Write a legend of the kinds of move that occur, above the panels."""
    kinds = [kind for kind in MOVES if kind in moves]
    dot = {"marker": "o", "ls": "", "ms": 4}
    marks = [Line2D([], [], color=COLOURS.get(kind, INK), **dot) for kind in kinds]
    names = [MOVES[kind] for kind in kinds]
    fig.legend(marks, names, loc="outside upper right", ncols=3, handletextpad=0.1)


def prompt_diff_html(diff: Diff) -> str:
    """Return the diff as an HTML paragraph, escaped: added text in <ins>, removed text in <del>."""
    tags = {"+": "<ins>{}</ins>", "-": "<del>{}</del>"}
    parts = [tags.get(op, "{}").format(html.escape(token)) for op, token in diff]
    return f'<p style="white-space: pre-wrap">{"".join(parts)}</p>'


@styled
def run_picture(steps: DataFrame) -> Figure:
    """Draw one run at a glance: dev reward and training loss per move, coloured by the kind of move.

    `steps` has columns step, move, value, content, style, loss.
    """
    fig = Figure(figsize=(PAGE, 2.2))
    reward, loss = fig.subplots(1, 2, sharex=True)
    draw_moves(reward, steps, "value")
    for part, dashes in (("content", "-"), ("style", "--")):
        reward.plot(
            steps.step,
            steps[part],
            color="#bbbbbb",
            ls=dashes,
            zorder=0,
            label=part,
        )
    reward.legend(loc="lower right")
    reward.set(ylim=(-0.02, 1.05), xlabel="move", title="dev reward")
    draw_moves(loss, steps, "loss")
    loss.set(xlabel="move", title="training loss, nats per token")
    name_moves(fig, list(steps.move))
    return fig
