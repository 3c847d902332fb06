"""Ask the external LLM that makes symbolic edits, and keep what it answered and what it cost.

Any OpenAI-compatible endpoint will do, or a server of our own. A request that gets no usable reply
is an `EditorError`: it is counted, said in one line, and costs an edit, never the run. A server of
our own that does not work says nothing of the editor: that is a `UserError`. Every request is
recorded in a file of its own, so that a run can be replayed without a model.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from math import ceil, inf
from pathlib import Path
from typing import Any, Self, TypeVar

from nslora.editor.endpoint import CHECK, Endpoint, find_key
from nslora.editor.engine import EngineServer, choose
from nslora.editor.ledger import Budget, Ledger, Price, Spending, Spent, known_price
from nslora.editor.local import EditorError, LocalServer
from nslora.editor.replay import Recordings, Reply, Request
from nslora.model import checkpoints
from nslora.types import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")
# bytes of a token: few, so that no more tokens come than were set aside
BYTES = 3
# tokens of a chat format
MARKUP = 32


class Editor:
    """Client of the external LLM `model`.

    Use it as a context manager, so that the local server stops with it.

    Args:
        url: "local" (a server on loopback, `model` a key of checkpoints.BACKBONES) or an
            OpenAI-compatible base URL, with the key in NSLORA_EDITOR_KEY (or OPENAI_API_KEY, for
            api.openai.com only; none is needed on loopback).
        mode: "auto" (replay what is recorded, else call and record), "record" (call and record
            always), "replay" (never call) or "live" (no recordings).
        recordings: folder of the recordings; without one, "auto" is "live".
        budget: of this editor, or of all that share the file `spent`.
        engine: of the local server: "own" (bfloat16, batched), "llama.cpp", or "auto" (by the
            machine).
        price: US dollars per million tokens in and out; that of NSLORA_EDITOR_PRICE where it is None.
        ends: whether a spent budget raises Spent, once what it covers is answered, instead of costing
            an edit. What a call may cost is then set aside, so that tokens and money are not exceeded.

    Raises UserError for a wrong argument, an unknown model, a missing key or a missing price, before
    anything is spent.
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
        spent: Path | None = None,
        price: Price | None = None,
        ends: bool = False,
    ) -> None:
        self.model = model
        self.url = url
        self.ledger = Ledger()
        self.engine = _engine(model, engine) if url == "local" else "remote"
        self._server = self._endpoint = None
        self._price: Price = (0.0, 0.0)
        if url == "local":
            self._server = _local_server(model, threads, self.engine, budget.attempt_s)
            weights = checkpoints.identity(model)
        else:
            key = find_key(url, needed=mode != "replay")
            self._endpoint = Endpoint(model, url, key, budget.attempt_s)
            known = known_price(price)
            budget.require_price(known, url)
            self._price = known or self._price
            weights = ""
        # neither port nor price: recordings of one endpoint serve all that are like it
        self._recordings = Recordings(recordings, mode, self.engine, model, weights)
        self._spending = Spending(budget, spent)
        # what is spent, once that ends the run
        self._ends, self._ended = ends, ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the local server."""
        if self._server:
            self._server.stop()

    def check(self) -> None:
        """Make one small call to a remote endpoint that has not answered yet.

        Raises UserError with what is wrong with key, address or model. What the endpoint does not
        take is known from then on. In mode "replay" nothing is called.
        """
        if not self._endpoint or self._endpoint.settled or self._recordings.mode == "replay":
            return
        most = self._most(CHECK)
        if spent := self._spending.admit(*most):
            raise UserError(f"the editor's budget of {spent} is spent.")
        reply = self._priced(_run(self._endpoint.check()))
        self.ledger.calls += 1
        self.ledger.charge(reply)
        self._spending.charge(reply, *most)
        if reply.error:
            raise UserError(f"{reply.error}; it was asked at {self.url} for model {self.model!r}.")

    def complete(self, request: Request) -> str:
        """Return the reply to `request`; raises EditorError."""
        reply = self.complete_all([request])[0]
        if isinstance(reply, EditorError):
            raise reply
        return reply

    def complete_all(self, requests: list[Request]) -> list[str | EditorError]:
        """Return replies or errors in the order of `requests`; equal requests are made once.

        How they are asked is the backend's: together, or prompt by prompt. Raises Spent (`ends`).
        """
        # requests of one prompt follow each other, so that the server reads it once
        prompts = list(dict.fromkeys((r.system, r.user) for r in requests))
        unique = list(dict.fromkeys(requests))
        unique.sort(key=lambda r: prompts.index((r.system, r.user)))
        # in order, before any call: what is over budget does not depend on which call is faster
        replies = {request: reply for request in unique if (reply := self._known(request))}
        missing = [request for request in unique if request not in replies]
        if missing:
            replies |= _run(self._make(missing))
        for reply in map(replies.__getitem__, unique):
            self.ledger.charge(reply)
            if reply.error and not self._ended:
                logger.warning("a request to the editor is lost: %s", reply.error)
        if self._ended:
            # what was answered is recorded: whoever goes on has it for nothing
            raise Spent(self._ended)
        ordered = [replies[request] for request in requests]
        return [EditorError(reply.error) if reply.error else reply.text for reply in ordered]

    def room(self) -> tuple[float, str]:
        """Return the tokens that the budget leaves, and which limit leaves no more, in words."""
        spending, dearest = self._spending, max(self._price) / 1e6
        tokens = spending.left("tokens")
        affordable = spending.left("money") / dearest if dearest else inf
        if affordable < tokens:
            return affordable, spending.words("money")
        return tokens, spending.words("tokens")

    def _known(self, request: Request) -> Reply | None:
        """Return what a recording or the budget answers; None for a call, which is counted."""
        if recorded := self._recordings.find(request):
            self.ledger.replayed += 1
            return recorded
        if spent := self._spending.admit(*self._most(request)):
            self._ended = spent if self._ends else ""
            refusal = Reply(error=f"the editor's budget of {spent} is spent")
            self._recordings.save(request, refusal)
            return refusal
        self.ledger.calls += 1
        return None

    async def _make(self, requests: list[Request]) -> dict[Request, Reply]:
        """Return the replies to requests, each recorded and paid for when it comes."""
        if self._server:
            # a first download is not the editor's time
            self._server.gguf()
        made: dict[Request, Reply] = {}
        clock = time.monotonic()

        def keep(replies: dict[Request, Reply]) -> None:
            nonlocal clock
            # calls overlap: each reply takes the time since the one before, and a batch shares it
            now = time.monotonic()
            seconds = round((now - clock) / len(replies), 3)
            clock = now
            for request, reply in replies.items():
                made[request] = self._priced(replace(reply, seconds=seconds))
                self._recordings.save(request, made[request])
                self._spending.charge(made[request], *self._most(request))

        backend = self._endpoint or self._server
        assert backend
        await backend.answer(requests, keep)
        return made

    def _priced(self, reply: Reply) -> Reply:
        """Return a reply with what its tokens cost."""
        return replace(reply, money=dollars(reply.tokens_in, reply.tokens_out, self._price))

    def _most(self, request: Request) -> tuple[float, float]:
        """Return the tokens and dollars that a first attempt may take, where that is set aside."""
        if not self._ends:
            return 0.0, 0.0
        tokens_in = most_tokens(request)
        return tokens_in + request.max_tokens, dollars(tokens_in, request.max_tokens, self._price)


def most_tokens(request: Request) -> int:
    """Return no fewer tokens than most tokenizers make of a request."""
    return MARKUP + ceil(len((request.system + request.user).encode()) / BYTES)


def dollars(tokens_in: float, tokens_out: float, price: Price) -> float:
    """Return what tokens cost."""
    price_in, price_out = price
    return (tokens_in * price_in + tokens_out * price_out) / 1e6


def _run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also where a loop is running already, as in a notebook."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(coroutine)
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def _engine(model: str, engine: str) -> str:
    """Return which local engine answers: the one that is asked for, or what the machine allows."""
    if model not in checkpoints.BACKBONES:
        names = ", ".join(checkpoints.BACKBONES)
        raise UserError(f"unknown editor model {model!r}; choose from {names}.")
    if engine == "auto":
        return choose(model)
    return engine


def _local_server(model: str, threads: int, engine: str, attempt_s: float) -> LocalServer:
    if engine == "own":
        return EngineServer(model, threads, attempt_s=attempt_s)
    return LocalServer(cache(lambda: checkpoints.gguf(model)), threads, attempt_s=attempt_s)
