"""The numerical move: LoRA on the task's own pairs and on replay.

Weights learn every training example: whatever an example needs, its verified target has it. To
leave to the prompt, input by input, what needs form (`inputs = "needed"`) costs (LOG, 2026-11-28).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from nslora.algorithm import monitor, remake
from nslora.algorithm.needs import Needs
from nslora.algorithm.session import (
    Losses,
    Memory,
    Outcome,
    Session,
    State,
    Targets,
)
from nslora.model.lora import Epoch
from nslora.types import Candidate, Example, Move, Pair, Prompt

T = TypeVar("T")
# of a tuned adapter that is used where dev allows it; less loses what was learned (LOG, 2026-11-28)
SCALE = 0.8
# share of right dev items above which they may tell that nothing is lost
MOST = 0.5


def numerical(run: Session, state: State, needs: Needs) -> Outcome:
    """Train `cfg.epochs` passes on the chosen facts (all of them by default) and on replay, and save a checkpoint.

    The adapter is then scaled down if dev allows it (`shrink`). With `bake` the weights learn under the initial
    prompt what the refined one brought, and the candidate goes on with the initial prompt.
    """
    cfg, refined = run.cfg, state.candidate.prompt
    step = state.history[-1].step + 1
    choose = INPUTS[cfg.row.inputs]
    chosen = state.memory.chosen | choose(run, state, needs)
    targets = remake.POLICIES[cfg.row.targets](run, state, chosen)
    train = remake.taught(run, state, chosen, targets)
    pairs = own_pairs(run, refined, train, targets)

    # weights normally learn under the prompt that they will be used with
    prompt = run.task.initial_prompt if cfg.bake else refined
    if prompt != refined:
        pairs = [
            replace(pair, prompt=prompt, refined=refined) for pair in pairs
        ]
    rng = cfg.rng(f"epoch-{state.nth(Move.NUMERICAL)}")
    replayed = replay_pairs(run, prompt, round(cfg.replay * len(pairs)), rng)
    for _ in range(cfg.epochs):
        epoch = run.timed(lambda: run.learner.epoch([*pairs, *replayed], rng))
        run.train_tokens += epoch.tokens

    run.adapter = adapter = f"adapter-{step:02d}"
    scale = shrink(run, prompt) if cfg.shrink else 1.0
    # adapter and optimizer: a run can go back to any of its moves
    run.learner.save(run.scratch / adapter)
    losses = own_losses(epoch, pairs)
    memory = Memory(chosen, targets, losses, (*state.memory.trained, *pairs))
    evidence = {
        "loss": monitor.mean_nll(losses),
        "grad_norm": epoch.grad_norm,
        "scale": scale,
        "pairs": count_sources([*pairs, *replayed]),
    }
    return Outcome(Candidate(prompt, adapter), evidence, run.bill(), memory)


def shrink(run: Session, prompt: Prompt) -> float:
    """Scale the tuned adapter to SCALE where most of dev is right and its mean reward does not fall; return the scale.

    Weights between the frozen and the tuned ones keep more of what the backbone knew (WiSE-FT, Wortsman et al., 2022).
    The next numerical move trains on from all of it.
    """
    adapter, dev = run.adapter, run.task.dev
    whole = run.score(prompt, dev)
    # where little is learned yet, two adapters tie on dev however much one of them lost
    if monitor.summary(whole)["success"] <= MOST:
        return 1.0
    tuned = [b.clone() for b in run.learner.products]
    # the scaled one has replies of its own
    replies = run.replies.pop(adapter, {})
    run.learner.scale(tuned, SCALE)
    scaled = run.score(prompt, dev)

    # no loss at all: within one standard error, dozens of points may be lost where dev is small
    change, _ = monitor.mean_change(scaled, whole)
    if change >= -monitor.ROUNDING:
        return SCALE
    run.learner.scale(tuned, 1.0)
    run.replies[adapter] = replies
    return 1.0


def every_fact(run: Session, state: State, needs: Needs) -> frozenset[str]:
    """Return the facts of all training examples."""
    return frozenset(s.example.fact for s in state.train)


def needed_facts(run: Session, state: State, needs: Needs) -> frozenset[str]:
    """Return the facts of training examples that are for the weights, as the needs say; never none.

    Style that prompts failed to bring is for the weights as well.
    """
    # [N]
    for_weights = needs.for_weights()
    if monitor.prompts_failed(state.moves, run.cfg, needs.style):
        for_weights = for_weights | needs.failing
    rows = zip(state.train, for_weights, strict=True)
    facts = frozenset(s.example.fact for s, chosen in rows if chosen)
    # with nothing new to learn, and nothing chosen before, the move trains on everything
    return facts or state.memory.chosen or every_fact(run, state, needs)


# input by input: which facts the weights learn, by `Method.inputs`
INPUTS: Mapping[str, Callable[[Session, State, Needs], frozenset[str]]] = {
    "all": every_fact,
    "needed": needed_facts,
}


def own_pairs(
    run: Session, prompt: Prompt, train: Sequence[Example], targets: Targets
) -> list[Pair]:
    """Return pairs from the targets of examples; gold for those without one."""
    pairs = remake.spread(train, prompt, targets)
    arrange = remake.ARMS.get(run.cfg.row.targets)
    return (
        arrange(pairs, remake.gold_pairs(train, prompt)) if arrange else pairs
    )


def own_losses(epoch: Epoch, pairs: Sequence[Pair]) -> Losses:
    """Return the losses of the task's own pairs, which come first in the epoch's pairs."""
    losses: dict[tuple[Prompt, str, str], tuple[float, int]] = {}
    for pair, nll, tokens in zip(
        pairs, epoch.nll, epoch.answer_tokens, strict=False
    ):
        losses[pair.prompt, pair.question, pair.target] = (nll, tokens)
    return losses


def count_sources(pairs: Sequence[Pair]) -> dict[str, int]:
    """Return how many pairs came from each source."""
    sources = sorted({pair.source for pair in pairs})
    return {
        source: sum(pair.source == source for pair in pairs)
        for source in sources
    }


def replay_pairs(
    run: Session, prompt: Prompt, count: int, rng: np.random.Generator
) -> list[Pair]:
    """Return at most `count` replay pairs, drawn anew each time.

    Half are under the current prompt, so that it does not cost knowledge; half under prompts that
    tell a rule, so that the model follows prompts as far as it did.
    """
    if not count:
        return []
    initial, half = run.task.initial_prompt, count - count // 2
    plain = [
        (prompt, example) for p, example in run.task.replay if p == initial
    ]
    instructed = [pair for pair in run.task.replay if pair[0] != initial]
    if prompt != initial:
        # all runs share the replies under the initial prompt, these are new
        plain = _drawn(plain, half, rng)
    own = _drawn(remake.replay(run, plain), half, rng)
    return own + _drawn(remake.replay(run, instructed), count // 2, rng)


def _drawn(rows: Sequence[T], count: int, rng: np.random.Generator) -> list[T]:
    return [rows[i] for i in rng.permutation(len(rows))[:count]]
