"""Which move next? One decision, one function; every method of the comparison is one of these.

All methods share the loop, the moves and the evaluator, so a difference between them comes from the decision alone.
A decision sees the history of moves, the share of training examples that still need content or style (`demand`), and
a seeded generator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from nslora.algorithm import monitor
from nslora.config import RunConfig
from nslora.types import Move, StepRecord

Demand = Mapping[str, float]
Decision = Callable[[Sequence[StepRecord], Demand, RunConfig, np.random.Generator], Move]


def always(move: Move) -> Decision:
    """`lora`, `lora-demonstrated`, `textgrad` and `frozen`: one kind of move, whatever happens."""
    return lambda history, demand, cfg, rng: move


def alternate(
    history: Sequence[StepRecord], demand: Demand, cfg: RunConfig, rng: np.random.Generator
) -> Move:
    """Fixed schedule prompt, weights, prompt, ..., each for a third of the budget, as BetterTogether's p-w-p."""
    third = max(1, cfg.moves // 3)
    return Move.NUMERICAL if (len(history) // third) % 2 else Move.SYMBOLIC


def coin(
    history: Sequence[StepRecord], demand: Demand, cfg: RunConfig, rng: np.random.Generator
) -> Move:
    """`random`: a fair coin per move."""
    return Move.NUMERICAL if rng.random() < 0.5 else Move.SYMBOLIC


def by_signal(
    history: Sequence[StepRecord], demand: Demand, cfg: RunConfig, rng: np.random.Generator
) -> Move:
    """`monitor`: numerical until saturated, symbolic until exhausted, then back. Blind to what inputs need."""
    if not history:
        return Move.NUMERICAL
    if history[-1].move is Move.NUMERICAL:
        return Move.SYMBOLIC if monitor.saturated(history, cfg) else Move.NUMERICAL
    return Move.NUMERICAL if monitor.exhausted(history, cfg) else Move.SYMBOLIC


def by_demand(
    history: Sequence[StepRecord], demand: Demand, cfg: RunConfig, rng: np.random.Generator
) -> Move:
    """`classifier`: the move that more examples need. Blind to whether it still helps."""
    return Move.NUMERICAL if demand["content"] >= demand["style"] else Move.SYMBOLIC


def by_both(
    history: Sequence[StepRecord], demand: Demand, cfg: RunConfig, rng: np.random.Generator
) -> Move:
    """`neurosymbolic` and `oracle`: the signal's phases, but a phase that no example needs is skipped.

    Style that prompts failed to bring is a demand on the weights: remade answers can still carry it there. That takes
    a move of its own: with `cfg.reserve` moves left a needed kind of move gets its turn if it was never tried, and the
    last move is not another prompt where prompts have failed.
    """
    if max(demand["content"], demand["style"]) < cfg.demand_floor:
        return Move.NUMERICAL if unsettled(history, cfg) else Move.STOP
    if cfg.router == "utility":
        return by_utility(history, demand, cfg)
    left = cfg.moves - len(history)
    wanted = (untried(history, demand, cfg) if left == cfg.reserve else None) or by_signal(
        history, demand, cfg, rng
    )
    failed = monitor.prompts_failed(history, cfg, demand["style"])
    for_weights = demand["content"] + (demand["style"] if failed else 0.0)
    if wanted is Move.NUMERICAL and for_weights < cfg.demand_floor:
        return Move.SYMBOLIC
    kept_for_weights = failed and left == 1 and cfg.reserve > 0
    if wanted is Move.SYMBOLIC and (demand["style"] < cfg.demand_floor or kept_for_weights):
        return Move.NUMERICAL
    return wanted


def unsettled(history: Sequence[StepRecord], cfg: RunConfig) -> bool:
    """Whether the weights were trained and fail on dev although no training example needs a move any more.

    The facts that were chosen can be trained on further; a prompt has nothing to learn from where nothing fails.
    """
    trained = any(step.move is Move.NUMERICAL for step in history)
    return trained and 1 - history[-1].dev["success"] >= cfg.demand_floor


def untried(history: Sequence[StepRecord], demand: Demand, cfg: RunConfig) -> Move | None:
    """A kind of move that is needed but was never tried, if there is one."""
    tried = {step.move for step in history}
    needed = ((Move.NUMERICAL, demand["content"]), (Move.SYMBOLIC, demand["style"]))
    return next(
        (move for move, share in needed if share >= cfg.demand_floor and move not in tried), None
    )


def by_utility(history: Sequence[StepRecord], demand: Demand, cfg: RunConfig) -> Move:
    """Our extension: the move with the larger demand x expected progress / cost.

    Expected progress of a kind is the mean gain in dev reward of its last two moves (optimistically 1 before it was
    tried), its cost their mean tokens, trained on or the editor's: seconds would differ from one machine to another.
    """
    scores = {}
    for move, key in ((Move.NUMERICAL, "content"), (Move.SYMBOLIC, "style")):
        tried = [step for step in history if step.move is move][-2:]
        progress = (
            float(np.mean([max(step.cost["dev_change"], 0.0) for step in tried])) if tried else 1.0
        )
        tokens = float(np.mean([step.cost["tokens"] for step in tried])) if tried else 1.0
        scores[move] = demand[key] * progress / max(tokens, 1.0)
    best = max(scores, key=lambda move: scores[move])
    if scores[best] > 0:
        return best
    return Move.NUMERICAL if demand["content"] >= demand["style"] else Move.SYMBOLIC


DECISIONS: dict[str, Decision] = {
    "frozen": always(Move.STOP),
    "lora": always(Move.NUMERICAL),
    "lora-demonstrated": always(Move.NUMERICAL),
    "textgrad": always(Move.SYMBOLIC),
    "alternate": alternate,
    "random": coin,
    "monitor": by_signal,
    "classifier": by_demand,
    "neurosymbolic": by_both,
    "oracle": by_both,
}
