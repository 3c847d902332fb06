"""Hand a bundle on to other tools: merged weights, one GGUF file, or a model for Ollama.

Weights are merged in float32 and rounded once, when they are stored. Whoever loads a form needs
neither this library nor PEFT; the prompt is beside the weights, and in Ollama's Modelfile.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nslora.cache import require_disk
from nslora.model import checkpoints, gguf
from nslora.runs import evaluate
from nslora.runs.adapt import check_out
from nslora.runs.bundles import ollama
from nslora.runs.bundles.bundle import CUT, PLAIN_ENDS, REPLY, base_model
from nslora.runs.store import read_json, write_text
from nslora.types import Json, UserError

# of merged weights, by the names of quantisations; the first is the default
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
# of a bundle, that a form takes over as they are
KEPT = ("prompt.json", "generation_config.json", "metrics.json")
# of a bundle, beside its record
NEEDED = ("prompt.json", "generation_config.json", "tokenizer", "README.md")

MERGED = """---
library_name: transformers
{base_model}---

# Adapted model, merged

One model in the format of transformers, stored in {dtype}: weights with the adapter merged in, tokenizer, chat format,
and how replies end. `prompt.json` holds the system prompt and the question template (`{{question}}` is the slot);
`system.txt` is the system prompt alone.

```python
import json
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
model = AutoModelForCausalLM.from_pretrained(".", dtype="auto")
replies = model.generation_config
{reply}```

With vLLM: `vllm serve .`, and then

```
{curl}
```
"""
GGUF = """# Adapted model, GGUF

`{file}` has the weights with the adapter merged in, the tokenizer and the chat format. `prompt.json` holds the system
prompt and the question template (`{{question}}` is the slot); `system.txt` is the system prompt alone. Both belong to
the model: it was adapted to be asked so.

```
llama-server -m {file} --jinja --port 8000
{curl}
```
"""
OLLAMA = """# Adapted model for Ollama

```
ollama create adapted -f Modelfile
ollama run adapted "your question"
```

The Modelfile has the system prompt, the question template and the chat format, so that a question is asked as the model
was adapted to be asked. The weights are in `{file}`, the prompt in `prompt.json`, too.
"""
CURL = """curl http://localhost:8000/v1/chat/completions -H "Content-Type: application/json" -d @- <<'JSON'
{body}
JSON"""


@dataclass(frozen=True)
class Form:
    """What a bundle can be exported to.

    Attributes:
        write: writes it into a folder, in a quantisation, and returns its README.
        quantisations: the first is the default.
        bytes: of disk for each parameter while it is made, at most.
    """

    write: Callable[[evaluate.Bundle, Path, Path, str], str]
    quantisations: Sequence[str]
    bytes: int


def export(
    bundle: str | Path, out: str | Path, to: str, quantisation: str = "", backbone: str = ""
) -> Path:
    """Write a bundle in another form to the new folder `out`, and return that.

    Args:
        to: "merged", "gguf" or "ollama".
        quantisation: one of the form's; "" for its default.
        backbone: where the bundle's weights are now, if they have moved.

    Raises UserError for wrong input, for what llama.cpp cannot hold, and where there is no room.
    """
    folder, out = Path(bundle), Path(out).absolute()
    if to not in FORMS:
        raise UserError(f"unknown form {to!r}; choose from {', '.join(FORMS)}.")
    form = FORMS[to]
    quantisation = quantisation or form.quantisations[0]
    if quantisation not in form.quantisations:
        choices = ", ".join(form.quantisations)
        raise UserError(f"unknown quantisation {quantisation!r} of {to}; choose from {choices}.")
    check_out(out)
    _require_bundle(folder)
    opened = evaluate.open_bundle(folder, backbone, dtype="float32", device="cpu")
    # another name than that of an adaptation to the same folder
    work = out.with_name(f".{out.name}.export")
    try:
        # left by a try that was killed
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        count = sum(weight.numel() for weight in opened.backbone.model.parameters())
        require_disk(form.bytes * count, to, work)
        _export(form, opened, folder, work, quantisation)
        work.replace(out)
    except OSError as error:
        raise UserError(f"folder {out} cannot be written ({error.strerror or error}).") from None
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return out


def _require_bundle(folder: Path) -> None:
    """Raise UserError for what is no whole bundle, before any weights are loaded."""
    evaluate.read_bundle(folder)
    for name in NEEDED:
        if not (folder / name).exists():
            raise UserError(f"{folder} has no {name}: the bundle is not whole, or an old one.")


def _export(
    form: Form, opened: evaluate.Bundle, folder: Path, work: Path, quantisation: str
) -> None:
    """Write a form, and what all forms have beside it."""
    readme = form.write(opened, folder, work, quantisation)
    for name in KEPT:
        if (folder / name).is_file():
            shutil.copyfile(folder / name, work / name)
    write_text(work / "system.txt", opened.prompt.system)
    _, section, verdict = (folder / "README.md").read_text("utf-8").partition("\n## Is it better?")
    write_text(work / "README.md", f"{readme}{section}{verdict}")


def _merged(opened: evaluate.Bundle, folder: Path, out: Path, quantisation: str) -> str:
    """Write merged weights with their tokenizer."""
    _merge(opened, folder, out, DTYPES[quantisation])
    base, _ = base_model(opened.cfg.backbone)
    return MERGED.format(
        base_model="" if Path(base).is_absolute() else f"base_model: {base}\n",
        dtype=DTYPES[quantisation],
        reply=REPLY.format(cut=CUT if _is_plain(opened) else ""),
        curl=_curl(opened),
    )


def _gguf(opened: evaluate.Bundle, folder: Path, out: Path, quantisation: str) -> str:
    """Write one GGUF file."""
    file = _write_gguf(opened, folder, out, quantisation)
    return GGUF.format(file=file, curl=_curl(opened))


def _ollama(opened: evaluate.Bundle, folder: Path, out: Path, quantisation: str) -> str:
    """Write a GGUF file and a Modelfile."""
    file = _write_gguf(opened, folder, out, quantisation)
    tokenizer, plain = _tokenizer(folder), _is_plain(opened)
    # ids, as texts that Ollama stops at
    ids = read_json(folder / "generation_config.json")["eos_token_id"]
    ends = [tokenizer.decode([end]) for end in ids] + list(PLAIN_ENDS) * plain
    write_text(
        out / "Modelfile",
        ollama.modelfile(
            file,
            tokenizer,
            opened.prompt,
            list(dict.fromkeys(ends)),
            opened.cfg.max_new_tokens,
            plain,
        ),
    )
    return OLLAMA.format(file=file)


FORMS = {
    "merged": Form(_merged, list(DTYPES), 4),
    "gguf": Form(_gguf, list(gguf.QUANTISATIONS), 8),
    "ollama": Form(_ollama, list(gguf.QUANTISATIONS), 8),
}


def _merge(opened: evaluate.Bundle, folder: Path, out: Path, dtype: str) -> None:
    """Write the adapted weights as a model folder of transformers."""
    import torch
    from peft import PeftModel

    model: Any = opened.backbone.model
    if isinstance(model, PeftModel):
        try:
            model = model.merge_and_unload(safe_merge=True)
        except ValueError as error:
            raise UserError(f"the adapter of {folder} cannot be merged ({error}).") from error
    model.to(getattr(torch, dtype)).save_pretrained(out)
    shutil.copytree(folder / "tokenizer", out, dirs_exist_ok=True)
    # how replies end, not how those of the base did
    shutil.copyfile(folder / "generation_config.json", out / "generation_config.json")
    for path in out.glob("*.safetensors"):
        # for whoever may read the folder
        path.chmod(0o644)


def _write_gguf(opened: evaluate.Bundle, folder: Path, out: Path, quantisation: str) -> str:
    """Write the GGUF file, and return its name."""
    name = f"model-{quantisation}.gguf"
    merged = out / "merged"
    _merge(opened, folder, merged, "float32")
    print(f"writing {name}", file=sys.stderr, flush=True)
    key = checkpoints.default_key(opened.backbone.name)
    source = checkpoints.gguf(key) if key else None
    # a tokenizer of sentencepiece is converted from its own file, which only the base has
    model = checkpoints.folder(opened.backbone.name) / "tokenizer.model"
    if model.is_file():
        shutil.copy(model, merged)
    gguf.write(merged, out / name, quantisation, source)
    shutil.rmtree(merged)
    return name


def _is_plain(opened: evaluate.Bundle) -> bool:
    """Tell whether the base model has no chat format of its own."""
    return not opened.backbone.tokenizer.chat_template


def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "tokenizer")


def _curl(opened: evaluate.Bundle) -> str:
    """Return a command that asks a server as the model was adapted to be asked."""
    body: Json = {
        "messages": opened.prompt.messages("your question"),
        "temperature": 0,
        "max_tokens": opened.cfg.max_new_tokens,
    }
    if _is_plain(opened):
        body["stop"] = list(PLAIN_ENDS)
    return CURL.format(body=json.dumps(body, indent=1, ensure_ascii=False))
