"""Answer "is it better?": the start and the adapted model on the same test rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from nslora.config import RunConfig
from nslora.runs.store import read_json, read_scores
from nslora.tasks import graders
from nslora.types import Json

# confidence of every interval
LEVEL = 0.95
# Two invented rows, as (value, weight), so that rows that all agree say no more than their number
# allows: of a share a success and a failure, of a difference half a row in each cell of the paired
# table (Agresti and Min 2005).
SHARE = ((0.0, 1.0), (1.0, 1.0))
DIFFERENCE = ((-1.0, 0.5), (0.0, 1.0), (1.0, 0.5))
# what a number is the mean of
WORDS = {"success": "share right", "value": "mean reward"}


@dataclass(frozen=True)
class Estimate:
    """A mean over n rows, and its interval; NaN for the ends where there is one row only."""

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Return the interval in words."""
        return f"{LEVEL:.0%} interval {self.low:.2f} to {self.high:.2f}"


def estimate(values: Sequence[float], invented: Sequence[tuple[float, float]] = SHARE) -> Estimate:
    """Return the mean of (n,) values with Student's t interval, n - 1 degrees of freedom.

    The interval is that of the n rows and the invented ones, n + 2 in weight, with m their mean:
    m +- t sqrt(sum w (v - m)^2) / (n + 2). It has no width of zero.
    """
    # takes a third of a second to import, for which no other command should wait
    from scipy.special import stdtrit

    n = len(values)
    rows = np.concatenate([values, [value for value, _ in invented]])
    weights = np.concatenate([np.ones(n), [weight for _, weight in invented]])
    centre = np.average(rows, weights=weights)
    spread = weights @ (rows - centre) ** 2
    # NaN for one row
    reach = stdtrit(n - 1, (1 + LEVEL) / 2) * np.sqrt(spread) / weights.sum()
    low, high = np.clip((centre - reach, centre + reach), invented[0][0], invented[-1][0])
    return Estimate(float(np.mean(values)), float(low), float(high), n)


def measure(grader: str) -> str:
    """Return what rows are compared by: "value" where a function gives it, else "success"."""
    return "value" if grader.startswith(f"{graders.FUNCTION}:") else "success"


@dataclass(frozen=True)
class Verdict:
    """Whether the adapted model is better than the frozen weights under the start prompt.

    Attributes:
        measure: of a row, "success" or "value".
        before, after: its means over the test rows.
        difference: of the same rows, after less before.
        factorial: the means of {frozen, tuned} weights x {initial, final} prompt.
        kept: what is kept of what the frozen weights could do: (share, n) of known questions
            ("locality") and of rules that are told ("promptability").
        changed: whether any move was kept.
    """

    measure: str
    before: float
    after: float
    difference: Estimate
    factorial: Mapping[str, float]
    kept: Mapping[str, tuple[float, int]]
    changed: bool

    @classmethod
    def of(cls, cfg: RunConfig, record: Path, changed: bool) -> Self:
        """Compare the test rows of a finished record."""
        by = measure(cfg.grader)
        receipt = read_json(record / "run.json")
        before, after = (_rows(record, split, by) for split in ("frozen+initial", "test"))
        differences = [after[row] - before[row] for row in before]
        abilities = {"locality": "success", "promptability": "style"}
        final = receipt["final"]
        return cls(
            by,
            float(np.mean([*before.values()])),
            float(np.mean([*after.values()])),
            estimate(differences, DIFFERENCE),
            {cell: means[by] for cell, means in receipt["factorial"].items()},
            {
                ability: (final[ability][part], final[ability]["n"])
                for ability, part in abilities.items()
                if ability in final
            },
            changed,
        )

    @property
    def better(self) -> bool:
        """Whether the whole interval of the difference is above 0."""
        return self.changed and self.difference.low > 0

    @property
    def sentence(self) -> str:
        """The verdict in a sentence."""
        n, what = self.difference.n, WORDS[self.measure]
        if not self.changed:
            start = f"{what} {self.before:.2f} on {n} test rows"
            return f"not better: nothing that was tried beat the start, which stays ({start})."
        words = "not shown to be better"
        if self.better:
            words = "better"
        elif self.difference.high < 0:
            words = "worse"
        shares = (
            f"{what} {self.before:.2f} before, {self.after:.2f} after on the same {n} test rows"
        )
        return f"{words}: {shares}, difference {self.difference.mean:+.2f} ({self.difference})."

    @property
    def metrics(self) -> Json:
        """All of it as JSON."""
        return {**asdict(self), "better": self.better, "verdict": self.sentence}

    @property
    def card(self) -> str:
        """The verdict as a section of Markdown."""
        cells = {cell: f"{mean:.2f}" for cell, mean in self.factorial.items()}
        lines = [
            "## Is it better?",
            "",
            f"{self.sentence[:1].upper()}{self.sentence[1:]}",
            "",
            f"| {WORDS[self.measure]} | start prompt | adapted prompt |",
            "| --- | --: | --: |",
        ]
        for weights in ("frozen", "tuned"):
            row = " | ".join(cells[f"{weights}+{prompt}"] for prompt in ("initial", "final"))
            lines.append(f"| {weights} weights | {row} |")
        return "\n".join([*lines, "", self.forgotten, ""])

    @property
    def forgotten(self) -> str:
        """What was forgotten, in a sentence."""
        words = {"locality": "known questions still answered", "promptability": "rules still kept"}
        kept = [f"{share:.0%} of {n} {words[name]}" for name, (share, n) in self.kept.items()]
        return f"Of what the frozen model could do: {'; '.join(kept) or 'nothing to forget'}."


def _rows(record: Path, split: str, by: str) -> dict[str, Any]:
    """Return a measure of the rows of a split, by id."""
    return {name: row[by] for name, row in read_scores(record, split).items()}
