"""An OpenAI-compatible endpoint on loopback that can fail in every way seen in the wild."""

from __future__ import annotations

import json
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from nslora.editor.replay import Request

KEY = "sk-secret-of-the-test"
ASK = Request(system="You edit prompts.", user="Improve this: {question}", seed=7)
# status, headers, body
Step = tuple[int, dict[str, str], bytes]


def completion(text: object, finish: str = "stop", more: object = None, **usage: int) -> bytes:
    """Return the body of a chat completion; `more` are further fields of its message."""
    message = {"content": text, **(more if isinstance(more, dict) else {})}
    choice = {"message": message, "finish_reason": finish}
    return json.dumps({"model": "gpt-of-the-day", "choices": [choice], "usage": usage}).encode()


def refusal(status: int, text: str, **fields: object) -> Step:
    """Return an error as endpoints word it."""
    return status, {}, json.dumps({"error": {"message": text, **fields}}).encode()


def echo(body: dict[str, Any]) -> Step:
    """Return a reply that names the seed."""
    seed = body.get("seed", "without seed")
    return 200, {}, completion(f"reply {seed}", prompt_tokens=100, completion_tokens=10)


def drip(handler: Handler, body: dict[str, Any]) -> None:
    """Send a body byte by byte, never in time and never too late for a limit per read."""
    handler.send(200, {"content-length": "100000"}, b"")
    for _ in range(60):
        handler.wfile.write(b" ")
        time.sleep(0.05)


def drip_headers(handler: Handler, body: dict[str, Any]) -> None:
    """Send a header byte by byte."""
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nx: ")
    for _ in range(60):
        handler.wfile.write(b"x")
        time.sleep(0.05)


def hang(handler: Handler, body: dict[str, Any]) -> None:
    """Say nothing for longer than anybody waits."""
    time.sleep(2)


def close(handler: Handler, body: dict[str, Any]) -> None:
    """Hang up."""
    handler.connection.close()


def say(data: bytes) -> Callable[[Handler, dict[str, Any]], None]:
    """Return a step that sends bytes as they are."""

    def step(handler: Handler, body: dict[str, Any]) -> None:
        handler.wfile.write(data)

    return step


OK: Step = (200, {}, completion("fine", prompt_tokens=100, completion_tokens=10))
FAULT: Step = (500, {}, b"{}")
NOW = {"retry-after": "0"}
# by name: what no usable reply comes of, though another attempt may bring one
FAULTS: dict[str, Any] = {
    "500": FAULT,
    "502 page": (502, {"content-type": "text/html"}, b"<html>Bad gateway</html>"),
    "429": (429, NOW, b"{}"),
    "408": (408, {}, b""),
    "page": (200, {"content-type": "text/html"}, b"<!DOCTYPE html><html>Sign in</html>"),
    "nothing": (200, {}, b""),
    "list": (200, {}, b"[]"),
    "text": (200, {}, b'"busy"'),
    "deep": (200, {}, b"[" * 100_000),
    "not utf-8": (200, {}, b'{"choices": "\xff"}'),
    "no choices": (200, {}, b'{"choices": []}'),
    "choices null": (200, {}, b'{"choices": null}'),
    "choice null": (200, {}, b'{"choices": [null]}'),
    "message null": (200, {}, b'{"choices": [{"message": null}]}'),
    "message text": (200, {}, b'{"choices": [{"message": "hi"}]}'),
    "null": (200, {}, completion(None)),
    "blank": (200, {}, completion("  \n ")),
    "number": (200, {}, completion(7)),
    "picture": (200, {}, completion([{"type": "image_url", "image_url": "x"}])),
    "noise": (200, {}, completion("......")),
    "noise of one letter": (200, {}, completion("GGGGGGGGGGGG")),
    "long": (200, {}, completion("word " * 20_000)),
    "huge": (200, {}, b" " * 2_000_000),
    "error in 200": (200, {}, b'{"error": {"message": "overloaded", "code": 529}}'),
    "error text in 200": (200, {}, b'{"error": "overloaded"}'),
    "cut JSON": (200, {}, completion("fine")[:30]),
    "cut body": (200, {"content-length": "999"}, b'{"choices"'),
    "not gzip": (200, {"content-encoding": "gzip"}, b"no"),
    "not HTTP": say(b"hello there\r\n\r\n"),
    "closed": close,
    "silent": hang,
    "drip": drip,
    "drip of headers": drip_headers,
}


class Faulty(ThreadingHTTPServer):
    """Answer with the steps of a request's seed, else of the script, else by `reply`.

    A step is a status, headers and a body, or a function of the handler and the request's body that
    answers by itself or returns such a step.
    """

    daemon_threads = True
    # a burst of refused connections is not what is tested
    request_queue_size = 64

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: deque[Any] = deque()
        self.by_seed: defaultdict[int | None, deque[Any]] = defaultdict(deque)
        self.seen: list[dict[str, Any]] = []
        self.reply: Callable[[dict[str, Any]], Step] = echo
        # other addresses are not found
        self.path = "/v1/chat/completions"
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def step(self, body: dict[str, Any]) -> Any:
        """Take the next step for a request."""
        for steps in (self.by_seed[body.get("seed")], self.script):
            if steps:
                return steps.popleft()
        return self.reply(body)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that hangs up is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Faulty

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        seen = {**body, "authorization": self.headers["authorization"], "path": self.path}
        self.server.seen.append(seen)
        step: Any = refusal(404, "no page")
        if self.path == self.server.path:
            step = self.server.step(body)
        if callable(step):
            step = step(self, body)
        if step:
            self.send(*step)

    def send(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        standard = {"content-type": "application/json", "content-length": str(len(body))}
        for name, value in {**standard, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving() -> Iterator[Faulty]:
    """Serve a faulty endpoint."""
    with Faulty() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()
