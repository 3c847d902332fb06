"""Torture: hundreds of faulty calls. None is lost silently, none is charged twice, the run goes on."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faulty import ASK, FAULTS, KEY, Faulty, Step, completion, echo, refusal, serving
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted import lowercase
from tinymodel import config

from nslora.editor.client import Editor, EditorError, Request
from nslora.editor.ledger import Budget
from nslora.runs.run import make_run
from nslora.runs.store import Store, read_jsonl
from nslora.types import StepRecord, UserError

SLOW = {"silent", "drip", "drip of headers"}
PASSING = {name: fault for name, fault in FAULTS.items() if name not in SLOW}
FINAL = {
    "401": refusal(401, f"Incorrect API key {KEY}"),
    "402": refusal(402, "Pay first"),
    "404": refusal(404, "no such model"),
    "too long": refusal(400, "max_tokens exceed the context"),
    "late": (429, {"retry-after": "86400"}, b"{}"),
}
CUT = {
    "cut": (200, {}, completion("It is", "length", prompt_tokens=5000, completion_tokens=5)),
    "thoughts": (200, {}, completion(None, "length", {"reasoning": "Hm."}, prompt_tokens=5000)),
}
ALL: dict[str, Any] = PASSING | FINAL | CUT


@pytest.fixture(scope="module")
def server() -> Iterator[Faulty]:
    """One endpoint for all tests, with a key, and no pause before another attempt."""
    with pytest.MonkeyPatch.context() as patch, serving() as endpoint:
        patch.setenv("NSLORA_EDITOR_KEY", KEY)
        patch.setattr("nslora.editor.attempt.PAUSE_S", 0.0)
        yield endpoint


def expected(faults: list[str]) -> tuple[bool, int]:
    """Return whether a request whose attempts fail so is answered, and how many are made."""
    rooms, passing, cut_text = 2, 1, False
    for made, fault in enumerate(faults, 1):
        if fault in CUT and rooms and (fault == "thoughts" or made == 1):
            rooms -= 1
        elif fault == "cut":
            return True, made
        elif fault in FINAL or not passing:
            return cut_text, made
        else:
            passing -= 1
        cut_text |= fault == "cut"
    return True, len(faults) + 1


def torture(server: Faulty, folder: Path, plan: list[list[str]], caplog: Any) -> int:
    """Ask for as many replies as the plan has lists of faults; return the faulty calls."""
    monkey = pytest.MonkeyPatch()
    monkey.setenv("NSLORA_EDITOR_KEY", KEY)
    monkey.setenv("NSLORA_EDITOR_PRICE", "1,2")
    asks = [replace(ASK, seed=seed) for seed in range(len(plan))]
    server.seen.clear()
    server.by_seed.clear()
    caplog.clear()
    spent = folder / "spent.json"
    recordings = folder / "recordings"
    budget = Budget(calls=1e6)
    with Editor("gpt", server.url, "auto", recordings, budget, spent=spent) as editor:
        editor.check()
        before = replace(editor.ledger)
        for seed, faults in enumerate(plan):
            server.by_seed[seed].extend(ALL[fault] for fault in faults)
        outcomes = editor.complete_all(asks)
    monkey.undo()

    answered = [isinstance(outcome, str) for outcome in outcomes]
    asked = [seen for seen in server.seen if seen["messages"][0]["content"] == ASK.system]
    attempts = Counter(seen["seed"] for seen in asked)
    assert list(zip(answered, [attempts[s] for s in range(len(plan))], strict=True)) == [
        expected(faults) for faults in plan
    ]
    ledger = editor.ledger - before
    lost = answered.count(False)
    assert (ledger.calls, ledger.replayed, ledger.lost) == (len(plan), 0, lost)
    assert ledger.retries == sum(attempts.values()) - len(plan)
    # each loss is said in a line of its own
    said = [record.getMessage() for record in caplog.records]
    errors = [str(outcome) for outcome in outcomes if isinstance(outcome, EditorError)]
    assert said == [f"a request to the editor is lost: {error}" for error in errors]
    # recordings, ledger and the shared count agree: nothing is charged twice, nothing is forgotten
    replies = [json.loads(path.read_text())["reply"] for path in recordings.iterdir()]
    assert len(replies) == len(plan)
    for name in ("tokens_in", "tokens_out"):
        assert sum(reply[name] for reply in replies) == getattr(ledger, name)
    # every attempt that the endpoint has counted is paid for; it does not count all of them
    cut = sum(fault in CUT for seed, f in enumerate(plan) for fault in f[: attempts[seed]])
    whole = sum(attempts[seed] > len(faults) for seed, faults in enumerate(plan))
    assert ledger.tokens_in >= 5000 * cut + 100 * whole
    totals = json.loads(spent.read_text())
    assert totals["calls"] == 1 + sum(attempts.values())
    assert totals["tokens"] == editor.ledger.tokens
    assert totals["money"] == pytest.approx(editor.ledger.money)
    dollars = (editor.ledger.tokens_in + 2 * editor.ledger.tokens_out) / 1e6
    assert editor.ledger.money == pytest.approx(dollars)
    # the same again without an endpoint
    with Editor("gpt", "http://127.0.0.1:9/v1", "replay", recordings) as again:
        assert list(map(repr, again.complete_all(asks))) == list(map(repr, outcomes))
    assert replace(again.ledger, calls=len(plan), replayed=0, seconds=0, money=0) == replace(
        ledger, seconds=0, money=0
    )
    written = [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert KEY not in "".join([*written, *said])
    return sum(min(len(faults), attempts[seed]) for seed, faults in enumerate(plan))


def test_all_faults_are_accounted_for(kind, server: Faulty, tmp_path, caplog) -> None:
    """Rounds of 60 requests, each with up to three faults before it is answered or lost."""
    trial = kind("faulty calls of the editor")
    rng = np.random.default_rng(0)

    def check(round_: int) -> None:
        plan = [list(rng.choice(list(ALL), rng.integers(4))) for _ in range(20)]
        # each call is a case, the round another
        trial.tried += torture(server, tmp_path / str(round_), plan, caplog) - 1

    trial.each(range(trial.number(12)), check)


def test_slow_faults_are_accounted_for_too(kind, server: Faulty, quick_to_give_up) -> None:
    """An endpoint that says nothing, or a byte now and then, is given up in time."""
    trial = kind("faulty calls of the editor")
    names = sorted(SLOW)

    def check(n: int) -> None:
        server.by_seed.clear()
        server.by_seed[n].append(FAULTS[names[n % len(names)]])
        with Editor("gpt", server.url, budget=quick_to_give_up) as editor:
            assert editor.complete(replace(ASK, seed=n)) == f"reply {n}"
        assert (editor.ledger.retries, editor.ledger.lost) == (1, 0)

    trial.each(range(trial.number(6)), check)


@pytest.fixture
def quick_to_give_up() -> Budget:
    """A budget of time that no slow answer keeps."""
    return Budget(attempt_s=0.3)


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=st.lists(st.lists(st.sampled_from(list(ALL)), max_size=4), min_size=1, max_size=6))
def test_any_faults_are_all_accounted_for(server: Faulty, tmp_path_factory, caplog, plan) -> None:
    torture(server, tmp_path_factory.mktemp("torture"), plan, caplog)


# ---- whole runs


def scripted(body: dict[str, Any]) -> Step:
    """Answer as a good editor would."""
    *system, user = [message["content"] for message in body["messages"]]
    request = Request("".join(system), user, body["seed"])
    return 200, {}, completion(lowercase(request), prompt_tokens=50, completion_tokens=9)


def quiet(step: StepRecord) -> None:
    """Watch nothing."""


@pytest.fixture
def lively(server: Faulty) -> Iterator[Faulty]:
    """An endpoint that answers as a good editor, but for what its script says."""
    server.seen.clear()
    server.by_seed.clear()
    server.reply = scripted
    yield server
    server.script.clear()
    server.reply = echo


def make(place: Store, backbone: Any, url: str, **more: Any) -> tuple[list[Any], dict[str, Any]]:
    """Make a run with a remote editor; return its steps and its receipt."""
    settings = {"rule": "lower_case", "method": "alternate", "gate": False, "moves": 3}
    cfg = config(**settings, backbone=backbone.name, editor_url=url, **more)
    record = make_run(cfg, place, backbone=backbone, watch=quiet)
    return read_jsonl(record / "steps.jsonl"), json.loads((record / "run.json").read_text())


def test_a_run_goes_on_through_faults(lively: Faulty, store: Store, tiny, caplog) -> None:
    rng = np.random.default_rng(1)
    faults = [ALL[name] for name in rng.choice(list(ALL), 40)]
    # the check is answered, and in between some calls are
    lively.script.extend([lambda handler, body: scripted(body), *faults])
    steps, receipt = make(store, tiny, lively.url)
    assert receipt["schedule"] == "SNS"
    editor = receipt["editor"]
    assert editor["lost"] == len(caplog.records) > 0 < editor["retries"]
    assert editor["error"] == str(caplog.records[-1].args[0])
    requests = editor["calls"] + editor["replayed"] + editor["retries"]
    assert requests == sum(step["bill"]["editor_calls"] for step in steps)
    # but for the check
    assert requests == len(lively.seen) - 1
    edits = [edit for step in steps for edit in step["evidence"].get("edits", [])]
    assert "editor" in {edit["problem"] for edit in edits}


def test_an_endpoint_that_dies_costs_edits_not_the_run(store: Store, tiny, monkeypatch) -> None:
    monkeypatch.setenv("NSLORA_EDITOR_KEY", KEY)
    with serving() as endpoint:
        endpoint.reply = scripted

        def die(step: StepRecord) -> None:
            if step.step == 1:
                endpoint.reply = lambda body: refusal(401, "the key has expired")

        settings = {"rule": "lower_case", "method": "textgrad", "gate": False, "moves": 3}
        cfg = config(**settings, backbone=tiny.name, editor_url=endpoint.url)
        record = make_run(cfg, store, backbone=tiny, watch=die)
    steps = read_jsonl(record / "steps.jsonl")
    assert [step["move"] for step in steps[1:]] == ["symbolic"] * 3
    first, *others = [{e["problem"] for e in s["evidence"]["edits"]} for s in steps[1:]]
    assert "" in first
    assert others == [{"editor"}] * 2
    editor = json.loads((record / "run.json").read_text())["editor"]
    assert editor["lost"] > 0
    assert editor["error"].endswith("(status 401): the key has expired")


def test_a_useless_endpoint_stops_a_run_before_anything_is_loaded(
    lively: Faulty, store: Store
) -> None:
    lively.script.append(refusal(401, "no such key"))
    cfg = config(method="textgrad", backbone="smollm2-135m", editor_url=lively.url)
    with pytest.raises(UserError, match=r"refuses the key \(status 401\)"):
        make_run(cfg, store, watch=quiet)
    assert not list(store.work.rglob("steps.jsonl"))
    assert not store.results.exists()


def test_a_budget_is_kept_by_runs_that_share_a_folder(
    lively: Faulty, store: Store, tiny, monkeypatch
) -> None:
    monkeypatch.setenv("NSLORA_EDITOR_BUDGET", "calls=12")
    _, receipt = make(store, tiny, lively.url)
    # the check is one of them
    assert receipt["editor"]["calls"] == len(lively.seen) - 1 == 11
    assert receipt["editor"]["lost"] > 0
    assert receipt["editor"]["error"] == "the editor's budget of 12 calls is spent"
    with pytest.raises(UserError, match=r"^the editor's budget of 12 calls is spent\.$"):
        make(store, tiny, lively.url, seed=1)
    assert len(lively.seen) == 12
