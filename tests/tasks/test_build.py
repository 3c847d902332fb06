"""Tasks: sizes as set, splits that share nothing, questions that state no rule, data files checked by line."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from nslora.config import TUNING, RunConfig
from nslora.tasks import rules, world
from nslora.tasks.build import INITIAL, Task, build, phases
from nslora.tasks.grading import grade, normalise
from nslora.types import Example, Hidden, Item, Need, UserError

pytestmark = pytest.mark.pure

SPLITS = ("train", "dev", "test")
MADE = ("facts", "style", "math", "mixed")
STATING = r"\b(json|bullet|letters|uppercase|lowercase|quot\w*|comma|phrase|words?|highlight|title|postscript|only)\b"


@pytest.fixture(scope="module")
def tasks() -> dict:
    return {name: build(RunConfig(task=name, items=12, test_items=20)) for name in MADE}


def everything(task: Task) -> list[Example]:
    """All examples but those of replay, which repeat each other."""
    promptability = [example for _, example in task.promptability]
    return [*task.train, *task.dev, *task.test, *task.locality, *promptability]


def groups(task: Task, split: str) -> set[str]:
    return {task.hidden[example.id].group for example in getattr(task, split)}


def rule_names(task: Task, *splits: str) -> set[str]:
    examples = [example for split in splits or SPLITS for example in getattr(task, split)]
    return {rule.name for example in examples for rule in task.hidden[example.id].rules}


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("facts", (60, 12, 20, 12)),
        ("style", (12, 12, 20, 12)),
        ("math", (12, 12, 20, 12)),
        ("mixed", (132, 36, 60, 36)),
    ],
)
def test_sizes(tasks: dict, name: str, sizes: tuple) -> None:
    task = tasks[name]
    assert tuple(len(getattr(task, split)) for split in (*SPLITS, "feedback")) == sizes
    assert len(task.locality) >= 100
    assert len(task.promptability) >= 100
    assert task.initial_prompt == INITIAL
    assert len(task.replay) == 2 * 128


@pytest.mark.parametrize("name", MADE)
def test_splits_share_no_id_question_or_group(tasks: dict, name: str) -> None:
    task = tasks[name]
    examples = everything(task)
    assert len({normalise(e.question) for e in examples}) == len(examples)
    parts = [groups(task, split) for split in SPLITS]
    parts.append(groups(task, "locality"))
    assert sum(map(len, parts)) == len(set().union(*parts))


@pytest.mark.parametrize("name", MADE)
def test_every_example_has_an_id_of_its_own_and_something_hidden(tasks: dict, name: str) -> None:
    task = tasks[name]
    examples = everything(task) + [example for _, example in task.replay]
    ids = [example.id for example in examples]
    assert len(set(ids)) == len(ids)
    assert set(ids) == set(task.hidden)


@pytest.mark.parametrize("name", MADE)
def test_replay_shares_no_question_and_no_template(tasks: dict, name: str) -> None:
    task = tasks[name]
    replay = [example for _, example in task.replay]
    asked = {normalise(e.question) for e in everything(task)}
    assert not asked & {normalise(e.question) for e in replay}
    templates = {task.hidden[e.id].group for e in replay}
    retained = [*task.locality, *(example for _, example in task.promptability)]
    assert not templates & {task.hidden[e.id].group for e in retained}


@pytest.mark.parametrize("name", ["style", "mixed"])
def test_ids_and_facts_say_nothing_about_rules_or_needs(name: str) -> None:
    cfg = RunConfig(task=name, items=6, test_items=6)
    one, other = build(cfg.but(rule="json")), build(cfg.but(rule="upper_case"))
    for split in SPLITS:
        assert getattr(one, split) == getattr(other, split)
    said = [f"{e.id} {e.fact}".lower() for e in (*one.train, *one.dev, *one.test)]
    words = [*Need, *rules.RULES, "rule", "need"]
    assert [text for text in said if any(re.search(rf"\b{word}\b", text) for word in words)] == []


def test_facts_with_and_without_a_rule_look_alike() -> None:
    task = build(RunConfig(task="mixed", items=6, test_items=6))
    shape = r"\w+ \w+:(birthplace|occupation|instrument):\d+"
    for example in task.train:
        facts = task.hidden[example.id].need is not Need.STYLE
        assert bool(re.fullmatch(shape, example.id)) == facts


@pytest.mark.parametrize("name", MADE)
def test_feedback_is_one_training_row_per_fact(tasks: dict, name: str) -> None:
    train, feedback = tasks[name].train, tasks[name].feedback
    assert {e.id for e in feedback} <= {e.id for e in train}
    assert sorted(e.fact for e in feedback) == sorted({e.fact for e in train})


@pytest.mark.parametrize("name", MADE)
def test_one_fact_has_one_answer_and_no_question_gives_it_or_a_rule_away(
    tasks: dict, name: str
) -> None:
    task = tasks[name]
    examples = everything(task)
    answers: dict[str, set[str]] = {}
    for example in examples:
        answers.setdefault(example.fact, set()).add(example.answer)
    assert {len(gold) for gold in answers.values()} == {1}
    stated = [e.question for e in examples if re.search(STATING, e.question, re.IGNORECASE)]
    assert stated == []
    by_name = [e for e in examples if task.hidden[e.id].grader == "contains"]
    echoed = [e for e in by_name if grade(Item(e), e.question).parts["content"]]
    assert echoed == []


@pytest.mark.parametrize("name", ["facts", "style", "mixed"])
def test_retention_asks_for_its_facts_by_their_question(tasks: dict, name: str) -> None:
    task = tasks[name]
    for example in (*task.locality, *(example for _, example in task.promptability + task.replay)):
        assert example.fact == example.question


@pytest.mark.parametrize("name", MADE)
def test_gold_answers_in_the_wanted_style_are_graded_right_and_others_wrong(
    tasks: dict, name: str
) -> None:
    task = tasks[name]
    for example in everything(task):
        reward = task.reward(example, task.demonstrate(example))
        assert (reward.value, reward.parts["content_strict"]) == (1, 1), example
        assert task.obeys(example, task.demonstrate(example))
        assert task.reward(example, "I do not know").parts["content"] == 0


def test_obeying_is_about_style_alone(tasks: dict) -> None:
    task = tasks["facts"]
    prompt, example = task.promptability[0]
    (rule,) = task.hidden[example.id].rules
    assert rules.instruction(rule) in prompt.question
    assert task.obeys(example, rules.demonstrate((rule,), "nonsense"))
    assert not task.obeys(example, f"It is, as everybody knows, {example.answer}, of course")


@pytest.mark.parametrize("split", [*SPLITS, "feedback", "locality"])
def test_a_split_as_a_table_shows_what_is_hidden(tasks: dict, split: str) -> None:
    task = tasks["mixed"]
    table = task.dataset(split)
    examples = getattr(task, split)
    assert table["id"] == [e.id for e in examples]
    assert set(table.column_names) == {*Example.__annotations__, *Hidden.__annotations__}
    for row, example in zip(table, examples, strict=True):
        hidden = task.hidden[example.id]
        assert (row["need"], row["group"]) == (hidden.need, hidden.group)
        assert [rule["name"] for rule in json.loads(row["rules"])] == [r.name for r in hidden.rules]


def test_facts_are_tested_evenly_in_wordings_never_trained(tasks: dict) -> None:
    task = tasks["facts"]
    assert {e.fact for e in task.dev} == {e.fact for e in task.train}
    times = Counter(e.fact for e in task.test)
    assert set(times.values()) == {1, 2}
    assert len(times) == 12
    # four wordings of each of three relations
    assert len(groups(task, "test")) == 12
    assert rule_names(task) == set()
    assert {task.hidden[e.id].need for e in task.train} == {Need.CONTENT}


def test_mixed_holds_three_kinds_of_need_and_two_sets_of_people(tasks: dict) -> None:
    task = tasks["mixed"]
    needs = [task.hidden[e.id].need for e in task.test]
    assert Counter(needs) == dict.fromkeys(Need, 20)
    assert needs != sorted(needs)
    people = {need: set() for need in Need}
    for example, need in zip(task.test, needs, strict=True):
        assert bool(task.hidden[example.id].rules) == (need is not Need.CONTENT)
        people[need].add(example.fact.split(":")[0])
    assert not people[Need.CONTENT] & people[Need.BOTH]


@pytest.mark.parametrize("rule", rules.RULES)
def test_every_rule_is_a_style_task_and_is_stated_nowhere(rule: str) -> None:
    task = build(RunConfig(task="style", rule=rule, items=6, test_items=6))
    assert rule_names(task, "test") == {rule}
    instruction = rules.instruction(rules.make(rule))
    prompts = [prompt for prompt, _ in task.promptability + task.replay]
    assert not any(instruction in prompt.both for prompt in prompts)


@pytest.mark.parametrize("mix", ["1:1:1", "3:1:0", "0:2:1", "4:0:0", "0:0:2"])
def test_a_mix_has_the_kinds_that_it_says(mix: str) -> None:
    task = build(RunConfig(mix=mix, items=3, dev_items=6, test_items=9))
    shares = map(int, mix.split(":"))
    for split, items in (("dev", 6), ("test", 9), ("feedback", 3)):
        needs = Counter(task.hidden[e.id].need for e in getattr(task, split))
        wanted = zip((Need.CONTENT, Need.STYLE, Need.BOTH), mix.split(":"), strict=True)
        assert needs == {need: items * int(share) for need, share in wanted if share != "0"}
    parts = [groups(task, split) for split in SPLITS]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert sum(shares) * 3 == len(task.feedback)


def test_a_larger_dev_asks_about_every_fact_as_often() -> None:
    cfg = RunConfig(task="facts", items=6, test_items=12)
    small, large = build(cfg), build(cfg.but(dev_items=12))
    assert set(small.dev) < set(large.dev)
    assert set(Counter(e.fact for e in large.dev).values()) == {2}
    assert small.train == large.train


@pytest.mark.parametrize("seed", [0, TUNING])
def test_style_can_have_all_countries_of_its_half(seed: int) -> None:
    most = sum(map(len, world.countries()[seed == TUNING :: 2])) - 6
    cfg = RunConfig(task="style", items=30, test_items=most - 60, seed=seed)
    assert len(build(cfg).test) == most - 60 >= 60
    with pytest.raises(UserError, match=f"must be at most {most} "):
        build(cfg.but(test_items=most - 59))


@pytest.mark.parametrize("task", ["style", "mixed", "stream"])
def test_what_is_tuned_on_is_never_asked_elsewhere(task: str) -> None:
    """Every seed takes the best known countries: they are not the same ones."""
    cfg = RunConfig(task=task, items=12, test_items=12)

    def asked(seed: int) -> set[str]:
        built = build(cfg.but(seed=seed))
        return {e.question for e in (*built.train, *built.dev, *built.test)}

    for seed in (0, TUNING - 1):
        assert not asked(seed) & (asked(TUNING) | asked(TUNING + 1))
    # of style alone, seeds of one half share most of it
    assert task != "style" or asked(0) & asked(1)


@pytest.mark.parametrize("name", MADE)
def test_seed_decides_and_method_does_not(name: str) -> None:
    cfg = RunConfig(task=name, items=6, test_items=6)
    task, other = build(cfg), build(cfg.but(seed=1))
    assert task == build(cfg.but(method="lora", backbone="gemma3-270m"))
    assert task.test != other.test
    assert (task.locality, task.replay) == (other.locality, other.replay)


def test_math_seeds_share_no_problem_index() -> None:
    a, b = (build(RunConfig(task="math", seed=seed, items=16, test_items=16)) for seed in (1, 2))
    asked = [{e.question for e in (*task.train, *task.dev, *task.test)} for task in (a, b)]
    # one-digit products may recur
    assert len(asked[0] & asked[1]) < 6


def test_math_answers_are_right() -> None:
    for e in build(RunConfig(task="math", items=20, test_items=20)).test:
        if "sequence" not in e.question:
            sum_ = e.question.removeprefix("What is ").removesuffix("?")
            assert re.fullmatch(r"[-+*/()\d\s]+", sum_)
            assert eval(sum_) == int(e.answer)


def test_style_questions_are_about_well_known_countries() -> None:
    first = {country[0].group for country in world.countries()[:80]}
    task = build(RunConfig(task="style"))
    assert set().union(*(groups(task, split) for split in SPLITS)) <= first


def test_values_of_a_relation_are_never_ambiguous() -> None:
    for pool in (world.cities(), world.OCCUPATIONS, world.INSTRUMENTS):
        names = [normalise(name) for name in pool]
        assert len(set(names)) == len(names) >= 30
        assert [
            n for n in names if any(n != other and re.search(rf"\b{n}\b", other) for other in names)
        ] == []
    assert not set(world.cities()) & world.capitals()


def test_invented_people_share_no_name() -> None:
    facts = [f for part in world.invent(RunConfig().rng("t"), (30, 31)) for f in part]
    assert len(facts) == 61
    first, last = zip(*{tuple(f.person.split()) for f in facts}, strict=True)
    assert len(set(first)) == len(set(last)) == len(first) == 21


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"task": "style", "rule": "rhyme"}, "unknown rule"),
        ({"task": "style", "items": 500}, "must be at most"),
        ({"task": "facts", "items": 3, "test_items": 36}, "too many for items = 3"),
        ({"task": "facts", "items": 3, "dev_items": 13, "test_items": 3}, "too many for items = 3"),
        ({"mix": "1:1"}, "must be content:style:both"),
        ({"mix": "0:0:0"}, "must be content:style:both"),
        ({"task": "facts", "items": 5000}, "lower `items`"),
        ({"task": "own:/nowhere.jsonl"}, "cannot read"),
    ],
)
def test_bad_settings_are_one_sentence(settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=re.escape(says)) as error:
        build(RunConfig.of(settings))
    assert str(error.value).count("\n") == 0


def own(path: Path, rows: list) -> RunConfig:
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n"
    )
    return RunConfig(task=f"own:{path}")


ROWS = [{"question": f"Who is number {n}?", "answer": f"Person {n}"} for n in range(1, 21)]


def test_own_data_is_split_by_the_seed(tmp_path: Path) -> None:
    ruled = {
        "question": "2 + 2?",
        "answer": 4,
        "rules": [{"name": "max_words", "kwargs": {"n": 2}}, {"name": "json"}],
    }
    task = build(own(tmp_path / "mine.jsonl", [*ROWS[:-1], "", ruled]))
    assert [len(getattr(task, split)) for split in SPLITS] == [12, 4, 4]
    examples = {e.id: e for split in SPLITS for e in getattr(task, split)}
    assert len(examples) == 20
    assert examples["own:3"].answer == "Person 3"
    assert examples["own:21"].answer == "4"
    last = task.hidden["own:21"]
    assert (last.grader, last.need) == ("own:number", Need.BOTH)
    assert last.rules == (rules.make("max_words", {"n": 2}), rules.make("json"))
    measured = [task.hidden[example.id].rules[0].name for _, example in task.promptability]
    assert measured
    assert not {"max_words", "json"} & set(measured)


def test_a_stream_brings_more_facts_then_another_rule() -> None:
    cfg = RunConfig(task="stream", rule="json", items=3, test_items=6)
    assert phases(cfg) == 3 and phases(cfg.but(task="mixed")) == 1
    first, more, last = (build(cfg, phase) for phase in range(3))

    def facts(task: Task) -> set[str]:
        return {e.fact for e in task.train if task.hidden[e.id].need is Need.BOTH}

    assert facts(first) < facts(more) == facts(last) and len(facts(more)) == 6
    assert [rule_names(task) for task in (first, more, last)] == [{"json"}, {"json"}, {"bullet"}]
    # neither rule is among the measured ones, in any phase
    assert first.promptability == last.promptability
    assert first.locality == last.locality
    for task in (first, more, last):
        train, dev, test = ({e.question for e in getattr(task, split)} for split in SPLITS)
        assert not train & dev and not test & (train | dev)


def test_no_phase_of_a_stream_tests_what_another_chose_on() -> None:
    """With few facts at first, dev needs a second wording of each."""
    cfg = RunConfig(task="stream", rule="json", items=3, dev_items=6, test_items=9)
    tasks = [build(cfg, phase) for phase in range(3)]
    seen = {e.question for task in tasks for e in (*task.train, *task.dev)}
    assert all(len(task.dev) == 12 for task in tasks)
    assert not seen & {e.question for task in tasks for e in task.test}


def test_a_stream_that_starts_with_the_second_rule_changes_to_another() -> None:
    cfg = RunConfig(task="stream", rule="bullet", items=3, test_items=6)
    assert rule_names(build(cfg, 2)) == {"end_phrase"}
