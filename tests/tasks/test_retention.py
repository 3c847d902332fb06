"""Retention and replay: enough questions, of templates that no other set shares, in every truncation."""

from __future__ import annotations

import re
from itertools import combinations

import pytest

from nslora.tasks import retention, rules, trivia, world
from nslora.tasks.grading import grade, normalise
from nslora.types import Item, Prompt

pytestmark = pytest.mark.pure

INITIAL = Prompt("You are a helpful assistant.")
COUNTRIES = {
    "What is the capital of {}?": "",
    "On which continent is {}?": "",
    "What is the currency of {}?": "",
}
SETS = {"countries": COUNTRIES, "replay": trivia.REPLAY, "retention": trivia.RETENTION}


def questions(name: str) -> list[str]:
    if name == "countries":
        return [question.text for country in world.countries() for question in country]
    return [q.text for template in trivia.questions(SETS[name]) for q in template]


def test_every_question_is_in_one_set() -> None:
    normalised = [normalise(text) for name in SETS for text in questions(name)]
    assert len(set(normalised)) == len(normalised)


@pytest.mark.parametrize(("a", "b"), [*combinations(SETS, 2), *combinations(reversed(SETS), 2)])
def test_no_question_could_come_from_a_template_of_another_set(a: str, b: str) -> None:
    patterns = [
        re.escape(template).replace(re.escape("{}"), ".+")
        for template in SETS[b]
        if "{}" in template
    ]
    assert len(patterns) == len(SETS[b])
    taken = [q for q in questions(a) if any(re.fullmatch(pattern, q) for pattern in patterns)]
    assert taken == []


def test_locality_and_promptability_are_large_and_ask_different_questions() -> None:
    locality = {item.example.question for item in retention.locality()}
    promptability = {item.example.question for _, item in retention.promptability(INITIAL, ())}
    assert len(locality) >= 100
    assert len(promptability) >= 100
    assert not locality & promptability
    assert locality | promptability == set(questions("retention"))


def test_replay_fills_its_default_pool() -> None:
    pairs = retention.replay(INITIAL, (), 128)
    plain = [item.example.question for prompt, item in pairs if prompt == INITIAL]
    instructed = [item.example.question for prompt, item in pairs if prompt != INITIAL]
    assert len(plain) == 128
    assert plain == instructed
    assert set(plain) <= set(questions("replay"))


@pytest.mark.parametrize(
    ("items", "templates"),
    [
        (retention.locality(), trivia.RETENTION),
        ([item for _, item in retention.promptability(INITIAL, ())], trivia.RETENTION),
        ([item for _, item in retention.replay(INITIAL, (), 128)][:128], trivia.REPLAY),
    ],
    ids=["locality", "promptability", "replay"],
)
def test_a_truncation_holds_every_template(items: list[Item], templates: dict) -> None:
    start = [item.hidden.group for item in items[: len(templates)]]
    assert sorted(start) == sorted(templates)


@pytest.mark.parametrize("most", [1, 8, 50, 1000])
def test_a_small_replay_pool_is_the_start_of_a_large_one(most: int) -> None:
    large = [item.example.question for _, item in retention.replay(INITIAL, (), 1000)]
    small = [item.example.question for _, item in retention.replay(INITIAL, (), most)]
    assert len(small) == 2 * min(most, len(questions("replay")))
    assert small[: len(small) // 2] == large[: len(small) // 2]


@pytest.mark.parametrize("name", rules.RULES)
def test_promptability_states_its_rule_and_never_the_tasks(name: str) -> None:
    pairs = retention.promptability(INITIAL, {name})
    assert len({item.hidden.rules[0].name for _, item in pairs}) >= 2
    for prompt, item in pairs:
        (rule,) = item.hidden.rules
        assert rule.name != name
        assert prompt.system == INITIAL.system
        assert rules.instruction(rule) in prompt.question
        assert rules.instruction(rules.make(name)) not in prompt.both


@pytest.mark.parametrize("asked", [(), ("bullet",), ("end_phrase", "bullet")])
def test_every_template_meets_every_rule_of_promptability(asked: tuple[str, ...]) -> None:
    met: dict[str, set[str]] = {}
    for _, item in retention.promptability(INITIAL, asked):
        met.setdefault(item.hidden.group, set()).add(item.hidden.rules[0].name)
    assert set(met) == set(trivia.RETENTION)
    assert all(names == set(retention.RULES) - set(asked) for names in met.values())


def test_what_shows_a_rule_follows_it_and_is_asked_nowhere() -> None:
    asked = {text for name in SETS for text in questions(name)}
    assert not asked & {question for question, _ in retention.SHOWN}
    for rule in map(rules.make, retention.RULES):
        shown = [rules.demonstrate((rule,), answer) for _, answer in retention.SHOWN]
        assert all(rules.follows(rule, text) for text in shown)


@pytest.mark.parametrize("name", rules.RULES)
def test_replay_states_no_rule_that_is_measured(name: str) -> None:
    pairs = retention.replay(INITIAL, {name}, 128)
    assert len({prompt.system for prompt, _ in pairs if prompt != INITIAL}) >= 8
    for prompt, item in pairs:
        assert not {rule.name for rule in item.hidden.rules} & {name, *retention.RULES}
        expected = [rules.instruction(rule) for rule in item.hidden.rules] or [INITIAL.system]
        assert [prompt.system] == expected


def test_no_rule_is_left_to_measure_when_the_task_asks_for_all() -> None:
    assert retention.promptability(INITIAL, retention.RULES) == []


@pytest.mark.parametrize("kind", trivia.kinds(), ids=lambda kind: min(kind))
def test_no_value_of_a_kind_contains_another(kind: frozenset[str]) -> None:
    names = {normalise(name) for name in kind}
    assert len(names) == len(kind)
    inside = [(a, b) for a in names for b in names if a != b and f" {a} " in f" {b} "]
    assert inside == []


@pytest.mark.parametrize("name", ["replay", "retention"])
def test_right_answers_are_graded_right_and_questions_give_none_away(name: str) -> None:
    for question in (q for template in trivia.questions(SETS[name]) for q in template):
        item = question.item("label")
        assert grade(item, f"It is {question.answer}.").value == 1
        assert grade(item, question.text).value == 0.5
        # nor by naming the answer in passing
        assert f" {normalise(question.answer)} " not in f" {normalise(question.text)} "


def test_a_question_as_an_item_keeps_the_question_as_its_fact() -> None:
    question = trivia.Question("What is up?", "down", "What is {}?")
    rule = rules.make("json")
    for item in (question.item("label"), question.item("label", (rule,))):
        example = item.example
        assert (example.id, example.fact) == ("label:What is up?", "What is up?")
        assert (example.question, example.answer) == ("What is up?", "down")
    assert question.item("label", (rule,)).hidden.rules == (rule,)
