"""The algorithm: interleave numerical and symbolic moves, deciding round by round and input by input."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from . import evaluate, monitor, moves, remake, router, store, tasks, weights
from .backbones import Backbone, load
from .config import RunConfig
from .editor import Editor
from .needs import NeedClassifier, demand, features, told
from .session import Session
from .store import Store
from .types import Candidate, Move, Pair, Prompt, Scored, Signal, StepRecord, diff

Watch = Callable[[StepRecord], None]
Demand = dict[str, float]
Scores = dict[str, list[Scored]]  # by split
ROUTED = ("classifier", "neurosymbolic")  # methods that see predicted needs


def through_phases(session: Session, watch: Watch) -> tuple[list[StepRecord], StepRecord, list[Pair], Scores]:
    """Adapt to the phases of a task one after the other, each from the best candidate of the one before.

    Returns the history, the best step of the last phase, all pairs trained on, and the test scores of earlier phases,
    each taken once at its phase's end (`test-1`, `test-2`, ...).
    """
    histories, trained = list[list[StepRecord]](), list[Pair]()
    earlier, chosen = Scores(), set[str]()
    candidate = Candidate(session.task.start)
    for phase in range(tasks.phases(session.cfg)):
        if phase:
            session.use(candidate)
            earlier[f"test-{phase}"] = session.score(candidate.prompt, session.task.examples("test"))
            session.task = tasks.build(session.cfg, phase)
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
        before, detail = evaluate.summary(dev)["value"], dict[str, object](needs=need_rows(train, p_content))
        if move is Move.NUMERICAL:
            rewrites = monitor.prompts_failed(taken, cfg, wanted.get("style"))
            chosen |= facts_for_weights(train, p_content, rewrites)
            candidate, epoch, pairs = moves.numerical(session, candidate, chosen, train, rewrites, step)
            trained += pairs
            dev, train = session.score_parts(candidate.prompt, *parts)
            loss = epoch.loss if cfg.signal_loss == "train" else dev_loss(session, candidate, dev)
            signal = monitor.after_numerical(taken, loss, epoch.grad_norm)
            detail["pairs"] = counts(pairs)
            cost = {"loss": loss, "grad_norm": epoch.grad_norm, "train_tokens": float(epoch.tokens)}
        elif move is Move.SYMBOLIC:
            failing = failing_for_prompt(train, p_content)
            candidate, dev, edits = moves.symbolic(session, candidate, failing, dev, step)
            train = session.score(candidate.prompt, parts[1]) if any(e["accepted"] for e in edits) else train
            signal = monitor.after_symbolic(evaluate.summary(dev)["value"], before, len(dev))
            detail["edits"], cost = edits, {}
        else:
            break
        seconds = time.perf_counter() - started + session.saved_s - saved  # as if no run had shared its replies
        edited = session.editor.ledger - paid
        cost |= {"seconds": seconds, "dev_change": evaluate.summary(dev)["value"] - before}
        cost["tokens"] = cost.get("train_tokens", 0.0) + edited.tokens_in + edited.tokens_out
        history.append(record(session, step, move, candidate, dev, train, signal, wanted, detail, cost))
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
    neutral = nll if candidate.prompt == session.task.start else session.nll(session.task.start, examples)
    return NeedClassifier.default().p_content(features(train, nll, neutral))


def facts_for_weights(train: Sequence[Scored], p_content: np.ndarray | None, prompts_failed: bool) -> set[str]:
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
    failing = [(s, p_content is None or p_content[i] < 0.5) for i, s in enumerate(train) if s.reward.success < 1]
    return [s for s, style in failing if style] or [s for s, _ in failing]


def dev_loss(session: Session, candidate: Candidate, dev: Sequence[Scored]) -> float:
    """Mean negative log-likelihood per token of the dev gold answers, in nats."""
    return float(np.mean(session.nll(candidate.prompt, [s.example for s in dev])))


def counts(pairs: Sequence[Pair]) -> dict[str, int]:
    """How many training pairs came from each source."""
    return {source: sum(p.source == source for p in pairs) for source in sorted({p.source for p in pairs})}


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
    tuned = [step for step in history if step.adapter is not None] if cfg.returned == "tuned" else []
    return max(tuned or history, key=lambda step: (step.dev["success"], step.dev["value"], -step.step))


def run(
    cfg: RunConfig, place: Store, editor: Editor | None = None, backbone: Backbone | None = None, watch: Watch = print
) -> Path:
    """One whole run, from data to its published record; a run that is done is not done again.

    Several runs of one process can share an editor and a backbone. Returns the record's folder.
    """
    weights.check(cfg.backbone)
    if editor is None:
        with open_editor(cfg, place) as own:
            return run(cfg, place, own, backbone, watch)
    with place.alone(cfg):
        return place.record(cfg) if place.done(cfg) else make(cfg, place, editor, backbone, watch)


def make(cfg: RunConfig, place: Store, editor: Editor, backbone: Backbone | None, watch: Watch) -> Path:
    """The run itself, from its beginning."""
    task = tasks.build(cfg)
    started = time.perf_counter()
    before = replace(editor.ledger)
    scratch = place.begin(cfg)
    backbone = backbone or load(cfg.backbone, threads=cfg.threads)
    session = Session(cfg, task, backbone, editor, scratch, place.memo)
    reference = frozen_reference(session)

    def log(step: StepRecord) -> None:
        store.append_step(scratch / "steps.jsonl", step)
        watch(step)

    history, chosen, trained, splits = through_phases(session, log)
    splits |= final_scores(session, Candidate(chosen.prompt, chosen.adapter), reference)
    store.write_scores(scratch / "scores.csv", splits)
    rows = remade_rows(cfg, task.start, trained)
    remake.export(rows, scratch)
    store.write_json(scratch / "run.json", {
        "run_id": cfg.run_id, "config": asdict(cfg), "weights": session.backbone.identity,
        "environment": store.environment(cfg.threads, session.backbone.device, session.backbone.dtype),
        "start": {"dev": history[0].dev}, "final": {name: evaluate.summary(scored) for name, scored in splits.items()},
        "best": {"step": chosen.step, "prompt": asdict(chosen.prompt),
                 "prompt_diff": [list(part) for part in diff(task.start.both, chosen.prompt.both)]},
        "editor": asdict(editor.ledger - before), "remade": len(rows),
        "cost": totals(session, history, time.perf_counter() - started),
    })  # fmt: skip
    return place.publish(cfg, ("run.json", "steps.jsonl", "scores.csv", "remade.jsonl"))


def open_editor(cfg: RunConfig, place: Store) -> Editor:
    """The run's external LLM, replaying from and recording to the results; mode from NSLORA_EDITOR_MODE (auto)."""
    mode = os.environ.get("NSLORA_EDITOR_MODE", "auto")
    return Editor(cfg.editor_model, cfg.editor_url, mode, place.results / "recordings", threads=cfg.threads)


def frozen_reference(session: Session) -> dict[str, set[str]]:
    """Ids of the locality and promptability items that the frozen backbone gets right: what can be forgotten."""
    locality, obedience = held(session, session.task.start)
    return {
        "locality": {s.example.id for s in locality if s.reward.content == 1},
        "promptability": {s.example.id for s in obedience if s.reward.style == 1},
    }


def held(session: Session, prompt: Prompt) -> tuple[list[Scored], list[Scored]]:
    """Replies of the weights as they are to known questions: under `prompt`, and under prompts that tell another rule.

    Both in one batch.
    """
    locality = session.task.examples("locality")
    asked = [(prompt, e) for e in locality] + list(session.task.promptability)
    prompts, examples = zip(*asked, strict=True)
    scored = session.score_each(prompts, examples)
    return scored[: len(locality)], scored[len(locality) :]


def final_scores(session: Session, candidate: Candidate, reference: dict[str, set[str]]) -> Scores:
    """The candidate on test, once, and on what the frozen backbone could do: locality and promptability."""
    session.use(candidate)
    task = session.task
    locality, obedience = held(session, candidate.prompt)  # all of them: other batches would give other bits
    splits = {
        "test": session.score(candidate.prompt, task.examples("test")),
        "locality": [s for s in locality if s.example.id in reference["locality"]],
        "promptability": [s for s in obedience if s.example.id in reference["promptability"]],
    }
    return {name: scored for name, scored in splits.items() if scored}


def record(
    session: Session, step: int, move: Move, candidate: Candidate, dev: Sequence[Scored],
    train: Sequence[Scored], signal: Signal | None = None, demand: Demand | None = None,
    detail: Mapping[str, object] | None = None, cost: Mapping[str, float] | None = None,
) -> StepRecord:  # fmt: skip
    """The log entry of a move, with the editor's ledger so far."""
    ledger = session.editor.ledger
    calls = float(ledger.calls + ledger.replayed)
    spent = {"editor_calls": calls, "editor_tokens": float(ledger.tokens_in + ledger.tokens_out)}
    return StepRecord(
        step, move, candidate.prompt, candidate.adapter, evaluate.summary(dev), evaluate.summary(train),
        signal or Signal(), dict(demand or {}), dict(detail or {}),
        {**(cost or {"seconds": 0.0, "dev_change": 0.0}), **spent},
    )  # fmt: skip


def remade_rows(cfg: RunConfig, start: Prompt, pairs: Sequence[Pair]) -> list[dict[str, object]]:
    """Verified pairs with their provenance, each once: the reusable data a run leaves behind."""
    rows = {}
    for p in pairs:
        if p.source in ("remade", "rewritten"):
            changed = [list(part) for part in diff(start.both, (p.made or p.prompt).both)]
            rows[p.parent, p.target] = {
                "question": p.question, "answer": p.target, "system": p.prompt.system, "template": p.prompt.question,
                "parent": p.parent, "source": p.source, "prompt_diff": changed,
                "backbone": cfg.backbone, "reward": 1.0, "run": cfg.run_id,
            }  # fmt: skip
    return list(rows.values())


def totals(session: Session, history: Sequence[StepRecord], wall: float) -> dict[str, float]:
    """What the run cost: seconds in all and in moves, tokens trained on and generated, peak memory in MB.

    Replies of the frozen weights that an earlier run has made count as if this run had made them; `saved_s` of the
    seconds are theirs. `work_s` are those in which the model computed or the editor was asked.
    """
    return {
        "wall_s": wall + session.saved_s,
        "saved_s": session.saved_s,
        "work_s": session.work_s,
        "moves_s": sum(step.cost["seconds"] for step in history),
        "train_tokens": sum(step.cost.get("train_tokens", 0.0) for step in history),
        "generated_tokens": float(session.generated_tokens),
        "peak_mb": store.peak_megabytes(),
    }
