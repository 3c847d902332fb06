"""The editor on our own engine: a server process that answers all requests of a move in one batch.

`python -m nslora.editor.engine KEY THREADS` loads a default model in bfloat16 and serves
it on loopback; `EngineServer` starts it, awaits it and ends it, like the llama.cpp server. Prompts
with equal starts are computed once. It wants a processor (or GPU) with native bfloat16 and memory for
the whole weights; elsewhere llama.cpp serves quantised ones. Each of several parallel jobs has an
engine of its own: one for all would answer job after job, since batches of two must not mix.

A sampled reply draws its tokens from its own request's seed. Neighbours in a batch can still change
the last bits of its probabilities, so a batch is part of what made a reply: recordings keep both.
"""

import json
import os
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import psutil

from nslora.editor.attempt import Answer, Keep, as_reply, post
from nslora.editor.completion import Dialect, judge
from nslora.editor.local import IDLE_S, LocalServer, read_key_and_watch
from nslora.editor.replay import Request
from nslora.model import checkpoints
from nslora.types import SLOT, Json, Prompt, UserError

BYTES = 4  # per parameter: bfloat16 weights, and their copy in a layout for few rows
SPARE = 2e9  # bytes of memory that must stay free beside the weights
# environment variable: the engine that one process has chosen for the parallel jobs it starts
CHOSEN = "NSLORA_EDITOR_ENGINE"


class EngineServer(LocalServer):
    """Starts and stops the engine of the default model `model`."""

    def __init__(
        self, model: str, threads: int, idle_s: float = IDLE_S, attempt_s: float = 180.0
    ) -> None:
        super().__init__(lambda: checkpoints.folder(model), threads, idle_s, attempt_s)
        self.model = model

    def _command(self) -> list[str]:
        module = [sys.executable, "-m", "nslora.editor.engine"]
        return [*module, self.model, str(self.threads)]

    async def answer(self, requests: list[Request], keep: Keep) -> None:
        """Answer all requests in one batch; raises UserError when it fails twice."""
        batch = await self._ask_together(requests)
        # one that was killed is started again
        if batch.error and not self.running:
            batch = await self._ask_together(requests)
        if batch.error:
            # it would go on with a batch that nobody waits for
            self.stop()
            # not the editor's fault: as lost edits they would say that prompts do not help
            raise UserError(f"the local editor does not answer: {batch.error}")
        answers = [batch] * len(requests)
        if batch.status == 200:
            contents = json.loads(batch.data)["replies"]
            answers = [Answer(200, json.dumps(content).encode()) for content in contents]
        pairs = zip(requests, answers, strict=True)
        keep({request: as_reply([judge(one, request)]) for request, one in pairs})

    async def _ask_together(self, requests: list[Request]) -> Answer:
        bodies = [Dialect().body(self.model, request) for request in requests]
        # four requests of a batch share the time of one
        limit_s = self.attempt_s * max(1, len(requests) / 4)
        with self.session() as url:
            async with self.connect() as http:
                return await post(http, f"{url}/batch", {"requests": bodies}, limit_s)


def choose(model: str, editors: int = 1) -> str:
    """Return the engine for `editors` of this model at once: "own" where the machine allows it, else "llama.cpp".

    It allows it where it computes natively in bfloat16 and has memory for the weights of all. What a parent process
    has chosen holds: else a job would get what the memory left by others allows, and the edits of another engine.
    """
    if chosen := os.environ.get(CHOSEN):
        return chosen
    from nslora.model.backbone import fast_bfloat16

    need = editors * checkpoints.BACKBONES[model].params * BYTES + SPARE
    fits = fast_bfloat16("cpu") and psutil.virtual_memory().available > need
    return "own" if fits else "llama.cpp"


@contextmanager
def chosen_for(models: Collection[str], editors: int) -> Iterator[None]:
    """Choose the engine of so many editors at once, of any of these models, for this process and those it starts."""
    if not models or CHOSEN in os.environ:
        yield
        return
    largest = max(models, key=lambda model: checkpoints.BACKBONES[model].params)
    os.environ[CHOSEN] = choose(largest, editors)
    try:
        yield
    finally:
        del os.environ[CHOSEN]


def answer(backbone: Any, requests: list[Json]) -> list[Json]:
    """Return chat completions of chat requests, those of one temperature and length in one batch."""
    replies: list[Json] = [{}] * len(requests)
    # (temperature, max_tokens): the places of its requests
    kinds = defaultdict(list)
    for i, request in enumerate(requests):
        kinds[request["temperature"], request["max_tokens"]].append(i)
    for (temperature, max_tokens), chosen in kinds.items():
        texts = [chat_text(backbone, requests[i]["messages"]) for i in chosen]
        seeds = [requests[i]["seed"] for i in chosen]
        generations = backbone.generate(texts, max_tokens, temperature, seeds)
        for i, text, generation in zip(chosen, texts, generations, strict=True):
            usage = {
                "prompt_tokens": backbone.count(text),
                "completion_tokens": generation.tokens,
            }
            message = {"role": "assistant", "content": generation.text}
            replies[i] = {"choices": [{"message": message}], "usage": usage}
    return replies


def chat_text(backbone: Any, messages: list[dict[str, str]]) -> str:
    """Return the model input of a request with an optional system message and one user message."""
    *system, user = [message["content"] for message in messages]
    # the user's text is data here: a slot in it is not ours to fill
    return backbone.text(Prompt(system[0] if system else "", SLOT), user)


class Handler(BaseHTTPRequestHandler):
    """Answers POST /v1/batch, {"requests": [...]}, from holders of the key."""

    backbone: Any = None
    key = ""

    def do_POST(self) -> None:
        """Decode one batch."""
        if self.headers.get("Authorization") != f"Bearer {self.key}" or self.path != "/v1/batch":
            self.send_error(401)
            return
        body = self.rfile.read(int(self.headers["Content-Length"]))
        requests = json.loads(body)["requests"]
        # one request at a time: the server has no threads
        try:
            replies = answer(self.backbone, requests)
        except UserError as error:
            replies = [{"error": {"message": str(error)}}] * len(requests)
        data = json.dumps({"replies": replies}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: requests hold data."""


def serve(model: str, threads: int) -> None:
    """Load `model`, serve it on a free loopback port, print `{"url": ...}` when ready."""
    # before torch is imported, which takes seconds in which the parent may end
    Handler.key = read_key_and_watch()
    from nslora.model.backbone import load

    Handler.backbone = load(model, threads=threads, dtype="bfloat16")
    server = HTTPServer(("127.0.0.1", 0), Handler)
    print(json.dumps({"url": f"http://127.0.0.1:{server.server_port}/v1"}), flush=True)
    server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
