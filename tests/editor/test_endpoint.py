"""Endpoints that differ: what they do not take is found out, and what is wrong is one sentence."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from faulty import ASK, FAULTS, KEY, OK, Faulty, Step, completion, echo, hang, refusal
from hypothesis import given, settings
from hypothesis import strategies as st

from nslora.editor.attempt import Answer
from nslora.editor.client import Editor, EditorError
from nslora.editor.completion import judge, seconds
from nslora.editor.endpoint import IN_FLIGHT, ROOMS
from nslora.editor.ledger import Budget
from nslora.types import UserError

NAMES = {"max_tokens", "max_completion_tokens", "seed", "temperature"}


def picky(words: Callable[[str], Step], *refused: str, body_ok: Callable = echo) -> Callable:
    """Return a step that refuses parameters, one at a time, in an endpoint's own words."""

    def step(handler: Any, body: dict[str, Any]) -> Step:
        for name in refused:
            if name in body:
                return words(name)
        return body_ok(body)

    return step


def openai(name: str) -> Step:
    hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
    text = f"Unsupported parameter: '{name}' is not supported with this model.{hint}"
    return refusal(400, text, param=name, code="unsupported_parameter")


def fastapi(name: str) -> Step:
    detail = [{"loc": ["body", name], "msg": "Extra inputs are not permitted, as seed is not"}]
    return 422, {}, json.dumps({"detail": detail}).encode()


def plain(name: str) -> Step:
    return 400, {}, f"unknown field {name}".encode()


@pytest.mark.parametrize("words", [openai, fastapi, plain])
@pytest.mark.parametrize(
    ("refused", "sent"),
    [
        (["max_tokens"], {"max_completion_tokens", "seed", "temperature"}),
        (["temperature"], {"max_tokens", "seed"}),
        (["seed"], {"max_tokens", "temperature"}),
        (["temperature", "max_tokens", "seed"], {"max_completion_tokens"}),
        (["max_tokens", "max_completion_tokens"], {"seed", "temperature"}),
        (list(NAMES), set()),
    ],
)
def test_what_is_refused_is_left_out_from_then_on(
    endpoint: Faulty, words, refused: list[str], sent: set[str]
) -> None:
    endpoint.script.extend([picky(words, *sorted(refused))] * 50)
    with Editor("gpt", endpoint.url) as editor:
        editor.check()
        learned = len(endpoint.seen)
        assert learned == 1 + len(refused)
        assert str(editor.complete(ASK)).startswith("reply")
    [seen] = endpoint.seen[learned:]
    assert NAMES & set(seen) == sent
    assert seen.get("max_completion_tokens", 160) == 160
    # what was refused has cost nothing
    assert (editor.ledger.calls, editor.ledger.retries, editor.ledger.lost) == (2, 0, 0)


def test_concurrent_first_calls_learn_together(endpoint: Faulty) -> None:
    together = threading.Barrier(IN_FLIGHT, timeout=10)

    def meet(handler: Any, body: dict[str, Any]) -> Step:
        together.wait()
        return picky(openai, "max_tokens", "temperature")(handler, body)

    endpoint.script.extend([meet] * IN_FLIGHT)
    endpoint.script.extend([picky(openai, "max_tokens", "temperature")] * 50)
    with Editor("gpt", endpoint.url) as editor:
        replies = editor.complete_all([replace(ASK, seed=s) for s in range(6)])
    assert replies == [f"reply {s}" for s in range(6)]
    assert (editor.ledger.calls, editor.ledger.lost) == (6, 0)


def test_a_refusal_after_an_answer_changes_nothing(endpoint: Faulty) -> None:
    """A prompt that is too long names max_tokens, too."""
    endpoint.script.extend([OK, refusal(400, "max_tokens plus the prompt exceed 4096")])
    with Editor("gpt", endpoint.url) as editor:
        editor.check()
        with pytest.raises(EditorError, match="exceed 4096"):
            editor.complete(ASK)
        editor.complete(replace(ASK, seed=8))
    assert all("max_tokens" in seen for seen in endpoint.seen)


@pytest.mark.parametrize("tail", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_the_address_may_lack_v1_or_be_whole(endpoint: Faulty, tail: str) -> None:
    root = endpoint.url.removesuffix("/v1")
    with Editor("gpt", root + tail) as editor:
        editor.check()
        assert editor.complete(ASK) == "reply 7"
    misses = [seen["path"] for seen in endpoint.seen if seen["path"] != endpoint.path]
    assert misses == ["/chat/completions"] * (tail in ("", "/"))


def test_an_address_without_v1_is_used_where_it_answers(endpoint: Faulty, quick) -> None:
    endpoint.path = "/chat/completions"
    root = endpoint.url.removesuffix("/v1")
    # the first answer is a fault, and no reason to look elsewhere for good
    endpoint.script.append(FAULTS["page"])
    with Editor("gpt", root) as editor:
        assert editor.complete(ASK) == "reply 7"
        assert editor.complete(replace(ASK, seed=8)) == "reply 8"
    assert endpoint.seen[-1]["path"] == "/chat/completions"


# ---- what a reply holds besides the reply


@pytest.mark.parametrize(
    ("content", "more", "text"),
    [
        ("<think>Hm.</think>fine", {}, "fine"),
        ("Hm.\nSo:</think>fine", {}, "fine"),
        ("<think>a</think><think>b</think>fine", {}, "fine"),
        ("fine", {"reasoning_content": "Hm."}, "fine"),
        ("fine", {"reasoning": "Hm."}, "fine"),
        ([{"type": "text", "text": "fi"}, {"type": "text", "text": "ne"}], {}, "fine"),
        ([{"type": "thinking", "thinking": "Hm."}, {"type": "text", "text": "fine"}], {}, "fine"),
        ("a\ud800b", {}, "a?b"),
        ("7", {}, "7"),
    ],
)
def test_the_text_is_the_reply_alone(endpoint: Faulty, content, more, text: str) -> None:
    endpoint.script.append((200, {}, completion(content, more=more)))
    with Editor("gpt", endpoint.url) as editor:
        assert editor.complete(ASK) == text


CUT = {
    "nothing beside reasoning": completion("", more={"reasoning_content": "Hm."}, prompt_tokens=9),
    "null beside reasoning": completion(None, "length", {"reasoning": "Hm."}, prompt_tokens=9),
    "thought without an end": completion("<think>Hm, is it", prompt_tokens=9),
    "half a reply": completion("It is half", "length", prompt_tokens=9),
    "nothing at all": completion("", "length", prompt_tokens=9),
}


@pytest.mark.parametrize("name", CUT)
def test_a_cut_reply_is_asked_for_again_with_more_room(endpoint: Faulty, name) -> None:
    endpoint.script.extend([(200, {}, CUT[name]), OK])
    with Editor("gpt", endpoint.url) as editor:
        assert editor.complete(ASK) == "fine"
    assert [seen["max_tokens"] for seen in endpoint.seen] == [160, 160 + ROOMS[1]]
    ledger = editor.ledger
    assert (ledger.calls, ledger.retries, ledger.lost, ledger.tokens_in) == (1, 1, 0, 109)


def test_a_reply_that_stays_cut_is_lost_if_empty_and_used_if_not(endpoint: Faulty, quick) -> None:
    endpoint.script.extend([(200, {}, CUT["null beside reasoning"])] * 4)
    with Editor("gpt", endpoint.url) as editor:
        with pytest.raises(EditorError, match="was cut before it began"):
            editor.complete(ASK)
        # every room, and once more as after any fault
        limits = [seen["max_tokens"] for seen in endpoint.seen]
        assert limits == [160 + room for room in (*ROOMS, ROOMS[-1])]
        endpoint.script.extend([(200, {}, CUT["half a reply"])] * 2)
        assert editor.complete(replace(ASK, seed=8)) == "It is half"
        # a text that was cut is better than an error
        endpoint.script.extend([(200, {}, CUT["half a reply"]), refusal(400, "too many tokens")])
        assert editor.complete(replace(ASK, seed=9)) == "It is half"
    assert len(endpoint.seen) == 4 + 2 + 2


def test_the_room_that_reasoning_needs_is_found_by_the_check(endpoint: Faulty) -> None:
    def thinker(handler: Any, body: dict[str, Any]) -> Step:
        return echo(body) if body["max_tokens"] > 1000 else (200, {}, CUT["null beside reasoning"])

    endpoint.script.extend([thinker] * 9)
    with Editor("gpt", endpoint.url) as editor:
        editor.check()
        editor.complete(ASK)
    assert [seen["max_tokens"] for seen in endpoint.seen] == [64, 64 + 1024, 160 + 1024]
    assert (editor.ledger.calls, editor.ledger.retries) == (2, 1)


# ---- the check


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([refusal(401, "Bad key")], r"refuses the key \(status 401\): Bad key; it was asked at"),
        ([refusal(403, "No")], "refuses the key"),
        ([refusal(404, "no model gpt")], r"no such model or address .*no model gpt;.*'gpt'"),
        ([refusal(402, "Pay first")], "Pay first"),
        ([(308, {"location": "https://elsewhere"}, b"")], "has another address"),
        ([FAULTS["page"]] * 2, "is not a chat completion"),
        ([FAULTS["500"]] * 2, "status 500"),
        ([(429, {"retry-after": "3600"}, b"{}")], "asks to wait for 3600 s"),
        ([FAULTS["noise"]] * 2, "is noise"),
        ([FAULTS["error text in 200"]] * 2, "overloaded"),
        ([hang] * 2, r"did not answer within 0\.3 s"),
    ],
)
def test_a_useless_endpoint_is_one_sentence(endpoint: Faulty, quick, steps, sentence) -> None:
    endpoint.script.extend(steps)
    budget = Budget(attempt_s=0.3)
    with (
        Editor("gpt", endpoint.url, budget=budget) as editor,
        pytest.raises(UserError, match=sentence) as caught,
    ):
        editor.check()
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    assert KEY not in str(caught.value)
    assert not endpoint.script


def test_the_check_is_paid_for_and_kept_by_the_budget(endpoint: Faulty) -> None:
    with Editor("gpt", endpoint.url, budget=Budget(calls=1)) as editor:
        editor.check()
        assert (editor.ledger.calls, editor.ledger.tokens_in) == (1, 100)
        # once is enough
        editor.check()
        with pytest.raises(EditorError, match="budget of 1 calls is spent"):
            editor.complete(ASK)
    assert len(endpoint.seen) == 1
    with (
        Editor("gpt", endpoint.url, budget=Budget(calls=0)) as editor,
        pytest.raises(UserError, match=r"budget of 0 calls is spent\.$"),
    ):
        editor.check()


def test_a_local_editor_and_a_replay_are_not_asked(tmp_path) -> None:
    with Editor("smollm2-135m", engine="llama.cpp") as editor:
        editor.check()
        assert editor._server and not editor._server.running
    with Editor("gpt", "http://127.0.0.1:9/v1", "replay", tmp_path) as editor:
        editor.check()


# ---- keys, addresses and proxies


@pytest.mark.parametrize(
    ("arguments", "environment", "sentence"),
    [
        ({"url": "https://api.openai.com/v1"}, {}, "needs a key in NSLORA_EDITOR_KEY"),
        (
            {"url": "https://elsewhere.example/v1"},
            {"OPENAI_API_KEY": "k"},
            "needs a key in NSLORA_EDITOR_KEY",
        ),
        ({"url": "http://api.openai.com/v1"}, {"OPENAI_API_KEY": "k"}, "needs a key"),
        ({"url": "https://u:pass@host/v1"}, {"NSLORA_EDITOR_KEY": "k"}, "must not carry a key"),
        ({"url": "https://host/v1?key=pass"}, {"NSLORA_EDITOR_KEY": "k"}, "must not carry a key"),
        ({"url": "https://host/v1#pass"}, {"NSLORA_EDITOR_KEY": "k"}, "must not carry a key"),
        ({"url": "ftp://host"}, {"NSLORA_EDITOR_KEY": "k"}, "must be 'local' or start with http"),
        ({"url": "localhost:8000/v1"}, {}, "must be 'local' or start with http"),
        ({"url": "http://u:pass@[::1/v1"}, {}, "cannot be read as an address"),
        ({"url": "http://h:port/v1"}, {}, "cannot be read as an address"),
        ({"url": "http://h/v1"}, {"NSLORA_EDITOR_KEY": "two pass@words"}, "printable ASCII"),
        ({"url": "http://h/v1"}, {"NSLORA_EDITOR_KEY": "pass@\r\nX: y"}, "printable ASCII"),
        ({"url": "http://h/v1"}, {"NSLORA_EDITOR_KEY": "pass@é"}, "printable ASCII"),
        (
            {"url": "http://h/v1"},
            {"NSLORA_EDITOR_KEY": "k", "NSLORA_EDITOR_PRICE": "5"},
            "must be two numbers",
        ),
        (
            {"url": "http://h/v1"},
            {"NSLORA_EDITOR_KEY": "k", "NSLORA_EDITOR_PRICE": "-1,nan"},
            "must be two numbers",
        ),
        ({}, {}, "unknown editor model 'gpt'; choose from smollm2-135m"),
        (
            {"url": "http://h/v1", "mode": "sometimes"},
            {"NSLORA_EDITOR_KEY": "k"},
            "unknown editor mode 'sometimes'",
        ),
        ({"url": "http://h/v1", "mode": "replay"}, {}, "needs a folder"),
    ],
)
def test_wrong_input_is_one_sentence_before_anything_is_spent(
    monkeypatch, arguments, environment, sentence
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence) as caught:
        Editor("gpt", **arguments)
    assert "\n" not in str(caught.value)
    assert "pass@" not in str(caught.value)


def test_a_server_on_loopback_needs_no_key_and_no_proxy(endpoint: Faulty, monkeypatch) -> None:
    monkeypatch.delenv("NSLORA_EDITOR_KEY")
    # must not come between the client and loopback
    for name in ("HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "socks5://127.0.0.1:9")
    with Editor("gpt", endpoint.url.replace("127.0.0.1", "localhost")) as editor:
        editor.check()
        assert editor.complete(ASK) == "reply 7"
    assert {seen["authorization"] for seen in endpoint.seen} == {None}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("ALL_PROXY", "socks5://u:pass@127.0.0.1:9", "needs the package socksio"),
        ("HTTPS_PROXY", "gopher://u:pass@127.0.0.1:9", "proxies or certificates cannot be used"),
        ("HTTPS_PROXY", "http://u:pass@127.0.0.1:port", "proxies or certificates cannot be used"),
        ("SSL_CERT_FILE", "/nowhere/pass@.pem", "proxies or certificates cannot be used"),
    ],
)
def test_settings_that_forbid_a_connection_are_one_sentence(
    monkeypatch, name, value, sentence
) -> None:
    monkeypatch.setenv("NSLORA_EDITOR_KEY", KEY)
    monkeypatch.setenv(name, value)
    with Editor("gpt", "https://elsewhere.example/v1") as editor:
        with pytest.raises(UserError, match=sentence) as caught:
            editor.check()
        assert "\n" not in str(caught.value) and "pass@" not in str(caught.value)


def test_a_proxy_is_used_for_what_is_far(endpoint: Faulty, monkeypatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", endpoint.url.removesuffix("/v1"))
    endpoint.path = "http://elsewhere.example/v1/chat/completions"
    with Editor("gpt", "http://elsewhere.example/v1") as editor:
        assert editor.complete(ASK) == "reply 7"


# ---- without a connection


@pytest.mark.parametrize(
    ("header", "wait"),
    [("2", 2), ("0.5", 0.5), ("-3", 0), ("", None), ("nan", None), ("²", None), ("soon", None)],
)
def test_retry_after_is_seconds_or_a_date(header, wait) -> None:
    assert seconds(header) == wait
    assert seconds("Fri, 31 Dec 1999 23:59:59 GMT") == 0


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def like(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return objects that may have these fields, or anything else."""
    return st.fixed_dictionaries({}, optional=fields) | JSON


PARTS = st.lists(like(type=st.just("text") | JSON, text=JSON), max_size=3)
MESSAGE = like(content=st.text() | PARTS | JSON, reasoning=JSON)
ANYTHING = like(
    choices=st.lists(like(message=MESSAGE, finish_reason=st.just("length") | JSON), max_size=2),
    usage=like(prompt_tokens=st.integers(-(10**400), 10**400), completion_tokens=JSON),
    model=JSON,
    error=like(message=JSON, code=st.integers(300, 700) | JSON),
    detail=JSON,
)


@settings(max_examples=300)
@given(content=ANYTHING, status=st.sampled_from([200, 204, 302, 400, 418, 429, 500, 999]))
def test_whatever_comes_back_is_a_text_or_a_reason(content: Any, status: int) -> None:
    made = judge(Answer(status, json.dumps(content).encode()), ASK)
    assert bool(made.text) != bool(made.error)
    assert "\n" not in made.error
    json.dumps([made.text, made.error, made.model], ensure_ascii=False).encode()
    assert 0 <= made.tokens_in <= 10**8 and 0 <= made.tokens_out <= 10**8
    assert status != 200 or not made.final or "status" in made.error


@given(data=st.binary(max_size=60), header=st.text(max_size=30))
def test_whatever_bytes_come_back_are_a_reason(data: bytes, header: str) -> None:
    for status in (200, 503):
        assert judge(Answer(status, data, header), ASK).error


def test_an_error_is_a_line_that_any_record_can_hold() -> None:
    data = json.dumps({"error": {"message": "a\ud800\n" + "b" * 999}}).encode()
    error = judge(Answer(500, data), ASK).error
    assert error.startswith("the editor gave an error (status 500): a? bbb")
    assert len(error) < 300
    error.encode()
