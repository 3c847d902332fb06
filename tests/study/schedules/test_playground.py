"""The playground: what the sliders choose, and what the picture says of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from grown import toward, write_tree
from matplotlib.figure import Figure

from nslora.study.schedules import Trees, load, playground
from nslora.study.schedules.trees import COSTS

pytestmark = pytest.mark.pure


@pytest.fixture
def trees(tmp_path: Path) -> Trees:
    """Instances where C1 is -0.3 after every numerical move, and the prompt is worth a move after the first."""
    for seed in (100, 101):
        write_tree(
            tmp_path,
            toward("NSN", 0.8),
            seed=seed,
            signal=lambda schedule: (
                {"c1": -0.3, "c2": 9.0} if schedule[-1:] == "N" else {"gain": 0.0}
            ),
        )
    return load(tmp_path)


def test_a_threshold_changes_the_path_and_its_regret(trees: Trees) -> None:
    patient = playground.followed(trees, "monitor", c1_eps=0.1)
    quick = playground.followed(trees, "monitor", c1_eps=0.5)
    assert set(patient.schedule) == {"NNN"} and set(quick.schedule) == {"NSN"}
    assert (quick.regret == 0).all() and (patient.regret > 0).all()
    assert {*COSTS, "returned"} <= set(quick)
    both = playground.swept(trees, "monitor", "c1_eps", (0.1, 0.5))
    assert both.groupby("c1_eps").regret.mean().to_dict() == {
        0.1: pytest.approx(patient.regret.mean()),
        0.5: 0.0,
    }


def test_the_picture_tells_the_path_and_what_it_loses(trees: Trees) -> None:
    instance = trees.instances.index[0]
    fig = playground.picture(trees, instance, "monitor", c1_eps=0.5)
    (ax,) = fig.axes
    assert ax.get_title(loc="left") == (
        "monitor: NSN, 0 points below the best; 0.0 in the mean of all instances"
    )
    thick = [line for line in ax.lines if line.get_linewidth() > 2]
    assert len(ax.lines) == 14 and len(thick) == 3
    names = {text.get_text(): text for text in ax.texts}
    assert len(names) == 8 and names["NSN"].get_fontweight() == "bold"
    heights = sorted(text.get_position()[1] for text in ax.texts)
    # no name lies over another
    assert min(b - a for a, b in zip(heights, heights[1:], strict=False)) > 0.05


def test_sliders_begin_with_the_settings_and_draw(trees: Trees) -> None:
    box = playground.sliders(trees)
    values = {control.description: control.value for control in box.children[:-1]}
    assert values == {
        "instance": trees.instances.index[0],
        "method": "neurosymbolic",
        "c1_eps": 0.1,
        "c2_eps": 0.5,
        "gain_eps": 0.02,
        "patience": 1,
        "reserve": 2,
        "follows_floor": 0.6,
    }
    box.update()
    assert isinstance(box.result, Figure)
