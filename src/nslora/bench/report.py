"""From the rows of a benchmark to its table, figures and sentences."""

# pandas types an indexed frame as a union of everything it could be, so these checks only produce noise here.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportReturnType=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

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
}
PALETTE = (figures.BLUE, figures.ORANGE, figures.GREEN, figures.GREY)
CAPTION = (
    "Medians of {n} repetitions, the sides taking turns and the first turn of each left out. Ratio: our speed over "
    "theirs, in brackets its lowest and highest value in one turn. Peak MB, ours / theirs: resident memory of each "
    "side's own process (ru_maxrss), or what it took on a CUDA device. Measured on: {places}."
)
SPREAD = "ratio of medians, with the range of single turns"


def places(around: Mapping[str, Row]) -> str:
    """Which parts were measured where: "part, part: device, type, threads: n, processor" per kind of environment."""
    told: dict[str, list[str]] = {}
    for part, e in around.items():
        told.setdefault(
            "{device}, {dtype}, threads: {threads}, {processor}".format(**e), []
        ).append(part)
    return "; ".join(f"{', '.join(parts)}: {place}" for place, parts in told.items())


def rate(row: Row) -> float:
    """Work per second."""
    return row["work"] / row["seconds"]


def memory(row: Row) -> float:
    """Peak MB so far of the process, or on its accelerator."""
    return row.get("peak_device_mb", row["peak_mb"])


def figure(number: float) -> str:
    """Three digits, without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def compared(rows: Sequence[Row]) -> pd.DataFrame:
    """One line per comparison: both median rates, their ratio, its range over single turns, and peak memory in MB."""
    frame = pd.DataFrame(
        [row | {"rate": rate(row), "mb": memory(row)} for row in rows if row["part"] in UNITS]
    )
    lines = []
    for (part, case, backbone), group in (
        frame.groupby(["part", "case", "backbone"], sort=False) if len(frame) else ()
    ):
        sides = {
            name: turns.set_index("repetition") for name, turns in group.groupby("side", sort=False)
        }
        ours = sides.pop(OURS)
        for other, theirs in sides.items():
            turns, settings = (
                ours.rate / theirs.rate,
                theirs.get("setting", pd.Series(dtype=str)).dropna(),
            )
            lines.append(
                {
                    "part": part,
                    "case": case,
                    "backbone": backbone,
                    "against": other,
                    "setting": settings.iloc[0] if len(settings) else "",
                    "unit": UNITS[part],
                    "ours": ours.rate.median(),
                    "theirs": theirs.rate.median(),
                    "ratio": ours.rate.median() / theirs.rate.median(),
                    "low": turns.min(),
                    "high": turns.max(),
                    "n": len(turns),
                    "our_mb": ours.mb.max(),
                    "their_mb": theirs.mb.max(),
                }
            )
    return pd.DataFrame(lines)


def table(frame: pd.DataFrame) -> pd.DataFrame:
    """Display table of `compared`: one row of text cells per comparison."""
    body = [
        (
            row.backbone,
            f"{figure(row.ours)} {row.unit}",
            figure(row.theirs),
            f"{row.against}, {row.setting}" if row.setting else row.against,
            f"{row.ratio:.2f} ({row.low:.2f} to {row.high:.2f})",
            f"{row.our_mb:.0f} / {row.their_mb:.0f}",
        )
        for row in frame.itertuples()
    ]
    heads = pd.MultiIndex.from_arrays(
        [["backbone", "ours", "theirs", "against", "ratio", "peak MB"]]
    )
    return pd.DataFrame(
        body, index=pd.Index(frame.part + ", " + frame.case, name="what"), columns=heads
    )


def tried(rows: Sequence[Row]) -> list[str]:
    """The settings that were tried for the other side, with their rates: one sentence per comparison."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row["part"] == "tried":
            said = "did not run" if "broke" in row else figure(rate(row))
            found.setdefault((row["case"], row["backbone"]), []).append(f"{row['setting']}: {said}")
    return [
        f"Tried for {case}, {backbone}, {UNITS[case.split(',')[0]]}: {'; '.join(said)}."
        for (case, backbone), said in found.items()
    ]


def identical(rows: Sequence[Row]) -> list[str]:
    """How often both sides gave the same text: one sentence per comparison."""
    found: dict[tuple[str, str, str], float] = {}
    for row in rows:
        if "identical" in row:
            found.setdefault((row["case"], row["backbone"], row["dtype"]), row["identical"])
    return [
        f"Same texts in {d}, {case}, {backbone}: {share:.0%}."
        for (case, backbone, d), share in found.items()
    ]


@figures.styled
def ratios(frame: pd.DataFrame) -> Figure:
    """Our speed over the other side's (`compared`), a panel per backbone or editor."""
    groups = list(frame.groupby("backbone", sort=False))
    heights = [len(group) for _, group in groups]
    fig = Figure(
        figsize=(figures.PAGE, 0.6 + sum(0.3 + 0.17 * n for n in heights)), layout="constrained"
    )
    axes = fig.subplots(
        len(groups), 1, squeeze=False, sharex=True, height_ratios=[n + 1 for n in heights]
    )[:, 0]
    for ax, (backbone, group) in zip(axes, groups, strict=True):
        y = range(len(group))
        ax.axvline(1, color="#888888", lw=0.7, ls=":")
        ax.hlines(y, group.low, group.high, color=figures.GREEN, lw=1.6, alpha=0.7)
        ax.plot(group.ratio, y, "o", color=figures.GREEN, ms=4.5)
        ax.set(
            yticks=y,
            yticklabels=group.part + ", " + group.case + " / " + group.against,
            title=backbone,
        )
        ax.set(xscale="log", ylim=(len(group) - 0.4, -0.6))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.grid(axis="y", color="#eeeeee")
        for height, ratio in zip(y, group.ratio, strict=True):
            ax.text(
                1.01,
                height,
                f"{ratio:.2f}",
                transform=ax.get_yaxis_transform(),
                fontsize=7,
                va="center",
            )
    fig.supxlabel("our speed / theirs (range of single turns)", fontsize=8)
    return fig


def grown(rows: Sequence[Row]) -> pd.DataFrame:
    """Columns backbone, axis ("items" or "tokens"), size, seconds (median), peak_mb (highest), n."""
    frame = pd.DataFrame([row | {"mb": memory(row)} for row in rows if row["part"] == "growth"])
    if frame.empty:
        return frame
    groups = frame.rename(columns={"case": "axis"}).groupby(
        ["backbone", "axis", "size"], sort=False
    )
    return groups.agg(
        seconds=("seconds", "median"), peak_mb=("mb", "max"), n=("seconds", "size")
    ).reset_index()


@figures.styled
def curves(frame: pd.DataFrame) -> Figure:
    """Seconds and peak memory of an epoch by its number of items and by their length (`grown`), a line per backbone."""
    fig = Figure(figsize=(figures.PAGE, 3.6), layout="constrained")
    axes = fig.subplots(2, 2, sharex="col", sharey="row")
    for i, (column, said) in enumerate(
        {"seconds": "seconds", "peak_mb": "peak memory, MB"}.items()
    ):
        for j, axis in enumerate(("items", "tokens")):
            here = frame[frame["axis"] == axis]
            for colour, (backbone, line) in zip(
                PALETTE, here.groupby("backbone", sort=False), strict=False
            ):
                axes[i, j].plot(
                    line["size"], line[column], "o-", ms=3.5, color=colour, label=backbone
                )
            axes[i, j].set(
                ylabel="" if j else said, xticks=sorted(set(here["size"])), xlim=(0, None)
            )
        axes[i, 0].set_ylim(0, frame[column].max() * 1.1)
    axes[1, 0].set_xlabel("items in the epoch")
    axes[1, 1].set_xlabel("tokens of each item")
    axes[0, 0].legend(frameon=False, fontsize=7)
    return fig


def write(out: Path, parts: Mapping[str, Row]) -> list[Path]:
    """Write bench.json, and the table and figures that its `parts` allow; returns the paths.

    A part has `rows`, and the `environment` it was measured in.
    """
    store.write_json(out / "bench.json", parts)
    rows = [row for part in parts.values() for row in part["rows"]]
    paths, frame, growth = [out / "bench.json"], compared(rows), grown(rows)
    if len(frame):
        around = {name: part["environment"] for name, part in parts.items() if name in UNITS}
        n = "-".join(str(n) for n in sorted({frame.n.min(), frame.n.max()}))
        said = [CAPTION.format(n=n, places=places(around)), *tried(rows), *identical(rows)]
        saved = report.save_table(table(frame), frame, out / "bench", "\n\n".join(said))
        shown = (
            saved[0].read_text(encoding="utf-8").replace("| method |", "| what |", 1)
        )  # what other tables list
        saved[0].write_text(shown, encoding="utf-8")
        paths += saved
        about = {
            "figure": "our speed over theirs",
            "interval": SPREAD,
            "n_repetitions": n,
            "environment": around,
        }
        paths += figures.save_figure(ratios(frame), frame, out / "ratios", about)
    if len(growth):
        about = {
            "figure": "cost of an epoch",
            "interval": "none: median seconds, highest memory of the repetitions",
        }
        about |= {"environment": parts["growth"]["environment"]}
        paths += figures.save_figure(curves(growth), growth, out / "growth", about)
    return paths
