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

from nslora.study import figures

diffs = st.lists(st.tuples(st.sampled_from("=-+"), st.text("ab<$\\{é \n", max_size=30)), max_size=8)


@given(diffs, st.integers(3, 20))
def test_lay_out_keeps_all_text_in_lines_that_fit(
    diff: list[tuple[str, str]], columns: int
) -> None:
    pieces = figures.lay_out(diff, columns)
    shown = "".join(text for *_, text in pieces)
    assert re.sub(r"\s", "", shown) == re.sub(r"\s", "", "".join(text for _, text in diff))
    ends: dict[int, int] = {}
    for line, column, _, text in pieces:
        assert column >= ends.get(line, 0) and column + len(text) <= columns
        ends[line] = column + len(text)


@given(diffs)
def test_html_diff_shows_text_only(diff: list[tuple[str, str]]) -> None:
    page = figures.prompt_diff_html(diff)
    assert set(re.findall(r"<(\w+)", page)) <= {"p", "ins", "del"}
    assert page.count("<ins>") == sum(op == "+" for op, _ in diff)


@given(st.dictionaries(st.text("abc", min_size=1), st.floats(0, 1), min_size=1, max_size=6))
def test_end_labels_keep_their_distance_and_order(ends: dict[str, float]) -> None:
    ax = Figure().add_subplot()
    figures.label_ends(ax, ends, gap=0.1)
    ys = [text.get_position()[1] for text in ax.texts]
    assert (np.diff(ys) >= 0.1 - 1e-9).all() and max(ys) <= 1 + 1e-9
    assert [ends[text.get_text()] for text in ax.texts] == sorted(ends.values())


def steps(moves: str) -> pd.DataFrame:
    kinds = {"0": "stop", "n": "numerical", "s": "symbolic"}
    frame = pd.DataFrame({"step": range(len(moves)), "move": [kinds[m] for m in moves]})
    return frame.assign(
        value=0.5, content=0.4, style=0.6, loss=np.where(frame.move == "numerical", 1.0, np.nan)
    )


@pytest.mark.parametrize(("moves", "switches"), [("0nnsns", 3), ("0ss", 0), ("0", 0)])
def test_run_picture_colours_moves_and_marks_switches(moves: str, switches: int) -> None:
    fig = figures.run_picture(
        steps(moves), [("=", "Say $x^2 {y}$."), ("-", " a"), ("+", "\n" + "long " * 60)]
    )
    reward = next(ax for ax in fig.axes if ax.get_title("left") == "dev reward")
    colours = [to_hex(colour) for colour in np.asarray(reward.collections[0].get_facecolor())]
    wanted = {"0": figures.INK, "n": figures.BLUE, "s": figures.ORANGE}
    assert colours == [wanted[m] for m in moves]
    assert sum(line.get_linestyle() == ":" for line in reward.lines) == switches
    fig.canvas.draw()  # an unescaped dollar sign would raise here


def estimates(**columns: list[object]) -> pd.DataFrame:
    frame = pd.DataFrame(columns)
    return frame.assign(
        mean=0.5, low=np.nan, high=np.nan, half=np.nan, n=1, interval="t-interval on seed means"
    )


def test_one_seed_and_one_backbone_are_drawn_without_intervals(tmp_path: Path) -> None:
    gains = estimates(task=["facts", "style"], backbone=["b", "b"], method=["lora", "textgrad"])
    fig = figures.gain_matrix(gains)
    assert [text.get_text() for text in fig.axes[0].texts] == ["+50", "", "", "+50"]
    dots = figures.dots(estimates(row=["facts"], backbone=["b"], method=["lora"]), "percent")
    assert [label.get_text() for label in dots.axes[0].get_yticklabels()] == ["lora"]
    curves = estimates(
        backbone=["b", "b"], method=["lora", "random"], move=[0, 0], tokens=[0, 0], seconds=[0, 0]
    )
    figures.cost_curves(curves).canvas.draw()


def test_dots_draws_every_method_at_its_place() -> None:
    frame = estimates(
        row=["x", "x", "y"], backbone=["a", "b", "a"], method=["lora", "frozen", "oracle"]
    )
    frame["mean"] = [0.1, 0.2, 0.3]
    axes = figures.dots(frame, "percent").axes
    drawn = [
        [float(np.asarray(line.get_xdata())[0]) for line in ax.lines if line.get_marker() == "o"]
        for ax in axes
    ]
    assert [[x for x in xs if not np.isnan(x)] for xs in drawn] == [[10.0], [20.0], [30.0], []]


def test_saved_figure_has_four_files_with_the_same_bytes(tmp_path: Path) -> None:
    gains = estimates(task=["facts"], backbone=["b"], method=["lora"])
    before = mpl.rcParams["font.size"]
    first, again = (
        [
            path.read_bytes()
            for path in figures.save_figure(figures.gain_matrix(gains), gains, stem, {"n": 1})
        ]
        for stem in (tmp_path / "a" / "g", tmp_path / "b" / "g")
    )
    assert first == again and len(first) == 4
    assert json.loads((tmp_path / "a" / "g.json").read_text()) == {"n": 1}
    assert (tmp_path / "a" / "g.png").stat().st_size > 2000 and first[2].startswith(b"%PDF")
    assert mpl.rcParams["font.size"] == before
