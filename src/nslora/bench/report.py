"""From the rows of a benchmark to its table, figures and sentences."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import seaborn as sns
from matplotlib.figure import Figure
from pandas import DataFrame

from nslora.runs import store
from nslora.study import figures, report

Row = dict[str, Any]
OURS = "nslora"
UNITS = {
    "train": "tokens/s",
    "evaluate": "replies/s",
    "load": "loads/s",
    "editor": "tokens/s",
    "arithmetic": "GFLOP/s",
    "symbolic": "moves/s",
    "tree": "nodes/s",
    "peers": "adaptations/s",
}
CAPTION = (
    "Medians of {n} repetitions, the sides taking turns and the first turn of each left out. Ratio: our speed over "
    "theirs, in brackets its lowest and highest value in one turn. Peak MB, ours / theirs: resident memory of each "
    "side's own process (ru_maxrss), or what it took on a CUDA device. Measured on: {places}."
)
PLACE = "{device}, {dtype}, threads: {threads}, {processor}"
SERVERS = "Where an editor answers, peak MB is that of its server."
# What else is told of a side, as means of its repetitions.
TOLD = {
    "usable": "{:.0%} of edits usable",
    "tokens_in": "{:.0f} tokens in",
    "tokens_out": "{:.0f} tokens out",
    "generated": "{:.0f} tokens of replies scored",
    "start_s": "{:.1f} s from a cold start to a first reply, not counted",
    "moves": "{:.0f} moves made",
    "calls": "{:.0f} calls of the editor",
    "replayed": "{:.0f} more replayed",
    "equal": "the dev reward that both reach is {:.2f}",
    "tokens": "{:.0f} tokens until then",
    "best": "{:.2f} at best",
    "whole_s": "{:.0f} s in all",
}
SPREAD = "ratio of medians, with the range of single turns"
# What one comparison has in common, whoever takes the turn.
COMPARISON = ["part", "case", "backbone"]
# Rows and columns of the figure of growth.
COSTS = {"seconds": "seconds", "peak_mb": "peak memory, MB"}
AXES = {"items": "items in the epoch", "tokens": "tokens of each item"}


def places(around: Mapping[str, Row]) -> str:
    """Say which parts were measured where: "part, part: device, type, threads: n, processor" per environment."""
    parts_at = defaultdict(list)
    for part, environment in around.items():
        parts_at[PLACE.format(**environment)].append(part)
    return "; ".join(f"{', '.join(parts)}: {place}" for place, parts in parts_at.items())


def rate(row: Row) -> float:
    """Return work per second."""
    return row["work"] / row["seconds"]


def select(rows: Sequence[Row], parts: Container[str]) -> DataFrame:
    """Return the turns of some parts, with `mb`: the peak so far of the process, its server, or its accelerator."""
    turns = []
    for row in rows:
        if row["part"] in parts:
            peaks = (row.get(f"peak_{where}mb") for where in ("server_", "device_", ""))
            peak = next(filter(None, peaks))
            # few sides have a setting
            turns.append({"setting": "", **row, "mb": peak})
    return DataFrame(turns)


def compared(rows: Sequence[Row]) -> DataFrame:
    """Return a row per comparison: both median rates, their ratio, its range over single turns, and peak MB."""
    turns = select(rows, UNITS)
    if turns.empty:
        return turns
    turns["rate"] = turns.work / turns.seconds
    ours = turns[turns.side == OURS]
    theirs = turns[turns.side != OURS]
    # one row per turn of another side, beside ours of the same repetition
    pairs = theirs.merge(
        ours,
        on=[*COMPARISON, "repetition"],
        suffixes=("", "_ours"),
    )
    pairs["ratio"] = pairs.rate_ours / pairs.rate
    table = pairs.groupby([*COMPARISON, "side"], sort=False).agg(
        setting=("setting", "first"),
        ours=("rate_ours", "median"),
        theirs=("rate", "median"),
        low=("ratio", "min"),
        high=("ratio", "max"),
        n=("ratio", "size"),
        our_mb=("mb_ours", "max"),
        their_mb=("mb", "max"),
    )
    table = table.reset_index().rename(columns={"side": "against"})
    # one slow turn moves the range, hardly a ratio of medians
    return table.assign(unit=table.part.map(UNITS), ratio=table.ours / table.theirs)


def table(frame: DataFrame) -> DataFrame:
    """Return the display table of `compared`: one row of text cells per comparison."""
    rows = []
    for row in frame.itertuples():
        cells = {
            "what": f"{row.part}, {row.case}",
            "backbone": row.backbone,
            "ours": f"{report.shown_as(row.ours)} {row.unit}",
            "theirs": report.shown_as(row.theirs),
            "against": f"{row.against}, {row.setting}" if row.setting else row.against,
            "ratio": f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})",
            "peak MB": f"{row.our_mb:.0f} / {row.their_mb:.0f}",
        }
        rows.append(cells)
    return DataFrame(rows).set_index("what")


def tried(rows: Sequence[Row]) -> list[str]:
    """Return the settings that were tried for the other side with their rates, a sentence per comparison."""
    settings = defaultdict(list)
    for row in rows:
        if row["part"] == "tried":
            speed = "did not run" if "broke" in row else report.shown_as(rate(row))
            settings[row["case"], row["backbone"]].append(f"{row['setting']}: {speed}")
    sentences = []
    for (case, backbone), speeds in settings.items():
        # a case begins with its part: "train, short"
        unit = UNITS[case.split(",")[0]]
        sentences.append(f"Tried for {case}, {backbone}, {unit}: {'; '.join(speeds)}.")
    return sentences


def identical(rows: Sequence[Row]) -> list[str]:
    """Return how often both sides gave the same text, a sentence per comparison."""
    # each turn gives the same texts, so the first one stands for all
    shares = {
        (row["dtype"], row["case"], row["backbone"]): row["identical"]
        for row in reversed(rows)
        if "identical" in row
    }
    return [
        f"Same texts in {', '.join(key)}: {share:.0%}." for key, share in reversed(shares.items())
    ]


def told(rows: Sequence[Row]) -> list[str]:
    """Return what else is known of moves (TOLD), a sentence per comparison and side."""
    turns = select(rows, ("symbolic", "tree", "peers"))
    if turns.empty:
        return []
    sentences = []
    for names, turn in turns.groupby([*COMPARISON, "side"], sort=False):
        means = turn.reindex(columns=list(TOLD)).mean().dropna()
        facts = [TOLD[name].format(mean) for name, mean in means.items()]
        sentences.append(
            f"{', '.join(names)}, editor on {turn.engine.iloc[0]}: {'; '.join(facts)}."
        )
    return sentences


@figures.styled
def ratios(frame: DataFrame) -> Figure:
    """Draw our speed over the other side's (`compared`), a panel per backbone or editor."""
    counts = frame.groupby("backbone", sort=False).size()
    height = 0.6 + (0.3 + 0.17 * counts).sum()
    fig = Figure(figsize=(figures.PAGE, height))
    # a panel is as high as it has comparisons
    shape = {"sharex": True, "height_ratios": list(counts + 1)}
    for ax, here in figures.panels(fig, frame, "backbone", **shape):
        names = here.part + ", " + here.case + " / " + here.against
        # on a log axis, half as fast is as far from 1 as twice as fast
        ax.set_xscale("log")
        ax.axvline(1, color="#888888", lw=0.7, ls=":")
        ax.hlines(
            names,
            here.low,
            here.high,
            color=figures.GREEN,
            lw=1.6,
            alpha=0.7,
        )
        ax.plot(here.ratio, names, "o", color=figures.GREEN, ms=4.5)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(axis="y", color="#eeeeee")
        # the first one on top
        ax.set_ylim(len(here) - 0.5, -0.5)
    fig.supxlabel("our speed / theirs (range of single turns)")
    return fig


def grown(rows: Sequence[Row]) -> DataFrame:
    """Return columns backbone, axis ("items" or "tokens"), size, seconds (median), peak_mb (highest), n."""
    turns = select(rows, ("growth",))
    if turns.empty:
        return turns
    by = ["backbone", "axis", "size"]
    groups = turns.rename(columns={"case": "axis"}).groupby(by, sort=False)
    costs = groups.agg(
        seconds=("seconds", "median"),
        peak_mb=("mb", "max"),
        n=("seconds", "size"),
    )
    return costs.reset_index()


@figures.styled
def curves(frame: DataFrame) -> Figure:
    """Draw seconds and peak memory of an epoch by its number of items and by their length (`grown`)."""
    points = frame.melt(
        ["backbone", "axis", "size"],
        list(COSTS),
        var_name="cost",
    )
    points = points.assign(cost=points.cost.map(COSTS), axis=points["axis"].map(AXES))
    fig = Figure(figsize=(figures.PAGE, 3.6))
    for ax, here in figures.panels(fig, points, "cost", "axis", sharex="col", sharey="row"):
        sns.lineplot(
            here,
            x="size",
            y="value",
            hue="backbone",
            marker="o",
            ax=ax,
        )
    # from zero, where a straight line is a cost in proportion; now, since panels share their limits
    for ax in fig.axes:
        ax.set(xlim=(0, None), ylim=(0, None))
    figures.legend_outside(fig)
    return fig


def write(out: Path, parts: Mapping[str, Row]) -> list[Path]:
    """Write bench.json, and the table and figures that its `parts` allow; returns the paths.

    A part has `rows`, and the `environment` it was measured in.
    """
    store.write_json(out / "bench.json", parts)
    paths = [out / "bench.json"]
    rows = [row for part in parts.values() for row in part["rows"]]
    around = {name: part["environment"] for name, part in parts.items()}
    frame = compared(rows)
    if len(frame):
        n = report.count(frame)
        # of the parts that have another side
        about = {
            "figure": "our speed over theirs",
            "interval": SPREAD,
            "n_repetitions": n,
            "environment": {name: around[name] for name in around if name in UNITS},
        }
        caption = CAPTION.format(n=n, places=places(about["environment"]))
        served = [SERVERS] if any("peak_server_mb" in row for row in rows) else []
        sentences = [caption, *served, *tried(rows), *identical(rows), *told(rows)]
        notes = "\n\n".join(sentences)
        paths += report.save_table(table(frame), frame, out / "bench", notes)
        paths += figures.save_figure(ratios(frame), frame, out / "ratios", about)
    frame = grown(rows)
    if len(frame):
        about = {
            "figure": "cost of an epoch",
            "interval": "none: median seconds, highest memory of the repetitions",
            "environment": around["growth"],
        }
        paths += figures.save_figure(curves(frame), frame, out / "growth", about)
    return paths
