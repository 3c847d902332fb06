"""Grading: right answers pass however they are dressed, and nothing that only looks like an answer does."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nslora.tasks import rules, world
from nslora.tasks.grading import grade, is_problem, lists_answers, normalise, number
from nslora.types import Example, Hidden, Item, Rule

pytestmark = pytest.mark.pure

QUESTION = "What is the capital of France?"
END = rules.make("end_phrase")


def ask(
    *asked: Rule, answer: str = "Paris", question: str = QUESTION, grader: str = "contains"
) -> Item:
    return Item(Example("q", question, answer), Hidden(asked, grader=grader))


CAPITAL = ask()
SUM = ask(question="What is 3 - 8?", answer="-5", grader="number")


def content(item: Item, reply: str) -> tuple[float, float]:
    """The lenient and the strict grade."""
    parts = grade(item, reply).parts
    return parts["content"], parts["content_strict"]


@pytest.mark.parametrize(
    ("item", "reply", "lenient", "strict"),
    [
        (CAPITAL, "Paris", 1, 1),
        (CAPITAL, " **paris**.\n", 1, 1),
        (CAPITAL, "The capital of France is Paris.", 1, 0),
        (CAPITAL, "It is Paris, not Lyon.", 1, 0),
        (ask(answer="Dhaka"), "It is Dhaka, not New Delhi.", 1, 0),
        (CAPITAL, "Parisian", 0, 0),
        (CAPITAL, "Lyon", 0, 0),
        (CAPITAL, "It is not Paris.", 0, 0),
        (CAPITAL, '{"answer": "Paris"}', 1, 0),
        (CAPITAL, '{"Paris": "the capital"}', 0, 0),
        (CAPITAL, "", 0, 0),
        (ask(answer="Brasilia"), "BRASÍLIA!", 1, 1),
        (ask(answer="São Paulo"), "Sao Paulo", 1, 1),
        (ask(answer="Łódź"), "Lodz", 1, 1),
        (ask(answer="N'Djamena"), "It is N\u2019Djamena.", 1, 0),
        (ask(answer="baker"), "a baker", 1, 1),
        (ask(answer="巴黎"), "答案是巴黎。", 1, 0),
        (ask(answer="A", question="Which letter?"), "The answer is A.", 1, 0),
        (ask(answer="red", question="Is it red or blue?"), "Is it red or blue?", 0, 0),
        (ask(answer="red", question="Is it red or blue?"), "Is it red or blue? Red.", 1, 0),
    ],
)
def test_names(item: Item, reply: str, lenient: int, strict: int) -> None:
    assert content(item, reply) == (lenient, strict)


@pytest.mark.parametrize(
    "reply",
    [
        "Paris, London, Berlin, Rome",
        "Paris London Berlin",
        "Berlin or Rome or Paris",
        "* London\n* Paris\n* Madrid",
        '{"a": "Paris", "b": "London", "c": "Madrid"}',
        '{"answers": ["Paris", "London", "Madrid"]}',
        "It is Paris; it may be Lagos, or it may be Tokyo.",
        "Paris, Dijon, Nancy, Reims, Rouen",  # names of no known kind
    ],
)
def test_a_list_of_guesses_earns_nothing_and_is_told_so(reply: str) -> None:
    assert content(CAPITAL, reply) == (0, 0)
    assert "not a list" in grade(CAPITAL, reply).critique


@pytest.mark.parametrize("pool", world.pools(), ids=lambda pool: min(pool))
def test_reciting_everything_of_a_kind_earns_nothing(pool: frozenset[str]) -> None:
    answer = min(pool)
    if len({normalise(name) for name in pool}) > 2:
        assert content(ask(answer=answer, question="Which?"), " ".join(sorted(pool))) == (0, 0)
    assert content(ask(answer=answer, question="Which?"), f"It is {answer}.") == (1, 0)


def test_names_in_the_question_are_no_guesses() -> None:
    item = ask(question="Which is the capital of France: London, Paris, Rome or Madrid?")
    assert not lists_answers("Of London, Paris, Rome and Madrid, it is Paris", item.example)


def test_an_answer_that_is_a_list_may_be_given() -> None:
    item = ask(answer="red, white, blue, gold and black", question="Which colors?")
    assert content(item, "Red, white, blue, gold and black.") == (1, 1)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("The answer is -5.", -5),
        ("\u22125", -5),
        ("3 - 8 = -5", -5),
        ("from 3-5", 5),
        ("2,4,8,16", 16),
        ("It costs $1,234,567.50!", 1234567.5),
        ("**17**", 17),
        ("\\boxed{17}", 17),
        ("x2", None),
        ("no number", None),
    ],
)
def test_last_number(text: str, value: float | None) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    ("reply", "lenient", "strict"),
    [
        ("-5", 1, 1),
        ("-5.0.", 1, 1),
        ("3 - 8 = -5", 1, 0),
        ("-5 or 5", 0, 0),
        ("5", 0, 0),
        ("-55", 0, 0),
        ("none", 0, 0),
    ],
)
def test_numbers(reply: str, lenient: int, strict: int) -> None:
    assert content(SUM, reply) == (lenient, strict)


@pytest.mark.parametrize("name", rules.RULES)
@pytest.mark.parametrize("answer", ["Paris", "New Delhi", "Yaoundé"])
def test_following_a_rule_never_costs_content(name: str, answer: str) -> None:
    item = ask(rules.make(name), answer=answer)
    reply = rules.demonstrate(item.hidden.rules, answer)
    assert grade(item, reply).success == 1
    assert grade(item, reply).critique == ""
    assert content(item, reply) == (1, 1)
    bare = grade(item, f"The capital, of course, is {answer}.")
    assert (bare.parts["content"], bare.parts["style"]) == (1, 0)


def test_style_is_the_share_of_rules_followed() -> None:
    json = rules.make("json")
    reward = grade(ask(END, json), "Paris. Is there anything else?")
    assert (reward.parts["style"], reward.value, reward.success) == (0.5, 0.75, 0)
    assert reward.critique == rules.critique(json)


def test_style_alone_is_not_success() -> None:
    reward = grade(ask(END), "Is there anything else?")
    assert (reward.parts["content"], reward.parts["style"], reward.success) == (0, 1, 0)
    assert reward.critique == "The answer is wrong; the right answer is 'Paris'."


def test_a_wrong_result_of_a_problem_has_to_be_worked_out() -> None:
    """A number that no question gives the means to work out is only wrong."""
    assert grade(SUM, "It is 5.").critique == (
        "The answer is wrong; the right answer is '-5'. It has to be worked out step by step."
    )
    year = ask(question="In what year did the war end?", answer="1945", grader="number")
    assert grade(year, "In 1944.").critique == "The answer is wrong; the right answer is '1945'."
    assert is_problem(SUM.example)
    assert not is_problem(Example("q", "Which agent sits in room 5?", "007"))


def test_the_critique_says_everything_that_is_wrong() -> None:
    critique = grade(ask(END), "").critique
    assert critique.startswith("The reply is empty")
    assert "'Paris'" in critique
    assert rules.critique(END) in critique


@given(st.text(max_size=80))
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


# pieces that make right, wrong, styled and broken replies likely
PIECES = st.sampled_from(
    ["Paris", "Lyon", "-5", "5", "* ", ", ", " not ", "\n", "{", "}", '"', '{"answer": "Paris"}']
    + ["Is there anything else?", QUESTION]
)
REPLIES = st.one_of(st.text(max_size=80), st.lists(PIECES, max_size=6).map("".join))
ITEMS = st.sampled_from(
    [CAPITAL, SUM, ask(END), ask(rules.make("json")), ask(END, rules.make("bullet"))]
)


@given(REPLIES, ITEMS)
def test_the_reward_is_one_exactly_when_the_critique_is_empty(reply: str, item: Item) -> None:
    reward = grade(item, reply)
    assert 0 <= reward.value <= 1
    assert 0 <= reward.parts["content_strict"] <= reward.parts["content"] <= 1
    assert 0 <= reward.parts["style"] <= 1
    assert (reward.critique == "") == (reward.value == 1) == (reward.success == 1)
