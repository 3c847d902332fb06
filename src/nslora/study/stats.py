"""Intervals and paired comparisons from one array. Pure: no I/O, no torch, and randomness is an argument.

Array suffixes: S seeds (runs), I items (or tasks), D bootstrap draws. NaN marks an item that a seed does not have.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

LEVEL = 0.95  # confidence of every interval
FEW_SEEDS = 10  # below this a percentile bootstrap is overconfident, so a t-interval is used
LEAST_SEEDS = 3  # below this no verdict is given

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval at LEVEL; NaN where it cannot be had.

    Attributes:
        n: number of independent units behind it (seeds; items for `auroc_interval`).
        kind: how it was made, in words for a caption.
    """

    mean: float
    low: float
    high: float
    n: int
    kind: str

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2


def t_interval(values_S: ArrayLike) -> Interval:
    """Student's t-interval of a mean, n - 1 degrees of freedom. One value has no interval; NaN values are left out.

    The width is zero when all values agree: it then says nothing about the spread of other seeds.
    """
    values = np.asarray(values_S, float)
    values, kind = values[~np.isnan(values)], "t-interval on seed means"
    if values.size < 2:
        return Interval(
            float(values[0]) if values.size else np.nan, np.nan, np.nan, values.size, kind
        )
    half = stats.t.ppf((1 + LEVEL) / 2, values.size - 1) * values.std(ddof=1) / np.sqrt(values.size)
    mean = float(values.mean())
    return Interval(mean, float(mean - half), float(mean + half), values.size, kind)


def _rows(scores_S_I: ArrayLike) -> list[Array]:
    """The known scores of each seed that has any."""
    rows = (row[~np.isnan(row)] for row in np.atleast_2d(np.asarray(scores_S_I, float)))
    return [row for row in rows if row.size]


def seed_means(scores_S_I: ArrayLike) -> Array:
    """Mean over items of each seed that has any, shape (S,) or shorter."""
    return np.array([row.mean() for row in _rows(scores_S_I)])


def hierarchical_bootstrap(
    scores_S_I: ArrayLike, rng: np.random.Generator, draws: int = 2000
) -> Interval:
    """Percentile interval of the mean of seed means: seeds are resampled, then items within each drawn seed."""
    rows = _rows(scores_S_I)
    means_D_S = np.empty((draws, len(rows)))
    for position in range(len(rows)):
        drawn_D = rng.integers(len(rows), size=draws)
        for seed, row in enumerate(rows):
            here = drawn_D == seed
            means_D_S[here, position] = rng.choice(row, (here.sum(), row.size)).mean(axis=1)
    low, high = np.quantile(means_D_S.mean(axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    mean = float(np.mean([row.mean() for row in rows]))
    return Interval(mean, float(low), float(high), len(rows), "bootstrap over seeds, then items")


def seed_interval(scores_S_I: ArrayLike, rng: np.random.Generator) -> Interval:
    """Interval of the mean of seed means: Student's t below FEW_SEEDS seeds, else the hierarchical bootstrap."""
    means = seed_means(scores_S_I)
    return t_interval(means) if means.size < FEW_SEEDS else hierarchical_bootstrap(scores_S_I, rng)


def paired_difference(a_S_I: ArrayLike, b_S_I: ArrayLike, rng: np.random.Generator) -> Interval:
    """Interval of the mean of a - b, paired by seed and item; an item that either lacks is left out."""
    return seed_interval(np.asarray(a_S_I, float) - np.asarray(b_S_I, float), rng)


def iqm(scores: ArrayLike) -> float:
    """Interquartile mean: the mean without the lowest and the highest quarter (Agarwal et al. 2021)."""
    return float(stats.trim_mean(np.asarray(scores, float).ravel(), 0.25))


def auroc(labels: ArrayLike, scores: ArrayLike) -> float:
    """Chance that a positive scores higher than a negative, ties counting half; NaN when a class is missing."""
    labels, scores = np.asarray(labels, bool), np.asarray(scores, float)
    positive, negative = int(labels.sum()), int((~labels).sum())
    if not positive or not negative:
        return np.nan
    rank_sum = stats.rankdata(scores)[labels].sum()
    return float((rank_sum - positive * (positive + 1) / 2) / (positive * negative))


def auroc_interval(labels: ArrayLike, scores: ArrayLike) -> Interval:
    """AUROC of independent items with a score interval (Newcombe 2006, part 2, method 5): never of zero width.

    Its ends are the areas A with |auroc - A| = z sqrt(V(A)), V the Hanley-McNeil variance with both class sizes in
    its numerator replaced by their mean.
    """
    area, labels = auroc(labels, scores), np.asarray(labels, bool)
    kind = "score interval over items (Newcombe)"
    if np.isnan(area):
        return Interval(np.nan, np.nan, np.nan, labels.size, kind)
    z, half_n = stats.norm.ppf((1 + LEVEL) / 2), labels.size / 2 - 1

    def excess(a: float) -> float:
        spread = 1 + half_n * ((1 - a) / (2 - a) + a / (1 + a))
        return (area - a) ** 2 - z**2 * a * (1 - a) * spread / (labels.sum() * (~labels).sum())

    inside = 1e-9  # an area of exactly 0 or 1 is a root itself, though not the end sought
    low = cast(float, optimize.brentq(excess, 0, area - inside)) if area > 0 else 0.0
    high = cast(float, optimize.brentq(excess, area + inside, 1)) if area < 1 else 1.0
    return Interval(area, low, high, labels.size, kind)


def verdict(interval: Interval, least: float = 0.0) -> str:
    """Does the estimate exceed `least`? "holds", "fails" or, when the interval covers it, "undecided".

    Fewer than LEAST_SEEDS units, or no interval, is undecided.
    """
    if interval.n < LEAST_SEEDS or np.isnan(interval.half) or interval.low <= least < interval.high:
        return "undecided"
    return "holds" if interval.low > least else "fails"
