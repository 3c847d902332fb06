"""A run that was interrupted, or killed, goes on from its last finished move and ends with the same record."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, lowercase
from tinymodel import config, save_tiny_model

from nslora.editor.client import Request
from nslora.model.backbone import load
from nslora.runs.run import make_run
from nslora.runs.store import STATE, Store, read_jsonl
from nslora.types import StepRecord

# of a record: all but receipt and clock, which hold seconds
SAME = ("steps.jsonl", "hidden.jsonl", "scores.csv", "remade.jsonl")
TIMES = {"wall_s", "saved_s", "work_s", "moves_s", "peak_mb"}
# both kinds of moves in a row and by turns
MOVES = {"method": "fixed:SNNSN", "moves": 5, "rule": "lower_case", "seed": 1}
STREAM = {"task": "stream", "method": "alternate", "moves": 2, "rule": "lower_case"}


def make(
    tiny,
    folder: Path,
    watch: Callable[[StepRecord], None] = lambda step: None,
    reply: Callable[[Request], str] = lowercase,
    **settings,
) -> Path:
    cfg = config(**settings, backbone=tiny.name)
    place = Store(folder / "results", folder / "runs")
    return make_run(cfg, place, Scripted(reply), tiny, watch)


def contents(record: Path) -> tuple[dict[str, bytes], dict]:
    """Return what must be the same in two records of one run."""
    receipt = json.loads((record / "run.json").read_text())
    cost = {name: value for name, value in receipt["cost"].items() if name not in TIMES}
    receipt |= {"cost": cost, "editor": receipt["editor"] | {"seconds": 0}}
    return {name: (record / name).read_bytes() for name in SAME}, receipt


class Plug:
    """Is pulled after a number of calls."""

    def __init__(self, after: int) -> None:
        self.left, self.steps = after, 0

    def __call__(self, step: StepRecord) -> None:
        self.steps += 1
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def undisturbed(tiny_loaded, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return {
        "moves": contents(make(tiny_loaded, folder, **MOVES)),
        "stream": contents(make(tiny_loaded, folder, **STREAM)),
    }


@pytest.mark.parametrize("after", [1, 3, 6])
def test_an_interrupted_run_goes_on_with_its_next_move(undisturbed, tiny, tmp_path, after) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tiny, tmp_path, Plug(after), **MOVES)
    rest = Plug(0)
    record = make(tiny, tmp_path, rest, **MOVES)
    assert contents(record) == undisturbed["moves"]
    # the start and five moves: what was finished is not made again
    assert rest.steps == 6 - after
    steps = [row["step"] for row in read_jsonl(record / "clock.jsonl")]
    assert steps == list(range(6))
    assert not list(tmp_path.rglob(STATE))


@pytest.mark.parametrize("after", [3, 5])
def test_a_stream_goes_on_within_its_phase(undisturbed, tiny, tmp_path, after) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tiny, tmp_path, Plug(after), **STREAM)
    rest = Plug(0)
    record = make(tiny, tmp_path, rest, **STREAM)
    assert contents(record) == undisturbed["stream"]
    assert rest.steps == 9 - after


def test_a_run_that_ends_in_an_edit_makes_that_move_again(undisturbed, tiny, tmp_path) -> None:
    asked: list[Request] = []

    def cut_off(request: Request) -> str:
        asked.append(request)
        if len(asked) == 7:
            raise KeyboardInterrupt
        return lowercase(request)

    with pytest.raises(KeyboardInterrupt):
        make(tiny, tmp_path, reply=cut_off, **MOVES)
    assert contents(make(tiny, tmp_path, **MOVES)) == undisturbed["moves"]


def damage(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("name", [STATE, "adapter-03/adapter_model.safetensors"])
def test_a_damaged_state_is_named_and_the_run_begins_anew(
    undisturbed, tiny, tmp_path, name: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tiny, tmp_path, Plug(4), **MOVES)
    (path,) = (tmp_path / "runs").rglob(name)
    damage(path)
    rest = Plug(0)
    with pytest.warns(UserWarning, match=f"{path.name}.*begins anew"):
        record = make(tiny, tmp_path, rest, **MOVES)
    assert contents(record) == undisturbed["moves"]
    assert rest.steps == 6


def test_a_stream_with_damaged_weights_begins_in_its_first_phase(tiny, tmp_path) -> None:
    settings: dict[str, Any] = STREAM | {"method": "lora", "returned": "tuned"}
    undisturbed = contents(make(tiny, tmp_path / "undisturbed", **settings))
    with pytest.raises(KeyboardInterrupt):
        make(tiny, tmp_path, Plug(5), **settings)
    (path,) = (tmp_path / "runs").rglob(STATE)
    state = json.loads(path.read_text())["state"]
    assert state["phase"] and state["candidate"]["adapter"]
    damage(path.parent / state["candidate"]["adapter"] / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="begins anew"):
        record = make(tiny, tmp_path, **settings)
    assert contents(record) == undisturbed


def test_other_code_does_not_go_on(undisturbed, tiny, tmp_path, monkeypatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        make(tiny, tmp_path, Plug(4), **MOVES)
    monkeypatch.setattr("nslora.runs.state.code", lambda: "another")
    rest = Plug(0)
    with pytest.warns(UserWarning, match="of other code"):
        make(tiny, tmp_path, rest, **MOVES)
    assert rest.steps == 6


def test_killed_at_any_instant_it_ends_with_the_same_record(tmp_path: Path) -> None:
    """SIGKILL, at other instants each time, of a process that makes the run."""
    model = save_tiny_model(tmp_path / "tiny")
    path = os.pathsep.join([str(Path(__file__).absolute().parents[1]), *sys.path])
    env = {**os.environ, "PYTHONPATH": path}

    def start(folder: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, __file__, str(model), str(tmp_path / folder)]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE)

    def record(folder: str) -> Path:
        return next((tmp_path / folder / "results" / "records").iterdir())

    began = time.monotonic()
    with start("whole") as whole:
        assert whole.stdout is not None and whole.stdout.readline() == b"0\n"
        before = time.monotonic() - began
        whole.communicate()
    assert whole.returncode == 0
    moves = time.monotonic() - began - before

    chance = random.Random(0)
    for _ in range(2):
        with start("killed") as process:
            assert process.stdout is not None
            # the first step that this process makes: imports and loading are over
            process.stdout.readline()
            time.sleep(chance.uniform(0, moves / 2))
            process.send_signal(signal.SIGKILL)
    with start("killed") as last:
        last.communicate()
    assert last.returncode == 0
    assert contents(record("killed")) == contents(record("whole"))


if __name__ == "__main__":
    backbone = load(sys.argv[1], threads=1, dtype="float32", device="cpu")
    make(backbone, Path(sys.argv[2]), lambda step: print(step.step, flush=True), **MOVES)
