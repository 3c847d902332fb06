"""Record and replay replies of the external LLM.

One JSON file per request, named by the SHA-256 of the whole request. It holds the request, what
answered it (engine, model, checksum of the weights) and the reply, or why there is none, and its own
checksum (recordings of before have none).
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from nslora.disk import SEAL, saving, sealed, unsealed
from nslora.types import Json, UserError

MODES = ("auto", "record", "replay", "live")
# a misspelt key is damage, not a default
STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)

logger = logging.getLogger(__name__)


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
    """A validated reply and its cost, all attempts included.

    Attributes:
        seconds, money: waiting time, and US dollars.
        error: why there is no reply; the text is empty then.
        retries: attempts after the first one.
        model: what answered, where the endpoint says so.
    """

    __pydantic_config__ = STRICT

    text: str = ""
    tokens_in: int = 0
    tokens_out: int = 0
    seconds: float = 0.0
    money: float = 0.0
    error: str = ""
    retries: int = 0
    model: str = ""


@dataclass(frozen=True)
class Recording:
    """The content of a file; `weights` is empty where they are not known."""

    __pydantic_config__ = STRICT

    request: Json
    reply: Reply
    weights: str = ""


class Recordings:
    """Replies of `model` at an `endpoint`.

    Args:
        folder: where they are; None keeps nothing.
        mode: "auto" (replay what is recorded), "record" (overwrite), "replay" (a miss is an error)
            or "live" (none).
        endpoint: "own", "llama.cpp" or "remote".
        weights: checksum of the model's weights; what other weights have answered is not replayed.
    """

    def __init__(
        self, folder: Path | None, mode: str, endpoint: str, model: str, weights: str = ""
    ) -> None:
        if mode not in MODES:
            raise UserError(f"unknown editor mode {mode!r}; choose from {', '.join(MODES)}.")
        if folder is None and mode in ("record", "replay"):
            raise UserError(f"editor mode {mode!r} needs a folder of recordings.")
        self.folder = None if mode == "live" else folder
        self.mode = mode
        self.identity = {"endpoint": endpoint, "model": model}
        self.weights = weights

    def find(self, request: Request) -> Reply | None:
        """Return the reply to replay, or None to make the call.

        In mode "replay" nothing is called: a miss raises EditorMiss, a damaged file UserError, and
        a recorded failure is repeated. Else these calls are made again.
        """
        if self.folder is None or self.mode == "record":
            return None
        strict = self.mode == "replay"
        path = self._path(self.folder, request)
        if not path.exists():
            if strict:
                nearest = self._nearest(self.folder, request)
                raise EditorMiss(f"no recording in {self.folder} of this request; {nearest}.")
            return None
        recording = _load(path)
        if problem := self._problem(request, recording):
            if strict:
                raise UserError(f"{path} {problem}; delete it to make it again.")
            logger.warning("%s %s; it is made again", path, problem)
        elif recording and (strict or recording.reply.text):
            return recording.reply
        return None

    def save(self, request: Request, reply: Reply) -> None:
        """Write the recording at once and whole: a killed run loses at most the calls in flight."""
        if self.folder is None:
            return
        path = self._path(self.folder, request)
        # processes may record the same request
        part = path.with_suffix(f".{os.getpid()}.part")
        content = sealed(asdict(Recording(self._fields(request), reply, self.weights)))
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        with saving(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            # half a surrogate pair becomes its own JSON escape
            part.write_bytes(text.encode(errors="backslashreplace"))
            part.replace(path)

    def _problem(self, request: Request, recording: Recording | None) -> str:
        """Say why a recording must not be replayed; empty if it can be."""
        if recording is None or recording.request != self._fields(request):
            return "is not a recording of this request"
        if recording.weights and recording.weights != self.weights:
            return "was answered by other weights"
        return ""

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
        for recording in filter(None, map(_load, sorted(folder.glob("*.json")))):
            other = recording.request
            misses.append([name for name in fields if other.get(name) != fields[name]])
        if not misses:
            return "the folder holds none"
        return f"the nearest one differs in {', '.join(min(misses, key=len))}"


def _load(path: Path) -> Recording | None:
    """Return the recording in a file; None if it is not one."""
    try:
        content = json.loads(path.read_bytes())
        # a misspelt checksum is refused as any other unknown key
        if isinstance(content, dict) and SEAL in content:
            content = unsealed(content)
        recording = TypeAdapter(Recording).validate_python(content)
    except (OSError, ValueError, RecursionError):
        return None
    # either a reply or the reason why there is none
    whole = bool(recording.reply.text) != bool(recording.reply.error)
    return recording if whole else None
