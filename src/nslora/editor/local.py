"""Serve the editor's model with llama.cpp: own process, loopback only, alive only while needed.

`python -m nslora.editor.local FILE THREADS` is the server; `LocalServer` starts it,
awaits it and ends it. The server reads its access key as the first line of standard input, and ends
when that pipe closes, which the operating system does for us however the parent dies.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib import import_module
from pathlib import Path
from secrets import token_hex
from typing import Any

import httpx

from nslora.editor.attempt import Answer, Attempt, Keep, persist, post
from nslora.editor.completion import Dialect, judge
from nslora.editor.replay import Request
from nslora.types import UserError

# longest prompt and reply, in tokens
CONTEXT = 4096
# longest wait for the model to load
START_S = 300.0
# a start takes up to a minute, and between two symbolic moves there may be numerical ones: a pause this long in which
# the server holds its memory costs less than another start
IDLE_S = 300.0


class EditorError(Exception):
    """No usable reply (timeout, rate limit, nonsense, budget): the move counts as "no edit"."""


class LocalServer:
    """A server that starts at the first `session`, and stops when idle and at exit.

    Sessions take turns.

    Attributes:
        gguf: gives the model file; called at the first start, so that nothing is downloaded before.
        idle_s: seconds after the last session at which the server stops.
        attempt_s: longest time of one call, in seconds.
        key: the access key of this server.
    """

    def __init__(
        self,
        gguf: Callable[[], Path],
        threads: int,
        idle_s: float = IDLE_S,
        attempt_s: float = 180.0,
    ) -> None:
        self.gguf = gguf
        self.threads = threads
        self.idle_s = idle_s
        self.attempt_s = attempt_s
        self.key = token_hex(16)
        # the messages that the server's prompt cache holds, None after a start
        self._cached: object = None
        # of the session
        self._turn = threading.Lock()
        # of process and timer
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._url = ""
        self._timer = threading.Timer(idle_s, self._stop_if_idle)
        atexit.register(self.stop)

    @property
    def running(self) -> bool:
        """Whether the server's process is alive."""
        return self._process is not None and self._process.poll() is None

    @contextmanager
    def session(self) -> Iterator[str]:
        """Yield the server's base URL, ready to serve, to one caller at a time.

        Raises UserError when the server cannot start.
        """
        with self._turn:
            # `stop` and the timer come from other threads
            with self._lock:
                self._timer.cancel()
                if not self.running:
                    self._start()
            try:
                yield self._url
            finally:
                with self._lock:
                    # a timer runs once
                    self._timer = threading.Timer(self.idle_s, self._stop_if_idle)
                    self._timer.daemon = True
                    self._timer.start()

    def connect(self) -> httpx.AsyncClient:
        """Open connections to the server; no proxy comes between us and loopback."""
        return httpx.AsyncClient(headers={"Authorization": f"Bearer {self.key}"}, trust_env=False)

    async def answer(self, requests: list[Request], keep: Keep) -> None:
        """Answer requests one by one, handing on each reply; raises UserError when the server ends, twice."""
        async with self.connect() as http:
            for request in requests:
                reply = await persist(partial(self._attempt, http, request))
                if reply.error and not self.running:
                    # not the editor's fault: as a lost edit it would say that prompts do not help
                    raise UserError(f"the local editor does not answer: {reply.error}")
                keep({request: reply})

    async def _attempt(self, http: httpx.AsyncClient, request: Request, room: int) -> Attempt:
        """Make one call; the server's models need no `room` for reasoning."""
        return judge(await self._ask(http, request), request, room)

    async def _ask(self, http: httpx.AsyncClient, request: Request) -> Answer:
        """Ask the server so that a reply does not depend on what was asked before.

        A prompt that is computed in other batches gives other bits and, when sampled, other words.
        So each prompt is first computed whole, without the cache, and each of its requests then
        starts from exactly that cache.
        """
        body = Dialect().body("", request)
        with self.session() as base:
            url = f"{base}/chat/completions"
            cached = self._cached
            # unknown, should a call fail
            self._cached = None
            if cached != body["messages"]:
                fill = body | {"max_tokens": 1, "cache_prompt": False}
                answer = await post(http, url, fill, self.attempt_s)
                if answer.status != 200:
                    return answer
            answer = await post(http, url, body | {"cache_prompt": True}, self.attempt_s)
            if answer.status == 200:
                self._cached = body["messages"]
        return answer

    def stop(self) -> None:
        """End the server, also within a session; the next session starts it again."""
        with self._lock:
            self._timer.cancel()
            self._end()

    def _stop_if_idle(self) -> None:
        # else a session has just begun
        if self._turn.acquire(blocking=False):
            with self._lock:
                self._end()
            self._turn.release()

    def _start(self) -> None:
        self._end()
        self._cached = None
        # a pipe that nobody reads would stop a talkative server
        with tempfile.TemporaryFile() as log:
            self._process = subprocess.Popen(
                self._command(),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
            # by the pipe: a command line is there for all users to read
            line = self._hand_key(self._process)
            if not line:
                self._end()
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                reason = lines[-1] if lines else "it said nothing"
                raise UserError(f"the local editor server did not start: {reason}")
        self._url = json.loads(line)["url"]

    def _command(self) -> list[str]:
        """Return the server's command line."""
        module = [sys.executable, "-m", "nslora.editor.local"]
        return [*module, str(self.gguf()), str(self.threads)]

    def _hand_key(self, process: subprocess.Popen[bytes]) -> bytes:
        """Give the server its key; return the line it prints when ready, or nothing."""
        assert process.stdin
        assert process.stdout
        try:
            process.stdin.write(f"{self.key}\n".encode())
            process.stdin.flush()
        except BrokenPipeError:
            return b""
        ready, _, _ = select.select([process.stdout], [], [], START_S)
        return process.stdout.readline() if ready else b""

    def _end(self) -> None:
        process, self._process = self._process, None
        # never started, or over already
        if process is None:
            return
        # it keeps no state, so it needs no time to say goodbye
        process.kill()
        process.wait()
        assert process.stdin
        assert process.stdout
        process.stdout.close()
        # unread bytes to a dead process
        with suppress(BrokenPipeError):
            process.stdin.close()


def _watch(parent: int) -> None:
    """End this process when the parent's pipe closes.

    Also when the parent is gone but a forked child holds the pipe. PR_SET_PDEATHSIG will not do: it
    fires when the *thread* that started us ends, and sessions start in pool threads.
    """
    while os.getppid() == parent:
        closed, _, _ = select.select([sys.stdin], [], [], 1.0)
        if closed:
            break
    os._exit(0)


def read_key_and_watch() -> str:
    """In a server's process: return its key, and see to it that it ends with its parent."""
    parent = os.getppid()
    key = sys.stdin.readline().strip()
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    return key


def serve(gguf: str, threads: int) -> None:
    """Load `gguf` and serve it on a free loopback port until the parent ends.

    Prints `{"url": ...}` when ready.
    """
    key = read_key_and_watch()
    # compiled, without type stubs
    llama: Any = import_module("xllamacpp")
    params = llama.CommonParams()
    params.model.path = gguf
    params.api_keys = [key]
    # the accelerator belongs to the backbone
    params.n_gpu_layers = 0
    # One slot: two threads decode three requests together hardly faster than one by one, prompts
    # with a common prefix are prefilled once per slot, and a reply would depend on its neighbours.
    params.n_parallel = 1
    params.n_ctx = CONTEXT
    # by default up to 8 GB of old prompts are kept, and replies depend on which
    params.cache_ram_mib = 0
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.verbosity = 0
    server = llama.Server(params)
    print(json.dumps({"url": f"{server.listening_address}/v1"}), flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
