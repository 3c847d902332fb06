"""The algorithm: interleave numerical and symbolic moves, deciding round by round and input by input."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from nslora.algorithm import evaluate, monitor, moves, router
from nslora.algorithm.needs import NeedClassifier, demand, features, told
from nslora.algorithm.session import Session
from nslora.config import RunConfig
from nslora.tasks import build
from nslora.types import Candidate, Move, Pair, Scored, Signal, StepRecord

Watch = Callable[[StepRecord], None]
Demand = dict[str, float]
Scores = dict[str, list[Scored]]  # by split
ROUTED = ("classifier", "neurosymbolic")  # methods that see predicted needs


def through_phases(
    session: Session, watch: Watch
) -> tuple[list[StepRecord], StepRecord, list[Pair], Scores]:
    """Adapt to the phases of a task one after the other, each from the best candidate of the one before.

    Returns the history, the best step of the last phase, all pairs trained on, and the test scores of earlier phases,
    each taken once at its phase's end (`test-1`, `test-2`, ...).
    """
    histories, trained = list[list[StepRecord]](), list[Pair]()
    earlier, chosen = Scores(), set[str]()
    candidate = Candidate(session.task.start)
    for phase in range(build.phases(session.cfg)):
        if phase:
            session.use(candidate)
            earlier[f"test-{phase}"] = session.score(
                candidate.prompt, session.task.examples("test")
            )
            session.task = build.build(session.cfg, phase)
        steps, pairs = adapt(session, watch, candidate, chosen, sum(map(len, histories)))
        histories.append(steps)
        trained += pairs
        found = best(steps, session.cfg)
        candidate = Candidate(found.prompt, found.adapter)
    return [step for steps in histories for step in steps], found, trained, earlier


def adapt(
    session: Session, watch: Watch, candidate: Candidate, chosen: set[str], first: int = 0
) -> tuple[list[StepRecord], list[Pair]]:
    """Adapt a candidate, whose weights are in place, to the session's task within the budget of moves.

    Adds to `chosen` the facts that the weights are to learn. Returns the history, from step number `first` (the start,
    no move yet), and the pairs trained on.
    """
    cfg, task = session.cfg, session.task
    trained: list[Pair] = []
    parts = task.examples("dev"), task.examples("feedback")
    dev, train = session.score_parts(candidate.prompt, *parts)
    history = [record(session, first, Move.STOP, candidate, dev, train)]
    watch(history[0])
    decide, rng = router.DECISIONS[cfg.method], cfg.rng(f"route-{first}" if first else "route")
    for step in range(first + 1, first + cfg.moves + 1):
        started, saved, taken = time.perf_counter(), session.saved_s, history[1:]
        paid = replace(session.editor.ledger)
        p_content = predict(session, candidate, train)
        wanted = demand(train, p_content) if p_content is not None else {}
        move = decide(taken, wanted, cfg, rng)
        before, detail = (
            evaluate.summary(dev)["value"],
            dict[str, object](needs=need_rows(train, p_content)),
        )
        if move is Move.NUMERICAL:
            rewrites = monitor.prompts_failed(taken, cfg, wanted.get("style"))
            chosen |= facts_for_weights(train, p_content, rewrites)
            candidate, epoch, pairs = moves.numerical(
                session, candidate, chosen, train, rewrites, step
            )
            trained += pairs
            dev, train = session.score_parts(candidate.prompt, *parts)
            loss = epoch.loss if cfg.signal_loss == "train" else dev_loss(session, candidate, dev)
            signal = monitor.after_numerical(taken, loss, epoch.grad_norm)
            detail["pairs"] = counts(pairs)
            cost = {"loss": loss, "grad_norm": epoch.grad_norm, "train_tokens": float(epoch.tokens)}
        elif move is Move.SYMBOLIC:
            failing = failing_for_prompt(train, p_content)
            candidate, dev, edits = moves.symbolic(session, candidate, failing, dev, step)
            train = (
                session.score(candidate.prompt, parts[1])
                if any(e["accepted"] for e in edits)
                else train
            )
            signal = monitor.after_symbolic(evaluate.summary(dev)["value"], before, len(dev))
            detail["edits"], cost = edits, {}
        else:
            break
        seconds = (
            time.perf_counter() - started + session.saved_s - saved
        )  # as if no run had shared its replies
        edited = session.editor.ledger - paid
        cost |= {"seconds": seconds, "dev_change": evaluate.summary(dev)["value"] - before}
        cost["tokens"] = cost.get("train_tokens", 0.0) + edited.tokens_in + edited.tokens_out
        history.append(
            record(session, step, move, candidate, dev, train, signal, wanted, detail, cost)
        )
        watch(history[-1])
    return history, trained


def predict(session: Session, candidate: Candidate, train: Sequence[Scored]) -> np.ndarray | None:
    """P(content) [N] per training example: predicted, or told to the oracle; None for methods that do not ask."""
    if session.cfg.method == "oracle":
        return told(train)
    if session.cfg.method not in ROUTED:
        return None
    examples = [s.example for s in train]
    nll = session.nll(candidate.prompt, examples)
    neutral = (
        nll if candidate.prompt == session.task.start else session.nll(session.task.start, examples)
    )
    return NeedClassifier.default().p_content(features(train, nll, neutral))


def facts_for_weights(
    train: Sequence[Scored], p_content: np.ndarray | None, prompts_failed: bool
) -> set[str]:
    """Facts a numerical move adds to its training set: failing examples that need content (all, if nobody can tell).

    Style that prompts failed to bring goes to the weights as well. Facts stay chosen once they were, lest they be
    forgotten when they pass.
    """
    return {
        s.example.fact
        for i, s in enumerate(train)
        if p_content is None or (s.reward.success < 1 and (prompts_failed or p_content[i] >= 0.5))
    }


def failing_for_prompt(train: Sequence[Scored], p_content: np.ndarray | None) -> list[Scored]:
    """Failing examples a symbolic move learns from: those that need style (all, if nobody can tell or none does)."""
    failing = [
        (s, p_content is None or p_content[i] < 0.5)
        for i, s in enumerate(train)
        if s.reward.success < 1
    ]
    return [s for s, style in failing if style] or [s for s, _ in failing]


def dev_loss(session: Session, candidate: Candidate, dev: Sequence[Scored]) -> float:
    """Mean negative log-likelihood per token of the dev gold answers, in nats."""
    return float(np.mean(session.nll(candidate.prompt, [s.example for s in dev])))


def counts(pairs: Sequence[Pair]) -> dict[str, int]:
    """How many training pairs came from each source."""
    return {
        source: sum(p.source == source for p in pairs)
        for source in sorted({p.source for p in pairs})
    }


def need_rows(train: Sequence[Scored], p_content: np.ndarray | None) -> list[list[object]]:
    """Per training example: id, hidden need (for reports only), success, P(content)."""
    if p_content is None:
        return []
    return [
        [s.example.id, s.example.need.value, s.reward.success, round(float(p), 4)]
        for s, p in zip(train, p_content, strict=True)
    ]


def best(history: Sequence[StepRecord], cfg: RunConfig) -> StepRecord:
    """The step with the highest dev success, then dev value; the earliest of equals.

    With `returned = "tuned"`, of those with tuned weights, if there are any.
    """
    tuned = (
        [step for step in history if step.adapter is not None] if cfg.returned == "tuned" else []
    )
    return max(
        tuned or history, key=lambda step: (step.dev["success"], step.dev["value"], -step.step)
    )


def record(
    session: Session,
    step: int,
    move: Move,
    candidate: Candidate,
    dev: Sequence[Scored],
    train: Sequence[Scored],
    signal: Signal | None = None,
    demand: Demand | None = None,
    detail: Mapping[str, object] | None = None,
    cost: Mapping[str, float] | None = None,
) -> StepRecord:
    """The log entry of a move, with the editor's ledger so far."""
    ledger = session.editor.ledger
    calls = float(ledger.calls + ledger.replayed)
    spent = {"editor_calls": calls, "editor_tokens": float(ledger.tokens_in + ledger.tokens_out)}
    return StepRecord(
        step,
        move,
        candidate.prompt,
        candidate.adapter,
        evaluate.summary(dev),
        evaluate.summary(train),
        signal or Signal(),
        dict(demand or {}),
        dict(detail or {}),
        {**(cost or {"seconds": 0.0, "dev_change": 0.0}), **spent},
    )
