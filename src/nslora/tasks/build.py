"""The tasks: train, dev and test splits, with the questions of retention and replay beside them.

Test is scored once, at a run's end (in a stream, at each phase's end). Every choice comes from
`cfg.rng`, so that all methods of one seed see the same task.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
from datasets import Dataset

from nslora.config import RunConfig
from nslora.tasks import bigbench, math_problems, own, retention, rules, world
from nslora.tasks.trivia import Question
from nslora.tasks.world import Fact
from nslora.types import Example, Hidden, Item, Need, Prompt, Reward, Rule, UserError

INITIAL = Prompt(RunConfig().system, RunConfig().template)
# under which a small model shows what it knows: under INITIAL it says it in a sentence, or not at all
BRIEF = Prompt(f"{INITIAL.system} Reply with the answer and nothing else.")
# wordings of a fact in all, and for training; then come those for dev, the others are for test
WORDINGS = min(map(len, world.WORDINGS.values()))
TRAIN_WORDINGS = 5
# reasoning-gym seeds item i of a dataset with seed + i: near seeds would share items
SEEDS_APART = 1_000_000
# per phase of a stream: batches of facts so far, and the rule: 0 is the first, 1 the second
STREAM = ((1, 0), (2, 0), (2, 1))

Split = list[Item]
# questions, each under a prompt of its own
Prompted = tuple[tuple[Prompt, Example], ...]


@dataclass(frozen=True)
class Splits:
    """The splits of a task; `feedback` is the part of train that candidates are scored on.

    `pool` is that of `Task`.
    """

    train: Split
    dev: Split
    test: Split
    feedback: Split
    pool: retention.Prompted = field(default_factory=list)


@dataclass(frozen=True)
class Task:
    """What a run adapts to. Methods see examples and rewards; what is hidden stays in `hidden`.

    Attributes:
        initial_prompt: the neutral prompt that every method starts from.
        train, dev, test: disjoint by `Hidden.group` and by question.
        feedback: training rows that candidates are scored and criticised on: each fact in one
            wording only.
        locality: questions outside the splits that a small model can answer: what can be forgotten.
        promptability: (prompt that states a rule other than the task's, question under that rule).
        replay: (prompt, question); trained on, the frozen model's replies keep its other abilities.
        hidden: what only the reward knows, by example id.
        pool: (prompt, example) in random order. Where it is given, a run fills the splits, of which
            only the sizes count so far, with the examples that its frozen weights do not know.
        labels: what answers of own data are one of; a prompt may list them.
    """

    name: str
    initial_prompt: Prompt
    train: tuple[Example, ...]
    dev: tuple[Example, ...]
    test: tuple[Example, ...]
    feedback: tuple[Example, ...]
    locality: tuple[Example, ...]
    promptability: Prompted
    replay: Prompted
    hidden: Mapping[str, Hidden]
    pool: Prompted = ()
    labels: frozenset[str] = frozenset()

    @property
    def items(self) -> Split:
        """The rows of all splits with what is hidden about them: for checks, never for methods."""
        rows = (*self.train, *self.dev, *self.test)
        return [Item(example, self.hidden[example.id]) for example in rows]

    def reward(self, example: Example, text: str) -> Reward:
        """Return the reward of any text as a reply to the example, with its parts."""
        item = Item(example, self.hidden[example.id])
        if item.hidden.grader == "bigbench":
            return bigbench.grade(item, text)
        return own.reward(item, text)

    def expect(self, examples: Sequence[Example], texts: Sequence[str]) -> None:
        """Tell what grades replies, if it wants to know, which ones come next."""
        items = [Item(example, self.hidden[example.id]) for example in examples]
        own.expect(zip(items, texts, strict=True))

    def knows(self, example: Example, text: str) -> bool:
        """Tell whether a reply names a right answer, in whatever form: for filling the splits."""
        return self.reward(example, text).parts["content"] == 1

    def fill(self, examples: Sequence[Example]) -> Task:
        """Return the task with these examples in its splits, whose sizes stay, and without a pool."""
        rest = iter(examples)
        train, dev, test = (
            tuple(islice(rest, len(split))) for split in (self.train, self.dev, self.test)
        )
        return replace(self, train=train, dev=dev, test=test, feedback=train, pool=())

    def obeys(self, example: Example, text: str) -> bool:
        """Tell whether a reply follows the rules, whatever its content: for promptability."""
        return self.reward(example, text).parts["style"] == 1

    def demonstrate(self, example: Example) -> str:
        """Return the gold answer written in the wanted style: for the upper reference only."""
        return rules.demonstrate(self.hidden[example.id].rules, example.answer)

    def dataset(self, split: str) -> Dataset:
        """Return a split as a table to look at, hidden columns included (rules as JSON)."""
        rows = []
        for example in getattr(self, split):
            hidden = asdict(self.hidden[example.id])
            # rules differ in their arguments, and a table's column has one type
            hidden["rules"] = json.dumps(hidden["rules"])
            rows.append(asdict(example) | hidden)
        return Dataset.from_list(rows)


def phases(cfg: RunConfig) -> int:
    """Return how many tasks a run meets one after the other: several in a stream, else one."""
    return len(STREAM) if cfg.task == "stream" else 1


def build(cfg: RunConfig, phase: int = 0) -> Task:
    """Build the task of a run, or of one phase of a stream.

    Raises UserError for a bad rule, too many items, or a malformed data file (with its line).
    """
    splits = _splits(cfg, phase)
    asked = _rule_names(cfg, splits)
    locality = retention.locality()
    promptability = retention.promptability(INITIAL, asked)
    replay = retention.replay(INITIAL, asked, cfg.replay_pool)

    # feedback is part of train
    items = [*splits.train, *splits.dev, *splits.test, *locality]
    items += [item for _, item in promptability + replay + splits.pool]
    return Task(
        name=cfg.task,
        # other tasks than own data have the default
        initial_prompt=Prompt(cfg.system, cfg.template),
        train=_examples(splits.train),
        dev=_examples(splits.dev),
        test=_examples(splits.test),
        feedback=_examples(splits.feedback),
        locality=_examples(locality),
        promptability=_prompted(promptability),
        replay=_prompted(replay),
        hidden={item.example.id: item.hidden for item in items},
        pool=_prompted(splits.pool),
        labels=own.label_set(items),
    )


def _examples(items: Split) -> tuple[Example, ...]:
    return tuple(item.example for item in items)


def _prompted(pairs: retention.Prompted) -> Prompted:
    return tuple((prompt, item.example) for prompt, item in pairs)


def _rule_names(cfg: RunConfig, splits: Splits) -> set[str]:
    """Return the names of the rules that the task asks for, in any phase."""
    # what a later phase asks for must not be measured or trained in an earlier one
    if cfg.task == "stream":
        return set(_stream_rules(cfg))
    items = splits.train + splits.dev + splits.test
    return {rule.name for item in items for rule in item.hidden.rules}


def _splits(cfg: RunConfig, phase: int) -> Splits:
    if cfg.is_own:
        return _own(cfg)
    if cfg.task == "stream":
        return _stream(cfg, phase)
    if cfg.task in bigbench.TASKS:
        return _real(cfg)
    makers = {"facts": _facts, "style": _style, "math": _math, "mixed": _mixed}
    return makers[cfg.task](cfg)


def _facts(cfg: RunConfig) -> Splits:
    (facts,) = world.invent(cfg.rng("facts"), (cfg.items,))
    return _fact_splits(cfg, facts)


def _fact_splits(
    cfg: RunConfig, facts: list[Fact], asked: tuple[Rule, ...] = (), fewest: int = 0
) -> Splits:
    """Ask about facts in wordings that no two splits share, in no phase of a stream of which one has `fewest` facts."""
    dev_items = cfg.dev_items or len(facts)
    fewest = fewest or len(facts)
    # dev asks about every fact once before it asks about one again
    dev_wordings = math.ceil((cfg.dev_items or fewest) / fewest)
    test_wordings = WORDINGS - TRAIN_WORDINGS - dev_wordings
    if cfg.test_items > test_wordings * len(facts):
        raise UserError(
            f"dev_items = {cfg.dev_items} and test_items = {cfg.test_items} are too many for "
            f"items = {cfg.items}: a fact has {WORDINGS - TRAIN_WORDINGS} wordings for both."
        )
    # a relation's wordings in random order: the first for training, then dev's, then test's
    rng = cfg.rng("wordings")
    order = {
        relation: rng.permutation(len(wordings)) for relation, wordings in world.WORDINGS.items()
    }
    rows = {fact: _rows(fact, order[fact.relation], asked) for fact in facts}
    # feedback takes another wording for each fact, so that an edit meets them all
    train = [row[:TRAIN_WORDINGS] for row in rows.values()]
    dev = [row[TRAIN_WORDINGS + nth] for nth in range(dev_wordings) for row in rows.values()]
    return Splits(
        train=[item for row in train for item in row],
        dev=dev[:dev_items],
        test=_fact_test(cfg, rows, test_wordings),
        feedback=[row[i % TRAIN_WORDINGS] for i, row in enumerate(train)],
    )


def _rows(fact: Fact, order: np.ndarray, asked: tuple[Rule, ...]) -> Split:
    """Return a fact in each wording of its relation, as ordered."""
    need = Need.BOTH if asked else Need.CONTENT
    rows = []
    for wording in map(int, order):
        group = f"{fact.relation}:{wording}"
        example = Example(
            id=f"{fact.person}:{group}",
            question=fact.question(wording),
            answer=fact.value,
            fact=f"{fact.person}:{fact.relation}",
        )
        rows.append(Item(example, Hidden(asked, need, group)))
    return rows


def _fact_test(cfg: RunConfig, rows: Mapping[Fact, Split], wordings: int) -> Split:
    """Spread the test evenly over facts and their last `wordings`.

    Facts come in random order, again and again, each time in another of their test wordings. Facts
    of one relation start at different wordings.
    """
    facts = list(rows)
    shuffled = [facts[i] for i in cfg.rng("test facts").permutation(len(facts))]
    # rank: place of a fact among those of its relation
    rank: dict[Fact, int] = {}
    seen: dict[str, int] = defaultdict(int)
    for fact in shuffled:
        rank[fact] = seen[fact.relation]
        seen[fact.relation] += 1

    test = []
    for i in range(cfg.test_items):
        turn, place = divmod(i, len(shuffled))
        fact = shuffled[place]
        # the first wordings were trained on, the next are dev's
        nth = (rank[fact] + turn) % wordings
        test.append(rows[fact][WORDINGS - wordings + nth])
    return test


def _style(cfg: RunConfig) -> Splits:
    """Ask about countries under the rule, best known ones first, splits disjoint by country."""
    asked = (rules.make(cfg.rule),)
    sizes = _sizes(cfg)
    chosen = _countries(sizes, cfg.is_tuning)
    # whole countries go to a split, so that what one split learns about one helps no other
    rng = cfg.rng("countries")
    countries = iter([chosen[i] for i in rng.permutation(len(chosen))])
    parts = []
    for size in sizes:
        part: list[Question] = []
        while len(part) < size:
            part.extend(next(countries))
        # shuffled before the cut, so that not the last country alone loses questions
        part = [part[i] for i in rng.permutation(len(part))][:size]
        parts.append([question.item("country", asked) for question in part])
    return Splits(*parts, feedback=parts[0])


def _sizes(cfg: RunConfig) -> tuple[int, int, int]:
    """Return the numbers of train, dev and test items of one kind."""
    return cfg.items, cfg.dev_items or cfg.items, cfg.test_items


def _countries(sizes: Sequence[int], tuning: bool) -> Sequence[tuple[Question, ...]]:
    """Return the best known countries that fill splits of these sizes, of those for tuning or of the others."""
    # every other one, so that both halves are as well known
    countries = world.countries()[tuning::2]
    reach = np.cumsum([len(country) for country in countries])
    # a split may leave its last country's other questions unused: two at most
    spare = 2 * len(sizes)
    enough = int(np.searchsorted(reach, sum(sizes) + spare)) + 1
    if enough > len(countries):
        most = reach[-1] - spare
        raise UserError(
            f"items + dev_items + test_items must be at most {most} for known questions."
        )
    return countries[:enough]


def _mixed(cfg: RunConfig) -> Splits:
    """Mix facts without rules, country questions with the rule, and other people's facts with it.

    `cfg.mix` says how many times `items`, `dev_items` and `test_items` there are of each kind.
    """
    asked = (rules.make(cfg.rule),)
    content, style, both = cfg.shares
    # two lists share no person: what is learnt of one fact says nothing about the other kind
    sizes = (content * cfg.items, both * cfg.items)
    plain_facts, asked_facts = world.invent(cfg.rng("facts"), sizes)
    kinds = []
    if content:
        kinds.append(_fact_splits(_times(cfg, content), plain_facts))
    if style:
        kinds.append(_style(_times(cfg, style)))
    if both:
        kinds.append(_fact_splits(_times(cfg, both), asked_facts, asked))
    return _shuffled(cfg, *kinds)


def _times(cfg: RunConfig, share: int) -> RunConfig:
    """Return the settings of a kind of which there are `share` times as many items."""
    names = ("items", "dev_items", "test_items")
    return cfg.but(**{name: share * getattr(cfg, name) for name in names})


def _shuffled(cfg: RunConfig, *kinds: Splits) -> Splits:
    """Join several kinds of items split by split, in random order."""
    rng = cfg.rng("mix")

    def together(split: str) -> Split:
        rows = [item for kind in kinds for item in getattr(kind, split)]
        return [rows[i] for i in rng.permutation(len(rows))]

    return Splits(together("train"), together("dev"), together("test"), together("feedback"))


def _stream_rules(cfg: RunConfig) -> tuple[str, str]:
    """Return the rule that a stream starts with, and the one that it changes to."""
    return cfg.rule, "end_phrase" if cfg.rule == "bullet" else "bullet"


def _stream(cfg: RunConfig, phase: int) -> Splits:
    """Mix facts and country questions under a rule: one batch of facts, then two, then a new rule."""
    batches, turn = STREAM[phase]
    cfg = cfg.but(rule=_stream_rules(cfg)[turn])
    # all batches are drawn in each phase, so that the first stays the same
    invented = world.invent(cfg.rng("facts"), (cfg.items, cfg.items))
    facts = [fact for batch in invented[:batches] for fact in batch]
    asked = (rules.make(cfg.rule),)
    return _shuffled(cfg, _style(cfg), _fact_splits(cfg, facts, asked, fewest=cfg.items))


def _math(cfg: RunConfig) -> Splits:
    """Make problems with checkable answers, of the configured tier."""
    seed = cfg.seed * SEEDS_APART
    sizes = _sizes(cfg)
    if cfg.tier == "hard":
        parts = math_problems.hard(seed, sizes, cfg.rng("templates"))
    else:
        parts = math_problems.easy(seed, sizes)
    train, dev, test = parts
    return Splits(train, dev, test, feedback=train)


def _real(cfg: RunConfig) -> Splits:
    """Draw examples of a BIG-bench task, each for one split."""
    sizes = _sizes(cfg)
    examples = bigbench.draw(cfg.task, sum(sizes), cfg.rng("bigbench"), cfg.is_tuning)
    rest = iter(examples)
    train, dev, test = (list(islice(rest, size)) for size in sizes)
    unknown = bigbench.TASKS[cfg.task].unknown
    pool = [(BRIEF, item) for item in examples] if unknown else []
    return Splits(train, dev, test, feedback=train, pool=pool)


def _own(cfg: RunConfig) -> Splits:
    """Read a data file and split it, unless test has a file of its own."""
    data = own.read(Path(cfg.task.removeprefix("own:")), cfg.grader, cfg.columns, cfg.test)
    train, dev, test = own.splits(data, cfg.rng("own"))
    return Splits(train, dev, test, feedback=train)
