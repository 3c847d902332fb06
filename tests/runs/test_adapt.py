"""An adaptation to somebody's own file, from the file to the bundle, on a real small model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tinymodel import SETTINGS

import nslora

ROWS = [{"ask": f"Mood {n}?", "reply": ("good", "bad")[n % 2], "note": n} for n in range(12)]
SHORT = {**SETTINGS, "method": "lora", "moves": 1, "returned": "tuned", "max_new_tokens": 8}


def record(result: nslora.Result) -> dict:
    return json.loads((result.folder / "record" / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file with a mark, Windows line ends and a repeat, in a folder that shells stumble over."""
    folder = tmp_path / 'it\'s a "quoted" $folder' / ("long " * 40).strip()
    folder.mkdir(parents=True)
    path = folder / ("mine " * 40 + ".jsonl")
    text = "\r\n".join(map(json.dumps, [*ROWS, ROWS[0]]))
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    return path


def test_a_file_as_it_comes_becomes_an_adapted_model(data: Path, tiny, capsys) -> None:
    out = data.parent / "adapted"
    mapping = "question=ask,answer=reply"
    result = nslora.adapt(data, out=out, backbone=tiny.name, columns=mapping, **SHORT)
    said = capsys.readouterr().err
    assert "note: column 'note' is left out (13: " in said
    assert "note: repeats of an earlier row are left out (1: line 13)." in said
    assert "grader labels (12 rows): in line 1 the reply 'good' is right, 'bad or good'" in said
    assert said.index("grader labels") < said.index("move 1")
    assert result.final["test"]["n"] == 2
    assert (out / "adapter").is_dir()


def test_a_changed_file_of_the_same_name_is_another_run(data: Path, tiny) -> None:
    options = {"backbone": tiny.name, "columns": "question=ask,answer=reply", **SHORT}
    first = record(nslora.adapt(data, out=data.parent / "first", **options))
    again = record(nslora.adapt(data, out=data.parent / "again", **options))
    data.write_text(data.read_text("utf-8-sig").replace("Mood 3", "Mood III"), encoding="utf-8")
    changed = record(nslora.adapt(data, out=data.parent / "changed", **options))
    assert first["run_id"] == again["run_id"] != changed["run_id"]
