"""One HTTP call to an LLM, and the only place that makes a second one.

Nothing here raises for what an endpoint does: whatever comes back, or does not, becomes a text or
the reason why there is none.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from nslora.editor.replay import Reply, Request

# of one answer's body
MAX_BYTES = 1_000_000
# before another attempt, unless the endpoint asks for longer
PAUSE_S = 1.0
# is handed replies as they come, those of a batch together
Keep = Callable[[dict[Request, Reply]], None]


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP; `error` says why nothing whole did."""

    status: int = 0
    data: bytes = b""
    retry_after: str = ""
    error: str = ""


@dataclass(frozen=True)
class Attempt:
    """What an answer is worth.

    Attributes:
        error: why there is no text.
        final: another attempt would fail alike.
        wait_s: seconds to wait before another attempt; None: PAUSE_S.
        cut: the token limit ended the reply, or reasoning left no room for it.
        completion: the endpoint answered with a chat completion, usable or not.
    """

    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    model: str = ""
    error: str = ""
    final: bool = False
    wait_s: float | None = None
    cut: bool = False
    completion: bool = False


async def post(http: httpx.AsyncClient, url: str, body: dict[str, Any], limit_s: float) -> Answer:
    """Send JSON; what comes back is bounded in size, and in time from the first byte to the last."""
    # escaped, so that half a surrogate pair is no error
    content = json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    data = bytearray()
    try:
        # a limit per read would never be met by an endpoint that drips
        async with (
            asyncio.timeout(limit_s),
            http.stream("POST", url, content=content, headers=headers, timeout=None) as response,
        ):
            async for chunk in response.aiter_bytes():
                data += chunk
                if len(data) > MAX_BYTES:
                    return Answer(error="the editor's reply is endless")
    except TimeoutError:
        return Answer(error=f"the editor did not answer within {limit_s:g} s")
    except httpx.HTTPError as error:
        return Answer(error=f"the editor cannot be reached ({type(error).__name__})")
    wait = response.headers.get("retry-after", "")
    return Answer(response.status_code, bytes(data), wait)


async def persist(
    attempt: Callable[[int], Awaitable[Attempt]], rooms: Sequence[int] = (0,)
) -> Reply:
    """Return the reply to a request, attempted once more where that may help.

    `attempt` is told how many tokens there are besides the
    reply's own; a reply that was cut is asked for again with the next of `rooms`. All attempts are
    paid for.
    """
    made: list[Attempt] = []
    left = list(rooms)
    room = left.pop(0)
    faults = 0
    while True:
        last = await attempt(room)
        made.append(last)
        # a text that was cut twice is used as it is
        if last.cut and left and (last.error or len(made) == 1):
            room = left.pop(0)
        elif last.error and not last.final and not faults:
            faults += 1
            await asyncio.sleep(PAUSE_S if last.wait_s is None else last.wait_s)
        else:
            break
    return as_reply(made)


def as_reply(made: Sequence[Attempt]) -> Reply:
    """Return what the attempts at a request came to, and what all of them cost."""
    # a text that was cut is better than none
    best = [one for one in made if not one.error] or made
    return Reply(
        best[-1].text,
        sum(one.tokens_in for one in made),
        sum(one.tokens_out for one in made),
        error=best[-1].error,
        retries=len(made) - 1,
        model=best[-1].model,
    )
