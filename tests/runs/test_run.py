"""A whole run: the files and fields of its record (schema 2), and that it ends the same when it was killed."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from scripted import Scripted, lowercase
from tinymodel import config

from nslora.algorithm.session import Session
from nslora.config import RunConfig
from nslora.runs import run as runs
from nslora.runs.run import make_run
from nslora.runs.store import FILES, Store, read_jsonl
from nslora.tasks.build import build
from nslora.types import Candidate, Pair, Prompt, StepRecord, UserError

SETTINGS: dict[str, Any] = {"rule": "lower_case", "seed": 1, "moves": 2, "gate": False}
CELLS = {"frozen+initial", "frozen+final", "tuned+initial", "tuned+final"}


@pytest.fixture
def cfg(tiny) -> RunConfig:
    """A run that ends with tuned weights and another prompt."""
    return config(**SETTINGS, method="alternate", returned="tuned", backbone=tiny.name)


def quiet(step: StepRecord) -> None:
    """Watch nothing."""


def make(
    cfg: RunConfig, place: Store, backbone, watch: Callable[[StepRecord], None] = quiet
) -> Path:
    with Scripted(lowercase) as editor:
        return make_run(cfg, place, editor, backbone, watch=watch)


def receipt(record: Path) -> dict[str, Any]:
    return json.loads((record / "run.json").read_text(encoding="utf-8"))


def scores(record: Path) -> list[dict[str, str]]:
    with (record / "scores.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_record_tells_the_whole_run(cfg, store, tiny) -> None:
    cfg = cfg.but(study="ablations")
    record = make(cfg, store, tiny)
    assert {path.name for path in record.iterdir()} == {*FILES, "SHA256SUMS"}
    told = receipt(record)
    assert told["schema"] == 2 and told["study"] == "ablations"
    assert told["run_id"] == cfg.run_id == record.name
    # settings that stand for the method's own are resolved
    assert told["config"]["targets"] == "remade" and told["config"]["needs"] == "none"
    assert told["config"] == cfg.settings
    assert told["weights"] == tiny.identity
    assert told["environment"]["dtype"] == "float32" and told["environment"]["threads"] == 1

    steps = read_jsonl(record / "steps.jsonl")
    assert told["schedule"] == "SN"
    assert [s["move"] for s in steps] == ["start", "symbolic", "numerical"]
    assert steps[0].keys() == set(StepRecord.__dataclass_fields__)
    clock = read_jsonl(record / "clock.jsonl")
    assert [row["step"] for row in clock] == [0, 1, 2] and all(row["seconds"] > 0 for row in clock)
    cost = told["cost"]
    assert cost["wall_s"] > cost["moves_s"] > 0 and cost["wall_s"] > cost["work_s"] > 0
    moves = [row["seconds"] for row in clock[1:]]
    assert cost["moves_s"] == pytest.approx(sum(moves))
    assert cost["train_tokens"] == sum(s["bill"]["train_tokens"] for s in steps) > 0
    # the final evaluation and the reference come on top of the moves
    assert cost["generated_tokens"] > sum(s["bill"]["generated_tokens"] for s in steps[1:])
    assert told["editor"]["calls"] == sum(s["bill"]["editor_calls"] for s in steps) > 0
    assert not list(record.rglob("*.safetensors"))

    best = told["best"]
    assert best["step"] == 2 and best["prompt"] == steps[2]["prompt"]
    initial = build(cfg).initial_prompt
    kept = "".join(token for op, token in best["prompt_diff"] if op != "+")
    assert kept == initial.both

    rows = scores(record)
    assert {row["split"] for row in rows} <= {"test", "locality", "promptability", *CELLS}
    for split, final in (told["final"] | told["factorial"]).items():
        success = [float(row["success"]) for row in rows if row["split"] == split]
        assert final["n"] == len(success)
        assert final["success"] == pytest.approx(sum(success) / len(success))
    assert told["final"]["test"]["n"] == 3 * cfg.test_items

    remade = read_jsonl(record / "remade.jsonl")
    assert len(remade) == told["remade"] > 0
    assert {row["run"] for row in remade} == {cfg.run_id}

    # the four cells are what scoring each weights and prompt gives
    run = Session(cfg, build(cfg), tiny, Scripted(lowercase), store.scratch(cfg), store.memo)
    final = Prompt(**best["prompt"])
    assert final != initial and told["factorial"].keys() == CELLS
    for weights, adapter in (("tuned", steps[2]["adapter"]), ("frozen", None)):
        run.use(Candidate(final, adapter))
        for name, prompt in (("initial", initial), ("final", final)):
            cell = f"{weights}+{name}"
            outputs = [s.output for s in run.score(prompt, run.task.test)]
            assert [row["output"] for row in rows if row["split"] == cell] == outputs
    test = [row["output"] for row in rows if row["split"] == "test"]
    assert test == [row["output"] for row in rows if row["split"] == "tuned+final"]


def test_hidden_records_hold_what_no_method_saw(store, tiny) -> None:
    cfg = config(**SETTINGS, method="oracle", backbone=tiny.name)
    record = make(cfg, store, tiny)
    hidden = read_jsonl(record / "hidden.jsonl")
    assert [row["step"] for row in hidden] == [0, 1, 2]
    task = build(cfg)
    assert hidden[0]["needs"] == []
    for row in hidden[1:]:
        assert set(row["dev"]) == set(runs.PARTS)
        assert [need[0] for need in row["needs"]] == [e.id for e in task.feedback]
        needs = {example: task.hidden[example].need.value for example, *_ in row["needs"]}
        assert all(needs[example] == need for example, need, *_ in row["needs"])


def test_what_can_be_forgotten_is_what_the_frozen_weights_could_do(cfg, store, tiny) -> None:
    run = Session(cfg, build(cfg), tiny, Scripted(lowercase), store.begin(cfg), store.memo)
    reference = run.abilities
    assert set(reference) == {"locality", "promptability"}
    initial = Candidate(run.task.initial_prompt)
    rows = runs.final_rows(run, initial)
    # frozen weights have forgotten nothing
    for split in ("locality", "promptability"):
        assert {s.example.id for s in rows.get(split, [])} == {e.id for e in reference[split]}
    assert all(s.reward.success for s in rows.get("locality", []))
    # a random model knows nothing, but happens to obey some instructions
    assert reference["promptability"] and len(run.task.locality) >= 100
    assert len(run.task.promptability) >= 100


def test_a_stream_is_tested_at_the_end_of_each_phase(store, tiny) -> None:
    cfg = config(**SETTINGS, task="stream", method="textgrad", backbone=tiny.name).but(moves=1)
    final = receipt(make(cfg, store, tiny))["final"]
    assert {split for split in final if split.startswith("test")} == {"test-1", "test-2", "test"}


def test_a_run_made_second_in_a_process_is_the_same(cfg, tiny, tmp_path) -> None:
    """Whatever the editor that they share has spent before."""
    first, alone = (Store(tmp_path / n / "results", tmp_path / n / "runs") for n in "ab")
    with Scripted(lowercase) as shared:
        make_run(cfg.but(seed=2), first, shared, tiny, watch=quiet)
        spent = shared.ledger.calls
        second = make_run(cfg, first, shared, tiny, watch=quiet)
        assert shared.ledger.calls > spent > 0
    other = make(cfg, alone, tiny)
    for name in ("steps.jsonl", "hidden.jsonl", "scores.csv", "remade.jsonl"):
        assert (second / name).read_bytes() == (other / name).read_bytes()
    assert receipt(second)["editor"] == receipt(other)["editor"]


def test_a_finished_run_is_not_made_again(cfg, store, tiny) -> None:
    record = make(cfg.but(method="frozen"), store, tiny)
    before = (record / "run.json").stat().st_mtime_ns
    assert make(cfg.but(method="frozen"), store, tiny) == record
    assert (record / "run.json").stat().st_mtime_ns == before


def test_an_unknown_backbone_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    place = Store(tmp_path / "results", tmp_path / "work")
    with pytest.raises(UserError, match="gpt-9"):
        make_run(config(backbone="gpt-9"), place)
    assert list(tmp_path.iterdir()) == []


def test_remade_rows_are_verified_pairs_with_their_provenance_each_once() -> None:
    initial, refined = Prompt(), Prompt("Say over.")
    made = Pair(refined, "Capital of Peru?", "Lima. Over.", "remade", "peru")
    baked = Pair(initial, "Capital of Chad?", "N'Djamena. Over.", "rewritten", "chad", refined)
    others = [
        Pair(initial, "?", "x", source, "x")
        for source in ("gold", "replay", "sampled", "unverified", "demonstrated")
    ]
    cfg = RunConfig()
    rows = runs.remade_rows(cfg, initial, [made, made, baked, *others])
    assert [(row["parent"], row["source"]) for row in rows] == [
        ("peru", "remade"),
        ("chad", "rewritten"),
    ]
    for row in rows:
        assert row["reward"] == 1.0 and row["run"] == cfg.run_id
        # the prompt that brought it, also where it was baked in
        assert ["+", "Say"] in cast(list[object], row["prompt_diff"])
    assert rows[1]["system"] == initial.system


def test_a_stream_grades_each_phase_by_its_own_task(cfg, store, tiny) -> None:
    """The second phase has facts that the first had not, the third another rule."""
    record = make(cfg.but(task="stream", method="fixed:S", rule="json", moves=1), store, tiny)
    told = receipt(record)
    assert told["schedule"] == "SSS"
    for phase, split in enumerate(("test-1", "test-2", "test")):
        task = build(cfg.but(task="stream", rule="json"), phase)
        rows = [row for row in scores(record) if row["split"] == split]
        assert {row["id"] for row in rows} == {e.id for e in task.test}
        examples = {e.id: e for e in task.test}
        rewards = [task.reward(examples[row["id"]], row["output"]) for row in rows]
        assert [float(row["style"]) for row in rows] == [r.parts["style"] for r in rewards]
        assert told["final"][split]["n"] == len(rows)
