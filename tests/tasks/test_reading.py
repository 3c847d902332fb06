"""Where data files come from: a path, or a data set of a hub, here a real server on loopback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from nslora.tasks import own, reading
from nslora.types import UserError

ROWS = [{"question": f"Who is number {n}?", "answer": f"Person {n}"} for n in range(1, 13)]
LINES = "\n".join(map(json.dumps, ROWS))
TABLE = "\n".join(["question,answer", *(f"{r['question']},{r['answer']}" for r in ROWS)])
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """A hub with the data sets me/one, of one file, and me/many, of several."""

    files: ClassVar = {
        "me/one": {"README.md": "A card.", "rows.jsonl": LINES},
        "me/many": {"a.csv": TABLE, "b.csv": "", "train.jsonl": "\n".join(LINES.split("\n")[:10])},
        "me/unclear": {"a.csv": TABLE, "b.csv": TABLE},
    }

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        for name, files in self.files.items():
            if path in (f"/api/datasets/{name}", f"/api/datasets/{name}/revision/main"):
                siblings = [{"rfilename": file} for file in files]
                return self.answer(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}))
            for file, text in files.items():
                if path == f"/datasets/{name}/resolve/{COMMIT}/{file}":
                    return self.answer(text)
        return self.answer("{}", 404)

    do_HEAD = do_GET

    def answer(self, text: str, status: int = 200) -> None:
        body = text.encode()
        self.send_response(status)
        headers = {"Content-Length": len(body), "ETag": f'"{hash(text)}"', "X-Repo-Commit": COMMIT}
        for name, value in headers.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *values: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def hub() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def fetched(hub: str, folder: Path, source: str) -> str:
    """What a process prints that fetches a source: its rows and first question, or the refusal."""
    code = f"""if True:
        from nslora.tasks import own, reading
        from nslora.types import UserError
        try:
            items = own.read(reading.fetch({source!r})).items
            print(len(items), items[0].example.question)
        except UserError as error:
            print(error)
    """
    source_folder = Path(own.__file__).parents[2]
    env = os.environ | {
        "HF_ENDPOINT": hub,
        "HF_HOME": str(folder),
        "PYTHONPATH": str(source_folder),
    }
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=True).stdout


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("hub:me/one", "12 Who is number 1?"),
        ("hub:me/one@main", "12 Who is number 1?"),
        ("hub:me/many", "10 Who is number 1?"),
        ("hub:me/many/a.csv", "12 Who is number 1?"),
        (
            "hub:me/unclear",
            "hub:me/unclear has no single data file; name one after it (a.csv, b.csv).",
        ),
        ("hub:me/none", "cannot fetch hub:me/none: "),
        ("hub:me/one/other.csv", "cannot fetch hub:me/one/other.csv: "),
    ],
)
def test_a_file_of_the_hub_is_fetched(hub: str, tmp_path: Path, source: str, says: str) -> None:
    said = fetched(hub, tmp_path, source)
    assert said.startswith(says) and said.count("\n") == 1


def test_a_hub_out_of_reach_gets_one_sentence(tmp_path: Path) -> None:
    said = fetched("http://127.0.0.1:9", tmp_path, "hub:me/one")
    assert said.startswith("cannot fetch hub:me/one: ") and said.count("\n") == 1


def test_a_source_that_is_not_there_gets_one_sentence() -> None:
    with pytest.raises(UserError, match=r"^there is no file none\.jsonl\.$"):
        reading.fetch("none.jsonl")
    with pytest.raises(UserError, match=r"^there is no file x+\.$"):
        reading.fetch("x" * 300)
    with pytest.raises(UserError, match=r"must read hub:<owner>/<name>"):
        reading.fetch("hub:data")
