"""A remote OpenAI-compatible endpoint: its address, its key, and what it takes.

Endpoints differ: in the name of the token limit, in whether they take a seed or a temperature, in
`/v1`, in whether they think before they answer. What one refuses is left out or renamed, and
remembered.
"""

from __future__ import annotations

import asyncio
import os
import re
from dataclasses import replace
from ipaddress import ip_address

import httpx

from nslora.editor.attempt import Attempt, Keep, persist, post
from nslora.editor.completion import Dialect, judge
from nslora.editor.replay import Reply, Request
from nslora.types import UserError

# concurrent calls
IN_FLIGHT = 3
# tokens for reasoning besides those of the reply, the next where these were not enough
ROOMS = (0, 1024, 8192)
# shorter "keys" are words for servers that want none, and words are in replies
SECRET_CHARS = 8
CHECK = Request("You are brief.", "Reply with the word OK.", seed=0, max_tokens=64)


class Endpoint:
    """Client of `model` at a base URL that `find_key` has accepted; `key` may be empty.

    Attributes:
        settled: it has answered with a chat completion; from then on its dialect stays.
    """

    def __init__(self, model: str, url: str, key: str, attempt_s: float) -> None:
        self.model = model
        self.attempt_s = attempt_s
        self._key = key
        self._url = url.rstrip("/").removesuffix("/chat/completions")
        self._dialect = Dialect(self._url)
        self.settled = False

    async def check(self) -> Reply:
        """Make one small call: it settles the dialect, and how much room reasoning needs."""
        tried: list[int] = []
        async with self._open() as http:

            async def attempt(room: int) -> Attempt:
                tried.append(room)
                return await self._attempt(http, CHECK, room)

            reply = await persist(attempt, ROOMS)
        self._dialect = replace(self._dialect, room=tried[-1])
        return reply

    async def answer(self, requests: list[Request], keep: Keep) -> None:
        """Ask for all requests, a few at a time, and hand on each reply when it is there."""
        gate = asyncio.Semaphore(IN_FLIGHT)
        rooms = [room for room in ROOMS if room >= self._dialect.room]

        async def one(request: Request) -> None:
            async with gate:
                reply = await persist(lambda room: self._attempt(http, request, room), rooms)
                keep({request: reply})

        async with self._open() as http:
            await asyncio.gather(*map(one, requests))

    async def _attempt(self, http: httpx.AsyncClient, request: Request, room: int) -> Attempt:
        """Make one call, repeated only while the endpoint says what it does not take."""
        given = None
        while True:
            dialect = self._dialect
            body = dialect.body(self.model, request, room)
            answer = await post(http, f"{dialect.url}/chat/completions", body, self.attempt_s)
            attempt = judge(answer, request, room)
            if dialect.url == self._url:
                given = attempt
            self.settled |= attempt.completion
            # unless another call has learned it meanwhile
            if not attempt.completion and not self.settled and self._dialect == dialect:
                self._dialect = dialect.amended(answer)
            if attempt.completion or self._dialect == dialect:
                break
        if not self.settled:
            self._dialect = replace(self._dialect, url=self._url)
            # a guessed address is no better than the one that was given
            if answer.status in (404, 405) and given:
                attempt = given
        return self._without_key(attempt)

    def _without_key(self, attempt: Attempt) -> Attempt:
        """Return an attempt in which an endpoint that echoes the key does not spread it."""
        if len(self._key) < SECRET_CHARS:
            return attempt
        said = {name: getattr(attempt, name) for name in ("text", "error", "model")}
        return replace(attempt, **{name: s.replace(self._key, "***") for name, s in said.items()})

    def _open(self) -> httpx.AsyncClient:
        """Open the connections of one event loop; raises UserError for settings that forbid it."""
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        # no proxy between us and loopback
        proxied = not is_loopback(httpx.URL(self._dialect.url).host)
        try:
            return httpx.AsyncClient(headers=headers, trust_env=proxied)
        except ImportError as error:
            raise UserError(
                "the environment sets a SOCKS proxy, which needs the package socksio: "
                "install it, or unset ALL_PROXY."
            ) from error
        except (ValueError, OSError, httpx.InvalidURL) as error:
            raise UserError(
                "the environment's settings of proxies or certificates cannot be used "
                f"({type(error).__name__}); see HTTPS_PROXY, ALL_PROXY and SSL_CERT_FILE."
            ) from error


def is_loopback(host: str) -> bool:
    """Tell whether a host name or address is this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ip_address(host)
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


def find_key(url: str, needed: bool = True) -> str:
    """Return the key for a base URL, from the environment only; empty for a server without one.

    OPENAI_API_KEY goes to its owner's host and nowhere else. Raises UserError for an address that
    cannot be one, or that carries a secret, and for a missing key.
    """
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        # not shown: who knows what it holds
        raise UserError("the editor url cannot be read as an address.") from None
    if parts.userinfo or parts.query or parts.fragment:
        raise UserError(
            "the editor url must not carry a key; "
            "put it in the environment variable NSLORA_EDITOR_KEY."
        )
    if parts.scheme not in ("http", "https") or not parts.host:
        raise UserError(
            f"the editor url must be 'local' or start with http:// or https://, not {url!r}."
        )
    # ours before the owner's
    key = os.environ.get("NSLORA_EDITOR_KEY", "").strip()
    if not key and (parts.scheme, parts.host) == ("https", "api.openai.com"):
        key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not re.fullmatch("[!-~]*", key):
        raise UserError("the editor's key must be printable ASCII without spaces.")
    if needed and not key and not is_loopback(parts.host):
        raise UserError(f"the editor at {url} needs a key in NSLORA_EDITOR_KEY.")
    return key
