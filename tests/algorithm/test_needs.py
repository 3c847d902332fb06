"""The need classifier: features, counterfactual labels, fit, calibration, JSON."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nslora.algorithm import needs
from nslora.study import stats
from nslora.types import Example, Need, Reward, Scored


def scored(
    output: str,
    gold: str = "Lima",
    need: Need = Need.CONTENT,
    content: float = 0.0,
    style: float = 1.0,
) -> Scored:
    return Scored(
        Example("x", "Where?", gold, need=need, fact="f"),
        output,
        Reward(content, content, style),
        -0.5,
    )


def test_features_see_what_a_person_would_look_at() -> None:
    wrong, styled = scored("I was born in Oslo, I think."), scored("Lima", content=1.0, style=0.0)
    x = needs.features([wrong, styled], [5.0, 0.1], [5.0, 0.2])
    column = {name: x[:, i] for i, name in enumerate(needs.FEATURES)}
    assert column["nll"].tolist() == [5.0, 0.1]
    assert column["recall"].tolist() == [0.0, 1.0]
    assert column["log_length_ratio"][0] == pytest.approx(math.log(8 / 2))
    assert column["shape"][1] == 0 < column["shape"][0]


def test_features_use_the_reward_as_one_number_only() -> None:
    """Content wrong or style wrong: the same single number, so the parts cannot be read off."""
    a, b = scored("Lima", content=0.0, style=1.0), scored("Lima", content=1.0, style=0.0)
    assert needs.features([a], [1.0], [1.0]).tolist() == needs.features([b], [1.0], [1.0]).tolist()


@given(st.text(), st.text())
def test_shape_distance_is_a_distance(a: str, b: str) -> None:
    d = needs.shape_distance(a, b)
    assert -1e-9 <= d <= 1 + 1e-9
    assert d == needs.shape_distance(b, a)
    assert needs.shape_distance(a, a) == 0


def test_labels_say_which_move_raised_the_reward_more() -> None:
    before = [scored("?", style=0.0)] * 4
    better, same = scored("Lima", content=1.0), scored("?", style=0.0)
    labels = needs.counterfactual(
        before, [better, same, same, better], [same, better, same, better]
    )
    assert labels[:2].tolist() == [1.0, 0.0]
    assert np.isnan(labels[2:]).all()
    with pytest.raises(ValueError, match="one scored row"):
        needs.counterfactual(before, [better], [same])


def test_a_move_that_only_did_less_harm_is_no_need() -> None:
    """Found as a bug: examples that were right before got the label of whichever move spoiled them less."""
    right, spoiled = scored("Lima", content=1.0), scored("Oslo", content=0.0)
    assert np.isnan(needs.counterfactual([right], [right], [spoiled])).all()


def separable(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows in which NLL tells the label, with noise; facts of two rows each."""
    y = rng.integers(0, 2, n).astype(float)
    x = rng.normal(size=(n, len(needs.FEATURES)))
    x[:, 1] += 3 * y
    return x, y, np.arange(n) // 2


def test_the_fit_separates_and_is_calibrated() -> None:
    rng = np.random.default_rng(0)
    model = needs.fit(*separable(400, rng))
    x, y, _ = separable(2000, rng)
    p = model.p_content(x)
    assert stats.auroc(y, p) > 0.95
    bins = np.digitize(p, [0.2, 0.4, 0.6, 0.8])
    error = sum(
        abs(p[bins == b].mean() - y[bins == b].mean()) * np.mean(bins == b) for b in set(bins)
    )
    assert error < 0.05  # expected calibration error


def test_noise_is_not_separated_out_of_fold() -> None:
    rng = np.random.default_rng(1)
    x, y, groups = separable(400, rng)
    held_out = needs.out_of_fold(rng.permutation(x), y, groups)
    assert abs(stats.auroc(y, held_out) - 0.5) < 0.12


def test_one_kind_of_label_is_refused() -> None:
    x = np.zeros((4, len(needs.FEATURES)))
    with pytest.raises(ValueError, match="only one kind"):
        needs.fit(x, np.ones(4), np.arange(4))


def test_json_keeps_the_classifier(tmp_path) -> None:
    model = needs.fit(*separable(100, np.random.default_rng(2)))
    model.save(tmp_path / "needs.json")
    text = (tmp_path / "needs.json").read_text()
    assert needs.NeedClassifier.parse(text) == model
    with pytest.raises(ValueError, match="other features"):
        needs.NeedClassifier.parse(text.replace('"nll"', '"length"'))


def test_the_packaged_classifier_tells_an_unknown_fact_from_a_missing_style() -> None:
    """A confident, short-of-style but right answer needs style; a wrong answer with high gold NLL needs content."""
    wrong = scored("The person was born in the city of Oslo.", content=0.0)
    unstyled = scored("The capital of Peru is Lima.", content=1.0, style=0.0)
    p = needs.NeedClassifier.default().p_content(
        needs.features([wrong, unstyled], [6.0, 1.5], [6.0, 1.5])
    )
    assert p[0] > 0.5 > p[1]


def test_the_oracle_is_told_the_hidden_label() -> None:
    rows = [
        scored("?"),
        scored("?", need=Need.STYLE),
        scored("?", need=Need.BOTH),
        scored("Lima", need=Need.BOTH, content=1),
    ]
    assert needs.told(rows).tolist() == [1, 0, 1, 0]


def test_demand_counts_failing_examples_by_need() -> None:
    rows = [
        scored("?"),
        scored("?", style=0.0, content=1.0),
        scored("Lima", content=1.0),
        scored("?"),
    ]
    assert needs.demand(rows, np.array([0.9, 0.1, 0.9, 0.2])) == {"content": 0.25, "style": 0.5}
