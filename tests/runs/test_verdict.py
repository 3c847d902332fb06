"""Is it better: the interval keeps its promise, and the sentence says what the numbers say."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, multinomial

from nslora.runs.verdict import DIFFERENCE, Estimate, Verdict, estimate

pytestmark = pytest.mark.pure


def compared(difference: Estimate, **changes) -> Verdict:
    cells = {"tuned+initial": 0.5, "tuned+final": 0.75, "frozen+initial": 0.25, "frozen+final": 0.0}
    content = {"measure": "success", "before": 0.25, "after": 0.75, "factorial": cells}
    content |= {"kept": {"locality": (0.5, 40)}, "changed": True} | changes
    return Verdict(difference=difference, **content)


@pytest.mark.parametrize("n", [2, 5, 8, 12, 30])
@pytest.mark.parametrize("discordant", [0.05, 0.2, 0.5, 1.0])
def test_a_model_that_is_no_better_seldom_counts_as_better(n: int, discordant: float) -> None:
    """Over all outcomes of n rows of which as many are won as lost on average; promised are 2.5%."""
    chances = [discordant / 2, discordant / 2, 1 - discordant]
    wrong = 0.0
    for won in range(n + 1):
        for lost in range(n + 1 - won):
            rows = [1] * won + [-1] * lost + [0] * (n - won - lost)
            if estimate(rows, DIFFERENCE).low > 0:
                wrong += multinomial.pmf([won, lost, n - won - lost], n, chances)
    assert wrong < 0.04


@pytest.mark.parametrize("n", [2, 5, 8, 20, 40])
@pytest.mark.parametrize("share", [0.02, 0.1, 0.3, 0.5, 0.9])
def test_the_interval_of_a_share_holds_it_as_often_as_promised(n: int, share: float) -> None:
    estimates = [estimate([1] * k + [0] * (n - k)) for k in range(n + 1)]
    inside = [k for k, e in enumerate(estimates) if e.low <= share <= e.high]
    assert binom.pmf(inside, n, share).sum() > 0.92


def test_rows_that_agree_leave_a_doubt_that_shrinks() -> None:
    few, many = (estimate([1.0] * n, DIFFERENCE) for n in (8, 80))
    assert few.mean == many.mean == 1.0
    assert 0 < few.low < many.low < 1
    assert estimate([1.0] * 3, DIFFERENCE).low < 0
    assert math.isnan(estimate([1.0]).low)


def test_fractions_have_intervals_of_their_own_spread() -> None:
    rng = np.random.default_rng(0)
    tight = estimate(list(0.5 + 0.01 * rng.standard_normal(50)))
    wide = estimate([0.0, 1.0] * 25)
    assert tight.high - tight.low < (wide.high - wide.low) / 2


@pytest.mark.parametrize(
    ("low", "high", "words", "better"),
    [
        (0.1, 0.9, "better: ", True),
        (-0.1, 0.9, "not shown to be better: ", False),
        (0.0, 0.9, "not shown to be better: ", False),
        (-0.9, -0.1, "worse: ", False),
    ],
)
def test_the_sentence_says_what_the_interval_says(low, high, words, better) -> None:
    verdict = compared(Estimate(0.5, low, high, 12))
    assert verdict.better is better
    assert verdict.sentence == (
        f"{words}share right 0.25 before, 0.75 after on the same 12 test rows, difference +0.50 "
        f"(95% interval {low:.2f} to {high:.2f})."
    )
    assert verdict.metrics["better"] is better and verdict.metrics["verdict"] == verdict.sentence
    assert "| frozen weights | 0.25 | 0.00 |" in verdict.card
    assert "50% of 40 known questions still answered" in verdict.card


def test_nothing_that_was_kept_is_never_better() -> None:
    verdict = compared(Estimate(0.5, 0.1, 0.9, 12), changed=False, kept={})
    assert not verdict.better
    assert verdict.sentence.startswith("not better: nothing that was tried beat the start")
    assert verdict.forgotten.endswith("nothing to forget.")
