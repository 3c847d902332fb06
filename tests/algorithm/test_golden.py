"""A golden run of the loop: its steps are pinned, and two processes make the same record to the byte.

The run is of a random model with a scripted editor, and has all that a run can have: weights that
learn until they are saturated, accepted and rejected edits, a gate that keeps the old prompt, style
that prompts failed to bring. To pin its steps anew, once a change of them is wanted:

    PYTHONPATH=src:tests python tests/algorithm/test_golden.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, lowercase
from tinymodel import config, save_tiny_model

from nslora.model.backbone import load
from nslora.runs import store
from nslora.runs.run import make_run

GOLDEN = Path(__file__).absolute().parent / "golden" / "steps.jsonl"
# numerical-first decides by the signal and by demand; hidden needs take no random number
SETTINGS = {
    "method": "numerical-first",
    "needs": "hidden",
    "rule": "lower_case",
    "seed": 7,
    "dev_items": 4,
    "moves": 6,
    "c1_eps": 0.3,
}
# processors differ in the last bits
TOLERANCE = 1e-3
# seconds and memory: all that may differ between two processes
TIMES = {"wall_s", "saved_s", "work_s", "moves_s", "peak_mb"}


def make(folder: Path) -> Path:
    """Make the golden run in a folder, which becomes the working folder, and return its record."""
    os.chdir(folder)
    # a relative name, since a run's identity holds the name of its backbone
    model = save_tiny_model(Path("tiny"))
    backbone = load(str(model), threads=1, dtype="float32", device="cpu")
    cfg = config(**SETTINGS, backbone=str(model))
    place = store.Store(Path("results"), Path("runs"))
    with Scripted(lowercase) as editor:
        return make_run(cfg, place, editor, backbone, watch=lambda step: None)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The records that two processes make, in which sets of strings have other orders."""
    folders = [tmp_path_factory.mktemp("golden") for _ in range(2)]
    path = os.pathsep.join([str(Path(__file__).absolute().parents[1]), *sys.path])
    processes = []
    for hash_seed, folder in enumerate(folders):
        env = {**os.environ, "PYTHONPATH": path, "PYTHONHASHSEED": str(hash_seed)}
        command = [sys.executable, str(Path(__file__).absolute()), str(folder)]
        processes.append(subprocess.Popen(command, env=env))
    assert [process.wait() for process in processes] == [0, 0]
    return [next((folder / "results" / "records").iterdir()) for folder in folders]


def difference(golden: Any, made: Any, where: str = "") -> str:
    """Return where two JSON values differ: floats by more than TOLERANCE, all else at all."""
    if isinstance(golden, float) and isinstance(made, float):
        return "" if made == pytest.approx(golden, rel=TOLERANCE) else where
    if type(golden) is not type(made):
        return where
    if isinstance(golden, dict):
        if list(golden) != list(made):
            return f"{where} keys"
        pairs = [(f"{where}.{key}", golden[key], made[key]) for key in golden]
    elif isinstance(golden, list):
        if len(golden) != len(made):
            return f"{where} length"
        rows = zip(golden, made, strict=True)
        pairs = [(f"{where}[{i}]", a, b) for i, (a, b) in enumerate(rows)]
    else:
        return "" if golden == made else where
    places = [difference(a, b, inner) for inner, a, b in pairs]
    return next(filter(None, places), "")


def test_the_steps_are_those_that_are_pinned(records: list[Path]) -> None:
    made = store.read_jsonl(records[0] / "steps.jsonl")
    assert difference(store.read_jsonl(GOLDEN), made) == ""


def test_a_difference_is_seen() -> None:
    """Lest the comparison above compare nothing."""
    golden = store.read_jsonl(GOLDEN)
    assert difference(golden, golden) == ""
    for change in (
        {"reason": "a whim"},
        {"bill": {**golden[1]["bill"], "train_tokens": golden[1]["bill"]["train_tokens"] + 1}},
        {"signal": {**golden[1]["signal"], "c2": golden[1]["signal"]["c2"] * 1.01}},
        {"more": 1},
    ):
        assert difference(golden, [golden[0], {**golden[1], **change}, *golden[2:]])


def test_the_pinned_run_has_all_that_a_run_can_have() -> None:
    steps = store.read_jsonl(GOLDEN)
    reasons = [step["reason"] for step in steps[1:]]
    assert {step["move"] for step in steps[1:]} == {"numerical", "symbolic"}
    # decided by the signal, and by demand
    assert {"LoRA still learns", "LoRA is saturated", "edits gain little"} <= set(reasons)
    assert reasons[-1] == "prompts failed: the last move is for weights"
    assert any(step["signal"]["c1"] is not None for step in steps)
    assert any("rewritten" in step["evidence"].get("pairs", {}) for step in steps)
    symbolic = [step["evidence"]["edits"] for step in steps if step["move"] == "symbolic"]
    accepted = [[edit["accepted"] for edit in edits] for edits in symbolic]
    # the best edit of a move passed the gate, and that of another one fell
    assert {sum(edits) for edits in accepted} == {0, 1}
    assert all(len(edits) > 1 for edits in accepted)


def test_two_processes_make_the_same_record_to_the_byte(records: list[Path]) -> None:
    first, second = records
    for name in ("steps.jsonl", "hidden.jsonl", "scores.csv", "remade.jsonl"):
        content = (first / name).read_bytes()
        assert content == (second / name).read_bytes(), name
        assert content
    receipts = [untimed(json.loads((record / "run.json").read_text())) for record in records]
    assert receipts[0] == receipts[1]


def untimed(receipt: dict[str, Any]) -> dict[str, Any]:
    """Return a receipt without what takes other seconds or megabytes each time."""
    cost = {name: value for name, value in receipt["cost"].items() if name not in TIMES}
    return receipt | {"cost": cost, "editor": receipt["editor"] | {"seconds": 0}}


if __name__ == "__main__":
    if len(sys.argv) > 1:
        make(Path(sys.argv[1]))
    else:
        GOLDEN.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(make(Path(folder)).absolute() / "steps.jsonl", GOLDEN)
