"""The editor against a real HTTP server on loopback: what it asks, keeps, counts and loses."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from dataclasses import replace

import pytest
from faulty import ASK, FAULT, FAULTS, KEY, OK, Faulty, Handler, completion, echo, refusal, say

from nslora.editor.client import Editor, EditorError, Request
from nslora.editor.ledger import Budget, Ledger
from nslora.types import UserError

# nobody listens there
NOWHERE = "http://127.0.0.1:9/v1"


def test_a_reply_and_its_cost(endpoint: Faulty, monkeypatch) -> None:
    monkeypatch.setenv("NSLORA_EDITOR_PRICE", "2.5,10")
    start = time.monotonic()
    with Editor("gpt", endpoint.url) as editor:
        assert editor.complete(ASK) == "reply 7"
    elapsed = time.monotonic() - start
    [seen] = endpoint.seen
    assert seen["messages"] == [
        {"role": "system", "content": ASK.system},
        {"role": "user", "content": ASK.user},
    ]
    assert (seen["model"], seen["seed"], seen["temperature"]) == ("gpt", 7, 0.7)
    assert seen["max_tokens"] == 160
    assert seen["authorization"] == f"Bearer {KEY}"
    ledger = editor.ledger
    assert 0 < ledger.seconds <= elapsed
    money = (100 * 2.5 + 10 * 10) / 1e6
    spent = Ledger(calls=1, tokens_in=100, tokens_out=10, money=money)
    assert replace(ledger, seconds=0) == spent


def test_an_empty_system_prompt_sends_no_system_message(endpoint: Faulty) -> None:
    with Editor("gpt", endpoint.url) as editor:
        editor.complete(Request("", "Hello", 1))
    assert [m["role"] for m in endpoint.seen[0]["messages"]] == ["user"]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_retried_once_and_then_is_an_error(
    endpoint: Faulty, quick, caplog, name
) -> None:
    fault = FAULTS[name]
    endpoint.script.extend([fault, OK, fault, fault])
    start = time.monotonic()
    with Editor("gpt", endpoint.url, budget=Budget(attempt_s=0.3)) as editor:
        assert editor.complete(ASK) == "fine"
        with pytest.raises(EditorError, match="^the editor") as caught:
            editor.complete(replace(ASK, seed=8))
    assert time.monotonic() - start < 5
    assert len(endpoint.seen) == 4
    ledger = editor.ledger
    assert (ledger.calls, ledger.retries, ledger.lost) == (2, 2, 1)
    assert ledger.error == str(caught.value)
    # every loss is said once, in one line
    [record] = caplog.records
    assert record.getMessage() == f"a request to the editor is lost: {caught.value}"
    assert "\n" not in record.getMessage()
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("status", [400, 401, 402, 403, 404, 405, 413, 422, 301, 308])
def test_what_would_fail_alike_is_not_tried_again(endpoint: Faulty, status) -> None:
    endpoint.script.extend([OK, refusal(status, "Not you,\nnot now.")])
    with Editor("gpt", endpoint.url) as editor:
        editor.complete(ASK)
        # an endpoint that has answered before costs an edit, not the run
        with pytest.raises(EditorError, match=rf"\(status {status}\): Not you, not now\."):
            editor.complete(replace(ASK, seed=8))
    assert len(endpoint.seen) == 2
    assert (editor.ledger.calls, editor.ledger.retries, editor.ledger.lost) == (2, 0, 1)


def test_an_endpoint_that_is_not_there_is_lost_in_one_line(caplog) -> None:
    with Editor("gpt", NOWHERE, budget=Budget(attempt_s=5)) as editor:
        [reply] = editor.complete_all([ASK])
    assert isinstance(reply, EditorError)
    assert "cannot be reached (ConnectError)" in str(reply)
    assert len(caplog.records) == 1


def test_tokens_of_unusable_replies_are_paid_for(endpoint: Faulty, quick, monkeypatch) -> None:
    monkeypatch.setenv("NSLORA_EDITOR_PRICE", "1,1")
    noise = (200, {}, completion("......", prompt_tokens=100, completion_tokens=6))
    endpoint.script.extend([noise, OK, noise, noise])
    with Editor("gpt", endpoint.url) as editor:
        editor.complete_all([ASK])
        editor.complete_all([replace(ASK, seed=8)])
    ledger = editor.ledger
    assert (ledger.tokens_in, ledger.tokens_out) == (400, 28)
    assert ledger.money == pytest.approx(428e-6)
    assert ledger.requests == 4


def test_retry_after_is_kept_and_a_long_one_is_not_waited_for(endpoint: Faulty) -> None:
    soon, late = (429, {"retry-after": "0.4"}, b"{}"), (429, {"retry-after": "3600"}, b"{}")
    dated = (503, {"retry-after": "Wed, 21 Oct 2099 07:28:00 GMT"}, b"{}")
    endpoint.script.extend([soon, OK, late, dated])
    with Editor("gpt", endpoint.url) as editor:
        start = time.monotonic()
        assert editor.complete(ASK) == "fine"
        assert time.monotonic() - start >= 0.4
        with pytest.raises(EditorError, match=r"status 429\); it asks to wait for 3600 s"):
            editor.complete(replace(ASK, seed=8))
        with pytest.raises(EditorError, match=r"status 503\); it asks to wait for \d{9,} s"):
            editor.complete(replace(ASK, seed=9))
    assert len(endpoint.seen) == 4


@pytest.mark.parametrize("usage", [None, [1], {"prompt_tokens": None}, {"prompt_tokens": -5}])
def test_tokens_are_guessed_when_the_endpoint_does_not_count(endpoint: Faulty, usage) -> None:
    import json

    message = {"message": {"content": "a b c d"}}
    endpoint.script.append((200, {}, json.dumps({"choices": [message], "usage": usage}).encode()))
    with Editor("gpt", endpoint.url) as editor:
        editor.complete(ASK)
    # so that the budget holds all the same
    assert editor.ledger.tokens_in > 0
    assert editor.ledger.tokens_out > 0


def test_complete_all_keeps_order_and_asks_together(endpoint: Faulty) -> None:
    together = threading.Barrier(3, timeout=10)

    def meet(handler: Handler, body: dict) -> tuple:
        # breaks unless three requests are in flight at once
        together.wait()
        return echo(body)

    endpoint.script.extend([meet] * 3)
    with Editor("gpt", endpoint.url) as editor:
        replies = editor.complete_all([replace(ASK, seed=s) for s in (3, 1, 2, 1)])
    assert replies == ["reply 3", "reply 1", "reply 2", "reply 1"]
    # equal requests are made once
    assert len(endpoint.seen) == 3


def test_an_editor_answers_in_a_notebook_where_a_loop_is_running(endpoint: Faulty) -> None:
    async def cell() -> str:
        with Editor("gpt", endpoint.url) as editor:
            return editor.complete(ASK)

    assert asyncio.run(cell()) == "reply 7"


def test_one_failure_leaves_the_other_replies(endpoint: Faulty) -> None:
    with Editor("gpt", endpoint.url, budget=Budget(calls=2)) as editor:
        first, second, third = editor.complete_all([replace(ASK, seed=s) for s in (1, 2, 3)])
    assert (first, second) == ("reply 1", "reply 2")
    assert isinstance(third, EditorError)
    assert "budget of 2 calls" in str(third)
    assert (editor.ledger.calls, editor.ledger.lost) == (2, 1)


def test_what_is_recorded_is_not_called_again_and_costs_the_same(
    endpoint: Faulty, tmp_path, quick
) -> None:
    asks = [replace(ASK, seed=s) for s in (1, 2, 3)]
    endpoint.by_seed[2].append(FAULT)
    budget = Budget(tokens=150)
    with Editor("gpt", endpoint.url, recordings=tmp_path, budget=budget) as made:
        wanted = [str(made.complete_all([ask])[0]) for ask in asks]
    assert "budget" in wanted[2]
    # the budget's refusal is replayed, too
    with Editor("gpt", NOWHERE, "replay", recordings=tmp_path) as again:
        assert [str(again.complete_all([ask])[0]) for ask in asks] == wanted
    assert (made.ledger.calls, made.ledger.retries, made.ledger.lost) == (2, 1, 1)
    assert replace(again.ledger, calls=2, replayed=0) == made.ledger
    assert again.ledger.requests == made.ledger.requests + 1
    # nothing stays refused for good
    with Editor("gpt", endpoint.url, recordings=tmp_path, budget=budget) as later:
        assert later.complete(asks[2]) == "reply 3"
        assert later.complete(asks[0]) == "reply 1"
    assert not list(tmp_path.glob("*.part"))


def test_record_calls_and_overwrites_and_live_keeps_nothing(endpoint: Faulty, tmp_path) -> None:
    endpoint.script.extend((200, {}, completion(text)) for text in ("old", "new", "other"))
    for mode in ("record", "record", "live", "auto"):
        with Editor("gpt", endpoint.url, mode, recordings=tmp_path) as editor:
            reply = editor.complete(ASK)
    assert reply == "new"
    assert len(endpoint.seen) == 3


def test_a_failure_is_replayed_as_one_but_tried_again_when_calls_are_allowed(
    endpoint: Faulty, tmp_path, quick
) -> None:
    endpoint.script.extend([FAULT, FAULT])
    with Editor("gpt", endpoint.url, recordings=tmp_path) as editor, pytest.raises(EditorError):
        editor.complete(ASK)
    with Editor("gpt", endpoint.url, "replay", recordings=tmp_path) as editor:
        with pytest.raises(EditorError, match="status 500"):
            editor.complete(ASK)
        assert (editor.ledger.replayed, editor.ledger.retries, editor.ledger.lost) == (1, 1, 1)
    with Editor("gpt", endpoint.url, recordings=tmp_path) as editor:
        assert editor.complete(ASK) == "reply 7"


def test_noise_is_not_recorded(endpoint: Faulty, tmp_path, quick) -> None:
    endpoint.script.extend([(200, {}, completion("......"))] * 2)
    with Editor("gpt", endpoint.url, recordings=tmp_path) as editor:
        assert isinstance(editor.complete_all([ASK])[0], EditorError)
        [path] = tmp_path.iterdir()
        assert "......" not in path.read_text()
        # the next time it is asked for again
        assert editor.complete(ASK) == "reply 7"
    assert "reply 7" in path.read_text()


def test_the_key_is_in_no_file_no_log_and_no_traceback(
    endpoint: Faulty, tmp_path, quick, caplog, capsys
) -> None:
    # below that, httpcore shows whatever headers an endpoint sends
    caplog.set_level(logging.INFO)
    echoes = [
        refusal(401, f"Incorrect API key provided: {KEY}."),
        refusal(503, f"Bearer {KEY} waits"),
        refusal(503, f"Bearer {KEY} waits"),
        (200, {}, completion(f"Your key is {KEY}, sir.")),
        (200, {"x": KEY}, f"<html>{KEY}</html>".encode()),
        (200, {"x": KEY}, f"<html>{KEY}</html>".encode()),
        say(f"{KEY}\r\n\r\n".encode()),
        say(f"HTTP/1.1 200 OK\r\n{KEY}\r\n".encode()),
    ]
    endpoint.script.extend([OK, *echoes])
    spent = tmp_path / "spent.json"
    budget = Budget(calls=100)
    with Editor("gpt", endpoint.url, recordings=tmp_path, budget=budget, spent=spent) as editor:
        editor.check()
        replies = editor.complete_all([replace(ASK, seed=s) for s in range(1)])
        for seed in range(1, 5):
            replies += editor.complete_all([replace(ASK, seed=seed)])
    assert not endpoint.script
    assert sum(isinstance(reply, EditorError) for reply in replies) == 4
    assert KEY not in repr([*map(str, replies), replies, editor.ledger])
    errors = [reply for reply in replies if isinstance(reply, EditorError)]
    assert all(KEY not in repr((error.__cause__, error.__context__)) for error in errors)
    files = [path.read_text() for path in tmp_path.iterdir()]
    assert len(files) > 5
    assert KEY not in "".join([*files, caplog.text, *capsys.readouterr()])
    endpoint.script.append(refusal(401, f"Incorrect API key provided: {KEY}."))
    with Editor("gpt", endpoint.url) as editor, pytest.raises(UserError) as caught:
        editor.check()
    assert KEY not in repr(caught.getrepr(showlocals=False))


def test_a_recording_holds_what_answered_and_no_address(endpoint: Faulty, tmp_path) -> None:
    with Editor("gpt", endpoint.url, recordings=tmp_path) as editor:
        editor.complete(ASK)
    text = "".join(p.read_text() for p in tmp_path.iterdir())
    assert '"model": "gpt-of-the-day"' in text
    assert "reply 7" in text
    assert str(endpoint.server_port) not in text
