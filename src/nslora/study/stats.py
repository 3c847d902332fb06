"""Intervals and tests from arrays. Pure: no I/O, no torch, no randomness.

Array suffixes: S seeds (runs), B backbones, I items, C clusters of items, N their names, D seeds
that have a value.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats
from sklearn.metrics import roc_auc_score

# Confidence of every interval. A one-sided test at ALPHA agrees with it: what is above its bound has an interval above.
LEVEL = 0.95
ALPHA = (1 - LEVEL) / 2
# With fewer seeds no verdict is given.
LEAST_SEEDS = 3
KIND = "Student's t over seed means, variance floored by the items'"

SHARE = (0.0, 1.0)
DIFFERENCE = (-1.0, 1.0)
AREA = (-0.5, 0.5)

# what tables show of an estimate
ROW = ("mean", "low", "high", "n")

Bounds = tuple[float, float]
Array = NDArray[np.float64]

# Two invented clusters that every sample of items gets, as (value, weight). A share gets one success and one failure;
# a difference gets what that does to both shares it is made of: half a cluster in each cell of the paired 2 x 2 table
# (Agresti and Min 2005). So items that all agree still say no more than their number allows.
INVENTED: dict[Bounds, tuple[tuple[float, float], ...]] = {
    SHARE: ((0.0, 1.0), (1.0, 1.0)),
    DIFFERENCE: ((-1.0, 0.5), (0.0, 1.0), (1.0, 0.5)),
}


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval at LEVEL; NaN where it cannot be had.

    Attributes:
        mean: the estimate.
        error: its standard error.
        df: degrees of freedom of the t distribution.
        n: number of independent units behind it (seeds).
        bounds: the possible range, which the interval does not leave.
    """

    mean: float
    error: float = np.nan
    df: float = np.nan
    n: int = 0
    bounds: Bounds = DIFFERENCE

    @property
    def row(self) -> tuple[float, float, float, int]:
        """Return the numbers of ROW."""
        return self.mean, self.low, self.high, self.n

    @property
    def reach(self) -> float:
        """Return half the width that the interval has before it is clipped."""
        return float(stats.t.ppf((1 + LEVEL) / 2, self.df) * self.error)

    @property
    def low(self) -> float:
        """Return the lower end."""
        # np.maximum keeps NaN, max() would drop it
        return float(np.maximum(self.mean - self.reach, self.bounds[0]))

    @property
    def high(self) -> float:
        """Return the upper end."""
        return float(np.minimum(self.mean + self.reach, self.bounds[1]))

    def p_above(self, bound: float) -> float:
        """Return the one-sided p-value of "the mean is at most `bound`"; NaN without LEAST_SEEDS units."""
        if self.n < LEAST_SEEDS:
            return np.nan
        return float(stats.t.sf((self.mean - bound) / self.error, self.df))

    def below(self, bound: float) -> bool:
        """Tell whether the whole interval, of at least LEAST_SEEDS units, is at most `bound`."""
        return self.n >= LEAST_SEEDS and self.high <= bound


def share_variance(share: ArrayLike, items: ArrayLike) -> Array:
    """Return the sampling variance of a share of `items` independent things, with one success and one failure added."""
    share, items = np.asarray(share, float), np.asarray(items, float)
    # nearer to a half than the share itself
    nearer = (share * items + 1) / (items + 2)
    return nearer * (1 - nearer) / (items + 2)


def item_variance(
    values_I: ArrayLike, seeds_I: ArrayLike, clusters_I: ArrayLike, bounds: Bounds
) -> float:
    """Return the sampling variance of the mean of seed means that comes from the choice of items alone.

    Items of one cluster (a fact in several wordings) count as one thing. With r_c the mean residual of cluster c of
    its seed, C clusters in all, and u over the invented ones of weight w, the variance is
    (sum_c r_c^2 + sum_u w_u (u - mean)^2) / (C + 2)^2, so it is never zero.
    """
    values = np.asarray(values_I, float)
    seeds_D, seed_I = np.unique(np.asarray(seeds_I), return_inverse=True)
    names_N, name_I = np.unique(np.asarray(clusters_I), return_inverse=True)
    # a cluster belongs to one seed: the same name under another seed is another draw
    pairs_C, cluster_I = np.unique(seed_I * len(names_N) + name_I, return_inverse=True)
    seed_C = pairs_C // len(names_N)
    items_D = np.bincount(seed_I)
    clusters_D = np.bincount(seed_C)
    means_D = np.bincount(seed_I, values) / items_D
    # the sum over a cluster, scaled by its seed's items per cluster: the mean residual where clusters are of one size
    sums_C = np.bincount(cluster_I, values - means_D[seed_I])
    residuals_C = sums_C * (clusters_D / items_D)[seed_C]
    mean = means_D.mean()
    invented = sum(weight * (value - mean) ** 2 for value, weight in INVENTED[bounds])
    return float((residuals_C @ residuals_C + invented) / (len(pairs_C) + 2) ** 2)


def seed_interval(means_S: ArrayLike, floor: float = 0.0, bounds: Bounds = DIFFERENCE) -> Interval:
    """Return Student's t-interval of the mean of seed means, n - 1 degrees of freedom; NaN values are left out.

    The variance of the mean is at least `floor`, what the choice of items alone brings: few seeds that agree by chance
    are no certainty. One seed has a mean and no interval, and so have seeds that agree to the last bit without a floor.
    """
    means = np.asarray(means_S, float)
    means = means[~np.isnan(means)]
    if means.size < 2:
        return Interval(
            float(means[0]) if means.size else np.nan,
            n=means.size,
            bounds=bounds,
        )
    # [S] means: their own spread, or that of their items where it is larger
    variance = max(means.var(ddof=1) / means.size, floor)
    error = float(np.sqrt(variance)) if variance > 0 else np.nan
    return Interval(
        float(means.mean()),
        error,
        means.size - 1,
        means.size,
        bounds,
    )


def pooled(strata_B: Sequence[Interval]) -> Interval:
    """Return the mean over strata (backbones), each with all of its seeds and the same weight.

    Degrees of freedom by Welch and Satterthwaite. `n` is the least number of seeds of a stratum; where one has no
    interval, neither has the mean of all.
    """
    if not strata_B:
        return Interval(np.nan)
    variances = np.array([stratum.error**2 for stratum in strata_B])
    dfs = np.array([stratum.df for stratum in strata_B])
    # of a sum of independent means with variances of their own
    df = variances.sum() ** 2 / (variances**2 / dfs).sum()
    return Interval(
        float(np.mean([stratum.mean for stratum in strata_B])),
        float(np.sqrt(variances.sum()) / len(strata_B)),
        float(df),
        min(stratum.n for stratum in strata_B),
        strata_B[0].bounds,
    )


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Return the p-values adjusted for their number (Holm 1979); NaN, not tested, stays, and counts as one of them."""
    tested = sorted((p, key) for key, p in p_values.items() if not np.isnan(p))
    adjusted = dict(p_values)
    # the smallest p-value counts for all tests, the next for all but one; none may fall below an earlier one
    highest = 0.0
    for rank, (p, key) in enumerate(tested):
        highest = max(highest, min(1.0, p * (len(p_values) - rank)))
        adjusted[key] = highest
    return adjusted


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Return the chance that a positive scores higher than a negative, ties half; NaN when a class is missing."""
    labels = np.asarray(labels, bool)
    if labels.all() or not labels.any():
        return np.nan
    return float(roc_auc_score(labels, np.asarray(scores, float)))


@dataclass(frozen=True)
class Area:
    """An AUROC over `n` independent items with its interval; NaN when a class is missing."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def variance(self) -> float:
        """Return the sampling variance that the interval's width stands for."""
        z = stats.norm.ppf((1 + LEVEL) / 2)
        return ((self.high - self.low) / (2 * z)) ** 2


def auroc_interval(labels: ArrayLike, scores: ArrayLike) -> Area:
    """Return the AUROC of independent items with a score interval (Newcombe 2006, part 2, method 5).

    Its ends are the areas A with |auroc - A| = z sqrt(V(A)), V the Hanley-McNeil variance with both class sizes in
    its numerator replaced by their mean.
    """
    area, labels = auroc(labels, scores), np.asarray(labels, bool)
    if np.isnan(area):
        return Area(np.nan, np.nan, np.nan, labels.size)
    z, half_n = stats.norm.ppf((1 + LEVEL) / 2), labels.size / 2 - 1
    # what both roots share
    pairs = labels.sum() * (~labels).sum()

    def excess(a: float) -> float:
        spread = 1 + half_n * ((1 - a) / (2 - a) + a / (1 + a))
        return (area - a) ** 2 - z**2 * a * (1 - a) * spread / pairs

    # an area of exactly 0 or 1 is a root itself, though not the end that is wanted
    inside = 1e-9
    low = cast(float, optimize.brentq(excess, 0, area - inside)) if area > 0 else 0.0
    high = cast(float, optimize.brentq(excess, area + inside, 1)) if area < 1 else 1.0
    return Area(area, low, high, labels.size)


def clustered_area(
    labels_I: ArrayLike, scores_I: ArrayLike, clusters_I: ArrayLike, strata_I: ArrayLike
) -> Interval:
    """Return the AUROC within strata, averaged by pairs, with a jackknife interval over clusters of items.

    Only pairs of one stratum are compared. The variance is at least that of as many independent items (Hanley and
    McNeil, as in `auroc_interval`), so clusters that agree by chance are no certainty.
    """
    labels, scores = np.asarray(labels_I, bool), np.asarray(scores_I, float)
    strata = np.asarray(strata_I)
    _, cluster_I = np.unique(np.asarray(clusters_I), return_inverse=True)
    n = int(cluster_I.max(initial=-1)) + 1
    # pairs that the positive wins, and all pairs; then those that a cluster has a part in
    won, pairs, won_C, pairs_C = 0.0, 0, np.zeros(n), np.zeros(n)
    for stratum in np.unique(strata):
        positive, negative = (strata == stratum) & labels, (strata == stratum) & ~labels
        wins = _wins(scores[positive], scores[negative])
        won, pairs = won + wins.sum(), pairs + positive.sum() * negative.sum()
        won_C += np.bincount(cluster_I[positive], wins, n)
        above = positive.sum() - _wins(scores[negative], scores[positive])
        won_C += np.bincount(cluster_I[negative], above, n)
        for c in np.unique(cluster_I[positive | negative]):
            p, m = positive & (cluster_I == c), negative & (cluster_I == c)
            # a pair within the cluster was counted from both sides
            won_C[c] -= _wins(scores[p], scores[m]).sum()
            pairs_C[c] += p.sum() * negative.sum() + m.sum() * positive.sum() - p.sum() * m.sum()
    if not pairs:
        return Interval(np.nan, n=n, bounds=SHARE)
    left = pairs > pairs_C
    if left.sum() < 2:
        return Interval(won / pairs, n=n, bounds=SHARE)
    without = (won - won_C[left]) / (pairs - pairs_C[left])
    floor = auroc_interval(labels, scores).variance
    error = np.sqrt(max((n - 1) * np.var(without), floor))
    return Interval(won / pairs, float(error), n - 1, n, SHARE)


def _wins(a: Array, b: Array) -> Array:
    """Return for each of a how many of b are below it, equal ones half."""
    ordered = np.sort(b)
    return (np.searchsorted(ordered, a, "left") + np.searchsorted(ordered, a, "right")) / 2
