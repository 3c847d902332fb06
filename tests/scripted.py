"""An editor whose replies are written down: for tests of what surrounds it. Real editors have tests of their own."""

from __future__ import annotations

from collections.abc import Callable

from nslora.editor import Editor, EditorError, Request


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
