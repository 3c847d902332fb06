"""The two moves on a run's current candidate: numerical (LoRA) and symbolic (TextGrad)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nslora.algorithm import controls, evaluate, remake, textgrad_compat
from nslora.algorithm.session import Session
from nslora.config import RunConfig
from nslora.model.lora import Epoch
from nslora.tasks import rules
from nslora.tasks.build import grade
from nslora.tasks.grading import is_problem
from nslora.types import Candidate, Edit, Example, Pair, Prompt, Scored

RUNGS = (
    6,
    12,
)  # dev items on which the edits of a move are compared, a third of them going on to the second rung
REPLAYED = 64  # replay questions at most whose replies under a rewritten prompt are made


def numerical(
    session: Session,
    candidate: Candidate,
    chosen: set[str],
    scored: Sequence[Scored],
    rewrites: bool,
    step: int,
) -> tuple[Candidate, Epoch, list[Pair]]:
    """LoRA (`cfg.epochs` passes) on the wordings of `chosen` facts, what the candidate already does right, and replay.

    `rewrites` lets the editor write styled answers (when prompts have failed to bring the style). Baking trains under
    the start prompt instead, and gives the candidate that one back.
    Returns the candidate with its new adapter checkpoint, the last pass's report with all tokens and seconds, and the
    pairs trained on.
    """
    cfg, prompt = session.cfg, candidate.prompt
    targets = choose_targets(
        session, prompt, [s for s in scored if s.example.fact in chosen], rewrites
    )
    kept = remake.passing(scored) if remakes(cfg) else {}
    train = [e for e in session.task.examples("train") if e.fact in chosen or e.fact in kept]
    pairs = remake.arranged(
        remake.spread(train, prompt, {**targets, **kept}), remake.gold(train, prompt), cfg.targets
    )
    taught = session.task.start if cfg.bake else prompt
    pairs = [replace(p, prompt=taught, made=prompt) for p in pairs] if taught != prompt else pairs
    rng = cfg.rng(f"epoch-{step}")
    pairs += replay(session, taught, round(cfg.replay * len(pairs)), rng)
    passes = [session.timed(lambda: session.learner.epoch(pairs, rng)) for _ in range(cfg.epochs)]
    tokens, seconds = (
        sum(getattr(epoch, part) for epoch in passes) for part in ("tokens", "seconds")
    )
    folder = f"adapter-{step:02d}"
    session.learner.save(session.scratch / folder)
    session.weights = folder
    return Candidate(taught, folder), replace(passes[-1], tokens=tokens, seconds=seconds), pairs


def replay(session: Session, prompt: Prompt, count: int, rng: np.random.Generator) -> list[Pair]:
    """At most `count` replay pairs, drawn anew each time: half under the current prompt, half under told rules."""
    start = session.task.start
    own = [(p, e) for p, e in session.task.replay if p == start]
    told = [(p, e) for p, e in session.task.replay if p != start]

    def whole(asked: list[tuple[Prompt, Example]]) -> list[Pair]:
        replies = session.frozen([session.backbone.text(p, e.question) for p, e in asked])
        return remake.replay(asked, replies, grade, session.cfg)

    def drawn(useful: list[Pair], share: int) -> list[Pair]:
        return [useful[i] for i in rng.permutation(len(useful))[:share]]

    if not count:
        return []
    half = count - count // 2
    most = min(REPLAYED, 3 * half // 2)
    mine = whole(own) if prompt == start else known(session, prompt, [e for _, e in own], most)
    return drawn(mine, half) + drawn(whole(told), count // 2)


def known(session: Session, prompt: Prompt, questions: Sequence[Example], most: int) -> list[Pair]:
    """What the frozen model knows under the start prompt, as the rewritten one makes it answer; of `most` questions.

    A rewritten prompt alone costs knowledge: asked for JSON, a small model names wrong capitals. So these replay pairs
    are remade like new facts: a reply to the hinted question, verified, and only where the model was right before.
    """
    cfg, text = session.cfg, session.backbone.text
    before = session.frozen([text(session.task.start, e.question) for e in questions])
    right = [
        e for e, reply in zip(questions, before, strict=True) if grade(e, reply.text).content == 1
    ]
    right = [right[i] for i in cfg.rng("replay").permutation(len(right))[:most]]
    hinted = session.frozen([text(prompt, remake.hint(e)) for e in right])
    targets = remake.verified(right, hinted, grade)
    whole = [e for e, reply in zip(right, hinted, strict=True) if reply.tokens < cfg.max_new_tokens]
    return [
        Pair(prompt, e.question, targets[e.fact][0], "replay") for e in whole if e.fact in targets
    ]


def remakes(cfg: RunConfig) -> bool:
    """Whether numerical moves train on remade targets. The purely numerical methods have no symbolic part to use."""
    return cfg.targets not in ("gold", "duplicated") and not cfg.method.startswith("lora")


def choose_targets(
    session: Session, prompt: Prompt, scored: Sequence[Scored], rewrites: bool
) -> dict[str, tuple[str, str]]:
    """Per chosen fact, the (target, source) to train on; facts left out train on bare gold.

    Purely numerical: own sampled replies that pass the reward; with `lora-demonstrated`, answers written in style.
    Otherwise remade under a prompt that was refined, form lent between replies, and answers rewritten by the editor;
    problems that the candidate does not solve are attempted anew.
    """
    cfg, examples = session.cfg, [s.example for s in scored]
    if cfg.method == "lora-demonstrated":
        return {e.fact: (rules.demonstrate(e.rules, e.answer), "demonstrated") for e in examples}
    styled = [s.example for s in scored if s.example.rules]
    if not remakes(cfg):
        return (
            session.timed(lambda: remake.sampled(session.backbone, prompt, styled, grade, cfg))
            if styled
            else {}
        )
    found = {}
    if examples and (prompt != session.task.start or cfg.targets != "remade"):
        replies = session.frozen([session.backbone.text(prompt, remake.hint(e)) for e in examples])
        if cfg.targets == "unverified":
            return remake.unverified(examples, replies)
        found = remake.lend(remake.verified(examples, replies, grade), examples, grade)
    failed = [s.example for s in scored if is_problem(s.example) and s.reward.success < 1]
    tries = [e for e in failed if e.fact not in found for _ in range(remake.ATTEMPTS)]
    texts = [session.backbone.text(prompt, e.question) for e in tries]
    found |= remake.verified(
        tries, session.generate(texts, remake.TEMPERATURE) if tries else [], grade
    )
    missing = [e for e in styled if e.fact not in found]
    if rewrites and missing:
        found |= session.timed(lambda: remake.rewritten(missing, grade, session.editor, cfg))
        found = remake.lend(found, examples, grade)
    return found


def symbolic(
    session: Session,
    candidate: Candidate,
    failing: Sequence[Scored],
    dev: Sequence[Scored],
    step: int,
) -> tuple[Candidate, list[Scored], list[dict[str, object]]]:
    """One TextGrad step on both prompt texts: several edits, compared on dev, kept only past the gate.

    Returns the candidate, its dev rows, and one log row per edit with its diff, problem and dev value.
    """
    cfg, old = session.cfg, candidate.prompt
    order = cfg.rng(f"feedback-{step}").permutation(len(failing))
    forbidden = frozenset(e.answer for e in session.task.examples("train"))
    seed = int(cfg.rng(f"edit-{step}").integers(2**31))
    # broken style first, and among that right content: no prompt can hold the answers themselves
    shown = sorted((failing[i] for i in order), key=lambda s: (s.reward.style, -s.reward.content))
    chance = cfg.rng(f"control-{step}")
    if cfg.control == "shuffled":
        shown = controls.shuffled(shown, chance)
    count = session.backbone.count
    edits = (
        session.timed(
            lambda: textgrad_compat.step(old, shown, session.editor, cfg, count, seed, forbidden)
        )
        if shown
        else []
    )
    if cfg.control == "random":
        words = sorted({word for _, e in session.task.replay for word in e.question.split()})
        edits = [controls.scrambled(edit, old, words, chance) for edit in edits]
    usable = [edit for edit in edits if not edit.problem and edit.prompt != old]
    best, values = halve(session, usable, dev)
    new = session.score(best.prompt, [s.example for s in dev]) if best else list(dev)
    old_value, new_value = (evaluate.summary(rows)["value"] for rows in (dev, new))
    accepted = best is not None and (new_value >= old_value or not cfg.gate)
    log = [describe(edit, values.get(id(edit)), accepted and edit is best) for edit in edits]
    if best is None or not accepted:
        return candidate, list(dev), log
    return Candidate(best.prompt, candidate.adapter), new, log


def halve(
    session: Session, edits: Sequence[Edit], dev: Sequence[Scored]
) -> tuple[Edit | None, dict[int, float]]:
    """The best edit by successive halving on dev, and by `id` the value that each had on the last rung it saw.

    The rungs take the dev items with the lowest rewards first: there edits differ. What an edit does to the others is
    seen afterwards, on all of dev. The edits of a rung are answered in one batch.
    """
    hardest = [s.example for s in sorted(dev, key=lambda s: (s.reward.style, s.reward.value))]
    alive, values = list(edits), dict[int, float]()
    for items in RUNGS:
        if len(alive) < 2:
            break
        asked = hardest[:items]
        scored = session.score_each(
            [edit.prompt for edit in alive for _ in asked], asked * len(alive)
        )
        for i, edit in enumerate(alive):
            values[id(edit)] = evaluate.summary(scored[i * len(asked) : (i + 1) * len(asked)])[
                "value"
            ]
        alive = sorted(alive, key=lambda edit: -values[id(edit)])[: max(1, round(len(alive) / 3))]
    return (alive[0] if alive else None), values


def describe(edit: Edit, value: float | None, accepted: bool) -> dict[str, object]:
    """Log row of one edit."""
    return {
        "system": edit.prompt.system,
        "question": edit.prompt.question,
        "problem": edit.problem,
        "screen_value": value,
        "accepted": accepted,
        "diff": [list(part) for part in edit.diff],
    }
