"""An editor whose replies are written down: for tests of what surrounds it. Real editors have tests of their own."""

from __future__ import annotations

from collections.abc import Callable

from nslora.editor.client import Editor, EditorError, Request
from nslora.tasks import rules

PHRASE = str(rules.make("end_phrase").kwargs["phrase"])


class Scripted(Editor):
    """Answers every request with `reply(request)`; counts calls in the ledger; never starts a server."""

    def __init__(self, reply: Callable[[Request], str]) -> None:
        super().__init__("smollm2-135m", mode="live")
        self.reply = reply

    def complete_all(self, requests: list[Request]) -> list[str | EditorError]:
        """One reply or error per request."""
        self.ledger.calls += len(requests)
        return [self._one(request) for request in requests]

    def _one(self, request: Request) -> str | EditorError:
        try:
            return self.reply(request)
        except EditorError as error:
            return error


def down(request: Request) -> str:
    """An endpoint that never answers."""
    raise EditorError("the editor timed out")


def helpful(request: Request) -> str:
    """What a good editor would write, whether asked for a gradient, an edit or an answer."""
    if "Rewritten answer" in request.user:
        answer = request.user.split("Answer: ", 1)[1].split("\n")[0]
        return f"{answer}. {PHRASE}"
    if "IMPROVED_VARIABLE" not in request.system + request.user:
        return f"It should end with {PHRASE}"
    if "question template" in request.user:
        text = f"{{question}} Answer briefly (variant {request.seed % 7})."
    else:
        text = f"End every reply with: {PHRASE}"
    return f"<IMPROVED_VARIABLE>{text}</IMPROVED_VARIABLE>"
