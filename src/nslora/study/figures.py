"""Figures of tidy frames, at the width of a paper's column or page, the same bytes every time.

Weights are blue and prompts orange throughout; the neurosymbolic method is green and everything else grey.
"""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

import html
import json
import re
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nslora.config import METHODS

BLUE, ORANGE, GREEN, GREY, INK = (
    "#0173b2",
    "#d55e00",
    "#029e73",
    "#9a9a9a",
    "#222222",
)  # seaborn's colorblind
COLOURS = {
    "lora": BLUE,
    "textgrad": ORANGE,
    "neurosymbolic": GREEN,
    "numerical": BLUE,
    "symbolic": ORANGE,
}
MOVES = {"numerical": "weights (LoRA)", "symbolic": "prompt (TextGrad)", "stop": "start"}
PAGE = 6.9  # inches
MONO: dict[str, Any] = {"family": "DejaVu Sans Mono", "size": 7}
LINE = int(
    (PAGE - 0.2) * 72 / (0.602 * MONO["size"])
)  # characters across a page; 0.602 em is the font's advance
STYLE: dict[str, Any] = {
    **sns.axes_style("ticks"),
    "font.size": 8,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "font.family": "DejaVu Sans",
    "pdf.fonttype": 42,
    "savefig.dpi": 200,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "lines.linewidth": 1.3,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
}
styled = mpl.rc_context(
    STYLE
)  # as a decorator: draw under STYLE, leave the caller's settings alone

Diff = Sequence[Sequence[str]]  # (op, token) pairs, op one of "=", "-", "+"


@styled
def save_figure(
    fig: Figure | None, frame: pd.DataFrame, stem: Path, meta: dict[str, Any]
) -> list[Path]:
    """Write `stem`.pdf and .png, the numbers shown as .csv, and a .json that says what they are; returns the paths.

    Without a figure only the numbers and what they are.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = [stem.with_suffix(suffix) for suffix in (".csv", ".json", ".pdf", ".png")]
    frame.to_csv(paths[0], index=False, float_format="%.6g", lineterminator="\n")
    paths[1].write_text(json.dumps(meta, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if fig is None:
        return paths[:2]
    fig.savefig(paths[2], metadata={"CreationDate": None, "Producer": None, "Creator": None})
    fig.savefig(paths[3], metadata={"Software": None})
    return paths


@styled
def gain_matrix(gains: pd.DataFrame) -> Figure:
    """Heat map per backbone: tasks by methods, gain over frozen in points, with half-widths of the intervals.

    `gains` has columns task, backbone, method, mean, half (shares).
    """
    backbones, methods = sorted(set(gains.backbone)), [m for m in METHODS if m in set(gains.method)]
    rows = gains.task.nunique()
    fig = Figure(
        figsize=(min(PAGE, 0.9 + 2.5 * len(backbones)), 0.8 + 0.55 * rows), layout="constrained"
    )
    axes = fig.subplots(1, len(backbones), squeeze=False, sharey=True)[0]
    for ax, backbone in zip(axes, backbones, strict=True):
        here = gains[gains.backbone == backbone].set_index(["task", "method"])
        means = 100 * here["mean"].unstack().reindex(index=gains.task.unique(), columns=methods)
        halves = 100 * here["half"].unstack().reindex_like(means)
        ax.pcolormesh(means, cmap="PRGn", vmin=-100, vmax=100, edgecolors="white", linewidth=1.5)
        for (y, x), mean in np.ndenumerate(means.to_numpy()):
            colour = "white" if abs(mean) > 65 else INK
            text = cell_text(mean, halves.iloc[y, x])
            ax.text(x + 0.5, y + 0.5, text, color=colour, ha="center", va="center", size=7.5)
        ax.set(title=backbone, ylim=(len(means), 0))
        ax.set_xticks(np.arange(len(methods)) + 0.5, methods)
        ax.set_yticks(np.arange(len(means)) + 0.5, means.index)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    fig.supxlabel("gain in test success over the frozen backbone, points", fontsize=8)
    return fig


def cell_text(mean: float, half: float) -> str:
    """Text of one heat-map cell, values in points."""
    if np.isnan(mean):
        return ""
    return f"{mean:+.0f}" + ("" if np.isnan(half) else f" ± {half:.0f}")


@styled
def dots(frame: pd.DataFrame, xlabel: str) -> Figure:
    """Grid of dot plots, rows by `row` and columns by backbone: a point and an interval per method.

    `frame` has columns row, backbone, method, mean, low, high (shares, shown in percent).
    """
    backbones, known = sorted(set(frame.backbone)), {m: i for i, m in enumerate(METHODS)}
    methods = {
        row: sorted(set(group.method), key=known.__getitem__)
        for row, group in frame.groupby("row", sort=False)
    }
    heights = [0.45 + 0.15 * len(names) for names in methods.values()]
    fig = Figure(
        figsize=(min(PAGE, 1.4 + 2.4 * len(backbones)), 0.5 + sum(heights)), layout="constrained"
    )
    shape = {"sharex": True, "sharey": "row", "height_ratios": heights}
    axes = fig.subplots(len(methods), len(backbones), squeeze=False, **shape)
    for (i, j), ax in np.ndenumerate(axes):
        row, names = list(methods.items())[i]
        here = (
            frame[(frame.row == row) & (frame.backbone == backbones[j])]
            .set_index("method")
            .reindex(names)
        )
        for y, (method, dot) in enumerate(here.iterrows()):
            colour = COLOURS.get(str(method), GREY)
            ax.plot(
                [100 * dot.low, 100 * dot.high],
                [y, y],
                color=colour,
                lw=1.6,
                alpha=0.7,
                solid_capstyle="butt",
            )
            ax.plot(100 * dot["mean"], y, "o", color=colour, ms=4.5)
        ax.set(
            yticks=range(len(names)),
            yticklabels=names,
            ylim=(len(names) - 0.4, -0.6),
            xlim=(-3, 103),
        )
        ax.set(title=backbones[j] if i == 0 else "")
        ax.grid(axis="y", color="#eeeeee")
        ax.tick_params(axis="y", length=0)
        if j == 0:
            ax.set_ylabel(textwrap.fill(row, 12), fontweight="bold")
    fig.supxlabel(xlabel, fontsize=8)
    fig.align_ylabels()
    return fig


@styled
def cost_curves(curves: pd.DataFrame) -> Figure:
    """Best dev reward so far against moves, tokens and seconds, one row of panels per backbone.

    `curves` has columns backbone, method, move, mean, low, high, tokens, seconds.
    """
    backbones, units = (
        curves.backbone.unique(),
        {"move": "moves", "tokens": "thousand tokens", "seconds": "seconds"},
    )
    fig = Figure(figsize=(PAGE, 0.5 + 1.75 * len(backbones)), layout="constrained")
    axes = fig.subplots(len(backbones), len(units), squeeze=False, sharey="row", sharex="col")
    for (i, j), ax in np.ndenumerate(axes):
        unit, ends = list(units)[j], {}
        for method, line in curves[curves.backbone == backbones[i]].groupby("method"):
            x, colour = line[unit] / (1000 if unit == "tokens" else 1), COLOURS.get(str(method))
            ax.plot(
                x,
                line["mean"],
                color=colour or GREY,
                lw=1.6 if colour else 0.8,
                zorder=3 if colour else 1,
            )
            name = method if colour else "other methods"  # labelled once, at the highest of them
            ends[name] = max(line["mean"].iloc[-1], ends.get(name, 0.0))
            if colour:
                ax.fill_between(
                    x, line.low.clip(0, 1), line.high.clip(0, 1), color=colour, alpha=0.12, lw=0
                )
        ax.set(xlabel=units[unit] if i == len(backbones) - 1 else "", ylim=(0, 1.02))
        if j == 0:
            ax.set(ylabel="best dev reward so far")
            ax.set_title(backbones[i])
        if j == len(units) - 1:
            label_ends(ax, ends)
    return fig


def label_ends(ax: Axes, ends: dict[Any, float], gap: float = 0.1) -> None:
    """Write names at the right edge at the heights `ends`, pushed apart to at least `gap`."""
    heights = sorted(ends, key=lambda name: ends[name])
    ys = np.array([ends[name] for name in heights])
    for k in range(1, len(ys)):
        ys[k] = max(ys[k], ys[k - 1] + gap)
    ys -= max(0.0, (ys[-1] if len(ys) else 0) - 1)
    for name, y in zip(heights, ys, strict=True):
        place = ax.get_yaxis_transform()
        ax.text(
            1.03,
            y,
            str(name),
            transform=place,
            color=COLOURS.get(name, "#666666"),
            fontsize=7,
            va="center",
        )


def draw_moves(ax: Axes, steps: pd.DataFrame, column: str) -> None:
    """A line of `column` over the moves, markers coloured by the kind of move, a dotted line where the kind changes."""
    known = steps[steps[column].notna() & np.isfinite(steps[column].astype(float))]
    ax.plot(known.step, known[column], color="#bbbbbb", lw=1, zorder=1)
    colours = [COLOURS.get(move, INK) for move in known.move]
    ax.scatter(known.step, known[column], c=colours, s=20, zorder=3, clip_on=False)
    taken = steps[steps.step > 0]
    for step in taken.step[taken.move != taken.move.shift()].iloc[1:]:
        ax.axvline(step - 0.5, color="#888888", lw=0.7, ls=":")
    ax.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))


def name_moves(fig: Figure | SubFigure, moves: Sequence[str]) -> None:
    """A legend of the move kinds that occur, above the panels."""
    kinds = [kind for kind in ("stop", "numerical", "symbolic") if kind in moves]
    marks = [
        Line2D([], [], marker="o", ls="", ms=4, color=COLOURS.get(kind, INK)) for kind in kinds
    ]
    names = [MOVES[kind] for kind in kinds]
    fig.legend(
        marks,
        names,
        loc="outside upper right",
        ncols=3,
        frameon=False,
        fontsize=7,
        handletextpad=0.1,
    )


@styled
def signal_traces(traces: pd.DataFrame) -> Figure:
    """Dev reward, C1 and C2 over one run per backbone, with thresholds (dashed) and switch points (dotted).

    `traces` has columns backbone, step, move, value, c1, c2, c1_eps, c2_eps.
    """
    backbones = traces.backbone.unique()
    rows = {"value": "dev reward", "c1": "C1, relative\nchange of loss", "c2": "C2, gradient\nnorm"}
    fig = Figure(figsize=(min(PAGE, 1.0 + 2.4 * len(backbones)), 4.0), layout="constrained")
    axes = fig.subplots(len(rows), len(backbones), squeeze=False, sharex="col", sharey="row")
    for (i, j), ax in np.ndenumerate(axes):
        run, column = traces[traces.backbone == backbones[j]], list(rows)[i]
        draw_moves(ax, run, column)
        if column != "value":
            limit = run.c2_eps.iloc[0] if column == "c2" else -run.c1_eps.iloc[0]
            ax.axhline(limit, color=INK, lw=0.8, ls="--")
        ax.set(
            ylabel=rows[column] if j == 0 else "",
            xlabel="move" if i == 2 else "",
            title=backbones[j] if i == 0 else "",
        )
        if column == "value":
            ax.set_ylim(0, 1.02)
        elif column == "c2":
            ax.set_ylim(bottom=0)
    name_moves(fig, list(traces.move))
    fig.align_ylabels()
    return fig


def lay_out(diff: Diff, columns: int = LINE) -> list[tuple[int, int, str, str]]:
    """Wrap a diff at `columns` characters: (line, column, op, text) of each piece."""
    pieces, line, column = [], 0, 0
    for op, token in (
        (op, part) for op, text in diff for part in re.findall(r"\n|[^\S\n]+|\S+", text)
    ):
        if token == "\n" or (column + len(token) > columns and column > 0):
            line, column = line + 1, 0
        for start in range(0, 0 if token.isspace() and column == 0 else len(token), columns):
            text = token[start : start + columns]
            line, column = (line, column) if start == 0 else (line + 1, 0)
            pieces.append((line, column, op, text))
            column += len(text)
    return pieces


def draw_diff(fig: Figure | SubFigure, box: Sequence[float], diff: Diff, title: str) -> None:
    """Write a diff into a box (left, bottom, width, height): added text orange, removed text grey and struck out."""
    ax, pieces = fig.add_axes(tuple(box)), lay_out(diff)
    for line, column, op, text in pieces:
        colour = {"+": "#a34700", "-": "#888888"}.get(op, INK)
        ax.text(column, line + 0.5, text, color=colour, va="center", parse_math=False, **MONO)
        if op == "+":
            ax.fill_between([column, column + len(text)], line, line + 1, color="#fbe3cf", lw=0)
        elif op == "-" and not text.isspace():
            ax.plot([column, column + len(text)], [line + 0.55] * 2, color="#888888", lw=0.8)
    if not pieces:
        ax.text(0, 0.5, "(empty prompt)", color="#888888", va="center", **MONO)
    ax.set(xlim=(0, LINE), ylim=(lines_of(diff), 0))
    ax.axis("off")
    ax.set_title(title)


def lines_of(diff: Diff) -> int:
    """How many lines a diff takes."""
    return 1 + max((line for line, *_ in lay_out(diff)), default=0)


@styled
def prompt_diffs(frame: pd.DataFrame) -> Figure:
    """One block per backbone: both prompt texts with what symbolic moves added (orange) and removed (struck out).

    `frame` has columns backbone, rule, seed, op, token.
    """
    groups = frame.groupby(["backbone", "rule", "seed"])
    blocks = [(key, group[["op", "token"]].to_numpy().tolist()) for key, group in groups]
    heights = [0.35 + 0.15 * lines_of(diff) for _, diff in blocks]
    fig, top = Figure(figsize=(PAGE, sum(heights))), sum(heights)
    for ((backbone, rule, seed), diff), height in zip(blocks, heights, strict=True):
        top -= height
        box = np.array([0.1, top + 0.05, PAGE - 0.2, height - 0.35]) / np.tile(
            [PAGE, sum(heights)], 2
        )
        draw_diff(fig, box, diff, f"{backbone}, rule {rule}, seed {seed}")
    return fig


def prompt_diff_html(diff: Diff) -> str:
    """The diff as an HTML paragraph, escaped: added text in <ins>, removed text in <del>."""
    tags = {"+": ("<ins>", "</ins>"), "-": ("<del>", "</del>")}
    parts = ("{1}{0}{2}".format(html.escape(token), *tags.get(op, ("", ""))) for op, token in diff)
    return f'<p style="white-space: pre-wrap">{"".join(parts)}</p>'


@styled
def run_picture(steps: pd.DataFrame, diff: Diff) -> Figure:
    """One run at a glance: dev reward and training loss per move, coloured by kind of move, and the prompt's diff.

    `steps` has columns step, move, value, content, style, loss.
    """
    charts_height, words_height = 2.2, 0.35 + 0.15 * lines_of(diff)
    height = charts_height + words_height
    fig = Figure(figsize=(PAGE, height), layout="constrained")
    parts = fig.subfigures(2, 1, height_ratios=[charts_height, words_height])
    charts, words = cast(Sequence[SubFigure], parts)
    axes = charts.subplots(1, 2)
    draw_moves(axes[0], steps, "value")
    for part, dashes in (("content", "-"), ("style", "--")):
        axes[0].plot(steps.step, steps[part], color="#bbbbbb", lw=0.8, ls=dashes, zorder=0)
    label_ends(axes[0], {name: steps[name].iloc[-1] for name in ("value", "content", "style")})
    axes[0].set(ylim=(-0.02, 1.05), xlabel="move", title="dev reward")
    draw_moves(axes[1], steps, "loss")
    axes[1].set(xlabel="move", title="training loss, nats per token", xlim=axes[0].get_xlim())
    name_moves(charts, list(steps.move))
    box = (0.1 / PAGE, 0.05 / words_height, 1 - 0.2 / PAGE, 1 - 0.35 / words_height)
    draw_diff(
        words, box, diff, "system prompt and template: added (orange) and removed (struck out)"
    )
    return fig
