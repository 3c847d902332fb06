"""Hand-made run histories and needs, for the tests of the pure parts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nslora.algorithm import monitor
from nslora.algorithm.needs import Needs
from nslora.types import Move, Prompt, Signal, StepRecord


def step(
    number: int,
    move: str,
    signal: Signal = Signal(),
    demand: dict[str, float] | None = None,
    success: float = 0.0,
    adapter: str | None = None,
) -> StepRecord:
    """Return a move with what decisions look at."""
    dev = {"success": success, "value": success}
    return StepRecord(
        step=number,
        move=str(move),
        reason="",
        prompt=Prompt(),
        adapter=adapter,
        dev=dev,
        train={},
        signal=signal,
        demand=demand or {},
        evidence={},
        bill={},
    )


def numerical(losses: Sequence[float], grad_norm: float = 9.0) -> list[StepRecord]:
    """Return a numerical phase with these losses."""
    history: list[StepRecord] = []
    for i, loss in enumerate(losses):
        c1 = monitor.relative_change(loss, losses[i - 1]) if i else None
        history.append(step(i + 1, Move.NUMERICAL, Signal(c1=c1, c2=grad_norm)))
    return history


def symbolic(gains: Sequence[float]) -> list[StepRecord]:
    """Return a symbolic phase with these relative gains."""
    return [step(i + 1, Move.SYMBOLIC, Signal(gain=gain)) for i, gain in enumerate(gains)]


def needs(content: float, style: float, examples: int = 100) -> Needs:
    """Return needs whose demand is these shares of the examples; the others do not fail."""
    n_content, n_style = round(content * examples), round(style * examples)
    number = np.arange(examples)
    return Needs(number < n_content + n_style, (number < n_content).astype(float))
