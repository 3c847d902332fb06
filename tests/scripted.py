"""An editor whose replies are written down: for tests of what surrounds it. Real editors have tests of their own."""

from __future__ import annotations

from collections.abc import Callable

from nslora.editor.client import Editor, EditorError, Request
from nslora.tasks import rules

PHRASE = str(rules.make("end_phrase").kwargs["phrase"])


class Scripted(Editor):
    """Answer every request with `reply(request)`; count calls and words in the ledger; start no server."""

    def __init__(self, reply: Callable[[Request], str]) -> None:
        super().__init__("smollm2-135m", mode="live")
        self.reply = reply

    def complete_all(self, requests: list[Request]) -> list[str | EditorError]:
        """Return one reply or error per request."""
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> str | EditorError:
        self.ledger.calls += 1
        self.ledger.tokens_in += len(request.user.split())
        try:
            reply = self.reply(request)
        except EditorError as error:
            self.ledger.lost += 1
            return error
        self.ledger.tokens_out += len(reply.split())
        return reply


def down(request: Request) -> str:
    """Fail, as an endpoint that never answers."""
    raise EditorError("the editor timed out")


def kind(request: Request) -> str:
    """Tell what is asked for: an "answer", a "gradient", a "question" template or a "system" prompt."""
    if "Rewritten answer" in request.user:
        return "answer"
    if "IMPROVED_VARIABLE" not in request.system + request.user:
        return "gradient"
    return "question" if "question template" in request.user else "system"


def bare_answer(request: Request) -> str:
    """Return the answer that is to be rewritten."""
    return request.user.split("Answer: ", 1)[1].split("\n")[0]


def helpful(request: Request) -> str:
    """Return what a good editor would write where the end phrase is asked for."""
    replies = {
        "gradient": lambda: f"It should end with {PHRASE}",
        "answer": lambda: f"{bare_answer(request)}. {PHRASE}",
        "question": lambda: tagged(f"{{question}} Answer briefly (variant {request.seed % 7})."),
        "system": lambda: tagged(f"End every reply with: {PHRASE}"),
    }
    return replies[kind(request)]()


def lowercase(request: Request) -> str:
    """Return what a good editor would write where lower case is asked for; each seed another prompt."""
    way = request.seed % 7
    replies = {
        "gradient": lambda: "Every reply must be in lower case.",
        "answer": lambda: bare_answer(request).lower(),
        "question": lambda: tagged(f"{{question}} Lower case, way {way}."),
        "system": lambda: tagged(f"Write lower case, way {way}."),
    }
    return replies[kind(request)]()


def tagged(text: str) -> str:
    """Return a text in the tags of an edit."""
    return f"<IMPROVED_VARIABLE>{text}</IMPROVED_VARIABLE>"
