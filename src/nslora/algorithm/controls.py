"""Controls: symbolic moves without the critic's message. What remains is chance and the gate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from nslora.tasks import rules
from nslora.types import SLOT, Edit, Prompt, Scored, diff


def shuffled(
    failing: Sequence[Scored], rng: np.random.Generator
) -> list[Scored]:
    """Give each failing reply the critique of a rule that it breaks but its own does not name."""
    others = []
    for s in failing:
        every = [rules.make(name) for name in rules.RULES]
        foreign = [
            rule
            for rule in every
            if rules.critique(rule) not in s.reward.critique
        ]
        # a critique of what is kept anyway would be no critique
        broken = [rule for rule in foreign if not rules.follows(rule, s.output)]
        critique = rules.critique(broken[rng.integers(len(broken))])
        others.append(replace(s, reward=replace(s.reward, critique=critique)))
    return others


def scrambled(
    edit: Edit, old: Prompt, vocabulary: Sequence[str], rng: np.random.Generator
) -> Edit:
    """Exchange every word that an edit added to `old` for a random one; the question's slot stays."""
    if edit.problem:
        return edit

    def text(name: str) -> str:
        parts = diff(getattr(old, name), getattr(edit.prompt, name))
        new = []
        # removed tokens go, added ones are exchanged, the rest stays
        for op, token in parts:
            added = op == "+" and not token.isspace() and SLOT not in token
            if added:
                new.append(str(rng.choice(vocabulary)))
            elif op != "-":
                new.append(token)
        return "".join(new)

    new = Prompt(text("system"), text("question"))
    return Edit(new, diff=diff(old.both, new.both))
