"""Records appear whole or not at all."""

from __future__ import annotations

import csv
import json
import subprocess
import threading

import pytest
from toy import finish

from nslora.config import RunConfig
from nslora.runs import store as module
from nslora.runs.store import FILES, Store
from nslora.types import UserError

pytestmark = pytest.mark.pure

CFG = RunConfig()


def value(store: Store) -> int:
    return json.loads((store.record(CFG) / "run.json").read_text())["value"]


def test_a_run_is_done_only_once_it_is_published(store: Store) -> None:
    folder = store.begin(CFG)
    for name in FILES:
        module.write_json(folder / name, {"value": 1})
    assert not store.done(CFG)
    assert not store.record(CFG).exists()
    assert store.publish(CFG) == store.record(CFG)
    assert store.done(CFG)
    assert value(store) == 1


@pytest.mark.parametrize("name", FILES)
def test_a_record_that_lacks_a_file_is_not_done(store: Store, name: str) -> None:
    record = finish(store, CFG)
    (record / name).unlink()
    assert not store.done(CFG)
    assert not store.accept(CFG)


def test_what_is_not_whole_is_not_published(store: Store) -> None:
    finish(store, CFG, value=1)
    folder = store.begin(CFG)
    module.write_json(folder / "run.json", {"value": 2})
    with pytest.raises(UserError, match="No such file"):
        store.publish(CFG)
    assert value(store) == 1
    assert not store.done(CFG)


def test_a_record_from_elsewhere_counts_only_when_accepted(store: Store, tmp_path) -> None:
    finish(store, CFG)
    clone = Store(store.results, tmp_path / "fresh")
    assert not clone.done(CFG)
    assert clone.accept(CFG)
    assert clone.done(CFG)
    assert not clone.accept(RunConfig(seed=1))
    assert not clone.done(RunConfig(seed=1))


def test_beginning_again_forgets_the_unfinished_run_and_publishing_replaces(store: Store) -> None:
    finish(store, CFG, value=1)
    folder = store.begin(CFG)
    assert list(folder.iterdir()) == []
    assert not store.done(CFG)
    # what a run killed while it was published leaves behind
    (store.results / f"{CFG.run_id}.part").mkdir()
    finish(store, CFG, value=2)
    assert value(store) == 2
    assert [path.name for path in store.results.iterdir()] == ["records"]
    assert [path.name for path in (store.results / "records").iterdir()] == [CFG.run_id]


def test_a_memo_is_computed_once_and_again_when_it_is_damaged(store: Store) -> None:
    calls = []

    def compute() -> dict:
        calls.append(1)
        return {"ids": ("a",)}

    for _ in range(2):
        assert store.memo("key", compute) == {"ids": ["a"]}
    assert len(calls) == 1
    (path,) = store.work.rglob("key.json")
    for damage in (b"", b'{"ids": ["a"', b"\xff\xfe"):
        path.write_bytes(damage)
        assert store.memo("key", compute) == {"ids": ["a"]}
    assert len(calls) == 4


def test_json_lines_end_at_newlines_only(tmp_path) -> None:
    path = tmp_path / "steps.jsonl"
    rows = [{"prompt": "one\u2028line\x85 and \x0c more"}, {"prompt": "zwei\nZeilen"}]
    for row in rows:
        module.append_json(path, row)
    assert module.read_jsonl(path) == rows


def test_scores_can_be_read_back(tmp_path) -> None:
    row = {"split": "test", "id": "t1", "question": "Q?", "success": 1.0, "style": None}
    reply = 'Line one,\n"two",\rthree\u2028four'
    rows = [row | {"output": reply}, row | {"split": "locality"}]
    module.write_scores(tmp_path / "scores.csv", rows)
    with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == module.COLUMNS
    assert [r["split"] for r in table] == ["test", "locality"]
    assert (table[0]["success"], table[0]["style"]) == ("1.0", "")
    assert [r["output"] for r in table] == [reply, ""]
    with pytest.raises(ValueError, match="colour"):
        module.write_scores(tmp_path / "scores.csv", [{"colour": "red"}])


def test_a_receipt_names_code_versions_and_machine() -> None:
    receipt = module.environment(2, "cpu", "bfloat16")
    assert set(receipt["versions"]) == set(module.PACKAGES)
    assert receipt["revision"]
    assert receipt["processor"]
    assert receipt["python"]
    assert module.peak_megabytes() > 10


def test_the_hash_of_the_code_is_of_what_git_knows(tmp_path, monkeypatch) -> None:
    """A linter's cache in a package once made the hash one that no clean clone has."""
    for name in (*module.MODULES, *(f"{package}/x.py" for package in module.EXECUTED)):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "runs" / "store.py"))
    whole = module.code.__wrapped__()
    for name in ("tasks/.ruff_cache/CACHEDIR.TAG", "tasks/__pycache__/x.pyc.1", "tasks/.hidden"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("y")
    assert module.code.__wrapped__() == whole
    (tmp_path / "tasks" / "x.toml").write_text("y")
    assert module.code.__wrapped__() != whole


def test_a_receipt_says_whether_the_code_was_changed(tmp_path, monkeypatch) -> None:
    """Paths were once looked for in the library's folder, where none is: nothing ever changed."""
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
