"""Recordings: what is saved is found again, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from faulty import ASK, Faulty
from hypothesis import given
from hypothesis import strategies as st

from nslora.disk import unsealed
from nslora.editor.client import Editor
from nslora.editor.replay import EditorMiss, Recordings, Reply, Request
from nslora.types import UserError

NOWHERE = "http://127.0.0.1:9/v1"
ANSWERED = Reply("x", 1, 2, 0.5)

requests = st.builds(
    Request,
    # half surrogate pairs included: data may hold them
    st.text(st.characters()),
    st.text(st.characters()),
    st.integers(0, 2**31),
    st.floats(0, 2, allow_nan=False),
    st.integers(1, 512),
)


@given(asked=requests, other=requests, text=st.text(st.characters(codec="utf-8"), min_size=1))
def test_recordings_give_back_what_was_saved_for_this_request_only(
    tmp_path_factory, asked, other, text
) -> None:
    folder: Path = tmp_path_factory.mktemp("recordings")
    kept = Recordings(folder, "auto", "local", "m")
    kept.save(asked, Reply(text, 1, 2, 0.5))
    assert Recordings(folder, "auto", "local", "m").find(asked) == Reply(text, 1, 2, 0.5)
    assert (kept.find(other) is None) == (asdict(asked) != asdict(other))
    assert Recordings(folder, "auto", "remote", "m").find(asked) is None


DAMAGE = {
    "empty": lambda text: "",
    "cut": lambda text: text[: len(text) // 2],
    "list": lambda text: "[]",
    "deep": lambda text: "[" * 100_000,
    "no reply": lambda text: '{"request": {}}',
    "renamed key": lambda text: text.replace('"text"', '"txt"'),
    "renamed part": lambda text: text.replace('"reply"', '"answer"'),
    "other type": lambda text: text.replace('"tokens_in": 1', '"tokens_in": "many"'),
    "not a number": lambda text: text.replace("0.5", "NaN"),
    "neither reply nor error": lambda text: text.replace('"x"', '""'),
    "of another request": lambda text: text.replace('"seed": 7', '"seed": 8'),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_recording_is_named_and_made_again(tmp_path, caplog, name) -> None:
    recordings = Recordings(tmp_path, "auto", "remote", "gpt")
    recordings.save(ASK, ANSWERED)
    [path] = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(DAMAGE[name](whole))
    assert path.read_text() != whole
    assert recordings.find(ASK) is None
    assert f"{path.name} is not a recording of this request" in caplog.text
    # without calls it cannot be made again
    with pytest.raises(UserError, match=f"{path.name} is not a recording") as caught:
        Recordings(tmp_path, "replay", "remote", "gpt").find(ASK)
    assert "\n" not in str(caught.value)
    recordings.save(ASK, ANSWERED)
    assert recordings.find(ASK) == ANSWERED


def test_what_is_no_file_is_named_too(tmp_path, caplog) -> None:
    recordings = Recordings(tmp_path, "auto", "remote", "gpt")
    recordings.save(ASK, ANSWERED)
    [path] = tmp_path.iterdir()
    path.unlink()
    path.mkdir()
    assert recordings.find(ASK) is None
    assert path.name in caplog.text


def test_what_other_weights_have_answered_is_not_replayed(tmp_path, caplog) -> None:
    def of(weights: str, mode: str = "auto") -> Recordings:
        return Recordings(tmp_path, mode, "own", "m", weights)

    of("abc").save(ASK, ANSWERED)
    [path] = tmp_path.iterdir()
    assert json.loads(path.read_text())["weights"] == "abc"
    assert of("abc").find(ASK) == ANSWERED
    assert of("def").find(ASK) is None
    assert "was answered by other weights" in caplog.text
    with pytest.raises(UserError, match="other weights"):
        of("def", "replay").find(ASK)
    # what does not say who answered is believed
    content = unsealed(json.loads(path.read_text()))
    path.write_text(json.dumps(content | {"weights": ""}))
    assert of("def").find(ASK) == ANSWERED


def test_a_local_editors_recording_names_the_weights(tmp_path) -> None:
    from nslora.model import checkpoints

    with Editor("smollm2-135m", "local", "auto", tmp_path, engine="llama.cpp") as editor:
        editor._recordings.save(ASK, ANSWERED)
        [path] = tmp_path.iterdir()
        content = json.loads(path.read_text())
        assert content["weights"] == checkpoints.BACKBONES["smollm2-135m"].sha256
        assert content["request"]["endpoint"] == "llama.cpp"


def test_replay_needs_neither_key_nor_endpoint_and_a_miss_says_what_differs(
    endpoint: Faulty, tmp_path, monkeypatch
) -> None:
    with Editor("gpt", endpoint.url, recordings=tmp_path) as editor:
        editor.complete(ASK)
    monkeypatch.delenv("NSLORA_EDITOR_KEY")
    far = "https://api.example.com/v1"
    # a damaged neighbour is no obstacle
    (tmp_path / "other.json").write_text("{")
    with Editor("gpt", far, mode="replay", recordings=tmp_path) as editor:
        editor.check()
        assert editor.complete(ASK) == "reply 7"
        with pytest.raises(EditorMiss, match=r"nearest one differs in seed, max_tokens\.$"):
            editor.complete(replace(ASK, seed=8, max_tokens=9))
    with (
        Editor("other", far, mode="replay", recordings=tmp_path) as editor,
        pytest.raises(EditorMiss, match="differs in model"),
    ):
        editor.complete(ASK)
    with (
        Editor("gpt", far, mode="replay", recordings=tmp_path / "none") as editor,
        pytest.raises(EditorMiss, match="holds none"),
    ):
        editor.complete(ASK)
