"""The editor's client against a real HTTP server on loopback that can fail in every way seen in the wild."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nslora.editor.client import Budget, Editor, EditorError, Ledger, Request
from nslora.editor.replay import EditorMiss, Recordings, Reply
from nslora.types import UserError

KEY = "sk-secret-of-the-test"
ASK = Request(system="You edit prompts.", user="Improve this: {question}", seed=7)


def completion(text: object, **usage: int) -> bytes:
    return json.dumps({"choices": [{"message": {"content": text}}], "usage": usage}).encode()


class Endpoint(ThreadingHTTPServer):
    """Plays the scripted answers (status, headers, body, or a callable) in turn, then echoes the seed."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: deque = deque()
        self.seen: list[dict] = []
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request, client_address) -> None:
        """A client that hangs up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.seen.append({**body, "authorization": self.headers["authorization"]})
        step: Any = self.server.script.popleft() if self.server.script else echo(body)
        if callable(step):
            step = step(self, body)
        if step:
            self.send(*step)

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in {
            "content-type": "application/json",
            "content-length": str(len(body)),
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args) -> None:
        """Quiet."""


def echo(body: dict) -> tuple[int, dict, bytes]:
    return 200, {}, completion(f"reply {body['seed']}", prompt_tokens=100, completion_tokens=10)


OK = (200, {}, completion("fine", prompt_tokens=100, completion_tokens=10))
FAULT = (500, {}, b"{}")
NOW = {"retry-after": "0"}


@pytest.fixture
def endpoint(monkeypatch):
    monkeypatch.setenv("NSLORA_EDITOR_KEY", KEY)
    monkeypatch.delenv("NSLORA_EDITOR_PRICE", raising=False)
    server = Endpoint()
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def quick(monkeypatch):
    """No pause before the second attempt."""
    monkeypatch.setattr("nslora.editor.client._wait", lambda failure: 0.0)


def test_a_reply_and_its_cost(endpoint, monkeypatch):
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
    assert (seen["model"], seen["seed"], seen["temperature"], seen["max_tokens"]) == (
        "gpt",
        7,
        0.7,
        160,
    )
    assert seen["authorization"] == f"Bearer {KEY}"
    ledger = editor.ledger
    assert (ledger.calls, ledger.replayed, ledger.failed, ledger.tokens_in, ledger.tokens_out) == (
        1,
        0,
        0,
        100,
        10,
    )
    assert ledger.money == pytest.approx((100 * 2.5 + 10 * 10) / 1e6)
    assert 0 < ledger.seconds <= elapsed


def test_an_empty_system_prompt_sends_no_system_message(endpoint):
    with Editor("gpt", endpoint.url) as editor:
        editor.complete(Request("", "Hello", 1))
    assert [m["role"] for m in endpoint.seen[0]["messages"]] == ["user"]


@pytest.mark.parametrize(
    "fault",
    [
        FAULT,
        (429, NOW, b"{}"),
        (200, {"content-type": "text/html"}, b"<!DOCTYPE html><html>Sign in</html>"),
        (200, {}, b""),
        (200, {}, b"[]"),
        (200, {}, b'{"choices": []}'),
        (200, {}, completion(None)),
        (200, {}, completion("  \n ")),
        (200, {}, completion(["not", "text"])),
        (200, {}, completion("word " * 10_000)),
        (200, {}, b" " * 2_000_000),
        (200, {"content-length": "999"}, b'{"choices"'),
        lambda handler, body: handler.connection.close(),
    ],
    ids=[
        "500",
        "429",
        "html",
        "nothing",
        "list",
        "none",
        "null",
        "blank",
        "parts",
        "long",
        "huge",
        "cut",
        "closed",
    ],
)
def test_a_fault_is_retried_once_and_then_is_an_error(endpoint, quick, fault):
    endpoint.script.extend([fault, OK, fault, fault])
    with Editor("gpt", endpoint.url) as editor:
        assert editor.complete(ASK) == "fine"
        with pytest.raises(EditorError, match="^the editor") as caught:
            editor.complete(replace(ASK, seed=8))
    assert len(endpoint.seen) == 4
    assert (editor.ledger.calls, editor.ledger.failed) == (2, 1)
    assert KEY not in str(caught.value)


def test_an_endpoint_that_hangs_is_given_up_in_time(endpoint, quick):
    release = threading.Event()
    endpoint.script.extend([lambda handler, body: not release.wait(60)] * 2)
    start = time.monotonic()
    with (
        Editor("gpt", endpoint.url, budget=Budget(attempt_s=0.3)) as editor,
        pytest.raises(EditorError, match=r"did not answer within 0\.3 s"),
    ):
        editor.complete(ASK)
    assert time.monotonic() - start < 25
    release.set()


def test_an_endpoint_that_drips_is_given_up_in_time(endpoint, quick):
    def drip(handler: Handler, body: dict) -> None:
        handler.send(200, {"content-length": "100000"}, b"")
        for _ in range(2000):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    endpoint.script.extend([drip, drip])
    start = time.monotonic()
    with (
        Editor("gpt", endpoint.url, budget=Budget(attempt_s=0.3)) as editor,
        pytest.raises(EditorError, match="endless"),
    ):
        editor.complete(ASK)
    assert time.monotonic() - start < 25


def test_retry_after_is_kept_and_a_long_one_is_not_waited_for(endpoint):
    endpoint.script.extend(
        [(429, {"retry-after": "0.4"}, b"{}"), OK, (429, {"retry-after": "3600"}, b"{}")]
    )
    with Editor("gpt", endpoint.url) as editor:
        start = time.monotonic()
        assert editor.complete(ASK) == "fine"
        assert time.monotonic() - start >= 0.4
        with pytest.raises(EditorError, match="status 429"):
            editor.complete(replace(ASK, seed=8))
    assert len(endpoint.seen) == 3


@pytest.mark.parametrize(
    ("status", "reason"), [(401, "refuses the key"), (403, "refuses the key"), (404, "no such")]
)
def test_a_wrong_key_or_model_is_the_users_error_not_a_lost_move(endpoint, status, reason):
    endpoint.script.append(
        (status, {}, json.dumps({"error": {"message": f"Incorrect key {KEY}"}}).encode())
    )
    with Editor("gpt", endpoint.url) as editor, pytest.raises(UserError, match=reason) as caught:
        editor.complete(ASK)
    assert KEY not in str(caught.value)


def test_half_a_character_is_replaced(endpoint):
    endpoint.script.append((200, {}, rb'{"choices": [{"message": {"content": "a\ud800b"}}]}'))
    with Editor("gpt", endpoint.url) as editor:
        assert editor.complete(ASK) == "a?b"


@pytest.mark.parametrize("usage", [None, [1], {"prompt_tokens": None}])
def test_tokens_are_guessed_when_the_endpoint_does_not_count(endpoint, usage):
    endpoint.script.append(
        (
            200,
            {},
            json.dumps({"choices": [{"message": {"content": "a b c d"}}], "usage": usage}).encode(),
        )
    )
    with Editor("gpt", endpoint.url) as editor:
        editor.complete(ASK)
    assert editor.ledger.tokens_in > 0  # so that the budget holds all the same
    assert editor.ledger.tokens_out > 0


def test_complete_all_keeps_order_and_asks_together(endpoint):
    together = threading.Barrier(3, timeout=10)

    def meet(handler: Handler, body: dict) -> tuple:
        together.wait()  # breaks unless three requests are in flight at once
        return echo(body)

    endpoint.script.extend([meet] * 3)
    with Editor("gpt", endpoint.url) as editor:
        replies = editor.complete_all([replace(ASK, seed=s) for s in (3, 1, 2, 1)])
    assert replies == ["reply 3", "reply 1", "reply 2", "reply 1"]
    assert len(endpoint.seen) == 3  # equal requests are made once


def test_one_failure_leaves_the_other_replies(endpoint, quick):
    with Editor("gpt", endpoint.url, budget=Budget(calls=2)) as editor:
        first, second, third = editor.complete_all([replace(ASK, seed=s) for s in (1, 2, 3)])
    assert (first, second) == ("reply 1", "reply 2")
    assert isinstance(third, EditorError)
    assert "budget of 2 calls" in str(third)


@pytest.mark.parametrize(
    ("budget", "made"),
    [
        (Budget(calls=2), 2),
        (Budget(tokens=150), 2),
        (Budget(money=1e-9), 1),
        (Budget(seconds=0), 0),
    ],
)
def test_nothing_is_sent_once_the_budget_is_spent(endpoint, monkeypatch, budget, made):
    monkeypatch.setenv("NSLORA_EDITOR_PRICE", "1,1")
    outcomes = []
    with Editor("gpt", endpoint.url, budget=budget) as editor:
        for seed in range(4):
            outcomes += editor.complete_all([replace(ASK, seed=seed)])
    assert [isinstance(o, str) for o in outcomes] == [i < made for i in range(4)]
    assert len(endpoint.seen) == made


def test_what_is_recorded_is_not_called_again_and_costs_the_same(endpoint, tmp_path):
    with Editor("gpt", endpoint.url, recordings=tmp_path, budget=Budget(tokens=150)) as made:
        wanted = [str(made.complete_all([replace(ASK, seed=s)])[0]) for s in (1, 2, 3)]
    with Editor(
        "gpt", "http://127.0.0.1:9/v1", recordings=tmp_path, budget=Budget(tokens=150)
    ) as again:
        assert [str(again.complete_all([replace(ASK, seed=s)])[0]) for s in (1, 2, 3)] == wanted
    assert "budget" in wanted[2]  # met at the same call
    assert (again.ledger.calls, again.ledger.replayed) == (0, 2)
    assert replace(again.ledger, calls=2, replayed=0, failed=made.ledger.failed) == made.ledger
    assert not list(tmp_path.glob("*.part"))


def test_a_recording_holds_no_key_and_no_address(endpoint, tmp_path):
    with Editor("gpt", endpoint.url, recordings=tmp_path) as editor:
        editor.complete(ASK)
    text = "".join(p.read_text() for p in tmp_path.iterdir())
    assert "reply 7" in text
    assert KEY not in text
    assert str(endpoint.server_port) not in text


def test_replay_needs_neither_key_nor_endpoint_and_a_miss_says_what_differs(
    endpoint, tmp_path, monkeypatch
):
    with Editor("gpt", endpoint.url, recordings=tmp_path) as editor:
        editor.complete(ASK)
    monkeypatch.delenv("NSLORA_EDITOR_KEY")
    with Editor("gpt", "http://127.0.0.1:9/v1", mode="replay", recordings=tmp_path) as editor:
        assert editor.complete(ASK) == "reply 7"
        with pytest.raises(EditorMiss, match=r"nearest one differs in seed, max_tokens\.$"):
            editor.complete(replace(ASK, seed=8, max_tokens=9))
    with (
        Editor("other", "http://127.0.0.1:9/v1", mode="replay", recordings=tmp_path) as editor,
        pytest.raises(EditorMiss, match="differs in model"),
    ):
        editor.complete(ASK)
    with (
        Editor(
            "gpt", "http://127.0.0.1:9/v1", mode="replay", recordings=tmp_path / "none"
        ) as editor,
        pytest.raises(EditorMiss, match="holds none"),
    ):
        editor.complete(ASK)


def test_record_calls_and_overwrites_and_live_keeps_nothing(endpoint, tmp_path):
    (endpoint.script).extend(
        [(200, {}, completion("old")), (200, {}, completion("new")), (200, {}, completion("x"))]
    )
    for mode in ("record", "record", "live", "auto"):
        with Editor("gpt", endpoint.url, mode=mode, recordings=tmp_path) as editor:
            reply = editor.complete(ASK)
    assert reply == "new"
    assert len(endpoint.seen) == 3


def test_a_failure_is_replayed_as_one_but_tried_again_when_calls_are_allowed(
    endpoint, tmp_path, quick
):
    endpoint.script.extend([FAULT, FAULT])
    with Editor("gpt", endpoint.url, recordings=tmp_path) as editor, pytest.raises(EditorError):
        editor.complete(ASK)
    with Editor("gpt", endpoint.url, mode="replay", recordings=tmp_path) as editor:
        with pytest.raises(EditorError, match="status 500"):
            editor.complete(ASK)
        assert (editor.ledger.replayed, editor.ledger.failed) == (1, 1)
    with Editor("gpt", endpoint.url, recordings=tmp_path) as editor:
        assert editor.complete(ASK) == "reply 7"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"request": 1}'])
def test_a_broken_recording_is_named(tmp_path, monkeypatch, content):
    recordings = Recordings(tmp_path, "auto", "remote", "gpt")
    recordings.save(ASK, Reply("x"))
    [path] = tmp_path.iterdir()
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path.name} is not a recording"):
        recordings.find(ASK)


requests = st.builds(
    Request,
    st.text(),
    st.text(),
    st.integers(0, 2**31),
    st.floats(0, 2, allow_nan=False),
    st.integers(1, 512),
)


@given(asked=requests, other=requests, text=st.text(st.characters(codec="utf-8")))
def test_recordings_give_back_what_was_saved_for_this_request_only(
    tmp_path_factory, asked, other, text
):
    folder: Path = tmp_path_factory.mktemp("recordings")
    kept = Recordings(folder, "auto", "local", "m")
    kept.save(asked, Reply(text, 1, 2, 0.5))
    assert Recordings(folder, "auto", "local", "m").find(asked) == Reply(text, 1, 2, 0.5)
    assert (kept.find(other) is None) == (asdict(asked) != asdict(other))
    assert Recordings(folder, "auto", "remote", "m").find(asked) is None


def test_ledgers_subtract():
    assert Ledger(5, 1, 0, 90, 9, 3.0, 0.5) - Ledger(2, 1, 0, 40, 4, 1.0, 0.25) == Ledger(
        3, 0, 0, 50, 5, 2.0, 0.25
    )


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        ({"url": "https://api.openai.com/v1"}, {}, "needs a key in NSLORA_EDITOR_KEY"),
        (
            {"url": "https://elsewhere.example/v1"},
            {"OPENAI_API_KEY": "k"},
            "needs a key in NSLORA_EDITOR_KEY",
        ),
        ({"url": "https://u:pass@host/v1"}, {"NSLORA_EDITOR_KEY": "k"}, "must not carry a key"),
        ({"url": "https://host/v1?key=pass"}, {"NSLORA_EDITOR_KEY": "k"}, "must not carry a key"),
        ({"url": "ftp://host"}, {"NSLORA_EDITOR_KEY": "k"}, "must be 'local' or start with http"),
        (
            {"url": "http://h/v1"},
            {"NSLORA_EDITOR_KEY": "k", "NSLORA_EDITOR_PRICE": "5"},
            "must be two numbers",
        ),
        ({}, {}, "unknown editor model 'gpt'; choose from smollm2-135m"),
        ({"url": "http://h/v1", "mode": "sometimes"}, {}, "unknown editor mode 'sometimes'"),
        ({"url": "http://h/v1", "mode": "replay"}, {}, "needs a folder"),
    ],
)
def test_wrong_input_is_one_sentence_before_anything_is_spent(
    monkeypatch, arguments, environment, sentence
):
    for name in ("NSLORA_EDITOR_KEY", "OPENAI_API_KEY", "NSLORA_EDITOR_PRICE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence) as caught:
        Editor("gpt", **arguments)
    assert "\n" not in str(caught.value)
    assert "pass@" not in str(caught.value)


def test_openais_own_key_and_token_limit_go_to_openai(monkeypatch):
    monkeypatch.delenv("NSLORA_EDITOR_KEY", raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    sent: list[dict] = []
    editor = Editor("gpt", "https://api.openai.com/v1", mode="live")
    monkeypatch.setattr(editor, "_send", lambda url, body: sent.append(body) or completion("x"))
    assert editor.complete(ASK) == "x"
    assert sent[0]["max_completion_tokens"] == 160
    assert "max_tokens" not in sent[0]
    editor.close()
