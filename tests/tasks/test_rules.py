"""Rules: followed and broken by what should, silent to import, and invisible once stripped."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nslora.tasks import rules
from nslora.tasks.grading import normalise
from nslora.types import Rule, UserError

pytestmark = pytest.mark.pure

PLAIN = "The capital of France is Paris, of course."
FOLLOWING = {
    "end_phrase": ["Paris. Is there anything else?", '"Paris. is there anything else?"'],
    "start_phrase": ["Thank you for asking. Paris", "\n Thank you for asking.\nParis"],
    "postscript": ["Paris.\nP.S. It is large.", "Paris. P. S. It is large."],
    "quotes": ['"Paris"', ' "Paris is the capital." '],
    "title": ["<<Capitals>>\nParis", "Paris <<France>>"],
    "bullet": ["* Paris", "Here it is:\n- Paris"],
    "highlight": ["It is *Paris*.", "It is **Paris**."],
    "json": [
        '{"answer": "Paris"}',
        '```json\n{"answer": ["Paris"]}\n```',
        '```\n{"a": {"b": "Paris"}}```',
    ],
    "max_words": ["Paris", "It is Paris."],
    "lower_case": ["paris", "it is paris."],
    "upper_case": ["PARIS", "IT IS PARIS."],
    "no_comma": ["Paris", "It is Paris."],
}
BROKEN = {
    "end_phrase": ["Is there anything else? Paris", "Paris. Is there anything else? Ask me!"],
    "start_phrase": [
        "Paris. Thank you for asking.",
        "Paris\nThank you for asking.",
        "Thank you for asking! Paris",
    ],
    "postscript": ["Paris. PS It is large."],
    "quotes": ['"Paris', '"', "'Paris'", '"Paris" is the capital.'],
    "title": ["<Capitals> Paris", "<<>> Paris", "<< >> Paris"],
    "bullet": ["* Paris\n* France", "Paris * France", "**Paris**"],
    "highlight": ["It is * Paris.", "** **"],
    "json": [
        '"Paris"',
        "5",
        '["Paris"]',
        'The answer: {"answer": "Paris"}',
        '{"answer": Paris}',
        "[" * 5000,
    ],
    "max_words": ["It is Paris now", "Paris Paris Paris Paris"],
    "lower_case": ["paRis", "123"],
    "upper_case": ["PARIs", "123"],
    "no_comma": ["Paris, France"],
}


@pytest.mark.parametrize("name", rules.RULES)
def test_replies_that_follow_and_that_break(name: str) -> None:
    rule = rules.make(name)
    assert [text for text in FOLLOWING[name] if not rules.follows(rule, text)] == []
    assert [text for text in [*BROKEN[name], PLAIN, "", " \n"] if rules.follows(rule, text)] == []


@pytest.mark.parametrize("name", rules.RULES)
@given(
    answer=st.sampled_from(
        ["Paris", "New Delhi", "N'Djamena", "São Paulo", "potter", "-17", "Rio de Janeiro"]
    )
)
def test_demonstrated_answer_follows_its_rule_and_is_read_back(name: str, answer: str) -> None:
    if name in ("lower_case", "upper_case") and answer == "-17":
        return  # digits have no case
    asked = (rules.make(name),)
    reply = rules.demonstrate(asked, answer)
    assert rules.follows(asked[0], reply)
    assert normalise(rules.strip(asked, reply)) == normalise(answer)


@pytest.mark.parametrize(
    "pair", [("end_phrase", "bullet"), ("json", "upper_case"), ("title", "end_phrase")]
)
def test_two_rules_are_demonstrated_and_stripped_together(pair: tuple[str, str]) -> None:
    asked = tuple(rules.make(name) for name in pair)
    reply = rules.demonstrate(asked, "Paris")
    assert all(rules.follows(rule, reply) for rule in asked)
    assert normalise(rules.strip(asked, reply)) == "paris"


@given(text=st.text(max_size=60), name=st.sampled_from(list(rules.RULES)))
def test_any_reply_is_judged_and_stripped(text: str, name: str) -> None:
    rule = rules.make(name)
    assert rules.follows(rule, text) in (True, False)
    assert len(rules.strip((rule,), text)) <= 2 * len(text)


def test_tightened_checks_stay_within_ifeval() -> None:
    ifeval = rules._ifeval()
    for name, kind, kwargs in [
        ("json", "JsonFormat", {}),
        ("start_phrase", "ConstrainedStartChecker", {"starter": "Thank you for asking."}),
    ]:
        checker = getattr(ifeval, kind)(kind)
        checker.build_description(**kwargs)
        assert all(checker.check_following(text) for text in FOLLOWING[name])
        assert any(checker.check_following(text) for text in BROKEN[name])


def test_strip_reads_json_values_not_keys() -> None:
    asked = (rules.make("json"),)
    assert (
        rules.strip(asked, '{"Paris": "Rome", "n": [1, {"x": true}], "none": null}')
        == "Rome, 1, True"
    )
    assert rules.strip(asked, "not json") == "not json"


def test_phrase_with_regex_marks_is_taken_literally() -> None:
    rule = rules.make("start_phrase", {"phrase": "Well (yes)?"})
    assert rules.follows(rule, "Well (yes)? Paris")
    assert not rules.follows(rule, "Well yes Paris")


@pytest.mark.parametrize("name", rules.RULES)
def test_critique_and_instruction_name_the_argument(name: str) -> None:
    rule = rules.make(name)
    for text in (rules.critique(rule), rules.instruction(rule)):
        assert all(str(value) in text for value in rule.kwargs.values())
        assert len(text.split()) > 4


def test_the_instruction_for_json_shows_braces() -> None:
    assert '{"answer": "your answer"}' in rules.instruction(rules.make("json"))


@pytest.mark.parametrize(
    ("name", "kwargs", "says"),
    [
        ("rhyme", {}, "unknown rule 'rhyme'"),
        ("json", {"n": 1}, "no argument 'n'"),
        ("max_words", {"n": "3"}, "must be like 3"),
        ("max_words", {"n": 0}, "must be positive"),
        ("max_words", {"n": True}, "must be like 3"),
        ("end_phrase", {"phrase": " "}, "trimmed"),
    ],
)
def test_bad_rule_is_one_sentence(name: str, kwargs: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        rules.make(name, kwargs)


def test_defaults_are_filled_in() -> None:
    assert rules.make("max_words") == Rule("max_words", {"n": 3})
    assert rules.make("max_words", {"n": 5}) == Rule("max_words", {"n": 5})


def test_checking_is_silent_and_opens_no_connection() -> None:
    """In a fresh process without network: nothing printed, the package not left half imported, no download tried."""
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise SystemExit('tried the network')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from nslora.tasks import rules\n"
        "assert all(isinstance(rules.follows(rules.make(n), 'Paris'), bool) for n in rules.RULES)\n"
        "assert 'torch' not in sys.modules and 'if_verifiable.ifbench' not in sys.modules\n"
        "assert 'if_verifiable' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
