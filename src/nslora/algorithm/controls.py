"""Controls: symbolic moves without the critic's message. What remains is chance and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nslora.tasks import rules
from nslora.types import SLOT, Edit, Prompt, Scored, diff


def shuffled(failing: Sequence[Scored], rng: np.random.Generator) -> list[Scored]:
    """The failing examples, each with the critic's words for a rule that its reply breaks but nobody asked for."""
    told = []
    for s in failing:
        asked = {rule.name for rule in s.example.rules}
        others = [rules.make(name) for name in rules.RULES if name not in asked]
        broken = [rule for rule in others if not rules.keep(rule, s.output)]
        words = rules.words(broken[rng.integers(len(broken))])
        told.append(replace(s, reward=replace(s.reward, words=words)))
    return told


def scrambled(edit: Edit, old: Prompt, vocabulary: Sequence[str], rng: np.random.Generator) -> Edit:
    """The edit with every word that it added to `old` exchanged for a random one; the question's slot stays."""
    if edit.problem:
        return edit

    def text(name: str) -> str:
        parts = diff(getattr(old, name), getattr(edit.prompt, name))
        return "".join(
            str(rng.choice(vocabulary))
            if op == "+" and not token.isspace() and SLOT not in token
            else token
            for op, token in parts
            if op != "-"
        )

    new = Prompt(text("system"), text("question"))
    return Edit(new, diff=diff(old.both, new.both))
