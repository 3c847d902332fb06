"""Hand-made run histories for the pure parts' tests."""

from __future__ import annotations

from collections.abc import Sequence

from nslora.algorithm import monitor
from nslora.types import Move, Prompt, Signal, StepRecord


def step(
    number: int, move: Move, signal: Signal, demand: dict[str, float] | None = None, **cost: float
) -> StepRecord:
    """A move with nothing but what routers look at."""
    defaults = {"tokens": 1.0, "dev_change": 0.0}
    return StepRecord(
        number, move, Prompt(), None, {}, {}, signal, demand or {}, {}, {**defaults, **cost}
    )


def numerical(losses: Sequence[float], grad_norm: float = 9.0) -> list[StepRecord]:
    """A numerical phase with these losses."""
    history: list[StepRecord] = []
    for loss in losses:
        signal = monitor.after_numerical(history, loss, grad_norm)
        history.append(step(len(history) + 1, Move.NUMERICAL, signal, loss=loss))
    return history


def symbolic(gains: Sequence[float]) -> list[StepRecord]:
    """A symbolic phase with these relative gains."""
    return [step(i + 1, Move.SYMBOLIC, Signal(gain=g)) for i, g in enumerate(gains)]
