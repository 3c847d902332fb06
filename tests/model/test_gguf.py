"""GGUF files by llama.cpp's converter: K quantisations, tokenizers, and what it cannot convert."""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from tinymodel import save_tiny_model

from nslora.model import gguf
from nslora.types import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose rows are a whole block of 256 numbers."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return save_tiny_model(folder, merges=[("t", "h")], width=256)


def tensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Type and values of each tensor."""
    return {
        tensor.name: (tensor.tensor_type.name, dequantize(tensor.data, tensor.tensor_type))
        for tensor in GGUFReader(path).tensors
    }


@pytest.mark.parametrize(
    ("quantisation", "kind", "error"),
    [("q4_k_m", "Q4_K", 0.1), ("q5_k_m", "Q5_K", 0.05), ("q6_k", "Q6_K", 0.03)],
)
def test_k_types_are_made_by_ggml_in_its_mixture(
    wide: Path, tmp_path: Path, quantisation: str, kind: str, error: float
) -> None:
    gguf.write(wide, tmp_path / "exact.gguf", "f32")
    gguf.write(wide, tmp_path / "small.gguf", quantisation)
    exact, small = tensors(tmp_path / "exact.gguf"), tensors(tmp_path / "small.gguf")
    assert exact.keys() == small.keys()
    for name, (type_, values) in small.items():
        _, true = exact[name]
        assert np.linalg.norm(values - true) <= error * np.linalg.norm(true), name
        if "norm" in name:
            assert type_ == "F32"
    assert small["blk.0.attn_q.weight"][0] == kind
    assert small["output.weight"][0] == "Q6_K"
    # of two layers the last is at an end
    assert small["blk.1.ffn_down.weight"][0] == "Q6_K"
    field = GGUFReader(tmp_path / "small.gguf").get_field("general.file_type")
    # as llama.cpp numbers them
    assert field and field.contents() == {"q4_k_m": 15, "q5_k_m": 17, "q6_k": 18}[quantisation]


def test_narrow_rows_take_small_blocks(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "model", merges=[("t", "h")])
    gguf.write(folder, tmp_path / "small.gguf", "q4_k_m")
    types = {name: type_ for name, (type_, _) in tensors(tmp_path / "small.gguf").items()}
    assert types["blk.0.attn_q.weight"] == "Q5_0"
    assert types["output.weight"] == types["blk.1.ffn_down.weight"] == "Q8_0"


def test_the_mixture_is_that_of_llama_cpp() -> None:
    """Of 24 layers: the first and last eighth, and every third between."""
    six = [
        n
        for n in range(24)
        if gguf.tensor_type(f"blk.{n}.attn_v.weight", "Q4_K", 24, False) == "Q6_K"
    ]
    assert six == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert gguf.tensor_type("token_embd.weight", "Q4_K", 24, True) == "Q6_K"
    assert gguf.tensor_type("token_embd.weight", "Q4_K", 24, False) == "Q4_K"
    assert gguf.tensor_type("blk.0.ffn_up.weight", "Q5_K", 24, False) == "Q5_K"


def test_a_tokenizer_is_taken_from_another_file(wide: Path, tmp_path: Path) -> None:
    gguf.write(wide, tmp_path / "own.gguf", "f16")
    config = wide / "tokenizer_config.json"
    before = config.read_text()
    template = wide / "chat_template.jinja"
    told = template.read_text()
    template.write_text(f"{told}{{# changed #}}")
    try:
        gguf.write(wide, tmp_path / "taken.gguf", "f16", tmp_path / "own.gguf")
    finally:
        config.write_text(before)
        template.write_text(told)
    own, taken = GGUFReader(tmp_path / "own.gguf"), GGUFReader(tmp_path / "taken.gguf")
    names = {name for name in own.fields if name.startswith("tokenizer.")}
    assert names == {name for name in taken.fields if name.startswith("tokenizer.")}
    for name in names - {"tokenizer.chat_template"}:
        assert own.fields[name].contents() == taken.fields[name].contents()
    assert taken.fields["tokenizer.chat_template"].contents().endswith("{# changed #}")


@pytest.mark.parametrize("what", ["architecture", "tokenizer"])
def test_what_llama_cpp_does_not_know_is_one_sentence(tmp_path: Path, what: str) -> None:
    folder = save_tiny_model(tmp_path / "model", merges=[("t", "h")])
    name, key, value = {
        "architecture": ("config.json", "architectures", ["NoSuchModel"]),
        "tokenizer": (
            "tokenizer.json",
            "pre_tokenizer",
            {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        ),
    }[what]
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=r"cannot write this model as GGUF \(.*\)\.$") as error:
        gguf.write(folder, tmp_path / "out.gguf", "f16")
    assert "\n" not in str(error.value)


def test_a_damaged_converter_is_not_run(tmp_path: Path, monkeypatch) -> None:
    good = gguf.converter()
    monkeypatch.setenv("NSLORA_CACHE", str(tmp_path))
    fetched = []

    def fetch(sdist, path: Path) -> None:
        fetched.append(sdist.file)
        with tarfile.open(path, "w:gz") as archive:
            archive.add(good, f"{sdist.name}-{sdist.version}/thirdparty/llama.cpp")

    monkeypatch.setattr(gguf, "fetch_sdist", fetch)
    folder = gguf.converter()
    assert gguf.converter() == folder and len(fetched) == 1
    path = folder / "conversion" / "base.py"
    path.write_text(path.read_text() + "\nprint(1)\n")
    gguf.converter()
    assert len(fetched) == 2 and "print(1)\n" not in path.read_text()[-20:]
    # what was fetched once is what the lock pins
    lock = (ROOT / "requirements.lock").read_text()
    pinned = re.findall(rf"^{gguf.SDIST.name}==(\S+)", lock, re.MULTILINE)
    assert pinned == [gguf.SDIST.version] and f"sha256:{gguf.SDIST.sha256}" in lock
