"""What a practitioner takes away from a run: a prompt and a PEFT adapter, usable without this library."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.runs.store import Store
from nslora.types import UserError

USE = """# Adapted model

`prompt.json` holds the system prompt and the question template (`{{question}}` is the slot); `adapter/`, when it is
there, is a PEFT LoRA adapter; `record/` is the receipt of the run.

```python
import json
from transformers import AutoModelForCausalLM, AutoTokenizer
from peft import PeftModel

tokenizer = AutoTokenizer.from_pretrained({base})
model = AutoModelForCausalLM.from_pretrained({base})
{adapter}if not tokenizer.chat_template:  # a base model: the plain format it was adapted in
    tokenizer.chat_template = (
        "{{{{ bos_token }}}}{{% for m in messages %}}{{% if m.role == 'system' %}}{{{{ m.content }}}}\\n\\n"
        "{{% else %}}Question: {{{{ m.content }}}}\\nAnswer:{{% endif %}}{{% endfor %}}"
    )
prompt = json.load(open("prompt.json"))
messages = [{{"role": "system", "content": prompt["system"]}}] if prompt["system"] else []
messages.append({{"role": "user", "content": prompt["question"].replace("{{question}}", "your question")}})
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0][inputs["input_ids"].shape[1]:]))
```
"""


def bundle(cfg: RunConfig, store: Store, out: Path) -> None:
    """Write a finished run's best candidate to `out`: prompt.json, the adapter, how to use them, and the run's record.

    Without tuned weights there is no adapter. Raises UserError if the run's checkpoint is not in this working folder,
    as for records that came with the repository.
    """
    record = store.record(cfg)
    best = json.loads((record / "run.json").read_text())["best"]
    adapter = json.loads((record / "steps.jsonl").read_text().splitlines()[best["step"]])["adapter"]
    if adapter and not (store.scratch(cfg) / adapter).is_dir():
        raise UserError(
            f"the checkpoint of {cfg.run_id} is not in this working folder; make the run here to bundle it."
        )
    out.mkdir(parents=True, exist_ok=True)
    (out / "prompt.json").write_text(
        json.dumps(best["prompt"], indent=1, ensure_ascii=False) + "\n"
    )
    shutil.copytree(record, out / "record", dirs_exist_ok=True)
    name, option = base_model(cfg.backbone)
    if adapter:
        shutil.copytree(store.scratch(cfg) / adapter, out / "adapter", dirs_exist_ok=True)
        path = out / "adapter" / "adapter_config.json"
        path.write_text(
            json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": name}, indent=2)
        )
    put_on = 'model = PeftModel.from_pretrained(model, "adapter")\n' if adapter else ""
    (out / "README.md").write_text(USE.format(base=json.dumps(name) + option, adapter=put_on))


def base_model(backbone: str) -> tuple[str, str]:
    """Where `from_pretrained` finds the weights that were adapted, and its further argument."""
    if backbone in checkpoints.BACKBONES:
        repo, _, file = checkpoints.BACKBONES[backbone].source.partition("@")[0].rpartition("/")
        return repo, f', gguf_file="{file}"'
    if backbone.startswith("hub:"):
        name, _, revision = backbone.removeprefix("hub:").partition("@")
        return name, f', revision="{revision}"'
    return str(Path(backbone).resolve()), ""
