"""Graders of own data: what carries meaning is told apart, what carries none is forgiven, and guesses earn nothing."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nslora.tasks import graders, rules
from nslora.tasks.grading import grade
from nslora.types import Example, Hidden, Item, Rule, UserError

pytestmark = pytest.mark.pure

SCHEMA = '{"type": "object", "required": ["age"], "properties": {"age": {"type": "integer"}}}'
PERSON = '{"name": "Ann", "age": 41}'
MOOD = "labels:good|bad|very bad|mixed"


def item(grader: str, answer: str, *asked: Rule, question: str = "Which one?") -> Item:
    return Item(Example("q", question, answer), Hidden(asked, grader=f"own:{grader}"))


def right(grader: str, answer: str, reply: str, question: str = "Which one?") -> bool:
    return grade(item(grader, answer, question=question), reply).success == 1


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        # case, blanks, punctuation and emphasis around the answer
        ("the north shed", "  The North\n Shed. "),
        ("the north shed", "north shed"),
        ("Paris", "**Paris**"),
        ("Paris", "It is *Paris*, of course!"),
        ("Paris.", "paris"),
        ("N'Djamena", "It is N\u2019Djamena."),
        ("rock-hard", "rock\u2011hard"),
        ("Paris", "It is Paris.Is there anything else?"),
        ("Paris", "1.Paris"),
        ("Paris", "-Paris"),
        ("Paris", "<b>Paris</b> (France)"),
        # signs
        ("C++", "It is C++."),
        ("C", "The language is C, not C++."),
        ("C#", "`C#`"),
        (".NET", "We use .NET here"),
        ("5%", "About 5% of them."),
        ("$5", "It costs $5."),
        ("8 - 2", "that is 8 - 2"),
        ("+", "The sign is +"),
        ("?", "?"),
        ("5!", "5!"),
        # scripts: words without spaces, nouns with particles
        ("かぎ", "それはかぎです。"),
        ("北京", "答案是北京。"),
        ("서울", "서울입니다."),
        ("กรุงเทพ", "คือกรุงเทพ"),
        ("ｶﾞｽ", "ガス"),
        ("दिन", "शब्द दिन है"),
        ("القاهرة", "العاصمة هي القاهرة."),
        ("👩\u200d🔬", "a 👩\u200d🔬!"),
        ("❤️", "❤"),
        # an accent may be left out, or be one too many
        ("São Paulo", "sao paulo"),
        ("Brasilia", "BRASÍLIA"),
        ("İstanbul", "istanbul"),
        # of a JSON object the values count
        ("Paris", '{"city": "Paris"}'),
    ],
)
def test_contains_forgives_what_carries_no_meaning(answer: str, reply: str) -> None:
    assert right("contains", answer, reply)
    assert right("contains", answer, answer)


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        ("C++", "C"),
        ("C", "C++"),
        ("C", "C#"),
        ("C#", "C"),
        ("A", "A-"),
        ("path", "os.path"),
        ("192.168.0.1", "192.168.0.10"),
        ("guilty", "not guilty"),
        ("C++", "C+"),
        (".5", "1.5"),
        ("5 m", "1.5 m"),
        ("5 m", "-5 m"),
        ("500 m", "1,500 m"),
        ("30 min", "10:30 min"),
        ("18 years", "18% years"),
        ("NET", ".NET"),
        ("toxic", "non-toxic"),
        ("km", "km/h"),
        ("x", "x\u00b2"),
        ("5!", "5"),
        ("a \u2260 b", "a = b"),
        ("007", "7"),
        ("007", "0070"),
        ("かぎ", "かき"),
        ("かき", "かぎ"),
        ("ハン", "パン"),
        ("दिन", "दान"),
        ("दिन", "दिनांक"),
        ("мой", "мои"),
        ("мои", "мой"),
        ("👩", "👩\u200d🔬"),
        ("👍", "👍🏽"),
        ("má", "mà"),
        ("Paris", "Parisian"),
        ("Paris", "It is not Paris."),
        ("Paris", "It isn't Paris."),
        ("Paris", "Paris, Dijon, Nancy, Reims, Rouen"),
        ("Paris", '{"Paris": "the city"}'),
        ("Paris", ""),
    ],
)
def test_contains_tells_apart_what_carries_meaning(answer: str, reply: str) -> None:
    assert not right("contains", answer, reply)


def test_an_echo_of_the_question_is_no_answer() -> None:
    question = "Is it red or blue?"
    assert not right("contains", "red", question, question)
    assert right("contains", "red", f"{question} Red.", question)


def test_case_and_accents_count_where_that_is_asked_for() -> None:
    assert right("contains:case", "Co", "It is Co.") and not right("contains:case", "Co", "CO")
    assert right("exact:case", "año", " año.") and not right("exact:case", "año", "ano")
    assert right("contains", "Co", "CO") and right("exact", "año", "ano")


def test_exact_takes_nothing_but_the_answer() -> None:
    assert right("exact", "the north shed", '"The north shed."')
    for reply in ("in the north shed", "north shed", "the north shed, or not"):
        assert not right("exact", "the north shed", reply)


@pytest.mark.parametrize(
    ("answer", "reply", "is_right"),
    [
        ("5", "5.0", True),
        ("1,234.5", "it is 1234.50", True),
        (".5", "0.5", True),
        ("-5", "3 - 8 = \u22125", True),
        ("1945", "On May 5, 1945", True),
        ("1000", "1e3", True),
        (".5", "1.5", False),
        ("7", "6 or 7", False),
        ("7", "6/7", False),
        ("5", "1,5", False),
        ("5", "-5", False),
        ("5", "none", False),
        ("5", '{"result": 5}', True),
    ],
)
def test_numbers_are_compared_as_numbers(answer: str, reply: str, is_right: bool) -> None:
    assert right("number", answer, reply) == is_right


@pytest.mark.parametrize("text", ["007", "00", "-01", "5%", "1/2", "1,5", "2024-01-05", "x2", ""])
def test_a_name_in_digits_is_no_number(text: str) -> None:
    assert not graders.is_number(text)
    assert graders.is_number("0.5") and graders.is_number("0") and graders.is_number("1e5")


@pytest.mark.parametrize(
    ("answer", "reply", "is_right"),
    [
        ("good", "Good.", True),
        ("good", "The customer feels good", True),
        ("bad", "not good but bad", True),
        ("very bad", "It is very bad.", True),
        ("bad", "very bad", False),
        ("very bad", "bad", False),
        ("good", "good or bad", False),
        ("good", "good/bad", False),
        ("good", "good, bad, mixed", False),
        ("good", "not good", False),
        ("good", "goodness", False),
        ("good", "happy", False),
        ("good", '{"label": "good"}', True),
        ("good", '{"label": "good", "or": "bad"}', False),
    ],
)
def test_a_reply_names_one_label_alone(answer: str, reply: str, is_right: bool) -> None:
    assert right(MOOD, answer, reply) == is_right


def test_labels_of_one_letter_are_no_articles() -> None:
    choice = "labels:A|B|C|D"
    assert (
        right(choice, "B", "It is a B.") and right(choice, "B", "b") and right(choice, "A", "(A)")
    )
    assert not right(choice, "A", "It is a B.") and not right(choice, "A", "A or B")


def test_labels_may_differ_in_case_only() -> None:
    assert right("labels:Co|CO", "Co", "Co.") and not right("labels:Co|CO", "Co", "CO")
    assert right("labels:yes|no", "Yes", "yes")


@pytest.mark.parametrize(
    ("reply", "is_right"),
    [
        (PERSON, True),
        ('{"age":41,"name":"Ann"}', True),
        ('```json\n{\n "name": "Ann",\n "age": 41.0\n}\n```', True),
        (f"Here it is: {PERSON}", True),
        ('{"name": "Ann", "age": 42}', False),
        ('{"name": "Ann", "age": "41"}', False),
        ('{"name": "Ann"}', False),
        ('{"name": "Ann", "age": 41, "town": "Ulm"}', False),
        ('{"name": "Ann", "age": 1, "age": 41}', False),
        (f'{PERSON} {{"name": "Ben"}}', False),
        ("Ann is 41.", False),
        ('{"name": "Ann", "age": 41', False),
        ("[" * 5000, False),
    ],
)
def test_json_is_compared_as_json(reply: str, is_right: bool) -> None:
    assert right("json", PERSON, reply) == is_right


def test_truth_is_no_number_in_json() -> None:
    assert not right("json", '{"a": 1}', '{"a": true}')
    assert right("json", '[true, {"b": null}]', '[true, {"b": null}]')
    assert not right("json", "[1, 2]", "[2, 1]")


def test_the_rule_json_leaves_a_json_answer_whole() -> None:
    asked = item("json", PERSON, rules.make("json"))
    assert grade(asked, PERSON).success == 1
    assert grade(asked, f"It is {PERSON}").parts == {
        "content": 1,
        "content_strict": 0,
        "style": 0,
    }


def test_a_form_can_be_asked_for() -> None:
    date = r"regex:\d{4}-\d{2}-\d{2}"
    assert right(date, "2024-01-05", "On 2025-12-31") and not right(date, "2024-01-05", "in May")
    assert "has not the form" in grade(item(date, "2024-01-05"), "in May").critique

    schema = f"json-schema:{SCHEMA}"
    assert right(schema, '{"age": 3}', '{"age": 99}') and not right(schema, '{"age": 3}', "{}")
    critique = grade(item(schema, '{"age": 3}'), "{}").critique
    assert "'age' is a required property" in critique
    assert "no one JSON object" in grade(item(schema, '{"age": 3}'), "three").critique


def test_a_schema_may_refer_to_its_own_parts() -> None:
    schema = '{"$defs": {"n": {"type": "integer"}}, "properties": {"a": {"$ref": "#/$defs/n"}}}'
    grader = graders.complete(f"json-schema:{schema}")
    assert right(grader, '{"a": 1}', '{"a": 2}') and not right(grader, '{"a": 1}', '{"a": "2"}')


def test_a_critique_lists_the_labels() -> None:
    critique = grade(item(MOOD, "good"), "fine").critique
    assert critique == (
        "The reply must name exactly one of good, bad, very bad, mixed; the right answer is 'good'."
    )


@pytest.mark.parametrize(
    ("grader", "says"),
    [
        ("fuzzy", "unknown grader 'fuzzy'; choose from auto, exact"),
        ("number:2", "grader number takes no argument '2'"),
        ("regex", "takes a pattern"),
        ("regex:[", "is no pattern"),
        ("json-schema:nowhere.json", "cannot read 'nowhere.json'"),
        ("json-schema:{", "is not JSON"),
        ('json-schema:{"type": "objekt"}', "is not valid"),
        ('json-schema:{"$ref": "http://127.0.0.1/x"}', "'http://127.0.0.1/x' is not in the schema"),
        ('json-schema:{"$ref": "#/$defs/x"}', "'#/$defs/x' is not in the schema"),
        ('json-schema:{"pattern": "["}', "is not a 'regex'"),
    ],
)
def test_a_wrong_grader_gets_one_sentence(grader: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        graders.complete(grader)
    assert says in str(error.value)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


def test_a_schema_goes_into_the_settings_with_its_content(tmp_path) -> None:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(json.loads(SCHEMA), indent=2))
    complete = graders.complete(f"json-schema:{path}")
    assert complete == graders.complete(complete) != f"json-schema:{path}"
    assert right(complete, '{"age": 3}', '{"age": 4}')


def test_the_grader_follows_the_answers() -> None:
    free = graders.choose(["Ann", "Ben", "7", "007", PERSON, "[note]"])
    assert [free(answer) for answer in ("Ann", "7", "007", PERSON, "[note]")] == [
        "contains",
        "number",
        "contains",
        "json",
        "contains",
    ]
    recurring = graders.choose(["yes", "no", "Yes", "no", "yes", "no", "3"])
    assert recurring("yes") == "labels:yes|no" and recurring("3") == "number"
    assert graders.choose(["yes"] * 9)("yes") == "contains"


NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=20).map(str.strip)


@given(NAMES.filter(bool))
def test_an_answer_is_right_by_its_own_grader_and_folding_twice_changes_nothing(name: str) -> None:
    folded = graders.fold(name)
    assert graders.fold(folded) == folded
    assert graders.bare(graders.bare(folded)) == graders.bare(folded)
    for grader in (graders.choose([name])(name), "exact"):
        assert graders.grade(item(grader, name), name) == (True, True)


REPLIES = st.one_of(
    st.text(max_size=60),
    st.lists(
        st.sampled_from(["good", " or ", "5", "{", "}", '"', PERSON, "かき", "-"]), max_size=6
    ),
)


@given(REPLIES.map("".join), st.sampled_from(["contains", "exact", "number", "json", MOOD]))
def test_any_reply_is_judged(reply: str, grader: str) -> None:
    answer = {"number": "5", "json": PERSON, MOOD: "good"}.get(grader, "かき")
    reward = grade(item(grader, answer), reply)
    assert (reward.critique == "") == (reward.value == 1)
    assert reward.parts["content_strict"] <= reward.parts["content"]


def test_a_number_is_not_read_out_of_an_answer_that_is_none() -> None:
    """It ended in a traceback of decimal."""
    for answer in ("Person 73", "7 of 9", "seven"):
        assert graders.grade(item("number", answer), answer) == (False, False)
