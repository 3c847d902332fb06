"""One evaluator for every method: a candidate's replies, graded in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import cast

from peft import PeftModel

from nslora.model.backbone import Backbone
from nslora.types import Example, Generation, Reward, Scored

Grade = Callable[[Example, str], Reward]


def frozen_weights(backbone: Backbone) -> AbstractContextManager[object]:
    """While open, the backbone answers without its adapter."""
    model = backbone.model
    return (
        cast(PeftModel, model).disable_adapter() if isinstance(model, PeftModel) else nullcontext()
    )


def graded(
    examples: Sequence[Example], replies: Sequence[Generation], grade: Grade
) -> list[Scored]:
    """Each example with its reply and reward."""
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
