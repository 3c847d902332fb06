"""The nouns of the project. Plain frozen data: no I/O, no torch."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from enum import StrEnum

SLOT = "{question}"


class UserError(Exception):
    """Wrong input. The command line prints its one sentence and exits with status 2."""


class Move(StrEnum):
    """What a router can decide to do next."""

    NUMERICAL = "numerical"
    SYMBOLIC = "symbolic"
    STOP = "stop"


class Need(StrEnum):
    """What an example asks of the model. Hidden from every method but `oracle`."""

    CONTENT = "content"
    STYLE = "style"
    BOTH = "both"


@dataclass(frozen=True)
class Prompt:
    """The two texts that a symbolic move edits jointly; `question` is a template with one `{question}` slot."""

    system: str = ""
    question: str = SLOT

    def render(self, question: str) -> str:
        """The user turn for `question`. Other braces in the template are plain text."""
        return self.question.replace(SLOT, question)

    @property
    def both(self) -> str:
        """The system prompt, and the template on a line of its own."""
        return f"{self.system}\n{self.question}"

    def messages(self, question: str) -> list[dict[str, str]]:
        """Chat messages for `question`; an empty system prompt sends no system message."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.render(question)}]


@dataclass(frozen=True)
class Rule:
    """A style rule by its IFEval-like name and arguments, such as `Rule("end_phrase", {"phrase": "Over."})`."""

    name: str
    kwargs: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One item of a task.

    Attributes:
        id: unique within the task, stable across processes.
        question: what the user asks; never tells a style rule.
        answer: the gold content, bare.
        rules: style rules that the reply must keep, known to methods only through the reward and its words.
        need: the hidden label.
        group: what splits are disjoint by (a wording, a template, a country).
        fact: what is asked about (person and relation, country), the same for every wording of it.
        grader: how content is graded: "contains" (names) or "number" (last number of the reply).
    """

    id: str
    question: str
    answer: str
    rules: tuple[Rule, ...] = ()
    need: Need = Need.CONTENT
    group: str = ""
    fact: str = ""
    grader: str = "contains"
    solution: str = ""

    @property
    def gold(self) -> str:
        """What weights train on when no target was remade: the worked solution, or the bare answer."""
        return self.solution or self.answer


@dataclass(frozen=True)
class Reward:
    """Reward in parts, each in [0, 1], and what a critic would say.

    Attributes:
        content: lenient grade of the content.
        content_strict: strict grade (the reply is the answer and nothing else, once style is stripped).
        style: share of the style rules kept; 1 for an example without rules.
        words: the critic's words, empty when nothing is wrong.
    """

    content: float
    content_strict: float
    style: float
    words: str = ""

    @property
    def value(self) -> float:
        """The single number: mean of content and style."""
        return (self.content + self.style) / 2

    @property
    def success(self) -> float:
        """1.0 when both parts are fully satisfied, else 0.0."""
        return float(self.content == 1.0 and self.style == 1.0)


@dataclass(frozen=True)
class Generation:
    """One generated reply; `confidence` is the mean log-probability of its tokens in nats (<= 0)."""

    text: str
    tokens: int
    confidence: float


@dataclass(frozen=True)
class Scored:
    """An example, the reply of a candidate to it, and its reward."""

    example: Example
    output: str
    reward: Reward
    confidence: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Candidate:
    """What adaptation changes: a prompt, and a LoRA adapter by its checkpoint folder (None: the frozen weights)."""

    prompt: Prompt = Prompt()
    adapter: str | None = None


@dataclass(frozen=True)
class Pair:
    """One supervised training pair of a numerical move, with where it came from.

    Attributes:
        source: "gold" (given answer), "remade" (verified reply under a refined prompt), "rewritten" (verified edit
            of an answer by the editor), "sampled" (own reply that passed the reward) or "replay" (frozen model's own).
        parent: id of the example behind it, empty for replay.
        made: the prompt that brought the target, where it is not the one trained under (baking).
    """

    prompt: Prompt
    question: str
    target: str
    source: str
    parent: str = ""
    made: Prompt | None = None


@dataclass(frozen=True)
class Edit:
    """One proposal of the editor.

    Attributes:
        prompt: the proposed prompt; equal to the old one when `problem` is set.
        problem: why the reply counts as "no edit" (tags, length, leak, editor failure); empty for a usable edit.
        diff: token-level diff from the old prompt, as (op, token) with op one of "=", "-", "+".
    """

    prompt: Prompt
    problem: str = ""
    diff: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Signal:
    """The unified monitoring signal after a move (None: not known yet).

    Attributes:
        c1: relative change of the loss between numerical moves, (L_t - L_{t-1}) / L_{t-1}.
        c2: mean gradient norm of the last numerical move, before clipping.
        gain: relative improvement of dev reward by the last symbolic move, (R_t - R_{t-1}) / max(R_{t-1}, 1/n).
    """

    c1: float | None = None
    c2: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class StepRecord:
    """One move as it is appended to a run's steps.jsonl."""

    step: int
    move: Move
    prompt: Prompt
    adapter: str | None
    dev: dict[str, float]
    train: dict[str, float]
    signal: Signal
    demand: dict[str, float]
    detail: dict[str, object]
    cost: dict[str, float]


def diff(old: str, new: str) -> tuple[tuple[str, str], ...]:
    """Token-level diff as (op, token), op one of "=", "-", "+"; tokens are words and the white space between them."""
    a, b = re.findall(r"\s+|\S+", old), re.findall(r"\s+|\S+", new)
    parts: list[tuple[str, str]] = []
    for op, i, j, k, m in difflib.SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        parts += [("=" if op == "equal" else "-", token) for token in a[i:j]]
        parts += [("+", token) for token in b[k:m] if op != "equal"]
    return tuple(parts)
