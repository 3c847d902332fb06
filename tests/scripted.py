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
    if "IMPROVED_VARIABLE" not in request.system + request.user:
        return (
            f"Lima. {PHRASE}"
            if "Rewritten answer" in request.user
            else f"It should end with {PHRASE}"
        )
    if "question template" in request.user:
        return f"<IMPROVED_VARIABLE>{{question}} Answer briefly (variant {request.seed % 7}).</IMPROVED_VARIABLE>"
    return f"<IMPROVED_VARIABLE>End every reply with: {PHRASE}</IMPROVED_VARIABLE>"
