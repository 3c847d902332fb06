"""What is sent to a chat endpoint, and what its answer is worth. Nothing here opens a connection."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from math import isfinite
from typing import Any

from nslora.editor.attempt import Answer, Attempt
from nslora.editor.replay import Request

# a reply longer than this times its limit ignored the limit
CHARS_PER_TOKEN = 16
# of one request: an endpoint that counts more has miscounted
MAX_TOKENS = 10**8
# longest Retry-After that is waited for
MAX_WAIT_S = 20.0
# statuses after which the same request may succeed, besides 500 and above
PASSING = {408, 409, 425, 429}
# what some statuses mean
MEANINGS = {
    401: "refuses the key",
    403: "refuses the key",
    404: "has no such model or address",
    **dict.fromkeys((301, 302, 307, 308), "has another address"),
}
# no letter and no digit, or one character over and over: what damaged weights write
NOISE = re.compile(r"[\W_]*|(.)\1{7,}", re.DOTALL)


@dataclass(frozen=True)
class Dialect:
    """What an endpoint takes.

    Attributes:
        url: its base, to which /chat/completions is added.
        parameters: the optional ones that are sent.
        room: tokens that its reasoning needs besides those of a reply.
    """

    url: str = ""
    parameters: tuple[str, ...] = ("max_tokens", "seed", "temperature")
    room: int = 0

    def body(self, model: str, request: Request, room: int = 0) -> dict[str, Any]:
        """Return a request's body; an empty system prompt sends no message."""
        messages = [{"role": "user", "content": request.user}]
        if request.system:
            messages.insert(0, {"role": "system", "content": request.system})
        limit = request.max_tokens + room
        values = {
            "max_tokens": limit,
            "max_completion_tokens": limit,
            "seed": request.seed,
            "temperature": request.temperature,
        }
        chosen = {name: values[name] for name in self.parameters}
        return {"model": model, "messages": messages, **chosen}

    def amended(self, answer: Answer) -> Dialect:
        """Return the dialect that a refusal asks for; the same one where it asks for none."""
        if answer.status in (400, 422):
            return self._without(self._refused(answer.data.decode(errors="replace")))
        # a page instead of an answer is a wrong address, too
        if answer.status in (200, 404, 405) and not self.url.endswith("/v1"):
            return replace(self, url=f"{self.url}/v1")
        return self

    def _refused(self, text: str) -> str:
        """Return the parameter that a refusal is about: by its field, else the first it names."""
        fields = rf'"(?:param|loc)"\s*:\s*(?:\[\s*"body"\s*,\s*)?"({"|".join(self.parameters)})"'
        if match := re.search(fields, text):
            return match[1]
        match = re.search(rf"\b({'|'.join(self.parameters)})\b", text)
        return match[1] if match else ""

    def _without(self, name: str) -> Dialect:
        """Return the dialect without a parameter, or with the other name for it."""
        kept = tuple(p for p in self.parameters if p != name)
        if name == "max_tokens":
            kept = ("max_completion_tokens", *kept)
        return replace(self, parameters=kept)


def judge(answer: Answer, request: Request, room: int = 0) -> Attempt:
    """Return what an answer to a chat request is worth; `room` is as in `persist`."""
    if answer.error:
        return Attempt(error=answer.error)
    content = parse(answer.data)
    failure = content.get("error") if isinstance(content, dict) else None
    if answer.status == 200 and not failure:
        return read(content, request, room)
    status = answer.status
    # some answer 200 and put the status into the error
    if isinstance(failure, dict) and failure.get("code") in range(400, 600):
        status = failure["code"]
    error = f"the editor {MEANINGS.get(status, 'gave an error')} (status {status})"
    if said := message(content):
        error += f": {said}"
    if status not in PASSING and 200 < status < 500:
        return Attempt(error=error, final=True)
    wait = seconds(answer.retry_after)
    if wait is not None and wait > MAX_WAIT_S:
        return Attempt(error=f"{error}; it asks to wait for {wait:.0f} s", final=True)
    return Attempt(error=error, wait_s=wait)


def parse(data: bytes) -> Any:
    """Return JSON of unknown origin; None if it is not JSON."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def message(content: Any) -> str:
    """Return what an error says, shortened to a line; empty where it says nothing."""
    for key in ("error", "detail", "message"):
        if isinstance(content, dict):
            content = content.get(key, content)
    return " ".join(writable(content).split())[:200] if isinstance(content, str) else ""


def writable(text: str) -> str:
    """Return a text that any record can hold: half a surrogate pair could not be written."""
    return text.encode(errors="replace").decode()


def seconds(retry_after: str) -> float | None:
    """Return the seconds of a Retry-After, which may be a date; None where it says neither."""
    try:
        wait = float(retry_after)
    except ValueError:
        try:
            moment = parsedate_to_datetime(retry_after)
            wait = (moment.astimezone(UTC) - datetime.now(UTC)).total_seconds()
        except (ValueError, OverflowError):
            return None
    return max(wait, 0.0) if isfinite(wait) else None


def read(content: Any, request: Request, room: int = 0) -> Attempt:
    """Return the text and the token counts of a chat completion, or why they cannot be used."""
    try:
        choice = content["choices"][0]
        finish, (text, reasoned) = choice.get("finish_reason"), spoken(choice["message"])
    except (LookupError, TypeError, AttributeError):
        return Attempt(error="the editor's reply is not a chat completion")
    tokens_in, tokens_out = usage(content.get("usage"), request, text)
    cut = finish == "length" or (reasoned and not text.strip())
    problem = ""
    if not text.strip():
        problem = "was cut before it began" if cut else "is empty"
    elif NOISE.fullmatch(text.strip()):
        problem = "is noise"
    elif len(text) > CHARS_PER_TOKEN * (request.max_tokens + room):
        problem = "is longer than asked"
    return Attempt(
        "" if problem else text,
        tokens_in,
        tokens_out,
        model=writable(str(content.get("model") or "")),
        error=f"the editor's reply {problem}" if problem else "",
        cut=cut,
        completion=True,
    )


def spoken(reply: dict[str, Any]) -> tuple[str, bool]:
    """Return the text of a message without its reasoning, and whether there was reasoning."""
    content = reply.get("content")
    # in parts, of which some may be pictures or thoughts
    if isinstance(content, list):
        texts = [part for part in content if isinstance(part, dict) and part.get("type") == "text"]
        content = "".join(str(part.get("text") or "") for part in texts)
    text = content if isinstance(content, str) else ""
    # a chat template may have opened the thought, and the limit may have left it open
    _, closed, after = text.rpartition("</think>")
    text, opened, _ = after.partition("<think>")
    reasoned = any(reply.get(key) for key in ("reasoning_content", "reasoning"))
    return writable(text), bool(reasoned or closed or opened)


def usage(counts: Any, request: Request, text: str) -> tuple[int, int]:
    """Return tokens in and out; guessed at four characters each where the endpoint does not count."""
    counts = counts if isinstance(counts, dict) else {}
    guesses = {
        "prompt_tokens": len(request.system + request.user) // 4,
        "completion_tokens": len(text) // 4,
    }
    told = {name: counts.get(name) for name in guesses}
    tokens_in, tokens_out = [
        n if isinstance(n, int) and 0 <= n <= MAX_TOKENS else guesses[name]
        for name, n in told.items()
    ]
    return tokens_in, tokens_out
