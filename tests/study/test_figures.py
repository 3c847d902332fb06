"""Figures: the same bytes every time, nothing lost or overlapping, text from prompts escaped."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nslora.study import costs, figures

diffs = st.lists(st.tuples(st.sampled_from("=-+"), st.text("ab<$\\{é \n", max_size=30)), max_size=8)


@given(diffs)
def test_html_diff_shows_text_only(diff: list[tuple[str, str]]) -> None:
    page = figures.prompt_diff_html(diff)
    assert set(re.findall(r"<(\w+)", page)) <= {"p", "ins", "del"}
    assert page.count("<ins>") == sum(op == "+" for op, _ in diff)


def steps(moves: str) -> pd.DataFrame:
    kinds = {"0": "start", "n": "numerical", "s": "symbolic"}
    frame = pd.DataFrame({"step": range(len(moves)), "move": [kinds[m] for m in moves]})
    return frame.assign(
        value=0.5, content=0.4, style=0.6, loss=np.where(frame.move == "numerical", 1.0, np.nan)
    )


@pytest.mark.parametrize(("moves", "switches"), [("0nnsns", 3), ("0ss", 0), ("0", 0)])
def test_run_picture_colours_moves_and_marks_switches(moves: str, switches: int) -> None:
    fig = figures.run_picture(steps(moves))
    reward = next(ax for ax in fig.axes if ax.get_title("left") == "dev reward")
    colours = [to_hex(colour) for colour in np.asarray(reward.collections[0].get_facecolor())]
    wanted = {"0": figures.INK, "n": figures.BLUE, "s": figures.ORANGE}
    assert colours == [wanted[m] for m in moves]
    assert sum(line.get_linestyle() == ":" for line in reward.lines) == switches


def estimates(**columns: list[object]) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    return frame.assign(mean=0.5, low=np.nan, high=np.nan, n=1)


def test_one_seed_and_one_backbone_are_drawn_without_intervals() -> None:
    dots = figures.dots(estimates(row=["facts"], backbone=["b"], method=["lora"]), "percent")
    assert [label.get_text() for label in dots.axes[0].get_yticklabels()] == ["lora"]
    curves = estimates(
        backbone=["b", "b"], method=["lora", "random"], move=[0, 0], tokens=[0, 0], seconds=[0, 0]
    )
    costs.cost_curves(curves).canvas.draw()


def test_dots_draw_every_method_with_its_interval() -> None:
    frame = estimates(
        row=["x", "x", "y"], backbone=["a", "b", "a"], method=["lora", "frozen", "oracle"]
    )
    frame = frame.assign(mean=[0.1, 0.2, 0.3], low=[0.0, 0.1, 0.2], high=[0.5, 0.6, 0.9])
    axes = figures.dots(frame, "percent").axes
    drawn = []
    for ax in axes:
        drawn.append(sorted(drawn_values(line) for line in ax.lines if drawn_values(line)))
    assert drawn == [[[0.0, 0.5], [0.1]], [[0.1, 0.6], [0.2]], [[0.2, 0.9], [0.3]], []]


def drawn_values(line: Line2D) -> list[float]:
    """The finite x of a line, of an interval both ends, each once."""
    values = np.asarray(line.get_xdata(), float)
    return sorted({round(float(x), 6) for x in values if np.isfinite(x)})


def test_a_change_is_read_from_zero() -> None:
    frame = pd.DataFrame({"row": ["x"], "backbone": ["b"], "change": ["rank = 4"], "n": [3]})
    (ax,) = figures.dots(frame.assign(mean=0.0, low=-0.1, high=0.1), "points", y="change").axes
    assert any(drawn_values(line) == [0.0] and line.get_marker() == "None" for line in ax.lines)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["rank = 4"]


def test_a_legend_above_all_panels_names_each_label_once() -> None:
    fig = Figure()
    for ax in fig.subplots(1, 2):
        ax.plot([0, 1], label="a")
        ax.plot([1, 0], label="b")
        ax.legend()
    figures.legend_outside(fig)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["a", "b"]
    assert all(ax.get_legend() is None for ax in fig.axes)


def test_saved_figure_has_four_files_with_the_same_bytes(tmp_path: Path) -> None:
    frame = estimates(row=["facts"], backbone=["b"], method=["lora"])
    before = mpl.rcParams["font.size"]
    saved = []
    for folder in ("a", "b"):
        fig = figures.dots(frame, "percent")
        paths = figures.save_figure(fig, frame, tmp_path / folder / "g", {"n": 1})
        saved.append([path.read_bytes() for path in paths])
    assert saved[0] == saved[1] and len(saved[0]) == 4
    assert json.loads((tmp_path / "a" / "g.json").read_text()) == {"n": 1}
    assert (tmp_path / "a" / "g.png").stat().st_size > 2000 and saved[0][2].startswith(b"%PDF")
    assert mpl.rcParams["font.size"] == before
