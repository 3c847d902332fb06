"""One evaluator for every method: a candidate's replies to a split, graded in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from peft import PeftModel

from .backbones import Backbone
from .types import Example, Prompt, Reward, Scored

Grade = Callable[[Example, str], Reward]


def frozen_weights(backbone: Backbone) -> AbstractContextManager[object]:
    """While open, the backbone answers without its adapter."""
    model = backbone.model
    return cast(PeftModel, model).disable_adapter() if isinstance(model, PeftModel) else nullcontext()


def score(
    backbone: Backbone, prompt: Prompt, examples: Sequence[Example], grade: Grade, max_new_tokens: int
) -> list[Scored]:
    """Greedy replies of the backbone, as it is now, to `examples` under `prompt`, graded; in the given order."""
    return score_each(backbone, [prompt] * len(examples), examples, grade, max_new_tokens)


def score_each(
    backbone: Backbone, prompts: Sequence[Prompt], examples: Sequence[Example], grade: Grade, max_new_tokens: int
) -> list[Scored]:
    """As `score`, with a prompt of its own for every example."""
    texts = [backbone.text(p, e.question) for p, e in zip(prompts, examples, strict=True)]
    replies = backbone.generate(texts, max_new_tokens)
    return [
        Scored(e, reply.text, grade(e, reply.text), reply.confidence, reply.tokens)
        for e, reply in zip(examples, replies, strict=True)
    ]


def summary(scored: Sequence[Scored]) -> dict[str, float]:
    """Means over items: success (both parts), value (mean of parts), content, content_strict, style; and n."""
    n = len(scored)
    names = ("success", "value", "content", "content_strict", "style")
    means = {name: sum(getattr(s.reward, name) for s in scored) / n for name in names}
    return {**means, "n": n}
