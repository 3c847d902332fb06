"""Own data: files as people have them, every problem by its line, and what a run makes of the rest."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nslora.tasks import own, rules
from nslora.tasks.grading import grade
from nslora.tasks.own import Data, describe, inspect, splits
from nslora.types import Item, Need, UserError

pytestmark = pytest.mark.pure

ROWS = [{"question": f"Who is number {n}?", "answer": f"Person {n}"} for n in range(1, 13)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all that hypothesis tries."""
    return tmp_path_factory.mktemp("data")


def lines(rows: list) -> str:
    """JSON lines: a text is a line as it stands."""
    return "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)


def put(folder: Path, content: str | bytes, name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def looked_at(folder: Path, rows: list, **options: Any) -> Data:
    return inspect(put(folder, lines(rows)), **options)


def read(path: Path, **options: str) -> list[Item]:
    return own.read(path, **options).items


def pairs(items: list) -> list[tuple[str, str]]:
    return [(item.example.question, item.example.answer) for item in items]


PAIRS = [(row["question"], row["answer"]) for row in ROWS]

# ---- formats


def as_csv(delimiter: str, *header: str) -> str:
    rows = [delimiter.join(header or ("question", "answer"))]
    rows += [f'"{question}"{delimiter}{answer}' for question, answer in PAIRS]
    return "\r\n".join(rows) + "\r\n"


def chat(question: str, answer: str, **names: str) -> dict:
    role, content, who, model = names.get("style", "role content user assistant").split()
    return {
        names.get("column", "messages"): [
            {role: "system", content: "Be brief."},
            {role: who, content: question},
            {role: model, content: answer},
        ]
    }


def with_prompt(question: str, answer: str) -> dict:
    return {
        "prompt": [{"role": "user", "content": question}],
        "completion": [{"role": "assistant", "content": [{"type": "text", "text": answer}]}],
    }


FILES = {
    "lines.jsonl": lines(ROWS),
    "blank lines.jsonl": "\n\n" + lines(ROWS).replace("\n", "\n \n"),
    "crlf.jsonl": lines(ROWS).replace("\n", "\r\n"),
    "array.json": json.dumps(ROWS, indent=2),
    "array in one line.jsonl": json.dumps(ROWS),
    "lines.txt": lines(ROWS),
    "comma.csv": as_csv(","),
    "semicolon.csv": as_csv(";", "Question", " ANSWER "),
    "tab.tsv": as_csv("\t"),
    "prompt.jsonl": lines([{"prompt": q, "completion": a} for q, a in PAIRS]),
    "response.jsonl": lines([{"prompt": q, "response": a} for q, a in PAIRS]),
    "alpaca.json": json.dumps([{"instruction": q, "input": "", "output": a} for q, a in PAIRS]),
    "no input.jsonl": lines([{"instruction": q, "output": a} for q, a in PAIRS]),
    "messages.jsonl": lines([chat(q, a) for q, a in PAIRS]),
    "sharegpt.jsonl": lines(
        [chat(q, a, column="conversations", style="from value human gpt") for q, a in PAIRS]
    ),
    "conversational prompt.jsonl": lines([with_prompt(q, a) for q, a in PAIRS]),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
def test_files_are_read_as_people_have_them(tmp_path: Path, name: str, encoding: str) -> None:
    data = inspect(put(tmp_path, FILES[name].encode(encoding), name))
    assert data.problems == []
    assert pairs(data.items) == PAIRS


def test_parquet_is_read_with_its_types(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    asked = {"name": "end_phrase", "kwargs": {"phrase": "Over.", "n": None}}
    short = {"name": "max_words", "kwargs": {"phrase": None, "n": 3}}
    rows: list[dict] = [row | {"rules": None, "grader": None} for row in ROWS]
    rows[4] = {"question": "Five?", "answer": "5", "rules": [asked, short], "grader": "exact"}
    path = tmp_path / "mine.parquet"
    parquet.write_table(Table.from_pylist(rows), path)
    data = inspect(path)
    assert data.problems == [] and data.unit == "row"
    assert pairs(data.items) == [*PAIRS[:4], ("Five?", "5"), *PAIRS[5:]]
    hidden = data.items[4].hidden
    assert hidden.rules == (rules.make("end_phrase", {"phrase": "Over."}), rules.make("max_words"))
    assert hidden.grader == "own:exact"

    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match=r"cannot read .* as Parquet: .*\."):
        inspect(path)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    odd = "one\u2028two\u2029three\u0085four"
    rows = [
        json.dumps(row | {"answer": f"{odd} {i}"}, ensure_ascii=False) for i, row in enumerate(ROWS)
    ]
    data = inspect(put(tmp_path, lines([*rows[:8], "{oops", *rows[8:]])))
    assert len(data.items) == 12 and "three\u0085four" in data.items[0].example.answer
    [problem] = data.problems
    assert ", line 9: not valid JSON" in problem


def test_joined_files_have_a_mark_at_the_seam(tmp_path: Path) -> None:
    halves = [f"\ufeff{lines(part)}\n" for part in (ROWS[:6], ROWS[6:])]
    assert pairs(read(put(tmp_path, "".join(halves)))) == PAIRS


def test_another_encoding_is_named_with_its_line_and_the_remedy(tmp_path: Path) -> None:
    rows = [
        *ROWS[:6],
        {"question": "Wo liegt die Tür?", "answer": "in der Küche, natürlich"},
        *ROWS[6:],
    ]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    with pytest.raises(UserError) as error:
        inspect(put(tmp_path, text.encode("cp1252")))
    assert "mine.jsonl, line 7: byte 0xfc is not UTF-8" in str(error.value)
    assert "save it as UTF-8 (iconv -f " in str(error.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"PK\x03\x04rest", "is a zip or a spreadsheet; save its table as CSV."),
        (b"\x1f\x8brest", "is compressed; unpack it first."),
        (b"", "has 0 questions; at least 10 are needed."),
        (lines(ROWS[:9]).encode(), "has 9 questions; at least 10 are needed."),
        (b"\xff\xfe\x00", "is not UTF-16-LE"),
        (json.dumps({"data": ROWS}, indent=1).encode(), "an object goes over several lines"),
    ],
)
def test_a_file_that_is_no_table_gets_one_sentence(
    tmp_path: Path, content: bytes, says: str
) -> None:
    with pytest.raises(UserError) as error:
        read(put(tmp_path, content))
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "line", "says"),
    [
        (
            "a.csv",
            as_csv(",").replace("Person 4", "Person 4, Esq."),
            5,
            "3 cells where the header has 2",
        ),
        ("b.csv", as_csv(",").replace(",Person 4", ""), 5, "1 cells where the header has 2"),
        ("c.csv", as_csv(",").replace(",Person 4", ',"Person 4'), 5, "close its quotation marks"),
        ("d.csv", as_csv(",").replace(",Person 4", ","), 5, "answer is empty"),
        ("e.csv", as_csv(",").replace("number 3?", "number\n3?") + "x", 15, "1 cells"),
        (
            "f.json",
            json.dumps(ROWS, indent=0).replace('"Person 4"', "Person 4"),
            14,
            "line 16, column",
        ),
        ("g.json", json.dumps(ROWS, indent=0)[:-2] + ",]", 49, "not valid JSON"),
        ("h.json", json.dumps(ROWS, indent=0)[:-1], 50, "the end of the array is missing"),
        ("i.json", json.dumps([*ROWS, 7], indent=0), 50, "a row must be an object"),
    ],
)
def test_problems_of_a_format_have_their_line(
    tmp_path: Path, name: str, content: str, line: int, says: str
) -> None:
    data = inspect(put(tmp_path, content, name))
    assert [p for p in data.problems if f", line {line}: " in p and says in p], data.problems


def test_text_in_a_table_stays_text(tmp_path: Path) -> None:
    rows = [f'"Room {n}, key ""{n}""?",00{n}' for n in range(10)]
    items = read(put(tmp_path, "\n".join(["question,answer", *rows]), "mine.csv"))
    assert pairs(items)[7] == ('Room 7, key "7"?', "007")
    assert grade(items[7], "007").success == 1 and grade(items[7], "7").success == 0


SEEDS = st.sampled_from(
    [text.encode(code) for text in FILES.values() for code in ("utf-8", "utf-16")]
)
CUTS = st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=3), st.integers(0, 9)), max_size=4)


@given(st.one_of(st.binary(max_size=60), SEEDS), CUTS, st.sampled_from(["a.jsonl", "a.csv", "a"]))
@settings(max_examples=150)
def test_a_damaged_file_is_read_or_refused(
    folder: Path, content: bytes, cuts: list, name: str
) -> None:
    for place, piece, removed in cuts:
        at = int(place * len(content))
        content = content[:at] + piece + content[at + removed :]
    try:
        data = inspect(put(folder, content, name))
        said = [*data.problems, *describe(data)]
    except UserError as error:
        data, said = None, [str(error)]
    assert all(line.endswith(".") and "\n" not in line for line in said)
    assert data is None or data.problems or len(data.items) >= own.MIN_ROWS


# ---- columns


def test_columns_can_have_other_names(tmp_path: Path) -> None:
    rows = [{"ask": q, "reply": a, "answer": "ignored"} for q, a in PAIRS]
    data = looked_at(tmp_path, rows, columns="question=ask, answer=reply")
    assert pairs(data.items) == PAIRS and data.problems == []
    rows[3].pop("reply")
    data = looked_at(tmp_path, rows, columns="question=ask,answer=reply")
    assert ", line 4: there is no column 'reply'; the columns are ask, answer." in data.problems[0]
    with pytest.raises(UserError, match="FIELD=COLUMN with FIELD one of question, answer"):
        inspect(tmp_path / "mine.jsonl", columns="ask=question")


def test_unknown_columns_and_null_rules_are_left_out_with_a_note(tmp_path: Path) -> None:
    rows = [row | {"note": None} for row in ROWS[:3]]
    rows += [row | {"rules": None, "grader": None, "id": 4} for row in ROWS[3:]]
    data = looked_at(tmp_path, rows)
    assert pairs(data.items) == PAIRS and data.problems == []
    assert data.remarks["column 'note' is left out"] == [1, 2, 3]
    assert "note: column 'id' is left out (9: lines 4, 5, 6, 7, 8 and 4 more)." in describe(data)


def test_a_system_message_is_left_out_with_a_note(tmp_path: Path) -> None:
    data = looked_at(tmp_path, [chat(q, a) for q, a in PAIRS])
    assert data.remarks == {"system messages are left out": list(range(1, 13))}


def test_an_alpaca_input_belongs_to_the_question(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Who?", "input": f"Case {n}", "output": a} for n, (_, a) in enumerate(PAIRS)
    ]
    assert pairs(read(put(tmp_path, lines(rows))))[0] == ("Who?\n\nCase 0", "Person 1")


# ---- rows

TURN = {"role": "user", "content": "Q?"}
REPLY = {"role": "assistant", "content": "x"}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{oops", "not valid JSON (Expecting property name"),
        ('{"question": "Q?", "answer": "x"} {}', "not valid JSON (more after column"),
        ("[" * 100_000, "not "),
        ("[1]", "a row must be an object"),
        ({"question": "Q?"}, "no question and answer among its columns (question)"),
        ({"question": "Q?", "anser": "x"}, "name them with --map"),
        ('{"question": "Q?", "answer": "x", "answer": "y"}', "'answer' comes twice"),
        ('{"question": "Q?", "answer": NaN}', "answer is NaN"),
        ('{"question": "Q?", "answer": -Infinity}', "answer is Infinity"),
        ('{"question": "Q?", "answer": 1e999}', "answer is Infinity"),
        ('{"question": "Q?", "answer": {"a": NaN}}', "an object with NaN"),
        ({"question": "Q?", "answer": None}, "answer is null; give one text"),
        ({"question": None, "answer": "x"}, "question is null"),
        ({"question": "Q?", "answer": ["x", "y"]}, "answer is a list"),
        ({"question": 3, "answer": "x"}, "question is a number"),
        ({"question": "Q?", "answer": " \n"}, "answer is empty"),
        ('{"question": "Q?", "answer": "a \\ud83d"}', "half a character (\\ud83d)"),
        ('{"question": "\\ude00?", "answer": "a"}', "half a character (\\ude00)"),
        ({"question": "Q?", "answer": "x", "rules": "json"}, "rules must be a list"),
        ({"question": "Q?", "answer": "x", "rules": {"name": "json"}}, "rules must be a list"),
        ({"question": "Q?", "answer": "x", "rules": [{"name": "rhyme"}]}, "unknown rule 'rhyme'"),
        (
            {"question": "Q?", "answer": "x", "rules": [{"name": "json", "kwargs": {"n": 1}}]},
            "no argument 'n'",
        ),
        (
            {"question": "Q?", "answer": "x", "rules": [{"name": "json", "kwargs": 3}]},
            "arguments of a rule",
        ),
        (
            {
                "question": "Q?",
                "answer": "x",
                "rules": [{"name": "upper_case"}, {"name": "lower_case"}],
            },
            "rules lower_case and upper_case exclude each other",
        ),
        (
            {
                "question": "Q?",
                "answer": "the old north shed",
                "rules": [{"name": "max_words", "kwargs": {"n": 3}}],
            },
            "the answer has 4 words and its rule allows 3",
        ),
        ({"question": "Q?", "answer": "x", "grader": "fuzzy"}, "unknown grader 'fuzzy'"),
        ({"question": "Q?", "answer": "x", "grader": 3}, "grader must be text"),
        ({"question": "Q?", "answer": "x", "grader": "labels"}, "must name its labels"),
        ({"question": "Q?", "answer": "x", "grader": "number"}, "fails its own grader (number)"),
        ({"question": "Q?", "answer": "x", "grader": "regex:[0-9]"}, "fails its own grader"),
        ({"question": "Q?", "answer": "x", "grader": "labels:y|z"}, "fails its own grader"),
        (
            {"question": "Q?", "answer": "x", "rules": [{"name": "json"}, {"name": "json"}]},
            "a rule comes twice",
        ),
        ({"messages": [TURN]}, "one of the user and one of the assistant, not of user;"),
        ({"messages": [TURN, REPLY, TURN, REPLY]}, "split a longer chat into rows"),
        ({"messages": "Q?"}, "messages must be a list"),
        ({"messages": [TURN, REPLY | {"content": None}]}, "answer is null"),
        (
            {"messages": [TURN | {"content": [{"type": "image"}]}, REPLY]},
            "messages must be of text",
        ),
        (
            {"question": "Who is number 2?", "answer": "Somebody"},
            "repeats the question of line 2 with another answer ('Somebody', there 'Person 2')",
        ),
        (
            ROWS[1] | {"rules": [{"name": "json"}]},
            "repeats the question of line 2 with other rules",
        ),
    ],
)
def test_a_bad_row_is_refused_by_its_line(tmp_path: Path, row: object, says: str) -> None:
    path = put(tmp_path, lines([*ROWS[:3], row, *ROWS[3:]]))
    data = inspect(path)
    [problem] = data.problems
    assert problem.startswith(f"{path}, line 4: ") and says in problem
    assert problem.endswith(".") and "\n" not in problem
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value) == problem


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    bad = ["{oops", {"question": "Q?", "answer": None}, {"question": "R?", "answer": []}]
    data = looked_at(tmp_path, [bad[0], *ROWS, *bad[1:]])
    assert [re.findall(r"line (\d+): ", problem) for problem in data.problems] == [
        ["1"],
        ["14"],
        ["15"],
    ]
    with pytest.raises(UserError, match=r"line 1: .* \(2 more: see nslora check\)\.$"):
        own.require(data.problems)


def test_equal_problems_are_one_sentence(tmp_path: Path) -> None:
    data = inspect(put(tmp_path, as_csv(",", "ask", "reply"), "mine.csv"))
    [problem] = data.problems
    assert "mine.csv, lines 2, 3, 4, 5, 6 and 7 more: no question and answer" in problem


def test_other_kinds_of_values_become_text(tmp_path: Path) -> None:
    values = [10**400, 4.5, True, {"name": "Ann", "born": 1983}]
    rows = [{"question": f"Q{i}?", "answer": value} for i, value in enumerate(values)]
    items = read(put(tmp_path, lines([*rows, *ROWS])))
    texts = [str(10**400), "4.5", "true", '{"name": "Ann", "born": 1983}']
    assert [item.example.answer for item in items[:4]] == texts
    assert [item.hidden.grader for item in items[:4]] == [
        "own:number",
        "own:number",
        "own:contains",
        "own:json",
    ]


def test_blanks_around_texts_are_left_out_with_a_note(tmp_path: Path) -> None:
    padded = {"question": "  Where?\n", "answer": "\n the shed \n\n"}
    data = looked_at(tmp_path, [*ROWS, padded])
    assert pairs(data.items)[-1] == ("Where?", "the shed")
    assert data.remarks == {"blanks around a text are left out": [13]}


def test_repeats_are_left_out_and_counted(tmp_path: Path) -> None:
    again = {"question": "who is number 3", "answer": "Person 3"}
    data = looked_at(tmp_path, [*ROWS, ROWS[0], again, ROWS[0]])
    assert pairs(data.items) == PAIRS
    assert data.remarks == {"repeats of an earlier row are left out": [13, 14, 15]}
    assert any("(3: lines 13, 14 and 15)" in line for line in describe(data))


@pytest.mark.parametrize(
    "questions",
    [
        ("What is 8 + 2?", "What is 8 - 2?"),
        ("What is C?", "What is C++?"),
        ("かぎを英語で？", "かきを英語で？"),
        ("Is 'a' big?", "Is 'A' big?"),
        ("How much is 1.5 m?", "How much is 15 m?"),
    ],
)
def test_questions_that_differ_in_a_sign_are_two(
    tmp_path: Path, questions: tuple[str, str]
) -> None:
    rows = [{"question": q, "answer": f"it {i}"} for i, q in enumerate(questions)]
    data = looked_at(tmp_path, [*ROWS, *rows])
    assert data.problems == [] and len(data.items) == 14


def test_nearly_equal_questions_are_kept_with_a_note(tmp_path: Path) -> None:
    data = looked_at(tmp_path, [*ROWS, {"question": "who is NUMBER 2", "answer": "x"}])
    assert len(data.items) == 13
    assert data.remarks == {"nearly the question of line 2, with another answer": [13]}


def test_answers_that_count_as_equal_get_a_note(tmp_path: Path) -> None:
    answers = ("Co", "CO", "ano", "año")
    rows = [{"question": f"Question {n}?", "answer": a} for n, a in enumerate(answers)]
    data = looked_at(tmp_path, [*ROWS, *rows])
    [(remark, numbers)] = data.remarks.items()
    assert "count as equal, but with contains:case" in remark and numbers == [13, 14, 15, 16]
    assert looked_at(tmp_path, [*ROWS, *rows], grader="contains:case").remarks == {}


def test_a_doubtful_rule_gets_a_note(tmp_path: Path) -> None:
    row = {"question": "How many?", "answer": "10", "rules": [{"name": "lower_case"}]}
    data = looked_at(tmp_path, [*ROWS, row])
    assert data.remarks == {"the bare answer cannot be written to keep rule lower_case": [13]}


# ---- graders and splits

MOODS = ["good", "bad", "mixed"]
LABELLED = [{"question": f"Review {n}: how?", "answer": MOODS[n % 3]} for n in range(30)]


def test_recurring_answers_are_labels(tmp_path: Path) -> None:
    data = looked_at(tmp_path, LABELLED)
    assert {item.hidden.grader for item in data.items} == {"own:labels:good|bad|mixed"}
    assert own.label_set(data.items) == set(MOODS)
    said = describe(data)
    assert "answers are one of 3 labels: good (10), bad (10), mixed (10)." in said
    graded = "grader labels (30 rows): in line 1 the reply 'good' is right, 'bad or good' is wrong."
    assert graded in said


@pytest.mark.parametrize("seed", range(5))
def test_every_split_holds_every_label(tmp_path: Path, seed: int) -> None:
    rare = [{"question": f"Odd {n}?", "answer": "odd"} for n in range(5)]
    data = inspect(put(tmp_path, lines([*LABELLED, *rare])))
    items = data.items
    parts = splits(data, np.random.default_rng(seed))
    assert [len(part) for part in parts] == [21, 7, 7]
    assert sorted(pairs([i for part in parts for i in part])) == sorted(pairs(items))
    for part in parts:
        assert set(Counter(item.example.answer for item in part)) == {*MOODS, "odd"}


def test_a_rare_label_is_told(tmp_path: Path) -> None:
    rare = {"question": "Odd?", "answer": "odd"}
    assert "note: too rare to be in every split: odd." in describe(
        looked_at(tmp_path, [*LABELLED, rare])
    )


def test_a_grader_can_be_chosen_for_a_file_and_for_a_row(tmp_path: Path) -> None:
    rows = [*ROWS, {"question": "Code?", "answer": "ab-12", "grader": "regex:[a-z]+-[0-9]+"}]
    rows[3] = rows[3] | {"grader": "auto"}
    items = read(put(tmp_path, lines(rows)), grader="exact")
    assert {item.hidden.grader for item in items[:12]} == {"own:exact"}
    assert grade(items[12], "xy-99").success == 1
    labels = read(put(tmp_path, lines(ROWS)), grader="labels")
    assert grade(labels[0], "Person 1").success == 1
    assert grade(labels[0], "Person 1 or Person 2").success == 0
    many = [{"question": f"Q{n}?", "answer": f"name {n}"} for n in range(101)]
    assert "are of 101 kinds" in looked_at(tmp_path, many, grader="labels").problems[0]


def test_each_grader_is_shown_with_a_right_and_a_wrong_reply(tmp_path: Path) -> None:
    mixed = [
        {"question": "How many?", "answer": "4"},
        {"question": "As JSON?", "answer": '{"name": "Ann"}'},
    ]
    said = describe(looked_at(tmp_path, [*ROWS, *mixed]))
    assert "grader number (1 rows): in line 13 the reply '4' is right, 'Person 1' is wrong." in said
    assert [line for line in said if line.startswith("grader json (1 rows): in line 14")]


def test_long_answers_are_told_of(tmp_path: Path) -> None:
    rows = [{"question": q, "answer": f"{a} {'went on and on ' * 20}"} for q, a in PAIRS]
    assert any("must hold the whole text" in line for line in describe(looked_at(tmp_path, rows)))


def test_items_are_as_tasks_want_them(tmp_path: Path) -> None:
    row = {"question": "2 + 2?", "answer": 4, "rules": [{"name": "json"}]}
    item = read(put(tmp_path, lines([*ROWS, "", row])))[-1]
    assert (item.example.id, item.example.fact, item.hidden.group) == (
        "own:14",
        "line:14",
        "line:14",
    )
    assert item.hidden.need is Need.BOTH and item.hidden.rules == (rules.make("json"),)


# ---- rows of their own to test on


def with_test(folder: Path, rows: list, **options: Any) -> Data:
    path = put(folder, lines(rows), "test.jsonl")
    return inspect(put(folder, lines(LABELLED)), test=str(path), **options)


def test_a_file_of_its_own_is_tested_on_and_graded_as_the_rest(tmp_path: Path) -> None:
    """Three rows alone would not show that answers are labels."""
    data = with_test(tmp_path, [{"question": f"New {n}?", "answer": "good"} for n in range(3)])
    assert data.problems == []
    train, dev, test = splits(data, np.random.default_rng(0))
    assert (len(train), len(dev)) == (22, 8)
    assert [item.example.question for item in test] == ["New 0?", "New 1?", "New 2?"]
    assert {item.hidden.grader for item in test} == {item.hidden.grader for item in train}
    assert len({item.example.id for item in (*train, *dev, *test)}) == 33
    path = tmp_path / "test.jsonl"
    assert f"30 rows: 22 to train on, 8 to choose by, 3 of {path} to test on." in describe(data)


def test_problems_of_the_test_file_have_its_name_and_lines(tmp_path: Path) -> None:
    known = LABELLED[4] | {"question": LABELLED[4]["question"].upper()}
    data = with_test(tmp_path, [known, "{oops", {"question": "New?", "answer": "fine"}])
    path = tmp_path / "test.jsonl"
    leak, damaged, foreign = data.problems
    assert leak == (
        f"{path}, line 1: the question is in {tmp_path / 'mine.jsonl'}, line 5, too; "
        "keep one of them."
    )
    assert damaged.startswith(f"{path}, line 2: ")
    assert foreign.startswith(f"{path}, line 3: the answer 'fine' fails its own grader (labels:")
    few = with_test(tmp_path, [{"question": "New?", "answer": "good"}])
    assert few.problems == [f"{path}: has 1 questions; at least 2 are needed."]


def test_a_file_of_300_rows_is_checked_in_no_time(tmp_path: Path) -> None:
    rows = [{"question": f"Where is tool {n}?", "answer": f"in shed {n}"} for n in range(300)]
    looked_at(tmp_path, ROWS)
    started = time.process_time()
    describe(looked_at(tmp_path, rows))
    assert time.process_time() - started < 1
