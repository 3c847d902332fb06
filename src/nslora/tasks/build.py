"""The tasks: train, dev and test splits, questions that measure forgetting and obedience, and replay.

Test is scored once, at a run's end (in a stream, at each phase's end). Every choice comes from
`cfg.rng`, so that all methods of one seed see the same task. Locality and promptability are the
same for every task and seed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import cycle
from pathlib import Path

import numpy as np
from datasets import Dataset

from nslora.config import RunConfig
from nslora.tasks import math_problems, own, rules, world
from nslora.tasks.grading import grade
from nslora.tasks.world import Fact, Known
from nslora.types import Example, Hidden, Item, Need, Prompt, Reward, Rule, UserError

INITIAL = Prompt("You are a helpful assistant.")
OBEY = ("max_words", "end_phrase", "bullet")  # told in promptability, never in replay
OPENINGS = ("Gladly:", "My answer is this:", "Dear reader,", "As far as I know,")  # told in replay
HELD = 24  # questions in each of locality and promptability: half of them capitals
SPARE = 40  # capitals among the replay questions
TRAIN_WORDINGS = 5  # then one for dev, the others for test
# reasoning-gym seeds item i of a dataset with seed + i: near seeds would share items
SEEDS_APART = 1_000_000
# per phase of a stream: batches of facts so far, and the rule: 0 is the first, 1 the second
STREAM = ((1, 0), (2, 0), (2, 1))

Split = list[Item]
Asked = tuple[tuple[Prompt, Example], ...]  # questions, each under a prompt of its own


@dataclass(frozen=True)
class Splits:
    """The splits of a task; `feedback` is the part of train that candidates are scored on."""

    train: Split
    dev: Split
    test: Split
    feedback: Split


@dataclass(frozen=True)
class Task:
    """What a run adapts to. Methods see examples and rewards; what is hidden stays in `hidden`.

    Attributes:
        initial_prompt: the neutral prompt that every method starts from.
        train, dev, test: disjoint by `Hidden.group` and by question.
        feedback: training rows that candidates are scored and criticised on: each fact in one
            wording only.
        locality: questions outside the splits that a small model can answer: what can be forgotten.
        promptability: (prompt that tells a rule other than the task's, question under that rule).
        replay: (prompt, question); trained on, the frozen model's replies keep its other abilities.
        hidden: what only the reward knows, by example id.
    """

    name: str
    initial_prompt: Prompt
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    feedback: tuple[Example, ...]
    locality: tuple[Example, ...]
    promptability: Asked
    replay: Asked
    hidden: Mapping[str, Hidden]

    def reward(self, example: Example, text: str) -> Reward:
        """Return the reward of any text as a reply to the example, with its parts."""
        return grade(Item(example, self.hidden[example.id]), text)

    def obeys(self, example: Example, text: str) -> bool:
        """Tell whether a reply keeps the rules, whatever its content: for rules told in the prompt."""
        return self.reward(example, text).parts["style"] == 1

    def demonstrate(self, example: Example) -> str:
        """Return the gold answer written in the wanted style: for the upper reference only."""
        return rules.demonstrate(self.hidden[example.id].rules, example.answer)

    def dataset(self, split: str) -> Dataset:
        """Return a split as a table to look at, hidden columns included (rules as JSON)."""
        rows = []
        for example in getattr(self, split):
            hidden = asdict(self.hidden[example.id])
            rows.append(asdict(example) | hidden | {"rules": json.dumps(hidden["rules"])})
        return Dataset.from_list(rows)


def phases(cfg: RunConfig) -> int:
    """Return how many tasks a run meets one after the other: several in a stream, else one."""
    return len(STREAM) if cfg.task == "stream" else 1


def build(cfg: RunConfig, phase: int = 0) -> Task:
    """Build the task of a run, or of one phase of a stream.

    Raises UserError for a bad rule, too many items, or a malformed data file (with its line).
    """
    splits = _splits(cfg, phase)
    parts = {f.name: getattr(splits, f.name) for f in fields(Splits)}
    asked = {rule.name for part in parts.values() for item in part for rule in item.hidden.rules}
    if cfg.task == "stream":
        asked |= set(_stream_rules(cfg))
    locality, promptable = _held()
    parts["locality"] = _known("locality", locality)
    promptability = _promptability(promptable, asked)
    replay = _replay(asked | set(OBEY), cfg.replay_pool)

    items = [item for part in parts.values() for item in part]
    items += [item for _, item in (*promptability, *replay)]
    return Task(
        name=cfg.task,
        initial_prompt=INITIAL,
        **{name: tuple(item.example for item in part) for name, part in parts.items()},
        promptability=tuple((prompt, item.example) for prompt, item in promptability),
        replay=tuple((prompt, item.example) for prompt, item in replay),
        hidden={item.example.id: item.hidden for item in items},
    )


def _splits(cfg: RunConfig, phase: int) -> Splits:
    if cfg.task.startswith("own:"):
        return _own(cfg)
    if cfg.task == "stream":
        return _stream(cfg, phase)
    return {"facts": _facts, "style": _style, "math": _math, "mixed": _mixed}[cfg.task](cfg)


def _known(kind: str, questions: Iterable[Known], asked: tuple[Rule, ...] = ()) -> Split:
    """Return known questions as items, whose ids start with `kind`."""
    need = Need.STYLE if asked else Need.CONTENT
    items = []
    for known in questions:
        example = Example(f"{kind}:{known.question}", known.question, known.answer, known.question)
        items.append(Item(example, Hidden(asked, need, known.group)))
    return items


def _held() -> tuple[list[Known], list[Known]]:
    """Known questions for (locality, promptability): every other country, every fourth general."""
    capitals = [country[0] for country in world.countries()[1::2]][:HELD]
    general = world.general()[::4][:HELD]
    return [*capitals[::2], *general[::2]], [*capitals[1::2], *general[1::2]]


def _promptability(questions: Sequence[Known], asked: set[str]) -> list[tuple[Prompt, Item]]:
    """Return the questions, each under a prompt that tells a rule which the task does not ask for."""
    told = cycle([rules.make(name) for name in OBEY if name not in asked])
    rows = []
    for known, rule in zip(questions, told, strict=False):
        (item,) = _known("promptability", [known], (rule,))
        rows.append((Prompt(rules.told(rule)), item))
    return rows


def _free_countries() -> list[tuple[Known, ...]]:
    """Countries that are in neither locality nor promptability, best known first."""
    held = {known.group for part in _held() for known in part}
    return [country for country in world.countries() if country[0].group not in held]


def _replay(never_told: set[str], most: int) -> list[tuple[Prompt, Item]]:
    """At most `most` spare questions, each twice: under the initial prompt, and with a rule told.

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
    pairs = [(INITIAL, item) for item in _known("replay", questions)]
    for turn, known in zip(turns, questions, strict=True):
        (item,) = _known("told", [known], (told[turn],))
        pairs.append((Prompt(rules.told(told[turn])), item))
    return pairs


def _facts(cfg: RunConfig) -> Splits:
    (facts,) = world.invent(cfg.rng("facts"), (cfg.items,))
    return _fact_splits(cfg, facts)


def _fact_splits(cfg: RunConfig, facts: list[Fact], asked: tuple[Rule, ...] = ()) -> Splits:
    """Facts in wordings that no two splits share; test spreads evenly over facts and wordings."""
    rng = cfg.rng("wordings")
    order = {
        relation: rng.permutation(len(wordings)) for relation, wordings in world.WORDINGS.items()
    }
    need = Need.BOTH if asked else Need.CONTENT

    def row(fact: Fact, nth: int) -> Item:
        wording = int(order[fact.relation][nth])
        group = f"{fact.relation}:{wording}"
        example = Example(
            f"{fact.person}:{group}",
            fact.question(wording),
            fact.value,
            f"{fact.person}:{fact.relation}",
        )
        return Item(example, Hidden(asked, need, group))

    n_test = min(map(len, order.values())) - TRAIN_WORDINGS - 1
    if cfg.test_items > n_test * len(facts):
        most = n_test * len(facts)
        raise UserError(f"test_items must be at most {n_test} x items for facts, that is {most}.")
    train = [[row(fact, nth) for nth in range(TRAIN_WORDINGS)] for fact in facts]

    # test: facts in random order, again and again, each time in another of its test wordings;
    # facts of one relation start at different wordings
    mixed = [facts[i] for i in cfg.rng("test facts").permutation(len(facts))]
    rank = {fact: [f for f in mixed if f.relation == fact.relation].index(fact) for fact in mixed}
    test = []
    for i in range(cfg.test_items):
        fact, turn = mixed[i % len(facts)], i // len(facts)
        test.append(row(fact, TRAIN_WORDINGS + 1 + (rank[fact] + turn) % n_test))
    return Splits(
        train=[item for wordings in train for item in wordings],
        dev=[row(fact, TRAIN_WORDINGS) for fact in facts],
        test=test,
        feedback=[wordings[i % TRAIN_WORDINGS] for i, wordings in enumerate(train)],
    )


def _style(cfg: RunConfig) -> Splits:
    """Known questions under the rule, best known countries first, splits disjoint by country."""
    asked = (rules.make(cfg.rule),)
    sizes = (cfg.items, cfg.items, cfg.test_items)
    free = _free_countries()[:-SPARE]
    # a split may leave the last country's other questions unused: two a split at most
    reach = np.cumsum([len(country) for country in free])
    enough = int(np.searchsorted(reach, sum(sizes) + 2 * len(sizes))) + 1
    if enough > len(free):
        most = reach[-1] - 2 * len(sizes)
        raise UserError(f"2 x items + test_items must be at most {most} for known questions.")
    rng = cfg.rng("countries")
    countries = iter([free[i] for i in rng.permutation(enough)])
    parts = []
    for size in sizes:
        part: list[Known] = []
        while len(part) < size:
            part.extend(next(countries))
        part = [part[i] for i in rng.permutation(len(part))][:size]
        parts.append(_known("known", part, asked))
    return Splits(*parts, feedback=parts[0])


def _mixed(cfg: RunConfig) -> Splits:
    """Facts without rules, known questions with the rule, and other people's facts with the rule."""
    asked = (rules.make(cfg.rule),)
    content, both = world.invent(cfg.rng("facts"), (cfg.items, cfg.items))
    return _shuffled(
        cfg,
        _fact_splits(cfg, content),
        _style(cfg),
        _fact_splits(cfg, both, asked),
    )


def _shuffled(cfg: RunConfig, *kinds: Splits) -> Splits:
    rng = cfg.rng("mix")

    def together(split: str) -> Split:
        rows = [item for kind in kinds for item in getattr(kind, split)]
        return [rows[i] for i in rng.permutation(len(rows))]

    return Splits(together("train"), together("dev"), together("test"), together("feedback"))


def _stream_rules(cfg: RunConfig) -> tuple[str, str]:
    """The rule that a stream starts with, and the one that it changes to."""
    return cfg.rule, "end_phrase" if cfg.rule == "bullet" else "bullet"


def _stream(cfg: RunConfig, phase: int) -> Splits:
    """Facts and known questions under a rule: one batch of facts, then two, then another rule."""
    batches, turn = STREAM[phase]
    cfg = cfg.but(rule=_stream_rules(cfg)[turn])
    facts = world.invent(cfg.rng("facts"), (cfg.items, cfg.items))[:batches]
    met = [fact for batch in facts for fact in batch]
    return _shuffled(cfg, _style(cfg), _fact_splits(cfg, met, (rules.make(cfg.rule),)))


def _math(cfg: RunConfig) -> Splits:
    """Problems with checkable answers, of the configured tier."""
    seed, sizes = cfg.seed * SEEDS_APART, (cfg.items, cfg.items, cfg.test_items)
    if cfg.tier == "hard":
        train, dev, test = math_problems.hard(seed, sizes, cfg.rng("templates"))
    else:
        train, dev, test = math_problems.easy(seed, sizes)
    return Splits(train, dev, test, feedback=train)


def _own(cfg: RunConfig) -> Splits:
    """A data file, 60% train, 20% dev, 20% test."""
    rows = own.read(Path(cfg.task.removeprefix("own:")))
    rows = [rows[i] for i in cfg.rng("own").permutation(len(rows))]
    a, b = round(0.6 * len(rows)), round(0.8 * len(rows))
    return Splits(rows[:a], rows[a:b], rows[b:], feedback=rows[:a])
