"""Hand a finished run over: a prompt, a tokenizer and a PEFT adapter, usable without this library."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

from nslora.config import RunConfig
from nslora.disk import require_whole, saving, write_sums
from nslora.model import checkpoints
from nslora.runs.bundles import report
from nslora.runs.store import Store, read_json, read_jsonl, write_json, write_text
from nslora.runs.verdict import Verdict
from nslora.types import Prompt, UserError

CARD = """---
library_name: peft
{base_model}---

# Adapted model

`prompt.json` holds the system prompt and the question template (`{{question}}` is the slot); `tokenizer/` has the chat
format that it was adapted in; `adapter/`, when it is there, is a PEFT LoRA adapter; `metrics.json` says how good it
is, and `report.html` shows it; `record/` is the receipt of the run.

```python
import json
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from peft import PeftModel

tokenizer = AutoTokenizer.from_pretrained("tokenizer")
model = AutoModelForCausalLM.from_pretrained({base})
model.generation_config = replies = GenerationConfig.from_pretrained(".")
{adapter}{reply}```

Without the model hub, give `AutoModelForCausalLM.from_pretrained` the folder of the base model.
With this library: `nslora chat .`, or `nslora evaluate . rows.jsonl`. For vLLM, llama.cpp or Ollama:
`nslora export . --to merged --out FOLDER`, or `--to gguf`, or `--to ollama`.
"""
# asks a loaded model, and prints what it replies
REPLY = """prompt = json.load(open("prompt.json", encoding="utf-8"))
messages = [{{"role": "system", "content": prompt["system"]}}] if prompt["system"] else []
messages.append({{"role": "user", "content": prompt["question"].replace("{{question}}", "your question")}})
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
tokens = model.generate(**inputs)[0][inputs["input_ids"].shape[1]:].tolist()
tokens = [token for token in tokens if token not in replies.eos_token_id]
print(tokenizer.decode(tokens, skip_special_tokens=True){cut}.strip())
"""
LOAD_ADAPTER = 'model = PeftModel.from_pretrained(model, "adapter")\n'
# a base model goes on with a question of its own
CUT = '.partition("\\nQuestion:")[0]'
# and both as texts that end a reply, for servers that stop at texts
PLAIN_ENDS = ("\n\n", "\nQuestion:")
# the plain format of base models, as `model.backbone` writes it
PLAIN = (
    "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
    "{% else %}Question: {{ m.content }}\nAnswer:{% endif %}{% endfor %}"
)
# for formats that know no system role: it opens the user's turn
MERGED = (
    "{% if messages[0].role == 'system' %}{% set messages = [{'role': 'user', 'content': "
    "messages[0].content + '\n\n' + messages[1].content}] + messages[2:] %}{% endif %}"
)
# a folder of the hub's own cache
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})")
# what only training needs, checksums of it, and PEFT's card, which names a local folder
LEFT_OUT = ("optimizer.safetensors", "SHA256SUMS", "README.md")


def bundle(cfg: RunConfig, store: Store, out: Path, verdict: Verdict | None = None) -> None:
    """Write a finished run's best candidate to `out`.

    These are prompt.json, the adapter (if weights were tuned), the tokenizer, README.md on how to
    use them and how good they are, metrics.json, report.html, and the run's record. Raises
    UserError if the run's checkpoint is not in this working folder, as for records that came with
    the repository, or is damaged, if its backbone is not in the cache, or if `out` cannot be
    written.
    """
    step = best_step(store.record(cfg))
    adapter = step["adapter"]
    if adapter and not (store.scratch(cfg) / adapter).is_dir():
        raise UserError(
            f"the checkpoint of {cfg.run_id} is not in this working folder; "
            "make the run here to bundle it."
        )
    base = checkpoints.cached_folder(cfg.backbone)
    if base is None:
        raise UserError(f"{cfg.backbone} is not in the cache, and a bundle needs its tokenizer.")
    # readable without this library
    write_json(out / "prompt.json", step["prompt"])
    with saving(out):
        shutil.copytree(store.record(cfg), out / "record", dirs_exist_ok=True)
        # an earlier bundle in the same folder may have had one
        shutil.rmtree(out / "adapter", ignore_errors=True)
        if adapter:
            source = store.scratch(cfg) / adapter
            _copy_adapter(source, out / "adapter", base_model(cfg.backbone)[0])
        plain = _save_tokenizer(cfg, base, out)
    text = card(cfg.backbone, bool(adapter), plain)
    if verdict:
        write_json(out / "metrics.json", verdict.metrics)
        report.write(out / "report.html", out / "record", verdict)
        text += f"\n{verdict.card}"
    write_text(out / "README.md", text)


def card(backbone: str, tuned: bool, plain: bool) -> str:
    """Return the README of a bundle; `plain`: of a base model without a chat format."""
    base, option = base_model(backbone)
    return CARD.format(
        base_model="" if Path(base).is_absolute() else f"base_model: {base}\n",
        base=json.dumps(base) + option,
        adapter=LOAD_ADAPTER if tuned else "",
        reply=REPLY.format(cut=CUT if plain else ""),
    )


def _copy_adapter(source: Path, folder: Path, base: str) -> None:
    """Copy an adapter for whoever may read the folder, and name its base."""
    require_whole(source, f"delete {source.parent} to make the run again")
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns(*LEFT_OUT))
    for path in folder.iterdir():
        path.chmod(0o644)
    path = folder / "adapter_config.json"
    # where PEFT looks for the base
    write_json(path, read_json(path) | {"base_model_name_or_path": base})
    write_sums(folder)


def _save_tokenizer(cfg: RunConfig, base: Path, out: Path) -> bool:
    """Write the tokenizer of the folder `base` with the chat format of the run, and how replies end.

    Returns whether the format is the plain one of base models.
    """
    # the run has loaded them
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from nslora.model.backbone import stop_ids

    tokenizer: Any = AutoTokenizer.from_pretrained(base)
    # as `from_pretrained` does for the model itself
    if (base / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(base)
    else:
        ends = GenerationConfig.from_model_config(AutoConfig.from_pretrained(base))
    stop = sorted(stop_ids(tokenizer, ends))
    plain = not tokenizer.chat_template
    tokenizer.chat_template = _template(tokenizer)
    tokenizer.save_pretrained(out / "tokenizer")
    replies = GenerationConfig(
        do_sample=False,
        max_new_tokens=cfg.max_new_tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],
    )
    replies.save_pretrained(out)
    return plain


def _template(tokenizer: Any) -> str:
    """Return the chat template that writes what the model was adapted to."""
    import jinja2

    if not tokenizer.chat_template:
        return PLAIN
    try:
        tokenizer.apply_chat_template(Prompt("s").messages("q"), tokenize=False)
    except jinja2.TemplateError:
        return MERGED + tokenizer.chat_template
    return tokenizer.chat_template


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
    if key := checkpoints.default_key(backbone):
        return base_model(key)
    folder = Path(backbone).resolve()
    if match := SNAPSHOT.search(folder.as_posix()):
        owner, name, revision = match.groups()
        return base_model(f"hub:{owner}/{name}@{revision}")
    return str(folder), ""
