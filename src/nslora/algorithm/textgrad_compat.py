"""Symbolic move: one TextGrad step (Yuksekgonul et al., arXiv 2406.07496) on the system prompt and question template.

The forward pass has been made by the backbone and the loss is the critic's words, so the editor is called only for the
gradients on the two texts and for the edits. Variables, backward pass and optimizer are textgrad's own; the subclasses
here mend what version 0.1.8 does to small models: hidden middles of texts, unordered feedback, unchecked replies.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace

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
from nslora.types import SLOT, Edit, Prompt, Scored, diff

with (
    tempfile.TemporaryDirectory() as _folder
):  # its import opens a log of every prompt and fetches a price list
    os.environ["TEXTGRAD_LOG_DIR"] = _folder
    os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
    import textgrad
    from textgrad.autograd.function import BackwardContext, Function
    from textgrad.autograd.llm_ops import LLMCall
    from textgrad.engine import EngineLM
    from textgrad.optimizer import TextualGradientDescent

    for _handler in textgrad.logger.handlers[:]:
        textgrad.logger.removeHandler(_handler)
        _handler.close()
    textgrad.logger.disabled = True

GRADIENT_TOKENS, EDIT_TOKENS = 64, 128  # longest replies of the editor
SHORTEST = 3  # characters of an answer that can leak: shorter ones are in many words and rules
MASK = "…"  # stands for the right answer in the critic's words
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
        super().__init__(value, role_description=role, requires_grad=requires_grad)
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
        reply = Text(quote(scored.output), "the reply to the user", [system, question])
        asked = Prompt(question=escape(question.value)).render(quote(scored.example.question))
        told = escape(system.value)
        reply.set_grad_fn(
            BackwardContext(self.backward, response=reply, prompt=asked, system_prompt=told)
        )
        return reply


class Critic(Function):
    """The textual loss: the critic's words are the gradient on the reply, without a call."""

    def forward(self, reply: Text, words: str) -> Text:
        """The loss on one reply."""
        loss = Text(words, "the critic's words", [reply])
        loss.set_grad_fn(BackwardContext(self.backward, reply=reply, words=words))
        return loss

    def backward(self, reply: Text, words: str, backward_engine: EngineLM) -> None:
        """Put the words on the reply."""
        reply.gradients.add(textgrad.Variable(words, role_description="feedback to the reply"))


class Engine(EngineLM):
    """textgrad's view of the editor: no cache, no retries, and a short system prompt for textgrad's long one."""

    def __init__(self, editor: Editor, seed: int, words: str = "") -> None:
        self.editor, self.seed, self.words, self.model_string = editor, seed, words, editor.model

    def generate(self, prompt: str, system_prompt: str | None = None, **_: object) -> str:
        """One gradient; raises EditorError."""
        user = prompt + GRADIENT.format(words=self.words)
        return self.editor.complete(Request(EDITOR, user, self.seed, 0.3, GRADIENT_TOKENS))

    def __call__(self, *args, **kwargs) -> str:
        """As `generate`."""
        return self.generate(*args, **kwargs)


class EditEngine(Engine):
    """The engine of the optimizer, which would accept any reply: here one that is not an edit raises NoEdit."""

    def __init__(self, editor: Editor, seed: int, plan: str) -> None:
        super().__init__(editor, seed)
        self.plan = plan

    def generate(self, prompt: str, system_prompt: str | None = None, **_: object) -> str:
        """One edit in its tags, and nothing around them; raises EditorError or NoEdit."""
        user = prompt + REMINDER.format(plan=self.plan)
        reply = self.editor.complete(
            Request(system_prompt or "", user, self.seed, 0.7, EDIT_TOKENS)
        )
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
    named = _whole(answer) if len(answer) >= SHORTEST else re.compile(re.escape(f"'{answer}'"))
    sentences = re.split(r"(?<=[.!?])\s+", named.sub(MASK, critique))
    return quote(" ".join([s for s in sentences if MASK not in s] or sentences))


def _whole(answer: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)


def parse(reply: str) -> str:
    """The text between the only pair of tags; raises NoEdit."""
    if [reply.count(tag) for tag in TAGS] != [1, 1] or reply.index(TAGS[0]) > reply.index(TAGS[1]):
        raise NoEdit("tags")
    text = reply.split(TAGS[0])[1].split(TAGS[1])[0].strip()
    if (
        text.startswith("{")
        and not text.startswith(SLOT)
        and (text.endswith("}") or text.count("{") > text.count("}"))
    ):
        text = (
            text[1:].removesuffix("}").strip()
        )  # copied from textgrad's "{the improved variable}"
    for _, reply in MODELS:
        text = re.sub(
            rf",? like this: {re.escape(reply)}", "", text, flags=re.IGNORECASE
        )  # copied from the examples
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
    """
    by_critique: dict[str, Scored] = {}
    for scored in failures:
        # equal critiques would make equal gradients
        by_critique.setdefault(masked(scored), scored)
    shown = list(by_critique.items())[: cfg.feedback]

    # a local server has one slot and reads each prompt once; an endpoint takes calls side by side
    workers = 1 if editor.url == "local" else max(len(shown), len(ROLES))
    with ThreadPoolExecutor(workers) as pool:
        engines = [Engine(editor, seed + i, critique) for i, (critique, _) in enumerate(shown)]
        rows = [scored for _, scored in shown]
        passes = list(pool.map(lambda e, s: gradients(prompt, s, e), engines, rows))
        # one plan per step: the candidates of a text share their prompt, whatever their seed
        plan = PLANS[seed % len(PLANS)]
        writers = [EditEngine(editor, seed + k, plan) for k in range(cfg.candidates)]
        proposals = list(
            pool.map(lambda name: [propose(prompt, name, passes, w) for w in writers], ROLES)
        )

    answers = forbidden | {s.example.answer for s in failures}
    ordinary = " ".join([prompt.both, *by_critique])
    edits = []
    for texts in zip(*proposals, strict=True):
        for new, problem in assemble(prompt, dict(zip(ROLES, texts, strict=True))):
            if leaks(new.both, answers, ordinary):
                problem = "leak"
            elif count(new.system) + count(new.question) > cfg.prompt_tokens:
                problem = "long"
            changed = Edit(new, diff=diff(prompt.both, new.both))
            edits.append(Edit(prompt, problem) if problem else changed)
    return list(dict.fromkeys(edits))


def gradients(prompt: Prompt, scored: Scored, engine: Engine) -> dict[str, Text]:
    """Return both texts as fresh variables with the gradients of one failing example.

    Without gradients, where the editor failed.
    """
    leaves = {name: Text(getattr(prompt, name), role) for name, role in ROLES.items()}
    loss = Critic()(Reply(engine)(leaves["system"], leaves["question"], scored), engine.words)
    with suppress(EditorError):
        loss.backward(engine)
    return leaves


def propose(
    prompt: Prompt, name: str, passes: list[dict[str, Text]], engine: EditEngine
) -> tuple[str, str]:
    """One proposal of the optimizer for one text, and why it cannot be used (empty: it can)."""
    value = getattr(prompt, name)
    variable = Text(value, ROLES[name])
    feedback = [
        f"<FEEDBACK>{escape(g.value)}</FEEDBACK>"
        for leaves in passes
        for g in leaves[name].gradients
    ]
    if not feedback:
        return value, "editor"
    variable.gradients = [textgrad.Variable(text, role_description="feedback") for text in feedback]
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
    return text, "" if text.count(SLOT) == (name == "question") else "slot"


def assemble(prompt: Prompt, parts: dict[str, tuple[str, str]]) -> list[tuple[Prompt, str]]:
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
    return [(p, "") for p in prompts] or [(prompt, (problems or ["unchanged"])[0])]


def leaks(text: str, answers: Iterable[str], ordinary: str) -> bool:
    """Whether `text` holds one of `answers` (3 characters or more) as whole words, which `ordinary` text does not."""
    found = {
        a.strip() for a in answers if len(a.strip()) >= SHORTEST and _whole(a.strip()).search(text)
    }
    return any(not _whole(a).search(ordinary) for a in found)
