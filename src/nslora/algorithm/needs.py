"""What does an input need: content, or style?

An estimator gives P(content) for every training example. It may look at the question, the gold
answer, the reply, and what the reward says of any text as one number; only `hidden` (the oracle's)
and `parts` look further. The estimators are interchangeable: ESTIMATORS, at the end.

The classifier is a logistic regression with Platt scaling on FEATURES, stored as JSON. Its labels
are counterfactual: which of the two moves, tried on a probe set, raised the example's reward more.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import TypeAdapter

from nslora.types import Need, Scored

if TYPE_CHECKING:  # the study wing reads this module without torch
    from sklearn.pipeline import Pipeline

    from nslora.algorithm.session import Session, State

FEATURES = (
    "reward",
    "nll",
    "nll_neutral",
    "mean_logprob",
    "recall",
    "log_length_ratio",
    "shape",
)


@dataclass(frozen=True)
class Needs:
    """Estimated needs of N training examples.

    Attributes:
        failing: [N] whether the reward of the current reply is not fully satisfied.
        p_content: [N] probability that the example needs content rather than style; None when
            nobody can tell, and both kinds of move are for all examples.
        follows: share of told rules that the frozen backbone obeys; None when nobody can tell.
    """

    failing: np.ndarray
    p_content: np.ndarray | None = None
    follows: float | None = None

    @property
    def demand(self) -> dict[str, float]:
        """Shares of all examples that fail and need content, or style; empty when nobody can tell."""
        if self.p_content is None:
            return {}
        content = self.p_content >= 0.5
        return {
            "content": float(np.mean(self.failing & content)),
            "style": float(np.mean(self.failing & ~content)),
        }

    @property
    def content(self) -> float:
        """Share of all examples that fail and need content; 0 when nobody can tell."""
        return self.demand.get("content", 0.0)

    @property
    def style(self) -> float:
        """Share of all examples that fail and need style; 0 when nobody can tell."""
        return self.demand.get("style", 0.0)

    def for_weights(self) -> np.ndarray:
        """Return [N] whether an example is for the weights where a method's `inputs` are "needed".

        It fails and needs content.
        """
        if self.p_content is None:
            return np.ones_like(self.failing)
        return self.failing & (self.p_content >= 0.5)

    def for_prompt(self) -> np.ndarray:
        """Return [N] whether an example is for the prompt: it fails and needs style.

        All failing examples, if nobody can tell or none needs style.
        """
        if self.p_content is None:
            return self.failing
        style = self.failing & (self.p_content < 0.5)
        return style if style.any() else self.failing


def features(
    scored: Sequence[Scored],
    nll: Sequence[float],
    nll_neutral: Sequence[float],
) -> np.ndarray:
    """Return the feature matrix [N, F] in the order of FEATURES.

    `nll` and `nll_neutral` are the gold answer's mean negative log-likelihoods (nats per token)
    under the current candidate and under the initial prompt. `recall` is the share of gold words in
    the reply, `shape` the distance between the character-class shares of reply and gold answer.
    """
    rows = [
        (
            s.reward.value,
            current,
            neutral,
            s.mean_logprob,
            recall(s),
            length_ratio(s),
            shape_distance(s.output, s.example.answer),
        )
        for s, current, neutral in zip(scored, nll, nll_neutral, strict=True)
    ]
    # one row per example, F columns
    return np.array(rows, dtype=float).reshape(-1, len(FEATURES))


def words(text: str) -> list[str]:
    """Return lower-case words."""
    return re.findall(r"\w+", text.lower())


def recall(s: Scored) -> float:
    """Return the share of the gold answer's words that occur in the reply."""
    gold, reply = words(s.example.answer), set(words(s.output))
    return sum(word in reply for word in gold) / max(len(gold), 1)


def length_ratio(s: Scored) -> float:
    """Return the log of reply length over gold length, in words (each plus one)."""
    return math.log(
        (len(words(s.output)) + 1) / (len(words(s.example.answer)) + 1)
    )


def shape_distance(a: str, b: str) -> float:
    """Return half the L1 distance, in [0, 1], between the character-class shares of two texts."""
    return float(np.abs(character_classes(a) - character_classes(b)).sum() / 2)


def character_classes(text: str) -> np.ndarray:
    """Return the shares [5] of upper case, lower case, digits, white space and other characters.

    Zeros for an empty text.
    """
    tests = (str.isupper, str.islower, str.isdigit, str.isspace)
    counts = np.array([sum(map(test, text)) for test in tests], dtype=float)
    return np.append(counts, len(text) - counts.sum()) / max(len(text), 1)


def counterfactual(
    before: Sequence[Scored],
    numerical: Sequence[Scored],
    symbolic: Sequence[Scored],
) -> np.ndarray:
    """Return labels [N]: 1 where the numerical move raised the reward more, 0 where the symbolic did.

    nan where neither raised it, or both did equally: a move that only did less harm is no need.
    """
    if not len(before) == len(numerical) == len(symbolic):
        raise ValueError("one scored row per example and move is needed")
    # rewards [N] before, and after each kind of move
    start, *after = (
        np.array([s.reward.value for s in rows])
        for rows in (before, numerical, symbolic)
    )
    # a loss is no gain of the other kind
    by_weights, by_prompts = np.maximum(np.array(after) - start, 0)
    labels = (by_weights > by_prompts).astype(float)
    return np.where(by_weights == by_prompts, math.nan, labels)


@dataclass(frozen=True)
class NeedClassifier:
    """P(content) = sigmoid(weights . (x - mean) / scale + bias); each field one float per feature, but `bias`."""

    mean: tuple[float, ...]
    scale: tuple[float, ...]
    weights: tuple[float, ...]
    bias: float
    features: tuple[str, ...] = FEATURES

    def p_content(self, x: np.ndarray) -> np.ndarray:
        """Return the probability [N] that an example needs content rather than style, from features [N, F]."""
        # [N, F] standardised, then [N]
        z = (x - np.array(self.mean)) / np.array(self.scale)
        return 1 / (1 + np.exp(-(z @ np.array(self.weights) + self.bias)))

    def save(self, path: Path) -> None:
        """Write as JSON."""
        path.write_bytes(TypeAdapter(NeedClassifier).dump_json(self, indent=1))

    @classmethod
    def parse(cls, text: str) -> NeedClassifier:
        """Read what `save` wrote; ValueError when it was made for other features."""
        model = TypeAdapter(cls).validate_json(text)
        if model.features != FEATURES:
            raise ValueError(
                "this need classifier was trained on other features"
            )
        return model

    @classmethod
    @cache
    def default(cls) -> NeedClassifier:
        """Return the classifier that ships with the package, trained on the probe runs in results/classifier/."""
        return cls.parse(
            (files("nslora.algorithm") / "needs.json").read_text(
                encoding="utf-8"
            )
        )


def probes(folder: Path) -> pd.DataFrame:
    """Return the labelled rows of every probe in `folder` (FEATURES, label, fact and more)."""
    frames = [pd.read_csv(path) for path in sorted(folder.glob("probe-*.csv"))]
    return (
        pd.concat(frames).dropna(subset=["label"])
        if frames
        else pd.DataFrame(columns=[*FEATURES, "label", "fact"])
    )


def out_of_fold(
    x: np.ndarray, y: np.ndarray, groups: np.ndarray
) -> np.ndarray | None:
    """Return decision values [N] of fits that did not see the row's group.

    None where a label occurs in fewer than two groups.
    """
    from sklearn.model_selection import (
        StratifiedGroupKFold,
        cross_val_predict,
    )

    # both labels in every fold, as far as there are groups of each
    rarest = min(len(set(groups[y == label])) for label in set(y))
    if rarest < 2:
        return None
    folds = StratifiedGroupKFold(n_splits=min(5, rarest))
    return cross_val_predict(
        _regression(),
        x,
        y,
        groups=groups,
        cv=folds,
        method="decision_function",
    )


def _regression() -> Pipeline:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    # both classes count alike, however rare one is
    return make_pipeline(
        StandardScaler(),
        LogisticRegression(class_weight="balanced", max_iter=1000),
    )


def fit(x: np.ndarray, y: np.ndarray, groups: np.ndarray) -> NeedClassifier:
    """Fit on features [N, F] and labels [N] in {0, 1}; Platt's slope and intercept come from out-of-fold values.

    Raises ValueError unless both labels occur.
    """
    from sklearn.linear_model import LogisticRegression

    if len(set(y)) < 2:
        raise ValueError(
            "the probe made only one kind of label, so there is nothing to classify"
        )
    scaler, model = _regression().fit(x, y)
    # Platt's scale comes from rows that their fit had not seen; without any,
    # the values stay as they are
    slope, intercept = 1.0, 0.0
    values = out_of_fold(x, y, groups)
    if values is not None:
        platt = LogisticRegression().fit(values[:, None], y)
        slope, intercept = platt.coef_.item(), platt.intercept_.item()
    return NeedClassifier(
        # [F] each
        tuple(scaler.mean_.tolist()),
        tuple(scaler.scale_.tolist()),
        tuple((model.coef_[0] * slope).tolist()),
        model.intercept_.item() * slope + intercept,
    )


def describe(run: Session, state: State) -> np.ndarray:
    """Return the features [N, F] of the training rows, for the weights that are in place."""
    examples = [s.example for s in state.train]
    nll = run.nll(state.candidate.prompt, examples)
    neutral = run.nll(run.task.initial_prompt, examples)
    return features(state.train, nll, neutral)


def _needs(
    run: Session, state: State, p_content: Sequence[float] | np.ndarray
) -> Needs:
    return Needs(_failing(state), np.array(p_content), run.follows)


def _failing(state: State) -> np.ndarray:
    return np.array([s.reward.success < 1 for s in state.train])


def none(run: Session, state: State) -> Needs:
    """Nobody can tell."""
    return Needs(_failing(state))


def classifier(run: Session, state: State) -> Needs:
    """Ask the trained classifier that ships with the package."""
    model = NeedClassifier.default()
    return _needs(run, state, model.p_content(describe(run, state)))


def by_recall(run: Session, state: State) -> Needs:
    """An example needs content as far as the gold answer's words are not in the reply."""
    return _needs(run, state, [1 - recall(s) for s in state.train])


def asked(run: Session, state: State) -> Needs:
    """Compare the reward of the reply with that of the bare gold answer.

    A gold answer that satisfies the reward, in a sentence too, asks for no form: what fails is
    content. Where the gold answer lacks a form, a reply that is worth less lacks the content too.
    Else the words tell.
    """

    def lacks_content(s: Scored) -> bool:
        gold = run.gold_reward(s.example)
        if gold.success:
            return not run.asks_bare(s.example)
        return s.reward.value < gold.value

    p_content = [
        1.0 if lacks_content(s) else 1 - recall(s) for s in state.train
    ]
    return _needs(run, state, p_content)


def constant(run: Session, state: State) -> Needs:
    """Know nothing: one half for every example, which counts as content."""
    return _needs(run, state, np.full(len(state.train), 0.5))


def random(run: Session, state: State) -> Needs:
    """Guess: a uniform number for every example, other ones in every run and at every move."""
    rng = run.cfg.own_rng(f"needs {len(state.moves)}")
    return _needs(run, state, rng.random(len(state.train)))


def by_parts(run: Session, state: State) -> Needs:
    """Read the needs off a reward that comes in parts (`reward = "parts"`): content first."""
    return _needs(
        run, state, [float(s.reward.parts["content"] < 1) for s in state.train]
    )


def hidden(run: Session, state: State) -> Needs:
    """Read the hidden labels: the oracle. What needs both needs content until that is right."""
    p_content = []
    for s in state.train:
        # the only place that reads a label
        need = run.task.hidden[s.example.id].need
        wrong = run.task.reward(s.example, s.output).parts["content"] < 1
        lacks = need is Need.CONTENT or (need is Need.BOTH and wrong)
        p_content.append(float(lacks))
    return _needs(run, state, p_content)


ESTIMATORS: dict[str, Callable[[Session, State], Needs]] = {
    "none": none,
    "classifier": classifier,
    "recall": by_recall,
    "asked": asked,
    "constant": constant,
    "random": random,
    "parts": by_parts,
    "hidden": hidden,
}
