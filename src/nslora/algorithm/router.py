"""Which move next? Every decision is one function; every method of the comparison uses one of them.

A decision sees the moves so far, the estimated needs of the training examples (with how far the
backbone follows prompts) and the settings. It returns a move and the reason in words. The table of
methods is `config.METHODS`: all of them share the loop, the moves and the evaluator.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from nslora.algorithm import monitor
from nslora.algorithm.needs import Needs
from nslora.config import RunConfig
from nslora.types import LETTERS, Move, StepRecord

History = Sequence[StepRecord]


class Choice(NamedTuple):
    """A decision: the move, and why."""

    move: Move
    reason: str


Decision = Callable[[History, Needs, RunConfig], Choice]


def always(move: Move) -> Decision:
    """Make one kind of move, whatever happens: `frozen`, the `lora` methods, `textgrad`."""
    return lambda moves, needs, cfg: Choice(move, "always")


def once_symbolic(moves: History, needs: Needs, cfg: RunConfig) -> Choice:
    """Make one symbolic move with the whole budget: `gepa`, which searches prompts by itself."""
    return Choice(
        Move.STOP if moves else Move.SYMBOLIC, "the whole budget at once"
    )


def schedule(moves: History, needs: Needs, cfg: RunConfig) -> Choice:
    """Follow the schedule of a `fixed:` method, such as fixed:SNNN, and stop at its end."""
    if len(moves) >= len(cfg.schedule):
        return Choice(Move.STOP, "the schedule is at its end")
    return Choice(LETTERS[cfg.schedule[len(moves)]], "by the schedule")


def alternate(moves: History, needs: Needs, cfg: RunConfig) -> Choice:
    """Prompt, weights, prompt, ..., each for a third of the budget: BetterTogether's p-w-p."""
    # with fewer than three moves every turn is one move
    third = max(1, cfg.phase_moves // 3)
    weights = (len(moves) // third) % 2 == 1
    move = Move.NUMERICAL if weights else Move.SYMBOLIC
    return Choice(move, "by turns")


def coin(moves: History, needs: Needs, cfg: RunConfig) -> Choice:
    """Toss a fair coin per move; every run has a coin of its own."""
    # by the number of the move: a resumed run tosses the same coins
    heads = cfg.own_rng(f"coin {len(moves)}").random() < 0.5
    move = Move.NUMERICAL if heads else Move.SYMBOLIC
    return Choice(move, "a coin")


def by_signal(moves: History, needs: Needs, cfg: RunConfig) -> Choice:
    """Numerical until saturated, symbolic until exhausted, then back: `monitor`, blind to needs."""
    # the paper starts with weights
    if not moves:
        return Choice(Move.NUMERICAL, "the first move")
    if moves[-1].move == Move.NUMERICAL:
        if monitor.saturated(moves, cfg):
            return Choice(Move.SYMBOLIC, "LoRA is saturated")
        return Choice(Move.NUMERICAL, "LoRA still learns")
    if monitor.exhausted(moves, cfg):
        return Choice(Move.NUMERICAL, "edits gain little")
    return Choice(Move.SYMBOLIC, "edits still gain")


def by_demand(moves: History, needs: Needs, cfg: RunConfig) -> Choice:
    """Make the move that more examples need: `needs-only`, blind to whether it still helps."""
    if needs.content >= needs.style:
        return Choice(Move.NUMERICAL, "more examples need content")
    return Choice(Move.SYMBOLIC, "more examples need style")


def by_signal_and_demand(
    moves: History, needs: Needs, cfg: RunConfig
) -> Choice:
    """Follow the signal, but skip a kind of move that no example needs: `numerical-first`.

    The paper's rule (numerical first) with our additions, in this order:
    nothing is needed; a needed kind that was never tried gets its turn while `reserve` moves are
    left; style that prompts failed to bring is a demand on the weights; only one kind is needed;
    the last move is kept for weights where prompts have failed; else the signal decides.
    """
    content, style = needs.content, needs.style

    # nothing is needed
    if max(content, style) < cfg.demand_floor:
        return _without_demand(moves, cfg)

    # a needed kind that was never tried gets its turn
    left = cfg.phase_moves - len(moves)
    if left == cfg.reserve and (move := _untried(moves, needs, cfg)):
        return Choice(move, "needed and never tried")

    # style that prompts failed to bring is a demand on the weights
    failed = monitor.prompts_failed(moves, cfg, style)
    if failed:
        content += style

    # only one kind is needed
    if content < cfg.demand_floor:
        return Choice(Move.SYMBOLIC, "only style is needed")
    if style < cfg.demand_floor:
        return Choice(Move.NUMERICAL, "only content is needed")

    # an edit in the last move would leave weights of another form
    if failed and left == 1 and cfg.reserve > 0:
        return Choice(
            Move.NUMERICAL, "prompts failed: the last move is for weights"
        )
    return by_signal(moves, needs, cfg)


def by_following(moves: History, needs: Needs, cfg: RunConfig) -> Choice:
    """Rewrite the prompt where a form is asked for and prompts are followed: `neurosymbolic`, `oracle`.

    In this order: nothing is needed; prompts are not followed, so weights are tuned; form is asked
    for and prompts have not failed to bring it; saturated weights leave the rest to the prompt; else
    weights are tuned. A backbone of which nothing is known counts as one that follows.
    """
    # nothing is needed
    if max(needs.content, needs.style) < cfg.demand_floor:
        return _without_demand(moves, cfg)

    # a backbone that does not follow prompts loses by an edit what the weights then relearn
    if needs.follows is not None and needs.follows < cfg.follows_floor:
        return Choice(Move.NUMERICAL, "prompts are not followed")

    failed = monitor.prompts_failed(moves, cfg, needs.style)
    if needs.style >= cfg.demand_floor and not failed:
        return Choice(
            Move.SYMBOLIC, "form is asked for, and prompts are followed"
        )
    if monitor.saturated(moves, cfg):
        return Choice(Move.SYMBOLIC, "LoRA is saturated")
    return Choice(Move.NUMERICAL, "the rest is for the weights")


def _without_demand(moves: History, cfg: RunConfig) -> Choice:
    """Stop, unless trained weights still fail on dev."""
    if _unsettled(moves, cfg):
        return Choice(Move.NUMERICAL, "dev still fails")
    return Choice(Move.STOP, "nothing is needed")


def _unsettled(moves: History, cfg: RunConfig) -> bool:
    """Tell whether weights were trained and fail on dev though no training example fails.

    The chosen facts can be trained on further; a prompt has nothing to learn from.
    """
    trained = any(step.move == Move.NUMERICAL for step in moves)
    return trained and 1 - moves[-1].dev["success"] >= cfg.demand_floor


def _untried(moves: History, needs: Needs, cfg: RunConfig) -> Move | None:
    """Return a kind of move that is needed but was never tried, if there is one."""
    tried = {step.move for step in moves}
    if needs.content >= cfg.demand_floor and Move.NUMERICAL not in tried:
        return Move.NUMERICAL
    if needs.style >= cfg.demand_floor and Move.SYMBOLIC not in tried:
        return Move.SYMBOLIC
    return None


DECISIONS: dict[str, Decision] = {
    "stop": always(Move.STOP),
    "numerical": always(Move.NUMERICAL),
    "symbolic": always(Move.SYMBOLIC),
    "once symbolic": once_symbolic,
    "schedule": schedule,
    "alternate": alternate,
    "coin": coin,
    "signal": by_signal,
    "demand": by_demand,
    "signal and demand": by_signal_and_demand,
    "prompt if followed": by_following,
}
