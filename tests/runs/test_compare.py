"""Two models on the same rows: what differs, by how much, and on which rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tinymodel import SETTINGS

import nslora
from nslora import cli
from nslora.disk import write_sums
from nslora.runs import evaluate
from nslora.types import UserError

# enough to learn one answer to all questions
EAGER = {**SETTINGS, "method": "lora", "epochs": 8, "moves": 2, "max_new_tokens": 8}


def put(path: Path, word: str, answers: list[str]) -> Path:
    rows = [{"question": f"{word} {n}?", "answer": answer} for n, answer in enumerate(answers)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def adapted(tmp_path: Path, tiny, monkeypatch) -> str:
    """A bundle by its name in the working folder, which says aa to everything."""
    monkeypatch.chdir(tmp_path)
    options = {"backbone": tiny.name, "grader": "exact", **EAGER}
    nslora.adapt(put(tmp_path / "mine.jsonl", "Mood", ["aa"] * 12), out="adapted", **options)
    return "adapted"


def test_a_bundle_is_compared_with_its_backbone_by_rows(adapted, tmp_path, tiny, capsys) -> None:
    rows = put(tmp_path / "rows.jsonl", "Feel", ["aa"] * 9 + ["zz"])
    command = ["compare", tiny.name, adapted, str(rows)]
    assert cli.main(command) == 0
    sentence, differing = capsys.readouterr().out.splitlines()
    assert sentence.startswith(
        f"adapted is better than {tiny.name}: share right 0.00 and 0.90 on the same 10 rows, "
        "difference +0.90 (95% interval "
    )
    assert differing == "won by adapted: 9 (lines 1, 2, 3, 4, 5, 6, 7, 8 and 9); lost: no row."
    # the other way round
    assert cli.main(["compare", adapted, tiny.name, str(rows)]) == 3
    said = capsys.readouterr().out
    assert said.startswith(f"{tiny.name} is worse than adapted: ")
    assert f"won by {tiny.name}: no row; lost: 9 (lines 1, 2, 3, 4, 5, 6, 7, 8 and 9)." in said
    # a model is not better than itself
    same = nslora.compare(adapted, adapted, rows)
    assert not same.better and same.difference.mean == 0.0
    assert same.sentence.startswith("adapted is not shown to be better than adapted: ")


def test_the_numbers_are_those_of_each_alone(adapted, tmp_path, tiny) -> None:
    rows = put(tmp_path / "rows.jsonl", "Feel", ["aa", "ab", "aa", "zz"])
    compared = nslora.compare(tiny.name, adapted, rows, grader="contains")
    assert compared.means[1] == nslora.evaluate(adapted, rows, grader="contains").mean == 0.5
    by_worth = nslora.compare(tiny.name, adapted, rows, reward=lambda q, a, r: float(r == "aa") / 2)
    assert (by_worth.measure, by_worth.means) == ("value", (0.0, 0.5))


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("adapted", "nothing", "unknown backbone 'nothing'"),
        ("smollm2-135m", "qwen2.5-coder-0.5b", "are no folders that nslora adapt has written"),
        ("adapted", "adapted", "there is no file none.jsonl"),
    ],
)
def test_wrong_input_is_one_sentence(
    adapted, capsys, monkeypatch, first: str, second: str, words: str
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("nothing is loaded before all is checked")

    monkeypatch.setattr(evaluate, "open_bundle", load)
    monkeypatch.setattr(evaluate, "_bare", load)
    assert cli.main(["compare", first, second, "none.jsonl"]) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""


def test_bundles_of_two_graders_need_one(adapted, tmp_path) -> None:
    other = tmp_path / "other" / "record"
    other.mkdir(parents=True)
    receipt = json.loads((tmp_path / adapted / "record" / "run.json").read_text())
    receipt["config"]["grader"] = "contains"
    (other / "run.json").write_text(json.dumps(receipt))
    shutil.copy(tmp_path / adapted / "prompt.json", other.parent)
    write_sums(other)
    rows = put(tmp_path / "rows.jsonl", "Feel", ["aa"] * 3)
    with pytest.raises(UserError, match="graded by contains and exact: give one --grader"):
        nslora.compare(adapted, other.parent, rows)
    with pytest.raises(UserError, match="give a reward or a grader, not both"):
        nslora.compare(adapted, adapted, rows, grader="exact", reward="a.py:f")
