"""The unified monitoring signal: how much each kind of move still improves things, on one scale.

The paper's equations: C1 = (L_t - L_{t-1}) / L_{t-1} and C2 = ||grad L_t||. The symbolic gain, the
reading of "small", patience and the way back are our choice. Pure functions of a run's history.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from nslora.config import RunConfig
from nslora.types import LETTERS, Move, Scored, Signal, StepRecord

if TYPE_CHECKING:  # the study wing reads this module without torch
    from nslora.algorithm.session import Losses, Outcome, PairKey, State


# below it, means of the same rewards differ by their last bits
ROUNDING = 1e-9


def mean_value(scored: Sequence[Scored]) -> float:
    """Return the mean reward."""
    return sum(s.reward.value for s in scored) / len(scored)


def summary(scored: Sequence[Scored]) -> dict[str, float]:
    """Return the mean success and reward value, and the number of rows."""
    success = sum(s.reward.success for s in scored) / len(scored)
    return {"success": success, "value": mean_value(scored), "n": len(scored)}


def relative_change(new: float, old: float) -> float:
    """Return (new - old) / old, for positive quantities; 0 when both are 0."""
    if old == 0:
        if new == 0:
            return 0.0
        return float("inf")
    return (new - old) / old


def loss_change(now: Losses, before: Losses) -> float | None:
    """Return C1 of the pairs that both epochs trained on; None if they share none.

    L is the mean negative log-likelihood per answer token, in nats. Comparing the same pairs makes a
    change mean learning: newly chosen facts, other targets and another prompt are other pairs, and
    replay is in neither.
    """
    # a pair is prompt, question and target: a changed one of them is another
    shared = [pair for pair in now if pair in before]
    if not shared:
        return None
    return relative_change(mean_nll(now, shared), mean_nll(before, shared))


def mean_nll(losses: Losses, pairs: Iterable[PairKey] | None = None) -> float:
    """Return the mean negative log-likelihood per answer token (nats) of pairs; nan without any."""
    pairs = list(losses if pairs is None else pairs)
    nll = sum(losses[pair][0] for pair in pairs)
    tokens = sum(losses[pair][1] for pair in pairs)
    if not tokens:
        return float("nan")
    return nll / tokens


def gain(new: float, old: float, n: int) -> float:
    """Return the relative improvement of a mean reward over n items.

    The floor 1/n keeps a start at zero finite.
    """
    return (new - old) / max(old, 1 / n)


def mean_change(
    new: Sequence[Scored], old: Sequence[Scored]
) -> tuple[float, float]:
    """Return the mean change of reward per item, and its standard error; the error of a single item is 0."""
    pairs = zip(new, old, strict=True)
    changes = [
        after.reward.value - before.reward.value for after, before in pairs
    ]
    n = len(changes)
    error = float(np.std(changes, ddof=1)) / n**0.5 if n > 1 else 0.0
    return sum(changes) / n, error


def after(
    state: State, move: Move, outcome: Outcome, dev: Sequence[Scored]
) -> Signal:
    """Return the signal after a move that took `state` to `outcome`, whose scored rows are `dev`."""
    if move is Move.NUMERICAL:
        c1 = loss_change(outcome.memory.losses, state.memory.losses)
        return Signal(c1=c1, c2=outcome.evidence["grad_norm"])
    return Signal(gain=gain(mean_value(dev), mean_value(state.dev), len(dev)))


def is_small(signal: Signal, cfg: RunConfig) -> bool:
    """Tell whether a numerical signal says "saturated": C1 > -c1_eps, or C2 < c2_eps.

    Signed on purpose: a rising loss is saturated too.
    """
    # a vanishing gradient needs no second epoch to compare with
    if signal.c2 is not None and signal.c2 < cfg.c2_eps:
        return True
    return signal.c1 is not None and signal.c1 > -cfg.c1_eps


def schedule(history: Iterable[StepRecord]) -> str:
    """Return the moves as N and S; a stream's phases are joined."""
    letters = {move.value: letter for letter, move in LETTERS.items()}
    return "".join(letters.get(step.move, "") for step in history)


def last_phase(moves: Sequence[StepRecord]) -> list[StepRecord]:
    """Return the unbroken run of moves of one kind that ends the history."""
    tail: list[StepRecord] = []
    # backwards until the kind changes
    for step in reversed(moves):
        if tail and step.move != tail[-1].move:
            break
        tail.append(step)
    return tail[::-1]


def saturated(moves: Sequence[StepRecord], cfg: RunConfig) -> bool:
    """Tell whether the last numerical phase ends with `patience` small signals in a row."""
    recent = last_phase(moves)[-cfg.patience :]
    if len(recent) < cfg.patience or recent[-1].move != Move.NUMERICAL:
        return False
    return all(is_small(step.signal, cfg) for step in recent)


def exhausted(moves: Sequence[StepRecord], cfg: RunConfig) -> bool:
    """Tell whether the last symbolic phase ends with `patience` moves that gained < gain_eps."""
    # a move without an accepted edit gains nothing
    recent = last_phase(moves)[-cfg.patience :]
    if len(recent) < cfg.patience or recent[-1].move != Move.SYMBOLIC:
        return False
    return all((step.signal.gain or 0.0) < cfg.gain_eps for step in recent)


def prompts_failed(
    moves: Sequence[StepRecord], cfg: RunConfig, style: float | None = None
) -> bool:
    """Tell whether the last symbolic move gained < gain_eps, or left most of its demand unmet.

    `style` is the share of examples that need style now, where somebody can tell: a gain may be one
    of content.
    """
    symbolic = [step for step in moves if step.move == Move.SYMBOLIC]
    if not symbolic:
        return False
    if (symbolic[-1].signal.gain or 0.0) < cfg.gain_eps:
        return True
    # a gain may be one of content: then the demand for style is still there
    demanded = symbolic[-1].demand.get("style", 0.0)
    return style is not None and style > demanded / 2
