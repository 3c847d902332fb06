"""Lengths: what is too long is named before a run, by the backbone's own tokenizer, and replies have room."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, lowercase
from tinymodel import config

from nslora.runs import lengths, preflight
from nslora.runs.adapt import check
from nslora.runs.run import make_run
from nslora.types import UserError

RULES = [{"name": "end_phrase", "kwargs": {"phrase": "Over and out."}}]


def data(folder: Path, *extra: dict[str, Any], words: int = 1) -> Path:
    rows = [{"question": f"Who is {n}?", "answer": "word " * words + str(n)} for n in range(10)]
    path = folder / "mine.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in [*rows, *extra]))
    return path


def test_tokens_are_counted_as_the_loaded_backbone_counts_them(tiny) -> None:
    how = lengths.measure(tiny.name)
    assert how is not None
    assert how.context == tiny.model.config.max_position_embeddings
    for text in ("", "Who?", "drei Türme, 東京, 🙂"):
        assert how.count(text) == tiny.count(text)


def test_a_backbone_that_is_not_cached_is_not_fetched(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path / "cache"))
    assert lengths.measure("smollm2-135m") is None
    cfg, checked = check(data(tmp_path), backbone="smollm2-135m")
    assert checked.problems == []
    assert lengths.describe(checked.items, cfg, None) == (
        "tokens are not counted: smollm2-135m is not in the cache."
    )
    assert not (tmp_path / "cache").exists()


def test_a_row_that_does_not_fit_is_refused_by_its_line(tmp_path: Path, tiny) -> None:
    context = tiny.model.config.max_position_embeddings
    path = data(tmp_path, {"question": "long " * context, "answer": "x"})
    cfg, checked = check(path, backbone=tiny.name, max_new_tokens=8)
    [problem] = checked.problems
    assert problem.startswith(f"{path}, line 11: the question has {5 * context - 1} tokens, and ")
    with pytest.raises(UserError, match="line 11: the question has"):
        preflight.check([cfg])


def test_an_answer_longer_than_a_reply_is_refused_by_its_line(tmp_path: Path, tiny) -> None:
    path = data(tmp_path, {"question": "Who else?", "answer": "x" * 40})
    _, checked = check(path, backbone=tiny.name, max_new_tokens=40)
    assert checked.problems == [
        f"{path}, line 11: the answer has 40 tokens, and a reply ends after 40; "
        "set max_new_tokens to 41 or more."
    ]
    assert check(path, backbone=tiny.name, max_new_tokens=41)[1].problems == []


def test_the_style_of_a_rule_needs_room_too(tmp_path: Path, tiny) -> None:
    path = data(tmp_path, {"question": "Who else?", "answer": "x", "rules": RULES})
    _, checked = check(path, backbone=tiny.name, max_new_tokens=12)
    assert len(checked.problems) == 1 and "line 11: the answer has 16 tokens" in checked.problems[0]


def test_the_reply_limit_follows_from_the_answers(tmp_path: Path, monkeypatch) -> None:
    """It is the same with and without a tokenizer at hand, and no less than what one counts."""
    long = data(tmp_path, words=60)
    limit = check(long)[0].max_new_tokens
    assert 60 < limit < 200
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path / "cache"))
    assert check(long)[0].max_new_tokens == limit
    assert check(data(tmp_path))[0].max_new_tokens == 32
    assert check(long, max_new_tokens=16)[0].max_new_tokens == 16


@pytest.mark.parametrize(
    "answer",
    [
        "First switch the pump off at the wall, then drain the tank into the yellow bucket.",
        "0123456789 0123456789",
        "東京は日本の首都です。北京は中国の首都です。",
        "दिन और रात का समय",
        "!?#$%&/()=~|",
    ],
)
def test_the_guess_is_no_less_than_the_truth(tmp_path: Path, answer: str) -> None:
    how = lengths.measure("smollm2-135m")
    if how is None:
        pytest.skip("the backbone is not cached")
    _, checked = check(data(tmp_path, {"question": "What?", "answer": answer}))
    assert lengths.longest_reply(checked.items) > how.count(answer)


def test_a_run_that_had_to_fetch_its_weights_checks_before_its_first_move(
    tmp_path: Path, tiny, store
) -> None:
    path = data(tmp_path, {"question": "Who else?", "answer": "x" * 40})
    cfg = config(task=f"own:{path}", backbone=tiny.name, max_new_tokens=16)
    with (
        Scripted(lowercase) as editor,
        pytest.raises(UserError, match="line 11: the answer has 40"),
    ):
        make_run(cfg, store, editor, tiny)
    assert editor.ledger.calls == 0 and not store.done(cfg)
