"""Records appear whole or not at all."""

from __future__ import annotations

import csv
import json
import subprocess
import threading

from nslora.config import RunConfig
from nslora.runs import store as module
from nslora.runs.store import Store
from nslora.types import Example, Move, Need, Prompt, Reward, Scored, Signal, StepRecord

CFG = RunConfig()


def finish(store: Store, value: int) -> None:
    folder = store.begin(CFG)
    module.write_json(folder / "run.json", {"value": value})
    store.publish(CFG, ["run.json"])


def test_a_run_is_done_only_once_it_is_published(store: Store) -> None:
    folder = store.begin(CFG)
    module.write_json(folder / "run.json", {"value": 1})
    assert not store.done(CFG)
    assert not store.record(CFG).exists()
    store.publish(CFG, ["run.json"])
    assert store.done(CFG)
    assert json.loads((store.record(CFG) / "run.json").read_text()) == {"value": 1}


def test_a_record_from_elsewhere_counts_only_when_accepted(store: Store, tmp_path) -> None:
    finish(store, 1)
    clone = Store(store.results, tmp_path / "fresh")
    assert not clone.done(CFG)
    assert clone.accept(CFG)
    assert clone.done(CFG)
    assert not clone.accept(RunConfig(seed=1))
    assert not clone.done(RunConfig(seed=1))


def test_beginning_again_forgets_the_unfinished_run_and_publishing_replaces(store: Store) -> None:
    finish(store, 1)
    folder = store.begin(CFG)
    assert list(folder.iterdir()) == []
    assert not store.done(CFG)
    finish(store, 2)
    assert json.loads((store.record(CFG) / "run.json").read_text()) == {"value": 2}
    assert [p.name for p in store.record(CFG).parent.iterdir()] == [CFG.run_id]


def test_a_memo_is_computed_once(store: Store) -> None:
    calls = []
    for _ in range(2):
        assert store.memo("key", lambda: calls.append(1) or {"ids": ["a"]}) == {"ids": ["a"]}
    assert calls == [1]


def test_steps_and_scores_can_be_read_back(tmp_path) -> None:
    step = StepRecord(
        1,
        Move.NUMERICAL,
        Prompt(),
        None,
        {"success": 0.5},
        {},
        Signal(c1=-0.5),
        {},
        {},
        {"seconds": 1.0},
    )
    module.append_step(tmp_path / "steps.jsonl", step)
    module.append_step(tmp_path / "steps.jsonl", step)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [line["move"] for line in lines] == ["numerical", "numerical"]
    assert lines[0]["signal"] == {"c1": -0.5, "c2": None, "gain": None}
    row = Scored(
        Example("id", "Q?", "Lima", need=Need.BOTH), 'Line one,\n"two"', Reward(1.0, 0.0, 1.0)
    )
    module.write_scores(tmp_path / "scores.csv", {"test": [row], "locality": [row]})
    rows = list(csv.DictReader((tmp_path / "scores.csv").read_text().splitlines(keepends=True)))
    assert [r["split"] for r in rows] == ["test", "locality"]
    assert rows[0]["output"] == row.output
    assert (rows[0]["success"], rows[0]["content_strict"], rows[0]["need"]) == (
        "1.0",
        "0.0",
        "both",
    )


def test_a_receipt_names_code_versions_and_machine() -> None:
    receipt = module.environment(2, "cpu", "bfloat16")
    assert set(receipt["versions"]) == set(module.PACKAGES)
    assert receipt["revision"] and receipt["processor"] and receipt["python"]
    assert module.peak_megabytes() > 10


def test_a_receipt_says_whether_the_code_was_changed(tmp_path, monkeypatch) -> None:
    """Paths were once looked for in the library's folder, where none is, and every receipt said that nothing was."""
    code = tmp_path / "src" / "lib" / "store.py"
    code.parent.mkdir(parents=True)
    code.write_text("as committed")
    for args in (
        ["init", "-q"],
        ["add", "."],
        ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "first"],
    ):
        subprocess.run(["git", *args], cwd=tmp_path, check=True)
    monkeypatch.setattr(module, "__file__", str(code))
    assert module.environment(2, "cpu", "bfloat16")["dirty"] is False
    code.write_text("changed")
    assert module.environment(2, "cpu", "bfloat16")["dirty"] is True


def test_one_run_is_made_by_one_at_a_time(store: Store) -> None:
    order: list[str] = []

    def second() -> None:
        with store.alone(CFG):
            order.append("second")

    thread = threading.Thread(target=second)
    with store.alone(CFG), store.alone(RunConfig(seed=1)):  # another run is no obstacle
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
