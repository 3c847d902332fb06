"""The external LLM that makes symbolic edits: record and replay, budget, ledger, and a local server when none is given.

Any OpenAI-compatible endpoint will do. A call that fails raises `EditorError`, after one retry, and costs a move, never
the run. Every request is recorded in a file of its own, so that a run can be replayed without a model.
"""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
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

MAX_BYTES = 1_000_000  # of one reply's body
CHARS_PER_TOKEN = 16  # a reply longer than this times max_tokens ignored max_tokens
IN_FLIGHT = 3  # concurrent calls to a remote endpoint
MAX_WAIT_S = 20.0  # longest Retry-After that we wait for


@dataclass(frozen=True)
class Budget:
    """What an editor may spend in all (calls, tokens, seconds, US dollars), and the seconds of one attempt."""

    calls: float = float("inf")
    tokens: float = float("inf")
    seconds: float = float("inf")
    money: float = float("inf")
    attempt_s: float = 180.0


@dataclass
class Ledger:
    """What was spent. Replayed calls count at what they cost when they were made, so that a resumed or replayed run
    reports the same cost, and meets its budget at the same call, as the run that made them.

    Attributes:
        calls: requests sent to the endpoint; replayed: requests answered from a recording; failed: EditorErrors.
        tokens_in, tokens_out: as the endpoint counts them.
        seconds: time in which at least one call was waiting. money: US dollars, 0 without a price.
    """

    calls: int = 0
    replayed: int = 0
    failed: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    money: float = 0.0

    def __sub__(self, earlier: Ledger) -> Ledger:
        """What was spent since `earlier`, a copy made by `dataclasses.replace(ledger)`."""
        return Ledger(*(getattr(self, f.name) - getattr(earlier, f.name) for f in fields(self)))


class Editor:
    """Client of the external LLM `model`; use as a context manager, so that the local server stops with it.

    Args:
        url: "local" (llama.cpp on loopback, `model` a key of weights.BACKBONES) or an OpenAI-compatible base URL, with
            the key in NSLORA_EDITOR_KEY (or OPENAI_API_KEY, for api.openai.com only) and, optionally, the price in
            NSLORA_EDITOR_PRICE as "in,out" US dollars per million tokens.
        engine: of the local server: "own" (bfloat16, batched), "llama.cpp", or "auto" (by the machine).
        mode: "auto" (replay what is recorded, else call and record), "record" (call and record always), "replay"
            (never call) or "live" (no recordings).
        recordings: folder of the recordings; without one, "auto" is "live".

    Raises UserError for a wrong argument, an unknown model or a missing key, before anything is spent.
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
        self.model, self.url, self.budget = model, url, budget
        self.engine = _engine(model, engine) if url == "local" else "remote"
        self._recordings = Recordings(recordings, mode, self.engine, model)
        self.ledger = Ledger()
        self._lock = threading.Lock()
        self._last_end = 0.0
        self._server = _local_server(model, threads, self.engine) if url == "local" else None
        key = self._server.key if self._server else _key(url, needed=mode != "replay")
        self._price = (0.0, 0.0) if self._server else _price()
        proxied = self._server is None  # no proxy between us and loopback
        http = openai.DefaultHttpxClient(trust_env=proxied)
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
        """The reply to `request`; raises EditorError."""
        reply = self.complete_all([request])[0]
        if isinstance(reply, EditorError):
            raise reply
        return reply

    def complete_all(self, requests: list[Request]) -> list[str | EditorError]:
        """Replies or errors in the order of `requests`; equal requests are made once.

        A remote endpoint is asked concurrently, the local server prompt by prompt (see `_local`).
        """
        prompts = list(dict.fromkeys((r.system, r.user) for r in requests))
        unique = sorted(dict.fromkeys(requests), key=lambda r: prompts.index((r.system, r.user)))
        admitted = [self._admit(request) for request in unique]
        if isinstance(self._server, EngineServer):
            replies = self._reply_together(self._server, unique, admitted)
        elif self._server:
            replies = dict(zip(unique, map(self._reply, unique, admitted), strict=True))
        else:
            with ThreadPoolExecutor(IN_FLIGHT) as pool:
                replies = dict(zip(unique, pool.map(self._reply, unique, admitted), strict=True))
        return [
            EditorError(replies[r].error) if replies[r].error else replies[r].text for r in requests
        ]

    def _admit(self, request: Request) -> Reply | None:
        """Decide, in order and before any call, what answers `request`: a recording, an error, or (None) a call."""
        with self._lock:
            spent = asdict(self.ledger) | {
                "calls": self.ledger.calls + self.ledger.replayed,
                "tokens": self.ledger.tokens_in + self.ledger.tokens_out,
            }
            for name in ("calls", "tokens", "seconds", "money"):
                if spent[name] >= getattr(self.budget, name):
                    return Reply(
                        error=f"the editor's budget of {getattr(self.budget, name):g} {name} is spent"
                    )
            recorded = self._recordings.find(request)
            if recorded is None:
                self.ledger.calls += 1
            else:
                self.ledger.replayed += 1
            return recorded

    def _reply(self, request: Request, admitted: Reply | None) -> Reply:
        """The reply to an admitted request, charged to the ledger."""
        reply = admitted or self._call(request)
        self._charge(reply)
        return reply

    def _charge(self, reply: Reply) -> None:
        with self._lock:
            for name in ("tokens_in", "tokens_out", "seconds", "money"):
                setattr(self.ledger, name, getattr(self.ledger, name) + getattr(reply, name))
            self.ledger.failed += bool(reply.error)

    def _reply_together(
        self, server: EngineServer, requests: list[Request], admitted: list[Reply | None]
    ) -> dict[Request, Reply]:
        """Return the replies to admitted requests, those that need a call in one batch."""
        replies = {r: reply for r, reply in zip(requests, admitted, strict=True) if reply}
        new = [request for request in requests if request not in replies]
        if new:
            made = self._call_together(server, new)
            for request, reply in made.items():
                self._recordings.save(request, reply)
            replies |= made
        for reply in replies.values():
            self._charge(reply)
        return replies

    def _call_together(self, server: EngineServer, requests: list[Request]) -> dict[Request, Reply]:
        """Ask the engine for all requests at once; the batch's seconds are shared out equally."""
        server.gguf()  # a first download is not the editor's time
        start = time.monotonic()
        bodies = {"requests": [self._body(request, "max_tokens") for request in requests]}
        error, answers = "", []
        try:
            with server.session() as url:
                headers = {"Authorization": f"Bearer {server.key}"}
                timeout = self.budget.attempt_s * max(1, len(requests) / 4)
                with httpx.Client(trust_env=False, timeout=timeout) as client:
                    response = client.post(f"{url}/batch", json=bodies, headers=headers)
                    response.raise_for_status()
                    answers = response.json()["replies"]
        except httpx.TimeoutException:
            error = f"the editor did not answer within {timeout:g} s"
            server.stop()  # it would go on with a batch that nobody waits for
        except (httpx.HTTPError, EditorError, ValueError, LookupError) as failure:
            error = f"the local editor failed: {failure}"
        seconds = round((time.monotonic() - start) / len(requests), 3)
        if error:
            return {r: Reply(seconds=seconds, error=error) for r in requests}
        replies = {}
        for request, data in zip(requests, answers, strict=True):
            try:
                text, tokens_in, tokens_out = _parse(json.dumps(data).encode(), request)
                replies[request] = Reply(text, tokens_in, tokens_out, seconds)
            except EditorError as failure:
                replies[request] = Reply(seconds=seconds, error=str(failure))
        return replies

    def _call(self, request: Request) -> Reply:
        """Ask the endpoint, at most twice, and record what came of it."""
        if self._server:
            self._server.gguf()  # a first download is not the editor's time
        start = time.monotonic()
        text, tokens_in, tokens_out, error = "", 0, 0, ""
        try:
            try:
                text, tokens_in, tokens_out = self._attempt(request)
            except EditorError as failure:
                time.sleep(_wait(failure))
                text, tokens_in, tokens_out = self._attempt(request)
        except EditorError as failure:
            error = str(failure)
        with (
            self._lock
        ):  # overlapping calls share their time: the sum is the time in which any call was waiting
            end = time.monotonic()
            seconds, self._last_end = end - max(start, self._last_end), end
        money = (tokens_in * self._price[0] + tokens_out * self._price[1]) / 1e6
        reply = Reply(text, tokens_in, tokens_out, round(seconds, 3), money, error)
        self._recordings.save(request, reply)
        return reply

    def _attempt(self, request: Request) -> tuple[str, int, int]:
        """One call: the text, tokens in, tokens out. Raises EditorError, or UserError for a wrong key or address."""
        limit = (
            "max_completion_tokens"
            if urlsplit(self.url).hostname == "api.openai.com"
            else "max_tokens"
        )
        body = self._body(request, limit)
        try:
            data = self._local(self._server, body) if self._server else self._send(self.url, body)
        except (openai.APITimeoutError, httpx.TimeoutException) as error:
            raise EditorError(
                f"the editor did not answer within {self.budget.attempt_s:g} s"
            ) from error
        except openai.APIStatusError as error:
            if error.status_code in (401, 403, 404):
                reason = (
                    "has no such model or address"
                    if error.status_code == 404
                    else "refuses the key"
                )
                raise UserError(
                    f"the editor at {self.url} {reason} (status {error.status_code})."
                ) from error
            raise EditorError(f"the editor answered with status {error.status_code}") from error
        except (openai.APIConnectionError, httpx.HTTPError) as error:
            raise EditorError("the editor cannot be reached") from error
        return _parse(data, request)

    def _body(self, request: Request, limit: str) -> dict[str, Any]:
        """The chat request; `limit` is what the endpoint calls the longest reply."""
        system = [{"role": "system", "content": request.system}] if request.system else []
        return {
            "model": self.model,
            "messages": [*system, {"role": "user", "content": request.user}],
            limit: request.max_tokens,
            "seed": request.seed,
            "temperature": request.temperature,
        }

    def _local(self, server: LocalServer, body: dict[str, Any]) -> bytes:
        """Ask the local server so that the reply does not depend on what was asked before, yet the prompt is reused.

        A prompt that is computed in other batches gives other bits and, when sampled, other words. So each prompt is
        first computed whole, without the cache, and each of its requests then starts from exactly that cache.
        """
        with server.session() as url:
            cached, server.cached = server.cached, None  # unknown, should a call fail
            if cached != body["messages"]:
                self._send(url, body | {"max_tokens": 1, "extra_body": {"cache_prompt": False}})
            data = self._send(url, body | {"extra_body": {"cache_prompt": True}})
            server.cached = body["messages"]
        return data

    def _send(self, url: str, body: dict[str, Any]) -> bytes:
        """The raw answer, bounded in size and in total time; errors are the client's own."""
        deadline = time.monotonic() + self.budget.attempt_s
        client = self._client.with_options(base_url=url, timeout=self.budget.attempt_s)
        with client.chat.completions.with_streaming_response.create(**body) as response:
            data = b""
            for chunk in response.iter_bytes():
                data += chunk
                if len(data) > MAX_BYTES or time.monotonic() > deadline:
                    raise EditorError("the editor's reply is endless")
        return data


def _parse(data: bytes, request: Request) -> tuple[str, int, int]:
    """Text and token counts of a chat completion; raises EditorError for HTML, no choices, null, empty or runaway."""
    try:
        content = json.loads(data)
        text, usage = content["choices"][0]["message"]["content"], content.get("usage")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EditorError("the editor's reply is not a chat completion") from error
    if not isinstance(text, str) or not text.strip():
        raise EditorError("the editor's reply is empty")
    if len(text) > CHARS_PER_TOKEN * request.max_tokens:
        raise EditorError("the editor's reply is longer than asked")
    text = text.encode(
        errors="replace"
    ).decode()  # a lone surrogate could not be written to any record
    guess = {
        "prompt_tokens": len(request.system + request.user) // 4,
        "completion_tokens": len(text) // 4,
    }
    counts = guess | (
        {k: v for k, v in usage.items() if isinstance(v, int)} if isinstance(usage, dict) else {}
    )
    return text, counts["prompt_tokens"], counts["completion_tokens"]


def _wait(failure: EditorError) -> float:
    """Seconds to wait before the second attempt: the endpoint's Retry-After, else 1; raises when that is too long."""
    response = getattr(failure.__cause__, "response", None)
    asked = response.headers.get("retry-after", "") if response else ""
    seconds = float(asked) if asked.replace(".", "", 1).isdigit() else 1.0
    if seconds > MAX_WAIT_S:
        raise failure
    return seconds


def _engine(model: str, engine: str) -> str:
    """Return which local engine answers: "own" where it fits and no other is asked for."""
    if model not in checkpoints.BACKBONES:
        raise UserError(
            f"unknown editor model {model!r}; choose from {', '.join(checkpoints.BACKBONES)}."
        )
    if engine == "auto":
        return "own" if fits(model) else "llama.cpp"
    return engine


def _local_server(model: str, threads: int, engine: str) -> LocalServer:
    if engine == "own":
        return EngineServer(model, threads)
    return LocalServer(cache(lambda: checkpoints.gguf(model)), threads)


def _key(url: str, needed: bool) -> str:
    """The key for `url`, from the environment only. OPENAI_API_KEY goes to its owner's host and nowhere else."""
    parts = urlsplit(url)
    if parts.username or parts.password or parts.query:
        raise UserError(
            "the editor url must not carry a key; put it in the environment variable NSLORA_EDITOR_KEY."
        )
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"the editor url must be 'local' or start with http:// or https://, not {url!r}."
        )
    names = [
        "NSLORA_EDITOR_KEY",
        *(["OPENAI_API_KEY"] if parts.hostname == "api.openai.com" else []),
    ]
    found = [os.environ[name] for name in names if os.environ.get(name)]
    if needed and not found:
        raise UserError(
            f"the editor at {url} needs a key in NSLORA_EDITOR_KEY (any text if it takes none)."
        )
    return found[0] if found else "none"


def _price() -> tuple[float, float]:
    """US dollars per million tokens in and out, from NSLORA_EDITOR_PRICE; 0 when unset."""
    text = os.environ.get("NSLORA_EDITOR_PRICE", "0,0")
    try:
        price_in, price_out = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(
            f"NSLORA_EDITOR_PRICE must be two numbers like '2.5,10', not {text!r}."
        ) from error
    return price_in, price_out
