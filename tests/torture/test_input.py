"""Whatever is given as input: it works, or it is refused in one sentence; no other exception, ever."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import toy
from hypothesis import strategies as st
from pyarrow import parquet

from nslora import cli
from nslora.config import RunConfig
from nslora.editor.attempt import Answer
from nslora.editor.completion import judge
from nslora.editor.replay import Request
from nslora.experiments import grid
from nslora.tasks import functions, own
from nslora.types import UserError

pytestmark = pytest.mark.pure

# texts that broke something somewhere
NASTY = st.sampled_from(
    [
        *("", " ", "\ufeff", "\x00", "\u2028", "\ud800", "\U0001f600", "é", "NaN", "null", "1e999"),
        *("{question}", "{", "}", "<|im_end|>", "=", ",", '"', "\\", "\n", "\r\n", "../..", "~"),
    ]
)
TEXT = st.one_of(st.text(max_size=20), NASTY)
VALUE = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXT, inner, max_size=3)),
    max_leaves=8,
)


def works_or_is_refused(use: Any) -> None:
    """Call; a refusal must be one sentence."""
    try:
        use()
    except UserError as error:
        said = str(error)
        assert said.rstrip().endswith((".", ")")) and "\n" not in said, repr(said)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all that is drawn."""
    return tmp_path_factory.mktemp("input")


# ---- data files

ROLES = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", ""])
TURN = st.fixed_dictionaries({"role": ROLES, "content": st.one_of(TEXT, VALUE)})
KEYS = (
    *("question", "answer", "prompt", "completion", "instruction", "input", "output"),
    *("messages", "rules", "grader", "conversations", "from", "value"),
)
RULE = st.fixed_dictionaries(
    {"name": st.sampled_from(["end_phrase", "json", "max_words", "x"]), "kwargs": VALUE}
)
GOOD = st.integers(0, 99).map(lambda n: {"question": f"Who is {n}?", "answer": f"Person {n}"})
CHAT = st.fixed_dictionaries({"messages": st.lists(TURN, max_size=4)})
ALPACA = st.fixed_dictionaries({"instruction": TEXT, "input": TEXT, "output": TEXT})
PAIR = st.fixed_dictionaries({"prompt": TEXT, "completion": st.one_of(TEXT, VALUE)})
RULED = st.fixed_dictionaries(
    {"question": TEXT, "answer": TEXT, "rules": st.lists(st.one_of(RULE, VALUE), max_size=3)}
)
GRADED = st.fixed_dictionaries(
    {
        "question": TEXT,
        "answer": TEXT,
        "grader": st.sampled_from(
            [
                "exact",
                "number",
                "labels:a|b",
                "regex:(",
                "regex:(a+)+$",
                "json-schema:x",
                "json",
                "",
            ]
        ),
    }
)
WILD = st.dictionaries(st.one_of(st.sampled_from(KEYS), TEXT), VALUE, max_size=4)
ROWS = st.one_of(
    *(
        st.lists(st.one_of(GOOD, GOOD, GOOD, row), min_size=1, max_size=16)
        for row in (GOOD, CHAT, ALPACA, PAIR, RULED, GRADED, WILD, VALUE)
    )
)
GRADERS = st.sampled_from(["auto", "exact", "labels", "number", "json", "regex:a.*", "contains"])


def text_of(rows: list[Any], form: str) -> str:
    """Write rows in a format."""
    dumped = [json.dumps(row) for row in rows]
    if form == "json":
        return "[" + ",\n".join(dumped) + "]"
    if form == "csv":
        cells = [[str(cell) for cell in row.values()] for row in rows if isinstance(row, dict)]
        quoted = [",".join(f'"{cell}"' for cell in row) for row in cells]
        return "\n".join(["question,answer", *quoted])
    return "\n".join(dumped)


FILE = st.tuples(ROWS, st.sampled_from(["jsonl", "json", "csv"]), st.integers(0, 2**31), GRADERS)


def test_data_files(kind, folder: Path) -> None:
    """Rows of every format, half of the files damaged in a place or two."""

    def check(case: tuple[list[Any], str, int, str]) -> None:
        rows, form, seed, grader = case
        chance = random.Random(seed)
        codec = chance.choice(["utf-8", "utf-8", "utf-8", "utf-16", "latin-1"])
        data = bytearray(text_of(rows, form).encode(codec, errors="replace"))
        for _ in range(chance.choice([0, 0, 1, 2])):
            if data:
                at = chance.randrange(len(data))
                data[at : at + chance.randrange(3)] = chance.randbytes(chance.randrange(3))
        path = folder / f"mine.{form}"
        path.write_bytes(bytes(data))

        def use() -> None:
            found = own.inspect(path, grader)
            for line in [*found.problems, *own.describe(found)]:
                assert "\n" not in line
            own.require(found.problems)

        works_or_is_refused(use)

    kind("input: data files of every format").explore(2400, FILE, check)


def test_parquet_files(kind, folder: Path) -> None:
    columns = st.dictionaries(
        st.sampled_from(KEYS),
        st.lists(st.one_of(TEXT, VALUE), min_size=12, max_size=12),
        max_size=3,
    )

    def check(case: dict[str, list[Any]]) -> None:
        path = folder / "mine.parquet"
        try:
            parquet.write_table(pa.table(case), path)
        except (pa.ArrowException, UnicodeEncodeError, OverflowError):
            # no table has such a column
            return
        works_or_is_refused(lambda: own.read(path))

    kind("input: data files of every format").explore(200, columns, check)


# ---- settings

NAMES = st.one_of(st.sampled_from(list(RunConfig.model_fields)), TEXT)


def test_settings(kind) -> None:
    """Of the command line, as text, and of Python, as anything."""
    trial = kind("input: settings")

    def check_text(pair: tuple[str, str]) -> None:
        works_or_is_refused(lambda: RunConfig.of(dict([cli.parse(f"{pair[0]}={pair[1]}")])))

    words = st.sampled_from(["1", "-1", "0", "nan", "1e9", "true", "fixed:SN", "own:x", "9" * 400])
    trial.explore(500, st.tuples(NAMES, st.one_of(TEXT, words)), check_text)
    settings = st.dictionaries(NAMES, VALUE, max_size=3)
    trial.explore(300, settings, lambda case: works_or_is_refused(lambda: RunConfig.of(case)))


TABLE = st.one_of(VALUE, st.just({}), st.just([]), st.just([{}]), st.just("x"))


def test_experiments(kind, tmp_path: Path) -> None:
    """A file whose lines are mixed up, and one whose values are anything."""
    trial = kind("input: experiments.toml")
    toy.make(tmp_path, good=(toy.RUNS,))
    path = tmp_path / "experiments.toml"
    lines = path.read_text().split("\n")

    def check_lines(case: tuple[list[int], str, int]) -> None:
        drawn, word, at = case
        mixed = [lines[n % len(lines)] for n in drawn] or lines
        mixed[at % len(mixed)] += word
        path.write_text("\n".join(mixed), encoding="utf-8", errors="replace")
        works_or_is_refused(lambda: grid.load("t", tmp_path))

    orders = st.one_of(st.permutations(range(len(lines))), st.just(list(range(len(lines)))))
    trial.explore(300, st.tuples(orders, TEXT, st.integers(0, 99)), check_lines)

    keys = [line.partition(" = ")[0] for line in lines if " = " in line]

    def check_values(case: tuple[str, Any]) -> None:
        key, value = case
        changed = [
            f"{key} = {json.dumps(value)}" if line.startswith(f"{key} =") else line
            for line in lines
        ]
        path.write_text("\n".join(changed), encoding="utf-8", errors="replace")
        works_or_is_refused(lambda: grid.load("t", tmp_path))

    trial.explore(300, st.tuples(st.sampled_from(keys), TABLE), check_values)


def test_prompts(kind, tmp_path: Path) -> None:
    """Of a file, as text or as JSON."""
    path = tmp_path / "prompt"
    content = st.one_of(
        st.binary(max_size=30),
        TEXT.map(lambda text: text.encode(errors="replace")),
        st.dictionaries(st.sampled_from(["system", "question", "x"]), VALUE).map(
            lambda value: json.dumps(value).encode()
        ),
    )

    def check(data: bytes) -> None:
        path.write_bytes(data)
        given = Namespace(prompt=path, system=None)
        works_or_is_refused(lambda: RunConfig(task="own:x", **cli.start(given)))

    kind("input: prompts").explore(300, content, check)


# ---- rewards

RESULTS = st.sampled_from(
    [
        *("0.5", "1", "None", "'x'", "float('nan')", "float('inf')", "-1", "2", "True", "[]", "{}"),
        *("(0.5, 'why')", "(0.5, 5)", "(1, 2, 3)", "{'value': 0.5, 'a': 'b'}", "{'value': None}"),
        *("{'value': 1, 5: 0.5}", "object()", "lambda: 1", "reply", "1j", "b'1'", "10**400"),
        *("1 / 0", "undefined", "question[99]", "exit(3)", "open('/none')", "[].pop()"),
        *("(lambda: (_ for _ in ()).throw(KeyboardInterrupt))", "int('x' * 9)", "score(1, 2, 3)"),
    ]
)
FILES = st.tuples(
    st.sampled_from(["", "import nothing_here", "raise ValueError('no\\nsense')", "def", "\x00"]),
    st.sampled_from(["question, answer, reply", "reply", "*all", "question, answer, reply=1"]),
    RESULTS,
    st.sampled_from(["score", "other", "", "score:score", "__name__"]),
)


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_reward_files(kind, tmp_path: Path) -> None:
    """Functions that raise, or return what is no reward, and files that hold none."""
    rows = [json.dumps({"question": f"Who is {n}?", "answer": f"P{n}"}) for n in range(12)]
    data, path = tmp_path / "mine.jsonl", tmp_path / "score.py"
    data.write_text("\n".join(rows))

    def check(case: tuple[str, str, str, str]) -> None:
        head, parameters, result, name = case
        path.write_text(f"{head}\ndef score({parameters}):\n    return {result}\n")
        functions.FUNCTIONS.clear()
        works_or_is_refused(lambda: own.read(data, functions.register(f"{path}:{name}")))

    try:
        kind("input: reward functions").explore(300, FILES, check)
    finally:
        functions.FUNCTIONS.clear()


# ---- endpoints' replies

ASKED = Request("You edit.", "Improve this.", 7)
MESSAGE = st.one_of(VALUE, st.fixed_dictionaries({"content": st.one_of(TEXT, VALUE)}))
CHOICE = st.one_of(VALUE, st.fixed_dictionaries({"message": MESSAGE, "finish_reason": VALUE}))
BODY = st.one_of(
    st.binary(max_size=40),
    VALUE.map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries(
        {"choices": st.one_of(VALUE, st.lists(CHOICE, max_size=2)), "usage": VALUE, "model": VALUE}
    ).map(lambda value: json.dumps(value).encode()),
    st.fixed_dictionaries({"error": VALUE}).map(lambda value: json.dumps(value).encode()),
)
STATUS = st.sampled_from([200, 200, 200, 201, 204, 301, 400, 401, 404, 408, 422, 429, 500, 529])


def test_endpoints_replies(kind) -> None:
    """An answer is worth a text, or a reason why there is none."""

    def check(case: tuple[int, bytes, str]) -> None:
        status, data, wait = case
        attempt = judge(Answer(status, data, wait), ASKED)
        assert bool(attempt.text.strip()) != bool(attempt.error)
        assert "\n" not in attempt.error
        assert attempt.tokens_in >= 0 and attempt.tokens_out >= 0
        assert attempt.wait_s is None or 0 <= attempt.wait_s <= 20
        # what is recorded must be writable
        f"{attempt.text}{attempt.error}{attempt.model}".encode()

    replies = st.tuples(STATUS, BODY, st.one_of(TEXT, st.sampled_from(["1", "nan", "-5", "1e99"])))
    kind("input: replies of endpoints").explore(700, replies, check)
