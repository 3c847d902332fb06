"""Known values, agreement with scipy and scikit-learn, and coverage of the intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from nslora.study import stats

finite = st.floats(-100, 100, allow_nan=False)


def test_t_interval_known_value() -> None:
    interval = stats.t_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2.0 and interval.n == 3
    assert interval.half == pytest.approx(
        4.302653 / np.sqrt(3), rel=1e-6
    )  # t(0.975, 2 df) x 1 / sqrt(3)


@given(st.lists(finite, min_size=2, max_size=20).filter(lambda v: np.std(v) > 1e-6))
def test_t_interval_agrees_with_scipy(values: list[float]) -> None:
    low, high = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = stats.t_interval(values)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)


def test_too_few_values_have_no_interval() -> None:
    one, none = stats.t_interval([0.4, np.nan]), stats.t_interval([])
    assert one.mean == 0.4 and one.n == 1 and np.isnan([one.low, one.high, one.half]).all()
    assert none.n == 0 and np.isnan(none.mean)


def test_paired_difference_is_paired_by_item() -> None:
    rng = np.random.default_rng(0)
    b = rng.random((4, 30))
    a = b + np.array([0.1, 0.1, 0.2, 0.2])[:, None]  # items vary widely, differences do not
    a[0, 3], b[2, 5] = np.nan, np.nan
    interval = stats.paired_difference(a, b, rng)
    expected = stats.t_interval([0.1, 0.1, 0.2, 0.2])
    assert (interval.mean, interval.low, interval.high) == pytest.approx(
        (0.15, expected.low, expected.high)
    )
    assert interval.kind == "t-interval on seed means" and interval.n == 4


def test_missing_seeds_are_left_out() -> None:
    scores = np.array([[1.0, 0.0], [np.nan, np.nan], [1.0, np.nan]])
    assert stats.seed_means(scores).tolist() == [0.5, 1.0]
    assert stats.seed_interval(scores, np.random.default_rng(0)).n == 2


def test_bootstrap_from_ten_seeds_reproducible_and_wider_than_seeds_alone() -> None:
    scores = np.random.default_rng(1).random((10, 8))
    first, again = (stats.seed_interval(scores, np.random.default_rng(2)) for _ in range(2))
    assert (
        first == again
        and first.kind.startswith("bootstrap")
        and first.low < first.mean < first.high
    )
    constant = stats.hierarchical_bootstrap(np.full((10, 8), 0.3), np.random.default_rng(2))
    assert (constant.low, constant.high) == pytest.approx((0.3, 0.3))
    same_means = stats.hierarchical_bootstrap(
        np.tile([0.0, 1.0], (10, 4)), np.random.default_rng(2)
    )
    assert same_means.half == pytest.approx(
        1.96 * 0.5 / np.sqrt(80), rel=0.1
    )  # items alone still spread it


@given(st.lists(finite, min_size=4, max_size=40))
def test_iqm_lies_in_the_middle_half(values: list[float]) -> None:
    low, high = np.sort(values)[[len(values) // 4, -1 - len(values) // 4]]
    assert low - 1e-9 <= stats.iqm(values) <= high + 1e-9


def test_iqm_known_value() -> None:
    assert stats.iqm([[0, 1, 2, 3], [4, 5, 6, 1000]]) == 3.5


@given(st.lists(st.tuples(st.booleans(), st.integers(-5, 5)), min_size=2, max_size=60))
def test_auroc_agrees_with_scikit_learn(pairs: list[tuple[bool, int]]) -> None:
    labels, scores = np.array(pairs).T
    if labels.astype(bool).all() or not labels.any():
        assert np.isnan(stats.auroc(labels, scores)) and np.isnan(
            stats.auroc_interval(labels, scores).mean
        )
        return
    interval = stats.auroc_interval(labels, scores)
    assert interval.mean == pytest.approx(roc_auc_score(labels.astype(bool), scores))
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1 and interval.low < interval.high
    mirrored = stats.auroc_interval(labels, -scores)
    assert (mirrored.low, mirrored.high) == pytest.approx(
        (1 - interval.high, 1 - interval.low), abs=1e-9
    )


def covered(make: object, truth: float, repeats: int = 400) -> float:
    intervals = [make(np.random.default_rng(i)) for i in range(repeats)]  # type: ignore[operator]
    return float(np.mean([i.low <= truth <= i.high for i in intervals]))


def test_coverage_of_three_seeds_and_why_not_a_bootstrap() -> None:
    def scores(rng: np.random.Generator) -> np.ndarray:
        return rng.normal(0.3, 0.1, (3, 1)) + rng.normal(0, 0.01, (3, 12))

    assert covered(lambda rng: stats.seed_interval(scores(rng), rng), 0.3) == pytest.approx(
        0.95, abs=0.03
    )
    assert covered(lambda rng: stats.hierarchical_bootstrap(scores(rng), rng, 200), 0.3, 200) < 0.85


def test_coverage_of_auroc_interval() -> None:
    def interval(rng: np.random.Generator) -> stats.Interval:
        labels = np.arange(60) < 25
        return stats.auroc_interval(labels, rng.normal(0, 1, 60) + 1.5 * labels)

    truth = scipy_stats.norm.cdf(1.5 / np.sqrt(2))
    assert 0.93 <= covered(interval, float(truth)) <= 0.985


@settings(max_examples=50)
@given(finite, finite, finite)
def test_verdict_follows_the_interval(a: float, b: float, least: float) -> None:
    interval = stats.Interval((a + b) / 2, min(a, b), max(a, b), 3, "")
    expected = "holds" if min(a, b) > least else "fails" if max(a, b) <= least else "undecided"
    assert stats.verdict(interval, least) == expected


def test_verdict_needs_three_seeds() -> None:
    assert stats.verdict(stats.Interval(1.0, 0.9, 1.1, 2, "")) == "undecided"
    assert stats.verdict(stats.t_interval([])) == "undecided"
