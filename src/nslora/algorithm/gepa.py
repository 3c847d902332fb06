"""A second prompt optimizer: GEPA's own (Agrawal et al., arXiv 2507.19457; extra `peers`).

It searches with our replies, reward and editor, within as many metric calls (graded replies) as the
symbolic moves of `textgrad` would take. What had to be added: an adapter, and a score of 0 with a
remark for prompts that we could not use (without a question slot, too long, or with an answer).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nslora.algorithm.session import Session, State
from nslora.algorithm.textgrad_compat import copies, leaks, masked
from nslora.editor.client import EditorError, Request
from nslora.types import (
    CONTROL,
    SLOT,
    Edit,
    Example,
    Prompt,
    Scored,
    UserError,
    diff,
)

REFLECTION_TOKENS = 256  # longest reply of the editor to a reflection
TEMPERATURE = 0.7  # of the editor, as in our own edits
MINIBATCH = 3  # training examples per reflection, GEPA's default


def edits(run: Session, state: State, metric_calls: int) -> list[Edit]:
    """Return GEPA's best prompt on dev as an edit, within `metric_calls` graded replies.

    None if nothing better was found.

    Raises UserError when the package gepa is not installed.
    """
    try:
        import gepa
    except ImportError:
        raise UserError(
            "method gepa needs the extra: pip install 'nslora[peers]'."
        ) from None
    # texts are GEPA's components; a task example is its data
    old = state.candidate.prompt
    # typed loosely: the package does not export what it documents
    peer: Any = gepa
    result = peer.optimize(
        seed_candidate={"system": old.system, "question": old.question},
        trainset=list(run.task.feedback),
        valset=list(run.task.dev),
        adapter=_adapter(run, gepa, metric_calls),
        reflection_lm=Reflection(run),
        reflection_minibatch_size=min(MINIBATCH, len(run.task.feedback)),
        max_metric_calls=metric_calls,
        seed=int(run.cfg.rng("gepa").integers(2**31)),
        logger=Silent(),
        display_progress_bar=False,
    )
    best: Any = result.best_candidate
    new = Prompt(best["system"], best["question"])
    if new == old or problem(run, new):
        return []
    return [Edit(new, diff=diff(old.both, new.both))]


def problem(run: Session, prompt: Prompt) -> str:
    """Return why a prompt cannot be used; empty if it can."""
    count = run.backbone.count
    answers = {e.answer for e in run.task.train} - run.task.labels
    if prompt.question.count(SLOT) != 1 or SLOT in prompt.system:
        return f"The question template must hold {SLOT} exactly once, the system prompt never."
    if run.task.initial_prompt.system and not prompt.system.strip():
        # what an editor that failed has proposed
        return "The system prompt must not be empty."
    if count(prompt.system) + count(prompt.question) > run.cfg.prompt_tokens:
        return f"The texts must be shorter than {run.cfg.prompt_tokens} tokens together."
    if CONTROL.search(prompt.both):
        return "The texts must hold no token of a chat format."
    questions = [example.question for example in run.task.train]
    if copies(prompt.both, questions, run.task.initial_prompt.both):
        return "The texts must not repeat a question."
    if leaks(prompt.both, answers, run.task.initial_prompt.both):
        return "The texts must not hold the answer to any question."
    return ""


class Silent:
    """GEPA's log, which goes nowhere: a run keeps its own records."""

    def log(self, message: str, *args: Any, **kwargs: Any) -> None:
        """Drop a message."""


class Reflection:
    """GEPA's reflection model: our editor, counted and recorded like every edit."""

    def __init__(self, run: Session) -> None:
        self.run = run
        self.rng = run.cfg.rng("gepa reflections")

    def __call__(self, prompt: str | list[dict[str, Any]]) -> str:
        """Return the editor's reply to a reflection; an empty proposal where it fails."""
        seed = int(self.rng.integers(2**31))
        request = Request("", str(prompt), seed, TEMPERATURE, REFLECTION_TOKENS)
        try:
            return self.run.timed(lambda: self.run.editor.complete(request))
        except EditorError:
            return "``````"


def _adapter(run: Session, gepa: Any, metric_calls: int) -> Any:
    """Return GEPA's view of a run: it evaluates prompts on examples, and tells what went wrong.

    GEPA looks at its budget between iterations only. What would exceed it is not graded, and scores
    0 as what cannot be used: a candidate that was not graded in full is not the best one.
    """

    class Adapter(gepa.GEPAAdapter):
        propose_new_texts = None  # GEPA's own proposer
        left = metric_calls

        def evaluate(
            self,
            batch: Sequence[Example],
            candidate: Mapping[str, str],
            capture_traces: bool = False,
        ) -> Any:
            prompt = Prompt(candidate["system"], candidate["question"])
            remark = problem(run, prompt)
            if len(batch) > self.left:
                remark = "The budget is spent."
            if remark:
                graded = [("", remark, 0.0)] * len(batch)
            else:
                self.left -= len(batch)
                graded = [
                    (s.output, critique(s), s.reward.value)
                    for s in run.score(prompt, batch)
                ]
            outputs, remarks, scores = map(list, zip(*graded, strict=True))
            traces = zip(batch, outputs, remarks, strict=True)
            trajectories = list(traces) if capture_traces else None
            return gepa.EvaluationBatch(outputs, scores, trajectories)

        def make_reflective_dataset(
            self,
            candidate: Mapping[str, str],
            eval_batch: Any,
            components_to_update: Sequence[str],
        ) -> dict[str, list[dict[str, str]]]:
            rows = [
                {
                    "Question": example.question,
                    "Reply": output,
                    "Critique": remark,
                }
                for example, output, remark in eval_batch.trajectories
            ]
            return dict.fromkeys(components_to_update, rows)

    return Adapter()


def critique(scored: Scored) -> str:
    """Return the critique without the right answer, which no prompt may hold."""
    return masked(scored) or "The reply is right."
