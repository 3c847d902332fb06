"""What one run holds open, and the model's replies in it, none of which is computed twice."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from nslora.algorithm import evaluate
from nslora.config import RunConfig
from nslora.editor.client import Editor
from nslora.model.backbone import Backbone
from nslora.model.lora import Learner
from nslora.tasks.build import Task, grade
from nslora.types import Candidate, Example, Generation, Prompt, Scored

Memo = Callable[[str, Callable[[], Any]], Any]
Produce = Callable[[list[str], float], list[Generation]]  # replies to model inputs at a temperature
T = TypeVar("T")


@dataclass
class Session:
    """What one run holds open: its data, its backbone with a fresh adapter, and its editor.

    No greedy reply is computed twice: each is kept for the run, and those of the frozen weights by `memo` for every run
    that shares its folder (same batch, threads and type, so the same bits), as are their sampled ones.

    Attributes:
        weights: the adapter checkpoint in place; empty while the weights are the frozen ones.
        generated_tokens: tokens of all replies, each counted once. saved_s: seconds that memoised replies took to make.
        work_s: seconds in which the model computed or the editor was asked; what is left of a run is its own overhead.
    """

    cfg: RunConfig
    task: Task
    backbone: Backbone
    editor: Editor
    scratch: Path
    memo: Memo
    weights: str = ""
    generated_tokens: int = 0
    saved_s: float = 0.0
    work_s: float = 0.0
    learner: Learner = field(init=False)
    replies: dict[str, dict[str, Generation]] = field(
        default_factory=dict
    )  # greedy, by weights and text
    likelihoods: dict[tuple[str, Prompt, tuple[str, ...]], list[float]] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        """Attach the adapter."""
        self.learner = Learner(self.backbone, self.cfg)

    def timed(self, compute: Callable[[], T]) -> T:
        """The result of work of the model or the editor, its seconds counted."""
        started, saved = time.perf_counter(), self.saved_s
        result = compute()
        self.work_s += time.perf_counter() - started + self.saved_s - saved
        return result

    def generate(self, texts: Sequence[str], temperature: float = 0.0) -> list[Generation]:
        """Replies of the weights as they are now to model inputs, in order; greedy unless `temperature` > 0."""
        if not self.weights:
            return self.frozen(texts, temperature)
        return self._kept(self.weights, texts, temperature, self._produced)

    def frozen(self, texts: Sequence[str], temperature: float = 0.0) -> list[Generation]:
        """As `generate`, of the frozen weights, whatever adapter is in place."""
        return self._kept("", texts, temperature, self._memoised)

    def _kept(
        self, weights: str, texts: Sequence[str], temperature: float, produce: Produce
    ) -> list[Generation]:
        if temperature:  # a text may be asked several times, for as many draws
            return self._counted(list(texts), temperature, produce)
        kept = self.replies.setdefault(weights, {})
        new = [text for text in dict.fromkeys(texts) if text not in kept]
        kept |= zip(new, self._counted(new, temperature, produce), strict=True) if new else {}
        return [kept[text] for text in texts]

    def _counted(self, texts: list[str], temperature: float, produce: Produce) -> list[Generation]:
        replies = self.timed(lambda: produce(texts, temperature))
        self.generated_tokens += sum(reply.tokens for reply in replies)
        return replies

    def _produced(self, texts: list[str], temperature: float) -> list[Generation]:
        return self.backbone.generate(texts, self.cfg.max_new_tokens, temperature, self.cfg.seed)

    def _memoised(self, texts: list[str], temperature: float) -> list[Generation]:
        b, cfg, fresh = self.backbone, self.cfg, False

        def compute() -> dict[str, object]:
            nonlocal fresh
            fresh, started = True, time.perf_counter()
            with evaluate.frozen_weights(b):
                replies = self._produced(texts, temperature)
            return {
                "seconds": time.perf_counter() - started,
                "replies": [asdict(reply) for reply in replies],
            }

        chance = [temperature, cfg.seed] if temperature else []
        what = json.dumps(
            [b.identity, b.dtype, b.device, cfg.threads, cfg.max_new_tokens, texts, *chance]
        )
        stored = self.memo(f"frozen-{hashlib.sha256(what.encode()).hexdigest()}", compute)
        self.saved_s += 0.0 if fresh else stored["seconds"]
        return [Generation(**reply) for reply in stored["replies"]]

    def score(self, prompt: Prompt, examples: Sequence[Example]) -> list[Scored]:
        """Replies of the weights as they are now under `prompt`, graded."""
        return self.score_each([prompt] * len(examples), examples)

    def score_each(self, prompts: Sequence[Prompt], examples: Sequence[Example]) -> list[Scored]:
        """As `score`, with a prompt of its own for every example."""
        texts = [self.backbone.text(p, e.question) for p, e in zip(prompts, examples, strict=True)]
        return evaluate.graded(examples, self.generate(texts), grade)

    def score_parts(self, prompt: Prompt, *parts: Sequence[Example]) -> list[list[Scored]]:
        """As `score`, of several sets of examples in one batch."""
        scored = iter(self.score(prompt, [e for part in parts for e in part]))
        return [list(islice(scored, len(part))) for part in parts]

    def nll(self, prompt: Prompt, examples: Sequence[Example]) -> list[float]:
        """Mean negative log-likelihood per token of each gold answer under `prompt`, in nats."""
        key = (self.weights, prompt, tuple(e.id for e in examples))
        if key not in self.likelihoods:
            texts = [self.backbone.text(prompt, e.question) for e in examples]
            self.likelihoods[key] = self.timed(
                lambda: self.backbone.nll(texts, [e.answer for e in examples])
            )
        return self.likelihoods[key]

    def use(self, candidate: Candidate) -> None:
        """Put a candidate's weights in place; without a checkpoint they are a fresh, neutral adapter."""
        if candidate.adapter is None:
            self.learner = Learner(self.backbone, self.cfg)
        else:
            self.learner.load(self.scratch / candidate.adapter)
        self.weights = candidate.adapter or ""
