"""The two moves on a run's current candidate, and what both need: numerical (LoRA) and symbolic (TextGrad)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from . import evaluate, remake, rewrite, rules
from .backbones import Backbone
from .config import RunConfig
from .editor import Editor
from .lora import Epoch, Learner
from .tasks import Task, grade
from .types import Candidate, Edit, Example, Pair, Prompt, Scored

SCREEN = 12  # dev items on which all edits of a move are compared; the best then meets the old prompt on all of dev


@dataclass
class Session:
    """What one run holds open: its data, its backbone with a fresh adapter, and its editor."""

    cfg: RunConfig
    task: Task
    backbone: Backbone
    editor: Editor
    scratch: Path
    learner: Learner = field(init=False)
    replayed: dict[tuple[Prompt, str], Pair | None] = field(default_factory=dict)
    generated_tokens: int = 0

    def __post_init__(self) -> None:
        """Attach the adapter."""
        self.learner = Learner(self.backbone, self.cfg)

    def score(self, prompt: Prompt, examples: Sequence[Example]) -> list[Scored]:
        """Replies of the weights as they are now under `prompt`, graded."""
        scored = evaluate.score(self.backbone, prompt, examples, grade, self.cfg.max_new_tokens)
        self.generated_tokens += sum(s.tokens for s in scored)
        return scored

    def nll(self, prompt: Prompt, examples: Sequence[Example]) -> list[float]:
        """Mean negative log-likelihood per token of each gold answer under `prompt`, in nats."""
        texts = [self.backbone.text(prompt, e.question) for e in examples]
        return self.backbone.nll(texts, [e.answer for e in examples])

    def use(self, candidate: Candidate) -> None:
        """Put a candidate's weights in place; without a checkpoint they are a fresh, neutral adapter."""
        if candidate.adapter is None:
            self.learner = Learner(self.backbone, self.cfg)
        else:
            self.learner.load(self.scratch / candidate.adapter)


def numerical(
    session: Session, candidate: Candidate, chosen: set[str], scored: Sequence[Scored], rewrites: bool, step: int
) -> tuple[Candidate, Epoch, list[Pair]]:
    """One LoRA epoch on the wordings of the `chosen` facts, on what the candidate already does right, and on replay.

    `rewrites` lets the editor write styled answers (when prompts have failed to bring the style).
    Returns the candidate with its new adapter checkpoint, the epoch's report, and the pairs trained on.
    """
    cfg, prompt = session.cfg, candidate.prompt
    targets = choose_targets(session, prompt, [s for s in scored if s.example.fact in chosen], rewrites)
    kept = remake.passing(scored) if remakes(cfg) else {}
    train = [e for e in session.task.examples("train") if e.fact in chosen or e.fact in kept]
    pairs = remake.spread(train, prompt, {**targets, **kept})
    rng = cfg.rng(f"epoch-{step}")
    pairs += replay(session, prompt, round(cfg.replay * len(pairs)), rng)
    epoch = session.learner.epoch(pairs, rng)
    folder = f"adapter-{step:02d}"
    session.learner.save(session.scratch / folder)
    return Candidate(prompt, folder), epoch, pairs


def replay(session: Session, prompt: Prompt, count: int, rng: np.random.Generator) -> list[Pair]:
    """At most `count` replay pairs: half under the current prompt, half under others that tell a rule.

    They are drawn anew each time from half as many again, whose replies are generated once per prompt.
    """
    start, asked = session.task.start, session.task.replay
    kinds = ([(prompt, e) for p, e in asked if p == start], [(p, e) for p, e in asked if p != start])
    found: list[Pair] = []
    for kind, share in zip(kinds, (count - count // 2, count // 2), strict=True):
        pool = kind[: share + share // 2]
        new = [(p, e) for p, e in pool if (p, e.id) not in session.replayed]
        session.replayed |= remake.replay(session.backbone, new, grade, session.cfg)
        useful = [pair for p, e in pool if (pair := session.replayed[p, e.id])]
        found += [useful[i] for i in rng.permutation(len(useful))[:share]]
    return found


def remakes(cfg: RunConfig) -> bool:
    """Whether numerical moves train on remade targets. The purely numerical methods have no symbolic part to use."""
    return cfg.targets == "remade" and not cfg.method.startswith("lora")


def choose_targets(
    session: Session, prompt: Prompt, scored: Sequence[Scored], rewrites: bool
) -> dict[str, tuple[str, str]]:
    """Per chosen fact, the (target, source) to train on; facts left out train on bare gold.

    Purely numerical: own sampled replies that pass the reward; with `lora-demonstrated`, answers written in style.
    Otherwise remade under a prompt that was refined, form lent between replies, and answers rewritten by the editor.
    """
    cfg, examples = session.cfg, [s.example for s in scored]
    if cfg.method == "lora-demonstrated":
        return {e.fact: (rules.demonstrate(e.rules, e.answer), "demonstrated") for e in examples}
    styled = [s.example for s in scored if s.example.rules]
    if not remakes(cfg):
        return remake.sampled(session.backbone, prompt, styled, grade, cfg) if styled else {}
    found = {}
    if prompt != session.task.start and examples:
        found = remake.lend(remake.hinted(session.backbone, prompt, examples, grade, cfg), examples, grade)
    missing = [e for e in styled if e.fact not in found]
    if rewrites and missing:
        found |= remake.rewritten(missing, grade, session.editor, cfg)
        found = remake.lend(found, examples, grade)
    return found


def symbolic(
    session: Session, candidate: Candidate, failing: Sequence[Scored], dev: Sequence[Scored], step: int
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
    edits = rewrite.step(old, shown, session.editor, cfg, session.backbone.count, seed, forbidden) if shown else []
    usable = [edit for edit in edits if not edit.problem and edit.prompt != old]
    screen = [s.example for s in dev[:SCREEN]]
    values = {id(edit): evaluate.summary(session.score(edit.prompt, screen))["value"] for edit in usable}
    best = max(usable, key=lambda edit: values[id(edit)], default=None)
    new = session.score(best.prompt, [s.example for s in dev]) if best else list(dev)
    old_value, new_value = (evaluate.summary(rows)["value"] for rows in (dev, new))
    accepted = best is not None and (new_value >= old_value or not cfg.gate)
    log = [describe(edit, values.get(id(edit)), accepted and edit is best) for edit in edits]
    if best is None or not accepted:
        return candidate, list(dev), log
    return Candidate(best.prompt, candidate.adapter), new, log


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
