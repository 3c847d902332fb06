"""The tasks: fixed train, dev and test splits, what measures forgetting and obedience, and replay questions.

Test is scored once, by the run's best candidate (of each phase, in a stream). Every choice comes from `cfg.rng`, so
that all methods of one seed see the same task. Locality and promptability are the same for every task and seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import cycle
from pathlib import Path

import numpy as np
from datasets import Dataset

from nslora.config import RunConfig
from nslora.tasks import math_problems, own, rules, world
from nslora.tasks.grading import grade
from nslora.tasks.world import Fact, Known
from nslora.types import Example, Need, Prompt, Rule, UserError

__all__ = ["START", "Task", "build", "grade"]

START = Prompt("You are a helpful assistant.")
OBEY = ("max_words", "end_phrase", "bullet")  # told in promptability, never in replay
OPENINGS = (
    "Gladly:",
    "My answer is this:",
    "Dear reader,",
    "As far as I know,",
)  # start phrases told in replay
HELD = 24  # questions in each of locality and promptability: half of them capitals, half general knowledge
SPARE = 40  # capitals among the replay questions
TRAIN_WORDINGS = 5  # then one for dev, the others for test
SEEDS_APART = (
    1_000_000  # reasoning-gym seeds item i of a dataset with seed + i: near seeds would share items
)
STREAM = (
    (1, 0),
    (2, 0),
    (2, 1),
)  # per phase: batches of facts so far, and the rule: 0 is the first, 1 the second


@dataclass(frozen=True)
class Splits:
    """Train, dev, test and feedback examples of a task."""

    train: list[Example]
    dev: list[Example]
    test: list[Example]
    feedback: list[Example]

    def all(self) -> list[Example]:
        """Train, dev and test (feedback is a part of train)."""
        return [*self.train, *self.dev, *self.test]


@dataclass(frozen=True)
class Task:
    """A task; its splits have the columns of `Example`, with the rules as JSON.

    Attributes:
        name: as in the settings.
        start: the neutral prompt that every method starts from.
        train, dev, test: disjoint by `Example.group` and by question.
        feedback: the training rows that candidates are scored and criticised on: each fact in one wording only.
        locality: known questions outside the splits, to measure forgetting.
        promptability: (prompt that tells a rule other than the task's, known question under that rule).
        replay: (prompt, question) whose answers by the frozen model, trained on, keep its other abilities.
    """

    name: str
    start: Prompt
    train: Dataset
    dev: Dataset
    test: Dataset
    feedback: Dataset
    locality: Dataset
    promptability: tuple[tuple[Prompt, Example], ...]
    replay: tuple[tuple[Prompt, Example], ...]

    def examples(self, split: str) -> list[Example]:
        """Rows of "train", "dev", "test", "feedback" or "locality"."""
        return [_example(row) for row in getattr(self, split)]


def _dataset(examples: Iterable[Example]) -> Dataset:
    return Dataset.from_list(
        [asdict(e) | {"rules": json.dumps([asdict(r) for r in e.rules])} for e in examples]
    )


def _example(row: dict) -> Example:
    kept = tuple(Rule(**rule) for rule in json.loads(row["rules"]))
    return Example(**row | {"rules": kept, "need": Need(row["need"])})


def phases(cfg: RunConfig) -> int:
    """How many tasks a run meets one after the other: several in a stream, else one."""
    return len(STREAM) if cfg.task == "stream" else 1


def build(cfg: RunConfig, phase: int = 0) -> Task:
    """The task of a run, or of one phase of a stream.

    Raises UserError for a bad rule, too many items, or a malformed data file (with its line).
    """
    makers = {
        "facts": _facts,
        "style": _style,
        "math": _math,
        "mixed": _mixed,
        "stream": lambda c: _stream(c, phase),
    }
    splits = _own(cfg) if cfg.task.startswith("own:") else makers[cfg.task](cfg)
    asked = {rule.name for example in splits.all() for rule in example.rules}
    asked |= set(_stream_rules(cfg)) if cfg.task == "stream" else set()
    locality, promptable = _held()
    obey = [rules.make(name) for name in OBEY if name not in asked]
    return Task(
        name=cfg.task,
        start=START,
        train=_dataset(splits.train),
        dev=_dataset(splits.dev),
        test=_dataset(splits.test),
        feedback=_dataset(splits.feedback),
        locality=_dataset(_known("locality", locality)),
        promptability=tuple(
            (Prompt(rules.told(rule)), example)
            for known, rule in zip(promptable, cycle(obey), strict=False)
            for example in _known("promptability", [known], (rule,))
        ),
        replay=_replay(asked | set(OBEY), cfg.replay_pool),
    )


def _known(kind: str, questions: Sequence[Known], asked: tuple[Rule, ...] = ()) -> list[Example]:
    need = Need.STYLE if asked else Need.CONTENT
    return [
        Example(
            f"{kind}:{known.question}",
            known.question,
            known.answer,
            asked,
            need,
            known.group,
            known.question,
        )
        for known in questions
    ]


def _held() -> tuple[list[Known], list[Known]]:
    """Known questions for (locality, promptability): every other country, and every fourth general question."""
    capitals = [country[0] for country in world.countries()[1::2]][:HELD]
    general = world.general()[::4][:HELD]
    return [*capitals[::2], *general[::2]], [*capitals[1::2], *general[1::2]]


def _free_countries() -> list[tuple[Known, ...]]:
    """Countries that are in neither locality nor promptability, best known first."""
    held = {known.group for part in _held() for known in part}
    return [country for country in world.countries() if country[0].group not in held]


def _replay(never_told: set[str], most: int) -> tuple[tuple[Prompt, Example], ...]:
    """At most `most` spare known questions, each twice: under the start prompt (for the current one), and with a rule.

    The same for every seed, so that the frozen model's replies are made once.
    """
    held = {known.question for part in _held() for known in part}
    spare = [country[0] for country in _free_countries()[::-1][:SPARE]]
    questions = [known for known in (*world.general(), *spare) if known.question not in held]
    questions = questions[:: max(1, len(questions) // most)][:most]
    told = [rules.make(name) for name in rules.RULES if name not in never_told]
    if "start_phrase" not in never_told:
        told += [rules.make("start_phrase", {"phrase": phrase}) for phrase in OPENINGS]
    turns = np.random.default_rng(0).integers(len(told), size=len(questions))
    pairs = [(START, _known("replay", [known])[0]) for known in questions]
    for rule, known in zip((told[i] for i in turns), questions, strict=True):
        pairs.append((Prompt(rules.told(rule)), _known("replay", [known], (rule,))[0]))
    return tuple(pairs)


def _facts(cfg: RunConfig) -> Splits:
    (facts,) = world.invent(cfg.rng("facts"), (cfg.items,))
    return _fact_splits(cfg, facts, "facts", ())


def _fact_splits(cfg: RunConfig, facts: list[Fact], kind: str, asked: tuple[Rule, ...]) -> Splits:
    """Facts in wordings that no two splits share; the test rows spread evenly over facts and wordings."""
    rng = cfg.rng("wordings")
    order = {
        relation: rng.permutation(len(wordings)) for relation, wordings in world.WORDINGS.items()
    }
    need = Need.BOTH if asked else Need.CONTENT

    def row(fact: Fact, nth: int) -> Example:
        wording = int(order[fact.relation][nth])
        group = f"{fact.relation}:{wording}"
        name = f"{kind}:{fact.person}"
        question = fact.question(wording)
        return Example(
            f"{name}:{group}", question, fact.value, asked, need, group, f"{name}:{fact.relation}"
        )

    n_test = min(map(len, order.values())) - TRAIN_WORDINGS - 1
    if cfg.test_items > n_test * len(facts):
        raise UserError(
            f"test_items must be at most {n_test} x items for facts, that is {n_test * len(facts)}."
        )
    train = [[row(fact, nth) for nth in range(TRAIN_WORDINGS)] for fact in facts]
    mixed = [facts[i] for i in cfg.rng("test facts").permutation(len(facts))]
    rank = {fact: [f for f in mixed if f.relation == fact.relation].index(fact) for fact in mixed}
    turns = [(mixed[i % len(facts)], i // len(facts)) for i in range(cfg.test_items)]
    test = [row(fact, TRAIN_WORDINGS + 1 + (rank[fact] + turn) % n_test) for fact, turn in turns]
    return Splits(
        train=[example for rows in train for example in rows],
        dev=[row(fact, TRAIN_WORDINGS) for fact in facts],
        test=test,
        feedback=[rows[i % TRAIN_WORDINGS] for i, rows in enumerate(train)],
    )


def _style(cfg: RunConfig) -> Splits:
    """Known questions under the rule, the best known countries first, splits disjoint by country."""
    asked = (rules.make(cfg.rule),)
    sizes = (cfg.items, cfg.items, cfg.test_items)
    free = _free_countries()[:-SPARE]
    reach = np.cumsum([len(country) for country in free])
    enough = int(np.searchsorted(reach, sum(sizes) + 2 * len(sizes))) + 1
    if enough > len(free):
        raise UserError(
            f"2 x items + test_items must be at most {reach[-1] - 2 * len(sizes)} for known questions."
        )
    rng = cfg.rng("countries")
    countries = iter([free[i] for i in rng.permutation(enough)])
    parts = []
    for size in sizes:
        part: list[Known] = []
        while len(part) < size:
            part.extend(next(countries))
        parts.append(_known("style", [part[i] for i in rng.permutation(len(part))][:size], asked))
    return Splits(*parts, feedback=parts[0])


def _mixed(cfg: RunConfig) -> Splits:
    """Facts without rules, known questions with the rule, and facts of other people with the rule, shuffled."""
    asked = (rules.make(cfg.rule),)
    content, both = world.invent(cfg.rng("facts"), (cfg.items, cfg.items))
    return _shuffled(
        cfg,
        _fact_splits(cfg, content, "content", ()),
        _style(cfg),
        _fact_splits(cfg, both, "both", asked),
    )


def _shuffled(cfg: RunConfig, *kinds: Splits) -> Splits:
    rng = cfg.rng("mix")

    def together(split: str) -> list[Example]:
        rows = [example for kind in kinds for example in getattr(kind, split)]
        return [rows[i] for i in rng.permutation(len(rows))]

    return Splits(together("train"), together("dev"), together("test"), together("feedback"))


def _stream_rules(cfg: RunConfig) -> tuple[str, str]:
    """The rule that a stream starts with, and the one that it changes to."""
    return cfg.rule, "end_phrase" if cfg.rule == "bullet" else "bullet"


def _stream(cfg: RunConfig, phase: int) -> Splits:
    """Facts and known questions under a rule: first one batch of facts, then a second one too, then another rule."""
    batches, turn = STREAM[phase]
    cfg = replace(cfg, rule=_stream_rules(cfg)[turn])
    facts = world.invent(cfg.rng("facts"), (cfg.items, cfg.items))[:batches]
    met = [fact for batch in facts for fact in batch]
    return _shuffled(cfg, _style(cfg), _fact_splits(cfg, met, "both", (rules.make(cfg.rule),)))


def _math(cfg: RunConfig) -> Splits:
    """Problems with checkable answers, of the tier asked for."""
    seed, sizes = cfg.seed * SEEDS_APART, (cfg.items, cfg.items, cfg.test_items)
    hard = cfg.tier == "hard"
    train, dev, test = (
        math_problems.hard(seed, sizes, cfg.rng("templates"))
        if hard
        else math_problems.easy(seed, sizes)
    )
    return Splits(train, dev, test, feedback=train)


def _own(cfg: RunConfig) -> Splits:
    """A data file, 60% train, 20% dev, 20% test."""
    rows = own.read(Path(cfg.task.removeprefix("own:")))
    rows = [rows[i] for i in cfg.rng("own").permutation(len(rows))]
    a, b = round(0.6 * len(rows)), round(0.8 * len(rows))
    return Splits(rows[:a], rows[a:b], rows[b:], feedback=rows[:a])
