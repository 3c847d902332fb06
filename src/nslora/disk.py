"""What is on disk: found damaged before it is used, and one sentence where it cannot be written.

A JSON file of its own carries a seal, the SHA-256 of its value; a folder that appears at once has a
file SHA256SUMS, which `sha256sum -c` checks, too.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from nslora.types import Json, UserError

# the checksums of a folder's files
SUMS = "SHA256SUMS"
# the key of a JSON object's own checksum
SEAL = "sha256"


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Raise UserError where `path` cannot be written: a full disk, a folder of somebody else."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"cannot write {path} ({reason}).") from error


def sha256(path: Path) -> str:
    """Return the hex SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, read once per process as long as its size and times stay.

    A second for each GB where the processor has instructions for it; loading a model takes longer.
    Sizes and times kept from an earlier process would be cheaper and tell less: a disk that loses
    bits changes neither.
    """
    now = os.stat(path)
    return _digest(path, (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns))


@lru_cache(maxsize=4096)
def _digest(path: Path, _state: tuple[int, ...]) -> str:
    return sha256(path)


# ---- folders


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS over the files of a folder, whole or not at all."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file() and path.name != SUMS]
    part = folder / f"{SUMS}.part"
    with saving(folder / SUMS):
        part.write_text("".join(f"{sha256(path)}  {path.name}\n" for path in files), "utf-8")
        part.replace(folder / SUMS)


def damaged(folder: Path, besides: str = "no suffix") -> str:
    """Return the name of a file of a folder that is not as its SHA256SUMS says; "" if all are.

    Files whose names end in `besides` are taken as they are, so long as they are there.
    """
    try:
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return SUMS
    for line in lines:
        checksum, _, name = line.partition("  ")
        # False for a name that no file can have, too
        if not name or not os.path.isfile(folder / name):
            return name or SUMS
        if not name.endswith(besides) and digest(folder / name) != checksum:
            return name
    return "" if lines else SUMS


def require_whole(folder: Path, remedy: str) -> None:
    """Raise UserError, with the file and the remedy, where a folder is not as its SHA256SUMS says."""
    if name := damaged(folder):
        raise UserError(f"{folder / name} is damaged or missing; {remedy}.")


# ---- JSON objects


def sealed(value: Json) -> Json:
    """Return an object with its checksum as one more key."""
    return {**value, SEAL: _checksum(value)}


def unsealed(value: Any) -> Json:
    """Return what was sealed; raises ValueError where it is not that any more."""
    if not isinstance(value, dict) or SEAL not in value:
        raise ValueError("it has no checksum")
    content = {key: part for key, part in value.items() if key != SEAL}
    if value[SEAL] != _checksum(content):
        raise ValueError("it is not what its checksum says")
    return content


def _checksum(value: Json) -> str:
    # sets become sorted lists, as they do in the file
    text = json.dumps(value, sort_keys=True, default=sorted)
    return hashlib.sha256(text.encode()).hexdigest()
