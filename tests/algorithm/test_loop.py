"""Whole runs on a real model: records, determinism, resume, what each method does, and a failing editor."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
from histories import step
from scripted import Scripted, down, helpful

from nslora.algorithm import loop
from nslora.config import RunConfig
from nslora.runs.run import make_run
from nslora.runs.store import Store
from nslora.tasks import build
from nslora.types import Move, Signal, StepRecord, UserError

CFG = RunConfig(
    backbone="smollm2-135m",
    items=3,
    test_items=3,
    moves=2,
    max_new_tokens=8,
    rank=4,
    lr=1e-3,
    candidates=2,
    replay_pool=8,
)


def run(cfg: RunConfig, store: Store, backbone, reply=helpful) -> tuple[dict, list[dict]]:
    with Scripted(reply) as editor:
        record = make_run(cfg, store, editor, backbone, watch=lambda step: None)
    steps = [json.loads(line) for line in (record / "steps.jsonl").read_text().splitlines()]
    return json.loads((record / "run.json").read_text()), steps


@pytest.fixture(scope="module")
def loaded():
    """The smallest backbone as runs load it: in bfloat16 where the processor has it, several times faster."""
    from nslora.model.backbone import load

    return load("smollm2-135m", threads=1)


@pytest.fixture
def bare(loaded):
    """The module's backbone, given back without an adapter."""
    yield loaded
    loaded.model = loaded.model.unload()


@pytest.fixture(scope="module")
def memo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the module's runs keep the frozen weights' replies, as the runs of one working folder do."""
    return tmp_path_factory.mktemp("memo")


def fresh(folder: Path, memo: Path) -> Store:
    """A store without any run, but with the frozen weights' replies."""
    (folder / "runs").mkdir(parents=True)
    (folder / "runs" / "memo").symlink_to(memo)
    return Store(folder / "results", folder / "runs")


@pytest.fixture
def store(tmp_path: Path, memo: Path) -> Store:
    return fresh(tmp_path, memo)


def test_a_record_tells_the_whole_run(store, bare) -> None:
    cfg = replace(CFG, method="alternate")
    summary, steps = run(cfg, store, bare)
    assert [s["move"] for s in steps] == ["stop", "symbolic", "numerical"]
    assert summary["run_id"] == cfg.run_id
    assert summary["config"]["lr"] == cfg.lr
    assert summary["weights"] == bare.identity
    assert summary["final"]["test"]["n"] == 9
    assert summary["cost"]["wall_s"] > summary["cost"]["moves_s"] > 0
    assert 0.5 < summary["cost"]["work_s"] / summary["cost"]["wall_s"] < 1
    assert summary["editor"]["calls"] > 0
    edits = steps[1]["detail"]["edits"]
    assert len(edits) >= 1 and all(
        "diff" in e and "problem" in e and "accepted" in e for e in edits
    )
    assert steps[2]["signal"]["c2"] > 0
    rows = list(
        csv.DictReader((store.record(cfg) / "scores.csv").read_text().splitlines(keepends=True))
    )
    assert {r["split"] for r in rows} <= {"test", "locality", "promptability"}
    test = [float(r["success"]) for r in rows if r["split"] == "test"]
    assert summary["final"]["test"]["success"] == pytest.approx(sum(test) / len(test))
    assert not list(store.record(cfg).rglob("*.safetensors"))


def test_a_run_repeats_itself_and_a_finished_one_is_not_run_again(
    store, bare, tmp_path, memo
) -> None:
    cfg = replace(CFG, method="alternate")
    first, steps = run(cfg, store, bare)
    before = (store.record(cfg) / "run.json").stat().st_mtime_ns
    run(cfg, store, bare)
    assert (store.record(cfg) / "run.json").stat().st_mtime_ns == before
    second, again = run(cfg, fresh(tmp_path / "other", memo), bare)
    assert second["final"] == first["final"]
    assert [untimed(s) for s in again] == [untimed(s) for s in steps]


def untimed(step: dict) -> dict:
    """A step without its wall time."""
    return {**step, "cost": {k: v for k, v in step["cost"].items() if k != "seconds"}}


def test_an_interrupted_run_starts_again_and_ends_the_same(store, bare, tmp_path, memo) -> None:
    cfg = replace(CFG, method="lora")

    def stop_after_one(step) -> None:
        if step.step == 1:
            raise KeyboardInterrupt

    with Scripted(helpful) as editor, pytest.raises(KeyboardInterrupt):
        make_run(cfg, store, editor, bare, watch=stop_after_one)
    assert not store.done(cfg)
    resumed, _ = run(cfg, store, bare)
    undisturbed, _ = run(cfg, fresh(tmp_path / "other", memo), bare)
    assert resumed["final"] == undisturbed["final"]
    assert len((store.record(cfg) / "steps.jsonl").read_text().splitlines()) == 3


def test_the_best_step_can_be_asked_to_have_tuned_weights() -> None:
    def reached(number: int, move: Move, success: float, adapter: str | None) -> StepRecord:
        made = step(number, move, Signal())
        return replace(made, dev={"success": success, "value": success}, adapter=adapter)

    start, edit = reached(0, Move.STOP, 0.0, None), reached(1, Move.SYMBOLIC, 0.5, None)
    tuned = [
        reached(2, Move.NUMERICAL, 0.25, "adapter-02"),
        reached(3, Move.SYMBOLIC, 0.25, "adapter-02"),
    ]
    history = [start, edit, *tuned]
    assert loop.best(history, CFG) is edit
    assert loop.best(history, replace(CFG, returned="tuned")) is tuned[0]
    assert loop.best(history[:2], replace(CFG, returned="tuned")) is edit


def test_frozen_makes_no_move_and_lora_no_call(store, bare) -> None:
    frozen, steps = run(replace(CFG, method="frozen"), store, bare)
    assert len(steps) == 1 and frozen["best"]["step"] == 0 and frozen["editor"]["calls"] == 0
    assert frozen["final"]["locality"]["content"] == 1.0
    lora, steps = run(replace(CFG, method="lora"), store, bare)
    assert [s["move"] for s in steps[1:]] == ["numerical"] * 2
    assert lora["editor"]["calls"] == 0
    assert all(set(s["detail"]["pairs"]) <= {"gold", "sampled", "replay"} for s in steps[1:])


def test_an_editor_that_is_down_costs_the_edit_not_the_run(store, bare) -> None:
    summary, steps = run(replace(CFG, method="textgrad"), store, bare, reply=down)
    assert [s["move"] for s in steps[1:]] == ["symbolic"] * 2
    assert all(e["problem"] for s in steps[1:] for e in s["detail"]["edits"])
    assert steps[-1]["prompt"] == steps[0]["prompt"]
    assert summary["final"]["test"]["n"] == 9


def test_routed_methods_record_what_each_input_was_thought_to_need(store, bare) -> None:
    for method in ("neurosymbolic", "oracle", "classifier"):
        _, steps = run(replace(CFG, method=method, moves=1), store, bare)
        needs = steps[1]["detail"]["needs"]
        assert len(needs) == 9 and {row[1] for row in needs} == {"content", "style", "both"}
        assert set(steps[1]["demand"]) == {"content", "style"}


def test_a_stream_goes_on_from_the_best_of_each_phase(store, bare) -> None:
    cfg = replace(
        CFG, task="stream", rule="json", method="alternate", moves=2, test_items=6, replay=0.0
    )
    summary, steps = run(cfg, store, bare)
    assert [s["step"] for s in steps] == list(range(9))
    assert [s["move"] for s in steps] == ["stop", "symbolic", "numerical"] * 3
    assert {
        split: row["n"] for split, row in summary["final"].items() if split.startswith("test")
    } == {
        "test-1": 12,
        "test-2": 12,
        "test": 12,
    }
    assert [s["dev"]["n"] for s in steps[::3]] == [
        6,
        9,
        9,
    ]  # three more facts from the second phase on
    for phase in (1, 2):
        earlier, start = steps[3 * phase - 3 : 3 * phase], steps[3 * phase]
        best = max(earlier, key=lambda s: (s["dev"]["success"], s["dev"]["value"], -s["step"]))
        assert (start["prompt"], start["adapter"]) == (best["prompt"], best["adapter"])
    assert summary["best"]["step"] >= 6


def test_the_test_split_is_scored_once(store, bare, monkeypatch) -> None:
    touched = []
    real = build.Task.examples

    def spy(task, split):
        touched.append(split)
        return real(task, split)

    monkeypatch.setattr(build.Task, "examples", spy)
    run(replace(CFG, method="alternate", moves=1, seed=1), store, bare)
    assert touched.count("test") == 1
    assert touched[-1] == "test" or "dev" not in touched[touched.index("test") :]


def test_unknown_backbones_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "results", tmp_path / "work")
    with pytest.raises(UserError):
        make_run(replace(CFG, backbone="gpt-9"), store)
    assert list(tmp_path.iterdir()) == []
