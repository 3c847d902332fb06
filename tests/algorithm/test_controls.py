"""Controls take the message out of a symbolic move and leave everything else as it is."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from nslora.algorithm import controls
from nslora.algorithm.textgrad_compat import diff
from nslora.tasks import rules
from nslora.tasks.grading import grade
from nslora.types import Edit, Example, Need, Prompt, Scored

OLD = Prompt("You are a helpful assistant.", "{question}")
VOCABULARY = ("river", "of", "Who")


def failing(output: str) -> Scored:
    asked = (rules.make("json"),)
    example = Example(
        "style:Peru", "The capital of Peru?", "Lima", asked, Need.STYLE, "Peru", "Peru"
    )
    return Scored(example, output, grade(example, output), -0.1, 3)


def test_shuffled_words_are_of_a_rule_that_the_reply_breaks_and_nobody_asked_for() -> None:
    rows = [failing("Lima, of course.")] * 40
    told = controls.shuffled(rows, np.random.default_rng(0))
    said = {s.reward.words for s in told}
    own = rules.words(rules.make("json"))
    possible = {rules.words(rules.make(name)): name for name in rules.RULES}
    assert len(said) > 3 and said <= set(possible) and own not in said
    assert not any(rules.keep(rules.make(possible[words]), "Lima, of course.") for words in said)
    kept = rows[0]
    assert all(s.example is kept.example and s.reward.value == kept.reward.value for s in told)
    assert told == controls.shuffled(rows, np.random.default_rng(0))


@given(
    st.sampled_from(
        ["Every reply must be valid JSON.", "You are a helpful assistant. Be brief.", OLD.system]
    ),
    st.sampled_from(["{question} Every reply must be JSON.", "Be brief: {question}", "{question}"]),
)
def test_scrambled_edits_are_as_long_and_hold_no_added_word(system: str, question: str) -> None:
    new = Prompt(system, question)
    made = controls.scrambled(Edit(new), OLD, VOCABULARY, np.random.default_rng(0)).prompt
    for before, edited, after in (
        (OLD.system, system, made.system),
        (OLD.question, question, made.question),
    ):
        assert len(after.split()) == len(edited.split())
        assert after.count("{question}") == edited.count("{question}")
        kept = [token for op, token in diff(before, edited) if op == "=" and not token.isspace()]
        assert set(after.split()) <= {*VOCABULARY, *kept, "{question}"}


def test_a_reply_that_is_no_edit_stays_none() -> None:
    broken = Edit(OLD, "tags")
    assert controls.scrambled(broken, OLD, VOCABULARY, np.random.default_rng(0)) is broken
