"""What is shown while a run is made: lines, or in a notebook's kernel a table that grows."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from tinymodel import SETTINGS
from traitlets.config import Config

import nslora
from nslora.runs import show
from nslora.runs.run import Timed
from nslora.types import Prompt, Signal

STEP: dict[str, Any] = {
    "prompt": Prompt(),
    "adapter": None,
    "dev": {"value": 0.5},
    "train": {},
    "signal": Signal(),
    "demand": {},
    "evidence": {},
    "bill": {},
}
CELLS = (
    "import nslora\nresult = nslora.adapt('mine.jsonl', out='out', **{settings})",
    "result",
    "print(result.chat('Mood 3?'))",
)


@pytest.mark.pure
def test_a_line_says_kind_reason_reward_seconds_and_what_is_left(capsys) -> None:
    show.print_step(Timed(2, "symbolic", "edits still gain", **STEP, seconds=31.4, left_s=150.0))
    said = "move 2: symbolic (edits still gain), dev 0.50, 31 s, about 2 min left\n"
    assert capsys.readouterr().err == said
    show.print_step(Timed(0, "start", "", **STEP, seconds=3.0, left_s=119.4))
    assert capsys.readouterr().err == "move 0: start, dev 0.50, 3 s, about 119 s left\n"


@pytest.mark.pure
def test_without_a_kernel_lines_are_printed() -> None:
    assert not show.in_notebook()
    assert show.watcher() is show.print_step


@pytest.mark.pure
def test_texts_stay_texts_in_a_table() -> None:
    page = show.table(("a", "b"), [("<script>", "R&D")])
    assert "&lt;script&gt;" in page and "R&amp;D" in page and "<script>" not in page


@pytest.fixture
def executed(tmp_path: Path, tiny, monkeypatch) -> Any:
    """A notebook that adapts the random model, shows the result and asks it, with its outputs."""
    rows = [{"question": f"Mood {n}?", "answer": "aa"} for n in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    settings = {**SETTINGS, "method": "lora", "moves": 2, "epochs": 8, "max_new_tokens": 8}
    settings |= {"backbone": tiny.name}
    notebook = nbformat.v4.new_notebook()
    for source in CELLS:
        filled = source.replace("{settings}", repr(settings))
        notebook.cells.append(nbformat.v4.new_code_cell(filled))
    source = str(Path(nslora.__file__).parents[1])
    # the kernel of this environment, whatever else is installed
    for name, value in {
        "PYTHONPATH": source,
        "JUPYTER_PREFER_ENV_PATH": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }.items():
        monkeypatch.setenv(name, value)
    ipc = Config({"KernelManager": {"transport": "ipc", "ip": str(tmp_path / "k")}})
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
        config=ipc,
        timeout=300,
    )
    client.execute()
    return notebook


def pages(cell: Any) -> list[str]:
    data = [output.get("data", {}) for output in cell.outputs]
    return [page["text/html"] for page in data if "text/html" in page]


def test_in_a_notebook_one_table_grows_and_the_result_shows_itself(executed) -> None:
    adapting, showing, asking = executed.cells
    # one output, that was updated with each move
    (live,) = pages(adapting)
    assert live.count("<tr>") == 4 and live.count("<td>numerical</td>") == 2
    assert "<p>about " in live and " left</p>" in live
    printed = "".join(output.get("text", "") for output in adapting.outputs)
    assert "12 rows: 7 to train on" in printed and "move 1" not in printed
    (page,) = pages(showing)
    assert "share right 0.00 before, " in page and "Of what the frozen model could do" in page
    assert "<td>system</td><td>You are a helpful assistant.</td>" in page
    assert page.count("<td>numerical</td>") == 2
    # beside warnings of libraries, before it or after it
    answers = [output for output in asking.outputs if output.get("name") == "stdout"]
    assert "".join(output["text"] for output in answers) == "aa\n"
