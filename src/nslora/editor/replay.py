"""Record and replay replies of the external LLM.

One JSON file per request, named by the SHA-256 of the whole request.
"""

import hashlib
import json
import os
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from nslora.types import Json, UserError

MODES = ("auto", "record", "replay", "live")


class EditorMiss(UserError):
    """Mode "replay" met a request that was never recorded."""


@dataclass(frozen=True)
class Request:
    """One question to the editor. Equal requests are one recording."""

    system: str
    user: str
    seed: int
    temperature: float = 0.7
    max_tokens: int = 160


@dataclass(frozen=True)
class Reply:
    """A validated reply and its cost (seconds, US dollars); `error` says why there is none."""

    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    money: float = 0.0
    error: str = ""


class Recordings:
    """Replies of `model` at an `endpoint`.

    Args:
        folder: where they are; None keeps nothing.
        mode: "auto" (replay what is recorded), "record" (overwrite), "replay" (a miss is an error)
            or "live" (none).
        endpoint: "local" or "remote".
    """

    def __init__(self, folder: Path | None, mode: str, endpoint: str, model: str) -> None:
        if mode not in MODES:
            raise UserError(f"unknown editor mode {mode!r}; choose from {', '.join(MODES)}.")
        if folder is None and mode in ("record", "replay"):
            raise UserError(f"editor mode {mode!r} needs a folder of recordings.")
        self.folder = None if mode == "live" else folder
        self.mode = mode
        self.identity = {"endpoint": endpoint, "model": model}

    def find(self, request: Request) -> Reply | None:
        """Return the reply to replay, or None to make the call.

        Raises EditorMiss in mode "replay". A recorded failure is replayed in that mode only; else
        the call is tried again.
        """
        if self.folder is None or self.mode == "record":
            return None
        # "replay" never calls, so a failure is repeated and a miss is an error
        strict = self.mode == "replay"
        path = self._path(self.folder, request)
        if path.exists():
            reply = Reply(**_load(path, "reply"))
            return reply if strict or not reply.error else None
        if strict:
            nearest = self._nearest(self.folder, request)
            raise EditorMiss(f"no recording in {self.folder} of this request; {nearest}.")
        return None

    def save(self, request: Request, reply: Reply) -> None:
        """Write the recording at once and whole: a killed run loses at most the calls in flight."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(self.folder, request)
        # threads and processes may record the same request
        part = path.with_suffix(f".{os.getpid()}-{threading.get_ident()}.part")
        content = {"request": self._fields(request), "reply": asdict(reply)}
        part.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)

    def _fields(self, request: Request) -> Json:
        return {**self.identity, **asdict(request)}

    def _path(self, folder: Path, request: Request) -> Path:
        # sorted: a field that moves keeps old recordings valid
        text = json.dumps(self._fields(request), sort_keys=True)
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"

    def _nearest(self, folder: Path, request: Request) -> str:
        """Say in which fields the recording that shares most of them differs."""
        fields = self._fields(request)
        # per recording, the names of the fields that differ
        misses = []
        for path in sorted(folder.glob("*.json")):
            other = _load(path, "request")
            misses.append([name for name in fields if other.get(name) != fields[name]])
        if not misses:
            return "the folder holds none"
        return f"the nearest one differs in {', '.join(min(misses, key=len))}"


def _load(path: Path, part: str) -> Json:
    """Return the "request" or "reply" of a recording; UserError for a file that is not one."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))[part])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"{path} is not a recording of the editor; delete it to make it again."
        ) from error
