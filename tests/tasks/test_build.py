"""Tasks: sizes as asked, splits that share nothing, questions that never tell a rule, data files checked by line."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from nslora.config import RunConfig
from nslora.tasks import rules, world
from nslora.tasks.build import START, Task, build, grade, phases
from nslora.tasks.grading import normalise
from nslora.types import Example, Need, UserError

SPLITS = ("train", "dev", "test")
MADE = ("facts", "style", "math", "mixed")
TELLING = r"\b(json|bullet|letters|uppercase|lowercase|quot\w*|comma|phrase|words?|highlight|title|postscript|only)\b"


@pytest.fixture(scope="module")
def tasks() -> dict:
    return {name: build(RunConfig(task=name, items=12, test_items=20)) for name in MADE}


def everything(task) -> list[Example]:
    held = [*task.examples("locality"), *(example for _, example in task.promptability)]
    return [example for split in SPLITS for example in task.examples(split)] + held


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
    assert tuple(len(task.examples(split)) for split in (*SPLITS, "feedback")) == sizes
    assert len(task.locality) == len(task.promptability) == 24
    assert task.start == START
    assert len(task.replay) >= 150


@pytest.mark.parametrize("name", MADE)
def test_splits_share_no_id_question_or_group(tasks: dict, name: str) -> None:
    task = tasks[name]
    examples = everything(task)
    assert len({e.id for e in examples}) == len(examples)
    assert len({normalise(e.question) for e in examples}) == len(examples)
    parts = [{e.group for e in task.examples(split)} for split in (*SPLITS, "locality")]
    parts.append({e.group for _, e in task.promptability})
    assert sum(map(len, parts)) == len(set().union(*parts))


@pytest.mark.parametrize("name", MADE)
def test_replay_shares_no_question_and_tells_no_rule_that_is_measured(
    tasks: dict, name: str
) -> None:
    task = tasks[name]
    assert not {e.question for _, e in task.replay} & {e.question for e in everything(task)}
    measured = {prompt.system for prompt, _ in task.promptability}
    measured |= {rules.told(rule) for e in task.examples("train") for rule in e.rules}
    systems = {prompt.system for prompt, _ in task.replay}
    assert len(systems) >= 8
    assert not systems & measured


@pytest.mark.parametrize("most", [1, 8, 50])
def test_a_small_replay_pool_is_spread_over_the_large_one(tasks: dict, most: int) -> None:
    small = build(RunConfig(task="facts", items=3, test_items=3, replay_pool=most)).replay
    asked, every = (
        [e.question for p, e in pool if p == START] for pool in (small, tasks["facts"].replay)
    )
    assert len(small) == 2 * len(asked) == 2 * most
    assert set(asked) <= set(every)
    assert every.index(asked[-1]) >= (most - 1) * (len(every) // most)


@pytest.mark.parametrize("name", MADE)
def test_feedback_is_one_training_row_per_fact(tasks: dict, name: str) -> None:
    train, feedback = (tasks[name].examples(split) for split in ("train", "feedback"))
    assert {e.id for e in feedback} <= {e.id for e in train}
    assert sorted(e.fact for e in feedback) == sorted({e.fact for e in train})


@pytest.mark.parametrize("name", MADE)
def test_one_fact_has_one_answer_and_no_question_gives_it_or_a_rule_away(
    tasks: dict, name: str
) -> None:
    examples = everything(tasks[name])
    assert all(
        len({e.answer for e in examples if e.fact == fact}) == 1
        for fact in {e.fact for e in examples}
    )
    told = [e.question for e in examples if re.search(TELLING, e.question, re.IGNORECASE)]
    assert told == []
    echoed = [
        e
        for e in examples
        if e.grader == "contains" and grade(replace(e, rules=()), e.question).content
    ]
    assert echoed == []


@pytest.mark.parametrize("name", MADE)
def test_gold_answers_in_the_wanted_style_are_graded_right_and_others_wrong(
    tasks: dict, name: str
) -> None:
    for example in everything(tasks[name]):
        reward = grade(example, rules.demonstrate(example.rules, example.answer))
        assert (reward.success, reward.content_strict, reward.words) == (1, 1, ""), example
        assert grade(example, "I do not know").content == 0


def test_facts_are_tested_evenly_in_wordings_never_trained(tasks: dict) -> None:
    task = tasks["facts"]
    assert {e.fact for e in task.examples("dev")} == {e.fact for e in task.examples("train")}
    times = Counter(e.fact for e in task.examples("test"))
    assert set(times.values()) == {1, 2}
    assert len(times) == 12
    assert (
        len({e.group for e in task.examples("test")}) == 12
    )  # four wordings of each of three relations
    assert all(e.need is Need.CONTENT and not e.rules for e in task.examples("train"))


def test_mixed_holds_three_kinds_of_need_and_two_sets_of_people(tasks: dict) -> None:
    rows = tasks["mixed"].examples("test")
    assert Counter(e.need for e in rows) == dict.fromkeys(Need, 20)
    assert all(bool(e.rules) == (e.need is not Need.CONTENT) for e in rows)
    people = {
        need: {e.fact.split(":")[1] for e in rows if e.need is need}
        for need in (Need.CONTENT, Need.BOTH)
    }
    assert not people[Need.CONTENT] & people[Need.BOTH]
    assert [e.need for e in rows] != sorted(e.need for e in rows)


@pytest.mark.parametrize("rule", rules.RULES)
def test_every_rule_is_a_style_task_and_is_not_told_elsewhere(rule: str) -> None:
    task = build(RunConfig(task="style", rule=rule, items=6, test_items=6))
    assert {r.name for e in task.examples("test") for r in e.rules} == {rule}
    told = rules.told(rules.make(rule))
    assert told not in {p.system for p, _ in task.promptability} | {
        p.system for p, _ in task.replay
    }
    assert len({p.system for p, _ in task.promptability}) >= 2
    for prompt, example in task.promptability:
        assert prompt.system == rules.told(example.rules[0])
        assert example.rules[0].name != rule


@pytest.mark.parametrize("name", MADE)
def test_seed_decides_and_method_does_not(name: str) -> None:
    cfg = RunConfig(task=name, items=6, test_items=6)
    same = build(replace(cfg, method="lora", backbone="gemma3-270m"))
    other = build(replace(cfg, seed=1))
    task = build(cfg)
    assert [task.examples(s) for s in SPLITS] == [same.examples(s) for s in SPLITS]
    assert task.replay == same.replay
    assert task.examples("test") != other.examples("test")
    assert task.examples("locality") == other.examples("locality")


def test_math_seeds_share_no_problem_index() -> None:
    a, b = (build(RunConfig(task="math", seed=seed, items=16, test_items=16)) for seed in (1, 2))
    shared = {e.question for e in everything(a)[:48]} & {e.question for e in everything(b)[:48]}
    assert len(shared) < 6  # one-digit products may recur


def test_math_answers_are_right() -> None:
    for e in build(RunConfig(task="math", items=20, test_items=20)).examples("test"):
        if "sequence" not in e.question:
            sum_ = e.question.removeprefix("What is ").removesuffix("?")
            assert re.fullmatch(r"[-+*/()\d\s]+", sum_)
            assert eval(sum_) == int(e.answer)


def test_known_questions_are_about_well_known_countries() -> None:
    first = {group for known in world.countries()[:60] for group in (known[0].group,)}
    task = build(RunConfig(task="style"))
    assert {e.group for split in SPLITS for e in task.examples(split)} <= first


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
        ({"task": "facts", "items": 3, "test_items": 36}, "at most 4 x items"),
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
    assert [len(task.examples(s)) for s in SPLITS] == [12, 4, 4]
    examples = {e.id: e for s in SPLITS for e in task.examples(s)}
    assert len(examples) == 20
    assert examples["own:3"].answer == "Person 3"
    last = examples["own:21"]
    assert (last.answer, last.grader, last.need) == ("4", "number", Need.BOTH)
    assert last.rules == (rules.make("max_words", {"n": 2}), rules.make("json"))
    told = {example.rules[0].name for _, example in task.promptability}
    assert told
    assert not told & {"max_words", "json"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{oops", "not valid JSON"),
        ("[1]", "a row must be"),
        ({"question": "Q?"}, "a row must be"),
        ({"question": "Q?", "answer": "x", "anser": "y"}, "a row must be"),
        ({"question": "Q?", "answer": "..."}, "letters or digits"),
        ({"question": 3, "answer": "x"}, "letters or digits"),
        ({"question": "Q?", "answer": "x", "rules": "json"}, "rules must be a list"),
        ({"question": "Q?", "answer": "x", "rules": [{"name": "rhyme"}]}, "unknown rule 'rhyme'"),
        (
            {"question": "Q?", "answer": "x", "rules": [{"name": "json", "kwargs": {"n": 1}}]},
            "no argument 'n'",
        ),
        (
            {"question": "Q?", "answer": "x", "rules": [{"name": "json", "kwargs": 3}]},
            "arguments of a rule",
        ),
        ({"question": "who is NUMBER 2", "answer": "x"}, "repeats the question of line 2"),
    ],
)
def test_malformed_own_data_names_its_line(tmp_path: Path, row: object, says: str) -> None:
    with pytest.raises(UserError, match=r"line 4: ") as error:
        build(own(tmp_path / "mine.jsonl", [*ROWS[:3], row, *ROWS[3:]]))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_own_data_needs_ten_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 9 questions; at least 10"):
        build(own(tmp_path / "mine.jsonl", ROWS[:9]))


def test_own_data_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot read"):
        build(RunConfig(task=f"own:{tmp_path / 'mine.jsonl'}"))


def test_a_stream_brings_more_facts_then_another_rule() -> None:
    cfg = RunConfig(task="stream", rule="json", items=3, test_items=6)
    assert phases(cfg) == 3 and phases(replace(cfg, task="mixed")) == 1
    first, more, turned = (build(cfg, phase) for phase in range(3))

    def facts(task: Task) -> set[str]:
        return {e.fact for e in task.examples("train") if e.fact.startswith("both:")}

    def asked(task: Task) -> set[str]:
        return {
            rule.name
            for split in ("train", "dev", "test")
            for e in task.examples(split)
            for rule in e.rules
        }

    assert facts(first) < facts(more) == facts(turned) and len(facts(more)) == 6
    assert (asked(first), asked(more), asked(turned)) == ({"json"}, {"json"}, {"bullet"})
    assert (
        first.promptability == turned.promptability
    )  # neither rule is among those told there, in any phase
    assert first.examples("locality") == turned.examples("locality")
    for task in (first, more, turned):
        questions = [
            {e.question for e in task.examples(split)} for split in ("train", "dev", "test")
        ]
        assert not questions[0] & questions[1] and not questions[2] & (questions[0] | questions[1])


def test_a_stream_that_starts_with_the_second_rule_changes_to_another() -> None:
    cfg = RunConfig(task="stream", rule="bullet", items=3, test_items=6)
    assert {rule.name for e in build(cfg, 2).examples("test") for rule in e.rules} == {"end_phrase"}
