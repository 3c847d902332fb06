"""Hand a finished run over: a prompt and a PEFT adapter, usable without this library."""

import json
import shutil
from pathlib import Path

from nslora.config import RunConfig
from nslora.model import checkpoints
from nslora.runs.store import Store, read_json, read_jsonl, write_json, write_text
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
prompt = json.load(open("prompt.json", encoding="utf-8"))
messages = [{{"role": "system", "content": prompt["system"]}}] if prompt["system"] else []
messages.append({{"role": "user", "content": prompt["question"].replace("{{question}}", "your question")}})
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0][inputs["input_ids"].shape[1]:]))
```
"""
LOAD_ADAPTER = 'model = PeftModel.from_pretrained(model, "adapter")\n'


def bundle(cfg: RunConfig, store: Store, out: Path) -> None:
    """Write a finished run's best candidate to `out`.

    These are prompt.json, the adapter (if weights were tuned), README.md on how to use them, and
    the run's record. Raises UserError if the run's checkpoint is not in this working folder, as for
    records that came with the repository.
    """
    step = best_step(store.record(cfg))
    adapter = step["adapter"]
    if adapter and not (store.scratch(cfg) / adapter).is_dir():
        raise UserError(
            f"the checkpoint of {cfg.run_id} is not in this working folder; "
            "make the run here to bundle it."
        )
    # readable without this library
    write_json(out / "prompt.json", step["prompt"])
    shutil.copytree(store.record(cfg), out / "record", dirs_exist_ok=True)
    # an earlier bundle in the same folder may have had one
    shutil.rmtree(out / "adapter", ignore_errors=True)
    base, option = base_model(cfg.backbone)
    if adapter:
        shutil.copytree(store.scratch(cfg) / adapter, out / "adapter")
        path = out / "adapter" / "adapter_config.json"
        # where PEFT looks for the base
        write_json(path, read_json(path) | {"base_model_name_or_path": base})
    readme = USE.format(
        base=json.dumps(base) + option,
        adapter=LOAD_ADAPTER if adapter else "",
    )
    write_text(out / "README.md", readme)


def best_step(record: Path) -> dict:
    """Return the line of steps.jsonl that the run returned: its `prompt` and `adapter`."""
    # step 0 is the start
    number = read_json(record / "run.json")["best"]["step"]
    # each phase of a stream counts its moves from 0, and the last phase is what is returned
    steps = reversed(read_jsonl(record / "steps.jsonl"))
    return next(step for step in steps if step["step"] == number)


def base_model(backbone: str) -> tuple[str, str]:
    """Return where `from_pretrained` finds the adapted weights, and its further argument."""
    if backbone in checkpoints.BACKBONES:
        # "owner/name/file@revision"
        address, _, _ = checkpoints.BACKBONES[backbone].source.partition("@")
        repo, _, file = address.rpartition("/")
        return repo, f', gguf_file="{file}"'
    if backbone.startswith("hub:"):
        name, _, revision = backbone.removeprefix("hub:").partition("@")
        return name, f', revision="{revision}"'
    return str(Path(backbone).resolve()), ""
