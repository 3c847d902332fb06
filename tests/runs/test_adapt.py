"""An adaptation to somebody's own file, from the file to the bundle and its use, on a real small model."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tinymodel import SETTINGS

import nslora
from nslora import cli
from nslora.tasks import functions
from nslora.types import UserError

ROWS = [{"ask": f"Mood {n}?", "reply": ("good", "bad")[n % 2], "note": n} for n in range(12)]
SHORT = {**SETTINGS, "method": "lora", "moves": 1, "returned": "tuned", "max_new_tokens": 8}
# enough to learn one answer to all questions
EAGER = {**SETTINGS, "method": "lora", "epochs": 8, "moves": 2, "max_new_tokens": 8}
SCORE = """
def score(question, answer, reply):
    equal = sum(a == b for a, b in zip(answer, reply)) / max(len(answer), len(reply), 1)
    return {"value": equal, "critique": f"equal: {equal}", "brevity": float(len(reply) <= 4)}


def picky(question, answer, reply):
    assert reply == answer, "no gold"
    return 1
"""


def record(result: nslora.Result) -> dict:
    return json.loads((result.folder / "record" / "run.json").read_text(encoding="utf-8"))


def put(path: Path, word: str, count: int, answer: str = "aa") -> Path:
    rows = [{"question": f"{word} {n}?", "answer": answer} for n in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file with a mark, Windows line ends and a repeat, in a folder that shells stumble over."""
    folder = tmp_path / 'it\'s a "quoted" $folder' / ("long " * 40).strip()
    folder.mkdir(parents=True)
    path = folder / ("mine " * 40 + ".jsonl")
    text = "\r\n".join(map(json.dumps, [*ROWS, ROWS[0]]))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return path


def test_a_file_as_it_comes_becomes_an_adapted_model(data: Path, tiny, capsys) -> None:
    out = data.parent / "adapted"
    mapping = "question=ask,answer=reply"
    result = nslora.adapt(data, out=out, backbone=tiny.name, columns=mapping, **SHORT)
    said = capsys.readouterr().err
    assert "note: column 'note' is left out (13: " in said
    assert "note: repeats of an earlier row are left out (1: line 13)." in said
    assert "grader labels (12 rows): in line 1 the reply 'good' is right, 'bad or good'" in said
    assert said.index("grader labels") < said.index("move 1")
    assert result.final["test"]["n"] == result.verdict.difference.n == 2
    assert (out / "adapter").is_dir()
    assert sorted(path.name for path in data.parent.iterdir()) == ["adapted", data.name]


def test_a_changed_file_of_the_same_name_is_another_run(data: Path, tiny) -> None:
    options = {"backbone": tiny.name, "columns": "question=ask,answer=reply", **SHORT}
    first = record(nslora.adapt(data, out=data.parent / "first", **options))
    again = record(nslora.adapt(data, out=data.parent / "again", **options))
    data.write_text(data.read_text("utf-8-sig").replace("Mood 3", "Mood III"), encoding="utf-8")
    changed = record(nslora.adapt(data, out=data.parent / "changed", **options))
    assert first["run_id"] == again["run_id"] != changed["run_id"]


def test_an_interrupted_adaptation_goes_on_from_its_last_move(tmp_path: Path, tiny) -> None:
    path, steps, asked = put(tmp_path / "mine.jsonl", "Mood", 12), [], []

    def score(question: str, answer: str, reply: str) -> bool:
        asked.append(reply)
        return reply == answer

    def watch(step) -> None:
        steps.append(step.step)
        if steps == [0, 1]:
            raise KeyboardInterrupt

    options = {"backbone": tiny.name, "watch": watch, "reward": score, **EAGER}
    with pytest.raises(KeyboardInterrupt):
        nslora.adapt(path, out=tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    before = len(asked)
    result = nslora.adapt(path, out=tmp_path / "out", **options)
    assert steps == [0, 1, 2]
    # those of the interrupted process count, too
    assert record(result)["cost"]["reward_calls"] == len(asked) > before
    assert [p.name for p in tmp_path.iterdir() if "part" in p.name] == []


def test_a_function_is_the_reward_from_the_first_score_to_the_verdict(tmp_path: Path, tiny) -> None:
    asked: list[str] = []

    def close(question: str, answer: str, reply: str) -> tuple[float, str]:
        asked.append(question)
        return float(reply[:1] == answer[:1]) / 2, "only the first letter counts"

    result = nslora.adapt(
        put(tmp_path / "mine.jsonl", "Mood", 20),
        out=tmp_path / "out",
        backbone=tiny.name,
        reward=close,
        test=str(put(tmp_path / "test.jsonl", "Feel", 10)),
        system="Be {brief}.",
        template="Q: {question}",
        **EAGER,
    )
    run = record(result)
    assert run["cost"]["reward_calls"] == len(asked) and {"Feel 3?", "Mood 3?"} <= set(asked)
    assert (result.prompt.system, result.prompt.question) == ("Be {brief}.", "Q: {question}")
    # a reward that never reaches 1 is compared by its mean
    assert result.verdict.measure == "value"
    assert (result.verdict.before, result.verdict.after) == (0.0, 0.5)
    assert result.verdict.difference.n == run["final"]["test"]["n"] == 10
    assert result.verdict.better
    # the adapted model answers under its prompt, with its weights
    assert result.chat("Feel 3?")[:1] == "a"


def test_a_bundle_is_scored_on_rows_as_its_run_scored_them(tmp_path: Path, tiny) -> None:
    test = put(tmp_path / "test.jsonl", "Feel", 6)
    options = {"backbone": tiny.name, "test": str(test), "grader": "exact", **EAGER}
    result = nslora.adapt(put(tmp_path / "mine.jsonl", "Mood", 12), out=tmp_path / "out", **options)
    score = nslora.evaluate(tmp_path / "out", test)
    assert (score.mean, score.n) == (result.final["test"]["success"], 6)
    assert score.low <= score.mean <= score.high
    other = put(tmp_path / "other.jsonl", "Feel", 3, answer="nothing like it")
    assert nslora.evaluate(tmp_path / "out", other, grader="contains").mean == 0.0
    half = nslora.evaluate(tmp_path / "out", other, reward=lambda q, a, r: 0.5)
    assert half.mean == 0.5
    with pytest.raises(UserError, match="at least 2 are needed"):
        nslora.evaluate(tmp_path / "out", put(tmp_path / "one.jsonl", "Feel", 1))
    # other weights in the same place
    config = Path(tiny.name) / "config.json"
    before = config.read_bytes()
    config.write_bytes(before + b"\n")
    try:
        with pytest.raises(UserError, match="was made on other weights than those of"):
            nslora.evaluate(tmp_path / "out", test)
    finally:
        config.write_bytes(before)


def nslora_command(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in a folder."""
    source = Path(nslora.__file__).parents[1]
    return subprocess.run(
        [sys.executable, "-m", "nslora.cli", *argv],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(source)},
    )


def test_the_exit_status_says_whether_it_is_better(tmp_path: Path, tiny) -> None:
    put(tmp_path / "mine.jsonl", "Mood", 20)
    put(tmp_path / "test.jsonl", "Feel", 10)
    (tmp_path / "score.py").write_text(SCORE)
    settings = [f"--set={name}={value}" for name, value in EAGER.items() if name != "method"]
    command = ["adapt", "mine.jsonl", "--backbone", tiny.name, *settings, "--test", "test.jsonl"]
    by_score = ["--reward", "score.py:score"]

    done = nslora_command(tmp_path, *command, *by_score, "--method", "lora", "--out", "good")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("better: mean reward ")
    assert f"see {tmp_path / 'good' / 'README.md'}\n" in done.stdout
    metrics = json.loads((tmp_path / "good" / "metrics.json").read_text())
    assert metrics["better"] and metrics["verdict"] == done.stdout.split("\n")[0]
    receipt = json.loads((tmp_path / "good" / "record" / "run.json").read_text())
    # a function's own parts are reported beside ours
    assert receipt["final"]["test"]["brevity"] == 1.0

    same = nslora_command(tmp_path, *command, *by_score, "--method", "frozen", "--out", "same")
    assert same.returncode == 3, same.stderr
    assert same.stdout.startswith("not better: nothing that was tried beat the start")
    assert not (tmp_path / "same" / "adapter").exists()
    assert "Not better: nothing that was tried" in (tmp_path / "same" / "README.md").read_text()


@pytest.fixture
def adapted(tmp_path: Path, tiny, monkeypatch) -> str:
    """A bundle by its name, with its rows, in the working folder; its reward is a function."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "mine.jsonl", "Mood", 20)
    put(tmp_path / "test.jsonl", "Feel", 10)
    (tmp_path / "score.py").write_text(SCORE)
    nslora.adapt(
        "mine.jsonl",
        out="good",
        backbone=tiny.name,
        reward="score.py:score",
        test="test.jsonl",
        **EAGER,
    )
    return "good"


def test_a_bundle_is_asked_and_scored_on_the_command_line(adapted, monkeypatch, capsys) -> None:
    assert cli.main(["chat", adapted, "--ask", "Feel 3?"]) == 0
    assert capsys.readouterr().out == "aa\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("Feel 3?\n\nMood 2?\n"))
    assert cli.main(["chat", adapted]) == 0
    assert capsys.readouterr().out == "aa\naa\n"
    functions.FUNCTIONS.clear()
    assert cli.main(["evaluate", adapted, "test.jsonl"]) == 2
    assert "replies are graded by score.py:score: give it with --reward" in capsys.readouterr().err
    assert cli.main(["evaluate", adapted, "test.jsonl", "--reward", "score.py:score"]) == 0
    assert capsys.readouterr().out.startswith("1.00 on 10 rows (95% interval 0.")


def test_a_reply_that_breaks_the_reward_ends_the_run_in_a_sentence(
    tmp_path: Path, tiny, monkeypatch, capsys
) -> None:
    """The gold answers are all right, and the frozen model's first replies are not."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "mine.jsonl", "Mood", 20)
    (tmp_path / "score.py").write_text(SCORE)
    command = ["adapt", "mine.jsonl", "--backbone", tiny.name, "--method", "lora", "--out", "none"]
    assert cli.main([*command, "--reward", "score.py:picky", "--set", "threads=1"]) == 2
    said = capsys.readouterr().err.rstrip("\n").split("\n")[-1]
    assert said.startswith("line ") and "raised AssertionError (no gold) for the reply " in said
    assert not (tmp_path / "none").exists()
