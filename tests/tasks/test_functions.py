"""Somebody's own reward function: what it may return, what is refused, and that it is called once."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from nslora.config import RunConfig
from nslora.tasks import functions, own
from nslora.tasks.build import build
from nslora.types import Example, UserError

pytestmark = pytest.mark.pure

EXAMPLE = Example("own:3", "Who?", "Ann Lee")


def returning(result: object) -> functions.Function:
    """A registered function that returns the same for every reply."""

    def reward(question: str, answer: str, reply: str) -> object:
        return result

    return functions.find(functions.register(reward).removeprefix("function:"))


def put(folder: Path, *rows: dict) -> Path:
    path = folder / "mine.jsonl"
    rows = rows or tuple({"question": f"Q{n}?", "answer": f"a{n}"} for n in range(10))
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize("value", [0, 1, 0.25, True, np.float32(0.5), np.True_])
def test_a_number_is_the_reward(value) -> None:
    reward = returning(value)(EXAMPLE, "Bob")
    assert reward.value == float(value)
    assert ("Ann Lee" in reward.critique) == (value < 1)


def test_a_critique_and_parts_may_come_with_it() -> None:
    assert returning((0.5, "too long"))(EXAMPLE, "x").critique == "too long"
    given = returning({"value": 0.5, "critique": "rude", "tone": 0.1, "facts": 1})(EXAMPLE, "x")
    assert (given.value, given.critique) == (0.5, "rude")
    assert given.parts == {"tone": 0.1, "facts": 1.0}


@pytest.mark.parametrize(
    ("result", "shown"),
    [
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-0.1, "-0.1"),
        (1.5, "1.5"),
        (None, "None"),
        ("1", "'1'"),
        ([1], "[1]"),
        ((1, 2), "(1, 2)"),
        ((1, "fine", 3), "(1, 'fine', 3)"),
        ({"critique": "no value"}, "(None, 'no value')"),
        ({"value": 1, "tone": "good"}, "the part 'tone' as 'good'"),
        ({"value": 1, "tone": 7}, "the part 'tone' as 7"),
    ],
)
def test_nonsense_is_named_with_the_reply(result, shown) -> None:
    with pytest.raises(UserError) as error:
        returning(result)(EXAMPLE, "My reply " * 20)
    said = str(error.value)
    assert f"returned {shown} for the reply 'My reply" in said
    assert said.endswith(".") and "\n" not in said and len(said) < 300


def test_a_function_is_called_once_for_each_row_and_reply() -> None:
    seen: list[str] = []

    def reward(question: str, answer: str, reply: str) -> float:
        seen.append(reply)
        return len(seen) / 10

    grader = functions.register(reward)
    function = functions.find(grader.removeprefix("function:"))
    values = [function(EXAMPLE, reply).value for reply in ("x", "y", "x")]
    assert (values, seen) == ([0.1, 0.2, 0.1], ["x", "y"])
    assert function.costs == {"reward_calls": 2}
    # another run calls it anew
    assert functions.register(reward) == grader
    again = functions.of(grader)
    assert again and again.costs == {"reward_calls": 0}
    assert functions.of("exact") is None


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("def score(q, a, r): return {}[r]", "raised KeyError"),
        ("def score(q, a): return 1", "raised TypeError"),
        ("import sys\ndef score(q, a, r): sys.exit(0)", "raised SystemExit (0)"),
        ("def score(q, a, r): return float('nan')", "returned nan"),
        ("score = 7", "has no function 'score'"),
        ("def score(q, a, r) return 1", "raised SyntaxError"),
        ("import sys\nsys.exit(0)", "raised SystemExit (0)"),
        ("import no_such_module", "raised ModuleNotFoundError"),
    ],
)
def test_what_the_gold_answers_break_is_refused_with_their_rows(tmp_path, source, says) -> None:
    path = tmp_path / "score.py"
    path.write_text(source)
    with pytest.raises(UserError) as error:
        own.read(put(tmp_path), grader=functions.register(f"{path}:score"))
    assert says in str(error.value) and "\n" not in str(error.value)
    if "def score(q, a" in source and "SyntaxError" not in says:
        assert f"{tmp_path / 'mine.jsonl'}, line 1: reward score.py:score " in str(error.value)
        assert str(error.value).endswith(" (9 more: see nslora check).")


def test_a_reply_that_breaks_it_later_is_named_with_its_row(tmp_path: Path) -> None:
    path = tmp_path / "score.py"
    path.write_text("def score(q, a, r): return 1 / len(r)")
    cfg = RunConfig(task=f"own:{put(tmp_path)}", grader=functions.register(f"{path}:score"))
    task = build(cfg)
    example = next(e for e in (*task.train, *task.dev, *task.test) if e.question == "Q3?")
    with pytest.raises(UserError, match=r"line 4: reward score.py:score raised ZeroDivisionError"):
        task.reward(example, "")


def test_it_is_the_reward_of_a_task_and_rules_stay_rules(tmp_path: Path) -> None:
    path = tmp_path / "score.py"
    path.write_text("def score(q, a, r): return 0.5, 'halfway'")
    rows: list[dict] = [{"question": f"Q{n}?", "answer": f"a{n}"} for n in range(9)]
    rows.append({"question": "Q9?", "answer": "a9", "rules": [{"name": "upper_case"}]})
    data = own.read(put(tmp_path, *rows), grader=functions.register(f"{path}:score"))
    plain, ruled = own.reward(data.items[0], "x"), own.reward(data.items[9], "x")
    assert (plain.value, plain.critique) == (0.5, "halfway")
    assert ruled.value == 0.25 and ruled.critique.startswith("halfway ")
    assert own.reward(data.items[9], "X").value == 0.75
    said = own.describe(data)
    assert "reward score.py:score (10 rows): in line 1 the answer 'a0' earns 0.50." in said


def test_a_gold_answer_may_earn_nothing(tmp_path: Path) -> None:
    """Another form is asked for then."""
    path = tmp_path / "score.py"
    path.write_text("def score(q, a, r): return r.startswith('Dear')")
    data = own.read(put(tmp_path), grader=functions.register(f"{path}:score"))
    assert data.remarks["the bare answer earns nothing from the reward"] == [*range(1, 11)]


def test_the_source_is_the_identity(tmp_path: Path) -> None:
    first, copy = tmp_path / "score.py", tmp_path / "elsewhere" / "score.py"
    copy.parent.mkdir()
    for path in (first, copy):
        path.write_text("LEAST = 1\ndef score(q, a, r): return LEAST\ndef other(q, a, r): return 0")
    grader = functions.register(f"{first}:score")
    assert functions.register(f"{copy}:score") == grader != functions.register(f"{copy}:other")
    assert str(tmp_path) not in grader
    copy.write_text(copy.read_text().replace("LEAST = 1", "LEAST = 0"))
    assert functions.register(f"{copy}:score") != grader


def test_a_file_may_import_its_neighbour(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    (tmp_path / "neighbour_of_score.py").write_text("VALUE = 0.75")
    path = tmp_path / "score.py"
    path.write_text("import neighbour_of_score as n\ndef score(q, a, r): return n.VALUE")
    grader = functions.register(f"{path}:score")
    assert functions.find(grader.removeprefix("function:"))(EXAMPLE, "x").value == 0.75


@pytest.mark.parametrize("reward", [len, functools.partial(max, 1), 7])
def test_what_has_no_source_is_refused(reward) -> None:
    with pytest.raises(UserError, match="is no function with a source"):
        functions.register(reward)


def test_a_callable_object_is_known_by_its_class() -> None:
    class Judge:
        def __call__(self, question: str, answer: str, reply: str) -> float:
            return 0.5

    grader = functions.register(Judge())
    assert functions.find(grader.removeprefix("function:"))(EXAMPLE, "x").value == 0.5


def test_a_function_that_is_not_loaded_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="replies are graded by score.py:score: give it with"):
        own.inspect(put(tmp_path), grader="function:score.py:score:0123")
