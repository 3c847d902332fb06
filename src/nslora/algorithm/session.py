"""What one run holds open: its task, its model's replies (none computed twice), and its bill."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar, cast

from peft import PeftModel

from nslora.config import RunConfig
from nslora.editor.client import Editor
from nslora.editor.ledger import Ledger
from nslora.model.backbone import Backbone
from nslora.model.lora import Learner
from nslora.tasks.build import Task
from nslora.types import (
    Candidate,
    Example,
    Generation,
    Move,
    Pair,
    Prompt,
    Reward,
    Scored,
    StepRecord,
    UserError,
)

Memo = Callable[[str, Callable[[], Any]], Any]
T = TypeVar("T")
Targets = dict[
    str, tuple[str, str]
]  # per fact: the text to train on, and its source
PairKey = tuple[Prompt, str, str]  # prompt, question, target
Losses = Mapping[
    PairKey, tuple[float, int]
]  # summed nll of the answer in nats, and its tokens


@dataclass(frozen=True)
class Bill:
    """What was spent: tokens trained on and generated, the editor's calls and tokens."""

    train_tokens: float = 0.0
    generated_tokens: float = 0.0
    editor_calls: float = 0.0
    editor_tokens: float = 0.0

    def __add__(self, other: Bill) -> Bill:
        """Return the sum, field by field."""
        return Bill(
            *(
                getattr(self, f.name) + getattr(other, f.name)
                for f in fields(Bill)
            )
        )

    def __sub__(self, other: Bill) -> Bill:
        """Return the difference, field by field."""
        return Bill(
            *(
                getattr(self, f.name) - getattr(other, f.name)
                for f in fields(Bill)
            )
        )


@dataclass(frozen=True)
class Memory:
    """What a run's numerical moves carry from one to the next.

    Attributes:
        chosen: facts that the weights are to learn; they stay chosen once they pass, lest they be
            forgotten.
        targets: texts that the reward has verified, per fact.
        losses: the task's own pairs of the last epoch with their losses (replay left out).
        trained: every pair trained on so far.
    """

    chosen: frozenset[str] = frozenset()
    targets: Targets = field(default_factory=dict)
    losses: Losses = field(default_factory=dict)
    trained: tuple[Pair, ...] = ()


@dataclass(frozen=True)
class State:
    """Where a run stands after a move: the candidate, its scored rows, and how it came there.

    Attributes:
        dev, train: empty before the candidate is scored.
        history: of the current phase; the first entry is its start.
        phase: number of the current phase, 0 but in a stream.
        past: the histories of earlier phases, joined.
        tested: test rows of earlier phases, scored at their ends.
    """

    candidate: Candidate
    dev: Sequence[Scored] = ()
    train: Sequence[Scored] = ()
    history: tuple[StepRecord, ...] = ()
    memory: Memory = Memory()
    phase: int = 0
    past: tuple[StepRecord, ...] = ()
    tested: Mapping[str, Sequence[Scored]] = field(default_factory=dict)

    @property
    def moves(self) -> tuple[StepRecord, ...]:
        """The history without its start."""
        return self.history[1:]

    @property
    def whole(self) -> tuple[StepRecord, ...]:
        """The history of all phases so far."""
        return self.past + self.history

    def nth(self, move: Move) -> int:
        """Return which move of its kind the next one would be, from 1, in all phases.

        Moves draw random numbers by it: an edit that was rejected leaves the next numerical move as
        it would have been without it, and schedules differ by their moves, not by their luck.
        """
        return 1 + sum(step.move == move for step in self.whole)


@dataclass(frozen=True)
class Outcome:
    """What a move returns: a new candidate, what the move saw, what it cost, what to remember."""

    candidate: Candidate
    evidence: dict[str, Any]
    bill: Bill
    memory: Memory


@dataclass
class Session:
    """What one run holds open: its data, its backbone with a fresh adapter, and its editor.

    No greedy reply is computed twice: each is kept for the run. Replies of the frozen weights are
    kept by `memo` for every run that shares its folder (same batch, threads and type, so the same
    bits), sampled ones too.

    Attributes:
        adapter: the checkpoint in place; empty while the weights are the frozen ones.
        saved_s: seconds that memoised replies took to make.
        work_s: seconds in which the model computed or the editor was asked; the rest of a run's
            time is overhead.
        replies: greedy replies so far, by adapter and text.
        affords: whether a limit of the run leaves room for a move of a kind.
    """

    cfg: RunConfig
    task: Task
    backbone: Backbone
    editor: Editor
    scratch: Path
    memo: Memo
    adapter: str = ""
    saved_s: float = 0.0
    work_s: float = 0.0
    train_tokens: int = 0
    generated_tokens: int = 0
    replies: dict[str, dict[str, Generation]] = field(default_factory=dict)
    affords: Callable[[Move], bool] = lambda move: True
    learner: Learner = field(init=False)
    _nll: dict[tuple[str, Prompt, tuple[str, ...]], list[float]] = field(
        default_factory=dict
    )
    _gold: dict[str, Reward] = field(default_factory=dict)  # by example id
    _spent_by_others: Bill = Bill()  # by runs that share the editor
    _spent_before: Bill = Bill()

    def __post_init__(self) -> None:
        """Attach a fresh adapter, and start the bill at nothing."""
        self.learner = Learner(self.backbone, self.cfg)
        if self.task.pool:
            self.task = self.task.fill(self._unknown())
        self._spent_by_others = self._spent_by_all
        self._spent_before = self.spent

    def _unknown(self) -> list[Example]:
        """Return as many examples of the task's pool as its splits hold.

        Only those whose answer the frozen weights do not name. Raises UserError when the pool has
        too few.
        """
        task = self.task
        count = sum(map(len, (task.train, task.dev, task.test)))
        rest = iter(task.pool)
        unknown: list[Example] = []
        # as many at a time as are missing: so that few are asked in vain
        while asked := list(islice(rest, count - len(unknown))):
            prompts, examples = zip(*asked, strict=True)
            scored = self.score_each(prompts, examples)
            unknown += [
                s.example for s in scored if not task.knows(s.example, s.output)
            ]
        if len(unknown) < count:
            raise UserError(
                f"{self.backbone.name} knows too much: of {len(task.pool)} examples of "
                f"{task.name} it misses {len(unknown)}, and {count} are needed."
            )
        return unknown

    # ---- what the reward says

    def reward(self, example: Example, text: str) -> Reward:
        """Return the reward of a reply; with `reward = "number"` without its parts."""
        reward = self.task.reward(example, text)
        if self.cfg.reward == "parts":
            return reward
        return Reward(reward.value, reward.critique)

    def expect(self, examples: Sequence[Example], texts: Sequence[str]) -> None:
        """Have a judge, where there is one, grade replies together."""
        self.timed(lambda: self.task.expect(examples, texts))

    def gold_reward(self, example: Example) -> Reward:
        """Return what the reward says of the bare gold answer."""
        if example.id not in self._gold:
            self._gold[example.id] = self.reward(example, example.answer)
        return self._gold[example.id]

    def asks_form(self, example: Example) -> bool:
        """Tell whether the bare gold answer fails the reward: then a form is asked for."""
        return self.gold_reward(example).success < 1

    def asks_bare(self, example: Example) -> bool:
        """Tell whether the gold answer fails the reward in a sentence: then it is asked for bare."""
        sentence = f"The answer is {example.answer}."
        return self.reward(example, sentence).success < 1

    # ---- replies

    def generate(self, texts: Sequence[str]) -> list[Generation]:
        """Return greedy replies of the weights as they are now to model inputs, in order."""
        if not self.adapter:
            return self.frozen(texts)
        return self._once(self.adapter, texts, lambda new: self._decode(new))

    def frozen(self, texts: Sequence[str]) -> list[Generation]:
        """Return greedy replies of the frozen weights, whatever adapter is in place."""
        return self._once("", texts, lambda new: self._frozen_memoised(new))

    def sample(
        self, texts: Sequence[str], purpose: str, temperature: float
    ) -> list[Generation]:
        """Return one sampled reply per text, of the weights as they are now.

        All sampling goes through here. `purpose` seeds it: other purposes draw other numbers, and
        the same purpose the same ones. A text may be asked several times, for as many draws.
        """
        seed = int(self.cfg.rng(f"sample {purpose}").integers(2**31))
        if self.adapter:
            return self._counted(
                lambda: self._decode(list(texts), temperature, seed)
            )
        return self._counted(
            lambda: self._frozen_memoised(list(texts), temperature, seed)
        )

    def _once(
        self,
        adapter: str,
        texts: Sequence[str],
        decode: Callable[[list[str]], list[Generation]],
    ) -> list[Generation]:
        """Return replies in the order of `texts`, decoding each new text once and in one batch."""
        replies = self.replies.setdefault(adapter, {})
        new = [text for text in dict.fromkeys(texts) if text not in replies]
        if new:
            replies |= zip(new, self._counted(lambda: decode(new)), strict=True)
        return [replies[text] for text in texts]

    def _counted(
        self, decode: Callable[[], list[Generation]]
    ) -> list[Generation]:
        replies = self.timed(decode)
        self.generated_tokens += sum(reply.tokens for reply in replies)
        return replies

    def _decode(
        self, texts: list[str], temperature: float = 0.0, seed: int = 0
    ) -> list[Generation]:
        return self.backbone.generate(
            texts, self.cfg.max_new_tokens, temperature, seed
        )

    def _frozen_memoised(
        self, texts: list[str], temperature: float = 0.0, seed: int = 0
    ) -> list[Generation]:
        fresh = False

        def compute() -> dict[str, object]:
            nonlocal fresh
            fresh, started = True, time.perf_counter()
            with frozen_weights(self.backbone):
                replies = self._decode(texts, temperature, seed)
            seconds = time.perf_counter() - started
            return {
                "seconds": seconds,
                "replies": [asdict(reply) for reply in replies],
            }

        b, cfg = self.backbone, self.cfg
        identity = [
            b.identity,
            b.dtype,
            b.device,
            cfg.threads,
            cfg.max_new_tokens,
        ]
        identity += [texts, temperature, seed]
        key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        stored = self.memo(f"frozen-{key}", compute)
        self.saved_s += 0.0 if fresh else stored["seconds"]
        return [Generation(**reply) for reply in stored["replies"]]

    # ---- scores

    def score(
        self, prompt: Prompt, examples: Sequence[Example]
    ) -> list[Scored]:
        """Return replies of the weights as they are now under `prompt`, with their rewards."""
        return self.score_each([prompt] * len(examples), examples)

    def score_each(
        self, prompts: Sequence[Prompt], examples: Sequence[Example]
    ) -> list[Scored]:
        """Score with a prompt of its own for every example, all replies in one batch."""
        asked = zip(prompts, examples, strict=True)
        texts = [
            self.backbone.text(prompt, example.question)
            for prompt, example in asked
        ]
        return self._graded(examples, self.generate(texts))

    def _graded(
        self, examples: Sequence[Example], replies: Sequence[Generation]
    ) -> list[Scored]:
        """Return replies to examples with their rewards."""
        self.expect(examples, [reply.text for reply in replies])
        scored = []
        for example, reply in zip(examples, replies, strict=True):
            reward = self.reward(example, reply.text)
            scored.append(
                Scored(
                    example,
                    reply.text,
                    reward,
                    reply.mean_logprob,
                    reply.tokens,
                )
            )
        return scored

    def score_dev_and_train(
        self, prompt: Prompt
    ) -> tuple[list[Scored], list[Scored]]:
        """Return scored dev and feedback rows, all replies in one batch."""
        dev, train = self.task.dev, self.task.feedback
        scored = self.score(prompt, [*dev, *train])
        return scored[: len(dev)], scored[len(dev) :]

    def nll(self, prompt: Prompt, examples: Sequence[Example]) -> list[float]:
        """Return the mean negative log-likelihood of each gold answer, in nats per token."""
        key = (self.adapter, prompt, tuple(e.id for e in examples))
        if key not in self._nll:
            texts = [self.backbone.text(prompt, e.question) for e in examples]
            answers = [e.answer for e in examples]
            self._nll[key] = self.timed(
                lambda: self.backbone.nll(texts, answers)
            )
        return self._nll[key]

    # ---- what the frozen weights can do

    @cached_property
    def abilities(self) -> dict[str, list[Example]]:
        """The locality and promptability questions that the frozen weights get right.

        They are what can be forgotten. A stream keeps those of its first phase.
        """
        task = self.task
        plain = [(task.initial_prompt, example) for example in task.locality]
        asked = [*plain, *task.promptability]
        # both in one batch: a batch decides the last bits of its replies
        texts = [self.backbone.text(prompt, e.question) for prompt, e in asked]
        rows = self._graded([e for _, e in asked], self.frozen(texts))
        known, told = rows[: len(plain)], rows[len(plain) :]
        return {
            "locality": [s.example for s in known if s.reward.success],
            "promptability": [
                s.example for s in told if task.obeys(s.example, s.output)
            ],
        }

    @cached_property
    def follows(self) -> float | None:
        """The share of told rules that the frozen weights obey: how far the backbone follows prompts.

        The rules are told in the prompt, and are not those of the task; None where none is left to
        tell.
        """
        told = len(self.task.promptability)
        if not told:
            return None
        return len(self.abilities["promptability"]) / told

    # ---- weights and task

    def enter(self, task: Task) -> None:
        """Go on with another task: the next phase of a stream."""
        self.task = task
        self._gold.clear()  # the same question may now be asked for another form

    def use(self, candidate: Candidate) -> None:
        """Put a candidate's weights in place, with the optimizer as it was at their checkpoint."""
        if candidate.adapter is None:
            self.learner.reset()
        else:
            self.learner.load(self.scratch / candidate.adapter)
        self.adapter = candidate.adapter or ""

    def recall(self, replies: dict[str, dict[str, Generation]]) -> None:
        """Know these replies and no others: those of another place in a run."""
        self.replies = replies
        # adapters of two branches of a tree may share a name
        self._nll.clear()

    # ---- what it costs

    @property
    def spent(self) -> Bill:
        """All that this run has spent; replayed editor calls count as calls."""
        return self._spent_by_all - self._spent_by_others

    @property
    def _spent_by_all(self) -> Bill:
        ledger = getattr(self.editor, "ledger", None) or Ledger()
        return Bill(
            self.train_tokens,
            self.generated_tokens,
            ledger.requests,
            ledger.tokens,
        )

    def bill(self) -> Bill:
        """Return what was spent since this was last asked."""
        since = self.spent - self._spent_before
        self._spent_before = self.spent
        return since

    def timed(self, compute: Callable[[], T]) -> T:
        """Return the result of work of the model or the editor, its seconds counted."""
        started, saved = time.perf_counter(), self.saved_s
        result = compute()
        # memoised replies count as if they had been made now
        self.work_s += time.perf_counter() - started + self.saved_s - saved
        return result


def frozen_weights(backbone: Backbone) -> AbstractContextManager[object]:
    """Return a context in which the backbone answers without its adapter."""
    model = backbone.model
    return (
        cast(PeftModel, model).disable_adapter()
        if isinstance(model, PeftModel)
        else nullcontext()
    )
