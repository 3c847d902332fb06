"""Sides that make moves: the same requests for every editor, the same nodes by a tree and by single runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, down, helpful
from tinymodel import config, save_tiny_model

from nslora.bench import measure, moves, report
from nslora.editor.client import Request
from nslora.experiments.schedules import by_length
from nslora.runs.run import make_run
from nslora.runs.store import Store, read_jsonl

SPEC = {
    "threads": 1,
    "backbone": "smollm2-135m",
    "editor": "smollm2-135m",
    "candidates": 1,
    "new_tokens": 8,
}


def asked(reply, seed: int) -> tuple[list[Request], list[str]]:
    """What an editor with these replies is asked for, and the problems of its edits."""
    requests: list[Request] = []

    def note(request: Request) -> str:
        requests.append(request)
        return reply(request)

    problems = moves.ask(Scripted(note), 2, seed)
    return requests, problems


def test_every_editor_is_asked_the_same() -> None:
    good, bad = asked(helpful, 1), asked(lambda _: "no edit", 1)
    assert good[0] == bad[0]
    # 2 texts x 2 failures, 2 texts x 2 candidates
    assert len(good[0]) == len(set(good[0])) == 8
    assert moves.usable(good[1]) == {"usable": 1.0}
    assert set(bad[1]) == {"tags"} and moves.usable(bad[1]) == {"usable": 0.0}
    assert asked(helpful, 2)[0] != good[0]


def test_lost_replies_are_no_speed() -> None:
    editor = Scripted(down)
    before = replace(editor.ledger)
    moves.ask(editor, 1, 0)
    with pytest.raises(RuntimeError, match="replies were lost: "):
        moves.spent(editor, before)


def test_replies_of_a_batch_are_those_of_single_requests(tiny) -> None:
    rows = []
    for alone in (False, True):
        editor = moves.Batches(tiny, 6, alone)
        moves.ask(editor, 1, 0)
        rows.append({"dtype": "float32", "texts": editor.texts})
    assert len(rows[0]["texts"]) == 6 and all(rows[0]["texts"])
    [one, _] = measure.with_share(rows, least=1.0)
    assert one["identical"] == 1.0


def test_both_engines_answer_the_same_requests() -> None:
    specs = [SPEC | engine | {"run": "moves.calls"} for engine in measure.ENGINES]
    # ours by name: "auto" depends on the machine
    specs[0]["engine"] = "own"
    made = []
    for spec in specs:
        with measure.side(spec | {"part": "symbolic", "case": "calls"}) as repeat:
            made.append(repeat() | {"repetition": 0})
    ours, theirs = made
    assert (ours["engine"], theirs["engine"]) == ("own", "llama.cpp")
    assert (ours["dtype"], theirs["dtype"]) == ("bfloat16", "gguf")
    assert ours["tokens_in"] == theirs["tokens_in"] > 6 * 200
    for row in made:
        assert 0 < row["tokens_out"] <= 4 * 64 + 2 * 128
        assert 0 <= row["usable"] <= 1
        assert row["start_s"] > 0 and row["peak_server_mb"] > 100
    # the weights in bfloat16 take more than quantised ones
    assert ours["peak_server_mb"] > theirs["peak_server_mb"]
    (line,) = report.compared(made).to_dict("records")
    assert (line["unit"], line["our_mb"]) == ("moves/s", ours["peak_server_mb"])
    assert "editor on own" in report.told(made)[0]


@pytest.mark.parametrize("depth", [1, 2])
def test_a_tree_and_single_runs_make_the_same_nodes(tiny, tmp_path: Path, depth: int) -> None:
    cfg = config(backbone=tiny.name, rule="end_phrase", moves=depth)
    made = []
    for name, make in (("tree", moves.grow), ("runs", moves.make_each)):
        place = Store(tmp_path / name / "results", tmp_path / name / "work")
        made.append(make(cfg, place, Scripted(helpful), tiny))
    (grown, few), (single, many) = made
    assert by_length(grown) == by_length(single)
    assert len(grown) == 2 ** (depth + 1) - 1
    for name in grown:
        for key in moves.KEPT:
            assert json.dumps(grown[name][key]) == json.dumps(single[name][key]), (name, key)
    assert (few, many) == (2 ** (depth + 1) - 2, depth * 2**depth)


def test_a_repetition_of_schedules_starts_from_nothing(tmp_path: Path) -> None:
    """What the turn before has recorded would be free."""
    folder = str(save_tiny_model(tmp_path / "tiny"))
    spec = SPEC | {"backbone": folder, "items": 2, "depth": 1, "engine": "own"}
    with measure.side(spec | {"run": "moves.tree", "part": "tree", "case": "depth 1"}) as repeat:
        first, second = repeat(), repeat()
    assert first["texts"] == second["texts"]
    assert (first["work"], first["moves"]) == (3, 2)
    assert first["calls"] == second["calls"] >= 6
    assert first["replayed"] == second["replayed"] == 0


def test_what_else_is_known_of_moves_is_told_beside_their_speed() -> None:
    base = {"device": "cpu", "backbone": "b", "case": "c", "peak_mb": 1.0, "engine": "own"}
    row: dict[str, Any] = {**base, "part": "symbolic", "side": "nslora", "work": 1, "seconds": 2.0}
    rows = [
        row | {"usable": share, "tokens_in": 10, "repetition": i}
        for i, share in enumerate((0.5, 1.0))
    ]
    tree = row | {"part": "tree", "moves": 6, "engine": "llama.cpp", "repetition": 0}
    assert report.told([*rows, tree]) == [
        "symbolic, c, b, nslora, editor on own: 75% of edits usable; 10 tokens in.",
        "tree, c, b, nslora, editor on llama.cpp: 6 moves made.",
    ]
    assert report.told([row | {"part": "train"}]) == []


@pytest.mark.parametrize("method", ["neurosymbolic", "gepa"])
def test_the_course_of_an_adaptation_is_that_of_its_record(tiny, store, method: str) -> None:
    cfg = config(backbone=tiny.name, rule="end_phrase", method=method, moves=2)
    with moves.watched() as course:
        record = make_run(cfg, store, Scripted(helpful), tiny, watch=lambda _: None)
    seconds, tokens, values = zip(*course, strict=True)
    assert seconds[0] < 0.01 and list(seconds) == sorted(seconds)
    assert list(tokens) == sorted(tokens) and tokens[0] > 0
    steps = read_jsonl(record / "steps.jsonl")
    assert values[0] == pytest.approx(steps[0]["dev"]["value"])
    assert {round(step["dev"]["value"], 9) for step in steps} <= {round(v, 9) for v in values}
    # after it, nothing is noted
    noted = len(course)
    make_run(cfg.but(seed=1), store, Scripted(helpful), tiny, watch=lambda _: None)
    assert len(course) == noted


def test_peers_are_compared_at_the_reward_that_both_reach(monkeypatch) -> None:
    ours = {
        "side": "nslora",
        "seconds": 90.0,
        "course": [(0.0, 5, 0.2), (30.0, 60, 0.6), (80.0, 99, 0.9)],
    }
    theirs = {"side": "GEPA", "seconds": 70.0, "course": [(0.0, 5, 0.2), (60.0, 70, 0.5)]}
    monkeypatch.setattr(measure, "once", lambda spec: ours if spec["side"] == "nslora" else theirs)
    a, b, *_ = measure.peers(measure.SMALL, {"threads": 1})
    assert (a["seconds"], a["tokens"], a["best"], a["whole_s"]) == (30.0, 60, 0.9, 90.0)
    assert (b["seconds"], b["tokens"], b["equal"]) == (60.0, 70, 0.5)
