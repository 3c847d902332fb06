"""Ask the external LLM that makes symbolic edits: replay, budget, ledger, local server.

Any OpenAI-compatible endpoint will do. A call that fails raises `EditorError`, after one retry, and
costs a move, never the run. Every request is recorded in a file of its own, so that a run can be
replayed without a model.
"""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import openai

from nslora.editor.engine import EngineServer, fits
from nslora.editor.local import EditorError, LocalServer
from nslora.editor.replay import Recordings, Reply, Request
from nslora.model import checkpoints
from nslora.types import UserError

# of one reply's body
MAX_BYTES = 1_000_000
# a reply longer than this times max_tokens ignored max_tokens
CHARS_PER_TOKEN = 16
# concurrent calls to a remote endpoint
IN_FLIGHT = 3
# longest Retry-After that we wait for
MAX_WAIT_S = 20.0
# by status: the user's error, not a lost move
REFUSALS = {
    401: "refuses the key",
    403: "refuses the key",
    404: "has no such model or address",
}


@dataclass(frozen=True)
class Budget:
    """What an editor may spend in all; the attributes are those of Ledger.

    Attributes:
        tokens: in and out.
        attempt_s: longest time of one attempt, in seconds.
    """

    calls: float = float("inf")
    tokens: float = float("inf")
    seconds: float = float("inf")
    money: float = float("inf")
    attempt_s: float = 180.0


@dataclass
class Ledger:
    """What was spent.

    Replayed calls count at what they cost when they were made, so that a resumed or replayed run
    reports the same cost, and meets its budget at the same call, as the run that made them.

    Attributes:
        calls: requests sent to the endpoint.
        replayed: requests answered from a recording.
        failed: EditorErrors.
        tokens_in, tokens_out: as the endpoint counts them.
        seconds: time in which at least one call was waiting.
        money: US dollars, 0 without a price.
    """

    calls: int = 0
    replayed: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    money: float = 0.0

    def __sub__(self, earlier: Ledger) -> Ledger:
        """Return what was spent since `earlier`, a copy by `dataclasses.replace(ledger)`."""
        names = [field.name for field in fields(self)]
        return Ledger(*(getattr(self, name) - getattr(earlier, name) for name in names))

    def charge(self, reply: Reply) -> None:
        """Add what a reply cost."""
        self.tokens_in += reply.tokens_in
        self.tokens_out += reply.tokens_out
        self.seconds += reply.seconds
        self.money += reply.money
        self.failed += bool(reply.error)

    def exhausted(self, budget: Budget) -> str:
        """Return which part of the budget is spent, in words; empty if none is."""
        spent = {
            "calls": self.calls + self.replayed,
            "tokens": self.tokens_in + self.tokens_out,
            "seconds": self.seconds,
            "money": self.money,
        }
        for name, amount in spent.items():
            limit = getattr(budget, name)
            if amount >= limit:
                return f"budget of {limit:g} {name}"
        return ""


class Editor:
    """Client of the external LLM `model`.

    Use it as a context manager, so that the local server stops with it.

    Args:
        url: "local" (a server on loopback, `model` a key of checkpoints.BACKBONES) or an
            OpenAI-compatible base URL, with the key in NSLORA_EDITOR_KEY (or OPENAI_API_KEY, for
            api.openai.com only) and, optionally, the price in NSLORA_EDITOR_PRICE as "in,out" US
            dollars per million tokens.
        mode: "auto" (replay what is recorded, else call and record), "record" (call and record
            always), "replay" (never call) or "live" (no recordings).
        recordings: folder of the recordings; without one, "auto" is "live".
        engine: of the local server: "own" (bfloat16, batched), "llama.cpp", or "auto" (by the
            machine).

    Raises UserError for a wrong argument, an unknown model or a missing key, before anything is
    spent.
    """

    def __init__(
        self,
        model: str,
        url: str = "local",
        mode: str = "auto",
        recordings: Path | None = None,
        budget: Budget = Budget(),
        threads: int = 2,
        engine: str = "auto",
    ) -> None:
        self.model = model
        self.url = url
        self.budget = budget
        self.ledger = Ledger()
        self.engine = _engine(model, engine) if url == "local" else "remote"
        # neither port nor price: recordings of one endpoint serve all that are like it
        self._recordings = Recordings(recordings, mode, self.engine, model)
        self._lock = threading.Lock()
        self._last_end = 0.0
        if url == "local":
            self._server = _local_server(model, threads, self.engine)
            self._price = (0.0, 0.0)
            key = self._server.key
        else:
            self._server = None
            key = _key(url, needed=mode != "replay")
            self._price = _price()
        # no proxy between us and loopback
        http = openai.DefaultHttpxClient(trust_env=self._server is None)
        self._client = openai.OpenAI(api_key=key, base_url=url, max_retries=0, http_client=http)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the local server and close connections."""
        if self._server:
            self._server.stop()
        self._client.close()

    def complete(self, request: Request) -> str:
        """Return the reply to `request`; raises EditorError."""
        reply = self.complete_all([request])[0]
        if isinstance(reply, EditorError):
            raise reply
        return reply

    def complete_all(self, requests: list[Request]) -> list[str | EditorError]:
        """Return replies or errors in the order of `requests`; equal requests are made once.

        A remote endpoint is asked concurrently, the local server prompt by prompt (see `_local`).
        """
        # requests of one prompt follow each other, so that the server reads it once
        prompts = list(dict.fromkeys((r.system, r.user) for r in requests))
        unique = list(dict.fromkeys(requests))
        unique.sort(key=lambda r: prompts.index((r.system, r.user)))
        # in order, before any call: what is over budget does not depend on which call is faster
        admitted = [self._admit(request) for request in unique]
        if isinstance(self._server, EngineServer):
            answers = self._reply_together(self._server, unique, admitted)
        elif self._server:
            answers = list(map(self._reply, unique, admitted))
        else:
            with ThreadPoolExecutor(IN_FLIGHT) as pool:
                answers = list(pool.map(self._reply, unique, admitted))
        replies = dict(zip(unique, answers, strict=True))
        ordered = [replies[request] for request in requests]
        return [EditorError(reply.error) if reply.error else reply.text for reply in ordered]

    def _admit(self, request: Request) -> Reply | None:
        """Decide what answers `request`: a recording, an error, or (None) a call."""
        with self._lock:
            if spent := self.ledger.exhausted(self.budget):
                return Reply(error=f"the editor's {spent} is spent")
            recorded = self._recordings.find(request)
            if recorded is None:
                self.ledger.calls += 1
            else:
                self.ledger.replayed += 1
            return recorded

    def _reply(self, request: Request, admitted: Reply | None) -> Reply:
        """Return the reply to an admitted request, charged to the ledger."""
        reply = admitted or self._call(request)
        # replies come from several threads
        with self._lock:
            self.ledger.charge(reply)
        return reply

    def _reply_together(
        self, server: EngineServer, requests: list[Request], admitted: list[Reply | None]
    ) -> list[Reply]:
        """Return the replies to admitted requests, those that need a call in one batch."""
        # admitted: None where a call is needed
        new = [r for r, reply in zip(requests, admitted, strict=True) if reply is None]
        made = iter(self._call_together(server, new) if new else ())
        replies = [reply or next(made) for reply in admitted]
        for reply in replies:
            with self._lock:
                self.ledger.charge(reply)
        return replies

    def _call_together(self, server: EngineServer, requests: list[Request]) -> list[Reply]:
        """Ask the engine for all requests at once, and record what came of it.

        The batch's seconds are shared out equally.
        """
        # a first download is not the editor's time
        server.gguf()
        start = time.monotonic()
        error, answers = "", []
        try:
            answers = self._batch(server, requests)
        except EditorError as failure:
            error = str(failure)
        seconds = round((time.monotonic() - start) / len(requests), 3)
        if error:
            replies = [Reply(seconds=seconds, error=error) for _ in requests]
        else:
            pairs = zip(answers, requests, strict=True)
            replies = [_batched_reply(answer, request, seconds) for answer, request in pairs]
        for request, reply in zip(requests, replies, strict=True):
            self._recordings.save(request, reply)
        return replies

    def _batch(self, server: EngineServer, requests: list[Request]) -> list[Any]:
        """Return the engine's chat completions; raises EditorError."""
        bodies = [_body(self.model, self.url, request) for request in requests]
        headers = {"Authorization": f"Bearer {server.key}"}
        # four requests of a batch share the time of one
        timeout = self.budget.attempt_s * max(1, len(requests) / 4)
        try:
            with (
                server.session() as url,
                httpx.Client(trust_env=False, timeout=timeout) as client,
            ):
                response = client.post(f"{url}/batch", json={"requests": bodies}, headers=headers)
                response.raise_for_status()
                return response.json()["replies"]
        except httpx.TimeoutException as failure:
            # it would go on with a batch that nobody waits for
            server.stop()
            raise EditorError(f"the editor did not answer within {timeout:g} s") from failure
        except (httpx.HTTPError, EditorError, ValueError, LookupError) as failure:
            raise EditorError(f"the local editor failed: {failure}") from failure

    def _call(self, request: Request) -> Reply:
        """Ask the endpoint, at most twice, and record what came of it."""
        if self._server:
            # a first download is not the editor's time
            self._server.gguf()
        start = time.monotonic()
        text, tokens_in, tokens_out, error = "", 0, 0, ""
        try:
            text, tokens_in, tokens_out = self._attempt_twice(request)
        except EditorError as failure:
            error = str(failure)
        # overlapping calls share their time: the sum is the time in which any call was waiting
        with self._lock:
            end = time.monotonic()
            seconds = end - max(start, self._last_end)
            self._last_end = end
        price_in, price_out = self._price
        money = (tokens_in * price_in + tokens_out * price_out) / 1e6
        reply = Reply(text, tokens_in, tokens_out, round(seconds, 3), money, error)
        self._recordings.save(request, reply)
        return reply

    def _attempt_twice(self, request: Request) -> tuple[str, int, int]:
        """Attempt once more after a failure."""
        try:
            return self._attempt(request)
        except EditorError as failure:
            time.sleep(_wait(failure))
            return self._attempt(request)

    def _attempt(self, request: Request) -> tuple[str, int, int]:
        """Make one call; return the text, tokens in, tokens out.

        Raises EditorError, or UserError for a wrong key or address.
        """
        body = _body(self.model, self.url, request)
        try:
            data = self._local(self._server, body) if self._server else self._send(self.url, body)
        except (openai.APITimeoutError, httpx.TimeoutException) as error:
            limit = f"{self.budget.attempt_s:g} s"
            raise EditorError(f"the editor did not answer within {limit}") from error
        except openai.APIStatusError as error:
            status = error.status_code
            # every later call would fail alike
            if status in REFUSALS:
                reason = f"{REFUSALS[status]} (status {status})"
                raise UserError(f"the editor at {self.url} {reason}.") from error
            raise EditorError(f"the editor answered with status {status}") from error
        except (openai.APIConnectionError, httpx.HTTPError) as error:
            raise EditorError("the editor cannot be reached") from error
        return _parse(data, request)

    def _local(self, server: LocalServer, body: dict[str, Any]) -> bytes:
        """Ask the local server so that a reply does not depend on what was asked before.

        A prompt that is computed in other batches gives other bits and, when sampled, other words.
        So each prompt is first computed whole, without the cache, and each of its requests then
        starts from exactly that cache.
        """
        with server.session() as url:
            cached = server.cached
            # unknown, should a call fail
            server.cached = None
            if cached != body["messages"]:
                self._send(url, body | {"max_tokens": 1, "extra_body": {"cache_prompt": False}})
            data = self._send(url, body | {"extra_body": {"cache_prompt": True}})
            server.cached = body["messages"]
        return data

    def _send(self, url: str, body: dict[str, Any]) -> bytes:
        """Return the raw answer, bounded in size and in total time; errors are the client's own."""
        # the client's own limit is per chunk: an endpoint that drips would never meet it
        deadline = time.monotonic() + self.budget.attempt_s
        client = self._client.with_options(base_url=url, timeout=self.budget.attempt_s)
        with client.chat.completions.with_streaming_response.create(**body) as response:
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_BYTES or time.monotonic() > deadline:
                    raise EditorError("the editor's reply is endless")
        return data


def _body(model: str, url: str, request: Request) -> dict[str, Any]:
    """Return the request as the endpoint takes it; an empty system prompt sends no message."""
    messages = [{"role": "user", "content": request.user}]
    if request.system:
        messages.insert(0, {"role": "system", "content": request.system})
    own = urlsplit(url).hostname == "api.openai.com"
    limit = "max_completion_tokens" if own else "max_tokens"
    return {
        "model": model,
        "messages": messages,
        limit: request.max_tokens,
        "seed": request.seed,
        "temperature": request.temperature,
    }


def _parse(data: bytes, request: Request) -> tuple[str, int, int]:
    """Return text and token counts of a chat completion.

    Raises EditorError for HTML, no choices, null, empty or runaway text.
    """
    try:
        content = json.loads(data)
        text = content["choices"][0]["message"]["content"]
        usage = content.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EditorError("the editor's reply is not a chat completion") from error
    if not isinstance(text, str) or not text.strip():
        raise EditorError("the editor's reply is empty")
    # max_tokens was ignored
    if len(text) > CHARS_PER_TOKEN * request.max_tokens:
        raise EditorError("the editor's reply is longer than asked")
    # a lone surrogate could not be written to any record
    text = text.encode(errors="replace").decode()
    counts = usage if isinstance(usage, dict) else {}
    tokens_in = counts.get("prompt_tokens")
    tokens_out = counts.get("completion_tokens")
    # guessed at four characters a token where the endpoint does not count
    if not isinstance(tokens_in, int):
        tokens_in = len(request.system + request.user) // 4
    if not isinstance(tokens_out, int):
        tokens_out = len(text) // 4
    return text, tokens_in, tokens_out


def _batched_reply(answer: Any, request: Request, seconds: float) -> Reply:
    """Return one completion of a batch as a reply, or why there is none."""
    try:
        text, tokens_in, tokens_out = _parse(json.dumps(answer).encode(), request)
    except EditorError as failure:
        return Reply(seconds=seconds, error=str(failure))
    return Reply(text, tokens_in, tokens_out, seconds)


def _wait(failure: EditorError) -> float:
    """Return the seconds to wait before the second attempt: the endpoint's Retry-After, else 1.

    Raises the failure when that is too long.
    """
    response = getattr(failure.__cause__, "response", None)
    text = response.headers.get("retry-after", "") if response else ""
    seconds = float(text) if text.replace(".", "", 1).isdigit() else 1.0
    if seconds > MAX_WAIT_S:
        raise failure
    return seconds


def _engine(model: str, engine: str) -> str:
    """Return which local engine answers: "own" where it fits and no other is asked for."""
    if model not in checkpoints.BACKBONES:
        names = ", ".join(checkpoints.BACKBONES)
        raise UserError(f"unknown editor model {model!r}; choose from {names}.")
    if engine == "auto":
        return "own" if fits(model) else "llama.cpp"
    return engine


def _local_server(model: str, threads: int, engine: str) -> LocalServer:
    if engine == "own":
        return EngineServer(model, threads)
    return LocalServer(cache(lambda: checkpoints.gguf(model)), threads)


def _key(url: str, needed: bool) -> str:
    """Return the key for `url`, from the environment only.

    OPENAI_API_KEY goes to its owner's host and nowhere else.
    """
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise UserError(
            "the editor url must not carry a key; "
            "put it in the environment variable NSLORA_EDITOR_KEY."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"the editor url must be 'local' or start with http:// or https://, not {url!r}."
        )
    # ours before the owner's
    key = os.environ.get("NSLORA_EDITOR_KEY")
    if not key and parts.hostname == "api.openai.com":
        key = os.environ.get("OPENAI_API_KEY")
    if needed and not key:
        raise UserError(
            f"the editor at {url} needs a key in NSLORA_EDITOR_KEY (any text if it takes none)."
        )
    return key or "none"


def _price() -> tuple[float, float]:
    """Return US dollars per million tokens in and out, from NSLORA_EDITOR_PRICE; 0 when unset."""
    text = os.environ.get("NSLORA_EDITOR_PRICE", "0,0")
    try:
        price_in, price_out = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"NSLORA_EDITOR_PRICE must be two numbers like '2.5,10', not {text!r}."
        ) from error
    return price_in, price_out
