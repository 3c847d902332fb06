"""The nouns of the project. Plain frozen data: no I/O, no torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

# an object of JSON
Json = dict[str, Any]
SLOT = "{question}"
# what chat formats end a turn or begin one with
CONTROL = re.compile(
    r"<\|.*?\|>|<｜.*?｜>|</?s>|<[be]os>|<(?:start|end)_of_\w+>"
    r"|\[/?INST\]|<</?SYS>>|</?think>",
    re.IGNORECASE,
)


class UserError(Exception):
    """Wrong input. The command line prints its one sentence and exits with status 2."""


class Move(StrEnum):
    """What a decision can choose to do next."""

    NUMERICAL = "numerical"
    SYMBOLIC = "symbolic"
    STOP = "stop"


# of a schedule such as "NNS"
LETTERS = {"N": Move.NUMERICAL, "S": Move.SYMBOLIC}


class Need(StrEnum):
    """What an example asks of the model. Hidden from every method but `oracle`."""

    CONTENT = "content"
    STYLE = "style"
    BOTH = "both"


@dataclass(frozen=True)
class Prompt:
    """The two texts that a symbolic move edits jointly; `question` has one `{question}` slot."""

    system: str = ""
    question: str = SLOT

    def render(self, question: str) -> str:
        """Return the user turn for `question`. Other braces in the template are plain text."""
        return self.question.replace(SLOT, question)

    @property
    def both(self) -> str:
        """The system prompt, and the template on a line of its own."""
        return f"{self.system}\n{self.question}"

    def messages(self, question: str) -> list[dict[str, str]]:
        """Return chat messages for `question`; an empty system prompt sends no system message."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.render(question)}]


@dataclass(frozen=True)
class Rule:
    """A style rule by its IFEval-like name and arguments: `Rule("end_phrase", {"phrase": "Bye."})`."""

    name: str
    kwargs: dict[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """One item of a task, as every method sees it. What is hidden is kept by the task (`Hidden`).

    Attributes:
        id: unique within the task, stable across processes.
        question: what the user asks; it never states a style rule.
        answer: the gold answer, bare.
        fact: what is asked about (person and relation, country): equal for all its wordings.
        solution: a worked solution, where the data have one.
    """

    id: str
    question: str
    answer: str
    fact: str = ""
    solution: str = ""

    @property
    def gold(self) -> str:
        """What the given data train on: the worked solution, or the bare answer."""
        return self.solution or self.answer


@dataclass(frozen=True)
class Hidden:
    """What only the reward (and the reports) know about an example.

    Attributes:
        rules: style rules that the reply must keep.
        need: what the example asks for.
        group: what splits are disjoint by (a wording, a template, a country).
        grader: how content is graded: "contains" (names), "number" (the reply's last number),
            "bigbench" (BIG-bench's exact match), or "own:" and a grader of `tasks.graders`.
        accepted, pattern: of "bigbench": every right reply, and what of a reply is compared.
    """

    rules: tuple[Rule, ...] = ()
    need: Need = Need.CONTENT
    group: str = ""
    grader: str = "contains"
    accepted: tuple[str, ...] = ()
    pattern: str = ""


@dataclass(frozen=True)
class Item:
    """An example with what is hidden about it: what tasks are made of."""

    example: Example
    hidden: Hidden = Hidden()


@dataclass(frozen=True)
class Reward:
    """What the reward says of a reply: a number in [0, 1], and a critique in words.

    Attributes:
        value: 1 exactly when nothing is wrong.
        critique: what is wrong, in words; empty when nothing is.
        parts: the number's parts by name, where the reward gives them (`reward = "parts"`).
    """

    value: float
    critique: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def success(self) -> float:
        """1.0 when the reward is fully satisfied, else 0.0."""
        return float(self.value == 1.0)


@dataclass(frozen=True)
class Generation:
    """A generated reply.

    Attributes:
        tokens: its length, the end-of-turn token included.
        mean_logprob: mean log-probability of its tokens in nats (<= 0).
    """

    text: str
    tokens: int
    mean_logprob: float


@dataclass(frozen=True)
class Scored:
    """An example, a candidate's reply to it, and the reply's reward."""

    example: Example
    output: str
    reward: Reward
    mean_logprob: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Candidate:
    """What adaptation changes: a prompt, and LoRA weights by their checkpoint (None: frozen)."""

    prompt: Prompt = Prompt()
    adapter: str | None = None


@dataclass(frozen=True)
class Pair:
    """One supervised training pair of a numerical move, with its provenance.

    Attributes:
        source: "gold" (given answer), "remade" (verified reply of the model), "rewritten" (verified
            rewrite of an answer by the editor), "sampled" (own sampled reply that the reward
            verified), "unverified", "demonstrated" or "replay" (the frozen model's own reply, whose
            probabilities are kept).
        parent: id of the example behind it, empty for replay.
        refined: the prompt that brought the target, where it differs from `prompt` (baking).
    """

    prompt: Prompt
    question: str
    target: str
    source: str
    parent: str = ""
    refined: Prompt | None = None


@dataclass(frozen=True)
class Edit:
    """One proposal of the editor.

    Attributes:
        prompt: the proposed prompt; equal to the old one when `problem` is set.
        problem: why the reply counts as "no edit" (tags, length, leak, editor failure), or "".
        diff: token-level diff from the old prompt, as (op, token) with op one of "=", "-", "+".
    """

    prompt: Prompt
    problem: str = ""
    diff: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Signal:
    """The unified monitoring signal after a move (None: not known).

    Attributes:
        c1: relative change of the loss between numerical moves, (L_t - L_{t-1}) / L_{t-1}.
        c2: mean gradient norm of the last numerical move, before clipping.
        gain: relative gain in dev reward of the last symbolic move,
            (R_t - R_{t-1}) / max(R_{t-1}, 1/n).
    """

    c1: float | None = None
    c2: float | None = None
    gain: float | None = None


@dataclass(frozen=True)
class StepRecord:
    """One move as a line of steps.jsonl: the same line whenever and wherever it is computed.

    Attributes:
        step: 0 is the start; `move` is "start" there.
        reason: why the decision chose this move.
        dev, train: success, value and n after the move.
        demand: shares of training examples that need content, or style, as estimated before it.
        evidence: what the move reports (loss, gradient norm, pairs by source; edits).
        bill: what it cost in tokens and calls.
    """

    step: int
    move: str
    reason: str
    prompt: Prompt
    adapter: str | None
    dev: dict[str, float]
    train: dict[str, float]
    signal: Signal
    demand: dict[str, float]
    evidence: dict[str, object]
    bill: dict[str, float]


def diff(old: str, new: str) -> tuple[tuple[str, str], ...]:
    """Return the token-level diff as (op, token), op one of "=", "-", "+".

    Tokens are words, and the white space between them.
    """
    a, b = re.findall(r"\s+|\S+", old), re.findall(r"\s+|\S+", new)
    parts: list[tuple[str, str]] = []
    matcher = difflib.SequenceMatcher(None, a, b, autojunk=False)
    for op, a_start, a_end, b_start, b_end in matcher.get_opcodes():
        kept = "=" if op == "equal" else "-"
        parts += [(kept, token) for token in a[a_start:a_end]]
        if op != "equal":
            parts += [("+", token) for token in b[b_start:b_end]]
    return tuple(parts)
