"""What does an input need: content (weights) or style (prompt)? A classifier on the reward as a single number.

With reward parts given, the need could be read off; where the reward is one number (exact match, own data) it must be
inferred. Features are listed in FEATURES. Labels are counterfactual: which of the two moves, tried on a probe set,
raised this example's reward more. Logistic regression with Platt scaling, stored as JSON.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import pandas as pd

from nslora.types import Need, Scored

FEATURES = ("reward", "nll", "nll_neutral", "confidence", "recall", "log_length_ratio", "shape")


def features(
    scored: Sequence[Scored], nll: Sequence[float], nll_neutral: Sequence[float]
) -> np.ndarray:
    """Feature matrix [N, F] in the order of FEATURES.

    `nll` and `nll_neutral` are the gold answer's mean negative log-likelihoods (nats per token) under the current
    candidate and under the neutral prompt. `recall` is the share of gold words in the output, `shape` the distance
    between the character-class shares of output and gold.
    """
    rows = [
        (
            s.reward.value,
            a,
            b,
            s.confidence,
            recall(s),
            length_ratio(s),
            shape_distance(s.output, s.example.answer),
        )
        for s, a, b in zip(scored, nll, nll_neutral, strict=True)
    ]
    return np.array(rows, dtype=float).reshape(-1, len(FEATURES))


def words(text: str) -> list[str]:
    """Lower-case words."""
    return re.findall(r"\w+", text.lower())


def recall(s: Scored) -> float:
    """Share of the gold answer's words that occur in the output."""
    gold, seen = words(s.example.answer), set(words(s.output))
    return sum(w in seen for w in gold) / max(len(gold), 1)


def length_ratio(s: Scored) -> float:
    """log of output length over gold length, in words (each plus one)."""
    return math.log((len(words(s.output)) + 1) / (len(words(s.example.answer)) + 1))


def shape_distance(a: str, b: str) -> float:
    """Half the L1 distance, in [0, 1], between the shares of upper, lower, digit, space and other characters."""
    return float(np.abs(character_classes(a) - character_classes(b)).sum() / 2)


def character_classes(text: str) -> np.ndarray:
    """Shares [5] of upper case, lower case, digits, white space and other characters; zeros for an empty text."""
    tests = (str.isupper, str.islower, str.isdigit, str.isspace)
    counts = np.array([sum(map(test, text)) for test in tests], dtype=float)
    return np.append(counts, len(text) - counts.sum()) / max(len(text), 1)


def counterfactual(
    before: Sequence[Scored], numerical: Sequence[Scored], symbolic: Sequence[Scored]
) -> np.ndarray:
    """Labels [N]: 1 where the numerical move raised the reward more, 0 where the symbolic one did.

    nan where neither raised it, or both did equally: a move that only did less harm is no need.
    """
    if not len(before) == len(numerical) == len(symbolic):
        raise ValueError("one scored row per example and move is needed")
    start, weights, prompts = (
        np.array([s.reward.value for s in rows]) for rows in (before, numerical, symbolic)
    )
    by_weights, by_prompts = np.maximum(weights - start, 0), np.maximum(prompts - start, 0)
    return np.where(by_weights == by_prompts, math.nan, (by_weights > by_prompts).astype(float))


@dataclass(frozen=True)
class NeedClassifier:
    """P(content) = sigmoid(weights . (x - mean) / scale + bias); each field one float per feature, but `bias`."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float

    def p_content(self, x: np.ndarray) -> np.ndarray:
        """Probability [N] that an example needs content rather than style, from features [N, F]."""
        z = (x - np.array(self.mean)) / np.array(self.scale)
        return 1 / (1 + np.exp(-(z @ np.array(self.weights) + self.bias)))

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(
            json.dumps({"features": FEATURES, **asdict(self)}, indent=1) + "\n", encoding="utf-8"
        )

    @classmethod
    def parse(cls, text: str) -> NeedClassifier:
        """Read what `save` wrote; ValueError when it was made for other features."""
        data = json.loads(text)
        if tuple(data.pop("features")) != FEATURES:
            raise ValueError("this need classifier was trained on other features")
        return cls(
            tuple(data["mean"]), tuple(data["scale"]), tuple(data["weights"]), float(data["bias"])
        )

    @classmethod
    def default(cls) -> NeedClassifier:
        """The classifier that ships with the package, trained on the probe runs in results/classifier/."""
        return cls.parse((files("nslora.algorithm") / "needs.json").read_text(encoding="utf-8"))


def probes(folder: Path) -> pd.DataFrame:
    """The labelled rows of every probe in `folder` (columns FEATURES, label, fact and more); empty without probes."""
    frames = [pd.read_csv(path) for path in sorted(folder.glob("probe-*.csv"))]
    return (
        pd.concat(frames).dropna(subset=["label"])
        if frames
        else pd.DataFrame(columns=[*FEATURES, "label", "fact"])
    )


def out_of_fold(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Decision values [N] of logistic regressions that did not see the row's group (a fact)."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(
        StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000)
    )
    folds = GroupKFold(n_splits=min(5, len(set(groups))))
    return cross_val_predict(model, x, y, groups=groups, cv=folds, method="decision_function")


def fit(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> NeedClassifier:
    """Fit on features [N, F] and labels [N] in {0, 1}; Platt's slope and intercept come from out-of-fold values.

    Raises ValueError unless both labels occur.
    """
    from sklearn.linear_model import LogisticRegression

    if len(set(y)) < 2:
        raise ValueError("the probe made only one kind of label, so there is nothing to classify")
    mean, scale = x.mean(0), np.where(x.std(0) > 0, x.std(0), 1.0)
    model = LogisticRegression(class_weight="balanced", max_iter=1000).fit((x - mean) / scale, y)
    platt = LogisticRegression().fit(out_of_fold(x, y, groups)[:, None], y)
    slope, intercept = float(platt.coef_[0, 0]), float(platt.intercept_[0])
    weights = tuple(float(w) * slope for w in model.coef_[0])
    bias = float(model.intercept_[0]) * slope + intercept
    return NeedClassifier(tuple(mean.tolist()), tuple(scale.tolist()), weights, bias)


def told(scored: Sequence[Scored]) -> np.ndarray:
    """Hidden labels as P(content) [N] for `oracle`: what needs both needs content until that is right."""
    return np.array(
        [
            float(
                s.example.need is Need.CONTENT
                or (s.example.need is Need.BOTH and s.reward.content < 1)
            )
            for s in scored
        ]
    )


def demand(scored: Sequence[Scored], p_content: np.ndarray) -> dict[str, float]:
    """Shares of all examples that fail and need content, or style."""
    failing = np.array([s.reward.success < 1 for s in scored])
    content = p_content >= 0.5
    return {
        "content": float(np.mean(failing & content)),
        "style": float(np.mean(failing & ~content)),
    }
