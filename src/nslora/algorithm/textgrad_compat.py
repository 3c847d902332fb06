"""Symbolic move: one TextGrad step (Yuksekgonul et al., arXiv 2406.07496) on the system prompt and question template.

The forward pass has been made by the backbone and the loss is the critic's words, so the editor is called only for the
gradients on the two texts and for the edits. Variables, backward pass and optimizer are textgrad's own; the subclasses
here mend what version 0.1.8 does to small models: hidden middles of texts, unordered feedback, unchecked replies.
"""

from __future__ import annotations

import logging.handlers
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from typing import TypeVar
from unittest.mock import patch

from nslora.algorithm.editor_prompts import (
    CONSTRAINTS,
    EDITOR,
    GRADIENT,
    MODELS,
    OPTIMIZER,
    PLANS,
    REMINDER,
    ROLES,
    TAGS,
    worked_examples,
)
from nslora.config import RunConfig
from nslora.editor.client import Editor, EditorError, Request
from nslora.types import CONTROL, SLOT, Edit, Prompt, Scored, diff


class NoFile(logging.NullHandler):
    """Stands for a log: textgrad opens one of every prompt when it is imported."""

    def __init__(self, *_: object) -> None:
        super().__init__()


# nothing on disk, so that nothing stays where the process is killed meanwhile
with patch.object(logging, "FileHandler", NoFile):
    # a folder that is there
    os.environ["TEXTGRAD_LOG_DIR"] = os.sep
    # else a price list is fetched
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import textgrad
    from textgrad.autograd.function import BackwardContext, Function
    from textgrad.autograd.llm_ops import LLMCall
    from textgrad.engine import EngineLM
    from textgrad.optimizer import TextualGradientDescent

    textgrad.logger.disabled = True

GRADIENT_TOKENS, EDIT_TOKENS = 64, 128  # longest replies of the editor
SHORTEST = 3  # characters of an answer that can leak: shorter ones are in many words and rules
COPIED = (
    3  # words in a row that are one row's own: no prompt takes them from data
)
MASK = "…"  # stands for the right answer in the critic's words
T = TypeVar("T")
SHOWN = 400  # longest piece of data shown to the editor, in characters


class NoEdit(Exception):
    """The editor's reply to the optimizer cannot be used; the message says why."""


class Ordered(list):
    """A list that textgrad can use where it has sets, whose order differs from process to process."""

    add = list.append


class Text(textgrad.Variable):
    """A textgrad variable with ordered gradients and predecessors, shown whole instead of by its ends."""

    def __init__(
        self,
        value: str,
        role: str,
        predecessors: Iterable[textgrad.Variable] = (),
        requires_grad: bool = True,
    ) -> None:
        super().__init__(
            value, role_description=role, requires_grad=requires_grad
        )
        self.predecessors = list(predecessors)

    @property
    def gradients(self) -> Ordered:
        """Feedback in the order in which it came."""
        return self._gradients

    @gradients.setter
    def gradients(self, values: Iterable[textgrad.Variable]) -> None:
        self._gradients = Ordered(values)

    def get_short_value(self, n_words_offset: int = 10) -> str:
        """The whole value, its tags escaped."""
        return escape(self.value)


class Reply(LLMCall):
    """The backbone's call, made before: forward hands on the reply it gave, backward is textgrad's own."""

    def forward(self, system: Text, question: Text, scored: Scored) -> Text:
        """The recorded reply as a function of both prompt texts."""
        reply = Text(
            quote(scored.output), "the reply to the user", [system, question]
        )
        asked = Prompt(question=escape(question.value)).render(
            quote(scored.example.question)
        )
        told = escape(system.value)
        reply.set_grad_fn(
            BackwardContext(
                self.backward, response=reply, prompt=asked, system_prompt=told
            )
        )
        return reply


class Critic(Function):
    """The textual loss: the critic's words are the gradient on the reply, without a call."""

    def forward(self, reply: Text, words: str) -> Text:
        """The loss on one reply."""
        loss = Text(words, "the critic's words", [reply])
        loss.set_grad_fn(
            BackwardContext(self.backward, reply=reply, words=words)
        )
        return loss

    def backward(
        self, reply: Text, words: str, backward_engine: EngineLM
    ) -> None:
        """Put the words on the reply."""
        reply.gradients.add(
            textgrad.Variable(words, role_description="feedback to the reply")
        )


class Unanswered(Exception):
    """A pass met a request that has no reply yet."""


class Replies:
    """The editor's replies to the requests of several passes."""

    def __init__(self) -> None:
        self.answered: dict[Request, str | EditorError] = {}
        self.wanted: list[Request] = []

    def __getitem__(self, request: Request) -> str:
        """Return a reply; raises its EditorError, or Unanswered after noting the request."""
        if request not in self.answered:
            self.wanted.append(request)
            raise Unanswered
        reply = self.answered[request]
        if isinstance(reply, EditorError):
            raise reply
        return reply

    def ask(self, editor: Editor) -> None:
        """Make all noted requests at once."""
        self.answered |= zip(
            self.wanted, editor.complete_all(self.wanted), strict=True
        )
        self.wanted.clear()


Pass = Callable[[Replies], T]


def ask_together(passes: Sequence[Pass[T]], editor: Editor) -> list[T]:
    """Return the results of passes of textgrad whose requests reach the editor in one batch.

    textgrad asks for one reply at a time. Here a pass is interrupted where a reply is missing; once
    all are interrupted, their requests are made together and the passes run again. They have no
    other effects than their result.
    """
    # by the number of the pass
    replies, results = Replies(), dict[int, T]()
    while len(results) < len(passes):
        for i, make in enumerate(passes):
            if i not in results:
                with suppress(Unanswered):
                    results[i] = make(replies)
        if replies.wanted:
            replies.ask(editor)
    return [results[i] for i in range(len(passes))]


class Engine(EngineLM):
    """textgrad's view of the editor, for gradients: no cache, no retries, a short system prompt."""

    model_string = "the editor"

    def __init__(self, replies: Replies, seed: int, critique: str = "") -> None:
        self.replies, self.seed, self.critique = replies, seed, critique

    def generate(
        self, prompt: str, system_prompt: str | None = None, **_: object
    ) -> str:
        """Return one gradient; raises EditorError, or Unanswered."""
        user = prompt + GRADIENT.format(words=self.critique)
        return self.replies[
            Request(EDITOR, user, self.seed, 0.3, GRADIENT_TOKENS)
        ]

    def __call__(self, *args, **kwargs) -> str:
        """Do as `generate` does."""
        return self.generate(*args, **kwargs)


class EditEngine(Engine):
    """The engine of the optimizer, which accepts any reply: one that is no edit raises NoEdit."""

    def __init__(self, replies: Replies, seed: int, plan: str) -> None:
        super().__init__(replies, seed)
        self.plan = plan

    def generate(
        self, prompt: str, system_prompt: str | None = None, **_: object
    ) -> str:
        """Return one edit in its tags; raises EditorError, NoEdit, or Unanswered."""
        user = prompt + REMINDER.format(plan=self.plan)
        reply = self.replies[
            Request(system_prompt or "", user, self.seed, 0.7, EDIT_TOKENS)
        ]
        return f"{TAGS[0]}{parse(reply)}{TAGS[1]}"


def escape(text: str) -> str:
    """Tags made harmless, so that no text can end its own tag or pretend to be an edit."""
    return text.replace("<", "‹").replace(">", "›")


def unescape(text: str) -> str:
    """Undo `escape`, for edits that repeat what they were shown."""
    return text.replace("‹", "<").replace("›", ">")


def quote(text: str) -> str:
    """A text from data: escaped, shortened, and without a question slot of its own."""
    text = text if len(text) <= SHOWN else text[:SHOWN] + " ..."
    return escape(text).replace(SLOT, SLOT.strip("{}"))


def masked(scored: Scored) -> str:
    """The critic's words without the right answer, which no prompt may hold anyway.

    Sentences that give it are left out if others remain: else the editor asks for right answers and forgets the rule.
    """
    answer, critique = scored.example.answer.strip(), scored.reward.critique
    named = (
        _whole(answer)
        if len(answer) >= SHORTEST
        else re.compile(re.escape(f"'{answer}'"))
    )
    sentences = re.split(r"(?<=[.!?])\s+", named.sub(MASK, critique))
    return quote(" ".join([s for s in sentences if MASK not in s] or sentences))


def _whole(answer: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)


def parse(reply: str) -> str:
    """The text between the only pair of tags; raises NoEdit."""
    tag = "|".join(TAGS)
    if tuple(re.findall(tag, reply)) != TAGS:
        raise NoEdit("tags")
    text = re.split(tag, reply)[1].strip()
    opened = text.startswith("{") and not text.startswith(SLOT)
    if opened and (text.endswith("}") or text.count("{") > text.count("}")):
        # copied from textgrad's "{the improved variable}"
        text = text[1:].removesuffix("}").strip()
    # what is copied from the examples
    for _, reply in MODELS:
        text = re.sub(
            rf",? like this: {re.escape(reply)}", "", text, flags=re.IGNORECASE
        )
    if not text:
        raise NoEdit("empty")
    return text


def propose_edits(
    prompt: Prompt,
    failures: list[Scored],
    editor: Editor,
    cfg: RunConfig,
    count: Callable[[str], int],
    seed: int,
    forbidden: frozenset[str] = frozenset(),
    labels: frozenset[str] = frozenset(),
) -> list[Edit]:
    """Make one TextGrad step on both texts of `prompt`.

    Returns up to 3 x cfg.candidates different edits (the system prompt, the template, both), and
    the problems of proposals that cannot be used.

    Args:
        failures: replies with their critiques; cfg.feedback of them, with different critiques, are
            shown to the editor.
        count: tokens of a text for the backbone; a prompt above cfg.prompt_tokens is no edit.
        seed: of the editor's sampling. Equal arguments make equal requests, in any process.
        forbidden: answers that no prompt may hold, besides those of `failures` (leak guard).
        labels: answers that recur, which a prompt may list.
    """
    by_critique: dict[str, Scored] = {}
    for scored in failures:
        # equal critiques would make equal gradients
        by_critique.setdefault(masked(scored), scored)
    shown = list(by_critique.items())[: cfg.feedback]

    feedback = ask_gradients(prompt, shown, editor, seed)
    proposals = ask_proposals(prompt, feedback, editor, cfg.candidates, seed)
    answers = (forbidden | {s.example.answer for s in failures}) - labels
    questions = [s.example.question for s in failures]
    ordinary = " ".join([prompt.both, *by_critique])
    edits = []
    for parts in proposals:
        for new, problem in assemble(prompt, parts):
            if leaks(new.both, answers, ordinary):
                problem = "leak"
            elif copies(new.both, questions, ordinary):
                problem = "copy"
            elif count(new.system) + count(new.question) > cfg.prompt_tokens:
                problem = "long"
            changed = Edit(new, diff=diff(prompt.both, new.both))
            edits.append(Edit(prompt, problem) if problem else changed)
    return list(dict.fromkeys(edits))


def ask_gradients(
    prompt: Prompt,
    shown: Sequence[tuple[str, Scored]],
    editor: Editor,
    seed: int,
) -> dict[str, list[str]]:
    """Return the gradients of all shown failures per prompt text, asked for in one batch."""

    def gradient(name: str, i: int) -> Pass[list[str]]:
        critique, scored = shown[i]
        return lambda replies: gradients(
            prompt, name, scored, Engine(replies, seed + i, critique)
        )

    # texts x failures
    passes = [gradient(name, i) for name in ROLES for i in range(len(shown))]
    made = iter(ask_together(passes, editor))
    return {name: [*chain(*islice(made, len(shown)))] for name in ROLES}


def ask_proposals(
    prompt: Prompt,
    feedback: dict[str, list[str]],
    editor: Editor,
    candidates: int,
    seed: int,
) -> list[dict[str, tuple[str, str]]]:
    """Return per candidate a proposal for each prompt text (`propose`), asked for in one batch."""
    # one plan per step: the candidates of a text share their prompt, whatever their seed
    plan = PLANS[seed % len(PLANS)]

    def proposal(k: int, name: str) -> Pass[tuple[str, str]]:
        return lambda replies: propose(
            prompt, name, feedback[name], EditEngine(replies, seed + k, plan)
        )

    # candidates x texts
    passes = [proposal(k, name) for k in range(candidates) for name in ROLES]
    made = iter(ask_together(passes, editor))
    return [{name: next(made) for name in ROLES} for _ in range(candidates)]


def gradients(
    prompt: Prompt, name: str, scored: Scored, engine: Engine
) -> list[str]:
    """Return the gradients of one failing example on the text `name`; none if the editor failed."""
    leaves = {
        other: Text(getattr(prompt, other), role, requires_grad=other == name)
        for other, role in ROLES.items()
    }
    loss = Critic()(
        Reply(engine)(leaves["system"], leaves["question"], scored),
        engine.critique,
    )
    with suppress(EditorError):
        loss.backward(engine)
    return [gradient.value for gradient in leaves[name].gradients]


def propose(
    prompt: Prompt, name: str, feedback: Sequence[str], engine: EditEngine
) -> tuple[str, str]:
    """Return one proposal of the optimizer for a text, and why it cannot be used ("": it can)."""
    value = getattr(prompt, name)
    if not feedback:
        return value, "editor"
    variable = Text(value, ROLES[name])
    variable.gradients = [
        textgrad.Variable(
            f"<FEEDBACK>{escape(text)}</FEEDBACK>", role_description="feedback"
        )
        for text in feedback
    ]
    options = {
        "constraints": [CONSTRAINTS[name]],
        "in_context_examples": worked_examples(name),
        "optimizer_system_prompt": OPTIMIZER,
    }
    try:
        TextualGradientDescent([variable], engine=engine, **options).step()
    except EditorError:
        return value, "editor"
    except NoEdit as reason:
        return value, str(reason)
    text = unescape(variable.value)
    if CONTROL.search(text):
        return value, "control"
    return text, "" if text.count(SLOT) == (name == "question") else "slot"


def assemble(
    prompt: Prompt, parts: dict[str, tuple[str, str]]
) -> list[tuple[Prompt, str]]:
    """Prompts with one usable part replaced, and with both, each with no problem; the old one with its problem if none.

    An editor that writes one of the texts well and the other badly is the rule with small models.
    """
    new = {
        name: text
        for name, (text, problem) in parts.items()
        if not problem and text != getattr(prompt, name)
    }
    prompts = [replace(prompt, **{name: text}) for name, text in new.items()]
    if len(new) > 1:
        prompts.append(replace(prompt, **new))
    problems = [problem for _, problem in parts.values() if problem]
    return [(p, "") for p in prompts] or [
        (prompt, (problems or ["unchanged"])[0])
    ]


def leaks(text: str, answers: Iterable[str], ordinary: str) -> bool:
    """Whether `text` holds one of `answers` (3 characters or more) as whole words, which `ordinary` text does not."""
    named = {a.strip() for a in answers if len(a.strip()) >= SHORTEST}
    patterns = map(_whole, named)
    return any(p.search(text) and not p.search(ordinary) for p in patterns)


def copies(text: str, questions: Iterable[str], ordinary: str) -> bool:
    """Whether `text` holds COPIED words in a row of a single question, which `ordinary` text does not.

    A row of the data may hold an order to whoever reads it; the prompt is not its to choose.
    """
    rows = Counter(
        phrase for question in questions for phrase in phrases(question)
    )
    own = {phrase for phrase, count in rows.items() if count == 1}
    return bool(own & phrases(text) - phrases(ordinary))


def phrases(text: str) -> set[tuple[str, ...]]:
    """All COPIED words in a row of a text."""
    words = re.findall(r"\w+", text.casefold())
    return {
        tuple(words[i : i + COPIED]) for i in range(len(words) - COPIED + 1)
    }
