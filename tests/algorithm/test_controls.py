"""Controls take the message out of a symbolic move and leave everything else as it is."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nslora.algorithm import controls
from nslora.tasks import rules
from nslora.tasks.grading import grade
from nslora.types import Edit, Example, Hidden, Item, Need, Prompt, Reward, Scored, diff

OLD = Prompt("You are a helpful assistant.", "{question}")
VOCABULARY = ("river", "of", "Who")


def failing(output: str) -> Scored:
    """A reply to a question that asks for JSON, with the critique only: a method sees no rules."""
    example = Example("style:Peru", "The capital of Peru?", "Lima", "Peru")
    reward = grade(Item(example, Hidden((rules.make("json"),), Need.STYLE)), output)
    return Scored(example, output, Reward(reward.value, reward.critique), -0.1, 3)


def test_shuffled_critiques_are_of_a_rule_that_the_reply_breaks_and_nobody_asked_for() -> None:
    rows = [failing("Lima, of course.")] * 40
    shuffled = controls.shuffled(rows, np.random.default_rng(0))
    critiques = {s.reward.critique for s in shuffled}
    own = rules.critique(rules.make("json"))
    possible = {rules.critique(rules.make(name)): rules.make(name) for name in rules.RULES}
    assert len(critiques) > 3 and critiques <= set(possible) and own not in critiques
    assert not any(rules.follows(possible[words], "Lima, of course.") for words in critiques)
    assert {id(s.example) for s in shuffled} == {id(rows[0].example)}
    assert {s.reward.value for s in shuffled} == {rows[0].reward.value}
    assert shuffled == controls.shuffled(rows, np.random.default_rng(0))


@given(
    st.sampled_from(
        ["Every reply must be valid JSON.", "You are a helpful assistant. Be brief.", OLD.system]
    ),
    st.sampled_from(["{question} Every reply must be JSON.", "Be brief: {question}", "{question}"]),
)
def test_scrambled_edits_are_as_long_and_hold_no_added_word(system: str, question: str) -> None:
    new = Prompt(system, question)
    edit = controls.scrambled(Edit(new), OLD, VOCABULARY, np.random.default_rng(0))
    assert edit.diff == diff(OLD.both, edit.prompt.both)
    for before, edited, after in (
        (OLD.system, system, edit.prompt.system),
        (OLD.question, question, edit.prompt.question),
    ):
        assert len(after.split()) == len(edited.split())
        assert after.count("{question}") == edited.count("{question}")
        kept = [token for op, token in diff(before, edited) if op == "=" and not token.isspace()]
        assert set(after.split()) <= {*VOCABULARY, *kept, "{question}"}


def test_a_reply_that_is_no_edit_stays_none() -> None:
    broken = Edit(OLD, "tags")
    assert controls.scrambled(broken, OLD, VOCABULARY, np.random.default_rng(0)) is broken
