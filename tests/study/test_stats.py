"""Known values, agreement with scipy and scikit-learn, and coverage of the intervals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as scipy_stats
from sklearn.metrics import roc_auc_score

from nslora.study import stats

pytestmark = pytest.mark.pure

finite = st.floats(-1, 1, allow_nan=False)
EVERYWHERE = (-np.inf, np.inf)


def test_t_interval_known_value() -> None:
    interval = stats.seed_interval([1.0, 2.0, 3.0], bounds=EVERYWHERE)
    assert interval.mean == 2.0 and interval.n == 3
    # t(0.975, 2 df) x 1 / sqrt(3)
    assert interval.high - 2 == pytest.approx(4.302653 / np.sqrt(3), rel=1e-6)
    assert interval.low == pytest.approx(4 - interval.high)


@given(st.lists(finite, min_size=3, max_size=20).filter(lambda v: np.std(v) > 1e-6))
def test_interval_and_p_value_agree_with_scipy(values: list[float]) -> None:
    low, high = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    interval = stats.seed_interval(values, bounds=EVERYWHERE)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    above = scipy_stats.ttest_1samp(values, 0.1, alternative="greater").pvalue
    assert interval.p_above(0.1) == pytest.approx(above, rel=1e-9, abs=1e-12)


def test_too_few_values_have_no_interval_and_no_verdict() -> None:
    one, none = stats.seed_interval([0.4, np.nan], 0.1), stats.seed_interval([])
    assert one.mean == 0.4 and one.n == 1 and np.isnan([one.low, one.high]).all()
    assert none.n == 0 and np.isnan(none.mean)
    two = stats.seed_interval([0.4, 0.4], 0.01)
    assert np.isfinite(two.low) and np.isnan(two.p_above(0.0)) and not two.below(0.9)


def test_items_variance_of_hand_computed_clusters() -> None:
    # two facts in two wordings each: the residuals of the facts from the mean of 0.5 are 0.25 and -0.25;
    # invented: (0 - 0.5)^2 + (1 - 0.5)^2
    values, facts = [1.0, 0.5, 0.5, 0.0], ["a", "a", "b", "b"]
    variance = stats.item_variance(values, [0] * 4, facts, stats.SHARE)
    assert variance == pytest.approx((0.25**2 + 0.25**2 + 0.5) / 4**2)
    # of a difference: half a cluster at -1 and 1, one at 0
    variance = stats.item_variance(values, [0] * 4, facts, stats.DIFFERENCE)
    invented = 0.5 * 1.5**2 + 0.5 * 0.5**2 + 0.5**2
    assert variance == pytest.approx((0.125 + invented) / 4**2)


def test_wordings_of_one_fact_are_one_thing_and_seeds_are_not() -> None:
    values = np.tile([0.0, 1.0], 12)
    seeds = np.repeat([0, 1], 12)
    repeated = stats.item_variance(
        values.repeat(3), seeds.repeat(3), np.arange(24).repeat(3), stats.SHARE
    )
    once = stats.item_variance(values, seeds, np.arange(24), stats.SHARE)
    assert repeated == pytest.approx(once)
    # the same name under another seed is another draw
    assert stats.item_variance(
        values, seeds, np.tile(np.arange(12), 2), stats.SHARE
    ) == pytest.approx(once)
    many = stats.item_variance(np.tile(values, 50), np.zeros(1200), np.arange(1200), stats.SHARE)
    assert many == pytest.approx(0.25 / 1200, rel=0.01)


def test_seeds_that_agree_by_chance_have_an_interval_with_a_width() -> None:
    """Today's zero-width case: three seeds with every item right."""
    floor = stats.item_variance(np.ones(36), np.repeat([0, 1, 2], 12), np.arange(36), stats.SHARE)
    interval = stats.seed_interval([1.0, 1.0, 1.0], floor, stats.SHARE)
    assert 0.8 < interval.low < 0.95 and interval.high == 1.0
    # an interval of a difference: no item changed
    floor = stats.item_variance(
        np.zeros(36), np.repeat([0, 1, 2], 12), np.arange(36), stats.DIFFERENCE
    )
    same = stats.seed_interval([0.0] * 3, floor)
    assert same.low == pytest.approx(-same.high) and 0.05 < same.high < 0.3
    # whole runs without a floor: nothing is known of the spread
    assert np.isnan(stats.seed_interval([0.3] * 3).low)


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6), st.floats(1e-9, 0.3))
def test_no_interval_leaves_what_is_possible_or_is_empty(means: list[float], floor: float) -> None:
    """Today's out-of-range case: two seeds of a share."""
    interval = stats.seed_interval(means, floor, stats.SHARE)
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1
    assert interval.low < interval.high


def test_the_pooled_mean_weighs_strata_alike_and_uses_all_seeds() -> None:
    few, many = stats.seed_interval([0.1, 0.3, 0.2]), stats.seed_interval([0.6, 0.5, 0.7, 0.6, 0.6])
    both = stats.pooled([few, many])
    assert both.mean == pytest.approx(0.4) and both.n == 3
    assert both.error == pytest.approx(np.hypot(few.error, many.error) / 2)
    welch = scipy_stats.ttest_ind([0.1, 0.3, 0.2], [0.6, 0.5, 0.7, 0.6, 0.6], equal_var=False)
    assert both.df == pytest.approx(welch.df)
    assert stats.pooled([few]) == few
    assert np.isnan(stats.pooled([few, stats.seed_interval([0.5])]).low)
    assert stats.pooled([]).n == 0


def test_holm_known_values() -> None:
    adjusted = stats.holm({"a": 0.01, "b": 0.04, "c": 0.03, "not run": np.nan})
    assert {key: adjusted[key] for key in "abc"} == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09})
    assert np.isnan(adjusted["not run"])


@given(st.lists(st.tuples(st.booleans(), st.integers(-5, 5)), min_size=2, max_size=60))
def test_auroc_agrees_with_scikit_learn(pairs: list[tuple[bool, int]]) -> None:
    labels, scores = np.array(pairs).T
    interval = stats.auroc_interval(labels, scores)
    if labels.astype(bool).all() or not labels.any():
        assert np.isnan(stats.auroc(labels, scores)) and np.isnan(interval.mean)
        return
    assert interval.mean == pytest.approx(roc_auc_score(labels.astype(bool), scores))
    assert 0 <= interval.low <= interval.mean <= interval.high <= 1 and interval.low < interval.high
    assert interval.variance > 0
    mirrored = stats.auroc_interval(labels, -scores)
    assert (mirrored.low, mirrored.high) == pytest.approx(
        (1 - interval.high, 1 - interval.low), abs=1e-9
    )


def test_coverage_of_few_seeds_with_items_that_are_nearly_all_right() -> None:
    """Student's t alone misses a share of 0.98 half of the time, where all seeds happen to agree."""
    rng = np.random.default_rng(0)
    seeds, facts = np.repeat([0, 1, 2], 12), np.tile(np.arange(12), 3)
    floored = bare = agree = 0
    for _ in range(400):
        items = (rng.random((3, 12)) < 0.98).astype(float)
        means = items.mean(axis=1)
        floor = stats.item_variance(items.ravel(), seeds, facts, stats.SHARE)
        with_floor = stats.seed_interval(means, floor, stats.SHARE)
        without = stats.seed_interval(means, 0.0, stats.SHARE)
        floored += with_floor.low <= 0.98 <= with_floor.high
        bare += without.low <= 0.98 <= without.high
        agree += len(set(means)) == 1
    assert bare / 400 < 0.6 and agree / 400 > 0.4
    assert floored / 400 >= 0.95


def test_coverage_where_seeds_differ() -> None:
    rng = np.random.default_rng(1)
    seeds, facts = np.repeat(np.arange(5), 36), np.tile(np.arange(36), 5)
    covered = 0
    for _ in range(400):
        chance = np.clip(rng.normal(0.5, 0.1, (5, 1)), 0, 1)
        items = (rng.random((5, 36)) < chance).astype(float)
        floor = stats.item_variance(items.ravel(), seeds, facts, stats.SHARE)
        interval = stats.seed_interval(items.mean(axis=1), floor, stats.SHARE)
        covered += interval.low <= 0.5 <= interval.high
    assert 0.93 <= covered / 400 <= 0.99


def test_coverage_of_auroc_interval() -> None:
    truth = float(scipy_stats.norm.cdf(1.5 / np.sqrt(2)))
    labels = np.arange(60) < 25
    covered = 0
    for seed in range(300):
        scores = np.random.default_rng(seed).normal(0, 1, 60) + 1.5 * labels
        interval = stats.auroc_interval(labels, scores)
        covered += interval.low <= truth <= interval.high
    assert 0.92 <= covered / 300 <= 0.99


def test_clustered_area_is_the_auroc_within_strata() -> None:
    rng = np.random.default_rng(0)
    labels, clusters = rng.random(200) < 0.4, rng.integers(0, 12, 200)
    scores = np.round(rng.normal(0, 1, 200) + labels, 1)
    one = stats.clustered_area(labels, scores, clusters, np.zeros(200))
    assert one.mean == pytest.approx(roc_auc_score(labels, scores)) and one.n == 12
    # a stratum that raises scores and positives alike is no skill of the score
    strata = rng.integers(0, 2, 200)
    confounded = (rng.random(200) < 0.2 + 0.6 * strata, rng.normal(0, 1, 200) + 3 * strata)
    assert stats.auroc(*confounded) > 0.75
    within = stats.clustered_area(*confounded, clusters, strata)
    parts = [strata == stratum for stratum in (0, 1)]
    areas = [stats.auroc(confounded[0][part], confounded[1][part]) for part in parts]
    pairs = [confounded[0][part].sum() * (~confounded[0][part]).sum() for part in parts]
    assert within.mean == pytest.approx(np.average(areas, weights=pairs))
    assert within.low < 0.5 < within.high


def test_clustered_area_jackknifes_clusters() -> None:
    rng = np.random.default_rng(1)
    labels, clusters = rng.random(90) < 0.5, np.repeat(np.arange(9), 10)
    scores = rng.normal(0, 1, 90) + labels
    interval = stats.clustered_area(labels, scores, clusters, np.zeros(90))
    kept = [clusters != cluster for cluster in range(9)]
    without = [roc_auc_score(labels[k], scores[k]) for k in kept]
    error = np.sqrt(8 * np.var(without))
    floor = stats.auroc_interval(labels, scores).variance
    assert interval.error == pytest.approx(np.sqrt(max(error**2, floor)))
    # nodes of a cluster that repeat each other are no news
    often = np.repeat(np.arange(90), 20)
    again = stats.clustered_area(labels[often], scores[often], clusters[often], np.zeros(1800))
    assert again.error == pytest.approx(error, rel=1e-6)


def test_clustered_area_without_a_class_or_a_second_cluster() -> None:
    none = stats.clustered_area([True, True], [1.0, 2.0], ["a", "b"], [0, 0])
    assert np.isnan(none.mean) and np.isnan(none.low)
    one = stats.clustered_area([True, False], [1.0, 0.0], ["a", "a"], [0, 0])
    assert one.mean == 1 and np.isnan(one.low)
    perfect = stats.clustered_area([True, False] * 5, [1.0, 0.0] * 5, range(10), [0] * 10)
    assert perfect.mean == 1 and perfect.low < 1


def test_coverage_of_clustered_area() -> None:
    """Nodes of an instance share what moves their scores."""
    truth = float(scipy_stats.norm.cdf(1 / np.sqrt(2 * 2)))
    labels, clusters = np.tile(np.arange(8) < 4, 20), np.repeat(np.arange(20), 8)
    covered = 0
    for seed in range(300):
        rng = np.random.default_rng(seed)
        shared = rng.normal(0, 1, (20, 1)).repeat(8, 1).ravel()
        scores = rng.normal(0, 1, 160) + shared + labels
        interval = stats.clustered_area(labels, scores, clusters, np.zeros(160))
        covered += interval.low <= truth <= interval.high
    assert covered / 300 >= 0.92


def test_the_variance_of_a_share_is_never_zero() -> None:
    assert stats.share_variance(0.5, 98) == pytest.approx(0.25 / 100)
    assert stats.share_variance([0.0, 1.0], [10, 10]) == pytest.approx([11 / 12 / 12 / 12] * 2)
