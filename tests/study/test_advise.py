"""Advice: what was measured is what is said, and each verdict follows from its numbers."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faulty import KEY, completion, refusal, serving
from grown import toward, write_tree
from scripted import lowercase
from tinymodel import SETTINGS

import nslora
from nslora import cli
from nslora.config import METHODS, RunConfig
from nslora.editor.client import Request
from nslora.runs.plan import Plan
from nslora.runs.verdict import estimate
from nslora.study.advise import Advice, Expected, Trial, expected, others
from nslora.study.schedules import load
from nslora.study.stats import Interval
from nslora.types import Example, UserError

# of a call of the endpoint below
TOKENS = 59
GAINED = Trial(12, 0.2, 0.4, 0.4, 9.0, loss=(3.0, 2.0))
NOTHING = Trial(12, 0.2, 0.2, 0.2, 9.0, loss=(3.0, 3.0))
EDITED = Trial(12, 0.2, 0.5, 0.5, 30.0, calls=6, tokens=4000)
UNMOVED = replace(EDITED, after=0.2)
# a loss that falls, of texts of that form or of the right ones
LESS = replace(GAINED, after=0.2, content=Interval(0.1, 0.2, df=11, n=12))
SURE = replace(LESS, content=Interval(0.9, 0.2, df=11, n=12, bounds=(-9, 9)))
PLAN = Plan(6, {"loading": 2.0, "numerical move": 10.0, "evaluation": 8.0}, 48, 30000, 0.5)


def interval(mean: float, error: float = 0.01) -> Interval:
    return Interval(mean, error, df=5, n=6)


def advised(**changes: Any) -> Advice:
    content = {
        "cfg": RunConfig(),
        "right": estimate([1.0] * 10 + [0.0] * 30),
        "needs": {"recall": {"content": 0.4, "style": 0.3}, "asked": {"content": 0.5, "style": 0}},
        "followed": 18,
        "instructions": 24,
        "weights": GAINED,
        "prompt": EDITED,
        "untried": "",
        "expected": None,
        "trees": 0,
        "plan": PLAN,
        "peak_mb": 900.0,
    }
    return Advice(**{**content, **changes})


def lacks(content: float, style: float) -> dict[str, dict[str, float]]:
    return {"recall": {"content": content, "style": style}}


def tree_data(first: float) -> Expected:
    return Expected("6 trees", interval(0.1), interval(0.2), interval(first))


@pytest.mark.pure
@pytest.mark.parametrize(
    ("changes", "verdict", "rule"),
    [
        ({"right": estimate([1.0] * 39 + [0.0])}, "not worth it", "the base is right on 98%"),
        (
            {"weights": NOTHING, "prompt": UNMOVED},
            "not worth it",
            "gain nothing on other rows, and an edit gains nothing",
        ),
        ({"weights": NOTHING}, "prompt suffices", "tuned weights gain nothing"),
        ({"needs": lacks(0.05, 0.6)}, "prompt suffices", "little content is missing (content 5%"),
        ({"prompt": UNMOVED}, "weights", "and an edit gains nothing"),
        ({"needs": lacks(0.6, 0.05)}, "weights", "little form is missing"),
        (
            {"expected": tree_data(0.2)},
            "both, prompt first",
            "schedule data: +0.20 (+0.17 to +0.23)",
        ),
        ({"expected": tree_data(-0.2)}, "both, weights first", "schedule data: -0.20"),
        # an interval around 0 says nothing
        ({"expected": tree_data(0.01)}, "both, prompt first", "75% of instructions are followed"),
        ({"followed": 6}, "both, weights first", "25% of instructions are followed, less than 60%"),
        # what rewards do not show yet: the loss, where form is missing, and its content, where that is
        ({"weights": LESS, "prompt": UNMOVED}, "weights", "gain on other rows"),
        ({"weights": LESS, "needs": lacks(0.9, 0.0)}, "prompt suffices", "gain nothing on"),
        ({"weights": SURE, "needs": lacks(0.9, 0.0)}, "weights", "little form is missing"),
        # without an editor, whether the backbone follows prompts
        ({"prompt": None, "followed": 6}, "weights", "25% of instructions are followed (60%"),
        ({"prompt": None, "weights": NOTHING}, "prompt suffices", "75% of instructions are"),
    ],
)
def test_the_first_rule_that_holds_gives_the_verdict(changes, verdict: str, rule: str) -> None:
    advice = advised(**changes)
    assert advice.verdict[0] == verdict and rule in advice.verdict[1]
    verdict_line = f"verdict: {verdict}, because {advice.verdict[1]}."
    if verdict == "not worth it":
        assert advice.lines[-1] == verdict_line and not advice.method
    else:
        assert advice.lines[-2:] == [
            verdict_line,
            f"to do that: nslora adapt --method {advice.method}.",
        ]
        assert advice.method in METHODS


@pytest.mark.pure
def test_a_prompt_that_is_not_followed_is_rewritten_first_by_turns_alone() -> None:
    """What decides would leave it as it is."""
    assert advised(expected=tree_data(0.2)).method == "neurosymbolic"
    assert advised(expected=tree_data(0.2), followed=6).method == "alternate"


@pytest.mark.pure
def test_what_was_measured_is_said() -> None:
    text = "\n".join(advised().lines)
    for words in (
        "base: right on 25% of 40 rows (95% interval 0.",
        "misses: 40% of rows lack content, 30% form (estimated by recall).",
        "prompts: smollm2-135m follows 18 of 24 instructions.",
        "reward 0.20 to 0.40 on 12 other rows, loss 3.00 to 2.00 nats a token, in 9 s.",
        "reward 0.20 to 0.50 on 12 other rows, in 30 s, 6 calls, 4000 tokens.",
        "expected gain: no schedule data yet.",
        "at most 48 calls and 30000 tokens, 0.50 dollars",
        "adapt: time here: at most 1.2 minutes (loading 2 s, numerical move 10 s, evaluation 8 s)",
        "memory: 900 MB",
    ):
        assert words in text
    said = "\n".join(advised(expected=tree_data(0.2), trees=6).lines)
    assert "expected gain: by 6 trees, in test success: weights +0.10 (" in said
    assert "no schedule data of such needs yet" in "\n".join(advised(trees=6).lines)


@pytest.mark.pure
def test_what_schedules_brought_is_read_from_trees_that_are_alike(tmp_path: Path) -> None:
    for seed in range(100, 103):
        write_tree(tmp_path, toward("SN"), seed=seed, depth=2)
        write_tree(tmp_path, toward("NN"), seed=seed, depth=2, style=0.0, family="facts")
        write_tree(tmp_path, toward("NS"), seed=seed, depth=2, backbone="other", follows=0.1)
    trees = load(tmp_path)
    mixed = expected(trees, "smollm2-135m", 0.9, {"content": 0.3, "style": 0.3})
    assert mixed is not None and mixed.instances == "3 schedule trees of smollm2-135m"
    assert (mixed.prompt.mean, mixed.weights.mean, mixed.prompt_first.mean) == (0.5, 0.0, 1.0)
    facts = expected(trees, "smollm2-135m", 0.9, {"content": 0.3, "style": 0.0})
    assert facts is not None and facts.prompt_first.mean == -1.0
    # a backbone without trees: those that follow prompts as far
    new = expected(trees, "new", 0.2, {"content": 0.3, "style": 0.3})
    assert new is not None and new.instances.startswith("3 schedule trees of backbones that")
    assert new.prompt_first.mean == -1.0
    assert expected(trees, "new", 0.9, {"content": 0.3, "style": 0.3}) is None
    assert expected(trees, "smollm2-135m", 0.5, {"content": 0.0, "style": 0.0}) is None
    assert expected(load(tmp_path / "none"), "smollm2-135m", 0.5, {"content": 1.0}) is None


@pytest.mark.pure
def test_another_answer_is_that_of_the_next_row_that_has_another() -> None:
    rows = [Example(str(i), f"q{i}", answer) for i, answer in enumerate("aabca")]
    assert [e.answer for e in others(rows)] == ["b", "b", "c", "a", "b"]
    assert [e.question for e in others(rows)] == [e.question for e in rows]
    assert not {e.id for e in others(rows)} & {e.id for e in rows}
    same = [Example(str(i), "q", "a") for i in range(3)]
    assert [e.answer for e in others(same)] == ["a"] * 3


# ---- measured


@pytest.fixture
def data(tmp_path: Path, monkeypatch) -> Path:
    """A file whose replies must be in lower case, in a folder of its own, with an empty cache."""
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NSLORA_EDITOR_KEY", KEY)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    rule = [{"name": "lower_case"}]
    rows = [{"question": f"Mood {n}?", "answer": "Aa", "rules": rule} for n in range(40)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


def command(data: Path, tiny: Any, *more: str) -> list[str]:
    settings = [f"--set={name}={SETTINGS[name]}" for name in ("rank", "lr", "threads")]
    return ["advise", str(data), "--backbone", tiny.name, *settings, *more]


def scripted(body: dict[str, Any]) -> Any:
    *system, user = [message["content"] for message in body["messages"]]
    reply = lowercase(Request("".join(system), user, body["seed"]))
    return 200, {}, completion(reply, prompt_tokens=50, completion_tokens=9)


def test_both_moves_are_tried_and_asked_for_once(data, tiny, capsys) -> None:
    with serving() as endpoint:
        endpoint.reply = scripted
        argv = command(data, tiny, "--editor-url", endpoint.url, "--price", "1,2")
        assert cli.main(argv) == 0
        first, made = capsys.readouterr().out.splitlines(), len(endpoint.seen)
        assert cli.main(argv) == 0
        again = capsys.readouterr().out.splitlines()
        # all but the two checks of an endpoint
        assert made > 6 and len(endpoint.seen) == made + 2
    asked = [re.search(r", in \d+ s, (\d+) calls?, (\d+) tokens\.$", line) for line in first]
    calls, tokens = zip(*(map(int, found.groups()) for found in asked if found), strict=True)
    assert sum(calls) == made - 2 and sum(tokens) == TOKENS * (made - 2)
    assert "expected gain: no schedule data yet." in first
    assert any(" dollars; what it must be asked" in line for line in first)
    # what is measured on rows is the same, what by the clock is not
    measured = ("base", "misses", "prompts", "verdict")
    one, other = ([line for line in lines if line.startswith(measured)] for lines in (first, again))
    assert one == other and len(one) == 5
    # nothing in the working folder, and replies in the cache
    assert list(Path.cwd().iterdir()) == []
    kept = {path.parent.name for path in (data.parent / "cache").rglob("*.*")}
    assert kept == {"memo", "recordings"}


def test_without_an_editor_weights_are_tried_alone(data, tiny) -> None:
    settings = {name: SETTINGS[name] for name in ("rank", "lr", "threads")}
    advice = nslora.advise(data, backbone=tiny.name, **settings)
    assert advice.prompt is None
    assert advice.untried == "not tried: the editor qwen2.5-coder-1.5b is not in the cache"
    assert advice.right.n == 24 + 8
    assert advice.needs["recall"].keys() == {"content", "style"} and advice.instructions >= 100
    assert advice.weights.loss is not None and advice.weights.calls == 0
    # eager enough to learn the one answer
    assert advice.weights.loss[1] < advice.weights.loss[0] and advice.weights_help
    assert advice.plan.seconds is not None and advice.peak_mb > 100
    assert not list((data.parent / "cache").rglob("*.gguf"))


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--price", "free"], "--price must be two numbers"),
        (["--set", "task=math"], "the task is your data"),
        (["--grader", "fuzzy"], "unknown grader 'fuzzy'"),
        (["--editor-url", "http://127.0.0.1:9/v1"], "cannot be reached"),
        (["--schedules", "trees"], "cannot be read"),
    ],
)
def test_wrong_input_is_one_sentence_and_spends_nothing(
    data, tiny, capsys, more: list[str], words: str
) -> None:
    (Path.cwd() / "trees" / "one").mkdir(parents=True)
    (Path.cwd() / "trees" / "one" / "instance.json").write_text("{")
    assert cli.main(command(data, tiny, *more)) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""
    assert not (data.parent / "cache").exists()


def test_an_editor_that_fails_later_is_said(data, tiny) -> None:
    settings = {name: SETTINGS[name] for name in ("rank", "lr", "threads")}
    with serving() as endpoint:
        # the checks are answered, and nothing after them
        endpoint.script.extend([lambda handler, body: scripted(body)] * 2)
        endpoint.reply = lambda body: refusal(402, "pay first")
        advice = nslora.advise(
            data, backbone=tiny.name, editor_url=endpoint.url, reward="number", **settings
        )
    assert advice.prompt is None and "pay first" in advice.untried
    with pytest.raises(UserError, match="there is no file none.jsonl"):
        nslora.advise("none.jsonl", backbone=tiny.name)
