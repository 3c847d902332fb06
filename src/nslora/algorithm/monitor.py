"""The unified monitoring signal: how much each kind of move still improves things, on one relative scale.

Equations 3 of the paper: C1 = (L_t - L_{t-1}) / L_{t-1} and C2 = ||grad L_t||. The symbolic gain, the two readings
of "small", patience and the way back are our choice. Pure functions of a run's history.
"""

from __future__ import annotations

from collections.abc import Sequence

from nslora.config import RunConfig
from nslora.types import Move, Signal, StepRecord


def relative_change(new: float, old: float) -> float:
    """(new - old) / old, for positive quantities; 0 when both are 0."""
    if old == 0:
        return 0.0 if new == 0 else float("inf")
    return (new - old) / old


def gain(new: float, old: float, n: int) -> float:
    """Relative improvement of a mean reward over n items; the floor 1/n keeps a start at zero finite."""
    return (new - old) / max(old, 1 / n)


def after_numerical(history: Sequence[StepRecord], loss: float, grad_norm: float) -> Signal:
    """Signal after a numerical move with mean loss `loss` (nats per token) and gradient norm `grad_norm`.

    C1 compares with the previous move of the same phase only: a new phase trains on other targets under another
    prompt, so its first loss has nothing to be compared with.
    """
    last = history[-1] if history else None
    if last is None or last.move is not Move.NUMERICAL:
        return Signal(c1=None, c2=grad_norm)
    return Signal(c1=relative_change(loss, last.cost["loss"]), c2=grad_norm)


def after_symbolic(new: float, old: float, n: int) -> Signal:
    """Signal after a symbolic move that took the mean dev reward over n items from `old` to `new`."""
    return Signal(gain=gain(new, old, n))


def is_small(signal: Signal, cfg: RunConfig) -> bool:
    """Whether one numerical signal says "saturated": C1 small (in the configured reading) or C2 small.

    Signed: C1 > -eps, so a rising loss is saturated too. Absolute: |C1| < eps, so a rising loss is not.
    """
    c2_small = signal.c2 is not None and signal.c2 < cfg.c2_eps
    if signal.c1 is None:
        return c2_small
    c1_small = signal.c1 > -cfg.c1_eps if cfg.small == "signed" else abs(signal.c1) < cfg.c1_eps
    return c1_small or c2_small


def phase(history: Sequence[StepRecord]) -> list[StepRecord]:
    """The unbroken run of moves of the same kind that ends the history."""
    tail: list[StepRecord] = []
    for step in reversed(history):
        if tail and step.move is not tail[-1].move:
            break
        tail.append(step)
    return tail[::-1]


def saturated(history: Sequence[StepRecord], cfg: RunConfig) -> bool:
    """Whether the current numerical phase ends with `patience` small signals in a row."""
    recent = phase(history)[-cfg.patience :]
    return (
        len(recent) == cfg.patience
        and recent[-1].move is Move.NUMERICAL
        and all(is_small(step.signal, cfg) for step in recent)
    )


def exhausted(history: Sequence[StepRecord], cfg: RunConfig) -> bool:
    """Whether the current symbolic phase ends with `patience` moves in a row that gained less than gain_eps."""
    recent = phase(history)[-cfg.patience :]
    return (
        len(recent) == cfg.patience
        and recent[-1].move is Move.SYMBOLIC
        and all((step.signal.gain or 0.0) < cfg.gain_eps for step in recent)
    )


def prompts_failed(
    history: Sequence[StepRecord], cfg: RunConfig, style: float | None = None
) -> bool:
    """Whether the last symbolic move, if there was one, gained less than gain_eps, or left more than half its demand.

    `style` is the share of examples that need style now, where somebody can tell: a gain may be one of content.
    """
    tried = [step for step in history if step.move is Move.SYMBOLIC]
    if not tried:
        return False
    met = tried[-1].demand.get("style", 0.0)
    return (tried[-1].signal.gain or 0.0) < cfg.gain_eps or (style is not None and style > met / 2)
