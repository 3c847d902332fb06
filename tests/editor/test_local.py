"""The local llama.cpp server, with the smallest real model: serving, lifetimes, and replies that do not depend on
history."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import psutil
import pytest

from nslora.config import RunConfig
from nslora.editor import engine
from nslora.editor.client import Editor, Request
from nslora.editor.local import EditorError, LocalServer
from nslora.model import checkpoints
from nslora.runs import preflight
from nslora.types import UserError

PARENT = """
import os, sys, time
from pathlib import Path
from concurrent.futures import ThreadPoolExecutor
from nslora.editor.local import LocalServer
server = LocalServer(lambda: Path(sys.argv[1]), threads=1)
def start():
    with server.session() as url:
        return url
with ThreadPoolExecutor(1) as pool:  # the thread that starts the server ends at once
    pool.submit(start).result()
if sys.argv[2] == "fork" and os.fork() == 0:  # a child that holds the server's pipe open and outlives the parent
    time.sleep(60)
    os._exit(0)
assert server.running
print("ready", flush=True)
if sys.argv[2] != "exit":
    time.sleep(60)
"""


@pytest.fixture(scope="module")
def gguf() -> Path:
    return checkpoints.gguf("smollm2-135m")


def servers_of(pid: int) -> list[psutil.Process]:
    alive = [p for p in psutil.Process(pid).children() if p.status() != psutil.STATUS_ZOMBIE]
    return [p for p in alive if "nslora.editor.local" in p.cmdline()]


def eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.05)
    return condition()


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_replies_do_not_depend_on_what_was_asked_before(monkeypatch):
    # a proxy must not come between the client and loopback
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    long = "The model was asked for a capital and gave a city. " * 6
    asks = [
        Request("You edit prompts.", long + "Improve it.", seed, max_tokens=12) for seed in (1, 2)
    ]
    with Editor("smollm2-135m", mode="live", engine="llama.cpp") as editor:
        first = editor.complete_all(asks)
        assert all(isinstance(reply, str) for reply in first)
        assert first[0] != first[1]
        # leaves half the prompt in the cache
        editor.complete(Request("You edit prompts.", long[:150], 1, max_tokens=4))
        assert editor.complete_all(asks[::-1]) == first[::-1]
        assert editor._server
        editor._server.stop()
        assert editor.complete(asks[1]) == first[1]  # by another process, from an empty cache
        [server] = servers_of(os.getpid())
        assert 0 < editor.ledger.tokens_out <= 12 * 5 + 4
    assert gone(server)


def test_the_server_admits_only_its_owner_and_stops_when_idle(gguf):
    server = LocalServer(lambda: gguf, threads=1, idle_s=0.3)
    assert not server.running  # nothing starts before the first session
    with server.session() as url:
        assert url.startswith("http://127.0.0.1:")
        body = json.dumps(
            {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
        ).encode()
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(urllib.request.Request(f"{url}/chat/completions", body))
        assert caught.value.code == 401
        caught.value.close()
        time.sleep(0.6)
        assert server.running  # not idle within a session
    assert eventually(lambda: not server.running)
    server.stop()


@pytest.mark.parametrize("way", ["kill", "fork", "exit"])
def test_the_server_never_outlives_its_parent(gguf, way):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", PARENT, str(gguf), way]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout
        watched = parent.stdout.readline
        found: list[psutil.Process] = []
        eventually(
            lambda: bool(found.extend(servers_of(parent.pid)) or found) or parent.poll() is not None
        )
        assert watched() == "ready\n"
        others = (
            [p for p in psutil.Process(parent.pid).children() if p not in found]
            if way == "fork"
            else []
        )
        if way != "exit":
            parent.send_signal(signal.SIGKILL)
        assert parent.wait(30) == (0 if way == "exit" else -signal.SIGKILL)
        assert found
        assert eventually(lambda: gone(found[0]))
        for other in others:
            other.kill()
        assert len(others) == (way == "fork")


def test_a_server_that_cannot_start_ends_the_run_with_its_last_words(tmp_path):
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    server = LocalServer(lambda: tmp_path / "broken.gguf", threads=1)
    with pytest.raises(UserError, match=r"did not start: \w+"), server.session():
        pass
    assert not server.running
    assert not servers_of(os.getpid())


def test_a_killed_server_is_started_again(gguf):
    server = LocalServer(lambda: gguf, threads=1)
    with server.session():
        [process] = servers_of(os.getpid())
        process.kill()
        process.wait()
    assert not server.running
    with server.session():
        assert server.running
    server.stop()
    assert not servers_of(os.getpid())


@pytest.fixture(scope="module")
def own() -> Iterator[Editor]:
    """An editor on our own engine, whose server serves several tests."""
    with Editor("smollm2-135m", mode="live", threads=1, engine="own") as editor:
        yield editor
    assert editor._server and not editor._server.running


def test_the_engine_of_our_own_answers_a_batch_alike_whenever_it_is_asked(own: Editor) -> None:
    asked = [Request("Be brief.", f"Say {word}.", seed, 0.7, 8) for word in "ab" for seed in (1, 2)]
    first = own.complete_all(asked)
    assert all(isinstance(reply, str) and reply for reply in first)
    assert own.complete_all(asked) == first
    # equal prompts draw from their own seeds
    assert first[0] != first[1] or first[2] != first[3]
    assert own.ledger.calls == 8 and own.ledger.tokens_out > 0


def test_the_engine_refuses_whoever_has_no_key(own: Editor) -> None:
    server = own._server
    assert server is not None
    with server.session() as url:
        request = urllib.request.Request(f"{url}/batch", data=b"{}", method="POST")
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=20)
    assert server.running


def test_a_request_that_the_engine_cannot_take_says_why(own: Editor) -> None:
    before = replace(own.ledger)
    with pytest.raises(EditorError, match="tokens of prompt and answer exceed the"):
        own.complete(Request("", "word " * 20_000, 1, 0.7, 8))
    assert (own.ledger - before).lost == 1
    assert isinstance(own.complete(Request("", "Say a.", 1, 0.7, 8)), str)


def test_an_engine_that_is_killed_at_work_is_started_again(own: Editor) -> None:
    ask = Request("Be brief.", "Say a.", 1, 0.7, 8)
    wanted = own.complete(ask)
    server = own._server
    assert server is not None
    connect = server.connect

    def kill_first() -> httpx.AsyncClient:
        """Kill the server when it is about to be asked, once."""
        server.connect = connect
        assert server._process is not None
        server._process.kill()
        server._process.wait()
        return connect()

    server.connect = kill_first
    before = replace(own.ledger)
    assert own.complete(ask) == wanted
    assert (own.ledger - before).lost == 0


@pytest.mark.parametrize("engine", ["own", "llama.cpp"])
def test_a_server_that_is_killed_twice_is_no_lost_edit(engine, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("nslora.editor.attempt.PAUSE_S", 0.0)
    ask = Request("Be brief.", "Say a.", 1, 0.7, 8)
    with Editor("smollm2-135m", recordings=tmp_path, threads=1, engine=engine) as editor:
        server = editor._server
        assert server is not None
        start = server._start

        def start_and_kill() -> None:
            start()
            assert server._process is not None
            server._process.kill()
            server._process.wait()

        monkeypatch.setattr(server, "_start", start_and_kill)
        with pytest.raises(UserError, match="the local editor does not answer: .*reached"):
            editor.complete(ask)
        # nothing is recorded: whoever goes on asks again
        monkeypatch.setattr(server, "_start", start)
        assert editor.complete(ask)
        assert editor.ledger.lost == 0


def test_parallel_jobs_ask_one_engine_whatever_memory_is_left(monkeypatch) -> None:
    """Chosen by each job, the second would ask llama.cpp since the first has taken the memory."""
    model, cfg = "qwen2.5-coder-1.5b", RunConfig(editor_model="qwen2.5-coder-1.5b")
    monkeypatch.setattr("nslora.model.backbone.fast_bfloat16", lambda device: True)
    monkeypatch.delenv(engine.CHOSEN, raising=False)
    free = {"gb": 10}
    monkeypatch.setattr(
        engine.psutil, "virtual_memory", lambda: SimpleNamespace(available=free["gb"] * 1e9)
    )
    assert [engine.choose(model, editors) for editors in (1, 2)] == ["own", "llama.cpp"]
    ask = [
        sys.executable,
        "-c",
        f"from nslora.editor.client import Editor; print(Editor({model!r}).engine)",
    ]
    for gb, editors, wanted in ((10, 2, "llama.cpp"), (20, 2, "own"), (10, 1, "own")):
        free["gb"] = gb
        with preflight.one_engine([cfg, cfg.but(seed=1)], editors):
            # what is left by the first job, or what another has given back
            free["gb"] = 30 - gb
            assert Editor(model).engine == wanted
            child = subprocess.run(ask, capture_output=True, text=True, check=True)
            assert child.stdout.strip() == wanted
            # a choice within a choice is the outer one
            with preflight.one_engine([cfg], 9):
                assert Editor(model).engine == wanted
        assert engine.CHOSEN not in os.environ
        # an engine that is asked for by name is no choice
        with preflight.one_engine([cfg], editors):
            assert Editor(model, engine="own").engine == "own"
    with preflight.one_engine([cfg.but(method="frozen")], 2):
        assert engine.CHOSEN not in os.environ
